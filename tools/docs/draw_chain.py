#!/usr/bin/env python
"""Draws how a belief goes from one layer to the next: docs/chain.png.

The upper half names the steps. The lower half shows one channel: its prior, the measurement on one
image, the posterior, and the distribution over many images. The package computes the numbers, on
random features of 32 channels.

Examples:
    python tools/docs/draw_chain.py docs/chain.png
"""

import argparse
import sys

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from kn_detectron.layers import Belief, belief
from kn_detectron.layers.filter import update

GAIN = 0.3
CHANNELS, SIDE = 32, 6
COMMON = 0.3  # the share of a feature's variance that is between images
PRIOR, MEASURED, POSTERIOR, PLAIN = "#4477aa", "#cc6677", "#228833", "#555555"


def compute():
    """The beliefs about one channel of a layer, and its statistics on many images.

    Returns:
        dict: the mean and standard deviation of each, by name.
    """
    torch.manual_seed(6)
    below = Belief(torch.randn(1, CHANNELS) * 0.5, torch.rand(1, CHANNELS) + 0.5)
    weight = torch.randn(1, CHANNELS, 3, 3) * (2 / (9 * CHANNELS)) ** 0.5
    behind_relu = belief.relu(below)
    prior = belief.conv2d(behind_relu, weight)

    def features(images):
        # The pixels of an image are more alike than those of different images.
        of_image = torch.randn(images, CHANNELS, 1, 1) * COMMON**0.5
        of_pixel = torch.randn(images, CHANNELS, SIDE, SIDE) * (1 - COMMON) ** 0.5
        std = below.var.sqrt()[..., None, None]
        x = below.mean[..., None, None] + std * (of_image + of_pixel)
        return torch.nn.functional.conv2d(x.relu(), weight)

    image, many = features(1), features(2000)
    measured = Belief(image.mean(), image.var(unbiased=False))
    moments = {
        "prior": prior,
        "measured": measured,
        "posterior": update(prior, measured, GAIN, mixture=False),
        "all images": Belief(many.mean(), many.var(unbiased=False)),
    }
    return {name: (float(mean), float(var) ** 0.5) for name, (mean, var) in moments.items()}


def box(axes, x, y, text, color, width=1.75, height=0.62):
    """Draws a step of the chain, centred at x, y."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.04",
            facecolor=matplotlib.colors.to_rgba(color, 0.12),
            edgecolor=color,
            linewidth=1.4,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.4)


def arrow(axes, start, end, color):
    """Draws an arrow from one point to another."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, color=color, linewidth=1.5, shrinkA=0
        )
    )


def draw_steps(axes):
    """Draws the chain from layer k - 1 to layer k: features above, beliefs below."""
    axes.set_xlim(0, 13.7)
    axes.set_ylim(0.1, 3.35)
    axes.axis("off")
    axes.text(0.05, 3.1, "features", color=PLAIN, fontsize=9.5, style="italic")
    label = "beliefs: mean and variance per channel"
    axes.text(0.05, 0.2, label, color=PRIOR, fontsize=9.5, style="italic")

    top, bottom = 2.6, 0.85
    box(axes, 1.1, top, "layer k - 1\nnormalised", PLAIN)
    box(axes, 3.8, top, "ReLU, conv", PLAIN)
    box(axes, 6.7, top, "measure\nmean x̄, variance S", MEASURED, 2.4)
    box(axes, 11.6, top, "normalise\nγ (x - μ) / √(Σ + ε) + β", POSTERIOR, 2.8)
    arrow(axes, (2.05, top), (2.85, top), PLAIN)
    arrow(axes, (4.75, top), (5.43, top), PLAIN)
    arrow(axes, (7.97, top), (10.13, top), PLAIN)
    arrow(axes, (13.07, top), (13.6, top), PLAIN)

    box(axes, 1.1, bottom, "belief m, v\nof layer k - 1", PRIOR)
    box(axes, 3.8, bottom, "predict\nthrough ReLU, conv", PRIOR, 2.3)
    box(axes, 6.7, bottom, "process model\nprior μ⁻, Σ⁻", PRIOR, 2.4)
    box(axes, 11.6, bottom, "belief β, γ²\nof layer k", PRIOR, 2.0)
    arrow(axes, (2.05, bottom), (2.58, bottom), PRIOR)
    arrow(axes, (5.02, bottom), (5.43, bottom), PRIOR)
    arrow(axes, (12.67, bottom), (13.6, bottom), PRIOR)

    middle = (top + bottom) / 2
    box(axes, 9.0, middle, "blend by the gain q\n(1 - q) prior + q measured", POSTERIOR, 2.9)
    arrow(axes, (6.7, top - 0.36), (7.5, middle + 0.12), MEASURED)
    arrow(axes, (6.7, bottom + 0.36), (7.5, middle - 0.12), PRIOR)
    arrow(axes, (10.5, middle + 0.12), (11.2, top - 0.36), POSTERIOR)
    arrow(axes, (11.6, top - 0.36), (11.6, bottom + 0.38), PLAIN)


def draw_channel(axes, moments):
    """Draws the distributions of one channel."""
    styles = {
        "all images": ("what 2000 images have", PLAIN, "--"),
        "measured": ("measured on one image", MEASURED, "-"),
        "prior": ("prior, predicted", PRIOR, "-"),
        "posterior": (f"posterior, gain {GAIN:g}", POSTERIOR, "-"),
    }
    x = torch.linspace(*spread(moments), 400)
    for name, (label, color, line) in styles.items():
        mean, std = moments[name]
        density = torch.distributions.Normal(mean, std).log_prob(x).exp()
        axes.plot(x, density, line, color=color, linewidth=2, label=label)
        axes.axvline(mean, 0, 0.04, color=color, linewidth=2)
    axes.set_yticks([])
    axes.set_ylim(0)
    axes.set_xlabel("one channel of layer k, in front of its norm")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def spread(moments):
    """The range that holds all distributions."""
    low = min(mean - 3 * std for mean, std in moments.values())
    high = max(mean + 3 * std for mean, std in moments.values())
    return low, high


def draw(path):
    """Draws the picture and writes it to a file."""
    figure = Figure(figsize=(10.5, 5.2))
    above, below = figure.subplots(2, 1, height_ratios=(3.3, 2.2), gridspec_kw={"hspace": 0.05})
    draw_steps(above)
    draw_channel(below, compute())
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("path", help="the picture to write, a .png")
    draw(parser.parse_args().path)


if __name__ == "__main__":
    sys.exit(main())
