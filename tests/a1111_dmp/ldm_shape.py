"""A small UNet of LDM's shape, which calls the layers of its blocks as A1111 and Forge do.

Its layers are those of a small diffusers UNet, in another order and under other names; so both
calculate the same, and a patch must give the same on both.
"""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import Tensor

from dmp_common.bases.timesteps import sinusoid
from tests.tiny import FAMILIES


class Unet(nn.Module):
    """LDM's `UNetModel` in small.

    Args:
        model: whose layers it takes; both share their weights.
    """

    def __init__(self, model: diffusers.UNet2DConditionModel) -> None:
        super().__init__()
        time = model.time_embedding
        self.channels = model.config.block_out_channels[0]
        self.time_embed = nn.Sequential(time.linear_1, nn.SiLU(), time.linear_2)
        inputs = [[model.conv_in]]
        for block in model.down_blocks:
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            inputs += [[*pair] for pair in zip(block.resnets, attentions, strict=True)]
            inputs += [[layer] for layer in block.downsamplers or []]
        outputs = []
        for block in model.up_blocks:
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            outputs += [[*pair] for pair in zip(block.resnets, attentions, strict=True)]
            outputs[-1] += list(block.upsamplers or [])
        middle = model.mid_block
        self.input_blocks = nn.ModuleList(map(_block, inputs))
        self.middle_block = _block([middle.resnets[0], middle.attentions[0], middle.resnets[1]])
        self.output_blocks = nn.ModuleList(map(_block, outputs))
        self.out = nn.Sequential(model.conv_norm_out, nn.SiLU(), model.conv_out)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        emb = self.time_embed(sinusoid(timesteps, self.channels))
        skips = []
        for block in self.input_blocks:
            x = _call(block, x, emb, context)
            skips.append(x)
        x = _call(self.middle_block, x, emb, context)
        for block in self.output_blocks:
            x = _call(block, torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


def _block(layers: list[nn.Module | None]) -> nn.ModuleList:
    return nn.ModuleList([layer for layer in layers if layer is not None])


def _call(block: nn.ModuleList, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
    """The layers one by one, as reForge does: the block itself is never called."""
    for layer in block:
        if isinstance(layer, ResnetBlock2D):
            x = layer(x, emb)
        elif isinstance(layer, (Downsample2D, Upsample2D, nn.Conv2d)):
            x = layer(x)
        else:
            x = layer(x, encoder_hidden_states=context, return_dict=False)[0]
    return x


TINY = FAMILIES["sd15"]


def pair(seed: int = 0) -> tuple[nn.Module, Unet]:
    """A diffusers UNet and the same in LDM's shape."""
    model = TINY.model(seed)
    return model, Unet(model).eval()


def run(
    model: nn.Module, timesteps: tuple[float, ...] = (900.0, 10.0), size: tuple[int, int] = (8, 8)
) -> Tensor:
    """The output of either of them for the same inputs, without gradients."""
    inputs = TINY.inputs(torch.tensor(timesteps), size, torch.float32, 1)
    with torch.no_grad():
        if isinstance(model, Unet):
            sample, t, context = inputs.values()
            return model(sample, t, context)
        return model(**inputs, return_dict=False)[0]
