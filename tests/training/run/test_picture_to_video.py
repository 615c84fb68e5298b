"""Wan's models of picture to video: told as their pipeline tells them, trained from pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dmp_common import Patch, attach
from tests.dmp_common.realwan import wan_names
from tests.randomness import randomise
from tests.tiny import FAMILIES
from tests.training.base.test_memory import config_of
from tests.training.conftest import Folders
from tests.training.tinybases import SIZE
from tests.training.tinyfiles import same
from tests.training.tinywan import PictureBase, picture_base
from training.base.cheap import cheap_base
from training.base.encoders import FrozenEncoders
from training.base.frozen import load_frozen
from training.data.images import to_tensor
from training.objective.sampling import condition, draw_latents, noises
from training.run.state import find_states
from training.train_dmp import main

if "wan" not in FAMILIES:
    pytest.skip("this release of diffusers does not know Wan", allow_module_level=True)

FRAMES = 5  # diffusers encodes the first frame, then four at once


@pytest.fixture(scope="module")
def made(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> PictureBase:
    """A base like Wan 2.1's, with CLIP's eyes."""
    return picture_base(tmp_path_factory.mktemp("clip") / "base", folders("wan"), clip=True)


@pytest.fixture(scope="module")
def given(folders: Folders) -> PictureBase:
    """A base like Wan 2.2 TI2V-5B's, of which --first_frames makes one of picture to video."""
    return PictureBase(FAMILIES["wan"].base, folders("wan"))


@pytest.fixture(scope="module")
def plain(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> PictureBase:
    """A base like Wan 2.2's, without them."""
    return picture_base(tmp_path_factory.mktemp("plain") / "base", folders("wan"), clip=False)


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


@pytest.mark.parametrize("kind", ["made", "plain", "given"])
def test_the_pipeline_draws_as_the_trainer_does(kind: str, request: pytest.FixtureRequest) -> None:
    """So mask, latent of the first frame and what CLIP sees agree, with a patch at work."""
    made, first = request.getfixturevalue(kind), kind == "given"
    options = {"base": made.base.name, "frames": FRAMES, "first_frames": first}
    if first:
        options["t5_max_token_length"] = 6
    config = config_of("wan", made.folder, **options)
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
    before = draw_latents(frozen, noise, told, nothing, steps=2, scale=3.0)
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
    assert float((drawn - before).abs().max()) > 1e-3  # the patch acts


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


@pytest.mark.parametrize("clip", [False, True], ids=["2.2", "2.1"])
def test_single_files(clip: bool, made: PictureBase, plain: PictureBase, tmp_path: Path) -> None:
    """In the original naming, as the weights of a base and as those of the cheap model."""
    made = made if clip else plain
    options = {"base": made.base.name, "frames": FRAMES}
    whole = load_frozen(config_of("wan", made.folder, **options))
    state = whole.model.state_dict()
    file = tmp_path / "model.safetensors"
    save_file({name: state[key] for key, name in wan_names(state).items()}, file)
    single = load_frozen(config_of("wan", file, **options, base_config=str(made.folder)))
    assert same(single.model, whole.model)
    assert bool(single.vision) == clip
    cheap = config_of("wan", made.folder, **options, student_weights=str(file))
    student = cheap_base(whole, cheap, lambda _: None).model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in student.items() if key in state)


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


def test_the_given_frame_counts_in_no_loss(
    given: PictureBase, folders: Folders, tmp_path: Path
) -> None:
    """Neither what is predicted there nor what the data have there changes the patch."""
    out = tmp_path / "out"
    first = ["--first_frames", "--t5_max_token_length", "6"]
    assert main(line(given, folders("pictures"), out, *first)) == 0
    tensors = Patch.load(out / f"{given.base.name}-dmp.safetensors").tensors()
    assert all(bool(tensor.any()) for tensor in tensors.values())
    frozen = load_frozen(config_of("wan", given.folder, frames=FRAMES, first_frames=True))
    clean, noise = torch.randn(2, 1, 4, 3, 8, 8).unbind()
    told = {"first": torch.randn(1, 4, 1, 8, 8), "prompt": torch.randn(1, 6, 12)}
    drawn = frozen.family.predict(frozen.model, clean, torch.tensor([500.0]), told)
    other = torch.cat([noise[:, :, :1], clean[:, :, 1:]], dim=2)
    assert torch.equal(
        frozen.family.predict(frozen.model, other, torch.tensor([500.0]), told), drawn
    )
    assert not drawn[:, :, 0].any()
    assert frozen.family.counted(clean).flatten(2).mean(2).item() == pytest.approx(2 / 3)


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
    other = PictureBase(FAMILIES["sd15"].base, folders("sd15"))
    assert main(line(other, pictures, out, "--first_frames", "--frames", "1")) == 1
    assert "with --first_frames, found tiny-sd15: leave it out" in capsys.readouterr().err
