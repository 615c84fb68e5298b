"""Describes a patch file by its header alone, as a record and as text."""

from __future__ import annotations

import math
import os
from typing import Any

from dmp_common.errors import printable, printable_path
from dmp_common.patch.file import file_hash, read_header
from dmp_common.patch.header import ITEM_BYTES
from dmp_common.patch.serialize import USE, use_of
from dmp_common.patch.variant import Variant
from dmp_common.tools.use import described_use

_COLUMN = 13  # where values begin
_LONGEST = 100  # characters of a metadata value in the text; the record has the whole value


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes a patch file in a record that can be written as JSON, without reading its tensors.

    Raises:
        PatchError: the file is not a patch, or its tensors are not those that its header promises.
    """
    file = read_header(path)
    variant = file.variant
    default = _usual(variant)
    made_of = variant.described()
    del made_of["base"], made_of["sites"]
    base, depths = variant.base_spec, variant.depths
    parameters: dict[str, int] = {"prompts": 0, "gate": 0}
    stored = dict(parameters)
    for name, shape in variant.shapes().items():
        kind = name.split(".")[0]
        parameters[kind] += math.prod(shape)
        stored[kind] += math.prod(shape) * ITEM_BYTES[file.dtypes[name]]
    return {
        "file": str(file.path),
        "hash": file_hash(file.path),
        "format_version": file.metadata["dmp.format_version"],
        "bytes": file.size,
        "dtypes": sorted(set(file.dtypes.values())),
        "base": base.name,
        "variant": made_of,
        "not_default": [name for name, value in made_of.items() if value != default[name]]
        + ["sites"] * (list(variant.sites) != list(default["sites"])),
        "defaults": {name: default[name] for name in made_of},
        "sites": [
            {"name": s.name, "depth": depths[s.name], "width": s.width, "stride": s.stride}
            for s in variant.site_specs()
        ],
        "site_set": _site_set(variant),
        "sites_of_base": len(depths),
        "parameters": {"total": sum(parameters.values()), **parameters},
        "stored_bytes": stored,
        "use": use_of(file.metadata),
        "described_use": described_use(file.metadata, variant),
        "metadata": {
            name: text
            for name, text in sorted(file.metadata.items())
            if name not in ("format", "dmp.config", "dmp.format_version", USE)
        },
    }


def as_text(record: dict[str, Any], list_sites: bool = False) -> str:
    """Writes a record as text for people; `*` marks what differs from the base's defaults.

    Args:
        record: a record of `inspect_file`.
        list_sites: whether to list every site.
    """
    lines = [
        printable_path(record["file"]),
        _line("base", record["base"]),
        _line("hash", record["hash"]),
        _line(
            "format",
            f"version {record['format_version']}, {' and '.join(record['dtypes'])}, "
            f"{record['bytes'] / 1e6:,.2f} MB",
        ),
        *(_line(name, text) for name, text in record["described_use"]),
        *_parameter_lines(record),
        *_site_lines(record, list_sites),
        "",
        "  variant (* differs from the default of this base)",
    ]
    for name, value in record["variant"].items():
        between = " to " if name == "timesteps" else " x "
        text = _plain(value, between)
        changed = name in record["not_default"]
        if changed:
            text += f"   (default: {_plain(record['defaults'][name], between)})"
        lines.append(f"  {'*' if changed else ' '} {name:<17}{text}")
    metadata = record["metadata"]
    for heading, prefix in (("training", "ss_"), ("model spec", "modelspec."), ("other", "")):
        own = [name for name in metadata if name.startswith(prefix)]
        if own:
            lines += ["", f"  {heading} (as its maker wrote it)"]
            width = max(len(printable(name, _LONGEST)) for name in own) + 2
            lines += [
                f"    {printable(name, _LONGEST):<{width}}{printable(metadata[name], _LONGEST)}"
                for name in own
            ]
        metadata = {name: text for name, text in metadata.items() if name not in own}
    return "\n".join([*lines, ""])


def _parameter_lines(record: dict[str, Any]) -> list[str]:
    parameters, stored, size = record["parameters"], record["stored_bytes"], record["bytes"]
    return [_line("parameters", f"{parameters['total']:,}")] + [
        _line("", f"{kind} {parameters[kind]:,} ({stored[kind] / size:.1%} of the file)")
        for kind in ("prompts", "gate")
        if parameters[kind]
    ]


def _site_lines(record: dict[str, Any], list_sites: bool) -> list[str]:
    sites = record["sites"]
    names = [site["name"] for site in sites]
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} ... {names[-1]}"
    chosen = f"{len(sites)} of {record['sites_of_base']}"
    if record["site_set"]:
        chosen += f" ({record['site_set']})"
    lines = [_line("sites", f"{chosen}: {shown}", changed="sites" in record["not_default"])]
    if list_sites:
        width = max(4, *(len(name) for name in names)) + 2
        lines.append(_line("", f"{'name':<{width}}depth  width  stride"))
        lines += [
            _line("", f"{s['name']:<{width}}{s['depth']:>5}{s['width']:>7}{s['stride']:>8}")
            for s in sites
        ]
    return lines


def _site_set(variant: Variant) -> str | None:
    """Returns the name of the set that consists of the patch's sites, or None."""
    base = variant.base_spec
    sets = base.output_sets if variant.mix == "modulate" else base.site_sets
    for name, sites in (*sets.items(), ("all", tuple(variant.depths))):
        if sites == variant.sites:
            return name
    return None


def _usual(variant: Variant) -> dict[str, Any]:
    """Returns the entries of a new patch; a patch that modulates is compared with such a one."""
    options = {"mix": variant.mix} if variant.mix == "modulate" else {}
    return Variant.create(variant.base, **options).described()


def _line(name: str, text: str, changed: bool = False) -> str:
    return f"{'*' if changed else ' '} {name:<{_COLUMN}}{text}".rstrip()


def _plain(value: object, between: str) -> str:
    if isinstance(value, list):
        return between.join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
