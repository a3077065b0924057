"""Hold p̂ extrapolated to more labels against what they bring: bench/results/labels.json.

python bench/labels.py                   (a minute on a quiet core)

The digit of scikit-learn's images, read from up to 1,590 labels. Power laws are fitted to sizes up to a quarter of them
and extrapolated to a half and to all, where p̂ is measured too, on the same held-out images.
"""

import evidence
import torch

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.evaluate.learning_curve import LearningCurve, learning_curve
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel

LABELS, SEED, DRAWS = 1590, 0, 4
SIZES = (0.05, 0.085, 0.15, 0.25, 0.5, 1.0)
SETTINGS = ClassifierSettings(head="categorical", grid=4, depth=2, updates=300)


def main() -> None:
    """Measure all sizes, extrapolate from the smaller ones, and write both."""
    torch.set_num_threads(1)
    data = labelled_digits("digit", SEED, LABELS)[0][0]
    panel, _ = fit_panel(data, "digit", settings=SETTINGS, seed=SEED)
    whole = learning_curve(data, panel, seed=SEED, draws=DRAWS, sizes=SIZES, say=print)
    few = [row for row in whole.draws if row["labels"] in whole.labels[:-2]]
    law = LearningCurve.from_draws(few, whole.held_out)
    print(law.in_words(), "", whole.in_words(), sep="\n")
    rows = [
        {"labels": n, "figure": name, "mean": series.mean[i], "error": series.error[i]}
        for name, series in whole.series.items() for i, n in enumerate(whole.labels)
    ]  # fmt: skip
    expected = [
        {"labels": n, "figure": name, "expected": each[0], "low": each[1], "high": each[2], "doubt": series.doubt}
        for name, series in law.series.items() for n, each in zip(law.beyond, series.beyond, strict=True)
    ]  # fmt: skip
    about = {"labels": LABELS, "held_out": whole.held_out, "draws": DRAWS, "from": law.labels}
    evidence.write("labels", {**about, "measured": rows, "extrapolated": expected, "fits": whole.draws})


if __name__ == "__main__":
    main()
