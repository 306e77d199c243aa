"""The command line: ``realign-lightning fit --config recipes/digits.yaml``."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from realign_lightning.data import BadDataError

COMMANDS = {"teach-digits": ("realign_lightning.demos.teach", "teach the policy of the digit scenes from nothing")}
"""Commands beside the Trainer's own: name, module whose ``main(args)`` runs it, one line of help."""


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the log folder of a run, unless that is the current folder.

    Without a logger, and with loggers that have no folder per run, Lightning would write it over a configuration of the
    user's.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the configuration."""
        if Path(trainer.log_dir or ".").resolve() != Path.cwd():
            super().setup(trainer, pl_module, stage)


class RealignCLI(LightningCLI):
    """LightningCLI for RDPOModule and DualPreferenceDataModule; the backbone is given once."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's commands that RDPOModule has a step for."""
        offered = LightningCLI.subcommands()
        return {name: offered[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Hand the model's backbone to the data module."""
        parser.link_arguments("model.backbone", "data.backbone")

    def _parse_ckpt_path(self) -> None:
        """Say aloud which settings a resumed checkpoint overrides; Lightning takes them over without a word.

        See https://github.com/Lightning-AI/pytorch-lightning/pull/21455.
        """
        given = self._model_settings()
        super()._parse_ckpt_path()
        used = self._model_settings()
        changed = [name for name in sorted(given.keys() | used.keys()) if given.get(name) != used.get(name)]
        if changed:
            listed = "; ".join(f"model.{name}: {given.get(name)!r} becomes {used.get(name)!r}" for name in changed)
            warnings.warn(
                f"The checkpoint's settings replace what was given ({listed}). To train with other settings, start a "
                "new run instead of resuming one.",
                stacklevel=2,
            )

    def _model_settings(self) -> dict[str, Any]:
        command = self.config.get("subcommand")
        return {} if command is None else _flatten(self.config[command].model.as_dict())


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    items: dict[str, Any] = {}
    for name, inner in value.items():
        items |= _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return items


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: " not in record.getMessage()


def _configure_output() -> None:
    """Show our own messages, and keep silent about what no user can act on."""
    ours = logging.getLogger("realign_lightning")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        ours.addHandler(handler)
    # Optional CPU kernels that bitsandbytes looks for on import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Deprecations between peft and transformers, and between lightning and torch.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # Lightning's words for a run without validation data, and its advertisements.
    warnings.filterwarnings("ignore", message="Total length of .list. across ranks is zero.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def main() -> None:
    """What the script ``realign-lightning`` runs: :func:`run` on the command line.

    What this package refuses (values, files, data) ends in one message; ``REALIGN_TRACEBACK=1`` shows where it arose.
    Errors from anywhere else keep their traceback.
    """
    try:
        run()
    except (ValueError, OSError, ImportError, BadDataError) as error:
        if os.environ.get("REALIGN_TRACEBACK") or not _is_refusal(error):
            raise
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
        sys.exit(f"error: {message}\n(REALIGN_TRACEBACK=1 shows where this arose.)")


def _is_refusal(error: BaseException) -> bool:
    """Whether an error was raised by this package itself."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent)


def run(args: Sequence[str] | None = None) -> RealignCLI | None:
    """Run a command.

    Args:
        args: command line without the program's name; None takes ``sys.argv``.

    Returns:
        The finished LightningCLI (model, data module, trainer) of a Trainer command, None for the others.
    """
    _configure_output()
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments and arguments[0] in COMMANDS:
        command: Callable[[Sequence[str]], Any] = importlib.import_module(COMMANDS[arguments[0]][0]).main
        command(arguments[1:])
        return None
    from realign_lightning.data import DualPreferenceDataModule
    from realign_lightning.modules import RDPOModule

    others = "; ".join(f"{name} ({summary})" for name, (_, summary) in COMMANDS.items())
    return RealignCLI(
        RDPOModule,
        DualPreferenceDataModule,
        args=None if args is None else arguments,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        # A resumed run may keep its folder.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "realign-lightning",
            "description": "Retrieval-augmented DPO for vision-language models (Re-Align / rDPO). Start with a recipe: "
            f"`realign-lightning fit --config recipes/digits.yaml`. Further commands with their own --help: {others}.",
        },
    )
