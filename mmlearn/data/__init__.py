"""Small sets that need no network, and beside each a larger, real one from the hub.

    set      what it is                                    splits               on the hub
    digits   real handwriting, 8 by 8, ten digits          train, test          ylecun/mnist
    scenes   drawn shapes, 32 by 32, colour and relation   train, test, unseen  jxie/flickr8k

Each module has one loader, `load(split="train", *, source="embedded", seed=0, size=None, ...)`,
which returns a `CaptionedImages`; with source="hub" the twin comes with the same fields.
`batches` turns a set into what `train.fit` walks through. `python -m mmlearn.data` shows it all.
"""

from mmlearn.data import digits, scenes
from mmlearn.data.records import CaptionedImages, Example, batches

SETS = {digits.NAME: digits, scenes.NAME: scenes}

__all__ = ["SETS", "CaptionedImages", "Example", "batches", "digits", "scenes"]
