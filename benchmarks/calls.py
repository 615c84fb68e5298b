"""Counts the calls of our functions in one forward pass of a tiny SD 1.5 with 12 sites.

    python -m benchmarks.calls

Counted are Python functions, comprehensions included, whose code lies in `dmp_common`; under
Python 3.12 and later comprehensions are no calls, so the numbers that are stated are of 3.11.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import diffusers
import torch

import dmp_common
from dmp_common import Patch, attach, bases, register_base

OURS = str(Path(dmp_common.__file__).parent)
WIDTHS, CONTEXT = (16, 32, 32, 32), 12


def calls_of(run: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Returns how often each function of `dmp_common` is called: (file, function) to a number."""
    found: Counter[tuple[str, str]] = Counter()

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(OURS):
            found[str(Path(code.co_filename).relative_to(OURS)), code.co_name] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def measure() -> dict[str, Counter[tuple[str, str]]]:
    """Counts a call whose timestep is new (miss) and one whose fields are remembered (hit)."""
    base = register_base(
        bases.unet("calls-sd15", widths=WIDTHS, context=CONTEXT, attention=[1] * 3 + [0])
    )
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=WIDTHS,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        cross_attention_dim=CONTEXT,
        norm_num_groups=8,
        attention_head_dim=4,
    ).eval()
    patch = Patch.create(base).eval().requires_grad_(False)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, CONTEXT)

    def run(timestep: float) -> Callable[[], Any]:
        return lambda: model(sample, torch.full((2,), timestep), text)

    assert len(patch.sites) == 12
    with torch.no_grad(), attach(model, patch):
        run(1.0)()  # resize matrices are made once
        return {"miss": calls_of(run(500.0)), "hit": calls_of(run(500.0))}


def main() -> None:
    """Prints a table for each."""
    for name, found in measure().items():
        files = Counter[str]()
        for (file, _), count in found.items():
            files[file] += count
        print(f"{name}: {found.total()} calls in {len(files)} files")
        for (file, function), count in sorted(found.items()):
            print(f"  {count:4} {file}: {function}")


if __name__ == "__main__":
    main()
