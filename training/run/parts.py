"""What a run stands on, and what is trained on it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from training.base.encoders import FrozenEncoders
from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.data.batch import Data, Position
from training.methods.known import METHODS
from training.methods.method import Method
from training.objective.noising import Process
from training.objective.objectives import DataObjective, Distillation, Objective
from training.objective.own import OwnObjective, OwnSamples, TwoSided
from training.objective.stored_aims import StoredObjective
from training.objective.student import Student
from training.objective.teacher import KeptTeacher, Teacher
from training.options.config import TrainConfig
from training.run.average import Average
from training.run.optimisers import is_schedule_free, make_optimiser, make_schedule
from training.run.scale import is_sharded, shard
from training.run.state import History


@dataclass
class Parts:
    """What a run stands on.

    Args:
        config: with the accumulation and number of steps resolved.
        accelerator: devices, precision, accumulation.
        frozen: the base.
        process: how data become noisy.
        encoders: of the base.
        exact: the base of the exact call, which --objective distill teaches to `frozen`; they may
            be the same. None for other objectives, and once all exact predictions are on disk.
        nothing: the unconditional side, tensors (1, ...) by name; None where nothing asks for it.
        own: samples of the base, for the objectives that need them; None elsewhere and before
            they are drawn.
    """

    config: TrainConfig
    accelerator: Accelerator
    frozen: FrozenBase
    process: Process
    encoders: FrozenEncoders
    exact: FrozenBase | None = None
    nothing: Given | None = None
    own: OwnSamples | None = None

    @property
    def device(self) -> torch.device:
        """Of this process."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def at_once(self) -> int:
        """Images of one micro-step, over all processes."""
        return self.config.train_batch_size * int(self.accelerator.num_processes)

    @property
    def per_step(self) -> int:
        """Images of one optimiser step."""
        return self.at_once * self.config.gradient_accumulation_steps

    def untrained(self) -> Student:
        """The base alone, for its losses."""
        return Student(self.frozen, None, self.process, self.config).eval()

    def teacher(self, method: Method | None = None) -> Teacher:
        """The exact call.

        Args:
            method: that is on the base; None before there is one.
        """
        assert self.exact is not None
        shared = method is not None and self.exact.model is self.frozen.model
        silenced = method.silenced if method is not None and shared else nullcontext
        return Teacher(self.exact, self.config, self.nothing, silenced)

    def objective(self, method: Method) -> Objective:
        """What the method learns, which is on the base."""
        given = self.encoders, self.process, self.config, self.device
        if self.config.stores_predictions and not self.config.dry_run:
            return StoredObjective(self.device)
        if self.config.objective == "own":
            return OwnObjective(*given, self.own)
        if self.config.objective == "two-sided":
            return TwoSided(*given, self.own)
        if self.exact is None:
            return DataObjective(*given)
        return Distillation(*given, self.teacher(method))

    def target(self) -> KeptTeacher | None:
        """What predictions at held-out images are compared with, before there is a method; None
        for the noise itself."""
        return None if self.exact is None else KeptTeacher(self.teacher())


@dataclass(kw_only=True)
class Run(Parts):
    """Everything a run is made of, ready to go.

    Args:
        method: what is trained, on the base.
        data: the training split.
        aims: makes the aims of batches, which are what the method learns.
        wrapped: the student, as the accelerator has it.
        optimiser, schedule, average: how the values move.
        sharded: whether the base is sharded over the processes.
        total: optimiser steps in all.
        step, position: what is done, and the next global batch.
        history: what happened.
        best: averaged values of the step that validated best, where it is kept.
    """

    method: Method
    data: Data
    aims: Objective
    wrapped: Any
    optimiser: Any
    schedule: Any
    average: Average
    sharded: bool
    total: int
    step: int
    position: Position
    history: History
    best: dict[str, Tensor]

    def epoch_after(self, step: int) -> int:
        """The epoch that is reached after a number of steps; 0 where a stream has none."""
        world = self.accelerator.num_processes
        batches = self.data.batches_per_epoch(self.at_once, world)
        return step * self.config.gradient_accumulation_steps // batches if batches else 0

    @property
    def student(self) -> Student:
        """The student itself."""
        student: Student = self.accelerator.unwrap_model(self.wrapped)
        return student


def assemble(parts: Parts, data: Data) -> Run:
    """Puts what is trained on the base, with optimiser, schedule and average."""
    config, accelerator = parts.config, parts.accelerator
    set_seed(config.seed)
    method: Method = METHODS[config.method](parts.frozen, config).to(accelerator.device)
    sharded = is_sharded(config, accelerator)
    student = _student(parts, method, sharded)
    optimiser: Any = make_optimiser(config, method.groups(config))
    schedule = make_schedule(config, optimiser, config.max_train_steps)
    average = Average(list(method.trainable().values()), config.ema_decay, optimiser)
    if is_schedule_free(optimiser):
        optimiser.train()
    return Run(
        **vars(parts),
        method=method,
        data=data,
        aims=parts.objective(method),
        wrapped=student
        if sharded
        else accelerator.prepare_model(student, device_placement=not parts.frozen.swapped),
        optimiser=accelerator.prepare_optimizer(optimiser),
        schedule=schedule,
        average=average,
        sharded=sharded,
        total=config.max_train_steps,
        step=0,
        position=Position(0, 0),
        history=History(),
        best={},
    )


def _student(parts: Parts, method: Method, sharded: bool) -> Student:
    """The student on its device, sharded or compiled if asked for (after attaching)."""
    config = parts.config
    model: Any = parts.frozen.model
    if config.gradient_checkpointing:
        parts.frozen.enable_gradient_checkpointing()
    if sharded:
        shard(parts.frozen, parts.accelerator)
    if config.torch_compile:
        model.compile(backend=config.dynamo_backend)
    student = Student(parts.frozen, method, parts.process, config)
    # Blocks that are swapped come to the device only while they compute.
    return student if parts.frozen.swapped else student.to(parts.accelerator.device)
