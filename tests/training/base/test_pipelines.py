"""The trainer and diffusers' own pipeline say the same of a patched base, for every family."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dmp_common import Patch, attach
from tests.tiny import FAMILIES
from tests.training.base.test_memory import config_of
from tests.training.conftest import Folders
from tests.training.tinybases import OPTIONS, OWN, TRAINED
from tests.training.tinyflux2 import TAPS
from training.base.encoders import FrozenEncoders
from training.base.families.transformer import pack, unpack
from training.base.frozen import FrozenBase, load_frozen
from training.base.latents import as_video
from training.base.schedulers import is_flow, token_side
from training.objective.sampling import (
    condition,
    denoise,
    draw_latents,
    is_guided,
    make_sampler,
    noises,
    token_count,
)

PIPELINES = [name for name, (family, _) in TRAINED.items() if family.pipeline]
PACKED = ("flux", "qwen-image", "chroma", "krea2")  # the pipeline takes and gives tokens
GIVES_TOKENS = ("flux2",)  # of one cell each
FLAT = ("qwen-image-2.1",)  # a token is a cell; the pipeline does not guide, nor cut captions off
RESCALED = ("qwen-image",)  # the pipeline always rescales what it guides
SIDE = 8  # cells of a latent
# Of each way in which pipelines make their guided calls.
GUIDING = ("sd15", "auraflow", "ernie-image", "z-image", "lumina2", "chroma", "anima", "wan")
GUIDING += ("krea2", "hunyuan-image")
# What a pipeline is told besides the prompt, without guidance and with it.
PLAIN: dict[str, dict[str, Any]] = {"flux2": {"text_encoder_out_layers": TAPS}}
GUIDED: dict[str, dict[str, Any]] = {
    "sdxl": {"negative_prompt": ""},  # without one it takes zeros
    "lumina2": {"cfg_normalization": False},
    **{name: dict(own.guided) for name, own in OWN.items()},
}
# The side of a picture, where the pipeline takes another VAE than the tiny one for granted.
PICTURE = {"lumina2": 64, "qwen-image-2.1": 128}
PICTURE |= {name: own.side for name, own in OWN.items() if own.side is not None}
VIDEO = ("wan",)  # the pipeline takes and gives videos


def options_of(name: str) -> dict[str, Any]:
    words = OPTIONS.get(name, [])
    return {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True)}


def from_pipeline(
    frozen: FrozenBase,
    name: str,
    noise: Tensor,
    scale: float,
    patch: Patch | None = None,
    prompt: str | list[str] = "a red cat",
    **more: Any,
) -> Tensor:
    """What the pipeline of a base draws in two steps, maybe with a patch on it."""
    pipe = frozen.pipeline()
    with nullcontext() if patch is None else attach(pipe, patch):
        return drawn_by(pipe, frozen, name, noise, scale, prompt=prompt, **more)


def drawn_by(
    pipe: Any, frozen: FrozenBase, name: str, noise: Tensor, scale: float, **more: Any
) -> Tensor:
    """What a pipeline draws in two steps."""
    if name == "anima":
        length = int(options_of(name)["llm_max_token_length"])
        return drawn_by_blocks(pipe, noise, scale, max_sequence_length=length, **more)
    pipe.set_progress_bar_config(disable=True)
    if name == "chroma":  # whose own mask of ones and zeros masks nothing, see its family
        masked = pipe._prepare_attention_mask
        pipe._prepare_attention_mask = lambda attention_mask, **sizes: (
            attention_mask
            if attention_mask is None
            else masked(attention_mask=attention_mask.bool(), **sizes)
        )
    if not is_flow(frozen.scheduler):  # as in the trainer, without noise on the way
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    given, length = options_of(name), {}
    if given and (name not in OWN or OWN[name].length):
        length["max_sequence_length"] = next(int(v) for v in given.values() if v.isdigit())
    if "system_prompt" in given:
        length["system_prompt"] = given["system_prompt"]
    told = OWN[name].told if name in OWN else None
    if told is None:
        length["guidance_scale"] = scale - (name in ("z-image", "krea2"))  # which count from 0
    else:
        length |= told(pipe, scale)
    if name in VIDEO:
        noise, more = as_video(noise), {"num_frames": frozen.frames, **more}
    latents = pack(noise) if name in PACKED else noise.clone()
    if name in FLAT:
        length, latents = {}, noise.flatten(2).transpose(1, 2)
    side = PICTURE.get(name, SIDE * frozen.factor)
    made = pipe(
        height=side,
        width=side,
        latents=latents,
        num_inference_steps=2,
        output_type="latent",
        **length,
        **more,
    )[0]
    if name in (*GIVES_TOKENS, *FLAT):
        return made.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    made = made.squeeze(2) if name in VIDEO and frozen.frames == 1 else made
    return unpack(made, SIDE, SIDE) if name in PACKED else made


def drawn_by_blocks(pipe: Any, noise: Tensor, scale: float, **more: Any) -> Tensor:
    """What Anima's pipeline draws, which is made of blocks and guides by a part of its own."""
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=scale))
    side = noise.shape[-1] * pipe.vae_scale_factor
    size = {"height": side, "width": side, "latents": noise.unsqueeze(2)}
    made: Tensor = pipe(**size, num_inference_steps=2, output="latents", **more)
    return made.squeeze(2)


@pytest.mark.parametrize(
    ("name", "frames"),
    [*((name, 1) for name in PIPELINES), *((name, 3) for name in PIPELINES if name in VIDEO)],
)
def test_the_pipeline_draws_as_the_trainer_does(name: str, frames: int, folders: Folders) -> None:
    """So texts, masks, timesteps, predictions and noise levels agree, with a patch at work."""
    if name == "z-image" and not hasattr(
        diffusers.pipelines.z_image.pipeline_z_image, "get_default_z_image_sigmas"
    ):
        pytest.skip("before diffusers 0.39 its pipeline takes other noise levels")
    config = config_of(name, folders(name), **options_of(name), frames=frames)
    frozen = load_frozen(config)
    encoders = FrozenEncoders(frozen, config)
    side = SIDE * frozen.factor
    noise, _ = noises([name], frozen.latent_shape(side, side))
    guided = is_guided(frozen, frozen.family.guidance) and name not in RESCALED

    def told(text: str, scale: float) -> dict[str, Tensor]:
        return condition(frozen, encoders, text, (side, side), scale)

    def draw(scale: float) -> Tensor:
        nothing = told("", scale) if scale != 1.0 else None
        return draw_latents(frozen, noise, told("a red cat", scale), nothing, steps=2, scale=scale)

    with attach(frozen.model, FAMILIES[name].patch(0)):
        for scale in (1.0, 3.0) if guided else (1.0,):
            drawn = draw(scale)
            more = (PLAIN if scale == 1.0 else GUIDED).get(name, {})
            made = from_pipeline(frozen, name, noise, scale, **more)
            assert float((drawn - made).abs().max()) < 1e-4 * float(made.abs().max()), scale
    assert float((drawn - draw(scale)).abs().max()) > 1e-3  # the patch acts


@pytest.mark.skipif("qwen-image-2.1" not in TRAINED, reason="needs a diffusers that knows it")
def test_a_modulating_patch_draws_alike_with_the_cache_of_the_pipeline(folders: Folders) -> None:
    """The pipeline keeps keys and values of the text from its first step, unless told not to."""
    name = "qwen-image-2.1"
    config = config_of(name, folders(name), **options_of(name))
    frozen = load_frozen(config)
    noise, _ = noises([name], (frozen.channels, SIDE, SIDE))
    told = condition(frozen, FrozenEncoders(frozen, config), "a red cat", (16, 16), 1.0)
    patch = FAMILIES[name].patch(0, mix="modulate", sites="all")
    with attach(frozen.model, patch):
        drawn = draw_latents(frozen, noise, told, None, steps=2, scale=1.0)
        made = [
            from_pipeline(frozen, name, noise, 1.0, use_kv_cache=kept) for kept in (True, False)
        ]
    assert torch.equal(*made)
    assert float((drawn - made[0]).abs().max()) < 1e-4 * float(drawn.abs().max())


@pytest.mark.parametrize("name", [name for name in GUIDING if name in TRAINED])
def test_a_guidance_patch_acts_on_the_conditional_side_alone(name: str, folders: Folders) -> None:
    """As in training, however the pipeline makes its calls; here of two pictures at once."""
    config = config_of(name, folders(name), **options_of(name))
    frozen = load_frozen(config)
    side = SIDE * frozen.factor
    noise, _ = noises([name, "another"], frozen.latent_shape(side, side))
    encoders, scale = FrozenEncoders(frozen, config), 3.0

    def told(text: str) -> dict[str, Tensor]:
        given = condition(frozen, encoders, text, (side, side), scale)
        return {key: value.expand(2, *value.shape[1:]) for key, value in given.items()}

    sides = {"a red cat": told("a red cat"), "": told("")}
    patch = FAMILIES[name].patch(0, guidance=4.0, prediction=frozen.prediction)
    tokens = token_count(noise.shape[2:], token_side(frozen.base))
    with attach(frozen.model, patch) as attachment:

        def predict(x: Tensor, step: Tensor, text: str) -> Tensor:
            attachment.enabled = text != ""
            return frozen.family.predict(frozen.model, x, step.expand(len(x)), sides[text])

        sampler = make_sampler(frozen.scheduler, 2, tokens, "default", frozen.family)
        with torch.no_grad():
            ours = denoise(predict, sampler, noise, "a red cat", "", scale)
        attachment.enabled = True
        previewed = draw_latents(frozen, noise, *sides.values(), steps=2, scale=scale)
    assert torch.equal(previewed, ours)
    made = from_pipeline(
        frozen, name, noise, scale, patch=patch, prompt=["a red cat"] * 2, **GUIDED.get(name, {})
    )
    assert float((ours - made).abs().max()) < 1e-4 * float(made.abs().max())
