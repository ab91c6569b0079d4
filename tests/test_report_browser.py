"""The page of `psn report` in headless Chromium: nothing overflows, every picture is there, texts can be read."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import timm
from PIL import Image
from report_runs import make_run, outside

import psn_train.models  # noqa: F401 (registers)
from psn_train.report.layers import read_layers
from psn_train.report.page import Looked, write_page
from psn_train.report.record import open_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt install chromium)")

# a page beside it has scripts, and looks into ours
LOOK = """<!DOCTYPE html><body style="margin:0">
<iframe id=f src="report.html" style="border:0;width:WIDTHpx;height:3000px"></iframe><script>
document.getElementById("f").onload = () => {
  const d = document.getElementById("f").contentDocument, all = (s) => [...d.querySelectorAll(s)];
  const sizes = all("svg text").map((t) => [t, t.closest("svg")]).map(([t, s]) =>
    parseFloat(getComputedStyle(t).fontSize) * s.getBoundingClientRect().width / s.viewBox.baseVal.width);
  const seen = {
    wide: d.documentElement.scrollWidth,
    broken: all("img").filter((i) => !i.complete || !i.naturalWidth).length,
    svgs: all("svg").length,
    empty: all("svg").filter((s) => s.getBoundingClientRect().height < 50).length,
    loaded: d.defaultView.performance.getEntriesByType("resource").map((e) => e.name)
      .filter((n) => !n.startsWith("data:")),
    small: Math.min(...sizes),
  };
  document.body.insertAdjacentHTML("beforeend", "<pre id=seen>" + JSON.stringify(seen) + "</pre>");
};
</script></body>"""


def browse(profile, *options) -> str:
    """What Chromium prints; it has no network."""
    quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    alone = ("--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", f"--user-data-dir={profile}")
    done = subprocess.run([CHROMIUM, *quiet, *alone, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of one run of PSN with the paper's log behind it, and one of three runs: masked, sliding PSN, LIF."""
    folder = tmp_path_factory.mktemp("pages")
    kinds = {
        "psn": ("sequential_net_psn.t32_scifar10", "sequential_net_psn", {"T": 32}),
        "masked": ("sequential_net_masked_psn.k32_scifar10", "sequential_net_masked_psn", {"T": 32, "k": 8}),
        "sliding": ("vgg_snn_sliding_psn.t10_cifar10dvs", "vgg_snn_sliding_psn", {"T": 10, "k": 2, "width": 4}),
        "lif": ("sequential_net_lif.t32_scifar10", "sequential_net_lif", {"T": 32}),
    }
    records, looked = {}, {}
    for name, (recipe, network, arguments) in kinds.items():
        records[name] = open_run(make_run(folder / "runs" / name, recipe))
        arguments = {"width": 8, "num_classes": 10, **arguments}
        layers = read_layers(timm.create_model(network, **arguments))
        looked[name] = Looked(layers=layers, no_answers="Nothing was evaluated for this page.")
        records[name].checkpoint = folder / "step_00000001"
    write_page([records["psn"]], [looked["psn"]], folder / "one")
    names = ("masked", "sliding", "lif")
    write_page([records[name] for name in names], [looked[name] for name in names], folder / "three")
    return folder


@pytest.mark.parametrize("which", ["one", "three"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_in_a_browser(pages, tmp_path, which, width):
    folder = pages / which
    assert outside((folder / "report.html").read_text()) == []
    (folder / "look.html").write_text(LOOK.replace("WIDTH", str(width)))
    window = f"--window-size={max(width, 500)},3000"
    printed = browse(tmp_path, "--dump-dom", "--virtual-time-budget=5000", window, f"file://{folder}/look.html")
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', printed)[1])
    assert seen["wide"] <= width and seen["loaded"] == [] and seen["broken"] == 0
    assert seen["svgs"] >= 12 and seen["empty"] == 0
    # of the smallest text in a picture, in CSS pixels
    assert seen["small"] >= 8


def test_a_screenshot_shows_the_page(pages, tmp_path):
    shot = tmp_path / "shot.png"
    browse(tmp_path / "profile", "--window-size=1280,2000", f"--screenshot={shot}", f"file://{pages}/one/report.html")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (2000, 1280, 3)
    # the run's curve in blue, the paper's in grey, and no large empty part
    for colour in ((0, 114, 178), (91, 99, 108)):
        assert (np.abs(pixels - colour).max(2) <= 12).sum() > 200
    rows = pixels.min(axis=(1, 2)) < 200
    assert max(map(len, re.findall("0+", "".join("01"[int(row)] for row in rows)))) < 300


def test_colours_are_those_of_the_page_in_both_schemes(pages):
    page = (pages / "one" / "report.html").read_text()
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    light, dark = (set(re.findall(r"--(\w+):", part)) for part in style.split("@media (prefers-color-scheme: dark)", 1))
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert {"ink", "muted", "grid", "s0"} <= used <= light
    assert light == set(re.findall(r"--(\w+):", style.split("prefers-color-scheme: dark")[1].split("}")[0])) <= dark
