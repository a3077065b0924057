"""Tune a LoRA by its reward alone and certify it at some lengths: bench/results/certify.json (minutes).

python bench/certify.py [RUN]        (a run of `ctrl demo`; left out, it trains one first)

The update is that of DRaFT-K (Clark et al. 2024), AlignProp's (Prabhudesai et al. 2024) with a fixed truncation: sample
a chain, differentiate the reward through its last K steps, and ascend. There is no KL. The base, the chain and p̂ are
the run's, the reward is log p̂(ink = 4 | x), the LoRA is PEFT's on the queries, keys and values. trl's own trainer takes
Stable Diffusion alone. Each LoRA is saved as diffusers does and read by `ctrl certify`, the run beside it.
"""

import sys
import warnings
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from evidence import write
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from rich.progress import track

from ctrl_diffusion.chain.rollout import read_out
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.commands.jobs.certify import Request, certify_job
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.prior.prior import open_prior
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.files import write_tensors
from ctrl_diffusion.system.progress import JobOptions

VALUE, RANK, RATE, BATCH, K = "4", 4, 1e-3, 32, 2
LENGTHS = (30, 50, 70, 100)  # updates at which it is saved
PATHS = 800  # over the ten digits


def tune(run: Run, folder: Path) -> list[Path]:
    """Tune a LoRA of a run's base on its p̂ of one value, and save it at each length."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    denoiser, name, y = open_prior(run.config.prior).denoiser, run.names[0], run.values.index(VALUE)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v"])
    network = inject_adapter_in_model(config, denoiser.network)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    files, steps = [], list(pairwise(run.times))
    for update in track(range(max(LENGTHS) + 1), description="tuning by the reward"):
        if update in LENGTHS:
            files.append(folder / f"{update}.safetensors")
            state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(network).items()}
            write_tensors(files[-1], state, {})
        c = torch.randint(run.prior.classes, (BATCH,), generator=generator)
        x = torch.randn(BATCH, *denoiser.shape, generator=generator)
        for i, (t, s) in enumerate(steps):
            with torch.set_grad_enabled(i >= len(steps) - K):
                x = transition(denoiser, x, t, s, c=c).rsample(torch.randn(x.shape, generator=generator))
        x_0 = read_out(run.prior.denoiser, x, run.times[-1], c=c)  # by the base, as `ctrl certify` does
        reward = run.reward_at(1.0)(x_0, {name: torch.full((BATCH,), y)}, {"c": c}).mean()
        optimiser.zero_grad()
        (-reward).backward()
        optimiser.step()
    return files


def row_of(update: int, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one LoRA, and of the run at its KL."""
    beside = figures["run"]["rows"][0]  # at the LoRA's KL
    return {"updates": update, "lora": about(figures), "run": {"strength": beside["strength"], **about(beside)}}


def about(figures: dict[str, Any]) -> dict[str, Any]:
    """Return KL, mean score, J, log Z and gap, with errors."""
    names = ("objective_nats", "objective_stderr", "log_z_nats", "gap_nats", "gap_stderr", "certified_pairs")
    own = {name: figures[name] for name in ("kl_nats", "kl_stderr", "score", "score_stderr", "best_score")}
    return own | {name: figures["certificate"][name] for name in names}


def main() -> None:
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if sys.argv[1:] else f"{scratch}/run")
        if not sys.argv[1:]:
            demo_job({}, folder)
        files = tune(Run.load(folder), Path(scratch))
        rows = []
        for update, file in zip(LENGTHS, files, strict=True):
            request = Request("digits", file, run=folder, value=VALUE, n=PATHS)
            figures = certify_job(request, Path(scratch) / str(update), JobOptions())
            rows.append(row_of(update, figures))
            write("certify", {
                "value": VALUE, "steps": figures["chain"]["steps"], "through": K, "rank": RANK, "rate": RATE,
                "batch": BATCH, "prior_score": figures["prior_score"], "trained": about(figures["run"]["rows"][-1]),
                "rows": rows,
            })  # fmt: skip


if __name__ == "__main__":
    main()
