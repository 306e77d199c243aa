"""Plain descriptions of components, so that a checkpoint can rebuild them without unpickling anything."""

from __future__ import annotations

import inspect
from typing import Any


def component_spec(component: Any, name: str) -> dict[str, Any] | None:
    """Describe an object by its class and its constructor's arguments, in the form that configuration files use.

    Args:
        component: an object that keeps every constructor argument in an attribute of the same name, or None.
        name: what to call it in errors.

    Returns:
        ``{"class_path": ..., "init_args": {...}}`` of plain values, or None for None.

    Raises:
        TypeError: if an argument is not kept, or is not plain (numbers, text, lists and dictionaries of these).

    >>> from realign_lightning.losses import RDPOLoss
    >>> component_spec(RDPOLoss(beta=0.2), "loss")["init_args"]["beta"]
    0.2
    """
    if component is None:
        return None
    cls = type(component)
    arguments = {}
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not hasattr(component, parameter.name):
            raise TypeError(
                f"Expected {cls.__name__} (argument `{name}`) to keep its argument {parameter.name!r} in an attribute "
                "of that name, so that a checkpoint can rebuild it."
            )
        value = getattr(component, parameter.name)
        if not _is_plain(value):
            raise TypeError(
                f"Expected {cls.__name__}.{parameter.name} (argument `{name}`) to be a plain value that a checkpoint "
                f"can hold (number, text, list, dictionary), got {type(value).__name__}."
            )
        arguments[parameter.name] = value
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
