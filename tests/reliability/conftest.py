from collections.abc import Iterator
from pathlib import Path

import pytest

from realign_lightning.data import ShardWriter
from tests.conftest import preference_samples
from tests.reliability.lives import Nursery, nursery


@pytest.fixture(scope="session")
def warm_nursery() -> Iterator[Nursery]:
    """Forks training processes that need not import anything."""
    with nursery() as one:
        yield one


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory) -> Path:
    """Seven samples in two shards."""
    folder = tmp_path_factory.mktemp("reliability") / "shards"
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for sample in preference_samples(7):
            writer.write(sample)
    return folder
