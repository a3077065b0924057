"""Refuse files and folders that are not there, before torch is loaded: a mistyped path costs no seconds."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from ...data.sources import HUB, check_source
from ...prior.source import EMBEDDED, check_prior
from ...system.launch import read_launch

CHECKS = {"prior": check_prior, "data": check_source}


def check_places(
    options: dict[str, Any], config: Path | None, overrides: list[str], keys: Collection[str] = tuple(CHECKS)
) -> None:
    """Refuse (ValueError) the first prior or dataset that is named and is not there; leave all else to the job.

    `options` are settings of the command line. Of a settings file only keys are looked at that they do not name, and
    none beside `overrides`, which may replace any. Nothing is refused here where something else comes first: trackers,
    or the other processes of several, which must all end alike.
    """
    if options.get("track") or read_launch(os.environ).size > 1:
        return
    named = list(named_places(options))
    for key, place in named:
        if key in keys:
            CHECKS[key](place)
    if config is None or overrides:
        return
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # the job says what is wrong with it
    given = {key for key, _ in named}
    for key, place in named_places(values):
        if key in keys and key not in given:
            elsewhere = place in EMBEDDED or HUB.fullmatch(place)
            CHECKS[key](place if elsewhere else os.path.abspath(config.parent / place))


def named_places(values: Any) -> Iterator[tuple[str, str]]:
    """Give the key and the place of each prior and dataset that settings and their controls name, and would read."""
    controls = values.get("controls") if isinstance(values, dict) else None
    for group in (values, *(controls if isinstance(controls, list) else ())):
        if isinstance(group, dict) and not group.get("settled_from"):
            yield from ((key, group[key]) for key in CHECKS if isinstance(group.get(key), str))


def check_resumable(run: Path) -> None:
    """Refuse (ValueError) a folder without the settings of a run to go on with."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} has no run to go on with: it has no config.yaml. Begin one with: ctrl train --out")
