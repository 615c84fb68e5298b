"""Loads the frozen base that a configuration asks for, and says what it needs of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from dmp_common import Base, get_base
from dmp_common.bases.detect import require_base
from training.base import memory
from training.base.blueprint import Blueprint
from training.base.dit_folders import set_time_embedding, text_dit, text_facts
from training.base.families import dit
from training.base.families.table import family_of
from training.base.frozenbase import FrozenBase as FrozenBase  # where all others import it
from training.base.loading import Loader
from training.base.option_checks import require_fitting, require_plain_inputs
from training.base.places import Said, find_source, require_known
from training.base.precision import DTYPES
from training.base.schedulers import adjusted
from training.data.kind import DataKind
from training.options.command_line import resolve
from training.options.config import TrainConfig

_CLIP_SIZE = 768  # of CLIP-L's pooled text


def load_frozen(config: TrainConfig, said: Said | None = None) -> FrozenBase:
    """Loads the base a configuration asks for; with --base auto, whichever the weights are.

    Args:
        config: of the run.
        said: is called with a line before and after each part is loaded, `print` for example.

    Raises:
        PatchError: no weights where they should be, or those of another base.
    """
    return _assembled(config, Loader, said)


def open_base(**options: Any) -> FrozenBase:
    """Loads a base by the trainer's options, for use outside of the trainer.

    Args:
        options: as on the command line, such as base and pretrained_model_name_or_path.

    Raises:
        PatchError: no weights where they should be, or those of another base.
    """
    return load_frozen(resolve(options))


def base_kind(config: TrainConfig) -> DataKind:
    """Returns what the base of a configuration needs of its data, before any weights are read.

    It is the `kind` of what `load_frozen` loads, from configurations and shapes alone: on the hub
    only the small files are asked for.

    Raises:
        PatchError: no weights where they should be, or those of another base.
    """
    return _assembled(config, Blueprint, None).kind


def _assembled(config: TrainConfig, kind: type[Loader], said: Said | None) -> FrozenBase:
    base = find_base(config) if config.base == "auto" else get_base(config.base)
    source = find_source(config, base)
    require_known(source)
    family = family_of(base, config.first_frames).of_weights(source)
    dtype = torch.float32 if config.trains_base else DTYPES[config.mixed_precision]
    text = text_facts(Path(source.place))
    require_fitting(config, family, trained_text=text is not None)
    with kind(config, base, family, source, dtype, said) as loader:
        model = _text_dit(loader, text) if text else loader.denoiser()
        if isinstance(family, dit.DiT):
            set_time_embedding(model, Path(source.place))
        frozen = FrozenBase(
            model=model,
            scheduler=adjusted(loader.scheduler(), config),
            base=base,
            naming=require_base(model, base),
            family=family,
            vae=loader.vae() if family.vae else None,
            unconditional=config.unconditional,
            window=family.window(config),
            frames=config.frames,
            stills=config.objective == "distill",  # it learns nothing of how they move
        )
        if not family.first_frame:
            require_plain_inputs(model, frozen.channels)
        if config.text_conditional or frozen.conditioning == "caption":
            told = {"text_conditional": isinstance(family, dit.DiT)}
            loader.config = config.model_copy(update=told)
            frozen.encoders = loader.encoders()
        frozen.vision = loader.vision()
    if config.text_conditional and not dit.takes_text(model):
        encoder = frozen.encoders.get("text_encoder")
        dit.use_text(model, encoder.config.hidden_size if encoder is not None else _CLIP_SIZE)
    for part in (model, frozen.vae, *frozen.encoders.values(), *frozen.vision.values()):
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    if kind is Loader:
        time = frozen.base.times[frozen.naming].mlp
        memory.save_memory(model, time, frozen.dtype, config)
        frozen.swapped = config.blocks_to_swap or 0
    return frozen


def _text_dit(loader: Loader, text: dict[str, Any]) -> Any:
    folder = Path(loader.source.place) / loader.family.denoiser
    if isinstance(loader, Blueprint):
        return text_dit(folder, text, "meta")
    return text_dit(folder, text).to(loader.dtype)


def find_base(config: TrainConfig) -> Base:
    """The base of --base auto, from the structure of the weights.

    Raises:
        PatchError: no base fits.
    """
    from training.base.detection import detect_source

    return detect_source(find_source(config, None))
