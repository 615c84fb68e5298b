"""What a patch needs in forward calls: distinct timesteps, the cache, copies on other devices."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Mapping
from operator import is_not
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad

from dmp_common.attach.context import Context
from dmp_common.attach.field import FieldCache, Remembered
from dmp_common.attach.settings import Dials, Settings
from dmp_common.bases.parts import Latent
from dmp_common.bases.schedule import EVERYWHERE
from dmp_common.compat import function_transform, is_compiling
from dmp_common.errors import PatchError
from dmp_common.patch.patch import Patch

_DEFAULT = Settings()


class Runtime:
    """Makes the contexts of a patch's forward calls, in any thread, on any device.

    One runtime serves all models that a patch is attached to. Fields are cached between calls in
    evaluation mode (`Patch.load` returns a patch in it) and without gradients. The cache notices
    when a parameter is changed in place, but not writes through `.data`: call `cache.clear()` after
    them.

    Args:
        patch: the patch.
    """

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.cache = FieldCache()
        self._columns = {name: column for column, name in enumerate(patch.sites)}
        self._pools = {} if patch.modulates else {name: patch.pool(name) for name in patch.sites}
        # The dictionaries that hold the parameters are read in every call, and `parameters()`
        # would be slow, because it recurses.
        self._holders: list[dict[str, nn.Parameter | None]] = [
            module._parameters for module in (patch.gate, *patch.pools.values())
        ]
        self._within = patch.variant.timesteps
        self._seen: list[nn.Parameter] = []
        self._generation = 0
        self._lock = threading.RLock()
        self._replicas: dict[torch.device, tuple[Hashable, Runtime]] = {}

    def prepare(
        self,
        e: Tensor,
        latent: Latent | None = None,
        settings: Settings = _DEFAULT,
        *,
        timesteps: Tensor | None = None,
        dials: Dials | None = None,
        items: Tensor | None = None,
        conditional: Tensor | None = None,
    ) -> Context:
        """Computes what one forward call of the model will add: all gates at once, in float32.

        Args:
            e: the model's time embedding of each batch item (B, E), or of each frame of each item
                of a video (B*F, E).
            latent: size of the latent and place of its tokens; None where sites are feature maps.
            settings: strength, schedule and other settings.
            timesteps: as many as e, or one, on the scale 0..1000; needed where the strength depends
                on them.
            dials: the settings as tensors, for compiled code.
            items: factors of the strength (B,); None where all are 1.
            conditional: which items are conditional (B,); None where all are. A guidance patch
                acts on these alone; no other patch looks at it.

        Returns:
            An immutable context; call `context.add(site, x)` at each site, or
            `context.modulate(parts, x)` at each output.

        Raises:
            PatchError: the embedding is of another base, a site is unknown, or the timesteps are
                missing.
        """
        patch = self.patch
        if e.dim() != 2 or e.shape[1] != patch.base.embedding:
            raise PatchError(
                f"expected a time embedding (B, {patch.base.embedding}) of base "
                f"{patch.base.name}, found {tuple(e.shape)}: the patch was made for another base "
                "than this model."
            )
        if self._holders[-1]["prompts"].device != e.device:  # type: ignore[union-attr]
            there = self.on(e.device)
            return there.prepare(
                e,
                latent,
                settings,
                timesteps=timesteps,
                dials=dials,
                items=items,
                conditional=conditional,
            )
        columns, strength, site_strengths = self._acting(settings, timesteps, dials)
        if conditional is not None and patch.variant.guidance is not None:
            acting = conditional.to(e.device, torch.float32)
            items = acting if items is None else items.to(e.device) * acting
        if items is not None:
            strength = strength * _for_rows(items.to(e.device), len(e))
        if isinstance(strength, Tensor):
            strength = _for_rows(strength, len(e))
        # `is_transforming` is written out, because this function runs in every call.
        transforming = not is_compiling() and (
            forward_ad._current_level >= 0 or function_transform() is not None
        )
        remembered: Remembered | None = None
        rows: Tensor | None = None
        key: Hashable = None
        if not (transforming or patch.training or is_compiling() or e.is_meta):
            remembered, rows, key = self._recall(e, latent, settings.temperature)
        table: dict[str, Tensor] | None = None
        if remembered is None:
            weights = patch.gate(e, settings.temperature) * patch.learning_scale
            if patch.modulates:
                table = patch.modulations(weights)
        else:
            weights = remembered.weights
            table = remembered.table
        return Context(
            weights,
            columns,
            patch.sites,
            self._pools,
            patch.base.layout == "tokens",
            patch.base.shared,
            strength,
            site_strengths,
            rows,
            latent,
            remembered,
            None if remembered is None else self.cache,
            key,
            not transforming,
            table,
        )

    def _acting(
        self, settings: Settings, timesteps: Tensor | None, dials: Dials | None
    ) -> tuple[Mapping[str, int], float | Tensor, Mapping[str, float | Tensor]]:
        """Returns the columns of the sites that act, the strength, and factors of single sites."""
        columns: Mapping[str, int] = self._columns
        if settings.sites is not None or settings.site_strengths:
            columns = settings.active(columns)
        if dials is not None:
            assert timesteps is not None
            strengths = dials.strengths(timesteps, self._within)
            return columns, strengths, dials.site_strengths(settings, self._columns)
        strength: float | Tensor = settings.strength
        if not settings.steady or self._within != EVERYWHERE:
            strength = settings.strengths(timesteps, self._within)
        if isinstance(strength, float) and strength == 0.0:
            columns = {}  # exactly the base
        return columns, strength, dict(settings.site_strengths)

    def needs_timesteps(self, settings: Settings) -> bool:
        """Tells whether the strength of the patch differs between timesteps."""
        return settings.needs_timesteps(self._within)

    def strengths(self, settings: Settings, timesteps: Tensor | None) -> float | Tensor:
        """Returns the strength of each batch item, 0 outside the patch's own timesteps."""
        return settings.strengths(timesteps, self._within)

    def on(self, device: torch.device) -> Runtime:
        """Returns the runtime of the patch on a device: itself, or that of a copy.

        The copy is made again when a parameter has changed.

        Raises:
            PatchError: the patch is being trained elsewhere.
        """
        own = next(self.patch.parameters())
        if own.device == device:
            return self
        if self.patch.training and torch.is_grad_enabled():
            raise PatchError(
                f"the patch is on {own.device} and the model on {device}: for training move the "
                "patch with `patch.to(...)` first."
            )
        return self.copied(device)

    def copied(self, device: torch.device) -> Runtime:
        """Returns the runtime of a copy of the patch on a device, see `on`."""
        with self._lock:
            versions = self._versions()
            known = self._replicas.get(device)
            if known is not None and known[0] == versions and versions is not None:
                return known[1]
            with torch.inference_mode(False), torch.no_grad():
                other = copy.deepcopy(self.patch).to(device).requires_grad_(False)
            runtime = Runtime(other)
            runtime.cache.limit = self.cache.limit
            if versions is not None:
                self._replicas[device] = versions, runtime
            return runtime

    def release(self) -> None:
        """Frees the memory of copies on other devices and of cached fields."""
        with self._lock:
            self._replicas.clear()
        self.cache.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        return runtime_of(copy.deepcopy(self.patch, memo))

    def _recall(
        self, e: Tensor, latent: Latent | None, temperature: float
    ) -> tuple[Remembered | None, Tensor | None, Hashable]:
        """Returns the weights of the distinct timesteps, the row of each item, and their key.

        All three are None where nothing may be cached.
        """
        if torch.is_grad_enabled() and (e.requires_grad or self._learns()):
            return None, None, None
        versions = self._versions()
        if versions is None:
            return None, None, None
        if e.is_cuda and torch.cuda.is_current_stream_capturing():
            return None, None, None
        # The embedding itself is the key, because equal embeddings give equal weights.
        values = e.detach().to("cpu", torch.float32).numpy()
        items = [row.tobytes() for row in values]
        first = dict(zip(reversed(items), range(len(items) - 1, -1, -1), strict=True))
        firsts = sorted(first.values())
        rows = None
        if len(firsts) < len(items):
            place = {items[row]: index for index, row in enumerate(firsts)}
            if len(firsts) > 1:
                rows = torch.tensor([place[item] for item in items], device=e.device)
            e = e[firsts]
        key = tuple([items[row] for row in firsts]), temperature, versions, latent
        with self.cache.lock:
            remembered = self.cache.get(key)
            if remembered is not None:
                self.cache.move_to_end(key)
        if remembered is None:
            with torch.inference_mode(False), torch.no_grad():
                weights = self.patch.gate(e.clone(), temperature)
                weights = weights * self.patch.learning_scale
                if self.patch.modulates:
                    mixed, split = self.patch.mixed(weights), self.patch.modulation.split
                    remembered = Remembered(weights, mixed, split)
                else:
                    remembered = Remembered(weights)
            self.cache.put(key, remembered)
        return remembered, rows, key

    def _versions(self) -> Hashable:
        """Returns a value that changes whenever a parameter is changed in place or replaced.

        It is None where nothing may be cached: inference tensors do not count their changes.
        """
        parameters: list[Any] = []
        for holder in self._holders:
            parameters += holder.values()
        versions: list[int] = []
        for parameter in parameters:
            if parameter.is_inference():
                return None
            versions += parameter.data_ptr(), parameter._version
        if len(parameters) != len(self._seen) or any(map(is_not, parameters, self._seen)):
            # Addresses are not enough: a new tensor may have the address of one that was freed.
            with self._lock:
                self._seen, self._generation = parameters, self._generation + 1
        return self._generation, self.patch.conversions, self.patch.learning_scale, *versions

    def _learns(self) -> bool:
        return any(
            parameter is not None and parameter.requires_grad
            for holder in self._holders
            for parameter in holder.values()
        )


def _for_rows(values: Tensor, rows: int) -> Tensor:
    """Repeats values of items (B,) for each of their frames, if there are rows for these (B*F)."""
    count = values.numel()
    return values.repeat_interleave(rows // count) if 1 < count < rows else values


def runtime_of(patch: Patch) -> Runtime:
    """Returns the runtime of a patch: the one it carries (the public `Patch` does), or a new one.

    A patch that is attached to several models has one runtime, so that they share its cache.
    """
    runtime = getattr(patch, "runtime", None)
    return runtime if isinstance(runtime, Runtime) else Runtime(patch)
