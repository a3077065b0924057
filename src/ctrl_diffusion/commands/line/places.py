"""Refuse files and folders that are not there, before torch is loaded: a mistyped path costs no seconds."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...data.sources import check_source
from ...prior.source import check_prior
from ...system.launch import read_launch

CHECKS = {"prior": check_prior, "data": check_source}


def check_places(options: dict[str, Any], out: Path | None, others: bool) -> None:
    """Refuse (ValueError) the first prior or dataset of a command that is not there, where nothing else is wrong first.

    `options` are settings of the command line. All is left to the job where it has more to look at before: `others`
    than these options (a settings file, overrides), trackers, an output that exists, further processes.
    """
    if others or options.get("track") or (out and out.exists()) or read_launch(os.environ).size > 1:
        return
    for key, place in named_places(options):
        CHECKS[key](place)


def named_places(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the key and the place of each prior and dataset that options and their controls name."""
    for group in (options, *(options.get("controls") or ())):
        yield from ((key, group[key]) for key in CHECKS if isinstance(group.get(key), str))


def check_resumable(run: Path) -> None:
    """Refuse (ValueError) a folder without the settings of a run to go on with."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} has no run to go on with: it has no config.yaml. Begin one with: ctrl train --out")
