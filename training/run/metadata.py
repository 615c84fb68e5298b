"""Header entries as trainers write them, without `ss_network_module`: a patch is no LoRA."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dmp_common import __version__
from training.base.frozen import FrozenBase
from training.data.summary import DataSummary
from training.options.config import TrainConfig
from training.run.purpose import known_after, purpose_of
from training.run.state import History
from training.run.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]


class Metadata:
    """What every file of a run says about its making.

    Args:
        config: of the run.
        frozen: the base.
        data: summary of the training split.
        global_batch: images of an optimiser step.
        total: optimiser steps of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        frozen: FrozenBase,
        data: DataSummary,
        global_batch: int,
        total: int,
    ) -> None:
        self.fixed = {
            "ss_base_model_version": frozen.base.name,
            "ss_sd_model_name": Path(config.pretrained_model_name_or_path or "").name
            or str(frozen.base.hub_id or frozen.base.name),
            "ss_v2": str(frozen.base.name == "sd21"),
            "ss_max_train_steps": str(total),
            "ss_learning_rate": str(config.learning_rate),
            "ss_lr_scheduler": config.lr_scheduler,
            "ss_lr_warmup_steps": str(config.lr_warmup_steps),
            "ss_batch_size_per_device": str(config.train_batch_size),
            "ss_total_batch_size": str(global_batch),
            "ss_gradient_accumulation_steps": str(config.gradient_accumulation_steps),
            "ss_gradient_checkpointing": str(config.gradient_checkpointing),
            "ss_optimizer": " ".join([config.optimizer_type, *config.optimizer_args]),
            "ss_max_grad_norm": str(config.max_grad_norm),
            "ss_seed": str(config.seed),
            "ss_mixed_precision": config.mixed_precision,
            "ss_min_snr_gamma": str(config.min_snr_gamma),
            "ss_noise_offset": str(config.noise_offset),
            "ss_zero_terminal_snr": str(config.zero_terminal_snr),
            "ss_caption_dropout_rate": str(config.caption_dropout_rate),
            "ss_clip_skip": str(config.clip_skip),
            "ss_max_token_length": str(config.max_token_length),
            "ss_cache_latents": str(config.cache_latents or config.cache_latents_to_disk),
            "ss_training_started_at": f"{_now():.0f}",
            "ss_output_name": config.output_name,
            "ss_dmp_method": config.method,
            "ss_dmp_version": __version__,
            "ss_dmp_config": json.dumps(without_paths(config.recorded())),
            "ss_dmp_prediction": frozen.prediction,
        }
        self.purpose = purpose_of(config, frozen)
        self.fixed |= _of_data(config, frozen, data) | own_words(config)
        revision = git_revision(ROOT)
        if revision is not None:
            self.fixed["ss_dmp_git_revision"] = revision

    def after(
        self,
        step: int,
        epoch: int,
        history: History,
        verdict: Verdict | None = None,
        strength: float | None = None,
    ) -> dict[str, str]:
        """The entries of a file written after a step; the final one has a verdict.

        Args:
            strength: that was folded in, where --choose_strength asks for it.
        """
        now = _now()
        date = datetime.datetime.fromtimestamp(now, datetime.timezone.utc)
        told = {} if verdict is None else {"ss_dmp_verdict": json.dumps(verdict.to_json())}
        return {
            **self.fixed,
            **told,
            "dmp.use": json.dumps({**self.purpose, **known_after(verdict, strength)}),
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
            "ss_dmp_validation": json.dumps(_means(history)),
            "ss_training_finished_at": f"{now:.0f}",
            "modelspec.date": date.isoformat(timespec="seconds"),
        }


def _of_data(config: TrainConfig, frozen: FrozenBase, data: DataSummary) -> dict[str, str]:
    """What a file says of the images it was trained on."""
    folders = {
        _last(row.name): {"n_repeats": row.repeats, "img_count": row.images} for row in data.subsets
    }
    buckets = [{"resolution": [r.width, r.height], "count": r.items} for r in data.buckets]
    resolution = str(config.resolution or frozen.kind.resolution)
    sides = resolution.split(",")
    return {
        "ss_enable_bucket": str(config.enable_bucket),
        "ss_resolution": resolution,
        "ss_num_train_images": str(data.images),
        "ss_dataset_dirs": json.dumps(folders),
        "ss_bucket_info": json.dumps(buckets),
        # As ModelSpec wants it, width x height.
        "modelspec.resolution": f"{sides[0]}x{sides[-1]}",
    }


def own_words(config: TrainConfig) -> dict[str, str]:
    """What the user says about the patch: title, author and so on, and the comment."""
    names = ("title", "author", "description", "tags", "license")
    found = {f"modelspec.{name}": getattr(config, f"metadata_{name}") for name in names}
    found["ss_training_comment"] = config.training_comment
    return {name: text for name, text in found.items() if text is not None}


def without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for a file that others get: of an absolute local path its last part alone.

    It says more of the machine and its user than of the patch.
    """

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(entry) for entry in value]
        if not isinstance(value, str):
            return value
        return "::".join(_last(part) for part in value.split("::"))

    return {name: short(value) for name, value in options.items()}


def _last(text: str) -> str:
    """The last part of an absolute path of any system; other text as it is."""
    path = text.removeprefix("file://")
    if PurePosixPath(path).is_absolute() or path.startswith("~"):
        return PurePosixPath(path).name or path
    windows = PureWindowsPath(path)
    return windows.name if windows.drive and windows.root else text


def _now() -> float:
    """The time, or that of SOURCE_DATE_EPOCH, with which equal runs write equal files."""
    return float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))


def git_revision(folder: Path) -> str | None:
    """The commit of a working copy, with + where files differ from it; None without git."""
    try:
        known = {"cwd": folder, "capture_output": True, "text": True, "timeout": 10}
        done = subprocess.run(["git", "rev-parse", "HEAD"], check=True, **known)  # type: ignore[call-overload]
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], check=True, **known
        )  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return str(done.stdout).strip() + ("+" if str(changed.stdout).strip() else "")


def _means(history: History) -> dict[str, Any]:
    means: dict[str, Any] = {
        str(step): sum(bins) / len(bins) for step, bins in history.validation.items()
    }
    if history.base:
        means["base"] = history.base_mean
    return means
