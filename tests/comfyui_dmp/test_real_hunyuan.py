"""HunyuanImage 2.1: tensors as ComfyUI's own classes name them, read as the trainer does."""

from __future__ import annotations

import pytest
import torch

from tests.tinyhunyuanimage import model_of


@pytest.fixture
def family(real):
    return real.FAMILIES.get("hunyuan-image") or pytest.skip("not in these releases")


@pytest.fixture
def read(comfyui_path):
    """What diffusers' tensors are made of."""
    pytest.importorskip("accelerate")
    from training.base import hunyuan_files

    return hunyuan_files


def test_the_transformer(family, read):
    twin = family.diffusers().state_dict()
    given = family.comfy().model.diffusion_model.state_dict()
    found = read.transformer_named(given, twin)
    assert found.keys() == twin.keys()
    assert all(torch.equal(found[name], value) for name, value in twin.items())


def test_what_reads_the_glyphs(family, read):
    """Which the model in small does without: names and shapes."""
    import comfy.supported_models

    config = comfy.supported_models.HunyuanImage21({**family.unet, "byt5": True})
    config.set_inference_dtype(torch.float32, None)
    given = config.get_model({}, device=torch.device("meta")).diffusion_model.state_dict()
    with torch.device("meta"):
        wanted = model_of(2, 64, 64, 2, 16, 1472).state_dict()
    found = read.transformer_named(given, wanted)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in wanted.items()
    }


def test_the_vae(family, read):
    """Both make the same latent of a picture, and the same picture of that."""
    import diffusers
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    size = {
        "block_out_channels": [32, 64], "in_channels": 3, "out_channels": 3, "num_res_blocks": 1,
        "z_channels": 4, "ffactor_spatial": 2,
    }  # fmt: skip
    kinds = {
        "regularizer_config": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer",
        "encoder_config": "comfy.ldm.hunyuan_video.vae.Encoder",
        "decoder_config": "comfy.ldm.hunyuan_video.vae.Decoder",
    }
    torch.manual_seed(0)
    theirs = AutoencodingEngine(
        **{
            part: {"target": kind, "params": {} if "regularizer" in part else size}
            for part, kind in kinds.items()
        }
    )
    ours = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, spatial_compression_ratio=2, sample_size=16, scaling_factor=1.0,
    )  # fmt: skip
    for value in theirs.parameters():
        torch.nn.init.normal_(value, std=0.1)
    wanted = ours.state_dict()
    found = read.vae_named(theirs.state_dict(), wanted)
    assert found.keys() == wanted.keys()
    ours.load_state_dict(found)
    picture = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        latent = ours.encode(picture).latent_dist.mean
        mean, _ = theirs.encoder(picture).chunk(2, dim=1)
        torch.testing.assert_close(latent, mean, rtol=1e-4, atol=1e-4)
        again = ours.decode(latent).sample
        torch.testing.assert_close(again, theirs.decoder(latent), rtol=1e-4, atol=1e-4)
