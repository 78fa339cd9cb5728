"""Confinement of this process by the Linux kernel, through ctypes; used by sandbox_child.py.

There are two modes, and the first one that the machine allows is used: "namespaces" (mount, PID, network, IPC, with a
user namespace if the caller is not root) and "landlock" (for containers without namespaces). Both add a seccomp filter
that lists the allowed system calls, resource limits, and a separate user if the caller is root. docs/code.md states
which guarantee depends on what. Everything here runs before a model's code and cannot be undone by it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass

TMP_BYTES = 16 << 20
"""Size of the private /tmp in bytes."""
SPARE = "/.libraries"
"""Second mount point of libraries in /tmp: the private /tmp hides them, and they are mounted into it from here."""
TMP_FILES = 1024
OPEN_FILES = 64
THREADS = 32
STACK_BYTES = 64 << 20

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 4096, 16384, 1 << 18
SYSTEM_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NEW_ROOT = "/sys"
"""Place where the new root is built; it needs nothing from there."""

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of its numbers below, and its AUDIT_ARCH."""
CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, close 3 57, close_range 436 436,
openat 257 56, lseek 8 62, fstat 5 80, newfstatat 262 79, statx 332 291, faccessat 269 48, faccessat2 439 439,
readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, ftruncate 77 46, mkdirat 258 34,
unlinkat 263 35, renameat 264 38, renameat2 316 276, symlinkat 266 36, linkat 265 37, fsync 74 82, fdatasync 75 83,
umask 95 166, dup 32 23, dup3 292 24, pipe2 293 59, flock 73 32, mmap 9 222, munmap 11 215, mprotect 10 226,
mremap 25 216, madvise 28 233, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, getpid 39 172,
getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148,
getresgid 120 150, getgroups 115 158, getpgid 121 155, getsid 124 156, set_tid_address 218 96, set_robust_list 273 99,
get_robust_list 274 100, rseq 334 293, futex 202 98, sched_yield 24 124, sched_getaffinity 204 123,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169,
times 100 153, getrusage 98 165, getitimer 36 102, setitimer 38 103, getrandom 318 278, uname 63 160, sysinfo 99 179,
getrlimit 97 163, ppoll 271 73, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21,
epoll_pwait 281 22, eventfd2 290 19, sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockopt 55 209,
getsockname 51 204, getpeername 52 205, exit 60 93, exit_group 231 94, restart_syscall 219 128, wait4 61 260,
waitid 247 95, getpriority 140 141, statfs 137 43, fstatfs 138 44, fadvise64 221 223, fallocate 285 47,
getcpu 309 168, open 2, creat 85, stat 4, lstat 6, access 21, readlink 89, getdents 78, mkdir 83, rmdir 84, unlink 87,
rename 82, symlink 88, link 86, dup2 33, pipe 22, poll 7, select 23, epoll_create 213, epoll_wait 232, eventfd 284,
time 201, arch_prctl 158, alarm 37, pause 34, getpgrp 111
"""
"""System calls that are allowed with any arguments, with their numbers on x86-64 and aarch64."""
LIMITED = {"fcntl": (72, 25), "ioctl": (16, 29), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
LIMITED |= {"socketpair": (53, 199), "clone": (56, 220), "clone3": (435, 435), "setrlimit": (160, 164)}
"""System calls whose arguments are checked."""
OTHERS = {"seccomp": (317, 277), "pivot_root": (155, 41), "capset": (126, 91), "mount_setattr": (442, 442)}
OTHERS |= {"landlock_create": (444, 444), "landlock_add": (445, 445), "landlock_restrict": (446, 446)}

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x50000
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
"""BPF instructions: load a word, jump if equal, return."""

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """This machine cannot provide a required guarantee."""


@dataclass(frozen=True)
class Limits:
    processor_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Lock:
    """Way in which programs are locked down on this machine."""

    mode: str
    """Mode: namespaces, landlock, or none."""
    uid: int | None
    """User id that programs run as, used by nobody else; None keeps the caller's."""
    threads: bool
    """True if a program may have THREADS threads; otherwise it has one."""
    readable: tuple[str, ...]


def prepare(mode: str) -> Lock:
    """Enter the namespaces if `mode` is auto or namespaces, and return how programs are locked down.

    Raise Refused, with the reasons, if the machine allows neither mode.
    """
    if mode == "none" and sys.platform == "linux":
        return Lock("none", None, True, ())
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise Refused(f"it runs on Linux with x86-64 or aarch64, and this is {sys.platform} on {platform.machine()}")
    readable = tuple(folders_of_python())
    reasons = []
    if mode in ("auto", "namespaces"):
        try:
            _rehearse(readable)
            is_alone = _enter(readable)
            uid = _free_uid(readable)
            # since Linux 5.14 a user namespace counts the processes of its users separately
            return Lock("namespaces", uid, uid is not None or (is_alone and _release() >= (5, 14)), readable)
        except OSError as error:
            reasons.append(f"namespaces: {error.strerror} ({error.filename})")
    if mode in ("auto", "landlock"):
        version = libc.syscall(ctypes.c_long(_number("landlock_create")), None, ctypes.c_size_t(0), ctypes.c_uint(1))
        if version >= 1:
            uid = _free_uid(readable)
            return Lock("landlock", uid, uid is not None, readable)
        reasons.append(f"Landlock: {os.strerror(ctypes.get_errno())}")
    raise Refused("; ".join(reasons))


def confine(lock: Lock, limits: Limits) -> None:
    """Lock this process down permanently, as the last step before a model's code runs. Raise OSError if it fails."""
    os.setsid()
    os.umask(0o077)
    if lock.mode == "namespaces":
        _call("unshare", libc.unshare, NEWNS)
        _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={TMP_BYTES},nr_inodes={TMP_FILES},mode=0777")
        for path in filter(_is_in_tmp, lock.readable):
            _folder(path)
            for depth in range(3, path.count("/") + 2):
                os.chmod("/".join(path.split("/")[:depth]), 0o755)
            _mount(SPARE + path, path, None, BIND | RECURSIVE)
            _read_only(path, nodev=True)
        os.chdir("/tmp")
    elif lock.mode == "landlock":
        os.chdir("/")
    whole_s = max(1, round(limits.processor_s + 0.49))
    for name, most in {
        "CPU": whole_s,
        "AS": limits.memory_bytes,
        "FSIZE": TMP_BYTES,
        "NOFILE": OPEN_FILES,
        "NPROC": THREADS if lock.threads else resource.RLIM_INFINITY,
        "STACK": STACK_BYTES,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = hard if most == resource.RLIM_INFINITY else most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    if lock.mode == "none":
        return
    if lock.uid is not None:
        os.setgroups([])
        os.setresgid(lock.uid, lock.uid, lock.uid)
        os.setresuid(lock.uid, lock.uid, lock.uid)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", libc.syscall, ctypes.c_long(_number("capset")), header, none)
    _prctl(4, 0)  # no core, no ptrace by others: PR_SET_DUMPABLE
    die_with_parent()
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    if lock.mode == "landlock":
        _landlock(lock.readable)
    _seccomp(filter_of(os.getpid(), lock.threads))


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies: PR_SET_PDEATHSIG."""
    _prctl(1, 9)


def unshare_pids() -> None:
    """Put children of this process into a new PID namespace, with the first of them as its init."""
    _call("unshare", libc.unshare, NEWPID)


def folders_of_python() -> Iterable[str]:
    """Yield the paths that the interpreter reads: its libraries and the system's, with links resolved."""
    wanted = [*SYSTEM_FOLDERS, *SYSTEM_FILES, *sys.path, os.path.join(sys.base_prefix, "lib")]
    real = {os.path.realpath(path) for path in wanted if path and os.path.exists(path)}
    for path in sorted(real):
        if not any(path.startswith(f"{other}/") for other in real):
            yield path


def filter_of(pid: int, threads: bool) -> bytes:
    """Return the seccomp filter of process `pid` as BPF: a list of allowed calls; all others fail with EPERM."""
    column, architecture = ARCHITECTURES[platform.machine()]
    rows = [entry.split() for entry in CALLS.replace("\n", " ").split(",")]
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for _, *numbers in rows:
        if column < len(numbers):
            code += [(EQUAL, 0, 1, int(numbers[column])), (RETURN, 0, 0, ALLOW)]
    # a program that kills itself, or lowers its limit of processor time, would look like one killed by the machine
    unstoppable, cpu = (9, 19), (0,)
    pthread = (0x3D0F00, 0x7D0F00)  # flags with which glibc and musl start a thread
    code += _allow_if("kill", (0, (pid,), True), (1, unstoppable, False))
    code += _allow_if("tgkill", (0, (pid,), True), (2, unstoppable, False))
    code += _allow_if("prlimit64", (0, (0, pid), True), (1, cpu, False))
    code += _allow_if("setrlimit", (0, cpu, False))
    code += _allow_if("fcntl", (1, (0, 1, 2, 3, 4, 1030, 1032), True))  # no locks, no owner, no size of pipes
    code += _allow_if("ioctl", (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), True))
    # only streams: a pair of datagram sockets could send to a socket outside
    code += _allow_if("socketpair", (0, (1,), True), (1, (1, 0x801, 0x80001, 0x80801), True))
    code += _allow_if("clone", (0, pthread if threads else (), True))
    code += [(EQUAL, 0, 1, _number("clone3")), (RETURN, 0, 0, ERRNO | ENOSYS)]  # libraries then call clone
    code += [(RETURN, 0, 0, ERRNO | EPERM)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def _allow_if(name: str, *conditions: tuple[int, tuple[int, ...], bool]) -> list[tuple[int, int, int, int]]:
    """Return the lines that allow a call if each argument is one of the values (True) or none of them (False).

    Arguments are compared by their lower 32 bits; the kernel reads no more of these.
    """
    deny = (RETURN, 0, 0, ERRNO | EPERM)
    lines: list[tuple[int, int, int, int]] = []
    for argument, values, wanted in conditions:
        lines.append((LOAD, 0, 0, 16 + 8 * argument))
        if wanted:
            lines += [(EQUAL, len(values) - n, 0, value) for n, value in enumerate(values)]
            lines.append(deny)
        else:
            for value in values:
                lines += [(EQUAL, 0, 1, value), deny]
    lines.append((RETURN, 0, 0, ALLOW))
    return [(EQUAL, 0, len(lines), _number(name)), *lines]


def _seccomp(code: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_char_p))

    program = Program(len(code) // 8, code)
    _call("seccomp", libc.syscall, ctypes.c_long(_number("seccomp")), 1, 0, ctypes.byref(program))


def _landlock(readable: Iterable[str]) -> None:
    """Allow reading below these paths and from devices, nothing else. Newer versions also forbid TCP and signals."""
    number = ctypes.c_long(_number("landlock_create"))
    version = libc.syscall(number, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # all rights that this version knows
    wanted = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _call("landlock", libc.syscall, number, wanted[:size], ctypes.c_size_t(size), ctypes.c_uint(0))
    read_file, read_folder, write_file = 4, 8, 2
    for path in [*readable, *DEVICES]:
        rights = read_file | (read_folder if os.path.isdir(path) else 0) | (write_file if path == "/dev/null" else 0)
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, parent)
        _call("landlock", libc.syscall, ctypes.c_long(_number("landlock_add")), ruleset, 1, rule, ctypes.c_uint(0))
        os.close(parent)
    _call("landlock", libc.syscall, ctypes.c_long(_number("landlock_restrict")), ruleset, ctypes.c_uint(0))
    os.close(ruleset)


def _rehearse(readable: Iterable[str]) -> None:
    """Enter the namespaces in a child first, since a partial failure cannot be undone. Raise OSError if it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _enter(readable)
            unshare_pids()
        except OSError as error:
            os.write(writer, f"{error.errno or 1} {error.filename}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        number, _, where = file.read().decode().partition(" ")
    os.waitpid(child, 0)
    if number:
        raise OSError(int(number), os.strerror(int(number)), where)


def _enter(readable: Iterable[str]) -> bool:
    """Move this process into new namespaces and a root with `readable`, read-only, and an empty /tmp.

    Return whether it needed a user namespace, as callers without privileges do.
    """
    wanted, uid, gid = NEWNS | NEWNET | NEWIPC | NEWUTS, os.getuid(), os.getgid()
    is_alone = False
    try:
        _call("unshare", libc.unshare, wanted)
    except PermissionError:
        is_alone = True
        _call("unshare", libc.unshare, wanted | NEWUSER)
        for name, text in {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", NEW_ROOT, "tmpfs", NOSUID | NODEV, "size=1m,mode=0755")
    for name in (*SYSTEM_FOLDERS, *SYSTEM_FILES):
        if os.path.islink(name):
            _folder(os.path.dirname(NEW_ROOT + name))
            os.symlink(os.path.realpath(name), NEW_ROOT + name)
    mounted = [(path, path) for path in (*readable, *DEVICES)]
    mounted += [(path, SPARE + path) for path in filter(_is_in_tmp, readable)]
    for path, inside in mounted:
        place = NEW_ROOT + inside
        if os.path.isdir(path):
            _folder(place)
        else:
            _folder(os.path.dirname(place))
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o444))
        _mount(path, place, None, BIND | RECURSIVE)
        _read_only(place, nodev=path not in DEVICES)
    _folder(f"{NEW_ROOT}/tmp")
    os.chdir(NEW_ROOT)
    _call("pivot_root", libc.syscall, ctypes.c_long(_number("pivot_root")), b".", b".")
    _call("umount", libc.umount2, b".", 2)  # MNT_DETACH: the old root, which is on top
    os.chdir("/")
    _read_only("/", nodev=True, recursive=False)
    return is_alone


def _is_in_tmp(path: str) -> bool:
    return path.startswith("/tmp/")


def _folder(path: str) -> None:
    os.makedirs(path, mode=0o755, exist_ok=True)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call(f"mount {target}", libc.mount, texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _read_only(path: str, nodev: bool, recursive: bool = True) -> None:
    attributes = struct.pack("QQQQ", 1 | 2 | (4 if nodev else 0), 0, 0, 0)  # RDONLY, NOSUID, NODEV
    flags = ctypes.c_uint(0x8000 if recursive else 0)  # AT_RECURSIVE
    number = ctypes.c_long(_number("mount_setattr"))
    _call("mount_setattr", libc.syscall, number, -100, os.fsencode(path), flags, attributes, ctypes.c_size_t(32))


def _free_uid(readable: Iterable[str]) -> int | None:
    """Return an unused user id for root to become; None if not root, or if that user cannot read the interpreter."""
    if os.geteuid() != 0:
        return None
    uid = 1_000_000_000 + os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os._exit(0 if all(os.access(path, os.R_OK) for path in readable) else 1)
        finally:
            os._exit(1)
    return uid if os.waitpid(child, 0)[1] == 0 else None


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def _number(name: str) -> int:
    return (LIMITED | OTHERS)[name][ARCHITECTURES[platform.machine()][0]]


def _prctl(option: int, value: int) -> None:
    _call("prctl", libc.prctl, option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def _call(what: str, function: ctypes._NamedFuncPointer, *args: object) -> int:
    """Call a function of the C library. Raise OSError with `what` as its file if it fails."""
    value = function(*args)
    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return value
