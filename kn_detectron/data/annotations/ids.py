"""Ids of images and categories, and the references of the objects to them."""

from .values import as_key, as_whole

__all__ = ["References", "settle_ids"]


def settle_ids(entries, part, report):
    """Makes the ids of a list whole numbers, or leaves them text if all of them are text.

    Args:
        entries (list[dict]): changed in place.
        part (str): name of the list.
        report (Report): gets the counts.

    Raises:
        InputError: an id is missing or is neither a number nor text.
    """
    texts = [isinstance(entry.get("id"), str) for entry in entries]
    mixed = any(texts) and not all(texts)
    for index, (entry, is_text) in enumerate(zip(entries, texts)):
        found = entry.get("id")
        if type(found) is int or (is_text and found and not mixed):
            continue
        entry["id"] = as_whole(found)
        if entry["id"] is None:
            entry["id"] = found
            raise report.fault(
                f"has the id {found!r}, which is no whole number",
                "give every entry a number of its own",
                part,
                entry,
                index,
            )
        report.mended("an id was not written as a whole number and now is one", part, index)


class References:
    """Finds the entry that an object refers to, even if 7 is written as 7.0 or "7".

    Args:
        ids (Iterable): of the entries.
    """

    def __init__(self, ids):
        self._ids = frozenset(ids)
        self._by_key = {}
        for found in self._ids:
            # Of "7" and "007" nobody knows which one 7 is.
            key = as_key(found)
            self._by_key[key] = None if key in self._by_key else found

    def __contains__(self, value):
        return value in self._ids

    def resolve(self, value):
        """Gives the id that is meant, or None."""
        key = as_key(value)
        return self._by_key.get(key) if isinstance(key, (int, str)) else None
