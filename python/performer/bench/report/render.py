"""Tables in the terminal (rich) and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

import rich.box
import rich.table
from rich.console import Console

from performer.bench.report import tables


def machine(run: dict) -> str:
    """One line: processor, threads, instruction set, versions."""
    facts = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['processor']}, {facts['cores']} cores, {run['plan']['threads']} threads, "
        f"{facts['isa']}; {versions}"
    )


def terminal(run: dict, console: Console) -> None:
    """Prints every table and note of a run."""
    everything = tables.details(run) + tables.conclusions(run)
    show(everything, [machine(run), *tables.notes(run)], console)


def show(shown: Iterable[tables.Table], notes: Iterable[str], console: Console) -> None:
    """Prints tables, then notes."""
    for table in shown:
        grid = rich.table.Table(
            title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False
        )
        for i, column in enumerate(table.columns):
            grid.add_column(column, justify="left" if i < table.left else "right", overflow="fold")
        above = ""
        for row in table.rows:  # what is the same as above is not repeated
            grid.add_row("" if row[0] == above else row[0], *row[1:])
            above = row[0]
        console.print(grid)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def markdown(run: dict) -> str:
    """The tables and notes of a run as Markdown.

    Example:

    >>> empty = {"plan": {"threads": 2}, "records": [], "machine": {"processor": "a processor",
    ...          "cores": 2, "isa": "v3", "versions": {"performer": "0.1.0"}}}
    >>> print(markdown(empty))
    a processor, 2 cores, 2 threads, v3; performer 0.1.0
    """
    parts = [machine(run)]
    shown = (tables.times, tables.settings, tables.memory, tables.conclusions)
    for table in (table for kind in shown for table in kind(run)):
        parts.append(f"**{table.title}**\n\n{markdown_table(table)}")
    notes = tables.notes(run)
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def markdown_table(table: tables.Table) -> str:
    """A table as Markdown, without its title."""
    marks = [":--" if i < table.left else "--:" for i in range(len(table.columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.columns, marks, *table.rows))
