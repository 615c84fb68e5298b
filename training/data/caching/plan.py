"""The caches that options ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmp_common import PatchError
from training.data.kind import DataKind
from training.data.samples import Subset
from training.options.data_options import DataOptions


@dataclass(frozen=True)
class CachePlan:
    """The caches that options ask for.

    Args:
        latents, texts: None, or where they are kept: a folder, or "memory".
        images_at_once: for the VAE.
        workers: processes that decode images.
        notes: for the summary.
    """

    latents: Path | str | None
    texts: Path | str | None
    images_at_once: int = 1
    workers: int = 0
    notes: tuple[str, ...] = ()

    @property
    def wanted(self) -> bool:
        """Whether there is something to make."""
        return self.latents is not None or self.texts is not None


def plan_caches(
    options: DataOptions, kind: DataKind, subsets: set[Subset], default: Path | None
) -> CachePlan | None:
    """The caches that options ask for, None for none.

    Args:
        options: of the data.
        kind: what the base needs.
        subsets: of all images.
        default: folder of files where --cache_dir is not given; None where there is no place.

    Raises:
        PatchError: options that a cache cannot serve.
    """
    latents = options.cache_latents or options.cache_latents_to_disk
    texts = options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk
    notes = []
    if latents:
        changing = {
            "color_aug": any(subset.sizes.color for subset in subsets),
            "random_crop": any(subset.sizes.random_crop for subset in subsets),
        }
        if any(changing.values()):
            names = " and ".join(name for name, on in changing.items() if on)
            notes.append(
                f"latents are not cached: {names} makes a new image each time, which takes longer"
            )
            latents = False
    if texts:
        _check_texts(kind, subsets)
    on_disk = options.cache_latents_to_disk or options.cache_text_encoder_outputs_to_disk
    folder = Path(options.cache_dir) if options.cache_dir else default
    if on_disk and folder is None:
        raise PatchError(
            "expected a place for cache files, found data that is no folder: give --cache_dir."
        )
    if not latents and not texts and not notes:
        return None

    def place(to_disk: bool) -> Path | str | None:
        return folder if to_disk else "memory"

    return CachePlan(
        latents=place(options.cache_latents_to_disk) if latents else None,
        texts=place(options.cache_text_encoder_outputs_to_disk) if texts else None,
        images_at_once=options.vae_batch_size,
        workers=options.max_data_loader_n_workers,
        notes=tuple(notes),
    )


def _check_texts(kind: DataKind, subsets: set[Subset]) -> None:
    if kind.conditioning != "caption":
        raise PatchError(
            "expected a base with captions for cache_text_encoder_outputs, found one that takes "
            f"{kind.conditioning}: leave it out."
        )
    wrong = {name for subset in subsets for name in subset.captions.varying}
    if wrong:
        raise PatchError(
            f"expected no {' or '.join(sorted(wrong))} with cache_text_encoder_outputs, found it: "
            "a cached caption is always the same; leave out one of them."
        )
