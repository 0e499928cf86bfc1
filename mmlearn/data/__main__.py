"""Print a table of the sets and draw a gallery of them: `python -m mmlearn.data`."""

import argparse
from inspect import getdoc
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmlearn.data import SETS, CaptionedImages, scenes

# Pixels of the gallery: a picture, the space between two, a line of text.
TILE, GAP, LINE = 128, 16, 15
INK, FAINT, PAPER = (28, 30, 34), (110, 114, 122), (255, 255, 255)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmlearn.data",
        description="Print a table of the data sets and draw a gallery of them.",
        epilog="example: python -m mmlearn.data --to pictures.png --columns 6 --seed 3",
    )
    parser.add_argument(
        "--to", type=Path, default=Path("gallery.png"), help="the PNG file (default: %(default)s)"
    )
    parser.add_argument("--columns", type=int, default=8, help="pictures a row, 1 to 20")
    parser.add_argument("--seed", type=int, default=0, help="draws the scenes and the captions")
    parser.add_argument(
        "--source",
        choices=("embedded", "hub"),
        default="embedded",
        help="hub: the larger, real twins, which need a network (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.columns <= 20:
        parser.error(f"--columns must be 1 to 20, got {options.columns}.")
    if options.to.suffix.lower() != ".png":
        parser.error(f"--to must name a .png file, got {str(options.to)!r}.")
    if not options.to.absolute().parent.is_dir():
        parser.error(f"--to needs a folder that exists, got {str(options.to.parent)!r}.")
    try:
        loaded = load_all(options.source, options.seed)
    except (ConnectionError, ImportError, ValueError) as error:
        parser.error(str(error))

    print(table(loaded))
    print(f"\nCaptionedImages: {getdoc(CaptionedImages)}")
    gallery(loaded, options.columns).save(options.to)
    print(f"\nA gallery is in {options.to}.")


def load_all(source: str, seed: int) -> list[CaptionedImages]:
    """Load every split of every set, and from the hub those that it has."""
    if source == "hub":
        return [
            each.load(split, source="hub", seed=seed, size=200)
            for each in SETS.values()
            for split in each.HUB.splits
        ]
    loaded = [each.load(split, seed=seed) for each in SETS.values() for split in each.SPLITS]
    return [*loaded, scenes.load("test", seed=seed, objects=2)]


def table(loaded: list[CaptionedImages]) -> str:
    """Lay out what is in each set, one line each, then where it comes from."""
    twins = {each.NAME: each.HUB.path for each in SETS.values()}
    lines = [("set", "pictures", "of", "classes", "captions", "memory", "on the hub")]
    lines += [
        (
            each.name,
            f"{len(each):,}",
            "×".join(str(side) for side in each.images.shape[1:]),
            str(len(each.class_names)),
            f"{len(set(each.captions)):,}",
            f"{each.nbytes / 1e6:.1f} MB",
            twins.get(each.name.split("/")[0], "this"),
        )
        for each in loaded
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = (0, 2, 6)
    rows = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    origins = {
        f"{each.source}. Licence: {each.licence}": each.name.split("/")[0] for each in loaded
    }
    return "\n".join([*rows, "", *(f"{name}: {origin}" for origin, name in origins.items())])


def gallery(loaded: list[CaptionedImages], columns: int) -> Image.Image:
    """Draw the first pictures of each set in a row, each with its caption below."""
    heading, small = ImageFont.load_default(size=18), ImageFont.load_default(size=13)
    # Nineteen letters of this size are as wide as a picture.
    captions = [
        [wrap(words, 19, max_lines=5, placeholder=" …") for words in each.captions[:columns]]
        for each in loaded
    ]
    heights = [30 + TILE + 6 + max(map(len, row)) * LINE + GAP for row in captions]
    page = Image.new("RGB", (columns * (TILE + GAP) + GAP, sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    top = GAP
    for each, row, height in zip(loaded, captions, heights):
        draw.text((GAP, top), each.name, fill=INK, font=heading)
        told = f"{len(each):,} pictures, {len(each.class_names)} classes. {each.licence}"
        after = GAP + draw.textlength(each.name, font=heading) + 14
        draw.text((after, top + 4), told, fill=FAINT, font=small)
        for column, lines in enumerate(row):
            left = GAP + column * (TILE + GAP)
            page.paste(_tile(each, column), (left, top + 30))
            for number, line in enumerate(lines):
                below = top + 30 + TILE + 6 + number * LINE
                draw.text((left, below), line, fill=INK, font=small)
        top += height
    return page


def _tile(dataset: CaptionedImages, i: int) -> Image.Image:
    """Enlarge one picture by whole pixels, so that each of them shows."""
    pixels = (dataset[i].image * 255).round().to("cpu").numpy().astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return picture.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
