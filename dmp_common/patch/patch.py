"""A patch: the parameters of the method, and its formula (eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.bases.base import Base
from dmp_common.errors import PatchError
from dmp_common.patch.gate import Gate, kept_prompts
from dmp_common.patch.modulation import ModulationPool
from dmp_common.patch.prompts import PromptPool, resize
from dmp_common.patch.variant import Variant

if TYPE_CHECKING:
    from typing_extensions import Self


class Patch(nn.Module):
    """Learnable prompts for the sites of a base, weighted by a gate that sees the timestep.

    This class holds parameters and the formula. What one forward call of a model needs (fields
    cached between calls, copies on other devices) is in `dmp_common.attach.runtime`.

    Args:
        variant: the configuration of the patch.

    Attributes:
        conversions: how often the parameters were moved or converted as a whole (`to`, `half`).
            Caches of what was computed from them compare this number.

    Source: Ham et al. 2025, "Diffusion Model Patching via Mixture-of-Prompts".
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.base: Base = variant.base_spec
        self.sites = {site.name: site for site in variant.site_specs()}
        self.gate = Gate(variant, self.base.embedding)
        self.modulates = variant.mix == "modulate"
        widths = {name: site.width for name, site in self.sites.items()}
        init = variant.prompt_init
        self.pools = nn.ModuleDict(
            {"modulation": ModulationPool(variant.grids, widths, init)}
            if self.modulates
            else {
                _key(name): PromptPool(
                    variant.grids,
                    variant.prompts_of(site),
                    site.width,
                    init,
                    variant.grid_of(site),
                    variant.coarseness(site),
                )
                for name, site in self.sites.items()
            }
        )
        self.metadata: dict[str, str] = {}
        self.learning_scale = 1.0
        self.conversions = 0

    @classmethod
    def create(cls, base: str | Base, **variant: Any) -> Self:
        """Makes a new patch that changes nothing yet.

        Args:
            base: a base or its name.
            variant: fields of `Variant` that differ from the base's defaults.

        Raises:
            PatchError: an option or the base is unknown, or a value is not possible.

        >>> Patch.create("sd15").saved_parameters
        2785792
        """
        return cls(Variant.create(base, **variant))

    def forward(self, x: Tensor, site: str, e: Tensor, strength: float = 1.0) -> Tensor:
        """Adds the field of one site to the input of its block: the whole of eq. 3.

            x' = x + strength * resize(sum_k w_k(t) * p_k)        w(t) = softmax(G([e(t) ; i]))

        A modulating patch scales and shifts the channels of a module's output x instead:

            x' = x + strength * (x * s(t) + b(t))        [s ; b](t) = sum_k w_k(t) * [s_k ; b_k]

        Attached models call `Context.add` or `Context.modulate` instead. They compute the same for
        all sites of a forward call at once, cache it between calls, and find the image tokens among
        those of text.

        Args:
            x: input of the block, a feature map (B, D, H, W); or the output of a module, with the
                channels on the site's axis.
            site: name of the site; its depth i is known from the base.
            e: time embedding of the model, one for each item (B, E).
            strength: multiplies the field; 0 gives exactly x.

        Returns:
            x', of the shape of x.

        Source: Ham et al. 2025, eq. 3.
        """
        if self.modulates:
            shape = [len(x), *[1] * (x.dim() - 1)]
            shape[self.sites[site].axis] = -1
            mixed = self.modulations(self.gate_weights(e) * self.learning_scale)[site]
            scale, shift = (part.reshape(shape).to(x.dtype) for part in mixed.unbind(1))
            return x + strength * (x * scale + shift)
        pool = self.pool(site)
        if pool.grid is None:
            raise PatchError("expected a patch that adds its prompts, found one that prepends.")
        w = self.gate_weights(e)[:, list(self.sites).index(site)]  # (B, K*N)
        field = pool.mix(w * self.learning_scale)  # (B, N, D): sum_k w_k * p_k
        field = resize(field, pool.grid, (x.shape[2], x.shape[3]))  # (B, H, W, D)
        return x + strength * field.permute(0, 3, 1, 2).to(x.dtype)  # (B, D, H, W)

    def gate_weights(self, e: Tensor, temperature: float = 1.0) -> Tensor:
        """Computes the gate's weights, for heat maps and balancing losses.

        Args:
            e: time embedding (T, E), with the class embedding added for condition t+y.
            temperature: divides the logits; above 1 it makes the weights more equal.

        Returns:
            w (T, S, K*N), float32; the axis S has the patch's sites in order of depth.
        """
        weights: Tensor = self.gate(e, temperature)
        return weights

    def gate_logits(self, e: Tensor) -> Tensor:
        """Computes the gate's logits before the softmax, for the load loss.

        Returns:
            (T, S, K*N), or (T, S, K) where a whole grid has one logit.
        """
        return self.gate.logits(e)

    def modulations(self, weights: Tensor) -> dict[str, Tensor]:
        """Computes the scale and the shift (T, 2, D) of every site of a modulating patch.

        Args:
            weights: gate weights (T, S, 2 K), multiplied by the learning scale.
        """
        return self.modulation.split(self.mixed(weights), 2)

    def mixed(self, weights: Tensor) -> Tensor:
        """Computes the same in one tensor (T, 2, C), the sites side by side."""
        equal = self.variant.gate == "none" or self.variant.across_depth == "uniform"
        return self.modulation.mix(weights, equal)

    def pool(self, site: str) -> PromptPool:
        """Returns the prompt pool of a site, which a modulating patch does not have."""
        pool = self.pools[_key(site)]
        assert isinstance(pool, PromptPool)
        return pool

    @property
    def saved_parameters(self) -> int:
        """The number of values in the patch file."""
        return sum(p.numel() for p in self.parameters())

    def scale_for_learning(self) -> None:
        """Stores p / N instead of the prompts p, so that a weight is 1 on average.

        The softmax over N places divides every training step by N. With this scale one learning
        rate suits prompt tuning, soft gates and hard gates of any N. Neither what a patch can
        express nor its file changes: saving folds the scale back into the prompts.
        """
        count = self.variant.outputs
        if self.variant.gate == "none" or self.variant.gate_form == "residual":
            scale = 1.0
        elif self.variant.selection == "hard":
            scale = count / kept_prompts(count)
        else:
            scale = float(count)
        with torch.no_grad():
            for prompts in self.pools.parameters():
                prompts.mul_(self.learning_scale / scale)
        self.learning_scale = scale

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of the patch file by name; prompts are those of eq. 3, unscaled."""
        return {
            name: parameter.detach() * self._scale_of(name)
            for name, parameter in self.saved().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the values of `tensors()` into the parameters.

        Raises:
            PatchError: the names are not those of this patch.
        """
        own = self.saved()
        if set(own) != set(tensors):
            raise PatchError(
                f"expected the tensors {', '.join(sorted(own))}, found "
                f"{', '.join(sorted(tensors))}: give those of a patch of the same variant."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name] / self._scale_of(name))

    def saved(self) -> dict[str, Tensor]:
        """Returns the parameters, or views of them, by the names of tensors in the patch file."""
        if self.modulates:
            by_site = self.modulation.by_site()
        else:
            by_site = {name: self.pool(name).prompts for name in self.sites}
        prompts = {f"prompts.{name}": tensor for name, tensor in by_site.items()}
        return prompts | {f"gate.{name}": p for name, p in self.gate.named_parameters()}

    @property
    def modulation(self) -> ModulationPool:
        """The prompts of all sites of a modulating patch."""
        pool = self.pools["modulation"]
        assert isinstance(pool, ModulationPool)
        return pool

    def _scale_of(self, name: str) -> float:
        return self.learning_scale if name.startswith("prompts.") else 1.0

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.conversions += 1  # values may have changed although no tensor's version shows it
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            other = type(self)(self.variant)
        memo[id(self)] = other
        values = {name: value.detach().clone() for name, value in self.state_dict().items()}
        other.load_state_dict(values, assign=True)
        for mine, theirs in zip(other.parameters(), self.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        other.learning_scale, other.metadata = self.learning_scale, dict(self.metadata)
        return other.train(self.training)


def _key(site: str) -> str:
    """Returns the name of a site's pool: names of modules cannot contain dots."""
    return site.replace(".", "_")
