"""Small data sets of every kind, made by the tests."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.data.batch import Batch, Data, Position
from training.data.build import open_data
from training.data.kind import DataKind
from training.options.data_options import DataOptions

CAPTIONS = DataKind("caption", resolution=32, multiple=8)
LABELS = DataKind("label", resolution=16, multiple=8, num_classes=4, null_label=4, square=True)
NOTHING = DataKind("none", resolution=16, multiple=8)

SHAPES = [(40, 40), (64, 32), (32, 64), (50, 41), (33, 47)]


def picture(number: int, size: tuple[int, int] | None = None) -> Image.Image:
    """A picture like no other."""
    width, height = size or SHAPES[number % len(SHAPES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder_of(path: Path, count: int, *, captions: bool = True, start: int = 0) -> Path:
    """A folder of pictures, each with its caption."""
    path.mkdir(parents=True, exist_ok=True)
    for n in range(start, start + count):
        picture(n).save(path / f"{n:03d}.png")
        if captions:
            (path / f"{n:03d}.txt").write_text(f"one, two, number {n}", encoding="utf-8")
    return path


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def shard_of(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A tar file of samples: contents by ending, by key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return tar_of(
        path,
        {f"{key}.{end}": data for key, parts in samples.items() for end, data in parts.items()},
    )


def tar_of(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar file of files in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def shards_of(folder: Path, counts: list[int]) -> str:
    """Shards of pictures with captions and classes; returns the value of --webdataset."""
    for shard, count in enumerate(counts):
        shard_of(
            folder / f"{shard:05d}.tar",
            {
                f"{shard:03d}{n:04d}": {
                    "png": encoded(picture(100 * shard + n)),
                    "json": json.dumps({"caption": f"shard {shard}, number {n}"}).encode(),
                    "cls": str(n % 4).encode(),
                }
                for n in range(count)
            },
        )
    return f"{folder.as_posix()}/{{00000..{len(counts) - 1:05d}}}.tar"


class Encoders:
    """Stand-ins whose output follows from the input alone, and that count their work."""

    def __init__(self, image: str = "vae", text: str = "clip") -> None:
        self.image_fingerprint, self.text_fingerprint = image, text
        self.images = self.texts = 0

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.images += len(pixels)
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([small, small.abs() + 0.1], 1)

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        self.texts += len(captions)
        rows = [list(hashlib.sha256(caption.encode()).digest()[:6]) for caption in captions]
        hidden = torch.tensor(rows, dtype=torch.float32).reshape(-1, 3, 2)
        return {"hidden": hidden, "pooled": hidden[:, 0].to(torch.bfloat16)}


def opened(
    kind: DataKind = CAPTIONS, *, seed: int = 3, split: Any = "train", **options: Any
) -> Data:
    """Data from options; without caption dropout, unless asked for."""
    given = DataOptions(**{"caption_dropout_rate": 0.0, **options})
    return open_data(given, kind, seed=seed, split=split)


def epoch(data: Data, number: int = 0, global_batch: int = 4, **how: Any) -> list[Batch]:
    """All batches of one epoch."""
    count = data.batches_per_epoch(global_batch)
    assert count is not None
    return take(data.batches(global_batch=global_batch, start=Position(number), **how), count)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The next batches."""
    return list(islice(batches, count))


def keys(batches: list[Batch]) -> list[str]:
    """The keys of batches, in order."""
    return [key for batch in batches for key in batch.keys]


def assert_equal(first: Batch, second: Batch) -> None:
    """Two batches are the same, bit for bit."""
    assert first.keys == second.keys
    assert first.captions == second.captions
    assert first.next == second.next
    for name in ("pixels", "moments", "labels", "sizes", "weights", "masks"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert (first.text is None) == (second.text is None)
    for name in first.text or {}:
        assert torch.equal(first.text[name], second.text[name]), name
