"""A small CLIP text encoder that tells the digits of captions apart, in transformers' own files.

    python -m benchmarks.caption_encoder FOLDER

Two layers of 64, a word a token. It learns for some seconds to classify the captions of `digit_pictures` by their digit, from the state of
their last token; what learned to read that off is thrown away. So its states differ by meaning, as those of a trained encoder do.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.digit_pictures import OTHER_TEMPLATES, TEMPLATES, prompts
from tests.data.text.tiny_encoder import write_tiny_encoder

HIDDEN, PLACES = 64, 12
STEPS, RATE = 150, 2e-3


def train_encoder(folder: Path, captions: Mapping[str, int], seed: int = 0) -> dict[str, float]:
    """Writes the encoder of these captions, each with its digit.

    Returns:
        The share of captions whose digit its head tells: of these, and of the wordings that it was not trained on.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    others = prompts(OTHER_TEMPLATES)
    words = sorted({word for caption in (*captions, *others) for word in caption.split()})
    write_tiny_encoder(folder, hidden=HIDDEN, projection=None, places=PLACES, words=words, seed=seed)
    model, tokenizer = CLIPTextModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(HIDDEN, 10)

    def logits(of: Mapping[str, int]) -> torch.Tensor:
        batch = tokenizer(list(of), padding=True, return_tensors="pt")
        return head(model(**batch).pooler_output)

    def accuracy(of: Mapping[str, int]) -> float:
        return (logits(of).argmax(dim=1) == torch.tensor(list(of.values()))).double().mean().item()

    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=RATE)
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(logits(captions), torch.tensor(list(captions.values())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return {"wordings of training": accuracy(captions), "other wordings": accuracy(others)}


def main() -> None:
    """Trains and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    told = train_encoder(args.folder, prompts(TEMPLATES))
    print(f"{args.folder}: tells the digit of {', '.join(f'{share:.0%} of {name}' for name, share in told.items())}")


if __name__ == "__main__":
    main()
