"""A patch on a model whose weights are elsewhere or in another type between its calls."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.report import Part
from benchmarks.gpu.subjects import Setup, relative_error, subject
from benchmarks.overhead import caller
from dmp_common import attach


def group_offload(setup: Setup, part: Part, base: str, latent: int, batch: int) -> None:
    """diffusers' group offload: weights come to the GPU block by block."""
    one = subject(setup, base, latent, batch)
    model, inputs = one.make()
    patch, forward = one.patch(), caller(model, inputs)
    with attach(model, patch):
        expected = forward(500.0)
    module: Any = model.to("cpu")
    module.enable_group_offload(
        onload_device=torch.device(setup.device),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=setup.on_gpu,
    )
    plain = forward(500.0)
    with attach(model, patch):
        error = relative_error(forward(500.0), expected)
    part.add("offloaded against resident, patched", error, most=1e-3)
    part.hold("remove() gives the base bit for bit", torch.equal(forward(500.0), plain))


def layerwise_casting(setup: Setup, part: Part, base: str, latent: int, batch: int) -> None:
    """diffusers' layerwise casting: weights are stored as float8."""
    one = subject(setup, base, latent, batch)
    model, inputs = one.make()
    patch, forward = one.patch(), caller(model, inputs)
    plain = forward(500.0)
    with attach(model, patch):
        patched = forward(500.0)
    module: Any = model
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=setup.dtype)
    cast = forward(500.0)
    alone = relative_error(cast, plain)
    with attach(model, patch):
        error = relative_error(forward(500.0), patched)
    note = f"unpatched {alone:.2g}"
    part.add("error of float8 weights, patched", error, note, most=2 * alone + 1e-3)
    part.hold("remove() gives the base bit for bit", torch.equal(forward(500.0), cast))
