"""Describe a training by one config: everything needed to run it again."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    create_model,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from ..data.sources import HUB
from ..evaluate.rulers.table import checked_ruler
from ..learn.adjoint import Adjoint
from ..learn.backprop import Backprop
from ..learn.contrast import Contrast
from ..learn.ppo import PPO
from ..learn.table import LEARNERS, check_learners
from ..learn.weighted import Weighted
from ..prior.source import EMBEDDED
from ..reward.classifiers import ClassifierSettings
from ..system.files import one_line, write_text
from ..system.progress import seconds_in
from ..system.strict import Strict, merged, with_key

OURS = ("ctrl_diffusion.data.rules:", "ctrl_diffusion.rules:")  # rules that ship with the package; the latter in 0.1
PATHS = ("prior", "prompts", "data", "judge_data", "classifier_from", "settled_from", "backbone")


def checked_time(text: str) -> str:
    """Return a time; refuse (ValueError) what is none."""
    seconds_in(text)
    return text


class EvaluationSettings(Strict):
    """Say how much is sampled to probe, certify and report a control.

    Args:
        prior_samples: samples of the prior for each of its conditions. Cost: so many chains of the prior for each c.
        paths: paths of the policy, over all (c, y), on which the certificate is computed. Cost: so many chains.
        probes: how often the control is measured during the training of a learner. Cost: a few chains each.
        sweep_paths: paths for each strength and each number of steps in the report. Cost: eight times as many chains.
    """

    prior_samples: int = Field(1000, ge=8)
    paths: int = Field(2000, ge=1)
    probes: int = Field(10, ge=1)
    sweep_paths: int = Field(200, ge=1)


class ControlSettings(Strict):
    """Describe one control and its labelled images.

    Args:
        name: the name. NAME:COLUMN names its column as well, NAME:COLUMN=TAG the tag too, NAME:MODULE:FUNCTION a rule.
        column: the column of y, if its name is another; or a rule that computes y from the image (`data/rules.py`).
        tag: makes y "no" or "yes": whether the column, a list of tags, has this one. For multi-label data give several.
        kind: "scale" for numbers that are requested by value; "auto" treats more than 64 different numbers as a scale.
        data: a folder, a table, or a dataset on the hub; not read if `settled_from` is set.
        judge_data: other images to fit the judge on, unless `classifier_from` brings one; null reserves part of `data`.
        condition: the prior's class c, if the data have it: NAME, or NAME:COLUMN.
        condition_column: the column of c, if its name is another.
        image: the column of the images, if it is not found by its name or contents.
        missing: "bad" makes a row bad whose label is blank or a word such as NaN, none or ?; "keep" takes such words
            for classes.
        skip_bad: leave out rows that cannot be used, and count them in a warning.
        ruler: a built-in measure of the true y, by its name in `evaluate/rulers/table.py`; null lets a judge measure
            it, fitted on labels of its own.
        classifier_from: a folder that `ctrl classifier` wrote; null fits a classifier.
        settled_from: a run that has trained this control already; its control is loaded and not trained further.
        classifier: how p̂ and the judge are fitted; see its keys.
        interval: noise levels (σ_off, σ_on) between which the control speaks; outside the chain is the prior's. "auto"
            measures where y is decided, and the figures are written in its place; "none" is everywhere.
        sees_condition: false evaluates the control where the prior has no condition c and adds what it changes there to
            x̂ under c, so that it holds for c it never saw. Cost: three evaluations for one, and no files for other
            programs.
    """

    name: str = Field(min_length=1)
    column: str | None = None
    tag: str | None = Field(None, min_length=1)
    kind: Literal["auto", "classes", "scale"] = "auto"
    data: str
    judge_data: str | None = None
    condition: str | None = None
    condition_column: str | None = None
    image: str | None = Field(None, min_length=1)
    missing: Literal["bad", "keep"] = "bad"
    skip_bad: bool = False
    ruler: Annotated[str, AfterValidator(checked_ruler)] | None = None
    classifier_from: str | None = None
    settled_from: str | None = None
    classifier: ClassifierSettings = ClassifierSettings()
    interval: Literal["auto", "none"] | tuple[float, float] = "none"
    sees_condition: bool = True

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: Any) -> Any:
        return split_names(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _tags_are_two_classes(self) -> Self:
        if self.tag and self.kind == "scale":
            raise ValueError("tag excludes kind: scale, a tag is there or not")
        return self


class Config(Strict):
    """Hold everything needed to run a training again. In a file, paths are relative to the file's folder.

    A single control may be written without the list: `control: NAME`, with its other settings beside it.

    Args:
        prior: a pipeline folder, a pipeline on the hub, or "digits" or "letters", the embedded models.
        unconditional: use a class-conditional prior by its null class only.
        prompts: conditions c of a prior of text, or their file, one a line; null: the data's. Over 64 make a file.
        guidance: scale of classifier-free guidance; null for the pipeline's, 1 for none. Cost: twice the evaluations.
        negative_prompt: the prompt that guidance leads away from.
        size: (height, width) of the images, for a prior of any size; null for its own. Cost: time and memory.
        controls: the controls, trained together.
        classes: the prior's classes or, by number, prompts that are trained or held out; "all" for all; null for an
            unconditional prior.
        hold_out: of these, what is kept out of training and certified apart: how many, or which. With any, or more than
            64 classes, those trained on are a population, of which figures are of 64. null is a tenth of more than 64.
        weights: how often each of `classes`, in order, is drawn in training as a population; null for equally often.
        seed: seed of every random number; the same seed gives the same bytes.
        gamma: γ, the weight of log p̂ in the reward; 1 aims at the posterior itself.
        gammas: other γ that the control is trained for as well, such as [0.5, 1, 2, 4]: sampling takes any between the
            smallest and the largest. Half of the training is at `gamma`. null for `gamma` alone. Cost: a certificate
            for each.
        kl_budget: nats the target may lie away from the prior; γ is lowered until it does. null keeps γ. A warning says
            where too few prior samples count to measure it: they show log(samples/30) nats at most.
        steps: steps of the chain that is trained and certified. Cost: time of sampling and certifying in proportion.
        sigma_end: noise level at which the chain ends and x_0 is read out.
        time_power: spacing of the chain's times; a larger power puts more steps near the end.
        focus: noise levels (low, high) that get a number of times as many of the steps, at the cost of all others;
            "auto" takes those where the controls speak, and the figures are written in its place.
        device: where all is computed; "auto" takes a CUDA accelerator if there is one.
        mixed_precision: autocast of the prior's network in training and sampling. Probes and the certificate use
            float32, since the difference of two predictions is mostly rounding in bfloat16.
        micro_batch: samples in the network at once under a gradient; null for all. Cost: memory in proportion.
        offload: keep the paths of `adjoint` and `ppo` in CPU memory, except those of a micro-batch. Cost: copies.
        vae_tiling: decode large images in tiles; the pixels differ slightly from those decoded at once.
        rank: rank of a control's LoRA adapter. Cost: memory of weights and optimiser, and size of the file.
        lora_alpha: the adapter's scale is lora_alpha / rank; null for 1.
        lora_targets: names, or endings of names, of the layers that get an adapter; null for those of the model family.
        learners: the learners, trained one after the other. Cost: time of each.
        time: time such as 30m for training alone; becomes `budget` and the updates of each learner at the start.
        updates: updates of all learners together, shared in proportion to theirs when training begins.
        budget: the network's evaluations that `time` bought; what a learner leaves of its share goes to the next.
        more: updates of each further stage of the last learner, as `ctrl train --resume RUN --time 1h` adds them.
        ema_decay: decay of the exponential moving average of the weights.
        decay: how the first learner's rate falls. "probes" lowers it slowly, whatever its updates, while J or reward of
            averaged weights gain over the last `patience` probes, and lets it decay to zero once they do not, or once
            the updates are nearly used up, which are a limit then. "cosine" lets it decay over all updates, as do the
            rates of other learners, and so does a patience of null.
        patience: probes that gain nothing, see `decay`; at a cosine, stop a learner when J and reward of its last
            `patience` probes are on average no higher than before (`state.ProbeHistory` derives the default). One that
            comes after another also stops when its first probes are all worse than what it began with. null never
            stops.
        max_skipped: non-finite batches in turn that may be skipped; one more stops the learner at its best control.
        checkpoint: updates between saved states; one that a signal saves is at most a tenth as old. Cost: a file each.
        track: trackers that receive the figures of training: tensorboard, wandb or any other that accelerate supports.
        contrast, weighted, adjoint, backprop, ppo: settings of a learner.
        evaluation: how much is sampled to probe, certify and report.
    """

    prior: str
    unconditional: bool = False
    prompts: list[str] | str | None = Field(None, min_length=1)
    guidance: float | None = Field(None, ge=1)
    negative_prompt: str = ""
    size: tuple[PositiveInt, PositiveInt] | None = None
    controls: list[ControlSettings] = Field(min_length=1)
    classes: list[int] | Literal["all"] | None = Field(None, min_length=1)
    hold_out: NonNegativeInt | list[int] | None = None
    weights: list[PositiveFloat] | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    gamma: float = Field(1.0, ge=0)
    gammas: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=1)
    kl_budget: float | None = Field(None, gt=0)
    steps: int = Field(20, ge=1)
    sigma_end: float = Field(0.05, gt=0, lt=1)
    time_power: float = Field(2.0, ge=1)
    focus: Literal["auto", "none"] | tuple[float, float, float] = "none"
    device: str = "auto"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    micro_batch: int | None = Field(None, ge=1)
    offload: bool = False
    vae_tiling: bool = False
    rank: int = Field(64, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    lora_targets: list[str] | None = Field(None, min_length=1)
    learners: Annotated[list[str], AfterValidator(check_learners)] = Field(["contrast", "adjoint"], min_length=1)
    time: Annotated[str, AfterValidator(checked_time)] | None = None
    updates: int | None = Field(None, ge=1)
    budget: int | None = Field(None, ge=1)
    more: list[PositiveInt] = Field(default_factory=list)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    decay: Literal["cosine", "probes"] = "cosine"
    patience: int | None = Field(4, ge=1)
    max_skipped: int = Field(5, ge=0)
    checkpoint: int = Field(50, ge=1)
    track: list[str] = Field(default_factory=list)
    contrast: Contrast.Settings = Contrast.Settings()
    weighted: Weighted.Settings = Weighted.Settings()
    adjoint: Adjoint.Settings = Adjoint.Settings()
    backprop: Backprop.Settings = Backprop.Settings()
    ppo: PPO.Settings = PPO.Settings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    @model_validator(mode="after")
    def _gammas_are_several(self) -> Self:
        if self.gammas is None:
            return self
        if self.kl_budget:
            raise ValueError("gammas excludes kl_budget, which chooses a single γ")
        if not self.gamma or len(self.trained_gammas) < 2:
            raise ValueError(f"gammas must name another γ beside gamma: {self.gamma:g}, which must not be 0")
        return self

    @property
    def follows_probes(self) -> bool:
        """Whether the first learner goes on while its probes gain, its updates being a limit."""
        return self.decay == "probes" and self.patience is not None

    @property
    def grid_focus(self) -> tuple[float, float, float] | None:
        """The focus of the chain's grid; None where it has none, or none is chosen yet."""
        return None if isinstance(self.focus, str) else self.focus

    @property
    def trained_gammas(self) -> tuple[float, ...]:
        """Every γ the control is trained for, first the run's; none where that is the only one."""
        if self.gammas is None:
            return ()
        return (self.gamma, *(gamma for gamma in sorted(set(self.gammas)) if gamma != self.gamma))

    @classmethod
    def from_values(cls, values: Any, source: str = "settings") -> Self:
        """Check values, which may have a single control without the list; raises ValueError as `Strict` does."""
        # a learner that a package elsewhere added to LEARNERS has a group of settings like ours
        rows: dict[str, Any] = {name: row.Settings for name, row in LEARNERS.items() if name not in cls.model_fields}
        added: dict[str, Any] = {name: (group, group()) for name, group in rows.items()}
        whole: Any = create_model("Config", __base__=cls, **added) if added else cls
        config: Any = super(Config, whole).from_values(list_controls(values), source)
        names = config.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{source}: two controls are named {twice.pop()!r}. Name every control once.")
        return cast(Self, config)

    @property
    def names(self) -> list[str]:
        """The names of the controls, in order."""
        return [control.name for control in self.controls]

    def settings_of(self, name: str) -> ControlSettings:
        return next(control for control in self.controls if control.name == name)

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Read a whole config.yaml; raises ValueError as `from_values` does."""
        return cls.from_values(read_settings(path), str(path))

    def write(self, path: Path) -> None:
        """Write every key; paths inside the file's folder become relative to it."""
        folder = path.parent.resolve()

        def shorten(name: str) -> str:
            return Path(name).relative_to(folder).as_posix() if Path(name).is_relative_to(folder) else name

        write_text(path, yaml.safe_dump(map_paths(self.model_dump(), shorten), sort_keys=False))


def list_controls(values: Any) -> Any:
    """Return settings with the keys of a single control moved into `controls`; refuse them beside several controls."""
    single = ("control", *ControlSettings.model_fields)
    if not isinstance(values, dict) or not (keys := [key for key in single if key in values and key != "name"]):
        return values
    controls = values.get("controls") or [{}]
    if not is_list_of_groups(controls):
        return values  # for the config to refuse
    if len(controls) > 1:
        raise ValueError(f"{', '.join(keys)}: there are several controls. Give it for each of them, under controls.")
    control = {"name" if key == "control" else key: values[key] for key in keys}
    return {**{k: v for k, v in values.items() if k not in keys}, "controls": [merged(controls[0], control)]}


def is_list_of_groups(values: Any) -> bool:
    """Return whether `controls` are a list with a group of keys for each."""
    return isinstance(values, list) and all(isinstance(group, dict) for group in values)


def check_present(values: dict[str, Any], *names: str) -> None:
    """Refuse settings with listed controls that lack one of `names`, or a control's data or name."""
    controls = values.get("controls") or [{}]
    if not is_list_of_groups(controls):
        raise ValueError(f"controls must be a list with a group of keys for each control, got {controls!r}.")
    wholes = {name: values.get(name) for name in names}
    wholes |= {option: all(row.get(key) for row in controls) for option, key in (("data", "data"), ("control", "name"))}
    if missing := next((name for name, value in wholes.items() if not value), None):
        raise ValueError(f"--{missing} is missing. Give it, or a --config that has it.")


def split_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a control with the columns and the tag in its names moved to their own keys."""
    values = dict(values)
    for name, column in (("name", "column"), ("condition", "condition_column")):
        if ":" in str(values.get(name) or ""):
            values[name], _, values[column] = values[name].partition(":")
    if "=" in str(values.get("column") or ""):
        values["column"], _, values["tag"] = values["column"].partition("=")
    return values


def with_overrides(values: dict[str, Any], overrides: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file under those of `-o KEY=VALUE`, and both under a command's own options."""
    values = list_controls({**values, **options})
    for text in overrides:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"-o {text}: give KEY=VALUE, such as adjoint.clip=5.")
        try:
            values = with_key(values, key.split("."), yaml.safe_load(value))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"-o {text}: {one_line(error)}") from error
    for i, row in enumerate(options.get("controls", [])):
        for key, value in row.items():
            values = with_key(values, ["controls", str(i), key], value)
    return {**values, **{key: value for key, value in options.items() if key != "controls"}}


def named_code(values: Any) -> set[str]:
    """Return the code that settings name and that is not ours, each MODULE:FUNCTION; it would run."""
    controls: Any = list_controls(values).get("controls") if isinstance(values, dict) else None
    code: set[str] = set()
    for row in map(split_names, controls) if is_list_of_groups(controls) else ():  # else the config refuses it
        classifier = row.get("classifier")
        factory = classifier.get("factory") if isinstance(classifier, dict) else None
        columns = [text for key in ("column", "condition_column") if ":" in (text := str(row.get(key) or ""))]
        code |= {text for text in columns if not text.startswith(OURS)} | ({str(factory)} if factory else set())
    return code


def check_code(
    values: Any, options: dict[str, Any], trust: bool, source: Path | None, overrides: Sequence[str] = ()
) -> None:
    """Refuse settings that would run code, unless `trust` is set or the command line (`options`, `-o`) names it."""
    foreign = [] if trust else sorted(named_code(values) - named_code(options))
    foreign = [code for code in foreign if not any(text.endswith((f"={code}", f":{code}")) for text in overrides)]
    if foreign:
        raise ValueError(f"{source} runs code: {', '.join(foreign)}. If you know it, pass --trust.")


def map_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return settings with every path in them changed, also those of the controls; a name on the hub is no path."""
    out = dict(values)
    for key in PATHS:
        if isinstance(value := values.get(key), str) and value not in EMBEDDED:
            path = change(value)
            out[key] = value if HUB.fullmatch(value) and not Path(path).exists() else path
    if isinstance(values.get("classifier"), dict):
        out["classifier"] = map_paths(values["classifier"], change)
    if isinstance(out.get("controls"), list):
        out["controls"] = [map_paths(row, change) if isinstance(row, dict) else row for row in out["controls"]]
    return out


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file of some or all settings; its paths become absolute."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold KEY: VALUE lines. A fresh run's config.yaml shows every key.")
    return map_paths(values, lambda name: os.path.abspath(path.parent / name))
