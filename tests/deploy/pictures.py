"""Draws a dashboard from Prometheus' answers: not with Grafana, but with the same queries, panel by panel.

`python tests/deploy/pictures.py NODE` starts a fleet, keeps it busy for some minutes, and writes deploy/grafana/*.png.
The tests draw as well, to check that every panel has data."""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from chart import CHART, ROOT  # noqa: E402

MINUTES = 4
COLOURS = {"green": "#3a9e5c", "red": "#d0453a", "blue": "#3b73c8"}


def dashboards():
    """All dashboards, from their files."""
    return [json.loads(path.read_text()) for path in sorted((CHART / "files" / "dashboards").glob("*.json"))]


def chosen(dashboard, pod):
    """Typical values of the variables: everything, or one pod if only one can be selected."""
    return {"namespace": ".*", "pod": pod if dashboard["uid"] == "tidegate-node" else ".*"}


def substituted(expression, values, interval):
    """An expression as Grafana sends it."""
    for name, value in {**values, "__rate_interval": interval}.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression, f"a variable is left in {expression}"
    return expression


def formatted(value, unit):
    """A number, formatted roughly like in Grafana."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "dateTimeAsIso":
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(value / 1000))
    base, names = (1024, ["B", "KiB", "MiB", "GiB"]) if unit in ("bytes", "Bps") else (1000, ["", "k", "M", "G"])
    step = 0
    while abs(value) >= base and step < len(names) - 1:
        value, step = value / base, step + 1
    suffix = {"Bps": "/s", "cps": "/s", "cores": ""}.get(unit, "")
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {names[step]}{suffix}".strip()


class Canvas:
    """A figure with a dashboard's grid: 24 columns, and rows from the top."""

    def __init__(self, dashboard):
        # Two lines for the title.
        self.height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"]) + 2
        self.figure = pyplot.figure(figsize=(18, self.height * 0.36), dpi=64)
        self.figure.patch.set_facecolor("#f4f5f7")
        self.figure.text(0.008, 1 - 1.2 / self.height, dashboard["title"], fontsize=15, weight="bold")

    def axes(self, panel, left=0.0, bottom=0.0, right=0.0, top=0.0, **options):
        """Axes at the panel's place, minus margins."""
        at = panel["gridPos"]
        place = [
            (at["x"] + left) / 24,
            1 - (at["y"] + 2 + at["h"] - bottom) / self.height,
            (at["w"] - left - right) / 24,
            (at["h"] - bottom - top) / self.height,
        ]
        return self.figure.add_axes(place, **options)

    def save(self, file):
        self.figure.savefig(file, pil_kwargs={"optimize": True})
        pyplot.close(self.figure)


def draw(dashboard, prometheus, values, interval, start, end, file):
    """Writes the picture and returns the number of series of each panel, by title."""
    canvas = Canvas(dashboard)
    drawn = {}
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            axes = canvas.axes(panel, frameon=False, xticks=[], yticks=[])
            axes.text(0.008, 0.3, f"▾ {panel['title']}", fontsize=11, weight="bold", transform=axes.transAxes)
            continue
        series = ask(panel, prometheus, values, interval, start, end)
        drawn[panel["title"]] = len(series)
        background = canvas.axes(panel, 0.08, 0.08, 0.08, 0.08, xticks=[], yticks=[])
        for side in background.spines.values():
            side.set_color("#dfe1e6")
        middle = {"ha": "center", "transform": background.transAxes}
        background.text(0.5, 0.97, panel["title"], fontsize=9, weight="bold", va="top", **middle)
        if panel["type"] == "stat":
            text, colour = number(panel, series)
            background.text(0.5, 0.4, text, fontsize=20 if len(text) < 10 else 11, va="center", color=colour, **middle)
        else:
            lines(canvas.axes(panel, 1.0, 2.6, 0.3, 1.0), panel, series, end - start)
    canvas.save(file)
    return drawn


def ask(panel, prometheus, values, interval, start, end):
    """Pairs of a legend and the points of its line, without points that are not numbers."""
    series = []
    for target in panel["targets"]:
        expression = substituted(target["expr"], values, interval)
        step = max(1, (end - start) / 200)
        answer = prometheus.api("query_range", query=expression, start=start, end=end, step=step)
        for found in answer["result"]:
            legend = target["legendFormat"]
            for label, value in found["metric"].items():
                legend = legend.replace("{{" + label + "}}", value)
            points = [(float(at) - start, float(value)) for at, value in found["values"]]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                series.append((legend, points))
    return series


def number(panel, series):
    """The text of a stat and its colour."""
    last = series[0][1][-1][1] if series else math.nan
    defaults = panel["fieldConfig"]["defaults"]
    reached = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or last >= step["value"]]
    return formatted(last, defaults["unit"]), COLOURS[reached[-1]["color"]]


def lines(axes, panel, series, seconds):
    """Draws a graph's series, with the legend below."""
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults["custom"]
    if custom["stacking"]["mode"] == "normal" and series:
        times = sorted({at for _, points in series for at, _ in points})
        stacked = [[dict(points).get(at, 0.0) for at in times] for _, points in series]
        axes.stackplot(times, stacked, labels=[legend for legend, _ in series], alpha=0.6)
    else:
        for legend, points in series:
            axes.plot(*zip(*points), linewidth=1, label=legend)
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0, top=defaults.get("max"))
    axes.set_xlim(0, seconds)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, defaults["unit"])))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02}"))
    axes.tick_params(labelsize=7, length=2)
    axes.grid(color="#eceef1", linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # More than eight would be indistinguishable.
    handles, legends = (part[:8] for part in axes.get_legend_handles_labels())
    axes.legend(handles, legends, fontsize=6.5, ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def main():
    from fleet import Fleet, Load

    binary = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:
        fleet = Fleet(binary, Path(directory))
        try:
            start = time.time()
            load = Load(fleet, sockets=120, pause=0.004)
            try:
                time.sleep(MINUTES * 60)
                for dashboard in dashboards():
                    file = ROOT / "deploy" / "grafana" / f"{dashboard['uid']}.png"
                    values = chosen(dashboard, fleet.nodes[0].name)
                    draw(dashboard, fleet.prometheus, values, "20s", start + 25, time.time(), file)
            finally:
                load.stop()
        finally:
            fleet.stop()


if __name__ == "__main__":
    main()
