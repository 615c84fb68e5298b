"""Every base against the real architectures: diffusers', and the LDM naming of the hosts.

Models are built at full size on the meta device, where weights take no memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn as nn
from diffusers.loaders import single_file_utils as single_file
from torch import Tensor

import dmp_common as dmp
from dmp_common import Patch, PatchError, detect_base, get_base, known_bases
from dmp_common.detect import naming_of
from dmp_common.sites import find_module
from dmp_common.timesteps import frequency_shift
from tests.tiny import FAMILIES


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Real:
    """A released model: its configuration, and a call at its native size.

    Args:
        base: name of its base.
        build: makes the model.
        inputs: makes the arguments of a call with a batch of 2.
        latent: height and width.
        parameters: of the released model.
    """

    base: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    latent: tuple[int, int]
    parameters: int | None = None


def _unet(base: str, context: int, parameters: int, **config) -> Real:
    xl = "addition_embed_type" in config

    def build() -> nn.Module:
        return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=context, **config)

    def inputs() -> dict:
        added = {"text_embeds": meta(2, 1280), "time_ids": meta(2, 6)}
        return {
            "sample": meta(2, 4, 64, 64),
            "timestep": meta(2),
            "encoder_hidden_states": meta(2, 77, context),
        } | ({"added_cond_kwargs": added} if xl else {})

    return Real(base, build, inputs, (64, 64), parameters)


def _dit(size: str, depth: int, heads: int, patch_size: int, head_width: int = 64) -> Real:
    def build() -> nn.Module:
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_width,
            in_channels=4,
            out_channels=8,
            num_layers=depth,
            sample_size=32,
            patch_size=patch_size,
        )

    def inputs() -> dict:
        labels = meta(2, dtype=torch.long)
        return {"hidden_states": meta(2, 4, 32, 32), "timestep": meta(2), "class_labels": labels}

    return Real(f"dit-{size}/{patch_size}", build, inputs, (32, 32))


def _pixart(alpha: bool) -> Real:
    def build() -> nn.Module:  # the defaults are those of PixArt-XL-2
        return diffusers.PixArtTransformer2DModel(
            sample_size=128, caption_channels=4096, use_additional_conditions=alpha
        )

    def inputs() -> dict:
        conditions = {"resolution": meta(2, 2), "aspect_ratio": meta(2, 1)}
        return {
            "hidden_states": meta(2, 4, 128, 96),
            "encoder_hidden_states": meta(2, 120, 4096),
            "timestep": meta(2),
            "added_cond_kwargs": conditions if alpha else dict.fromkeys(conditions),
        }

    return Real("pixart", build, inputs, (128, 96))


def _sd3(base: str, depth: int, heads: int, parameters: int, **config) -> Real:
    def build() -> nn.Module:
        return diffusers.SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=depth,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=4096,
            caption_projection_dim=64 * heads,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=96,  # a table; larger ones take old versions half a minute
            **config,
        )

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 16, 128, 96),
            "encoder_hidden_states": meta(2, 154, 4096),
            "pooled_projections": meta(2, 2048),
            "timestep": meta(2),
        }

    return Real(base, build, inputs, (128, 96), parameters)


def _flux(guidance: bool, parameters: int) -> Real:
    def build() -> nn.Module:
        return diffusers.FluxTransformer2DModel(guidance_embeds=guidance)

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 64 * 48, 64),
            "encoder_hidden_states": meta(2, 512, 4096),
            "pooled_projections": meta(2, 768),
            "timestep": meta(2),
            "img_ids": meta(64 * 48, 3),
            "txt_ids": meta(512, 3),
            "guidance": meta(2) if guidance else None,
        }

    return Real("flux", build, inputs, (128, 96), parameters)


MODELS = {
    "sd15": _unet("sd15", 768, 859_520_964, attention_head_dim=8),
    "sd21": _unet(
        "sd21",
        1024,
        865_910_724,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    "sdxl": _unet(
        "sdxl",
        2048,
        2_567_463_684,
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "dit-s/2": _dit("s", 12, 6, 2),
    "dit-b/2": _dit("b", 12, 12, 2),
    "dit-b/8": _dit("b", 12, 12, 8),
    "dit-l/4": _dit("l", 24, 16, 4),
    "dit-xl/2": _dit("xl", 28, 16, 2, head_width=72),
    "pixart-alpha": _pixart(alpha=True),
    "pixart-sigma": _pixart(alpha=False),
    "sd3": _sd3("sd3", 24, 24, 2_028_328_000),
    "sd35-medium": _sd3(
        "sd35-medium",
        24,
        24,
        2_243_171_520,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "sd35-large": _sd3("sd35-large", 38, 38, 8_056_627_520, qk_norm="rms_norm"),
    "flux-dev": _flux(guidance=True, parameters=11_901_408_320),
    "flux-schnell": _flux(guidance=False, parameters=11_891_178_560),
}
ALL = pytest.mark.parametrize("name", MODELS)


@functools.cache
def model_of(name: str) -> nn.Module:
    with torch.device("meta"):
        model = MODELS[name].build()
    return model.to("meta").eval().requires_grad_(False)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Seen:
    """What a forward call of the real model showed: site inputs in order, and e."""

    inputs: dict[str, tuple[int, ...]]
    skips: dict[str, int]
    embedding: tuple[int, ...]
    features: tuple[int, ...]


@functools.cache
def seen(name: str) -> Seen:
    """Shapes at every site, from a forward call on the meta device."""
    model, real = model_of(name), MODELS[name]
    base = get_base(real.base)
    inputs: dict[str, tuple[int, ...]] = {}
    times: list[tuple[int, ...]] = []
    handles = []

    def watch(site: dmp.Site):
        key = site.arguments["diffusers"]

        def hook(module, args, kwargs):
            assert site.name not in inputs, "a site is entered once a call"
            x = args[key.index] if len(args) > key.index else kwargs[key.name]
            inputs[site.name] = tuple(x.shape)

        module = find_module(model, site.paths["diffusers"])
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    for site in base.sites:
        handles.append(watch(site))
    mlp = find_module(model, base.times["diffusers"].mlp)
    handles.append(
        mlp.register_forward_hook(
            lambda m, args, out: times.extend([tuple(args[0].shape), tuple(out.shape)])
        )
    )
    with torch.no_grad():
        model(**real.inputs(), return_dict=False)
    for handle in handles:
        handle.remove()
    return Seen(inputs, _skips(model) if base.layout == "map" else {}, times[1], times[0])


def _skips(model: nn.Module) -> dict[str, int]:
    """Channels of the skip connection each decoder site is given: last stored, first used."""
    stored = [model.conv_in.out_channels]
    for block in model.down_blocks:
        stored += [resnet.out_channels for resnet in block.resnets]
        stored += [sampler.out_channels for sampler in block.downsamplers or ()]
    names = [f"out.{n}" for n in range(len(stored))]
    return dict(zip(names, reversed(stored), strict=True))


# ------------------------------------------------------------------ diffusers


@ALL
def test_model_is_the_released_one(name):
    """Otherwise nothing below says anything about it."""
    if MODELS[name].parameters is not None:
        assert count(model_of(name)) == MODELS[name].parameters


@ALL
def test_detected_as_its_base_and_no_other(name):
    model, expected = model_of(name), MODELS[name].base
    assert detect_base(model).name == expected
    matching = {base.name: naming_of(model, base) for base in known_bases()}
    assert {k: v for k, v in matching.items() if v} == {expected: "diffusers"}
    for holder in (types.SimpleNamespace(unet=model), types.SimpleNamespace(transformer=model)):
        assert detect_base(holder).name == expected


@ALL
def test_sites_have_the_widths_and_strides_of_the_model(name):
    real, shapes = MODELS[name], seen(name)
    base = get_base(real.base)
    assert list(shapes.inputs) == [site.name for site in base.sites], "in order of depth"
    for site in base.sites:
        shape = shapes.inputs[site.name]
        height, width = (side // site.stride for side in real.latent)
        if base.layout == "map":
            skip = shapes.skips.get(site.name, 0)
            assert shape == (2, site.width + skip, height, width), site.name
        else:
            assert shape[0] == 2
            assert shape[2] == site.width, site.name
            text = 512 if site.name.startswith("single.") else 0  # in one sequence, or not
            assert shape[1] in (height * width, text + height * width), site.name


@ALL
def test_sites_have_the_widths_their_modules_state(name):
    model, base = model_of(name), get_base(MODELS[name].base)
    for site in base.sites:
        module = find_module(model, site.paths["diffusers"])
        if isinstance(module, diffusers.models.resnet.ResnetBlock2D):
            skip = seen(name).skips.get(site.name, 0)
            assert module.in_channels - skip == site.width, site.name
        elif isinstance(module, diffusers.models.resnet.Downsample2D):
            assert module.channels == site.width
        else:
            attention = module.attn1 if hasattr(module, "attn1") else module.attn
            assert attention.to_q.in_features == site.width


@ALL
def test_arguments_are_those_of_the_forward_functions(name):
    model, base = model_of(name), get_base(MODELS[name].base)

    def check(function, argument):
        names = list(inspect.signature(inspect.unwrap(function)).parameters)
        names = names[1:] if names[0] == "self" else names
        assert names[argument.index] == argument.name

    for site in base.sites:
        module = find_module(model, site.paths["diffusers"])
        # Resnets and downsamplers name it otherwise, and diffusers passes it by position.
        if base.layout == "tokens":
            check(type(module).forward, site.arguments["diffusers"])
        else:
            assert site.arguments["diffusers"].index == 0
    for argument in (base.times["diffusers"].argument, base.labels, base.positions):
        if argument is not None:
            check(type(model).forward, argument)


@ALL
def test_time_embedding(name):
    model, real = model_of(name), MODELS[name]
    base = get_base(real.base)
    source = base.times["diffusers"]
    assert seen(name).embedding == (2, base.embedding)
    assert seen(name).features == (2, base.sinusoid)
    assert find_module(model, source.path) is not None
    assert "time" in source.mlp, "the embedding of time alone"
    # diffusers builds its DiT with shift 1; the loader of the original weights sets it to 0.
    assert base.frequency_shift == 0.0
    assert frequency_shift(model, base, "diffusers") == (1.0 if "dit" in real.base else 0.0)
    expected = {"sd15": 1280, "sd21": 1280, "sdxl": 1280, "pixart": 1152, "flux": 3072}
    assert base.embedding == expected.get(base.name, base.sites[0].width)
    assert source.scale == (1000.0 if base.name == "flux" else 1.0)


@ALL
def test_context_takes_the_inputs_of_the_real_model(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # not on meta
    real, shapes = MODELS[name], seen(name)
    with torch.device("meta"):
        patch = Patch.create(real.base, sites="all").eval()
    base = patch.base
    context = patch.prepare(meta(*shapes.embedding), real.latent)
    for site in base.sites:
        x = meta(*shapes.inputs[site.name])
        assert context.add(site.name, x).shape == x.shape
        with pytest.raises(PatchError, match=f"site {site.name} expected an input of shape"):
            context.add(site.name, meta(2, 3, *x.shape[2:]))


def test_prediction_types():
    """Of the released models, as their schedulers state them."""
    predictions = {base.name: base.prediction for base in known_bases()}
    assert predictions["sd15"] == predictions["sdxl"] == predictions["pixart"] == "epsilon"
    assert predictions["dit-xl/2"] == predictions["digits"] == "epsilon"
    assert predictions["sd21"] == "v_prediction"
    for name in ("sd3", "sd35-medium", "sd35-large", "flux"):
        assert predictions[name] == "flow"


# ------------------------------------------------------------------ sites and parameters


def saved(base: str, **variant) -> int:
    """Saved parameters: as the patch counts them, and from the sizes of the table."""
    with torch.device("meta"):
        patch = Patch.create(base, **variant)
    n, e = patch.variant.prompts, patch.base.embedding
    expected = n * (e + 1) + n + sum(n * site.width for site in patch.sites.values())
    assert patch.saved_parameters == expected
    assert patch.saved_parameters == sum(t.numel() for t in patch.saved().values())
    return patch.saved_parameters


@pytest.mark.parametrize(
    ("base", "parameters", "share", "model"),
    [
        ("dit-b/2", 2_556_416, 1.96, 130e6),
        ("dit-l/2", 6_554_112, 1.43, 458e6),
        ("dit-xl/2", 8_552_960, 1.27, 675e6),
        ("sd15", 2_785_792, 0.32, 859.5e6),
        ("sdxl", 1_802_752, 0.07, 2567e6),
    ],
)
def test_saved_parameters_are_those_of_the_paper(base, parameters, share, model):
    assert saved(base) == parameters
    assert 100 * parameters / model == pytest.approx(share, abs=0.01)


def test_saved_parameters_of_all_sites():
    assert 100 * saved("sd15", sites="all") / 859_520_964 == pytest.approx(0.67, abs=0.005)
    assert saved("sd15", sites="encoder") == saved("sd15")
    assert saved("sd21") == saved("sd15")


def test_size_of_the_dit_is_that_of_the_paper():
    """diffusers gives every block its own time and label embedding; the original has one."""
    model = model_of("dit-xl/2")
    extra = 27 * count(model.transformer_blocks[0].norm1.emb)
    positions = 256 * 1152  # counted there, a buffer here
    assert count(model) - extra + positions == 675_129_632


def sites_of(base: str, choice) -> list[str]:
    return [site.name for site in get_base(base).select(choice)]


@pytest.mark.parametrize("base", ["sd15", "sd21"])
def test_site_sets_of_sd(base):
    encoder = [f"in.{n}" for n in range(1, 12)] + ["mid"]
    decoder = [f"out.{n}" for n in range(12)]
    assert sites_of(base, "encoder") == encoder
    assert sites_of(base, "decoder") == decoder
    assert sites_of(base, "all") == encoder + decoder
    assert sites_of(base, "blocks") == [
        *("in.1", "in.4", "in.7", "in.10", "mid"),
        *("out.0", "out.3", "out.6", "out.9"),
    ]
    assert get_base(base).default_sites == "encoder"
    table = {site.name: (site.width, site.stride) for site in get_base(base).sites}
    widths = [320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280]
    widths += [1280, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320]
    strides = [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, *[8] * 3, *[4] * 3, *[2] * 3, *[1] * 3]
    assert list(table.values()) == list(zip(widths, strides, strict=True))


def test_site_sets_of_sdxl():
    assert len(sites_of("sdxl", "all")) == 18
    assert sites_of("sdxl", "encoder") == [*(f"in.{n}" for n in range(1, 9)), "mid"]
    assert sites_of("sdxl", "decoder") == [f"out.{n}" for n in range(9)]
    assert len(sites_of("sdxl", "blocks")) == 7


def test_named_set_blocks_is_the_first_site_of_each_diffusers_block():
    for base in map(get_base, ("sd15", "sd21", "sdxl")):
        firsts = []
        for site in base.sites:
            block = ".".join(site.paths["diffusers"].split(".")[:2]).replace(".resnets", "")
            firsts += [] if block in dict(firsts) else [(block, site.name)]
        assert sites_of(base.name, "blocks") == [site for _, site in firsts]


@pytest.mark.parametrize(
    ("base", "count_of_sites"),
    [
        *(("digits", 6), ("dit-s/2", 12), ("dit-b/4", 12), ("dit-l/8", 24), ("dit-xl/2", 28)),
        *(("pixart", 28), ("sd3", 24), ("sd35-medium", 24), ("sd35-large", 38), ("flux", 57)),
    ],
)
def test_sites_of_transformers(base, count_of_sites):
    assert len(get_base(base).sites) == count_of_sites
    assert sites_of(base, "all") == sites_of(base, get_base(base).default_sites)
    assert sites_of(base, 2) == sites_of(base, "all")[:2]
    assert get_base(base).depths == {name: i for i, name in enumerate(sites_of(base, "all"))}


def test_depth_of_a_site_does_not_depend_on_the_choice():
    with torch.device("meta"):
        patch = Patch.create("sd15", sites=["out.3", "mid"])
    assert list(patch.sites) == ["mid", "out.3"]
    assert patch._depths == [11, 15]


@pytest.mark.parametrize(
    "choice",
    ["nowhere", 0, -1, 25, True, [], ["in.1", "in.1"], ["in.0"], ["in.1", "block.3"], ()],
)
def test_choices_without_sites(choice):
    with pytest.raises(PatchError, match="base sd15"):
        get_base("sd15").select(choice)


# ------------------------------------------------------------------ lookup and detection


ORDER = ["digits", "sd15", "sd21", "sdxl"]
ORDER += [f"dit-{size}/{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)]
ORDER += ["pixart", "sd3", "sd35-medium", "sd35-large", "flux"]


def test_known_bases_and_their_order():
    assert [base.name for base in known_bases()][: len(ORDER)] == ORDER
    assert all(get_base(name).name == name for name in ORDER)


def test_unknown_base_lists_the_known():
    with pytest.raises(PatchError) as error:
        get_base("sd51")
    for name in ORDER:
        assert name in str(error.value)
    assert "'sd51'" in str(error.value)
    assert "did you mean" in str(error.value)
    with pytest.raises(PatchError, match="expected the name of a base, found 'zzzz'; known"):
        get_base("zzzz")
    with pytest.raises(PatchError, match="known bases"):
        Patch.create("nothing like it")


def test_a_name_is_registered_once():
    base = get_base("sd15")
    assert dmp.register_base(base) is base
    with pytest.raises(PatchError, match="'sd15' exists already"):
        dmp.register_base(
            FAMILIES["sd15"].base.__class__(**{**vars(get_base("sd21")), "name": "sd15"})
        )


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _refiner() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(384, 768, 1536, 1536),
        cross_attention_dim=1280,
        down_block_types=(
            *("DownBlock2D", "CrossAttnDownBlock2D"),
            *("CrossAttnDownBlock2D", "DownBlock2D"),
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(6, 12, 24, 24),
        transformer_layers_per_block=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2560,
    )


STRANGERS = {
    "refiner": (_refiner, ["UNet2DConditionModel", "conv_in.out_channels = 384", "1536"]),
    "linear": (lambda: nn.Linear(2, 2), ["Linear", "no module of a known base"]),
    "vae": (lambda: diffusers.AutoencoderKL(), ["AutoencoderKL"]),
    "controlnet": (lambda: diffusers.ControlNetModel(cross_attention_dim=768), ["ControlNetModel"]),
    "dit-depth": (
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, num_layers=27
        ),
        ["DiTTransformer2DModel", "pos_embed.proj.out_channels = 1152"],
    ),
    "one-level-more": (
        lambda: diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280, 1280),
            cross_attention_dim=768,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2 + ("CrossAttnUpBlock2D",) * 3,
        ),
        ["UNet2DConditionModel"],
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_model_of_no_base_is_described(stranger):
    build, facts = STRANGERS[stranger]
    with pytest.raises(PatchError) as error:
        detect_base(_on_meta(build))
    for fact in [*facts, *ORDER]:
        assert fact in str(error.value)


def test_siblings_of_a_base_are_of_the_base():
    """An inpainting UNet has nine input channels and the same sites."""
    inpainting = _on_meta(
        lambda: diffusers.UNet2DConditionModel(in_channels=9, cross_attention_dim=768)
    )
    assert detect_base(inpainting).name == "sd15"


# ------------------------------------------------------------------ original names by diffusers


class Asked(dict):
    """A checkpoint that has every tensor it is asked for, each filled with its own number.

    diffusers' converters take tensors out by their original names; what they ask for is the list
    of original names, and the numbers show where each tensor goes.
    """

    def __init__(self, known: dict[str, Tensor], rows: Callable[[str], int]) -> None:
        super().__init__(known)
        self.rows = rows
        self.names: list[str] = []

    def pop(self, name: str) -> Tensor:
        super().pop(name, None)
        self.names.append(name)
        return torch.full((self.rows(name), 1), float(len(self.names) - 1))


def _unet_original(key: str, levels: int) -> str:
    """What we think the original name of a diffusers UNet's parameter is; the test proves it."""
    head, _, rest = key.partition(".")
    if head not in ("down_blocks", "mid_block", "up_blocks"):
        names = {
            "conv_in": "input_blocks.0.0",
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
            "add_embedding.linear_1": "label_emb.0.0",
            "add_embedding.linear_2": "label_emb.0.2",
            "conv_norm_out": "out.0",
            "conv_out": "out.2",
        }
        module, _, parameter = key.rpartition(".")
        return f"{names[module]}.{parameter}"
    level, kind, n, tail = ("0", *rest.split(".", 2)) if head == "mid_block" else rest.split(".", 3)
    for diffusers_name, original in {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }.items():
        if kind == "resnets" and tail.startswith(diffusers_name):
            tail = tail.replace(diffusers_name, original, 1)
    block, place = int(level) * 3, int(n)
    if head == "mid_block":
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{tail}"
    if head == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{block + 3}.0.{tail.replace('conv', 'op')}"
        return f"input_blocks.{block + 1 + place}.{int(kind == 'attentions')}.{tail}"
    if kind == "upsamplers":
        index = 2 if f"up_blocks.{level}.attentions" in key or _attends(levels, int(level)) else 1
        return f"output_blocks.{block + 2}.{index}.{tail}"
    return f"output_blocks.{block + place}.{int(kind == 'attentions')}.{tail}"


def _attends(levels: int, up: int) -> bool:
    """Whether a decoder level of SD (4 levels) or SDXL (3) has attention."""
    return up > 0 if levels == 4 else up < 2


@functools.cache
def original_names(name: str) -> dict[str, str]:
    """From diffusers' names of parameters to the original ones, as diffusers converts them."""
    model, base = model_of(name), get_base(MODELS[name].base)
    state = model.state_dict()
    if base.layout == "map":
        levels = len(model.down_blocks)
        originals = [_unet_original(key, levels) for key in state]
        # This converter hands values on untouched, so names may stand for tensors.
        checkpoint = {f"model.diffusion_model.{key}": key for key in originals}
        return single_file.convert_ldm_unet_checkpoint(checkpoint, dict(model.config))
    depth = len(model.transformer_blocks)
    if base.name == "flux":
        singles = len(model.single_transformer_blocks)
        known = {f"double_blocks.{n}.x": None for n in range(depth)}
        known |= {f"single_blocks.{n}.x": None for n in range(singles)}
        known |= {"guidance_in": None} if model.config.guidance_embeds else {}
        checkpoint = Asked(known, lambda key: 3072 * 7 if ".linear1." in key else 6)
        converted = single_file.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    else:
        known = {f"joint_blocks.{n}.x": None for n in range(depth)}
        known |= {
            f"joint_blocks.{n}.x_block.attn2.x": None
            for n in range(len(getattr(model.config, "dual_attention_layers", ())))
        }
        known |= {"joint_blocks.0.x_block.attn.ln_q.x": None} if model.config.qk_norm else {}
        known["context_embedder.weight"] = torch.zeros(base.embedding, 1)
        rows = lambda key: 2 * base.embedding  # noqa: E731
        checkpoint = Asked(known, lambda key: 3 * rows(key))
        converted = single_file.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    names = {}
    for key, value in converted.items():
        assert len(value.unique()) == 1
        names[key] = checkpoint.names[int(value.flatten()[0])]
    return names


CONVERTED = [name for name in MODELS if "dit" not in name and "pixart" not in name]
ORIGINAL = pytest.mark.parametrize("name", CONVERTED)


@ORIGINAL
def test_original_names_are_complete(name):
    """Every parameter of the diffusers model has one, so the map is the real model's."""
    names = original_names(name)
    assert set(names) == set(model_of(name).state_dict())
    assert None not in names.values()


def _under(names: dict[str, str], path: str) -> set[str]:
    return {original for key, original in names.items() if key.startswith(f"{path}.")}


@ORIGINAL
def test_ldm_paths_hold_the_parameters_of_the_diffusers_paths(name):
    names, base = original_names(name), get_base(MODELS[name].base)
    for site in base.sites:
        here, there = site.paths["diffusers"], site.paths["ldm"]
        expected = {v for v in names.values() if v.startswith(f"{there}.")}
        assert expected, site.name
        assert _under(names, here) == expected, site.name
    times = base.times
    for part in ("mlp", "path"):
        expected = {v for v in names.values() if v.startswith(f"{getattr(times['ldm'], part)}.")}
        assert _under(names, getattr(times["diffusers"], part)) == expected != set()


def tree(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Modules with these parameters: what a model of a host looks like to a path and a probe."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, owner, parameter = f"root.{name}".split(".")
        module = root
        for part in path[1:]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if owner == "root":
            module = root
        elif owner not in module._modules:
            if parameter == "weight" and len(shape) == 4:
                leaf = nn.Conv2d(shape[1], shape[0], shape[2:], device="meta")
            elif parameter == "weight" and len(shape) == 2:
                leaf = nn.Linear(shape[1], shape[0], device="meta")
            else:
                leaf = nn.Module()
            module.add_module(owner, leaf)
            module = leaf
        else:
            module = module._modules[owner]
        if parameter not in module._parameters:
            module.register_parameter(parameter, nn.Parameter(meta(*shape)))
    return root


def original_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Joined projections have the sum of their parts' rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    state = model_of(name).state_dict()
    for key, original in original_names(name).items():
        shape = tuple(state[key].shape)
        if original in shapes:
            shape = (shapes[original][0] + shape[0], *shape[1:])
        shapes[original] = shape
    return shapes


@ORIGINAL
def test_original_naming_is_detected(name):
    model, expected = tree(original_shapes(name)), MODELS[name].base
    assert detect_base(model).name == expected
    matching = {base.name: naming_of(model, base) for base in known_bases()}
    assert {k: v for k, v in matching.items() if v} == {expected: "ldm"}
    holders = (
        types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=model)),
        types.SimpleNamespace(diffusion_model=model),
    )
    for holder in holders:
        assert detect_base(holder).name == expected


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_original_unet_widths(name):
    """From the first layer's own parameters: the norm sees the stream and the skip connection."""
    shapes, base = original_shapes(name), get_base(name)
    for site in base.sites:
        path = site.paths["ldm"]
        first = shapes.get(f"{path}.in_layers.0.weight") or shapes[f"{path}.op.weight"][1:2]
        assert first == (site.width + seen(name).skips.get(site.name, 0),), site.name


def _official_pixart(alpha: bool) -> dict[str, tuple[int, ...]]:
    """Parameters of the released PixArt-XL-2 checkpoints (scripts/convert_pixart_*.py)."""
    d = 1152
    shapes = {
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.2.weight": (d, d),
        "t_block.1.weight": (6 * d, d),
        "y_embedder.y_embedding": (120, 4096),
        "y_embedder.y_proj.fc1.weight": (d, 4096),
        "y_embedder.y_proj.fc2.weight": (d, d),
        "final_layer.linear.weight": (32, d),
        "final_layer.scale_shift_table": (2, d),
    }
    if alpha:
        shapes |= {f"{n}_embedder.mlp.0.weight": (d // 3, 256) for n in ("csize", "ar")}
    for n in range(28):
        block = {
            "scale_shift_table": (6, d),
            "attn.qkv.weight": (3 * d, d),
            "attn.proj.weight": (d, d),
            "cross_attn.q_linear.weight": (d, d),
            "cross_attn.kv_linear.weight": (2 * d, d),
            "cross_attn.proj.weight": (d, d),
            "mlp.fc1.weight": (4 * d, d),
            "mlp.fc2.weight": (d, 4 * d),
        }
        shapes |= {f"blocks.{n}.{key}": shape for key, shape in block.items()}
    return shapes


def _official_dit(depth: int, d: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Parameters of the released DiT checkpoints (facebookresearch/DiT, models.py)."""
    shapes = {
        "pos_embed": (1, (32 // patch) ** 2, d),
        "x_embedder.proj.weight": (d, 4, patch, patch),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.2.weight": (d, d),
        "y_embedder.embedding_table.weight": (1001, d),
        "final_layer.linear.weight": (8 * patch**2, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
    }
    for n in range(depth):
        block = {
            "attn.qkv.weight": (3 * d, d),
            "attn.proj.weight": (d, d),
            "mlp.fc1.weight": (4 * d, d),
            "mlp.fc2.weight": (d, 4 * d),
            "adaLN_modulation.1.weight": (6 * d, d),
        }
        shapes |= {f"blocks.{n}.{key}": shape for key, shape in block.items()}
    return shapes


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (_official_pixart(alpha=True), "pixart"),
        (_official_pixart(alpha=False), "pixart"),
        *(
            (_official_dit(depth, width, patch), f"dit-{size}/{patch}")
            for size, depth, width in (
                *(("s", 12, 384), ("b", 12, 768)),
                *(("l", 24, 1024), ("xl", 28, 1152)),
            )
            for patch in (2, 4, 8)
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_original_names_without_a_converter_in_diffusers(shapes, expected):
    model = tree(shapes)
    matching = {base.name: naming_of(model, base) for base in known_bases()}
    assert {k: v for k, v in matching.items() if v} == {expected: "ldm"}
    base = get_base(expected)
    assert find_module(model, base.times["ldm"].path) is not None
    assert find_module(model, base.times["ldm"].mlp)._modules["0"].in_features == base.sinusoid
    for site in base.sites:
        module = find_module(model, site.paths["ldm"])
        assert module.attn.proj.in_features == site.width
    assert frequency_shift(model, base, "ldm") == 0.0


# ------------------------------------------------------------------ original names in the hosts


def check_host(model: nn.Module, name: str, call: Callable[[nn.Module], object] | None) -> None:
    """Paths, widths, time embedding and detection on a host's class, and shapes of a call."""
    base = get_base(MODELS[name].base)
    assert detect_base(model).name == base.name
    matching = {b.name: naming_of(model, b) for b in known_bases()}
    assert {k: v for k, v in matching.items() if v} == {base.name: "ldm"}
    if call is None:
        return
    inputs: dict[str, tuple[int, ...]] = {}
    times: list[tuple[int, ...]] = []
    source = base.times["ldm"]

    def watch(site: dmp.Site):
        key = site.arguments["ldm"]

        def hook(module, args, kwargs):
            x = args[key.index] if len(args) > key.index else kwargs[key.name]
            inputs[site.name] = tuple(x.shape)

        module = find_module(model, site.paths["ldm"])
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(site) for site in base.sites]
    handles.append(
        find_module(model, source.path).register_forward_hook(
            lambda m, args, out: times.append(tuple(out.shape))
        )
    )
    with torch.no_grad():
        call(model)
    for handle in handles:
        handle.remove()
    assert times == [(2, base.embedding)]
    assert list(inputs) == [site.name for site in base.sites]
    expected = seen(name).inputs
    for site in base.sites:
        if base.layout == "map":
            assert inputs[site.name] == expected[site.name], site.name
        else:
            text = 512 if site.name.startswith("single.") else 0
            tokens = (MODELS[name].latent[0] // 2) * (MODELS[name].latent[1] // 2)
            assert inputs[site.name] == (2, text + tokens, site.width), site.name
    arguments = list(inspect.signature(type(model).forward).parameters)[1:]
    assert source.argument.name in arguments or "kwargs" in arguments


@pytest.fixture(scope="module")
def comfyui() -> types.ModuleType:
    """`comfy.model_detection` of the ComfyUI at COMFYUI_PATH."""
    path = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (path / "comfy" / "model_detection.py").is_file():
        pytest.skip("needs ComfyUI's source: set COMFYUI_PATH to its folder")
    if str(path) not in sys.path:
        sys.path.append(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("comfy.cli_args").args.cpu = not torch.cuda.is_available()
            importlib.import_module("comfy.model_base")
            return importlib.import_module("comfy.model_detection")
        except ImportError as error:
            pytest.skip(f"needs the Python packages of ComfyUI: {error}")


COMFY_CLASSES = {
    "sd15": ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
    "sd21": ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
    "sdxl": ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
    "pixart-sigma": ("comfy.ldm.pixart.pixartms", "PixArtMS"),
    "sd3": ("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
    "sd35-medium": ("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
    "sd35-large": ("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
    "flux-dev": ("comfy.ldm.flux.model", "Flux"),
    "flux-schnell": ("comfy.ldm.flux.model", "Flux"),
}


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")  # the host's own
@pytest.mark.parametrize("name", COMFY_CLASSES)
def test_comfyui(comfyui, name, monkeypatch):
    """ComfyUI's own detection makes the model from the checkpoint's names and shapes."""
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "get_free_memory", lambda *a, **k: (2**40, 2**40))  # of meta
    module, class_name = COMFY_CLASSES[name]
    shapes = _official_pixart(False) if "pixart" in name else original_shapes(name)
    if "sd3" in name:
        shapes["pos_embed"] = (1, 96**2, get_base(name).embedding)
    state = {f"model.diffusion_model.{key}": meta(*shape) for key, shape in shapes.items()}
    found = comfyui.model_config_from_unet(state, "model.diffusion_model.")
    config = {key: found.unet_config[key] for key in found.unet_config if key != "image_model"}
    operations = importlib.import_module("comfy.ops").disable_weight_init
    kind = getattr(importlib.import_module(module), class_name)
    config |= {"device": "meta", "dtype": torch.float32, "operations": operations}
    model = kind(**config).to("meta")
    model.eval().requires_grad_(False)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if "pixart" in name:
        missing = set(shapes) - set(own)
    else:
        missing = {key for key in shapes if own.get(key) != shapes[key]}
        assert set(own) == set(shapes)
    assert not missing
    real = MODELS[name].inputs()

    def call(model: nn.Module) -> object:
        timesteps = torch.zeros(2, device="meta")
        if class_name == "UNetModel":
            y = meta(2, 2816) if name == "sdxl" else None
            return model(real["sample"], timesteps, context=real["encoder_hidden_states"], y=y)
        latent = meta(2, 4 if "pixart" in name else 16, *MODELS[name].latent)
        text = real["encoder_hidden_states"]
        if "pixart" in name:
            return model(latent, timesteps, text)
        y = real["pooled_projections"]
        if class_name == "Flux":
            return model(latent, timesteps, text, y, real["guidance"])
        return model(latent, timesteps, context=text, y=y)

    check_host(model, name, call)


def _webui() -> Path:
    path = Path(os.environ.get("WEBUI_PATH", ""))
    if not os.environ.get("WEBUI_PATH") or not path.is_dir():
        pytest.skip("needs a webui's source: set WEBUI_PATH to the folder of A1111 or Forge")
    return path


UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "use_checkpoint": False,
}
WEBUI_UNETS = {
    "sd15": dict(
        attention_resolutions=[4, 2, 1],
        channel_mult=[1, 2, 4, 4],
        num_heads=8,
        transformer_depth=1,
        context_dim=768,
    ),
    "sd21": dict(
        attention_resolutions=[4, 2, 1],
        channel_mult=[1, 2, 4, 4],
        num_head_channels=64,
        transformer_depth=1,
        context_dim=1024,
        use_linear_in_transformer=True,
    ),
    "sdxl": dict(
        attention_resolutions=[4, 2],
        channel_mult=[1, 2, 4],
        num_head_channels=64,
        transformer_depth=[1, 2, 10],
        context_dim=2048,
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=2816,
    ),
}
FORGE_SD = dict(
    num_res_blocks=[2] * 4,
    transformer_depth=[1] * 6 + [0] * 2,
    transformer_depth_output=[1] * 9 + [0] * 3,
    transformer_depth_middle=1,
)
FORGE_UNETS = {
    "sd15": FORGE_SD,
    "sd21": FORGE_SD,
    "sdxl": dict(
        num_res_blocks=[2] * 3,
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        transformer_depth_middle=10,
    ),
}


def _webui_class(path: Path, name: str, monkeypatch) -> tuple[type[nn.Module], dict]:
    """The UNet class of A1111's repositories, or Forge's own, and its configuration."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    if (path / "backend" / "nn" / "unet.py").is_file():
        for folder in (path, path / "packages_3rdparty"):
            monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(sys, "argv", [sys.argv[0], "--always-cpu"])
        module, kind = "backend.nn.unet", "IntegratedUNet2DConditionModel"
        config = {**UNET, **WEBUI_UNETS[name], **FORGE_UNETS[name]}
        config["use_spatial_transformer"] = True
        config.pop("attention_resolutions")
    else:
        folder, package = "stable-diffusion-stability-ai", "ldm"
        if name == "sdxl":
            folder, package = "generative-models", "sgm"
        root = path / "repositories" / folder
        if not (root / package).is_dir():
            pytest.skip(f"{path} has no repositories/{folder}: start the webui once")
        monkeypatch.syspath_prepend(str(root))
        if package == "sgm":  # its __init__ imports the whole of Stability's training code
            for part in ("sgm", "sgm.modules", "sgm.modules.encoders"):
                stub = types.ModuleType(part)
                stub.__path__ = [str(root / part.replace(".", "/"))]
                monkeypatch.setitem(sys.modules, part, stub)
        module, kind = f"{package}.modules.diffusionmodules.openaimodel", "UNetModel"
        config = {**UNET, **WEBUI_UNETS[name]}
        if package == "ldm":
            config |= {"image_size": 32, "use_spatial_transformer": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(importlib.import_module(module), kind), config
        except ImportError as error:
            pytest.skip(f"needs the Python packages of the webui: {error}")


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")  # the host's own
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_webui(name, monkeypatch):
    kind, config = _webui_class(_webui(), name, monkeypatch)
    with torch.device("meta"):
        try:
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(**config)
        except ImportError as error:
            pytest.skip(f"needs the Python packages of the webui: {error}")
    if management := sys.modules.get("backend.memory_management"):  # Forge asks how much is free
        monkeypatch.setattr(management, "get_free_memory", lambda *a, **k: (2**40, 2**40))
    model.to("meta").eval().requires_grad_(False)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == original_shapes(name)
    real = MODELS[name].inputs()

    def call(model: nn.Module) -> object:
        y = meta(2, 2816) if name == "sdxl" else None
        context = real["encoder_hidden_states"]
        return model(real["sample"], meta(2), context=context, y=y)

    check_host(model, name, call)
