"""What the jobs refuse before they start."""

import pytest

from ctrl_diffusion.commands.jobs import demo
from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.commands.jobs.train import classifier_job
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.run.config import ControlSettings
from ctrl_diffusion.system.progress import JobOptions


def test_a_classifier_is_not_written_over_somebody_elses_files(tmp_path, tmp_path_factory):
    data = tmp_path_factory.mktemp("digits")
    write_imagefolder(data, demo.labelled_digits("ink", 0)[0][0])
    settings = ControlSettings(name="ink", data=str(data))
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite, message in ((False, "--overwrite"), (True, r"no classifier\.json of ours")):
        with pytest.raises(ValueError, match=message):
            classifier_job(settings, tmp_path, options=JobOptions(overwrite=overwrite))
    with pytest.raises(ValueError, match="is a file"):
        classifier_job(settings, tmp_path / "thesis.txt" / "under")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_classifier_is_fitted_as_the_config_of_a_training_says(tmp_path, monkeypatch, ctrl_here):
    """The same file serves `ctrl classifier` and `ctrl train`."""
    for name, data in zip(("data", "others"), demo.labelled_digits("ink", 0)[0], strict=True):
        write_imagefolder(tmp_path / name, data)
    text = "kind: scale\njudge_data: others\ncondition: digit\nclassifier: {updates: 7}\nsteps: 5\n"
    (tmp_path / "mine.yaml").write_text(text)

    def fitted(data, name, condition, **rest):
        found = data.space(name).scale, condition, len(rest["judge_data"]), rest["settings"].updates
        raise ValueError(f"{found}")

    monkeypatch.setattr(job, "fit_panel", fitted)
    asked = ["classifier", tmp_path / "data", "--control", "ink", "--config", tmp_path / "mine.yaml"]
    done = ctrl_here(*asked, "--out", tmp_path / "out", "--quiet")
    assert done.stderr == "ctrl: (True, 'digit', 1297, 7)\n"
