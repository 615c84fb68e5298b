"""Folders as people have them: nothing is left out, doubled or cut without a word."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dmp_common import PatchError
from tests.training.data import making
from tests.training.data.making import CAPTIONS, NOTHING, encoded, epoch, keys, opened, picture
from training.data.captions import texts
from training.data.images import endings, how_to_read
from training.data.kind import DataKind
from training.data.skips import Skips
from training.data.sources import scan
from training.data.sources.listing import list_images
from training.options.data_options import DataOptions

needs_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


def captions_of(folder: Path, **options: Any) -> dict[str, str]:
    """The caption of each image in the first epoch."""
    data = opened(CAPTIONS, train_data_dir=str(folder), **options)
    return {b.keys[0]: (b.captions or [""])[0] for b in epoch(data, global_batch=1)}


def skipped(folder: Path, **options: Any) -> list[str]:
    """What the summary says was left out."""
    data = opened(train_data_dir=str(folder), **options)
    return [line.text for line in data.summary().skipped]


def notes(folder: Path, **options: Any) -> str:
    """The notes of the summary."""
    return "\n".join(opened(train_data_dir=str(folder), **options).summary().notes)


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_clean_data_have_a_short_summary(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1)
    assert opened(train_data_dir=str(tmp_path)).summary().text(1).splitlines() == [
        f"data: {tmp_path}: 1 images",
        "steps per epoch: 1 of batch 1",
        "captions: 1 images with",
        "buckets (width x height: images, with repeats):",
        "  32x32: 1, 1",
    ]


# Images


def cut_jpeg(path: Path) -> None:
    data = encoded(picture(1, (90, 90)), "JPEG")
    path.write_bytes(data[: len(data) // 2])


def test_an_image_cut_short_behind_a_good_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    making.folder_of(tmp_path, 5)
    for name in ("000", "001"):
        (tmp_path / f"{name}.png").unlink()
        cut_jpeg(tmp_path / f"{name}.jpg")
    with pytest.raises(PatchError, match=r"at most 1 images .*, found 2: .*--skip_broken"):
        epoch(opened(train_data_dir=str(tmp_path), max_broken=1))
    for workers in (0, 2):
        data = opened(train_data_dir=str(tmp_path))
        assert not data.summary().skipped  # nobody has looked yet
        for _ in range(2):  # each is told once, however often it comes
            weights = {
                key: 1.0 if batch.weights is None else float(batch.weights[row])
                for batch in epoch(data, global_batch=2, workers=workers)
                for row, key in enumerate(batch.keys)
            }
        assert weights == {"000.jpg": 0, "001.jpg": 0, "002.png": 1, "003.png": 1, "004.png": 1}
        assert capsys.readouterr().err.count("skipped: expected an image") == 2
        assert data.summary().skipped[0].count == 2


def test_all_images_are_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = making.folder_of(tmp_path / "images", 4)
    cut_jpeg(folder / "x.jpg")
    write(folder / "x.txt", "cut")
    decoded: list[str] = []
    real = scan.open_image

    def counting(file: Any, name: str) -> Any:
        decoded.append(name)
        return real(file, name)

    monkeypatch.setattr(scan, "open_image", counting)
    for _ in range(2):
        data = opened(train_data_dir=str(folder), verify_images=True)
        assert data.size == 4
        assert "1 broken images (x.jpg)" in data.summary().skipped[0].text
    assert len(decoded) == 5
    with pytest.raises(PatchError, match=r"image in .*x\.jpg.*truncated"):
        opened(train_data_dir=str(folder), verify_images=True, max_broken=0)
    assert len(decoded) == 5
    picture(9).save(folder / "000.png")  # changed: it is decoded again
    (folder / ".dmp_cache" / "verified.json").write_text("damaged", encoding="utf-8")
    opened(train_data_dir=str(folder), verify_images=True, skip_broken=True)
    assert len(decoded) == 10


@needs_links
def test_links_give_each_real_file_once(tmp_path: Path) -> None:
    folder, other = making.folder_of(tmp_path / "images", 2), tmp_path / "other"
    making.folder_of(other, 1, start=7)
    making.folder_of(folder / "sub", 1, start=4)
    (folder / "sub" / "up").symlink_to("..")
    (folder / "again").symlink_to(folder / "sub")
    (folder / "elsewhere").symlink_to(other)
    (folder / "twin.png").symlink_to(folder / "000.png")
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    data = opened(train_data_dir=str(folder))
    assert sorted(keys(epoch(data, global_batch=1))) == [
        "000.png", "001.png", "elsewhere/007.png", "sub/004.png",
    ]  # fmt: skip
    assert [line.text for line in data.summary().skipped] == [
        "1 links that lead nowhere (gone.png)",
        "2 links to folders that are searched already (again, sub/up)",
        "1 links to images that are there already (twin.png)",
    ]


@needs_links
def test_a_linked_image_of_another_folder_is_used(tmp_path: Path) -> None:
    folder = making.folder_of(tmp_path / "images", 1)
    picture(3).save(tmp_path / "far.png")
    for name in ("a", "b"):
        (folder / f"{name}.png").symlink_to(tmp_path / "far.png")
        write(folder / f"{name}.txt", name)
    assert captions_of(folder) == {"000.png": "one, two, number 0", "a.png": "a"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_ignored(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    assert skipped(tmp_path) == ["1 pipes, sockets or devices (pipe.png)"]


def test_folders_of_file_managers_and_other_files(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1)
    for name in ("@eaDir", ".thumbnails", "__MACOSX", ".ipynb_checkpoints"):
        making.folder_of(tmp_path / name, 1)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._000.png", "film.mp4", "noending"):
        write(tmp_path / name, b"x")
    assert skipped(tmp_path) == [
        "4 hidden or system folders (.ipynb_checkpoints, .thumbnails, @eaDir, ...)",
        "1 .mp4 videos, which are not read: make animations of them (docs/TRAINING.md, Videos) "
        "(film.mp4)",
        "1 files that are no images (noending)",
    ]


def test_endings_that_pillow_reads(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.jpe", "C.JPG"):
        picture(1).save(tmp_path / name, "JPEG")
        write((tmp_path / name).with_suffix(".txt"), name)
    assert sorted(captions_of(tmp_path)) == ["C.JPG", "a.jfif", "b.jpe"]
    assert how_to_read(".jpg") is how_to_read(".mp4") is None


def test_endings_that_need_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.data import images

    plain = endings() - {".heic", ".jxl"}
    monkeypatch.setattr(images, "endings", lambda: plain)
    making.folder_of(tmp_path / "both", 1)
    for folder in ("both", "alone"):
        write(tmp_path / folder / "a.heic", b"\0\0\0\x18ftypheic" + bytes(64))
        write(tmp_path / folder / "b.jxl", b"\xff\x0a" + bytes(64))
    assert skipped(tmp_path / "both")[:2] == [
        "1 .heic images: pip install pillow-heif to read them (a.heic)",
        "1 .jxl images: pip install pillow-jxl-plugin to read them (b.jxl)",
    ]
    with pytest.raises(PatchError, match="found none but 1 .heic images: pip install pillow-heif"):
        opened(train_data_dir=str(tmp_path / "alone"))


@pytest.mark.parametrize(("plugin", "ending"), [("pillow_heif", ".heic"), ("pillow_jxl", ".jxl")])
def test_plug_ins_read_their_images(tmp_path: Path, plugin: str, ending: str) -> None:
    pytest.importorskip(plugin)
    assert ending in endings()
    picture(0, (64, 64)).save(tmp_path / f"a{ending}")
    picture(1, (64, 64)).save(tmp_path / f"b{ending}")
    (tmp_path / f"b{ending}").rename(tmp_path / "b.jpg")  # as telephones and converters do
    data = opened(NOTHING, train_data_dir=str(tmp_path))
    assert sorted(keys(epoch(data, global_batch=1))) == [f"a{ending}", "b.jpg"]
    assert not data.summary().skipped


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(64), "a HEIC image; pip install pillow-heif"),
        (b"<html>404</html>", "a web page"),
        (b"hello", "not an image, or is cut short"),
    ],
)
def test_files_of_another_kind_are_told_from_broken_ones(
    tmp_path: Path, data: bytes, found: str
) -> None:
    making.folder_of(tmp_path, 1)
    write(tmp_path / "x.jpg", data)
    if found.startswith("a HEIC") and ".heic" in endings():
        pytest.skip("the plug-in reads it, and finds it broken")
    with pytest.raises(PatchError, match=found):
        opened(train_data_dir=str(tmp_path), max_broken=0)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser reads everything"
)
def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1)
    locked = making.folder_of(tmp_path / "locked", 1)
    locked.chmod(0)
    try:
        assert "1 folders that cannot be read (locked: " in skipped(tmp_path)[0]
    finally:
        locked.chmod(0o755)


# Captions


def test_encodings_of_captions(tmp_path: Path) -> None:
    for n, data in enumerate([
        "ein Käse".encode("utf-8-sig"), "ein Käse".encode("utf-16"), "ein Käse".encode("utf-32"),
        "ein\0Käse".encode(), "ein Käse\r\n".encode(),
    ]):  # fmt: skip
        picture(n).save(tmp_path / f"{n}.png")
        write(tmp_path / f"{n}.txt", data)
    assert set(captions_of(tmp_path).values()) == {"ein Käse"}
    write(tmp_path / "0.txt", "ein Käse".encode("utf-16-le"))
    with pytest.raises(PatchError, match="NUL bytes, as in UTF-16 without a byte order mark"):
        captions_of(tmp_path)
    assert texts.decoded("ein Käse".encode("utf-16-le") * 0 + b"x") == "x"


def test_names_of_caption_files(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "A.jpg")
    write(tmp_path / "A.TXT", "upper case")
    for ending in ("jpg", "png"):
        picture(2).save(tmp_path / f"b.{ending}")
    write(tmp_path / "b.txt", "shared")
    picture(3).save(tmp_path / "c.png")
    write(tmp_path / "c.json", json.dumps({"caption": ["from json"], "width": 3}))
    write(tmp_path / "c.caption", "")
    write(tmp_path / "orphan.txt", "x")
    assert captions_of(tmp_path, allow_empty_captions=True) == {
        "A.jpg": "upper case", "b.jpg": "shared", "b.png": "shared", "c.png": "",
    }  # fmt: skip
    (tmp_path / "c.caption").unlink()
    assert captions_of(tmp_path)["c.png"] == "from json"
    found = notes(tmp_path)
    assert "1 caption files belong to several images, such as b.txt" in found
    assert "1 caption files are not used (orphan.txt)" in found


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that differ in case alone")
def test_the_case_of_a_name_is_kept_where_both_are_there(tmp_path: Path) -> None:
    for name in ("a", "A"):
        picture(1).save(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt", name)
    assert captions_of(tmp_path) == {"a.png": "a", "A.png": "A"}


def test_text_that_means_nothing_here_is_noted(tmp_path: Path) -> None:
    captions = ["(a cat:1.3), ((blue))", "x <lora:me:0.8>", "a {red|blue} cat", "plain (text)"]
    for n, caption in enumerate(captions):
        picture(n).save(tmp_path / f"{n}.png")
        write(tmp_path / f"{n}.txt", caption)
    found = notes(tmp_path)
    assert "1 captions have weights such as (word:1.3)" in found
    assert "1 captions have <lora:...>" in found
    assert "1 captions have choices such as {a|b}" in found
    assert "choices" not in notes(tmp_path, enable_wildcard=True)
    assert set(captions_of(tmp_path).values()) == set(captions)


def test_captions_longer_than_the_window_are_counted(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 2)
    write(tmp_path / "000.txt", "red cat, " * 3000)
    write(tmp_path / "001.txt", ", ".join(["tag"] * 37))
    for window, cut in ((None, 0), (75, 1), (40, 2)):
        kind = DataKind("caption", resolution=32, multiple=8, window=window)
        summary = opened(kind, train_data_dir=str(tmp_path)).summary()
        assert summary.captions is not None and summary.captions.cut == cut
        assert (f"at least {cut} longer" in summary.text(1)) == bool(cut)


# Layouts


def test_the_root_of_a_project_of_kohyas_interface(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "img" / "10_sks dog", 1, captions=False)
    making.folder_of(tmp_path / "reg" / "1_dog", 3, captions=False)
    making.folder_of(tmp_path / "model" / "sample", 2, captions=False)
    (tmp_path / "log").mkdir()
    data = opened(train_data_dir=str(tmp_path))
    assert data.size == 10 and data.samples[0].key == "10_sks dog/000.png"
    assert captions_of(tmp_path) == {"10_sks dog/000.png": "sks dog"}
    (note,) = (note for note in data.summary().notes if "interface" in note)
    assert "log, model, reg" in note and "regularisation" in note


def test_a_folder_with_repeats_given_by_itself(tmp_path: Path) -> None:
    folder = making.folder_of(tmp_path / "10_sks", 2, captions=False)
    data = opened(train_data_dir=str(folder))
    assert data.size == 20 and "10 repeats and the default caption sks" in notes(folder)
    assert captions_of(folder, class_tokens="a dog")["000.png"] == "a dog"
    assert opened(NOTHING, train_data_dir=str(folder)).size == 2


def test_years_and_counters_are_no_repeats(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "2023_summer", 2)
    making.folder_of(tmp_path / "1000_x", 1, start=5)
    assert opened(train_data_dir=str(tmp_path)).size == 3
    assert "2023_summer: its number is taken for a year" in notes(tmp_path)
    making.folder_of(tmp_path / "999_y", 1, start=8)
    assert opened(train_data_dir=str(tmp_path)).size == 3 + 999
    assert notes(tmp_path).count("taken for a year") == 2


def test_a_folder_that_lacks_its_underscore(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "10sks", 1, captions=False)
    with pytest.raises(PatchError, match="Folder 10sks is no folder with repeats; .* 10_sks"):
        opened(train_data_dir=str(tmp_path))
    assert "Folder 10sks" in notes(tmp_path, class_tokens="x")


# Metadata


def test_metadata_below_the_folder(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1)
    making.folder_of(tmp_path / "train", 2, captions=False, start=3)
    making.folder_of(tmp_path / "train" / "deep", 1, captions=False, start=7)
    rows = [{"file_name": "003.png", "text": "a"}, {"file_name": "gone.png", "text": "b"}]
    write(tmp_path / "train" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "train" / "deep" / "metadata.csv", "file_name,text\n007.png,c\n")
    assert captions_of(tmp_path) == {
        "000.png": "one, two, number 0", "train/003.png": "a", "train/deep/007.png": "c",
    }  # fmt: skip
    assert [line.split(" (")[0].split(" in ")[0] for line in skipped(tmp_path)] == [
        "1 entries of metadata that name no image",
        "1 images of train that are not",
    ]


def test_cells_lines_and_several_rows(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "csv", 2, captions=False)
    write(tmp_path / "csv" / "metadata.csv",
          '\ufefffile_name,text\r\n000.png,"a red\ncat, ""big"""\r\n001.png,x\r\n')  # fmt: skip
    assert captions_of(tmp_path / "csv") == {"000.png": 'a red\ncat, "big"', "001.png": "x"}
    making.folder_of(tmp_path / "json", 1, captions=False)
    lines = ['{"file_name": "000.png", "text": "a\u2028b\x85c"}',
             '{"file_name": "000.png", "text": "second"}']  # fmt: skip
    write(tmp_path / "json" / "metadata.jsonl", "\n".join(lines))
    (sample,) = opened(train_data_dir=str(tmp_path / "json")).samples
    assert sample.captions == ("a\u2028b\x85c", "second")


def test_kohyas_json_of_another_machine(tmp_path: Path) -> None:
    folder = making.folder_of(tmp_path / "kj", 3, captions=False)
    content = {
        "C:\\data\\kj\\000.png": {"caption": "windows", "train_resolution": [32, 32]},
        "old/kj/001": {"tags": "moved"},
        "gone": {"caption": "x"},
        "002.png": "plain",
    }
    file = tmp_path / "meta_lat.json"
    write(file, b"\xef\xbb\xbf" + json.dumps(content).encode())
    options: dict[str, Any] = {"in_json": str(file), "enable_bucket": True}
    assert captions_of(folder, **options) == {
        "000.png": "windows", "001.png": "moved", "002.png": "plain",
    }  # fmt: skip
    assert "1 entries of meta_lat.json that name no image" in skipped(folder, **options)[0]
    assert "2 entries of meta_lat.json have another path" in notes(folder, **options)


def test_ten_thousand_names_are_listed_quickly(tmp_path: Path) -> None:
    """Without a call to the system for each file beside an image."""
    calls = 0
    making.folder_of(tmp_path, 50)
    real = Path.is_file

    def counting(path: Path) -> bool:
        nonlocal calls
        calls += 1
        return real(path)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(Path, "is_file", counting)
        listing = list_images(tmp_path, Skips(DataOptions()))
        assert all(listing.find(p.with_suffix(".txt")) for p in listing.images)
    assert calls == 0 and len(listing.images) == 50


def test_masks_and_images_do_not_mix(tmp_path: Path) -> None:
    """An image with an alpha channel is still trained on white."""
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "x")
    (batch,) = epoch(opened(train_data_dir=str(tmp_path), alpha_mask=True), global_batch=1)
    assert batch.pixels is not None and float(batch.pixels.min()) == 1
    assert batch.masks is not None and float(batch.masks.max()) == 0
