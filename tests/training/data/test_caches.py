"""Caches: the same as without, made once, never stale, never half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dmp_common import PatchError
from tests.training.data import making
from tests.training.data.making import CAPTIONS, NOTHING, Encoders, epoch, opened, picture
from training.data.batch import Data
from training.data.caching.tensor_cache import DamagedError, TensorCache, cache_key

ON_DISK = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
IN_MEMORY = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return making.folder_of(tmp_path / "images", 6)


def cached(folder: Path, encoders: Encoders, **options: Any) -> Data:
    given = {"enable_bucket": True, **options}
    data = opened(CAPTIONS, train_data_dir=str(folder), **given)
    data.prepare_caches(encoders)
    return data


@pytest.mark.parametrize("how", [IN_MEMORY, ON_DISK], ids=["memory", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_is_uncached(folder: Path, how: dict[str, Any], workers: int) -> None:
    encoders = Encoders()
    extra = {"flip_aug": True, "caption_dropout_rate": 0.4, "vae_batch_size": 2}
    plain = opened(CAPTIONS, train_data_dir=str(folder), enable_bucket=True, **extra)
    data = cached(folder, encoders, **extra, **how)
    assert (encoders.images, encoders.texts) == (12, 7)  # both sides of six, and the empty caption
    dropped = 0
    for number in (0, 3):
        batches = epoch(data, number, workers=workers if number == 0 else 0)
        for with_cache, without in zip(batches, epoch(plain, number), strict=True):
            assert with_cache.keys == without.keys and with_cache.next == without.next
            assert with_cache.pixels is None and with_cache.captions is None
            assert torch.equal(with_cache.sizes, without.sizes)
            assert without.pixels is not None and without.captions is not None
            assert with_cache.moments is not None and with_cache.text is not None
            assert torch.equal(with_cache.moments, encoders.encode_images(without.pixels))
            for name, value in encoders.encode_text(without.captions).items():
                assert torch.equal(with_cache.text[name], value)
                assert with_cache.text[name].dtype == value.dtype
            dropped += without.captions.count("")
    assert dropped > 0


@pytest.mark.parametrize("how", [IN_MEMORY, ON_DISK], ids=["memory", "disk"])
def test_workers_decode_images_beside_a_text_cache(folder: Path, how: dict[str, Any]) -> None:
    options = {name: value for name, value in how.items() if "text" in name}
    data = cached(folder, Encoders(), **options)
    for alone, helped in zip(epoch(data), epoch(data, workers=1), strict=True):
        assert alone.pixels is not None and alone.text is not None
        making.assert_equal(alone, helped)


def test_files_are_made_once(folder: Path) -> None:
    cached(folder, Encoders(), **ON_DISK)
    again = Encoders()
    cached(folder, again, **ON_DISK)
    assert (again.images, again.texts) == (0, 0)
    more = Encoders()
    cached(folder, more, flip_aug=True, **ON_DISK)
    assert (more.images, more.texts) == (6, 0)  # only the mirrored ones


@pytest.mark.parametrize("change", ["vae", "resolution", "bucket"])
def test_everything_that_matters_is_in_the_key(folder: Path, change: str) -> None:
    cached(folder, Encoders(), **ON_DISK)
    other = Encoders("another vae") if change == "vae" else Encoders()
    options = {"resolution": {"resolution": "48"}, "bucket": {"enable_bucket": False}}
    data = cached(folder, other, **ON_DISK, **options.get(change, {}))
    # Without buckets, three of the six pictures are still cut to a square as before.
    assert other.images == (3 if change == "bucket" else 6)
    assert other.texts == 0
    for batch in epoch(data):
        assert batch.moments is not None


def test_another_text_encoder_makes_new_files(folder: Path) -> None:
    cached(folder, Encoders(), **ON_DISK)
    other = Encoders(text="another")
    cached(folder, other, **ON_DISK)
    assert (other.images, other.texts) == (0, 7)


def test_a_replaced_image_is_never_stale(folder: Path) -> None:
    """Also where size and time of change stay: only the content tells."""
    path = folder / "000.png"
    picture(0).save(path.with_suffix(".bmp"))
    path.unlink()
    path = path.with_suffix(".bmp")
    cached(folder, Encoders(), **ON_DISK)
    before = path.stat()
    picture(40).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and picture(40).size == picture(0).size
    encoders = Encoders()
    cached(folder, encoders, **ON_DISK)
    assert encoders.images == 1


@pytest.mark.parametrize("ending", ["bmp", "png"])
def test_one_changed_pixel_of_a_large_image_is_noticed(tmp_path: Path, ending: str) -> None:
    from training.data.samples import FileStore

    path = tmp_path / f"a.{ending}"
    image = picture(1, (500, 400))
    found = []
    for value in (0, 1):
        image.putpixel((250, 120), (value, 0, 0))
        image.save(path)
        found.append(FileStore().fingerprint(str(path)))
    assert found[0] != found[1]


def test_a_copied_data_set_keeps_its_cache(folder: Path, tmp_path: Path) -> None:
    import shutil

    cached(folder, Encoders(), **ON_DISK)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    encoders = Encoders()
    cached(tmp_path / "copy", encoders, **ON_DISK)
    assert (encoders.images, encoders.texts) == (0, 0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_damaged_files_are_made_again_with_a_message(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = cached(folder, Encoders(), **ON_DISK)
    path = sorted((folder / ".dmp_cache" / "latents").rglob("*.safetensors"))[0]
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    path.write_bytes({"cut": good[:-9], "flipped": bytes(flipped), "empty": b"",
                      "other": b"hello world" * 9}[damage])  # fmt: skip
    with pytest.raises(PatchError, match=r"found it damaged: start again"):
        epoch(data)
    encoders = Encoders()
    again = cached(folder, encoders, **ON_DISK)
    assert encoders.images == 1
    assert "1 damaged files" in capsys.readouterr().err
    assert path.read_bytes() == good
    assert len(epoch(again)) > 0


def test_processes_divide_the_work(folder: Path) -> None:
    workers = [Encoders() for _ in range(3)]
    data = [opened(CAPTIONS, train_data_dir=str(folder), **ON_DISK) for _ in workers]
    for rank, one in enumerate(data):
        one.prepare_caches(workers[rank], rank, 3)
    assert [e.images for e in workers] == [2, 2, 2]
    assert sum(e.texts for e in workers) == 7
    for one in data:
        assert len(epoch(one)) > 0


def test_progress_is_told(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    data = opened(CAPTIONS, train_data_dir=str(folder), **ON_DISK)
    data.prepare_caches(Encoders(), progress=lambda *what: told.append(what))
    assert ("caching latents", 6, 6) in told and ("caching text", 7, 7) in told


KILLED = """
import sys, time
from tests.training.data import making

class Slow(making.Encoders):
    def encode_images(self, pixels):
        print("encoding", flush=True)
        time.sleep(0.02)
        return super().encode_images(pixels)

data = making.opened(making.CAPTIONS, train_data_dir=sys.argv[1],
                     cache_latents_to_disk=True)
data.prepare_caches(Slow())
"""


def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path: Path) -> None:
    folder = making.folder_of(tmp_path / "many", 60)
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    for _ in range(8):
        assert process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    files = sorted((folder / ".dmp_cache").rglob("*.safetensors"))
    assert 5 <= len(files) < 60
    cache = TensorCache(folder / ".dmp_cache" / "latents")
    assert all(cache.state(path.stem) == "good" for path in files)
    encoders = Encoders()
    cached(folder, encoders, enable_bucket=False, cache_latents_to_disk=True)
    assert encoders.images == 60 - len(files)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader sees the old file or the new one, wherever the writer stops."""
    cache = TensorCache(tmp_path)
    key = cache_key(name="x")
    cache.write(key, {"a": torch.zeros(3)})
    for step in ("fsync", "replace"):

        def stop(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patching:
            patching.setattr(os, step, stop)
            with pytest.raises(PatchError, match=r"No space left on device: give another"):
                cache.write(key, {"a": torch.ones(3)})
        assert torch.equal(cache.read(key)["a"], torch.zeros(3))
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [
            cache.path(key).name
        ]


def test_a_full_disk_is_found_after_the_first_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(PatchError, match="make room, or give another --cache_dir"):
        cached(folder, Encoders(), **ON_DISK)


def test_an_unwritable_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(PatchError, match="to write the cache"):
        cached(folder, Encoders(), cache_dir=str(tmp_path / "file"), **ON_DISK)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"cache_text_encoder_outputs": True, "shuffle_caption": True}, "shuffle_caption with"),
        ({"cache_text_encoder_outputs": True, "enable_wildcard": True}, "enable_wildcard with"),
        (
            {"cache_text_encoder_outputs": True, "caption_tag_dropout_rate": 0.1},
            "caption_tag_dropout_rate with",
        ),
    ],
)
def test_what_a_cache_cannot_serve(folder: Path, options: dict[str, Any], found: str) -> None:
    with pytest.raises(PatchError, match=found):
        cached(folder, Encoders(), **options)


@pytest.mark.parametrize("name", ["random_crop", "color_aug"])
def test_latents_that_change_are_not_cached(folder: Path, name: str) -> None:
    """The result is what was asked for, only slower: a note, not an error."""
    encoders = Encoders()
    options: dict[str, Any] = {"cache_latents_to_disk": True, name: True}
    data = cached(folder, encoders, **options)
    assert encoders.images == 0 and not data.needs_encoders
    assert any(f"not cached: {name}" in note for note in data.summary().notes)
    plain = opened(CAPTIONS, train_data_dir=str(folder), enable_bucket=True, **{name: True})
    for batch, expected in zip(epoch(data), epoch(plain), strict=True):
        making.assert_equal(batch, expected)
    with_texts = cached(folder, encoders, cache_text_encoder_outputs=True, **options)
    batch = epoch(with_texts)[0]
    assert batch.pixels is not None and batch.text is not None


@pytest.mark.parametrize("how", [IN_MEMORY, ON_DISK], ids=["memory", "disk"])
def test_broken_images_keep_their_place_in_a_cache(
    folder: Path, how: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on processes that did not find it, and made again once it is repaired."""
    path = folder / "003.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    data = cached(folder, Encoders(), **how)
    assert capsys.readouterr().err.count("skipped: expected an image in") == 1
    weights = {
        key: 1.0 if batch.weights is None else float(batch.weights[row])
        for batch in epoch(data)
        for row, key in enumerate(batch.keys)
    }
    assert weights == {f"{n:03d}.png": float(n != 3) for n in range(6)}
    (line,) = data.summary().skipped
    assert line.count == 1 and "003.png" in line.text
    with pytest.raises(PatchError, match=r"image in .*003\.png"):
        cached(folder, Encoders(), max_broken=0, **how)
    path.write_bytes(whole)
    repaired = cached(folder, Encoders(), **how)
    assert all(batch.weights is None for batch in epoch(repaired))


def test_text_caches_need_captions(folder: Path) -> None:
    with pytest.raises(PatchError, match="takes none"):
        opened(NOTHING, train_data_dir=str(folder), cache_text_encoder_outputs=True)


def test_one_of_several_captions_with_a_text_cache(tmp_path: Path) -> None:
    folder = making.folder_of(tmp_path, 2, captions=False)
    rows = [f'{{"file_name": "{n:03d}.png", "text": ["a {n}", "b {n}", "c {n}"]}}' for n in (0, 1)]
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    encoders = Encoders()
    data = cached(folder, encoders, cache_text_encoder_outputs=True, enable_bucket=False)
    assert encoders.texts == 7
    seen = {
        float(value)
        for number in range(20)
        for batch in epoch(data, number)
        for value in (batch.text or {})["hidden"].sum((1, 2))
    }
    assert len(seen) == 6


def test_latents_that_are_not_finite_are_refused(folder: Path) -> None:
    class Overflowing(Encoders):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_images(pixels) * float("nan")

    with pytest.raises(PatchError, match=r"finite latents of .*png.*--no_half_vae"):
        cached(folder, Overflowing(), **ON_DISK)
    assert not list((folder / ".dmp_cache").rglob("*.safetensors"))


def test_batches_before_caches_is_a_mistake_of_the_program(folder: Path) -> None:
    data = opened(CAPTIONS, train_data_dir=str(folder), cache_latents=True)
    with pytest.raises(RuntimeError, match="prepare_caches"):
        data.batches(global_batch=2)


def test_cache_files_are_no_images(folder: Path) -> None:
    cached(folder, Encoders(), **ON_DISK)
    assert opened(train_data_dir=str(folder)).summary().images == 6


def test_a_missing_file_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="start again") as caught:
        TensorCache(tmp_path).read("ab" * 20)
    assert not isinstance(caught.value, DamagedError)
