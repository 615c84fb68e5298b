"""The table of what the weights of each base take in training."""

from __future__ import annotations

import torch
import torch.nn as nn

from benchmarks.memory import PAGE, row_of, trained_bases
from tests.tiny import FAMILIES


def test_the_page_has_a_row_for_every_base_of_the_trainer() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("<!-- table: memory -->")[2].partition("<!-- end of table -->")[0]
    rows = [line.split("|")[1].strip(" `") for line in table.splitlines() if line.startswith("| `")]
    assert rows == trained_bases(), "run python -m benchmarks.memory"


def test_a_row_counts_bytes() -> None:
    """As counted here: linear layers have a byte a value, but for those that PixArt exempts.

    Two of three equal blocks are swapped, and one of them has room.
    """
    tiny = FAMILIES["pixart"]
    with torch.device("meta"):
        model = tiny.build()
    exempt = ("adaln_single", "proj_out")

    def count(part: nn.Module, within: str = "") -> tuple[int, int]:
        """The values of a part, and those of its layers in fp8."""
        linear = {
            name: module
            for name, module in part.named_modules(prefix=within)
            if isinstance(module, nn.Linear) and not name.startswith(exempt)
        }
        stored = sum(p.numel() for layer in linear.values() for p in layer.parameters())
        return sum(p.numel() for p in part.parameters()), stored

    values, in_fp8 = count(model)
    own, own_in_fp8 = count(model.transformer_blocks[0], "transformer_blocks.0")
    with torch.device("meta"):
        trained = sum(p.numel() for p in tiny.patch(None).parameters())
    whole, stored = 2 * values, 2 * values - in_fp8
    sizes = (whole, stored, stored - (2 * own - own_in_fp8))
    name, *found = row_of(tiny.base, model, digits=9)
    assert name == "`tiny-pixart`"
    assert [round(float(cell.split()[0]) * 1e9) for cell in found] == [values, *sizes, 16 * trained]
