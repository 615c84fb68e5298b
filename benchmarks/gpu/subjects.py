"""The models of the report: full-size ones, or the tests' tiny ones in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn as nn

from benchmarks.models import Inputs, build, placed, random_patch
from dmp_common import Patch
from tests.tiny import FAMILIES, Tiny

DIGITS = Path(__file__).resolve().parents[2] / "training" / "base" / "digits" / "transformer"


@dataclass(frozen=True)
class Setup:
    """Where the report is made.

    Args:
        device: that is measured.
        tiny: whether tiny models stand in for the full-size ones, to try the command.
        left: seconds that are left.
        data: CIFAR-10, a zip or class folders; None where it is not at hand.
        base: folder of a base for part 2 that is carried along; None trains one.
        steps: of each training of part 2; tiny models take 4.
    """

    device: str
    tiny: bool
    left: Callable[[], float]
    data: Path | None = None
    base: Path | None = None
    steps: int = 200

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA device."""
        return torch.device(self.device).type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The precision of full-size models: half, which a CPU would only emulate."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def backend(self) -> str:
        """The compiler: the default one for a real measurement, a quick one to try the command."""
        return "eager" if self.tiny else "inductor"

    @property
    def rounds(self) -> int:
        """Measurements of a ratio."""
        return 2 if self.tiny else 10

    def promised(self, ratio: float | None) -> float | None:
        """A promise about time; tiny models cannot keep it, their blocks cost next to nothing."""
        return None if self.tiny else ratio


@dataclass(frozen=True)
class Subject:
    """A model to be measured, on the device of a setup.

    Args:
        name: of the base, latent and batch, for the report.
        make: builds the model; with every call the same weights.
        patch: a random patch on the device.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Inputs]]
    patch: Callable[[], Patch]


def subject(setup: Setup, base: str, latent: int, batch: int, mix: str = "add") -> Subject:
    """A full-size model, or the tiny one of its family, and a patch that adds or modulates."""
    if setup.tiny:
        family = FAMILIES[base.split("-")[0]]
        return Subject(
            f"tiny {family.name}",
            lambda: tiny_model(family, setup, batch),
            lambda: soft_patch(family, mix).to(setup.device),
        )
    return Subject(
        f"{base} {batch} x {latent}",
        lambda: build(base, latent, batch, setup.device, setup.dtype),
        lambda: random_patch(base, mix=mix).to(setup.device),
    )


def tiny_model(family: Tiny, setup: Setup, batch: int) -> tuple[nn.Module, Inputs]:
    """A tiny model on the device, and its inputs at a timestep."""

    def inputs(t: float) -> dict[str, Any]:
        given = family.inputs(torch.full((batch,), t), (8, 8), torch.float32, 1)
        placed_inputs: dict[str, Any] = placed(given, setup.device, setup.dtype)
        return placed_inputs

    return family.model(dtype=setup.dtype).to(setup.device), inputs


def digits(setup: Setup, batch: int) -> tuple[nn.Module, Inputs]:
    """The bundled base, which the trainer knows, and its inputs at a timestep."""
    model = diffusers.DiTTransformer2DModel.from_pretrained(DIGITS, torch_dtype=setup.dtype)

    def inputs(t: float) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        given = {
            "hidden_states": torch.randn(batch, 1, 8, 8, generator=generator),
            "timestep": torch.full((batch,), t),
            "class_labels": torch.arange(batch) % 10,
        }
        placed_inputs: dict[str, Any] = placed(given, setup.device, setup.dtype)
        return placed_inputs

    return model.to(setup.device).eval().requires_grad_(False), inputs


def soft_patch(family: Tiny, mix: str = "add") -> Patch:
    """A random patch whose gate is soft, as a trained one is: many prompts matter at a time."""
    patch = family.patch(0, std=0.05 if mix == "modulate" else 0.5, mix=mix)
    with torch.no_grad():
        for parameter in patch.gate.parameters():
            parameter.mul_(0.2)
    return patch


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what was expected."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
