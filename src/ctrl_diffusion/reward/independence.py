"""Measure what two labels say about each other beyond what their p̂ see, on examples that have both.

Adding rewards assumes y₁ ⊥ y₂ | x. Against the product p̂₁(y₁ | x) p̂₂(y₂ | x) stands

    q(y₁, y₂ | x) ∝ p̂₁(y₁ | x) p̂₂(y₂ | x) exp(a[y₁] + b[y₂] + w[y₁, y₂])

fitted to n examples by maximum likelihood; a and b absorb errors of p̂ in the labels' frequencies. What w adds to the
mean log-likelihood is in the limit of many examples at most I(y₁; y₂ | p̂₁, p̂₂), in nats, and 2n times it is
chi-squared with (K₁ − 1)(K₂ − 1) degrees of freedom where there is none (Wilks 1938).

That is no bound of I(y₁; y₂ | x): p̂ sees less than x. Where it sees f(x), labels that x makes independent still share
I(y₁; y₂ | f) ≤ min(H(y₁ | f), H(y₂ | f)) through what f leaves out, and no labels share more than that under any x. So
every amount that can be measured may be p̂'s blindness, and no test of (p̂₁, p̂₂, y₁, y₂) tells it from dependence. The
figure is reported as what it is. Examples that p̂ was fitted on make it smaller: where p̂ is certain nothing is left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Dependence:
    """Hold what the labels say about each other beyond what p̂ sees."""

    nats: float  # the gain per example, less what chance alone is expected to give; at least 0
    p_value: float  # of a gain as large from labels that are independent given what p̂ sees
    rows: int  # examples that have both labels

    @property
    def clear(self) -> bool:
        """Whether it is more than chance."""
        return self.p_value < 1e-3 and self.nats > 0.01


def dependence(log_p: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Dependence:
    """Measure what two labels y (n,) of the same examples share beyond log p̂₁ (n, K₁) and log p̂₂ (n, K₂) in nats."""
    from scipy.stats import chi2

    base = (log_p[0][:, :, None] + log_p[1][:, None, :]).double()  # (n, K₁, K₂)
    n, first, second = base.shape
    cell = y[0] * second + y[1]

    def best(interaction: bool) -> float:
        """Return the maximum of the mean log-likelihood; it is concave, so there is one."""
        shapes = [(first, 1), (1, second), (first, second)][: 3 if interaction else 2]
        parts = [torch.zeros(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
        search = torch.optim.LBFGS(parts, max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            log_q = (base + sum(parts)).flatten(1).log_softmax(1)
            # the parameters have directions that change nothing, and cells without examples would diverge
            value = -log_q.gather(1, cell[:, None]).mean() + 1e-6 * sum(part.square().sum() for part in parts)
            value.backward()
            return value

        search.step(loss)
        return -float(loss().detach())

    with torch.enable_grad():
        gain = max(0.0, best(True) - best(False))
    freedom = (first - 1) * (second - 1)
    return Dependence(max(0.0, gain - freedom / (2 * n)), float(chi2.sf(2 * n * gain, freedom)), n)
