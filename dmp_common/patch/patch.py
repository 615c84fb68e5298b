"""A patch: prompt pools and a gate, and what they add in one forward call of a model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from operator import is_not
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.attach.cache import FieldCache
from dmp_common.attach.context import Context, FieldKey, Settings
from dmp_common.bases.base import Base
from dmp_common.compat import is_compiling
from dmp_common.errors import PatchError
from dmp_common.patch.gate import Gate, kept_prompts
from dmp_common.patch.prompts import PromptPool
from dmp_common.patch.variant import Variant


class Patch(nn.Module):
    """Learnable prompts for the sites of a base, weighted by a gate that sees the timestep.

    Finished fields are remembered between calls in evaluation mode (`Patch.load` gives a patch
    in it) and without gradients; a change of a parameter in place is noticed. Writes through
    `.data` are not: call `cache.clear()` after them.

    Args:
        variant: what the patch is made of.

    Source: Ham et al. 2025, "Diffusion Model Patching via Mixture-of-Prompts".
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.base: Base = variant.base_spec
        self.sites = {site.name: site for site in variant.site_specs()}
        self.gate = Gate(variant, self.base.embedding)
        self.pools = nn.ModuleDict(
            {
                _key(name): PromptPool(
                    variant.grids, variant.prompts, site.width, variant.prompt_init
                )
                for name, site in self.sites.items()
            }
        )
        self.metadata: dict[str, str] = {}
        self.learning_scale = 1.0
        self.cache = FieldCache()
        self._depths = [self.base.depths[name] for name in self.sites]
        # A tuple, so that these modules are not registered a second time.
        self._holders = (self.gate, *self.pools.values())
        self._columns = {name: column for column, name in enumerate(self.sites)}
        self._seen: tuple[nn.Parameter, ...] = ()
        self._generation = 0
        self._replicas: dict[torch.device, tuple[FieldKey, Patch]] = {}

    @classmethod
    def create(cls, base: str | Base, **variant: Any) -> Patch:
        """A new patch that changes nothing yet.

        Args:
            base: a base or its name.
            variant: fields of `Variant` that differ from the base's defaults.

        >>> patch = Patch.create("sd15")
        >>> patch.saved_parameters
        2785792
        """
        return cls(Variant.create(base, **variant))

    @classmethod
    def load(cls, source: str | os.PathLike[str], **hub_options: Any) -> Patch:
        """A patch from a file, or from a repository "user/repo" of the hub.

        Raises:
            PatchError: not a file of ours, or a damaged one.
        """
        from dmp_common.api import load_patch  # it imports this module
        from dmp_common.tools.hub import resolve  # the hub client only where it is used

        return load_patch(resolve(source, **hub_options))

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> str:
        """Writes the patch to a file, atomically; returns the file's hash (10 hex digits).

        Args:
            path: ends in `.safetensors`.
            metadata: header entries besides ours, such as `ss_*` keys.
        """
        from dmp_common.api import save_patch

        return save_patch(self, path, metadata)

    def gate_weights(self, e: Tensor, temperature: float = 1.0) -> Tensor:
        """Gate weights for heat maps and balancing losses.

        Args:
            e: time embedding (T, E), with the class embedding added for condition t+y.

        Returns:
            w (T, S, K*N), float32; S are the patch's sites in order.
        """
        weights: Tensor = self.gate(e, self._depth_inputs(e), temperature)
        return weights

    def gate_logits(self, e: Tensor) -> Tensor:
        """Gate logits before the softmax, for the load loss: (T, S, K*N), or (T, S, K) where a
        whole grid has one."""
        return self.gate.logits(e, self._depth_inputs(e))

    def prepare(
        self,
        e: Tensor,
        latent_hw: tuple[int, int] | None,
        settings: Settings | None = None,
        *,
        timesteps: Tensor | None = None,
        image_tokens: int | None = None,
        text_tokens: int | tuple[int, ...] | None = None,
    ) -> Context:
        """What one forward call of the model will add: all gates at once, in float32.

        Args:
            e: the model's time embedding of each batch item (B, E).
            latent_hw: height and width of the latent; may be None for UNets.
            settings: strength, schedule and so on.
            timesteps: (B,) on the scale 0..1000; needed where `needs_timesteps` says so.
            image_tokens, text_tokens: see `Context`.

        Returns:
            An immutable context; call `context.add(site, x)` at each site.
        """
        settings = settings or Settings()
        if e.dim() != 2 or e.shape[1] != self.base.embedding:
            raise PatchError(
                f"expected a time embedding (B, {self.base.embedding}) of base {self.base.name}, "
                f"found {tuple(e.shape)}: the patch was made for another base than this model."
            )
        there = self.on(e.device)
        if there is not self:
            return there.prepare(
                e,
                latent_hw,
                settings,
                timesteps=timesteps,
                image_tokens=image_tokens,
                text_tokens=text_tokens,
            )
        strength = self.strengths(settings, timesteps)
        columns = self._active_columns(settings.sites)
        if isinstance(strength, float) and strength == 0.0:
            columns = {}  # exactly the base
        weights, rows, key = self._weights(e, settings.temperature)
        return Context(
            weights=weights,
            columns=columns,
            sites=self.sites,
            pools=self.pool,
            tokens=self.base.layout == "tokens",
            grid=self.variant.grid,
            strength=strength,
            rows=rows,
            latent_hw=latent_hw,
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            shared=self.base.shared,
            key=(key, latent_hw, image_tokens, text_tokens),
            cache=None if key is None else self.cache,
        )

    def needs_timesteps(self, settings: Settings) -> bool:
        """Whether its strength differs between timesteps."""
        return settings.needs_timesteps(self.variant.timesteps)

    def strengths(self, settings: Settings, timesteps: Tensor | None) -> float | Tensor:
        """Strength of each batch item, 0 outside the patch's own timesteps; see `Settings`."""
        return settings.strengths(timesteps, self.variant.timesteps)

    def pool(self, site: str) -> PromptPool:
        """The prompt pool of a site."""
        pool = self.pools[_key(site)]
        assert isinstance(pool, PromptPool)
        return pool

    @property
    def saved_parameters(self) -> int:
        """Number of values in the patch file."""
        return sum(p.numel() for p in self.parameters())

    def scale_for_learning(self) -> None:
        """Stores p / N instead of the prompts p, so that a weight is 1 on average.

        The softmax over N places divides every step by N; with this, one learning rate serves
        prompt tuning, soft and hard gates of any N alike. The functions a patch can be, and its
        file, are the same: saving folds the scale back into the prompts.
        """
        count = self.variant.outputs
        if self.variant.gate == "none" or self.variant.gate_form == "residual":
            scale = 1.0
        elif self.variant.selection == "hard":
            scale = count / kept_prompts(count)
        else:
            scale = float(count)
        with torch.no_grad():
            for name in self.sites:
                self.pool(name).prompts.mul_(self.learning_scale / scale)
        self.learning_scale = scale

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the patch file by name; prompts literally as in eq. 3."""
        return {
            name: parameter.detach() * self._scale_of(name)
            for name, parameter in self.saved().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values of `tensors()`; names and shapes must be those of this patch."""
        own = self.saved()
        if set(own) != set(tensors):
            raise PatchError(
                f"expected the tensors {', '.join(sorted(own))}, found "
                f"{', '.join(sorted(tensors))}: give those of a patch of the same variant."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name] / self._scale_of(name))

    def saved(self) -> dict[str, nn.Parameter]:
        """The parameters by the name of their tensor in the patch file."""
        prompts = {f"prompts.{name}": self.pool(name).prompts for name in self.sites}
        return prompts | {f"gate.{name}": p for name, p in self.gate.named_parameters()}

    def _scale_of(self, name: str) -> float:
        return self.learning_scale if name.startswith("prompts.") else 1.0

    def _depth_inputs(self, e: Tensor) -> Tensor:
        return torch.tensor(self._depths, dtype=torch.float32, device=e.device)

    def _active_columns(self, sites: frozenset[str] | None) -> Mapping[str, int]:
        if sites is None:
            return self._columns
        unknown = sorted(sites - set(self.sites))
        if unknown:
            raise PatchError(
                f"expected sites of this patch ({', '.join(self.sites)}), found "
                f"{', '.join(unknown)}: choose among the patch's."
            )
        return {name: column for name, column in self._columns.items() if name in sites}

    def _weights(
        self, e: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor | None, FieldKey | None]:
        """Weights of the distinct timesteps times the learning scale, their rows, the cache key."""
        if not self._may_remember(e):
            return self.gate_weights(e, temperature) * self.learning_scale, None, None
        # The embedding itself is the key: whatever made it, equal values give equal gates.
        items = [row.tobytes() for row in e.detach().to("cpu", torch.float32).numpy()]
        distinct = {item: row for row, item in reversed(list(enumerate(items)))}
        firsts = sorted(distinct.values())
        rows = None
        if len(firsts) < len(items):
            place = {items[row]: index for index, row in enumerate(firsts)}
            if len(firsts) > 1:
                rows = torch.tensor([place[item] for item in items], device=e.device)
            e = e[firsts]
        key = (tuple(items[row] for row in firsts), temperature, self._versions())
        weights = self.cache.get(key)
        if weights is None:
            with torch.inference_mode(False), torch.no_grad():
                weights = self.gate_weights(e.clone(), temperature) * self.learning_scale
            self.cache.put(key, weights)
        return weights, rows, key

    def _may_remember(self, e: Tensor) -> bool:
        if self.training or is_compiling() or e.is_meta:
            return False
        parameters = list(self._fast_parameters())
        if torch.is_grad_enabled() and (
            e.requires_grad or any(p.requires_grad for p in parameters)
        ):
            return False
        if any(p.is_inference() for p in parameters):
            return False  # such tensors do not count their changes
        return not (e.is_cuda and torch.cuda.is_current_stream_capturing())

    def _versions(self) -> FieldKey:
        """Changes whenever a parameter is changed in place or replaced."""
        parameters = tuple(self._fast_parameters())
        if len(parameters) != len(self._seen) or any(map(is_not, parameters, self._seen)):
            # Addresses do not tell: a new tensor may get that of one that was freed.
            self._seen, self._generation = parameters, self._generation + 1
        # Inference tensors count no changes; they are never remembered, only copied.
        versions = tuple((p.data_ptr(), p.is_inference() or p._version) for p in parameters)
        return (self._generation, self.learning_scale, *versions)

    def _apply(self, fn: Any, recurse: bool = True) -> Patch:
        """Moves or converts; values may change without any version telling."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._generation += 1
        self.cache.clear()
        return self

    def _fast_parameters(self) -> Iterator[nn.Parameter]:
        """`parameters()` without its recursion: this runs in every forward call."""
        for holder in self._holders:
            for parameter in holder._parameters.values():
                assert parameter is not None
                yield parameter

    def on(self, device: torch.device) -> Patch:
        """The patch on a device: itself, or a copy, made again when a parameter has changed.

        Raises:
            PatchError: it is being trained elsewhere.
        """
        return self if next(self.parameters()).device == device else self._replica(device)

    def release(self) -> None:
        """Gives back the memory of copies on other devices and of finished fields."""
        self._replicas.clear()
        self.cache.clear()

    def _replica(self, device: torch.device) -> Patch:
        if self.training and torch.is_grad_enabled():
            raise PatchError(
                f"the patch is on {next(self.parameters()).device} and the model on {device}: for "
                "training move the patch with `patch.to(...)` first."
            )
        versions = self._versions()
        known = self._replicas.get(device)
        if known is None or known[0] != versions:
            with torch.inference_mode(False), torch.no_grad():
                known = versions, copy.deepcopy(self).to(device).requires_grad_(False)
            if any(p.is_inference() for p in self._fast_parameters()):
                return known[1]  # such tensors do not count their changes
            self._replicas[device] = known
        return known[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            other = Patch(self.variant)
        values = {name: value.detach().clone() for name, value in self.state_dict().items()}
        other.load_state_dict(values, assign=True)
        for mine, theirs in zip(other.parameters(), self.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        other.learning_scale, other.metadata = self.learning_scale, dict(self.metadata)
        other.cache.limit = self.cache.limit
        return other.train(self.training)


def _key(site: str) -> str:
    """Module names cannot contain dots."""
    return site.replace(".", "_")
