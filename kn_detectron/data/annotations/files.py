"""Checks that the images of an annotation file exist under the names that it gives them."""

import os
import sys
import unicodedata

from detectron2.utils.file_io import PathManager

from ...errors import InputError

__all__ = ["find_images"]


def _with_slashes(name):
    return name.replace("\\", "/")


def _composed(name):
    return unicodedata.normalize("NFC", name)


# How a listed name may differ from the name of its file, and the function that makes both alike.
_SPELLINGS = (
    ("backslashes", _with_slashes),
    ("another Unicode normal form", lambda name: _composed(_with_slashes(name))),
    ("other capital letters", lambda name: _composed(_with_slashes(name)).casefold()),
)


def find_images(images, image_root, dataset_name, report):
    """Looks for all images, by listing each folder once instead of asking for each image.

    Systems spell names differently. A name that differs only in such a spelling from the name of
    one file is replaced by the name of the file.

    Args:
        images (list[dict]): of the annotation file; file names are changed in place.
        image_root (str): the folder.
        dataset_name (str): to be named.
        report (Report): gets the counts.

    Raises:
        InputError: the folder or an image is missing.
    """
    _check_root(image_root, dataset_name)
    folders = _Folders(image_root)
    missing = []
    for index, image in enumerate(images):
        if folders.has(image["file_name"]):
            continue
        found, difference = folders.find_alike(image["file_name"])
        if found is None:
            missing.append(image["file_name"])
        else:
            image["file_name"] = found
            report.mended(
                f"a file_name has {difference} where its file has not, and becomes that of the "
                "file",
                "images",
                index,
            )
    if missing:
        raise InputError(
            f"Image folder {image_root} lacks {len(missing)} of the {len(images)} images of "
            f"dataset {dataset_name}, the first is {missing[0]}: expected all of them, "
            f"{_advice(missing[0], image_root)}."
        )


def _check_root(image_root, dataset_name):
    if not PathManager.isdir(image_root):
        otherwise = ""
        if os.sep not in dataset_name:  # a folder of --dataset is not looked for elsewhere
            otherwise = (
                ", or set the environment variable DETECTRON2_DATASETS to the folder that holds "
                "the datasets"
            )
        raise InputError(
            f"Image folder {image_root} of dataset {dataset_name} does not exist: put the images "
            f"there{otherwise}."
        )


def _advice(name, image_root):
    if "\\" in name:
        return "write / for \\ in file_name and copy what is missing"
    below = name.partition("/")[2]
    if below and PathManager.isfile(os.path.join(image_root, below)):
        return f"write file_name without the folder, {below}"
    if not _can_name(name):
        return (
            f"and with the encoding {sys.getfilesystemencoding()} no file can have this name, so "
            "set the environment variable PYTHONUTF8=1"
        )
    return "copy the rest"


def _can_name(name):
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


class _Folders:
    """The files below a folder. Each folder is listed when it is first asked for."""

    def __init__(self, root):
        self._root = root
        self._names = {}
        self._alike = None

    def has(self, path):
        folder, base = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = self._list(folder)
        return base in self._names[folder]

    def _list(self, folder):
        path = os.path.join(self._root, folder)
        if not _can_name(path) or not PathManager.isdir(path):
            return frozenset()
        return frozenset(PathManager.ls(path))

    def find_alike(self, path):
        """Gives the one file whose name differs only in spelling, and the difference.

        Args:
            path (str): a name that no file has.

        Returns:
            tuple[str or None, str or None]
        """
        if self._alike is None:
            self._alike = self._index()
        for (difference, spell), by_spelling in zip(_SPELLINGS, self._alike):
            found = by_spelling.get(spell(path), ())
            if len(found) == 1:
                return found[0], difference
        return None, None

    def _index(self):
        """Spells all files below the root in each way. Only done where a name is missing."""
        indices = [{} for _ in _SPELLINGS]
        for folder, _, names in os.walk(self._root):
            below = os.path.relpath(folder, self._root).replace(os.sep, "/")
            for name in names:
                path = name if below == "." else f"{below}/{name}"
                for (_, spell), index in zip(_SPELLINGS, indices):
                    index.setdefault(spell(path), []).append(path)
        return indices
