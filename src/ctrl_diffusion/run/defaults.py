"""Choose settings: for a prior and its data, and for a smoke test."""

import math
from typing import Any

from ..learn.adjoint import Adjoint
from ..learn.table import LEARNERS
from .config import Config

MEMBERS = 25  # prior samples for each label, of a condition of a population
LIMIT = 4  # times the updates of a first learner that follows its probes
SHORT = 20  # times as many updates as in a smoke test
MOST_NUMBERS = 2**28  # that the states of the prior's paths are kept as, of four bytes each


def suggested(
    shape: tuple[int, ...], parameters: int, rank: int, groups: int, classes: int, pooled: bool = False
) -> dict[str, Any]:
    """Return the settings that depend on prior (x of `shape`) and data; all others keep the defaults of `Config`.

    Every (c, y), of `groups` conditions and `classes` labels, needs some hundred samples of the prior of its own. What
    there is to learn grows with the pairs (c, y); the time of an update with batch × dimensions, its memory with
    micro-batch × dimensions; the noise of an update with the size of the network and, for adjoints, with 1 / √batch,
    which the learning rate follows. Where x has many dimensions y is decided within a short stretch of the chain, which
    needs more steps. Conditions that are `pooled` share the samples learners learn from.
    """
    dimensions, pairs = math.prod(shape), groups * classes
    batch = min(160, max(16, 20_000 // dimensions // 8 * 8))
    members = max(100, min(10_000 // groups, max(1000, 300 * classes)))  # prior samples of a condition
    drawn = members * groups
    cache = drawn if pooled else members  # of a population they are one pool
    warm = max(min(700, 400 + 20 * pairs), min(2000, 150 * classes))
    told_apart = classes * (classes - 1) // 2  # pairs of labels; ten classes were still learning after 1,500 updates
    contrasts = min(4000, max(min(700, 400 + 20 * pairs), 66 * told_apart))
    certified = max(members, MEMBERS * classes) if pooled else members  # few of each, but some of every y
    visited = LIMIT * contrasts * min(64, max(32, batch))  # states at most that updates learn from
    states = max(1, min(40, MOST_NUMBERS // (2 * drawn * dimensions), math.ceil(visited / drawn)))
    lr = {} if parameters < 5_000_000 else {"lr_adapter": 3e-4}
    full = Adjoint.Settings()
    share = (batch / full.batch) ** 0.5
    adjoint_lr = {name: float(f"{share * getattr(full, name):.2g}") for name in ("lr_embedding", "lr_adapter")}
    return {
        "steps": 20 if dimensions <= 256 else 40,
        "focus": "auto",
        "decay": "probes",
        "rank": rank,
        "micro_batch": None if dimensions <= 4096 and parameters < 1e8 else max(1, 2**15 // dimensions),
        "contrast": {
            "updates": contrasts,
            "batch": min(64, max(32, batch)),
            "cache": cache,
            "states": states,
            **lr,
        },
        "weighted": {
            "updates": warm,
            "batch": min(128, 2 * batch),
            "cache": cache,
            "renoising": warm // 4,
            **lr,
        },
        "adjoint": {"updates": min(800, 100 + 18 * pairs), "batch": batch, **adjoint_lr, **lr},
        "backprop": {"updates": min(200, 60 + 4 * pairs), "batch": min(64, batch), **lr},
        "ppo": {"updates": min(800, 160 + 16 * pairs), "batch": batch, **({"lr_adapter": 1.5e-4} if lr else {})},
        "evaluation": {"prior_samples": certified, "paths": min(2000, max(600, 50 * pairs)), "sweep_paths": 200},
    }


def limited(defaults: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return default settings with the updates of the config's first learner as a limit, where it follows its probes.

    How many it needs is not known beforehand.
    """
    first = config.learners[0]
    if not config.follows_probes or first not in defaults:
        return defaults
    return {**defaults, first: {**defaults[first], "updates": LIMIT * defaults[first]["updates"]}}


def quick(config: Config) -> Config:
    """Return the settings of a smoke test: a twentieth of the training, a quarter of p̂'s, fewer samples."""
    controls = [
        c if c.classifier_from or c.settled_from
        else c.with_(classifier={"updates": max(1, c.classifier.updates // 4)})
        for c in config.controls
    ]  # fmt: skip
    first = config.learners[0] if config.follows_probes else None
    shares = {name: SHORT * (LIMIT if name == first else 1) for name in LEARNERS}
    learners = {name: {"updates": max(1, getattr(config, name).updates // share)} for name, share in shares.items()}
    learners["contrast"] |= {"cache": max(1, config.contrast.cache // 10)}
    learners["weighted"] |= {
        "renoising": config.weighted.renoising // SHORT, "cache": max(1, config.weighted.cache // 10),
    }  # fmt: skip
    evaluation = {"prior_samples": 200, "paths": 160, "probes": 2, "sweep_paths": 40}
    return config.with_(controls=[control.model_dump() for control in controls], **learners, evaluation=evaluation)
