"""What a patch is for: the entry dmp.use of its file, in words, and the model that it repairs.

The entry only informs. What changes how a patch runs is in its configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dmp_common.errors import printable
from dmp_common.patch.serialize import use_of
from dmp_common.patch.variant import Variant

_FLOATS = ("F32", "F16", "BF16")  # a model in any of these is the full model
_ALIKE = 0.02  # of the values of a model; files of one type differ in which layers they leave out


def cheap_types(metadata: Mapping[str, str]) -> dict[str, float]:
    """Returns the share of the values in each type of the cheap model that a patch repairs.

    It is empty for patches that do not repair a model in fewer bits.
    """
    cheap = use_of(metadata).get("cheap")
    types = cheap.get("types") if isinstance(cheap, dict) else None
    return _shares(types) if isinstance(types, dict) else {}


def unlike_cheap(metadata: Mapping[str, str], found: Mapping[str, int]) -> str | None:
    """Says in a sentence that a model is not the one that a patch repairs; None where it is.

    Args:
        metadata: of the patch.
        found: for each type of numbers how many values of the model have it, see
            `dmp_common.tools.weighttypes.weight_types`.
    """
    wanted, there = cheap_types(metadata), _shares(found)
    few = [kind for kind in {**wanted, **there} if kind not in _FLOATS]
    if not wanted or all(abs(wanted.get(k, 0.0) - there.get(k, 0.0)) <= _ALIKE for k in few):
        return None
    return (
        f"the patch repairs a model with weights in {_described(wanted)}, and this one has them in "
        f"{_described(there)}: use the model that it was made for, or set its strength to 0, "
        "because it corrects errors that this model does not make"
    )


def described_use(metadata: Mapping[str, str], variant: Variant) -> list[tuple[str, str]]:
    """Describes what a patch is for in names and values, for people.

    Args:
        metadata: of the patch.
        variant: its configuration.
    """
    use, lines = use_of(metadata), []
    if isinstance(use.get("objective"), str):
        lines.append(("objective", printable(use["objective"])))
    types = cheap_types(metadata)
    if types:
        cheap = use["cheap"]
        file = cheap.get("file")
        name = file.get("name") if isinstance(file, dict) else None
        of = f" ({printable(name)})" if isinstance(name, str) else ""
        lines.append(("repairs", f"a model with weights in {_described(types)}{of}"))
    if use.get("zero_terminal_snr") is True:
        lines.append(("noise", "zero terminal SNR"))
    if variant.expert is not None:
        lines.append(("expert", f"the model for {variant.expert} noise of the pair"))
    if variant.guidance is not None:
        lines.append(("guidance", f"strength 1 stands for scale {variant.guidance:g}; use CFG 1"))
    share = use.get("share_repaired")
    share = share.get("mean") if isinstance(share, dict) else None
    if isinstance(share, float) and math.isfinite(share):
        lines.append(("repaired", f"{share:.0%} of the held-out gap"))
    return lines


def _shares(types: Mapping[str, Any]) -> dict[str, float]:
    counts = {
        printable(name): count
        for name, count in types.items()
        if type(count) is int and count > 0 and isinstance(name, str)
    }
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def _described(shares: Mapping[str, float]) -> str:
    """Names the types of a model, the most frequent first; rare ones are left out."""
    ordered = sorted(shares, key=lambda kind: -shares[kind])
    named = [f"{kind} ({shares[kind]:.0%})" for kind in ordered if shares[kind] > _ALIKE]
    return ", ".join(named[:4]) or "unknown types"
