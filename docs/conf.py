"""Configuration of the documentation site; `make docs` builds it."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

project = "mim-torchrec"
author = "the mim-torchrec authors"
version = release = installed_version("mim-torchrec")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
smartquotes = False  # two dashes begin a flag
html_static_path = ["_static"]
html_title = f"{project} {release}"
templates_path = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_mock_imports = ["mlflow"]  # cannot be imported while typing.TYPE_CHECKING is true, as autodoc sets it
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
    "ignore-module-all": True,  # a name is documented where it is defined
}
autodoc_typehints_format = "short"
default_role = "literal"  # docstrings write names in single backticks
napoleon_numpy_docstring = False
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp"


def setup(app: Sphinx) -> None:
    """Generate the reference pages, and read docstrings as they are written."""
    reference.write(Path(__file__).parent / "_generated")
    app.connect("autodoc-process-docstring", reference.keep_colons, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", reference.as_rst, priority=900)  # after it
