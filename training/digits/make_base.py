"""Train the bundled `digits` base and its classifier from fixed seeds, or check convergence.

    python training/digits/make_base.py --out DIR              make both, as bundled
    python training/digits/make_base.py --out DIR --extra 0.2  also train 20 % longer and compare

Data: the training split. The validation split chose the recipe below; the test split is not read.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file
from torch import nn

# Run as a script, Python puts this file's folder first on sys.path, where `classifier` would be a
# top-level module. The repository root belongs there instead.
_FOLDER, _ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:] = [str(_ROOT), *(p for p in sys.path if not p or Path(p).resolve() != _FOLDER)]

from training.data.digits import NUM_CLASSES, DigitsSplit, load_digits_split  # noqa: E402
from training.digits.classifier import DigitClassifier  # noqa: E402
from training.digits.muon import Muon  # noqa: E402
from training.evaluation.losses import denoising_loss_by_bin  # noqa: E402

NULL_LABEL = NUM_CLASSES  # the class embedding's extra row, "no class"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the base's weights; chosen on validation loss."""

    layers: int = 6
    heads: int = 2
    head_width: int = 32
    dropout: float = 0.0
    steps: int = 9600
    warmup: int = 200
    batch: int = 64
    muon_rate: float = 0.02  # the blocks' matrices
    adam_rate: float = 4e-3  # embedding tables, biases, input and output layers
    weight_decay: float = 0.05
    ema_decay: float = 0.995
    # Spread of the initial timestep and class embeddings. DiT's 0.02 is made for widths near 1000;
    # at width 64 it starts them close to zero and learning is slow (validation loss after 1000
    # AdamW steps 0.106 against 0.095).
    embedding_std: float = 0.1
    label_dropout: float = 0.1
    seed: int = 0


def build_scheduler() -> DDIMScheduler:
    """The noise schedule: DiT's linear betas over 1000 timesteps, noise prediction.

    Sampling starts at timestep 999 ("trailing"): diffusers' default would start 50 steps at 980.
    """
    return DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")


def build_base(recipe: Recipe) -> DiTTransformer2DModel:
    """An untrained DiT for (B, 1, 8, 8), 16 tokens, initialised as the original DiT.

    As in the original, all blocks share one embedding of timestep and class; diffusers keeps a
    copy per block, and `untie` makes them before saving. diffusers would also drop labels in each
    block by itself, so a sample could be half conditional: switched off, `train_base` drops them.
    """
    torch.manual_seed(recipe.seed)
    model = DiTTransformer2DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_width,
        in_channels=1,
        out_channels=1,
        num_layers=recipe.layers,
        dropout=recipe.dropout,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    embedding = model.transformer_blocks[0].norm1.emb
    embedding.class_embedder.dropout_prob = 0.0
    for part in (
        embedding.timestep_embedder.linear_1,
        embedding.timestep_embedder.linear_2,
        embedding.class_embedder.embedding_table,
    ):
        nn.init.normal_(part.weight, std=recipe.embedding_std)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    for block in model.transformer_blocks:
        block.norm1.emb = embedding
        nn.init.zeros_(block.norm1.linear.weight)  # every block starts as the identity
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    return model


def untie(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Give every block its own copy of the shared embedding, as diffusers' format has it."""
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    return model


def build_optimizers(
    model: DiTTransformer2DModel, recipe: Recipe
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = name.startswith("transformer_blocks") and "embedding_table" not in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    decay = recipe.weight_decay
    return (
        Muon(matrices, lr=recipe.muon_rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=recipe.adam_rate, weight_decay=decay),
    )


def train_base(recipe: Recipe, data: DigitsSplit) -> DiTTransformer2DModel:
    """Train with cosine annealing to zero; returns the averaged (EMA) weights in eval mode."""
    model, scheduler = build_base(recipe).train(), build_scheduler()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = build_optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, recipe)) for o in optimizers
    ]
    torch.manual_seed(recipe.seed + 1)  # batches, noise and dropout
    for step in range(recipe.steps):
        rows = torch.randint(len(data), (recipe.batch,))
        images, labels = data.images[rows], data.labels[rows]
        labels = torch.where(torch.rand(recipe.batch) < recipe.label_dropout, NULL_LABEL, labels)
        # One timestep from each of `batch` equal ranges: less variance than independent draws.
        t = ((torch.arange(recipe.batch) + torch.rand(recipe.batch)) / recipe.batch * 1000).long()
        t = t.clamp(max=999)  # rounding can reach 1000
        noise = torch.randn_like(images)
        prediction = model(scheduler.add_noise(images, noise, t), t, labels).sample
        loss = F.mse_loss(prediction, noise)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        decay = min(recipe.ema_decay, (step + 1) / (step + 10))  # follow quickly at first
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        if (step + 1) % 500 == 0:
            print(f"step {step + 1} of {recipe.steps}: training loss {loss:.4f}", flush=True)
    return average


def _rate(step: int, recipe: Recipe) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def train_classifier(data: DigitsSplit, steps: int = 1500, seed: int = 0) -> DigitClassifier:
    """Train the classifier on the training split; images move by up to one pixel."""
    torch.manual_seed(seed)
    model = DigitClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data), (128,))
        dx, dy = torch.randint(3, (2,)).tolist()
        images = F.pad(data.images[rows], (1, 1, 1, 1), value=-1.0)  # -1 is background
        images = images[:, :, dy : dy + 8, dx : dx + 8]
        loss = F.cross_entropy(model(images), data.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        anneal.step()
    return model.eval()


def validation_loss(model: nn.Module) -> torch.Tensor:
    """Denoising loss (10,) by timestep bin on the validation split, 60,000 fixed draws."""
    data = load_digits_split("validation")
    return denoising_loss_by_bin(
        model, build_scheduler(), data.images, data.labels, draws=20, batch_size=500
    )


def make_classifier(out: Path, data: DigitsSplit) -> None:
    """Train and save the classifier; print its validation accuracy."""
    classifier = train_classifier(data)
    held_out = load_digits_split("validation")
    with torch.no_grad():
        right = classifier(held_out.images).argmax(1) == held_out.labels
    print(f"classifier: validation accuracy {right.double().mean():.4f}", flush=True)
    save_file(classifier.state_dict(), out / "classifier.safetensors")


def make_base(out: Path, recipe: Recipe, data: DigitsSplit) -> torch.Tensor:
    """Train and save base and scheduler in diffusers format; returns the validation loss (10,)."""
    start = time.monotonic()
    model = untie(train_base(recipe, data))
    loss = validation_loss(model)
    print(
        f"base: {recipe.steps} steps in {time.monotonic() - start:.0f} s, validation loss "
        f"{loss.mean():.5f}, by timestep bin {' '.join(f'{x:.4f}' for x in loss)}",
        flush=True,
    )
    model.save_pretrained(out / "transformer")
    build_scheduler().save_pretrained(out / "scheduler")
    return loss


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train the bundled digits base and its classifier from fixed seeds.",
        epilog="Writes DIR/base/transformer, DIR/base/scheduler and DIR/classifier.safetensors.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--extra",
        type=float,
        default=0.0,
        metavar="F",
        help="convergence check: train once more, F longer (0.2: 20 %% more steps, the whole "
        "schedule stretched), and print how far the validation loss moves",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (default 1, as bundled); another number rounds differently",
    )
    arguments = parser.parse_args()
    if not 0 <= arguments.extra <= 10:
        parser.error(f"--extra: expected a fraction from 0 to 10, found {arguments.extra}")
    if arguments.threads < 1:
        parser.error(f"--threads: expected at least 1, found {arguments.threads}")
    return arguments


def main() -> None:
    """Make everything the command line asks for."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data, recipe = load_digits_split("train"), Recipe()
    make_classifier(arguments.out, data)
    loss = make_base(arguments.out / "base", recipe, data).mean()
    if arguments.extra:
        longer = replace(recipe, steps=round(recipe.steps * (1 + arguments.extra)))
        other = make_base(arguments.out / "base_longer", longer, data).mean()
        print(
            f"convergence: {recipe.steps} steps {loss:.5f}, {longer.steps} steps {other:.5f}, "
            f"change {100 * (other / loss - 1):+.3f} %"
        )


if __name__ == "__main__":
    main()
