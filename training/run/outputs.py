"""What a run leaves on disk along the way: files, states, heat maps, previews."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dmp_common import PatchError
from dmp_common.bases.timesteps import embed_timesteps
from dmp_common.tools.heatmap import save_heatmap
from dmp_common.tools.timefile import even_timesteps
from training.base.frozen import FrozenBase
from training.base.precision import DTYPES
from training.methods.method import Method
from training.methods.patch import PatchMethod
from training.options.config import TrainConfig
from training.run.disk import full_disk_explained, mib
from training.run.folder import GATE, remove, saved
from training.run.state import find_states

_STATE_COPIES = 4  # values, average, and Adam's two moments


class Outputs:
    """The folder of a run.

    Args:
        config: names and precision.
        method: what is saved.
        frozen: the base, for the heat map.
    """

    def __init__(self, config: TrainConfig, method: Method, frozen: FrozenBase) -> None:
        self.config, self.method, self.frozen = config, method, frozen
        self.folder = Path(config.output_dir)

    def path(self, step: int | None = None) -> Path:
        """Of the file after a step (kohya's name), or of the final one."""
        suffix = "" if step is None else f"-step{step:08d}"
        return self.folder / f"{self.config.output_name}{suffix}{self.method.ending}"

    def save(self, step: int | None, metadata: dict[str, str]) -> Path:
        """Writes the file of the method as it is now, and the heat map of its gate."""
        path = self.path(step)
        size = 4 * self.method.saved_parameters()
        with full_disk_explained(self.folder, size, path.name):
            self.method.save(path, metadata, DTYPES[self.config.save_precision])
            if isinstance(self.method, PatchMethod):
                self.heatmap(path.with_name(f"{path.stem}-gate.png"))
        return path

    def heatmap(self, path: Path) -> None:
        """The gate by timestep and prompt, and as maps over the picture."""
        assert isinstance(self.method, PatchMethod)
        patch, frozen = self.method.patch, self.frozen
        timesteps = even_timesteps()
        labels = None
        if patch.variant.condition == "t+y":
            # Pooled text 0 is as good as any; a class is the first.
            table = frozen.model.get_submodule(
                f"{frozen.base.times[frozen.naming].labels}.embedding_table"
            )
            size = getattr(table, "in_features", None)
            labels = (
                torch.zeros(len(timesteps), dtype=torch.long)
                if size is None
                else torch.zeros(len(timesteps), size, dtype=frozen.dtype)
            )
        with torch.no_grad():
            e = embed_timesteps(frozen.model, frozen.base, frozen.naming, timesteps, labels)
        training = patch.training
        save_heatmap(path, patch.eval(), timesteps, e.float())
        patch.train(training)

    def save_previews(self, step: int, pairs: list[Image.Image], prompts: list[str]) -> list[Path]:
        """Writes A/B pictures into the folder `sample`, each with its prompt in the PNG's text."""
        folder = self.folder / "sample"
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, (image, prompt) in enumerate(zip(pairs, prompts, strict=True)):
            path = folder / f"{self.config.output_name}-step{step:08d}-{number:02d}.png"
            about = PngInfo()
            about.add_itxt("prompt", prompt)
            image.save(path, pnginfo=about)
            paths.append(path)
        return paths

    def prune(self, step: int, epoch_of: Callable[[int], int]) -> None:
        """Removes what --save_last_n_steps and its like do not keep; the final file stays.

        Args:
            step: of the newest save.
            epoch_of: the epoch that is reached after a number of steps.
        """
        config, name = self.config, self.config.output_name

        def expired(old: int, steps: int | None, epochs: int | None) -> bool:
            by_steps = steps is not None and old <= step - steps
            return by_steps or (epochs is not None and epoch_of(old) <= epoch_of(step) - epochs)

        state_steps = config.save_last_n_steps_state or config.save_last_n_steps
        state_epochs = config.save_last_n_epochs_state or config.save_last_n_epochs
        for old, folder in find_states(self.folder, name).items():
            if expired(old, state_steps, state_epochs):
                remove(folder)
        for old, kind, path in saved(self.folder, name):
            mine = kind in (self.method.ending, GATE)
            if mine and expired(old, config.save_last_n_steps, config.save_last_n_epochs):
                remove(path)


def require_room(config: TrainConfig, values: int, total_steps: int) -> None:
    """Finds a full disk before training, not at the first save.

    Args:
        values: number of trained values.
        total_steps: of the run.

    Raises:
        PatchError: less room than the files and states of the run take.
    """
    folder = Path(config.output_dir).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    every = config.save_every_n_steps
    saves = total_steps // every if every else 0
    if every and config.save_last_n_steps:
        saves = min(saves, config.save_last_n_steps // every + 1)
    states = (saves if config.save_state else 0) + int(
        config.save_state or config.save_state_on_train_end
    )
    files = saves + 2  # the final one, and the one being written
    needed = 4 * values * (files + states * _STATE_COPIES)
    if free < needed:
        raise PatchError(
            f"expected {mib(needed)} free in {folder} for {files} files and {states} "
            f"state{'s' * (states != 1)}, found {mib(free)}: make room, change --output_dir, or "
            "save less often (--save_every_n_steps, --save_last_n_steps)."
        )
