"""``realign-lightning sweep-strength``: how much of an adapter to take."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from realign_lightning.backbones.files import write_json, write_text
from realign_lightning.engines.policy import Policy
from realign_lightning.engines.worker import run_on_ranks, saying_what_is_kept
from realign_lightning.evaluation.base import Benchmark
from realign_lightning.evaluation.command import add_benchmark, add_model, model_of, name_benchmark
from realign_lightning.evaluation.looks import check_matplotlib
from realign_lightning.evaluation.running import WORK
from realign_lightning.evaluation.strength.measuring import Measures, measure_strengths
from realign_lightning.evaluation.strength.picture import draw
from realign_lightning.evaluation.strength.sweep import Sweep, read_scales


def main(args: Sequence[str]) -> None:
    """Command line of :func:`~realign_lightning.evaluation.strength.measure_strengths`: prints and draws the sweep.

    Args:
        args: a recipe with overrides.

    Raises:
        SystemExit: with status 2 for wrong options.
        ValueError: for settings that do not go together, adapters without a strength, unknown scores.
        OSError: if a file is missing or the disk full.
    """
    parser = _parser()
    parts = parser.instantiate(parser.parse_args(name_benchmark(args)))
    if parts.picture:
        check_matplotlib("sweep", "--picture false")
    if parts.engine is not None:
        raise ValueError("Expected no `engine`: the strength of an adapter is set in a model on this machine.")
    backbone, trained = model_of(parts.model.backbone, parts.adapter, parts.ckpt_path)
    if backbone is None or trained is None:
        raise ValueError("Expected an adapter: --adapter with --model.backbone, or --ckpt_path.")
    output = Path(parts.output)
    measures = Measures(
        *(parts.benchmark, parts.score, parts.skills, parts.skill_score, parts.skill_files, parts.skill_title),
        skill_higher_is_better=parts.skill_higher_is_better,
    )
    scales = read_scales(parts.scales)

    def run(policy: Policy | None) -> Sweep:
        assert policy is not None  # noqa: S101 - there is a backbone
        return measure_strengths(
            *(policy, scales, measures, output),
            tolerance=parts.tolerance,
            batch_size=parts.batch_size,
            write_adapters=parts.write_adapters,
            overwrite=parts.overwrite,
        )

    with saying_what_is_kept(output / WORK):
        found, is_first = run_on_ranks(run, backbone, vars(parts.trainer), trained)
    if is_first:
        write_sweep(found, output, picture=parts.picture)
        sys.stdout.write(f"{found.as_table()}\nEverything lies in {output}\n")


def write_sweep(found: Sweep, folder: Path, picture: bool = True) -> None:
    """Write ``sweep.md``, ``sweep.csv``, ``sweep.json`` and ``sweep.png``.

    Args:
        found: the sweep.
        folder: where; made if needed.
        picture: whether to draw.

    Raises:
        ImportError: if matplotlib is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "sweep.md", f"{found.as_table()}\n")
    write_text(folder / "sweep.csv", found.as_csv())
    write_json(folder / "sweep.json", found.as_json())
    if picture:
        draw(found, folder / "sweep.png")


def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(
        prog="realign-lightning sweep-strength",
        description="Ask a benchmark at several strengths of a trained adapter, without training, and weigh what is "
        "gained against skills that the training never touched. Start with an evaluation's recipe: `realign-lightning "
        "sweep-strength --adapter ADAPTER --scales 0:1.5:0.1 --config recipes/eval/pope.yaml --model.backbone ...`. "
        "What was answered is kept: after a kill the same command asks only the rest.",
    )
    parser.add_argument("--config", action="config", help="a recipe in recipes/eval")
    add_benchmark(parser)
    add_model(parser)
    parser.add_argument("--scales", type=str, default="0:1.5:0.1", help="first:last:step, or a list with commas")
    parser.add_argument("--score", type=str | None, help="key of the benchmark's score; its first, unless given")
    parser.add_argument("--skills", type=Benchmark | None, help="asks for skills that the training never touched")
    parser.add_argument(
        "--skill_files",
        type=str | None,
        help="in place of `skills`: results of lmms-eval at every strength, as lmms/{strength}/*/*_results.json",
    )
    parser.add_argument("--skill_score", type=str | None, help="name of the skills' score; TASK/METRIC of lmms-eval")
    parser.add_argument("--skill_title", type=str | None, help="what to call it")
    parser.add_argument("--skill_higher_is_better", type=bool, default=True, help="which way it is good")
    parser.add_argument(
        "--tolerance", type=float, default=0.5, help="most of the base's skill that may be lost, in its own unit"
    )
    parser.add_argument("--write_adapters", type=bool, default=False, help="write the adapter at every strength, too")
    parser.add_argument("--picture", type=bool, default=True, help="draw sweep.png, which needs matplotlib")
    return parser
