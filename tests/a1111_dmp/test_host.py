"""Around `p.sample`, among the controls, cards and axes: our side of the host, with stand-ins."""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import logging
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from a1111_dmp.choice import DEFAULTS
from dmp_common import PatchError, get_base
from tests.a1111_dmp import stand_in
from tests.a1111_dmp.ldm_shape import TINY, pair, run
from tests.a1111_dmp.stand_in import Processing
from tests.tiny import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def host(monkeypatch, tmp_path) -> SimpleNamespace:
    """Our files in a host with one small model and two patches."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    host = stand_in.install(monkeypatch, tmp_path / "models")
    root = tmp_path / "models" / "DMP"
    TINY.patch(1).save(root / "ink.safetensors", metadata={"ss_output_name": "ink"})
    TINY.patch(2).save(root / "deep" / "oil.safetensors")
    (root / "broken.safetensors").write_text("no patch", encoding="utf-8")
    _, host.unet = pair()
    host.modules.shared.sd_model = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=host.unet),
        parameterization="eps",
        sd_checkpoint_info=SimpleNamespace(filename="models/own.safetensors"),
    )
    host.plain = run(host.unet)
    host.outputs = []
    monkeypatch.setattr(Processing, "during", lambda self, p: host.outputs.append(run(host.unet)))
    host.script.register()
    yield host
    assert run(host.unet).equal(host.plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.unet.modules())


def accordion(host: SimpleNamespace, p: Processing, *values: Any, enabled: Any = True) -> None:
    host.script.Accordion().process(p, enabled, *values, *DEFAULTS[len(values) :])


def drop_down(host: SimpleNamespace, p: Processing, *values: Any) -> Any:
    script = host.script.DropDown()
    p.scripts = SimpleNamespace(inputs=[None, *DEFAULTS])
    p.script_args = [1, *values]
    return script.run(p, *values)


def params(*items: str) -> stand_in.Params:
    return stand_in.Params([*items])


def patched(host: SimpleNamespace) -> bool:
    return not host.outputs[-1].equal(host.plain)


def test_nothing_is_touched_where_nothing_is_chosen(host):
    p = Processing()
    accordion(host, p, enabled=False)
    host.cards.Network().activate(p, [])
    assert set(vars(p)) == {"extra_generation_params", "comments", "sampled"}
    assert p.sample() == "samples"
    assert not patched(host)


def test_each_way_attaches_and_all_add(host):
    p = Processing()
    accordion(host, p, "ink", 0.5)
    assert p.sample() == "samples" and patched(host)
    assert p.extra_generation_params["DMP patch"] == "ink"
    one = host.outputs[-1]
    q = Processing()
    host.cards.Network().activate(q, [params("ink", "0.5")])
    q.sample()
    assert host.outputs[-1].equal(one)
    assert q.extra_generation_params["DMP hashes"].startswith("ink: ")
    assert drop_down(host, Processing(), "ink", 0.5) == "samples"
    assert host.outputs[-1].equal(one)
    accordion(host, q, "deep/oil")
    q.sample()
    assert not host.outputs[-1].equal(one)


def test_a_generation_without_our_choice_after_one_with_it(host):
    p = Processing()
    accordion(host, p, "ink")
    host.cards.Network().activate(p, [params("deep/oil")])
    accordion(host, p, enabled=False)
    host.cards.Network().activate(p, [])
    p.sample()
    assert not patched(host)
    assert p.extra_generation_params == {}


def test_copies_sample_themselves(host):
    """As the X/Y/Z plot and others make them."""
    p = Processing()
    accordion(host, p, "ink")
    other = copy.copy(p)
    other.sampled = []
    accordion(host, other, "ink")
    other.sample()
    assert other.sampled == [other] and p.sampled == []
    assert p.dmp_session is not other.dmp_session
    p.sample()
    assert p.sampled == [p]


def test_others_around_and_inside_p_sample(host):
    order: list[str] = []

    def wrapping(name: str, inner: Any) -> Any:
        def sample(*args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return inner(*args, **kwargs)

        return sample

    p = Processing()
    p.sample = wrapping("inside", p.sample)
    accordion(host, p, "ink")
    p.sample = wrapping("around", p.sample)
    accordion(host, p, "ink")
    p.sample()
    assert order == ["around", "inside"]
    assert len(host.outputs) == 1
    once = host.outputs[-1]
    q = Processing()
    accordion(host, q, "ink")
    q.sample()
    assert q.sampled == [q] and host.outputs[-1].equal(once)


def test_generations_are_not_kept_alive(host):
    p = Processing()
    accordion(host, p, "ink")
    p.sample()
    seen = weakref.ref(p)
    host.outputs.clear()
    del p
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("missing",), "DMP: expected the name of a patch in"),
        (("broken",), r"DMP: .*broken\.safetensors: expected"),
        (("ink", "x"), "DMP: expected a number for strength"),
        (("ink", 1.0, 0.9, 0.1), r"DMP: ink\.safetensors: expected start <= end"),
    ],
)
def test_errors_reach_the_sampling(host, values, says):
    """The host swallows what an always-visible script raises."""
    p = Processing()
    accordion(host, p, *values)
    with pytest.raises(PatchError, match=says):
        p.sample()
    assert p.sampled == []
    assert not any(key.startswith("DMP") for key in p.extra_generation_params)


def test_errors_that_nobody_thought_of_reach_the_sampling(host, monkeypatch):
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    p, q = Processing(), Processing()
    monkeypatch.setattr(host.script.host, "records", broken)
    with pytest.raises(ZeroDivisionError):
        accordion(host, p, "ink")
    monkeypatch.setattr(host.cards.Network, "_choice", broken)
    with pytest.raises(ZeroDivisionError):
        host.cards.Network().activate(q, [params("ink")])
    for generation in (p, q):
        with pytest.raises(PatchError, match=r"could not be read; the console says why\."):
            generation.sample()


def test_wrong_tags_of_the_hires_prompt_fail_before_the_first_pass(host):
    p = Processing(hr_extra_network_data={"dmp": [params("missing")]})
    host.cards.Network().activate(p, [])
    with pytest.raises(PatchError, match="DMP: expected the name of a patch"):
        p.sample()


def test_the_second_pass_takes_the_patches_of_its_own_prompt(host, monkeypatch):
    network = host.cards.Network()

    def both(self: Processing, p: Processing) -> None:
        host.outputs.append(run(host.unet))
        network.activate(p, [])
        host.outputs.append(run(host.unet))

    monkeypatch.setattr(Processing, "during", both)
    p = Processing()
    network.activate(p, [params("ink")])
    p.sample()
    first, second = host.outputs
    assert not first.equal(host.plain) and second.equal(host.plain)


def batch(texts: list[str], later: list[str] | None = None, **attributes: Any) -> Processing:
    """A generation as the host has it when it calls the networks: the tags are out of the prompts.

    The host keeps the tags of the first picture alone.
    """
    split = [stand_in.parse_prompt(text) for text in texts]
    p = Processing(
        all_prompts=texts,
        prompts=[text for text, _ in split],
        extra_network_data=split[0][1],
        batch_size=len(texts),
        iteration=0,
        is_hr_pass=False,
        **attributes,
    )
    if later is not None:
        split = [stand_in.parse_prompt(text) for text in later]
        p.all_hr_prompts, p.hr_prompts = later, [text for text, _ in split]
        p.hr_extra_network_data = split[0][1]
    return p


def activate(host: SimpleNamespace, p: Processing) -> list[list[str]]:
    """Calls our network as the host does; returns the names of the patches of each picture."""
    data = p.hr_extra_network_data if p.is_hr_pass else p.extra_network_data
    seen: list[Any] = []
    session = host.host.session_of(p)
    session.choose = lambda source, *pictures: seen.extend(pictures)
    host.cards.Network().activate(p, data.get("dmp", []))
    return [[record.loaded.path.stem for record in picture] for picture in seen]


def test_each_picture_of_a_batch_has_the_tags_of_its_own_prompt(host):
    """The host reads the tags of the first one and uses them for all."""
    texts = ["a cat", "a cat <dmp:ink>", "a cat <dmp:oil:0.5> <dmp:ink>"]
    assert activate(host, batch(texts)) == [[], ["ink"], ["oil", "ink"]]
    p = batch(texts)
    host.script.Accordion().before_process_batch(p, prompts=["a cat <dmp:ink>", *texts[1:]])
    p.prompts[0], p.extra_network_data = stand_in.parse_prompt("a cat <dmp:ink>")
    assert activate(host, p) == [["ink"], ["ink"], ["oil", "ink"]]
    p.prompts = ["written by another extension"]
    assert activate(host, p) == [["ink"]]
    p = batch(["a cat", "a cat <dmp:missing>"])
    host.cards.Network().activate(p, [])
    with pytest.raises(PatchError, match="found 'missing'"):
        p.sample()


def test_the_tags_of_both_passes_of_hires_fix_and_all_their_hashes(host):
    hashes = {name: host.host.folder().load(name).hash for name in ("ink", "deep/oil")}
    p = batch(["a cat <dmp:ink>"] * 2, ["a cat <dmp:oil>", "a cat"])
    assert activate(host, p) == [["ink"], ["ink"]]
    both = f"ink: {hashes['ink']}, deep/oil: {hashes['deep/oil']}"
    assert p.extra_generation_params["DMP hashes"] == both
    p.is_hr_pass = True
    assert activate(host, p) == [["oil"], []]
    written = p.extra_generation_params["DMP hashes"]
    assert sorted(written.split(", ")) == sorted(both.split(", "))


def test_the_host_says_which_picture_each_item_of_a_step_is(host, monkeypatch):
    """Two prompts joined by AND for the second picture; then the unconditional items."""
    session = host.host.session_of(Processing())
    one = host.host.folder().load("ink").loaded
    session.choose("prompt", [host.cards.PatchRecord(one)], [])
    monkeypatch.setattr(host.host, "_running", [session])
    p = SimpleNamespace(get_conds=lambda: (SimpleNamespace(batch=[[1], [1, 2]]), None))
    step = SimpleNamespace(
        x=torch.zeros(5, 4, 8, 8), text_cond=torch.zeros(3, 77, 8), denoiser=SimpleNamespace(p=p)
    )
    for callback in host.called["on_cfg_denoiser"]:
        callback(step)
    session.conditions.begin(None, (torch.zeros(5, 4, 8, 8),), {})
    assert session.conditions.pictures.tolist() == [0, 1, 1, 0, 1]
    session.close()


def test_the_host_calls_us_before_each_step(host, monkeypatch):
    other = pair(seed=1)[1]
    before = run(other)

    def refining(self: Processing, p: Processing) -> None:
        host.outputs.append(run(host.unet))
        host.modules.shared.sd_model.model.diffusion_model = other
        host.modules.shared.sd_model.sd_checkpoint_info.filename = "models/refiner.safetensors"
        for callback in host.called["on_cfg_denoiser"]:
            callback(None)
        assert run(other).equal(before)

    monkeypatch.setattr(Processing, "during", refining)
    p = Processing()
    accordion(host, p, "ink")
    p.sample()
    assert patched(host)
    assert any("refiner.safetensors" in text for text in p.comments)


def test_unloading_scripts_takes_everything_off(host, monkeypatch):
    def unloading(self: Processing, p: Processing) -> None:
        for callback in host.called["on_script_unloaded"]:
            callback()
        host.outputs.append(run(host.unet))

    monkeypatch.setattr(Processing, "during", unloading)
    p = Processing()
    accordion(host, p, "ink")
    p.sample()
    assert not patched(host)


def test_a_replaced_unet_is_told_of_in_the_infotext(host):
    engine = SimpleNamespace(option=SimpleNamespace(label="TRT"))
    host.modules.sd_unet.current_unet = engine
    p = Processing()
    accordion(host, p, "ink")
    p.sample()
    (text,) = p.comments
    assert "found it replaced by TRT" in text
    assert list(p.extra_generation_params) == ["DMP not applied"]


def test_no_model_yet(host):
    host.modules.shared.sd_model = SimpleNamespace()  # Forge before its first picture
    p = Processing()
    accordion(host, p, "ink")
    with pytest.raises(PatchError, match="DMP: expected a loaded checkpoint, found none yet"):
        p.sample()


class Predictor:
    """Forge's, of the SD family."""

    prediction_type = "v_prediction"

    def percent_to_sigma(self, percent: float) -> float:
        return (1.0 - percent) * 14.0

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma / 14.0 * 999.0


def test_forge_and_its_siblings(host):
    """Where the model is, what it predicts, and from progress to timesteps."""
    base = get_base("sd15")
    sd_model = host.modules.shared.sd_model
    model = host.host.current_model()
    assert (model.prediction, model.to_timestep(base, 0.25)) == ("epsilon", 749.25)
    unet = SimpleNamespace(model=SimpleNamespace(diffusion_model=host.unet, predictor=Predictor()))
    sd_model.forge_objects = SimpleNamespace(unet=unet)
    model = host.host.current_model()
    assert model.denoiser is host.unet
    assert model.prediction == "v_prediction"
    assert model.to_timestep(base, 0.25) == pytest.approx(749.25)
    for name, expected in (("EPS", "epsilon"), ("V_PREDICTION", "v_prediction")):
        kind = type("ModelSampling", (type(name, (), {}),), {})
        unet.model = SimpleNamespace(diffusion_model=host.unet, model_sampling=kind())
        assert host.host.current_model().prediction == expected
    unet.object_patches = {"model_sampling": Predictor()}
    assert host.host.current_model().prediction == "v_prediction"


def test_schedules_that_end_in_pure_noise(host):
    """A1111 rescales its table by a setting before it samples; Forge's predictor has sigmas."""
    sd_model = host.modules.shared.sd_model
    assert host.host.current_model().zero_terminal_snr is None  # an engine without a table
    for last, expected in ((0.0047, False), (4.9e-8, True)):
        sd_model.alphas_cumprod = torch.tensor([0.9, last])
        assert host.host.current_model().zero_terminal_snr is expected
    predictor = Predictor()
    unet = SimpleNamespace(model=SimpleNamespace(diffusion_model=host.unet, predictor=predictor))
    sd_model.forge_objects = SimpleNamespace(unet=unet)
    assert host.host.current_model().zero_terminal_snr is None
    for greatest, expected in ((14.6, False), (4518.0, True)):
        predictor.sigma_max = torch.tensor(greatest)
        assert host.host.current_model().zero_terminal_snr is expected
    predictor.prediction_type = "const"
    assert host.host.current_model().zero_terminal_snr is None


def test_flux_in_forge(host):
    """Its predictor counts from 1 to 0, a patch's timesteps from 1000."""

    class Flux(Predictor):
        prediction_type = "const"

        def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
            return sigma / 14.0

    unet = SimpleNamespace(model=SimpleNamespace(diffusion_model=host.unet, predictor=Flux()))
    host.modules.shared.sd_model.forge_objects = SimpleNamespace(unet=unet)
    model = host.host.current_model()
    assert model.prediction == "flow"
    assert model.to_timestep(get_base("flux"), 0.25) == pytest.approx(750.0)


def test_sd3_in_a1111(host):
    """It says "eps" there as the other models do; its sampling tells what it is."""

    class ModelSamplingDiscreteFlow:
        shift = 3.0

        def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
            t = timestep / 1000
            return self.shift * t / (1 + (self.shift - 1) * t)

        def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
            return sigma * 1000

    host.modules.shared.sd_model.model.model_sampling = ModelSamplingDiscreteFlow()
    model, base = host.host.current_model(), get_base("sd3")
    assert (model.prediction, model.zero_terminal_snr) == ("flow", None)
    found = [model.to_timestep(base, percent) for percent in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([1000.0, 750.0, 0.0])


@pytest.mark.parametrize("kind", ["Accordion", "DropDown"])
def test_controls_have_labels_names_and_defaults(host, kind):
    script = getattr(host.script, kind)()
    controls = script.ui(False)
    again = script.ui(False)  # the host calls it several times
    assert [c.value for c in controls] == [*([False] if kind == "Accordion" else []), *DEFAULTS]
    assert all(c.label for c in controls)
    ids = [c.elem_id for c in controls]
    assert len(set(ids)) == len(ids)
    assert [c.label for c in again] == [c.label for c in controls]
    assert all(c.options["tooltip"] for c in controls if c.label != "DMP")
    patches = [c for c in controls if c.label.startswith("Patch")]
    listed = ["None", "broken [unusable]", "deep/oil", "ink"]
    assert [c.options["choices"] for c in patches] == [listed] * 3


def test_percent_is_shown_and_a_fraction_is_used(host):
    _, _, _, start, end, *_ = host.script.Accordion().ui(False)
    assert (start.value, end.value) == (0.0, 1.0)
    shown = end.get_config()
    assert [shown[name] for name in ("value", "minimum", "maximum", "step")] == [100, 0, 100, 1]
    assert (start.preprocess(35), start.preprocess(None), start.postprocess(0.35)) == (
        0.35,
        None,
        35,
    )


def test_the_host_keeps_the_defaults_of_both_scripts_apart(host):
    """It keeps them by the file of the script and the label."""
    labels = [
        {c.label for c in getattr(host.script, kind)().ui(False)}
        for kind in ("Accordion", "DropDown")
    ]
    assert not set.intersection(*labels)


def test_patches_of_another_base_are_marked_and_one_button_refreshes_all_lists(host, monkeypatch):
    made: list[Any] = []
    monkeypatch.setattr(host.controls, "create_refresh_button", lambda *args: made.append(args))
    controls = host.script.Accordion().ui(False)
    ((patches, _, refreshed, _),) = made
    assert patches == [c for c in controls if c.label.startswith("Patch")]
    FAMILIES["sdxl"].patch().save(host.host.folder().root / "xl.safetensors")
    assert "xl" in refreshed()["choices"]  # no model is loaded
    host.modules.sd_models.model_data.sd_model = host.modules.shared.sd_model
    assert refreshed()["choices"][1:] == [
        "broken [unusable]",
        "deep/oil",
        "ink",
        "xl [tiny-sdxl]",
    ]
    assert host.host.folder().full_name("deep/oil [sdxl]") == "deep/oil"
    added: dict[str, Any] = {}
    app = SimpleNamespace(
        add_api_route=lambda path, function, methods: added.update({path: function})
    )
    for callback in host.called["on_app_started"]:
        callback(None, app)
    assert set(added) == {"/dmp/patches", "/dmp/refresh"}
    broken, _, ink, xl = added["/dmp/patches"]()
    assert set(broken) == {"name", "error"}
    assert (ink["name"], ink["base"], ink["fits_loaded_model"]) == ("ink", TINY.base.name, True)
    assert (xl["name"], xl["fits_loaded_model"]) == ("xl", False)
    p = Processing()
    accordion(host, p, "ink [sdxl]")
    p.sample()
    assert p.extra_generation_params["DMP patch"] == "ink"


def test_messages_are_seen_where_the_host_shows_errors_alone(host, caplog):
    root, ours = logging.getLogger(), logging.getLogger("a1111_dmp")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        ours.setLevel(logging.NOTSET)
        host.host.tell(Processing(), "DMP: hidden")
        host.host.register()
        host.host.tell(Processing(), "DMP: told")
    finally:
        root.setLevel(level)
    assert "DMP: told" in caplog.text and "hidden" not in caplog.text


def test_switched_on_without_a_patch_is_told(host):
    p = Processing()
    accordion(host, p)
    assert list(p.comments) == ["DMP: it is on and no patch is chosen, so it does nothing."]
    p.sample()
    assert not patched(host)


def test_sending_to_img2img_sets_the_controls(host):
    """The host copies the controls of one tab to those of the other whose readings are listed."""
    for kind in ("Accordion", "DropDown"):
        script, there = getattr(host.script, kind)(), getattr(host.script, kind)()
        sent, controls = script.ui(False), there.ui(True)
        names = script.paste_field_names
        sources = [component for component, name in script.infotext_fields if name in names]
        targets = [component for component, name in there.infotext_fields if name in names]
        assert (sources, targets) == (sent, controls)


def test_what_cannot_be_read_from_an_infotext_names_itself(host):
    script = host.script.Accordion()
    reading = dict(zip(script.ui(False), script.paste_field_names, strict=True))
    strength = next(r for c, r in reading.items() if c.label == "Strength 1")
    with pytest.raises(PatchError, match="^DMP strength: expected a number .* found 'much'"):
        strength({"DMP patch": "ink", "DMP strength": "much"})


def test_what_is_written_is_restored(host):
    p = Processing()
    values = ("ink", 0.8, 0.1, 0.9, 1.0, 0.5, 1.0, "deep/oil", 0.5)
    accordion(host, p, *values)
    texts = {key: str(value) for key, value in p.extra_generation_params.items()}
    script = host.script.Accordion()
    controls = script.ui(False)
    restored = {component: read(texts) for component, read in script.infotext_fields}
    assert [restored[c] for c in controls] == [True, *values, *DEFAULTS[len(values) :]]
    switch, *others = [read({}) for _, read in script.infotext_fields]
    assert switch is False and set(others) == {None}  # what the user has set there stays


def test_drop_down_and_accordion_keep_their_own_infotext(host):
    p = Processing()
    accordion(host, p, "ink")
    drop_down(host, p, "deep/oil", 0.5)
    accordion(host, p, "ink")
    texts = p.extra_generation_params
    assert (texts["DMP patch"], texts["DMP script patch"]) == ("ink", "deep/oil")
    assert texts["Script"] == "DMP script"


def test_the_heat_map(host, tmp_path):
    """Of the checkpoint's file; the loaded model may be busy."""
    own = tmp_path / "own.safetensors"
    weights = {f"model.diffusion_model.{k}": v for k, v in host.unet.state_dict().items()}
    safetensors.torch.save_file({k: v.clone().half() for k, v in weights.items()}, own)
    host.modules.shared.sd_model.sd_checkpoint_info.filename = str(own)
    gallery, close = host.controls.draw("ink", *DEFAULTS[1:7], "deep/oil", *DEFAULTS[8:])
    assert [picture.height > 100 for picture in gallery["value"]] == [True, True]
    assert gallery["visible"] and close["visible"]
    gallery, close = host.controls.hide()
    assert not gallery["visible"] and not close["visible"] and gallery["value"] is None
    with pytest.raises(stand_in.ToastError, match="DMP: expected a patch to draw, found none"):
        host.controls.draw(*DEFAULTS)
    host.modules.shared.sd_model = SimpleNamespace()
    with pytest.raises(stand_in.ToastError, match="DMP: expected a loaded checkpoint"):
        host.controls.draw("ink", *DEFAULTS[1:])


def plot(host: SimpleNamespace) -> Any:
    module = SimpleNamespace(__name__="xyz_grid.py", axis_options=[], AxisOption=stand_in.Axis)
    module.process_images = lambda p: p.sample()
    host.modules.scripts.scripts_data[:] = [
        SimpleNamespace(module=SimpleNamespace(__name__="other.py")),
        SimpleNamespace(module=module),
    ]
    return module


def test_axes(host):
    module = plot(host)
    for _ in range(2):
        for callback in host.called["on_before_ui"]:
            callback()
    axes = {axis.label: axis for axis in module.axis_options}
    assert len(axes) == len(module.axis_options) == len(DEFAULTS)
    assert "ink" in axes["[DMP] Patch"].choices()
    p = Processing()
    cell = copy.copy(p)
    axes["[DMP] Patch"].apply(cell, "ink", [])
    axes["[DMP] Strength"].apply(cell, 0.5, [])
    accordion(host, cell, enabled=False)
    cell.sample()
    assert patched(host)
    assert cell.extra_generation_params["DMP strength"] == 0.5
    following = copy.copy(p)  # shares the infotext of the cell before
    accordion(host, following, enabled=False)
    assert following.extra_generation_params == {}
    axes["[DMP] Patch 3"].apply(following, "deep/oil", [])
    axes["[DMP] Keyframes 3"].apply(following, "0: 1, 1: 0", [])
    accordion(host, following, "ink", enabled=False)
    assert following.extra_generation_params["DMP keyframes 3"] == "0: 1, 1: 0"
    axes["[DMP] Patch"].confirm(p, ["ink", "None", ""])
    with pytest.raises(PatchError, match="DMP: expected the name of a patch"):
        axes["[DMP] Patch"].confirm(p, ["missing"])
    with pytest.raises(PatchError, match="DMP: expected end from 0 to 1, found 2"):
        axes["[DMP] End"].confirm(p, [0.5, 2.0])
    with pytest.raises(PatchError, match="DMP: expected keyframes such as"):
        axes["[DMP] Keyframes 2"].confirm(p, ["0: 1", "half"])


def test_a_cell_that_fails_shows_why(host):
    module = plot(host)
    for _ in range(2):
        host.axes.add()
    p = Processing(width=200, height=100, seed=1)
    accordion(host, p, "missing")
    shown = module.process_images(p)
    (picture,) = shown.images
    assert picture.size == (200, 100) and shown.info in p.comments
    assert shown.info.startswith("DMP: expected the name of a patch")
    assert 0.01 < (np.asarray(picture.convert("L")) < 128).mean() < 0.3  # it is written there
    p.hr_upscale_to_x, p.hr_upscale_to_y = 300, 150
    assert module.process_images(p).images[0].size == (300, 150)
    p.sample = lambda: 1 / 0  # no error of ours
    with pytest.raises(ZeroDivisionError):
        module.process_images(p)


def test_no_plot_in_this_host(host):
    host.modules.scripts.scripts_data[:] = []
    host.axes.add()


def test_cards(host, tmp_path):
    host.cards.add()
    (page,), (network,) = host.pages, host.networks
    assert (page.title, network.name) == ("DMP", "dmp")
    root = tmp_path / "models" / "DMP"
    (root / "ink.png").write_bytes(b"picture")
    items = {item["name"]: item for item in page.list_items()}
    assert list(items) == ["broken", "deep/oil", "ink"]
    ink = items["ink"]
    assert ink["prompt"] == '"<dmp:ink:" + opts.extra_networks_default_multiplier + ">"'
    assert ink["preview"].endswith("ink.png")
    assert ink["metadata"]["base"] == TINY.base.name
    assert ink["metadata"]["ss_output_name"] == "ink"
    assert len(ink["shorthash"]) == 10
    assert "expected" in items["broken"]["metadata"]["error"]
    assert items["broken"]["description"].startswith(
        "unusable: broken.safetensors: expected a header"
    )
    assert ink["description"] == f"base {TINY.base.name}, strength 1"
    sites = list(TINY.patch(1).sites)
    shown = f"{len(sites)} of {len(TINY.base.sites)}: {sites[0]}, {sites[1]}"
    assert ink["metadata"]["sites"].startswith(shown)
    assert page.allowed_directories_for_previews() == [str(root)]
    assert page.create_item("ink")["name"] == "ink"


def test_a_card_says_what_a_patch_is_for_line_by_line(host, tmp_path):
    root = tmp_path / "models" / "DMP"
    told = {"modelspec.description": "First line.\n<b>Second</b> line."}
    use = {"dmp.use": json.dumps({"objective": "repair"})}
    TINY.patch(1).save(root / "told.safetensors", {**told, **use})
    (root / "told.json").write_text('{"preferred weight": 0.8}', encoding="utf-8")
    host.cards.add()
    (page,) = host.pages
    item = page.create_item("told")
    assert item["description"].split("\n") == [
        f"base {TINY.base.name}, strength 0.8 (yours)",
        "objective: repair",
        "First line.",
        "‹b›Second‹/b› line.",
    ]
    assert item["metadata"]["modelspec.description"] == "First line.\n<b>Second</b> line."
    assert item["prompt"] == '"<dmp:told:" + 0.8 + ">"'


def test_settings_can_hide_the_patches_of_other_bases(host):
    for callback in host.called["on_ui_settings"]:
        callback()
    FAMILIES["sdxl"].patch().save(host.host.folder().root / "xl.safetensors")
    host.cards.add()
    (page,), opts = host.pages, host.modules.shared.opts
    host.modules.sd_models.model_data.sd_model = host.modules.shared.sd_model

    def shown() -> tuple[bool, bool]:
        cards = [item["name"] for item in page.list_items()]
        return "xl [tiny-sdxl]" in host.listing.choices(), "xl" in cards

    assert shown() == (True, True)
    opts.dmp_show_all = False
    assert shown() == (False, False)
    assert page.create_item("xl") is None and page.create_item("ink") is not None
    assert page.create_item("xl", enable_filter=False)["name"] == "xl"
    host.modules.sd_models.model_data.sd_model = None  # nothing is loaded yet
    assert "xl" in host.listing.choices()
    assert host.options.kept() == 6
    opts.dmp_kept = 1
    host.host.folder().load("ink"), host.host.folder().load("deep/oil")
    assert len(host.host.folder()._loaded) == 1


def test_no_file_of_the_folder_breaks_the_cards(host, tmp_path, monkeypatch):
    """Every tab of extra networks would be empty: the host makes all in one list."""
    root = tmp_path / "models" / "DMP"
    TINY.patch(1).save(root / "ink.safetensors.safetensors")
    host.cards.add()
    page = host.pages[0]
    items = {item["name"]: item for item in page.list_items()}
    assert list(items) == ["broken", "deep/oil", "ink", "ink.safetensors"]
    assert page.create_item("ink.safetensors")["filename"].endswith(".safetensors.safetensors")
    times = page.get_sort_keys

    def gone(path: str) -> Any:
        if "oil" in path:
            raise FileNotFoundError(path)
        return times(path)

    page.get_sort_keys = gone
    assert [item["name"] for item in page.list_items()] == ["broken", "ink", "ink.safetensors"]
    read = []
    monkeypatch.setattr("a1111_dmp.files.inspect_file", read.append)
    walked = []
    walk = host.cards.host.folder().files
    monkeypatch.setattr(host.cards.host.folder(), "files", lambda: walked.append(1) or walk())
    assert len(list(page.list_items())) == 3
    assert (read, len(walked)) == ([], 1)  # files that did not change are not read again


def test_pasting_finds_renamed_files(host):
    digest = host.host.folder().load("deep/oil").hash
    texts = {
        "DMP hashes": f'"gone, far": {digest}, "away/lost": {digest}, ink: 0123456789',
        "Prompt": "a <dmp:gone, far:0.5><dmp:ink>",
        "Hires prompt": "a <dmp:lost>",
    }
    for callback in host.called["on_infotext_pasted"]:
        callback("", texts)
    assert texts["Prompt"] == "a <dmp:deep/oil:0.5><dmp:ink>"
    assert texts["Hires prompt"] == "a <dmp:deep/oil>"


def test_the_folder_of_the_command_line(host, tmp_path):
    spec = importlib.util.spec_from_file_location("dmp_preload", ROOT / "preload.py")
    preload = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preload)
    parser = argparse.ArgumentParser()
    preload.preload(parser)
    assert parser.parse_args([]).dmp_dir is None
    host.modules.shared.cmd_opts = parser.parse_args(["--dmp-dir", str(tmp_path / "mine")])
    host.host.folder.cache_clear()
    assert host.host.folder().root == (tmp_path / "mine").resolve()
    assert (tmp_path / "mine").is_dir()


def test_the_entry_loads_everything_afresh_and_leaves_no_path(host, monkeypatch):
    known = {name: module for name, module in sys.modules.items() if name.split(".")[0] in OURS}
    try:
        sys.path.insert(0, str(ROOT))
        spec = importlib.util.spec_from_file_location("dmp.py", ROOT / "scripts" / "dmp.py")
        entry = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(entry)
        scripts = [value for value in vars(entry).values() if isinstance(value, type)]
        assert {kind.__name__ for kind in scripts} >= {"Accordion", "DropDown"}
        assert sum(issubclass(kind, stand_in.Script) for kind in scripts) == 2
        assert sys.modules["a1111_dmp.script"] is not host.script
        for callback in host.called["on_before_ui"]:
            callback()
        assert ROOT not in [Path(entry).resolve() for entry in sys.path]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
        sys.modules.update(known)


OURS = ("a1111_dmp", "dmp_common")


def test_install_does_nothing(capsys):
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("dmp_install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not set(sys.modules) - before
    assert capsys.readouterr().out == ""
    assert sorted(p.name for p in (ROOT / "scripts").glob("*.py")) == ["dmp.py"]
