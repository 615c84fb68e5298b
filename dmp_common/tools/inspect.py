"""What a patch file is made of, as a record and as text, from its header alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dmp_common.errors import PatchError
from dmp_common.patch.file import PatchFile, file_hash, read_header
from dmp_common.patch.patch import Patch
from dmp_common.patch.variant import Variant

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_COLUMN = 13  # where values begin
_LONGEST = 100  # characters of a metadata value in the text; the record has all


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a patch file is made of, ready for JSON. Values of tensors are not looked at.

    Raises:
        PatchError: not a patch, or one whose tensors are not those its header promises.
    """
    file = read_header(path)
    variant = file.variant
    default = Variant.create(variant.base).described()
    made_of = variant.described()
    del made_of["base"], made_of["sites"]
    base, depths = variant.base_spec, variant.base_spec.depths
    with torch.device("meta"):
        patch = Patch(variant)
    dtypes = _check_tensors(file, patch)
    parameters: dict[str, int] = {"prompts": 0, "gate": 0}
    stored = dict(parameters)
    for name, parameter in patch.saved().items():
        kind = name.split(".")[0]
        parameters[kind] += parameter.numel()
        stored[kind] += parameter.numel() * _BYTES[dtypes[name]]
    return {
        "file": str(file.path),
        "hash": file_hash(file.path),
        "format_version": file.metadata["dmp.format_version"],
        "bytes": file.size,
        "dtypes": sorted(set(dtypes.values())),
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
        "sites_of_base": len(base.sites),
        "parameters": {"total": patch.saved_parameters, **parameters},
        "stored_bytes": stored,
        "metadata": {
            name: text
            for name, text in sorted(file.metadata.items())
            if name not in ("format", "dmp.config", "dmp.format_version")
        },
    }


def as_text(record: dict[str, Any], list_sites: bool = False) -> str:
    """A record of `inspect_file` for people; `*` marks what differs from the base's defaults."""
    lines = [
        _clean(record["file"], longest=None),
        _line("base", record["base"]),
        _line("hash", record["hash"]),
        _line(
            "format",
            f"version {record['format_version']}, {' and '.join(record['dtypes'])}, "
            f"{record['bytes'] / 1e6:,.2f} MB",
        ),
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
            width = max(len(name) for name in own) + 2
            lines += [f"    {_clean(name):<{width}}{_clean(metadata[name])}" for name in own]
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


def _check_tensors(file: PatchFile, patch: Patch) -> dict[str, str]:
    """The type of each tensor; their names and shapes must be what the header promises."""
    expected = {name: list(parameter.shape) for name, parameter in patch.saved().items()}
    try:
        with safe_open(file.path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            found = {name: list(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _bad(file, "a whole safetensors file", str(error)) from error
    for name in sorted({*expected, *found}):
        if found.get(name) != expected.get(name):
            wanted, has = (f"{name} {d.get(name, 'missing')}" for d in (expected, found))
            raise _bad(file, wanted, has)
    for name, dtype in dtypes.items():
        if dtype not in _BYTES:
            raise _bad(file, f"{name} as {', '.join(_BYTES)}", dtype)
    return dtypes


def _bad(file: PatchFile, expected: str, found: str) -> PatchError:
    return PatchError(
        f"{file.path}: expected {expected}, found {found}: get the file again, or export it again."
    )


def _site_set(variant: Variant) -> str | None:
    """The name of the set that a patch's sites are, if they are one."""
    base = variant.base_spec
    for name, sites in (*base.site_sets.items(), ("all", tuple(base.depths))):
        if sites == variant.sites:
            return name
    return None


def _line(name: str, text: str, changed: bool = False) -> str:
    return f"{'*' if changed else ' '} {name:<{_COLUMN}}{text}".rstrip()


def _plain(value: object, between: str) -> str:
    if isinstance(value, list):
        return between.join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _clean(text: str, longest: int | None = _LONGEST) -> str:
    """Text on one line without what could control a terminal, shortened if long."""
    if longest is not None and len(text) > longest:
        text = text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
