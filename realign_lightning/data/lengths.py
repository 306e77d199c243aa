"""Batches that waste little padding: what samples roughly measure, and an order in which neighbours are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from realign_lightning.backbones.base import Backbone
from realign_lightning.data.schema import IMAGE_PARTS, JSON_PART, image_size, parse_record, split_member_name
from realign_lightning.types import Prompt, SampleError

BYTES_PER_TOKEN = 4
"""UTF-8 bytes that are taken for one token: about 4 letters of English, 2 of Cyrillic, 1.3 of Chinese."""

CHUNK_BATCHES = (8, 50)
"""Least and most global batches among which samples are sorted by length. More pad less, fewer mix the samples better,
so small data sets are cut into four chunks where these are no smaller than the least."""


class SampleSize(NamedTuple):
    """How large the parts of a stored sample are.

    Args:
        prompt: UTF-8 bytes of its texts.
        chosen: UTF-8 bytes.
        rejected: UTF-8 bytes.
        image: width and height in pixels.
        retrieved: width and height in pixels.
    """

    prompt: int
    chosen: int
    rejected: int
    image: tuple[int, int]
    retrieved: tuple[int, int]


def measure_sample(members: Mapping[str, bytes]) -> SampleSize:
    """Size of a sample, from its JSON and the headers of its images; no pixel is decoded.

    Args:
        members: contents by member name, as they stand in the tar.

    Raises:
        SampleError: if a member cannot be read.
    """
    parts = {split_member_name(name)[1].split(".")[0]: data for name, data in members.items()}
    record = parse_record(parts[JSON_PART])
    image, retrieved = (image_size(parts[name]) for name in IMAGE_PARTS)
    prompt, chosen, rejected = (
        len(text.encode("utf-8")) for text in (_text(record["prompt"]), record["chosen"], record["rejected"])
    )
    return SampleSize(prompt, chosen, rejected, image, retrieved)


def estimate_lengths(read: Callable[[int], Mapping[str, bytes]], count: int, backbone: Backbone) -> np.ndarray:
    """Roughly how many tokens the longest of a sample's three rows has, without encoding anything.

    Texts count a token per :data:`BYTES_PER_TOKEN` bytes, images what
    :meth:`~realign_lightning.backbones.Backbone.image_lengths` says of their size. Only the order of the lengths is
    used, so what all samples share (fixed numbers of image tokens, the chat template) may be left out. A progress bar
    shows when it takes longer than two seconds.

    Args:
        read: contents by member name of a stored sample, by its number.
        count: how many there are.
        backbone: what they will be encoded for.

    Returns:
        (count,) float64; 0 for a sample that cannot be read, which is named when its turn comes.
    """
    sizes: dict[int, SampleSize] = {}
    for index in tqdm(range(count), desc="measuring samples", unit="sample", delay=2, leave=False):
        try:
            sizes[index] = measure_sample(read(index))
        except SampleError:
            # Skipping it, with name and reason, is left to the reader: it does so for every kind of bad sample.
            continue
    distinct = sorted({image for size in sizes.values() for image in (size.image, size.retrieved)})
    image_tokens = dict(zip(distinct, backbone.image_lengths(distinct), strict=True))
    lengths = np.zeros(count)
    for index, size in sizes.items():
        prompt, chosen, rejected = (count / BYTES_PER_TOKEN for count in size[:3])
        image, retrieved = image_tokens[size.image], image_tokens[size.retrieved]
        lengths[index] = prompt + max(image + chosen, image + rejected, retrieved + chosen)
    return lengths


def group_by_length(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, world_size: int, random: np.random.Generator
) -> np.ndarray:
    """An epoch's order, changed such that batches hold samples of similar length.

    A global batch is ``batch_size * world_size`` samples, one batch of every rank. The order is cut into chunks of 8 to
    50 global batches (``CHUNK_BATCHES``), each chunk is sorted by length and cut into global batches, and these are
    shuffled. The one with the longest sample comes first, so that running out of memory shows at once (as in
    transformers' ``LengthGroupedSampler``). The one that is not full comes last; it is cut from a random place, but
    never holds the longest of its chunk unless it is the only one.

    Args:
        order: (N,) a permutation of the samples.
        lengths: (N,) length of every sample, by its number.
        batch_size: samples per batch and rank.
        world_size: number of ranks.
        random: shuffles the batches.

    Returns:
        The order in which the samples are dealt to the ranks in turn, filled up to a multiple of ``world_size`` by
        samples of its last batch. Of every full global batch a rank gets neighbours.

    Example:
        >>> lengths = np.array([9.0, 1.0, 8.0, 2.0])
        >>> group_by_length(np.arange(4), lengths, batch_size=2, world_size=1, random=np.random.default_rng(0)).tolist()
        [2, 0, 1, 3]
    """
    size = batch_size * world_size
    whole, rest = divmod(len(order), size)
    least, most = CHUNK_BATCHES
    chunk = size * min(most, max(least, whole // 4))
    # The last chunk takes what is left.
    starts = [0, *range(chunk, len(order) - chunk + 1, chunk)]
    chunks = [part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, starts[1:])]
    order = np.concatenate(chunks)
    cut = starts[-1] + size * int(random.integers(max(1, len(chunks[-1]) // size)))
    last, order = order[cut : cut + rest], np.delete(order, slice(cut, cut + rest))
    batches = random.permutation(order.reshape(whole, size))
    if whole:
        first = lengths[batches].max(axis=1).argmax()
        batches[[0, first]] = batches[[first, 0]]
    dealt = batches.reshape(whole, world_size, batch_size).transpose(0, 2, 1).flatten()
    return np.concatenate([dealt, np.resize(last, -(-rest // world_size) * world_size)])


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    contents = [message["content"] for message in prompt]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "".join(part.get("text", "") for content in parts for part in content)
