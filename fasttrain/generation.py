"""What makes samples from a network of this config, and what each of them is asked to show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fasttrain.building import nothing
from fasttrain.cond import CONTROLS, Cond, Nothing, Text, concatenated
from fasttrain.config import RunConfig
from fasttrain.data.facts import defaults
from fasttrain.data.index import Index
from fasttrain.data.text.captions import clean
from fasttrain.data.text.padding import padded
from fasttrain.errors import UserError
from fasttrain.prompts import Prompts, encoded, read_prompts
from fasttrain.registry import nearest, shown
from fasttrain.sampling import Sampler
from fasttrain.sampling.asked import Asked, check_labels
from fasttrain.sampling.generate import Generator
from fasttrain.sampling.guidance import Guidance


@dataclass(frozen=True, eq=False)
class Wishes:
    """What is asked of samples; what is left out is by default.

    Attributes:
        labels: classes, taken in turn; by default all of them.
        prompts: captions, taken in turn; by default those that the run keeps.
        encoder, revision: the text encoder of other captions than those: folder, or hub id with its commit.
        controls: numbers of the model's controls; by default those of an original of the training size, not cropped, not mirrored.
    """

    labels: Sequence[int] | None = None
    prompts: Sequence[str] | None = None
    encoder: str | None = None
    revision: str | None = None
    controls: Mapping[str, Sequence[float]] | None = None


def build_generator(
    config: RunConfig,
    index: Index,
    network: nn.Module,
    sampler: Sampler,
    guidance: Guidance,
    seed: Tensor,
    wishes: Wishes,
    dtype: torch.dtype = torch.float32,
) -> Generator:
    """A generator with the run's schedule and target; `seed` [] int64 lies where the network does, whose input is of `dtype`.

    Raises:
        UserError: wishes that the run's model cannot follow, or prompts that cannot be encoded.
    """
    channels, size, _ = config.model.geometry()
    stored = read_prompts(config.run_dir) if index.text is not None else None
    return Generator(
        model=network,
        schedule=config.diffusion.schedule,
        prediction=config.diffusion.prediction,
        sampler=sampler,
        shape=(channels, size, size),
        conditions=_asked(config, index, wishes, stored, seed),
        nothing=_without(config, stored, seed.device),
        guidance=guidance,
        seed=seed,
        dtype=dtype,
    )


def _asked(config: RunConfig, index: Index, wishes: Wishes, stored: Prompts | None, seed: Tensor) -> Asked:
    captions, text = _prompts(wishes, stored)
    return Asked(
        labels=_labels(config, wishes, stored).to(seed.device),
        prompts=None if text is None else text.map(lambda part: part.to(seed.device)),
        captions=captions,
        pad=lambda own, numbers: padded(own, seed, numbers, config.data.text_padding, config.kernels.of("text_padding")),
        controls=_controls(config, index, wishes.controls or {}, seed.device),
    )


def _without(config: RunConfig, stored: Prompts | None, device: torch.device) -> Nothing:
    """What the model is told instead of conditions; never "no controls" where it was not trained without them."""
    base = nothing(config, None if stored is None else stored.empty.map(lambda part: part.to(device)))
    return replace(base, controls=base.controls and config.diffusion.control_drop > 0)


def _labels(config: RunConfig, wishes: Wishes, stored: Prompts | None) -> Tensor:
    _, _, num_classes = config.model.geometry()
    if wishes.labels is None:
        return torch.arange(max(num_classes, 1))
    if stored is not None:
        raise UserError("--labels: this run's model is told captions, not classes: give --prompt")
    check_labels(list(wishes.labels), num_classes)
    return torch.tensor(wishes.labels)


def _prompts(wishes: Wishes, stored: Prompts | None) -> tuple[tuple[str, ...], Text | None]:
    """The captions in words and as text: the run's own without an encoder."""
    if stored is None:
        if wishes.prompts is not None or wishes.encoder is not None or wishes.revision is not None:
            raise UserError("--prompt, --prompts, --text-encoder, --text-encoder-revision: this run's model takes no text")
        return (), None
    if wishes.encoder is None and wishes.revision is not None:
        raise UserError("--text-encoder-revision: give --text-encoder too, the hub id that it is a commit of")
    if wishes.prompts is None and wishes.encoder is not None:
        raise UserError("--text-encoder: give --prompt or --prompts for it to encode, or leave it out for the run's own captions")
    if wishes.prompts is None:
        return (stored.captions, stored.text) if stored.captions else (("",), stored.empty)
    prompts = tuple(clean(prompt) for prompt in wishes.prompts)
    if wishes.encoder is not None:
        return prompts, encoded(prompts, wishes.encoder, wishes.revision, stored.record)
    kept = ("", *stored.captions)
    if strangers := [prompt for prompt in prompts if prompt not in kept]:
        raise UserError(
            f"--prompt {shown(strangers[0])}: the run keeps only {len(stored.captions)} captions of its training set as text, and not "
            f"this one: give --text-encoder, the folder or hub id of {stored.record.id}"
        )
    rows = torch.tensor([kept.index(prompt) for prompt in prompts])
    every = concatenated([Cond(text=stored.empty), Cond(text=stored.text)]).text
    assert every is not None
    return prompts, every.map(lambda part: part[rows])


def _controls(config: RunConfig, index: Index, given: Mapping[str, Sequence[float]], device: torch.device) -> Tensor | None:
    for name, numbers in given.items():
        if name not in config.controls:
            known = nearest(name, config.controls) if config.controls else "it has none"
            raise UserError(f"--control {shown(name)}: the run's model is not told that; {known}")
        if len(numbers) != len(CONTROLS[name]):
            raise UserError(f"--control {name}: give {len(CONTROLS[name])} numbers ({', '.join(CONTROLS[name])}), not {len(numbers)}")
    if not config.controls:
        return None
    told = {**defaults(index), **given}
    # In the order of CONTROLS, as in training.
    return torch.tensor(
        [number for name in CONTROLS if name in config.controls for number in told[name]], dtype=torch.float32, device=device
    )
