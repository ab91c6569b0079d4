"""The pages of docs/: every snippet runs, in the order of its page, and links lead somewhere."""

import re

import pytest
from conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
# this one shows commands, which test_structure.py reads
WITH_PYTHON = [page for page in PAGES if page.stem != "many_machines"]


def snippets(page) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    # some write files
    monkeypatch.chdir(tmp_path)
    if page.stem == "spikingjelly":
        pytest.importorskip("spikingjelly")
    names = {"__name__": page.stem}
    assert snippets(page)
    for number, snippet in enumerate(snippets(page), start=1):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
