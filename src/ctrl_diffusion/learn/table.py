"""Name the learners: what settings, stages and reports call each of them."""

from difflib import get_close_matches

from .adjoint import Adjoint
from .backprop import Backprop
from .contrast import Contrast
from .ppo import PPO
from .step import Learner
from .weighted import Weighted

# another package may add a row
LEARNERS: dict[str, type[Learner]] = {
    "contrast": Contrast, "weighted": Weighted, "adjoint": Adjoint, "backprop": Backprop, "ppo": PPO,
}  # fmt: skip


def check_learners(names: list[str]) -> list[str]:
    """Return the names; raise ValueError, with the nearest name, for one that no learner has."""
    for name in names:
        if name not in LEARNERS:
            near = "".join(f" Did you mean {match}?" for match in get_close_matches(name, LEARNERS, 1))
            raise ValueError(f"no learner is called {name!r}.{near} There are {', '.join(LEARNERS)}")
    return names
