"""Options that are not ours: taken as what they mean, without effect, or refused with a remedy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from training.options.config import TrainConfig
from training.options.hints import hint
from training.options.kohya import (
    DIFFERENT,
    EFFECTLESS,
    MEANT,
    NEUTRAL,
    OF_LORA,
    OURS_OF_LORA,
    REFUSED,
    SAME,
    VALUES,
    is_off,
)


def translated(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The options of one command line or file, with kohya's other names as ours.

    Args:
        given: by name.
        problems: gets a sentence where two names of one thing have different values.
    """
    result = {name: value for name, value in given.items() if name not in (*SAME, *MEANT)}
    meant = {old: {new: given[old]} for old, new in SAME.items() if not is_off(given.get(old))}
    meant |= {old: new for old, new in MEANT.items() if not is_off(given.get(old))}
    for old, options in meant.items():
        for name, value in options.items():
            other = result.get(name)
            if is_off(other) or other == "auto":
                result[name] = value
            elif not _equal(other, value):
                problems.append(
                    f"--{old} means --{name} {value}, found --{name} {other} too: leave one of "
                    "them out."
                )
    visibility = result.pop("huggingface_repo_visibility", None)
    if not is_off(visibility):
        result.setdefault("huggingface_private", visibility == "private")
    for name, values in VALUES.items():
        if isinstance(result.get(name), str):
            result[name] = values.get(result[name], result[name])
    return result


def take(chosen: Mapping[str, Any], problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """The options that the configuration has; what becomes of the others is said.

    Args:
        chosen: by name, of all sources together.
        problems: gets a sentence for each option that is unknown or not supported.
        warnings: gets a sentence about those without effect.
    """
    kept: dict[str, Any] = {}
    idle: dict[str, list[str]] = defaultdict(list)  # reason: options
    lora = chosen.get("method") == "lora"
    for name, value in chosen.items():
        if name in OURS_OF_LORA and not lora:
            if not is_off(value):
                idle["for --method lora only"].append(name)
        elif name in TrainConfig.model_fields:
            kept[name] = value
        elif is_off(value) or _is_neutral(name, value):
            if not is_kohyas(name):
                idle["unknown, and switched off"].append(name)
        elif why := DIFFERENT.get(name, {}).get(str(value)):
            problems.append(f"--{name}: {why}, found {value!r}.")
        elif name in EFFECTLESS or (name in OF_LORA and not lora):
            idle[EFFECTLESS.get(name) or OF_LORA[name]].append(name)
        elif name in OF_LORA:
            problems.append(
                f"--{name} is not supported: the LoRA has --network_dim and --network_alpha only; "
                "leave it out."
            )
        else:
            problems.append(explain(name, TrainConfig.model_fields))
    if idle:
        warnings.append(_without_effect(idle))
    return kept


def is_kohyas(name: str) -> bool:
    """Whether kohya's scripts have an option of this name that we do not have."""
    return any(name in names for names in (SAME, MEANT, EFFECTLESS, OF_LORA, REFUSED))


def explain(name: str, known: Collection[str]) -> str:
    """What to say of an option that is not known: what to do instead, or which one is meant."""
    if name in REFUSED:
        return f"--{name} is not supported: {REFUSED[name]}."
    meant = hint(name, known)
    return f"unknown option --{name}: " + (
        f"did you mean --{meant}?" if meant else "see --help all for the known ones."
    )


def _without_effect(idle: Mapping[str, list[str]]) -> str:
    """All options without effect, by reason, in one sentence."""
    groups = [f"{', '.join(f'--{n}' for n in names)} ({why})" for why, names in idle.items()]
    return f"taken without effect: {'; '.join(groups)}."


def _is_neutral(name: str, value: Any) -> bool:
    return any(_equal(value, neutral) for neutral in NEUTRAL.get(name, ()))


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same number or text, however they are written."""
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one).lower() == str(other).lower()
