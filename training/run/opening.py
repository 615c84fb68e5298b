"""The data of a run, and what of its options depends on them."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from dmp_common import PatchError
from training.base.frozen import base_kind
from training.data.batch import Data
from training.data.build import open_splits
from training.data.sources.caption_lines import open_captions
from training.options.config import TrainConfig
from training.run.scale import accumulation
from training.run.telling import Telling
from training.run.validation import MOST, automatic_share, automatic_steps

IMAGE_CACHES = ("cache_latents", "cache_latents_to_disk")
TEXT_CACHES = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")


def open_run(
    config: TrainConfig, accelerator: Accelerator, tell: Telling
) -> tuple[TrainConfig, Data, Data | None]:
    """Training and held-out images, and the configuration with what depends on their number.

    Raises:
        PatchError: no data, or too few of them for what the options ask.
    """
    chosen = config
    if config.dry_run:  # looks at the data, does not encode all of it
        chosen = config.model_copy(update=dict.fromkeys((*IMAGE_CACHES, *TEXT_CACHES), False))
    kind = base_kind(config)
    data: Data
    held_out: Data | None
    if config.needs_no_pictures:
        data, held_out = open_captions(chosen, config.state_captions, kind, config.seed)
    else:
        data, held_out = open_splits(chosen, kind, seed=config.seed, share=automatic_share)
    world = accelerator.num_processes
    tell.say(data.summary().text(config.train_batch_size * world, world))
    config = _resolved(config, data, accelerator)
    every = (config.validate_every_n_steps, config.validate_every_n_epochs)
    if held_out is not None and not any(every):
        images = min(held_out.size or MOST, config.max_validation_images or MOST)
        per_step = config.train_batch_size * world * config.gradient_accumulation_steps
        steps = automatic_steps(config, images, per_step)
        config = config.model_copy(update={"validate_every_n_steps": steps})
    elif held_out is None:
        if "keep_best" not in config.model_fields_set:  # a recipe's wish
            config = config.model_copy(update={"keep_best": False})
        if any(every) or config.keep_best or config.choose_strength:
            raise PatchError(
                "expected images for validation with --validate_every_n_steps, "
                "--validate_every_n_epochs, --keep_best or --choose_strength, found too few to "
                "hold any out: give --validation_split, for example 0.1, or leave these out."
            )
        tell.say("no validation: too few images to hold any out, or --validation_split 0")
    return config, data, held_out


def _resolved(config: TrainConfig, data: Data, accelerator: Accelerator) -> TrainConfig:
    """The configuration with accumulation and number of steps as they will be."""
    micro_steps = accumulation(config, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = micro_steps
    at_once = config.train_batch_size * accelerator.num_processes
    changes: dict[str, Any] = {"gradient_accumulation_steps": micro_steps}
    if config.global_batch_size is not None:
        changes["global_batch_size"] = at_once * micro_steps
    if config.max_train_epochs is not None:
        batches = data.batches_per_epoch(at_once, accelerator.num_processes)
        if batches is None:
            raise PatchError(
                "expected --max_train_steps for data whose number of images is unknown, found "
                "--max_train_epochs: give the steps."
            )
        changes["max_train_steps"] = -(-batches * config.max_train_epochs // micro_steps)
    return config.model_copy(update=changes)
