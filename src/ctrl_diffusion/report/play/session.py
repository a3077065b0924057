"""Draw what a visitor asks of a run, the prior and the control from the same noise, a few pictures at a time."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from ...chain.noise import generators_of, normal
from ...chain.paths import default_batch
from ...chain.rollout import rollout
from ...chain.rows import parts, rows_of
from ...run.folder import RunFolder
from ...run.run import Run, find_run
from .readings import Picture, read
from .request import Request
from .worker import Step, Stopped, Worker

MICRO, MICRO_NUMBERS = 16, 2**14  # of a piece of work: samples, and the numbers of all of them
KEPT = {"prior": 16, "ctrl": 4}  # pieces that are kept: a prior is shown beside every label


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
        # only the worker's thread touches them
        self.kept: dict[str, OrderedDict[tuple, tuple[Tensor, Tensor]]] = {kind: OrderedDict() for kind in KEPT}

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
        labels, generator = request.rows(run), request.noise()
        steps_of_all = 2 * len(times) * -(-request.n // self.micro_batch)
        for batch in parts(request.n, default_batch(run.prior.denoiser)):
            shape = (batch.stop - batch.start, *run.prior.denoiser.shape)
            noise = [normal(shape, run.prior.denoiser, generators_of(generator, batch)) for _ in times]
            for piece in parts(shape[0], self.micro_batch):
                rows = slice(batch.start + piece.start, batch.start + piece.stop)
                arguments = request, [z[piece] for z in noise], rows_of(cond, rows), rows_of(labels, rows)
                for kind in ("prior", "ctrl"):
                    work = partial(self.piece, kind, *arguments, rows)
                    pictures = yield from self.following(drawing, work, stop, steps_of_all)
                    drawing = replace(drawing, **{kind: (*getattr(drawing, kind), *pictures)})
                    drawing = replace(drawing, now=(len(drawing.prior) + len(drawing.ctrl)) / (2 * request.n))
                yield drawing

    def draw_ahead(self, stop: Event) -> None:
        """Draw what the page asks first, before it asks, unless `stop` is set; its pieces are kept."""
        with suppress(Stopped, CancelledError):
            for _ in self.draw(Request.first(self.run), stop):
                pass

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
        """Sample and read some rows of a request, of the prior or of the control; the last pieces are kept."""
        run = self.run
        if kind == "ctrl" and (not request.labels or request.strength == 0):
            kind = "prior"
        kept = self.kept[kind]
        asked = () if kind == "prior" else (*request.labels.items(), request.strength, request.gamma)
        noise_of = request.seed, bool(request.word), request.n
        key = noise_of, request.steps, rows.start, asked, *(cond["c"].tolist() if cond else ())
        if key in kept:
            kept.move_to_end(key)
            return read(run, *kept[key], cond, labels)

        def at_state(_: int, x_t: Tensor) -> Tensor:
            step()
            return x_t

        options = {"cond": cond, "noise": noise[1:], "at_state": at_state}
        if kind == "ctrl":
            options |= {"labels": labels, "strength": request.strength}
            options |= {} if request.gamma is None else {"gamma": request.gamma}
        with run.policy.frozen():
            x_0 = rollout(run.policy, noise[0], run.times_of(request.steps), **options).x_0.cpu()
        images = run.images(x_0)
        kept[key] = x_0, images
        while len(kept) > KEPT[kind]:
            kept.popitem(last=False)
        return read(run, x_0, images, cond, labels)
