"""Measure the classifiers' options and the support score on the demos' digits: bench/results/classifiers.json.

Options: the demo's p̂ as it is, balanced, and stopped early, on its own labels and on labels in which the later half of
the classes is thinned to a fifth; measured on digits nothing was fitted on, weighted to the frequencies of the labels.
Support: the shares of real digits, noise, and digits after gradient ascent on log p̂ that lie outside; whom these fool.
"""

from typing import Any

import evidence
import torch
import torch.nn.functional as F
from rich import print_json
from torch import Tensor

from ctrl_diffusion.commands.jobs.demos.digits import SETTINGS, labelled_digits
from ctrl_diffusion.data.labelled import LabelledImages
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel
from ctrl_diffusion.reward.panel import Panel

OPTIONS = {"plain": {}, "balanced": {"balanced": True}, "early_stopping": {"early_stopping": True}}
RARER = 5


def thinned(data: LabelledImages, control: str) -> LabelledImages:
    """Keep one in five of the later half of the classes, but at least ten."""
    y, parts = data.labels[control], []
    for k in range(len(data.values[control])):
        rows = (y == k).nonzero()[:, 0]
        rare = k >= len(data.values[control]) // 2
        parts.append(rows[: max(10, len(rows) // RARER)] if rare else rows)
    return data[torch.cat(parts)]


def figures(panel: Panel, unseen: LabelledImages, like: Tensor) -> dict[str, float]:
    """Return NLL in nats, the mean of p̂ over the rare classes and their share, under the frequencies of y `like`."""
    y, classes = unseen.labels[panel.control], len(panel.values)
    frequency = like.bincount(minlength=classes) / len(like)
    weights = (frequency / (y.bincount(minlength=classes) / len(y)))[y]
    log_prob = panel.log_prob(unseen)
    rare = log_prob.exp()[:, classes // 2 :].sum(1)
    return {
        "nll": float((weights * F.nll_loss(log_prob, y, reduction="none")).mean()),
        "rare_said": float((weights * rare).mean()),
        "rare_is": float(frequency[classes // 2 :].sum()),
    }


def climbed(panel: Panel, x: Tensor, y: Tensor, updates: int = 15) -> Tensor:
    """Return images after gradient ascent on log p̂(y | x): reward hacking without a prior."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(updates):
        optimizer.zero_grad()
        (-panel.classifier.log_prob(x).gather(1, y[:, None])).sum().backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
    return x.detach()


def support(panel: Panel, unseen: LabelledImages) -> dict[str, float]:
    x, y = unseen.x[:300], (unseen.labels[panel.control][:300] + 1) % len(panel.values)
    hacked = climbed(panel, x, y)
    noise = torch.randn(300, *panel.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    kinds = {"real": unseen.x, "noise": noise, "shifted": x.roll(3, -1), "hacked": hacked}
    shares = {f"outside_{name}": float(panel.outside(images).float().mean()) for name, images in kinds.items()}
    for name, p in (("reward", panel.classifier), ("judge", panel.judge)):
        shares[f"hacked_fools_{name}"] = float((p.log_prob(hacked).argmax(1) == y).float().mean())
    return shares


def main() -> None:
    results: dict[str, Any] = {}
    for control in ("ink", "digit"):
        ((data, others),) = labelled_digits(control, 0)
        half = len(others) // 2
        for_judge, unseen = others[range(half)], others[range(half, len(others))]
        for kind, labels in (("as labelled", data), ("imbalanced", thinned(data, control))):
            for name, option in OPTIONS.items():
                settings = ClassifierSettings(**SETTINGS[control]["controls"][0]["classifier"], **option)
                panel, _ = fit_panel(labels, control, ruler=True, settings=settings, judge_data=for_judge)
                results.setdefault(control, {}).setdefault(kind, {})[name] = figures(
                    panel, unseen, labels.labels[control]
                )  # fmt: skip
                if (kind, name) == ("as labelled", "plain"):
                    results[control]["support"] = support(panel, unseen)
        evidence.write("classifiers", results)
    print_json(data=results)


if __name__ == "__main__":
    main()
