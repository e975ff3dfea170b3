"""Results of runs, as tools/evidence/detection.py writes them."""


def run(arm, images, seed, ap):
    numbers = {"AP": ap, "AP50": 2 * ap, "APs": 1.0, "APm": 2.0, "APl": 3.0}
    return {
        "arm": arm,
        "images": images,
        "seed": seed,
        "learning_rate": 0.01,
        "results": {"bbox": numbers, "segm": numbers},
    }
