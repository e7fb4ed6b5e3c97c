"""What a run tells of its damaged data: lines at its reports, a count of replaced samples, and RUN/damaged.jsonl."""

from collections.abc import Callable
from pathlib import Path

from fasttrain.data.damage import Damage, Damaged
from fasttrain.engine.distributed import Processes
from fasttrain.lines import Lines, records

FILE = "damaged.jsonl"


class DamageReport:
    """Gathers what each rank has found unreadable, and tells each thing once.

    Args:
        run_dir: of the run; `damaged.jsonl` in it has one record a shard, and another when more of it turns out to be unreadable.
        processes: all ranks of the run.
        damage: what this rank finds.
    """

    def __init__(self, run_dir: Path, processes: Processes, damage: Damage):
        self._processes, self._damage = processes, damage
        self._file = Lines(run_dir / FILE) if processes.is_main else None
        self._written = {(each["shard"], each["unreadable"]) for each in records(run_dir / FILE)} if processes.is_main else set()
        self._told: dict[str, int] = {}

    def tell(self, say: Callable[[str], None], step: int, replaced: int) -> int:
        """Says and writes what is new on any rank; returns the positions replaced by all since this start. A collective.

        Args:
            say: takes a line for people.
            step: the run's.
            replaced: positions that this rank has replaced since this start.
        """
        shares = self._processes.gather((self._damage.news(), replaced))
        for damaged in (each for news, _ in shares for each in news):
            if self._told.get(damaged.shard, -1) < damaged.unreadable:
                self._told[damaged.shard] = damaged.unreadable
                say(f"damaged data: {damaged.told()}")
                self._write(step, damaged)
        return sum(count for _, count in shares)

    def _write(self, step: int, damaged: Damaged) -> None:
        if self._file is not None and (damaged.shard, damaged.unreadable) not in self._written:
            self._written.add((damaged.shard, damaged.unreadable))
            self._file.write({"step": step, **damaged.record()})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
