"""Batches that all ranks agree on."""

from detectron2.utils import comm

from ..errors import InputError

__all__ = ["AgreedBatches"]

# Why a rank has no batch, in the order in which one of several ranks' reasons prevails.
_NO_TROUBLE, _FAULT, _LOADER_GONE = range(3)


class AgreedBatches:
    """The batches of a loader: either every rank gets one, or none does.

    If one rank failed alone, the others would wait for it in the middle of a step, and nobody could
    save the steps before.
    """

    def __init__(self, loader, stop):
        """
        Args:
            loader: any iterable of batches.
            stop (StopOnSignal): the trainer's.
        """
        self.loader = loader
        self.stop = stop
        self._iterator = None

    def __iter__(self):
        return self

    def __next__(self):
        batch, fault, trouble = None, None, _NO_TROUBLE
        try:
            # Not in __iter__, which detectron2 0.4 calls before the trainer can be resumed.
            self._iterator = self._iterator or iter(self.loader)
            batch = next(self._iterator)
        except InputError as error:
            fault, trouble = str(error), _FAULT
        except RuntimeError:
            # The signal that is to stop the run has ended the loader's processes as well.
            if self.stop.requested is None:
                raise
            trouble = _LOADER_GONE
        trouble = self.stop.agree(trouble)
        if trouble == _LOADER_GONE:
            raise self.stop.stop(max(comm.all_gather(self.stop.requested or 0)))
        if trouble == _FAULT:
            raise InputError(next(filter(None, comm.all_gather(fault))))
        return batch
