"""What a run of the bench means: ratios, shares of the limit, a Markdown report and plots."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

from bench.cases import SWEEP, find
from bench.peers import contestant


def commit() -> str:
    """The commit that is checked out, with a + if files have changed; empty without git."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=+"]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def seconds(entry: dict[str, Any], name: str) -> float | None:
    """The median over the rounds of a contestant, or None if it is missing."""
    rounds = entry["contestants"].get(name, {}).get("rounds")
    return statistics.median(rounds) if rounds else None


def best_peer(entry: dict[str, Any]) -> tuple[str | None, float | None]:
    """The fastest of the others and its seconds."""
    running = {}
    for name in entry["contestants"]:
        taken = seconds(entry, name)
        if name != "fastrnn" and taken is not None and not contestant(name).option:
            running[name] = taken
    if not running:
        return None, None
    name = min(running, key=running.__getitem__)
    return name, running[name]


def variants(entry: dict[str, Any]) -> dict[str, float]:
    """The time of each contestant with an option over its time without."""
    found = {}
    for name in entry["contestants"]:
        one = contestant(name)
        plain, taken = seconds(entry, one.name), seconds(entry, name)
        if one.option and plain and taken:
            found[name] = taken / plain
    return found


def ratio(entry: dict[str, Any]) -> float | None:
    """How many times faster than the best peer."""
    ours, theirs = seconds(entry, "fastrnn"), best_peer(entry)[1]
    return theirs / ours if ours and theirs else None


def share(entry: dict[str, Any], name: str = "fastrnn") -> float:
    """Share of the multiply-add peak that the products alone come to."""
    taken = seconds(entry, name)
    if taken is None:
        return math.nan
    work = find(entry["case"]).operations(entry["cell"], entry["mode"])
    return work / taken / 1e9 / entry["limits"]["gflops"]


def geometric_means(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of the ratios, for each mode."""
    means = {}
    for mode in dict.fromkeys(entry["mode"] for entry in results):
        ratios = [ratio(entry) for entry in results if entry["mode"] == mode]
        known = [value for value in ratios if value]
        if known:
            means[mode] = statistics.geometric_mean(known)
    return means


# A share of its rounds that a contestant should not have lost.
_MUCH = 0.05


def disturbed(entry: dict[str, Any]) -> str:
    """Who lost much to others, ours or the peer that it is compared with; empty if nobody did."""
    words = []
    for name in ("fastrnn", best_peer(entry)[0]):
        found = entry["contestants"].get(name or "", {})
        shares = found.get("stolen") or [None]
        if None not in shares and statistics.median(shares) > _MUCH:
            words.append(f"{name} {statistics.median(shares):.0%}")
        # Older records do not tell.
        whole = found.get("whole", [])
        if 2 * whole.count(False) > len(whole):
            words.append(f"{name} had half of the machine")
    return ", ".join(words)


def markdown(record: dict[str, Any], plots: list[str]) -> str:
    """The report."""
    about, results = record["about"], record["results"]
    lines = ["# Measured", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [
        "Milliseconds of one step: the median over the rounds (lowest and highest round), for each",
        "contestant in a process of its own. Ratio: the best peer's time over ours. Share: of the",
        "multiply-add peak measured between the rounds, counting the products alone. A round from",
        "which the host of a virtual machine took time for others (steal) was timed again, if that",
        "is known; the calmest counts. In inference, weights are fixed beforehand: ours",
        "frozen, in sessions of ONNX Runtime, as constants of JAX and TensorFlow, in PyTorch if",
        "that is faster.",
        "",
    ]
    for entry in results:
        if lost := disturbed(entry):
            what = f"{entry['mode']} {entry['case']} {entry['cell']}"
            lines.append(f"- lost much all the same, in the median of its rounds: {what}: {lost}")
    for mode, mean in geometric_means(results).items():
        lines.append(f"- {mode}: geometric mean of the ratios {mean:.2f}")
    lines += ["", *(f"![{Path(plot).stem}]({plot})" for plot in plots), ""]
    for mode in dict.fromkeys(entry["mode"] for entry in results):
        chosen = [entry for entry in results if entry["mode"] == mode]
        names = list(dict.fromkeys(name for entry in chosen for name in entry["contestants"]))
        lines += [f"## {mode.capitalize()}", ""]
        lines.append("| case | cell | ratio | share | limit GFLOP/s | " + " | ".join(names) + " |")
        lines.append("|---|---|---|---|---|" + "---|" * len(names))
        for entry in chosen:
            times = [_time(entry["contestants"].get(name, {})) for name in names]
            found = ratio(entry)
            lines.append(
                f"| {entry['case']} | {entry['cell']} | {f'{found:.2f}' if found else ''} | "
                f"{share(entry):.2f} | {entry['limits']['gflops']:.0f} | {' | '.join(times)} |"
            )
        lines.append("")
        options = list(dict.fromkeys(name for entry in chosen for name in variants(entry)))
        if options:
            lines += ["Time of a contestant with an option over its time without:", ""]
            lines.append("| case | cell | " + " | ".join(options) + " |")
            lines.append("|---|---|" + "---|" * len(options))
            for entry in chosen:
                known = variants(entry)
                times = [f"{known[name]:.2f}" if name in known else "" for name in options]
                lines.append(f"| {entry['case']} | {entry['cell']} | {' | '.join(times)} |")
            lines.append("")
    missing: dict[str, list[str]] = {}
    for entry in results:
        for name, found in entry["contestants"].items():
            if "missing" in found:
                where = f"{entry['mode']} {entry['case']} {entry['cell']}"
                missing.setdefault(f"- {name}: {found['missing']}", []).append(where)
    if missing:
        lines += ["## Missing", ""]
        lines += [f"{what} ({', '.join(where)})" for what, where in sorted(missing.items())]
        lines.append("")
    if "memory" in record:
        lines += ["## Memory", "", "MB that a process takes at most for a step; in brackets beyond"]
        lines += ["what it had before the case was set up.", ""]
        names = list(dict.fromkeys(name for one in record["memory"] for name in one["found"]))
        lines.append("| mode | case | cell | " + " | ".join(names) + " |")
        lines.append("|---|---|---|" + "---|" * len(names))
        for one in record["memory"]:
            sizes = [_size(one["found"].get(name)) for name in names]
            lines.append(f"| {one['mode']} | {one['case']} | {one['cell']} | {' | '.join(sizes)} |")
        lines.append("")
    if "start" in record:
        lines += ["## Start", "", "| | import, s | first training step, s |", "|---|---|---|"]
        for name, found in record["start"].items():
            lines.append(f"| {name} | {found['import']:.2f} | {found['first']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def _is_sweep(results: list[dict[str, Any]]) -> bool:
    return {entry["case"] for entry in results} == set(SWEEP)


def _time(found: dict[str, Any]) -> str:
    if not found.get("rounds"):
        return ""
    low, middle, high = (f(found["rounds"]) * 1e3 for f in (min, statistics.median, max))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _size(found: dict[str, int] | None) -> str:
    if found is None:
        return ""
    return f"{found['most'] / 1e6:.0f} ({(found['most'] - found['before']) / 1e6:.0f})"


def _bars(axis: Any, results: list[dict[str, Any]], value: Any) -> None:
    cases = list(dict.fromkeys(entry["case"] for entry in results))
    cells = list(dict.fromkeys(entry["cell"] for entry in results))
    width = 0.8 / len(cells)
    for i, cell in enumerate(cells):
        places, heights = [], []
        for entry in results:
            if entry["cell"] == cell:
                places.append(cases.index(entry["case"]) + (i - (len(cells) - 1) / 2) * width)
                heights.append(value(entry) or math.nan)
        axis.bar(places, heights, width, label=cell.upper())
    axis.set_xticks(range(len(cases)), cases)


def _legend(axis: Any) -> None:
    """Beside the bars."""
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _lines(axis: Any, results: list[dict[str, Any]], size: str) -> None:
    """Time of a token against one size, where the other sizes are as most cases have them."""
    usual = {"T": 64, "B": 32, "H": 128}
    for cell in dict.fromkeys(entry["cell"] for entry in results):
        points = {}
        for entry in results:
            case = find(entry["case"])
            taken = seconds(entry, "fastrnn")
            if entry["cell"] != cell or not taken:
                continue
            if all(getattr(case, k) == v for k, v in usual.items() if k != size):
                points[getattr(case, size)] = taken / case.T / case.B * 1e6
        sizes = sorted(points)
        axis.plot(sizes, [points[n] for n in sizes], marker="o", label=cell.upper())
        axis.set(xscale="log", yscale="log", xlabel=size, ylabel="microseconds of a token")
        axis.set_xticks(sizes, sizes)
    axis.minorticks_off()
    _plain_numbers(axis)


def _plain_numbers(axis: Any) -> None:
    """A few numbers between powers of ten, written out."""
    from matplotlib import ticker

    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def draw(folder: Path, stem: str, record: dict[str, Any]) -> list[str]:
    """Plots as SVG files in the folder; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "fastrnn"
    from matplotlib import pyplot

    made = []

    def save(figure: Any, name: str) -> None:
        path = folder / f"{stem}-{name}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        made.append(path.name)

    for mode in dict.fromkeys(entry["mode"] for entry in record["results"]):
        chosen = [entry for entry in record["results"] if entry["mode"] == mode]
        if _is_sweep(chosen):
            figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
            for axis, size in zip(axes, "HBT", strict=True):
                _lines(axis, chosen, size)
            axes[0].legend()
            figure.suptitle(f"fastrnn, {mode}: T 64, B 32, I = H = 128 but for one of them")
            save(figure, f"{mode}-sizes")
            continue
        if any(ratio(entry) for entry in chosen):
            figure, axis = pyplot.subplots(figsize=(9, 3.6))
            _bars(axis, chosen, ratio)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(title=f"{mode}: times faster than the best peer", yscale="log")
            _plain_numbers(axis)
            _legend(axis)
            save(figure, f"{mode}-ratio")
        figure, axis = pyplot.subplots(figsize=(9, 3.6))
        _bars(axis, chosen, share)
        axis.set(title=f"{mode}: share of the multiply-add peak", ylim=(0, 1))
        _legend(axis)
        save(figure, f"{mode}-share")
    return made


def write(folder: Path, record: dict[str, Any]) -> None:
    """JSON, report and plots, named after the machine, the commit and the dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    about = record["about"]
    words = re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower()).strip("-")
    sweep = _is_sweep(record["results"])
    stem = "-".join(filter(None, [words, about["commit"], about["dtype"], "sweep" * sweep]))
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    plots = draw(folder, stem, record)
    (folder / f"{stem}.md").write_text(markdown(record, plots))
