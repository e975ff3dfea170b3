"""Kalman Normalization as drop-in layers: KalmanNorm2d and GroupKalmanNorm2d."""

from typing import Dict, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .absorb import absorb
from .belief import Belief, frozen
from .filter import Running, Vectors, group_belief
from .introspection import has_hooks
from .mixin import KN_STATE, OUTSIDE, KalmanNormMixin, Prior
from .normalize import filter_and_normalize
from .passes import statistics_dtype
from .sets import Sets

__all__ = [
    "EVAL_STATISTICS",
    "GroupKalmanNorm2d",
    "KalmanNorm2d",
    "check_takes_prior",
    "kalman_layers",
    "set_gain_scale",
    "set_norm_batch_size",
]

EVAL_STATISTICS = ("moving", "batch")


class KalmanNorm2d(KalmanNormMixin, nn.BatchNorm2d):
    r"""Kalman Normalization of a batch of feature maps (Sec. 3.2, Eq. 7).

    BatchNorm measures a layer's mean and variance on the images at hand. This layer also takes a
    *prior*: the belief predicted from the layer below. It blends the two by a gain q in [0, 1],

    .. math::

        \mu = (1 - q)\, \mu_{prior} + q\, \bar x, \qquad
        \Sigma = (1 - q)\, \Sigma_{prior} + q\, S, \qquad
        y = \gamma\, (x - \mu) / \sqrt{\Sigma + \epsilon} + \beta,

    where :math:`\bar x` and S are BatchNorm's statistics (S biased). Before that, the *process
    model* corrects the prior, per channel:

    - ``variant="network"`` (ours): :math:`\mu_{prior} + b \sqrt{\Sigma_{prior}}` and
      :math:`\Sigma_{prior} e^r`, with b and r learned from 0. The belief passed on is the belief
      about y, which is :math:`(\beta, \gamma^2)`, where :math:`\epsilon` is neglected.
    - ``variant="paper"``: :math:`\Sigma_{prior} + R`, with R = softplus(``process_noise``). The
      belief passed on is :math:`(\mu, \Sigma)`, the belief about the un-normalised x. As in the
      released code, :math:`\Sigma` also has the term :math:`q (1 - q) (\bar x - \mu_{prior})^2`. A
      prior is dropped for the step if the mean over the channels of :math:`\Sigma_{prior} / S` is
      100 or more.

    Moving averages of the posterior are kept for inference, as in BatchNorm. In ``running_var`` the
    measured part of the variance is unbiased (multiplied by n / (n - 1)), and the predicted part is
    not changed. At gain 0 nothing is measured, and the posterior does not depend on the batch. The
    running statistics are then set to the posterior, whatever ``momentum`` is.

    In all other respects the layer is a :class:`torch.nn.BatchNorm2d`, and it loads BatchNorm's
    state dicts. There are four exceptions. An empty batch changes no statistic. A batch with
    non-finite values changes no statistic. With a prior, one value per channel is enough in
    training, where the paper variant drops the prior and normalises to β. Second derivatives through
    the layer raise an error.

    Called without a prior, ``norm(x)`` is y. Called with one, ``norm(x, prior=...)`` is y and the
    belief to pass on, even if the prior is None.

    With :func:`set_norm_batch_size` it treats a batch as several micro-batches, as the released
    code does.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        gain: the initial gain q, strictly between 0 and 1 if it is learned. None makes the
            layer the head of a chain, which is BatchNorm: it has no prior and no parameters of KN.
        learn_gain: whether q is a parameter (a scalar, as in the paper) or fixed (released code).
        variant: ``"network"`` or ``"paper"``.
        process_model: whether to learn the correction of the prior.
        prior_gradient: whether gradients flow through the prior to the layers below.
        eval_statistics: the statistics at inference. ``"moving"`` takes the moving averages (Option
            A of the paper). ``"batch"`` measures and filters as in training (Option B).
        device, dtype: of the parameters, as in :class:`torch.nn.BatchNorm2d`.

    Shape:
        - x: (N, C, H, W), any floating dtype and memory format; y is like x.
        - prior: mean and var of shape (1, C), or one row for each micro-batch.

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
        device=None,
        dtype=None,
        *,
        gain: Optional[float] = 0.1,
        learn_gain: bool = True,
        variant: str = "network",
        process_model: bool = True,
        prior_gradient: bool = True,
        eval_statistics: str = "moving",
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if eval_statistics not in EVAL_STATISTICS:
            raise ValueError(
                f"eval_statistics is one of {EVAL_STATISTICS}, not {eval_statistics!r}"
            )
        self.eval_statistics = eval_statistics
        self.norm_batch_size: Optional[int] = None  # images per micro-batch; None: all of them
        self._init_filter(
            gain=gain,
            learn_gain=learn_gain,
            variant=variant,
            process_model=process_model,
            prior_gradient=prior_gradient,
            device=device,
            dtype=dtype,
        )

    # Each channel has statistics of its own.
    channels = groups = property(lambda self: self.num_features, doc="C.")

    @property
    def needs_prior(self) -> bool:
        """Whether forward needs a prior in the present mode."""
        return not self.is_head and not self._uses_moving_statistics()

    def _uses_moving_statistics(self) -> bool:
        moving = self.eval_statistics == "moving" and self.track_running_stats
        return moving and not self.training

    def forward(
        self, input: Tensor, prior: Prior = OUTSIDE
    ) -> Union[Tensor, Tuple[Tensor, Belief]]:
        """Normalises x: ``y = norm(x)`` outside a chain, ``y, belief = norm(x, prior=...)`` in one.

        Args:
            input: features x, shape (N, C, H, W).
            prior: the predicted belief about x, before this layer's process model. It is None for
                the head of a chain, and may be None in evaluation with moving statistics.

        Returns:
            y alone without the argument ``prior``, else y and the belief to pass on. In evaluation
            with moving statistics that is the belief behind a frozen BatchNorm
            (:func:`~kn_detectron.layers.belief.frozen`).

        Raises:
            ValueError: x is not 4-dimensional or has a wrong number of channels; a head is given a
                prior, or another layer lacks the prior that it needs; the prior is no Belief, or
                has a wrong number of rows or channels; a head in training has one value per
                channel; or the batch is not a multiple of ``norm_batch_size``.
        """
        x = input  # the name that callers of a BatchNorm2d may use
        self._check_channels(x)
        self._check_prior(prior)
        if self._uses_moving_statistics():
            in_chain = prior is not OUTSIDE
            bias = self._bias_with_gradients_for_all() if in_chain else self.bias
            y = nn.functional.batch_norm(
                *(x, self.running_mean, self.running_var, self.weight, bias),
                *(False, 0.0, self.eps),
            )
            belief = frozen(self, self.variant) if in_chain else None
        else:
            y, belief = self._filter(x, prior)
        self._observe(x, prior)
        return y if prior is OUTSIDE else (y, belief)

    def _bias_with_gradients_for_all(self) -> Optional[Tensor]:
        """The bias, through which the filter's parameters get gradients of 0.

        In evaluation mode, in a network that trains, nothing else depends on them. DDP would take
        missing gradients for unused parameters.
        """
        bias = self.bias
        for name in KN_STATE:
            parameter = getattr(self, name, None)
            if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
                nothing = 0.0 * parameter.sum()
                bias = nothing.repeat(self.num_features) if bias is None else bias + nothing
        return bias

    def _running_vectors(self, x: Tensor) -> Vectors:
        """The vectors of a layer whose posterior is its moving statistics."""
        dtype = statistics_dtype(x)
        if self.track_running_stats:
            mean, var = self.running_mean[None].to(dtype), self.running_var[None].to(dtype)
        else:
            mean = x.new_zeros((1, self.num_features), dtype=dtype)
            var = torch.ones_like(mean)
        weight, bias = self._scale_and_shift(dtype)
        return Vectors(mean, var, weight=weight, bias=bias)

    def _filter(self, x: Tensor, prior: Prior) -> Tuple[Tensor, Belief]:
        rows = self._rows(x)
        in_chain = isinstance(prior, Belief)
        if in_chain and prior.mean.shape[0] not in (1, rows):
            raise ValueError(
                f"a prior of {prior.mean.shape[0]} rows does not fit {rows} micro-batch(es): a "
                "prior has one row, or one for each micro-batch (see set_norm_batch_size)"
            )
        empty = x.numel() == 0
        if empty and not in_chain:
            spec = self._spec(x, 1, measures=False)
            return filter_and_normalize(x, self._running_vectors(x), spec)
        if self.is_head and self.training and x.numel() == self.num_features * rows:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}"
            )
        measures = self.measures and not empty
        vectors = self._prior_vectors(prior, statistics_dtype(x))
        running = None if empty else self._running()
        if not measures:
            rows = prior.mean.shape[0]
        return filter_and_normalize(x, vectors, self._spec(x, rows, measures), running)

    def _running(self) -> Optional[Running]:
        """The moving statistics, if the layer updates them."""
        if not (self.training and self.track_running_stats):
            return None
        statistics = self.running_mean, self.running_var, self.num_batches_tracked
        return Running(*statistics, self.momentum)

    def can_be_absorbed(self, x: Tensor, prior: Prior) -> bool:
        """Whether :meth:`absorbed` may be called instead of a convolution of x and this layer.

        It may in training at gain 0, when there is one prior for the whole batch, and nobody
        watches the layer by a hook.
        """
        return (
            self.training
            and isinstance(prior, Belief)
            and prior.mean.shape[0] == 1
            and x.numel() > 0
            and not self.measures
            and not has_hooks(self)
        )

    def absorbed(self, conv: nn.Conv2d, x: Tensor, prior: Belief) -> Tuple[Tensor, Belief]:
        """``norm(conv(x), prior=prior)`` at gain 0, in one convolution (ours).

        It makes no pass over the features for the norm, and keeps none for the backward pass. See
        :func:`~kn_detectron.layers.absorb.absorb`. The moving statistics are updated as always.

        Args:
            conv: the convolution, whose ``forward`` is that of :class:`torch.nn.Conv2d`.
            x: its input, shape (N, C_in, H, W).
            prior: the predicted belief about its output, shape (1, C).

        Raises:
            ValueError: the convolution has a wrong number of channels, or the layer is a head.
        """
        self._check_prior(prior)
        weight, bias = conv.weight, conv.bias  # once: a parametrization computes them each time
        channels = weight.shape[0]
        if channels != self.num_features:
            raise ValueError(f"expected {self.num_features} channels (got a conv to {channels})")
        vectors = self._prior_vectors(prior, statistics_dtype(weight))
        spec = self._spec(x, 1, measures=False)
        if self.observer is not None:
            with torch.no_grad():
                # Detached, or autocast would reuse the copy that it casts where a gradient flows.
                detached = (p if p is None else p.detach() for p in (weight, bias))
                self._observe(conv._conv_forward(x, *detached), prior)
        weight, bias, belief = absorb(weight, bias, vectors, spec, self._running())
        return conv._conv_forward(x, weight, bias), belief

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
    def innovation(self, x: Tensor, prior: Belief) -> Tuple[Tensor, Tensor]:
        """How far the measurement of x is from the prior (after the process model).

        Returns:
            (measured mean - prior mean) / √(prior var + eps), and log((measured var + eps) / (prior
            var + eps)), both of shape (C,) and averaged over micro-batches. With eps the values of
            a constant channel are finite.
        """
        sets = self._spec(x, self._rows(x), measures=True).sets
        return _innovation(self._processed(prior, statistics_dtype(x)), sets, x, self.eps)


class GroupKalmanNorm2d(KalmanNormMixin, nn.GroupNorm):
    r"""Group Kalman Normalization (Sec. 3.3, Eq. 8): Eq. 7 on GroupNorm's statistics.

    The measurement is the mean and biased variance of each image and group of channels. The prior,
    a belief per channel, is corrected by the process model (see :class:`KalmanNorm2d`) and turned
    into the belief about a pixel of the group (ours): the mean of the channels' means, and the mean
    of their variances plus the variance of their means. Like GroupNorm, the layer has no moving
    statistics. It measures and filters in evaluation too, and needs its prior there.

    Behind group normalisation each channel keeps its own mean and variance. From the prior
    :math:`(m_c, v_c)` behind the process model and the group's posterior :math:`(\mu_g, \Sigma_g)`
    the network variant passes on :math:`\beta + \gamma (m_c - \mu_g) / \sqrt{\Sigma_g + \epsilon}`
    and :math:`\gamma^2 v_c / (\Sigma_g + \epsilon)`, for each image (ours).

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as in :class:`torch.nn.GroupNorm`.
        gain, learn_gain, variant, process_model, prior_gradient: as in :class:`KalmanNorm2d`;
            ``gain=None`` is GroupNorm.

    Shape:
        - x: (N, C, H, W); y is like x.
        - prior: mean and var of shape (1, C) or (N, C).
    """

    channels = property(lambda self: self.num_channels, doc="C.")
    groups = property(lambda self: self.num_groups, doc="G.")
    needs_prior = property(lambda self: not self.is_head, doc="Whether forward needs a prior.")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        gain: Optional[float] = 0.1,
        learn_gain: bool = True,
        variant: str = "network",
        process_model: bool = True,
        prior_gradient: bool = True,
    ):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._init_filter(
            gain=gain,
            learn_gain=learn_gain,
            variant=variant,
            process_model=process_model,
            prior_gradient=prior_gradient,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, input: Tensor, prior: Prior = OUTSIDE
    ) -> Union[Tensor, Tuple[Tensor, Belief]]:
        """Normalises x: ``y = norm(x)`` outside a chain, ``y, belief = norm(x, prior=...)`` in one.

        Args:
            input: features x, shape (N, C, H, W). The head of a chain takes any shape (N, C, ...),
                as GroupNorm does.
            prior: the predicted belief about x, before this layer's process model. It is None for
                the head of a chain.

        Returns:
            y alone without the argument ``prior``, else y and the belief to pass on.

        Raises:
            ValueError: x is not 4-dimensional or has a wrong number of channels, a head is given a
                prior, another layer is given none, or the prior is no Belief about x's channels,
                with one row or one for each image.
        """
        x = input  # the name that callers of a GroupNorm may use
        if self.is_head and x.dim() != 4 and x.dim() > 1:
            as_maps = x[:, :, None, None] if x.dim() == 2 else x.flatten(2).unsqueeze(2)
            y, belief = self.forward(as_maps, None)
            y = y.reshape(x.shape)
            return y if prior is OUTSIDE else (y, belief)
        self._check_channels(x)
        self._check_prior(prior)
        in_chain = isinstance(prior, Belief) and not torch.jit.is_tracing()  # see _check_channels
        if in_chain and prior.mean.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"a prior of {prior.mean.shape[0]} rows does not fit {x.shape[0]} image(s): a prior "
                "has one row, or one for each image"
            )
        vectors = self._prior_vectors(prior, statistics_dtype(x))
        measures = self.measures and x.numel() > 0
        if vectors.prior_mean is None and not measures:  # an empty batch: any statistics will do
            zeros = x.new_zeros((1, self.num_channels), dtype=statistics_dtype(x))
            vectors = vectors._replace(prior_mean=zeros, prior_var=torch.ones_like(zeros))
        rows = x.shape[0] if measures else vectors.prior_mean.shape[0]
        y, belief = filter_and_normalize(x, vectors, self._spec(x, rows, measures))
        self._observe(x, prior)
        return y if prior is OUTSIDE else (y, belief)

    @torch.no_grad()
    def innovation(self, x: Tensor, prior: Belief) -> Tuple[Tensor, Tensor]:
        """:meth:`KalmanNorm2d.innovation` of each group, averaged over images, shape (G,)."""
        prior = group_belief(self._processed(prior, statistics_dtype(x)), self.num_groups)
        return _innovation(prior, self._spec(x, x.shape[0], measures=True).sets, x, self.eps)


def _innovation(prior: Belief, sets: Sets, x: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    mean, var = sets.moments(x)
    var, prior_var = var + eps, prior.var + eps
    return ((mean - prior.mean) / prior_var.sqrt()).mean(0), (var / prior_var).log().mean(0)


def check_takes_prior(norm: nn.Module, cause: Optional[Exception] = None) -> None:
    """Checks that a norm of a chain has not been replaced.

    Args:
        norm: the norm.
        cause: the error that the check is to explain, if there is one.

    Raises:
        TypeError: it is neither KN nor GKN.
    """
    if not isinstance(norm, (KalmanNorm2d, GroupKalmanNorm2d)):
        raise TypeError(
            f"a {type(norm).__name__} stands where a KN or GKN layer was, and takes no prior: "
            "nn.SyncBatchNorm.convert_sync_batchnorm must not be applied to a KN model (its priors "
            "are the same on every GPU anyway), and a converted network is frozen by eval() of its "
            "norms"
        ) from cause


def kalman_layers(module: nn.Module) -> Dict[str, Union[KalmanNorm2d, GroupKalmanNorm2d]]:
    """The KN and GKN layers of a model by name, without the heads of chains, which have no gain."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, KalmanNormMixin) and not layer.is_head
    }


def set_gain_scale(module: nn.Module, scale: float) -> None:
    """Multiplies the gain of every KN and GKN layer of a model by ``scale``, for annealing.

    Args:
        module: the model.
        scale: from 0 to 1. It takes the place of an earlier one.

    Raises:
        ValueError: it is out of range.
    """
    for layer in kalman_layers(module).values():
        layer.set_gain_scale(scale)


def set_norm_batch_size(module: nn.Module, images: Optional[int]) -> None:
    """Makes every KN layer of a model normalise micro-batches of ``images`` images on their own.

    In training, and in evaluation with batch statistics, each run of ``images`` consecutive images
    is measured, filtered and normalised as if it were the batch. The gradient is still the gradient
    of the whole batch. So small batches can be studied at the speed of large ones. The running
    statistics take the average over the micro-batches, as an average over GPUs would be (ours; the
    released code takes the statistics of the first micro-batch). GKN and other norms ignore the
    setting. It is not in the state_dict.

    Args:
        module: the model.
        images: the size of a micro-batch, which must divide every batch. None normalises the whole
            batch together.

    Raises:
        ValueError: ``images`` is below 1.
    """
    if images is not None and images < 1:
        raise ValueError(f"a micro-batch has 1 image or more, or is None, not {images}")
    for layer in module.modules():
        if isinstance(layer, KalmanNorm2d):
            layer.norm_batch_size = images
