"""Draws samples of the base before training, for --objective own and two-sided; kept on disk."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmp_common import PatchError
from dmp_common.patch.serialize import serialize, write_atomically
from training.base.encoders import fingerprint
from training.base.schedulers import is_flow
from training.data.batch import Batch, Data
from training.objective.inputs import Inputs, encode
from training.objective.own import CLEAN, GIVEN, OwnSamples
from training.objective.sampling import draw_latents, noises
from training.run.parts import Parts
from training.run.telling import Telling

_KEY = "own_key"  # of the metadata: what the samples of a file depend on


def draw_own_samples(parts: Parts, data: Data, tell: Telling) -> OwnSamples:
    """Draws what is not on disk yet; each process draws its share.

    Samples have the conditions and the sizes of the first training images. A file holds those of
    one batch; one that is there, from an earlier run or one that was stopped, is used again where
    base, sampler, conditions and seed are the same.

    Raises:
        PatchError: the folder cannot be written, or the sampler is not for this base.
    """
    config, accelerator = parts.config, parts.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    folder = Path(config.cache_dir or config.output_dir) / "own-samples"
    batches = -(-config.own_samples // parts.at_once)
    sampler = own_sampler(parts)
    about = [fingerprint(parts.frozen.model), sampler, config.own_steps, config.seed]
    known = data.batches(
        global_batch=parts.at_once,
        rank=rank,
        world=world,
        workers=config.max_data_loader_n_workers,
    )
    for number, batch in enumerate(islice(known, batches)):
        path = folder / _name(number, rank)
        # Counted over all processes: two of them draw what one would.
        first = number * parts.at_once + rank * len(batch)
        inputs = _conditions(parts, batch, first)
        key = _key(about, inputs, first)
        if _key_of(path) != key:
            latents = _drawn(parts, inputs, sampler, first)
            _write(path, latents, inputs, key)
        tell.progress("own samples", number + 1, batches)
    accelerator.wait_for_everyone()
    return OwnSamples([folder / _name(n, r) for n in range(batches) for r in range(world)])


def own_sampler(parts: Parts) -> str:
    """The sampler that was asked for; flow models have one of their own."""
    config = parts.config
    flows = is_flow(parts.frozen.scheduler) and "own_sampler" not in config.model_fields_set
    return "default" if flows else config.own_sampler


def _name(number: int, rank: int) -> str:
    return f"{number:05d}-{rank:02d}.safetensors"


def _names(parts: Parts, first: int, count: int) -> list[tuple[object, ...]]:
    """What the draws of samples depend on: the seed, and their number among all."""
    return [(parts.config.seed, "own", first + row) for row in range(count)]


def _conditions(parts: Parts, batch: Batch, first: int) -> Inputs:
    """The batch encoded: of it the conditions and the size are used."""
    names = _names(parts, first, len(batch))
    return encode(batch, parts.encoders, parts.config, names, parts.device, held_out=True)


def _key(about: list[object], inputs: Inputs, first: int) -> str:
    """What the samples of a file depend on, as digits."""
    digest = hashlib.sha256(json.dumps([*about, first, inputs.clean.shape]).encode())
    for name, value in sorted(inputs.given.items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _key_of(path: Path) -> str | None:
    """The key of a file; None where there is no whole one."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError):
        return None


def _drawn(parts: Parts, inputs: Inputs, sampler: str, first: int) -> Tensor:
    """Samples (B, C, H, W) in the model's space, on the CPU."""
    count, *shape = inputs.clean.shape
    noise, sources = noises(_names(parts, first, count), tuple(shape))
    with parts.accelerator.autocast():
        drawn = draw_latents(
            parts.frozen, noise.to(parts.device), inputs.given, None,
            steps=parts.config.own_steps, scale=1.0, sampler=sampler, generators=sources,
        )  # fmt: skip
    if not bool(drawn.isfinite().all()):
        raise PatchError(
            "expected finite own samples, found others: use --mixed_precision bf16 or no, or "
            "another --own_sampler."
        )
    return drawn.float().cpu()


def _write(path: Path, latents: Tensor, inputs: Inputs, key: str) -> None:
    tensors = {f"{GIVEN}{name}": value.cpu() for name, value in inputs.given.items()}
    tensors = {name: value.contiguous() for name, value in {CLEAN: latents, **tensors}.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, serialize(tensors, {_KEY: key}))
    except OSError as error:
        raise PatchError(
            f"expected to write own samples to {path.parent}, found {error.strerror}: change "
            "--cache_dir or --output_dir."
        ) from error
