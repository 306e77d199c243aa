"""Small local data for lmms-eval's own tasks, and a judge for them: digit scenes in the columns of the real data sets.

lmms-eval reads its data sets with ``datasets.load_dataset(NAME)``, which prefers a local folder of that name. In a
working directory that :func:`write_stand_ins` filled, the tasks of the seven general benchmarks run with their own
prompts, scoring and aggregation, without a hub. Their scores on these rows mean nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from realign_lightning.demos.scenes import DigitWorld, absent, objects, question

LOCAL_TASK = "digit_scenes"
"""The task that :func:`write_local_task` writes."""

HUB = "lmms-lab-encoder"
"""Organisation on the hub whose data sets lmms-eval 0.7 reads."""

_SCORING = '''\
"""Of the task beside this file."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    words = results[0].lower().split()
    return {"exact_match": float(words[:1] == [doc["answer"]])}
'''


class Asked(NamedTuple):
    """A yes/no question about a digit scene.

    Args:
        image: the scene (RGB).
        text: the question.
        truth: ``"yes"`` or ``"no"``.
    """

    image: Image.Image
    text: str
    truth: str


class StandIn(NamedTuple):
    """How a task's data set is laid out.

    Args:
        dataset: its name on the hub, without the organisation.
        split: that the task reads.
        columns: what the task reads of a row beside the image, from the row's number and question.
        config: the data set's configuration that the task reads.
    """

    dataset: str
    split: str
    columns: Callable[[int, Asked], dict[str, Any]]
    config: str = "default"


def asked_questions(count: int, side: int | None = None) -> list[Asked]:
    """Questions about test scenes: for each scene one about a digit that it shows and one about a digit that it lacks.

    Args:
        count: of questions, even.
        side: of the images in pixels; None leaves them as they are.

    Example:
        >>> [(asked.text, asked.truth) for asked in asked_questions(2)]
        [('is there a one in the image ?', 'yes'), ('is there a three in the image ?', 'no')]
    """
    asked = []
    for scene in DigitWorld("test", skew=0.0, seed=0).scenes(count // 2):
        image = scene.image if side is None else scene.image.resize((side, side), Image.Resampling.NEAREST)
        for digit, truth in ((objects(scene)[0], "yes"), (absent(scene)[0], "no")):
            asked.append(Asked(image, question(digit), truth))
    return asked


# ---- the columns of the seven data sets


def _scienceqa(_: int, asked: Asked) -> dict[str, Any]:
    return {"question": asked.text, "choices": ["yes", "no"], "answer": int(asked.truth == "no"), "hint": ""}


def _textvqa(number: int, asked: Asked) -> dict[str, Any]:
    return {"question_id": number, "question": asked.text, "answers": [asked.truth] * 10}


def _vizwiz(number: int, asked: Asked) -> dict[str, Any]:
    return {"question_id": f"VizWiz_val_{number:08}", "question": asked.text, "answers": [asked.truth] * 10}


def _mme(number: int, asked: Asked) -> dict[str, Any]:
    # Two questions for each image, and both of MME's scores.
    category = ("existence", "commonsense_reasoning")[number // 2 % 2]
    return {
        "question_id": f"{category}/{number // 2}.png",
        "question": f"{asked.text} Please answer yes or no.",
        "answer": asked.truth.capitalize(),
        "category": category,
    }


def _mmbench(number: int, asked: Asked) -> dict[str, Any]:
    options = {"A": "yes", "B": "no", "C": "nan", "D": "nan"}
    kind = {"category": "object_localization", "L2-category": "finegrained_perception", "source": "scenes"}
    answer = "A" if asked.truth == "yes" else "B"
    return {"index": number, "question": asked.text, "hint": "nan", "answer": answer, "split": "dev", **options, **kind}


def _mmvet(number: int, asked: Asked) -> dict[str, Any]:
    return {"question_id": f"v1_{number}", "question": asked.text, "answer": asked.truth, "capability": "rec,spat"}


def _llava_in_the_wild(number: int, asked: Asked) -> dict[str, Any]:
    category = ("conv", "detail", "complex")[number % 3]
    known = {"gpt_answer": asked.truth, "caption": "digits on a grid", "category": category}
    return {"question_id": number, "question": asked.text, **known}


STAND_INS: Mapping[str, StandIn] = {
    "scienceqa_img": StandIn("ScienceQA", "test", _scienceqa, "ScienceQA-IMG"),
    "textvqa_val": StandIn("textvqa", "validation", _textvqa),
    "vizwiz_vqa_val": StandIn("VizWiz-VQA", "val", _vizwiz),
    "mme": StandIn("MME", "test", _mme),
    "mmbench_en_dev_static": StandIn("MMBench", "dev", _mmbench, "en"),
    "mmvet": StandIn("MMVet", "test", _mmvet),
    "llava_in_the_wild": StandIn("llava-bench-in-the-wild", "train", _llava_in_the_wild),
}
"""The general benchmarks of the paper by lmms-eval's names of their tasks."""


def write_stand_ins(folder: Path, asked: Sequence[Asked]) -> None:
    """Write a data set for each of :data:`STAND_INS`, found by lmms-eval when it runs in ``folder``."""
    for stand_in in STAND_INS.values():
        dataset = folder / HUB / stand_in.dataset
        _write_images(dataset / stand_in.split, asked, stand_in.columns)
        files = [{"split": stand_in.split, "path": f"{stand_in.split}/*"}]
        header = yaml.safe_dump({"configs": [{"config_name": stand_in.config, "data_files": files}]})
        (dataset / "README.md").write_text(f"---\n{header}---\n", encoding="utf-8")


def write_local_task(folder: Path, asked: Sequence[Asked], max_new_tokens: int) -> None:
    """Write a task of our own in ``folder``, for lmms-eval's ``--include_path``, and its data.

    An answer is right if its first word is.
    """
    _write_images(folder / "data" / "test", asked, lambda _, one: {"question": one.text, "answer": one.truth})
    task = {
        "task": LOCAL_TASK,
        "dataset_path": "imagefolder",
        "dataset_kwargs": {"data_dir": str((folder / "data").resolve())},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    functions = [f"{name}: !function {LOCAL_TASK}.{name}\n" for name in ("doc_to_visual", "process_results")]
    (folder / f"{LOCAL_TASK}.yaml").write_text(yaml.safe_dump(task) + "".join(functions), encoding="utf-8")
    (folder / f"{LOCAL_TASK}.py").write_text(_SCORING, encoding="utf-8")


def _write_images(folder: Path, asked: Sequence[Asked], columns: Callable[[int, Asked], dict[str, Any]]) -> None:
    """A split in the layout of ``imagefolder``: pictures, and a file of what belongs to each."""
    folder.mkdir(parents=True)
    rows = []
    for number, one in enumerate(asked):
        name = f"{number:04}.png"
        one.image.save(folder / name)
        rows.append(json.dumps({"file_name": name, **columns(number, one)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


# ---- a judge


class _Judge(BaseHTTPRequestHandler):
    """Answers chat completions in the form that MM-Vet's and LLaVABench's prompts ask for."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = judge(str(request["messages"][-1]["content"]))
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        reply = {"id": "0", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        body = json.dumps({**reply, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def judge(prompt: str) -> str:
    """What the judge answers: two scores for LLaVABench's prompt, and for MM-Vet's whether the answer holds the truth.

    Example:
        >>> judge("[Context] ... [System] ...").splitlines()[0], judge("question | yes | yes at top left . |")
        ('8 6', '1.0')
    """
    if "[Context]" in prompt:
        return "8 6\nThe second answer is shorter."
    _, truth, answer = prompt.rsplit(" | ", 2)
    return "1.0" if truth in answer else "0.0"


@contextmanager
def judging() -> Iterator[str]:
    """An OpenAI-compatible endpoint on this machine that judges by rule; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
