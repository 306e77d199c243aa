"""What images are compared by: embeddings of the policy's own vision tower, or of any timm model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from realign_lightning.backbones.base import Backbone, eval_mode
from realign_lightning.engines.policy import Policy, best_device
from realign_lightning.trust import check_weights

_OF_TEXTS = ("chat_template", "max_length")
"""Of a policy's identity, what images do not depend on."""


class ImageEncoder(ABC):
    """Embeds images. Subclass it to bring your own."""

    batch_size: int = 64
    """Images that are embedded at a time."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """All that its embeddings depend on beside the image, in plain JSON values: model, weights, preprocessing.

        What was embedded under an equal identity is not embedded again.
        """

    @abstractmethod
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed images.

        Args:
            images: N pictures in RGB.

        Returns:
            (N, D) float32 on the CPU, L2-normalised.
        """

    def finish(self) -> None:  # noqa: B027 - most encoders have nothing to do
        """Called by every rank of a run when it has no more images of a stage to embed."""


class PolicyEncoder(ImageEncoder):
    """The policy's own vision tower: the mean of its last hidden states, as the paper's retrieval uses CLIP's.

    Args:
        backbone: the policy's family.
        model: its pretrained weights; None loads them when they are first needed.
        batch_size: images per forward pass.
        device: where a model that is loaded here goes; None is a GPU where there is one. A model that is given stays
            where it is.

    Raises:
        ValueError: for a ``batch_size`` below 1.
    """

    def __init__(
        self, backbone: Backbone, model: nn.Module | None = None, batch_size: int = 64, device: str | None = None
    ) -> None:
        self.batch_size = _positive(batch_size)
        self._policy = Policy(backbone, model, best_device(device) if model is None else None)

    @classmethod
    def sharing(cls, policy: Policy, batch_size: int = 16) -> PolicyEncoder:
        """An encoder with the very weights of a policy.

        Args:
            policy: shared with other stages.
            batch_size: images per forward pass; twice as many decoded images are in memory. One where ranks hold shards
                of the weights.
        """
        encoder = cls(policy.backbone, batch_size=batch_size)
        encoder._policy = policy
        return encoder

    @property
    def identity(self) -> Mapping[str, Any]:
        """The policy's weights and preprocessing; not what only texts depend on.

        Raises:
            NotImplementedError: for a backbone without a fingerprint.
        """
        found = {name: value for name, value in self._policy.identity.items() if name not in _OF_TEXTS}
        return {"encoder": "policy", **found}

    @property
    def model(self) -> nn.Module:
        """The policy, loaded now if it was not before."""
        return self._policy.model

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageEncoder.embed`."""
        if not self._policy.is_sharded:
            with eval_mode(self.model):
                return self._policy.backbone.embed_images(self.model, images)
        # One image is one forward pass in every family, so that ranks can count them.
        return torch.cat([self._embed_announced(image) for image in images])

    def finish(self) -> None:
        """Run the vision tower along with ranks that have images left."""
        self._policy.keep_up(lambda: self._embed_one(Image.new("RGB", (64, 64))))

    def _embed_announced(self, image: Image.Image) -> Tensor:
        self._policy.announce()
        return self._embed_one(image)

    def _embed_one(self, image: Image.Image) -> Tensor:
        with eval_mode(self.model):
            return self._policy.backbone.embed_images(self.model, [image])


class TimmEncoder(ImageEncoder):
    """Any model of timm with its own transform: the features before the classifier.

    See https://github.com/huggingface/pytorch-image-models.

    Args:
        model: its name in timm, for example ``vit_large_patch14_clip_224.openai``, the paper's CLIP ViT-L/14.
        pretrained: load the weights that belong to the name; they must be on this machine or downloadable.
        checkpoint_path: a file of weights to load instead, in safetensors unless pickled weights are allowed.
        batch_size: images per forward pass.
        device: where the model goes; None is a GPU where there is one.

    Raises:
        ValueError: for a ``batch_size`` below 1.
    """

    def __init__(
        self,
        model: str = "vit_large_patch14_clip_224.openai",
        pretrained: bool = True,
        checkpoint_path: str | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        self.model_name = model
        self.pretrained = pretrained
        self.checkpoint_path = checkpoint_path
        self.batch_size = _positive(batch_size)
        self.device = device

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """Name of the model, a hash of the weights that were loaded, and the transform.

        Raises:
            ImportError: if timm is not installed.
        """
        return {
            "encoder": "timm",
            "model": self.model_name,
            "weights": _weights_sha256(self._model),
            "transform": str(self._transform),
            "timm": version("timm"),
        }

    @cached_property
    def _model(self) -> nn.Module:
        # A file of weights takes the place of those of the name.
        pretrained = self.pretrained and self.checkpoint_path is None
        path = self.checkpoint_path or ""
        if path:
            check_weights(path)
        model = _timm().create_model(self.model_name, pretrained=pretrained, checkpoint_path=path)
        # Only now: with the classifier gone before, weights that do not fit would be passed over in silence.
        model.reset_classifier(0)
        module: nn.Module = model.eval().to(best_device(self.device))
        return module

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        data = _timm().data
        transform: Callable[[Image.Image], Tensor] = data.create_transform(
            **data.resolve_model_data_config(self._model), is_training=False
        )
        return transform

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Pooled features before the classifier, L2-normalised; see :meth:`ImageEncoder.embed`.

        Raises:
            ImportError: if timm is not installed.
        """
        pixels = torch.stack([self._transform(image) for image in images])
        features: Tensor = self._model(pixels.to(next(self._model.parameters()).device))
        return F.normalize(features.float(), dim=-1).cpu()


def _timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ImportError('Encoding images with timm needs: pip install "realign-lightning[build]"') from error
    module: ModuleType = timm
    return module


def _weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"Expected `batch_size` to be at least 1, got {batch_size}.")
    return batch_size
