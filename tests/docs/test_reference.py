"""The reference of the site has every public name, and docstrings come to it whole."""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import performer

DOCS = Path(__file__).parents[2] / "docs"
PAGES = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
SHOWN = re.findall(r"^\.\. auto\w+:: performer\.(\S+)", PAGES, re.MULTILINE)


def translator():
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", performer.__all__)
def test_a_public_name_is_on_a_page_and_is_described(name):
    assert name in SHOWN
    assert inspect.getdoc(getattr(performer, name))


def test_docstrings_are_translated_as_their_translator_says():
    result = doctest.testmod(translator())
    assert result.attempted >= 2
    assert result.failed == 0


def test_a_translation_keeps_examples_and_the_names_of_arguments():
    lines = [
        "Args:",
        "    query, key,",
        "        value: `[B *",
        "        D]`.",
        "",
        ">>> x * y_",
        "3",
    ]
    assert translator().to_restructured_text(lines) == [
        "Args:",
        "    query, key, value: ``[B * D]``.",
        "",
        ">>> x * y_",
        "3",
    ]
