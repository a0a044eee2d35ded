"""Settings of the documentation site, which `make docs` builds: docs/_build/html/index.html.

Pages are Markdown (MyST), so that they read on GitHub too. API pages come from the docstrings; the pages of options and
commands from `docs/generate.py`. Checks: tests/test_docs.py.
"""

import re
from importlib import metadata

from sphinx.application import Sphinx

project = "halfpass"
author = "the halfpass authors"
release = metadata.version("halfpass")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build", "notes", "README.md", "**.ipynb_checkpoints"]
nitpicky = True
nitpick_ignore_regex = [  # in type hints: names of other libraries, and ours by the file in which they are made
    (r"py:.*", r"(?!halfpass\.).*"),
    (r"py:.*", r"halfpass\.\w+\..*"),
]

# What a backtick means in the docstrings.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False

# Headings are linked as on GitHub. A link to a file outside this folder gives that file.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

# Notebooks are shown with the outputs that are kept in them; tests/test_tutorials.py runs them and compares.
nb_execution_mode = "off"

html_theme = "furo"
html_title = "halfpass"
html_static_path = ["_static"]
html_css_files = ["halfpass.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Sphinx) -> None:
    def as_files(app: Sphinx, name: str, source: list[str]) -> None:
        """Markdown files outside this folder are given as they are, as MyST does with other files."""
        source[0] = re.sub(r"\[([^\]]+)\]\(((?:\.\./)+[\w./-]+\.md)(?:#[^)]*)?\)", lambda m: shown(name, m), source[0])

    def shown(name: str, link: re.Match[str]) -> str:
        outside = link[2].count("../") > name.count("/")
        return f"{{download}}`{' '.join(link[1].split())} <{link[2]}>`" if outside else link[0]

    def plain(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
        """A shape such as (B, *cut) in a docstring is no emphasis."""
        lines[:] = [re.sub(r"(`[^`]*`)|\*", lambda m: m[1] or r"\*", line) for line in lines]

    app.connect("source-read", as_files)
    app.connect("autodoc-process-docstring", plain)
