"""The command line: `dmp inspect | validate | heatmap | convert | push`.

A command imports what it needs when it runs, so that help and usage errors appear at once.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dmp_common.errors import PatchError, printable, printable_path
from dmp_common.version import __version__

# Help texts name the program as the user has called it.
_PROGRAM = "python -m dmp_common" if __name__ == "__main__" else "dmp"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments after the program's name; None takes those of the process.

    Returns:
        0, or 1 if something is wrong with a file or a model; the reason is on stderr. Wrong usage
        ends the program with 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console cannot show all file names
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except (PatchError, OSError) as error:
        return _complain(error)
    return code


def _complain(error: Exception) -> int:
    text = " ".join(str(error).splitlines())
    print("error:", printable(text, 4000), file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Inspect, check, draw, convert and publish patch files of diffusion models.",
        epilog=f"{_PROGRAM} COMMAND --help explains a command, with examples.\n"
        "Exit code: 0 for success, 1 for a bad file or model, 2 for wrong usage.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dmp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inspect(commands)
    _add_validate(commands)
    _add_heatmap(commands)
    _add_convert(commands)
    _add_fold(commands)
    _add_push(commands)
    return parser


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, examples: str
) -> argparse.ArgumentParser:
    indented = "".join(f"\n  {_PROGRAM} {line}" for line in examples.splitlines())
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.split(".")[0],
        description=text,
        epilog=f"examples:{indented}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _add(
        commands,
        "inspect",
        _inspect,
        "Show what a patch is made of. Only the header is read; `validate` checks all values.",
        "inspect my-patch.safetensors\ninspect --sites my-patch.safetensors\n"
        "inspect --json *.safetensors",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="patch files")
    group = parser.add_argument_group("output")
    group.add_argument("--sites", action="store_true", help="list every site")
    group.add_argument("--json", action="store_true", help="print a JSON list, one record per file")


def _add_validate(commands: Any) -> None:
    parser = _add(
        commands,
        "validate",
        _validate,
        "Check patch files completely. A bad file does not keep the others from being checked.",
        "validate my-patch.safetensors\nvalidate models/dmp/*.safetensors",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="patch files")


def _add_heatmap(commands: Any) -> None:
    parser = _add(
        commands,
        "heatmap",
        _heatmap,
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


def _add_convert(commands: Any) -> None:
    parser = _add(
        commands,
        "convert",
        _convert,
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


def _add_push(commands: Any) -> None:
    parser = _add(
        commands,
        "push",
        _push,
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


def _require_free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise PatchError(
            f"{path}: expected the name of a new file, found an existing one: choose another "
            "name, or add --force to replace it."
        )


def _validate(options: argparse.Namespace) -> int:
    from dmp_common.api import Patch
    from dmp_common.patch.file import file_hash

    code = 0
    for path in options.files:
        try:
            patch = Patch.load(path)
            print(f"OK {file_hash(path)} {printable_path(path)} ({patch.base.name})")
        except (PatchError, OSError) as error:
            code = _complain(error)
    return code


def _heatmap(options: argparse.Namespace) -> int:
    from dmp_common.api import Patch
    from dmp_common.tools.heatmap import (  # numpy and Pillow only where they are used
        even_timesteps,
        save_heatmap,
        time_embedding_of,
    )

    _require_free(options.out, options.force)
    patch = Patch.load(options.file)
    steps = even_timesteps(options.steps)
    e = time_embedding_of(options.model, patch, steps, options.label)
    title = options.title or f"{options.file.name} ({patch.base.name})"
    if options.title is None and options.label is not None:
        title += f", class {options.label}"
    drawn = {name: getattr(options, name) for name in ("sites", "scale", "log")}
    save_heatmap(options.out, patch, steps, e, title=title, **drawn)
    print(f"Wrote {printable_path(options.out)}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from dmp_common.api import convert_official
    from dmp_common.patch.file import file_hash

    _require_free(options.out, options.force)
    patch = convert_official(options.source, options.out, base=options.base, mix=options.mix)
    print(
        f"Wrote {printable_path(options.out)} ({file_hash(options.out)}): {patch.base.name}, "
        f"{len(patch.sites)} sites, {patch.saved_parameters:,} parameters; prompts: "
        f"{'added' if patch.variant.mix == 'add' else 'prepended'}, gate: {patch.variant.gate}, "
        f"condition: {patch.variant.condition}"
    )
    return 0


def _add_fold(commands: Any) -> None:
    parser = _add(
        commands,
        "fold",
        _fold,
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


def _fold(options: argparse.Namespace) -> int:
    from dmp_common.api import Patch
    from dmp_common.tools.fold import fold

    _require_free(options.out, options.force)
    given = {"strength": options.strength, "partial": options.partial}
    folded = fold(Patch.load(options.file), options.model, options.out, **given)
    print(
        f"Wrote {printable_path(options.out)}: {folded.layers} layers scaled, {folded.biases} "
        f"biases changed, {len(folded.without)} shifts left out for want of a bias"
    )
    return 0


def _push(options: argparse.Namespace) -> int:
    from dmp_common.tools.publish import push_to_hub

    pictures = dict(options.picture)
    if len(pictures) < len(options.picture):
        raise PatchError("expected a caption for each picture, found one twice: change it.")
    address = push_to_hub(
        options.file,
        options.repository,
        private=options.private,
        base_model=options.base_model,
        license=options.license,
        tags=options.tag,
        pictures=pictures,
        message=f"Upload {options.file.name}",
    )
    print(f"Uploaded {options.file} to {address}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from dmp_common.tools.inspect import as_text, inspect_file

    code, records = 0, []
    for path in options.files:
        try:
            record = inspect_file(path)
        except (PatchError, OSError) as error:
            code = _complain(error)
            continue
        records.append(record)
        if not options.json:
            print(as_text(record, options.sites))
    if options.json:
        print(json.dumps(records, indent=2))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
