"""What a run shows: previews, logs, heat maps, the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dmp_common import Patch, PatchError
from tests.training.conftest import Go, Start
from training.objective.pictures import as_image
from training.options.command_line import resolve
from training.run.metadata import without_paths
from training.run.prompt_files import read_prompts
from training.run.publishing import push
from training.run.scale import tracker_options


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_prompts_are_read_as_kohya_writes_them(start: Start, tmp_path: Path) -> None:
    text = "# classes\n\n3 --w 16 --h 16 --d 7 --s 9 --l 2.5\n  4\n"
    run, _ = start(sample_prompts=write(tmp_path / "p.txt", text), sample_steps=3, seed=11)
    run.method.remove()
    first, second = read_prompts(run.config, run.frozen)
    assert (first.text, first.width, first.height) == ("3", 16, 16)
    assert (first.seed, first.steps, first.scale) == (7, 9, 2.5)
    assert (second.text, second.seed, second.steps, second.scale) == ("4", 12, 3, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a prompt in"),
        ("ten", "expected a class id"),
        ("10", "class 10 of 10"),
        ("1 --s 0", "of at least 1"),
        ("1 --q 3", "--q"),
        ("1 --w wide", "wide"),
        ("1 --w 16 --h 8", "takes squares only"),
    ],
)
def test_bad_prompts(text: str, message: str, start: Start, tmp_path: Path) -> None:
    with pytest.raises(PatchError) as caught:
        start(sample_prompts=write(tmp_path / "p.txt", text))
    assert message in str(caught.value)


def test_previews_of_classes_need_no_file(go: Go) -> None:
    _, events = go(sample_every_n_steps=2, sample_steps=2, sample_at_first=True)
    names = sorted(path.name for path in (events.outputs.folder / "sample").iterdir())
    assert len(names) == 3 * 8  # before, at 2, at 4; the first eight classes
    folder = events.outputs.folder / "sample"
    for name, same in ((names[0], True), (names[-8], False)):
        with Image.open(folder / name) as picture:
            assert picture.text == {"prompt": "0"}
            left, right = (
                picture.crop((x, 40, x + 250, 280)).tobytes() for x in (10, 10 + 256 + 8)
            )
        # Before the first step what is trained is the base.
        assert (left == right) == same


def test_as_image_keeps_levels_and_colours() -> None:
    picture = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 2, 2)
    grey = as_image(picture)
    assert (grey.mode, grey.getpixel((0, 0)), grey.getpixel((255, 255))) == ("L", 0, 255)
    colour = as_image(
        torch.stack([torch.ones(300, 300), -torch.ones(300, 300), torch.zeros(300, 300)])
    )
    assert (colour.mode, colour.size) == ("RGB", (300, 300))
    assert colour.getpixel((5, 5)) == (255, 0, 128)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_losses_pictures_and_gate(start: Start) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.run.loop import train
    from training.run.scale import make_accelerator

    run, events = start(
        validate_every_n_steps=2, sample_every_n_steps=4, sample_steps=2, save_every_n_steps=2,
        log_with="tensorboard", cpu=True,
    )  # fmt: skip
    folder = Path(run.config.output_dir) / "logs"
    run.accelerator.__dict__.update(make_accelerator(run.config, str(folder)).__dict__)
    run.accelerator.init_trackers("run", {"seed": 0})
    train(run, events)
    run.method.remove()
    run.accelerator.end_training()
    logged = EventAccumulator(str(folder / "run"), size_guidance={"images": 0}).Reload()
    scalars = set(logged.Tags()["scalars"])
    assert {"loss/denoising", "lr", "time/step", "memory/GiB", "validation/loss"} <= scalars
    texts = {tag.removesuffix("/text_summary") for tag in logged.Tags()["tensors"]}
    assert texts == {"configuration", "prompts"}
    assert [event.step for event in logged.Scalars("validation/loss")] == [0, 2, 4]
    images = logged.Tags()["images"]
    assert "gate/0" in images
    assert "validation loss by noise level/0" in images
    assert "base, trained, difference/0" in images


@pytest.mark.parametrize("method", ["dmp", "lora", "full", "joint"])
def test_no_absolute_path_of_this_machine_goes_into_what_others_get(
    method: str, go: Go, digits_base: Path
) -> None:
    _, events = go(method=method, max_train_steps=1, learning_rate=1e-4)
    result = events.outputs.path()
    files = [result] if result.is_file() else [p for p in result.rglob("*") if p.is_file()]
    for file in files:
        assert digits_base.parent.as_posix().encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("/home/me/photos", "photos"),
        ("~/models/base.safetensors", "base.safetensors"),
        ("C:\\Users\\me\\photos", "photos"),
        ("C:/Users/me/photos", "photos"),
        ("file:///home/me/a.tar", "a.tar"),
        ("/data/{00..99}.tar::/more/*.tar", "{00..99}.tar::*.tar"),
        ("photos", "photos"),
        ("user/model", "user/model"),
        ("https://example.org/a.tar", "https://example.org/a.tar"),
        ("a cat, 1/2", "a cat, 1/2"),
    ],
)
def test_of_absolute_paths_the_last_part_is_recorded(value: str, left: str) -> None:
    assert without_paths({"option": value, "list": [value], "number": 1}) == {
        "option": left, "list": [left], "number": 1,
    }  # fmt: skip


def test_progress_line_has_what_users_look_for(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    go(max_train_steps=3)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    for part in ("loss=", "lr=1.00e-03", "s/step=", "GiB=", "3/3"):
        assert part in line


def test_result_is_pushed_with_a_card_that_shows_it(
    go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload itself is tested with the hub client in tests/dmp_common/test_hub.py."""
    sent: dict[str, object] = {}

    def push_to_hub(path: Path, repository: str, **options: object) -> str:
        sent.update(options, path=path, repository=repository)
        assert all(Path(str(picture)).is_file() for picture in options["pictures"].values())
        return "address"

    monkeypatch.setattr("training.run.publishing.push_to_hub", push_to_hub)
    run, events = go(
        sample_every_n_steps=4, sample_steps=2, huggingface_repo_id="someone/patch",
        huggingface_private=True,
    )  # fmt: skip
    assert push(run.config, run, events.outputs.path()) == "address"
    assert (sent["repository"], sent["private"]) == ("someone/patch", True)
    assert sent["path"] == events.outputs.path()
    shown = sent["pictures"]
    assert [name.startswith("Base, patched") for name in shown] == [True] * 4 + [False]
    assert all("-step00000004-" in str(path) for path in list(shown.values())[:4])


def test_what_the_user_says_of_a_patch_is_in_its_file(go: Go) -> None:
    _, events = go(
        metadata_title="T", metadata_author="A", metadata_description="D", metadata_tags="x,y",
        metadata_license="MIT", training_comment="C", max_train_steps=1,
    )  # fmt: skip
    metadata = Patch.load(events.outputs.path()).metadata
    for name, text in {"title": "T", "author": "A", "description": "D", "tags": "x,y"}.items():
        assert metadata[f"modelspec.{name}"] == text
    assert (metadata["modelspec.license"], metadata["ss_training_comment"]) == ("MIT", "C")


def test_wandb_gets_the_name_of_the_run() -> None:
    named = resolve({"base": "digits", "wandb_run_name": "mine"})
    assert tracker_options(named) == {"wandb": {"name": "mine"}}
    assert tracker_options(resolve({"base": "digits"})) == {}
