"""A full-size Stable Diffusion 1.5 with random weights, trained from a folder of photographs.

    python -m benchmarks.full_size_training folder [--student q4_0]

Makes the base (4.3 GB) and the photographs with captions in the folder, trains a patch with the
command that users call, gives it to diffusers' own pipeline, and prints times and peak memory. With
`--student` the patch repairs the base in a type of GGUF (`--objective distill`), from a file as
ComfyUI-GGUF's tools write it. Only the weights are random, and the tokenizer, which knows the words
of these captions alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.models import SD15

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["a", "photo", "of", "temple", "in", "china", "pink", "flower"]
CAPTIONS = ("a photo of a temple in china", "a photo of a pink flower")


def make_base(folder: Path) -> None:
    """The published configurations, in the layout of diffusers."""
    import diffusers
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    if (folder / "model_index.json").exists():
        return
    torch.manual_seed(0)
    vocabulary = {word: n for n, word in enumerate([*WORDS, "<u>"])} | {"<b>": 49406, "<e>": 49407}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<b> $A <e>", special_tokens=[("<b>", 49406), ("<e>", 49407)]
    )
    clip = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, eos_token_id=49407, bos_token_id=49406, pad_token_id=49407,
    )  # fmt: skip
    parts = {
        "unet": diffusers.UNet2DConditionModel(**SD15),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            sample_size=512, scaling_factor=0.18215,
        ),
        "text_encoder": transformers.CLIPTextModel(clip),
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<b>", eos_token="<e>", pad_token="<e>",
            unk_token="<u>", model_max_length=77,
        ),
        "scheduler": diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        ),
    }  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def make_pictures(folder: Path) -> None:
    """Tiles of scikit-learn's two photographs (640 x 427), each with its caption."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True, exist_ok=True)
    for photo, caption in zip(load_sample_images().images, CAPTIONS, strict=True):
        name = caption.split()[-1]
        for number, left in enumerate((0, 100, 200, 213)):
            tile = Image.fromarray(photo).crop((left, 0, left + 427, 427))
            tile.save(folder / f"{name}{number}.png")
            (folder / f"{name}{number}.txt").write_text(caption, encoding="utf-8")


def make_student(base: Path, kind: str) -> Path:
    """The UNet of a base in a type of GGUF, in the original naming."""
    from tests.training.tinyfiles import denoiser_tensors
    from tests.training.tinyggufs import write_gguf

    path = base.parent / f"sd15-{kind.upper()}.gguf"
    if not path.exists():
        write_gguf(path, denoiser_tensors(base, "sd15"), kind.upper())
    return path


def denoiser_of(base: Path, student: Path | None) -> Any:
    """The UNet of a base, or its cheap form in a file."""
    import diffusers

    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    if student is None:
        return unet
    from dmp_common import get_base
    from training.base.families.table import family_of
    from training.base.frozen import FrozenBase
    from training.base.student_weights import load_student

    spec = get_base("sd15")
    return load_student(FrozenBase(unet, None, spec, "diffusers", family_of(spec)), student)


def use(base: Path, patch: Path, size: int, student: Path | None) -> None:
    """Two pictures of the pipeline from equal noise, without and with the patch."""
    import diffusers
    import transformers

    import dmp_common as dmp

    unet = denoiser_of(base, student)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(base, subfolder="vae"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(base, subfolder="text_encoder"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(base, subfolder="tokenizer"),
        unet=unet,
        scheduler=diffusers.DDIMScheduler.from_pretrained(base, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            CAPTIONS[0], height=size, width=size, num_inference_steps=2, generator=generator,
            output_type="pt",
        ).images  # fmt: skip

    plain = draw()
    with dmp.attach(pipe, dmp.Patch.load(patch)) as attachment:
        patched = draw()
        calls = attachment.calls
    again = draw()
    assert torch.equal(plain, again), "removing the patch gives the base back"
    change = float((patched - plain).abs().mean())
    assert change > 0, "the patch does something"
    print(f"diffusers pipeline: {calls} patched calls, pictures differ by {change:.2e} on average")


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--student", help="train on the base in this type of GGUF, such as q4_0")
    options, more = parser.parse_known_args()  # the others are the trainer's
    base, pictures, out = (options.folder / name for name in ("base", "pictures", "out"))
    make_base(base)
    make_pictures(pictures)
    command = [
        sys.executable, str(ROOT / "training" / "train_dmp.py"), "--base", "sd15",
        "--pretrained_model_name_or_path", str(base), "--train_data_dir", str(pictures),
        "--resolution", str(options.size), "--train_batch_size", "1", "--cpu",
        "--max_train_steps", str(options.steps), "--output_dir", str(out), *more,
    ]  # fmt: skip
    student = None
    if options.student is not None:
        student = make_student(base, options.student)
        command += ["--objective", "distill", "--student_weights", str(student)]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    print(f"trainer: {time.perf_counter() - start:.0f} s in all, {options.steps} steps")
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
        print(f"trainer: peak memory {peak * unit / 2**30:.2f} GiB")
    patch = out / "sd15-dmp.safetensors"
    if patch.exists():
        use(base, patch, options.size, student)


if __name__ == "__main__":
    main()
