"""Where the weights of a base are, and what to say when nothing can be loaded from there."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from dmp_common import Base, PatchError
from dmp_common.bases.detect import require_known_pipeline
from dmp_common.tools.hub import is_repository
from training.options.config import TrainConfig

Said = Callable[[str], None]
DIGITS_BASE = Path(__file__).resolve().parent / "digits"
ORIGINAL = (".pt", ".pth")
_SINGLE = (".safetensors", ".sft", ".ckpt")
# Without a connection the hub's client raises errors of its HTTP library, which differs between
# versions; its own error is derived from them.
_LOADER_ERRORS: tuple[type[Exception], ...] = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError,
    json.JSONDecodeError, *HfHubHTTPError.__bases__,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where weights are.

    Args:
        place: path or hub id.
        kind: a diffusers pipeline, the folder of a denoiser alone, a single file that diffusers
            reads, or a checkpoint of the original DiT or PixArt.
    """

    place: str
    kind: Literal["pipeline", "denoiser", "single", "original"]

    @property
    def name(self) -> str:
        """What the weights are called: a file, a repository, or the folder of a pipeline."""
        path = PurePath(self.place)
        if path.name in ("transformer", "unet"):
            path = path.parent
        if path.parent.name == "snapshots":  # of the hub's cache
            path = path.parent.parent
        return path.name

    @property
    def is_here(self) -> bool:
        """Whether they are on this disk."""
        return Path(self.place).exists()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The configuration of a pipeline; empty where none can be read.

        What it tells is of use and not needed: without a connection, the parts of the pipeline say
        so when they are loaded.
        """
        if self.kind != "pipeline":
            return {}
        try:
            return dict(DiffusionPipeline.load_config(self.place))
        except OSError:
            return {}


def require_known(source: Source) -> None:
    """Refuses a pipeline of a family whose denoiser alone looks like that of a base.

    Raises:
        PatchError: it is one.
    """
    require_known_pipeline(str(source.facts.get("_class_name", "")))


def find_source(config: TrainConfig, base: Base | None) -> Source:
    """Returns where the weights of the base are.

    Raises:
        PatchError: nothing is there, or nothing is named for a base without usual weights.
    """
    usual = base.hub_id if base is not None else None
    if base is not None and base.name == "digits":
        usual = str(DIGITS_BASE)
    place = config.pretrained_model_name_or_path or usual
    if place is None:
        raise PatchError(
            f"expected --pretrained_model_name_or_path, because base "
            f"{base.name if base else 'auto'} has no usual weights, found none: name a file, a "
            "diffusers folder or a hub id."
        )
    path = Path(place).expanduser()
    if path.is_dir():
        alone = (path / "config.json").is_file() and not (path / "model_index.json").is_file()
        return Source(str(path), "denoiser" if alone else "pipeline")
    if path.is_file():
        if path.suffix in ORIGINAL:
            return Source(str(path), "original")
        if path.suffix in _SINGLE:
            return Source(str(path), "single")
        raise PatchError(
            f"expected weights ending in {', '.join((*_SINGLE, *ORIGINAL))}, found {path}: name "
            "such a file, a diffusers folder or a hub id."
        )
    if is_repository(place) and not place.startswith("."):
        return Source(place, "pipeline")
    raise PatchError(
        f"expected a file, a diffusers folder or a hub id, found nothing at {place}: check "
        "--pretrained_model_name_or_path."
    )


@contextlib.contextmanager
def explained(expected: str, place: str, options: str) -> Iterator[None]:
    """Turns what the loaders of diffusers and transformers raise into one `PatchError`.

    Args:
        expected: what should be loaded.
        place: the path or hub id it should come from.
        options: the options that can name another place.

    Raises:
        PatchError: something did not load; the message says what to do, also without a connection.
    """
    try:
        yield
    except PatchError:
        raise
    except _LOADER_ERRORS as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if is_repository(place) and not Path(place).exists():
            raise PatchError(
                f"expected {expected} in the hub repository {place}, found something that does not "
                f"load ({found}): connect once (the files are kept for later runs), log in with "
                "`hf auth login` where the repository asks for it, or download it on another "
                f"machine with `hf download {place} --local-dir FOLDER` and name the folder with "
                f"{options}."
            ) from error
        raise PatchError(
            f"expected {expected} at {place}, found something that does not load ({found}): check "
            f"{options}."
        ) from error


@contextlib.contextmanager
def loading(
    said: Said, what: str, expected: str, place: str, options: str, read: object = None
) -> Iterator[None]:
    """Says what is loaded and how long it took, and explains what goes wrong.

    Args:
        said: is called with a line before and after.
        what, expected: the part, and its description in an error.
        place, options: see `explained`.
        read: where the weights are, if not at that place.
    """
    said(f"loading the {what} from {read or place}")
    start = time.perf_counter()
    with explained(expected, place, options):
        yield
    said(f"loaded the {what} in {time.perf_counter() - start:.1f} s")
