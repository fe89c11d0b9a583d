"""The page of a benchmark run, or of several of one commit, and a plot of whole steps: python -m benchmarks.results FILE.json …

Takes what `pytest benchmarks/ --record`, `bench_step --output` and `bench_end_to_end --output` wrote.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "RESULTS.md"
PLOT = Path(__file__).parents[1] / "docs" / "images_per_s.png"
OURS = "sitfast"
SAME = ("device", "cpu_figures", "dtype", "torch", "cuda", "triton", "commit")  # what runs of one page share
SLOWER = "▼"

Infos = list[dict[str, Any]]


def _number(value: float | str | None, digits: int = 2) -> str:
    return "-" if value is None else "wrong" if isinstance(value, str) else f"{value:.{digits}f}"


def _rate(info: dict[str, Any]) -> str:
    return f"{info['rate']:.0f} GB/s" if info["unit"] == "GB/s" else f"{info['rate']:.0f} TF/s"


def _rivals(infos: Infos) -> list[str]:
    return list(dict.fromkeys(name for info in infos for name in info["rivals"]))


def _table(infos: Infos) -> list[str]:
    rivals = _rivals(infos)
    titles = ["", "D", "N", "µs", "rate", "%", "× eager", "× compile", *(f"× {name}" for name in rivals)]
    rows = []
    for info in infos:
        slower = info.get("x_compile", 1) < 1
        rows.append(
            [
                {"forward": "fwd", "backward": "bwd"}[info["direction"]],
                str(info["D"]),
                str(info["N"]),
                _number(info["median_us"], 1 if info["median_us"] < 1000 else 0),
                _rate(info),
                _number(info["percent_of_ceiling"], 0),
                _number(info.get("x_eager")),
                _number(info.get("x_compile")) + f" {SLOWER}" * slower,
                *(_number(info["rivals"].get(name)) for name in rivals),
            ]
        )
    return _markdown(titles, rows)


def _notes(infos: Infos) -> list[str]:
    """What a reader of the table has to know of single rows."""
    notes: dict[str, list[str]] = defaultdict(list)
    for info in infos:
        where = f"{info['direction']} at D = {info['D']}, N = {info['N']}"
        if info.get("note"):
            notes[f"Not the default: {info['note']}"].append(where)
        for name, outcome in (info["rivals"] | info.get("faults", {})).items():
            if isinstance(outcome, str):
                notes[f"{name}: {outcome}"].append(where)
    return [f"- {text}: {'; '.join(where)}." for text, where in notes.items()]


def _losses(tables: dict[str, Infos]) -> list[str]:
    return [
        f"- {kernel} {info['direction']}, D = {info['D']}, N = {info['N']}: {info['x_compile']:.2f} ×"
        for kernel, infos in tables.items()
        for info in infos
        if info.get("x_compile", 1) < 1
    ]


def _markdown(titles: list[str], rows: list[list[str]]) -> list[str]:
    lines = [titles, ["---:" if i else "---" for i in range(len(titles))], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _by_model(steps: Infos) -> dict[tuple[str, int], Infos]:
    """The results of each model and size, in the order in which they came; of a method the last."""
    models: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for info in steps:
        models[info["model"], info["pixels"]][info["method"]] = info
    return {key: list(methods.values()) for key, methods in sorted(models.items(), key=lambda item: item[0][1])}


def _steps(steps: Infos) -> list[str]:
    lines = [
        "",
        "## Whole training steps",
        "",
        "Latents on the device to averaged weights, see `bench_step.py`; medians (and quartiles) of single steps. “×” is",
        "our images/s over the other's: above 1 we are faster. MFU counts 6 FLOPs for each multiply-accumulate of a forward",
        "pass.",
    ]
    for (model, pixels), infos in _by_model(steps).items():
        ours = next((info for info in infos if info["method"] == OURS), None)
        rows = [
            [
                info["title"],
                str(info["B"]),
                f"{info['ms']:.1f} ({info['ms_quartiles'][0]:.1f} to {info['ms_quartiles'][1]:.1f})",
                _number(info["images_per_s"], 1),
                "-" if info["mfu"] is None else f"{info['mfu']:.1%}",
                _number(info["peak_gib"], 1),
                "" if info is ours else _number(ours and ours["images_per_s"] / info["images_per_s"]),
            ]
            for info in infos
        ]
        lines += ["", f"### {model}, {pixels} px", ""]
        lines += _markdown(["", "B", "ms a step", "images/s", "MFU", "peak GiB", "×"], rows)
        notes: dict[str, list[str]] = defaultdict(list)
        for info in infos:
            if info["method"] != OURS:
                notes[info["note"]].append(info["title"])
        lines += ["", *(f"- {note}: {'; '.join(titles)}." for note, titles in notes.items())]
    return lines


def _ends(ends: Infos) -> list[str]:
    """Runs with their data, beside the step alone."""
    alone = {(info["model"], info["pixels"], info["B"]): info for info in ends if info["run"] == "step"}
    rows = []
    for info in ends:
        step = alone.get((info["model"], info["pixels"], info["B"]))
        rows.append(
            [
                f"{info['model']}, {info['pixels']} px, {info['run']}",
                str(info["B"]),
                _number(info["images_per_s"], 1),
                "-" if info["data_wait"] is None else f"{info['data_wait']:.1%}",
                f"{info['images_per_s'] / step['images_per_s']:.1%}" if step else "-",
            ]
        )
    titles = ["", "B", "images/s", "waiting for data", "of the step alone"]
    return [
        "",
        "## From the data on",
        "",
        "Runs of `sitfast.train`, see `bench_end_to_end.py`.",
        "",
        *_markdown(titles, rows),
    ]


def _sorted_out(runs: list[dict[str, Any]]) -> tuple[dict[str, Infos], Infos, Infos]:
    """Kernels by name, a case that several runs hold from the last of them; whole steps; runs from the data on."""
    cases: dict[tuple, dict[str, Any]] = {}
    others: dict[str, Infos] = {"step": [], "end to end": []}
    for run in runs:
        for benchmark in run["benchmarks"]:
            info = benchmark["extra_info"]
            if "kind" in info:
                others[info["kind"]].append(info)
            else:
                cases[info["kernel"], info["direction"], info["D"], info["N"]] = info
    tables: dict[str, Infos] = defaultdict(list)
    for (kernel, *_), info in sorted(cases.items(), key=lambda item: (item[0][1] == "backward", item[0][2:])):
        tables[kernel].append(info)
    return dict(sorted(tables.items())), others["step"], others["end to end"]


def _origin(runs: list[dict[str, Any]]) -> list[str]:
    machine, commit = runs[0]["machine_info"]["sitfast"], runs[0].get("commit_info", {})
    commit_id = machine.get("commit") or commit.get("id", "unknown")
    dirty = commit.get("dirty") and not machine.get("commit")
    fair = "**These are CPU figures of tiny shapes: they say nothing about speed.**"
    lines = [
        *([fair, ""] if machine["cpu_figures"] else []),
        f"- device: {machine['device']}, {machine['dtype']}",
        f"- torch {machine['torch']}, CUDA {machine['cuda']}, Triton {machine['triton']}, "
        f"Python {runs[0]['machine_info']['python_version']}",
        f"- commit: {commit_id}{' with local changes' if dirty else ''}",
    ]
    for run in runs:
        ceilings = run["benchmarks"][0]["extra_info"].get("ceilings") if run["benchmarks"] else None
        found = ""
        if ceilings:
            found = f"; ceilings of that run: copy {ceilings['copy_GBs']:.0f} GB/s, GEMM {ceilings['gemm_TFLOPs']:.0f} TFLOP/s"
        lines += [
            f"- `{run['machine_info']['sitfast']['command']}`",
            f"  ({run['datetime'][:16].replace('T', ' ')}{found})",
        ]
    return lines


def _kernels(tables: dict[str, Infos], cpu_figures: bool) -> list[str]:
    first = next(iter(tables.values()))[0]
    lines = [
        "",
        "## Kernels",
        "",
        f"Medians of CUDA-event times with a cold L2 and rotated random inputs, B · N = "
        f"{'a few' if cpu_figures else first['B'] * first['N']}. “×” is the other's time over",
        f"ours: above 1 we are faster; {SLOWER} marks what torch.compile, tuned by coordinate descent, does faster. Rates",
        "count the fewest bytes or operations that can do; % is their share of the measured copy or GEMM. Backward is the",
        "backward pass alone. What a column of another package compares is said in the kernel's `bench_*.py`.",
    ]
    for kernel, infos in tables.items():
        notes = _notes(infos)
        lines += ["", f"### {kernel}", "", *_table(infos), *([""] if notes else []), *notes]
    return [*lines, "", "### Slower than torch.compile", "", *(_losses(tables) or ["None of the cases above."])]


def page(runs: list[dict[str, Any]]) -> str:
    """The whole page; SystemExit where the runs are not of one machine and commit."""
    machines = [run["machine_info"]["sitfast"] for run in runs]
    for name in SAME:
        if len(values := {machine.get(name) for machine in machines}) > 1:
            raise SystemExit(f"the runs differ in {name} ({', '.join(map(str, values))}); make one page of each")
    tables, steps, ends = _sorted_out(runs)
    lines = ["# Benchmark results", "", "Generated by `python -m benchmarks.results`; do not edit.", "", *_origin(runs)]
    lines += _steps(steps) if steps else []
    lines += _ends(ends) if ends else []
    lines += _kernels(tables, machines[0]["cpu_figures"]) if tables else []
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]], path: Path) -> bool:
    """Images/s of each method, one panel for each model and size; False if there are no whole steps."""
    panels = _by_model(_sorted_out(runs)[1])
    if not panels:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit('the plot needs matplotlib: pip install "sitfast[demo]"') from None

    sizes = sorted({pixels for _, pixels in panels})
    models = list(dict.fromkeys(model for model, _ in panels))
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(4.6 * len(models), (0.34 * most + 0.9) * len(sizes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(sizes), len(models), squeeze=False)
    for row, pixels in enumerate(sizes):
        for column, model in enumerate(models):
            axes, infos = grid[row][column], panels.get((model, pixels), [])
            if not infos:
                axes.set_axis_off()
                continue
            rates = [info["images_per_s"] for info in infos]
            colors = ["tab:orange" if info["method"] == OURS else "tab:gray" for info in infos]
            bars = axes.barh([info["title"] for info in infos], rates, color=colors)
            axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
            axes.set_xlim(0, 1.18 * max(rates))
            axes.set_title(f"{model}, {pixels} px", loc="left")
            axes.set_xticks([])
            axes.invert_yaxis()
            axes.spines[["top", "right", "bottom"]].set_visible(False)
            same = [info["title"] for info in infos] == [info["title"] for info in panels.get((models[0], pixels), [])]
            axes.tick_params(left=False, labelleft=column == 0 or not same)
    machine = runs[0]["machine_info"]["sitfast"]
    title = f"Training, images per second: {machine['device']}, torch {machine['torch']}"
    figure.suptitle(title + (" (tiny models)" if machine["cpu_figures"] else ""), x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="FILE.json", help="see above")
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--plot", type=Path, default=PLOT, help="written where there are whole steps")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in arguments.runs]
    arguments.output.write_text(page(runs), encoding="utf-8")
    print(f"wrote {arguments.output}")
    if plot(runs, arguments.plot):
        print(f"wrote {arguments.plot}")


if __name__ == "__main__":
    main()
