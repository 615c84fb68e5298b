"""Draws the thumbnails of the example workflows: pictures without and with a patch.

    python workflows/thumbnails.py

Nothing in the repository draws as a large model does, so the pictures are those of its bundled base
of handwritten digits, with weights in 3 bits and `docs/patches/digits-repair-rtn3.safetensors`, or
with guidance and `docs/patches/digits-guidance.safetensors`. Each thumbnail says so. Of ten
pictures it shows those that the 3 bits damage most, or that guidance changes most.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":  # The folder of this script is on the path, not that above it.
    sys.path[0] = str(FOLDER.parent)

from dmp_common import Patch, attach  # noqa: E402
from dmp_common.tools.drawing import GREY, INK, write  # noqa: E402
from dmp_common.tools.heatmap import gate_heatmap  # noqa: E402
from dmp_common.tools.timefile import even_timesteps, time_embedding_of  # noqa: E402
from training.base.cheap import open_cheap  # noqa: E402
from training.base.frozen import FrozenBase, load_frozen  # noqa: E402
from training.objective.labelled import labelled_samples  # noqa: E402
from training.options.command_line import resolve  # noqa: E402
from training.run.repair_pictures import on_paper  # noqa: E402

SIZE = (640, 395)
PATCHES = FOLDER.parent / "docs" / "patches"
REPAIR, GUIDANCE = (
    PATCHES / "digits-repair-rtn3.safetensors",
    PATCHES / "digits-guidance.safetensors",
)
SMALL_PRINT = "Drawn by a small model of digits{}, not by the model of the workflow."
DRAWN, SHOWN = 10, 4  # a picture of each digit, and how many of them a row has
PLAIN, WITH = "without", "with patch"
STRENGTHS = (0.0, 0.5, 1.0)
REPAIRED = ("full model", "3 bits", "3 bits + patch")
GUIDED = ("no guidance", "CFG, 2 calls", "patch, 1 call")

# Title and rows of each: names of what `drawn` makes.
THUMBNAILS = {
    "dmp-basic-sd15": ("A patch on SD 1.5", (PLAIN, WITH)),
    "dmp-compare": ("Compare with a slider", (PLAIN, WITH)),
    "dmp-strength-curve": ("The strength of a patch", tuple(f"at {s:g}" for s in STRENGTHS)),
    "dmp-keyframes": ("Strength by keyframes", tuple(f"at {s:g}" for s in STRENGTHS)),
    "dmp-mask": ("Patches in parts of a picture", (PLAIN, WITH)),
    "dmp-hook": ("A patch for one prompt", (PLAIN, WITH)),
    "dmp-sdxl": ("A patch on SDXL", (PLAIN, WITH)),
    "dmp-sd35": ("A patch on SD 3.5", (PLAIN, WITH)),
    "dmp-stacked": ("Two patches", (PLAIN, WITH)),
    "dmp-stack": ("Patches with switches", ("off", "on")),
    "dmp-repair-quantised": ("Repair a quantised model", REPAIRED),
    "dmp-train-repair": ("Make a repair patch", REPAIRED),
    "dmp-one-call": ("Half the time: one call a step", GUIDED),
    "dmp-train-guidance": ("Make your checkpoint twice as fast", GUIDED),
}  # fmt: skip


def drawn() -> dict[str, Tensor]:
    """Returns pictures (columns, 3, H, W) in [0, 1] from equal noise, by what made them."""
    full = load_frozen(resolve({"base": "digits"}))
    cheap = open_cheap(base="digits", student_quantization="rtn3")
    found = {"full model": _pictures(full), "3 bits": _pictures(cheap)}
    with attach(cheap.model, Patch.load(REPAIR)) as attachment:
        for strength in STRENGTHS:
            attachment.strength = strength
            found[f"at {strength:g}"] = _pictures(cheap)
    found = _most(found, "full model", "3 bits")
    found[PLAIN] = found["off"] = found["3 bits"]
    found[WITH] = found["on"] = found["3 bits + patch"] = found["at 1"]
    return found | _guided(full)


def _guided(full: FrozenBase) -> dict[str, Tensor]:
    patch = Patch.load(GUIDANCE)
    scale = patch.variant.guidance
    assert scale is not None
    one, two, third = GUIDED
    found = {one: _pictures(full), two: _pictures(full, scale)}
    with attach(full.model, patch):
        found[third] = _pictures(full)
    return _most(found, one, two)


def _most(found: dict[str, Tensor], one: str, two: str) -> dict[str, Tensor]:
    """The columns of pictures in which two rows differ most."""
    apart = (found[one] - found[two]).square().mean(dim=(1, 2, 3))
    columns = apart.topk(SHOWN).indices
    return {name: pictures[columns] for name, pictures in found.items()}


def _pictures(frozen: FrozenBase, scale: float = 1.0) -> Tensor:
    labels, facts = torch.arange(DRAWN), {"seed": 1234, "steps": 20, "sampler": "unipc"}
    return on_paper(labelled_samples(frozen, labels, scale=scale, **facts))


def gate() -> Image.Image:
    """Draws what the gate of the repair patch does."""
    canvas = Image.new("RGB", SIZE, (255, 255, 255))
    write(canvas, "What the gate of a patch does", (20, 12), 28, ink=INK)
    write(canvas, "Of a patch for a small model of digits.", (20, SIZE[1] - 26), 15, ink=GREY)
    patch = Patch.load(REPAIR)
    timesteps = even_timesteps()
    model = load_frozen(resolve({"base": "digits"})).model
    e = time_embedding_of(model, patch, timesteps, None)
    drawn = gate_heatmap(patch, timesteps, e, sites="middle")
    drawn.thumbnail((SIZE[0] - 40, SIZE[1] - 90), Image.Resampling.LANCZOS)
    canvas.paste(drawn, ((SIZE[0] - drawn.width) // 2, 58))
    return canvas


def thumbnail(title: str, rows: dict[str, Tensor], slider: bool = False) -> Image.Image:
    """Draws one thumbnail.

    Args:
        title: what the workflow does.
        rows: pictures (columns, 3, H, W) in [0, 1], by what is written beside them.
        slider: whether to lay the second row's right halves over the first, as a slider does.
    """
    canvas = Image.new("RGB", SIZE, (255, 255, 255))
    write(canvas, title, (20, 12), 28, ink=INK)
    small_print = SMALL_PRINT.format("" if GUIDED[0] in rows else " in 3 bits")
    write(canvas, small_print, (20, SIZE[1] - 26), 15, ink=GREY)
    if slider:
        first, second = rows.values()
        middle = first.shape[-1] // 2
        both = torch.cat([first[..., :middle], second[..., middle:]], dim=-1)
        rows = {" | ".join(rows): both[:2]}
    cell = min(138, (SIZE[1] - 95) // len(rows) - 6) if not slider else 240
    top = 58
    for name, pictures in rows.items():
        at = (20, top + cell // 2 - 12) if not slider else (20, SIZE[1] - 62)
        write(canvas, name, at, 20, ink=INK)
        left = 190 if not slider else 130
        for picture in pictures[: (SIZE[0] - left) // (cell + 8)]:
            levels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            grown = Image.fromarray(levels).resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(grown, (left, top))
            painter = ImageDraw.Draw(canvas)
            painter.rectangle((left, top, left + cell, top + cell), outline=(222, 222, 222))
            if slider:
                middle = left + cell // 2
                painter.line((middle, top, middle, top + cell), fill=(0, 150, 140), width=3)
            left += cell + 8
        top += cell + 8
    return canvas


def main() -> None:
    """Writes all thumbnails."""
    pictures = drawn()
    for name, (title, rows) in THUMBNAILS.items():
        shown = {row: pictures[row] for row in rows}
        image = thumbnail(title, shown, slider=name == "dmp-compare")
        image.save(FOLDER / f"{name}.jpg", quality=88)
    gate().save(FOLDER / "dmp-gate-heatmap.jpg", quality=88)


if __name__ == "__main__":
    main()
