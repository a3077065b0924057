import pytest
import torch
import torch.nn.functional as F

from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.reward.classifiers import ClassifierSettings, open_choices
from ctrl_diffusion.reward.fit import Recipe, fit_classifier
from ctrl_diffusion.reward.heads import HEADS, Head
from ctrl_diffusion.reward.scorer import Architecture, Classifier


class Binomial(Head):
    """y counts K − 1 coins that fall as x says, each a little loaded."""

    name, outputs = "binomial", 1

    def weights(self):
        return {"loading": torch.zeros(())}

    def log_prob(self, score, temperature, loading):
        k, n = torch.arange(self.classes), self.classes - 1
        ways = torch.lgamma(torch.tensor(n + 1.0)) - torch.lgamma(k + 1.0) - torch.lgamma(n - k + 1.0)
        logit = (score + loading) / temperature
        return ways + k * F.logsigmoid(logit) + (n - k) * F.logsigmoid(-logit)


def test_a_head_from_elsewhere_is_one_class_and_one_row(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="must be one of auto, categorical, ordinal"):
        ClassifierSettings(head="binomial")
    monkeypatch.setitem(HEADS, "binomial", Binomial)
    assert ClassifierSettings(head="binomial").head == "binomial"
    tried = {choice.architecture.head for choice in open_choices(ClassifierSettings(), LabelSpace(("a", "b")))}
    assert tried == {"categorical", "binomial"}
    x, y = torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 5
    fitted = fit_classifier(x, y, 5, Architecture("binomial"), Recipe(2))
    torch.testing.assert_close(fitted.log_prob(x).exp().sum(1), torch.ones(30))
    assert float(fitted.state_dict()["loading"]) != 0
    fitted.save(tmp_path)
    assert torch.equal(Classifier.load(tmp_path).log_prob(x), fitted.log_prob(x))


@pytest.mark.parametrize("name", HEADS)
def test_nll_is_that_of_log_prob_where_both_are(name):
    """At the classes, or at the levels of a scale."""
    head = HEADS[name](4)
    score = torch.randn(6, head.outputs or 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 4
    expected = -head.log_prob(score, 0.7, **head.weights()).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(head.nll(score, 0.7, y, **head.weights()), expected)
    torch.testing.assert_close(head.nll(score, 0.7, y, "mean", **head.weights()), expected.mean())
    assert (head.density(score, 0.7) is not None) == head.scale


@pytest.mark.parametrize("name", HEADS)
def test_no_log_probability_exceeds_the_bound_of_its_head(name):
    """Of scores as far out as a network may give; the bound of a density is reached where it is narrowest."""
    head, generator = HEADS[name](4), torch.Generator().manual_seed(0)
    score = 30 * torch.randn(500, head.outputs or 4, generator=generator)
    score[0] = torch.tensor([2.0, -50.0])[: score.shape[1]] if head.scale else score[0]  # as sure of level 2 as may be
    temperature = torch.tensor(0.05)
    log_p = head.log_prob(score, temperature, **head.weights())
    assert float(log_p.max()) <= head.bound + 1e-6
    assert head.bound == 0.0 or float(log_p.max()) == pytest.approx(head.bound, abs=1e-3)
    assert (head.bound > 0) == head.scale
