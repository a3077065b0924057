# %% [markdown]
# # 1. Your first control
#
# A small model that ships with the package draws handwritten digits. It knows *which* digit to draw, and nothing about
# how heavy the strokes are. In this lesson it learns that, from 500 labelled images, without being changed itself.
#
# You need the package and nothing else: `pip install -e .` in a clone, or `make setup`.
#
# ## Train it
#
# The labels are classes of stroke weight ("ink"), from 1, light, to 4, heavy. To keep this lesson short only three
# digits are trained, with few updates; `ctrl demo` without any `-o` trains all ten, in ten minutes.

# %%
# !ctrl demo --out runs/first --quiet -o classes=[1,3,7] -o classifier.updates=1500 -o weighted.updates=80 \
# !    -o weighted.renoising=20 -o weighted.cache=400 -o adjoint.updates=90 -o adjoint.batch=48 \
# !    -o evaluation.prior_samples=300 -o evaluation.paths=300 -o evaluation.sweep_paths=30 \
# !    -o evaluation.probes=3

# %% [markdown]
# Three things happened. A *classifier* p̂(y | x) was fitted on the 500 labels and calibrated. A *control*, a small
# adapter beside the frozen model, was trained so that samples are what p̂ calls y and stay as near to the model's own
# samples as they can. Then the result was measured. A warning, where there is one, names what a longer training mends.
#
# ## Look at it

# %% The digits 1, 3, 7 without and with the control, a row for each ink
from PIL import Image

Image.open("runs/first/grid.png")

# %% [markdown]
# Each column starts from the same noise on the left, where the model draws alone, and on the right, where it is asked
# for ink 1 to 4. The digit stays; the stroke changes.
#
# ## Read the figures

# %%
import json
from pathlib import Path

metrics = json.loads(Path("runs/first/metrics.json").read_text(encoding="utf-8"))
for name in ("prior", "ctrl", "target"):
    print(f"{name:6}  ink as asked {metrics[name]['accuracy']:.2f}")
print(f"digit still read {metrics['ctrl']['class_accuracy']:.2f}")
print(f"gap {metrics['certificate']['gap_nats']:.2f} ± {metrics['certificate']['gap_stderr']:.2f} nats")

# %% [markdown]
# - Without the control {metrics["prior"]["accuracy"]:.0%} of the samples have the ink that was asked for, by chance:
#   there are four classes. With it {metrics["ctrl"]["accuracy"]:.0%} have. The *target*,
#   {metrics["target"]["accuracy"]:.0%}, is what a perfect learner would reach with this classifier, so it is the
#   ceiling, not 100 %.
# - {metrics["ctrl"]["class_accuracy"]:.0%} of the samples are still read as the digit that was asked for: the control
#   did not break what was there.
# - The *gap* bounds how far the samples are from the exact answer, p(x | c) p̂(y | x), in nats. It is at most
#   {metrics["certificate"]["gap_nats"]:.1f} ± {metrics["certificate"]["gap_stderr"]:.1f} here; zero would be perfect.
#   [Lesson 3](3-certificate.py) is about this number.
#
# Everything that was measured is in one page without scripts, which you can send to somebody:

# %% The report of this run
Path("runs/first/report.html")

# %% [markdown]
# ## Use it
#
# From the command line, sixteen sevens with heavy strokes:

# %%
# !ctrl sample runs/first --set ink=4 --class 7 -n 16 --out sevens

# %% [markdown]
# And from Python, where the labels are numbers, one for each sample:

# %% Sevens with ink 1, 2, 3, 4
import torch
from matplotlib import pyplot

from ctrl_diffusion import Run

run = Run.load("runs/first")
y = torch.arange(4).repeat(8)  # ink "1", "2", "3", "4", eight times
x = run.sample(y=y, c=torch.full_like(y, 7), generator=torch.Generator().manual_seed(0))  # (32, 1, 8, 8) in [−1, 1]

figure, axes = pyplot.subplots(4, 8, figsize=(6, 3))
for i, image in enumerate(x):
    axes[i % 4, i // 4].imshow(image[0], cmap="gray", vmin=-1, vmax=1)
    axes[i % 4, i // 4].axis("off")

# %% [markdown]
# Leave out `y` and the samples are the model's own, bit for bit. `ctrl play runs/first` opens a page on which you turn
# the control by hand ([how](../how-to/play.md)).
#
# Next: [the same with a model and images of your own](2-your-own.py).
