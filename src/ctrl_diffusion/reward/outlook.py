"""Predict the label of a path's end from a state on the way, p(y | x_t), from p̂ of x̂.

p̂ itself says too little or too much of a blurred x̂ = E[x_0 | x_t]. A logistic regression on its log-probabilities, one
for each step of the chain, is fitted to the labels of the ends of paths; no network is.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from ..chain.paths import PriorPaths
from ..chain.rows import parts
from ..control.conditions import Conditions
from .reward import Reward

FOLDS, FLOOR = 4, -12.0  # of the cross-validation; of a log-probability that is a feature, in nats
MOST_FITTED = 2000  # paths that a regression is fitted to, at most


def features_of(log_p: Tensor, group: Tensor) -> Tensor:
    """Return what the label is predicted from (n, F): log p̂(y | x̂) (n, K), and the number (n,) of the condition c."""
    return torch.cat([log_p.clamp(min=FLOOR), torch.nn.functional.one_hot(group)[:, 1:]], dim=1).double()


def predicted(features: Tensor, p_end: Tensor, generator: Generator) -> Tensor:
    """Return log-probabilities (n, K) of the label of each path's end, by regressions fitted on other paths.

    Args:
        features: (n, F).
        p_end: (n, K), p̂(y | x_0) at the ends, from which labels are drawn.
        generator: of these draws and of the folds.

    A label that is never drawn on the other paths gets log 1/n, and so do all if only one is.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows, y = features.numpy(), torch.multinomial(p_end, 1, generator=generator).squeeze(1).numpy()
    least = np.log(1 / len(y))
    log_q = np.full(p_end.shape, least)
    fold = torch.randperm(len(y), generator=generator).numpy() % FOLDS
    for k in range(FOLDS):
        rest, part = (fold != k).nonzero()[0][:MOST_FITTED], fold == k
        if len(classes := np.unique(y[rest])) < 2:
            return torch.full(p_end.shape, least, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that has not converged is still a prediction
            fit = LogisticRegression(C=0.3, max_iter=200).fit(rows[rest], y[rest])
        log_q[np.ix_(part, classes)] = fit.predict_log_proba(rows[part])
    return torch.from_numpy(log_q).clamp(min=least)


@torch.no_grad()
def outlook(
    reward: Reward, conditions: Conditions, paths: PriorPaths, log_p_end: Tensor, gammas: Sequence[float]
) -> Tensor:
    """Return the probability of every label at each state of the prior's paths, at each γ: (γ, n, states, K).

    Args:
        reward: at γ = 1.
        conditions: of the paths, and the controls that act.
        paths: of the prior, equally many for each condition in turn.
        log_p_end: (n, K), log p̂ of every label at the ends of the paths.
        gammas: labels of the ends are drawn from p̂^γ, made to sum to one.
    """
    p_end = [(gamma * log_p_end).softmax(1) for gamma in gammas]
    group = conditions.spread(len(log_p_end))
    number_of = torch.zeros_like(group) if conditions.pooled else group  # of many c no weight of its own is fitted
    out = torch.empty(len(gammas), *paths.steps.shape, log_p_end.shape[1], dtype=torch.float32)
    for number in paths.steps.unique().tolist():
        path, column = (paths.steps == number).nonzero(as_tuple=True)
        log_p = log_probabilities(reward, conditions, paths.x_hat[path, column], group[path])
        features = features_of(log_p, number_of[path])
        for i, p in enumerate(p_end):
            log_q = predicted(features, p[path], torch.Generator().manual_seed(0))
            out[i, path, column] = log_q.softmax(1).float()
    return out


def log_probabilities(reward: Reward, conditions: Conditions, x: Tensor, group: Tensor) -> Tensor:
    """Return log p̂ of every class of each control (n, ΣK), of x (n, *) under conditions group (n,)."""
    batches = []
    for rows in parts(len(x), reward.codec.batch):
        views, cond = reward.views(x[rows], list(conditions.controls)), conditions.cond_of(group[rows])
        tables = [reward.table(name, view, cond).log_softmax(1) for name, view in views.items()]
        batches.append(torch.cat(tables, dim=1).cpu())
    return torch.cat(batches)
