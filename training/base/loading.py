"""Loads the parts of a base: the denoiser, the noise schedule, the VAE, the text encoders.

Each part comes from the first of these places that has it: its own option (--vae, --clip_l ...),
the weights (--pretrained_model_name_or_path), --base_config, the usual repository of the base.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from dmp_common import Base, PatchError
from training.base.experts import denoiser_folder
from training.base.families.family import Family
from training.base.places import Said, Source, explained, loading
from training.base.releases import require_releases
from training.base.schedulers import schedule_of
from training.base.single_files import SingleFile, vae_of_file
from training.base.text_files import load_text_encoder, text_encoder_of_folder
from training.options.config import TrainConfig

_CLIP = "openai/clip-vit-large-patch14"  # the "CLIP-L" of Stable Diffusion
_WEIGHTS = "--pretrained_model_name_or_path or --base_config"


class Loader:
    """Loads the parts of one base. Use it as a context manager.

    Args:
        config: of the run.
        base: whose usual repository has what the source lacks.
        family: what there is to load.
        source: of the weights.
        dtype: of the frozen weights.
        said: is called with a line before and after each part is loaded.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        family: Family,
        source: Source,
        dtype: torch.dtype,
        said: Said | None = None,
    ) -> None:
        self.config, self.base, self.family, self.source = config, base, family, source
        self.dtype = dtype
        require_releases(base, family)
        self._loading = partial(loading, said or (lambda line: None))
        in_file = source.kind in ("single", "original")
        self.file = SingleFile(Path(source.place)) if in_file else None
        self._denoiser: Any = getattr(diffusers, family.model)
        if self.file is not None and not self._is_original():
            self.file.require_reader(family.model, base.name)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.__exit__()

    def denoiser(self) -> Any:
        """Returns the denoiser with its weights."""
        place, dtype = self.source.place, self.dtype
        if self.file is not None:
            self.denoiser_config()  # first, for its own error: it may be on the hub
        with self._loading("denoiser", f"weights of a {self.family.model}", place, _WEIGHTS):
            if self.file is None:
                options: dict[str, Any] = {"torch_dtype": dtype}
                if self.config.weights_variant:
                    options["variant"] = self.config.weights_variant
                return self._denoiser.from_pretrained(place, subfolder=self._subfolder(), **options)
            if self._is_original():
                return self.file.original(self._denoiser, self.denoiser_config(), dtype)
            return self.file.model(self._denoiser, self._config(), self.family.denoiser, dtype)

    def denoiser_config(self) -> dict[str, Any]:
        """Returns the configuration of the denoiser; no weights are read."""
        place, subfolder = self.source.place, self._subfolder()
        with explained(f"the configuration of a {self.family.model}", place, _WEIGHTS):
            if self.file is not None:
                if self._is_original() and self.config.base_config is None:
                    return self.file.original_config()
                place, subfolder = self._config(), self.family.denoiser
        with explained(f"the configuration of a {self.family.model}", place, _WEIGHTS):
            return dict(self._denoiser.load_config(place, subfolder=subfolder))

    def scheduler(self) -> Any:
        """Returns the noise schedule of the base, as its pipeline has it."""
        place = self._around()
        if place is None or (self.family.scheduler and not _has(place, "scheduler")):
            loaded: Any = dict(self.family.scheduler)
        else:
            with explained("the configuration of a scheduler", place, "--base_config"):
                loaded = diffusers.DDPMScheduler.load_config(place, subfolder="scheduler")
        return schedule_of(loaded)

    def vae(self) -> Any:
        """Returns the VAE with its weights."""
        dtype = torch.float32 if self.config.no_half_vae else self.dtype
        chosen, (place, subfolder) = self._chosen_vae(), self._vae_place()
        cls: Any = getattr(diffusers, self.family.autoencoder)
        self.vae_config()  # first, for its own error: it may be on the hub
        with self._loading("VAE", "a VAE", chosen or place, "--vae"):
            if chosen is not None and Path(chosen).is_file():
                return vae_of_file(Path(chosen), cls, place, dtype)
            if chosen is None and self._file_has("vae"):
                assert self.file is not None
                return self.file.model(cls, place, str(subfolder), dtype)
            return cls.from_pretrained(place, subfolder=subfolder, torch_dtype=dtype)

    def vae_config(self) -> dict[str, Any]:
        """Returns the configuration of the VAE; no weights are read."""
        place, subfolder = self._vae_place()
        with explained("the configuration of a VAE", place, "--vae or --base_config"):
            cls: Any = getattr(diffusers, self.family.autoencoder)
            return dict(cls.load_config(place, subfolder=subfolder))

    def encoders(self) -> dict[str, Any]:
        """Returns the text encoders and their tokenizers, by folder in a diffusers pipeline."""
        if self.config.text_conditional:
            return self._pooled_clip()
        parts: dict[str, Any] = {}
        inside = []  # of the weights' own file, in the naming of OpenCLIP
        for name in self.family.encoders:
            option = self.family.files.get(name, "")
            file = getattr(self.config, option) if option else None
            if file is not None:
                parts |= self._encoder(name, Path(file).expanduser())
            elif not self._file_has(option):
                parts |= self._encoder(name)
            else:
                assert self.file is not None
                prefix = self.file.text_prefix(option)
                if prefix is None:
                    inside.append(name)
                else:
                    parts |= self._encoder(name, Path(self.file.readable), prefix)
        if inside:
            assert self.file is not None
            pipeline = getattr(diffusers, self.family.pipeline)
            what = " and ".join(inside)
            with self._loading(what, what, self.source.place, _WEIGHTS):
                parts |= self.file.encoders(pipeline, inside, self._config(), self.dtype)
        return parts | self._beside_encoders()

    def vision(self) -> dict[str, Any]:
        """Returns what looks at the first frame of a video, by folder; nothing for most bases."""
        if not self.family.vision:
            return {}
        place = self._place_of("image_encoder")
        cls = getattr(transformers, self.family.vision)
        with self._loading("image encoder", f"a {self.family.vision}", place, "--base_config"):
            return {
                "image_encoder": cls.from_pretrained(
                    place, subfolder="image_encoder", dtype=self.dtype
                ),
                "image_processor": transformers.CLIPImageProcessor.from_pretrained(
                    place, subfolder="image_processor"
                ),
            }

    def _encoder(self, name: str, file: Path | None = None, prefix: str = "") -> dict[str, Any]:
        """One text encoder with its tokenizer, from a folder or repository or from a file."""
        cls = getattr(transformers, self.family.encoders[name])
        tokenizer = self.family.tokenizers.get(name) or name.replace("text_encoder", "tokenizer")
        place = self._place_of(name)
        option, layers = self.family.files.get(name), self.family.encoder_layers
        hint = f"--base_config or --{option}" if option else "--base_config"
        with self._loading(
            name, f"{name} and {tokenizer}", place, hint, place if file is None else file
        ):
            if file is None:
                encoder = text_encoder_of_folder(cls, place, name, self.dtype, layers)
            else:
                config = cls.config_class.from_pretrained(place, subfolder=name)
                with explained(f"the weights of a {cls.__name__}", str(file), hint):
                    encoder = load_text_encoder(file, cls, config, self.dtype, prefix, layers)
            words = transformers.AutoTokenizer.from_pretrained(place, subfolder=tokenizer)
        return {name: encoder, tokenizer: self.family.reader(words)}

    def _beside_encoders(self) -> dict[str, Any]:
        """What else the captions of a family pass: a conditioner, and further tokenizers."""
        parts, folder = {}, "text_conditioner"
        if self.family.conditioner:
            cls: Any = getattr(diffusers, self.family.conditioner)
            place, file = self._place_of(folder), self.file
            inside = file is not None and file.has(folder)
            read = file.path if file is not None and inside else place
            with self._loading(folder, f"a {cls.__name__}", place, "--base_config", read):
                if file is not None and inside:
                    parts[folder] = file.model(cls, place, folder, self.dtype)
                else:
                    parts[folder] = cls.from_pretrained(
                        place, subfolder=folder, torch_dtype=self.dtype
                    )
        for name in self.family.words:
            place = self._place_of(name)
            with self._loading(name, f"the tokenizer {name}", place, "--base_config"):
                parts[name] = transformers.AutoTokenizer.from_pretrained(place, subfolder=name)
        return parts

    def _pooled_clip(self) -> dict[str, Any]:
        place = self.config.text_encoder or _CLIP
        with self._loading("CLIP", "CLIP's text encoder and tokenizer", place, "--text_encoder"):
            whole = (Path(place) / "text_encoder").is_dir()
            encoder, tokenizer = ("text_encoder", "tokenizer") if whole else ("", "")
            return {
                "text_encoder": transformers.CLIPTextModel.from_pretrained(
                    place, subfolder=encoder, dtype=self.dtype
                ),
                "tokenizer": transformers.AutoTokenizer.from_pretrained(place, subfolder=tokenizer),
            }

    def _around(self) -> str | None:
        """Folder or repository of the parts around the denoiser."""
        if self.source.kind == "pipeline":
            return self.config.base_config or self.source.place
        usual = self.file.usual_config if self.source.kind == "single" and self.file else None
        return self.config.base_config or usual or self.base.hub_id

    def _place_of(self, part: str) -> str:
        """Folder or repository of a part around the denoiser."""
        around = self._around()
        if around is None or (self.base.hub_id is not None and not _has(around, part)):
            around = self.base.hub_id  # as --method full leaves a folder without text encoders
        return str(around)

    def _config(self) -> str:
        """Where the configuration of what is in a single file comes from."""
        place = self._around()
        if place is None:
            raise PatchError(
                f"expected --base_config for the single file {self.source.place}, because base "
                f"{self.base.name} has no usual repository, found none: name a diffusers folder or "
                "hub id with its configuration."
            )
        return place

    def _subfolder(self) -> str | None:
        if self.source.kind == "denoiser":
            return None
        return denoiser_folder(self.config, self.base, self.source, self.family.denoiser)

    def _is_original(self) -> bool:
        assert self.file is not None
        if self.file.is_original:  # Sana's looks like PixArt's, and diffusers reads it
            return self.family.model not in SINGLE_FILE_LOADABLE_CLASSES
        return self.source.kind == "original"

    def _file_has(self, part: str) -> bool:
        if self.file is None or not (part and self.family.pipeline):
            return False
        return self.file.has(part)

    def _chosen_vae(self) -> str | None:
        chosen = self.config.vae or self.config.ae
        return None if chosen is None else str(Path(chosen).expanduser())

    def _vae_place(self) -> tuple[str, str | None]:
        """Where the configuration of the VAE is, and its weights unless they are in a file."""
        chosen, usual = self._chosen_vae(), self.family.vae_id
        if chosen is not None and not Path(chosen).is_file():
            # --vae names the folder or repository of a VAE alone, or a whole pipeline.
            return chosen, "vae" if (Path(chosen) / "vae").is_dir() else None
        around = self._around()
        if around is not None and _has(around, "vae"):
            return around, "vae"
        return (usual, None) if usual is not None else (str(self.base.hub_id), "vae")


def _has(place: str, part: str) -> bool:
    """Whether a folder has a part; of a repository it is assumed."""
    return not Path(place).is_dir() or (Path(place) / part).is_dir()
