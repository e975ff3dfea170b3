"""The categories of an annotation file."""

from .ids import settle_ids

__all__ = ["check_categories"]


def check_categories(categories, report):
    """Checks ids and names.

    Args:
        categories (list[dict]): changed in place.
        report (Report): gets the counts.

    Returns:
        list[dict]: the categories that are left.

    Raises:
        InputError: a category has no id or no name, or two have the same id.
    """
    settle_ids(categories, "categories", report)
    by_id, names = {}, set()
    for index, category in enumerate(categories):
        name = category.get("name")
        if isinstance(name, (int, float)) and not isinstance(name, bool):
            name = category["name"] = str(name)
            report.mended("a name is a number and is taken as text", "categories", index)
        if not isinstance(name, str) or not name:
            raise report.fault(
                f"has the name {name!r}", "give the category a name", "categories", category, index
            )
        other = by_id.setdefault(category["id"], category)
        if other is category:
            if name in names:
                report.noted(
                    f"the name {name!r} is that of another category, and results by category show "
                    "only one of them",
                    "categories",
                    index,
                )
            names.add(name)
        elif other["name"] == name:
            report.mended("a category is listed again and is left out", "categories", index)
        else:
            raise report.fault(
                f"gives {name!r} the id {category['id']!r} that {other['name']!r} has",
                "give each category an id of its own",
                "categories",
                category,
                index,
            )
    return list(by_id.values())
