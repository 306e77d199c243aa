"""The step benchmark on tiny models: what it compares is the same computation, counted right."""

import contextlib
import io
import json
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import flop_registry

from benchmarks.measure import ResidentPeak
from benchmarks.modes import MODES
from benchmarks.report import BARS, PAIRS
from benchmarks.shapes import SHAPES, make_checkpoint
from benchmarks.step import Settings, in_fresh_process, main, memory_of
from benchmarks.sweep import SWEEP_MODES, SWEEPS, Sweep

TINY = SHAPES["tiny"]
# Tokens of the two pairs' rows (9 of them the image's), and their responses with what ends them.
CHOSEN, REJECTED = (61, 59), (57, 55)
RESPONSES = {"chosen": (12, 11), "rejected": (8, 7)}


def run(*arguments: str) -> str:
    """What the command prints; it leaves threads, warnings and logs as they were."""
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    output = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(output):
            assert main(["--threads", "1", "--no-memory", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
    return output.getvalue()


@pytest.fixture(scope="module")
def printed_and_found(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "tiny.json"
    printed = run("--shape", "tiny", "--repeats", "1", "--profile", "--peak-tflops", "1", "--json", str(path))
    return printed, json.loads(path.read_text())


@pytest.fixture
def found(printed_and_found):
    return printed_and_found[1]


def test_all_modes_are_there_and_compute_the_same(printed_and_found):
    printed, found = printed_and_found
    assert list(found["modes"]) == list(MODES)
    for name, mode in found["modes"].items():
        assert mode["loss_difference"] < 1e-4, name
        assert mode["gradient_relative"] < 1e-3, name
        assert mode["median"] > 0, name
        assert mode["mfu"] == pytest.approx(sum(mode["flops"].values()) / mode["median"] / 1e12), name
        assert sum(mode["profile"].values()) == pytest.approx(1), name
        assert f"\n| {name} " in printed
    # The adapters do something: a policy that is its reference has losses of ln 2 for each preference.
    assert abs(found["modes"]["trl"]["loss"] - 0.693147) > 1e-3
    assert abs(found["modes"]["rdpo"]["loss"] - 2 * 0.693147) > 1e-3


def test_every_collator_makes_the_same_rows(found):
    tokens = found["tokens"]
    assert tokens["chosen rows"] == tokens["visual rows"] == "61 (12 response), 59 (11 response)"
    assert tokens["rejected rows"] == "57 (8 response), 55 (7 response)"
    assert tokens["TRL's rows"] == "the same tokens and response masks"


def test_what_goes_through_tower_and_language_model(found):
    """Two pairs: images and positions of policy and reference together."""
    shared = sum(CHOSEN) + sum(RESPONSES["rejected"])
    expected = {
        "rdpo": (4, 2 * (shared + sum(CHOSEN))),
        "rdpo_cached": (4, shared + sum(CHOSEN)),
        "rdpo_no_sharing": (4, 2 * 6 * max(CHOSEN)),
        "branches": (12, 2 * 2 * (2 * max(CHOSEN) + max(REJECTED))),
        "padded_rows": (12, 2 * 6 * max(CHOSEN)),
        "dpo": (2, 2 * shared),
        "dpo_cached": (2, shared),
        "trl": (8, 2 * 4 * max(CHOSEN)),
        "trl_fused": (8, 2 * 4 * max(CHOSEN)),
    }
    assert {name: (mode["images"], mode["positions"]) for name, mode in found["modes"].items()} == expected


def test_operations_of_the_head(found):
    """Worked by hand: two operations a position and weight, for each pass through the head or back."""
    once = 2 * TINY.hidden * TINY.vocabulary
    text = sum(map(sum, RESPONSES.values()))
    all_views = text + sum(RESPONSES["chosen"])
    expected = {
        # Policy, reference, and back.
        "rdpo": 3 * all_views,
        "rdpo_cached": 2 * all_views,
        "padded_rows": 3 * all_views,
        "branches": 3 * 2 * (2 * max(CHOSEN) + max(REJECTED)),
        "dpo": 3 * text,
        # TRL's head computes its tiles once more for the way back.
        "trl": 4 * 4 * (max(CHOSEN) - 1),
        "trl_fused": 4 * text,
    }
    assert {name: found["modes"][name]["flops"]["head"] / once for name in expected} == expected


def test_attention_on_cpus_is_counted():
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    assert {attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward} <= set(flop_registry)


def test_ratios(found):
    names = [ratio["name"] for ratio in found["ratios"]]
    assert names == [f"{first} / {second}, time" for first, second in PAIRS]
    assert set(BARS["llava"]) == set(BARS["qwen"]) <= {*names, "rdpo / padded_rows, memory"}
    modes = found["modes"]
    first = found["ratios"][0]
    assert first["measured"] == pytest.approx(modes["rdpo"]["median"] / modes["trl"]["median"])
    work = [sum(modes[name]["flops"].values()) for name in ("rdpo", "trl")]
    assert first["predicted"] == pytest.approx(work[0] / work[1])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep over a tiny Qwen, with what it prints."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.json"
    tiny = Sweep("response tokens", (8, 16), lambda value: replace(SHAPES["tiny-qwen"], response=value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWEEPS, "response", tiny)
        printed = run("--sweep", "response", "--repeats", "1", "--json", str(path))
    return printed, path


def test_sweep_of_a_qwen(sweep):
    printed, path = sweep
    points = json.loads(path.read_text())["sweeps"]["response"]
    assert [list(point["modes"]) for point in points.values()] == [list(SWEEP_MODES)] * 2
    for point in points.values():
        assert all(mode["loss_difference"] < 1e-4 for mode in point["modes"].values())
        assert all(mode["gradient_relative"] < 1e-3 for mode in point["modes"].values())
    assert points["16"]["modes"]["trl"]["positions"] - points["8"]["modes"]["trl"]["positions"] == 2 * 4 * 8
    assert printed.startswith("response tokens\n")


def test_plot(sweep):
    _, path = sweep
    assert main(["--draw", str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_resident_memory_is_seen():
    with ResidentPeak() as peak:
        filled = torch.ones(64 * 2**20)
        del filled
    assert 250e6 < peak.bytes < 400e6


def test_memory_is_measured_in_a_fresh_process(tmp_path):
    folder = make_checkpoint(TINY, tmp_path / "tiny", torch.device("cpu"))
    settings = Settings(["dpo"], 1, torch.device("cpu"), torch.float32, 16, 1, memory=True, profile=False)
    longer = replace(TINY, response=200)
    few, many = in_fresh_process(memory_of, "dpo", [(TINY, folder), (longer, folder)], settings)
    assert 0 <= few < many < 1e9
