"""The command line: `dmp inspect | validate | heatmap | convert | fold | push`.

A command imports what it needs when it runs, so that help and usage errors appear at once.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dmp_common.errors import PatchError, printable, printable_path
from dmp_common.tools.commands import make_parser

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
    options = make_parser(_PROGRAM).parse_args(argv)
    try:
        code = _COMMANDS[options.command](options)
    except (PatchError, OSError) as error:
        return _complain(error)
    return code


def _complain(error: Exception) -> int:
    text = " ".join(str(error).splitlines())
    print("error:", printable(text, 4000), file=sys.stderr)
    return 1


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


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "validate": _validate,
    "heatmap": _heatmap,
    "convert": _convert,
    "fold": _fold,
    "push": _push,
}

if __name__ == "__main__":
    raise SystemExit(main())
