"""Week 5's own code on 120 scanned receipts: what are places worth on real pages?

The pack sroie_subset holds words, boxes and tags of receipts of the ICDAR 2019 competition (SROIE,
CC BY 4.0): 96 to train on, 24 to test, company, address, date and total. Words come in the scan's
reading order or in none; the model sees words only, your tables of places, or distances.

Two things to know before reading the numbers: word boxes are the boxes of lines cut up by letters,
so that words of one line share top and bottom; and "total" was matched by its text, so the tag may
stand at one of several equal amounts.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from _week import packs_folder, week_namespace

from mmlearn.data.documents import Documents
from mmlearn.metrics import mean_and_spread
from mmlearn.train import set_seed
from mmlearn.wordpiece import WordPieceTokenizer

MAX_LENGTH = 512
NAMES = ["O", *(f"{at}-{kind}" for kind in ("COMPANY", "ADDRESS", "DATE", "TOTAL") for at in "BI")]


def main(arguments: list[str] | None = None) -> int:
    """Train and test each way, print a table; 2 where the pack is absent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed: does it run?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250, help="of eight receipts (default 250)")
    parser.add_argument("--data", type=Path, help="the folder that holds sroie_subset")
    options = parser.parse_args(arguments)
    pack = (options.data or packs_folder()) / "sroie_subset" / "annotations.jsonl"
    if not pack.is_file():
        print(f"There is no {pack}: name the folder with the packs by --data.", file=sys.stderr)
        return 2

    torch.set_num_threads(1)
    week = week_namespace("w05_layoutlm")
    rows = [json.loads(line) for line in pack.read_text("utf-8").splitlines()]
    sets = {
        split: receipts([row for row in rows if row["split"] == split])
        for split in ("train", "test")
    }
    tokenizer = WordPieceTokenizer.train([" ".join(words) for words in sets["train"].words], 2000)
    seeds, steps = (options.seeds[:1], 3) if options.quick else (options.seeds, options.steps)
    print(f"{len(sets['train'])} receipts to train on, {len(sets['test'])} to test; {steps} steps")
    kinds = [name[2:].lower() for name in NAMES[1::2]]
    print(f"{'words':9}{'places':11}{'entity F1':>16}", *(f"{kind:>14}" for kind in kinds))
    for order in ("reading", "shuffled"):
        parts = {
            split: week["encode"](pages, tokenizer, order == "shuffled", max_length=MAX_LENGTH)
            for split, pages in sets.items()
        }
        for places in ("none", "tables", "distances"):
            scores = [measure(week, parts, tokenizer, places, seed, steps) for seed in seeds]
            cells = [str(mean_and_spread(column)) for column in zip(*scores)]
            print(
                f"{order:9}{places:11}{cells[0]:>16}", *(f"{c:>14}" for c in cells[1:]), flush=True
            )
    return 0


def receipts(rows: list[dict]) -> Documents:
    """Return receipts in the course's own form, without pictures."""
    return Documents(
        images=torch.zeros(len(rows), 1, 0, 0),
        words=[row["words"] for row in rows],
        boxes=[torch.tensor(row["boxes"]) for row in rows],
        tags=[torch.tensor([NAMES.index(tag) for tag in row["ner_tags"]]) for row in rows],
        labels=torch.zeros(len(rows), dtype=torch.long),
        tag_names=NAMES,
        class_names=["receipt"],
        questions=[""] * len(rows),
        answers=[""] * len(rows),
        answer_words=[[] for _ in rows],
        attributes={"layout": ["scanned"] * len(rows)},
        name="sroie_subset",
        licence="CC BY 4.0",
    )


def measure(week: dict, parts: dict, tokenizer, places: str, seed: int, steps: int) -> list[float]:
    """Train one model; return the F1 of all entities, then of each kind."""
    set_seed(seed)
    model = week["PageModel"](tokenizer.vocab_size, len(NAMES), places, max_length=MAX_LENGTH)
    week["train_tagger"](parts["train"], places, seed, steps, model=model)
    answers, wanted = week["predict"](model, parts["test"]), parts["test"].tags
    scores = [week["entity_f1"](answers, wanted)]
    for name in NAMES[1::2]:
        one = [
            [[tag if tag[2:] == name[2:] else "O" for tag in page] for page in pages]
            for pages in (answers, wanted)
        ]
        scores.append(week["entity_f1"](*one))
    return scores


if __name__ == "__main__":
    sys.exit(main())
