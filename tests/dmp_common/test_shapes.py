"""Which base a checkpoint is of, told from names and shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from dmp_common.bases.detect import bases_of_shapes
from dmp_common.tools.modelfiles import tensor_shapes
from tests.tiny import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_told_from_shapes(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    state = {key: value.contiguous() for key, value in tiny.model().state_dict().items()}
    for prefix in ("", "model.diffusion_model."):
        path = tmp_path / f"{len(prefix)}.safetensors"
        save_file({prefix + key: value.clone() for key, value in state.items()}, path)
        shapes = tensor_shapes(path)
        assert shapes[prefix + next(iter(state))] == tuple(next(iter(state.values())).shape)
        assert bases_of_shapes(shapes) == [tiny.base]


def test_a_missing_block_or_another_width_is_no_base() -> None:
    shapes = {k: tuple(v.shape) for k, v in FAMILIES["dit"].model().state_dict().items()}
    fewer = {k: v for k, v in shapes.items() if not k.startswith("transformer_blocks.2.")}
    assert bases_of_shapes(fewer) == []
    assert bases_of_shapes({**shapes, "pos_embed.proj.weight": (48, 4, 2, 2)}) == []
    assert bases_of_shapes({}) == []
