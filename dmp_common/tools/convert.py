"""Imports checkpoints of the official DMP code."""

from __future__ import annotations

import math
import os
from pathlib import Path

from dmp_common.bases.base import Base
from dmp_common.bases.table import get_base, known_bases
from dmp_common.errors import PatchError, printable, printable_path
from dmp_common.patch.choices import Mix
from dmp_common.patch.file import PatchContents, file_hash
from dmp_common.patch.variant import Variant
from dmp_common.tools.official import Checkpoint, read_checkpoint

_LATENTS = (32, 64)  # heights of latents in the official training: 256 and 512 pixels


def read_official(
    source: str | os.PathLike[str],
    *,
    base: str | Base | None = None,
    mix: Mix | None = None,
) -> PatchContents:
    """Reads what a patch file would hold from a checkpoint of the official code.

    The patch gets the prompts (P, N, D) of the first P blocks and the gate (N, D+1), (N). It never
    gets the DiT's own weights, the optimizer or `w_noise`, which only training needs. Prompts
    beyond the depth of the DiT are left out, because the official code never reads them. The patch
    has prediction epsilon and frequency shift 0. Its gate sees t+y, or t where prompts are
    prepended; a patch without gate is prompt tuning.

    How the prompts were used is read from the configuration in the file. If there is none, the
    gate is assumed to have kept all prompts (`topk` 1.0, the official default), and `mix` must be
    given if the file fits both added and prepended prompts.

    Args:
        source: the checkpoint, {"model": state dict, ...}, or a bare state dict.
        base: the base; needed if the file does not show it, for example without the DiT's weights.
        mix: "add" or "prepend"; needed if the file does not show it.

    Returns:
        Variant, tensors (float32, on the CPU), and metadata that names the source.

    Raises:
        PatchError: the file is not such a checkpoint, is damaged, or does not show the base or mix;
            or no patch equals it, because its gate kept a part of the prompts (`topk` below 1), or
            prompts were prepended to the first blocks alone (the official code carries their
            outputs on through the other blocks).

    Source: github.com/sangminwoo/DMP, train.py (the file), config/ (the names of the options) and
    models/DiT/models.py (the model).
    """
    official = read_checkpoint(Path(source))
    spec = _find_base(official, base)
    _require_same_base(official, spec)
    mix = _find_mix(official, spec, mix)
    _require_exact(official, spec, mix)
    return _contents(official, spec, mix)


def _find_base(official: Checkpoint, base: str | Base | None) -> Base:
    if base is not None:
        spec = get_base(base) if isinstance(base, str) else base
        if not official.fits(spec):
            site = spec.sites[0]
            raise official.error(
                f"a checkpoint of base {spec.name} (width {site.width}, depth {len(spec.sites)}, "
                f"patch size {site.stride}, class labels)",
                str(official),
                "name the base of this checkpoint",
            )
        return spec
    fitting = [spec for spec in known_bases() if official.fits(spec)]
    fitting = [spec for spec in fitting if spec.name == official.base_name] or fitting
    names = ", ".join(spec.name for spec in fitting)
    if not fitting:
        remedy = "add its base with `register_base` first"
        raise official.error("a checkpoint of a known DiT", str(official), remedy)
    if len(fitting) > 1:
        raise official.error(
            "a checkpoint that shows its base", str(official), f"give base=..., one of {names}"
        )
    return fitting[0]


def _require_same_base(official: Checkpoint, base: Base) -> None:
    told = official.base_name
    if told != base.name and told in {known.name for known in known_bases()}:
        raise official.error(
            f"a checkpoint of base {base.name}",
            f"{told} in its configuration",
            "name the base of this checkpoint, or leave it out",
        )


def _find_mix(official: Checkpoint, base: Base, mix: Mix | None) -> Mix:
    """Returns how prompts meet tokens; to be added, they must be one for each token of a square."""
    if mix not in (None, "add", "prepend"):
        raise PatchError(f'expected mix to be "add" or "prepend", found {mix!r}: choose one.')
    told = official.options.mix
    if mix is not None and told not in (None, mix):
        raise official.error(
            f"prompts to {mix}", f"a configuration that says {told}", "leave mix out"
        )
    count, tokens = official.prompts.shape[1], official.tokens
    found = f"{count} prompts a block"
    addable = math.isqrt(count) ** 2 == count and tokens in (None, count)
    chosen = mix or told or _only_mix(official, base, addable)
    if chosen == "add" and not addable:
        expected = f"one prompt for each of {tokens or 'a square of'} tokens, to add them"
        raise official.error(expected, found, 'leave mix out, or give mix="prepend"')
    if chosen == "prepend" and not official.gate:
        # The official code has no such model: its prepending always calls the gate.
        raise official.error(
            "a gate, which prepended prompts always have",
            f"{found} and no gate",
            'give mix="add" if they were added, or get the whole file',
        )
    return chosen


def _only_mix(official: Checkpoint, base: Base, addable: bool) -> Mix:
    """Returns the mix of a checkpoint without configuration, if only one is possible."""
    if not addable:
        return "prepend"
    count, tokens = official.prompts.shape[1], official.tokens
    usual = [(latent // base.sites[0].stride) ** 2 for latent in _LATENTS]
    if not official.gate and (tokens is not None or count in usual):
        return "add"
    raise official.error(
        "a checkpoint that shows whether its prompts were added or prepended",
        f"{count} prompts a block and no training configuration",
        'give mix="add" or mix="prepend" (on the command line --mix), as it was trained',
    )


def _require_exact(official: Checkpoint, base: Base, mix: Mix) -> None:
    """Refuses checkpoints that no patch can equal, and those that contradict themselves."""
    blocks, count, _ = official.prompts.shape
    options = official.options
    for told, held, what in (
        (options.prompts, count, "prompts a block (num_tokens)"),
        (options.blocks, blocks, "blocks with prompts (pt_depth)"),
        (options.gates, len(official.gate) // 2, "gate (gate_type)"),
    ):
        if told not in (None, held):
            raise official.error(
                f"{told} {what}, as the configuration in it says",
                str(held),
                "get the checkpoint again",
            )
    kept = count if options.topk is None else int(options.topk * count)
    if official.gate and kept < count:
        raise official.error(
            "a gate that keeps all prompts (topk 1.0)",
            f"topk {options.topk:g}, whose softmax over {kept} of {count} prompts no variant has",
            "train with topk 1.0, or convert a checkpoint that was",
        )
    if mix == "prepend" and blocks < len(base.sites):
        raise official.error(
            f"prompts prepended to all {len(base.sites)} blocks",
            f"those of the first {blocks}, whose outputs the official code carries on through the "
            "other blocks, which no variant does",
            "train with pt_depth of all blocks, or convert a checkpoint that was",
        )


def _contents(official: Checkpoint, base: Base, mix: Mix) -> PatchContents:
    sites = base.sites[: len(official.prompts)]
    count = official.prompts.shape[1]
    side = math.isqrt(count)
    try:
        variant = Variant.create(
            base,
            sites=len(sites),
            grid=(side, side) if mix == "add" else None,
            prompts=count,
            gate="linear" if official.gate else "none",
            mix=mix,
            condition="t+y" if mix == "add" and official.gate else "t",
            prompt_init=official.options.init,
            gate_init=official.options.init if official.gate else "zero",
            frequency_shift=0.0,
            prediction="epsilon",
        )
    except PatchError as error:
        raise PatchError(f"{printable_path(official.path)}: {error}") from error
    prompts = {f"prompts.{site.name}": official.prompts[i : i + 1] for i, site in enumerate(sites)}
    metadata = {
        "dmp.converted_from": printable(official.path.name),
        "dmp.converted_hash": file_hash(official.path),
    }
    return PatchContents(variant, prompts | official.gate, metadata)
