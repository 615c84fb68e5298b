"""A repair patch in use: strength, guidance, samplers, the full model, a guidance patch beside it.

    python -m training.experiments.cheap.cheap_use digits --call rtn3-group32 \\
        --patch repair.safetensors --guidance_patch guidance.safetensors

Prints the mean squared distance of each picture to the full model's from the same noise, and which
share of the cheap call's distance is gone. Nothing is chosen here, and nothing is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dmp_common import Patch, attach
from dmp_common.patch.objectives import squared_distance
from training.base.frozen import FrozenBase
from training.experiments.cheap.cheap_trial import CheapTrial
from training.objective.intervals import paired_interval
from training.objective.labelled import labelled_samples

_SEED = 4321  # of the noise; the study has another one
STRENGTHS = (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)
SCALES = (1.5, 2.0, 4.0)
OTHERS = (("unipc", 10), ("unipc", 50), ("ddim", 20), ("ddim", 50))
Attached = Sequence[tuple[Patch, float]]  # patches and their strengths, in order of attaching


@dataclass
class RepairInUse:
    """Pictures of a full model and of its cheap call, with patches and without.

    Args:
        exact, cheap: the two models.
        labels: of the pictures (B,).
    """

    exact: FrozenBase
    cheap: FrozenBase
    labels: Tensor
    _drawn: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def pictures(
        self, which: str, patches: Attached, scale: float, sampler: str, steps: int
    ) -> Tensor:
        """Pictures of the model "exact" or "cheap" with patches, drawn once."""
        key = which, tuple((id(p), s) for p, s in patches), scale, sampler, steps
        if key not in self._drawn:
            frozen = self.exact if which == "exact" else self.cheap
            with ExitStack() as stack:
                for patch, strength in patches:
                    stack.enter_context(attach(frozen.model, patch, strength=strength))
                self._drawn[key] = labelled_samples(
                    frozen, self.labels, seed=_SEED, steps=steps, scale=scale, sampler=sampler
                )
        return self._drawn[key]

    def row(
        self,
        name: str,
        patches: Attached,
        which: str = "cheap",
        scale: float = 1.0,
        called: float | None = None,
        sampler: str = "unipc",
        steps: int = 20,
    ) -> str:
        """A row of the table: the distance with patches, and the share of the damage that is gone.

        Args:
            name: of the setting.
            patches: that act.
            which: the model that they are on.
            scale: of the full model's guidance.
            called: the scale that the patched model is called with; None means the same.
        """
        own = scale if called is None else called
        target = self.pictures("exact", (), scale, sampler, steps)
        before = squared_distance(self.pictures("cheap", (), own, sampler, steps), target)
        after = squared_distance(self.pictures(which, patches, own, sampler, steps), target)
        mean, low, high = paired_interval(before, after)  # after - before
        whole = float(before.mean())
        gone = f"{-mean / whole:.1%} [{-high / whole:.1%}, {-low / whole:.1%}]"
        return f"| {name} | {whole:.4f} | {float(after.mean()):.4f} | {gone} |"

    def rows(self, repair: Patch, guidance: Patch | None) -> list[str]:
        """All rows."""
        one = [(repair, 1.0)]
        found = [self.row("strength 1", one)]
        found += [self.row(f"strength {s:g}", [(repair, s)]) for s in STRENGTHS]
        found += [self.row("on the full model, beside the damage", one, "exact")]
        found += [self.row(f"guidance {w:g}, both calls patched", one, scale=w) for w in SCALES]
        found += [self.row(f"{name}, {n} steps", one, sampler=name, steps=n) for name, n in OTHERS]
        if guidance is not None:
            w = guidance.variant.guidance or 2.0
            both = {
                "repair alone": one,
                "guidance alone": [(guidance, 1.0)],
                "repair, then guidance": [*one, (guidance, 1.0)],
                "guidance, then repair": [(guidance, 1.0), *one],
            }
            for name, patches in both.items():
                found.append(
                    self.row(f"one call, guided {w:g}: {name}", patches, scale=w, called=1.0)
                )
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", choices=("digits", "cifar10-s"))
    parser.add_argument(
        "--call", default="rtn3-group32", help="the model in few bits that the patch was trained on"
    )
    parser.add_argument("--patch", required=True, help="a repair patch")
    parser.add_argument("--guidance_patch", help="a guidance patch of the same base")
    parser.add_argument("--data", type=Path, help="folder that make_cifar filled")
    parser.add_argument("--pictures", type=int, default=500)
    options = parser.parse_args(arguments)
    cheap = CheapTrial(options.subject, options.data, Path())
    subject = cheap.open()
    labels = subject.labels("test")[: options.pictures]
    guidance = None if options.guidance_patch is None else Patch.load(options.guidance_patch)
    with torch.no_grad():
        used = RepairInUse(*cheap.models(subject, options.call), labels)
        print("| setting | as it is | with it | gone |\n|---|---|---|---|")
        for row in used.rows(Patch.load(options.patch), guidance):
            print(row, flush=True)


if __name__ == "__main__":
    main()
