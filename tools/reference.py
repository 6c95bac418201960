"""Builds the API reference from docstrings: `python tools/reference.py FOLDER`.

The pages show what users call: the package's public names and modules. Any warning is an error, and
so is a public name without a description.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from pathlib import Path

# Keras reads Python's stack for its messages; TensorFlow's own are none of this program's.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pdoc

import performer

# `performer` brings the modules that it names in `__all__`; these are used by their own names.
MODULES = ("performer", "performer.loader", "performer.projections", "performer.tolerances")


def main(folder: str) -> None:
    """Writes the pages to `folder`."""
    for name in performer.__all__:
        if not inspect.getdoc(getattr(performer, name)):
            raise SystemExit(f"performer.{name} has no docstring")
    pdoc.docstrings.GOOGLE_LIST_SECTIONS.append("Call arguments")
    templates = Path(__file__).parents[1] / "docs" / "reference"
    pdoc.render.configure(docformat="google", show_source=False, template_directory=templates)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*MODULES, output_directory=Path(folder))
    print(f"{Path(folder, 'index.html').resolve()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
