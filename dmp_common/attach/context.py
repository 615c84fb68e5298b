"""What one forward call of a model adds, as one immutable object."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dmp_common.attach.field import Field, FieldCache, Remembered
from dmp_common.attach.modulation import Modulation, Part, modulation_of
from dmp_common.bases.base import grid_cells
from dmp_common.bases.parts import Latent, Site
from dmp_common.compat import AUTOCAST
from dmp_common.errors import PatchError
from dmp_common.patch.prompts import PromptPool, resize

# Rows and columns of a grid, its start among the tokens, and its length (None for all of them).
TokenPlace = tuple[tuple[int, int], int | tuple[int, ...], int | None]


@dataclass(frozen=True, eq=False)
class Context:
    """What one forward call adds, and at which sites. `Runtime.prepare` makes it.

    Args:
        weights: gate weights of the distinct timesteps (T, S, K*N), float32.
        columns: for the name of each site that acts, its index in S.
        sites, pools: the sites and their prompts, by name.
        tokens: whether sites are sequences of tokens (True) or feature maps (False).
        shared: whether text and image tokens may share a sequence.
        table: scale and shift (T, 2, D) of each site; None for patches that do not modulate.
        strength: one strength for all items, or one for each (B,).
        site_strengths: factors of the strength at single sites, by name; other sites have 1.
        rows: for each batch item its index in T (B,); None where T is 1 or B.
        latent: size of the latent and place of its tokens; None where sites are feature maps.
        remembered, cache, key: where fields are cached; None with gradients, in compiled code and
            under function transforms.
        in_place: see `Field.added`.
    """

    weights: Tensor
    columns: Mapping[str, int]
    sites: Mapping[str, Site]
    pools: Mapping[str, PromptPool]
    tokens: bool
    shared: bool
    strength: float | Tensor
    site_strengths: Mapping[str, float | Tensor]
    rows: Tensor | None
    latent: Latent | None
    remembered: Remembered | None = None
    cache: FieldCache | None = None
    key: Hashable = None
    in_place: bool = True
    table: Mapping[str, Tensor] | None = None

    def add(self, site: str, x: Tensor) -> Tensor:
        """Returns the block's input with the site's field added, x + strength * field (eq. 3).

        The result is a new tensor with the memory layout of x: hosts keep x as a skip connection,
        and another layout would choose other kernels and change results by rounding.

        Args:
            site: name of the site.
            x: (B, C, H, W) with the block's own stream in the first D channels, or (B, L, D)
                with the image tokens among text where the base has them so.

        Returns:
            A tensor of the same shape; x itself for sites that do not act, or at strength 0.

        Raises:
            PatchError: x cannot be the input of this site.
        """
        if site not in self.columns:
            return x
        strength = self.strength
        if site in self.site_strengths:
            strength = strength * self.site_strengths[site]
        if self.remembered is None:
            return self._field(site, x).added(x, strength, self.rows, self.in_place)
        place = site, x.shape, x.dtype, x.device, x.is_contiguous()
        field = self.remembered.fields.get(place)
        if field is None:
            # A field that was made in inference mode could not be used in a call with gradients.
            with torch.inference_mode(False), torch.no_grad():
                field = self._field(site, x)
            assert self.cache is not None
            alike = len(self.columns) if self.tokens else 1  # feature maps differ in size
            self.cache.add(self.key, self.remembered, place, field, alike)
        return field.added(x, strength, self.rows)

    def modulate(self, parts: tuple[Part, ...], x: Tensor) -> Tensor:
        """Returns a module's output with its channels scaled and shifted, x (1 + s) + b.

        Without gradients x itself is changed, which nothing else can hold yet: it has just been
        computed. A new tensor would cost as much as the change.

        Args:
            parts: the sites whose channels the output holds.
            x: the output (B, ..., C), or (B, C, H, W) of a convolution.

        Returns:
            The changed output; x unchanged if none of the sites acts, or at strength 0.

        Raises:
            PatchError: x cannot be the output of these sites, or the patch does not modulate.
        """
        columns, strengths = self.columns, self.site_strengths
        if len(parts) > 1:
            parts = tuple([part for part in parts if part.site in columns])
        if not parts or parts[0].site not in columns:
            return x
        remembered, rows = self.remembered, self.rows
        if isinstance(self.strength, Tensor) or strengths:
            return self._modulation(parts, x, rows).applied(x, None, False, self.latent)
        if remembered is None:
            return self._modulation(parts, x, None).applied(x, rows, False, self.latent)
        place = parts, x.dtype, x.device, x.shape, self.strength
        found = remembered.fields.get(place)
        if found is None:
            # One that was made in inference mode could not be used in a call with gradients.
            with torch.inference_mode(False), torch.no_grad():
                found = self._whole(parts, x, remembered) or self._modulation(parts, x, None)
            assert self.cache is not None
            self.cache.add(self.key, remembered, place, found)
        fresh = not torch.is_grad_enabled() and 0 not in x.stride()
        return found.applied(x, rows, fresh, self.latent)

    def prepend(self, site: str, x: Tensor) -> Tensor:
        """Returns image tokens x (B, L, D) with the site's weighted prompts in front, (B, N+L, D).

        After the block, `strip` removes them again.
        """
        if site not in self.columns:
            return x
        prompts = self.pools[site].mix(self.weights[:, self.columns[site]])  # (T, N, D)
        if self.rows is not None:
            prompts = prompts[self.rows]
        prompts = prompts.to(x.dtype).expand(x.shape[0], -1, -1)
        strength = self.strength
        if site in self.site_strengths:
            strength = strength * self.site_strengths[site]
        if isinstance(strength, Tensor):
            strength = strength.to(x.device, x.dtype).reshape(-1, 1, 1)
        return torch.cat([prompts * strength, x], dim=1)

    def strip(self, site: str, x: Tensor) -> Tensor:
        """Returns image tokens without the prompts that `prepend` put in front."""
        return x if site not in self.columns else x[:, self.pools[site].prompts.shape[1] :]

    def _whole(
        self, parts: tuple[Part, ...], x: Tensor, remembered: Remembered
    ) -> Modulation | None:
        """Returns the modulation of an output that is one site, None for other outputs."""
        axis = self.sites[parts[0].site].axis
        if len(parts) > 1 or x.dim() < 2 or self.sites[parts[0].site].width != x.shape[axis]:
            return None
        assert not isinstance(self.strength, Tensor)
        return Modulation.along(*remembered.ready(x, self.strength)[parts[0].site], x, axis)

    def _modulation(self, parts: tuple[Part, ...], x: Tensor, rows: Tensor | None) -> Modulation:
        """Builds the modulation of the sites in a module's output like x, see `modulation_of`."""
        if self.table is None:
            raise PatchError(
                "expected a patch of mix modulate for the outputs of modules, found one that adds "
                "to inputs: call `add`."
            )
        factors: dict[str, float | Tensor] = {}
        for part in parts:
            factors[part.site] = self.strength
            if part.site in self.site_strengths:
                factors[part.site] = self.strength * self.site_strengths[part.site]
        spec, axis = self.sites[parts[0].site], self.sites[parts[0].site].axis
        if x.dim() < 2 or x.shape[axis] < spec.width:
            raise _shape_error(spec, x, f"with {spec.width} channels on axis {axis}")
        return modulation_of(self.table, parts, factors, rows, x, axis)

    def _field(self, site: str, x: Tensor) -> Field:
        """Builds the field of a site for inputs like x."""
        if self.table is not None:
            raise PatchError(
                "expected a patch that adds to inputs, found one of mix modulate, which changes "
                "the outputs of modules: call `modulate`."
            )
        spec, pool = self.sites[site], self.pools[site]
        if pool.grid is None:
            raise PatchError(
                "this patch prepends its prompts, which only the trainer can do on DiT bases: "
                "use a patch that adds them."
            )
        weights = self.weights[:, self.columns[site]]  # (T, K*N)
        if self.tokens:
            size, start, length = self._place(spec, x)
            frames = self.latent.frames if self.latent else 1
            literal = length is None and size == pool.grid and len(pool.prompts) == 1
            if literal and x.dtype == torch.float32:  # half precision would round both factors
                return Field(pool.prompts[0].float(), weights[:, :, None], frames=frames)
        else:
            if x.dim() != 4 or x.shape[1] < spec.width:
                raise _shape_error(spec, x, f"(B, {spec.width} or more, H, W)")
            size, start, frames = (x.shape[2], x.shape[3]), 0, 1
            length = None if x.shape[1] == spec.width else spec.width
        if x.device.type in AUTOCAST:
            with torch.autocast(x.device.type, enabled=False):
                grid = resize(pool.mix(weights), pool.grid, size)  # (T, H, W, D)
        else:
            grid = resize(pool.mix(weights), pool.grid, size)
        values = grid.flatten(1, 2) if self.tokens else grid.permute(0, 3, 1, 2)
        if self.remembered is None or not x.is_contiguous():
            return Field(values.to(x.dtype), None, start, length, frames)
        # One copy changes type and layout. It is worth its cost, as the field is used again.
        values = values.to(x.dtype, memory_format=torch.contiguous_format)
        return Field(values.contiguous(), None, start, length, frames)

    def _place(self, spec: Site, x: Tensor) -> TokenPlace:
        """Returns the live grid's rows and columns, and its start and length along axis 1 of x."""
        if self.latent is None:
            raise PatchError("token sites need the size of the latent: pass `latent_hw`.")
        height, width = self.latent.size
        if x.dim() == 3 and x.shape[2] == spec.width:
            place = place_of(self.latent, spec.stride, self.shared, x.shape[1])
            if place is not None:
                return place
        raise _shape_error(spec, x, f"(B, tokens of a {height} x {width} latent, {spec.width})")


def place_of(latent: Latent, stride: int, shared: bool, tokens: int) -> TokenPlace | None:
    """Returns where the image tokens of a latent are in a sequence, None where they are not in it.

    Of a video it is the place of each frame in its own part of the sequence.

    Args:
        latent: the latents of the call.
        stride: latent pixels per token, in each direction.
        shared: whether text and image tokens may share a sequence.
        tokens: the length of the sequence.
    """
    (height, width), image, text = latent.size, latent.image_tokens, latent.text_tokens
    if tokens % latent.frames:
        return None
    tokens, image = tokens // latent.frames, image and image // latent.frames
    # Hosts differ in whether an incomplete token at the edge is dropped or padded.
    dropped, padded = (
        (grid_cells(height + pad, stride), grid_cells(width + pad, stride))
        for pad in (0, stride - 1)
    )
    own = image or tokens
    # Where text shares the sequence, diffusers takes even latents only, and ComfyUI pads.
    size = padded if shared or own == padded[0] * padded[1] else dropped
    length = size[0] * size[1]
    there = image or length
    longest = max(text) if isinstance(text, tuple) else text or 0
    if length > there or not (there + longest == tokens or (shared and there + longest < tokens)):
        return None
    if length == tokens:
        return size, 0, None
    return size, tokens - there if text is None else text, length


def _shape_error(site: Site, x: Tensor, expected: str) -> PatchError:
    return PatchError(
        f"site {site.name} expected an input of shape {expected}, found {tuple(x.shape)}: the "
        "patch was made for another base than this model."
    )
