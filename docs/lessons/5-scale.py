# %% [markdown]
# # 5. A number on a scale
#
# A label may be an amount: an age, a porosity, a dose. Then y is asked for by value, and any value in the range of the
# labels will do.
#
# ## Labels that are numbers
#
# Five hundred of scikit-learn's digits, and of each how much of the paper is inked, from 0 to 1:

# %%
import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
Path("photos").mkdir()
with open("photos/metadata.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["file_name", "digit", "amount"])
    for i in np.random.default_rng(0).permutation(len(digits.images))[:500]:
        pixels = digits.images[i] / 16
        Image.fromarray((255 * pixels).round().astype("uint8")).save(f"photos/{i}.png")
        table.writerow([f"{i}.png", digits.target[i], f"{pixels.mean():.4f}"])
print(*Path("photos/metadata.csv").read_text(encoding="utf-8").splitlines()[:4], sep="\n")

# %% [markdown]
# A column of more than 64 different numbers is taken for a scale; `-o kind=scale` says so of one with fewer.
#
# ## Train
#
# Two of the digits and a short training, for this page:

# %%
# !ctrl train --prior digits --data photos --control amount --condition digit --out runs/amount --quiet \
# !    -o classes=[0,3] -o learners=[weighted,adjoint] -o classifier.updates=1000 -o classifier.grid=1 \
# !    -o classifier.depth=1 -o weighted.updates=120 -o weighted.renoising=30 -o weighted.cache=600 \
# !    -o adjoint.updates=80 -o adjoint.batch=48 -o evaluation.prior_samples=600 -o evaluation.paths=400 \
# !    -o evaluation.sweep_paths=20 -o evaluation.probes=2

# %% [markdown]
# ## Ask for amounts
#
# On the command line the value is given as the label is written:

# %%
# !ctrl sample runs/amount --set amount=0.31 --class 3 -n 8 --out threes

# %% [markdown]
# From Python, values become *places* on the scale. Here 200 amounts, evenly spaced over it, are asked for, and
# measured in what was drawn:

# %% The amount that was asked for, and that in the drawing
import torch
from matplotlib import pyplot

from ctrl_diffusion import Run

run = Run.load("runs/amount")
space = run.panels["amount"].space
low, high = space.ends
asked = torch.linspace(low, high, 200)
c = torch.tensor([0, 3]).repeat(100)
x = run.sample(y=space.places(asked), c=c, generator=torch.Generator().manual_seed(0))  # (200, 1, 8, 8) in [−1, 1]
measured = ((x.clamp(-1, 1) + 1) / 2).mean((1, 2, 3))
r2 = 1 - float((measured - asked).square().mean() / asked.var(correction=0))

figure, axis = pyplot.subplots(figsize=(4, 4))
axis.scatter(asked, measured, s=8)
axis.plot([low, high], [low, high], color="gray")
axis.set_xlabel("asked for")
axis.set_ylabel("measured")
axis.grid(visible=True)

# %% [markdown]
# The scale goes from {low:.2f} to {high:.2f}, the central 90 % of the labels; beyond that there is nothing to learn
# from. What was asked for explains R² = {r2:.2f} of what was drawn. With the whole training on all ten digits it is
# [nearly all](../how-to/data.md#labels).
#
# A slider of one digit, from the same noise:

# %% A three with ever more ink
amounts = torch.linspace(low, high, 9)
noise = torch.Generator()
row = [
    run.sample(y=space.places(value[None]), c=torch.tensor([3]), generator=noise.manual_seed(0)) for value in amounts
]
figure, axes = pyplot.subplots(1, 9, figsize=(7, 1))
for axis, value, image in zip(axes, amounts, row, strict=True):
    axis.imshow(image[0, 0], cmap="gray", vmin=-1, vmax=1)
    axis.set_title(f"{value:.2f}", fontsize=8)
    axis.axis("off")

# %% [markdown]
# The slider reads in the label's own units: where {asked[100]:.2f} is asked for, {measured[90:110].mean():.2f} is
# drawn on average. The scatter of the plot above is p̂'s, in part: a classifier that cannot tell two amounts apart
# does not ask for the difference.
#
# What certifies it: nine levels divide the scale, and the certificate is for these; between them the control is
# interpolated ([labelled data](../how-to/data.md#labels)).
#
# Next: [a rule in place of labels](6-rule.py).
