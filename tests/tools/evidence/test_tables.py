"""What the tables of docs/evidence/ say of the runs."""

from evidence import tables

from .results import run


def test_a_table_has_means_ranges_and_differences():
    data = {
        "runs": [run("BN_frozen", 2, 1, 10.0), run("BN_frozen", 2, 2, 12.0), run("KN", 2, 1, 13.0)],
        "differences": [
            {
                **{"ours": "KN", "theirs": "BN_frozen", "images": 2, "task": task, "seeds": seeds},
                **{"by_seed": values, "low": -0.5, "high": 4.25, "learning_rates": [0.01, 0.01]},
            }
            for seeds, values in (([1], [3.0]), ([2, 3], [1.0, 3.0]))
            for task in ("bbox", "segm")
        ],
    }
    text = tables.detection_tables(data)
    assert "11.0 (10.0 to 12.0)" in text and "22.0 (20.0 to 24.0)" in text
    assert "| 1          | +3.0 (-0.5 to +4.2)" in text
    assert "| 2, 3       | +2.0 (-0.5 to +4.2)" in text and "1.0 / 2.0 / 3.0" in text
    # Over the three seeds: t = 4.303, and the standard error 2/3.
    (wide,) = [line.split("|") for line in text.split("\n") if "| 1, 2, 3 " in line]
    assert [cell.strip() for cell in wide[2:5]] == [
        *("1, 2, 3", "+3.0, +1.0, +3.0", "+2.3 (-0.5 to +5.2)")
    ]
    assert "1 image per step" not in text and ", at 0.01" not in text
    # What few readers need is folded away: a blank line on both sides, so that it stays Markdown.
    folded = text.split("<details>")[1]
    assert "</summary>\n\n|" in folded and "|\n\n</details>" in folded
    assert "over photographs" in folded and "over seeds" not in folded


def test_the_summary_compares_runs_with_bn_beside_them():
    """Each seed counts once, and of BN* the lowest learning rate is compared."""

    def difference(seeds, value, rate=0.01):
        names = {"ours": "KN", "theirs": "BN_frozen", "images": 2, "learning_rates": [0.01, rate]}
        return {**names, "seeds": seeds, "by_seed": [value] * len(seeds), "low": 0.0, "high": 9.0}

    data = {
        "runs": [
            run("KN", 2, 1, 13.0),
            run("GN", 2, 1, 3.0),
            run("BN_frozen", 2, 1, 10.0),
            {**run("BN_frozen", 2, 1, 11.0), "learning_rate": 0.02},
        ],
        "differences": [
            {**difference(*of), "task": task}
            for of in (([3], 1.0), ([1, 2], 4.0), ([2], 9.0), ([1], 9.0, 0.02))
            for task in ("bbox", "segm")
        ],
    }
    rows = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in tables.summary_table(data).split("\n")
    ]
    found = {(row[0], row[2]): row[-1] for row in rows[2:]}
    assert found == {
        (r"BN\*, frozen", "0.01"): "",
        (r"BN\*, frozen", "0.02"): "",
        ("GN with BN's scale and shift", "0.01"): "",
        ("KN, gain 0.02 annealed", "0.01"): "+3.0 / +3.0 (3)",
    }


def test_each_learning_rate_of_an_arm_has_a_row_of_its_own():
    def difference(rate, value):
        names = {"ours": "KN", "theirs": "BN_frozen", "images": 2, "learning_rates": [0.01, rate]}
        return {**names, "seeds": [1], "by_seed": [value], "low": 0.0, "high": 9.0}

    data = {
        "runs": [
            run("KN", 2, 1, 13.0),
            run("BN_frozen", 2, 1, 10.0),
            {**run("BN_frozen", 2, 1, 11.0), "learning_rate": 0.005},
        ],
        "differences": [
            {**difference(rate, value), "task": task}
            for rate, value in ((0.01, 3.0), (0.005, 2.0))
            for task in ("bbox", "segm")
        ],
    }
    cells = [
        [c.strip() for c in line.split("|")] for line in tables.detection_tables(data).split("\n")
    ]
    rows = {tuple(c[1:3]): c[4] for c in cells if len(c) > 8}
    assert rows[r"BN\*, frozen", "0.005"] == "11.0" and rows[r"BN\*, frozen", "0.01"] == "10.0"
    ours = "KN, gain 0.02 annealed minus BN\\*, frozen, at"
    found = {c[1]: c[3] for c in cells if c[1:] and c[1].startswith(ours)}
    assert found == {
        f"{ours} 0.005": "+2.0 (+0.0 to +9.0)",
        f"{ours} 0.01": "+3.0 (+0.0 to +9.0)",
    }


def test_norms_that_share_nothing_have_one_result_for_all_micro_batches():
    def result(arm, size, moving, online):
        results = {"moving": {"top1": moving}, "online": {"top1": online}}
        return {"arm": arm, "micro_batch": size, "seed": 1, "results": results}

    runs = [result("GN", 1, 50.0, 50.0), result("BN", 2, 40.0, 41.0), result("BN", 64, 60.0, 61.0)]
    lines = tables.classification_table({"runs": runs}).splitlines()
    assert lines[2].count("50.0 / 50.0") == 2
    assert "40.0 / 41.0 " in lines[3] and "60.0 / 61.0 " in lines[3]
    second = {**result("BN", 2, 44.0, 42.0), "seed": 2}
    assert "42.0 / 41.5 (2)" in tables.classification_table({"runs": [*runs, second]})
    assert len(lines) == 4  # norms without any run have no line


def test_learning_rates_are_compared():
    runs = [run("KN", 2, 1, 3.0), {**run("BN", 2, 1, 1.0), "learning_rate": 0.02}]
    lines = tables.choice_table({"runs": runs}).splitlines()
    assert "0.01" in lines[0] and "0.02" in lines[0]
    assert "1.0 / 1.0" in lines[2] and "not run" in lines[2] and "3.0 / 3.0" in lines[3]


def test_the_paper_stands_beside_our_runs_and_has_no_part_in_them():
    def result(arm, size, seed, top1):
        results = {"moving": {"top1": top1}, "online": {"top1": 0.0}}
        return {"arm": arm, "micro_batch": size, "seed": seed, "results": results}

    runs = [result("BRN", 2, 1, 40.0), result("BRN", 2, 2, 41.0), result("WN", 1, 1, 30.0)]
    header, _, *lines = tables.against_paper_table({"runs": runs}).splitlines()
    cells = {row[0]: row[1:] for row in ([c.strip() for c in li.split("|")[1:-1]] for li in lines)}
    assert cells["BRN"][:3] == ["40.5 (2)", "not run", "90.4"]
    assert cells["WN"][:3] == ["30.0", "30.0", "87.8"]
    assert "ours, 64" in header and "paper, Inception, 2" in header
    # The rows of the other table are those of the picture.
    assert "BRN" not in tables.classification_table({"runs": runs + [result("BN", 2, 1, 1.0)]})


def test_the_zoo_has_a_line_for_all_seeds_and_names_released_weights():
    """They are those of the config as it is: other rates and numbers of images have none."""

    def of(images, seed, ap, rate):
        return {**run("KN_gain0", images, seed, ap), "learning_rate": rate, "steps": 3000}

    data = {
        "runs": [
            of(2, 2, 13.0, 0.005),
            of(2, 1, 12.0, 0.005),
            of(2, 1, 9.0, 0.01),
            of(1, 1, 8, 0.005),
        ]
    }
    rows = [[c.strip() for c in row.split("|")] for row in tables.zoo_table(data).split("\n")[2:]]
    found = [(row[2], row[3], row[4], row[5], row[-2]) for row in rows]
    assert found == [
        ("3000 x 2 images", "0.005", "1, 2", "12.0, 13.0", "`kn://mask_rcnn_lite0_FPN_KN.pth`"),
        ("3000 x 2 images", "0.01", "1", "9.0", ""),
        ("3000 x 1 image", "0.005", "1", "8.0", ""),
    ]
    data["runs"] = data["runs"][2:]
    assert "weights" not in tables.zoo_table(data)
