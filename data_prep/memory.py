"""How much memory this process could still take."""

from pathlib import Path


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this process could still take: the machine's, or its container's limit; None if unknown."""
    try:
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        room = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        if limit != "max":
            room = min(room, int(limit) - int(used) + int(stat["inactive_file"]))  # cached files make way
    except (OSError, KeyError, ValueError):
        pass  # no container, or cgroup v1
    return room
