"""What the metrics have in common as torchmetrics: integer states, ids that count once, and plots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

Scores = dict[str, Tensor]
_LARGEST_ID = torch.iinfo(torch.long).max


class BenchmarkMetric(Metric):
    """A metric of texts whose scores are a dict of scalars.

    Args:
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Attributes:
        tables: names of the states that are tables of integers, one row per example, and their numbers of columns.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    identity: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tables: dict[str, int] = {}
        # MetricCollection takes metrics whose states are equal after one batch for one metric, and updates the first
        # alone, whatever rules the others count by. Bytes of a random name keep all but copies apart.
        self.add_state("identity", default=torch.tensor(list(uuid4().bytes)), dist_reduce_fx="max")

    def set_dtype(self, dst_type: str | torch.dtype) -> BenchmarkMetric:
        """Leave the states as they are: counts are integers, and float16 could not tell 2048 from 2049.

        Args:
            dst_type: the type that is asked for.

        Returns:
            The metric.
        """
        return self

    def add_table(self, name: str, columns: int) -> None:
        """Add a state that is a table of integers, whose rows are gathered from all processes.

        Args:
            name: of the state.
            columns: of the table.
        """
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self.tables[name] = columns

    def add_rows(self, name: str, rows: Tensor) -> None:
        """Add rows to a table.

        Args:
            name: of the state.
            rows: int64, (N, columns).
        """
        setattr(self, name, [*self._parts(name), rows.to(self.device)])

    def table_of(self, name: str) -> Tensor:
        """All rows of a table, int64, (N, columns).

        Args:
            name: of the state.
        """
        return dim_zero_cat([self._no_rows(name), *self._parts(name)])

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the state of all processes, as :meth:`torchmetrics.Metric.sync` does.

        Args:
            args: arguments of that method.
            kwargs: arguments of that method.
        """
        # A process that saw nothing would send an empty float vector, which does not go with the tables of the others.
        for name in self.tables:
            setattr(self, name, self._parts(name) or [self._no_rows(name)])
        super().sync(*args, **kwargs)

    def _parts(self, name: str) -> list[Tensor]:
        state: Tensor | list[Tensor] = getattr(self, name)
        return [state] if isinstance(state, Tensor) else state

    def _no_rows(self, name: str) -> Tensor:
        return torch.zeros(0, self.tables[name], dtype=torch.long, device=self.device)

    def plot(self, val: Scores | Sequence[Scores] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plot one result or several; scores of another unit than the others are left out.

        Args:
            val: what ``forward`` or ``compute`` returned, or a list of that; None plots ``compute()``.
            ax: a matplotlib axis to draw on.

        Returns:
            Figure and axis.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        val = self.compute() if val is None else val
        return self._plot(self._drawn(val) if isinstance(val, dict) else [self._drawn(one) for one in val], ax)

    def _drawn(self, scores: Scores) -> Scores:
        return {name: scores[name] for name in self._drawn_names(scores)}

    @staticmethod
    def _drawn_names(names: Iterable[str]) -> list[str]:
        """The scores that are drawn."""
        return list(names)


class CountedMetric(BenchmarkMetric):
    """A metric whose scores are computed from counts that add up over examples.

    Examples that come with a number count once. Where their results differ, the counts that come first when sorted by
    the first column, then by the second and so on, are taken, so that neither the order of the batches nor the number
    of processes matters.

    Args:
        columns: counts per example.
        kwargs: arguments of :class:`torchmetrics.Metric`.
    """

    counts: Tensor
    rows: list[Tensor] | Tensor

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", default=torch.zeros(columns, dtype=torch.long), dist_reduce_fx="sum")
        self.add_table("rows", 1 + columns)

    def _count(self, counts: Tensor, ids: Sequence[int] | None) -> None:
        """Add the counts of a batch.

        Args:
            counts: int64, (N, columns).
            ids: numbers of the examples, or None if all of them count.

        Raises:
            ValueError: if there is not one whole number per example.
        """
        if ids is None:
            self.counts += counts.sum(0).to(self.counts.device)
            return
        self.add_rows("rows", torch.cat([_checked_ids(ids, len(counts))[:, None], counts], dim=1))

    def compute(self) -> Scores:
        """The scores of all examples so far.

        Examples with one id count once. If their results differ, a warning says so, and the smallest row of counts is
        taken, compared column by column.
        """
        rows = torch.unique(self.table_of("rows"), dim=0)
        is_first = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        is_first[1:] = rows[1:, 0] != rows[:-1, 0]
        if not is_first.all():
            example = int(rows[~is_first][0, 0])
            rank_zero_warn(
                f"{type(self).__name__} saw example {example} with different results: the smallest counts are taken."
            )
        return self._finish(self.counts + rows[is_first, 1:].sum(0))

    @abstractmethod
    def _finish(self, counts: Tensor) -> Scores:
        """The scores of summed counts, (columns,)."""


def _checked_ids(ids: Sequence[int], length: int) -> Tensor:
    if isinstance(ids, Tensor):
        return _checked_vector(ids, length)
    if isinstance(ids, str) or not isinstance(ids, Sequence) or len(ids) != length:
        found = len(ids) if isinstance(ids, Sequence) else type(ids).__name__
        raise ValueError(f"Expected `ids`, one number per example, for {length} examples, got {found}.")
    for index, number in enumerate(ids):
        if isinstance(number, bool) or not isinstance(number, int) or abs(number) > _LARGEST_ID:
            raise ValueError(f"Expected `ids` to hold whole numbers of 64 bits, got {number!r} at index {index}.")
    return torch.tensor(ids, dtype=torch.long)


def _checked_vector(ids: Tensor, length: int) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.shape != (length,):
        raise ValueError(
            f"Expected `ids` as a tensor of whole numbers of shape ({length},), one per example, got "
            f"{ids.dtype} of shape {tuple(ids.shape)}."
        )
    return ids.to("cpu", torch.long)
