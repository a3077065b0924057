"""Run the testbed: learners and baselines on tasks whose answer is known."""

from collections.abc import Iterator
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


def row_by_row(out: Path, files: tuple[str, ...], found: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows into the first of a job's files as they come, the others being cleared away; returns all of them."""
    clear(out, files[1:])
    rows: list[dict[str, Any]] = []
    write_json(out / files[0], {"rows": rows})
    for row in found:
        rows.append(row)
        write_json(out / files[0], {"rows": rows})
    return rows


def exact_job(out: Path, seed: int = 0, options: JobOptions = DEFAULT) -> list[dict[str, Any]]:
    """Race the learners on the testbed; writes exact.json after every row, then the pictures and report.html.

    Returns:
        The rows of exact.json.

    Raises:
        ValueError: a folder that cannot be written, or holds something.
    """
    check_output(out, EXACT_FILES[0], options.overwrite)
    pictures: list[Picture] = []

    def raced() -> Iterator[dict[str, Any]]:
        for row, picture in races(options.quick, seed, options.phase):
            pictures.extend([picture] if picture else [])
            yield row

    rows = row_by_row(out, EXACT_FILES, raced())
    write_exact_report(out, rows, pictures, options.command or "ctrl exact", version("ctrl-diffusion"))
    return rows


def bias_job(out: Path, seed: int = 0, options: JobOptions = DEFAULT) -> list[dict[str, Any]]:
    """Say where each method's bias comes from; writes bias.json after every row, then bias.png and report.html.

    Returns:
        The rows of bias.json.

    Raises:
        ValueError: a folder that cannot be written, or holds something.
    """
    check_output(out, BIAS_FILES[0], options.overwrite)
    rows = row_by_row(out, BIAS_FILES, biases(options.quick, seed, options.phase))
    write_bias_report(out, rows, options.command or "ctrl compare exact", version("ctrl-diffusion"))
    return rows
