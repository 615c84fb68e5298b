"""Ids of classes, from the names of folders or columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dmp_common import PatchError
from dmp_common.errors import printable
from training.data.captions.texts import caption_lines, read_text
from training.data.kind import DataKind

_MOST_CLASSES = 1_000_000  # each id below the highest gets a name


def class_ids(
    names: Sequence[str], class_list: str | None, kind: DataKind, where: str
) -> tuple[dict[str, int], list[str]]:
    """Ids of class names, and the names of all ids.

    The names are ids by themselves if they all are numbers; else a class list gives the ids, else
    the alphabet, as for ImageNet, if there are as many names as the base has classes.

    Raises:
        PatchError: names that are in no list, or more or fewer than the base has classes.
    """
    count = kind.num_classes
    if class_list is not None:
        path = Path(class_list)
        if not path.is_file():
            raise PatchError(f"expected a list of classes at {path}, found no such file.")
        known = list(caption_lines(read_text(path)))
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise PatchError(
                f"expected classes of {path}, found {len(unknown)} others in {where}, such as "
                f"{unknown[0]}: add them to the list, or rename them."
            )
        ids = {name: known.index(name) for name in names}
    elif all(name.isdecimal() for name in names):
        ids = {name: int(name) for name in names}
        if max(ids.values(), default=0) >= _MOST_CLASSES:
            raise PatchError(
                f"expected class ids below {_MOST_CLASSES:,} as names in {where}, found "
                f"{printable(max(names, key=len))}: rename the classes, or give --class_list."
            )
        known = [str(n) for n in range(max(ids.values(), default=-1) + 1)]
    elif count is not None and len(names) < count:
        raise PatchError(
            f"expected {count} classes, as the base has, found {len(names)} in {where}: which "
            "class is which? Give --class_list, a file with one name a line in the order of the "
            "base's ids, or name the classes by their ids."
        )
    else:
        ids, known = {name: n for n, name in enumerate(sorted(names))}, sorted(names)
    if count is not None and max(ids.values(), default=0) >= count:
        raise PatchError(
            f"expected at most {count} classes, as the base has, found id {max(ids.values())} in "
            f"{where}: check the data and --class_list."
        )
    return ids, known
