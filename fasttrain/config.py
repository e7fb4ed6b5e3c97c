"""A run as data: the components' configs composed, read from YAML and overrides, every mistake reported at once with its path."""

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from fasttrain_kernels.dispatch import Kernels
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fasttrain.choices import DEFAULT, KernelChoice
from fasttrain.data.config import DataConfig
from fasttrain.data.remote.addresses import scheme_of
from fasttrain.diffusion.prediction import PREDICTIONS, X0, Prediction
from fasttrain.diffusion.schedule import SCHEDULES, Cosine, DiscreteSchedule, Schedule
from fasttrain.diffusion.timesteps import TIMESTEPS, OfPlaces, Stratified, Timesteps
from fasttrain.diffusion.weighting import WEIGHTINGS, MinSnr, Weighting
from fasttrain.engine.deepspeed import read_settings, zero_stage
from fasttrain.engine.optimizer import OptimizerConfig
from fasttrain.errors import UserError
from fasttrain.init_from import InitFrom
from fasttrain.models import MODELS, Transformer
from fasttrain.models.modulated import Modulated
from fasttrain.models.vit import ViT
from fasttrain.plain_yaml import read_yaml
from fasttrain.registry import printable, shown
from fasttrain.sampling import SAMPLERS, Sampler
from fasttrain.sampling.guidance import Guidance, GuidanceChoice
from fasttrain.sampling.heun import Heun

MOST_MISTAKES = 20  # that are told at once
VERDICT_SECONDS = 30.0  # for the verdict on a rank, the stacks, and what a rank does before it ends
LONGEST_WAIT = 1e7  # seconds, four months: what the libraries beneath can hold
SHORT_FORMS = {"kernels": DEFAULT, "init_from": "source"}  # sections given as a text: the key that it stands for; elsewhere `name`


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class DiffusionConfig(Section):
    """What is learned: noise schedule, prediction target, weighting on the x0 error, timesteps.

    `label_drop` is the share of samples without class and text, `control_drop` independently that without controls; each counts only
    for a model that has them. `uncertainty` trains a small function of the noise level beside the network, by whose exponential the loss
    is divided (EDM2's): see diffusion/uncertainty.py.
    """

    schedule: Annotated[Schedule, *SCHEDULES.field()] = Cosine()
    prediction: Annotated[Prediction, *PREDICTIONS.field()] = X0()
    weighting: Annotated[Weighting, *WEIGHTINGS.field()] = MinSnr()
    timesteps: Annotated[Timesteps | OfPlaces, *TIMESTEPS.field()] = Stratified()
    label_drop: float = Field(default=0.15, ge=0, lt=1)
    control_drop: float = Field(default=0.1, ge=0, lt=1)
    uncertainty: bool = False


class TrainingConfig(Section):
    """How long, in which batches, in which precision, and how exactly the same each time.

    `global_batch` images make an optimizer step whatever the number of processes; each takes `micro_batch` of them per forward pass
    (default: its whole share), and accumulates over as many as that needs. `compile` compiles each of the model's blocks; `deterministic`
    gives the same bits each time on the same GPU, and chooses nothing by time.

    A rank that is silent, or in one thing (a batch's data, forward, backward, update, a save, a batch of a look at samples), for longer
    than `timeout_seconds` ends the run on all ranks, with a status on which it is started again; the first step compiles within it, and
    `data.retry_seconds` of remote shards and `checkpoint.retry_seconds` at the end come on top. `max_skipped`
    non-finite steps in a row end it with a report; `checksum_every` steps the replicated weights are compared across ranks (null: never).
    """

    steps: int = Field(gt=0, le=10**12)
    global_batch: int = Field(gt=0, le=2**20)  # so that positions stay below 2^63
    micro_batch: int | None = Field(default=None, gt=0, le=2**20)
    precision: Literal["bf16", "fp32"] = "bf16"
    clip: float | None = Field(default=None, gt=0)
    compile: bool = False
    deterministic: bool = False
    timeout_seconds: float = Field(default=600, gt=0, le=LONGEST_WAIT)
    max_skipped: int = Field(default=20, gt=0)
    checksum_every: int | None = Field(default=None, gt=0)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per optimizer step on each process."""
        micro_batch = self.micro_batch_of(world_size)
        if self.global_batch % (micro_batch * world_size):
            raise UserError(
                f"training.global_batch {self.global_batch} is not divisible by training.micro_batch {micro_batch} "
                f"x {world_size} processes; choose a global_batch that is, or another micro_batch"
            )
        return self.global_batch // (micro_batch * world_size)

    def micro_batch_of(self, world_size: int) -> int:
        """Images per process and forward pass."""
        if self.global_batch % world_size:
            raise UserError(
                f"training.global_batch {self.global_batch} is not divisible by {world_size} processes; choose a multiple of {world_size}"
            )
        return self.micro_batch or self.global_batch // world_size


class CheckpointConfig(Section):
    """When the training state is saved; it is also saved at the end and on Ctrl-C or SIGTERM.

    Saving goes on beside training. The newest `keep_last` stay, and those of every `keep_every` steps for good (null: none). A save that
    fails, on a full disk for one, is tried again for `retry_seconds` while training goes on; then the run ends.
    """

    every: int = Field(default=5000, gt=0)
    keep_last: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, gt=0)
    retry_seconds: float = Field(default=600, ge=0, le=LONGEST_WAIT)


class SamplingConfig(Section):
    """Sample grids during training: `every` steps (null: none), with the first average's weights."""

    every: int | None = Field(default=None, gt=0)
    count: int = Field(default=64, gt=0, le=10_000)
    sampler: Annotated[Sampler, *SAMPLERS.field()] = Heun(steps=18)
    guidance: GuidanceChoice = Guidance()


class LogConfig(Section):
    """Progress, JSONL and TensorBoard every `every` steps; the held-out loss every `held_out_every` (null: never).

    A step whose loss lies `spike` robust standard deviations above the recent ones is flagged (null: none is).
    """

    every: int = Field(default=50, gt=0)
    held_out_every: int | None = Field(default=None, gt=0)
    timestep_ranges: int = Field(default=10, ge=1, le=1000)
    spike: float | None = Field(default=8.0, gt=0)
    tensorboard: bool = True


class RunConfig(Section):
    """A whole run."""

    run_dir: Path
    seed: int = Field(default=0, ge=0, lt=2**63)
    kernels: KernelChoice = Kernels()
    attention: Literal["auto", "flash", "cudnn", "efficient", "math", "flash_attn_2", "flash_attn_3", "flash_attn_4"] = "auto"
    data: DataConfig
    model: Annotated[Transformer, *MODELS.field()]
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    log: LogConfig = LogConfig()
    init_from: InitFrom | None = None
    deepspeed: str | dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 1}})

    @field_validator("run_dir", mode="before")
    @classmethod
    def _is_a_path(cls, given: Any) -> Any:
        """An empty name would mean the folder one stands in; and no file system takes a NUL."""
        if isinstance(given, str) and not (given.strip() and given.isprintable()):
            raise ValueError(f"give a folder's name in printable characters, not {shown(given)}")
        return given

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.log.held_out_every and not self.data.held_out:
            raise ValueError("log.held_out_every needs data.held_out: the number of images kept out of training")
        if not self.optimizer.ema and (self.log.held_out_every or self.sampling.every):
            raise ValueError("log.held_out_every and sampling.every look at the averaged weights: give optimizer.ema an average")
        if self.sampling.every:
            self._check_guidance()
        if isinstance(self.model, ViT) and not isinstance(self.diffusion.schedule, DiscreteSchedule):
            name = SCHEDULES.spec(self.diffusion.schedule)["name"]
            raise ValueError(
                f"model: a ViT looks timesteps up in a table, and diffusion.schedule {name} has real ones: take a dit or an mmdit, "
                "or a discrete schedule"
            )
        if self.init_from is not None and os.path.realpath(self.init_from.source) == os.path.realpath(self.run_dir):
            raise ValueError(f"init_from names this run's own run_dir, {self.run_dir}: name another run, or leave it out")
        # Models without a table of timesteps take any.
        rows, timesteps = getattr(self.model, "num_timesteps", None), self.diffusion.schedule.num_timesteps
        if rows is not None and rows < timesteps:
            raise ValueError(
                f"model.num_timesteps {rows} is less than the {timesteps} of diffusion.schedule.num_timesteps: raise it, or leave it out"
            )
        return self

    def _check_guidance(self) -> None:
        guidance = self.sampling.guidance
        if guidance.scale != 1 and not self.diffusion.label_drop:
            raise ValueError(
                f"sampling.guidance {guidance.scale:g} needs diffusion.label_drop > 0, which trains the null label; or set it to 1"
            )
        if guidance.controls != 1 and not (self.diffusion.control_drop and self.controls):
            raise ValueError(
                f"sampling.guidance.controls {guidance.controls:g} needs model.controls and diffusion.control_drop > 0, which trains "
                "the model without them; or set it to 1"
            )

    def deepspeed_settings(self) -> dict[str, Any]:
        """DeepSpeed's own settings, read and checked."""
        return read_settings(self.deepspeed)

    @property
    def patience(self) -> dict[str, float]:
        """How many seconds longer than `training.timeout_seconds` a thing may last that is tried again meanwhile."""
        remote = any(place and scheme_of(place) for place in (self.data.train, self.data.text))
        return {"data": self.data.retry_seconds if remote else 0.0, "finishing": self.checkpoint.retry_seconds}

    @property
    def controls(self) -> tuple[str, ...]:
        """The controls that the model is told, in the order of their columns."""
        return tuple(self.model.controls) if isinstance(self.model, Modulated) else ()

    @property
    def collective_seconds(self) -> float:
        """How long a collective may wait: beyond what the watchdog allows, so that its verdict comes first and names a rank."""
        return self.training.timeout_seconds + self.patience["data"] + VERDICT_SECONDS

    @property
    def zero_stage(self) -> int:
        return zero_stage(self.deepspeed_settings())

    def plain(self) -> dict[str, Any]:
        """The config as plain data, from which it can be read again."""
        return json.loads(self.model_dump_json())


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run's config from a YAML file, with `section.key=value` overrides (values are YAML too).

    Raises:
        UserError: no file, not YAML, or wrong contents: all mistakes in one message, each with its path and the nearest known key.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the config {path} is not text in UTF-8: byte {error.start} cannot be read") from None
    try:
        raw = read_yaml(text)
    except ValueError as error:
        raise UserError(f"{path} is not plain YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of sections (data, model, training ...), not {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, Any], source: str) -> RunConfig:
    """A run's config from plain data; `source` names it in messages."""
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}:\n" + "\n".join(f"  {line}" for line in _mistakes(error))) from None
    if zero_stage(config.deepspeed_settings()) == 3 and config.training.checksum_every:
        raise UserError(
            f"{source}: training.checksum_every compares weights that every rank holds, and ZeRO 3 holds each only once: "
            "leave it out, or set zero_optimization.stage to 2"
        )
    return config


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets `a.b=value`; a component given by its name alone becomes a mapping when a parameter of it is set."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise UserError(f"override {shown(override)} must read key=value or section.key=value")
    *parents, key = path.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if child is None or isinstance(child, str):
            short = SHORT_FORMS.get(parent, "name")
            child = {short: child} if child else {}
        if not isinstance(child, dict):
            raise UserError(f"override {shown(override)}: {printable(parent)} is not a section")
        node[parent] = dict(child)
        node = node[parent]
    try:
        node[key] = read_yaml(text)
    except ValueError as error:
        raise UserError(f"override {shown(override)}: the value is not YAML: {error}") from None


def _mistakes(error: ValidationError) -> Iterator[str]:
    for mistake in error.errors()[:MOST_MISTAKES]:
        path = ".".join(printable(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            yield f"{path}: unknown key{_hint(mistake['loc'])}"
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            given = "" if mistake["type"] in ("missing", "value_error") else f" (got {shown(mistake['input'])})"
            yield f"{path}: {message}{given}" if path else f"{message}{given}"
    if error.error_count() > MOST_MISTAKES:
        yield f"and {error.error_count() - MOST_MISTAKES} more mistakes"


def _hint(location: tuple[int | str, ...]) -> str:
    """The known key nearest to the last part of a location."""
    section: Any = RunConfig
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation if part in getattr(section, "model_fields", {}) else None
        section = next((kind for kind in get_args(section) if hasattr(kind, "model_fields")), section)  # X of `X | None`
    known = list(getattr(section, "model_fields", {}))
    close = difflib.get_close_matches(printable(location[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}" if known else ""
