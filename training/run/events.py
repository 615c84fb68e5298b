"""What happens beside the steps: validation, previews, saving."""

from __future__ import annotations

import torch
from PIL import Image

from training.run.loop import Events, Run
from training.run.metadata import Metadata
from training.run.outputs import Outputs
from training.run.previews import Previews
from training.run.progress import Progress
from training.run.state import State, restore_random, save_state, state_folder
from training.run.validation import Validation


class TrainingEvents(Events):
    """Validates, shows and saves when the options say so.

    Args:
        outputs: where files go.
        metadata: what they say.
        facts: what a continuation must have in common with this run.
        validation, previews: None for none.
    """

    def __init__(
        self,
        outputs: Outputs,
        metadata: Metadata,
        facts: dict[str, object],
        validation: Validation | None,
        previews: Previews | None,
    ) -> None:
        self.outputs, self.metadata, self.facts = outputs, metadata, facts
        self.validation, self.previews = validation, previews
        self.shown: list[Image.Image] = []

    def before(self, run: Run, progress: Progress) -> None:
        """The first validation and preview; a resumed run has had them."""
        if run.step > 0:
            return
        if self.validation is not None:
            self._validate(run, progress)
        if self.previews is not None and run.config.sample_at_first:
            self._preview(run, progress)

    def after_step(self, run: Run, progress: Progress, epoch_ended: bool) -> None:
        """Whatever is due after this step."""
        config, last = run.config, run.step == run.total

        def due(steps: int | None, epochs: int | None = None) -> bool:
            every_epochs = epochs and epoch_ended and run.position.epoch % epochs == 0
            return bool((steps and run.step % steps == 0) or every_epochs)

        busy = False
        if self.validation is not None and (due(config.validate_every_n_steps) or last):
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
        with run.average.applied():
            if config.keep_best and run.best:
                for name, parameter in run.method.trainable().items():
                    parameter.data.copy_(run.best[name])
            if run.accelerator.is_main_process:
                step = run.history.best_step if config.keep_best and run.best else run.step
                entries = self.metadata.after(step, run.position.epoch, run.history)
                self.outputs.save(None, entries)
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
            self.outputs.prune(step)
        run.accelerator.wait_for_everyone()

    def _save_state(self, run: Run) -> None:
        if run.accelerator.is_main_process:
            scaler = run.accelerator.scaler
            rest = {
                "optimiser": _plain(run.optimiser).state_dict(),
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

    def _validate(self, run: Run, progress: Progress) -> None:
        assert self.validation is not None
        student, history = run.student, run.history
        with run.average.applied():
            history.validation[run.step] = bins = self.validation(student.eval())
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
        student.train()
        mean, base = history.mean(run.step), sum(history.base) / len(history.base)
        progress.log(
            run.step,
            {
                "validation/loss": mean,
                "validation/change": mean / base - 1,
                **{f"validation/bin{n}": b - a for n, (a, b) in enumerate(_pairs(history, bins))},
            },
        )
        progress.say(
            f"step {run.step}: validation loss {mean:.5f} ({mean / base - 1:+.2%} against the base)"
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
            self.outputs.save_previews(run.step, self.shown)
            progress.pictures(run.step, "base left, trained right", self.shown)
        run.accelerator.wait_for_everyone()

    def _show_gate(self, run: Run, progress: Progress) -> None:
        path = self.outputs.path(run.step)
        gate = path.with_name(f"{path.stem}-gate.png")
        if run.accelerator.is_main_process and gate.exists():
            with Image.open(gate) as image:
                progress.pictures(run.step, "gate", [image.convert("RGB")])


def restore(run: Run, state: State) -> None:
    """Puts a state's values into a run that was assembled like the one that left it."""
    own = run.method.trainable()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state.values[name])
    _plain(run.optimiser).load_state_dict(state.rest["optimiser"])
    run.schedule.load_state_dict(state.rest["schedule"])
    run.average.load_state_dict(state.rest["average"])
    if run.accelerator.scaler is not None and state.rest["scaler"]:
        run.accelerator.scaler.load_state_dict(state.rest["scaler"])
    run.step, run.position, run.history = state.step, state.position, state.history
    run.best = state.best
    restore_random(state.rest["random"])


def _plain(optimiser: object) -> torch.optim.Optimizer:
    """The optimiser itself, from what accelerate makes of it."""
    inner: torch.optim.Optimizer = getattr(optimiser, "optimizer", optimiser)
    return inner


def _pairs(history: object, bins: list[float]) -> list[tuple[float, float]]:
    return list(zip(history.base, bins, strict=True))  # type: ignore[attr-defined]
