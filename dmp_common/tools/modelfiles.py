"""Reads names, shapes and single tensors of a model on disk, whatever its size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmp_common.bases.base import Probe
from dmp_common.bases.layerfacts import attribute_of_shape
from dmp_common.errors import PatchError, file_error, printable
from dmp_common.patch.serialize import opened, parse_json, read_bounded

_PARTS = ("unet", "transformer")
_MAX_INDEX = 64 * 1024**2  # the index of a model of 2000 tensors has some 200 kilobytes
_WEIGHTS = "diffusion_pytorch_model"
_GET_AGAIN = "get the model again"


def tensor_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the tensors of a model on disk, without reading their values.

    Args:
        path: a `.safetensors` file, or the folder of a diffusers model or pipeline.

    Raises:
        PatchError: the path is not such a file or folder, or a file is damaged.
    """
    files = ModelFiles(Path(path))
    shapes: dict[str, tuple[int, ...]] = {}
    in_file: dict[Path, list[str]] = {}
    for name, file_path in files.where.items():
        in_file.setdefault(file_path, []).append(name)
    for file_path, names in in_file.items():
        with _open(file_path) as file:
            shapes |= {name: _shape(file, file_path, name) for name in names}
    return shapes


class ModelFiles:
    """The tensors of a model on disk by name, read one by one.

    Args:
        path: a `.safetensors` file, a folder with one (or with several and their index), or the
            folder of a pipeline.

    Raises:
        PatchError: the path is not such a file or folder, or a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where: dict[str, Path] = {}
        if path.is_dir():
            parts = [path / part for part in _PARTS if (path / part).is_dir()]
            path = _weights_in(parts[0] if parts else path)
        elif not os.path.exists(path):
            raise file_error(path, "a model", "nothing", "check the path")
        if path.suffix == ".json":
            self.where = dict(_read_index(path))
        elif path.suffix in (".safetensors", ".sft"):
            with _open(path) as file:
                self.where = dict.fromkeys(file.keys(), path)
        else:
            remedy = "convert it, or choose the model's .safetensors file"
            raise file_error(path, "a .safetensors file or a diffusers folder", "neither", remedy)

    def read(self, name: str) -> Tensor:
        """Reads one tensor and returns it as a float32 copy."""
        path = self._of(name)
        with _open(path) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
                return tensor.to(torch.float32, copy=True)
            # A KeyError or ValueError means a type of numbers that torch does not have.
            except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
                expected = f"a tensor {printable(name)} of numbers"
                raise file_error(path, expected, str(error), _GET_AGAIN) from error

    def linear(self, name: str, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Reads the weight and the bias of a linear layer; without a bias, that one is None."""
        return self.read(f"{name}.weight"), self.read(f"{name}.bias") if bias else None

    def probe(self, prefix: str, probe: Probe) -> object:
        """Returns what a probe finds, as far as names and shapes show it."""
        path = prefix + probe.path
        if probe.attribute is None:
            return any(name.startswith(path + ".") for name in self.where)
        if f"{path}.weight" not in self.where:
            return None
        place = self._of(f"{path}.weight")
        with _open(place) as file:
            shape = _shape(file, place, f"{path}.weight")
        return attribute_of_shape(probe.attribute, shape)

    def _of(self, name: str) -> Path:
        if name not in self.where:
            raise file_error(self.path, f"a tensor {name}", f"{len(self.where)} others", _GET_AGAIN)
        return self.where[name]


def _weights_in(folder: Path) -> Path:
    """Returns the file of weights in the folder of a diffusers model, or the index of several."""
    plain = folder / f"{_WEIGHTS}.safetensors"
    files = sorted(p for p in folder.glob(f"{_WEIGHTS}*.safetensors") if "-of-" not in p.name)
    for found in (
        [plain] if plain.exists() else [],
        sorted(folder.glob("*.safetensors.index*.json")),
        files,
    ):
        if found:
            return found[0]
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "an empty folder"
    remedy = "give a pipeline's folder, its unet or transformer, or a .safetensors file"
    raise file_error(folder, f"a folder with {_WEIGHTS}.safetensors", names, remedy)


def _read_index(path: Path) -> Iterator[tuple[str, Path]]:
    """Yields the names of tensors and the files that hold them, which lie beside the index."""
    expected = "an index of model files"
    try:
        index = parse_json(read_bounded(path, _MAX_INDEX, expected))
    except ValueError as error:
        if isinstance(error, PatchError):
            raise
        raise file_error(path, expected, str(error), _GET_AGAIN) from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise file_error(path, expected, "no weight_map in it", _GET_AGAIN)
    known: dict[str, Path] = {}
    for name, file in names.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise file_error(path, "names of files beside the index", repr(file)[:200], _GET_AGAIN)
        yield name, known.setdefault(file, path.parent / file)


def _open(path: Path) -> Any:
    with opened(path, "a safetensors file"):
        pass  # this refuses pipes, for which the library would wait forever
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise file_error(path, "a whole safetensors file", str(error), _GET_AGAIN) from error


def _shape(file: Any, path: Path, name: str) -> tuple[int, ...]:
    try:
        return tuple(file.get_slice(name).get_shape())
    except SafetensorError as error:  # an index may name a tensor that its file lacks
        raise file_error(path, f"a tensor {printable(name)}", str(error), _GET_AGAIN) from error
