"""The paired bootstrap over photographs: is a difference in AP more than the choice of photos?"""

import contextlib
import io
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["MatchedRun", "paired_bootstrap"]


class MatchedRun:
    """The detections of one run. pycocotools matches them with the truth once, for all samples.

    Args:
        truth: the annotations.
        detections: in COCO's format for results.
        task: "bbox" or "segm".
    """

    def __init__(self, truth: COCO, detections: Sequence[Dict], task: str):
        with contextlib.redirect_stdout(io.StringIO()):
            # loadRes takes no empty list, which a run that diverged has.
            found = truth.loadRes(list(detections)) if detections else COCO()
            evaluation = COCOeval(truth, found, task)
            evaluation.params.areaRng = [[0, 1e10]]
            evaluation.params.areaRngLbl = ["all"]
            evaluation.params.maxDets = [100]
            evaluation.evaluate()
        params = evaluation.params
        self.num_photos = len(params.imgIds)
        self._recalls = params.recThrs
        by_category = np.array(evaluation.evalImgs, dtype=object)
        by_category = by_category.reshape(len(params.catIds), self.num_photos)
        # pycocotools has None where a photo has neither an object nor a detection of the category.
        matches = [[(i, m) for i, m in enumerate(row) if m is not None] for row in by_category]
        self._categories = [_Category(row) for row in matches if row]

    def average_precision(self, sample: np.ndarray) -> float:
        """COCO's AP, in percent, on some of the photographs.

        Args:
            sample: indices of photographs, which may repeat.
        """
        counts = np.bincount(sample, minlength=self.num_photos)
        found = [category.precisions(counts, self._recalls) for category in self._categories]
        return 100 * float(np.mean([p for p in found if p is not None]))


class _Category:
    """The matches of one category, the best detection first.

    Args:
        matches: those of pycocotools, each with the index of its photo; at least one.
    """

    def __init__(self, matches: Sequence[Tuple[int, Dict]]):
        self._objects = {photo: np.sum(np.equal(m["gtIgnore"], 0)) for photo, m in matches}
        photos = [np.full(len(m["dtScores"]), photo) for photo, m in matches]
        scores = np.concatenate([np.array(m["dtScores"], dtype=float) for _, m in matches])
        order = np.argsort(-scores, kind="mergesort")
        self._photos = np.concatenate(photos)[order].astype(int)
        hit = np.concatenate([m["dtMatches"] for _, m in matches], axis=1)[:, order] > 0
        counted = ~np.concatenate([m["dtIgnore"] for _, m in matches], axis=1)[:, order].astype(
            bool
        )
        self._right, self._wrong = hit & counted, ~hit & counted

    def precisions(self, counts: np.ndarray, recalls: np.ndarray) -> Optional[np.ndarray]:
        """Precision at each threshold of the overlap and each recall, as COCO interpolates it.

        Args:
            counts: how often each photo was drawn.
            recalls: rising.

        Returns:
            np.ndarray or None: None if nothing is to be found.
        """
        objects = sum(number * counts[photo] for photo, number in self._objects.items())
        if not objects:
            return None
        drawn = np.repeat(np.arange(len(self._photos)), counts[self._photos])
        right = self._right[:, drawn].cumsum(1).astype(float)
        wrong = self._wrong[:, drawn].cumsum(1)
        precision = right / (right + wrong + np.spacing(1))
        # The best that is reached at this recall or at a higher one.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))  # a recall that is not reached
        places = [np.searchsorted(row, recalls, side="left") for row in right / objects]
        return np.take_along_axis(precision, np.array(places), axis=1)


def paired_bootstrap(
    ours: List[MatchedRun], theirs: List[MatchedRun], samples: int = 1000
) -> Dict[str, Any]:
    """The difference of two methods' mean AP, with its interval on resampled photographs.

    Each sample draws as many photographs as there are, with replacement, and evaluates all runs of
    both methods on it. The interval tells how much the choice of photographs matters. How much the
    seeds matter is told by the differences of the pairs. Source: ours, after Efron's percentile method.

    Args:
        ours, theirs: the runs of two methods on the same truth, one for each seed, in pairs.
        samples: how often photographs are drawn.

    Returns:
        dict: ``by_seed``, the difference in AP of each pair; ``low`` and ``high``, the 95% interval of
        the mean of these.
    """
    generator = np.random.default_rng(0)
    num_photos = ours[0].num_photos

    def differences(sample):
        pairs = zip(ours, theirs)
        return [a.average_precision(sample) - b.average_precision(sample) for a, b in pairs]

    drawn = [
        np.mean(differences(generator.integers(0, num_photos, num_photos))) for _ in range(samples)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    by_seed = differences(np.arange(num_photos))
    return {"by_seed": by_seed, "low": float(low), "high": float(high)}
