import json
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parent / "oracles"


def committed(name: str) -> Any:
    return json.loads((COMMITTED / name).read_text())


def shared_path(name: str) -> Path | None:
    """A file that may be read but not committed; None in a clone without the shared folder."""
    root = Path(__file__).parents[2]
    candidates = [root.parent / "shared" / "oracles" / name, root / "shared" / "oracles" / name]
    return next((path for path in candidates if path.exists()), None)


def shared(name: str) -> Any:
    path = shared_path(name)
    return None if path is None else json.loads(path.read_text())
