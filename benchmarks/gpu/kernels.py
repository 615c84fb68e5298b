"""Ways to compute x (1 + s) + b on a module's output in half precision, timed beside each other.

It is the whole cost of a modulating patch on a fast card, so the way that the core takes
(`Modulation.applied`) has to be the fastest of those that need no compiler at hand.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.report import Part
from benchmarks.gpu.subjects import Setup
from benchmarks.timing import clock_of, interleaved
from dmp_common.attach.modulation import Modulation, ready_for

# Outputs (items, tokens, channels) of DiT-XL/2, SD 1.5 and FLUX.1, small and large.
SHAPES = ((8, 256, 1152), (128, 256, 1152), (32, 4096, 320), (1, 4608, 12288))
TINY = ((2, 16, 64),)
CALLS = 20  # of a measurement


def ways(x: Tensor, s: Tensor, b: Tensor, setup: Setup) -> dict[str, Callable[[], Any]]:
    """Each way to change x in place, or to make the changed output.

    Args:
        x: the output (B, L, D), in half precision.
        s, b: scale and shift (D,), float32.
    """
    half_s, half_b = s.to(x.dtype), b.to(x.dtype)
    whole_s, whole_b = (v.expand(x.shape).contiguous() for v in (half_s, half_b))
    with torch.no_grad():
        core = Modulation.along(*ready_for(x, torch.stack([s, b])[None]), x, -1)
    rows, zeros, ones = x.view(-1, x.shape[-1]), torch.zeros_like(s), torch.ones_like(s)

    def changed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x.copy_(x * (1.0 + scale) + shift)

    compiled = torch.compile(changed, dynamic=True, backend=setup.backend)
    return {
        "copy": lambda: x.clone(),
        "the core": lambda: core.applied(x, None, True),
        "two kernels": lambda: x.add_(torch.addcmul(half_b, x, half_s)),
        "full-size scale and shift": lambda: x.add_(torch.addcmul(whole_b, x, whole_s)),
        "batch_norm": lambda: F.batch_norm(rows, zeros, ones, 1.0 + s, b, eps=1e-12),
        "compiled": lambda: compiled(x, s, b),
    }


def modulation_kernels(setup: Setup, part: Part) -> None:
    """The time of each way over that of a copy of the output, and its error."""
    dtype = torch.bfloat16
    for shape in TINY if setup.tiny else SHAPES:
        generator = torch.Generator().manual_seed(0)
        given = torch.randn(shape, generator=generator).to(setup.device, dtype)
        drawn = 0.01 * torch.randn(2, shape[-1], generator=generator)
        s, b = drawn.to(setup.device)
        exact = given.double() * (1.0 + s.double()) + b.double()
        x = given.clone()
        runs: dict[str, Any] = {}
        size = " x ".join(map(str, shape))
        for name, way in ways(x, s, b, setup).items():
            x.copy_(given)
            if name != "copy":
                error = (way().reshape(shape).double() - exact).norm() / exact.norm()
                part.add(f"{size}, error, {name}", float(error), most=5e-3)
            runs[name] = lambda way=way: [way() for _ in range(CALLS)]
        seconds = interleaved(runs, setup.rounds, clock_of(setup.device))
        middle = {name: statistics.median(found) / CALLS for name, found in seconds.items()}
        copy = f"copy {1e6 * middle['copy']:.1f} us"
        for name in list(runs)[1:]:
            part.add(f"{size}, time / copy, {name}", middle[name] / middle["copy"], copy)
