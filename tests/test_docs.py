"""The pages of docs/: the site is built strictly, every link of it leads somewhere, every Python snippet runs."""

import html.parser
import json
import logging
import re
import urllib.parse
from pathlib import Path

import pytest
from conftest import ROOT
from registries import kept_registries

PAGES = sorted((ROOT / "docs").rglob("*.md"))
_SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[str]:
    return _SNIPPET.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    # some write files
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if page.stem == "spikingjelly":
        pytest.importorskip("spikingjelly")
    names = {"__name__": page.stem}
    with kept_registries(tmp_path):
        for number, snippet in enumerate(snippets(page), start=1):
            if file := re.match(r"# (\w+\.py)\n", snippet):
                # the page tells to save it under this name
                Path(file[1]).write_text(snippet)
            exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """As GitHub shows the page."""
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


# ---- the site


class Links(html.parser.HTMLParser):
    """Of one page: where its links lead, what it loads, which anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.leads: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href") is not None:
            self.leads.append(found["href"])
        # <link rel=canonical> and the like load nothing
        loads = found.get("rel") in ("stylesheet", "icon", "preload", "preconnect") if tag == "link" else tag != "a"
        if loads:
            self.loads += [found[key] for key in ("href", "src") if found.get(key)]


def wrong_links(site: Path) -> list[str]:
    """Every link and every file of a site that leads nowhere, or is loaded from elsewhere."""
    pages = {page: Links(page.read_text(encoding="utf-8")) for page in sorted(site.rglob("*.html"))}
    wrong = []
    for page, found in pages.items():
        for target in dict.fromkeys(found.leads + found.loads):
            parts = urllib.parse.urlsplit(target)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                good = parts.scheme == "https" and "." in parts.netloc and target not in found.loads
            else:
                # the page for what is not found has addresses from the root
                base = site if parts.path.startswith("/") else page.parent
                path = base / urllib.parse.unquote(parts.path).lstrip("/") if parts.path else page
                path = path.resolve() / "index.html" if path.is_dir() else path.resolve()
                good = path.is_file()
                if good and parts.fragment and path.suffix == ".html":
                    good = urllib.parse.unquote(parts.fragment) in pages[path].anchors
            if not good:
                wrong.append(f"{page.relative_to(site)}: {target}")
    return wrong


def build(site: Path, **changes) -> None:
    """mkdocs.yml's site, in this process; raises Abort where it warns of something."""
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="pip install psn-train[docs]")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), **changes)
    assert config.strict
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs.build(config)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder.resolve()


def test_site_has_every_page_and_no_broken_link(site):
    built = {str(page.relative_to(site).with_suffix(".md")) for page in site.rglob("*.html")}
    assert built == {str(page.relative_to(ROOT / "docs")) for page in PAGES} | {"404.md"}
    assert wrong_links(site) == []


def test_reference_has_what_the_code_has(site):
    from psn_train import models, neurons
    from psn_train.recipe import flatten, recipe_schema

    anchors = {page: Links((site / f"reference/{page}.html").read_text()).anchors for page in ("neurons", "models")}
    for name in set(neurons.__all__) - {"NEURONS"}:
        assert f"psn_train.neurons.{name}" in anchors["neurons"]
    for name in [name for name in models.__all__ if callable(getattr(models, name))]:
        assert f"psn_train.models.{name}" in anchors["models"]
    keys = (site / "reference/recipe.html").read_text()
    sections = recipe_schema()["$defs"]
    for section in sections.values():
        assert all(f".{key}<" in keys or f"{key}<" in keys for key in section["properties"])
    assert all(f">{key}<" in keys for key in flatten({"optim": {"lr": 0}, "data": {"hold_out": 0}}))
    verbs = (site / "reference/command_line.html").read_text()
    for verb in ("psn train", "psn shards cifar10dvs", "psn bench memory", "psn export"):
        assert f"usage: {verb}" in verbs


@pytest.mark.parametrize(
    "text",
    ["[gone](gone.md)", "[no anchor](other.md#nothing)", "[no file](../launch/nothing.sh)", "[folder](../launch)"],
)
def test_a_broken_link_ends_the_build(tmp_path, text, caplog):
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{text}\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    with caplog.at_level(logging.WARNING), pytest.raises(Abort):
        build(tmp_path / "site", docs_dir=str(tmp_path / "docs"), nav=None, plugins=[])


def test_a_broken_link_of_a_site_is_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="here">A</h1><a href="#here">x</a><a href="#there">x</a><a href="b.html">x</a><a href="c.html#d">x</a>'
        '<script src="https://elsewhere.org/x.js"></script><a href="http://plain.org/">x</a><a href="https://a.org">x</a>'
    )
    (tmp_path / "c.html").write_text("<p>C</p>")
    wrong = ["#there", "b.html", "c.html#d", "http://plain.org/", "https://elsewhere.org/x.js"]
    assert wrong_links(tmp_path.resolve()) == [f"a.html: {target}" for target in wrong]


def test_every_trap_names_tests_that_exist():
    page = (ROOT / "docs" / "traps.md").read_text(encoding="utf-8")
    traps = [item for item in re.split(r"^(?=- )", page, flags=re.MULTILINE) if item.startswith("- ")]
    assert len(traps) >= 40
    for trap in traps:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", trap)
        assert named, trap
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (
                f"{file}::{test}"
            )


def test_the_demos_figures_are_those_of_its_log():
    from psn_train.recipe import load_recipe, recipe_hash, recipe_path

    log = json.loads((ROOT / "recipes" / "results" / "demo.json").read_text())
    (run,) = log["runs"]
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert (
        run["best"] == run["last"] and f"{run['best']['top1']:.2f} % of the 1,000 digits held out, at the best" in page
    )
    for said in (f"firing rate {run['firing_rate'][-1]:.3f}", f"{run['seconds']} seconds; commit {log['commit']}"):
        assert said in page
    assert recipe_hash(load_recipe(recipe_path(log["recipe"]))) == run["recipe_hash"]
