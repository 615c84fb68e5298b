"""The node that encodes a list of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from comfyui_dmp import inputs
from dmp_common import PatchError

NO_FILE = "None"


class Prompts(io.ComfyNode):
    """Encodes a list of prompts, one on each line."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        found = [NO_FILE, *_text_files()]
        return inputs.schema(
            aliases="dmp, prompt list, captions, text file, multiple prompts",
            node_id="DMP_Prompts",
            display_name="DMP Prompt List",
            description=(
                "Encodes prompts, one on each line, as a list of conditionings for Train DMP "
                "Patch. Empty lines and lines that begin with # are left out."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.String.Input(
                    "text", multiline=True, default="", tooltip="Prompts, one on each line."
                ),
                io.Combo.Input(
                    "file",
                    options=found,
                    default=NO_FILE,
                    tooltip=(
                        "A .txt file of ComfyUI's input folder with more prompts, or None. Press R "
                        "after adding a file."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditionings",
                    is_output_list=True,
                    tooltip="One conditioning for each prompt.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> str:
        file = values.get("file", NO_FILE)
        path = None if file == NO_FILE else Path(folder_paths.get_input_directory()) / file
        state = path.stat().st_mtime_ns if path is not None and path.is_file() else 0
        return str((values.get("text"), file, state))

    @classmethod
    def execute(cls, clip: Any, text: str, file: str = NO_FILE) -> io.NodeOutput:
        if clip is None:
            raise PatchError(
                "expected a CLIP to encode prompts, found none: connect the text encoder of the "
                "model; some checkpoints hold none and need a loader of their own."
            )
        lines = text.splitlines() + ([] if file == NO_FILE else _lines_of(file))
        prompts = [line.strip() for line in lines]
        prompts = [line for line in prompts if line and not line.startswith("#")]
        if not prompts:
            raise PatchError(
                "expected one prompt or more, found none: write one on each line, or choose a file."
            )
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in prompts]
        return io.NodeOutput(encoded)


def _text_files() -> list[str]:
    """Lists the .txt files of ComfyUI's input folder."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in folder.glob("*.txt")) if folder.is_dir() else []


def _lines_of(file: str) -> list[str]:
    """Reads the lines of a file of the input folder.

    Raises:
        PatchError: there is no such file in it, or it is no text.
    """
    if file not in _text_files():
        raise PatchError(
            f"expected a .txt file of ComfyUI's input folder, found {file!r}: put it there and "
            "press R."
        )
    path = Path(folder_paths.get_input_directory()) / file
    try:
        return path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise PatchError(
            f"expected text in UTF-8 in {file}, found other bytes ({error.reason}): save it as "
            "UTF-8."
        ) from error
