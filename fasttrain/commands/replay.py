"""`fasttrain replay RUN STEP [key=value ...]`: takes one step of a run again, and tells everything about it."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from fasttrain.commands.destination import try_file, writing_to
from fasttrain.engine import distributed
from fasttrain.engine.together import on_main
from fasttrain.files import write_whole
from fasttrain.lines import jsonable
from fasttrain.replay import replay
from fasttrain.run import read_run

SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder of a `fasttrain train`; nothing that is there changes")
    parser.add_argument("step", type=int, help="the step to take again, from the newest checkpoint before it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to use instead of the run's, e.g. kernels=reference")
    parser.add_argument("--out", type=Path, help="JSON file for the report (default: RUN/replays/step-N.json, the step in 8 digits)")


def run(args: argparse.Namespace) -> None:
    config, _ = read_run(args.run, args.overrides)
    out = args.out or args.run / "replays" / f"step-{args.step:08d}.json"
    with distributed.joined(config.training.timeout_seconds) as processes:
        on_main(processes, lambda: try_file(out))
        report = replay(config, args.step, processes, print if processes.is_main else lambda text: None)
    if processes.is_main:
        _print(report)
        _write(out, report)


def _print(report: dict[str, Any]) -> None:
    samples = [sample for batch in report["micro_batches"] for sample in batch["samples"]]
    strange = [sample for sample in samples if not (math.isfinite(sample["loss"]) and sample["input_finite"])]
    first, last = report["position"], report["position"] + report["images"] - 1
    print(f"step {report['step']}, positions {first} to {last}: {'taken' if report['taken'] else 'skipped'}")
    print(f"loss {report['loss']:.6g}, gradient norm before clipping {report['grad_norm']:.6g} (clip {report['clip']})")
    for title, chosen in (("samples that are not finite", strange), ("samples with the largest loss", _largest(samples))):
        if chosen:
            print(f"{title} ({len(chosen)} of {len(samples)}):")
            for sample in chosen[:SHOWN]:
                print("  " + ", ".join(f"{name} {value}" for name, value in sample.items()))
    if report["not_finite"]:
        names = ", ".join(report["not_finite"][:SHOWN])
        print(f"gradients that are not finite: {len(report['not_finite'])} of {len(report['grad_norms'])}: {names} ...")
    print(report["comparison"]["told"])


def _largest(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    finite = [sample for sample in samples if math.isfinite(sample["loss"])]
    return sorted(finite, key=lambda sample: sample["loss"], reverse=True)[:3]


def _write(out: Path, report: dict[str, Any]) -> None:
    with writing_to(out, "file"):
        write_whole(out, json.dumps(jsonable(report), indent=1) + "\n")
    print(f"the whole report: {out}")
