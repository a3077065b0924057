import pytest
import torch

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.exact.lattice import LatticeChain
from ctrl_diffusion.exact.mixtures import GaussianMixture, Logistic
from ctrl_diffusion.exact.races import energy_test
from ctrl_diffusion.exact.task import Answers, Task
from ctrl_diffusion.guide.particles import TDS, FeynmanKac
from ctrl_diffusion.guide.selection import Importance, systematic
from ctrl_diffusion.reward.reward import Reward

DOUBLE = torch.float64
SAMPLERS = {
    "TDS": TDS(particles=1, batch=1024),
    "TDS, never resampled": TDS(particles=1, batch=1024, spread=0.0),
    "Feynman-Kac": FeynmanKac(particles=1, batch=1024),
    "Feynman-Kac, max": FeynmanKac(particles=1, batch=1024, potential="max"),
    "importance": Importance(particles=1, batch=1024),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_many_particles_converge_to_the_chains_target(schedule, name):
    """Of R runs the mean of x_0 has the error of one run over √R; a run's error falls like 1/√particles.

    The reward is mild: where it is steep, weights of TDS are so heavy-tailed that no error estimate means anything
    (docs/why/baselines.md).
    """
    prior = GaussianMixture(torch.tensor([[-1.0], [0.8]], dtype=DOUBLE), 0.4, schedule)
    likelihood, times, w = Logistic(torch.ones(1, dtype=DOUBLE), steepness=1.0), schedule.times(8, 0.1), 1.5
    chain = LatticeChain(prior, times, radius=1.0, spread=0.4)
    target = chain.log_target(w * likelihood.log_prob(chain.x_0)[:, 1]).exp()
    exact = float(target @ chain.x_0[:, 0])
    generator, runs, rms = torch.Generator().manual_seed(0), 40, []
    for particles in (64, 1024):
        labels = {"y": torch.ones(particles, dtype=torch.long)}
        found = [
            SAMPLERS[name](prior, Reward({"y": likelihood}), labels, None, times, generator, w).x_0.mean()
            for _ in range(runs)
        ]
        errors = torch.stack(found) - exact
        rms.append(float(errors.square().mean().sqrt()))
        # the bias of self-normalised weights is of the order of the variance, rms² in units where x_0 is of order one
        assert abs(float(errors.mean())) < 5 * rms[-1] / runs**0.5 + 2 * rms[-1] ** 2
    # each rms is known to 1/√(2 R) = 11 %, their ratio to 16 %; 1/particles would be 16, nothing 1
    assert rms[0] / rms[1] == pytest.approx(4.0, rel=3 * 0.16)


@pytest.mark.parametrize("name", ["TDS", "Feynman-Kac"])
def test_the_rewards_of_two_controls_add(name):
    task = Task("vp", "two controls")
    answers, pair, n = Answers(task), task.conditions.pairs - 1, 600
    chain, reward = answers.of(pair)
    labels, cond = task.conditions.of(torch.full((n,), pair))
    generator = torch.Generator().manual_seed(0)
    method = type(SAMPLERS[name])(particles=4)
    found = method(task.prior(), task.reward(), labels, cond, task.times, generator).x_0
    ends = chain.sample_target(reward, n, generator)
    exact = chain.prior(ends, task.times[-1], **{key: row.expand(n) for key, row in chain.cond.items()})
    # one in a hundred would be below 0.01 by chance; the prior's own samples are
    assert energy_test(found, exact, 200, generator)[1] > 0.01
    plain = method(task.prior(), task.reward(), labels, cond, task.times, generator, strength=0.0).x_0
    assert energy_test(plain, exact, 200, generator)[1] < 0.01


def test_resampling_is_even():
    log_w = torch.tensor([0.1, 0.4, 0.0, 0.5]).log()
    for seed in range(20):
        count = systematic(log_w, 1000, torch.Generator().manual_seed(seed)).bincount(minlength=4)
        assert (count - torch.tensor([100, 400, 0, 500])).abs().max() <= 1
        assert count[2] == 0
    assert torch.equal(systematic(torch.zeros(7), 7, torch.Generator().manual_seed(1)), torch.arange(7))


def test_populations_that_go_together_are_resampled_each_by_itself():
    log_w = torch.tensor([[0.1, 0.4, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0]]).log()
    for row, share in zip(systematic(log_w, 1000, torch.Generator().manual_seed(0)), log_w.exp(), strict=True):
        assert (row.bincount(minlength=4) - 1000 * share).abs().max() <= 1


@pytest.mark.parametrize("name", ["Feynman-Kac", "importance"])
def test_a_particle_of_its_own_is_a_sample_of_the_prior(name):
    """One has nobody to be chosen from, whatever it earns; of a shared population some would be drawn twice."""
    prior = GaussianMixture(torch.tensor([[-1.0], [0.8]]), 0.4, Cosine())
    labels, times = {"y": torch.ones(500, dtype=torch.long)}, Cosine().times(6, 0.1)
    plain = paths(prior, 500, times, torch.Generator().manual_seed(0), batch=1024).x_0
    for shared in (False, True):
        method = type(SAMPLERS[name])(particles=1, batch=1024, shared=shared)
        reward = Reward({"y": Logistic(torch.ones(1))})
        found = method(prior, reward, labels, None, times, torch.Generator().manual_seed(0)).x_0
        assert torch.equal(found, plain) != shared


def test_steps_without_noise_are_refused():
    with pytest.raises(ValueError, match="noise in every step"):
        TDS(eta=0.0)
