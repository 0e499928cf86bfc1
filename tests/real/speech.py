"""Week 7's own code on real voices: what is pre-training without labels worth with few of them?

The pack fsdd_subset holds 1,200 spoken digits by six people (Free Spoken Digit Dataset, CC BY-SA
4.0). One person at a time is left out for the test. The model listens to the other five without
labels, with the learner's quantizer; then it learns letters from some of their words, with the
learner's CTC. Beside it: the same from scratch.

A recording that is too short for its letters (a frame each, one more between equal ones) is not
used for labels.
"""

import argparse
import csv
import sys
from itertools import pairwise
from pathlib import Path

import soundfile
import torch
from _week import packs_folder, week_namespace

from mmlearn.data import speech
from mmlearn.metrics import mean_and_spread

RATE = 8000
PEOPLE = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


def main(arguments: list[str] | None = None) -> int:
    """Pre-train, fine-tune and test, print a table; 2 where the pack is absent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, one person: does it run?"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--people", nargs="+", choices=PEOPLE, default=["jackson", "lucas", "theo"])
    parser.add_argument("--words", type=int, nargs="+", default=[50, 200, 900], help="labelled")
    parser.add_argument("--steps", type=int, default=600, help="of pre-training (default 600)")
    parser.add_argument("--tune", type=int, default=300, help="steps of fine-tuning (default 300)")
    parser.add_argument("--data", type=Path, help="the folder that holds fsdd_subset")
    options = parser.parse_args(arguments)
    pack = (options.data or packs_folder()) / "fsdd_subset"
    if not (pack / "metadata.csv").is_file():
        print(
            f"There is no {pack / 'metadata.csv'}: name the folder with the packs by --data.",
            file=sys.stderr,
        )
        return 2
    if options.quick:
        options.people, options.words = options.people[:1], options.words[:1]
        options.seeds, options.steps, options.tune = options.seeds[:1], 3, 3

    torch.set_num_threads(1)
    week = week_namespace("w07_quantization")
    with open(pack / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for person in options.people:
        others = digits(pack, [row for row in rows if row["speaker"] != person], "five people")
        left_out = digits(pack, [row for row in rows if row["speaker"] == person], person)
        for seed in options.seeds:
            found += measure(week, others, left_out, seed, options)
    print(f"\n{len(options.people)} people left out in turn, {len(options.seeds)} seeds each")
    print(f"{'labelled':>9}  {'start':13}{'word errors':>16}{'letter errors':>16}")
    for words in options.words:
        for name in ("from scratch", "pre-trained"):
            mine = [row[3:] for row in found if row[1:3] == (words, name)]
            cells = [str(mean_and_spread(column)) for column in zip(*mine, strict=True)]
            print(f"{words:>9}  {name:13}{cells[0]:>16}{cells[1]:>16}")
    return 0


def digits(pack: Path, rows: list[dict], name: str) -> speech.Utterances:
    """Read recordings into the course's own form."""
    sounds = [soundfile.read(pack / row["file_name"], dtype="float32")[0] for row in rows]
    labels = torch.tensor([int(row["label"]) for row in rows])
    return speech.Utterances(
        waveforms=torch.nn.utils.rnn.pad_sequence(
            [torch.as_tensor(sound) for sound in sounds], batch_first=True
        ),
        lengths=torch.tensor([len(sound) for sound in sounds]),
        transcripts=[speech.DIGITS[label] for label in labels.tolist()],
        labels=labels,
        class_names=list(speech.DIGITS),
        speakers=[row["speaker"] for row in rows],
        phonemes=[[] for _ in rows],
        sampling_rate=RATE,
        name=f"fsdd_subset, {name}",
        source="Z. Jackson and others: Free Spoken Digit Dataset",
        licence="CC BY-SA 4.0",
    )


def measure(week: dict, others, left_out, seed: int, options) -> list[tuple]:
    """Return person, labelled words, start, and the errors per word and per letter."""
    config = week["tiny_config"]()
    heard, test = week["Recordings"](others), week["Recordings"](left_out)
    listening, seen = week["pretrain"](config, heard, options.steps, lr=3e-3, seed=seed, size=12)
    person = left_out.speakers[0]
    print(f"{person}, seed {seed}: {seen[-1][3]:.1f} of 32 entries in use", flush=True)
    frames = listening.wav2vec2.feature_encoder.num_frames(others.lengths).tolist()
    needed = [len(word) + sum(a == b for a, b in pairwise(word)) for word in others.transcripts]
    fits = torch.tensor([have >= need for have, need in zip(frames, needed, strict=True)])
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    order = order[fits[order]]
    rows = []
    for words in options.words:
        for name, start in (("from scratch", None), ("pre-trained", listening.wav2vec2)):
            model, _ = week["fine_tune"](start, heard, order[:words], options.tune, seed)
            rows.append((person, words, name, *week["error_rates"](model, test)))
            print(f"  {words} words, {name}: {rows[-1][3]:.3f} {rows[-1][4]:.3f}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
