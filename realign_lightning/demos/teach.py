"""Teaches the policy of the digit scenes from nothing: its vision tower first, then describing, answering and filling.

The world of the lessons is skewed, and teaching stops while the policy still hallucinates: it leans on which digits go
together where its eyes are not sure. That is the policy that preference learning starts from.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from realign_lightning.demos.policy import PATCH_SIZE, build_policy, build_processor
from realign_lightning.demos.scenes import (
    CELLS,
    DESCRIBE,
    DIGITS,
    IMAGE_SIZE,
    INKS,
    VOCABULARY,
    DigitWorld,
    Scene,
    absent,
    answer,
    caption,
    fill_prompt,
    objects,
    question,
)
from realign_lightning.demos.skills import SKILL_VOCABULARY, DigitSkills, Skill, ask, large_scene, skill_scene

_log = logging.getLogger(__name__)

Turn = tuple[str, str]
"""A prompt and the response to it."""

CAPTION_SHARE, FILL_SHARE = 0.30, 0.25
"""Shares of the lessons that describe a scene and that fill masks; the others answer yes/no questions."""

MASK_PROBABILITY = 0.75
"""Probability with which a digit word of a fill lesson is hidden."""

QUESTIONS_PER_LESSON = 4
"""Questions of one yes/no lesson, asked one after the other about one scene."""

VERDICT_WEIGHT = 3.0
"""Weight in the loss of the words yes and no; every other word has 1."""

_EMPTY = len(DIGITS)
_IGNORED = -100


def teach(
    output: str | Path,
    seed: int = 0,
    vision_steps: int = 900,
    steps: int = 600,
    vision_batch_size: int = 128,
    batch_size: int = 48,
    learning_rate: float = 2e-3,
    skew: float = 0.9,
    noise: float = 0.3,
    validation_scenes: int = 300,
    skill_share: float = 0.0,
) -> dict[str, float]:
    """Teach a policy and save it with its processor, in the format of transformers.

    The default takes about five minutes on one processor core. With one thread and one seed the weights are the same
    to the last bit on every run on one machine.

    Args:
        output: folder for the checkpoint; made if needed, must be empty.
        seed: of weights, scenes and lessons.
        vision_steps: optimizer steps of the vision tower, at least 3.
        steps: optimizer steps of projector and language model, at least 3.
        vision_batch_size: scenes per step of the vision tower.
        batch_size: lessons per step of projector and language model.
        learning_rate: highest learning rate of both cycles.
        skew: skew of the world of the lessons.
        noise: noise of all scenes.
        validation_scenes: scenes of a balanced validation world that the report is measured on.
        skill_share: share of the lessons, and a quarter of it of the vision tower's scenes, that are about the skills
            of :mod:`~realign_lightning.demos.skills`; above 0 the tokenizer knows their words.

    Returns:
        The numbers of :func:`measure`; with skills also those of :class:`~realign_lightning.demos.DigitSkills`, as
        shares.

    Raises:
        ValueError: if a count is too small or the learning rate is not positive.
        FileExistsError: if ``output`` is a file or a folder with something in it.
    """
    _check_arguments(vision_steps, steps, vision_batch_size, batch_size, learning_rate, validation_scenes)
    if not 0 <= skill_share < 1:
        raise ValueError(f"skill_share must be at least 0 and below 1, but is {skill_share}")
    world = DigitWorld("train", skew, seed, noise)
    validation = DigitWorld("validation", 0.0, seed, noise).scenes(validation_scenes)
    output = Path(output)
    _make_empty_folder(output)
    words = SKILL_VOCABULARY if skill_share else VOCABULARY
    model, processor = build_policy(seed, words), build_processor(words)
    model.train()
    large = skill_share / 4
    teach_vision(model, processor, world, vision_steps, vision_batch_size, learning_rate, large)
    # Scenes that the vision tower has not been taught on.
    start = vision_steps * vision_batch_size
    teach_language(model, processor, world, steps, batch_size, learning_rate, start, skill_share)
    model.train(False)
    report = measure(model, processor, validation)
    if skill_share:
        report |= _measure_skills(model, processor, DigitSkills(validation_scenes, "validation", seed=seed))
    _log.info("taught with seed %d; on %d validation scenes: %s", seed, validation_scenes, report)
    model.save_pretrained(output)
    # A fresh one: a used tokenizer would save the padding of its last call.
    build_processor(words).save_pretrained(output)
    return report


def teach_vision(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world: DigitWorld,
    steps: int,
    batch_size: int,
    learning_rate: float,
    large_share: float = 0.0,
) -> None:
    """Teach the vision tower to tell digit and ink of every cell: the stand-in for CLIP's pretraining.

    A linear probe on the mean of a cell's patch features is taught together with the tower and then dropped.

    Args:
        model: its vision tower is changed in place.
        processor: the policy's processor.
        world: where scenes come from, from scene 0 on.
        steps: optimizer steps.
        batch_size: scenes per step.
        learning_rate: highest learning rate of the cycle.
        large_share: share of the scenes that one digit fills; it is in all of their cells then.
    """
    tower = model.model.vision_tower
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        probe = nn.Linear(tower.config.hidden_size, len(DIGITS) + 1 + len(INKS))
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer, scheduler = _one_cycle(parameters, learning_rate, steps, warm_up=0.15)
    for step in tqdm(range(steps), desc="teaching the vision tower", unit="step"):
        scenes = world.scenes(batch_size, start=step * batch_size)
        for row in range(round(large_share * batch_size)):
            scenes[row] = _everywhere(large_scene(world, step * batch_size + row))
        pixels = processor.image_processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
        patches = tower(pixel_values=pixels).last_hidden_state[:, 1:]
        digit_logits, ink_logits = probe(_cell_features(patches)).split([len(DIGITS) + 1, len(INKS)], dim=-1)
        digits, inks = _cell_labels(scenes)
        loss = functional.cross_entropy(digit_logits.flatten(0, 1), digits.flatten())
        loss = loss + 0.3 * functional.cross_entropy(ink_logits.flatten(0, 1), inks.flatten(), ignore_index=_IGNORED)
        _update(parameters, loss, optimizer, scheduler)


def teach_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world: DigitWorld,
    steps: int,
    batch_size: int,
    learning_rate: float,
    start: int = 0,
    skill_share: float = 0.0,
) -> None:
    """Teach projector and language model by plain SFT on :func:`lesson` responses; the vision tower stays as it is.

    Args:
        model: changed in place.
        processor: the policy's processor.
        world: where scenes come from; its seed also decides the lessons.
        steps: optimizer steps.
        batch_size: lessons per step.
        learning_rate: highest learning rate of the cycle.
        start: number of the first scene.
        skill_share: share of the lessons that are about a skill, each as often.
    """
    generator = np.random.default_rng((world.seed, start))
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, scheduler = _one_cycle(parameters, learning_rate, steps, warm_up=0.1)
    for step in tqdm(range(steps), desc="teaching to describe and answer", unit="step"):
        scenes = world.scenes(batch_size, start=start + step * batch_size)
        lessons = [lesson(scene, generator) for scene in scenes]
        for row in range(round(skill_share * batch_size)):
            number = start + step * batch_size + row
            scenes[row], lessons[row] = _skill_lesson(world, number, generator)
        batch = encode_lessons(processor, scenes, lessons)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none")
        weights = _token_weights(processor, labels)
        _update(parameters, (losses * weights).sum() / weights.sum(), optimizer, scheduler)
    model.model.vision_tower.requires_grad_(True)


def lesson(scene: Scene, generator: np.random.Generator) -> list[Turn]:
    """One lesson about a scene: its caption, a masked caption to complete, or balanced yes/no questions.

    Args:
        scene: what the lesson is about.
        generator: decides the kind of lesson, what is masked and what is asked.

    Returns:
        The turns of one conversation.
    """
    kind = generator.random()
    if kind < CAPTION_SHARE:
        return [(DESCRIBE, caption(scene))]
    if kind < CAPTION_SHARE + FILL_SHARE:
        masked = np.flatnonzero(generator.random(len(scene.digits)) < MASK_PROBABILITY).tolist()
        masked = masked or [int(generator.integers(len(scene.digits)))]
        return [(fill_prompt(caption(scene, masked)), caption(scene))]
    asked = [
        str(generator.choice(objects(scene) if generator.random() < 0.5 else absent(scene)))
        for _ in range(QUESTIONS_PER_LESSON)
    ]
    return [(question(digit), answer(scene, digit)) for digit in asked]


def _skill_lesson(world: DigitWorld, number: int, generator: np.random.Generator) -> tuple[Scene, list[Turn]]:
    skill: Skill = get_args(Skill)[generator.integers(len(get_args(Skill)))]
    scene = skill_scene(skill, world, number)
    return scene, [ask(skill, scene, generator)]


def _everywhere(scene: Scene) -> Scene:
    """A large scene for lessons that are about cells."""
    return Scene(scene.image, tuple(scene.digits[0]._replace(cell=cell) for cell in CELLS))


def encode_lessons(
    processor: LlavaProcessor, scenes: Sequence[Scene], lessons: Sequence[Sequence[Turn]]
) -> dict[str, Tensor]:
    """Model inputs and labels of conversations about scenes, all made by the processor and its chat template.

    Args:
        processor: the policy's processor.
        scenes: B scenes.
        lessons: the turns of B conversations, one per scene; the image goes before the first prompt.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (B, L), and ``pixel_values`` (B, 3, H, W). Labels are the ids
        of responses, their end tokens included, and -100 elsewhere.
    """
    batch: Any = processor.apply_chat_template(
        [_conversation(scene, turns) for scene, turns in zip(scenes, lessons, strict=True)],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        # With torch's tensors the processor goes through the ids one by one: four times slower (transformers 5).
        return_tensors="np",
        processor_kwargs={"padding": True},
    )
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    is_response = tensors.pop("assistant_masks").bool()
    return {**tensors, "labels": tensors["input_ids"].masked_fill(~is_response, _IGNORED)}


def respond(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[Scene],
    prompts: Sequence[str],
    batch_size: int = 128,
) -> list[str]:
    """Greedy responses of a policy to one prompt about each scene.

    Args:
        model: the policy.
        processor: its processor.
        scenes: the scenes asked about.
        prompts: one per scene.
        batch_size: scenes per call of the model.
    """
    responses: list[str] = []
    for first in tqdm(range(0, len(scenes), batch_size), desc="answering", unit="batch", leave=False):
        part = slice(first, first + batch_size)
        inputs: Any = processor.apply_chat_template(
            [_conversation(scene, [(prompt, None)]) for scene, prompt in zip(scenes[part], prompts[part], strict=True)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        generated = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]  # type: ignore[misc]
        responses += processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return responses


def measure(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: Sequence[Scene]
) -> dict[str, float]:
    """How well a policy describes scenes and answers about them, decoded greedily.

    Args:
        model: the policy.
        processor: its processor.
        scenes: at least one scene.

    Returns:
        Shares between 0 and 1, and one mean: ``chair_i`` of the mentioned digits that are not in the scene,
        ``chair_s`` of the captions with such a digit, ``recall`` of the digits shown that are mentioned,
        ``exact_match`` of the captions equal to the true one, ``digits_per_caption``, and ``yes_no_accuracy`` on one
        digit that is there and one that is not, per scene. Digits mentioned twice count twice in ``chair_i``.
    """
    captions = respond(model, processor, scenes, [DESCRIBE] * len(scenes))
    mentioned = [[word for word in text.split() if word in DIGITS] for text in captions]
    shown = [objects(scene) for scene in scenes]
    wrong = [[word for word in words if word not in truth] for words, truth in zip(mentioned, shown, strict=True)]
    found = [set(words) & set(truth) for words, truth in zip(mentioned, shown, strict=True)]
    generator = np.random.default_rng(0)
    asked = [str(generator.choice(choices(scene))) for choices in (objects, absent) for scene in scenes]
    verdicts = respond(model, processor, [*scenes, *scenes], [question(digit) for digit in asked])
    right = [
        verdict.split()[:1] == answer(scene, digit).split()[:1]
        for verdict, scene, digit in zip(verdicts, [*scenes, *scenes], asked, strict=True)
    ]
    mentions = sum(map(len, mentioned))
    return {
        "chair_i": sum(map(len, wrong)) / max(mentions, 1),
        "chair_s": float(np.mean([bool(words) for words in wrong])),
        "recall": sum(map(len, found)) / sum(map(len, shown)),
        "exact_match": float(np.mean([text == caption(scene) for text, scene in zip(captions, scenes, strict=True)])),
        "digits_per_caption": mentions / len(scenes),
        "yes_no_accuracy": float(np.mean(right)),
    }


def _measure_skills(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, skills: DigitSkills
) -> dict[str, float]:
    _, scenes, prompts, _ = zip(*skills.asked, strict=True)
    answers = respond(model, processor, scenes, prompts)
    return {name: value / 100 for name, value in skills.score(answers).items()}


def main(args: Sequence[str] | None = None) -> None:
    """Command line of :func:`teach`: teaches a policy and writes its report to standard output as JSON.

    Args:
        args: command-line arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="realign-lightning teach-digits", description="Teach the policy of the digit scenes from nothing."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and lessons (default: %(default)s)")
    parser.add_argument(
        "--vision-steps", type=int, default=900, help="steps of the vision tower (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=600, help="steps of the language model (default: %(default)s)")
    parser.add_argument(
        "--skill-share",
        type=float,
        default=0.0,
        help="share of the lessons that are about counting, inks, places and large digits (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="processor threads; other numbers change the weights (default: 1)"
    )
    options = vars(parser.parse_args(args))
    threads = torch.get_num_threads()
    torch.set_num_threads(options.pop("threads"))
    try:
        report = teach(**options)
    finally:
        torch.set_num_threads(threads)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _check_arguments(
    vision_steps: int,
    steps: int,
    vision_batch_size: int,
    batch_size: int,
    learning_rate: float,
    validation_scenes: int,
) -> None:
    lowest = {
        "vision_steps": (vision_steps, 3),
        "steps": (steps, 3),
        "vision_batch_size": (vision_batch_size, 1),
        "batch_size": (batch_size, 1),
        "validation_scenes": (validation_scenes, 1),
    }
    for name, (value, minimum) in lowest.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, but is {value}")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive and finite, but is {learning_rate}")


def _make_empty_folder(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise FileExistsError(f"output must be a new or empty folder, but {output} holds files; choose another one")


def _conversation(scene: Scene, turns: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for prompt, response in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": prompt}]})
        if response is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
    messages[0]["content"].insert(0, {"type": "image", "image": scene.image})
    return messages


def _one_cycle(
    parameters: list[nn.Parameter], learning_rate: float, steps: int, warm_up: float
) -> tuple[torch.optim.Optimizer, OneCycleLR]:
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    # OneCycleLR divides by zero when a phase has no step.
    share = max(warm_up, 2 / steps)
    return optimizer, OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=share)


def _update(
    parameters: list[nn.Parameter], loss: Tensor, optimizer: torch.optim.Optimizer, scheduler: OneCycleLR
) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    scheduler.step()


def _cell_features(patches: Tensor) -> Tensor:
    """(B, patches, D) features of patches in reading order to (B, cells, D): their means over the cells of the grid."""
    side = IMAGE_SIZE // PATCH_SIZE
    grid = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
    return functional.avg_pool2d(grid, kernel_size=side // 2).flatten(2).transpose(1, 2)


def _cell_labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Digit class, or ``_EMPTY``, and ink class, or ``_IGNORED``, of every cell; both (B, cells) int64."""
    digits = torch.full((len(scenes), len(CELLS)), _EMPTY)
    inks = torch.full((len(scenes), len(CELLS)), _IGNORED)
    for row, scene in enumerate(scenes):
        for placed in scene.digits:
            cell = CELLS.index(placed.cell)
            digits[row, cell] = DIGITS.index(placed.digit)
            inks[row, cell] = list(INKS).index(placed.colour)
    return digits, inks


def _token_weights(processor: LlavaProcessor, labels: Tensor) -> Tensor:
    verdicts = torch.tensor(processor.tokenizer.convert_tokens_to_ids(["yes", "no"]))
    weights = torch.where(torch.isin(labels, verdicts), VERDICT_WEIGHT, 1.0)
    return weights * (labels != _IGNORED)


if __name__ == "__main__":
    main()
