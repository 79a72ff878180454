"""Plots of the results of speed.py: ratios on a logarithmic axis, with their quartiles."""

from pathlib import Path

from _timing import read_csv

NAMES = {
    "ours": "DynamicConv", "condconv": "timm's CondConv2d", "static": "static", "geffnet": "geffnet's CondConv2d",
    "fightingcv": "fightingcv's CondConv",
}  # fmt: skip
COLOURS = {"ours": "C0", "condconv": "C1", "static": "0.6", "static ours": "0.3", "geffnet": "C2", "fightingcv": "C4"}
MORE_COLOURS = ("C0", "C2", "C3", "C4", "C5", "C6")
INCHES = 0.2  # a line

Rows = list[dict[str, str]]


def draw(path: Path) -> Path:
    """Plot a CSV file into a file next to it, and return its path."""
    from matplotlib.figure import Figure

    head, rows = read_csv(path)
    what, _, device = path.stem.partition("_")
    figure = Figure(layout="constrained")
    if what in ("layers", "strategies"):
        _dots(figure, rows, "condconv" if what == "layers" else "static")
    else:
        _bars(figure, rows)
    title = f"{what} on {device}: times as long, median and quartiles (left is faster)"
    figure.suptitle("\n".join([title, *head]), fontsize=8)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=110)
    return out


def _bars(figure, rows: Rows) -> None:
    """A bar per contestant, relative to the static one, with milliseconds and memory."""
    rows = [row for row in rows if row["vs_static"]][::-1]
    figure.set_size_inches(10, 1.6 + 1.2 * INCHES * len(rows))
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        middle, below, above = _ratio(row, "static")
        axes.barh(y, middle - 1, left=1, color=COLOURS[row["contestant"]], height=0.8)
        axes.errorbar(middle, y, xerr=[[below], [above]], color="0.2", linewidth=1)
        memory = f", {row['peak_mib']} MiB" if row["peak_mib"] else ""
        axes.annotate(f"{middle:.2f}  ({float(row['ms']):.4g} ms{memory})", (max(middle + above, 1), y), (5, 0),
                      textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    labels = [f"{r['case']}, {r['dtype']}, batch {r['batch']}, {NAMES[r['contestant']]}" for r in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.margins(y=0.01)
    _ratio_axis(axes, "relative to static")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.3)  # room for the text


def _dots(figure, rows: Rows, base: str) -> None:
    """A line per layer, a panel per dtype, mode and batch, a dot per contestant. A ring marks the chosen strategy."""
    rows = [row for row in rows if row[f"vs_{base}"]]
    panels = list(dict.fromkeys((row["dtype"], row["mode"], int(row["batch"])) for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))[::-1]
    names = [name for name in dict.fromkeys(row["contestant"].rstrip("*") for row in rows) if name != base]
    more = iter(MORE_COLOURS)
    colours = {name: COLOURS.get(name) or next(more) for name in names}
    figure.set_size_inches(3 + 3.4 * len(panels), 1.6 + INCHES * len(cases))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        here = [row for row in rows if (row["dtype"], row["mode"], int(row["batch"])) == panel]
        for name in names:
            mine = [row for row in here if row["contestant"].rstrip("*") == name]
            middle, below, above = zip(*(_ratio(row, base) for row in mine), strict=True) if mine else ((), (), ())
            heights = [cases.index(row["case"]) for row in mine]
            axes.errorbar(middle, heights, xerr=[below, above] if mine else None, fmt="o", markersize=3.5,
                          linewidth=0.8, color=colours[name], label=NAMES.get(name, name))  # fmt: skip
        chosen = [row for row in here if row["contestant"].endswith("*")]
        axes.plot([_ratio(row, base)[0] for row in chosen], [cases.index(row["case"]) for row in chosen], "o",
                  markersize=8, fillstyle="none", color="0.2", linewidth=0)  # fmt: skip
        axes.set_title("{}, {}, batch {}".format(*panel), fontsize=8)
        axes.grid(axis="y", linewidth=0.3)
        axes.margins(y=0.01)
        if base == "condconv":
            axes.axvspan(1, 1.05, color="C1", alpha=0.15, linewidth=0)
        _ratio_axis(axes, f"relative to {NAMES[base]}")
    all_axes[0].set_yticks(range(len(cases)), cases, fontsize=6)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=len(labels))


def _ratio(row: dict[str, str], base: str) -> tuple[float, float, float]:
    """Median, and how far the quartiles are below and above."""
    middle, low, high = (float(row[f"vs_{base}{end}"]) for end in ("", "_low", "_high"))
    return middle, middle - low, high - middle


def _ratio_axis(axes, label: str) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="0.2", linewidth=0.8)
    axes.tick_params(axis="x", labelsize=6)
    axes.set_xlabel(label, fontsize=7)
