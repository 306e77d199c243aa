"""Which classes and functions a recipe may name.

Recipes name classes by import path, and importing runs code. Always refused are the functions of Python that run
commands or files (``os.system``, ``subprocess.Popen`` and the like, jsonargparse's list). In safe mode
(``REALIGN_SAFE_CONFIG=1``), for recipes from elsewhere, only what :data:`ALLOWED` lists is imported, and what the user
adds in ``REALIGN_SAFE_PACKAGES``. The refusal comes before the import.
"""

from __future__ import annotations

import importlib.machinery
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import yaml
from jsonargparse import _common, _optionals

from realign_lightning.trust import REMOTE_CODE, SAFE_MODE, find_forbidden, is_safe_mode

PACKAGES = "REALIGN_SAFE_PACKAGES"
"""Environment variable with further import paths for safe mode, separated by commas."""

ALLOWED = (
    "realign_lightning",
    *(f"lightning.pytorch.{name}" for name in ("accelerators", "callbacks", "plugins", "profilers", "strategies")),
    *("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.csv_logs"),
    *("lightning.pytorch.loggers.TensorBoardLogger", "lightning.pytorch.loggers.tensorboard"),
    "lightning.fabric.plugins.environments",
    "torch.optim",
    "torchmetrics",
)
"""What recipes may name in safe mode: these, and what is defined in them."""

REFUSED = (
    # Commands, uploads, and what decides what is allowed.
    *(f"realign_lightning.{name}" for name in ("cli", "export", "safe_config", "trust", "data.publish")),
    # Calls any function that it is given.
    *("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function"),
    # Reads configuration files of its own, which name classes.
    *("lightning.pytorch.strategies.DeepSpeedStrategy", "lightning.pytorch.strategies.deepspeed"),
    # Download models of their own choice.
    *(f"torchmetrics.{name}" for name in ("audio", "image", "multimodal", "text", "video")),
    *(f"torchmetrics.functional.{name}" for name in ("audio", "image", "multimodal", "text", "video")),
)
"""What recipes may not name in safe mode, although it is part of what they may."""

_CONFIG = "config"
_LARGEST_RECIPE = 1 << 22
_COMMAND_LINE = "the command line"
_READ_FROM = ("train", "val", "base_url")
"""Settings that may be addresses in a recipe: shards are only read, and engines look at their endpoints themselves."""

_ADDRESS = re.compile(r"\s*[\w+.-]+(://|::)")
_TELLING = re.compile(rb"class_path|init_args|default_root_dir")
"""What a file holds that is a recipe with more than plain numbers."""

_TOO_LARGE = "more than 4 MiB"
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class Place(NamedTuple):
    """A value in a recipe.

    Args:
        file: the recipe, or ``the command line``.
        key: names and numbers that lead to it, as ``model.loss.class_path``.
        value: what stands there.
    """

    file: str
    key: str
    value: Any

    def __str__(self) -> str:
        """For errors."""
        return f"{self.file}: {self.key}"


def is_allowed(import_path: str) -> bool:
    """Whether a recipe may name an import path in safe mode; the most specific entry of the lists decides.

    Args:
        import_path: as ``package.module.Class``.

    >>> is_allowed("torch.optim.AdamW"), is_allowed("os.system"), is_allowed("realign_lightning.cli.run")
    (True, False, False)
    """
    parts = import_path.split(".")
    for length in range(len(parts), 0, -1):
        entry = ".".join(parts[:length])
        if entry in _added() or (entry in ALLOWED and entry not in REFUSED):
            return True
        if entry in REFUSED:
            return False
    return False


def _added() -> list[str]:
    """What the user allows beside :data:`ALLOWED`."""
    added = [entry.strip() for entry in os.environ.get(PACKAGES, "").split(",") if entry.strip()]
    wrong = [entry for entry in added if not all(part.isidentifier() for part in entry.split("."))]
    if wrong:
        raise ValueError(f"Expected {PACKAGES} to be import paths separated by commas, got {wrong[0]!r}.")
    return added


@contextmanager
def import_policy() -> Iterator[None]:
    """For as long as this lasts, jsonargparse imports only what is allowed, and makes no objects of untyped values.

    Raises:
        ValueError: if one of the environment variables is wrong.
    """
    # jsonargparse has no way back from a list that was set.
    settings, mode = dict(_common.parsing_settings), _optionals._config_read_mode
    try:
        # Enforces jsonargparse's own list, of which it only warns otherwise.
        jsonargparse.set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)
        if is_safe_mode():
            jsonargparse.set_parsing_settings(
                import_path_denylist=["*", *REFUSED],
                import_path_allowlist=[*ALLOWED, *_added()],
                config_read_mode_fsspec_enabled=False,
                config_read_mode_urls_enabled=False,
            )
        yield
    finally:
        _common.parsing_settings.clear()
        _common.parsing_settings.update(settings)
        _optionals._config_read_mode = mode


@contextmanager
def reading_recipes(arguments: Sequence[str]) -> Iterator[None]:
    """Read recipes under :func:`import_policy`, and first look through those that a command line names.

    Args:
        arguments: of a command.

    Raises:
        ValueError: for a recipe that asks for code of a checkpoint to be run, and in safe mode for one from a URL and
            for one that names what is not allowed; with file and place.
    """
    with import_policy():
        _check_recipes(arguments)
        yield


def _check_recipes(arguments: Sequence[str]) -> None:
    is_safe = is_safe_mode()
    if is_safe:
        _refuse_urls(arguments)
    for place in _values(arguments):
        if next(find_forbidden({place.key: place.value}), None) is not None:
            raise ValueError(
                f"{place} is {place.value!r}, but a recipe cannot let a checkpoint run its own Python code. Take it "
                f"out; if you trust the code, add --{REMOTE_CODE} true to the command."
            )
        if is_safe and place.key == _TOO_LARGE:
            raise ValueError(
                f"{place.file} looks like a recipe of {_TOO_LARGE}, which is not looked through: in safe mode "
                f"({SAFE_MODE}) it is not read."
            )
        if is_safe and _names_address(place):
            raise ValueError(
                f"{place}: {place.value!r} is an address: in safe mode ({SAFE_MODE}) recipes name none but those of "
                "shards to read (`train`, `val`), so that no files of yours go to another machine. Give it on the "
                "command line if you want it."
            )
        if is_safe and _names_code(place) and not is_allowed(place.value):
            raise ValueError(
                f"{place}: {place.value!r} is not imported: in safe mode ({SAFE_MODE}) recipes name only classes of "
                f"realign_lightning, lightning.pytorch, torch.optim and torchmetrics, and not all of these. If you "
                f"trust it, add it to {PACKAGES}, separated by commas."
            )


def _refuse_urls(arguments: Sequence[str]) -> None:
    for option, value in _options(arguments):
        if option == _CONFIG and "://" in value:
            raise ValueError(
                f"--{option} {value}: in safe mode ({SAFE_MODE}) recipes are read from this machine only. Download it, "
                "read it, and give the file."
            )


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options of a command line with their values; ``-c`` is short for ``--config``."""
    for number, argument in enumerate(arguments):
        following = arguments[number + 1] if number + 1 < len(arguments) else ""
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            yield name, value if equals else following
        elif argument.startswith("-c"):
            yield _CONFIG, argument[2:].removeprefix("=") or following


def _values(arguments: Sequence[str]) -> Iterator[Place]:
    """All plain values of a command line, and of the recipes that it and they name."""
    seen: set[Path] = set()
    for option, value in _options(arguments):
        if not value.startswith("--"):
            yield from _follow(Place(_COMMAND_LINE, f"--{option}", value), Path(), seen)


def _follow(place: Place, folder: Path, seen: set[Path]) -> Iterator[Place]:
    """A value itself; if it names a recipe, or holds one, the values in there."""
    yield place
    if not isinstance(place.value, str):
        return
    if place.value.lstrip()[:1] in ("{", "["):
        yield from _walk(_parsed(place.value), place.file, place.key, folder, seen)
    elif "\n" not in place.value:
        # A path counts from the file that holds it; jsonargparse also looks in the current folder.
        for file in {folder / place.value, Path(place.value)}:
            yield from _in_file(file, seen)


def _in_file(file: Path, seen: set[Path]) -> Iterator[Place]:
    if not _is_file(file) or file.resolve() in seen:
        return
    seen.add(file.resolve())
    if file.stat().st_size > _LARGEST_RECIPE:
        yield from _in_large_file(file)
        return
    content = file.read_bytes()
    # jsonargparse opens files of any name where a setting may be one; shards and pictures are none of them.
    if b"\0" not in content:
        yield from _walk(_parsed(content.decode("utf-8", errors="replace")), str(file), "", file.parent, seen)


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a text that the system takes for no path, such as a long one, names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _in_large_file(file: Path) -> Iterator[Place]:
    """What is told without parsing, which would take minutes: data are large, recipes are not."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if b"\0" in content[:4096]:
            return
        if content.find(REMOTE_CODE.encode()) >= 0:
            yield Place(str(file), REMOTE_CODE, True)
        if _TELLING.search(content):
            yield Place(str(file), _TOO_LARGE, None)


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        # Who reads it in earnest says what is wrong with it.
        return None


def _walk(value: Any, file: str, key: str, folder: Path, seen: set[Path]) -> Iterator[Place]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _walk(inner, file, f"{key}.{name}" if key else str(name), folder, seen)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _walk(inner, file, f"{key}[{number}]", folder, seen)
    else:
        yield from _follow(Place(file, key, value), folder, seen)


def _names_address(place: Place) -> bool:
    """Whether a recipe (what the command line says is the user's own) names an address that files could be sent to."""
    if place.file == _COMMAND_LINE or not isinstance(place.value, str):
        return False
    name = place.key.rpartition(".")[2].partition("[")[0]
    return name not in _READ_FROM and _ADDRESS.match(place.value) is not None


def _names_code(place: Place) -> bool:
    """Whether a value is an import path: of a class by its key, otherwise by a package of that name being installed.

    What is passed over here, jsonargparse refuses by :func:`import_policy`, without naming the file.
    """
    if not isinstance(place.value, str) or _IMPORT_PATH.fullmatch(place.value) is None:
        return False
    return place.key.rpartition(".")[2] == "class_path" or _is_package(place.value.partition(".")[0])


def _is_package(name: str) -> bool:
    """Whether a top-level module is there, found without importing it; a plain folder of data is none."""
    found = importlib.machinery.PathFinder.find_spec(name)
    return found is not None and found.loader is not None and found.origin is not None
