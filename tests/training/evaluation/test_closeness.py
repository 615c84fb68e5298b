"""The distance to the full model's pictures, and the share of it that is gone."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from training.evaluation.closeness import FEATURES, PIXELS, Target, closeness
from training.evaluation.differences import Judged, ModelResult
from training.evaluation.primary import primary_comparisons
from training.evaluation.spec import How, RowSettings, Spec
from training.objective.intervals import ratio_interval, t_interval
from training.objective.multiple import holm

USUAL = How(20, 1.0, "unipc")


def judged(label: str, kind: str, *seeds: Tensor, how: How = USUAL, **settings: object) -> Judged:
    spec = Spec(label, kind, "", RowSettings.model_validate(settings))
    row = Judged(spec, how)
    for values in seeds:
        result = ModelResult(torch.zeros(2, 1))
        result.measured.single[PIXELS] = values
        result.measured.values[PIXELS] = float(values.mean())
        row.results.append(result)
    return row


def test_the_full_models_pictures_are_kept_and_compared() -> None:
    target = Target()
    full = torch.rand(3, 1, 4, 4) * 2 - 1
    features = torch.randn(3, 5)
    assert target.distances(0, full).tolist() == [0, 0, 0]
    assert target.feature_distances(features).tolist() == [0, 0, 0]
    target.complete = True
    torch.testing.assert_close(
        target.distances(0, full + 0.5), torch.full((3,), 0.25).double(), atol=1e-3, rtol=0
    )
    # In shares of the variance: any scale of the features gives the same.
    moved = target.feature_distances(features + 1)
    torch.testing.assert_close(moved, (1 / features.double().var(0).mean()).expand(3))
    # Unrelated pictures are 2 apart.
    many, target = torch.randn(2, 4000, 5), Target()
    target.feature_distances(many[0])
    target.complete = True
    assert float(target.feature_distances(many[1]).mean()) == pytest.approx(2, abs=0.1)


def test_the_share_that_is_gone_is_of_the_row_that_is_sampled_alike() -> None:
    before, other = 1 + torch.rand(50).double(), 3 + torch.rand(50).double()
    seeds = [before * factor + 0.01 * torch.rand(50).double() for factor in (0.1, 0.2, 0.3)]
    quick = How(5, 1.0, "unipc")
    rows = [
        judged("full model", "exact", torch.zeros(50).double()),
        judged("more bits", "base", 0.5 * before, quantization="rtn6"),
        judged("cheap", "base", before),
        judged("quick", "base", other, how=quick),
        judged("ours", "dmp", *seeds),
        judged("ours, quick", "dmp", other / 2, how=quick),
        judged("alone", "dmp", other, how=How(6, 1.0, "unipc")),
    ]
    found = closeness({row.label: row for row in rows})
    assert list(found) == [row.label for row in rows[1:]]
    assert all(list(sides) == ["pixels"] for sides in found.values())
    ours = found["ours"]["pixels"]
    mean = torch.stack(seeds).mean(0)
    assert (ours.mean, ours.low, ours.high) == tuple(t_interval(mean))
    gone = ours.gone
    assert gone is not None and gone.of == "cheap"
    change = ratio_interval(before, mean)
    assert (gone.mean, gone.low, gone.high) == (-change.mean, -change.high, -change.low)
    assert gone.seeds is not None
    assert gone.seeds.mean == pytest.approx(gone.mean) and gone.seeds.low < gone.low
    assert ours.to_json()["gone"]["seeds"].keys() == {"mean", "low", "high"}
    quickly = found["ours, quick"]["pixels"].gone
    assert quickly is not None and quickly.of == "quick" and quickly.seeds is None
    assert quickly.mean == pytest.approx(0.5)
    for label in ("more bits", "cheap", "alone"):
        assert found[label]["pixels"].gone is None
    assert FEATURES not in rows[0].results[0].measured.single


def test_primary_comparisons_are_corrected_for_their_number() -> None:
    values = torch.rand(20).double()
    ours = [values + shift for shift in (0.0, 0.1, 0.2)]
    lora = [values + shift for shift in (0.9, 1.0, 1.3)]
    rows = [
        judged("full model", "exact", 0 * values),
        judged("cheap", "base", values + 3),
        judged("ours", "dmp", *ours),
        judged("lora", "lora", *lora),
        judged("once", "dmp", values),
    ]
    found = {one.against: one for one in primary_comparisons({row.label: row for row in rows})}
    assert list(found) == ["cheap", "lora", "once"]  # not the full model, which is 0 by definition
    means = [[float(seed.mean()) for seed in seeds] for seeds in (ours, lora)]
    welch = float(stats.ttest_ind(*means, equal_var=False).pvalue)
    assert found["lora"].p == pytest.approx(welch)
    alone = float(stats.ttest_1samp(means[0], float(values.mean())).pvalue)
    assert found["once"].p == pytest.approx(alone)
    wanted = holm({label: one.p for label, one in found.items()})
    assert {label: one.p_holm for label, one in found.items()} == wanted
    assert found["lora"].difference.mean == pytest.approx(0.1 - 3.2 / 3)
    assert primary_comparisons({"once": rows[-1]}) == primary_comparisons({"cheap": rows[1]}) == []
