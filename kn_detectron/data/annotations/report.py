"""The report on one annotation file: what was mended, what to know, and what is at fault."""

from ...errors import InputError

__all__ = ["Report"]


class Report:
    """Counts what was found in an annotation file, and words the first fault.

    Attributes:
        json_file (str): the file.
        is_mended (bool): whether its content was changed.
    """

    def __init__(self, json_file):
        self.json_file = json_file
        self.is_mended = False
        self._counts = {}
        self._of_the_file = []

    def rewritten(self, what):
        """Notes something about the file as a whole for which it has to be written anew.

        Args:
            what (str): as for :meth:`mended`.
        """
        self.is_mended = True
        self._of_the_file.append(what)

    def mended(self, what, part, index):
        """Counts an entry that was changed.

        Args:
            what (str): a main clause: what was found, and what became of it.
            part (str): the list that the entry is in: "images", "annotations" or "categories".
            index (int): its place there.
        """
        self.is_mended = True
        self.noted(what, part, index)

    def noted(self, what, part, index):
        """Counts an entry that was left as it is; see :meth:`mended`."""
        self._counts.setdefault((what, part), [0, index])[0] += 1

    def fault(self, what, advice, part, entry, index):
        """Words what cannot be mended.

        Args:
            what (str): the words of the sentence between the name of the file and the entry.
            advice (str): what to do; it ends the sentence.
            part, index: as for :meth:`mended`.
            entry: the entry itself. Its id is named, since an index is hard to find in a long file.

        Returns:
            InputError: to be raised.
        """
        known = f" (id {entry['id']!r})" if isinstance(entry, dict) and "id" in entry else ""
        return InputError(
            f"Annotation file {self.json_file} {what} in entry {index} of {part}{known}: {advice}."
        )

    def lines(self):
        """Gives one sentence for each kind of thing that was counted.

        Returns:
            list[str]
        """
        return [f"Annotation file {self.json_file}: {what}." for what in self._of_the_file] + [
            f"Annotation file {self.json_file}: {what}, in {count} of its {part}; the first is "
            f"entry {first}."
            for (what, part), (count, first) in self._counts.items()
        ]
