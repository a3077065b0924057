"""Who started this process, and how many threads it has cores for: read before torch is there."""

import os
import subprocess
import sys

import pytest

from ctrl_diffusion.system import launch
from ctrl_diffusion.system.launch import MEETING, STANDARD, Launch

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
KUBERNETES = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, Launch(1, 4, 1, 2, "torchrun")),
        (
            TORCHRUN | {"TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "no"},
            Launch(1, 4, 1, 2, "accelerate launch"),
        ),
        (TORCHRUN, Launch(1, 4, 1, 2, "the launcher that set LOCAL_RANK")),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch(0, 1, 0, 1, "the launcher that set LOCAL_RANK")),
        (OPEN_MPI, Launch(3, 4, 1, 2, "Open MPI's mpirun")),
        (OPEN_MPI | KUBERNETES, Launch(3, 4, 1, 2, "Open MPI's mpirun")),
        (
            {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()},
            Launch(3, 4, 1, 2, "MVAPICH's mpirun"),
        ),
        (HYDRA, Launch(0, 2, 0, 2, "mpirun")),
        (SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Launch(3, 4, 1, 1, "srun --mpi=pmi2")),
    ],
)  # fmt: skip
def test_a_launcher_numbers_its_processes(environment, place):
    assert launch.read_launch(environment) == place
    assert launch.rank_of(environment) == str(place.rank)
    assert launch.ignored(environment) == []


@pytest.mark.parametrize(
    ("environment", "ignored"),
    [
        ({}, []),
        (KUBERNETES, ["WORLD_SIZE=2"]),
        ({"WORLD_SIZE": "two", "RANK": "", "MASTER_ADDR": "x"}, ["WORLD_SIZE=two"]),
        ({"WORLD_SIZE": "1", "RANK": "0"}, []),
        ({"WORLD_SIZE": ""}, []),
        (SLURM, ["SLURM_NTASKS=4"]),
        (KUBERNETES | {"LOCAL_RANK": "-1"}, ["WORLD_SIZE=2"]),
        ({"LOCAL_RANK": "0"}, []),
        ({"PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}, ["OMPI_COMM_WORLD_SIZE=2", "PMI_SIZE=2"]),
    ],
)
def test_what_a_platform_says_starts_nothing(environment, ignored):
    assert launch.read_launch(environment) == Launch()
    assert launch.rank_of(environment) == "0"
    assert launch.ignored(environment) == ignored


@pytest.mark.parametrize(
    "wrong", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "1"}, {"RANK": "-1"}, {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_RANK": ""}]
)
def test_numbers_that_do_not_fit_are_one_line(wrong):
    name, value = wrong.copy().popitem()
    with pytest.raises(ValueError, match=f"{name}={value}.*number no process among several. Unset them"):
        launch.read_launch(TORCHRUN | wrong)


def test_accelerate_sees_a_launch_by_torchs_names_alone(monkeypatch):
    names = {*STANDARD, *MEETING, *OPEN_MPI}

    def seen():
        return {name: os.environ[name] for name in sorted(names) if name in os.environ}

    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in (KUBERNETES | OPEN_MPI).items():
        monkeypatch.setenv(name, value)
    before = seen()
    with launch.standard_environment(Launch(3, 4, 1, 2, "mpirun")):
        assert seen() == dict(zip(sorted(STANDARD), ("1", "2", "3", "4"), strict=True)) | {
            "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"
        }  # fmt: skip
    assert seen() == before
    with launch.standard_environment(Launch()):
        assert seen() == {}
    assert seen() == before
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.delenv("MASTER_PORT")
    with launch.standard_environment(Launch(1, 2, 1, 2, "mpirun")):
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "29500")
    with (
        pytest.raises(ValueError, match="4 processes on several hosts: MASTER_ADDR is not set"),
        launch.standard_environment(Launch(3, 4, 1, 2, "mpirun")),
    ):
        pass


def version_1(folder, granted):
    return {f"{folder}cpu.cfs_quota_us": f"{granted}\n", f"{folder}cpu.cfs_period_us": "100000\n"}


V1, V2 = "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n0::/x\n", "0::/a/b\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (V2, {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4.0),
        (V2, {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../elsewhere\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (V2, {}, None),
        (V2, {"a/b/cpu.max": "max 100000\n"}, None),
        (V2, {"a/b/cpu.max": "garbage\n"}, None),
        (V1, version_1("cpu,cpuacct/docker/abc/", 250000), 2.5),
        (V1, version_1("cpu,cpuacct/", 200000), 2.0),
        (V1, version_1("cpu/docker/", 100000), 1.0),
        (V1, version_1("cpu,cpuacct/", -1), None),
    ],
)  # fmt: skip
def test_control_groups_say_how_many_cores_may_be_used(tmp_path, own, files, cores):
    (tmp_path / "own").write_text(own)
    (tmp_path / "root" / "cpu,cpuacct").mkdir(parents=True) if any("cpuacct" in name for name in files) else None
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert launch.quota(tmp_path / "root", tmp_path / "own") == cores
    assert launch.quota(tmp_path / "root", tmp_path / "none") is None


@pytest.mark.parametrize(
    ("affinity", "local_size", "granted", "threads"),
    [
        (8, 1, None, None), (8, 1, 16.0, None), (8, 1, 8.0, None), (8, 1, 2.0, 2), (8, 1, 2.5, 2), (8, 1, 0.5, 1),
        (8, 2, None, 4), (8, 16, None, 1), (8, 2, 3.0, 1), (1, 1, 0.5, None), (1, 4, None, None),
    ],
)  # fmt: skip
def test_threads_are_as_many_as_cores(monkeypatch, affinity, local_size, granted, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    assert launch.thread_count(local_size, granted) == threads


NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")


def left_by(code, **environment):
    """The variables of OpenMP after some code in a process of its own, and what it prints."""
    clean = {name: value for name, value in os.environ.items() if name not in (*NAMES, *TORCHRUN)}
    shown = f"\nprint([os.environ.get(name) for name in {NAMES}], 'torch' in sys.modules)"
    command = [sys.executable, "-c", f"import os, sys\n{code}{shown}"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SET = "from ctrl_diffusion.system import launch\nlaunch.quota = lambda: {}\nlaunch.set_threads()"


@pytest.mark.parametrize(
    ("code", "environment", "left"),
    [
        ("import ctrl_diffusion", {}, "[None, None, None, None] False"),
        ("import ctrl_diffusion.commands.app", {}, "[None, None, None, None] False"),
        (SET.format(None), {}, "[None, 'passive', '0', None] False"),
        (SET.format(1.5), {"OMP_NUM_THREADS": "3"}, "['3', 'passive', '0', None] False"),
        (SET.format(None), {"OMP_WAIT_POLICY": "active"}, "[None, 'active', None, None] False"),
        (SET.format(None), {"GOMP_SPINCOUNT": "9"}, "[None, None, None, '9'] False"),
        ("import torch\n" + SET.format(0.5), {}, "[None, None, None, None] True"),
    ],
)
def test_only_a_command_sets_threads_and_only_what_the_user_has_not(code, environment, left):
    assert left_by(code, **environment) == left


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="one core: one thread anyway")
def test_torch_has_as_many_threads_as_the_quota_grants():
    code = SET.format(1.5) + "\nimport torch\nassert torch.get_num_threads() == 1"
    assert left_by(code) == "['1', 'passive', '0', None] True"


def test_the_command_sets_them_before_torch_is_there():
    code = """
sys.argv = ["ctrl", "--version"]
from ctrl_diffusion.commands.app import main
try: main()
except SystemExit: pass"""
    version, left = left_by(code).splitlines()
    assert version
    assert left.split(", ", 1)[1] == "'passive', '0', None] False"
