# %% [markdown]
# # 2. Your own model, your own labels
#
# You have a pre-trained pipeline and a folder of labelled images. At the end of this lesson you have a control and a
# report.
#
# So that every line can be tried, we first make both: a small pipeline that draws colour textures, and 300 images of
# which a table says whether they show rows, columns or checks. **With a model and images of your own, skip this
# command** and put your two folders in the place of `textures/pipeline` and `textures/photos` below.

# %%
# !python examples/textures.py --out textures --updates 700 --width 16

# %% [markdown]
# ## What has to be there
#
# *The pipeline* is a folder as diffusers saves it (or OWNER/NAME on the hub): Stable Diffusion, Flux, a DiT, a UNet on
# pixels, … ([which](../reference/models.md)). Ask what is recognised:

# %%
# !ctrl inspect textures/pipeline

# %% [markdown]
# *The images* are a folder with a table `metadata.csv`, which names each file and its label:

# %%
from pathlib import Path

print(*Path("textures/photos/metadata.csv").read_text(encoding="utf-8").splitlines()[:4], "…", sep="\n")

# %% [markdown]
# The column of the label, here `texture`, is what `--control` is given below; other columns are not looked at. A folder
# with one sub-folder for each class works without a table, and so do other tables, Parquet, and numbers on a scale
# ([labelled data](../how-to/data.md)). Each class needs at least ten images, and some hundred in all.
#
# ## First the classifier
#
# The labels say what you want; the control will only be as good as the classifier that learns it from them. So fit that
# first, it takes a minute or two. The second line saves this page some time; leave it out for your own data:

# %%
# !ctrl classifier textures/photos --control texture --prior textures/pipeline --out runs/classifier --quiet \
# !    -o classifier.updates=300 -o classifier.grid=4 -o classifier.depth=2

# %%
import json

classifier = json.loads(Path("runs/classifier/classifier.json").read_text(encoding="utf-8"))["report"]
print(*(f"{key}: {classifier[key]}" for key in ("accuracy", "nll", "chance_nll", "ece")), sep="\n")

# %% [markdown]
# On images it never saw it is right in {classifier["accuracy"]:.0%}, and its NLL of {classifier["nll"]:.3f} nats is
# far below that of guessing, {classifier["chance_nll"]:.2f}. If yours is *not clearly better than chance*, the command
# says so and stops; then more labels, or labels that can be seen in the picture, are what helps.
# [Classifiers](../how-to/classifiers.md) has rare classes, CLIP and networks of your own.

# %% The report of this classifier
Path("runs/classifier/report.html")

# %% [markdown]
# ## How long will it take?
#
# `--dry-run` reads everything, tries each learner for a moment and predicts time and memory. With a large model that
# takes some minutes itself. Give it all options that you want to train with:

# %%
# !ctrl train --prior textures/pipeline --data textures/photos --control texture --classifier runs/classifier \
# !    --dry-run

# %% [markdown]
# Nothing was written. If that is too long, `--time 30m` limits what the learners take. What is sampled to certify and
# to report comes on top, as `evaluation.prior_samples` and `evaluation.paths` say ([how long](../how-to/how-long.md)).
# If it needs too much memory, [there are ways](../how-to/out-of-memory.md).
#
# ## Then the control
#
# With the settings that `ctrl` chooses this would be
#
# ```console
# $ ctrl train --prior textures/pipeline --data textures/photos --control texture --classifier runs/classifier \
#       --out runs/texture
# ```
#
# This page has no time for that, so here the last two lines cut it short: a shorter chain and a smaller adapter make an
# update cheap, one learner ends after few of them, and a few samples make a coarse certificate.

# %%
# !ctrl train --prior textures/pipeline --data textures/photos --control texture --classifier runs/classifier \
# !    --out runs/texture -o steps=12 -o rank=8 -o learners=[contrast] -o contrast.updates=300 \
# !    -o evaluation.prior_samples=400 -o evaluation.paths=300

# %%
metrics = json.loads(Path("runs/texture/metrics.json").read_text(encoding="utf-8"))
for name in ("prior", "ctrl", "target"):
    print(f"{name:6}  texture as asked {metrics[name]['accuracy']:.2f}")
print(f"gap {metrics['certificate']['gap_nats']:.2f} ± {metrics['certificate']['gap_stderr']:.2f} nats")

# %% [markdown]
# The model alone draws the texture that was asked for in {metrics["prior"]["accuracy"]:.0%}, with the control in
# {metrics["ctrl"]["accuracy"]:.0%}, and a perfect learner would in {metrics["target"]["accuracy"]:.0%}. A *judge* says
# so, a second classifier that shares no label with the one that trained the control. The *gap* says how far the samples
# are from the exact conditional; that of so short a training is large, and falls as it goes on. If yours stays far
# below its target, [these are the causes](../how-to/not-learned.md), the commonest being too little time.

# %% Without and with the control, from the same noise
from PIL import Image

Image.open("runs/texture/grid.png")

# %% The report of this run
Path("runs/texture/report.html")

# %% [markdown]
# [Reading the report](../reference/report.md) explains every part of it. If J was still climbing when the training
# ended, it says so, and how to go on: `ctrl train --resume runs/texture --time 30m`.
#
# ## Then use it

# %%
# !ctrl sample runs/texture --set texture=checks -n 8 --out checks

# %% [markdown]
# In Python that is `Run.load("runs/texture").sample(…)` ([from Python](../how-to/python.md));
# `ctrl export runs/texture texture-pipeline` writes a folder that diffusers loads without this package ([lesson
# 7](7-other-programs.py)).
#
# Next: [is it exact?](3-certificate.py)
