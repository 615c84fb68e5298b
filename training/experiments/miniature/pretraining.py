"""Pre-training of the small class-conditional DiTs that patches are tried on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from training.base.families.dit import initialise
from training.experiments.miniature.muon import make_muon


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that decides a base's weights; chosen on validation loss.

    Args:
        size, channels, patch_size: of the images, and pixels along a token's side.
        classes: classes; the embedding's row behind them means "no class".
        layers, heads, head_width: of the transformer.
        muon_rate: learning rate of the matrices in the blocks.
        adam_rate: of embedding tables, biases, input and output layers.
        annealing: "cosine" over all steps, or "linear" over the last `annealed` share of them
            after a constant rate (so that a longer run shares the constant part).
        embedding_std: spread of the initial timestep and class embeddings. DiT's 0.02 is made
            for widths near 1000; at width 64 it starts them close to zero and learning is slow
            (digits, validation loss after 1000 AdamW steps 0.106 against 0.095).
        flip: mirror every other image.
        autocast: first steps with bfloat16 for the forward pass. Its rounding is as large as the
            loss at the noisiest timesteps, so the annealing, at least, is in full precision.
    """

    size: int
    channels: int
    patch_size: int
    layers: int
    heads: int
    head_width: int
    steps: int
    classes: int = 10
    dropout: float = 0.0
    warmup: int = 200
    batch: int = 64
    muon_rate: float = 0.02
    adam_rate: float = 4e-3
    weight_decay: float = 0.05
    annealing: Literal["cosine", "linear"] = "cosine"
    annealed: float = 0.2
    ema_decay: float = 0.995
    embedding_std: float = 0.1
    label_dropout: float = 0.1
    flip: bool = False
    autocast: int = 0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Factor on the learning rate: linear warm-up, then the annealing down to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.annealing == "linear":
            return min(1.0, (self.steps - step) / (self.annealed * self.steps))
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def constant_steps(self) -> int:
        """Steps before the annealing begins; 0 for a cosine."""
        return round(self.steps * (1 - self.annealed)) if self.annealing == "linear" else 0


def build_scheduler() -> DDIMScheduler:
    """The noise schedule: DiT's linear betas over 1000 timesteps, noise prediction.

    Sampling starts at timestep 999 ("trailing"): diffusers' default would start 50 steps at 980.
    """
    return DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")


def build_base(recipe: BaseRecipe) -> DiTTransformer2DModel:
    """An untrained DiT, initialised as the original.

    As in the original, all blocks share one embedding of timestep and class; diffusers keeps a
    copy per block, and `untie` makes them before saving. diffusers would also drop labels in each
    block by itself, so a sample could be half conditional: switched off, `Pretraining` drops them.
    """
    torch.manual_seed(recipe.seed)
    model = DiTTransformer2DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_width,
        in_channels=recipe.channels,
        out_channels=recipe.channels,
        num_layers=recipe.layers,
        dropout=recipe.dropout,
        sample_size=recipe.size,
        patch_size=recipe.patch_size,
        num_embeds_ada_norm=recipe.classes,
    )
    initialise(model, recipe.embedding_std)
    embedding = model.transformer_blocks[0].norm1.emb
    embedding.class_embedder.dropout_prob = 0.0
    for block in model.transformer_blocks:
        block.norm1.emb = embedding
    return model


def untie(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Give every block its own copy of the shared embedding, as diffusers' format has it."""
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    return model


def build_optimizers(
    model: DiTTransformer2DModel, recipe: BaseRecipe
) -> tuple[torch.optim.Optimizer, torch.optim.AdamW]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = name.startswith("transformer_blocks") and "embedding_table" not in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    decay = recipe.weight_decay
    return (
        make_muon(matrices, lr=recipe.muon_rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=recipe.adam_rate, weight_decay=decay),
    )


class Pretraining:
    """A base being trained, which can be kept and gone on from.

    Args:
        recipe: how.
        images: (B, C, H, W), float32 in [-1, 1] or uint8.
        labels: (B,).
        compiled: compile the forward pass (faster; rounds differently).
    """

    def __init__(
        self, recipe: BaseRecipe, images: Tensor, labels: Tensor, compiled: bool = False
    ) -> None:
        self.recipe, self.images, self.labels = recipe, images, labels
        self.model = build_base(recipe).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.scheduler = build_scheduler()
        self.optimizers = build_optimizers(self.model, recipe)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.forward: Callable[..., Any] = self.model
        if compiled:
            self.forward = torch.compile(self.model)
        self.step = 0
        torch.manual_seed(recipe.seed + 1)  # batches, noise and dropout

    def run(self, until: int, said: Callable[[str], None]) -> None:
        """Trains up to a step."""
        while self.step < until:
            loss = self._step()
            self.step += 1
            if self.step % 500 == 0:
                said(f"step {self.step} of {self.recipe.steps}: training loss {loss:.4f}")

    def _step(self) -> float:
        recipe = self.recipe
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * recipe.rate(self.step)
        rows = torch.randint(len(self.labels), (recipe.batch,))
        images, labels = as_float(self.images[rows]), self.labels[rows]
        if recipe.flip:
            mirrored = torch.rand(recipe.batch, 1, 1, 1) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        dropped = torch.rand(recipe.batch) < recipe.label_dropout
        labels = torch.where(dropped, recipe.classes, labels)
        # One timestep from each of `batch` equal ranges: less variance than independent draws.
        t = ((torch.arange(recipe.batch) + torch.rand(recipe.batch)) / recipe.batch * 1000).long()
        t = t.clamp(max=999)  # rounding can reach 1000
        noise = torch.randn_like(images)
        noisy = self.scheduler.add_noise(images, noise, t)
        half = self.step < recipe.autocast
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            prediction = self.forward(noisy, t, labels).sample
        loss = F.mse_loss(prediction.float(), noise)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(recipe.ema_decay, (self.step + 1) / (self.step + 10))  # soon follows
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Writes what `load` goes on from."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "random": torch.get_rng_state(),
        }
        partial = path.with_name(path.name + ".tmp")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a file of `save`; bit for bit where nothing else differs.

        Raises:
            ValueError: the file was written with another Muon than this torch has.
        """
        state = torch.load(path, weights_only=True)
        muon = self.optimizers[0].state_dict()
        if muon["param_groups"][0].keys() != state["optimizers"][0]["param_groups"][0].keys():
            raise ValueError(
                f"expected a state with the Muon of torch {torch.__version__} in {path}, found one "
                "of another release: go on with the torch that wrote it, or begin again."
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        torch.set_rng_state(state["random"])


def as_float(images: Tensor) -> Tensor:
    """Images in [-1, 1], from uint8 or as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
