"""What a patch costs in A1111: `WEBUI_PATH=... python -m benchmarks.a1111_overhead`.

A full-size SD 1.5 UNet with random weights, of the class that A1111 runs (its repository
stable-diffusion-stability-ai), called as its sampler calls it: conditioning and its negative in one
batch. Prints how far a patched call is from the same patch on the same weights in diffusers, the
time inside our hooks, and the ratio of patched to plain calls, taken in turns in one process.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from a1111_dmp.session import Model, Session
from benchmarks.models import SD15, random_patch, randomised
from benchmarks.timing import CLOCKS, clocked, host_options, interleaved, ratio
from dmp_common import Patch, attach
from dmp_common.attach.record import LoadedPatch, PatchRecord

CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
    "use_checkpoint": False,
    "legacy": False,
}


def main() -> None:
    """Runs the benchmark of the command line."""
    options = host_options(__doc__)
    model, patch, now = unet(), random_patch("sd15"), CLOCKS[options.clock]
    timesteps = [999.0 * (1 - n / options.steps) for n in range(options.steps)]
    turn = iter(range(10**9))

    def step() -> Tensor:
        return call(model, timesteps[next(turn) // 2 % len(timesteps)], options.latent)

    print(f"SD 1.5 in A1111's UNet, latent {options.latent}, batch 2, float32, "
          f"{torch.get_num_threads()} threads, {options.clock} clock, "
          f"torch {torch.__version__}")  # fmt: skip
    difference(model, random_patch("sd15"), options.latent)
    call(model, 500.0, options.latent)  # first use of everything, out of the measurement
    with clocked(model, patch, now) as clock:
        patch.cache.clear()
        for kind in ("misses", "hits"):
            shares = []
            for t in timesteps:
                clock.seconds, start = 0.0, now()
                call(model, t, options.latent)
                shares.append(clock.seconds / (now() - start - clock.seconds))
            share = statistics.median(shares)
            print(f"{kind}: {100 * share:.3f} % of the call inside our hooks", flush=True)
    session = session_with(model, patch)

    def patched() -> Tensor:
        with session:
            return step()

    seconds = interleaved({"plain": step, "patched": patched}, options.rounds, now)
    middle, spread = ratio(seconds, "patched", "plain")
    print(f"patched / plain: {middle:.4f} +- {spread:.4f} (hits; attached anew for each call)")
    print(f"plain call: {statistics.median(seconds['plain']):.2f} s")


def unet() -> Any:
    """A full-size SD 1.5 UNet of A1111's class, with random weights."""
    root = Path(os.environ["WEBUI_PATH"]) / "repositories" / "stable-diffusion-stability-ai"
    sys.path.append(str(root))
    kind = importlib.import_module("ldm.modules.diffusionmodules.openaimodel").UNetModel
    return randomised(kind(**CONFIG))


def inputs(t: float, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text of a call, the same for each timestep."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, side, side, generator=generator)
    return x, torch.full((2,), t), torch.randn(2, 77, 768, generator=generator)


def call(model: nn.Module, t: float, side: int) -> Tensor:
    """One call of the model."""
    x, timesteps, context = inputs(t, side)
    with torch.no_grad():
        out: Tensor = model(x, timesteps, context=context)
    return out


@torch.no_grad()
def difference(model: Any, patch: Patch, side: int) -> None:
    """Prints how far a patched call is from that in diffusers, relative to its size."""
    for pool in patch.pools.parameters():
        pool.mul_(5000.0)  # so that the patch says as much as the model
    diffusers = importlib.import_module("diffusers")
    convert = importlib.import_module("diffusers.loaders.single_file_utils")
    other = diffusers.UNet2DConditionModel(**SD15).eval()
    state = {f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}
    names = dict(other.config) | {"layers_per_block": 2}
    other.load_state_dict(convert.convert_ldm_unet_checkpoint(state, names))
    x, timesteps, context = inputs(600.0, side)
    with attach(other, patch):
        expected = other(x, timesteps, context).sample
    with session_with(model, patch):
        found = call(model, 600.0, side)
    plain = call(model, 600.0, side)
    size = expected.norm()
    print(f"patched, A1111 - diffusers: {float((found - expected).norm() / size):.1e} of its size; "
          f"the patch changes {float((found - plain).norm() / size):.1e}", flush=True)  # fmt: skip


def session_with(model: nn.Module, patch: Patch) -> Session:
    """What the extension keeps of a generation."""
    now = Model(model, "random", "epsilon", lambda base, percent: (1.0 - percent) * 999.0)
    session = Session(lambda: now, lambda: False, print)
    session.choose("accordion", [PatchRecord(LoadedPatch(patch, Path("random.safetensors")))])
    return session


if __name__ == "__main__":
    main()
