"""Cases of the operations within attention and the MLP: QK norm, bias and GELU."""

from fasttrain_kernels.cases.case import Case

ELEMENTWISE_CASES: dict[str, Case] = {}
