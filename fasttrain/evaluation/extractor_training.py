"""The training of an extractor: a classifier of a set's images, its accuracy measured on images that it never saw."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.data.index import Index
from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError
from fasttrain.evaluation.classifier import SMALLEST, Classifier, to_input
from fasttrain.evaluation.extractor import BATCH, Extractor, Record
from fasttrain.evaluation.protocol import versions

TRAINING_BATCH = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1  # of the labels
HELD_OUT = 0.2  # of the set, at most MOST_HELD_OUT images
MOST_HELD_OUT = 10_000


def train_extractor(
    shards: ShardSet,
    name: str,
    *,
    steps: int = 600,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda step: None,
) -> Extractor:
    """A classifier of a set's images, trained on four fifths of them and measured on the last fifth of a random order.

    AdamW with a one-cycle learning rate, smoothed labels, and images moved by up to an eighth of their side: mirrored digits or letters
    would be others.

    Args:
        shards: images with at least two classes.
        name: of the set, for the record.
        steps: of 128 images.
        seed: of the order, the moves and the first weights.
        progress: called after each step.

    Raises:
        UserError: a set that has no classes to tell apart, too few images, or no image.
    """
    index = _fit_to_train_on(shards.index, name)
    random = np.random.default_rng(seed)
    order = random.permutation(len(shards))
    held_out = min(max(1, int(len(order) * HELD_OUT)), MOST_HELD_OUT)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Classifier(index.shape[0], index.shape[1], index.num_classes).to(device)
    _fit(network, shards, order[held_out:], steps, random, progress)
    record = Record(
        channels=index.shape[0],
        size=index.shape[1],
        classes=index.classes,
        accuracy=_accuracy(network, shards, order[:held_out]),
        held_out=held_out,
        trained=len(order) - held_out,
        steps=steps,
        seed=seed,
        set=name,
        set_xxh3=index.xxh3,
        versions=versions(),
    )
    return Extractor(network, record)


def _fit_to_train_on(index: Index, name: str) -> Index:
    if index.kind != "image":
        raise UserError(f"{name} holds latents: train an extractor on a set of images, made by `fasttrain prepare digits|images`")
    if index.num_classes < 2 or index.samples < 10:
        raise UserError(f"{name} has {index.num_classes} classes and {index.samples} images: an extractor needs two classes and ten images")
    if index.shape[1] != index.shape[2] or index.shape[1] < SMALLEST:
        raise UserError(
            f"{name} holds images of {index.shape[1]} x {index.shape[2]}: an extractor takes square ones of at least {SMALLEST}"
        )
    return index


def _fit(
    network: Classifier, shards: ShardSet, ids: np.ndarray, steps: int, random: np.random.Generator, progress: Callable[[int], None]
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    network.train()
    for step in range(steps):
        images, labels = _batch(network, shards, random.choice(ids, min(TRAINING_BATCH, len(ids)), replace=False))
        loss = F.cross_entropy(network(_moved(images, random)), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)
    network.eval()


def _moved(images: Tensor, random: np.random.Generator) -> Tensor:
    """All images of a batch moved by the same few pixels; what comes in at the edges repeats the edge."""
    most = max(1, images.shape[-1] // 8)
    down, across = (int(n) for n in random.integers(0, 2 * most + 1, 2))
    padded = F.pad(images, (most,) * 4, mode="replicate")
    return padded[..., down : down + images.shape[-2], across : across + images.shape[-1]]


@torch.no_grad()
def _accuracy(network: Classifier, shards: ShardSet, ids: np.ndarray) -> float:
    right = seen = 0
    for start in range(0, len(ids), BATCH):
        images, labels = _batch(network, shards, ids[start : start + BATCH])
        right += int((network(images).argmax(dim=1) == labels).sum())
        seen += len(labels)
    return right / seen


def _batch(network: Classifier, shards: ShardSet, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images [n, C, H, W] as the network takes them and labels [n]; unreadable images are left out."""
    found = shards.gather(ids)
    if not found.readable.any():
        raise UserError(f"{shards.files.place}: none of {len(ids)} images can be read; restore the shards")
    device = network.decide.weight.device
    images, labels = torch.from_numpy(found.arrays[found.readable]), torch.from_numpy(found.labels[found.readable])
    return to_input(images.to(device)), labels.to(device)
