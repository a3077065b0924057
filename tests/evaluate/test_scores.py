import pytest
import torch
import torch.nn.functional as F

from ctrl_diffusion.chain.codec import Codec
from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.evaluate.judge import Observation, SecondOpinion
from ctrl_diffusion.evaluate.scores import Nulled, score_samples, score_target, stratified_error, weighted_diversity
from ctrl_diffusion.reward.scorer import Classifier


def test_weighted_diversity_against_a_double_loop():
    features, weights = torch.randn(2, 5, 3), torch.rand(2, 5, 4)
    weights = weights / weights.sum(1, keepdim=True)
    found = weighted_diversity(features, weights)
    for g in range(2):
        for k in range(4):
            pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
            w = {(i, j): weights[g, i, k] * weights[g, j, k] for i, j in pairs}
            expected = sum(w[i, j] * (features[g, i] - features[g, j]).norm() for i, j in pairs) / sum(w.values())
            torch.testing.assert_close(found[g, k], expected)


def test_one_sample_that_owns_the_weight_has_no_diversity():
    weights = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1)
    assert weighted_diversity(torch.randn(1, 3, 2), weights).item() == 0.0


@pytest.mark.parametrize("with_reader", [True, False])
def test_a_target_without_reward_is_the_prior_itself(with_reader):
    """With equal rewards the weights are even: target and samples must agree on the same images."""
    x, reader = labelled_digits("ink", 0)[0][0].x[:40], Classifier(1, 10, grid=4).eval().requires_grad_(False)
    judge = SecondOpinion({"y": lambda x, c: torch.zeros(len(x), dtype=torch.long)}, reader if with_reader else None)
    conditions = Conditions({"c": torch.arange(10)}, {"y": 1})
    target = score_target(judge.measure(x, conditions), torch.zeros(10, 4, 1), conditions)
    samples = score_samples(judge.measure(x, conditions), conditions)
    assert target.accuracy == samples.accuracy == samples.macro_f1 == 1.0
    torch.testing.assert_close(torch.tensor(target.diversity), torch.tensor(samples.diversity))
    if with_reader:
        torch.testing.assert_close(torch.tensor(target.class_accuracy), torch.tensor(samples.class_accuracy))
    else:
        assert target.class_accuracy is samples.class_accuracy is None


def test_a_sharp_reward_picks_what_it_rewards():
    y = rulers.ink_ruler(x := labelled_digits("ink", 0)[0][0].x[:40])
    table = 50.0 * torch.nn.functional.one_hot(y, 4).float().view(1, 40, 4)
    target = score_target(
        SecondOpinion({"y": rulers.ink_ruler}).measure(x, Conditions({}, {"y": 4})), table, Conditions({}, {"y": 4})
    )
    assert target.accuracy > 1 - 1e-6
    assert target.judge_accuracy is None
    torch.testing.assert_close(target.confusion, torch.eye(4), rtol=0, atol=1e-6)


def test_the_second_opinion_is_counted_as_the_rulers_is():
    """A judge that sees what the ruler sees has its accuracy, on samples and on the target alike."""
    x, judge = labelled_digits("ink", 0)[0][0].x[:40], Classifier(1, 4).eval().requires_grad_(False)
    both = SecondOpinion({"y": lambda x, c: judge.log_prob(x).argmax(1)}, judges={"y": judge})
    target = score_target(both.measure(x, Conditions({}, {"y": 4})), torch.randn(1, 40, 4), Conditions({}, {"y": 4}))
    samples = score_samples(both.measure(x, Conditions({}, {"y": 4})), Conditions({}, {"y": 4}))
    for score in (target, samples):
        torch.testing.assert_close(score.judge_accuracy, score.accuracy)
    alone = SecondOpinion({}, judges={"y": judge})  # where nothing else measures y
    assert (
        score_samples(alone.measure(x, Conditions({}, {"y": 4})), Conditions({}, {"y": 4})).accuracy == samples.accuracy
    )
    blind = SecondOpinion({"y": rulers.ink_ruler}, judges={"y": judge})
    seen = judge.log_prob(x).argmax(1) == torch.arange(4).repeat_interleave(10)
    assert score_samples(
        blind.measure(x, Conditions({}, {"y": 4})), Conditions({}, {"y": 4})
    ).judge_accuracy == pytest.approx(float(seen.float().mean()))


def test_rulers_are_told_the_priors_classes():
    """As they are where samples were drawn for them, else those that the numbers of reader and judges stand for."""
    told = []

    def ruler(x, c):
        told.append(c.tolist())
        return torch.zeros(len(x), dtype=torch.long)

    opinion = SecondOpinion({"y": ruler}, classes=[3, 5, 7])
    x = torch.zeros(4, 1, 2, 2)
    opinion.measure(x, Conditions({"c": torch.tensor([7, 9])}, {"y": 1}))
    opinion.measure_batch(x, torch.tensor([0, 2, 1, 1]))
    assert told == [[7, 7, 9, 9], [3, 7, 5, 5]]


def test_confusion_has_what_was_asked_in_its_rows():
    conditions = Conditions({}, {"y": 3})  # six samples, two for each class in turn
    came = torch.tensor([0, 1, 1, 1, 0, 2])
    score = score_samples(
        SecondOpinion({"y": lambda x, c: came}).measure(torch.zeros(6, 1, 2, 2), conditions), conditions
    )
    assert score.confusion.tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    assert score.accuracy == pytest.approx(4 / 6)


def test_what_could_not_be_measured_is_not_right_and_in_no_class():
    """Of six samples two are empty; on the target's side they have half of the weight of every label."""
    conditions = Conditions({}, {"y": 3})
    came = torch.tensor([0, 1, 1, NULL, NULL, 2])
    observation = SecondOpinion({"y": lambda x, c: came}).measure(torch.randn(6, 1, 2, 2), conditions)
    score = score_samples(observation, conditions)
    assert score.accuracy == pytest.approx(3 / 6)
    assert score.confusion.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]]
    assert score.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)  # 2 hits / (asked + came) of each class
    table = torch.zeros(1, 6, 3)
    table[0, [0, 1, 2, 5]] -= torch.tensor(2.0).log()  # four of weight 1, two of weight 2
    target = score_target(observation, table, conditions)
    assert target.accuracy == pytest.approx((1 + 2 + 1) / 8 / 3)
    torch.testing.assert_close(target.confusion, torch.tensor([1 / 8, 2 / 8, 1 / 8]).expand(3, 3))
    labels = {"target": came, "prior": came, "ctrl": came}
    shares = Nulled.from_labels(labels, 3, table).shares
    torch.testing.assert_close(shares["ctrl"], torch.tensor([1 / 6, 2 / 6, 1 / 6]))
    torch.testing.assert_close(shares["target"], torch.tensor([1 / 8, 2 / 8, 1 / 8]))


def test_what_a_nulled_control_comes_out_as():
    """Two pairs, four samples of the prior weighted by hand; the policy's samples are all of class 1."""
    table = torch.tensor([[[0.0, 0.0], [0.0, -50.0], [-50.0, 0.0], [-50.0, -50.0]]])  # (1, 4, 2)
    measured = {"target": torch.tensor([0, 1, 1, 0]), "prior": torch.tensor([0, 0, 1, 1]), "ctrl": torch.ones(8)}
    found = Nulled.from_labels({kind: y.long() for kind, y in measured.items()}, 2, table)
    # each label's weight is even on two samples, one of either class
    torch.testing.assert_close(found.shares["target"], torch.tensor([0.5, 0.5]))
    # both labels share the samples. M w (hit − ½), averaged over the two, is ∓1, ±½, ±½ and 0: its variance is ½
    torch.testing.assert_close(found.stderr["target"], torch.full((2,), (0.5 / 4) ** 0.5))
    torch.testing.assert_close(found.shares["prior"], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(found.stderr["prior"], torch.zeros(2))  # within a pair all were alike
    torch.testing.assert_close(found.shares["ctrl"], torch.tensor([0.0, 1.0]))
    assert found.stderrs_from("target") == pytest.approx(0.5 / (0.5 / 4) ** 0.5)


def test_pairs_whose_target_is_not_known_are_left_out():
    """Of three labels one is on no sample; the figures are those of the other two, and None where none is known."""
    conditions, features = Conditions({}, {"y": 3}), torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    observation = Observation({"y": torch.arange(40) % 2}, {}, features, torch.ones(40), None)
    table = torch.full((1, 40, 3), -14.0)
    table[0, torch.arange(40), torch.arange(40) % 2] = 0.0
    score = score_target(observation, table, conditions, torch.tensor([[True, True, False]]))
    assert score.accuracy == pytest.approx(1.0, abs=1e-4)
    assert score.diversities.isnan().tolist() == [False, False, True]
    assert score.confusion[2].isnan().all()
    everywhere = score_target(observation, table, conditions)
    assert everywhere.accuracy == pytest.approx(2 / 3, abs=1e-4)
    nothing = score_target(observation, table, conditions, torch.zeros(1, 3, dtype=torch.bool)).metrics()
    assert (
        nothing["accuracy"] is nothing["accuracy_stderr"] is nothing["diversity"] is nothing["class_accuracy"] is None
    )


def test_a_single_sample_of_each_pair_has_the_error_of_all():
    values = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert stratified_error(values, 4) == pytest.approx(float(values.std()) / 2)
    assert stratified_error(values, 2) == pytest.approx((0.5 / 2) ** 0.5 / 2)


def test_a_nulled_share_whose_target_is_not_known_is_none():
    y = {kind: torch.zeros(8, dtype=torch.long) for kind in ("target", "prior", "ctrl")}
    found = Nulled.from_labels(y, 2, torch.zeros(1, 8, 2), torch.zeros(1, 2, dtype=torch.bool)).metrics()
    assert found["shares"]["target"] == found["stderr"]["target"] == [None, None]
    assert found["stderrs_from_target"] is None
    assert found["shares"]["ctrl"] == [1.0, 0.0]


def test_several_controls_are_counted_each_and_all():
    conditions = Conditions({}, {"ink": 2, "slant": 2})  # labels (0,0) (0,1) (1,0) (1,1), two samples each
    ink, slant = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 0, 0, 1, 1])
    judge = SecondOpinion({"ink": lambda x, c: ink, "slant": lambda x, c: slant})
    score = score_samples(judge.measure(torch.zeros(8, 1, 2, 2), conditions), conditions)
    assert score.accuracy_of == {"ink": 6 / 8, "slant": 7 / 8}
    assert score.accuracy == 5 / 8
    assert score.confusion.diagonal().tolist() == [1 / 2, 1 / 2, 1, 1 / 2]
    assert score.judge_accuracy is None
    # the same samples as the prior's, weighted evenly: every label sees all eight
    target = score_target(judge.measure(torch.zeros(8, 1, 2, 2), conditions), torch.zeros(1, 8, 4), conditions)
    assert target.accuracy_of == {"ink": 0.5, "slant": 0.5}
    assert target.accuracy == pytest.approx(0.25)


def test_a_look_at_many_samples_is_a_look_at_each():
    """A few at a time, decoded; every condition's reader and second classifier see their own."""
    x, reader = torch.randn(40, 1, 4, 4), Classifier(1, 2, grid=4).eval().requires_grad_(False)
    decoded = []

    class Doubling(Codec):
        batch = 16

        def decode(self, part):
            decoded.append(len(part))
            return F.interpolate(part, scale_factor=2)

    def outside(x_0, images):
        return (x_0[:, 0, 0, 0] > 0) & (images[:, 0, 1, 1] > 0.5)

    second = Classifier(1, 2).eval().requires_grad_(False)
    judge = SecondOpinion(
        {"y": lambda images, c: (images.mean((1, 2, 3)) > 0).long()}, reader, {"y": second}, outside, Doubling()
    )
    conditions = Conditions({"c": torch.arange(2)}, {"y": 2})
    observation = judge.measure(x, conditions)
    assert decoded == [16, 16, 8]
    images = F.interpolate(x, scale_factor=2)
    assert torch.equal(observation.labels["y"], (images.mean((1, 2, 3)) > 0).long())
    group = torch.arange(2).repeat_interleave(20)
    assert torch.equal(observation.adheres, (reader.log_prob(images).argmax(1) == group).float())
    assert torch.equal(observation.judge_labels["y"], judge.judges["y"].log_prob(images).argmax(1))
    torch.testing.assert_close(observation.features, reader.features(images))
    assert torch.equal(observation.outside, (x[:, 0, 0, 0] > 0.5).float())
    rows = torch.tensor([3, 30])
    assert torch.equal(observation[rows].features, observation.features[rows])
    assert torch.equal(observation[rows].labels["y"], observation.labels["y"][rows])


@pytest.mark.parametrize(("side", "length"), [(32, 32 * 32), (100, 32 * 32), (8, 64)])
def test_pixels_of_large_images_are_averaged_before_they_are_compared(side, length):
    assert SecondOpinion({}).features(torch.ones(2, 1, side, side)).shape == (2, length)
