"""Combine a frozen prior with its controls."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from ..chain.denoise import Denoiser
from ..data.labels import NULL, Labels
from .control import Control


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

    def forward(
        self, x_t: Tensor, t: Tensor | float, labels: Labels | None = None, strength: float = 1.0, **cond: Tensor
    ) -> Tensor:
        """x̂ (B, *) under labels; rows whose labels are all null are the prior's, bit for bit at equal batch.

        Where ranks call a sharded prior in step, each makes the calls that any has rows for, if need be with a dummy
        row.

        Args:
            x_t: (B, *) at time t.
            t: a number or (B,).
            labels: control → (B,) classes, NULL for uncontrolled rows; a control left out is null.
            strength: w; the mean is (1 − w) mean_pre + w mean_g, which is linear in x̂.
            cond: the prior's own conditions.

        Raises:
            ValueError: an unknown control, or a class out of range.
        """
        all_gather = getattr(self.base, "all_gather", None)  # of sharded weights
        labels = {n: y for n, y in self.checked(labels or {}).items() if all_gather or (y != NULL).any()}
        if strength == 0.0 or not labels:
            return self.base(x_t, t, **cond)
        # rows that are controlled alike go together: a control whose label is null must leave no trace
        here = everywhere = torch.stack([y != NULL for y in labels.values()])
        if all_gather:
            everywhere = torch.cat([here, all_gather(here)], dim=1)
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
            self.controls[name].space.check(y, name)
        return labels

    def snapshot(self) -> list[Tensor]:
        """A copy of the controls' parameters."""
        return [p.detach().clone() for p in self.trainable()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Give the controls the parameters of a snapshot."""
        for p, value in zip(self.trainable(), snapshot, strict=True):
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

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of all controls that are not settled, in one order."""
        return list(chain.from_iterable(self.parameter_groups().values()))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of all controls that are not settled, by kind."""
        groups: dict[str, list[nn.Parameter]] = {}
        for control in self.controls.values():
            if control.fixed:
                continue
            for kind, parameters in control.parameter_groups().items():
                groups.setdefault(kind, []).extend(parameters)
        return groups
