"""Which options fit a base: all that do not are listed at once, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from dmp_common import Base, PatchError, get_base
from dmp_common.bases.wan import nearest_frames
from training.base.dit_folders import text_facts
from training.base.families.dit import DiT
from training.base.families.family import Family
from training.base.families.table import family_of
from training.base.places import find_source
from training.base.vae_files import READERS
from training.options.config import TrainConfig
from training.options.problems import ConfigError

_CAPTION = 512  # tokens, in the attention of Wan 2.1's model of picture to video


def weights_warnings(config: TrainConfig, family: Family) -> list[str]:
    """What a user should know of the weights; none of it stops a run.

    Args:
        config: of the run.
        family: of the base, with what its weights tell.
    """
    if config.objective == "distill" or not family.distilled:
        return []
    return [
        f"the weights of base {config.base} are distilled to draw in a few steps, and --objective "
        f"{config.objective} trains them as if they were not, which can undo it: "
        f"{_before(family)}; a patch that is trained on those runs on both."
    ]


def _before(family: Family) -> str:
    return f"name those from before the distillation, such as {family.undistilled}"


def told_family(config: TrainConfig, base: Base) -> Family:
    """The family of a base, with what can be told of its weights without asking the hub.

    Raises:
        PatchError: the trainer knows none, or none that is told of first frames.
    """
    family = family_of(base, config.first_frames)
    try:
        source = find_source(config, base)
    except PatchError:  # it has a sentence of its own
        return family
    if source.is_here:
        return family.of_weights(source)
    # Another repository says by itself whether its weights are distilled, when it is asked.
    return family.of_name(source.name) if source.place == base.hub_id else family


def require_options(config: TrainConfig) -> None:
    """Refuses options that the base cannot do, from the options and this disk alone.

    Raises:
        PatchError: one line for each problem.
    """
    base = get_base(config.base)
    place = config.pretrained_model_name_or_path
    text = None if place is None else text_facts(Path(place).expanduser())
    require_fitting(config, told_family(config, base), trained_text=text is not None)


def require_fitting(config: TrainConfig, family: Family, trained_text: bool) -> None:
    """Refuses options that the base cannot do.

    Args:
        config: of the run.
        family: of the base.
        trained_text: whether the base is a DiT with a text embedding.

    Raises:
        PatchError: one line for each problem.
    """
    problems = [
        *_about_conditions(config, family, trained_text),
        *_about_frames(config, family),
        *_about_files(config, family),
        *_about_memory(config, family),
        *_about_student(config),
    ]
    if problems:
        raise ConfigError(*problems)


def require_plain_inputs(model: Any, channels: int) -> None:
    """Refuses a model that takes another picture beside the noisy one.

    Args:
        model: the denoiser, of diffusers.
        channels: of a latent.

    Raises:
        PatchError: the model has other input channels than the latent, as it is or in patches of
            two by two cells.
    """
    found = int(model.config.in_channels)
    if found not in (channels, 4 * channels):
        raise PatchError(
            f"expected a model that takes the noisy picture alone, in {channels} channels, found "
            f"one with {found} input channels, as models for inpainting and Fill have: train on "
            "the base that it was made from; such a patch runs on both."
        )


def _about_frames(config: TrainConfig, family: Family) -> list[str]:
    problems, stride = [], family.frame_stride
    near = nearest_frames(config.frames, stride)
    if config.frames > 1 and stride == 1:
        problems.append(
            f"expected --frames 1 with base {config.base}, which draws pictures, found "
            f"{config.frames}: leave it out, or choose a base of videos, such as wan-1.3b."
        )
    elif config.frames != near:
        problems.append(
            f"expected --frames of one and a multiple of {stride}, of which the VAE makes one "
            f"frame, found {config.frames}: the nearest is {near}."
        )
    if family.first_frame and config.frames == 1:
        problems.append(
            f"expected --frames with base {config.base}, which goes on from a picture, found 1: "
            "name the number of frames that its videos have, such as 81."
        )
    if family.first_frame and config.state_captions is not None:
        problems.append(
            f"expected pictures with captions for base {config.base}, which are the first frames "
            "of its videos, found --state_captions: give --train_data_dir in its place."
        )
    if family.vision and config.t5_max_token_length not in (None, _CAPTION):
        problems.append(
            f"expected captions of {_CAPTION} tokens for base {config.base}, whose attention takes "
            f"that for granted, found --t5_max_token_length {config.t5_max_token_length}: leave it "
            "out."
        )
    return problems


def _about_conditions(config: TrainConfig, family: Family, trained_text: bool) -> list[str]:
    problems = []
    is_dit = isinstance(family, DiT)
    if config.text_conditional and not is_dit:
        problems.append(
            f"expected --text_conditional with a DiT only, found base {config.base}, which takes "
            "captions anyway: leave it out."
        )
    elif config.text_conditional and not trained_text and not config.trains_base:
        problems.append(
            "expected a DiT whose text embedding is trained, found one for classes: train it with "
            "--text_conditional --method full first, then name that folder as "
            "--pretrained_model_name_or_path."
        )
    chosen = {
        "--teacher_guidance_scale": config.teacher_guidance_scale is not None,
        "--state_guidance_scale": config.state_guidance_scale != 1.0,
    }
    asked = " and ".join(name for name, on in chosen.items() if on)
    if asked and family.distilled:
        problems.append(
            f"expected weights that draw with guidance for {asked}, found weights of base "
            f"{config.base} that are distilled and draw without: {_before(family)}, or leave it "
            "out."
        )
    if config.unconditional and not is_dit:
        problems.append(
            f"expected --unconditional with a DiT only, found base {config.base}: leave it out; "
            "--caption_dropout_rate 1 trains on empty captions."
        )
    return problems


def _about_files(config: TrainConfig, family: Family) -> list[str]:
    problems = []
    if config.vae is not None and config.ae is not None and config.vae != config.ae:
        problems.append(
            f"expected one VAE, found --vae {config.vae} and --ae {config.ae}, which mean the "
            "same: leave one out."
        )
    vae = config.vae or config.ae
    readers = (*SINGLE_FILE_LOADABLE_CLASSES, *READERS)
    if vae is not None and Path(vae).expanduser().is_file() and family.autoencoder not in readers:
        problems.append(
            f"expected a diffusers folder or hub id with --vae for base {config.base}, found the "
            f"file {vae}: diffusers reads no single files of its VAE."
        )
    wanted = {"clip_l": config.clip_l, "clip_g": config.clip_g, "t5xxl": config.t5xxl}
    if "text_encoder" in family.files.values():
        wanted["text_encoder"] = config.text_encoder
    known = ", ".join(f"--{option}" for option in family.files.values()) or "none"
    for option, file in wanted.items():
        if file is None:
            continue
        if option not in family.files.values():
            problems.append(
                f"expected files of the text encoders that base {config.base} has ({known}), "
                f"found --{option}: leave it out."
            )
        elif not Path(file).expanduser().is_file():
            problems.append(
                f"expected a file for --{option}, found nothing at {file}: check the path."
            )
    return problems


def _about_memory(config: TrainConfig, family: Family) -> list[str]:
    chosen = {
        "--fp8_base": config.fp8_base,
        "--int8_base": config.int8_base,
        "--blocks_to_swap": bool(config.blocks_to_swap),
    }
    names = [name for name, on in chosen.items() if on]
    asked = " and ".join(names)
    problems = []
    if names and config.method not in ("dmp", "prompt"):
        problems.append(
            f"expected --method dmp or prompt with {asked}, which keep the weights of the base "
            f"frozen, found --method {config.method}: leave {asked} out."
        )
    if names and config.fsdp:
        problems.append(f"expected no --fsdp with {asked}, found it: leave one of them out.")
    if config.torch_compile and (config.fp8_base or config.blocks_to_swap):
        problems.append(
            f"expected no --torch_compile with {asked}, because the weights change while the model "
            "runs, found it: leave one of them out."
        )
    if config.int8_base and len(names) > 1:
        problems.append(f"expected --int8_base alone, found {asked}: leave the others out.")
    if config.blocks_to_swap and family.denoiser != "transformer":
        problems.append(
            f"expected a transformer with --blocks_to_swap, found base {config.base}, a UNet: use "
            "--fp8_base and --gradient_checkpointing."
        )
    return problems


def _about_student(config: TrainConfig) -> list[str]:
    chosen = {
        "--student_weights": config.student_weights,
        "--student_quantization": config.student_quantization,
    }
    names = [name for name, value in chosen.items() if value is not None]
    if not names:
        return []
    problems, asked = [], " and ".join(names)
    if len(names) > 1:
        problems.append(f"expected one cheap model, found {asked}: leave one of them out.")
    file = config.student_weights
    if file is not None and not Path(file).expanduser().is_file():
        problems.append(
            f"expected a file for --student_weights, found nothing at {file}: check the path."
        )
    rounded = (config.student_quantization or "").startswith("rtn")
    if config.trains_base and not rounded:
        problems.append(
            f"expected --method dmp, prompt or lora with {asked}, whose weights are stored in a "
            f"form that cannot be trained, found --method {config.method}: choose one of these, or "
            "--student_quantization rtn2 to rtn8."
        )
    if config.torch_compile and config.student_quantization == "fp8":
        problems.append(
            f"expected no --torch_compile with {asked} fp8, because the weights change while the "
            "model runs, found it: choose fp8-scaled, or leave it out."
        )
    placed = {"--blocks_to_swap": bool(config.blocks_to_swap), "--fsdp": config.fsdp}
    others = [name for name, on in placed.items() if on]
    if others:
        problems.append(
            f"expected no {' and '.join(others)} with {asked}, because two models share weights "
            "then, found it: leave it out."
        )
    return problems
