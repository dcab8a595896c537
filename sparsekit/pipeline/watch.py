"""How each of several processes learns that another has failed, or is gone."""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from ..errors import SparsekitError, is_mistake

BEAT = 0.1  # seconds between two looks at the store
PATIENCE = 3.0  # seconds that a rank which fails stays, for the others to learn why
GONE = "rank {} is gone without a word: killed, or cut off"


class Watch(threading.Thread):
    """A thread with a connection between rank 0 and every other: the system closes it with the process at its other end. Why a rank
    failed stands in the store, under the key "failure"; the first one counts."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        super().__init__(name="sparsekit watch", daemon=True)
        self.store, self.rank, self.size = store, rank, size
        self.failure: tuple[int, str, bool] | None = None  # the rank that failed, how to say so, whether by a user's mistake
        self._lines: dict[socket.socket, int] = {}  # to which rank
        self._door: socket.socket | None = None  # of rank 0, where the others come in
        self._ending = threading.Event()
        if rank == 0:
            both = socket.has_dualstack_ipv6()
            self._door = socket.create_server(
                ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, backlog=size, dualstack_ipv6=both
            )
            self._token = secrets.token_hex(8)
            hosts = [os.environ.get("MASTER_ADDR"), socket.gethostname(), "127.0.0.1"]
            store.set("door", json.dumps([[host for host in hosts if host], self._door.getsockname()[1], self._token]))
        self.start()

    @property
    def connected(self) -> bool:
        return len(self._lines) == (self.size - 1 if self.rank == 0 else 1)

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                if self.rank and not self._lines and self.store.check(["door"]):
                    self._go_in()
                for ready in select.select([*self._lines, *[self._door] * (self._door is not None)], [], [], BEAT)[0]:
                    if ready is self._door:
                        self._let_in()
                    elif _closed(ready) and not self.store.check([f"leave/{(rank := self._lines.pop(ready))}"]):
                        self.publish(rank, GONE.format(rank))
                if self.failure is None and self.store.check(["failure"]):
                    self.failure = tuple(json.loads(self.store.get("failure")))
                    self.store.set(f"knows/{self.rank}", "")
        except RuntimeError:  # the store is gone, and with it who held it
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self.failure = self.failure or (0, "torchrun, which held the store, is gone" if agent else GONE.format(0), False)
        except Exception as error:  # without a watch a wait for the others could be for ever
            what = f"rank {self.rank} cannot watch the others any more: {type(error).__name__}: {error}"
            self.failure = self.failure or (self.rank, what, False)

    def publish(self, rank: int, text: str, mistake: bool = False) -> None:
        self.store.compare_set("failure", "", json.dumps((rank, text, mistake)))

    def give_up(self, error: BaseException) -> None:
        """Tells the others of this rank's error, and stays until they know, or cannot be expected to."""
        what = f"failed: {error}" if isinstance(error, SparsekitError) else f"failed: {type(error).__name__}: {error}"
        with suppress(RuntimeError):
            what = "was interrupted" if isinstance(error, KeyboardInterrupt) else what
            self.publish(self.rank, f"rank {self.rank} {what}", is_mistake(error))
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end and self.is_alive():
                gone = self.failure[0] if self.failure else self.rank
                if all(self.store.check([f"knows/{rank}"]) for rank in range(self.size) if rank not in (self.rank, gone)):
                    break
                time.sleep(BEAT / 4)

    def stop(self) -> None:
        self._ending.set()
        self.join(PATIENCE)
        for held in (*self._lines, *[self._door] * (self._door is not None)):
            held.close()

    def _let_in(self) -> None:
        try:
            line = self._door.accept()[0]
        except OSError:  # gone again, or no descriptor is left: it tries again
            return
        line.settimeout(1.0)
        with suppress(OSError, ValueError):
            told = line.recv(64, socket.MSG_WAITALL).decode().split()
            if told[:1] == [self._token]:
                _keep_alive(line)
                line.sendall(b"!")
                self._lines[line] = int(told[1])
                return
        line.close()

    def _go_in(self) -> None:
        """Where nobody answers, the next turn tries again."""
        hosts, port, token = json.loads(self.store.get("door"))
        for host in hosts:
            with suppress(OSError):
                line = socket.create_connection((host, port), timeout=PATIENCE)
                line.sendall(f"{token} {self.rank}".ljust(64).encode())
                if line.recv(1):
                    _keep_alive(line)
                    self._lines[line] = 0
                    return
                line.close()


def _closed(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except OSError:
        return True


def _keep_alive(line: socket.socket) -> None:
    """Where a machine is gone, nobody closes the connection: the system then does after half a minute."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
