"""Meet the other processes of a launch: say for whom it waits, give up after minutes, and hear signals meanwhile.

torch's own rendezvous waits inside one call, without a word, as long as a collective may take, and hears no signal.
Here rank 0 opens torch's store without waiting, the others look for it, and all wait in Python until every rank is
there.
"""

import math
import os
import socket
import sys
import time
from datetime import timedelta

from torch.distributed import TCPStore

from .launch import Launch

SECONDS = "CTRL_RENDEZVOUS_SECONDS"  # how long to wait, in the environment
DEFAULT, SPEAK, PAUSE = 600.0, 5.0, 0.1  # seconds: to wait, until the line that says so, between two looks


def patience() -> float:
    """Return how many seconds to wait for the other processes; refuse (ValueError) what is no positive number."""
    text = os.environ.get(SECONDS, str(DEFAULT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{SECONDS}={text}: give the seconds to wait for other processes, such as {DEFAULT:g}.")
    return seconds


def meet(launch: Launch) -> TCPStore:
    """Return the store in which all ranks of a launch have arrived; the address is in the standard environment.

    Raises:
        ValueError: not all have arrived in time, or the address is none, or not to be had.
    """
    host, port_text = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port_text.isdecimal() and 0 < int(port_text) < 2**16):
        raise ValueError(f"MASTER_PORT={port_text} is no port. Set one from 1 to 65535, the same for every process.")
    waiting = Waiting(f"{host}:{port_text}", launch, patience())
    port, agent = int(port_text), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the launcher hosts it
    hosts = launch.rank == 0 and not agent
    while not hosts and not answers(host, port):
        waiting.look("the first of them to answer")
    try:
        # long enough for a busy host, and for nothing else: who answers is there
        timeout = timedelta(seconds=min(60.0, waiting.seconds))
        store = TCPStore(host, port, launch.size, hosts, timeout, wait_for_workers=False, multi_tenant=True)
        store.set(key(launch.rank), "here")
        while missing := [rank for rank in range(launch.size) if not store.check([key(rank)])]:
            waiting.look(f"process {', '.join(map(str, missing[:5]))}{' …' * (len(missing) > 5)}")
    except RuntimeError as error:  # a port that is taken, a process 0 that has ended
        reason = str(error).strip().splitlines()[0][:200]
        here = f"process {launch.rank} of {launch.size}"
        raise ValueError(f"{here} cannot meet the others at {host}:{port}: {reason}") from error
    store.set_timeout(timedelta(seconds=waiting.seconds))
    return store


def key(rank: int) -> str:
    """Name the entry of the store that says that a rank has arrived."""
    return f"ctrl/arrived/{rank}"


def answers(host: str, port: int) -> bool:
    """Return whether anybody listens there; torch's own client would fill the terminal with each failure."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:  # a name that is not known yet, a host that is not up, a port that nobody has opened
        return False
    return True


class Waiting:
    """Count the time of one rendezvous, say once for whom it waits, and end it."""

    def __init__(self, place: str, launch: Launch, seconds: float) -> None:
        self.place, self.launch, self.seconds = place, launch, seconds
        self.begin, self.spoken = time.monotonic(), False

    def look(self, whom: str) -> None:
        """Wait a moment for `whom`; raise ValueError when it has been too long."""
        passed = time.monotonic() - self.begin
        here = f"process {self.launch.rank} of {self.launch.size}"
        if passed > self.seconds:
            all_of_them = f"all {self.launch.size} with the same MASTER_ADDR and MASTER_PORT"
            waited = f"{here} waited {self.seconds:g} s at {self.place} for {whom}"
            raise ValueError(f"{waited}. Start {all_of_them}, or wait longer: {SECONDS}=1800.")
        if not self.spoken and passed > min(SPEAK, self.seconds / 2):
            self.spoken = True
            waits = f"{here} waits at {self.place} for {whom}, {self.seconds:g} s at most"
            print(f"ctrl: {waits}", file=sys.stderr, flush=True)
        time.sleep(PAUSE)
