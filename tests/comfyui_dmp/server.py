"""A real ComfyUI server, driven through its API as the browser does it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WAIT = 1800.0  # seconds for one workflow; a CPU is slow


class Server:
    """A running server.

    Args:
        url: of the server.
        models: its folder of models.
        checkpoint: name of an SD 1.5 checkpoint it has.
    """

    def __init__(self, url: str, models: Path, checkpoint: str) -> None:
        self.url, self.models, self.checkpoint = url.rstrip("/"), models, checkpoint

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
        return {
            node: [self.picture(image) for image in output["images"]]
            for node, output in entry["outputs"].items()
            if "images" in output
        }

    def picture(self, image: dict[str, str]) -> np.ndarray:
        """Pixels (H, W, 3) of a saved picture."""
        with urllib.request.urlopen(
            f"{self.url}/view?{urllib.parse.urlencode(image)}", timeout=60
        ) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))

    def free(self) -> None:
        """Unloads the models and forgets all results."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(2)


def message_of(entry: dict[str, Any]) -> str:
    """What the browser shows of a workflow that failed."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return str(data["exception_message"])
        if kind == "execution_interrupted":
            return "interrupted"
    return "no message"


@contextlib.contextmanager
def started(comfyui: Path, folder: Path, checkpoint: Path) -> Iterator[Server]:
    """A server of its own, with this repository as a custom node, in a folder of its own."""
    models = folder / "models"
    for path in (models / "checkpoints", models / "dmp", folder / "custom_nodes", folder / "user"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "custom_nodes" / "dmp").symlink_to(ROOT)
    (models / "checkpoints" / checkpoint.name).symlink_to(checkpoint)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--port", str(port), "--base-directory", str(folder)]
    command += ["--disable-api-nodes", *os.environ.get("COMFYUI_ARGS", "--cpu").split()]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT)
        try:
            server = Server(f"http://127.0.0.1:{port}", models, checkpoint.name)
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
