"""Recomputes the blocks of a model in the backward pass, so that no block's activations are kept.

ComfyUI's own training gives `forward` of a module to torch's checkpointing. That does not serve
here: some blocks change tensors in place, a patch's hooks are gone before the backward pass, and
the patch's own tensors need gradients too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

_INNER = "transformer_blocks"  # the blocks of a UNet's transformers, which may be many
_MIDDLE = "middle_block"


class Inside(NamedTuple):
    """What a patch does inside of a block.

    Args:
        tensors: what it does it with, which may need gradients.
        again: lets it act in the recomputed block, with other tensors in their places.
    """

    tensors: tuple[Tensor, ...] = ()
    again: Callable[[Sequence[Tensor]], AbstractContextManager[None]] = lambda _: nullcontext()


@contextmanager
def recomputing(denoiser: nn.Module, inside: Callable[[str], Inside]) -> Iterator[None]:
    """Recomputes blocks in the backward pass of a call of a model that is made in this context.

    The backward pass may come after the context.

    Args:
        denoiser: the UNet or transformer itself.
        inside: returns what the patch does in the block at a path, when the block is called.
    """
    held: list[tuple[nn.Module, Any]] = []
    try:
        for path, block in blocks_of(denoiser):
            held.append((block, vars(block).get("forward")))
            block.forward = _recomputed(block.forward, path, inside)
        yield
    finally:
        for block, forward in held:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def blocks_of(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the path and the module of each block: what a model calls one after the other.

    Args:
        denoiser: the UNet or transformer itself.
    """
    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleList) or name == _MIDDLE:
            yield from _layers(name, child)


def _layers(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that are called in a list, or in a sequence that nothing calls itself."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        yield path, module
        return
    for name, child in module.named_children():
        inner = getattr(child, _INNER, None)
        if isinstance(inner, nn.ModuleList):
            yield from _layers(f"{path}.{name}.{_INNER}", inner)
        else:
            yield from _layers(f"{path}.{name}", child)


def _recomputed(
    forward: Callable[..., Any], path: str, inside: Callable[[str], Inside]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        acting, tensors = inside(path), []
        call = _Call(forward, acting.again, args, kwargs, tensors)
        outputs = _Recompute.apply(call, *tensors, *acting.tensors)
        return _filled(call.out, outputs)

    return run


class _Call:
    """A call of a block, which is made once in the forward pass and once in the backward pass.

    Args:
        forward: calls the block.
        acting: see `Inside.again`.
        args, kwargs: of the call.
        found: gets the tensors among them, which are not kept here.

    Attributes:
        out: the output of the latest call, with places instead of its tensors.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        acting: Callable[[Sequence[Tensor]], AbstractContextManager[None]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: list[Tensor],
    ) -> None:
        self._forward, self._acting = forward, acting
        self._args = [_emptied(value, found) for value in args]
        self._kwargs = {name: _emptied(value, found) for name, value in kwargs.items()}
        # What the model goes on to write into its options must not be seen when it is recomputed.
        self._then = [_as_now(value) for value in self._args]
        self._then_named = {name: _as_now(value) for name, value in self._kwargs.items()}
        self._count = len(found)
        self.out: Any = None

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Calls the block, whose hooks are on it; returns the tensors of its output."""
        return self._called(self._args, self._kwargs, tensors)

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Calls the block in the backward pass, when its hooks are gone."""
        with self._acting(tensors[self._count :]):
            return self._called(self._then, self._then_named, tensors)

    def _called(
        self, args: list[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        copies = [tensor.clone() for tensor in tensors[: self._count]]  # Some blocks change them.
        out = self._forward(
            *(_filled(value, copies) for value in args),
            **{name: _filled(value, copies) for name, value in kwargs.items()},
        )
        found: list[Tensor] = []
        self.out = _emptied(out, found)
        return found


class _Recompute(torch.autograd.Function):
    """Keeps what goes into a block, and none of what it computes."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Calls the block, without gradients as torch has it here."""
        ctx.call = call
        # Torch tells it if these are changed before the backward pass.
        ctx.save_for_backward(*tensors)
        return tuple(call.first(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Calls the block again, with gradients."""
        needed = ctx.needs_input_grad[1:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            outputs = ctx.call.again(inputs)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output.requires_grad and gradient is not None
        ]
        learned = [tensor for tensor in inputs if tensor.requires_grad]
        found: Iterator[Tensor | None] = iter(())
        if pairs:
            found = iter(_gradients(pairs, learned))
        return None, *(next(found, None) if need else None for need in needed)


def _gradients(
    pairs: list[tuple[Tensor, Tensor]], learned: list[Tensor]
) -> tuple[Tensor | None, ...]:
    outputs, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, learned, gradients, allow_unused=True)


class _Place(NamedTuple):
    """Stands for a tensor, by its number."""

    number: int


def _emptied(value: Any, found: list[Tensor]) -> Any:
    """Returns a value with places instead of tensors, which are added to those that were found."""
    if isinstance(value, Tensor):
        found.append(value)
        return _Place(len(found) - 1)
    return _each(value, lambda inner: _emptied(inner, found))


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Returns a value with tensors in their places."""
    if isinstance(value, _Place):
        return tensors[value.number]
    return _each(value, lambda inner: _filled(inner, tensors))


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a list, a tuple or a bundle of tensors, such as Flux's modulations, with changes."""
    if type(value) in (list, tuple):
        return type(value)(change(inner) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
        if any(isinstance(own, (Tensor, _Place)) for own in inner.values()):
            return replace(value, **{name: change(own) for name, own in inner.items()})
    return value


def _as_now(value: Any) -> Any:
    return dict(value) if type(value) is dict else value
