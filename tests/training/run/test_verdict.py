"""The verdict at the end of a run says what the held-out images say, and no more."""

from __future__ import annotations

import json

import pytest
import torch

from dmp_common import Patch
from tests.training.conftest import Go
from training.options.command_line import resolve
from training.run.charts import losses_chart
from training.run.state import History
from training.run.validation import MOST, automatic_share, automatic_steps
from training.run.verdict import judge

IMAGES, BINS = 40, 4


def losses(change: float, spread: float = 0.001) -> tuple[torch.Tensor, torch.Tensor]:
    """Of base and trained model: `change` is relative, `spread` differs from image to image."""
    source = torch.Generator().manual_seed(0)
    base = torch.rand(IMAGES, BINS, generator=source, dtype=torch.float64) + 0.5
    noise = torch.randn(IMAGES, BINS, generator=source, dtype=torch.float64)
    return base, base * (1 + change) + spread * noise


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (-0.05, "better than the base"),
        (0.05, "worse than the base"),
        (0.0, "not to be told from the base: the interval holds 0"),
    ],
)
def test_better_worse_or_not_to_be_told(change: float, sentence: str) -> None:
    verdict = judge(*losses(change), best_step=4, last_step=4, kept_step=4)
    assert verdict is not None
    assert verdict.sentence == sentence
    assert verdict.change.low <= verdict.change.mean <= verdict.change.high
    assert verdict.change.mean == pytest.approx(change, abs=0.001)
    assert len(verdict.by_level) == BINS
    assert f"verdict: {sentence}" in verdict.text()
    assert json.loads(json.dumps(verdict.to_json()))["better_than_base"] == (change < 0)


def test_pairs_make_the_interval_narrow() -> None:
    """Images differ much more from each other than a patch changes each of them."""
    base, trained = losses(-0.01)
    paired = judge(base, trained, best_step=1, last_step=1, kept_step=1)
    mixed = judge(base, trained.flip(0), best_step=1, last_step=1, kept_step=1)
    assert paired is not None
    assert mixed is not None
    assert paired.change.mean == pytest.approx(mixed.change.mean)
    assert paired.change.high < 0 < mixed.change.high


@pytest.mark.parametrize(
    ("change", "best", "kept", "advice"),
    [
        (-0.05, 10, 10, "train longer"),
        (-0.05, 8, 10, "give --keep_best"),
        (-0.05, 2, 2, "came early"),
        (0.0, 10, 10, "--validation_draws"),
        (0.05, 10, 10, "Lower --learning_rate"),
    ],
)
def test_advice(change: float, best: int, kept: int, advice: str) -> None:
    verdict = judge(*losses(change), best_step=best, last_step=10, kept_step=kept, falling=True)
    assert verdict is not None
    assert advice in " ".join(verdict.advice)


def test_help_and_harm_at_different_noise_levels_is_told() -> None:
    base, trained = losses(-0.05)
    trained[:, 2:] = base[:, 2:] * 1.05
    verdict = judge(base, trained, best_step=1, last_step=1, kept_step=1)
    assert verdict is not None
    assert "--min_timestep 0 --max_timestep 500" in verdict.text()


@pytest.mark.parametrize(
    ("means", "falling"),
    [
        ([1.0, 0.9, 0.8], True),
        ([1.0, 0.8, 0.799], False),
        ([1.0, 0.9, 0.95], False),
        ([1.0, 0.9], False),
    ],
)
def test_whether_the_loss_still_fell(means: list[float], falling: bool) -> None:
    history = History(base=[1.0], validation={n: [mean] for n, mean in enumerate(means)})
    assert history.falling == falling


@pytest.mark.parametrize("chosen", [True, False])
def test_a_step_that_was_chosen_on_these_images_is_said_to_be(chosen: bool) -> None:
    verdict = judge(*losses(-0.05), best_step=8, last_step=10, kept_step=8, chosen=chosen)
    assert verdict is not None
    assert ("chosen on these images" in verdict.text()) == chosen
    assert verdict.to_json()["step_was_chosen_on_these_images"] == chosen


def test_one_image_has_no_interval() -> None:
    one = torch.ones(1, BINS)
    assert judge(one, one, best_step=1, last_step=1, kept_step=1) is None


def test_the_file_and_its_summary_have_the_verdict_on_what_they_hold(go: Go) -> None:
    run, events = go(max_train_steps=4, validate_every_n_steps=2, keep_best=True)
    assert events.verdict is not None
    written = json.loads((events.outputs.folder / "tiny-digits-dmp.json").read_text())
    header = Patch.load(events.outputs.path()).metadata["ss_dmp_verdict"]
    assert written["verdict"] == json.loads(header) == events.verdict.to_json()
    assert written["verdict"]["kept_step"] == run.history.best_step
    assert events.verdict.trained == pytest.approx(run.history.mean(run.history.best_step))
    assert events.verdict.base == pytest.approx(sum(run.history.base) / len(run.history.base))


def test_share_that_is_held_out_by_itself() -> None:
    assert automatic_share(20) == 0
    assert automatic_share(100) * 100 == pytest.approx(8)
    assert automatic_share(10**6) * 10**6 == pytest.approx(MOST)


def test_validations_cost_little() -> None:
    long = resolve({"base": "digits", "max_train_steps": 50_000, "validation_bins": 10})
    assert automatic_steps(long, 64, 128) == 5000
    short = long.model_copy(update={"max_train_steps": 100})
    assert automatic_steps(short, 64, 4) == 100  # the last alone


def test_chart_of_losses() -> None:
    chart = losses_chart({0: [1.0, 2.0], 10: [0.9, 2.1], 20: [0.8, 2.2]}, [1.0, 2.0])
    assert len(chart.getcolors(1 << 16) or []) > 5
    losses_chart({5: [1.0]}, [1.0])  # one step, one level, no change
