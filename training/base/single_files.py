"""Single files of weights: which parts of a pipeline one holds, and how each is read."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmp_common import PatchError
from dmp_common.bases.detect import PREFIXES
from training.base.families import checkpoint
from training.base.families.dit import set_frequency_shift
from training.base.vae_files import READERS

_UNET_INPUT, _PREFIX = "input_blocks.0.0.weight", "model.diffusion_model."
# What comes before the names of the tensors of a part, by the option that replaces the part:
# in files of Stable Diffusion 1 and 2, of SDXL, and of SD3 and ComfyUI.
_PREFIXES = {
    "transformer": (_PREFIX,),
    "vae": ("first_stage_model.", "vae."),
    "clip_l": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "clip_g": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "t5xxl": (
        "text_encoders.t5xxl.",
        "text_encoders.umt5xxl.",
        "text_encoders.pile_t5xl.",
        "text_encoders.byt5_small.",
    ),
    "text_encoder": (
        "text_encoders.gemma2_2b.",
        "text_encoders.qwen3_4b.",
        "text_encoders.qwen25_7b.",
        "text_encoders.qwen3vl_4b.",
        "text_encoders.qwen3_8b.",
        "text_encoders.mistral3_24b.",
        "text_encoders.ministral3_3b.",
        "text_encoders.qwen3_06b.",
    ),
    # Of Anima, inside of its transformer.
    "text_conditioner": tuple(f"{prefix}llm_adapter." for prefix in sorted(PREFIXES, key=len)),
}

_VAGUE = ("black-forest-labs/FLUX.2-dev", "hunyuanvideo-community/HunyuanVideo")


class SingleFile:
    """A file with a denoiser, and maybe the parts around it. Use it as a context manager.

    Args:
        path: a `.safetensors` or `.sft` file, or one written by torch.save; nothing in it is run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SingleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of its tensors."""
        return checkpoint.shapes_of(self.path)

    @property
    def is_original(self) -> bool:
        """Whether it is a DiT or PixArt in the naming of the original code."""
        return checkpoint.is_transformer(self.shapes)

    def require_reader(self, model: str, base: str) -> None:
        """Refuses the file if diffusers reads no single files of a denoiser's class.

        Args:
            model: name of the class in diffusers.
            base: name of the base, for the error.
        """
        if model not in (*SINGLE_FILE_LOADABLE_CLASSES, *READERS):
            raise PatchError(
                f"expected a diffusers folder or hub id, or a checkpoint of the original DiT or "
                f"PixArt, for base {base}, found the file {self.path}: diffusers reads no single "
                f"files of a {model}."
            )

    def has(self, part: str) -> bool:
        """Whether it holds a part, which is named as the option that replaces it."""
        return any(name.startswith(_PREFIXES[part]) for name in self.shapes)

    @cached_property
    def usual_config(self) -> str | None:
        """The repository whose configuration fits such a file, None where diffusers knows none.

        It tells FLUX.1-schnell from FLUX.1-dev, for example. All of FLUX.2 is dev to diffusers, and
        HunyuanImage is HunyuanVideo: the base tells better.
        """
        blank = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        fetch: Any = fetch_diffusers_config
        found, default = fetch(blank), fetch({})
        place = str(found["pretrained_model_name_or_path"])
        vague = (default["pretrained_model_name_or_path"], *_VAGUE)
        return None if place in vague else place

    @cached_property
    def readable(self) -> str:
        """The path of a file that diffusers reads: a pickled one is rewritten as safetensors."""
        if self.path.suffix not in checkpoint.PICKLED:
            return str(self.path)
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        copy = Path(folder) / f"{self.path.stem}.safetensors"
        tensors = checkpoint.read_tensors(self.path)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy)
        return str(copy)

    def model(self, cls: Any, config: str, folder: str, dtype: torch.dtype) -> Any:
        """One model of the file.

        Args:
            cls: its class in diffusers.
            config: a diffusers folder or hub id with its configuration.
            folder: of the configuration there.
            dtype: of the weights.

        Raises:
            PatchError: some of its tensors are not in the file.
        """
        given: Any = self.readable
        read = READERS.get(cls.__name__)
        if read is not None:
            settings = dict(cls.load_config(config, subfolder=folder))
            return read(_part(given, _PREFIXES[folder]), cls, settings, self.path, dtype)
        if folder == "unet" and _UNET_INPUT in self.shapes:
            # diffusers knows the original UNet with this prefix only.
            given = {_PREFIX + name: value for name, value in load_file(given).items()}
        elif folder == "transformer" and any(name.startswith(_PREFIX) for name in self.shapes):
            given = _part(given, (_PREFIX,))  # diffusers does not know it of every transformer
        if folder == "transformer" and self.has("text_conditioner"):
            whole = given if isinstance(given, dict) else load_file(given)
            inside = _PREFIXES["text_conditioner"]
            given = {name: value for name, value in whole.items() if not name.startswith(inside)}
        model = cls.from_single_file(given, config=config, subfolder=folder, torch_dtype=dtype)
        # diffusers leaves weights that the file lacks without values.
        missing = [name for name, value in model.named_parameters() if value.is_meta]
        if missing:
            raise PatchError(
                f"{self.path}: expected the weights of a {cls.__name__}, found none for "
                f"{len(missing)} of its tensors ({', '.join(missing[:3])}): choose another file."
            )
        return model

    def text_prefix(self, part: str) -> str | None:
        """What comes before the names of a text encoder, where they are those of transformers.

        They are not for the OpenCLIP of Stable Diffusion 2 and SDXL, which `encoders` loads.
        """
        for prefix in _PREFIXES[part]:
            if any(name.startswith(f"{prefix}transformer.") for name in self.shapes):
                return f"{prefix}transformer."
        return None

    def encoders(
        self, pipeline: Any, names: list[str], config: str, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Text encoders of the file with their tokenizers, by folder; the rest is not loaded."""
        wanted = {*names, *(name.replace("text_encoder", "tokenizer") for name in names)}
        parameters = inspect.signature(pipeline).parameters.values()
        parts = {p.name for p in parameters if p.default in (inspect.Parameter.empty, None)}
        without = dict.fromkeys(parts - wanted)
        loaded = pipeline.from_single_file(
            self.readable, config=config, torch_dtype=dtype, **without
        )
        return {name: getattr(loaded, name) for name in sorted(wanted)}

    def original_config(self) -> dict[str, Any]:
        """The configuration of an original DiT or PixArt, from the shapes of its tensors."""
        self._require_original()
        return checkpoint.infer_config(
            {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        )

    def original(self, cls: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
        """A DiT or PixArt from the checkpoint of the original code.

        Args:
            cls: its class in diffusers.
            config: its configuration there.
        """
        self._require_original()
        pickled = self.path.suffix in checkpoint.PICKLED
        tensors = checkpoint.read_tensors(self.path) if pickled else load_file(self.path)
        model = cls.from_config(config)
        model.load_state_dict(checkpoint.rename(tensors))
        if not checkpoint.is_pixart(tensors):
            set_frequency_shift(model, 0.0)  # diffusers' DiT has 1, the original 0
        return model.to(dtype)

    def _require_original(self) -> None:
        if not self.is_original:
            raise PatchError(
                f"{self.path}: expected the weights of an original DiT or PixArt, found "
                f"{', '.join(list(self.shapes)[:3])}: choose such a checkpoint."
            )


def _part(path: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a part of a file, under its own names; all of them in a file of its own."""
    with safe_open(path, framework="pt") as file:
        known = list(file.keys())
        prefix = next((p for p in prefixes if any(n.startswith(p) for n in known)), "")
        names = [name for name in known if name.startswith(prefix)]
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def vae_of_file(path: Path, cls: Any, config: str, dtype: torch.dtype) -> Any:
    """A VAE from a file of its own, in the original naming or in that of diffusers.

    Args:
        cls: its class in diffusers.
        config: a diffusers folder or hub id with its configuration, in the folder `vae`.
    """
    with SingleFile(path) as file:
        return file.model(cls, config, "vae", dtype)
