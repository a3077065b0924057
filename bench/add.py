"""A control that is added later, against the two trained together (about three quarters of an hour a seed on one
busy thread).

python bench/add.py [SEED …]        (0 1 2 if none is given)

Takes the two datasets of `ctrl demo --controls ink,slant`, trains ink alone, adds slant with `ctrl add`, and compares
the pictures of the old run with those of the new one, slant left out. Writes the rows into docs/add.json.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from ctrl_diffusion.commands.jobs import demo
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.system.files import write_json

OUT = Path(__file__).parent.parent / "docs" / "add.json"
BOTH = "ink,slant"


def ctrl(*arguments: object) -> None:
    """Run a command as a user would."""
    subprocess.run([sys.executable, "-m", "ctrl_diffusion", *map(str, arguments)], check=True)


def measured(seed: int, root: Path) -> dict:
    """Train, add, compare."""
    for settings, pair in zip(demo.SETTINGS[BOTH]["controls"], demo.labelled_digits(BOTH, seed), strict=True):
        for kind, data in zip(("data", "judge_data"), pair, strict=True):
            write_imagefolder(root / kind / settings["name"], data)
            settings = {**settings, kind: f"{kind}/{settings['name']}"}
        common = {key: demo.SETTINGS[BOTH][key] for key in ("prior", "classes", "weighted", "evaluation")}
        whole = {**common, "seed": seed, "controls": [settings]}
        (root / f"{settings['name']}.yaml").write_text(yaml.safe_dump(whole))
    ctrl("train", "--config", root / "ink.yaml", "--out", root / "old", "--quiet")
    ctrl("add", root / "old", "--config", root / "slant.yaml", "--out", root / "new", "--quiet")
    pictures = {}
    for run in ("old", "new"):
        ctrl("sample", root / run, "--set", "ink=2", "-n", 64, "--out", root / "samples" / run, "--quiet")
        pictures[run] = [path.read_bytes() for path in sorted((root / "samples" / run).glob("0*.png"))]
    old, new = (json.loads((root / run / "metrics.json").read_text()) for run in ("old", "new"))
    return {
        "seed": seed,
        "old_samples_unchanged": pictures["old"] == pictures["new"],
        "ink_before": {key: old["ctrl"][key] for key in ("accuracy", "accuracy_stderr")},
        **{key: new[key] for key in ("controls", "ctrl", "certificate", "seconds")},
    }


def main() -> None:
    for seed in [int(text) for text in sys.argv[1:]] or [0, 1, 2]:
        with TemporaryDirectory() as folder:
            row = measured(seed, Path(folder))
        known = json.loads(OUT.read_text()) if OUT.is_file() else []
        write_json(OUT, sorted([row, *(r for r in known if r["seed"] != seed)], key=lambda r: r["seed"]))
        print({key: row[key] for key in ("seed", "old_samples_unchanged", "ink_before", "controls")})


if __name__ == "__main__":
    main()
