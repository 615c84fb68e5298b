"""TOML from files that may be damaged or hostile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from dmp_common.errors import file_error, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1024**2  # of a file of options
_MAX_DOTS = 256  # on a line; a key with many parts takes quadratic time to read


def read_toml_file(path: Path, what: str = "a TOML file") -> dict[str, Any]:
    """The tables of a TOML file on disk.

    Args:
        path: of the file; a byte order mark at its beginning is skipped.
        what: the kind of file that is expected, for the messages.

    Raises:
        PatchError: no such file, or no TOML.
    """
    # Here, because `--help` does without torch.
    from dmp_common.patch.serialize import opened

    with opened(path, what) as (file, _):
        return parse_toml(file.read(), path)


def parse_toml(data: bytes, path: object) -> dict[str, Any]:
    """The tables of a TOML file.

    Args:
        data: the bytes of the file.
        path: of the file, for the messages.

    Raises:
        PatchError: no TOML, or a file that is too long or nested too deeply to be options.
    """
    remedy = "correct the file"
    if len(data) > _MAX_BYTES:
        raise file_error(path, f"TOML of at most {_MAX_BYTES:,} bytes", f"{len(data):,}", remedy)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"a line with more than {_MAX_DOTS} dots")
        return dict(tomllib.loads(text))
    except ValueError as error:
        if isinstance(error, PatchError):
            raise
        raise file_error(path, "TOML", printable(error), remedy) from error
    except RecursionError:
        raise file_error(path, "TOML", "values that are nested too deeply", remedy) from None
