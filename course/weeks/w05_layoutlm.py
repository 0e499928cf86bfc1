# %% [markdown]
# # Week 5. What does a form's layout say that its words don't?
#
# Two lines of a bill read *12.50*. One is the price of a lamp, the other is what you owe. As words
# they are the same; on the page everybody sees the difference. LayoutLM reads a page as BERT reads
# a sentence, and tells every word where it stands.
#
# **You will build** boxes in thousandths, the embedding that turns a box into a vector, the loss
# that hides a word but not its place, the loss for a page's tags, the patch of picture behind a
# word, and the score by which such models are judged. **You will measure** what places are worth
# when words come in reading order and when they do not, whether a model that knows twelve
# layouts can read a thirteenth, and what unlabelled pages teach when only ten have labels.
#
# Two hours; about a minute of computing on a laptop's processor.

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"
SCALE = "cpu"
DATA = "embedded"

# %%
import math
from dataclasses import replace
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from mmlearn.data import documents
from mmlearn.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, set_style, show
from mmlearn.layoutlm import RelativeLayoutBias
from mmlearn.metrics import mean_and_spread
from mmlearn.pages import PageBatch, encode_pages
from mmlearn.train import choose_device, fit, move, set_seed
from mmlearn.transformer import Encoder
from mmlearn.wordpiece import WordPieceTokenizer

torch.set_num_threads(1)  # models this small are faster on one thread than on two
set_style()
device = choose_device(DEVICE)
SEEDS = (SEED, SEED + 1)

# %% [markdown]
# ## 1. Pages
#
# Receipts, invoices, forms and letters, written by the course: 1,200 to learn from, 100 with other
# facts in the same twelve layouts, and 100 in four layouts that training never shows. Every word
# has a box and a tag. Sellers and buyers share one list of names, a day may be the day of the bill,
# the day it is due or neither, an amount may be a price or the total: the word does not tell.

# %% tags=["experiment"]
train_pages = documents.load("train", size=1200, tagging="bio", seed=SEED)
test_pages = documents.load("test", size=100, tagging="bio", seed=SEED)
unseen_pages = documents.load("unseen", size=100, tagging="bio", seed=SEED)
for split in (train_pages, test_pages, unseen_pages):
    print(split.describe())
print("layouts learned:", *sorted(set(train_pages.attributes["layout"])))
print("layouts unseen: ", *sorted(set(unseen_pages.attributes["layout"])))

# %% tags=["experiment"]
drawn = documents.load("train", size=24, images=True, pixels=448, tagging="bio", seed=SEED)
COLOURS = {"SELLER": BLUE, "BUYER": PURPLE, "DATE": GREEN, "DUE_DATE": ORANGE, "TOTAL": RED}


def draw_page(axis, page, tag_names, title=""):
    """Show a page with the boxes of five kinds of entities."""
    axis.imshow(page.image[0], cmap="gray", vmin=0, vmax=1, extent=(0, 1000, 1000, 0))
    for (x0, y0, x1, y1), tag in zip(page.boxes.tolist(), page.tags.tolist()):
        if colour := COLOURS.get(tag_names[tag][2:]):
            box = plt.Rectangle((x0, y0), x1 - x0, y1 - y0, ec=colour, fc=colour, alpha=0.35)
            axis.add_patch(box)
    axis.set(xticks=[0, 500, 1000], yticks=[0, 500, 1000], title=title)


# %% tags=["experiment"]
figure, axes = plt.subplots(1, 4, figsize=(12, 3.5), layout="constrained", sharey=True)
for kind, axis in enumerate(axes):
    page = next(drawn[i] for i in range(24) if drawn.labels[i] == kind)
    draw_page(axis, page, drawn.tag_names, documents.CLASS_NAMES[kind])
    axis.set_xlabel("thousandths of the page")
handles = [plt.Rectangle((0, 0), 1, 1, fc=c, alpha=0.5) for c in COLOURS.values()]
figure.legend(handles, [name.lower() for name in COLOURS], ncols=5, loc="outside lower center")
figure.suptitle("The same kinds of facts stand in other places on other pages")
show(
    figure,
    "pages",
    """A receipt, an invoice, a form and a letter. Seller, buyer, date, due date and total are
    marked in colour, at other places on each page.""",
)

# %% [markdown]
# *What to see.* Cover the picture with your hand and think only of the list of words: which of two
# dates is due? Only its keyword tells. In reading order the keyword is the word before. In any
# other order, only the eye finds it.

# %% [markdown]
# ## 2. Where is a word? Boxes in thousandths
#
# A scanner gives pixels, a PDF points, and every page has another size. LayoutLM divides each side
# by the page's, in 1,000 whole steps (Xu 2020, section 3; rounding down is the released code's):
#
# $$ x \mapsto \Big\lfloor \frac{1000\,x}{\mathrm{width}} \Big\rfloor, \qquad
#    y \mapsto \Big\lfloor \frac{1000\,y}{\mathrm{height}} \Big\rfloor . $$
#
# A step is then a row of a table, 0 to 1000. What does not fit must be refused here: a box that
# leaves the page asks for a row that does not exist, and an inverted one for a row below zero.

# %% [markdown] exercise="normalise" difficulty=1 minutes=8 forbids=["mmlearn.pages.normalize_box"]
# ### Exercise 1. A box in thousandths
#
# Write `normalise_box(box, width, height, steps=1000)`.
#
# | argument | meaning |
# |---|---|
# | `box` | left, top, right, bottom, in the unit of the page; y grows downwards |
# | `width`, `height` | the page, in the same unit, pixels or points |
# | returns | four whole numbers from 0 to `steps`, rounded down |
#
# Raise a `ValueError` for a box whose right is left of its left, whose bottom is above its top, or
# that leaves the page. A box without area, as a thin rule has, is fine.
#
# *Afterwards you can say:* why one model reads A4 and a till receipt, and what the first two bugs
# in every LayoutLM project are (x divided by the height; pixels passed as they are).
#
# <details><summary>Hint 1: two sides</summary>
#
# Left and right are shares of the width, top and bottom shares of the height.
#
# </details>
# <details><summary>Hint 2: one chain of comparisons</summary>
#
# In Python `0 <= x0 <= x1 <= width` is one expression. It is also false for NaN.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     if the corners are not in order, or not on the page: raise ValueError
#     return int(steps * x0 / width), the same for y0 with height, for x1, for y1
#
# </details>


# %% answer="normalise"
def normalise_box(box, width, height, steps=1000):
    """Express left, top, right, bottom in whole steps of the page, 0 to `steps`."""
    ### BEGIN SOLUTION
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError(f"box {box} is no box on a page of {width} by {height}")
    x0, x1 = int(steps * x0 / width), int(steps * x1 / width)
    y0, y1 = int(steps * y0 / height), int(steps * y1 / height)
    return x0, y0, x1, y1
    ### END SOLUTION


# %% check="normalise" aspect="example" points=2 title="a small page, worked by hand"
from mmlearn.feedback import expect

expect(
    "w05_layoutlm/normalise/hand",
    list(normalise_box((19, 20, 25, 60), 38, 80)),
    [500, 250, 657, 750],
    "19 of 38 is one half, 500; 25 of 38 is 657.9 thousandths, 657 rounded down; 20 of 80 is 250 "
    "and 60 of 80 is 750. Return left, top, right, bottom.",
)
expect(
    "w05_layoutlm/normalise/steps",
    list(normalise_box((0, 30, 70, 100), 70, 100, steps=50)),
    [0, 15, 50, 50],
    "With 50 steps, 30 of 100 is step 15, and the far edges of the page are step 50.",
)
### BEGIN HIDDEN TESTS
from random import Random

dice = Random(11)
for _ in range(200):
    wide, high, steps = dice.randint(1, 900), dice.randint(1, 900), dice.choice((1000, 50, 7))
    left, right = sorted(dice.randint(0, wide) for _ in range(2))
    top, bottom = sorted(dice.randint(0, high) for _ in range(2))
    wanted = [steps * left // wide, steps * top // high, steps * right // wide]
    wanted += [steps * bottom // high]
    found = list(normalise_box((left, top, right, bottom), wide, high, steps))
    assert found == wanted, (left, top, right, bottom, wide, high, steps)
    assert all(isinstance(edge, int) for edge in found), "whole numbers"
### END HIDDEN TESTS

# %% check="normalise" aspect="refusal" points=1 title="what is no box on the page is refused"
from mmlearn.feedback import expect


def outcome(box, width, height):
    """What is returned, or that it was refused."""
    try:
        return list(normalise_box(box, width, height))
    except ValueError:
        return "ValueError"


expect(
    "w05_layoutlm/normalise/inverted",
    lambda: outcome((30, 10, 20, 40), 100, 100),
    "ValueError",
    "Right, 20, is left of left, 30: there is no such box. Raise a ValueError.",
)
### BEGIN HIDDEN TESTS
for wrong in (
    (3, 8, 4, 7),
    (-1, 0, 4, 4),
    (0, -2, 4, 4),
    (0, 0, 11, 4),
    (0, 0, 4, 21),
    (0, 0, float("nan"), 4),
):
    try:
        normalise_box(wrong, 10, 20)
    except ValueError:
        pass
    else:
        raise AssertionError(f"{wrong} is no box on a page of 10 by 20 and must be refused")
assert list(normalise_box((19, 19, 38, 38), 38, 38)) == [500, 500, 1000, 1000], "not 499, 999"
assert list(normalise_box((61, 87, 61, 87), 61, 87)) == [1000, 1000, 1000, 1000], "not 999"
assert list(normalise_box((4, 5, 4, 5), 10, 20)) == [400, 250, 400, 250], "no area is fine"
assert list(normalise_box((0, 0, 10, 20), 10, 20)) == [0, 0, 1000, 1000], "the whole page is fine"
### END HIDDEN TESTS


# %% wrong="normalise" name="one_side" says="You divided y by the width as well. Tops and bottoms are shares of the height: on a long receipt they would leave the table."
def normalise_box(box, width, height, steps=1000):
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError("no box")
    return tuple(int(steps * edge / width) for edge in (x0, y0, x1, y1))


# %% wrong="normalise" name="rounds" says="You rounded to the nearest step. The released code rounds down, and a checkpoint expects the same rows."
def normalise_box(box, width, height, steps=1000):
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError("no box")
    x0, x1 = round(steps * x0 / width), round(steps * x1 / width)
    return x0, round(steps * y0 / height), x1, round(steps * y1 / height)


# %% wrong="normalise" name="divides_first" says="You divided the steps by the page first: 1000 / 38 is not exact, and 19 times it is just below 500. Multiply first, then divide."
def normalise_box(box, width, height, steps=1000):
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError("no box")
    across, down = steps / width, steps / height
    return int(across * x0), int(down * y0), int(across * x1), int(down * y1)


# %% wrong="normalise" name="size_not_corner" says="You returned left, top, width and height. LayoutLM wants both corners: left, top, right, bottom."
def normalise_box(box, width, height, steps=1000):
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError("no box")
    x0, x1 = int(steps * x0 / width), int(steps * x1 / width)
    y0, y1 = int(steps * y0 / height), int(steps * y1 / height)
    return x0, y0, x1 - x0, y1 - y0


# %% wrong="normalise" name="y_upwards" says="You turned the page upside down: in PDF files y grows upwards, here it grows downwards, as in pictures."
def normalise_box(box, width, height, steps=1000):
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError("no box")
    x0, x1 = int(steps * x0 / width), int(steps * x1 / width)
    return x0, int(steps * (height - y1) / height), x1, int(steps * (height - y0) / height)


# %% wrong="normalise" name="silent" says="You refuse nothing. A box that leaves the page, or is inverted, becomes a row that the table does not have: raise a ValueError here, where the box still has a name."
def normalise_box(box, width, height, steps=1000):
    x0, y0, x1, y1 = box
    x0, x1 = int(steps * x0 / width), int(steps * x1 / width)
    return x0, int(steps * y0 / height), x1, int(steps * y1 / height)


# %% wrong="normalise" name="mends" says="You sorted or clipped the wrong box into a right one. It hides that the pixels were those of another page: refuse it with a ValueError."
def normalise_box(box, width, height, steps=1000):
    xs = sorted(min(max(x, 0), width) for x in (box[0], box[2]))
    ys = sorted(min(max(y, 0), height) for y in (box[1], box[3]))
    x0, x1 = (int(steps * x / width) for x in xs)
    y0, y1 = (int(steps * y / height) for y in ys)
    return x0, y0, x1, y1


# %% [markdown]
# A thousand steps are 1,001 rows in each table (1,024 in the released code), to be learned from
# pages. LayoutLM had 11 million of them. We have 1,200, so our boxes get **50 steps**, each a
# fiftieth of the page: a word is about two steps high.

# %%
STEPS = 50

# %% [markdown]
# ## 3. From a box to a vector
#
# BERT's input is a sum: what the token is, plus where it stands in the text. LayoutLM adds where it
# stands on the page, edge by edge. Each edge picks a row of a table:
#
# $$ z = W_{\text{word}} + P_{\text{order}} + \underbrace{X[x_0] + X[x_1] + Y[y_0] + Y[y_1]
#    + H[y_1 - y_0] + W[x_1 - x_0]}_{\text{the place}} $$
#
# There are four tables for six terms: left and right share $X$, top and bottom share $Y$. Heights
# and widths are in the released code, not in the paper.

# %% [markdown] exercise="place" difficulty=2 minutes=12 forbids=["mmlearn.layoutlm.LayoutEmbedding"]
# ### Exercise 2. The place of a word
#
# Complete `PlaceEmbedding`. Make four `nn.Embedding` tables called `x`, `y`, `h` and `w`, each with
# one row for every number from 0 to `steps`, and return the sum of six rows.
#
# | argument | shape |
# |---|---|
# | `bbox_BL4` | `[B, L, 4]`, whole numbers: left, top, right, bottom |
# | returns | `[B, L, D]` |
#
# *Afterwards you can say:* "2-D positions are a sum of six learned rows out of four tables. Both
# corners share a table, so two edges at the same place look the same."
#
# <details><summary>Hint 1: how many rows</summary>
#
# From 0 to 50 are 51 numbers.
#
# </details>
# <details><summary>Hint 2: the four edges</summary>
#
# `x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)` gives four tensors of shape `[B, L]`; a table takes
# such a tensor of row numbers as it is.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     four tables of steps + 1 rows
#     rows of x at the left edge and at the right edge
#     plus rows of y at the top and at the bottom
#     plus the row of h at the height, plus the row of w at the width
#
# </details>


# %% answer="place"
class PlaceEmbedding(nn.Module):
    """Turn each box into a vector: a sum of six rows out of four tables."""

    def __init__(self, steps, d_model):
        super().__init__()
        ### BEGIN SOLUTION
        self.x, self.y = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        self.h, self.w = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        ### END SOLUTION

    def forward(self, bbox_BL4):
        """Return the place of each box, [B, L, D]."""
        ### BEGIN SOLUTION
        x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
        corners = self.x(x0) + self.y(y0) + self.x(x1) + self.y(y1)
        return corners + self.h(y1 - y0) + self.w(x1 - x0)
        ### END SOLUTION


# %% check="place" aspect="example" points=2 title="tables that count in powers of ten"
import torch
from mmlearn.feedback import expect


def known_places(steps, width):
    """Fill the tables: row n of x says n, of y 10 n, of h 100 n, of w 1000 n."""
    place = PlaceEmbedding(steps, width)
    rows = torch.arange(steps + 1.0)[:, None].expand(-1, width)
    scale = {"x": 1.0, "y": 10.0, "h": 100.0, "w": 1000.0}
    place.load_state_dict({f"{name}.weight": by * rows for name, by in scale.items()})
    return place


torch.manual_seed(0)
expect(
    "w05_layoutlm/place/tables",
    sorted(
        f"{name} {list(table.shape)}" for name, table in PlaceEmbedding(50, 6).named_parameters()
    ),
    ["h.weight [51, 6]", "w.weight [51, 6]", "x.weight [51, 6]", "y.weight [51, 6]"],
    "Four tables x, y, h and w, each with rows 0 to 50, which are 51.",
)
expect(
    "w05_layoutlm/place/hand",
    lambda: known_places(9, 2)(torch.tensor([[[1, 2, 5, 4], [0, 0, 9, 9]]])),
    torch.tensor([[[4266.0, 4266.0], [9999.0, 9999.0]]]),
    "Here row n of x says n, of y 10 n, of h 100 n and of w 1000 n. The first box has edges 1, 2, "
    "5, 4: 1 + 5 from x, 20 + 40 from y, 200 for its height 2, 4000 for its width 4.",
)
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(21)
corners = torch.randint(0, 12, (3, 5, 2, 2), generator=draw).sort(dim=2).values
boxes = corners.flatten(2)
x0, y0, x1, y1 = boxes.float().unbind(dim=-1)
wanted = x0 + x1 + 10 * (y0 + y1) + 100 * (y1 - y0) + 1000 * (x1 - x0)
place = PlaceEmbedding(11, 4)
rows = torch.arange(12.0)[:, None].expand(-1, 4)
scale = {"x": 1.0, "y": 10.0, "h": 100.0, "w": 1000.0}
place.load_state_dict({f"{name}.weight": by * rows for name, by in scale.items()})
found = place(boxes)
assert found.shape == (3, 5, 4)
assert torch.allclose(found, wanted[..., None].expand(-1, -1, 4)), "six rows, summed"
### END HIDDEN TESTS

# %% check="place" aspect="tables" points=1 title="four tables of their own, random at the start"
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(22)
tables = list(PlaceEmbedding(30, 8).parameters())
assert len(tables) == 4 and all(table.shape == (31, 8) for table in tables)
assert all(table.std() > 1e-3 for table in tables), "tables of zeros cannot tell places apart"
### END HIDDEN TESTS

# %% check="place" aspect="gradient" points=1 title="each box teaches its own rows, and only those"
import torch
from mmlearn.feedback import expect

taught = PlaceEmbedding(6, 1)
taught(torch.tensor([[[1, 2, 5, 4]]])).sum().backward()
expect(
    "w05_layoutlm/place/rows",
    dict(taught.named_parameters())["x.weight"].grad.flatten(),
    torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
    "A word from 1 to 5 uses rows 1 and 5 of the table x, each once, so only those learn from it.",
)
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(23)
boxes = torch.randint(0, 8, (2, 6, 2, 2), generator=draw).sort(dim=2).values.flatten(2)
x0, y0, x1, y1 = boxes.unbind(dim=-1)
edges = {"x": (x0, x1), "y": (y0, y1), "h": (y1 - y0,), "w": (x1 - x0,)}
counts = {
    name: torch.bincount(torch.cat([e.flatten() for e in rows]), minlength=8).float()
    for name, rows in edges.items()
}
place = PlaceEmbedding(7, 3)
place(boxes).sum().backward()
for name, parameter in place.named_parameters():
    wanted = counts[name.split(".")[0]][:, None].expand(-1, 3)
    assert torch.allclose(parameter.grad, wanted), f"{name} learns from the wrong boxes"
### END HIDDEN TESTS


# %% wrong="place" name="too_few_rows" says="Your tables end at row steps - 1. The right edge of the page is step number `steps`, so there are steps + 1 rows."
class PlaceEmbedding(nn.Module):
    def __init__(self, steps, d_model):
        super().__init__()
        self.x, self.y = nn.Embedding(steps, d_model), nn.Embedding(steps, d_model)
        self.h, self.w = nn.Embedding(steps, d_model), nn.Embedding(steps, d_model)

    def forward(self, bbox_BL4):
        x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
        corners = self.x(x0) + self.y(y0) + self.x(x1) + self.y(y1)
        return corners + self.h(y1 - y0) + self.w(x1 - x0)


# %% wrong="place" name="table_per_edge" says="You gave every edge a table of its own. Left and right share x, top and bottom share y: the same place must look the same from both sides."
class PlaceEmbedding(nn.Module):
    def __init__(self, steps, d_model):
        super().__init__()
        self.x, self.y = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        self.x1, self.y1 = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        self.h, self.w = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)

    def forward(self, bbox_BL4):
        x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
        corners = self.x(x0) + self.y(y0) + self.x1(x1) + self.y1(y1)
        return corners + self.h(y1 - y0) + self.w(x1 - x0)


# %% wrong="place" name="one_corner" says="You used the upper left corner only. The lower right one counts, too: six rows in all."
class PlaceEmbedding(nn.Module):
    def __init__(self, steps, d_model):
        super().__init__()
        self.x, self.y = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        self.h, self.w = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)

    def forward(self, bbox_BL4):
        x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
        return self.x(x0) + self.y(y0) + self.h(y1 - y0) + self.w(x1 - x0)


# %% wrong="place" name="no_size" says="Height and width are missing. The sum of corners does not hold them in a form that can be read off: see the proof below."
class PlaceEmbedding(nn.Module):
    def __init__(self, steps, d_model):
        super().__init__()
        self.x, self.y = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        self.h, self.w = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)

    def forward(self, bbox_BL4):
        x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
        return self.x(x0) + self.y(y0) + self.x(x1) + self.y(y1)


# %% wrong="place" name="sizes_swapped" says="Height and width have changed places: h takes bottom minus top, w takes right minus left."
class PlaceEmbedding(nn.Module):
    def __init__(self, steps, d_model):
        super().__init__()
        self.x, self.y = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        self.h, self.w = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)

    def forward(self, bbox_BL4):
        x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
        corners = self.x(x0) + self.y(y0) + self.x(x1) + self.y(y1)
        return corners + self.h(x1 - x0) + self.w(y1 - y0)


# %% wrong="place" name="edges_as_pairs" says="You read a box as left, right, top, bottom. It is two corners: left, top, right, bottom."
class PlaceEmbedding(nn.Module):
    def __init__(self, steps, d_model):
        super().__init__()
        self.x, self.y = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        self.h, self.w = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)

    def forward(self, bbox_BL4):
        x0, x1, y0, y1 = bbox_BL4.unbind(dim=-1)
        corners = self.x(x0) + self.y(y0) + self.x(x1) + self.y(y1)
        return corners + self.h((y1 - y0).abs()) + self.w((x1 - x0).abs())


# %% wrong="place" name="averages" says="You took the mean of the six rows. BERT and LayoutLM add: a mean is six times smaller than what a checkpoint expects."
class PlaceEmbedding(nn.Module):
    def __init__(self, steps, d_model):
        super().__init__()
        self.x, self.y = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)
        self.h, self.w = nn.Embedding(steps + 1, d_model), nn.Embedding(steps + 1, d_model)

    def forward(self, bbox_BL4):
        x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
        corners = self.x(x0) + self.y(y0) + self.x(x1) + self.y(y1)
        return (corners + self.h(y1 - y0) + self.w(x1 - x0)) / 6


# %% [markdown]
# ### Why do both corners share a table?
#
# **Predict.** Move a box that is 12 steps wide to the right, step by step, and compare its vector
# with the old one by a dot product, all tables still random. At which moves does the product jump
# up?
#
# Attention compares projected tokens: its scores are $z_i^\top M z_j$ with a learned matrix $M$.
# Take the simplest, the identity, and two boxes $i$ and $j$. Rows of a random table are nearly at
# right angles, so $X[a] \cdot X[b] \approx 0$ unless $a = b$. With one table, the product of two
# places contains all four pairs of edges,
#
# $$ X[x_0^i] \cdot X[x_0^j] + X[x_1^i] \cdot X[x_1^j] + X[x_1^i] \cdot X[x_0^j] + X[x_0^i] \cdot X[x_1^j], $$
#
# and each is large exactly where two edges meet: aligned left, aligned right, and, in the last two,
# *one word begins where the other ends*. With a table $L$ for left and $R$ for right edges,
# $R[x_1^i] \cdot L[x_0^j]$ is noise, and no simple $M$ helps: it has to carry each of 51 rows of
# $R$ to the row of $L$ that belongs to it. Nothing is lost by sharing: the sum does not say which
# edge is which, but $x_0 \le x_1$ does.

# %% tags=["experiment"]
moves = torch.arange(-20, 21)
box = torch.tensor([20, 20, 32, 22])
moved = box + moves[:, None] * torch.tensor([1, 0, 1, 0])
draw = set_seed(SEED)
alike = {"one table for both": [], "a table for each": []}
for _ in range(200):  # random tables, as before any training
    x, left, right = torch.randn(3, STEPS + 4, 64, generator=draw) / 8
    shared, each = x[moved[:, 0]] + x[moved[:, 2]], left[moved[:, 0]] + right[moved[:, 2]]
    alike["one table for both"].append(shared @ (x[20] + x[32]))
    alike["a table for each"].append(each @ (left[20] + right[32]))

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(7, 3.2))
for (name, products), colour, style in zip(alike.items(), (BLUE, ORANGE), ("-", "--")):
    products = torch.stack(products)
    mean, spread = products.mean(dim=0), products.std(dim=0)
    axis.plot(moves, mean, style, color=colour, label=name)
    axis.fill_between(moves, mean - spread, mean + spread, color=colour, alpha=0.12)
axis.set(xlabel="moved to the right by (steps of 1/50 page)", xticks=range(-20, 21, 4))
axis.set(ylabel="dot product of the two vectors", ylim=(-0.6, 2.7))
axis.set_title("With a shared table, vectors of boxes that touch are alike from the start")
axis.legend()
show(
    figure,
    "shared",
    """Dot product of a box with itself, moved. Both kinds of tables peak at 0, with about 2. Only the
    shared table has two more peaks of about 1, at -12 and 12, where one box begins as the other ends.""",
)

# %% [markdown]
# *What to see.* Besides the peak at 0 there is one at ±12, the width of the box: there the moved
# box begins where the old one ends. It comes with one table only, and nobody had to teach it. (What
# attention makes of it is still to be learned; section 5 measures whether it matters.)
#
# ### Are height and width redundant?
#
# The two corners know the width, $x_1 - x_0$. Does a sum of corner rows? Suppose that for all edges
# $f(x_0) + g(x_1) = W[x_1 - x_0]$. Add the equation at $(a, b)$ and at $(a+1, b+1)$, subtract those
# at $(a+1, b)$ and $(a, b+1)$: on the left everything cancels, and with $d = b - a$ there remains
#
# $$ 0 = 2\,W[d] - W[d-1] - W[d+1] . $$
#
# So $W$ is a straight line. The sum of corner rows can say *the wider, the more*, and nothing else
# about widths; "three steps wide, like a price" the layers behind would have to work out, pair of
# edges by pair of edges. A table of its own says it at once. Section 5 measures what that is worth.

# %% [markdown]
# ## 4. What counts as right: entities
#
# A company's name has three words, and a bot that pays *Keller &* has paid nobody. So forms are
# judged by whole **entities**. Tags say where one begins: `B-SELLER I-SELLER I-SELLER O B-TOTAL`. A
# found entity counts only if kind, first and last word are right. With $f$ found, $w$ wanted and
# $r$ right,
#
# $$ P = \frac{r}{f}, \qquad R = \frac{r}{w}, \qquad F_1 = \frac{2PR}{P+R} = \frac{2r}{f+w}, $$
#
# where $r$, $f$ and $w$ are summed over *all* pages first, since pages differ in how much they
# hold.

# %% [markdown] exercise="entities" difficulty=3 minutes=18
# ### Exercise 3. Entities, and their F1
#
# Write `read_entities(tags)` and `entity_f1(predicted, wanted)`.
#
# | | |
# |---|---|
# | `tags` | one page: a list of `"O"`, `"B-KIND"` and `"I-KIND"`, in reading order |
# | `read_entities` returns | a list of `(kind, first, last)`, both ends included, in order |
# | `predicted`, `wanted` | lists of pages, each a list of tags |
# | `entity_f1` returns | a number from 0 to 1; 0 where there is nothing to find and nothing found |
#
# A model may write `I-TOTAL` after `O`, or after an entity of another kind. Count that as a
# beginning, as the script of the CoNLL competitions does. (FUNSD's own scripts have two more
# letters, for the last word of an entity and for a single one.)
#
# *Afterwards you can say:* "Entity F1 is 2r / (f + w) over whole spans. Token accuracy flatters:
# most words are O, and half a name counts as half right."
#
# <details><summary>Hint 1: when does an entity end?</summary>
#
# When the next tag is not `I-` with the same kind. When does one begin? At every `B-`, and at an
# `I-` that continues nothing.
#
# </details>
# <details><summary>Hint 2: counting what is right</summary>
#
# Entities of one page never repeat, so the intersection of two sets counts them. Put the number of
# the page into the tuple, and all pages fit into one set.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     for each word: split its tag at the first "-" into letter and kind
#         O: nothing is open
#         I and the last entity is of this kind and ended at the word before: move its end
#         else: a new entity begins and ends here
#     right = entities that are in both; return 2 * right / (found + wanted), or 0
#
# </details>


# %% answer="entities"
def read_entities(tags):
    """Return the entities of one page, (kind, first, last), from its B-, I- and O tags."""
    ### BEGIN SOLUTION
    entities = []
    for i, tag in enumerate(tags):
        if tag == "O":
            continue
        letter, kind = tag.split("-", 1)
        if letter == "I" and entities and entities[-1][0] == kind and entities[-1][2] == i - 1:
            entities[-1] = (kind, entities[-1][1], i)
        else:
            entities.append((kind, i, i))
    return entities
    ### END SOLUTION


def entity_f1(predicted, wanted):
    """Return 2 * right / (found + wanted) over the entities of all pages."""
    ### BEGIN SOLUTION
    found = {(page, *e) for page, tags in enumerate(predicted) for e in read_entities(tags)}
    sought = {(page, *e) for page, tags in enumerate(wanted) for e in read_entities(tags)}
    both = len(found) + len(sought)
    return 2 * len(found & sought) / both if both else 0.0
    ### END SOLUTION


# %% check="entities" aspect="spans" points=1 title="two names side by side, and an I after O"
from mmlearn.feedback import expect

expect(
    "w05_layoutlm/entities/spans",
    [
        list(entity)
        for entity in read_entities(["B-SELLER", "I-SELLER", "B-SELLER", "O", "I-TOTAL", "I-DATE"])
    ],
    [["SELLER", 0, 1], ["SELLER", 2, 2], ["TOTAL", 4, 4], ["DATE", 5, 5]],
    "Words 0 and 1 are a seller, word 2 begins another, and the stray I- tags begin entities, too: "
    "(kind, first, last) with both ends included.",
)
### BEGIN HIDDEN TESTS
assert list(read_entities([])) == [] and list(read_entities(["O", "O"])) == []
assert [tuple(e) for e in read_entities(["I-A", "I-A", "I-B", "B-B"])] == [
    ("A", 0, 1),
    ("B", 2, 2),
    ("B", 3, 3),
]
assert [tuple(e) for e in read_entities(["B-A", "O", "I-A", "I-A"])] == [("A", 0, 0), ("A", 2, 3)]
assert [tuple(e) for e in read_entities(["O", "B-DUE-DATE", "I-DUE-DATE"])] == [("DUE-DATE", 1, 2)]
### END HIDDEN TESTS

# %% check="entities" aspect="example" points=1 title="two pages, worked by hand"
from mmlearn.feedback import expect

expect(
    "w05_layoutlm/entities/f1",
    entity_f1(
        [["B-SELLER", "I-SELLER", "O", "B-TOTAL"], ["B-TOTAL", "O", "O", "B-TOTAL"]],
        [["B-SELLER", "I-SELLER", "I-SELLER", "B-TOTAL"], ["B-TOTAL", "O", "O", "O"]],
    ),
    4 / 7,
    "Found are 4 entities, wanted 3. Right are two of the totals; the seller ends one word too "
    "early, and page two has one total, not two. So F1 is 2 * 2 / (4 + 3).",
)
### BEGIN HIDDEN TESTS
page = ["B-A", "I-A", "O", "B-B"]
assert abs(entity_f1([page, page], [page, page]) - 1) < 1e-9, "everything right is 1"
assert entity_f1([["O"]], [["B-A"]]) == 0 and entity_f1([["B-A"]], [["O"]]) == 0
assert entity_f1([["O", "O"], []], [["O", "O"], []]) == 0, "nothing sought, nothing found: 0"
assert entity_f1([["B-A"], ["O"]], [["O"], ["B-A"]]) == 0, "the right word on another page is wrong"
### END HIDDEN TESTS

# %% check="entities" aspect="law" points=2 title="swapping the sides, and pages of unequal size"
### BEGIN HIDDEN TESTS
from random import Random

dice = Random(31)
names = ["O", "B-A", "I-A", "B-B", "I-B"]
sizes = [dice.randint(1, 30) for _ in range(12)]
guess, truth = ([[dice.choice(names) for _ in range(n)] for n in sizes] for _ in range(2))


def spans(tags):
    starts = [
        i
        for i, tag in enumerate(tags)
        if tag != "O"
        and (tag[0] == "B" or i == 0 or tags[i - 1] == "O" or tags[i - 1][2:] != tag[2:])
    ]
    ends = []
    for i in starts:
        end = i
        while end + 1 < len(tags) and tags[end + 1] == f"I-{tags[i][2:]}":
            end += 1
        ends.append((tags[i][2:], i, end))
    return ends


found = [[tuple(e) for e in read_entities(list(tags))] for tags in guess]
assert found == [spans(tags) for tags in guess], "random tags"
right = sum(len(set(spans(a)) & set(spans(b))) for a, b in zip(guess, truth))
total = sum(len(spans(tags)) for tags in guess + truth)
one_way = entity_f1(guess, truth)
assert abs(one_way - 2 * right / total) < 1e-9, "sums over all pages first"
assert abs(entity_f1(truth, guess) - one_way) < 1e-9, "precision and recall change places"
### END HIDDEN TESTS


# %% wrong="entities" name="token_accuracy" says="You counted single words. Half a name is no name: compare whole entities, kind, first and last word."
def read_entities(tags):
    entities = []
    for i, tag in enumerate(tags):
        if tag == "O":
            continue
        letter, kind = tag.split("-", 1)
        if letter == "I" and entities and entities[-1][0] == kind and entities[-1][2] == i - 1:
            entities[-1] = (kind, entities[-1][1], i)
        else:
            entities.append((kind, i, i))
    return entities


def entity_f1(predicted, wanted):
    pairs = [pair for a, b in zip(predicted, wanted) for pair in zip(a, b)]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


# %% wrong="entities" name="mean_of_pages" says="You averaged the pages' scores, so a page with one entity weighs as much as one with thirty. Count over all pages, then divide once."
def read_entities(tags):
    entities = []
    for i, tag in enumerate(tags):
        if tag == "O":
            continue
        letter, kind = tag.split("-", 1)
        if letter == "I" and entities and entities[-1][0] == kind and entities[-1][2] == i - 1:
            entities[-1] = (kind, entities[-1][1], i)
        else:
            entities.append((kind, i, i))
    return entities


def entity_f1(predicted, wanted):
    scores = []
    for a, b in zip(predicted, wanted):
        found, sought = set(read_entities(a)), set(read_entities(b))
        both = len(found) + len(sought)
        scores.append(2 * len(found & sought) / both if both else 0.0)
    return sum(scores) / max(len(scores), 1)


# %% wrong="entities" name="ignores_begin" says="A B- right after an entity of the same kind begins a new one. You merged two neighbours into one."
def read_entities(tags):
    entities = []
    for i, tag in enumerate(tags):
        if tag == "O":
            continue
        kind = tag.split("-", 1)[1]
        if entities and entities[-1][0] == kind and entities[-1][2] == i - 1:
            entities[-1] = (kind, entities[-1][1], i)
        else:
            entities.append((kind, i, i))
    return entities


def entity_f1(predicted, wanted):
    found = {(page, *e) for page, tags in enumerate(predicted) for e in read_entities(tags)}
    sought = {(page, *e) for page, tags in enumerate(wanted) for e in read_entities(tags)}
    both = len(found) + len(sought)
    return 2 * len(found & sought) / both if both else 0.0


# %% wrong="entities" name="drops_strays" says="You dropped entities that begin with I-. Models write them, and the usual scripts count them as a beginning."
def read_entities(tags):
    entities = []
    for i, tag in enumerate(tags):
        if tag.startswith("B-"):
            entities.append((tag[2:], i, i))
        elif tag != "O" and entities and entities[-1][0] == tag[2:] and entities[-1][2] == i - 1:
            entities[-1] = (tag[2:], entities[-1][1], i)
    return entities


def entity_f1(predicted, wanted):
    found = {(page, *e) for page, tags in enumerate(predicted) for e in read_entities(tags)}
    sought = {(page, *e) for page, tags in enumerate(wanted) for e in read_entities(tags)}
    both = len(found) + len(sought)
    return 2 * len(found & sought) / both if both else 0.0


# %% wrong="entities" name="end_excluded" says="Your ends are one too large: the last word is part of the entity, so (kind, first, last) has both ends included."
def read_entities(tags):
    entities = []
    for i, tag in enumerate(tags):
        if tag == "O":
            continue
        letter, kind = tag.split("-", 1)
        if letter == "I" and entities and entities[-1][0] == kind and entities[-1][2] == i:
            entities[-1] = (kind, entities[-1][1], i + 1)
        else:
            entities.append((kind, i, i + 1))
    return entities


def entity_f1(predicted, wanted):
    found = {(page, *e) for page, tags in enumerate(predicted) for e in read_entities(tags)}
    sought = {(page, *e) for page, tags in enumerate(wanted) for e in read_entities(tags)}
    both = len(found) + len(sought)
    return 2 * len(found & sought) / both if both else 0.0


# %% wrong="entities" name="precision_only" says="You divided by what was found only. That is precision: who finds one easy entity scores 1. F1 divides by found plus wanted."
def read_entities(tags):
    entities = []
    for i, tag in enumerate(tags):
        if tag == "O":
            continue
        letter, kind = tag.split("-", 1)
        if letter == "I" and entities and entities[-1][0] == kind and entities[-1][2] == i - 1:
            entities[-1] = (kind, entities[-1][1], i)
        else:
            entities.append((kind, i, i))
    return entities


def entity_f1(predicted, wanted):
    found = {(page, *e) for page, tags in enumerate(predicted) for e in read_entities(tags)}
    sought = {(page, *e) for page, tags in enumerate(wanted) for e in read_entities(tags)}
    return len(found & sought) / len(found) if found else 0.0


# %% wrong="entities" name="pages_mixed" says="You put the entities of all pages into one set without the number of the page, so the right word on the wrong page counts."
def read_entities(tags):
    entities = []
    for i, tag in enumerate(tags):
        if tag == "O":
            continue
        letter, kind = tag.split("-", 1)
        if letter == "I" and entities and entities[-1][0] == kind and entities[-1][2] == i - 1:
            entities[-1] = (kind, entities[-1][1], i)
        else:
            entities.append((kind, i, i))
    return entities


def entity_f1(predicted, wanted):
    found = {e for tags in predicted for e in read_entities(tags)}
    sought = {e for tags in wanted for e in read_entities(tags)}
    both = len(found) + len(sought)
    return 2 * len(found & sought) / both if both else 0.0


# %% [markdown]
# ## 5. With and without places, in order and without
#
# The model is as small as it can be: words, their order, your places, *one* transformer block in
# the post-norm form of BERT, and a linear layer that names the tag of each word. It can be built
# without places, with your tables, or in a third way that section 6 explains.


# %%
class PageModel(nn.Module):
    """Words, their order, their places, one block, and a tag for every token."""

    def __init__(self, vocab_size, num_tags, places="tables", steps=STEPS, max_length=160):
        super().__init__()
        self.words, self.order = nn.Embedding(vocab_size, 64), nn.Embedding(max_length, 64)
        self.tables = PlaceEmbedding(steps, 64) if places in ("tables", "both") else None
        for part in self.modules():
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.1)
        self.distances = RelativeLayoutBias(4) if places in ("distances", "both") else None
        self.norm, self.tagger = nn.LayerNorm(64), nn.Linear(64, num_tags)
        self.encoder = Encoder(1, 64, 4, 128, norm="post")

    def embed(self, batch):
        """Return the tokens as vectors, and what attention is masked with."""
        x = self.words(batch.input_ids) + self.order.weight[: batch.input_ids.shape[1]]
        mask = batch.attention_mask[:, None, None, :]
        if self.tables is not None:
            x = x + self.tables(batch.bbox)
        if self.distances is not None:
            bias = self.distances(batch.bbox * (1000 // STEPS))
            mask = bias.masked_fill(~mask, -torch.inf)  # numbers are added to the scores
        return self.norm(x), mask

    def states(self, batch):
        return self.encoder(*self.embed(batch))

    def forward(self, batch):
        return self.tagger(self.states(batch))


# %% [markdown]
# Pages become tokens with `mmlearn.pages.encode_pages`: a word's tokens share its box, only the
# first carries the label, in the released code [CLS] stands at 0 0 0 0 and [SEP] at the far corner.
# The boxes go through your `normalise_box`. Shuffling moves whole words with boxes and tags; the
# order is kept, so that answers can be put back and read as entities.


# %%
class Encoded(NamedTuple):
    """Pages as tokens, and what is needed to read a model's answer back."""

    batch: PageBatch
    orders: list  # of each page: which of its words comes first, second and so on
    tags: list  # of each page: the tags in reading order
    tag_names: list


def encode(pages, tokenizer, shuffled=False, steps=STEPS, max_length=160):
    draw = torch.Generator().manual_seed(len(pages))
    orders = [torch.arange(len(words)) for words in pages.words]
    if shuffled:
        orders = [order[torch.randperm(len(order), generator=draw)] for order in orders]
    words = [[page[i] for i in order] for page, order in zip(pages.words, orders)]
    boxes = [
        [normalise_box(box, 1000, 1000, steps) for box in page[order].tolist()]
        for page, order in zip(pages.boxes, orders)
    ]
    tags = [page[order].tolist() for page, order in zip(pages.tags, orders)]
    batch = encode_pages(tokenizer, words, boxes, tags, max_length=max_length)
    names = [[pages.tag_names[tag] for tag in page.tolist()] for page in pages.tags]
    batch = batch._replace(bbox=batch.bbox.clamp(max=steps))  # [SEP] stands at 1000
    return Encoded(batch, orders, names, pages.tag_names)


# %%
def batches(encoded, size, seed, rows=None):
    """Yield some pages, cut to the longest of them, and their numbers, for ever."""
    draw = torch.Generator().manual_seed(seed)
    lengths = encoded.batch.attention_mask.sum(dim=1)
    rows = torch.arange(len(lengths)) if rows is None else rows
    while True:
        for part in rows[torch.randperm(len(rows), generator=draw)].split(size):
            longest = int(lengths[part].max())
            yield PageBatch(*(column[part, :longest] for column in encoded.batch)), part


# %%
def tagging_loss(model, step):
    batch, _ = step
    return F.cross_entropy(model(batch).mT, batch.labels, ignore_index=-100)


def train_tagger(encoded, places, seed, steps=250, rows=None, model=None, vocab_size=1000):
    """Train a model, a new one unless one is given, on the pages of these rows."""
    set_seed(seed)
    if model is None:
        model = PageModel(vocab_size, len(encoded.tag_names), places)
    slow, fast = [], []  # what is added to scores starts near 0 and has far to go
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fast if name.startswith("distances.") else slow).append(parameter)
    groups = [{"params": slow, "lr": 8e-3}] + ([{"params": fast, "lr": 4e-2}] if fast else [])
    stream = batches(encoded, 8, seed, rows)
    fit(model, stream, tagging_loss, steps=steps, groups=groups, device=device, progress=False)
    return model


# %%
@torch.no_grad()
def predict(model, encoded):
    """Return the tags of every page's words, in reading order."""
    best = model.eval()(move(encoded.batch, device)).argmax(dim=-1).cpu()
    answers = []
    for row, order in enumerate(encoded.orders):
        first = encoded.batch.labels[row] >= 0  # of a word's tokens, the one that is labelled
        tags = ["O"] * len(order)
        words = order[encoded.batch.word_index[row][first]]
        for word, tag in zip(words.tolist(), best[row][first].tolist()):
            tags[word] = encoded.tag_names[tag]
        answers.append(tags)
    return answers


def score(model, encoded):
    return entity_f1(predict(model, encoded), encoded.tags)


# %% tags=["experiment"]
tokenizer = WordPieceTokenizer.train([" ".join(words) for words in train_pages.words], 1000)
splits = {"train": train_pages, "known": test_pages, "new": unseen_pages}
encoded = {
    (split, order): encode(pages, tokenizer, shuffled=order == "shuffled")
    for split, pages in splits.items()
    for order in ("reading", "shuffled")
}
example = encoded["known", "reading"].batch
print(f"{tokenizer.vocab_size} tokens; the longest test page has {example.input_ids.shape[1]}")
for i in range(1, 6):
    token = tokenizer.tokens[example.input_ids[0, i]]
    print(f"{token:>10} stands at {example.bbox[0, i].tolist()}")

# %% [markdown]
# **Predict** four numbers, entity F1 on known layouts: words in reading order, without and with
# places; words in no order, without and with places. Then the same four on new layouts. All are
# trained alike, for 250 steps of eight pages.

# %% tags=["experiment"]
models, results = {}, {}
for order in ("reading", "shuffled"):
    for places in ("none", "tables"):
        for seed in SEEDS:
            model = train_tagger(encoded["train", order], places, seed)
            models[order, places, seed] = model
            for split in ("known", "new"):
                f1 = score(model, encoded[split, order])
                results.setdefault((order, places, split), []).append(f1)
        known, new = (mean_and_spread(results[order, places, s]) for s in ("known", "new"))
        print(f"{order:8} places: {places:6} known layouts {known}, new layouts {new}")

# %% tags=["experiment"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
bars = [(o, p) for o in ("reading", "shuffled") for p in ("none", "tables")]
for axis, split in zip(axes, ("known", "new")):
    for i, (order, places) in enumerate(bars):
        values, colour = results[order, places, split], BLUE if places == "tables" else GREY
        axis.bar(i + (i > 1) * 0.5, sum(values) / len(values), color=colour, alpha=0.45)
        axis.plot([i + (i > 1) * 0.5] * len(values), values, "o", color=colour, markersize=4)
    axis.set_xticks([0.5, 3], ["reading order", "no order"])
    axis.set(title=f"{split} layouts", ylim=(0, 1))
axes[0].set_ylabel("entity F1 (dots: seeds)")
handles = [plt.Rectangle((0, 0), 1, 1, fc=c, alpha=0.45) for c in (GREY, BLUE)]
figure.legend(handles, ["words only", "words and places"], loc="outside lower center", ncols=2)
figure.suptitle("Places replace a lost order, but only on layouts that were learned")
show(
    figure,
    "order",
    """Two groups of bars. On known layouts, words without order score about a third, with places
    about 0.9. On new layouts places help a little
    without order and harm a little in order.""",
)

# %% [markdown]
# *What to see.* Three things, and one is unwelcome.
#
# - **Without order, places are everything** (right pair, left panel). The keyword stands beside its
#   fact, and only the boxes know it.
# - **In order, they matter far less.** Reading order is a piece of layout, poured into a line: the
#   word before tells what its neighbour is. (Trained longer, the first bar still rises by some
#   points.) What places add on top is knowledge of twelve layouts by heart.
# - **On new layouts that knowledge misleads.** In reading order the model with places is the worse
#   one: who learned where the due date stands on twelve forms looks for it there on the next.
#   (Words in order lose on new layouts as well: their order is a table, too, and "word 17" is
#   another fact on another form.)
#
# So a benchmark whose words come neatly sorted, or whose test pages share their templates with
# training, can show a gain that your own pages will not. Ask for both before you believe a number.

# %% [markdown]
# ### Zeroed and shuffled boxes
#
# A model was trained with places. Now the scanner software loses them (all zero), or hands them out
# to the wrong words. **Predict**: what is worse, no places or wrong ones? And how does it compare
# with the model that never had any?


# %% tags=["experiment"]
def with_boxes(part, change):
    return part._replace(batch=part.batch._replace(bbox=change(part.batch)))


def zeroed(batch):
    return batch.bbox * 0


def swapped(batch):
    """Hand the boxes of each page to other words of the page."""
    draw, bbox = torch.Generator().manual_seed(SEED), batch.bbox.clone()
    for row, words in enumerate(batch.word_index):
        count = int(words.max()) + 1
        first = torch.stack([(words == w).nonzero()[0, 0] for w in range(count)])
        given = bbox[row, first][torch.randperm(count, generator=draw)]
        bbox[row, words >= 0] = given[words[words >= 0]]
    return bbox


# %% tags=["experiment"]
known = encoded["known", "shuffled"]
changes = {"as they are": lambda b: b.bbox, "zeroed": zeroed, "swapped": swapped}
for name, change in changes.items():
    values = [score(models["shuffled", "tables", s], with_boxes(known, change)) for s in SEEDS]
    print(f"boxes {name:12} F1 of the two seeds", *(f"{value:.2f}" for value in values))
print(f"trained without:   F1 {mean_and_spread(results['shuffled', 'none', 'known'])}")
for places in ("none", "tables"):
    values = [score(models["reading", places, s], known) for s in SEEDS]
    print(f"trained in order, read in none, places: {places:6} F1 {mean_and_spread(values)}")

# %% [markdown]
# Zeroed or swapped, both are worse than a model that never had places; how bad zeros are may hang
# on the seed, since nobody trained what they mean. The model has learned to believe its boxes, and
# a box of zeros is no blank: it says *upper left corner* of every word. The last two lines are the
# accident that happens most, a scanner that sorts words in another way than the training set did:
# it ruins a model of words, and a model with places loses much less. A missing modality is best
# announced in training (week 8), not discovered afterwards. It happens: the token classification
# pipeline of `transformers` (5.23) passes LayoutLM no boxes at all, so that it reads zeros, in
# silence.
#
# ### Which parts of the place matter?
#
# Two ablations of your embedding. *A table for each edge*: right and bottom edges get rows of their
# own (shifting them by 51 in a longer table does that). *No sizes*: $H$ and $W$ stay zero.


# %% tags=["experiment"]
def apart(part):
    offset = torch.tensor([0, 0, STEPS + 1, STEPS + 1])
    return with_boxes(part, lambda batch: batch.bbox + offset)


def ablated(name, seed):
    set_seed(seed)
    model = PageModel(1000, len(train_pages.tag_names), steps=2 * STEPS + 1)
    part, change = encoded["train", "shuffled"], apart if name == "each" else lambda p: p
    if name == "no sizes":
        for table in (model.tables.h, model.tables.w):
            nn.init.zeros_(table.weight).requires_grad_(False)
    model = train_tagger(change(part), "tables", seed, model=model)
    return [score(model, change(encoded[s, "shuffled"])) for s in ("known", "new")]


for name in ("each", "no sizes"):
    rows = [ablated(name, seed) for seed in SEEDS]
    known_f1, new_f1 = (mean_and_spread(column) for column in zip(*rows))
    print(f"{name:9} known layouts {known_f1}, new layouts {new_f1}")

# %% [markdown]
# Honest result: with 1,200 labelled pages the model learns to match two tables as well as one, so
# sharing saves two tables and hardly changes the score. Sizes matter where they should: known
# layouts can do without them, new ones lose, because a price is as wide on every form.

# %% [markdown]
# ## 6. Where, or how far?
#
# Why do places fail on a new form? Look at one score of attention between words $i$ and $j$. Of the
# sum of tables it sees terms such as $X[x^i]^\top M\, X[x^j]$ with a learned $M$. To say "I look 6
# steps to the left" the model needs
#
# $$ X[a]^\top M\, X[a - 6] \text{ large, for every } a = 6, \dots, 50, $$
#
# one condition for each place, each learned only from pages that had words there. LayoutLMv2 adds
# to each score a number that depends on the *distance* alone (Xu 2021, section 2.1). With $K$ the
# width of a head, $x$ the left and $y$ the lower edge (as in the released code; the paper takes the
# upper),
#
# $$ \alpha_{ij} = \frac{q_i \cdot k_j}{\sqrt K} + b^{\text{order}}[j - i] + b^x[x_j - x_i] + b^y[y_j - y_i]. $$
#
# Then "6 steps to the left" is one number, learned from all pages. (Near distances have a number
# each, far ones share: from 11 of our 50 steps on all are one bucket, "far to the left". So the
# width of a column hardly matters.) And if the whole page moves by $s$, then
# $(x_j + s) - (x_i + s) = x_j - x_i$: the scores stay as they are. LayoutLMv2 keeps tables, too; to
# see the difference clearly, our third model has *only* distances. Its biases learn at five times
# the rate, because numbers added to scores have far to go.
#
# **Predict** its F1 on new layouts, words in no order. The tables scored about 0.43.

# %% tags=["experiment"]
for seed in SEEDS:
    model = train_tagger(encoded["train", "shuffled"], "distances", seed)
    models["shuffled", "distances", seed] = model
    for split in ("known", "new"):
        f1 = score(model, encoded[split, "shuffled"])
        results.setdefault(("shuffled", "distances", split), []).append(f1)
for split in ("known", "new"):
    print(
        f"distances, {split:5} layouts {mean_and_spread(results['shuffled', 'distances', split])}"
    )


# %% tags=["experiment"]
def moved_by(steps):
    """Move whole pages to the right and down, or back; what would leave them stays at the edge."""
    return lambda batch: (batch.bbox + steps).clamp(0, STEPS)


distance = torch.arange(-2, 3)
curves = {}
for places in ("tables", "distances"):
    curves[places] = [
        [score(models["shuffled", places, s], with_boxes(known, moved_by(int(d)))) for s in SEEDS]
        for d in distance
    ]

# %% tags=["experiment"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
for places, colour in (("tables", BLUE), ("distances", RED)):
    left.plot(2 * distance, [sum(c) / len(c) for c in curves[places]], color=colour, label=places)
    left.plot(2 * distance, curves[places], "o", color=colour, markersize=3)
left.set(xlabel="page moved right and down by (% of its side)", ylabel="entity F1", ylim=(0, 1.05))
left.set_title("Move the paper on the scanner")
left.legend()
bars = [
    ("reading", "none", GREY, "words, in order"),
    ("reading", "tables", BLUE, "tables, in order"),
    ("shuffled", "none", GREY, "words, no order"),
    ("shuffled", "tables", BLUE, "tables, no order"),
    ("shuffled", "distances", RED, "distances, no order"),
]
for i, (order, places, colour, _) in enumerate(bars):
    values = results[order, places, "new"]
    right.barh(-i, sum(values) / len(values), color=colour, alpha=0.45)
    right.plot(values, [-i] * len(values), "o", color=colour, markersize=4)
right.set_yticks([-i for i in range(5)], [name for *_, name in bars])
right.set(xlabel="entity F1, new layouts", xlim=(0, 1))
right.set_title("Scrambled words with distances\nbeat sorted words without")
figure.suptitle("Distances survive a move and carry over to new forms; tables do neither")
show(
    figure,
    "distances",
    """Left: F1 of the tables falls as the page moves, that of distances stays. Right: on new layouts
    distances score about twice as much as tables.""",
)

# %% [markdown]
# *What to see.* A shift of 4% of the page, a carelessly laid sheet, costs the tables dearly.
# Distances hardly notice, and on layouts that nobody has shown them they find most facts. The price
# is a look-up for every *pair* of tokens, where tables need one for every token.
#
# That is the honest answer to this week's question: what a layout says is not *where* a word is,
# but *what it stands beside*. Note how much it says: distances without any order find far more on
# new forms than words in perfect order did, and in reading order they gain only a few points (about
# 0.91 on new layouts). And with "both", tables beside distances as in LayoutLMv2, we measured about
# 0.94 on known layouts and 0.51 on new ones: as long as tables can learn a layout by heart, they
# do. Try it: `train_tagger(..., "both", seed)`. LayoutLM's tables can learn that from 11 million
# pages, whose layouts nobody could learn by heart. From twelve layouts they learn the layouts.
#
# ### What one word looks at
#
# With one block, the weights of attention can be read directly. Take a receipt of the *new* layout
# and ask: where does the amount that is the total look?


# %% tags=["experiment"]
@torch.no_grad()
def attention_of(model, batch):
    """Return the block's weights, [B, H, L, L]: week 1's formula on this model's queries and keys."""
    layer, (x, mask) = model.encoder.blocks[0].attention, model.embed(move(batch, device))
    queries, keys = (
        project(x).unflatten(-1, (4, -1)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj)
    )
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return (scores + mask).softmax(dim=-1).cpu()


# %% tags=["experiment"]
receipt = next(
    i for i in range(100) if unseen_pages.labels[i] == 0 and len(unseen_pages.words[i]) > 30
)
new = encoded["new", "shuffled"]
row = PageBatch(*(column[receipt : receipt + 1] for column in new.batch))
asked = int((row.labels[0] == new.tag_names.index("B-TOTAL")).nonzero()[0, 0])
word_boxes = unseen_pages.boxes[receipt][new.orders[receipt]]
titles = {"none": "words only", "tables": "tables of places", "distances": "distances"}


# %% tags=["experiment"]
figure, axes = plt.subplots(1, 4, figsize=(11, 4.2), layout="constrained", sharey=True)
facts = documents.load(
    "unseen", size=receipt + 1, images=True, pixels=448, tagging="bio", seed=SEED
)
draw_page(axes[0], facts[receipt], new.tag_names, "the truth")
for axis, (places, title) in zip(axes[1:], titles.items()):
    said = predict(models["shuffled", places, SEED], new)[receipt]
    tags = torch.tensor([new.tag_names.index(tag) for tag in said])
    draw_page(axis, replace(facts[receipt], tags=tags), new.tag_names, title)
for axis in axes:
    axis.set(xlim=(180, 820), xticks=[], yticks=[])
handles = [plt.Rectangle((0, 0), 1, 1, fc=c, alpha=0.5) for c in COLOURS.values()]
figure.legend(handles, [name.lower() for name in COLOURS], ncols=5, loc="outside lower center")
figure.suptitle("What three models find on a receipt of a layout never seen, its words in no order")
show(
    figure,
    "found",
    """One receipt four times: the true seller, date and total in colour, and what words only, tables
    and distances call so. Distances come closest to the truth.""",
)


# %% [markdown]
# *What to see.* Words alone take every day for a date and any amount for a total. The tables look
# where totals stand on the receipts that they know. Distances find seller, date and total.


# %% tags=["experiment"]
def draw_attention(axis, weights_L, title):
    """Shade each word by the attention it gets from the word asked, and draw the strongest."""
    axis.imshow(facts.images[receipt, 0], cmap="gray", vmin=0, vmax=1, extent=(0, 1000, 1000, 0))
    shares = torch.zeros(len(word_boxes))
    inside = row.word_index[0] >= 0
    shares.index_add_(0, row.word_index[0][inside], weights_L[inside])
    me = row.word_index[0, asked]
    for i, (x0, y0, x1, y1) in enumerate(word_boxes.tolist()):
        colour, strength = (BLUE, 0.5) if i == me else (RED, min(1.0, 2 * float(shares[i])))
        axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fc=colour, alpha=strength))
    middle = (word_boxes[:, :2] + word_boxes[:, 2:]).float() / 2
    for i in shares.topk(4).indices.tolist():
        ends = torch.stack([middle[me], middle[i]])
        axis.plot(*ends.T, color=RED, lw=8 * float(shares[i]), alpha=0.7)
    axis.set(xlim=(180, 820), ylim=(1000, 0), xticks=[], yticks=[], title=title)


# %% tags=["experiment"]
figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.6), layout="constrained")
for axis, (places, title) in zip(axes, titles.items()):
    weights = attention_of(models["shuffled", places, SEED], row)[0].mean(dim=0)[asked]
    draw_attention(axis, weights, title)
figure.suptitle(
    "Where the total (blue) looks, on a receipt of a layout never seen: mean of four heads"
)
show(
    figure,
    "attention",
    """The same receipt three times, with red lines from the total's amount to the words it attends to
    most. With words only they go anywhere; with distances they go to words on its line.""",
)

# %% tags=["experiment"]
# Of the attention that an amount spends on words, how much stays on its own line?
for places in titles:
    shares, chance = [], []
    weights = attention_of(models["shuffled", places, SEED], new.batch).mean(dim=1)
    for i, j in (new.batch.labels == new.tag_names.index("B-TOTAL")).nonzero().tolist():
        words = (new.batch.word_index[i] >= 0) & (torch.arange(weights.shape[1]) != j)
        line = (new.batch.bbox[i, :, 1] - new.batch.bbox[i, j, 1]).abs() <= 0
        shares.append(weights[i, j][words & line].sum() / weights[i, j][words].sum())
        chance.append((words & line).sum() / words.sum())
    share, even = (torch.stack(values).mean() for values in (shares, chance))
    print(f"{titles[places]:17} {share:.2f} on its own line; evenly spread it would be {even:.2f}")

# %% [markdown]
# *What to see.* The model with distances looks first along the total's own line, far to the left,
# at the keyword, and then at the amounts below it. The other two spend on their line what chance
# would. (The first receipt with more than 30 words, one seed.) A warning, which week 13 takes up:
# weights say where information *may* come from, not what the answer needed.

# %% [markdown]
# ## 7. Hide the word, keep its place
#
# Labels are dear: somebody must mark every word of a form. Unlabelled pages fill archives. LayoutLM
# learns from them by **masked visual-language modelling** (MVLM): choose 15% of the tokens, hide
# them, and guess them from the others *and from where they stand*. The box stays: the model knows
# that something stands to the right of *Due*, and must find out what sort of thing that is.
#
# Of the chosen tokens, BERT replaces 80% by [MASK], 10% by a random token, and leaves 10% as they
# are. [MASK] never comes again after pre-training; there the model meets words in plain sight, and
# with masks only it would never have been asked about one. So of 1,000 tokens about 150 are asked
# for, of which 120 are masked, 15 wrong and 15 true (Devlin 2019, section 3.1).

# %% [markdown] exercise="hide" difficulty=3 minutes=15 forbids=["mmlearn.pages.mask_words"]
# ### Exercise 4. Hide words
#
# Write `hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator)`.
#
# | argument | meaning |
# |---|---|
# | `input_ids` | whole numbers of any shape; leave the tensor itself unchanged |
# | `special_ids` | list of ids that are never chosen: [PAD], [CLS], [SEP] and their like |
# | `mask_id`, `vocab_size` | the id of [MASK]; random tokens are drawn from 0 to `vocab_size - 1` |
# | `rate` | share of the other tokens to choose, each by itself |
# | returns | the new ids, and the labels: the old id where a token was chosen, else −100 |
#
# Draw with `generator`. There is no box among the arguments, and that is the point.
#
# *Afterwards you can say:* "MVLM is BERT's masked language modelling with the boxes left in place:
# 15% chosen, 80/10/10, loss on the chosen ones only."
#
# <details><summary>Hint 1: choosing</summary>
#
# `torch.rand(shape, generator=generator) < rate` is True with probability `rate`. `torch.isin`
# finds the special ones.
#
# </details>
# <details><summary>Hint 2: two draws</summary>
#
# Whether a token is chosen and what happens to it are two questions: draw a second time. Among
# tokens whose first draw is below 0.15, that draw is never above 0.8.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     chosen = a draw below the rate, and not special
#     labels = ids where chosen, else -100
#     fate = a second draw
#     where chosen and fate < 0.8: the mask; where chosen and 0.8 <= fate < 0.9: a random token
#
# </details>


# %% answer="hide"
def hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator):
    """Return ids with some tokens hidden, and labels that hold what they were, else -100."""
    ### BEGIN SOLUTION
    shape, where = input_ids.shape, {"generator": generator, "device": input_ids.device}
    special = torch.isin(input_ids, torch.tensor(special_ids, device=input_ids.device))
    chosen = (torch.rand(shape, **where) < rate) & ~special
    fate, other = torch.rand(shape, **where), torch.randint(vocab_size, shape, **where)
    hidden = torch.where(chosen & (fate < 0.8), mask_id, input_ids)
    hidden = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, hidden)
    return hidden, torch.where(chosen, input_ids, -100)
    ### END SOLUTION


# %% check="hide" aspect="example" points=2 title="hide everything, hide nothing, and count"
import torch
from mmlearn.feedback import expect

sentence = torch.tensor([[2, 31, 32, 33, 3, 0], [2, 41, 3, 0, 0, 0]])
asked_all = torch.tensor([[-100, 31, 32, 33, -100, -100], [-100, 41, -100, -100, -100, -100]])
draw = torch.Generator().manual_seed(0)
expect(
    "w05_layoutlm/hide/none",
    hide_words(sentence.clone(), [0, 2, 3, 4], 4, 50, 0.0, draw),
    (sentence.clone(), torch.full((2, 6), -100)),
    "With rate 0 nothing changes and nothing is asked for.",
)
expect(
    "w05_layoutlm/hide/all",
    hide_words(sentence.clone(), [0, 2, 3, 4], 4, 50, 1.0, draw)[1],
    asked_all,
    "With rate 1 every token but the special ones 0, 2, 3 and 4 is asked for: its label is its old "
    "id. All others have -100.",
)
many = torch.full((100, 300), 7)
new_ids, asked_for = hide_words(many.clone(), [0, 2, 3, 4], 4, 1000, 0.9, draw)
of_asked = new_ids[asked_for != -100]
shares = [(asked_for != -100).float(), (of_asked == 4).float(), (of_asked == 7).float()]
expect(
    "w05_layoutlm/hide/shares",
    [round(share.mean().item(), 1) for share in shares],
    [0.9, 0.8, 0.1],
    "At rate 0.9, 90% of the tokens are asked for. Of these 80% become the mask, 10% stay as they "
    "are, and 10% are random.",
)
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(41)
given = torch.randint(0, 60, (9, 14), generator=draw)
special = torch.isin(given, torch.tensor([0, 5, 6]))
hidden, labels = hide_words(given.clone(), [0, 5, 6], 6, 60, 0.4, draw)
assert hidden.shape == labels.shape == (9, 14)
assert torch.equal(hidden[labels == -100], given[labels == -100]), "what is not asked stays"
assert torch.equal(labels[labels != -100], given[labels != -100]), "labels are the old ids"
assert not (labels[special] != -100).any(), "special tokens are never chosen"
assert (labels != -100).any() and (labels == -100).any()
### END HIDDEN TESTS

# %% check="hide" aspect="shares" points=1 title="15%, of which 80, 10 and 10"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(42)
given = torch.randint(10, 1000, (200, 500), generator=draw)
hidden, labels = hide_words(given.clone(), [0, 1, 2, 3, 4], 4, 1000, 0.15, draw)
chosen = labels != -100
assert abs(chosen.float().mean() - 0.15) < 0.01, "15% are chosen"
masked = (hidden == 4)[chosen].float().mean()
kept = (hidden == given)[chosen].float().mean()
assert abs(masked - 0.8) < 0.025, "80% of them become the mask"
assert abs(kept - 0.1) < 0.02, "10% stay"
other = hidden[chosen & (hidden != 4) & (hidden != given)]
assert len(other.unique()) > 400, "random tokens come from the whole vocabulary"
rows = chosen.float().mean(dim=1)
assert rows.std() > 0.005, "each token is chosen by itself"
### END HIDDEN TESTS

# %% check="hide" aspect="inputs" points=1 title="the page is not changed, and every draw is another"
import torch
from mmlearn.feedback import expect

page = torch.arange(10, 40).reshape(3, 10)
hide_words(page, [0], 4, 50, 1.0, torch.Generator().manual_seed(1))
expect(
    "w05_layoutlm/hide/untouched",
    page,
    torch.arange(10, 40).reshape(3, 10),
    "The call changed the ids that it was given: in the next round the true words would be gone.",
)
### BEGIN HIDDEN TESTS
import torch

given = torch.arange(100, 400).reshape(3, 100)
page, draw = given.clone(), torch.Generator().manual_seed(43)
first, second = (hide_words(page, [0], 4, 1000, 0.5, draw)[1] for _ in range(2))
assert torch.equal(page, given), "the input was changed in place"
assert not torch.equal(first, second), "a second round hides other words"
again = torch.Generator().manual_seed(44)
once = hide_words(given.clone(), [0], 4, 1000, 0.5, again)
same = hide_words(given.clone(), [0], 4, 1000, 0.5, torch.Generator().manual_seed(44))
assert all(torch.equal(a, b) for a, b in zip(once, same)), "all draws come from the generator"
### END HIDDEN TESTS


# %% wrong="hide" name="one_draw" says="You asked one draw both questions: whoever was chosen because it is below 0.15 is also below 0.8, so all chosen tokens are masked. Draw a second time."
def hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator):
    draws = torch.rand(input_ids.shape, generator=generator)
    chosen = (draws < rate) & ~torch.isin(input_ids, torch.tensor(special_ids))
    other = torch.randint(vocab_size, input_ids.shape, generator=generator)
    hidden = torch.where(chosen & (draws < 0.8), mask_id, input_ids)
    hidden = torch.where(chosen & (draws >= 0.8) & (draws < 0.9), other, hidden)
    return hidden, torch.where(chosen, input_ids, -100)


# %% wrong="hide" name="always_mask" says="All chosen tokens became [MASK]. Then the model never has to trust or doubt a word it sees: 10% become a random token and 10% stay."
def hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator):
    special = torch.isin(input_ids, torch.tensor(special_ids))
    chosen = (torch.rand(input_ids.shape, generator=generator) < rate) & ~special
    return torch.where(chosen, mask_id, input_ids), torch.where(chosen, input_ids, -100)


# %% wrong="hide" name="hides_special" says="You hide [CLS], [SEP] and padding, too. They carry no words, and padding would be most of what is asked for."
def hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator):
    shape = input_ids.shape
    chosen = torch.rand(shape, generator=generator) < rate
    fate = torch.rand(shape, generator=generator)
    other = torch.randint(vocab_size, shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), mask_id, input_ids)
    hidden = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, hidden)
    return hidden, torch.where(chosen, input_ids, -100)


# %% wrong="hide" name="labels_everywhere" says="Your labels ask for every token. Copying what is in plain sight would be most of the loss: label the chosen ones, and give the others -100."
def hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator):
    special = torch.isin(input_ids, torch.tensor(special_ids))
    chosen = (torch.rand(input_ids.shape, generator=generator) < rate) & ~special
    fate = torch.rand(input_ids.shape, generator=generator)
    other = torch.randint(vocab_size, input_ids.shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), mask_id, input_ids)
    hidden = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, hidden)
    return hidden, input_ids.clone()


# %% wrong="hide" name="labels_masked_only" says="You label only what became [MASK]. The random and the unchanged tokens are asked for as well: that is why they are there."
def hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator):
    special = torch.isin(input_ids, torch.tensor(special_ids))
    chosen = (torch.rand(input_ids.shape, generator=generator) < rate) & ~special
    fate = torch.rand(input_ids.shape, generator=generator)
    other = torch.randint(vocab_size, input_ids.shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), mask_id, input_ids)
    hidden = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, hidden)
    return hidden, torch.where(hidden == mask_id, input_ids, -100)


# %% wrong="hide" name="in_place" says="You wrote the masks into the caller's tensor, so the labels and the next round see [MASK] where words were. Make a new tensor."
def hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator):
    special = torch.isin(input_ids, torch.tensor(special_ids))
    chosen = (torch.rand(input_ids.shape, generator=generator) < rate) & ~special
    labels = torch.where(chosen, input_ids, -100)
    fate = torch.rand(input_ids.shape, generator=generator)
    other = torch.randint(vocab_size, input_ids.shape, generator=generator)
    input_ids[chosen & (fate < 0.8)] = mask_id
    swap = chosen & (fate >= 0.8) & (fate < 0.9)
    input_ids[swap] = other[swap]
    return input_ids, labels


# %% wrong="hide" name="labels_of_new" says="Your labels are read off the new ids, so the model is asked to answer [MASK]. Take the old ids."
def hide_words(input_ids, special_ids, mask_id, vocab_size, rate, generator):
    special = torch.isin(input_ids, torch.tensor(special_ids))
    chosen = (torch.rand(input_ids.shape, generator=generator) < rate) & ~special
    fate = torch.rand(input_ids.shape, generator=generator)
    other = torch.randint(vocab_size, input_ids.shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), mask_id, input_ids)
    hidden = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, hidden)
    return hidden, torch.where(chosen, hidden, -100)


# %% [markdown]
# The guesser compares each hidden token's state with every word's embedding: the table of words is
# used twice, to read and to write, so what is learned about a word in one role serves the other. We
# pre-train on the 1,200 pages without their tags, in no order, with tables as LayoutLM has them.
# Two things differ from the paper: LayoutLM reads words in order, and it starts from BERT's
# weights, so that only its tables of places begin at random.


# %%
class Guesser(nn.Module):
    """Guess hidden tokens: their states against the embeddings of all words."""

    def __init__(self, reader):
        super().__init__()
        self.reader = reader
        self.transform, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.bias = nn.Parameter(torch.zeros(reader.words.num_embeddings))

    def forward(self, batch, where):
        states = self.reader.states(batch)[where]
        states = self.norm(F.gelu(self.transform(states)))
        return F.linear(states, self.reader.words.weight, self.bias)


# %%
def pretrain(part, tokenizer, seed, steps=400):
    """Return a guesser trained on pages without labels, and the history of its loss."""
    set_seed(seed)
    guesser = Guesser(PageModel(tokenizer.vocab_size, len(part.tag_names)))
    draw = torch.Generator(device).manual_seed(seed)
    special, mask = tokenizer.special_token_ids, tokenizer.mask_token_id

    def loss(model, step):
        batch, _ = step
        ids, labels = hide_words(batch.input_ids, special, mask, tokenizer.vocab_size, 0.15, draw)
        asked = labels != -100
        return F.cross_entropy(model(batch._replace(input_ids=ids), asked), labels[asked])

    stream = batches(part, 16, seed)
    history = fit(guesser, stream, loss, steps=steps, lr=6e-3, device=device, progress=False)
    return guesser, history


# %% tags=["experiment"]
guesser, history = pretrain(encoded["train", "shuffled"], tokenizer, SEED)
print(
    f"loss {history.smooth(20)[19]:.2f} nats at first, {history.smooth(40)[-1]:.2f} at the end; "
    f"guessing blindly among {tokenizer.vocab_size} costs {math.log(1000):.2f}"
)

# %% [markdown]
# What has it understood? Hide one word of a test page and read the five best guesses. **Predict**
# what it says for a hidden street, a tax, a date's keyword, a company's trade. Then hide 15% of all
# test pages and count how often the true token is its first guess, or among its first five.


# %% tags=["experiment"]
@torch.no_grad()
def guesses(guesser, batch, where):
    """Hide some tokens and return the five best guesses for each."""
    ids = torch.where(where, tokenizer.mask_token_id, batch.input_ids)
    hidden = move(batch._replace(input_ids=ids), device)
    return guesser.eval()(hidden, where.to(device)).topk(5).indices.cpu()


read = encoded["known", "shuffled"].batch
for word in ("lane", "tax", "date", "books"):
    place = torch.zeros_like(read.attention_mask)
    place[tuple((read.input_ids == tokenizer.vocab[word]).nonzero()[0])] = True
    best = guesses(guesser, read, place)[0]
    print(f"{word:6} hidden, guessed:", *(tokenizer.tokens[i] for i in best))

# %% tags=["experiment"]
draw = torch.Generator().manual_seed(SEED)
where = (torch.rand(read.input_ids.shape, generator=draw) < 0.15) & (read.word_index >= 0)
best, truth = guesses(guesser, read, where), read.input_ids[where]
common = encoded["train", "shuffled"].batch
common = torch.bincount(common.input_ids[common.word_index >= 0]).topk(5).indices
for name, five in (("the guesser", best), ("the commonest tokens", common.expand_as(best))):
    hits = five == truth[:, None]
    first, any_of_five = hits[:, 0].float().mean(), hits.any(dim=1).float().mean()
    print(f"{name:21} first {first:.2f}, among five {any_of_five:.2f}")

# %% [markdown]
# The first guess is right far more often than the commonest tokens would be. Elsewhere only the
# *kind* of word is known, a street, a tax, and it need not be more: nobody can tell which street.
# Kinds are what the tags name. Some things it does not know at all, as for the company's trade. Now
# the test: 10, 50 or all pages with labels, from the pre-trained model or from scratch, the same
# pages and steps: one pre-training, two fine-tunings.
#
# **Predict** where pre-training helps most: at 10, at 50, or at 1,200 labelled pages?


# %% tags=["experiment"]
def fine_tune(count, seed, guesser=None, steps=None):
    """Train on the first `count` labelled pages, from scratch or from a guesser's reader."""
    set_seed(seed)
    model = PageModel(1000, len(train_pages.tag_names))
    if guesser is not None:
        learned = guesser.reader.state_dict()
        kept = {name: value for name, value in learned.items() if not name.startswith("tagger.")}
        model.load_state_dict(kept, strict=False)
    rows, steps = torch.arange(count), steps or {10: 80, 50: 150}.get(count, 250)
    return train_tagger(encoded["train", "shuffled"], "tables", seed, steps, rows, model)


# %% tags=["experiment"]
labelled = (10, 50, 1200)
gains, on_new = (
    {name: {count: [] for count in labelled} for name in ("from scratch", "pre-trained")}
    for _ in range(2)
)
for count in labelled:
    for seed in SEEDS:
        tuned = fine_tune(count, seed, guesser)
        fresh = models["shuffled", "tables", seed] if count == 1200 else fine_tune(count, seed)
        for name, model in (("from scratch", fresh), ("pre-trained", tuned)):
            gains[name][count].append(score(model, encoded["known", "shuffled"]))
            on_new[name][count].append(score(model, encoded["new", "shuffled"]))
    for name in gains:
        known_f1, new_f1 = (mean_and_spread(f1[name][count]) for f1 in (gains, on_new))
        print(f"{count:5} labelled pages, {name:12}: known {known_f1}, new layouts {new_f1}")

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(6.5, 3.2))
for (name, rows), colour in zip(gains.items(), (GREY, GREEN)):
    means = [sum(values) / len(values) for values in rows.values()]
    axis.plot(labelled, means, color=colour, label=name)
    axis.plot(labelled, list(rows.values()), "o", color=colour, markersize=4)
axis.set(xscale="log", xlabel="labelled pages", ylabel="entity F1, known layouts", ylim=(0, 1))
axis.set_xticks(labelled, labelled)
axis.minorticks_off()
axis.set_title("Hidden words teach most where labels are few")
axis.legend()
show(
    figure,
    "labels",
    """Entity F1 against labelled pages: the pre-trained model is ahead at 10 and at 50 pages, and a
    little at 1,200.""",
)

# %% [markdown]
# *What to see.* With ten or fifty labelled pages the pre-trained model is well ahead. With all
# labels a smaller gain is left, some of which may be mere training time. On *new* layouts the same
# pre-training gains little: it has seen the same twelve layouts, and tables learn layouts. The
# paper's 11 million pages are worth more for that reason, too: forms with labels are few (FUNSD has
# 149 to train on), layouts are many.

# %% [markdown]
# ## 8. The picture behind the word
#
# Bold print, a logo, a stamp, a marker pen: words and boxes do not hold them. For fine-tuning,
# LayoutLM takes from a Faster R-CNN's feature map the region behind each word and adds it to the
# word's final state; [CLS] gets the page as a whole. (It is often said that LayoutLM has image
# *tokens*. Those came with v2.)
#
# How do you average a feature map over a box that does not end at the borders of its cells? Count
# what is covered. On one axis, with $n$ cells of width 1, the box from $a$ to $b$ covers of cell
# $k$
#
# $$ c_k = \max\big(0,\; \min(b, k+1) - \max(a, k)\big), \qquad
#    \text{mean} = \frac{\sum_{j,k} c^y_j\, c^x_k\, f_{jk}}{\sum_{j,k} c^y_j\, c^x_k} . $$
#
# The area covered is height times width, so the weights are a product, and one `einsum` does all
# words.

# %% [markdown] exercise="region" difficulty=4 minutes=20
# ### Exercise 5. The mean of a region
#
# Write `region_mean(features_BCHW, bbox_BL4, steps)`.
#
# | argument | shape |
# |---|---|
# | `features_BCHW` | `[B, C, H, W]`: the page's feature map, C channels in H rows of W cells |
# | `bbox_BL4` | `[B, L, 4]`: left, top, right, bottom in steps, 0 to `steps` |
# | returns | `[B, L, C]`: the mean of each channel over each box, by covered area |
#
# A box of 5 of 10 steps on a map 4 cells wide ends at cell 2.0. A box without area covers nothing:
# return zeros for it, and no NaN.
#
# *Afterwards you can say:* "Region features are weighted means of a feature map's cells; RoI align
# samples what I integrate. They are differentiable in the features, so the network can learn."
#
# <details><summary>Hint 1: into cells</summary>
#
# Along x there are W cells for `steps` steps: multiply by `W / steps`. Along y by `H / steps`.
#
# </details>
# <details><summary>Hint 2: what a box covers of each cell</summary>
#
# With `low` and `high` of shape `[B, L, 1]` and `cell = torch.arange(n)`,
# `torch.minimum(high, cell + 1) - torch.maximum(low, cell)` is `[B, L, n]`; clamp it at 0.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     across = covered share of each column, [B, L, W]; down = of each row, [B, L, H]
#     total = einsum over h and w of down, across, features: "blh, blw, bchw -> blc"
#     area = sum of down times sum of across, [B, L, 1]
#     return total / area, where there is an area, else 0
#
# </details>


# %% answer="region"
def region_mean(features_BCHW, bbox_BL4, steps):
    """Average the features over each box, by covered area: [B, L, C]."""
    ### BEGIN SOLUTION
    H, W = features_BCHW.shape[-2:]

    def covered(low, high, cells):
        cell = torch.arange(cells, device=features_BCHW.device)
        low, high = (low * (cells / steps))[..., None], (high * (cells / steps))[..., None]
        return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(min=0)

    x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
    across_BLW, down_BLH = covered(x0, x1, W), covered(y0, y1, H)
    total_BLC = torch.einsum("blh,blw,bchw->blc", down_BLH, across_BLW, features_BCHW)
    area_BL1 = (down_BLH.sum(dim=-1) * across_BLW.sum(dim=-1))[..., None]
    return total_BLC / area_BL1.clamp(min=1e-9)
    ### END SOLUTION


# %% check="region" aspect="example" points=2 title="two rows of four cells"
import torch
from mmlearn.feedback import expect

small_map = torch.tensor([[[[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]]])
expect(
    "w05_layoutlm/region/whole",
    lambda: region_mean(small_map.clone(), torch.tensor([[[5, 0, 10, 5], [0, 5, 5, 10]]]), 10),
    torch.tensor([[[3.5], [15.0]]]),
    "On 10 steps, the first box is the right half of the upper row, cells 3 and 4, mean 3.5; the "
    "second is the left half of the lower row, 10 and 20.",
)
expect(
    "w05_layoutlm/region/parts",
    lambda: region_mean(small_map.clone(), torch.tensor([[[2, 0, 6, 4]]]), 8),
    torch.tensor([[[2.5]]]),
    "On 8 steps a column is 2 wide: the box covers columns 2 and 3 of the upper row, 2 and 3.",
)
expect(
    "w05_layoutlm/region/between",
    lambda: region_mean(small_map.clone(), torch.tensor([[[1, 3, 2, 6]]]), 8),
    torch.tensor([[[7.0]]]),
    "The box lies in column 1, from y = 3 to 6, while the rows meet at 4: a third of it is 1, two "
    "thirds are 10, and the mean is 7.",
)
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(51)
features = torch.randn(2, 3, 4, 5, generator=draw)
boxes = torch.randint(0, 21, (2, 6, 2, 2), generator=draw).sort(dim=2).values.flatten(2)
boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 1).clamp(max=20)
boxes[..., :2] = torch.minimum(boxes[..., :2], boxes[..., 2:] - 1)
fine = features.repeat_interleave(5, dim=2).repeat_interleave(4, dim=3)  # 20 by 20 little cells
wanted = torch.stack(
    [
        torch.stack([fine[b, :, y0:y1, x0:x1].mean(dim=(1, 2)) for x0, y0, x1, y1 in page])
        for b, page in enumerate(boxes.tolist())
    ]
)
found = region_mean(features.clone(), boxes.clone(), 20)
assert found.shape == (2, 6, 3), "[B, L, C]"
assert torch.allclose(found, wanted, atol=1e-4), "the mean over the covered area"
### END HIDDEN TESTS

# %% check="region" aspect="law" points=1 title="whole cells agree with RoI align; a flat map stays flat"
### BEGIN HIDDEN TESTS
import torch
from torchvision.ops import roi_align

draw = torch.Generator().manual_seed(52)
features = torch.randn(3, 4, 6, 8, generator=draw)
boxes = torch.tensor([[[2, 1, 5, 4]], [[0, 3, 3, 6]], [[5, 0, 8, 3]]])  # 3 by 3 cells each
aligned = roi_align(features, list(boxes.float()), 3, sampling_ratio=1, aligned=True)
aligned = aligned.mean(dim=(2, 3))[:, None]
scaled = boxes * torch.tensor([3, 4, 3, 4])  # in steps of 24
assert torch.allclose(region_mean(features, scaled, 24), aligned, atol=1e-4)
flat = torch.full((1, 2, 3, 7), 4.5)
some = torch.tensor([[[1, 2, 90, 31], [17, 5, 18, 99], [0, 0, 100, 100]]])
assert torch.allclose(region_mean(flat, some, 100), torch.full((1, 3, 2), 4.5), atol=1e-3)
### END HIDDEN TESTS

# %% check="region" aspect="empty" points=1 title="a box without area gives zeros, with a gradient"
import torch
from mmlearn.feedback import expect

expect(
    "w05_layoutlm/region/empty",
    lambda: region_mean(
        torch.ones(1, 2, 3, 3), torch.tensor([[[4, 4, 4, 9], [10, 10, 10, 10]]]), 10
    ),
    torch.zeros(1, 2, 2),
    "Both boxes have no area, as [SEP] has none: zeros, not NaN.",
)
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(53)
features = torch.randn(1, 2, 4, 4, generator=draw).requires_grad_()
boxes = torch.tensor([[[0, 0, 0, 0], [0, 0, 2, 1], [3, 3, 3, 4]]])
seen = region_mean(features, boxes, 4)
assert torch.isfinite(seen).all() and seen[0, 1].abs().sum() > 0
seen.sum().backward()
wanted = torch.zeros(1, 2, 4, 4)
wanted[..., 0, :2] = 0.5
assert torch.allclose(features.grad, wanted, atol=1e-5), "each covered cell gets its share"
### END HIDDEN TESTS


# %% wrong="region" name="rows_and_columns" says="You used x for the rows. A feature map is [rows, columns] = [y, x], a box begins with x."
def region_mean(features_BCHW, bbox_BL4, steps):
    def covered(low, high, cells):
        cell = torch.arange(cells)
        low, high = (low * (cells / steps))[..., None], (high * (cells / steps))[..., None]
        return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(min=0)

    x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
    H, W = features_BCHW.shape[-2:]
    across, down = covered(y0, y1, W), covered(x0, x1, H)
    total = torch.einsum("blh,blw,bchw->blc", down, across, features_BCHW)
    area = (down.sum(dim=-1) * across.sum(dim=-1))[..., None]
    return total / area.clamp(min=1e-9)


# %% wrong="region" name="whole_cells" says="You took whole cells, all that the box touches. A cell that is covered by half counts by half."
def region_mean(features_BCHW, bbox_BL4, steps):
    H, W = features_BCHW.shape[-2:]
    pages = []
    for features, boxes in zip(features_BCHW, bbox_BL4.tolist()):
        rows = []
        for x0, y0, x1, y1 in boxes:
            left, right = int(x0 * W / steps), -int(-x1 * W // steps)
            top, bottom = int(y0 * H / steps), -int(-y1 * H // steps)
            part = features[:, top:bottom, left:right]
            rows.append(part.mean(dim=(1, 2)) if part.numel() else features[:, 0, 0] * 0)
        pages.append(torch.stack(rows))
    return torch.stack(pages)


# %% wrong="region" name="sum_not_mean" says="This is the sum over the box: long words would shine brighter. Divide by the covered area."
def region_mean(features_BCHW, bbox_BL4, steps):
    def covered(low, high, cells):
        cell = torch.arange(cells)
        low, high = (low * (cells / steps))[..., None], (high * (cells / steps))[..., None]
        return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(min=0)

    x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
    H, W = features_BCHW.shape[-2:]
    across, down = covered(x0, x1, W), covered(y0, y1, H)
    return torch.einsum("blh,blw,bchw->blc", down, across, features_BCHW)


# %% wrong="region" name="not_a_number" says="0 divided by 0 is NaN: [SEP] and padding have boxes without area, and one NaN spoils the whole page. Return zeros there."
def region_mean(features_BCHW, bbox_BL4, steps):
    def covered(low, high, cells):
        cell = torch.arange(cells)
        low, high = (low * (cells / steps))[..., None], (high * (cells / steps))[..., None]
        return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(min=0)

    x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
    H, W = features_BCHW.shape[-2:]
    across, down = covered(x0, x1, W), covered(y0, y1, H)
    total = torch.einsum("blh,blw,bchw->blc", down, across, features_BCHW)
    return total / (down.sum(dim=-1) * across.sum(dim=-1))[..., None]


# %% wrong="region" name="not_clamped" says="Cells outside the box got negative weights: the overlap of two intervals that do not meet is 0. Clamp it."
def region_mean(features_BCHW, bbox_BL4, steps):
    def covered(low, high, cells):
        cell = torch.arange(cells)
        low, high = (low * (cells / steps))[..., None], (high * (cells / steps))[..., None]
        return torch.minimum(high, cell + 1) - torch.maximum(low, cell)

    x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
    H, W = features_BCHW.shape[-2:]
    across, down = covered(x0, x1, W), covered(y0, y1, H)
    total = torch.einsum("blh,blw,bchw->blc", down, across, features_BCHW)
    return total / (down.sum(dim=-1) * across.sum(dim=-1))[..., None].clamp(min=1e-9)


# %% wrong="region" name="middle_cell" says="You read the one cell in the middle of the box. A long word has a beginning and an end: average over all that it covers."
def region_mean(features_BCHW, bbox_BL4, steps):
    H, W = features_BCHW.shape[-2:]
    x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
    column = ((x0 + x1) / 2 * W / steps).long().clamp(max=W - 1)
    row = ((y0 + y1) / 2 * H / steps).long().clamp(max=H - 1)
    page = torch.arange(len(bbox_BL4))[:, None]
    area = ((x1 - x0) * (y1 - y0))[..., None]
    return features_BCHW[page, :, row, column] * (area > 0)


# %% wrong="region" name="steps_as_cells" says="You took steps for cells. The map is coarser than the boxes: multiply by W / steps and H / steps."
def region_mean(features_BCHW, bbox_BL4, steps):
    def covered(low, high, cells):
        cell = torch.arange(cells)
        low, high = low[..., None], high[..., None]
        return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(min=0)

    x0, y0, x1, y1 = bbox_BL4.unbind(dim=-1)
    H, W = features_BCHW.shape[-2:]
    across, down = covered(x0, x1, W), covered(y0, y1, H)
    total = torch.einsum("blh,blw,bchw->blc", down, across, features_BCHW)
    area = (down.sum(dim=-1) * across.sum(dim=-1))[..., None]
    return total / area.clamp(min=1e-9)


# %% [markdown]
# What is a picture worth? Two tasks on the same 160 drawn pages. In the first somebody went over
# three words of each page with a grey marker, and the model is to say which. In the second it finds
# entities as before. **Predict** what the picture adds to each.


# %%
class Seeing(nn.Module):
    """A reader, plus what each word's region of the picture looks like."""

    def __init__(self, reader, see=True):
        super().__init__()
        self.reader, self.see = reader, see
        self.eye = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.projection = nn.Linear(16, 64)

    def forward(self, batch, images, bbox):
        states = self.reader.states(batch)
        if self.see:  # added after the encoder, as in the paper's figure 2
            states = states + self.projection(region_mean(self.eye(images), bbox, 1000))
        return self.reader.tagger(states)


# %% tags=["experiment"]
def with_pictures(split, size):
    """Draw pages; return their tokens, boxes in thousandths, pictures, and a marked copy."""
    pages = documents.load(split, size=size, images=True, pixels=112, tagging="bio", seed=SEED)
    part, fine = encode(pages, tokenizer), encode(pages, tokenizer, steps=1000)
    images, batch = pages.images.clone(), part.batch
    is_marked = torch.full_like(batch.labels, -100).masked_fill(batch.labels >= 0, 0)
    draw = torch.Generator().manual_seed(SEED)
    for page, boxes in enumerate(pages.boxes):
        for word in torch.randperm(len(boxes), generator=draw)[:3].tolist():
            x0, y0, x1, y1 = (boxes[word] * 112 // 1000).tolist()
            images[page, 0, y0 : y1 + 1, x0 : x1 + 1] -= 0.3
            is_marked[page][(batch.word_index[page] == word) & (batch.labels[page] >= 0)] = 1
    marked = part._replace(batch=batch._replace(labels=is_marked), tag_names=["O", "B-MARKED"])
    return part, marked, fine.batch.bbox, pages.images, images


# %% tags=["experiment"]
def train_seeing(part, bbox, images, see, seed, steps):
    set_seed(seed)
    model = Seeing(PageModel(1000, len(part.tag_names)), see)

    def loss(model, step):
        batch, rows = step
        places = bbox[rows.cpu(), : batch.bbox.shape[1]].to(device)
        logits = model(batch, images[rows.cpu()].to(device), places)
        return F.cross_entropy(logits.mT, batch.labels, ignore_index=-100)

    fit(model, batches(part, 8, seed), loss, steps=steps, lr=6e-3, device=device, progress=False)
    return model


@torch.no_grad()
def word_f1(model, part, bbox, images):
    """F1 over single words that are not O."""
    model, batch = model.eval().cpu(), part.batch
    best, counted = model(batch, images, bbox).argmax(dim=-1), batch.labels >= 0
    found, wanted = best[counted], batch.labels[counted]
    right = ((found == wanted) & (wanted > 0)).sum()
    return (2 * right / ((found > 0).sum() + (wanted > 0).sum())).item()


# %% tags=["experiment"]
drawn_train, drawn_test = with_pictures("train", 160), with_pictures("test", 50)
worth = {}
for task, which, steps in (("marked words", 1, 130), ("entities", 0, 60)):
    for see in (False, True):
        for seed in SEEDS:
            boxes, clean, inked = drawn_train[2:]
            images = inked if which else clean
            model = train_seeing(drawn_train[which], boxes, images, see, seed, steps)
            boxes, clean, inked = drawn_test[2:]
            f1 = word_f1(model, drawn_test[which], boxes, inked if which else clean)
            worth.setdefault((task, see), []).append(f1)
        print(
            f"{task:13} {'with' if see else 'without'} picture: {mean_and_spread(worth[task, see])}"
        )

# %% tags=["experiment"]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(1, 1.3)
)
left.imshow(drawn_test[4][0, 0], cmap="gray", vmin=0, vmax=1, extent=(0, 1000, 1000, 0))
left.set(title="Three words marked, 112 pixels", xlabel="thousandths of the page", yticks=[])
for i, ((_, see), values) in enumerate(worth.items()):
    colour = PURPLE if see else GREY
    right.bar(i + (i > 1) * 0.5, sum(values) / len(values), color=colour, alpha=0.45)
    right.plot([i + (i > 1) * 0.5] * len(values), values, "o", color=colour, markersize=4)
right.set_xticks([0.5, 3], ["marked words", "entities"])
right.set(ylabel="F1 of words on other pages", ylim=(0, 1))
right.legend(
    [plt.Rectangle((0, 0), 1, 1, fc=c, alpha=0.45) for c in (GREY, PURPLE)],
    ["without", "with picture"],
)
right.set_title("A picture helps where it knows something that nobody else knows")
show(
    figure,
    "picture",
    """Left: a page on which three words are marked in grey. Right: without the picture marked words
    cannot be found, with it they mostly can; for entities the picture makes no difference.""",
)

# %% [markdown]
# *What to see.* The marker is seen in the picture or not at all. For entities our pages are poor in
# looks: one typeface, no bold, no logo. The picture holds nothing that words and boxes did not say,
# so it adds nothing. Real forms hold more: bold keywords, stamps, logos, handwriting. (Our [CLS]
# has a box without area, so it sees nothing; for entities that does not matter.)

# %% [markdown]
# ## 9. What kind of page? Several tags at once
#
# An archive's pages carry tags: *letter*, *budget*, *handwritten*. A page has any number of them.
# LayoutLM's second pre-training task, **multi-label document classification** (MDC), asks for all
# at [CLS]. A softmax would make tags compete for one unit of probability. So each tag is a question
# of its own, yes or no, with a sigmoid. With logits $z$ and truth $y \in \{0, 1\}$, over $B$ pages
# and $C$ tags,
#
# $$ \mathcal L = -\frac{1}{BC} \sum_{b,c} \big[\, y_{bc} \ln \sigma(z_{bc}) + (1 - y_{bc}) \ln \sigma(-z_{bc}) \,\big],
#    \qquad \frac{\partial \mathcal L}{\partial z_{bc}} = \frac{\sigma(z_{bc}) - y_{bc}}{BC} , $$
#
# since $1 - \sigma(z) = \sigma(-z)$ and $\frac{d}{dz} \ln \sigma(z) = \sigma(-z)$.

# %% [markdown] exercise="mdc" difficulty=2 minutes=10
# ### Exercise 6. The loss of many tags
#
# Write `mdc_loss(logits_BC, tags_BC)` for boolean `tags_BC`: the mean over all pages and tags, in
# nats, for logits of any size.
#
# *Afterwards you can say:* "Multi-label means a sigmoid for each tag and binary cross-entropy,
# computed from logits; softmax would make tags exclude each other."
#
# <details><summary>Hint 1: one formula for both cases</summary>
#
# Where the tag is there, the loss is $-\ln\sigma(z)$, otherwise $-\ln\sigma(-z)$. So only a sign
# differs.
#
# </details>
# <details><summary>Hint 2: overflow</summary>
#
# `sigmoid` of −200 is 0 in float32, and its logarithm minus infinity. `F.logsigmoid` takes both
# steps at once.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     sign = +1 where the tag is there, -1 where it is not
#     return minus the mean of logsigmoid of sign times logit
#
# </details>


# %% answer="mdc"
def mdc_loss(logits_BC, tags_BC):
    """Return the mean binary cross-entropy over pages and tags, in nats."""
    ### BEGIN SOLUTION
    signs_BC = torch.where(tags_BC, 1.0, -1.0)
    return -F.logsigmoid(signs_BC * logits_BC).mean()
    ### END SOLUTION


# %% check="mdc" aspect="example" points=1 title="one page with two of three tags"
import math
import torch
from mmlearn.feedback import expect

expect(
    "w05_layoutlm/mdc/hand",
    mdc_loss(torch.tensor([[math.log(3), 0.0, math.log(7)]]), torch.tensor([[True, True, False]])),
    (math.log(4 / 3) + math.log(2) + math.log(8)) / 3,
    "The first tag is there with probability 3/4: ln(4/3). The second is undecided: ln 2. The third is "
    "given 7/8 though it is not there: ln 8. Their mean.",
)
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(61)
logits = 3 * torch.randn(5, 7, generator=draw)
there = torch.rand(5, 7, generator=draw) < 0.4
yes = torch.sigmoid(logits.double())
wanted = -torch.where(there, yes, 1 - yes).log().mean()
assert abs(float(mdc_loss(logits.clone(), there.clone())) - float(wanted)) < 1e-4
nothing = torch.zeros(3, 4, dtype=torch.bool)
assert abs(float(mdc_loss(torch.zeros(3, 4), nothing)) - 0.693147) < 1e-4, "a page may have no tag"
### END HIDDEN TESTS

# %% check="mdc" aspect="law" points=1 title="each tag by itself: its gradient is sigmoid minus truth"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(62)
logits = torch.randn(4, 3, generator=draw).requires_grad_()
there = torch.rand(4, 3, generator=draw) < 0.5
wanted = (torch.sigmoid(logits.detach()) - there.float()) / 12
loss = mdc_loss(logits, there)
loss.backward()
assert torch.allclose(logits.grad, wanted, atol=1e-6)
order = torch.tensor([2, 0, 1])
again = mdc_loss(logits.detach()[:, order], there[:, order])
assert abs(float(again) - loss.item()) < 1e-5, "the order of tags makes no difference"
assert abs(float(mdc_loss(-logits.detach(), ~there)) - loss.item()) < 1e-5, "yes and no are alike"
### END HIDDEN TESTS

# %% check="mdc" aspect="overflow" points=1 title="survives logits of a thousand"
import torch
from mmlearn.feedback import expect

expect(
    "w05_layoutlm/mdc/loud",
    mdc_loss(torch.tensor([[-200.0, -200.0]]), torch.tensor([[True, False]])),
    100.0,
    "The first tag is there and was given e to the -200: 200 nats. The second costs nothing.",
)
### BEGIN HIDDEN TESTS
import torch

logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 500.0]], requires_grad=True)
loss = mdc_loss(logits, torch.tensor([[True, False], [True, False]]))
assert abs(loss.item() - 375.0) < 0.01, "(0 + 0 + 1000 + 500) / 4"
loss.backward()
assert torch.isfinite(logits.grad).all()
### END HIDDEN TESTS


# %% wrong="mdc" name="softmax" says="Your tags compete: a softmax gives one unit of probability to share, but a page may have three tags or none. Use a sigmoid for each."
def mdc_loss(logits_BC, tags_BC):
    shares = F.log_softmax(logits_BC, dim=-1)
    return -(shares * tags_BC).sum(dim=-1).div(tags_BC.sum(dim=-1).clamp(min=1)).mean()


# %% wrong="mdc" name="present_only" says="You count only the tags that are there. Saying yes to everything would then be perfect: the absent ones count, too."
def mdc_loss(logits_BC, tags_BC):
    return -(F.logsigmoid(logits_BC) * tags_BC).sum() / tags_BC.sum().clamp(min=1)


# %% wrong="mdc" name="sums_tags" says="You summed over the tags. Take the mean over pages and tags, or the loss grows with the number of tags."
def mdc_loss(logits_BC, tags_BC):
    return -F.logsigmoid(torch.where(tags_BC, logits_BC, -logits_BC)).sum(dim=-1).mean()


# %% wrong="mdc" name="overflows" says="The logarithm of a sigmoid that has become 0 is minus infinity. Compute both at once, with F.logsigmoid."
def mdc_loss(logits_BC, tags_BC):
    yes = torch.sigmoid(logits_BC)
    return -torch.where(tags_BC, yes, 1 - yes).log().mean()


# %% wrong="mdc" name="flipped" says="Your signs are the wrong way round: you punish the tags that are there."
def mdc_loss(logits_BC, tags_BC):
    return -F.logsigmoid(torch.where(tags_BC, -logits_BC, logits_BC)).mean()


# %% [markdown]
# Our pages get seven tags: four kinds, and whether a page names a day to pay, a quantity, a tax.
# How much of that shows without reading a word? We replace all words by [MASK], or all boxes by
# zeros, in training and in the test. **Predict** the F1 for boxes alone, on layouts never seen.


# %%
class PageTagger(nn.Module):
    """Say which tags a page has, from the state of [CLS]."""

    def __init__(self, vocab_size, num_tags):
        super().__init__()
        self.reader = PageModel(vocab_size, num_tags)

    def forward(self, batch):
        return self.reader.tagger(self.reader.states(batch)[:, 0])


# %% tags=["experiment"]
def page_tags(pages):
    kinds = F.one_hot(pages.labels, 4).bool()
    facts = ("B-DUE_DATE", "B-QUANTITY", "B-TAX")
    numbers = [pages.tag_names.index(name) for name in facts]
    holds = [[bool((tags == number).any()) for number in numbers] for tags in pages.tags]
    return torch.cat([kinds, torch.tensor(holds)], dim=1)


def seen_as(batch, what):
    """Hide the words, the boxes, or neither."""
    if what == "boxes":
        return batch._replace(
            input_ids=torch.where(batch.word_index >= 0, tokenizer.mask_token_id, batch.input_ids)
        )
    return batch._replace(bbox=batch.bbox * 0) if what == "words" else batch


# %% tags=["experiment"]
def train_page_tagger(what, seed):
    set_seed(seed)
    model, wanted = PageTagger(1000, 7), page_tags(train_pages)

    def loss(model, step):
        batch, rows = step
        return mdc_loss(model(seen_as(batch, what)), wanted[rows.cpu()].to(device))

    stream = batches(encoded["train", "shuffled"], 8, seed)
    fit(model, stream, loss, steps=80, lr=8e-3, device=device, progress=False)
    return model


tag_scores, truth = {}, page_tags(unseen_pages)
for what in ("words", "boxes", "both"):
    for seed in SEEDS:
        model = train_page_tagger(what, seed)
        with torch.no_grad():
            batch = move(encoded["new", "shuffled"].batch, device)
            said = (model.eval()(seen_as(batch, what)) > 0).cpu()
        per_tag = 2 * (said & truth).sum(dim=0) / (said.sum(dim=0) + truth.sum(dim=0)).clamp(min=1)
        tag_scores.setdefault(what, []).append(per_tag)
for what, rows in tag_scores.items():
    print(f"{what:6} mean F1 of seven tags, new layouts: {mean_and_spread(r.mean() for r in rows)}")

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(8, 3))
names = [*documents.CLASS_NAMES, "day to pay", "quantity", "tax"]
for i, (what, colour) in enumerate((("words", GREY), ("boxes", BLUE), ("both", GREEN))):
    means = torch.stack(tag_scores[what]).mean(dim=0)
    axis.bar(torch.arange(7) + 0.27 * (i - 1), means, 0.25, color=colour, alpha=0.6, label=what)
axis.set_xticks(range(7), names)
axis.set(ylabel="F1, layouts never seen", ylim=(0, 1.25), yticks=[0, 0.5, 1])
axis.set_title("Boxes alone, not one word read, tell much about a page")
axis.legend(ncols=3)
show(
    figure,
    "kinds",
    """F1 of seven page tags for words only, boxes only and both. Boxes alone
    find receipts and forms, which words in no order hardly tell apart; words are better at letters.""",
)

# %% [markdown]
# *What to see.* The shape of a page tells its kind, as it does to you from across the room: on
# layouts never seen, boxes without a word do as well as words in no order, or better. Letters are
# known by their words (*Dear*), receipts and forms by their shape; both together are best on
# average.
#
# ## 10. Is this LayoutLM?
#
# `mmlearn.layoutlm` has the same parts at LayoutLM's own sizes. We take a small random model of the
# `transformers` library, load its weights into `mmlearn`'s model and into *your* tables, and
# compare.

# %% tags=["experiment"]
from mmlearn import layoutlm, pages as reference
from torchvision.ops import roi_align
from transformers import LayoutLMConfig, LayoutLMModel

set_seed(SEED)
sizes = {"hidden_size": 60, "num_attention_heads": 5, "intermediate_size": 90}
theirs = LayoutLMModel(LayoutLMConfig(vocab_size=1000, num_hidden_layers=2, **sizes)).eval()
ours = layoutlm.LayoutLM.from_hf(theirs)
batch = encode(test_pages, tokenizer, steps=1000).batch
with torch.no_grad():
    expected = theirs(batch.input_ids, batch.bbox, attention_mask=batch.attention_mask.long())
    difference = (ours(*batch[:3]) - expected.last_hidden_state)[batch.attention_mask].abs().max()
print(f"mmlearn's LayoutLM differs from transformers' by at most {difference:.0e}")

# %% tags=["experiment"]
table, yours = theirs.embeddings, PlaceEmbedding(1023, 60)
yours.load_state_dict(
    {f"{name}.weight": getattr(table, f"{name}_position_embeddings").weight for name in "xyhw"}
)
with torch.no_grad():
    words = table.word_embeddings(batch.input_ids)
    order = (
        table.position_embeddings.weight[: words.shape[1]] + table.token_type_embeddings.weight[0]
    )
    mine = table.LayerNorm(words + order + yours(batch.bbox))
    difference = (mine - table(batch.input_ids, batch.bbox)).abs().max()
print(f"your places, in transformers' embedding: {difference:.0e}")
sure = torch.randn(9, 5) * 4
there = torch.rand(9, 5) < 0.5
difference = mdc_loss(sure, there) - F.binary_cross_entropy_with_logits(sure, there.float())
print(f"your loss of tags against PyTorch's: {difference.abs():.0e}")

# %% tags=["experiment"]
corners = torch.rand(500, 2, 2).sort(dim=1).values.flatten(1) * torch.tensor([449, 985, 449, 985])
same = [
    normalise_box(box, 449, 985) == reference.normalize_box(box, 449, 985)
    for box in corners.int().tolist()
]
print(f"your boxes equal mmlearn's: {sum(same)} of {len(same)}")
draw, special = torch.Generator().manual_seed(SEED), tokenizer.special_token_ids
yours = hide_words(batch.input_ids, special, tokenizer.mask_token_id, 1000, 0.15, draw)
theirs_too = reference.mask_words(batch.input_ids, tokenizer, draw)
for name, (ids, labels) in (("yours", yours), ("mmlearn's", theirs_too)):
    asked, masked = (labels != -100).sum(), (ids == tokenizer.mask_token_id).sum()
    print(f"hidden by {name:9}: {asked} of {(batch.word_index >= 0).sum()} tokens, {masked} masked")
features, whole = torch.randn(1, 8, 14, 14), torch.tensor([[[100, 50, 600, 350]]])
aligned = roi_align(features, [whole[0] * 0.014], 5, sampling_ratio=8, aligned=True).mean(
    dim=(2, 3)
)
difference = (region_mean(features, whole, 1000)[0] - aligned).abs().max()
print(f"your region against RoI align on noise: {difference:.2f}, it smooths between cells")

# %% [markdown]
# RoI align reads the map as a surface and samples it between the cells' centres, you integrate it
# as flat tiles. For boxes of whole cells the two agree, as your check showed. The wiring is
# LayoutLM's; its sizes are 12 layers of 768 and 113 million parameters.
#
# ### On real receipts
#
# Generated pages are what their author made them. `tests/real/receipts.py` runs *this notebook's*
# code on 120 scanned receipts of SROIE, words and boxes from the scan, 96 to train on and 24 to
# test:
#
#     python tests/real/receipts.py
#
# Over three seeds, in reading order, words alone reach an entity F1 of about 0.47 and tables of
# places about 0.57. In no order, words alone fall to about 0.13 and tables bring back about 0.46.
# And distances, the winners above? About 0.51 in order and only 0.27 without, with a large spread:
# probably 96 receipts and 250 steps are too few to learn them, while the top of a receipt is the
# top of every receipt. So the ranking of sections 5 and 6 is one of *our* pages, with many words
# beside keywords and 1,200 labels. The total stays hard for all: its tag was matched by its text
# and may stand at one of several equal amounts. With 24 receipts to test on, a few points mean
# nothing.
#
# ## 11. What came after: v2 and v3
#
# | | LayoutLM (2020) | LayoutLMv2 (2021) | LayoutLMv3 (2022) |
# |---|---|---|---|
# | places | six rows, added up | six rows, side by side, and biases on distances, one set for all layers | as v2, with boxes of whole text segments |
# | picture | region features, added after the encoder, for fine-tuning only | tokens from a CNN, in pre-training, too | tokens from plain patches, no CNN |
# | pre-training | MVLM, MDC | MVLM, text-image alignment, text-image matching | masked words, masked patches, word-patch alignment |
# | FUNSD, best F1 reported | 0.79 | 0.84 | 0.92, see below |
#
# The tasks in a line each. *Text-image alignment*: some lines of the picture are covered; was this
# word's? *Text-image matching*: do picture and words belong to one page? *Masked patches*: guess
# the hidden patch's entry in a codebook. *Word-patch alignment*: is the patch behind this word
# hidden?
#
# The last column is not like for like. On FUNSD, v3 takes its segment boxes from the annotation, so
# words of one entity arrive with one and the same box. That gives away where entities begin and
# end. And before you build on any of them, read the licence of the *weights*: v1's are
# MIT, those of v2 and v3 are for non-commercial use.

# %% [markdown]
# ## Questions to answer in your own words
#
# These two are read by a person. A few sentences each.

# %% [markdown] written="order" points=2
# **A vendor shows that its model gains 20 points of F1 from layout on your invoices. Which two
# questions do you ask about the test before you believe that it reads layouts, and which numbers of
# this notebook make you ask?**
#
# ### BEGIN SOLUTION
# First: in what order did the words come to the model without layout? Reading order carries much of
# the layout. In our runs words alone scored about 0.8 in reading order and below 0.4 in none, so
# against shuffled or badly sorted words any layout model shines. Second: are the layouts of the
# test pages in the training set? Tables of places scored about 0.9 on known layouts and less than
# half of that on new ones, in reading order even less than words alone: they had learned the
# templates by heart.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: asks for the reading order of the baseline's words, with the numbers with and without
#   order.
# - 1 point: asks whether test layouts (suppliers, templates) were in training, with the numbers for
#   known and new layouts.
# ### END MARK SCHEME

# %% [markdown] written="mvlm" points=2
# **Why does MVLM leave the box of a hidden word in place? What would the model learn if the box
# were hidden, too, and what could it learn if only the box were hidden?**
#
# ### BEGIN SOLUTION
# With the box in place the model must answer "what stands here, beside these words?", which ties
# places to kinds of words: right of a keyword, at the end of a column. If the box were hidden as
# well, the model would not even know which of the gaps it is asked about, and could only guess from
# the bag of words and the order, as BERT does; places would not be trained by this word. If only
# the box were hidden, it would have to guess where a known word stands, which teaches layout from
# words, the reverse direction; Saha et al. 2021 (arXiv 2109.00442) report that it helps on forms.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: the place is the evidence from which the word is guessed; hiding it leaves ordinary
#   masked language modelling.
# - 1 point: the reverse task, guessing a place from a word, or another workable use of hidden
#   boxes.
# ### END MARK SCHEME

# %% [markdown]
# ## Go bigger
#
# With `SCALE = "gpu"` this cell fine-tunes `mmlearn`'s LayoutLM with 1,000 steps of box. With
# `DATA = "hub"` it takes the published weights and FUNSD's scanned forms; otherwise a new model of
# six layers and 8,000 of our pages in no order, judged on layouts never seen.


# %% tags=["experiment"]
def go_bigger(model, tokenizer, train, test, shuffled, steps, size, lr, max_length=512):
    """Fine-tune mmlearn's LayoutLM on tagged pages and return its entity F1 on others."""
    train, test = (encode(pages, tokenizer, shuffled, 1000, max_length) for pages in (train, test))

    def loss(model, step):
        batch, _ = step
        return model(*batch[:3], labels=batch.labels).loss

    stream = batches(train, size, SEED)
    run = fit(model, stream, loss, steps=steps, lr=lr, weight_decay=0.01, device=device)

    class Reader(nn.Module):  # what `predict` calls, a few pages at a time
        def forward(self, batch):
            rows = zip(*(column.split(16) for column in batch[:3]))
            return torch.cat([model(*part).logits for part in rows])

    return score(Reader(), test), run


# %% tags=["experiment"]
def published(label_names):
    """Return LayoutLM-base as published, with a new head, and its tokenizer."""
    from transformers import LayoutLMForTokenClassification

    name = "microsoft/layoutlm-base-uncased"
    theirs = LayoutLMForTokenClassification.from_pretrained(name, num_labels=len(label_names))
    return layoutlm.LayoutLMForTokenClassification.from_hf(theirs), WordPieceTokenizer.from_hf(name)


# %% tags=["experiment"]
if SCALE == "gpu":
    if DATA == "hub":
        forms = [documents.load(s, source="hub", tagging="bio") for s in ("train", "test")]
        big, big_tokenizer = published(forms[0].tag_names)
        f1, run = go_bigger(big, big_tokenizer, *forms, False, steps=1_000, size=16, lr=5e-5)
    else:
        forms = [documents.load("train", size=8_000, tagging="bio"), unseen_pages]
        config = layoutlm.LayoutLMConfig(
            1000, 160, d_model=256, num_layers=6, num_heads=8, d_ff=1024, init_std=0.05
        )
        config = replace(config, label_names=tuple(forms[0].tag_names))
        big = layoutlm.LayoutLMForTokenClassification(config)
        f1, run = go_bigger(
            big, tokenizer, *forms, True, steps=4_000, size=32, lr=5e-4, max_length=160
        )
    print(f"{forms[1].name}: entity F1 {f1:.3f} after {run.seconds:.0f} s")
else:
    print("SCALE is 'cpu': set it to 'gpu' in the first cells to run this part.")

# %% [markdown]
# ## What was new
#
# | idea | in one line | where it stands in `mmlearn` |
# |---|---|---|
# | boxes in thousandths | a page of any size becomes rows 0 to 1000 of a table | `pages.normalize_box` |
# | 2-D positions | six learned rows, four tables, both corners share one | `layoutlm.LayoutEmbedding` |
# | entities | judged whole, 2r / (f + w) over all pages | |
# | MVLM | hide the word, keep its box | `pages.mask_words`, `layoutlm.LayoutLMForMaskedLM` |
# | region features | a feature map averaged behind each word, added after the encoder | `layoutlm.RegionEmbedding` |
# | MDC | many tags, a sigmoid for each, from [CLS] | `layoutlm.LayoutLMForSequenceClassification` |
# | distances | a bias on how far right and below, the same everywhere | `layoutlm.RelativeLayoutBias` |
#
# **Beside the paper.** The paper's table of FUNSD results has BERT-large at F1 0.656, RoBERTa-large
# at 0.707, both words only, and LayoutLM at 0.793 (Xu 2020, section 3). Both read the words in the
# order of the data set, so this gain is places, pictures and pre-training on 11 million pages
# together. Ours, without pre-training, is a gain in reading order on known layouts and a *loss* on
# new ones. The reason is the number of layouts: millions cannot be learned by heart, twelve can.
# Where both agree: pre-training on pages without labels helps, and most where labels are few.

# %% [markdown]
# ## Interview questions
#
# <details><summary><b>Explain LayoutLM in a minute.</b></summary>
#
# BERT-base whose input has, besides word and order, the word's place on the page: its box in
# thousandths, as six learned rows out of four tables (x and y shared by both corners; height and
# width), all added up. Starting from BERT's weights, it was pre-trained on 11 million scanned pages
# with MVLM, guessing 15% hidden tokens while their boxes stay; a second task, MDC, asks [CLS] for
# the archive's tags, with a sigmoid each. For fine-tuning, region features of the picture may be
# added to the encoder's output. Best results: FUNSD F1 0.7927, SROIE 0.9524, RVL-CDIP accuracy
# 94.42% (Xu 2020, abstract; not one and the same model). The released base, words and boxes only,
# has 113 million parameters.
#
# *Often said wrongly:* that it looks at the page. The published weights take words and boxes; they
# need OCR, and no picture was seen in pre-training (v2 began that). Also wrong: that 2-D positions
# *replace* the order; both are there. And that positions are relative: they are absolute, distances
# came with v2.
#
# </details>
# <details><summary><b>Does layout help? When would you leave it out?</b></summary>
#
# It tells what stands beside what. If the words come in reading order, part of that is in the order
# already: in our runs tables of places added some points on known layouts and cost some on new
# ones. If the order is lost, tables, columns, bad OCR, places are everything: entity F1 from below
# 0.4 to nearly 0.9. Absolute places learn templates by heart; on new templates they fell to about
# 0.43, biases on distances kept nearly 0.9. So test with new suppliers, and with shuffled words.
#
# *Often said wrongly:* "layout adds N points", without saying in which order the words came and
# whether the templates were known.
#
# </details>
# <details><summary><b>What did LayoutLMv2 and v3 change, and which comparison would you not trust?</b></summary>
#
# v2: picture tokens of a CNN join the words in pre-training, six rows of place stand side by side
# instead of being added up, all layers share learned biases on distances in x, y and order, and two
# more tasks tie picture and text (Xu 2021, section 2). FUNSD 0.7895 to 0.8420 (abstract). v3:
# patches instead of the CNN, masked words *and* patches, word-patch alignment (Huang 2022,
# abstract). FUNSD 0.92 with large, but with boxes of whole annotated segments, which group the
# words of an entity; do not set that beside word-level boxes.
#
# *Often said wrongly:* that fine-tuning v2 or v3 in `transformers` (5.23) tunes the distance
# biases. It reads them without gradient, so they stay as they were pre-trained; the authors' code
# trains them.
#
# </details>
# <details><summary><b>Your extraction model scores 0.95 offline and fails for a new supplier. What do you do?</b></summary>
#
# First look whether test and training share suppliers: split by supplier, not by page, and the 0.95
# will probably shrink. Then move and swap boxes at test time, to see whether the model leans on
# absolute places: a shift of 4% of the page should cost nothing. Remedies: a model with distance
# biases; pre-training on unlabelled pages of many suppliers; a few labelled pages of the new one.
# In our runs the distances alone closed most of the gap.
#
# </details>
# <details><summary><b>A page has 1,500 words, and the OCR is poor. What happens in LayoutLM?</b></summary>
#
# It reads 512 tokens, [CLS] and [SEP] included; the rest is cut off, in `encode_pages` as
# elsewhere. So one cuts the page into windows that overlap, by blocks rather than by count, and
# joins the answers. Boxes stay those of the whole page. OCR decides three things at once: the words
# (a wrong letter breaks a word into pieces or makes it [UNK]), the boxes, and the order, which is
# an input as well. Pre-trained on OCR, the model is used to some of that. Without any OCR work
# models such as Donut (Kim 2022), which write the fields straight from the picture.
#
# *Often said wrongly:* that each piece of a word needs a label. One label a word, on its first
# piece; the others get −100, or long words would count more.
#
# </details>

# %% [markdown]
# ## Papers
#
# - Xu et al. 2020, [LayoutLM: Pre-training of Text and Layout for Document Image
#   Understanding](https://arxiv.org/abs/1912.13318): section 2 (2-D positions, image embedding,
#   MVLM, MDC), section 3 (boxes, results).
# - Xu et al. 2021, [LayoutLMv2: Multi-modal Pre-training for Visually-rich Document
#   Understanding](https://arxiv.org/abs/2012.14740): section 2.1 (distances, picture tokens).
# - Huang et al. 2022, [LayoutLMv3: Pre-training for Document AI with Unified Text and Image
#   Masking](https://arxiv.org/abs/2204.08387): abstract (the three tasks).
# - Devlin et al. 2019, [BERT](https://arxiv.org/abs/1810.04805): section 3.1 (masking 15%,
#   80/10/10).
# - Raffel et al. 2020, [T5](https://arxiv.org/abs/1910.10683): section 2.1 (buckets of distances).
