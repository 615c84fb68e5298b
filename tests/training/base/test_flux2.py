"""FLUX.2: what its siblings differ in, and what of it no other base has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from dmp_common import Patch, PatchError, attach
from tests.randomness import randomise
from tests.releases import LACKING
from tests.training import tinyfiles
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from tests.training.tinyflux2 import KLEIN, TAPS, make_klein
from training.base.encoders import FrozenEncoders
from training.base.families import table
from training.base.frozen import FrozenBase, load_frozen
from training.base.option_checks import weights_warnings
from training.base.schedulers import token_side
from training.base.single_files import SingleFile
from training.objective.noising import process_of
from training.objective.sampling import condition, draw_latents, is_guided, noises
from training.options.command_line import resolve
from training.options.config import TrainConfig
from training.options.kohya import VALUES
from training.options.loss_options import ObjectiveOptions

SIDE = 8  # cells of a latent
Klein = Callable[..., Path]
pytestmark = pytest.mark.skipif("flux2" not in TRAINED, reason=LACKING)


@pytest.fixture
def klein(folders: Folders, tmp_path: Path) -> Klein:
    """Makes a folder of klein, with facts of its pipeline's configuration."""
    return lambda **facts: make_klein(tmp_path / "weights", folders("flux2"), **facts)


def config_of(place: Path, base: str = KLEIN.name, **options: object) -> TrainConfig:
    given = {"base": base, "pretrained_model_name_or_path": place, "llm_max_token_length": 64}
    return resolve({name: str(value) for name, value in {**given, **options}.items()})


def drawn(frozen: FrozenBase, config: TrainConfig, scale: float) -> tuple[Tensor, Tensor]:
    """What the trainer and the pipeline draw in two steps, in the space of the model."""
    encoders = FrozenEncoders(frozen, config)
    noise, _ = noises(["klein"], (frozen.channels, SIDE, SIDE))
    told, untold = (condition(frozen, encoders, text, (32, 32), scale) for text in ("a cat", ""))
    nothing = untold if is_guided(frozen, scale) else None
    ours = draw_latents(frozen, noise, told, nothing, steps=2, scale=scale)
    pipe = frozen.pipeline()
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        prompt="a cat", height=32, width=32, latents=noise.clone(), num_inference_steps=2,
        guidance_scale=scale, max_sequence_length=64, text_encoder_out_layers=TAPS,
        output_type="latent",
    )[0]  # fmt: skip
    return ours, made


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_klein_is_its_pipeline_with_guidance_and_without(scale: float, klein: Klein) -> None:
    """Klein's pipeline gives latents of the VAE, so packing and normalisation agree too."""
    config = config_of(klein(is_distilled=False))
    frozen = load_frozen(config)
    assert not frozen.family.distilled and frozen.family.guidance == 4.0
    with attach(frozen.model, randomise(Patch.create(KLEIN).eval(), 0, 0.5)):
        ours, made = drawn(frozen, config, scale)
    assert frozen.space is not None
    gap = frozen.space.unscaled(ours) - torch.nn.functional.pixel_unshuffle(made, 2)
    assert float(gap.abs().max()) < 1e-4 * float(made.abs().max())
    plain, _ = drawn(frozen, config, scale)
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_the_scale_of_dev_is_told_to_the_model(folders: Folders) -> None:
    config = config_of(folders("flux2"), "tiny-flux2")
    frozen = load_frozen(config)
    found = []
    for scale in (1.0, 4.0):
        ours, made = drawn(frozen, config, scale)
        tokens = made.transpose(1, 2).unflatten(2, (SIDE, SIDE))
        assert float((ours - tokens).abs().max()) < 1e-4 * float(made.abs().max())
        found.append(ours)
    assert not torch.allclose(*found, atol=1e-4)


def test_distilled_klein_draws_without_guidance(klein: Klein) -> None:
    """Its pipeline ignores a scale, with a warning; what the trainer would measure is refused."""
    folder = klein(is_distilled=True)
    config = config_of(folder)
    frozen = load_frozen(config)
    assert frozen.family.distilled and frozen.family.guidance == 1.0
    assert not is_guided(frozen, 1.0)
    with pytest.raises(PatchError, match=r"guidance scale of 1 for the distilled .* found 4"):
        is_guided(frozen, 4.0)
    (warning,) = weights_warnings(config, frozen.family)
    assert "--objective data" in warning and "klein-base" in warning
    guided = config_of(folder, objective="distill", teacher_guidance_scale=4)
    with pytest.raises(PatchError, match="--teacher_guidance_scale, found weights of base"):
        load_frozen(guided)
    repair = config_of(folder, objective="distill", student_quantization="rtn4")
    assert weights_warnings(repair, load_frozen(repair).family) == []


def test_the_pipeline_tells_more_than_its_name(klein: Klein, tmp_path: Path) -> None:
    folder = klein(is_distilled=False).rename(tmp_path / "FLUX.2-klein-4B")
    assert not load_frozen(config_of(folder)).family.distilled


@pytest.mark.parametrize("family", [table.FLUX2, table.FLUX2_KLEIN], ids=["dev", "klein"])
def test_defaults_are_the_pipelines(family: table.Flux2) -> None:
    cls = getattr(diffusers, family.pipeline)
    defaults = inspect.signature(cls.encode_prompt).parameters
    assert defaults["text_encoder_out_layers"].default == family.taps
    assert defaults["max_sequence_length"].default == family.longest
    assert inspect.signature(cls.__call__).parameters["guidance_scale"].default == family.guidance


def test_no_layer_above_the_last_tap_is_kept(folders: Folders, klein: Klein) -> None:
    """Of Mistral Small 3 that is a quarter, besides the half that sees pictures."""
    for config in (config_of(folders("flux2"), "tiny-flux2"), config_of(klein())):
        encoder = load_frozen(config).encoders["text_encoder"]
        assert len(encoder.layers) == TAPS[-1]
        assert not [name for name, _ in encoder.named_parameters() if "vision" in name]


def test_a_folder_that_lacks_weights_of_its_text_encoder(klein: Klein) -> None:
    folder = klein()
    state = tinyfiles.weights_of(folder / "text_encoder")
    del state["model.layers.1.mlp.up_proj.weight"]
    tinyfiles.save(folder / "text_encoder" / "model.safetensors", state)
    with pytest.raises(PatchError, match=r"found none for 1 of its tensors \(layers.1.mlp.up_proj"):
        load_frozen(config_of(folder))


def test_another_vae_is_refused(folders: Folders, tmp_path: Path) -> None:
    """In its original naming that of FLUX.1 looks alike, and lacks the normalisation."""
    folder = folders("flux2")
    tensors = tinyfiles.vae_tensors(folder)
    del tensors["bn.running_mean"]
    tensors["encoder.conv_in.bias"] = torch.zeros(3)
    path = tinyfiles.save(tmp_path / "ae.safetensors", tensors)
    with pytest.raises(PatchError) as caught:
        load_frozen(config_of(folder, "tiny-flux2", vae=path))
    assert "found 2 that are missing, unknown or of another size (bn.run" in str(caught.value)


def test_a_single_file_of_klein_is_not_taken_for_dev(klein: Klein, tmp_path: Path) -> None:
    """Parts that a file lacks come from the base's own repository."""
    path = tinyfiles.save(
        tmp_path / "klein.safetensors", tinyfiles.denoiser_tensors(klein(), "flux2")
    )
    with SingleFile(path) as file:
        assert file.usual_config is None


def test_flux_shift_counts_the_tokens_of_flux2(folders: Folders) -> None:
    """A cell of its latent is a token: 64 x 64 for a picture of 1024 x 1024 pixels."""
    frozen = load_frozen(config_of(folders("flux2"), "tiny-flux2"))
    options = ObjectiveOptions(timestep_sampling="flux_shift")
    flux = process_of(frozen.scheduler, options)
    flux2 = process_of(frozen.scheduler, options, token_side(frozen.base))
    u = z = torch.linspace(0.1, 0.9, 5)
    assert torch.equal(flux2.times(u, z, (64, 64)), flux.times(u, z, (128, 128)))
    assert VALUES["timestep_sampling"] == {"flux2_shift": "flux_shift"}  # as kohya names it
