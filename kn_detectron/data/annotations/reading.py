"""Reading an annotation file, whatever the encoding of its text."""

import json
import locale

from detectron2.utils.file_io import PathManager

from ...errors import InputError, one_line

__all__ = ["read_annotations"]


def read_annotations(json_file, report):
    """Reads a JSON file.

    pycocotools reads text in the encoding of the locale and takes no byte order mark. A file that
    it could not read counts as mended, and so is written anew.

    Args:
        json_file (str): path that detectron2's path manager knows.
        report (Report): of the file.

    Returns:
        object: its content.

    Raises:
        InputError: it does not hold JSON.
    """
    with PathManager.open(json_file, "rb") as file:
        data = file.read()
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
        content = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(
            f"Annotation file {json_file} is not valid JSON ({error.msg} at {where}, character "
            f"{error.pos} of {len(error.doc)}): it is broken or cut short, copy it again."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"Annotation file {json_file} is not text (byte {error.start} is not "
            f"{encoding.upper()}): expected COCO instances in JSON, copy it again."
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(
            f"Annotation file {json_file} cannot be read ({one_line(error)}): correct it."
        ) from error
    except RecursionError as error:
        raise InputError(
            f"Annotation file {json_file} is nested too deeply: expected COCO instances, a JSON "
            "object with the lists images, annotations and categories."
        ) from error
    if encoding != "utf-8" or not (data.isascii() or _locale_is_utf8()):
        report.rewritten(f"its text is {encoding} and is read as such")
    return content


def _locale_is_utf8():
    return locale.getpreferredencoding(False).lower().replace("-", "") == "utf8"
