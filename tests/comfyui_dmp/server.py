"""A real ComfyUI server, driven through its API as the browser does it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from dmp_common import Patch
from tests.randomness import randomise

ROOT = Path(__file__).resolve().parents[2]
OTHER_PACKS = {
    "COMFYUI_EXTRAMODELS_PATH": "ComfyUI_ExtraModels",
    "COMFYUI_GGUF_PATH": "ComfyUI-GGUF",
}
A, ZERO = "test-a.safetensors", "test-zero.safetensors"  # patches `conftest.py` makes
WAIT = 1800.0  # seconds for one workflow; a CPU is slow


class Server:
    """A running server.

    Args:
        url: of the server.
        models: its folder of models.
        checkpoint: name of an SD 1.5 checkpoint it has.
        pid: of its process, where the tests started it; then they may put checkpoints of other
            kinds into its folders.
    """

    def __init__(self, url: str, models: Path, checkpoint: str, pid: int | None = None) -> None:
        self.url, self.models, self.checkpoint = url.rstrip("/"), models, checkpoint
        self.pid = pid

    def checkpoint_of(self, kind: str, folder: str) -> str:
        """Name of a checkpoint with random weights in a folder of models; made once."""
        if self.pid is None:
            pytest.skip("needs a server that the tests start: set COMFYUI_PATH only")
        return linked(made(kind), self.models / folder)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from error

    def start(self, graph: dict[str, Any]) -> str:
        """Queues a workflow in API format; its id."""
        return str(self.post("/prompt", {"prompt": graph})["prompt_id"])

    def wait(self, prompt: str) -> dict[str, Any]:
        """The history entry of a workflow that has ended, well or not."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt}")
            if prompt in history:
                return dict(history[prompt])
            time.sleep(0.2)
        raise TimeoutError(f"workflow {prompt} took longer than {WAIT:.0f} s")

    def run(self, graph: dict[str, Any]) -> dict[str, list[np.ndarray]]:
        """Runs a workflow; the pictures of each output node."""
        entry = self.wait(self.start(graph))
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(message_of(entry))
        found = {}
        for node, output in entry["outputs"].items():
            if "images" in output:
                found[node] = [self.picture(image) for image in output["images"]]
            elif "latents" in output:
                found[node] = [self.latent(file) for file in output["latents"]]
        return found

    def picture(self, image: dict[str, str]) -> np.ndarray:
        """Pixels (H, W, 3) of a saved picture."""
        return np.asarray(Image.open(io.BytesIO(self._file(image))).convert("RGB"))

    def texts(self, image: dict[str, str]) -> dict[str, str]:
        """The text entries of a saved picture."""
        found = Image.open(io.BytesIO(self._file(image))).info
        return {key: str(text) for key, text in found.items()}

    def latent(self, file: dict[str, str]) -> np.ndarray:
        """Numbers (B, C, H, W) of a saved latent."""
        return safetensors.numpy.load(self._file(file))["latent_tensor"]

    def _file(self, file: dict[str, str]) -> bytes:
        with urllib.request.urlopen(
            f"{self.url}/view?{urllib.parse.urlencode(file)}", timeout=60
        ) as answer:
            return bytes(answer.read())

    def free(self) -> None:
        """Unloads the models and forgets all results."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(2)


def same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    """Whether two lists of pictures or latents are identical."""
    return len(one) == len(two) and all(map(np.array_equal, one, two))


def save_random(path: Path, patch: Patch, seed: int) -> None:
    """Saves a patch with random values that make a difference."""
    path.parent.mkdir(exist_ok=True)
    randomise(patch, seed).save(path)


def message_of(entry: dict[str, Any]) -> str:
    """What the browser shows of a workflow that failed."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return str(data["exception_message"])
        if kind == "execution_interrupted":
            return "interrupted"
    return "no message"


def made(kind: str) -> Path:
    """A checkpoint with random weights of a kind of `checkpoints.py`, kept for the next run."""
    folder = Path(os.environ.get("COMFYUI_TEST_CHECKPOINTS") or tempfile.gettempdir())
    path = folder / f"dmp-{kind}.safetensors"
    if not path.is_file():
        maker = Path(__file__).parent / "checkpoints.py"
        subprocess.run([sys.executable, str(maker), kind, str(path)], check=True)
    return path


def linked(path: Path, folder: Path, name: str | None = None) -> str:
    """Puts a file into a folder without copying it, where the system can; its name there."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / (name or path.name)
    if not place.exists():
        try:
            place.symlink_to(path)
        except OSError:  # Windows lets administrators only
            shutil.copy(path, place)
    return place.name


@contextlib.contextmanager
def started(comfyui: Path, folder: Path, checkpoint: Path) -> Iterator[Server]:
    """A server of its own, with this repository as a custom node, in a folder of its own."""
    models, nodes = folder / "models", folder / "custom_nodes"
    for path in (models / "checkpoints", models / "dmp", nodes, folder / "user"):
        path.mkdir(parents=True, exist_ok=True)
    (nodes / "dmp").symlink_to(ROOT)
    (nodes / "dmp_test_pack").symlink_to(Path(__file__).parent / "pack")
    for variable, pack in OTHER_PACKS.items():
        if other := os.environ.get(variable):
            (nodes / pack).symlink_to(other)
    linked(checkpoint, models / "checkpoints")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--port", str(port), "--base-directory", str(folder)]
    command += ["--disable-api-nodes", *os.environ.get("COMFYUI_ARGS", "--cpu").split()]
    environment = os.environ | {"DMP_ROOT": str(ROOT)}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", models, checkpoint.name, process.pid)
            for _ in range(600):
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    server.get("/system_stats")
                    break
                if process.poll() is not None:
                    break
                time.sleep(1)
            else:
                raise TimeoutError((folder / "server.log").read_text()[-2000:])
            if process.poll() is not None:
                raise RuntimeError((folder / "server.log").read_text()[-2000:])
            yield server
        finally:
            process.terminate()
            process.wait(60)
