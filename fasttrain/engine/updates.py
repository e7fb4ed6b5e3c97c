"""Which way an update is done: what `optimizer.implementation` names, refused at the start where it cannot run."""

import torch

from fasttrain.engine.apex import apex_adam
from fasttrain.engine.deepspeed import deepspeed_adam
from fasttrain.engine.optimizer import Implementation
from fasttrain.engine.update import OnePass, TorchFused, Update


def choose_update(implementation: Implementation, impl: str, device: torch.device, offloaded: bool) -> Update:
    """The update of a run.

    Args:
        implementation: as the config names it. Ours is a GPU's kernel: offloaded, it means DeepSpeed's CPU Adam.
        impl: of our kernel, "auto", "triton" or "reference".
        device: of this process; `offloaded` state lies on the CPU.

    Raises:
        UserError: it is not installed or cannot run here.
    """
    place = torch.device("cpu") if offloaded else device
    choices = {
        "fasttrain": lambda: deepspeed_adam(place, offloaded) if offloaded else OnePass(impl),
        "torch": lambda: TorchFused(offloaded),
        "apex": lambda: apex_adam(place),
        "deepspeed": lambda: deepspeed_adam(place, offloaded),
    }
    return choices[implementation]()
