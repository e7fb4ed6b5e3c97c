"""Two hosts on one machine, as network namespaces: each with its own address, name and sshd, and a link between them that can be cut.

    with two_hosts(folder) as (first, second):
        first.start(["deepspeed", "--hostfile", str(first.hostfile), ...])
        second.set_link(up=False)

What it needs is asked first (`missing`): root, and the programs below. Everything it makes lies in the given folder or in the two
namespaces, and is gone when the block ends, however it ends. Both hosts share the machine's file system and process numbers.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
INTERFACE = "eth0"
NETWORK = "10.77.0"
PATIENCE = 10.0

# Its own names in the host's own view of the machine: nothing of it is seen outside.
ENTER = """#!/bin/sh
set -e
hostname "$1"
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/sshd
shift
exec "$@"
"""
SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
# Who lost the link is not waited for.
ClientAliveInterval 3
ClientAliveCountMax 2
"""
SSH = """
Host *
    User root
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
    ConnectTimeout 5
    ServerAliveInterval 3
    ServerAliveCountMax 2
    LogLevel ERROR
"""


@dataclass(frozen=True)
class Host:
    """One of the two hosts.

    Attributes:
        name: what `hostname` says on it, and what ssh calls it.
        address: on the link between the two.
        namespace: its network's name for `ip netns`.
        folder: of keys and settings, shared by both.
    """

    name: str
    address: str
    namespace: str
    folder: Path

    @property
    def hostfile(self) -> Path:
        """Both hosts with one slot each, for `deepspeed --hostfile`."""
        return self.folder / "hostfile"

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        """Starts a command on this host, leader of a group of its own; `ssh` and `pdsh` on it reach both hosts."""
        env = {**os.environ, **(environment or {}), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        entered = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", str(self.folder / "enter"), self.name, *command]
        return subprocess.Popen(entered, env=env, text=True, start_new_session=True, stdin=subprocess.DEVNULL, **options)

    def set_link(self, up: bool) -> None:
        """Connects this host, or cuts it off."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "up" if up else "down")

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on this host."""
        found = []
        for number in _ip("netns", "pids", self.namespace).split():
            try:
                found.append(psutil.Process(int(number)))
            except psutil.NoSuchProcess:
                continue
        return found


def missing() -> str | None:
    """What two hosts need and this machine lacks, in one line; None where they can be made."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = [package for program, package in PROGRAMS.items() if _program(program) is None]
    if absent:
        return f"needs the Debian packages {', '.join(sorted(set(absent)))}"
    probe = f"ft-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return f"needs network namespaces: {tried.stderr.strip()}" if tried.returncode else None


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two connected hosts with an sshd each, for as long as the block lasts; SIGTERM ends it as Ctrl-C does.

    Raises:
        RuntimeError: something is missing here, or an sshd does not answer.
    """
    if lacking := missing():
        raise RuntimeError(lacking)
    folder.mkdir(parents=True, exist_ok=True)
    tag = f"ft{os.getpid()}"
    names = ("host-a", "host-b")
    hosts = tuple(Host(name, f"{NETWORK}.{i}", f"{tag}{name[-1]}", folder) for i, name in enumerate(names, start=1))
    _write_files(hosts, folder)
    with ExitStack() as stack:
        stack.enter_context(_terminated_as_interrupted())
        for host in hosts:
            stack.callback(_remove, host)
            _ip("netns", "add", host.namespace)
        _connect(*hosts)
        for host in hosts:
            sshd = host.start([str(_program("sshd")), "-D", "-e", "-f", str(folder / f"sshd_{host.name}")], stderr=_log(folder, host))
            _await_answer(host, sshd)
        yield hosts[0], hosts[1]


def _write_files(hosts: Sequence[Host], folder: Path) -> None:
    for key in ("host_key", "user_key"):
        (folder / key).unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text("".join(f"{host.name},{host.address} {key}\n" for host in hosts))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    for host in hosts:
        (folder / f"sshd_{host.name}").write_text(SSHD.format(address=host.address, folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "bin").mkdir(exist_ok=True)
    _write_program(folder / "enter", ENTER.format(folder=folder))
    _write_program(folder / "bin" / "ssh", f'#!/bin/sh\nexec {_program("ssh")} -F {folder}/ssh_config "$@"\n')


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _connect(first: Host, second: Host) -> None:
    """A cable from one host's eth0 to the other's."""
    _ip("link", "add", INTERFACE, "netns", first.namespace, "type", "veth", "peer", "name", INTERFACE, "netns", second.namespace)
    for host in (first, second):
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        host.set_link(up=True)


def _await_answer(host: Host, sshd: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while host.start(["ssh", host.name, "true"], stderr=subprocess.DEVNULL).wait() != 0:
        if sshd.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the sshd of {host.name} does not answer: {(host.folder / f'sshd_{host.name}.log').read_text()}")
        time.sleep(0.1)


def _remove(host: Host) -> None:
    """Ends all that runs on a host, and the host; its end of the cable goes with it."""
    known = _ip("netns", "list").split()
    if host.namespace not in known:
        return
    for _ in range(10):  # what is killed may have started something meanwhile
        left = host.processes()
        for process in left:
            _kill(process)
        if not psutil.wait_procs(left, timeout=2)[1] and not host.processes():
            break
    _ip("netns", "delete", host.namespace)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _log(folder: Path, host: Host) -> Any:
    return (folder / f"sshd_{host.name}.log").open("w")


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the program as an exception does, so that everything is cleaned up."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
