"""The one exception that means: the input is at fault, not the program."""

__all__ = ["InputError", "one_line"]


class InputError(Exception):
    """A fault in something the user gave: a config value, a file, a folder, a checkpoint.

    The message is one sentence that names the thing, what was expected and what to do. The
    command line tools print it without a traceback and exit with status 1; every other exception
    is a defect and keeps its traceback.
    """


def one_line(error: BaseException) -> str:
    """What another library's exception says, as a part of a sentence.

    It has no line breaks and no full stop at its end. An exception without a message is named.
    """
    # str() of a KeyError is in quotes.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()).rstrip(".") or type(error).__name__
