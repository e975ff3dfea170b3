"""Keypoints of objects."""

from .values import as_finite

__all__ = ["check_keypoints"]


def check_keypoints(objects, count, report):
    """Checks that keypoints are triples x, y, visibility.

    Args:
        objects (list[tuple[int, dict]]): with their places in the file; changed in place.
        count (int): number of keypoints of an object, if keypoints are learned. 0 if they are not;
            then keypoints that cannot be used are removed.
        report (Report): gets the counts.

    Raises:
        InputError: keypoints that are to be learned are not such triples.
    """
    for index, annotation in objects:
        found = annotation.get("keypoints")
        if not found:
            if count:
                annotation["keypoints"] = [0] * (3 * count)
                report.mended(
                    "an object has no keypoints, and all of them are taken as not labelled",
                    "annotations",
                    index,
                )
        elif not _are_keypoints(found, count):
            if count:
                raise report.fault(
                    "has keypoints that are not x, y and visibility of each of the "
                    f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {count}",
                    "correct them, or that number if these objects have another",
                    "annotations",
                    annotation,
                    index,
                )
            del annotation["keypoints"]
            report.mended(
                "keypoints cannot be used and are left out, since MODEL.KEYPOINT_ON is False",
                "annotations",
                index,
            )
        if count:
            labelled = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
            if annotation.get("num_keypoints") != labelled:
                annotation["num_keypoints"] = labelled
                report.mended(
                    "num_keypoints is not the number of keypoints that are labelled, and now is",
                    "annotations",
                    index,
                )


def _are_keypoints(found, count):
    return (
        isinstance(found, list)
        and len(found) % 3 == 0
        and (not count or len(found) == 3 * count)
        and all(not isinstance(value, str) and as_finite(value) is not None for value in found)
    )
