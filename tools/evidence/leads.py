"""How far one method is ahead of another by seed, and how far other seeds could lie from that."""

from math import sqrt
from statistics import mean, stdev
from typing import Dict, Iterable, List, NamedTuple, Sequence, Tuple

from . import arms

__all__ = ["COMPARED", "FILES", "Lead", "by_comparison", "interval_over_seeds", "kn_leads"]

# The differences that docs/evidence/ reports: (ours, theirs).
COMPARED = (
    ("KN", "BN_frozen"),
    ("KN", "BN_affine"),
    ("KN", "BN"),
    ("KN", "KN_gain0"),
    ("KN_gain0", "BN_frozen"),
    ("KN_gain0", "BN_affine"),
    ("KN_gain0", "BN"),
    ("KN_gain0", "GN"),
    ("GN", "BN_frozen"),
    ("BN_affine", "BN_frozen"),
    *((part, "KN_gain0") for part in arms.PARTS),
    ("R50_KN", "R50_BN_frozen"),
    ("R50_KN", "R50_BN_affine"),
    ("R50_KN", "R50_BN"),
    ("R50_KN", "R50_KN_gain0"),
    ("R50_KN_gain0", "R50_BN_frozen"),
    ("R50_KN_gain0", "R50_BN_affine"),
    ("R50_KN_gain0", "R50_BN"),
    ("R50_KN_gain0", "R50_GN"),
    ("R50_KN_gain0", "R50_GKN"),
    ("R50_KN_gain0", "R50_KN_from_BN"),
    ("R50_KN_from_BN", "R50_BN_frozen"),
    ("R50_GN", "R50_BN_frozen"),
    ("R50_BN_affine", "R50_BN_frozen"),
    ("R50_GKN", "R50_BN_frozen"),
    ("R50_GKN", "R50_GN"),
)

# The files with runs of KN at gain 0 beside others, and what these runs start from.
FILES = {
    "detection": "EfficientNet-Lite0",
    "own_rate": "EfficientNet-Lite0",
    "long": "EfficientNet-Lite0",
    "own_weights": "slim R50, own weights",
    "second_weights": "slim R50, second pre-training",
}
# What KN has to beat.
_OTHERS = ("BN_frozen", "BN_affine", "GN")

# The 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom. The last one serves for more
# of them too, which makes an interval a little too wide.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def by_comparison(differences: Sequence[Dict]) -> Dict[Tuple, Dict[str, Dict[int, float]]]:
    """The differences in AP by seed, for all runs that compare the same.

    Args:
        differences: those of one file of docs/evidence/*.json.

    Returns:
        dict: by (ours, theirs, images, learning rate of ours, of theirs) and then by task, the
        difference for each seed. A seed that was compared twice has that of the entry with the
        most seeds. The most images come first, then the pairs as :data:`COMPARED` has them, then
        the lowest rates.
    """
    found: Dict[Tuple, Dict[str, Dict[int, float]]] = {}
    for entry in sorted(differences, key=lambda d: -len(d["seeds"])):
        comparison = entry["ours"], entry["theirs"], entry["images"], *entry["learning_rates"]
        seeds = found.setdefault(comparison, {}).setdefault(entry["task"], {})
        for seed, value in zip(entry["seeds"], entry["by_seed"]):
            seeds.setdefault(seed, value)

    def place(comparison):
        ours, theirs, images, *rates = comparison
        return -images, COMPARED.index((ours, theirs)), rates

    return {
        comparison: {task: dict(sorted(seeds.items())) for task, seeds in found[comparison].items()}
        for comparison in sorted(found, key=place)
    }


def interval_over_seeds(values: Sequence[float]) -> Tuple[float, float]:
    """The 95% confidence interval of the mean over all seeds: mean ± t s / √n (Student's t).

    It holds for differences that are distributed normally over the seeds.

    Args:
        values: two or more differences, one for each seed.
    """
    centre, count = mean(values), len(values)
    reach = _QUANTILES[min(count - 1, len(_QUANTILES)) - 1] * stdev(values) / sqrt(count)
    return centre - reach, centre + reach


class Lead(NamedTuple):
    """How far KN at gain 0 is ahead of another norm.

    Attributes:
        network: and what it starts from.
        steps, images: the schedule, and images per step.
        against: the other norm.
        rates: the two learning rates, KN's first.
        by_seed: by task and seed, the difference in AP.
    """

    network: str
    steps: int
    images: int
    against: str
    rates: str
    by_seed: Dict[str, Dict[int, float]]


def kn_leads(files: Iterable[Dict]) -> List[Lead]:
    """The leads of KN at gain 0 over BN*, BN* with scale and shift trained, and GN.

    Args:
        files: the contents of :data:`FILES`, in that order.
    """
    leads = []
    for network, data in zip(FILES.values(), files):
        steps = {(run["arm"], run["images"]): run["steps"] for run in data["runs"]}
        for comparison, by_seed in by_comparison(data["differences"]).items():
            ours, theirs, images, *rates = comparison
            pair = ours.removeprefix("R50_"), theirs.removeprefix("R50_")
            if pair[0] == "KN_gain0" and pair[1] in _OTHERS:
                against, rates = arms.ARMS[theirs].label, " / ".join(map(str, rates))
                leads.append(Lead(network, steps[ours, images], images, against, rates, by_seed))
    return leads
