"""The settings of an attached patch, and its context: one immutable object per forward call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmp_common.attach.field import Field
from dmp_common.bases.base import Site, grid_cells
from dmp_common.bases.schedule import ALWAYS, EVERYWHERE, Schedule, inside
from dmp_common.compat import is_compiling, without_autocast
from dmp_common.errors import PatchError
from dmp_common.patch.prompts import resize

if TYPE_CHECKING:
    from dmp_common.attach.cache import FieldCache
    from dmp_common.patch.prompts import PromptPool

FieldKey = tuple[object, ...]


@dataclass(frozen=True)
class Settings:
    """How a patch is used; nothing here changes the patch.

    Args:
        strength: multiplies the added field; 0 is exactly the base.
        schedule: where along the timesteps, and how strongly.
        temperature: of the gate; above 1 evens its weights out.
        sites: names of the sites that act, None for all of the patch's.
    """

    strength: float = 1.0
    schedule: Schedule = ALWAYS
    temperature: float = 1.0
    sites: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not -1e4 < self.strength < 1e4:
            raise PatchError(
                f"expected a finite strength, found {self.strength}: use about 0 to 2."
            )
        if not 1e-3 <= self.temperature <= 1e3:
            raise PatchError(
                f"expected a gate temperature from 0.001 to 1000, found {self.temperature}: "
                "use about 0.5 to 2."
            )

    def needs_timesteps(self, within: tuple[int, int] = EVERYWHERE) -> bool:
        """Whether the strength of a patch that acts there differs between timesteps."""
        return not self.schedule.always or within != EVERYWHERE

    def strengths(
        self, timesteps: Tensor | None, within: tuple[int, int] = EVERYWHERE
    ) -> float | Tensor:
        """Strength of each batch item, one number where it is the same for all.

        Args:
            timesteps: (B,) on the scale 0..1000; needed where the strength is not constant.
            within: where the patch acts, see `Variant.timesteps`.
        """
        if self.strength == 0.0 or not self.needs_timesteps(within):
            return self.strength
        if timesteps is None:
            raise PatchError(
                "a schedule, or a patch of a part of the timesteps, needs the timesteps of the "
                "call: pass `timesteps` to prepare()."
            )
        strengths = self.schedule.factors(timesteps) * self.strength  # (B,)
        if within != EVERYWHERE:
            strengths = torch.where(inside(timesteps, within), strengths, 0.0)
        if is_compiling():
            return strengths
        values = strengths.tolist()
        return float(values[0]) if len(set(values)) == 1 else strengths


@dataclass(frozen=True, eq=False)
class Context:
    """What one forward call adds, and where. Made by `Patch.prepare`.

    Args:
        weights: gate weights of the distinct timesteps (T, S, K*N), float32.
        columns: site name to its index in S; sites that do not act are missing.
        sites, pools: the sites as data and their prompts.
        grid: rows and columns of the prompts; None where they are prepended.
        strength: of all items, or of each (B,).
        rows: for each batch item its index in T (B,); None where T is 1 or B.
        latent_hw: height and width of the latent; needed where the stream is tokens.
        image_tokens: image tokens of the model's stream, where there are more than the latent's
            own (Flux Kontext appends reference pictures after them).
        text_tokens: text before the image tokens, of all items or of each; None where the image
            tokens come last.
        shared: whether text and image tokens may share a sequence.
        key, cache: where finished fields are kept; None with gradients and in compiled code.
    """

    weights: Tensor
    columns: Mapping[str, int]
    sites: Mapping[str, Site]
    pools: Callable[[str], PromptPool]
    tokens: bool
    grid: tuple[int, int] | None
    strength: float | Tensor
    rows: Tensor | None
    latent_hw: tuple[int, int] | None
    image_tokens: int | None
    text_tokens: int | tuple[int, ...] | None
    shared: bool
    key: FieldKey | None
    cache: FieldCache | None

    def add(self, site: str, x: Tensor) -> Tensor:
        """The block's input with the site's field added, x + strength * field (eq. 3).

        Out of place and in the memory layout of x: hosts keep x as a skip connection, and another
        layout would choose other kernels and change results by rounding.

        Args:
            site: name of the site.
            x: (B, C, H, W) with the block's own stream in the first D channels, or (B, L, D)
                with the image tokens among text where the base has them so.

        Returns:
            The same shape; x itself for sites that do not act, or at strength 0.

        Raises:
            PatchError: x cannot be the input of this site.
        """
        if site not in self.columns:
            return x
        if self.cache is None:
            return self._field(site, x).added(x, self.strength, self.rows)
        key = (self.key, site, x.shape, x.dtype, x.device, x.is_contiguous())
        field: Field | None = self.cache.get(key)
        if field is None:
            # Outside inference mode, or the field could not serve a call that needs gradients.
            with torch.inference_mode(False), torch.no_grad():
                field = self._field(site, x)
            self.cache.put(key, field)
        return field.added(x, self.strength, self.rows)

    def prepend(self, site: str, x: Tensor) -> Tensor:
        """Image tokens x (B, L, D) with the site's weighted prompts in front, (B, N + L, D).

        After the block, `strip` takes them away again.
        """
        if site not in self.columns:
            return x
        prompts = self.pools(site).mix(self.weights[:, self.columns[site]])  # (T, N, D)
        if self.rows is not None:
            prompts = prompts[self.rows]
        prompts = prompts.to(x.dtype).expand(x.shape[0], -1, -1)
        strength = self.strength
        if isinstance(strength, Tensor):
            strength = strength.to(x.device, x.dtype).reshape(-1, 1, 1)
        return torch.cat([prompts * strength, x], dim=1)

    def strip(self, site: str, x: Tensor) -> Tensor:
        """Image tokens without the prompts that `prepend` put in front."""
        return x if site not in self.columns else x[:, self.pools(site).prompts.shape[1] :]

    def _field(self, site: str, x: Tensor) -> Field:
        """The field of a site for inputs like x."""
        if self.grid is None:
            raise PatchError(
                "this patch prepends its prompts, which only the trainer can do on DiT bases: "
                "use a patch that adds them."
            )
        spec, pool = self.sites[site], self.pools(site)
        size = self._grid_size(spec, x)
        weights = self.weights[:, self.columns[site]]  # (T, K*N)
        if self.tokens:
            length = size[0] * size[1]
            start = self.text_tokens
            if start is None:
                start = x.shape[1] - (self.image_tokens or length)
            part = (0, None) if length == x.shape[1] else (start, length)
            literal = part[1] is None and size == self.grid and len(pool.prompts) == 1
            if literal and x.dtype == torch.float32:  # half precision would round both factors
                return Field(pool.prompts[0].float(), weights[:, :, None])
        else:
            part = (0, None) if x.shape[1] == spec.width else (0, spec.width)
        with without_autocast(x.device.type):
            grid = resize(pool.mix(weights), self.grid, size).to(x.dtype)  # (T, H, W, D)
        values = grid.flatten(1, 2) if self.tokens else grid.permute(0, 3, 1, 2)
        if self.cache is not None and x.is_contiguous():
            values = values.contiguous()  # worth it when it is used again
        return Field(values, None, *part)

    def _grid_size(self, spec: Site, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the live grid at a site."""
        if not self.tokens:
            if x.dim() != 4 or x.shape[1] < spec.width:
                raise _shape_error(spec, x, f"(B, {spec.width} or more, H, W)")
            return x.shape[2], x.shape[3]
        if self.latent_hw is None:
            raise PatchError("token sites need the size of the latent: pass `latent_hw`.")
        height, width = self.latent_hw
        if x.dim() == 3 and x.shape[2] == spec.width:
            # Hosts differ in whether an incomplete token at the edge is dropped or padded.
            dropped, padded = (
                (grid_cells(height + pad, spec.stride), grid_cells(width + pad, spec.stride))
                for pad in (0, spec.stride - 1)
            )
            own = self.image_tokens or x.shape[1]
            # A sequence shared with text: diffusers packs even latents only, ComfyUI pads.
            size = padded if self.shared or own == padded[0] * padded[1] else dropped
            tokens = self.image_tokens or size[0] * size[1]
            text = self.text_tokens or 0
            text = text if isinstance(text, int) else max(text)
            fits = tokens + text == x.shape[1] or (self.shared and tokens + text < x.shape[1])
            if fits and size[0] * size[1] <= tokens:
                return size
        raise _shape_error(spec, x, f"(B, tokens of a {height} x {width} latent, {spec.width})")


def _shape_error(site: Site, x: Tensor, expected: str) -> PatchError:
    return PatchError(
        f"site {site.name} expected an input of shape {expected}, found {tuple(x.shape)}: the "
        "patch was made for another base than this model."
    )
