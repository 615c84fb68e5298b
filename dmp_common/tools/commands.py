"""The commands of `dmp` and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dmp_common.version import __version__

# Makes a command's parser of its name, what it does, and examples.
_Adding = Callable[[str, str, str], argparse.ArgumentParser]


def make_parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser; what it returns holds the name of the command as `command`.

    Args:
        program: how the user has called it, for help texts.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Inspect, check, draw, convert and publish patch files of diffusion models.",
        epilog=f"{program} COMMAND --help explains a command, with examples.\n"
        "Exit code: 0 for success, 1 for a bad file or model, 2 for wrong usage.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dmp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add = partial(_add, program, commands)
    _add_inspect(add)
    _add_validate(add)
    _add_heatmap(add)
    _add_convert(add)
    _add_fold(add)
    _add_push(add)
    return parser


def _add(
    program: str, commands: Any, name: str, text: str, examples: str
) -> argparse.ArgumentParser:
    indented = "".join(f"\n  {program} {line}" for line in examples.splitlines())
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.split(".")[0],
        description=text,
        epilog=f"examples:{indented}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name)
    return parser


def _add_inspect(add: _Adding) -> None:
    parser = add(
        "inspect",
        "Show what a patch is made of. Only the header is read; `validate` checks all values.",
        "inspect my-patch.safetensors\ninspect --sites my-patch.safetensors\n"
        "inspect --json *.safetensors",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="patch files")
    group = parser.add_argument_group("output")
    group.add_argument("--sites", action="store_true", help="list every site")
    group.add_argument("--json", action="store_true", help="print a JSON list, one record per file")


def _add_validate(add: _Adding) -> None:
    parser = add(
        "validate",
        "Check patch files completely. A bad file does not keep the others from being checked.",
        "validate my-patch.safetensors\nvalidate models/dmp/*.safetensors",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="patch files")


def _add_heatmap(add: _Adding) -> None:
    parser = add(
        "heatmap",
        "Draw the weights of a patch's gate. The picture shows them by timestep and prompt, and\n"
        "as maps over the picture, with a row for each site.",
        "heatmap my-patch.safetensors gate.png --model v1-5-pruned-emaonly.safetensors\n"
        "heatmap my-patch.safetensors gate.png --model ./stable-diffusion-v1-5 --sites in.1,mid\n"
        "heatmap my-dit-patch.safetensors gate.png --model ./DiT-XL-2-256 --label 207",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a patch file")
    parser.add_argument("out", type=Path, metavar="OUT.png", help="the picture to write")
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="PATH",
        help="the model the patch is for, whose time embedding the gate sees (only that is read): "
        "a diffusers folder or a .safetensors checkpoint",
    )
    group.add_argument(
        "--label", type=int, metavar="K", help="class, for patches whose gate sees the class"
    )
    group = parser.add_argument_group("what to draw")
    group.add_argument(
        "--sites",
        metavar="LIST",
        default="first,middle,last",
        help="names with commas between, first, middle, last, all, or a set such as encoder "
        "(default: %(default)s)",
    )
    group.add_argument("--steps", type=int, default=50, help="timesteps (default: %(default)s)")
    group.add_argument(
        "--scale",
        choices=("per-panel", "shared"),
        default="per-panel",
        help="a colour scale for each site, or one for all (default: %(default)s)",
    )
    group.add_argument(
        "--log",
        action=argparse.BooleanOptionalAction,
        help="logarithmic colours (default: where a weight exceeds ten times the mean)",
    )
    group.add_argument("--title", help="the title (default: the file's name)")
    _add_force(parser)


def _add_convert(add: _Adding) -> None:
    parser = add(
        "convert",
        "Import a checkpoint of the official DMP code. Nothing in it is executed.",
        "convert 0100000.pt my-patch.safetensors\n"
        "convert prompts-only.pt my-patch.safetensors --base dit-b/2 --mix add",
    )
    parser.add_argument("source", type=Path, metavar="OFFICIAL.pt", help="the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="the patch to write")
    group = parser.add_argument_group("if the checkpoint does not show it")
    group.add_argument("--base", metavar="NAME", help="its base, such as dit-b/2")
    group.add_argument("--mix", choices=("add", "prepend"), help="how its prompts were used")
    _add_force(parser)


def _add_fold(add: _Adding) -> None:
    parser = add(
        "fold",
        "Write an un-gated modulating patch into a copy of a model's own weights and biases.\n"
        "Where the file cannot hold it, the error says where.",
        "fold my-patch.safetensors model.safetensors folded.safetensors\n"
        "fold my-patch.safetensors model-Q4_0.gguf folded.gguf --partial",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a patch file")
    parser.add_argument("model", type=Path, metavar="MODEL", help="a .safetensors or .gguf file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--strength", type=float, default=1.0, help="of the patch (default: 1)")
    parser.add_argument("--partial", action="store_true", help="leave out what no bias can hold")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def _add_push(add: _Adding) -> None:
    parser = add(
        "push",
        "Publish a patch on the Hugging Face hub. The file is checked and goes into the\n"
        "repository with a model card (README.md) that replaces the one there. The repository\n"
        "is made if it does not exist. Log in first with `hf auth login`, or set HF_TOKEN.",
        "push my-patch.safetensors me/my-patch\n"
        "push my-patch.safetensors me/my-patch --private --license apache-2.0 --tag cats\n"
        'push my-patch.safetensors me/my-patch --picture "Base left, patched right" cat.png',
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a patch file")
    parser.add_argument("repository", metavar="USER/REPO", help="the repository to upload to")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    group = parser.add_argument_group("model card")
    group.add_argument("--base-model", metavar="USER/REPO", help="repository of the base model")
    group.add_argument("--license", metavar="NAME", help="license, such as apache-2.0")
    group.add_argument("--tag", action="append", default=[], metavar="NAME", help="may be repeated")
    picture: dict[str, Any] = {"nargs": 2, "metavar": ("CAPTION", "FILE")}
    group.add_argument("--picture", action="append", default=[], **picture, help="may be repeated")


def _add_force(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--force", action="store_true", help="replace an existing file")
