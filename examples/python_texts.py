"""Texts to try an encoder on that come with Python: its documentation, and docstrings."""

import ast
import pydoc_data.topics
import sysconfig
from pathlib import Path

import numpy as np

TOPICS = sorted(pydoc_data.topics.topics)


def documentation(words):
    """Texts of so many words, in an order of no meaning, and the numbers of their topics."""
    return _pieces([pydoc_data.topics.topics[name] for name in TOPICS], words)


def docstrings(words):
    """Such texts from the docstrings of Python's own modules."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    parts = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for file in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if file.parent.name not in ("site-packages", "test", "pydoc_data"):
            tree = ast.parse(file.read_bytes())
            texts = [ast.get_docstring(x) for x in ast.walk(tree) if isinstance(x, parts)]
            found.append(" ".join(filter(None, texts)))
    return _pieces([text for text in found if len(text.split()) > words // 2], words)[0]


def _pieces(texts, words):
    """Pieces of so many words, in an order of no meaning, and which texts they are of."""
    found = []
    for number, text in enumerate(text.split() for text in texts):
        cut = range(0, max(len(text) - words, 1), words)
        found += [(" ".join(text[i : i + words]), number) for i in cut]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i][0] for i in order], np.array([found[i][1] for i in order])


def main(words=200):
    """Prints how many there are, and returns both numbers."""
    counts = len(documentation(words)[0]), len(docstrings(words))
    print(f"{counts[0]} texts of {words} words of documentation, {counts[1]} of docstrings")
    return counts


if __name__ == "__main__":
    main()
