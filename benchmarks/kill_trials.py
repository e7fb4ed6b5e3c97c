"""Kills in a chain: a run loses a random rank at a random moment, is started again, loses one again ..., and ends as if nothing had been.

Each kill is aimed at a moment that the victim announces (benchmarks/moments.py), a random share of that moment's usual time after it
began; it counts for the moment in which the victim really died. The signal comes from another process, as the kernel's would.
"""

import os
import random
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.fault_runs import EVERY, LIMIT, RANKS, Outcome, Setting, Whole, newest_step, outputs, spread, uninterrupted, write_config
from benchmarks.forked_ranks import Start
from benchmarks.moments import SAVING, TRAINING
from fasttrain.errors import Status

MOMENTS = (*TRAINING, *SAVING[:-1])
STAGES = (1, 2, 3)
STEPS_A_KILL = 2 * EVERY
NOTICED_WITHIN = 5.0


@dataclass
class Kill:
    """One kill, and what came of it.

    Attributes:
        moment: what the victim was doing when it died: its saving, where it was saving, else its training thread.
        finished: the last step that the victim had finished.
        newest: step of the newest committed checkpoint when all ranks were gone.
        statuses: of all ranks, the victim's too. notice_seconds: from the signal to the end of the others.
        resumed: step from which the next start went on. restart_seconds: from that start to its first step, without imports.
    """

    stage: int
    aimed: str
    moment: str
    rank: int
    finished: int
    newest: int
    statuses: list[int]
    notice_seconds: float
    resumed: int | None = None
    restart_seconds: float | None = None

    @property
    def lost(self) -> bool:
        """Whether a step that had been saved was not there for the next start."""
        return self.resumed is None or self.resumed < self.newest

    @property
    def redone(self) -> int:
        """Steps that had been finished and were computed again."""
        return 0 if self.resumed is None else max(0, self.finished - self.resumed)

    def problem(self) -> str | None:
        """What was not as promised."""
        others = [status for rank, status in enumerate(self.statuses) if rank != self.rank]
        if self.statuses[self.rank] != -signal.SIGKILL:
            return f"rank {self.rank} was to be killed and ended with {self.statuses[self.rank]}"
        if others != [Status.RESTART] * len(others):
            return f"the other ranks ended with {others}, not {int(Status.RESTART)}"
        if self.notice_seconds > NOTICED_WITHIN:
            return f"the other ranks took {self.notice_seconds:.1f} s to notice"
        return f"step {self.newest} was saved, the next start began after {self.resumed}" if self.lost else None


@dataclass
class Chain:
    """A run under kills; without problems it ended as the uninterrupted one did."""

    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Killer:
    """Kills ranks of one run, start after start.

    Args:
        hits: how many kills have fallen on each moment, over all chains: the next is aimed at the rarest.
    """

    def __init__(self, folder: Path, config: Path, stage: int, whole: Whole, hits: Counter[str], seed: int):
        self.chain = Chain()
        self._folder, self._config, self._stage, self._whole, self._hits = folder, config, stage, whole, hits
        self._random = random.Random(seed)
        self._starts = 0

    def run(self, kills: int, setting: Setting) -> Chain:
        """So many kills, fewer where time is over; then to the end, and the comparison."""
        for number in range(kills):
            if setting.late():
                break
            if not self._kill(number):
                return self.chain
        start = self._start()
        ended = start.wait(5 * LIMIT)
        self._note_resumed(start)
        if any(ended.statuses):
            self.chain.problems.append(f"the last start ended with {ended.statuses}:\n{start.told()}")
        else:
            self.chain.problems += self._whole.differences(self._folder)
        return self.chain

    def _start(self) -> Start:
        self._starts += 1
        return Start(self._config, RANKS, outputs(self._folder, self._starts))

    def _kill(self, number: int) -> bool:
        """One start and its kill, at a random step of this kill's stretch of the run. False where that moment never came."""
        what = min(self._random.sample(MOMENTS, len(MOMENTS)), key=lambda moment: self._hits[moment])
        step = number * STEPS_A_KILL + self._random.randint(1, STEPS_A_KILL)
        step = -(-step // EVERY) * EVERY if what in SAVING else step
        delay = self._random.random() * self._whole.seconds[what]
        start = self._start()
        victim = start.ranks[self._random.randrange(RANKS)]
        if not start.watch(lambda: any(m.what == what and m.step >= step for m in victim.moments[-4:]), LIMIT):
            ended = start.wait(0)
            self.chain.problems.append(f"start {self._starts} never came to {what} of step {step}: {ended.statuses}\n{start.told()}")
            return False
        time.sleep(delay)
        os.kill(victim.pid, signal.SIGKILL)
        at = time.monotonic()
        ended = start.wait(4 * NOTICED_WITHIN)
        self._note_resumed(start)
        noticed = max(ended.at[rank.number] - at for rank in start.ranks if rank is not victim)
        moment, finished = victim.died_in(), victim.finished_step()
        self._hits[moment] += 1
        self.chain.kills.append(
            Kill(self._stage, what, moment, victim.number, finished, newest_step(self._folder), ended.statuses, noticed)
        )
        return True

    def _note_resumed(self, start: Start) -> None:
        """What became of the kill before, seen in the start after it."""
        first = next((moment for moment in start.ranks[0].moments if moment.what == "data"), None)
        if self.chain.kills and first is not None:
            self.chain.kills[-1].resumed = first.step - 1
            self.chain.kills[-1].restart_seconds = first.at - start.began


def kills(setting: Setting) -> Outcome:
    """SIGKILL of a random rank of two, over ZeRO 1, 2 and 3."""
    chains, hits = [], Counter[str]()
    for i, stage in enumerate(STAGES):
        count = setting.trials * (i + 1) // len(STAGES) - setting.trials * i // len(STAGES)
        steps = (count + 1) * STEPS_A_KILL
        folder = setting.folder / f"zero-{stage}"
        whole = uninterrupted(folder / "whole", write_config(folder / "whole", setting.shards, stage, steps))
        setting.say(f"ZeRO {stage}: {steps} steps uninterrupted; {count} kills follow")
        config = write_config(folder / "run", setting.shards, stage, steps)
        share = setting.share_of_time(len(STAGES) - i)
        chain = Killer(folder / "run", config, stage, whole, hits, setting.seed + stage).run(count, share)
        chains.append(chain)
        setting.say(
            f"ZeRO {stage}: {len(chain.kills)} kills, {sum(kill.lost for kill in chain.kills)} lost, {len(chain.problems)} problems"
        )
    return _outcome(chains)


def _outcome(chains: list[Chain]) -> Outcome:
    every = [kill for chain in chains for kill in chain.kills]
    problems = [f"kill {i}, {kill.moment}: {problem}" for i, kill in enumerate(every) if (problem := kill.problem())]
    figures = {
        "notice_seconds": spread([kill.notice_seconds for kill in every]),
        "restart_seconds": spread([kill.restart_seconds for kill in every if kill.restart_seconds is not None]),
        "redone_steps": sum(kill.redone for kill in every),
        "lost": sum(kill.lost for kill in every),
        "chains_bit_identical": sum(not chain.problems for chain in chains),
        "kills": [{**asdict(kill), "redone": kill.redone} for kill in every],
    }
    problems += [problem for chain in chains for problem in chain.problems]
    kept = sum(kill.problem() is None for chain in chains if not chain.problems for kill in chain.kills)
    return Outcome("SIGKILL of a random rank", len(every), kept, problems, figures)
