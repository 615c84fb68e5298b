"""Reads what users write about the use of a patch: sites, strengths at sites, keyframes."""

from __future__ import annotations

import math
import re

from dmp_common.errors import PatchError
from dmp_common.patch.patch import Patch
from dmp_common.patch.variant import Variant

_ENTRIES = re.compile(r"[,;\n]")
_BLOCK = re.compile(r"^[^.]+(?:\.\d+)?")  # of the name of a site: its block, such as in.1 or mid
_RANGE_OR_STAR = re.compile(r"((?<![^.])\d+-\d+(?![^.])|\*+)")


def sites_named(patch: Patch, word: str) -> list[str]:
    """Returns the sites of a patch that a word names, in order of depth; none for a wrong word.

    Args:
        patch: the patch.
        word: in capital or small letters: the name of a site, or its first parts, which name all
            sites below; with `*` for any text and `1-3` for any of these numbers. Or "first",
            "middle", "last", "all", or one of the base's named sets.

    >>> from dmp_common import Patch
    >>> patch = Patch.create("sd15", sites="all")
    >>> sites_named(patch, "in.1-3"), sites_named(patch, "MID"), sites_named(patch, "out.1*")
    (['in.1', 'in.2', 'in.3'], ['mid'], ['out.1', 'out.10', 'out.11'])
    """
    own, word = list(patch.sites), word.strip().lower()
    sets = patch.base.output_sets if patch.modulates else patch.base.site_sets
    words = {
        "first": own[:1],
        "middle": [own[len(own) // 2]],
        "last": own[-1:],
        "all": own,
        **{name.lower(): [site for site in own if site in set(s)] for name, s in sets.items()},
    }
    exact = [name for name in own if name.lower() == word]
    return exact or words.get(word) or [name for name in own if _matches(word, name.lower())]


def places(variant: Variant) -> list[str]:
    """Returns the words that name places of a patch, each for one site or more.

    They are "all", the base's named sets, the kinds of blocks, and each block. `sites_named` reads
    them.

    >>> from dmp_common import Patch
    >>> places(Patch.create("sd15", sites=["in.1", "in.2", "mid"]).variant)
    ['all', 'blocks', 'in.*', 'in.1', 'in.2', 'mid']
    """
    own, base = [site.name for site in variant.site_specs()], variant.base_spec
    sets = base.output_sets if variant.mix == "modulate" else base.site_sets
    named = [name for name, members in sets.items() if 0 < len({*members} & {*own}) < len(own)]
    blocks = dict.fromkeys(_BLOCK.findall(name)[0] for name in own)
    kinds = dict.fromkeys(f"{block.partition('.')[0]}.*" for block in blocks if "." in block)
    return ["all", *named, *kinds, *blocks]


def site_strengths(patch: Patch, text: str) -> tuple[tuple[str, float], ...]:
    """Reads factors of the strength at single sites, as `Settings.site_strengths` has them.

    Args:
        patch: the patch.
        text: entries such as "in.1-3: 0.5, mid: 1, out.*: 0", see `sites_named`. Of two entries for
            a site the later one counts. Sites that are not named keep factor 1.

    Raises:
        PatchError: an entry is not of this form, or it names no site of the patch.

    >>> from dmp_common import Patch
    >>> site_strengths(Patch.create("sd15", sites="all"), "out.*: 0, out.2-11: 1, mid: 0.5")
    (('mid', 0.5), ('out.0', 0.0), ('out.1', 0.0))
    """
    factors: dict[str, float] = {}
    problems: list[str] = []
    for entry in _entries(text):
        word, _, value = entry.rpartition(":")
        named, factor = sites_named(patch, word), _number(value)
        if not word or factor is None:
            problems.append(f"expected a site and its factor such as mid: 0.5, found {entry!r}")
        elif not named:
            problems.append(f"expected sites of this patch, found {word.strip()!r}")
        else:
            factors.update(dict.fromkeys(named, factor))
    if problems:
        listed = ", ".join(list(patch.sites)[:_LISTED]) + ", ..." * (len(patch.sites) > _LISTED)
        raise PatchError(f"{'; and '.join(problems)}: name sites of this patch ({listed}).")
    return tuple((name, factors[name]) for name in patch.sites if factors.get(name, 1.0) != 1.0)


def keyframes(text: str) -> tuple[tuple[float, float], ...]:
    """Reads points (progress, factor) of a curve, as `Schedule.from_percent` takes them.

    Args:
        text: entries such as "0: 1, 0.5: 0.3, 1: 0": progress, 0 at the noise and 1 at the picture,
            and the factor of the strength there. Two entries at one progress are a step.

    Raises:
        PatchError: an entry is not of this form, or a progress is not from 0 to 1.

    >>> keyframes("0: 1, 0.5: 0.3"), keyframes("")
    (((0.0, 1.0), (0.5, 0.3)), ())
    """
    points, problems = [], []
    for entry in _entries(text):
        percent, factor = (_number(part) for part in entry.partition(":")[::2])
        if percent is None or factor is None or not 0.0 <= percent <= 1.0:
            problems.append(repr(entry))
        else:
            points.append((percent, factor))
    if problems:
        raise PatchError(
            "expected keyframes such as 0: 1, 0.5: 0.3, 1: 0 with a progress from 0 to 1 and a "
            f"factor, found {', '.join(problems)}: correct them."
        )
    return tuple(points)


_LISTED = 40  # names of sites that an error message lists


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in _ENTRIES.split(text) if entry.strip()]


def _number(text: str) -> float | None:
    """Returns a finite number, None for another text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _matches(word: str, name: str) -> bool:
    """Tells whether a word with stars and ranges names a site, or what stands above the site."""
    if not word:
        return False
    limits, pattern = [], ""
    for part in _RANGE_OR_STAR.split(word):
        if "-" in part and _RANGE_OR_STAR.fullmatch(part):
            low, high = part.split("-")
            limits.append((int(low), int(high)))
            pattern += r"(\d+)"
        else:
            pattern += ".*" if part.startswith("*") else re.escape(part)
    found = re.fullmatch(rf"{pattern}(?:\..*)?", name)
    if found is None:
        return False
    numbers = map(int, found.groups())
    return all(low <= number <= high for number, (low, high) in zip(numbers, limits, strict=True))
