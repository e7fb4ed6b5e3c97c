"""Each launcher's variables give the same place; what is missing or makes no sense is named with its remedy."""

import pytest

from fasttrain.engine.launch import Place, place, rank
from fasttrain.errors import UserError

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SECOND_OF_FOUR = Place(rank=1, world_size=4, local_rank=0, address="10.0.0.1", port=29500)
TORCH = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}


@pytest.mark.parametrize("variables", [TORCH, SLURM, OPEN_MPI, HYDRA])
def test_every_launcher_says_the_same(variables: dict[str, str]):
    assert place({**variables, **MEETING}) == SECOND_OF_FOUR
    assert rank(variables) == 1


def test_a_torchrun_that_srun_started_on_each_node():
    on_node = {**SLURM, "SLURM_PROCID": "3", "SLURM_NTASKS": "16"}
    assert place({**on_node, **TORCH, **MEETING}) == SECOND_OF_FOUR


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},  # a batch script: no step
        {**SLURM, "SLURM_STEP_ID": str(2**32 - 6)},  # an interactive shell's step
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_alone(variables: dict[str, str]):
    assert place(variables) == Place(rank=0, world_size=1, local_rank=0)
    assert place(variables).variables() == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def test_torch_and_deepspeed_read_the_same_whoever_started_the_process():
    assert place({**SLURM, **MEETING}).variables() == {**TORCH, **MEETING}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (SLURM, r"MASTER_ADDR and MASTER_PORT not set among 4 processes of srun: export MASTER_ADDR=\$\(scontrol show hostnames"),
        (OPEN_MPI, "MASTER_ADDR and MASTER_PORT not set among 4 processes of mpirun: give mpirun -x MASTER_ADDR="),
        ({**TORCH, "MASTER_ADDR": "a"}, "MASTER_PORT not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING}, "LOCAL_RANK is not: export it too"),
        ({**HYDRA, **MEETING, "MPI_LOCALRANKID": "first"}, "MPI_LOCALRANKID='first' is not a number"),
        ({**TORCH, **MEETING, "RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({**TORCH, **MEETING, "RANK": "-1"}, "RANK='-1' is not a number"),
        ({**TORCH, **MEETING, "MASTER_PORT": "9" * 400}, "MASTER_PORT='9999"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(variables: dict[str, str], told: str):
    with pytest.raises(UserError, match=told):
        place(variables)


def test_a_rank_for_messages_is_never_refused():
    assert rank({"RANK": "one", "WORLD_SIZE": "2"}) == 0
    assert rank({}) == 0
