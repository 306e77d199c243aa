"""Images in, neighbours out: on one process, on two, and after a kill."""

import io
import multiprocessing
import os
import signal
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from realign_lightning.data.sources.base import ImageFile
from realign_lightning.preferences.retrieval.encoders import ImageEncoder
from realign_lightning.preferences.retrieval.retriever import Retriever
from realign_lightning.preferences.retrieval.store import EmbeddingStore, content_hashes, embed_missing

COUNT = 60


class Projection(ImageEncoder):
    """A random matrix times pixels: as with any network, last bits depend on the batch."""

    batch_size = 8
    identity = {"encoder": "projection", "seed": 0}  # noqa: RUF012

    def __init__(self, kill_at=None):
        self.weight = torch.randn(16 * 16 * 3, 48, generator=torch.Generator().manual_seed(0))
        self.batches = []
        self.kill_at = kill_at

    def embed(self, images):
        if len(self.batches) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = torch.stack([torch.tensor(np.asarray(image.resize((16, 16)))).flatten() for image in images])
        self.batches.append([image.tobytes() for image in images])
        return F.normalize((pixels.float() / 255 - 0.5) @ self.weight, dim=1)


def smooth(seed, size=(64, 48)):
    """A picture of a few soft blots."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_images():
    """Some are there twice under two names, with the very same bytes."""
    pictures = [png(smooth(number)) for number in range(COUNT)]
    files = [ImageFile(f"image{number:03}", data=data) for number, data in enumerate(pictures)]
    copies = [ImageFile(f"again{number:03}", data=pictures[number]) for number in range(0, COUNT, 7)]
    return [*files[:30], *copies, *files[30:]]


def run(folder, rank=0, world_size=1, barrier=None, kill_at=None):
    """Embed and search this rank's share; returns the neighbours and what was embedded."""
    torch.set_num_threads(1)
    images, encoder = make_images(), Projection(kill_at)
    contents, problems = content_hashes(images)
    store = EmbeddingStore(Path(folder), encoder.identity, rank)
    problems += embed_missing(store, encoder, images, contents, rank, world_size)
    assert problems == []
    if barrier is not None:
        barrier.wait(300)
    queries = sorted(contents)[rank::world_size]
    return dict(Retriever(top_k=5).neighbours(store, contents, queries)), encoder.batches


def run_in_process(folder, rank, world_size, barrier, kill_at, results):
    found, batches = run(folder, rank, world_size, barrier, kill_at)
    results.put((rank, found, batches))


def in_processes(folder, world_size=1, kill_at=None):
    """Results of all ranks, in real processes, and their exit codes."""
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(world_size), spawn.Queue()
    started = [
        spawn.Process(target=run_in_process, args=(folder, rank, world_size, barrier, kill_at, results))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    found = [results.get(timeout=300) for _ in started] if kill_at is None else []
    for process in started:
        process.join(300)
    return found, [process.exitcode for process in started]


def stored(folder):
    """Vectors on disk by content."""
    store = EmbeddingStore(folder, Projection.identity)
    contents = sorted(set(content_hashes(make_images())[0].values()))
    return dict(zip(contents, store.vectors(store.rows(contents)).tolist(), strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return run(folder), stored(folder)


def test_two_processes_find_what_one_finds(alone, tmp_path):
    (expected, batches), vectors = alone
    found, codes = in_processes(tmp_path, world_size=2)
    assert codes == [0, 0]
    (_, first, some), (_, second, rest) = sorted(found, key=itemgetter(0))
    assert (len(first), len(second)) == (35, 34)
    assert first | second == expected
    assert stored(tmp_path) == vectors
    assert (some, rest) == (batches[::2], batches[1::2])


def test_a_kill_loses_the_batch_at_most_and_changes_nothing(alone, tmp_path):
    (expected, batches), vectors = alone
    _, codes = in_processes(tmp_path, kill_at=3)
    assert codes == [-signal.SIGKILL]
    found, again = run(tmp_path)
    assert again == batches[3:]
    assert found == expected
    assert stored(tmp_path) == vectors


def test_neighbours_are_those_of_a_full_sort(alone):
    (found, _), vectors = alone
    contents, _ = content_hashes(make_images())
    ids = sorted(contents)
    for own in ids:
        left = np.array(vectors[contents[own]])
        scores = {other: float(np.float32(left @ np.array(vectors[contents[other]]))) for other in ids}
        others = [other for other in ids if contents[other] != contents[own]]
        best = sorted(others, key=lambda other: (-scores[other], other))[:5]
        assert [(other.image_id, other.score) for other in found[own]] == [(other, scores[other]) for other in best]
    twins = [one for row in found.values() for one, other in pairwise(row) if one.score == other.score]
    assert twins, "names of one file tie"


def test_nothing_is_embedded_twice(tmp_path):
    first, batches = run(tmp_path)
    second, none = run(tmp_path)
    assert len(batches) == -(-COUNT // 8)
    assert none == []
    assert second == first
