"""Kalman Normalization as drop-in layers: KalmanNorm2d and GroupKalmanNorm2d."""

import math
from typing import Dict, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from . import fused
from .belief import Belief, normalized
from .functional import (
    batch_norm,
    filter_batch,
    group_belief,
    measure_groups,
    normalize,
    process,
    statistics_dtype,
)
from .passes import Layout

__all__ = [
    "EVAL_STATISTICS",
    "GroupKalmanNorm2d",
    "KN_STATE",
    "KalmanNorm2d",
    "VARIANTS",
    "kalman_layers",
    "set_gain_scale",
    "set_norm_batch_size",
]

VARIANTS = ("network", "paper")
EVAL_STATISTICS = ("moving", "batch")

# What a KN layer has in its state_dict beyond BatchNorm's or GroupNorm's.
KN_STATE = ("gain_logit", "gain_scale", "mean_offset", "log_var_scale", "process_noise")

# The released code drops a prior whose variance is this many times the measured one.
_GATE_LIMIT = 100.0

# softplus(-5) = 0.0067: R starts small beside the variance of 1 that normalised features have.
_INITIAL_PROCESS_NOISE = -5.0


def _logit(gain: float) -> float:
    if gain in (0.0, 1.0):
        return math.inf if gain else -math.inf
    return math.log(gain / (1.0 - gain))


class _KalmanFilter(nn.Module):
    """What the batch and the group version share: gain, process model, and their state.

    A mixin in front of a torch norm. The gain is ``gain_scale * sigmoid(gain_logit)``, so that it
    stays in (0, 1) whatever the optimiser does, and can be annealed from outside.
    """

    def _init_filter(
        self,
        channels: int,
        gain: Optional[float],
        learn_gain: bool,
        variant: str,
        process_model: bool,
        prior_gradient: bool,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant is one of {VARIANTS}, not {variant!r}")
        if gain is not None and not 0.0 <= gain <= 1.0:
            raise ValueError(f"gain lies between 0 and 1, or is None for a head, not {gain}")
        if gain in (0.0, 1.0) and learn_gain:
            raise ValueError(
                f"a gain of {gain:g} cannot be learned (its logit is infinite): "
                "pass learn_gain=False, or a gain strictly between 0 and 1"
            )
        self.variant = variant
        self.is_head = gain is None
        self.prior_gradient = prior_gradient
        self._measures = gain != 0.0
        if self.is_head:  # a parameter that gets no gradient would break DDP
            return
        like = self.weight if self.weight is not None else torch.empty(())
        logit = like.new_tensor(_logit(gain))
        if learn_gain:
            self.gain_logit = nn.Parameter(logit)
        else:
            self.register_buffer("gain_logit", logit)
        self.register_buffer("gain_scale", like.new_ones(()))
        self.has_process_model = process_model
        if not process_model:
            return
        if variant == "network":
            self.mean_offset = nn.Parameter(like.new_zeros(channels))
            self.log_var_scale = nn.Parameter(like.new_zeros(channels))
        else:
            self.process_noise = nn.Parameter(like.new_full((channels,), _INITIAL_PROCESS_NOISE))

    @property
    def gain(self) -> Optional[Tensor]:
        """The gain q in [0, 1] in effect, a tensor of no dimensions; None for a head."""
        if self.is_head:
            return None
        dtype = torch.promote_types(self.gain_logit.dtype, torch.float32)
        return self.gain_scale.to(dtype) * self.gain_logit.to(dtype).sigmoid()

    def set_gain_scale(self, scale: float) -> None:
        """Multiplies the gain by ``scale`` in [0, 1], for annealing. At 0 nothing is measured.

        The scale is part of the layer's state, so that a checkpoint of an annealed model stays one.
        A head has no gain and ignores it.
        """
        if not 0.0 <= scale <= 1.0:
            raise ValueError(f"the scale of a gain lies between 0 and 1, not {scale}")
        if not self.is_head:
            self.gain_scale.fill_(scale)
            self._find_out_whether_measuring()

    def _find_out_whether_measuring(self) -> None:
        # A Python bool, since forward must branch on it without waiting for a device.
        if not self.is_head:
            self._measures = bool(self.gain > 0)

    def _check_prior(self, prior: Optional[Belief]) -> None:
        if self.is_head and prior is not None:
            raise ValueError(
                f"{type(self).__name__}(gain=None) is the head of a chain and takes no prior"
            )
        if not self.is_head and prior is None:
            raise ValueError(
                f"{type(self).__name__} with a gain needs prior=: pass the belief predicted from "
                "the layer below, or build the layer with gain=None as the head of a chain"
            )

    def _cast(self, prior: Optional[Belief], dtype: torch.dtype) -> Optional[Belief]:
        if prior is None:
            return None
        if not self.prior_gradient:
            prior = prior.detach()
        return Belief(prior.mean.to(dtype), prior.var.to(dtype))

    def _model(self) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """The parameters of the process model, as :func:`~.functional.process` takes them."""
        if self.is_head or not self.has_process_model:
            return None, None, None
        if self.variant == "network":
            return self.mean_offset, self.log_var_scale, None
        return None, None, self.process_noise

    def _filter_batch(
        self, x: Tensor, prior: Optional[Belief], gain: Optional[Tensor], layout: Layout, model
    ):
        """:func:`~.functional.filter_batch` with what this layer is."""
        released = self.variant == "paper" and prior is not None
        return filter_batch(
            x,
            prior,
            None if prior is None else gain.to(prior.mean.dtype),
            self.weight,
            self.bias,
            self.eps,
            layout=layout,
            model=model,
            mixture=released,
            limit=_GATE_LIMIT if released else None,
            measuring=self._measures,
            passes_on_y=self.variant == "network" and self.affine,
        )

    def _without_images(self, x: Tensor, prior: Belief) -> Tuple[Tensor, Belief]:
        """What an empty batch becomes, connected to the gradient, and the posterior: the prior."""
        if isinstance(getattr(self, "gain_logit", None), nn.Parameter):
            # DDP takes a parameter without gradient for unused: give it its zero.
            prior = prior._replace(mean=prior.mean + 0.0 * self.gain_logit)
        return normalize(x, prior, self.weight, self.bias, self.eps), prior

    def _belief_to_pass_on(self, posterior: Belief) -> Belief:
        """The belief, given the posterior."""
        if self.variant == "paper":
            return posterior
        if self.weight is None:
            return Belief(torch.zeros_like(posterior.mean), torch.ones_like(posterior.var))
        return normalized(self.weight, self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        own = [name for name in KN_STATE if hasattr(self, name)]
        if not any(prefix + name in state_dict for name in own):
            # A checkpoint of the norm that this one derives from: the filter keeps its values.
            state_dict.update({prefix + name: getattr(self, name).detach() for name in own})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._find_out_whether_measuring()

    def extra_repr(self) -> str:
        if self.is_head:
            return f"{super().extra_repr()}, head of a chain"
        learned = "learned" if isinstance(self.gain_logit, nn.Parameter) else "fixed"
        return f"{super().extra_repr()}, variant={self.variant}, gain={self.gain:.3g} ({learned})"


class KalmanNorm2d(_KalmanFilter, nn.BatchNorm2d):
    r"""Kalman Normalization of a batch of feature maps (Sec. 3.2, Eq. 7).

    BatchNorm measures a layer's mean and variance on the images at hand. This layer also takes a
    *prior*: the belief predicted from the layer below. Both are blended by a gain q in (0, 1),

    .. math::

        \mu = (1 - q)\, \mu_{prior} + q\, \bar x, \qquad
        \Sigma = (1 - q)\, \Sigma_{prior} + q\, S, \qquad
        y = \gamma\, (x - \mu) / \sqrt{\Sigma + \epsilon} + \beta,

    where :math:`\bar x` and S are BatchNorm's statistics (S biased). Before that, the *process
    model* corrects the prior, per channel:

    - ``variant="network"`` (ours): :math:`\mu_{prior} + b \sqrt{\Sigma_{prior}}` and
      :math:`\Sigma_{prior} e^r`, with b and r learned from 0. The belief passed on is that about
      y, exactly :math:`(\beta, \gamma^2)`.
    - ``variant="paper"``: :math:`\Sigma_{prior} + R`, with R = softplus(``process_noise``). The
      belief passed on is :math:`(\mu, \Sigma)`, that about the un-normalised x. As in the released
      code :math:`\Sigma` has the term :math:`q (1 - q) (\bar x - \mu_{prior})^2`, and a prior whose
      variance is 100 times the measured one, or more, is dropped for that step.

    Moving averages of the posterior are kept for inference like BatchNorm's: ``running_var`` has
    the measured part of the variance unbiased (n / (n - 1)), the predicted part as it is. At gain 0
    nothing is measured, the posterior does not depend on the batch, and the running statistics are
    set to it instead of averaged.

    It is a :class:`torch.nn.BatchNorm2d` in all other respects: ``momentum``, ``affine``,
    ``track_running_stats``, BatchNorm state dicts. It differs where BatchNorm would do harm: an
    empty batch changes no statistic, nor does one with non-finite values, and one value per channel
    is enough where there is a prior.

    With :func:`set_norm_batch_size` it treats a batch as several micro-batches, as the released
    code does.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        gain: the initial gain q. None makes the layer the head of a chain: it has no prior, no
            filter parameters, and is BatchNorm. 0 and 1 are allowed if the gain is not learned.
        learn_gain: whether q is a parameter (a scalar, as in the paper) or fixed (released code).
        variant: ``"network"`` or ``"paper"``.
        process_model: whether to learn the correction of the prior.
        prior_gradient: whether gradients flow through the prior to the layers below.
        eval_statistics: ``"moving"`` averages at inference (Option A of the paper) or those of the
            ``"batch"`` at hand, filtered as in training (Option B).

    Shape:
        - x: (N, C, H, W), any floating dtype and memory format; y is like x.
        - prior: mean and var of shape (1, C), in float32 or better; with micro-batches also one
          row for each.

    Examples::

        >>> norm = KalmanNorm2d(64, gain=0.1)
        >>> prior = belief.conv2d(belief.relu(below), conv.weight)
        >>> y, about_y = norm(conv(x), prior=prior)
        >>> y = KalmanNorm2d(64, gain=None)(conv(x))  # the head of a chain
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        gain: Optional[float] = 0.1,
        learn_gain: bool = True,
        variant: str = "network",
        process_model: bool = True,
        prior_gradient: bool = True,
        eval_statistics: str = "moving",
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if eval_statistics not in EVAL_STATISTICS:
            raise ValueError(
                f"eval_statistics is one of {EVAL_STATISTICS}, not {eval_statistics!r}"
            )
        self.eval_statistics = eval_statistics
        self.norm_batch_size: Optional[int] = None  # images per micro-batch; None: all of them
        self._init_filter(
            num_features,
            gain,
            learn_gain and gain is not None,
            variant,
            process_model,
            prior_gradient,
        )

    @property
    def needs_prior(self) -> bool:
        """Whether forward, in the present mode, has to be given a prior."""
        return not self.is_head and not self._uses_moving_statistics()

    def _uses_moving_statistics(self) -> bool:
        moving = self.eval_statistics == "moving" and self.track_running_stats
        return moving and not self.training

    def forward(
        self, x: Tensor, prior: Optional[Belief] = None, return_belief: bool = False
    ) -> Union[Tensor, Tuple[Tensor, Belief]]:
        """Normalises x.

        Args:
            x: features, shape (N, C, H, W).
            prior: the predicted belief about x, before this layer's process model. Not needed in
                evaluation with moving statistics, where it is ignored.
            return_belief: whether a layer without prior returns its belief too.

        Returns:
            y if there is neither a prior nor ``return_belief``, else y and the belief to pass on.

        Raises:
            ValueError: if x is not 4-dimensional, a head is given a prior, any other layer is not
                given the one it needs, a head is to measure one value per channel, or the batch
                is not a multiple of ``norm_batch_size``.
        """
        self._check_input_dim(x)
        if self._uses_moving_statistics():
            y = batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
            if prior is None and not return_belief:
                return y
            return y, self._belief_to_pass_on(self._running_belief(x))
        y, belief = self._filter(x, prior)
        return (y, belief) if prior is not None or return_belief else y

    def _running_belief(self, x: Tensor) -> Belief:
        if self.track_running_stats:
            return Belief(self.running_mean[None], self.running_var[None])
        shape = (1, self.num_features)
        dtype = statistics_dtype(x)
        return Belief(x.new_zeros(shape, dtype=dtype), x.new_ones(shape, dtype=dtype))

    def _filter(self, x: Tensor, prior: Optional[Belief]) -> Tuple[Tensor, Belief]:
        self._check_prior(prior)
        rows = self._rows(x)
        if prior is not None and prior.mean.shape[0] not in (1, rows):
            raise ValueError(
                f"a prior of {prior.mean.shape[0]} rows does not fit {rows} micro-batch(es): a "
                "prior has one row, or one for each micro-batch (see set_norm_batch_size)"
            )
        count = x.numel() // (self.num_features * rows)
        if count == 1 and self.is_head and self.training:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}"
            )
        prior = self._cast(prior, statistics_dtype(x))
        if count == 0:
            prior = self._running_belief(x) if prior is None else process(prior, *self._model())
            y, posterior = self._without_images(x, prior)
            return y, self._belief_to_pass_on(posterior)
        kernels = self._kernels(prior, rows)
        if kernels is not None:
            return self._filter_in_few_launches(x, prior, kernels)
        if not self._measures:
            rows = prior.mean.shape[0]
        gain = self.gain
        y, belief, posterior, measured_var = self._filter_batch(
            x, prior, gain, Layout(rows, self.num_features), self._model()
        )
        if self.training and self.track_running_stats:
            self._track(posterior, measured_var, gain, count)
        if self.variant == "network" and not self.affine:
            belief = self._belief_to_pass_on(posterior)
        return y, belief

    def _kernels(self, prior: Optional[Belief], rows: int):
        """Triton's kernels if there are any that do what this layer does, else None."""
        if prior is None or rows > 1 or not self.affine or prior.mean.shape[0] > 1:
            return None
        if self.num_features > fused.LARGEST_CHANNELS:
            return None
        running = (self.running_mean, self.running_var) if self.track_running_stats else ()
        own = self.weight, self.bias, self.gain_logit, *self._model(), *running
        return fused.kernels_for(*prior, *own)

    def _filter_in_few_launches(self, x: Tensor, prior: Belief, kernels) -> Tuple[Tensor, Belief]:
        offset, log_scale, noise = self._model()
        running = None
        if self.training and self.track_running_stats:
            running = self.running_mean, self.running_var, self.num_batches_tracked
        return fused.filter_batch(
            x,
            prior,
            self.gain_logit,
            self.gain_scale,
            self.weight,
            self.bias,
            self.eps,
            (offset, log_scale) if noise is None else (noise, None),
            kernels,
            network=self.variant == "network",
            measuring=self._measures,
            running=running,
            momentum=self.momentum,
        )

    def _rows(self, x: Tensor) -> int:
        """The number of micro-batches in x."""
        if self.norm_batch_size is None or x.shape[0] == 0:
            return 1
        if x.shape[0] % self.norm_batch_size:
            raise ValueError(
                f"a batch of {x.shape[0]} images cannot be normalised in micro-batches of "
                f"{self.norm_batch_size}: take a multiple of that (see set_norm_batch_size)"
            )
        return x.shape[0] // self.norm_batch_size

    @torch.no_grad()
    def _track(
        self,
        posterior: Belief,
        measured_var: Optional[Tensor],
        gain: Optional[Tensor],
        count: int,
    ) -> None:
        mean, var = posterior
        if measured_var is not None:
            excess = 1.0 / max(count - 1, 1)
            if self.is_head:
                var = torch.add(var, measured_var, alpha=excess)
            else:
                var = torch.addcmul(var, measured_var, gain, value=excess)
        # Of micro-batches the average, to which averaging over as many GPUs would come.
        mean, var = (v[0] if v.shape[0] == 1 else v.mean(0) for v in (mean, var))
        # A batch with a NaN or an overflow would otherwise spoil inference for good.
        finite = (mean + var).sum() * 0.0 == 0.0
        self.num_batches_tracked.add_(finite)
        if measured_var is None:
            rate = 1.0  # nothing random to average out
        elif self.momentum is None:
            rate = 1.0 / self.num_batches_tracked.clamp_min(1).to(self.running_mean.dtype)
        else:
            rate = self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.lerp_(torch.where(finite, new.to(running.dtype), running), rate)

    @torch.no_grad()
    def innovation(self, x: Tensor, prior: Belief) -> Tuple[Tensor, Tensor]:
        """How far the measurement of x is from the prior (after the process model).

        Returns:
            (measured mean - prior mean) / prior std, and log(measured var / prior var), both of
            shape (C,); averaged over micro-batches.
        """
        prior = process(self._cast(prior, statistics_dtype(x)), *self._model())
        measured = Layout(self._rows(x), self.num_features).moments(x)
        mean, logvar = _innovation(prior, Belief(*measured))
        return mean.mean(0), logvar.mean(0)


class GroupKalmanNorm2d(_KalmanFilter, nn.GroupNorm):
    r"""Group Kalman Normalization (Sec. 3.3, Eq. 8): Eq. 7 on GroupNorm's statistics.

    The measurement is the mean and biased variance of each image and group of channels. The prior,
    a belief per channel, is corrected by the process model (see :class:`KalmanNorm2d`) and turned
    into the belief about a pixel of the group: the mean of the channels' means, and the mean of
    their variances plus the variance of their means. Like GroupNorm it has no moving statistics: it
    measures and filters in evaluation too, and so needs its prior there.

    Args:
        num_groups, num_channels, eps, affine: as in :class:`torch.nn.GroupNorm`.
        gain, learn_gain, variant, process_model, prior_gradient: as in :class:`KalmanNorm2d`;
            ``gain=None`` is GroupNorm.

    Shape:
        - x: (N, C, H, W); y is like x.
        - prior: mean and var of shape (1, C) or (N, C).
    """

    needs_prior = property(lambda self: not self.is_head, doc="Whether forward needs a prior.")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        gain: Optional[float] = 0.1,
        learn_gain: bool = True,
        variant: str = "network",
        process_model: bool = True,
        prior_gradient: bool = True,
    ):
        super().__init__(num_groups, num_channels, eps, affine)
        self._init_filter(
            num_channels,
            gain,
            learn_gain and gain is not None,
            variant,
            process_model,
            prior_gradient,
        )

    def forward(
        self, x: Tensor, prior: Optional[Belief] = None, return_belief: bool = False
    ) -> Union[Tensor, Tuple[Tensor, Belief]]:
        """Normalises x; see :meth:`KalmanNorm2d.forward`."""
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")
        self._check_prior(prior)
        passes_on = prior is not None or return_belief
        prior = self._cast(prior, statistics_dtype(x))
        if prior is not None:
            prior = group_belief(process(prior, *self._model()), self.num_groups)
        if x.numel() == 0:
            if prior is None:  # any statistics will do
                zeros = x.new_zeros(1, self.num_groups, dtype=statistics_dtype(x))
                prior = Belief(zeros, zeros)
            y, posterior = self._without_images(x, self._spread(prior))
            belief = self._belief_to_pass_on(posterior)
        else:
            rows = x.shape[0] if self._measures else prior.mean.shape[0]
            layout = Layout(rows, self.num_groups)
            model = None, None, None  # the prior has been through it
            y, belief, posterior, _ = self._filter_batch(x, prior, self.gain, layout, model)
            if self.variant == "paper" or not self.affine:
                belief = self._belief_to_pass_on(self._spread(posterior))
        return (y, belief) if passes_on else y

    def _spread(self, belief: Belief) -> Belief:
        """A belief about groups as one about their channels."""
        per_group = self.num_channels // self.num_groups
        return Belief(*(v.repeat_interleave(per_group, dim=1) for v in belief))

    @torch.no_grad()
    def innovation(self, x: Tensor, prior: Belief) -> Tuple[Tensor, Tensor]:
        """See :meth:`KalmanNorm2d.innovation`; averaged over images, shape (G,)."""
        prior = process(self._cast(prior, statistics_dtype(x)), *self._model())
        prior = group_belief(prior, self.num_groups)
        mean, logvar = _innovation(prior, measure_groups(x, self.num_groups))
        return mean.mean(0), logvar.mean(0)


def _innovation(prior: Belief, measured: Belief) -> Tuple[Tensor, Tensor]:
    mean = (measured.mean - prior.mean) / prior.var.sqrt()
    return mean, (measured.var / prior.var).log()


def kalman_layers(module: nn.Module) -> Dict[str, Union[KalmanNorm2d, GroupKalmanNorm2d]]:
    """The KN and GKN layers of a model that have a gain, by name; heads of chains are left out."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _KalmanFilter) and not layer.is_head
    }


def set_gain_scale(module: nn.Module, scale: float) -> None:
    """Multiplies the gain of every KN and GKN layer of a model by ``scale``, for annealing."""
    for layer in kalman_layers(module).values():
        layer.set_gain_scale(scale)


def set_norm_batch_size(module: nn.Module, images: Optional[int]) -> None:
    """Makes every KN layer of a model normalise micro-batches of ``images`` images on their own.

    In training, and in evaluation with batch statistics, each group of that many consecutive images
    is measured, filtered and normalised as if it were the batch, while the gradient is that of the
    whole batch: small batches can be studied at the speed of large ones. Running statistics take
    the average over the groups, as averaging over GPUs would have it (the released code takes the
    first group's). GKN, which normalises each image on its own anyway, ignores it, and so do other
    norms. It is no part of the state_dict.

    Args:
        module: the model.
        images: m, of which every batch must be a multiple; None for the whole batch at once.

    Raises:
        ValueError: if ``images`` is not None and below 1.
    """
    if images is not None and images < 1:
        raise ValueError(f"a micro-batch has 1 image or more, or is None, not {images}")
    for layer in module.modules():
        if isinstance(layer, KalmanNorm2d):
            layer.norm_batch_size = images
