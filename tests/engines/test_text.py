"""Answers of a language model on this machine, against its own forward, one token and one question at a time."""

import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from realign_lightning.engines import TextEngine
from realign_lightning.engines.base import Form, Question
from realign_lightning.preferences import LLMMasker, Masker, MaskError
from tests.conftest import picture
from tests.tiny_models import chatml_template, llama_tokenizer, qwen_tokenizer, text_arguments

PROMPTS = ["what is it?", "describe the image.", "how many buses are there, and where do they stand?", "yes or no"]
ROOT = Path(__file__).parents[2]


def make_checkpoint(folder: Path, template: str | None, kind: str = "llama", tokenizer=None, **changed) -> Path:
    """A tiny language model that ships the settings of drawing that models on the hub ship."""
    tokenizer = qwen_tokenizer([]) if tokenizer is None else tokenizer
    tokenizer.chat_template = template
    if kind == "llama":
        config = LlamaConfig(**text_arguments(tokenizer, **changed))
    else:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
        config = GPT2Config(vocab_size=len(tokenizer), **sizes, **changed)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ship(folder, tokenizer.eos_token_id)
    return folder


def ship(folder: Path, ends: int | list[int]) -> None:
    settings = {"do_sample": True, "temperature": 0.2, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.7}
    GenerationConfig(**settings, eos_token_id=ends).save_pretrained(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("text") / "chat", chatml_template(""))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("text") / "plain", None)


def engine_of(folder: Path, **settings) -> TextEngine:
    return TextEngine(str(folder), **{"device": "cpu", "max_new_tokens": 12, **settings})


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


class Reference:
    """The checkpoint's best guesses by its plain forward: no cache, no padding, no batch."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0, -1]

    def greedy(self, text: str, count: int, ends: tuple[int, ...] = ()) -> list[int]:
        """Tokens up to the first end token, which is the last of them, or `count` tokens."""
        ids, written = self.ids(text), []
        while len(written) < count and not (written and written[-1] in ends):
            written.append(int(self.logits(ids + written).argmax()))
        return written

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def reference(chat) -> Reference:
    return Reference(chat)


def test_best_guesses_are_the_forwards_whatever_the_checkpoint_ships(chat, reference):
    answers = engine_of(chat).answer([Question(prompt, seed=number) for number, prompt in enumerate(PROMPTS)])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        written = reference.greedy(chatml(("user", prompt)), 12, (reference.tokenizer.eos_token_id,))
        assert answer.text == reference.text(written)
        assert answer.error is None
        assert (answer.prompt_tokens, answer.new_tokens) == (len(reference.ids(chatml(("user", prompt)))), len(written))
        assert answer.finished == (written[-1] == reference.tokenizer.eos_token_id)


@pytest.mark.parametrize("sample", [False, True])
def test_an_answer_does_not_depend_on_its_batch(chat, sample):
    engine = engine_of(chat, sample=sample)
    asked = [Question(prompt, seed=number) for number, prompt in enumerate(PROMPTS)]
    together = engine.answer(asked)
    assert together == [engine.answer([question])[0] for question in asked]
    assert together == engine.answer(asked[::-1])[::-1]
    assert engine.answer([]) == []


def test_draws_are_those_of_the_seed_and_of_the_models_distribution(chat, reference):
    """Shares of 1500 first tokens, within four standard deviations of a binomial; the checkpoint ships top_k 3."""
    engine = engine_of(chat, sample=True, temperature=1.5, max_new_tokens=1)
    drawn = [answer.text for answer in engine.answer([Question(PROMPTS[0], seed=seed) for seed in range(1500)])]
    expected: dict[str, float] = {}
    probabilities = (reference.logits(reference.ids(chatml(("user", PROMPTS[0])))) / 1.5).softmax(dim=0)
    for token, probability in enumerate(probabilities.tolist()):
        text = reference.text([token])
        expected[text] = expected.get(text, 0.0) + probability
    common = {text: share for text, share in expected.items() if share > 0.01}
    assert len(common) > 3
    for text, share in common.items():
        assert abs(drawn.count(text) / 1500 - share) <= 4 * math.sqrt(share * (1 - share) / 1500)
    assert [answer.text for answer in engine.answer([Question(PROMPTS[0], seed=7)])] == [drawn[7]]


def test_every_end_token_of_the_checkpoint_ends_an_answer(chat, reference, tmp_path):
    written = reference.greedy(chatml(("user", PROMPTS[1])), 12)
    # A token that the model writes in the middle of this answer becomes one that ends answers.
    place = next(place for place in range(3, 12) if written[place] not in written[:place])
    folder = shutil.copytree(chat, tmp_path / "ends")
    ship(folder, [reference.tokenizer.eos_token_id, written[place]])
    cut, whole = engine_of(folder).answer([Question(PROMPTS[1]), Question(PROMPTS[0])])
    assert (cut.finished, cut.new_tokens) == (True, place + 1)
    assert cut.text == reference.text(written[:place])
    expected = reference.greedy(chatml(("user", PROMPTS[0])), 12, (reference.tokenizer.eos_token_id, written[place]))
    assert whole.new_tokens == len(expected)
    (short,) = engine_of(folder, max_new_tokens=place).answer([Question(PROMPTS[1])])
    assert (short.finished, short.new_tokens, short.text) == (False, place, reference.text(written[:place]))


def test_the_tokenizers_end_counts_too(chat, reference, tmp_path):
    """The model is made to write the tokenizer's end token, and the checkpoint names another one only."""
    written, end = reference.greedy(chatml(("user", PROMPTS[1])), 12), reference.tokenizer.eos_token_id
    place = next(place for place in range(3, 12) if written[place] not in written[:place])
    model = AutoModelForCausalLM.from_pretrained(chat)
    with torch.no_grad():
        pair = [written[place], end]
        model.lm_head.weight[pair] = model.lm_head.weight[pair[::-1]]
    folder = shutil.copytree(chat, tmp_path / "ends")
    model.save_pretrained(folder)
    ship(folder, len(reference.tokenizer) - 1)
    (answer,) = engine_of(folder).answer([Question(PROMPTS[1])])
    assert len(reference.tokenizer) - 1 not in [*written, end]
    assert (answer.finished, answer.new_tokens, answer.text) == (True, place + 1, reference.text(written[:place]))


@pytest.mark.parametrize("template", [None, "{{ bos_token }}USER: {{ messages[0].content }} ASSISTANT:"])
def test_a_prompt_starts_with_one_start_token(tmp_path, template):
    tokenizer = llama_tokenizer()
    reference = Reference(make_checkpoint(tmp_path / "start", template, tokenizer=tokenizer))
    # Without a start token in the text, this tokenizer sets a space before it.
    put = "<s> describe the image." if template is None else "<s>USER: describe the image. ASSISTANT:"
    (answer,) = engine_of(tmp_path / "start").answer([Question("describe the image.")])
    written = reference.greedy(put, 12, (tokenizer.eos_token_id,))
    assert reference.ids(put).count(tokenizer.bos_token_id) == 1
    assert answer.prompt_tokens == len(reference.ids(put))
    assert (answer.text, answer.new_tokens) == (reference.text(written), len(written))


def test_turns_and_system_are_put_as_the_template_says(chat, reference):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "where?"},
    ]
    of_its_own = [{"role": "system", "content": "long"}, {"role": "user", "content": "b"}]
    answers = engine_of(chat, system="be brief").answer([Question("b"), Question(turns), Question(of_its_own)])
    spoken = [("user", "a dog"), ("assistant", "yes"), ("user", "where?")]
    prompts = [
        chatml(("system", "be brief"), ("user", "b")),
        chatml(("system", "be brief"), *spoken),
        chatml(("system", "long"), ("user", "b")),
    ]
    assert [answer.prompt_tokens for answer in answers] == [len(reference.ids(prompt)) for prompt in prompts]
    ends = (reference.tokenizer.eos_token_id,)
    assert [answer.text for answer in answers] == [
        reference.text(reference.greedy(prompt, 12, ends)) for prompt in prompts
    ]
    assert isinstance(turns[0]["content"], list)
    assert len(turns) == 3


def test_without_a_template_the_prompt_is_plain_text(plain):
    reference = Reference(plain)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "where?"}]
    answers = engine_of(plain).answer([Question(PROMPTS[2]), Question(turns)])
    for prompt, answer in zip([PROMPTS[2], "be brief\n\nwhere?"], answers, strict=True):
        written = reference.greedy(prompt, 12, (reference.tokenizer.eos_token_id,))
        assert (answer.text, answer.new_tokens) == (reference.text(written), len(written))
        assert answer.prompt_tokens == len(reference.ids(prompt))
    (spoken,) = engine_of(plain).answer([Question([*turns, {"role": "assistant", "content": "a"}, turns[1]])])
    assert "no chat template" in spoken.error


def test_a_question_that_cannot_be_asked_does_not_stop_the_others(chat):
    engine = engine_of(chat)
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    bad = {
        "see no images, and the question": Question("what?", picture(0)),
        "see no images, and the prompt": Question(shown),
        "cannot be held to a form": Question("what?", form=Form(("a ", "."), (1,))),
        "special token '<|im_end|>'": Question("what is <|im_end|>?"),
        "must end with a user turn": Question([{"role": "assistant", "content": "a"}]),
        "a role and a text": Question([{"role": "user"}]),
    }
    good = [Question(prompt) for prompt in PROMPTS[:2]]
    answers = engine.answer([good[0], *bad.values(), good[1]])
    for message, answer in zip(bad, answers[1:-1], strict=True):
        assert message in answer.error
        assert (answer.text, answer.finished, answer.new_tokens) == ("", False, 0)
    assert [answers[0], answers[-1]] == engine.answer(good)


def test_a_template_that_refuses_is_an_error_of_the_question(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ 'a' }}"
    folder = make_checkpoint(tmp_path / "strict", template)
    system = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    refused, answered = engine_of(folder).answer([Question(system), Question("y")])
    assert "no system here" in refused.error
    assert answered.error is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_end_where_the_context_does(tmp_path, kind):
    """GPT-2 has no positions beyond its context: a step too far for any row would be an error of the batch."""
    room = {"max_position_embeddings": 40} if kind == "llama" else {"n_positions": 40}
    folder = make_checkpoint(tmp_path / kind, None, kind, **room)
    reference = Reference(folder)
    word = reference.tokenizer.decode(reference.ids("the")[:1])
    prompts = [word * 8, word * 35, word * 39, word * 40, word * 60]
    lengths = [len(reference.ids(prompt)) for prompt in prompts]
    assert lengths == [8, 35, 39, 40, 60]
    asked = [Question(prompt) for prompt in prompts]
    answers = engine_of(folder).answer(asked)
    ends = (reference.tokenizer.eos_token_id,)
    for prompt, answer, count in zip(prompts[:3], answers[:3], [12, 5, 1], strict=True):
        written = reference.greedy(prompt, count, ends)
        assert (answer.text, answer.new_tokens) == (reference.text(written), len(written))
        assert answer.finished == (written[-1] in ends)
    assert all(f"{length} tokens" in answer.error for length, answer in zip([40, 60], answers[3:], strict=True))


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        # What the authors of these ropes say: YaRN serves factor times what a model was made for.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        # Here another row of the batch changes all positions once it is longer than 32.
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}, 32),
        ({"rope_type": "linear", "factor": 4.0}, 64),
    ],
)
def test_the_context_of_stretched_positions(tmp_path, rope, expected):
    rope = {"rope_theta": 1e4, **rope}
    folder = make_checkpoint(tmp_path / "rope", None, max_position_embeddings=64, rope_parameters=rope)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    word = tokenizer.decode(tokenizer("the")["input_ids"][:1])
    fits, too_long = engine_of(folder).answer([Question(word * (expected - 1)), Question(word * expected)])
    assert (fits.error, fits.prompt_tokens, fits.new_tokens) == (None, expected - 1, 1)
    assert f"no room for an answer in {expected}" in too_long.error


def test_identity_is_the_model_not_its_place(chat, tmp_path):
    base = engine_of(chat).identity
    assert json.loads(json.dumps(base)) == base
    moved = shutil.copytree(chat, tmp_path / "moved")
    assert engine_of(moved, batch_size=3).identity == base
    for settings in (
        {"sample": True},
        {"max_new_tokens": 5},
        {"system": "be brief"},
        {"dtype": "bfloat16"},
    ):
        assert engine_of(moved, **settings).identity != base
    assert engine_of(moved, temperature=0.5).identity == base
    assert engine_of(moved, sample=True, temperature=0.5).identity != engine_of(moved, sample=True).identity


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_identity_changes_with_every_file_that_answers_depend_on(chat, tmp_path, name):
    changed = shutil.copytree(chat, tmp_path / "changed")
    with (changed / name).open("ab") as file:
        file.write(b" ")
    assert engine_of(changed).identity != engine_of(chat).identity


def test_a_name_on_the_hub_stands_for_its_commit(chat, tmp_path, monkeypatch, reference):
    commits = {"main": "a" * 40, "v1": "b" * 40}
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    for ref, commit in commits.items():
        (folder / "refs" / ref).write_text(commit)
        shutil.copytree(chat, folder / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    engine = engine_of("owner/name")
    identity = engine.identity
    assert (identity["model"], identity["revision"]) == ("owner/name", "a" * 40)
    assert engine_of("owner/name", revision="v1").identity["revision"] == "b" * 40
    assert engine_of("owner/name", revision="b" * 40).identity["revision"] == "b" * 40
    # The branch moves on to other weights: who answers is who was identified.
    (folder / "refs" / "main").write_text("c" * 40)
    (answer,) = engine.answer([Question(PROMPTS[0])])
    written = reference.greedy(chatml(("user", PROMPTS[0])), 12, (reference.tokenizer.eos_token_id,))
    assert answer.text == reference.text(written)
    with pytest.raises(OSError, match="'owner/other' cannot be loaded"):
        _ = engine_of("owner/other").identity


def test_places_without_a_model_are_named(tmp_path, chat):
    for place, found in ((tmp_path, "a folder without config.json"), (tmp_path / "none", "no such folder")):
        with pytest.raises(FileNotFoundError, match=found):
            engine_of(place).answer([Question("a")])
    torn = shutil.copytree(chat, tmp_path / "torn")
    config = json.loads((torn / "config.json").read_text())
    (torn / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks \d+ weights"):
        engine_of(torn).answer([Question("a")])


def test_a_checkpoint_without_an_end_is_refused(chat, tmp_path):
    folder = shutil.copytree(chat, tmp_path / "endless")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=AutoTokenizer.from_pretrained(chat).backend_tokenizer)
    tokenizer.save_pretrained(folder)
    ship(folder, None)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        engine_of(folder).answer([Question("a")])


def test_nothing_is_loaded_before_it_is_asked(tmp_path):
    assert TextEngine(str(tmp_path / "none")).batch_size == 16


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=rf"Expected `{next(iter(settings))}` to be above 0"):
        TextEngine("m", **settings)


def test_a_model_that_cannot_mask_gives_errors_and_no_spans(chat, reference, tmp_path):
    """A random model: what it writes is no masking of any response."""
    responses = ["A red bus.", "Two cats <|im_end|>", "A dog on a sofa."]
    cut = LLMMasker(engine_of(chat, max_new_tokens=4, batch_size=2))
    masks = cut.mask_many(["a", "b", "c"], responses)
    assert all(isinstance(mask, MaskError) for mask in masks)
    assert ["cut" in str(mask) for mask in masks] == [True, False, True]
    assert "special token" in str(masks[1])
    # The third word of its answer ends it: what came before is read, and found to be nonsense.
    written = reference.greedy(chatml(("user", cut.prompt(responses[0]))), 3)
    folder = shutil.copytree(chat, tmp_path / "ends")
    ship(folder, [reference.tokenizer.eos_token_id, written[2]])
    ended = LLMMasker(engine_of(folder))
    with pytest.raises(MaskError, match="no JSON list"):
        ended.mask("a", responses[0])
    assert ended.identity["engine"] == ended.engine.identity != cut.engine.identity


def test_the_example_of_the_docs(chat):
    blocks = (ROOT / "docs" / "masking.md").read_text().split("```")
    (block,) = (text for text in blocks if text.startswith("yaml") and "TextEngine" in text)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--masker", type=Masker)
    made = parser.instantiate(parser.parse_object(yaml.safe_load(block.removeprefix("yaml")))).masker
    assert isinstance(made, LLMMasker)
    assert isinstance(made.engine, TextEngine)
    assert made.engine.max_new_tokens == 512
