"""Plots as SVG. Those of a report are data URIs: its page needs no other file, and an `<img>` runs no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from .walk import Sample

# Okabe and Ito's palette: told apart with every common form of colour blindness, and in grey.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vPX"
# A fixed salt keeps the ids in the file, and so the whole file, the same for the same numbers.
_STYLE: Mapping[Any, Any] = {"svg.hashsalt": "kv-retract", "svg.fonttype": "path", "font.size": 9}


def divergence_plot(samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """Draw the divergence of every retraction step as a dot, by arm, and the mean with its standard error.

    Args:
        samples: those at which the arm's own eraser made the edit.
        rows: of `metric_rows`, for all policies together.
        arms: from top to bottom; the reference, whose divergence is zero, left out.
    """
    means = {row["arm"]: row for row in rows}

    def draw(axes: Any) -> None:
        for y, arm in enumerate(arms):
            color, values = _COLORS[y % len(_COLORS)], _finite([s.kl for s in samples if s.arm == arm])
            # The same spread of heights for the same number of dots, whatever the run.
            heights = [y + 0.22 * ((7 * i) % 11 / 5 - 1) for i in range(len(values))]
            axes.plot(values, heights, "o", color=color, alpha=0.35, markersize=3, markeredgewidth=0)
            row = means.get(arm, {})
            mean, error = row.get("kl_mean"), row.get("kl_se")
            if mean is not None and mean < float("inf"):
                axes.errorbar(mean, y, xerr=error, fmt="D", color=color, markersize=6, capsize=4, markeredgecolor="w")
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_xlim(left=0)
        axes.set_xlabel("KL from recompute, nats per token (dots: steps; diamond: mean and its standard error)")

    return _uri(_svg(draw, height=1.1 + 0.5 * len(arms)))


def cost_plot(samples: Sequence[Sample], arms: Sequence[str]) -> str:
    """Draw the time of every edit against the length of what came after the span, by arm; both axes logarithmic."""

    def draw(axes: Any) -> None:
        for number, arm in enumerate(arms):
            points = [(s.suffix_tokens, s.edit_ms) for s in samples if s.arm == arm and s.edit_ms]
            if points:
                style = {"marker": _MARKERS[number % len(_MARKERS)], "color": _COLORS[number % len(_COLORS)]}
                x, y = zip(*points, strict=True)
                axes.plot(x, y, linestyle="", alpha=0.6, markersize=4, label=arm, markeredgewidth=0, **style)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_yscale("log")
        axes.set_xlabel("cached tokens after the first span")
        axes.set_ylabel("time of the edit, ms")
        if axes.has_data():
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)

    return _uri(_svg(draw, height=3.4))


def loss_plot(
    entries: Sequence[Mapping[str, Any]], *, losses: Mapping[str, str], shares: Sequence[str], share: str
) -> bytes:
    """Draw the log of a training run (`RunFolder.entries`) as an SVG file.

    Args:
        entries: of the log.
        losses: entry to label, nats per token.
        shares: what validations tell by family, 0 to 1; the mean is drawn.
        share: what those are.
    """

    def draw(axes: Any) -> None:
        known = {name: label for name, label in losses.items() if any(name in e for e in entries)}
        for number, (name, label) in enumerate(known.items()):
            steps = [e["step"] for e in entries if name in e]
            axes.plot(steps, [e[name] for e in entries if name in e], color=_COLORS[number], label=label)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        right = axes.twinx()
        right.set_ylim(0, 1.02)
        right.set_ylabel(share)
        for number, name in enumerate(shares, start=max(2, len(losses))):
            points = [(e["step"], sum(e[name].values()) / len(e[name])) for e in entries if e.get(name)]
            if points:
                at, values = zip(*points, strict=True)
                right.plot(at, values, _MARKERS[number] + "--", color=_COLORS[number], markersize=4, label=name)
        handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=5, frameon=False)

    return _svg(draw, height=3.8)


def repeated_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw leak and unaffected accuracy against the number of edits, one after the other, by arm; an SVG file."""

    def draw(axes: Any) -> None:
        chosen = [row for row in rows if row["mode"] == "in turn"]
        for number, arm in enumerate(dict.fromkeys(row["arm"] for row in chosen)):
            mine = sorted((row for row in chosen if row["arm"] == arm), key=lambda row: row["edits"])
            edits = [row["edits"] for row in mine]
            look: dict[str, Any] = dict(
                color=_COLORS[number % len(_COLORS)], marker=_MARKERS[number % len(_MARKERS)], markersize=4
            )
            axes.plot(edits, [row["unaffected_accuracy"] for row in mine], "-", label=arm, **look)
            axes.plot(edits, [row["leak"] for row in mine], ":", **look)
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("retractions in the thread")
        axes.set_ylabel("other facts told (lines), leak (dotted)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3, frameon=False)

    return _svg(draw, height=4.2)


PAPER_CONTEXTS = (1024, 32_768)
PAPER_GROWTH = {"KVEraser": 1.24, "full recomputation": 17.6}
"""How many times an edit costs at the longest context what it costs at the shortest (KVEraser, arXiv 2606.17034)."""


def latency_plot(document: Mapping[str, Any]) -> bytes:
    """Draw how each edit's cost grows with the thread, at the last depth measured, beside the paper's; an SVG file."""

    def draw(axes: Any) -> None:
        depth = max(row["depth"] for row in document["rows"])
        chosen = [row for row in document["rows"] if row["depth"] == depth]
        for number, arm in enumerate(dict.fromkeys(row["arm"] for row in chosen)):
            mine = sorted((row["context"], row["edit_ms"]) for row in chosen if row["arm"] == arm)
            contexts, times = zip(*mine, strict=True)
            look = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
            label = arm.replace('kveraser:variant="', "kveraser ").rstrip('"')
            axes.plot(contexts, [ms / times[0] for ms in times], "-", markersize=4, label=label, **look)
        for (name, growth), style in zip(PAPER_GROWTH.items(), ("--", ":"), strict=True):
            axes.plot(PAPER_CONTEXTS, (1, growth), style, color="#888888", label=f"paper: {name} (end points)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        contexts = sorted({row["context"] for row in chosen} | set(PAPER_CONTEXTS))
        axes.set_xticks(contexts, [f"{context / 1024:g}K" for context in contexts])
        axes.set_xlabel(f"tokens of the thread; {document['span']} are erased at {depth:.0%} depth")
        axes.set_ylabel("time of the edit, over that of the shortest thread")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)

    return _svg(draw, height=3.8)


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _svg(draw: Callable[[Any], None], *, height: float) -> bytes:
    with rc_context(dict(_STYLE)):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        axes = figure.subplots()
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and value < float("inf")]
