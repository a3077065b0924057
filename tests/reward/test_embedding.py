"""p̂(y | x, c) where c is one of many prompts, given by its embedding."""

import json
import math

import pytest
import torch

from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.data.labelled import LabelledImages
from ctrl_diffusion.evaluate.judge import SecondOpinion
from ctrl_diffusion.reward.backbone import Backbone
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel, open_choices, unreadable
from ctrl_diffusion.reward.fit import Recipe, fit_classifier, nll_of_other_images
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.reward.reward import Embedded, Reward
from ctrl_diffusion.reward.scorer import Architecture, Classifier, EmbeddedFilm, Scorer

LENGTH, SLOPE = 8, 8.0
DIRECTION = torch.nn.functional.normalize(torch.arange(1.0, LENGTH + 1), dim=0)
SETTINGS = ClassifierSettings(head="categorical", grid=4, depth=1, augment="none", updates=400, conditional=True)


def world(prompts, n, seed):
    """Images that show s, brighter on one side; the log-odds of y are s times a linear feature of the prompt.

    Returns the data, the prompts' embeddings (prompts, LENGTH), and the log-odds. Every prompt occurs equally often.
    """
    generator = torch.Generator().manual_seed(seed)
    table = 5 + 3 * torch.randn(prompts, LENGTH, generator=generator)  # to be standardised
    c, s = torch.arange(n) % prompts, torch.randn(n, generator=generator)
    x = 0.05 * torch.randn(n, 1, 8, 8, generator=generator)
    x[..., :4] += 0.3 * s[:, None, None, None]
    odds = SLOPE * s * (((table - 5) / 3) @ DIRECTION)[c]
    y = (torch.rand(n, generator=generator) < odds.sigmoid()).long()
    values = {"y": ("a", "b"), "c": tuple(f"prompt {i}" for i in range(prompts))}
    return LabelledImages(x, {"y": y, "c": c}, values, vectors={"c": table[c]}), table, odds


@pytest.fixture(scope="module")
def fitted():
    """A panel fitted on 300 prompts, most of them with two labels, and its held-out images."""
    data, table, _ = world(300, 700, 0)
    return *fit_panel(data, "y", "c", settings=SETTINGS, read=False), table


def test_labels_of_prompts_without_any_are_predicted(fitted):
    """Other prompts are other points of the same feature: a number could not know them, x alone is a coin."""
    panel, _, _ = fitted
    new, _, odds = world(500, 2000, 1)
    y, n = new.labels["y"], 2000
    right = panel.log_prob(new).gather(1, y[:, None]).squeeze(1)
    best = torch.nn.functional.logsigmoid(odds * (2 * y - 1))
    # no p̂ of x and c beats the posterior given s and c itself, but for the error of a mean over n labels
    assert float(right.mean()) < float(best.mean()) + 3 * float((right - best).std()) / n**0.5
    # half of what there is to know of y in nats; x alone and guessing know nothing of it: log ½ is their NLL
    assert float(right.mean()) > (float(best.mean()) + math.log(0.5)) / 2
    blind = LabelledImages(new.x, {"y": y}, new.values)
    with pytest.raises(ValueError, match="not clearly better than chance"):
        fit_panel(blind, "y", settings=SETTINGS.model_copy(update={"conditional": False, "updates": 200}))
    said = panel.log_prob(new).diff().squeeze(1)
    accuracy, bayes = (float(((log_odds > 0).long() == y).float().mean()) for log_odds in (said, odds))
    assert 0.5 + 3 * 0.5 / n**0.5 < accuracy < bayes + 3 * 0.5 / n**0.5
    assert panel.judge_accuracy > 0.5 + 3 * 0.5 / 105**0.5, "as the judge's, on the 105 held-out images"


def test_what_the_prompt_alone_says_is_chance(fitted):
    """Where y follows from c, p̂ is right without seeing x: a reward of it has no gradient, so it is refused."""
    # of labels that are even, given c alone, guessing knows log ½ on the 105 held out, within what their entropy is off
    assert fitted[0].quality.chance_nll == pytest.approx(math.log(2), abs=0.02)
    data, table, _ = world(300, 700, 0)
    data.labels["y"] = ((table - 5) @ DIRECTION > 0)[data.labels["c"]].long()
    with pytest.raises(ValueError, match=r"not clearly better than chance .*NLL 0\.[01]\d .* chance 0\.[01]\d"):
        fit_panel(data, "y", "c", settings=SETTINGS, read=False)


def test_the_mean_over_other_images_by_hand():
    """Logits that the image and the prompt add up to: of three images, the mean of p̂ over the other two."""
    scorer = Scorer(torch.nn.Flatten(), 2, 2, embedding=2).requires_grad_(False)
    torch.nn.init.eye_(scorer.score.weight)
    torch.nn.init.zeros_(scorer.score.bias)
    scorer.film.linear.weight.data[2:] = torch.eye(2) * 2**0.5  # the shift; the scale stays
    x, c, y = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.eye(2)[[0, 1, 0]], torch.tensor([0, 1, 1])
    p = torch.stack([(x[(torch.arange(3) + shift) % 3] + c).softmax(1) for shift in (1, 2)]).mean(0)
    expected = -float(p[torch.arange(3), y].log().mean())
    assert nll_of_other_images(scorer, x[:, None, None], y, c) == pytest.approx(expected, rel=1e-5)


def test_what_was_fitted_is_saved(fitted, tmp_path):
    """A prompt's number is nowhere, nor are the embeddings that p̂ was fitted on; their mean and deviation are."""
    panel, held_out, table = fitted
    panel.save(tmp_path)
    again = Panel.load(tmp_path)
    assert torch.equal(again.log_prob(held_out), panel.log_prob(held_out))
    about = json.loads((tmp_path / "classifier.json").read_text(encoding="utf-8"))
    assert (about["shape"]["embedding"], about["shape"]["conditions"], about["condition"]) == (LENGTH, 0, "c")
    assert "embedding" not in Classifier(1, 2, conditions=3).shape, "folders of numbered c stay as they were"
    film = again.classifier.film
    # of 280 rows (0.4 of 700), drawn from these: within four standard errors
    assert float((film.mean - table.mean(0)).abs().max()) < 4 * 3 / 280**0.5
    assert float((film.std - table.std(0)).abs().max()) < 4 * 3 / (2 * 280) ** 0.5
    assert (again.reader, again.reader_accuracy, again.condition_values) == (None, None, ())


def test_reward_and_judge_are_given_the_embedding_of_the_priors_c(fitted):
    """The prior numbers its prompts as it likes, and those of a batch are looked up once each."""
    panel, held_out, table = fitted
    x, y, prompts = held_out.x[:40], held_out.labels["y"][:40], held_out.labels["c"][:40] % 7
    asked = []

    def embed(c):
        asked.append(c.tolist())
        return table[c - 1000]

    reward = Reward({"y": Embedded(panel.classifier, embed)})
    expected = panel.classifier.log_prob(x, table[prompts]).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(reward(x, {"y": y}, {"c": 1000 + prompts}), expected)
    assert asked == [sorted({1000 + c for c in prompts.tolist()})]
    # known to the reader or not: none of these is among the classes that it numbers
    opinion = SecondOpinion({}, judges={"y": Embedded(panel.judge, embed)}, classes=[3, 4])
    conditions = Conditions({"c": torch.tensor([1005, 1002])}, {"y": 2})
    seen = opinion.measure(x, conditions)
    told = table[torch.tensor([5, 2]).repeat_interleave(20)]
    assert torch.equal(seen.judge_labels["y"], panel.judge.log_prob(x, told).argmax(1))
    assert seen.adheres is None


@pytest.mark.parametrize("c", [torch.zeros(3, LENGTH + 1), torch.zeros(3).long()])
def test_another_embedding_is_refused(fitted, c):
    with pytest.raises(ValueError, match=f"c by embeddings of length {LENGTH}, got 3"):
        fitted[0].classifier.log_prob(torch.zeros(3, 1, 8, 8), c)


def test_what_hardly_differs_among_the_prompts_is_not_blown_up():
    """The third dimension is one number in all, but for rounding: another prompt's is no thousand deviations away."""
    film = EmbeddedFilm(3, 2)
    vectors = torch.tensor([[0.0, 4.0, 1.0], [0.0, -4.0, 1.0 + 1e-6], [1.0, 0.0, 1.0]])
    film.standardise(vectors)
    assert film.std.tolist() == pytest.approx([(2 / 9) ** 0.5, (32 / 3) ** 0.5, 0.01 * (32 / 3) ** 0.5])
    film.standardise(vectors[:1])
    assert film.std.tolist() == [1.0, 1.0, 1.0], "of a single prompt nothing is known"
    assert torch.equal(film(vectors), torch.zeros(3, 2)), "an untrained one leaves the features alone"


def test_a_backbones_head_is_given_it_too():
    """On features, here x itself: y turns round with the prompt, so that the features alone are a coin."""
    generator = torch.Generator().manual_seed(0)
    x, vectors = torch.randn(400, 5, generator=generator), torch.randn(400, LENGTH, generator=generator)
    y, options = (x[:, 0] * vectors[:, 0] > 0).long(), {"trunk": torch.nn.Identity(), "embedding": LENGTH}

    def network(shape, classes):
        return Backbone("eyes", shape[0], classes, **options)

    head = fit_classifier(x, y, 2, network, Recipe(30), c=vectors)
    assert head.shape == {
        "backbone": "eyes", "width": 5, "classes": 2, "head": "categorical", "balanced": False, "conditions": 0,
        "embedding": LENGTH,
    }  # fmt: skip
    # four standard errors of a coin's 400 throws
    assert float((head.log_prob(x, vectors).argmax(1) == y).float().mean()) > 0.5 + 4 * 0.5 / 400**0.5


@pytest.mark.parametrize(
    ("prompts", "n", "said"),
    [
        (64, 640, None),
        (64, 639, "c is not read back: 639 images have 64 prompts; adherence is not measured."),
        (65, 6500, "c is not read back: 6500 images have 65 prompts; adherence is not measured."),
        (320, 500, "c is not read back: 500 images have 320 prompts; adherence is not measured."),
    ],
)
def test_too_many_prompts_or_too_few_images_of_each_are_not_read_back(prompts, n, said):
    """Those that occur count, not those that there are."""
    c, names = torch.arange(n) % prompts, tuple(map(str, range(1000)))
    assert unreadable(LabelledImages(torch.zeros(n, 1, 1, 1), {"c": c}, {"c": names}), "c") == said


def test_decays_are_tried_where_embeddings_may_outnumber_labels():
    data, _, _ = world(4, 8, 0)
    numbered, embedded = (open_choices(SETTINGS, data.space("y"), embedded) for embedded in (False, True))
    assert [choice.architecture for choice in numbered] == [Architecture("categorical", 4, 1)]
    assert [choice.weight_decay for choice in embedded] == [1e-3, 1.0]
