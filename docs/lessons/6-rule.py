# %% [markdown]
# # 6. A rule in place of labels
#
# Sometimes nobody has to label anything, because a function can: the size of a file, the number of edges, the output
# of another program. Such a *rule* takes the place of the column of labels. Not even images are needed: the model can
# draw them.
#
# ## The rule
#
# A function of one PIL image, as the model sees it, that returns a text or a number. This one says in which half of
# the paper most of the ink is:

# %%
from pathlib import Path

RULE = """
import numpy as np


def half(image):
    ink = np.asarray(image, dtype=float)
    return "top" if ink[:4].sum() > ink[4:].sum() else "bottom"
"""
with open("my_rules.py", "w", encoding="utf-8") as file:
    file.write(RULE)

# %% [markdown]
# ## The images
#
# Four hundred drawings of the model itself, without its classes. A table lists the files; it needs no label:

# %%
import csv

import torch
from PIL import Image

from ctrl_diffusion import Prior, paths
from ctrl_diffusion.prior.source import DIGITS

prior = Prior.from_pretrained(DIGITS).denoiser
c = torch.full((400,), 10)  # the model's null class: any digit
x = paths(prior, 400, prior.times(steps=20, sigma_end=0.05, power=2.0), torch.Generator().manual_seed(0), {"c": c}).x_0

Path("drawings").mkdir()
with open("drawings/metadata.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["file_name"])
    for i, image in enumerate(x[:, 0]):
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(f"drawings/{i}.png")
        table.writerow([f"{i}.png"])

# %% [markdown]
# ## Train
#
# `NAME:MODULE:FUNCTION` names the rule. Because the command line names it, it is imported and run; a config that names
# one needs `--trust`.

# %%
# !ctrl train --prior digits --data drawings --control where:my_rules:half --out runs/where \
# !    -o unconditional=true -o learners=[weighted,adjoint] -o classifier.updates=600 -o classifier.grid=4 \
# !    -o classifier.depth=1 -o weighted.updates=100 -o weighted.renoising=20 -o weighted.cache=800 \
# !    -o adjoint.updates=60 -o adjoint.batch=32 -o evaluation.prior_samples=800 -o evaluation.paths=400 \
# !    -o evaluation.sweep_paths=20 -o evaluation.probes=2

# %%
import json

metrics = json.loads(Path("runs/where/metrics.json").read_text(encoding="utf-8"))
for name in ("prior", "ctrl", "target"):
    print(f"{name:6}  as asked {metrics[name]['accuracy']:.2f}")

# %% [markdown]
# A rule labels samples as it labels data, so it can be asked again about what was drawn, and nothing has to be
# believed. Of 200 new drawings for each:

# %%
from my_rules import half

from ctrl_diffusion import Run


def share(images, value):
    pixels = ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return sum(half(Image.fromarray(image)) == value for image in pixels) / len(images)


run = Run.load("runs/where", trust=True)
before, after = {}, {}
for y, value in enumerate(run.values):
    drawn = run.sample(y=torch.full((200,), y), generator=torch.Generator().manual_seed(1))
    before[value], after[value] = share(x, value), share(drawn, value)
    print(f"{value}: the rule finds it in {before[value]:.0%} without control, in {after[value]:.0%} when asked for")

# %% [markdown]
# What a rule is good for, and what it is not:
#
# - Labels cost nothing, so give it thousands of images.
# - The reward is still a classifier, fitted on what the rule said, because training needs a gradient and a
#   probability. If the classifier reads the rule badly, the target is low; `ctrl classifier` shows it in a minute.
# - A rule can be cheated where the classifier is wrong. The rule itself, asked again, shows that.
#
# The package has one rule, `ctrl_diffusion.data.rules:jpeg_size`, the compressibility of the CTRL paper
# ([labels](../how-to/data.md#labels)).
#
# Next: [from a run to ComfyUI and diffusers](7-other-programs.py).
