"""detectron2's training loop around a model of two norm layers."""

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from kn_detectron import KalmanNorm2d
from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.layers import Belief

CHANNELS = 3


class TwoNorms(nn.Module):
    """A head of a chain, and a layer with the prior (mean 0.5, variance 4)."""

    def __init__(self):
        super().__init__()
        self.head = KalmanNorm2d(CHANNELS, gain=None)
        self.body = KalmanNorm2d(CHANNELS, gain=0.1)

    def forward(self, x):
        x = self.head(x)
        prior = Belief(torch.full((1, CHANNELS), 0.5), torch.full((1, CHANNELS), 4.0))
        return self.body(x, prior=prior)[0].square().mean()


class Images:
    """Endless random images."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(2, CHANNELS, 4, 4, generator=generator)


class Loop(SimpleTrainer):
    """Trains TwoNorms.

    Args:
        hooks: the hooks.
        folder: where checkpoints go.
        in_step: called with the iteration in each step, before the weights change.
    """

    def __init__(self, *hooks, folder="", in_step=None):
        model = TwoNorms()
        super().__init__(model, Images(), torch.optim.SGD(model.parameters(), lr=0.1))
        self.checkpointer = KNCheckpointer(model, str(folder))
        self.in_step = in_step
        self.steps = []
        self.seed = 3
        self.register_hooks(hooks)

    def run_step(self):
        if self.in_step is not None:
            self.in_step(self.iter)
        super().run_step()
        self.steps.append(self.iter)

    def save_checkpoint(self):
        self.checkpointer.save(f"model_{self.iter}", iteration=self.iter)


__all__ = ["CHANNELS", "Images", "Loop", "TwoNorms"]
