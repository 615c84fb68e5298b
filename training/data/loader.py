"""Runs a function of requests ahead of time, in processes or in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dmp_common import PatchError


class _Loading(Dataset[Any]):
    """A function of requests, in whichever process. An error travels as a value.

    Raised in a worker, it would reach the user inside a traceback of the worker.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._function(request)
        except PatchError as error:
            return error


def load(requests: Iterable[Any], function: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """What `function` makes of each request, in their order, ahead of time by `workers` processes.

    Raises:
        PatchError: as the function does.
    """
    loader: DataLoader[Any] = DataLoader(
        _Loading(function), sampler=_Once(requests), batch_size=None, num_workers=workers,
        collate_fn=_as_it_is, generator=own_generator(),
    )  # fmt: skip
    yield from unpacked(loader)


def own_generator() -> torch.Generator:
    """For a loader to draw its workers' seed from: torch's global one is the trainer's."""
    return torch.Generator().manual_seed(0)


def ahead(batches: Iterator[Any], count: int = 2) -> Iterator[Any]:
    """The same batches, without end, `count` of them ahead of time in a thread.

    Reading files and decoding images let go of Python's lock, so they run beside the step.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, batches) for _ in range(count))
        while True:
            batch = waiting.popleft().result()
            waiting.append(pool.submit(next, batches))
            yield batch


def unpacked(results: Iterable[Any]) -> Iterator[Any]:
    """The results of a loader; raises the error that a worker returned."""
    for result in results:
        if isinstance(result, PatchError):
            raise result
        yield result


class _Once:
    """An iterable as a sampler: torch asks a sampler for its length, where it has one."""

    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Any]:
        return iter(self._requests)


def _as_it_is(value: Any) -> Any:
    return value
