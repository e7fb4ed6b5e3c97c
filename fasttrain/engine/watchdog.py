"""No rank waits for ever for another: whoever dies, hangs or is cut off is noticed, named, and the others end with a status to restart on.

Each rank's watchdog, a thread of its own, says to rank 0's hub once a second what the training thread does (engine/hub.py), and hears who
is at fault (engine/verdict.py). Who hears nothing of rank 0 concludes that rank 0 or its host is gone. On a verdict every living rank,
without any collective: writes the stacks of its threads into RUN/faults/N/, does for a few seconds what was registered for such a case, and
ends.

It is Python: code that holds the interpreter's lock (a C function that computes without releasing it) silences the beat, and the rank
counts as silent after the limit. Its stacks then go to its own stderr, written by a thread of C.
"""

import faulthandler
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NoReturn

from fasttrain.engine.activity import Activity
from fasttrain.engine.channel import Channel, GarbledError
from fasttrain.engine.distributed import Processes
from fasttrain.engine.ending import end_stopped, report, status_of, told, within, write_stacks
from fasttrain.engine.guard import Guard
from fasttrain.engine.host import machine, place
from fasttrain.engine.hub import LOOPBACK, Hub
from fasttrain.engine.verdict import DIED, Member, Verdict, judge
from fasttrain.errors import Status, UserError

Rescue = Callable[[bool, float], None]

CONNECT_SECONDS = 30.0
REPORT_SECONDS = 5.0  # a run folder that hangs must not keep a rank from ending
RESCUE_SECONDS = 5.0
EXPLAIN_SECONDS = 3.0  # how long an error waits to hear whether another rank is at fault
MISTAKE_SECONDS = 3.0
ENDING_SECONDS = 60.0  # then a thread of C ends what could not end itself
LEAVE_SECONDS = 30.0  # how long a rank that failed may take to leave
LOCKED_SECONDS = 3.0  # beyond the limit: then a rank whose interpreter is locked up writes its stacks and ends
GUARD_SECONDS = 4.0  # beyond the limit: then one that does not even do that is woken, and soon killed


class Watchdog:
    """Watches over this rank, and with the others over all of them, for as long as its block lasts. Entering is a collective.

    An error that leaves the block ends the other ranks too; where it is only the echo of another rank's end, this process ends by the
    verdict instead, without a traceback.

    Args:
        activity: what the training thread does; each thing may last `timeout_seconds`, and one named in `patience` so much longer.
        run_dir: the stacks go to its folder faults/.
        each_beat: called about once a second, from the watchdog's thread.
    """

    def __init__(
        self,
        processes: Processes,
        activity: Activity,
        run_dir: Path,
        timeout_seconds: float,
        patience: Mapping[str, float] = MappingProxyType({}),
        each_beat: Callable[[], None] = lambda: None,
    ):
        self._processes, self._activity, self._run_dir = processes, activity, run_dir
        self._limit, self._patience, self._each_beat = timeout_seconds, patience, each_beat
        self._beat = min(1.0, timeout_seconds / 4)
        self._rescues: list[Rescue] = []
        self._hub: Hub | None = None
        self._channel: Channel | None = None
        self._guard: Guard | None = None
        self._main = Member(0, heard=0.0)
        self._failing: BaseException | None = None
        self._verdict: Verdict | None = None
        self._decided, self._left, self._concluding = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="fasttrain-watchdog", daemon=True)

    def on_fault(self, rescue: Rescue) -> None:
        """Registers what a surviving rank does before it ends: `rescue(lowest_survivor, seconds)`, in a thread, given so many seconds."""
        self._rescues.append(rescue)

    def explain(self, error: BaseException) -> Verdict | None:
        """The verdict on another rank that this rank's error is the echo of; None where the error is this rank's own.

        Tells the other ranks of the error, and waits some seconds for what is known.
        """
        if self._channel is None:
            return None
        self._channel.send({"status": status_of(error), "told": told(error)})
        self._decided.wait(EXPLAIN_SECONDS)
        return None if self._verdict is None or self._is_mine(self._verdict) else self._verdict

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Explains an error of its block at once, before anything is tidied up behind it."""
        try:
            yield
        except BaseException as error:
            self._conclude(error)
            raise

    def __enter__(self) -> "Watchdog":
        processes = self._processes
        self._faults: Path = processes.from_main(_next_folder(self._run_dir / "faults") if processes.is_main else None)
        if processes.world_size > 1:
            self._connect()
            self._guard = Guard(self._limit + GUARD_SECONDS)
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._conclude(error)
        elif self._channel is not None:
            self._say_goodbye(self._channel)
        os.write(self._wake, b"over")
        self._thread.join()
        if self._hub is not None:
            if error is not None:
                self._hub.wait_seen(REPORT_SECONDS)
            self._hub.close()
        if self._channel is not None:
            self._channel.close()
        if self._guard is not None:
            self._guard.close()
        os.close(self._wake)
        os.close(self._woken)

    def _connect(self) -> None:
        """Rank 0 opens the hub, and all connect to it; none goes on where one could not."""
        address = os.environ["MASTER_ADDR"]
        if self._processes.is_main:
            self._hub = Hub(self._processes.world_size, address, self._limit, self._patience, self._beat)
        mine = (self._hub.port, self._hub.token, place(), os.getpid(), machine()) if self._hub else None
        port, token, self._main.place, self._main.pid, self._main.machine = self._processes.from_main(mine)
        # Rank 0 reaches itself whatever happens to its links.
        address = LOOPBACK.get(address, "127.0.0.1") if self._processes.is_main else address
        problem = None
        try:
            self._channel = Channel(socket.create_connection((address, port), timeout=min(CONNECT_SECONDS, self._limit)))
            greeting = {"rank": self._processes.rank, "place": place(), "pid": os.getpid(), "machine": machine()}
            self._channel.send({"token": token, **greeting})
        except OSError as error:
            problem = f"rank {self._processes.rank} ({place()}): {error}"
        if problems := [told for told in self._processes.gather(problem) if told]:
            raise UserError(
                f"not all ranks reach rank 0 at {address} port {port}; let its host be reached on any port: {'; '.join(problems)}"
            )

    def _conclude(self, error: BaseException) -> None:
        """Ends this process where the error is the echo of another rank's end; else sees to it that it does end by its own."""
        if self._failing is not None:
            return
        self._failing = error
        self._concluding.set()
        if (verdict := self.explain(error)) is not None:
            self._end(verdict)
        if self._verdict is not None and self._verdict.status == Status.RESTART:
            self._report(self._verdict)
        _end_after(LEAVE_SECONDS, status_of(error))

    def _say_goodbye(self, channel: Channel) -> None:
        """Leaves well; rank 0, which the others watch by, as the last."""
        channel.send({"left": True})
        if self._hub is not None:
            self._hub.wait_left()
        else:
            self._left.wait(REPORT_SECONDS)

    def _watch(self) -> None:
        """Beats, listens and judges until `over` comes through the pipe."""
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            if self._channel is not None:
                selector.register(self._channel, selectors.EVENT_READ, self._channel)
            while True:
                began = time.monotonic()
                self._tell(began)
                while (left := began + self._beat - time.monotonic()) > 0:
                    for key, _ in selector.select(left):
                        if key.data is None:
                            return faulthandler.cancel_dump_traceback_later()
                        self._decide(self._listen(key.data))
                        if key.data.closed:
                            selector.unregister(key.data)
                        heard = time.monotonic()
                late = time.monotonic() - began - self._beat
                heard += late if late > self._limit / 2 else 0.0  # this process itself was not running
                self._decide(self._judge(time.monotonic() - heard))

    def _tell(self, now: float) -> None:
        """One beat. Should the next not come, a thread of C writes where the interpreter is locked up, and ends this process."""
        faulthandler.dump_traceback_later(self._limit + LOCKED_SECONDS, exit=True, file=2)
        self._each_beat()
        if self._guard is not None:
            self._guard.beat()
        if self._channel is not None:
            doing = self._activity.now
            self._channel.send({"what": doing.what, "step": doing.step, "number": doing.number, "age": round(now - doing.since, 3)})

    def _listen(self, channel: Channel) -> Verdict | None:
        """What the hub says; its end without a goodbye is rank 0's."""
        try:
            for message in channel.receive():
                if "left" in message:
                    self._left.set()
                if "verdict" in message:
                    channel.send({"seen": True})
                    return Verdict.of(message["verdict"])
        except (GarbledError, KeyError, TypeError, ValueError):
            channel.closed = True
        if channel.closed and not self._left.is_set():
            self._left.set()
            return self._on_main("died", 0.0, DIED)
        return None

    def _judge(self, silence: float) -> Verdict | None:
        """What a rank can tell by itself: that it hears nothing of rank 0, or, without others, that it is stuck."""
        if self._verdict is not None or self._left.is_set():
            return None
        if self._channel is None:
            doing, now = self._activity.now, time.monotonic()
            member = Member(0, now, place(), state="alive", what=doing.what, step=doing.step, number=doing.number, began=doing.since)
            return judge([member], now, self._limit, self._patience)
        if silence > self._limit and self._hub is None:
            return self._on_main(
                "silent", silence, f"nothing heard for {silence:.0f} s (stopped, its host hangs, or the link to it is cut)"
            )
        return None

    def _on_main(self, cause: str, seconds: float, why: str) -> Verdict:
        """A verdict on rank 0, which alone could have named another: each rank comes to it by itself, so rank 1 counts as the lowest."""
        doing = self._activity.now
        stopped = ((self._main.machine, self._main.pid),) if cause == "silent" else ()
        words = f"{self._main.told()} {why}; rank {self._processes.rank} was at {doing.what!r} of step {doing.step}"
        verdict = Verdict(cause, (0,), words, int(Status.RESTART), round(seconds, 3), lowest=1, stopped=stopped)
        if self._channel is not None:
            self._channel.send({"verdict": verdict.plain()})  # should rank 0 come back to life, it ends by the same
        return verdict

    def _decide(self, verdict: Verdict | None) -> None:
        if verdict is None or self._verdict is not None:
            return
        self._verdict = verdict
        self._decided.set()
        if self._is_mine(verdict):
            return
        if verdict.status != Status.RESTART:
            # The training thread may be about to end by the same mistake, and have something to write first.
            self._concluding.wait(MISTAKE_SECONDS)
        self._end(verdict)

    def _is_mine(self, verdict: Verdict) -> bool:
        """Whether it names the error that this rank is ending by: then it ends by that."""
        return verdict.cause == "failed" and self._processes.rank in verdict.ranks

    def _end(self, verdict: Verdict) -> NoReturn:
        """Ends this process by a verdict. Whoever else calls it waits for that."""
        with self._ending:
            faulthandler.dump_traceback_later(ENDING_SECONDS, exit=True, file=2)
            if verdict.status == Status.RESTART:
                self._report(verdict)
                for rescue in self._rescues:
                    within(RESCUE_SECONDS, rescue, self._processes.rank == verdict.lowest, RESCUE_SECONDS)
                within(REPORT_SECONDS, end_stopped, verdict)
            if self._hub is not None:
                self._hub.wait_seen(REPORT_SECONDS)
            within(1.0, sys.stdout.flush)
            os._exit(verdict.status)

    def _report(self, verdict: Verdict) -> None:
        processes = self._processes
        path = self._faults / f"rank-{processes.rank:05d}.txt"
        problem = within(REPORT_SECONDS, write_stacks, path, verdict, processes.rank, self._activity.now, self._failing)
        # Where rank 0 has gone, one rank of each host may know best, and none knows who else lives.
        alone = verdict.ranks == (0,) and verdict.cause in ("died", "silent")
        if processes.is_main or (alone and (processes.local_rank == 0 or processes.rank == verdict.lowest)):
            within(REPORT_SECONDS, report, self._faults, verdict, processes.rank, problem)


def _next_folder(folder: Path) -> Path:
    """The first number that no fault has had yet: a run has at most one between two starts."""
    taken = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
    return folder / f"{max(taken, default=0) + 1:04d}"


def _end_after(seconds: float, status: int) -> None:
    """Ends this process where leaving takes longer: a destroyed group may wait for ranks that are gone."""
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()
