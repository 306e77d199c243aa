"""``realign-lightning export``: from a training checkpoint to files for plain transformers and peft."""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import pickle
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import instantiate_module
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from realign_lightning.backbones import Backbone
from realign_lightning.modules import RDPOModule
from realign_lightning.modules.hparams import component_spec
from realign_lightning.modules.shard_reader import ShardPlanner, ShardReader
from realign_lightning.modules.strategy import METADATA
from realign_lightning.safe_config import import_policy

log = logging.getLogger(__name__)

_SHARD_INDEX = ".metadata"
"""The file of a sharded checkpoint that torch writes last; it names the weights and where they lie."""

_WEIGHTS = "state_dict."
"""What sharded checkpoints write before the names of weights."""


def export_checkpoint(
    checkpoint: str | Path, output: str | Path, merge: bool = False, base: str | Path | None = None
) -> None:
    """Turn a training checkpoint into files that transformers and peft load without this package.

    Written are the PEFT adapter (trained projector included), or the whole model after full fine-tuning or with
    ``merge``; the processor's files with the chat template of the training; and a model card. One process on a CPU
    does, whatever made the checkpoint. An adapter alone is exported without reading the base model's weights.

    Args:
        checkpoint: file ``*.ckpt``, or folder of :class:`~realign_lightning.modules.FSDP2Strategy`.
        output: folder to write; new or empty.
        merge: add the adapter to the weights it adapts, and write the whole model. After training in 4 bit the base is
            loaded and written unquantised.
        base: folder or hub name of the base model, where it is no longer the one in the checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint or no base model.
        FileExistsError: if ``output`` holds files.
        ValueError: if ``checkpoint`` is none of RDPOModule, or incomplete, or does not fit the base model, or cannot be
            merged.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"Expected `output` to be a new or empty folder, got {output}: choose another one.")
    log.info("Reading %s", checkpoint)
    saved = _read(Path(checkpoint))
    settings = saved.settings if base is None else _with_base(saved.settings, str(base))
    module = _rebuild(settings, merge)
    try:
        _load(module, saved, with_base=merge)
    except (ValueError, OSError) as error:
        error.add_note("`--base` (argument `base`) names the base model, where it is not the one in the checkpoint.")
        raise
    if merge:
        _merge(module)
    # It was rebuilt as exporting needs it; the card tells of the training.
    module.hparams.update(settings)
    log.info("Writing %s", output)
    module.export(output, saved.steps)
    log.info("Wrote %s; its README.md shows how to load it", output)


def load_policy(checkpoint: str | Path, backbone: Backbone | None = None) -> RDPOModule:
    """The module whose policy a checkpoint holds, ready to answer: in eval mode, adapter not merged.

    Args:
        checkpoint: file ``*.ckpt``, or folder of :class:`~realign_lightning.modules.FSDP2Strategy`.
        backbone: the base model, in place of the one in the checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint or no base model.
        ValueError: if ``checkpoint`` is none of RDPOModule, or incomplete, or does not fit the base model.
    """
    saved = _read(Path(checkpoint))
    settings = dict(saved.settings)
    if backbone is not None:
        settings["backbone"] = component_spec(backbone, "backbone")
    module = _rebuild(settings, merge=False)
    _load(module, saved, with_base=True)
    return module.eval()


def checkpoint_backbone(checkpoint: str | Path) -> Backbone:
    """The base model that a checkpoint was trained from; its weights are not read.

    Args:
        checkpoint: as :func:`load_policy` takes it.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if ``checkpoint`` is none of RDPOModule, or incomplete.
    """
    return _rebuild(_read(Path(checkpoint)).settings, merge=False).backbone


def main(args: Sequence[str] | None = None) -> None:
    """Command line of :func:`export_checkpoint`.

    Args:
        args: command-line arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="realign-lightning export",
        description="Turn a training checkpoint into a PEFT adapter or a whole model for plain transformers and peft.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="file *.ckpt, or the folder that FSDP2Strategy writes"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write, must be new or empty")
    parser.add_argument("--merge", action="store_true", help="merge the adapter and write the whole model")
    parser.add_argument("--base", help="folder or hub name of the base model, if not as the checkpoint names it")
    export_checkpoint(**vars(parser.parse_args(args)))


# ---- reading


class _Saved(NamedTuple):
    """What a checkpoint holds: hyperparameters, trained weights by name, and everything but weights and optimizer."""

    settings: dict[str, Any]
    weights: dict[str, Tensor]
    rest: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.rest.get("global_step", 0))


def _read(path: Path) -> _Saved:
    if path.is_dir():
        return _read_sharded(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected `checkpoint` to be a file or folder that training wrote, got {path}, which does not exist."
        )
    content = _content(path)
    return _checked(path, content, content.get("state_dict", {}))


def _content(path: Path) -> dict[str, Any]:
    """A file's content, its tensors read when they are used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"Expected `checkpoint` to be written by training an RDPOModule, got {path}, which PyTorch cannot read "
            f"safely: {str(error).splitlines()[0]}"
        ) from error
    return content if isinstance(content, dict) else {}


def _read_sharded(folder: Path) -> _Saved:
    missing = [name for name in (METADATA, _SHARD_INDEX) if not (folder / name).is_file()]
    if not missing:
        reader = ShardReader(folder)
        metadata = reader.read_metadata()
        named = {part.relative_path for part in metadata.storage_data.values()} if metadata.storage_data else set()
        missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise ValueError(
            f"Expected `checkpoint` to be a file, or a folder that FSDP2Strategy wrote, got {folder}, where {missing} "
            "are missing: it is something else, or writing it was interrupted. Choose another checkpoint."
        )
    weights = {
        name.removeprefix(_WEIGHTS): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # That this is one process, which is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load({"state_dict": weights}, storage_reader=reader, planner=ShardPlanner(), no_dist=True)
    return _checked(folder, _content(folder / METADATA), weights)


def _checked(path: Path, content: Mapping[str, Any], weights: dict[str, Tensor]) -> _Saved:
    settings = content.get("hyper_parameters")
    if not isinstance(settings, dict) or not isinstance(settings.get("backbone"), dict) or not weights:
        raise ValueError(
            f"Expected `checkpoint` to be written by training an RDPOModule, got {path}, which holds no "
            "hyperparameters of one, or no weights."
        )
    rest = {name: value for name, value in content.items() if name not in ("state_dict", "optimizer_states")}
    return _Saved(settings, weights, rest)


def _with_base(settings: dict[str, Any], base: str) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    arguments = settings["backbone"].get("init_args", {})
    if "path" not in arguments:
        raise ValueError(
            f"`base` replaces `path` of the checkpoint's backbone, but {settings['backbone']['class_path']} has none: "
            "leave `base` out."
        )
    # A revision belongs to the name it was given with.
    arguments.update(path=base, **({"revision": None} if "revision" in arguments else {}))
    return settings


# ---- rebuilding


def _rebuild(settings: Mapping[str, Any], merge: bool) -> RDPOModule:
    """The module as it was trained, without models; for merging, with an unquantised backbone."""
    known = inspect.signature(RDPOModule.__init__).parameters.keys() - {"optimizer", "lr_scheduler"}
    arguments = copy.deepcopy({name: value for name, value in settings.items() if name in known})
    quantization = arguments["backbone"].get("init_args", {}).get("quantization")
    if merge and quantization:
        log.info("Trained in 4 bit (%s): merging into the unquantised base, since 4 bits lose the update", quantization)
        arguments["backbone"]["init_args"]["quantization"] = None
    try:
        with import_policy():
            return instantiate_module(RDPOModule, arguments)
    except argparse.ArgumentError as error:
        raise ValueError(
            f"Expected `checkpoint` to hold an RDPOModule's hyperparameters, but none can be made of them: {error}"
        ) from error


def _load(module: RDPOModule, saved: _Saved, with_base: bool) -> None:
    """Load the policy with the checkpoint's weights; those of the base only if asked for, or where it must be."""
    backbone, adapter = module.backbone, module.adapter
    empty = None if with_base else _empty_model(module)
    if empty is None:
        log.info("Loading the base model")
    model = backbone.load_model() if empty is None else empty
    if adapter is not None:
        model = adapter.apply(backbone, model, module._trained_modules(model))
    # Not `configure_model`, which makes the reference too: after full fine-tuning a second copy of the model.
    module._policy = module._freeze(model)
    module.on_load_checkpoint({**saved.rest, "state_dict": saved.weights})
    module.load_state_dict(saved.weights, assign=empty is not None)


def _empty_model(module: RDPOModule) -> nn.Module | None:
    """The base without weights, where an adapter can be exported without them."""
    adapter = module.adapter
    # Some options of LoRA start from the base's weights, change them, or keep copies of them.
    if adapter is None or adapter.options or adapter.target_modules is not None:
        return None
    try:
        return module.backbone.empty_model()
    except NotImplementedError:
        return None


# ---- merging


def _merge(module: RDPOModule) -> None:
    """Merge the policy's adapter for good; afterwards the module is one after full fine-tuning."""
    if module.adapter is None:
        log.info("There is no adapter to merge: the checkpoint is of full fine-tuning")
        return
    policy: Any = module.policy
    _check_mergeable(policy)
    log.info("Merging the adapter")
    for wrapper in policy.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            # Trained in float32; the merged model has one dtype, the base's.
            wrapper.modules_to_save.to(next(wrapper.original_module.parameters()).dtype)
    module._policy = policy.merge_and_unload(safe_merge=True)
    module.adapter = None


def _check_mergeable(policy: Any) -> None:
    base = policy.get_base_model()
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"Cannot merge into {base.name_or_path!r}, whose weights are stored quantised: the update would be lost. "
            "Leave `merge` out, or give the unquantised model as `base`."
        )
    parameters = list(base.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in parameters)
    tied = [name for name, value in parameters if name.endswith(".base_layer.weight") and uses[id(value)] > 1]
    if tied:
        raise ValueError(
            f"Cannot merge: the adapted weights {tied} are shared with other layers, which would change too. Leave "
            "`merge` out."
        )
