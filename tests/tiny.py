"""Settings of runs that take seconds, and copies of datasets with something wrong in them."""

import shutil

TINY = {
    "classifier": {"updates": 200},
    "weighted": {"updates": 3, "batch": 16, "cache": 8, "renoising": 2},
    "adjoint": {"updates": 3, "batch": 8},
    "backprop": {"updates": 3, "batch": 8},
    "ppo": {"updates": 3, "batch": 8},
    "evaluation": {"prior_samples": 8, "paths": 80, "probes": 1, "sweep_paths": 80},
    "learners": ["weighted"],
    "steps": 2,
    "rank": 4,
}


def labels_changed(source, folder, change):
    """A copy of a dataset with the lines of its table changed."""
    shutil.copytree(source, folder)
    lines = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join([lines[0], *(change(i, line) for i, line in enumerate(lines[1:]))]))
