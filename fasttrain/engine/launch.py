"""Who started this process as one of many, and as which: each launcher says it in variables of its own.

RANK, WORLD_SIZE and LOCAL_RANK (torchrun, DeepSpeed's launcher, Kubernetes operators) win over the others, which may be there as well: a
torchrun on each node is itself started by srun. Slurm's variables count only inside a step of several tasks: a batch script and an
interactive shell have them too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fasttrain.errors import UserError

_INTERACTIVE_STEPS = 2**32 - 16  # Slurm numbers its batch, extern, interactive and pending steps from the end of 32 bits


@dataclass(frozen=True)
class Place:
    """This process among all of a run.

    Attributes:
        local_rank: among those of its host.
        address, port: where rank 0 listens; None for a process alone that was given none.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str | None = None
    port: int | None = None

    def variables(self) -> dict[str, str]:
        """As torch and DeepSpeed read it, whoever started the process."""
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": self.local_rank}
        meeting = {"MASTER_ADDR": self.address, "MASTER_PORT": self.port} if self.address else {}
        return {name: str(value) for name, value in {**numbers, **meeting}.items()}


@dataclass(frozen=True)
class Dialect:
    """The variables by which a launcher numbers its processes, and how a user of it gives the address of rank 0."""

    name: str
    rank: str
    world_size: str
    local_ranks: tuple[str, ...]
    remedy: str


TORCH = Dialect(
    "torchrun or DeepSpeed",
    "RANK",
    "WORLD_SIZE",
    ("LOCAL_RANK",),
    "start with torchrun or deepspeed, which set it, or export MASTER_ADDR=<host of rank 0> MASTER_PORT=29500",
)
SLURM = Dialect(
    "srun",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    ("SLURM_LOCALID",),
    'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500 before srun',
)
OPEN_MPI = Dialect(
    "mpirun",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    "give mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500",
)
PMI = Dialect(
    "mpiexec",
    "PMI_RANK",
    "PMI_SIZE",
    ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
    "give mpiexec -genv MASTER_ADDR <host of rank 0> -genv MASTER_PORT 29500",
)


def place(environment: Mapping[str, str]) -> Place:
    """Where the launcher has put this process; alone where there is no launcher.

    Raises:
        UserError: variables are missing or make no sense; the message names them and the remedy.
    """
    dialect = _dialect(environment)
    if dialect is None:
        return Place(rank=0, world_size=1, local_rank=0)
    local = next((name for name in dialect.local_ranks if name in environment), None)
    if local is None:
        raise UserError(
            f"{dialect.rank} and {dialect.world_size} are set, {dialect.local_ranks[0]} is not: export it too "
            "(the number of this process on its host; under srun: LOCAL_RANK=$SLURM_LOCALID)"
        )
    rank, world_size, local_rank = (_number(environment, name) for name in (dialect.rank, dialect.world_size, local))
    if rank >= world_size:
        raise UserError(
            f"{dialect.rank}={rank} is not below {dialect.world_size}={world_size}: ranks count from 0; mend the launch command"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing and (world_size > 1 or len(missing) == 1):
        raise UserError(f"{' and '.join(missing)} not set among {world_size} processes of {dialect.name}: {dialect.remedy}")
    if missing:
        return Place(rank, world_size, local_rank)
    return Place(rank, world_size, local_rank, environment["MASTER_ADDR"], _number(environment, "MASTER_PORT"))


def rank(environment: Mapping[str, str]) -> int:
    """This process's rank, 0 where nothing legible says it: for messages from before the ranks have met."""
    dialect = _dialect(environment)
    given = environment.get(dialect.rank, "") if dialect else ""
    return int(given) if given.isdecimal() else 0


def _dialect(environment: Mapping[str, str]) -> Dialect | None:
    for dialect in (TORCH, OPEN_MPI, PMI):
        if dialect.rank in environment and dialect.world_size in environment:
            return dialect
    return SLURM if _in_step(environment) else None


def _in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks."""
    step, tasks = environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_NTASKS", "1")
    return "SLURM_PROCID" in environment and step.isdecimal() and int(step) < _INTERACTIVE_STEPS and tasks != "1"


def _number(environment: Mapping[str, str], name: str) -> int:
    given = environment[name]
    if not given.isdecimal() or len(given) > 9:
        raise UserError(f"{name}={given[:40]!r} is not a number: mend the launch command or the exported variable")
    return int(given)
