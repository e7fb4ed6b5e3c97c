"""Text to image in miniature: captions of digits, a small CLIP text encoder, a small mmDiT, and a classifier that reads what was drawn.

    python -m benchmarks.text_to_image [--minutes N] [--steps N] [--samples N] [--guidance S]

1,797 handwritten digits as PNGs with a caption in a `.txt` beside each ("a handwritten seven", "the digit 3": twelve wordings); a CLIP text
encoder of two layers, trained here for some seconds to tell the captions' digits apart and saved in transformers' own format; then
`prepare images --captions txt`, `prepare text`, `train configs/digits/text.yaml`, `sample --prompts`. A support vector machine on the
pixels, whose accuracy on digits that it never saw stands beside, says which digit each sample shows. Asked for are the wordings of
training, of which 90 % must be seen, and others, which tell how far the encoder's meaning reaches.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks import tables
from benchmarks.caption_encoder import train_encoder
from benchmarks.digit_pictures import OTHER_TEMPLATES, SIDE, TEMPLATES, Images, Judge, prompts, write_folders
from benchmarks.environment import environment, results_folder
from benchmarks.miniature_runs import Laboratory, overrides
from benchmarks.miniature_tables import text_to_image_rows
from benchmarks.whole_file import write_json

RESULT = results_folder(torch.device("cpu")) / "text_to_image.json"
CONFIG = "configs/digits/text.yaml"
ASKED = {"wordings of training": TEMPLATES, "other wordings": OTHER_TEMPLATES}
TARGET = 0.9
COLUMNS, ROWS, ENLARGED, LINE = 5, 4, 12, 18


def judged(judge: Judge, images: Images, labels: np.ndarray) -> dict[str, Any]:
    """In how many samples the judge sees the caption's digit."""
    by_digit = {str(digit): judge.agreement(images[labels == digit], labels[labels == digit]) for digit in range(10)}
    return {"samples": len(images), "agreement": judge.agreement(images, labels), "by_digit": by_digit}


def captioned(images: Images, captions: Sequence[str]) -> Image.Image:
    """Samples [n, 8, 8, C] in rows, enlarged, each above its caption."""
    side = SIDE * ENLARGED
    across, down = side + 70, side + LINE + 10
    picture = Image.new("RGB", (COLUMNS * across, -(-len(images) // COLUMNS) * down), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = place % COLUMNS * across + 35, place // COLUMNS * down + 5
        picture.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.text((left + side / 2, top + side + 4), caption, fill="black", font=font, anchor="ma")
    return picture


class Trial:
    """The whole way from captions to samples."""

    def __init__(self, lab: Laboratory, args: argparse.Namespace):
        self.lab, self.args = lab, args
        self.shards, self.encoder, self.run = lab.folder / "shards", lab.folder / "encoder", lab.folder / "run"

    def prepare(self) -> dict[str, float]:
        """Pictures, captions, encoder, shards and their text; the share of captions whose digit the encoder's head tells."""
        write_folders(self.lab.folder / "digits", captions=True)
        told = train_encoder(self.encoder, prompts(TEMPLATES))
        images = (self.lab.folder / "digits", self.shards, "--size", str(SIDE), "--captions", "txt", "--workers", "1")
        self.lab.command("prepare", "images", *images, about="preparing pictures and captions")
        self.lab.command("prepare", "text", self.shards, "--encoder", self.encoder, about="encoding the captions")
        return told

    def train(self) -> None:
        """The network."""
        given = overrides(run_dir=self.run, data__train=self.shards, training__steps=self.args.steps, seed=self.args.seed)
        self.lab.command("train", CONFIG, *given, about=f"training {self.args.steps} steps")

    def sample(self, name: str, wanted: dict[str, int]) -> tuple[Images, list[str]]:
        """Samples of these captions in turn, and the caption of each as the command wrote it beside them."""
        file, out = self.lab.folder / f"{name}.txt".replace(" ", "-"), self.run / name.replace(" ", "-")
        file.write_text("".join(f"{caption}\n" for caption in wanted))
        sampler = ["--sampler", "heun", "--steps", self.args.sampling_steps, "--guidance", self.args.guidance]
        how = ["--count", self.args.samples, "--batch", "200", *sampler]
        text = ["--prompts", file, "--text-encoder", self.encoder]
        self.lab.command("sample", self.run, *map(str, how), *text, "--out", out, about=f"drawing {name}")
        with np.load(out / "samples.npz", allow_pickle=False) as found:
            return found["arr_0"], (out / "captions.txt").read_text().splitlines()


def main() -> int:
    """Runs the trial, prints the table, writes the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="the most it may take (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (%(default)s)")
    parser.add_argument("--samples", type=int, default=600, help="for each set of captions (%(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        lab = Laboratory(Path(scratch), args.minutes)
        trial = Trial(lab, args)
        told = trial.prepare()
        trial.train()
        judge = Judge.of(trial.shards)
        captions, shown = {}, None
        for name, templates in ASKED.items():
            wanted = prompts(templates)
            images, drawn = trial.sample(name, wanted)
            captions[name] = {**judged(judge, images, np.array([wanted[caption] for caption in drawn])), "wordings": templates}
            shown = shown or (images, drawn)
    assert shown is not None
    # A stride that no period of the captions divides, so that the picture shows many wordings.
    chosen = [place * 13 % args.samples for place in range(COLUMNS * ROWS)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    captioned(shown[0][chosen], [shown[1][place] for place in chosen]).save(args.out.with_suffix(".png"))
    result = {
        "benchmark": "text_to_image",
        "environment": environment(torch.device("cpu")),
        "settings": {**{key: value for key, value in vars(args).items() if key != "out"}, "config": CONFIG},
        "target": TARGET,
        "encoder_tells_digits": told,
        "judge": {"accuracy": judge.accuracy, "seen": judge.seen, "unseen": judge.unseen},
        "captions": captions,
        "seconds": round(lab.seconds, 1),
    }
    write_json(args.out, result)
    tables.show(*text_to_image_rows(result))
    trained = next(iter(captions))
    reached = captions[trained]["agreement"] >= TARGET
    print(f"a classifier agrees with at least {TARGET:.0%} of the captions in the {trained}: {'yes' if reached else 'NO'}")
    return int(not reached)


if __name__ == "__main__":
    raise SystemExit(main())
