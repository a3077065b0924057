"""Compute what the discretised chain costs, on lattices: floors.png and floors.json (a minute).

python bench/floors.py

The floor is log Z − J of the best policy whose steps are Gaussians with the prior's std: no learner can have a smaller
gap (exact/lattice.py). Two priors on a line:

toy   A mixture of three Gaussians and a linear-Gaussian y. Against the number of steps: the floor, and the gap of the
      exact conditional denoiser plugged in. At 50 steps: what less churn costs, and a start at a finite
      signal-to-noise ratio.
demo  The ink demo. Ink is the mean of 64 pixels, so along the direction that carries it the chain is one-dimensional:
      8 × ink is normal under the chain's own noise, and p̂ is ordinal with cuts 0.004 wide in ink.
"""

import matplotlib
import torch
import torch.nn.functional as F
from evidence import PICTURES, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ctrl_diffusion.chain.rollout import read_out
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow, Schedule
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.data.digits import digits, ink
from ctrl_diffusion.exact.lattice import LatticeChain
from ctrl_diffusion.exact.mixtures import GaussianMixture, LinearGaussian, posterior
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS
from ctrl_diffusion.report.style import CTRL, QUIET, STYLE, headline, save_figure

SCHEDULES: dict[str, Schedule] = {"vp": Cosine(), "flow": RectifiedFlow()}
STEPS = (12, 25, 50, 100, 200)
ETAS = (1.0, 0.7, 0.5, 0.3)
STARTS = (1.0, 0.95, 0.9, 0.8)
LIKELIHOOD = LinearGaussian(torch.ones(1, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64), 0.3)
GRIDS = ((20, 1.0, 0.1), (40, 1.0, 0.1), (20, 2.0, 0.1), (20, 2.0, 0.05), (40, 2.0, 0.05))  # steps, power, last σ
CUT_WIDTH, PIXELS_A_SIDE = 0.004, 8
Row = dict[str, float | str]


def toy_prior(schedule: Schedule) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[-1.2], [0.2], [1.3]], dtype=torch.float64), 0.4, schedule)


def costs(schedule: Schedule, steps: int, eta: float = 1.0, start: float = 1.0) -> Row:
    """Return floor and gap of the plugged-in conditional in nats, and log Z of the chain and of the clean mixture."""
    prior = toy_prior(schedule)
    chain = LatticeChain(prior, schedule.times(steps, 0.03, start, power=2.0), 1.3, 0.4, eta)
    reward, (conditional, clean) = LIKELIHOOD.log_prob(chain.x_0)[:, 0], posterior(prior, LIKELIHOOD, 0)
    log_z = chain.log_z(reward)
    plugged_in = chain.outcome(list(chain.steps(conditional)), reward)
    return {
        "floor_nats": log_z - chain.outcome(chain.best(reward), reward).objective,
        "plugged_in_nats": log_z - plugged_in.objective,
        "log_z_nats": log_z,
        "log_z_clean_nats": float(clean),
    }


def costs_without_noise(schedule: Schedule, steps: int) -> Row:
    """Return the costs at η = 0: every path is a function of x_1, no step can be controlled, and the tilt is lost."""
    prior, times = toy_prior(schedule), schedule.times(steps, 0.03, power=2.0)
    x = torch.linspace(-5, 5, 20_001, dtype=torch.float64)[:, None]
    start = (-0.5 * x.square()).squeeze(1).softmax(0)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = transition(prior, x, t, s, 0.0).mean
    reward = LIKELIHOOD.log_prob(read_out(prior, x, times[-1]))[:, 0]
    log_z = float((start.log() + reward).logsumexp(0))
    return {"floor_nats": log_z - float(start @ reward), "log_z_nats": log_z}


def log_ordinal(score: Tensor, cuts: Tensor, width: float) -> Tensor:
    """Return log p̂(y | x) of an ordinal head (B, K) from scores (B,) and cuts (K − 1,) that are `width` wide."""
    above = (score[:, None] - cuts) / width
    between = F.logsigmoid(above[:, :-1]) + F.logsigmoid(-above[:, 1:])
    between = between + (-torch.expm1(above[:, 1:] - above[:, :-1])).log()
    return torch.cat([F.logsigmoid(-above[:, :1]), between, F.logsigmoid(above[:, -1:])], dim=1)


def demo_costs(steps: int, power: float, last: float) -> Row:
    """Return the ink demo's floor in nats and the accuracy of its best policy, means over the four classes."""
    prior = Prior.from_pretrained(DIGITS).denoiser
    spread = PIXELS_A_SIDE * float((2 * ink(digits()[0])).double().std())
    line = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), spread, prior.schedule)
    chain = LatticeChain(line, prior.times(steps, last, power), 0.0, spread, spacing=0.175)
    cuts = torch.special.ndtri(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)) * spread
    log_p = log_ordinal(chain.x_0[:, 0], cuts, PIXELS_A_SIDE * CUT_WIDTH)
    floors, accuracies = [], []
    for y, reward in enumerate(log_p.unbind(1)):
        policy = chain.best(reward)
        floors.append(chain.log_z(reward) - chain.outcome(policy, reward).objective)
        hits = chain.outcome(policy, (log_p.argmax(1) == y).double())
        accuracies.append(hits.objective + float(hits.kl_steps.sum()))  # the mean of the hits alone
    return {"floor_nats": sum(floors) / len(floors), "accuracy": sum(accuracies) / len(accuracies)}


def tables() -> dict[str, list[Row]]:
    """Return the rows of bench/results/floors.json."""
    rows: dict[str, list[Row]] = {"steps": [], "eta": [], "start": [], "demo": []}
    for name, schedule in SCHEDULES.items():
        for steps in track(STEPS, description=f"steps, {name}"):
            rows["steps"].append({"schedule": name, "steps": steps, **costs(schedule, steps)})
        for eta in track(ETAS, description=f"churn, {name}"):
            rows["eta"].append({"schedule": name, "eta": eta, **costs(schedule, 50, eta=eta)})
        rows["eta"].append({"schedule": name, "eta": 0.0, **costs_without_noise(schedule, 50)})
        for start in track(STARTS, description=f"start, {name}"):
            rows["start"].append({"schedule": name, "start": start, **costs(schedule, 50, start=start)})
    for steps, power, last in track(GRIDS, description="the ink demo"):
        rows["demo"].append({"steps": steps, "power": power, "sigma_end": last, **demo_costs(steps, power, last)})
    return rows


def plot(axes: Axes, rows: list[Row], x: str, y: str, name: str, label: str, colour: str = CTRL) -> None:
    """Draw one figure of a schedule against another."""
    rows = [row for row in rows if row["schedule"] == name]
    axes.plot(
        [row[x] for row in rows], [row[y] for row in rows], color=colour, marker={"vp": "o", "flow": "^"}[name],
        markersize=3.5, linewidth=1.2, label=label,
    )  # fmt: skip


def picture(rows: dict[str, list[Row]]) -> Figure:
    """Draw docs/pictures/floors.png."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.1), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for name in SCHEDULES:
            plot(left, rows["steps"], "steps", "plugged_in_nats", name, f"exact conditional, {name}", "#c2661c")
            plot(left, rows["steps"], "steps", "floor_nats", name, f"floor, {name}")
            plot(middle, rows["eta"], "eta", "floor_nats", name, name)
            plot(right, rows["start"], "start", "floor_nats", name, name)
        left.plot(STEPS, [1.2 / n for n in STEPS], color=QUIET, linewidth=1, linestyle="--", label="∝ 1/steps")
        left.set(xlabel="steps", ylabel="nats", xscale="log", yscale="log")
        left.set_xticks(STEPS, [str(n) for n in STEPS])
        left.minorticks_off()
        middle.set(xlabel="churn η (50 steps)", yscale="log")
        right.set(xlabel="first time (50 steps)", ylim=(0, None))
        right.invert_xaxis()
        titles = {left: "Gaussian steps", middle: "Floor with less churn", right: "Floor with a later start"}
        for axes, title in titles.items():
            axes.legend(frameon=False, fontsize=7)
            headline(axes, title)
    return figure


def main() -> None:
    rows = tables()
    write("floors", rows)
    save_figure(PICTURES / "floors.png", picture(rows))
    table = Table("steps", "power", "last σ", "floor (nats)", "accuracy", title="the ink demo")
    for row in rows["demo"]:
        numbers = (f"{row['floor_nats']:.3f}", f"{row['accuracy']:.3f}")
        table.add_row(*(f"{row[key]:g}" for key in ("steps", "power", "sigma_end")), *numbers)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
