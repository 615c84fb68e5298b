"""What a modulating patch does to the outputs of a model's modules, x' = x (1 + s) + b."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dmp_common.bases.parts import Form, Latent, Naming, Site
from dmp_common.errors import PatchError

HALVES = (torch.float16, torch.bfloat16)


class Part(NamedTuple):
    """A site in the output of a module, which may hold the channels of several sites.

    Args:
        site: the name of the site.
        start: the first of its channels in the output.
        form: how the output holds its tokens, see `Site`.
    """

    site: str
    start: int
    form: Form | None = None


def parts_of(sites: Iterable[Site], naming: Naming) -> dict[str, tuple[Part, ...]]:
    """Returns the sites in the output of each module, by the module's path in a naming."""
    parts: dict[str, list[Part]] = {}
    for site in sites:
        part = Part(site.name, site.starts.get(naming, 0), site.forms.get(naming))
        parts.setdefault(site.paths[naming], []).append(part)
    return {path: tuple(sorted(own, key=lambda part: part.start)) for path, own in parts.items()}


class Modulation(NamedTuple):
    """Scale and shift of a module's output, on its device; see `ready_for` for their type.

    Args:
        scale, shift: (T, 1, ..., C, ..., 1), the channels on the axis of the output.
        whole: whether `scale` is 1 + s, in float32. In half precision 1 + s would lose most of s,
            so that `scale` is s there.
    """

    scale: Tensor
    shift: Tensor
    whole: bool

    @classmethod
    def along(cls, scale: Tensor, shift: Tensor, x: Tensor, axis: int) -> Modulation:
        """Shapes scale and shift (T, C), as `ready_for` makes them, for the axis of an output."""
        shape = [len(scale), *[1] * (x.dim() - 1)]
        shape[axis] = -1
        return cls(scale.reshape(shape), shift.reshape(shape), scale.dtype == torch.float32)

    @property
    def nbytes(self) -> int:
        """The number of bytes that this keeps in memory."""
        return 2 * self.scale.numel() * self.scale.element_size()

    def applied(
        self, x: Tensor, rows: Tensor | None, in_place: bool, latent: Latent | None = None
    ) -> Tensor:
        """Returns x (1 + s) + b.

        Args:
            x: the output (B, ...).
            rows: for each item its index in T (B,), or for each frame of each item (B*F,); None
                where T divides B.
            in_place: whether x itself may be changed.
            latent: the latents of the call. Where the frames of a video have timesteps of their
                own, outputs without frames (text) are changed by the last frame's.

        Raises:
            PatchError: the number of items is not a multiple of the number of timesteps.
        """
        scale, shift = self.scale, self.shift
        if rows is not None:
            scale, shift = scale[rows], shift[rows]
        if latent is not None and len(scale) == latent.batch * latent.frames > latent.batch:
            shape = (latent.batch, latent.frames, *scale.shape[1:])
            scale, shift = scale.reshape(shape), shift.reshape(shape)
            if x.dim() == 3 and x.shape[1] in (latent.frames, latent.image_tokens):
                video = x.view(len(x), latent.frames, -1, x.shape[2])
                own = self._replace(scale=scale, shift=shift)
                return own.applied(video, None, in_place).flatten(1, 2)
            scale, shift = scale[:, -1], shift[:, -1]
        if scale.shape[0] not in (1, x.shape[0]):
            if x.shape[0] % scale.shape[0]:
                raise PatchError(
                    f"expected a batch of {scale.shape[0]} items, as many as timesteps, found "
                    f"{x.shape[0]}: give one timestep for each item."
                )
            repeats = x.shape[0] // scale.shape[0]
            scale = scale.repeat_interleave(repeats, dim=0)
            shift = shift.repeat_interleave(repeats, dim=0)
        if self.whole:
            if in_place:
                return torch.addcmul(shift, x, scale, out=x)
            return torch.addcmul(shift, x, scale).to(x.dtype)
        change = torch.addcmul(shift, x, scale)
        return x.add_(change) if in_place else x + change


def modulation_of(
    table: Mapping[str, Tensor],
    parts: tuple[Part, ...],
    factors: Mapping[str, float | Tensor],
    rows: Tensor | None,
    x: Tensor,
    axis: int,
) -> Modulation:
    """Builds the modulation of a module's output from those of the sites in it.

    Args:
        table: scale and shift (T, 2, D) of each site, float32.
        parts: the sites in the output that act.
        factors: the strength at each of these sites: a number, or one for each item (B,).
        rows: for each item its index in T (B,), given where items differ in strength: the
            modulation then has a row for each item.
        x: the output.
        axis: the axis of its channels.
    """
    pieces = {part: _scaled(table[part.site], factors[part.site], rows) for part in parts}
    mixed = next(iter(pieces.values()))  # (T, 2, D)
    channels = x.shape[axis]
    if len(parts) > 1 or mixed.shape[2] != channels:
        steps = max(piece.shape[0] for piece in pieces.values())
        columns, end = [], 0
        for part in parts:
            piece = pieces[part]
            columns += [mixed.new_zeros(steps, 2, part.start - end), piece.expand(steps, -1, -1)]
            end = part.start + piece.shape[2]
        if end > channels:
            raise PatchError(
                f"site {parts[-1].site} expected an output of {end} channels or more, found "
                f"{tuple(x.shape)}: the patch was made for another base than this model."
            )
        columns.append(mixed.new_zeros(steps, 2, channels - end))
        mixed = torch.cat(columns, dim=2)
    return Modulation.along(*ready_for(x, mixed), x, axis)


def ready_for(x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and shift (T, C) for an output, on its device, see `Modulation`.

    They are in the output's type, or in float32 for an output in half precision on a CUDA device: a
    kernel there reads one type and computes in another, so that x (1 + s) + b is one kernel, where
    half precision alone takes two. With gradients a result in float32 would cost memory.

    Args:
        x: the output.
        mixed: scale and shift (T, 2, C), float32.
    """
    scale, shift = mixed.to(x.device).unbind(1)
    if x.dtype == torch.float32 or (
        x.is_cuda and x.dtype in HALVES and not torch.is_grad_enabled()
    ):
        return scale + 1.0, shift
    return scale.to(x.dtype), shift.to(x.dtype)


def _scaled(mixed: Tensor, strength: float | Tensor, rows: Tensor | None) -> Tensor:
    """Returns a site's scale and shift (T, 2, D), or (B, 2, D) where items differ in strength."""
    if rows is not None:
        mixed = mixed[rows]
    if not isinstance(strength, Tensor):
        return mixed if strength == 1.0 else mixed * strength
    return mixed * strength.to(mixed.device, mixed.dtype).reshape(-1, 1, 1)
