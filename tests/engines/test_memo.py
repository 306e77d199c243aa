import json
import os
import signal
import subprocess
import sys

import pytest

from realign_lightning.engines.memo import Memo, content_key
from realign_lightning.journal import JournalError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120


def test_what_was_added_is_found_again_under_the_same_identity_only(tmp_path):
    memo = Memo(tmp_path, "answers", {"model": "a", "longest": 3})
    memo.add({"one": {"text": "hello \u00e9"}, "two": [1, 2.5, None]})
    memo.add({})
    again = Memo(tmp_path, "answers", {"longest": 3, "model": "a"})
    assert (again["one"], again["two"], len(again)) == ({"text": "hello \u00e9"}, [1, 2.5, None], 2)
    for other in (
        Memo(tmp_path, "answers", {"model": "b", "longest": 3}),
        Memo(tmp_path, "masks", {"model": "a", "longest": 3}),
    ):
        assert "one" not in other
        assert not other.folder.exists(), "nothing is made before there is something to keep"
    assert json.loads((memo.folder / "identity.json").read_text()) == {"longest": 3, "model": "a"}


def test_processes_see_each_other_when_they_refresh(tmp_path):
    one, two = (Memo(tmp_path, "answers", {}, rank) for rank in (0, 1))
    one.add({"a": 1})
    two.add({"b": 2})
    assert "b" not in one
    one.refresh()
    assert one["b"] == 2
    assert {path.name.split("-")[1] for path in one.folder.glob("rank-*.jsonl")} == {"0", "1"}


def test_a_batch_that_was_cut_is_gone_as_a_whole(tmp_path, caplog):
    memo = Memo(tmp_path, "answers", {})
    memo.add({"a": 1})
    memo.add({"b": 2, "c": 3})
    memo.close()
    (file,) = memo.folder.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-4])
    again = Memo(tmp_path, "answers", {})
    assert ("a" in again, "b" in again, "c" in again) == (True, False, False)
    again.add({"b": 2, "c": 3})
    assert len(Memo(tmp_path, "answers", {})) == 3


def test_damage_is_named(tmp_path):
    memo = Memo(tmp_path, "answers", {})
    memo.add({"a": 1})
    (memo.folder / "rank-9-x.jsonl").write_text('[1]\n{"b": 2}\n')
    with pytest.raises(JournalError, match=r"Line 1 of .*rank-9-x.jsonl holds no results"):
        Memo(tmp_path, "answers", {})


@pytest.mark.parametrize("after", [1, 7, 40])
def test_a_process_that_is_killed_loses_nothing_that_it_added(tmp_path, after):
    """It prints each key when it has added it, and is killed in the middle of its work."""
    code = (
        "import sys; from pathlib import Path; from realign_lightning.engines.memo import Memo\n"
        "memo = Memo(Path(sys.argv[1]), 'answers', {})\n"
        "for number in range(10**6):\n"
        "    memo.add({f'{number}a': 'x' * 500, f'{number}b': number}); print(number, flush=True)\n"
    )
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        done = [int(process.stdout.readline()) for _ in range(after)]
        process.send_signal(signal.SIGKILL)
    memo = Memo(tmp_path, "answers", {})
    assert all(f"{number}a" in memo and memo[f"{number}b"] == number for number in done)
    assert len(memo) % 2 == 0
    assert all(f"{number}a" in memo for number in range(len(memo) // 2))


def test_a_full_disk_is_told_and_costs_no_more_than_what_did_not_fit(tmp_path):
    """The limit on the size of files stands for the disk's."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from realign_lightning.engines.memo import Memo\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "memo = Memo(Path(sys.argv[1]), 'answers', {}); memo.add({'first': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: memo.add({'large': 'x' * 10000})\n"
        "except OSError as error: print('told', 'large' in memo)\n"
        "memo.add({'small': 2})\n"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "told False\n"
    memo = Memo(tmp_path, "answers", {})
    assert ("first" in memo, "large" in memo, "small" in memo) == (True, False, True)


def test_keys_are_those_of_the_content():
    assert content_key("a", [1]) == content_key("a", [1])
    different = [content_key("a", "b"), content_key("ab"), content_key(["a", "b"]), content_key("a", ["b"])]
    assert len(set(different)) == len(different)
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_key(float("nan"))
