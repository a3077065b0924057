"""Define one clock for every model: t in [0, 1], t = 1 is noise, x_t = α_t x_0 + σ_t ε.

A `Schedule` maps t to (α_t, σ_t). Variance-preserving diffusion and rectified flow are two schedules of one code
path; nothing downstream needs to know which one it has. Coefficients are float64, so that differences such as
σ_t² − (α_t/α_s)² σ_s² keep their digits on fine grids.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Focus = tuple[float, float, float]  # from the noise level, up to the noise level, how many times as many steps


def denser(place: float, begin: float, end: float, density: float) -> float:
    """Return where a place in [0, 1] of an even grid lies when [begin, end] gets `density` times as many points."""
    total = 1 + (density - 1) * (end - begin)
    behind = place * total  # the points' measure: 1 outside the stretch, `density` inside
    if behind <= begin:
        return behind
    inside = min((behind - begin) / density, end - begin)
    return begin + inside + max(0.0, behind - begin - density * (end - begin))


def bisect(late: Callable[[float], bool], low: float, high: float) -> float:
    """Return the first time in [low, high] at which `late` holds; it must not hold before, and hold ever after."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if late(middle) else (middle, high)
    return high


class Schedule(ABC):
    """Map t to (α_t, σ_t)."""

    @abstractmethod
    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return α_t and σ_t, float64, in the shape of t."""

    @abstractmethod
    def timestep(self, t: Tensor | float) -> Tensor:
        """Return the network's input for time t, float64, in the shape of t."""

    def times(
        self, steps: int, sigma_end: float, start: float = 1.0, power: float = 1.0, focus: Focus | None = None
    ) -> tuple[float, ...]:
        """Return a grid start = t_0 > … > t_N, N = steps, uniform in t^(1/power), down to where σ reaches `sigma_end`.

        The chain ends at σ > 0 so that every step has noise and every KL is finite (docs: design, one kernel). A power
        above 1 spends more of the steps near the data, where a control of fine detail needs them. A focus takes steps
        from elsewhere for a stretch of noise levels.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        if power < 1.0:
            raise ValueError(f"power must be at least 1, got {power}. 1 is uniform in t, 2 is finer near the data.")
        if not 0.0 < sigma_end < float(self(start)[1]):
            raise ValueError(f"sigma_end must lie between 0 and the first σ, got {sigma_end}. Try 0.1.")
        high = bisect(lambda t: float(self(self.shifted(t))[1]) >= sigma_end, 0.0, start)
        first, last = start ** (1 / power), high ** (1 / power)
        places: Iterable[float] = (i / steps for i in range(steps + 1))
        if focus is not None:
            begin, end = (self.fraction(sigma, start, high, power) for sigma in focus[1::-1])
            places = (denser(place, begin, end, focus[2]) for place in places)
        even = ((first + (last - first) * place) ** power for place in places)
        grid = tuple(self.snap(self.shifted(t)) for t in even)
        if len(set(grid)) <= steps:
            raise ValueError(
                f"the schedule has fewer than {steps} distinct times above σ = {sigma_end}. Use fewer steps."
            )
        return grid

    def fraction(self, sigma: float, start: float, end: float, power: float) -> float:
        """Return which fraction of the way from start to end, in t^(1/power), lies above a noise level."""
        if not float(self(self.shifted(end))[1]) < sigma < float(self(self.shifted(start))[1]):
            return float(sigma <= float(self(self.shifted(end))[1]))
        t = bisect(lambda t: float(self(self.shifted(t))[1]) >= sigma, end, start)
        first, last = start ** (1 / power), end ** (1 / power)
        return float((first - t ** (1 / power)) / (first - last))

    def latest(self, alpha: float) -> float:
        """Return the time nearest to where α falls to `alpha`; 1 if it never does."""
        if float(self(1.0)[0]) >= alpha:
            return 1.0
        return self.snap(bisect(lambda t: float(self(t)[0]) < alpha, 0.0, 1.0))

    def snap(self, t: float) -> float:
        """Return the nearest time the network was trained on."""
        return t

    def shifted(self, t: float) -> float:
        """Map a time of an even grid to the chain's grid; 0 and 1 stay."""
        return t


class VariancePreserving(Schedule):
    """Interpolate the discrete schedule of diffusers: T decreasing values of ᾱ, entry k at t = (k + 1)/T.

    Between entries ᾱ is linear in t; at entries it is exact. At t = 0 the data are clean.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
        decreasing = bool((alphas_cumprod.diff() < 0).all()) and alphas_cumprod[-1] >= 0 and alphas_cumprod[0] < 1
        if alphas_cumprod.ndim != 1 or not decreasing:
            raise ValueError("alphas_cumprod must be one decreasing row of numbers in [0, 1).")
        self.table = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod])
        self.T = len(alphas_cumprod)

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        position = torch.as_tensor(t, dtype=torch.float64) * self.T
        k = position.floor().long().clamp(0, self.T - 1)
        table = self.table.to(position.device)
        alpha_bar = torch.lerp(table[k], table[k + 1], position - k)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def timestep(self, t: Tensor | float) -> Tensor:
        return (torch.as_tensor(t, dtype=torch.float64) * self.T - 1).clamp(min=0)

    def snap(self, t: float) -> float:
        return max(round(t * self.T), 1) / self.T


class Cosine(Schedule):
    """Set α = cos(πt/2), σ = sin(πt/2): the variance-preserving schedule in closed form, for exact priors."""

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        angle = torch.as_tensor(t, dtype=torch.float64) * (torch.pi / 2)
        return angle.cos(), angle.sin()

    def timestep(self, t: Tensor | float) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64)


class RectifiedFlow(Schedule):
    """Set α = 1 − t, σ = t (Liu et al. 2023; Lipman et al. 2023); the network's input is 1000 t, as in diffusers.

    A `shift` k maps the grid by t ↦ kt/(1 + (k − 1)t): the larger an image, the more steps belong to its noisy times
    (Esser et al. 2024, eq. 23).
    """

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=torch.float64)
        return 1 - t, t

    def timestep(self, t: Tensor | float) -> Tensor:
        return 1000 * torch.as_tensor(t, dtype=torch.float64)

    def shifted(self, t: float) -> float:
        return self.shift * t / (1 + (self.shift - 1) * t)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Shape `value`, () or (B,), to multiply `like` (B, *), in its dtype and on its device."""
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value.to(like)


def coefficients(function: Callable[..., tuple[Tensor, ...]], like: Tensor, *arguments: Hashable) -> list[Tensor]:
    """Return function(*arguments), values of shape () or (B,), each shaped to multiply `like` (B, *).

    Coefficients of times that are numbers are cached: every rollout of a chain needs them again.
    """
    if any(isinstance(argument, Tensor) for argument in arguments):
        return [per_sample(value, like) for value in function(*arguments)]
    return _cached(function, arguments, like.dtype, like.device)


@lru_cache(maxsize=2**12)
def _cached(
    function: Callable[..., Iterable[Tensor]], arguments: tuple[Any, ...], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return coefficients in the device and precision in which they are needed."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a gradient
        return [value.to(device, dtype) for value in function(*arguments)]
