"""The work of benchmarks/evidence.py: what is to be done, by whom, and what was found.

A job is all that is trained from one policy on one set of pairs. It writes a file for every run that is finished, so
that an interrupted experiment goes on where it was, and loses a run at most.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.evidence_settings import BASE as BASE
from benchmarks.evidence_settings import Choosing, Experiment, Method, digest
from benchmarks.evidence_training import Exam, device_of, make_module, measure, read_pairs, train
from benchmarks.evidence_worlds import Part
from realign_lightning.backbones import AdapterStrength, Backbone
from realign_lightning.backbones.files import write_json
from realign_lightning.modules import RDPOModule
from realign_lightning.types import EncodedSample


@dataclass(frozen=True)
class Run:
    """One training, measured at one or several strengths.

    Args:
        name: of the method, or of the ablation's value, for tables.
        method: None for the policy as it was taught.
        rate: learning rate.
        strengths: of the adapter.
        part: what is measured.
    """

    name: str
    method: Method | None
    rate: float
    strengths: tuple[float, ...]
    part: Part


@dataclass(frozen=True)
class Job:
    """Runs that share policy and pairs.

    Args:
        seed: of the policy.
        world: name of the world of the pairs.
        pairs: what differs from the world's own pairs.
        runs: what to train.
    """

    seed: int
    world: str
    pairs: dict[str, Any] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()

    def singles(self) -> list[Job]:
        """A job for each of the runs."""
        return [replace(self, runs=(run,)) for run in self.runs]


class Store:
    """The results of an experiment: one small file each, named by all settings that they depend on.

    Not by code: give another folder after changing what is computed.

    Args:
        folder: of the experiment.
        experiment: whose.
    """

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self.folder = folder
        self.experiment = experiment

    def claim(self, described: Mapping[str, Any]) -> None:
        """Keep the folder for one world: policies and pairs of another must not be taken for this one's.

        Args:
            described: the experiment in plain values.

        Raises:
            FileExistsError: if the folder holds results of another world.
        """
        path, world = self.folder / "world.json", json.loads(json.dumps(described["world"]))
        if not path.is_file() and any(self.folder.glob("*/")):
            raise FileExistsError(f"{self.folder} holds folders and does not say of which world. Give another --work.")
        if path.is_file() and (other := json.loads(path.read_text(encoding="utf-8"))) != world:
            raise FileExistsError(
                f"{self.folder} holds results of another world: {other}, and this is {world}. Give another --work, or "
                "remove it."
            )
        _write(path, world)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else works in the folder while the block runs.

        Raises:
            FileExistsError: if somebody does.
        """
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FileExistsError(f"Another experiment works in {self.folder}: wait for it.") from error
            yield

    def policy(self, seed: int) -> Path:
        """Where a policy is."""
        return self.folder / f"policy_{seed}"

    def taught(self, seed: int) -> Path:
        """The file that says that a policy is there."""
        return self.folder / "taught" / f"{seed}.json"

    def pairs(self, seed: int, name: str, changes: Mapping[str, Any]) -> Path:
        """Where pairs are."""
        return self.folder / f"pairs_{seed}" / f"{name}_{digest(dict(changes))}"

    def result(self, job: Job, run: Run) -> Path:
        """The file of a run."""
        method = None if run.method is None else run.method.settings()
        parts = [method, run.rate, run.strengths, run.part, asdict(self.experiment.training)]
        # The policy as it was taught has seen no pairs.
        own = [] if method is None else [job.world, job.pairs]
        return self.folder / "results" / f"{job.seed}_{digest([*parts, *own])}.json"

    def missing(self, job: Job) -> Job:
        """What of a job is still to be done."""
        left = tuple(run for run in job.runs if not self.result(job, run).is_file())
        return replace(job, runs=left)


class Bench:
    """Does the work of one process, one job after another.

    Args:
        store: where results go.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.experiment = store.experiment
        self._exams: tuple[int, dict[Part, list[Exam]]] = -1, {}

    def teach(self, seed: int) -> None:
        """Make the policy of a seed, unless it is there.

        Args:
            seed: of the policy.
        """
        told, folder = self.store.taught(seed), self.store.policy(seed)
        if told.is_file():
            return
        if folder.exists():
            shutil.rmtree(folder)
        start = time.process_time()
        report = dict(self.experiment.world.prepare(seed, folder))
        _write(told, {**report, "seconds": time.process_time() - start})

    def do(self, job: Job) -> None:
        """Do what is missing of a job.

        Args:
            job: whose policy is there.
        """
        job = self.store.missing(job)
        if job.runs:
            desk = _Desk(self.store, job, self._exams_of(job.seed))
            for run in job.runs:
                self._run(desk, job, run)

    def _exams_of(self, seed: int) -> dict[Part, list[Exam]]:
        """What was encoded for an earlier job of the same seed; that of others is forgotten."""
        if self._exams[0] != seed:
            self._exams = seed, {}
        return self._exams[1]

    def _run(self, desk: _Desk, job: Job, run: Run) -> None:
        if self.store.result(job, run).is_file():
            # The same settings under another name, as the unchanged value of every ablation.
            return
        seconds: dict[str, float] = {}
        scores = self._measure(self._module(desk, job.seed, run, seconds), desk, run, seconds)
        _write(self.store.result(job, run), {"scores": scores, "seconds": seconds})
        _free_models()

    def _module(self, desk: _Desk, seed: int, run: Run, seconds: dict[str, float]) -> RDPOModule:
        """What is to be measured; notes the time that it took."""
        experiment, start = self.experiment, time.process_time()
        if run.method is None:
            module = make_module(Method(BASE, rule="sft"), desk.backbone, experiment.training, 0.0, desk.work)
            module.configure_model()
            return module.to(device_of(experiment.training))
        samples = desk.samples(run.method)
        seconds["pairs"] = time.process_time() - start
        module = train(
            run.method,
            desk.backbone,
            samples,
            experiment.training,
            run.rate,
            seed,
            desk.work,
            experiment.scoring_batch_size,
            experiment.gradient_checkpointing,
        )
        seconds["training"] = time.process_time() - start - seconds["pairs"]
        return module

    def _measure(
        self, module: RDPOModule, desk: _Desk, run: Run, seconds: dict[str, float]
    ) -> dict[str, dict[str, float]]:
        """Scores by strength; notes the time that they took."""
        start, scores = time.process_time(), {}
        margins, exams = desk.margins(run.part), desk.exams(run.part)
        strength = AdapterStrength(module.policy)
        for value in run.strengths:
            strength.set(value)
            scores[f"{value:g}"] = measure(module, exams, margins, self.experiment.scoring_batch_size)
        seconds["measuring"] = time.process_time() - start
        return scores


def _free_models() -> None:
    # Modules refer to each other in circles: without this the next model is loaded beside the last.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Desk:
    """What the runs of a job share, made when it is first asked for; exams with other jobs of the seed."""

    def __init__(self, store: Store, job: Job, exams: dict[Part, list[Exam]]) -> None:
        self._store, self._job = store, job
        self._samples: dict[tuple[str, bool], list[EncodedSample]] = {}
        self._margins: dict[Part, list[EncodedSample]] = {}
        self._exams = exams
        self.work = store.folder / f"work_{job.seed}"

    @cached_property
    def backbone(self) -> Backbone:
        return self._store.experiment.world.backbone(self._store.policy(self._job.seed))

    @cached_property
    def _folder(self) -> Path:
        job, world = self._job, self._store.experiment.world
        place = self._store.pairs(job.seed, job.world, job.pairs)
        return world.pairs(job.world, job.pairs, self.backbone, job.seed, place)

    def samples(self, method: Method) -> list[EncodedSample]:
        wanted = method.negative, method.balanced
        if wanted not in self._samples:
            experiment, seed = self._store.experiment, self._job.seed
            if not experiment.keep_questions:
                self._samples.clear()
            most = experiment.world.most_pairs
            found = read_pairs(self._folder, self.backbone, method.negative, seed, method.balanced, most)
            self._samples[wanted] = found
        return self._samples[wanted]

    def exams(self, part: Part) -> list[Exam]:
        if part not in self._exams:
            experiment = self._store.experiment
            asked = experiment.world.benchmarks(self._job.seed, part)
            size, keep = experiment.questions_at_once, experiment.keep_questions
            self._exams[part] = [Exam(one, self.backbone, size, keep) for one in asked]
        return self._exams[part]

    def margins(self, part: Part) -> list[EncodedSample]:
        if part not in self._margins:
            seed, world = self._job.seed, self._store.experiment.world
            folder = world.margin_pairs(self.backbone, seed, part, self._store.pairs(seed, "margins", {"part": part}))
            if folder is None:
                self._margins[part] = []
            else:
                # The same draw for all seeds, as with questions.
                self._margins[part] = read_pairs(folder, self.backbone, "retrieved", 0, most=world.most_pairs)
        return self._margins[part]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(content))


# ---- several processes

_bench: Bench | None = None


def _begin(store: Store) -> None:
    global _bench
    torch.set_num_threads(1)
    # Bars and warnings of every training: one bar is enough to look at.
    log = (store.folder / f"worker_{os.getpid()}.log").open("w")
    os.dup2(log.fileno(), sys.stderr.fileno())
    _bench = Bench(store)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A pool's processes do not notice when the one that made them is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call(name: str, argument: Any) -> None:
    assert _bench is not None  # noqa: S101
    getattr(_bench, name)(argument)


def do_all(store: Store, seeds: Sequence[int], stages: Sequence[Callable[[], list[Job]]], workers: int) -> None:
    """Do the jobs of all stages, each when its policy is there, with a progress bar over runs.

    Who has nothing else to do teaches policies that later stages need.

    Args:
        store: where results go; what is there is not done again.
        seeds: of all policies.
        stages: each says what its jobs are when those of the stages before are done.
        workers: processes.

    Raises:
        RuntimeError: if a worker process dies.
    """
    try:
        _do_all(store, seeds, stages, workers)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"A worker process died, most often for want of memory. What it said last is in the newest of "
            f"{store.folder}/worker_*.log. Start again with fewer --workers: finished runs are kept."
        ) from error


def _do_all(store: Store, seeds: Sequence[int], stages: Sequence[Callable[[], list[Job]]], workers: int) -> None:
    jobs: list[Job] = []
    waiting: list[Job] = []
    left = list(stages)
    teaching = [seed for seed in seeds if not store.taught(seed).is_file()]
    absent = set(teaching)
    running: dict[Future[None], int | None] = {}
    with _pool(store, workers) as submit, tqdm(desc="evidence", unit="run", smoothing=0.05) as bar:
        while left or waiting or teaching or running:
            while left and not any(store.missing(job).runs for job in jobs):
                jobs += left.pop(0)()
                waiting = [job for job in jobs if store.missing(job).runs]
            while len(running) < workers and (found := _next(waiting, teaching, absent)) is not None:
                name, argument = found
                running[submit(name, argument)] = argument if name == "teach" else None
            done, _ = wait(running, timeout=2.0, return_when=FIRST_COMPLETED)
            for future in done:
                taught = running.pop(future)
                future.result()
                if taught is not None:
                    absent.discard(taught)
            bar.total = sum(len(job.runs) for job in jobs) + len(seeds)
            bar.n = sum(len(job.runs) - len(store.missing(job).runs) for job in jobs) + len(seeds) - len(absent)
            bar.refresh()


def _next(waiting: list[Job], teaching: list[int], absent: set[int]) -> tuple[str, Any] | None:
    """A job whose policy is there, or a policy to teach; nothing if all that is left waits for one."""
    for place, job in enumerate(waiting):
        if job.seed not in absent:
            return "do", waiting.pop(place)
    return ("teach", teaching.pop(0)) if teaching else None


@contextmanager
def _pool(store: Store, workers: int) -> Iterator[Callable[[str, Any], Future[None]]]:
    if workers < 1:
        raise ValueError(f"Expected at least 1 worker, got {workers}.")
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (store,))
    kept = dict(os.environ)
    # What worker processes inherit.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Texts are tokenised one by one here, and waking threads for one takes longer than the text.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield lambda name, argument: pool.submit(_call, name, argument)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        os.environ.clear()
        os.environ.update(kept)


# ---- what is to be done


@dataclass(frozen=True)
class Choice:
    """Hyper-parameters of a method.

    Args:
        rate: learning rate.
        strength: of the adapter.
        tried: how many points of the grid there were.
        score: of the choice, on the mean over policies.
        lost: of what was to be kept.
    """

    rate: float
    strength: float
    tried: int
    score: float
    lost: float


class Plan:
    """What an experiment consists of, and what was found.

    Args:
        store: of the results.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.experiment = store.experiment

    def base_job(self, seed: int, part: Part) -> Job:
        """Measures the policy as it was taught."""
        return Job(seed, self.experiment.world.names[0], {}, (Run(BASE, None, 0.0, (1.0,), part),))

    def grid_jobs(self) -> list[Job]:
        """Every method with every learning rate, on the validation images of development policies."""
        jobs = [self.base_job(seed, "validation") for seed in self.experiment.development]
        for seed in self.experiment.development:
            for world in self.experiment.world.names:
                jobs += _by_pairs(seed, world, [run for name in self.experiment.methods for run in self._grid(name)])
        return jobs

    def _grid(self, name: str) -> list[Run]:
        choosing, method = self.experiment.choosing, self.experiment.methods[name]
        return [Run(name, method, rate, tuple(choosing.strengths), "validation") for rate in choosing.rates]

    def choices(self) -> dict[tuple[str, str], Choice]:
        """The hyper-parameters of every method, by world and method."""
        base = [self.scores(self.base_job(seed, "validation"))[0] for seed in self.experiment.development]
        return {
            (world, name): self._choose(world, name, base)
            for world in self.experiment.world.names
            for name in self.experiment.methods
        }

    def _choose(self, world: str, name: str, base: Sequence[Mapping[str, float]]) -> Choice:
        choosing = self.experiment.choosing
        found = []
        for run in self._grid(name):
            by_seed = [self._grid_scores(seed, world, run) for seed in self.experiment.development]
            for place, strength in enumerate(choosing.strengths):
                here = [scores[place] for scores in by_seed]
                score = fmean([scores[choosing.score] for scores in here])
                pairs = zip(base, here, strict=True)
                lost = fmean([first[choosing.kept] - scores[choosing.kept] for first, scores in pairs])
                found.append(Choice(run.rate, strength, 0, score, lost))
        return choose(found, choosing)

    def _grid_scores(self, seed: int, world: str, run: Run) -> list[dict[str, float]]:
        (job,) = _by_pairs(seed, world, [run])
        return self.scores(job)

    def method_jobs(self, choices: Mapping[tuple[str, str], Choice]) -> list[Job]:
        """Every method as chosen, on the test images of fresh policies."""
        jobs = [self.base_job(seed, "test") for seed in self.experiment.seeds]
        for seed in self.experiment.seeds:
            for world in self.experiment.world.names:
                jobs += _by_pairs(seed, world, [self.chosen(world, name, choices) for name in self.experiment.methods])
        return jobs

    def chosen(self, world: str, name: str, choices: Mapping[tuple[str, str], Choice]) -> Run:
        """The run of a method as chosen.

        Args:
            world: name.
            name: of the method.
            choices: of all.
        """
        choice = choices[world, name]
        return Run(name, self.experiment.methods[name], choice.rate, (choice.strength,), "test")

    def ablation_jobs(self, choices: Mapping[tuple[str, str], Choice]) -> list[Job]:
        """Every value of every ablation, with what was chosen for the method that they change."""
        seeds = self.experiment.seeds[: self.experiment.ablation_seeds]
        jobs = [self.base_job(seed, "ablation") for seed in seeds]
        for seed in seeds:
            for world in self.experiment.world.names:
                runs = [
                    run
                    for name in self.experiment.ablations
                    if world in self.experiment.worlds_of(name)
                    for run in self.ablation_runs(world, name, choices).values()
                ]
                jobs += _by_pairs(seed, world, runs)
        return jobs

    def ablation_runs(self, world: str, name: str, choices: Mapping[tuple[str, str], Choice]) -> dict[str, Run]:
        """The runs of an ablation by label.

        Args:
            world: name.
            name: of the ablation.
            choices: of all methods.
        """
        choice = choices[world, self.experiment.ablated]
        methods = self.experiment.ablations[name].methods(self.experiment.methods[self.experiment.ablated])
        return {
            label: Run(f"{name}={label}", method, choice.rate, (choice.strength,), "ablation")
            for label, method in methods.items()
        }

    def dial_jobs(self, choices: Mapping[tuple[str, str], Choice]) -> list[Job]:
        """The ablated method at all strengths of the dial.

        Args:
            choices: of all methods.
        """
        experiment = self.experiment
        jobs = []
        for seed in experiment.seeds[: experiment.ablation_seeds] if experiment.dial else []:
            for world in experiment.ablation_worlds:
                method, rate = experiment.methods[experiment.ablated], choices[world, experiment.ablated].rate
                jobs += _by_pairs(seed, world, [Run("dial", method, rate, tuple(experiment.dial), "ablation")])
        return jobs

    def scores(self, job: Job) -> list[dict[str, float]]:
        """The scores of a job's only run, by strength.

        Args:
            job: with one run.
        """
        (run,) = job.runs
        found = self._result(job)["scores"]
        return [found[f"{strength:g}"] for strength in run.strengths]

    def _result(self, job: Job) -> dict[str, Any]:
        (run,) = job.runs
        found: dict[str, Any] = json.loads(self.store.result(job, run).read_text(encoding="utf-8"))
        return found

    def stages(self, choices: Mapping[tuple[str, str], Choice], workers: int) -> list[dict[str, Any]]:
        """What every stage took of the processors' time, and that divided by a number of processes.

        Args:
            choices: of all methods.
            workers: processes.
        """
        seeds = [*self.experiment.development, *self.experiment.seeds]
        taught = [json.loads(self.store.taught(seed).read_text(encoding="utf-8"))["seconds"] for seed in seeds]
        stages = {"teaching policies": (len(seeds), sum(taught))}
        for title, jobs in (
            ("choosing hyper-parameters", self.grid_jobs()),
            ("methods on fresh policies", self.method_jobs(choices)),
            ("ablations", self.ablation_jobs(choices)),
            ("strength of the adapter", self.dial_jobs(choices)),
        ):
            # The same settings under two names were run once.
            alone = {self.store.result(one, *one.runs): one for job in jobs for one in job.singles()}
            seconds = [sum(self._result(one)["seconds"].values()) for one in alone.values()]
            stages[title] = (len(alone), sum(seconds))
        stages["all"] = (sum(runs for runs, _ in stages.values()), sum(seconds for _, seconds in stages.values()))
        return [
            {"stage": title, "runs": runs, "core minutes": seconds / 60, "minutes": seconds / 60 / workers}
            for title, (runs, seconds) in stages.items()
        ]


def choose(found: Sequence[Choice], choosing: Choosing) -> Choice:
    """The lowest score of those that keep enough; if none does, what keeps most.

    Args:
        found: at least one.
        choosing: the rule.
    """
    allowed = [choice for choice in found if choice.lost <= choosing.most_lost]
    best = min(allowed, key=lambda choice: choice.score, default=min(found, key=lambda choice: choice.lost))
    return replace(best, tried=len(found))


def by_seed(jobs: Sequence[Job]) -> list[Job]:
    """All jobs of a seed, then all of the next: who does them keeps what was encoded for one seed only.

    Args:
        jobs: in an order that stays within a seed; seeds come as they come first.
    """
    groups: dict[int, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.seed, []).append(job)
    return [job for group in groups.values() for job in group]


def _by_pairs(seed: int, world: str, runs: Sequence[Run]) -> list[Job]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_pairs_of(run), sort_keys=True), []).append(run)
    return [Job(seed, world, json.loads(pairs), tuple(group)) for pairs, group in groups.items()]


def _pairs_of(run: Run) -> dict[str, Any]:
    return {} if run.method is None else dict(run.method.pairs)
