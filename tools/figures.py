"""Puts the figures of a benchmark into docs/performance.md: figures.py FOLDER.

FOLDER is what `python -m performer bench --output FOLDER` wrote. Everything between the two marks
of the page is replaced by the tables of its results.json; the plots are drawn beside the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from performer.bench.report import plots, render

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def main(arguments: list[str]) -> int:
    """Returns 0, or 2 where the folder or the page is not what it must be."""
    results = Path(*arguments) / "results.json"
    if len(arguments) != 1 or not results.is_file():
        print(f"figures: FOLDER must hold results.json; got {arguments}", file=sys.stderr)
        return 2
    run = json.loads(results.read_text())
    text = PAGE.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"figures: {PAGE.name} must hold {BEGIN} and {END} once each", file=sys.stderr)
        return 2
    PAGE.write_text(filled(text, run, [path.name for path in plots.draw(run, PAGE.parent)]))
    return 0


def filled(text: str, run: dict, images: list[str]) -> str:
    """The page with the plots and tables of a run between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    pictures = [f"![{Path(name).stem} against length]({name})" for name in images]
    parts = [BEGIN, *pictures, render.markdown(run), END]
    return before + "\n\n".join(parts) + after


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
