"""The model card that lies beside an exported adapter or model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_PAPERS = {"rDPO": "2502.13146", "DPO": "2305.18290"}

_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained({base})
model = PeftModel.from_pretrained(base, ".").eval()
processor = AutoProcessor.from_pretrained(".")"""

_LOAD_MODEL = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")"""


def write_card(folder: str | Path, base: str, settings: Mapping[str, Any], is_adapter: bool, steps: int = 0) -> None:
    """Write ``README.md``: what the files are, how to load them in plain Python, and how they were trained.

    Args:
        folder: where the files lie; must exist.
        base: folder or hub name of the base model.
        settings: hyperparameters of an RDPOModule as its checkpoints hold them, ``loss`` described.
        is_adapter: a PEFT adapter, or a whole model.
        steps: optimizer steps of the training; 0 leaves them out.
    """
    backbone = settings["backbone"].get("init_args", {})
    method = _method(settings["loss"])
    header = {
        "base_model": base,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["realign-lightning", method.lower(), *(["lora"] if settings.get("adapter") else [])],
    }
    code = _LOAD_ADAPTER.format(base=_arguments(backbone, base)) if is_adapter else _LOAD_MODEL
    paragraphs = [
        f"---\n{_yaml(header)}---",
        f"# {base} after {method}",
        _what_it_is(settings, base, method, is_adapter),
        "## Use",
        f"```python\n{code}\n```",
        '`"."` is the folder of this file: put its path, or its name on the hub.',
        *_notes(backbone, base, is_adapter),
        "## Training",
        f"{f'{steps} optimizer steps' if steps else 'Trained'} with realign-lightning and these settings:",
        f"```yaml\n{_yaml(_shown(settings))}```",
    ]
    (Path(folder) / "README.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def _method(loss: Mapping[str, Any]) -> str:
    """Name of the training method, from the loss's description."""
    name = str(loss["class_path"]).rsplit(".", 1)[-1].removesuffix("Loss")
    if name == "RDPO":
        return "rDPO" if loss["init_args"].get("visual_weight", 1.0) else "DPO"
    return name


def _what_it_is(settings: Mapping[str, Any], base: str, method: str, is_adapter: bool) -> str:
    if is_adapter:
        what = f"A PEFT adapter (LoRA) for `{base}`"
    elif settings.get("adapter"):
        what = f"`{base}` with a LoRA adapter merged into its weights"
    else:
        what = f"`{base}`, fine-tuned"
    paper = f" ([arXiv {_PAPERS[method]}](https://arxiv.org/abs/{_PAPERS[method]}))" if method in _PAPERS else ""
    return f"{what}, trained with {method}{paper}. The model answers questions about images."


def _arguments(backbone: Mapping[str, Any], base: str) -> str:
    """Arguments of ``from_pretrained`` that load the base as training did."""
    # A relative path would not be found from the adapter's folder.
    place = str(Path(base).resolve()) if Path(base).is_dir() else base
    options = {"revision": backbone.get("revision"), "dtype": backbone.get("dtype")}
    given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value not in (None, "auto")]
    return ", ".join([json.dumps(place), *given])


def _notes(backbone: Mapping[str, Any], base: str, is_adapter: bool) -> list[str]:
    notes = []
    if backbone.get("quantization"):
        now = "The code above loads it unquantised" if is_adapter else "It is merged into unquantised weights"
        notes.append(
            f"The language model was in 4 bit (NF4, double quantization) while the adapter was trained. {now}, so that "
            "numbers differ slightly from those of the training."
        )
    if Path(base).is_dir():
        places = "this file and `adapter_config.json`" if is_adapter else "this file"
        notes.append(f"The base model was a local folder: before publishing, put its name on the hub into {places}.")
    return notes


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say something: no empty values, no chat template (a file of its own), no cache's folder."""
    return {
        name: _shown(value) if isinstance(value, Mapping) else _plain(value)
        for name, value in settings.items()
        if value not in (None, {}, []) and not name.startswith("_") and name not in ("chat_template", "reference_cache")
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
