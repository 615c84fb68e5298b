"""--objective distill on a tiny base: every method learns the exact call, and says how much."""

from __future__ import annotations

import json

import pytest
import torch

from dmp_common import Patch
from tests.training.conftest import Go, Start, patch_of
from training.objective import relative
from training.objective.losses import SIDES
from training.objective.teacher import without
from training.options.command_line import resolve
from training.options.problems import ConfigError
from training.run import loop
from training.run.repair import RepairVerdict

ROUNDED = {"objective": "distill", "student_quantization": "rtn2", "recipe": "none"}
GUIDED = {
    "objective": "distill", "recipe": "none", "teacher_guidance_scale": "3",
    "caption_dropout_rate": 0.0,
}  # fmt: skip
TASKS = {"rounded": ROUNDED, "guided": GUIDED}
METHODS = {
    "dmp": {},
    "modulate": {"mix": "modulate"},
    "prompt": {"method": "prompt"},
    "lora": {"method": "lora"},
    "full": {"method": "full", "learning_rate": 1e-3},
    "joint": {"method": "joint", "learning_rate": 1e-3},
}
GUIDED_METHODS = ("dmp", "lora", "full")


@pytest.mark.parametrize(
    ("task", "method"),
    [*(("rounded", name) for name in METHODS), *(("guided", name) for name in GUIDED_METHODS)],
)
def test_every_method_repairs_some_of_the_gap(go: Go, task: str, method: str) -> None:
    few = {"max_train_steps": 12, "ema_decay": 0.0, "validate_every_n_steps": 12}
    run, events = go(**{"learning_rate": 1e-2, **few, **TASKS[task], **METHODS[method]})
    verdict = events.verdict
    assert isinstance(verdict, RepairVerdict)
    assert verdict.share.mean > 0.02, verdict.text()
    # What the exact model is stays as it was, whatever was trained.
    exact = run.exact.model
    assert (exact is run.frozen.model) == (task == "guided" and method not in ("full", "joint"))
    assert all(p.grad is None for p in exact.parameters())


def test_the_target_is_the_exact_prediction_without_the_patch(start: Start) -> None:
    run, _ = start(**GUIDED, prompt_init="random")
    batch = next(loop._batches(run))
    names = loop._names(run, len(batch), 0)
    aim = run.aims.aim(batch, names)
    run.method.remove()
    exact, frozen = run.exact, run.frozen
    assert exact is frozen
    with torch.no_grad():
        told = frozen.family.predict(frozen.model, aim.noisy, aim.t, aim.given)
        nothing = without(aim.given, run.nothing)
        assert nothing["labels"].tolist() == [10] * len(batch)
        untold = frozen.family.predict(frozen.model, aim.noisy, aim.t, nothing)
    torch.testing.assert_close(aim.target, untold + 3 * (told - untold))
    assert aim.clean is None and aim.strengths is None


def test_a_range_of_scales_makes_strength_the_dial_of_guidance(start: Start) -> None:
    run, _ = start(**{**GUIDED, "teacher_guidance_scale": "1:5"}, prompt_init="random")
    assert patch_of(run).variant.guidance == 5.0
    batch = next(loop._batches(run))
    names = loop._names(run, len(batch), 0)
    aim, again = run.aims.aim(batch, names), run.aims.aim(batch, names)
    assert torch.equal(aim.strengths, again.strengths)  # a resumed run draws the same
    assert 0 <= float(aim.strengths.min()) < 0.5 < float(aim.strengths.max()) <= 1
    run.method.silenced().__enter__()
    scales = 1 + 4 * aim.strengths
    torch.testing.assert_close(
        aim.target, run.aims.teacher(aim.noisy, aim.t, aim.given, scales.cpu())
    )
    run.method.attachment.enabled = True
    # Each item is predicted at its own strength.
    with torch.no_grad(), run.method.at(aim.strengths):
        mixed = run.student.prediction(aim.noisy, aim.t, aim.given, 1)
    run.method.attachment.strength = float(aim.strengths[3])
    with torch.no_grad():
        alone = run.student.prediction(aim.noisy, aim.t, aim.given, 1)
    run.method.remove()
    torch.testing.assert_close(mixed[3], alone[3])
    assert not torch.allclose(mixed[2], alone[2])


def test_guidance_has_an_interval(start: Start) -> None:
    run, events = start(**GUIDED, min_timestep=300, max_timestep=600)
    run.method.remove()
    gaps = events.base_losses
    batch = next(loop._batches(run))
    noisy, given = torch.zeros(4, 1, 8, 8), {"labels": batch.labels[:4]}
    t = torch.tensor([299, 300, 599, 600])
    teacher = run.aims.teacher
    target = teacher(noisy, t, given)
    plain = run.student.prediction(noisy, t, given, 1)
    assert [torch.equal(a, b) for a, b in zip(target, plain, strict=True)] == [1, 0, 0, 1]
    assert gaps.mean() > 0


def test_verdict_tells_both_sides_and_their_difference(go: Go) -> None:
    _, events = go(**ROUNDED, mix="modulate", learning_rate=1e-2, max_train_steps=20)
    verdict = events.verdict
    assert list(verdict.sides) == list(SIDES)
    assert verdict.sides["conditional"] == pytest.approx(verdict.share)
    path = events.outputs.path()
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert told["verdict"]["share_repaired"]["mean"] == pytest.approx(verdict.share.mean)
    assert set(told["verdict"]["share_repaired_by_side"]) == set(SIDES)
    use = json.loads(Patch.load(path).metadata["dmp.use"])
    assert use == told["use"]
    assert use["objective"] == "distill"
    assert use["cheap"]["quantization"] == "rtn2" and use["exact"] == {"evaluations": 1}
    assert use["share_repaired"]["mean"] == pytest.approx(verdict.share.mean)
    assert "share repaired" in verdict.text()


def test_weights_of_timesteps_are_measured_before_training(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relative, "IMAGES", 32)

    def weights(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
        run, events = start(**options)
        run.method.remove()
        return run.student.relative.logs, events.base_losses

    gap, losses = weights(**ROUNDED, teacher_weighting="gap")
    lower, upper = gap.unflatten(0, (2, -1)).mean(1)  # in the two ranges of the validation
    measured = losses.mean(0).log()
    torch.testing.assert_close(lower - upper, measured[1] - measured[0], rtol=0.5, atol=0.5)
    of_exact, _ = weights(**ROUNDED, teacher_weighting="relative")
    of_base, _ = weights(relative_loss=True)
    assert torch.equal(of_exact, of_base)


@pytest.mark.parametrize("method", ["dmp", "lora"])
def test_chosen_strength_is_folded_in_and_never_worse(go: Go, method: str) -> None:
    far = {"learning_rate": 0.05, "max_train_steps": 3, "ema_decay": 0.0, "method": method}
    _, plain = go(**ROUNDED, **far)
    run, chosen = go(**ROUNDED, **far, choose_strength=True)
    assert chosen.strength is not None and chosen.strength != 1
    assert chosen.verdict.trained < plain.verdict.trained
    told = json.loads(chosen.outputs.path().with_suffix(".json").read_text(encoding="utf-8"))
    assert told["use"]["strength_folded_in"] == chosen.strength
    if method == "dmp":
        before = Patch.load(plain.outputs.path())  # the same path: the later run overwrote it
        assert torch.equal(before.tensors()["gate.bias"], patch_of(run).tensors()["gate.bias"])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"objective": "distill"}, "needs a cheap call"),
        ({"student_quantization": "rtn3"}, "need --objective distill"),
        ({**GUIDED, "caption_dropout_rate": 0.2}, "trains conditional items alone"),
        ({**ROUNDED, "teacher_guidance_scale": "1:4"}, "must be one number for a cheap call"),
        (
            {**GUIDED, "teacher_guidance_scale": "1:4", "method": "lora"},
            "must be one number for a method without a strength",
        ),
        ({**ROUNDED, "fp8_base": True}, "store the exact model in 8 bits"),
        ({"choose_strength": True, "method": "full"}, "added to a frozen base"),
        *(
            ({**GUIDED, "teacher_guidance_scale": scale}, problem)
            for scale, problem in (
                ("1", "scale above 1"), ("x", "scale above 1"), ("2:5", "begins at 1"),
                ("nan", "scale above 1"), ("1:", "scale above 1"),
            )
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told(options: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        resolve({"base": "digits", **options})


def test_recipes_of_distillation() -> None:
    config = resolve({"base": "digits", "objective": "distill", "student_quantization": "rtn3"})
    assert (config.recipe, config.mix) == ("repair", "modulate")
    assert "grids" not in config.variant  # those of a modulating patch, not those of the digits
    config = resolve({"base": "dit-b/2", "recipe": "guidance"})
    assert (config.objective, config.guidance_range) == ("distill", (1.0, 4.0))
    assert config.caption_dropout_rate == 0 and config.variant["guidance"] == 4.0
    both = {"base": "sd15", "recipe": "guidance", "student_quantization": "rtn4"}
    assert resolve(both).guidance_range == (7.5, 7.5)
