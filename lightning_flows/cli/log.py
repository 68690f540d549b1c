"""The log of a run: Lightning's CSV log, of which nothing is lost or half written when the disk is full.

Lightning appends rows, and writes the whole file anew when a new quantity is logged for the first time. Here the
new file takes the old one's place when it is complete, and rows that did not fit are cut off again.
"""

from __future__ import annotations

import csv
import os
from contextlib import suppress
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class RunLog(CSVLogger):
    """`CSVLogger` whose file always ends with a whole row.

    Raises:
        OSError: the file cannot be written; names it and the reason.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file; see `CSVLogger.experiment`."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = WholeRows(log_dir=self.log_dir)
        return self._experiment


class WholeRows(ExperimentWriter):
    """Writes rows that are complete, or none."""

    def save(self) -> None:
        """See `ExperimentWriter.save`."""
        file = Path(self.metrics_file_path)
        self._size = file.stat().st_size if file.is_file() else 0
        try:
            super().save()
        except OSError as error:
            with suppress(OSError):
                os.truncate(file, self._size)
            reason = error.strerror or error
            raise OSError(error.errno, f"log {file} was not written: {reason} (the rows before are intact)") from error

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        file = Path(self.metrics_file_path)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        try:
            with temporary.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, fieldnames=fieldnames)
                writer.writeheader()
                writer.writerows(rows)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        self._size = file.stat().st_size
