"""Starts a real S3 server on loopback: one monitor, one storage daemon in memory and the gateway of Ceph.

Needs the system packages named in deploy/apt.txt; no root, no systemd, no disk. Nothing is authenticated
between the daemons, nothing listens beyond loopback, and all lies in one directory, which `stop` removes.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
ACCESS_KEY, SECRET_KEY = "holdfast-test", "not-a-secret-of-anybody"
_PATIENCE_S = 60.0

_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}/0
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
# Without keys between them the daemons also have to agree that nothing is encrypted.
ms client mode = crc
ms cluster mode = crc
ms service mode = crc
ms mon client mode = crc
ms mon cluster mode = crc
ms mon service mode = crc
ms bind ipv4 = true
ms bind ipv6 = false
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
run dir = {root}
log file = {root}/$name.log
admin socket = {root}/$name.asok
crash dir = {root}/crash
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 2000
mon data avail warn = 2
mon data avail crit = 1
[mon]
mon data = {root}/mon
mon cluster log file = {root}/cluster.log
# The defaults collect proposals for a second each: a start of 16 seconds instead of two.
paxos propose interval = 0.02
paxos min wait = 0.01
[osd]
osd data = {root}/osd
osd objectstore = memstore
osd class load list = *
osd class default list = *
memstore device bytes = {capacity}
[client]
rgw data = {root}/rgw
# Without nodelay every small request waits 40 ms for an acknowledgement.
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 32
rgw enable usage log = false
rgw crypt require ssl = false
# What was overwritten is freed after two hours by default; a small store is full, and hangs, long before.
rgw gc obj min wait = 1
rgw gc processor period = 1
debug rgw = 0
"""


def missing_programs() -> list[str]:
    """Return which of the server's programs are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class S3Server:
    """A server with one user and no bucket. `endpoint` is its URL."""

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="hf-s3-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._mon_port, self._port = _free_ports(2)
        self._fsid = str(uuid.uuid4())
        self._configuration = self._root / "ceph.conf"
        self._configuration.write_text(
            _CONFIGURATION.format(
                fsid=self._fsid,
                root=self._root,
                mon_port=self._mon_port,
                port=self._port,
                capacity=capacity_bytes,
            )
        )
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the three daemons and wait until the gateway answers."""
        for name in ("mon", "osd", "rgw"):
            (self._root / name).mkdir()
        self._start_monitor()
        self._start_storage()
        user = (
            "--uid=test",
            "--display-name=test",
            f"--access-key={ACCESS_KEY}",
            f"--secret-key={SECRET_KEY}",
        )
        self._run("radosgw-admin", "user", "create", *user)
        self.start_gateway()

    def start_gateway(self) -> None:
        """Start the gateway, for the first time or after it was killed, and wait until it answers."""
        self._spawn("radosgw", "-f", "-n", "client.rgw")
        self._wait(self._answers, "radosgw")

    def kill_gateway(self) -> None:
        """Kill the gateway: connections break, new ones are refused, what was stored stays."""
        process = self._processes.pop("radosgw")
        process.kill()
        process.wait()

    def suspend_gateway(self) -> None:
        """Suspend the gateway: connections are accepted and nothing is answered."""
        self._processes["radosgw"].send_signal(signal.SIGSTOP)

    def resume_gateway(self) -> None:
        """Let a suspended gateway go on."""
        self._processes["radosgw"].send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End all daemons and remove what they left."""
        for process in reversed(self._processes.values()):
            process.kill()  # everything is in memory: there is nothing to be polite about
            process.wait()
        self._processes.clear()
        shutil.rmtree(self._root, ignore_errors=True)

    def _start_monitor(self) -> None:
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        monmap = str(self._root / "monmap")
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._spawn("ceph-mon", "-f", "-i", "a")
        self._run("ceph", "--connect-timeout", "30", "mon", "stat")

    def _start_storage(self) -> None:
        identity = str(uuid.uuid4())
        number = self._run("ceph", "osd", "new", identity).strip()
        self._run("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", identity)
        self._spawn("ceph-osd", "-f", "-i", number)
        self._wait(lambda: "1 up" in self._run("ceph", "osd", "stat"), "ceph-osd")

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            [command[0], "-c", str(self._configuration), *command[1:]],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def _spawn(self, *command: str) -> None:
        log = (self._root / f"{command[0]}.out").open("wb")
        with log:
            self._processes[command[0]] = subprocess.Popen(
                [command[0], "-c", str(self._configuration), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "CEPH_CONF": str(self._configuration)},
            )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _wait(self, is_ready: Callable[[], bool], program: str) -> None:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not is_ready():
            said = (self._root / f"{program}.out").read_text(errors="replace")[-2000:]
            if self._processes[program].poll() is not None:
                raise RuntimeError(f"{program} ended at once: {said}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{program} is not ready after {_PATIENCE_S:.0f} s: {said}")
            time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
