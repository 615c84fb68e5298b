"""The folder of a run: one process at a time, no file of another run overwritten, no leftovers."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dmp_common import PatchError
from training.options.config import TrainConfig

_ENDINGS = (".safetensors", "")  # of a patch; of the folder of --method full
_STATE = "-state"


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
        for old in self.path.glob(f".{_literal(self.name)}*.old"):
            whole = self.path / old.name[1:].removesuffix(".old")
            if whole.exists():
                shutil.rmtree(old)
            else:
                old.rename(whole)
        for partial in self.path.glob(f".{_literal(self.name)}*.tmp"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def require_new(self) -> None:
        """Refuses to write over an earlier run.

        Raises:
            PatchError: there are its files, and neither --resume nor --overwrite is given.
        """
        if self.config.resume is not None or self.config.overwrite:
            return
        found = [path.name for path in self.results()] + [path.name for path in self.saves()]
        if not found:
            return
        states = any(name.endswith(_STATE) for name in found)
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
        for path in self.saves():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def results(self) -> list[Path]:
        """The final files of this name."""
        paths = [self.path / f"{self.name}{ending}" for ending in _ENDINGS]
        return [path for path in paths if path.exists()]

    def saves(self) -> list[Path]:
        """Files and states that were saved along the way, oldest first."""
        pattern = re.compile(
            re.escape(self.name) + rf"-step\d{{8}}({_STATE}|-gate\.png|\.safetensors|)"
        )
        return sorted(path for path in self.path.iterdir() if pattern.fullmatch(path.name))


def _literal(name: str) -> str:
    """A name as a pattern of `glob` that means itself."""
    return re.sub(r"([*?[])", r"[\1]", name)
