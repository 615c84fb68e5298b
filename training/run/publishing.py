"""Pushing the result of a run to the hub, with a card that shows the previews."""

from __future__ import annotations

import glob
from pathlib import Path

from dmp_common.tools.publish import push_to_hub
from training.options.config import TrainConfig
from training.run.parts import Run

_SHOWN = 4  # previews on the card


def push(config: TrainConfig, run: Run, path: Path) -> str:
    """Uploads the final patch with its card; returns the address.

    Raises:
        PatchError: no client, no connection, or no permission; the files stay where they are.
    """
    previews = sorted(
        (path.parent / "sample").glob(f"{glob.escape(config.output_name)}-step{run.step:08d}-*.png")
    )
    pictures = {
        f"Base, patched and their difference, from the same noise ({number + 1})": picture
        for number, picture in enumerate(previews[:_SHOWN])
    }
    gate = path.with_name(f"{path.stem}-gate.png")
    if gate.exists():
        pictures["Which prompt speaks when"] = gate
    weights = config.pretrained_model_name_or_path
    named = weights if weights and not Path(weights).exists() else None
    return push_to_hub(
        path,
        str(config.huggingface_repo_id),
        token=config.huggingface_token,
        private=config.huggingface_private,
        base_model=named,
        pictures=pictures,
    )
