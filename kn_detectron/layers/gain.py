"""The gain of a Kalman norm: how much of the posterior is the measurement."""

import math
from numbers import Real
from typing import Optional

import torch
from torch import Tensor, nn

from .introspection import is_traced
from .passes import statistics_dtype

__all__ = ["GAINS", "Gain", "logit_of"]

# The entries of a layer's state_dict.
GAINS = ("gain_logit", "gain_scale")

# The logit of a gain of 1, of which the sigmoid is exactly 1; that of 0 is the opposite. Infinity
# would become NaN in an average of weights.
_SATURATED = 1e4


def logit_of(gain: float) -> float:
    """The parameter of a gain: log(gain / (1 - gain)), and a large finite number for 0 and 1."""
    if gain in (0.0, 1.0):
        return _SATURATED if gain else -_SATURATED
    return math.log(gain / (1.0 - gain))


class _GainState(list):
    """Tensors with their versions, which copies of a layer forget: theirs are counted anew."""

    def __reduce__(self):
        return _GainState, ()


class Gain(nn.Module):
    """The gain ``gain_scale * sigmoid(gain_logit)`` of a norm, in [0, 1].

    It is a mixin for a norm of torch. The sigmoid stays in (0, 1) whatever the optimiser does to a
    learned logit, and a hook can anneal the scale.
    """

    def _init_gain(self, gain: Optional[float], learn_gain: bool, device, dtype) -> None:
        if gain is not None and not (isinstance(gain, Real) and 0.0 <= gain <= 1.0):
            raise ValueError(
                f"gain is a number between 0 and 1, or None for the head of a chain, not {gain!r}"
            )
        if gain in (0.0, 1.0) and learn_gain:
            raise ValueError(
                f"a gain of {gain:g} cannot be learned (its logit is infinite): "
                "pass learn_gain=False, or a gain strictly between 0 and 1"
            )
        self.initial_gain = gain
        if self.is_head:  # a parameter that gets no gradient would break DDP
            return
        logit = torch.empty((), device=device, dtype=dtype)
        if learn_gain:
            self.gain_logit = nn.Parameter(logit)
        else:
            self.register_buffer("gain_logit", logit)
        self.register_buffer("gain_scale", torch.empty_like(logit))

    @torch.no_grad()
    def _reset_gain(self) -> None:
        if not self.is_head:
            self.gain_logit.fill_(logit_of(self.initial_gain))
            self.gain_scale.fill_(1.0)
            self._remember_that_it_measures(self.initial_gain > 0.0)

    @property
    def is_head(self) -> bool:
        """Whether the layer is the head of a chain, with no prior, gain and process model."""
        return self.initial_gain is None

    @property
    def gain(self) -> Optional[Tensor]:
        """The effective gain q in [0, 1], a scalar tensor; None for a head."""
        if self.is_head:
            return None
        dtype = statistics_dtype(self.gain_logit)
        return self.gain_scale.to(dtype) * self.gain_logit.to(dtype).sigmoid()

    @property
    def learns_gain(self) -> bool:
        """Whether the gain is a parameter; otherwise it is fixed, or the layer is a head."""
        return isinstance(getattr(self, "gain_logit", None), nn.Parameter)

    def set_gain_scale(self, scale: float) -> None:
        """Multiplies the gain by ``scale`` in [0, 1], for annealing. At 0 nothing is measured.

        The scale is in the state_dict, so the gain of an annealed model stays annealed in its
        checkpoints. A head has no gain and ignores the scale. With several processes each has to
        call this: a scale that DistributedDataParallel copies into the buffer goes unnoticed. It
        is not to be called between a forward pass and its backward pass.
        """
        if not 0.0 <= scale <= 1.0:
            raise ValueError(f"the scale of a gain lies between 0 and 1, not {scale}")
        if not self.is_head:
            measures = scale > 0.0 and (self.learns_gain or self.measures or self._logit_allows())
            self.gain_scale.fill_(scale)
            self._remember_that_it_measures(measures)

    # What forward does depends on whether the gain is 0. The gain is on the device, and reading it
    # would wait for the device. So the answer is kept, with the tensors that decide it and their
    # version counters: these tell whether an operation of torch wrote to the tensors since. Writes
    # to ``.data`` do not count. A learned gain is a sigmoid, which is never 0 by itself.

    @property
    def measures(self) -> bool:
        """Whether the layer measures its features: it is a head, or its gain is not 0.

        The device is asked only if something other than :meth:`set_gain_scale` wrote the gain.
        """
        if self.is_head:
            return True
        if is_traced(self.gain_scale):  # neither the value nor its version can be read
            return self._measures
        known = self._measures_as_of
        now = self._gain_state()
        if len(known) != len(now) or any(
            a is not b or old != new for (a, old), (b, new) in zip(known, now)
        ):
            self._remember_that_it_measures(self._gain_is_positive())
        return self._measures

    def _remember_that_it_measures(self, measures: bool) -> None:
        self._measures, self._measures_as_of = measures, self._gain_state()

    def _gain_state(self) -> _GainState:
        deciding = [self.gain_scale] if self.learns_gain else [self.gain_scale, self.gain_logit]
        # Tensors made in inference mode have no version. NaN equals nothing, so they are read anew.
        return _GainState((t, math.nan if t.is_inference() else t._version) for t in deciding)

    @torch.no_grad()  # or activation checkpointing would miss what the first forward pass saved
    def _gain_is_positive(self) -> bool:
        return bool(self.gain > 0)

    def _logit_allows(self) -> bool:
        return bool(self.gain_logit.sigmoid() > 0)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        logit = prefix + "gain_logit"
        if not self.is_head and logit in state_dict:
            # Older checkpoints have infinite ones.
            state_dict[logit] = state_dict[logit].clamp(-_SATURATED, _SATURATED)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.is_head and not self.gain_scale.is_meta:
            # Now, since torch.compile cannot ask later.
            self._remember_that_it_measures(self._gain_is_positive())
