"""The scripts of the docs run as they stand, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def run(name: str, folder: Path) -> list[str]:
    """Lines that a script prints, and last the names of the heavy packages that it imported."""
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')\n"
        "print(*sorted({'transformers', 'lightning', 'peft'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_training_in_your_own_trainer(tmp_path: Path) -> None:
    """A callback and a logger of one's own, in 25 lines."""
    script = "train_in_your_own_trainer.py"
    assert len((EXAMPLES / script).read_text().splitlines()) <= 25
    lines = run(script, tmp_path)
    assert [line.split()[:4] for line in lines if line.startswith("step")][-1][2:4] == ["visual", "margin"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    logged = (tmp_path / "logs/lightning_logs/version_0/metrics.csv").read_text()
    assert "train/rewards/visual_margins" in logged.splitlines()[0]


def test_only_the_loss(tmp_path: Path) -> None:
    """Worked by hand: r(y_w|v) = -10 + 12 = 2, r(y_l|v) = -14 + 11 = -3, r(y_w|v_l) = -13 + 12 = -1.

    loss = -ln sigmoid(0.1 * 5) - ln sigmoid(0.1 * 3) = 0.4741 + 0.5544 = 1.0284; its derivative by the chosen
    log-prob is -0.1 * (sigmoid(-0.5) + sigmoid(-0.3)) = -0.1 * (0.3775 + 0.4256) = -0.0803.
    """
    *lines, imported = run("only_the_loss.py", tmp_path)
    assert imported == ""
    assert lines[:2] == ["loss 1.0284", "gradient of the chosen log-prob -0.0803"]
    assert {"rewards/chosen 0.20", "rewards/margins 0.50", "rewards/visual_margins 0.30"} <= set(lines)


def test_only_the_metric(tmp_path: Path) -> None:
    """Read as yes, no, yes against yes, no, no; one says neither. The cat is 1 of 5 mentions, in 1 of 2 captions.

    Words: 9 and a period; "traffic light" is one, so 7 with the period: 8.5 on average.
    """
    *lines, imported = run("only_the_metric.py", tmp_path)
    assert imported == ""
    assert lines == [
        *("POPE accuracy 0.67", "POPE precision 0.50", "POPE recall 1.00", "POPE f1 0.67"),
        *("POPE yes_ratio 0.67", "POPE unparsed 0.33"),
        *("CHAIR chair_s 0.50", "CHAIR chair_i 0.20", "CHAIR recall 1.00", "CHAIR mean_length 8.50"),
    ]


def test_writing_shards(tmp_path: Path) -> None:
    lines = run("write_shards.py", tmp_path)
    assert lines[0].startswith("left out 000018: ")
    assert lines[1] == "shard-000000.tar: 1 samples"


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_commands_of_the_docs_name_files_that_exist(page: str) -> None:
    words = (ROOT / "docs" / page).read_text().replace("`", " ").split()
    named = {word.strip(",.()") for word in words if word.startswith(("recipes/", "configs/")) and "yaml" in word}
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []
