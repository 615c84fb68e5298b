"""The linear layers of a denoiser that are stored in fewer bits, and copies of a denoiser."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch.nn as nn
from diffusers.models import embeddings

_MIDDLE = "mid_block"  # of a UNet, the only block that is in no list


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers of the blocks by path: attention, feed-forward and modulation.

    The embeddings of timesteps, classes and text are left out, and so is the last layer.

    Args:
        model: a denoiser of diffusers.
    """
    found = {}
    for child_name, child in model.named_children():
        if isinstance(child, nn.ModuleList) or child_name == _MIDDLE:
            for name, module in _outside_embeddings(child, child_name):
                if isinstance(module, nn.Linear):
                    found[name] = module
    return found


def _outside_embeddings(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields a module and those in it with their paths, except for embeddings and their parts."""
    if type(module).__module__ == embeddings.__name__:
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _outside_embeddings(child, f"{name}.{child_name}")


def replace_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts another layer in the place of one."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def copy_sharing(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with modules of its own that hold the same parameters."""
    memo: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)
