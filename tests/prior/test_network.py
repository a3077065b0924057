import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.prior.network import as_denoiser

CASES = [("epsilon", Cosine()), ("sample", Cosine()), ("v_prediction", Cosine())]
CASES += [("flow", RectifiedFlow()), ("epsilon", RectifiedFlow())]


@pytest.mark.parametrize(("kind", "schedule"), CASES)
@pytest.mark.parametrize("t", [0.2, torch.tensor([0.1, 0.5, 0.9])])
def test_every_prediction_of_the_truth_gives_back_x_0(kind, schedule, t):
    x_0, noise = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    alpha, sigma = (a.expand(3).view(3, 1, 1) for a in schedule(t))
    truth = {"epsilon": noise, "sample": x_0, "v_prediction": alpha * noise - sigma * x_0, "flow": noise - x_0}[kind]
    denoiser = as_denoiser(lambda x_t, timestep: truth, schedule, (2, 4), kind)
    torch.testing.assert_close(denoiser(alpha * x_0 + sigma * noise, t), x_0, rtol=0, atol=1e-12)


def test_learned_variance_is_dropped_and_clipping_is_honoured():
    denoiser = as_denoiser(lambda x, timestep: torch.cat([3 * x, x], dim=1), Cosine(), (2, 4))
    x = torch.ones(5, 2, 4)
    assert torch.equal(denoiser(x, 0.5), 3 * x)
    denoiser.clip = 1.0
    assert torch.equal(denoiser(x, 0.5), x)


def test_a_denoiser_stays_in_eval_mode():
    assert not as_denoiser(torch.nn.Dropout(), Cosine(), (2,)).train().training


def test_full_precision_is_that_of_convolutions_and_products_too():
    """TF32, which PyTorch allows to convolutions, rounds as float16 does."""
    units = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [unit.allow_tf32 for unit in units]
    denoiser = as_denoiser(lambda x, timestep: x, Cosine(), (2,))
    denoiser.precision = torch.bfloat16
    for allowed in ([True, False], [True, True]):
        for unit, may in zip(units, allowed, strict=True):
            unit.allow_tf32 = may
        with denoiser.full_precision():
            assert [denoiser.precision, *(unit.allow_tf32 for unit in units)] == [None, False, False]
        assert [denoiser.precision, *(unit.allow_tf32 for unit in units)] == [torch.bfloat16, *allowed]
    for unit, may in zip(units, before, strict=True):
        unit.allow_tf32 = may


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="prediction must be"):
        as_denoiser(lambda x, timestep: x, Cosine(), (2,), "score")(torch.ones(1, 2), 0.5)


@pytest.mark.parametrize("channels", [1, 3, 5, 8])
def test_a_prediction_of_other_channels_is_never_broadcast(channels):
    denoiser = as_denoiser(lambda x, timestep: x[:, :1].repeat(1, channels, 1), Cosine(), (4, 2))
    if channels == 8:  # with a learned variance
        assert denoiser(torch.ones(5, 4, 2), 0.5).shape == (5, 4, 2)
        return
    with pytest.raises(ValueError, match=f"its network predicts {channels} × 2 for 4 × 2: needed is the same"):
        denoiser(torch.ones(5, 4, 2), 0.5)


@pytest.mark.parametrize("shape", [(1, 4, 2), (5, 4, 1), (5, 4), (5, 4, 2, 1)])
def test_a_prediction_of_another_shape_is_never_broadcast(shape):
    denoiser = as_denoiser(lambda x, timestep: torch.ones(shape), Cosine(), (4, 2))
    with pytest.raises(ValueError, match="its network predicts"):
        denoiser(torch.ones(5, 4, 2), 0.5)
