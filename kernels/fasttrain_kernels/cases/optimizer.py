"""The case of the optimizer's update."""

from fasttrain_kernels.cases.case import Case

OPTIMIZER_CASES: dict[str, Case] = {}
