import threading

import pytest

from realign_lightning.engines import EndpointEngine
from realign_lightning.evaluation import Judge
from tests.engines.test_endpoint import Server
from tests.evaluation.official import Parrot


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def judge_of(server, tmp_path, **changed):
    engine = EndpointEngine("judge", server.url, timeout=changed.pop("timeout", 5.0), retries=changed.pop("retries", 3))
    return Judge(engine, str(tmp_path / "cache"), **changed)


def test_replies_are_kept_and_equal_prompts_are_asked_once(server, tmp_path):
    judge = judge_of(server, tmp_path)
    assert judge.ask(["a dog", "a cat", "a dog"]) == ["A DOG", "A CAT", "A DOG"]
    assert (judge.cost.asked, judge.cost.cached) == (2, 0)
    again = judge_of(server, tmp_path)
    assert again.ask(["a cat", "a bus"]) == ["A CAT", "A BUS"]
    assert (again.cost.asked, again.cost.cached) == (1, 1)
    assert server.asked == {"a dog": 1, "a cat": 1, "a bus": 1}


def test_a_busy_endpoint_is_asked_again_and_a_silent_one_gives_no_reply(server, tmp_path):
    judge = judge_of(server, tmp_path, timeout=0.3, retries=2)
    assert judge.ask(["busy", "slow", "quick"]) == ["BUSY", None, "QUICK"]
    assert server.asked["busy"] == server.asked["slow"] == 3
    assert judge.cost.failed == 1
    assert judge_of(server, tmp_path, timeout=5.0).ask(["slow"]) == ["SLOW"], "what failed is asked again"


def test_cost_is_tokens_times_prices(tmp_path):
    """The parrot reads 10 tokens and writes 2: 3 prompts cost (30 * 2 + 6 * 5) / 1e6."""
    judge = Judge(Parrot(), str(tmp_path), price_per_million_read=2.0, price_per_million_written=5.0)
    judge.ask(["a", "b", "c"])
    assert judge.cost.cost == pytest.approx(90e-6)
    assert judge.told()["prompt_tokens"] == 30
    judge.ask(["a", "b", "c"])
    assert judge.cost.cost == pytest.approx(90e-6), "known replies cost nothing"


def test_failures_add_up_over_calls(tmp_path):
    judge = Judge(Parrot({"": "ERROR"}), str(tmp_path))
    judge.ask(["a", "b"])
    judge.ask(["c"])
    assert judge.cost.failed == 3


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="`price_per_million_read` to be at least 0, got -1"):
        Judge(Parrot(), price_per_million_read=-1)
    with pytest.raises(ValueError, match="Expected `cache` to be a folder"):
        Judge(Parrot()).ask(["a"])
