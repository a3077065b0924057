import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow, VariancePreserving
from ctrl_diffusion.chain.transition import Gaussian, step, transition
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.prior.network import as_denoiser

STEPS = 20
KINDS = ["epsilon", "sample", "v_prediction"]


def wiggle(x, timestep):
    """A network with no structure to hide behind."""
    return torch.tanh(x.roll(1, -1) + timestep.view(-1, 1, 1, 1) / 1000)


def chain(scheduler, kind, eta, **step_options):
    """Largest difference between our chain and a diffusers scheduler's on the same network and noise, in units of the
    largest value (an ε-model near α = 0 makes values of order 100)."""
    scheduler.set_timesteps(STEPS)
    denoiser = as_denoiser(wiggle, VariancePreserving(scheduler.alphas_cumprod), (1, 4, 4), kind)
    ours = theirs = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for i in range(STEPS - 1):  # diffusers' last step goes to σ = 0, where our chain does not
        k, next_k = scheduler.timesteps[i], scheduler.timesteps[i + 1]
        noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(i + 1))
        gaussian = transition(denoiser, ours, (float(k) + 1) / 1000, (float(next_k) + 1) / 1000, eta)
        ours = gaussian.rsample(noise)
        theirs = step_options["call"](scheduler, wiggle(theirs, k.expand(8).float()), k, theirs, noise, i)
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return worst


def ddim(eta):
    def call(scheduler, prediction, k, x, noise, i):
        return scheduler.step(prediction, k, x, eta=eta, variance_noise=noise if eta else None).prev_sample

    return call


def ddpm(scheduler, prediction, k, x, noise, i):
    # DDPMScheduler draws its own noise: hand it the generator ours was drawn from
    return scheduler.step(prediction, k, x, generator=torch.Generator().manual_seed(i + 1)).prev_sample


# float32 on both sides, coefficients equal up to rounding: 19 steps of a few roundings of 6e-8, amplified at most a
# few times by the network, stay below 1e-5
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_for_step(kind, eta):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="leading")
    assert chain(scheduler, kind, eta, call=ddim(eta)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_fixed_small_step_for_step(kind):
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False, variance_type="fixed_small")
    assert chain(scheduler, kind, 1.0, call=ddpm) < 1e-5


def test_flow_match_euler_step_for_step():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    denoiser = as_denoiser(wiggle, RectifiedFlow(), (1, 4, 4), "flow")
    ours = theirs = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for i in range(STEPS - 1):
        t, s = (float(a) for a in scheduler.sigmas[i : i + 2])
        ours = transition(denoiser, ours, t, s, eta=0.0).mean
        k = scheduler.timesteps[i]
        theirs = scheduler.step(wiggle(theirs, k.expand(8)), k, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_known_data_keep_their_marginals(schedule, eta):
    """When x̂ is the truth, x_s = α_s x_0 + σ_s ε at every time: the mean and the two variances must add up."""
    t, s = 0.7, 0.55
    x_0, noise = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    gaussian = step(schedule, x_0, alpha_t * x_0 + sigma_t * noise, t, s, eta)
    kept = (gaussian.mean - alpha_s * x_0) / noise
    torch.testing.assert_close(kept**2 + gaussian.std**2, (sigma_s**2).expand(4, 3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_eta_one_is_the_posterior_of_the_forward_process(schedule):
    """With x_0 known, ancestral sampling is q(x_s | x_t, x_0), by Bayes from x_t | x_s of the noising process."""
    t, s = 0.7, 0.55
    x_0, x_t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    ratio = alpha_t / alpha_s
    step_variance = sigma_t**2 - ratio**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + ratio**2 / step_variance)
    mean = variance * (alpha_s * x_0 / sigma_s**2 + ratio * x_t / step_variance)
    gaussian = step(schedule, x_0, x_t, t, s, 1.0)
    torch.testing.assert_close(gaussian.mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gaussian.std**2, variance, rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_the_chain_converges_to_the_marginals_at_first_order(schedule):
    """Normal data of std 0.6: x_t has variance 0.36 α² + σ²; the chain's error must halve when its steps double."""
    prior = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), 0.6, schedule)

    def error(steps):
        variance, times = torch.ones((), dtype=torch.float64), schedule.times(steps, 0.1)
        for t, s in zip(times[:-1], times[1:], strict=True):
            gaussian = transition(prior, torch.tensor([[0.0], [1.0]], dtype=torch.float64), t, s)
            variance = (gaussian.mean[1] - gaussian.mean[0]).squeeze() ** 2 * variance + gaussian.std**2
        alpha, sigma = schedule(times[-1])
        return abs(float(variance - (0.36 * alpha**2 + sigma**2)))

    # first order: the ratio is 2 + O(1/N); at N = 200 the next order is below 5 %
    assert error(200) / error(400) == pytest.approx(2.0, rel=0.05)


def test_gaussian_against_torch_distributions():
    mean, other, x = (torch.randn(5, 2, 3, dtype=torch.float64) for _ in range(3))
    std = torch.tensor(0.37, dtype=torch.float64)
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    ours, prior = Gaussian(mean, std), Gaussian(other, std)
    torch.testing.assert_close(ours.log_prob(x), p.log_prob(x).sum((1, 2)))
    torch.testing.assert_close(ours.kl(prior), torch.distributions.kl_divergence(p, q).sum((1, 2)))
    noise = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.rsample(noise), mean + std * noise)


def test_kl_carries_its_gradient():
    mean = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    prior = Gaussian(torch.randn(4, 6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda m: Gaussian(m, prior.std).kl(prior), mean)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta must lie in"):
        step(Cosine(), torch.ones(1, 2), torch.ones(1, 2), 0.5, 0.4, eta)
