import math

import pytest
import torch

from ctrl_diffusion.reward.independence import dependence

KNOWN = torch.tensor([[0.4, 0.1], [0.1, 0.4]])  # p(y1, y2 | x) whatever x is: both even, far from independent
NATS = float((KNOWN * (KNOWN / 0.25).log()).sum())


def examples(joint, n, seed):
    """Labels of one distribution for every x, and what marginal classifiers say of them."""
    generator = torch.Generator().manual_seed(seed)
    cell = joint.flatten().multinomial(n, replacement=True, generator=generator)
    y = cell // joint.shape[1], cell % joint.shape[1]
    return tuple(joint.sum(1 - k).log().expand(n, -1) for k in (0, 1)), y


def test_the_information_two_labels_share_is_found():
    found = dependence(*examples(KNOWN, 4000, 0))
    # the gain is a mean of log-ratios: its spread from its own values
    ratio = (KNOWN / 0.25).log()
    stderr = float(((KNOWN * ratio.square()).sum() - NATS**2) ** 0.5) / 4000**0.5
    assert found.nats == pytest.approx(NATS, abs=4 * stderr)
    assert found.clear
    assert found.rows == 4000


def test_independent_labels_give_p_values_as_even_as_they_should_be():
    joint = torch.tensor([0.2, 0.5, 0.3])[:, None] * torch.tensor([0.6, 0.4])
    p = torch.tensor([dependence(*examples(joint, 500, seed)).p_value for seed in range(60)])
    # the largest distance of 60 even values from evenness is over 0.24 once in a thousand times (Kolmogorov)
    distance = (p.sort().values - (torch.arange(60) + 0.5) / 60).abs().max()
    assert distance < 0.24
    assert not any(dependence(*examples(joint, 500, seed)).clear for seed in range(5))


def test_labels_that_follow_x_are_independent_given_x():
    """Both go with x and so with each other; x explains it, unless it is withheld."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator)
    log_p = torch.nn.functional.logsigmoid(torch.stack([-3 * x, 3 * x], dim=1))
    y = tuple((torch.rand(2000, generator=generator) < torch.sigmoid(3 * x)).long() for _ in range(2))
    assert not dependence((log_p, log_p), y).clear
    blind = torch.full((2000, 2), math.log(0.5))
    assert dependence((blind, blind), y).clear


@pytest.mark.parametrize("blur", [0.3, 1.0])
def test_a_blurred_classifier_leaves_something_to_say_whatever_x_decides(blur):
    """Labels that x decides, so that they share nothing once it is known, beside p̂ that see x through noise.

    It is found, and lies below the entropy p̂ leaves, as whatever labels share must: no dependence is proven by it.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator)
    seen = x + blur * torch.randn(4000, generator=generator)
    # of x given what is seen, normal with mean seen/(1 + blur²)
    above = torch.special.ndtr(seen / (1 + blur**2) / (blur**2 / (1 + blur**2)) ** 0.5).clamp(1e-6, 1 - 1e-6)
    log_p = torch.stack([1 - above, above], dim=1).log()
    y = (x > 0).long()
    accuracy = float((log_p.argmax(1) == y).float().mean())
    assert 0.71 < accuracy < 0.93
    found = dependence((log_p, log_p), (y, y))
    left = -float(log_p.gather(1, y[:, None]).mean())
    assert found.clear
    # the labels are one, so that they share all of that; the cells' table fits it but in part
    assert 0.3 * left < found.nats < 1.05 * left


def test_frequencies_p_has_wrong_are_no_dependence():
    joint = torch.tensor([0.8, 0.2])[:, None] * torch.tensor([0.7, 0.3])
    _, y = examples(joint, 2000, 1)
    even = torch.full((2000, 2), math.log(0.5))
    assert not dependence((even, even), y).clear
