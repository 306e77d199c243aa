"""The stage in which similar images are found."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from realign_lightning.preferences.memo import Memo, content_key
from realign_lightning.preferences.pipeline.reading import Album
from realign_lightning.preferences.retrieve import (
    EmbeddingStore,
    ImageEncoder,
    Neighbour,
    Retriever,
    embed_missing,
)
from realign_lightning.ranks import gather, merge, rank_and_world_size

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
    files = [album.files[name] for name in album.retrievable]
    found = embed_missing(store, encoder, files, album.retrievable, rank, world_size)
    problems = merge({problem.where: problem.reason for problem in found})
    album.pool -= problems.keys()
    store.refresh()
    return problems


def calibrated(retriever: Retriever, album: Album, encoder: ImageEncoder, store: EmbeddingStore, memo: Memo) -> float:
    """The end of the band of similarities, from the images at hand (:meth:`Retriever.calibrate`).

    Args:
        retriever: its other settings.
        album: the images.
        encoder: the store's.
        store: holds their embeddings.
        memo: keeps the band; its identity is those of encoder and retriever.
    """
    contents = album.retrievable
    key = content_key(contents)
    known = gather(key in memo)
    # All ranks compute it, and so run the encoder equally often.
    if not all(known):
        files = [album.files[name] for name in contents]
        band = retriever.calibrate(store, contents, files, encoder)
        memo.add({key: [band.max_similarity, band.caught, band.lost]})
    return float(memo[key][0])


def find_neighbours(
    queries: Sequence[str], album: Album, retriever: Retriever, store: EmbeddingStore, memo: Memo, shows: bool = True
) -> dict[str, list[Neighbour]]:
    """Neighbours of images.

    Args:
        queries: ids of the images of this rank's drafts.
        album: the images.
        retriever: finds them.
        store: holds their embeddings.
        memo: keeps neighbours; its identity is those of encoder and retriever.
        shows: whether there is a progress bar.

    Returns:
        Neighbours by ``image_id``, best first.
    """
    contents = album.retrievable
    pool = content_key(contents)
    keys = {name: content_key(pool, name) for name in dict.fromkeys(queries)}
    todo = [name for name, key in keys.items() if key not in memo]
    with tqdm(total=len(todo), desc="retrieve", unit="image", delay=1, disable=not shows) as bar:
        for start in range(0, len(todo), _GROUP):
            group = todo[start : start + _GROUP]
            found = retriever.neighbours(store, contents, group)
            memo.add({keys[name]: [[other.image_id, other.score] for other in others] for name, others in found})
            bar.update(len(group))
    return {name: [Neighbour(other, score) for other, score in memo[key]] for name, key in keys.items()}


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
