"""What the experiment of benchmarks/evidence.py consists of, as its recipe says it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from benchmarks.evidence_worlds import Part, World

BASE = "base"
"""Name of the policy as it was taught."""

Rule = Literal["rdpo", "sft", "released"]
"""The loss of a method: of the preferences, plain SFT, or what the authors' released code computes."""

Negative = Literal["retrieved", "random", "crop"]
"""The image of the visual preference: the retrieved one, that of another pair, or mDPO's crop of the image itself."""


NUMBERED = ("visual_weight", "sft_weight")
"""Names of ablations that are drawn over the numbers in their labels."""


@dataclass(frozen=True)
class Method:
    """One way of training.

    Args:
        title: for tables.
        rule: what is computed.
        loss: arguments of :class:`~realign_lightning.losses.RDPOLoss`, or for ``rule: sft`` of
            :class:`~realign_lightning.losses.SFTLoss`.
        negative: the image of the visual preference.
        pairs: arguments of the world's pairs that differ from its own, for example ``{"tau": 0.85}``.
        step_factor: of the experiment's number of steps.
        balanced: as many pairs whose answer turns from yes to no as from no to yes; those too many are left out.
        share: of the pairs that is used; the steps stay as many.
    """

    title: str
    rule: Rule = "rdpo"
    loss: dict[str, Any] = field(default_factory=dict)
    negative: Negative = "retrieved"
    pairs: dict[str, Any] = field(default_factory=dict)
    step_factor: float = 1.0
    balanced: bool = False
    share: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What a training depends on, without what is as usual."""
        usual = asdict(Method(""))
        return {name: value for name, value in asdict(self).items() if name != "title" and value != usual[name]}

    def __post_init__(self) -> None:
        if self.rule == "sft" and self.loss.keys() - {"per"}:
            raise ValueError(f"Expected nothing but `per` in `loss` of {self.title!r}, which is SFT; got {self.loss}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"Expected `share` of {self.title!r} in (0, 1], got {self.share}.")
        if not self.step_factor > 0:
            raise ValueError(f"Expected `step_factor` of {self.title!r} above 0, got {self.step_factor}.")


@dataclass(frozen=True)
class Ablation:
    """One setting of a method that takes several values.

    Args:
        title: of the setting.
        values: what changes, by label, in the order of tables; an empty change is the method itself.
        question: what it asks.
        worlds: names of the worlds that it is run in; None are the experiment's ``ablation_worlds``.
        step_by_step: compare every value with the one before it, not with the method itself.
    """

    title: str
    values: dict[str, dict[str, Any]]
    question: str = ""
    worlds: list[str] | None = None
    step_by_step: bool = False

    def compared(self) -> dict[str, str]:
        """The value that each value is compared with, where there is one."""
        labels = list(self.values)
        if self.step_by_step:
            return dict(zip(labels[1:], labels, strict=False))
        own = next((label for label, change in self.values.items() if not change), None)
        return {} if own is None else {label: own for label in labels if label != own}

    def methods(self, method: Method) -> dict[str, Method]:
        """The method with every value of the setting.

        Args:
            method: what is changed.
        """
        return {label: _changed(method, change) for label, change in self.values.items()}


def _changed(method: Method, change: Mapping[str, Any]) -> Method:
    merged: dict[str, Any] = {
        name: {**getattr(method, name), **value} if isinstance(value, Mapping) else value
        for name, value in change.items()
    }
    return replace(method, **merged)


@dataclass(frozen=True)
class Training:
    """What is the same for all methods.

    Args:
        steps: optimizer steps.
        batch_size: pairs per step.
        rank: of LoRA; alpha is twice as much.
        trainer: arguments of Lightning's Trainer.
    """

    steps: int
    batch_size: int
    rank: int
    trainer: dict[str, Any] = field(default_factory=lambda: {"accelerator": "cpu", "devices": 1})

    def __post_init__(self) -> None:
        wanted = self.trainer.get("devices", "auto")
        found = self._all_devices() if str(wanted) in ("auto", "-1") else wanted
        if str(found) != "1":
            resolved = "" if found is wanted else f", which is {found} here"
            raise ValueError(
                f"Expected `devices` of `trainer` to be 1, got {wanted!r}{resolved}: a process trains and measures on "
                "one device. Set devices: 1, and CUDA_VISIBLE_DEVICES to choose which."
            )

    def _all_devices(self) -> int:
        on_gpu = self.trainer.get("accelerator", "auto") in ("gpu", "cuda", "auto")
        return max(1, torch.cuda.device_count()) if on_gpu else 1

    def steps_of(self, method: Method) -> int:
        """Optimizer steps of a method.

        Args:
            method: that may take more or fewer than others.
        """
        return round(self.steps * method.step_factor)


@dataclass(frozen=True)
class Choosing:
    """How hyper-parameters are chosen: the same grid for every method, on the validation images.

    Args:
        rates: learning rates to try.
        strengths: of the adapter after training, to try.
        score: that is to be low.
        kept: score that a choice may not lose much of.
        most_lost: how much of it, on the mean over policies.
    """

    rates: list[float]
    strengths: list[float]
    score: str
    kept: str
    most_lost: float


@dataclass(frozen=True)
class Measure:
    """A score, and how to read it.

    Args:
        key: of the score.
        title: for tables.
        higher_is_better: None where neither is.
        digits: behind the point.
    """

    key: str
    title: str
    higher_is_better: bool | None = True
    digits: int = 1


@dataclass(frozen=True)
class Claim:
    """A sentence that the numbers have to bear out, in every world.

    Args:
        text: the sentence.
        method: whose scores.
        against: another method, or ``base``.
        measure: key of the score.
        at_most_lost: the claim is that at most so much is lost; None: that the method is better.
        reasons: what was tested of why it does not hold, by world; said where it does not.
    """

    text: str
    method: str
    against: str
    measure: str
    at_most_lost: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """The whole experiment.

    Args:
        seeds: of fresh policies that results are about.
        development: seeds of policies that hyper-parameters are chosen on.
        world: policies, pairs and measurements.
        training: what is the same for all methods.
        choosing: of hyper-parameters.
        methods: by name.
        ablated: name of the method that ablations change.
        ablations: by name.
        ablation_seeds: how many of ``seeds`` ablations take.
        ablation_worlds: names of the worlds that they are run in.
        dial: strengths of the ablated method's adapter that are measured, after training.
        measures: for tables.
        pictured: keys of the measures in pictures and in tables of ablations, the most important first.
        claims: what the page's first paragraph says about.
        questions_at_once: questions per call of the model's ``generate``.
        keep_questions: keep encoded questions, and pairs with all kinds of negatives, in memory; for small images.
        scoring_batch_size: pairs per forward pass without gradient: the reference's log-probs, and margins.
        gradient_checkpointing: recompute activations in the backward pass; less memory, about a third more time.
        traded: names of at most four methods; what they gain at every point of the grid is drawn over what it costs.
    """

    seeds: list[int]
    development: list[int]
    world: World
    training: Training
    choosing: Choosing
    methods: dict[str, Method]
    ablated: str
    ablations: dict[str, Ablation]
    ablation_seeds: int
    ablation_worlds: list[str]
    dial: list[float]
    measures: list[Measure]
    pictured: list[str]
    claims: list[Claim]
    questions_at_once: int = 256
    keep_questions: bool = True
    scoring_batch_size: int = 64
    gradient_checkpointing: bool = False
    traded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if both := set(self.seeds) & set(self.development):
            raise ValueError(f"Expected other seeds in `development` than in `seeds`, got {sorted(both)} in both.")
        if (self.ablations or self.dial) and self.ablated not in self.methods:
            raise ValueError(f"Expected `ablated` to be one of {sorted(self.methods)}, got {self.ablated!r}.")
        named = {world for name in self.ablations for world in self.worlds_of(name)} | set(self.ablation_worlds)
        if unknown := named - set(self.world.names):
            raise ValueError(f"Expected worlds of ablations among {list(self.world.names)}, got {sorted(unknown)}.")
        self._check_names()
        self._check_directions()
        self._check_steps()
        self._check_dials()
        self._check_parts()
        if self.scoring_batch_size < 1:
            raise ValueError(f"Expected `scoring_batch_size` of at least 1, got {self.scoring_batch_size}.")
        if len(self.traded) > 4:
            raise ValueError(f"Expected at most four methods in `traded`, got {self.traded}.")
        if not 0 <= self.ablation_seeds <= len(self.seeds):
            raise ValueError(f"Expected `ablation_seeds` from 0 to {len(self.seeds)}, got {self.ablation_seeds}.")

    def _check_names(self) -> None:
        """A name that is none must show now, not when all is trained."""
        if BASE in self.methods:
            raise ValueError(
                f"Expected other names in `methods` than {BASE!r}, which is the policy as it was taught, got "
                f"{sorted(self.methods)}. Rename the method."
            )
        measures = {measure.key for measure in self.measures}
        read = [*self.pictured, self.choosing.score, self.choosing.kept, *(claim.measure for claim in self.claims)]
        compared = [name for claim in self.claims for name in (claim.method, claim.against)]
        for title, names, known in (
            ("measures", read, measures),
            ("methods of claims", compared, {BASE, *self.methods}),
            ("methods in `traded`", self.traded, set(self.methods)),
        ):
            if unknown := set(names) - known:
                raise ValueError(f"Expected {title} among {sorted(known)}, got {sorted(unknown)}.")

    def _check_directions(self) -> None:
        """A choice takes the lowest score and keeps what is high; a claim is that something gets better."""
        known = {measure.key: measure.higher_is_better for measure in self.measures}
        for name, key, wanted in (
            ("score", self.choosing.score, False),
            ("kept", self.choosing.kept, True),
        ):
            if known[key] is not wanted:
                raise ValueError(
                    f"Expected `choosing.{name}` to be a measure with `higher_is_better: {str(wanted).lower()}`, got "
                    f"{key!r} with {known[key]}. Name another measure, or correct it in `measures`."
                )
        if vague := sorted({claim.measure for claim in self.claims if known[claim.measure] is None}):
            raise ValueError(
                f"Expected `claims` on measures with `higher_is_better` true or false, got {vague}, which have "
                "neither. Say in `measures` what is better, or claim something else."
            )

    def _check_steps(self) -> None:
        methods = list(self.methods.items())
        for name, ablation in self.ablations.items():
            changed = ablation.methods(self.methods[self.ablated])
            methods += [(f"{name}={label}", method) for label, method in changed.items()]
        if idle := [name for name, method in methods if self.training.steps_of(method) < 1]:
            raise ValueError(
                f"Expected `steps` times `step_factor` of at least 1, got {self.training.steps} steps, of which "
                f"nothing is left for {idle}. Raise `training.steps` or their `step_factor`."
            )

    def _check_dials(self) -> None:
        """What is drawn as a dial has numbers, and begins at the policy as it was taught."""
        if self.dial and 0.0 not in self.dial:
            raise ValueError(
                f"Expected 0.0, which is the policy as it was taught, among the strengths in `dial`, got {self.dial}. "
                "Add it, or leave the dial empty."
            )
        for name in self.ablations.keys() & set(NUMBERED):
            if wrong := [label for label in self.ablations[name].values if not _is_number(label)]:
                raise ValueError(
                    f"Expected numbers as labels of the ablation {name!r}, which is drawn over them, got {wrong}. "
                    "Write the weight itself, or give the ablation another name."
                )

    def _check_parts(self) -> None:
        """What is not there to be measured on must show now, not hours later."""
        needed: list[Part] = ["validation", "test"]
        needed += ["ablation"] if self.ablation_seeds or self.dial else []
        if missing := [part for part in needed if part not in self.world.parts]:
            raise ValueError(
                f"Expected the world to have something to measure for the parts {needed}, got none for {missing}. Add "
                "it to the world's arguments; `ablation` can be left out with `ablation_seeds: 0` and `dial: []`."
            )

    def worlds_of(self, ablation: str) -> list[str]:
        """The worlds that an ablation is run in.

        Args:
            ablation: its name.
        """
        own = self.ablations[ablation].worlds
        return self.ablation_worlds if own is None else own


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def read_experiment(recipe: str | Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment that a recipe describes.

    Args:
        recipe: YAML file.
        changes: further arguments in the form of the command line, for example ``--steps=10``.
    """
    parser, found = _parse(recipe, changes)
    experiment: Experiment = parser.instantiate(found).experiment
    return experiment


def describe(recipe: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """An experiment in plain values, as the recipe says it and with all defaults.

    Args:
        recipe: YAML file.
        changes: further arguments.
    """
    _, found = _parse(recipe, changes)
    described: dict[str, Any] = found.experiment.as_dict()
    return described


def _parse(recipe: str | Path, changes: Sequence[str]) -> tuple[ArgumentParser, Any]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", action="config")
    parser.add_class_arguments(Experiment, "experiment")
    return parser, parser.parse_args([f"--recipe={recipe}", *changes])


def digest(settings: Any) -> str:
    """A short name of plain values or dataclasses, equal for equal ones.

    Args:
        settings: what JSON can hold, or a dataclass of it.
    """
    plain = settings if isinstance(settings, dict | list | str | int | float) else asdict(settings)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
