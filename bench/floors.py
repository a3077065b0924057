"""What the discretised chain costs, on lattices: docs/floors.png and the numbers behind it, docs/floors.json.

python bench/floors.py

A mixture of three Gaussians on a line and a linear-Gaussian y. Against the number of steps: the floor, log Z − J of the
best policy whose steps are Gaussians with the prior's std, and the gap of the exact conditional denoiser plugged in.
At 50 steps: what less churn costs, and what a start at a finite signal-to-noise ratio costs.
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.progress import track

from ctrl_diffusion.chain.rollout import read_out
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow, Schedule
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.exact.lattice import LatticeChain
from ctrl_diffusion.exact.mixtures import GaussianMixture, LinearGaussian, posterior
from ctrl_diffusion.report.style import CTRL, QUIET, STYLE, headline, save_figure
from ctrl_diffusion.system.files import write_json

DOCS = Path(__file__).parent.parent / "docs"
SCHEDULES: dict[str, Schedule] = {"vp": Cosine(), "flow": RectifiedFlow()}
STEPS = (12, 25, 50, 100, 200)
ETAS = (1.0, 0.7, 0.5, 0.3)
STARTS = (1.0, 0.95, 0.9, 0.8)
LIKELIHOOD = LinearGaussian(torch.ones(1, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64), 0.3)


def prior_of(schedule: Schedule) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[-1.2], [0.2], [1.3]], dtype=torch.float64), 0.4, schedule)


def costs(schedule: Schedule, steps: int, eta: float = 1.0, start: float = 1.0) -> dict[str, float]:
    """Floor and gap of the plugged-in conditional in nats, and how far log Z is from the clean mixture's."""
    prior = prior_of(schedule)
    chain = LatticeChain(prior, schedule.times(steps, 0.03, start, power=2.0), 1.3, 0.4, eta)
    reward, (conditional, clean) = LIKELIHOOD.log_prob(chain.x_0)[:, 0], posterior(prior, LIKELIHOOD, 0)
    log_z = chain.log_z(reward)
    plugged = chain.outcome(list(chain.steps(conditional)), reward)
    return {
        "floor_nats": log_z - chain.outcome(chain.best(reward), reward).objective,
        "plugged_in_nats": log_z - plugged.objective,
        "log_z_nats": log_z,
        "log_z_clean_nats": float(clean),
    }


def without_noise(schedule: Schedule, steps: int) -> dict[str, float]:
    """η = 0: every path is a function of x_1, no step can be controlled, and all of the tilt is lost."""
    prior, times = prior_of(schedule), schedule.times(steps, 0.03, power=2.0)
    x = torch.linspace(-5, 5, 20_001, dtype=torch.float64)[:, None]
    start = (-0.5 * x.square()).squeeze(1).softmax(0)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = transition(prior, x, t, s, 0.0).mean
    reward = LIKELIHOOD.log_prob(read_out(prior, x, times[-1]))[:, 0]
    log_z = float((start.log() + reward).logsumexp(0))
    return {"floor_nats": log_z - float(start @ reward), "log_z_nats": log_z}


def main() -> None:
    found: dict[str, list[dict]] = {"steps": [], "eta": [], "start": []}
    for name, schedule in SCHEDULES.items():
        for steps in track(STEPS, description=f"steps, {name}"):
            found["steps"].append({"schedule": name, "steps": steps, **costs(schedule, steps)})
        for eta in track(ETAS, description=f"churn, {name}"):
            found["eta"].append({"schedule": name, "eta": eta, **costs(schedule, 50, eta=eta)})
        found["eta"].append({"schedule": name, "eta": 0.0, **without_noise(schedule, 50)})
        for start in track(STARTS, description=f"start, {name}"):
            found["start"].append({"schedule": name, "start": start, **costs(schedule, 50, start=start)})
    write_json(DOCS / "floors.json", found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.1), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for name, marker in (("vp", "o"), ("flow", "^")):
            rows = [row for row in found["steps"] if row["schedule"] == name]
            x = [row["steps"] for row in rows]
            for key, colour, label in (
                ("plugged_in_nats", "#c2661c", "exact conditional"),
                ("floor_nats", CTRL, "floor"),
            ):
                left.loglog(x, [row[key] for row in rows], color=colour, marker=marker, markersize=3.5, linewidth=1.2,
                            label=f"{label}, {name}")  # fmt: skip
            for axes, key in ((middle, "eta"), (right, "start")):
                rows = [row for row in found[key] if row["schedule"] == name]
                axes.plot([row[key] for row in rows], [row["floor_nats"] for row in rows], color=CTRL, marker=marker,
                          markersize=3.5, linewidth=1.2, label=name)  # fmt: skip
        left.loglog(STEPS, [1.2 / n for n in STEPS], color=QUIET, linewidth=1, linestyle="--", label="∝ 1/steps")
        left.set(xlabel="steps", ylabel="nats")
        left.set_xticks(STEPS, [str(n) for n in STEPS])
        left.minorticks_off()
        middle.set(xlabel="churn η (50 steps)", yscale="log")
        right.set(xlabel="first time (50 steps)", ylim=(0, None))
        right.invert_xaxis()
        for axes, title in (
            (left, "Gaussian steps"),
            (middle, "Floor with less churn"),
            (right, "Floor with a later start"),
        ):
            axes.legend(frameon=False, fontsize=7)
            headline(axes, title)
    save_figure(DOCS / "floors.png", figure)


if __name__ == "__main__":
    main()
