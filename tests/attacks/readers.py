"""Everything of ours that opens a stranger's file, as functions of a path."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dmp_common import Patch, PatchError
from dmp_common.__main__ import main


def _command(*words: str) -> None:
    """Runs a command; its one line of error becomes the error it was made of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    if code:
        lines = err.getvalue().splitlines()
        if len(lines) != 1 or out.getvalue():
            raise AssertionError(f"expected one line of error, found {lines} and {out.getvalue()}")
        raise PatchError(lines[0])


def _convert(path: str) -> None:
    from dmp_common.api import convert_official

    convert_official(path, Path(path).with_name("out.safetensors"))


def _base(path: str) -> None:
    """A base from the checkpoint of an original code, as the trainer loads it."""
    from training.base.families import checkpoint

    tensors = checkpoint.read_tensors(Path(path))
    if not checkpoint.is_transformer(tensors):
        raise PatchError("expected a DiT, found another checkpoint: choose one.")
    config = checkpoint.infer_config(tensors)
    checkpoint.rename(tensors)
    if config["num_layers"] > 28:
        raise AssertionError(f"would build {config['num_layers']} blocks")


def _detect(path: str) -> None:
    from training.base.detection import detect_source
    from training.base.loading import Source

    detect_source(Source(path, "original"))


def _times(path: str) -> None:
    from dmp_common.tools.timefile import time_embedding_of

    time_embedding_of(path, Patch.create("sd15"), torch.tensor([1.0]))


def _options(path: str) -> None:
    from training.options.command_line import ConfigError, read_toml

    try:
        read_toml(Path(path))
    except ConfigError as error:
        raise PatchError(str(error)) from error


def _dataset(path: str) -> None:
    from training.options.dataset_file import read_dataset_file
    from training.options.problems import ConfigError

    try:
        read_dataset_file(Path(path))
    except ConfigError as error:
        raise PatchError(str(error)) from error


def _shard(path: str) -> None:
    from training.data.stream.shards import read_shard

    for _ in read_shard(path):
        pass


def _count(path: str) -> None:
    from training.data.stream.shards import Counts

    Counts(None).of(path)


def _metadata(path: str) -> None:
    from training.data.captions.metadata_files import folder_metadata

    found = folder_metadata(Path(path), [], None)
    if found is not None and found.gone:
        # The trainer counts these names; a hostile one must do no more than that.
        raise PatchError("names of images that are not there")


def _student(path: str) -> None:
    """A file of --student_weights, before any value is read."""
    from training.base.student_files import student_shapes

    student_shapes(Path(path))


READERS: dict[str, Callable[[str], Any]] = {
    "load": Patch.load,
    "validate": lambda path: _command("validate", path),
    "inspect": lambda path: _command("inspect", path),
    "convert": _convert,
    "base": _base,
    "detect": _detect,
    "times": _times,
    "options": _options,
    "dataset": _dataset,
    "shard": _shard,
    "count": _count,
    "metadata": _metadata,
    "student": _student,
}


class Peak:
    """The largest memory of this process since the last call of `reset`, in megabytes.

    Known on Linux only; 0 elsewhere.
    """

    def reset(self) -> None:
        """Forgets what was the largest until now."""
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def megabytes(self) -> float:
        """The largest memory."""
        if sys.platform != "linux":
            return 0.0
        status = Path("/proc/self/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
