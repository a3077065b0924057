"""Say what a machine has, what of a prior and data is recognised, and what `ctrl train` would refuse first.

The text is to be pasted where strangers read it: of every path the last part alone, no variable of the environment.
What is installed may be broken, so nothing but Python itself is imported before it is needed.
"""

import os
import platform
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...system.machine import cores, free_disk, memory
from ...system.progress import JobOptions

if TYPE_CHECKING:
    from ...data.labelled import LabelledImages
    from ...prior.prior import Prior

PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "huggingface-hub", "safetensors", "numpy",
    "pillow", "scikit-learn", "pydantic", "typer", "gradio",
)  # fmt: skip
GIGABYTE = 1e9
REFUSED = (ValueError, OSError, MemoryError, FloatingPointError, ImportError, RuntimeError)
PART = r"[^\s/\\'\",;:]+"
# absolute, or of three parts or more: of two it may be the name of a model on the hub
FOLDERS = re.compile(rf"(?<![\w.:/\\])(?:(?:[A-Za-z]:)?[/\\](?:{PART}[/\\])*|(?:{PART}[/\\]){{2,}})({PART})")
SHOWN = 12  # classes


@dataclass
class Diagnosis:
    """Hold what was found, by name, and the first thing that goes wrong, None if nothing was found to."""

    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what a training says and warns of while it reads
    problem: str | None = None
    whole: bool = False  # whether a training was looked at, not parts of one
    folders: set[str] = field(default_factory=set)  # that are not to be read in the text

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Note what is refused inside, if it is the first, and go on."""
        try:
            yield
        except REFUSED as error:
            self.problem = self.problem or str(error) or type(error).__name__

    def in_words(self) -> str:
        """Format the facts for a terminal, a line each."""
        rows = [*self.facts.items(), *(("read", note) for note in self.notes)]
        none = "nothing that can be seen before p̂ is fitted" if self.whole else "nothing of these"
        none += "" if self.whole else ". To check a training name --prior, --data and --control"
        rows.append(("goes wrong", self.problem or none))
        return "\n".join(f"{name:<12} {without_folders(text, self.folders)}" for name, text in rows)


def without_folders(text: str, folders: Collection[str] = ()) -> str:
    """Return a text, on one line, with every path in it cut to its last part; those in `folders` may have blanks."""
    for folder in sorted({str(Path.home()), str(Path.cwd()), gettempdir(), *folders}, key=len, reverse=True):
        text = text.replace(folder.rstrip(os.sep) + os.sep, os.sep) if len(folder) > 1 else text
    return FOLDERS.sub(lambda match: match[1], " ".join(text.split()))


def doctor_job(read: Callable[[], dict[str, Any]], trust: bool = False) -> Diagnosis:
    """Look at the machine, and at what the settings that `read` returns name: prior, data, or a whole training."""
    diagnosis = Diagnosis(installed())
    with diagnosis.checking():
        check_installed()
    with diagnosis.checking():
        diagnosis.facts |= hardware()
    with warnings.catch_warnings(record=True) as caught, TemporaryDirectory() as scratch:
        warnings.simplefilter("always")
        with diagnosis.checking():
            look(diagnosis, read(), JobOptions(trust=trust, say=diagnosis.notes.append), Path(scratch))
    ours = Path(__file__).parents[2]
    said = [f"warning: {each.message}" for each in caught if ours in Path(each.filename).parents]
    diagnosis.notes = list(dict.fromkeys([*diagnosis.notes, *said]))
    return diagnosis


def installed() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return {
        "ctrl": f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "packages": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def check_installed() -> None:
    """Refuse (ValueError) a package that is absent, or of another version than this one needs."""
    from packaging.requirements import Requirement

    for needed in map(Requirement, requires("ctrl-diffusion") or ()):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(needed.name)
        except PackageNotFoundError:
            raise ValueError(f"{needed.name} is not installed. Install it: pip install '{needed}'") from None
        if not needed.specifier.contains(there, prereleases=True):
            raise ValueError(f"{needed.name} is {there}, and {needed.specifier} is needed. pip install '{needed}'")


def hardware() -> dict[str, str]:
    """Return device, threads, memory and disk; the device is what `device: auto` takes."""
    free, whole = memory()
    facts = {
        "memory": f"{free / GIGABYTE:.1f} GB free of {whole / GIGABYTE:.1f}",
        "disk": f"{free_disk(Path.cwd()) / GIGABYTE:.1f} GB free here, {free_disk(Path(gettempdir())) / GIGABYTE:.1f} "
        "for temporary files",
    }
    import torch

    device = "the CPU"
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        device = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, "
        device += f"{free / GIGABYTE:.1f} GB free of {whole / GIGABYTE:.1f}"
    elif torch.backends.mps.is_available():
        device += "; device: mps is there too"
    return {"device": device, "threads": f"{torch.get_num_threads()} on {cores()} cores", **facts}


def look(diagnosis: Diagnosis, values: Mapping[str, Any], options: JobOptions, scratch: Path) -> None:
    """Add what is recognised of prior and data; of a whole training do what comes before anything is fitted."""
    from ...run.config import list_controls, map_paths
    from ...run.prepare import prepare

    def hide(place: str) -> str:
        diagnosis.folders |= {str(Path(place).parent), str(Path(place).absolute().parent)}
        return place

    values = list_controls(dict(values))
    map_paths(values, hide)
    controls = values.get("controls") or []
    if values.get("prior") and controls and all(row.get("name") and row.get("data") for row in controls):
        diagnosis.whole = True
        with diagnosis.checking():
            job = prepare(values, options, beside=scratch)
            diagnosis.facts["prior"] = prior_in_words(job.prior, job.config.prior)
            for inputs in job.inputs:
                if inputs.data:
                    diagnosis.facts |= labels_in_words(inputs.data, inputs.name)
            diagnosis.facts["training"] = f"{', '.join(job.config.learners)} at a chain of {job.config.steps} steps"
            return
    look_apart(diagnosis, values, options)


def look_apart(diagnosis: Diagnosis, values: dict[str, Any], options: JobOptions) -> None:
    """Add what is recognised of each prior and dataset by itself."""
    from ...data.sources import open_table
    from ...prior.prior import open_prior
    from ...run.config import Config
    from ...run.prepare import read_inputs

    if name := values.get("prior"):
        with diagnosis.checking():
            diagnosis.facts["prior"] = prior_in_words(open_prior(name, values.get("size")), name)
    for row in values.get("controls") or []:
        source, label = row.get("data"), row.get("name")
        if not source or row.get("settled_from"):
            continue
        with diagnosis.checking():
            table = open_table(source, row.get("image"))
            diagnosis.facts["data"] = f"{Path(source).name}: {table.rows} rows; columns {', '.join(table.columns)}"
            if label:
                settings = Config.from_values({**values, "prior": "-", "prompts": None, "controls": [row]}).controls[0]
                settings = settings.model_copy(update={"classifier_from": None})
                data = read_inputs(settings, None, options).data
                diagnosis.facts |= labels_in_words(data, settings.name)
                data.check_classes(settings.name)


def prior_in_words(prior: "Prior", name: str) -> str:
    """Describe a prior on one line: its family, the shape of x, its conditions and its size."""
    shapes = " × ".join(map(str, prior.denoiser.shape))
    if prior.image_shape != prior.denoiser.shape:
        shapes += f", latents of images {' × '.join(map(str, prior.image_shape))}"
    what = "unconditional"
    if prior.text:
        what = f"given text, guidance {prior.text.guidance:g}" + (f", {prior.classes} prompts" if prior.classes else "")
    elif prior.classes:
        what = f"{prior.classes} classes"
    parameters = sum(p.numel() for p in prior.denoiser.network.parameters())
    return f"{Path(name).name}: {prior.pipeline}, x {shapes}, {what}, {parameters:,} parameters"


def labels_in_words(data: "LabelledImages", name: str) -> dict[str, str]:
    """Describe the images and each column of labels that were read, with how many there are of each class."""
    from ...system.files import some_of

    facts = {"images": f"{len(data)} of {' × '.join(map(str, data.x.shape[1:]))} for {name}"}
    for column, y in data.labels.items():
        space = data.space(column)
        if space.scale:
            facts[column] = f"a scale, {space.values[0]} … {space.values[-1]} for its central 90 %"
        else:
            counts = y.bincount(minlength=space.size).tolist()
            shown = [f"{value} × {n}" for value, n in zip(space.values, counts, strict=True)]
            facts[column] = f"{space.size} classes: {some_of(shown, SHOWN)}"
    return facts
