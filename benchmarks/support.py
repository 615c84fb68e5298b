"""Writes the table of families and places into docs/MODELS.md.

python -m benchmarks.support          # writes the table between its two marks
python -m benchmarks.support --print  # prints it
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from comfyui_dmp.slots import slot_of
from dmp_common import Base, PatchError, get_base
from dmp_common.bases.detect import namings_of
from dmp_common.bases.otherfamilies import OTHER_FAMILIES
from dmp_common.bases.strangers import STRANGERS
from dmp_common.bases.table import TABLE
from training.base.families.family import Family
from training.base.families.table import family_of
from training.experiments.cheap import cheap_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "MODELS.md"

# What people call a family, by the names of its bases in the table.
TITLES = {
    "the bundled digits, CIFAR-10": ("digits", "cifar10", "cifar10-s"),
    "Stable Diffusion 1.x": ("sd15",),
    "Stable Diffusion 2.x": ("sd21",),
    "SDXL": ("sdxl",),
    "DiT": tuple(row.name for row in TABLE if row.name.startswith("dit-")),
    "PixArt alpha, Sigma": ("pixart",),
    "Stable Diffusion 3": ("sd3",),
    "Stable Diffusion 3.5": ("sd35-medium", "sd35-large"),
    "FLUX.1": ("flux",),
    "FLUX.2 dev": ("flux2",),
    "FLUX.2 klein": ("flux2-klein-4b", "flux2-klein-9b"),
    "Qwen-Image, Qwen-Image-Edit": ("qwen-image",),
    "Z-Image": ("z-image",),
    "Lumina-Image 2.0, Neta Lumina": ("lumina2",),
    "Chroma": ("chroma",),
    "ERNIE-Image, ERNIE-Image-Turbo": ("ernie-image",),
    "Krea 2": ("krea2",),
    "Anima": ("anima",),
    "Qwen-Image 2.1": ("qwen-image-2.1",),
    "Wan 2.1, 2.2: text to video": ("wan-1.3b", "wan-14b", "wan22-5b"),
    "Wan 2.1, 2.2: picture to video": ("wan21-i2v-14b", "wan22-i2v-14b"),
    "AuraFlow, Pony V7": ("auraflow",),
    "HunyuanImage 2.1": ("hunyuan-image",),
    "Sana": ("sana", "sana-0.6b"),
}
# No host loads these: nobody draws with them.
_IN_NO_HOST = TITLES["the bundled digits, CIFAR-10"]
# What ran in a server of A1111 or of the Forge family, with small checkpoints. Patches of other
# bases need no code of ours there, because torch hooks serve every model.
_SERVERS = {
    "sd15": "A1111, Forge, Forge Neo",
    "sd21": "A1111",
    "sdxl": "A1111, Forge",
    "sd3": "A1111",
    "flux": "Forge, Forge Neo",
}
# The bases of the hosts' own model classes in small, on which the tests run patches.
IN_SMALL = {
    "A1111": ("sd3",),
    "reForge": ("sd3", "sd35-medium"),
    "Forge Neo": (
        *("sd15", "sdxl", "flux", "flux2-klein-4b", "chroma", "qwen-image", "lumina2", "z-image"),
        *("ernie-image", "krea2", "anima", "wan-14b", "wan22-i2v-14b"),
    ),
}
_NO, _REFUSED = "no", "refused by name"


def table() -> str:
    """Returns the table in Markdown: supported families first, then those that are refused."""
    columns = ("family", "bases", "core (diffusers)", "ComfyUI", "A1111, Forge", "trainer")
    rows = [*_supported(), *_refused()]
    lines = [(*columns, "evaluation"), ("---",) * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _supported() -> Iterator[tuple[str, ...]]:
    for title, names in TITLES.items():
        base = get_base(names[0])
        trained = _trained(base)
        shown = [f"`{name}`" for name in names]
        bases = ", ".join(shown) if len(shown) < 4 else f"{shown[0]} to {shown[-1]}"
        yield title, bases, _core(base), _comfyui(base), _a1111(base, names), trained, trained


def _refused() -> Iterator[tuple[str, ...]]:
    others = {family.name for family in OTHER_FAMILIES}
    siblings = [family.name for family in STRANGERS if family.name not in others]
    for name in (*(family.name for family in OTHER_FAMILIES), *siblings):
        yield name, "", *[_REFUSED] * 5


def _core(base: Base) -> str:
    return "yes" if "diffusers" in namings_of(base) else _NO


def _comfyui(base: Base) -> str:
    if base.name in _IN_NO_HOST or "ldm" not in namings_of(base):
        return _NO
    try:
        slot_of(base)
    except PatchError:
        return _NO
    return "with ComfyUI_ExtraModels" if base.name.startswith("dit-") else "yes"


def _a1111(base: Base, family: tuple[str, ...]) -> str:
    """Where a family was tried: in a server, or only on a host's own class in small."""
    if base.name in _IN_NO_HOST or "ldm" not in namings_of(base):
        return _NO
    if base.name in _SERVERS:
        return f"server: {_SERVERS[base.name]}"
    hosts = [host for host, names in IN_SMALL.items() if set(names) & set(family)]
    return f"classes in small: {', '.join(hosts)}" if hosts else "not tried"


def _trained(base: Base) -> str:
    """What the trainer and the evaluation, which loads a base as the trainer does, say of it."""
    try:
        family = family_of(base)
    except PatchError:
        return _NO
    return "yes" if family.since == Family.since else f"yes (diffusers {family.since})"


def updated(text: str) -> str:
    """Returns a page with the table of today between the marks.

    Raises:
        ValueError: the page has no such marks.
    """
    made = table()
    new = cheap_tables.updated(text, {"families": made})
    if made not in new:
        raise ValueError(
            "expected the marks <!-- table: families --> and <!-- end of table --> in the page, "
            "found none: add them."
        )
    return new


def main() -> None:
    """Writes or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    if parser.parse_args().print:
        print(table())
    else:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
