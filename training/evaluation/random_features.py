"""Features of a network that was never trained, so that no data set and no task chose them.

Distances in features of a trained classifier see what that classifier was trained to see. Random
convolutions are blind in other places; where both agree, the result does not hang on the network.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.nn.utils import skip_init

from training.data.draws import generator

_CHANNELS = (3, 32, 64, 64, 64)
_SMALLEST = 32  # pixels of the shorter side; smaller pictures are enlarged
_CELLS = 2  # of each side of the last map, which keeps where things are
_FEATURES = 64


class RandomFeatures(nn.Module):
    """Four random convolutions of stride 2, the mean over a grid of 2 x 2, one random layer.

    The weights are the same on every machine: they come from one fixed seed.

    Source: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models"
    (random embeddings of 64 values; theirs of a VGG16).
    """

    def __init__(self) -> None:
        super().__init__()
        # Without torch's own draws, which would move the global generator.
        self.layers = nn.ModuleList(
            skip_init(nn.Conv2d, before, after, 3, stride=2, padding=1)
            for before, after in pairwise(_CHANNELS)
        )
        self.project = skip_init(nn.Linear, _CHANNELS[-1] * _CELLS**2, _FEATURES)
        for number, layer in enumerate([*self.layers, self.project]):
            weight: Tensor = layer.weight
            # He's bound keeps the scale of values behind a ReLU. Uniform, because the bits of
            # normal draws depend on the processor.
            bound = math.sqrt(6 / weight[0].numel())
            drawn = torch.rand(weight.shape, generator=generator("random features", number))
            with torch.no_grad():
                weight.copy_((2 * drawn - 1) * bound)
                layer.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 64), float32, of images (B, 1 or 3, H, W) in [-1, 1], from 8 x 8 on.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 8:
            raise ValueError(
                f"expected images (B, 1 or 3, H, W) of 8 x 8 or more, found {tuple(images.shape)}"
            )
        x = images.float().expand(-1, 3, -1, -1)
        height, width = x.shape[2:]
        if min(height, width) < _SMALLEST:
            factor = _SMALLEST / min(height, width)
            size = (round(factor * height), round(factor * width))
            x = interpolate(x, size, mode="bilinear", align_corners=False)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.project(adaptive_avg_pool2d(x, _CELLS).flatten(1))


def random_features() -> nn.Module:
    """The network, frozen; `--feature_extractor` takes it as
    training.evaluation.random_features:random_features."""
    return RandomFeatures().eval().requires_grad_(False)
