"""Several processes meet, or say for whom they wait, end after a while, and hear a signal meanwhile."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest

from ctrl_diffusion.system import ranks, rendezvous
from ctrl_diffusion.system.launch import Launch

processes = multiprocessing.get_context("forkserver")
WAIT = "from ctrl_diffusion.system import ranks\ntry: ranks.state()\nexcept ValueError as error: print(error)"


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(rank, port, **others):
    """One of two processes of a launch."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **others}


@pytest.mark.parametrize(("rank", "whom"), [(0, "process 1"), (1, "the first of them to answer")])
def test_a_process_that_never_comes_is_one_line_and_an_end(port, rank, whom):
    done = subprocess.run(
        [sys.executable, "-c", WAIT], capture_output=True, text=True, check=False,
        env=environment(rank, port, **{rendezvous.SECONDS: "2"}),
    )  # fmt: skip
    waits = f"process {rank} of 2 waits at 127.0.0.1:{port} for {whom}, 2 s at most"
    assert done.stderr == f"ctrl: {waits}\n"
    advice = "Start all 2 with the same MASTER_ADDR and MASTER_PORT, or wait longer: CTRL_RENDEZVOUS_SECONDS=1800."
    assert done.stdout == f"process {rank} of 2 waited 2 s at 127.0.0.1:{port} for {whom}. {advice}\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("rank", "sent"), [(0, signal.SIGTERM), pytest.param(1, signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_command_that_waits(port, tmp_path, rank, sent):
    """With 130, and long before the wait of ten minutes does."""
    command = [
        sys.executable,
        "-m",
        "ctrl_diffusion",
        "train",
        "--prior",
        "digits",
        "--control",
        "ink",
        "--data",
        "none",
    ]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True, env=environment(rank, port)
    )
    assert f"process {rank} of 2 waits at 127.0.0.1:{port} for " in process.stderr.readline()
    process.send_signal(sent)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert not (tmp_path / "run").exists()


def of_two(rank, port, root, names):
    """Join as a launcher would have it, then say what accelerate makes of it, and how long a collective may take."""
    place = (rank, 2, rank, 2)
    os.environ |= dict(zip(names, map(str, place), strict=True)) | {"MASTER_PORT": str(port)}
    size, total = ranks.world_size(), float(ranks.all_reduce(ranks.torch.tensor(rank + 1.0)))
    backend = ranks.torch.distributed.group.WORLD._get_backend(ranks.torch.device("cpu"))
    left = [name in os.environ for name in ("MASTER_ADDR", "WORLD_SIZE")]
    (root / str(rank)).write_text(repr((size, total, backend.options._timeout == ranks.TIMEOUT, left)))


OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


@pytest.mark.parametrize("names", [OPEN_MPI, pytest.param(HYDRA, marks=pytest.mark.slow)])
def test_processes_of_mpirun_meet_and_collectives_may_take_long(port, tmp_path, names):
    two = [processes.Process(target=of_two, args=(rank, port, tmp_path, names)) for rank in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join(timeout=120)
        process.kill()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["(2, 3.0, True, [False, False])"] * 2


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan", ""])
def test_a_wait_that_is_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv(rendezvous.SECONDS, text)
    with pytest.raises(ValueError, match=f"CTRL_RENDEZVOUS_SECONDS={text}: give the seconds to wait"):
        rendezvous.patience()


@pytest.mark.parametrize("text", ["", "http", "0", "70000"])
def test_a_port_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", text)
    with pytest.raises(ValueError, match=f"MASTER_PORT={text} is no port"):
        rendezvous.meet(Launch(0, 2, 0, 2, "torchrun"))


def test_a_port_that_is_taken_is_one_line(monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(ValueError, match=f"process 0 of 2 cannot meet the others at 127.0.0.1:{port}: ") as error:
            rendezvous.meet(Launch(0, 2, 0, 2, "torchrun"))
    assert "\n" not in str(error.value)


def test_a_platforms_variables_alone_start_nothing_but_a_line(port):
    set_by_kubernetes = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = "from ctrl_diffusion.system import ranks\nprint(ranks.world_size(), ranks.is_main(), ranks.rank_slice(5))"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, **set_by_kubernetes},
    )  # fmt: skip
    assert done.stdout == "1 True slice(0, 5, None)\n"
    assert "UserWarning: WORLD_SIZE=2: ignored, this process works alone, since no launcher started it." in done.stderr
