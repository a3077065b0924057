"""One variant of the demo's recipe, for the tables of docs/lab-notes.md.

python bench/recipe.py learners=adjoint adjoint.clip=10
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from ctrl_diffusion.cli import phases, quiet_dependencies
from ctrl_diffusion.config import Config
from ctrl_diffusion.run import run_demo


def overridden(settings: list[str]) -> Config:
    """The default config with KEY=VALUE or GROUP.KEY=VALUE settings; lists are comma-separated."""
    values = Config().model_dump()
    for setting in settings:
        path, _, text = setting.partition("=")
        *groups, key = path.split(".")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[key] = text.split(",") if key == "learners" else yaml.safe_load(text)
    return Config.of(values)


def main() -> None:
    quiet_dependencies()
    with TemporaryDirectory() as folder, phases(quiet=False) as phase:
        metrics = run_demo(overridden(sys.argv[1:]), Path(folder) / "run", phase)
    ctrl, gap = metrics["ctrl"], metrics["certificate"]
    print(
        f"{' '.join(sys.argv[1:]) or 'default'}: accuracy {ctrl['accuracy']:.3f} (target "
        f"{metrics['target']['accuracy']:.3f}), KL {ctrl['kl_nats']:.2f}, gap {gap['gap_nats']:.2f} ± "
        f"{gap['gap_stderr']:.2f}, diversity {ctrl['diversity_ratio']:.3f}, {metrics['seconds']['train']:.0f} s"
    )


if __name__ == "__main__":
    main()
