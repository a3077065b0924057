"""The command line as a whole: its help, and what is refused by every command."""

import shutil
from importlib.metadata import version

import pytest
import yaml
from tiny import labels_changed

from ctrl_diffusion.commands.jobs import testbed


def test_version_and_help(ctrl, ctrl_here):
    assert ctrl("--version").stdout.strip() == version("ctrl-diffusion")
    overview = ctrl_here("--help").stdout
    for command in "demo classifier inspect train add sample play evaluate compare export exact".split():
        assert command in overview
        text = ctrl_here(command, "--help").stdout
        assert "Example: ctrl " + command in " ".join(text.split())
        assert len(text.splitlines()) <= 24, "a screen"


@pytest.fixture(scope="module")
def places(quick_run, tmp_path_factory):
    """Folders with one thing wrong each."""
    root = tmp_path_factory.mktemp("places")
    made = {"run": quick_run, "data": quick_run / "data"}
    for name in ("typo", "unfinished", "damaged"):
        made[name] = root / name
        shutil.copytree(quick_run, made[name])
    config = yaml.safe_load((made["typo"] / "config.yaml").read_text())
    (made["typo"] / "config.yaml").write_text(yaml.safe_dump({**config, "gama": 2.0}))
    shutil.rmtree(made["unfinished"] / "control")
    weights = made["damaged"] / "control" / "control.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    made["moved"] = root / "moved"
    shutil.copytree(quick_run, made["moved"])
    (made["moved"] / "config.yaml").write_text(yaml.safe_dump({**config, "prior": str(root / "old" / "prior")}))
    made["file"] = root / "file"
    made["file"].write_text("")
    changes = {
        "one-class": lambda i, line: line[: line.rindex(",")] + ",1",
        "blank": lambda i, line: line[: line.rindex(",")] + "," if i == 4 else line,
        "rare": lambda i, line: line[: line.rindex(",")] + ",5" if i == 4 else line,
    }
    for name, change in changes.items():
        made[name] = root / name
        labels_changed(made["data"], made[name], change)
    made["empty"] = root / "empty"
    made["empty"].mkdir()
    (made["empty"] / "metadata.csv").write_text("file_name,ink\n")
    made["unreadable"] = root / "unreadable"
    shutil.copytree(made["data"], made["unreadable"])
    (made["unreadable"] / "00007.png").write_text("no picture")
    made["latent"] = root / "latent"
    made["latent"].mkdir()
    (made["latent"] / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}'
    )
    return made


MOVED = "/old/prior is not there. If it has moved, write its new place after prior: there."
TRAIN = "train --prior digits --control ink --out {tmp}/o --data "


CLASSIFIER = "classifier --control ink --out {tmp}/o "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample {tmp}/missing --out {tmp}/o", "there is no folder"),
        ("sample {tmp} --out {tmp}/o", "is not a run folder"),
        ("sample {run} --set slant=1 --out {tmp}/o", "unknown control 'slant'; this run has: ink"),
        ("sample {run} --set ink=9 --out {tmp}/o", "ink must be one of 1, 2, 3, 4, got '9'"),
        ("sample {run} --set ink --out {tmp}/o", "ink must be one of 1, 2, 3, 4, got ''"),
        ("sample {run} --class 11 --out {tmp}/o", "--class must be one of the prior's 10 classes"),
        ("sample {run} --steps 5000 --out {tmp}/o", "fewer than 5000 distinct times"),
        ("sample {run} --out {run}", "is not empty. Choose another --out, or pass --overwrite"),
        ("sample {run} --out {run} --overwrite", "no sample.json of ours"),
        ("sample {run} -n 0 --out {tmp}/o", "Invalid value for '-n'"),
        ("evaluate {typo}", "gama: Extra inputs are not permitted"),
        ("evaluate {unfinished}", "unfinished run: it lacks control"),
        ("evaluate {damaged}", "is damaged"),
        ("evaluate {moved}", MOVED),
        ("sample {moved} --class 3 --out {tmp}/o", MOVED),
        ("export {moved} {tmp}/o", MOVED),
        ("train --resume {moved} --time 10s", MOVED),
        ("compare {moved} --out {tmp}/o", MOVED),
        ("demo --seed 4294967296 --out {tmp}/o", "Invalid value for '--seed'"),
        ("demo --learner magic --out {tmp}/o", "learners: no learner is called 'magic'. There are contrast, weighted"),
        ("demo --controls slant --out {tmp}/o", "the demos on digits are ink or digit or ink,slant; got 'slant'"),
        ("demo --quick --out {run}", "or pass --overwrite"),
        ("demo --quick --out {file}", "is a file"),
        ("exact --quick --out {run}", "or pass --overwrite"),
        ("exact --quick --out {run} --overwrite", "no exact.json of ours"),
        (CLASSIFIER + "{tmp}/missing", "there is no folder or file"),
        (CLASSIFIER + "{empty}", "has no rows. Write one line per image"),
        (CLASSIFIER + "{one-class}", "all 500 examples have ink = '1'. A control needs two classes"),
        (CLASSIFIER + "{rare}", "ink = '5' has 1 example(s). Bring at least 10 of every class"),
        (CLASSIFIER + "{blank}", "row 5: ink is blank. Label it or remove the row"),
        (CLASSIFIER + "{unreadable}", "row 8: cannot read '00007.png'"),
        ("classifier {data} --control slant --out {tmp}/o", "has no column slant; it has: file_name, digit, ink"),
        (CLASSIFIER + "{data} --condition ink", "both name the column 'ink'"),
        ("classifier {data} --control ink --out {run}", "is not empty. Choose another --out, or pass --overwrite"),
        (TRAIN + "{one-class}", "A control needs two classes"),
        (TRAIN + "{blank}", "is blank"),
        (TRAIN + "{data} --condition weight", "has no column weight"),
        (TRAIN + "{data} --classifier {data}", "holds no classifier"),
        (TRAIN + "{data} --steps 5000", "fewer than 5000 distinct times"),
        (TRAIN + "{data} --gamma -1", "gamma: Input should be greater than or equal to 0"),
        (
            TRAIN + "{data} --learner adjoint,magic",
            "learners: no learner is called 'magic'. There are contrast, weighted",
        ),
        (TRAIN + "{data} --config {file}", "must hold KEY: VALUE lines"),
        (TRAIN + "{data} --config {tmp}/none.yaml", "No such file"),
        ("train --prior digits --control ink --out {tmp}/o", "--data is missing"),
        (
            "train --prior {latent} --data {data} --control ink --out {tmp}/o",
            "cannot be loaded: it lacks its unet and vae and text_encoder and tokenizer",
        ),
        ("train --prior {data} --data {data} --control ink --out {tmp}/o", "is no pipeline folder of diffusers"),
        ("train --prior digits --data {data} --control ink --out {run}", "or pass --overwrite"),
    ],
)
def test_bad_input_is_one_clear_line(ctrl_here, places, tmp_path, arguments, message):
    done = ctrl_here(*(argument.format(tmp=tmp_path, **places) for argument in arguments.split()))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 or "Usage" in done.stderr, done.stderr
    assert not (tmp_path / "o").exists(), "nothing half-written"


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory"])
def test_memory_is_short_in_many_words(monkeypatch, ctrl_here, tmp_path, text):
    def fails(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(testbed, "exact_job", fails)
    done = ctrl_here("exact", "--out", tmp_path / "exact")
    assert (done.returncode, done.stderr.split(".")[0]) == (2, "ctrl: out of memory")
