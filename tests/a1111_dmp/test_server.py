"""The extension in a real server, WEBUI_URL's (A1111 or one of the Forge family).

WEBUI_URL=...        a running server with `--api`, with this repository and
                     `tests/a1111_dmp/server_extension` linked into its `extensions` folder.
WEBUI_DMP=...        its folder of patches; tests write some into it, named `test-...`.
WEBUI_BASE=...       the base of its checkpoints: `tiny-a1111` (unless set), `tiny-v-a1111` ...,
                     for those of `checkpoints.py tiny`, `tiny-v` ..., or `sd15`.
WEBUI_OTHER=...      the name of a second checkpoint of that base, `tiny-b` unless set; empty for
                     none. The server must have loaded another one.
WEBUI_FOREIGN=...    the name of a checkpoint of another base of those, for example `tiny-xl-a`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmp_common import Patch, get_base
from dmp_common.patch.file import file_hash
from tests.a1111_dmp import tiny_base
from tests.a1111_dmp.server import FailedError, Made, Server, encoded
from tests.randomness import randomise
from training.options.presets import STAGES

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SETTINGS = {
    "batch_cond_uncond": True,
    "token_merging_ratio": 0.0,
    "CLIP_stop_at_last_layers": 1,
    "sd_noise_schedule": "Default",
    "sd_unet": "None",
    "show_progress_type": "Approx cheap",  # the other previews of SDXL are fetched
}
A, B, ZERO = "test-a", "deep/test-b", "test-zero"
MODULATING, GUIDING, UNGUIDED = "test-modulating", "test-guiding", "test-unguided"
RESCALED = "test-rescaled"


def save_random(path: Path, seed: int, base: str, **variant: object) -> None:
    randomise(Patch.create(base, **variant), seed).save(path)


def base_name() -> str:
    return os.environ.get("WEBUI_BASE", "tiny-a1111")


def other_prediction() -> str:
    """What the checkpoints do not predict."""
    return "epsilon" if get_base(base_name()).prediction == "v_prediction" else "v_prediction"


@pytest.fixture(scope="module")
def folder() -> Path:
    if not os.environ.get("WEBUI_URL") or not os.environ.get("WEBUI_DMP"):
        pytest.skip("needs a running server: set WEBUI_URL and WEBUI_DMP (see the file's top)")
    folder = Path(os.environ["WEBUI_DMP"])
    base = base_name()
    tiny_base.register()
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    save_random(folder / f"{A}.safetensors", 1, base)
    save_random(folder / f"{B}.safetensors", 2, base, sites="all", **STAGES)
    Patch.create(base).save(folder / f"{ZERO}.safetensors")
    Patch.create("sdxl").save(folder / "test-sdxl.safetensors")
    Patch.create(base, prediction=other_prediction()).save(folder / "test-v.safetensors")
    modulating = randomise(Patch.create(base, mix="modulate"), 3, 0.02)
    use = {"dmp.use": json.dumps({"cheap": {"types": {"Q4_0": 99, "F16": 1}}})}
    modulating.save(folder / f"{MODULATING}.safetensors", use)
    of_noise = {"dmp.use": json.dumps({"zero_terminal_snr": True})}
    randomise(Patch.create(base), 5).save(folder / f"{RESCALED}.safetensors", of_noise)
    save_random(folder / f"{GUIDING}.safetensors", 4, base, guidance=5.0)
    save_random(folder / f"{UNGUIDED}.safetensors", 4, base)
    good = (folder / f"{A}.safetensors").read_bytes()
    (folder / "test-cut.safetensors").write_bytes(good[:-1000])
    (folder / "test-text.safetensors").write_text("not a patch", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Server:
    # Forge's own choice for Euler is made for epsilon: noise levels of thousands, and no picture.
    flow = get_base(base_name()).prediction == "flow"
    server = Server(os.environ["WEBUI_URL"], **{"scheduler": "Simple"} if flow else {})
    # Forge Neo has none but those of pixels.
    latent = server.get("/sdapi/v1/latent-upscale-modes")
    server.defaults["hr_upscaler"] = "Latent" if latent else "None"
    # The host restores after a request only those settings that were ever set.
    known = server.get("/sdapi/v1/options")
    server.post("/sdapi/v1/options", **{k: v for k, v in SETTINGS.items() if k in known})
    return server


@pytest.fixture(scope="module")
def plain(server: Server) -> Made:
    """Before the extension was ever used (if the server is fresh)."""
    return server.make()


@pytest.fixture(scope="module")
def untouched(server: Server, plain: Made) -> dict[str, Any]:
    state: dict[str, Any] = server.state()
    return state


@pytest.fixture(scope="module")
def other(server: Server) -> str:
    name = os.environ.get("WEBUI_OTHER", "tiny-b")
    if not name:
        pytest.skip("needs a second checkpoint: set WEBUI_OTHER to its name")
    loaded = str(server.get("/sdapi/v1/options")["sd_model_checkpoint"])
    assert not loaded.startswith(name), f"set WEBUI_OTHER to another one than {loaded}"
    return name


@pytest.fixture(autouse=True)
def clean(server: Server, plain: Made, untouched: dict[str, Any]) -> Iterator[None]:
    """After every test: no hook is left, and a plain picture is what it was."""
    yield
    same(server.make(), plain)
    after = server.state()
    assert (after["hooks"], after["weights"]) == (untouched["hooks"], untouched["weights"])
    assert (after["attachments"], after["sessions"]) == (0, 0)


def same(one: Made, two: Made) -> None:
    assert len(one.images) == len(two.images)
    for a, b in zip(one.images, two.images, strict=True):
        np.testing.assert_array_equal(a, b)


def differ(one: Made, two: Made) -> None:
    assert any((a != b).any() for a, b in zip(one.images, two.images, strict=True))


def distance(one: Made, two: Made) -> int:
    return int(np.abs(one.image.astype(int) - two.image.astype(int)).max())


def forge(server: Server) -> bool:
    """Whether it is Forge itself, not one of its siblings."""
    return "forge_preset" in server.get("/sdapi/v1/options")


def kinds_joined(server: Server, joined: bool) -> dict[str, Any]:
    """Settings for one call of the model with both kinds of items, or one for each.

    Forge has no such setting; it decides by the free memory.
    """
    known = "batch_cond_uncond" in server.get("/sdapi/v1/options")
    return {"override_settings": {"batch_cond_uncond": joined}} if known else {}


def attached(calls: list[dict[str, Any]]) -> list[int]:
    return [call["attached"] for call in calls]


def script(*values: Any) -> dict[str, Any]:
    return {"script_name": "DMP script", "script_args": list(values)}


def test_nothing_of_the_repository_is_left_on_the_path(server):
    assert server.state()["path"] == []


def test_a_patch_changes_the_picture_and_only_while_it_acts(server, plain):
    made, calls = server.log(A)
    differ(made, plain)
    assert attached(calls) == [1] * 4
    same(server.make(A), made)


def test_zero_patch_and_strength_zero_are_exactly_the_plain_model(server, plain):
    same(server.make(ZERO), plain)
    same(server.make(A, 0.0), plain)


def test_a_modulating_patch_acts_and_says_on_which_model_it_is(server, plain):
    made, calls = server.log(MODULATING)
    differ(made, plain)
    assert attached(calls) == [1] * 4
    assert "repairs a model with weights in Q4_0 (99%), and this one has them in" in server.told()
    assert "DMP patch: test-modulating" in made.infotext
    same(server.make(MODULATING), made)
    same(server.make(MODULATING, 0.0), plain)


def test_a_patch_of_another_noise_schedule_says_so(server):
    """A setting of the host rescales the schedule, before it samples."""
    if get_base(base_name()).prediction == "flow":
        pytest.skip("flow models have no such schedule")
    said = "on a noise schedule with zero terminal SNR, and this model has one without"
    server.log(RESCALED)
    assert said in server.told()
    rescaled = {"override_settings": {"sd_noise_schedule": "Zero Terminal SNR"}}
    server.log(RESCALED, **rescaled)
    assert said not in server.told()


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_guidance_patch_acts_on_the_conditional_items(server, scale):
    """At CFG 1 the unconditional items do not count, so the same patch for all items is equal."""
    made, _ = server.log(GUIDING, cfg_scale=scale)
    assert ("set CFG Scale to 1" in server.told()) == (scale > 1.0)
    all_items = server.make(UNGUIDED, cfg_scale=scale)
    near = np.abs(made.image.astype(int) - all_items.image.astype(int)).max() <= 2
    assert near == (scale == 1.0)
    differ(made, server.make(cfg_scale=scale))
    # A1111 then calls the model once for the conditional items and once for the others; with a
    # longer prompt it does so in any case.
    alone = kinds_joined(server, False)
    assert distance(server.make(GUIDING, cfg_scale=scale, **alone), made) <= 2
    prompt = {"prompt": "a cat, " * 40, "cfg_scale": scale}
    assert distance(server.make(GUIDING, **prompt, **alone), server.make(GUIDING, **prompt)) <= 2


def test_names_may_carry_the_ending_or_lack_the_subfolder(server):
    same(server.make(A + ".safetensors"), server.make(A))
    same(server.make("test-b"), server.make(B))


def test_omitted_values_have_the_defaults(server):
    same(server.make(A), server.make(A, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0))
    same(server.make(**script(A)), server.make(A))
    full = ["None", 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    same(server.make(**script(A, 0.5)), server.make(**script(A, 0.5, *full[2:], *full, *full)))
    with pytest.raises(FailedError, match="expected at most 27 values for DMP, found 28"):
        server.make(**script(A, 1.0, *full[2:], *full, *full, *[""] * 6, ""))


def test_start_end_and_curve(server, plain):
    # By noise level: Flux's four steps are all in the first half.
    half, rest = server.make(A, 1.0, 0.0, 0.3), server.make(A, 1.0, 0.3, 1.0)
    whole = server.make(A)
    differ(half, plain)
    differ(rest, plain)
    differ(half, whole)
    same(server.make(A, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0), plain)
    same(server.make(A, 0.5), server.make(A, 1.0, 0.0, 1.0, 0.5, 0.5, 0.5))
    differ(server.make(A, 1.0, 0.0, 1.0, 1.0, 0.5, 0.0), whole)


def test_keyframes_and_strengths_of_single_sites(server, plain):
    """In controls, requests and prompts; the curve is that of early, middle and late."""
    curve = server.make(A, 1.0, 0.0, 1.0, 1.0, 0.5, 0.0)
    keyframes = {"patch": A, "keyframes": "0: 1, 0.5: 0.5, 1: 0"}
    same(server.make(keyframes), curve)
    same(server.make(**script(keyframes)), curve)
    same(server.make(prompt=f"a cat<dmp:{A}:1:keyframes=0: 1, 0.5: 0.5, 1: 0>"), curve)
    whole = server.make(A)
    base = get_base(base_name())
    ends = base.sites[0].name.upper(), base.sites[-1].name
    first, second = ("IN.*", "mid") if base.layout == "map" else ends
    text = f"{first}: 0.5, {second}: 0"
    made = server.make({"patch": A, "site_strengths": text})
    differ(made, whole)
    differ(made, plain)
    tag = f"{first.lower()}:0.5,{second}:0"
    same(server.make(prompt=f"a cat<dmp:{A}:site_strengths={tag}:start=0>"), made)
    same(server.make({"patch": A, "site_strengths": "all: 0"}), plain)
    assert f'DMP site strengths: "{text}"' in made.infotext
    fields = server.post("/dmp-test/paste", text=made.infotext)["fields"]
    assert fields["dmp/Site strengths 1"] == text
    with pytest.raises(FailedError, match=r"DMP: test-a.safetensors: expected keyframes such as"):
        server.make({"patch": A, "keyframes": "0.5"})
    with pytest.raises(FailedError, match=r"DMP: test-a.safetensors: expected sites of this"):
        server.make(prompt=f"a cat<dmp:{A}:site_strengths=nowhere: 1>")


def test_the_three_ways_are_the_same_and_add(server):
    accordion = server.make(A)
    same(server.make(**script(A)), accordion)
    same(server.make(prompt=f"a cat<dmp:{A}>"), accordion)
    same(server.make(prompt=f"a cat<dmp:{A}:1:start=0.2>"), server.make(A, 1.0, 0.2))
    rest = [0.0, 1.0, 1.0, 1.0, 1.0]
    two = server.make(A, 1.0, *rest, B, 0.7)
    differ(two, accordion)
    same(server.make(A, prompt=f"a cat<dmp:{B}:0.7>"), two)
    same(server.make(A, **script(B, 0.7)), two)
    made, calls = server.log(A, prompt=f"a cat<dmp:{B}>", **script(ZERO))
    assert attached(calls) == [3] * 4
    assert made.infotext.count("DMP") > 5


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ("test-missing", r"DMP: expected the name of a patch in .*found 'test-missing'"),
        ("../test-a", "DMP: expected the name of a patch"),
        ("/etc/passwd", "DMP: expected the name of a patch"),
        ("test-cut", r"DMP: .*test-cut.safetensors: expected"),
        ("test-text", r"DMP: .*test-text.safetensors: expected"),
        (
            "test-sdxl",
            r"DMP: test-sdxl.safetensors: expected a model of the patch's base sdxl, found "
            r"one of base {base}: load a sdxl model, or a patch made for this one",
        ),
        (
            "test-v",
            r"DMP: test-v.safetensors: expected a model with prediction type {expected}, found "
            r"{found}: load the model that the patch was trained for",
        ),
    ],
)
def test_errors_fail_the_generation(server, folder, patch, says):
    found = get_base(base_name()).prediction
    says = says.format(base=base_name(), expected=other_prediction(), found=found)
    for settings in (
        {"alwayson_scripts": {"DMP": {"args": [True, patch]}}},
        script(patch),
        {"prompt": f"a cat <dmp:{patch}:1>"},
    ):
        with pytest.raises(FailedError, match=says) as raised:
            server.make(**settings)
        assert str(folder) not in str(raised.value)


def test_wrong_values_fail_the_generation(server):
    with pytest.raises(FailedError, match="DMP: expected a number for strength, found 'much'"):
        server.make(A, "much")
    with pytest.raises(FailedError, match="DMP: expected true or false to enable DMP"):
        server.make(alwayson_scripts={"DMP": {"args": ["yes", A]}})
    with pytest.raises(FailedError, match=r"DMP: test-a.safetensors: expected start <= end"):
        server.make(A, 1.0, 0.9, 0.1)
    with pytest.raises(FailedError, match="DMP: expected <dmp:name:strength>"):
        server.make(prompt=f"a cat <dmp:{A}:1:2:3>")
    with pytest.raises(FailedError, match="DMP: expected a number for strength, found 'x'"):
        server.make(prompt=f"a cat <dmp:{A}:x>")


def test_patches_added_after_the_start_are_found(server, folder):
    path = folder / "test-late.safetensors"
    try:
        path.write_bytes((folder / f"{A}.safetensors").read_bytes())
        same(server.make("test-late"), server.make(A))
        path.write_bytes((folder / f"{ZERO}.safetensors").read_bytes())
        same(server.make("test-late"), server.make(ZERO))
    finally:
        path.unlink()


HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "denoising_strength": 0.9,
    "hr_second_pass_steps": 4,
    "hr_additional_modules": ["Use same choices"],  # Forge wants it said
}


def test_both_passes_of_hires_fix_are_patched(server):
    made, calls = server.log(A, **HIRES)
    assert {tuple(call["size"][2:]) for call in calls} == {(8, 8), (16, 16)}
    assert set(attached(calls)) == {1}
    differ(made, server.make(**HIRES))
    same(server.make(prompt=f"a cat<dmp:{A}>", **HIRES), made)


def test_the_hires_prompt_has_its_own_patches(server):
    _, calls = server.log(prompt=f"a cat<dmp:{A}>", hr_prompt="a cat", **HIRES)
    assert [c["attached"] for c in calls if c["size"][2] == 8] == [1] * 4
    assert {c["attached"] for c in calls if c["size"][2] == 16} == {0}
    _, calls = server.log(hr_prompt=f"a cat<dmp:{A}><dmp:{B}>", **HIRES)
    assert [c["attached"] for c in calls if c["size"][2] == 8] == [0] * 4
    assert {c["attached"] for c in calls if c["size"][2] == 16} == {2}
    with pytest.raises(FailedError, match="DMP: expected the name of a patch"):
        server.make(hr_prompt="a cat<dmp:test-missing>", **HIRES)


def by_checkpoint(calls: list[dict[str, Any]]) -> dict[str, set[int]]:
    return {
        name: {c["attached"] for c in calls if c["checkpoint"] == name}
        for name in {c["checkpoint"] for c in calls}
    }


def test_a_refiner_is_left_alone(server, other):
    settings = {"refiner_checkpoint": other, "refiner_switch_at": 0.5, "steps": 6}
    made, calls = server.log(A, n_iter=2, **settings)
    seen = by_checkpoint(calls)
    assert seen.pop(other) == {0}
    assert list(seen.values()) == [{1}]
    assert f"the model is {other}.safetensors now" in server.told()
    differ(made, server.make(n_iter=2, **settings))


def test_a_hires_checkpoint_is_left_alone(server, other):
    _, calls = server.log(A, hr_checkpoint_name=other, **HIRES)
    seen = by_checkpoint(calls)
    assert seen.pop(other) == {0}
    assert list(seen.values()) == [{1}]
    assert "do not act on it" in server.told()


def test_another_checkpoint_by_override(server, other):
    settings = {"override_settings": {"sd_model_checkpoint": other}}
    made, calls = server.log(A, **settings)
    assert by_checkpoint(calls) == {other: {1}}
    differ(made, server.make(**settings))


@pytest.fixture(scope="module")
def foreign() -> str:
    name = os.environ.get("WEBUI_FOREIGN")
    if not name:
        pytest.skip("needs a checkpoint of another base: set WEBUI_FOREIGN to its name")
    return name


def test_a_checkpoint_of_another_base_fails_the_generation(server, foreign):
    settings = {"override_settings": {"sd_model_checkpoint": foreign}}
    before = server.make(**settings)
    says = f"DMP: {A}.safetensors: expected a model of the patch's base {base_name()}, found one of"
    with pytest.raises(FailedError, match=says):
        server.make(A, **settings)
    with pytest.raises(FailedError, match=says):
        server.make(A, **HIRES, **settings)
    after, calls = server.log(**settings)
    assert by_checkpoint(calls) == {foreign: {0}}
    same(after, before)


def test_a_hires_checkpoint_of_another_base_is_left_alone(server, foreign):
    made, calls = server.log(A, hr_checkpoint_name=foreign, **HIRES)
    seen = by_checkpoint(calls)
    assert seen.pop(foreign) == {0}
    assert list(seen.values()) == [{1}]
    assert f"the model is {foreign}.safetensors now" in server.told()
    differ(made, server.make(hr_checkpoint_name=foreign, **HIRES))


def test_tags_go_with_the_prompt_to_another_checkpoint(server, other):
    settings = {"refiner_checkpoint": other, "refiner_switch_at": 0.5, "steps": 6}
    _, calls = server.log(prompt=f"a cat<dmp:{A}>", **settings)
    assert set(attached(calls)) == {1} and len(by_checkpoint(calls)) == 2
    made, calls = server.log(hr_prompt=f"a cat<dmp:{A}>", hr_checkpoint_name=other, **HIRES)
    seen = by_checkpoint(calls)
    assert seen.pop(other) == {1}
    assert list(seen.values()) == [{0}]
    assert f'DMP hashes: "{A}: ' in made.infotext
    _, calls = server.log(prompt=f"a cat<dmp:{A}><dmp:test-sdxl>", **settings)
    assert set(attached(calls)) == {1}
    assert "expected a model of the patch's base sdxl" in server.told()
    with pytest.raises(FailedError, match="expected a model of the patch's base sdxl"):
        server.make(prompt="a cat<dmp:test-sdxl>", steps=6)


def picture(size: int = 64) -> str:
    return encoded(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def test_img2img_and_inpainting(server):
    mask = np.zeros((64, 64, 3), dtype=np.uint8)
    mask[16:48, 16:48] = 255
    image = {"init_images": [picture()], "denoising_strength": 0.8, "steps": 6}
    for settings in (
        image,
        {**image, "mask": encoded(mask), "inpainting_fill": 1},
        {**image, "mask": encoded(mask), "inpaint_full_res": True, "width": 128, "height": 128},
    ):
        server.make(
            **settings
        )  # in Forge Neo the first inpainting of a kind differs from later ones
        made, calls = server.log(A, **settings)
        assert set(attached(calls)) == {1}
        before = server.make(**settings)
        assert distance(made, before) > 60
        # In Forge and its siblings plain inpainting itself differs from run to run.
        rounding = 0 if re.search(r"Version: v?\d", before.infotext) else 40
        assert distance(server.make(**settings), before) <= rounding
        assert distance(server.make(ZERO, **settings), before) <= rounding
        assert distance(server.make(**settings, **script(A)), made) <= rounding


VARIATIONS: dict[str, dict[str, Any]] = {
    "batch": {"batch_size": 3, "n_iter": 2},
    "AND": {"prompt": "a cat AND a dog :0.5 AND a house"},
    "prompt editing": {"prompt": "a [cat:dog:0.5] in [a|b]"},
    "long prompt": {"prompt": "word " * 90},
    "split cond": {"override_settings": {"batch_cond_uncond": False}},
    "skipped uncond": {"s_min_uncond": 100.0, "steps": 6},
    "token merging": {"override_settings": {"token_merging_ratio": 0.5}},
    "tiling": {"tiling": True},
    "not square": {"width": 128, "height": 64},
    "odd size": {"width": 72, "height": 88},
    "ancestral": {"sampler_name": "Euler a"},
    "second order": {"sampler_name": "Heun"},
    "timesteps": {"sampler_name": "DDIM"},
    "unipc": {"sampler_name": "UniPC"},
    "karras": {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
    "clip skip": {"override_settings": {"CLIP_stop_at_last_layers": 2}},
    "one guidance": {"cfg_scale": 1.0},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations(server, name):
    settings = VARIATIONS[name]
    unknown = set(settings.get("override_settings", ())) - set(server.get("/sdapi/v1/options"))
    if unknown:
        pytest.skip(f"this host has no setting {', '.join(unknown)}")
    made, calls = server.log(A, **settings)
    assert calls and set(attached(calls)) == {1}
    plain = server.make(**settings)
    differ(made, plain)
    same(server.make(ZERO, **settings), plain)
    same(server.make(A, 0.0, **settings), plain)


def test_batch_items_are_as_if_made_alone(server):
    made = server.make(A, batch_size=2, n_iter=1)
    alone = [server.make(A, seed=seed).image for seed in (1, 2)]
    pictures = made.images[-2:]
    for one, two in zip(pictures, alone, strict=True):
        assert np.abs(one.astype(int) - two.astype(int)).max() <= 2  # rounding of batched products


@pytest.mark.parametrize("joined", [True, False])
def test_each_picture_of_a_batch_has_the_patches_of_its_own_prompt(server, plain, joined):
    """The prompt matrix makes one prompt of each combination of its parts."""
    alone = kinds_joined(server, joined)
    matrix = {
        "script_name": "prompt matrix",
        "script_args": [False, False, "positive", "comma", 0],
        "prompt": f"a cat|<dmp:{A}>|<dmp:{B}:0.5>",
        "batch_size": 4,
    }
    made = server.make(**matrix, **alone)
    tags = ("", f"<dmp:{A}>", f"<dmp:{B}:0.5>", f"<dmp:{A}>, <dmp:{B}:0.5>")
    for found, tag in zip(made.images[-4:], tags, strict=True):
        wanted = server.make(prompt=f"a cat, {tag}" if tag else "a cat").image
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 2
    assert np.abs(made.images[-3].astype(int) - plain.image.astype(int)).max() > 20


def test_a_replaced_unet_is_told_of(server, plain):
    labels = {"override_settings": {"sd_unet": "Simulated engine"}}
    made, calls = server.log(A, **labels)
    assert set(attached(calls)) == {0}
    for text in (server.told(), made.infotext):
        assert "nothing was applied of test-a.safetensors" in text
        assert "Simulated engine" in text
    assert "DMP patch" not in made.infotext
    same(server.make(**labels), made)


def test_models_that_the_host_compiles(server):
    """Forge Neo compiles at each call. Graphs without a patch must not be used with one."""
    infos = {info["name"]: info for info in server.get("/sdapi/v1/script-info")}
    name = next((name for name in infos if "torch" in name), None)
    if name is None:
        pytest.skip("this host has no script that compiles (Forge Neo needs triton for it)")
    off = infos[name]["args"][0]["choices"][1]

    def make(patch: str | None, preset: str) -> Made:
        scripts: dict[str, Any] = {name: {"args": [preset]}}
        if patch is not None:
            scripts["DMP"] = {"args": [True, patch]}
        return server.make(alwayson_scripts=scripts)

    expected = {patch: make(patch, off) for patch in (None, A, MODULATING)}
    try:
        for patch in (None, A, None, MODULATING, A, MODULATING, None):
            made = make(patch, "guard_filter_fn")
            assert distance(made, expected[patch]) <= 2  # fused operations round otherwise
            assert patch is None or f"DMP patch: {patch}" in made.infotext
    finally:
        make(None, off)


def test_interrupt_and_skip(server):
    long = {"steps": 60, "n_iter": 2}
    for action in ("/sdapi/v1/interrupt", "/sdapi/v1/skip"):
        made = server.while_making(action, A, **long)
        calls = server.state()["calls"]
        assert len(calls) < (60 if action.endswith("interrupt") else 119)
        assert set(attached(calls)) == {1}
        assert "nothing was applied" not in made.infotext


def test_an_error_in_the_midst(server):
    server.post("/dmp-test/fail", text="made by a test")
    with pytest.raises(FailedError, match="made by a test"):
        server.make(A)


def test_infotext_and_what_reading_it_restores(server, folder):
    made = server.make(A, 0.8, 0.1, 0.9, 1.0, 0.5, 1.0, B, 0.5, prompt=f"a cat <dmp:{ZERO}:0.3>")
    text, digest = made.infotext, file_hash(folder / f"{A}.safetensors")
    for part in (
        f"DMP patch: {A}",
        f"DMP hash: {digest}",
        "DMP strength: 0.8",
        "DMP start: 0.1",
        "DMP end: 0.9",
        "DMP middle: 0.5",
        f"DMP patch 2: {B}",
        "DMP strength 2: 0.5",
        f'DMP hashes: "{ZERO}: {file_hash(folder / (ZERO + ".safetensors"))}"',
    ):
        assert part in text
    assert "DMP early" not in text
    fields = server.post("/dmp-test/paste", text=text)["fields"]
    assert fields["dmp/DMP"] is True
    assert fields["dmp/Patch 1"] == A
    assert (fields["dmp/Strength 1"], fields["dmp/End percent 1"]) == (0.8, 0.9)
    assert fields["dmp/Middle 1"] == 0.5
    assert (fields["dmp/Patch 2"], fields["dmp/Strength 2"]) == (B, 0.5)
    assert (fields["dmp/Patch 3"], fields["dmp/Strength 3"]) == ("None", 1.0)
    plain = server.post("/dmp-test/paste", text=server.make().infotext)["fields"]
    assert (plain["dmp/DMP"], plain["dmp/Patch 1"]) == (False, None)
    if not forge(server):  # its API cannot read any infotext
        same(server.make(infotext=text, prompt=f"a cat <dmp:{ZERO}:0.3>"), made)


def test_the_infotext_of_the_script(server):
    text = server.make(**script(A, 0.8)).infotext
    assert f"DMP script patch: {A}" in text
    assert "Script: DMP script" in text
    fields = server.post("/dmp-test/paste", text=text)["fields"]
    assert [fields[f"dmp script/{name} 1 (script)"] for name in ("Patch", "Strength")] == [A, 0.8]
    assert fields["dmp/DMP"] is False


def test_renamed_files_are_found_by_their_hash(server, folder):
    text = server.make(A, prompt=f"a cat <dmp:{A}:0.5>").infotext
    renamed = text.replace(A, "test-gone")
    pasted = server.post("/dmp-test/paste", text=renamed)
    assert pasted["fields"]["dmp/Patch 1"] == A
    assert pasted["prompt"] == f"a cat <dmp:{A}:0.5>"


XYZ = "x/y/z plot"


def axes(server: Server, x: tuple[str, str], y: tuple[str, str] = ("Nothing", "")) -> dict:
    """A plot of two axes by their names; hosts order the controls of the plot differently."""
    info = next(i for i in server.get("/sdapi/v1/script-info") if i["name"] == XYZ)
    values = {
        "X type": x[0],
        "Y type": y[0],
        "Z type": "Nothing",
        "Draw legend": True,
        "Include Sub Images": True,
        "Use text inputs instead of dropdowns": True,
    }
    texts = {"X values": [[], x[1]], "Y values": [[], y[1]], "Z values": [[], ""]}
    chosen = []
    for arg in info["args"]:
        name = arg["label"]
        value = texts[name].pop() if name in texts else values.get(name, arg.get("value"))
        if name.endswith(" type"):  # the plot takes the place in the list
            value = arg["choices"].index(value)
        chosen.append(int(value) if arg.get("step") == 1 else value)
    return {"script_name": XYZ, "script_args": chosen}


def test_a_plot_of_patch_and_strength(server, plain):
    plot = axes(server, ("[DMP] Strength", "0,1"), ("[DMP] Patch", f"None,{A}"))
    made = server.make(**plot)
    cells = made.images[1:]
    assert len(cells) == 4
    np.testing.assert_array_equal(cells[0], plain.image)
    np.testing.assert_array_equal(cells[1], plain.image)
    np.testing.assert_array_equal(cells[2], plain.image)
    np.testing.assert_array_equal(cells[3], server.make(A).image)
    assert "DMP patch" not in made.infotexts[1]
    assert f"DMP patch: {A}" in made.infotexts[-1]


def test_a_plot_of_start_and_end_with_the_accordion(server):
    made = server.make(A, **axes(server, ("[DMP] Start", "0,0.5"), ("[DMP] End", "0.5,1")))
    cells = made.images[1:]
    np.testing.assert_array_equal(cells[0], server.make(A, 1.0, 0.0, 0.5).image)
    np.testing.assert_array_equal(cells[3], server.make(A, 1.0, 0.5, 1.0).image)


def test_a_plot_of_another_slot_and_of_keyframes(server):
    x, y = ("[DMP] Patch 2", f"{B}"), ("[DMP] Keyframes 2", '"0: 1, 1: 0","0: 0.5"')
    made = server.make(A, **axes(server, x, y))
    for cell, frames in zip(made.images[1:], ("0: 1, 1: 0", "0: 0.5"), strict=True):
        wanted = server.make({"patch": A}, {"patch": B, "keyframes": frames})
        np.testing.assert_array_equal(cell, wanted.image)


def test_a_cell_that_fails_shows_why(server, plain):
    made = server.make(**axes(server, ("[DMP] Patch", "None,test-sdxl")))
    good, failed = made.images[1:]
    np.testing.assert_array_equal(good, plain.image)
    assert failed.shape == good.shape and failed.max() == 255 > failed.min()
    assert "expected a model of the patch's base sdxl" in made.infotexts[2]


def test_a_plot_with_wrong_values_does_not_begin(server):
    with pytest.raises(FailedError, match="DMP: expected the name of a patch"):
        server.make(**axes(server, ("[DMP] Patch", "test-missing")))
    with pytest.raises(FailedError, match="DMP: expected start from 0 to 1, found 2"):
        server.make(A, **axes(server, ("[DMP] Start", "2")))


def test_axes_are_there_once(server):
    info = next(i for i in server.get("/sdapi/v1/script-info") if i["name"] == XYZ)
    ours = [name for name in info["args"][0]["choices"] if "DMP" in name]
    assert ours[:4] == ["[DMP] Patch", "[DMP] Strength", "[DMP] Start", "[DMP] End"]
    assert len(ours) == len(set(ours)) == 27


def test_controls_have_labels_and_scripts_are_listed(server):
    scripts = server.get("/sdapi/v1/scripts")
    assert all({"dmp", "dmp script"} <= set(scripts[tab]) for tab in ("txt2img", "img2img"))
    for info in server.get("/sdapi/v1/script-info"):
        if info["name"] in ("dmp", "dmp script"):
            assert len(info["args"]) == (28 if info["name"] == "dmp" else 27)
            assert all(arg["label"] for arg in info["args"])


def test_metadata_of_the_cards(server):
    try:
        answer = server.get(f"/sd_extra_networks/metadata?page=dmp&item={A}")
    except OSError:
        pytest.skip("cards are made when the browser opens the tab")
    card = server.get(f"/sd_extra_networks/get-single-card?page=dmp&tabname=txt2img&name={A}")
    assert f"&lt;dmp:{A}:" in card["html"]
    assert isinstance(answer, dict)


def test_the_api_lists_patches(server, folder):
    listed = {patch["name"]: patch for patch in server.get("/dmp/patches")}
    assert listed[A]["base"] == base_name() and listed[A]["fits_loaded_model"] is True
    assert listed["test-sdxl"]["fits_loaded_model"] is False
    assert listed["test-cut"]["error"].startswith("test-cut.safetensors: expected")
    assert str(folder) not in json.dumps(listed)
    assert {patch["name"] for patch in server.post("/dmp/refresh")} == set(listed)


def test_memory_and_hooks_over_many_generations(server, plain):
    count = int(os.environ.get("WEBUI_GENERATIONS", "40"))
    sizes = []
    patched = server.make(A, **HIRES)
    for index in range(count):
        if index % 2:
            same(server.make(A, **HIRES), patched)
        else:
            same(server.make(), plain)
        if index in (count // 2, count - 1):
            state = server.state()
            sizes.append(state["rss"])
            assert (state["attachments"], state["sessions"]) == (0, 0)
    assert sizes[1] - sizes[0] < 40e6


def test_reloading_the_interface(server, plain):
    made = server.make(A)
    server.post("/dmp-test/reload")
    server.wait_for_restart()
    assert server.state()["path"] == []
    same(server.make(), plain)
    again, calls = server.log(A)
    same(again, made)
    assert attached(calls) == [1] * 4
    ours = [i["name"] for i in server.get("/sdapi/v1/script-info")].count("dmp script")
    assert ours == 2
