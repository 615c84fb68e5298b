"""Imports point one way, and a host's start-up stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dmp_common", "comfyui_dmp", "a1111_dmp", "training")
HEAVY = {
    *("diffusers", "transformers", "accelerate", "huggingface_hub"),
    *("matplotlib", "pydantic", "sklearn", "einops"),
}
HOSTS = {
    *("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server"),
    *("modules", "gradio", "ldm", "backend"),
}
HOST_FILES = {
    *("comfyui_dmp/nodes.py", "comfyui_dmp/host.py"),
    *("a1111_dmp/script.py", "a1111_dmp/host.py"),
    *("a1111_dmp/cards.py", "a1111_dmp/axes.py"),
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all imports below a node, also those inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = imported(tree)
    allowed = {package} if package == "dmp_common" else {package, "dmp_common"}
    assert not found & set(PACKAGES) - allowed
    assert "tests" not in found
    if name not in HOST_FILES:
        assert not found & HOSTS
    if package in ("dmp_common", "comfyui_dmp", "a1111_dmp"):
        # Lazy imports inside functions are fine, and so are those for type checkers.
        lazy = (ast.FunctionDef, ast.ClassDef, ast.If)
        top = imported(ast.Module([n for n in tree.body if not isinstance(n, lazy)], []))
        assert not top & HEAVY


def test_every_module_can_be_imported_first() -> None:
    """No circle of imports that only works from one end."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "dmp_common").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    ]
    code = (
        "import importlib, sys, torch, safetensors.torch\n"
        f"for name in {sorted(modules)!r}:\n"
        "    for known in [m for m in sys.modules if m.split('.')[0] == 'dmp_common']:\n"
        "        del sys.modules[known]\n"
        "    importlib.import_module(name)\n"
    )
    assert len(modules) > 20
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_the_core_loads_nothing_heavy() -> None:
    code = (
        "import sys, dmp_common, dmp_common.tools.heatmap, dmp_common.tools.timefile; "
        f"print(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
