"""Benchmarks before and after training, beside controls that were trained on the same data."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from tqdm import tqdm

from realign_lightning.callbacks.samples import shares_one_model
from realign_lightning.evaluation.base import Benchmark
from realign_lightning.evaluation.images import load_image
from realign_lightning.ranks import on_first_rank

log = logging.getLogger(__name__)


class Evaluation(pl.Callback):
    """Runs benchmarks on the reference and on the trained policy, and on controls, and prints one table.

    The reference is evaluated as ``base`` before the first step; the policy as ``name`` when training ends. Then every
    control is trained from the same base for as many steps on the same data in the same order, with another loss, and
    evaluated too. The scores are logged as ``eval/<arm>/<score>``, written to ``<log folder>/evaluation.json`` and
    ``evaluation.md``, and printed.

    Args:
        benchmarks: what to run.
        controls: losses of further arms by name, for example ``{"SFT": SFTLoss()}``.
        name: what to call the trained policy.
        batch_size: questions per call of the policy's ``generate``.

    Raises:
        ValueError: for no benchmarks, or two arms of one name.
    """

    def __init__(
        self,
        benchmarks: list[Benchmark],
        controls: dict[str, nn.Module] | None = None,
        name: str = "rDPO",
        batch_size: int = 64,
    ) -> None:
        controls = dict(controls or {})
        if not benchmarks:
            raise ValueError("Expected at least one benchmark, got none.")
        if {"base", name} & controls.keys() or name == "base":
            raise ValueError(f"Arms need names of their own: 'base', {name!r} and {sorted(controls)} collide.")
        self.benchmarks = list(benchmarks)
        self.controls = controls
        self.name = name
        self.batch_size = batch_size
        self.results: dict[str, dict[str, float]] = {}
        self._folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the reference can answer and controls can be trained here, and find the log folder.

        Raises:
            ValueError: for a reference that is no model, and for controls on several devices, or with a module that
                cannot be cloned.
        """
        # Ranks agree on it by talking to each other, so all of them must ask here.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        if stage == "fit" and not getattr(pl_module, "can_ask_reference", True):
            raise ValueError(
                "Evaluation asks the reference before training, and with reference='cached' and without an adapter it "
                "is no model in memory: set reference='frozen_copy', or remove the callback."
            )
        if stage == "fit":
            for benchmark in self.benchmarks:
                self._prepare(benchmark)
        if stage != "fit" or not self.controls:
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"Controls are trained one after another on one device, got {trainer.world_size}. "
                "Set trainer.devices=1, or remove `controls`."
            )
        if not callable(getattr(pl_module, "clone", None)):
            raise ValueError(f"Controls need a module with `clone(loss=...)`, got {type(pl_module).__name__}.")

    def _prepare(self, benchmark: Benchmark) -> None:
        """Let a benchmark say what it lacks before anything is trained."""
        benchmark.prepare(self._folder / "evaluation")
        blind = next((one for one in benchmark.questions() if one.image is None), None)
        if blind is not None:
            raise ValueError(
                f"{type(benchmark).__name__} asks without an image ({blind.key or blind.prompt!r}), which is not done "
                "while training: leave such questions out (HallusionBenchmark: `ask: image`), or use "
                "`realign-lightning test` afterwards."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the reference."""
        self.results = {}
        self.results["base"] = self._evaluate(trainer, pl_module, "base", reference=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the policy."""
        if trainer.interrupted:
            log.warning("Training was interrupted: its policy is not evaluated.")
            return
        self.results[self.name] = self._evaluate(trainer, pl_module, self.name)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train and evaluate the controls, then print the table."""
        if self.name not in self.results:
            return
        for name, loss in self.controls.items():
            self._run_control(trainer, pl_module, name, loss)
        self._report(trainer)

    def _evaluate(self, trainer: pl.Trainer, pl_module: Any, arm: str, reference: bool = False) -> dict[str, float]:
        scores: dict[str, float] = {}
        for benchmark in self.benchmarks:
            answers = self._answers(trainer, pl_module, benchmark, arm, reference)
            found = on_first_rank(partial(benchmark.score, answers))
            repeated = scores.keys() & found.keys()
            if repeated:
                raise ValueError(f"Two benchmarks give a score the same name: {sorted(repeated)}.")
            scores |= found
        for logger in trainer.loggers:
            logger.log_metrics({f"eval/{arm}/{score}": value for score, value in scores.items()}, trainer.global_step)
        return scores

    def _answers(
        self, trainer: pl.Trainer, pl_module: Any, benchmark: Benchmark, arm: str, reference: bool
    ) -> list[str]:
        """Answers to all questions; ranks share the work and exchange their answers."""
        questions = benchmark.questions()
        # Questions of one length in one batch: less padding.
        order = sorted(range(len(questions)), key=lambda index: len(str(questions[index].prompt)))
        mine = order[trainer.global_rank :: trainer.world_size]
        most = -(-len(order) // trainer.world_size)
        starts = range(0, most if shares_one_model(trainer) else len(mine), self.batch_size)
        label = f"evaluate {arm}: {type(benchmark).__name__}"
        answers: dict[int, str] = {}
        for start in tqdm(starts, desc=label, unit="batch", disable=not trainer.is_global_zero, leave=False):
            # Ranks that share one model answer equally often: where one has nothing left, it repeats a question.
            rows = mine[start : start + self.batch_size] or order[:1]
            texts = pl_module.generate(
                [questions[row].prompt for row in rows],
                [load_image(shown) for row in rows if (shown := questions[row].image) is not None],
                reference=reference,
                max_new_tokens=benchmark.max_new_tokens,
            )
            answers |= dict(zip(rows, texts, strict=True))
        if trainer.world_size > 1:
            gathered: list[dict[int, str]] = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, answers)
            answers = {row: text for part in gathered for row, text in part.items()}
        return [answers[index] for index in range(len(questions))]

    def _run_control(self, trainer: pl.Trainer, pl_module: Any, name: str, loss: nn.Module) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        with isolate_rng():
            pl.seed_everything(torch.initial_seed() % 2**32, verbose=False)
            control = pl_module.clone(loss=loss)
            inner = pl.Trainer(
                default_root_dir=trainer.default_root_dir,
                accelerator=device.type,
                devices=1 if device.type == "cpu" else [device.index or 0],
                precision=trainer.precision,
                max_steps=trainer.global_step,
                accumulate_grad_batches=trainer.accumulate_grad_batches,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
                limit_train_batches=trainer.limit_train_batches,
                overfit_batches=trainer.overfit_batches,  # type: ignore[attr-defined]
                deterministic=_determinism(),
                benchmark=torch.backends.cudnn.benchmark,
                logger=CSVLogger(self._folder, name="controls", version=name),
                log_every_n_steps=trainer.log_every_n_steps,  # type: ignore[attr-defined]
                limit_val_batches=0,
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_model_summary=False,
                # Not the default: two of Rich's live displays cannot be open at once.
                callbacks=[TQDMProgressBar()],
            )
            log.info("Training the control %r for %d steps.", name, trainer.global_step)
            if datamodule is None:
                inner.fit(control, trainer.train_dataloader)
            else:
                inner.fit(control, datamodule=datamodule)
                datamodule.trainer = trainer
            control.to(device)
            self.results[name] = self._evaluate(trainer, control, name)

    @rank_zero_only
    def _report(self, trainer: pl.Trainer) -> None:
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        arms = ["base", *self.controls, self.name]
        results = {arm: self.results[arm] for arm in arms}
        (folder / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
        table = format_table(results)
        (folder / "evaluation.md").write_text(table + "\n")
        tqdm.write(f"\n{table}\n\nEverything of this run lies in {folder}")


def _determinism() -> bool | Literal["warn"]:
    """The setting that is in force; a new Trainer would reset it."""
    if torch.is_deterministic_algorithms_warn_only_enabled():
        return "warn"
    return torch.are_deterministic_algorithms_enabled()


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table with one row per score and one column per arm.

    Args:
        results: scores by arm; every arm has the same scores.

    >>> print(format_table({"base": {"accuracy": 74.94}, "rDPO": {"accuracy": 75.0}}))
    |          | base | rDPO |
    |----------|-----:|-----:|
    | accuracy | 74.9 | 75.0 |
    """
    names = list(next(iter(results.values())))
    first = max(len(name) for name in names)
    widths = [max(len(arm), *(len(f"{results[arm][name]:.1f}") for name in names)) for arm in results]
    lines = [
        "| "
        + " | ".join([" " * first, *(arm.rjust(width) for arm, width in zip(results, widths, strict=True))])
        + " |",
        "|" + "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in widths)]) + "|",
    ]
    for name in names:
        cells = [f"{results[arm][name]:.1f}".rjust(width) for arm, width in zip(results, widths, strict=True)]
        lines.append("| " + " | ".join([name.ljust(first), *cells]) + " |")
    return "\n".join(lines)
