"""The paired bootstrap over photographs: is a difference in AP more than the choice of photos?"""

import contextlib
import io
from typing import Dict, List, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["MatchedRun", "paired_bootstrap"]


class MatchedRun:
    """The detections of one run, matched with the truth by pycocotools once, for many samples.

    Args:
        truth: the annotations.
        detections: in COCO's format for results.
        task: "bbox" or "segm".
    """

    def __init__(self, truth: COCO, detections: Sequence[Dict], task: str):
        with contextlib.redirect_stdout(io.StringIO()):
            self._eval = COCOeval(truth, truth.loadRes(list(detections)), task)
            self._eval.params.areaRng = [[0, 1e10]]
            self._eval.params.areaRngLbl = ["all"]
            self._eval.params.maxDets = [100]
            self._eval.evaluate()
        params = self._eval.params
        # One row for each category, one column for each photo.
        self._matches = np.empty((len(params.catIds), len(params.imgIds)), dtype=object)
        self._matches.ravel()[:] = self._eval.evalImgs

    @property
    def num_photos(self) -> int:
        """How many photographs the truth has."""
        return self._matches.shape[1]

    def average_precision(self, sample: np.ndarray) -> float:
        """COCO's AP, in percent, on some of the photographs.

        Args:
            sample: indices of as many photographs as there are; one may come several times.
        """
        self._eval.evalImgs = self._matches[:, sample].ravel().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            self._eval.accumulate()
        precision = self._eval.eval["precision"]
        return 100 * float(precision[precision > -1].mean())


def paired_bootstrap(
    ours: List[MatchedRun], theirs: List[MatchedRun], samples: int = 1000, seed: int = 0
) -> Dict[str, float]:
    """The difference of two methods' mean AP, and what it is on resampled photographs.

    Each sample draws as many photographs as there are, with replacement, and evaluates all runs of
    both methods on the same ones. The interval is about the choice of the photographs; how much
    seeds differ is told by the range over the runs. Source: ours, after Efron's percentile method.

    Args:
        ours, theirs: the runs of two methods, one for each seed, on the same truth.
        samples: how often photographs are drawn.
        seed: of the draws.

    Returns:
        dict: ``difference`` in AP, ``low`` and ``high`` of its 95% interval.
    """
    generator = np.random.default_rng(seed)
    num_photos = ours[0].num_photos

    def difference(sample):
        return _mean(ours, sample) - _mean(theirs, sample)

    drawn = [difference(generator.integers(0, num_photos, num_photos)) for _ in range(samples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "difference": difference(np.arange(num_photos)),
        "low": float(low),
        "high": float(high),
    }


def _mean(runs: List[MatchedRun], sample: np.ndarray) -> float:
    return float(np.mean([run.average_precision(sample) for run in runs]))
