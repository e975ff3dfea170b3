"""Gradients against finite differences, where a network is too large for ``gradcheck``."""

import torch


def slopes(module, run, eps=1e-9):
    """The derivative of a number along one random direction of all parameters, in two ways.

    A gradient that is cut anywhere changes the first and not the second.

    Args:
        module: in float64, with the parameters.
        run: a function without arguments that computes the number.
        eps: the step of the finite difference, so short that it hardly ever meets the kink of a ReLU.

    Returns:
        by autograd, and by the difference of two values.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) * (p.detach().abs().mean() + 0.1)
        for p in parameters
    ]
    gradients = torch.autograd.grad(run(), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction)).item()

    def at(step):
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p.add_(d, alpha=step)
            value = run().item()
            for p, d in zip(parameters, direction):
                p.sub_(d, alpha=step)
        return value

    return slope, (at(eps) - at(-eps)) / (2 * eps)
