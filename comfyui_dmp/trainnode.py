"""The node that trains a patch."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from comfyui_dmp import inputs, jobs, plots, train
from comfyui_dmp.inputs import DmpPatch
from comfyui_dmp.teacher import Drawing

_LARGEST_SEED = 2**64 - 1


class TrainPatch(io.ComfyNode):
    """Trains a patch from prompts alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return inputs.schema(
            aliases="dmp, train, training, train lora, repair, guidance, distill",
            node_id="DMP_Train",
            display_name="Train DMP Patch",
            description=(
                "Makes a patch from prompts, without pictures. repair: a quantised MODEL draws as "
                "the full TEACHER MODEL does. guidance: MODEL needs one call a step in the place "
                "of two. First the exact predictions are made, then the patch is trained. Stop it "
                "at any time: what is trained so far comes out."
            ),
            is_input_list=True,
            inputs=[*_sockets(), *_widgets(), *_advanced()],
            outputs=[
                DmpPatch.Output(
                    display_name="dmp_patch", tooltip="The patch, for Apply DMP and Save DMP Patch."
                ),
                io.Image.Output(
                    display_name="loss", tooltip="How much of the gap between both models is left."
                ),
                io.Image.Output(
                    display_name="comparison",
                    tooltip=(
                        "Pictures of equal noise side by side: exact, cheap, cheap with the patch. "
                        "White without a VAE."
                    ),
                ),
                io.Image.Output(
                    display_name="pictures",
                    tooltip=(
                        "The same three pictures as a batch, without labels, for a node that "
                        "compares pictures."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **lists: Any) -> io.NodeOutput:
        positive = lists.pop("positive")
        # Every other input is one value, which ComfyUI gives as a list because of the prompts.
        one = {name: values[0] for name, values in lists.items() if values}
        how = Drawing(
            one["sampler_name"], one["scheduler"], one["sampling_steps"], int(one["seed"])
        )
        job = jobs.Job(
            model=one["model"],
            teacher=one.get("teacher_model"),
            positive=positive,
            negative=one.get("negative"),
            size=(one["width"], one["height"]),
            objective=one["objective"],
            cfg=one["cfg"],
            dial=one["all_scales"],
            pictures=one["pictures"],
            at_once=one["batch_size"],
            steps=one["steps"],
            learning_rate=one["learning_rate"],
            how=how,
            start=one.get("dmp_patch"),
            vae=one.get("vae"),
            recompute=one.get("gradient_checkpointing", True),
            expert=one.get("expert", jobs.AUTO),
            length=one.get("length", 1),
        )
        outcome = train.train(job, cls.hidden.unique_id if cls.hidden else None)
        shown = plots.as_tensor(outcome.curve), outcome.beside, outcome.pictures
        return io.NodeOutput(outcome.record, *shown)


def _sockets() -> list[Any]:
    """Returns the inputs that are connected."""
    return [
        io.Model.Input(
            "model", tooltip="The cheap model, which the patch is for: quantised, or without CFG."
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="One conditioning, or the list of DMP Prompt List: what pictures are drawn of.",
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="The negative conditioning that you draw with; none where CFG is 1.",
        ),
        io.Model.Input(
            "teacher_model",
            optional=True,
            tooltip="The full model, for the objectives with repair. Not for guidance alone.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="For the pictures of both models side by side."),
        DmpPatch.Input(
            "dmp_patch", optional=True, tooltip="A patch to go on with, of the same objective."
        ),
    ]


def _widgets() -> list[Any]:
    """Returns the inputs with values that everybody sets."""
    side = {"min": 64, "max": 4096, "step": 16}
    return [
        io.Combo.Input(
            "objective",
            options=jobs.OBJECTIVES,
            tooltip="What the patch is for; the last one does both with one patch.",
        ),
        io.Float.Input(
            "cfg",
            default=7.0,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip=(
                "The CFG that you draw with. repair: the teacher's pictures are drawn with it. "
                "guidance: it is what strength 1 of the patch stands for."
            ),
        ),
        io.Boolean.Input(
            "all_scales",
            default=True,
            tooltip=(
                "guidance: train for all scales from 1 to cfg, so that the strength of the patch "
                "is the dial of guidance. Otherwise for cfg alone."
            ),
        ),
        io.Int.Input("width", default=512, **side, tooltip="Width of the pictures."),
        io.Int.Input("height", default=512, **side, tooltip="Height of the pictures."),
        io.Int.Input(
            "pictures",
            default=64,
            min=1,
            max=10000,
            tooltip="How many pictures the exact model draws; all its steps are learned from.",
        ),
        io.Int.Input("steps", default=1000, min=1, max=100000, tooltip="How many steps to train."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=_LARGEST_SEED,
            tooltip="Of the noise of the pictures and of the order of training.",
        ),
    ]


def _advanced() -> list[Any]:
    """Returns the inputs that are hidden until they are asked for."""
    more: dict[str, Any] = {"extra_dict": inputs.ADVANCED}
    return [
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            tooltip=(
                "Of the optimiser AdamW; it falls to 0 along a cosine. 0 chooses the one that "
                "suits the gap between both models: less for a model in 8 bits than for one in 4."
            ),
            **more,
        ),
        io.Int.Input(
            "batch_size",
            default=4,
            min=1,
            max=256,
            tooltip="States of one step, and pictures that are drawn at once.",
            **more,
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.SAMPLER_NAMES,
            default="euler",
            tooltip="Draws the exact model's pictures.",
            **more,
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.SCHEDULER_NAMES,
            default="normal",
            tooltip="Its noise levels are learned.",
            **more,
        ),
        io.Int.Input(
            "sampling_steps",
            default=20,
            min=1,
            max=500,
            tooltip="Of each picture; up to twice as many, so that more noise levels are seen.",
            **more,
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            optional=True,
            tooltip=(
                "Blocks of the model are computed again in the backward pass, so that training "
                "needs far less memory and more time. The patch is the same."
            ),
            **more,
        ),
        io.Combo.Input(
            "expert",
            options=jobs.EXPERTS,
            default=jobs.AUTO,
            optional=True,
            tooltip=(
                "Which of the two models of Wan 2.2 MODEL is: that for high noise or for low "
                "noise. The patch is trained at its noise levels alone, and says so. auto: as the "
                "name of its file says (high_noise); none where it says nothing."
            ),
            **more,
        ),
        io.Int.Input(
            "length",
            default=1,
            min=1,
            max=4096,
            step=4,
            optional=True,
            tooltip="Frames of a video, for Wan: 1, 5, 9 and so on. 1 is a picture.",
            **more,
        ),
    ]
