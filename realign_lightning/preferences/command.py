"""``realign-lightning build``: dual-preference pairs from answers about images, on any number of devices."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser

from realign_lightning.backbones.base import Backbone
from realign_lightning.data.sources.base import Source
from realign_lightning.engines.policy import Policy
from realign_lightning.engines.worker import run_on_ranks, saying_what_is_kept
from realign_lightning.preferences.build import PreferenceBuilder
from realign_lightning.preferences.pipeline.plan import Plan, Prices, make_plan
from realign_lightning.preferences.pipeline.report import BuildReport
from realign_lightning.safe_config import reading_recipes

NOTHING_CAME_OUT = 1
"""Exit status when no pair came out, or something stood in the way."""

WITH_FAULTS = 3
"""Exit status when pairs were written, and something was wrong with some of the records."""


def main(args: Sequence[str]) -> None:
    """Command line of :class:`PreferenceBuilder`: prints the report, or the plan.

    Args:
        args: a recipe with overrides.

    Raises:
        SystemExit: with status 1 if no pair came out, 3 if something was wrong with some of the records (those are
            named in ``{output}.problems.jsonl``), 2 for wrong options.
        ValueError: for settings out of range, and as :meth:`PreferenceBuilder.build`.
        OSError: as :meth:`PreferenceBuilder.build`.
    """
    parser = _parser()
    config = parser.parse_args(list(args))
    settings, parts = _told(config), parser.instantiate(config)
    builder: PreferenceBuilder = parts.builder
    if config.dry_run:
        prices = Prices(config.price_per_million_read, config.price_per_million_written)

        def run(policy: Policy | None) -> Plan | BuildReport:
            return make_plan(builder, parts.source, policy, parts.pool, prices)

    else:

        def run(policy: Policy | None) -> Plan | BuildReport:
            places = (parts.output, policy, parts.pool, parts.work)
            return builder.build(parts.source, *places, parts.title, settings, parts.overwrite)

    with saying_what_is_kept(parts.work or f"{parts.output}.work"):
        result, is_first = run_on_ranks(run, parts.backbone, vars(parts.trainer))
    if is_first:
        sys.stdout.write(result.as_text())
        _exit(result)


def read_recipe(args: Sequence[str]) -> Any:
    """The parts of a recipe, made and not yet run.

    Args:
        args: a recipe with overrides.

    Returns:
        A namespace with ``source``, ``backbone``, ``pool``, ``builder`` and the other settings.
    """
    parser = _parser()
    with reading_recipes(args):
        return parser.instantiate(parser.parse_args(list(args)))


def _exit(result: Plan | BuildReport) -> None:
    if isinstance(result, Plan):
        return
    if not result.pairs:
        sys.stderr.write("error: no pair came out, nothing was written.\n")
        raise SystemExit(NOTHING_CAME_OUT)
    if result.faults:
        sys.stderr.write(f"{result.faults} records or images could not be used: {result.problems} names them.\n")
        raise SystemExit(WITH_FAULTS)


def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(
        prog="realign-lightning build",
        description="Build dual-preference pairs from answers about images: mask, retrieve, induce, accept. Start with "
        "a recipe: `realign-lightning build --config recipes/build/digits.yaml`. What was finished is kept: after a "
        "kill or a change the same command computes only what is new. Exit status: 0 all went well, 1 no pair came out "
        "or something stood in the way, 3 something was wrong with some of the records.",
    )
    parser.add_argument("--config", action="config", help="a recipe in recipes/build")
    parser.add_argument("--source", type=Source, required=True, enable_path=True, help="answers about images")
    parser.add_argument("--output", type=str, required=True, help="folder for the shards")
    parser.add_argument("--backbone", type=Backbone | None, enable_path=True, help="the policy")
    parser.add_argument("--pool", type=Source | None, enable_path=True, help="further images that can be retrieved")
    parser.add_argument("--work", type=str | None, help="folder of finished work (default: OUTPUT.work)")
    parser.add_argument("--title", type=str, default="Dual-preference pairs", help="heading of the dataset card")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace shards of whatever origin")
    parser.add_class_arguments(PreferenceBuilder, "builder")
    parser.add_lightning_class_args(pl.Trainer, "trainer", required=False)
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="print the plan (records, calls, tokens, hours, cost) from a sample of 20 records, and write nothing",
    )
    for name in ("read", "written"):
        text = f"of a million tokens {name} by the engine, in any currency; for the plan"
        parser.add_argument(f"--price_per_million_{name}", type=float, default=0.0, help=text)
    return parser


def _told(config: Any) -> dict[str, Any]:
    """What index and card tell of the recipe: what pairs depend on, not where things lie or what computes them."""
    plain = config.clone(with_meta=False).as_dict()
    return {name: _unplaced(plain[name]) for name in ("source", "backbone", "pool") if plain.get(name) is not None}


def _unplaced(value: Any) -> Any:
    """Settings that are published tell no folders of this machine."""
    if isinstance(value, dict):
        return {name: _unplaced(inner) for name, inner in value.items()}
    is_absolute = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_absolute else value
