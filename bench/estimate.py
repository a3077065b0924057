"""What --dry-run says of a training, over what the training then takes, into bench/results/speed.json.

python bench/estimate.py      (about half an hour on one quiet thread: the digits demo, without the judge of ink)

Estimate and training are processes of their own, one after the other, so that time is compared on the machine as it
was in one hour. Memory is the peak of the process.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from race import keep

from ctrl_diffusion.commands.jobs import demo
from ctrl_diffusion.commands.jobs.estimate import estimate_job, most_needed
from ctrl_diffusion.commands.jobs.train import train_job
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.system.files import rounded

PARTS = {"classifiers": ("classifier",), "learners and samples": ("train", "sample"), "total": ("total",)}


def settings(data: str) -> dict[str, Any]:
    """Of the digits demo, on data that are there."""
    whole = dict(demo.SETTINGS["ink"])
    whole["controls"] = [{**whole["controls"][0], "data": data}]
    return whole


def apart(what: str, data: Path, out: Path) -> dict[str, Any]:
    """The figures of an estimate or a training in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what, data, out], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:]:
        what, data, out = sys.argv[1:]
        if what == "estimate":
            found = estimate_job(settings(data))
            print(json.dumps({"seconds": found["seconds"], "megabytes": found["memory_mb"]["all"]}))
        else:
            found = train_job(settings(data), out)["seconds"]
            print(json.dumps({"seconds": found, "megabytes": most_needed() / 1e6}))
        return
    with TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        write_imagefolder(data, demo.labelled_digits("ink", 0)[0][0])
        said, taken = (apart(what, data, out) for what in ("estimate", "training"))
    s = said["seconds"]
    told = {"classifiers": s["classifiers"], "learners and samples": s["learners"] + s["samples"], "total": s["total"]}
    found = {
        "said_over_taken": {name: told[name] / sum(taken["seconds"][p] for p in parts) for name, parts in PARTS.items()}
        | {"memory": said["megabytes"] / taken["megabytes"]},
    }
    keep("estimate", found)
    print(json.dumps(rounded(found), indent=2))


if __name__ == "__main__":
    main()
