"""Options about precision, scale, and what a run leaves behind."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import field_validator

from training.options.declaring import Options, option

# kohya's names.
PreviewSampler = Literal[
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver",
    "dpmsolver++", "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
]  # fmt: skip


class ScaleOptions(Options):
    """Precision, memory, many devices."""

    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "precision and scale",
        "no",
        "Compute the frozen base in this precision; the patch itself stays in float32. bf16 "
        "halves the memory of the base.",
        common=True,
    )
    gradient_checkpointing: bool = option(
        "precision and scale",
        False,
        "Compute activations again in the backward pass, which takes less memory and more time.",
        common=True,
    )
    torch_compile: bool = option(
        "precision and scale", False, "Compile the base with torch.compile."
    )
    dynamo_backend: str = option(
        "precision and scale", "inductor", "Use this backend of torch.compile.", min_length=1
    )
    fp8_base: bool = option(
        "precision and scale",
        False,
        "Keep the weights of the frozen base in 8-bit floating point (float8_e4m3fn) and convert "
        "each layer to the precision of --mixed_precision while it computes. Use it together with "
        "--gradient_checkpointing: without it the converted weights are kept until the backward "
        "pass.",
    )
    int8_base: bool = option(
        "precision and scale",
        False,
        "Keep the linear layers of the frozen base as 8-bit integers with a scale for each row. "
        "This needs the package torchao.",
    )
    blocks_to_swap: int | None = option(
        "precision and scale",
        None,
        "Keep this many transformer blocks of the frozen base in the memory of the CPU and copy "
        "each to the GPU while it computes; 0 disables it. It needs --gradient_checkpointing and "
        "has no effect on a CPU.",
        ge=0,
    )
    fsdp: bool = option(
        "precision and scale",
        False,
        "Shard the frozen base over the processes with FSDP2. The patch is small and stays whole.",
    )
    cpu: bool = option("precision and scale", False, "Train on the CPU even where there is a GPU.")
    deterministic: bool = option(
        "precision and scale",
        False,
        "Use deterministic GPU operations only, so that runs repeat bit for bit.",
    )


class OutputOptions(Options):
    """Files, previews, validation, logs."""

    output_dir: str = option(
        "output",
        "output/{base}",
        "Write everything that a run leaves to this folder.",
        min_length=1,
        common=True,
    )
    output_name: str = option(
        "output",
        "{base}-{method}",
        "Give the patch file this name, without its ending.",
        min_length=1,
        common=True,
    )
    save_precision: Literal["float", "fp16", "bf16"] = option(
        "output", "float", "Store the values of the patch file in this precision."
    )
    save_every_n_steps: int | None = option(
        "output", None, "Also save the patch every n steps.", ge=1, common=True
    )
    save_every_n_epochs: int | None = option(
        "output", None, "Also save the patch every n epochs.", ge=1
    )
    save_last_n_steps: int | None = option(
        "output",
        None,
        "Keep only those of the intermediate files that the last n steps saved.",
        ge=1,
    )
    save_last_n_epochs: int | None = option(
        "output",
        None,
        "Keep only those of the intermediate files that the last n epochs saved.",
        ge=1,
    )
    save_last_n_steps_state: int | None = option(
        "output",
        None,
        "Keep the states of the last n steps only. By default it is --save_last_n_steps.",
        ge=1,
    )
    save_last_n_epochs_state: int | None = option(
        "output",
        None,
        "Keep the states of the last n epochs only. By default it is --save_last_n_epochs.",
        ge=1,
    )
    overwrite: bool = option(
        "output", False, "Write over the files of an earlier run with this name."
    )
    save_state: bool = option(
        "output",
        False,
        "Save the state of the training with every patch file, so that --resume can go on from it.",
        common=True,
    )
    save_state_on_train_end: bool = option(
        "output", False, "Save the state of the training at the end of the run."
    )
    resume: str | None = option(
        "output",
        None,
        "Go on from the saved state in this folder, or from the latest one for the word latest.",
        common=True,
    )
    metadata_title: str | None = option(
        "output",
        None,
        "Write this title into the metadata of the patch file. By default it is the name of the "
        "file.",
    )
    metadata_author: str | None = option(
        "output", None, "Write this author into the metadata of the patch file."
    )
    metadata_description: str | None = option(
        "output", None, "Write this description into the metadata of the patch file."
    )
    metadata_tags: str | None = option(
        "output",
        None,
        "Write these tags, with commas between them, into the metadata of the patch file.",
    )
    metadata_license: str | None = option(
        "output", None, "Write this license into the metadata of the patch file."
    )
    training_comment: str | None = option(
        "output",
        None,
        "Write this comment into the metadata of the patch file, as ss_training_comment.",
    )
    sample_prompts: str | None = option(
        "previews",
        None,
        "Read the prompts of previews from this file: .txt with a prompt a line and kohya's --n "
        "--w --h --d --s --l, or kohya's .toml or .json. For a DiT the prompts are class ids.",
        common=True,
    )
    sample_every_n_steps: int | None = option(
        "previews", None, "Draw previews every n steps.", ge=1, common=True
    )
    sample_every_n_epochs: int | None = option(
        "previews", None, "Draw previews every n epochs.", ge=1
    )
    sample_at_first: bool = option("previews", False, "Also draw previews before the first step.")
    sample_steps: int = option("previews", 20, "Draw previews in this many denoising steps.", ge=1)
    sample_sampler: PreviewSampler | None = option(
        "previews",
        None,
        "Draw previews with this sampler. By default it is ddim; flow models always take euler.",
    )
    validate_every_n_steps: int | None = option(
        "validation", None, "Validate every n steps.", ge=1, common=True
    )
    validate_every_n_epochs: int | None = option(
        "validation", None, "Validate every n epochs.", ge=1
    )
    validation_bins: int = option(
        "validation",
        10,
        "Measure the validation loss in this many equal ranges of timesteps.",
        ge=1,
        le=100,
    )
    validation_draws: int = option(
        "validation", 1, "Draw this many noises for each image and range.", ge=1
    )
    max_validation_images: int | None = option(
        "validation", 64, "Use at most this many images for a validation.", ge=1
    )
    keep_best: bool = option(
        "validation",
        False,
        "Save the step with the lowest validation loss as the final file, not the last step.",
    )
    report_samples: int = option(
        "validation",
        0,
        "Generate this many images for the final report, for digits only; 0 disables the report.",
        ge=0,
    )
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        "logging",
        None,
        "Write logs for this program. With --logging_dir it is tensorboard by default.",
    )
    logging_dir: str | None = option(
        "logging",
        None,
        "Write logs to this folder. By default it is the folder logs in --output_dir.",
    )
    log_prefix: str | None = option(
        "logging", None, "Give the run this name in the logs. By default it is --output_name."
    )
    log_every_n_steps: int = option("logging", 1, "Write values to the logs every n steps.", ge=1)
    wandb_run_name: str | None = option(
        "logging",
        None,
        "Give the run this name in Weights & Biases. By default the service makes one up.",
    )
    huggingface_repo_id: str | None = option(
        "hub", None, "Upload the final patch to this repository, with a model card and previews."
    )
    huggingface_private: bool = option("hub", False, "Make the repository private.")
    huggingface_token: str | None = option(
        "hub", None, "Use this access token. By default it is that of `hf auth login`."
    )
    dry_run: bool = option(
        "run",
        False,
        "Print the configuration, the data, parameter counts and memory, do one step, and save "
        "nothing.",
        common=True,
    )
    config_file: str | None = option(
        "run",
        None,
        "Read options from this TOML file, in any tables. Options of the command line win.",
        common=True,
    )
    output_config: str | None = option(
        "run",
        None,
        "Write the resolved options as TOML to this file, or to the screen for -, and stop.",
    )
    strict: bool = option("run", False, "Treat warnings about options as errors.")

    @field_validator("output_name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if re.search(r'[/\\:*?"<>|\x00-\x1f]', value) or value.strip(". ") == "":
            raise ValueError(
                "expected the name of a file without folders, and --output_dir for the folder"
            )
        return value

    @field_validator("metadata_tags", mode="before")
    @classmethod
    def _tags_as_text(cls, value: Any) -> Any:
        """TOML files may give a list."""
        return ",".join(map(str, value)) if isinstance(value, list) else value
