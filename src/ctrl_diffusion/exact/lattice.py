"""Compute the chain without samples, for D ≤ 2: densities, log Z, the target, and the best a Gaussian step can do.

Every state x_i of the chain has a lattice of its own, spaced by 0.7 std of the steps into and out of it: a sum of a
Gaussian over such points is its integral to 1e-15 (Poisson summation: 2 exp(−2π²/0.7²)), and tests compare log Z and J
with closed forms. The masses of the prior are pushed forward to p_N; with r the reward of the last state

    log Z = log Σ p_N exp r

and p_N exp(r)/Z is where the tilted chain ends. The best policy whose steps are Gaussians with the prior's std follows
from backward induction,

    V_N = r,          V_i(x) = max_m  E[V_{i+1}(m + std z)] − ½‖(m − mean_pre(x))/std‖²,

and log Z − E[V_0(x_1)] is the floor: no learner of such steps can have a smaller gap.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

import torch
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.rollout import Times, read_out
from ..chain.transition import Gaussian, step, step_std, transition

SPACING = 0.7  # of a lattice, in standard deviations of the step
REACH = 5.0  # of a lattice beyond the radius of the data, in standard deviations


class Lattice:
    """Hold the points of a square lattice of 1 or 2 dimensions around 0 that reaches at least to ±half; float64."""

    def __init__(self, half: float, spacing: float, dim: int) -> None:
        n = math.ceil(half / spacing)
        self.axis, self.spacing, self.dim = spacing * torch.arange(-n, n + 1, dtype=torch.float64), spacing, dim
        self.points = self.axis[:, None] if dim == 1 else torch.cartesian_prod(self.axis, self.axis)  # (P, D)

    def kernels(self, steps: Gaussian) -> list[Tensor]:
        """Return for each axis the masses (B, M) that steps (B, D) put on its points; no mass is lost beyond them."""
        offset = (self.axis - steps.mean.mT[:, :, None]) / steps.std  # (D, B, M)
        return list((-0.5 * offset.square()).softmax(2))

    def expect(self, kernels: list[Tensor], f: Tensor) -> Tensor:
        """Return E[f(x')] (B,) of a function f (P,) after the steps."""
        if self.dim == 1:
            return kernels[0] @ f
        return ((kernels[0] @ f.view(len(self.axis), -1)) * kernels[1]).sum(1)

    def push(self, kernels: list[Tensor], mass: Tensor) -> Tensor:
        """Return the masses (P,) after the steps, from masses (B,) before."""
        if self.dim == 1:
            return mass @ kernels[0]
        return (kernels[0].mT @ (mass[:, None] * kernels[1])).flatten()

    def nearest(self, x: Tensor) -> Tensor:
        """Return the index (B, D) of the point nearest to each x (B, D), on each axis."""
        return ((x - self.axis[0]) / self.spacing).round().long().clamp(0, len(self.axis) - 1)

    def interpolate(self, table: Tensor, x: Tensor) -> Tensor:
        """Interpolate a table (P, D) multilinearly at x (B, D); constant beyond the lattice."""
        n = len(self.axis)
        position = ((x - self.axis[0]) / self.spacing).clamp(0, n - 1)
        low = position.long().clamp(max=n - 2)
        share, table = position - low, table.view(*[n] * self.dim, -1)
        out = torch.zeros_like(x)
        for corner in product((0, 1), repeat=self.dim):
            up = torch.tensor(corner)
            weight = torch.where(up.bool(), share, 1 - share).prod(1, keepdim=True)
            out = out + weight * table[(low + up).unbind(1)]
        return out


@dataclass
class Outcome:
    """Say exactly what a policy does to the chain, in nats."""

    objective: float  # J
    kl_steps: Tensor  # (N,), KL of each step
    true_kl: float  # of the last state's distribution from the target's; the gap is an upper bound of it


class LatticeChain:
    """Compute the chain of a prior of D ≤ 2 dimensions in float64 on lattices, under one row of conditions.

    x_0 lies within `radius` of 0 on any axis, but for a normal error of std `spread`. The spacing is in standard
    deviations of the steps; at 1.2 a sum is an integral to 2e-6, in a third of the points. Eta must be positive.
    """

    def __init__(
        self, prior: Denoiser, times: Times, radius: float, spread: float, eta: float = 1.0,
        cond: dict[str, Tensor] | None = None, spacing: float = SPACING,
    ) -> None:  # fmt: skip
        (dim,) = prior.shape
        if dim > 2:
            raise ValueError(f"a lattice serves 1 or 2 dimensions, got {dim}.")
        self.prior, self.times, self.eta, self.cond = prior, times, eta, cond or {}
        stds = [float(step_std(prior.schedule, t, s, eta)) for t, s in pairwise(times)]
        if min(stds) <= 0:
            raise ValueError(f"every step must have noise; with eta = {eta} the smallest std is {min(stds)}.")
        scales = [1.0, *stds, 1.0]
        self.lattices = []
        for i, t in enumerate(times):
            alpha, sigma = (float(a) for a in prior.schedule(t))
            half = alpha * radius + REACH * math.hypot(alpha * spread, sigma)
            apart = spacing * min(scales[i], scales[i + 1])
            self.lattices.append(Lattice(half if i else max(half, REACH), apart, dim))
        start = (-0.5 * self.lattices[0].points.square().sum(1)).exp()
        self.start = start / start.sum()
        self.x_0 = read_out(prior, self.lattices[-1].points, times[-1], **self._rows(self.lattices[-1]))

    def _rows(self, lattice: Lattice) -> dict[str, Tensor]:
        return {name: row.expand(len(lattice.points), *row.shape[1:]) for name, row in self.cond.items()}

    def steps(self, denoiser: Denoiser, **control: Tensor) -> Iterator[Gaussian]:
        """Yield the steps of a prior or policy from every point of each lattice, in float64; `control` has one row."""
        for lattice, (t, s) in zip(self.lattices, pairwise(self.times), strict=False):
            labels = {name: y.expand(len(lattice.points)) for name, y in control.items()}
            options = {"labels": labels} if labels else {}
            steps = transition(denoiser, lattice.points, t, s, self.eta, **options, **self._rows(lattice))
            yield Gaussian(steps.mean.double(), steps.std.double())

    @cached_property
    def prior_steps(self) -> list[Gaussian]:
        """The prior's steps."""
        return list(self.steps(self.prior))

    @cached_property
    def prior_end(self) -> Tensor:
        """Masses (P,) of the prior's last state."""
        mass = self.start
        for lattice, pre in zip(self.lattices[1:], self.prior_steps, strict=True):
            mass = lattice.push(lattice.kernels(pre), mass)
        return mass

    def log_z(self, reward: Tensor) -> float:
        """Return log Z of a reward (P,) of the last state."""
        return float((self.prior_end.log() + reward).logsumexp(0))

    def log_target(self, reward: Tensor) -> Tensor:
        """Return log-masses (P,) of the last state of the chain tilted by a reward (P,)."""
        return (self.prior_end.log() + reward).log_softmax(0)

    def best(self, reward: Tensor) -> list[Gaussian]:
        """Return the steps of the best policy with the prior's std, for a reward (P,) of the last state."""
        value, backward = reward, []
        for lattice, pre in zip(self.lattices[:0:-1], self.prior_steps[::-1], strict=True):
            best = Gaussian(best_mean(lattice, value, pre), pre.std)
            value = lattice.expect(lattice.kernels(best), value) - best.kl(pre)
            backward.append(best)
        return backward[::-1]

    def plugged_in(self, log_w: Tensor) -> list[Gaussian]:
        """Return the steps of the exact denoiser of a last state x_N that has log-masses (P,), noised from there on.

        With the mean m of p(x_N | x_t) ∝ w p(x_t | x_N), x_t = ρ x_N + √v ε, the score is (ρ m − x_t)/v and, by
        Tweedie's formula, x̂ = (σ_t² m − ρ σ_N² x_t)/(α_N v). Where w is the prior's own density times exp(r) this is
        E[x_0 | x_t, y], the best there is as the steps become small.
        """
        last, dim = self.lattices[-1], self.lattices[-1].dim
        w, steps = (log_w - log_w.max()).exp(), []
        moments = torch.stack([w, *(w * x for x in last.points.unbind(1))]).view(-1, *[len(last.axis)] * dim)
        alpha_end, sigma_end = self.prior.schedule(self.times[-1])
        for lattice, (t, s) in zip(self.lattices, pairwise(self.times), strict=False):
            alpha, sigma = self.prior.schedule(t)
            ratio = (alpha / alpha_end).clamp(min=1e-9)  # at pure noise x_t says nothing: all w count alike
            v = sigma**2 - (ratio * sigma_end) ** 2
            # the points form a square, so the sum factorises: one axis after the other
            kernels = last.kernels(Gaussian(lattice.axis[:, None].expand(-1, dim) / ratio, v.sqrt() / ratio))
            total = moments @ kernels[-1].mT
            if dim == 2:
                total = kernels[0] @ total
            mean = (total[1:] / total[0]).flatten(1).mT  # (P, D)
            x_hat = (sigma**2 * mean - ratio * sigma_end**2 * lattice.points) / (alpha_end * v)
            steps.append(step(self.prior.schedule, x_hat, lattice.points, t, s, self.eta))
        return steps

    def outcome(self, steps: list[Gaussian], reward: Tensor) -> Outcome:
        """Return the outcome of steps from every point of each lattice, for a reward (P,) of the last state."""
        mass, kl = self.start, []
        for lattice, controlled, pre in zip(self.lattices[1:], steps, self.prior_steps, strict=True):
            kl.append(mass @ controlled.kl(pre))
            mass = lattice.push(lattice.kernels(controlled), mass)
        true_kl = (mass * (mass.log() - self.log_target(reward)))[mass > 0].sum()
        return Outcome(float(mass @ reward - sum(kl)), torch.stack(kl), float(true_kl))

    def sample_target(self, reward: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draw n samples (n, D) of the tilted chain's last state, uniform within a cell of the lattice."""
        lattice = self.lattices[-1]
        points = lattice.points[self.log_target(reward).exp().multinomial(n, replacement=True, generator=generator)]
        jitter = torch.rand(points.shape, generator=generator, dtype=torch.float64) - 0.5
        return points + lattice.spacing * jitter


def best_mean(lattice: Lattice, value: Tensor, pre: Gaussian) -> Tensor:
    """Return argmax_m E[value(m + std z)] − ½‖(m − pre.mean)/std‖² (B, D) for a value (P,) on the lattice.

    Candidates are the best lattice point for the prior's mean rounded to the lattice, one axis after the other; a
    Newton step from there; and the prior's mean itself. Any of them is a policy, so J is never overstated and a floor
    computed with it never understated.
    """
    std = float(pre.std)
    size = [len(lattice.axis)] * lattice.dim
    smooth = lattice.expect(lattice.kernels(Gaussian(lattice.points, pre.std)), value).view(size)
    cost = (lattice.axis[:, None] - lattice.axis).square() / (2 * std**2)  # of moving from a point to a point, one axis
    # max over the last axis, then over the first: a distance transform (Felzenszwalb & Huttenlocher 2012)
    worth, choice = (smooth[..., None, :] - cost).max(-1)
    chosen = [choice]
    if lattice.dim == 2:
        _, first = (worth.mT[:, None, :] - cost).max(-1)  # (second, first) → the first axis' best
        first = first.mT
        chosen = [first, choice.gather(0, first)]
    start = lattice.nearest(pre.mean).unbind(1)
    index = torch.stack([axis[start] for axis in chosen], dim=1)  # (B, D)
    slopes, at = torch.gradient(smooth, spacing=lattice.spacing), index.unbind(1)
    slope = torch.stack([g[at] for g in slopes], dim=1)
    hessian = torch.stack(
        [torch.stack([h[at] for h in torch.gradient(g, spacing=lattice.spacing)], dim=1) for g in slopes], dim=1
    )
    point = lattice.axis[index]
    curvature = torch.eye(lattice.dim, dtype=torch.float64) / std**2 - hessian
    move = torch.linalg.lstsq(curvature, (slope - (point - pre.mean) / std**2)[:, :, None]).solution.squeeze(2)
    means = torch.stack([point + move.clamp(-lattice.spacing, lattice.spacing), point, pre.mean])
    candidates = [Gaussian(mean, pre.std) for mean in means]
    worth = torch.stack([lattice.expect(lattice.kernels(steps), value) - steps.kl(pre) for steps in candidates])
    return means.gather(0, worth.argmax(0)[None, :, None].expand(1, *pre.mean.shape)).squeeze(0)


class Tabulated(Denoiser):
    """Interpolate a policy whose steps from every point of a chain's lattices are known: it shifts x̂ at each state."""

    def __init__(self, chain: LatticeChain, steps: list[Gaussian]) -> None:
        super().__init__()
        self.base, self.schedule, self.shape = chain.prior, chain.prior.schedule, chain.prior.shape
        self.tables: dict[float, tuple[Lattice, Tensor]] = {}
        for lattice, after, pre, (t, s) in zip(
            chain.lattices, steps, chain.prior_steps, pairwise(chain.times), strict=False
        ):
            zero = torch.zeros_like(lattice.points[:1])
            weight = step(self.schedule, zero + 1, zero, t, s, chain.eta).mean  # of x̂ in the mean of a step
            self.tables[t] = lattice, (after.mean - pre.mean) / weight

    @property
    def prior(self) -> Denoiser:
        return self.base

    def forward(self, x_t: Tensor, t: float, **cond: Tensor) -> Tensor:
        lattice, shift = self.tables[t]
        return self.base(x_t, t, **cond) + lattice.interpolate(shift, x_t)
