"""Text in training: how fast captions are read beside latents, how long their padding takes, and what it does to their statistics.

    python -m benchmarks.text [--rounds 5] [--seconds 1]

Captions of 8 to 40 tokens at the sizes of CLIP-L (77 places, 768 wide) are written to a scratch folder by fasttrain's own writer, with
random numbers for a text encoder's; the page cache is warm, digests are compared before the clock starts. One thread, on one core.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment, results_folder
from benchmarks.loader import BATCH, SAMPLES, write_shards
from benchmarks.tables import show
from benchmarks.whole_file import write_json
from fasttrain.cond import Text
from fasttrain.data.config import DataConfig
from fasttrain.data.prepare.text import prepare_text
from fasttrain.data.text.encoder import Encoded, EncoderRecord
from fasttrain.data.text.padding import TextPadding, padded
from fasttrain.data.text.table import TextTable

PLACES, WIDTH, POOLED = 77, 768, 768
SHORTEST, LONGEST = 8, 40
LENGTHS = (2, 7, 11, 25, 38, 60, 77)  # of the captions whose statistics are told
PROMPTS = 400
NOISES = (0.02, 0.2)
CPU = torch.device("cpu")
RESULT = results_folder(CPU) / "text.json"


class Noise:
    """Stands in for a text encoder: random tokens, a function of the caption."""

    record = EncoderRecord(id="noise", xxh3="0" * 32, tokens=PLACES, width=WIDTH, pooled=POOLED)

    def encode(self, captions: Sequence[str]) -> list[Encoded]:
        """As TextEncoder.encode."""
        return [self._one(np.random.default_rng(int(caption or 0))) for caption in captions]

    def _one(self, rng: np.random.Generator) -> Encoded:
        length = int(rng.integers(SHORTEST, LONGEST + 1))
        numbers = rng.standard_normal((length + 1, WIDTH), np.float32).astype(np.float16)
        return Encoded(numbers[:length], numbers[length], length)


def write_text(folder: Path) -> tuple[TextTable, Callable[[np.ndarray], Any]]:
    """A set of latents with a caption each: its text, and what gathers its latents."""
    shards = write_shards(folder / "set")
    names = folder / "names.txt"
    names.write_text("".join(f"{n} {n + 1}\n" for n in range(1000)))
    prepare_text(str(folder / "set"), folder / "text", Noise(), template="{}", names=names)  # type: ignore[arg-type]
    table = TextTable.open(str(folder / "text"), shards.index, DataConfig(train=str(folder / "set")))
    table.gather(np.arange(SAMPLES))
    return table, shards.gather


def rate(work: Callable[[np.ndarray], Any], seconds: float) -> float:
    """Samples a second of its own CPU time, in batches drawn over the whole set."""
    batches = np.random.default_rng(0).permutation(SAMPLES).reshape(-1, BATCH)
    start, began, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        work(batches[count // BATCH % len(batches)])
        count += BATCH
    return count / (time.process_time() - began)


def padding_rates(table: TextTable, seconds: float) -> dict[str, float]:
    """Captions padded a CPU second, by how."""
    text = Text(*map(torch.from_numpy, table.gather(np.arange(32))))
    position = torch.arange(32)
    rates = {}
    for name, how in {"zero": TextPadding(how="zero"), "copies": TextPadding(noise=0), "copies with noise": TextPadding()}.items():
        began, count = time.process_time(), 0
        while time.process_time() - began < seconds:
            padded(text, 0, position, how)
            count += len(position)
        rates[name] = count / (time.process_time() - began)
    return rates


def statistics_of(length: int, noise: float) -> dict[str, float]:
    """What padding does to a caption's channels, over many prompts of a length: means over channels and prompts.

    mean: of |padded mean - the copies' mean| in deviations of the caption's channel. variance: of the padded tokens about the copies' mean,
    over the caption's; expected: the copies' own, plus noise^2 (M / m - 1).
    """
    own = torch.randn(PROMPTS, length, WIDTH, generator=torch.Generator().manual_seed(length))
    tokens = torch.nn.functional.pad(own, (0, 0, 0, PLACES - length))
    text = Text(tokens, torch.full((PROMPTS,), length), torch.zeros(PROMPTS, 1))
    given = padded(text, 0, torch.arange(PROMPTS), TextPadding(noise=noise)).tokens.double()
    copies = own.double()[:, torch.arange(PLACES) % length]
    deviation = own.double().std(1, correction=0)
    expected = copies.var(1, correction=0) + (noise * deviation) ** 2 * (PLACES / length - 1)
    return {
        "tokens": length,
        "noise": noise,
        "deviation": noise * math.sqrt(PLACES / length - 1),
        "mean": float(((given - copies).mean((0, 1)) / deviation.mean(0)).abs().mean()),
        "variance": float((given - copies.mean(1, keepdim=True)).square().mean(1).sum() / deviation.square().sum()),
        "expected": float(expected.sum() / deviation.square().sum()),
    }


def main() -> None:
    """Measures, prints the tables and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each arm in each round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table, latents = write_text(Path(folder))
        arms: dict[str, Callable[[np.ndarray], Any]] = {
            "latents, 8 KiB": latents,
            "text, 77 x 768": table.gather,
            "both": lambda ids: (latents(ids), table.gather(ids)),
        }
        rounds = [{name: rate(work, args.seconds) for name, work in arms.items()} for _ in range(args.rounds)]
        padding = padding_rates(table, args.seconds)
    report(rounds, padding, [statistics_of(length, noise) for noise in NOISES for length in LENGTHS], args.seconds)


def report(rounds: list[dict[str, float]], padding: dict[str, float], told: list[dict[str, float]], seconds: float) -> None:
    """The tables on the screen, and the same figures as JSON."""
    rates = {name: [each[name] for each in rounds] for name in rounds[0]}
    middle = {name: statistics.median(values) for name, values in rates.items()}
    rows = [[name, f"{middle[name]:,.0f}", f"{min(values):,.0f} to {max(values):,.0f}"] for name, values in rates.items()]
    show(["gathered", "samples a CPU second", "rounds"], rows, f"batches of {BATCH}, one thread")
    show(["padding", "captions a CPU second"], [[name, f"{value:,.0f}"] for name, value in padding.items()], "on the CPU, fp32")
    head = ["tokens of 77", "noise", "noise's deviation / caption's", "|mean moved| / deviation", "variance / caption's", "expected"]
    lines = [
        [f"{t['tokens']:.0f}", f"{t['noise']:g}", *(f"{t[key]:.5f}" for key in ("deviation", "mean", "variance", "expected"))] for t in told
    ]
    show(head, lines, f"replicate padding over {PROMPTS} prompts of each length, {WIDTH} channels")
    result = {
        "benchmark": "text",
        "environment": {**environment(CPU), "cores_used": 1},
        "settings": {"samples": SAMPLES, "batch": BATCH, "places": PLACES, "width": WIDTH, "rounds": len(rounds), "seconds": seconds},
        "load_average": os.getloadavg()[0],
        "samples_per_cpu_second": middle,
        "rounds": rounds,
        "padded_per_cpu_second": padding,
        "padding": told,
    }
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
