"""The picture of `psn bench neurons`: LIF / PSN over N for each T, and the times themselves."""

from __future__ import annotations

from pathlib import Path

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow, which paper swallows; markers and
# dashes say the same again
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")
_TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
# small panels of times beside each other
_PANELS = 6


def figure_class():
    """matplotlib's Figure; ValueError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'psn-train[demo]'") from error
    return Figure


def threads_name(environment: dict) -> str:
    """2 CPU threads."""
    return f"{environment['threads']} CPU thread{'s' * (environment['threads'] > 1)}"


def _chosen(values: list[int], most: int) -> list[int]:
    """At most so many, evenly taken, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def draw_neurons(report: dict, path: Path) -> None:
    """Write the picture of a report of `bench_neurons` as PNG.

    The upper row, if LIF and PSN were both timed: time of LIF over time of PSN against N, a line for each T. Below: for
    each of at most six T, median times against N, a line for each neuron, its quartiles shaded.
    """
    cells = [cell for cell in report["cells"] if not cell["left_out"]]
    has_ratio = any("lif_over_psn" in cell for cell in cells)
    shown = _chosen(sorted({cell["T"] for cell in cells}), _PANELS)
    figure = figure_class()(figsize=(13, 11.5 if has_ratio else 7), layout="constrained")
    figure.suptitle(_headline(report), fontsize=11)
    if has_ratio:
        upper, lower = figure.subfigures(2, 1, height_ratios=(4.5, 7))
        _draw_ratios(upper, cells)
    else:
        lower = figure
    _draw_times(lower, cells, report["grid"]["neurons"], shown)
    figure.savefig(path, dpi=120)


def _headline(report: dict) -> str:
    here = report["environment"]
    parts = [here["device"], threads_name(here), f"torch {here['torch']}", here["dtype"]]
    if here["compile"]:
        parts.append("torch.compile")
    if report["k"]:
        orders = sorted(set(report["k"].values()))
        parts.append(f"k = {orders[0]}" if len(orders) == 1 else f"k = min(T, {orders[-1]})")
    return "   ".join(parts)


def _draw_ratios(figure, cells: list[dict]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    steps = sorted({cell["T"] for cell in cells})
    # from dark to light, short of the end that is too light for white paper
    colours = [colormaps["viridis"](0.85 * place / max(len(steps) - 1, 1)) for place in range(len(steps))]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (which, title) in zip(axes, _TITLES.items(), strict=True):
        for place, T in enumerate(steps):
            line = [(cell["N"], cell["lif_over_psn"][which]) for cell in cells if cell["T"] == T]
            axis.plot(
                *zip(*line, strict=True), color=colours[place], marker=_MARKERS[place % len(_MARKERS)], label=f"T = {T}"
            )
        axis.axhline(1.0, color="0.3", linewidth=1, linestyle="--")
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("neurons N")
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_locator(LogLocator(base=2))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lowest, highest = axes[0].get_ylim()
    axes[0].set_ylim(min(lowest, 0.7), max(highest, 1.5))
    axes[0].set_ylabel("time of LIF / time of PSN\n(above 1: PSN is faster)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)


def _draw_times(figure, cells: list[dict], neurons: list[str], shown: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    every = [t[key] for cell in cells for which in _TITLES for t in cell[which].values() for key in ("q1_ms", "q3_ms")]
    # labels between 0.1, 1 and 10 only where the axis is short
    between = plain if max(every) < 10 * min(every) else NullFormatter()

    axes = figure.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
    for row, (which, title) in zip(axes, _TITLES.items(), strict=True):
        for axis, T in zip(row, shown, strict=True):
            line = [cell for cell in cells if cell["T"] == T]
            N = [cell["N"] for cell in line]
            for place, name in enumerate(neurons):
                times = [cell[which][name] for cell in line]
                style = {
                    "color": _COLOURS[place % len(_COLOURS)],
                    "linestyle": _DASHES[place % len(_DASHES)],
                    "marker": _MARKERS[place % len(_MARKERS)],
                }
                axis.plot(N, [t["median_ms"] for t in times], label=name, markersize=4, **style)
                quartiles = [t["q1_ms"] for t in times], [t["q3_ms"] for t in times]
                axis.fill_between(N, *quartiles, color=style["color"], alpha=0.2, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(plain)
            axis.yaxis.set_minor_formatter(between)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{title}\nmedian time of a call, ms")
    for axis, T in zip(axes[0], shown, strict=True):
        axis.set_title(f"T = {T}")
    for axis in axes[1]:
        axis.set_xlabel("neurons N")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
