"""Measure the embedded digits prior: does it draw the digit asked for, blur, or memorise?

Writes bench/results/prior.json and docs/pictures/prior.png. Samples come from the 20-step chain. 300 real digits were
never shown to the prior; distances to and from them are the yardsticks.
"""

import evidence
import numpy as np
import torch
import torch.nn.functional as F
from embedded import seconds_per_evaluation
from evidence import PICTURES
from rich import print_json

from ctrl_diffusion.chain.noise import stream
from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.commands.app import quiet_dependencies
from ctrl_diffusion.commands.jobs import demo
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.digits import digits, split
from ctrl_diffusion.data.labelled import to_pixels
from ctrl_diffusion.evaluate.fidelity import frechet_distance, nearest_distance
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS
from ctrl_diffusion.report.style import save_figure, sheet_figure
from ctrl_diffusion.reward.classifiers import READER
from ctrl_diffusion.reward.fit import fit_classifier
from ctrl_diffusion.reward.scorer import Classifier
from ctrl_diffusion.run.config import Config


def fit_reader() -> Classifier:
    """Fit a reader on the real digits the prior was trained on; the other 300 measure it."""
    rows = torch.as_tensor(split()[0])
    x, c = (a[rows] for a in digits())
    return fit_classifier(x, c, 10, *READER)


def main() -> None:
    quiet_dependencies()
    prior, reader = Prior.from_pretrained(DIGITS), fit_reader()
    config = Config.from_values(demo.demo_values("ink", {}))
    x, c = digits()
    training, unseen = (x[torch.as_tensor(rows)] for rows in split())
    times = prior.denoiser.times(config.steps, config.sigma_end, config.time_power)
    digit = torch.arange(10).repeat_interleave(200)
    samples = paths(prior.denoiser, len(digit), times, stream(0, "bench"), {"c": digit}).x_0
    samples = samples.clamp(-1, 1)
    without_c = paths(prior.unconditional().denoiser, len(digit), times, stream(0, "without c")).x_0
    as_written, bare_as_written = (
        torch.from_numpy(to_pixels(x)).float().unsqueeze(1) / 127.5 - 1 for x in (samples, without_c)
    )
    p = reader.log_prob(bare_as_written).exp()
    blurred = F.avg_pool2d(F.pad(training, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    nearest_real, nearest_sample = nearest_distance(unseen, training), nearest_distance(as_written, training)
    close = torch.quantile(nearest_real, 0.05)
    figures = {
        "read_as_asked": float((reader.log_prob(as_written).argmax(1) == digit).float().mean()),
        "reader_accuracy_on_300_unseen_digits": float(
            (reader.log_prob(unseen).argmax(1) == c[split()[1]]).float().mean()
        ),
        "frechet_to_unseen": {
            "samples": frechet_distance(reader.features(unseen), reader.features(as_written)),
            "samples of the null class": frechet_distance(reader.features(unseen), reader.features(bare_as_written)),
            "training digits": frechet_distance(reader.features(unseen), reader.features(training)),
            "training digits, blurred": frechet_distance(reader.features(unseen), reader.features(blurred)),
        },
        "null_class": {
            # the mean of the reader's largest probability: real digits first
            "reader_is_sure_of_unseen_digits": float(reader.log_prob(unseen).exp().amax(1).mean()),
            "reader_is_sure": float(p.amax(1).mean()),
            "digit_shares": (p.argmax(1).bincount(minlength=10) / len(p)).tolist(),
        },
        "nearest_training_digit": {
            "samples_median": float(nearest_sample.median()),
            "unseen_digits_median": float(nearest_real.median()),
            # 0.05 by construction for unseen digits; copies would push it towards 1
            "samples_closer_than_closest_5_percent_of_unseen": float((nearest_sample < close).float().mean()),
        },
        "ink_shares": (rulers.ink_ruler(as_written).bincount(minlength=4) / len(digit)).tolist(),
        "milliseconds_per_64_on_one_thread": round(1000 * seconds_per_evaluation(prior), 1),
        "parameters": sum(p.numel() for p in prior.denoiser.network.parameters()),
    }
    print_json(data=figures)
    evidence.write("prior", figures)
    order = np.arange(len(digit)).reshape(10, 200)[:, :12].ravel()
    save_figure(PICTURES / "prior.png", sheet_figure(samples[order], columns=12))


if __name__ == "__main__":
    main()
