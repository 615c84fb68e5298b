"""A patch on a ComfyUI model: checked when it is attached, at work in each call of the model.

ComfyUI calls our wrapper around `BaseModel.apply_model`, which knows the noise level and comes
before any compiled code. The wrapper fills the model's slots (`slots.py`) for that one call. It
hangs on a clone of the host's model handle; the model itself is shared and never written to.
"""

from __future__ import annotations

import dataclasses
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from comfyui_dmp.checks import (
    require_not_compiled,
    require_same_prediction,
    require_supported,
    require_usable,
)
from comfyui_dmp.compiled import own_graph
from comfyui_dmp.model import (
    denoiser_of,
    is_compiled,
    latent_of,
    time_embedding,
    timesteps_of,
)
from comfyui_dmp.slots import (
    Prepare,
    after_options,
    block_keys,
    dit_options,
    hooked,
    slot_of,
    unet_options,
)
from dmp_common import Context, Patch, PatchError, Settings
from dmp_common.attach.record import LoadedPatch, PatchRecord

KEY = "dmp"  # of our wrappers on a model
FOLDER = "dmp"  # in models/

_loaded: weakref.WeakValueDictionary[tuple[object, ...], LoadedPatch] = (
    weakref.WeakValueDictionary()
)


def attach(model: Any, record: PatchRecord) -> Any:
    """A clone of a MODEL with a patch on it; several patches add.

    Args:
        model: ComfyUI's `ModelPatcher`; not changed.
        record: the patch and how it is to be used.

    Raises:
        PatchError: the model is not supported, of another base or another prediction type than
            the patch's, or the patch prepends its prompts.
    """
    require_supported(model.model, record)
    require_usable(model.model, record)
    wrapper = Wrapper(record)
    wrapper.settings(model.get_model_object("model_sampling"))  # checks them
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, wrapper.release)
    return clone


class Wrapper:
    """What ComfyUI calls around each call of a model with a patch. Holds nothing of a call."""

    def __init__(self, record: PatchRecord) -> None:
        self.record = record
        self._base = record.loaded.patch.base
        self._slot = slot_of(self._base)
        acting = record.loaded.patch.sites
        self._sites = {
            name: site
            for name, site in acting.items()
            if record.sites is None or name in record.sites
        }
        self._keys = {
            key: name for key, name in block_keys(self._base).items() if name in self._sites
        }
        self._known: tuple[Any, Settings] | None = None

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Any:
        """One call of the model.

        Args:
            executor: calls the next wrapper, at last the model.
            x: noisy latents (B, C, H, W).
            t: their sigmas (B,).
            transformer_options: the host's options for this call; not changed.
            conds: other conditions, among them the reference latents of Flux Kontext.
        """
        options = transformer_options or {}
        model = executor.class_obj
        settings = self.settings(model.model_sampling)
        timesteps = None
        patch = self.record.loaded.patch
        if self._slot in ("dit", "after") or patch.needs_timesteps(settings):
            timesteps = timesteps_of(model.model_sampling, self._base, t)
        strength = patch.strengths(settings, timesteps)
        if isinstance(strength, float) and strength == 0.0:
            return executor(x, t, c_concat, c_crossattn, control, options, **conds)

        prepare = self._prepare(model, x, settings, timesteps, conds)
        with ExitStack() as stack:
            compiled = is_compiled(model, options)
            if self._slot == "hooks":
                require_not_compiled(model, options)
                labels = patch.variant.condition == "t+y"
                stack.enter_context(hooked(denoiser_of(model), self._sites, prepare, labels))
            elif self._slot == "unet":
                facts: object = settings
                options = unet_options(options, self._keys, prepare)
            else:
                context = prepare(time_embedding(model, self._base, timesteps))
                facts = settings, context.weights.shape
                context = _for_compiled(context) if compiled else context
                if self._slot == "dit":
                    options = dit_options(options, self._keys, context)
                else:
                    refiners = len(denoiser_of(model).get_submodule("noise_refiner"))
                    options = after_options(options, self._keys, context, refiners)
            if compiled:
                stack.enter_context(own_graph(denoiser_of(model), (patch.variant, facts)))
            return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    def settings(self, model_sampling: Any) -> Settings:
        """The core's settings for how a model samples now; other nodes may have changed it.

        Raises:
            PatchError: it predicts another thing, or runs on other timesteps, than the patch's.
        """
        if self._known is None or self._known[0] is not model_sampling:
            require_same_prediction(model_sampling, self.record)

            def to_timestep(percent: float) -> float:
                sigma = torch.tensor([model_sampling.percent_to_sigma(percent)])
                return float(timesteps_of(model_sampling, self._base, sigma))

            self._known = model_sampling, self.record.settings(to_timestep)
        return self._known[1]

    def release(self, patcher: Any, unload: bool) -> None:
        """The model was unloaded, or (not `unload`) another clone of it takes over."""
        if unload:
            self.record.loaded.patch.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapper:
        return self

    def _prepare(
        self,
        model: Any,
        x: Tensor,
        settings: Settings,
        timesteps: Tensor | None,
        conds: dict[str, Any],
    ) -> Prepare:
        """What makes the context of a call, once its time embedding is known."""
        patch = self.record.loaded.patch.on(x.device)  # now: compiled code cannot copy
        latent = latent_of(model, self._base, x, conds)

        def prepare(e: Tensor) -> Context:
            return patch.prepare(
                e,
                latent.size,
                settings,
                timesteps=timesteps,
                image_tokens=latent.image_tokens,
            )

        return prepare


def _for_compiled(context: Context) -> Context:
    """A context for compiled graphs: no memory of fields, and no numbers they would make fixed."""
    strength = torch.as_tensor(context.strength)
    return dataclasses.replace(context, key=None, cache=None, strength=strength)


def gate_embedding(
    model: Any, record: PatchRecord, scheduler: str, steps: int, label: int
) -> tuple[Tensor, Tensor]:
    """What the gate of a patch sees of a model, for heat maps.

    Args:
        model: ComfyUI's `ModelPatcher`; it need not be loaded.
        scheduler, steps: whose noise levels.
        label: class, for patches with condition t+y.

    Returns:
        e (T, E), float32, and its timesteps (T,), on the scale 0..1000; both on the CPU.
    """
    patch, base_model = record.loaded.patch, model.model
    require_supported(base_model, record)
    model_sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, scheduler, steps)
    timesteps = timesteps_of(model_sampling, patch.base, sigmas[sigmas > 0]).cpu()
    denoiser = denoiser_of(base_model)
    device = next(denoiser.get_submodule(patch.base.times["ldm"].mlp).parameters()).device
    with torch.no_grad():
        e = time_embedding(base_model, patch.base, timesteps.to(device)).float()
        if patch.variant.condition == "t+y":
            table = denoiser.get_submodule("y_embedder.embedding_table")
            if not 0 <= label < table.num_embeddings:
                raise PatchError(
                    f"{record.loaded.name}: expected a class label from 0 to "
                    f"{table.num_embeddings - 1}, found {label}: choose one that the model knows."
                )
            e = e + table.weight[label].float()
    return e.cpu(), timesteps


def register_folder() -> None:
    """Makes models/dmp known to ComfyUI, besides the folders of extra_model_paths.yaml."""
    folder = Path(folder_paths.models_dir) / FOLDER
    with suppress(OSError):  # models that nobody may write to: the other folders still serve
        folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(folder))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def patch_files() -> list[str]:
    """The patch files users can choose, by their path in the folder."""
    names: list[str] = folder_paths.get_filename_list(FOLDER)
    return names


def load(name: str) -> PatchRecord:
    """A patch file by its name in the list; one that is still in use is not read again.

    Raises:
        PatchError: not a patch, or a damaged one.
    """
    path = Path(folder_paths.get_full_path_or_raise(FOLDER, name))
    key = (str(path), *_state(path))
    loaded = _loaded.get(key)
    if loaded is None:
        loaded = LoadedPatch(Patch.load(path), path)
        _loaded[key] = loaded
    return PatchRecord(loaded)


def fingerprint(name: str) -> str:
    """Changes whenever a patch file is replaced."""
    path = folder_paths.get_full_path(FOLDER, name)
    return "" if path is None else str((path, *_state(Path(path))))


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size
