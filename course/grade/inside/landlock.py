"""Forbid a process all files but named ones, by the kernel's Landlock: a second wall.

It needs no privilege and does not depend on the mounts being right. Sources: landlock(7) and the
kernel's include/uapi/linux/landlock.h. What an older kernel does not know is left out: version 4
added TCP, 6 added abstract sockets and signals to processes outside.
"""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable

CREATE, ADD_RULE, RESTRICT = 444, 445, 446  # the same numbers on every machine
ASK_VERSION, BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEVICE = 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEVICE
# The bits that each version knows: 13 at first, then linking across folders, truncation, devices.
KNOWN = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
KNOWN_TO_NEWER = (1 << 16) - 1
TCP = 0b11  # bind and connect
ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


def version() -> int:
    """What the kernel's Landlock can do, as its version; 0 where there is none."""
    return max(_libc().syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(ASK_VERSION)), 0)


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leave this process, and all that it starts, these folders and files; no way back.

    A path that does not exist is passed over. Expects no_new_privs to be set.
    Raises: OSError, when the kernel refuses.
    """
    libc, found = _libc(), version()
    handled = KNOWN.get(found, KNOWN_TO_NEWER)
    attributes = struct.pack(
        "=QQQ", handled, TCP if found >= 4 else 0, ABSTRACT_SOCKETS_AND_SIGNALS if found >= 6 else 0
    )
    size = 24 if found >= 6 else 16 if found >= 4 else 8
    ruleset = _must(libc.syscall(CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)))
    try:
        for paths, rights in ((readable, READ), (writable, handled)):
            for path in paths:
                _add(libc, ruleset, path, rights & handled)
        _must(libc.syscall(RESTRICT, ruleset, ctypes.c_uint32(0)))
    finally:
        os.close(ruleset)


def _add(libc, ruleset, path, rights):
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= OF_A_FILE
        rule = struct.pack("=Qi", rights, place)
        _must(libc.syscall(ADD_RULE, ruleset, BENEATH, rule, ctypes.c_uint32(0)))
    finally:
        os.close(place)


def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _must(result):
    if result < 0:
        number = ctypes.get_errno() or errno.EPERM
        raise OSError(number, f"the kernel refuses Landlock's rules ({os.strerror(number)})")
    return result
