"""Training on videos: from captions alone, from animations and from pictures that stand still."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dmp_common import Patch
from tests.tiny import FAMILIES
from tests.training.conftest import Train
from tests.training.tinybases import SIZE
from training.run.state import find_states

if "wan" not in FAMILIES:
    pytest.skip("this release of diffusers does not know Wan", allow_module_level=True)

FRAMES, LATENTS = 5, 3  # of a video, and of its latent: diffusers encodes four frames at once
VIDEO = ["--frames", str(FRAMES)]
REPAIR = ["--objective", "distill", "--student_quantization", "rtn2"]
STATES = [*REPAIR, "--states", "teacher", "--trajectories", "2", "--state_steps", "2"]
NAME = "tiny-wan-dmp"


def make_videos(folder: Path, frames: int, ending: str = "webp") -> Path:
    """Two animations with captions."""
    folder.mkdir()
    source = torch.Generator().manual_seed(5)
    for name in ("a cat", "a dog"):
        levels = torch.randint(0, 256, (frames, SIZE, SIZE, 3), generator=source)
        images = [Image.fromarray(frame.to(torch.uint8).numpy()) for frame in levels]
        more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
        images[0].save(folder / f"{name}.{ending}", **more)
        (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    return folder


def learned(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the patch that a run made, all of which it has moved."""
    tensors = Patch.load(out / f"{NAME}.safetensors").tensors()
    assert all(bool(tensor.any()) for tensor in tensors.values())
    return tensors


def test_a_repair_from_captions_alone(train: Train, tmp_path: Path) -> None:
    """States of videos, exact predictions on disk, previews as strips of frames, and a state that
    is resumed."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a red cat\na green dog\n", encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 2 --l 1\n", encoding="utf-8")
    options = [*VIDEO, *STATES, "--state_captions", str(captions), "--save_state"]
    options += ["--save_every_n_steps", "2", "--train_batch_size", "16"]
    options += ["--validation_bins", "1", "--max_validation_images", "2"]
    out = train("wan", *options, "--sample_prompts", str(prompts), data="")
    whole = learned(out)
    rows = next(out.glob("exact-predictions-*/*/00.noisy.rows"))
    shape = (4, LATENTS, SIZE // 2, SIZE // 2)
    assert rows.stat().st_size % torch.Size(shape).numel() == 0
    with Image.open(next((out / "sample").glob("*.png"))) as preview:
        assert preview.height > FRAMES * preview.width / 4, "frames lie below one another"
    early = find_states(out, NAME)[2]
    again = learned(train("wan", *options, "--resume", str(early), "--overwrite", data=""))
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize(
    "options", [["--alpha_mask"], ["--cache_latents_to_disk"]], ids=["masked", "cached"]
)
def test_videos_are_animations_in_a_folder(
    options: list[str], train: Train, tmp_path: Path
) -> None:
    videos = make_videos(tmp_path / "videos", FRAMES + 1)
    learned(train("wan", *VIDEO, *options, "--train_data_dir", str(videos), data=""))


def test_a_picture_stands_still_for_a_repair_alone(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = ["--train_data_dir", str(make_videos(tmp_path / "pictures", 1, "png"))]
    learned(train("wan", *VIDEO, *REPAIR, *pictures, data=""))
    train("wan", *VIDEO, *pictures, "--overwrite", data="", code=1)
    found = capsys.readouterr().err
    assert "a cat.png, as --frames says, found 1: replace" in found
    assert "a dog.png" in found
    assert "expected an image" not in found


def test_video_files_are_named_with_what_to_do(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = make_videos(tmp_path / "videos", FRAMES)
    (videos / "a clip.mp4").write_bytes(b"")
    train("wan", *VIDEO, "--dry_run", "--train_data_dir", str(videos), data="")
    said = capsys.readouterr().out
    assert ".mp4 videos, which are not read: make animations of them" in said
    assert "a clip.mp4" in said


def test_numbers_of_frames_that_a_base_does_not_take(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train("wan", "--frames", "4", code=1)
    assert "multiple of 2, of which the VAE makes one frame, found 4" in capsys.readouterr().err
    train("sd15", *VIDEO, code=1)
    assert "expected --frames 1 with base tiny-sd15, which draws" in capsys.readouterr().err
