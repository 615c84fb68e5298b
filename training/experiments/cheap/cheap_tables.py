"""Tables of the study of cheap calls, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training.experiments.cheap.cheap_trial import RepairMeasures
from training.objective.intervals import t_interval


def rates_table(shares: Mapping[tuple[str, float], float]) -> str:
    """The share of the gap on validation that each remedy repairs at each rate."""
    rows: dict[str, list[str]] = {}
    for (name, rate), share in shares.items():
        rows.setdefault(name, []).append(f"{rate:g}: {share:.3f}")
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(
        ["| remedy | rate: share of the gap repaired | |", "|---|---|---|---|", *lines]
    )


def repair_table(call: str, found: Mapping[str, Sequence[RepairMeasures]]) -> str:
    """What each remedy leaves of the damage on the test split.

    The distance of the pictures and its share are over seeds and pictures; the interval of the
    share is that of the mean over pictures. The last columns are over seeds.
    """
    first = found["none"][0]
    full, broken = float(first.frechet[0]), float(first.frechet[1])
    lines = [
        f"{call}: Frechet distance of the full model {full:.3f}, of the cheap call {broken:.3f}; "
        f"squared distance of its pictures to the full model's {float(first.pictures.mean()):.4f}",
        "",
        "| remedy | distance of pictures | gone | gap repaired | Frechet distance | "
        "minus full, share of the damage | distance minus LoRA's |",
        "|---|---|---|---|---|---|---|",
    ]
    lora = found.get("lora")
    for name, several in found.items():
        own = torch.stack([one.pictures for one in several]).mean(0)  # (pictures,)
        gone = 1 - own.mean() / first.pictures.mean()
        shares = [one.share for one in several]
        frechet = torch.stack([one.frechet[1] for one in several])
        against = "" if lora is None or name in ("lora", "none") else _minus(own, lora)
        lines.append(
            f"| {name} | {float(own.mean()):.4f} | {_share(own, first.pictures, float(gone))} | "
            f"{sum(shares) / len(shares):.3f} | {_mean(frechet)} | "
            f"{_damage(frechet - full, broken - full)} | {against} |"
        )
    return "\n".join(lines)


def _share(own: Tensor, before: Tensor, gone: float) -> str:
    """A share 1 - mean(own) / mean(before) with the interval of a ratio of means over pictures."""
    ratio = 1 - gone
    spread = t_interval(own - ratio * before)
    half = (spread.high - spread.mean) / float(before.mean())
    return f"{100 * gone:.1f} ± {100 * half:.1f} %"


def _minus(own: Tensor, lora: Sequence[RepairMeasures]) -> str:
    """The mean difference of the pictures' distances to LoRA's, with its interval."""
    other = torch.stack([one.pictures for one in lora]).mean(0)
    mean, low, high = t_interval(own - other)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _mean(values: Tensor) -> str:
    return f"{float(values.mean()):.3f}"


def _damage(left: Tensor, damage: float) -> str:
    """What is left of the damage to the Frechet distance, as a share, with its interval."""
    shares = left / damage
    if len(shares) < 2:
        return f"{100 * float(shares.mean()):.0f} %"
    mean, low, high = t_interval(shares)
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"
