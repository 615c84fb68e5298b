"""A patch of a generation: on which models and on which pictures of the batch it acts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.attach.record import PatchRecord

NAME = "DMP"  # Every message begins with it, because hosts mix the messages of all extensions.


@dataclass(frozen=True)
class Chosen:
    """A patch of a generation.

    Args:
        record: the patch with its settings.
        follows: whether it acts on each model that the generation loads, where it fits; others act
            on the first model alone.
        pictures: the pictures of the batch on which it acts; None for all.
        batch: how many pictures the batch has; 0 where it acts on all.
    """

    record: PatchRecord
    follows: bool = False
    pictures: frozenset[int] | None = None
    batch: int = 0

    def factors(self, pictures: Tensor | None) -> Tensor | None:
        """Returns 1 for the items of a call on which the patch acts and 0 for others; None for all.

        Args:
            pictures: for each item its picture (B,); None where the host does not say.

        Raises:
            PatchError: it is not known which items these are.
        """
        if self.pictures is None:
            return None
        if pictures is None or int(pictures.max()) >= self.batch:
            raise PatchError(
                f"{NAME}: {self.record.loaded.name}: expected to know which picture of the batch "
                "each item of a call belongs to, because their prompts name different patches, "
                "and this host or another extension hides it: set the batch size to 1."
            )
        acts = torch.zeros(self.batch)
        acts[list(self.pictures)] = 1.0
        return acts[pictures]


def of_pictures(pictures: Sequence[Sequence[PatchRecord]], follows: bool) -> list[Chosen]:
    """Joins the patches of the pictures of a batch; each patch is attached once."""
    if all(list(records) == list(pictures[0]) for records in pictures):
        return [Chosen(record, follows) for record in pictures[0]]
    users: dict[tuple[PatchRecord, int], list[int]] = {}
    for picture, records in enumerate(pictures):
        met: Counter[PatchRecord] = Counter()
        for record in records:
            met[record] += 1  # A prompt may name a patch twice; it then acts twice.
            users.setdefault((record, met[record]), []).append(picture)
    return [
        Chosen(record, follows, frozenset(used), len(pictures))
        for (record, _), used in users.items()
    ]
