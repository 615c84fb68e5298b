"""What a user sees while it runs: one line with loss, rate, time, memory and what is left; logs."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from training.options.config import TrainConfig
from training.run.scale import peak_memory

_RECENT = 50  # steps whose mean is shown


class Progress:
    """The progress bar and the loggers of a run; a context manager.

    The remaining time counts validations, previews and saves as they come: it is the recent
    time of a step with everything that lay between.

    Args:
        config: of the run.
        accelerator: holds the loggers.
        done: steps done before (a resumed run).
        total: steps in all.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, done: int, total: int
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.losses: deque[float] = deque(maxlen=_RECENT)
        self.seconds: deque[float] = deque(maxlen=_RECENT)
        self.bar = tqdm(
            initial=done,
            total=total,
            desc="training",
            unit="step",
            smoothing=0.1,
            mininterval=0.5,
            disable=not accelerator.is_local_main_process,
        )
        self.started = time.perf_counter()

    def __enter__(self) -> Progress:
        self.started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def step(self, step: int, epoch: int, losses: dict[str, float], rate: float) -> None:
        """After an optimiser step."""
        now = time.perf_counter()
        self.seconds.append(now - self.started)
        self.started = now
        self.losses.append(losses["denoising"])
        seconds = sum(self.seconds) / len(self.seconds)
        memory = peak_memory(self.accelerator.device) / 2**30
        shown = {
            "loss": f"{sum(self.losses) / len(self.losses):.4f}",
            "lr": f"{rate:.2e}",
            "s/step": f"{seconds:.2f}",
            "GiB": f"{memory:.1f}",
        }
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if step % self.config.log_every_n_steps == 0:
            values = {f"loss/{name}": value for name, value in losses.items() if name != "loss"}
            timing = {"time/step": self.seconds[-1], "memory/GiB": memory}
            self.log(step, {**values, **timing, "lr": rate, "epoch": epoch})

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Writes values to the loggers."""
        self.accelerator.log(values, step=step)

    def text(self, name: str, text: str) -> None:
        """Writes a text to TensorBoard, where it is on."""
        if self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    # Markdown shows four spaces as they are.
                    lines = "\n".join(f"    {line}" for line in text.splitlines())
                    tracker.writer.add_text(name, lines)

    def pictures(self, step: int, name: str, images: list[Image.Image]) -> None:
        """Writes pictures to TensorBoard and Weights & Biases, where they are on."""
        if not self.accelerator.is_main_process or not images:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                for number, image in enumerate(images):
                    pixels = np.asarray(image.convert("RGB"))
                    tracker.writer.add_image(f"{name}/{number}", pixels, step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb

                tracker.log({name: [wandb.Image(image) for image in images]}, step=step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.accelerator.is_local_main_process:
            self.bar.write(text, file=sys.stdout)

    def pause(self) -> None:
        """What happened since the last step is no part of the next step's time."""
        self.started = time.perf_counter()


def rate_of(optimiser: torch.optim.Optimizer) -> float:
    """The learning rate in use; adaptive optimisers multiply it by their own `d`."""
    group = optimiser.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))
