"""What a run may take from strangers: code of a checkpoint, weights that are pickles, addresses of a service.

Nothing of it by default. A recipe, a checkpoint and a hub model cannot ask for it; the command line can. What the user
allowed is kept in environment variables, so that the processes that a command starts know it, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAFE_MODE = "REALIGN_SAFE_CONFIG"
"""Environment variable that switches on the safe mode for recipes from elsewhere."""

REMOTE_CODE = "trust_remote_code"
PICKLED_WEIGHTS = "allow_pickled_weights"

_OPTIONS = {REMOTE_CODE: "REALIGN_TRUST_REMOTE_CODE", PICKLED_WEIGHTS: "REALIGN_ALLOW_PICKLED_WEIGHTS"}
"""Options of every command, and the environment variables that carry them to the processes that a command starts."""

_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
_FORBIDDEN = (REMOTE_CODE, "code_revision", "allow_all_kernels")
"""Arguments of other libraries that let a checkpoint run code of its own, or say which."""

_SAFE, _PICKLED = ("*.safetensors",), ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_safe_mode() -> bool:
    """Whether recipes are read in safe mode (``REALIGN_SAFE_CONFIG=1``).

    Raises:
        ValueError: if the variable says neither yes nor no.
    """
    return _says_yes(SAFE_MODE, os.environ.get(SAFE_MODE, ""))


def is_remote_code_trusted() -> bool:
    """Whether ``--trust_remote_code true`` was given: checkpoints may run Python code that lies beside them."""
    return _is_allowed(REMOTE_CODE)


def are_pickled_weights_allowed() -> bool:
    """Whether ``--allow_pickled_weights true`` was given: weights may come from other files than safetensors."""
    return _is_allowed(PICKLED_WEIGHTS)


def _is_allowed(option: str) -> bool:
    variable = _OPTIONS[option]
    return _says_yes(variable, os.environ.get(variable, ""))


def _says_yes(name: str, value: str) -> bool:
    if value.strip().lower() in _YES:
        return True
    if value.strip().lower() in _NO:
        return False
    raise ValueError(f"Expected {name} to be 1 or 0 (true or false), got {value!r}.")


@contextmanager
def allowed_by(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Take ``--trust_remote_code`` and ``--allow_pickled_weights`` from a command line, for as long as this lasts.

    They are taken before any recipe is read: no recipe can give them.

    Args:
        arguments: of a command.

    Yields:
        The other arguments.

    Raises:
        ValueError: if one of them says neither true nor false.

    >>> with allowed_by(["fit", "--trust_remote_code", "true", "--seed_everything=1"]) as rest:
    ...     rest, is_remote_code_trusted()
    (['fit', '--seed_everything=1'], True)
    >>> is_remote_code_trusted()
    False
    """
    rest, given = _split(arguments)
    before = {variable: os.environ.get(variable) for variable in given}
    os.environ.update(given)
    try:
        yield rest
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments that are none of these options, and environment variables for those that are."""
    rest, given, left = [], {}, iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        option = name.removeprefix("--")
        if not name.startswith("--") or option not in _OPTIONS:
            rest.append(argument)
            continue
        value = value if equals else next(left, "")
        if not value:
            raise ValueError(f"Expected --{option} true or --{option} false, got no value.")
        given[_OPTIONS[option]] = "1" if _says_yes(f"--{option}", value) else "0"
    return rest, given


def refuse_remote_code(options: Any, where: str) -> None:
    """Refuse options for another library that would let a checkpoint run its own code.

    Args:
        options: as they were given; dictionaries and lists in them are looked through.
        where: what to call them in the error.

    Raises:
        ValueError: naming the option.
    """
    for place, value in find_forbidden(options):
        raise ValueError(
            f"{where} may not set {place} (got {value!r}): that would let a checkpoint run its own Python code, which "
            f"only the command line can allow. Take it out; if you trust the code, add --{REMOTE_CODE} true to the "
            "command."
        )


def find_forbidden(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options, at any depth, that would let a checkpoint run its own code.

    Args:
        options: dictionaries, lists and plain values.
        prefix: put before the places that are found.

    Yields:
        Where each is, as ``outer.inner``, and its value.
    """
    if isinstance(options, Mapping):
        for name, value in options.items():
            place = f"{prefix}.{name}" if prefix else str(name)
            if str(name).rpartition(".")[2] in _FORBIDDEN and value not in (None, False):
                yield place, value
            yield from find_forbidden(value, place)
    elif isinstance(options, (list, tuple)):
        for number, value in enumerate(options):
            yield from find_forbidden(value, f"{prefix}[{number}]")


def check_attention(implementation: str | None) -> None:
    """Refuse an attention that is a compiled kernel on the hub, unless remote code is trusted.

    Args:
        implementation: as transformers takes it; kernels are called ``owner/name``.

    Raises:
        ValueError: for a kernel of the hub.
    """
    if implementation is not None and "/" in implementation and not is_remote_code_trusted():
        raise ValueError(
            f"Expected `attn_implementation` to be one that is installed here, got {implementation!r}: that is "
            f"compiled code on the hub. If you trust it, add --{REMOTE_CODE} true to the command."
        )


def check_endpoint(base_url: str | None, api_key_env: str) -> None:
    """In safe mode, refuse an address or a key that was not chosen in the environment.

    A recipe could send images, and whatever an environment variable holds, to anyone.

    Args:
        base_url: of a service.
        api_key_env: environment variable that holds its key.

    Raises:
        ValueError: in safe mode, for any address but the environment's, and any key but the usual one.
    """
    if not is_safe_mode():
        return
    if base_url is not None and base_url != os.environ.get("OPENAI_BASE_URL"):
        raise ValueError(
            f"Expected `base_url` to be null, got {base_url!r}: in safe mode ({SAFE_MODE}) no recipe says where images "
            "and keys are sent to. If you trust this address, set OPENAI_BASE_URL to it."
        )
    if api_key_env != "OPENAI_API_KEY":
        raise ValueError(
            f"Expected `api_key_env` to be OPENAI_API_KEY, got {api_key_env!r}: in safe mode ({SAFE_MODE}) no recipe "
            "says which variable of your environment is sent to a service."
        )


def check_engine_options(options: Mapping[str, Any], engine: str) -> None:
    """Refuse options that let checkpoints run code; in safe mode refuse all: some name classes to import.

    Args:
        options: that an engine hands on to another library.
        engine: what to call it in the error.

    Raises:
        ValueError: naming the options.
    """
    refuse_remote_code(options, f"`options` of {engine}")
    if options and is_safe_mode():
        raise ValueError(
            f"Expected no `options` of {engine}, got {sorted(options)}: in safe mode ({SAFE_MODE}) they are refused, "
            "since some of them name classes to import. Take them out."
        )


def weights_options() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for what the user allowed: remote code, and files of weights."""
    only_safe = {} if are_pickled_weights_allowed() else {"use_safetensors": True}
    return {REMOTE_CODE: is_remote_code_trusted(), **only_safe}


def check_weights(place: str | Path, patterns: Sequence[str] = _SAFE) -> None:
    """Refuse a folder whose only weights are pickles, and such a file, unless they are allowed.

    Args:
        place: folder or file; anything else, as a name on the hub, passes.
        patterns: of the files that will do.

    Raises:
        ValueError: saying what to do.
    """
    path = Path(place)
    if are_pickled_weights_allowed() or not path.exists():
        return
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(_only_pickles(str(path), path.name))
    elif not any(True for pattern in patterns for _ in path.glob(pattern)):
        found = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern) if file.is_file())
        if found:
            raise ValueError(_only_pickles(str(path), ", ".join(found[:3])))


def _only_pickles(place: str, found: str) -> str:
    return (
        f"{place} has no weights in safetensors, only {found}, which PyTorch reads as pickles. Convert them: "
        "a model of transformers by loading it and calling save_pretrained, tensors by safetensors.torch.save_file. "
        f"Or, if you trust whoever made them, add --{PICKLED_WEIGHTS} true to the command; they are read with "
        "weights_only=True then, too."
    )


@contextmanager
def saying_what_is_missing(place: str) -> Iterator[None]:
    """Name our options where another library says that it needs a checkpoint's code, or found no safetensors.

    Args:
        place: folder or hub name of the checkpoint.

    Raises:
        ValueError: in place of such an error.
    """
    try:
        check_weights(place)
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        if REMOTE_CODE in text and not is_remote_code_trusted():
            raise ValueError(
                f"{place!r} needs Python code that lies beside its weights (`auto_map` in its configuration), and code "
                f"from a checkpoint is not run unasked. Read it; if you trust it, add --{REMOTE_CODE} true to the "
                f"command, and pin its `revision`. (A recipe cannot do that.)"
            ) from error
        if isinstance(error, OSError) and ".safetensors" in text and not are_pickled_weights_allowed():
            raise ValueError(_only_pickles(repr(place), "other files") + f" ({text.splitlines()[0]})") from error
        raise
