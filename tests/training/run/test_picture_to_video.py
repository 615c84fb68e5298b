"""Wan's models of picture to video: told as their pipeline tells them, trained from pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dmp_common import Patch, attach
from tests.randomness import randomise
from tests.tiny import FAMILIES
from tests.training.base.test_memory import config_of
from tests.training.conftest import Folders
from tests.training.tinybases import SIZE
from tests.training.tinywan import PictureBase, picture_base
from training.base.encoders import FrozenEncoders
from training.base.frozen import load_frozen
from training.data.images import to_tensor
from training.evaluate import main as evaluate
from training.objective.sampling import condition, draw_latents, noises
from training.run.state import find_states
from training.train_dmp import main

if "wan" not in FAMILIES:
    pytest.skip("this release of diffusers does not know Wan", allow_module_level=True)

FRAMES = 5  # diffusers encodes the first frame, then four at once


@pytest.fixture(scope="module", params=[False, True], ids=["2.2", "2.1"])
def made(
    request: pytest.FixtureRequest, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> PictureBase:
    """A base without and with CLIP's eyes."""
    folder = tmp_path_factory.mktemp("picture") / "base"
    return picture_base(folder, folders("wan"), clip=request.param)


def line(made: PictureBase, pictures: Path, out: Path, *more: str) -> list[str]:
    """A command line that repairs a rounded model at states of its own videos."""
    return [
        *("--base", made.base.name, "--pretrained_model_name_or_path", str(made.folder)),
        *("--frames", str(FRAMES), "--resolution", str(SIZE), "--recipe", "none"),
        *("--train_data_dir", str(pictures), "--output_dir", str(out)),
        *("--objective", "distill", "--student_quantization", "rtn2", "--states", "teacher"),
        *("--trajectories", "2", "--state_steps", "2", "--max_train_steps", "3"),
        *("--lr_scheduler", "constant", *more),
    ]


def test_the_pipeline_draws_as_the_trainer_does(made: PictureBase, folders: Folders) -> None:
    """So mask, latent of the first frame and what CLIP sees agree, with a patch at work."""
    config = config_of("wan", made.folder, base=made.base.name, frames=FRAMES)
    frozen = load_frozen(config)
    encoders = FrozenEncoders(frozen, config)
    side = 16 * frozen.factor
    levels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(2))
    picture = Image.fromarray(levels.to(torch.uint8).numpy())
    first = encoders.look(to_tensor(picture).unsqueeze(0))
    noise, _ = noises(["picture"], frozen.latent_shape(side, side))
    told, nothing = (
        condition(frozen, encoders, text, (side, side), 3.0) | first for text in ("a cat", "")
    )
    pipe = frozen.pipeline()
    pipe.set_progress_bar_config(disable=True)
    plain = draw_latents(frozen, noise, told, nothing, steps=2, scale=3.0)
    with attach(frozen.model, randomise(Patch.create(made.base).eval(), 0, 0.5)):
        drawn = draw_latents(frozen, noise, told, nothing, steps=2, scale=3.0)
        found = pipe(
            picture,
            prompt_embeds=told["prompt"],  # texts are those of Wan's other models
            negative_prompt_embeds=nothing["prompt"],
            height=side,
            width=side,
            num_frames=FRAMES,
            latents=noise.clone(),
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="latent",
        )[0]
    assert float((drawn - found).abs().max()) < 1e-4 * float(found.abs().max())
    assert float((drawn - plain).abs().max()) > 1e-3  # the patch acts


def test_a_repair_from_pictures(made: PictureBase, folders: Folders, tmp_path: Path) -> None:
    """Pictures are first frames: of the states, of held-out videos and of previews; a state is
    resumed."""
    pictures, out = folders("pictures"), tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat --s 2 --i {pictures / '00.png'}\n", encoding="utf-8")
    saved = ["--save_state", "--save_every_n_steps", "2"]
    assert main(line(made, pictures, out, *saved, "--sample_prompts", str(prompts))) == 0
    name = f"{made.base.name}-dmp"
    whole = Patch.load(out / f"{name}.safetensors").tensors()
    assert all(bool(tensor.any()) for tensor in whole.values())
    assert list((out / "sample").glob("*.png"))
    early = str(find_states(out, name)[2])
    assert main(line(made, pictures, out, *saved, "--resume", early, "--overwrite")) == 0
    again = Patch.load(out / f"{name}.safetensors").tensors()
    for key, value in whole.items():
        assert torch.equal(value, again[key]), key


def test_first_frames_come_from_caches(made: PictureBase, folders: Folders, tmp_path: Path) -> None:
    """Each patch is that of the other run, whose first frames are encoded as they are needed."""
    found = []
    for number, cached in enumerate((["--cache_latents"], [])):
        out = tmp_path / str(number)
        more = ["--states", "data", "--cache_text_encoder_outputs", *cached]
        assert main(line(made, folders("pictures"), out, *more)) == 0
        found.append(Patch.load(out / f"{made.base.name}-dmp.safetensors").tensors())
    for key, value in found[0].items():
        assert (value - found[1][key]).norm() < 1e-3 * value.norm(), key


def test_what_such_a_base_lacks_is_told(
    made: PictureBase, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, out = folders("pictures"), tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n", encoding="utf-8")
    wrong = {
        "expected --frames with base": ["--frames", "1"],
        "which are the first frames": ["--state_captions", str(prompts)],
        "expected a picture for the first frame": ["--sample_prompts", str(prompts)],
    }
    for message, more in wrong.items():
        assert main(line(made, pictures, out, *more)) == 1
        assert message in capsys.readouterr().err
    place = ["--base", made.base.name, "--pretrained_model_name_or_path", str(made.folder)]
    asked = ["--train_data_dir", str(pictures), "--model", "a=base:@steps=2", "--metrics", "none"]
    assert evaluate([*place, *asked]) == 1
    assert "which goes on from a picture: compare previews" in capsys.readouterr().err
