"""Import of checkpoints of the official DMP code."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dmp_common.bases.base import Base
from dmp_common.bases.table import get_base, known_bases
from dmp_common.errors import PatchError
from dmp_common.patch.file import file_hash, modelspec, write_patch_file
from dmp_common.patch.patch import Patch
from dmp_common.patch.variant import Mix
from dmp_common.tools.unpickle import StoredTensor, TorchFile

_PROMPTS, _WEIGHT, _BIAS = "prompt_embeddings", "gate.weight", "gate.bias"
_LATENTS = (32, 64)  # height of the latents the official code trains on: 256 and 512 pixels
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def convert_official(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    base: str | Base | None = None,
    mix: Mix | None = None,
) -> Patch:
    """A patch from a checkpoint of the official code; saved as well if a target is given.

    Taken are the prompts (P, N, D) of the first P blocks and the gate (N, D+1), (N); never the
    DiT's own weights, the optimizer or `w_noise`, which only training needs. Prompts beyond the
    depth of the DiT are left out: the official code never reads them. The patch has prediction
    epsilon and frequency shift 0. Its gate sees t+y, or t where prompts are prepended; without
    gate it is prompt tuning.

    The configuration in the file stays unread, because reading it would run what the file names.
    So two things are assumed: the gate kept all prompts (`topk` 1.0, the official default; below
    it the softmax is taken over the kept ones alone, which no variant of ours does), and training
    began at zero.

    Args:
        source: the checkpoint, {"model": state dict, ...}, or a bare state dict.
        target: name of the patch file to write.
        base: needed where the file does not tell, for example without the DiT's weights.
        mix: "add" or "prepend". The file does not say: if None, prompts are added where there is
            one for each token of the DiT, as adding requires, and otherwise were prepended.

    Returns:
        The patch, float32, on the CPU, in evaluation mode. Its metadata names the source.

    Raises:
        PatchError: no such checkpoint, a damaged one, or one that leaves the base or mix open.

    Source: github.com/sangminwoo/DMP, train.py (the file) and models/DiT/models.py (the model).
    """
    official = _read(Path(source))
    spec = _find_base(official, base)
    patch = _patch(official, spec, _find_mix(official, spec, mix))
    if target is not None:
        made = {**patch.metadata, **modelspec(patch.variant, Path(target))}
        write_patch_file(target, patch.variant, patch.tensors(), made)
    return patch.eval()


@dataclass(frozen=True)
class _Official:
    """What a checkpoint holds.

    Args:
        path: of the file.
        prompts: (P, N, D), float32.
        gate: "gate.weight" (N, D+1) and "gate.bias" (N,), float32, or nothing.
        shapes: of all tensors, for what they tell about the DiT.
    """

    path: Path
    prompts: Tensor
    gate: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]

    @property
    def patch_size(self) -> int | None:
        """Of the DiT, where its weights are there."""
        shape = self.shapes.get("x_embedder.proj.weight", ())  # (D, channels, size, size)
        return shape[2] if len(shape) == 4 else None

    @property
    def depth(self) -> int | None:
        """Blocks of the DiT, where its weights are there."""
        blocks = [name.split(".")[1] for name in self.shapes if name.startswith("blocks.")]
        return max((int(i) for i in blocks if i.isdecimal()), default=-1) + 1 or None

    @property
    def tokens(self) -> int | None:
        """Image tokens the DiT was trained with, where its weights are there."""
        shape = self.shapes.get("pos_embed", ())  # (1, tokens, D)
        return shape[1] if len(shape) == 3 else None

    def fits(self, base: Base) -> bool:
        """Whether all that the checkpoint tells agrees with a base."""
        count, width, size = len(base.sites), base.sites[0].width, base.sites[0].stride
        return (
            base.labels is not None  # a DiT
            and self.prompts.shape[2] == width
            and self.patch_size in (None, size)
            and self.depth in (None, count)
            # More prompts than blocks are believed only where the file shows its blocks.
            and (self.depth is not None or len(self.prompts) <= count)
        )

    def error(self, expected: str, found: str, remedy: str) -> PatchError:
        """An error that names the file."""
        return PatchError(f"{self.path}: expected {expected}, found {found}: {remedy}.")

    def __str__(self) -> str:
        blocks, _, width = self.prompts.shape
        depth, size = self.depth or "unknown", self.patch_size or "unknown"
        return (
            f"prompts of width {width} for {blocks} blocks of a DiT (depth {depth}, "
            f"patch size {size})"
        )


def _find_base(official: _Official, base: str | Base | None) -> Base:
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
    names = ", ".join(spec.name for spec in fitting)
    if not fitting:
        remedy = "add its base with `register_base` first"
        raise official.error("a checkpoint of a known DiT", str(official), remedy)
    if len(fitting) > 1:
        raise official.error(
            "a checkpoint that tells its base", str(official), f"say base=..., one of {names}"
        )
    return fitting[0]


def _find_mix(official: _Official, base: Base, mix: Mix | None) -> Mix:
    """How the prompts meet the tokens; adding takes one prompt for each token of a square."""
    count, tokens = official.prompts.shape[1], official.tokens
    found = f"{count} prompts a block"
    if mix not in (None, "add", "prepend"):
        raise PatchError(f'expected mix to be "add" or "prepend", found {mix!r}: choose one.')
    addable = math.isqrt(count) ** 2 == count and tokens in (None, count)
    if mix is None:
        usual = [(latent // base.sites[0].stride) ** 2 for latent in _LATENTS]
        if addable and tokens is None and count not in usual:
            raise official.error(
                f"{' or '.join(map(str, usual))} prompts to add, or the DiT's own weights",
                found,
                'say mix="add" or mix="prepend", as in the training configuration',
            )
        mix = "add" if addable else "prepend"
    if mix == "add" and not addable:
        expected = f"one prompt for each of {tokens or 'a square of'} tokens, to add them"
        raise official.error(expected, found, 'leave mix out, or say mix="prepend"')
    if mix == "prepend" and not official.gate:
        # The official code has no such model: its prepending always calls the gate.
        raise official.error(
            "a gate, which prepended prompts always have",
            f"{found} and no gate",
            'say mix="add" if they were added, or get the whole file',
        )
    return mix


def _patch(official: _Official, base: Base, mix: Mix) -> Patch:
    sites = base.sites[: len(official.prompts)]
    count = official.prompts.shape[1]
    side = math.isqrt(count)
    try:
        patch = Patch.create(
            base,
            sites=len(sites),
            grid=(side, side) if mix == "add" else None,
            prompts=count,
            gate="linear" if official.gate else "none",
            mix=mix,
            condition="t+y" if mix == "add" and official.gate else "t",
            frequency_shift=0.0,
            prediction="epsilon",
        )
    except PatchError as error:
        raise PatchError(f"{official.path}: {error}") from error
    prompts = {f"prompts.{site.name}": official.prompts[i : i + 1] for i, site in enumerate(sites)}
    patch.load_tensors(prompts | official.gate)
    patch.metadata = {
        "dmp.converted_from": official.path.name,
        "dmp.converted_hash": file_hash(official.path),
    }
    return patch


def _read(path: Path) -> _Official:
    """The learned values of a checkpoint, and the shapes of all its tensors."""
    with TorchFile(path) as file:
        tensors = _state_dict(file.contents())
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        names = [name for name in (_PROMPTS, _WEIGHT, _BIAS) if name in tensors]
        wrong = _wrong_shapes(shapes)
        values = {} if wrong else {name: file.values(tensors[name]) for name in names}
    for name, value in values.items():
        if not value.isfinite().all():
            wrong = f"NaN or infinity in {name}"
    if wrong:
        raise PatchError(
            f"{path}: expected {_PROMPTS} (blocks, N, D) and either {_WEIGHT} (N, D+1) with "
            f"{_BIAS} (N,) or no gate, all finite, found {wrong}: choose a checkpoint that the "
            "official code trained with prompts (full fine-tuning has none)."
        )
    return _Official(path, values.pop(_PROMPTS), values, shapes)


def _wrong_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    """What is wrong with the learned tensors; empty if nothing is."""
    prompts = shapes.get(_PROMPTS)
    if prompts is None:
        return f"{', '.join(list(shapes)[:3]) or 'no tensors'}"[:200] + " and no prompts"
    gate = {name: shapes[name] for name in (_WEIGHT, _BIAS) if name in shapes}
    if len(prompts) == 3 and 0 not in prompts:
        _, count, width = prompts
        if gate in ({}, {_WEIGHT: (count, width + 1), _BIAS: (count,)}):
            return ""
    return f"{_PROMPTS} of shape {prompts} with {gate or 'no gate'}"


def _state_dict(contents: object) -> dict[str, StoredTensor]:
    """The tensors of {"model": state dict, ...} or a bare state dict, without prefixes."""
    if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
        contents = contents["model"]
    tensors = {}
    for name, value in contents.items() if isinstance(contents, dict) else ():
        if isinstance(name, str) and isinstance(value, StoredTensor):
            while name.startswith(_PREFIXES):
                name = name.partition(".")[2]
            tensors[name] = value
    return tensors
