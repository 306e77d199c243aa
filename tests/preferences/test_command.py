"""``realign-lightning build`` as users run it: recipes, exit status, plans, several processes."""

import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from realign_lightning.cli import run
from realign_lightning.data import ShardDataset, read_index
from realign_lightning.demos import DigitBackbone, DigitScenes
from realign_lightning.demos.quickstart import digit_builder
from realign_lightning.engines import Policy
from realign_lightning.inspection import write_page
from realign_lightning.preferences.command import read_recipe
from tests.conftest import alone
from tests.preferences.test_build import bytes_of, problems_of, samples_of
from tests.tiny_models import make_tiny, make_tiny_sentence_encoder

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "recipes" / "build"
ANSWERS = [
    "A yellow flower with green leaves. It stands in front of a dark background.",
    "A temple with a red roof beside two green trees. There are people on the stairs.",
]


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(*arguments: str) -> int:
    """Exit status of the command, in this process."""
    try:
        run(["build", *arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def digits(*arguments: str, scenes: int = 12) -> int:
    recipe = str(RECIPES / "digits.yaml")
    return build("--config", recipe, "--source.init_args.scenes", str(scenes), "--output", "pairs", *arguments)


def photographs(folder: Path, answers: bool) -> None:
    """Twelve pieces of two real photographs as JPEG files."""
    folder.mkdir(parents=True)
    lines = []
    for number, name in enumerate(("flower.jpg", "china.jpg")):
        whole = Image.fromarray(load_sample_image(name))
        for piece in range(6):
            left, top = 100 * (piece % 3), 150 * (piece // 3)
            file = f"{name.removesuffix('.jpg')}{piece}.jpg"
            whole.crop((left, top, left + 320, top + 240)).save(folder / file, quality=90)
            lines.append(json.dumps({"file_name": file, "prompt": "What is it?", "answer": ANSWERS[number]}))
    if answers:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


# ---- recipes


def test_digit_pairs_are_built_looked_at_and_trained_on(inside, capsys):
    assert digits() == 0
    report = capsys.readouterr().out
    pairs = samples_of(Path("pairs"))
    assert re.search(rf"^pairs +{len(pairs)}$", report, re.MULTILINE)
    assert 12 < len(pairs) <= 24
    assert len(ShardDataset("pairs", DigitBackbone())) == len(pairs)
    assert write_page("pairs", "page.html").pairs == len(pairs)
    index = read_index("pairs")
    assert index.built_with["source"]["init_args"]["scenes"] == 12
    assert index.built_with["backbone"]["class_path"] == "realign_lightning.demos.DigitBackbone"
    card = Path("pairs/README.md").read_text()
    assert "# Digit scenes" in card
    assert "DigitScenes" in card
    assert str(inside) not in card
    before = bytes_of(Path("pairs"))
    assert digits() == 0
    assert "asked in this run, complete             0" in capsys.readouterr().out
    assert bytes_of(Path("pairs")) == before


def test_a_folder_of_pictures_and_nothing_else(inside, capsys):
    """The policy describes them, hallucinates on others, and pairs come out; one file is no picture."""
    Path("pictures").mkdir()
    for number in range(16):
        DigitScenes(16).world.scene(number).image.save(f"pictures/{number}.png")
    Path("pictures/broken.jpg").write_bytes(b"no picture")
    pictures = str(Path("pictures").absolute())
    source = ["--source", "realign_lightning.data.sources.ImageFolder", "--source.init_args.path", pictures]
    source += ["--source.init_args.prompt", "describe the image ."]
    responder = ["--builder.responder", "realign_lightning.engines.LocalEngine"]
    responder += ["--builder.responder.init_args.max_new_tokens", "48"]
    recipe = ["--config", str(RECIPES / "digits.yaml"), "--output", "pairs"]
    status = build(*recipe, *source, *responder)
    pairs = samples_of(Path("pairs"))
    assert status == 3, "the exit status tells of the broken file"
    assert "broken.jpg" in json.dumps(problems_of(Path("pairs")))
    assert len(pairs) >= 8
    assert all(sample.provenance["given"] == [] for sample in pairs.values())
    published = b"".join(bytes_of(Path("pairs")).values())
    assert b"ImageFolder" in published
    assert str(inside).encode() not in published, "no folder of this machine is published"
    out = capsys.readouterr()
    assert "asked in this run, answer" in out.out
    assert "1 records or images could not be used" in out.err


def test_photographs_by_their_recipe(inside, tmp_path_factory):
    photographs(Path("data/photos"), answers=True)
    checkpoint = make_tiny("smolvlm", tmp_path_factory.mktemp("photos") / "smolvlm")
    encoder = make_tiny_sentence_encoder(tmp_path_factory.mktemp("photos") / "encoder")
    arguments = ["--config", str(RECIPES / "photos.yaml"), "--backbone.init_args.path", str(checkpoint)]
    arguments += ["--builder.gate.init_args.similarity.init_args.model", str(encoder)]
    # Texts are nearly alike to random weights.
    assert build(*arguments, "--builder.gate.init_args.tau", "0.99999") == 0
    pairs = samples_of(Path("data/photo_pairs"))
    assert pairs
    for sample in pairs.values():
        # Masks with nothing between them are one blank.
        masked = re.sub(r"\[MASK\](?:\s+\[MASK\])+", "[MASK]", sample.provenance["masked"])
        pattern = re.escape(masked).replace(re.escape("[MASK]"), "(.+?)")
        assert re.fullmatch(pattern, sample.rejected, re.DOTALL), "all that was not masked is verbatim"
        assert sample.image.size == (320, 240)
    files = {path.read_bytes() for path in Path("data/photos").glob("*.jpg")}
    members = [data for name, data in stored_members(Path("data/photo_pairs")).items() if ".image." in name]
    assert set(members) <= files, "photographs pass through as they are"


def stored_members(folder: Path) -> dict[str, bytes]:
    from realign_lightning.data.scan import scan_shard

    found = {}
    for shard in sorted(folder.glob("*.tar")):
        for stored in scan_shard(shard):
            found |= stored.read()
    return found


def test_photographs_without_answers_of_a_policy_that_babbles(inside, tmp_path_factory, capsys):
    """A model of random weights never ends its answers: all are left out, and the exit status says so."""
    photographs(Path("data/photos"), answers=False)
    checkpoint = make_tiny("smolvlm", tmp_path_factory.mktemp("photos") / "smolvlm")
    encoder = make_tiny_sentence_encoder(tmp_path_factory.mktemp("photos") / "encoder")
    arguments = ["--config", str(RECIPES / "photos.yaml"), "--backbone.init_args.path", str(checkpoint)]
    arguments += ["--builder.gate.init_args.similarity.init_args.model", str(encoder)]
    assert build(*arguments, "--builder.responder.init_args.max_new_tokens", "5") == 1
    named = problems_of(Path("data/photo_pairs"))
    assert len(named) == 12
    assert all("max_new_tokens" in line["detail"] for line in named.values())
    assert "no pair came out" in capsys.readouterr().err


class Marker(BaseHTTPRequestHandler):
    """Marks the second word of every answer that it is asked to mask; is busy at first."""

    asked = 0

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked += 1
        if self.asked == 1:
            return self.reply(429, {"error": {"message": "busy"}})
        text = body["messages"][-1]["content"][-1]["text"]
        word = re.findall(r"Answer: (.*)\nReply:", text)[-1].split()[1]
        content = json.dumps([{"text": word, "kind": "object"}])
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 50, "completion_tokens": 10, "total_tokens": 60}
        return self.reply(
            200,
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage},
        )

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def endpoint():
    Marker.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Marker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_the_papers_setting_by_its_recipe(inside, tmp_path_factory, tiny_llava, endpoint):
    """Masks by an endpoint, images by a timm model, completions by the policy; random weights never end an answer."""
    photographs(Path("data/coco/train2014"), answers=False)
    rows = [
        {
            "id": str(number),
            "image": path.name,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is it?"},
                {"from": "gpt", "value": "a red bus stands beside two people."},
            ],
        }
        for number, path in enumerate(sorted(Path("data/coco/train2014").iterdir()))
    ]
    Path("data/llava_instruct_150k.json").write_text(json.dumps(rows))
    encoder = make_tiny_sentence_encoder(tmp_path_factory.mktemp("paper") / "encoder")
    tower = ["--builder.retriever.init_args.encoder.init_args.model", "vit_tiny_patch16_224"]
    tower += ["--builder.retriever.init_args.encoder.init_args.pretrained", "false"]
    arguments = ["--config", str(RECIPES / "llava_instruct.yaml"), "--trainer.accelerator", "cpu", *tower]
    arguments += ["--backbone.init_args.path", str(tiny_llava), "--backbone.init_args.dtype", "float32"]
    arguments += ["--builder.masker.init_args.engine.init_args.base_url", endpoint]
    arguments += ["--builder.gate.init_args.similarity.init_args.model", str(encoder)]
    arguments += ["--builder.completer.init_args.engine.init_args.max_new_tokens", "6"]
    assert build(*arguments) == 1
    named = problems_of(Path("data/realign_llava/train"))
    assert len(named) == 12
    assert {line["reason"] for line in named.values()} == {"no completion accepted"}
    assert {line["detail"] for line in named.values()} == {", ".join(["unfinished"] * 10)}
    (masks,) = Path("data/realign_llava/train.work/masks").glob("*/*.jsonl")
    assert json.loads(masks.read_text().splitlines()[0]).popitem()[1] == [[2, 5, "object"]]


def test_rejected_images_for_pairs_of_rlaif_v_by_its_recipe(inside, tiny_llava):
    import pyarrow as pa
    import pyarrow.parquet as pq

    photographs(Path("photos"), answers=False)
    columns = {
        "question": ["what is it?"] * 12,
        "chosen": ["a flower.", "a temple."] * 6,
        "rejected": ["a dog."] * 12,
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(Path("photos").iterdir())],
    }
    Path("data/rlaif_v").mkdir(parents=True)
    pq.write_table(pa.table(columns), "data/rlaif_v/part.parquet")
    arguments = ["--config", str(RECIPES / "rlaif_v.yaml"), "--trainer.accelerator", "cpu"]
    arguments += ["--backbone.init_args.path", str(tiny_llava), "--backbone.init_args.dtype", "float32"]
    assert build(*arguments, "--builder.calibrate", "false") == 0
    pairs = samples_of(Path("data/rlaif_v_pairs"))
    assert len(pairs) == 12
    for sample in pairs.values():
        assert sample.rejected == "a dog."
        assert sample.provenance["given"] == ["chosen", "rejected"]
        assert sample.provenance["retrieval_rank"] == 0
        assert sample.image.tobytes() != sample.retrieved.tobytes()
    status = build(*arguments)
    (band,) = Path("data/rlaif_v_pairs.work/bands").glob("*/*.jsonl")
    ((end, _, _),) = [value for line in band.read_text().splitlines() for value in json.loads(line).values()]
    scores = [sample.provenance["retrieval_score"] for sample in samples_of(Path("data/rlaif_v_pairs")).values()]
    assert status in (0, 1), "a band may leave nothing"
    assert status == 1 or max(scores) < end


# ---- plans


def test_a_plan_counts_all_and_writes_nothing(inside, capsys):
    prices = ["--price_per_million_read", "2.0", "--price_per_million_written", "8.0"]
    assert digits("--dry-run", *prices, scenes=60) == 0
    assert list(inside.iterdir()) == []
    plan = dict(re.findall(r"^(\S.*?)  +([\d.,]+)$", capsys.readouterr().out, re.MULTILINE))
    numbers = {name: float(value.replace(",", "")) for name, value in plan.items()}
    assert numbers["records"] == numbers["rejected responses to make"] == 120
    assert numbers["images to retrieve from"] == 60
    assert numbers["rows that cannot be read"] == numbers["chosen responses to generate"] == 0
    assert 60 <= numbers["pairs to expect"] <= 120
    assert 120 <= numbers["calls, complete"] <= 120 * 10
    assert numbers["hours"] > 0
    # 16 image tokens, and a few words.
    assert 20 < numbers["tokens read, complete"] / numbers["calls, complete"] < 60
    assert numbers["cost of what others answer"] == 0, "the policy on this machine has no price"


def masked_by(endpoint: str) -> list[str]:
    engine = "--builder.masker.init_args.engine"
    return [
        *("--builder.masker", "realign_lightning.preferences.LLMMasker"),
        *(engine, "realign_lightning.engines.EndpointEngine"),
        *(f"{engine}.init_args.model", "m", f"{engine}.init_args.base_url", endpoint),
    ]


def test_a_plan_costs_what_an_endpoint_is_asked_and_leaves_loading_out(inside, capsys, endpoint):
    """The endpoint says 50 tokens read and 10 written for every answer; its first reply is that it is busy."""
    prices = ["--price_per_million_read", "1000", "--price_per_million_written", "2000"]
    assert digits("--dry-run", *masked_by(endpoint), *prices, scenes=60) == 0
    plan = dict(re.findall(r"^(\S.*?)  +([\d.,]+)$", capsys.readouterr().out, re.MULTILINE))
    numbers = {name: float(value.replace(",", "")) for name, value in plan.items()}
    asked = numbers["calls, mask"]
    assert 60 <= asked <= 120, "equal answers are masked once"
    assert numbers["tokens read, mask"] == pytest.approx(50 * asked, abs=1)
    assert numbers["cost of what others answer"] == pytest.approx(asked * (50 * 1000 + 10 * 2000) / 1e6, abs=0.01)
    assert numbers["hours"] < 60 / 3600, "what is done once is not multiplied"


def test_answers_of_a_masking_endpoint_are_kept(inside, endpoint):
    assert digits(*masked_by(endpoint)) == 0
    asked = Marker.asked
    assert asked > 12
    assert digits(*masked_by(endpoint), "--builder.masker.init_args.fraction", "0.7") == 0
    assert Marker.asked == asked, "another choice among the same marks asks nothing"


def test_the_recipe_of_the_digits_is_what_the_quick_start_builds_with():
    policy = Policy(DigitBackbone())
    ours, theirs = digit_builder().stages, read_recipe(["--config", str(RECIPES / "digits.yaml")]).builder.stages
    for stages in (ours, theirs):
        stages.completer.engine.use(policy)
    for name in ("masker", "completer", "gate", "retriever"):
        assert getattr(ours, name).identity == getattr(theirs, name).identity
    assert (ours.seed, ours.batches, ours.calibrate) == (theirs.seed, theirs.batches, theirs.calibrate)


def test_a_plan_is_near_what_the_build_then_takes(inside, capsys):
    digits("--dry-run", scenes=60)
    plan = capsys.readouterr().out
    digits(scenes=60)
    report = capsys.readouterr().out
    planned = float(re.search(r"calls, complete +([\d,]+)", plan)[1].replace(",", ""))
    asked = float(re.search(r"completions tried +([\d,]+)", report)[1].replace(",", ""))
    assert planned == pytest.approx(asked, rel=0.5)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--builder.gate.init_args.scope", "word"], "scope"),
        (["--source.init_args.scenes", "1"], "at least 2"),
        (["--source", "NoSuchSource"], "NoSuchSource"),
        (["--builder.batches", "0"], "batches"),
        (["--builder.masker.init_args.fraction", "2"], "fraction"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(inside, arguments, message, capsys):
    try:
        status, told = digits(*arguments), ""
    except ValueError as error:
        status, told = 1, str(error)
    assert status != 0
    assert message in told + capsys.readouterr().err
    assert list(inside.iterdir()) == []


def test_without_a_policy_it_says_what_is_missing(inside):
    with pytest.raises(ValueError, match="give `backbone`"):
        digits("--backbone", "null")


def test_settings_that_are_refused_end_in_one_message(inside, run_module):
    """Also where the parser of recipes wraps the reason into one of its own."""
    command = ["realign_lightning", "build", "--config", RECIPES / "digits.yaml"]
    for arguments, message in (
        (["--builder.masker.init_args.fraction", "2"], "error: Expected `fraction` in (0, 1], got 2.0.\n"),
        (["--builder.gate.init_args.refusals", "['(']"], "error: Expected `refusals` to be regular expressions"),
        (["--output", "/proc/nothing/pairs"], "error: /proc/nothing"),
    ):
        said = run_module(*command, *arguments, folder=inside, statuses=[1])
        assert message in said
        assert "Traceback" not in said


def test_sigterm_ends_the_build_where_it_is(inside):
    command = [sys.executable, "-m", "realign_lightning", "build", "--config", str(RECIPES / "digits.yaml")]
    command += ["--source.init_args.scenes", "400", "--output", "pairs"]
    command += ["--builder.completer.init_args.engine.init_args.batch_size", "4"]
    environment = alone(PYTHONPATH=str(ROOT))
    with subprocess.Popen(command, env=environment) as running:  # noqa: S603
        answers = Path("pairs.work/answers")
        while running.poll() is None and not list(answers.glob("*/*.jsonl")):
            time.sleep(0.05)
        running.terminate()
        assert running.wait(20) == 143
    assert not Path("pairs").exists()
    assert len(next(answers.glob("*/*.jsonl")).read_text().splitlines()) < 100


def test_another_precision_gives_other_answers(inside):
    assert digits() == 0
    (one,) = Path("pairs.work/answers").iterdir()
    assert digits("--trainer.precision", "bf16-mixed") == 0
    assert len(list(Path("pairs.work/answers").iterdir())) == 2, f"answers beside {one} are used for no other precision"


# ---- several processes


@pytest.fixture
def in_processes(inside, run_module):
    def build(processes: int, output: str, *arguments: str) -> None:
        command = ["realign_lightning", "build", "--config", RECIPES / "digits.yaml"]
        command += ["--source.init_args.scenes", "20", "--output", output, *arguments]
        run_module(*command, processes=processes, folder=inside)

    return build


def test_the_quick_start_trains_on_two_devices(inside):
    """One process builds while the other waits."""
    environment = alone(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "realign_lightning", "fit", "--config", str(ROOT / "recipes" / "digits.yaml")]
    command += ["--data.builder.init_args.scenes", "10", "--data.builder.init_args.val_scenes", "4"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "2"]
    command += ["--trainer.callbacks", "null", "--data.batch_size", "4", "--trainer.val_check_interval", "2"]
    subprocess.run(command, check=True, timeout=240, env=environment)  # noqa: S603
    assert len(samples_of(Path("runs/digits/shards/train"))) >= 10


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_build_what_one_does(in_processes, strategy):
    file = str(ROOT / "configs" / "strategies" / "fsdp2.yaml") if strategy == "fsdp2" else strategy
    in_processes(1, "one")
    in_processes(2, "two", "--trainer.devices", "2", "--trainer.strategy", file)
    one, two = samples_of(Path("one")), samples_of(Path("two"))
    assert list(one) == list(two)
    for key, sample in one.items():
        other = two[key]
        assert (other.rejected, other.provenance["tried"]) == (sample.rejected, sample.provenance["tried"])
        assert other.retrieved.tobytes() == sample.retrieved.tobytes()
    (answers,) = Path("two.work/answers").iterdir()
    assert len(list(answers.glob("rank-*.jsonl"))) == 2, "both have asked"
    if strategy == "ddp":
        assert bytes_of(Path("one")) == bytes_of(Path("two"))
    again = bytes_of(Path("two"))
    in_processes(1, "two")
    assert bytes_of(Path("two")) == again, "one process goes on where two have been"
