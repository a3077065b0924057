"""Policy = frozen prior + controls; everything a control does vanishes when its label is null.

A control adds to the prior where the prior's family lets it: one PEFT LoRA adapter, and one zero-initialised embedding
added to the network's time/class embedding by a forward hook. While a control is active its layers have the weights
W + BA; outside, the prior's own: no second copy, and bit-identical to the bare network.
"""

import json
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .denoise import Denoiser, NetworkDenoiser
from .files import read_tensors, write_json, write_tensors
from .scale import is_number, places

NULL = -1
Labels = dict[str, Tensor]


class Control(nn.Module, ABC):
    """One control y with classes 0 … size − 1; NULL (−1) means uncontrolled.

    y may also be on a scale: its values are then evenly spaced levels 0 … size − 1, and a label is a place between
    them, a float.

    Args:
        name: the label's name.
        values: what the user calls the classes or levels, in order.
        scale: whether y is on a scale.
    """

    settled = False  # whether it stays as it is while others are trained beside it

    def __init__(self, name: str, values: Sequence[str], scale: bool = False) -> None:
        super().__init__()
        self.name, self.values, self.size, self.scale = name, tuple(values), len(values), scale

    def settle(self) -> "Control":
        """Never train it again, whatever is trained beside it."""
        self.settled = True
        for p in chain.from_iterable(self.parameter_groups().values()):
            p.requires_grad_(False)
        return self

    def label_of(self, value: str | float) -> int | float:
        """The class number of a value by its name, or its place on a scale.

        Raises:
            ValueError: there is no such value.
        """
        text = str(value)
        if self.scale:
            place = float(places(float(text), self.values)) if is_number(text) else NULL
            if not 0 <= place <= self.size - 1:
                raise ValueError(f"{self.name} must be a number in {self.values[0]} … {self.values[-1]}, got {text!r}.")
            return place
        if text not in self.values:
            raise ValueError(f"{self.name} must be one of {', '.join(self.values)}, got {text!r}.")
        return self.values.index(text)

    @abstractmethod
    def active(self, y: Tensor) -> AbstractContextManager[None]:
        """A context within which the prior it is attached to obeys y (B,)."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by kind ("embedding", "adapter"): they need separate learning rates."""

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the parameters must not change, and nobody asks for their gradient: only for that of x."""
        asked = [(p, p.requires_grad) for group in self.parameter_groups().values() for p in group]
        for p, _ in asked:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p, before in asked:
                p.requires_grad_(before)

    def embedded(self, table: nn.Embedding, y: Tensor) -> Tensor:
        """Rows (B, width) of a table for labels y: null is the last, which stays zero; between levels on a line."""
        y = y.to(table.weight.device, non_blocking=True)
        if not y.is_floating_point():
            return table(torch.where(y == NULL, self.size, y))
        low = y.clamp(0, self.size - 2).long()
        between = torch.lerp(table(low), table(low + 1), (y - low).to(table.weight)[:, None])
        return torch.where((y == NULL)[:, None], 0.0, between)


@dataclass
class Kept:
    """What a control computes once while its parameters stay as they are: W + BA of the prior's W, BA for any other."""

    sums: list[Tensor] | None = None
    differences: list[Tensor] | None = None


class LoRAControl(Control):
    """One LoRA adapter and one zero-initialised embedding table on a pre-trained network.

    Args:
        name: the label's name, also the adapter's.
        values: what the user calls the classes, in order.
        denoiser: the prior; its network is given the adapter, switched off.
        rank: rank of the adapter.
        seed: of the adapter's random half (the other half is zero).
        scale: whether y is on a scale.
        alpha: of the adapter, whose scale is α/rank; None for a scale of 1.
        targets: PEFT's target modules, names or endings of names; None for those of the network's family.

    Raises:
        ValueError: the denoiser does not say where a control enters it, or carries a control of that name already.
    """

    def __init__(
        self,
        name: str,
        values: Sequence[str],
        denoiser: NetworkDenoiser,
        rank: int = 64,
        seed: int = 0,
        scale: bool = False,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name, values, scale)
        if denoiser.site is None:
            raise ValueError("this prior names no site for a control. Give its NetworkDenoiser a ControlSite.")
        self.rank, self.alpha, self.targets = rank, alpha, targets and list(targets)
        # modules are named after it, and a module cannot be called "type" or have a dot in its name
        self.adapter = "control_" + re.sub(r"\W", "_", name)
        if any(isinstance(m, LoraLayer) and self.adapter in m.lora_A for m in denoiser.network.modules()):
            raise ValueError(f"this prior already carries a control {name!r}. Load the prior again for another one.")
        others = [(p, p.requires_grad) for key, p in denoiser.network.named_parameters() if "lora_" in key]
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets or denoiser.site.targets))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
            torch.default_generator.manual_seed(seed)
            names = [key for key, _ in denoiser.network.named_modules()]
            for target in targets or ():
                if not any(f".{key}".endswith(f".{target}") for key in names):
                    raise ValueError(f"lora_targets: the network has no layer whose name is or ends in {target!r}.")
            try:
                inject_adapter_in_model(config, denoiser.network, adapter_name=self.adapter)
            except ValueError as error:
                raise ValueError(f"lora_targets: {' '.join(str(error).split())[:200]}") from error
            self.table = nn.Embedding(self.size + 1, denoiser.site.width, padding_idx=self.size)
        self.to(denoiser.device)
        for p, before in others:  # peft takes every adapter but the newest for finished
            p.requires_grad_(before)
        nn.init.zeros_(self.table.weight)
        denoiser.network.eval()
        # not a registered child: the prior owns its network, the control only its own parameters
        self._denoiser, self._network = [denoiser], [denoiser.network]
        self._layers = [m for m in denoiser.network.modules() if isinstance(m, LoraLayer) and self.adapter in m.lora_A]
        for p in self.parameter_groups()["adapter"] if self._half else ():
            p.data = p.data.float()  # peft makes them as the layers are
        self._shift: Tensor | None = None
        self._kept: Kept | None = None
        for site in denoiser.site.embeddings:
            denoiser.network.get_submodule(site).register_forward_hook(self._add_shift)
        self._silence()

    def _add_shift(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self._shift is None:
            return output
        # a guided network is called with the rows twice, without and with the prompt: the control acts in both
        return output + self._shift.repeat(len(output) // len(self._shift), 1).to(output)

    def _silence(self) -> None:
        # the layers' own way of adding the adapter; peft's enable_adapters() would also flip requires_grad
        for layer in self._layers:
            layer._disable_adapters = True

    def settle(self) -> "LoRAControl":
        super().settle()
        self._kept = Kept()
        return self

    @property
    def _half(self) -> bool:
        """Whether the network computes in half precision, by its weights or by autocast."""
        return self._denoiser[0].stored is not None or self._denoiser[0].precision is not None

    def _differences(self) -> list[Tensor]:
        """BA of every layer."""
        return [layer.get_delta_weight(self.adapter) for layer in self._layers]

    def _changed(self, own: list[Tensor]) -> list[Tensor]:
        """W + BA of every layer whose weight is W: the prior's, or what other controls made of it."""
        kept = self._kept
        if kept is None:
            return added(own, self._differences())
        with torch.inference_mode(False):  # what is made inside could not be kept for a gradient
            if all(isinstance(weight, nn.Parameter) for weight in own):
                kept.sums = kept.sums or added(own, self._differences())
                return kept.sums
            kept.differences = kept.differences or self._differences()
        return added(own, kept.differences)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with super().frozen():
            outer = self._kept
            self._kept = outer or Kept()
            try:
                yield
            finally:
                self._kept = outer

    @contextmanager
    def active(self, y: Tensor) -> Iterator[None]:
        if self._shift is not None:
            raise RuntimeError(f"the control {self.name!r} is active already.")
        with self._beside() if self._half or self._denoiser[0].together else self._within():
            self._shift = self.embedded(self.table, y)
            try:
                yield
            finally:
                self._shift = None

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Wx + B(Ax), as PEFT adds it: for W that is in parts on several ranks, or in half precision, in which W + BA
        rounds to W."""
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self._layers]
        for layer, (off, active) in zip(self._layers, before, strict=True):
            layer._disable_adapters = False
            layer._active_adapter = [self.adapter] if off else [*active, self.adapter]
        try:
            yield
        finally:
            for layer, (off, active) in zip(self._layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = off, active

    @contextmanager
    def _within(self) -> Iterator[None]:
        """(W + BA)x: the same as Wx + B(Ax), but with many rows to a layer far fewer products (docs/lab-notes.md)."""
        homes = [layer.get_base_layer()._parameters for layer in self._layers]
        own = [home["weight"] for home in homes]
        try:
            for home, weight in zip(homes, self._changed(own), strict=True):
                home["weight"] = weight
            yield
        finally:
            for home, weight in zip(homes, own, strict=True):
                home["weight"] = weight

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        adapter = [
            p for layer in self._layers for ab in (layer.lora_A, layer.lora_B) for p in ab[self.adapter].parameters()
        ]
        return {"embedding": [self.table.weight], "adapter": adapter}

    def save(self, folder: str | Path) -> None:
        """Write `control.safetensors` and `control.json` into the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapter = get_peft_model_state_dict(self._network[0], adapter_name=self.adapter)
        tensors = {f"adapter.{key}": value for key, value in adapter.items()}
        write_tensors(folder / "control.safetensors", {**tensors, "table": self.table.weight})
        about = ("name", "values", "rank", "scale", "alpha", "targets")
        write_json(folder / "control.json", {key: getattr(self, key) for key in about})

    @classmethod
    def load(cls, folder: str | Path, denoiser: NetworkDenoiser) -> "LoRAControl":
        """Attach a saved control to the prior it was trained on."""
        folder = Path(folder)
        control = cls(**json.loads((folder / "control.json").read_text()), denoiser=denoiser)
        tensors = read_tensors(folder / "control.safetensors")
        with torch.no_grad():
            control.table.weight.copy_(tensors.pop("table"))
        adapter = {key.removeprefix("adapter."): value for key, value in tensors.items()}
        expected = get_peft_model_state_dict(denoiser.network, adapter_name=control.adapter)
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in adapter.items()}:
            raise ValueError(f"the control in {folder} was trained on another network than this prior's")
        set_peft_model_state_dict(denoiser.network, adapter, adapter_name=control.adapter)
        control._silence()
        return control


def added(weights: list[Tensor], differences: list[Tensor]) -> list[Tensor]:
    """W + BA, layer by layer."""
    return [weight + difference for weight, difference in zip(weights, differences, strict=True)]


class SideControl(Control):
    """A small network beside the prior: x̂ = x̂_pre + σ_t² f(x_t, x̂_pre, t, c, y), f = 0 at first and for a null y.

    A control attached later sees, in place of x̂_pre, what those before it made of it.

    For priors without a network of their own (closed forms, plain callables). The exact shift is
    σ_t²/α_t ∇ log h(x_t), so f is of order one at every t.

    Args:
        name: the label's name.
        values: what the user calls the classes, in order.
        denoiser: the prior.
        conditions: how many conditions c the prior has.
        width: hidden units.
        seed: of the initial weights.
    """

    def __init__(
        self,
        name: str,
        values: Sequence[str],
        denoiser: Denoiser,
        conditions: int = 0,
        width: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(name, values)
        dim = math.prod(denoiser.shape)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.table = nn.Embedding(self.size + 1, width, padding_idx=self.size)
            self.inner = nn.Linear(2 * dim + 3, width)
            self.outer = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim))
            self.of_c = nn.Embedding(conditions, width) if conditions else None
        nn.init.zeros_(self.outer[-1].weight)
        nn.init.zeros_(self.outer[-1].bias)
        self.to(denoiser.device)
        self._y: Tensor | None = None
        self._schedule = denoiser.schedule
        denoiser.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, module: nn.Module, args: tuple[Tensor, Tensor | float], cond: dict, x_hat: Tensor) -> Tensor:
        if self._y is None:
            return x_hat
        x_t, t = args[0], torch.as_tensor(args[1]).to(args[0]).expand(len(args[0]))
        alpha, sigma = (a.to(x_t) for a in self._schedule(t))
        clock = torch.stack([t, alpha, sigma], dim=1)
        hidden = self.inner(torch.cat([x_t.flatten(1), x_hat.flatten(1), clock], dim=1))
        y = self._y.to(x_t.device)
        hidden = hidden + self.embedded(self.table, y)
        if self.of_c is not None:
            hidden = hidden + self.of_c(cond["c"].to(x_t.device))
        shift = torch.where((y == NULL)[:, None], 0.0, (sigma**2)[:, None] * self.outer(hidden))
        return x_hat + shift.view_as(x_hat)

    @contextmanager
    def active(self, y: Tensor) -> Iterator[None]:
        self._y = y
        try:
            yield
        finally:
            self._y = None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        network = [*self.inner.parameters(), *self.outer.parameters()]
        tables = [self.table.weight] if self.of_c is None else [self.table.weight, self.of_c.weight]
        return {"embedding": tables, "adapter": network}


class Policy(Denoiser):
    """The prior with controls: itself a denoiser, so every sampler takes it.

    Args:
        prior: the pre-trained denoiser.
        controls: attached to that denoiser.
    """

    def __init__(self, prior: Denoiser, *controls: Control) -> None:
        super().__init__()
        self.base = prior
        self.controls = {control.name: control for control in controls}
        self._modules_of_controls = nn.ModuleList(controls)
        self.schedule, self.shape, self.start = prior.schedule, prior.shape, prior.start
        self.eval()

    @property
    def prior(self) -> Denoiser:
        return self.base

    @property
    def gradient_scale(self) -> float:
        return self.base.gradient_scale

    def lower_scale(self) -> None:
        self.base.lower_scale()

    def in_full(self) -> AbstractContextManager[None]:
        return self.base.in_full()

    def forward(
        self, x_t: Tensor, t: Tensor | float, labels: Labels | None = None, strength: float = 1.0, **cond: Tensor
    ) -> Tensor:
        """x̂ (B, *) under labels; rows whose labels are all null are the prior's, bit for bit at equal batch.

        Where several processes call the prior `together`, each makes the calls that any has rows for: one that has none
        lends one.

        Args:
            x_t: (B, *) at time t.
            t: a number or (B,).
            labels: control → (B,) classes, NULL for uncontrolled rows; a control left out is null.
            strength: w; the mean is (1 − w) mean_pre + w mean_g, which is linear in x̂.
            cond: the prior's own conditions.

        Raises:
            ValueError: an unknown control, or a class out of range.
        """
        labels = {n: y for n, y in self.checked(labels or {}).items() if self.base.together or (y != NULL).any()}
        if strength == 0.0 or not labels:
            return self.base(x_t, t, **cond)
        # rows that are controlled alike go together: a control whose label is null must leave no trace
        here = everywhere = torch.stack([y != NULL for y in labels.values()])
        if self.base.together:
            everywhere = torch.cat([here, self.base.together(here)], dim=1)
        patterns, pattern = everywhere.unique(dim=1, return_inverse=True)
        if strength == 1.0 and patterns.all():
            return self.steered(x_t, t, labels, cond)
        x_hat_pre = None if strength == 1.0 and patterns.any(0).all() else self.base(x_t, t, **cond)
        places, parts = [], []
        for i, on in enumerate(patterns.unbind(1)):
            row = place = (pattern[: len(x_t)] == i).nonzero().squeeze(1)
            if on.any() and not len(row):
                row, place = row.new_zeros(1), row.new_full((1,), len(x_t))  # lent, and behind all others
            places.append(place)
            if not on.any():
                parts.append(x_hat_pre[row])
                continue
            mine = {name: y[row] for (name, y), wanted in zip(labels.items(), on, strict=True) if wanted}
            own = {name: given[row] for name, given in cond.items()}
            x_hat = self.steered(x_t[row], t[row] if isinstance(t, Tensor) and t.ndim else t, mine, own)
            parts.append(x_hat if strength == 1.0 else torch.lerp(x_hat_pre[row], x_hat, strength))
        return torch.cat(parts)[torch.cat(places).argsort()[: len(x_t)]]

    def steered(self, x_t: Tensor, t: Tensor | float, labels: Labels, cond: dict[str, Tensor]) -> Tensor:
        """x̂ (B, *) with the controls of these labels active in every row."""
        with ExitStack() as stack:
            for name, y in labels.items():
                stack.enter_context(self.controls[name].active(y))
            return self.base(x_t, t, **cond)

    def checked(self, labels: Labels) -> Labels:
        """The labels, or a ValueError that names the control and the value that is wrong."""
        for name, y in labels.items():
            if name not in self.controls:
                known = ", ".join(self.controls) or "none"
                raise ValueError(f"unknown control {name!r}; this policy has: {known}.")
            size = self.controls[name].size
            if y.min() < NULL or y.max() > size - 1 or ((y < 0) & (y != NULL)).any():
                raise ValueError(
                    f"labels of {name!r} must lie in 0 … {size - 1} (−1 for null), got {y.min():g} … {y.max():g}."
                )
            if y.is_floating_point() and not self.controls[name].scale:
                raise ValueError(f"labels of {name!r} are classes: whole numbers, got {y.dtype}.")
        return labels

    def snapshot(self) -> list[Tensor]:
        """A copy of the controls' parameters."""
        return [p.detach().clone() for p in self.trained()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Give the controls the parameters of a snapshot."""
        for p, value in zip(self.trained(), snapshot, strict=True):
            p.copy_(value)

    @contextmanager
    def holding(self, snapshot: list[Tensor]) -> Iterator[None]:
        """Inside, the controls have the parameters of a snapshot. Not between a forward pass and its backward pass."""
        own = self.snapshot()
        self.restore(snapshot)
        try:
            yield
        finally:
            self.restore(own)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with ExitStack() as stack:
            for control in self.controls.values():
                stack.enter_context(control.frozen())
            yield

    def trained(self) -> list[nn.Parameter]:
        """Parameters of all controls that are not settled, in one order."""
        return list(chain.from_iterable(self.parameter_groups().values()))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of all controls that are not settled, by kind."""
        groups: dict[str, list[nn.Parameter]] = {}
        for control in self.controls.values():
            if control.settled:
                continue
            for kind, parameters in control.parameter_groups().items():
                groups.setdefault(kind, []).extend(parameters)
        return groups
