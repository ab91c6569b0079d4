"""Runs for the tests of `psn report`: log lines without a training, and what a page loads."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from html.parser import HTMLParser
from pathlib import Path

from psn_train.recipe import load_recipe, recipe_path
from psn_train.report import matrices, picture
from psn_train.training.heartbeat import Heartbeat, write_heartbeat

LAYERS = ("sn1", "layer1.0.sn1")


def make_run(folder: Path, recipe: str, overrides: tuple[str, ...] = (), epochs: int = 3, per_epoch: int = 352) -> Path:
    """A run's folder with made-up lines: two log lines an epoch, whose evaluation is `(epoch + 1) * 10` % right."""
    folder.mkdir(parents=True)
    resolved = load_recipe(recipe_path(recipe), [*overrides, f"run_dir={folder}"]).resolved()
    (folder / "recipe.json").write_text(json.dumps(resolved))
    lines = []
    for epoch in range(epochs):
        for half in (1, 2):
            lines.append(train_line(step=epoch * per_epoch + half * per_epoch // 2, epoch=epoch))
        lines.append(eval_line(step=(epoch + 1) * per_epoch, epoch=epoch, top1=10.0 * (epoch + 1)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def train_line(step: int, epoch: int) -> dict:
    figures = {"loss": 2.0 - 0.1 * epoch, "top1": 9.0 * (epoch + 1), "lr": 0.1, "images_per_s": 50.0, "data_wait": 0.1}
    return {"kind": "train", "step": step, "epoch": epoch, **figures, "host_memory_gib": 1.5, "bad_samples": 0}


def eval_line(step: int, epoch: int, top1: float) -> dict:
    firing = {layer: {"rate": 0.1 * (epoch + 1), "dead": 0.25, "saturated": 0.0} for layer in LAYERS}
    figures = {"top1": top1, "top5": 90.0, "loss": 1.5 - 0.1 * epoch, "count": 5000, "unreadable": []}
    line = {"kind": "eval", "step": step, "epoch": epoch, "seconds": 1.0, **figures, "selected_on": "held out"}
    return {**line, "firing_rate": 0.1 * (epoch + 1), "firing": firing}


def beat(run: Path, ended: str | None = None) -> None:
    """The note of a rank that lives in this process."""
    who = {"rank": 0, "world_size": 1, "host": socket.gethostname(), "pid": os.getpid()}
    where = {"step": 1, "phase": "compute", "phase_s": 0.0, "idle_s": 0.0, "time": time.time(), "every_s": 10.0}
    write_heartbeat(run, Heartbeat(**who, **where, ended=ended))


def leave_pictures_out(monkeypatch) -> None:
    """Figures are made but not drawn, which takes most of a report's time."""
    for module in (picture, matrices):
        monkeypatch.setattr(module, "inline_svg", lambda figure, says: "<svg></svg>")
        monkeypatch.setattr(module, "png_bytes", lambda figure: b"PNG")


class _Links(HTMLParser):
    """What a page's elements refer to."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.styles = ""
        self.in_style = False
        self.refresh: str | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.in_style = tag == "style"
        self.styles += f"{named.get('style') or ''};"
        if tag == "meta" and named.get("http-equiv") == "refresh":
            self.refresh = named["content"]
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "background", "action", "clip-path"):
            if named.get(name):
                self.found.append((tag, named[name].strip()))

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.styles += data


def links(page: str) -> _Links:
    parser = _Links()
    parser.feed(page)
    parser.close()
    return parser


def outside(page: str) -> list[str]:
    """Everything that a browser would load from elsewhere, or run: each is a mistake."""
    parser = links(page)
    inside = re.compile(r"#|data:|url\(#")
    wrong = [f"<{tag}> {target[:60]}" for tag, target in parser.found if not inside.match(target)]
    wrong += [found for found in re.findall(r"@import[^;]*|url\([^)]*\)", parser.styles) if "url(#" not in found]
    wrong += re.findall(r"<script|<iframe|<object|<embed|javascript:", page)
    return wrong
