"""The commands `test` and `score` as a user runs them, on digit scenes and on tiny checkpoints."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.cli import run
from realign_lightning.demos import write_digit_benchmarks
from realign_lightning.evaluation import PopeBenchmark, evaluate, read_run
from tests.conftest import alone
from tests.evaluation.official import Parrot, write_coco, write_hallusionbench, write_mmhal, write_pope

ROOT = Path(__file__).parents[2]
DIGITS = ["--model.backbone", str(ROOT / "configs" / "backbones" / "digits.yaml"), "--batch_size", "32"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "benchmarks"
    write_digit_benchmarks(folder, scenes=12)
    return folder


def pope_options(digits: Path, output: str) -> list[str]:
    return [
        *("--benchmark", "pope", "--benchmark.folder", str(digits / "pope")),
        *("--benchmark.images", str(digits / "images"), "--benchmark.instruction", ""),
        *("--benchmark.max_new_tokens", "8", "--output", output),
    ]


def test_pope_of_the_digit_policy(inside, digits, capsys):
    """What is written holds what is printed, and the scores are those of the answers."""
    run(["test", *pope_options(digits, "run"), *DIGITS, *CPU])
    printed = capsys.readouterr().out
    found = read_run(Path("run"))
    assert found.benchmark == "pope"
    assert len(found.answers) == 72
    right = sum(row.answer.startswith(row.target["label"]) for row in found.answers)
    assert found.scores["accuracy"] == pytest.approx(right / 72)
    assert f"{100 * right / 72:.2f} %" in printed
    assert right > 40, "the policy has been taught"


def test_finished_answers_are_not_generated_again(inside, digits, monkeypatch):
    run(["test", *pope_options(digits, "run"), *DIGITS, *CPU])
    before = Path("run/metrics.json").read_text()
    monkeypatch.setattr(AutoBackbone, "generate_tokens", lambda *args, **kwargs: pytest.fail("asked again"))
    run(["test", *pope_options(digits, "run"), "--benchmark.parser", "lmms_eval", *DIGITS, *CPU])
    assert json.loads(Path("run/metrics.json").read_text())["settings"]["parser"] == "lmms_eval"
    run(["test", *pope_options(digits, "run"), *DIGITS, *CPU])
    assert Path("run/metrics.json").read_text() == before


def test_two_ranks_count_every_question_once(inside, digits, run_module):
    """An odd number of images is shared by two processes."""
    shutil.copytree(digits, "benchmarks")
    for kind in ("random", "popular", "adversarial"):
        path = Path(f"benchmarks/pope/digits_pope_{kind}.json")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    options = pope_options(Path("benchmarks"), "two")
    command = ["realign_lightning", "test", *options, *DIGITS, "--trainer.accelerator", "cpu"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    run_module(*command, processes=2, folder=inside)
    run(["test", *pope_options(Path("benchmarks"), "one"), *DIGITS, *CPU])
    assert Path("one/answers.jsonl").read_bytes() == Path("two/answers.jsonl").read_bytes()
    assert read_run(Path("one")).scores == read_run(Path("two")).scores
    (folder,) = Path("two/work/answers").iterdir()
    parts = [path.read_text().count("\n") for path in folder.glob("rank-*.jsonl")]
    assert len(parts) == 2


@pytest.mark.parametrize("ask", ["all", "image"])
def test_sharded_ranks_keep_up_with_questions_without_a_figure(inside, tiny_llava, ask, run_module):
    """Under FSDP2 one rank asks a question without a figure while the other asks one with, or none."""
    folder = write_hallusionbench(inside / "hb")
    options = ["--benchmark", "hallusionbench", "--benchmark.file", str(folder / "HallusionBench.json")]
    options += ["--benchmark.images", str(folder), "--benchmark.ask", ask, "--benchmark.max_new_tokens", "3"]
    options += ["--model.backbone", "AutoBackbone", "--model.backbone.path", str(tiny_llava)]
    command = ["realign_lightning", "test", *options, "--output", "two", "--batch_size", "1"]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    command += ["--trainer.strategy", str(ROOT / "configs" / "strategies" / "fsdp2.yaml")]
    run_module(*command, processes=2, folder=inside)
    run(["test", *options, "--output", "one", *CPU])
    answers = [[row.answer for row in read_run(Path(name)).answers] for name in ("one", "two")]
    assert answers[0] == answers[1]
    assert len(answers[0]) == (4 if ask == "all" else 3)


def test_the_benchmarks_longest_answer_holds_for_every_engine(inside, monkeypatch):
    folder = write_pope(inside / "pope", ["random"])
    parrot, lengths = Parrot(), []

    def answer(self, asked):
        lengths.append(self.max_new_tokens)
        return parrot.answer(asked)

    monkeypatch.setattr("realign_lightning.engines.EndpointEngine.answer", answer)
    options = ["--benchmark=pope", "--benchmark.folder", str(folder), "--benchmark.images", str(folder / "images")]
    run(["test", *options, "--engine", "EndpointEngine", "--engine.model", "m", "--output", "run", *CPU])
    assert set(lengths) == {32}


KILLED = """
import os, signal, sys, time
from pathlib import Path
from realign_lightning.evaluation import PopeBenchmark, evaluate
from tests.evaluation.official import Parrot

class Slow(Parrot):
    def answer(self, questions):
        time.sleep(0.05)
        return super().answer(questions)

folder, output, log = map(Path, sys.argv[1:4])
evaluate(PopeBenchmark(folder, folder / "images"), Slow(batch_size=2, log=log), output, show_progress=False)
"""


def test_killed_at_any_moment_it_goes_on_where_it_was(inside):
    """Every question is answered once, but for the batch that was under way at each kill."""
    folder = write_pope(inside / "pope")
    script, log = inside / "killed.py", inside / "log"
    script.write_text(KILLED)
    kills = 0
    for moment in (0.0, 0.08, 0.15, 0.02):
        command = [sys.executable, str(script), str(folder), str(inside / "run"), str(log)]
        process = subprocess.Popen(command, env=alone(PYTHONPATH=str(ROOT)))  # noqa: S603
        lines = log.read_text().count("\n") if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > lines):
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills > 0
    subprocess.run(command, check=True, env=alone(PYTHONPATH=str(ROOT)))  # noqa: S603
    asked = Counter(log.read_text().splitlines())
    assert sum(asked.values()) - 12 <= 2 * kills
    assert len(read_run(inside / "run").answers) == 12


@pytest.fixture(scope="module")
def adapter(tiny_llava, tmp_path_factory):
    """An adapter that changes answers."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    backbone = AutoBackbone(str(tiny_llava))
    torch.manual_seed(3)
    model = LoRA(r=4, alpha=64).apply(backbone, backbone.load_model())
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.5)
    model.save_pretrained(str(folder))
    return folder


def tiny_options(tiny_llava, folder: Path, output: str) -> list[str]:
    return [
        *("--benchmark", "pope", "--benchmark.folder", str(folder), "--benchmark.images", str(folder / "images")),
        *("--benchmark.instruction", "", "--benchmark.max_new_tokens", "4", "--output", output, *CPU),
        *("--model.backbone", "AutoBackbone", "--model.backbone.path", str(tiny_llava)),
    ]


def test_an_adapter_answers_as_peft_does(inside, tiny_llava, adapter):
    folder = write_pope(inside / "pope")
    run(["test", *tiny_options(tiny_llava, folder, "base")])
    run(["test", *tiny_options(tiny_llava, folder, "aligned"), "--adapter", str(adapter)])
    base, aligned = read_run(Path("base")), read_run(Path("aligned"))
    assert base.model != aligned.model
    assert [row.answer for row in base.answers] != [row.answer for row in aligned.answers]
    backbone = AutoBackbone(str(tiny_llava))
    model = PeftModel.from_pretrained(backbone.load_model(), str(adapter)).eval()
    from PIL import Image

    for row in aligned.answers[:4]:
        inputs = backbone.encode_prompts([row.question], [Image.open(folder / "images" / row.image)])
        assert backbone.generate(model, inputs, max_new_tokens=4) == [row.answer]


def test_a_checkpoint_of_a_training_run(inside, digits):
    """One step of `fit`, then its checkpoint, with the backbone that it names and with one that is given."""
    small = ["--data.builder.init_args.scenes", "10", "--data.builder.init_args.val_scenes", "4"]
    small += ["--trainer.callbacks", "null", "--data.batch_size", "4", "--trainer.max_steps", "2"]
    cli = run(["fit", "--config", str(ROOT / "recipes" / "digits.yaml"), *small])
    checkpoint = Path("trained.ckpt")
    cli.trainer.save_checkpoint(checkpoint)
    options = ["--ckpt_path", str(checkpoint), "--batch_size", "32", *CPU]
    run(["test", *pope_options(digits, "own"), *options])
    run(["test", *pope_options(digits, "given"), *options, *DIGITS])
    own, given = read_run(Path("own")), read_run(Path("given"))
    assert own.scores == given.scores
    assert "trained" in own.model
    with pytest.raises(ValueError, match="--adapter or --ckpt_path, got both"):
        run(["test", *pope_options(digits, "both"), *options, "--adapter", "x"])


def test_another_model_needs_another_folder(inside, tiny_llava, adapter):
    folder = write_pope(inside / "pope", ["random"])
    run(["test", *tiny_options(tiny_llava, folder, "run")])
    before = Path("run/answers.jsonl").read_text()
    with pytest.raises(FileExistsError, match="another model or benchmark"):
        run(["test", *tiny_options(tiny_llava, folder, "run"), "--adapter", str(adapter)])
    assert Path("run/answers.jsonl").read_text() == before
    run(["test", *tiny_options(tiny_llava, folder, "run"), "--adapter", str(adapter), "--overwrite", "true"])
    assert Path("run/answers.jsonl").read_text() != before


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (["--adapter", "nowhere"], FileNotFoundError, "a folder with adapter_config.json, got nowhere"),
        (["--ckpt_path", "nowhere.ckpt"], FileNotFoundError, "nowhere.ckpt"),
        (["--benchmark.images", "nowhere"], FileNotFoundError, "images are missing, the first is nowhere"),
        (["--benchmark.folder", "nowhere"], FileNotFoundError, "no such folder"),
        (["--engine", "EndpointEngine", "--engine.model", "m"], ValueError, "Expected a model to ask"),
        (["--model.backbone", "null"], ValueError, "Expected a model to ask"),
    ],
)
def test_what_is_missing_is_named(inside, tiny_llava, changed, error, message):
    folder = write_pope(inside / "pope", ["random"])
    with pytest.raises(error, match=message):
        run(["test", *tiny_options(tiny_llava, folder, "run"), *changed])
    assert not Path("run/metrics.json").exists()


def test_a_question_without_an_answer_shows_in_table_and_status(inside, tiny_llava, capsys):
    folder = write_pope(inside / "pope", ["random"])
    (folder / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as left:
        run(["test", *tiny_options(tiny_llava, folder, "run")])
    assert left.value.code == 3
    assert "4 questions, 2 left out" in capsys.readouterr().out
    assert json.loads(Path("run/metrics.json").read_text())["unanswered"] == 2


def test_files_of_others_are_not_replaced(inside):
    folder = write_pope(inside / "pope", ["random"])
    options = ["--benchmark", "pope", "--benchmark.folder", str(folder), "--output", "mine"]
    Path("mine").mkdir()
    rows = [{"question": f"Is there a {name} in the image?", "answer": "Yes"} for name in ("dog", "cat", "bus", "car")]
    Path("mine/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = Path("mine/answers.jsonl").read_text()
    for more in ([], ["--overwrite", "true"]):
        with pytest.raises(FileExistsError, match="would be replaced by its own scores"):
            run(["score", *options, "--answers", "mine/answers.jsonl", *more])
    shutil.copy("mine/answers.jsonl", "theirs.jsonl")
    with pytest.raises(FileExistsError, match="is no evaluation's"):
        run(["score", *options, "--answers", "theirs.jsonl"])
    assert Path("mine/answers.jsonl").read_text() == before
    with pytest.raises(FileNotFoundError, match=r"`answers` to be a file of answers, got nowhere\.jsonl"):
        run(["score", *options, "--answers", "nowhere.jsonl"])
    with pytest.raises(OSError, match=r"Cannot write to `output` theirs\.jsonl"):
        run(["score", *options[:-1], "theirs.jsonl", "--answers", "mine/answers.jsonl"])


def test_a_wrong_name_of_a_benchmark_lists_the_right_ones(inside):
    with pytest.raises(ValueError, match="one of pope, chair, amber, hallusionbench, mmhal, or a class, got 'pop'"):
        run(["test", "--benchmark", "pop", "--output", "run"])


def test_answers_from_elsewhere_compare_with_ours(inside, capsys):
    """What was told beside the question is not known of them, and the longest answer neither."""
    folder = write_pope(inside / "pope", ["random"])
    rows = [{"question": f"Is there a {name} in the image?", "answer": "Yes"} for name in ("dog", "cat", "bus", "car")]
    Path("answers.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--benchmark", "pope", "--benchmark.folder", str(folder), "--output"]
    run(["score", *options, "theirs", "--answers", "answers.json"])
    evaluate(PopeBenchmark(folder, folder / "images"), Parrot({"cat": "no"}), "ours", show_progress=False)
    run(["compare", "theirs", "ours", "--no-picture"])
    assert "+25.00" in capsys.readouterr().out
    longer = PopeBenchmark(folder, folder / "images", max_new_tokens=64)
    evaluate(longer, Parrot({"cat": "no"}), "longer", show_progress=False)
    with pytest.raises(ValueError, match="max_new_tokens is 32 in ours"):
        run(["compare", "ours", "longer", "--no-picture"])


def test_answers_from_elsewhere(inside, capsys):
    """The official answer file, matched by its order, and our own file, matched by its keys: the same scores."""
    folder = write_pope(inside / "pope", ["random"])
    rows = [{"question": f"Is there a {name} in the image?", "answer": "Yes"} for name in ("dog", "cat", "bus", "car")]
    Path("answers.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--benchmark", "pope", "--benchmark.folder", str(folder), "--output"]
    run(["score", *options, "official", "--answers", "answers.json"])
    found = read_run(Path("official"))
    assert (found.scores["accuracy"], found.scores["recall"], found.scores["yes_ratio"]) == (0.5, 1.0, 1.0)
    run(["score", *options, "ours", "--answers", "official/answers.jsonl"])
    assert read_run(Path("ours")).scores == found.scores
    run(["score", *options[:-1], "--answers", "answers.json"])
    assert read_run(Path("answers_scores")).scores == found.scores
    run(["score", *options, "written", "--answers", "answers.json", "--write", "for_others.tsv"])
    run(["score", "--benchmark", "pope", "--answers", "for_others.tsv"])
    assert read_run(Path("for_others_scores")).scores == found.scores
    recipe = ["--config", str(ROOT / "recipes" / "eval" / "pope.yaml")]
    run(["score", *recipe, *options[2:], "recipe", "--answers", "answers.json"])
    assert read_run(Path("recipe")).scores == found.scores
    run(["score", "--benchmark", "pope", "--output", "alone", "--answers", "official/answers.jsonl"])
    assert read_run(Path("alone")).scores == found.scores


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs(inside, recipe, tiny_llava, monkeypatch):
    """With its official files made here, its backbone replaced by a tiny one, and its judge by a parrot."""
    settings = yaml.safe_load(recipe.read_text())
    official = {
        "pope": (write_pope, "data/pope"),
        "chair": (write_coco, "data/coco/annotations"),
        "hallusionbench": (write_hallusionbench, "data/hallusionbench"),
        "mmhal": (write_mmhal, "data/mmhal"),
    }
    changed = ["--benchmark.max_new_tokens", "4"]
    if recipe.stem in official:
        write, place = official[recipe.stem]
        write(Path(place))
    if recipe.stem.startswith("digits"):
        run(["digit-benchmarks", "data/digit_benchmarks", "--scenes", "200"])
    else:
        changed += ["--model.backbone", "AutoBackbone", "--model.backbone.path", str(tiny_llava)]
    if recipe.stem in ("pope", "chair"):
        shutil.move(f"{official[recipe.stem][1]}/images", "data/images")
        Path("data/coco").mkdir(exist_ok=True)
        shutil.move("data/images", "data/coco/val2014")
    if recipe.stem == "chair":
        changed += ["--benchmark.size", "3"]
    if recipe.stem == "amber":
        from tests.evaluation.official import write_amber

        write_amber(Path("data/amber/data"))
        shutil.move("data/amber/data/images", "data/amber/images")
        changed += ["--benchmark.similarity", "exact", "--benchmark.part", "discriminative"]
    if recipe.stem == "mmhal":
        monkeypatch.setattr(
            "realign_lightning.engines.EndpointEngine.answer", lambda self, asked: Parrot().answer(asked)
        )
    run(["test", "--config", str(recipe), *changed, *CPU])
    found = read_run(Path(settings["output"]))
    assert found.benchmark == settings["benchmark"]["class_path"].split(".")[-1].removesuffix("Benchmark").lower() or (
        recipe.stem == "hallusionbench"
    )
    assert found.scores
    assert all(row.answer is not None for row in found.answers)
