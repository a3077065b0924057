"""Test whether two labels are independent given x, on examples that have both: adding their rewards assumes it.

If y₁ ⊥ y₂ | x then p(y₁, y₂ | x) = p̂₁(y₁ | x) p̂₂(y₂ | x). Against that product stands

    q(y₁, y₂ | x) ∝ p̂₁(y₁ | x) p̂₂(y₂ | x) exp(a[y₁] + b[y₂] + w[y₁, y₂])

fitted to n examples by maximum likelihood; a and b absorb errors of p̂ in the labels' frequencies. What w adds to the
mean log-likelihood is, in the limit of many examples, a lower bound of the conditional mutual information I(y₁; y₂ | x)
in nats, and 2n times it is chi-squared with (K₁ − 1)(K₂ − 1) degrees of freedom if there is none (Wilks 1938). Examples
that p̂ was fitted on only make the test weaker: where p̂ is certain nothing is left to share.
"""

from dataclasses import dataclass

import torch
from scipy.stats import chi2
from torch import Tensor


@dataclass
class Dependence:
    """Hold what the labels still say about each other given x."""

    nats: float  # the gain per example, less what chance alone is expected to give; at least 0
    p_value: float  # of a gain as large from independent labels
    rows: int  # examples that have both labels

    @property
    def doubtful(self) -> bool:
        return self.p_value < 1e-3 and self.nats > 0.01


def dependence(log_p: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Dependence:
    """Test two labels y (n,) of the same examples against log p̂₁ (n, K₁) and log p̂₂ (n, K₂) in nats."""
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
