"""A matplotlib figure as SVG that stands in the page, in the page's own colours, and as a PNG file."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from psn_train.bench.picture import figure_class

# the colours of the light page; in the SVG each is a variable of report.css, which has others for a dark one
INK, MUTED, GRID, PAPER = "#1f2328", "#6a737d", "#d5d9de", "#ffffff"
# Okabe and Ito's, which the colour-blind tell apart
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", **{colour: f"s{i}" for i, colour in enumerate(SERIES)}}
DASHES = ("-", "--", "-.", ":")
_DPI = 140


@dataclass(frozen=True)
class Picture:
    """One figure of the page.

    Attributes:
        name: of its file, without .png.
        title: over it.
        says: in words, for those who do not see it.
        svg: an <svg> element without ids that another figure may have, too.
        png: the bytes of the file.
        note: under it.
    """

    name: str
    title: str
    says: str
    svg: str
    png: bytes
    note: str = ""


def new_figure(width: float, height: float, layout: str | None = "constrained"):
    """An empty figure of that many inches."""
    return figure_class()(figsize=(width, height), layout=layout)


def finish(figure, name: str, title: str, says: str, note: str = "", *, png: bool = True) -> Picture:
    """The figure as a Picture; `png=False` saves the time where no file is written."""
    return Picture(name, title, says, inline_svg(figure, says), png_bytes(figure) if png else b"", note)


def png_bytes(figure) -> bytes:
    """On white, whatever the page is."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, facecolor=PAPER)
    return out.getvalue()


def inline_svg(figure, says: str) -> str:
    """An <svg> element that takes the width of its place; its texts are text, in the page's font.

    Args:
        says: what it shows, in words.
    """
    import matplotlib

    out = io.StringIO()
    # the texts' widths are DejaVu's, which is wider than what pages are set in
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.image_inline": True, "svg.hashsalt": says}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # groups are named alike in every figure; what is referred to has a name of its own
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: _variable(found[0]), text)
    text = re.sub(r'font-family: [^;"]*', "font-family: inherit", text)
    # it would be of the whole page
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    opening = re.match(r"<svg[^>]*>", text)[0]
    box = re.search(r'viewBox="[^"]*"', opening)[0]
    plain = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-label="{_escaped(says)}">'
    return plain + text[len(opening) :]


def _variable(colour: str) -> str:
    name = _VARIABLES.get(colour.lower())
    return colour if name is None else f"var(--{name})"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def plain_axis(axis, title: str = "", *, grid: bool = True) -> None:
    """The look of all axes: thin lines, no box."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axis.spines[side].set_color(MUTED)
    axis.tick_params(colors=INK, labelsize=9, length=3, color=MUTED)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    axis.title.set_color(INK)
    if title:
        axis.set_title(title, fontsize=10)
    if grid:
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)


def legend(axis, **where) -> None:
    """A legend without a box, where there is anything to name."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles, labels, frameon=False, fontsize=9.5, labelcolor=INK, **where)
