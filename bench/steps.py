"""Measure which steps of a run's chain hold the nats a better control could still win.

python bench/steps.py RUN [PATHS]

With the policy's value-to-go V_{i+1} the best control of step i is u*_i = std_i E[a_{i+1} | x_i] (learn/adjoint.py).
From every state of new paths two continuations are drawn, whose adjoints a, a' are independent given x_i, so that

    ½ (u_i − std_i a)·(u_i − std_i a')

has mean ½‖u_i − u*_i‖²: what step i could still win, without the adjoint's noise. The rest of the gap is the floor of
Gaussian steps and what several steps could only win together.
"""

import sys
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ctrl_diffusion.chain.noise import stream
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.transition import half_square, transition
from ctrl_diffusion.learn.adjoint import adjoints_of, reward_gradient
from ctrl_diffusion.run.run import Run


def main() -> None:
    run, n = Run.load(Path(sys.argv[1])), int([*sys.argv, "400"][2])
    policy, times, generator = run.policy, run.times, stream(0, "steps")
    labels, cond = run.conditions.of(run.conditions.draw(n, generator))
    with torch.no_grad():
        path = rollout(
            policy, torch.randn(n, *policy.shape, generator=generator), times, 1.0, generator, cond=cond, labels=labels
        )
    table, total = Table("step", "std", "KL", "still to win", "±", "noise of a"), torch.zeros(4)
    for i, (t, s) in enumerate(pairwise(times)):
        with torch.no_grad():
            step = transition(policy, path.x[i], t, s, labels=labels, **cond)
            u = step.control(transition(policy.prior, path.x[i], t, s, **cond))
        targets = []
        for _ in range(2):
            with torch.no_grad():
                after = rollout(policy, path.x[i], times[i:], 1.0, generator, cond=cond, labels=labels)
            _, gradient = reward_gradient(policy, after, run.reward, labels, cond)
            adjoints, _, _ = adjoints_of(policy, after, gradient, labels, cond, clip=run.config.adjoint.clip)
            targets.append(step.std * adjoints[0])
        first, second = (u - target for target in targets)
        win = 0.5 * (first * second).flatten(1).sum(1)
        row = torch.stack(
            [half_square(u).mean(), win.mean(), win.std() / n**0.5, half_square(targets[0] - targets[1]).mean() / 2]
        )
        total += torch.cat([row[:2], row[2:3].square(), row[3:]])
        table.add_row(str(i), f"{float(step.std.max()):.3f}", *(f"{value:.3f}" for value in row.tolist()))
    total[2] = total[2].sqrt()
    table.add_row("sum", "", *(f"{value:.2f}" for value in total.tolist()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
