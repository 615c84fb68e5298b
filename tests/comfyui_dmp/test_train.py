"""Training in ComfyUI's real model classes: what comes out, and what is left behind."""

from __future__ import annotations

import copy
import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comfyui_dmp.states import States, batches
from dmp_common import PatchError, attach
from dmp_common.attach.record import LoadedPatch
from dmp_common.patch.serialize import use_of

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


def test_a_repair_in_inference_mode(train, real, host, run):
    """ComfyUI runs nodes in inference mode, with weights that were loaded in it."""
    family = real.FAMILIES["sd15"]
    with torch.inference_mode():
        asked = run.repair(family)
        before = run.sample(asked.model, family)
        weights = dict(asked.model.model.diffusion_model.named_parameters())
        outcome = train.train(asked)
        after = run.sample(host.attach(asked.model, outcome.record), family)
        target = run.sample(asked.teacher, family)
        assert torch.equal(run.sample(asked.model, family), before)
    assert all(
        weights[name] is own for name, own in asked.model.model.diffusion_model.named_parameters()
    )
    assert (after - target).norm() < 0.9 * (before - target).norm()
    assert not asked.model.model.diffusion_model.input_blocks[0][0]._forward_hooks
    assert outcome.record.loaded.path.is_file()


def test_gradients_through_comfyui_are_those_of_diffusers(train, family, monkeypatch):
    """The same steps on the diffusers model, as the trainer makes them, give the same patch."""
    torch.manual_seed(0)  # of gate and targets: Adam makes much of rounding for some of them
    fitting, student = (importlib.import_module(f"comfyui_dmp.{n}") for n in ("fitting", "student"))
    patcher = family.comfy()
    sampling = patcher.model.model_sampling
    x, text, pooled = family.inputs(4)
    if family.name == "flux2":  # ComfyUI puts zeros before captions of fewer tokens than this
        text = torch.nn.functional.pad(text, (0, 0, 512 - text.shape[1], 0))
    sigmas = torch.stack([torch.as_tensor(sampling.percent_to_sigma(p)) for p in (0.2, 0.6)] * 2)
    sigmas = sigmas.float()
    t = family.base.times["ldm"].timesteps(sampling.timestep(sigmas).float())
    strengths = torch.tensor([0.5, 1.0, 0.25, 1.0])
    states = States(x, sigmas, t, torch.randn_like(x), torch.zeros(4).long(), strengths)
    recipe = fitting.Recipe(4, 0.01, 1)
    patches = [importlib.import_module("comfyui_dmp.jobs").new_patch(patcher, family.base, None)]
    patches.append(copy.deepcopy(patches[0]))

    told, falling = [], iter((1.0, 1.0, 0.5))  # random targets teach nothing: keep it all the same
    monkeypatch.setattr(student, "weighted_gap", lambda *_: next(falling))
    loaded = LoadedPatch(patches[0], Path("trained.safetensors"))
    cond = [[text[:1], {"pooled_output": pooled[:1]}]]
    student.Student(patcher, loaded, True).train(
        states, states, [cond], recipe, 4, 3, lambda *step: told.append(step) is None
    )

    twin, ours = family.diffusers(), patches[1].train().requires_grad_(True)
    used: list[Any] = []

    def predict(_: int, own: States) -> torch.Tensor:
        used[0].item_strengths = own.strengths
        inputs = sampling.calculate_input(own.sigmas, own.noisy)
        captions = (value[:1].expand(len(inputs), *value.shape[1:]) for value in (text, pooled))
        out = family.run(twin, family.call(inputs, own.t, *captions))
        return family.unpack(out, tuple(x.shape[2:]))

    def predicted(patch: Any, strength: float = 1.0) -> torch.Tensor:
        with torch.no_grad(), attach(twin, patch, strength=strength) as attachment:
            used[:] = [attachment]
            return predict(0, states)

    with attach(twin, ours) as attachment:
        used[:] = [attachment]
        gap = fitting.measured_gap(student._without_patch(predict), states, 3)
        numbers = batches(4, 4, 3)
        fitting.fit(ours, predict, states, numbers, recipe, gap.weights, lambda *_: True)
    assert [step for step, *_ in told] == [1, 2, 3, 4]
    torch.testing.assert_close(told[0][2], gap.mean, rtol=1e-4, atol=0)
    # Predictions, since some values change nothing, such as a shift of keys, and Adam moves them
    # by what is left of rounding.
    theirs, mine, plain = (predicted(*p) for p in ((patches[0],), (ours,), (ours, 0.0)))
    assert (theirs - mine).norm() < 1e-4 * mine.norm()
    assert (mine - plain).norm() > 0.01 * plain.norm()


def test_an_interrupt_gives_what_is_trained_so_far(train, real, run, monkeypatch):
    import comfy.model_management as management

    family = real.FAMILIES["sd3"]
    progress = importlib.import_module("comfyui_dmp.progress").Progress
    trained = progress.trained

    def stopped(self, step, loss, gap):
        if step == 3:
            management.interrupt_current_processing()
        return trained(self, step, loss, gap)

    monkeypatch.setattr(progress, "trained", stopped)
    asked = run.repair(family, pictures=2, steps=50)
    first = train.train(asked).record
    assert first.loaded.patch.metadata["ss_steps"] == "3"
    assert not management.processing_interrupted()
    monkeypatch.undo()
    # The patch goes on, and only the new steps count.
    second = train.train(replace(asked, start=first, steps=2)).record
    assert second.loaded.patch.metadata["ss_steps"] == "5"
    use = use_of(second.loaded.patch.metadata)
    assert use["cheap"]["types"] and use["exact"]["evaluations"] == 1
    changed = [
        not torch.equal(value, first.loaded.patch.tensors()[name])
        for name, value in second.loaded.patch.tensors().items()
    ]
    assert any(changed)


def test_a_training_that_fails_gives_back_what_it_began_with(train, real, run, caplog):
    family = real.FAMILIES["sd3"]
    start = train.train(run.repair(family, steps=20, learning_rate=0.0)).record
    assert 1e-4 < float(start.loaded.patch.metadata["ss_learning_rate"]) <= 0.005
    caplog.clear()
    spoiled = train.train(run.repair(family, steps=2, learning_rate=1.0, start=start)).record
    before, after = start.loaded.patch.tensors(), spoiled.loaded.patch.tensors()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert spoiled.loaded.patch.metadata["ss_steps"] == "20"
    assert "no better than it was" in caplog.text


def test_guidance_through_the_node(nodes, train, real, run, host):
    """Inputs come as lists; without a teacher the model is its own, and the scale is a dial."""
    family = real.FAMILIES["sd15"]

    class Vae:
        def decode(self, latents):
            return latents[:, :3].movedim(1, -1).sigmoid()

    values = {
        "objective": "guidance", "cfg": 3.0, "all_scales": True, "width": 128, "height": 64,
        "pictures": 3, "steps": 4, "seed": 2**64 - 1, "learning_rate": 0.01, "batch_size": 2,
        "sampler_name": "euler", "scheduler": "normal", "sampling_steps": 2,
    }  # fmt: skip
    inputs = {name: [value] for name, value in values.items()}
    inputs |= {
        "model": [family.comfy()],
        "negative": [run.conditioning(family, -1.0)],
        "vae": [Vae()],
    }
    positive = [run.conditioning(family), run.conditioning(family, 0.5)]
    record, loss, beside, pictures = nodes["DMP_Train"].execute(**inputs, positive=positive).result
    assert record.loaded.patch.variant.guidance == 3.0
    assert use_of(record.loaded.patch.metadata)["exact"]["guidance_scale"] == [1.0, 3.0]
    assert loss.shape[-1] == beside.shape[-1] == 3
    assert beside.shape[2] > 3 * 16  # three pictures
    assert (len(pictures), pictures.shape[-1]) == (3, 3)
    patched = host.attach(family.comfy(), record)
    plain = run.sample(family.comfy(), family, cfg=1.0)
    assert not torch.equal(run.sample(patched, family, cfg=1.0), plain)


def test_all_wrong_inputs_are_told_at_once(train, real, run):
    family = real.FAMILIES["sd15"]
    wrong = run.repair(family, teacher=None, negative=None, pictures=1, size=(100, 64))
    with pytest.raises(PatchError) as told:
        train.train(wrong)
    for text in ("TEACHER MODEL", "negative", "one picture or more", "multiples of 16"):
        assert text in str(told.value)
    start = run.record(family.patch(mix="modulate", guidance=4.0), strength=0.5)
    other = run.repair(family, objective="guidance", start=start)
    with pytest.raises(PatchError, match="without settings") as told:
        train.train(other)
    assert "expected no TEACHER MODEL" in str(told.value)
    assert "found one for guidance 4" in str(told.value)
    with pytest.raises(PatchError, match="TEACHER MODEL: the new patch: expected"):
        train.train(run.repair(family, teacher=real.FAMILIES["sdxl"].comfy()))
    with pytest.raises(PatchError, match="expected a cheap model that differs"):
        train.train(run.repair(family, model=family.comfy()))


def test_saving_counts_up_and_stays_in_the_folder(nodes, folder, real, run):
    save = nodes["DMP_Save"]
    record = run.record(real.FAMILIES["sd15"].patch())
    picture = torch.rand(2, 8, 8, 3)
    names = [
        Path(save.execute(record, "repair/mine", preview=picture, author="Ada").result[0])
        for _ in range(2)
    ]
    assert [name.as_posix() for name in names] == [
        "repair/mine_00001_.safetensors",
        "repair/mine_00002_.safetensors",
    ]
    for name in names:
        assert (folder / name).with_suffix(".png").is_file()
    loaded = nodes["DMP_Load"].execute(str(names[0])).result[0]
    assert loaded.loaded.patch.metadata["modelspec.author"] == "Ada"
    for prefix in ("../mine", "/mine", "a/../../mine", "", "C:/mine", "repair/"):
        with pytest.raises(PatchError, match="expected a name inside of dmp"):
            save.execute(record, prefix)
    assert sorted(path.name for path in folder.iterdir()) == ["repair"]


def test_prompts_from_lines_and_from_a_file(nodes, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))

    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return [[tokens, {}]]

    (tmp_path / "more.txt").write_text("# a remark\na fox\r\n\n", "utf-8")
    prompts = nodes["DMP_Prompts"]
    encoded = prompts.execute(Clip(), " a cat \n\n# no\na dog", "more.txt").result[0]
    assert [cond[0][0] for cond in encoded] == ["a cat", "a dog", "a fox"]
    with pytest.raises(PatchError, match="one prompt or more"):
        prompts.execute(Clip(), "# none")
    with pytest.raises(PatchError, match="input folder"):
        prompts.execute(Clip(), "", "../more.txt")
    with pytest.raises(PatchError, match="expected a CLIP"):
        prompts.execute(None, "a cat")
    before = prompts.fingerprint_inputs(text="a", file="more.txt")
    (tmp_path / "more.txt").write_bytes(b"\xff")
    os.utime(tmp_path / "more.txt", ns=(1, 1))
    assert prompts.fingerprint_inputs(text="a", file="more.txt") != before
    with pytest.raises(PatchError, match="UTF-8"):
        prompts.execute(Clip(), "", "more.txt")
