"""Folding an un-gated modulating patch into a model's file."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmp_common import Patch, PatchError, attach
from dmp_common.__main__ import main
from dmp_common.tools.fold import fold
from tests.dmp_common.attaching import DIT, FLUX, SD15, close, some
from tests.dmp_common.test_modulate import modulating


@some(DIT, FLUX)
def test_the_folded_model_is_the_patched_one(tiny, tmp_path):
    model, patch = tiny.model(), modulating(tiny, gate="none", sites="modulated")
    source, out = tmp_path / "model.safetensors", tmp_path / "folded.safetensors"
    save_file(model.state_dict(), source, metadata={"format": "pt"})
    with torch.no_grad():
        with attach(model, patch, strength=0.5):
            expected = tiny.run(model)
        folded = fold(patch, source, out, strength=0.5)
        other = tiny.model()
        other.load_state_dict(load_file(out))
        assert close(tiny.run(other), expected, 1e-5)
    assert folded.layers == folded.biases == len(patch.sites)
    assert not folded.without
    changed = load_file(out)
    untouched = [n for n, t in load_file(source).items() if torch.equal(t, changed[n])]
    sites = {site.paths["diffusers"] for site in patch.sites.values()}
    assert untouched and not {name.rpartition(".")[0] for name in untouched} & sites


def test_layers_without_bias_are_named(tmp_path):
    """SD 1.5's queries, keys and values have none."""
    model, patch = SD15.model(), modulating(SD15, gate="none")
    source, out = tmp_path / "model.safetensors", tmp_path / "folded.safetensors"
    save_file(model.state_dict(), source)
    with pytest.raises(PatchError, match=r"found \d+ without .*to_q.*--partial"):
        fold(patch, source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    folded = fold(patch, source, out, partial=True)
    assert len(folded.without) == folded.layers - folded.biases > 0
    with torch.no_grad():
        prompts = patch.pools["modulation"].by_site()
        for name, site in patch.sites.items():
            if site.paths["diffusers"] in folded.without:
                prompts[name][:, 1] = 0.0
        with attach(model, patch):
            expected = SD15.run(model)
        model.load_state_dict(load_file(out))
        assert close(SD15.run(model), expected, 1e-5)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1"])
def test_scales_of_gguf_blocks(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    patch = modulating(DIT, gate="none", std=0.05)
    source, out = tmp_path / "model.gguf", tmp_path / "folded.gguf"
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(source, "dit")
    state = DIT.model().state_dict()
    for name, tensor in state.items():
        layer = name.removesuffix(".weight") in {
            site.paths["diffusers"] for site in patch.sites.values()
        }
        data = tensor.float().numpy()
        if layer and name.endswith(".weight"):
            writer.add_tensor(name, gguf.quantize(data, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fold(patch, source, out)
    before, after = (
        {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(path).tensors
        }
        for path in (source, out)
    )
    for name, site in patch.sites.items():
        scale, shift = patch.saved()[f"prompts.{name}"][0].detach()
        path = site.paths["diffusers"]
        expected = torch.tensor(before[f"{path}.weight"]) * (1 + scale[:, None])
        assert close(torch.tensor(after[f"{path}.weight"]), expected, 2e-3)  # scales are float16
        bias = state[f"{path}.bias"] * (1 + scale) + shift
        assert close(torch.tensor(after[f"{path}.bias"]), bias, 1e-6)


def test_what_cannot_be_folded(tmp_path, capsys):
    source = tmp_path / "model.safetensors"
    save_file(DIT.model().state_dict(), source)
    out = tmp_path / "out.safetensors"
    for wrong in (modulating(DIT), DIT.patch(1), modulating(DIT, gate="none", timesteps=(0, 500))):
        with pytest.raises(PatchError, match="to fold"):
            fold(wrong, source, out)
    patch = modulating(DIT, gate="none")
    with pytest.raises(PatchError, match="another file"):
        fold(patch, source, source)
    with pytest.raises(PatchError, match="the layers of a model of base"):
        fold(modulating(FLUX, gate="none"), source, out)
    eight = {n: t.to(torch.float8_e4m3fn) for n, t in DIT.model().state_dict().items()}
    save_file(eight, tmp_path / "fp8.safetensors")
    with pytest.raises(PatchError, match="F8_E4M3"):
        fold(patch, tmp_path / "fp8.safetensors", out)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(PatchError, match="beyond the end"):
        fold(patch, tmp_path / "cut.safetensors", out)
    assert not out.exists()
    file = tmp_path / "patch.safetensors"
    patch.save(file)
    assert main(["fold", str(file), str(source), str(out)]) == 0
    assert "layers scaled" in capsys.readouterr().out
    assert Patch.load(file).variant.gate == "none"
