import json
import re

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, LlavaProcessor

from realign_lightning.backbones import AutoBackbone
from realign_lightning.demos.policy import POLICY_FOLDER, build_policy, build_processor
from realign_lightning.demos.scenes import (
    DESCRIBE,
    DIGITS,
    DigitWorld,
    absent,
    answer,
    caption,
    fill_prompt,
    objects,
    question,
)
from realign_lightning.demos.teach import encode_lessons, lesson, main, measure, respond, teach
from realign_lightning.types import PreferenceSample

SCENES = DigitWorld("test", 0.0, 11).scenes(64)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(POLICY_FOLDER), AutoProcessor.from_pretrained(POLICY_FOLDER)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def user(text: str, image: bool = True) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def texts_of(scene) -> list[str]:
    masked = caption(scene, [0])
    return [
        DESCRIBE,
        caption(scene),
        masked,
        fill_prompt(masked),
        *map(question, DIGITS),
        *(answer(scene, digit) for digit in DIGITS),
    ]


# ---- processor


def test_every_text_of_the_world_is_known_word_by_word_and_decodes_to_itself(processor):
    tokenizer = processor.tokenizer
    for text in {text for scene in SCENES for text in texts_of(scene)}:
        ids = tokenizer(text, add_special_tokens=True)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == text.split()
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_spaces_before_punctuation_do_not_matter_and_unknown_words_are_unknown(processor):
    tokenizer = processor.tokenizer
    assert tokenizer("a red two at top left.") == tokenizer(" a red two  at top left . ")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a purple [MASK].")["input_ids"]) == ["a", "<unk>", "[MASK]", "."]


def test_the_mask_is_an_ordinary_word(processor):
    """Readers escape special tokens found in a user's text; the mask must survive that."""
    assert "[MASK]" not in processor.tokenizer.all_special_tokens
    ids = processor.tokenizer("a red [MASK] .", split_special_tokens=True)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "a red [MASK] ."


def test_one_user_turn_is_rendered_as_in_llava(processor):
    turns = [user(DESCRIBE)]
    assert processor.apply_chat_template(turns) == "<s>USER: <image> describe the image . "
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == "<s>USER: <image> describe the image . ASSISTANT: "


def test_several_turns_are_rendered_one_after_the_other(processor):
    turns = [
        user(question("two")),
        assistant("no ."),
        user(question("six"), image=False),
        assistant("yes at top left ."),
    ]
    assert processor.apply_chat_template(turns) == (
        "<s>USER: <image> is there a two in the image ? ASSISTANT: no . </s>"
        "USER: is there a six in the image ? ASSISTANT: yes at top left . </s>"
    )


def test_content_may_be_plain_text(processor):
    with_parts = [user("complete : a", image=False), assistant("no .")]
    with_text = [{"role": "user", "content": "complete : a"}, {"role": "assistant", "content": "no ."}]
    assert processor.apply_chat_template(with_text) == processor.apply_chat_template(with_parts)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "system", "content": "be brief"}, "a role must be user or assistant, not system"),
        ({"role": "user", "content": [{"type": "video"}]}, "not video"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "not image"),
    ],
)
def test_what_the_template_cannot_say_is_an_error(processor, message, complaint):
    with pytest.raises(TemplateError, match=complaint):
        processor.apply_chat_template([message])


def test_the_processor_writes_sixteen_image_tokens(processor):
    """A 32 x 32 image has (32 / 8) ** 2 = 16 patches."""
    prompt = processor.apply_chat_template([user(DESCRIBE)], add_generation_prompt=True)
    inputs = processor(images=SCENES[0].image, text=prompt, return_tensors="pt")
    expected = ["<s>", "USER", ":", *["<image>"] * 16, "describe", "the", "image", ".", "ASSISTANT", ":"]
    assert processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()) == expected
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_pixels_are_the_light_intensities_they_stand_for(processor):
    """Level 0 is -0.9 and level 255 is 1.9, linearly: 255 * 0.9 / 2.8 = 81.96 is black, so level 82 is almost 0."""
    image = Image.new("RGB", (32, 32), (0, 82, 255))
    pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    expected = torch.tensor([-0.9, 82 / 255 * 2.8 - 0.9, 1.9])[:, None, None].expand(3, 32, 32)
    torch.testing.assert_close(pixel_values, expected, atol=1e-6, rtol=0)


def test_scenes_are_neither_resized_nor_cropped(processor):
    pixel_values = processor.image_processor(SCENES[0].image, return_tensors="pt")["pixel_values"][0]
    levels = ((pixel_values + 0.9) / 2.8 * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(levels.numpy(), np.asarray(SCENES[0].image))


@pytest.mark.parametrize("size", [(64, 64), (50, 40), (1, 1)])
def test_other_images_become_squares_of_the_right_size(processor, size):
    image = Image.new("L", size, 100)
    assert processor.image_processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_processor_and_policy_survive_saving_exactly(tmp_path, processor):
    model = build_policy(3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded_model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaProcessor
    assert type(loaded.image_processor) is CLIPImageProcessor
    assert loaded.tokenizer.is_fast
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map
    assert loaded_model.generation_config.to_dict() == model.generation_config.to_dict()
    assert loaded_model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded_model.state_dict().items())
    lessons = [[(DESCRIBE, caption(scene))] for scene in SCENES[:5]]
    batch, again = (encode_lessons(each, SCENES[:5], lessons) for each in (processor, loaded))
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded_model(**batch).logits)


# ---- policy


def test_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = build_policy(1), build_policy(1), build_policy(2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


# ---- lessons


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_lessons_are_what_inference_sees_followed_by_response_and_end(processor, turns):
    """Independent of the template's own mask: every response follows the processor's prompt for the turns before it."""
    scene = SCENES[1]
    dialogue = [(question(digit), answer(scene, digit)) for digit in (*objects(scene), *absent(scene))[:turns]]
    batch = encode_lessons(processor, [scene], [dialogue])
    messages, labelled, end = [], set(), processor.tokenizer.eos_token_id
    for number, (prompt, response) in enumerate(dialogue):
        messages.append(user(prompt, image=number == 0))
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        prefix = processor(images=scene.image, text=text)["input_ids"][0]
        ids = prefix + processor.tokenizer(response)["input_ids"] + [end]
        assert batch["input_ids"][0, : len(ids)].tolist() == ids
        assert batch["labels"][0, len(prefix) : len(ids)].tolist() == ids[len(prefix) :]
        labelled |= set(range(len(prefix), len(ids)))
        messages.append(assistant(response))
    assert len(ids) == batch["input_ids"].shape[1]
    unlabelled = [position for position in range(len(ids)) if position not in labelled]
    assert (batch["labels"][0, unlabelled] == -100).all()


def test_our_backbone_reads_samples_exactly_as_they_were_taught(processor):
    scene, other = SCENES[1], SCENES[2]
    backbone = AutoBackbone(str(POLICY_FOLDER))
    for prompt, response in [(DESCRIBE, caption(scene)), (fill_prompt(caption(scene, [0])), caption(scene))]:
        lesson_batch = encode_lessons(processor, [scene], [[(prompt, response)]])
        sample = PreferenceSample("key", scene.image, other.image, prompt, response, caption(other))
        encoded = backbone.encode_sample(sample)
        assert torch.equal(encoded.chosen.tokens["input_ids"], lesson_batch["input_ids"][0])
        assert torch.equal(encoded.chosen.response_mask, lesson_batch["labels"][0] != -100)
        assert torch.equal(encoded.image["pixel_values"], lesson_batch["pixel_values"])


def test_padding_carries_no_label(processor):
    dialogues = [[(question("one"), "no .")], [(DESCRIBE, caption(SCENES[1]))]]
    batch = encode_lessons(processor, SCENES[:2], dialogues)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["attention_mask"] == 0).any()
    alone = encode_lessons(processor, SCENES[:1], dialogues[:1])
    assert torch.equal(batch["labels"][0, -alone["labels"].shape[1] :], alone["labels"][0])


def test_lessons_mix_captions_fills_and_balanced_questions():
    """3000 lessons: shares 0.30, 0.25, 0.45; half of the questions are about digits shown; 4 standard errors."""
    generator = np.random.default_rng(0)
    kinds = {"describe": 0, "complete": 0, "is": 0}
    verdicts = []
    for number in range(3000):
        scene = SCENES[number % len(SCENES)]
        turns = lesson(scene, generator)
        kind = turns[0][0].split()[0]
        kinds[kind] += 1
        if kind == "is":
            assert len(turns) == 4
            for prompt, response in turns:
                digit = re.fullmatch(r"is there a (\w+) in the image \?", prompt)[1]
                assert response == answer(scene, digit)
                verdicts.append(response.startswith("yes"))
            continue
        ((prompt, response),) = turns
        assert response == caption(scene)
        if kind == "complete":
            hidden = prompt.removeprefix("complete : ").split()
            assert "[MASK]" in hidden
            assert all(shown in (word, "[MASK]") for shown, word in zip(hidden, response.split(), strict=True))
    for kind, share in {"describe": 0.30, "complete": 0.25, "is": 0.45}.items():
        assert abs(kinds[kind] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    assert abs(np.mean(verdicts) - 0.5) < 4 * 0.5 / len(verdicts) ** 0.5


# ---- teaching


TINY = {"vision_steps": 3, "steps": 3, "vision_batch_size": 8, "batch_size": 4, "validation_scenes": 6}


def test_teaching_runs_end_to_end_and_reproduces_itself(tmp_path, one_thread):
    torch.manual_seed(1)
    report = teach(tmp_path / "first", seed=4, **TINY)
    torch.manual_seed(2)
    assert teach(tmp_path / "second", seed=4, **TINY) == report
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in POLICY_FOLDER.iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert set(report) == {"chair_i", "chair_s", "recall", "exact_match", "digits_per_caption", "yes_no_accuracy"}


def test_teaching_changes_the_whole_model(tmp_path, one_thread):
    teach(tmp_path / "taught", seed=4, **TINY)
    taught = AutoModelForImageTextToText.from_pretrained(tmp_path / "taught").state_dict()
    untaught = build_policy(4).state_dict()
    for part in ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"):
        assert any(not torch.equal(taught[name], untaught[name]) for name in taught if name.startswith(part))


def test_the_command_line_teaches(tmp_path, capsys, monkeypatch):
    seen = {}

    def record(**options):
        seen.update(options, threads=torch.get_num_threads())
        return {"recall": 0.5}

    monkeypatch.setattr("realign_lightning.demos.teach.teach", record)
    threads = torch.get_num_threads()
    main(["--output", str(tmp_path / "x"), "--seed", "3", "--steps", "7", "--vision-steps", "9"])
    numbers = {"seed": 3, "steps": 7, "vision_steps": 9, "skill_share": 0.0, "threads": 1}
    assert seen == {"output": tmp_path / "x", **numbers}
    assert torch.get_num_threads() == threads
    assert json.loads(capsys.readouterr().out) == {"recall": 0.5}


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="output must be a new or empty folder"):
        teach(tmp_path, **TINY)
    with pytest.raises(FileExistsError):
        teach(tmp_path / "precious.txt", **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vision_steps", 1),
        ("steps", 0),
        ("batch_size", 0),
        ("vision_batch_size", 0),
        ("validation_scenes", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("skew", 2.0),
    ],
)
def test_bad_settings_are_errors_before_anything_is_written(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        teach(tmp_path / "new", **{**TINY, name: value})
    assert not (tmp_path / "new").exists()


class Parrot:
    """Stands in for a policy: says to every scene what it was told to say, in order."""

    def __init__(self, processor, responses):
        self.processor, self.responses = processor, list(responses)

    def generate(self, input_ids, **kwargs):
        said = [self.responses.pop(0) + " </s>" for _ in input_ids]
        ids = self.processor.tokenizer(said, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], dim=1)


def test_measure_counts_as_chair_does(processor):
    """Scenes of digits {a, b} and {c}: captions "a x ." and "c .", x not shown.

    3 digits mentioned, 1 of them wrong: CHAIRi 1/3. 1 of 2 captions has a wrong one: CHAIRs 1/2. 2 of 3 digits shown
    are found: recall 2/3. The second caption is exact: 1/2. Answers "yes" to all 4 questions, half of them rightly.
    """
    two = next(scene for scene in SCENES if len(scene.digits) == 2)
    one = next(scene for scene in SCENES if len(scene.digits) == 1)
    first = f"a red {objects(two)[0]} at top left , a red {absent(two)[0]} at top right ."
    parrot = Parrot(processor, [first, caption(one), *["yes at top left ."] * 4])
    assert measure(parrot, processor, [two, one]) == pytest.approx(
        {
            "chair_i": 1 / 3,
            "chair_s": 1 / 2,
            "recall": 2 / 3,
            "exact_match": 1 / 2,
            "digits_per_caption": 3 / 2,
            "yes_no_accuracy": 1 / 2,
        }
    )


# ---- the shipped checkpoint


def test_the_shipped_files_are_few_small_and_name_no_place():
    files = {path.name: path for path in POLICY_FOLDER.iterdir()}
    assert set(files) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files["model.safetensors"].stat().st_size < 6e6
    for name, path in files.items():
        if name != "model.safetensors":
            assert path.stat().st_size < 10_000
            assert not re.search(r"_name_or_path|/home|/tmp|/root|/work|https?:", path.read_text())


def test_the_shipped_policy_is_a_llava_of_one_to_two_million_float32_parameters(shipped):
    model, _ = shipped
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    with safe_open(POLICY_FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


def test_the_shipped_processor_is_the_one_that_is_built(shipped, processor, tmp_path):
    processor = build_processor()
    processor.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        ours, theirs = path.read_text(), (POLICY_FOLDER / path.name).read_text()
        assert ours == theirs, path.name


def test_the_shipped_policy_describes_and_answers_unseen_handwriting(shipped):
    """Bounds far above chance and below perfection.

    A caption of 2.5 digits drawn blindly from ten finds a quarter of the digits shown; yes/no by chance is right in
    half of the cases. And it must still hallucinate, or preference learning would have nothing to do.
    """
    report = measure(*shipped, SCENES)
    assert report["recall"] > 0.6
    assert report["yes_no_accuracy"] > 0.6
    assert report["exact_match"] > 0.3
    assert 0.03 < report["chair_i"] < 0.3
    assert 2 < report["digits_per_caption"] < 3


def test_the_shipped_policy_fills_masks_and_keeps_the_other_words(shipped):
    masked = [caption(scene, range(len(scene.digits))) for scene in SCENES]
    filled = respond(*shipped, SCENES, [fill_prompt(text) for text in masked])
    kept = [re.sub("|".join(DIGITS), "[MASK]", text) == mask for text, mask in zip(filled, masked, strict=True)]
    assert np.mean(kept) > 0.8


def test_an_answer_does_not_depend_on_the_others_in_the_batch(shipped):
    digits = [objects(scene)[0] for scene in SCENES[:8]]
    prompts = [DESCRIBE if number % 2 else question(digit) for number, digit in enumerate(digits)]
    together = respond(*shipped, SCENES[:8], prompts)
    assert together == respond(*shipped, SCENES[:8], prompts, batch_size=1)
