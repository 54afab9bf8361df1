"""Sizes of this machine's memory and disks, for planning a run."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# Memory that calls itself a disk: a swap file there frees nothing.
_MEMORY_FILESYSTEMS = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
# Where another machine's process may write too.
_NETWORK_FILESYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "ceph", "gpfs", "9p"}


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes. `gpu_memory` is of each GPU; () without one."""

    ram: int
    gpu_memory: tuple[int, ...] = ()
    gpu_names: tuple[str, ...] = ()
    disk: int = 0
    """Free, where swap files would go."""
    disk_path: str = ""
    filesystem: str = ""

    @property
    def can_swap(self) -> bool:
        """Whether the disk is one."""
        return self.disk > 0 and self.filesystem not in _MEMORY_FILESYSTEMS


def this_machine(swap: str | Path = ".") -> Machine:
    """Read the sizes here; swap: the folder for swap files, which need not exist yet."""
    import torch

    folder = existing_parent(Path(swap))
    cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return Machine(
        ram=ram(),
        gpu_memory=tuple(torch.cuda.get_device_properties(i).total_memory for i in cuda),
        gpu_names=tuple(torch.cuda.get_device_name(i) for i in cuda),
        disk=shutil.disk_usage(folder).free,
        disk_path=str(folder.resolve()),
        filesystem=filesystem(folder),
    )


def ram() -> int:
    """Bytes of memory that this process may have: the machine's, or its container's."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(installed, int(Path(file).read_text("ascii")))
        except (OSError, ValueError):  # no such limit, or 'max'
            continue
    return installed


def free_ram() -> int:
    """Bytes that can be had without swapping, by Linux's own estimate; elsewhere all of it."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(ram(), 1024 * int(line.split()[1]))
    except OSError:
        pass
    return ram()


def existing_parent(path: Path) -> Path:
    """The nearest folder of `path` that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def filesystem(path: str | Path) -> str:
    """The type of the file system that holds `path`, as `ext4`; '' where it can't be told."""
    try:
        mounts = Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    real, best, kind = existing_parent(Path(path)).resolve(), Path(), ""
    for line in mounts:
        _, mount, found, *_ = line.split(" ")
        where = Path(mount.replace("\\040", " "))
        # The last of equals wins: it is mounted over the others.
        if real.is_relative_to(where) and len(where.parts) >= len(best.parts):
            best, kind = where, found
    return kind


def is_memory(kind: str) -> bool:
    """Whether a file system of this type lies in memory."""
    return kind in _MEMORY_FILESYSTEMS


def is_shared(kind: str) -> bool:
    """Whether other machines may write to a file system of this type."""
    return kind in _NETWORK_FILESYSTEMS or kind.startswith("fuse")
