"""Variants of the demo's recipe, for the tables of docs/lab-notes.md.

python bench/recipe.py learners=backprop
python bench/recipe.py adjoint.lean=true adjoint.clip=10 seed=1
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from ctrl_diffusion.commands.app import quiet_dependencies
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.options import job_options


def parsed(settings: list[str]) -> dict[str, Any]:
    """KEY=VALUE or GROUP.KEY=VALUE settings as a nested dict; learners are comma-separated."""
    values: dict[str, Any] = {}
    for setting in settings:
        path, _, text = setting.partition("=")
        *groups, key = path.split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[key] = text.split(",") if key == "learners" else yaml.safe_load(text)
    return values


def main() -> None:
    quiet_dependencies()
    with TemporaryDirectory() as folder, job_options(quiet=False) as options:
        metrics = demo_job(parsed(sys.argv[1:]), Path(folder) / "run", options)
    ctrl, gap = metrics["ctrl"], metrics["certificate"]
    print(
        f"{' '.join(sys.argv[1:]) or 'default'}: accuracy {ctrl['accuracy']:.3f} (target "
        f"{metrics['target']['accuracy']:.3f}), KL {ctrl['kl_nats']:.2f}, gap {gap['gap_nats']:.2f} ± "
        f"{gap['gap_stderr']:.2f}, diversity {ctrl['diversity_ratio']:.3f}, {metrics['seconds']['train']:.0f} s"
    )


if __name__ == "__main__":
    main()
