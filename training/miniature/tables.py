"""Results of a study as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from training.evaluation.compare import t_interval
from training.miniature.trial import Measures


def tuning_table(
    base: Measures, found: Mapping[str, Mapping[float, Measures]], chosen: Mapping[str, float]
) -> str:
    """Change of the loss for each method and rate, validation; the chosen rate is marked."""
    lines = ["| method | learning rate | loss | relative loss |", "|---|---|---|---|"]
    for name, by_rate in found.items():
        for rate, measures in by_rate.items():
            mark = " (chosen)" if rate == chosen[name] else ""
            lines.append(f"| {name} | {rate:g}{mark} | {_changes(base, measures)} |")
    return "\n".join(lines)


def confirmation_table(base: Measures, found: Mapping[str, Sequence[Measures]], ours: str) -> str:
    """Each method against the base, and ours against each, over seeds, test split."""
    lines = [
        "| method | loss | relative loss | Frechet distance | ours - it: loss | relative loss | "
        "Frechet distance |",
        "|---|---|---|---|---|---|---|",
        f"| base | {base.loss:.5f} | 0 | {base.frechet:.3f} | | | |",
    ]
    for name, several in found.items():
        values = columns(base, several)
        cells = [_spread(v, 100 if n < 2 else 1) for n, v in enumerate(values)]
        against = [""] * 3
        if name != ours and ours in found:
            pairs = zip(columns(base, found[ours]), values, strict=True)
            against = [_interval(a, b, 100 if n < 2 else 1) for n, (a, b) in enumerate(pairs)]
        lines.append(f"| {name} | {' | '.join(cells + against)} |")
    return "\n".join(lines)


def columns(base: Measures, several: Sequence[Measures]) -> list[torch.Tensor]:
    """Over seeds: change of the loss, of the relative loss (shares), Frechet distance."""
    return [
        torch.tensor([m.loss / base.loss - 1 for m in several], dtype=torch.float64),
        torch.tensor([float(m.relative(base).mean()) for m in several], dtype=torch.float64),
        torch.tensor([m.frechet for m in several], dtype=torch.float64),
    ]


def bins_table(base: Measures, found: Mapping[str, Sequence[Measures]]) -> str:
    """Change of the loss in each bin of timesteps, per cent, mean over seeds."""
    bins = base.losses.shape[1]
    head = " | ".join(f"{1000 * n // bins}-" for n in range(bins))
    lines = [f"| method | {head} |", "|---" * (bins + 1) + "|"]
    lines.append("| base (loss) | " + " | ".join(f"{x:.5f}" for x in base.losses.mean(0)) + " |")
    for name, several in found.items():
        change = torch.stack([m.losses.mean(0) / base.losses.mean(0) - 1 for m in several]).mean(0)
        lines.append(f"| {name} | " + " | ".join(f"{100 * x:+.2f}" for x in change) + " |")
    return "\n".join(lines)


def _changes(base: Measures, measures: Measures) -> str:
    return f"{measures.loss / base.loss - 1:+.3%} | {float(measures.relative(base).mean()):+.3%}"


def _spread(values: torch.Tensor, scale: float) -> str:
    sign, unit = ("+", " %") if scale == 100 else ("", "")
    return f"{scale * values.mean():{sign}.3f}{unit} +- {scale * values.std():.3f}"


def _interval(a: torch.Tensor, b: torch.Tensor, scale: float) -> str:
    """Paired by seed: equal seeds saw equal images and noise in equal order."""
    if len(a) < 2:
        return f"{scale * float(a.mean() - b.mean()):+.3f}"
    mean, low, high = (scale * x for x in t_interval(a - b))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
