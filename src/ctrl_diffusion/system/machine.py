"""Ask the operating system for cores, memory and disk: the one module that calls what only some systems have.

Windows has neither control groups, affinity by `os` nor `resource`, macOS only the last. What a system does not tell is
None or left out.
"""

import os
import shutil
import sys
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the cores that the control groups of this process, of version 1 or 2, grant it; None for no limit."""
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        return None
    shares = []
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        # version 2 names no controllers: it has a single tree, at the root
        top = root / (controllers if (root / controllers).is_dir() else "cpu")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit above holds below
            shares += quota_of(folder)
            if folder == top:
                break
    return min(shares, default=None)


def quota_of(folder: Path) -> list[float]:
    """Return the cores that one control group grants, or nothing."""
    try:
        if (folder / "cpu.max").is_file():  # version 2: "200000 100000", or "max 100000"
            granted, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            files = "cpu.cfs_quota_us", "cpu.cfs_period_us"
            granted, period = ((folder / name).read_text(encoding="utf-8").strip() for name in files)
        cores = int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # none, or no limit
        return []
    return [cores] if cores > 0 else []


def most_needed() -> int:
    """Return the peak memory of this process in bytes; 0 where the system does not tell."""
    for line in STATUS.read_text(encoding="utf-8").splitlines() if STATUS.is_file() else ():
        if line.startswith("VmHWM"):  # getrusage may report the peak of the parent process
            return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", 0)  # of Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> tuple[int, int]:
    """Return the bytes of memory that are free for a new job, and all there are on this machine."""
    import psutil

    whole = psutil.virtual_memory()
    return whole.available, whole.total


def free_disk(folder: Path) -> int:
    """Return the free bytes where a folder is, or would be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
