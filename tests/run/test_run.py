"""A run with an untrained control: what it refuses, and that it samples the prior."""

from types import SimpleNamespace

import pytest
import torch

from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.reward.scorer import Classifier
from ctrl_diffusion.reward.support import Support
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.measure import PolicyPaths, policy_paths, probe, sample_scales
from ctrl_diffusion.run.run import Run


@pytest.fixture
def run(start_ink):
    return start_ink(steps=2)


def seeded():
    return torch.Generator().manual_seed(0)


def test_an_untrained_control_changes_nothing(run):
    c = torch.tensor([3, 5, 3, 5])
    samples = [run.sample(torch.full((4,), y), c, generator=seeded()) for y in (-1, 0, 3)]
    assert samples[0].shape == (4, 1, 8, 8)
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0])
    paths = policy_paths(run, run.conditions, 2, "test")
    assert isinstance(paths, PolicyPaths)
    torch.testing.assert_close(paths.kl, torch.zeros(run.conditions.pairs * 2))


def test_probes_share_their_noise(run):
    first, second = probe(run, 2), probe(run, 2)
    assert first.figures == second.figures
    assert torch.equal(first.log_w, second.log_w)


@pytest.mark.parametrize(
    ("y", "c", "message"),
    [
        ([0, 1], None, "this prior needs c, classes 0 … 9"),
        ([0, 1], [3], "c and y must be equally many, got 1 and 2"),
        ([0, 1], [3, 10], "c must lie in 0 … 9, got 3 … 10"),
    ],
)
def test_what_cannot_be_sampled_is_refused(run, y, c, message):
    with pytest.raises(ValueError, match=message):
        run.sample(torch.tensor(y), None if c is None else torch.tensor(c))


def test_what_is_no_run_is_not_opened(tmp_path):
    for folder, message in ((tmp_path / "none", "there is no folder"), (tmp_path, "it has no config.yaml")):
        with pytest.raises(ValueError, match=message):
            Run.load(folder)
    Config.from_values({"prior": "digits", "control": "ink", "data": "-"}).write(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="it lacks classifier, control"):
        Run.load(tmp_path)


def test_the_regions_of_several_controls_leave_out_what_each_leaves_out():
    """An image is outside if it is for one p̂: at most the sum of what the borders promise, and at most all."""

    def run_of(*shares):
        supports = [None if share is None else Support(*[torch.zeros(1)] * 3, torch.tensor(share)) for share in shares]
        return SimpleNamespace(panels={str(i): SimpleNamespace(support=support) for i, support in enumerate(supports)})

    assert Run.real_outside.fget(run_of(0.05)) == pytest.approx(0.05)
    assert Run.real_outside.fget(run_of(0.05, None, 0.1)) == pytest.approx(0.15)
    assert Run.real_outside.fget(run_of(0.5, 0.5, 0.5)) == 1.0


def test_a_judge_on_a_scale_may_depend_on_c(digits):
    """It numbers the two classes that are trained; an untrained table of c says the same of both."""
    space = LabelSpace(("0", "1", "2"), scale=True)
    p_hat, judge = (Classifier(1, 3, "gaussian", conditions=2).requires_grad_(False).eval() for _ in range(2))
    judge.film.weight[1] = 0.3
    settings = {"prior": "digits", "controls": [{"name": "ink", "data": "-"}], "classes": [3, 5], "rank": 2, "steps": 2}
    panel = Panel("ink", space, (1, 8, 8), p_hat, None, judge)
    run = Run.start(Config.from_values(settings), digits, {"ink": panel})
    x, c = torch.randn(6, 1, 8, 8, generator=seeded()), torch.tensor([3, 5, 3, 5, 5, 3])
    expected = judge.head.density(judge.scores(x, (c == 5).long()), judge.temperature).mean
    torch.testing.assert_close(run.measure_scale(run.config.controls[0], x, c), expected)
    assert sample_scales(run, 8)["ink"].measured.shape == (8,)


@pytest.mark.parametrize(("hold_out", "pooled"), [(None, False), ([], True)])
def test_many_classes_of_a_run_made_before_populations_stay_enumerated(start_ink, hold_out, pooled):
    """Its config says nothing of what is held out; a new one lists it, if only as none."""
    run = start_ink(classes=list(range(10)) * 7, hold_out=hold_out)
    assert (run.training_conditions.pooled, run.training_conditions.groups) == (pooled, 70)
    assert len(run.classes) == (64 if pooled else 70)


def test_conditions_are_drawn_by_the_weights_of_the_config(start_ink):
    conditions = start_ink(classes=[3, 5, 7], hold_out=[5], weights=[1.0, 9.0, 4.0]).training_conditions
    weights = dict(zip(conditions.cond["c"].tolist(), conditions.weights.tolist(), strict=True))
    assert weights == {3: 1.0, 7: 4.0}


def test_a_control_that_does_not_see_the_condition_learns_from_the_null_class_too(start_ink):
    """One more c; of a population half of all draws. What is certified stays as it was."""
    apart, held = {"sees_condition": False}, {"classes": [3, 5, 7], "hold_out": [5]}
    run = start_ink(apart, **held)
    conditions = run.training_conditions
    assert dict(zip(conditions.names["c"], conditions.weights.tolist(), strict=True)) == {"3": 1, "7": 1, "none": 2}
    assert run.conditions.cond["c"].tolist() == [3, 7]
    run.prior.null = None
    assert run.training_conditions.cond["c"].tolist() == [7, 3]


@pytest.mark.parametrize(
    ("control", "values", "names", "weights"),
    [
        ({}, {}, ["3", "5"], None),
        ({"sees_condition": False}, {}, ["3", "5", "none"], None),
        ({"sees_condition": False}, {"hold_out": [5], "weights": [4.0, 1.0]}, ["3", "none"], [4, 4]),
    ],
)
def test_the_null_class_is_trained_on_where_the_condition_is_not_seen(start_ink, control, values, names, weights):
    conditions = start_ink(control, **values).training_conditions
    assert list(conditions.names["c"]) == names
    assert (None if conditions.weights is None else conditions.weights.tolist()) == weights
