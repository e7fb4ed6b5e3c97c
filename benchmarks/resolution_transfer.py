"""Images needed at 16 pixels to reach a quality: from scratch, and from a network of 8 pixels with and without the paper's corrections.

    python -m benchmarks.resolution_transfer --images cifar10_train.tar.xz [--minutes N] [--pretraining N] [--images-to N]

CIFAR-10, reduced to 8 pixels for pre-training (whole images, or crops of 0.4 to 0.6 of their area) and to 16 for fine-tuning; small
mmDiTs in pixels with classes; seed, data order, noise and learning rate are the same in every arm (Berrada et al. 2024, section 3.4):

    positions   `model.position_base` of the pre-training grid: coordinates linspace(0, 4, 8) instead of 0 .. 7
    schedule    `diffusion.schedule.rescale` 2, equation 3: the noise of 8 pixels at each timestep, as uncertain at 16

All arms train to one number of images, then to the next, twice as large; after each their averaged weights draw samples. The Frechet
distance is that of raw pixels: it compares means and covariances of images, and is no FID. The thresholds are the distances at the last
two looks of the network from scratch, and of the pre-trained one without corrections; in between looks, axes are logarithmic.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import tables
from benchmarks.environment import environment, results_folder
from benchmarks.miniature_runs import Laboratory, TimeIsUp, overrides, side_by_side
from benchmarks.miniature_tables import resolution_transfer_rows
from benchmarks.whole_file import write_json
from fasttrain.charts import Line, Panel, line_chart
from fasttrain.data.shards import ShardSet
from fasttrain.evaluation.features import Images, Pixels
from fasttrain.evaluation.frechet import Gaussian, Moments, frechet_distance
from fasttrain.sampling.images import save_grid

RESULT = results_folder(torch.device("cpu")) / "resolution_transfer.json"
SMALL, LARGE = "configs/cifar10/mmdit-8.yaml", "configs/cifar10/mmdit-16.yaml"
POSITIONS, SCHEDULE = {"model__position_base": 4}, {"diffusion__schedule__rescale": 2}
WHOLE, LOCAL = "whole images", "local crops"
BATCH, FIRST = 64, 1024
SHOWN = 20
Curve = list[tuple[int, float]]


class Arm(NamedTuple):
    """A way to train at 16 pixels: from which pre-training, and with which corrections."""

    source: str | None
    corrections: dict[str, Any]


ARMS = {
    "from scratch": Arm(None, {}),
    "from scratch, schedule": Arm(None, SCHEDULE),
    "pre-trained": Arm(WHOLE, {}),
    "pre-trained, positions": Arm(WHOLE, POSITIONS),
    "pre-trained, schedule": Arm(WHOLE, SCHEDULE),
    "pre-trained, both": Arm(WHOLE, {**POSITIONS, **SCHEDULE}),
    "pre-trained on local crops, both": Arm(LOCAL, {**POSITIONS, **SCHEDULE}),
}

UNCORRECTED = ("from scratch", "pre-trained")


def looks(most: int) -> list[int]:
    """Numbers of images after which the arms are compared: doubled from the first on, whole batches, at most `most`."""
    found = [FIRST]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def images_to(curve: Curve, threshold: float) -> float | None:
    """Images after which a curve of (images, distance) first lies at or below a threshold, between looks on logarithmic axes."""
    for place, (images, distance) in enumerate(curve):
        if distance > threshold:
            continue
        if place == 0:
            return float(images)
        (earlier, further) = curve[place - 1]
        share = math.log(further / threshold) / math.log(further / distance)
        return math.exp(math.log(earlier) + share * math.log(images / earlier))
    return None


def gaussian(batches: Iterator[Images]) -> Gaussian:
    """Mean and covariance of images' pixels."""
    moments: Moments | None = None
    for images in batches:
        rows = torch.from_numpy(Pixels()(images))
        moments = moments or Moments(rows.shape[1])
        moments.update(rows)
    assert moments is not None
    return moments.gaussian()


def real(shards: ShardSet, which: range) -> Iterator[Images]:
    """The images of these sample ids, in batches."""
    for start in range(which.start, which.stop, 4096):
        yield shards.gather(np.arange(start, min(start + 4096, which.stop))).arrays.transpose(0, 2, 3, 1)


class Race:
    """The arms, from the pictures to the curves."""

    def __init__(self, lab: Laboratory, args: argparse.Namespace):
        self.lab, self.args = lab, args
        self.curves: dict[str, Curve] = {name: [] for name in ARMS}
        self.pictures: dict[str, Images] = {}

    def prepare(self) -> None:
        """The shards of both sizes."""
        crops = ("--crop", "random", "--crop-scale", "0.4", "0.6")
        made = ((WHOLE, 8, ()), (LOCAL, 8, crops), ("large", 16, ()))
        side_by_side([partial(self._prepare, name, size, extra) for name, size, extra in made], self.args.workers)
        shards = ShardSet.open(self._data("large"))
        held_out = range(len(shards) - self.args.samples, len(shards))
        self.real_images = held_out.start
        self.reference = gaussian(real(shards, range(self.real_images)))
        # What as many real images are away: no network can be expected below it.
        self.floor = frechet_distance(gaussian(real(shards, held_out)), self.reference)

    def _prepare(self, name: str, size: int, extra: Sequence[str]) -> None:
        arguments = (self.args.images, self._data(name), "--size", str(size), "--workers", "1", *extra)
        self.lab.command("prepare", "images", *arguments, about=f"preparing {name} at {size} pixels")

    def pretrain(self) -> None:
        """Both networks at 8 pixels."""
        steps = self.args.pretraining // BATCH
        side_by_side([partial(self._train, SMALL, name, name, steps) for name in (WHOLE, LOCAL)], self.args.workers)

    def run(self) -> None:
        """Every arm to each look in turn, until all is done or time is up; what only some arms reached is left out."""
        for images in looks(self.args.images_to):
            try:
                looked = side_by_side([partial(self._look, name, images) for name in ARMS], self.args.workers)
            except TimeIsUp as told:
                print(f"{told}; the looks at {images:,} images and after it are left out")
                return
            for name, (distance, shown) in zip(ARMS, looked, strict=True):
                self.curves[name].append((images, distance))
                self.pictures[name] = shown

    def _look(self, name: str, images: int) -> tuple[float, Images]:
        arm = ARMS[name]
        source = {} if arm.source is None else {"init_from": self._run(arm.source)}
        self._train(LARGE, name, "large", images // BATCH, **arm.corrections, **source)
        out = self._run(name) / "look"
        how = ("--count", self.args.samples, "--batch", "256", "--sampler", "heun", "--steps", self.args.sampling_steps, "--out", out)
        self.lab.command("sample", self._run(name), *map(str, how), about=f"{name}: samples after {images:,} images")
        with np.load(out / "samples.npz", allow_pickle=False) as found:
            samples = found["arr_0"]
        return frechet_distance(gaussian(iter([samples])), self.reference), samples[:SHOWN]

    def _train(self, config: str, name: str, data: str, steps: int, **given: Any) -> None:
        given = {"run_dir": self._run(name), "data__train": self._data(data), "training__steps": steps, **given}
        self.lab.command("train", config, *overrides(**given), about=f"{name}: to {steps * BATCH:,} images")

    def _data(self, name: str) -> Path:
        return self.lab.folder / f"data {name}".replace(" ", "-")

    def _run(self, name: str) -> Path:
        return self.lab.folder / f"run {name}".replace(" ", "-").replace(",", "")


def thresholds_of(curves: Mapping[str, Curve]) -> list[float]:
    """The distances to be reached, from the furthest: the last two of both arms without corrections."""
    return sorted((distance for name in UNCORRECTED for _, distance in curves[name][-2:]), reverse=True)


def summary(race: Race) -> dict[str, Any]:
    """The curves, the thresholds, and what each arm needed for them."""
    thresholds = thresholds_of(race.curves)
    arms = {name: {"curve": curve, "needed": [images_to(curve, t) for t in thresholds]} for name, curve in race.curves.items()}
    return {"thresholds": thresholds, "floor": race.floor, "real_images": race.real_images, "arms": arms}


def draw_curves(path: Path, result: dict[str, Any]) -> None:
    """Distance against images at 16 pixels, a line an arm."""
    lines = [Line(name, [(float(images), distance) for images, distance in arm["curve"]]) for name, arm in result["arms"].items()]
    panel = Panel("CIFAR-10 at 16 pixels", lines, "images", "Frechet distance", log_x=True, log_y=True)
    line_chart(path, "Frechet distance of raw pixels by images trained on", [panel])


def main() -> int:
    """Runs the race, prints the table, writes the JSON, the plot and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10 as class folders, or a tar of them")
    parser.add_argument("--minutes", type=float, default=30, help="the most it may take (%(default)s)")
    parser.add_argument("--pretraining", type=int, default=65_536, help="images of pre-training, at 8 pixels (%(default)s)")
    parser.add_argument("--images-to", type=int, default=65_536, help="images of each arm at 16 pixels, at most (%(default)s)")
    parser.add_argument("--samples", type=int, default=512, help="for each distance (%(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="commands at a time, one core each (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        race = Race(Laboratory(Path(scratch), args.minutes), args)
        race.prepare()
        race.pretrain()
        race.run()
    if not all(race.curves.values()):
        raise SystemExit(f"{args.minutes} minutes were not enough for the first look: give more --minutes, or less --pretraining")
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "images")}
    result = {
        "benchmark": "resolution_transfer",
        "environment": environment(torch.device("cpu")),
        "settings": {**settings, "configs": [SMALL, LARGE], "batch": BATCH},
        **summary(race),
        "seconds": round(race.lab.seconds, 1),
    }
    write_json(args.out, result)
    draw_curves(args.out.with_name(f"{args.out.stem}-curves.png"), result)
    save_grid(args.out.with_suffix(".png"), np.concatenate(_rows(race.pictures)), columns=SHOWN)
    tables.show(*resolution_transfer_rows(result), title="Frechet distance of raw pixels, 16 x 16")
    return 0


def _rows(pictures: dict[str, Images]) -> Sequence[Images]:
    return [pictures[name] for name in ARMS]


if __name__ == "__main__":
    raise SystemExit(main())
