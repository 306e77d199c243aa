"""A watch on the rewards of a running training, which says what to try when they go wrong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

CHOSEN = "train/rewards/chosen"
TEXT = "train/rewards/margins"
VISUAL = "train/rewards/visual_margins"

# Differences of so many standard errors are no noise, also where a long run is asked a thousand times.
_SURE = 4.0


class RewardMonitor(pl.Callback):
    """Warns when the chosen reward keeps falling or the visual margin collapses, with numbers and with what to try.

    Reads ``train/rewards/chosen``, ``train/rewards/margins`` and ``train/rewards/visual_margins`` as they are logged
    for every optimizer step, of any module that logs them; the last may be missing, as where ``visual_weight`` is 0.
    Values are read from the device a few steps at a time.

    * *Chosen reward falls*: its mean is lower in every quarter of the window than in the one before, below 0 in the
      last, and lower than in the first by ``fall`` and by four standard errors. The policy unlearns the responses that
      it should prefer; margins grow all the same, because rejected ones fall faster.
    * *Visual margin collapses*: its mean over the last quarter is, by four standard errors, below ``share`` of the
      highest it has been or, where that is more, of the text margin now. One of them has to have reached 0.2.

    Standard errors take into account that neighbouring steps are alike. Each warning comes once. It may come again
    after the reward has made up for the whole fall, or the margin has come back to twice the bound. What was seen is
    kept in checkpoints.

    Args:
        window: optimizer steps that a trend is judged on.
        fall: of the chosen reward over the window, in units of the reward (``beta`` times nats).
        share: of its former level, or of the text margin, below which a visual margin counts as collapsed.

    Raises:
        ValueError: for a window of less than 8 steps, a fall that is not above 0, or a share outside (0, 1).
    """

    def __init__(self, window: int = 100, fall: float = 0.05, share: float = 0.1) -> None:
        if window < 8:
            raise ValueError(f"Expected `window` to be at least 8 optimizer steps, got {window}.")
        if not fall > 0:
            raise ValueError(f"Expected `fall` to be above 0, got {fall}.")
        if not 0 < share < 1:
            raise ValueError(f"Expected `share` between 0 and 1, got {share}.")
        self.window = window
        self.fall = fall
        self.share = share
        self._series = {name: _Series(window) for name in (CHOSEN, TEXT, VISUAL)}
        self._unread: list[dict[str, Tensor]] = []
        self._step = 0
        self._best_visual = -math.inf
        self._fell_from: float | None = None
        self._has_collapsed = False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Take what an optimizer step has logged."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        logged = trainer.callback_metrics
        self._unread.append({name: logged[name].detach() for name in self._series if name in logged})
        if len(self._unread) >= max(1, self.window // 20):
            self._read()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take what is left."""
        self._read()

    def _read(self) -> None:
        """Take over what was logged, with one transfer from the device."""
        pairs = [(name, value) for step in self._unread for name, value in step.items()]
        self._unread = []
        if pairs:
            numbers = torch.stack([value.float() for _, value in pairs]).tolist()
            self.observe(zip((name for name, _ in pairs), numbers, strict=True))

    def observe(self, values: Iterable[tuple[str, float]]) -> None:
        """Take values of one or more optimizer steps, and warn if there is reason to.

        Args:
            values: names as they are logged, and numbers; what is not finite is passed over.
        """
        for name, value in values:
            if math.isfinite(value):
                self._series[name].add(value)
        self._judge_chosen()
        self._judge_visual()

    def _judge_chosen(self) -> None:
        series = self._series[CHOSEN]
        if not series.is_full:
            return
        means = series.quarters()
        if self._fell_from is not None:
            if means[-1] > self._fell_from:
                self._fell_from = None
            return
        falls = all(later < earlier for earlier, later in pairwise(means))
        enough = means[0] - means[-1] > max(self.fall, _SURE * math.sqrt(2) * series.error())
        if falls and enough and means[-1] < 0:
            self._fell_from = means[0]
            rank_zero_warn(_chosen_words(self._step, self.window, means[0], means[-1]))

    def _judge_visual(self) -> None:
        visual, text = self._series[VISUAL], self._series[TEXT]
        if not visual.is_full or not text.is_full:
            return
        now, beside = visual.quarters()[-1], text.quarters()[-1]
        self._best_visual = max(self._best_visual, now)
        level = max(self._best_visual, beside)
        bound = self.share * level
        if self._has_collapsed:
            self._has_collapsed = now <= 2 * bound
        elif level >= _LEVEL and now + _SURE * visual.error() < bound:
            self._has_collapsed = True
            rank_zero_warn(_visual_words(self._step, self.window // 4, now, self._best_visual, beside))

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, in plain values."""
        self._read()
        return {
            "series": {name: series.values for name, series in self._series.items()},
            "step": self._step,
            "best_visual": self._best_visual,
            "fell_from": self._fell_from,
            "has_collapsed": self._has_collapsed,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; of a longer window, the latest values are taken.

        Args:
            state_dict: from :meth:`state_dict`.
        """
        for name, values in state_dict["series"].items():
            self._series[name] = _Series(self.window, values)
        self._unread = []
        self._step = state_dict["step"]
        self._best_visual = state_dict["best_visual"]
        self._fell_from = state_dict["fell_from"]
        self._has_collapsed = state_dict["has_collapsed"]


_LEVEL = 0.2
"""Margin, in units of the reward, from which a collapse can be told from a beginning."""


class _Series:
    """The latest values of one metric, and their means by quarters."""

    def __init__(self, window: int, values: Iterable[float] = ()) -> None:
        self._quarter = window // 4
        self._values = deque(values, maxlen=4 * self._quarter)

    def add(self, value: float) -> None:
        self._values.append(value)

    @property
    def values(self) -> list[float]:
        return list(self._values)

    @property
    def is_full(self) -> bool:
        return len(self._values) == self._values.maxlen

    def _parts(self) -> np.ndarray:
        return np.array(self._values).reshape(4, self._quarter)

    def quarters(self) -> list[float]:
        """Means of the four quarters, the oldest first."""
        return [float(mean) for mean in self._parts().mean(axis=1)]

    def error(self) -> float:
        """Standard error of a quarter's mean, from what a straight line leaves over.

        Neighbours that are alike tell less than their number says: for a correlation r of one step with the next, the
        variance of their mean is (1 + r) / (1 - r) times that of independent ones.
        """
        values = np.array(self._values)
        steps = np.arange(len(values))
        rest = values - np.polyval(np.polyfit(steps, values, 1), steps)
        power = float((rest**2).sum())
        if not power:
            return 0.0
        alike = min(max(float((rest[1:] * rest[:-1]).sum()) / power, 0.0), 0.95)
        return math.sqrt(power / (len(values) - 2) / self._quarter * (1 + alike) / (1 - alike))


def _chosen_words(step: int, window: int, before: float, now: float) -> str:
    return (
        f"The chosen reward keeps falling: from {before:.3f} to {now:.3f} in the {window} optimizer steps up to step "
        f"{step}. The policy makes the preferred responses less likely than its reference does; margins may grow all "
        "the same, because rejected responses fall faster. Try, one at a time: loss.anchor_weight (1.0 is mDPO's) or "
        "loss.sft_weight (0.1 to 1), which hold the preferred responses up, a larger loss.beta, which keeps the policy "
        "nearer to its reference, or a lower learning rate."
    )


def _visual_words(step: int, steps: int, now: float, best: float, text: float) -> str:
    return (
        f"The visual margin has collapsed: {now:.3f} in the {steps} optimizer steps up to step {step}, where its best "
        f"was {best:.3f} and the text margin is {text:.3f}. The policy prefers responses without telling the image "
        "from the retrieved one. Try, one at a time: a larger loss.visual_weight, loss.anchor_weight (1.0) or "
        "loss.sft_weight where the chosen reward falls too, a larger loss.beta or a lower learning rate, and look "
        "whether the retrieved images differ from the images in what the responses speak of."
    )
