"""All access to the host: its model, its folders and its sampling.

A1111, Forge, reForge and Forge Classic share this code. They differ only in where the model is and
in how they name its prediction type.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from modules import paths, script_callbacks, sd_unet, shared
from PIL import Image

from a1111_dmp import options
from a1111_dmp.choice import Choice
from a1111_dmp.conditions import pictures_of
from a1111_dmp.files import Folder
from a1111_dmp.infotext import to_infotext
from a1111_dmp.session import Model, Session
from dmp_common import Base, PatchError
from dmp_common.attach.record import PatchRecord
from dmp_common.bases.detect import find_denoiser, prediction_of
from dmp_common.patch.noise import ends_in_pure_noise, is_pure_noise
from dmp_common.tools.heatmap import even_timesteps, gate_heatmap, time_embedding_of

_PREDICTIONS = {
    "eps": "epsilon",
    "v": "v_prediction",
    "const": "flow",
    "ModelSamplingDiscreteFlow": "flow",  # the class that SD3 has in A1111
}  # A1111 and Forge use these names.
_log = logging.getLogger(__name__)
_running: list[Session] = []  # The sessions that are sampling now.


@lru_cache(maxsize=1)
def folder() -> Folder:
    """Returns the folder of patches: models/DMP, or the folder given by --dmp-dir."""
    given = getattr(shared.cmd_opts, "dmp_dir", None)
    root = Path(given) if given else Path(paths.models_path) / "DMP"
    root.mkdir(parents=True, exist_ok=True)
    return Folder(root.resolve(), options.kept)


def current_model() -> Model:
    """Describes the model that the host has loaded now.

    Raises:
        PatchError: no model is loaded.
    """
    model = shared.sd_model
    info = getattr(model, "sd_checkpoint_info", None)
    if info is None:
        raise PatchError(
            "expected a loaded checkpoint, found none yet: choose one and generate a picture first."
        )
    sampling = _sampling(model)
    return Model(
        denoiser=find_denoiser(model),
        checkpoint=str(info.filename),
        prediction=_prediction(model, sampling),
        to_timestep=partial(_to_timestep, sampling),
        zero_terminal_snr=_zero_terminal_snr(model, sampling),
        replaced=None if sd_unet.current_unet is None else _label(sd_unet.current_unet),
    )


def _label(unet: Any) -> str:
    return str(getattr(getattr(unet, "option", None), "label", None) or type(unet).__name__)


def _sampling(model: Any) -> Any:
    """Returns Forge's `predictor`, or `model_sampling` in reForge and Classic.

    In A1111 SD3 alone has one, beside a `parameterization` that is not its own; None for others.
    """
    objects = getattr(model, "forge_objects", None)
    if objects is None:
        return getattr(getattr(model, "model", None), "model_sampling", None)
    unet = objects.unet
    replaced = getattr(unet, "object_patches", {})  # Extensions replace the object here.
    own = getattr(unet.model, "predictor", None) or unet.model.model_sampling
    return replaced.get("predictor", replaced.get("model_sampling", own))


def _prediction(model: Any, sampling: Any) -> str | None:
    """Returns the prediction type under our name for it; None where the host does not say."""
    if sampling is None:
        said = getattr(model, "parameterization", None)
    else:
        said = getattr(sampling, "prediction_type", None) or prediction_of(sampling)
    return None if said is None else _PREDICTIONS.get(said, str(said))


def _zero_terminal_snr(model: Any, sampling: Any) -> bool | None:
    """Tells whether the model's schedule ends in pure noise, also where a setting of the host made
    it so; None for models whose schedule cannot."""
    if _prediction(model, sampling) not in ("epsilon", "v_prediction"):
        return None
    if sampling is not None:
        greatest = getattr(sampling, "sigma_max", None)
        return None if greatest is None else is_pure_noise(float(greatest))
    alphas = getattr(model, "alphas_cumprod", None)
    return None if alphas is None else ends_in_pure_noise(alphas)


def _to_timestep(sampling: Any, base: Base, percent: float) -> float:
    """Converts progress (0 to 1) to a timestep (0 to 1000) by the host's rule.

    A1111 has such a rule only for its refiner: it is linear in the timestep. For the same models
    the rule of ComfyUI and Forge gives the same numbers, and for SD3 we use that one.
    """
    if sampling is None:
        return (1.0 - percent) * 999.0
    if hasattr(sampling, "percent_to_sigma"):
        sigma = torch.tensor([sampling.percent_to_sigma(percent)])
    else:
        sigma = sampling.sigma(torch.tensor([(1.0 - percent) * 1000.0]))
    return float(base.times["ldm"].timesteps(sampling.timestep(sigma)))


def session_of(p: Any) -> Session:
    """Returns the session of a generation. The first call wraps the generation's sampling in it.

    Scripts copy `p` with all its attributes, so a session that belongs to another `p` is replaced.
    """
    session: Session | None = getattr(p, "dmp_session", None)
    sampling = vars(p).get("sample")
    if session is None or p.dmp_owner() is not p:
        session = Session(current_model, _stopped, partial(_tell, weakref.ref(p)))
        p.dmp_session, p.dmp_owner = session, weakref.ref(p)
    if isinstance(sampling, Sampling) and sampling.session is not session:
        sampling = sampling.inner  # This wrapper belongs to the `p` that ours was copied from.
    if not isinstance(sampling, Sampling):
        # Other extensions set this attribute too. It hides the method of the class.
        p.sample = Sampling(p, session, sampling)
    return session


class Sampling:
    """Replaces `p.sample`: it samples with the patches attached.

    When `p.sample` is called, the checkpoint is chosen for good. The host does not swallow its
    errors, and both passes of hires fix run inside it.

    Args:
        p: the generation, which is not kept alive.
        session: its session.
        inner: the replacement by another extension that was there before; None for the method.
    """

    def __init__(self, p: Any, session: Session, inner: Callable[..., Any] | None) -> None:
        self._p, self.session, self.inner = weakref.ref(p), session, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        p = self._p()
        inner = self.inner or partial(type(p).sample, p)
        if self.session.running:  # Another extension has wrapped our wrapper and called it again.
            return inner(*args, **kwargs)
        self.session.scale = float(getattr(p, "cfg_scale", None) or 1.0)
        others = ("refiner_checkpoint_info", "hr_checkpoint_info")
        self.session.more_models = any(getattr(p, name, None) is not None for name in others)
        with self.session:
            _running.append(self.session)
            try:
                samples = inner(*args, **kwargs)
            finally:
                _running.remove(self.session)
        if self.session.unused:
            say_unused(p, self.session.unused)
        return samples


def follow(params: Any = None) -> None:
    """Attaches to another model where needed. The host calls this before each step of a sampler.

    Args:
        params: the host's `CFGDenoiserParams`.
    """
    for session in _running:
        session.follow()
        x, text = getattr(params, "x", None), getattr(params, "text_cond", None)
        if hasattr(x, "shape") and hasattr(text, "shape"):  # SDXL's is a dictionary with a shape
            pictures = _pictures(params) if session.mixed else None
            session.conditions.step(x.shape[0], text.shape[0], pictures)


def _pictures(params: Any) -> list[int] | None:
    """Returns for each item of a step its picture in the batch, None where the host hides it."""
    read = getattr(getattr(params.denoiser, "p", None), "get_conds", None)
    parts = None if read is None else getattr(read()[0], "batch", None)
    return None if parts is None else pictures_of([len(part) for part in parts], params.x.shape[0])


def close_all() -> None:
    """Removes all patches from the model. The host calls this when it unloads the scripts."""
    for session in _running:
        session.close()


def _stopped() -> bool:
    return bool(shared.state.interrupted or shared.state.skipped)


def tell(p: Any, text: str) -> None:
    """Shows a message on the console and below the picture."""
    _log.warning(text)
    if hasattr(p, "comment"):
        p.comment(text)


def _tell(p: Callable[[], Any], text: str) -> None:
    tell(p(), text)


def records(choices: list[Choice], prefix: str) -> tuple[list[PatchRecord], dict[str, Any]]:
    """Loads the patches of all slots, and returns them with the entries for the infotext."""
    result, texts = [], {}
    for slot, choice in enumerate(choices):
        if not choice.empty:
            record, known = choice.record(folder())
            result.append(record)
            texts |= to_infotext(prefix, slot, choice, known)
    return result, texts


def set_infotext(p: Any, prefix: str, texts: Mapping[str, Any]) -> None:
    """Replaces the entries of the infotext under a prefix.

    Scripts share one infotext between generations, so the entries of the last one may be there.
    """
    others = ("DMP script ", "DMP hashes")
    for key in [k for k in p.extra_generation_params if k.startswith(prefix + " ")]:
        if prefix != "DMP" or not key.startswith(others):
            del p.extra_generation_params[key]
    p.extra_generation_params.update(texts)


def say_unused(p: Any, why: str) -> None:
    """Replaces our entries in the infotext by the reason why no patch was applied."""
    for key in [k for k in p.extra_generation_params if k.startswith("DMP ")]:
        del p.extra_generation_params[key]
    p.extra_generation_params["DMP not applied"] = why


def heat_maps(choices: list[Choice]) -> list[Image.Image]:
    """Draws the gates of the chosen patches for the loaded checkpoint.

    The time embedding is read from the checkpoint's file. The loaded model may be sampling with
    our hooks on it, may be in half precision, or may be partly on another device.

    Raises:
        PatchError: no patch is chosen, or a patch is for another base.
    """
    chosen = [choice for choice in choices if not choice.empty]
    if not chosen:
        raise PatchError("expected a patch to draw, found none: choose one above.")
    checkpoint, pictures = current_model().checkpoint, []
    for choice in chosen:
        known = folder().load(choice.patch)
        patch, steps = known.loaded.patch, even_timesteps()
        try:
            e = time_embedding_of(checkpoint, patch, steps)
        except PatchError as error:
            raise PatchError(f"{known.loaded.name}: {error}") from error
        pictures.append(gate_heatmap(patch, steps, e, title=f"Gate of {known.name}"))
    return pictures


def leave_path() -> None:
    """Removes our repository from `sys.path`, where Forge leaves every extension.

    Otherwise our folders `tests` and `training` would hide other packages of these names.
    """
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]


def register() -> None:
    """Asks the host to call us. It must be asked again whenever the scripts are reloaded."""
    # Forge Neo shows errors alone. What a patch does not do must be seen.
    logging.getLogger("a1111_dmp").setLevel(logging.WARNING)
    script_callbacks.on_cfg_denoiser(follow)
    script_callbacks.on_script_unloaded(close_all)
    script_callbacks.on_before_ui(leave_path)
