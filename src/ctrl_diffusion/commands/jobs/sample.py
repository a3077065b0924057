"""Write samples of a run with labels and strength."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from ...data.labelled import LabelledImages, save_image, write_imagefolder
from ...data.labels import NULL
from ...evaluate.evaluation import leaves_region
from ...report.style import save_figure, sheet_figure
from ...report.word import checked_word, letter_noise, letters_of, sheet_pixels, word_picture
from ...run.run import Run
from ...system import ranks
from ...system.files import write_json
from ...system.folders import check_output, clear
from ...system.progress import DEFAULT, JobOptions

SAMPLE_FILES = ("metadata.csv", "[0-9][0-9][0-9][0-9][0-9].png", "grid.png", "word.png", "sample.json")


def labelled(run: Run, x_0: Tensor, labels: dict[str, Tensor], cond: dict[str, Tensor]) -> LabelledImages:
    """Return samples with the labels requested; a null label is blank."""
    values, numbers = {}, {}
    for name, control in run.policy.controls.items():
        y = labels.get(name, torch.full((len(x_0),), NULL))
        texts = [control.space.text_of(label) for label in y.tolist()]
        values[name] = tuple(dict.fromkeys(texts))
        numbers[name] = torch.tensor([values[name].index(text) for text in texts])
    if not cond:
        return LabelledImages(x_0, numbers, values)
    column = next((settings.condition for settings in run.config.controls if settings.condition), "c")
    return LabelledImages(x_0, {column: cond["c"], **numbers}, {column: run.prior.class_names, **values})


def parse_settings(run: Run, settings: list[str]) -> dict[str, int | float]:
    """Read `--set CONTROL=VALUE` settings; return the class, or the place on a scale, of each control."""
    labels, controls = {}, run.policy.controls
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in controls:
            raise ValueError(f"--set {setting}: unknown control {name!r}; this run has: {', '.join(controls)}.")
        try:
            labels[name] = controls[name].space.label_of(value, name)
        except ValueError as error:
            raise ValueError(f"--set {setting}: {error}") from error
    return labels


def sample_job(
    run: Run, out: Path, settings: list[str], c: str | None, n: int, strength: float = 1.0, steps: int | None = None,
    seed: int = 0, exact: bool = False, options: JobOptions = DEFAULT, gamma: float | None = None, word: str = "",
) -> int:  # fmt: skip
    """Write n samples, a sheet of them (`grid.png`) and the settings they were drawn with (`sample.json`).

    Of a word there is one for each letter, and the word set from them (`word.png`). Return how many were written.
    """
    word = checked_letters(run, word, c, exact)
    n = len(letters_of(run, word)) if word else n
    y = {name: torch.full((n,), value) for name, value in parse_settings(run, settings).items()}
    y = y or {run.names[0]: torch.full((n,), NULL)}
    cond: dict[str, Tensor] = {}
    if exact and not settings:
        raise ValueError("--exact weighs paths by the label asked for. Give one with --set, or leave --exact out.")
    if word:
        cond["c"] = letters_of(run, word)
    elif c is not None:
        if run.prior.classes is None:
            raise ValueError(f"--class {c}: this prior is unconditional. Leave --class out.")
        try:
            cond["c"] = torch.full((n,), run.prior.number_of(c))
        except ValueError as error:
            raise ValueError(f"--class {error}") from error
    elif run.prior.classes is not None:
        classes = torch.tensor(run.classes)
        cond["c"] = classes[torch.arange(n) % len(classes)]
    ranks.broadcast(lambda: check_output(out, SAMPLE_FILES[-1], options.overwrite))
    generator = letter_noise(seed, n) if word else torch.Generator().manual_seed(seed)
    sampling = {"strength": strength, "steps": steps, "generator": generator, "exact": exact, "phase": options.phase}
    x_0 = run.sample(y, **sampling, **cond, latents=True, gamma=gamma)
    images = run.images(x_0)
    outside, images = outside_share(run, x_0, images), images.clamp(-1, 1)
    request = {
        "set": settings, "class": c, "n": n, "strength": strength, "steps": steps or run.config.steps, "seed": seed,
        "exact": exact, "outside_support": outside, **({} if gamma is None else {"gamma": gamma}),
        **({"word": word} if word else {}),
    }  # fmt: skip

    def write() -> None:
        clear(out, SAMPLE_FILES)
        write_imagefolder(out, labelled(run, images, y, cond))
        save_figure(out / "grid.png", sheet_figure(images))
        if word:
            save_image(out / "word.png", sheet_pixels(word_picture(images, word)))
        write_json(out / "sample.json", request)

    ranks.broadcast(write)
    return n


def checked_letters(run: Run, word: str, c: str | None, exact: bool) -> str:
    """Return the word to draw, blank for none; refuse it beside --class or --exact, which choose pictures otherwise."""
    try:
        word = checked_word(run, word)
    except ValueError as error:
        raise ValueError(f"--word: {error}") from error
    for option, given in (("--class", c is not None), ("--exact", exact)):
        if word and given:
            raise ValueError(f"--word {word}: each letter is a class with noise of its own. Leave {option} out.")
    return word


@torch.no_grad()
def outside_share(run: Run, x_0: Tensor, images: Tensor) -> float | None:
    """Return the share of samples (n, *), with their images, outside the region some p̂ was fitted on; None if unknown.

    Warn if it is more than twice the prior's share, and more by three standard errors.
    """
    if not run.second_opinion.outside:
        return None
    share, usual = float(run.is_outside(x_0, images).float().mean()), run.prior_outside or run.real_outside
    if leaves_region(share, usual, (usual * (1 - usual) / len(x_0)) ** 0.5):
        text = f"{share:.0%} of the samples lie outside the region the classifier was fitted on, of the prior's"
        advice = "there p̂ has seen no labels. Compare the judge in report.html."
        warnings.warn(f"{text} {usual:.0%}: {advice}", RuntimeWarning, stacklevel=2)
    return share
