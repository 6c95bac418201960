"""The documentation site: how Sphinx builds it. `make docs` runs it; any warning is an error."""

import inspect
import os
import sys
from pathlib import Path

# Keras reads Python's stack for its messages; TensorFlow's own are none of this program's.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent))

import docstrings

import performer

project = "Performer"
author = copyright = "The Performer authors"
version = release = performer.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["Thumbs.db"]

# Pages, and headings of theirs that links may name.
myst_heading_anchors = 3

# Notebooks run anew in every build, and an error in one ends it.
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove"  # what TensorFlow says of its devices

# The reference: what docstrings say, in the order of the source.
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# "Returns" describes what comes back, without the type before a colon that napoleon looks for.
napoleon_custom_sections = [("Call arguments", "params_style"), "Numerics", "Returns"]

html_theme = "pydata_sphinx_theme"
html_title = "Performer"
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navbar_align": "left",
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
highlight_language = "none"  # of formulas; examples name theirs
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


# Where links of README and the like lead to pages that have another place here.
PAGES = {
    "CHANGELOG.md": "docs/project/changelog.md",
    "CONTRIBUTING.md": "docs/project/contributing.md",
    "SECURITY.md": "docs/project/security.md",
}


def included(app, path, page, content):
    """Leads the links of a file that is included to the pages of the site."""
    for file, place in PAGES.items():
        content[0] = content[0].replace(f"]({file})", f"]({place})")


def signature_of(app, what, name, obj, options, signature, annotation):
    """The signature of a class is that of `__init__`: Keras has a `__new__` that takes anything."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    arguments = list(inspect.signature(obj.__init__).parameters.values())[1:]
    return str(inspect.Signature(arguments)), annotation


def setup(app):
    """Docstrings are Markdown: they are translated before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", docstrings.translate, priority=100)
    app.connect("autodoc-process-signature", signature_of)
    app.connect("include-read", included)
