r"""Tables and the figure of the study of cheap calls, from its measures.

    python -m training.experiments.cheap.cheap_tables OUT --write docs/results/cheap-calls.json
    python -m training.experiments.cheap.cheap_tables docs/results/cheap-calls.json \
        --update docs/RESULTS.md --figure docs/images/results-cheap-calls.png

The first collects the measures of folders of `cheap_study`; the second puts the tables into a text,
between comments that name them, and draws the figure. Without options the tables are printed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from training.experiments.cheap import comparisons as plan
from training.experiments.cheap.calls import CheapCall
from training.experiments.cheap.cheap_figure import draw_figure
from training.experiments.cheap.comparisons import ON_SIBLING, SIBLING, Comparison, Model
from training.experiments.cheap.findings import Findings
from training.experiments.cheap.measures import (
    USUAL,
    Measures,
    Results,
    collected,
    read_measures,
    write_results,
)
from training.objective.intervals import Interval, t_interval
from training.objective.multiple import holm, t_test

_BLOCK = "<!-- table: {} -->\n"
_END = "<!-- end of table -->"
_MISSING = "not measured"
_LEVELLED = (
    "bias correction", "channel fit", "gptq", "repair", "ungated", "modulation", "lora",
    "gated-small", "ungated-small",
)  # fmt: skip


def goals_table(found: Findings) -> str:
    """What a repair leaves of the damage at 4 and at 3 bits, beside the goals."""
    lines = [
        "| base | bits | pixels: left | features | Frechet distance | in random features | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for subject in plan.SUBJECTS:
        for call, goal in plan.GOALS.items():
            model = Model(call, "repair")
            if len(found.of(subject, model)) < 2:
                lines.append(f"| {subject} | {call} | {_MISSING} | | | | |")
                continue
            cells = [
                _left(found, subject, model, measure)
                for measure in ("pixels", "features", "frechet", "frechet_random")
            ]
            lines.append(
                f"| {subject} | {CheapCall(call).bits} | {' | '.join(cells)} | {goal:.0%} |"
            )
    return "\n".join(lines)


def _left(found: Findings, subject: str, model: Model, measure: str) -> str:
    """What is left of the damage with its interval, where there is damage."""
    if t_interval(found.damage(subject, model, measure)).low <= 0:
        return "no damage to be seen"
    return _share(t_interval(found.left(subject, model, measure)))


def primary_table(found: Findings) -> str:
    """The primary comparisons: what each of the two leaves of the damage, and the difference.

    The p-value of a comparison is the larger of the two bases', and 1 where they go opposite ways,
    corrected by Holm's method for the number of comparisons.
    """
    adjusted = holm(
        {
            one.name: _p_of_both(found, one)
            for one in plan.COMPARISONS
            if all(_measured(found, subject, one) for subject in plan.SUBJECTS)
        }
    )
    lines = [
        "| compared with | base | ours: left | the other: left | ours minus the other | p | "
        "p, corrected |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in plan.COMPARISONS:
        for number, subject in enumerate(plan.SUBJECTS):
            if not _measured(found, subject, one):
                lines.append(f"| {one.name} | {subject} | {_MISSING} | | | | |")
                continue
            ours, other = _pair(found, subject, one, found.left)
            difference = _share(t_interval(ours - other), signed=True)
            corrected = _p(adjusted[one.name]) if one.name in adjusted and number else ""
            lines.append(
                f"| {'' if number else one.name} | {subject} | {ours.mean():.1%} | "
                f"{other.mean():.1%} | {difference} | {_p(_p_value(found, subject, one))} | "
                f"{corrected} |"
            )
    return "\n".join(lines)


def _pair(
    found: Findings, subject: str, one: Comparison, values: Callable[[str, Model, str], Tensor]
) -> tuple[Tensor, Tensor]:
    """What two models have, in pixels, at the seeds that both were measured at."""
    seeds = [list(found.of(subject, model)) for model in (one.ours, one.other)]
    both = [seed for seed in seeds[0] if seed in seeds[1]]
    ours, other = (
        values(subject, model, "pixels")[[own.index(seed) for seed in both]]
        for model, own in zip((one.ours, one.other), seeds, strict=True)
    )
    return ours, other


def _measured(found: Findings, subject: str, one: Comparison) -> bool:
    return min(len(found.of(subject, model)) for model in (one.ours, one.other)) > 1


def _p_of_both(found: Findings, one: Comparison) -> float:
    means = []
    for subject in plan.SUBJECTS:
        ours, other = _pair(found, subject, one, found.values)
        means.append(float((ours - other).mean()))
    if min(means) < 0 < max(means):
        return 1.0
    return max(_p_value(found, subject, one) for subject in plan.SUBJECTS)


def _p_value(found: Findings, subject: str, one: Comparison) -> float:
    ours, other = _pair(found, subject, one, found.values)
    return t_test(ours - other)


def explored_table(found: Findings, subject: str, models: Sequence[Model]) -> str:
    """One row for each model with all its measures; means over the seeds that there are."""
    lines = [
        "| call | what | use | pixels: left | features | gap | Frechet | random | precision | "
        "recall | class | calls | KB added |",
        "|---" * 13 + "|",
    ]
    lines += [_row(found, subject, model) for model in models if found.of(subject, model)]
    return "\n".join(lines)


def steps_table(found: Findings, subject: str) -> str:
    """What a repair leaves after other numbers of steps."""
    model, rows = Model(plan.BITS_3, "repair"), []
    lengths = {job.steps for job in found.results if job.method == "repair" and job.steps}
    for steps in sorted(lengths):
        measured = found.of(subject, model, steps)
        plain = found.of(subject, Model(model.call, "none"))
        if plan.SEEDS[0] in measured:
            one, bare = measured[plan.SEEDS[0]], plain[plan.SEEDS[0]]
            rows.append(f"| {steps} | {one.pixels / bare.pixels:.1%} | {one.gap / bare.gap:.1%} |")
    return "\n".join(["| steps | pixels: left | gap: left |", "|---|---|---|", *rows])


def levels_table(found: Findings, subject: str) -> str:
    """Which share of the gap each method leaves in each tenth of the timesteps, at 3 bits."""
    plain = list(found.of(subject, Model(plan.BITS_3, "none")).values())
    if not plain:
        return _MISSING
    lines = ["| timesteps |" + "".join(f" {100 * n}- |" for n in range(10)), "|---" * 11 + "|"]
    before = _by_level(plain)
    lines.append("| gap as it is | " + " | ".join(f"{gap:.2g}" for gap in before) + " |")
    for name in _LEVELLED:
        measured = list(found.of(subject, Model(plan.BITS_3, name)).values())
        if measured:
            pairs = zip(_by_level(measured), before, strict=True)
            lines.append(f"| {name} | " + " | ".join(f"{a / b:.0%}" for a, b in pairs) + " |")
    return "\n".join(lines)


def _by_level(measured: Sequence[Measures]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*(m.gaps for m in measured), strict=True)]


def _row(found: Findings, subject: str, model: Model) -> str:
    measured = found.of(subject, model)
    plain = found.of(subject, Model(model.call, "none"))
    broken = [plain[seed] for seed in measured if seed in plain]

    def share(measure: str) -> str:
        mine = sum(getattr(one, measure) for one in measured.values())
        bare = sum(getattr(one, measure) for one in broken)
        return f"{mine / bare:.1%}" if bare > 0 and len(broken) == len(measured) else ""

    def mean(measure: str, digits: int = 3) -> str:
        values = [getattr(one, measure) for one in measured.values()]
        return f"{sum(values) / len(values):.{digits}f}"

    first = next(iter(measured.values()))
    cells = [
        model.call, model.method, _use(model), share("pixels"), share("features"), share("gap"),
        mean("frechet"), mean("frechet_random"), mean("precision"), mean("recall"),
        mean("accuracy"), str(first.evaluations), f"{first.added_bytes / 1000:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _use(model: Model) -> str:
    use, found = model.use, []
    if use.strength != 1:
        found.append(f"strength {use.strength:g}")
    if use.epsilon_scale != 1:
        found.append(f"epsilon / {use.epsilon_scale:g}")
    if use.sampler != USUAL.sampler:
        found.append(use.sampler)
    if use.steps != USUAL.steps:
        found.append(f"{use.steps} steps")
    if use.guidance != 1:
        found.append(f"guided {use.guidance:g}")
    return ", ".join(found)


def _share(one: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * one.mean:{sign}.1f} [{100 * one.low:{sign}.1f}, {100 * one.high:{sign}.1f}] %"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def tables(results: Results) -> dict[str, str]:
    """All tables by name."""
    found = Findings(results)
    made = {"goals": goals_table(found), "primary": primary_table(found)}
    for subject in plan.SUBJECTS:
        for name, models in plan.EXPLORED.items():
            made[f"{name}, {subject}"] = explored_table(found, subject, models)
        made[f"steps, {subject}"] = steps_table(found, subject)
        made[f"noise levels, {subject}"] = levels_table(found, subject)
        scaled = [
            Model(job.call, job.method, job.use)
            for job in sorted(results)
            if job.subject == subject and job.use.epsilon_scale != 1 and job.split == "test"
        ]
        made[f"epsilon scaling, {subject}"] = explored_table(
            found, subject, [*plan.SCALED, *scaled]
        )
        made[f"sibling, {subject}"] = explored_table(
            found, subject + SIBLING, [Model(plan.BITS_3, name) for name in ON_SIBLING]
        )
    return made


def updated(text: str, made: dict[str, str]) -> str:
    """A text with its tables made anew.

    Raises:
        ValueError: it has a table of another name.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise ValueError(f"expected one of the tables {'; '.join(made)}, found {name!r}")
        return f"{_BLOCK.format(name)}\n{made[name]}\n\n{_END}"

    pattern = re.escape(_BLOCK).replace(r"\{\}", "([^>]*?)") + ".*?" + re.escape(_END)
    return re.sub(pattern, table, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measures", type=Path, nargs="+", help="JSON files, or folders of a study")
    parser.add_argument("--write", type=Path, help="collect the measures in this file")
    parser.add_argument("--update", type=Path, help="put the tables into this text")
    parser.add_argument("--figure", type=Path, help="draw the figure")
    options = parser.parse_args(arguments)
    results: Results = {}
    try:
        for path in options.measures:
            results |= collected([path]) if path.is_dir() else read_measures(path)
        made = tables(results)
        if options.update is not None:
            text = updated(options.update.read_text(encoding="utf-8"), made)
            options.update.write_text(text, encoding="utf-8")
        if options.write is not None:
            write_results(results, options.write)
        if options.figure is not None:
            draw_figure(results, options.figure)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not (options.write or options.update or options.figure):
        for name, table in made.items():
            print(f"## {name}\n\n{table}\n")


if __name__ == "__main__":
    main()
