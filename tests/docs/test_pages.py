"""What README and guides show is true: their Python examples run and print what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    f"{page.name}-{i}": block
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


def test_there_are_examples():
    assert sum(name.startswith("README") for name in BLOCKS) >= 3
    assert sum(name.startswith("from-multi-head-attention") for name in BLOCKS) >= 5


def example(name):
    """The README's run in every test, those of the guides by -m slow."""
    return pytest.param(name, marks=[] if name.startswith("README") else pytest.mark.slow)


@pytest.mark.parametrize("name", [example(name) for name in BLOCKS])
def test_examples_run_and_print_what_they_say(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "page"})
    said = re.findall(r"^print\(.*\)  # (.*)$", BLOCKS[name], re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert all((page.parent / link).exists() for link in links)


def test_a_guide_is_on_the_site():
    listed = re.findall(
        r"^(?:\.\./)?([\w-]+)$",
        "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md")),
        re.MULTILINE,
    )
    guides = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert guides <= set(listed)
