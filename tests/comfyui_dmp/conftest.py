"""ComfyUI's source, found by COMFYUI_PATH, and a real server; tests that need them skip without.

COMFYUI_PATH=...   ComfyUI's folder. The tests start a server from it, and make the checkpoints
                   it needs, with random weights (13 gigabytes in all).
COMFYUI_TEST_CHECKPOINTS=...  where these are kept, the temporary folder unless set.
COMFYUI_ARGS=...   of the server, "--cpu" unless set.
COMFYUI_EXTRAMODELS_PATH=...  ComfyUI_ExtraModels' folder, for the paper's DiT.
COMFYUI_GGUF_PATH=...  ComfyUI-GGUF's folder, for models in GGUF.
COMFYUI_URL=...    a running server instead; with COMFYUI_MODELS, its models folder, and
                   COMFYUI_CHECKPOINT, the name of an SD 1.5 checkpoint it has.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dmp_common import Patch
from tests.comfyui_dmp.familynames import NAMES
from tests.comfyui_dmp.server import Server, made, save_random, started
from training.options.presets import STAGES

_ROOT = Path(__file__).resolve().parents[2]

collect_ignore = ["family.py", "running.py", "checkpoints.py", "pack"]  # they import ComfyUI
collect_ignore_glob = ["real*.py"]  # as these do


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
            # `nodes` puts ComfyUI's folder `comfy` on the path, where `utils` is another module.
            for name in ("utils.install_util", "comfy.sample", "comfy.model_base", "nodes"):
                importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"needs the Python packages of ComfyUI: {error}")
    return path


@pytest.fixture(scope="session")
def real(comfyui_path: Path) -> ModuleType:
    """`real.py`: ComfyUI's own model classes in small."""
    return importlib.import_module("tests.comfyui_dmp.real")


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest, real: ModuleType) -> Any:
    """Each of ComfyUI's model classes in small that the host's releases know."""
    return real.FAMILIES.get(request.param) or pytest.skip("not in these releases")


@pytest.fixture(scope="session")
def host(comfyui_path: Path) -> ModuleType:
    """The module under test, which imports ComfyUI."""
    return importlib.import_module("comfyui_dmp.host")


@pytest.fixture(scope="session")
def run(real: ModuleType) -> ModuleType:
    """`running.py`: calls of these models, and whole samplings."""
    return importlib.import_module("tests.comfyui_dmp.running")


@pytest.fixture
def train(host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that trains, with a temporary folder of its own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return importlib.import_module("comfyui_dmp.train")


@pytest.fixture(scope="session")
def nodes(comfyui_path: Path) -> dict[str, Any]:
    """The node classes by id, through the pack's entry point, as ComfyUI gets them."""
    spec = importlib.util.spec_from_file_location("a.b_c-d/pack", _ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def classes() -> list[Any]:
        extension = await module.comfy_entrypoint()
        return await extension.get_node_list()

    return {cls.GET_SCHEMA().node_id: cls for cls in asyncio.run(classes())}


@pytest.fixture
def folder(nodes, tmp_path, monkeypatch) -> Path:
    """A models/dmp folder of its own."""
    import folder_paths

    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "dmp", ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("dmp", None)
    return tmp_path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server with patches to load."""
    if url := os.environ.get("COMFYUI_URL"):
        try:
            models, name = Path(os.environ["COMFYUI_MODELS"]), os.environ["COMFYUI_CHECKPOINT"]
        except KeyError as error:
            pytest.skip(f"needs {error} besides COMFYUI_URL")
        _fill(models / "dmp")
        yield Server(url, models, name)
        return
    comfyui = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (comfyui / "main.py").is_file():
        pytest.skip("needs a server: set COMFYUI_URL, or COMFYUI_PATH to ComfyUI's folder")
    with started(comfyui, tmp_path_factory.mktemp("comfyui"), made("sd15")) as running:
        _fill(running.models / "dmp")
        yield running


def _fill(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_random(folder / "test-a.safetensors", Patch.create("sd15"), 1)
    stages = Patch.create("sd15", sites="all", **STAGES)
    save_random(folder / "deep" / "test-b.safetensors", stages, 2)
    Patch.create("sd15").save(folder / "test-zero.safetensors")
    Patch.create("sd15").save(folder / "test-gone.safetensors")
    Patch.create("sdxl").save(folder / "test-sdxl.safetensors")
    Patch.create("sd15", prediction="v_prediction").save(folder / "test-v.safetensors")
    Patch.create("dit-b/2", mix="prepend").save(folder / "test-prepend.safetensors")
    good = (folder / "test-a.safetensors").read_bytes()
    (folder / "test-cut.safetensors").write_bytes(good[:-1000])
    (folder / "test-text.safetensors").write_text("not a patch")
