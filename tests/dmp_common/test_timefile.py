"""The time embedding of a model, from a module and from disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmp_common import PatchError
from dmp_common.bases.timesteps import embed_timesteps
from dmp_common.tools import modelfiles
from dmp_common.tools.timefile import time_embedding_of
from tests.tiny import FAMILIES, Tiny

TIMES = torch.tensor([0.0, 10.5, 500.0, 999.0])
FAMILY = pytest.mark.parametrize("tiny", FAMILIES.values(), ids=FAMILIES)


def mlp_of(tiny: Tiny, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The four tensors of a model's time embedding, by layer."""
    return model.get_submodule(tiny.base.times["diffusers"].mlp).state_dict()


def write_original(path: Path, tiny: Tiny, model: torch.nn.Module, prefix: str = "") -> Path:
    """A file as the original code names its tensors: the time embedding, and what probes ask."""
    layers = dict.fromkeys(("flux", "flux2"), ("in_layer", "out_layer"))
    layers |= dict.fromkeys(("qwen-image", "ernie-image", "anima"), ("linear_1", "linear_2"))
    layers = layers.get(tiny.name, ("0", "2"))
    tensors = {}
    for probe in tiny.base.probes["ldm"]:
        shape = {"in_channels": (1, probe.value), "out_channels": (probe.value, 1)}
        shape |= {"in_features": (1, probe.value), "out_features": (probe.value, 1)}
        known = tuple(tensors.get(f"{probe.path}.weight", torch.zeros(1, 1)).shape)
        if probe.attribute == "kernel_size":
            wanted = (*known[:2], *probe.value)
        elif probe.attribute is None:
            wanted = known
        else:
            wanted = tuple(map(max, known, shape[probe.attribute])) + known[2:]
        if probe.value is not False:
            tensors[f"{probe.path}.weight"] = torch.zeros(wanted)

    def usual(name: str) -> str:
        layer, kind = name.split(".")
        return f"{layers[layer in ('linear_2', '2')]}.{kind}"

    for name, tensor in mlp_of(tiny, model).items():
        original = (tiny.time_name or usual)(name)
        tensors[f"{tiny.base.times['ldm'].mlp}.{original}"] = tensor.clone()
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    return path


@FAMILY
def test_same_embedding_from_module_folder_and_file(tiny, tmp_path):
    model, patch = tiny.model(), tiny.patch()
    expected = embed_timesteps(model, tiny.base, "diffusers", TIMES)
    part = "unet" if tiny.base.layout == "map" else "transformer"
    model.save_pretrained(tmp_path / "pipe" / part)
    model.save_pretrained(tmp_path / "half", variant="fp16")
    sources = {
        "module": model,
        "pipeline": type("Pipe", (), {part: model})(),
        "pipeline folder": tmp_path / "pipe",
        "model folder": str(tmp_path / "pipe" / part),
        "variant": tmp_path / "half",
        "file": tmp_path / "pipe" / part / "diffusion_pytorch_model.safetensors",
    }
    if "ldm" in tiny.base.probes:
        for prefix in ("", "model.diffusion_model."):
            path = tmp_path / f"{len(prefix)}.safetensors"
            sources[f"original file with {prefix!r}"] = write_original(path, tiny, model, prefix)
    for name, source in sources.items():
        e = time_embedding_of(source, patch, TIMES)
        assert e.dtype == torch.float32, name
        assert not e.requires_grad, name
        assert (e - expected).abs().max() < 1e-6, name


def test_sharded_folder(tmp_path):
    tiny = FAMILIES["sd3"]
    model = tiny.model()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    expected = embed_timesteps(model, tiny.base, "diffusers", TIMES)
    assert (time_embedding_of(tmp_path, tiny.patch(), TIMES) - expected).abs().max() < 1e-6


def test_half_precision_file(tmp_path):
    tiny = FAMILIES["sd15"]
    model = tiny.model().bfloat16()
    path = write_original(tmp_path / "a.safetensors", tiny, model)
    expected = embed_timesteps(model.float(), tiny.base, "diffusers", TIMES)
    assert (time_embedding_of(path, tiny.patch(), TIMES) - expected).abs().max() < 1e-6


def test_patch_decides_the_frequency_shift_of_a_file(tmp_path):
    tiny = FAMILIES["dit"]
    model = tiny.model()
    path = write_original(tmp_path / "a.safetensors", tiny, model)
    patch = tiny.patch(frequency_shift=0.0)
    with pytest.raises(PatchError, match="frequency shift 0, and the model has 1"):
        time_embedding_of(model, patch, TIMES)
    model.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 0.0
    expected = embed_timesteps(model, tiny.base, "diffusers", TIMES)
    for source in (model, path):
        assert (time_embedding_of(source, patch, TIMES) - expected).abs().max() < 1e-6


def test_class_embedding_is_added(tmp_path):
    tiny = FAMILIES["dit"]
    model, patch = tiny.model(), tiny.patch(condition="t+y")
    model.save_pretrained(tmp_path / "model")
    path = write_original(tmp_path / "a.safetensors", tiny, model)
    table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    everything = load_file(path)
    save_file(everything | {"y_embedder.embedding_table.weight": table.clone()}, path)
    labels = torch.tensor([3, 3, 3, 3])
    expected = embed_timesteps(model, tiny.base, "diffusers", TIMES, labels)
    for source in (model, tmp_path / "model", path):
        for given in (3, labels):
            e = time_embedding_of(source, patch, TIMES, given)
            assert (e - expected).abs().max() < 1e-6
        for wrong in (-1, len(table)):
            with pytest.raises(PatchError, match=f"from 0 to {len(table) - 1}, found {wrong}"):
                time_embedding_of(source, patch, TIMES, wrong)
        with pytest.raises(PatchError, match="no class label was given"):
            time_embedding_of(source, patch, TIMES)
        with pytest.raises(PatchError, match="expected one class label or 4"):
            time_embedding_of(source, patch, TIMES, torch.tensor([1, 2]))
        with pytest.raises(PatchError, match="sees the timestep only"):
            time_embedding_of(source, tiny.patch(), TIMES, 3)


def test_only_the_time_embedding_is_read(tmp_path, monkeypatch):
    tiny, read = FAMILIES["sd15"], []
    path = write_original(tmp_path / "a.safetensors", tiny, tiny.model())
    real = modelfiles.safe_open

    class Recorder:
        def __init__(self, *args: object, **options: object) -> None:
            self.file = real(*args, **options)

        def __enter__(self) -> "Recorder":
            self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(modelfiles, "safe_open", Recorder)
    time_embedding_of(path, tiny.patch(), TIMES)
    layers = [f"time_embed.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    assert sorted(read) == sorted(layers)


@pytest.mark.parametrize("other", ["sd21", "sdxl", "dit", "flux"])
def test_model_of_another_base_is_refused(other, tmp_path):
    model, patch = FAMILIES[other].model(), FAMILIES["sd15"].patch()
    path = write_original(tmp_path / "a.safetensors", FAMILIES[other], model)
    for source in (path, model):
        with pytest.raises(PatchError, match="base tiny-sd15"):
            time_embedding_of(source, patch, TIMES)


def test_wrong_width_of_a_time_layer_is_refused(tmp_path):
    tiny = FAMILIES["dit"]
    path = write_original(tmp_path / "a.safetensors", tiny, tiny.model())
    everything = load_file(path)
    save_file(everything | {"t_embedder.mlp.0.weight": torch.zeros(32, 128)}, path)
    with pytest.raises(PatchError, match=r"shape \(32, 256\) and its bias, found \(32, 128\)"):
        time_embedding_of(path, tiny.patch(), TIMES)


def unsuitable(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Sources that are no model, and what the error says."""
    empty, pickled, broken, shards = (tmp_path / n for n in ("empty", "bin", "broken", "shards"))
    for folder in (empty, pickled, broken, shards):
        folder.mkdir()
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    index = "diffusion_pytorch_model.safetensors.index.json"
    (broken / index).write_text("{")
    name = "time_embed.{}.weight"
    names = (name.format(0), name.format(2), "input_blocks.0.0.weight")
    weight_map = dict.fromkeys(names, "gone.safetensors")
    (shards / index).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    missing_bias = {name.format(0): torch.zeros(64, 16), name.format(2): torch.zeros(64, 64)}
    save_file(missing_bias, tmp_path / "part.safetensors")
    return {
        "missing": (tmp_path / "nowhere", "expected a model, found nothing: check the path"),
        "empty": (empty, "found an empty folder"),
        "pickled": (pickled, "found diffusion_pytorch_model.bin"),
        "broken": (broken, "expected an index of model files"),
        "shards": (shards, "gone.safetensors"),
        "ckpt": (tmp_path / "model.ckpt", "expected a .safetensors file"),
        "cut": (tmp_path / "cut.safetensors", "expected a whole safetensors file"),
        "other": (tmp_path / "other.safetensors", "found 1 other tensors (a)"),
        "part": (tmp_path / "part.safetensors", "expected a model of base tiny-sd15"),
    }


@pytest.mark.parametrize(
    "case", ["missing", "empty", "pickled", "broken", "shards", "ckpt", "cut", "other", "part"]
)
def test_unsuitable_sources_are_refused(case, tmp_path):
    source, message = unsuitable(tmp_path)[case]
    with pytest.raises(PatchError) as caught:
        time_embedding_of(source, FAMILIES["sd15"].patch(), TIMES)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
