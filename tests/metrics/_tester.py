"""One tester for every metric, in the manner of torchmetrics' own."""

import pickle
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

Batch = tuple[list[Any], list[Any]]


def assert_scores(scores: dict[str, Tensor], expected: dict[str, float], tolerance: float = 1e-12) -> None:
    assert set(scores) == set(expected)
    for name, value in expected.items():
        assert scores[name].shape == ()
        assert scores[name].item() == pytest.approx(value, abs=tolerance), name


def joined(batches: Sequence[Batch]) -> Batch:
    return [pred for preds, _ in batches for pred in preds], [wanted for _, target in batches for wanted in target]


class MetricTester:
    """Subclasses give the metric, its data and an independent reference."""

    takes_ids = True
    """Whether ``update`` takes numbers of examples; HallusionBench knows its questions by themselves."""

    def make_metric(self) -> Metric:
        raise NotImplementedError

    def batches(self) -> Sequence[Batch]:
        raise NotImplementedError

    def reference(self, preds: Sequence[Any], target: Sequence[Any]) -> dict[str, float]:
        raise NotImplementedError

    def filled(self) -> Metric:
        metric = self.make_metric()
        for preds, target in self.batches():
            metric.update(preds, target)
        return metric

    def test_batch_values_and_the_accumulated_value(self) -> None:
        metric = self.make_metric()
        for preds, target in self.batches():
            assert_scores(metric(preds, target), self.reference(preds, target))
        assert_scores(metric.compute(), self.reference(*joined(self.batches())))

    def test_merged_states_give_the_value_of_one(self) -> None:
        first, second = self.make_metric(), self.make_metric()
        for index, (preds, target) in enumerate(self.batches()):
            (first if index % 2 else second).update(preds, target)
        first.merge_state(second)
        assert_scores(first.compute(), self.reference(*joined(self.batches())))

    def test_pickle_and_clone_keep_the_value(self) -> None:
        metric = self.filled()
        expected = self.reference(*joined(self.batches()))
        assert_scores(pickle.loads(pickle.dumps(metric)).compute(), expected)  # noqa: S301
        clone = metric.clone()
        metric.reset()
        assert_scores(clone.compute(), expected)

    def test_reset_forgets(self) -> None:
        metric = self.filled()
        metric.reset()
        preds, target = self.batches()[0]
        metric.update(preds, target)
        assert_scores(metric.compute(), self.reference(preds, target))

    def test_states_are_integer_counts_that_no_checkpoint_holds(self) -> None:
        metric = self.filled().half()
        assert metric.state_dict() == {}
        for state in metric.metric_state.values():
            assert all(part.dtype == torch.long for part in (state if isinstance(state, list) else [state]))
        assert_scores(metric.compute(), self.reference(*joined(self.batches())))

    def test_states_stay_integers_whatever_type_is_asked_for(self) -> None:
        metric = self.make_metric().set_dtype(torch.float16)
        for preds, target in self.batches():
            metric.update(preds, target)
        for state in metric.set_dtype(torch.float16).metric_state.values():
            assert all(part.dtype == torch.long for part in (state if isinstance(state, list) else [state]))
        assert_scores(metric.compute(), self.reference(*joined(self.batches())))

    def test_nothing_seen_is_zero(self) -> None:
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            scores = self.make_metric().compute()
        assert all(value == 0 for value in scores.values())

    def test_a_rejected_batch_changes_nothing(self) -> None:
        metric = self.filled()
        preds, target = self.batches()[0]
        with pytest.raises(ValueError, match="same length"):
            metric.update(preds, target[:-1])
        assert_scores(metric.compute(), self.reference(*joined(self.batches())))

    def test_examples_that_a_sampler_pads_in_count_once(self) -> None:
        """The last batch goes round to the first examples, as DistributedSampler pads."""
        if not self.takes_ids:
            return
        metric, start = self.make_metric(), 0
        for preds, target in self.batches():
            metric.update(preds, target, ids=list(range(start, start + len(preds))))
            start += len(preds)
        preds, target = joined(self.batches())
        metric.update(preds[:3], target[:3], ids=[0, 1, 2])
        assert_scores(metric.compute(), self.reference(*joined(self.batches())))

    def test_one_example_with_two_results_counts_once_in_any_order(self) -> None:
        if not self.takes_ids:
            return
        preds, target = joined(self.batches())
        scores = []
        for order in (1, -1):
            metric = self.make_metric()
            for index in range(len(preds))[::order]:
                metric.update([preds[index]], [target[index]], ids=[7])
            with pytest.warns(UserWarning, match="example 7 with different results"):
                scores.append(metric.compute())
        assert scores[0] == scores[1]

    def test_ids_may_be_a_tensor(self) -> None:
        if not self.takes_ids:
            return
        metric, (preds, target) = self.make_metric(), joined(self.batches())
        for _ in range(2):
            metric.update(preds, target, ids=torch.arange(len(preds), dtype=torch.int32))
        assert_scores(metric.compute(), self.reference(preds, target))

    @pytest.mark.parametrize(
        "ids",
        [
            *([1], "12", [0.5], [True], [2**63], 3),
            *(torch.tensor([0.5, 1.5]), torch.tensor([True, False]), torch.tensor([1j, 2j])),
            *(torch.tensor([[1], [2]]), torch.tensor([1]), torch.tensor(2)),
        ],
    )
    def test_wrong_ids_are_refused(self, ids: Any) -> None:
        if not self.takes_ids:
            return
        metric = self.filled()
        preds, target = joined(self.batches())
        size = 1 if isinstance(ids, list) and ids != [1] else 2
        with pytest.raises(ValueError, match="Expected `ids`"):
            metric.update(preds[:size], target[:size], ids=ids)
        assert_scores(metric.compute(), self.reference(*joined(self.batches())))

    def test_class_attributes(self) -> None:
        metric = self.make_metric()
        assert metric.is_differentiable is False
        assert metric.full_state_update is False
        assert isinstance(metric.higher_is_better, bool)
        assert (metric.plot_lower_bound, metric.plot_upper_bound) == (0.0, 1.0)

    def test_plot_draws_or_says_what_is_missing(self) -> None:
        metric = self.filled()
        if find_spec("matplotlib") is None:
            with pytest.raises(ModuleNotFoundError, match="matplotlib"):
                metric.plot()
            return
        for results in (None, metric.compute(), [metric.compute(), metric.compute()]):
            figure, _ = metric.plot(results)
            assert figure.axes
