"""The progress of a training in ComfyUI: its bar, its previews, and how long it will take."""

from __future__ import annotations

import logging
import time
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from PIL import Image
from torch import Tensor

from comfyui_dmp.plots import loss_curve

_log = logging.getLogger(__name__)
_PREVIEWS = 40  # of the curve, during a training
_PIXELS = 512


class Progress:
    """One bar for the predictions of the exact model and the training after them.

    Args:
        calls: of the exact model.
        steps: of the training.
        node: ComfyUI's id of the node; None outside of a server.

    Attributes:
        shares: the loss of each step over the gap before training.
    """

    def __init__(self, calls: int, steps: int, node: str | None) -> None:
        self.shares: list[float] = []
        self._calls, self._steps, self._made = calls, steps, 0
        self._bar = comfy.utils.ProgressBar(calls + steps, node_id=node)
        self._previewer: Any = None
        self._began = time.monotonic()

    @property
    def done(self) -> int:
        """The number of training steps done."""
        return len(self.shares)

    def drew(self, model: Any, denoised: Tensor) -> None:
        """Shows a picture of the exact model on its way.

        Args:
            model: ComfyUI's `ModelPatcher` of it.
            denoised: latents (B, C, ..., h, w).
        """
        if not self._made:
            self._previewer = latent_preview.get_previewer(
                model.load_device, model.model.latent_format
            )
        self._made = min(self._made + 1, self._calls)
        preview = None
        if self._previewer is not None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", denoised)
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(self._made, preview=preview)

    def trained(self, step: int, loss: float, gap: float) -> bool:
        """Shows the curve, from time to time; True, as the training goes on.

        Args:
            step: the number of steps done.
            loss: of the last one.
            gap: before training.
        """
        if not self.shares:
            self._began = time.monotonic()  # of the second step on, the first one warms up
        self.shares.append(loss / gap)
        preview = None
        if step % max(1, self._steps // _PREVIEWS) == 0 or step == self._steps:
            preview = ("JPEG", self.curve(), _PIXELS)
        if step % max(1, self._steps // 10) == 0:
            _log.info("DMP: %s", self._title())
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(self._calls + step, preview=preview)
        return True

    def curve(self, left: float | None = None) -> Image.Image:
        """The picture of the loss so far.

        Args:
            left: the share of the gap that is left at states that were not trained on, where no
                more steps follow.
        """
        return loss_curve(self.shares, self._steps, self._title(left))

    def _title(self, left: float | None = None) -> str:
        if left is not None:
            return f"step {self.done} of {self._steps}, {left:.0%} of the gap is left elsewhere"
        recent = self.shares[-max(1, self.done // 20) :]
        share = sum(recent) / max(len(recent), 1)
        title = f"step {self.done} of {self._steps}, {share:.0%} of the gap is left"
        if 1 < self.done < self._steps:
            rest = (time.monotonic() - self._began) / (self.done - 1) * (self._steps - self.done)
            title += f", {int(rest // 60)}:{int(rest % 60):02d} to go"
        return title
