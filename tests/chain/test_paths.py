import math

import pytest
import torch

from ctrl_diffusion.chain.paths import default_batch, paths, paths_with_states
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.evaluate.resample import POOL, exact_samples
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.races import energy_test
from ctrl_diffusion.exact.side_control import SideControl


def tilted(schedule, slope):
    """A standard normal under r = slope · x_0; the prior as the policy."""
    prior = GaussianMixture(torch.zeros(1, 1), 1.0, schedule)
    policy = Policy(prior, SideControl("y", ("a", "b"), prior))
    times = schedule.times(10, 0.05)
    return policy, lambda x_0, labels, cond: slope * x_0.squeeze(1) * (labels["y"] == 1), times


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_resampling_by_weight_makes_any_policy_exact(schedule):
    """The prior's chain of a normal is normal: tilted by a slope it is shifted by slope · variance, y by y."""
    policy, reward, times = tilted(schedule, 1.0)
    n = 2000
    y = torch.tensor([0, 1]).repeat(n)
    x_0, share = exact_samples(policy, reward, times, torch.Generator().manual_seed(0), {"y": y})
    before = paths(policy.prior, 20_000, times, torch.Generator().manual_seed(1)).x_0
    variance = float(before.var())
    # a normal tilted by a slope of one: the effective share is exp(−variance), known to a tenth from 32,000 paths
    assert share == pytest.approx(math.exp(-variance), rel=0.1)
    # drawn with replacement from 16 paths a sample: the errors of 2,000 draws and of the pool they come from
    error = math.sqrt(variance / n + variance / (POOL * n * share))
    assert float(x_0[y == 0].mean()) == pytest.approx(0.0, abs=5 * error)
    assert float(x_0[y == 1].mean()) == pytest.approx(variance, abs=5 * error)
    exact = math.sqrt(variance) * torch.randn(n, 1, generator=torch.Generator().manual_seed(2)) + variance
    tilted_x, plain = x_0[y == 1], before[:n]
    assert energy_test(tilted_x, exact, 50)[0] < 0.5 * energy_test(plain, exact, 50)[0]


def test_rows_keep_their_place_and_their_seed():
    policy, reward, times = tilted(Cosine(), 2.0)
    y = torch.tensor([1, 0, 1, -1, 0, 1])
    one, other = (exact_samples(policy, reward, times, torch.Generator().manual_seed(3), {"y": y})[0] for _ in "ab")
    assert torch.equal(one, other)
    assert one.shape == (6, 1)
    assert float(one[y == 1].mean()) > float(one[y == 0].mean())


def test_few_paths_that_count_are_warned_of_and_fewer_refused():
    generator, y = torch.Generator().manual_seed(0), {"y": torch.ones(400, dtype=torch.long)}
    policy, reward, times = tilted(Cosine(), 2.4)  # a share of exp(−2.4² · 0.69) = 2 % of 6,400 paths
    with pytest.warns(RuntimeWarning, match="samples repeat"):
        exact_samples(policy, reward, times, generator, y)
    policy, reward, times = tilted(Cosine(), 30.0)
    with pytest.raises(ValueError, match="too few to draw"):
        exact_samples(policy, reward, times, generator, y)


def test_paths_that_lack_y_are_no_exact_samples_however_even_their_weights():
    policy, _, times = tilted(Cosine(), 1.0)
    y = {"y": torch.ones(10, dtype=torch.long)}

    def reward(x_0, labels, cond):
        return torch.where(x_0.squeeze(1) > 5, 0.0, -14.0)

    with pytest.warns(RuntimeWarning, match=r"only 0\.0 of 1000 paths have y = 1 \(by number\)"):
        _, share = exact_samples(policy, reward, times, torch.Generator().manual_seed(0), y)
    assert share == pytest.approx(1.0), "the effective share does not tell"


def test_paths_with_states_are_the_same_paths():
    """The ends are those of `paths`; a kept state begins its step, as in a rollout of the batch."""
    prior, generator = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5, Cosine()), torch.Generator()
    times, n = prior.schedule.times(6, 0.1), 300
    assert default_batch(prior) < n, "more than one batch"
    steps = torch.rand(n, 6, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :3]
    kept = paths_with_states(prior, steps, times, generator.manual_seed(0))
    assert torch.equal(kept.x_0, paths(prior, n, times, generator.manual_seed(0)).x_0)
    generator.manual_seed(0)
    x_1, *noise = (torch.randn(default_batch(prior), *prior.shape, generator=generator) for _ in times)
    path = rollout(prior, x_1, times, noise=noise)
    for row, column in [(0, 0), (17, 2), (255, 1)]:
        assert torch.equal(kept.states[row, column], path.x[steps[row, column], row])
