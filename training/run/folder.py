"""The folder of a run: one process at a time, no file of another run overwritten, no leftovers."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from dmp_common import PatchError
from training.options.config import TrainConfig

_ENDINGS = (".safetensors", "")  # of a patch; of the folder of --method full
STATE, GATE = "-state", "-gate.png"


class Saved(NamedTuple):
    """Something that a run saved along its way.

    Args:
        step: after which it was saved.
        kind: the end of its name: of a file, `STATE`, `GATE`, or "" for a folder of weights.
        path: where it lies.
    """

    step: int
    kind: str
    path: Path


def saved(output: Path, name: str) -> list[Saved]:
    """What runs of a name saved along their way into a folder, oldest first."""
    ends = "|".join(re.escape(end) for end in (STATE, GATE, *_ENDINGS))
    pattern = re.compile(rf"{re.escape(name)}-step(\d{{8}})({ends})")
    paths = output.iterdir() if output.is_dir() else ()
    matches = [(pattern.fullmatch(path.name), path) for path in paths]
    return sorted(Saved(int(match[1]), match[2], path) for match, path in matches if match)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


class RunFolder:
    """The files of one run in its output folder: all whose name begins with --output_name.

    Args:
        config: names the folder and the files.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.path, self.name = Path(config.output_dir), config.output_name

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other processes away from these files while a run writes them.

        Raises:
            PatchError: the folder cannot be written, another process has it, or it holds the files
                of an earlier run which nobody said to continue or to overwrite.
        """
        self.require_writable()
        lock = FileLock(self.path / f".{self.name}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise PatchError(
                f"expected to write {self.name} in {self.path} alone, found another run that "
                "writes it now: wait for its end, or choose another --output_name or --output_dir."
            ) from None
        try:
            self.remove_leftovers()
            self.require_new()
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def require_writable(self) -> None:
        """Finds an unwritable folder before anything is loaded.

        Raises:
            PatchError: --output_dir cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            raise PatchError(
                f"expected a folder to write to, found {self.path} ({error.strerror}): change "
                "--output_dir."
            ) from error

    def remove_leftovers(self) -> None:
        """Removes what a killed run left half-written.

        A folder that was being replaced is put back: the kill came before the new one had its name.
        """
        for old in self.path.glob(f".{glob.escape(self.name)}*.old"):
            whole = self.path / old.name[1:].removesuffix(".old")
            if whole.exists():
                shutil.rmtree(old)
            else:
                old.rename(whole)
        for partial in self.path.glob(f".{glob.escape(self.name)}*.tmp"):
            remove(partial)

    def require_new(self) -> None:
        """Refuses to write over an earlier run.

        Raises:
            PatchError: there are its files, and neither --resume nor --overwrite is given.
        """
        if self.config.resume is not None or self.config.overwrite:
            return
        saves = saved(self.path, self.name)
        found = [path.name for path in (*self.results(), *(save.path for save in saves))]
        if not found:
            return
        states = any(save.kind == STATE for save in saves)
        go_on = "--resume latest to go on with it, " if states else ""
        raise PatchError(
            f"expected no earlier run called {self.name} in {self.path}, found {found[0]}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + f": give {go_on}another --output_name, or --overwrite."
        )

    def clear(self) -> None:
        """Removes the files and states that an earlier run of this name saved along its way.

        Its result stays until the new one takes its place.
        """
        for save in saved(self.path, self.name):
            remove(save.path)

    def results(self) -> list[Path]:
        """The final files of this name."""
        paths = [self.path / f"{self.name}{ending}" for ending in _ENDINGS]
        return [path for path in paths if path.exists()]
