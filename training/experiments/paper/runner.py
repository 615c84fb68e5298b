"""Trains and evaluates cells: what is there already is skipped, what was begun goes on."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

from safetensors import safe_open

from dmp_common import PatchError
from training.experiments.paper.cells import Cell
from training.experiments.paper.experiment import Experiment
from training.experiments.paper.results import read_results
from training.options.command_line import as_toml, read_toml
from training.run.state import find_states

# Options of a run that may change between its parts: they do not change its result.
_FREE = (
    "max_train_steps", "max_data_loader_n_workers", "persistent_data_loader_workers",
    "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk", "cache_dir", "vae_batch_size", "log_with", "logging_dir",
)  # fmt: skip

# An evaluation for its picture alone: samples of few rows, and as few held-out images as it takes.
_FEW = {"samples": 8, "grid": 8, "metrics": "none", "images": 8}


def start(command: list[str]) -> int:
    """Runs a command; returns its exit code."""
    return subprocess.run(command, check=False).returncode


def train_cells(experiment: Experiment, cells: list[Cell], dry: bool = False) -> None:
    """Trains every run that a file of these cells is missing of, up to the last such step.

    Raises:
        PatchError: a run fails, or the folder holds it with other options.
    """
    runs: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.method != "base":
            runs[cell.run].append(cell)
    for members in runs.values():
        _settle(experiment, members[0])
        missing = [cell for cell in members if not experiment.checkpoint(cell).exists()]
        if not missing:
            print(f"{members[0].run}: trained already")
            continue
        last = max(missing, key=lambda cell: cell.step)
        _write_config(experiment, last)
        _train(experiment, last, dry)
        if not dry:
            _settle(experiment, last)
            _require(experiment, missing)
            _tidy(experiment, last)


def _train(experiment: Experiment, cell: Cell, dry: bool) -> None:
    states = find_states(experiment.run_folder(cell), cell.run)
    if states and max(states) >= cell.step:
        # Ended between state and file: the last part is done again.
        for step in [step for step in states if step >= cell.step]:
            if not dry:
                shutil.rmtree(states[step])
            del states[step]
    untrained = experiment.setup.bases[cell.base].untrained
    folder = experiment.untrained_folder(cell)
    if untrained is not None and not folder.exists() and not dry:
        from training.experiments.paper.untrained import make_untrained

        folder.parent.mkdir(parents=True, exist_ok=True)
        make_untrained(experiment.config(cell).base, untrained, folder)
    _do(experiment.train_command(cell, resume=bool(states)), dry)


def evaluate_cells(experiment: Experiment, cells: list[Cell], dry: bool = False) -> None:
    """Evaluates the cells that are not yet, those of one base together: it is sampled once.

    Raises:
        PatchError: an evaluation fails.
    """
    groups: dict[str, dict[str, Cell]] = defaultdict(dict)
    for cell in cells:
        groups[cell.base][cell.label] = cell
    done = read_results(experiment.out)
    for group, members in groups.items():
        missing = [cell for cell in members.values() if (group, cell.label) not in done]
        if not missing:
            print(f"{group}: evaluated already")
            continue
        _require_trained(missing)
        number = 1
        while (out := experiment.out / "evaluations" / group / f"{number:03d}").exists():
            number += 1
        _do(experiment.evaluate_command(missing, out), dry)


def sample_cells(experiment: Experiment, cells: list[Cell], dry: bool = False) -> dict[str, Path]:
    """Draws some samples of each model from equal noise, base by base.

    Returns:
        The picture of the samples, by the name of the base.

    Raises:
        PatchError: an evaluation fails, or no cell of a base is trained.
    """
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.base].append(cell)
    pictures = {}
    for group, members in groups.items():
        _require_trained(members)
        out = experiment.out / "samples" / "-".join([group, *_methods(members)])
        pictures[group] = out / "samples.png"
        if pictures[group].exists():
            print(f"{group}: sampled already")
        else:
            _do(experiment.evaluate_command(members, out, _FEW), dry)
    return pictures


def _methods(cells: list[Cell]) -> list[str]:
    return [cell.method for cell in cells if cell.method != "base"]


def _require_trained(cells: list[Cell]) -> None:
    if not _methods(cells):
        raise PatchError(
            f"expected a trained cell besides {cells[0].id}, found none: a base is evaluated "
            "together with what was trained on it."
        )


def _do(command: list[str], dry: bool) -> None:
    print(shlex.join(command), flush=True)
    if dry:
        return
    code = start(command)
    if code:
        raise PatchError(
            f"expected the command above to end well, found exit code {code}: see what it printed; "
            "the same command goes on from here."
        )


def _write_config(experiment: Experiment, cell: Cell) -> None:
    """The run's TOML; refuses to go on with a run of other options."""
    text, path = as_toml(experiment.config(cell)), experiment.config_file(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.new.toml")
    partial.write_text(text, encoding="utf-8")
    if path.exists() and experiment.run_folder(cell).exists():
        old, new = read_toml(path), read_toml(partial)
        differs = [
            f"{name} {old.get(name)!r} (now {new.get(name)!r})"
            for name in sorted({*old, *new} - set(_FREE))
            if old.get(name) != new.get(name)
        ]
        if differs:
            partial.unlink()
            raise PatchError(
                f"expected the run at {experiment.run_folder(cell)} to have the options of now, "
                f"found {', '.join(differs)}: give the same options, or another --out."
            )
    partial.replace(path)


def _settle(experiment: Experiment, cell: Cell) -> None:
    """Gives the final file of a finished run the name of its step, as the files before it have."""
    final = experiment.final(cell)
    if not final.exists():
        return
    weights = final
    if final.is_dir():
        weights = next(final.glob("*/diffusion_pytorch_model.safetensors"))
    with safe_open(weights, framework="pt") as file:
        step = int(file.metadata()["ss_steps"])
    named = final.with_name(f"{cell.run}-step{step:08d}{final.suffix if final.is_file() else ''}")
    if not named.exists():
        final.rename(named)
        gate = gate_picture(final)
        if gate.exists():
            gate.replace(gate_picture(named))


def gate_picture(file: Path) -> Path:
    """The picture that the trainer draws of a patch's gate."""
    stem = file.name.removesuffix(".safetensors")
    return file.with_name(f"{stem}-gate.png")


def _require(experiment: Experiment, cells: list[Cell]) -> None:
    for cell in cells:
        path = experiment.checkpoint(cell)
        if not path.exists():
            raise PatchError(
                f"expected {path} after training, found none: --save_every_n_steps must divide "
                f"{cell.step}; to train again from the start, take {path.parent} away."
            )


def _tidy(experiment: Experiment, cell: Cell) -> None:
    """Keeps the newest state, with which a run can go on; the others take much room."""
    for folder in list(find_states(experiment.run_folder(cell), cell.run).values())[:-1]:
        shutil.rmtree(folder)
