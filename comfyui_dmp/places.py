"""Tells ComfyUI's page at which places a patch file acts, for the menu of DMP Gate Strength."""

from __future__ import annotations

import sys
from typing import Any

import folder_paths

from comfyui_dmp.files import FOLDER, refusal
from dmp_common.errors import PatchError
from dmp_common.patch.file import read_header
from dmp_common.tools import written

PATH = "/dmp/places"


def register() -> None:
    """Adds our route to ComfyUI's server, where there is one."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is None or any(getattr(route, "path", "") == PATH for route in instance.routes):
        return

    from aiohttp import web  # ComfyUI's server brings it.

    async def answer(request: Any) -> Any:
        body = answer_about(request.query.get("patch", ""))
        return web.json_response(body, status=404 if "error" in body else 200)

    instance.routes.get(PATH)(answer)


def answer_about(name: str) -> dict[str, Any]:
    """Returns the words for places of a patch file, or an error for its user.

    Args:
        name: the file, as Load DMP Patch lists it.
    """
    problem = refusal(name)
    if problem is not None:
        return {"error": problem}
    try:
        header = read_header(folder_paths.get_full_path_or_raise(FOLDER, name))
    except PatchError as error:
        return {"error": str(error)}
    return {"places": written.places(header.variant)}
