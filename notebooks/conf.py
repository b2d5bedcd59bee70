"""The site: `sphinx-build -aEWn notebooks build/site`, with jaxact[docs]. It shows the outputs that are committed."""

from typing import Any

project = "jaxact"
author = copyright = "The jaxact authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # so that pages need no network
]
exclude_patterns = ["**.ipynb_checkpoints"]
suppress_warnings = ["myst.header"]  # the verifier's report counts its own levels

html_theme = "furo"
html_title = "jaxact"
html_favicon = "_static/favicon.svg"  # browsers ask for one
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_use_index = html_domain_indices = False  # the page of functions is one
html_show_sphinx = False
smartquotes_action = "D"  # dashes only: "mean" is a string that one may pass
html_copy_source = False

nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}  # would be fetched; widgets are shown by static pictures
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings have names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # their shapes and dtypes are under "Args"
maximum_signature_line_length = 60  # one argument a line, which a phone can show
napoleon_custom_sections = ["Derivative", "Numerics"]
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
nitpick_ignore_regex = [("py:exc", "TypeError|ValueError|AssertionError")]  # Python's own


def plain(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Keeps two readers of docstrings from seeing markup where none is meant."""
    # To reStructuredText the bars of |x| are a substitution.
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else line.replace("|", r"\|") for line in lines]
    if what == "property" and lines:  # and what is before a colon is its type, to Napoleon
        lines[0] = lines[0].replace(": ", " – ")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain, priority=400)  # Napoleon has 500
