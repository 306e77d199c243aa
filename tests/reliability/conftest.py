from pathlib import Path

import pytest

from realign_lightning.data import ShardWriter
from tests.conftest import preference_samples


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory) -> Path:
    """Seven samples in two shards."""
    folder = tmp_path_factory.mktemp("reliability") / "shards"
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for sample in preference_samples(7):
            writer.write(sample)
    return folder
