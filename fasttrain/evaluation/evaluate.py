"""A score from what was collected of samples and of a reference."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from fasttrain.engine.distributed import Processes
from fasttrain.engine.together import divided, on_main, together
from fasttrain.errors import UserError
from fasttrain.evaluation.collected import Collector, Share, Statistics, statistics
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.frechet import frechet_distance
from fasttrain.evaluation.kept import KeptStatistics
from fasttrain.evaluation.precision_recall import K, PrecisionRecall, precision_recall, radii
from fasttrain.evaluation.protocol import Protocol, Score
from fasttrain.evaluation.reference import Reference


def score(samples: Statistics, reference: Statistics, features: Features, protocol: Protocol, near: PrecisionRecall | None) -> Score:
    """The Frechet distance between samples and a reference, beside what `nearness` found.

    Raises:
        UserError: features of different lengths.
    """
    check_lengths(len(samples.gaussian.mean), reference, features, protocol.reference)
    assert samples.gaussian.vectors is not None
    return Score(
        frechet_distance=frechet_distance(samples.gaussian, reference.gaussian),
        precision=near.precision if near else None,
        recall=near.recall if near else None,
        neighbours={"k": near.k, "samples": near.samples, "reference": near.reference} if near else None,
        features=features.told,
        samples=samples.gaussian.vectors,
        reference_samples=reference.gaussian.vectors,
        protocol=protocol,
    )


def nearness(samples: Statistics | None, reference: Statistics | None, processes: Processes) -> PrecisionRecall | None:
    """Precision and recall of what rank 0 has, by all ranks and on each one's device; None where vectors are too few. A collective."""
    told = processes.from_main(_vectors(samples, reference))
    if told is None:
        return None
    ours, theirs, their_radii = told
    where = processes.device
    return precision_recall(ours.to(where), theirs.to(where), reference_radii=their_radii, divide=partial(divided, processes))


def _vectors(samples: Statistics | None, reference: Statistics | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    if samples is None or reference is None or samples.rows is None or reference.rows is None:
        return None
    return (samples.rows, reference.rows, reference.radii) if min(len(samples.rows), len(reference.rows)) > K else None


def check_lengths(length: int, reference: Statistics, features: Features, name: str) -> None:
    """Raises UserError where features of this length cannot be compared with the reference's."""
    if length != (theirs := len(reference.gaussian.mean)):
        told = f"{features.told['name']} features have {length} numbers, its statistics {theirs}: they were made of other features"
        raise UserError(f"--reference {name}: {told}; name those with --features")


def reference_statistics(reference: Reference, features: Features, processes: Processes, kept: KeptStatistics) -> Statistics | None:
    """A reference's statistics on rank 0, None elsewhere: kept ones, or computed by all ranks and kept. A collective.

    Raises:
        UserError: fewer than two images, or features that they cannot have.
    """
    found = kept.find(reference, features, processes.device) if processes.is_main else None
    if not processes.from_main(found is not None):
        found = _computed(reference, features, processes)
        if found is not None and found.rows is not None and not found.left_out:
            _keep(kept, reference, features, processes, found)
    stated = reference.gaussian()
    return found if found is None or stated is None else replace(found, gaussian=stated)


def _computed(reference: Reference, features: Features, processes: Processes) -> Statistics | None:
    what = f"--reference {reference.name}"
    collector = Collector(what, features)

    def collect() -> None:
        for part in reference.parts(processes.rank, processes.world_size):
            collector.update(*part)

    together(processes, collect)
    shares = processes.gather_to_main(collector.share())
    return _with_radii(on_main(processes, lambda: _of(reference, what, shares)), processes)


def _of(reference: Reference, what: str, shares: list[Share]) -> Statistics:
    stated = reference.gaussian()
    if stated is not None and all(moments is None for moments, _, _ in shares):
        return Statistics(stated, None)
    return statistics(what, shares)


def _with_radii(found: Statistics | None, processes: Processes) -> Statistics | None:
    """Rank 0's statistics with what precision and recall need of them, by all ranks and on each one's device. A collective."""
    rows = processes.from_main(None if found is None or found.rows is None or len(found.rows) <= K else found.rows)
    known = None if rows is None else radii(rows.to(processes.device), divide=partial(divided, processes))
    return found and replace(found, radii=known)


def _keep(kept: KeptStatistics, reference: Reference, features: Features, processes: Processes, found: Statistics) -> None:
    try:
        kept.keep(reference, features, processes.device, found)
    except OSError as error:
        print(f"the statistics of {reference.name} are not kept, and will be computed again: {error.strerror or error}")
