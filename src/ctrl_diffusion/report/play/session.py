"""Draw what a visitor asks of a run, the prior and the control from the same noise, a few pictures at a time."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from ...chain.noise import normal
from ...chain.paths import default_batch
from ...chain.rollout import rollout
from ...chain.rows import parts, rows_of
from ...run.folder import RunFolder
from ...run.run import Run, find_run
from .readings import Picture, read
from .request import Request
from .worker import Step, Worker

MICRO, MICRO_NUMBERS = 16, 2**14  # of a piece of work: samples, and the numbers of all of them
KEPT = 16  # pieces of the prior that are kept


@dataclass(frozen=True)
class Drawing:
    """Hold what is drawn so far of a request."""

    request: Request
    prior: tuple[Picture, ...] = ()
    ctrl: tuple[Picture, ...] = ()
    now: float = 0.0  # the share that is done

    @property
    def finished(self) -> bool:
        """Whether all pictures are there."""
        return len(self.ctrl) == self.request.n


class Session:
    """Hold a run that a page shows, and draw of it."""

    def __init__(self, run: Run, folder: str, worker: Worker, metrics: dict[str, Any] | None = None) -> None:
        self.run, self.folder, self.worker, self.metrics = run, folder, worker, metrics
        self.name = Path(folder).absolute().name
        self.kept: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()  # only the worker's thread touches it

    @classmethod
    def load(cls, folder: Path, worker: Worker, trust: bool = False) -> "Session":
        """Open a finished run; raises ValueError as `Run.load` does."""
        run, files = Run.load(folder, trust=trust), RunFolder(find_run(folder))
        return cls(run, str(folder), worker, files.read_metrics() if files.metrics.is_file() else None)

    @property
    def micro_batch(self) -> int:
        """How many samples are one piece of work."""
        return max(1, min(MICRO, MICRO_NUMBERS // math.prod(self.run.prior.denoiser.shape)))

    def draw(self, request: Request, stop: Event) -> Iterator[Drawing]:
        """Yield the drawing as it grows; raises Stopped soon after `stop` is set.

        The samples are those of `ctrl sample`: to the byte where all are one piece, else as close as another batch is.
        """
        run, drawing = self.run, Drawing(request)
        for control in run.policy.controls.values():
            control.check_gamma(run.config.gamma if request.gamma is None else request.gamma, run.config.gamma)
        times = run.times_of(request.steps)
        cond = yield from self.following(drawing, lambda step: request.cond(run), stop, 0)
        labels, generator = request.rows(run), torch.Generator().manual_seed(request.seed)
        steps_of_all = 2 * len(times) * -(-request.n // self.micro_batch)
        for batch in parts(request.n, default_batch(run.prior.denoiser)):
            shape = (batch.stop - batch.start, *run.prior.denoiser.shape)
            noise = [normal(shape, run.prior.denoiser, generator) for _ in times]
            for piece in parts(shape[0], self.micro_batch):
                rows = slice(batch.start + piece.start, batch.start + piece.stop)
                arguments = request, [z[piece] for z in noise], rows_of(cond, rows), rows_of(labels, rows)
                for kind in ("prior", "ctrl"):
                    work = partial(self.piece, kind, *arguments, rows)
                    pictures = yield from self.following(drawing, work, stop, steps_of_all)
                    drawing = replace(drawing, **{kind: (*getattr(drawing, kind), *pictures)})
                    drawing = replace(drawing, now=(len(drawing.prior) + len(drawing.ctrl)) / (2 * request.n))
                yield drawing

    def following(self, drawing: Drawing, work: Any, stop: Event, steps_of_all: int) -> Iterator[Drawing]:
        """Do a piece of work; yield the drawing with the share that is done meanwhile, and return the result."""
        progress = self.worker.do(work, stop)
        while True:
            try:
                steps = next(progress)
            except StopIteration as end:
                return end.value
            yield replace(drawing, now=drawing.now + steps / steps_of_all if steps_of_all else 0.0)

    @torch.no_grad()
    def piece(
        self, kind: str, request: Request, noise: list[Tensor], cond: dict[str, Tensor], labels: dict[str, Tensor],
        rows: slice, step: Step,
    ) -> list[Picture]:  # fmt: skip
        """Sample and read some rows of a request, of the prior or of the control; what the prior drew is kept."""
        run = self.run
        key = request.seed, request.steps, request.n, rows.start, *(cond["c"].tolist() if cond else ())
        is_prior = kind == "prior" or not request.labels or request.strength == 0
        if is_prior and key in self.kept:
            self.kept.move_to_end(key)
            return read(run, *self.kept[key], cond, labels)

        def at_state(_: int, x_t: Tensor) -> Tensor:
            step()
            return x_t

        options = {"cond": cond, "noise": noise[1:], "at_state": at_state}
        if not is_prior:
            options |= {"labels": labels, "strength": request.strength}
            options |= {} if request.gamma is None else {"gamma": request.gamma}
        with run.policy.frozen():
            x_0 = rollout(run.policy, noise[0], run.times_of(request.steps), **options).x_0.cpu()
        images = run.images(x_0)
        if is_prior:
            self.kept[key] = x_0, images
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        return read(run, x_0, images, cond, labels)
