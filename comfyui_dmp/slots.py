"""Fills the slots by which ComfyUI's models take a patch, for one call of a model.

Nothing here outlives the call, so that nothing can leak into another branch of a workflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch.nn as nn
from torch import Tensor

from dmp_common import Base, Context, PatchError
from dmp_common.attach.masking import MaskedContext
from dmp_common.bases.base import find_module

Slot = Literal["unet", "dit", "after", "hooks", "outputs"]
AnyContext = Context | MaskedContext
Prepare = Callable[[Tensor], AnyContext]  # from the time embeddings of items or frames (R, E)

# The models that error messages name as supported. A new base is added here and below.
SUPPORTED = (
    "SD 1.x, SD 2.x, SDXL base (and their inpainting models), DiT (ComfyUI_ExtraModels), "
    "PixArt, SD 3, SD 3.5, Flux.1, Flux.2, Qwen-Image, Z-Image, Lumina 2, "
    "Chroma, ERNIE-Image, Krea 2, Anima, Wan 2.1, Wan 2.2, AuraFlow (Pony V7), HunyuanImage 2.1"
)
# The kind of slot, by the first part of the blocks' paths in the naming "ldm".
_SLOTS: dict[str, Slot] = {
    "input_blocks": "unet",
    "middle_block": "unet",
    "output_blocks": "unet",
    "joint_blocks": "dit",
    "double_blocks": "dit",
    "single_blocks": "dit",
    "double_layers": "dit",
    "single_layers": "dit",
    "transformer_blocks": "dit",
    "layers": "after",
    "blocks": "hooks",
}
# Families whose blocks have the path of a family with another slot, by their architecture.
_OWN_SLOTS: dict[str, Slot] = {"ernie-image": "hooks", "wan": "dit"}
# ComfyUI's key for the joint blocks of SD3, the blocks of Qwen-Image and Wan, Flux's double blocks.
_BLOCKS = dict.fromkeys(
    ("joint_blocks", "transformer_blocks", "double_blocks", "blocks"), "double_block"
)
_BLOCKS["single_blocks"] = "single_block"
_BLOCKS |= {"double_layers": "double_block", "single_layers": "single_block"}
_REFINER = "noise_refiner"
_AFTER_SKIP, _OUTPUT, _EMBEDDING = "input_block_patch_after_skip", "output_block_patch", "emb_patch"


def slot_of(base: Base, modulates: bool = False) -> Slot:
    """Returns the kind of slot that ComfyUI has for a patch on the models of a base.

    Args:
        modulates: whether the patch changes outputs of modules, which no model has a slot for.

    Raises:
        PatchError: no kind of slot is known for it.
    """
    blocks = base.sites[0].paths["ldm"].split(".")[0]
    if blocks not in _SLOTS:
        raise PatchError(
            f"expected a base whose blocks are one of {', '.join(_SLOTS)} in ComfyUI, found base "
            f"{base.name} with {blocks}: use it in diffusers, or add its slot to "
            "comfyui_dmp/slots.py."
        )
    return "outputs" if modulates else _OWN_SLOTS.get(base.architecture, _SLOTS[blocks])


def block_keys(base: Base) -> dict[tuple[str, int], str]:
    """Returns ComfyUI's name of the slot of each site: the block before it, or the block itself.

    A UNet's encoder patch runs after a block, so it changes the input of the next one;
    `transformer_options["block"]` then names the block before the site. Patches of Lumina 2 and
    Z-Image also run after a block; the first block follows the last (-1) of the noise refiners.

    >>> from dmp_common import get_base
    >>> keys = block_keys(get_base("sd15"))
    >>> keys["input", 0], keys["input", 11], keys["output", 0]
    ('in.1', 'mid', 'out.0')
    """
    encoder = [site for site in base.sites if site.paths["ldm"].startswith("input_blocks")]
    keys: dict[tuple[str, int], str] = {}
    for site in base.sites:
        kind, *rest = site.paths["ldm"].split(".")
        if kind == "input_blocks":
            keys["input", int(rest[0]) - 1] = site.name
        elif kind == "middle_block":
            keys["input", len(encoder)] = site.name
        elif kind == "output_blocks":
            keys["output", int(rest[0])] = site.name
        elif kind == "layers":
            number = int(rest[0])
            keys["double_block" if number else _REFINER, number - 1] = site.name
        else:
            keys[_BLOCKS.get(kind, kind), int(rest[0])] = site.name
    return keys


def unet_options(
    options: Mapping[str, Any], sites: Mapping[tuple[str, int], str], prepare: Prepare
) -> dict[str, Any]:
    """Returns a copy of a call's options in which a patch acts on a UNet.

    Our embedding patch comes first, so that it sees the pure time embedding; our block patches
    come last, after FreeU and deep shrink, whatever the order of the nodes.

    Args:
        options: `transformer_options` of the call; not changed.
        sites: see `block_keys`.
        prepare: makes the call's context.
    """
    context: AnyContext | None = None

    def embedded(emb: Tensor, channels: int, options: dict[str, Any]) -> Tensor:
        nonlocal context
        context = prepare(emb)
        return emb

    def add(h: Tensor, options: dict[str, Any]) -> Tensor:
        site = sites.get(options["block"])
        if site is None:
            return h
        if context is None:
            raise PatchError(
                "expected the UNet to embed its timestep before its first block, and it did not: "
                "another extension replaces its forward; switch that off, or the patch."
            )
        return context.add(site, h)

    def add_beside_skip(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return add(h, options), skip

    patches = dict(options.get("patches", {}))
    patches[_EMBEDDING] = [embedded, *patches.get(_EMBEDDING, ())]
    patches[_AFTER_SKIP] = [*patches.get(_AFTER_SKIP, ()), add]
    patches[_OUTPUT] = [*patches.get(_OUTPUT, ()), add_beside_skip]
    return {**options, "patches": patches}


def dit_options(
    options: Mapping[str, Any], sites: Mapping[tuple[str, int], str], context: AnyContext
) -> dict[str, Any]:
    """Returns a copy of a call's options in which a patch acts on a transformer's block inputs.

    Replacements by other nodes stay. Ours goes between them and the block, so that a skipped block
    gets no prompts, and other nodes change the input before the prompts are added.
    """
    replace = dict(options.get("patches_replace", {}))
    blocks = dict(replace.get("dit", {}))
    for key, site in sites.items():
        blocks[key] = _adding(context, site, blocks.get(key))
    replace["dit"] = blocks
    return {**options, "patches_replace": replace}


def after_options(
    options: Mapping[str, Any],
    sites: Mapping[tuple[str, int], str],
    context: AnyContext,
    refiners: int,
) -> dict[str, Any]:
    """Returns a copy of a call's options in which a patch acts after blocks, before the next ones.

    Ours come last, after other nodes have changed a block's output.

    Args:
        options: `transformer_options` of the call; not changed.
        sites: see `block_keys`.
        context: the call's context.
        refiners: the number of the model's blocks that refine the noise.
    """

    def adding(kind: str, first: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def add(args: dict[str, Any]) -> dict[str, Any]:
            site = sites.get((kind, args["block_index"] - first))
            return {} if site is None else {"img": context.add(site, args["img"])}

        return add

    patches = dict(options.get("patches", {}))
    for kind, first in ((_REFINER, refiners), ("double_block", 0)):
        patches[kind] = [*patches.get(kind, ()), adding(kind, first)]
    return {**options, "patches": patches}


def _adding(
    context: AnyContext, site: str, previous: Callable[..., Any] | None
) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    def replace(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        def block(args: dict[str, Any]) -> Any:
            return extra["original_block"]({**args, "img": context.add(site, args["img"])})

        return (
            block(args) if previous is None else previous(args, {**extra, "original_block": block})
        )

    return replace


def module_at(denoiser: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path of a denoiser.

    Raises:
        PatchError: the denoiser has no such module.
    """
    module = find_module(denoiser, path)
    if module is None:
        raise PatchError(
            f"expected a module {path} in a {type(denoiser).__name__}, found none: use ComfyUI's "
            "own loader of this model, or update."
        )
    return module
