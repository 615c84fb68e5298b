"""Aims on disk: noisy data with exact predictions, so that no exact model is needed in training.

A store is a folder of plain files of rows, and index.json, which says how many rows are whole. What
a killed process had written beyond that is cut off, so that drawing goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.patch.serialize import parse_json, write_atomically
from training.objective.aim import Aim

_INDEX = "index.json"
_FORMAT = 1
_GIVEN = "given."  # before the name of a condition, whose rows are shared by many aims


@dataclass
class Column:
    """Rows of one shape and type in a file.

    Args:
        path: the file.
        shape: of a row.
        dtype: of its values.
        count: whole rows.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    count: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def append(self, rows: Tensor) -> None:
        """Writes rows (B, *shape) behind the last one."""
        data = rows.detach().to("cpu", self.dtype)
        # A copy: one value may have a stride of 0 and count as contiguous, and is no bytes then.
        data = data.clone(memory_format=torch.contiguous_format)
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(self.count * self.row_bytes)
            file.write(data.reshape(-1).view(torch.uint8).numpy().tobytes())
            file.truncate()
        self.count += len(data)

    def flush(self) -> None:
        """Makes what was written outlast a crash."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())

    def mapped(self) -> npt.NDArray[np.uint8]:
        """All rows (count, bytes), read where they are asked for."""
        return np.memmap(self.path, np.uint8, "r", shape=(self.count, self.row_bytes))

    def rows(self, mapped: npt.NDArray[np.uint8], numbers: npt.NDArray[np.int64]) -> Tensor:
        """Some rows (B, *shape)."""
        data = torch.from_numpy(np.ascontiguousarray(mapped[numbers]))
        return data.reshape(-1).view(self.dtype).reshape(len(numbers), *self.shape)


@dataclass
class AimStore:
    """Aims in a folder, in groups of one shape.

    Args:
        folder: of the files; it is made.
        facts: what the aims depend on.
        dtype: of noisy data and predictions.

    Attributes:
        position: where whoever fills the store goes on.
        complete: whether it is full.
    """

    folder: Path
    facts: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    position: list[int] = field(default_factory=list)
    complete: bool = False
    _groups: dict[str, dict[str, Column]] = field(default_factory=dict)
    _given: dict[str, Column] = field(default_factory=dict)
    _known: dict[str, dict[bytes, int]] = field(default_factory=dict)
    _maps: dict[Path, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.folder / _INDEX
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise PatchError(
                f"expected a folder for exact predictions, found {self.folder} ({error}): remove "
                "it, or give another --cache_dir."
            ) from error
        if isinstance(found, dict) and found.get("facts") == json.loads(json.dumps(self.facts)):
            self._read(found)

    def __len__(self) -> int:
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Aims of each group."""
        return {group: columns["noisy"].count for group, columns in self._groups.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all files of rows."""
        columns = [*self._given.values(), *(c for g in self._groups.values() for c in g.values())]
        return sum(column.count * column.row_bytes for column in columns)

    def append(self, aim: Aim) -> None:
        """Writes the aims of a batch; they count once `commit` has been called."""
        given = {
            f"{_GIVEN}{name}": self._condition(name, values) for name, values in aim.given.items()
        }
        weights = torch.ones(len(aim.noisy)) if aim.weights is None else aim.weights
        tensors = {
            "noisy": aim.noisy.to(self.dtype),
            "target": aim.target.to(self.dtype),
            "t": aim.t,
            "weights": weights.float(),
            **{name: rows for name, (rows, _) in given.items()},
        }
        optional = {"strengths": aim.strengths, "masks": aim.masks}
        tensors |= {name: value for name, value in optional.items() if value is not None}
        shape = "x".join(map(str, aim.noisy.shape[1:]))
        kinds = [kind for _, kind in given.values()]
        group = "-".join([shape, *kinds, *(name for name in optional if name in tensors)])
        columns = self._groups.setdefault(group, {})
        number = list(self._groups).index(group)
        for name, values in tensors.items():
            if name not in columns:
                path = self.folder / f"{number:02d}.{name}.rows"
                columns[name] = Column(path, tuple(values.shape[1:]), values.dtype)
            columns[name].append(values)

    def commit(self, position: Sequence[int], complete: bool = False) -> None:
        """Says that everything up to a position is whole."""
        self.position, self.complete = list(position), complete
        for column in (
            *self._given.values(),
            *(c for g in self._groups.values() for c in g.values()),
        ):
            column.flush()
        told = {
            "format": _FORMAT,
            "facts": self.facts,
            "position": self.position,
            "complete": complete,
            "groups": {
                group: {name: _told(column) for name, column in columns.items()}
                for group, columns in self._groups.items()
            },
            "given": {name: _told(column) for name, column in self._given.items()},
        }
        write_atomically(self.folder / _INDEX, json.dumps(told, indent=1).encode())

    def read(self, group: str, numbers: npt.NDArray[np.int64]) -> Aim:
        """Aims of one group by their numbers, on the CPU."""
        columns = self._groups[group]
        found = {name: self._rows(column, numbers) for name, column in columns.items()}
        kinds = dict(part.split("=") for part in group.split("-")[1:] if "=" in part)
        given = {
            name: self._rows(self._given[f"{name}={kind}"], found[f"{_GIVEN}{name}"].numpy())
            for name, kind in kinds.items()
        }
        return Aim(
            noisy=found["noisy"].float(),
            t=found["t"],
            given=given,
            target=found["target"].float(),
            keys=[f"exact prediction {number}" for number in numbers],
            weights=found["weights"],
            masks=found.get("masks"),
            strengths=found.get("strengths"),
        )

    def _condition(self, name: str, values: Tensor) -> tuple[Tensor, str]:
        """The row numbers (B,) of conditions, which are written where they are new, and what they
        are: their shape and type."""
        values = values.detach().cpu().contiguous()
        shape = "x".join(map(str, values.shape[1:])) or "1"
        kind = f"{shape}.{str(values.dtype).removeprefix('torch.')}"
        key = f"{name}={kind}"
        if key not in self._given:
            path = self.folder / f"{name}.{kind}.rows"
            self._given[key] = Column(path, tuple(values.shape[1:]), values.dtype)
        column, known = self._given[key], self._known.setdefault(key, {})
        numbers: list[int] = []
        new: list[int] = []
        for number, row in enumerate(values):
            name_of_row = _digest(row.reshape(-1).view(torch.uint8).numpy())
            if name_of_row not in known:
                known[name_of_row] = column.count + len(new)
                new.append(number)
            numbers.append(known[name_of_row])
        if new:
            column.append(values[new])
        return torch.tensor(numbers, dtype=torch.int64), key

    def _rows(self, column: Column, numbers: npt.NDArray[np.int64]) -> Tensor:
        if column.path not in self._maps:
            self._maps[column.path] = column.mapped()
        return column.rows(self._maps[column.path], numbers)

    def _read(self, found: Mapping[str, Any]) -> None:
        """Takes over what an earlier process has written."""
        try:
            self.position, self.complete = list(found["position"]), bool(found["complete"])
            self._groups = {
                group: {name: self._column(told) for name, told in columns.items()}
                for group, columns in found["groups"].items()
            }
            self._given = {name: self._column(told) for name, told in found["given"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._damaged() from error
        if not self.complete:
            for key, column in self._given.items():
                self._known[key] = {_digest(row): n for n, row in enumerate(column.mapped())}

    def _column(self, told: Mapping[str, Any]) -> Column:
        column = Column(
            self.folder / Path(str(told["file"])).name,
            tuple(told["shape"]),
            getattr(torch, str(told["dtype"])),
            int(told["count"]),
        )
        if (
            not column.path.is_file()
            or column.path.stat().st_size < column.count * column.row_bytes
        ):
            raise self._damaged()
        return column

    def _damaged(self) -> PatchError:
        return PatchError(
            f"expected the exact predictions in {self.folder} as they were written, found them "
            "damaged: remove the folder, they are then computed again."
        )


def _digest(row: npt.NDArray[np.uint8]) -> bytes:
    """The name of a row: its bytes themselves would fill the memory."""
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _told(column: Column) -> dict[str, Any]:
    return {
        "file": column.path.name,
        "shape": list(column.shape),
        "dtype": str(column.dtype).removeprefix("torch."),
        "count": column.count,
    }
