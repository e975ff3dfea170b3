"""The one exception that means: the input is at fault, not the program."""

__all__ = ["InputError"]


class InputError(Exception):
    """A fault in something the user gave: a config value, a file, a folder, a checkpoint.

    The message is one sentence that names the thing, what was expected and what to do. The
    command line tools print it without a traceback and exit with status 1; every other exception
    is a defect and keeps its traceback.
    """
