"""HunyuanImage 2.1 in single files: which tensors of the original code diffusers' are made of.

Source of the names: ComfyUI, comfy/ldm/hunyuan_video and supported_models.py, which reads files of
the original code and its own; diffusers, transformer_hunyuanimage.py and
autoencoder_kl_hunyuanimage.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# By the name of a module in diffusers: its name in ComfyUI, and which part it is of a joined layer,
# where _REST is what the queries, keys and values leave.
_Names = Mapping[str, str | tuple[str, int]]
_REST = 3
_DOUBLE: _Names = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE: _Names = {
    "norm.linear": "modulation.lin",
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", _REST),
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_REFINER: _Names = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.to_q": ("self_attn.qkv", 0),
    "attn.to_k": ("self_attn.qkv", 1),
    "attn.to_v": ("self_attn.qkv", 2),
    "attn.to_out.0": "self_attn.proj",
    "ff.net.0.proj": "mlp.0",
    "ff.net.2": "mlp.2",
    "norm_out.linear": "adaLN_modulation.1",
}
_BLOCKS = (
    ("transformer_blocks.", "double_blocks.", _DOUBLE),
    ("single_transformer_blocks.", "single_blocks.", _SINGLE),
    (
        "context_embedder.token_refiner.refiner_blocks.",
        "txt_in.individual_token_refiner.blocks.",
        _REFINER,
    ),
)
_TEXT = "context_embedder.time_text_embed"
_OTHERS: dict[str, str] = {
    "x_embedder.proj": "img_in.proj",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder_2.norm": "byt5_in.layernorm",
    **{f"context_embedder_2.linear_{n}": f"byt5_in.fc{n}" for n in (1, 2, 3)},
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    **{
        f"{ours}.linear_{n}": f"{theirs}.{layer}"
        for ours, theirs in (
            (f"{_TEXT}.timestep_embedder", "txt_in.t_embedder"),
            (f"{_TEXT}.text_embedder", "txt_in.c_embedder"),
            ("time_guidance_embed.timestep_embedder", "time_in"),
        )
        for n, layer in ((1, "in_layer"), (2, "out_layer"))
    },
}
_LAST = "norm_out.linear."  # whose scale and shift diffusers has in the other order
# The original code's names, and ComfyUI's.
_ORIGINAL = (
    (r"^txt_in\.c_embedder\.linear_1\.", "txt_in.c_embedder.in_layer."),
    (r"^txt_in\.c_embedder\.linear_2\.", "txt_in.c_embedder.out_layer."),
    (r"^(txt_in\.t_embedder|time_in)\.mlp\.0\.", r"\1.in_layer."),
    (r"^(txt_in\.t_embedder|time_in)\.mlp\.2\.", r"\1.out_layer."),
    (r"_mod\.linear\.", "_mod.lin."),
    (r"\.modulation\.linear\.", ".modulation.lin."),
    (r"_attn_(qkv|proj)\.", r"_attn.\1."),
    (r"_attn_q_norm\.", "_attn.norm.query_norm."),
    (r"_attn_k_norm\.", "_attn.norm.key_norm."),
    (r"\.q_norm\.", ".norm.query_norm."),
    (r"\.k_norm\.", ".norm.key_norm."),
    (r"mlp\.fc1\.", "mlp.0."),
    (r"mlp\.fc2\.", "mlp.2."),
    (r"_norm\.scale$", "_norm.weight"),
)
_VAE_PARTS = (
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.proj.", "mid.attn_1.proj_out."),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("conv_shortcut.", "nin_shortcut."),
)
_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)\.(\d+)\.(?:block\.(\d+)|(?:down|up)sample)\.")


def transformer_named(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the tensors of a transformer under diffusers' names; those of no use keep their own.

    Args:
        tensors: under the names of the original code or of ComfyUI; stored in fewer bits or not.
        wanted: the tensors of diffusers' model, whose values do not matter.
    """
    given = {_as_comfyui(name): value for name, value in tensors.items()}
    found, used = {}, set()
    for key, like in wanted.items():
        name, part = _origin(key)
        value = given.get(name)
        if value is None:
            continue
        used.add(name)
        rows = len(like)
        if part == _REST:
            value = torch.split(value, [len(value) - rows, rows])[1]
        elif part is not None:
            value = torch.split(value, [rows] * 3 + [len(value) - 3 * rows])[part]
        if key.startswith(_LAST):
            value = torch.cat(torch.chunk(value, 2)[::-1])
        found[key] = value
    return found | {name: value for name, value in given.items() if name not in used}


def vae_named(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the VAE under diffusers' names, as `transformer_named` does.

    Diffusers counts blocks and changes of size in one list, the original code in levels.
    """
    origins = _levels(tensors)
    names = {key: _vae_origin(key, origins) for key in wanted}
    found = {key: tensors[name] for key, name in names.items() if name in tensors}
    used = set(names.values())
    return found | {name: value for name, value in tensors.items() if name not in used}


def _as_comfyui(name: str) -> str:
    for pattern, replacement in _ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


def _origin(key: str) -> tuple[str, int | None]:
    """ComfyUI's name of a tensor of diffusers, and its part of a joined one."""
    module, _, kind = key.rpartition(".")
    for ours, theirs, names in _BLOCKS:
        if module.startswith(ours):
            number, _, inside = module.removeprefix(ours).partition(".")
            found = names.get(inside, inside)
            name, part = (found, None) if isinstance(found, str) else found
            return f"{theirs}{number}.{name}.{kind}", part
    return f"{_OTHERS.get(module, module)}.{kind}", None


def _levels(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By the beginning of names in diffusers, that of the original names."""
    orders: dict[tuple[str, str], set[tuple[int, int, str]]] = {}
    for name in tensors:
        found = _LEVEL.match(name)
        if found is not None:
            half, way, level, block = found.groups()
            # What changes the size comes after the blocks of its level.
            place = int(level), len(tensors) if block is None else int(block), found[0]
            orders.setdefault((half, way), set()).add(place)
    return {
        f"{half}.{way}_blocks.{number}.": theirs
        for (half, way), places in orders.items()
        for number, (_, _, theirs) in enumerate(sorted(places))
    }


def _vae_origin(key: str, origins: Mapping[str, str]) -> str:
    half, blocks, number, rest = (key.split(".", 3) + [""] * 3)[:4]
    beginning = f"{half}.{blocks}.{number}."
    if beginning in origins:
        key = origins[beginning] + rest
    for ours, theirs in _VAE_PARTS:
        key = key.replace(ours, theirs)
    return key
