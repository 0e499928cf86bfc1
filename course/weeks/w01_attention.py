# %% [markdown]
# # Week 1. How does a token look at other tokens?
#
# A transformer reads one row of tokens. A token may be a word, a patch of a picture, a slice of
# sound: the model does not care, as long as each is a vector. What makes the row more than a heap
# is **attention**: each token decides which other tokens it takes from, and how much.
#
# This week you build that step by step, from one formula to a small model that reads a question
# word and a row of pictures in one sentence, and answers. It trains in seconds, on your code.
#
# **You will be able to**
#
# - write scaled dot-product attention, masks, several heads, a block and a training loop from
#   memory;
# - say why the scores are divided by $\sqrt K$, why the norm stands before the sublayer, and what a
#   longer sequence costs, with numbers that you measured;
# - check an attention layer by laws that must hold, before you trust its training.
#
# Plan for 90 to 120 minutes. You need Python, tensors and `nn.Module`. Computing takes about a
# minute in all.

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"  # "cuda" for a GPU, "auto" for the best there is
SCALE = "cpu"  # "gpu" runs the larger experiment at the end in full
DATA = "embedded"  # "hub" fetches MNIST instead of scikit-learn's digits

# %% [markdown]
# **How a week works.** Run the cells from top to bottom. Where you see `# YOUR CODE HERE`, write;
# the cell below checks you and, for mistakes that many people make, tells you which one it was.
# Grading asks for more than you see. Before a result, you are asked for a prediction: write it
# down, being wrong is how the number sticks.

# %%
import math
import time
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmlearn.train import choose_device, set_seed

torch.set_num_threads(1)  # these tensors are tiny: more threads would only wait for each other
device = choose_device(DEVICE)

# %% tags=["experiment", "hide-input"]
import matplotlib.pyplot as plt

from mmlearn.figures import BLUE, GREEN, GREY, ORANGE, RED, set_style, show

set_style()

# %% [markdown]
# ## 1. A sentence with pictures in it
#
# Our sentences look like this: a question word, then two or three handwritten digits, each cut into
# four patches. The question is `first`, `last` or `largest`; the answer is a digit.
#
# The pictures are real: scikit-learn's scans, 8 by 8 pixels. The test set holds forms filled in by
# people whose handwriting is not in the training set.

# %%
QUESTIONS = ("first", "last", "largest")


class Batch(NamedTuple):
    """B sentences of L tokens, filled up to the same length."""

    words: Tensor  # [B]: which question
    patches: Tensor  # [B, L-1, pixels]: the pictures' patches in a row, zeros at padding
    is_token: Tensor  # [B, L]: False at padding
    answers: Tensor  # [B]: the digit that is asked for
    shown: Tensor  # [B, pictures]: all digits of the sentence, -1 where there is no picture


def cut(images, side):
    """Cut each picture into squares, row by row, and flatten them."""
    return rearrange(images, "n c (h p) (w q) -> n (h w) (c p q)", p=side, q=side)


# %% [markdown]
# Sentences differ in length, tensors do not: a sentence with two pictures is filled up with zeros,
# and `is_token` remembers where. Each batch is drawn anew from 1,287 pictures, so no sentence is
# likely to be seen twice. The class below is plumbing: skim it, and go on to what it prints.


# %%
class Sentences:
    """Draw questions about rows of two to `most` pictures."""

    def __init__(self, dataset, side=4, most=3):
        self.patches, self.labels = cut(dataset.images, side).to(device), dataset.labels.to(device)
        self.most = most

    def draw(self, count, generator):
        rows = torch.randint(len(self.labels), (count, self.most), generator=generator)
        pictures = torch.randint(2, self.most + 1, (count, 1), generator=generator)
        words = torch.randint(len(QUESTIONS), (count, 1), generator=generator).to(device)
        present = (torch.arange(self.most) < pictures).to(device)
        shown = self.labels[rows.to(device)].masked_fill(~present, -1)
        last = shown.gather(1, pictures.to(device) - 1)
        answers = torch.cat([shown[:, :1], last, shown.amax(dim=1, keepdim=True)], dim=1)
        patches = self.patches[rows.to(device)] * present[:, :, None, None]
        is_patch = present.repeat_interleave(patches.shape[2], dim=1)
        is_token = torch.cat([torch.ones_like(is_patch[:, :1]), is_patch], dim=1)
        answers = answers.gather(1, words)[:, 0]
        return Batch(words[:, 0], patches.flatten(1, 2), is_token, answers, shown)

    def stream(self, batch_size, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(batch_size, generator)


# %% tags=["experiment"]
from mmlearn.data import digits

train_sentences = Sentences(digits.load("train", source=DATA))
test_sentences = Sentences(digits.load("test", source=DATA))
few = train_sentences.draw(6, torch.Generator().manual_seed(SEED + 13))
for word, shown, answer in zip(few.words, few.shown.tolist(), few.answers):
    pictures = " ".join(f"[picture of a {digit}]" for digit in shown if digit >= 0)
    print(f"{QUESTIONS[word]} {pictures} -> {answer}")


# %% tags=["experiment"]
def draw_token(ax, batch, row, position):
    """Draw one token: the word, a patch, or grey padding."""
    ax.set(xticks=[], yticks=[], xlabel=position, box_aspect=1)
    ax.spines[:].set_visible(True)
    if position == 0:
        ax.text(0.5, 0.5, QUESTIONS[batch.words[row]], ha="center", va="center", color=BLUE)
    elif batch.is_token[row, position]:
        patch = batch.patches[row, position - 1].view(4, 4).cpu()
        ax.imshow(patch, cmap="gray_r", vmin=0, vmax=1)
    else:
        ax.set_facecolor("#CCCCCC")


# %% tags=["experiment", "hide-input"]
figure = plt.figure(figsize=(10, 2.1))
columns = [0, *(1.35 + n + 0.35 * (n // 4) for n in range(12))]  # a gap before each picture
lengths = few.is_token.sum(dim=1)
for line, row in enumerate((int(lengths.argmax()), int(lengths.argmin()))):
    for position, left in enumerate(columns):
        place = (left / 14.2, 0.52 - 0.46 * line, 0.9 / 14.2, 0.36)
        draw_token(figure.add_axes(place), few, row, position)
title = "One sequence, two modalities: a word, then four patches for each picture (grey: padding)"
figure.suptitle(title, y=1.05)
figure.text(0.5, -0.06, "position in the sequence", ha="center")
alt = """Two rows of 13 boxes. Box 0 holds a word. Boxes 1 to 12 hold patches of 4 by 4 pixels; every
four of them are one digit. In the lower row the last four boxes are grey padding."""
show(figure, "sentence", alt)

# %% [markdown]
# *What to see.* Positions 1 to 4 are the first picture: upper left, upper right, lower left, lower
# right. The model gets exactly this row and nothing else: neither which patches belong together,
# nor that position 0 is a word.
#
# > **Predict.** The answer will be read from the word's position. How often will a model be right
# > whose word (a) sees only itself, (b) gets the average of all tokens, (c) may choose what to
# > take? Guess three percentages. Ten digits; `largest` is not uniform.
#
# ## 2. Attention: choosing what to average
#
# The naive way to let a token know its sentence is to give it the average of all tokens. It costs
# almost nothing, and it is the same for every token and every question: whatever the word, `first`
# gets what `last` gets.


# %%
def average(queries, keys, values, mask):
    """The naive way: whatever may be seen counts the same."""
    weights = mask.expand(*queries.shape[:-1], -1).to(values.dtype)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights @ values, weights


# %% [markdown]
# The better way keeps the average but lets each token choose its weights. From every token three
# vectors are made: a **query** (what do I look for?), a **key** (what do I offer?) and a **value**
# (what do I pass on?). The score of token $i$ for token $j$ is the dot product $q_i \cdot k_j$;
# softmax turns a row of scores into weights that sum to one:
#
# $$ \mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{K}}\right) V $$
#
# Under the root, $K$ is the width of a key (the paper's $d_k$). Why it is there is section 3; here,
# just divide.

# %% [markdown] exercise="attention" difficulty=2 minutes=15
# ### Exercise 1. Attention
#
# Write the formula. Where a mask is given, `True` means *may attend*: a key that may not be seen
# gets the weight 0, and the others in its row still sum to 1.
#
# | argument | shape |
# |---|---|
# | `queries` | `[..., L, K]` |
# | `keys` | `[..., S, K]` |
# | `values` | `[..., S, Kv]` |
# | `mask` | boolean, broadcasts to `[..., L, S]` |
# | returns | the mixed values `[..., L, Kv]` and the weights `[..., L, S]` |
#
# *Afterwards you can say:* "Attention is a weighted average of values; the weights are a softmax
# over **keys** of scaled dot products. Masked scores become minus infinity **before** the softmax,
# so that the rest still sums to one."
#
# <details><summary>Hint 1: the shapes</summary>
#
# `queries @ keys.transpose(-2, -1)` has the shape `[..., L, S]`: one row for each query. Which axis
# must sum to one?
#
# </details>
# <details><summary>Hint 2: the mask</summary>
#
# $e^{-\infty} = 0$. `tensor.masked_fill(where, value)` fills where `where` is `True`; you want to
# fill where attending is *not* allowed.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     scores = queries times keys transposed, divided by the root of the key width
#     if there is a mask: scores = minus infinity where not mask
#     weights = softmax of scores over the last axis
#     return weights times values, weights
#
# </details>


# %% answer="attention"
def attention(queries, keys, values, mask=None):
    """Mix the values, weighted by how well each key answers each query."""
    ### BEGIN SOLUTION
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ values, weights
    ### END SOLUTION


# %% check="attention" aspect="example" points=2 title="numbers you can work by hand"
import math
import torch
from mmlearn.feedback import expect

log3 = math.log(3)
asked = torch.tensor([[log3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
offered = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
passed_on = torch.tensor([[4.0, 0.0, 0.0], [0.0, 8.0, 0.0]])
expect(
    "w01_attention/attention/hand",
    attention(asked, offered, passed_on),
    (torch.tensor([[3.0, 2.0, 0.0], [2.0, 4.0, 0.0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])),
    "K is 4, so the first query's scores are log 3 and 0: weights 3/4 and 1/4, values 3 and 2. "
    "Return the mixed values and the weights.",
)
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(1)
q, k, v = (torch.randn(2, 3, *size, generator=generator) for size in ((5, 4), (7, 4), (7, 6)))
right = torch.nn.functional.scaled_dot_product_attention(q, k, v)
mixed, shares = attention(q, k, v)
assert mixed.shape == (2, 3, 5, 6), "the mixed values have the shape [..., L, Kv]"
assert shares.shape == (2, 3, 5, 7), "the weights have the shape [..., L, S]"
assert torch.allclose(mixed, right, atol=1e-5), "it equals PyTorch's own"
assert torch.allclose(shares.sum(dim=-1), torch.ones(2, 3, 5), atol=1e-5), "rows sum to one"
### END HIDDEN TESTS

# %% check="attention" aspect="masks" points=1 title="what is masked has no weight, and the rest sums to one"
import math
import torch
from mmlearn.feedback import expect

asked = torch.tensor([[math.log(3), 0.0, 0.0, 0.0]])
offered = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
expect(
    "w01_attention/attention/masked",
    attention(asked, offered, torch.eye(3), torch.tensor([[True, True, False]])),
    (torch.tensor([[0.75, 0.25, 0.0]]), torch.tensor([[0.75, 0.25, 0.0]])),
    "The third key may not be seen: the other two share the weight 3 to 1, and it gets exactly 0.",
)
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(2)
q, k, v = (torch.randn(2, 3, *size, generator=generator) for size in ((4, 5), (6, 5), (6, 7)))
visible = torch.rand(2, 1, 4, 6, generator=generator) < 0.6
visible[..., 0] = True
right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
mixed, shares = attention(q, k, v, visible)
assert torch.allclose(mixed, right, atol=1e-5), "with a mask for all heads it equals PyTorch's own"
assert (shares.masked_select(~visible.expand(2, 3, 4, 6)) == 0).all(), (
    "masked weights are exactly 0"
)
hidden = torch.tensor([True, True, True, True, False, False])
louder = torch.where(hidden[:, None], v, 1e6 * v)
kept, loud = attention(q, k, v, hidden)[0], attention(q, k, louder, hidden)[0]
assert torch.allclose(kept, loud, atol=1e-5), "a masked value has no influence, however large"
### END HIDDEN TESTS

# %% check="attention" aspect="laws" points=1 title="permutations, gradients, and your inputs left alone"
import torch
from mmlearn.feedback import expect

untouched = torch.full((2, 4), 6.0)
attention(untouched, torch.ones(3, 4), torch.ones(3, 5))
expect(
    "w01_attention/attention/inputs",
    untouched,
    torch.full((2, 4), 6.0),
    "The call changed the queries it was given.",
)
### BEGIN HIDDEN TESTS
import torch

generator = torch.Generator().manual_seed(3)
q, k, v = (torch.randn(2, *size, generator=generator) for size in ((3, 6), (5, 6), (5, 4)))
before = [tensor.clone() for tensor in (q, k, v)]
mixed, shares = attention(q, k, v)
assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v))), "the inputs were changed in place"
order = torch.tensor([3, 0, 4, 2, 1])
again, moved = attention(q, k[:, order], v[:, order])
assert torch.allclose(again, mixed, atol=1e-5), "the order of keys and values makes no difference"
assert torch.allclose(moved, shares[..., order], atol=1e-5), "the weights move with their keys"
turn = torch.tensor([2, 0, 1])
turned = attention(q[:, turn], k, v)[0]
assert torch.allclose(turned, mixed[:, turn], atol=1e-5), "each query is answered by itself"
assert (mixed <= v.amax(dim=1, keepdim=True) + 1e-5).all(), "an average is never above all values"
mine = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
theirs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
attention(*mine)[0].square().sum().backward()
torch.nn.functional.scaled_dot_product_attention(*theirs).square().sum().backward()
assert all(torch.allclose(a.grad, b.grad, atol=1e-4) for a, b in zip(mine, theirs)), "gradients"
### END HIDDEN TESTS

# %% check="attention" aspect="numbers" points=1 title="very large scores, half and double precision"
import torch
from mmlearn.feedback import expect

expect(
    "w01_attention/attention/loud",
    attention(100 * torch.eye(2), 100 * torch.eye(2), torch.eye(2))[1],
    torch.eye(2),
    "Scores of 7,071 and 0 have the weights 1 and 0, and no overflow.",
)
### BEGIN HIDDEN TESTS
import torch

loud = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
mixed, shares = attention(loud, loud, torch.eye(2))
assert torch.equal(shares, torch.eye(2)), "large scores must not overflow"
generator = torch.Generator().manual_seed(4)
q, k, v = (torch.randn(3, 4, generator=generator) for _ in range(3))
triangle = torch.ones(3, 3, dtype=torch.bool).tril()
fine = attention(q.double(), k.double(), v.double(), triangle)
assert fine[0].dtype == fine[1].dtype == torch.float64, "double precision stays double"
coarse = attention(q.half(), k.half(), v.half(), triangle)
assert coarse[0].dtype == torch.float16, "half precision stays half"
assert torch.allclose(coarse[0].double(), fine[0], atol=5e-3), "half precision works with a mask"
### END HIDDEN TESTS


# %% wrong="attention" name="wrong_axis" says="Your softmax runs down the columns, over the queries. Each query shares out its own weight: the softmax goes over the keys, the last axis."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-2)
    return weights @ values, weights


# %% wrong="attention" name="no_scaling" says="Your scores are not divided by the root of the key width, so the softmax is too sharp: compare your scores with q times k divided by the root of K."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% wrong="attention" name="divides_by_width" says="You divide by K. It is the standard deviation of a dot product that grows like the root of K, so divide by the root."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / queries.shape[-1]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% wrong="attention" name="divides_by_length" says="You divide by the root of the number of keys. Dot products grow with the width of a key, its last axis, not with the length of the sequence."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(keys.shape[-2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% wrong="attention" name="mask_inverted" says="Your mask works the other way round: here True means may attend, so fill the scores where the mask is False."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% wrong="attention" name="mask_after_softmax" says="You mask after the softmax, so the hidden keys have already taken their share and the row no longer sums to one. Mask the scores before."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights * mask
    return weights @ values, weights


# %% wrong="attention" name="mask_with_zero" says="You set hidden scores to 0, but e to the 0 is 1, a vote like any other. Only minus infinity becomes a weight of 0."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, 0.0)
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% wrong="attention" name="mask_added" says="You add the mask to the scores: True counts as 1, a small bonus for what may be seen, and the rest is seen as before. Fill what is forbidden with minus infinity."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% wrong="attention" name="only_values" says="You return only the mixed values. Return the weights too, as a pair: you will want to look at them."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ values


# %% wrong="attention" name="mask_ignored" says="Your result is the same with and without the mask: use it."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% wrong="attention" name="exp_by_hand" says="Your own exponential overflows at large scores: use softmax, which subtracts the largest score first."
def attention(queries, keys, values, mask=None):
    powers = torch.exp(queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1]))
    if mask is not None:
        powers = powers * mask
    weights = powers / powers.sum(dim=-1, keepdim=True)
    return weights @ values, weights


# %% wrong="attention" name="minus_a_billion" says="Minus a billion does not fit into half precision, in which models run on a GPU: use minus infinity."
def attention(queries, keys, values, mask=None):
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% wrong="attention" name="scales_in_place" says="You divide the caller's queries in place, so a second call with the same tensor gives another result: make a new tensor."
def attention(queries, keys, values, mask=None):
    queries /= math.sqrt(queries.shape[-1])
    scores = queries @ keys.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


# %% [markdown]
# PyTorch has this formula as one fused function. Yours should agree with it to the rounding of
# float32, about seven digits.

# %% tags=["experiment"]
generator = set_seed(SEED)
queries, keys, values = (torch.randn(2, 4, 9, 16, generator=generator) for _ in range(3))
attended, weights = attention(queries, keys, values)
theirs = F.scaled_dot_product_attention(queries, keys, values)
print(f"largest difference from torch: {(attended - theirs).abs().max():.1e}")

# %% [markdown]
# ## 3. Why divide by $\sqrt K$?
#
# Let the components of $q$ and $k$ be independent, with mean 0 and variance 1. Then each product
# $q_c k_c$ has mean 0 and variance 1, and the score, a sum of $K$ of them, has
#
# $$ \mathbb{E}[q \cdot k] = 0, \qquad \mathrm{Var}[q \cdot k] = \sum_{c=1}^{K} \mathrm{Var}[q_c k_c] = K . $$
#
# So scores are of the size $\sqrt K$, and dividing by $\sqrt K$ brings them back to 1 for every
# width (Vaswani 2017, section 3.2.1, footnote 4).
#
# What does size do to a softmax with weights $p$? Its derivative is $\partial p_i / \partial s_j =
# p_i(\delta_{ij} - p_j)$. When one weight is near 1 and the others near 0, **every** entry is near
# 0: that query has stopped learning where to look.
#
# > **Predict.** Over 64 random keys, how does the gradient that reaches a query change from $K = 4$
# > to $K = 1024$: without scaling, divided by $\sqrt K$, divided by $K$?


# %%
def query_gradients(width, divisor, count=500, keys=64):
    """The entropy of the weights, and the size of the gradient that reaches each query."""
    generator = torch.Generator().manual_seed(width)
    q, k, v = (torch.randn(count, n, width, generator=generator) for n in (1, keys, keys))
    q.requires_grad_()
    # What a loss would like to change in the output: any direction will do.
    wanted = torch.randn(count, 1, width, generator=generator) / width**0.5
    weights = (q @ k.transpose(-2, -1) / divisor).softmax(dim=-1)
    ((weights @ v) * wanted).sum().backward()
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(dim=-1).mean()
    return entropy.item(), q.grad.norm(dim=-1).flatten()


# %% tags=["experiment"]
widths = [4, 16, 64, 256, 1024]
scalings = {"not scaled": lambda K: 1.0, "divided by √K": math.sqrt, "divided by K": float}
entropies, gradients = {}, {}
for name, divisor in scalings.items():
    measured = [query_gradients(K, divisor(K)) for K in widths]
    entropies[name] = [entropy for entropy, _ in measured]
    spread = torch.stack([gradient for _, gradient in measured], dim=1)
    gradients[name] = low, middle, high = spread.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    print(f"{name:14} K = 1024: median {middle[-1]:.1g}, 10% {low[-1]:.1g}, 90% {high[-1]:.1g}")

# %% tags=["experiment", "hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, colour in zip(scalings, (RED, BLUE, ORANGE)):
    low, middle, high = gradients[name]
    left.plot(widths, entropies[name], "o-", color=colour, label=name)
    right.plot(widths, middle, "o-", color=colour)
    right.fill_between(widths, low.clamp(min=1e-6), high, color=colour, alpha=0.15)
left.axhline(math.log(64), color=GREY, ls=":", label="all 64 keys alike")
left.set(xscale="log", xlabel="key width K", ylabel="entropy of the weights (nats)", ylim=0)
left.set_title("Unscaled, a query ends up seeing one key")
left.legend()
right.set(xscale="log", yscale="log", xlabel="key width K", ylim=(1e-5, 1e2))
right.set_ylabel("gradient norm at a query\n(median, 10 to 90% of queries)")
right.set_title("Only √K gives every width the same gradient")
alt = """Left: entropy of the weights against key width. Unscaled it falls from near 3 nats towards 0;
divided by the root of K it stays near 3.7; divided by K it rises to log 64. Right: gradient at the
query. Unscaled, the band spans many powers of ten; with the root of K it is narrow and flat."""
show(figure, "scaling", alt)

# %% [markdown]
# *What to see.* Unscaled, the weights collapse onto one key, and gradients become a lottery: most
# queries get nearly none, a few get a huge one. That is why the *mean* gradient would mislead you
# here; look at the band. Divided by $K$, attention falls back to the naive average, and the
# gradient shrinks. Only $\sqrt K$ is flat in both pictures.

# %% [markdown] written="scaling" points=2
# ### Written question: the root
#
# A colleague says: "Dividing by $K$ is safer than by $\sqrt K$: scores get even smaller, so the
# softmax can never saturate." In three to five sentences: what is right in this, what goes wrong,
# and which number of the figure above shows it?
#
# ### BEGIN SOLUTION
# It is right that smaller scores cannot saturate the softmax: divided by $K$ their standard
# deviation is $\sqrt K / K = 1/\sqrt K$. But then all scores are nearly equal for wide keys, so the
# weights are nearly uniform and attention becomes the plain average that cannot choose. The
# gradient at the query shrinks too, like $1/\sqrt K$, so it learns slowly to do better. In the
# figure, the entropy for "divided by K" reaches $\log 64 \approx 4.16$ nats, that of 64 equal
# weights, and its gradient at $K = 1024$ is far below the constant one of "divided by √K".
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: says that the scores' standard deviation becomes $1/\sqrt K$ (or: all scores nearly
#   equal), so attention turns into an average and/or its gradient shrinks.
# - 1 point: names a number or a curve of the figure that shows it (entropy near log 64 = 4.16 nats;
#   gradient far below that of √K).
# ### END MARK SCHEME

# %% [markdown]
# ## 4. What attention cannot see: order
#
# Let $P$ be a permutation matrix that shuffles tokens. Shuffle queries, keys and values alike.
# Softmax acts on each row, so it commutes with shuffling rows and columns, and $P^\top P = 1$:
#
# $$ \mathrm{softmax}\!\left(\tfrac{PQ\,(PK)^\top}{\sqrt K}\right) PV
#  = P\,\mathrm{softmax}\!\left(\tfrac{QK^\top}{\sqrt K}\right) P^\top P V
#  = P\,\mathrm{Attention}(Q, K, V). $$
#
# Attention is **permutation-equivariant**: shuffle the tokens, and you get the same outputs,
# shuffled. So without help it cannot know which picture came `first`. The help is a position vector
# added to each token; section 10 measures what happens without it.
#
# Any vectors do that break the symmetry. CLIP and BERT learn one for each position, as we shall;
# Vaswani 2017 (section 3.5) takes sines and cosines of fixed wavelengths, and finds learned ones
# nearly as good as these (table 3, row E); wav2vec 2.0 computes them from the neighbours with a
# convolution (week 6); LayoutLM adds where on the page a word stands (week 5).

# %% tags=["experiment"]
order = torch.randperm(9, generator=set_seed(SEED))
shuffled, _ = attention(queries[:, :, order], keys[:, :, order], values[:, :, order])
difference = (shuffled - attended[:, :, order]).abs().max()
print(f"shuffle, then attend: differs from attend, then shuffle by {difference:.1e}")

# %% [markdown]
# ## 5. Masks: who may look at whom
#
# Attention looks at everything, also at what it must not see: **padding**, which is no token at
# all, and, in a model that writes, the **future**. A mask says for each pair whether position $i$
# may attend to position $j$.
#
# Models that describe pictures (week 10) mix both kinds: the pictures stand first, and everyone may
# see them; the words after them see only what comes before. This is a *prefix* mask (Raffel 2020,
# section 3.2.1, figure 3).

# %% [markdown] exercise="build_mask" difficulty=2 minutes=12
# ### Exercise 2. Three masks in one function
#
# Position $i$ may attend to position $j$ if $j$ is a token, **and**, where `num_prefix` is given,
# if $j$ belongs to the first `num_prefix` positions **or** $j \le i$.
#
# | argument | meaning |
# |---|---|
# | `is_token` | `[B, L]`, boolean, `False` at padding, which stands at the end |
# | `num_prefix` | `None`: no order; `0`: causal; `n`: the first n positions may be seen by all |
# | returns | `[B, 1, L, L]`, boolean, `True` = may attend; row = who looks, column = at whom |
#
# The axis of size 1 is for the heads, which all share the mask. Rows of padding need no care:
# nobody reads what padding sees.
#
# *Afterwards you can say:* "Padding masks hide **columns**: a padded position may look, but nobody
# may look at it. Hiding its row as well would leave a softmax over nothing, which is NaN."
#
# <details><summary>Hint 1: rows and columns</summary>
#
# `is_token[:, None, None, :]` has the shape `[B, 1, 1, L]`: it says the same for every row.
# `expand` repeats it without copying.
#
# </details>
# <details><summary>Hint 2: the triangle</summary>
#
# `torch.ones(L, L, dtype=torch.bool).tril()` is `True` where $j \le i$. Which entries of it does
# the prefix add: rows or columns?
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     mask = is_token as [B, 1, 1, L], expanded to [B, 1, L, L]
#     if num_prefix is given:
#         seen = lower triangle of ones; its first num_prefix columns = True
#         mask = mask and seen
#     return mask
#
# </details>


# %% answer="build_mask"
def build_mask(is_token, num_prefix=None):
    """Say which position may attend to which: [B, 1, L, L], True = may attend."""
    ### BEGIN SOLUTION
    length = is_token.shape[1]
    mask = is_token[:, None, None, :].expand(-1, 1, length, -1)
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
        seen[:, :num_prefix] = True
        mask = mask & seen
    return mask
    ### END SOLUTION


# %% check="build_mask" aspect="padding" points=1 title="three tokens and one padding"
import torch
from mmlearn.feedback import expect

expect(
    "w01_attention/build_mask/padding",
    build_mask(torch.tensor([[True, True, True, False]])),
    torch.tensor([[[[True, True, True, False]] * 4]]),
    "Each of the four rows may see the three tokens and not the padding: boolean, [1, 1, 4, 4].",
)
### BEGIN HIDDEN TESTS
some = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])
mask = build_mask(some.clone())
assert mask.dtype == torch.bool and mask.shape == (3, 1, 5, 5), "boolean, [B, 1, L, L]"
for b, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(5)).tolist():
    assert bool(mask[b, 0, i, j]) == bool(some[b, j]), (b, i, j)
### END HIDDEN TESTS

# %% check="build_mask" aspect="causal" points=1 title="no token sees the future"
import torch
from mmlearn.feedback import expect

triangle = torch.tensor(
    [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
    ]
)
expect(
    "w01_attention/build_mask/causal",
    build_mask(torch.tensor([[True, True, True, False]]), num_prefix=0),
    triangle.bool()[None, None],
    "Row i may see columns 0 to i, itself included, and never the padding in the last column.",
)
### BEGIN HIDDEN TESTS
some = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
mask = build_mask(some.clone(), 0)
assert mask.shape == (2, 1, 6, 6) and mask.dtype == torch.bool, "boolean, [B, 1, L, L]"
for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
    assert bool(mask[b, 0, i, j]) == (bool(some[b, j]) and j <= i), (b, i, j)
### END HIDDEN TESTS

# %% check="build_mask" aspect="prefix" points=2 title="pictures first, then words that do not see the future"
import torch
from mmlearn.feedback import expect

pictures_then_words = torch.tensor(
    [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]
)
expect(
    "w01_attention/build_mask/prefix",
    build_mask(torch.tensor([[True, True, True, True, False]]), num_prefix=2),
    pictures_then_words.bool()[None, None],
    "All rows see columns 0 and 1, the prefix; after it, row i sees columns up to i; "
    "nobody sees the padding.",
)
### BEGIN HIDDEN TESTS
some = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [True] * 2 + [False] * 5])
given = some.clone()
for prefix in (1, 3, 7):
    mask = build_mask(some.clone(), prefix)
    for b, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(7), torch.arange(7)).tolist():
        wanted = bool(some[b, j]) and (j < prefix or j <= i)
        assert bool(mask[b, 0, i, j]) == wanted, (prefix, i, j)
assert torch.equal(build_mask(some, 7), build_mask(some)), "a prefix of all is no order at all"
assert torch.equal(given, some), "is_token was changed in place"
### END HIDDEN TESTS


# %% wrong="build_mask" name="inverted" says="Your mask is True where attending is forbidden, as in PyTorch's key_padding_mask. Here, and in scaled_dot_product_attention, True means may attend."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = ~is_token[:, None, None, :].expand(-1, 1, length, -1)
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
        seen[:, :num_prefix] = True
        mask = mask | ~seen
    return mask


# %% wrong="build_mask" name="hides_rows" says="You hide the padding's rows: it may not look, but everyone looks at it. Hide its columns: the last axis is whom one looks at."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = is_token[:, None, :, None].expand(-1, 1, -1, length)
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
        seen[:, :num_prefix] = True
        mask = mask & seen
    return mask


# %% wrong="build_mask" name="hides_both" says="You hide the padding's rows as well as its columns. A row without any visible key is a softmax over nothing, NaN, and its gradient spreads: hide columns only."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = is_token[:, None, None, :] & is_token[:, None, :, None]
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
        seen[:, :num_prefix] = True
        mask = mask & seen
    return mask


# %% wrong="build_mask" name="sees_the_future" says="Your triangle is the upper one: each position sees what comes after it. Row i may see columns up to i: tril."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = is_token[:, None, None, :].expand(-1, 1, length, -1)
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).triu()
        seen[:, :num_prefix] = True
        mask = mask & seen
    return mask


# %% wrong="build_mask" name="not_itself" says="Your tokens do not see themselves, so the first one sees nothing at all. The diagonal belongs to the triangle."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = is_token[:, None, None, :].expand(-1, 1, length, -1)
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril(-1)
        seen[:, :num_prefix] = True
        mask = mask & seen
    return mask


# %% wrong="build_mask" name="zero_is_false" says="With num_prefix=0 your mask has no triangle: 0 counts as False in an if. Ask whether num_prefix is None."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = is_token[:, None, None, :].expand(-1, 1, length, -1)
    if num_prefix:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
        seen[:, :num_prefix] = True
        mask = mask & seen
    return mask


# %% wrong="build_mask" name="prefix_sees_all" says="You gave the prefix's rows everything, so pictures see the words to come. It is the prefix's columns that all may see."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = is_token[:, None, None, :].expand(-1, 1, length, -1)
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
        seen[:num_prefix, :] = True
        mask = mask & seen
    return mask


# %% wrong="build_mask" name="or_for_and" says="You join the two rules with or: then the triangle lets padding back in. Both must allow it: and."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = is_token[:, None, None, :].expand(-1, 1, length, -1)
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
        seen[:, :num_prefix] = True
        mask = mask | seen
    return mask


# %% wrong="build_mask" name="no_head_axis" says="Your mask has no axis for the heads: [B, L, L] would be matched against [B, H, L, L] from the right, so the batch would be taken for heads. Return [B, 1, L, L]."
def build_mask(is_token, num_prefix=None):
    length = is_token.shape[1]
    mask = is_token[:, None, :].expand(-1, length, -1)
    if num_prefix is not None:
        seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
        seen[:, :num_prefix] = True
        mask = mask & seen
    return mask


# %% tags=["experiment"]
is_token = torch.tensor([[True] * 7 + [False] * 2])
names = ["p1", "p2", "p3", "p4", "a", "bold", "3", "pad", "pad"]
places = [n + 0.5 for n in range(9)]
titles = {None: "Padding: nobody looks at it", 0: "Causal: nobody sees the future"}
titles[4] = "Prefix: all see the pictures"
figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
for ax, (prefix, title) in zip(axes, titles.items()):
    mask = build_mask(is_token, prefix)[0, 0].float()
    ax.pcolormesh(mask, cmap="cividis", vmin=-0.3, vmax=1.0, edgecolors="white", lw=0.8)
    ax.set(title=title, xlabel="at whom (light: may attend)", box_aspect=1, ylim=(9, 0))
    ax.set_xticks(places, names, rotation=90)
    ax.set_yticks(places, names)
axes[0].set_ylabel("who looks")
alt = """Three square grids of nine positions: four patches, three words, two paddings. Left: all
columns but the last two are light. Middle: the lower triangle is light, without the padding. Right:
the first four columns are light in every row, besides the triangle in the words' columns."""
show(figure, "masks", alt)

# %% [markdown]
# *What to see.* The padding's columns are dark everywhere, its rows are not. And a mask that hides
# a whole row? Then every score is $-\infty$, and the softmax divides 0 by 0. `mmlearn` refuses such
# a mask by name; the bare formula returns NaN, which one step of training spreads over all weights.

# %%
from mmlearn.transformer import attention as reference_attention

# %% tags=["experiment"]
nobody = torch.tensor([[True, True], [False, False]])
print(attention(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), nobody)[0])
try:
    reference_attention(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), nobody)
except ValueError as error:
    print(f"ValueError: {error}")

# %% [markdown]
# ## 6. Several heads
#
# One softmax is one average, and an average forgets where its parts came from: half of the upper
# left patch plus half of the lower right one is a blur. A word that must read a digit needs the
# four patches *side by side*.
#
# So the width $D$ is split into $H$ **heads** of $K = D/H$ each. Every head has its own queries,
# keys and values, and so its own average. The results are put side by side and mixed by one more
# matrix (Vaswani 2017, section 3.2.2):
#
# $$ \mathrm{MultiHead}(X) = [\mathrm{head}_1; \dots; \mathrm{head}_H]\,W^O, \qquad \mathrm{head}_h = \mathrm{Attention}(XW^Q_h, XW^K_h, XW^V_h) $$

# %% [markdown] exercise="multi_head" difficulty=3 minutes=20
# ### Exercise 3. Several heads
#
# The projections are there. Write `forward`: project, split into heads, attend, merge, project.
#
# Use `self.attend(queries, keys, values, mask)` for the attention: it takes `[B, H, L, K]` and
# returns the mixed values and the weights. By default it is `mmlearn`'s, so that this exercise does
# not hang on your first one; in the experiments it will be yours.
#
# | | shape |
# |---|---|
# | `x` | `[B, L, D]` |
# | `mask` | broadcasts to `[B, H, L, L]`, or `None` |
# | returns | the states `[B, L, D]` and the weights `[B, H, L, L]` |
#
# Head $h$ owns the entries $hK$ to $(h+1)K - 1$ of the projected vector, as in every checkpoint
# that you will load.
#
# *Afterwards you can say:* "Heads are slices of the width, so eight heads cost as much as one. A
# `view` from `[B, L, D]` to `[B, H, L, K]` runs without error and is wrong: it mixes tokens. Split
# the last axis, then transpose."
#
# <details><summary>Hint 1: splitting</summary>
#
# `[B, L, D]` → `[B, L, H, K]` → `[B, H, L, K]`. The first arrow splits the last axis (`unflatten`,
# or `view`), the second swaps two axes (`transpose`).
#
# </details>
# <details><summary>Hint 2: merging</summary>
#
# The same way back: swap first, then `flatten` the last two axes.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     for each of q_proj, k_proj, v_proj: project x, split the last axis into heads, swap to [B, H, L, K]
#     mixed, weights = self.attend(queries, keys, values, mask)
#     swap mixed back to [B, L, H, K], flatten to [B, L, D]
#     return out_proj of that, weights
#
# </details>


# %% answer="multi_head"
class MultiHead(nn.Module):
    """Attend with several heads at once, each in its own slice of the width."""

    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        """Return the attended states [B, L, D] and every head's weights [B, H, L, L]."""

        ### BEGIN SOLUTION
        def split(states):
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        queries, keys, values = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        mixed_BHLK, weights_BHLL = self.attend(queries, keys, values, mask)
        return self.out_proj(mixed_BHLK.transpose(1, 2).flatten(2)), weights_BHLL
        ### END SOLUTION


# %% check="multi_head" aspect="example" points=2 title="two heads of width 2, worked by hand"
import math
import torch
from mmlearn.feedback import expect

root = math.sqrt(math.log(3))
state = {f"{name}_proj.bias": torch.zeros(4) for name in ("q", "k", "v", "out")}
state["q_proj.weight"], state["k_proj.weight"] = 2 * math.sqrt(2) * torch.eye(4), torch.eye(4) / 2
state["v_proj.weight"] = torch.eye(4) * 15 / root
state["out_proj.weight"] = torch.diag(torch.tensor([2.0, 2.0, 4.0, 4.0]))
two_heads = MultiHead(4, 2)
two_heads.load_state_dict(state)
three_tokens = torch.tensor([[[root, 0.0, root, 0.0], [0.0] * 4, [0.0] * 4]])
expect(
    "w01_attention/multi_head/hand",
    two_heads(three_tokens)[0],
    torch.tensor([[[18.0, 0.0, 36.0, 0.0], [10.0, 0.0, 20.0, 0.0], [10.0, 0.0, 20.0, 0.0]]]),
    "In each head the first token's scores are log 3, 0, 0: weights 3/5, 1/5, 1/5, and the values "
    "15, 0, 0 give 9; the other tokens average to 5. Then out_proj multiplies head 1 by 2 and "
    "head 2 by 4.",
)
expect(
    "w01_attention/multi_head/masked",
    two_heads(three_tokens, torch.tensor([True, True, False]))[0],
    torch.tensor([[[22.5, 0.0, 45.0, 0.0], [15.0, 0.0, 30.0, 0.0], [15.0, 0.0, 30.0, 0.0]]]),
    "With the third token hidden, the weights are 3/4, 1/4 and 1/2, 1/2: pass the mask on to attend.",
)
### BEGIN HIDDEN TESTS
torch.manual_seed(1)
layer = MultiHead(12, 3)
states, shares = layer(torch.randn(2, 5, 12))
assert states.shape == (2, 5, 12), "the states keep the shape of x"
assert shares.shape == (2, 3, 5, 5), "the weights have the shape [B, H, L, L]"
assert torch.allclose(shares.sum(dim=-1), torch.ones(2, 3, 5), atol=1e-5), "rows sum to one"
names = {f"{p}_proj.{w}" for p in ("q", "k", "v", "out") for w in ("weight", "bias")}
assert {name for name, _ in layer.named_parameters()} == names, "the four projections stay"
### END HIDDEN TESTS

# %% check="multi_head" aspect="torch" points=1 title="equals torch.nn.MultiheadAttention with the same weights"
### BEGIN HIDDEN TESTS
import torch

for d_model, heads, batch, length in ((12, 3, 2, 5), (8, 1, 3, 4), (10, 5, 1, 7)):
    torch.manual_seed(d_model)
    theirs = torch.nn.MultiheadAttention(d_model, heads, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    names = ("q_proj", "k_proj", "v_proj")
    parts = {f"{n}.weight": w for n, w in zip(names, theirs.in_proj_weight.detach().chunk(3))}
    parts |= {f"{n}.bias": b for n, b in zip(names, theirs.in_proj_bias.detach().chunk(3))}
    parts |= {f"out_proj.{n}": w.detach() for n, w in theirs.out_proj.named_parameters()}
    ours = MultiHead(d_model, heads)
    ours.load_state_dict(parts)
    x = torch.randn(batch, length, d_model)
    right, shares = theirs(x, x, x, average_attn_weights=False)
    assert torch.allclose(ours(x)[0], right, atol=1e-5), f"{heads} heads of {d_model}: states"
    assert torch.allclose(ours(x)[1], shares, atol=1e-5), f"{heads} heads of {d_model}: weights"
### END HIDDEN TESTS

# %% check="multi_head" aspect="laws" points=1 title="a padded sentence alone or in a batch, shuffled tokens"
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(2)
layer = MultiHead(12, 4)
x = torch.randn(3, 6, 12)
alone = layer(x[:1, :4])[0]
visible = torch.ones(3, 1, 6, 6, dtype=torch.bool)
visible[0, :, :, 4:] = False
padded, shares = layer(x, visible)
assert torch.allclose(padded[:1, :4], alone, atol=1e-5), "padding that is masked changes nothing"
assert (shares[0, :, :, 4:] == 0).all(), "masked keys get no weight in any head"
assert torch.allclose(padded[1:], layer(x[1:])[0], atol=1e-5), "one sentence's mask is its own"
order = torch.tensor([4, 2, 0, 5, 1, 3])
assert torch.allclose(layer(x[:, order])[0], layer(x)[0][:, order], atol=1e-5), (
    "shuffled in, shuffled out"
)
### END HIDDEN TESTS

# %% check="multi_head" aspect="gradients" points=1 title="every projection learns, and heads do not mix"
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(3)
layer = MultiHead(12, 3)
x = torch.randn(2, 5, 12, requires_grad=True)
layer(x)[0].square().sum().backward()
for name, parameter in layer.named_parameters():
    assert parameter.grad is not None, f"{name} gets no gradient"
    # Softmax does not change when all scores of a row move: the keys' bias has no gradient.
    assert name == "k_proj.bias" or parameter.grad.abs().max() > 1e-4, f"{name} does not learn"
assert (x.grad.abs() > 0).all(), "every entry of x matters"
only = MultiHead(12, 3)
with torch.no_grad():
    only.out_proj.weight.copy_(torch.diag(torch.tensor([0.0] * 4 + [1.0] * 4 + [0.0] * 4)))
only(torch.randn(2, 5, 12))[0].square().sum().backward()
touched = only.v_proj.weight.grad.abs().sum(dim=1) > 0
assert touched.tolist() == [False] * 4 + [True] * 4 + [False] * 4, (
    "head h owns entries hK to (h+1)K - 1"
)
### END HIDDEN TESTS


# %% wrong="multi_head" name="view_without_swap" says="You view [B, L, D] as [B, H, L, K]: the numbers of different tokens land in one head. Split the last axis to [B, L, H, K], then swap axes 1 and 2."
class MultiHead(nn.Module):
    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        batch, length, width = x.shape
        shape = (batch, self.num_heads, length, width // self.num_heads)
        queries, keys, values = (p(x).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed, weights = self.attend(queries, keys, values, mask)
        return self.out_proj(mixed.reshape(batch, length, width)), weights


# %% wrong="multi_head" name="split_without_swap" says="You split [B, L, D] straight into [B, H, L, K], so the numbers of different tokens land in one head. Split the last axis to [B, L, H, K], then swap axes 1 and 2."
class MultiHead(nn.Module):
    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        batch, length, width = x.shape
        shape = (batch, self.num_heads, length, width // self.num_heads)
        queries, keys, values = (p(x).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed, weights = self.attend(queries, keys, values, mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights


# %% wrong="multi_head" name="merge_without_swap" says="You split the heads rightly but merge them without swapping back: [B, H, L, K] must become [B, L, H, K] before the last two axes are joined."
class MultiHead(nn.Module):
    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        batch, length, width = x.shape
        shape = (batch, length, self.num_heads, width // self.num_heads)
        queries, keys, values = (
            p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed, weights = self.attend(queries, keys, values, mask)
        return self.out_proj(mixed.reshape(batch, length, width)), weights


# %% wrong="multi_head" name="no_out_proj" says="The output projection is missing: without it the heads stay side by side and never mix."
class MultiHead(nn.Module):
    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        queries, keys, values = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed, weights = self.attend(queries, keys, values, mask)
        return mixed.transpose(1, 2).flatten(2), weights


# %% wrong="multi_head" name="one_head" says="You never split: this is one head as wide as the model, with one softmax for all."
class MultiHead(nn.Module):
    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        queries, keys, values = (p(x).unsqueeze(1) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed, weights = self.attend(queries, keys, values, mask)
        return self.out_proj(mixed.squeeze(1)), weights


# %% wrong="multi_head" name="keys_from_q_proj" says="Your keys come from q_proj: then token i scores j as j scores i, and nobody can look without being looked at. Keys have their own projection."
class MultiHead(nn.Module):
    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        queries, keys, values = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.q_proj, self.v_proj)
        )
        mixed, weights = self.attend(queries, keys, values, mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights


# %% wrong="multi_head" name="forgets_mask" says="The mask never reaches the attention: pass it on to self.attend."
class MultiHead(nn.Module):
    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        queries, keys, values = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed, weights = self.attend(queries, keys, values)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights


# %% wrong="multi_head" name="heads_interleaved" says="Your head h takes every H-th entry. Head h owns the entries hK to (h+1)K - 1: split into (H, K), not (K, H), or no checkpoint will fit."
class MultiHead(nn.Module):
    def __init__(self, d_model, num_heads, attend=reference_attention):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        queries, keys, values = (
            p(x).unflatten(-1, (-1, self.num_heads)).permute(0, 3, 1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed, weights = self.attend(queries, keys, values, mask)
        return self.out_proj(mixed.permute(0, 2, 3, 1).flatten(2)), weights


# %% [markdown]
# Two laws are worth testing in any model that you meet. **Padding**: a short sentence gives the
# same result alone and padded in a batch. **Order**: shuffled tokens give shuffled results. Both
# are cheap, and both catch bugs that training hides. Here with your attention inside your heads:

# %% tags=["experiment"]
set_seed(SEED)
self_attention = MultiHead(32, 4, attend=attention)
tokens = torch.randn(1, 9, 32)  # padding is rarely zero after the first layer: let it be anything
is_token = torch.tensor([[True] * 5 + [False] * 4])
alone = self_attention(tokens[:, :5])[0]
masked, unmasked = self_attention(tokens, build_mask(is_token))[0], self_attention(tokens)[0]
print(f"padding law: differs by {(masked[:, :5] - alone).abs().max():.0e} with the mask,", end=" ")
print(f"by {(unmasked[:, :5] - alone).abs().max():.2f} without")
order = torch.randperm(9)
shuffled = self_attention(tokens[:, order])[0]
print(f"order law:   differs by {(shuffled - unmasked[:, order]).abs().max():.0e}")


# %% tags=["experiment"]
theirs = nn.MultiheadAttention(32, 4, batch_first=True)
projections = (self_attention.q_proj, self_attention.k_proj, self_attention.v_proj)
with torch.no_grad():
    theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
theirs.out_proj.load_state_dict(self_attention.out_proj.state_dict())
difference = self_attention(tokens)[0] - theirs(tokens, tokens, tokens)[0]
print(f"largest difference from torch.nn.MultiheadAttention: {difference.abs().max():.0e}")

# %% [markdown]
# ## 7. What it costs
#
# A picture of twice the side has four times the patches. So it pays to know what grows how. Count
# multiplications in one block, for one sequence; additions come along with them.
#
# Multiplying an `[L, D]` matrix by a `[D, F]` matrix takes $L \cdot D \cdot F$ multiplications.
# Everything below follows from that.

# %% [markdown] exercise="block_cost" difficulty=2 minutes=8
# ### Exercise 4. Count
#
# For one sequence of $L$ tokens, return three counts of multiplications:
#
# - `projections`: the four linear maps of attention (q, k, v, out), each from $D$ to $D$;
# - `mixing`: the scores $QK^\top$ and the weighted sum of the values, over all $H$ heads;
# - `mlp`: two linear maps, $D$ to $F$ and $F$ to $D$.
#
# Leave out biases, the softmax and the norms.
#
# *Afterwards you can say:* "Projections and MLP grow with $L$, the mixing with $L^2$. The mixing
# overtakes the rest only at $L = 2D + F$, which for $F = 4D$ is $6D$ tokens. Heads do not change
# the count."
#
# <details><summary>Hint 1: one head</summary>
#
# A head's queries are `[L, K]`, its keys transposed `[K, L]`. How many multiplications is that
# product? And `[L, L]` times `[L, K]`?
#
# </details>
# <details><summary>Hint 2: pseudocode</summary>
#
#     projections = 4 maps of L * D * D
#     mixing = H heads * 2 products of L * L * K, where K = D / H
#     mlp = 2 maps of L * D * F
#
# </details>


# %% answer="block_cost"
def block_cost(length, d_model, d_ff, num_heads):
    """Count the multiplications of one block: (projections, mixing, mlp)."""
    ### BEGIN SOLUTION
    head_width = d_model // num_heads
    projections = 4 * length * d_model * d_model
    mixing = num_heads * 2 * length * length * head_width
    mlp = 2 * length * d_model * d_ff
    return projections, mixing, mlp
    ### END SOLUTION


# %% check="block_cost" aspect="example" points=1 title="two tokens of width 6, three heads"
from mmlearn.feedback import expect

expect(
    "w01_attention/block_cost/hand",
    list(block_cost(2, 6, 5, 3)),
    [288, 48, 120],
    "With L=2, D=6, F=5, H=3: 4 maps of 2*6*6 are 288; 3 heads with 2 products of 2*2*2 are 48; "
    "2 maps of 2*6*5 are 120.",
)
### BEGIN HIDDEN TESTS
assert list(block_cost(7, 12, 30, 4)) == [4032, 1176, 5040], "L=7, D=12, F=30, H=4"
assert list(block_cost(1, 8, 8, 8)) == [256, 16, 128], "L=1, D=8, F=8, H=8"
### END HIDDEN TESTS

# %% check="block_cost" aspect="growth" points=1 title="what doubles and what quadruples"
### BEGIN HIDDEN TESTS
for size in (16, 100):
    once, twice = block_cost(size, 24, 96, 6), block_cost(2 * size, 24, 96, 6)
    assert [b / a for a, b in zip(once, twice)] == [2, 4, 2], "twice the tokens: 2, 4 and 2 times"
    wide = block_cost(size, 48, 192, 6)
    assert [b / a for a, b in zip(once, wide)] == [4, 2, 4], "twice the width: 4, 2 and 4 times"
crossing = block_cost(6 * 64, 64, 256, 4)
assert crossing[1] == crossing[0] + crossing[2], "at L = 6D the mixing costs as much as the rest"
### END HIDDEN TESTS

# %% check="block_cost" aspect="heads" points=1 title="more heads cost nothing"
### BEGIN HIDDEN TESTS
counts = [tuple(block_cost(50, 768, 3072, heads)) for heads in (1, 4, 12)]
assert counts[0] == counts[1] == counts[2], "heads share the width, so their number cancels"
assert counts[0] == (117_964_800, 3_840_000, 235_929_600), "one block of CLIP's ViT-B/32"
### END HIDDEN TESTS


# %% wrong="block_cost" name="three_maps" says="You counted three projections. There is a fourth, the output projection."
def block_cost(length, d_model, d_ff, num_heads):
    return 3 * length * d_model**2, 2 * length**2 * d_model, 2 * length * d_model * d_ff


# %% wrong="block_cost" name="scores_only" says="You counted the scores, but the weighted sum of the values costs as much again."
def block_cost(length, d_model, d_ff, num_heads):
    return 4 * length * d_model**2, length**2 * d_model, 2 * length * d_model * d_ff


# %% wrong="block_cost" name="heads_multiply" says="You gave each head the whole width. A head has K = D / H, so the number of heads cancels."
def block_cost(length, d_model, d_ff, num_heads):
    return 4 * length * d_model**2, num_heads * 2 * length**2 * d_model, 2 * length * d_model * d_ff


# %% wrong="block_cost" name="per_token" says="Your mixing grows with L only: that is the cost of one query. All L queries look at all L keys."
def block_cost(length, d_model, d_ff, num_heads):
    return 4 * length * d_model**2, 2 * length * d_model, 2 * length * d_model * d_ff


# %% wrong="block_cost" name="one_mlp_map" says="The MLP has two maps: up from D to F, and down again."
def block_cost(length, d_model, d_ff, num_heads):
    return 4 * length * d_model**2, 2 * length**2 * d_model, length * d_model * d_ff


# %% [markdown]
# > **Predict.** By your count, how much longer should the mixing take at 1,024 tokens than at 512?
# > And at which length does it overtake projections and MLP, for $D = 64$? Will the clock agree?

# %%
from mmlearn.transformer import MLP


def seconds(function, budget=0.1):
    """Processor time of one call, averaged over many: other programs are not counted."""
    function()  # the first call sets things up
    calls, start = 0, time.process_time()
    while time.process_time() - start < budget:
        function()
        calls += 1
    return (time.process_time() - start) / calls


# %% tags=["experiment"]
lengths, D, H = [64, 128, 256, 512, 1024], 64, 4
linear, mlp = nn.Linear(D, D), MLP(D, 4 * D)
ways = {
    "mixing, your formula": lambda x, heads: attention(heads, heads, heads),
    "mixing, fused kernel": lambda x, heads: F.scaled_dot_product_attention(heads, heads, heads),
    "projections and MLP": lambda x, heads: [linear(x) for _ in range(4)] + [mlp(x)],
}
clock = {name: [] for name in ways}
for length in lengths:
    x, heads = torch.randn(1, length, D), torch.randn(1, H, length, D // H)
    for name, way in ways.items():
        with torch.no_grad():
            clock[name].append(1e3 * seconds(partial(way, x, heads)))
for name, (*_, half, whole) in clock.items():
    print(f"{name}: {half:.2f} ms for 512 tokens, {whole:.2f} for 1,024: {whole / half:.1f} times")

# %% tags=["experiment", "hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharex=True)
counts = torch.tensor([block_cost(length, D, 4 * D, H) for length in lengths]) / 1e6
left.plot(lengths, counts[:, 1], "o-", color=RED, label="mixing")
left.plot(lengths, counts[:, 0] + counts[:, 2], "s-", color=BLUE, label="projections and MLP")
left.axvline(6 * D, color=GREY, ls=":", label="6 D tokens")
left.set(ylabel="million multiplications", title="Counted")
for (name, times), style, colour in zip(clock.items(), ("o-", "^-", "s-"), (RED, ORANGE, BLUE)):
    right.plot(lengths, times, style, color=colour, label=name)
right.axvline(6 * D, color=GREY, ls=":")
right.set(ylabel="milliseconds", title="Measured: processor time, one thread")
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="tokens L")
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.legend()
yours, fused, _ = (times[-1] / times[-2] for times in clock.values())
title = f"time {fused:.1f} times (fused), {yours:.1f} times (your formula)"
figure.suptitle(f"Mixing twice the tokens: 4 times the multiplications, {title}")
alt = """Two log-log plots against sequence length. Left, counted: the mixing has slope 2, projections
and MLP slope 1; they cross at 384 tokens. Right, measured: the mixing again rises more steeply and
crosses earlier; for long sequences your formula lies above the fused kernel."""
show(figure, "cost", alt)

# %% [markdown]
# *What to see.* Long sequences follow the count, but the crossing comes earlier, and your formula
# may even grow faster than 4 times: its $L \times L$ weights are written to memory and read back
# several times ($4HL^2$ bytes: 16 MiB here at 1,024 tokens, far more than a core's own cache). The
# fused kernel never stores them (Dao 2022, section 3.1). Same formula, same numbers, less traffic:
# that is why `mmlearn` trains with it, and why your version stays useful, since it shows the
# weights.
#
# ## 8. The block
#
# Attention moves information between tokens, but what arrives is a sum of values, which are linear
# in the tokens. Bending is left to a small **MLP** that follows, the same for every token. Both are *added*
# to the tokens, which form the **residual stream**, and each reads the stream through a **LayerNorm**
# of its own:
#
# $$ x \leftarrow x + \mathrm{Attention}(\mathrm{LN}_1(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{LN}_2(x)) $$
#
# The first transformer normalised after adding, $x \leftarrow \mathrm{LN}(x +
# \mathrm{Attention}(x))$. CLIP, ViT and most large models since normalise before. After you have
# written it, we measure why.

# %%
from mmlearn.transformer import Attention

# %% [markdown] exercise="block" difficulty=3 minutes=12
# ### Exercise 5. The pre-norm block
#
# The parts are there. Write `forward`: the two lines above, in this order. `self.attention(x,
# mask=mask)` returns a pair, the states and the weights; you need the states.
#
# Again, by default the attention is `mmlearn`'s; in the experiments it is your `MultiHead`.
#
# *Afterwards you can say:* "In a pre-norm block nothing stands on the residual path, so the
# identity runs from the last block to the first, and gradients with it. Post-norm puts a LayerNorm
# on that path at every step."
#
# <details><summary>Hint 1: what is added to what</summary>
#
# The norm is applied to what the sublayer *reads*, never to `x` itself: the second line starts from
# the un-normalised sum of the first.
#
# </details>
# <details><summary>Hint 2: pseudocode</summary>
#
#     x = x + states of attention(attention_norm(x), mask)
#     x = x + mlp(mlp_norm(x))
#     return x
#
# </details>


# %% answer="block"
class Block(nn.Module):
    """Let tokens exchange, then think; add both to the residual stream."""

    def __init__(self, d_model, num_heads, d_ff, attention_class=Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention_class(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x, mask=None):
        """Return the new states, [B, L, D] like x."""
        ### BEGIN SOLUTION
        x = x + self.attention(self.attention_norm(x), mask=mask)[0]
        return x + self.mlp(self.mlp_norm(x))
        ### END SOLUTION


# %% check="block" aspect="example" points=2 title="two tokens of width 2, worked by hand"
import torch
from mmlearn.feedback import expect

tiny = Block(2, 1, 2)
known = {name: torch.zeros_like(weight) for name, weight in tiny.state_dict().items()}
known["attention_norm.weight"], known["mlp_norm.weight"] = torch.ones(2), 2 * torch.ones(2)
known["attention.v_proj.weight"] = -3 * torch.eye(2)
known["attention.out_proj.weight"] = torch.eye(2)
known["mlp.fc1.weight"], known["mlp.fc2.weight"] = 10 * torch.eye(2), 0.1 * torch.eye(2)
tiny.load_state_dict(known)
expect(
    "w01_attention/block/hand",
    tiny(torch.tensor([[[3.0, 1.0], [5.0, 1.0]]])),
    torch.tensor([[[0.0, 6.0], [2.0, 6.0]]]),
    "Both tokens normalise to (1, -1); here the attention adds -3 times the mean of that, (-3, 3), "
    "which gives (0, 4) and (2, 4). The second norm makes (-2, 2) of both, and this MLP adds what "
    "is positive: (0, 2).",
    atol=1e-3,  # LayerNorm's eps
)
expect(
    "w01_attention/block/masked",
    tiny(torch.tensor([[[3.0, 1.0], [1.0, 5.0]]]), torch.eye(2, dtype=torch.bool)),
    torch.tensor([[[0.0, 6.0], [6.0, 2.0]]]),
    "Each token may see only itself here: (3, 1) becomes (0, 4) and then (0, 6), (1, 5) becomes "
    "(4, 2) and then (6, 2).",
    atol=1e-3,  # LayerNorm's eps
)
### BEGIN HIDDEN TESTS
torch.manual_seed(1)
assert Block(12, 3, 20)(torch.randn(2, 5, 12)).shape == (2, 5, 12), "the shape stays"
lazy = Block(12, 3, 20)
with torch.no_grad():
    for part in (lazy.attention.out_proj, lazy.mlp.fc2):
        part.weight.zero_(), part.bias.zero_()
x = torch.randn(2, 5, 12)
assert torch.equal(lazy(x), x), "with both sublayers silent, x passes through untouched"
### END HIDDEN TESTS

# %% check="block" aspect="reference" points=1 title="equals mmlearn's block with the same weights, masks included"
### BEGIN HIDDEN TESTS
import torch
from mmlearn.transformer import Block as ReferenceBlock

torch.manual_seed(2)
theirs, ours = ReferenceBlock(12, 3, 20), Block(12, 3, 20)
parts = {
    name: weight + 0.3 * torch.randn_like(weight) for name, weight in theirs.state_dict().items()
}
theirs.load_state_dict(parts)
ours.load_state_dict(parts)
x = 2 + 3 * torch.randn(2, 5, 12)
triangle = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
free, masked = theirs(x), theirs(x, triangle)
assert torch.allclose(ours(x.clone()), free, atol=1e-4), "without a mask"
assert torch.allclose(ours(x.clone(), triangle), masked, atol=1e-4), "with a causal mask"
assert not torch.allclose(ours(x), ours(x, triangle), atol=1e-2), "the mask must matter"
### END HIDDEN TESTS

# %% check="block" aspect="gradients" points=1 title="the residual path is free, and every part learns"
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(3)
block = Block(12, 3, 20)
x = torch.randn(2, 5, 12, requires_grad=True)
given = x.detach().clone()
block(x).square().sum().backward()
idle = [n for n, p in block.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
assert not [name for name in idle if name != "attention.k_proj.bias"], f"{idle} get no gradient"
assert torch.equal(given, x.detach()), "x was changed in place"
stack = [Block(12, 3, 20) for _ in range(8)]
state = shifted = torch.randn(1, 4, 12)
shifted = shifted + 7.0
for part in stack:
    state, shifted = part(state), part(shifted)
assert torch.allclose(shifted - state, torch.full_like(state, 7.0), atol=1e-3), (
    "a shift of all entries passes on"
)
### END HIDDEN TESTS


# %% wrong="block" name="post_norm" says="You normalise after adding: that is the block of 2017, post-norm. Here the norm stands before the sublayer, and x itself stays as it is."
class Block(nn.Module):
    def __init__(self, d_model, num_heads, d_ff, attention_class=Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention_class(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x, mask=None):
        x = self.attention_norm(x + self.attention(x, mask=mask)[0])
        return self.mlp_norm(x + self.mlp(x))


# %% wrong="block" name="residual_from_norm" says="You overwrite x with its norm and add to that, so the residual path is normalised too. Add to the x that came in."
class Block(nn.Module):
    def __init__(self, d_model, num_heads, d_ff, attention_class=Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention_class(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x, mask=None):
        x = self.attention_norm(x)
        x = x + self.attention(x, mask=mask)[0]
        x = self.mlp_norm(x)
        return x + self.mlp(x)


# %% wrong="block" name="no_residual" says="Nothing is added to x: each sublayer replaces it. Without the residual path a deep stack forgets its input."
class Block(nn.Module):
    def __init__(self, d_model, num_heads, d_ff, attention_class=Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention_class(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x, mask=None):
        x = self.attention(self.attention_norm(x), mask=mask)[0]
        return self.mlp(self.mlp_norm(x))


# %% wrong="block" name="parallel" says="Your MLP reads the x from before the attention, so within a block no token can think about what it has just seen. Let it read the sum."
class Block(nn.Module):
    def __init__(self, d_model, num_heads, d_ff, attention_class=Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention_class(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x, mask=None):
        exchanged = self.attention(self.attention_norm(x), mask=mask)[0]
        return x + exchanged + self.mlp(self.mlp_norm(x))


# %% wrong="block" name="one_norm_for_both" says="Both sublayers read through attention_norm. The MLP has a norm of its own, mlp_norm."
class Block(nn.Module):
    def __init__(self, d_model, num_heads, d_ff, attention_class=Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention_class(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x, mask=None):
        x = x + self.attention(self.attention_norm(x), mask=mask)[0]
        return x + self.mlp(self.attention_norm(x))


# %% wrong="block" name="no_norm" says="The sublayers read x itself. They should read it through their norms, or the stream's growing size drives them."
class Block(nn.Module):
    def __init__(self, d_model, num_heads, d_ff, attention_class=Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention_class(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x, mask=None):
        x = x + self.attention(x, mask=mask)[0]
        return x + self.mlp(x)


# %% wrong="block" name="mask_dropped" says="The mask never reaches the attention: pass it on."
class Block(nn.Module):
    def __init__(self, d_model, num_heads, d_ff, attention_class=Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention_class(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x, mask=None):
        x = x + self.attention(self.attention_norm(x))[0]
        return x + self.mlp(self.mlp_norm(x))


# %%
from mmlearn.transformer import Block as ReferenceBlock


def block_with(attend):
    """Your block with your heads, which attend in this way."""
    return partial(Block, attention_class=partial(MultiHead, attend=attend))


# %% [markdown]
# With your heads inside, and your attention inside those, your block holds the same parameters
# under the same names as `mmlearn`'s. So its weights can be copied over, and the two must agree.

# %% tags=["experiment"]
set_seed(SEED)
x, causal = torch.randn(2, 9, 32), build_mask(torch.ones(2, 9, dtype=torch.bool), num_prefix=0)
mine, theirs = block_with(attention)(32, 4, 128), ReferenceBlock(32, 4, 128)
mine.load_state_dict(theirs.state_dict())
difference = (mine(x, causal) - theirs(x, causal)).abs().max()
print(f"largest difference from mmlearn's block, causal mask: {difference:.0e}")

# %% [markdown]
# ### Why the norm stands before
#
# In a pre-norm stack the stream is a sum: each block adds two terms of similar size, so its
# variance grows like the depth and its size like $\sqrt{\text{depth}}$. The final norm divides by
# that size, and the gradient that reaches the last block shrinks like $1/\sqrt{\text{depth}}$. In a
# post-norm stack every block ends in a norm, so the last block's gradient stays as large as in a
# shallow model, however many blocks must move together (Xiong 2020, theorem 1).
#
# > **Predict.** From 2 blocks to 32, by what factor does the pre-norm gradient shrink, if this is
# > right?

# %%
pre_norm, post_norm = block_with(attention), partial(ReferenceBlock, norm="post")


def last_gradient(block_class, depth, seed, width=64):
    """Before any training: the gradient's norm at the last block's second MLP matrix."""
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(block_class(width, 4, 4 * width) for _ in range(depth)))
    for module in blocks.modules():
        if isinstance(module, nn.Linear):  # initialised as in the paper
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    final_norm = nn.LayerNorm(width) if block_class is pre_norm else nn.Identity()
    states = final_norm(blocks(torch.randn(32, 13, width)))
    F.cross_entropy(nn.Linear(width, 10)(states[:, 0]), torch.randint(10, (32,))).backward()
    return blocks[-1].mlp.fc2.weight.grad.norm().item()


# %% tags=["experiment"]
depths, norms = [2, 4, 8, 16, 32], {}
for name, block_class in (("post-norm", post_norm), ("pre-norm", pre_norm)):
    runs = [[last_gradient(block_class, d, SEED + seed) for seed in range(3)] for d in depths]
    norms[name] = torch.tensor(runs)
    cells = [f"{d}: {n.mean():.2f} ± {n.std():.2f}" for d, n in zip(depths, norms[name])]
    print(f"{name:9} depth", "  ".join(cells))

# %% tags=["experiment", "hide-input"]
figure, ax = plt.subplots(figsize=(5.8, 3.4), layout="constrained")
for (name, runs), style, colour in zip(norms.items(), ("s-", "o-"), (RED, BLUE)):
    ax.errorbar(depths, runs.mean(1), runs.std(1), fmt=style, color=colour, capsize=3, label=name)
theory = norms["pre-norm"][0].mean() * (2 / torch.tensor(depths)).sqrt()
ax.plot(depths, theory, ":", color=GREY, label="falls like 1/√depth")
ax.set(xscale="log", yscale="log", xlabel="depth (number of blocks)")
ax.set_ylabel("gradient norm at the last block\n(mean and spread, three seeds)")
ax.set_xticks(depths, depths)
ax.set_yticks([0.1, 0.2, 0.4, 0.8], [0.1, 0.2, 0.4, 0.8])
ax.minorticks_off()
ax.legend()
post, pre = (runs[0].mean() / runs[-1].mean() for runs in norms.values())
ax.set_title(f"2 to 32 blocks: pre-norm shrinks {pre:.1f} times, post-norm {post:.1f}")
alt = """Gradient norm at the last block against the number of blocks, log-log. The post-norm line is
flat; the pre-norm line falls along a dotted line of slope minus one half."""
show(figure, "gradients", alt)

# %% [markdown]
# *What to see.* Theory says $\sqrt{32/2} = 4$ for pre-norm and 1 for post-norm. **Beside the
# paper:** Xiong 2020, figure 3(c, d), shows the same for encoders and decoders of 6 to 14 layers:
# flat, around 1.6, for post-norm, falling for pre-norm. Our level is lower because theirs is a
# translation model, wider and with a large vocabulary; the *shape* does not depend on that. Section
# 12 shows what it means for training.
#
# ## 9. The training loop
#
# Nothing is learned until someone moves the weights. A step is always the same: take a batch,
# compute the loss, clear old gradients, compute new ones, let the optimizer move the weights.
# Everything else in a training framework is built around these five.

# %% [markdown] exercise="train" difficulty=3 minutes=15
# ### Exercise 6. Five lines that train everything
#
# Write `train`. It puts the model into training mode, makes one
# `torch.optim.AdamW(model.parameters(), lr=lr)`, takes `steps` steps, each on the **next** batch,
# and leaves the model in evaluation mode. It returns the loss of each step, as plain Python floats.
#
# - `batches`: any iterable of batches with at least `steps` of them, perhaps endless: take only
#   what you need;
# - `loss_fn(model, batch)`: returns the loss of a batch, a tensor without dimensions.
#
# `fit_slope` is given: the checks use it to look at your loop. Leave it as it is.
#
# *Afterwards you can say:* "`backward` **adds** to the gradients, so they must be cleared at each
# step. Storing the loss tensor keeps its whole graph alive; store `loss.item()`. In its first step
# Adam moves every weight by about the learning rate, whatever the size of the gradient."
#
# <details><summary>Hint 1: the order</summary>
#
# `zero_grad`, `backward`, `step`. The loss that you record is that of the weights *before* the
# step.
#
# </details>
# <details><summary>Hint 2: taking only what you need</summary>
#
# `zip(range(steps), batches)` stops after `steps`, and asks an endless stream for no more.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     training mode; make the optimizer; losses = []
#     for each of steps, with the next batch:
#         loss = loss_fn(model, batch)
#         clear gradients; backward; optimizer step
#         append the loss as a float
#     evaluation mode; return losses
#
# </details>


# %% answer="train"
def train(model, batches, loss_fn, steps, lr):
    """Take `steps` steps of AdamW and return the loss of each, as floats."""
    ### BEGIN SOLUTION
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _, batch in zip(range(steps), batches):
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses
    ### END SOLUTION


def fit_slope(slope, batches, steps, lr):
    """Given: fit y = slope * x with your loop. Returns the losses, the slope, and the modes."""
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% check="train" aspect="example" points=2 title="three steps on a line, the first two by hand"
import torch
from mmlearn.feedback import expect

points_on_lines = [(torch.ones(1, 1), torch.full((1, 1), y)) for y in (1.0, 2.0, 1.0)]
recorded, fitted, while_training, afterwards = fit_slope(0.0, points_on_lines, steps=3, lr=0.1)
expect(
    "w01_attention/train/kind",
    [type(loss).__name__ for loss in recorded],
    ["float", "float", "float"],
    "Return one plain float for each step: loss.item().",
)
expect(
    "w01_attention/train/losses",
    [float(loss) for loss in recorded],
    [1.0, 3.61, 0.644913],
    "From slope 0 the first loss is (0 - 1) squared = 1. Adam's first step moves the slope by the "
    "learning rate, to 0.1, so the second loss, on a new batch, is (0.1 - 2) squared = 3.61.",
)
expect(
    "w01_attention/train/modes",
    [while_training, afterwards],
    [[True, True, True], False],
    "model.train() before the first step, model.eval() after the last.",
)
### BEGIN HIDDEN TESTS
import torch

generator = torch.Generator().manual_seed(1)
pairs = [
    (torch.randn(4, 1, generator=generator), torch.randn(4, 1, generator=generator))
    for _ in range(6)
]
twin = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.constant_(twin.weight, 0.7)
optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05)
for (inputs, targets), loss in zip(pairs, fit_slope(0.7, pairs, 6, 0.05)[0]):
    right = torch.nn.functional.mse_loss(twin(inputs), targets)
    assert abs(right.item() - loss) < 1e-5, "each loss is that of the weights before the step"
    optimizer.zero_grad()
    right.backward()
    optimizer.step()
assert abs(fit_slope(0.7, pairs, 6, 0.05)[1] - twin.weight.item()) < 1e-5, (
    "the weights after six steps"
)
### END HIDDEN TESTS

# %% check="train" aspect="bookkeeping" points=1 title="floats, modes, and no batch too many"
### BEGIN HIDDEN TESTS
import torch

pairs = [(torch.ones(2, 1), torch.ones(2, 1)) for _ in range(9)]
recorded, _, modes, training = fit_slope(0.0, pairs, 4, 0.01)
assert len(recorded) == 4 and len(modes) == 4, "steps=4 takes four batches of nine"
assert all(type(loss) is float for loss in recorded), "plain floats, or every graph stays in memory"
assert modes == [True] * 4, "training mode while it trains"
assert training is False, "evaluation mode afterwards"
### END HIDDEN TESTS

# %% check="train" aspect="learns" points=1 title="it finds a slope, batch after batch"
### BEGIN HIDDEN TESTS
import torch

generator = torch.Generator().manual_seed(2)
inputs = [torch.randn(8, 1, generator=generator) for _ in range(300)]
recorded, slope, _, _ = fit_slope(-1.0, [(x, 2.5 * x) for x in inputs], 300, 0.1)
assert abs(slope - 2.5) < 0.1, "y = 2.5 x is found in 300 steps"
assert sum(recorded[-50:]) / 50 < 0.05 < recorded[0], "the loss falls, and stays down"
still = fit_slope(1.5, [(x, 2.5 * x) for x in inputs], 5, 0.0)
assert abs(still[1] - 1.5) < 1e-6, "with a learning rate of 0 nothing moves"
### END HIDDEN TESTS


# %% wrong="train" name="no_zero_grad" says="Your gradients pile up: backward adds to what is there. Clear them with optimizer.zero_grad() at each step."
def train(model, batches, loss_fn, steps, lr):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _, batch in zip(range(steps), batches):
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% wrong="train" name="step_before_backward" says="You step before backward, so each step uses the gradients of the batch before, and the first one none. Backward first, then step."
def train(model, batches, loss_fn, steps, lr):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _, batch in zip(range(steps), batches):
        loss = loss_fn(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
    model.eval()
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% wrong="train" name="clears_after_backward" says="You clear the gradients between backward and step, so the optimizer sees none and nothing moves. Clear them before backward."
def train(model, batches, loss_fn, steps, lr):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _, batch in zip(range(steps), batches):
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% wrong="train" name="same_batch" says="You take the first batch again and again. Each step gets the next batch."
def train(model, batches, loss_fn, steps, lr):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    batch = next(iter(batches))
    for _ in range(steps):
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% wrong="train" name="keeps_tensors" says="You keep the loss tensors, and each holds the graph of its whole step in memory: store loss.item()."
def train(model, batches, loss_fn, steps, lr):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _, batch in zip(range(steps), batches):
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    model.eval()
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% wrong="train" name="stays_in_training" says="The model is left in training mode, where dropout still drops: end with model.eval()."
def train(model, batches, loss_fn, steps, lr):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _, batch in zip(range(steps), batches):
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% wrong="train" name="never_in_training" says="The model comes in evaluation mode and you train it so, without dropout: begin with model.train()."
def train(model, batches, loss_fn, steps, lr):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _, batch in zip(range(steps), batches):
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% wrong="train" name="plain_descent" says="These are the steps of plain gradient descent. Take torch.optim.AdamW: transformers hardly train without Adam."
def train(model, batches, loss_fn, steps, lr):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for _, batch in zip(range(steps), batches):
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% wrong="train" name="new_optimizer" says="You make a new optimizer at each step, so Adam forgets its averages and every step is as long as the first. Make it once, before the loop."
def train(model, batches, loss_fn, steps, lr):
    model.train()
    losses = []
    for _, batch in zip(range(steps), batches):
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def fit_slope(slope, batches, steps, lr):
    model, modes = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, slope)

    def loss_fn(model, batch):
        modes.append(model.training)
        return F.mse_loss(model(batch[0]), batch[1])

    losses = train(model.eval(), batches, loss_fn, steps, lr)
    return losses, model.weight.item(), modes, model.training


# %% [markdown]
# ## 10. One block reads a mixed sentence
#
# Now your parts meet. Words are looked up, patches are projected, both become vectors of width 64
# in one row; a position vector is added; your block runs with your heads, your attention and your
# mask; the answer is read at the word's place. Once `tokens` is done, nothing marks any more what
# was word and what was picture.


# %%
class Reader(nn.Module):
    """Read a question word and a row of patches as one sequence; answer at the word's place."""

    def __init__(
        self, block=pre_norm, d_model=64, num_heads=4, depth=1, positions=True, patches=(12, 16)
    ):
        super().__init__()
        most, pixels = patches
        self.word = nn.Embedding(len(QUESTIONS), d_model)
        self.patch = nn.Linear(pixels, d_model)
        self.position = nn.Parameter(torch.zeros(1 + most, d_model), requires_grad=positions)
        nn.init.normal_(self.word.weight, std=0.3)  # about the size at which patches arrive
        nn.init.normal_(self.position, std=0.3 if positions else 0.0)
        self.blocks = nn.ModuleList(block(d_model, num_heads, 2 * d_model) for _ in range(depth))
        self.norm, self.answer = nn.LayerNorm(d_model), nn.Linear(d_model, 10)

    def tokens(self, batch):
        x = torch.cat([self.word(batch.words)[:, None], self.patch(batch.patches)], dim=1)
        return x + self.position[: x.shape[1]]

    def forward(self, batch):
        x, mask = self.tokens(batch), build_mask(batch.is_token)
        for block in self.blocks:
            x = block(x, mask)
        return self.answer(self.norm(x[:, 0]))


# %% [markdown]
# Five models, three seeds each, the same 300 steps on the same sentences. They differ in one thing
# only: what a token may take from the others. The first two put something simpler in the place of
# your attention: no exchange at all, and the average of section 2.


# %%
def own_token(queries, keys, values, mask):
    """No exchange: every token keeps its own value."""
    return values, None


def answer_loss(model, batch):
    return F.cross_entropy(model(batch), batch.answers)


@torch.no_grad()
def right_answers(model, batch):
    """Whether each answer is right."""
    return model(batch).argmax(dim=-1) == batch.answers


# %% tags=["experiment"]
VARIANTS = {
    "own token only": {"block": block_with(own_token)},
    "average of all": {"block": block_with(average)},
    "attention, no positions": {"positions": False},
    "attention, 1 head": {"num_heads": 1},
    "attention, 4 heads": {},
}
SEEDS = range(SEED, SEED + 3)


def run(seed, **changes):
    """Train one model; return it with its losses."""
    set_seed(seed)
    model, stream = Reader(**changes).to(device), train_sentences.stream(64, seed)
    return model, train(model, stream, answer_loss, steps=300, lr=2e-3)


# %% tags=["experiment"]
exam = test_sentences.draw(3000, torch.Generator().manual_seed(99))
trained, curves, accuracies = {}, {}, {}
for name, changes in VARIANTS.items():
    start = time.perf_counter()
    trained[name], curves[name] = zip(*[run(seed, **changes) for seed in SEEDS])
    right = torch.stack([right_answers(model, exam) for model in trained[name]]).float().cpu()
    by_question = [right[:, exam.words.cpu() == word].mean(dim=1) for word in range(3)]
    accuracies[name], total = torch.stack(by_question, dim=1), right.mean(dim=1)
    spent = time.perf_counter() - start
    print(f"{name:24} right {total.mean():.3f} ± {total.std():.3f} on unseen hands, {spent:.0f} s")

# %% tags=["experiment", "hide-input"]
shape = {"figsize": (9.5, 3.6), "width_ratios": [1, 1.5], "layout": "constrained"}
figure, (left, right) = plt.subplots(1, 2, **shape)
for shift, (name, colour) in enumerate(zip(VARIANTS, (GREY, ORANGE, GREEN, RED, BLUE))):
    mean = torch.tensor(curves[name]).mean(dim=0).view(-1, 20).mean(dim=1)
    left.plot(range(10, 301, 20), mean, color=colour, label=name)
    shares, places = accuracies[name], torch.arange(3) + 0.16 * (shift - 2)
    right.bar(places, shares.mean(dim=0), width=0.14, color=colour)
    right.plot(places.expand_as(shares).flatten(), shares.flatten(), "k.", ms=3)
left.axhline(math.log(10), color="black", lw=0.8, ls=":")
left.set(xlabel="step", ylabel="training loss (nats)", ylim=0)
left.set_title("The better it can choose, the more it learns")
right.axhline(0.1, color="black", lw=0.8, ls=":")
right.set(ylabel="share right, unseen handwriting", ylim=(0, 1))
right.set_xticks(range(3), QUESTIONS)
right.set_title("Accuracy for each question (dots: seeds; dotted: 1 in 10)")
figure.legend(loc="outside right center")
best, naive = (accuracies[name].mean() for name in ("attention, 4 heads", "average of all"))
figure.suptitle(f"A word that may choose: {best:.0%} right; one that averages: {naive:.0%}")
alt = """Left: training loss over 300 steps. Own token only stays near log 10; the average and the
model without positions level off; four heads end lowest. Right: accuracy for first, last, largest.
Own token is near chance, the average near or below one half, four heads highest throughout."""
show(figure, "learning", alt)

# %% [markdown]
# *What to see.* Compare with your three guesses.
#
# - **Own token only** learns nothing but how often each digit is the largest.
# - **The average** hands every question the same soup of patches.
# - **Without positions** `first` and `last` are no better than picking one of the pictures, as
#   section 4 proved; `largest`, which needs no order, suffers least.
# - **One head** must squeeze four patches through one average. Vaswani 2017 (table 3, rows A;
#   section 6.2) lost 0.9 BLEU with one head instead of eight; ours loses more, presumably because
#   the word has only one block in which to read four patches.
#
# `largest` is hardest: three digits must be read *and* compared within one block.
#
# ## 11. Where does it look?
#
# The weights are there to be read: row 0 of each head says where the word looks. Average them over
# all three-picture questions in the exam.
#
# > **Predict.** The word `last` never sees how many pictures there are: its query is made before it
# > looks at anything. How can it look at picture 3 if there is one, and at picture 2 if not?


# %% tags=["experiment"]
@torch.no_grad()
def word_weights(model, batch):
    """Each head's weights from the word to the patches, in the first block: [B, H, L - 1]."""
    block, mask = model.blocks[0], build_mask(batch.is_token)
    _, weights = block.attention(block.attention_norm(model.tokens(batch)), mask)
    return weights[:, :, 0, 1:].cpu()


models = trained["attention, 4 heads"]
three, question = exam.is_token[:, -1].cpu(), exam.words.cpu()
looked = [word_weights(model, exam) for model in models]

# %% tags=["experiment"]
for word in (0, 1):
    for pictures, chosen in (("two", ~three), ("three", three)):
        patches = looked[0][chosen & (question == word)].mean(dim=(0, 1))
        shares = [f"{share:.2f}" for share in patches.view(3, 4).sum(dim=1)]
        print(f"{QUESTIONS[word]:5} of {pictures:5}: share of attention on each picture", *shares)
quarters = ("upper left", "upper right", "lower left", "lower right")
for seed, weights in zip(SEEDS, looked):
    for word in (0, 1):
        favourites = weights[three & (question == word)].mean(dim=0).argmax(dim=1) % 4
        names = ", ".join(quarters[q] for q in favourites)
        print(f"seed {seed}: for {QUESTIONS[word]}, heads 1 to 4 prefer {names}")

# %% tags=["experiment", "hide-input"]
example = exam.patches[three.nonzero()[0, 0]].view(3, 2, 2, 4, 4)
example = example.permute(1, 3, 0, 2, 4).reshape(8, 24).cpu()
figure, axes = plt.subplots(4, 4, figsize=(9.5, 4), layout="constrained")
for row, (line, name) in enumerate(zip(axes, ("example", *QUESTIONS))):
    line[0].set_ylabel(name)
    for head, ax in enumerate(line):
        if row == 0:
            ax.imshow(example, cmap="gray_r", aspect="auto", extent=(0, 6, 2, 0))
            ax.set_title(f"head {head + 1}")
        else:
            grid = looked[0][three & (question == row - 1), head].mean(dim=0).view(3, 2, 2)
            grid = grid.permute(1, 0, 2).reshape(2, 6)
            drawn = ax.imshow(grid, vmin=0, vmax=0.6, aspect="auto", extent=(0, 6, 2, 0))
        ax.set(xticks=[], yticks=[])
        ax.vlines([2, 4], 0, 2, color=ORANGE, lw=1.5)
figure.colorbar(drawn, ax=axes, label="mean weight of a patch", extend="max")
figure.suptitle("Each head reads one quarter of a picture; the word chooses which picture")
alt = """Heat maps, a column for each of four heads, a row for each question. Each shows the 2 by 6
patches of three pictures side by side. In the row first, one patch of the left picture is bright;
in the row last the same patch of the right one; in the row largest the weight is spread."""
show(figure, "heads", alt)

# %% [markdown]
# *What to see.* A head has become a reader of one quarter: nearly always the same quarter whether
# the word says `first` or `last`; only the picture changes. Four averages carry four patches side
# by side, which is what one head could not do. Look at the printed favourites, too: in some runs
# two heads share a quarter, and nothing forbids it.
#
# And the riddle of `last`: its scores are highest for picture 3 and lower for picture 2. Where
# picture 3 is padding, the mask takes it out, and the softmax hands its weight to the next in line.
# Part of the answer is computed by the *mask*.
#
# ### Looking is not depending
#
# A bright patch shows where a head takes its values from. It does not show what the answer depends
# on. To know that, **intervene**: put a handwritten 0 in the place of one picture, and count how
# often a right answer becomes wrong.
#
# > **Predict.** For `largest`, take rows of three different digits. How much more does the word
# > look at the largest one? And how often does the answer change when it is one of the *others*
# > that becomes a 0?

# %% tags=["experiment"]
different = (exam.shown.sort(dim=1).values.diff(dim=1) > 0).all(dim=1) & exam.is_token[:, -1]
zeros = test_sentences.patches[test_sentences.labels == 0]


def look_and_depend(model, word):
    """Over right answers to one question: shares of attention, and of answers that change."""
    chosen = different & (exam.words == word) & right_answers(model, exam)
    batch = Batch(*(field[chosen] for field in exam))
    looks, depends = word_weights(model, batch).mean(dim=1).view(-1, 3, 4).sum(dim=2), []
    for place in range(3):
        patches = batch.patches.clone()
        patches[:, 4 * place : 4 * place + 4] = zeros[torch.arange(len(patches)) % len(zeros)]
        depends.append(~right_answers(model, batch._replace(patches=patches)).cpu())
    both = torch.stack([looks, torch.stack(depends, dim=1).float()])
    if QUESTIONS[word] == "largest":  # sort the three pictures by their digits
        both = both.gather(2, batch.shown.cpu().argsort(dim=1, descending=True).expand(2, -1, -1))
    return both.mean(dim=1)


tables = [torch.stack([look_and_depend(model, word) for word in range(3)]) for model in models]
measured = torch.stack(tables)  # [seeds, questions, looks or depends, pictures]

# %% tags=["experiment", "hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", sharey=True)
for word, ax in enumerate(axes):
    for kind, colour in enumerate((ORANGE, BLUE)):
        label = ("looks: share of attention", "depends: answers that change")[kind]
        values, places = measured[:, word, kind], torch.arange(3) + 0.4 * kind - 0.2
        ax.bar(places, values.mean(dim=0), width=0.38, color=colour, label=label)
        ax.plot(places.expand_as(values).flatten(), values.flatten(), "k.", ms=3)
        for place, value in zip(places, values.T):
            ax.text(place, value.max() + 0.03, f"{value.mean():.2f}", ha="center", fontsize=8)
    ax.set(title=QUESTIONS[word], xlabel="picture", ylim=(0, 1.15))
    ax.set_xticks(range(3), ["1", "2", "3"])
axes[2].set_xticks(range(3), ["largest", "middle", "smallest"])
axes[2].set_xlabel("picture with this digit")
axes[0].set_ylabel("share")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
look, depend = measured[:, 2, :, 0].mean(dim=0)
title = f"largest: {look:.0%} of the attention on the picture that {depend:.0%} of the answers"
figure.suptitle(f"{title} depend on")
alt = """Three bar charts: share of attention, and share of right answers that change when a picture
becomes a 0. For first both are high at picture 1, for last at picture 3, elsewhere near 0. For
largest, attention is spread over all digits, while most answers depend on the largest alone."""
show(figure, "intervention", alt)

# %% [markdown]
# *What to see.* For `first` and `last`, looking and depending agree (one digit in ten is a 0
# already, so about 0.9 is the most to expect). For `largest` they part. When the word looks,
# nothing has been compared yet: keys of large digits score a little higher, no more. The decision
# falls afterwards, in the MLP, and leaves no trace in the map. Week 13 comes back to where such
# maps mislead (Jain and Wallace 2019).

# %% [markdown] written="map" points=3
# ### Written question: what does the map prove?
#
# For `largest`, a colleague looks at one sentence, sees 45% of the attention on picture 2, and
# writes: "The model answered 8 because it recognised the 8 in picture 2." In three to five
# sentences: what does the map show, what does it not show, and which experiment, with which
# outcome, would support the sentence?
#
# ### BEGIN SOLUTION
# The map shows from which tokens the word's heads averaged their values, and how much: 45% of the
# weight fell on picture 2's patches. It does not show which information these values carried, nor
# whether the answer depends on it: they may cancel or be ignored by the output projection, the MLP
# and the answer layer. To support the sentence, intervene: replace picture 2 by many other digits
# and see whether the answer changes, and follows the new largest digit; and replace pictures 1 and
# 3 by other digits below 8 and see whether the answer stays 8. If the answer changes only with
# picture 2, it depends on it; if it stays 8 with picture 2 gone, the sentence is wrong, however
# bright the patch.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: says what the weights are (shares of an average of values, from the word to picture 2's
#   patches), and no more.
# - 1 point: says that dependence does not follow (values may cancel or be ignored later), or gives
#   an example from the figure of section 11.
# - 1 point: proposes an intervention on the picture (replace, blank, swap) and names the outcome
#   that would support and the one that would refute the sentence.
# ### END MARK SCHEME

# %% [markdown]
# ## 12. Deeper: does the place of the norm matter for learning?
#
# Section 8 measured gradients before training. Now train six blocks of width 32 with a high
# learning rate and no warm-up, the norm before or after. Same sentences, same steps, two seeds.

# %% tags=["experiment"]
norm_places, deep_losses = {"post-norm": post_norm, "pre-norm, your block": pre_norm}, {}
for name, block in norm_places.items():
    for seed in (SEED, SEED + 1):
        set_seed(seed)
        deep = Reader(block, d_model=32, depth=6).to(device)
        losses = train(deep, train_sentences.stream(64, seed), answer_loss, steps=100, lr=1e-2)
        deep_losses[name, seed] = torch.tensor(losses).view(10, 10).mean(dim=1)
        print(f"{name:21} seed {seed}: loss {deep_losses[name, seed][-1]:.2f} in the last 10 steps")

# %% tags=["experiment", "hide-input"]
figure, ax = plt.subplots(figsize=(5.8, 3.2), layout="constrained")
for (name, seed), losses in deep_losses.items():
    colour, label = RED if name == "post-norm" else BLUE, name if seed == SEED else None
    ax.plot(range(5, 101, 10), losses, color=colour, label=label)
ax.axhline(math.log(10), color="black", lw=0.8, ls=":", label="log 10: guessing evenly")
ax.set(xlabel="step", ylabel="training loss (nats)")
ends = [torch.stack([deep_losses[name, SEED + n][-1] for n in (0, 1)]) for name in norm_places]
post, pre = (f"{end.mean():.2f}" for end in ends)
ax.set_title(f"Six blocks, no warm-up: post-norm ends at {post}, pre-norm at {pre} nats")
ax.legend()
alt = """Training loss over 100 steps, two seeds each. The post-norm lines stay near log 10; the
pre-norm lines fall clearly below it."""
show(figure, "warmup", alt)

# %% [markdown]
# *What to see.* Without warm-up the post-norm stack stays at guessing, while yours learns. This
# does not make post-norm wrong: with warm-up and a smaller rate it trains, and BERT, LayoutLM and
# wav2vec 2.0 base are built so. It makes it *fragile*. The size of gradients is not the whole
# reason, since Adam divides it out: Liu et al. 2020 show that a post-norm stack also amplifies
# small changes of its weights.
#
# ## 13. Go bigger
#
# Set `SCALE = "gpu"`, `DEVICE = "cuda"` and `DATA = "hub"` for five MNIST pictures in each
# sentence, 28 by 28 pixels, 16 patches each: 81 tokens, four blocks of width 256. At `SCALE =
# "cpu"` the same cell runs as a rehearsal of three steps, so that it is known to work.
#
# Things to try: does `last` survive ten pictures? Which block does the looking? Do eight heads
# still beat one when there are four blocks?

# %% tags=["experiment"]
full = SCALE == "gpu"
sizes = (256, 4, 3000, 256, 2000) if full else (32, 2, 3, 8, 50)
width, depth, steps, batch_size, questions = sizes
big_train = Sentences(digits.load("train", source=DATA, pixels=28), side=7, most=5)
big_test = Sentences(digits.load("test", source=DATA, pixels=28), side=7, most=5)
set_seed(SEED)
bigger = Reader(pre_norm, width, num_heads=8, depth=depth, patches=(80, 49)).to(device)
start = time.perf_counter()
losses = train(bigger, big_train.stream(batch_size, SEED), answer_loss, steps, lr=3e-4)
big_exam = big_test.draw(questions, torch.Generator().manual_seed(99))
share, spent = right_answers(bigger, big_exam).float().mean(), time.perf_counter() - start
print(f"{'full run' if full else 'rehearsal'}: {steps} steps in {spent:.0f} s, right {share:.3f}")
print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last")

# %% [markdown]
# ## What was new
#
# | idea | in one line | what you measured | where it stands in `mmlearn` |
# |---|---|---|---|
# | token | a vector in the sequence, whatever it stands for | a word and twelve patches in one row | `text.TokenEmbedding`, `vision.PatchEmbedding` |
# | attention | softmax($QK^\top/\sqrt K$)$V$: each query's own average of the values | equal to PyTorch's to float32's rounding | `transformer.attention` |
# | $\sqrt K$ | keeps scores at variance 1 | the only scaling whose gradient does not depend on the width | `transformer.attention` |
# | equivariance | shuffled in, shuffled out | without positions, `first` is a guess | `transformer.sinusoidal_positions` |
# | mask | `True` = may attend; hides columns | padding changes nothing; a row that sees nothing is NaN | `transformer.check_mask`, `causal_mask` |
# | head | a slice of the width with its own softmax | four heads against one | `transformer.Attention` |
# | cost | projections and MLP like $L$, mixing like $L^2$ | slopes on the clock | |
# | pre-norm block | sublayers read through a norm and add to a free stream | last gradient like $1/\sqrt{\text{depth}}$; learns without warm-up | `transformer.Block(norm="pre")` |
# | training loop | loss, clear, backward, step | everything above | `train.fit` |
#
# `mmlearn` holds the same parts, faster and with their errors named; `train.fit` is your loop with
# a schedule, clipping and a progress bar. From next week you import them.
#
# **Beside the paper.** Vaswani 2017, table 3, rows A: translation with 8 heads reaches 25.8 BLEU,
# with one head of the same total width 24.9. You saw a far larger gap between one head and four,
# about ten points of accuracy. Three differences explain it: their model has six layers of encoder
# and six of decoder, so what one average blurs, the next layer can fetch again, and yours has a
# single block; your word needs four patches *side by side* in that block, by design; and BLEU and
# accuracy are different scales. What carries over is the reason, not the size.

# %% [markdown]
# ## Three interview questions
#
# **1. (screen) Why is the dot product divided by $\sqrt{d_k}$?**
#
# <details><summary>Answer</summary>
#
# Components of mean 0 and variance 1 give a dot product of variance $d_k$. At $d_k = 64$ scores
# have a standard deviation of 8, and the softmax typically puts most of its weight on one key,
# where its derivative $p_i(\delta_{ij} - p_j)$ is close to 0: many queries get almost no gradient,
# a few a huge one. Dividing by $\sqrt{d_k} = 8$ brings the standard deviation back to 1 for any
# width. Dividing by $d_k$ would overshoot: nearly uniform weights. (Vaswani 2017, section 3.2.1,
# footnote 4; figure of section 3.)
#
# *Often wrong:* "so that the weights sum to one" (softmax does that), "for numerical overflow"
# (softmax subtracts the maximum).
#
# </details>
#
# **2. (core) CLIP's ViT-L/14 is taken from 224 to 336 pixels. What happens to its cost?**
#
# <details><summary>Answer</summary>
#
# Tokens: $(224/14)^2 + 1 = 257$, $(336/14)^2 + 1 = 577$, 2.25 times as many. With $D = 1024$ and $F =
# 4D$ a block takes $12LD^2$ multiplications for projections and MLP, and $2L^2D$ for the mixing.
# The first grows 2.25 times, the second 5.04 times. The mixing's share relative to the rest is
# $L/6D$: 4.2% before, 9.4% after, so the block costs 2.36 times as much in all. The square matters
# only near $L = 6D = 6144$ tokens; memory for stored weights ($4HL^2$ bytes in float32 a sequence
# and layer) hurts earlier, and a fused kernel avoids it. (Section 7; Dao 2022, section 3.1.)
#
# *Often wrong:* "attention is quadratic, so 5 times the cost".
#
# </details>
#
# **3. (deep) You batch sentences with different numbers of pictures. How do you make sure that
# padding has no influence, and how do you test it?**
#
# <details><summary>Answer</summary>
#
# A boolean mask `[B, 1, 1, L]` that hides padded *keys* in every layer: scores become $-\infty$
# before the softmax. Padded queries may compute what they like, as long as nobody reads them; a row
# that sees no key is NaN. Pool only over real tokens, and take the loss only there. Test the law:
# the same sentence alone and padded, with *random* values in the padding, must agree to about 1e-6
# in float32, outputs and gradients. Mind whose convention you are in: in PyTorch's
# `scaled_dot_product_attention` `True` means may attend, in `nn.MultiheadAttention`'s
# `key_padding_mask` it means hidden. (Sections 5 and 6.)
#
# *Often wrong:* "padding is zero, so it adds nothing" (a score of 0 has weight $e^0$, and after one
# layer padding is not zero any more).
#
# </details>

# %% [markdown]
# ## Papers
#
# - Vaswani et al. 2017, [Attention Is All You Need](https://arxiv.org/abs/1706.03762). Section
#   3.2.1, equation 1 and footnote 4: the formula and the root. Section 3.2.2: heads. Section 3.5:
#   positions. Table 3: rows A, the number of heads; row E, learned positions.
# - Xiong et al. 2020, [On Layer Normalization in the Transformer
#   Architecture](https://arxiv.org/abs/2002.04745). Theorem 1 in section 3.3; figure 3 and section
#   3.4: the measurement that you repeated.
# - Liu et al. 2020, [Understanding the Difficulty of Training
#   Transformers](https://arxiv.org/abs/2004.08249). Abstract: why unequal gradients are not the
#   whole story.
# - Raffel et al. 2020, [Exploring the Limits of Transfer Learning with a Unified Text-to-Text
#   Transformer](https://arxiv.org/abs/1910.10683). Section 3.2.1, figure 3: full, causal and prefix
#   masks.
# - Dosovitskiy et al. 2021, [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929).
#   Section 3.1: patches as tokens.
# - Dao et al. 2022, [FlashAttention](https://arxiv.org/abs/2205.14135). Section 3.1: the same
#   numbers without storing the weights.
# - Loshchilov and Hutter 2019, [Decoupled Weight Decay
#   Regularization](https://arxiv.org/abs/1711.05101). Algorithm 2: AdamW.
# - Jain and Wallace 2019, [Attention is not Explanation](https://arxiv.org/abs/1902.10186), and the
#   answer by Wiegreffe and Pinter 2019, [Attention is not not
#   Explanation](https://arxiv.org/abs/1908.04626).
