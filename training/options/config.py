"""The trainer's configuration: one pydantic model, which also makes the command line.

Names are kohya's wherever kohya has the thing. `command_line.py` says where a value comes from.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from training.options.data_options import DataOptions, named_sources
from training.options.loss_options import ObjectiveOptions
from training.options.model_options import ModelOptions, PatchOptions
from training.options.optimisation_options import OptimisationOptions
from training.options.run_options import OutputOptions, ScaleOptions
from training.options.teacher_options import TeacherOptions

SECRETS = ("huggingface_token",)  # never written anywhere
# Wishes about one call of the command, not about the run.
RUN_ONLY = (*SECRETS, "config_file", "output_config", "dry_run", "resume", "overwrite", "strict")


class TrainConfig(
    OutputOptions,
    ScaleOptions,
    OptimisationOptions,
    ObjectiveOptions,
    TeacherOptions,
    DataOptions,
    PatchOptions,
    ModelOptions,
):
    """Everything one run depends on. (pydantic lists the fields of the last base first.)

    Each field is checked by itself here; `agreement.py` checks them together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def trains_base(self) -> bool:
        """Whether the weights of the base are trained too."""
        return self.method in ("full", "joint")

    @property
    def has_student(self) -> bool:
        """Whether the cheap call has weights of its own."""
        return self.student_quantization is not None or self.student_weights is not None

    @property
    def needs_no_pictures(self) -> bool:
        """Whether the run draws its own pictures, from captions or classes alone."""
        trajectories = self.objective == "distill" and self.states != "data"
        return trajectories and (self.state_captions is not None or not named_sources(self))

    @property
    def uses_own_samples(self) -> bool:
        """Whether samples of the base are trained on."""
        return self.objective in ("own", "two-sided")

    @property
    def variant(self) -> dict[str, Any]:
        """The options of `Patch.create`."""
        names = ("gate", "selection", "mix", "condition", "prompt_init", "grid_scope")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        options["timesteps"] = (self.min_timestep, self.max_timestep)
        if self.method == "prompt":
            options["gate"] = "none"
        options |= self._gate_options(gated=options["gate"] != "none")
        if self.gate_init is not None:
            options["gate_init"] = self.gate_init
        if self.grid is not None:
            options["grid"] = self.grid
        if self.dmp_depth is not None:
            options["sites"] = self.dmp_depth
        elif self.dmp_sites is not None:
            named = self.dmp_sites.split(",")
            options["sites"] = named if len(named) > 1 or "." in named[0] else named[0]
        if self.expert is not None:
            options["expert"] = self.expert
        if self.guidance_range is not None:
            options["guidance"] = self.guidance_range[1]
        return options

    def _gate_options(self, gated: bool) -> dict[str, Any]:
        """The options of the grids and their weights.

        A modulating patch has other defaults than one that adds its prompts: it takes from here
        what somebody chose, or what a recipe sets.
        """
        names = ("grids", "gate_unit", "gate_form")
        if self.mix != "modulate":
            named = {} if self.method == "prompt" else {n: getattr(self, n) for n in names}
            return {"across_depth": self.across_depth, **named}
        fields, chosen = type(self).model_fields, self.model_fields_set
        return {
            name: getattr(self, name)
            for name in ("across_depth", *names)
            if (gated or name == "grids")
            and (name in chosen or (gated and getattr(self, name) != fields[name].default))
        }

    def recorded(self) -> dict[str, Any]:
        """The options that describe a run, for files: without secrets and one-off wishes."""
        return self.model_dump(mode="json", exclude=set(RUN_ONLY))

    def model_post_init(self, _: Any) -> None:
        """Fills the base and the method into the names that hold a place for them.

        The place of the base stays while its name is not known yet (--base auto).
        """
        places: dict[str, str] = {"{method}": self.method}
        if self.base != "auto":
            places["{base}"] = self.base.replace("/", "-")
        for name in ("output_dir", "output_name"):
            value = getattr(self, name)
            for place, text in places.items():
                value = value.replace(place, text)
            object.__setattr__(self, name, value)
