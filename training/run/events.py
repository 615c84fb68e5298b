"""What happens beside the steps: validation, previews, saving."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from dmp_common.patch.serialize import write_atomically
from training.run.charts import losses_chart
from training.run.loop import Events
from training.run.metadata import Metadata
from training.run.outputs import Outputs
from training.run.parts import Run
from training.run.previews import Previews
from training.run.progress import Progress
from training.run.purpose import known_after
from training.run.repair import judge_repair
from training.run.resuming import plain_optimiser
from training.run.state import State, save_state, state_folder
from training.run.strength import choose_strength
from training.run.validation import Validation
from training.run.verdict import Verdict, judge


class TrainingEvents(Events):
    """Validates, shows and saves when the options say so.

    Args:
        outputs: where files go.
        metadata: what they say.
        facts: what a continuation must have in common with this run.
        validation: held-out images; None without.
        base_losses: of the base on them (images, bins).
        previews: None without.
        base_sides: gaps of the cheap call on both sides of guidance (3, images, bins), see
            `Validation.sides`; None without.

    Attributes:
        verdict: on the final file, once it is written and where there is a validation.
        strength: that was folded into the final file; None where it was not asked for.
    """

    def __init__(
        self,
        outputs: Outputs,
        metadata: Metadata,
        facts: Mapping[str, Any],
        validation: Validation | None,
        base_losses: Tensor | None,
        previews: Previews | None,
        base_sides: Tensor | None = None,
    ) -> None:
        self.base_sides = base_sides
        self.outputs, self.metadata, self.facts = outputs, metadata, facts
        self.validation, self.base_losses, self.previews = validation, base_losses, previews
        self.shown: list[Image.Image] = []
        self.verdict: Verdict | None = None
        self.strength: float | None = None
        self._seen: dict[int, Tensor] = {}  # losses by step, of the last and the best

    def before(self, run: Run, progress: Progress) -> None:
        """The first validation and preview; a resumed run has had them."""
        progress.text("configuration", json.dumps(run.config.recorded(), indent=1))
        if self.previews is not None:
            progress.text("prompts", "\n".join(prompt.text for prompt in self.previews.prompts))
        if run.step > 0:
            return
        if self.validation is not None:
            self._validate(run, progress)
        if self.previews is not None and run.config.sample_at_first:
            self._preview(run, progress)

    def after_step(self, run: Run, progress: Progress, epoch_ended: bool) -> None:
        """Does whatever is due after this step."""
        config, last = run.config, run.step == run.total

        def due(steps: int | None, epochs: int | None = None) -> bool:
            every_epochs = epochs and epoch_ended and run.position.epoch % epochs == 0
            return bool((steps and run.step % steps == 0) or every_epochs)

        busy = False
        validates = due(config.validate_every_n_steps, config.validate_every_n_epochs)
        if self.validation is not None and (validates or last):
            self._validate(run, progress)
            busy = True
        if self.previews is not None and (
            due(config.sample_every_n_steps, config.sample_every_n_epochs) or last
        ):
            self._preview(run, progress)
            busy = True
        if not last and due(config.save_every_n_steps, config.save_every_n_epochs):
            self.save(run, run.step, config.save_state)
            self._show_gate(run, progress)
            busy = True
        if busy:
            progress.pause()

    def finish(self, run: Run) -> None:
        """Writes the final file, of the averaged values or of those that validated best."""
        config = run.config
        if config.save_state or config.save_state_on_train_end:
            self._save_state(run)
        best = config.keep_best and bool(run.best)
        step = run.history.best_step if best else run.step
        with run.average.applied():
            if best:
                for name, parameter in run.method.trainable().items():
                    parameter.data.copy_(run.best[name])
            if config.choose_strength:
                self._choose_strength(run, step)
            self.verdict = self._judge(run, step)
            if run.accelerator.is_main_process:
                entries = self.metadata.after(
                    step, run.position.epoch, run.history, self.verdict, self.strength
                )
                self.outputs.save(None, entries)
                self._write_summary(run)
        run.accelerator.wait_for_everyone()

    def save(self, run: Run, step: int, with_state: bool) -> None:
        """Writes the file of a step and, if asked for, its state."""
        with run.average.applied():
            if run.accelerator.is_main_process:
                entries = self.metadata.after(step, run.position.epoch, run.history)
                self.outputs.save(step, entries)
        if with_state:
            self._save_state(run)
        if run.accelerator.is_main_process:
            self.outputs.prune(step, run.epoch_after)
        run.accelerator.wait_for_everyone()

    def _save_state(self, run: Run) -> None:
        if run.accelerator.is_main_process:
            scaler = run.accelerator.scaler
            rest = {
                "optimiser": plain_optimiser(run.optimiser).state_dict(),
                "schedule": run.schedule.state_dict(),
                "average": run.average.state_dict(),
                "scaler": {} if scaler is None else scaler.state_dict(),
            }
            values = {name: p.detach() for name, p in run.method.trainable().items()}
            state = State(
                run.step, run.position, run.history, values, run.best, rest, dict(self.facts)
            )
            folder = state_folder(self.outputs.folder, run.config.output_name, run.step)
            save_state(folder, state)
        run.accelerator.wait_for_everyone()

    def _judge(self, run: Run, step: int) -> Verdict | None:
        """The verdict on the values as they are now."""
        if self.validation is None or self.base_losses is None:
            return None
        trained = self._trained(run, step)
        facts: dict[str, Any] = {
            "best_step": run.history.best_step,
            "last_step": run.total,
            "kept_step": step,
            "falling": run.history.falling,
            "chosen": self.strength is not None
            or (run.config.keep_best and len(run.history.validation) > 2),
        }
        if run.config.objective != "distill":
            return judge(self.base_losses, trained, **facts)
        sides = None
        if self.base_sides is not None:
            after = self.validation.sides(run.student.eval())
            sides = None if after is None else (self.base_sides, after)
        return judge_repair(self.base_losses, trained, sides, **facts)

    def _trained(self, run: Run, step: int) -> Tensor:
        """The losses of the values as they are now, which are those of a step."""
        assert self.validation is not None
        if step not in self._seen:  # it was done before a kill
            self._seen[step] = self.validation.images(run.student.eval())
        return self._seen[step]

    def _choose_strength(self, run: Run, step: int) -> None:
        """Folds in the strength that validates best."""
        validation = self.validation
        assert validation is not None
        before, student = self._trained(run, step), run.student.eval()
        self.strength, self._seen[step] = choose_strength(
            run.method, before, lambda: validation.images(student)
        )

    def _write_summary(self, run: Run) -> None:
        """NAME.json: the verdict, and what the run was."""
        path = self.outputs.folder / f"{run.config.output_name}.json"
        summary = {
            "result": self.outputs.path().name,
            "use": {**self.metadata.purpose, **known_after(self.verdict, self.strength)},
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "validation_loss_by_step": {
                str(step): run.history.mean(step) for step in run.history.validation
            },
            "config": run.config.recorded(),
        }
        write_atomically(path, json.dumps(summary, indent=1, ensure_ascii=False).encode())

    def _validate(self, run: Run, progress: Progress) -> None:
        assert self.validation is not None
        assert self.base_losses is not None
        student, history = run.student, run.history
        with run.average.applied():
            # Not measured again where it is known: prompts begin at zero.
            same = run.step == 0 and run.method.changes_nothing
            found = self.base_losses if same else self.validation.images(student.eval())
            history.validation[run.step] = bins = found.mean(0).tolist()
            better = not history.best_step or history.mean(run.step) < history.mean(
                history.best_step
            )
            # Step 0 is the base; a run that never beats it still leaves its best.
            if run.step and better:
                history.best_step = run.step
                if run.config.keep_best:
                    run.best = {
                        name: p.detach().cpu().clone() for name, p in run.method.trainable().items()
                    }
        kept = {step: losses for step, losses in self._seen.items() if step == history.best_step}
        self._seen = {**kept, run.step: found}
        student.train()
        base = self.base_losses.mean(0).tolist()
        mean, own = history.mean(run.step), sum(base) / len(base)
        values = {"validation/loss": mean, "validation/change": mean / own - 1}
        changes = {f"validation/bin{n}": bins[n] - base[n] for n in range(len(bins))}
        progress.log(run.step, {**values, **changes})
        if run.step:
            chart = losses_chart(history.validation, base)
            progress.pictures(run.step, "validation loss by noise level", [chart])
        progress.say(
            f"step {run.step}: validation loss {mean:.5f} ({mean / own - 1:+.2%} against the base)"
        )

    def _preview(self, run: Run, progress: Progress) -> None:
        assert self.previews is not None
        student = run.student
        if run.sharded or run.accelerator.is_main_process:
            student.eval()
            with run.average.applied(), run.accelerator.autocast():
                self.shown = self.previews.pairs(self.previews.draw())
            student.train()
        if run.accelerator.is_main_process:
            texts = [prompt.text for prompt in self.previews.prompts]
            self.outputs.save_previews(run.step, self.shown, texts)
            progress.pictures(run.step, "base, trained, difference", self.shown)
        run.accelerator.wait_for_everyone()

    def _show_gate(self, run: Run, progress: Progress) -> None:
        path = self.outputs.path(run.step)
        gate = path.with_name(f"{path.stem}-gate.png")
        if run.accelerator.is_main_process and gate.exists():
            with Image.open(gate) as image:
                progress.pictures(run.step, "gate", [image.convert("RGB")])
