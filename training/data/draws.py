"""Random draws without state: each is a function of what it is for.

A draw depends on the seed, the epoch and the key of the sample, never on who asks or when. So
loading in parallel, on several processes, or after a resume changes nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch


def word(*parts: object) -> int:
    """64 random bits, the same for the same parts on every machine."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(*parts: object) -> float:
    """A number in [0, 1)."""
    return (word(*parts) >> 11) / (1 << 53)


def below(limit: int, *parts: object) -> int:
    """An integer in [0, limit)."""
    return word(*parts) * limit >> 64


def permutation(count: int, *parts: object) -> npt.NDArray[np.int64]:
    """The numbers 0 ... count - 1 in random order.

    Ranked by SplitMix64 (Steele et al., 2014) rather than drawn from a numpy generator, whose
    stream may change between releases: a resumed run would then repeat and leave out images.
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(word(*parts))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable").astype(np.int64)


def generator(*parts: object) -> torch.Generator:
    """A generator on the CPU, seeded by what it is for."""
    return torch.Generator().manual_seed(word(*parts))
