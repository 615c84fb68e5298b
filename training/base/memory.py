"""Memory for real cards: the frozen denoiser in 8 bits, and blocks of it kept by the CPU.

A patch trains behind the frozen weights, so gradients pass through them to the prompts. Autograd
must therefore never keep a parameter itself for the backward pass, because its values change
between the passes (to 8 bits, to another device): it keeps a copy or an alias.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils import checkpoint

from dmp_common import PatchError
from training.options.config import TrainConfig

STORED = torch.float8_e4m3fn  # of --fp8_base


@dataclass(frozen=True)
class WeightBytes:
    """What weights take, in bytes.

    Args:
        device: on the device that trains, with room for the largest swapped block.
        cpu: of the blocks that --blocks_to_swap keeps in the memory of the CPU.
    """

    device: int
    cpu: int


class Held(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for its backward pass, weights left out; also on
    the meta device.

    Args:
        module: whose weights are no part of them.
    """

    def __init__(self, module: nn.Module) -> None:
        # Storages themselves: those on the meta device have no addresses.
        self._weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self._seen: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(self._seen.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._seen[storage._cdata] = storage.nbytes()
        return tensor


def memory_warnings(config: TrainConfig, blocks: int, device: torch.device) -> list[str]:
    """What a user should know about the options that save memory; none of it stops a run.

    Args:
        config: of the run.
        blocks: how many blocks of the base can be swapped, see `large_blocks`.
        device: that trains.
    """
    found = []
    if config.blocks_to_swap and device.type == "cpu":
        found.append("--blocks_to_swap has no effect on a CPU, where every block is at home.")
    if (config.blocks_to_swap or 0) > blocks:
        found.append(
            f"--blocks_to_swap {config.blocks_to_swap} swaps all blocks that can be swapped, which "
            f"are {blocks}."
        )
    wants = [
        ("--blocks_to_swap", config.blocks_to_swap),
        ("--fp8_base", config.fp8_base),
        ("--student_quantization fp8", config.student_quantization == "fp8"),
    ]
    for name, on in wants:
        if on and not config.gradient_checkpointing:
            found.append(
                f"{name} saves little without --gradient_checkpointing, because the weights that a "
                "step computes with are kept until its backward pass."
            )
    return found


def save_memory(model: Any, time: str, compute: torch.dtype, config: TrainConfig) -> None:
    """Stores a frozen denoiser as --fp8_base or --int8_base ask for; see `use_fp8`, `use_int8`."""
    if config.fp8_base:
        use_fp8(model, time, compute)
    if config.int8_base:
        use_int8(model, time)


def use_fp8(model: Any, time: str, compute: torch.dtype) -> None:
    """Stores the layers of a frozen denoiser in fp8; each computes in another precision.

    Norms and what diffusers names besides keep their precision, and so does the time embedding,
    which the gate of a patch sees.

    Args:
        model: of diffusers.
        time: path of its time embedding.
        compute: the precision of the computation.
    """
    skipped = (*DEFAULT_SKIP_MODULES_PATTERN, f"^{re.escape(time)}(\\.|$)")
    model.enable_layerwise_casting(
        storage_dtype=STORED, compute_dtype=compute, skip_modules_pattern=skipped
    )
    alias_weights(model)


def use_int8(model: nn.Module, time: str) -> None:
    """Stores the linear layers of a frozen denoiser as 8-bit integers, a scale for each row.

    Args:
        model: any; its time embedding, which the gate of a patch sees, stays as it is.
        time: path of its time embedding.

    Raises:
        PatchError: torchao is not installed.
    """
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(f"{time}.")
    ]
    quantize_linear(model, frozenset(chosen), 8, "--int8_base", "--fp8_base")


def quantize_linear(
    model: nn.Module, chosen: Collection[str], bits: Literal[4, 8], option: str, other: str
) -> None:
    """Stores linear layers as integers with torchao: 8 bits with a scale for each row, or 4 bits
    with one for each group of 32 values.

    Args:
        model: any.
        chosen: paths of the layers.
        bits: of the integers. Those of 4 bits take a byte each.
        option: that asks for it, for the error.
        other: an option that needs no package.

    Raises:
        PatchError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    except ImportError as error:
        raise PatchError(
            f"expected the package torchao for {option}, found none: pip install torchao, or use "
            f"{other}, which needs no package."
        ) from error
    if bits == 8:
        config: Any = Int8WeightOnlyConfig()
    else:
        integers: Any = torch  # whose types do not name its integers of 4 bits
        config = IntxWeightOnlyConfig(weight_dtype=integers.int4, granularity=PerGroup(32))
    quantize_(model, config, lambda _, name: name in chosen)


def keyword_checkpoint(module: nn.Module, *given: Any, **more: Any) -> Any:
    """Gradient checkpointing of a block; diffusers' own function takes no keywords, which some of
    its models pass."""
    return checkpoint.checkpoint(module.__call__, *given, use_reentrant=False, **more)


def whole_checkpoint(module: nn.Module, *given: Any, **more: Any) -> Any:
    """Gradient checkpointing of a block that runs it to its end when it computes it again.

    By default torch stops as soon as it has what the backward pass needs. What puts the weights of
    the block back in 8 bits, or gives their memory on the GPU back, would then not run.
    """
    with checkpoint.set_checkpoint_early_stop(False):
        return keyword_checkpoint(module, *given, **more)


def large_blocks(model: nn.Module, time: str) -> list[nn.Module]:
    """The blocks of a denoiser: the members of its lists of blocks, and the middle of a UNet.

    One that holds the time embedding is left out, which is also called by itself; so are blocks
    without weights.

    Args:
        time: path of the time embedding.
    """
    lists = [list(child) for child in model.children() if isinstance(child, nn.ModuleList)]
    middle = [child for name, child in model.named_children() if name == "mid_block"]
    own = dict(model.named_modules()).get(time)
    return [
        block
        for members in (*lists, middle)
        for block in members
        if any(True for _ in block.parameters())
        and all(part is not own for part in block.modules())
    ]


def swap(model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """Moves a denoiser to a device, except for blocks that come there only while they compute.

    Args:
        model: on the CPU.
        blocks: of it; their weights stay in pinned memory of the CPU.
        device: a GPU.
    """
    inside = {id(part) for block in blocks for part in block.modules()}
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)  # its own tensors
    holder = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
    for block in blocks:
        alias_weights(block)
    # Each block is a group of its own, without prefetching: diffusers prefetches in the order of
    # the forward pass, and gradient checkpointing runs the blocks in the other. The stream brings
    # pinned memory, from which weights are copied to the GPU and never back. `record_stream` keeps
    # the allocator from giving away weights that the backward pass still reads.
    apply_group_offloading(
        holder,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        record_stream=True,
    )


def weight_bytes(modules: Iterable[nn.Module], swapped: Iterable[nn.Module] = ()) -> WeightBytes:
    """What the weights of some modules take.

    Args:
        modules: models.
        swapped: blocks of them that stay in the memory of the CPU.
    """
    blocks = [_bytes_of(block) for block in swapped]
    total = sum(_bytes_of(module) for module in modules)
    return WeightBytes(total - sum(blocks) + max(blocks, default=0), sum(blocks))


def _bytes_of(module: nn.Module) -> int:
    return sum(_stored(parameter) for parameter in module.parameters())


def _stored(tensor: Tensor) -> int:
    """Bytes of a tensor; one of torchao is made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_stored(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def give_back(model: nn.Module) -> None:
    """Gives the memory of a model's weights back: their shapes stay, and so do its buffers, and
    weights that another model holds too."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)


class _Alias(nn.Module):
    """Gives a tensor under another name: autograd keeps that and not the parameter."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.view_as(weight)


def alias_weights(model: nn.Module) -> None:
    """Makes convolutions and norms compute with an alias of their weight, as linear layers do,
    which transpose it."""
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if weight is not None and not isinstance(module, (nn.Linear, nn.Embedding)):
            parametrize.register_parametrization(module, "weight", _Alias(), unsafe=True)
