"""The bases: diffusers."""

from __future__ import annotations

import contextlib
import inspect
import types

import diffusers
import pytest
import torch

from dmp_common import Patch, PatchError, detect_base, get_base, known_bases
from dmp_common.bases.base import find_module
from dmp_common.bases.detect import naming_of
from dmp_common.bases.timesteps import frequency_shift
from tests.dmp_common.realbases import ALL, MODELS, count, meta, model_of, seen


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
            assert shape[1] in real.lengths(site.stride), site.name


@ALL
def test_outputs_are_computed_once_a_call_with_their_width(name):
    outputs, base = seen(name).outputs, get_base(MODELS[name].base)
    assert set(outputs) == set(base.output_depths)
    for site in base.outputs:
        assert outputs[site.name][site.axis] == site.width, site.name


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
            names = ("attn1", "attn", "attention", "self_attention")
            attention = next(getattr(module, name) for name in names if hasattr(module, name))
            first = next(m for m in attention.modules() if isinstance(m, torch.nn.Linear))
            assert first.in_features == site.width


@ALL
def test_arguments_are_those_of_the_forward_functions(name):
    model, base = model_of(name), get_base(MODELS[name].base)

    def check(function, argument):
        names = list(inspect.signature(inspect.unwrap(function)).parameters)
        names = names[1:] if names[0] == "self" else names
        assert names[argument.index] == argument.name

    for site in base.sites:
        module = find_module(model, site.paths["diffusers"])
        check(type(module).forward, site.arguments["diffusers"])
    own = base.times["diffusers"].argument, base.labels
    for argument in own:
        if argument is not None:
            check(type(model).forward, argument)


@ALL
def test_time_embedding(name):
    model, real = model_of(name), MODELS[name]
    base = get_base(real.base)
    source = base.times["diffusers"]
    assert seen(name).embedding == (2, base.embedding)
    constants = sum(channels for _, channels in base.time_constants)
    assert seen(name).features == (2, base.sinusoid + constants)
    assert find_module(model, source.path) is not None
    known = ("time", "t_embedder", "distilled_guidance")
    assert any(part in source.mlp for part in known), "the embedding of time alone"
    # diffusers builds its DiT with shift 1; the loader of the original weights sets it to 0.
    assert base.frequency_shift == 0.0
    assert frequency_shift(model, base, "diffusers") == (1.0 if "dit" in real.base else 0.0)
    expected = {"sd15": 1280, "sd21": 1280, "sdxl": 1280, "lumina2": 1024, "z-image": 256}
    expected["anima"] = 3 * 2048
    assert base.embedding == expected.get(base.name, base.sites[0].width)
    assert source.scale == (1000.0 if real.unit_time else 1.0)
    assert source.inverted is base.inverted is (base.name in ("lumina2", "z-image"))


@ALL
def test_context_takes_the_inputs_of_the_real_model(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # not on meta
    real, shapes = MODELS[name], seen(name)
    with torch.device("meta"):
        patch = Patch.create(real.base, sites="all").eval()
    base = patch.base
    context = patch.prepare(meta(*shapes.embedding), real.latent, frames=real.frames)
    for site in base.sites:
        x = meta(*shapes.inputs[site.name])
        assert context.add(site.name, x).shape == x.shape
        with pytest.raises(PatchError, match=f"site {site.name} expected an input of shape"):
            context.add(site.name, meta(2, 3, *x.shape[2:]))


@ALL
def test_prediction_types(name):
    """Of the released models, as their schedulers state them."""
    assert get_base(MODELS[name].base).prediction == MODELS[name].prediction
