"""Reads what a checkpoint of the official DMP code holds: learned values, shapes, and its options.

The official trainer stores its configuration as omegaconf objects. No code of omegaconf runs here:
an inert object with plain attributes stands for each of them. A container keeps its entries in
`_content`, a leaf its value in `_val`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmp_common.bases.base import Base
from dmp_common.errors import PatchError, file_error, printable
from dmp_common.patch.choices import Init, Mix
from dmp_common.tools.pickles import Opaque, StoredTensor
from dmp_common.tools.unpickle import TorchFile

_PROMPTS, _WEIGHT, _BIAS = "prompt_embeddings", "gate.weight", "gate.bias"
_OTHERS = ("gate.", "prompt_proj.")  # tensors of unpublished versions: other gates, projections
_BLOCK_NAME = re.compile(r"blocks\.([0-9]{1,4})\.")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_MIXES: dict[str, Mix] = {"add": "add", "prepend": "prepend"}
_INITS: dict[str, Init] = {"zero": "zero", "random": "random"}
_MISSING = object()


@dataclass(frozen=True)
class Options:
    """What a configuration says about the prompts. An option that it does not have is None.

    Args:
        model: the name of the DiT, such as "DiT-XL/2".
        mix: whether prompts are added to the tokens or prepended to them.
        prompts: the number of prompts N.
        blocks: the number of first blocks that have prompts; may exceed the depth of the DiT.
        topk: the share of the prompts that the gate keeps.
        gates: the number of gates, 1 or 0.
        init: how the values were initialised; without the option "zero", the official default.
    """

    model: str | None = None
    mix: Mix | None = None
    prompts: int | None = None
    blocks: int | None = None
    topk: float | None = None
    gates: int | None = None
    init: Init = "zero"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint of the official code holds.

    Args:
        path: the file.
        prompts: the prompts (P, N, D), float32.
        gate: "gate.weight" (N, D+1) and "gate.bias" (N,), float32; empty without a gate.
        shapes: the shapes of all tensors, which show what the DiT is like.
        options: the options of the configuration in the file.
    """

    path: Path
    prompts: Tensor
    gate: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    options: Options

    @property
    def patch_size(self) -> int | None:
        """The patch size of the DiT, or None if the file does not have its weights."""
        shape = self.shapes.get("x_embedder.proj.weight", ())  # (D, channels, size, size)
        return shape[2] if len(shape) == 4 else None

    @property
    def depth(self) -> int | None:
        """The number of blocks of the DiT, or None if the file does not have its weights."""
        found = (_BLOCK_NAME.match(name) for name in self.shapes)
        return max((int(block[1]) for block in found if block), default=-1) + 1 or None

    @property
    def tokens(self) -> int | None:
        """The number of image tokens in training, or None if the file does not have the weights."""
        shape = self.shapes.get("pos_embed", ())  # (1, tokens, D)
        return shape[1] if len(shape) == 3 else None

    @property
    def base_name(self) -> str | None:
        """Our name for the DiT that the configuration names, such as dit-xl/2, or None."""
        return None if self.options.model is None else self.options.model.lower()

    def fits(self, base: Base) -> bool:
        """Tells whether everything that the checkpoint shows agrees with a base."""
        count, width, size = len(base.sites), base.sites[0].width, base.sites[0].stride
        return (
            base.labels is not None  # a DiT
            and self.prompts.shape[2] == width
            and self.patch_size in (None, size)
            and self.depth in (None, count)
            # More prompts than blocks are accepted only if the file shows its blocks.
            and (self.depth is not None or len(self.prompts) <= count)
        )

    def error(self, expected: str, found: str, remedy: str) -> PatchError:
        """Makes an error that names the file."""
        return file_error(self.path, expected, found, remedy)

    def __str__(self) -> str:
        blocks, _, width = self.prompts.shape
        depth, size = self.depth or "unknown", self.patch_size or "unknown"
        return (
            f"prompts of width {width} for {blocks} blocks of a DiT (depth {depth}, "
            f"patch size {size})"
        )


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the learned values of a checkpoint, the shapes of all its tensors, and its options.

    Raises:
        PatchError: the file does not exist, is damaged, or is not of the official code.
    """
    with TorchFile(path) as file:
        contents = file.contents()
        tensors = _state_dict(contents)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        names = [name for name in (_PROMPTS, _WEIGHT, _BIAS) if name in tensors]
        wrong = _wrong_shapes(shapes)
        values = {} if wrong else {name: _copied(file.values(tensors[name])) for name in names}
    for name, value in values.items():
        if not value.isfinite().all():
            wrong = f"NaN or infinity in {name}"
    if wrong:
        raise file_error(
            path,
            f"{_PROMPTS} (blocks, N, D) and either {_WEIGHT} (N, D+1) with {_BIAS} (N,) or no "
            "gate, all finite",
            wrong,
            "choose a checkpoint that the official code trained with prompts (full fine-tuning "
            "has none)",
        )
    options = _read_options(contents, path)
    return Checkpoint(path, values.pop(_PROMPTS), values, shapes, options)


def _copied(values: Tensor) -> Tensor:
    return values.to(torch.float32, copy=True).contiguous()


def _wrong_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    """Describes what is wrong with the learned tensors, in a text that is empty if nothing is."""
    prompts = shapes.get(_PROMPTS)
    if prompts is None:
        listed = ", ".join(printable(name, 60) for name in list(shapes)[:3]) or "no tensors"
        return f"{listed} and no prompts"
    gate = {name: shapes[name] for name in (_WEIGHT, _BIAS) if name in shapes}
    other = [name for name in shapes if name.startswith(_OTHERS) and name not in gate]
    if other:  # an attention gate, or projected prompts
        return f"{printable(other[0])}, which the published code does not have"
    if len(prompts) == 3 and 0 not in prompts:
        _, count, width = prompts
        if gate in ({}, {_WEIGHT: (count, width + 1), _BIAS: (count,)}):
            return ""
    return f"{_PROMPTS} of shape {prompts} with {gate or 'no gate'}"


def _state_dict(contents: object) -> dict[str, StoredTensor]:
    """Returns the tensors of {"model": state dict, ...} or of a bare state dict by plain names."""
    if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
        contents = contents["model"]
    items = contents.items() if isinstance(contents, dict) else ()
    return {_bare(name): value for name, value in items if isinstance(value, StoredTensor)}


def _bare(name: str) -> str:
    """Returns a name without prefixes. It is cut once, as a hostile one may have a million."""
    start = 0
    while name.startswith(_PREFIXES, start):
        start = name.index(".", start) + 1
    return name[start:]


def _read_options(checkpoint: object, path: Path) -> Options:
    """Reads the options in a checkpoint's configuration.

    Args:
        checkpoint: the contents of the file.
        path: the file, for error messages.

    Raises:
        PatchError: an option has a value that the official code does not have.

    Source: github.com/sangminwoo/DMP, config/models/DiT.yaml and models/create_model.py.
    """
    if not isinstance(checkpoint, dict) or _entry(checkpoint, "config") is _MISSING:
        return Options()

    def option(name: str, *kinds: type) -> object:
        value = _entry(checkpoint, "config", "models", "vp", name)
        if value is _MISSING:
            return None
        if type(value) not in kinds:
            raise _unknown(path, name, value)
        return value

    kind, init, gate = option("type", str), option("init_type", str), option("gate_type", str)
    for name, value, known in (
        ("type", kind, _MIXES),
        ("init_type", init, _INITS),
        ("gate_type", gate, ("linear", "PT")),
    ):
        if value is not None and value not in known:
            raise _unknown(path, name, value)
    prompts, blocks = option("num_tokens", int), option("pt_depth", int)
    topk, model = option("topk", int, float), _entry(checkpoint, "config", "models", "name")
    if isinstance(topk, (int, float)) and not 0 < topk < 1e6:
        raise _unknown(path, "topk", topk)
    return Options(
        model=model if isinstance(model, str) else None,
        mix=_MIXES[kind] if isinstance(kind, str) else None,
        prompts=prompts if isinstance(prompts, int) else None,
        blocks=blocks if isinstance(blocks, int) else None,
        topk=float(topk) if isinstance(topk, (int, float)) else None,
        gates=None if gate is None else int(gate == "linear"),
        init=_INITS[init] if isinstance(init, str) else "zero",
    )


def _entry(config: object, *names: str) -> object:
    """Returns the value at a path of names in dictionaries or containers of omegaconf."""
    for name in names:
        content = config.state.get("_content") if isinstance(config, Opaque) else config
        if not isinstance(content, dict) or name not in content:
            return _MISSING
        config = content[name]
    return config.state.get("_val", config) if isinstance(config, Opaque) else config


def _unknown(path: Path, name: str, value: object) -> PatchError:
    shown = "an object" if isinstance(value, (Opaque, dict, list, tuple)) else repr(value)
    return file_error(
        path,
        f"an option models.vp.{name} of the official code in the configuration",
        printable(shown, 100),
        "convert a checkpoint that the published code wrote, or remove the configuration from the "
        "file and give its options yourself",
    )
