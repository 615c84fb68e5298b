"""What training asks of ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management

# How much memory a training step takes, in calls as ComfyUI estimates them. Counted at full size,
# batch 1 in half precision, with weights in fp8 and in half precision: UNets kept 4 to 9 times the
# estimate, transformers 12 to 26 times, and either less than once where blocks are recomputed.
_KEPT = {"map": 9, "tokens": 26}
_RECOMPUTED = 2


def asking_for_training(layout: str, recompute: bool) -> Callable[..., Any]:
    """Returns a wrapper of ComfyUI's preparation of a sampling: it asks for a training's memory.

    Otherwise ComfyUI would free as much memory as calls without gradients need.

    Args:
        layout: of the model's base, `Base.layout`.
        recompute: whether the backward pass recomputes the model's blocks.
    """
    times = _RECOMPUTED if recompute else _KEPT[layout]

    def prepared(executor: Any, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        # ComfyUI reads nothing off the shape but this estimate, which grows with the batch.
        return executor(model, (times * shape[0], *shape[1:]), *args, **kwargs)

    return prepared


@contextmanager
def separate_weights() -> Iterator[None]:
    """Gives each weight that is copied to the GPU for a call memory of its own.

    With streams ComfyUI copies the weights of one layer after the other into the same buffer. The
    backward pass needs those of earlier layers, and would find the later ones there.
    """
    management = comfy.model_management
    before = management.NUM_STREAMS
    management.NUM_STREAMS = 0
    try:
        yield
    finally:
        management.NUM_STREAMS = before
