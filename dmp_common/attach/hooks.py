"""Attaching a patch to a model with torch hooks, and removing it again."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_not
from types import TracebackType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dmp_common.attach.cache import FieldCache
from dmp_common.attach.checkpointing import bind, unbind
from dmp_common.attach.context import Context, Settings
from dmp_common.bases.base import Argument, Base, ModelCall, Naming, Site, find_module
from dmp_common.bases.detect import (
    find_denoiser,
    require_base,
    require_same_prediction,
    require_same_timesteps,
)
from dmp_common.bases.schedule import ALWAYS, Schedule
from dmp_common.compat import is_compiling
from dmp_common.errors import PatchError
from dmp_common.patch.patch import Patch


def attach(
    model: Any,
    patch: Patch,
    *,
    strength: float = 1.0,
    schedule: Schedule | None = None,
    temperature: float = 1.0,
    sites: Iterable[str] | None = None,
) -> Attachment:
    """Attaches a patch to a model, until `remove()` or the end of the `with` block.

    Several patches may be attached; their fields add. Attach before `torch.compile`. The model
    itself is not changed: after `remove()` it is what it was.

    Args:
        model: a diffusers pipeline, its unet or transformer, or an LDM model of a host.
        patch: made for the base of this model.
        strength: multiplies the added field; 0 is exactly the base.
        schedule: where along the timesteps the patch acts.
        temperature: of the gate.
        sites: the sites that act; None for all of the patch's.

    Raises:
        PatchError: the patch is for another base, another time embedding or another prediction
            type than the model's, or the model is compiled already.

    Example:
        >>> pipe = diffusers.StableDiffusionPipeline.from_pretrained(...)  # doctest: +SKIP
        >>> with attach(pipe, Patch.load("p.safetensors"), strength=0.8):  # doctest: +SKIP
        ...     image = pipe("a photo of a cat").images[0]
    """
    chosen = None if sites is None else frozenset(sites)
    if chosen is not None and (unknown := chosen - set(patch.sites)):
        raise PatchError(
            f"expected sites of this patch ({', '.join(patch.sites)}), found "
            f"{', '.join(sorted(unknown))}: choose among the patch's."
        )
    denoiser = find_denoiser(model)
    naming = require_base(denoiser, patch.base)
    require_same_timesteps(denoiser, patch.variant, naming)
    require_same_prediction(model, patch.variant)
    if patch.variant.mix == "prepend" and naming != "diffusers":
        raise PatchError(
            "this patch prepends its prompts, which hosts cannot do: use a patch that adds them."
        )
    settings = Settings(strength, schedule or ALWAYS, temperature, chosen)
    return Attachment(denoiser, patch, naming, settings)


class Attachment:
    """A patch on a model: the handles of its hooks. Made by `attach`; a context manager."""

    def __init__(
        self, denoiser: nn.Module, patch: Patch, naming: Naming, settings: Settings
    ) -> None:
        self.patch = patch
        self.settings = settings
        # Forward calls that embedded their timestep; hosts warn when there are none, because a
        # replaced model (TensorRT) calls the denoiser but none of its parts.
        self.calls = 0
        self._base: Base = patch.base
        self._denoiser = denoiser
        self._naming = naming
        self._source = patch.base.times[naming]
        self._time = _module(denoiser, self._source.path)
        self._active = True
        self._call: _Call | None = None
        self._embeddings = FieldCache(limit=16 * 1024**2)
        self._seen: list[Tensor] = []  # the parameters they were computed with
        self._checkpointing = [
            m for m in denoiser.modules() if hasattr(m, "gradient_checkpointing")
        ]
        self._handles: list[RemovableHandle] = [
            denoiser.register_forward_pre_hook(self._begin, with_kwargs=True),
            denoiser.register_forward_hook(self._end, always_call=True),
        ]
        if not self._source.inside:
            self._handles.append(self._time.register_forward_hook(self._embedding))
            if patch.variant.condition == "t+y":
                labels = _module(denoiser, str(self._source.labels))
                self._handles.append(labels.register_forward_hook(self._embedding))
        for site in patch.sites.values():
            self._add_site(site, _module(denoiser, site.paths[naming]), site.arguments[naming])

    def remove(self) -> None:
        """Takes the patch off the model. Calling it again does nothing."""
        # Compiled graphs do not watch hooks, but they do watch this flag.
        self._active = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._checkpointing:
            unbind(module, self)
        self._checkpointing.clear()
        self._call = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: notes what the call is about. Touches no weight (offloading)."""
        if not self._active:
            return
        call = ModelCall(args, kwargs)
        timestep, labels = call.get(self._source.argument), call.get(self._base.labels)
        self._call = _Call(self, timestep, labels, call)
        if torch.is_grad_enabled() and not is_compiling():
            for part in self._checkpointing:
                bind(part, self)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model, also after an error: a site called outside of it must not see this.

        torch does not come here after an interrupt (a BaseException); the next call overwrites.
        """
        self._call = None

    def _embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The model has computed its time embedding, or that of its labels."""
        if self._active and self._call is not None:
            self._call.embedded(output)

    def _add_site(self, site: Site, module: nn.Module, argument: Argument) -> None:
        name, key, index = site.name, argument.name, argument.index
        prepend = self.patch.variant.mix == "prepend"

        def before(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not self._active:
                return None
            x = args[index] if len(args) > index else kwargs[key]
            context = self._context(name, x)
            x = context.prepend(name, x) if prepend else context.add(name, x)
            if len(args) > index:
                return (*args[:index], x, *args[index + 1 :]), kwargs
            return args, {**kwargs, key: x}

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return self._context(name, output).strip(name, output) if self._active else None

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if prepend:
            self._handles.append(module.register_forward_hook(after))

    def _embed(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """e (B, E) where the model computes it inside its blocks, with the model's own modules.

        Remembered between calls on the CPU, where it would cost as much as adding at four sites.
        """
        time: Any = self._time
        parameters: list[Tensor] = list(time.timestep_embedder.parameters())
        if (
            is_compiling()
            or torch.is_grad_enabled()
            or timesteps.device.type != "cpu"
            or any(p.is_inference() for p in parameters)
        ):
            e: Tensor = time.timestep_embedder(time.time_proj(timesteps).to(dtype))
            return e
        if len(parameters) != len(self._seen) or any(map(is_not, parameters, self._seen)):
            # Addresses do not tell: a new tensor may get that of one that was freed.
            self._seen = parameters
            self._embeddings.clear()
        key = (*timesteps.tolist(), dtype, *((p.data_ptr(), p._version) for p in parameters))
        known = self._embeddings.get(key)
        if known is None:
            with torch.inference_mode(False), torch.no_grad():
                known = time.timestep_embedder(time.time_proj(timesteps.clone()).to(dtype))
            self._embeddings.put(key, known)
        remembered: Tensor = known
        return remembered

    def _context(self, site: str, x: Tensor) -> Context:
        if self._call is None:
            raise PatchError(
                f"site {site} was called outside of a forward call of the model, so its timestep "
                "is unknown: call the whole model (under gradient checkpointing, through the "
                "model's own `enable_gradient_checkpointing`)."
            )
        return self._call.context_for(x)


class _Call:
    """One forward call of the model: its arguments and, once known, its context."""

    def __init__(self, attachment: Attachment, timestep: Any, labels: Any, call: ModelCall) -> None:
        self.attachment = attachment
        self.timestep = timestep
        self.labels = labels
        self.call = call
        self.context: Context | None = None
        # How many embeddings the gate sees the sum of, and the sum of those seen so far.
        both = attachment.patch.variant.condition == "t+y" and not attachment._source.inside
        self.missing = 2 if both else 1
        self.sum: Tensor | None = None

    def embedded(self, e: Tensor) -> None:
        """Takes an embedding (B, E); the last one makes the context."""
        attachment = self.attachment
        e = e if self.sum is None else self.sum + e
        self.sum, self.missing = e, self.missing - 1
        if self.missing:
            return
        timesteps = None
        if attachment.patch.needs_timesteps(attachment.settings):
            timesteps = attachment._source.timesteps(self._timesteps(e))
        base = attachment._base
        latent = None
        if base.layout == "tokens":
            latent = base.latent[attachment._naming](base, self.call, attachment._denoiser)
        attachment.calls += 0 if is_compiling() else 1
        self.context = attachment.patch.prepare(
            # Qwen-Image-Edit embeds timestep 0 after them, for its references.
            e if latent is None else e[: latent.batch],
            None if latent is None else latent.size,
            attachment.settings,
            timesteps=timesteps,
            image_tokens=latent.image_tokens if latent else None,
            text_tokens=latent.text_tokens if latent else None,
        )

    def context_for(self, x: Tensor) -> Context:
        """The context; computed here where the model embeds the time inside its first block."""
        if self.context is None:
            if not self.attachment._source.inside:
                raise PatchError(
                    f"expected the model to embed its timestep before the first site of base "
                    f"{self.attachment._base.name}, and it did not: is its forward replaced?"
                )
            self.embedded(self._embed(x))
        assert self.context is not None
        return self.context

    def _embed(self, x: Tensor) -> Tensor:
        timesteps = self._timesteps(x)
        if self.attachment.patch.variant.condition == "t+y":
            time: Any = self.attachment._time
            conditioning: Tensor = time(timesteps, self.labels, hidden_dtype=x.dtype)
            return conditioning
        return self.attachment._embed(timesteps, x.dtype)

    def _timesteps(self, like: Tensor) -> Tensor:
        return torch.as_tensor(self.timestep, device=like.device).reshape(-1)


def _module(denoiser: nn.Module, path: str) -> nn.Module:
    module = find_module(denoiser, path)
    if module is None:
        raise PatchError(f"expected a module at {path}, found none: is this the whole model?")
    return module
