"""Load, validate and attach a patch of SD 1.5: `python -m benchmarks.loading`.

Prints the first time in a process, and the median of the following ones.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import torch

from benchmarks.models import SD15, random_patch
from dmp_common import Patch, attach


def main() -> None:
    """Runs the benchmark."""
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**SD15)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patch.safetensors"
        random_patch("sd15").save(path)
        seconds = []
        for _ in range(21):
            start = time.perf_counter()
            with attach(model, Patch.load(path)):
                seconds.append(time.perf_counter() - start)
    print(f"load + validate + attach, SD 1.5: first {seconds[0] * 1e3:.0f} ms, "
          f"median {statistics.median(seconds[1:]) * 1e3:.0f} ms; "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip


if __name__ == "__main__":
    main()
