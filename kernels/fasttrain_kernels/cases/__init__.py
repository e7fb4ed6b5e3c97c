"""One entry per operation: its reference, its public function, and random inputs for it. Tests and benchmarks share this table."""

from fasttrain_kernels.cases.case import Case, Inputs, Shape
from fasttrain_kernels.cases.elementwise import ELEMENTWISE_CASES
from fasttrain_kernels.cases.noise import NOISE_CASES
from fasttrain_kernels.cases.norms import NORM_CASES
from fasttrain_kernels.cases.optimizer import OPTIMIZER_CASES

CASES: dict[str, Case] = {**NOISE_CASES, **NORM_CASES, **ELEMENTWISE_CASES, **OPTIMIZER_CASES}

__all__ = ["CASES", "Case", "Inputs", "Shape"]
