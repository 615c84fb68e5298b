"""One training run from configuration to files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dmp_common import Patch, PatchError, get_base
from training.base.frozen import find_base
from training.options.command_line import as_toml, with_base
from training.options.config import TrainConfig
from training.options.presets import SOURCES
from training.run.dryrun import dry_run
from training.run.events import TrainingEvents
from training.run.loop import Run, train
from training.run.optimisers import make_optimiser
from training.run.outputs import require_writable
from training.run.prepare import prepare
from training.run.publishing import push
from training.run.scale import make_accelerator
from training.run.state import find_resumed


def run(config: TrainConfig) -> Path | None:
    """Trains, saves and reports; returns the path of the result, None after a dry run.

    Raises:
        PatchError: an unusable configuration, folder, base or data; nothing is trained then.
    """
    config = _checked(config)
    accelerator = _accelerator(config)
    prepared, events = prepare(config, accelerator)
    config = prepared.config
    if config.dry_run:
        dry_run(prepared)
        return None
    accelerator.init_trackers(config.log_prefix or config.output_name, _scalars(config))
    if accelerator.is_main_process:
        text = as_toml(config)
        (events.outputs.folder / f"{config.output_name}.toml").write_text(text, encoding="utf-8")
    train(prepared, events)
    events.finish(prepared)
    prepared.method.remove()
    if accelerator.is_main_process:
        _after(prepared, events)
    accelerator.end_training()
    return events.outputs.path()


def _checked(config: TrainConfig) -> TrainConfig:
    """What can be told before anything is loaded."""
    if config.base == "auto":
        config = with_base(config, find_base(config).name)
    get_base(config.base)
    require_writable(config)
    if not any(getattr(config, name) for name in SOURCES):
        raise PatchError(
            f"expected data to train on: the images (and captions) that base {config.base} was "
            "trained on, or their like; found none. Three commands that run, with your paths:\n"
            f"  python training/train_dmp.py --base {config.base} --train_data_dir photos\n"
            f"  python training/train_dmp.py --base {config.base} --webdataset "
            '"shards/{00000..00099}.tar"\n'
            f"  python training/train_dmp.py --base {config.base} --dataset_name user/dataset"
        )
    # Wishes that cannot be fulfilled, before gigabytes are loaded for them.
    make_optimiser(config, [{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    with torch.device("meta"):
        Patch.create(config.base, **config.variant)
    if config.resume is not None:
        find_resumed(config)
    if config.huggingface_repo_id is not None and config.method not in ("dmp", "prompt"):
        raise PatchError(
            f"expected --huggingface_repo_id with a patch, found --method {config.method}: upload "
            "its result with the tools of diffusers."
        )
    if config.report_samples and config.method not in ("dmp", "prompt"):
        config = config.model_copy(update={"report_samples": 0})
    return config


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.deterministic:
        # cuBLAS asks for it before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    log_dir = config.logging_dir or str(Path(config.output_dir) / "logs")
    return make_accelerator(config, log_dir)


def _scalars(config: TrainConfig) -> dict[str, Any]:
    """What the loggers can show of the configuration."""
    return {k: v for k, v in config.recorded().items() if isinstance(v, (str, int, float))}


def _after(prepared: Run, events: TrainingEvents) -> None:
    """Report, hub, and how to go on."""
    config, path = prepared.config, events.outputs.path()
    if config.report_samples and prepared.frozen.base.name == "digits":
        from training.run.digits_report import write_digits_report

        write_digits_report(
            config, prepared.frozen, Patch.load(path), prepared.history, path.parent
        )
    if config.huggingface_repo_id is not None:
        address = push(config, prepared, path)
        print(f"pushed to {address}")
    print(_use(prepared, path))


def _use(prepared: Run, path: Path) -> str:
    """Lines that use the result."""
    config, frozen = prepared.config, prepared.frozen
    weights = config.pretrained_model_name_or_path or frozen.base.hub_id or "training/base/digits"
    name, cls = frozen.family.denoiser, type(frozen.model).__name__
    pipeline = frozen.family.pipeline
    if config.method in ("dmp", "prompt"):
        load = f'model = diffusers.{cls}.from_pretrained("{weights}", subfolder="{name}")'
        if pipeline:
            load = f'model = diffusers.{pipeline}.from_pretrained("{weights}")'
        lines = [
            "import diffusers, dmp_common as dmp",
            load,
            f'dmp.attach(model, dmp.Patch.load("{path.as_posix()}"))',
        ]
    elif config.method == "lora":
        lines = [
            "import diffusers",
            f'pipe = diffusers.{pipeline or "DiffusionPipeline"}.from_pretrained("{weights}")',
            f'pipe.load_lora_weights("{path.as_posix()}")',
        ]
    else:
        lines = [
            "import diffusers",
            f'model = diffusers.{cls}.from_pretrained("{path.as_posix()}", subfolder="{name}")',
        ]
    return f"\nThe result is {path.as_posix()}. To use it:\n\n    " + "\n    ".join(lines) + "\n"
