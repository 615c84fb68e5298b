"""Weights in the files that people have: one file for each part, or several parts in one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmp_common import PatchError
from tests.tiny import FAMILIES
from tests.training import tinyfiles
from tests.training.conftest import Folders
from tests.training.tinybases import OWN, TRAINED
from training.base.frozen import FrozenBase, base_kind, find_base, load_frozen
from training.base.single_files import SingleFile
from training.options.command_line import resolve
from training.options.config import TrainConfig

FILES = {
    "sd15": {"clip_l": "text_encoder"},
    "sdxl": {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    "pixart": {"t5xxl": "text_encoder"},
    "sd3": {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    "sd35": {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    "flux": {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"},
    "flux2": {"text_encoder": "text_encoder"},
    "lumina2": {"text_encoder": "text_encoder"},
    "chroma": {"t5xxl": "text_encoder"},
    "z-image": {"text_encoder": "text_encoder"},
    "wan": {"t5xxl": "text_encoder"},
    **{
        name: {option: folder for folder, option in own.family.files.items()}
        for name, own in OWN.items()
        if own.original is not None
    },
}
Make = Callable[..., TrainConfig]


def config_of(name: str, place: Path, **options: object) -> TrainConfig:
    given = {"base": FAMILIES[name].base.name, "pretrained_model_name_or_path": str(place)}
    return resolve({**given, **{k: str(v) for k, v in options.items()}})


def require_equal(frozen: FrozenBase, whole: FrozenBase) -> None:
    """The same base, part by part."""
    assert tinyfiles.same(frozen.model, whole.model)
    assert tinyfiles.same(frozen.vae, whole.vae)
    assert frozen.encoders.keys() == whole.encoders.keys()
    for part, encoder in whole.encoders.items():
        if isinstance(encoder, torch.nn.Module):
            assert tinyfiles.same(frozen.encoders[part], encoder), part
            assert frozen.encoders[part].dtype == encoder.dtype


@pytest.mark.parametrize("name", [name for name in FILES if name != "pixart"])
def test_every_part_in_a_file_of_its_own(
    name: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of kohya and ComfyUI: FILE, --clip_l, --clip_g, --t5xxl and --ae."""
    tinyfiles.narrow(monkeypatch)
    folder = folders(name)
    weights = tinyfiles.save(
        tmp_path / "model.safetensors", tinyfiles.denoiser_tensors(folder, name)
    )
    options: dict[str, object] = {
        option: tinyfiles.save(
            tmp_path / f"{option}.safetensors", tinyfiles.text_tensors(folder, part)
        )
        for option, part in FILES[name].items()
    }
    options["ae"] = tinyfiles.save(tmp_path / "ae.safetensors", tinyfiles.vae_tensors(folder))
    config = config_of(name, weights, base_config=folder, **options)
    said: list[str] = []
    frozen = load_frozen(config, said.append)
    whole = load_frozen(config_of(name, folder))
    require_equal(frozen, whole)
    assert base_kind(config) == frozen.kind == whole.kind
    assert find_base(config.model_copy(update={"base": "auto"})) is whole.base
    assert f"loading the VAE from {options['ae']}" in said
    assert sum(line.startswith("loaded the text_encoder") for line in said) == len(FILES[name])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sd15", ("vae", "text_encoder")),
        ("sdxl", ("vae",)),
        ("sd3", ("vae",)),
        ("flux", ("vae", "text_encoder", "text_encoder_2")),
        ("flux2", ("vae", "text_encoder")),
        ("lumina2", ("vae", "text_encoder")),
        ("chroma", ("vae", "text_encoder")),
        *((name, tuple(own.in_file)) for name, own in OWN.items() if own.in_file),
    ],
)
def test_what_one_file_holds_is_taken_from_it(
    name: str,
    parts: tuple[str, ...],
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what it lacks from --base_config; so a changed weight shows where it came from."""
    tinyfiles.narrow(monkeypatch)
    folder = folders(name)
    path = tinyfiles.save_single(tmp_path / "whole.safetensors", folder, name, *parts)
    frozen = load_frozen(config_of(name, path, base_config=folder))
    whole = load_frozen(config_of(name, folder))
    require_equal(frozen, whole)
    tensors = {key: value + 0.5 for key, value in tinyfiles.weights_of(path.parent).items()}
    tinyfiles.save(path, tensors)
    moved = load_frozen(config_of(name, path, base_config=folder))
    for part in ("vae", *whole.encoders):
        ours = moved.vae if part == "vae" else moved.encoders[part]
        theirs = whole.vae if part == "vae" else whole.encoders[part]
        if isinstance(ours, torch.nn.Module):
            assert tinyfiles.same(ours, theirs) == (part not in parts), part


def test_the_configuration_that_fits_a_file(folders: Folders, tmp_path: Path) -> None:
    """FLUX.1-schnell has another schedule than FLUX.1-dev, and no guidance."""
    tensors = tinyfiles.denoiser_tensors(folders("flux"), "flux")
    path = tinyfiles.save(tmp_path / "schnell.safetensors", tensors)
    with SingleFile(path) as file:
        assert file.usual_config == "black-forest-labs/FLUX.1-schnell"
    tensors["guidance_in.in_layer.bias"] = torch.zeros(1)
    path = tinyfiles.save(tmp_path / "dev.safetensors", tensors)
    with SingleFile(path) as file:
        assert file.usual_config == "black-forest-labs/FLUX.1-dev"
    path = tinyfiles.save(tmp_path / "other.safetensors", {"weight": torch.zeros(1)})
    with SingleFile(path) as file:
        assert file.usual_config is None


def test_pickled_whole_file(folders: Folders, tmp_path: Path) -> None:
    folder = folders("sd15")
    path = tinyfiles.save_single(tmp_path / "a.safetensors", folder, "sd15", "vae", "text_encoder")
    torch.save({"state_dict": tinyfiles.weights_of(tmp_path)}, tmp_path / "whole.ckpt")
    frozen = load_frozen(config_of("sd15", tmp_path / "whole.ckpt", base_config=folder))
    require_equal(frozen, load_frozen(config_of("sd15", path, base_config=folder)))


def test_another_vae_file_replaces_that_of_the_weights(folders: Folders, tmp_path: Path) -> None:
    """`--vae vae-ft-mse-840000-ema-pruned.safetensors` with a folder and with a whole file."""
    folder = folders("sd15")
    other = {key: value + 0.5 for key, value in tinyfiles.vae_tensors(folder).items()}
    vae = tinyfiles.save(tmp_path / "vae.safetensors", other)
    whole = tinyfiles.save_single(tmp_path / "w.safetensors", folder, "sd15", "vae")
    plain = load_frozen(config_of("sd15", folder))
    for place in (folder, whole):
        frozen = load_frozen(config_of("sd15", place, vae=vae, base_config=folder))
        expected = plain.vae.decoder.conv_out.bias + 0.5
        assert torch.equal(frozen.vae.decoder.conv_out.bias, expected)


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_text_encoders_are_converted(scaled: bool, folders: Folders, tmp_path: Path) -> None:
    folder = folders("flux")
    tensors = tinyfiles.text_tensors(folder, "text_encoder_2")
    if scaled:  # as ComfyUI saves them
        layers = [key for key, value in tensors.items() if value.ndim == 2]
        stored = {
            key: (value * 4).to(torch.float8_e4m3fn) if key in layers else value
            for key, value in tensors.items()
        }
        scales = {key.removesuffix("weight") + "scale_weight": torch.tensor(0.25) for key in layers}
        tinyfiles.save(
            tmp_path / "t5.safetensors", {**stored, **scales, "scaled_fp8": torch.zeros(0)}
        )
    else:
        tinyfiles.save(tmp_path / "t5.safetensors", tensors, torch.float8_e4m3fn)
    frozen = load_frozen(
        config_of("flux", folder, t5xxl=tmp_path / "t5.safetensors", mixed_precision="bf16")
    )
    state = frozen.encoders["text_encoder_2"].state_dict()
    plain = load_frozen(config_of("flux", folder)).encoders["text_encoder_2"].state_dict()
    for key, value in plain.items():
        assert state[key].dtype == torch.bfloat16
        assert torch.allclose(state[key].float(), value, rtol=0.08, atol=0.02), key


def test_clip_l_without_a_projection(folders: Folders, tmp_path: Path) -> None:
    """Stable Diffusion 3 then has the identity there."""
    folder = folders("sd3")
    tensors = tinyfiles.text_tensors(folder, "text_encoder_2")  # square in the tiny model
    del tensors["text_projection.weight"]
    path = tinyfiles.save(tmp_path / "clip_g.safetensors", tensors)
    frozen = load_frozen(config_of("sd3", folder, clip_g=path))
    assert torch.equal(frozen.encoders["text_encoder_2"].text_projection.weight, torch.eye(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("text_model.final_layer_norm.bias"), "1 tensors missing"),
        (lambda t: t.update(quantum=torch.ones(1)), "1 tensors of no use (quantum)"),
        (
            lambda t: t.update({"text_model.final_layer_norm.bias": torch.ones(3)}),
            "1 tensors of another size",
        ),
    ],
    ids=["missing", "unknown", "another size"],
)
def test_other_text_encoders_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    folders: Folders,
    tmp_path: Path,
) -> None:
    tensors = tinyfiles.text_tensors(folders("sd15"), "text_encoder")
    change(tensors)
    path = tinyfiles.save(tmp_path / "clip_l.safetensors", tensors)
    with pytest.raises(PatchError) as caught:
        load_frozen(config_of("sd15", folders("sd15"), clip_l=path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("load", [load_frozen, base_kind])
def test_files_that_do_not_fit_the_base_are_listed_at_once(
    load: Callable[[TrainConfig], object], folders: Folders, tmp_path: Path
) -> None:
    """Also before anything is loaded."""
    options = {"t5xxl": "t5", "clip_g": "g", "clip_l": "missing", "vae": "one", "ae": "two"}
    with pytest.raises(PatchError) as caught:
        load(config_of("sd15", folders("sd15"), **options))
    assert [line.split(",")[0] for line in str(caught.value).splitlines()] == [
        "expected one VAE",
        "expected a file for --clip_l",
        "expected files of the text encoders that base tiny-sd15 has (--clip_l)",
        "expected files of the text encoders that base tiny-sd15 has (--clip_l)",
    ]


def test_single_files_without_a_configuration(folders: Folders, tmp_path: Path) -> None:
    path = tinyfiles.save_single(tmp_path / "a.safetensors", folders("sd3"), "sd3")
    with pytest.raises(PatchError, match="expected --base_config for the single file"):
        load_frozen(config_of("sd3", path))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # of diffusers
def test_without_a_connection_the_error_says_what_to_do(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers and configurations of separate files are on the hub, unless they are here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tinyfiles.save_single(tmp_path / "a.safetensors", folders("sd3"), "sd3")
    file = config_of("sd3", path, base_config="nobody/has-this")
    whole = config_of("sd3", Path("nobody/has-this"))
    tokenizer = config_of("sd3", folders("sd3") / "transformer", base_config="nobody/has-this")
    auto = resolve({"base": "auto", "pretrained_model_name_or_path": "nobody/has-this"})
    for config, load, option in (
        (file, load_frozen, "--base_config"),
        (file, base_kind, "--base_config"),
        (tokenizer, load_frozen, "--base_config"),
        (whole, load_frozen, "--pretrained_model_name_or_path"),
        (auto, find_base, "--pretrained_model_name_or_path"),
    ):
        with pytest.raises(PatchError) as caught:
            load(config)
        for part in ("repository nobody/has-this", "hf auth login", "hf download", option):
            assert part in str(caught.value)


@pytest.mark.parametrize("name", TRAINED)
def test_the_kind_of_data_is_known_before_the_weights(name: str, folders: Folders) -> None:
    config = config_of(name, folders(name))
    assert base_kind(config) == load_frozen(config).kind
    if name == "dit":
        unconditional = config.model_copy(update={"unconditional": True})
        assert base_kind(unconditional) == load_frozen(unconditional).kind


def test_the_kind_needs_no_weights(folders: Folders, tmp_path: Path) -> None:
    """Only configurations are read, so that data are checked before gigabytes are."""
    folder = tmp_path / "base"
    shutil.copytree(folders("sd3"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert base_kind(config_of("sd3", folder)).conditioning == "caption"
    with pytest.raises(PatchError):
        load_frozen(config_of("sd3", folder))


def test_a_truncated_encoder_is_named_itself(folders: Folders, tmp_path: Path) -> None:
    """Not the folder that its configuration comes from."""
    whole = (folders("flux") / "text_encoder" / "model.safetensors").read_bytes()
    half = tmp_path / "clip_l.safetensors"
    half.write_bytes(whole[: len(whole) // 2])
    config = config_of("flux", folders("flux"), clip_l=half)
    with pytest.raises(PatchError) as caught:
        load_frozen(config)
    assert f"expected the weights of a CLIPTextModel at {half}" in str(caught.value)
    assert "check --base_config or --clip_l" in str(caught.value)
