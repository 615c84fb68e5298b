"""Writes what the weights of each base take in training into docs/TRAINING.md.

python -m benchmarks.memory          # writes the table between its two marks
python -m benchmarks.memory --print  # prints it

The models are built at their real size on the meta device, as the tests build them, so nothing is
loaded and no GPU is needed. It takes a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn as nn

from dmp_common import Base, Patch, PatchError, get_base
from dmp_common.bases.table import TABLE
from training.base.families.table import family_of
from training.base.memory import large_blocks, use_fp8, weight_bytes
from training.experiments.cheap import cheap_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "TRAINING.md"
_NAME = "memory"
_HEAD = (
    "base", "parameters", "weights in bf16", "with `--fp8_base`",
    "fp8, half of the blocks swapped", "the patch, in training",
)  # fmt: skip
_COPIES = 16  # bytes of a trained value: itself, its gradient and AdamW's two moments in float32


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


def table() -> str:
    """Returns the table in Markdown."""
    from tests.dmp_common.realbases import MODELS  # needs the repository and pytest

    builders = {real.base: real.build for real in reversed(MODELS.values())}
    lines = [_HEAD, ("---",) * len(_HEAD)]
    for name in trained_bases():
        with torch.device("meta"):
            model = builders[name]()
        lines.append(row_of(get_base(name), model.to("meta").requires_grad_(False)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Writes or prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    if parser.parse_args().print:
        print(table())
        return
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(cheap_tables.updated(text, {_NAME: table()}), encoding="utf-8")


if __name__ == "__main__":
    main()
