"""From a cell to what is run: the trainer's configuration, files, and both commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.experiments.paper.cells import Cell, Setup, read_setup
from training.options.command_line import resolve
from training.options.config import TrainConfig
from training.options.data_options import DataOptions
from training.options.model_options import ModelOptions
from training.options.problems import ConfigError

SCRIPTS = Path(__file__).resolve().parents[2]
# What the evaluation must know of a run: the base and its data, not how they are varied.
_CACHES = ("cache_latents", "cache_text_encoder_outputs")
_VARIED = {
    *("flip_aug", "caption_dropout_rate", "persistent_data_loader_workers"),
    *_CACHES, *(f"{name}_to_disk" for name in _CACHES), "cache_dir", "vae_batch_size",
}  # fmt: skip
_TOLD = {*ModelOptions.model_fields, *DataOptions.model_fields} - _VARIED
_FOLDERS = ("full", "joint")  # methods whose result is a folder


@dataclass(frozen=True)
class Experiment:
    """Where everything is, and what is changed on the command line.

    Args:
        data: root of data sets and bases.
        out: folder of all results; tables share their runs and evaluations there.
        training: options of the trainer that overrule those of the cells.
        evaluation: the same for training/evaluate.py.
        launch: words that start a training script, such as accelerate launch; none for python.
    """

    data: Path
    out: Path
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    launch: str = ""
    setup: Setup = field(default_factory=read_setup)

    def config(self, cell: Cell, steps: int | None = None) -> TrainConfig:
        """The trainer's configuration of a cell's run.

        Args:
            cell: any but a base's.
            steps: how far to train; the cell's own if None.

        Raises:
            ConfigError: the trainer does not take it.
        """
        return resolve(
            {
                **self._given(cell),
                "method": cell.method,
                "max_train_steps": steps or cell.step,
                "output_dir": self.run_folder(cell).as_posix(),
                "output_name": cell.run,
            }
        )

    def _given(self, cell: Cell) -> dict[str, Any]:
        """Options of a cell, the later the stronger; the command line's are strongest."""
        base = self.setup.bases[cell.base]
        dataset = self.setup.datasets[base.dataset]
        options = {**self.setup.training, **dataset, **base.options, **cell.options}
        if base.untrained is not None:
            options["pretrained_model_name_or_path"] = self.untrained_folder(cell).as_posix()
        return {**{name: self._place(value) for name, value in options.items()}, **self.training}

    def _place(self, value: object) -> object:
        """A value with the folders of this computer in it."""
        if not isinstance(value, str):
            return value
        return value.replace("{data}", self.data.as_posix()).replace("{out}", self.out.as_posix())

    def run_folder(self, cell: Cell) -> Path:
        """What the trainer leaves."""
        return self.out / "runs" / cell.run

    def untrained_folder(self, cell: Cell) -> Path:
        """Random weights of a base, in the layout of diffusers."""
        return self.out / "untrained" / cell.base

    def config_file(self, cell: Cell) -> Path:
        """The trainer's TOML of a run."""
        return self.out / "configs" / f"{cell.run}.toml"

    def final(self, cell: Cell) -> Path:
        """What a run leaves at its end, before it gets the name of its step."""
        return self.run_folder(cell) / (cell.run + self._ending(cell))

    def checkpoint(self, cell: Cell) -> Path:
        """The result of a cell, under the trainer's name for the file of a step."""
        return self.run_folder(cell) / f"{cell.run}-step{cell.step:08d}{self._ending(cell)}"

    def _ending(self, cell: Cell) -> str:
        return "" if cell.method in _FOLDERS else ".safetensors"

    def train_command(self, cell: Cell, resume: bool) -> list[str]:
        """Trains a run, or goes on with it."""
        start = shlex.split(self.launch) or [sys.executable]
        command = [*start, str(SCRIPTS / "train_dmp.py"), "--config_file"]
        return [*command, str(self.config_file(cell)), *(["--resume", "latest"] if resume else [])]

    def evaluate_command(
        self, cells: list[Cell], out: Path, changes: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Evaluates cells of one base.

        Args:
            cells: at least one that is trained; the base is evaluated with it.
            out: folder of the evaluation.
            changes: options that overrule all others.
        """
        first = cells[0]
        given = {name: v for name, v in self._given(first).items() if name in _TOLD}
        settings = {**self.setup.evaluation, **self.setup.bases[first.base].evaluation}
        command = [sys.executable, str(SCRIPTS / "evaluate.py"), *_flags(given)]
        for cell in cells:
            if cell.method != "base":
                command += ["--model", f"{cell.label}={cell.method}:{self.checkpoint(cell)}"]
        settings |= {**self.evaluation, **(changes or {})}
        return [*command, *_flags(settings), "--out", str(out)]


def pairs(entries: Iterable[str], option: str) -> dict[str, Any]:
    """NAME=VALUE entries of the command line; true and false are switches.

    Raises:
        ConfigError: an entry without =.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option}: expected NAME=VALUE, found {entry!r}")
        found[name.lstrip("-")] = {"true": True, "false": False}.get(value, value)
    return found


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words
