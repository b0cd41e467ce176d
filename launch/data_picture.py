"""A picture of the lengths of the documents of prepared data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..data_pipeline.extras import missing_package
from ..data_pipeline.shards.stats import Stats

_STYLES = (
    {"color": "#9dc3e6", "fill": True},
    {"color": "#b3430b", "linewidth": 1.5},
)
"""The first split is filled and the second one drawn over it, so that both stay visible where they agree."""

_DOTS_PER_INCH = 150


def check_matplotlib() -> None:
    """Raise UsageError unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_package("--picture", "matplotlib", "plot")


def draw_lengths(stats: Stats, path: Path) -> None:
    """Write a PNG: the share of each split's documents, and of its tokens, in documents of each range of lengths.

    The ranges lie between powers of two. Raises OSError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, what in zip(panels, ("documents", "tokens"), strict=True):
        for (name, split), style in zip(stats.splits.items(), _STYLES, strict=False):
            buckets, total = split.lengths.histogram(), getattr(split.lengths, what)
            edges = [bucket.first for bucket in buckets] + [buckets[-1].last + 1]
            shares = [getattr(bucket, what) / total for bucket in buckets]
            axes.stairs(shares, edges, label=f"{name}: {total:,} {what}", **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
        axes.tick_params(axis="x", rotation=45)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("tokens in the document")
        axes.set_ylabel(f"share of {what}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
