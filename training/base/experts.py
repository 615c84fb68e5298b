"""The expert that a run trains on, of a pipeline with two (Wan 2.2 A14B)."""

from __future__ import annotations

from pathlib import Path

import diffusers

from dmp_common import Base, PatchError
from training.base.places import Source, explained
from training.options.config import TrainConfig

_SECOND = "transformer_2"  # the folder of the expert for low noise; the other has the usual one
_PAIR = "A14B"  # in the names of repositories with both


def denoiser_folder(config: TrainConfig, base: Base, source: Source, usual: str) -> str:
    """Returns the folder of the denoiser in a pipeline.

    Args:
        config: of the run.
        base: of the weights.
        source: of the weights.
        usual: the folder in pipelines with one denoiser.

    Raises:
        PatchError: the pipeline has two experts, and none is chosen; or the one for low noise is
            chosen and there is none.
    """
    if base.switch is None or source.kind != "pipeline":
        return usual
    second = _has_second(source.place, base.hub_id)
    if second and config.expert is None:
        raise PatchError(
            f"expected --expert high or low for the two experts in {source.place}, found none: "
            "choose the one to train on; each takes a patch of its own."
        )
    if config.expert == "low" and not second:
        raise PatchError(
            f"expected a pipeline with {_SECOND} for --expert low, found none in {source.place}: "
            "name one with two experts, or leave --expert out."
        )
    return _SECOND if config.expert == "low" else usual


def require_expert(config: TrainConfig, base: Base, source: Source) -> None:
    """Refuses a wrong expert where that can be told without asking the hub.

    Raises:
        PatchError: see `denoiser_folder`.
    """
    if source.place == base.hub_id or source.is_here:
        denoiser_folder(config, base, source, "")


def _has_second(place: str, usual: str | None) -> bool:
    if Path(place).is_dir():
        return (Path(place) / _SECOND).is_dir()
    if place == usual:
        return _PAIR in place
    with explained("a pipeline", place, "--pretrained_model_name_or_path"):
        return bool((diffusers.DiffusionPipeline.load_config(place).get(_SECOND) or [None])[0])
