"""The command line: ``realign-lightning fit --config recipes/digits.yaml``."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from realign_lightning.checkpoints import check_committed, find_committed, newest_checkpoint
from realign_lightning.data import BadDataError
from realign_lightning.safe_config import reading_recipes
from realign_lightning.trust import allowed_by

if TYPE_CHECKING:
    from realign_lightning.estimate import Job

log = logging.getLogger(__name__)

COMMANDS = {
    "build": (
        "realign_lightning.preferences.command",
        "build dual-preference pairs from answers about images: mask, retrieve, induce, accept",
    ),
    "compare": (
        "realign_lightning.evaluation.comparison.command",
        "is one model better than another: intervals, McNemar's test, flipped answers",
    ),
    "convert": (
        "realign_lightning.data.convert",
        "turn pairs of any layout into shards, and shards into what other libraries read",
    ),
    "digit-benchmarks": ("realign_lightning.demos.benchmarks", "digit scenes in the official forms of POPE and CHAIR"),
    "estimate": ("realign_lightning.estimate", "memory, arithmetic and hours of a recipe, without its weights"),
    "export": ("realign_lightning.export", "turn a checkpoint into files for plain transformers and peft"),
    "index": ("realign_lightning.data.indexing", "a manifest for shards that other programs wrote"),
    "inspect": ("realign_lightning.inspection", "one HTML page to look at the pairs of shards"),
    "score": ("realign_lightning.evaluation.score", "score answers that were made elsewhere"),
    "sweep-strength": (
        "realign_lightning.evaluation.strength.command",
        "an adapter at several strengths: what is gained, what is lost elsewhere, which to take",
    ),
    "teach-digits": ("realign_lightning.demos.teach", "teach the policy of the digit scenes from nothing"),
    "test": ("realign_lightning.evaluation.command", "ask a model the questions of a benchmark and score its answers"),
}
"""Commands beside the Trainer's own: name, module whose ``main(args)`` runs it, one line of help.

``estimate`` also takes a function that reads recipes."""


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
        """Hand the model's backbone to the data module, and offer to resume with other settings."""
        parser.link_arguments("model.backbone", "data.backbone")
        parser.add_argument(
            "--allow_changed_settings",
            type=bool,
            default=False,
            help="With --ckpt_path: go on with its weights although the model settings given now are others.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without Lightning's warning about arguments that are not the process's own."""
        self.config = parser.parse_args(args)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Checkpoints are read with ``weights_only=True``, also from URLs, where Lightning would unpickle them.

        Raises:
            ValueError: if a recipe says otherwise.
        """
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("weights_only") is False:
            raise ValueError(
                "weights_only: false would run whatever code a checkpoint holds, and is refused: checkpoints of this "
                "package hold nothing but weights and plain values. Take it out."
            )
        return {**kwargs, "weights_only": True}

    def _parse_ckpt_path(self) -> None:
        """Refuse to resume with other settings than the checkpoint's, which Lightning would take over without a word.

        See https://github.com/Lightning-AI/pytorch-lightning/pull/21455.

        Raises:
            ValueError: if settings differ and ``--allow_changed_settings true`` was not given.
        """
        command = self.config.get("subcommand")
        path = command and self.config[command].get("ckpt_path")
        if not path or str(path) == "last":
            # Where the newest lies, the Trainer's parts will tell.
            return
        path = self.config[command].ckpt_path = _complete_path(path)
        _check_checkpoint_path(Path(path), self.config[command].trainer.strategy)
        hparams = _saved_hyperparameters(Path(path))
        if not hparams:
            warnings.warn(
                f"Settings are not compared with those of the checkpoint: --ckpt_path {path} is no path of one.",
                stacklevel=2,
            )
            return
        given = _flatten(self.config[command].model.as_dict())
        saved = self.parser.parse_object({command: {"model": hparams}}, self.config)
        used = _flatten(saved[command].model.as_dict())
        names = sorted(given.keys() - _SAME_NUMBERS | used.keys() - _SAME_NUMBERS)
        changed = [name for name in names if given.get(name) != used.get(name)]
        if self.config[command].allow_changed_settings:
            # Of a validation the optimizer is no part.
            changed = [name for name in changed if name.startswith(_RESTORED)] if command == "fit" else []
        if changed:
            listed = "; ".join(f"model.{name} was {used.get(name)!r}, {given.get(name)!r} is given" for name in changed)
            raise ValueError(
                f"{path} was made with other settings: {listed}. Give the recipe and options that made it; or start a "
                "new run without --ckpt_path; or, to go on with its weights and the settings given now (a folder that "
                "moved, another loss), add --allow_changed_settings true. What is trained, optimizer, rates and "
                "schedule always go on as they were."
            )

    def after_instantiate_classes(self) -> None:
        """Resolve ``--ckpt_path last``: the newest complete checkpoint of this run, or none if it is to begin.

        Raises:
            FileNotFoundError: if there is none for a command that needs one.
        """
        command = self.subcommand
        if command is None or str(self.config[command].get("ckpt_path")) != "last":
            return
        folders = _checkpoint_folders(self.trainer)
        found = newest_checkpoint(*folders)
        if found is None and command != "fit":
            raise FileNotFoundError(f"--ckpt_path last: no checkpoint in {', '.join(map(str, folders))}.")
        log.info("--ckpt_path last: %s", f"going on from {found}" if found else "no checkpoint yet, a new run begins")
        self.config[command].ckpt_path = self.config_init[command].ckpt_path = found and str(found)
        self._parse_ckpt_path()

    def after_fit(self) -> None:
        """Tell a scheduler that the run was preempted.

        Raises:
            SystemExit: with code 75, if it was.
        """
        from realign_lightning.callbacks import Preemption

        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Preemption) and callback.preempted:
                raise SystemExit(callback.exit_code(self.trainer))


def _checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Where this run's callbacks write checkpoints, and those of its earlier versions have."""
    folders = [
        Path(callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath
    ]
    folders.append(Path(trainer.default_root_dir, "checkpoints"))
    if trainer.loggers:
        logger = trainer.loggers[0]
        # The logger's folder holds one folder per version, and a run that goes on gets a new one.
        folders.append(Path(logger.save_dir or trainer.default_root_dir, str(logger.name)))
    return list(dict.fromkeys(folders))


def _complete_path(path: Any) -> str:
    """The path, or the hidden name of what was about to get it."""
    return str(path) if "://" in str(path) else str(find_committed(Path(path)))


_SAME_NUMBERS = {"reference", "reference_cache"}
"""Model settings that a resumed run may change without a word: wherever the reference comes from, it is the same."""

_RESTORED = ("optimizer", "lr_scheduler", "part_learning_rates", "trained_parts")
"""Model settings that a resumed run takes from the checkpoint's optimizer and weights, whatever is given."""


def _check_checkpoint_path(path: Path, strategy: Any) -> None:
    """Refuse a path that no checkpoint lies at, and a folder of shards without the strategy that reads it."""
    if str(path) in ("last", "best", "hpc") or "://" in str(path) or path.is_file():
        return
    if not path.is_dir():
        raise FileNotFoundError(f"--ckpt_path {path}: no such checkpoint. Give a file, a folder of shards, or `last`.")
    if not (path / "meta.pt").is_file():
        raise ValueError(
            f"--ckpt_path {path}: this folder is no checkpoint, or writing it was interrupted (no meta.pt)."
        )
    if "FSDP2Strategy" not in str(strategy):
        raise ValueError(
            f"--ckpt_path {path} is a folder of shards, which FSDP2Strategy reads, on any number of devices: add "
            "--trainer.strategy configs/strategies/fsdp2.yaml; or make files of it by `realign-lightning export`."
        )
    check_committed(path)
    from realign_lightning.modules.shard_reader import ShardReader

    # Refuses what would run code, before a model is loaded.
    ShardReader(path).read_metadata()


def _saved_hyperparameters(path: Path) -> dict[str, Any]:
    """What a checkpoint file, or a folder of shards, says about the module that it was made with."""
    from realign_lightning.modules.strategy import METADATA

    file = path / METADATA if path.is_dir() else path
    if not file.is_file():
        # "last", "best" and the like, and paths that do not exist: the Trainer looks for them.
        return {}
    try:
        content = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"--ckpt_path {path}: PyTorch cannot read this file as a checkpoint.") from error
    if not isinstance(content, dict) or ("state_dict" not in content and file == path):
        raise ValueError(f"--ckpt_path {path}: this file is no checkpoint of a run.")
    hparams = content.get("hyper_parameters", {})
    return {name: value for name, value in hparams.items() if name != "_instantiator"}


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
    # transformers: `max_pixels` is still the setting that Qwen's checkpoints ship; Janus' own generation settings.
    warnings.filterwarnings("ignore", message=".*min_pixels.*max_pixels.*", category=FutureWarning)
    # FSDP2 on families that return views; nobody changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor.*")
    # Lightning's words for a run without validation data, and its advertisements.
    warnings.filterwarnings("ignore", message="Total length of .list. across ranks is zero.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


class _RecipeReader(RealignCLI):
    """Reads a recipe as ``fit`` does, and makes the module of it, but no Trainer and no data."""

    def _set_seed(self) -> None:
        """Leave the random generators alone."""

    def instantiate_classes(self) -> None:
        """Make the module only: recipes are read where there is no accelerator and no data."""
        settings = self.config.fit.clone()
        for name in [name for name in vars(settings) if name != "model"]:
            del settings[name]
        parts = self._parser("fit").instantiate_classes(settings, instantiate_groups=False)
        self.model = self._model_class(**parts.model)

    def after_instantiate_classes(self) -> None:
        """Look for no checkpoint."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _read_job(args: Sequence[str]) -> Job:
    """What a recipe trains, and with which of the Trainer's settings."""
    from realign_lightning.data import DualPreferenceDataModule
    from realign_lightning.estimate import Job
    from realign_lightning.modules import RDPOModule

    reader = _RecipeReader(
        RDPOModule,
        DualPreferenceDataModule,
        args=["fit", *args],
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "realign-lightning"},
    )
    settings = reader.config.fit
    return Job.from_settings(reader.model, settings.data.batch_size, settings.trainer.as_dict())


def main() -> None:
    """What the script ``realign-lightning`` runs: :func:`run` on the command line.

    What this package refuses (values, files, data) ends in one message; ``REALIGN_TRACEBACK=1`` shows where it arose.
    Errors from anywhere else keep their traceback.
    """
    try:
        run()
    except (ValueError, OSError, ImportError, FloatingPointError, BadDataError) as error:
        refusal = _refusal_in(error)
        if os.environ.get("REALIGN_TRACEBACK") or refusal is None:
            raise
        message = "\n".join([str(refusal), *getattr(refusal, "__notes__", [])])
        sys.exit(f"error: {message}\n(REALIGN_TRACEBACK=1 shows where this arose.)")


def _refusal_in(error: BaseException | None) -> BaseException | None:
    """The error that this package itself raised, which others may have taken for a reason of theirs."""
    while error is not None:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(raised_in).is_relative_to(Path(__file__).parent):
            return error
        error = error.__cause__ or error.__context__
    return None


def run(args: Sequence[str] | None = None) -> RealignCLI | None:
    """Run a command.

    Args:
        args: command line without the program's name; None takes ``sys.argv``.

    Returns:
        The finished LightningCLI (model, data module, trainer) of a Trainer command, None for the others.
    """
    _configure_output()
    with allowed_by(list(sys.argv[1:] if args is None else args)) as arguments, reading_recipes(arguments):
        return _dispatch(arguments)


def _dispatch(arguments: list[str]) -> RealignCLI | None:
    if arguments and arguments[0] in COMMANDS:
        command: Callable[..., Any] = importlib.import_module(COMMANDS[arguments[0]][0]).main
        command(arguments[1:], *([_read_job] if arguments[0] == "estimate" else []))
        return None
    from realign_lightning.callbacks import Preemption
    from realign_lightning.data import DualPreferenceDataModule
    from realign_lightning.modules import RDPOModule

    others = "; ".join(f"{name} ({summary})" for name, (_, summary) in COMMANDS.items())
    return RealignCLI(
        RDPOModule,
        DualPreferenceDataModule,
        args=arguments,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        trainer_defaults={"callbacks": [Preemption()]},
        # A resumed run may keep its folder.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "realign-lightning",
            "description": "Retrieval-augmented DPO for vision-language models (Re-Align / rDPO). Start with a recipe: "
            f"`realign-lightning fit --config recipes/digits.yaml`. Further commands with their own --help: {others}. "
            "Every command takes --trust_remote_code true (run Python code that lies beside a checkpoint) and "
            "--allow_pickled_weights true (read weights that are not in safetensors); recipes cannot set them. For "
            "recipes from elsewhere: REALIGN_SAFE_CONFIG=1, see SECURITY.md.",
        },
    )
