"""A running A1111 or Forge server, driven through its API."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

WAIT = 900.0  # seconds for one request; a CPU is slow


class FailedError(ValueError):
    """The server answered with an error; the text is what it says."""


@dataclass
class Made:
    """What a generation gave."""

    images: list[np.ndarray]
    infotexts: list[str]

    @property
    def image(self) -> np.ndarray:
        return self.images[0]

    @property
    def infotext(self) -> str:
        return self.infotexts[0]


class Server:
    """A server and the defaults of the small pictures that tests make.

    Args:
        url: of the server.
        defaults: of every request.
    """

    def __init__(self, url: str, **defaults: Any) -> None:
        self.url = url.rstrip("/")
        self.defaults = {
            "prompt": "a cat",
            "negative_prompt": "bad",
            "seed": 1,
            "steps": 4,
            "width": 64,
            "height": 64,
            "cfg_scale": 5,
            "sampler_name": "Euler",
            **defaults,
        }

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise FailedError(error.read().decode()) from error

    def make(self, *patch: Any, **settings: Any) -> Made:
        """Pictures; `patch` are values of the accordion after its switch."""
        if patch:
            settings["alwayson_scripts"] = {"DMP": {"args": [True, *patch]}}
        kind = "img2img" if "init_images" in settings else "txt2img"
        answer = self.post(f"/sdapi/v1/{kind}", **{**self.defaults, **settings})
        info = json.loads(answer["info"])
        return Made([pixels(text) for text in answer["images"]], info["infotexts"])

    def log(self, *patch: Any, **settings: Any) -> tuple[Made, list[dict[str, Any]]]:
        """Pictures, and each call of the model while they were made."""
        self.post("/dmp-test/clear")
        made = self.make(*patch, **settings)
        return made, self.state()["calls"]

    def told(self) -> str:
        """What the extension told on the console since the last `log`."""
        return "\n".join(self.state()["told"])

    def state(self) -> Any:
        return self.get("/dmp-test/state")

    def wait_for_restart(self, seconds: float = 120.0) -> None:
        """Waits until a server that restarts answers again.

        A1111 ends with an error where a request comes while it adds its API to the new server, so
        this only connects until the new server has had time for that.
        """
        place = urllib.parse.urlsplit(self.url)
        time.sleep(3)
        end = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection((place.hostname, place.port or 80), 5).close()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)
        time.sleep(10)

    def while_making(self, action: str, *patch: Any, **settings: Any) -> Made:
        """Starts a generation, does something once it samples, and gives what comes of it."""
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(self.make(*patch, **settings))
            except FailedError as error:
                results.append(error)

        self.post("/dmp-test/clear")
        thread = threading.Thread(target=run)
        thread.start()
        end = time.monotonic() + WAIT
        while not self.state()["calls"] and time.monotonic() < end:
            time.sleep(0.05)
        self.post(action)
        thread.join(WAIT)
        if isinstance(results[0], FailedError):
            raise results[0]
        return results[0]


def pixels(text: str) -> np.ndarray:
    """(H, W, 3) of a picture in base64."""
    data = base64.b64decode(text.split(",", 1)[-1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def encoded(image: np.ndarray) -> str:
    """A picture for a request."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
