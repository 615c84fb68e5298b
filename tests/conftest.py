"""What all tests share: quiet logs of third parties, and named exceptions from strict warnings."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

THIRD_PARTY_WARNINGS = (
    # torch.compile's default backend imports a module of torch that uses what torch deprecates; the
    # category changes between releases.
    "ignore:`torch.jit.script_method` is deprecated",
    # What that backend imports in torch 2.1.
    "ignore:pkg_resources is deprecated as an API",
)

# The folder above has an __init__.py too, for ComfyUI, so pytest would import these modules a
# second time, as <clone>.tests.<name>: bases would be registered twice, as different objects.
collect_ignore = [
    path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")
]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the models are tiny: waking a second thread costs more than it does
    # Importing torch stops this logger from propagating.
    # pytest listens to every logger that does not propagate, and torch.compile then writes
    # thousands of structured records, half of its time, to this one.
    logging.getLogger("torch.__trace").propagate = True
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
