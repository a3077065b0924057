"""Measure how noisy the lean and the full adjoint are on a finished run.

Prints the mean of ½‖u − std a‖² over paths, summed over steps, with the clip of its training, and the norms of the
adjoints without a clip.

python bench/adjoints.py runs/demo
"""

import sys

import torch

from ctrl_diffusion import Run
from ctrl_diffusion.chain.noise import stream
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.transition import half_square, step_std, transition
from ctrl_diffusion.commands.app import quiet_dependencies
from ctrl_diffusion.learn.adjoint import adjoints_of, reward_gradient


def main() -> None:
    quiet_dependencies()
    run = Run.load(sys.argv[1])
    policy, times = run.policy, run.times
    labels, cond = run.conditions.of(run.conditions.all(8))
    generator = stream(0, "adjoints")
    x_1 = torch.randn(run.conditions.pairs * 8, *policy.shape, generator=generator)
    with torch.no_grad():
        path = rollout(policy, x_1, times, generator=generator, cond=cond, labels=labels)
    _, gradient = reward_gradient(policy, path, run.reward, labels, cond)
    for lean in (True, False):
        adjoints, means, _ = adjoints_of(policy, path, gradient, labels, cond, clip=run.config.adjoint.clip, lean=lean)
        errors = []
        for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            std = float(step_std(policy.schedule, t, s))
            with torch.no_grad():
                u = (transition(policy, path.x[i], t, s, labels=labels, **cond).mean - means[i]) / std
            errors.append(half_square(u - std * adjoints[i]))
        total = torch.stack(errors).sum(0)
        free, _, _ = adjoints_of(policy, path, gradient, labels, cond, lean=lean)
        norm = free.flatten(2).norm(dim=2)  # (N, B)
        print(
            f"{'lean' if lean else 'full'}: mean {float(total.mean()):.1f} nats, median {float(total.median()):.1f}; "
            f"|a| at the data up to {float(norm[-1].max()):.1f}, anywhere median {float(norm.median()):.1f}, "
            f"up to {float(norm.max()):.0f}"
        )


if __name__ == "__main__":
    main()
