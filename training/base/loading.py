"""Weights from a file, a diffusers folder or the hub: the denoiser and the parts around it."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dmp_common import Base, PatchError
from training.base.families import checkpoint
from training.base.families.family import Family
from training.options.config import TrainConfig

DIGITS_BASE = Path(__file__).resolve().parent / "digits"
_CLIP = "openai/clip-vit-large-patch14"  # the "CLIP-L" of Stable Diffusion
_ORIGINAL = (".pt", ".pth")
_SINGLE = (".safetensors", ".sft", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """Where weights are.

    Args:
        place: path or hub id.
        kind: a diffusers pipeline, the folder of a denoiser alone, a single file that diffusers
            reads, or a checkpoint of the original DiT or PixArt.
    """

    place: str
    kind: Literal["pipeline", "denoiser", "single", "original"]


def find_source(config: TrainConfig, base: Base | None) -> Source:
    """Where the weights of the base are.

    Raises:
        PatchError: nothing there, or nothing named for a base without usual weights.
    """
    usual = base.hub_id if base is not None else None
    if base is not None and base.name == "digits":
        usual = str(DIGITS_BASE)
    place = config.pretrained_model_name_or_path or usual
    if place is None:
        raise PatchError(
            f"expected --pretrained_model_name_or_path, because base "
            f"{base.name if base else 'auto'} has no usual weights, found none: name a file, a "
            "diffusers folder or a hub id."
        )
    path = Path(place).expanduser()
    if path.is_dir():
        alone = (path / "config.json").is_file() and not (path / "model_index.json").is_file()
        return Source(str(path), "denoiser" if alone else "pipeline")
    if path.is_file():
        if path.suffix in _ORIGINAL:
            return Source(str(path), "original")
        if path.suffix in _SINGLE:
            return Source(str(path), "single")
        raise PatchError(
            f"expected weights ending in {', '.join((*_SINGLE, *_ORIGINAL))}, found {path}: name "
            "such a file, a diffusers folder or a hub id."
        )
    if _HUB_ID.fullmatch(place) and not place.startswith("."):
        return Source(place, "pipeline")
    raise PatchError(
        f"expected a file, a diffusers folder or a hub id, found nothing at {place}: check "
        "--pretrained_model_name_or_path."
    )


class Loader:
    """Loads the parts of one base.

    Args:
        config: of the run.
        base: whose usual repository has what the source lacks.
        family: what there is to load.
        source: of the weights.
        dtype: of the frozen weights.
    """

    def __init__(
        self, config: TrainConfig, base: Base, family: Family, source: Source, dtype: torch.dtype
    ) -> None:
        self.config, self.base, self.family, self.source = config, base, family, source
        self.dtype = dtype
        self._whole: Any = None  # a pipeline from a single file with everything in it

    def denoiser(self) -> Any:
        """The model itself."""
        kind, place = self.source.kind, self.source.place
        cls = getattr(diffusers, self.family.model)
        with _explained(f"weights of a {self.family.model}", place):
            if kind == "original" or (kind == "single" and self._is_original_safetensors()):
                return self._original(cls)
            if kind == "single":
                whole = self._single()
                return whole if isinstance(whole, cls) else getattr(whole, self.family.denoiser)
            folder = None if kind == "denoiser" else self.family.denoiser
            return cls.from_pretrained(place, subfolder=folder, **self._options())

    def scheduler(self) -> Any:
        """The noise schedule of the base, as its pipeline has it."""
        if self._whole is not None and hasattr(self._whole, "scheduler"):
            return self._whole.scheduler
        place = self._around()
        if place is None or (self.family.scheduler and not self._has(place, "scheduler")):
            loaded: Any = dict(self.family.scheduler)
        else:
            with _explained("the configuration of a scheduler", place):
                loaded = diffusers.DDPMScheduler.load_config(place, subfolder="scheduler")
        flow = "FlowMatch" in loaded.get("_class_name", "")
        cls = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDPMScheduler
        return cls.from_config(loaded)

    def vae(self) -> Any:
        """The VAE: --vae, else that of the weights, else the family's usual one."""
        chosen = self.config.vae
        dtype = torch.float32 if self.config.no_half_vae else self.dtype
        place = chosen or (self._whole is None and self._around())
        with _explained("a VAE", chosen or self.source.place):
            if chosen is None and getattr(self._whole, "vae", None) is not None:
                return self._whole.vae.to(dtype)
            if chosen is None and (place is None or not self._has(str(place), "vae")):
                place = self.family.vae_id or self.base.hub_id
                alone = self.family.vae_id is not None
                return _vae(str(place), None if alone else "vae", dtype)
            path = Path(str(place)).expanduser()
            if path.is_file():
                return diffusers.AutoencoderKL.from_single_file(
                    str(path), config=self.config.base_config, torch_dtype=dtype
                )
            # --vae names a repository of a VAE alone, or a whole pipeline.
            alone = chosen is not None and not (path / "vae").is_dir()
            return _vae(str(place), None if alone else "vae", dtype)

    def encoders(self) -> dict[str, Any]:
        """Text encoders and their tokenizers, by folder."""
        import transformers

        if self.config.text_conditional:
            return self._pooled_clip()
        parts: dict[str, Any] = {}
        for name, cls in self.family.encoders.items():
            tokenizer = name.replace("text_encoder", "tokenizer")
            whole = getattr(self._whole, name, None)
            if whole is not None:
                parts |= {name: whole, tokenizer: getattr(self._whole, tokenizer)}
                continue
            place = self._around() or self.base.hub_id
            with _explained(f"{name} and {tokenizer}", str(place)):
                parts[name] = getattr(transformers, cls).from_pretrained(
                    place, subfolder=name, dtype=self.dtype
                )
                parts[tokenizer] = transformers.AutoTokenizer.from_pretrained(
                    place, subfolder=tokenizer
                )
        return parts

    def _pooled_clip(self) -> dict[str, Any]:
        import transformers

        place = self.config.text_encoder or _CLIP
        with _explained("CLIP's text encoder and tokenizer", place):
            whole = (Path(place) / "text_encoder").is_dir()
            encoder, tokenizer = ("text_encoder", "tokenizer") if whole else ("", "")
            return {
                "text_encoder": transformers.CLIPTextModel.from_pretrained(
                    place, subfolder=encoder, dtype=self.dtype
                ),
                "tokenizer": transformers.AutoTokenizer.from_pretrained(place, subfolder=tokenizer),
            }

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"torch_dtype": self.dtype}
        if self.config.weights_variant:
            options["variant"] = self.config.weights_variant
        return options

    def _around(self) -> str | None:
        """Folder or repository of the parts around the denoiser."""
        if self.source.kind == "pipeline":
            return self.config.base_config or self.source.place
        return self.config.base_config or self.base.hub_id

    def _has(self, place: str, part: str) -> bool:
        """Whether a folder has a part; of a repository it is assumed."""
        return not Path(place).is_dir() or (Path(place) / part).is_dir()

    def _single(self) -> Any:
        """A pipeline where the file has everything, else the denoiser alone."""
        place = Path(self.source.place)
        with contextlib.ExitStack() as stack:
            if place.suffix == ".ckpt":
                place = stack.enter_context(_as_safetensors(place))
            names = _names(place)
            if not self.family.pipeline:
                raise PatchError(
                    f"expected a diffusers folder, or an original checkpoint ending in .pt, for "
                    f"base {self.base.name}, found {place}: diffusers reads no single files of it."
                )
            options = {"config": self.config.base_config, "torch_dtype": self.dtype}
            if _is_whole(names):
                cls = getattr(diffusers, self.family.pipeline)
                # Pipelines that know no safety checker ignore it.
                self._whole = cls.from_single_file(str(place), safety_checker=None, **options)
                return self._whole
            cls = getattr(diffusers, self.family.model)
            folder = self.family.denoiser if self.config.base_config else None
            return cls.from_single_file(str(place), subfolder=folder, **options)

    def _is_original_safetensors(self) -> bool:
        path = Path(self.source.place)
        return path.suffix != ".ckpt" and "x_embedder.proj.weight" in _names(path)

    def _original(self, cls: Any) -> Any:
        """A DiT or PixArt from the checkpoint of the original code."""
        from training.base.families.dit import set_frequency_shift

        path = Path(self.source.place)
        if path.suffix in _ORIGINAL:
            tensors = checkpoint.read_tensors(path)
        else:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not checkpoint.is_transformer(tensors):
            raise PatchError(
                f"{path}: expected the weights of an original DiT or PixArt, found "
                f"{', '.join(list(tensors)[:3])}: choose such a checkpoint."
            )
        if self.config.base_config:
            model = cls.from_config(
                cls.load_config(self.config.base_config, subfolder=self.family.denoiser)
            )
        else:
            model = cls(**checkpoint.infer_config(tensors))
        model.load_state_dict(checkpoint.rename(tensors))
        if not checkpoint.is_pixart(tensors):
            set_frequency_shift(model, 0.0)  # diffusers' DiT has 1, the original 0
        return model.to(self.dtype)


def _vae(place: str, folder: str | None, dtype: torch.dtype) -> Any:
    return diffusers.AutoencoderKL.from_pretrained(place, subfolder=folder, torch_dtype=dtype)


@contextlib.contextmanager
def _as_safetensors(path: Path) -> Iterator[Path]:
    """A .ckpt as a .safetensors file, for diffusers; what the pickle names is never run."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"{path.stem}.safetensors"
        save_file({n: t.clone() for n, t in checkpoint.read_tensors(path).items()}, copy)
        yield copy


def _names(path: Path) -> list[str]:
    with _explained("a safetensors file", str(path)), safe_open(path, framework="pt") as file:
        return list(file.keys())


def _is_whole(names: list[str]) -> bool:
    """Whether a single file has a VAE and text encoders besides the denoiser."""
    vae = any(name.startswith(("first_stage_model.", "vae.")) for name in names)
    text = ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.")
    return vae and any(name.startswith(text) for name in names)


@contextlib.contextmanager
def _explained(expected: str, place: str) -> Iterator[None]:
    """Turns what the loaders raise into one sentence that says what to do."""
    try:
        yield
    except PatchError:
        raise
    except (
        OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError,
        json.JSONDecodeError,
    ) as error:  # fmt: skip
        found = " ".join(str(error).split())[:300]
        raise PatchError(
            f"expected {expected} at {place}, found something that does not load "
            f"({type(error).__name__}: {found}): check --pretrained_model_name_or_path, "
            "--base_config and --vae, and the connection if it is on the hub."
        ) from error
