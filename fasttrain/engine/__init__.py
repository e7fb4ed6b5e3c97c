"""DeepSpeed, processes and the optimizer: the only importer of deepspeed and torch.distributed."""
