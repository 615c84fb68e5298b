"""One training run from configuration to files."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dmp_common import Patch, PatchError
from training.base.encoders import FrozenEncoders, fingerprint
from training.base.frozen import FrozenBase, load_frozen
from training.base.memory import memory_warnings
from training.base.option_checks import weights_warnings
from training.base.schedulers import token_side
from training.data.batch import Data
from training.data.sources.caption_lines import CaptionData
from training.objective.noising import process_of
from training.objective.teacher import require_conditions, unconditional_side
from training.options.command_line import as_toml
from training.options.config import TrainConfig
from training.options.presets import recipe_lines
from training.run.dryrun import dry_run
from training.run.events import TrainingEvents
from training.run.filling import draw_pictures
from training.run.folder import RunFolder
from training.run.loop import train
from training.run.metadata import Metadata
from training.run.opening import TEXT_CACHES, open_run
from training.run.outputs import Outputs, require_room
from training.run.own_samples import draw_own_samples
from training.run.parts import Parts, Run, assemble
from training.run.previews import Previews, previewed
from training.run.publishing import push
from training.run.resuming import facts_of, resume
from training.run.scale import make_accelerator, tracker_options
from training.run.state import find_resumed, load_state
from training.run.teaching import prepare, require_gap
from training.run.telling import Telling
from training.run.usage import use_lines
from training.run.validation import Validation


def run(config: TrainConfig) -> Path | None:
    """Trains, saves and reports; returns the path of the result, None after a dry run.

    Args:
        config: as `checking.check_run` leaves it.

    Raises:
        PatchError: an unusable configuration, folder, base or data; nothing is trained then.
    """
    accelerator = _accelerator(config)
    folder = RunFolder(config)
    alone = accelerator.is_main_process and not config.dry_run
    with folder.claimed() if alone else nullcontext():
        accelerator.wait_for_everyone()
        trainer = Trainer.build(config, accelerator)
        if config.dry_run:
            dry_run(trainer.run)
            return None
        if alone and config.overwrite and config.resume is None:
            folder.clear()
        trainer.train()
        return trainer.finish()


@dataclass
class Trainer:
    """A run and what happens beside its steps.

    Args:
        run: everything that is trained, ready to go.
        events: validation, previews, saving.
    """

    run: Run
    events: TrainingEvents

    @staticmethod
    def build(config: TrainConfig, accelerator: Accelerator) -> Trainer:
        """Puts a run together, in the order in which mistakes are cheap to find.

        Raises:
            PatchError: data, base, state or options that do not fit each other.
        """
        tell = Telling(accelerator)
        for line in recipe_lines(config):
            tell.say(line)
        # Data first: they are what is wrong most often, and weights take longest to load.
        config, data, held_out = open_run(config, accelerator, tell)
        parts = _loaded(config, accelerator, tell)
        resumed = None if config.resume is None else find_resumed(config)
        state = None if resumed is None else load_state(resumed)
        if config.dry_run:  # one step, and nothing beside it
            held_out = None
        for split in (data, held_out):
            if split is not None:
                _fill_caches(split, parts, tell)
        if isinstance(held_out, CaptionData):
            with tell.timed("drawing held-out pictures"):
                draw_pictures(parts, held_out)
        validation = None if held_out is None else Validation(parts, held_out, parts.target())
        prepared = prepare(parts, data, validation, tell)
        parts, data = prepared.parts, prepared.data
        base_losses, base_sides = _validated(parts, validation, tell)
        previews = _previews(parts, tell)
        if config.uses_own_samples and not config.dry_run:
            with tell.timed(f"drawing {config.own_samples} samples of the base"):
                parts.own = draw_own_samples(parts, data, tell)
        encoded = config.stores_predictions or any(getattr(config, name) for name in TEXT_CACHES)
        if encoded and not config.dry_run:
            parts.frozen.release_encoders()

        weights = fingerprint(parts.frozen.model)  # before anything is trained in it
        run = assemble(parts, data)
        run.student.relative = prepared.relative
        require_room(config, run.method.saved_parameters(), run.total)
        facts = facts_of(run, weights)
        if state is not None and resumed is not None:
            resume(run, state, facts, resumed)
        if base_losses is not None:
            run.history.base = base_losses.mean(0).tolist()
        metadata = Metadata(config, run.frozen, data.summary(), run.per_step, run.total)
        outputs = Outputs(config, run.method, run.frozen)
        events = TrainingEvents(
            outputs, metadata, facts, validation, base_losses, previews, base_sides
        )
        return Trainer(run, events)

    def train(self) -> None:
        """Runs the steps that are left.

        Raises:
            PatchError: a loss is not finite, or the disk is full.
        """
        run, config = self.run, self.run.config
        run.accelerator.init_trackers(
            config.log_prefix or config.output_name, _scalars(config), tracker_options(config)
        )
        if run.accelerator.is_main_process:
            text = as_toml(config)
            path = self.events.outputs.folder / f"{config.output_name}.toml"
            path.write_text(text, encoding="utf-8")
        if run.step < run.total:
            train(run, self.events)
        elif run.accelerator.is_main_process:
            print("all steps were done before: the result is written")

    def finish(self) -> Path:
        """Writes the result with its verdict, and says how to use it."""
        run, path = self.run, self.events.outputs.path()
        self.events.finish(run)
        run.method.remove()
        if run.accelerator.is_main_process:
            _after(run, self.events)
        run.accelerator.end_training()
        return path


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.deterministic:
        # cuBLAS asks for it before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    log_dir = config.logging_dir or str(Path(config.output_dir) / "logs")
    return make_accelerator(config, log_dir)


def _loaded(config: TrainConfig, accelerator: Accelerator, tell: Telling) -> Parts:
    """The base on its device, with what surrounds it."""
    with tell.timed("loading the base"):
        frozen = load_frozen(config, tell.say).to(accelerator.device)
        require_conditions(frozen, config)
    _warn(config, frozen, accelerator, tell)
    encoders, distills = FrozenEncoders(frozen, config), config.objective == "distill"
    return Parts(
        config=config,
        accelerator=accelerator,
        frozen=frozen,
        process=process_of(frozen.scheduler, config, token_side(frozen.base)),
        encoders=encoders,
        exact=frozen if distills else None,
        nothing=unconditional_side(frozen, encoders, config, accelerator.device)
        if distills
        else None,
    )


def _warn(config: TrainConfig, frozen: FrozenBase, accelerator: Accelerator, tell: Telling) -> None:
    """Says what the options that save memory do not do here, and what is odd about the weights.

    Raises:
        PatchError: there is something to say, and --strict is given.
    """
    warnings = memory_warnings(config, len(frozen.blocks), accelerator.device)
    warnings += weights_warnings(config, frozen.family)
    if warnings and config.strict:
        raise PatchError(f"{' '.join(warnings)} --strict makes this an error.")
    for warning in warnings:
        tell.say(f"warning: {warning}")


def _fill_caches(data: Data, parts: Parts, tell: Telling) -> None:
    accelerator = parts.accelerator
    data.prepare_caches(
        parts.encoders, accelerator.process_index, accelerator.num_processes, tell.progress
    )
    accelerator.wait_for_everyone()


def _validated(
    parts: Parts, validation: Validation | None, tell: Telling
) -> tuple[Tensor | None, Tensor | None]:
    """The losses of the base on held-out images, and those of both sides where there are such."""
    if validation is None:
        return None, None
    with tell.timed(f"validating the base on {len(validation)} images"):
        sides = validation.sides(parts.untrained())
        # The first side is the conditional one.
        losses = validation.images(parts.untrained()) if sides is None else sides[0]
    if parts.config.objective == "distill":
        require_gap(losses)
    return losses, sides


def _previews(parts: Parts, tell: Telling) -> Previews | None:
    """The previews that are asked for, with the pictures of the base."""
    config = parts.config
    if config.dry_run or not previewed(config):
        return None
    previews = Previews(parts.frozen, parts.encoders, config, parts.device)
    with tell.timed("drawing the base's previews"), parts.accelerator.autocast():
        previews.base = previews.draw()
    return previews


def _scalars(config: TrainConfig) -> dict[str, Any]:
    """What the loggers can show of the configuration."""
    return {k: v for k, v in config.recorded().items() if isinstance(v, (str, int, float))}


def _after(run: Run, events: TrainingEvents) -> None:
    """Report, hub, and how to go on."""
    config, path = run.config, events.outputs.path()
    next_lines = _report(run, path)
    if config.huggingface_repo_id is not None:
        print(f"pushed to {push(config, run, path)}")
    if events.verdict is not None:
        print("\n" + events.verdict.text())
    lines = "\n    ".join(use_lines(config, run.frozen, path))
    print(f"\nThe result is {path.as_posix()}. To use it:\n\n    {lines}\n")
    if next_lines:
        print(next_lines)


def _report(run: Run, path: Path) -> str:
    """Writes the report of the digits base, where it is asked for; returns how to go on."""
    config = run.config
    if not config.report_samples or run.frozen.base.name != "digits":
        return ""
    # With guidance the exact call is not the full model's alone, which this report compares with.
    if config.has_student and config.guidance_range is None:
        from training.run.repair_report import NEXT, write_repair_report

        write_repair_report(config, run.frozen, run.exact, path, Telling(run.accelerator))
        return NEXT
    from training.run.digits_report import write_digits_report

    write_digits_report(config, run.frozen, Patch.load(path), run.history, path.parent)
    return ""
