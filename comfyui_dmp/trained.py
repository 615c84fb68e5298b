"""Files of patches that were trained in ComfyUI, and what they say of their making."""

from __future__ import annotations

import datetime
import json
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths

from comfyui_dmp import files
from comfyui_dmp.model import denoiser_of, zero_terminal_snr
from dmp_common import Patch, PatchError, __version__
from dmp_common.attach.record import LoadedPatch, PatchRecord
from dmp_common.patch.serialize import USE
from dmp_common.tools.weighttypes import weight_types

if TYPE_CHECKING:
    from comfyui_dmp.jobs import Job


def temporary(base: str, objective: str) -> Path:
    """Returns a new path in ComfyUI's temporary folder.

    Args:
        base: name of the base.
        objective: of the training.
    """
    name = f"{base}-{objective.replace(' ', '-')}-{uuid.uuid4().hex[:8]}.safetensors"
    return Path(folder_paths.get_temp_directory()) / "dmp" / name.replace("/", "-")


def metadata(job: Job, patch: Patch, before: int, done: int, rate: float) -> dict[str, str]:
    """Returns what the file of a trained patch says of its making.

    Args:
        job: what was asked for.
        patch: the trained patch.
        before: steps of the patch that the training began with.
        done: steps of this training.
        rate: its learning rate.
    """
    aim = job.aim
    exact: dict[str, Any] = {"evaluations": 1}
    if aim.guidance is not None:
        scale = [1.0, aim.guidance] if aim.dial else aim.guidance
        exact = {"evaluations": 2, "guidance_scale": scale, "timesteps": [*patch.variant.timesteps]}
    cheap: dict[str, Any] = {"evaluations": 1}
    if job.teacher is not None:
        cheap["types"] = weight_types(denoiser_of(job.model.model))
        name = file_of(job.model)
        if name is not None:
            cheap["file"] = {"name": name}
    use = {"objective": "distill", "exact": exact, "cheap": cheap, "states": "teacher"}
    rescaled = zero_terminal_snr(job.model.get_model_object("model_sampling"))
    if rescaled is not None:
        use["zero_terminal_snr"] = rescaled
    now = time.time()
    date = datetime.datetime.fromtimestamp(now, datetime.timezone.utc)
    return {
        USE: json.dumps({**use, "weights": "gap"}),
        "ss_base_model_version": patch.base.name,
        "ss_steps": str(before + done),
        "ss_max_train_steps": str(before + job.steps),
        "ss_learning_rate": f"{rate:g}",
        "ss_lr_scheduler": "cosine",
        "ss_optimizer": "torch.optim.AdamW",
        "ss_total_batch_size": str(job.at_once),
        "ss_seed": str(job.how.seed),
        "ss_training_finished_at": f"{now:.0f}",
        "ss_resolution": f"{job.size[0]},{job.size[1]}",
        "ss_gradient_checkpointing": str(job.recompute),
        "ss_dmp_method": "dmp",
        "ss_dmp_version": __version__,
        "ss_dmp_trained_in": "ComfyUI",
        "ss_dmp_pictures": str(job.pictures),
        "ss_dmp_conditionings": str(len(job.positive)),
        **({"ss_dmp_frames": str(job.length)} if job.length > 1 else {}),
        "modelspec.date": date.isoformat(timespec="seconds"),
        "modelspec.resolution": f"{job.size[0]}x{job.size[1]}",
    }


def file_of(model: Any) -> str | None:
    """Returns the name of the file that a model was loaded from; None where ComfyUI keeps none.

    Args:
        model: ComfyUI's `ModelPatcher`.
    """
    made = getattr(model, "cached_patcher_init", None) or ()
    arguments = made[1] if len(made) > 1 else ()
    paths = [value for value in arguments if isinstance(value, str)]
    return Path(paths[0]).name if paths else None


def stored(loaded: LoadedPatch, facts: dict[str, str]) -> PatchRecord:
    """Writes a trained patch to its temporary file, and returns it as it is read from there.

    Args:
        loaded: the patch, with the path of the file.
        facts: see `metadata`.
    """
    patch = loaded.patch
    assert isinstance(patch, Patch)
    patch.save(loaded.path, facts)
    return PatchRecord(LoadedPatch(Patch.load(loaded.path), loaded.path))


def saved_as(record: PatchRecord, prefix: str, words: dict[str, str]) -> Path:
    """Writes a patch into models/dmp under a new name.

    Args:
        record: the patch; its settings are not part of a file.
        prefix: the name without its number and ending, with a subfolder where wanted.
        words: more entries of the file's header.

    Returns:
        The path of the new file: the prefix, an underscore and the next free number.

    Raises:
        PatchError: the name leads out of the folder.
    """
    root = Path(folder_paths.get_folder_paths(files.FOLDER)[0]).resolve()
    cleaned = prefix.strip().replace("\\", "/").removesuffix(".safetensors")
    target = (root / cleaned).resolve()
    if not cleaned or cleaned.endswith("/") or ":" in cleaned or root not in target.parents:
        raise PatchError(
            f"expected a name inside of {files.FOLDER}, such as repair/my-model, found {prefix!r}: "
            "leave out what leads elsewhere."
        )
    found = folder_paths.get_save_image_path(cleaned, str(root))
    folder, name, counter = Path(found[0]), found[1], found[2]
    path = folder / f"{name}_{counter:05}_.safetensors"
    patch = record.loaded.patch
    assert isinstance(patch, Patch)
    patch.save(path, {**patch.metadata, **words})
    return path


def name_of(path: Path) -> str:
    """Returns the name of a saved patch as lists show it, inside of models/dmp."""
    root = Path(folder_paths.get_folder_paths(files.FOLDER)[0]).resolve()
    return str(path.resolve().relative_to(root))
