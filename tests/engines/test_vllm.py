"""Questions to vLLM, through a module that takes what vLLM takes and nothing else, and misbehaves as it does."""

import json
import shutil
import sys
import types
from dataclasses import dataclass, field

import huggingface_hub
import pytest
from PIL import Image

from realign_lightning.engines import EndpointEngine, VLLMEngine
from realign_lightning.engines.base import Answer, Form, Question
from realign_lightning.engines.chat_parts import chat_messages
from realign_lightning.types import SampleError
from tests.conftest import picture


@dataclass
class SamplingParams:
    """The arguments that are used here, with vLLM's own defaults."""

    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class Refusing:
    """What a fake LLM saw, and whether it keeps questions of refused batches, as older versions of vLLM do."""

    keeps: bool = False
    calls: list[list[str]] = field(default_factory=list)
    made: dict = field(default_factory=dict)
    taken: list[tuple] = field(default_factory=list)


def fake_vllm(state: Refusing) -> types.ModuleType:
    class LLM:
        # Names as in vllm/entrypoints/llm.py; `max_model_len` is one of the EngineArgs that it also takes.
        def __init__(
            self,
            model: str,
            *,
            revision: str | None = None,
            tokenizer_revision: str | None = None,
            dtype: str = "auto",
            tensor_parallel_size: int = 1,
            gpu_memory_utilization: float = 0.9,
            enforce_eager: bool = False,
            max_model_len: int | None = None,
        ) -> None:
            state.made = {name: value for name, value in locals().items() if name not in ("self", "state")}
            self.waiting: list[RequestOutput] = []
            self.count = 0

        def chat(
            self,
            messages,
            sampling_params=None,
            use_tqdm=True,
            lora_request=None,
            chat_template=None,
            chat_template_content_format="auto",
            add_generation_prompt=True,
            continue_final_message=False,
            tools=None,
            chat_template_kwargs=None,
            tokenization_kwargs=None,
            mm_processor_kwargs=None,
        ) -> list[RequestOutput]:
            assert use_tqdm is False
            assert isinstance(sampling_params, list)
            assert len(sampling_params) == len(messages)
            assert all(isinstance(chat, list) for chat in messages), "several conversations, not one"
            state.calls.append([last_text(chat) for chat in messages])
            added = []
            for chat, sampling in zip(messages, sampling_params, strict=True):
                try:
                    added.append(self.request(chat, sampling))
                except Exception:
                    self.waiting += added if state.keeps else []
                    raise
            self.waiting += added
            done, self.waiting = self.waiting, []
            return done

        def request(self, chat, sampling) -> RequestOutput:
            assert isinstance(sampling, SamplingParams)
            text = last_text(chat)
            if "too long" in text:
                raise ValueError("The decoder prompt is longer than the maximum model length")
            if "odd" in text:
                raise RuntimeError("Expected there to be 1 prompt updates")
            state.taken.append((chat, sampling))
            self.count += 1
            reason = "length" if "story" in text else "abort" if "stopped" in text else "stop"
            output = CompletionOutput(0, f" {text.upper()}\n", [1] * len(text.split()), reason)
            return RequestOutput(str(self.count), [7, 8, 9], [output])

    def last_text(chat) -> str:
        assert all(set(turn) == {"role", "content"} for turn in chat)
        parts = [part for turn in chat for part in turn["content"]]
        for part in parts:
            # As vLLM reads them: the type names the field.
            if part["type"] not in ("text", "image_pil"):
                raise NotImplementedError(f"Unknown part type: {part['type']}")
            assert set(part) == {"type", part["type"]}
            assert part["type"] == "text" or isinstance(part["image_pil"], Image.Image)
        return [part["text"] for part in parts if part["type"] == "text"][-1]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    return module


@pytest.fixture
def state(monkeypatch) -> Refusing:
    state = Refusing()
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(state))
    return state


@pytest.fixture
def engine(state, tiny_llava):
    return VLLMEngine(str(tiny_llava))


def test_all_questions_in_one_call_each_with_its_seed(state, tiny_llava):
    engine = VLLMEngine(str(tiny_llava), temperature=0.7, max_new_tokens=33)
    answers = engine.answer([Question(f"word {number}", seed=number + 10) for number in range(5)])
    assert answers == [Answer(f"WORD {number}", True, None, 3, 2) for number in range(5)]
    assert len(state.calls) == 1
    assert [sampling for _, sampling in state.taken] == [SamplingParams(0.7, seed, 33) for seed in range(10, 15)]
    assert engine.answer([]) == []
    assert len(state.calls) == 1


def test_greedy_by_default(state, engine):
    engine.answer([Question("a", seed=3)])
    assert state.taken[0][1] == SamplingParams(0.0, None, 256)


def test_the_image_goes_where_the_prompt_shows_it(state, engine):
    chat = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "look"}, {"type": "image"}, {"type": "text", "text": "so"}],
        },
    ]
    shown = picture(3)
    pale = Image.new("LA", (4, 4), (200, 128))
    answers = engine.answer(
        [Question("what is it?", shown), Question(chat, shown), Question("no"), Question("a", pale)]
    )
    assert all(answer.error is None for answer in answers)
    plain, late, without, converted = (messages for messages, _ in state.taken)
    assert [part["type"] for part in plain[0]["content"]] == ["image_pil", "text"]
    assert [part["type"] for part in late[1]["content"]] == ["text", "image_pil", "text"]
    assert late[0]["content"] == [{"type": "text", "text": "be brief"}]
    assert without == [{"role": "user", "content": [{"type": "text", "text": "no"}]}]
    assert plain[0]["content"][0]["image_pil"].tobytes() == shown.tobytes()
    assert converted[0]["content"][0]["image_pil"].mode == "RGB"
    assert chat[1]["content"][1] == {"type": "image"}


@pytest.mark.parametrize("keeps", [False, True])
def test_what_vllm_refuses_does_not_stop_the_others(state, engine, keeps):
    state.keeps = keeps
    texts = ["one", "two", "too long", "three", "story", "odd", "four", "stopped"]
    answers = engine.answer([Question(text) for text in texts])
    assert [answer.text for answer in answers] == ["ONE", "TWO", "", "THREE", "STORY", "", "FOUR", ""]
    assert answers[2].error.startswith("ValueError: The decoder prompt is longer")
    assert answers[5].error.startswith("RuntimeError: Expected there to be 1")
    assert "abort" in answers[7].error
    assert [answer.finished for answer in answers] == [True, True, False, True, False, False, True, False]
    assert [answer.error is None for answer in answers] == [bool(answer.text) for answer in answers]
    refused = [Question("too long"), Question("odd")]
    assert [answer.error is None for answer in engine.answer(refused)] == [False, False]
    assert [answer.text for answer in engine.answer([Question("five"), Question("six")])] == ["FIVE", "SIX"]


def test_one_bad_question_costs_few_calls(state, engine):
    """32 questions are halved five times, and each time both halves are asked: 1 + 2 * 5 calls."""
    answers = engine.answer([Question("too long" if number == 11 else f"{number}") for number in range(32)])
    assert [number for number, answer in enumerate(answers) if answer.error] == [11]
    assert [answer.text for answer in answers] == ["" if number == 11 else f"{number}" for number in range(32)]
    assert len(state.calls) == 11


def test_a_question_that_cannot_be_asked_does_not_reach_vllm(state, engine):
    given = [
        Question("a"),
        Question("b", form=Form(("a ", "."), (1,))),
        Question([{"role": "user"}]),
        Question([{"role": "assistant", "content": "c"}], picture(0)),
        Question("d"),
    ]
    answers = engine.answer(given)
    assert [answer.text for answer in answers] == ["A", "", "", "", "D"]
    assert "cannot be held to a form" in answers[1].error
    assert "a role and a text" in answers[2].error
    assert "no user's turn" in answers[3].error
    assert state.calls == [["a", "d"]]


def test_a_prompt_that_shows_an_image_needs_one(state, engine):
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    without, other = engine.answer([Question(shown), Question("a")])
    assert "Unknown part type: image" in without.error
    assert other.text == "A"


def test_the_model_is_made_once_and_as_it_was_asked_for(state, tiny_llava):
    settings = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "max_model_len": 512, "dtype": "float16"}
    engine = VLLMEngine(str(tiny_llava), **settings, options={"enforce_eager": True})
    assert state.made == {}
    engine.answer([Question("a")])
    made = {"model": str(tiny_llava), "revision": None, "tokenizer_revision": None, "enforce_eager": True, **settings}
    assert state.made == made
    state.made = {}
    engine.answer([Question("b")])
    assert state.made == {}


def test_a_name_on_the_hub_stands_for_its_commit(state, tiny_llava, tmp_path, monkeypatch):
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tiny_llava, folder / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    engine = VLLMEngine("owner/name")
    assert (engine.identity["model"], engine.identity["revision"]) == ("owner/name", "a" * 40)
    (folder / "refs" / "main").write_text("b" * 40)
    engine.answer([Question("a")])
    assert (state.made["model"], state.made["revision"], state.made["tokenizer_revision"]) == (
        "owner/name",
        "a" * 40,
        "a" * 40,
    )


def test_identity_is_what_answers_depend_on(tiny_llava, tmp_path):
    base = VLLMEngine(str(tiny_llava)).identity
    assert json.loads(json.dumps(base)) == base
    moved = shutil.copytree(tiny_llava, tmp_path / "moved")
    spread = {"batch_size": 3, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}
    assert VLLMEngine(str(moved), **spread).identity == base
    for change in (
        {"max_new_tokens": 5},
        {"temperature": 0.3},
        {"dtype": "float16"},
        {"max_model_len": 64},
        {"options": {"quantization": "fp8"}},
    ):
        assert VLLMEngine(str(moved), **change).identity != base
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json"):
        with (moved / name).open("ab") as file:
            file.write(b" ")
        changed = VLLMEngine(str(moved)).identity
        assert changed != base
        base = changed


def test_without_vllm_it_is_said_where_to_get_it(monkeypatch, tiny_llava):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install vllm into an environment of its own.*EndpointEngine"):
        VLLMEngine(str(tiny_llava)).answer([Question("a")])


def test_a_vllm_that_is_broken_says_so_itself(monkeypatch, tmp_path, tiny_llava):
    (tmp_path / "vllm.py").write_text("import nothing_of_this_name\n")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        VLLMEngine(str(tiny_llava)).answer([Question("a")])


@pytest.mark.parametrize(
    "settings",
    [
        *({name: 0} for name in ("tensor_parallel_size", "batch_size", "max_new_tokens", "max_model_len")),
        {"gpu_memory_utilization": 0.0},
        {"gpu_memory_utilization": 1.5},
        {"temperature": -0.1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=rf"Expected `{next(iter(settings))}`"):
        VLLMEngine("m", **settings)


class TestChatMessages:
    PHOTO = {"type": "photo", "photo": 1}  # noqa: RUF012

    def test_every_place_that_shows_the_image_gets_it(self):
        prompt = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": ({"type": "text", "text": "c"}, {"type": "image"})},
        ]
        before = json.dumps(prompt)
        messages = chat_messages(prompt, self.PHOTO)
        assert messages[0]["content"] == [self.PHOTO, {"type": "text", "text": "a"}]
        assert messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
        assert messages[2]["content"] == [{"type": "text", "text": "c"}, self.PHOTO]
        assert json.dumps(prompt) == before

    def test_the_first_user_sees_it_where_nothing_shows_it(self):
        parts = [{"type": "text", "text": "a"}]
        prompt = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": parts},
            {"role": "user", "content": "b"},
        ]
        messages = chat_messages(prompt, self.PHOTO)
        assert parts == [{"type": "text", "text": "a"}], "what was given is not changed"
        assert [len(message["content"]) for message in messages] == [1, 2, 1]
        assert messages[1]["content"][0] == self.PHOTO

    @pytest.mark.parametrize(
        "turn", [{"content": "a"}, {"role": "user"}, {"role": "user", "content": 3}, {"role": "user", "content": [{}]}]
    )
    def test_other_things_are_refused(self, turn):
        with pytest.raises(SampleError, match="a role and a text or a list of parts"):
            chat_messages([turn])

    def test_an_endpoint_is_not_asked_either(self):
        engine = EndpointEngine("m", "http://127.0.0.1:9/v1", retries=0, timeout=2.0)
        (answer,) = engine.answer([Question([{"role": "assistant", "content": "c"}], picture(0))])
        assert answer == Answer("", False, "the prompt has no user's turn that could show the image")
