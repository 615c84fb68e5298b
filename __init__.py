"""ComfyUI loads this file when the repository is cloned into `custom_nodes`.

It stays importable without ComfyUI (test runners load it too) and leaves nothing on `sys.path`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./comfyui_dmp/web"


async def comfy_entrypoint() -> Any:
    """The nodes, for ComfyUI (>= 0.8)."""
    for name in ("dmp_common", "comfyui_dmp"):
        _load(name)
    from comfyui_dmp.nodes import Extension

    return Extension()


def _load(name: str) -> None:
    """Imports a package of this repository under its own name, wherever the repository lies."""
    if name in sys.modules:
        return
    folder = Path(__file__).resolve().parent / name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"expected the package {name} in {folder}: clone the repository again.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
