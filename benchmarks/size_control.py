"""Does the size control change what is drawn, or only how sharp it is? Power-cosine weighting of low-level controls beside a constant one.

    python -m benchmarks.size_control [--minutes N] [--seeds N] [--steps N] [--samples N]

Digits of original sizes 4 to 8, all prepared at 8 pixels, so that small ones are blurred; mirrored half of the time. Two small mmDiTs on
each seed, equal but for `model.control_power`: 8 (the paper's schedule) and null (constant, as SDXL). From the same noise and class each
draws a sample with the size controls 4, 6 and 8. Between these, as the paper's LPIPS comparison (Berrada et al. 2024, table 2a), in pixels:

    distance   root mean square difference of pixels in [0, 1], mean over pairs of sizes and samples
    content    the same after both were averaged to 4 x 4: what blur cannot change
    detail     mean square of what that averaging takes away, by size: whether the control works
    agreement  share of samples in which a classifier sees the digit that was asked for, by size, and mirrored with the flip control

The same of the real digits, prepared from files of each size, is what a size alone should change.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import tables
from benchmarks.digit_pictures import Images, Judge, as_prepared, grey, write_folders
from benchmarks.environment import environment, results_folder
from benchmarks.miniature_runs import Laboratory, TimeIsUp, overrides, side_by_side
from benchmarks.miniature_tables import size_control_rows
from benchmarks.whole_file import write_json
from fasttrain.sampling.images import save_grid

RESULT = results_folder(torch.device("cpu")) / "size_control.json"
CONFIG = "configs/digits/size.yaml"
WRITTEN, ASKED = (4, 5, 6, 7, 8), (4, 6, 8)
ARMS = {"power cosine (8)": "8", "constant": "null"}
SHOWN = 12
Grey = NDArray[np.float64]


def coarse(images: Grey) -> Grey:
    """Images [n, 8, 8] averaged to [n, 4, 4]."""
    return images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))


def apart(some: Grey, others: Grey) -> float:
    """Root mean square difference of each pair of images [n, H, W], mean over the pairs."""
    return float(np.sqrt(((some - others) ** 2).mean(axis=(1, 2))).mean())


def detail(images: Grey) -> float:
    """Mean square of what averaging over 2 x 2 pixels takes away from images [n, 8, 8]."""
    return float(((images - coarse(images).repeat(2, axis=1).repeat(2, axis=2)) ** 2).mean())


def compared(by_size: dict[int, Images]) -> dict[str, Any]:
    """Distances between samples of the same noise and class that were drawn with different sizes."""
    found = {size: grey(images) for size, images in by_size.items()}
    pairs = list(itertools.combinations(found, 2))
    between = {f"{one}-{other}": (apart(found[one], found[other]), apart(coarse(found[one]), coarse(found[other]))) for one, other in pairs}
    return {
        "distance": float(np.mean([whole for whole, _ in between.values()])),
        "content": float(np.mean([content for _, content in between.values()])),
        "pairs": {pair: {"distance": whole, "content": content} for pair, (whole, content) in between.items()},
        "detail": {str(size): detail(images) for size, images in found.items()},
    }


def other_noise(images: Images) -> float:
    """The distance between samples of one class and other noise: what "another image" measures. Classes take turns in the samples."""
    found = grey(images)
    return apart(found, np.roll(found, 10, axis=0))


class Trial:
    """One network: trained, and sampled with every size."""

    def __init__(self, lab: Laboratory, shards: Path, seed: int, arm: str, args: argparse.Namespace):
        self.lab, self.shards, self.seed, self.arm, self.args = lab, shards, seed, arm, args
        self.run = lab.folder / f"run-{seed}-{ARMS[arm]}"

    def __call__(self) -> dict[str, Any]:
        """Trains and samples; everything about this network that is worth keeping."""
        power = ARMS[self.arm]
        given = overrides(run_dir=self.run, data__train=self.shards, seed=self.seed, model__control_power=power)
        self.lab.command("train", CONFIG, *given, f"training.steps={self.args.steps}", about=f"seed {self.seed}, {self.arm}: training")
        by_size = {size: self._samples(f"size {size}", f"size={size},{size}", "flip=0") for size in ASKED}
        mirrored = self._samples("mirrored", f"size={ASKED[-1]},{ASKED[-1]}", "flip=1")
        judge = Judge.of(self.shards)
        labels = np.arange(self.args.samples) % 10
        return {
            "seed": self.seed,
            "arm": self.arm,
            **compared(by_size),
            "other_noise": other_noise(by_size[ASKED[-1]]),
            "agreement": {str(size): judge.agreement(images, labels) for size, images in by_size.items()},
            "agreement_mirrored": judge.agreement(mirrored[:, :, ::-1], labels),
            "picture": np.stack([images[:SHOWN] for images in by_size.values()]),
        }

    def _samples(self, name: str, *controls: str) -> Images:
        out = self.run / name.replace(" ", "-")
        sampler = ["--sampler", "heun", "--steps", self.args.sampling_steps, "--guidance", self.args.guidance]
        how = ["--count", self.args.samples, "--batch", "100", *sampler]
        arguments = [*map(str, how), "--out", out, "--control", *controls]
        self.lab.command("sample", self.run, *arguments, about=f"seed {self.seed}, {self.arm}: {name}")
        with np.load(out / "samples.npz", allow_pickle=False) as found:
            return found["arr_0"]


def pairs_of_trials(lab: Laboratory, shards: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both arms of each seed in turn; a pair that time does not suffice for is left out, and said to be.

    Raises:
        TimeIsUp: not even the first was done.
    """
    found: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        try:
            found += side_by_side([Trial(lab, shards, seed, arm, args) for arm in ARMS], args.workers)
        except TimeIsUp as told:
            if not found:
                raise
            print(f"{told}; seed {seed} and those after it are left out")
            break
    return found


def main() -> int:
    """Runs all trials, prints the table, writes the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="the most it may take (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of networks (%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each (%(default)s)")
    parser.add_argument("--samples", type=int, default=300, help="for each size (%(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2, help="networks at a time, one core each (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        lab = Laboratory(Path(scratch), args.minutes)
        write_folders(lab.folder / "digits", WRITTEN)
        shards = lab.folder / "shards"
        lab.command("prepare", "images", lab.folder / "digits", shards, "--size", "8", "--workers", "1", about="preparing")
        found = pairs_of_trials(lab, shards, args)
        judge = Judge.of(shards)
    # Rows: each arm's sizes; columns: samples.
    first = [trial.pop("picture") for trial in found][: len(ARMS)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(args.out.with_suffix(".png"), np.concatenate([rows.reshape(-1, *rows.shape[2:]) for rows in first]), columns=SHOWN)
    result = {
        "benchmark": "size_control",
        "environment": environment(torch.device("cpu")),
        "settings": {**{key: value for key, value in vars(args).items() if key != "out"}, "config": CONFIG, "sizes": WRITTEN},
        "judge": {"accuracy": judge.accuracy, "seen": judge.seen},
        "real": compared({size: as_prepared(size)[..., None] for size in ASKED}),
        "trials": found,
        "seconds": round(lab.seconds, 1),
    }
    write_json(args.out, result)
    tables.show(*size_control_rows(result), title="from the same noise and class, with size controls 4, 6 and 8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
