"""Stopping a run so that nothing is lost."""

import contextlib
import logging
import os
import signal
import threading
import time

from detectron2.engine import HookBase
from detectron2.utils import comm

from .ranks import largest_over_ranks

__all__ = ["STOPPING_SIGNALS", "StopOnSignal", "Stopped", "signals_to_take_over"]

_logger = logging.getLogger(__name__)

# Ctrl-C, kill and batch systems, and, where there is such a thing, a terminal that is closed.
STOPPING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)

# A batch system sends SIGTERM to all processes of a run, and the one that started the others passes
# it on to them. In so many seconds that is one request.
_ONE_REQUEST = 5.0


def signals_to_take_over():
    """STOPPING_SIGNALS, without SIGHUP where it is ignored: under nohup a run goes on.

    Returns:
        list[signal.Signals]
    """
    return [
        signum
        for signum in STOPPING_SIGNALS
        if signum.name != "SIGHUP" or signal.getsignal(signum) != signal.SIG_IGN
    ]


class Stopped(SystemExit):
    """A run was stopped by a signal, and its state is saved; the exit status is 128 + signal."""


class StopOnSignal(HookBase):
    """Ends the training on SIGINT (Ctrl-C), SIGTERM or SIGHUP when the step is done and saved.

    The trainer's ``save_checkpoint()`` writes the checkpoint; then :class:`Stopped` leaves the
    loop. If any rank got a signal, all ranks stop after the same step. For that, the code that
    fetches their batches calls :meth:`agree`. A second signal does what it would do without this
    hook, except for a SIGTERM within 5 seconds of another. Place the hook after the hooks that change the model, and before evaluation.
    """

    def __init__(self):
        self.requested = None  # the signal that this process got, or None
        self._requested_at = None  # seconds of the monotonic clock
        self._agreed = 0  # the one that a rank had got by the beginning of the step, or 0
        self._at_once = False
        self._former = {}
        self._process = os.getpid()

    def before_train(self):
        """Takes over the signals."""
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread
            self._process = os.getpid()
            self._former = {s: signal.signal(s, self._on_signal) for s in signals_to_take_over()}

    def after_train(self):
        """Gives the signals back."""
        self._give_back()

    def _give_back(self):
        for signum, handler in self._former.items():
            signal.signal(signum, handler)
        self._former = {}

    def _on_signal(self, signum, frame):
        if os.getpid() != self._process:
            return  # a forked loader process: the training decides
        if self.requested is not None:  # a second SIGTERM
            if time.monotonic() - self._requested_at >= _ONE_REQUEST:
                signal.signal(signum, self._former.pop(signum))
                signal.raise_signal(signum)
            return
        self.requested, self._requested_at = signum, time.monotonic()
        kept = {}
        if signum == signal.SIGTERM:
            kept[signum] = self._former.pop(signum)
        self._give_back()
        self._former = kept
        # A signal to the whole group kills the loader processes too, and torch's handler would
        # report that by an exception in the middle of the step that is to be finished.
        if hasattr(signal, "SIGCHLD"):
            # Not SIG_DFL: of one that is pending Python would report a race with a traceback.
            self._former[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        if self._at_once:
            raise Stopped(128 + signum)
        # Not through logging: the signal may have interrupted logging in the middle of a line.
        name = signal.Signals(signum).name
        with contextlib.suppress(OSError):  # there may be no terminal any more
            os.write(
                2, f"Got {name}: stopping after this step; once more stops at once.\n".encode()
            )

    def stop(self, signum=None):
        """Says how to go on.

        Args:
            signum (int or None): the signal to report; None is the one that this process got.

        Returns:
            Stopped: to be raised.
        """
        signum = self.requested if signum is None else signum
        _logger.warning(
            "Stopped by %s after iteration %d: run the same command with --resume to go on.",
            signal.Signals(signum).name,
            min(self.trainer.iter, self.trainer.max_iter - 1),
        )
        return Stopped(128 + signum)

    def agree(self, trouble):
        """Tells the other ranks of a signal, and hears of theirs. Every rank calls it once a step.

        With several ranks, a signal stops the run after the step that begins with this call.

        Args:
            trouble (int): something else to agree on; 0 is none.

        Returns:
            int: the largest of all ranks.
        """
        trouble, self._agreed = largest_over_ranks(trouble, self.requested or 0)
        return trouble

    def after_step(self):
        """Stops if any rank was asked to."""
        signum = self._agreed if comm.get_world_size() > 1 else self.requested
        if signum:
            self.trainer.save_checkpoint()
            raise self.stop(signum)

    @contextlib.contextmanager
    def at_once(self):
        """Context in which a signal raises Stopped at once, since there is no step to finish."""
        self._at_once = True
        try:
            if self.requested is not None:
                raise Stopped(128 + self.requested)
            yield
        except Stopped:
            self.stop()
            raise
        finally:
            self._at_once = False
