"""Report how a control does on conditions c that no training saw."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..evaluate.certificate import worst_conditions
from ..evaluate.evaluation import Evaluation, generalises
from ..run.folder import RunFolder
from .style import CTRL, QUIET, STYLE, embedded, headline, sheet_figure

BINS = 24


class HeldOut(NamedTuple):
    """Hold what the page says of conditions that no training saw, beside the metrics."""

    line: str  # how their gap compares
    counts: dict[str, int]  # "seen" and "unseen" → how many conditions c
    blank: dict[str, int]  # "seen" and "unseen" → how many of them have no certified pair (c, y)
    labels: int  # K
    worst: list[dict[str, Any]]  # of those never seen the c with the largest gap, as in metrics.json
    pictures: dict[str, str]  # c → samples of it, a PNG in base64

    @classmethod
    def from_evaluation(
        cls, evaluation: Evaluation, folder: RunFolder, worst: Mapping[str, Tensor | Path] | None = None
    ) -> "HeldOut | None":
        """Collect it, None where no condition was held out; write pictures of the `worst` that are not files yet.

        They are, under the names of the conditions c, a PNG or samples (n, C, H, W) in [−1, 1], y in turn.
        """
        if evaluation.held_out is None:
            return None
        certificate = evaluation.held_out.certificate
        breakdowns = {"seen": evaluation.certificate.breakdown, "unseen": certificate.breakdown}
        rows = certificate.breakdown.metrics()["conditions"]
        return cls(
            line=generalises(evaluation),
            counts={kind: len(each.conditions) for kind, each in breakdowns.items()},
            blank={kind: int((~each.certified.any(1)).sum()) for kind, each in breakdowns.items()},
            labels=len(certificate.breakdown.labels),
            worst=[rows[group] for group in worst_conditions(certificate)],
            pictures={
                name: picture_of(image, folder.picture(f"worst-{i}"))
                for i, (name, image) in enumerate((worst or {}).items())
            },
        )


def picture_of(image: Tensor | Path, path: Path) -> str:
    """Return a PNG in base64, of samples after they were drawn at a path."""
    if isinstance(image, Path):
        return base64.b64encode(image.read_bytes()).decode()
    return embedded(path, sheet_figure(image, columns=min(8, len(image))))


def gaps_figure(evaluation: Evaluation) -> Figure:
    """Plot the gaps of the conditions trained on and of those no training saw, as shares of either, with means."""
    series = {"c it was trained on": (evaluation.certificate, QUIET)}
    series["c it never saw"] = evaluation.held_out.certificate, CTRL
    gaps = {name: certificate.breakdown.condition_gap for name, (certificate, _) in series.items()}
    gaps = {name: gap[~gap.isnan()].numpy() for name, gap in gaps.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(gaps.values())), BINS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.subplots()
        for name, gap in gaps.items():
            certificate, colour = series[name]
            if len(gap) == 0:
                continue
            style = {"histtype": "stepfilled"} if colour == QUIET else {"histtype": "step", "linewidth": 1.6}
            style |= {"color": colour, "label": f"{name} ({len(gap)}); dashed: mean over (c, y)"}
            axes.hist(gap, edges, weights=np.full(len(gap), 1 / len(gap)), **style)
            axes.axvline(certificate.gap, color="#777" if colour == QUIET else colour, linewidth=1.2, linestyle="--")
        axes.set(xlabel="gap of a condition c (nats)", ylabel="share of the c", xlim=(edges[0], edges[-1]))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        headline(axes, "Gap by condition")
    return figure
