"""Aims on disk: what is written is read, also after a process was killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dmp_common import PatchError
from training.data.batch import Position
from training.data.summary import DataSummary
from training.objective.aim import Aim
from training.objective.store import AimStore, Column
from training.objective.stored_aims import StoredBatch, StoredData

FACTS = {"seed": 0, "options": {"states": "data", "range": (1, 2)}}


def aim_of(number: int, size: int = 4, masked: bool = False) -> Aim:
    """Three samples, of which two have the same caption."""
    source = torch.Generator().manual_seed(number)
    prompt = torch.randn(2, 5, 3, generator=source)[[0, 1, 0]].bfloat16()
    return Aim(
        noisy=torch.randn(3, 2, size, size, generator=source),
        t=torch.tensor([3, 500, 999]) - number,
        given={"prompt": prompt, "guidance": torch.full((3,), 1.5)},
        target=torch.randn(3, 2, size, size, generator=source),
        keys=["a", "b", "c"],
        strengths=torch.rand(3, generator=source),
        masks=torch.ones(3, 1, size, size) if masked else None,
    )


def filled(folder: Path, numbers: range, dtype: torch.dtype = torch.float32) -> AimStore:
    store = AimStore(folder, FACTS, dtype)
    for number in numbers:
        store.append(aim_of(number))
        store.commit((number + 1,), complete=number == 3)
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    filled(tmp_path, range(4), dtype)
    store = AimStore(tmp_path, FACTS, dtype)
    assert len(store) == 12 and store.complete
    (group,) = store.counts
    found = store.read(group, np.array([4, 0]))
    for row, (number, place) in enumerate([(1, 1), (0, 0)]):
        wanted = aim_of(number)
        assert torch.equal(found.noisy[row], wanted.noisy[place].to(dtype).float())
        assert torch.equal(found.target[row], wanted.target[place].to(dtype).float())
        assert found.t[row] == wanted.t[place]
        assert torch.equal(found.given["prompt"][row], wanted.given["prompt"][place])
        assert found.strengths[row] == wanted.strengths[place]
    assert found.given["prompt"].dtype == torch.bfloat16
    assert found.given["guidance"].tolist() == [1.5, 1.5]
    assert found.weights.tolist() == [1, 1] and found.masks is None
    # Conditions are kept once: two captions in each batch, and one number in all.
    rows = {path.name: path.stat().st_size for path in tmp_path.glob("[pg]*.rows")}
    assert rows == {"prompt.5x3.bfloat16.rows": 8 * 30, "guidance.1.float32.rows": 4}


def test_a_row_of_one_expanded_value_is_written(tmp_path: Path) -> None:
    """The timestep of a single picture is one value with a stride of 0."""
    column = Column(tmp_path / "t", (), torch.float32)
    column.append(torch.tensor(7.0).expand(1))
    assert column.rows(column.mapped(), np.array([0])).tolist() == [7.0]


def test_a_killed_process_goes_on_where_its_last_commit_was(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    filled(whole, range(4))
    store = filled(killed, range(2))
    store.append(aim_of(2))  # never committed
    with (killed / "00.noisy.rows").open("ab") as file:
        file.write(b"half a row")
    again = AimStore(killed, FACTS)
    assert again.position == [2] and not again.complete and len(again) == 6
    filled(killed, range(2, 4))
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in killed.iterdir()) == names
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_aims_of_other_shapes_lie_apart(tmp_path: Path) -> None:
    store = AimStore(tmp_path, FACTS)
    for number, (size, masked) in enumerate([(4, False), (6, False), (4, True)]):
        store.append(aim_of(number, size, masked))
    store.commit((3,), complete=True)
    store = AimStore(tmp_path, FACTS)
    assert list(store.counts.values()) == [3, 3, 3]
    sizes = [store.read(group, np.array([2])) for group in store.counts]
    assert [aim.noisy.shape[-1] for aim in sizes] == [4, 6, 4]
    assert [aim.masks is not None for aim in sizes] == [False, False, True]


def test_other_facts_begin_anew_and_damage_is_told(tmp_path: Path) -> None:
    filled(tmp_path, range(4))
    assert len(AimStore(tmp_path, {**FACTS, "seed": 1})) == 0
    path = tmp_path / "00.target.rows"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PatchError, match="as they were written, found them damaged"):
        AimStore(tmp_path, FACTS)
    (tmp_path / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(PatchError, match="expected a folder for exact predictions"):
        AimStore(tmp_path, FACTS)


def test_an_epoch_goes_through_the_aims_of_all_processes_once(tmp_path: Path) -> None:
    stores = []
    for rank in range(2):
        store = AimStore(tmp_path / str(rank), FACTS)
        for number in range(2):
            store.append(aim_of(10 * rank + number))
        store.commit((2,), complete=True)
        stores.append(AimStore(tmp_path / str(rank), FACTS))
    data = StoredData(stores, DataSummary("pictures", 7, 7), seed=0, factor=8)
    assert data.size == 12 and data.summary().buckets[0].width == 32
    expected = torch.cat([aim_of(n).noisy for n in (0, 1, 10, 11)]).flatten(1)

    def epoch(world: int, start: Position = Position()) -> list[torch.Tensor]:  # noqa: B008
        found = []
        iterators = [
            data.batches(global_batch=4, rank=rank, world=world, start=start)
            for rank in range(world)
        ]
        for parts in zip(*iterators, strict=True):
            assert all(isinstance(part, StoredBatch) for part in parts)
            found.append(torch.cat([part.aim.noisy.flatten(1) for part in parts]))
            if parts[0].next.epoch > start.epoch:
                return found
        raise AssertionError

    batches = epoch(1)
    assert sorted(torch.cat(batches)[:, 0].tolist()) == sorted(expected[:, 0].tolist())
    assert all(torch.equal(a, b) for a, b in zip(batches, epoch(2), strict=True))
    assert torch.equal(epoch(1, Position(0, 2))[0], batches[2])
    assert not torch.equal(epoch(1, Position(1, 0))[0], batches[0])
