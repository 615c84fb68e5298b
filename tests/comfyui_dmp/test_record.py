"""What travels along a wire, and the slots of ComfyUI's models, without ComfyUI."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

from comfyui_dmp import checks, slots
from comfyui_dmp.checks import require_fitting
from comfyui_dmp.hooks import adding
from comfyui_dmp.model import latent_of, time_embedding
from comfyui_dmp.notices import say_other_noise
from comfyui_dmp.slots import block_keys, dit_options, slot_of, unet_options
from dmp_common import Patch, PatchError, get_base
from dmp_common.attach.compatibility import require_compatible
from dmp_common.attach.record import LoadedPatch, PatchRecord
from dmp_common.bases.base import Latent
from tests.tiny import FAMILIES


def record(patch: Patch | None = None, **settings: Any) -> PatchRecord:
    patch = patch or FAMILIES["sd15"].patch()
    return PatchRecord(LoadedPatch(patch, Path("models/dmp/p.safetensors")), **settings)


def linear(percent: float) -> float:
    return (1.0 - percent) * 1000.0


def test_record_is_never_copied():
    one = record()
    assert copy.deepcopy({"a": [one]})["a"][0] is one
    assert copy.copy(one.loaded) is not None
    changed = dataclasses.replace(one, strength=0.5)
    assert changed.loaded is one.loaded
    assert one.strength == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.strength = 2.0  # type: ignore[misc]


def test_loaded_patch_learns_nothing():
    patch = FAMILIES["sd15"].patch().train().requires_grad_(True)
    loaded = LoadedPatch(patch, Path("p.safetensors"))
    assert not loaded.patch.training
    assert not any(p.requires_grad for p in loaded.patch.parameters())
    assert loaded.runtime.on(torch.device("cpu")) is loaded.runtime


def test_copies_on_other_devices_are_made_once_and_released():
    loaded = record().loaded
    there = loaded.runtime.on(torch.device("meta"))
    assert loaded.runtime.on(torch.device("meta")) is there
    assert there is not loaded.runtime
    loaded.runtime.release()
    assert loaded.runtime.on(torch.device("meta")) is not there


def test_settings_by_progress():
    settings = record(start=0.1, end=0.6, curve=(1.0, 0.5, 0.0)).settings(linear)
    factors = settings.schedule.factors(torch.tensor([950.0, 900.0, 750.0, 500.0, 400.0, 300.0]))
    expected = torch.tensor([0.0, 0.9, 0.75, 0.5, 0.4, 0.0], dtype=torch.float64)
    torch.testing.assert_close(factors, expected)
    assert record().settings(linear).schedule.always


@pytest.mark.parametrize(
    "settings",
    [
        {"start": 0.5, "end": 0.2},
        {"end": 1.5},
        {"strength": float("nan")},
        {"temperature": 0.0},
        {"curve": (1.0, float("inf"), 1.0)},
    ],
    ids=str,
)
def test_impossible_settings_name_the_file(settings):
    with pytest.raises(PatchError, match=r"^p\.safetensors: expected"):
        record(**settings)


@pytest.mark.parametrize(
    ("name", "slot"),
    [("sd15", "unet"), ("sdxl", "unet"), ("sd3", "dit"), ("flux", "dit"), ("pixart", "hooks")],
)
def test_slots(name, slot):
    base = get_base(name)
    assert slot_of(base) == slot
    keys = block_keys(base)
    assert sorted(keys.values()) == sorted(site.name for site in base.sites)


def test_examples_run():
    assert doctest.testmod(slots) == doctest.TestResults(failed=0, attempted=3)


def test_slots_of_the_table_in_the_design():
    keys = block_keys(get_base("sdxl"))
    assert keys["input", 0] == "in.1"
    assert keys["input", 8] == "mid"
    assert keys["output", 8] == "out.8"
    flux = block_keys(get_base("flux"))
    assert flux["double_block", 18] == "double.18"
    assert flux["single_block", 37] == "single.37"
    assert block_keys(get_base("sd3"))["double_block", 23] == "joint.23"


def context_adding(amount: float) -> Any:
    return SimpleNamespace(add=lambda site, x: x + amount)


def test_unet_options_do_not_change_the_callers():
    other = {"emb_patch": ["theirs"], "output_block_patch": ["theirs"]}
    options = {"patches": other, "sigmas": 1}
    ours = unet_options(options, {("input", 0): "in.1"}, lambda e: context_adding(1.0))
    assert options == {"patches": other, "sigmas": 1}
    assert other == {"emb_patch": ["theirs"], "output_block_patch": ["theirs"]}
    embedded, theirs = ours["patches"]["emb_patch"]
    assert theirs == "theirs"  # after ours, which must see the pure embedding
    assert ours["patches"]["output_block_patch"][0] == "theirs"  # before ours
    (add,) = ours["patches"]["input_block_patch_after_skip"]
    h = torch.zeros(1)
    with pytest.raises(PatchError, match="expected the UNet to embed its timestep"):
        add(h, {"block": ("input", 0)})
    assert add(h, {"block": ("input", 5)}) is h
    emb = torch.zeros(1, 2)
    assert embedded(emb, 320, ours) is emb
    assert add(h, {"block": ("input", 0)}) == 1.0
    assert h == 0.0


def test_dit_options_keep_the_replacements_of_others():
    key = ("double_block", 0)

    def theirs(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"]({**args, "img": args["img"] * 10})

    options = {"patches_replace": {"dit": {key: theirs}, "attn1": {}}}
    ours = dit_options(options, {key: "joint.0"}, context_adding(1.0))
    again = dit_options(ours, {key: "joint.0"}, context_adding(2.0))
    assert options["patches_replace"]["dit"] == {key: theirs}
    block = {"original_block": lambda args: args["img"]}
    replace = again["patches_replace"]["dit"][key]
    assert replace({"img": torch.ones(1)}, block) == 13.0  # theirs first, then both of ours
    assert again["patches_replace"]["attn1"] == {}


class Blocks(nn.Module):
    """As few modules as the hooks need."""

    def __init__(self) -> None:
        super().__init__()
        self.t_embedder, self.y_embedder = nn.Identity(), nn.Identity()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.t_embedder(t)
        self.y_embedder(y)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("labels", "seen"), [(False, 3.0), (True, 8.0)])
def test_hooks_see_the_embedding_and_are_removed(labels, seen):
    model, embeddings = Blocks(), []
    sites = {site.name: site for site in FAMILIES["dit"].base.sites[:2]}

    def prepare(e: torch.Tensor) -> Any:
        embeddings.append(float(e))
        return context_adding(1.0)

    x, t, y = torch.zeros(1), torch.tensor([3.0]), torch.tensor([5.0])
    with adding(model, FAMILIES["dit"].base, sites, prepare, labels):
        assert model(x, t, y) == 2.0
        assert model(x, t, y) == 2.0
    assert embeddings == [seen, seen]
    assert model(x, t, y) == 0.0
    modules = list(model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_hooks_are_removed_when_attaching_them_fails():
    model, base = Blocks(), FAMILIES["dit"].base
    with (
        pytest.raises(PatchError, match=r"expected a module blocks\.2 in a Blocks"),
        adding(model, base, {s.name: s for s in base.sites}, context_adding, labels=False),
    ):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_base_without_a_slot_is_explained():
    base = FAMILIES["dit"].base
    odd = dataclasses.replace(base.sites[0], paths={"ldm": "stages.0"})
    with pytest.raises(PatchError, match="joint_blocks.* found base tiny-dit with stages"):
        slot_of(dataclasses.replace(base, sites=(odd,)))
    diffusers_only = dataclasses.replace(base.sites[0], paths={"diffusers": "stages.0"})
    with pytest.raises(PatchError, match="a module of site block.0 in the naming 'ldm'"):
        slot_of(dataclasses.replace(base, sites=(diffusers_only,)))


def test_a_time_embedding_at_another_place_is_explained():
    model = SimpleNamespace(diffusion_model=Blocks(), manual_cast_dtype=torch.float32)
    with pytest.raises(PatchError, match=r"expected a module t_embedder\.mlp in a Blocks"):
        time_embedding(model, get_base("sd3"), torch.zeros(1))


def test_sizes_are_padded_for_transformers_with_slots():
    x = torch.zeros(1, 16, 9, 14)

    def latent(base: str, **conds: Any) -> Latent:
        model = SimpleNamespace(diffusion_model=torch.nn.Module())
        return latent_of(model, get_base(base), x, conds)

    assert latent("flux") == Latent(1, (10, 14), image_tokens=5 * 7)
    pictures = [torch.zeros(1, 16, 3, 4)]
    assert latent("flux", ref_latents=pictures).image_tokens == 5 * 7 + 2 * 2
    assert latent("qwen-image", ref_latents=pictures).image_tokens == 5 * 7 + 2 * 2
    assert latent("sd15") == Latent(1, (9, 14))
    assert latent("sd3") == Latent(1, (9, 14))


def sampling(*bases: str, first: float = 999.0) -> Any:
    kinds = {name: type(name, (), {}) for name in ("EPS", "V_PREDICTION", "CONST")}
    cls = type("ModelSampling", tuple(kinds[name] for name in bases), {})
    model = cls()
    model.percent_to_sigma = lambda percent: 1.0
    model.timestep = lambda sigma: torch.full_like(sigma, first)
    return model


def refused(model: Any, model_sampling: Any, patch: Any, match: str) -> None:
    with pytest.raises(PatchError, match=match):
        require_fitting(model, model_sampling, record(patch))


def test_the_model_must_be_the_patchs(monkeypatch):
    """The denoisers have diffusers' names here, which ComfyUI's never have."""
    monkeypatch.setattr(checks, "require_compatible", in_any_naming)
    sd15, dit = FAMILIES["sd15"], FAMILIES["dit"]
    model = SimpleNamespace(diffusion_model=sd15.model())
    require_fitting(model, sampling("EPS"), record())
    refused(model, sampling("V_PREDICTION"), sd15.patch(), "type epsilon, found v_prediction")
    refused(model, sampling(), sd15.patch(), "type epsilon, found ModelSampling")
    refused(model, sampling("EPS", first=1.2), sd15.patch(), "starts at 1.2")
    refused(
        model,
        sampling("EPS"),
        dit.patch(),
        "^p.safetensors: expected a model of the patch's base tiny-dit",
    )
    refused(SimpleNamespace(), sampling("EPS"), sd15.patch(), "expected a diffusion model, found")
    model = SimpleNamespace(diffusion_model=dit.model())
    twice = "shift 0, found 1 in this model.*; and expected a model with prediction type epsilon"
    refused(model, sampling("CONST"), dit.patch(frequency_shift=0.0), twice)


@pytest.mark.parametrize(
    ("kind", "sigma", "said"),
    [("V_PREDICTION", 14.6, True), ("V_PREDICTION", 4518.0, False), ("CONST", 1.0, False)],
)
def test_another_noise_schedule_is_logged(kind, sigma, said, caplog):
    """A patch of a model with zero terminal SNR, on a model with and one without."""
    own = record()
    own.loaded.patch.metadata["dmp.use"] = json.dumps({"zero_terminal_snr": True})
    model_sampling = sampling(kind)
    model_sampling.sigma_max = torch.tensor(sigma)
    say_other_noise(model_sampling, own)
    assert ("p.safetensors: the patch was trained on a noise schedule with" in caplog.text) is said


def test_what_a_host_cannot_use_is_refused():
    model = SimpleNamespace(diffusion_model=nn.Identity())
    refused(model, sampling("EPS"), FAMILIES["sd15"].patch(), "Identity .*not supported")
    model = SimpleNamespace(diffusion_model=FAMILIES["sd15"].model())  # not ComfyUI's names
    refused(
        model,
        sampling("EPS"),
        FAMILIES["sd15"].patch(),
        "names of ldm, found the names of diffusers",
    )


def in_any_naming(*args: Any, naming: str, **options: Any) -> Any:
    assert naming == "ldm"
    return require_compatible(*args, **options)
