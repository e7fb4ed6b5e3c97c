"""A score from samples and reference images."""

from collections.abc import Iterable

import torch

from fasttrain.errors import UserError
from fasttrain.evaluation.features import FEATURES, Features, Images
from fasttrain.evaluation.frechet import Gaussian, Moments, frechet_distance
from fasttrain.evaluation.protocol import Protocol, Score


def evaluate(samples: Iterable[Images], reference: Iterable[Images], features: Features, protocol: Protocol) -> Score:
    """The Frechet distance between two sets of images, given in batches, in one pass over each.

    Args:
        samples, reference: batches of images [n, H, W, C] uint8, all of one shape.
        features: one of `FEATURES`.
        protocol: where the two sets came from; it is kept with the number.

    Raises:
        UserError: a set of fewer than two images, or sets of differently shaped images.
    """
    ours, our_shape = _gaussian("samples", samples, features)
    theirs, their_shape = _gaussian("reference", reference, features)
    if our_shape != their_shape:
        raise UserError(f"samples are images {our_shape}, the reference holds {their_shape} (H, W, C): give a reference of the same shape")
    return Score(
        frechet_distance=frechet_distance(ours, theirs),
        features=FEATURES.spec(features),
        samples=ours.vectors,
        reference_samples=theirs.vectors,
        protocol=protocol,
    )


def _gaussian(kind: str, batches: Iterable[Images], features: Features) -> tuple[Gaussian, tuple[int, ...]]:
    moments: Moments | None = None
    shape: tuple[int, ...] = ()
    for images in batches:
        rows = torch.from_numpy(features(images))
        if moments is None:
            moments, shape = Moments(rows.shape[1]), images.shape[1:]
        if images.shape[1:] != shape:
            raise UserError(f"{kind}: images of shape {images.shape[1:]} among those of {shape}; all must be of one shape")
        moments.update(rows)
    if moments is None:
        raise UserError(f"{kind}: no images; at least 2 are needed")
    try:
        return moments.gaussian(), shape
    except ValueError as error:
        raise UserError(f"{kind}: {error}") from None
