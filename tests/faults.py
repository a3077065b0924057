"""What a training may meet on its way, made to happen."""

import errno
from itertools import count

import yaml

from ctrl_diffusion.run import stages

SETTINGS = {
    "classifier": {"updates": 150, "head": "ordinal", "grid": 1, "depth": 1},
    "learners": ["weighted", "adjoint"],
    "weighted": {"updates": 4, "batch": 16, "cache": 8, "renoising": 0},
    "adjoint": {"updates": 8, "batch": 8, "reuse": 2},
    "evaluation": {"prior_samples": 8, "paths": 80, "probes": 1, "sweep_paths": 80},
    "steps": 2,
    "rank": 4,
    "checkpoint": 2,
}


def log(folder):
    return (folder / "progress.jsonl").read_bytes()


def disturbed(monkeypatch, change):
    """Let `change`, of a number and a step, see every step of the adjoint learner."""
    learner_of, number = stages.learner_of, count(1)

    def changed(run, stage, phase):
        learner = learner_of(run, stage, phase)
        if stage != "adjoint":
            return learner
        return lambda *given: (change(next(number), step, learner) for step in learner(*given))

    monkeypatch.setattr(stages, "learner_of", changed)


def interrupted_at(at):
    def change(number, step, learner):
        if number == at:
            raise KeyboardInterrupt
        return step

    return change


def with_settings(run, **settings):
    """Write other settings into a run's config."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))


def refused(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))
