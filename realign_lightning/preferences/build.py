"""Build dual-preference data: mask, retrieve, induce, accept (Re-Align, section 3.1)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from PIL import Image
from torch import nn

from realign_lightning.backbones.base import Backbone
from realign_lightning.data.schema import check_picture, check_source
from realign_lightning.data.shards import ShardWriter, refuse_existing
from realign_lightning.preferences.accept import Similarity, WordOverlap, is_writable
from realign_lightning.preferences.induce import Inducer, InductionRequest
from realign_lightning.preferences.mask import MaskedResponse, Masker
from realign_lightning.preferences.retrieve import ImageIndex, Neighbour, embed_images
from realign_lightning.types import PreferenceSample, Prompt, SampleError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceSample:
    """A good answer to a prompt about an image, from which a pair is to be made.

    Args:
        key: name, unique among the samples.
        image_id: name of the image; samples may share one.
        prompt: text or chat messages.
        chosen: the good answer y_w.
    """

    key: str
    image_id: str
    prompt: Prompt
    chosen: str


@dataclass(frozen=True)
class BuildReport:
    """What became of the source samples.

    Args:
        pairs: samples that became pairs.
        nothing_to_mask: samples whose answer held nothing to mask.
        exhausted: samples none of whose retrieved images gave a different enough answer.
        unusable: samples that break the shard contract, each named in the log.
        mean_rank: mean rank of the retrieved image of a pair, from 0.
        mean_similarity: mean similarity of chosen and rejected response.
    """

    pairs: int
    nothing_to_mask: int
    exhausted: int
    mean_rank: float
    mean_similarity: float
    unusable: int = 0


@dataclass
class _Pending:
    source: SourceSample
    masked: MaskedResponse
    neighbours: list[Neighbour]


class PreferenceBuilder:
    """Makes dual-preference pairs from good answers.

    For every sample the retrieved images are tried in order of rank. The first whose completion has a similarity below
    ``tau`` to the chosen response gives the rejected response and the rejected image. (Algorithm 1 of the paper prints
    the comparison the other way round; its text, which is followed here, does not.) A retrieved image with the very
    pixels of the original is passed over.

    Args:
        masker: chooses what to mask.
        inducer: completes masked responses.
        similarity: compares completion and chosen response; None is
            :class:`~realign_lightning.preferences.WordOverlap`. The paper uses
            :class:`~realign_lightning.preferences.SentenceSimilarity`.
        tau: completions at least this similar are tried again on the next image.
        top_k: retrieved images per sample.
        batch_size: images per embedding batch.

    Raises:
        ValueError: for ``top_k`` below 1.
    """

    def __init__(
        self,
        masker: Masker,
        inducer: Inducer,
        similarity: Similarity | None = None,
        tau: float = 0.95,
        top_k: int = 10,
        batch_size: int = 64,
    ) -> None:
        if top_k < 1:
            raise ValueError(f"Expected `top_k` to be at least 1, got {top_k}.")
        self.masker = masker
        self.inducer = inducer
        self.similarity = WordOverlap() if similarity is None else similarity
        self.tau = tau
        self.top_k = top_k
        self.batch_size = batch_size

    def pairs(
        self,
        backbone: Backbone,
        model: nn.Module,
        samples: Sequence[SourceSample],
        images: Mapping[str, Image.Image],
    ) -> tuple[list[PreferenceSample], BuildReport]:
        """Make the pairs.

        Args:
            backbone: the policy's family.
            model: the policy; its vision tower retrieves, its language model completes.
            samples: good answers, each key once.
            images: every image by its id; all of them can be retrieved.

        Returns:
            The pairs in the order of ``samples``, and what became of the rest.

        Raises:
            ValueError: when keys repeat, an image is missing, or there are fewer than two images.
        """
        self._check(samples, images)
        given = len(samples)
        samples = [sample for sample in samples if _is_usable(backbone, sample, images[sample.image_id])]
        ids = [image_id for image_id in sorted(images) if _is_storable(image_id, images[image_id])]
        embeddings = embed_images(backbone, model, [images[image_id] for image_id in ids], self.batch_size)
        neighbours = dict(zip(ids, ImageIndex(ids, embeddings).neighbours(self.top_k), strict=True))
        pending = []
        for sample in samples:
            masked = self.masker.mask(sample.key, sample.chosen)
            if masked is not None:
                others = [other for other in neighbours[sample.image_id] if not _same(images, sample.image_id, other)]
                pending.append(_Pending(sample, masked, others))
        masked_samples = len(pending)
        accepted: dict[str, PreferenceSample] = {}
        for rank in range(self.top_k):
            pending = [item for item in pending if item.source.key not in accepted and rank < len(item.neighbours)]
            if pending:
                accepted |= self._try_rank(backbone, model, pending, images, rank)
        made = [accepted[sample.key] for sample in samples if sample.key in accepted]
        report = _report(made, len(samples) - masked_samples, masked_samples - len(made))
        return made, replace(report, unusable=given - len(samples))

    def build(
        self,
        backbone: Backbone,
        model: nn.Module,
        samples: Sequence[SourceSample],
        images: Mapping[str, Image.Image],
        folder: str | Path,
        built_with: Mapping[str, object] | None = None,
        overwrite: bool = False,
    ) -> BuildReport:
        """Make the pairs and write them as shards.

        Args:
            backbone: see :meth:`pairs`.
            model: see :meth:`pairs`.
            samples: see :meth:`pairs`.
            images: see :meth:`pairs`.
            folder: where the shards go.
            built_with: plain facts to store in the index beside the report.
            overwrite: replace shards that are already in the folder.

        Raises:
            FileExistsError: if the folder already holds shards and ``overwrite`` is False; before any work is done.
            ValueError: as :meth:`pairs`, and when no pair came out; the folder is left as it was.
        """
        refuse_existing(folder, overwrite)
        # A place that cannot be written to must show before hours of work, not after.
        Path(folder).mkdir(parents=True, exist_ok=True)
        made, report = self.pairs(backbone, model, samples, images)
        if not made:
            raise ValueError(f"No pair came out, nothing was written to {folder}: {report}. Try a higher `tau`.")
        facts = {**(built_with or {}), "tau": self.tau, "top_k": self.top_k, "report": asdict(report)}
        with ShardWriter(folder, built_with=facts, overwrite=overwrite) as writer:
            for pair in made:
                writer.write(pair)
        return report

    @staticmethod
    def _check(samples: Sequence[SourceSample], images: Mapping[str, Image.Image]) -> None:
        if len({sample.key for sample in samples}) != len(samples):
            raise ValueError("Expected every sample key once; some repeat.")
        missing = sorted({sample.image_id for sample in samples} - images.keys())
        if missing:
            raise ValueError(
                f"Expected an image for every sample; {len(missing)} are missing, the first is {missing[0]!r}."
            )
        if len(images) < 2:
            raise ValueError(f"Expected at least two images to retrieve from, got {len(images)}.")

    def _try_rank(
        self,
        backbone: Backbone,
        model: nn.Module,
        pending: Sequence[_Pending],
        images: Mapping[str, Image.Image],
        rank: int,
    ) -> dict[str, PreferenceSample]:
        """Pairs of those pending samples whose completion on the image of this rank is different enough."""
        requests = [
            InductionRequest(item.source.prompt, item.masked, images[item.neighbours[rank].image_id])
            for item in pending
        ]
        completions = self.inducer.complete(backbone, model, requests, description=f"induce, rank {rank}")
        similarities = self.similarity.compare([item.source.chosen for item in pending], completions)
        accepted = {}
        for item, completion, similarity in zip(pending, completions, similarities, strict=True):
            source, neighbour = item.source, item.neighbours[rank]
            differs = completion.strip() != source.chosen.strip() and similarity < self.tau
            if differs and is_writable(completion):
                accepted[source.key] = PreferenceSample(
                    key=source.key,
                    image=images[source.image_id],
                    retrieved=images[neighbour.image_id],
                    prompt=source.prompt,
                    chosen=source.chosen,
                    rejected=completion,
                    provenance={
                        "image_id": source.image_id,
                        "retrieved_id": neighbour.image_id,
                        "retrieval_rank": rank,
                        "retrieval_score": neighbour.score,
                        "response_similarity": similarity,
                        "masked": item.masked.render(self.inducer.mask_token),
                    },
                )
        return accepted


def _is_usable(backbone: Backbone, sample: SourceSample, image: Image.Image) -> bool:
    """Whether shards can hold the sample and the policy can read it."""
    try:
        check_source(sample.key, sample.prompt, sample.chosen, image)
        backbone.response_tokenizer(sample.prompt)([sample.chosen])
    except SampleError as error:
        log.warning("sample left out: %s (%s)", sample.key, error)
        return False
    return True


def _is_storable(image_id: str, image: Image.Image) -> bool:
    try:
        check_picture(image)
    except SampleError as error:
        log.warning("image left out of retrieval: %s (%s)", image_id, error)
        return False
    return True


def _same(images: Mapping[str, Image.Image], image_id: str, other: Neighbour) -> bool:
    ours, theirs = images[image_id], images[other.image_id]
    return ours.size == theirs.size and ours.tobytes() == theirs.tobytes()


def _report(made: Sequence[PreferenceSample], nothing_to_mask: int, exhausted: int) -> BuildReport:
    ranks = [pair.provenance["retrieval_rank"] for pair in made]
    similarities = [pair.provenance["response_similarity"] for pair in made]
    report = BuildReport(len(made), nothing_to_mask, exhausted, mean_rank=0.0, mean_similarity=0.0)
    return replace(report, mean_rank=fmean(ranks), mean_similarity=fmean(similarities)) if made else report
