"""benchmarks/evidence.py: its statistics, choices and rules by hand, and the whole of it in small."""

import csv
import gc
import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats

from benchmarks import evidence_jobs, evidence_training
from benchmarks.evidence import RECIPE, docs_of, run_all
from benchmarks.evidence_jobs import BASE, Bench, Choice, Job, Plan, Run, Store, by_seed, choose, do_all
from benchmarks.evidence_page import write_page
from benchmarks.evidence_report import (
    Raw,
    ablation_table,
    choice_table,
    difference_table,
    draw_trades,
    judge,
    sweep_of,
    trades,
    versus_table,
    write_raw,
)
from benchmarks.evidence_settings import Ablation, Choosing, Claim, Measure, Method, Training, describe, read_experiment
from benchmarks.evidence_statistics import difference, estimate
from benchmarks.evidence_training import ReleasedBackbone, make_module, measure, read_pairs
from benchmarks.evidence_worlds import (
    OTHER,
    PRIOR,
    DigitPairSettings,
    DigitPrior,
    Prepared,
    RankedRetriever,
    World,
    build_pairs,
)
from realign_lightning.backbones import AutoBackbone
from realign_lightning.data import ShardDataset, ShardWriter
from realign_lightning.demos import DigitBackbone, DigitScenes
from realign_lightning.demos.scenes import absent, objects, partner
from realign_lightning.evaluation.base import Benchmark, Question
from realign_lightning.losses import RDPOLoss
from realign_lightning.types import PreferenceBatch
from tests.conftest import preference_samples
from tests.evaluation.official import write_coco, write_pope
from tests.processes import alone

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes" / "evidence").glob("*.yaml"))
DIGITS = ROOT / "recipes" / "evidence" / "digits.yaml"
REDUCED = ROOT / "recipes" / "evidence" / "digits_reduced.yaml"
MARGIN = "truth: log-prob margin"


# ---- statistics


def test_intervals_are_those_of_scipys_t_test():
    values, others = [9.1, 8.4, 10.2, 7.7, 9.9], [9.8, 9.0, 10.1, 8.9, 10.4]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half, policies = estimate(values)
    assert (mean - half, mean + half, policies) == (pytest.approx(low), pytest.approx(high), 5)
    low, high = stats.ttest_rel(values, others).confidence_interval(0.95)
    found = difference(values, others)
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))
    assert found.is_clear == (stats.ttest_rel(values, others).pvalue < 0.05)


def test_one_policy_shows_nothing():
    assert estimate([3.0]).half == math.inf
    assert not difference([3.0], [100.0]).is_clear
    assert estimate([3.0]).shown() == "3.0 ± ∞"


# ---- choosing


CHOOSING = Choosing([1e-3], [1.0], "CHAIRi", "skills", most_lost=0.5)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # The lowest score, but for what loses too much.
        ([(9.0, 0.1), (8.0, 0.5), (7.0, 0.6)], 8.0),
        # Nothing keeps enough: what loses least, whatever its score.
        ([(9.0, 2.0), (7.0, 3.0), (8.0, 1.5)], 8.0),
    ],
)
def test_a_choice_is_the_lowest_score_that_keeps_enough(found, expected):
    chosen = choose([Choice(1e-3, 1.0, 0, score, lost) for score, lost in found], CHOOSING)
    assert chosen.score == expected
    assert chosen.tried == len(found)


def test_choices_are_made_on_means_over_policies(experiment, tmp_path):
    """Two policies lose 0.0 and 0.8 points of skills at strength 1.0, 0.4 on the mean, where they hallucinate less."""
    by_strength = {0.5: ([7.0, 5.0], [0.0, 0.0]), 1.0: ([4.0, 6.0], [0.0, 0.8])}
    small = replace(experiment, development=[8, 9], claims=[])

    def chosen(most_lost):
        choosing = Choosing([1e-3], list(by_strength), "CHAIRi", "skills", most_lost=most_lost)
        plan = Plan(Store(tmp_path, replace(small, choosing=choosing, methods={"rdpo": Method("rDPO")})))
        for job in (single for several in plan.grid_jobs() for single in several.singles()):
            (run,) = job.runs
            scores = {"1": {"CHAIRi": 9.0, "skills": 70.0}}
            if run.method is not None:
                scores = {
                    f"{strength:g}": {"CHAIRi": found[job.seed - 8], "skills": 70.0 - lost[job.seed - 8]}
                    for strength, (found, lost) in by_strength.items()
                }
            plan.store.result(job, run).parent.mkdir(exist_ok=True)
            plan.store.result(job, run).write_text(json.dumps({"scores": scores}))
        return plan.choices()[small.world.names[0], "rdpo"]

    assert (chosen(0.5).strength, chosen(0.5).score, chosen(0.5).lost) == pytest.approx((1.0, 5.0, 0.4))
    assert (chosen(0.3).strength, chosen(0.3).score, chosen(0.3).lost) == pytest.approx((0.5, 6.0, 0.0))


def test_choices_that_say_less_than_others_are_marked(experiment, tmp_path):
    """At the grid's corner it may go on; where nothing keeps enough the rule is not followed."""
    choosing = Choosing([1e-3, 2e-3], [0.5, 1.0], "CHAIRi", "skills", most_lost=0.5)
    chosen = [(1e-3, 0.5, 0.1), (2e-3, 1.0, 0.1), (2e-3, 0.5, 0.5), (1e-3, 0.5, 0.6)]
    lines = ["world,method,rate,strength,tried,score,lost"]
    lines += [f"balanced,rdpo,{rate},{strength},4,9.0,{lost}" for rate, strength, lost in chosen]
    (tmp_path / "choices.csv").write_text("\n".join(lines))
    rows = choice_table(replace(experiment, choosing=choosing), tmp_path).splitlines()[2:]
    assert [row.strip("| ").split("|")[-1].strip() for row in rows[:2]] == ["corner of the grid"] * 2
    assert rows[2].strip("| ").endswith("4")
    assert "none loses so little" in rows[3]


def test_what_methods_gain_is_set_against_what_it_costs_at_every_rate(experiment, tmp_path):
    """Two policies; at each rate one line, from the base at (0, 0) to the only strength."""
    lines = ["seed,world,method,rate,strength,CHAIRi,skills"]
    lines += ["3,,base,0,1,10,90", "4,,base,0,1,20,80"]
    lines += ["3,balanced,rdpo,0.001,0.5,8,89", "4,balanced,rdpo,0.001,0.5,16,78"]
    lines += ["3,balanced,rdpo,0.002,0.5,7,90", "4,balanced,rdpo,0.002,0.5,13,76"]
    (tmp_path / "grid.csv").write_text("\n".join(lines))
    raw, choosing = Raw(tmp_path / "grid.csv"), Choosing([1e-3, 2e-3], [0.5], "CHAIRi", "skills", most_lost=0.5)
    changed = replace(experiment, choosing=choosing, traded=["rdpo"])
    assert trades(changed, raw.at_rate(1e-3), "balanced", "rdpo") == ([0.0, -1.5], [0.0, -3.0])
    assert trades(changed, raw.at_rate(2e-3), "balanced", "rdpo") == ([0.0, -2.0], [0.0, -5.0])
    draw_trades(changed, raw, tmp_path / "trades.png")
    assert (tmp_path / "trades.png").read_bytes().startswith(b"\x89PNG")


# ---- claims and tables


@pytest.fixture
def experiment():
    return read_experiment(REDUCED)


def write_methods(path, scores):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "world", "method", "rate", "strength", "CHAIRi", "skills"])
        for method, rows in scores.items():
            for seed, values in enumerate(rows):
                writer.writerow([seed, "" if method == BASE else "balanced", method, 1e-3, 1.0, *values])


def judged(experiment, path, *claims):
    measures = [Measure("CHAIRi", "CHAIRi", higher_is_better=False), Measure("skills", "skills")]
    methods = {"rdpo": experiment.methods["rdpo"]}
    changed = replace(experiment, claims=list(claims), measures=measures, methods=methods, pictured=["CHAIRi"])
    return changed, judge(changed, Raw(path))


def test_claims_hold_when_the_interval_of_the_paired_difference_says_so(experiment, tmp_path):
    """Differences of CHAIRi are -2, -1, -3: mean -2, half 2.48. Not shown; with a fourth of -2 it is: half 1.30."""
    claim = Claim("fewer", "rdpo", BASE, "CHAIRi", reasons={"balanced": "Only three were asked.", "skewed": "Other."})
    base, better = [(10, 90), (20, 90), (30, 90)], [(8, 90), (19, 90), (27, 90)]
    write_methods(tmp_path / "three.csv", {BASE: base, "rdpo": better})
    changed, (verdict,) = judged(experiment, tmp_path / "three.csv", claim)
    assert not verdict.holds
    assert verdict.line(changed.measures[0]) == "fewer, balanced world: CHAIRi -2.00 ± 2.48. Only three were asked."
    assert "-2.0 ± 2.5" in difference_table(changed, Raw(tmp_path / "three.csv"), "balanced", BASE)
    assert "**" not in difference_table(changed, Raw(tmp_path / "three.csv"), "balanced", BASE)
    write_methods(tmp_path / "four.csv", {BASE: [*base, (15, 90)], "rdpo": [*better, (13, 90)]})
    changed, (verdict,) = judged(experiment, tmp_path / "four.csv", claim)
    assert verdict.holds
    assert verdict.line(changed.measures[0]) == "fewer, balanced world: CHAIRi -2.00 ± 1.30"
    assert "**-2.0 ± 1.3**" in difference_table(changed, Raw(tmp_path / "four.csv"), "balanced", BASE)


def test_a_claim_whose_opposite_is_shown_is_told_apart_from_one_that_is_open(experiment, tmp_path):
    """CHAIRi grows by 2, 1, 3, 2: the opposite is shown. Without the last two nothing is."""
    claim = Claim("fewer", "rdpo", BASE, "CHAIRi")
    base, worse = [(8, 90), (19, 90), (27, 90), (13, 90)], [(10, 90), (20, 90), (30, 90), (15, 90)]
    write_methods(tmp_path / "four.csv", {BASE: base, "rdpo": worse})
    write_methods(tmp_path / "two.csv", {BASE: base[:2], "rdpo": worse[:2]})
    found = [judged(experiment, tmp_path / f"{name}.csv", claim)[1][0] for name in ("four", "two")]
    assert [(verdict.holds, verdict.fails) for verdict in found] == [(False, True), (False, False)]


def test_a_claim_to_keep_allows_the_loss_that_it_names_and_no_more(experiment, tmp_path):
    """Skills lose 0.2 to 0.4: mean 0.3, half 0.25. At most 0.5 is not shown, at most 0.6 is."""
    base, rdpo = [(10, 90), (10, 91), (10, 92)], [(10, 89.8), (10, 90.7), (10, 91.6)]
    write_methods(tmp_path / "raw.csv", {BASE: base, "rdpo": rdpo})
    for most, holds in ((0.5, False), (0.6, True)):
        _, (verdict,) = judged(experiment, tmp_path / "raw.csv", Claim("keeps", "rdpo", BASE, "skills", most))
        assert verdict.holds is holds


def test_scores_are_paired_by_seed_whatever_their_order(tmp_path):
    with (tmp_path / "raw.csv").open("w") as file:
        file.write("seed,world,method,rate,strength,CHAIRi\n2,w,a,0,1,20\n1,w,a,0,1,10\n1,w,b,0,1,11\n2,w,b,0,1,22\n")
    raw = Raw(tmp_path / "raw.csv")
    assert (raw.values("w", "a", "CHAIRi"), raw.values("w", "b", "CHAIRi")) == ({1: 10, 2: 20}, {1: 11, 2: 22})
    with pytest.raises(KeyError, match="no 'CHAIRi' of 'c' in 'w'"):
        raw.values("w", "c", "CHAIRi")


def test_several_scores_of_a_policy_are_not_taken_for_one(tmp_path):
    with (tmp_path / "raw.csv").open("w") as file:
        file.write("seed,world,method,rate,strength,CHAIRi\n1,w,a,0.1,0.5,10\n1,w,a,0.1,1,11\n1,w,a,0.2,1,12\n")
    raw = Raw(tmp_path / "raw.csv")
    with pytest.raises(ValueError, match="Expected one 'CHAIRi' of 'a' in 'w' per seed"):
        raw.values("w", "a", "CHAIRi", 1.0)
    assert raw.at_rate(0.1).values("w", "a", "CHAIRi", 1.0) == {1: 11}


def test_every_method_is_compared_with_every_other(experiment, tmp_path):
    """CHAIRi of base and rdpo: 10 and 8, 20 and 19, 30 and 27, 15 and 13: -2 ± 1.3 one way, +2 ± 1.3 the other."""
    scores = {BASE: [(10, 90), (20, 90), (30, 90), (15, 90)], "rdpo": [(8, 90), (19, 90), (27, 90), (13, 90)]}
    write_methods(tmp_path / "raw.csv", scores)
    changed, _ = judged(experiment, tmp_path / "raw.csv")
    told = versus_table(changed, Raw(tmp_path / "raw.csv"), "balanced", "CHAIRi").splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in told]
    assert cells == [["", "**+2.0 ± 1.3**"], ["**-2.0 ± 1.3**", ""]]


def test_methods_with_scores_of_other_policies_are_not_compared(experiment, tmp_path):
    write_methods(tmp_path / "raw.csv", {BASE: [(10, 90), (20, 90)], "rdpo": [(8, 90)]})
    with pytest.raises(ValueError, match="for the same seeds"):
        judged(experiment, tmp_path / "raw.csv", Claim("fewer", "rdpo", BASE, "CHAIRi"))


@pytest.mark.parametrize(("steps", "last"), [(False, "+6.0 ± 0.0"), (True, "+5.0 ± 12.7")])
def test_an_ablation_is_compared_with_the_method_or_with_the_row_above(experiment, tmp_path, steps, last):
    """CHAIRi is 10 and 20, 10 and 22, 16 and 26: +1 ± 12.7, then +6 ± 0 to the first row, +5 ± 12.7 to the second."""
    rows = {"a=own": [(10, 90), (20, 90)], "a=b": [(10, 90), (22, 90)], "a=c": [(16, 90), (26, 90)]}
    write_methods(tmp_path / "raw.csv", rows)
    ablation = Ablation("a", {"own": {}, "b": {"share": 0.5}, "c": {"share": 0.2}}, step_by_step=steps)
    changed, _ = judged(replace(experiment, ablations={"a": ablation}), tmp_path / "raw.csv")
    told = ablation_table(changed, Raw(tmp_path / "raw.csv"), "balanced", "a").splitlines()[2:]
    cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in told]
    assert cells == [["own (as it is)", "15.0 ± 63.5"], ["b", "+1.0 ± 12.7"], ["c", last]]


def test_a_dial_is_drawn_as_paired_differences_to_the_base(experiment, tmp_path):
    """Policies differ by 20 points of CHAIRi, what the method changes by 2: the interval is about the change."""
    write_methods(tmp_path / "raw.csv", {BASE: [(10, 90), (30, 80)], "m": [(9, 89), (27, 79)]})
    changed, _ = judged(experiment, tmp_path / "raw.csv")
    sweep = sweep_of(changed, Raw(tmp_path / "raw.csv"), "balanced", {1.0: ("m", None)}, "weight", (BASE, 1.0))
    (point,) = sweep.points
    assert (point.score, point.skill, point.skill_half) == (-2, -1, 0)
    assert point.score_half == pytest.approx(stats.t.ppf(0.975, 1) * 1)
    assert sweep.first_skill == 0


# ---- settings


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_introduces_itself(recipe):
    experiment = read_experiment(recipe)
    assert experiment.ablated in experiment.methods
    assert {world for claim in experiment.claims for world in claim.reasons} <= set(experiment.world.names)
    header = recipe.read_text().partition("\nexperiment:")[0]
    assert "python -m benchmarks.evidence" in header
    assert len(header.splitlines()) >= 6


def test_the_experiment_has_what_was_promised():
    experiment = read_experiment(DIGITS)
    assert len(set(experiment.seeds)) >= 12
    assert len(set(experiment.development)) >= 3
    assert {
        "sft",
        "sft_long",
        "sft_own",
        "dpo",
        "mdpo",
        "rdpo_random",
        "rdpo",
        "rdpo_sft",
        "rdpo_own",
        "released",
    } <= experiment.methods.keys()
    against = {claim.against for claim in experiment.claims if (claim.method, claim.measure) == ("rdpo_own", "CHAIRi")}
    assert against == {"sft", "sft_long", "sft_own"}
    assert set(experiment.world.names) == {"skewed", "balanced"}
    weights = set(experiment.ablations["visual_weight"].values)
    assert {"0", "0.25", "0.5", "0.75", "1", "2"} <= weights


def test_an_ablation_changes_one_setting_and_keeps_the_others():
    method = Method("m", loss={"sft_weight": 5.0, "beta": 0.1}, pairs={"tau": 0.9})
    values = {
        "own": {},
        "0.5": {"loss": {"visual_weight": 0.5}},
        "k": {"pairs": {"top_k": 1}},
        "e": {"step_factor": 2.0},
    }
    made = Ablation("a", values).methods(method)
    assert made["own"] == method
    assert made["0.5"].loss == {"sft_weight": 5.0, "beta": 0.1, "visual_weight": 0.5}
    assert made["k"].pairs == {"tau": 0.9, "top_k": 1}
    assert (made["e"].step_factor, made["e"].loss) == (2.0, method.loss)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [(DIGITS, "visual_weight"), (DIGITS, "sft_weight"), (DIGITS, "beta"), (DIGITS, "tau"), (REDUCED, "visual_weight")],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_labels_of_ablations_are_what_is_trained(recipe, name):
    """The label of what stays as it is too, whose value no recipe says: it is a default, or the ablated method's."""
    experiment = read_experiment(recipe)
    ablation, method = experiment.ablations[name], experiment.methods[experiment.ablated]
    assert {} in ablation.values.values()
    for label, made in ablation.methods(method).items():
        used = DigitPairSettings(**made.pairs) if name == "tau" else RDPOLoss(**made.loss)
        assert getattr(used, name) == float(label)


def test_an_ablation_is_run_and_told_in_its_own_worlds(tmp_path):
    experiment = read_experiment(DIGITS)
    plan = Plan(Store(tmp_path, experiment))
    choices = {
        (world, name): Choice(1e-3, 1.0, 4, 9.0, 0.0) for world in experiment.world.names for name in experiment.methods
    }
    ran = {(run.name.partition("=")[0], job.world) for job in plan.ablation_jobs(choices) for run in job.runs}
    assert {world for name, world in ran if name == "made_better"} == {"skewed", "balanced"}
    assert {world for name, world in ran if name == "tau"} == {"skewed"}
    with pytest.raises(ValueError, match=r"Expected worlds of ablations among .*'elsewhere'"):
        replace(experiment, ablations={"a": Ablation("a", {"0": {}}, worlds=["elsewhere"])})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "sft", "loss": {"beta": 1.0}}, "nothing but `per`"),
        ({"share": 0.0}, "Expected `share`"),
        ({"step_factor": 0.0}, "Expected `step_factor`"),
    ],
)
def test_methods_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Method("m", **settings)


def test_results_of_other_settings_are_never_taken_for_these(experiment, tmp_path):
    store = Store(tmp_path, experiment)
    job, run = Job(1, "balanced"), Run("a", Method("title"), 1e-3, (1.0,), "test")
    other = [
        store.result(replace(job, seed=2), run),
        store.result(replace(job, world="skewed"), run),
        store.result(replace(job, pairs={"tau": 0.9}), run),
        store.result(job, replace(run, rate=2e-3)),
        store.result(job, replace(run, strengths=(0.5,))),
        store.result(job, replace(run, part="validation")),
        store.result(job, replace(run, method=Method("title", loss={"beta": 0.2}))),
        store.result(job, replace(run, method=Method("title", balanced=True))),
        Store(tmp_path, replace(experiment, training=Training(31, 16, 8))).result(job, run),
    ]
    assert len({store.result(job, run), *other}) == len(other) + 1
    assert store.result(job, replace(run, name="b", method=Method("renamed"))) == store.result(job, run)
    described = describe(REDUCED)
    store.claim(described)
    store.claim(describe(REDUCED, ["--experiment.training.steps=31"]))
    with pytest.raises(FileExistsError, match="another world"):
        store.claim(describe(REDUCED, ["--experiment.world.init_args.scenes=151"]))


class Asked(Benchmark):
    """One question, whose score is the seed that it belongs to."""

    max_new_tokens = 1

    def __init__(self, seed):
        self.seed = seed

    def questions(self):
        return [Question("is there a one ?", Image.new("RGB", (48, 48)))]

    def score(self, answers):
        return {"seed": self.seed}


class Taught(World):
    """The shipped policy for all seeds, each with a question of its own; ``prepare`` is as given."""

    names = ("balanced",)

    def __init__(self, prepare=None):
        self._prepare = prepare

    def prepare(self, seed, folder):
        return self._prepare(seed, folder)

    def backbone(self, folder):
        return DigitBackbone()

    def pairs(self, name, changes, backbone, seed, folder):
        raise AssertionError("nothing is trained")

    def margin_pairs(self, backbone, seed, part, folder):
        return None

    def benchmarks(self, seed, part):
        return [Asked(seed)]


def base_job(seed, strength=1.0):
    return Job(seed, "balanced", {}, (Run(BASE, None, 0.0, (strength,), "test"),))


def test_every_policy_is_asked_its_own_questions(experiment, tmp_path):
    """Whatever was encoded for the job before."""
    store = Store(tmp_path, replace(experiment, world=Taught()))
    bench, jobs = Bench(store), [base_job(1), base_job(2), base_job(1, 0.5)]
    for job in jobs:
        bench.do(job)
    results = [json.loads(store.result(job, *job.runs).read_text())["scores"] for job in jobs]
    assert results == [{"1": {"seed": 1}}, {"1": {"seed": 2}}, {"0.5": {"seed": 1}}]


def test_a_measured_model_is_gone_before_the_next_is_loaded(experiment, tmp_path, monkeypatch):
    made, make = [], evidence_jobs.make_module

    def make_and_watch(*arguments, **named):
        assert [reference() for reference in made] == [None] * len(made)
        module = make(*arguments, **named)
        made.append(weakref.ref(module.policy))
        return module

    monkeypatch.setattr(evidence_jobs, "make_module", make_and_watch)
    several = Job(1, "balanced", {}, base_job(1).runs + base_job(1, 0.5).runs)
    gc.disable()
    try:
        Bench(Store(tmp_path, replace(experiment, world=Taught()))).do(several)
    finally:
        gc.enable()
    assert len(made) == 2


def die(seed, folder):
    os._exit(3)


def test_a_worker_that_dies_says_where_its_log_is(experiment, tmp_path):
    store = Store(tmp_path, replace(experiment, world=Taught(die)))
    with pytest.raises(RuntimeError, match=r"A worker process died.*worker_\*\.log"):
        do_all(store, [1], [list], 1)
    assert list(tmp_path.glob("worker_*.log"))


def test_who_does_the_jobs_of_a_seed_does_them_one_after_the_other(experiment, tmp_path):
    """The base first: its questions are those of all methods."""
    plan = Plan(Store(tmp_path, replace(experiment, methods={"rdpo": Method("rDPO")}, claims=[])))
    choices = {("balanced", "rdpo"): Choice(1e-3, 1.0, 1, 9.0, 0.0)}
    jobs = plan.method_jobs(choices)
    ordered = by_seed(jobs)
    assert [(job.seed, job.runs[0].name) for job in ordered] == [(1, BASE), (1, "rdpo"), (2, BASE), (2, "rdpo")]
    assert sorted(map(repr, ordered)) == sorted(map(repr, jobs))


def test_a_policy_that_was_half_taught_is_taught_again(experiment, tmp_path):
    """A kill while a policy is saved leaves files; what is taught is not taught again."""
    taught = []

    def prepare(seed, folder):
        folder.mkdir()
        (folder / "weights").write_text("whole")
        taught.append(seed)
        return {"CHAIRi": 9.0}

    store = Store(tmp_path, replace(experiment, world=Taught(prepare), claims=[]))
    (store.policy(1) / "checkpoint").mkdir(parents=True)
    (store.policy(1) / "checkpoint" / "weights").write_text("hal")
    (store.policy(1) / "weights").write_text("hal")
    for _ in range(2):
        Bench(store).teach(1)
    assert taught == [1]
    assert (store.policy(1) / "weights").read_text() == "whole"
    assert json.loads(store.taught(1).read_text())["CHAIRi"] == 9.0


def test_a_folder_that_does_not_say_whose_it_is_and_one_in_use_are_refused(experiment, tmp_path):
    (tmp_path / "policy_1").mkdir()
    with pytest.raises(FileExistsError, match="does not say of which world"):
        Store(tmp_path, experiment).claim(describe(REDUCED))
    store = Store(tmp_path / "mine", experiment)
    store.claim(describe(REDUCED))
    refused = pytest.raises(FileExistsError, match="Another experiment works in")
    with store.locked(), refused, store.locked():
        pass
    with store.locked():
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"pictured": ["CHAIRj"]},
        {"claims": [Claim("text", "rdpo", "bass", "CHAIRi")]},
        {"claims": [Claim("text", "rdpo", BASE, "CHAIRj")]},
        {"choosing": Choosing([1e-3], [1.0], "CHAIRi", "skill", 0.5)},
        {"traded": ["rdpo", "bass"]},
    ],
)
def test_names_that_are_none_show_before_anything_is_trained(experiment, changes):
    with pytest.raises(ValueError, match=r"among .*, got \['(CHAIRj|bass|skill)'\]"):
        replace(experiment, **changes)
    with pytest.raises(ValueError, match="Expected at most four methods in `traded`"):
        replace(experiment, traded=["rdpo"] * 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"choosing": Choosing([1e-3], [1.0], "skills", "skills", 0.5)},
            r"`choosing\.score`.*false.*'skills' with True",
        ),
        (
            {"choosing": Choosing([1e-3], [1.0], "CHAIRi", "CHAIRi", 0.5)},
            r"`choosing\.kept`.*true.*'CHAIRi' with False",
        ),
        ({"methods": {BASE: Method("m"), "rdpo": Method("m")}}, r"other names in `methods` than 'base'.*Rename"),
        ({"dial": [0.5, 1.0]}, r"0\.0.*in `dial`, got \[0\.5, 1\.0\].*Add it"),
        (
            {"ablations": {"sft_weight": Ablation("a", {"none": {}, "0.1": {}, "nan": {}})}},
            r"numbers as labels of the ablation 'sft_weight'.*\['none', 'nan'\]",
        ),
        # A twentieth of 10 steps is half a step.
        (
            {"training": Training(10, 4, 4), "methods": {"rdpo": Method("m", step_factor=0.05)}},
            r"`step_factor`.*\['rdpo'",
        ),
        (
            {"training": Training(10, 4, 4), "ablations": {"e": Ablation("e", {"0.05": {"step_factor": 0.05}})}},
            r"`step_factor` of at least 1.*\['e=0\.05'\]",
        ),
        ({"ablated": "bass", "ablations": {}}, "`ablated`.*'bass'"),
        ({"scoring_batch_size": 0}, "`scoring_batch_size`"),
        (
            {"world": Prepared(DigitBackbone(), {"balanced": ""}, {"validation": [], "test": []})},
            r"got none for \['ablation'\].*`ablation_seeds: 0`",
        ),
    ],
)
def test_experiments_that_would_fail_or_mislead_are_refused(experiment, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(experiment, claims=[], traded=[], **changes)


def test_claims_on_what_is_neither_better_nor_worse_are_refused(experiment):
    vague = [*experiment.measures, Measure("words", "words", higher_is_better=None)]
    with pytest.raises(ValueError, match=r"`claims` on measures.*\['words'\]"):
        replace(experiment, measures=vague, claims=[Claim("text", "rdpo", BASE, "words")])


def test_an_experiment_without_ablations_needs_nothing_to_measure_them_on(experiment):
    world = Prepared(DigitBackbone(), {"balanced": ""}, {"validation": [], "test": []})
    assert replace(experiment, world=world, ablation_seeds=0, dial=[]).world is world


@pytest.mark.parametrize("trainer", [{"accelerator": "cpu"}, {"devices": 1}, {"accelerator": "gpu", "devices": "1"}])
def test_one_device_is_taken(trainer):
    assert Training(1, 4, 4, trainer).trainer is trainer


@pytest.mark.parametrize("trainer", [{"devices": 2}, {"devices": "auto"}, {}, {"devices": -1}, {"devices": [0, 1]}])
def test_more_than_one_device_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"`devices` of `trainer` to be 1, got .*(2|0, 1).*CUDA_VISIBLE_DEVICES"):
        Training(1, 4, 4, {"accelerator": "gpu", **trainer})


def test_only_the_published_recipe_writes_the_published_page():
    work = Path("runs/other")
    assert docs_of(RECIPE, [], work) == docs_of(RECIPE.resolve(), [], work) == Path("docs")
    assert docs_of(REDUCED, [], work) == work / "docs"
    assert docs_of(RECIPE, ["--experiment.seeds=[1]"], work) == work / "docs"


def test_what_two_names_share_is_counted_once_in_the_time(experiment, tmp_path):
    """Two ablations whose first value changes nothing, and one value that changes beta: three runs with the base."""
    ablations = {"a": Ablation("a", {"as it is": {}}), "b": Ablation("b", {"0.1": {}, "1": {"loss": {"beta": 1.0}}})}
    small = replace(experiment, seeds=[1], development=[], ablations=ablations, dial=[], claims=[])
    small = replace(small, methods={"rdpo": Method("rDPO")})
    plan = Plan(Store(tmp_path, small))
    choices = {("balanced", "rdpo"): Choice(1e-3, 1.0, 1, 9.0, 0.0)}
    for path in (plan.store.result(job, run) for job in plan.ablation_jobs(choices) for run in job.runs):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"seconds": {"training": 20.0, "measuring": 10.0}}))
    for path in (plan.store.result(job, run) for job in plan.method_jobs(choices) for run in job.runs):
        path.write_text(json.dumps({"seconds": {"measuring": 60.0}}))
    plan.store.taught(1).parent.mkdir()
    plan.store.taught(1).write_text(json.dumps({"seconds": 120.0}))
    found = {row["stage"]: (row["runs"], row["core minutes"], row["minutes"]) for row in plan.stages(choices, 2)}
    assert found["ablations"] == (3, 1.5, 0.75)
    assert found["teaching policies"] == (1, 2.0, 1.0)
    assert found["methods on fresh policies"] == (2, 2.0, 1.0)
    assert found["all"] == (6, 5.5, 2.75)


def test_pairs_that_were_built_otherwise_are_not_taken(pairs):
    backbone = DigitBackbone()
    with pytest.raises(ValueError, match=r"'tau': 0\.95"):
        build_pairs(DigitScenes(30), DigitPairSettings(tau=0.9), backbone, 0, pairs / "near")


# ---- worlds


def test_mistakes_of_the_prior_are_told_from_others():
    benchmark = DigitPrior(scenes=2)
    first, second = (set(objects(scene)) for scene in benchmark.scenes)
    expected = next(partner(digit) for digit in first if partner(digit) not in first)
    other = next(digit for digit in absent(benchmark.scenes[1]) if partner(digit) not in second)
    captions = [f"a red {expected} at top left .", f"a red {other} at top left , a red {min(second)} at top right ."]
    scores = benchmark.score(captions)
    assert (scores[PRIOR], scores[OTHER]) == (pytest.approx(100 / 3), pytest.approx(100 / 3))
    assert scores["CHAIRi"] == pytest.approx(200 / 3)


def test_adversarial_questions_ask_for_what_goes_with_what_is_there():
    plain, asked = DigitScenes(200, skew=0.0, seed=3), DigitScenes(200, skew=0.0, seed=3, adversarial=1.0)
    likely = 0
    for one, other in zip(plain.read(), asked.read(), strict=True):
        scene = asked.scene(other.key)
        if "question" not in other.key or other.chosen != "no .":
            assert one == other
            continue
        assert one.chosen == "no ."
        digit = other.prompt.split()[3]
        partners = {partner(word) for word in objects(scene)} - set(objects(scene))
        assert digit in (partners or set(absent(scene)))
        likely += digit in partners
    assert likely > 60
    with pytest.raises(ValueError, match="adversarial"):
        DigitScenes(adversarial=1.5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of the shipped policy: as usual, and from the rank that the usual ones never reach."""
    folder, backbone = tmp_path_factory.mktemp("pairs"), DigitBackbone()

    for name, settings in (("near", DigitPairSettings()), ("far", DigitPairSettings(first_rank=10))):
        build_pairs(DigitScenes(40, seed=5), settings, backbone, 5, folder / name)
    return folder


def test_negatives_are_another_image_and_nothing_else_changes(pairs):
    backbone = DigitBackbone()
    own = read_pairs(pairs / "near", backbone, "retrieved", 0)
    for negative in ("random", "crop"):
        made = read_pairs(pairs / "near", backbone, negative, 0)
        assert [sample.key for sample in made] == [sample.key for sample in own]
        changed = 0
        for sample, first in zip(made, own, strict=True):
            for view in ("chosen", "rejected"):
                assert torch.equal(getattr(sample, view).tokens["input_ids"], getattr(first, view).tokens["input_ids"])
            assert torch.equal(sample.image["pixel_values"], first.image["pixel_values"])
            assert not torch.equal(sample.retrieved["pixel_values"], sample.image["pixel_values"])
            changed += not torch.equal(sample.retrieved["pixel_values"], first.retrieved["pixel_values"])
        assert changed > 0.8 * len(own)
        for sample, first in zip(made, own, strict=True):
            same = torch.equal(sample.retrieved["pixel_values"], first.retrieved["pixel_values"])
            assert (sample.fingerprint == first.fingerprint) is same


def test_a_draw_of_pairs_is_another_for_every_seed_and_not_the_first(pairs):
    backbone = DigitBackbone()
    every = read_pairs(pairs / "near", backbone, "retrieved", 0)
    drawn = {seed: read_pairs(pairs / "near", backbone, "retrieved", seed, most=9) for seed in (0, 1, 2)}
    known = {sample.key: sample.fingerprint for sample in every}
    keys = {seed: [sample.key for sample in samples] for seed, samples in drawn.items()}
    assert [len(names) for names in keys.values()] == [9] * 3
    assert len({tuple(names) for names in keys.values()} | {tuple(known)[:9]}) == 4
    assert all(known[sample.key] == sample.fingerprint for samples in drawn.values() for sample in samples)
    again = read_pairs(pairs / "near", backbone, "crop", 1, most=9)
    assert [sample.key for sample in again] == keys[1]
    assert len(read_pairs(pairs / "near", backbone, "retrieved", 0, most=len(every) + 1)) == len(every)


def test_only_what_is_drawn_is_decoded(pairs, monkeypatch):
    decoded, decode = [], ShardDataset.decode
    monkeypatch.setattr(ShardDataset, "decode", lambda self, row: decoded.append(row) or decode(self, row))
    read_pairs(pairs / "near", DigitBackbone(), "retrieved", 0, most=9)
    assert len(decoded) == 9


@pytest.mark.parametrize(
    ("keep", "reads"), [(True, ["retrieved", "crop"]), (False, ["retrieved", "crop", "retrieved"])]
)
def test_one_kind_of_negatives_is_kept_at_a_time_where_memory_is_short(experiment, tmp_path, monkeypatch, keep, reads):
    read, world = [], Prepared(DigitBackbone(), {"balanced": "here"}, {"validation": [], "test": []}, most_pairs=5)
    monkeypatch.setattr(
        evidence_jobs,
        "read_pairs",
        lambda folder, backbone, negative, *more: read.append((negative, more)) or [negative],
    )
    short = replace(experiment, world=world, ablation_seeds=0, dial=[], keep_questions=keep)
    desk = evidence_jobs._Desk(Store(tmp_path, short), Job(7, "balanced"), {})
    found = [desk.samples(Method("m", negative=negative)) for negative in ("retrieved", "crop", "retrieved")]
    assert found == [["retrieved"], ["crop"], ["retrieved"]]
    assert read == [(negative, (7, False, 5)) for negative in reads]


def test_random_negatives_of_one_image_are_refused(tmp_path):
    """There is no other image to draw."""
    (sample,) = preference_samples(1)
    with ShardWriter(tmp_path / "one") as writer:
        for number in range(3):
            writer.write(replace(sample, key=f"question{number}"))
    with pytest.raises(ValueError, match=r"at least 2 images for `negative: random`, got 3 about one"):
        read_pairs(tmp_path / "one", DigitBackbone(), "random", 0)


def test_later_ranks_are_images_that_resemble_less(pairs):
    """By the very embeddings that were searched: no image of the first ten ranks is tried."""
    assert RankedRetriever(10, 5).identity != RankedRetriever(15, 0).identity
    backbone = DigitBackbone()
    model = backbone.load_model()
    likeness = {}
    for name in ("near", "far"):
        dataset = ShardDataset(str(pairs / name), backbone)
        samples = [dataset.decode(row) for row in range(len(dataset))]
        images = backbone.embed_images(model, [sample.image for sample in samples])
        others = backbone.embed_images(model, [sample.retrieved for sample in samples])
        likeness[name] = dict(zip([sample.key for sample in samples], (images * others).sum(1).tolist(), strict=True))
    both = likeness["near"].keys() & likeness["far"].keys()
    assert len(both) > 30
    assert np.mean([likeness["near"][key] > likeness["far"][key] for key in both]) > 0.95


def test_balanced_pairs_turn_as_many_answers_to_yes_as_to_no(pairs):
    backbone = DigitBackbone()
    folder = pairs / "near"
    stored = ShardDataset(str(folder), backbone)
    texts = {sample.key: (sample.chosen, sample.rejected) for sample in map(stored.decode, range(len(stored)))}

    def turns(samples):
        said = [tuple(text.split()[0] for text in texts[sample.key]) for sample in samples]
        return said.count(("no", "yes")), said.count(("yes", "no"))

    every, kept = (read_pairs(folder, backbone, "retrieved", 0, balanced) for balanced in (False, True))
    to_no, to_yes = turns(every)
    assert to_no != to_yes, "nothing would be left out"
    assert turns(kept) == (min(to_no, to_yes),) * 2
    assert len(every) - len(kept) == abs(to_no - to_yes)
    known = {sample.key: sample.fingerprint for sample in every}
    assert all(known[sample.key] == sample.fingerprint for sample in kept)


# ---- the released rule


def test_the_released_rule_reads_the_best_token_that_is_not_the_label(pairs, tmp_path):
    """Against logits of the model itself, view by view and token by token."""
    backbone = DigitBackbone()
    module = make_module(Method("r", rule="released"), backbone, Training(1, 4, 4), 1e-3, tmp_path)
    assert isinstance(module.backbone, ReleasedBackbone)
    module.configure_model()
    batch: PreferenceBatch = backbone.collate(read_pairs(pairs / "near", backbone, "retrieved", 0)[:4])
    policy, reference = module.score(batch)
    model = backbone.load_model()
    for view, images in (("chosen", batch.images), ("rejected", batch.images), ("visual", batch.retrieved)):
        rows = getattr(batch, view)
        with torch.no_grad():
            logits = model(**rows.tokens, pixel_values=images["pixel_values"]).logits.log_softmax(-1)
        for row in range(4):
            total = 0.0
            for place in rows.response_mask[row].nonzero()[:, 0].tolist():
                ranked = logits[row, place - 1].clone()
                label = rows.tokens["input_ids"][row, place]
                if view != "chosen":
                    ranked[label] = -torch.inf
                total += float(ranked[label] if view == "chosen" else ranked.max())
            assert float(getattr(policy, view)[row].detach()) == pytest.approx(total, abs=1e-3)
            assert float(getattr(reference, view)[row]) == pytest.approx(total, abs=1e-3)


def test_the_margin_of_the_truth_is_measured_alike_for_all_methods(pairs, tmp_path):
    """Untrained modules of any rule are one policy; the rules read other words or tokens of it in training."""
    backbone = DigitBackbone()
    samples = read_pairs(pairs / "near", backbone, "retrieved", 0)[:8]
    found = []
    for method in (Method("s", "sft"), Method("r", "released"), Method("m", loss={"visual_words": "masked"})):
        module = make_module(method, backbone, Training(1, 4, 4), 1e-3, tmp_path)
        module.configure_model()
        found.append(measure(module, [], samples)[MARGIN])
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


# ---- a model and pairs of one's own


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        for sample in preference_samples(4):
            writer.write(sample)
    return tmp_path / "shards"


def test_a_model_with_shards_and_benchmarks_of_its_own(tiny_llava, shards, tmp_path):
    """The COCO recipe's methods, measures, precision and page, on a tiny LLaVA with files in the official forms."""
    recipe = yaml.safe_load((ROOT / "recipes" / "evidence" / "coco.yaml").read_text())["experiment"]
    pope, coco = write_pope(tmp_path / "pope"), write_coco(tmp_path / "coco")
    tests = [
        {"class_path": "PopeBenchmark", "init_args": {"folder": str(pope), "images": str(pope / "images")}},
        {"class_path": "ChairBenchmark", "init_args": {"folder": str(coco), "images": str(coco / "images"), "size": 3}},
    ]
    world = recipe["world"]["init_args"]
    for one, wanted in zip(tests, world["tests"]["test"], strict=True):
        one["class_path"] = wanted["class_path"]
        one["init_args"] |= {"max_new_tokens": 4} if "Chair" in one["class_path"] else {}
    world["model"]["init_args"] |= {"path": str(tiny_llava), "revision": None}
    world |= {
        "most_pairs": 3,
        "shards": {"coco": str(shards)},
        "tests": {"validation": tests, "test": tests},
        "held_out": str(shards),
    }
    training = {"steps": 2, "batch_size": 2, "rank": 2}
    recipe["training"] |= {**training, "trainer": recipe["training"]["trainer"] | {"accelerator": "cpu"}}
    recipe |= {"seeds": [1, 2], "scoring_batch_size": 2}
    recipe["choosing"] |= {"rates": [1e-2], "most_lost": 100.0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"experiment": recipe}))
    store = Store(tmp_path / "work", read_experiment(path))
    store.claim(describe(path))
    run_all(Plan(store), 1)
    write_raw(Plan(store), tmp_path / "docs" / "evidence", 1)
    write_page(store.experiment, tmp_path / "docs", path)
    page = (tmp_path / "docs" / "evidence.md").read_text()
    for method in store.experiment.methods.values():
        assert f"| {method.title} " in page
    assert "rDPO hallucinates less than its base, coco world: CHAIRi" in page
    rows = list(csv.DictReader((tmp_path / "docs" / "evidence" / "methods.csv").open()))
    assert len(rows) == 2 * (1 + len(store.experiment.methods))
    assert len({row[MARGIN] for row in rows if row["seed"] == "1"}) > 3


@pytest.mark.parametrize("size", [1, 3, 64])
def test_pairs_are_scored_in_batches_of_the_wanted_size(pairs, tmp_path, monkeypatch, size):
    """Margins are the same for all, but for rounding."""
    backbone, rows, score = DigitBackbone(), [], evidence_training.score
    samples = read_pairs(pairs / "near", backbone, "retrieved", 0)[:7]
    module = make_module(Method("m"), backbone, Training(1, 4, 4), 1e-3, tmp_path)
    module.configure_model()
    expected = measure(module, [], samples, 7)[MARGIN]
    monkeypatch.setattr(
        evidence_training, "score", lambda *arguments: rows.append(len(arguments[2])) or score(*arguments)
    )
    assert measure(module, [], samples, size)[MARGIN] == pytest.approx(expected, rel=1e-4)
    assert rows == [min(size, 7 - start) for start in range(0, 7, size)]


def test_activations_are_recomputed_where_the_experiment_says_so(tiny_llava, tmp_path):
    for wanted in (False, True):
        backbone = AutoBackbone(str(tiny_llava))
        module = make_module(Method("m"), backbone, Training(1, 4, 4), 1e-3, tmp_path, gradient_checkpointing=wanted)
        assert module.policy.get_base_model().is_gradient_checkpointing is wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tests": {"test": []}}, r"'validation' and 'test' in `tests`, got \['test'\]. Add \['validation'\]"),
        ({"most_pairs": 0}, "`most_pairs` of at least 1"),
    ],
)
def test_a_prepared_world_that_lacks_something_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Prepared(**{"model": DigitBackbone(), "shards": {}, "tests": {"validation": [], "test": []}, **changes})


def test_the_model_on_coco_is_the_one_that_is_pinned():
    recipe = yaml.safe_load((ROOT / "recipes" / "evidence" / "coco.yaml").read_text())["experiment"]
    pinned = yaml.safe_load((ROOT / "configs" / "backbones" / "llava15_7b.yaml").read_text())
    model = recipe["world"]["init_args"]["model"]
    assert model["class_path"] == pinned["class_path"]
    assert {"path", "revision", "dtype", "max_length"} == model["init_args"].keys()
    assert model["init_args"].items() <= pinned["init_args"].items()
    training = recipe["training"]
    most = training["steps"] * max(method.get("step_factor", 1.0) for method in recipe["methods"].values())
    assert recipe["world"]["init_args"]["most_pairs"] == most * training["batch_size"]


def test_changes_without_shards_are_refused(tmp_path):
    tests = {"validation": [], "test": []}
    world = Prepared(DigitBackbone(), {"coco": "here"}, tests, {'coco/{"tau": 0.85}': "there"})
    assert world.pairs("coco", {}, world.model, 0, tmp_path) == Path("here")
    assert world.pairs("coco", {"tau": 0.85}, world.model, 0, tmp_path) == Path("there")
    with pytest.raises(KeyError, match=r"Expected shards for .*0\.9.* in `variants`"):
        world.pairs("coco", {"tau": 0.9}, world.model, 0, tmp_path)


# ---- all of it, in small


def run_experiment(folder, *changes):
    command = [sys.executable, "-m", "benchmarks.evidence", "--recipe", str(REDUCED), "--work", str(folder / "work")]
    command += ["--docs", str(folder / "docs"), *changes]
    subprocess.run(command, check=True, env=alone(), cwd=ROOT, capture_output=True)  # noqa: S603


def numbers(folder, name="methods"):
    with (folder / "docs" / "evidence" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    run_experiment(folder)
    return folder


@pytest.mark.timeout(900)
def test_directions_of_the_experiment_in_small(finished):
    """Two policies show no more: what rDPO is for, it does, and the released rule does not do what Eq. 1 does."""
    found = {(row["method"], int(row["seed"])): row for row in numbers(finished)}
    assert {method for method, _ in found} == {BASE, "sft", "rdpo", "released"}
    for seed in (1, 2):
        margin = {method: float(found[method, seed][MARGIN]) for method in (BASE, "sft", "rdpo")}
        assert margin["rdpo"] > margin["sft"]
        assert margin["rdpo"] > margin[BASE]
        skills = [float(row["skills"]) for (_, number), row in found.items() if number == seed]
        assert all(0 <= value <= 100 for value in skills)
        assert len(set(skills)) > 1


@pytest.mark.timeout(900)
def test_it_goes_on_where_it_was_and_comes_to_the_same(finished, tmp_path):
    """What is missing is made again, nothing else, and with the same numbers."""
    before = {path: path.stat().st_mtime_ns for path in (finished / "work" / "results").iterdir()}
    pages = {name: numbers(finished, name) for name in ("methods", "grid", "dial")}
    lost = sorted(before)[0]
    content = json.loads(lost.read_text())["scores"]
    lost.unlink()
    run_experiment(finished)
    after = {path: path.stat().st_mtime_ns for path in (finished / "work" / "results").iterdir()}
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == {lost}
    assert json.loads(lost.read_text())["scores"] == content
    assert {name: numbers(finished, name) for name in pages} == pages


def test_the_page_is_written_from_the_numbers_alone(finished, tmp_path):
    """Pictures are pictures, and what does not hold is said before anything else."""
    page = (finished / "docs" / "evidence.md").read_text()
    first = page.split("\n\n")[2]
    assert "What does not hold comes first" in first
    assert page.index("**Not shown:**") < page.index("**Shown:**") < page.index("## Results")
    for name in ("methods", "trades", "strength_balanced", "visual_weight_balanced"):
        assert (finished / "docs" / "images" / f"evidence_{name}.png").read_bytes().startswith(b"\x89PNG")
    (finished / "docs" / "evidence.md").unlink()
    write_page(read_experiment(REDUCED), finished / "docs", REDUCED)
    assert (finished / "docs" / "evidence.md").read_text().replace(str(ROOT) + "/", "") == page.replace(
        str(ROOT) + "/", ""
    )


def test_choices_are_made_on_development_policies_only(finished):
    assert {row["seed"] for row in numbers(finished, "grid")} == {"3"}
    assert {row["seed"] for row in numbers(finished)} == {"1", "2"}
    store = Store(finished / "work", read_experiment(REDUCED))
    choices = Plan(store).choices()
    assert all(choice.tried == 2 for choice in choices.values())
    chosen = {(row["method"], float(row["strength"])) for row in numbers(finished) if row["method"] != BASE}
    assert chosen == {(method, choice.strength) for (_, method), choice in choices.items()}
