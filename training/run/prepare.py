"""Everything a run is made of, put together in the order in which mistakes are cheap to find."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from dmp_common import PatchError
from training.base.encoders import FrozenEncoders
from training.base.frozen import FrozenBase, load_frozen
from training.data.batch import Data, Position
from training.data.build import Split, open_data
from training.methods.known import METHODS
from training.methods.method import Method
from training.methods.patch import PatchMethod
from training.objective.noising import Process, process_of
from training.objective.relative import RelativeWeights, relative_config, warn_of_rounding
from training.objective.student import Student
from training.options.config import TrainConfig
from training.run.average import Average
from training.run.events import TrainingEvents, restore
from training.run.loop import Run
from training.run.metadata import Metadata
from training.run.optimisers import is_schedule_free, make_optimiser, make_schedule
from training.run.outputs import Outputs, require_room
from training.run.previews import Previews
from training.run.scale import accumulation, is_sharded, shard
from training.run.state import History, State, find_resumed, load_state, require_same
from training.run.validation import Validation

IMAGE_CACHES = ("cache_latents", "cache_latents_to_disk")
TEXT_CACHES = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")


def prepare(config: TrainConfig, accelerator: Accelerator) -> tuple[Run, TrainingEvents]:
    """Everything a run is made of, in the order in which mistakes are cheap to find."""
    frozen = load_frozen(config).to(accelerator.device)
    process = process_of(frozen.scheduler, config)
    encoders = FrozenEncoders(frozen, config)
    data = _data(config, frozen, encoders, accelerator, "train")
    config = _resolved(config, data, accelerator)
    total = config.max_train_steps
    validation = _validation(config, frozen, encoders, process, accelerator)
    previews = _previews(config, frozen, encoders, accelerator)
    state = None if config.resume is None else load_state(find_resumed(config))
    base = [] if state is None else state.history.base
    if validation is not None and not base:
        base = validation(Student(frozen, None, process, config).eval())
    relative = _relative(config, frozen, encoders, process, accelerator, data)
    if previews is not None:
        with accelerator.autocast():
            previews.base = previews.draw()
    if any(getattr(config, name) for name in TEXT_CACHES) and not config.dry_run:
        frozen.release_encoders()

    prepared = assemble(config, accelerator, frozen, process, encoders, data)
    require_room(config, prepared.method.saved_parameters(), total)
    facts = _facts(prepared)
    if state is not None:
        _resume(prepared, state, facts)
    prepared.history.base = base
    prepared.student.relative = relative
    per_step = _per_step(config, accelerator)
    metadata = Metadata(config, frozen, data.summary(), per_step, total)
    outputs = Outputs(config, prepared.method, frozen)
    return prepared, TrainingEvents(outputs, metadata, facts, validation, previews)


def assemble(
    config: TrainConfig,
    accelerator: Accelerator,
    frozen: FrozenBase,
    process: Process,
    encoders: FrozenEncoders,
    data: Data,
) -> Run:
    """What is trained, on the base, with optimiser, schedule and average."""
    set_seed(config.seed)
    total = config.max_train_steps
    method: Method = METHODS[config.method](frozen, config).to(accelerator.device)
    sharded = is_sharded(config, accelerator)
    student = _student(frozen, method, process, config, accelerator, sharded)
    optimiser = make_optimiser(config, method.groups(config))
    schedule = make_schedule(config, optimiser, total)
    average = Average(list(method.trainable().values()), config.ema_decay, optimiser)
    prepared = Run(
        config=config,
        accelerator=accelerator,
        frozen=frozen,
        method=method,
        process=process,
        encoders=encoders,
        data=data,
        wrapped=student if sharded else accelerator.prepare_model(student),
        optimiser=accelerator.prepare_optimizer(optimiser),
        schedule=schedule,
        average=average,
        sharded=sharded,
        total=total,
        step=0,
        position=Position(0, 0),
        history=History(),
        best={},
    )
    if is_schedule_free(optimiser):
        optimiser.train()
    return prepared


def _data(
    config: TrainConfig,
    frozen: FrozenBase,
    encoders: FrozenEncoders,
    accelerator: Accelerator,
    split: Split,
) -> Data:
    if config.dry_run:  # looks at the data, does not encode all of it
        config = config.model_copy(update=dict.fromkeys((*IMAGE_CACHES, *TEXT_CACHES), False))
    data = open_data(config, frozen.kind, encoders, seed=config.seed, split=split)
    data.prepare_caches(accelerator.process_index, accelerator.num_processes, _Said(accelerator))
    accelerator.wait_for_everyone()
    return data


class _Said:
    """Tells how far the caches are, on one line."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.shown = accelerator.is_local_main_process

    def __call__(self, what: str, done: int, count: int) -> None:
        if self.shown:
            print(f"\r{what}: {done} of {count}", end="\n" if done >= count else "", flush=True)


def _per_step(config: TrainConfig, accelerator: Accelerator) -> int:
    at_once = config.train_batch_size * accelerator.num_processes
    return at_once * config.gradient_accumulation_steps


def _resolved(config: TrainConfig, data: Data, accelerator: Accelerator) -> TrainConfig:
    """The configuration with accumulation and number of steps as they will be."""
    micro_steps = accumulation(config, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = micro_steps
    changes: dict[str, Any] = {"gradient_accumulation_steps": micro_steps}
    if config.max_train_epochs is not None:
        at_once = config.train_batch_size * accelerator.num_processes
        batches = data.batches_per_epoch(at_once)
        if batches is None:
            raise PatchError(
                "expected --max_train_steps for data whose number of images is unknown, found "
                "--max_train_epochs: give the steps."
            )
        changes["max_train_steps"] = -(-batches * config.max_train_epochs // micro_steps)
    return config.model_copy(update=changes)


def _validation(
    config: TrainConfig,
    frozen: FrozenBase,
    encoders: FrozenEncoders,
    process: Process,
    accelerator: Accelerator,
) -> Validation | None:
    if config.validate_every_n_steps is None and not config.keep_best:
        return None
    data = _data(config, frozen, encoders, accelerator, "validation")
    return Validation(data, encoders, process, config, accelerator)


def _relative(
    config: TrainConfig,
    frozen: FrozenBase,
    encoders: FrozenEncoders,
    process: Process,
    accelerator: Accelerator,
    data: Data,
) -> RelativeWeights | None:
    """The weights of --relative_loss, from the base's losses on training images."""
    if not config.relative_loss:
        return None
    measured = relative_config(config)
    measure = Validation(data, encoders, process, measured, accelerator)
    losses = torch.tensor(
        measure(Student(frozen, None, process, measured).eval()), dtype=torch.float64
    )
    if accelerator.is_main_process:
        warn_of_rounding(losses, config.mixed_precision)
    return RelativeWeights(losses)


def _previews(
    config: TrainConfig, frozen: FrozenBase, encoders: FrozenEncoders, accelerator: Accelerator
) -> Previews | None:
    wanted = (config.sample_prompts, config.sample_every_n_steps, config.sample_every_n_epochs)
    if not any(wanted) and not config.sample_at_first:
        return None
    return Previews(frozen, encoders, config, accelerator.device)


def _student(
    frozen: FrozenBase,
    method: Method,
    process: Process,
    config: TrainConfig,
    accelerator: Accelerator,
    sharded: bool,
) -> Student:
    """The student on its device, sharded or compiled if asked for (after attaching)."""
    model: Any = frozen.model
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if sharded:
        shard(frozen, accelerator)
    if config.torch_compile:
        model.compile(backend=config.dynamo_backend)
    return Student(frozen, method, process, config).to(accelerator.device)


def _facts(prepared: Run) -> dict[str, Any]:
    """What a continuation must have in common with the run it continues."""
    config = prepared.config
    facts: dict[str, Any] = {
        "base": prepared.frozen.base.name,
        "method": config.method,
        "optimizer_type": config.optimizer_type,
        "seed": config.seed,
        "images of a step": _per_step(config, prepared.accelerator),
        "images at once": config.train_batch_size * prepared.accelerator.num_processes,
        "images": prepared.data.size,
        "values": sum(p.numel() for p in prepared.method.trainable().values()),
    }
    if isinstance(prepared.method, PatchMethod):
        facts["variant"] = prepared.method.patch.variant.to_json()
    return facts


def _resume(prepared: Run, state: State, facts: dict[str, Any]) -> None:
    folder = find_resumed(prepared.config)
    require_same(folder, state, facts)
    if state.step >= prepared.total:
        raise PatchError(
            f"expected steps left to do, found {state.step} of {prepared.total} done in {folder}: "
            "raise --max_train_steps."
        )
    restore(prepared, state)
    if prepared.accelerator.is_main_process:
        print(f"resumed after step {state.step} from {folder.as_posix()}")
