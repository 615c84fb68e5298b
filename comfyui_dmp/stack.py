"""The node that puts several patches on a model, each with a switch and a strength."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from comfyui_dmp import files, host, inputs

ROWS = 4
NONE = "None"  # The choice of a row without a patch.


class Stack(io.ComfyNode):
    """Loads several patch files and attaches them in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, load patch, apply patch, lora, lora stack, multiple patches",
            node_id="DMP_Stack",
            display_name="Stack DMP Patches",
            description=(
                "Puts up to four patch files on a model, each with a switch and a strength. What "
                "they add is summed; modulating patches act from the first row to the last."
            ),
            inputs=[
                inputs.model_input(),
                *(port for row in range(1, ROWS + 1) for port in _row(row)),
            ],
            outputs=[inputs.model_output()],
        )

    @classmethod
    def validate_inputs(
        cls,
        patch_1: str | None = None,
        patch_2: str | None = None,
        patch_3: str | None = None,
        patch_4: str | None = None,
    ) -> bool | str:
        names = patch_1, patch_2, patch_3, patch_4
        return files.refusal(*(None if name == NONE else name for name in names)) or True

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> str:
        # ComfyUI does not give the values of connected inputs here.
        names = [values.get(f"patch_{row}") for row in range(1, ROWS + 1)]
        return str([files.fingerprint(name) for name in names if name not in (None, NONE)])

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        for row in range(1, ROWS + 1):
            name, strength = values[f"patch_{row}"], values[f"strength_{row}"]
            if name != NONE and values[f"on_{row}"]:
                record = dataclasses.replace(files.load(name), strength=strength)
                model = host.attach(model, record)
        return io.NodeOutput(model)


def _row(row: int) -> tuple[io.Boolean.Input, io.Combo.Input, io.Float.Input]:
    """Returns the inputs of a row, counted from 1."""
    return (
        io.Boolean.Input(f"on_{row}", default=True, tooltip="Whether the patch of this row acts."),
        io.Combo.Input(
            f"patch_{row}",
            options=[NONE, *files.patch_files()],
            default=NONE,
            tooltip="A .safetensors file of models/dmp, or None. Press R after adding a file.",
        ),
        inputs.strength_input(f"strength_{row}"),
    )
