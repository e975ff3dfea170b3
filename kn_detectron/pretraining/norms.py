"""Baselines of the paper: Batch Renormalization, weight normalization that starts without data."""

import math
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ..errors import InputError
from ..layers.sets import Sets
from ..networks import CifarResNet

__all__ = ["BatchRenorm2d", "apply_weight_norm", "replace_batch_norms"]


class BatchRenorm2d(nn.BatchNorm2d):
    r"""Batch Renormalization (Ioffe, 2017): BatchNorm corrected towards its moving statistics.

    With the batch's mean and standard deviation :math:`\mu_B, \sigma_B` and the moving ones
    :math:`\mu, \sigma`, in training

    .. math::

        y = \gamma \left(\frac{x - \mu_B}{\sigma_B}\, r + d\right) + \beta, \qquad
        r = \mathrm{clip}(\sigma_B / \sigma, 1 / r_{max}, r_{max}), \qquad
        d = \mathrm{clip}((\mu_B - \mu) / \sigma, -d_{max}, d_{max}),

    where r and d take no gradient. The limits start at BatchNorm, :math:`r_{max} = 1` and
    :math:`d_{max} = 0`, until 5% of the schedule, and grow linearly to 3 at 40% and to 5 at 25%.
    The paper says 5k, 40k and 25k steps; the shares are ours, for schedules of any length.

    In evaluation, and in the names of its state, it is :class:`torch.nn.BatchNorm2d`. Without
    ``track_running_stats`` there is nothing to correct towards: it is BatchNorm.

    Args:
        num_features: C.
        steps: length of the schedule, in steps.
        norm_batch_size: images that are normalised together; it divides the batch. None is the
            whole batch. Moving statistics take the average over the groups.
        eps, momentum: as in :class:`torch.nn.BatchNorm2d`.

    Shape:
        - x: (N, C, H, W); y is like x.
    """

    def __init__(
        self,
        num_features: int,
        steps: int,
        norm_batch_size: Optional[int] = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__(num_features, eps, momentum)
        self.steps = steps
        self.norm_batch_size = norm_batch_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x."""
        if not self.training:
            return super().forward(x)
        groups = x.shape[0] // (self.norm_batch_size or x.shape[0])
        scale, shift = self.weight.expand(groups, -1), self.bias.expand(groups, -1)
        if self.track_running_stats:
            r, d = self._correct_and_track(x, groups)
            scale, shift = scale * r, shift + scale * d
        # The groups lie side by side as channels, which batch_norm treats apart.
        y = x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
        y = F.batch_norm(y, None, None, scale.flatten(), shift.flatten(), True, 0.0, self.eps)
        return y.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def _correct_and_track(self, x, groups):
        mean, var = Sets(x.shape[0], self.num_features, groups, self.num_features).moments(x)
        std, moving_std = ((v + self.eps).sqrt() for v in (var, self.running_var))
        done = self.num_batches_tracked / self.steps
        r_max = 1 + 2 * ((done - 0.05) / 0.35).clamp(0, 1)
        d_max = 5 * ((done - 0.05) / 0.20).clamp(0, 1)
        r = (std / moving_std).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / moving_std).clamp(-d_max, d_max)

        count = x.numel() // (groups * self.num_features)
        self.running_mean.lerp_(mean.mean(0), self.momentum)
        self.running_var.lerp_(var.mean(0) * (count / max(count - 1, 1)), self.momentum)
        self.num_batches_tracked.add_(1)
        return r, d


def replace_batch_norms(module: nn.Module, build: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    """Replaces all BatchNorms in a module. Scale and shift keep their values.

    Args:
        module: the module that holds them.
        build: makes the new layer from the BatchNorm that it replaces.

    Raises:
        InputError: a BatchNorm does more than torch's, such as timm's, which apply an activation.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if type(child).forward is not nn.BatchNorm2d.forward:
                raise InputError(
                    f"The network has norms of the class {type(child).__name__}, which do more than "
                    "normalise, and nothing else can take their place: give --norm KN, or BN "
                    "without --norm-batch-size, or another network."
                )
            layer = build(child)
            # Networks initialise these, some with 0.
            own = {n: p for n, p in child.named_parameters() if n in ("weight", "bias")}
            layer.load_state_dict(own, strict=False)
            setattr(module, name, layer)
        else:
            replace_batch_norms(child, build)


def apply_weight_norm(network: nn.Module) -> None:
    """Weight normalization (Salimans & Kingma, 2016) of a ResNet, in place of its BatchNorms.

    Each filter becomes g v / |v| with g and v learned, and gets a bias. The start of g needs no
    data and keeps variances about the same from layer to layer. It is 1 for the stem, whose images
    have variance 1, and sqrt(2) behind a ReLU. At the end of each of the L residual branches it is
    divided by sqrt(L), so that the sums over the branches stay bounded.

    Args:
        network: a detectron2 ResNet that was built with the norm "", or a
            :class:`~kn_detectron.networks.CifarResNet`.
    """
    if isinstance(network, CifarResNet):
        first, blocks = network.conv1, list(network.blocks)
    else:
        first = network.stem.conv1
        blocks = [block for stage in network.stages for block in stage]
    replace_batch_norms(network, lambda _: nn.Identity())
    last = {[m for m in b.children() if isinstance(m, nn.Conv2d)][-1] for b in blocks}
    for conv in [m for m in network.modules() if isinstance(m, nn.Conv2d)]:
        gain = 1.0 if conv is first else math.sqrt(2)
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        weight_norm(conv)
        g = conv.parametrizations.weight.original0
        nn.init.constant_(g, gain / math.sqrt(len(blocks)) if conv in last else gain)
