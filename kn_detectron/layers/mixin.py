"""Prior, gain and process model, which the batch and the group version of the norm share."""

from typing import Callable, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .belief import Belief
from .filter import Spec, Vectors, process
from .gain import GAINS, Gain
from .sets import Sets

__all__ = [
    "INITIAL_PROCESS_NOISE",
    "KN_STATE",
    "KalmanNormMixin",
    "OUTSIDE",
    "Prior",
    "VARIANTS",
    "cast",
]

VARIANTS = ("network", "paper")

# The entries of a KN layer's state_dict that BatchNorm and GroupNorm do not have.
KN_STATE = (*GAINS, "mean_offset", "log_var_scale", "process_noise")

# softplus(-5) = 0.0067: R starts small beside the variance of 1 that normalised features have.
INITIAL_PROCESS_NOISE = -5.0


class _OutsideAChain:
    """The default of ``prior``: the layer is called like BatchNorm, and returns y alone."""

    def __repr__(self) -> str:
        return "<outside a chain>"


OUTSIDE = _OutsideAChain()
Prior = Union[Belief, None, _OutsideAChain]


class KalmanNormMixin(Gain):
    """What the batch and the group version of the norm share.

    It is a mixin for a norm of torch.

    Attributes:
        channels, groups: C, and the number of groups of channels that are measured together.
        observer: if not None, it is called with the two results of ``innovation`` in each forward
            pass that has a prior and images. Unlike a hook it does not keep a convolution from
            absorbing the layer. What is measured for it is not kept for the backward pass.
        loaded_statistics_only: whether the weights that were loaded last had running statistics and
            nothing of the filter, so that its priors are those of other weights.
    """

    observer: Optional[Callable[[Tensor, Tensor], None]] = None
    loaded_statistics_only: bool = False

    def _init_filter(
        self,
        *,
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
        self.variant = variant
        self.prior_gradient = prior_gradient
        self.has_process_model = process_model and gain is not None
        self._init_gain(gain, learn_gain, device, dtype)

        def empty() -> Tensor:
            return torch.empty(self.channels, device=device, dtype=dtype)

        if self.has_process_model and variant == "network":
            self.mean_offset = nn.Parameter(empty())
            self.log_var_scale = nn.Parameter(empty())
        elif self.has_process_model:
            self.process_noise = nn.Parameter(empty())
        self._reset_filter()

    @torch.no_grad()
    def _reset_filter(self) -> None:
        self._reset_gain()
        if self.has_process_model and self.variant == "network":
            self.mean_offset.zero_()
            self.log_var_scale.zero_()
        elif self.has_process_model:
            self.process_noise.fill_(INITIAL_PROCESS_NOISE)

    def reset_parameters(self) -> None:
        """Sets the norm, the gain and the process model to their initial values."""
        super().reset_parameters()
        if hasattr(self, "initial_gain"):  # torch's constructor calls this before it is set
            self._reset_filter()

    def _check_prior(self, prior: Prior) -> None:
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
                if shape[-1] != self.channels or shape != prior.mean.shape:
                    raise ValueError(
                        f"expected a prior about {self.channels} channels, mean and var of one shape (got "
                        f"a {part} of shape {tuple(shape)})"
                    )

    def _observe(self, x: Tensor, prior: Prior) -> None:
        if self.observer is not None and isinstance(prior, Belief) and x.numel() > 0:
            self.observer(*self.innovation(x, prior))

    def _check_channels(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")
        # Under torch.jit.trace a size is a tensor, and comparing it gives a warning.
        if not torch.jit.is_tracing() and x.shape[1] != self.channels:
            raise ValueError(
                f"expected {self.channels} channels (got an input of shape {tuple(x.shape)})"
            )

    def _spec(self, x: Tensor, rows: int, measures: bool) -> Spec:
        sets = Sets(x.shape[0], self.channels, rows, self.groups)
        return Spec(sets, self.eps, self.variant == "paper", measures)

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
        without_filter = not any(prefix + name in state_dict for name in own)
        if without_filter:
            # The checkpoint is BatchNorm's or GroupNorm's: the filter keeps its values.
            state_dict.update({prefix + name: getattr(self, name).detach() for name in own})
        self.loaded_statistics_only = without_filter and prefix + "running_var" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn, recurse=True):
        had_no_values = not self.is_head and self.gain_logit.is_meta
        super()._apply(fn, recurse)
        if had_no_values and not self.gain_logit.is_meta:
            self._reset_filter()  # to_empty() leaves anything in it, which BatchNorm's weights keep
        return self

    def extra_repr(self) -> str:
        if self.is_head:
            return f"{super().extra_repr()}, head of a chain"
        learned = "learned" if self.learns_gain else "fixed"
        gain = self.initial_gain if self.gain_logit.is_meta else self.gain.item()
        return f"{super().extra_repr()}, variant={self.variant}, gain={gain:.3g} ({learned})"


def cast(t: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    return None if t is None else t.to(dtype)
