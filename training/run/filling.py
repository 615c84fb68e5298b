"""Exact predictions on disk: made before training, by whichever model is in memory then."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dmp_common import PatchError
from training.base.encoders import fingerprint
from training.data.batch import Batch, Data, Position
from training.data.sources.caption_lines import CaptionData
from training.objective.aim import Aim
from training.objective.noise import Names
from training.objective.objectives import Distillation
from training.objective.store import AimStore
from training.objective.stored_aims import StoredData
from training.objective.trajectories import Trajectories
from training.options.helping import section_of
from training.run.disk import mib
from training.run.parts import Parts
from training.run.telling import Telling

_COMMIT_EVERY = 16  # batches; what came after the last commit is computed again
_SPARE = 64 * 2**20
# What exact predictions depend on: one store serves every cheap call, method and optimiser.
_SECTIONS = ("model", "data", "image size", "captions", "objective")
_NOT = (
    *("student_weights", "student_quantization", "teacher_weighting", "relative_loss"),
    *("importance_weight", "load_weight", "gate_noise", "balancing_timesteps"),
    *("loss_type", "huber_c", "huber_schedule", "huber_scale", "variational_weight"),
    *("cache_teacher", "verify_images", "max_broken", "skip_broken"),
    # Named with the images, so that stores made before there were videos stay valid.
    *("frames", "first_frames"),
)


class Filling:
    """Computes exact predictions and keeps them.

    Args:
        parts: with the exact base, and the cheap one where `--states student` needs it.
        data: what is drawn from.
    """

    def __init__(self, parts: Parts, data: Data) -> None:
        self.parts, self.data, self.config = parts, data, parts.config
        self.dtype = torch.float32 if self.config.mixed_precision == "no" else torch.float16
        self.facts = self._facts()

    @property
    def folder(self) -> Path:
        """Where the predictions lie; other data or options have another folder."""
        name = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:10]
        place = self.config.cache_dir or self.config.output_dir
        return Path(place) / f"exact-predictions-{name}"

    @property
    def batches(self) -> int:
        """Global batches that are drawn.

        Raises:
            PatchError: a stream whose number of images is not known.
        """
        config, parts = self.config, self.parts
        if config.states != "data":
            return -(-config.trajectories // parts.at_once)
        found = self.data.batches_per_epoch(parts.at_once, parts.accelerator.num_processes)
        if found is None:
            raise PatchError(
                "expected data whose number of images is known for --cache_teacher, found a "
                "stream: leave the option out, or give a folder."
            )
        return found * config.teacher_draws

    def estimate(self, aims: Iterable[Aim]) -> int:
        """Bytes on disk, from the aims of one batch of this process."""
        parts, total = self.parts, 0
        for aim in aims:
            rows = 2 * aim.noisy.numel() * self.dtype.itemsize + 16 * len(aim.noisy)
            total += rows * self.batches * parts.accelerator.num_processes
            known = self.data.size or len(aim.noisy) * self.batches
            bytes_of = sum(value[0].numel() * value.element_size() for value in aim.given.values())
            # The conditions of one caption are kept once.
            total += bytes_of * min(known, len(aim.noisy) * self.batches)
        return total

    def fill(self, tell: Telling) -> StoredData:
        """Computes what is missing and returns all of it.

        Raises:
            PatchError: a prediction is not finite, or there is no room on the disk.
        """
        accelerator = self.parts.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        places = [self.folder / f"{number + 1}-of-{world}" for number in range(world)]
        own = AimStore(places[rank], self.facts, self.dtype)
        if not own.complete:
            self._fill(own, tell)
        accelerator.wait_for_everyone()
        stores = [AimStore(place, self.facts, self.dtype) for place in places]
        return StoredData(stores, self.data.summary(), self.config.seed, self.parts.frozen.factor)

    def aims(self, batch: Batch, names: Names) -> Iterable[Aim]:
        """The aims of one batch."""
        parts, config = self.parts, self.config
        teacher = parts.teacher()
        if config.states == "data":
            given = parts.encoders, parts.process, config, parts.device
            return [Distillation(*given, teacher, self.dtype).aim(batch, names)]
        return Trajectories(
            parts.frozen, teacher, parts.encoders, config, parts.device, self.dtype
        ).aims(batch, names)

    def names(self, position: Position, count: int) -> list[tuple[object, ...]]:
        """What the random draws of each sample depend on."""
        first = self.parts.accelerator.process_index * count
        seed = self.config.seed
        return [(seed, "exact", *position, first + row) for row in range(count)]

    def _fill(self, store: AimStore, tell: Telling) -> None:
        parts, total = self.parts, self.batches
        accelerator = parts.accelerator
        done, position = (*store.position, 0, 0, 0)[0], Position(*store.position[1:3])
        batches = self.data.batches(
            global_batch=parts.at_once,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            start=position,
            workers=self.config.max_data_loader_n_workers,
        )
        for batch in batches:
            if done >= total:
                break
            for aim in self.aims(batch, self.names(position, len(batch))):
                _require_finite(aim)
                store.append(aim)
            done, position = done + 1, batch.next
            if done == 1:
                self._require_room(store, total)
            if done % _COMMIT_EVERY == 0:
                store.commit((done, *position))
            tell.progress("computing exact predictions, in batches", done, total)
        store.commit((done, *position), complete=True)

    def _require_room(self, store: AimStore, total: int) -> None:
        """Finds a full disk after the first batch, which tells how much all will take."""
        needed = store.bytes * (total - 1) + _SPARE
        free = shutil.disk_usage(store.folder).free
        if free < needed:
            raise PatchError(
                f"expected {mib(needed)} free in {store.folder} for exact predictions, found "
                f"{mib(free)}: make room, give another --cache_dir, or lower --teacher_draws or "
                "--trajectories."
            )

    def _facts(self) -> dict[str, Any]:
        config, parts = self.config, self.parts
        assert parts.exact is not None
        fields = type(config).model_fields
        options = {
            name: value
            for name, value in config.recorded().items()
            if section_of(fields[name]) in _SECTIONS and name not in _NOT
        }
        facts = {
            "options": options,
            "seed": config.seed,
            "images at once": parts.at_once,
            "precision": config.mixed_precision,
            "data": self.data.fingerprint(),
            "exact weights": fingerprint(parts.exact.model),
            "images": parts.encoders.image_fingerprint,
            "texts": parts.encoders.text_fingerprint,
        }
        if config.states == "student":
            facts["cheap weights"] = fingerprint(parts.frozen.model)
        return facts


def draw_pictures(parts: Parts, data: CaptionData) -> None:
    """Draws the held-out pictures of captions without any, by the exact call, and keeps them."""
    drawing = Trajectories(
        parts.exact or parts.frozen, parts.teacher(), parts.encoders, parts.config, parts.device
    )
    found = {}
    for batch in data.batches(global_batch=parts.at_once):
        names = [("held-out pictures", key) for key in batch.keys]
        for key, picture in zip(batch.keys, drawing.pictures(batch, names).cpu(), strict=True):
            found[key] = _as_data(picture, parts)
        if batch.next.epoch > 0:
            break
    data.pictures = found
    data.drawn = "pixels" if parts.frozen.vae is None else "moments"


def _as_data(picture: torch.Tensor, parts: Parts) -> torch.Tensor:
    """A picture of the model's space as pixels, or as moments of the VAE without spread."""
    space = parts.frozen.space
    if space is None:
        return picture
    mean = space.unscaled(picture.unsqueeze(0))[0]
    return torch.cat([mean, torch.zeros_like(mean)])


def _require_finite(aim: Aim) -> None:
    fine = (aim.target.isfinite() & aim.noisy.isfinite()).flatten(1).all(1)
    if not bool(fine.all()):
        bad = [aim.keys[row] for row, good in enumerate(fine.tolist()) if not good]
        raise PatchError(
            f"expected finite exact predictions, found others at timestep {float(aim.t[0]):.0f} of "
            f"{', '.join(bad[:3])}: use --mixed_precision bf16 or no."
        )
