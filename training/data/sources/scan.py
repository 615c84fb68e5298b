"""Lists the images of a folder and checks them before anything is trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmp_common import PatchError
from training.data.images import is_image, upright_size
from training.data.samples import Store
from training.data.sizes import Size

_THREADS = 8  # a header is little work and much waiting, on a network drive above all


def list_images(folder: Path, recursive: bool = True) -> list[Path]:
    """All images of a folder, sorted by path; hidden files and folders are left out.

    Raises:
        PatchError: no such folder.
    """
    if not folder.is_dir():
        raise PatchError(f"expected a folder of images at {folder}, found none: check the path.")
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")] if recursive else []
        found += [path for name in files if is_image(path := Path(root, name))]
    return sorted(found, key=Path.as_posix)  # the same on every system


def sizes_of(store: Store, places: Sequence[Any]) -> list[Size]:
    """Width and height of every image, from its header.

    Raises:
        PatchError: files that are no images: all of them are counted, the first are named.
    """

    def size(place: Any) -> Size | PatchError:
        try:
            with store.open(place) as file:
                return upright_size(file, store.name(place))
        except PatchError as error:
            return error
        except OSError as error:
            return PatchError(f"expected to read {store.name(place)}, found: {error.strerror}.")

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(_shown(pool.map(size, places), len(places)))
    errors = [entry for entry in found if isinstance(entry, PatchError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        some = "\n  ".join(str(error) for error in errors[:5])
        more = f"\n  and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise PatchError(f"found {len(errors)} images that cannot be used:\n  {some}{more}")
    return [entry for entry in found if not isinstance(entry, PatchError)]


def _shown(entries: Iterable[Any], count: int) -> Iterable[Any]:
    return tqdm(entries, "checking images", count, unit=" images", delay=2, file=sys.stderr)
