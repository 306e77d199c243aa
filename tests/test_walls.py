import ast
import subprocess
import sys
from pathlib import Path

import pytest

import realign_lightning

PACKAGE = Path(realign_lightning.__file__).parent

MAY_IMPORT = {
    "types": set(),
    "losses": {"types"},
    "metrics": set(),
    "backbones": {"types", "trust"},
    "scoring": {"types", "backbones"},
    "journal": set(),
    "ranks": set(),
    "checkpoints": {"ranks"},
    "trust": set(),
    "safe_config": {"trust"},
    "data": {"types", "backbones.base", "backbones.files", "journal", "ranks"},
    "engines": {"types", "backbones", "journal", "ranks", "trust"},
    "preferences": {"types", "data", "backbones", "metrics", "engines", "journal", "ranks", "trust", "safe_config"},
    "modules": {"types", "losses", "metrics", "backbones", "scoring", "journal", "ranks", "safe_config", "checkpoints"},
    "callbacks": {"types", "metrics", "evaluation.base", "evaluation.images", "ranks", "checkpoints"},
    "evaluation": {
        "types",
        "metrics",
        "backbones",
        "data",
        "engines",
        "export",
        "inspection",
        "journal",
        "ranks",
        "trust",
    },
    "demos": {
        "types",
        "losses",
        "metrics",
        "backbones",
        "scoring",
        "data",
        "engines",
        "preferences",
        "modules",
        "callbacks",
        "evaluation",
        "ranks",
    },
    "estimate": {"types", "backbones", "scoring", "modules"},
    "export": {"types", "backbones", "modules", "safe_config"},
    "inspection": {"types", "data"},
    "cli": {
        "types",
        "losses",
        "metrics",
        "backbones",
        "scoring",
        "data",
        "engines",
        "preferences",
        "modules",
        "callbacks",
        "demos",
        "estimate",
        "evaluation",
        "export",
        "inspection",
        "safe_config",
        "trust",
        "checkpoints",
    },
    "__main__": {"cli"},
}


def imports_of(file: Path) -> list[str]:
    """Modules of the package that a file imports anywhere, without the package's own name."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names if node.module == "realign_lightning" else [node.module or ""]
    return [name.removeprefix("realign_lightning.") for name in found if name.startswith("realign_lightning.")]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_rooms_import_only_what_the_design_allows(file):
    room = room_of(file)
    allowed = MAY_IMPORT[room]
    for name in imports_of(file):
        inside = name.split(".")[0] == room
        assert inside or any(name == one or name.startswith(f"{one}.") for one in allowed), f"{room} imports {name}"


def test_every_room_is_in_the_table():
    assert {room_of(file) for file in FILES} == set(MAY_IMPORT)


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("room", ["losses", "metrics"])
def test_losses_and_metrics_load_nothing_heavy(room):
    loaded = modules_loaded_by(f"import realign_lightning.{room}")
    assert "torch" in loaded
    assert not loaded & {"transformers", "faiss", "webdataset", "peft", "lightning", "bitsandbytes"}


def test_data_does_not_load_model_code():
    assert not modules_loaded_by("import realign_lightning.backbones.base") & {"transformers", "peft", "bitsandbytes"}


def test_root_is_lazy_and_complete():
    assert "torch" not in modules_loaded_by("import realign_lightning")
    for name in realign_lightning.__all__:
        assert getattr(realign_lightning, name).__name__ == name
        assert name in dir(realign_lightning)
    with pytest.raises(AttributeError, match="nonsense"):
        realign_lightning.nonsense  # noqa: B018
