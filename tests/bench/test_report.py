"""What the benchmark concludes and writes, from figures that were given."""

import importlib
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from performer.bench import run
from performer.bench.cases import Case
from performer.bench.implementations.catalogue import IMPLEMENTATIONS
from performer.bench.report import render, results, tables
from support.measurements import measurements

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("ours", "theirs", "length"),
    [
        ({64: 4.0, 256: 16.0}, {64: 1.0, 256: 64.0}, 128.0),
        ({64: 1.0, 128: 2.0}, {64: 2.0, 128: 8.0}, 64.0),
        ({64: 9.0, 128: 9.0}, {64: 1.0, 128: 8.0}, math.inf),
        ({64: 9.0}, {128: 8.0}, None),
        ({64: 9.0, 128: 1.0, 512: 1.0}, {64: 1.0, 128: 9.0}, 64 * 2**0.5),
    ],
    ids=["between", "from the start", "never", "nothing in common", "only common lengths"],
)
def test_crossover(ours, theirs, length):
    assert results.crossover(ours, theirs) == pytest.approx(length)


def test_conclusions_follow_from_the_figures():
    measured = measurements()
    lengths = {x["length"] for x in results.crossovers(measured) if x["implementation"] == "exact"}
    assert lengths == {1024.0}
    assert results.doublings(measured) == []
    times = [
        r for r in measured["records"] if r["kind"] == "time" and r["implementation"] == "performer"
    ]
    for record, length in ((times[0], 512), (times[2], 8192)):  # only the second is long
        case = {**record["case"], "length": length}
        measured["records"].append({**record, "case": case, "minimum": 2.1 * record["minimum"]})
    assert [(x["length"], x["ratio"]) for x in results.doublings(measured)] == [
        (4096, pytest.approx(2.1))
    ]
    compared = {x["implementation"]: x for x in results.comparisons(measured)}
    assert compared.keys() == {
        name for name in IMPLEMENTATIONS if not IMPLEMENTATIONS[name].exact
    } - {"performer"}
    assert compared["stabilised"]["ratio"] == pytest.approx(2.0)
    assert compared["stabilised"]["limit"] == pytest.approx(2.0 / 0.5)
    (heads,) = results.head_ratios(measured)
    assert heads["one"]["minimum"] / heads["many"]["minimum"] == pytest.approx(1.1)
    (threads,) = results.thread_ratios(measured)
    assert threads["one"] / threads["all"] == pytest.approx(20 / 10.5)


def test_windows_are_compared_with_goals():
    kinds = [
        ("performer", Case(True, False, 4096), 100.0),
        ("performer", Case(True, False, 4096, window=64), 104.0),
        ("performer", Case(True, False, 4096, 64, window=64), 50.0),
        ("performer", Case(True, False, 256, 64, window=64), 3.0),
        ("exact", Case(True, False, 256), 6.0),
        ("exact", Case(True, False, 4096), 800.0),
        ("performer", Case(False, True, 4096), 100.0),
        ("performer", Case(False, True, 4096, window=64), 150.0),
    ]
    records = [
        {
            "kind": "window",
            "implementation": impl,
            "case": vars(case),
            "minimum": time,
            "fraction": 0.65,
        }
        for impl, case, time in kinds
    ]
    found = {
        (x["case"], x["what"].split()[0]): (round(x["value"], 2), x["reached"])
        for x in results.windows({"records": records})
    }
    assert found == {
        (kinds[1][1], "time"): (1.04, True),
        (kinds[1][1], "times"): (7.69, False),
        (kinds[2][1], "fraction"): (0.65, False),
        (kinds[2][1], "times"): (16.0, True),
        (kinds[3][1], "times"): (2.0, True),
        (kinds[7][1], "time"): (1.5, False),
    }
    (table,) = tables.conclusions({**measurements(), "records": records})
    assert len(table.rows) == len(found)


def test_other_settings_share_a_table():
    measured = measurements()
    for record in [r for r in measured["records"] if r["kind"] == "time"]:
        other = {**record, "case": {**record["case"], "features": 64}, "fraction": 0.25}
        measured["records"].append(other)
    tables_of = {table.title: table for table in tables.settings(measured)}
    assert len(tables_of) == 4
    for table in tables_of.values():
        (row,) = table.rows
        assert row[:2] == ("M=64 D=64 float32", "4096")
        assert row[-1] == "0.25"
    assert len(tables.times(measured)) == 4


def test_report_plots_and_tables_are_written(tmp_path):
    measured = measurements()
    console = Console(record=True, width=80, file=io.StringIO())
    run.write(measured, tmp_path, console)
    text = console.export_text()
    files = ["memory.png", "report.md", "results.json", "time.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert json.loads((tmp_path / "results.json").read_text()) == measured
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in files[::3])
    markdown = (tmp_path / "report.md").read_text()
    for part in (text, markdown):
        for label in (impl.label for impl in IMPLEMENTATIONS.values()):
            assert label in part
        assert "94%" in part
        assert "torch not installed" in part
        assert "3 jobs of the part 'memory'" in part
    assert "…" not in text
    for table in tables.details(measured) + tables.times(measured) + tables.conclusions(measured):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_markdown_of_a_run_is_put_between_the_marks_of_the_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    figures = importlib.import_module("figures")
    page = f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter"
    text = figures.filled(page, measurements(), ["time.png"])
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "old" not in text
    assert "![time against length](time.png)" in text
    assert render.markdown(measurements()) in text
    assert figures.PAGE.read_text().count(figures.BEGIN) == 1
