"""Pages and page parts that are made from the package, the recipes and the configs whenever the docs are built."""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "realign_lightning"

# Modules of public names that no package re-exports.
_MODULES = ("types", "scoring", "cli")
_ABLATIONS = """## Ablations

The paper's ablations on LLaVA 1.5 7B. Each is `llava7b_lora.yaml` with one thing changed; where that is how the pairs
were built, the file's header says with which settings. Run one with
`realign-lightning fit --config recipes/ablations/NAME.yaml`.
"""
_OVERRIDE = re.compile(r"(?<!\S)(--[\w.+]+ \S+)")


def api_pages() -> dict[str, str]:
    """One reStructuredText page per room (a package with an ``__all__``, or a single file), and an index."""
    packages = [file.parent for file in sorted(PACKAGE.rglob("__init__.py")) if public_names(file)]
    names = [".".join(folder.relative_to(ROOT).parts) for folder in packages if folder != PACKAGE]
    names = sorted([*names, *(f"{PACKAGE.name}.{module}" for module in _MODULES)])
    pages = {name: _api_page(name) for name in names}
    toctree = "".join(f"   {name}\n" for name in names)
    pages["index"] = f"{_heading('Reference')}{_root_names()}\n.. toctree::\n   :maxdepth: 1\n\n{toctree}"
    return pages


def public_names(file: Path) -> list[str]:
    """The names in a module's ``__all__``, read without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def recipe_sections() -> str:
    """A MyST section per recipe: its header as text, and the file itself; one table of the ablations."""
    sections = [_recipe_section(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    return "\n".join([*sections, _ABLATIONS, _file_table(ROOT / "recipes" / "ablations", "what it trains with")])


def config_table() -> str:
    """A MyST table of the pieces that recipes are made of: file and first comment."""
    return _file_table(ROOT / "configs", "what it holds")


def header(file: Path) -> list[str]:
    """The lines of the comment that a YAML file begins with, without their marks."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines or [""]


def _api_page(name: str) -> str:
    constants = dict(_reexported_constants(ROOT.joinpath(*name.split("."), "__init__.py")))
    title = _heading(name.removeprefix(f"{PACKAGE.name}."))
    page = f"{title}.. automodule:: {name}\n   :members:\n   :member-order: bysource\n"
    if constants:
        page += f"   :exclude-members: {', '.join(constants)}\n"
    for constant, text in constants.items():
        page += f"\n.. py:data:: {constant}\n\n{textwrap.indent(text, '   ')}\n"
    return page


def _reexported_constants(init: Path) -> Iterator[tuple[str, str]]:
    """Public names of a package that other modules assign, with the text below the assignment; autodoc misses them."""
    if not init.exists():
        return
    public = public_names(init)
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        texts = _texts_below_assignments(ROOT.joinpath(*node.module.split(".")).with_suffix(".py"))
        for alias in node.names:
            if alias.name in public and alias.name in texts:
                yield alias.name, texts[alias.name]


def _texts_below_assignments(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    body = ast.parse(file.read_text(encoding="utf-8")).body
    texts = {}
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.Assign) and isinstance(following, ast.Expr):
            text = getattr(following.value, "value", None)
            if isinstance(text, str):
                texts |= {getattr(target, "id", ""): inspect.cleandoc(text) for target in node.targets}
    return texts


def _heading(title: str) -> str:
    return f"{title}\n{'=' * len(title)}\n\n"


def _root_names() -> str:
    names = ", ".join(f"``{name}``" for name in public_names(PACKAGE / "__init__.py"))
    return f"These names can be imported from ``{PACKAGE.name}`` itself; they are loaded when first used:\n{names}.\n"


def _file_table(folder: Path, title: str) -> str:
    """A MyST table of YAML files with their first comment."""
    files = sorted(folder.rglob("*.yaml"))
    rows = [f"| `{file.relative_to(ROOT).as_posix()}` | {header(file)[0]} |" for file in files]
    return "\n".join([f"| file | {title} |", "|---|---|", *rows, ""])


def _recipe_section(path: Path) -> str:
    title, *lines = header(path)
    parts = [f"## {path.name}", "", title]
    for line in lines:
        indented = line.startswith("  ")
        in_code = parts[-1].startswith("  ")
        if indented and not in_code:
            parts += ["", "```console"]
        elif in_code and not indented:
            parts += ["```", ""]
        parts.append(line if indented else _OVERRIDE.sub(r"`\1`", line))
    return "\n".join([*parts, "", f"```{{literalinclude}} ../recipes/{path.name}", ":language: yaml", "```", ""])
