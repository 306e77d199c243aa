"""The contract between a vision-language model family and the rest of the package.

Everything that depends on a model family stands behind :class:`Backbone`: how to load it, how to turn a sample into
model inputs and a response mask, how to collate, how to encode images and run the language model, which parts LoRA
takes. The rest of the package never names ``pixel_values`` or any other family-specific input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from realign_lightning.types import EncodedSample, PreferenceBatch, PreferenceSample, Prompt

PromptImages = Image.Image | Sequence[Image.Image]
"""The image that a prompt shows, or several in the order of the prompt's image parts."""

ImageFeatures = Any
"""Encoded images of a batch, opaque outside a backbone."""


if TYPE_CHECKING:
    from realign_lightning.backbones.adapters import LoRA
    from realign_lightning.backbones.packing import Packing

Part = Literal["vision_tower", "projector", "language_model", "head"]
"""A part of a vision-language model. ``projector`` is whatever turns the tower's features into the language model's
embeddings (merger, connector, aligner); a head that shares the embeddings' weights is no part of its own."""

PARTS: tuple[Part, ...] = get_args(Part)
"""All parts."""


class GeneratedRow(NamedTuple):
    """What a model answered to one row.

    Args:
        tokens: of the answer, the end-of-turn token last if it came.
        finished: whether it came.
    """

    tokens: list[int]
    finished: bool


class ImageTokenError(ValueError):
    """Image features and the image tokens that they stand for differ in number.

    Args:
        message: what was expected, what came, and what to do.
        rows: rows of the batch in which they differ; empty where only the sum over the batch is known.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule is in the mode that it was in.

    Args:
        model: any module.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Backbone(ABC):
    """A vision-language model family: its processor, its inputs and its parts.

    A backbone is light: it is made from plain arguments and reads processor files only when they are first needed,
    so that a data module, a model and every data-loading worker can hold one each.
    """

    # ---- text and images to model inputs; needs the processor, not the weights

    @abstractmethod
    def encode_sample(self, sample: PreferenceSample) -> EncodedSample:
        """Encode the three views of a sample; each image is preprocessed once.

        Raises:
            SampleError: if this sample cannot be encoded (no response token left, a reserved token in the text ...).
        """

    @abstractmethod
    def collate(self, samples: Sequence[EncodedSample]) -> PreferenceBatch:
        """Pad encoded samples on the right and join them into one batch, weights and fingerprints included."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[Prompt], images: Sequence[PromptImages]) -> dict[str, Tensor]:
        """Inputs for generation: one row per (prompt, image), padded on the left, ending where the answer begins.

        An item of ``images`` is the prompt's image, or the sequence of its images; an empty one, which all prompts of
        the batch must have then, asks without an image. The same object in several rows is encoded once.
        """

    @abstractmethod
    def response_tokenizer(self, prompt: Prompt) -> Callable[[Sequence[str]], list[list[int]]]:
        """A function from responses to their token ids as they follow ``prompt``, without the end-of-turn token."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated token ids, special tokens left out, outer white space stripped."""

    @property
    @abstractmethod
    def pad_token_id(self) -> int:
        """Token id that fills padding."""

    @property
    @abstractmethod
    def end_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a response."""

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Token ids that stand for no text: padding and ends, and in families that have them images and turns."""
        return (self.pad_token_id, *self.end_token_ids)

    def image_lengths(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Roughly how many tokens pictures take in a prompt, for grouping samples by length.

        Args:
            sizes: width and height of every picture in pixels.

        Returns:
            A number per picture; 0 for all of them in families where every picture takes equally many.
        """
        return [0] * len(sizes)

    def save_processor(self, folder: str | Path) -> None:  # noqa: B027
        """Write what plain transformers needs to encode inputs as this backbone does; nothing unless a family can.

        Args:
            folder: made if needed.
        """

    def fingerprint(self, hash_file: Callable[[Path], str]) -> dict[str, str]:
        """What a sample's log-probs under the pretrained model depend on, beside the sample, as texts by name.

        The weights themselves (not only where they lie), what they are loaded as, and all that shapes the inputs:
        processor, prompt template, limits. Not what only changes how the same numbers are computed, such as the
        implementation of attention. ``reference: cached`` uses log-probs again exactly where all of it is equal.

        Args:
            hash_file: SHA-256 of a file in hexadecimal; files that were hashed before are not read again.

        Raises:
            NotImplementedError: for families that cannot.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say by what its log-probs are told apart (Backbone.fingerprint), so that "
            "none can be cached: use another `reference` than 'cached'."
        )

    # ---- the model

    @abstractmethod
    def load_model(self) -> nn.Module:
        """Load the pretrained weights; returned in eval mode, every parameter as the files have it."""

    def empty_model(self) -> nn.Module:
        """The model on the meta device: every shape and layer type, no weights read.

        Raises:
            NotImplementedError: for families that cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot make its model without loading the weights.")

    def load_sharded(
        self,
        mesh: DeviceMesh,
        adapter: LoRA | None = None,
        trained_modules: Sequence[str] = (),
        compute_dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Load the weights sharded over the ranks of a mesh (FSDP2), no rank ever holding the whole model.

        Args:
            mesh: one-dimensional.
            adapter: put on before the model is sharded.
            trained_modules: what :meth:`LoRA.apply` trains beside the adapter.
            compute_dtype: what weights are cast to when they are gathered; None leaves them.

        Raises:
            NotImplementedError: for families that cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot load its model sharded: use another strategy.")

    @abstractmethod
    def encode_images(self, model: nn.Module, images: Mapping[str, Tensor]) -> ImageFeatures:
        """Vision tower and projector on a batch's image inputs, each image once.

        Raises:
            ImageTokenError: if they make another number of features than the processor wrote image tokens.
        """

    @abstractmethod
    def join_images(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Image inputs of two batches as one batch, those of ``first`` in front."""

    @abstractmethod
    def select_images(self, features: ImageFeatures, rows: Sequence[int]) -> ImageFeatures:
        """Features of the images ``rows``, in that order; an index may occur several times."""

    @abstractmethod
    def token_log_probs(
        self,
        model: nn.Module,
        tokens: Mapping[str, Tensor],
        features: ImageFeatures,
        positions: Tensor,
        labels: Tensor,
        packing: Packing | None = None,
    ) -> Tensor:
        """Log-probs of tokens under a model, (N,) float32; the vocabulary head sees no other position.

        Args:
            model: policy or reference.
            tokens: (B, L) rows, or one packed row with its ``position_ids``.
            features: of the images in the rows, in order.
            positions: (N,) places in the B x L positions from which the tokens are predicted.
            labels: (N,) the tokens.
            packing: what stands where in a packed row; None for rows of one sequence each.
        """

    def check_length(self, model: nn.Module, longest: int) -> None:  # noqa: B027 - most families have none to refuse
        """Refuse sequences with which the rows of a batch would change each other's log-probs.

        Args:
            model: policy or reference.
            longest: tokens of the longest prompt with a response.

        Raises:
            ValueError: if they would; the message says what to do.
        """

    def unshared_reason(self, model: nn.Module, longest: int) -> str | None:
        """Why responses cannot share their prompt's row under a model, or None if they can.

        Args:
            model: policy or reference.
            longest: tokens of the longest prompt with a response.
        """
        return f"{type(self).__name__} does not know how"

    def position_ids(self, model: nn.Module, tokens: Mapping[str, Tensor], images: Mapping[str, Tensor]) -> Tensor:
        """Positions of the tokens of padded rows as the model counts them, (B, L) or (axes, B, L).

        Args:
            model: policy or reference.
            tokens: (B, L) rows.
            images: image inputs of the rows.
        """
        return (tokens["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)

    def generate(self, model: nn.Module, inputs: Mapping[str, Tensor], **kwargs: Any) -> list[str]:
        """Answers to the rows of :meth:`encode_prompts`; ``kwargs`` go to :meth:`generate_tokens`."""
        rows = self.generate_tokens(model, inputs, **kwargs)
        return [self.decode(row.tokens) for row in rows]

    @abstractmethod
    def generate_tokens(self, model: nn.Module, inputs: Mapping[str, Tensor], **kwargs: Any) -> list[GeneratedRow]:
        """Tokens that answer the rows of :meth:`encode_prompts`; ``kwargs`` go to the model's ``generate``."""

    @abstractmethod
    def embed_images(self, model: nn.Module, images: Sequence[Image.Image]) -> Tensor:
        """Mean-pooled, L2-normalised vision-tower features of images, (N, D) float32 on the CPU."""

    @abstractmethod
    def parts(self, model: nn.Module) -> dict[str, Part | None]:
        """The part of every parameter by its name in ``model``; adapters belong to what they adapt.

        None for what takes no part in answering, such as the image generator of Janus.
        """

    @abstractmethod
    def projector_modules(self, model: nn.Module) -> list[str]:
        """Names of the modules that make up the projector, each with a forward of its own."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The language model's repeated blocks, which can be compiled one by one.

        Raises:
            NotImplementedError: for families that do not name them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not name its blocks: set `compile_backend: null`.")

    @abstractmethod
    def linear_pattern(self, model: nn.Module, parts: Sequence[Part] = ("language_model",)) -> str:
        """Regular expression that fully matches the names of the linear layers of some parts, never the head's."""

    def image_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Parameters that :meth:`encode_images` uses: vision tower and projector, adapters on them included."""
        parts = self.parts(model)
        return (value for name, value in model.named_parameters() if parts[name] in ("vision_tower", "projector"))
