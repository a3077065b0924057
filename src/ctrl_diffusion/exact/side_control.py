"""Control a closed-form prior by a small network beside it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..chain.denoise import Denoiser
from ..control.control import Control, read_about
from ..data.labels import NULL
from ..system.files import read_tensors, write_tensors


class SideControl(Control):
    """Control a prior without a network to adapt (a closed form, a plain callable) by a network beside it.

    x̂ = x̂_pre + σ_t² f(x_t, x̂_pre, t, c, y) with f = 0 at first and for a null y; x̂_pre includes the controls attached
    before. The exact shift is σ_t²/α_t ∇ log h(x_t), so f is of order one at every t. The prior has a number of
    `conditions` c, or a continuous c with so many `coordinates`; f is a network of `width` hidden units.
    """

    def __init__(
        self, name: str, values: Sequence[str], denoiser: Denoiser, conditions: int = 0, width: int = 128,
        seed: int = 0, interval: Sequence[float] | None = None, gammas: Sequence[float] | None = None,
        coordinates: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(name, values, interval=interval, gammas=gammas)
        if conditions and coordinates:
            numbers = f"{conditions} conditions and {coordinates} coordinates"
            raise ValueError(f"c of a side control is numbered or continuous, got {numbers}. Give one of them.")
        self.conditions, self.width, self.coordinates = conditions, width, coordinates
        dim = math.prod(denoiser.shape)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.table = nn.Embedding(self.size + 1, width, padding_idx=self.size)
            self.inner = nn.Linear(2 * dim + 3, width)
            self.outer = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim))
            self.of_c = nn.Embedding(conditions, width) if conditions else None
            if coordinates:
                self.of_c = nn.Linear(coordinates, width, bias=False)
        self.of_gamma = self.new_gamma_tables(width)
        nn.init.zeros_(self.outer[-1].weight)
        nn.init.zeros_(self.outer[-1].bias)
        self.to(denoiser.device)
        self._y: Tensor | None = None
        self._gamma: float | Tensor = 1.0
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
        hidden = hidden + self.embedded_at([self.table, *self.of_gamma], y, self._gamma)
        if self.of_c is not None:
            hidden = hidden + self.of_c(cond["c"].to(x_t.device))
        shift = torch.where((y == NULL)[:, None], 0.0, (sigma**2)[:, None] * self.outer(hidden))
        return x_hat + shift.view_as(x_hat)

    @contextmanager
    def active(self, y: Tensor, gamma: float | Tensor = 1.0) -> Iterator[None]:
        self._y, self._gamma = y, gamma
        try:
            yield
        finally:
            self._y = None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        network = [*self.inner.parameters(), *self.outer.parameters()]
        tables = [self.table.weight] if self.of_c is None else [self.table.weight, self.of_c.weight]
        return {"embedding": [*tables, *self.of_gamma.parameters()], "adapter": network}

    def save(self, folder: str | Path) -> None:
        write_tensors(Path(folder) / "control.safetensors", self.state_dict())
        self.write_about(folder, "side", "conditions", "width", "coordinates")

    @classmethod
    def load(cls, folder: str | Path, denoiser: Denoiser) -> "SideControl":
        _, arguments = read_about(folder)
        control = cls(**arguments, denoiser=denoiser)
        control.load_state_dict(read_tensors(Path(folder) / "control.safetensors"))
        return control
