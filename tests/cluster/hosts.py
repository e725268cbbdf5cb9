"""Two hosts on one machine: network namespaces with a link between them that can be cut, a Ray node in each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

HEAD, OTHER, CONTROL, HERE = "10.213.7.1", "10.213.7.2", "10.213.8.1", "10.213.8.2"
RAY = {  # a token, else Ray lets in whoever comes; its patience, in milliseconds and times: half a minute by default
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "a" * 64,
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_USAGE_STATS_ENABLED": "0",
}
OBJECT_STORE_BYTES = 80_000_000
OURS = ENGINE, RANK, PLACER = (
    "foretell.server.engine_process",
    "foretell.parallel.rank",
    "foretell.cluster.placer",
)


def possible() -> str:
    """Why there can be no two hosts here; "" if there can."""
    try:
        import ray  # noqa: F401
    except ImportError:
        return "Ray is not installed"
    if not shutil.which("ip") or os.geteuid() != 0:
        return "network namespaces need ip and root"
    probe = f"ftprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "ip netns is not allowed here"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@dataclass
class TwoHosts:
    head: str  # names of namespaces
    other: str
    folder: Path

    def command(self, host: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", host, *words]

    def cut(self) -> None:
        """Nothing passes between the two any more."""
        ip("-n", self.other, "link", "set", "between", "down")

    def mend(self) -> None:
        ip("-n", self.other, "link", "set", "between", "up")

    def processes(self, host: str, *modules: str) -> list[psutil.Process]:
        """What runs there of these modules; of everything if none is named."""
        listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout
        found = []
        for pid in listed.split():
            try:
                process = psutil.Process(int(pid))
                if not modules or any(word in modules for word in process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


@contextmanager
def two_hosts(cpus: int = 1) -> Iterator[TwoHosts]:
    names = f"fthead{os.getpid()}", f"ftother{os.getpid()}"
    hosts = TwoHosts(*names, Path(tempfile.mkdtemp(prefix="ft", dir="/tmp")))  # Ray's sockets need a short path
    loops: list[subprocess.Popen[bytes]] = []
    try:
        _connect(hosts)
        common = f"--num-cpus {cpus} --object-store-memory {OBJECT_STORE_BYTES} --disable-usage-stats --block"
        head = f"--head --port 6379 --node-ip-address {HEAD} --include-dashboard false --temp-dir {hosts.folder}"
        loops.append(_ray(hosts, hosts.head, f"{head} {common}"))
        _wait_for_head(hosts)
        loops.append(_ray(hosts, hosts.other, f"--address {HEAD}:6379 --node-ip-address {OTHER} {common}"))
        yield hosts
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
        for name in names:
            for process in hosts.processes(name):
                process.send_signal(signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(hosts.folder, ignore_errors=True)


def _connect(hosts: TwoHosts) -> None:
    control = f"ft{os.getpid()}"
    for name in (hosts.head, hosts.other):
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("link", "add", "between", "netns", hosts.head, "type", "veth", "peer", "between", "netns", hosts.other)
    ip("link", "add", control, "type", "veth", "peer", "control", "netns", hosts.head)
    for name, address, link in (
        (hosts.head, HEAD, "between"),
        (hosts.other, OTHER, "between"),
        (hosts.head, CONTROL, "control"),
    ):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
        ip("-n", name, "link", "set", link, "up")
    ip("addr", "add", f"{HERE}/24", "dev", control)
    ip("link", "set", control, "up")


def _ray(hosts: TwoHosts, host: str, options: str) -> subprocess.Popen[bytes]:
    """A Ray node that is started again when it ends, as a service manager would: one that was taken for dead ends."""
    ray = Path(sys.executable).parent / "ray"
    root = str(Path(__file__).parents[2])
    script = f"while :; do {ray} start {options}; sleep 1; done"
    with (hosts.folder / f"{host}.log").open("wb") as out:
        return subprocess.Popen(
            hosts.command(host, "bash", "-c", script),
            stdout=out, stderr=out, stdin=subprocess.DEVNULL, env={**os.environ, **RAY, "PYTHONPATH": root},
        )  # fmt: skip


def _wait_for_head(hosts: TwoHosts) -> None:
    probe = f"import socket; socket.create_connection(({HEAD!r}, 6379), 1)"
    deadline = time.monotonic() + 60
    while subprocess.run(hosts.command(hosts.head, sys.executable, "-c", probe), capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise TimeoutError((hosts.folder / f"{hosts.head}.log").read_text())
        time.sleep(0.2)
