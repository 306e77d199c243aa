"""Does rDPO reduce hallucination, and why: an experiment with fresh policies, fair choices and error bars.

    uv run python -m benchmarks.evidence             # everything, 3 to 4 hours on 2 cores; goes on if stopped
    uv run python -m benchmarks.evidence --report    # tables, pictures and page from the numbers that are there

For every seed a small vision-language model is taught from nothing, pairs are built from its own hallucinations, every
method is trained from it on the same pairs with the same steps, but for those whose names say otherwise, and measured
on unseen images. Hyper-parameters are chosen for every method by the same grid, on other policies and other images.
What is run says recipes/evidence/digits.yaml, whose page is docs/evidence.md; recipes/evidence/coco.yaml does the same
with a real model. Page and numbers of another recipe, or of changes to this one, go to the folder docs in --work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence_jobs import Job, Plan, Store, by_seed, do_all
from benchmarks.evidence_page import write_page
from benchmarks.evidence_report import write_raw
from benchmarks.evidence_settings import describe, read_experiment

RECIPE = Path("recipes/evidence/digits.yaml")
PUBLISHED = Path("docs")
"""Where the page of :data:`RECIPE` is."""


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing, then write numbers, pictures and page.

    Args:
        args: command-line arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="what to run (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="policies, pairs and results of runs")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument(
        "--docs",
        type=Path,
        help="where evidence.md, images/ and evidence/ are (default: docs for the default recipe as it is, the folder "
        "docs in --work for any other)",
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing: write the page from the CSV files in --docs"
    )
    options, changes = parser.parse_known_args(args)
    docs = options.docs or docs_of(options.recipe, changes, options.work)
    experiment = read_experiment(options.recipe, changes)
    if not options.report:
        store = Store(options.work, experiment)
        store.claim(describe(options.recipe, changes))
        with store.locked():
            run_all(Plan(store), options.workers)
        write_raw(Plan(store), docs / "evidence", options.workers)
    write_page(experiment, docs, options.recipe)


def docs_of(recipe: Path, changes: Sequence[str], work: Path) -> Path:
    """Where a page goes unless told otherwise: nothing but the published recipe writes the published page.

    Args:
        recipe: what is run.
        changes: to it, from the command line.
        work: folder of the runs.
    """
    is_published = recipe.resolve() == RECIPE.resolve() and not changes
    return PUBLISHED if is_published else work / "docs"


def run_all(plan: Plan, workers: int) -> None:
    """Run everything that is missing.

    Args:
        plan: of the experiment.
        workers: processes.
    """
    experiment = plan.experiment
    seeds = [*experiment.development, *experiment.seeds]
    do_all(plan.store, seeds, [lambda: by_seed(plan.grid_jobs()), lambda: _after_choosing(plan)], workers)


def _after_choosing(plan: Plan) -> list[Job]:
    choices = plan.choices()
    for (world, method), choice in choices.items():
        print(f"{world}: {method}: rate {choice.rate:g}, strength {choice.strength:g}, of {choice.tried} points tried")
    stages = (plan.method_jobs(choices), plan.ablation_jobs(choices), plan.dial_jobs(choices))
    return [job for jobs in stages for job in by_seed(jobs)]


if __name__ == "__main__":
    main()
