"""Cheap calls: weights in few bits, one call in the place of guidance's two, or both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from training.base.rounding import GROUP

EXACT = "exact"  # the base as it is, for controls
_GUIDANCE, _SKIPPED = "guidance-", re.compile(r"skip(\d)")
_ROUNDED = re.compile(rf"rtn([2-8])(-group{GROUP})?|gptq([2-8])-group{GROUP}")
_SCALES = 2 * 16  # bits of a group's scale and minimum


@dataclass(frozen=True)
class CheapCall:
    """A cheap call, and the exact one that it stands for.

    Args:
        name: as on the command line: rtn3-group32, gptq3-group32, skip2 (without the third
            block), guidance-2, one of these with guidance and a plus between, or exact.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name == EXACT:
            return
        known = _ROUNDED, _SKIPPED
        wrong = [
            part
            for part in self._parts
            if not (_scale(part) or any(pattern.fullmatch(part) for pattern in known))
        ]
        if wrong:
            raise ValueError(
                f"expected a cheap call such as rtn3-group{GROUP}, rtn4, guidance-2 or "
                f"rtn3-group{GROUP}+guidance-2, found {self.name!r}"
            )

    @property
    def _parts(self) -> list[str]:
        return self.name.split("+")

    @property
    def quantization(self) -> str | None:
        """How weights are rounded; None where they are the base's own."""
        return next((part for part in self._parts if _ROUNDED.fullmatch(part)), None)

    @property
    def bits(self) -> int | None:
        """Bits of a weight, without scales; None where weights are the base's own."""
        found = _ROUNDED.fullmatch(self.quantization or "")
        return None if found is None else int(found[1] or found[3])

    @property
    def stored_as(self) -> str | None:
        """The value of --student_quantization with as many bits and scales."""
        return self.quantization and self.quantization.replace("gptq", "rtn")

    @property
    def by_gptq(self) -> bool:
        """Whether GPTQ chooses the levels, and not the nearest is taken."""
        return (self.quantization or "").startswith("gptq")

    @property
    def skipped(self) -> int | None:
        """The number of the block that is left out."""
        found = (_SKIPPED.fullmatch(part) for part in self._parts)
        return next((int(one[1]) for one in found if one is not None), None)

    @property
    def guidance(self) -> float:
        """The scale of the exact call's guidance; 1 for none."""
        return next((scale for part in self._parts if (scale := _scale(part))), 1.0)

    @property
    def options(self) -> dict[str, Any]:
        """The trainer's options that make the cheap call and its exact one, but for a file of
        weights, where one must be made."""
        found: dict[str, Any] = {}
        if self.quantization is not None and not self.by_gptq:
            found["student_quantization"] = self.quantization
        if self.guidance != 1:
            found["teacher_guidance_scale"] = f"{self.guidance:g}"
        return found


def bytes_in_groups(out_features: int, in_features: int, bits: int) -> int:
    """Bytes of a weight in groups: its values, and a scale and a minimum of each group."""
    groups = out_features * -(-in_features // GROUP)
    return -(-(out_features * in_features * bits + groups * _SCALES) // 8)


def _scale(part: str) -> float | None:
    if not part.startswith(_GUIDANCE):
        return None
    try:
        return float(part.removeprefix(_GUIDANCE))
    except ValueError:
        return None
