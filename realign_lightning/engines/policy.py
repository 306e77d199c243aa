"""A model that answers, shared by all who ask it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from realign_lightning.backbones.base import Backbone
from realign_lightning.backbones.files import file_sha256
from realign_lightning.ranks import gather

_NOT_THE_MODEL = ("code", "transformers", "torchvision", "pillow", "bitsandbytes", "prompt")
"""Of a backbone's fingerprint, what changes the last bits of a log-prob, but is no other model; and what its template
writes today, which may be a date: a build of several days is one."""


class TrainedWeights(NamedTuple):
    """A model that was trained on top of a backbone's weights.

    Args:
        load: makes the whole model, in eval mode.
        identity: tells it from others, for example the hash of an adapter.
    """

    load: Callable[[], nn.Module]
    identity: str


class Policy:
    """A model family and its weights, which are loaded when a stage first needs them.

    Where the ranks of a run hold shards of one model, all of them must run it equally often: every rank calls
    :meth:`announce` before it runs the model, and :meth:`keep_up` when it has nothing left to do in a stage.

    Args:
        backbone: the family.
        model: its weights; None loads them when they are first needed.
        device: where weights that are loaded here go; None leaves them where they are loaded.
        is_sharded: whether ``model`` is sharded over the ranks.
        precision: what it is computed in where that is not what it was loaded as, for example ``bf16-mixed``.
        trained: what was trained on top of the backbone's weights; None where nothing was.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: nn.Module | None = None,
        device: torch.device | str | None = None,
        is_sharded: bool = False,
        precision: str = "32-true",
        trained: TrainedWeights | None = None,
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.is_sharded = is_sharded
        self.precision = precision
        self.trained = trained
        self.hash_file: Callable[[Path], str] = file_sha256
        """Identifies files of weights; a build remembers what it has hashed."""
        self._model = model

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """What answers and embeddings depend on: weights, processor, template, limits; not who computes with them.

        Raises:
            NotImplementedError: for a backbone without a fingerprint.
        """
        found = self.backbone.fingerprint(self.hash_file)
        model = {name: value for name, value in found.items() if name not in _NOT_THE_MODEL}
        if self.trained is not None:
            model["trained"] = self.trained.identity
        return model if self.precision == "32-true" else {**model, "precision": self.precision}

    @property
    def model(self) -> nn.Module:
        """The weights, loaded now if they were not before."""
        if self._model is None:
            model = self.backbone.load_model() if self.trained is None else self.trained.load()
            # A quantized model lies where it was made.
            is_quantized = getattr(model, "is_quantized", False)
            self._model = model if self.device is None or is_quantized else model.to(self.device)
        return self._model

    def announce(self) -> None:
        """Tell the other ranks that this one is about to run the model once; they run it, too."""
        if self.is_sharded:
            gather(True)

    def keep_up(self, run: Callable[[], object]) -> None:
        """Run the model along with ranks that still have work to do, until none has.

        Args:
            run: runs the model once, on anything.
        """
        while self.is_sharded and any(gather(False)):
            run()


def best_device(name: str | None = None) -> torch.device:
    """Where a model goes that is loaded by this package.

    Args:
        name: of a device; None is a GPU where there is one.
    """
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
