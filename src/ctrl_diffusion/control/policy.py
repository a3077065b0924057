"""Combine a frozen prior with its controls."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..chain.denoise import Denoiser
from ..data.labels import NULL, Labels
from .control import Control


class RowGroup(NamedTuple):
    """Hold the rows of a batch on which the same controls act."""

    active: Tensor  # (K,), whether each control acts
    rows: Tensor  # (n,), their numbers; of a dummy row the first
    positions: Tensor  # (n,), where their results belong; of a dummy row behind the whole batch


def row_groups(active: Tensor, all_gather: Callable[[Tensor], Tensor] | None) -> list[RowGroup]:
    """Group a batch's rows by the controls that act on them (K, B): one whose label is null must leave no trace.

    Where all ranks must call the network in step, `all_gather` concatenates their columns: each then has every group
    that any rank has, if need be with a dummy row.
    """
    columns = torch.cat([active, all_gather(active)], dim=1) if all_gather else active
    patterns, pattern = columns.unique(dim=1, return_inverse=True)
    batch, groups = active.shape[1], []
    for i, controls in enumerate(patterns.unbind(1)):
        rows = positions = (pattern[:batch] == i).nonzero().squeeze(1)
        if controls.any() and not len(rows):
            rows, positions = rows.new_zeros(1), rows.new_full((1,), batch)
        groups.append(RowGroup(controls, rows, positions))
    return groups


class Policy(Denoiser):
    """Combine a prior with controls that are attached to it: itself a denoiser, so every sampler takes it.

    `gamma` is the γ that controls of a single γ were trained at, and those of several are called at by default.
    """

    def __init__(self, prior: Denoiser, *controls: Control, gamma: float = 1.0) -> None:
        super().__init__()
        self.base, self.gamma = prior, gamma
        self.controls = {control.name: control for control in controls}
        self._modules_of_controls = nn.ModuleList(controls)
        self.schedule, self.shape, self.start = prior.schedule, prior.shape, prior.start
        self.eval()

    @property
    def prior(self) -> Denoiser:
        return self.base

    def forward(
        self, x_t: Tensor, t: Tensor | float, labels: Labels | None = None, strength: float = 1.0,
        gamma: float | Tensor | None = None, **cond: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return x̂ (B, *) under labels; rows whose labels are all null are the prior's, bit for bit at equal batch.

        Args:
            x_t: (B, *) at time t, a number or (B,).
            labels: control → (B,) classes, NULL for uncontrolled rows; a control left out is null, and so is one
                outside its interval.
            strength: w; the mean is (1 − w) mean_pre + w mean_g, which is linear in x̂.
            gamma: γ, a number or (B,), an input of the controls: any costs one evaluation. None for the policy's own.
            cond: the prior's own conditions.

        Raises:
            ValueError: an unknown control, a class out of range, or a γ that a control was not trained for.
        """
        gamma = self.gamma if gamma is None else gamma
        for name, y in (labels or {}).items():
            self.control_of(name).space.check(y, name)
            if (y != NULL).any():
                self.controls[name].check_gamma(gamma, self.gamma)
        all_gather = getattr(self.base, "all_gather", None)  # of sharded weights
        labels = {n: y for n, y in self.labels_at(t, labels or {}).items() if all_gather or (y != NULL).any()}
        if strength == 0.0 or not labels:
            return self.base(x_t, t, **cond)
        groups = row_groups(torch.stack([y != NULL for y in labels.values()]), all_gather)
        if strength == 1.0 and all(group.active.all() for group in groups):
            return self.steered(x_t, t, labels, cond, gamma)
        needs_prior = strength != 1.0 or not all(group.active.any() for group in groups)
        x_hat_pre = self.base(x_t, t, **cond) if needs_prior else x_t
        parts = []
        for active, rows, _ in groups:
            if not active.any():
                parts.append(x_hat_pre[rows])
                continue
            given = {name: y[rows] for (name, y), acts in zip(labels.items(), active, strict=True) if acts}
            t_rows, gamma_rows = (v[rows] if isinstance(v, Tensor) and v.ndim else v for v in (t, gamma))
            x_hat = self.steered(
                x_t[rows], t_rows, given, {name: value[rows] for name, value in cond.items()}, gamma_rows
            )
            parts.append(x_hat if strength == 1.0 else torch.lerp(x_hat_pre[rows], x_hat, strength))
        return torch.cat(parts)[torch.cat([group.positions for group in groups]).argsort()[: len(x_t)]]

    @property
    def sees_condition(self) -> bool:
        """Whether all controls that are trained see the prior's condition."""
        return all(control.sees_condition or control.fixed for control in self.controls.values())

    def control_of(self, name: str) -> Control:
        """Return a control by name; raise ValueError for an unknown one."""
        if name not in self.controls:
            names = ", ".join(self.controls) or "none"
            raise ValueError(f"unknown control {name!r}; this policy has: {names}.")
        return self.controls[name]

    def labels_at(self, t: Tensor | float, labels: Labels) -> Labels:
        """Return labels without those outside their control's interval at t, a number; null where t is (B,)."""
        if all(self.controls[name].interval is None for name in labels):
            return labels
        sigma = self.schedule(t)[1]
        speaks = {name: self.controls[name].speaks(sigma) for name in labels}
        if not sigma.ndim:
            return {name: y for name, y in labels.items() if speaks[name]}
        return {name: torch.where(speaks[name].to(y.device), y, NULL) for name, y in labels.items()}

    def speaks(
        self, t: float, labels: Collection[str] | None = None, strength: float = 1.0,
        gamma: float | Tensor | None = None,
    ) -> bool:  # fmt: skip
        """Return whether any control of these labels, or names, speaks at time t: if not, x̂ is the prior's at any γ."""
        controls = [self.control_of(name) for name in labels or ()]
        return strength != 0.0 and any(c.interval is None or c.speaks(self.schedule(t)[1]) for c in controls)

    def active_steps(self, times: Sequence[float]) -> Tensor:
        sigma = self.schedule(torch.tensor(times[:-1], dtype=torch.float64))[1]
        trained = [control.speaks(sigma) for control in self.controls.values() if not control.fixed]
        return torch.stack(trained).any(0).nonzero().squeeze(1) if trained else torch.empty(0, dtype=torch.long)

    def steered(
        self, x_t: Tensor, t: Tensor | float, labels: Labels, cond: dict[str, Tensor], gamma: float | Tensor
    ) -> Tensor:
        """Return x̂ (B, *) with the controls of these labels active in every row.

        Controls that do not see the condition c act where there is none, and what they change is added (three
        evaluations): x̂ = x̂_pre(c) + x̂_y(∅) − x̂_pre(∅). That is exact where y does not depend on c given x_t, since
        ∇ log p(y | x_t, c) is then ∇ log p(y | x_t).
        """
        unseeing = {name: y for name, y in labels.items() if cond and not self.controls[name].sees_condition}
        if not unseeing:
            return self.evaluated(x_t, t, labels, cond, gamma)
        seeing = {name: y for name, y in labels.items() if name not in unseeing}
        change = self.evaluated(x_t, t, unseeing, {}, gamma) - self.base(x_t, t)
        return self.evaluated(x_t, t, seeing, cond, gamma) + change

    def evaluated(
        self, x_t: Tensor, t: Tensor | float, labels: Labels, cond: dict[str, Tensor], gamma: float | Tensor
    ) -> Tensor:
        """Return the prior's x̂ (B, *) under cond, or none, with the controls of these labels active."""
        with ExitStack() as stack:
            for name, y in labels.items():
                control = self.controls[name]
                stack.enter_context(control.active(y) if control.gammas is None else control.active(y, gamma))
            return self.base(x_t, t, **cond)

    def snapshot(self) -> list[Tensor]:
        """Copy the controls' parameters."""
        return [p.detach().clone() for p in self.trainable()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Give the controls the parameters of a snapshot."""
        for p, value in zip(self.trainable(), snapshot, strict=True):
            p.copy_(value)

    @contextmanager
    def holding(self, snapshot: list[Tensor]) -> Iterator[None]:
        """Use the parameters of a snapshot inside. Not between a forward pass and its backward pass."""
        before = self.snapshot()
        self.restore(snapshot)
        try:
            yield
        finally:
            self.restore(before)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with ExitStack() as stack:
            for control in self.controls.values():
                stack.enter_context(control.frozen())
            yield

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters of all controls that are not fixed, in one order."""
        return list(chain.from_iterable(self.parameter_groups().values()))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of all controls that are not fixed, by kind."""
        groups: dict[str, list[nn.Parameter]] = {}
        for control in self.controls.values():
            for kind, parameters in () if control.fixed else control.parameter_groups().items():
                groups.setdefault(kind, []).extend(parameters)
        return groups
