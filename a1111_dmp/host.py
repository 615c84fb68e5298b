"""What the host is asked for: its model, its folders, its sampling.

One code path for A1111, Forge, reForge and Forge Classic; they differ in where the model is and in
what says what it predicts.
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

from a1111_dmp.choice import Choice, to_infotext
from a1111_dmp.files import Folder
from a1111_dmp.session import Model, Session
from dmp_common import Base, PatchError
from dmp_common.attach.record import PatchRecord
from dmp_common.bases.detect import find_denoiser, prediction_of
from dmp_common.tools.heatmap import even_timesteps, gate_heatmap, time_embedding_of

_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "const": "flow"}  # A1111's and Forge's words
_log = logging.getLogger(__name__)
_running: list[Session] = []  # those whose sampling is under way


@lru_cache(maxsize=1)
def folder() -> Folder:
    """The folder of patches: models/DMP, or what --dmp-dir says."""
    given = getattr(shared.cmd_opts, "dmp_dir", None)
    root = Path(given) if given else Path(paths.models_path) / "DMP"
    root.mkdir(parents=True, exist_ok=True)
    return Folder(root.resolve())


def current_model() -> Model:
    """The host's model now.

    Raises:
        PatchError: none is loaded.
    """
    model = shared.sd_model
    info = getattr(model, "sd_checkpoint_info", None)
    if info is None:
        raise PatchError(
            "expected a loaded checkpoint, found none yet: choose one, and make a picture with it."
        )
    sampling = _sampling(model)
    return Model(
        denoiser=find_denoiser(model),
        checkpoint=str(info.filename),
        prediction=_prediction(model, sampling),
        to_timestep=partial(_to_timestep, sampling),
        replaced=None if sd_unet.current_unet is None else _label(sd_unet.current_unet),
    )


def _label(unet: Any) -> str:
    return str(getattr(getattr(unet, "option", None), "label", None) or type(unet).__name__)


def _sampling(model: Any) -> Any:
    """Forge's `predictor`, or the `model_sampling` of its siblings; None in A1111."""
    objects = getattr(model, "forge_objects", None)
    if objects is None:
        return None
    unet = objects.unet
    replaced = getattr(unet, "object_patches", {})  # extensions exchange it so
    own = getattr(unet.model, "predictor", None) or unet.model.model_sampling
    return replaced.get("predictor", replaced.get("model_sampling", own))


def _prediction(model: Any, sampling: Any) -> str | None:
    """What a model predicts, in our words; None where the host does not say."""
    if sampling is None:
        said = getattr(model, "parameterization", None)
    else:
        said = getattr(sampling, "prediction_type", None) or prediction_of(sampling)
    return None if said is None else _PREDICTIONS.get(said, str(said))


def _to_timestep(sampling: Any, base: Base, percent: float) -> float:
    """From progress to a timestep (0..1000), by the host's rule.

    A1111 has none but that of its refiner, which is linear in the timestep; ComfyUI's and Forge's
    for the same models gives the same numbers.
    """
    if sampling is None:
        return (1.0 - percent) * 999.0
    sigma = torch.tensor([sampling.percent_to_sigma(percent)])
    return float(base.times["ldm"].timesteps(sampling.timestep(sigma)))


def session_of(p: Any) -> Session:
    """The session of a generation; the first call puts it around the generation's sampling.

    Scripts copy `p` with all its attributes, so one that belongs to another is replaced.
    """
    session: Session | None = getattr(p, "dmp_session", None)
    sampling = vars(p).get("sample")
    if session is None or p.dmp_owner() is not p:
        session = Session(current_model, _stopped, partial(_tell, weakref.ref(p)))
        p.dmp_session, p.dmp_owner = session, weakref.ref(p)
    if isinstance(sampling, Sampling) and sampling.session is not session:
        sampling = sampling.inner  # of the one it was copied from
    if not isinstance(sampling, Sampling):
        # An attribute, because others put theirs there too; it hides the method of the class.
        p.sample = Sampling(p, session, sampling)
    return session


class Sampling:
    """`p.sample` with the patches attached meanwhile.

    There the checkpoint is settled, errors are not swallowed, and both passes of hires fix run.

    Args:
        p: the generation; not kept alive.
        session: its session.
        inner: what stood in the place of the method before, by another extension.
    """

    def __init__(self, p: Any, session: Session, inner: Callable[..., Any] | None) -> None:
        self._p, self.session, self.inner = weakref.ref(p), session, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        p = self._p()
        inner = self.inner or partial(type(p).sample, p)
        if self.session.running:  # another extension has put its own around ours
            return inner(*args, **kwargs)
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
    """Before each call of the model, after the host may have exchanged it."""
    for session in _running:
        session.follow()


def close_all() -> None:
    """Takes everything off the model: the scripts are being unloaded."""
    for session in _running:
        session.close()


def _stopped() -> bool:
    return bool(shared.state.interrupted or shared.state.skipped)


def _tell(p: Callable[[], Any], text: str) -> None:
    _log.warning(text)
    generation = p()
    if hasattr(generation, "comment"):
        generation.comment(text)


def records(choices: list[Choice], prefix: str) -> tuple[list[PatchRecord], dict[str, Any]]:
    """The patches of some choices, and what an infotext says about them."""
    result, texts = [], {}
    for slot, choice in enumerate(choices):
        if not choice.empty:
            record, known = choice.record(folder())
            result.append(record)
            texts |= to_infotext(prefix, slot, choice, known)
    return result, texts


def set_infotext(p: Any, prefix: str, texts: Mapping[str, Any]) -> None:
    """Replaces what the infotext says under a prefix; scripts share one between generations."""
    others = ("DMP script ", "DMP hashes")
    for key in [k for k in p.extra_generation_params if k.startswith(prefix + " ")]:
        if prefix != "DMP" or not key.startswith(others):
            del p.extra_generation_params[key]
    p.extra_generation_params.update(texts)


def say_unused(p: Any, why: str) -> None:
    """Lets the infotext tell what happened in place of what was asked for."""
    for key in [k for k in p.extra_generation_params if k.startswith("DMP ")]:
        del p.extra_generation_params[key]
    p.extra_generation_params["DMP not applied"] = why


def heat_map(choices: list[Choice]) -> Image.Image:
    """The gates of the chosen patches for the checkpoint that is loaded, below one another.

    The time embedding is read from the checkpoint's file: the loaded one may be sampling with hooks
    on it, in half precision, or partly on another device.

    Raises:
        PatchError: no patch is chosen, or one is for another base.
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
    width, height = max(p.width for p in pictures), sum(p.height for p in pictures)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:index])))
    return sheet


def leave_path() -> None:
    """Takes the repository off `sys.path`, where Forge puts and leaves every extension.

    It would come before everything else there, with folders called `tests` and `training`.
    """
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]


def register() -> None:
    """Asks the host to call us; it forgets this when scripts are loaded again."""
    script_callbacks.on_cfg_denoiser(follow)
    script_callbacks.on_script_unloaded(close_all)
    script_callbacks.on_before_ui(leave_path)
