"""The evaluation of bases that draw videos, from captions and from first frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dmp_common import Patch
from tests.randomness import randomise
from tests.tiny import FAMILIES
from tests.training.conftest import Folders
from tests.training.tinybases import SIZE
from tests.training.tinywan import PictureBase, picture_base
from training.base.families.video import Wan, WanPicture
from training.evaluate import main

if "wan" not in FAMILIES:
    pytest.skip("this release of diffusers does not know Wan", allow_module_level=True)

FRAMES = 5


@pytest.fixture(scope="module")
def made(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> PictureBase:
    """A base like Wan 2.2's of picture to video."""
    return picture_base(tmp_path_factory.mktemp("plain") / "base", folders("wan"), clip=False)


def make_means() -> nn.Module:
    """Features of pictures: the means of their colours."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def line(base: PictureBase, pictures: Path, out: Path, *more: str) -> list[str]:
    """A command line that evaluates a random patch on a rounded model."""
    patch = out / "patch.safetensors"
    randomise(Patch.create(base.base, mix="modulate"), 0, 0.1).save(patch)
    return [
        *("--base", base.base.name, "--pretrained_model_name_or_path", str(base.folder)),
        *("--train_data_dir", str(pictures), "--resolution", str(SIZE)),
        *("--t5_max_token_length", "6"),
        *("--model", f"ours=dmp:{patch}", "--out", str(out), "--images", "3", "--samples", "4"),
        *("--student_quantization", "rtn2", "--guidance_scale", "3", "--sample_steps", "2"),
        *("--loss_bins", "1", "--loss_draws", "1", "--batch_size", "2", "--grid", "2", *more),
    ]


def evaluated(*arguments: Any) -> dict[str, Any]:
    assert main(line(*arguments)) == 0
    found: dict[str, Any] = json.loads((arguments[2] / "evaluation.json").read_text("utf-8"))
    return found


def test_every_model_goes_on_from_the_same_first_frames(
    made: PictureBase, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the data: with and without guidance, of the full, the cheap and the patched one."""
    seen: list[Tensor] = []
    predict = WanPicture.predict

    def watched(self: Wan, model: nn.Module, noisy: Tensor, t: Tensor, given: Any) -> Tensor:
        seen.append(given["first"].mean((1, 2, 3, 4)))
        return predict(self, model, noisy, t, given)

    monkeypatch.setattr(WanPicture, "predict", watched)
    features = f"{__name__}:make_means"
    data = evaluated(
        made, folders("pictures"), tmp_path, "--frames", str(FRAMES), "--expert", "high",
        "--feature_extractor", features, "--metrics", "fid,clip_score",
    )  # fmt: skip
    assert data["settings"]["frames"] == FRAMES
    assert set(data["settings"]["not_computed"]) == {"fid", "clip_score"}
    calls = len(seen) // 3  # of a row: losses, then two steps of two calls for each batch
    for others in (seen[calls : 2 * calls], seen[2 * calls :]):
        for one, other in zip(seen[:calls], others, strict=True):
            torch.testing.assert_close(one, other)
    assert len({round(float(value), 6) for call in seen for value in call}) == 3
    models = data["models"]
    assert models["full model"]["metrics"]["distance_to_full"] == 0
    for label in ("cheap model as it is", "ours"):
        close = models[label]["to_full"]
        assert close["pixels"]["mean"] > 0 and close["features"]["mean"] > 0
        assert models[label]["evaluations_per_picture"] == 4
    assert "fid" not in models["ours"]["metrics"]
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert f"4 videos of {FRAMES} frames" in text and "FID was not computed: it is a" in text
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height > picture.width, "frames lie below one another"


@pytest.mark.parametrize("first", [False, True], ids=["captions", "first frames"])
def test_one_model_of_both(first: bool, folders: Folders, tmp_path: Path) -> None:
    base = PictureBase(FAMILIES["wan"].base, folders("wan"))
    told = ["--first_frames"] if first else []
    more = ["--frames", str(FRAMES), "--metrics", "none", *told]
    data = evaluated(base, folders("pictures"), tmp_path, *more)
    assert data["models"]["ours"]["to_full"]["pixels"]["mean"] > 0
    assert list(data["models"]["ours"]["to_full"]) == ["pixels"]


def test_what_such_a_base_needs_is_told_at_once(
    made: PictureBase, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--frames", "1", "--sampler", "ddim", "--model", "a=what:b"]
    more += ["--model", "b=base:@epsilon=1.1", "--metrics", "none", "--in_json", "nowhere"]
    assert main(line(made, folders("pictures"), tmp_path, *more)) == 1
    found = capsys.readouterr().err
    for part in (
        "expected --frames with base tiny-wan-picture", "sampler euler for a flow model",
        "LABEL=KIND:PATH", "for epsilon scaling", "a JSON file at nowhere",
    ):  # fmt: skip
        assert part in found
