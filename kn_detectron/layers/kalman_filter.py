"""The gain and the process model, which the batch and the group version of the norm share."""

import math
from numbers import Real
from typing import Callable, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .belief import Belief
from .filter import Vectors, process
from .introspection import is_traced
from .passes import statistics_dtype

__all__ = [
    "INITIAL_PROCESS_NOISE",
    "KN_STATE",
    "KalmanFilter",
    "OUTSIDE",
    "Prior",
    "VARIANTS",
    "cast",
    "logit_of",
]

VARIANTS = ("network", "paper")

# The entries of a KN layer's state_dict that BatchNorm and GroupNorm do not have.
KN_STATE = ("gain_logit", "gain_scale", "mean_offset", "log_var_scale", "process_noise")

# softplus(-5) = 0.0067: R starts small beside the variance of 1 that normalised features have.
INITIAL_PROCESS_NOISE = -5.0


class _OutsideAChain:
    """The default of ``prior``: the layer is called like BatchNorm, and returns y alone."""

    def __repr__(self) -> str:
        return "<outside a chain>"


OUTSIDE = _OutsideAChain()
Prior = Union[Belief, None, _OutsideAChain]


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


class KalmanFilter(nn.Module):
    """The gain and the process model, which the batch and the group version share.

    It is a mixin for a norm of torch. The gain is ``gain_scale * sigmoid(gain_logit)``: it stays in
    (0, 1) whatever the optimiser does, and a hook can anneal it.

    Attributes:
        observer: if not None, it is called with the two results of ``innovation`` in each forward
            pass that has a prior and images. Unlike a hook it does not keep a convolution from
            absorbing the layer. What is measured for it is not kept for the backward pass.
    """

    observer: Optional[Callable[[Tensor, Tensor], None]] = None

    def _init_filter(
        self,
        channels: int,
        gain: Optional[float],
        learn_gain: bool,
        variant: str,
        process_model: bool,
        prior_gradient: bool,
        device,
        dtype,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant is one of {VARIANTS}, not {variant!r}")
        if gain is not None and not (isinstance(gain, Real) and 0.0 <= gain <= 1.0):
            raise ValueError(
                f"gain is a number between 0 and 1, or None for the head of a chain, not {gain!r}"
            )
        if gain in (0.0, 1.0) and learn_gain:
            raise ValueError(
                f"a gain of {gain:g} cannot be learned (its logit is infinite): "
                "pass learn_gain=False, or a gain strictly between 0 and 1"
            )
        self.variant = variant
        self.initial_gain = gain
        self.prior_gradient = prior_gradient
        self.has_process_model = process_model and gain is not None
        if self.is_head:  # a parameter that gets no gradient would break DDP
            return

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        if learn_gain:
            self.gain_logit = nn.Parameter(empty())
        else:
            self.register_buffer("gain_logit", empty())
        self.register_buffer("gain_scale", empty())
        if self.has_process_model and variant == "network":
            self.mean_offset = nn.Parameter(empty(channels))
            self.log_var_scale = nn.Parameter(empty(channels))
        elif self.has_process_model:
            self.process_noise = nn.Parameter(empty(channels))
        self._reset_filter()

    @torch.no_grad()
    def _reset_filter(self) -> None:
        if self.is_head:
            return
        self.gain_logit.fill_(logit_of(self.initial_gain))
        self.gain_scale.fill_(1.0)
        if self.has_process_model and self.variant == "network":
            self.mean_offset.zero_()
            self.log_var_scale.zero_()
        elif self.has_process_model:
            self.process_noise.fill_(INITIAL_PROCESS_NOISE)
        self._remember_that_it_measures(self.initial_gain > 0.0)

    def reset_parameters(self) -> None:
        """Sets the norm, the gain and the process model to their initial values."""
        super().reset_parameters()
        if hasattr(self, "initial_gain"):  # torch's constructor calls this before it is set
            self._reset_filter()

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

    def set_gain_scale(self, scale: float) -> None:
        """Multiplies the gain by ``scale`` in [0, 1], for annealing. At 0 nothing is measured.

        The scale is in the state_dict, so the gain of an annealed model stays annealed in its
        checkpoints. A head has no gain and ignores the scale. Of several processes each has to call
        this: a buffer that DistributedDataParallel copies from another one goes unnoticed.
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
    def learns_gain(self) -> bool:
        """Whether the gain is a parameter; otherwise it is fixed, or the layer is a head."""
        return isinstance(getattr(self, "gain_logit", None), nn.Parameter)

    @torch.no_grad()  # or activation checkpointing would miss what the first forward pass saved
    def _gain_is_positive(self) -> bool:
        return bool(self.gain > 0)

    def _logit_allows(self) -> bool:
        return bool(self.gain_logit.sigmoid() > 0)

    def _gain_state(self) -> "_GainState":
        deciding = [self.gain_scale] if self.learns_gain else [self.gain_scale, self.gain_logit]
        # Tensors made in inference mode have no version. NaN equals nothing, so they are read anew.
        return _GainState((t, math.nan if t.is_inference() else t._version) for t in deciding)

    def _remember_that_it_measures(self, measures: bool) -> None:
        self._measures, self._measures_as_of = measures, self._gain_state()

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

    def _check_prior(self, prior: Prior, channels: int) -> None:
        if not isinstance(prior, (Belief, _OutsideAChain, type(None))):
            raise ValueError(f"a prior is a Belief(mean, var), not a {type(prior).__name__}")
        if self.is_head and isinstance(prior, Belief):
            raise ValueError(
                f"{type(self).__name__}(gain=None) is the head of a chain and takes no prior"
            )
        if self.needs_prior and not isinstance(prior, Belief):
            raise ValueError(
                f"{type(self).__name__} with a gain needs prior=: pass the belief predicted from "
                "the layer below, or build the layer with gain=None as the head of a chain"
            )
        if isinstance(prior, Belief) and not torch.jit.is_tracing():
            for part, shape in (("mean", prior.mean.shape), ("var", prior.var.shape)):
                if shape[-1] != channels or shape != prior.mean.shape:
                    raise ValueError(
                        f"expected a prior about {channels} channels, mean and var of one shape (got "
                        f"a {part} of shape {tuple(shape)})"
                    )

    def _observe(self, x: Tensor, prior: Prior) -> None:
        if self.observer is not None and isinstance(prior, Belief) and x.numel() > 0:
            self.observer(*self.innovation(x, prior))

    def _check_channels(self, x: Tensor, channels: int) -> None:
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")
        # Under torch.jit.trace a size is a tensor, and comparing it gives a warning.
        if not torch.jit.is_tracing() and x.shape[1] != channels:
            raise ValueError(
                f"expected {channels} channels (got an input of shape {tuple(x.shape)})"
            )

    def _process_model(self) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """The arguments of :func:`~.filter.process` that follow the prior."""
        if not self.has_process_model:
            return None, None, None
        if self.variant == "network":
            return self.mean_offset, self.log_var_scale, None
        return None, None, self.process_noise

    def _prior_vectors(self, prior: Prior, dtype: torch.dtype) -> Vectors:
        """The vectors of a layer that was given this prior."""
        weight, bias = self._scale_and_shift(dtype)
        if not isinstance(prior, Belief):
            return Vectors(weight=weight, bias=bias)
        if not self.prior_gradient:
            prior = prior.detach()
        tensors = (*prior, self.gain_logit, self.gain_scale, *self._process_model())
        return Vectors(*(cast(t, dtype) for t in tensors), weight, bias)

    def _scale_and_shift(self, dtype: torch.dtype) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        weight, bias = cast(self.weight, dtype), cast(self.bias, dtype)
        if weight is not None and bias is None:  # a norm that was built with bias=False
            bias = torch.zeros_like(weight)
        return weight, bias

    def _processed(self, prior: Belief, dtype: torch.dtype) -> Belief:
        prior = Belief(*(cast(t, dtype) for t in prior))
        return process(prior, *(cast(t, dtype) for t in self._process_model()))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        own = [name for name in KN_STATE if getattr(self, name, None) is not None]
        if not any(prefix + name in state_dict for name in own):
            # The checkpoint is BatchNorm's or GroupNorm's: the filter keeps its values.
            state_dict.update({prefix + name: getattr(self, name).detach() for name in own})
        logit = prefix + "gain_logit"
        if "gain_logit" in own and logit in state_dict:
            # Older checkpoints have infinite ones.
            state_dict[logit] = state_dict[logit].clamp(-_SATURATED, _SATURATED)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.is_head and not self.gain_scale.is_meta:
            # Now, since torch.compile cannot ask later.
            self._remember_that_it_measures(self._gain_is_positive())

    def extra_repr(self) -> str:
        if self.is_head:
            return f"{super().extra_repr()}, head of a chain"
        learned = "learned" if self.learns_gain else "fixed"
        gain = self.initial_gain if self.gain_logit.is_meta else self.gain.item()
        return f"{super().extra_repr()}, variant={self.variant}, gain={gain:.3g} ({learned})"


def cast(t: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    return None if t is None else t.to(dtype)
