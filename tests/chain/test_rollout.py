import torch

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl


def toy():
    prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64), 0.3, Cosine())
    policy = Policy(prior, SideControl("y", ("a", "b"), prior, width=8).double())
    with torch.no_grad():
        for i, parameter in enumerate(policy.controls["y"].parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return policy, prior.schedule.times(5, 0.1)


def test_kl_and_log_ratio_are_those_of_the_recorded_path():
    policy, times = toy()
    labels = {"y": torch.tensor([0, 1, 0, 1])}
    x_1 = torch.randn(4, 2, dtype=torch.float64)
    path = rollout(policy, x_1, times, generator=torch.Generator().manual_seed(0), compare=True, labels=labels)
    assert path.x.shape == (6, 4, 2)
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        ours, prior = transition(policy, path.x[i], t, s, labels=labels), transition(policy.prior, path.x[i], t, s)
        torch.testing.assert_close(path.kl[i], ours.kl(prior))
        torch.testing.assert_close(path.log_ratio[i], ours.log_prob(path.x[i + 1]) - prior.log_prob(path.x[i + 1]))
    torch.testing.assert_close(path.x_0, policy.prior(path.x[-1], times[-1]))


def test_the_prior_and_the_null_label_walk_the_same_path():
    policy, times = toy()
    x_1 = torch.randn(3, 2, dtype=torch.float64)
    a = rollout(policy.prior, x_1, times, generator=torch.Generator().manual_seed(1))
    b = rollout(
        policy, x_1, times, generator=torch.Generator().manual_seed(1), compare=True, labels={"y": torch.full((3,), -1)}
    )
    assert torch.equal(a.x, b.x)
    assert torch.equal(b.kl, torch.zeros(5, 3, dtype=torch.float64))


def test_a_row_with_a_generator_of_its_own_is_the_same_among_any_others():
    policy, times = toy()
    policy = policy.float()

    def ends(n, batch):
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        return paths(policy, n, times, generators, labels={"y": torch.zeros(n, dtype=torch.long)}, batch=batch).x_0

    whole = ends(7, 3)
    torch.testing.assert_close(ends(2, 8), whole[:2], rtol=0, atol=1e-6)  # products of another batch round differently
    torch.testing.assert_close(ends(7, 8), whole, rtol=0, atol=1e-6)
    assert len(whole.unique(dim=0)) == 7


def test_sampling_in_batches_keeps_every_row_with_its_labels():
    policy, times = toy()
    policy = policy.float()
    y = torch.arange(7) % 2
    seen = []
    x_0, kl, log_ratio = paths(
        policy, 7, times, torch.Generator().manual_seed(0), labels={"y": y}, compare=True, batch=3, progress=seen.append
    )
    assert seen == [3, 3, 1]
    assert x_0.shape == (7, 2)
    # the first batch again by hand, with its own rows of the labels
    generator = torch.Generator().manual_seed(0)
    x_1 = torch.randn(3, 2, generator=generator)
    with torch.no_grad():
        first = rollout(policy, x_1, times, generator=generator, compare=True, labels={"y": y[:3]})
    assert torch.equal(first.x_0, x_0[:3])
    assert torch.equal(first.kl.sum(0), kl[:3])
    # log-ratio and KL have one expectation, so their mean difference is noise of variance 2 KL
    assert float((log_ratio - kl).mean().abs()) < 5 * float((2 * kl.mean() / 7).sqrt())


def test_under_a_gradient_the_same_path_and_the_gradient_of_the_chain():
    """Steps are computed again on the way back, labels set inside: the gradient is that of a chain kept whole."""
    policy, times = toy()
    labels, x_1 = {"y": torch.tensor([0, 1, 0, 1])}, torch.randn(4, 2, dtype=torch.float64)
    table = policy.controls["y"].table.weight
    path = rollout(policy, x_1, times, generator=torch.Generator().manual_seed(2), compare=True, labels=labels)
    (gradient,) = torch.autograd.grad(path.x_0.sum() + path.kl.sum(), table)
    with torch.no_grad():
        again = rollout(policy, x_1, times, generator=torch.Generator().manual_seed(2), compare=True, labels=labels)
    assert torch.equal(path.x.detach(), again.x)
    x_t, kl, generator = x_1, 0.0, torch.Generator().manual_seed(2)
    for t, s in zip(times[:-1], times[1:], strict=True):
        gaussian = transition(policy, x_t, t, s, labels=labels)
        kl = kl + gaussian.kl(transition(policy.prior, x_t, t, s)).sum()
        x_t = gaussian.rsample(torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype))
    (expected,) = torch.autograd.grad(policy.prior(x_t, times[-1]).sum() + kl, table)
    torch.testing.assert_close(gradient, expected)


def test_numbers_kept_from_inference_mode_serve_a_gradient():
    """Those of a chain's times are computed once, by whoever comes first."""
    policy, times = toy()
    x_1, labels = torch.randn(2, 2, dtype=torch.float64), {"y": torch.tensor([0, 1])}
    with torch.inference_mode():
        before = rollout(policy, x_1, times, generator=torch.Generator().manual_seed(0), compare=True, labels=labels)
    path = rollout(policy, x_1, times, generator=torch.Generator().manual_seed(0), compare=True, labels=labels)
    path.kl.sum().backward()
    assert torch.equal(path.x.detach(), before.x)
    assert policy.controls["y"].table.weight.grad.any()


def test_a_path_that_is_not_read_out_is_the_same_path():
    policy, times = toy()
    x_1 = torch.randn(2, 2, dtype=torch.float64)
    with torch.no_grad():
        read, unread = (
            rollout(policy, x_1, times, generator=torch.Generator().manual_seed(0), read=read) for read in (True, False)
        )
    assert unread.x_0 is None
    assert torch.equal(read.x, unread.x)
