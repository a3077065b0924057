"""A toy of conditions drawn from a population, with every answer in closed form.

c ~ N(0, I_2), x_0 ~ N(m(c), 1) for the prior, p̂(y | x) a Gaussian or a softmax, and paths of the policy whose log w is
normal, of variance twice the gap.
"""

import math
import warnings
from dataclasses import replace

import numpy as np
import torch

from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.evaluate.certificate import Slope, certify
from ctrl_diffusion.evaluate.clusters import clusters_of
from ctrl_diffusion.evaluate.evaluation import Evaluation
from ctrl_diffusion.evaluate.judge import Observation
from ctrl_diffusion.evaluate.scores import Nulled, score_samples, score_target
from ctrl_diffusion.evaluate.verdict import Gain

LABELS, EACH = 4, 6
PLACES = torch.tensor([-1.0, -0.3, 0.4, 1.2], dtype=torch.float64)  # of y on the line
NODES, WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(60))
KINDS = ["gaussian", "logistic"]


def log_p(kind, x):
    """log p̂(y | x) (…, K); the Gaussian is a likelihood of its value at y, at most 1."""
    if kind == "gaussian":
        return -(x[..., None] - PLACES).square() / 2
    return (0.9 * PLACES * x[..., None]).log_softmax(-1)


def true_log_z(kind, mean):
    """Log E[p̂(y | x)] (G, K) for x ~ N(mean, 1): in closed form, or by 60 nodes of Gauss and Hermite."""
    if kind == "gaussian":  # a product of normals, of variances 1 and 1
        return -(mean[:, None] - PLACES).square() / 4 - math.log(2) / 2
    weights = (WEIGHTS / WEIGHTS.sum()).log()[:, None]
    return (log_p(kind, mean[:, None] + NODES) + weights).logsumexp(1)


class Drawn:
    """Conditions that are drawn anew, samples of the prior for each, and what a policy gives on them."""

    def __init__(self, kind, seed, groups=30, members=100, gap=0.2, names=None):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def coin(share):
            return torch.rand(share.shape, generator=generator, dtype=torch.float64) < share

        self.conditions = Conditions({"c": torch.arange(groups)}, {"y": LABELS}, names=names or {}, drawn=True)
        c = normal(groups, 2)
        self.mean = 0.6 * c[:, 0]
        x = self.mean[:, None] + normal(groups, members)
        self.table = log_p(kind, x).float()
        self.log_z = true_log_z(kind, self.mean)
        self.true_gap = gap * (0.6 * c[:, 1]).exp()[:, None].expand(groups, LABELS)
        spread = (2 * self.true_gap[..., None]).sqrt()
        w = self.log_z[..., None] - self.true_gap[..., None] + spread * normal(groups, LABELS, EACH)
        self.log_w = w.flatten().float()
        self.reward = self.log_w.clamp(max=0)
        # what a step of training brought: more for some c than for others
        self.before = (
            self.log_w - (0.5 + 0.5 * c[:, 1]).repeat_interleave(LABELS * EACH) + 0.3 * normal(len(self.log_w))
        )
        # the ruler agrees with p̂, and the policy is right, on some c more than on others
        likes = c[:, 1].sigmoid()
        drawn_y = torch.multinomial(self.table.exp().flatten(0, 1), 1, generator=generator).view(groups, members)
        noise = torch.randint(LABELS, drawn_y.shape, generator=generator)
        self.prior_y = torch.where(coin(likes[:, None].expand(groups, members)), drawn_y, noise)
        asked = self.conditions.all(EACH) % LABELS
        of_c = likes.repeat_interleave(LABELS * EACH)
        self.policy_y = torch.where(coin(of_c), asked, (asked + 1) % LABELS)
        self.outside = coin(of_c / 2).double()
        self.other = {kind: coin(likes[:, None].expand(groups, n)).long().flatten()
                      for kind, n in (("prior", members), ("target", members), ("ctrl", LABELS * EACH))}  # fmt: skip

    def certify(self, drawn=True):
        arguments = self.table, self.reward, torch.zeros_like(self.reward), self.reward - self.log_w
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return certify(replace(self.conditions, drawn=drawn), *arguments)

    def evaluation(self, drawn=True):
        """The scores of prior, target and policy, and the certificate."""
        conditions, certificate = replace(self.conditions, drawn=drawn), self.certify(drawn)
        clusters, known = clusters_of(conditions), certificate.certified.view(-1, LABELS)
        features = torch.zeros(max(self.prior_y.numel(), len(self.policy_y)), 1)
        prior = Observation({"y": self.prior_y.flatten()}, {}, features[: self.prior_y.numel()], None, None)
        policy = Observation({"y": self.policy_y}, {}, features[: len(self.policy_y)], None, self.outside)
        return Evaluation(
            score_samples(prior, conditions), score_target(prior, self.table, conditions, known),
            score_samples(policy, conditions), certificate, len(self.policy_y),
            nulled={"other": Nulled.from_labels(self.other, 2, self.table, known, clusters)},
            gained=Gain.from_paths(self.log_w, self.before, conditions.pairs, clusters),
            slope=Slope.at(1.0, self.table, self.reward, known, clusters),
        )  # fmt: skip

    def figures(self, drawn=True):
        """Every reported figure with its standard error."""
        found = self.evaluation(drawn)
        certificate, ctrl, target, slope, nulled = (
            found.certificate, found.ctrl, found.target, found.slope, found.nulled["other"],
        )  # fmt: skip
        return {
            "J": (certificate.objective, certificate.objective_stderr),
            "log Z": (certificate.log_z, certificate.log_z_stderr), "gap": (certificate.gap, certificate.stderr),
            "log Z, policy": (certificate.log_z_policy, certificate.log_z_policy_stderr),
            "target": (target.accuracy, target.accuracy_stderr), "accuracy": (ctrl.accuracy, ctrl.accuracy_stderr),
            "one control": (ctrl.accuracy_of["y"], ctrl.stderr_of["y"]), "slope": (slope.log_z, slope.log_z_stderr),
            "log p̂": (slope.log_p, slope.log_p_stderr), "outside": (ctrl.outside_support, ctrl.outside_stderr),
            "gained": tuple(found.gained),
        } | {
            f"nulled, {kind}": (float(nulled.shares[kind][1]), float(nulled.stderr[kind][1])) for kind in self.other
        }  # fmt: skip
