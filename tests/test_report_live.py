"""`psn report --live`: the page is written again while a run goes on, and ends with it or by Ctrl-C."""

import shutil
import time
from types import SimpleNamespace

import pytest
from conftest import train_here
from report_runs import beat, leave_pictures_out, links, train_line

from psn_train.cli import main
from psn_train.report import live


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """A run's folder as it is while the run goes on."""
    monkeypatch.chdir(tmp_path)
    leave_pictures_out(monkeypatch)
    document = small("run", schedule={"epochs": 1})
    assert train_here(document) == 0
    folder = tmp_path / "run"
    shutil.move(folder / "results.json", tmp_path / "kept.json")
    beat(folder)
    return folder


def follow(run, tmp_path, monkeypatch, happenings) -> tuple[int, list[str]]:
    """(exit status, the page before each of what happens while the command waits)."""
    pages, page = [], tmp_path / "page" / "report.html"
    left, sleep = iter(happenings), time.sleep

    def wait(seconds):
        sleep(0.02)
        pages.append(page.read_text())
        next(left)()

    monkeypatch.setattr(live, "time", SimpleNamespace(**{**vars(time), "sleep": wait}))
    return main(["report", str(run), "--live", "--every", "0.01", "--out", str(page.parent), "--workers", "0"]), pages


def interrupt():
    raise KeyboardInterrupt


def test_a_run_is_followed_until_it_is_complete(run, tmp_path, monkeypatch):
    def log():
        with open(run / "metrics.jsonl", "a") as file:
            file.write(f"{train_line(99, 1)}\n".replace("'", '"'))

    def end():
        shutil.move(tmp_path / "kept.json", run / "results.json")
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:-1]))
        beat(run, ended="in order")

    # nothing is written where nothing has happened
    status, pages = follow(run, tmp_path, monkeypatch, [log, lambda: None, end])
    assert status == 0 and len(pages) == 3
    assert links(pages[0]).refresh == "1" and "going on" in pages[0] and "99 of" not in pages[0]
    assert "99 of" in pages[1] and pages[2] == pages[1]
    page = (tmp_path / "page" / "report.html").read_text()
    assert links(page).refresh is None and ">complete<" in page
    # evaluated and drawn at the end alone
    assert "Confusion matrix of" not in pages[2] and "What is taken for what" in page
    assert (tmp_path / "page" / "confusion.png").exists()


def test_ctrl_c_ends_it(run, tmp_path, monkeypatch, capsys):
    status, pages = follow(run, tmp_path, monkeypatch, [interrupt])
    assert status == 130 and capsys.readouterr().err.endswith("interrupted\n")
    assert links(pages[0]).refresh is not None
    page = (tmp_path / "page" / "report.html").read_text()
    assert links(page).refresh is None and "no longer followed" in page


def test_a_run_that_is_complete_is_not_waited_for(run, tmp_path, monkeypatch):
    shutil.move(tmp_path / "kept.json", run / "results.json")
    beat(run, ended="in order")
    assert follow(run, tmp_path, monkeypatch, []) == (0, [])
    assert links((tmp_path / "page" / "report.html").read_text()).refresh is None
