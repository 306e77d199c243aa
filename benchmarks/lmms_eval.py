"""Whether what `realign-lightning export` writes runs in lmms-eval, beside the model that it was made of.

From the root of the repository, with lmms-eval in an environment of its own:

    uv venv lmms && uv pip install --python lmms/bin/python lmms-eval==0.7.3 decord
    python -m benchmarks.lmms_eval --python lmms/bin/python --folder lmms_proof --json lmms_proof.json

For each family a small checkpoint is trained for a few steps by `fit` and written by `export --merge`. lmms-eval then
answers a task of digit scenes and the tasks of the paper's seven general benchmarks on stand-in data
(`benchmarks/lmms_tasks.py`), for base and exported model. Every answer is compared with that of `Backbone.generate` to
the same prompt and image. The exit status is 1 if a task has no score or too few samples, or an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from PIL import Image
from tqdm import tqdm

from benchmarks.lmms_tasks import (
    LOCAL_TASK,
    STAND_INS,
    Asked,
    asked_questions,
    judging,
    write_local_task,
    write_stand_ins,
)
from benchmarks.report import table
from realign_lightning.backbones import AutoBackbone
from realign_lightning.data import ShardWriter
from realign_lightning.demos import POLICY_FOLDER
from realign_lightning.types import PreferenceSample
from tests.tiny_models import make_tiny

ROOT = Path(__file__).parent.parent

TASKS = (LOCAL_TASK, *STAND_INS)
"""What lmms-eval is asked to run."""

READABLE = tuple(task for task in TASKS if task != "mmbench_en_dev_static")
"""The same for random weights: MMBench's Excel file takes no control characters, and one of them ends the whole run."""

PACKAGES = ("lmms-eval", "transformers", "torch", "datasets", "qwen-vl-utils", "decord")
"""Whose versions are told."""

MAX_NEW_TOKENS = 16


class Family(NamedTuple):
    """A family of models in lmms-eval.

    Args:
        recipe: that trains it, in ``recipes/``.
        model: lmms-eval's name of the family.
        arguments: lmms-eval's arguments of the model, beside its path.
        dtype: in which lmms-eval computes.
        processor: settings of the processor for training.
        side: of the images, in pixels: one that no image processor changes otherwise than ours.
        tasks: that it is asked.
    """

    recipe: str
    model: str
    arguments: str
    dtype: Literal["float32", "bfloat16"]
    processor: Mapping[str, int]
    side: int | None = None
    tasks: Sequence[str] = READABLE


FAMILIES = {
    "llava": Family("llava7b_lora", "llava_hf", "device_map=cpu,dtype=float32", "float32", {}, tasks=TASKS),
    "llava_next_mistral": Family("llava16_mistral7b_lora", "llava_hf", "device_map=cpu,dtype=float32", "float32", {}),
    "llava_next_vicuna": Family("llava16_vicuna7b_lora", "llava_hf", "device_map=cpu,dtype=float32", "float32", {}),
    # lmms-eval rounds sides to multiples of 28 first, and always computes in bfloat16.
    "qwen2_5_vl": Family(
        *("qwen25vl_3b_lora", "qwen2_5_vl", "device_map=cpu,min_pixels=256,max_pixels=4096", "bfloat16"),
        {"max_pixels": 4096},
        side=224,
    ),
}
"""Families by name; LLaVA is the policy of the digit scenes, the others are tiny checkpoints with random weights."""


# ---- an exported model


def make_models(name: str, folder: Path, steps: int) -> dict[str, Path]:
    """Make a base model, train it for a few steps and export it, by the commands that a user gives.

    Args:
        name: one of :data:`FAMILIES`.
        folder: where everything goes.
        steps: of training.

    Returns:
        Folders of the models, ``base`` and ``aligned``.
    """
    base = POLICY_FOLDER if name == "llava" else make_tiny(name, folder / "base")
    _write_pairs(folder / "pairs")
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(_training(FAMILIES[name], base, folder, steps)), encoding="utf-8")
    recipe = ROOT / "recipes" / f"{FAMILIES[name].recipe}.yaml"
    _realign(folder, "fit", "--config", str(recipe), "--config", str(settings))
    checkpoint, aligned = folder / "run" / "run.ckpt", folder / "aligned"
    _realign(folder, "export", "--checkpoint", str(checkpoint), "--output", str(aligned), "--merge")
    return {"base": base, "aligned": aligned}


def _write_pairs(folder: Path) -> None:
    """Pairs whose rejected answers are the opposite of the truth."""
    asked = asked_questions(16)
    with ShardWriter(folder) as writer:
        for number, (one, other) in enumerate(zip(asked, [*asked[2:], *asked[:2]], strict=True)):
            wrong = "no" if one.truth == "yes" else "yes"
            key = f"pair{number:02}"
            writer.write(PreferenceSample(key, one.image, other.image, one.text, f"{one.truth} .", f"{wrong} ."))


def _training(family: Family, base: Path, folder: Path, steps: int) -> dict[str, Any]:
    """What is other than in the recipe of the large model."""
    keep = {"dirpath": str(folder / "run"), "filename": "run", "every_n_train_steps": steps}
    backbone = {"path": str(base), "dtype": "float32", "processor_kwargs": dict(family.processor)}
    return {
        "model": {
            "backbone": {"class_path": "realign_lightning.backbones.AutoBackbone", "init_args": backbone},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {"train": str(folder / "pairs"), "val": None, "num_workers": 0, "batch_size": 4},
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "max_steps": steps,
            "max_epochs": -1,
            "accumulate_grad_batches": 1,
            "logger": False,
            "default_root_dir": str(folder / "run"),
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}],
        },
    }


def _realign(folder: Path, command: str, *arguments: str) -> None:
    _say(f"realign-lightning {command}")
    _call([sys.executable, "-m", "realign_lightning", command, *arguments], folder / f"{command}.log", ROOT, {})


def _call(command: Sequence[str], log: Path, cwd: Path, environment: Mapping[str, str]) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(  # noqa: S603
            command, cwd=cwd, env={**os.environ, **offline, **environment}, stdout=stream, stderr=subprocess.STDOUT
        ).returncode
    if status:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise RuntimeError(f"Expected `{' '.join(command)}` to succeed, got exit status {status}:\n{end}")


# ---- lmms-eval


def evaluate(python: Path, family: Family, model: Path, data: Path, output: Path) -> dict[str, Any]:
    """Run lmms-eval on one model.

    Args:
        python: interpreter of the environment with lmms-eval.
        family: of the model.
        model: its folder.
        data: folder with the tasks' data; the working directory.
        output: folder for what lmms-eval writes.

    Returns:
        The aggregated ``results`` by task, and ``samples`` by task, in order of their ids.

    Raises:
        RuntimeError: if lmms-eval wrote no results. It ends with status 0 even then.
    """
    with judging() as address:
        command = [
            *(str(python), "-m", "lmms_eval", "--model", family.model),
            *("--model_args", f"pretrained={model.resolve()},{family.arguments}", "--device", "cpu"),
            *("--tasks", ",".join(family.tasks), "--include_path", "task", "--batch_size", "1"),
            *("--gen_kwargs", f"max_new_tokens={MAX_NEW_TOKENS},temperature=0,do_sample=False"),
            *("--output_path", str(output.resolve()), "--log_samples"),
        ]
        log = output.with_suffix(".log")
        endpoint = {"OPENAI_API_URL": address, "OPENAI_API_KEY": "none", "MODEL_VERSION": "rule"}
        _call(command, log, data, {**endpoint, "HF_HOME": str((data / "cache").resolve())})
    # Tasks write files of like names to the folder `submissions`; these begin with no date.
    files = list(output.glob("*/2*_results.json"))
    if len(files) != 1:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise RuntimeError(f"Expected lmms-eval to write one file of results in {output}, got {len(files)}:\n{end}")
    return {"results": json.loads(files[0].read_text(encoding="utf-8"))["results"], "samples": _samples(output)}


def _samples(output: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for path in output.glob("*/*_samples_*.jsonl"):
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found[path.stem.split("_samples_")[1]] = sorted(lines, key=lambda line: int(line["doc_id"]))
    return found


def versions(python: Path) -> str:
    """Python's and :data:`PACKAGES`' versions in the environment of an interpreter."""
    code = (
        "import importlib.metadata as m, platform; print('Python', platform.python_version(), end='');"
        f"[print(',', n, m.version(n), end='') for n in {PACKAGES}]"
    )
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout  # noqa: S603


# ---- beside our own answers


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a task's aggregated results, without standard errors and what has no figure.

    Example:
        >>> scores({"alias": "mme", "mme_perception_score,none": 100.0, "mme_perception_score_stderr,none": "N/A"})
        {'mme_perception_score': 100.0}
    """
    return {
        name.split(",")[0]: float(value)
        for name, value in results.items()
        if "_stderr" not in name and isinstance(value, int | float)
    }


def compare(family: Family, model: Path, asked: Sequence[Asked], found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Answer lmms-eval's prompts by ``Backbone.generate`` and count the equal answers.

    Args:
        family: of the model.
        model: its folder.
        asked: the questions; sample ``doc_id`` of every task shows the image of question ``doc_id``.
        found: as :func:`evaluate` gives it.

    Returns:
        For each task ``scores``, the number of ``samples``, how many answers are ``equal`` to ours, how many
        samples are ``answered`` at all, and the ``answers``.
    """
    backbone = AutoBackbone(str(model), dtype=family.dtype)
    loaded = backbone.load_model()

    def answer(image: Image.Image, prompt: str) -> str:
        inputs = backbone.encode_prompts([prompt], [image])
        return backbone.generate(loaded, inputs, max_new_tokens=MAX_NEW_TOKENS)[0].strip()

    summary = {}
    for task in family.tasks:
        samples = found["samples"].get(task, [])
        theirs = [str(sample["filtered_resps"]).strip() for sample in samples]
        ours = [answer(asked[sample["doc_id"]].image, sample["input"]) for sample in samples]
        summary[task] = {
            "scores": scores(found["results"].get(task, {})),
            "samples": len(samples),
            "equal": sum(one == other for one, other in zip(ours, theirs, strict=True)),
            "answered": sum(map(bool, theirs)),
            "answers": theirs,
        }
    return summary


def holds(summary: Mapping[str, Mapping[str, Any]], questions: int) -> bool:
    """Whether every task has scores, a sample for every question, and our answers."""
    return all(
        one["scores"] and one["samples"] == one["equal"] == questions and one["answered"] for one in summary.values()
    )


def proof_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Scores and equal answers of every family and task, base and aligned side by side, in Markdown."""
    rows = []
    for family, models in found.items():
        for task, base in models["base"].items():
            aligned = models["aligned"][task]
            moved = sum(one != other for one, other in zip(base["answers"], aligned["answers"], strict=False))
            equal = (f"{one['equal']} of {one['samples']}" for one in (base, aligned))
            rows.append([family, task, _figures(base), _figures(aligned), str(moved), *equal])
    header = ["family", "task", "base", "aligned", "answers that changed", "base as ours", "aligned as ours"]
    return table(header, rows)


def _figures(one: Mapping[str, Any]) -> str:
    return " / ".join(f"{value:.4g}" for value in one["scores"].values()) or "none"


# ---- command line


def prove(name: str, python: Path, folder: Path, questions: int, steps: int) -> dict[str, dict[str, Any]]:
    """Train, export, evaluate and compare a family's base and aligned model, as :func:`compare` gives it."""
    family = FAMILIES[name]
    asked = asked_questions(questions, family.side)
    folder.mkdir(parents=True)
    models = make_models(name, folder, steps)
    write_local_task(folder / "task", asked, MAX_NEW_TOKENS)
    write_stand_ins(folder, asked)
    summary = {}
    for which, model in models.items():
        _say(f"lmms-eval on {name}, {which}")
        found = evaluate(python, family, model, folder, folder / f"out_{which}")
        summary[which] = compare(family, model, asked, found)
    return summary


def _say(what: str) -> None:
    tqdm.write(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the proof.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lmms_eval", description=__doc__.split("\n")[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter that has lmms-eval")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--questions", type=int, default=24, help="of every task; a multiple of 4")
    parser.add_argument("--steps", type=int, default=8, help="of training")
    parser.add_argument("--folder", type=Path, help="keeps everything here; a new folder")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    chosen = parser.parse_args(arguments)
    if chosen.questions < 4 or chosen.questions % 4:
        parser.error(f"--questions: expected a positive multiple of 4, got {chosen.questions}")
    python = chosen.python.absolute()
    print(f"{versions(python)}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if chosen.folder is None else chosen.folder.resolve()
        found = {name: prove(name, python, folder / name, chosen.questions, chosen.steps) for name in chosen.families}
    print(proof_table(found))
    if chosen.json is not None:
        text = json.dumps({"versions": versions(python), "families": found}, indent=2)
        chosen.json.write_text(f"{text}\n", encoding="utf-8")
    summaries = chain.from_iterable(models.values() for models in found.values())
    return 0 if all(holds(summary, chosen.questions) for summary in summaries) else 1


if __name__ == "__main__":
    sys.exit(main())
