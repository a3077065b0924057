import math
import warnings

import pytest
import torch
from classifiers import climbed

from ctrl_diffusion.commands.jobs.demos.digits import SETTINGS, labelled_digits
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.evaluate.evaluation import warn_if_outside
from ctrl_diffusion.evaluate.judge import SecondOpinion
from ctrl_diffusion.evaluate.scores import Score, score_samples, score_target
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel
from ctrl_diffusion.reward.support import Support
from ctrl_diffusion.system.files import write_tensors


@pytest.fixture(scope="module", params=["ink", "digit"])
def judged(request):
    """p̂ of a control with its support, a judge fitted on other digits, and these: p̂ never met them."""
    ((data, others),) = labelled_digits(request.param, 0)
    settings = ClassifierSettings(**{**SETTINGS[request.param]["controls"][0]["classifier"], "updates": 600})
    panel, _ = fit_panel(data, request.param, ruler=True, settings=settings, judge_data=others[range(600)])
    return panel, others[range(600, len(others))]


def test_five_percent_of_what_is_like_the_data_lie_outside():
    """Averaged over borders: 1 − ⌈0.95 · 101⌉ / 101 of fresh draws, however the features are correlated."""
    generator, shares = torch.Generator().manual_seed(0), []
    mix = torch.randn(6, 20, generator=generator)  # fewer directions than features
    for _ in range(200):
        fitting, unseen, fresh = (torch.randn(n, 6, generator=generator).pow(3) @ mix for n in (40, 100, 100))
        shares.append(Support.fit(fitting).calibrate(unseen).share(fresh))
    shares = torch.tensor(shares)
    assert abs(float(shares.mean()) - 5 / 101) < 3 * float(shares.std()) / 200**0.5


@pytest.mark.filterwarnings("ignore:the region p̂ knows rests on")
@pytest.mark.parametrize("n", [1, 4, 10, 18, 19, 20, 38, 39, 60])
def test_a_new_image_is_outside_as_often_as_is_said(n):
    """Exactly 1 − k/(n + 1) for the border of rank k: that many of independent repeats, by the binomial's error."""
    generator, repeats = torch.Generator().manual_seed(n), 4000
    support, outside = Support.fit(torch.randn(50, 3, generator=generator)), 0
    for _ in range(repeats):
        unseen = torch.randn(n + 1, 3, generator=generator).pow(3)  # unlike what the distance was fitted on
        outside += int(support.calibrate(unseen[:n]).outside(unseen[n:]))
    said = float(support.beyond)
    assert said == pytest.approx(1 / (n + 1) if n < 19 else 1 - math.ceil(0.95 * (n + 1)) / (n + 1))
    assert (said <= 0.05 + 1e-6) == (n >= 19)
    assert outside / repeats == pytest.approx(said, abs=4 * (said * (1 - said) / repeats) ** 0.5)


def test_too_few_images_for_five_percent_are_told_and_the_share_is_kept(tmp_path):
    features = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    support = Support.fit(features)
    with pytest.warns(UserWarning, match="rests on 9 held-out images: 10.0% .* not 5%, for which it takes 19") as told:
        support.calibrate(features[:9])
    assert (len(told), len(str(told[0].message).splitlines())) == (1, 1)
    support.save(tmp_path / "support.safetensors")
    assert float(Support.load(tmp_path / "support.safetensors").beyond) == pytest.approx(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        support.calibrate(features[:19])


def test_the_region_of_an_older_folder_is_read(tmp_path):
    """The share was not written once: it was always said to be 5 %."""
    old = {"mean": torch.zeros(2), "whitening": torch.eye(2), "border": torch.tensor(3.0)}
    write_tensors(tmp_path / "support.safetensors", old)
    assert float(Support.load(tmp_path / "support.safetensors").beyond) == pytest.approx(0.05)


def test_the_distance_is_mahalanobis():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20_000, 3, generator=generator) @ torch.tensor([[2.0, 0, 0], [1, 0.1, 0], [0, 0, 5]])
    centred = features - features.mean(0)
    exact = (centred @ torch.linalg.inv(centred.T @ centred / len(centred)) * centred).sum(1).sqrt()
    torch.testing.assert_close(Support.fit(features).distance(features), exact, rtol=0.02, atol=0.02)


def test_few_images_and_a_feature_that_never_moves_make_a_border():
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    features[:, 2] = 1.0
    support = Support.fit(features)
    assert not support.outside(1e6 * torch.ones(1, 5)).any(), "nothing is outside before there is a border"
    with pytest.warns(UserWarning, match="rests on 4 held-out images"):
        support.calibrate(features[:4])
    assert support.share(features[:4]) == 0.0, "four images say only how far the farthest of them is"
    assert support.outside(torch.full((1, 5), 50.0)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3e5])
def test_images_that_are_all_alike_are_a_region_of_one_place(value, recwarn):
    """As those of black pictures: they lie inside, whatever differs lies outside, and no library warns of it."""
    features = torch.full((20, 4), value)
    support = Support.fit(features).calibrate(features)
    assert support.share(features) == 0.0
    assert support.outside(features + torch.eye(4)[[0] * 20]).all()
    assert not recwarn.list


def test_features_that_follow_from_others_do_not_break_the_region(recwarn):
    """Rounding makes a variance of theirs negative, and of its root NaN."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100_000, 1, generator=generator) @ torch.randn(1, 40, generator=generator)
    support = Support.fit(features[:90_000]).calibrate(features[90_000:])
    # a binomial share of 10,000 at 5 %: 0.0022 a standard error
    assert abs(support.share(features[:90_000]) - 0.05) < 0.01
    assert not recwarn.list


def test_real_images_are_inside_and_noise_is_not(judged):
    panel, others = judged
    # two errors: of the border, from the held-out part, and of the share itself
    unseen = {"ink": 150, "digit": 60}[panel.control]
    error = (0.05 * 0.95 * (1 / unseen + 1 / len(others))) ** 0.5
    assert abs(float(panel.outside(others.x).float().mean()) - 0.05) < 3 * error
    noise = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for strange in (noise, -others.x, others.x.roll(3, -1)):
        assert float(panel.outside(strange).float().mean()) > 0.9


def test_what_fools_the_reward_leaves_its_support_and_not_the_judge(judged):
    panel, others = judged
    x, classes = others.x[:150], len(panel.values)
    y = (others.labels[panel.control][:150] + 1) % classes
    hacked = climbed(panel, x, y)
    share = {name: float(panel.outside(a).float().mean()) for name, a in (("real", x), ("hacked", hacked))}
    assert share["hacked"] > share["real"] + 0.2
    right = {
        name: float((p.log_prob(hacked).argmax(1) == y).float().mean())
        for name, p in (("reward", panel.classifier), ("judge", panel.judge))
    }
    assert right["reward"] > 0.95
    if panel.control == "digit":  # ink is an amount: who adds ink has more ink, in everybody's eyes
        assert right["judge"] < right["reward"] - 0.15


def test_scores_have_the_share_outside():
    """Of even weights it is the samples' own; of sharp ones that of the rewarded."""
    x, conditions = torch.arange(8.0).view(8, 1, 1, 1), Conditions({}, {"y": 2})
    judge = SecondOpinion(
        {"y": lambda x, c: torch.zeros(len(x), dtype=torch.long)}, outside=lambda x, _: x.flatten() > 5
    )
    score = score_samples(judge.measure(x, conditions), conditions)
    assert score.outside_support == 2 / 8
    within = torch.tensor([0.0, 0.0, 1.0, 1.0]).var() / 4  # of the second label's mean; the first has no spread
    assert score.outside_stderr == pytest.approx(float(within.sqrt()) / 2)
    assert score_target(
        judge.measure(x, conditions), torch.zeros(1, 8, 2), conditions
    ).outside_support == pytest.approx(2 / 8)
    table = torch.zeros(1, 8, 2)
    table[0, 7] = 50.0
    assert score_target(judge.measure(x, conditions), table, conditions).outside_support == pytest.approx(1.0)
    blind = SecondOpinion(judge.rulers)
    assert score_samples(blind.measure(x, conditions), conditions).outside_support is None
    assert score_target(blind.measure(x, conditions), table, conditions).outside_support is None


@pytest.mark.parametrize(
    ("prior", "ctrl", "warned"),
    [
        ((0.05, 0.01), (0.3, 0.02), True),
        ((0.05, 0.01), (0.09, 0.001), False),  # not twice as many
        ((0.01, 0.01), (0.04, 0.01), False),  # within three standard errors
        ((None, None), (None, None), False),
    ],
)
def test_who_leaves_is_told(recwarn, prior, ctrl, warned):
    prior, ctrl = (
        Score(
            accuracy=0.5,
            accuracy_stderr=0.0,
            diversity=1.0,
            confusion=torch.eye(2),
            outside_support=s,
            outside_stderr=e,
        )
        for s, e in (prior, ctrl)
    )
    if warned:
        with pytest.warns(
            RuntimeWarning, match=r"leave the region .* \(30.0% lie outside, of the prior's 5.0%\); comp"
        ):
            warn_if_outside(prior, ctrl)
    else:
        warn_if_outside(prior, ctrl)
    assert not recwarn.list
