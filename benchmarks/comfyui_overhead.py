"""What a patch costs in ComfyUI: `COMFYUI_PATH=... python -m benchmarks.comfyui_overhead`.

A full-size SD 1.5 UNet with random weights in ComfyUI's own `BaseModel`, called as its sampler
calls it, with conditioning and its negative in one batch. Prints the ratio of patched to plain
calls, taken in turns in one process, the time inside our code, and that of loading and attaching.
"""

from __future__ import annotations

import copy
import importlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import random_patch, randomised
from benchmarks.timing import CLOCKS, HookClock, host_options, interleaved, ratio
from dmp_common import Patch

CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "use_spatial_transformer": True,
    "context_dim": 768,
    "legacy": False,
}


def main() -> None:
    """Runs the benchmark of the command line."""
    options = host_options(__doc__)
    now = CLOCKS[options.clock]
    patcher = unet()
    host = importlib.import_module("comfyui_dmp.host")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "patch.safetensors"
        random_patch("sd15").save(file)
        loading = [_seconds(now, lambda: _load(host, patcher, file)) for _ in range(7)]
        patched = _load(host, patcher, file)
    sampling = patcher.model.model_sampling
    sigmas = [float(sampling.percent_to_sigma(i / options.steps)) for i in range(options.steps)]
    sigmas[0] = float(sampling.sigma_max)
    turn = iter(range(10**9))

    def step(model: Any) -> Callable[[], Any]:
        return lambda: call(model, sigmas[next(turn) // 2 % len(sigmas)], options.latent)

    print(f"SD 1.5 in ComfyUI, latent {options.latent}, batch 2, float32, "
          f"{torch.get_num_threads()} threads, {options.clock} clock, "
          f"torch {torch.__version__}")  # fmt: skip
    call(patcher, sigmas[0], options.latent)  # first use of everything, out of the measurement
    clock = clocked(host, now)
    for kind in ("misses", "hits"):
        shares = []
        for sigma in sigmas:
            clock.seconds, start = 0.0, now()
            call(patched, sigma, options.latent)
            shares.append(clock.seconds / (now() - start - clock.seconds))
        share = statistics.median(shares)
        print(f"{kind}: {100 * share:.3f} % of the call inside our code", flush=True)
    seconds = interleaved({"plain": step(patcher), "patched": step(patched)}, options.rounds, now)
    middle, spread = ratio(seconds, "patched", "plain")
    print(f"patched / plain: {middle:.4f} +- {spread:.4f} (hits)")
    print(f"plain call: {statistics.median(seconds['plain']):.2f} s")
    print(f"load + check + attach: first {1000 * loading[0]:.0f} ms, "
          f"then {1000 * statistics.median(loading[1:]):.0f} ms")  # fmt: skip


def unet() -> Any:
    """A `ModelPatcher` of ComfyUI around a full-size SD 1.5 UNet with random weights."""
    sys.path.append(os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.cli_args").args.cpu = True
    config = importlib.import_module("comfy.supported_models").SD15(CONFIG)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    randomised(model.diffusion_model)
    cpu = torch.device("cpu")
    return importlib.import_module("comfy.model_patcher").ModelPatcher(model, cpu, cpu)


def call(patcher: Any, sigma: float, side: int) -> Tensor:
    """One call of the model, with the wrappers of its patcher."""
    options = copy.deepcopy(patcher.model_options["transformer_options"])
    options["wrappers"] = patcher.wrappers
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, side, side, generator=generator) * sigma
    text = torch.randn(2, 77, 768, generator=generator)
    with torch.inference_mode():
        out: Tensor = patcher.model.apply_model(
            x, torch.full((2,), sigma), c_crossattn=text, transformer_options=options
        )
    return out


def clocked(host: Any, now: Callable[[], float]) -> HookClock:
    """Counts the time of our functions in a UNet's slots from now on."""
    clock, fill = HookClock(now), host.unet_options

    def timed(*args: Any) -> Any:
        options = clock.wrap(fill)(*args)
        patches = options["patches"]
        for name, place in (
            ("emb_patch", 0),
            ("input_block_patch_after_skip", -1),
            ("output_block_patch", -1),
        ):
            patches[name][place] = clock.wrap(patches[name][place])
        return options

    host.unet_options = timed
    return clock


def _load(host: Any, patcher: Any, file: Path) -> Any:
    record = importlib.import_module("dmp_common.attach.record")
    loaded = record.LoadedPatch(Patch.load(file), file)
    return host.attach(patcher, record.PatchRecord(loaded))


def _seconds(now: Callable[[], float], run: Callable[[], Any]) -> float:
    start = now()
    run()
    return now() - start


if __name__ == "__main__":
    main()
