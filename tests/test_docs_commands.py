"""Every command of every page of docs/ is run, in the order of its page; see docs_commands.py."""

import pytest
from conftest import ROOT
from docs_commands import Reader, blocks
from docs_ways import QUICK, WAYS

PAGES = {str(page.relative_to(ROOT / "docs").with_suffix("")): page for page in sorted((ROOT / "docs").rglob("*.md"))}
WITH_COMMANDS = [
    name
    for name, page in PAGES.items()
    if any(block.language == "sh" or block.text.startswith("$ ") for block in blocks(page))
]


@pytest.mark.parametrize("name", [name for name in WITH_COMMANDS if name in QUICK])
def test_commands_of_one_process_run(name, tmp_path):
    """Those that need no launcher and no shell; all of them in test_commands_run."""
    Reader(tmp_path, WAYS[name], quick=True).read(PAGES[name])


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_run(name, tmp_path):
    Reader(tmp_path, WAYS[name]).read(PAGES[name])
