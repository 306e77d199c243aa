import itertools
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from realign_lightning.types import PreferenceSample

if TYPE_CHECKING:
    from tests.processes import Nursery

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores.
    torch.set_num_threads(1)
# What is known of checked shards stays with this run of the tests.
os.environ.setdefault("REALIGN_CACHE", tempfile.mkdtemp(prefix="realign-cache-"))
# Tokenizers' threads and forked data-loading workers do not mix.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_ports = itertools.count(os.getpid() % 100 * 100)


def free_port() -> str:
    """A port for processes to meet at, below those that the system hands to anybody else in the moment between."""
    while True:
        port = 20000 + next(_ports) % 10000
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return str(port)


def alone(**more: str) -> dict[str, str]:
    """The environment for a process that starts others: what this one has run must not choose their port."""
    more = {"MASTER_PORT": free_port(), **more}
    launched = ("MASTER_", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "PL_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **more}


@pytest.fixture(scope="session")
def warm_nursery() -> Iterator["Nursery"]:
    """Forks processes that need not import anything."""
    from tests.processes import nursery

    with nursery() as one:
        yield one


@pytest.fixture(scope="session")
def run_module(warm_nursery, tmp_path_factory) -> Callable[..., str]:
    """Runs a module of ours as a script, in as many processes as are to meet; gives what it said."""

    def run(module: str, *arguments: object, processes: int = 1, statuses: Sequence[int] = (), **more: Any) -> str:
        log = tmp_path_factory.mktemp("run") / "log.txt"
        life = warm_nursery.start(log, *arguments, program=module, processes=processes, **more)
        return life.expect(*(statuses or [0] * processes))

    return run


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import make_tiny_llava

    return make_tiny_llava(tmp_path_factory.mktemp("tiny") / "llava")


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def preference_samples(count: int = 4) -> list[PreferenceSample]:
    """Samples whose prompts and responses differ in length."""
    texts = [
        ("describe the image.", "a red bus stands beside two people.", "a green bus and a dog."),
        ("what is in the picture?", "a cat.", "three apples, a bottle of water and a laptop in the night."),
        ("is there a dog on the sofa?", "no.", "yes, there is a dog under the table."),
        ("what is seen from above?", "the traffic light and two apples.", "no people."),
    ]
    return [
        PreferenceSample(
            f"sample{i}",
            picture(2 * i, (40 + 3 * i, 32)),
            picture(2 * i + 1),
            *texts[i % len(texts)],
        )
        for i in range(count)
    ]
