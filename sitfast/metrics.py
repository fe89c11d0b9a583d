"""What a run tells the world: the start-up table, one line every N steps, metrics.jsonl, and the trackers.

    record ─▶ metrics.jsonl (always) · TensorBoard (when installed) · W&B, Trackio (on request) · one aligned line

metrics.jsonl is the truth, one JSON object a line with `kind`, `step` and `time`. A float is written with as many
digits as its value needs to come back exactly; NaN and infinity, which JSON lacks, become null.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import ROUNDED
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sitfast.config import LogConfig
from sitfast.images import replacing
from sitfast.trackers import Tracker, open_trackers

# Dense bf16 FLOP/s with fp32 accumulation, from NVIDIA's data sheets and white papers (where those print the number
# with sparsity, half of it). The words must all stand in the device's name; the first row that fits counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500e12),
    ("GB200", 2500e12),
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A30", 165e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)
_OTHER_CHIPS = {"MIG", "Laptop", "Max", "D", "Ti"}  # these share a name with a row above, not its speed

_COLUMNS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "images_per_s",
    "mfu",
    "memory_gib",
    "data_wait",
    "eta_s",
    "skipped",
    "unreadable",
    "cut_captions",
)
_DROPPED_FIRST = (
    "lr",
    "memory_gib",
    "data_wait",
    "grad_norm",
    "mfu",
    "eta_s",
    "images_per_s",
    "cut_captions",
    "unreadable",
    "skipped",
    "loss",
)
_REDRAW_S = 0.2


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that CUDA gives it; None where it is not known."""
    words = set(re.split(r"[\s\-/]+", device_name))
    if words & _OTHER_CHIPS:
        return None
    return next((peak for name, peak in _PEAKS if words.issuperset(name.split())), None)


def format_duration(seconds: float) -> str:
    """At most two units: 42s, 1m32s, 2h05m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    total = max(round(seconds), 0)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    minutes = round(total / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(total / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def format_count(count: float) -> str:
    """Three significant digits and a unit: 812, 1.80k, 33.0M, 675M, 1.03B."""
    value, units = float(count), ["", "k", "M", "B", "T"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    if value == int(value) and abs(count) < 1000:
        return f"{int(value)}"
    return f"{compact(value, 4)}{units[0]}"


def compact(value: float, width: int) -> str:
    """`value` in at most `width` characters, with at least two digits of it where they fit: 0.4312, 1234.5, 1.0e-4."""
    if not math.isfinite(value):
        return str(float(value))
    if value == 0 or abs(value) >= 10.0 ** (3 - width):
        for decimals in range(width - 2, -1, -1):
            text = f"{value:.{decimals}f}"
            if len(text) <= width:
                return text
    for decimals in (2, 1):
        text = _scientific(value, decimals)
        if len(text) <= width:
            return text
    return _scientific(value, 0)


def _scientific(value: float, decimals: int) -> str:
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


class Logger:
    """Console, metrics.jsonl and trackers of one run. On all ranks but the main one every method does nothing."""

    def __init__(
        self,
        run_dir: Path,
        log: LogConfig,
        *,
        config: dict[str, Any],
        total_steps: int,
        is_main: bool,
        resume_step: int | None,
    ) -> None:
        self.is_main, self.total_steps = is_main, total_steps
        self._widths: dict[str, int] = {"images_per_s": 3}
        self._said: set[str] = set()
        self._trackers: list[Tracker] = []
        self._first_step = resume_step or 0
        self._bar: Progress | None = None
        self._drawn = -math.inf
        if not is_main:
            return
        # Not rich's own guess, which FORCE_COLOR and the like can turn: a log file must never hold control codes.
        self.console = Console(force_terminal=sys.stdout.isatty(), highlight=False, markup=False, emoji=False)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        with replacing(path) as temporary:
            temporary.write_text("" if resume_step is None else _records_until(path, resume_step), encoding="utf-8")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close(); unbuffered: a kill loses nothing
        self._trackers = open_trackers(run_dir, log, config, resume_step)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def startup(self, rows: list[tuple[str, str]]) -> None:
        """The table that says what is about to run."""
        if not self.is_main:
            return
        table = Table(box=ROUNDED, show_header=False, border_style="dim")
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        self.console.print(table)

    def step(self, record: Mapping[str, Any]) -> None:
        """Write a training record: one line on the console, one in metrics.jsonl."""
        if not self.is_main:
            return
        values = {name: _number(value) for name, value in record.items()}
        step = int(values["step"])
        self._write("train", step, values)
        self.console.print(self._line(values), soft_wrap=True)
        self.advance(step, now=True)

    def scalars(self, step: int, values: Mapping[str, Any], *, kind: str = "val") -> None:
        """Write other numbers of a step, such as `val_loss` and its bins; the console shows what fits."""
        if not self.is_main:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        self._write(kind, step, numbers)
        head = f"{kind:<4} {self._position(step)}"
        floats = {name.removeprefix(f"{kind}_"): value for name, value in numbers.items() if isinstance(value, float)}
        cells = [f"{name} {compact(value, 6)}" for name, value in floats.items()]
        bar = self._separator()
        room = self.console.width - len(head)
        while len(cells) > 1 and sum(len(bar) + len(cell) for cell in cells) > room:
            cells.pop()
        self.console.print(self._dimmed([head, *cells], bar), soft_wrap=True)

    def image(self, step: int, tag: str, path: Path) -> None:
        """Show an image file to the trackers, and its path to the reader."""
        if not self.is_main:
            return
        for tracker in self._trackers:
            tracker.image(step, tag, path)
        self.console.print(
            self._dimmed([f"{tag:<4} {self._position(step)}", str(path)], self._separator()), soft_wrap=True
        )

    def note(self, text: str) -> None:
        """A line of plain text on stdout."""
        if self.is_main:
            self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on stderr; the same text is said once."""
        if self.is_main and text not in self._said:
            self._said.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)  # sys.stderr, which the bar watches

    def advance(self, step: int, *, now: bool = False) -> None:
        """Move the progress bar. Cheap enough for every step: it redraws a few times a second, without a thread."""
        if not self.is_main or not self.console.is_terminal or self.console.is_dumb_terminal:
            return
        clock = time.monotonic()
        if not now and clock - self._drawn < _REDRAW_S:
            return
        self._drawn = clock
        bar = self._bar = self._bar or self._start_bar()
        bar.update(bar.task_ids[0], completed=step)
        bar.refresh()

    def close(self) -> None:
        """Take the bar off the terminal and finish the files; may be called twice."""
        if not self.is_main:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if k != "step"}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        record = {"kind": kind, "step": step, **finite, "time": time.time()}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            complete = self._file.write(line) == len(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None
        if not complete:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        tracked = {f"{kind}/{k.removeprefix(f'{kind}_')}": v for k, v in numbers.items() if v is not None}
        for tracker in self._trackers:
            tracker.scalars(step, tracked)

    def _position(self, step: int) -> str:
        return f"{step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _line(self, values: Mapping[str, Any]) -> Text:
        """One line of aligned columns: bars between them, two spaces where that is tight, fewer columns if need be.

        A column keeps the widest width it has had. A file does not wrap, so there nothing is left out.
        """
        cells = {name: self._cell(name, values) for name in _COLUMNS}
        cells = {name: cell for name, cell in cells.items() if cell}
        bar, room = self._separator(), self.console.width
        if _length(cells, bar) > room:
            bar = "  "
            for name in _DROPPED_FIRST:
                if self.console.is_terminal and _length(cells, bar) > room:
                    cells.pop(name, None)
        return self._dimmed(list(cells.values()), bar)

    def _cell(self, name: str, values: Mapping[str, Any]) -> str:
        value = values.get(name)
        if value is None or (name in ("skipped", "unreadable", "cut_captions") and value <= 0):
            return ""
        if name == "step":
            return f"step {self._position(value)}"
        before, text, after = _show(name, value)
        self._widths[name] = max(self._widths.get(name, 0), len(text))
        return f"{before}{text.rjust(self._widths[name])}{after}"

    def _separator(self) -> str:
        return " | " if self.console.options.ascii_only else " │ "

    def _dimmed(self, cells: list[str], bar: str) -> Text:
        return Text(bar, style="dim").join([Text(cell, style="not dim") for cell in cells])

    def _start_bar(self) -> Progress:
        bar = Progress(
            TaskProgressColumn(),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("eta", style="dim"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            auto_refresh=False,  # no thread: data workers are forked from this process
            transient=True,
            expand=True,
            redirect_stderr=sys.stderr.isatty(),  # a redirected stderr stays where it was sent
        )
        bar.add_task("", total=self.total_steps, completed=self._first_step)
        bar.start()
        return bar


def _show(name: str, value: float) -> tuple[str, str, str]:
    """A value of the step line as (label, the part that is aligned, unit)."""
    if name == "loss":
        return "loss ", compact(value, 6).rjust(6), ""
    if name == "grad_norm":
        return "grad ", compact(value, 5).rjust(5), ""
    if name == "lr":
        return "lr ", _scientific(value, 1), ""
    if name == "images_per_s":
        return "", f"{value:.0f}" if value >= 99.95 else compact(value, 4), " img/s"
    if name == "mfu":
        return "mfu ", f"{100 * value:4.1f}", "%"
    if name == "memory_gib":
        return "", f"{value:4.1f}", " GiB"
    if name == "data_wait":
        return "wait ", f"{100 * value:2.0f}", "%"
    if name == "eta_s":
        return "eta ", format_duration(value), ""
    return f"{name} ", f"{value:.0f}", ""


def _length(cells: Mapping[str, str], bar: str) -> int:
    return sum(map(len, cells.values())) + len(bar) * (len(cells) - 1)


def _number(value: Any) -> Any:
    """A Python number from a tensor or a NumPy scalar; a float32 keeps its exact value as a double."""
    return value.item() if hasattr(value, "item") else value


def _records_until(path: Path, last_step: int) -> str:
    """The lines of metrics.jsonl up to `last_step`, as they stand; a line that a kill tore apart is left out."""
    if not path.exists():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get("step", math.inf) <= last_step:
            kept.append(line + "\n")
    return "".join(kept)
