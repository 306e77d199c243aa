import json
import os
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parent / "oracles"
_ROOT = Path(__file__).parents[2]
UNCOMMITTED = next(
    (folder for folder in (_ROOT.parent / "shared/oracles", _ROOT / "shared/oracles") if folder.is_dir()), None
)
"""Where files lie that may be read but not committed; None in a clone without them."""

_AMBER = Path(os.environ.get("AMBER_DATA", "amber-data"))
AMBER_DATA = _AMBER if (_AMBER / "relation.json").is_file() else None
"""The folder `data` of AMBER's repository, if the environment variable of that name gives it."""


def committed(name: str) -> Any:
    return json.loads((COMMITTED / name).read_text())


def uncommitted(name: str) -> Path:
    assert UNCOMMITTED is not None
    return UNCOMMITTED / name
