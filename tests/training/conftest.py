"""A tiny base of the digits family, and runs on the real digits that take a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DiTTransformer2DModel
from PIL import Image

from dmp_common import Patch, bases, register_base
from tests.releases import LACKING
from tests.tiny import FAMILIES
from tests.training.tinybases import OPTIONS, TRAINED, make_base, make_classes, make_pictures
from training.base.families.table import DIGITS, register_family
from training.methods.patch import PatchMethod
from training.options.command_line import resolve
from training.run.events import TrainingEvents
from training.run.loop import train as run_training
from training.run.parts import Run
from training.run.trainer import Trainer
from training.train_dmp import main

TINY = register_base(
    bases.dit(
        "tiny-digits", depth=2, width=16, patch_size=2, in_channels=1, frequency_shift=1.0,
        grid=(4, 4),
    )
)  # fmt: skip
register_family(TINY, DIGITS)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the first run's precision for the whole process, also for other tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def drawn_gate() -> None:
    """Asks for gate pictures that are drawn, which takes a third of a short run."""


@pytest.fixture(autouse=True)
def plain_gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate pictures are black squares, unless a test looks at one."""
    if "drawn_gate" not in request.fixturenames:
        monkeypatch.setattr(
            "training.run.outputs.save_heatmap",
            lambda path, patch, timesteps, e: Image.new("RGB", (8, 8)).save(path),
        )


@pytest.fixture(scope="session")
def digits_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random DiT for digits."""
    folder = tmp_path_factory.mktemp("digits-base")
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=1, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return folder


class Told:
    """A validation of one image whose losses a test tells."""

    def __init__(self, losses: Callable[[object], list[float]]) -> None:
        self._losses = losses

    def images(self, student: object) -> torch.Tensor:
        """Losses (1, bins)."""
        return torch.tensor([self._losses(student)], dtype=torch.float64)


Start = Callable[..., tuple[Run, TrainingEvents]]
Go = Callable[..., tuple[Run, TrainingEvents]]


@pytest.fixture
def start(digits_base: Path, tmp_path: Path) -> Start:
    """Puts a run together without starting it."""

    def start(**options: object) -> tuple[Run, TrainingEvents]:
        defaults = {
            "base": "tiny-digits",
            "recipe": "none",
            "pretrained_model_name_or_path": str(digits_base),
            "dataset_name": "digits",
            "max_train_steps": 4,
            "train_batch_size": 16,
            "lr_scheduler": "constant",
            "output_dir": str(tmp_path / "out"),
            "max_validation_images": 16,
            "validation_bins": 2,
        }
        config = resolve({**defaults, **options})
        Path(config.output_dir).mkdir(exist_ok=True)
        trainer = Trainer.build(config, Accelerator(cpu=True))
        return trainer.run, trainer.events

    return start


@pytest.fixture
def go(start: Start) -> Go:
    """Runs to the end and gives the base back."""

    def go(
        validation: Callable[[object], list[float]] | None = None, **options: object
    ) -> tuple[Run, TrainingEvents]:
        run, events = start(**options)
        if validation is not None:
            events.validation = Told(validation)
            events.base_losses = torch.ones(1, 1, dtype=torch.float64)
            run.history.base = [1.0]
        try:
            run_training(run, events)
            events.finish(run)
        finally:
            run.method.remove()
        return run, events

    return go


def patch_of(run: Run) -> Patch:
    """The patch of a run."""
    assert isinstance(run.method, PatchMethod)
    return run.method.patch


Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a tiny base, or of "pictures" or "classes", made once."""
    root = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> Path:
        path = root / name
        make = {"pictures": make_pictures, "classes": make_classes}.get(name)
        if make is None and name not in TRAINED:
            pytest.skip(LACKING)
        if not path.exists():
            make(path) if make else make_base(path, name)
        return path

    return folder


Train = Callable[..., Path]


@pytest.fixture
def train(folders: Folders, tmp_path: Path) -> Train:
    """Runs the command for a base with a few more options; returns the folder of its output."""

    def train(name: str, *options: str, data: str | None = None, code: int = 0) -> Path:
        if name not in TRAINED:
            pytest.skip(LACKING)
        chosen = ("classes" if name == "dit" else "pictures") if data is None else data
        arguments = {
            "--base": FAMILIES[name].base.name,
            "--recipe": "none",
            "--pretrained_model_name_or_path": str(folders(name)),
            "--resolution": "16",
            "--max_train_steps": "3",
            "--lr_scheduler": "constant",
            "--output_dir": str(tmp_path / "out"),
        }
        if chosen:  # "" for options that bring their own
            arguments["--train_data_dir"] = str(folders(chosen))
        line = [part for pair in arguments.items() for part in pair]
        assert main([*line, *OPTIONS.get(name, []), *options]) == code
        return tmp_path / "out"

    return train
