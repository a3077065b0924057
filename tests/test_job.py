"""What the jobs refuse before they start."""

import pytest

from ctrl_diffusion import demo
from ctrl_diffusion.data import write_imagefolder
from ctrl_diffusion.job import classifier_job


def test_a_classifier_is_not_written_over_somebody_elses_files(tmp_path, tmp_path_factory):
    data = tmp_path_factory.mktemp("digits")
    write_imagefolder(data, demo.labelled_digits("ink", 0)[0][0])
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite, message in ((False, "--overwrite"), (True, r"no classifier\.json of ours")):
        with pytest.raises(ValueError, match=message):
            classifier_job(data, "ink", None, tmp_path, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file"):
        classifier_job(data, "ink", None, tmp_path / "thesis.txt" / "under")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
