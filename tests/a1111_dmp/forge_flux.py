"""A narrow Flux with random weights for tests of a real Forge.

    WEBUI_PATH=... python tests/a1111_dmp/forge_flux.py FOLDER

WEBUI_PATH is that of Forge, and its own Python runs this. Transformer and T5 are small; CLIP-L and
the VAE are by the book (0.4 gigabytes in all). The server needs the extension in
`tests/a1111_dmp/server_extension`, with DMP_TEST_NARROW set.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
REPOSITORY = "backend/huggingface/black-forest-labs/FLUX.1-dev"


def main(folder: Path) -> None:
    """Writes two checkpoints into a folder."""
    webui = Path(os.environ["WEBUI_PATH"]).resolve()
    sys.argv[1:] = ["--always-cpu", "--cpu"]  # Forge reads the first, Forge Neo the second
    packages = (webui / "packages_3rdparty", webui / "modules_forge" / "packages")  # Forge, Neo
    sys.path[:0] = map(str, (webui, *packages, HERE, HERE.parents[1]))
    shapes, write = shapes_of(webui), importlib.import_module("checkpoints").write
    for seed, letter in enumerate("ab"):
        write(folder / f"narrow-flux-{letter}.safetensors", shapes, seed, half=True)


def shapes_of(webui: Path) -> dict[str, torch.Size]:
    """Names and shapes of a whole checkpoint, from models without memory."""
    sizes = importlib.import_module("tiny_base")
    folder = webui / REPOSITORY
    read = importlib.import_module("backend.utils").read_arbitrary_config
    flux = importlib.import_module("backend.nn.flux").IntegratedFluxTransformer2DModel
    vae = importlib.import_module("backend.nn.vae").IntegratedAutoencoderKL
    t5 = importlib.import_module("backend.nn.t5").IntegratedT5
    transformers = importlib.import_module("transformers")
    clip = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder")
    real = {
        "in_channels": 16,
        "vec_in_dim": clip.hidden_size,
        "mlp_ratio": 4.0,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    if "patch_size" in inspect.signature(flux).parameters:  # Forge Neo's class has these too
        real |= {"patch_size": 2, "out_channels": 16}
    with torch.device("meta"):
        parts = {
            "model.diffusion_model.": flux(**real | sizes.FLUX),
            "vae.": vae.from_config(vae.load_config(folder / "vae")),
            "text_encoders.clip_l.transformer.": transformers.CLIPTextModel(clip),
            "text_encoders.t5xxl.": t5(read(str(folder / "text_encoder_2")) | sizes.T5),
        }
    return {
        prefix + name: tensor.shape
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
        if not name.endswith(("position_ids", "logit_scale"))
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
