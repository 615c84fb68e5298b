"""A LoRA whose rank depends on the noise level (T-LoRA), as a control for gated patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError
from training.base.frozen import FrozenBase
from training.base.schedulers import require_noise_prediction

_STEPS = 1000  # timesteps of the schedule
Handles = list[torch.utils.hooks.RemovableHandle]


def ranks_at(t: Tensor, rank: int, smallest: int) -> Tensor:
    """The number of ranks that act at timesteps (B,): all of them without noise, fewest at the end.

    Args:
        t: in 0..1000, (B,).
        rank: of the LoRA.
        smallest: at the noisiest timestep.

    Returns:
        (B,), int64.

    Source: Soboleva et al. 2025, "T-LoRA: Single Image Diffusion Model Customization Without
    Overfitting", arXiv 2507.05964, section 3.2.
    """
    return smallest + ((rank - smallest) * (_STEPS - t.double()) / _STEPS).floor().long()


def limit_ranks(frozen: FrozenBase, layers: list[Any], rank: int, smallest: int) -> Handles:
    """Switches off the last ranks of a LoRA where the model is called with much noise.

    Args:
        layers: peft's layers in the model of the base.
        rank: of the LoRA.
        smallest: ranks that act at the noisiest timestep.

    Returns:
        Handles of hooks; removing them ends it.

    Raises:
        PatchError: more ranks at least than there are, or a base whose timesteps are not those of
            a noise schedule.
    """
    if smallest > rank:
        raise PatchError(
            f"expected --network_min_dim of at most --network_dim, {rank}, found {smallest}: lower "
            "it."
        )
    require_ranks_by_noise(frozen.prediction == "flow", frozen.base.name)
    acting: list[Tensor] = []  # of the call that runs: (B, rank)

    def see(_: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
        t = given["timestep"] if "timestep" in given else inputs[1]
        counts = ranks_at(torch.as_tensor(t).reshape(-1), rank, smallest)
        numbers = torch.arange(rank, device=counts.device)
        acting[:] = [numbers < counts[:, None]]

    def mask(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = (-1, *[1] * (output.dim() - 2), rank)
        return output * acting[0].reshape(shape).to(output)

    handles: Handles = [frozen.model.register_forward_pre_hook(see, with_kwargs=True)]
    for layer in layers:
        handles += [down.register_forward_hook(mask) for down in layer.lora_A.values()]
    return handles


def require_ranks_by_noise(flow: bool, base: str) -> None:
    """Refuses --network_min_dim for a flow model; see `require_noise_prediction`."""
    require_noise_prediction(flow, base, "--network_min_dim", "leave it out.")
