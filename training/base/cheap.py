"""The cheap call's model: the same base with weights in fewer bits, beside the exact one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from dmp_common.patch.file import file_hash
from dmp_common.tools.weighttypes import weight_types
from training.base.frozen import FrozenBase, load_frozen
from training.base.layers import linear_layers
from training.base.places import Said
from training.base.quantizing import quantized
from training.base.student_files import FLOATS, stored_types
from training.base.student_weights import load_student
from training.options.command_line import resolve
from training.options.config import TrainConfig


def cheap_base(frozen: FrozenBase, config: TrainConfig, said: Said | None = None) -> FrozenBase:
    """Returns a base whose model is the cheap form of another's; everything else is shared.

    Args:
        frozen: the exact base, on the device that trains; it stays as it is. Weights that do not
            differ are shared, unless the method trains them.
        config: of the run, with --student_weights or --student_quantization.
        said: is called with a line before the model is made, `print` for example.

    Raises:
        PatchError: the configuration names no cheap form, or one that cannot be made here.
    """
    file = _file(config)
    if file is None and config.student_quantization is None:
        raise PatchError(
            "expected --student_weights or --student_quantization, which say what the cheap model "
            "is, found neither: give one, for example --student_quantization rtn3."
        )
    if said is not None:
        said(f"making the cheap model: {file or config.student_quantization}")
    if file is not None:
        model = load_student(frozen, file)
    else:
        assert config.student_quantization is not None
        model = quantized(frozen, config.student_quantization, config.trains_base)
    return dataclasses.replace(frozen, model=model.eval().requires_grad_(False))


def open_cheap(**options: Any) -> FrozenBase:
    """Loads a base and makes its cheap form, for use outside of the trainer.

    Args:
        options: as on the command line, such as base and student_quantization.

    Raises:
        PatchError: no weights where they should be, or no cheap form that can be made here.
    """
    config = resolve({**options, "objective": "distill"})
    return cheap_base(load_frozen(config), config)


def student_facts(cheap: FrozenBase, config: TrainConfig) -> dict[str, Any]:
    """Returns what a patch file records of the cheap model: small, and only for information.

    Args:
        cheap: from `cheap_base`.
        config: the same as there.

    Returns:
        "quantization": as --student_quantization names it, or of a file the type of most values
        in fewer bits (of all values where none is in fewer); "types": for each type of numbers how
        many values of weights have it, see `weight_types`; and of a file "file": its "name" and
        the first 10 digits of its "sha256".
    """
    file = _file(config)
    if file is not None:
        types = stored_types(file)
        few = {kind: count for kind, count in types.items() if kind not in FLOATS} or types
        return {
            "quantization": max(few, key=lambda kind: few[kind]).lower(),
            "types": types,
            "file": {"name": file.name, "sha256": file_hash(file)},
        }
    types = weight_types(cheap.model)
    quantization = str(config.student_quantization)
    if quantization.startswith("rtn"):  # simulated: the values are floating-point numbers
        rounded = sum(layer.weight.numel() for layer in linear_layers(cheap.model).values())
        kind = max(types, key=lambda kind: types[kind])
        types = {quantization: rounded, kind: types[kind] - rounded} | {
            name: count for name, count in types.items() if name != kind
        }
    return {"quantization": quantization, "types": types}


def _file(config: TrainConfig) -> Path | None:
    if config.student_weights is None:
        return None
    return Path(config.student_weights).expanduser()
