"""Sphinx configuration; build with ``python -m sphinx -W --keep-going -b html docs docs/_build/html``."""

import importlib
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import generated  # noqa: E402

import realign_lightning  # noqa: E402

project = "realign-lightning"
copyright = "the realign-lightning authors"  # noqa: A001
version = release = realign_lightning.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "evidence"]
# Text is shown as it is written: `--flag` must not get a dash.
smartquotes = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False

# A link to one of our names that leads nowhere is a warning; other projects' names are not looked up.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!realign_lightning\.).*")]

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"


def write_api_pages(app: Sphinx) -> None:
    """Write the reference pages; unchanged ones are left alone, so that only what changed is built again."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {folder / f"{name}.rst": text for name, text in generated.api_pages().items()}
    for stale in set(folder.glob("*.rst")) - pages.keys():
        stale.unlink()
    for path, text in pages.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def append_recipes(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Complete recipes.md with what stands in recipes/ and configs/."""
    if docname == "recipes":
        source[0] += f"\n{generated.recipe_sections()}\n## Pieces\n\n{generated.config_table()}"


def find_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> Any:
    """Resolve links to where a name is defined, as type hints have them, by the place where it is documented.

    Names that exist but are not public stay plain text; names that do not exist stay a warning.
    """
    home, _, name = node.get("reftarget", "").rpartition(".")
    if node.get("refdomain") != "py" or home not in sys.modules or not hasattr(sys.modules[home], name):
        return None
    public = _PUBLIC.get((home, name))
    if public is None:
        return text
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, text)


def _public_names() -> dict[tuple[str, str], str]:
    """Documented name of everything public, by the module that defines it."""
    found = {}
    for page in generated.api_pages():
        module = None if page == "index" else importlib.import_module(page)
        for name in getattr(module, "__all__", []):
            for home in [loaded for loaded in sys.modules if loaded.startswith(f"{page}.")]:
                if getattr(sys.modules[home], name, None) is getattr(module, name):
                    found[(home, name)] = f"{page}.{name}"
    return found


_PUBLIC = _public_names()


def setup(app: Sphinx) -> None:
    """Connect the generated parts, and render formulas as MathML, which browsers show without any script."""
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", append_recipes)
    app.connect("missing-reference", find_public_name)

    def inline(translator: Any, node: nodes.math) -> None:
        translator.body.append(tex2mathml(node.astext()))
        raise nodes.SkipNode

    def block(translator: Any, node: nodes.math_block) -> None:
        translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
