"""``realign-lightning test``: a benchmark of a model, on any number of devices."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from realign_lightning.backbones.base import Backbone
from realign_lightning.backbones.files import file_sha256, hash_texts
from realign_lightning.engines.base import Engine
from realign_lightning.engines.policy import Policy, TrainedWeights
from realign_lightning.engines.worker import run_on_ranks, saying_what_is_kept
from realign_lightning.evaluation.base import MarkedBenchmark
from realign_lightning.evaluation.benchmarks import BENCHMARKS
from realign_lightning.evaluation.report import as_table
from realign_lightning.evaluation.run_folder import Evaluated
from realign_lightning.evaluation.running import WORK, evaluate, local_engine
from realign_lightning.export import checkpoint_backbone, load_policy
from realign_lightning.trust import check_weights

WITH_GAPS = 3
"""Exit status when there are scores, but some questions do not count in them."""


def main(args: Sequence[str]) -> None:
    """Command line of :func:`evaluate`: prints the scores.

    Args:
        args: a recipe with overrides.

    Raises:
        SystemExit: with status 3 if some questions do not count, 2 for wrong options.
        ValueError: for settings that do not go together, and as :func:`evaluate`.
        OSError: as :func:`evaluate`.
    """
    parser = _parser()
    parts = parser.instantiate(parser.parse_args(name_benchmark(args)))
    backbone, trained = model_of(parts.model.backbone, parts.adapter, parts.ckpt_path)
    if (parts.engine is None) == (backbone is None):
        raise ValueError(
            "Expected a model to ask: --model.backbone, --ckpt_path, or --engine, which has a model of its own and "
            "goes with none of the others."
        )

    def run(policy: Policy | None) -> Evaluated:
        return evaluate(parts.benchmark, _engine(parts, policy), parts.output, parts.overwrite)

    with saying_what_is_kept(Path(parts.output) / WORK):
        found, is_first = run_on_ranks(run, backbone, vars(parts.trainer), trained)
    if is_first:
        show(found, Path(parts.output))


def show(found: Evaluated, folder: Path) -> None:
    """Print the scores; leave with a status that tells if questions do not count.

    Args:
        found: scores and answers.
        folder: that they were written to.

    Raises:
        SystemExit: with status 3 if some questions do not count.
    """
    sys.stdout.write(f"{as_table(found)}\nEverything lies in {folder}\n")
    if found.left_out:
        sys.stderr.write(f"{found.left_out} questions do not count: answers.jsonl says why, under `error`.\n")
        raise SystemExit(WITH_GAPS)


def name_benchmark(args: Sequence[str]) -> list[str]:
    """Arguments with the short name after ``--benchmark`` replaced by the class that it stands for.

    Args:
        args: of a command.

    >>> name_benchmark(["--benchmark", "pope", "--output", "run"])[1]
    'realign_lightning.evaluation.PopeBenchmark'
    """
    named = list(args)
    for place, (option, value) in enumerate(itertools.pairwise(args)):
        if option == "--benchmark":
            named[place + 1] = _class_path(value)
    return [_named_by_equals(argument) for argument in named]


def _named_by_equals(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return f"{option}={_class_path(value)}" if option == "--benchmark" and equals else argument


def _class_path(name: str) -> str:
    if name in BENCHMARKS:
        return f"realign_lightning.evaluation.{BENCHMARKS[name].__name__}"
    if name.isidentifier() and name.islower():
        raise ValueError(f"Expected `--benchmark` to be one of {', '.join(BENCHMARKS)}, or a class, got {name!r}.")
    return name


def _engine(parts: Any, policy: Policy | None) -> Engine:
    if parts.engine is not None:
        given: Engine = parts.engine
        if hasattr(given, "max_new_tokens"):
            given.max_new_tokens = parts.benchmark.max_new_tokens
        return given
    assert policy is not None  # noqa: S101 - without an engine there is a backbone
    return local_engine(policy, parts.benchmark, parts.batch_size)


def model_of(
    backbone: Backbone | None, adapter: str | None, checkpoint: str | None
) -> tuple[Backbone | None, TrainedWeights | None]:
    """The backbone, and what was trained on top of it.

    Args:
        backbone: as given; None takes that of the checkpoint.
        adapter: folder of a PEFT adapter.
        checkpoint: of a training run.

    Raises:
        ValueError: for both, and for an adapter without backbone.
        FileNotFoundError: if one of them is not there.
    """
    if adapter and checkpoint:
        raise ValueError("Expected --adapter or --ckpt_path, got both: a checkpoint holds its adapter.")
    if checkpoint:
        if not Path(checkpoint).exists():
            raise FileNotFoundError(f"--ckpt_path {checkpoint}: no such checkpoint. Give a file or a folder of shards.")
        return _of_checkpoint(backbone, Path(checkpoint))
    if adapter:
        if backbone is None:
            raise ValueError("Expected --model.backbone beside --adapter: the model that it was trained on.")
        return backbone, _of_adapter(backbone, Path(adapter))
    return backbone, None


def _of_checkpoint(backbone: Backbone | None, path: Path) -> tuple[Backbone, TrainedWeights]:
    own = checkpoint_backbone(path) if backbone is None else backbone

    def load() -> nn.Module:
        return load_policy(path, own).policy

    return own, TrainedWeights(load, _hash_files(path))


def _of_adapter(backbone: Backbone, folder: Path) -> TrainedWeights:
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"Expected --adapter to be a folder with adapter_config.json, got {folder}. `realign-lightning export` "
            "makes one of a checkpoint; a merged model is given as the backbone."
        )

    def load() -> nn.Module:
        check_weights(folder, ("adapter_model.safetensors",))
        peft: Any = importlib.import_module("peft")
        model: nn.Module = peft.PeftModel.from_pretrained(backbone.load_model(), str(folder))
        return model.eval()

    return TrainedWeights(load, _hash_files(folder))


def _hash_files(path: Path) -> str:
    """One hash of a file, or of all weights and settings in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    weights = [file for file in files if file.suffix not in (".md", ".png", ".txt")]
    return hash_texts({str(file.relative_to(path)) if file != path else "": file_sha256(file) for file in weights})


def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(
        prog="realign-lightning test",
        description="Ask a model the questions of a benchmark and score the answers. Start with a recipe: "
        "`realign-lightning test --config recipes/eval/pope.yaml --model.backbone configs/backbones/llava15_7b.yaml`. "
        "What was answered is kept: after a kill the same command asks only the rest. Exit status: 0 all went well, 1 "
        "something stood in the way, 3 some questions have no answer or no verdict.",
    )
    parser.add_argument("--config", action="config", help="a recipe in recipes/eval")
    add_benchmark(parser)
    add_model(parser)
    return parser


def add_model(parser: LightningArgumentParser) -> None:
    """Options that say who answers, and where.

    Args:
        parser: to add them to.
    """
    parser.add_argument("--model.backbone", type=Backbone | None, enable_path=True, help="the model's family")
    parser.add_argument("--adapter", type=str | None, help="folder of a PEFT adapter that was trained on the backbone")
    parser.add_argument("--ckpt_path", type=str | None, help="checkpoint of a training run")
    parser.add_argument("--engine", type=Engine | None, help="who answers, if not a model on this machine")
    parser.add_argument("--batch_size", type=int, default=32, help="questions per call of the model's generate")
    parser.add_lightning_class_args(pl.Trainer, "trainer", required=False)


def add_benchmark(parser: LightningArgumentParser, default_output: str | None = None) -> None:
    """Options that all commands have which score a benchmark.

    Args:
        parser: to add them to.
        default_output: what stands for the output where none is given; None makes it required.
    """
    names = ", ".join(BENCHMARKS)
    parser.add_argument("--benchmark", type=MarkedBenchmark, required=True, help=f"one of {names}, or a class")
    told = "folder for answers.jsonl and metrics.json" + (f" (default: {default_output})" if default_output else "")
    parser.add_argument("--output", type=str | None if default_output else str, required=not default_output, help=told)
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the evaluation of another model there")
