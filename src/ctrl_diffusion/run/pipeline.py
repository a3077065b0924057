"""Sample a prior with its controls as a pipeline of diffusers, from a folder that `ctrl export` wrote.

An exported folder has a copy of this file as its pipeline.py, and of every file of ours that it imports: to load it,
diffusers and peft are enough.
"""

import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import numpy_to_pil
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..chain.noise import normal
from ..chain.rollout import rollout
from ..control.kinds import load_control
from ..control.policy import Policy
from ..prior.families import FAMILIES, PARTS
from ..prior.loader import quiet
from ..prior.prior import Prior

CONTROLS = "controls"  # the folder they are in
OURS = (f"{CONTROLS}/**/*", "*.py", "README.md", "grid.png")  # what an exported folder has beside diffusers' parts
OUTPUTS = ("pil", "np", "pt")
CLASS = ("pipeline", "ControlledPipeline")  # the file and the class that diffusers is to load


def with_parts(init: Callable[..., None]) -> Callable[..., None]:
    """Put the names of PARTS into a constructor's signature, where diffusers looks for them."""
    *parameters, _ = inspect.signature(init).parameters.values()
    parts = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in PARTS]
    init.__signature__ = inspect.Signature([*parameters, *parts])
    return init


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Give a network inside the layers, and names of weights, that it had before controls were attached."""
    adapted = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        network.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in adapted:
            network.set_submodule(name, layer)


class ControlledPipeline(DiffusionPipeline):
    """Sample p(x | c, y): `pipe("a horse", controls={"texture": "checks"}, control_strength=1.2)`.

    `base` is the class of the pipeline the controls were trained on, with its scheduler, its flags (such as what SDXL
    takes for no text) and its parts, by the names in PARTS; `chain` is the run's: steps, sigma_end, time_power, gamma,
    guidance, negative_prompt, size, unconditional, controls; `id2label` names the classes.
    """

    _optional_components = list(PARTS)  # noqa: RUF012 — diffusers reads it off the class

    @with_parts
    def __init__(
        self, scheduler: Any, base: str = "", flags: dict[str, bool] | None = None,
        chain: dict[str, Any] | None = None, id2label: dict[str, str] | None = None, **parts: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(scheduler=scheduler, **{name: parts.get(name) for name in PARTS})
        self.register_to_config(base=base, flags=flags, chain=chain, id2label=id2label)
        self._ready: tuple[Prior, Policy] | None = None

    @property
    def policy(self) -> Policy:
        """The prior with its controls, which are loaded at the first use."""
        return self._opened()[1]

    def _opened(self) -> tuple[Prior, Policy]:
        if self._ready is None:
            chain = self.config.chain
            prior = Prior.from_pipeline(self._parts(), self.config.base, chain["size"], self.config.id2label)
            if prior.text:
                prior = prior.with_prompts([""], chain["guidance"], chain["negative_prompt"])
            prior = prior.unconditional() if chain["unconditional"] else prior
            folder = self._folder() / CONTROLS
            controls = [load_control(folder / name, prior.denoiser, "Export it again.") for name in chain["controls"]]
            self._ready = prior, Policy(prior.denoiser, *controls, gamma=chain.get("gamma", 1.0))
        return self._ready

    def _parts(self) -> Any:
        """Return the pipeline the controls were trained on, or its parts if the family needs no more."""
        if FAMILIES[self.config.base].ALONE:
            return SimpleNamespace(**self.components)
        kind = getattr(diffusers, self.config.base)
        parameters = inspect.signature(kind).parameters
        needed = [name for name, p in parameters.items() if p.default is p.empty or name in self.components]
        with quiet():
            return kind(**{name: self.components.get(name) for name in needed}, **(self.config.flags or {}))

    def _folder(self) -> Path:
        name = self.config._name_or_path
        if Path(name).is_dir():
            return Path(name)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[f"{CONTROLS}/*", *OURS]))

    @property
    def _network(self) -> nn.Module:
        return self.components[FAMILIES[self.config.base].PARTS[0]]

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """Save as diffusers does, with the controls and the code, so that the folder loads as this one did.

        Raises:
            ValueError: the folder the pipeline was loaded from is not there any more.
        """
        source, target = self._folder(), Path(save_directory)
        if not (source / CONTROLS).is_dir():
            gone = f"{source}, where this pipeline was loaded from, has no {CONTROLS}/ to save"
            raise ValueError(f"{gone}. Bring it back.")
        for file in sorted(path for pattern in OURS for path in source.glob(pattern) if path.is_file()):
            copy = target / file.relative_to(source)
            if not (copy.exists() and copy.samefile(file)):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        with without_adapters(self._network):
            super().save_pretrained(save_directory, *arguments, **options)

    def to_json_string(self) -> str:
        """Return model_index.json; it names the file of the class, where diffusers would name the class alone."""
        index = {**json.loads(super().to_json_string()), "_class_name": CLASS}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def to(self, *arguments: Any, **options: Any) -> "ControlledPipeline":
        """Move or convert as diffusers does, with the controls, which keep their precision."""
        with without_adapters(self._network):
            super().to(*arguments, **options)
        if self._ready:
            self.policy.to(self.device)
        return self

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Refuse (ValueError) to move parts about between calls."""
        reason = "a control changes the network's weights where they are, so parts cannot be offloaded"
        raise ValueError(f"{reason}. Use pipe.to(device) or pipe.to(torch.bfloat16).")

    enable_sequential_cpu_offload = enable_group_offload = enable_model_cpu_offload

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = None, controls: dict[str, str | float] | str | float | None = None,
        control_strength: float = 1.0, class_labels: Sequence[int | str] | int | str | None = None,
        num_images_per_prompt: int = 1, num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None, output_type: str = "pil",
        return_dict: bool = True, control_gamma: float | None = None,
    ) -> ImagePipelineOutput | tuple:  # fmt: skip
        """Draw samples.

        Args:
            prompt: or prompts, of a model that is given text.
            controls: name → value, as `ctrl sample --set` takes them, or of a single control the value; one left out is
                null.
            control_strength: w, 0 the prior, 1 as trained, more extrapolates; an evaluation more a step but at 0 and 1.
            class_labels: of a model that is given classes, by number or name.
            num_images_per_prompt: of each prompt or class.
            num_inference_steps: of the reverse process; as trained if None.
            generator: of all noise; or a list of them, one for each image.
            output_type: "pil", "np" (n, H, W, C) or "pt" (n, C, H, W), the last two in [0, 1].
            return_dict: an `ImagePipelineOutput`, else a tuple.
            control_gamma: γ of the target, of controls trained for several; one evaluation a step; as trained if None.

        Raises:
            ValueError: an unknown control, value, class or output type; a prompt or class missing or not wanted; a
                number that is none; a γ that a control was not trained for.
        """
        check_call(num_images_per_prompt, num_inference_steps, control_strength, output_type)
        prior, policy = self._opened()
        condition, other = (prompt, class_labels) if prior.text else (class_labels, prompt)
        if (condition is None) != (prior.classes is None) or other is not None:
            wants = "a prompt" if prior.text else "no condition" if prior.classes is None else "class_labels"
            raise ValueError(f"this model takes {wants}.")
        cond, n = {}, num_images_per_prompt
        if condition is not None:
            rows = condition.tolist() if isinstance(condition, (Tensor, np.ndarray, np.generic)) else condition
            rows = [rows] if isinstance(rows, (str, int)) else list(rows)
            if not rows:
                raise ValueError(f"{'prompt' if prior.text else 'class_labels'} is an empty list. Give at least one.")
            c = torch.tensor([self._class(str(row)) for row in rows]).repeat_interleave(num_images_per_prompt)
            cond, n = {"c": c}, len(c)
        labels = {name: torch.full((n,), self._label(name, y)) for name, y in self._named(controls).items()}
        generator = checked_generator(generator, n)
        chain = self.config.chain
        steps, focus = num_inference_steps or chain["steps"], chain.get("focus")  # exports of 0.1 have none
        times = prior.denoiser.times(steps, chain["sigma_end"], chain["time_power"], focus)
        x_1 = normal((n, *policy.shape), policy, generator)
        options = {"cond": cond, "labels": labels or None, "strength": control_strength, "gamma": control_gamma}
        x_0 = rollout(policy, x_1, times, generator=generator, **options).x_0
        images = formatted(prior.decode(x_0).clamp(-1, 1), output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _class(self, name: str) -> int:
        try:
            return self._opened()[0].number_of(name)
        except ValueError as error:
            raise ValueError(f"class_labels {error}") from error

    def _named(self, controls: Any) -> Mapping[str, str | float]:
        """Return controls as name → value; of a single control the value alone will do."""
        if controls is None or isinstance(controls, Mapping):
            return controls or {}
        names = list(self.policy.controls)
        first = self.policy.controls[names[0]]
        if isinstance(controls, (str, Real)) and len(names) == 1 and controls not in {*names} - {*first.values}:
            return {names[0]: controls}
        example, has = {names[0]: first.values[-1]}, f"the control{'s' * (len(names) > 1)} {', '.join(names)}"
        raise ValueError(f"controls={controls!r}: this pipeline has {has}. Give a value by name, such as {example}.")

    def _label(self, name: str, value: str | float) -> int | float:
        controls = self.policy.controls
        if name not in controls:
            raise ValueError(f"unknown control {name!r}; this pipeline has: {', '.join(controls)}.")
        return controls[name].space.label_of(value, name)


def check_call(images: int, steps: int | None, strength: float, output_type: str) -> None:
    """Refuse (ValueError) numbers and an output type of a call that mean nothing."""
    for name, count in (("num_images_per_prompt", images), ("num_inference_steps", 1 if steps is None else steps)):
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {count!r}.")
    if not isinstance(strength, Real) or not math.isfinite(strength):
        raise ValueError(f"control_strength must be a number, got {strength!r}. Use 1.0 for as trained.")
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}.")


def checked_generator(generator: Any, n: int) -> torch.Generator | list[torch.Generator] | None:
    """Return a generator, or a list with one for each of n images; refuse (ValueError) anything else."""
    several = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(each, torch.Generator) for each in several):
        raise ValueError(f"generator must be a torch.Generator, or a list of them, got {generator!r}.")
    if isinstance(generator, (list, tuple)) and len(several) not in (1, n):
        raise ValueError(f"generator: a list has one for each image; got {len(several)}, for {n} images.")
    return several[0] if len(several) == 1 else several


def formatted(x: Tensor, kind: str) -> Any:
    """Convert images (n, C, H, W) in [−1, 1] to an output type of diffusers."""
    if kind == "pt":
        return (x + 1) / 2
    pixels: np.ndarray = ((x + 1) / 2).permute(0, 2, 3, 1).cpu().float().numpy()
    return pixels if kind == "np" else numpy_to_pil(pixels)
