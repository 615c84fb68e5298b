"""One training run from configuration to files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from dmp_common import Patch, PatchError
from dmp_common.patchfile import save_patch
from training.config import TrainConfig
from training.data.digits import DigitsDataset, load_digits_split
from training.evaluate import denoising_loss_by_bin
from training.frozen import FrozenBase, load_frozen
from training.loop import History, train
from training.report import write_report

_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_VALIDATION_DRAWS = 4  # of timestep and noise for each image and bin


def run(config: TrainConfig) -> Path:
    """Trains, saves and reports; returns the path of the patch.

    Raises:
        PatchError: an unusable configuration, folder or base; nothing is trained then.
    """
    output = _writable(Path(config.output_dir))
    set_seed(config.seed)
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
    )
    frozen = load_frozen(config)
    frozen.model.to(accelerator.device)
    if config.gradient_checkpointing:
        frozen.model.enable_gradient_checkpointing()
    patch = Patch.create(frozen.base, **config.variant, **frozen.facts).to(accelerator.device)
    held_out = load_digits_split("validation")

    def validate() -> float:
        losses = denoising_loss_by_bin(
            frozen.model,
            frozen.scheduler,
            held_out.images,
            held_out.labels,
            draws=_VALIDATION_DRAWS,
        )
        return float(losses.mean())

    history = train(config, accelerator, frozen, patch, DigitsDataset("train"), validate)
    path = output / f"{config.output_name}.safetensors"
    if accelerator.is_main_process:
        save_patch(patch, path, _metadata(config, history), _DTYPES[config.save_precision])
        if config.report_samples:
            write_report(config, frozen, Patch.load(path), history, output)
        _say_how_to_use(frozen, config, path)
    accelerator.end_training()
    return path


def _writable(folder: Path) -> Path:
    """Finds an unwritable folder before training, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise PatchError(
            f"expected a folder to write to, found {folder} ({error.strerror}): change "
            "--output_dir."
        ) from error
    return folder


def _metadata(config: TrainConfig, history: History) -> dict[str, str]:
    """Header entries as trainers write them, without `ss_network_module`: this is no LoRA."""
    return {
        "ss_base_model_version": config.base,
        "ss_steps": str(history.best_step),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_batch_size_per_device": str(config.train_batch_size),
        "ss_optimizer": "AdamW",
        "ss_seed": str(config.seed),
        "ss_mixed_precision": config.mixed_precision,
        "ss_dmp_config": config.model_dump_json(),
        "ss_dmp_validation": json.dumps(history.validation),
    }


def _say_how_to_use(frozen: FrozenBase, config: TrainConfig, path: Path) -> None:
    weights = config.pretrained_model_name_or_path or "training/digits/base"
    model = type(frozen.model).__name__
    print(
        f"\nThe patch is {path.as_posix()}. To use it:\n\n"
        f"    import diffusers, dmp_common as dmp\n"
        f'    model = diffusers.{model}.from_pretrained("{weights}", subfolder="transformer")\n'
        f'    dmp.attach(model, dmp.Patch.load("{path.as_posix()}"))\n'
    )
