import math

import pytest
import torch
from torch import Tensor

from realign_lightning.losses import (
    RDPOLoss,
    SFTLoss,
    anchor_loss,
    preference_loss,
    rdpo_loss,
    reward_metrics,
    sft_loss,
)
from realign_lightning.types import LogProbs, ResponseLengths
from tests.losses.trl_loss import trl_preference_losses


def log_probs(*rows: tuple[float, float, float], dtype: torch.dtype = torch.float32) -> LogProbs:
    chosen, rejected, visual = torch.tensor(rows, dtype=dtype).T
    return LogProbs(chosen, rejected, visual)


def random_pair(seed: int, rows: int = 5, dtype: torch.dtype = torch.float64) -> tuple[LogProbs, LogProbs]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: -20 * torch.rand(3, rows, generator=generator, dtype=dtype)  # noqa: E731
    return LogProbs(*draw()), LogProbs(*draw())


LENGTHS = ResponseLengths(torch.tensor([4, 2]), torch.tensor([8, 5]), torch.tensor([4, 2]))


class TestByHand:
    def test_start_is_two_ln_two(self):
        start = log_probs((-30.0, -12.5, -41.0), (-3.0, -7.0, -1.0))
        output = RDPOLoss()(start, start)
        torch.testing.assert_close(output.losses, torch.full((2,), 2 * math.log(2)), rtol=0, atol=1e-6)
        assert all((rewards == 0).all() for rewards in output[1:])

    def test_eq_1(self):
        """beta = 0.1.

        Example 1: r(y_w|v) = -10 - (-20) = 10, r(y_l|v) = -35 - (-15) = -20, r(y_w|v_l) = -25 - (-25) = 0.
            text   0.1 * (10 + 20) = 3: -log sigmoid(3) = log(1 + e^-3) = 0.0485874
            visual 0.1 * (10 - 0)  = 1: -log sigmoid(1) = log(1 + e^-1) = 0.3132617
            sum 0.3618490; rewards 1, -2, 0.
        Example 2: r = 0, 10, 20: text 0.1 * -10 = -1: log(1 + e) = 1.3132617; visual 0.1 * -20 = -2:
            log(1 + e^2) = 2.1269280; sum 3.4401897; rewards 0, 1, 2.
        """
        policy = log_probs((-10.0, -35.0, -25.0), (-20.0, -5.0, -5.0))
        reference = log_probs((-20.0, -15.0, -25.0), (-20.0, -15.0, -25.0))
        output = rdpo_loss(policy, reference, beta=0.1)
        torch.testing.assert_close(output.losses, torch.tensor([0.3618490, 3.4401897]), rtol=0, atol=1e-6)
        torch.testing.assert_close(output.chosen_rewards, torch.tensor([1.0, 0.0]))
        torch.testing.assert_close(output.rejected_rewards, torch.tensor([-2.0, 1.0]))
        torch.testing.assert_close(output.visual_rewards, torch.tensor([0.0, 2.0]))

    def test_visual_weight_scales_the_second_term(self):
        """Example 1 of test_eq_1 with w_v = 0.5: 0.0485874 + 0.5 * 0.3132617 = 0.2052182."""
        output = rdpo_loss(log_probs((-10.0, -35.0, -25.0)), log_probs((-20.0, -15.0, -25.0)), visual_weight=0.5)
        torch.testing.assert_close(output.losses, torch.tensor([0.2052182]), rtol=0, atol=1e-6)

    def test_label_smoothing(self):
        """beta h = 1, eps = 0.25: 0.75 log(1 + e^-1) + 0.25 log(1 + e) = 0.2349463 + 0.3283154 = 0.5632617."""
        loss = preference_loss(torch.tensor([5.0]), torch.tensor([-5.0]), beta=0.1, label_smoothing=0.25)
        torch.testing.assert_close(loss, torch.tensor([0.5632617]), rtol=0, atol=1e-6)

    def test_hinge(self):
        """beta h = 0.1 * 4 = 0.4: 1 - 0.4 = 0.6; beta h = 2 is past the margin: 0."""
        loss = preference_loss(torch.tensor([4.0, 20.0]), torch.tensor([0.0, 0.0]), beta=0.1, loss_type="hinge")
        torch.testing.assert_close(loss, torch.tensor([0.6, 0.0]))

    def test_ipo(self):
        """8 over 4 tokens and -8 over 8: h = 2 + 1 = 3; beta = 0.25 gives the target 1 / 0.5 = 2; (3 - 2)^2 = 1."""
        loss = preference_loss(
            torch.tensor([8.0]),
            torch.tensor([-8.0]),
            beta=0.25,
            loss_type="ipo",
            preferred_lengths=torch.tensor([4]),
            dispreferred_lengths=torch.tensor([8]),
        )
        torch.testing.assert_close(loss, torch.tensor([1.0]))

    def test_anchor_and_sft(self):
        """Anchor: -log sigmoid(0.1 * 10) = 0.3132617. SFT: 12 nats over 4 tokens = 3."""
        torch.testing.assert_close(anchor_loss(torch.tensor([10.0])), torch.tensor([0.3132617]), rtol=0, atol=1e-6)
        torch.testing.assert_close(sft_loss(torch.tensor([-12.0]), torch.tensor([4])), torch.tensor([3.0]))

    def test_weights_add_up(self):
        """Example 1 of test_eq_1, w_v = 0, anchor weight 2 and SFT weight 3 over 4 tokens:
        0.0485874 + 2 * log(1 + e^-1) + 3 * 10 / 4 = 0.0485874 + 0.6265234 + 7.5 = 8.1751108."""
        output = rdpo_loss(
            log_probs((-10.0, -35.0, -25.0)),
            log_probs((-20.0, -15.0, -25.0)),
            visual_weight=0,
            anchor_weight=2,
            sft_weight=3,
            lengths=ResponseLengths(torch.tensor([4])),
        )
        torch.testing.assert_close(output.losses, torch.tensor([8.1751108]), rtol=0, atol=1e-6)


def independent_loss(policy: LogProbs, reference: LogProbs, loss_type: str, beta: float, lengths: ResponseLengths):
    """Eq. 1 with the probability written out: sigmoid(a - b) = e^a / (e^a + e^b), per example, in plain floats."""
    values = []
    for row in range(len(policy.chosen)):
        ratio = {name: (value[row] - getattr(reference, name)[row]).item() for name, value in policy.items()}
        total = 0.0
        for other in ("rejected", "visual"):
            if loss_type == "sigmoid":
                ours, theirs = math.exp(beta * ratio["chosen"]), math.exp(beta * ratio[other])
                total -= math.log(ours / (ours + theirs))
            elif loss_type == "hinge":
                total += max(0.0, 1 - beta * (ratio["chosen"] - ratio[other]))
            else:
                mean = ratio["chosen"] / lengths.chosen[row].item() - ratio[other] / getattr(lengths, other)[row].item()
                total += (mean - 0.5 / beta) ** 2
        values.append(total)
    return torch.tensor(values, dtype=policy.chosen.dtype)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_every_loss_type_against_an_independent_formula(loss_type, beta):
    policy, reference = random_pair(seed=1, rows=2)
    losses = rdpo_loss(policy, reference, beta=beta, loss_type=loss_type, lengths=LENGTHS).losses
    torch.testing.assert_close(
        losses, independent_loss(policy, reference, loss_type, beta, LENGTHS), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"visual_weight": 0.3, "label_smoothing": 0.1},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"anchor_weight": 1.0, "sft_weight": 0.5},
    ],
    ids=str,
)
def test_gradient_equals_finite_differences(settings):
    policy, reference = random_pair(seed=2, rows=2)
    inputs = tuple(value.clone().requires_grad_() for _, value in policy.items())

    def losses(chosen: Tensor, rejected: Tensor, visual: Tensor) -> Tensor:
        return rdpo_loss(LogProbs(chosen, rejected, visual), reference, lengths=LENGTHS, **settings).losses

    assert torch.autograd.gradcheck(losses, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_visual_weight_zero_is_trl_dpo(beta, loss_type):
    policy, reference = random_pair(seed=3, dtype=torch.float32)
    ones = torch.ones(5)
    ours = rdpo_loss(policy, reference, beta, visual_weight=0, loss_type=loss_type, lengths=ResponseLengths(ones, ones))
    expected = trl_preference_losses(policy, reference, beta=beta, loss_type=loss_type)
    torch.testing.assert_close(ours.losses.mean(), expected, rtol=1e-6, atol=1e-6)


def test_visual_weight_zero_is_dpo_to_the_last_bit():
    policy, reference = random_pair(seed=4, dtype=torch.float32)
    without_image = rdpo_loss(
        LogProbs(policy.chosen, policy.rejected), LogProbs(reference.chosen, reference.rejected), visual_weight=0
    )
    with_image = rdpo_loss(policy, reference, visual_weight=0)
    dpo = -torch.nn.functional.logsigmoid(
        0.1 * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    )
    assert torch.equal(without_image.losses, dpo)
    assert torch.equal(with_image.losses, dpo)


def test_swapping_sides_flips_the_margins():
    policy, reference = random_pair(seed=5)
    swap = lambda p: LogProbs(p.rejected, p.chosen, p.visual)  # noqa: E731
    there = reward_metrics(rdpo_loss(policy, reference))["rewards/margins"]
    back = reward_metrics(rdpo_loss(swap(policy), swap(reference)))["rewards/margins"]
    torch.testing.assert_close(there, -back)


def test_rewards_are_detached_and_named_as_in_trl():
    policy = LogProbs(*(torch.tensor([value], requires_grad=True) for value in (-1.0, -5.0, -3.0)))
    output = rdpo_loss(policy, log_probs((-2.0, -2.0, -2.0)))
    assert output.losses.requires_grad
    assert not any(rewards.requires_grad for rewards in output[1:])
    metrics = {name: value.item() for name, value in reward_metrics(output).items()}
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.3,
            "rewards/margins": 0.4,
            "rewards/accuracies": 1.0,
            "rewards/visual": -0.1,
            "rewards/visual_margins": 0.2,
            "rewards/visual_accuracies": 1.0,
        }
    )


def test_views_tell_what_must_be_scored():
    assert RDPOLoss().views == ("chosen", "rejected", "visual")
    assert RDPOLoss(visual_weight=0).views == ("chosen", "rejected")
    assert RDPOLoss(text_weight=0).views == ("chosen", "visual")
    assert SFTLoss().views == ("chosen",)
    assert not SFTLoss().needs_reference
    output = SFTLoss()(LogProbs(torch.tensor([-12.0])), lengths=ResponseLengths(torch.tensor([4])))
    assert output.losses.item() == 3.0
    assert reward_metrics(output) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"visual_weight": -1.0}, "visual_weight"),
        ({"anchor_weight": -0.1}, "anchor_weight"),
        ({"sft_weight": float("nan")}, "sft_weight"),
        ({"text_weight": -1.0}, "text_weight"),
        ({"text_weight": 0.0, "visual_weight": 0.0}, "nothing would be learned"),
        ({"visual_words": "some"}, "visual_words"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing"),
        ({"loss_type": "kto"}, "loss_type"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RDPOLoss(**settings)


def test_missing_inputs_are_named():
    two_views = LogProbs(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="visual_weight=1"):
        RDPOLoss()(two_views, two_views)
    with pytest.raises(ValueError, match="rejected"):
        rdpo_loss(LogProbs(torch.zeros(1)), two_views, visual_weight=0)
    with pytest.raises(ValueError, match="reference"):
        RDPOLoss()(two_views)
    with pytest.raises(ValueError, match="lengths"):
        rdpo_loss(two_views, two_views, visual_weight=0, sft_weight=1.0)
    with pytest.raises(ValueError, match="lengths"):
        rdpo_loss(two_views, two_views, visual_weight=0, loss_type="ipo")
    with pytest.raises(ValueError, match="lengths"):
        SFTLoss()(two_views)


def test_per_answer_every_token_weighs_alike():
    """Gradients of cross-entropy summed over the tokens of answers of 2 and 5; per token those of the two means."""
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    labels, lengths = torch.randint(11, (7,)), torch.tensor([2, 5])
    chosen = torch.stack([part.sum() for part in logits.log_softmax(-1)[range(7), labels].split([2, 5])])
    means = torch.nn.functional.cross_entropy(logits, labels, reduction="none").split([2, 5])
    for per, expected in (("answer", sum(part.sum() for part in means)), ("token", sum(part.mean() for part in means))):
        (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
        zeros = LogProbs(torch.zeros(2, dtype=torch.float64))
        alone = RDPOLoss(text_weight=0, visual_weight=0, sft_weight=3.0, sft_per=per)
        weighed = alone(LogProbs(chosen), zeros, ResponseLengths(lengths)).losses.sum() / 3
        for found in (SFTLoss(per)(LogProbs(chosen), lengths=ResponseLengths(lengths)).losses.sum(), weighed):
            torch.testing.assert_close(torch.autograd.grad(found, logits, retain_graph=True)[0], wanted)
    assert SFTLoss("answer")(LogProbs(torch.tensor([-12.0]))).losses.item() == 12.0
    for make in (lambda: SFTLoss("batch"), lambda: RDPOLoss(sft_per="batch")):
        with pytest.raises(ValueError, match="'batch'"):
            make()


def test_text_weight_zero_is_the_visual_preference_alone():
    """By hand: beta 0.1, log-ratios 3 and -2 of the chosen response beside both images, so -log sigmoid(0.5)."""
    policy = LogProbs(torch.tensor([-5.0]), None, torch.tensor([-10.0]))
    reference = LogProbs(torch.tensor([-8.0]), None, torch.tensor([-8.0]))
    output = RDPOLoss(beta=0.1, text_weight=0.0)(policy, reference)
    assert output.losses.item() == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-6)
    assert output.rejected_rewards is None
    assert "rewards/margins" not in reward_metrics(output)
    assert reward_metrics(output)["rewards/visual_margins"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("text_weight", [0.5, 3.0])
def test_text_weight_weighs_dpo(text_weight):
    policy, reference = random_pair(4)
    text = RDPOLoss(visual_weight=0.0)(policy, reference).losses
    both = RDPOLoss(visual_weight=2.0)(policy, reference).losses
    weighed = RDPOLoss(visual_weight=2.0, text_weight=text_weight)(policy, reference).losses
    torch.testing.assert_close(weighed - both, (text_weight - 1) * text)
