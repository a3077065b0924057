"""Do one small piece of work at a time, for all visitors in turn."""

from collections import OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import TypeVar

Result = TypeVar("Result")
Step = Callable[[], None]
TICK = 0.2  # seconds between two looks at a piece of work
MOST_VISITORS = 1000  # whose last drawing is remembered


class Stopped(Exception):
    """Signal that a visitor wants no more of a drawing."""


class Worker:
    """Run pieces of work in one thread, first come, first served.

    The controls of a run change its network while they speak, so that two samplers must not run together. A visitor
    queues for each piece anew: nobody waits for all of another's.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "sampling")

    def do(self, work: Callable[[Step], Result], stop: Event) -> Generator[int, None, Result]:
        """Yield now and then how many steps are done, and return what the work returns.

        Work calls its argument at every step. Raises Stopped soon after `stop` is set, and of a closed worker.
        """
        steps = 0

        def step() -> None:
            nonlocal steps
            if stop.is_set():
                raise Stopped
            steps += 1

        try:
            future = self.pool.submit(work, step)
        except RuntimeError:  # the worker is closed
            raise Stopped from None
        try:
            while not wait([future], TICK).done:
                if stop.is_set() and future.cancel():
                    raise Stopped
                yield steps
            return future.result()
        finally:
            if not future.done():  # nobody looks at it any more
                stop.set()
                future.cancel()

    def close(self) -> None:
        """Do no more."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class Visitors:
    """Remember the drawing that each visitor waits for: a newer one takes its place."""

    def __init__(self) -> None:
        self.lock, self.stops = Lock(), OrderedDict[str, tuple[float, Event]]()

    def begin(self, visitor: str, turn: float) -> Event:
        """Stop a visitor's drawing, and return what stops the next: one of a turn that is over, at once."""
        stop = Event()
        if not self.follow(visitor, turn, stop):
            stop.set()
        return stop

    def pass_over(self, visitor: str, turn: float) -> None:
        """Stop a visitor's drawing of a turn or one before, even if it is yet to begin."""
        self.follow(visitor, turn + 0.5, Event())  # after this turn, before the next

    def follow(self, visitor: str, turn: float, stop: Event) -> bool:
        """Replace a visitor's drawing, which is stopped, unless it is of a later turn; return whether it was."""
        with self.lock:
            latest, before = self.stops.get(visitor, (turn, None))
            if turn < latest:
                return False
            if before:
                before.set()
            self.stops[visitor] = turn, stop
            self.stops.move_to_end(visitor)
            while len(self.stops) > MOST_VISITORS:
                self.stops.popitem(last=False)[1][1].set()
        return True

    def stop(self, visitor: str) -> None:
        """Stop a visitor's drawing, if there is one."""
        with self.lock:
            if visitor in self.stops:
                self.stops[visitor][1].set()

    def is_last(self, visitor: str, stop: Event) -> bool:
        """Return whether no newer drawing of the visitor has begun or is asked for than the one that `stop` stops."""
        with self.lock:
            return visitor in self.stops and self.stops[visitor][1] is stop

    def stop_all(self) -> None:
        """Stop every drawing."""
        with self.lock:
            for _, stop in self.stops.values():
                stop.set()
