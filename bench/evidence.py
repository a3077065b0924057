"""Read and write bench/results/: the figures that README and docs quote, one row a line, so that a change of one shows.

`write` keeps valid JSON: the rows of a list stand on a line each, as do the keys of an object.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "bench" / "results"
PICTURES = DOCS / "pictures"


def read(name: str, default: Any = None) -> Any:
    """Return the contents of bench/results/NAME.json, or the default where there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if default is None or path.is_file() else default


def row_lines(value: Any) -> str:
    """Return JSON text with the keys of the outermost object and the rows of each list of objects on a line each."""
    if isinstance(value, dict):
        parts, brackets = [f"{json.dumps(key)}: {rows(inner)}" for key, inner in value.items()], "{}"
    else:
        parts, brackets = [json.dumps(row, allow_nan=False) for row in value], "[]"
    return f"{brackets[0]}\n" + ",\n".join(parts) + f"\n{brackets[1]}"


def rows(value: Any) -> str:
    """Return a list of objects as `row_lines`, anything else on one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return row_lines(value)
    return json.dumps(value, allow_nan=False)


def write(name: str, value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write bench/results/NAME.json, numbers to six significant digits."""
    from ctrl_diffusion.system.files import rounded, write_text  # the environment of bench/peer.py lacks the library

    write_text(RESULTS / f"{name}.json", row_lines(rounded(value)) + "\n")


def add_row(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a row in the place of the one with its seed, write the file, and return all rows."""
    others = [other for other in read(name, []) if other["seed"] != row["seed"]]
    table = sorted([row, *others], key=lambda each: each["seed"])
    write(name, table)
    return table
