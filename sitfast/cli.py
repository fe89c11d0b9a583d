"""What every `python -m sitfast.<verb>` shares: `--config` with overrides, and how errors end.

what happened                           stderr                          exit status
SitfastError, disk full, no permission  one line a problem, no trace    2
Ctrl-C                                  interrupted                     130
the reader of our output went away      nothing                         1
anything else                           its traceback                   1
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from sitfast.errors import SitfastError

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; check owner and mode, or choose another folder",
    errno.EPERM: "operation not permitted; check owner and mode, or choose another folder",
}


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` and `section.field=value …`, which `sitfast.config.load` takes."""
    parser.add_argument("--config", metavar="FILE", help="YAML file; what it leaves out keeps its default")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="override single fields")


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the command line's arguments and exit; see the table above."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows '?'
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except SitfastError as error:
        code = _report(_original(str(error)))
    except KeyboardInterrupt:
        code = _report("interrupted", label="", code=130)
    except BrokenPipeError:
        if not _reader_left():
            raise
        code = 1
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        path = error.filename2 or error.filename or "a file that the system did not name"
        code = _report(f"{os.fsdecode(path)}: {_DISK_ERRORS[error.errno]}")
    sys.exit(code)


def _report(message: str, *, label: str = "error: ", code: int = 2) -> int:
    """Print each line of `message` in one write, so that ranks that fail together do not interleave."""
    prefix = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    lines = [f"{prefix}{label}{line.strip()}\n" for line in message.splitlines() if line.strip()]
    sys.stderr.write("".join(lines))
    sys.stderr.flush()
    return code


def _original(message: str) -> str:
    """A DataLoader raises a worker's error again with the whole traceback as its message; the end of it is ours."""
    return message.rpartition(f"{SitfastError.__module__}.{SitfastError.__qualname__}: ")[2]


def _reader_left() -> bool:
    """Whether the pipe that broke is our stdout, as in `… | head`; then the rest of the output goes nowhere."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # replaced by something without a file
        return False
    watch = select.poll()
    watch.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # the interpreter flushes once more at exit
    return True
