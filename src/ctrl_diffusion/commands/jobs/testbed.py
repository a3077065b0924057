"""Run the testbed: learners and baselines on tasks whose answer is known."""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...exact.bias import biases
from ...exact.races import Picture, races
from ...report.testbed import write_bias_report, write_exact_report
from ...system.files import write_json
from ...system.folders import check_output, clear
from ...system.progress import DEFAULT, JobOptions

EXACT_FILES = ("exact.json", "report.html", "density.png", "gap.png", "growth.png")
BIAS_FILES = ("bias.json", "report.html", "bias.png")


def exact_job(out: Path, seed: int = 0, options: JobOptions = DEFAULT) -> list[dict[str, Any]]:
    """Race the learners; write exact.json after every row, then the pictures and report.html; return the rows."""
    pictures: list[Picture] = []

    def rows() -> Iterable[dict[str, Any]]:
        for row, picture in races(options.quick, seed, options.phase):
            pictures.extend([picture] if picture else [])
            yield row

    written = write_row_by_row(out, EXACT_FILES, rows(), options)
    write_exact_report(out, written, pictures, options.command or "ctrl exact", version("ctrl-diffusion"))
    return written


def bias_job(out: Path, seed: int = 0, options: JobOptions = DEFAULT) -> list[dict[str, Any]]:
    """Split each method's bias; write bias.json after every row, then bias.png and report.html; return the rows."""
    rows = write_row_by_row(out, BIAS_FILES, biases(options.quick, seed, options.phase), options)
    write_bias_report(out, rows, options.command or "ctrl compare exact", version("ctrl-diffusion"))
    return rows


def write_row_by_row(
    out: Path, files: tuple[str, ...], rows: Iterable[dict[str, Any]], options: JobOptions
) -> list[dict[str, Any]]:
    """Clear a job's files, write rows into the first of them as they are computed, and return them."""
    check_output(out, files[0], options.overwrite)
    clear(out, files[1:])
    written: list[dict[str, Any]] = []
    write_json(out / files[0], {"rows": written})
    for row in rows:
        written.append(row)
        write_json(out / files[0], {"rows": written})
    return written
