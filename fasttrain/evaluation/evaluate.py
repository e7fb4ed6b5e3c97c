"""A score from what was collected of samples and of a reference."""

from dataclasses import replace

from fasttrain.engine.distributed import Processes
from fasttrain.engine.together import on_main, together
from fasttrain.errors import UserError
from fasttrain.evaluation.collected import Collector, Share, Statistics, statistics
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.frechet import frechet_distance
from fasttrain.evaluation.kept import KeptStatistics
from fasttrain.evaluation.precision_recall import K, precision_recall, radii
from fasttrain.evaluation.protocol import Protocol, Score
from fasttrain.evaluation.reference import Reference


def score(samples: Statistics, reference: Statistics, features: Features, protocol: Protocol) -> Score:
    """The Frechet distance between samples and a reference, and where there are vectors enough of both, precision and recall.

    Raises:
        UserError: features of different lengths.
    """
    check_lengths(len(samples.gaussian.mean), reference, features, protocol.reference)
    enough = samples.rows is not None and reference.rows is not None and min(len(samples.rows), len(reference.rows)) > K
    near = precision_recall(samples.rows, reference.rows, reference_radii=reference.radii) if enough else None  # type: ignore[arg-type]
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
    return on_main(processes, lambda: _of(reference, what, shares))


def _of(reference: Reference, what: str, shares: list[Share]) -> Statistics:
    stated = reference.gaussian()
    if stated is not None and all(moments is None for moments, _, _ in shares):
        return Statistics(stated, None)
    found = statistics(what, shares)
    assert found.rows is not None
    return replace(found, radii=radii(found.rows) if len(found.rows) > K else None)


def _keep(kept: KeptStatistics, reference: Reference, features: Features, processes: Processes, found: Statistics) -> None:
    try:
        kept.keep(reference, features, processes.device, found)
    except OSError as error:
        print(f"the statistics of {reference.name} are not kept, and will be computed again: {error.strerror or error}")
