"""Webdataset shards: in order, in constant memory, resumable, from files and URLs."""

from __future__ import annotations

import functools
import gc
import json
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dmp_common import PatchError
from tests.training.data import making
from tests.training.data.making import (
    CAPTIONS,
    LABELS,
    NOTHING,
    assert_equal,
    encoded,
    keys,
    opened,
    picture,
    shard_of,
    take,
)
from training.data.stream import lanes, remote, shards, streaming

pytest.importorskip("webdataset")


def test_ways_to_name_shards(tmp_path: Path) -> None:
    making.shards_of(tmp_path, [1, 1, 1])
    folder = tmp_path.as_posix()
    three = [f"{folder}/0000{n}.tar" for n in range(3)]
    assert shards.expand(f"{folder}/{{00000..00002}}.tar") == three
    assert shards.expand(f"{folder}/*.tar") == shards.expand(folder) == three
    assert shards.expand(f"{three[2]}::{three[0]}") == [three[2], three[0]]
    assert shards.expand((tmp_path / "00001.tar").as_uri()) == [three[1]]
    assert shards.expand("https://x.org/{0..2}.tar")[2] == "https://x.org/2.tar"
    with pytest.raises(PatchError, match=r"a shard at .*/9\.tar, found none"):
        shards.expand(f"{folder}/9.tar")
    with pytest.raises(PatchError, match="does not run programs"):
        shards.expand("pipe:curl http://x/0.tar")
    with pytest.raises(PatchError, match="each shard once"):
        shards.expand(f"{three[0]}::{three[0]}")


def test_every_image_as_often_whatever_the_sizes(tmp_path: Path) -> None:
    """Six shards of different sizes for four lanes: each shard is read equally often."""
    places = making.shards_of(tmp_path, [5, 1, 9, 4, 7, 3])
    data = opened(webdataset=places, shuffle_buffer=8)
    seen = Counter(keys(take(data.batches(global_batch=4), 29 * 3)))
    assert len(seen) == 29
    assert max(seen.values()) - min(seen.values()) <= 3


def test_fewer_shards_than_lanes(tmp_path: Path) -> None:
    data = opened(webdataset=making.shards_of(tmp_path, [13]), shuffle_buffer=16)
    batches = take(data.batches(global_batch=8), 13)
    assert len(set(keys(batches))) == 13
    assert sum(len(set(b.keys)) for b in batches) > 6 * len(batches)


def test_one_image_for_a_batch_of_eight(tmp_path: Path) -> None:
    data = opened(webdataset=making.shards_of(tmp_path, [1]))
    assert set(keys(take(data.batches(global_batch=8), 3))) == {"00000.tar!0000000"}


def test_shards_that_have_become_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(webdataset=making.shards_of(tmp_path, [2, 2]))
    monkeypatch.setattr(lanes, "read_shard", lambda _: iter(()))
    with pytest.raises(PatchError, match="images in the 2 shards, found none any more"):
        next(data.batches(global_batch=8))


def test_names_do_not_say_where_the_data_are(tmp_path: Path) -> None:
    for side in ("a", "b"):
        making.shards_of(tmp_path / side, [1])
    names = [s.name for s in shards.find_shards(f"{tmp_path}/a::{tmp_path}/b")]
    assert names == ["a/00000.tar", "b/00000.tar"]
    assert [s.name for s in shards.find_shards(f"{tmp_path}/b")] == ["00000.tar"]
    urls = shards.find_shards("http://x/a/0.tar::http://x/b/0.tar")
    assert [s.name for s in urls] == ["a/0.tar", "b/0.tar"]


def test_order_differs_by_epoch_and_seed(tmp_path: Path) -> None:
    places = making.shards_of(tmp_path, [6, 6])
    one, two = (
        keys(take(opened(webdataset=places, seed=s).batches(global_batch=2), 12)) for s in (1, 2)
    )
    assert one != two and one[:12] != one[12:]


def test_resume_reads_no_shard_that_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = making.shards_of(tmp_path, [6] * 8)
    data = opened(webdataset=places)
    whole = take(data.batches(global_batch=2), 40)
    read: list[str] = []

    def counting(place: str) -> Iterator[shards.Raw]:
        read.append(place)
        yield from shards.read_shard(place)

    monkeypatch.setattr(lanes, "read_shard", counting)
    assert_equal(next(data.batches(global_batch=2, start=whole[37].next)), whole[38])
    assert len(read) == 2  # one for each lane


def test_buckets_of_a_stream(tmp_path: Path) -> None:
    places = making.shards_of(tmp_path, [20, 20, 20])
    data = opened(webdataset=places, enable_bucket=True, shuffle_buffer=64)
    batches = take(data.batches(global_batch=4), 45)
    sizes = Counter(tuple(b.pixels.shape[2:]) for b in batches)
    assert len(sizes) >= 3
    assert len(set(keys(batches))) == 60
    assert any("sizes of batches" in note for note in data.summary().notes)
    right = sum(
        (row[0] > row[1]) == (row[4] > row[5]) for b in batches for row in b.sizes.tolist()
        if row[4] != row[5]
    )  # fmt: skip
    assert right / sum(len(b) for b in batches if b.sizes[0, 4] != b.sizes[0, 5]) > 0.8


def test_memory_and_files_do_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 shards of 12 images of about 12 kB each: 3.5 MB pass, the pool holds eight images."""
    for n in range(24):
        samples = {
            f"{n:03d}{i:03d}": {
                "bmp": encoded(picture(100 * n + i, (64, 64)), "BMP"), "txt": b"x",
            }
            for i in range(12)
        }  # fmt: skip
        shard_of(tmp_path / f"{n:03d}.tar", samples)
    live: set[int] = set()
    most = 0
    real = remote.open_place

    def counted(place: str) -> Any:
        nonlocal most
        file = real(place)
        live.add(id(file))
        most = max(most, len(live))
        close = file.close

        class Closing:
            def read(self, *how: Any) -> bytes:
                return file.read(*how)

            def close(self) -> None:
                live.discard(id(file))
                close()

        return Closing()

    monkeypatch.setattr(remote, "open_place", counted)
    data = opened(webdataset=str(tmp_path), shuffle_buffer=8)
    batches = data.batches(global_batch=4)
    take(batches, 8)
    tracemalloc.start()
    try:
        sizes = []
        for _ in range(4):
            take(batches, 18)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.reset_peak()
        take(batches, 18)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most <= 4 + 1  # a shard for each lane, and one that was looked at in the beginning
    assert max(sizes) - min(sizes) < 250_000, sizes
    assert peak < 1_500_000  # of 3.5 MB


def test_samples_of_every_kind(tmp_path: Path) -> None:
    image = encoded(picture(1))
    place = shard_of(
        tmp_path / "a.tar",
        {
            "a/000": {"JPG": encoded(picture(1), "JPEG"), "txt": "über".encode()},
            "a/001": {"png": image, "json": b'{"caption": "from json"}'},
            "a/002": {"png": image, "json": b'{"caption": ["one", "two"], "x": "column"}'},
            "a/003": {"txt": b"no image"},
            "__meta__": {"json": b"{}"},
        },
    )
    data = opened(webdataset=str(place))
    assert data.size == 3
    found = {b.keys[0]: b.captions for b in take(data.batches(global_batch=1), 3)}
    assert found["a.tar!a/000"] == ["über"] and found["a.tar!a/001"] == ["from json"]
    assert found["a.tar!a/002"][0] in ("one", "two")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"a caption in .*0\.tar!k .*--allow_empty_captions"),
        ({"txt": b"\xff\xfe\xfa"}, "text, JSON or a number"),
        ({"json": b"{"}, "text, JSON or a number"),
        ({"json": b'{"width": 3}'}, "found none: give"),
    ],
)
def test_captions_that_are_missing(tmp_path: Path, parts: dict[str, bytes], message: str) -> None:
    place = shard_of(tmp_path / "0.tar", {"k": {"png": encoded(picture(0)), **parts}})
    with pytest.raises(PatchError, match=message):
        opened(webdataset=str(place))
    if "json" not in parts and "txt" not in parts:
        data = opened(webdataset=str(place), class_tokens="a cat")
        assert next(data.batches(global_batch=1)).captions == ["a cat"]
        data = opened(webdataset=str(place), allow_empty_captions=True)
        assert next(data.batches(global_batch=1)).captions == [""]


@pytest.mark.parametrize(
    ("parts", "message"),
    [({}, "a class in"), ({"cls": b"7"}, "below 4 .* found 7"), ({"cls": b"x"}, "a number")],
)
def test_classes_that_are_wrong(tmp_path: Path, parts: dict[str, bytes], message: str) -> None:
    place = shard_of(tmp_path / "0.tar", {"k": {"png": encoded(picture(0)), **parts}})
    with pytest.raises(PatchError, match=message):
        opened(LABELS, webdataset=str(place))


def test_classes(tmp_path: Path) -> None:
    data = opened(LABELS, webdataset=making.shards_of(tmp_path, [4]), caption_dropout_rate=0.5)
    labels = torch.cat([b.labels for b in take(data.batches(global_batch=4), 30)])
    assert set(labels.tolist()) == {0, 1, 2, 3, 4}


def test_files_that_are_no_tar(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(PatchError, match=r"0\.tar: expected a whole tar file"):
        opened(webdataset=str(tmp_path))


def test_a_shard_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    making.shards_of(tmp_path, [5])
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(PatchError, match=r"00000\.tar: expected a whole tar file .*unexpected end"):
        opened(NOTHING, webdataset=str(path))
    monkeypatch.setattr(streaming, "_COUNTED", 0)  # as where there are too many to look at
    data = opened(NOTHING, webdataset=str(path))
    with pytest.raises(PatchError, match=r"00000\.tar: expected a whole tar file"):
        take(data.batches(global_batch=1), 6)


def test_broken_images_stop_or_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = encoded(picture(0))
    samples = {f"{n}": {"png": image, "txt": b"x"} for n in range(4)}
    samples["4"] = {"png": b"broken", "txt": b"x"}
    samples["5"] = {"png": image[:-300], "txt": b"x"}
    place = str(shard_of(tmp_path / "0.tar", samples))
    with pytest.raises(PatchError, match=r"image in .*0\.tar![45]"):
        take(opened(webdataset=place, max_broken=0).batches(global_batch=2), 3)
    with pytest.raises(PatchError, match=r"at most 1 images .*, found 2: .*--skip_broken"):
        take(opened(webdataset=place, max_broken=1).batches(global_batch=2), 3)
    data = opened(webdataset=place, shuffle_buffer=1)
    capsys.readouterr()
    for workers in (0, 2):
        weights = {}
        for batch in take(data.batches(global_batch=2, workers=workers), 12):
            given = batch.weights if batch.weights is not None else torch.ones(2)
            weights.update(zip(batch.keys, given.tolist(), strict=True))
        assert weights == {f"0.tar!{n}": float(n < 4) for n in range(6)}
    assert capsys.readouterr().err.count("skipped: expected an image in") == 2
    assert data.summary().skipped[0].count == 2


def test_samples_without_caption_or_class_are_skipped_on_request(tmp_path: Path) -> None:
    image = encoded(picture(0))
    parts: list[dict[str, bytes]] = [
        {"png": image, "txt": b"x", "cls": b"1"}, {"png": image},
        {"png": image, "json": b'{"caption": null}', "cls": b"x"},
        {"png": image, "json": b'\xef\xbb\xbf{"caption": "y"}', "cls": b"\xef\xbb\xbf2"},
    ]  # fmt: skip
    place = str(shard_of(tmp_path / "0.tar", {str(n): p for n, p in enumerate(parts)}))
    for kind in (CAPTIONS, LABELS):
        with pytest.raises(PatchError, match=r"0\.tar!1"):
            take(opened(kind, webdataset=place).batches(global_batch=1), 4)
        data = opened(kind, webdataset=place, skip_broken=True)
        weights = {
            batch.keys[0]: 1.0 if batch.weights is None else float(batch.weights[0])
            for batch in take(data.batches(global_batch=1), 4)
        }
        assert weights == {f"0.tar!{n}": float(n in (0, 3)) for n in range(4)}
        assert data.summary().skipped[0].count == 2


def test_pairs_that_are_not_adjacent(tmp_path: Path) -> None:
    place = tmp_path / "0.tar"
    files = {"0.png": encoded(picture(0)), "1.png": encoded(picture(1)), "0.txt": b"a",
             "1.txt": b"b"}  # fmt: skip
    making.tar_of(place, files)
    with pytest.raises(PatchError, match="must stand next to each other"):
        opened(webdataset=str(place))
    with pytest.raises(PatchError, match="images that can be used in .* found none among"):
        opened(webdataset=str(place), skip_broken=True)


def test_names_with_dots_and_files_of_systems(tmp_path: Path) -> None:
    image, place = encoded(picture(0)), tmp_path / "0.tar"
    making.tar_of(
        place,
        {
            "photo.v2.png": image, "photo.v2.txt": b"one", "c.seg.png": image, "c.png": image,
            "c.txt": b"two", "__MACOSX/x/._0.png": b"x", "./a/._0.png": b"x", "d.txt": b"alone",
        },
    )  # fmt: skip
    data = opened(webdataset=str(place))
    found = {b.keys[0]: b.captions for b in take(data.batches(global_batch=1), 2)}
    assert found == {"0.tar!photo.v2": ["one"], "0.tar!c": ["two"]}
    assert data.size == 2
    assert "no image (0.tar: 1)" in data.summary().skipped[0].text


def test_a_run_without_usable_images_stops(tmp_path: Path) -> None:
    samples = {f"{n}": {"png": b"broken", "txt": b"x"} for n in range(80)}
    samples["0"] = {"png": encoded(picture(0)), "txt": b"x"}
    data = opened(webdataset=str(shard_of(tmp_path / "0.tar", samples)), skip_broken=True)
    with pytest.raises(PatchError, match="found .* of .* that cannot"):
        take(data.batches(global_batch=4), 40)


@pytest.mark.parametrize("name", ["cache_latents", "cache_text_encoder_outputs",
                                  "bucket_no_upscale"])  # fmt: skip
def test_what_streams_cannot_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(PatchError, match=f"no --{name} with --webdataset"):
        opened(CAPTIONS, webdataset=making.shards_of(tmp_path, [2]), **{name: True})


def test_a_split_needs_two_shards(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="two shards to split"):
        opened(webdataset=making.shards_of(tmp_path, [2]), validation_split=0.1)


def test_counting_reads_headers_and_agrees_with_reading(tmp_path: Path) -> None:
    place = shard_of(
        tmp_path / "0.tar",
        {
            "a": {"png": b"1", "txt": b""},
            "b": {"txt": b""},
            "c.d": {"PNG": b"3"},
            "e": {"jpg": b""},
        },
    ).as_posix()
    assert shards.Counts(None).of(place) == sum(1 for _ in shards.read_shard(place))


def test_lanes_divide_every_batch() -> None:
    for batch in (1, 2, 7, 12, 64, 128, 130, 4096, 67):
        count = lanes.lane_count(batch)
        assert batch % count == 0 and count <= lanes.MOST_LANES
    assert lanes.lane_count(128) == 64 and lanes.lane_count(67) == 1


class Server(ThreadingHTTPServer):
    """Files of a folder. Connections break after `cut` bytes, the first `fail` requests fail."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.cut, self.fail, self.ranges = folder, 0, 0, True
        self.requests: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client may go away."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        path = self.server.folder / self.path.lstrip("/")
        if self.server.fail or not path.is_file():
            self.send_error(503 if self.server.fail else 404)
            self.server.fail = max(0, self.server.fail - 1)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        start = start if self.server.ranges else 0
        data = path.read_bytes()[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: self.server.cut] if self.server.cut else data)
        self.close_connection = True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 12)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    making.shards_of(tmp_path / "shards", [6, 6, 6])
    made = Server(tmp_path / "shards")
    thread = threading.Thread(target=functools.partial(made.serve_forever, 0.01))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_urls_give_what_files_give(server: Server) -> None:
    here = opened(webdataset=str(server.folder))
    there = opened(webdataset=server.address + "/{00000..00002}.tar")
    assert there.size is None and "not counted" in there.summary().text(2)
    for expected, found in zip(
        take(here.batches(global_batch=2), 20), there.batches(global_batch=2), strict=False
    ):
        assert expected.keys == found.keys and torch.equal(expected.pixels, found.pixels)


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_taken_up_again(server: Server, ranges: bool) -> None:
    whole = (server.folder / "00000.tar").read_bytes()
    server.ranges = ranges
    server.cut = 7000 if ranges else 0
    server.fail = 2
    with remote.open_place(f"{server.address}/00000.tar") as file:
        assert file.read() == whole
    if ranges:
        assert len(server.requests) > 3 and server.requests[-1][1] is not None


def test_a_server_without_ranges_is_read_from_the_start(server: Server) -> None:
    whole = (server.folder / "00000.tar").read_bytes()
    server.ranges, server.cut = False, 9000
    with remote.open_place(f"{server.address}/00000.tar") as file:
        head = file.read(8000)
        server.cut = 0
        assert head + file.read() == whole


def test_urls_that_are_not_there(server: Server) -> None:
    with pytest.raises(PatchError, match=r"http.*/9\.tar: expected a file, found .*404"):
        opened(webdataset=f"{server.address}/9.tar")
    assert len(server.requests) == 1
    server.fail = 99
    with pytest.raises(PatchError, match="503"):
        opened(webdataset=f"{server.address}/00000.tar")


def test_resuming_from_urls_remembers_counts(server: Server, tmp_path: Path) -> None:
    options = {"webdataset": server.address + "/{00000..00002}.tar",
               "cache_dir": str(tmp_path / "counts")}  # fmt: skip
    whole = take(opened(**options).batches(global_batch=2), 30)
    server.requests.clear()
    batches = opened(**options).batches(global_batch=2, start=whole[27].next)
    server.requests.clear()
    assert_equal(next(batches), whole[28])
    assert len(server.requests) == 2
    for n in range(3):
        text = json.dumps({"successes": 6})
        (server.folder / f"0000{n}_stats.json").write_text(text, encoding="utf-8")
    bare = opened(webdataset=options["webdataset"])
    server.requests.clear()
    assert_equal(next(bare.batches(global_batch=2, start=whole[27].next)), whole[28])
    stats = [path for path, _ in server.requests if path.endswith("_stats.json")]
    assert len(set(stats)) == 3
    assert sum(path.endswith(".tar") for path, _ in server.requests) == 2


def test_other_schemes_go_through_fsspec() -> None:
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://x/0.tar", "wb") as file:
        file.write(b"content")
    with remote.open_place("memory://x/0.tar") as file:
        assert file.read() == b"content"
    with pytest.raises(PatchError, match="nosuch"):
        remote.open_place("nosuch://x")
    with pytest.raises(PatchError, match="no/such"):
        remote.open_place("no/such")
