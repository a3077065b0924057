"""Everything needed to run again; an unknown key is an error."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from ..data.tables import HUB
from ..learn.adjoint import AdjointSettings
from ..learn.backprop import BackpropSettings
from ..learn.ppo import PPOSettings
from ..learn.weighted import WeightedSettings
from ..prior.prior import EMBEDDED
from ..reward.classifiers import ClassifierSettings
from ..system.files import write_text
from ..system.strict import Strict

OURS = ("ctrl_diffusion.data.rules:", "ctrl_diffusion.rules:")  # rules that ship with the package; the latter in 0.1
LearnerName = Literal["weighted", "adjoint", "backprop", "ppo"]
PATHS = ("prior", "prompts", "data", "judge_data", "classifier_from", "settled_from", "backbone")


class EvaluationSettings(Strict):
    """Samples of the prior for each of its conditions; paths of the policy over all (c, y), and for each sweep."""

    prior_samples: int = Field(1000, ge=8)
    paths: int = Field(2000, ge=1)
    probes: int = Field(10, ge=1)
    sweep_paths: int = Field(200, ge=1)


class ControlSettings(Strict):
    """One control and the data it comes from.

    Args:
        name: of y. NAME:COLUMN is the name and the column, NAME:MODULE:FUNCTION the name and a rule, NAME:COLUMN=TAG
            the name, the column and the tag.
        column: of y, if it is called otherwise; or a rule that computes y from the image (`rules`).
        tag: y is whether the column, which lists any number of tags, has this one: "no" or "yes". Several such controls
            are the multi-label case.
        kind: "scale" for numbers to be asked for by value; "auto" takes numbers of more than 64 values for a scale.
        data: a folder, a table, or a dataset on the hub (`sources`); not read if the control is settled.
        judge_data: others with the same column, on which the judge is fitted; null keeps a part of the data for it. Not
            read if `classifier_from` brings a judge.
        condition: the prior's class c, if the data have it: NAME, or NAME:COLUMN.
        condition_column: of c, if it is called otherwise.
        skip_bad: leave out rows that cannot be used, and say how many.
        ruler: a built-in measure of the true y; null asks a judge, fitted on labels of its own.
        classifier_from: a folder that `ctrl classifier` wrote; null fits one.
        settled_from: a run that has trained this control already; it is taken from there and stays as it is.
        classifier: how p̂ and the judge are fitted.
    """

    name: str = Field(min_length=1)
    column: str | None = None
    tag: str | None = Field(None, min_length=1)
    kind: Literal["auto", "classes", "scale"] = "auto"
    data: str
    judge_data: str | None = None
    condition: str | None = None
    condition_column: str | None = None
    skip_bad: bool = False
    ruler: Literal["ink", "slant"] | None = None
    classifier_from: str | None = None
    settled_from: str | None = None
    classifier: ClassifierSettings = ClassifierSettings()

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: Any) -> Any:
        """NAME:COLUMN as a name and a column, NAME:COLUMN=TAG as these and a tag."""
        return parted(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _tags_are_two_classes(self) -> Self:
        """A tag is there or not."""
        if self.tag and self.kind == "scale":
            raise ValueError("tag excludes kind: scale, a tag is there or not")
        return self


class Config(Strict):
    """Everything needed to run again. In a file, paths are relative to the folder the file is in.

    A single control may be written without the list: `control: NAME`, with its other settings beside it.

    Args:
        prior: a pipeline folder, or "digits", the embedded one.
        unconditional: ask a class-conditional prior for its null class only.
        prompts: of a prior that is given text, its conditions c; or a file of them, one a line. null takes those the
            data have in their column of c.
        guidance: of classifier-free guidance, part of such a prior; null for the pipeline's default, 1 for none.
        negative_prompt: what the guidance leads away from.
        size: (height, width) of the images, of a prior that makes any; null for the one it was trained on.
        controls: the new controls, trained together.
        classes: the prior's classes that are trained and certified, null for an unconditional prior.
        kl_budget: nats the target may lie away from the prior; γ is lowered until it does. null leaves γ as it is.
        patience: a learner stops after so many probes in turn without a better control; null lets it finish.
        max_skipped: batches in turn that a learner may leave out because a loss, a gradient or a reward is not finite;
            then it stops, and the best control so far is kept.
        checkpoint: updates after which a training is saved, so that it can be resumed; each probe brings it as well. A
            signal saves what was not, but for a tenth as many updates.
        track: whom the figures of the training are told: tensorboard, wandb and whatever else accelerate knows.
        device: of prior, p̂ and paths; "auto" takes an accelerator of CUDA if there is one.
        mixed_precision: of the prior's network in training and sampling, by autocast. Probes and the certificate are in
            float32: what two predictions differ by is mostly rounding in bfloat16.
        micro_batch: samples that go through the network at once while a gradient is kept; null for all of an update's.
            What is trained does not depend on it, memory does.
        offload: keep the paths that `adjoint` and `ppo` learn from in CPU memory, all but those of a micro-batch.
        vae_tiling: decode large images in tiles, which are not the whole's to the last digit.
        rank, lora_alpha, lora_targets: of a control's adapter; its scale is alpha/rank, 1 if null. Names or endings of
            names of the layers it changes; null for those of the network's family.
    """

    prior: str
    unconditional: bool = False
    prompts: list[str] | None = Field(None, min_length=1)
    guidance: float | None = Field(None, ge=1)
    negative_prompt: str = ""
    size: tuple[PositiveInt, PositiveInt] | None = None
    controls: list[ControlSettings] = Field(min_length=1)
    classes: list[int] | None = Field(None, min_length=1)
    seed: int = Field(0, ge=0, lt=2**32)
    gamma: float = Field(1.0, ge=0)
    kl_budget: float | None = Field(None, gt=0)
    steps: int = Field(20, ge=1)
    sigma_end: float = Field(0.05, gt=0, lt=1)
    time_power: float = Field(2.0, ge=1)
    device: str = "auto"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    micro_batch: int | None = Field(None, ge=1)
    offload: bool = False
    vae_tiling: bool = False
    rank: int = Field(64, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    lora_targets: list[str] | None = Field(None, min_length=1)
    learners: list[LearnerName] = Field(["weighted", "adjoint"], min_length=1)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    patience: int | None = Field(None, ge=1)
    max_skipped: int = Field(5, ge=0)
    checkpoint: int = Field(50, ge=1)
    track: list[str] = Field(default_factory=list)
    weighted: WeightedSettings = WeightedSettings()
    adjoint: AdjointSettings = AdjointSettings()
    backprop: BackpropSettings = BackpropSettings()
    ppo: PPOSettings = PPOSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_no(cls, value: Any) -> Any:
        """YAML takes a bare no for false."""
        return "no" if value is False else value

    @classmethod
    def of(cls, values: Any, source: str = "settings") -> Self:
        config = super().of(listed(values), source)
        names = config.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{source}: two controls are named {twice.pop()!r}. Name every control once.")
        return config

    @property
    def names(self) -> list[str]:
        """Of the controls, in order."""
        return [control.name for control in self.controls]

    def settings_of(self, name: str) -> ControlSettings:
        """Of the control of that name."""
        return next(control for control in self.controls if control.name == name)

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Read a whole config.yaml; raises ValueError as `of` does."""
        return cls.of(read_settings(path), str(path))

    def quick(self) -> "Config":
        """A smoke test of the same job: a twentieth of the training, a quarter of the classifiers', fewer samples."""
        values = self.model_dump()
        for control in values["controls"]:
            if not (control["classifier_from"] or control["settled_from"]):
                control["classifier"]["updates"] = max(1, control["classifier"]["updates"] // 4)
        for learner in get_args(LearnerName):
            values[learner]["updates"] = max(1, values[learner]["updates"] // 20)
        values["weighted"]["renoising"] //= 20
        values["weighted"]["cache"] = max(1, values["weighted"]["cache"] // 10)
        values["evaluation"] = {"prior_samples": 200, "paths": 160, "probes": 2, "sweep_paths": 40}
        return Config.of(values)

    def write(self, path: Path) -> None:
        """Write it whole; paths inside the file's folder are written relative to it."""
        folder = path.parent.resolve()

        def shortened(name: str) -> str:
            return Path(name).relative_to(folder).as_posix() if Path(name).is_relative_to(folder) else name

        write_text(path, yaml.safe_dump(with_paths(self.model_dump(), shortened), sort_keys=False))


def listed(values: Any) -> Any:
    """Settings with the keys of a single control, where they are given without the list, put into it.

    Raises:
        ValueError: such keys beside a list of several controls.
    """
    single = ("control", *ControlSettings.model_fields)
    if not isinstance(values, dict) or not (own := [key for key in single if key in values and key != "name"]):
        return values
    controls = values.get("controls") or [{}]
    if not isinstance(controls, list) or len(controls) > 1:
        raise ValueError(f"{', '.join(own)}: there are several controls. Give it for each of them, under controls.")
    given = {"name" if key == "control" else key: values[key] for key in own}
    return {**{k: v for k, v in values.items() if k not in own}, "controls": [merged(controls[0], given)]}


def parted(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a control with the columns and the tag that stand in its names by keys of their own."""
    values = dict(values)
    for name, column in (("name", "column"), ("condition", "condition_column")):
        if ":" in str(values.get(name) or ""):
            values[name], _, values[column] = values[name].partition(":")
    if "=" in str(values.get("column") or ""):
        values["column"], _, values["tag"] = values["column"].partition("=")
    return values


def code_of(values: Any) -> set[str]:
    """What settings name of code that is not ours and that they would run, each MODULE:FUNCTION."""
    controls = values.get("controls") if isinstance(values := listed(values), dict) else None
    found: set[str] = set()
    for one in map(parted, filter(lambda one: isinstance(one, dict), controls if isinstance(controls, list) else [])):
        classifier = one.get("classifier")
        factory = classifier.get("factory") if isinstance(classifier, dict) else None
        columns = [text for key in ("column", "condition_column") if ":" in (text := str(one.get(key) or ""))]
        found |= {text for text in columns if not text.startswith(OURS)} | ({str(factory)} if factory else set())
    return found


def check_code(values: Any, named: Any, trust: bool, source: Path | None) -> None:
    """Refuse settings that would run code which the user has not named.

    Args:
        values: all settings.
        named: those of the command line.
        trust: whether any code may run.
        source: what an error calls the settings.

    Raises:
        ValueError: what would run, and how to let it.
    """
    if not trust and (foreign := code_of(values) - code_of(named)):
        raise ValueError(f"{source} runs code: {', '.join(sorted(foreign))}. If you know it, pass --trust.")


def with_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Settings with every path in them changed, also those of the controls; a name on the hub is no path."""
    out = dict(values)
    for key in PATHS:
        if isinstance(value := values.get(key), str) and value != EMBEDDED:
            there = change(value)
            out[key] = value if HUB.fullmatch(value) and not Path(there).exists() else there
    if isinstance(values.get("classifier"), dict):
        out["classifier"] = with_paths(values["classifier"], change)
    if isinstance(out.get("controls"), list):
        out["controls"] = [with_paths(one, change) if isinstance(one, dict) else one for one in out["controls"]]
    return out


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, which need not be all; its paths made absolute.

    Raises:
        ValueError: not YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold KEY: VALUE lines. A fresh run's config.yaml shows every key.")
    return with_paths(values, lambda name: os.path.abspath(path.parent / name))


def merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, group by group."""
    out = dict(defaults)
    for key, value in given.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
