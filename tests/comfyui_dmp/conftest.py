"""ComfyUI's source, found by COMFYUI_PATH; tests that need it skip without."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

collect_ignore = ["family.py", "real.py", "running.py", "checkpoints.py"]  # they import ComfyUI


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The folder of ComfyUI's source, made importable."""
    path = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (path / "comfy" / "model_patcher.py").is_file():
        pytest.skip("needs ComfyUI's source: set COMFYUI_PATH to its folder")
    if str(path) not in sys.path:
        sys.path.append(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cli = importlib.import_module("comfy.cli_args")
            cli.args.cpu = not torch.cuda.is_available()
            cli.args.use_pytorch_cross_attention = True  # as on a GPU; the other breaks graphs
            for name in ("comfy.sample", "comfy.model_base", "nodes"):
                importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"needs the Python packages of ComfyUI: {error}")
    return path


@pytest.fixture(scope="session")
def real(comfyui_path: Path) -> ModuleType:
    """`real.py`: ComfyUI's own model classes in small."""
    return importlib.import_module("tests.comfyui_dmp.real")


@pytest.fixture(scope="session")
def host(comfyui_path: Path) -> ModuleType:
    """The module under test, which imports ComfyUI."""
    return importlib.import_module("comfyui_dmp.host")


@pytest.fixture(scope="session")
def run(real: ModuleType) -> ModuleType:
    """`running.py`: calls of these models, and whole samplings."""
    return importlib.import_module("tests.comfyui_dmp.running")
