"""Writes what each base takes in training into docs/TRAINING.md: weights, and of videos a step.

python -m benchmarks.memory          # writes the tables between their marks
python -m benchmarks.memory --print  # prints them

The models are built at their real size on the meta device, as the tests build them, so nothing is
loaded and no GPU is needed. It takes a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Base, Patch, PatchError, attach, get_base
from dmp_common.bases.table import TABLE
from dmp_common.bases.wan import FRAME_STRIDE
from training.base.families.table import family_of
from training.base.memory import Held, keyword_checkpoint, large_blocks, use_fp8, weight_bytes
from training.base.schedulers import token_count, token_side
from training.experiments.cheap import cheap_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "TRAINING.md"
_NAME, _VIDEOS = "memory", "memory of videos"
_HEAD = (
    "base", "parameters", "weights in bf16", "with `--fp8_base`",
    "fp8, half of the blocks swapped", "the patch, in training",
)  # fmt: skip
_VIDEO_HEAD = (
    "base", "video", "tokens", "kept for a video", "kept for a picture of that size",
)  # fmt: skip
_COPIES = 16  # bytes of a trained value: itself, its gradient and AdamW's two moments in float32


@dataclass(frozen=True)
class Video:
    """A usual video of a base.

    Args:
        frames: of the video.
        size: width and height in pixels.
        factor: pixels of a side over cells of the latent, of the base's VAE.
    """

    frames: int
    size: tuple[int, int]
    factor: int = 8

    def latent(self, frames: int) -> tuple[int, int, int]:
        """Frames, height and width of the latent of so many frames."""
        width, height = self.size
        return (frames - 1) // FRAME_STRIDE + 1, height // self.factor, width // self.factor


# The sizes that Wan's own repositories draw with.
USUAL = {
    **dict.fromkeys(
        ("wan-1.3b", "wan-14b", "wan21-i2v-14b", "wan22-i2v-14b"), Video(81, (832, 480))
    ),
    "wan22-5b": Video(121, (1280, 704), factor=16),
}


def trained_bases() -> list[str]:
    """Returns the bases of the trainer that are not tiny; of the sizes of DiT the largest."""
    names = []
    for row in TABLE:
        if row.name.startswith(("digits", "cifar10")):
            continue
        if row.name.startswith("dit-") and row.name != "dit-xl/2":
            continue
        try:
            family_of(get_base(row.name))
        except PatchError:
            continue
        names.append(row.name)
    return names


def row_of(base: Base, model: nn.Module, digits: int = 1) -> tuple[str, ...]:
    """Returns the row of a base.

    Args:
        base: the base.
        model: its denoiser on the meta device, in any precision; it is changed.
        digits: of gigabytes.
    """
    time = base.times["diffusers"].mlp
    count = sum(parameter.numel() for parameter in model.parameters())
    model.to(torch.bfloat16)
    whole = weight_bytes([model]).device
    use_fp8(model, time, torch.bfloat16)
    blocks = large_blocks(model, time)
    stored = weight_bytes([model]).device
    swapped = weight_bytes([model], blocks[len(blocks) // 2 :]).device
    with torch.device("meta"):
        patch = Patch.create(base)
    trained = _COPIES * sum(parameter.numel() for parameter in patch.parameters())
    sizes = (f"{size / 1e9:.{digits}f} GB" for size in (whole, stored, swapped))
    values = f"{count / 1e9:.{digits + 1}f} B", f"{trained / 1e9:.{digits + 1}f} GB"
    return f"`{base.name}`", values[0], *sizes, values[1]


def kept_bytes(base: Base, model: Any, inputs: dict[str, Tensor]) -> int:
    """Returns what a step with one video keeps for its backward pass, with
    --gradient_checkpointing; the block that is computed again comes on top, one at a time.

    Args:
        base: the base.
        model: its denoiser on the meta device, in bfloat16.
        inputs: of a call, on the meta device.
    """
    model.requires_grad_(False).train()
    model.enable_gradient_checkpointing(keyword_checkpoint)
    with torch.device("meta"):
        patch = Patch.create(base)
    held = Held(model)
    with attach(model, patch), held:
        model(**inputs)
    return held.bytes


def video_row(
    base: Base, model: nn.Module, usual: Video, given: dict[str, Tensor], digits: int = 2
) -> list[str]:
    """Returns the row of a base of videos.

    Args:
        base: the base.
        model: its denoiser on the meta device; it is changed.
        usual: the video.
        given: the inputs of a call of the model, on the meta device.
        digits: of gigabytes.
    """
    model.to(torch.bfloat16)
    given = {name: value[:1].to(torch.bfloat16) for name, value in given.items()}
    channels, kept = given["hidden_states"].shape[1], []
    for frames in (usual.frames, 1):
        shape = (1, channels, *usual.latent(frames))
        noisy = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        inputs = {**given, "hidden_states": noisy, "timestep": given["timestep"].float()}
        kept.append(f"{kept_bytes(base, model, inputs) / 1e9:.{digits}f} GB")
    width, height = usual.size
    tokens = token_count(usual.latent(usual.frames), token_side(base))
    shown = f"{usual.frames} frames, {width} x {height}"
    return [f"`{base.name}`", shown, f"{tokens:,}", *kept]


def tables() -> dict[str, str]:
    """Returns the tables in Markdown, by name."""
    from tests.dmp_common.realbases import MODELS  # needs the repository and pytest

    reals = {real.base: real for real in reversed(MODELS.values())}

    def model_of(name: str) -> nn.Module:
        with torch.device("meta"):
            model = reals[name].build()
        return model.to("meta").requires_grad_(False)

    rows = [row_of(get_base(name), model_of(name)) for name in trained_bases()]
    videos = [
        video_row(get_base(name), model_of(name), usual, reals[name].inputs())
        for name, usual in USUAL.items()
    ]
    return {_NAME: _markdown(_HEAD, rows), _VIDEOS: _markdown(_VIDEO_HEAD, videos)}


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Writes or prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    if parser.parse_args().print:
        print("\n\n".join(tables().values()))
        return
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(cheap_tables.updated(text, tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
