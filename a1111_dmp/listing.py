"""The patches that users can choose from: for the controls, and for the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from modules import script_callbacks, sd_models

from a1111_dmp import host, options
from a1111_dmp.files import NONE, marked
from dmp_common import PatchError, get_base
from dmp_common.bases.detect import find_denoiser, naming_of


def choices() -> list[str]:
    """Lists the patches for the controls; those of another base than the loaded model's are marked.

    They are marked like checkpoints with their hash, "oil [sdxl]", and such a text is a name too;
    or they are left out, by the settings.
    """
    known = host.folder()
    denoiser = _loaded_denoiser()
    result = [NONE]
    for name, path in known.files().items():
        try:
            base = known.described(path)["base"]
        except PatchError:
            result.append(marked(name, "unusable"))
            continue
        if _fits(denoiser, base) is not False:
            result.append(name)
        elif options.show_all():
            result.append(marked(name, base))
    return result


def hidden(base: str | None) -> bool:
    """Tells whether the cards of patches for a base are left out now, by the settings.

    Args:
        base: None for a file that cannot be used, whose card says why.
    """
    if base is None or options.show_all():
        return False
    return _fits(_loaded_denoiser(), base) is False


def described() -> list[dict[str, Any]]:
    """Describes every patch of the folder, for the API; `error` says why one cannot be used."""
    known, denoiser = host.folder(), _loaded_denoiser()
    return [_described(name, path, denoiser) for name, path in known.files().items()]


def _described(name: str, path: Path, denoiser: Any) -> dict[str, Any]:
    try:
        record = host.folder().described(path)
    except PatchError as error:
        return {"name": name, "error": str(error)}
    return {
        "name": name,
        "hash": record["hash"],
        "base": record["base"],
        "fits_loaded_model": _fits(denoiser, record["base"]),
        "variant": record["variant"],
        "use": record["use"],
    }


def _fits(denoiser: Any, base: str) -> bool | None:
    """Tells whether a model is of a base; None without a model."""
    return None if denoiser is None else naming_of(denoiser, get_base(base)) is not None


def _loaded_denoiser() -> Any:
    """Returns the denoiser of the loaded model, None without one. It never loads one."""
    # The host makes its tabs while it loads its first model; `shared.sd_model` would wait for it.
    model = getattr(getattr(sd_models, "model_data", None), "sd_model", None)
    if getattr(model, "sd_checkpoint_info", None) is None:
        return None
    try:
        return find_denoiser(model)
    except PatchError:
        return None


def routes(blocks: Any, app: FastAPI) -> None:
    """Adds our addresses to the host's API: GET /dmp/patches and POST /dmp/refresh.

    The folder is read in every request, so the second one gives the same answer as the first; it
    is there because users of the API look for it beside those of other kinds of files.
    """
    app.add_api_route("/dmp/patches", described, methods=["GET"])
    app.add_api_route("/dmp/refresh", described, methods=["POST"])


def register() -> None:
    """Asks the host to call `routes` when its API is there."""
    script_callbacks.on_app_started(routes)
