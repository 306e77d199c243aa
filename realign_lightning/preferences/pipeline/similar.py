"""The stage in which similar images are found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

from tqdm import tqdm

from realign_lightning.engines.memo import Memo, content_key
from realign_lightning.preferences.pipeline.reading import Album
from realign_lightning.preferences.retrieve import (
    EmbeddingStore,
    ImageEncoder,
    Neighbour,
    Retriever,
    embed_missing,
)
from realign_lightning.ranks import gather, merge, rank_and_world_size

log = logging.getLogger(__name__)

_LOOKED_AT = 256
"""Images of which one must have a neighbour for a band to be calibrated."""

_GROUP = 4096
"""Images whose neighbours are found before they are noted."""


def embed_album(album: Album, encoder: ImageEncoder, store: EmbeddingStore) -> dict[str, str]:
    """Embed the images that can be retrieved; each rank its batches.

    Args:
        album: the images.
        encoder: embeds them.
        store: keeps the embeddings.

    Returns:
        What is wrong with images that have no embedding, by id. They are no longer to be retrieved.
    """
    rank, world_size = rank_and_world_size()
    contents = album.retrievable
    files = [album.files[name] for name in contents]
    found = embed_missing(store, encoder, files, contents, rank, world_size)
    problems = merge({problem.where: problem.reason for problem in found})
    album.pool -= problems.keys()
    store.refresh()
    return problems


def calibrated(
    retriever: Retriever, album: Album, encoder: ImageEncoder, store: EmbeddingStore, memo: Memo
) -> float | None:
    """The end of the band of similarities, from the images at hand (:meth:`Retriever.calibrate`).

    None where no image has a neighbour: there is nothing to tell copies from.

    Args:
        retriever: its other settings.
        album: the images.
        encoder: the store's.
        store: holds their embeddings.
        memo: keeps the band; its identity is those of encoder and retriever.
    """
    contents = album.retrievable
    some = list(contents)[:_LOOKED_AT]
    if not any(others for _, others in retriever.neighbours(store, contents, some)):
        log.warning("No image has a similar one: the band of similarities is not calibrated.")
        return None
    key = content_key(contents)
    known = gather(key in memo)
    # All ranks compute it, and so run the encoder equally often.
    if not all(known):
        files = [album.files[name] for name in contents]
        band = retriever.calibrate(store, contents, files, encoder)
        memo.add({key: [band.max_similarity, band.caught, band.lost]})
    # Last bits may differ from rank to rank.
    return float(gather(memo[key][0])[0])


def find_neighbours(
    queries: Sequence[str], album: Album, retriever: Retriever, store: EmbeddingStore, memo: Memo, shows: bool = True
) -> dict[str, list[Neighbour]]:
    """Neighbours of images.

    Args:
        queries: ids of the images of this rank's drafts.
        album: the images.
        retriever: finds them.
        store: holds their embeddings.
        memo: keeps neighbours; its identity is those of encoder, retriever and images.
        shows: whether there is a progress bar.

    Returns:
        Neighbours by ``image_id``, best first.
    """
    names = list(dict.fromkeys(queries))
    todo = [name for name in names if name not in memo]
    found = retriever.neighbours(store, album.retrievable, todo) if todo else iter(())
    with tqdm(total=len(todo), desc="retrieve", unit="image", delay=1, disable=not shows) as bar:
        while group := dict(islice(found, _GROUP)):
            memo.add({name: [[other.image_id, other.score] for other in others] for name, others in group.items()})
            bar.update(len(group))
    return {name: [Neighbour(other, score) for other, score in memo[name]] for name in names}


def prepare_index(retriever: Retriever, album: Album, store: EmbeddingStore) -> None:
    """Let one rank write the index of a large album, which the others then find.

    Args:
        retriever: searches.
        album: the images.
        store: holds their embeddings.
    """
    rank, world_size = rank_and_world_size()
    contents = album.retrievable
    if world_size > 1 and len(contents) > retriever.flat_limit:
        if rank == 0:
            list(retriever.neighbours(store, contents, []))
        gather(None)
