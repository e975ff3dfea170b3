"""What became of a checkpoint's tensors, as a small table."""

import re
from collections import Counter

from tabulate import tabulate

__all__ = ["table"]

# In the order of the table; the first that is found in a tensor's name is its group.
_GROUPS = [
    (re.compile(pattern), group)
    for pattern, group in (
        (r"\.gain_(logit|scale)$", "KN gains"),
        (r"\.(mean_offset|log_var_scale|process_noise)$", "KN process models"),
        (r"(^|\.)stem\.", "stem"),
        (r"(^|\.)res2\.", "res2"),
        (r"(^|\.)res3\.", "res3"),
        (r"(^|\.)res4\.", "res4"),
        (r"(^|\.)res5\.", "res5"),
        (r"(^|\.)(fpn_|top_block)", "FPN"),
        (r"(^|\.)(proposal_generator|rpn_head)\.", "RPN"),
        (r"(^|\.)box_head\.", "box head"),
        (r"(^|\.)(box_predictor|cls_score|bbox_pred)\.", "box predictor"),
        (r"(^|\.)(cls|bbox)_subnet\.", "towers"),
        (r"(^|\.)mask_head\.", "mask head"),
        (r"(^|\.)keypoint_head\.", "keypoint head"),
        (r"(^|\.)(linear|fc1000)\.", "classifier"),
    )
]
_OTHER = "other"


def _group(name):
    return next((group for pattern, group in _GROUPS if pattern.search(name)), _OTHER)


def table(columns):
    """Draws counts of tensors by the part of the network that they belong to.

    Args:
        columns (dict[str, iterable[str]]): names of tensors by heading.

    Returns:
        str: of several lines.
    """
    counts = {heading: Counter(map(_group, names)) for heading, names in columns.items()}
    groups = [*(group for _, group in _GROUPS), _OTHER]
    order = [group for group in groups if any(group in count for count in counts.values())]
    rows = [[group, *(count.get(group, "") for count in counts.values())] for group in order]
    rows.append(["all", *(sum(count.values()) for count in counts.values())])
    return tabulate(rows, headers=["tensors", *counts])
