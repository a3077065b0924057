"""Attach a control as one LoRA adapter and one zero-initialised embedding."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..prior.network import NetworkDenoiser
from ..system.files import one_line, read_tensors, write_tensors
from .control import Control, read_about
from .plain import PlainLoRA


class LoRAControl(Control):
    """Control a pre-trained network by one LoRA adapter and one zero-initialised embedding table.

    Args:
        name, values, scale: of the label y: what the user calls it and its classes or levels; whether it is on a scale.
        denoiser: the prior; its network is given the adapter, switched off.
        rank, alpha: of the adapter, whose scale is α/rank; None for a scale of 1.
        seed: of the adapter's random half (the other half is zero).
        targets: PEFT's target modules, names or endings of names; None for those of the network's family.
        interval: σ_off and σ_on, between which it speaks; None for everywhere.
        gammas: the smallest and the largest γ it is made for; None for a single γ.
        sees_condition: whether it is evaluated under the prior's condition c.

    Raises:
        ValueError: the denoiser does not say where a control enters it, or carries a control of that name already.
    """

    def __init__(
        self, name: str, values: Sequence[str], denoiser: NetworkDenoiser, rank: int = 64, seed: int = 0,
        scale: bool = False, alpha: float | None = None, targets: Sequence[str] | None = None,
        interval: Sequence[float] | None = None, gammas: Sequence[float] | None = None, sees_condition: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(name, values, scale, interval, gammas, sees_condition)
        if denoiser.site is None:
            raise ValueError("this prior names no site for a control. Give its NetworkDenoiser a ControlSite.")
        self.rank, self.alpha, self.targets = rank, alpha, targets and list(targets)
        # modules are named after it, and a module cannot be called "type" or have a dot in its name
        self.adapter = "control_" + re.sub(r"\W", "_", name)
        self._site, self._prior = denoiser.site, (denoiser,)  # not a registered child: the prior owns its network
        if self._own_layers():
            raise ValueError(f"this prior already carries a control {name!r}. Load the prior again for another one.")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self._inject()
            self.table = nn.Embedding(self.size + 1, denoiser.site.width, padding_idx=self.size)
        nn.init.zeros_(self.table.weight)
        self.of_gamma = self.new_gamma_tables(denoiser.site.width)
        self.to(denoiser.device)
        denoiser.network.eval()
        self._layers = self._own_layers()
        for p in self.parameter_groups()["adapter"] if self._half else ():
            p.data = p.data.float()  # peft makes them as the layers are
        self._shift: Tensor | None = None
        # while the parameters stay as they are: W + BA of the prior's W, BA for any other W
        self._cache: dict[str, list[Tensor]] | None = None
        for site in denoiser.site.embeddings:
            denoiser.network.get_submodule(site).register_forward_hook(self._add_shift)
        self._switch_off()

    def _own_layers(self) -> list[LoraLayer]:
        """List the network's layers that carry the adapter."""
        return [m for m in self._prior[0].network.modules() if isinstance(m, LoraLayer) and self.adapter in m.lora_A]

    def _inject(self) -> None:
        """Put the adapter into the network; leave those of other controls as they are."""
        network, targets = self._prior[0].network, self.targets or self._site.targets
        names = [key for key, _ in network.named_modules()]
        for target in self.targets or ():
            if not any(f".{key}".endswith(f".{target}") for key in names):
                raise ValueError(f"lora_targets: the network has no layer whose name is or ends in {target!r}.")
        others = [(p, p.requires_grad) for key, p in network.named_parameters() if "lora_" in key]
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha or self.rank, target_modules=list(targets))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
            try:
                inject_adapter_in_model(config, network, adapter_name=self.adapter)
            except ValueError as error:
                raise ValueError(f"lora_targets: {one_line(error, 200)}") from error
        for p, requires_grad in others:  # peft freezes every adapter but the newest
            p.requires_grad_(requires_grad)

    def _add_shift(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._shift is None:
            return output
        # a guided network is called with every row twice, without and with the prompt: the control acts on both
        return output + self._shift.repeat(len(output) // len(self._shift), 1).to(output)

    def _switch_off(self) -> None:
        # the layers' own way of adding the adapter; peft's enable_adapters() would also flip requires_grad
        for layer in self._layers:
            layer._disable_adapters = True

    def fix(self) -> "LoRAControl":
        super().fix()
        self._cache = {}
        return self

    @property
    def _half(self) -> bool:
        """Whether the network computes in half precision, by its weights or by autocast."""
        return (self._prior[0].stored or self._prior[0].precision) is not None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with super().frozen():
            outer = self._cache
            self._cache = {} if outer is None else outer
            try:
                yield
            finally:
                self._cache = outer

    @contextmanager
    def active(self, y: Tensor, gamma: float | Tensor = 1.0) -> Iterator[None]:
        if self._shift is not None:
            raise RuntimeError(f"the control {self.name!r} is active already.")
        with self._unmerged() if self._half or self._prior[0].all_gather else self._merged():
            self._shift = self.embedded_at([self.table, *self.of_gamma], y, gamma)
            try:
                yield
            finally:
                self._shift = None

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Compute Wx + B(Ax) inside, as PEFT does: where ranks hold parts of W, or where W + BA would round to W."""
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
    def _merged(self) -> Iterator[None]:
        """Compute (W + BA)x inside: the same, but for many rows far fewer products (docs/why/lab-notes.md)."""
        parameters = [layer.get_base_layer()._parameters for layer in self._layers]
        weights = [p["weight"] for p in parameters]
        try:
            for p, weight in zip(parameters, self._sums(weights), strict=True):
                p["weight"] = weight
            yield
        finally:
            for p, weight in zip(parameters, weights, strict=True):
                p["weight"] = weight

    def _sums(self, weights: list[Tensor]) -> list[Tensor]:
        """Return W + BA of every layer whose weight is W: the prior's, or what other controls made of it."""
        cache = self._cache
        if cache is None:
            return added(weights, self._differences())
        with torch.inference_mode(False):  # what is made inside could not be kept for a gradient
            if all(isinstance(weight, nn.Parameter) for weight in weights):
                cache["sums"] = cache.get("sums") or added(weights, self._differences())
                return cache["sums"]
            cache["differences"] = cache.get("differences") or self._differences()
        return added(weights, cache["differences"])

    def _differences(self) -> list[Tensor]:
        """Return BA of every layer."""
        return [layer.get_delta_weight(self.adapter) for layer in self._layers]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        halves = [half[self.adapter] for layer in self._layers for half in (layer.lora_A, layer.lora_B)]
        tables = [self.table.weight, *self.of_gamma.parameters()]
        return {"embedding": tables, "adapter": [p for half in halves for p in half.parameters()]}

    def _tables(self) -> dict[str, nn.Embedding]:
        """Return the embedding tables by their names in a file."""
        of_gamma = (cast(nn.Embedding, table) for table in self.of_gamma)
        return {"table": self.table, **{f"table.gamma.{i}": table for i, table in enumerate(of_gamma, start=1)}}

    def _state(self) -> dict[str, Tensor]:
        """Return the adapter's weights by the names of the network's layers."""
        state: dict[str, Tensor] = get_peft_model_state_dict(self._prior[0].network, adapter_name=self.adapter)
        return state

    @torch.no_grad()
    def as_lora(self, y: float, gamma: float) -> PlainLoRA:
        site, network = self._site, self._prior[0].network
        if not self.sees_condition:
            raise ValueError(
                f"the control {self.name!r} does not see the prior's condition: it takes three evaluations a step, and "
                "a LoRA in another program one."
            )
        if not site.biased:
            where = ", ".join(site.embeddings[:1]) + (" and others" if len(site.embeddings) > 1 else "")
            raise ValueError(
                f"the control {self.name!r} is added to the output of {where}, which is no bias of one layer: it is no "
                "ordinary LoRA."
            )
        layer, state = network.get_submodule(site.biased), self._state()
        down, up = (
            {key.removesuffix(end): p.detach() for key, p in state.items() if key.endswith(end)}
            for end in (".lora_A.weight", ".lora_B.weight")
        )
        bias = self.embedded_at([self.table, *self.of_gamma], torch.tensor([y]), gamma)[0]
        scale, shape = (self.alpha or self.rank) / self.rank, cast(nn.Linear, layer).weight.shape
        return PlainLoRA(down, up, scale, site.biased, bias, (shape[0], shape[1]))

    @torch.no_grad()
    def scale_as_lora(self, strength: float) -> None:
        self.as_lora(0.0 if self.scale else 0, self.gammas[0] if self.gammas else 1.0)  # refuses what is none
        self._cache = None if self._cache is None else {}
        for layer in self._layers:
            layer.lora_B[self.adapter].weight *= strength
        for weight in (table.weight for table in self._tables().values()):
            if self.scale:
                place = torch.linspace(0, 1, self.size)[:, None].to(weight)
                weight[:-1] = torch.lerp(weight[0], weight[self.size - 1], place)
            weight *= strength

    def save(self, folder: str | Path) -> None:
        tensors = {f"adapter.{key}": value for key, value in self._state().items()}
        tables = {name: table.weight for name, table in self._tables().items()}
        write_tensors(Path(folder) / "control.safetensors", {**tensors, **tables})
        self.write_about(folder, "lora", "rank", "scale", "alpha", "targets")

    @classmethod
    def load(cls, folder: str | Path, denoiser: NetworkDenoiser) -> "LoRAControl":
        """Attach a saved control to the prior it was trained on; refuse (ValueError) another network."""
        _, arguments = read_about(folder)
        control = cls(**arguments, denoiser=denoiser)
        tensors = read_tensors(Path(folder) / "control.safetensors")
        with torch.no_grad():
            for name, table in control._tables().items():
                table.weight.copy_(tensors.pop(name))
        adapter = {key.removeprefix("adapter."): value for key, value in tensors.items()}
        if {k: p.shape for k, p in control._state().items()} != {k: p.shape for k, p in adapter.items()}:
            raise ValueError(f"the control in {folder} was trained on another network than this prior's")
        set_peft_model_state_dict(denoiser.network, adapter, adapter_name=control.adapter)
        control._switch_off()
        return control


def added(weights: list[Tensor], differences: list[Tensor]) -> list[Tensor]:
    """Return W + BA, layer by layer."""
    return [weight + difference for weight, difference in zip(weights, differences, strict=True)]
