# %% [markdown]
# # 3. Is it exact? Reading a certificate
#
# Every run ends with a number in nats, the *gap*. This lesson shows what it measures on one number drawn from a
# Gaussian, where everything can be written down, then on a mixture in the plane, where it can be computed, and then
# reads that of a real control.
#
# ## On one number
#
# Let the model draw x from N(0, 1), and let the classifier give log p̂(y | x) = −(x − 2)² / 2 for the label that is
# asked for. A control that moves the mean to m, and nothing else, draws N(m, 1). Its reward is the mean of log p̂, its
# cost the KL divergence from the model, which is m²/2. The objective J is the difference, and its largest possible
# value is log Z, the log of the mean of p̂ over the *model's* samples:

# %%
import math

import numpy as np

noise = np.random.default_rng(0).standard_normal(100_000)


def log_p(x):
    return -((x - 2) ** 2) / 2


log_z = math.log(np.exp(log_p(noise)).mean())
for m in (0.0, 0.5, 1.0, 1.5, 2.0):
    j = log_p(m + noise).mean() - m**2 / 2
    print(f"m = {m}: reward {log_p(m + noise).mean():6.3f}, KL {m**2 / 2:.3f}, J {j:.3f}, gap {log_z - j:.3f}")

# %% [markdown]
# - The reward alone rises all the way to m = 2: it would lead as far as it is allowed to.
# - J has its maximum at m = 1, which is the mean of the exact answer, p(x) p̂(y | x) / Z = N(1, ½).
# - There the gap is not zero but {log_z - (log_p(1 + noise).mean() - 0.5):.2f}. This control can only shift; the exact
#   answer is also narrower. The gap *is* the KL divergence between what the control draws and the exact answer: here ½
#   (ln ½ + 2 − 1) = {0.5 * (math.log(0.5) + 1):.3f} nats, by the formula for two Gaussians.
#
# Two things make this a certificate: log Z comes from samples of the model, and J from samples of the control. Neither
# needs the answer.
#
# ## Where the answer can be computed
#
# A diffusion model draws in steps, and the same sums are over its steps. `ctrl exact` trains every learner on mixtures
# of Gaussians in the plane, on which the exact conditional is known on a lattice; `--quick` takes two tasks and a
# tenth of the training.

# %%
# !ctrl exact --quick --quiet --out runs/exact

# %%
import json
from pathlib import Path

rows = json.loads(Path("runs/exact/exact.json").read_text(encoding="utf-8"))["rows"]
print("learner    schedule  true KL     gap            floor")
for row in rows:
    print(
        f"{row['learner']:10} {row['schedule']:8}  {row['true_kl_nats']:.3f}    "
        f"{row['gap_nats']:.3f} ± {row['gap_stderr']:.3f}   {row['gap_floor_nats']:.3f}"
    )
least = min(row["gap_nats"] - row["true_kl_nats"] for row in rows)

# %% [markdown]
# *True KL* is computed on the lattice, from the samples' density to the exact conditional. The *gap* is what a run
# reports, from samples. It is larger in every row, by at least {least:.3f}: it bounds the KL of whole chains, of which
# the last state is a part. The *floor* is the smallest gap that any control with Gaussian steps can have, since a
# Gaussian step cannot bend; it falls as the chain has more steps. So a gap is read above its floor, not above zero.

# %% Samples of the learned control, on the density they should have
from PIL import Image

picture = Image.open("runs/exact/density.png")
picture.resize((picture.width // 2, picture.height // 2))

# %% [markdown]
# ## Of a real control
#
# The package ships a run of the ink demo, so that there is one to look at. Its figures:

# %%
import ctrl_diffusion

folder = Path(ctrl_diffusion.__file__).parent / "run" / "ink"
metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
certificate = metrics["certificate"]
names = ("objective_nats", "log_z_nats", "gap_nats", "gap_stderr", "certified_pairs", "of_pairs", "uncertified")
print(*(f"{name:16} {certificate[name]}" for name in names), sep="\n")
print(f"\naccuracy: prior {metrics['prior']['accuracy']:.3f}, control {metrics['ctrl']['accuracy']:.3f}", end=", ")
print(f"target {metrics['target']['accuracy']:.3f}")

# %% [markdown]
# Read it in this order:
#
# 1. **For what does it hold?** For {certificate["certified_pairs"]} of {certificate["of_pairs"]} pairs of digit and
#    ink. A pair is certified where ten of the model's samples have the label; the others would be named under
#    `uncertified`, and nothing is said of them.
# 2. **log Z** is {certificate["log_z_nats"]:.2f}. Four classes that are equally frequent have log ¼ =
#    {math.log(1 / 4):.2f}. It would be lower for labels that the model rarely draws.
# 3. **The gap**, {certificate["gap_nats"]:.2f} ± {certificate["gap_stderr"]:.2f} nats: the control's samples are at
#    most so far from the exact conditional.
# 4. **Is p̂ right?** The certificate does not say. It is relative to p̂, and to the model. The *target*,
#    {metrics["target"]["accuracy"]:.3f}, is what the exact conditional under this p̂ would have; the labels' own
#    measure gives the control {metrics["ctrl"]["accuracy"]:.3f}.
#
# It holds for the chain it was measured on: that number of steps, strength 1, that guidance.
# `ctrl evaluate RUN --as comfyui` measures another program's, and [`ctrl certify`](../how-to/certify.md) a LoRA of any
# origin. [Why it is a bound](../why/how-it-works.md#evaluate), and [the testbed](../why/testbed.md).
#
# Next: [several controls](4-several-controls.py).
