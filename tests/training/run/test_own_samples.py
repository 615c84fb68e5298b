"""--objective own and two-sided: samples of the base, drawn before training and used again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import Go, Start, Train, patch_of
from training.objective.inputs import encode
from training.objective.own import CLEAN, OwnSamples
from training.options.command_line import resolve
from training.options.problems import ConfigError
from training.run import loop, own_samples
from training.run.parts import Run

OWN = {"objective": "own", "own_samples": 32, "own_steps": 2, "recipe": "none"}
TWO = {**OWN, "objective": "two-sided"}
SIMPLE = {"ema_decay": 0.0, "learning_rate": 1e-2, "max_grad_norm": 0.0}


def drawn(folder: Path) -> list[Path]:
    return sorted((folder / "own-samples").iterdir())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_samples_are_drawn_once_and_used_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, events = start(**OWN)
    run.method.remove()
    files = drawn(events.outputs.folder)
    assert [path.name for path in files] == ["00000-00.safetensors", "00001-00.safetensors"]
    assert run.own is not None
    assert len(run.own) == 32
    first = load_file(files[0])
    assert first[CLEAN].shape == (16, 1, 8, 8)
    assert first["given.labels"].shape == (16,)
    bytes_before = [path.read_bytes() for path in files]
    drawing = own_samples._drawn
    again: list[object] = []
    monkeypatch.setattr(
        own_samples, "_drawn", lambda *given: [again.append(given), drawing(*given)][1]
    )
    for damage in (lambda: None, lambda: files[1].write_bytes(b"half"), files[0].unlink):
        damage()
        run, _ = start(**OWN)
        run.method.remove()
        assert [path.read_bytes() for path in files] == bytes_before
    assert len(again) == 2  # the two that were damaged, and no other
    run, _ = start(**{**OWN, "own_steps": 3})
    run.method.remove()
    assert len(again) == 4
    assert [path.read_bytes() for path in files] != bytes_before


def test_own_is_data_training_with_the_opposite_sign(go: Go, start: Start) -> None:
    """On the same samples: negated, value by value, also by an optimiser with momentum."""
    found = {}
    for objective in ("own", "plain"):
        run, events = start(**OWN, **SIMPLE)
        if objective == "plain":
            at_one(run)
        loop.train(run, events)
        run.method.remove()
        found[objective] = patch_of(run).tensors()
    for name, value in found["own"].items():
        expected = found["plain"][name]
        if name.startswith("prompts."):
            assert expected.any()
            expected = -expected
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)


def at_one(run: Run) -> None:
    """Makes a run predict all samples at strength 1."""
    aim_of = run.aims.aim
    run.aims.aim = lambda *given: replace(aim_of(*given), strengths=None)


def test_lora_learns_the_opposite_of_own_samples(start: Start) -> None:
    """The first step moves one matrix alone, by the sign of its gradient."""
    found = []
    for plain in (False, True):
        run, events = start(**OWN, **SIMPLE, method="lora", max_train_steps=1)
        if plain:
            at_one(run)
        loop.train(run, events)
        found.append({n: v.detach().clone() for n, v in run.method.trainable().items()})
        run.method.remove()
    negated = [name for name in found[0] if "lora_B" in name]
    assert negated
    for name in negated:
        assert found[0][name].any()
        torch.testing.assert_close(found[0][name], -found[1][name])


def test_two_sided_batches_are_half_data_and_half_own(start: Start) -> None:
    run, _ = start(**TWO)
    run.method.remove()
    batch = next(loop._batches(run))
    names = loop._names(run, len(batch), 0)
    aim = run.aims.aim(batch, names)
    assert aim.strengths.tolist() == [1.0, -1.0] * 8
    assert [key.startswith("own sample") for key in aim.keys] == [False, True] * 8
    assert aim.keys[0] == batch.keys[0]
    assert torch.equal(aim.clean[0], batch.pixels[0])
    # Two processes train on what one would: the second has the last half of the names.
    half = run.aims.aim(batch, [(*name[:2], 1, name[3]) for name in names])
    assert half.strengths.tolist() == [-1.0, 1.0] * 8
    inputs = encode(batch, run.encoders, run.config, names, run.device)
    own = run.aims.samples.choose(names, inputs)
    assert torch.equal(aim.clean[1], own.clean[1])
    assert torch.equal(aim.given["labels"][1], own.given["labels"][1])


@pytest.mark.parametrize("task", [OWN, TWO], ids=["own", "two-sided"])
def test_both_train_and_say_what_they_are(go: Go, task: dict[str, object]) -> None:
    run, events = go(**task, **SIMPLE)
    assert all(
        bool(tensor.any()) for n, tensor in patch_of(run).tensors().items() if "prompts" in n
    )
    assert events.metadata.purpose == {
        "objective": task["objective"],
        "zero_terminal_snr": False,
        "own_samples": {"count": 32, "sampler": "unipc", "steps": 2},
    }


def test_captions_are_kept_with_their_samples(train: Train) -> None:
    chosen = ["--objective", "own", "--own_samples", "4", "--own_steps", "2"]
    out = train("sd15", *chosen, "--train_batch_size", "2")
    files = drawn(out)
    assert len(files) == 2
    tensors = load_file(files[0])
    assert {"clean", "given.prompt", "given.sizes"} <= set(tensors)
    assert len({len(value) for value in tensors.values()}) == 1
    samples = OwnSamples(files)
    assert len(samples) == 4


def test_a_flow_model_takes_its_own_sampler(train: Train) -> None:
    out = train("sd3", "--objective", "two-sided", "--own_samples", "2", "--own_steps", "2")
    assert drawn(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "own", "method": "full"}, "use dmp, prompt or lora"),
        ({"objective": "two-sided", "method": "lora"}, "use dmp or prompt"),
        ({"objective": "own", "mix": "prepend"}, "found --mix prepend"),
    ],
)
def test_methods_without_a_strength_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"base": "dit-b/2", **options})


def test_the_last_step_is_kept() -> None:
    assert resolve({"base": "digits"}).keep_best
    assert not resolve({"base": "digits", "objective": "own"}).keep_best
    assert resolve({"base": "digits", "objective": "own", "keep_best": True}).keep_best
