"""Families as fixtures."""

from __future__ import annotations

import pytest

from tests.dmp_common.attaching import KINDS
from tests.tiny import FAMILIES, Tiny


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def tiny(request) -> Tiny:
    return request.param


@pytest.fixture(params=KINDS, ids=lambda family: family.name)
def kind(request) -> Tiny:
    return request.param
