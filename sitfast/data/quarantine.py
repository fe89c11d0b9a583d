"""The list of unreadable images: one line each, path <tab> reason.

Every image is listed once, also across restarts and ranks: the file is read at the start, and again before a line is
added.
"""

from __future__ import annotations

from pathlib import Path

from sitfast.errors import SitfastError

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


class Quarantine:
    """The names seen so far, on disk where a file is given; `limit` is the share of `num_rows` allowed to be there."""

    def __init__(self, file: Path | None, *, num_rows: int, limit: float) -> None:
        self.file = file
        self.num_rows = num_rows
        self.limit = limit
        self._names = self._listed()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, unreadable: list[tuple[str, str]]) -> None:
        """Notes (name, reason) pairs; more than the limit altogether is an error, and it shows the latest of them."""
        if not unreadable:
            return
        new = {name.translate(_ESCAPES): " ".join(reason.split()) for name, reason in unreadable}
        if not new.keys() <= self._names:
            self._names |= self._listed()
            self._append({name: reason for name, reason in new.items() if name not in self._names})
            self._names |= new.keys()
        if len(self._names) > self.limit * self.num_rows:
            name, reason = list(new.items())[-1]
            listed = f"the files listed in {self.file}, then delete that list" if self.file else "them"
            share = f"{len(self._names)} of {self.num_rows} images ({len(self._names) / self.num_rows:.2%})"
            raise SitfastError(
                f"{share} are unreadable, more than data.max_unreadable={self.limit} allows (latest: {name}: {reason}"
                f"); repair or remove {listed}, or raise data.max_unreadable"
            )

    def _listed(self) -> set[str]:
        if self.file is None or not self.file.exists():
            return set()
        try:
            lines = self.file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        except OSError as error:
            raise SitfastError(f"cannot read the quarantine file {self.file}: {error.strerror}") from None
        return {line.split("\t")[0] for line in lines if "\t" in line}

    def _append(self, new: dict[str, str]) -> None:
        if self.file is None or not new:
            return
        text = "".join(f"{name}\t{reason}\n" for name, reason in new.items())
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as file:  # one write, so that lines of several ranks do not mix
                file.write(text.encode("utf-8", errors="surrogateescape"))
        except OSError as error:
            raise SitfastError(f"cannot write the quarantine file {self.file}: {error.strerror}") from None
