"""Torch hooks for one call of a model: where ComfyUI has no slot for what a patch does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from comfyui_dmp.recompute import Inside, recomputing
from comfyui_dmp.slots import AnyContext, Prepare, module_at
from dmp_common import Base, Context, PatchError, Site
from dmp_common.attach.forms import as_given, as_tokens
from dmp_common.attach.modulation import Part

Handles = list[RemovableHandle]


@contextmanager
def adding(
    denoiser: nn.Module,
    base: Base,
    sites: Mapping[str, Site],
    prepare: Prepare,
    labels: bool,
) -> Iterator[None]:
    """Adds a patch's prompts to the inputs of blocks in one call of a model.

    Args:
        denoiser: the transformer itself.
        base: its base.
        sites: the sites that act, by name.
        prepare: makes the call's context.
        labels: whether the gate sees the class embedding too (condition t+y).
    """
    call = _Call(denoiser, base, prepare, labels)

    def before(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        form = site.forms.get("ldm")

        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens = call.known().add(site.name, as_tokens(args[0], form))
            return as_given(tokens, args[0], form), *args[1:]

        return add

    try:
        for site in sites.values():
            block = module_at(denoiser, site.paths["ldm"])
            call.handles.append(block.register_forward_pre_hook(before(site)))
        yield
    finally:
        call.end()


@contextmanager
def modulating(
    denoiser: nn.Module,
    base: Base,
    parts: Mapping[str, tuple[Part, ...]],
    items: int,
    prepare: Prepare,
    labels: bool,
    recompute: bool,
) -> Iterator[None]:
    """Scales and shifts the outputs of modules in one call of a model.

    The weights of the modules do not matter: they may be quantised, or on another device until the
    module is called.

    Args:
        denoiser: the UNet or transformer itself.
        base: its base.
        parts: for the path of each module, the sites in its output.
        items: the number of items in the batch.
        prepare: makes the call's context.
        labels: whether the gate sees the class embedding too (condition t+y).
        recompute: whether the backward pass recomputes the blocks.
    """
    call = _Call(denoiser, base, prepare, labels)

    def put_on(paths: Mapping[str, tuple[Part, ...]], known: Callable[[], AnyContext]) -> Handles:
        return [
            module_at(denoiser, path).register_forward_hook(_modulating(own, items, known))
            for path, own in paths.items()
        ]

    def inside(block: str) -> Inside:
        paths = {path: own for path, own in parts.items() if path.startswith(f"{block}.")}
        return _inside(paths, call.known(), put_on)

    try:
        call.handles += put_on(parts, call.known)
        with recomputing(denoiser, inside) if recompute else nullcontext():
            yield
    finally:
        call.end()


def _modulating(
    own: tuple[Part, ...], items: int, known: Callable[[], AnyContext]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Returns the hook of a module: it scales and shifts the module's output."""
    form = own[0].form

    def modulate(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        context = known()
        if len(output) == 1 < items and output.shape[1] % items == 0:
            # PixArt computes keys and values of all items' captions as one sequence.
            split = output.view(items, -1, *output.shape[2:])
            return context.modulate(own, split).view(output.shape)
        changed = context.modulate(own, as_tokens(output, form))
        return as_given(changed, output, form)

    return modulate


def _inside(
    paths: Mapping[str, tuple[Part, ...]],
    context: AnyContext,
    put_on: Callable[[Mapping[str, tuple[Part, ...]], Callable[[], AnyContext]], Handles],
) -> Inside:
    """Returns what a patch does inside of a block, for the block's recomputation.

    Args:
        paths: the modules of the block, with the sites in their outputs.
        context: of the call.
        put_on: puts hooks on modules.
    """
    assert isinstance(context, Context)  # There are no masks in training.
    assert context.table is not None
    table = context.table
    names = sorted({part.site for own in paths.values() for part in own})

    @contextmanager
    def again(tensors: Sequence[Tensor]) -> Iterator[None]:
        recomputed = replace(context, table={**table, **dict(zip(names, tensors, strict=True))})
        handles = put_on(paths, lambda: recomputed)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return Inside(tuple(table[name] for name in names), again)


class _Call:
    """One call of a model: its hooks, and its context as soon as the timestep is embedded."""

    def __init__(self, denoiser: nn.Module, base: Base, prepare: Prepare, labels: bool) -> None:
        self.handles: Handles = []
        self._model = type(denoiser).__name__
        self._prepare = prepare
        self._context: AnyContext | None = None
        self._sum: Tensor | None = None
        source = self._source = base.times["ldm"]
        paths = [source.path, *([str(source.labels)] if labels else [])]
        modules = [module_at(denoiser, path) for path in paths]
        self._last = modules[-1]
        self.handles += [module.register_forward_hook(self._embedded) for module in modules]
        self.handles.append(denoiser.register_forward_pre_hook(self._begun))

    def known(self) -> AnyContext:
        """Returns the context of the call.

        Raises:
            PatchError: the model has not embedded its timestep yet.
        """
        if self._context is None:
            raise PatchError(
                f"expected the model to embed its timestep before its first block, and a "
                f"{self._model} did not: use ComfyUI's own loader, or update."
            )
        return self._context

    def end(self) -> None:
        """Takes the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    def _begun(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._context, self._sum = None, None  # a node may call the model twice in one call

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._context is not None:  # Krea 2 embeds timestep 0 too, for reference pictures
            return
        e = self._source.embedding(output)
        e = e if self._sum is None else self._sum + e
        self._sum = e
        if module is self._last:
            self._context, self._sum = self._prepare(e), None
