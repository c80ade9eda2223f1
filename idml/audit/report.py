"""Writing a report: a folder that is there as a whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from idml.audit import tables
from idml.audit.findings import Findings, as_metrics
from idml.audit.page import render
from idml.errors import StorageError, UserError


class Report:
    """A context: what is written comes into a folder beside the place of the report, and takes it when all is there.

    Args:
        folder: of the report. It may exist where it is empty, or where ``overwrite`` is given and it holds nothing but
            a report.

    Raises:
        UserError: the place is taken, or cannot be written to.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.page = folder / "index.html"
        self.folder = folder = folder.resolve()
        self._temporary: Path | None = None
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out: {folder} is a file; expected a folder for the report")
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if there and not overwrite:
            raise UserError(f"--out: {folder} exists and is not empty; give another folder, or --overwrite a report")
        if others := [name for name in there if name not in tables.FILES]:
            raise UserError(f"--out: {folder} holds other things than a report ({', '.join(others[:3])}); give another")

    def __enter__(self) -> Report:
        try:
            parent = self.folder.resolve().parent
            parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=parent))
        except OSError as error:
            raise UserError(f"--out: cannot write to {self.folder}: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def write(self, found: Findings, *, pictures: int, options: dict[str, Any]) -> None:
        """All files.

        Args:
            pictures: in each section at the most.
            options: of the command, for ``metrics.json``.

        Raises:
            StorageError: they cannot be written; what was there before stays.
        """
        assert self._temporary is not None
        new, answers = self._temporary / "new", found.answers
        page = render(found, pictures=pictures)
        try:
            new.mkdir()
            tables.write_images(new / "images.csv", found.collection, answers, found.new, found.refusal)
            tables.write_label_errors(new / "label_errors.csv", found.collection, answers, found.ranked)
            tables.write_new_images(new / "new_images.csv", found.collection, answers, found.new)
            tables.write_duplicates(new / "duplicates.csv", found.collection, answers, found.duplicates)
            tables.write_confusions(new / "confusions.csv", answers, found.confusions)
            tables.write_shifts(new / "shifts.csv", found.shifts)
            tables.write_metrics(new / "metrics.json", as_metrics(found, options))
            (new / "index.html").write_text(page, encoding="utf-8")
            if self.folder.exists():
                self.folder.rename(self._temporary / "old")
            new.rename(self.folder)
        except OSError as error:
            old = self._temporary / "old"
            if old.exists() and not self.folder.exists():
                old.rename(self.folder)
            raise StorageError(f"cannot write the report to {self.folder}: {error.strerror or error}") from None
