"""A family in small as the trainer's tests take it: what is around its tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn
from torch import Tensor

from training.base.families.family import Family


@dataclass(frozen=True)
class Trained:
    """What the tests of the trainer must know of a family besides its tiny model.

    Args:
        family: of the trainer, whose images have sides that are multiples of four pixels here.
        encoders: by folder, makes a text encoder of (the size of the vocabulary).
        options: of the command line, which the family needs besides its name.
        shifted: whether the usual tiny VAE shifts its latents.
        vae: makes another VAE; None for the usual tiny one.
        scheduler: arguments of the scheduler of a flow model.
        tokens: by folder of a text encoder, words that its tokenizer reads; 512 elsewhere.
        original: from the denoiser's tensors in diffusers to those in single files; None where
            there is no test of single files.
        in_file: by folder, what single files put before the names of a text encoder's tensors.
        length: whether the pipeline takes `max_sequence_length`.
        guided: arguments that the pipeline takes besides the prompt where it guides.
        side: of a picture in pixels, where the pipeline takes another VAE for granted.
        told: makes the pipeline guide by a scale; returns the argument that says it, if any. None:
            `guidance_scale`.
        resumed: whether its caches and a resumed run are tried: not where they are those of another
            family.
    """

    family: Family
    encoders: Mapping[str, Callable[[int], nn.Module]]
    options: Mapping[str, str] = field(default_factory=dict)
    shifted: bool = False
    vae: Callable[[], nn.Module] | None = None
    scheduler: Mapping[str, Any] = field(default_factory=lambda: {"shift": 3.0})
    tokens: Mapping[str, int] = field(default_factory=dict)
    original: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    in_file: Mapping[str, str] = field(default_factory=dict)
    length: bool = True
    guided: Mapping[str, Any] = field(default_factory=dict)
    side: int | None = None
    told: Callable[[Any, float], dict[str, Any]] | None = None
    resumed: bool = True
