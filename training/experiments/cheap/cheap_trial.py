"""One job of the study: train or fit what repairs a cheap call, and judge it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from dmp_common import attach
from dmp_common.patch.serialize import write_atomically
from training.base.cheap import cheap_base
from training.base.frozen import FrozenBase, load_frozen
from training.base.rounding import GROUP, correct_biases
from training.base.stored_size import stored_size
from training.evaluation.models import PatchModel, Spec, load_compared
from training.experiments.cheap.calls import EXACT, CheapCall
from training.experiments.cheap.comparisons import BASES_PATCH, SIBLING
from training.experiments.cheap.judging import Judge, calibration
from training.experiments.cheap.measures import CheapJob, Measures, read_measures, write_results
from training.experiments.cheap.quantisers import (
    Batches,
    fit_channels,
    leave_out,
    mixed_bits,
    use_bits,
    use_gptq,
)
from training.experiments.cheap.remedies import REMEDIES
from training.experiments.miniature.subjects import Subject, open_subject
from training.experiments.miniature.trial import train_trial
from training.options.config import TrainConfig

# Without training: the cheap call as it is, the full model, and what is fitted layer by layer.
# "mixed precision BYTES" has so many bytes more than the rounded model.
FITTED = ("none", "full model", "bias correction", "channel fit", "gptq")
MIXED = "mixed precision "
_FINE_TUNING: dict[str, Any] = {
    "method": "full", "objective": "data", "learning_rate": 3e-4, "max_train_steps": 400,
    "lr_warmup_steps": 20, "seed": 7, "ema_decay": 0.0, "train_batch_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class CheapTrial:
    """A base and where it is judged.

    Args:
        subject: name of the base.
        data: folder that `make_cifar` filled; not for digits.
        out: folder of results.
    """

    subject: str
    data: Path | None
    out: Path

    def open(self) -> Subject:
        """The subject that the study is about."""
        if not self.subject.endswith(SIBLING):
            return open_subject(self.subject, self.data)
        base = open_subject(self.subject.removesuffix(SIBLING), self.data)
        spec = train_trial(base, _FINE_TUNING, self.out / self.subject / "fine-tuning")
        scheduler = Path(spec.path) / "scheduler"
        if not scheduler.is_dir():
            shutil.copytree(base.weights / "scheduler", scheduler)
        return replace(base, weights=Path(spec.path))

    def done(self, job: CheapJob) -> Measures:
        """Trains and judges, unless that was done before."""
        path = self.out / job.file
        if path.is_file():
            return read_measures(path)[job]
        subject = self.open()
        exact, cheap = self.models(subject, job.call)
        kept = self.out / "pictures" / self.subject
        judge = Judge(subject, exact, CheapCall(job.call), job.split, job.seed, kept)
        with self._repaired(subject, job, exact, cheap) as (judged, added):
            whole = job.method in ("full model", "full")  # no weight of these is in few bits
            form: Any = None if whole else CheapCall(job.call).stored_as
            size = stored_size(exact.model, TrainConfig(student_quantization=form))
            found = judge.judge(judged, job.use, added, size + (0 if whole else added))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results({job: found}, path)
        return read_measures(path)[job]

    def gap(self, job: CheapJob) -> float:
        """Trains, unless that was done before, and returns the gap of the predictions that is
        left; of the exact call, which has none, the loss on held-out images."""
        path = self.out / job.folder / f"{job.split}-gap.txt"
        if not path.is_file():
            subject = self.open()
            exact, cheap = self.models(subject, job.call)
            kept = self.out / "pictures" / self.subject
            judge = Judge(subject, exact, CheapCall(job.call), job.split, job.seed, kept)
            with self._repaired(subject, job, exact, cheap) as (judged, _):
                lost = judge.loss(judged) if job.call == EXACT else judge.gap(judged, job.use)
            write_atomically(path, f"{lost:.6g}\n".encode())
        return float(path.read_text(encoding="utf-8"))

    def models(self, subject: Subject, call: str) -> tuple[FrozenBase, FrozenBase]:
        """The base as it is, and a second one for the cheap call, which patches may be put on."""
        config = TrainConfig(
            base=subject.base,
            pretrained_model_name_or_path=str(subject.weights),
            **self._options(subject, call),
        )
        exact = load_frozen(config)
        if not config.has_student:
            return exact, replace(exact, model=copy.deepcopy(exact.model))
        return exact, cheap_base(exact, config)

    def _options(self, subject: Subject, call: str) -> dict[str, Any]:
        """The trainer's options that make a cheap call; a file of its weights is made here where
        no option of the trainer's makes them."""
        cheap = CheapCall(call)
        if not cheap.by_gptq and cheap.skipped is None:
            return cheap.options
        path = self.out / self.subject / f"{call}.safetensors"
        if not path.is_file():
            like = f"rtn{cheap.bits}-group{GROUP}" if cheap.by_gptq else EXACT
            exact, made = self.models(subject, like)
            if cheap.by_gptq:
                use_gptq(exact, made, calibration(subject, exact), cheap.bits or 0)
            if cheap.skipped is not None:
                leave_out(made, cheap.skipped)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({n: t.clone() for n, t in made.model.state_dict().items()}))
        return {**cheap.options, "student_weights": str(path)}

    @contextmanager
    def _repaired(
        self, subject: Subject, job: CheapJob, exact: FrozenBase, cheap: FrozenBase
    ) -> Iterator[tuple[FrozenBase, int]]:
        """The model of a job, and how many bytes it has more than the cheap one."""
        if job.method in (*REMEDIES, BASES_PATCH):
            compared = load_compared(self._trained(subject, job))
            added = 2 * compared.parameters
            if isinstance(compared, PatchModel):
                with attach(cheap.model, compared.patch, strength=job.use.strength):
                    yield cheap, added
            else:
                with compared.on(cheap) as used:
                    yield used, added
            return
        yield self._fitted(subject, job, exact, cheap)

    def _trained(self, subject: Subject, job: CheapJob) -> Spec:
        """What a job trains; of a sibling with the base's own patch, what was trained there."""
        if job.method == BASES_PATCH:
            other = replace(job, subject=self.subject.removesuffix(SIBLING), method="repair")
            return CheapTrial(other.subject, self.data, self.out)._trained(subject, other)
        made = self._options(subject, job.call)
        options = REMEDIES[job.method].all_options(job.call, made, job.rate, job.seed, job.steps)
        return train_trial(subject, options, self.out / job.folder)

    def _fitted(
        self, subject: Subject, job: CheapJob, exact: FrozenBase, cheap: FrozenBase
    ) -> tuple[FrozenBase, int]:
        method, bits = job.method, CheapCall(job.call).bits
        if method == "full model":
            return replace(exact, model=copy.deepcopy(exact.model)), 0
        if method == "none":
            return cheap, 0
        if bits is None:
            raise ValueError(f"expected a cheap call of few bits for {method}, found {job.call}")
        batches = calibration(subject, exact)
        if method == "bias correction":
            correct_biases(cheap, exact, batches)
        elif method == "channel fit":
            fit_channels(exact, cheap, batches)
        elif method == "gptq":
            use_gptq(exact, cheap, batches, bits)
        elif method.startswith(MIXED):
            use_bits(exact, cheap, self._bits(job, exact, cheap, batches))
        else:
            known = ", ".join([*REMEDIES, *FITTED, f"{MIXED}BYTES"])
            raise ValueError(f"expected a method ({known}), found {method}")
        return cheap, int(method.removeprefix(MIXED)) if method.startswith(MIXED) else 0

    def _bits(
        self, job: CheapJob, exact: FrozenBase, cheap: FrozenBase, batches: Batches
    ) -> dict[str, int]:
        """The bits of each layer in mixed precision, from the file that keeps them."""
        path = self.out / job.folder.parent / "bits.json"
        if not path.is_file():
            bits, added = CheapCall(job.call).bits or 0, int(job.method.removeprefix(MIXED))
            found = mixed_bits(exact, cheap, batches, bits, added)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found, indent=1).encode())
        kept: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
        return kept
