"""The state of a run on disk: everything the continuation depends on, written atomically."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmp_common import PatchError
from dmp_common.patch.serialize import parse_json
from training.data.batch import Position
from training.methods.full import replace_folder
from training.options.config import TrainConfig
from training.run.disk import full_disk_explained
from training.run.folder import STATE, saved

_FORMAT = 1
_INFO, _VALUES, _BEST, _REST = "state.json", "values.safetensors", "best.safetensors", "rest.pt"


@dataclass
class History:
    """What happened so far.

    Args:
        base: validation loss of the base, by timestep bin.
        validation: the same of what is trained, by step.
        best_step: the step that validated best.
        losses: the last step's.
    """

    base: list[float] = field(default_factory=list)
    validation: dict[int, list[float]] = field(default_factory=dict)
    best_step: int = 0
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def base_mean(self) -> float:
        """Validation loss of the base over all timesteps."""
        return sum(self.base) / len(self.base)

    @property
    def falling(self) -> bool:
        """Whether the last validation gained a tenth or more of all that was gained."""
        if len(self.validation) < 3:
            return False
        before, last = list(self.validation)[-2:]
        gained = self.base_mean - self.mean(last)
        return gained > 0 and self.mean(before) - self.mean(last) > 0.1 * gained

    def mean(self, step: int) -> float:
        """Validation loss over all timesteps after a step."""
        bins = self.validation[step]
        return sum(bins) / len(bins)


@dataclass
class State:
    """Where a run is.

    Args:
        step: optimiser steps done.
        position: of the next global batch.
        history: so far.
        values: trained tensors by name.
        best: averaged tensors of the step that validated best, where it is kept.
        rest: state dicts of optimiser, schedule, average and gradient scaler.
        facts: what must be the same in the continuation.
    """

    step: int
    position: Position
    history: History
    values: dict[str, Tensor]
    best: dict[str, Tensor]
    rest: dict[str, Any]
    facts: dict[str, Any]


def save_state(folder: Path, state: State) -> None:
    """Writes a state: after a crash the folder is there whole, or not at all.

    Raises:
        PatchError: the disk is full; earlier states are still there.
    """
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_explained(folder.parent, _size_of(state), "a state"):
            _write(partial, state)
            replace_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _size_of(state: State) -> int:
    """Bytes of a state, about: the optimiser has two moments of each value, and an average."""
    return 4 * sum(value.nbytes for value in state.values.values())


def _write(partial: Path, state: State) -> None:
    partial.mkdir(parents=True)
    save_file(_on_cpu(state.values), partial / _VALUES)
    if state.best:
        save_file(_on_cpu(state.best), partial / _BEST)
    torch.save({**state.rest, "random": _random_states()}, partial / _REST)
    info = {
        "format": _FORMAT,
        "step": state.step,
        "position": list(state.position),
        "history": {
            "base": state.history.base,
            "validation": {str(k): v for k, v in state.history.validation.items()},
            "best_step": state.history.best_step,
        },
        "facts": state.facts,
    }
    (partial / _INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")
    for file in partial.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def load_state(folder: Path) -> State:
    """Reads a state; nothing in it is run.

    Raises:
        PatchError: no state there, or a damaged one.
    """
    try:
        info: Any = parse_json((folder / _INFO).read_text(encoding="utf-8"))
        if info["format"] != _FORMAT:
            raise ValueError(f"format {info['format']}")
        rest = torch.load(folder / _REST, map_location="cpu", weights_only=True)
        best = folder / _BEST
        state = State(
            step=int(info["step"]),
            position=Position(*info["position"]),
            history=History(
                base=info["history"]["base"],
                validation={int(k): v for k, v in info["history"]["validation"].items()},
                best_step=info["history"]["best_step"],
            ),
            values=load_file(folder / _VALUES),
            best=load_file(best) if best.exists() else {},
            rest=rest,
            facts=info["facts"],
        )
    except (
        OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError,
        SafetensorError,
    ) as error:  # fmt: skip
        raise _no_state(folder, " ".join(str(error).split())) from error
    return state


def state_folder(output: Path, name: str, step: int) -> Path:
    """Where the state after a step lies (kohya's name)."""
    return output / f"{name}-step{step:08d}{STATE}"


def find_states(output: Path, name: str) -> dict[int, Path]:
    """Whole states of a run by step, oldest first."""
    return {
        save.step: save.path
        for save in saved(output, name)
        if save.kind == STATE and (save.path / _INFO).is_file()
    }


def find_resumed(config: TrainConfig) -> Path:
    """The folder that --resume means.

    Raises:
        PatchError: no state there.
    """
    if config.resume != "latest":
        folder = Path(str(config.resume))
        if not (folder / _INFO).is_file():
            raise _no_state(folder, "no such folder" if not folder.is_dir() else "another folder")
        return folder
    output = Path(config.output_dir)
    states = find_states(output, config.output_name)
    if not states:
        raise PatchError(
            f"expected a state of {config.output_name} in {output} for --resume latest, found "
            "none: begin without --resume and with --save_state."
        )
    return list(states.values())[-1]


def _no_state(folder: Path, found: str) -> PatchError:
    return PatchError(
        f"expected the state of a run at {folder}, found none that is whole ({found[:200]}): name "
        "another, or --resume latest."
    )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _random_states() -> dict[str, Any]:
    """Of the generators that libraries may use; our own draws depend on none."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"python": (version, words, gauss), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
