import math

import pytest
import torch
import torch.nn.functional as F

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.reward.fit import (
    AUGMENTATIONS,
    Recipe,
    any_side_up,
    calibrate,
    fit_classifier,
    report_classifier,
    shift,
)
from ctrl_diffusion.reward.heads import RESOLUTION
from ctrl_diffusion.reward.reward import Reward
from ctrl_diffusion.reward.scorer import Architecture, Classifier, Scorer


@pytest.fixture(scope="module")
def parts():
    return labelled_digits("ink", 0)[0][0].split("ink", seed=0)


@pytest.fixture(scope="module", params=["categorical", "ordinal"])
def fitted(request, parts):
    return fit_classifier(parts[0].x, parts[0].labels["ink"], 4, Architecture(request.param), Recipe(40))


def test_probabilities_sum_to_one_and_reach_far_into_the_tails(fitted):
    score = torch.linspace(-200, 200, 9)[:, None]
    score = score if fitted.head.name == "ordinal" else score * torch.tensor([1.0, 0.0, -1.0, 0.5])
    log_prob = fitted.log_prob_from(score, 0.5)
    assert log_prob.isfinite().all()
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(9))


def test_calibration_lowers_nll_on_its_split(fitted, parts):
    x, y = parts[1].x, parts[1].labels["ink"]
    score = fitted.score(fitted.features(x))

    def nll(temperature):
        return F.nll_loss(fitted.log_prob_from(score, temperature), y, reduction="sum")

    def objective(temperature):
        return nll(temperature) + 0.5 * (math.log(temperature) / 0.5) ** 2

    calibrate(fitted, x, y)
    found = float(fitted.temperature)
    assert abs(math.log(found)) > 0.1, "the uncalibrated fit must be off for this test to say anything"
    assert nll(found) < nll(1.0)
    for factor in (0.95, 1.05):
        assert objective(found * factor) > objective(found)


def test_calibration_lowers_the_nll_of_an_overconfident_fit(fitted, parts):
    """A temperature of 0.05 is the same network with logits twenty times as large."""
    x, y = parts[1].x, parts[1].labels["ink"]
    score = fitted.score(fitted.features(x))
    calibrate(fitted, x, y)
    overconfident, found = (
        float(F.nll_loss(fitted.log_prob_from(score, t), y)) for t in (0.05, float(fitted.temperature))
    )
    assert found < overconfident


def test_all_right_by_chance_does_not_make_certain(fitted, parts):
    """Three easy examples say nothing about the scale: the temperature stays within two spreads of 1."""
    x, y = parts[1].x, parts[1].labels["ink"]
    sure = fitted.log_prob(x).gather(1, y[:, None]).squeeze(1).topk(3).indices
    calibrate(fitted, x[sure], y[sure])
    assert abs(math.log(float(fitted.temperature))) < 1.0


def test_report_against_hand_computation(fitted, parts):
    x, y = parts[2].x, parts[2].labels["ink"]
    report = report_classifier(fitted, x, y)
    p = fitted.log_prob(x).exp()
    assert report.accuracy == pytest.approx(float((p.argmax(1) == y).float().mean()))
    share = y.bincount() / len(y)
    assert report.chance_nll == pytest.approx(float(-(share * share.log()).sum()), rel=1e-5)
    assert report.nll == pytest.approx(float(-p[torch.arange(len(y)), y].log().mean()), rel=1e-5)
    confidence, right = p.max(1).values, (p.argmax(1) == y).float()
    edges = torch.linspace(0, 1, 11)
    ece = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        cell = (confidence > low) & (confidence <= high)
        if cell.any():
            ece += float(cell.float().mean() * (confidence[cell].mean() - right[cell].mean()).abs())
    assert report.ece == pytest.approx(ece, abs=1e-5)


def test_brier_and_auroc_by_hand():
    said = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4]]).log()
    says_so = Scorer(torch.nn.Identity(), 0, 3)
    report = report_classifier(says_so, said, torch.tensor([0, 1, 2, 2]))
    assert report.brier == pytest.approx((0.14 + 0.86 + 0.26 + 0.62) / 4)
    # pairs in the right order, one half for a tie: 3 of 3 for class 0, 2.5 of 3 for class 1, 4 of 4 for class 2
    assert report.auroc == pytest.approx((1 + 2.5 / 3 + 1) / 3)
    assert report_classifier(says_so, said, torch.tensor([0, 1, 1, 1])).auroc is None
    assert report.nll == pytest.approx(-math.log(0.7 * 0.3 * 0.6 * 0.4) / 4)
    assert report.accuracy == 0.5


def two_levels(n, rare, seed):
    """Images of noise about −½ or ½, the brighter ones a share `rare`; and the exact posterior's log-odds."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=generator) < rare).long()
    x = (y - 0.5)[:, None, None, None] + 2 * torch.randn(n, 1, 4, 4, generator=generator)
    # 16 pixels of variance 4 whose means differ by 1: the log-likelihood ratio is Σx / 4
    return x, y, x.flatten(1).sum(1) / 4 + math.log(rare / (1 - rare))


@pytest.mark.parametrize("head", ["categorical", "ordinal"])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_balanced_fit_is_the_posterior_under_the_datas_own_frequencies(head, balanced):
    """Weights change the prior over classes; without the correction every rare class would be said to be common."""
    (x, y, _), (x_c, y_c, _), (x_t, y_t, exact) = (two_levels(n, 0.08, i) for i, n in enumerate((1500, 500, 4000)))
    fitted = fit_classifier(x, y, 2, Architecture(head, balanced=balanced), Recipe(12, lr=3e-3))
    report = report_classifier(calibrate(fitted, x_c, y_c), x_t, y_t)
    best = float(F.nll_loss(torch.stack([F.logsigmoid(-exact), F.logsigmoid(exact)], 1), y_t))
    said = fitted.log_prob(x_t)[:, 1].exp()
    assert report.nll < best + 0.03
    assert report.ece < 0.03
    assert float((said - exact.sigmoid()).mean()) == pytest.approx(0, abs=0.02)
    if balanced:
        uncorrected = fitted.head.log_prob(fitted.scores(x_t), fitted.temperature, **fitted.head_weights)
        assert float(uncorrected[:, 1].exp().mean()) > 0.2


def test_even_classes_need_no_balance():
    """With weights of 1 and even frequencies a balanced fit is the fit it was."""
    x, y = torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    plain, balanced = (fit_classifier(x, y, 3, Architecture(balanced=b), Recipe(3)) for b in (False, True))
    torch.testing.assert_close(balanced.log_prob(x), plain.log_prob(x))
    assert "log_frequency" not in plain.state_dict()


def test_early_stopping_keeps_the_best_epoch():
    """Labels half of which are noise: the longer the fit, the worse."""
    (x, y, _), (x_c, y_c, _) = (two_levels(n, 0.5, i) for i, n in enumerate((60, 400)))
    last, best = (fit_classifier(x, y, 2, Architecture(depth=2), Recipe(60), watch=w) for w in (None, (x_c, y_c)))
    assert float(best.temperature) == 1.0
    last, best = (float(F.nll_loss(calibrate(p, x_c, y_c).log_prob(x_c), y_c)) for p in (last, best))
    assert best < last - 0.02


def test_save_and_load(fitted, parts, tmp_path):
    fitted.save(tmp_path)
    assert torch.equal(Classifier.load(tmp_path).log_prob(parts[2].x), fitted.log_prob(parts[2].x))


def test_one_seed_one_classifier(parts):
    x, y = parts[0].x, parts[0].labels["ink"]
    torch.manual_seed(5)
    a = fit_classifier(x, y, 4, Architecture("ordinal"), Recipe(2), seed=1)
    b = fit_classifier(x, y, 4, Architecture("ordinal"), Recipe(2), seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("size", "depth", "convolutions", "halved"), [((8, 8), None, 1, 1), ((16, 12), None, 2, 2), ((40, 64), 4, 4, 4)]
)
def test_larger_images_are_brought_down(size, depth, convolutions, halved):
    x, y = torch.randn(8, 3, *size), torch.arange(8) % 2
    classifier = fit_classifier(x, y, 2, Architecture(depth=depth), Recipe(1))
    layers = [layer for layer in classifier.trunk if isinstance(layer, torch.nn.Conv2d)]
    assert len(layers) == convolutions
    assert torch.Size([layers[0].stride[0], *(layer.stride[0] for layer in layers[1:])]).numel() == halved
    assert classifier.log_prob(x).shape == (8, 2)


def test_augmentations_keep_what_they_promise():
    x = labelled_digits("ink", 0)[0][0].x
    turned = any_side_up(x)
    assert not torch.equal(turned, x)
    torch.testing.assert_close(rulers.ink(turned), rulers.ink(x))
    # every shifted image is a window of the padded original: up to one pixel each way at 8 × 8
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    windows = torch.stack([padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    same = (windows == shift(x)).flatten(2).all(2)  # (9, n)
    assert same.any(0).all()
    assert same.any(1).all(), "every one of the nine shifts occurs among 500"
    assert AUGMENTATIONS["none"] is None


def test_rewards_scale_with_gamma_and_null_earns_nothing(fitted, parts):
    x = parts[2].x[:4]
    y = torch.tensor([0, 1, -1, 3])
    once, twice = (Reward({"ink": fitted}, gamma)(x, {"ink": y}) for gamma in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * once)
    assert once[2] == 0
    torch.testing.assert_close(once[3], fitted.log_prob(x)[3, 3])
    with pytest.raises(ValueError, match="gamma must not be negative"):
        Reward({}, -1.0)


def on_a_scale(n, seed, rule=False):
    """Images whose first pixels say y's mean and deviation; y normal about it, or the mean itself."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n, 1, 4, 4, generator=generator) - 1
    mean, std = 4 + 3 * x[:, 0, 0, 0], 0.5 + 0.5 * (x[:, 0, 0, 1] + 1)
    y = mean if rule else mean + std * torch.randn(n, generator=generator)
    return x, y, mean, std


def test_a_gaussian_head_finds_mean_and_deviation():
    (x, y, *_), (x_c, y_c, *_), (x_t, y_t, mean, std) = (on_a_scale(n, i) for i, n in enumerate((3000, 500, 3000)))
    p = calibrate(fit_classifier(x, y, 9, Architecture("gaussian", 4), Recipe(20, lr=3e-3)), x_c, y_c)
    density = p.head.density(p.scores(x_t), p.temperature)
    report = report_classifier(p, x_t, y_t)
    assert float((density.mean - mean).square().mean()) < 0.05
    assert float((density.stddev / std).log().abs().mean()) < 0.15
    best = -torch.distributions.Normal(mean, std).log_prob(y_t)
    assert report.nll < float(best.mean()) + 0.05
    # how often the intervals hold y: nine shares of 3,000, each within three standard errors if p̂ were exact
    assert report.ece < 0.03
    explained = 1 - float((y_t - mean).square().sum() / (y_t - y_t.mean()).square().sum())
    assert report.r2 == pytest.approx(explained, abs=0.02)
    assert report.chance_nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e * float(y_t.var())), abs=1e-5)
    assert (report.brier, report.auroc) == (None, None)


def test_the_density_at_the_levels_and_between_them(tmp_path):
    x, y, *_ = on_a_scale(200, 0)
    p = fit_classifier(x, y, 9, Architecture("gaussian", 4), Recipe(2))
    table = p.log_prob(x)
    assert table.shape == (200, 9)
    for level in (0, 3, 8):
        torch.testing.assert_close(p.log_prob_at(x, torch.full((200,), float(level))), table[:, level])
    p.save(tmp_path)
    assert torch.equal(Classifier.load(tmp_path).log_prob(x), table)


def test_labels_without_noise_do_not_make_a_needle():
    x, y, *_ = on_a_scale(600, 0, rule=True)
    p = fit_classifier(x, y, 9, Architecture("gaussian", 4), Recipe(30))
    assert float(p.head.density(p.scores(x), 1e-6).stddev.min()) == pytest.approx(RESOLUTION)


def test_large_images_are_looked_at_a_few_at_a_time(monkeypatch):
    """At 512 × 512 the pooled convolutions of a held-out part at once would be tens of gigabytes."""
    monkeypatch.setattr("ctrl_diffusion.reward.scorer.PIXELS_AT_ONCE", 4 * 8 * 8)
    classifier, x, seen = Classifier(3, 2), torch.randn(10, 3, 8, 8), []
    classifier.trunk[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    classifier.log_prob(x)
    classifier.log_prob(x[:, :, :4, :4])
    classifier.log_prob(x.repeat(1, 1, 4, 4)[:2])  # one alone is too large already
    assert seen == [4, 4, 2, 10, 1, 1]
