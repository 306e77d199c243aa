"""Stopping in good order when a scheduler asks for it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch.utils.data import DataLoader

from realign_lightning.checkpoints import open_batches
from realign_lightning.ranks import any_rank, gather

log = logging.getLogger(__name__)

EXIT_CODE = 75
"""What a preempted command exits with: EX_TEMPFAIL of sysexits.h, "try again later"."""

FILE_NAME = "preempted.ckpt"
"""The checkpoint that is written on the way out; the next preemption of the run replaces it."""


class Preempted(_TunerExitException):
    """Ends ``Trainer.fit`` quietly, as Lightning's own exception does; nobody outside sees it."""


class Preemption(pl.Callback):
    """On SIGTERM or SIGUSR1 saves one checkpoint and ends the training; a second signal does not disturb that.

    A signal sets a flag only. After each optimizer step, and after each batch of a validation, ranks ask one another
    whether one of them was told to stop, so that it does not matter which process got the signal. All of them then save
    ``preempted.ckpt`` beside the other checkpoints, and ``Trainer.fit`` returns. The command line has this callback by
    itself, and exits with :data:`EXIT_CODE`; resume with ``--ckpt_path last``. In Python look at :attr:`preempted`
    when ``fit`` has returned.

    While it fits, these handlers stand in place of Lightning's own, which talk to other ranks from inside a handler,
    and requeue SLURM jobs themselves. Those that were there before are put back afterwards. Before the first batch and
    after the last there is nothing to save, and a signal raises ``SystemExit(75)`` at once.

    Args:
        signals: names of the signals to listen to; an empty list switches the callback off, also the command line's.

    Attributes:
        preempted: whether the last fit was ended by a signal, on any rank.

    Raises:
        ValueError: for a name that is no signal's.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise ValueError(f"Expected `signals` to be names such as 'SIGTERM', got {unknown}.")
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.preempted = False
        self._received: int | None = None
        self._trains = False
        self._asks_in_validation = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the signals over, before data workers are started, which inherit the handlers."""
        self.preempted, self._received, self._trains = False, None, False
        first = next(callback for callback in trainer.callbacks if isinstance(callback, Preemption))  # type: ignore[attr-defined]
        if stage == "fit" and first is self and self.signals:
            process = os.getpid()
            connector = _OwnHandlers(trainer, self.signals, lambda number, _: self._on_signal(trainer, process, number))
            connector.register_signal_handlers()
            _keep_workers(trainer)

    def _on_signal(self, trainer: pl.Trainer, process: int, number: int) -> None:
        if os.getpid() != process:
            # A process that was forked from this one, and has not set its own handlers yet.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self._trains or _is_started_by_lightning(trainer):
            self._received = number
            return
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise SystemExit(EXIT_CODE)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on signals wait for the end of the step."""
        self._trains = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop, if a rank was told to and no gradients are being accumulated."""
        if open_batches(trainer) == 0:
            self._stop_if_told(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks can only ask each other at every batch if they have equally many."""
        self._asks_in_validation = self._trains and len(set(gather(str(trainer.num_val_batches)))) == 1

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop, if a rank was told to; the resumed run validates anew."""
        if self._asks_in_validation and not trainer.sanity_checking:
            self._stop_if_told(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows keeps nothing that a checkpoint could hold."""
        self._trains = False
        if any_rank(self._received is not None):
            log.info("A signal arrived at the end of the training, which is complete.")

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        if not self._trains or not self.signals or not any_rank(self._received is not None):
            return
        path = _save_path(trainer)
        name = "a signal to another rank" if self._received is None else signal.Signals(self._received).name
        log.info("Stopping at step %d because of %s: saving %s", trainer.global_step, name, path)
        trainer.save_checkpoint(path, weights_only=False)
        self.preempted = True
        if trainer.is_global_zero:
            _remove_former(trainer, path)
            log.info("Saved. Resume with `--ckpt_path last`, or ckpt_path=%r in Python.", path)
        raise Preempted

    def exit_code(self, trainer: pl.Trainer) -> int:
        """What a process is to exit with after its fit was preempted.

        Args:
            trainer: of the run.

        Returns:
            75; 0 in the processes that Lightning itself has started beside the first, for it kills that one as soon as
            another exits with anything else.
        """
        return 0 if _is_started_by_lightning(trainer) else EXIT_CODE


def _is_started_by_lightning(trainer: pl.Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and environment.local_rank() > 0


def _keep_workers(trainer: pl.Trainer) -> None:
    """Let data workers outlive a signal to the whole job: their batches are needed until the save."""
    strategy = trainer.strategy

    def process(loader: object) -> object:
        loader = type(strategy).process_dataloader(strategy, loader)
        if isinstance(loader, DataLoader) and loader.num_workers and hasattr(signal, "sigwaitinfo"):
            # Which Lightning adds only where there is none.
            _auto_add_worker_init_fn(loader, trainer.global_rank)
            loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
        return loader

    vars(strategy)["process_dataloader"] = process


def _start_worker(then: Callable[[int], None] | None, number: int) -> None:
    """Runs in a data worker: SIGTERM counts only from the process that the worker works for.

    PyTorch's own handler does so too, but dies of signals from elsewhere, and its death ends the training.
    """
    blocked = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    threading.Thread(target=_obey_parent, args=(os.getppid(), blocked), daemon=True).start()
    if then is not None:
        then(number)


def _obey_parent(parent: int, signals: set[signal.Signals]) -> None:
    while True:
        received = signal.sigwaitinfo(signals)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)


def _save_path(trainer: pl.Trainer) -> str:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return f"{callback.dirpath}/{FILE_NAME}"
    return f"{trainer.default_root_dir}/checkpoints/{FILE_NAME}"


def _remove_former(trainer: pl.Trainer, path: str) -> None:
    """Loggers give a resumed run a new folder; what it resumed from was of use only until now."""
    former = trainer.ckpt_path
    if former is not None and Path(former).name == FILE_NAME and Path(former).absolute() != Path(path).absolute():
        trainer.strategy.checkpoint_io.remove_checkpoint(str(former))


class _OwnHandlers(_SignalConnector):
    """In the place of Lightning's: the same life, other handlers, and nothing that a handler says to other ranks."""

    def __init__(
        self, trainer: pl.Trainer, signals: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
    ) -> None:
        super().__init__(trainer)
        self._signals = signals
        self._handler = handler
        self._former = trainer._signal_connector
        trainer._signal_connector = self

    def register_signal_handlers(self) -> None:
        if self._original_handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals:
            # None where a handler was not set from Python: it cannot be put back.
            self._original_handlers[number] = signal.signal(number, self._handler) or signal.SIG_DFL

    def teardown(self) -> None:
        super().teardown()
        self.trainer._signal_connector = self._former
        vars(self.trainer.strategy).pop("process_dataloader", None)
