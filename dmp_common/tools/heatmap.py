"""Heat maps of a gate: its weights by timestep and prompt, and as maps over the picture.

They are drawn with numpy and Pillow, which every host has; a plotting library may be missing there.
Hosts import this module only when a user asks for a heat map.

Source: Ham et al., AAAI 2025, Figure 4.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dmp_common.bases.schedule import EVERYWHERE, inside
from dmp_common.errors import PatchError, printable
from dmp_common.patch.patch import Patch
from dmp_common.patch.serialize import write_atomically
from dmp_common.tools import drawing
from dmp_common.tools.drawing import ColourScale, Layout, Values
from dmp_common.tools.timefile import even_timesteps, time_embedding_of
from dmp_common.tools.written import sites_named

__all__ = [
    "choose_sites",
    "even_timesteps",
    "gate_heatmap",
    "save_heatmap",
    "time_embedding_of",
]

Scale = Literal["per-panel", "shared"]
# Colours are logarithmic where a weight exceeds _STRONG times the mean; they then begin at _WEAK.
_STRONG, _WEAK = 10.0, 0.1
_NO_MAPS = " The weights are the same at every place."
_FLAT = 1e-5  # A smaller spread, relative to the mean, comes from rounding.


def choose_sites(patch: Patch, choice: str | Sequence[str] | None = None) -> list[str]:
    """Finds the sites of a patch that a user has chosen, in order of depth.

    Args:
        patch: the patch.
        choice: names in a list, or in a text with commas between them, see `sites_named`. None
            means first, middle and last.

    Raises:
        PatchError: a name is none of these, or there is no name at all.
    """
    own = list(patch.sites)
    asked = choice.split(",") if isinstance(choice, str) else choice
    chosen: set[str] = set()
    for word in ("first", "middle", "last") if asked is None else asked:
        named = sites_named(patch, word)
        if not named:
            raise PatchError(
                f"expected sites of this patch ({', '.join(own)}), all, first, middle, last or a "
                f"named set, found {word.strip()!r}: choose among these."
            )
        chosen.update(named)
    if not chosen:
        raise PatchError("expected one or more sites to draw, found none: name some, or say all.")
    return [name for name in own if name in chosen]


def save_heatmap(
    path: str | os.PathLike[str],
    patch: Patch,
    timesteps: Tensor,
    e: Tensor,
    *,
    sites: str | Sequence[str] | None = None,
    scale: Scale = "per-panel",
    title: str | None = None,
    log: bool | None = None,
) -> Path:
    """Draws a heat map (see `gate_heatmap`) and writes it as a PNG file.

    An existing file is replaced in one step, so that it is never half-written.

    Raises:
        PatchError: the file name does not end in `.png`, or the heat map cannot be drawn.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise PatchError(f"expected a file name ending in .png, found {path}: rename it.")
    image = gate_heatmap(patch, timesteps, e, sites=sites, scale=scale, title=title, log=log)
    data = io.BytesIO()
    image.save(data, "PNG")
    write_atomically(path, data.getvalue())
    return path


def gate_heatmap(
    patch: Patch,
    timesteps: Tensor,
    e: Tensor,
    *,
    sites: str | Sequence[str] | None = None,
    scale: Scale = "per-panel",
    title: str | None = None,
    log: bool | None = None,
    maps: int = 5,
) -> Image.Image:
    """Draws the weights of a gate in rows, one for each site: by timestep and prompt, and as maps.

    Soft weights are multiplied by the number of prompts, so that their mean is 1. With K grids the
    panel on the left shows all K*N prompts, and a map shows the sum over the K grids, times N.

    Args:
        patch: the patch.
        timesteps: (T,), on the scale 0..1000, in any order.
        e: their time embedding (T, E), see `time_embedding_of`.
        sites: the sites to draw, see `choose_sites`.
        scale: "per-panel" gives each row a colour scale of its own, "shared" one scale to all.
        title: replaces the usual title.
        log: whether colours are logarithmic; None uses logarithmic ones where a weight exceeds ten
            times the mean.
        maps: how many timesteps are drawn as maps; they are chosen at even distances. There are no
            maps where the weights are the same at every place.

    Raises:
        PatchError: a site or the scale is unknown, or the shapes do not fit each other.

    Source: Ham et al., AAAI 2025, Figure 4.
    """
    if scale not in get_args(Scale):
        raise PatchError(
            f"expected scale {' or '.join(get_args(Scale))}, found {scale!r}: choose one."
        )
    steps, values = gate_values(patch, timesteps, e)
    names = choose_sites(patch, sites)
    columns = [list(patch.sites).index(name) for name in names]
    placed = _differs_by_place(patch, values[:, columns])
    layout = Layout.of(patch.variant.grid, len(names), len(steps), maps if placed else 0)
    heading = printable(title or f"Gate of a patch for {patch.base.name}", 1000)
    notes = _subtitle(patch, placed)
    width = max(drawing.text_width(heading, drawing.TITLE), drawing.text_width(notes))
    size = max(layout.size[0], drawing.LEFT + width + drawing.GAP), layout.size[1]
    image = Image.new("RGB", size, (255, 255, 255))
    drawing.write(image, heading, (drawing.LEFT, 22), drawing.TITLE)
    drawing.write(image, notes, (drawing.LEFT, 76), ink=drawing.GREY)
    for row, column in enumerate(columns):
        shown = values[:, column if scale == "per-panel" else columns]
        colours = _colour_scale(shown, _is_soft(patch), log)
        _draw_row(image, layout, row, patch, names[row], steps, values[:, column], colours)
    drawing.write(
        image,
        "timestep, from noise to picture",
        (drawing.LEFT + drawing.WIDTH // 2, layout.size[1] - 52),
        align="centre",
    )
    return image


def gate_values(patch: Patch, timesteps: Tensor, e: Tensor) -> tuple[Values, Values]:
    """Computes the values that a heat map shows.

    Soft weights are multiplied by their number, which is K*N, or K where a whole grid has one
    weight; so their mean is 1. At timesteps where the patch does not act all weights are 0.

    Returns:
        The timesteps (T,) in the order from noise to picture, and the weights (T, S, K*N), or
        (T, S, K) of pairs of a scale and a shift.

    Raises:
        PatchError: the shapes do not fit each other, or a weight is not finite.
    """
    timesteps = torch.as_tensor(timesteps).detach().float().cpu()
    size = patch.base.embedding
    if timesteps.dim() != 1 or not len(timesteps) or e.shape != (len(timesteps), size):
        raise PatchError(
            f"expected timesteps (T,) and their embedding (T, {size}), found "
            f"{tuple(timesteps.shape)} and {tuple(e.shape)}: give the base's own time embedding."
        )
    order = timesteps.argsort(descending=True)
    with torch.no_grad():
        weights = patch.gate_weights(e.detach().to(next(patch.parameters()).device))
    if not weights.isfinite().all():
        raise PatchError("expected finite gate weights, found NaN: is the time embedding damaged?")
    if patch.modulates:
        weights = weights[:, :, ::2]  # scale and shift of a pair have one weight
    weights = weights.float().cpu()
    if _is_soft(patch):
        # Of a site with a coarser grid each weight stands in the cells that its prompt covers.
        cells = [patch.variant.coarseness(site) ** 2 for site in patch.sites.values()]
        weights = weights * patch.variant.outputs / torch.tensor(cells)[None, :, None]
    weights = (weights * inside(timesteps, patch.variant.timesteps)[:, None, None])[order]
    return timesteps[order].numpy(), weights.numpy()


def _draw_row(
    image: Image.Image,
    layout: Layout,
    row: int,
    patch: Patch,
    name: str,
    steps: Values,
    values: Values,
    scale: ColourScale,
) -> None:
    """Draws one site: its weights (T, K*N) by timestep and prompt, its maps and its colour bar."""
    site, box = patch.sites[name], layout.weights(row)
    heading = f"{name}  (depth {patch.variant.depths[name]}, {site.width} channels)"
    drawing.write(image, heading, (box[0], box[1] - 56), drawing.TEXT + 2)
    drawing.panel(image, box, values.T, scale)
    count, pixel = values.shape[1], drawing.HEIGHT / values.shape[1]
    few = 1 < patch.variant.grids < 9
    every = count // patch.variant.grids if few else max(count // 4, 1)
    marks = [((index + 0.5) * pixel, str(index)) for index in range(0, count, every)]
    drawing.ticks_beside(image, box, marks, "left")
    drawing.write(
        image, "pair" if patch.modulates else "prompt", (12, (box[1] + box[3]) // 2), upwards=True
    )
    centres = (np.arange(len(steps)) + 0.5) * (drawing.WIDTH / len(steps))
    last, first = float(steps[-1]), float(steps[0])
    times = drawing.ticks(last, first + (first - last) / 500, 6)  # Leaves room for a tick at 1000.
    marks = [(float(np.interp(t, steps[::-1], centres[::-1])), text) for t, text in times]
    drawing.ticks_below(image, box, marks)
    for index, column in enumerate(layout.columns):
        grids = values[column].reshape(-1, *(patch.variant.grid or ()))  # (K, rows, columns)
        at = layout.map(row, index)
        drawing.panel(image, at, grids.mean(0), scale)
        text = f"t = {steps[column]:.0f}"
        drawing.write(image, text, ((at[0] + at[2]) // 2, box[1] - 42), align="centre")
        _point_at(image, box[0] + round(centres[column]), box[1])
    drawing.colour_bar(image, layout.bar(row), scale, _label(patch, scale))


def _point_at(image: Image.Image, x: int, y: int) -> None:
    """Draws a small triangle above a panel, which marks the timestep of a map."""
    ImageDraw.Draw(image).polygon([(x, y - 5), (x - 6, y - 15), (x + 6, y - 15)], fill=drawing.GREY)


def _differs_by_place(patch: Patch, values: Values) -> bool:
    """Returns whether any grid has different weights (T, S, K*N) at different places.

    Where all places of a grid have one weight, a map would be a square of one colour.
    """
    if patch.variant.grid is None:
        return False
    grids = values.reshape(*values.shape[:2], -1, patch.variant.prompts)
    spread = grids.max(-1) - grids.min(-1)
    return bool((spread > _FLAT * np.abs(grids).mean(-1)).any())


def _subtitle(patch: Patch, placed: bool) -> str:
    """Returns the line below the title, which says what a reader must know about the gate.

    Args:
        patch: the patch.
        placed: whether the gate differs by place, so that there are maps.
    """
    variant = patch.variant
    kind = f"{variant.gate.capitalize()} gate"
    if variant.gate == "none":
        kind = "No gate: every weight is 1 at every timestep"
    elif variant.selection == "hard":
        kind += ", hard: the top 75 % have weight 1"
    if variant.gate_form == "residual":
        kind = f"Residual {variant.gate} gate"
    if variant.timesteps != EVERYWHERE:
        kind += ", off but at timesteps {} to {}".format(*variant.timesteps)
    if variant.mix == "modulate":
        return f"{kind}. {variant.grids} pairs of a scale and a shift, each with one weight."
    if variant.grid is None:
        return f"{kind}. {variant.count} prompts in front of the image tokens."
    place = "{} x {} prompts".format(*variant.grid)
    if variant.grid_scope == "site":
        place += ", fewer where blocks are coarser"
    if variant.gate_unit == "grid":
        return f"{kind}. {variant.grids} grids of {place}, each with one weight."
    if variant.grids > 1:
        how = f"summed, x {variant.prompts}" if _is_soft(patch) else "averaged"
        maps = f" Right: as maps, the grids {how}." if placed else _NO_MAPS
        return f"{kind}. {variant.grids} grids of {place}.{maps}"
    maps = " Right: the same weights as maps over the picture." if placed else _NO_MAPS
    return f"{kind}. {place}.{maps}"


def _colour_scale(values: Values, soft: bool, log: bool | None) -> ColourScale:
    """Makes the colour scale of some values, with one colour if they differ by rounding only."""
    low, high, mean = float(values.min()), float(values.max()), float(values.mean())
    if high - low <= _FLAT * abs(mean):
        return ColourScale(round(mean, 4), round(mean, 4))
    if (soft and high > _STRONG) if log is None else log:
        return ColourScale(max(low, _WEAK), high, log=True, clipped=low < _WEAK)
    return ColourScale(low, high)


def _label(patch: Patch, scale: ColourScale) -> str:
    number = str(patch.variant.outputs) if patch.variant.grid_scope == "patch" else "number"
    label = f"weight x {number} (mean 1)" if _is_soft(patch) else "weight"
    if scale.low == scale.high:
        return "constant " + label
    return label + ", log" if scale.log else label


def _is_soft(patch: Patch) -> bool:
    variant = patch.variant
    return variant.gate != "none" and variant.selection == "soft" and variant.gate_form == "softmax"
