"""The command from end to end on a tiny model of every base, from pictures to a patch in use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dmp_common import Patch, attach
from tests.tiny import FAMILIES
from tests.training.conftest import Folders, Train
from tests.training.tinybases import TRAINED
from training.run.metadata import git_revision


def prompts(folder: Path, text: str) -> list[str]:
    path = folder / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return ["--sample_prompts", str(path)]


@pytest.mark.parametrize("name", TRAINED)
def test_every_base_trains_validates_and_shows(name: str, train: Train, tmp_path: Path) -> None:
    line = "1 --s 2" if name == "dit" else "a red cat --s 2 --w 16 --h 16 --d 5"
    out = train(
        name,
        *("--validation_split", "0.3", "--validate_every_n_steps", "3"),
        *("--validation_bins", "2", "--train_batch_size", "2"),
        *prompts(tmp_path, line),
    )
    own = f"tiny-{name}-dmp"
    patch = Patch.load(out / f"{own}.safetensors")
    assert patch.base is FAMILIES[name].base
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())
    flow = FAMILIES[name].base.prediction == "flow"
    expected = "flow" if flow else {"sd21": "v_prediction"}.get(name, "epsilon")
    assert patch.variant.prediction == expected
    validation = json.loads(patch.metadata["ss_dmp_validation"])
    # A patch of zeros is the base; after training it is something else.
    assert validation["0"] == pytest.approx(validation["base"], rel=1e-6)
    assert validation["3"] != validation["base"]
    with Image.open(out / "sample" / f"{own}-step00000003-00.png") as picture:
        assert picture.width > 2 * picture.height  # base, a line, trained
        halves = [
            picture.crop((x, 0, x + picture.height, picture.height))
            for x in (0, picture.width - picture.height)
        ]
    assert halves[0].tobytes() != halves[1].tobytes()
    # The file is of use: attached to the base, it changes what the base predicts.
    tiny = FAMILIES[name]
    model = tiny.model()
    before = tiny.run(model)
    with attach(model, patch):
        assert not torch.equal(tiny.run(model), before)


def test_metadata_and_the_picture_of_the_gate(train: Train, drawn_gate: None) -> None:
    out = train("sd15", "--seed", "9", "--enable_bucket", "--min_bucket_reso", "16")
    with Image.open(out / "tiny-sd15-dmp-gate.png") as gate:
        assert min(gate.size) > 200
    with safe_open(out / "tiny-sd15-dmp.safetensors", "pt") as file:
        header = file.metadata()
    assert "ss_network_module" not in header
    assert header["ss_base_model_version"] == "tiny-sd15"
    assert header["ss_seed"] == "9"
    assert header["ss_num_train_images"] == "6"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert header["modelspec.resolution"] == "16x16"
    assert header["ss_steps"] == "3"
    assert sum(row["count"] for row in json.loads(header["ss_bucket_info"])) == 6
    assert "pictures" in header["ss_dataset_dirs"]
    recorded = json.loads(header["ss_dmp_config"])
    assert recorded["enable_bucket"] is True
    assert "huggingface_token" not in recorded
    revision = git_revision(Path(__file__).parent)  # None in a source distribution
    assert header.get("ss_dmp_git_revision") == revision
    assert revision is None or len(revision.rstrip("+")) == 40


def test_text_conditional_dit(train: Train, folders: Folders, tmp_path: Path) -> None:
    """Trained with all weights first; patches are then made for what that left."""
    text = ["--text_conditional", "--text_encoder", str(folders("sd15"))]
    out = train("dit", *text, "--method", "full", data="pictures")
    full = out / "tiny-dit-full"
    weights = ["--pretrained_model_name_or_path", str(full), "--vae", str(folders("dit"))]
    train(
        "dit",
        *(*text, *weights, "--condition", "t+y", "--importance_weight", "0.1"),
        *prompts(tmp_path, "a red cat --s 2 --n a blue dog"),
        data="pictures",
    )
    patch = Patch.load(out / "tiny-dit-dmp.safetensors")
    assert patch.variant.condition == "t+y"
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())


def test_untrained_text_embedding_is_refused(
    train: Train, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--text_conditional", "--text_encoder", str(folders("sd15"))]
    train("dit", *text, data="pictures", code=1)
    assert "train it with --text_conditional --method full first" in capsys.readouterr().err


def test_unconditional_dit(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    out = train("dit", "--unconditional", "--condition", "t+y", data="pictures")
    assert Patch.load(out / "tiny-dit-dmp.safetensors").variant.condition == "t+y"
    train("sd15", "--unconditional", code=1)
    assert "--unconditional with a DiT only" in capsys.readouterr().err


def test_caches_change_nothing(train: Train) -> None:
    cached = ["--cache_latents", "--cache_text_encoder_outputs", "--train_batch_size", "2"]
    name = "tiny-sd15-dmp.safetensors"
    plain = Patch.load(train("sd15", "--train_batch_size", "2") / name).tensors()
    other = Patch.load(train("sd15", "--overwrite", *cached) / name).tensors()
    for key, tensor in plain.items():
        # Encoded in other batches: Adam makes much of rounding where a gradient is nearly 0.
        assert (tensor - other[key]).norm() < 1e-3 * tensor.norm(), key


def test_dry_run_tells_and_leaves_nothing(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    out = train("sdxl", "--dry_run", "--cache_latents_to_disk", "--train_batch_size", "2")
    printed = capsys.readouterr().out
    for told in (
        "max_train_steps = 3",
        "6 images",
        "16x16",
        "effective batch: 2",
        "captions: 6 images with",
        "estimated memory",
        "one step:",
        "nothing was saved",
    ):
        assert told in printed
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--min_snr_gamma", "5", "--noise_offset", "0.1"],
        ["--zero_terminal_snr", "--min_snr_gamma", "5"],
        ["--debiased_estimation_loss", "--zero_terminal_snr"],
        ["--p2_gamma", "1", "--v_parameterization"],
        ["--max_token_length", "225", "--clip_skip", "2"],
        ["--optimizer_type", "Adafactor", "--gradient_checkpointing"],
        ["--recipe", "paper", "--global_batch_size", "2", "--gradient_accumulation_steps", "2"],
        ["--mixed_precision", "bf16", "--dmp_sites", "decoder"],
    ],
    ids=lambda options: options[0],
)  # fmt: skip
def test_options_of_unets(options: list[str], train: Train) -> None:
    patch = Patch.load(train("sd15", *options) / "tiny-sd15-dmp.safetensors")
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())
    use = json.loads(patch.metadata["dmp.use"])
    assert use["zero_terminal_snr"] is ("--zero_terminal_snr" in options)


@pytest.mark.parametrize(
    "options",
    [
        ["--timestep_sampling", "flux_shift"],
        ["--timestep_sampling", "shift", "--discrete_flow_shift", "2"],
        ["--weighting_scheme", "logit_normal"],
        ["--weighting_scheme", "cosmap", "--mixed_precision", "bf16"],
    ],
    ids=lambda options: options[1],
)
def test_options_of_flow_models(options: list[str], train: Train) -> None:
    patch = Patch.load(train("flux", *options) / "tiny-flux-dmp.safetensors")
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())
    assert "zero_terminal_snr" not in json.loads(patch.metadata["dmp.use"])


@pytest.mark.slow
def test_compiled_base_trains_alike(train: Train) -> None:
    """The patch is attached first, so that its hooks are in the compiled graph."""
    name, compiling = "tiny-dit-dmp.safetensors", ["--torch_compile", "--dynamo_backend", "eager"]
    plain = Patch.load(train("dit") / name).tensors()
    compiled = Patch.load(train("dit", "--overwrite", *compiling) / name)
    for key, tensor in plain.items():
        assert torch.allclose(tensor, compiled.tensors()[key], atol=1e-5), key
