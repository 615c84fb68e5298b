"""What a saved picture says of the patches that it was drawn with.

ComfyUI's nodes write each entry of `extra_pnginfo` into the pictures that they save, beside the
workflow. When a workflow is queued, two entries are added there: `dmp` lists names, hashes and
strengths, and `Hashes` has the form in which pictures name the hashes of LoRAs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import folder_paths

from comfyui_dmp.files import FOLDER
from comfyui_dmp.stack import NONE, ROWS
from dmp_common.patch.file import file_hash

_hashes: dict[tuple[str, int, int], str] = {}  # by path, time and size


def register() -> None:
    """Asks ComfyUI's server, where there is one, to show us each workflow that is queued."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and with_patches not in instance.on_prompt_handlers:
        instance.add_on_prompt_handler(with_patches)


def with_patches(queued: dict[str, Any]) -> dict[str, Any]:
    """Adds the patches of a queued workflow to what its pictures will say.

    Args:
        queued: what the browser sends to ComfyUI's /prompt; it is changed.

    Returns:
        The same.
    """
    patches = patches_of(queued.get("prompt") or {})
    if patches:
        about = queued.setdefault("extra_data", {}).setdefault("extra_pnginfo", {})
        about["dmp"] = patches
        names = {f"dmp:{patch['name']}": patch["hash"] for patch in patches}
        about["Hashes"] = {**about.get("Hashes", {}), **names}
    return queued


def patches_of(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns name, hash and strength of each patch that a workflow puts on a model.

    A strength that another node computes is left out, and so is a patch that the workflow trains.

    Args:
        prompt: the workflow in API format.
    """
    used: list[tuple[Any, Any]] = []
    for node in prompt.values():
        kind, inputs = node.get("class_type"), node.get("inputs", {})
        if kind == "DMP_LoadApply":
            used.append((inputs.get("patch_name"), inputs.get("strength")))
        elif kind == "DMP_Stack":
            rows = [row for row in range(1, ROWS + 1) if inputs.get(f"on_{row}")]
            used += [(inputs.get(f"patch_{row}"), inputs.get(f"strength_{row}")) for row in rows]
        elif kind in ("DMP_Apply", "DMP_CreateHook"):
            used.append(_source(prompt, inputs.get("dmp_patch")))
    found = []
    for name, strength in used:
        digest = _hash(name) if isinstance(name, str) and name != NONE else None
        if digest is not None:
            patch: dict[str, Any] = {"name": _plain(name), "hash": digest}
            found.append(
                patch | ({"strength": strength} if isinstance(strength, (int, float)) else {})
            )
    return found


def _source(prompt: dict[str, Any], link: Any) -> tuple[Any, Any]:
    """Returns the file that a link of DMP_PATCH comes from, and the strength on the way."""
    strength: Any = None
    for _ in range(len(prompt)):
        node = prompt.get(str(link[0]), {}) if isinstance(link, list) and link else {}
        kind, inputs = node.get("class_type"), node.get("inputs", {})
        if kind == "DMP_Load":
            return inputs.get("patch_name"), 1.0 if strength is None else strength
        if kind != "DMP_GateStrength":
            break
        if strength is None:  # The last node replaces what the others before it set.
            strength = inputs.get("strength")
        link = inputs.get("dmp_patch")
    return None, None


def _plain(name: str) -> str:
    """Returns the name of a patch as prompts and infotexts have it."""
    return Path(name.replace("\\", "/")).with_suffix("").as_posix()


def _hash(name: str) -> str | None:
    """Returns the hash of a patch file; None where it is not there."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        return None
    state = Path(path).stat()
    key = (str(path), state.st_mtime_ns, state.st_size)
    if key not in _hashes:
        _hashes[key] = file_hash(Path(path))
    return _hashes[key]
