"""Work of a policy on every rank of a Trainer."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from realign_lightning.backbones.base import Backbone
from realign_lightning.engines.policy import Policy, TrainedWeights

_QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "barebones": False,
    "fast_dev_run": False,
    "overfit_batches": 0.0,
    "limit_predict_batches": None,
    "use_distributed_sampler": True,
}
"""What a Trainer is to leave to the work."""


def run_on_ranks(
    run: Callable[[Policy | None], Any],
    backbone: Backbone | None,
    trainer: Mapping[str, Any],
    trained: TrainedWeights | None = None,
) -> tuple[Any, bool]:
    """Do work on every rank of a Trainer.

    Args:
        run: the work, given the policy; called on every rank.
        backbone: the policy's family; None where there is none.
        trainer: arguments of the Trainer: devices, strategy, precision. What concerns training is left out.
        trained: what was trained on top of the backbone's weights.

    Returns:
        What ``run`` returned on this rank, and whether this is the first rank, which writes and prints.
    """
    worker = PolicyWorker(run, backbone, trained)
    runner = pl.Trainer(**{**trainer, **_QUIET})
    runner.predict(worker, return_predictions=False)
    return worker.result, runner.is_global_zero


@contextmanager
def saying_what_is_kept(work: str | Path) -> Iterator[None]:
    """Add to an error of the system, such as a full disk, that finished work is not lost.

    Args:
        work: folder of finished work.

    Raises:
        SystemExit: in place of such an error; what this package refuses says itself what to do, and passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        raise SystemExit(
            f"error: {place}{error.strerror or error}. What was finished is kept in {work}: mend this, and give the "
            "same command again."
        ) from error


class PolicyWorker(pl.LightningModule):
    """Does work inside ``Trainer.predict``, on every rank and with any strategy that training can use.

    Under :class:`~realign_lightning.modules.FSDP2Strategy` the policy is loaded sharded; otherwise every rank loads it
    when it is first needed.

    Args:
        run: the work, given the policy.
        backbone: the policy's family; None where there is none.
        trained: what was trained on top of the backbone's weights.
    """

    def __init__(
        self, run: Callable[[Policy | None], Any], backbone: Backbone | None, trained: TrainedWeights | None = None
    ) -> None:
        super().__init__()
        self._run = run
        self._backbone = backbone
        self._trained = trained
        self._sharded: torch.nn.Module | None = None
        self.result: Any = None

    def configure_model(self) -> None:
        """Load the policy if it is to be sharded."""
        if self.device_mesh is None or self._sharded is not None:
            return
        if self._backbone is None:
            raise ValueError("Expected `backbone` with a strategy that shards a model: there is nothing to shard.")
        if self._trained is not None:
            raise ValueError(
                "Adapters and checkpoints are not loaded sharded: merge them first (`realign-lightning export "
                "--merge`) and give the merged model as the backbone."
            )
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        self._sharded = self._backbone.load_sharded(self.device_mesh["data_parallel"], compute_dtype=dtype).eval()

    def predict_dataloader(self) -> DataLoader[int]:
        """One batch for every rank: all of the work."""
        return DataLoader(list(range(self.trainer.world_size)))  # type: ignore[arg-type]

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Do the work."""
        policy = None
        if self._backbone is not None:
            is_sharded = self._sharded is not None
            device = None if is_sharded else self.device
            precision = str(self.trainer.precision)
            policy = Policy(self._backbone, self._sharded, device, is_sharded, precision, self._trained)
        with _stopped_by_sigterm():
            self.result = self._run(policy)
        # Lightning takes None for a mistake.
        return batch_idx


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the work where it is; Lightning would let it come to its end first."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
