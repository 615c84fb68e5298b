"""Recognises models: which base a model is of, and by which naming."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from dmp_common.bases.base import NAMINGS, Base, Naming, Probe, find_module
from dmp_common.bases.layerfacts import attribute_of, attribute_of_shape
from dmp_common.bases.otherfamilies import Stranger
from dmp_common.bases.strangers import find_stranger, holds, stranger_of, stranger_of_pipeline
from dmp_common.bases.table import known_bases
from dmp_common.errors import PatchError

# Where pipelines and hosts keep the denoiser: diffusers, A1111 and ComfyUI, Forge.
_DENOISERS = (
    "unet",
    "transformer",
    "model.diffusion_model",
    "diffusion_model",
    "base_model.model",  # PEFT's wrapper
    "forge_objects.unet.model.diffusion_model",
)

# How ComfyUI, and hosts made from its code, name the classes of what a model predicts.
_PREDICTIONS = {
    "CONST": "flow",
    "EDM": "edm",
    "V_PREDICTION": "v_prediction",
    "X0": "sample",
    "IMG_TO_IMG": "img_to_img",
    "COSMOS_RFLOW": "cosmos_rflow",
    "EPS": "epsilon",
}

# What checkpoints put before the names of the denoiser's tensors; the last is of Cosmos and Anima.
PREFIXES = ("", "model.diffusion_model.", "net.")
_LONGEST_NAME = 300  # characters of a tensor's name


def find_denoiser(model: Any, compiled: bool = False) -> nn.Module:
    """Returns the UNet or transformer of a pipeline or of a host's model, or the model itself.

    Args:
        compiled: whether the model may be compiled already, so that it ignores hooks added later.

    Raises:
        PatchError: there is no such model, or it is compiled already.
    """
    if compiled:
        model = getattr(model, "_orig_mod", model)
    elif hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise PatchError(
            "expected a model that is not compiled yet, because hooks added to a compiled model "
            "are ignored: attach the patch first, then compile."
        )
    # Forge's own object comes last in the list but goes first: its `model` may be a placeholder.
    for path in reversed(_DENOISERS):
        found = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module) and found is not model:
            return find_denoiser(found, compiled)
    if isinstance(model, nn.DataParallel):
        raise PatchError(
            "expected a model on one device, found one in DataParallel, whose copies have no hooks "
            "of their own: use DistributedDataParallel, or attach to the model without it."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return find_denoiser(model.module, compiled)
    if isinstance(model, nn.Module):
        return model
    raise PatchError(
        f"expected a diffusion model or pipeline, found {type(model).__name__}: give a diffusers "
        "pipeline, its unet or transformer, or a host's model."
    )


def detect_base(model: Any) -> Base:
    """Returns the base of a diffusers, LDM (A1111, Forge) or ComfyUI model, by its structure.

    Raises:
        PatchError: no base fits; the message says what was seen.
    """
    require_known_pipeline(*(kind.__name__ for kind in type(model).__mro__))
    denoiser = find_denoiser(model)
    for base in known_bases():
        if naming_of(denoiser, base) is not None:
            return base
    raise PatchError(
        f"expected a model of one of the bases {', '.join(b.name for b in known_bases())}, found "
        f"{describe(denoiser)}, which is not supported: use a model of one of these bases, or add "
        "a base (CONTRIBUTING.md)."
    )


def require_known_pipeline(*names: str) -> None:
    """Refuses a pipeline whose denoiser has the structure of a base, but is another model.

    Args:
        names: of the pipeline's class, and of those that it is derived from.

    Raises:
        PatchError: it is such a pipeline.
    """
    for name in names:
        stranger = stranger_of_pipeline(name)
        if stranger is not None:
            raise PatchError(
                f"expected a pipeline of a base ({', '.join(b.name for b in known_bases())}), "
                f"found {stranger.name} ({name}), which is not supported though its denoiser has "
                "the structure of a base: load a pipeline of one of these bases."
            )


def bases_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> list[Base]:
    """Returns the bases that a checkpoint fits, judged by names and shapes of its tensors."""
    seen = _Shapes(shapes)
    prefixes = [prefix for prefix in PREFIXES if seen.stranger(prefix) is None]
    return [
        base
        for base in known_bases()
        if any(
            all(seen.fits(prefix, probe) for probe in base.probes[naming])
            and all(prefix + site.paths[naming] in seen.paths for site in base.sites)
            for naming in namings_of(base)
            for prefix in prefixes
        )
    ]


def stranger_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Stranger | None:
    """Returns the unsupported family that a checkpoint is of, or None where no known one fits."""
    seen = _Shapes(shapes)
    found = (seen.stranger(prefix) for prefix in PREFIXES)
    return next((stranger for stranger in found if stranger is not None), None)


class _Shapes:
    """What the names and shapes of a checkpoint's tensors tell of its modules."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        # A hostile name could have a million parts, and a path is listed for each of them.
        modules = {name.rpartition(".")[0] for name in shapes if len(name) <= _LONGEST_NAME}
        self.shapes, self.paths = shapes, {path[:end] for path in modules for end in _ends(path)}

    def fits(self, prefix: str, probe: Probe) -> bool:
        """Tells whether a probe holds for the model whose tensors have a prefix."""
        if probe.attribute is None:
            return (prefix + probe.path in self.paths) == probe.value
        shape = self.shapes.get(f"{prefix}{probe.path}.weight")
        return shape is not None and attribute_of_shape(probe.attribute, shape) == probe.value

    def stranger(self, prefix: str) -> Stranger | None:
        """Returns the unsupported family that fits the tensors with a prefix."""
        return find_stranger(functools.partial(self.fits, prefix))


def _ends(path: str) -> list[int]:
    """Returns where the paths of a module and of the modules around it end in its path."""
    return [place for place, letter in enumerate(path) if letter == "."] + [len(path)]


def require_base(denoiser: nn.Module, base: Base, wanted: Naming | None = None) -> Naming:
    """Returns the naming of a model, and refuses a model that is not of a base.

    Args:
        wanted: the only naming that is accepted; None accepts any.

    Raises:
        PatchError: the model is of another base, or of none.
    """
    naming = naming_of(denoiser, base)
    if naming is not None and wanted in (None, naming):
        return naming
    if naming is not None:
        raise PatchError(
            f"expected a {base.name} model whose modules have the names of {wanted}, found the "
            f"names of {naming}: load the model with the host's own loader."
        )
    others = [b.name for b in known_bases() if naming_of(denoiser, b) is not None]
    if others:
        raise PatchError(
            f"expected a model of the patch's base {base.name}, found one of base "
            f"{others[0]}: load a {base.name} model, or a patch made for this one."
        )
    raise PatchError(
        f"expected a model of the patch's base {base.name}, found "
        f"{describe(denoiser)}, which is not supported: load a {base.name} model."
    )


def prediction_of(model_sampling: object) -> str:
    """Returns what a model predicts, by the classes of its `model_sampling` (ComfyUI, reForge).

    The first known class in the order of inheritance counts. If there is none, the result is the
    name of the class itself.
    """
    own = type(model_sampling)
    names = [kind.__name__ for kind in own.__mro__ if kind.__name__ in _PREDICTIONS]
    return _PREDICTIONS[names[0]] if names else own.__name__


def naming_of(denoiser: nn.Module, base: Base) -> Naming | None:
    """Returns the naming in which a model has all probes and sites of a base, or None.

    It is None for a model of a family that only resembles the base.
    """
    for naming in namings_of(base):
        if all(holds(denoiser, probe) for probe in base.probes[naming]) and all(
            find_module(denoiser, site.paths[naming]) is not None for site in base.sites
        ):
            return naming if stranger_of(denoiser) is None else None
    return None


def namings_of(base: Base) -> list[Naming]:
    """Returns the namings that a base has; a base that users define may have one only."""
    return [
        naming
        for naming in NAMINGS
        if naming in base.probes and all(naming in site.paths for site in base.sites)
    ]


def describe(denoiser: nn.Module) -> str:
    """Describes a model of an unknown base for error messages: its family, class and some facts."""
    stranger = stranger_of(denoiser)
    if stranger is not None:
        return f"{stranger.name} ({type(denoiser).__name__})"
    facts: dict[str, None] = {}
    for base in known_bases():
        for probe in (p for naming in namings_of(base) for p in base.probes[naming]):
            module = find_module(denoiser, probe.path)
            if module is not None and probe.attribute is not None:
                value = attribute_of(module, probe.attribute)
                facts[f"{probe.path}.{probe.attribute} = {'?' if value is None else value}"] = None
    seen = "; ".join(list(facts)[:6]) or "no module of a known base"
    return f"{type(denoiser).__name__} ({seen})"
