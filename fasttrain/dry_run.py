"""`fasttrain train --dry-run`: what a run would be, without allocating its model."""

import os

import torch
from rich.console import Console
from rich.table import Table

from fasttrain.building import build_objective
from fasttrain.choices import check_kernels
from fasttrain.cond import control_columns
from fasttrain.config import RunConfig
from fasttrain.data.loader import Batch
from fasttrain.dataset import RunData, open_data
from fasttrain.engine.deepspeed import offloads
from fasttrain.models.flops import TRAINING
from fasttrain.models.memory import count_parameters, memory_per_rank
from fasttrain.run import resolve
from fasttrain.transfer import Transfer, has_begun, trained_shapes

GIB = 2**30
MOST_READ = 256  # images of the one batch: enough to see that they can be read and what they are like


def dry_run(config: RunConfig) -> None:
    """Prints parameters, FLOPs and memory per ZeRO stage and rank, reads one batch, and checks everything a start would check."""
    console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    data = open_data(config)
    config = resolve(config, data.index)
    seed = torch.tensor(config.seed)
    check_kernels(config.kernels, seed)
    build_objective(config, seed, data.empty)
    if config.sampling.every:
        config.sampling.sampler.require()
    if config.log.held_out_every:
        data.held_out_loader(config, seed).close()
    accumulation_steps, micro_batch = config.training.accumulation_steps(world_size), config.training.micro_batch_of(world_size)
    parameters = count_parameters(config.model)
    forward = config.model.flops_per_image()
    _print_data(console, config, data)
    console.print(f"model      {parameters.trained:,} trained parameters ({parameters.total:,} in all)")
    console.print(f"FLOPs      {forward / 1e9:.3g} G forward, {TRAINING * forward / 1e9:.3g} G training per image")
    console.print(
        f"batch      {config.training.global_batch} = {micro_batch} x {accumulation_steps} accumulated x {world_size} processes; "
        f"{config.training.steps * config.training.global_batch:,} images in {config.training.steps:,} steps"
    )
    if config.init_from is not None and not has_begun(config.run_dir):
        with torch.device("meta"):
            shapes = trained_shapes(config.model.build())
        console.print(Transfer.open(config, data.index, shapes).table(), markup=False)
    console.print(_memory_table(config, parameters.trained, world_size))
    alone = config.model_copy(update={"data": config.data.model_copy(update={"threads": 0})})  # threads would read more than the one
    with data.training_loader(alone, seed) as loader:
        _print_batch(console, config, seed, next(loader.batches(0, min(micro_batch, MOST_READ), 0, world_size)))
    console.print("dry run done: nothing was written")


def _print_data(console: Console, config: RunConfig, data: RunData) -> None:
    index = data.index
    console.print(
        f"data       {index.samples:,} samples of {' x '.join(map(str, index.x0_shape))} "
        f"in {len(index.shards)} shards, {index.num_classes} classes"
    )
    if text := data.describe_text():
        console.print(f"text       {text}")
    if config.controls:
        console.print(f"controls   {', '.join(config.controls)}: {', '.join(control_columns(config.controls))}")


def _print_batch(console: Console, config: RunConfig, seed: torch.Tensor, batch: Batch) -> None:
    x0, cond = batch.x0(seed), batch.cond
    told = [f"one batch  x0 {list(x0.shape)}, mean {x0.mean():.3f}, standard deviation {x0.std():.3f}"]
    if cond.labels is not None:
        told.append(f"labels {cond.labels.min()} to {cond.labels.max()}")
    if cond.text is not None:
        told.append(f"text {list(cond.text.tokens.shape)} of standard deviation {cond.text.tokens.std():.3f}")
    if cond.controls is not None:
        columns = zip(control_columns(config.controls), cond.controls.unbind(1), strict=True)
        told += [f"{name} {values.min():g} to {values.max():g}" for name, values in columns]
    console.print(", ".join(told))


def _memory_table(config: RunConfig, parameters: int, world_size: int) -> Table:
    weights_bytes = 2 if config.training.precision == "bf16" else 4
    worlds = sorted({world_size, 8, 64})
    offloaded = offloads(config.deepspeed_settings())
    title = "GiB per rank between steps, activations not counted"
    ranks = (f"{n} ranks" if n > 1 else "1 rank" for n in worlds)
    table = Table("ZeRO stage", *ranks, title=f"{title}; + on the host" if offloaded else title)
    for stage in range(1 if offloaded else 0, 4):
        held = [memory_per_rank(parameters, stage, n, weights_bytes, len(config.optimizer.ema), offloaded) for n in worlds]
        chosen = " (chosen)" if stage == config.zero_stage else ""
        host = [f" + {each['host'] / GIB:.3g}" if offloaded else "" for each in held]
        table.add_row(f"{stage}{chosen}", *(f"{each['total'] / GIB:.3g}{beside}" for each, beside in zip(held, host, strict=True)))
    return table
