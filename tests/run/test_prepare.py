"""What a training decides and refuses before it starts."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.data.labelled import LabelledImages, save_image, to_pixels, write_imagefolder
from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.reward.scorer import Classifier
from ctrl_diffusion.run.config import Config, ControlSettings
from ctrl_diffusion.run.defaults import quick, suggested
from ctrl_diffusion.run.folder import PAGES
from ctrl_diffusion.run.measure import probe
from ctrl_diffusion.run.prepare import ControlInputs, check_batches, complete, dependences, known_classes, prepare
from ctrl_diffusion.run.run import Run, configured
from ctrl_diffusion.system import ranks
from ctrl_diffusion.system.progress import JobOptions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_imagefolder(folder, labelled_digits("ink", 0)[0][0])
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Folders as `ctrl classifier` writes them: with judge and reader, and without either."""
    fast = ClassifierSettings(head="ordinal", grid=1, depth=1, updates=300)
    folders = {}
    for name, condition, ruler in (("whole", "digit", False), ("bare", None, True)):
        folders[name] = tmp_path_factory.mktemp(name)
        panel, _ = fit_panel(labelled_digits("ink", 0)[0][0], "ink", condition, ruler, fast)
        panel.save(folders[name])
        for page in PAGES:
            (folders[name] / page).write_bytes(b"page")
    return folders


def given(data, **more):
    return {"prior": "digits", "data": str(data), "control": "ink", **more}


def test_settings_are_filled_in_and_what_was_given_stays(data):
    job = prepare(given(data, condition="digit", adjoint={"updates": 7}))
    assert job.config.classes == list(range(10))
    assert (job.config.adjoint.updates, job.config.adjoint.batch, job.config.rank) == (7, 160, 64)
    assert job.config.evaluation.paths == 2000
    assert job.inputs[0].data.values == {"ink": ("1", "2", "3", "4"), "digit": tuple("0123456789")}
    assert prepare(given(data)).config.classes == list(range(10)), "without a column, all classes"


def test_some_of_the_priors_classes(data):
    job = prepare(given(data, condition="digit", classes=[7, 3]))
    assert job.config.classes == [7, 3]
    assert job.inputs[0].data.values["digit"] == ("7", "3")
    assert 60 < len(job.inputs[0].data) < 140, "about a fifth of 500"
    # the labels count within the classes that are asked for
    whole = prepare(given(data, condition="digit")).inputs[0].data
    sevens = whole.x[whole.labels["digit"] == 7]
    torch.testing.assert_close(job.inputs[0].data.x[job.inputs[0].data.labels["digit"] == 0], sevens)


@pytest.mark.parametrize(("classes", "pooled", "held_out"), [(64, False, 0), (65, True, 6), (1000, True, 64)])
def test_many_classes_are_a_population_with_some_held_out(data, classes, pooled, held_out):
    prior = Prior.from_pretrained(DIGITS)
    prior.classes = classes
    known, split = known_classes(prepare(given(data)).config.with_(classes=None), prior, [])
    assert list(known) == list(range(classes)), "none is left out"
    assert (split.pooled, len(split.held_out)) == (pooled, held_out)
    assert sorted(split.trained + split.held_out) == list(known)
    assert len(split.measured) == min(64, len(split.trained))


def test_few_classes_with_some_held_out_are_a_population(data):
    lines = []
    job = prepare(given(data, condition="digit", hold_out=3), JobOptions(say=lines.append))
    held_out = job.config.hold_out
    assert (len(held_out), job.config.classes) == (3, list(range(10)))
    assert lines[-1] == (
        "7 classes are trained on as a population: drawn for each sample, certified on all; 3 are held out, and "
        "certified apart"
    )
    assert len(job.inputs[0].data) == 500, "p̂ and the reader of c see all labels"
    named = prepare(given(data, condition="digit", hold_out=[9, 7, 8], classes="all")).config
    assert (named.hold_out, named.classes) == ([7, 8, 9], list(range(10)))
    plain = prepare(given(data, condition="digit", hold_out=0)).config
    assert (plain.hold_out, plain.classes) == (None, list(range(10))), "enumerated"


def test_classes_in_an_order_of_their_own_stay_a_list():
    """p̂(y | x, c) and the reader number c by it, so that "all" would mean other classes."""
    prior = Prior.from_pretrained(DIGITS)
    prior.classes = 100
    values = {"prior": "digits", "controls": [{"name": "ink", "data": "-"}], "classes": list(range(100))[::-1]}
    config = Config.from_values(values)
    known, split = known_classes(config, prior, [])
    inputs = [ControlInputs(config.controls[0], LabelledImages(torch.zeros(0), {}, {"ink": ("1", "2")}), None, {})]
    kept, _ = complete(values, config, prior, inputs, known, split, {})
    assert kept.classes == values["classes"]
    assert complete({**values, "classes": "all"}, config, prior, inputs, range(100), split, {})[0].classes == "all"


@pytest.mark.parametrize(
    ("weights", "hold_out", "message"),
    [
        ([1.0] * 9, 3, "weights: got 9 of 10 classes. Give one for each, or leave them out."),
        ([1.0] * 10, 0, "weights: got 10 and no population to draw by them. Give one for each, or leave them out."),
    ],
)
def test_weights_are_one_for_each_class_of_a_population(data, weights, hold_out, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(given(data, condition="digit", hold_out=hold_out, weights=weights))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hold_out": 10}, "hold_out: 10 of 10 classes leave none to train on. Hold out fewer."),
        ({"hold_out": [3, 12]}, "hold_out: 12 is none of the 10 classes. Name some of them by number."),
        ({"hold_out": 2, "unconditional": True}, "hold_out: 2: this prior is unconditional. Leave it out."),
        ({"classes": "all", "unconditional": True}, "classes must be null: this prior is unconditional; got all."),
    ],
)
def test_what_cannot_be_held_out_is_refused(data, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(given(data, **settings))


def test_a_control_sees_the_condition_where_there_is_no_other_way(data, tmp_path):
    assert not prepare(given(data, condition="digit", sees_condition=False)).config.controls[0].sees_condition
    alone = r"sees_condition: false, of 'ink': this prior is given no condition\. Leave it out\.$"
    with pytest.raises(ValueError, match=alone):
        prepare(given(data, sees_condition=False, unconditional=True))
    prior, config = Prior.from_pretrained(DIGITS), prepare(given(data, sees_condition=False)).config
    prior.denoiser.null_call = None
    with pytest.raises(ValueError, match=r"this prior has no class or prompt for none\."):
        configured(prior, config)


def test_a_prior_of_few_timesteps_gets_fewer_steps(data, tmp_path):
    folder = tmp_path / "few"
    shutil.copytree(DIGITS, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": 30}))
    config = prepare({**given(data), "prior": str(folder)}).config
    assert 5 < config.steps < 20
    with pytest.raises(ValueError, match="fewer than 20 distinct times"):
        prepare({**given(data), "prior": str(folder), "steps": 20})


def test_defaults_shrink_with_the_model_and_grow_with_the_task():
    small, large = suggested((1, 8, 8), 800_000, 64, 10, 4), suggested((3, 64, 64), 100_000_000, 16, 1, 3)
    assert small["adjoint"]["batch"] > large["adjoint"]["batch"] >= 16
    assert small["adjoint"]["updates"] > large["adjoint"]["updates"]
    assert large["steps"] > small["steps"]
    assert large["adjoint"]["lr_adapter"] < 1e-3
    # the demo's batch of 160 has the rates of the settings; a fifth of it √5 times less
    assert (small["adjoint"]["lr_embedding"], small["adjoint"]["lr_adapter"]) == (1e-2, 1.5e-3)
    middle = suggested((3, 16, 12), 800_000, 16, 1, 3)
    assert middle["adjoint"]["batch"] == 32
    assert middle["adjoint"]["lr_adapter"] == pytest.approx(1.5e-3 / 5**0.5, rel=0.01)  # two digits are kept
    assert (small["steps"], middle["steps"]) == (20, 40)
    many = suggested((1, 8, 8), 800_000, 64, 1, 10)  # ten classes share the samples of one condition
    assert [s["weighted"]["cache"] for s in (small, middle, many)] == [1000, 1000, 3000]
    # three classes are three pairs to tell apart, ten are forty-five
    assert [s["contrast"]["updates"] for s in (middle, many)] == [460, 2970]


@pytest.mark.parametrize(("groups", "classes", "pooled"), [(1, 3, False), (10, 4, False), (64, 4, True), (7, 4, True)])
def test_no_more_states_of_paths_are_kept_than_updates_visit(groups, classes, pooled):
    settings = suggested((4, 8, 16), 442_100, 16, groups, classes, pooled)["contrast"]
    paths = settings["cache"] * (1 if pooled else groups)
    visits = 4 * settings["updates"] * settings["batch"]  # the limit of a learner that follows its probes
    assert settings["states"] == 40 or paths * (settings["states"] - 1) < visits <= paths * settings["states"]


@pytest.mark.parametrize("learners", [["contrast", "adjoint"], ["adjoint"]])
def test_the_first_learner_that_follows_its_probes_has_a_limit(data, learners):
    """With a patience of null, or at a cosine, its updates are what they were; what was given binds."""
    first, *others = learners
    plain = [
        prepare(given(data, learners=learners, **more)).config for more in ({"patience": None}, {"decay": "cosine"})
    ]
    config = prepare(given(data, learners=learners)).config
    usual = suggested((1, 8, 8), 800_000, 64, 10, 4)
    assert config.follows_probes
    assert [getattr(each, first).updates for each in (config, *plain)] == [
        n * usual[first]["updates"] for n in (4, 1, 1)
    ]
    assert all(getattr(config, name).updates == usual[name]["updates"] for name in others)
    assert getattr(prepare(given(data, learners=learners, **{first: {"updates": 7}})).config, first).updates == 7
    small = [getattr(quick(each), name).updates for name in learners for each in (config, *plain)]
    assert small == [usual[name]["updates"] // 20 for name in learners for _ in range(3)], "as quick as before"


def test_fewer_updates_than_usual_are_a_training_cut_short(data):
    few = {"learners": ["weighted"], "weighted": {"updates": 50}}
    assert prepare(given(data)).cut is False
    assert prepare(given(data, **few)).cut is True
    # as a demo has settings of its own
    assert prepare(given(data, **few), usual={"weighted": {"updates": 50}}).cut is False
    assert prepare(given(data, **few), usual={"weighted": {"updates": 51}}).cut is True


def test_the_judges_own_data_have_the_same_classes(data, tmp_path):
    job = prepare(given(data, judge_data=str(data)))
    assert job.inputs[0].judge_data.values == {"ink": ("1", "2", "3", "4")}
    assert job.config.controls[0].judge_data == str(data.resolve())
    lines = (data / "metadata.csv").read_text().splitlines()
    for name, labels, message in (
        ("unknown", lambda i: 9, "ink must be one of 1, 2, 3, 4, got '9'"),
        ("missing", lambda i: 1 + i % 3, r"ink = '4' has 0 example\(s\)"),
    ):
        shutil.copytree(data, tmp_path / name)
        table = [lines[0], *(f"{line.rpartition(',')[0]},{labels(i)}" for i, line in enumerate(lines[1:]))]
        (tmp_path / name / "metadata.csv").write_text("\n".join(table))
        with pytest.raises(ValueError, match=message):
            prepare(given(data, judge_data=str(tmp_path / name)))


def test_a_classifier_that_is_handed_over(data, fitted):
    job = prepare(given(data, condition="digit", classifier_from=str(fitted["whole"])))
    assert job.inputs[0].panel.reader is not None
    assert job.inputs[0].pages == dict.fromkeys(PAGES, b"page")
    # a reader nobody asked for panel nothing
    assert prepare(given(data, classifier_from=str(fitted["whole"]))).inputs[0].panel.reader is None


def test_a_classifier_given_c_counts_it_within_the_classes_asked_for(data, tmp_path):
    fast = {"head": "ordinal", "grid": 1, "depth": 1, "updates": 300, "conditional": True}
    job = prepare(given(data, condition="digit", classes=[7, 3], judge_data=str(data), classifier=fast))
    one = job.inputs[0]
    assert one.judge_data.values["digit"] == ("7", "3")
    panel, _ = fit_panel(
        one.data, "ink", "digit", settings=job.config.controls[0].classifier, judge_data=one.judge_data
    )
    run = Run.start(job.config, job.prior, {"ink": panel})
    labels, cond = run.conditions.of(run.conditions.all(1))
    x = one.data.x[:8]
    rows = torch.arange(2).repeat_interleave(4)
    torch.testing.assert_close(run.reward.table("ink", x, cond), run.config.gamma * panel.classifier.log_prob(x, rows))
    assert run.second_opinion.measure_batch(x, rows).labels["ink"].shape == labels["ink"].shape
    assert 0 <= probe(run, 2).figures["probe_outside"] < 0.5, "an untrained policy is the prior"
    panel.save(tmp_path)
    for page in PAGES:
        (tmp_path / page).write_bytes(b"page")
    with pytest.raises(ValueError, match=r"is p̂\(y \| x, c\). Name the column"):
        prepare(given(data, classifier_from=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": [3, 3]}, "classes must be different numbers in 0 … 9; got"),
        ({"classes": [10]}, "classes must be different numbers in 0 … 9"),
        ({"classes": []}, "classes: Value should have at least 1 item"),
        ({"classifier_from": "{bare}"}, "has no judge"),
        (
            {"classifier_from": "{whole}", "condition": "digit", "classes": [1, 2]},
            "no reader of 'digit' for the classes 1, 2",
        ),
        ({"classifier_from": "{bare}", "ruler": "ink", "condition": "digit"}, "no reader of 'digit'"),
        ({"classifier_from": "{whole}", "control": "digit"}, "is of 'ink' on images of"),
        (
            {"control": "digit", "ruler": "ink"},
            "ruler: ink measures the classes 1, 2, 3, 4 or a number, not the classes of 'digit'. Leave",
        ),
        ({"control": "digit", "ruler": "letter-weight"}, "letter-weight measures a number, not the classes of 'digit'"),
        (
            {"control": "digit", "kind": "scale", "ruler": "letter-weight"},
            "measures 32 × 32 pixels, and this prior makes 8 × 8. Leave the ruler out",
        ),
        ({"evaluation": {"prior_samples": 8}, "control": "digit"}, "at least the number of the controls' classes"),
        ({"data": 2024}, "data: Input should be a valid string"),
        ({"prior": None}, "--prior is missing"),
    ],
)
def test_refused_before_anything_starts(data, fitted, settings, message):
    settings = {k: v.format(**fitted) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=message):
        prepare({**given(data), **settings})


def test_augmentation_that_does_not_suit_the_images(data):
    tall = labelled_digits("ink", 0)[0][0]
    tall.x = tall.x[:, :, :, :6]
    with pytest.raises(ValueError, match="needs square images"):
        fit_panel(tall, "ink", settings=ClassifierSettings(augment="any_side_up"))


@pytest.mark.parametrize("follows", [False, True])
def test_labels_that_depend_on_each_other_are_warned_of(follows):
    """Noise that x does not show, in one label alone or shared by both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 1, 4, 4, generator=generator)
    hidden = torch.rand(2, 600, generator=generator)
    first, second = (hidden[0] < 0.5).long(), (hidden[0 if follows else 1] < 0.5).long()
    even = Classifier(1, 2).eval().requires_grad_(False)
    inputs, panels = [], {}
    for name, y in (("a", first), ("b", second)):
        data = LabelledImages(x, {name: y}, {name: ("0", "1")})
        inputs.append(ControlInputs(ControlSettings(name=name, data="one/table"), data, None, {}))
        panels[name] = Panel(name, LabelSpace(("0", "1")), (1, 4, 4), even, None)
    if not follows:
        found = dependences(inputs, panels, None)
        assert found["a and b"]["p_value"] > 1e-3
    else:
        words = (
            r"labels of a and b say 0\.69\d nats about each other beyond what p̂ sees of x .* p̂ does not see all of x"
        )
        with pytest.warns(RuntimeWarning, match=words):
            found = dependences(inputs, panels, None)
        assert found["a and b"]["nats"] > 0.5, "log 2 less what 600 examples leave open"
    inputs[1].settings = inputs[1].settings.with_(data="another/table")
    assert dependences(inputs, panels, None) == {}


@pytest.mark.parametrize(
    ("batch", "parted", "said"),
    [
        (1, False, "adjoint: a batch of 1 cannot be shared by 2 processes. Raise batch, or launch fewer."),
        (3, True, "adjoint: sharded weights: batch must be a multiple of the 2 processes, got 3."),
        (3, False, None),
        (4, True, None),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused_by_its_learner(monkeypatch, batch, parted, said):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "sharded", lambda: parted)
    config = Config.from_values({"prior": "-", "control": "-", "data": "-", "adjoint": {"batch": batch}})
    if said is None:
        check_batches(config)
        return
    with pytest.raises(ValueError, match="^adjoint: ") as refused:
        check_batches(config)
    assert str(refused.value) == said


def test_what_was_understood_is_said_of_every_dataset_once(data, tmp_path):
    """The classes' sub-folders of p̂'s data, and the table of the judge's, spelled otherwise."""
    digits = labelled_digits("ink", 0)[0][0]
    for i, (y, pixels) in enumerate(zip(digits.labels["ink"].tolist(), to_pixels(digits.x), strict=True)):
        save_image(tmp_path / "photos" / str(y + 1) / f"{i:03}.png", pixels)
    shutil.copytree(data, tmp_path / "judge")
    table = tmp_path / "judge" / "metadata.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header.replace("file_name", "img"), *(f"{row}.0" for row in rows)]))
    lines, silent = [], []
    with pytest.warns(UserWarning, match="of its images are in judge_data too"):
        job = prepare(given(tmp_path / "photos", judge_data=str(tmp_path / "judge")), JobOptions(say=lines.append))
    counts = digits.labels["ink"].bincount().tolist()
    classes = f"ink: {', '.join(f'{n} × {i + 1}' for i, n in enumerate(counts))}."
    names = "labels are the names of the sub-folders; ink was taken from label"
    assert lines == [
        f"{tmp_path}/photos: 500 of 500 rows; {names}; {classes}",
        f"{tmp_path}/judge/metadata.csv: 500 of 500 rows; images in the column img; {classes}",
    ]
    (inputs,) = job.inputs
    assert inputs.judge_data.values == inputs.data.values == {"ink": ("1", "2", "3", "4")}
    table.write_text(table.read_text().replace(",4.0", ",5.0", 1))
    with pytest.raises(ValueError, match="ink must be one of 1, 2, 3, 4, got '5.0'"):
        prepare(given(tmp_path / "photos", judge_data=str(tmp_path / "judge")), JobOptions(say=silent.append))
    assert not silent, "of what is refused the error alone"


def test_a_judges_deep_images_are_scaled_as_those_of_the_classifier(data, tmp_path):
    """Of 12 bits, of which the judge's images alone would need only 10."""
    for name, factor in (("photos", 16), ("judge", 4)):
        shutil.copytree(data, tmp_path / name)
        for path in (tmp_path / name).glob("*.png"):
            pixels = np.asarray(Image.open(path)).astype(np.uint16) * factor
            Image.fromarray(pixels).save(path)
    message = r"500 of 500 images have more than 8 bits \(0 … 4095 became black … white in all of them\)"
    with pytest.warns(UserWarning, match=message) as record:
        (inputs,) = prepare(given(tmp_path / "photos", judge_data=str(tmp_path / "judge"))).inputs
    assert sum("0 … 4095 became" in str(warning.message) for warning in record) == 2
    # a byte and its quarter, each rounded down
    bytes_of = [((part.x + 1) * 127.5).round() for part in (inputs.data, inputs.judge_data)]
    assert float((bytes_of[0] / 4 - bytes_of[1]).abs().max()) <= 1
