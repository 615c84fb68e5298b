"""Results of a study as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from training.experiments.miniature.trial import TrialMeasures
from training.objective.intervals import t_interval


def tuning_table(
    base: TrialMeasures, found: Mapping[str, Mapping[str, TrialMeasures]], chosen: Mapping[str, str]
) -> str:
    """Each method with each of its settings, validation; the chosen one is marked."""
    lines = _head(["method", "learning rate and loss", "loss", "relative loss", *_distances(base)])
    lines.append(f"| base | | {base.loss:.5f} | 0 | {_plain(base.frechet.values())} |")
    for name, by_setting in found.items():
        for setting, measures in by_setting.items():
            mark = " (chosen)" if setting == chosen[name] else ""
            lines.append(f"| {name} | {setting}{mark} | {_changes(base, measures)} |")
    return "\n".join(lines)


def strength_table(base: TrialMeasures, found: Mapping[str, TrialMeasures]) -> str:
    """Patches at strengths, one seed."""
    lines = _head(["patch", "loss", "relative loss", *_distances(base)])
    lines += [f"| {name} | {_changes(base, measures)} |" for name, measures in found.items()]
    return "\n".join(lines)


def confirmation_table(base: TrialMeasures, found: Mapping[str, Sequence[TrialMeasures]]) -> str:
    """Each method against the base over seeds, test split: mean and standard deviation."""
    lines = _head(["method", "loss", "relative loss", *_distances(base)])
    lines.append(f"| base | {base.loss:.5f} | 0 | {_plain(base.frechet.values())} |")
    for name, several in found.items():
        loss, relative, *distances = columns(base, several)
        cells = [_spread(100 * loss, "%"), _spread(100 * relative, "%")]
        lines.append(f"| {name} | {' | '.join(cells + [_spread(x) for x in distances])} |")
    return "\n".join(lines)


def difference_table(
    base: TrialMeasures, found: Mapping[str, Sequence[TrialMeasures]], ours: str
) -> str:
    """Ours minus each, over seeds, paired: equal seeds saw equal images and noise in equal order.

    Of losses in points of a per cent of the base's; mean and 95 % interval.
    """
    head = [f"{ours} minus", "loss", "relative loss", *_distances(base)]
    lines, own = _head(head), columns(base, found[ours])
    rivals = {"base": [base] * len(found[ours])}
    rivals |= {name: list(several) for name, several in found.items() if name != ours}
    for name, several in rivals.items():
        pairs = zip(own, columns(base, several), strict=True)
        cells = [_interval(a - b, loss=n < 2) for n, (a, b) in enumerate(pairs)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def columns(base: TrialMeasures, several: Sequence[TrialMeasures]) -> list[torch.Tensor]:
    """Over seeds: change of the loss, of the relative loss (shares), Frechet distances."""
    rows = [
        [
            m.loss / base.loss - 1,
            float(m.relative(base).mean()),
            *(m.frechet[sampler] for sampler in base.frechet),
        ]
        for m in several
    ]
    return list(torch.tensor(rows, dtype=torch.float64).unbind(1))


def bins_table(base: TrialMeasures, found: Mapping[str, Sequence[TrialMeasures]]) -> str:
    """Change of the loss in each bin of timesteps, per cent, mean over seeds."""
    bins = base.losses.shape[1]
    lines = _head(["method", *(f"{1000 * n // bins}-" for n in range(bins))])
    lines.append("| base (loss) | " + " | ".join(f"{x:.5f}" for x in base.losses.mean(0)) + " |")
    for name, several in found.items():
        change = torch.stack([m.losses.mean(0) / base.losses.mean(0) - 1 for m in several]).mean(0)
        lines.append(f"| {name} | " + " | ".join(f"{100 * x:+.3f}" for x in change) + " |")
    return "\n".join(lines)


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _distances(base: TrialMeasures) -> list[str]:
    return [f"Frechet distance, {sampler}" for sampler in base.frechet]


def _plain(values: Iterable[float]) -> str:
    return " | ".join(f"{value:.3f}" for value in values)


def _changes(base: TrialMeasures, measures: TrialMeasures) -> str:
    losses = f"{measures.loss / base.loss - 1:+.4%} | {float(measures.relative(base).mean()):+.4%}"
    return " | ".join([losses, *(f"{measures.frechet[name]:.3f}" for name in base.frechet)])


def _spread(values: torch.Tensor, unit: str = "") -> str:
    if unit:  # changes of a loss
        return f"{values.mean():+.4f} {unit} +- {values.std():.4f}"
    return f"{values.mean():.3f} +- {values.std():.3f}"


def _interval(differences: torch.Tensor, loss: bool) -> str:
    scale, places = (100, 4) if loss else (1, 3)
    if len(differences) < 2:
        return f"{scale * float(differences.mean()):+.{places}f}"
    mean, low, high = (f"{scale * x:+.{places}f}" for x in t_interval(differences))
    return f"{mean} [{low}, {high}]"
