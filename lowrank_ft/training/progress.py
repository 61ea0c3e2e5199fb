"""What a run tells while it runs: a bar, ``metrics.jsonl`` and trackers, all from the main process."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lowrank_ft.console import progress_bar
from lowrank_ft.data.examples import TokenizedData
from lowrank_ft.training.metrics import MetricsLog, Window, plot_run
from lowrank_ft.training.options import TrainArguments


def outline(train_data: TokenizedData, eval_data: TokenizedData | None, global_batch: int, max_steps: int) -> str:
    """What a run is about to do, in a line."""
    tokens = int(train_data.starts[-1] - train_data.starts[0])
    held_out = 0 if eval_data is None else len(eval_data)
    each = global_batch * tokens / len(train_data)
    return (
        f"data: {len(train_data):,} sequences to train on ({tokens:,} tokens), {held_out:,} held out; "
        f"{max_steps:,} steps of {global_batch} sequences, about {each:,.0f} tokens"
    )


class Progress:
    """Of one run, from ``first_step`` to ``max_steps``.

    Args:
        folder: of the run.
        first_step: completed steps; above 0 in a run that is resumed.
    """

    def __init__(
        self, accelerator: Accelerator, args: TrainArguments, folder: Path, first_step: int, max_steps: int
    ) -> None:
        self._accelerator, self._args, self._max_steps = accelerator, args, max_steps
        self._log = MetricsLog(folder, first_step) if accelerator.is_main_process else None
        self._window = Window()
        if args.report_to:
            flat = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | bool)}
            accelerator.init_trackers(args.run_name, config=flat)
        self._bar = progress_bar(
            total=max_steps, initial=first_step, desc="fine-tune", unit="step",
            progress=accelerator.is_main_process,
        )  # fmt: skip

    def event(self, step: int, event: str, **facts: Any) -> None:
        if self._log is not None:
            self._log.write(step=step, event=event, **facts)

    def evaluated(self, step: int, loss: float, perplexity: float) -> None:
        self._record(step, {"eval_loss": loss, "eval_perplexity": perplexity})

    def trained(self, step: int, losses: dict[str, float], tokens: int, seconds: float, **facts: float) -> None:
        """Count one step in, and record the means since the last record where one is due.

        Args:
            facts: of the step: alpha, learning rate, norm of the gradient.
        """
        self._window.add(losses, tokens, seconds)
        if step % max(1, self._args.logging_steps) and step != self._max_steps:
            return
        means, speed = self._window.means(), self._window.tokens / self._window.seconds
        self._record(step, {**means, **facts}, tokens_per_second=round(speed, 1))
        self._bar.set_postfix(
            {name: f"{mean:.3f}" for name, mean in means.items()}, alpha=f"{facts['alpha']:.2f}", refresh=False
        )
        self._window = Window()

    def step_done(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def draw(self, picture: Path) -> None:
        """The run so far, where matplotlib is installed."""
        if self._log is not None:
            plot_run(self._log.path, picture)

    def _record(self, step: int, entry: dict[str, float], **more: float) -> None:
        if self._log is not None:
            self._log.write(step=step, **entry, **more)
            self._accelerator.log(entry, step=step)
