"""The floor of a training step: what no method that acts at the first site can avoid."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn as nn


def saved_bytes(run: Callable[[], Any], ignore: set[int]) -> int:
    """Bytes kept for the backward pass, weights left out."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignore:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(seen.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most memory that a run takes on a GPU beside what was taken before it."""
    run()  # the first step makes the optimiser's state, which stays
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Floor:
    """A step of the floor: the frozen forward pass, and the backward to the first site's input.

    Args:
        model, inputs: the frozen model and the arguments of a call.
        site: the module whose input is the first site.
        autocast: the context that the trainer calls the model in, for equal arithmetic.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        site: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.inputs = model, inputs
        self.site, self.autocast = site, autocast

    def loss(self) -> torch.Tensor:
        """The forward pass, with gradients from the site on, and a mean square as the loss."""

        def root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = "hidden_states"
            if args:
                return (args[0].detach().requires_grad_(), *args[1:]), kwargs
            return args, {**kwargs, name: kwargs[name].detach().requires_grad_()}

        handle = self.site.register_forward_pre_hook(root, with_kwargs=True)
        try:
            with self.autocast():
                output = self.model(**self.inputs, return_dict=False)[0]
                loss: torch.Tensor = output.float().square().mean()
        finally:
            handle.remove()
        return loss

    def __call__(self) -> None:
        """The forward and the backward pass."""
        self.loss().backward()
