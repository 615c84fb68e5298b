"""Many processes: the accelerator, sharding of the frozen base, and what they share."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from dmp_common import PatchError
from training.base.frozen import FrozenBase
from training.options.config import TrainConfig


def make_accelerator(config: TrainConfig, log_dir: str | None) -> Accelerator:
    """Devices, precision and loggers.

    Raises:
        PatchError: a precision or logger that this machine does not have.
    """
    log_with = None if config.log_with is None else config.log_with
    ddp = DistributedDataParallelKwargs(
        # All weights: some, such as a class table without classes, may take no part in a step.
        find_unused_parameters=config.trains_base,
        broadcast_buffers=False,
    )
    try:
        accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            log_with=log_with,
            project_dir=log_dir,
            kwargs_handlers=[ddp],
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise PatchError(
            f"expected a machine that can do --mixed_precision {config.mixed_precision} and "
            f"--log_with {config.log_with}, found none ({error}): change them."
        ) from error
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED and not torch.cuda.is_available():
        raise PatchError(
            "expected GPUs for DeepSpeed, found none: launch with training/accelerate/"
            "multi_gpu.yaml or fsdp2.yaml."
        )
    if is_sharded(config, accelerator) and config.method not in ("dmp", "prompt"):
        raise PatchError(
            f"expected --method dmp or prompt with a sharded base, found {config.method}, whose "
            "trained values lie in the base: launch with training/accelerate/multi_gpu.yaml."
        )
    return accelerator


def tracker_options(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What the loggers are started with, besides the name of the project."""
    return {} if config.wandb_run_name is None else {"wandb": {"name": config.wandb_run_name}}


def is_sharded(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether the frozen base is sharded over the processes."""
    sharding = config.fsdp or accelerator.distributed_type == DistributedType.FSDP
    return bool(sharding and accelerator.num_processes > 1)


def shard(frozen: FrozenBase, accelerator: Accelerator) -> None:
    """Shards the frozen base over the processes, block by block (FSDP2); after attaching.

    The patch is small and not among the base's modules: every process keeps all of it, and
    `average_gradients` does for it what DDP would. So files, states and optimisers are those of
    one process.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise PatchError(
            f"expected torch 2.6 or later for --fsdp, found {torch.__version__}: update it."
        ) from error
    blocks = frozen.blocks
    for block in blocks:
        fully_shard(block)
    if accelerator.is_main_process:
        count = accelerator.num_processes
        print(f"{len(blocks)} blocks of the base are shared out over {count} processes")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of all processes' gradients, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def accumulation(config: TrainConfig, world: int) -> int:
    """Micro-steps of an optimiser step.

    Raises:
        PatchError: --global_batch_size is no multiple of what the processes take at once.
    """
    if config.global_batch_size is None:
        return config.gradient_accumulation_steps
    at_once = config.train_batch_size * world
    steps, rest = divmod(config.global_batch_size, at_once)
    if "global_batch_size" not in config.model_fields_set:
        # Of a recipe, not asked for: the nearest batch that the processes can take.
        return max(1, round(config.global_batch_size / at_once))
    if rest or not steps:
        raise PatchError(
            f"expected a --global_batch_size that is a multiple of {at_once} (train_batch_size "
            f"{config.train_batch_size} x {world} processes), found {config.global_batch_size}: "
            "change one of them."
        )
    return steps


def peak_memory(device: torch.device) -> int:
    """Most memory used so far, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
