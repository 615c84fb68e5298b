"""Weights from every kind of place: original checkpoints, single files, folders."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmp_common import PatchError
from tests.tiny import FAMILIES
from tests.training.tinybases import make_base
from tests.training.tinyfiles import same
from training.base.dit_folders import TIME_FILE
from training.base.families import checkpoint
from training.base.families.dit import set_frequency_shift
from training.base.frozen import FrozenBase, base_kind, find_base, load_frozen
from training.methods.full import FullMethod
from training.options.command_line import resolve

Load = Callable[..., FrozenBase]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("loading")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else make_base(root / name, name)

    return folder


def load(base: str, place: Path | str, **options: object) -> FrozenBase:
    return load_frozen(
        resolve({"base": base, "pretrained_model_name_or_path": str(place), **options})
    )


def original_dit(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a DiT under the names of facebookresearch/DiT, told from its modules."""
    state, blocks = model.state_dict(), range(len(model.transformer_blocks))
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "t_embedder.mlp.0": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
    }
    for n in blocks:
        ours = f"transformer_blocks.{n}"
        names |= {
            f"blocks.{n}.attn.proj": f"{ours}.attn1.to_out.0",
            f"blocks.{n}.mlp.fc1": f"{ours}.ff.net.0.proj",
            f"blocks.{n}.mlp.fc2": f"{ours}.ff.net.2",
            f"blocks.{n}.adaLN_modulation.1": f"{ours}.norm1.linear",
        }
    found = {
        f"{new}.{k}": state[f"{old}.{k}"] for new, old in names.items() for k in ("weight", "bias")
    }
    for n in blocks:
        for kind in ("weight", "bias"):
            parts = [state[f"transformer_blocks.{n}.attn1.to_{p}.{kind}"] for p in "qkv"]
            found[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(parts)
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    found["y_embedder.embedding_table.weight"] = state[table]
    found["pos_embed"] = torch.zeros(1, 16, 32)
    return found


def dit_of_one_embedding() -> torch.nn.Module:
    """A tiny DiT whose blocks have equal embeddings, as every converted original has."""
    model = FAMILIES["dit"].model()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.mark.parametrize("kind", ["facebook", "fast-DiT", "safetensors"])
def test_original_dit(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = dit_of_one_embedding()
    tensors = original_dit(model)
    path = tmp_path / "dit.pt"
    if kind == "facebook":
        torch.save(tensors, path)
    elif kind == "fast-DiT":  # samples come from its average
        wrong = {name: tensor + 1 for name, tensor in tensors.items()}
        torch.save({"model": wrong, "ema": tensors, "args": Namespaced()}, path)
    else:
        path = tmp_path / "dit.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    tiny = FAMILIES["dit"]
    frozen = load(
        tiny.base.name, path, base_config=str(folder("dit")), vae=str(folder("dit") / "vae")
    )
    assert frozen.facts["frequency_shift"] == 0.0  # the original's, not diffusers' 1
    set_frequency_shift(model, 0.0)
    torch.testing.assert_close(tiny.run(frozen.model), tiny.run(model))


def test_the_header_of_a_file_is_read_once(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To recognise the base, look at its data and load it; again once the file has changed."""
    path, read = tmp_path / "dit.safetensors", []
    tensors = {
        name: value.contiguous() for name, value in original_dit(dit_of_one_embedding()).items()
    }
    save_file(tensors, path)
    shapes = checkpoint.tensor_shapes
    monkeypatch.setattr(
        checkpoint, "tensor_shapes", lambda place: read.append(place) or shapes(place)
    )
    config = resolve(
        {
            "base": "auto",
            "pretrained_model_name_or_path": str(path),
            "base_config": str(folder("dit")),
        }
    )
    assert find_base(config) is FAMILIES["dit"].base
    base_kind(config)
    load_frozen(config)
    assert read == [path]
    save_file({**tensors, "more": torch.ones(1)}, path)
    assert "more" in checkpoint.shapes_of(path) and len(read) == 2


def test_trained_original_dit_keeps_its_time_embedding(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """diffusers' configuration cannot say the constant; loaded with 1 it would be another model."""
    path = tmp_path / "dit.pt"
    torch.save(original_dit(dit_of_one_embedding()), path)
    tiny, vae = FAMILIES["dit"], str(folder("dit") / "vae")
    options = {"base": tiny.base.name, "vae": vae, "base_config": str(folder("dit"))}
    config = resolve({**options, "pretrained_model_name_or_path": str(path), "method": "full"})
    first = load_frozen(config)
    FullMethod(first, config).save(tmp_path / "full", {}, torch.float32)
    again = load(tiny.base.name, tmp_path / "full", vae=vae)
    assert again.facts["frequency_shift"] == 0.0
    torch.testing.assert_close(tiny.run(again.model), tiny.run(first.model))
    (tmp_path / "full" / TIME_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(PatchError, match="expected the frequency shift"):
        load(tiny.base.name, tmp_path / "full", vae=vae)


class Namespaced:
    """Stands for the argparse.Namespace in such files; nothing of it may be loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('the checkpoint ran code')",)


def test_original_pixart_is_renamed(tmp_path: Path) -> None:
    model = FAMILIES["pixart"].model()
    state, depth = model.state_dict(), 3
    single = {
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
    }
    for n in range(depth):
        ours = f"transformer_blocks.{n}"
        single |= {
            f"blocks.{n}.attn.proj": f"{ours}.attn1.to_out.0",
            f"blocks.{n}.cross_attn.q_linear": f"{ours}.attn2.to_q",
            f"blocks.{n}.cross_attn.proj": f"{ours}.attn2.to_out.0",
            f"blocks.{n}.mlp.fc1": f"{ours}.ff.net.0.proj",
            f"blocks.{n}.mlp.fc2": f"{ours}.ff.net.2",
        }
    found = {
        f"{new}.{kind}": state[f"{old}.{kind}"]
        for new, old in single.items()
        for kind in ("weight", "bias")
    }
    found["final_layer.scale_shift_table"] = state["scale_shift_table"]
    found["y_embedder.y_embedding"] = torch.zeros(120, 12)
    for n in range(depth):
        ours = f"transformer_blocks.{n}"
        found[f"blocks.{n}.scale_shift_table"] = state[f"{ours}.scale_shift_table"]
        for kind in ("weight", "bias"):
            q, k, v = (state[f"{ours}.attn1.to_{part}.{kind}"] for part in "qkv")
            found[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat([q, k, v])
            keys, values = (state[f"{ours}.attn2.to_{part}.{kind}"] for part in "kv")
            found[f"blocks.{n}.cross_attn.kv_linear.{kind}"] = torch.cat([keys, values])
    path = tmp_path / "pixart.pth"
    torch.save({"state_dict": found}, path)
    renamed = checkpoint.rename(checkpoint.read_tensors(path))
    for name, tensor in renamed.items():
        assert torch.equal(tensor, state[name]), name
    assert set(renamed) == {name for name in state if not name.startswith("pos_embed.pos")}
    with pytest.raises(PatchError, match="found also quantum"):
        checkpoint.rename({**found, "quantum.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)], ids=["S", "B", "L", "XL"]
)
def test_published_dits_need_no_configuration(width: int, heads: int) -> None:
    tensors = {
        "x_embedder.proj.weight": torch.empty(width, 4, 2, 2, device="meta"),
        **{
            f"blocks.{layer}.attn.qkv.weight": torch.empty(3 * width, width, device="meta")
            for layer in range(28)
        },
        "final_layer.linear.weight": torch.empty(2 * 2 * 8, width, device="meta"),
        "y_embedder.embedding_table.weight": torch.empty(1001, width, device="meta"),
        "pos_embed": torch.empty(1, 1024, width, device="meta"),
    }
    config = checkpoint.infer_config(tensors)
    assert config == {
        "num_attention_heads": heads, "attention_head_dim": width // heads, "in_channels": 4,
        "out_channels": 8, "num_layers": 28, "sample_size": 64, "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    other = {**tensors, "x_embedder.proj.weight": torch.empty(100, 4, 2, 2, device="meta")}
    with pytest.raises(PatchError, match="--base_config"):
        checkpoint.infer_config(other)
    # Numbers of which a model is built must be those of values that the file holds.
    for name, shape in (
        ("blocks.9999.mlp.fc1.weight", (1,)),
        ("blocks.3.attn.qkv.weight", (1, 1)),
        ("pos_embed", (1, 10**6, 1)),
        ("y_embedder.embedding_table.weight", (10**6, 1)),
        ("final_layer.linear.weight", (10**6, 1)),
    ):
        with pytest.raises(PatchError, match="expected a tensor"):
            checkpoint.infer_config({**tensors, name: torch.empty(shape, device="meta")})


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_single_file_of_a_denoiser(
    ending: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """What the file lacks comes from --base_config."""
    tiny = FAMILIES["sd15"]
    weights = load_file(folder("sd15") / "unet" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / f"model{ending}"
    if ending == ".ckpt":
        torch.save({"state_dict": weights, "callbacks": Namespaced()}, path)
    else:
        save_file(weights, path)
    frozen = load(tiny.base.name, path, base_config=str(folder("sd15")))
    assert same(frozen.model, tiny.model())
    assert frozen.prediction == "epsilon"
    assert frozen.kind.conditioning == "caption"


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_detects_folders(name: str, folder: Callable[[str], Path]) -> None:
    config = resolve({"base": "auto", "pretrained_model_name_or_path": str(folder(name))})
    assert find_base(config) is FAMILIES[name].base


def test_auto_detects_original_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    torch.save({"ema": original_dit(FAMILIES["dit"].model())}, path)
    config = resolve({"base": "auto", "pretrained_model_name_or_path": str(path)})
    assert find_base(config) is FAMILIES["dit"].base


def test_another_vae(folder: Callable[[str], Path], tmp_path: Path) -> None:
    other = diffusers.AutoencoderKL.from_pretrained(folder("sd15") / "vae")
    torch.nn.init.ones_(other.decoder.conv_out.bias)
    other.save_pretrained(tmp_path / "vae")
    place = FAMILIES["sd15"].base.name, folder("sd15")
    frozen = load(*place, vae=str(tmp_path / "vae"), mixed_precision="bf16", no_half_vae=True)
    assert bool((frozen.vae.decoder.conv_out.bias == 1).all())
    assert frozen.vae.dtype == torch.float32
    assert frozen.model.dtype == torch.bfloat16


def test_wishes_for_the_schedule(folder: Callable[[str], Path]) -> None:
    sd15 = FAMILIES["sd15"].base.name, folder("sd15")
    assert load(*sd15, v_parameterization=True).prediction == "v_prediction"
    assert load(*sd15, zero_terminal_snr=True).scheduler.alphas_cumprod[-1] < 1e-6
    with pytest.raises(PatchError, match="found a flow model"):
        load(FAMILIES["flux"].base.name, folder("flux"), v_parameterization=True)


def spoil(path: Path, kind: str) -> Path:
    """Something that is no base."""
    if kind == "empty folder":
        path.mkdir()
    elif kind == "picture":
        path = path.with_suffix(".png")
        path.write_bytes(b"picture")
    elif kind == "broken file":
        path = path.with_suffix(".safetensors")
        path.write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    elif kind == "hostile pickle":
        path = path.with_suffix(".pt")
        path.write_bytes(pickle.dumps(Namespaced()))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "found nothing at"),
        ("empty folder", "expected weights of a UNet2DConditionModel"),
        ("picture", "expected weights ending in"),
        ("broken file", "expected a whole safetensors file"),
        ("hostile pickle", "found one that begins with"),
    ],
)
def test_bad_places_are_one_error(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PatchError) as caught:
        load(FAMILIES["sd15"].base.name, spoil(tmp_path / "place.d", kind))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_another_base_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(PatchError, match="found one of base tiny-sd21"):
        load(FAMILIES["sd15"].base.name, folder("sd21"))


def test_missing_part_is_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folder("sd15"), tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "text_encoder")
    with pytest.raises(PatchError, match="text_encoder and tokenizer at"):
        load(FAMILIES["sd15"].base.name, tmp_path / "base")
