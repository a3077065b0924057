"""A full disk, damaged or unreadable states, other settings: what a training goes on from."""

import resource
from itertools import count
from pathlib import Path

import pytest
import yaml
from faults import log, refused, with_settings

from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.commands.jobs.train import resume_job
from ctrl_diffusion.control import lora
from ctrl_diffusion.reward import scorer as classifier
from ctrl_diffusion.run.state import TrainingState
from ctrl_diffusion.system import checkpoint


def no_room(at):
    """Writing of states where there is no room for all of the `at`-th: the system itself refuses."""
    saves, write = count(1), checkpoint.write_tensors

    def full(*arguments):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if next(saves) == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    return full


@pytest.mark.parametrize("at", [4, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2, 7))])
def test_a_full_disk_costs_nothing_but_a_second_start(run, trained, monkeypatch, undisturbed, at):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", no_room(at))
        with pytest.raises(OSError, match=r"File too large\. What is saved is whole; .*--resume") as caught:
            trained(run)
    assert "\n" not in str(caught.value)
    states = list((run / "checkpoint").iterdir())
    assert len(states) == 1 + 2 * min(at - 1, 2), "the last ones are there, and no half"
    trained(run)
    assert log(run) == undisturbed


def flip(path):
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 1
    path.write_bytes(text)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "states"),
    [(flip, 1), (cut, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((Path.unlink, 1), (flip, 2)))],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(interrupted, trained, undisturbed, damage, states):
    newest = sorted((interrupted / "checkpoint").glob("*.safetensors"))
    assert len(newest) == 2
    for path in newest[-states:]:
        damage(path)
    with pytest.warns(UserWarning, match=r"is damaged \(.*\): training goes on from before it"):
        trained(interrupted)
    assert log(interrupted) == undisturbed


def test_a_state_that_cannot_be_read_is_not_a_damaged_one(interrupted, trained, monkeypatch, undisturbed):
    states = set((interrupted / "checkpoint").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256", refused)
        with pytest.raises(OSError, match=r"Permission denied.*go on with: ctrl train --resume"):
            trained(interrupted)
    assert set((interrupted / "checkpoint").iterdir()) == states
    trained(interrupted)
    assert log(interrupted) == undisturbed


@pytest.mark.parametrize("part", [classifier, lora])
def test_weights_that_may_not_be_read_are_not_damaged_ones(ctrl_here, quick_run, monkeypatch, tmp_path, part):
    monkeypatch.setattr(part, "read_tensors", refused)
    done = ctrl_here("sample", quick_run, "--out", tmp_path / "out", "--quiet")
    assert (done.returncode, done.stderr.startswith("ctrl: [Errno 13] Permission denied")) == (2, True)


def test_what_was_learned_for_other_settings_is_not_gone_on_with(interrupted, trained):
    with_settings(interrupted, rank=2, steps=3, micro_batch=4)
    with pytest.raises(ValueError, match=r"config\.yaml: steps was 2 and is 3; rank was 4 and is 2\. Put it back"):
        trained(interrupted)
    with_settings(interrupted, rank=4, steps=2)
    assert trained(interrupted)[-1]["kept"]


def test_another_precision_begins_with_its_own_scale(interrupted, monkeypatch):
    """float32 has saved a scale of one, in which float16 would lose small gradients."""
    with_settings(interrupted, mixed_precision="fp16")

    def scale(run, folder, *_):
        assert TrainingState.from_checkpoints(run, folder.checkpoints).best.record
        return run.policy.base.loss_scale

    monkeypatch.setattr(job, "train_and_report", scale)
    assert resume_job(interrupted) == 2**10


def test_killed_before_p_was_whole_it_is_fitted_again(begun, run, monkeypatch):
    (run / "checkpoint" / "run.json").unlink()
    (run / "classifier" / "classifier.safetensors").unlink()
    (run / "classifier" / ".classifier.json.part.json").write_text("{")
    monkeypatch.setattr(job, "finish_training", lambda *_: {})
    resume_job(run)
    for name in ("classifier/classifier.safetensors", "config.yaml", "data/metadata.csv"):
        assert (run / name).read_bytes() == (begun / name).read_bytes()
    assert not list(run.rglob(".*"))
    # the rule that made the labels is run again, and the command line does not name it
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["controls"][0]["column"] = "somebodys:label"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "checkpoint" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml runs code: somebodys:label\. If you know it, pass --trust"):
        resume_job(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "{tmp}/missing"], "has no run to go on with: it has no config.yaml"),
        (["--resume", "{run}", "--seed", "0"], "--resume takes everything but --time from"),
        (["--resume", "{run}", "--out", "{tmp}/other"], "Leave the other options out."),
        (["--prior", "digits"], "--out is missing"),
        (["--resume", "{run}", "--time", "1h"], "is no finished run. Finish it first"),
    ],
)
def test_what_cannot_be_resumed(ctrl_here, begun, tmp_path, arguments, message):
    done = ctrl_here("train", *(text.format(tmp=tmp_path, run=begun) for text in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
