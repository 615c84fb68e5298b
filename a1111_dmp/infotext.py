"""Writes the choices of patches into infotexts, and reads them again.

An infotext has "DMP patch", "DMP hash" and "DMP strength", and each other setting that differs from
its default. The keys of the second and third slot end in a number, as in "DMP patch 2".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from a1111_dmp.choice import FIELDS, Choice, setting
from a1111_dmp.files import Folder, Known


def label(prefix: str, field: str, slot: int) -> str:
    """Returns the key of a field in an infotext.

    >>> label("DMP", "site_strengths", 0), label("DMP script", "start", 2)
    ('DMP site strengths', 'DMP script start 3')
    """
    return f"{prefix} {field.replace('_', ' ')}" + (f" {slot + 1}" if slot else "")


def to_infotext(prefix: str, slot: int, choice: Choice, known: Known) -> dict[str, Any]:
    """Returns the entries of an infotext for a slot."""
    plain = Choice()
    texts: dict[str, Any] = {"patch": known.name, "hash": known.hash, "strength": choice.strength}
    for name in FIELDS[1:]:
        if getattr(choice, name) != getattr(plain, name):
            texts[name] = getattr(choice, name)
    return {label(prefix, name, slot): text for name, text in texts.items()}


def from_infotext(
    texts: Mapping[str, Any], prefix: str, slot: int, field: str, folder: Folder
) -> Any:
    """Reads the value of a field from an infotext; its default where the infotext has none."""
    text = texts.get(label(prefix, field, slot))
    if text is None:
        return getattr(Choice(), field)
    if field != "patch":
        return setting(field, text)
    return folder.by_hash(str(text), texts.get(label(prefix, "hash", slot)))


_HASH = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^"]*?)\s*:\s*([0-9a-f]+)\s*(?:,|$)')


def hashes_text(hashes: Mapping[str, str]) -> str:
    """Writes the hashes of the patches of a prompt, by name, for an infotext.

    >>> hashes_text({"ink": "0123456789", "oil, thick": "abcdef0123"})
    'ink: 0123456789, "oil, thick": abcdef0123'
    """
    plain = re.compile(r'[^",:]+')
    quoted = {
        name if plain.fullmatch(name) else json.dumps(name, ensure_ascii=False): digest
        for name, digest in hashes.items()
    }
    return ", ".join(f"{name}: {digest}" for name, digest in quoted.items())


def read_hashes(text: str) -> dict[str, str]:
    """Reads what `hashes_text` wrote; other text has no hashes.

    >>> read_hashes('ink: 0123456789, "oil, thick": abcdef0123')
    {'ink': '0123456789', 'oil, thick': 'abcdef0123'}
    """
    found = {}
    for name, digest in _HASH.findall(text):
        found[json.loads(name) if name.startswith('"') else name] = digest
    return found
