"""Compare the estimates of --dry-run with the training they are for: bench/results/speed.json.

python bench/estimate.py      (about half an hour on one quiet thread: the digits demo, without the judge of ink)

Estimate and training are processes of their own, one after the other, on the machine as it is within one hour. Memory
is the peak of the process.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from race import keep

from ctrl_diffusion.commands.jobs.demos.digits import SETTINGS, labelled_digits
from ctrl_diffusion.commands.jobs.estimate import estimate_job, most_needed
from ctrl_diffusion.commands.jobs.train import train_job
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.system.files import rounded

PARTS = {"classifiers": ("classifier",), "learners and samples": ("train", "sample"), "total": ("total",)}


def settings(data: str) -> dict[str, Any]:
    """Return the settings of the digits demo on data in a folder."""
    whole = dict(SETTINGS["ink"])
    whole["controls"] = [{**whole["controls"][0], "data": data}]
    return whole


def apart(what: str, data: Path, out: Path) -> dict[str, Any]:
    """Run an estimate or a training in a process of its own and return its figures."""
    done = subprocess.run([sys.executable, __file__, what, data, out], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:]:
        what, data, out = sys.argv[1:]
        if what == "estimate":
            estimate = estimate_job(settings(data))
            print(json.dumps({"seconds": estimate["seconds"], "megabytes": estimate["memory_mb"]["all"]}))
        else:
            seconds = train_job(settings(data), out)["seconds"]
            print(json.dumps({"seconds": seconds, "megabytes": most_needed() / 1e6}))
        return
    with TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        write_imagefolder(data, labelled_digits("ink", 0)[0][0])
        estimate, training = (apart(what, data, out) for what in ("estimate", "training"))
    s = estimate["seconds"]
    parts = {"classifiers": s["classifiers"], "learners and samples": s["learners"] + s["samples"], "total": s["total"]}
    ratios = {name: parts[name] / sum(training["seconds"][key] for key in keys) for name, keys in PARTS.items()}
    ratios = {"said_over_taken": ratios | {"memory": estimate["megabytes"] / training["megabytes"]}}
    keep("estimate", ratios)
    print(json.dumps(rounded(ratios), indent=2))


if __name__ == "__main__":
    main()
