"""The model card of a patch.

Written without `huggingface_hub.ModelCard`, which would make a card need that package and PyYAML;
all it would replace is the line that writes the front matter. Tests read the cards with it.
"""

from __future__ import annotations

import html
import json
import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from dmp_common.errors import printable
from dmp_common.patch.serialize import parse_json
from dmp_common.patch.variant import Variant
from dmp_common.version import LIBRARY

# The licenses of the usual weights of bases, as their repositories name them. A patch is made from
# their predictions, so whoever gets it should know.
LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "facebook/DiT-XL-2-256": "cc-by-nc-4.0",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "openrail++",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "Qwen/Qwen-Image": "apache-2.0",
}
_CELL = 200  # characters of a metadata value in a table


def model_card(
    variant: Variant,
    metadata: Mapping[str, str],
    *,
    repo_id: str,
    filename: str,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    pictures: Mapping[str, str] | None = None,
) -> str:
    """Writes the model card (README.md) of a patch: front matter for the hub, and how to use it.

    Args:
        variant: the configuration of the patch.
        metadata: the strings of the patch file; entries `ss_*` and `modelspec.*` become a table.
        repo_id: the repository "user/repo", for the examples.
        filename: the file of the patch in the repository.
        base_model: the repository of the base; None takes the usual one of the patch's base.
        license: an identifier that the hub knows, such as "apache-2.0".
        tags: tags besides ours.
        pictures: for each caption, the path of its picture in the repository.

    Returns:
        The card in Markdown.
    """
    base_model = base_model or variant.base_spec.hub_id
    front: dict[str, object] = {"library_name": LIBRARY}
    if license is not None:
        front["license"] = license
    if base_model is not None:
        front |= {"base_model": base_model, "base_model_relation": "adapter"}
    front["tags"] = list(dict.fromkeys((LIBRARY, "dmp", variant.base, *tags)))
    matter = [f"{key}: {json.dumps(value)}" for key, value in front.items()]  # JSON is YAML
    parts = [
        "\n".join(["---", *matter, "---"]),
        f"# {repo_id.partition('/')[2]}",
        _summary(variant, base_model),
        *(f"![{_cell(c)}]({urllib.parse.quote(path)})" for c, path in (pictures or {}).items()),
        "## Use",
        _usage(variant, repo_id, filename),
        "## Variant",
        _table(("option", "value"), _options(variant)),
    ]
    if verdict := _verdict(metadata.get("ss_dmp_verdict", "")):
        parts += ["## Verdict", *verdict]
    if trained := _trained(metadata):
        parts += ["## Metadata", _table(("key", "value"), trained)]
    return "\n\n".join(parts) + "\n"


def _summary(variant: Variant, base_model: str | None) -> str:
    parameters = sum(math.prod(shape) for shape in variant.shapes().values())
    on = f" on [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    return (
        f"A diffusion model patch for the base **{variant.base}**{on}: learnable prompts at "
        f"{len(variant.sites)} block inputs, gated by the noise level, {parameters:,} "
        "parameters in all. The base model itself stays as it is. The method is "
        "[Diffusion Model Patching](https://arxiv.org/abs/2405.17825) (Ham et al., AAAI 2025)."
        + (f" License of the base: {LICENSES[base_model]}." if base_model in LICENSES else "")
    )


def _verdict(text: str) -> list[str]:
    """Returns what the trainer found on held-out images; nothing where the entry is not its own.

    The entry is text from a file, so each of its values is checked before it is shown.
    """
    try:
        told: Any = parse_json(text)
        images, whole = int(told["images"]), _change(told["change"])
        levels = [_change(entry) for entry in told["change_by_noise_level"]]
        sentence, repairs = str(told["verdict"]), "share_repaired" in told
    except (ValueError, TypeError, KeyError, OverflowError):
        return []
    width = 1000 / max(len(levels), 1)
    rows = {
        f"{width * n:.0f} to {width * (n + 1):.0f}": change for n, change in enumerate(levels[:100])
    }
    what, beside = "loss", "the base"
    if repairs:
        what, beside = "squared distance to the exact prediction", "the cheap call as it is"
    return [
        f"On {images:,} held-out images, beside {beside} and with equal noise: {_cell(sentence)}. "
        f"The {what} changed by {_cell(whole)}, with its 95 % interval over the images.",
        _table(("timesteps", f"change of the {what}"), rows),
    ]


def _change(entry: Mapping[str, float]) -> str:
    """Returns a relative change with its interval, in per cent.

    Raises:
        KeyError, TypeError, ValueError: the entry has no such numbers.
    """
    values = [100 * float(entry[name]) for name in ("mean", "low", "high")]
    return "{:+.3f} % ({:+.3f} to {:+.3f})".format(*values)


def _trained(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns what the file says about how it was made."""
    told = ("ss_", "modelspec.", "dmp.converted")
    shown = ("modelspec.thumbnail", "ss_dmp_verdict")  # an image as text; has its own section
    return {
        key: value
        for key, value in sorted(metadata.items())
        if key.startswith(told) and key not in shown
    }


def _usage(variant: Variant, repo_id: str, filename: str) -> str:
    if variant.mix == "prepend":
        return f"Prepended prompts work in the trainer of {LIBRARY} only; no host takes them."
    shown = printable(filename).replace("`", "'")
    return f"""With diffusers and {LIBRARY} installed, `pipe` being a pipeline of the base:

```python
import dmp_common as dmp
patch = dmp.Patch.load({json.dumps(repo_id)}, filename={json.dumps(filename)})
with dmp.attach(pipe, patch): image = pipe(...).images[0]
```

- ComfyUI: put `{shown}` into `models/dmp`, then **Load DMP Patch** and **Apply DMP**.
- AUTOMATIC1111, Forge: put `{shown}` into `models/DMP` and choose it under **DMP**."""


def _options(variant: Variant) -> dict[str, str]:
    grid = f"{variant.grid[0]} x {variant.grid[1]}" if variant.grid else f"{variant.prompts}"
    if variant.grid_scope == "site":
        grid += " at the finest sites, as many as cells at coarser ones"
    prompts = grid if variant.grids == 1 else f"{variant.grids} grids of {grid}"
    if variant.mix == "modulate":
        prompts = f"{variant.grids} x (a scale and a shift for each channel)"
    gate = f"{variant.gate}, {variant.selection}, {variant.across_depth} across depth"
    if (variant.gate_unit, variant.gate_form) != ("prompt", "softmax"):
        gate += f", a weight for each {variant.gate_unit}, {variant.gate_form}"
    return {
        "base": variant.base,
        "sites": ", ".join(variant.sites),
        "prompts of a site": prompts,
        "gate": gate,
        "acts at timesteps": "{} to {}".format(*variant.timesteps),
        **({} if variant.expert is None else {"expert": f"for {variant.expert} noise"}),
        "mix": variant.mix,
        **({} if variant.guidance is None else {"guidance at strength 1": f"{variant.guidance:g}"}),
        "condition": variant.condition,
        "prediction": variant.prediction,
        "frequency shift": f"{variant.frequency_shift:g}",
    }


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _cell(text: str) -> str:
    """Returns text from a file as one line without markup of Markdown or HTML.

    Addresses are escaped too: colons, at signs and "www." turn plain text into links.
    """
    line = printable(" ".join(text.split()), _CELL)
    escaped = re.sub(r"([\\`*_|\[\]()!~:@])", r"\\\1", html.escape(line, quote=False))
    return re.sub(r"(?i)(www)\.", r"\1\\.", escaped)
