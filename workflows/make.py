"""Writes the example workflows: for the browser here, in API format in `api/`.

    python workflows/make.py

A test compares the files with what this makes, and checks them against the nodes' schemas.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":  # The folder of this script is on the path, not that above it.
    sys.path[0] = str(FOLDER.parent)

from workflows import comparing, using  # noqa: E402
from workflows.flow import Workflow  # noqa: E402

WORKFLOWS: dict[str, Callable[[], Workflow]] = {
    "dmp-basic-sd15": using.basic,
    "dmp-compare": comparing.compare,
    "dmp-strength-curve": using.curve,
    "dmp-keyframes": using.keyframes,
    "dmp-mask": using.mask,
    "dmp-hook": using.hook,
    "dmp-gate-heatmap": using.heatmap,
    "dmp-sdxl": using.sdxl,
    "dmp-sd35": using.sd35,
    "dmp-stacked": using.stacked,
    "dmp-stack": using.stack,
    "dmp-repair-quantised": comparing.repair,
    "dmp-one-call": comparing.one_call,
    "dmp-train-repair": comparing.train_repair,
    "dmp-train-guidance": comparing.train_guidance,
}


def files() -> dict[Path, str]:
    """Returns the text of every file."""
    made: dict[Path, str] = {}
    for name, make in WORKFLOWS.items():
        flow = make()
        made[FOLDER / f"{name}.json"] = json.dumps(flow.for_browser(), indent=1) + "\n"
        made[FOLDER / "api" / f"{name}.json"] = json.dumps(flow.api, indent=1) + "\n"
    return made


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
