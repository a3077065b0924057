# %% [markdown]
# # 4. Several controls, one added later
#
# Labels often come from different people: here one table says how heavy a digit's strokes are, another, of other
# images, whether they lean left or right. No image has both labels. A control is learned from each, and the second is
# added when the first is finished.
#
# ## Two tables
#
# Somebody's labels, made from scikit-learn's digits: *ink* from the amount of ink, *slant* from the slope of the
# strokes.

# %%
import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
chosen = np.isin(digits.target, [0, 3])
pixels, digit = digits.images[chosen] / 16, digits.target[chosen]  # (n, 8, 8) in 0 … 1


def slope(image):
    down, right = np.mgrid[:8, :8]
    down, right = (axis - (image * axis).sum() / image.sum() for axis in (down, right))
    return -(image * down * right).sum() / (image * down * down).sum()


def write(folder, rows, column, labels):
    Path(folder).mkdir()
    with open(f"{folder}/metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "digit", column])
        for i, label in zip(rows, labels, strict=True):
            Image.fromarray((255 * pixels[i]).round().astype("uint8")).save(f"{folder}/{i}.png")
            table.writerow([f"{i}.png", digit[i], label])


rows = np.random.default_rng(0).permutation(len(pixels))
ink = np.array([image.mean() for image in pixels])
slant = np.array([slope(image) for image in pixels])
half = len(rows) // 2
write("ink-labels", rows[:half], "ink", np.where(ink > np.median(ink), "heavy", "light")[rows[:half]])
write("slant-labels", rows[half:], "slant", np.where(slant > np.median(slant), "right", "left")[rows[half:]])
print(f"{half} images with ink, {len(rows) - half} others with slant")

# %% [markdown]
# ## The first control
#
# The training is cut short for this page; without the `-o` it takes what it needs.

# %%
# !ctrl train --prior digits --data ink-labels --control ink --condition digit --out runs/ink --quiet \
# !    -o learners=[weighted,adjoint] -o classifier.updates=600 -o classifier.grid=4 -o classifier.depth=1 \
# !    -o weighted.updates=80 -o weighted.renoising=20 -o weighted.cache=400 -o adjoint.updates=60 \
# !    -o adjoint.batch=48 -o evaluation.prior_samples=400 -o evaluation.paths=400 -o evaluation.sweep_paths=20 \
# !    -o evaluation.probes=2

# %% [markdown]
# ## The second, added
#
# `ctrl add` takes a finished run and leaves it as it is. The new run has its control, unchanged, and one more with an
# adapter of its own.

# %%
# !ctrl add runs/ink --data slant-labels --control slant --condition digit --out runs/both --quiet \
# !    -o learners=[weighted,adjoint] -o classifier.updates=600 -o classifier.grid=4 -o classifier.depth=1 \
# !    -o weighted.updates=80 -o weighted.renoising=20 -o weighted.cache=400 -o adjoint.updates=60 \
# !    -o adjoint.batch=48 -o evaluation.prior_samples=400 -o evaluation.paths=400 -o evaluation.sweep_paths=20 \
# !    -o evaluation.probes=2

# %%
import json

controls = json.loads(Path("runs/both/metrics.json").read_text(encoding="utf-8"))["controls"]
for name in ("ink", "slant"):
    control = controls[name]
    print(f"{name:5} asked for alone: {control['alone']['accuracy']:.2f} as asked", end=", ")
    print(f"with the other: {control['accuracy']:.2f} (target {control['target']:.2f})")
print(f"both as asked: {controls['all_accuracy']:.2f} (target {controls['all_target']:.2f})")

# %% [markdown]
# Asked for together, both labels are right in {controls["all_accuracy"]:.0%} of the samples, where a perfect learner
# with these two classifiers has {controls["all_target"]:.0%}.
#
# ## One, the other, both, none
#
# A label that is left out is null, and its control is switched off: what is left is the model of the other, or the
# model itself.

# %% From the same noise, a row each: no label; ink heavy; slant left; both
import torch
from matplotlib import pyplot

from ctrl_diffusion import Run

run = Run.load("runs/both")
c = torch.tensor([0, 3]).repeat(5)
heavy, left = (
    torch.full_like(c, run.panels[name].values.index(value)) for name, value in [("ink", "heavy"), ("slant", "left")]
)
null = torch.full_like(c, -1)

asked = {
    "none": {"ink": null},
    "heavy": {"ink": heavy},
    "left": {"slant": left},
    "heavy, left": {"ink": heavy, "slant": left},
}
figure, axes = pyplot.subplots(4, 10, figsize=(7, 3))
for row, (name, labels) in zip(axes, asked.items(), strict=True):
    x = run.sample(labels, c=c, generator=torch.Generator().manual_seed(0))
    for axis, image in zip(row, x, strict=True):
        axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")

# %% [markdown]
# The old run's own samples are still in there. Without the new label, the new run draws what the old one draws, bit
# for bit:

# %%
old = Run.load("runs/ink").sample(heavy, c=c, generator=torch.Generator().manual_seed(0))
new = run.sample({"ink": heavy}, c=c, generator=torch.Generator().manual_seed(0))
torch.equal(old, new)

# %% [markdown]
# Both controls can also be trained together, from the start: `ctrl train` with `--data` and `--control` given twice.
# When that is right, when labels depend on each other, and what is measured of a label that is left out: [several
# controls](../how-to/controls.md).
#
# Next: [a number on a scale](5-scale.py).
