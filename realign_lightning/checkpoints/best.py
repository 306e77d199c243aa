"""What Lightning's ModelCheckpoint remembers of the best checkpoints, compared with what is there."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from realign_lightning.checkpoints.plugin import is_remote
from realign_lightning.checkpoints.search import is_readable
from realign_lightning.ranks import on_first_rank

log = logging.getLogger(__name__)


def mend_best(callback: ModelCheckpoint, resumed_from: str | Path) -> None:
    """Drop from a callback's memory what is not there, or cannot be read, after a resume.

    A resume from an older checkpoint names files that were removed since. All ranks call this.

    Args:
        callback: its state was restored.
        resumed_from: the checkpoint.
    """
    named = {*callback.best_k_models, callback.best_model_path, callback.kth_best_model_path, callback.last_model_path}
    local = sorted(str(path) for path in named if path and not is_remote(path))
    gone = on_first_rank(lambda: [path for path in local if not is_readable(Path(path))])
    if not gone:
        return
    log.info("Forgotten, as they are not there or cannot be read: %s", ", ".join(gone))
    callback.best_k_models = {path: score for path, score in callback.best_k_models.items() if path not in gone}
    if callback.last_model_path in gone:
        callback.last_model_path = ""
    _choose_best(callback, gone, str(resumed_from))


def _choose_best(callback: ModelCheckpoint, gone: list[str], resumed_from: str) -> None:
    ranked = sorted(callback.best_k_models, key=lambda path: float(callback.best_k_models[path]))
    if callback.mode == "max":
        ranked.reverse()
    if ranked:
        callback.best_model_path, callback.kth_best_model_path = ranked[0], ranked[-1]
        callback.best_model_score = callback.best_k_models[ranked[0]]
        callback.kth_value = callback.best_k_models[ranked[-1]]
        return
    worst = torch.tensor(float("inf" if callback.mode == "min" else "-inf"))
    callback.kth_best_model_path, callback.kth_value, callback.best_model_score = "", worst, None
    if callback.best_model_path in gone:
        # Without a metric the last one saved counts as the best.
        in_folder = callback.dirpath is not None and Path(callback.dirpath) in Path(resumed_from).absolute().parents
        callback.best_model_path = resumed_from if callback.monitor is None and in_folder else ""
