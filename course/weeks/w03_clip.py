# %% [markdown]
# # Week 3. How can captions teach vision?
#
# A label says one word about a picture. A caption says many, costs nothing, and the web is full of
# them. CLIP learns from 400 million such pairs with a game of matching: *which of these captions
# belongs to this picture?*
#
# **You will build** the game's loss in three forms, the two towers that play it, and a classifier
# made of nothing but words. **You will measure** how well it reads handwriting that it has never
# seen, whether it understands a colour and a shape that it never saw together, and why the batch
# is the most expensive part of CLIP.
#
# Two hours; about a minute and a half of computing on a laptop's processor.

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"  # "cuda" for a GPU, "auto" for the best there is
SCALE = "cpu"  # "gpu" runs the larger experiment at the end
DATA = "embedded"  # "hub" fetches MNIST instead of scikit-learn's digits

# %%
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmlearn.data import digits, scenes
from mmlearn.metrics import mean_and_spread, recall_at_k
from mmlearn.text import BytePairTokenizer, TokenEmbedding
from mmlearn.train import choose_device, fit, set_seed
from mmlearn.transformer import Encoder
from mmlearn.vision import ConvStem

torch.set_num_threads(1)  # models this small are faster on one thread than on two
device = choose_device(DEVICE)

# %% tags=["experiment", "hide-input"]
import matplotlib.pyplot as plt

from mmlearn.figures import BLUE, GREEN, GREY, RED, set_style, show

set_style()

# %% [markdown]
# ## 1. Pictures with something said about them
#
# Two sets, both small enough to train on here. The first is real: digits written by hand, 1,287 to
# learn from and 510 for the test, which come from forms that are not in the training set. The
# second is drawn: six shapes in six colours.

# %% tags=["experiment"]
train_digits = digits.load("train", source=DATA, seed=SEED)
test_digits = digits.load("test", source=DATA, seed=SEED)
train_scenes = scenes.load("train", seed=SEED, size=6000)
test_scenes = scenes.load("test", seed=SEED)
unseen_scenes = scenes.load("unseen", seed=SEED)
for split in (train_digits, test_digits, train_scenes, unseen_scenes):
    print(split.describe())

# %% tags=["experiment"]
figure, axes = plt.subplots(2, 6, figsize=(11, 4.4), layout="constrained")
for axis, example in zip(axes[0], (train_digits[i] for i in range(6))):
    axis.imshow(example.image[0], cmap="gray_r")
    axis.set_title(example.caption, fontsize=8)
for axis, i in zip(axes[1], range(6)):
    axis.imshow(train_scenes.images[i].permute(1, 2, 0))
    axis.set_title(train_scenes.class_names[train_scenes.labels[i]], fontsize=8)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("digits, 8 × 8")
axes[1, 0].set_ylabel("scenes, 32 × 32")
figure.suptitle("A caption says what is there in many ways; a class name in one")
show(
    figure,
    "data",
    "Six handwritten digits with captions such as 'the digit 3', and six coloured shapes.",
)

# %% [markdown]
# *What to see.* Above the digits stand captions, which differ from picture to picture even for the
# same digit; above the scenes the names of their classes.
#
# Thirty of the 36 combinations of colour and shape are in the training set. The other six never are,
# though every colour and every shape is: a red triangle never, but red squares and blue
# triangles. Whoever knows what *red* and *triangle* mean needs no example of both.

# %% [markdown]
# ## 2. The game: every picture against every caption
#
# Take a batch of $N$ pairs. One tower turns pictures into vectors, the other turns captions into
# vectors of the same width $E$. All $N \times N$ cosines between them, times a scale, are the
# logits:
#
# $$ \mathrm{logits}_{it} = s \cdot \frac{x_i}{\lVert x_i \rVert} \cdot \frac{y_t}{\lVert y_t \rVert} $$
#
# Row $i$ belongs to picture $i$. Its own caption stands on the diagonal; the other $N-1$ are wrong
# answers that came for free.

# %% [markdown] exercise="similarity" difficulty=1 minutes=8
# ### Exercise 1: all cosines at once
#
# Write `similarity(images_IE, texts_TE, scale)`. It returns the logits, one row an image, one
# column a text. Normalise here: do not trust the caller.
#
# *Afterwards you can say:* why CLIP compares directions and not dot products.
#
# <details><summary>Hint 1</summary>
#
# `F.normalize` divides by the length; say along which axis a vector lies.
#
# </details>
# <details><summary>Hint 2</summary>
#
# ```
# divide each row of both by its length
# return scale times (images times texts transposed)
# ```
#
# </details>


# %% answer="similarity"
def similarity(images_IE, texts_TE, scale):
    """Return scale times the cosine of every image with every text, shape (I, T)."""
    ### BEGIN SOLUTION
    images_IE = F.normalize(images_IE, dim=-1)
    texts_TE = F.normalize(texts_TE, dim=-1)
    return scale * images_IE @ texts_TE.T
    ### END SOLUTION


# %% check="similarity" aspect="example" points=2 title="numbers you can work by hand"
import torch
from mmlearn.feedback import expect

expect(
    "w03_clip/similarity/hand",
    similarity(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0]]), 10.0),
    torch.tensor([[6.0], [0.0]]),
    "(3, 4) has length 5, so its cosine with (5, 0) is 3/5, and ten times that is 6; "
    "(0, 2) is at a right angle to it.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(11)
some_images, some_texts = (torch.randn(n, 6, generator=draw) for n in (4, 3))
table = torch.cosine_similarity(some_images[:, None], some_texts[None], dim=-1)
assert torch.allclose(similarity(some_images, some_texts, 2.5), 2.5 * table, atol=1e-5)
### END HIDDEN TESTS

# %% check="similarity" aspect="law" points=1 title="longer vectors say nothing more"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(12)
some_images, some_texts = (torch.randn(n, 5, generator=draw) for n in (3, 4))
stretched = some_images * torch.tensor([[0.1], [1.0], [70.0]])
before = similarity(some_images, some_texts, 7.0)
assert before.std() > 0.1, "not all pairs are alike"
assert torch.allclose(similarity(stretched, some_texts, 7.0), before, atol=1e-4)
assert torch.allclose(similarity(some_images, 9 * some_texts, 7.0), before, atol=1e-4)
### END HIDDEN TESTS


# %% wrong="similarity" name="no_length" says="These are dot products: a long vector would win every comparison. Divide each vector by its length first."
def similarity(images_IE, texts_TE, scale):
    return scale * images_IE @ texts_TE.T


# %% wrong="similarity" name="wrong_axis" says="You divided by the length of the columns, across the batch. Each row is a vector: normalise along the last axis."
def similarity(images_IE, texts_TE, scale):
    return scale * F.normalize(images_IE, dim=0) @ F.normalize(texts_TE, dim=0).T


# %% wrong="similarity" name="divides" says="You divided by the scale. The scale is one over the temperature: multiply."
def similarity(images_IE, texts_TE, scale):
    return F.normalize(images_IE, dim=-1) @ F.normalize(texts_TE, dim=-1).T / scale


# %% wrong="similarity" name="one_tower" says="Only one side has unit length. Normalise the images and the texts."
def similarity(images_IE, texts_TE, scale):
    return scale * F.normalize(images_IE, dim=-1) @ texts_TE.T


# %% wrong="similarity" name="transposed" says="Rows and columns are swapped: each row belongs to an image, each column to a text."
def similarity(images_IE, texts_TE, scale):
    return scale * F.normalize(texts_TE, dim=-1) @ F.normalize(images_IE, dim=-1).T


# %% [markdown]
# ### Why the scale?
#
# A cosine lies between −1 and 1, so a softmax over cosines can hardly prefer anything. How well
# could a *perfect* model do? Its own pair has cosine 1. The others cannot all be at −1: the squared
# length of a sum is never negative, $0 \le \lVert \sum_i x_i \rVert^2 = N + \sum_{i \ne t} x_i \cdot x_t$,
# so the mean cosine of two different pairs is at least $-\frac{1}{N-1}$. A row costs
# $\ln\big(1 + \sum_{t \ne i} e^{s (x_i \cdot x_t - 1)}\big)$, which is convex in the cosines: for a given
# mean it is least when all are equal. Hence
#
# $$ \mathcal L \;\ge\; \ln\!\Big(1 + (N-1)\,e^{-s\,N/(N-1)}\Big). $$
#
# <details><summary>Could two towers do better whose own pairs do not agree perfectly?</summary>
#
# No. Let $a \le 1$ be the mean cosine of the $N$ own pairs, $X = \sum_i x_i$ and $Y = \sum_t y_t$. By the same
# convexity only $m$ counts, the mean of the other cosines minus $a$:
# $m = \frac{X \cdot Y - Na}{N(N-1)} - a = \frac{X \cdot Y}{N(N-1)} - \frac{N a}{N-1}$. And
# $X \cdot Y = \frac14 \lVert X + Y \rVert^2 - \frac14 \lVert X - Y \rVert^2 \ge -\frac N4 \sum_i \lVert x_i - y_i \rVert^2 = -\frac{N^2}{2}(1 - a)$.
# Together $m \ge -\frac{N}{N-1} \cdot \frac{1 + a}{2} \ge -\frac{N}{N-1}$: the bound above, reached only at $a = 1$.
#
# </details>
#
# > **Predict** before you run the cell: with CLIP's batch of 32,768 and no scale ($s = 1$), how far
# > below the loss of pure guessing, $\ln N = 10.4$, can the best model get?

# %% tags=["experiment"]
scales = torch.logspace(0, 2, 200)
figure, axis = plt.subplots(figsize=(7, 3.6))
for size, colour in ((64, BLUE), (1024, GREEN), (32768, RED)):
    floor = torch.log1p((size - 1) * torch.exp(-scales * size / (size - 1)))
    axis.plot(
        scales, floor, color=colour, label=f"N = {size:,}: guessing scores {math.log(size):.1f}"
    )
    print(f"N = {size:6,}: floor at scale 1 is {floor[0]:.2f}, at scale 14.3 {floor[115]:.4f}")
axis.axvline(1 / 0.07, color=GREY, linestyle=":", label="where CLIP starts, 1 / 0.07")
axis.set(
    xscale="log", xlabel="scale s (one over the temperature)", ylabel="lowest possible loss (nats)"
)
axis.set_title("Without a scale, even a perfect model looks like a guesser")
axis.legend(fontsize=8)
show(
    figure,
    "floor",
    "The lowest possible loss falls from near ln N at scale 1 to zero around scale 10 to 20.",
)

# %% [markdown]
# *What to see.* At the left end each curve lies one nat below its $\ln N$, whatever $N$ is: the scale is the number of nats that cosines can express. CLIP learns $s$ as
# $e^{\texttt{logit\_scale}}$, starts it at $1/0.07$ and caps it at 100, since nothing else would
# (Radford 2021, section 2.5).

# %% [markdown]
# ## 3. The loss: both sides must find their partner
#
# Each row is a classification with $N$ classes whose right answer is its own index. So is each
# column. CLIP averages the two cross-entropies:
#
# $$ \mathcal L = \frac12 \left( \frac1N \sum_i -\ln \frac{e^{l_{ii}}}{\sum_t e^{l_{it}}} \;+\;
#    \frac1N \sum_t -\ln \frac{e^{l_{tt}}}{\sum_i e^{l_{it}}} \right) $$

# %% [markdown] exercise="contrastive_loss" difficulty=2 minutes=12 forbids=["mmlearn.contrastive.tiled_contrastive_loss"]
# ### Exercise 2: the symmetric cross-entropy
#
# Write `contrastive_loss(logits_NN)`, in nats, for logits of any size.
#
# *Afterwards you can say:* what the labels of CLIP's cross-entropy are, and why there are two.
#
# <details><summary>Hint 1</summary>
#
# The right class of row 0 is 0, of row 1 is 1, and so on: `torch.arange`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The columns' loss is the rows' loss of the transpose.
#
# </details>
# <details><summary>Hint 3</summary>
#
# ```
# target = 0, 1, ..., N - 1
# return (cross_entropy(logits, target) + cross_entropy(transposed logits, target)) / 2
# ```
#
# </details>


# %% answer="contrastive_loss"
def contrastive_loss(logits_NN):
    """Return the mean of the images' and the texts' cross-entropy, in nats."""
    ### BEGIN SOLUTION
    partner = torch.arange(len(logits_NN), device=logits_NN.device)
    image_to_text = F.cross_entropy(logits_NN, partner)
    text_to_image = F.cross_entropy(logits_NN.T, partner)
    return (image_to_text + text_to_image) / 2
    ### END SOLUTION


# %% check="contrastive_loss" aspect="example" points=2 title="two pairs, worked by hand"
import math
import torch
from mmlearn.feedback import expect

expect(
    "w03_clip/contrastive_loss/perfect",
    contrastive_loss(math.log(3) * torch.eye(2)),
    math.log(4 / 3),
    "Each row and each column gives its partner 3/4 of the probability, so the loss is ln(4/3).",
)
expect(
    "w03_clip/contrastive_loss/sides",
    contrastive_loss(torch.tensor([[math.log(3), math.log(3)], [0.0, 0.0]])),
    (math.log(2) + (math.log(4 / 3) + math.log(4)) / 2) / 2,
    "Both rows are undecided, ln 2 each; the columns score ln(4/3) and ln 4. Average all of it.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(21)
logits = 3 * torch.randn(7, 7, generator=draw)
by_rows = -torch.log_softmax(logits, dim=1).diagonal().mean()
by_columns = -torch.log_softmax(logits, dim=0).diagonal().mean()
assert torch.allclose(contrastive_loss(logits), (by_rows + by_columns) / 2, atol=1e-5)
assert abs(float(contrastive_loss(torch.zeros(9, 9))) - math.log(9)) < 1e-5
### END HIDDEN TESTS

# %% check="contrastive_loss" aspect="law" points=1 title="images and texts are treated alike, in any order"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(22)
logits, order = torch.randn(6, 6, generator=draw), torch.tensor([3, 1, 5, 0, 2, 4])
loss = contrastive_loss(logits)
assert abs(float(contrastive_loss(2 * logits)) - float(loss)) > 1e-3, "surer is another loss"
assert torch.allclose(contrastive_loss(logits.T), loss, atol=1e-6)
assert torch.allclose(contrastive_loss(logits[order][:, order]), loss, atol=1e-6)
assert torch.allclose(contrastive_loss(logits + 5), loss, atol=1e-5)
### END HIDDEN TESTS

# %% check="contrastive_loss" aspect="overflow" points=1 title="survives logits of ten thousand"
### BEGIN HIDDEN TESTS
import torch

huge = contrastive_loss(1e4 * torch.tensor([[0.9, 1.0], [-1.0, 0.3]]))
assert torch.isfinite(torch.as_tensor(huge))
assert abs(float(huge) - 2000.0) < 0.5  # one row is wrong by 1,000 nats, one column by 7,000
### END HIDDEN TESTS

# %% check="contrastive_loss" aspect="gradient" points=1 title="its gradient is softmax minus the diagonal"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(23)
logits = torch.randn(5, 5, generator=draw, requires_grad=True)
both = (logits.detach().softmax(dim=1) + logits.detach().softmax(dim=0)) / 2
contrastive_loss(logits).backward()
assert torch.allclose(logits.grad, (both - torch.eye(5)) / 5, atol=1e-6)
### END HIDDEN TESTS


# %% wrong="contrastive_loss" name="one_sided" says="Your loss only asks each image for its text. CLIP also asks each text for its image."
def contrastive_loss(logits_NN):
    return F.cross_entropy(logits_NN, torch.arange(len(logits_NN)))


# %% wrong="contrastive_loss" name="same_side_twice" says="Both halves ask the images. The second must ask the texts: use the transpose."
def contrastive_loss(logits_NN):
    partner = torch.arange(len(logits_NN))
    return (F.cross_entropy(logits_NN, partner) + F.cross_entropy(logits_NN, partner)) / 2


# %% wrong="contrastive_loss" name="adds_the_sides" says="You added the two directions. CLIP takes their mean, so that guessing scores ln N."
def contrastive_loss(logits_NN):
    partner = torch.arange(len(logits_NN))
    return F.cross_entropy(logits_NN, partner) + F.cross_entropy(logits_NN.T, partner)


# %% wrong="contrastive_loss" name="sums_the_batch" says="You summed over the batch. Take the mean, or the loss grows with N."
def contrastive_loss(logits_NN):
    partner = torch.arange(len(logits_NN))
    rows = F.cross_entropy(logits_NN, partner, reduction="sum")
    return (rows + F.cross_entropy(logits_NN.T, partner, reduction="sum")) / 2


# %% wrong="contrastive_loss" name="softmax_twice" says="cross_entropy applies softmax itself: give it logits, not probabilities."
def contrastive_loss(logits_NN):
    partner = torch.arange(len(logits_NN))
    rows = F.cross_entropy(logits_NN.softmax(dim=1), partner)
    return (rows + F.cross_entropy(logits_NN.T.softmax(dim=1), partner)) / 2


# %% wrong="contrastive_loss" name="overflows" says="exp of a large logit is infinite in float32. Let cross_entropy or log_softmax subtract the maximum first."
def contrastive_loss(logits_NN):
    powers = logits_NN.exp()
    rows = -(powers / powers.sum(dim=1, keepdim=True)).diagonal().log().mean()
    columns = -(powers / powers.sum(dim=0, keepdim=True)).diagonal().log().mean()
    return (rows + columns) / 2


# %% [markdown]
# The derivative of one row's $-\ln \mathrm{softmax}$ by its logits is its probabilities, minus 1 at the
# target. So for the whole loss it is $\frac1N\big(\frac{P_\text{rows} + P_\text{columns}}{2} -
# I\big)$: pull each pair together by what is missing from 1, push every other pair apart by the
# probability that it wrongly holds. Hard negatives are pushed hardest, and nobody had to choose them.

# %% tags=["experiment"]
draw = set_seed(SEED)
x_NE, y_NE = torch.randn(2, 40, 16, generator=draw)
logits = similarity(x_NE, y_NE, 14.3).requires_grad_()
(gradient,) = torch.autograd.grad(contrastive_loss(logits), logits)
print(
    f"guessing would score ln 40 = {math.log(40):.2f}; random vectors score "
    f"{contrastive_loss(logits).item():.2f}"
)
print(
    f"the gradient's diagonal sums to {gradient.diagonal().sum():.3f}, the rest to "
    f"{(gradient.sum() - gradient.diagonal().sum()):.3f}: pull and push balance"
)

# %% [markdown]
# ## 4. Two towers
#
# Any two encoders will do. Captions go through a causal transformer and are read at the
# end-of-text token: the only one that has seen every word. A caption shorter than the longest is
# filled up with that very token, so the *first* one is the end.

# %% [markdown] exercise="read_end" difficulty=2 minutes=10
# ### Exercise 3: where does a sentence end?
#
# Write `read_end(states_BLD, input_ids_BL, eos_token_id)`. It returns each text's state at its first
# end-of-text token, shape (B, D), and raises a `ValueError` when a text has none.
#
# *Afterwards you can say:* how CLIP pools text, and what went wrong in years of published
# configurations (their `eos_token_id` was 2, and code that looked for the largest id hid it).
#
# <details><summary>Hint 1</summary>
#
# `input_ids == eos_token_id` is True at every end; `argmax` of its integers finds the first.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `states[rows, columns]` with two index tensors picks one position per row. And what does `argmax` say
# of a row without any True?
#
# </details>
# <details><summary>Hint 3</summary>
#
# ```
# is_end = where the ids are the end token
# if some text has none: raise ValueError
# first = index of the first True in each row
# return states at (0, first of 0), (1, first of 1), ...
# ```
#
# </details>


# %% answer="read_end"
def read_end(states_BLD, input_ids_BL, eos_token_id):
    """Return the state at the first end-of-text token of each text, shape (B, D)."""
    ### BEGIN SOLUTION
    is_end_BL = input_ids_BL == eos_token_id
    if not is_end_BL.any(dim=1).all():
        raise ValueError(f"a text has no end-of-text token (id {eos_token_id})")
    first_B = is_end_BL.int().argmax(dim=1)
    return states_BLD[torch.arange(len(states_BLD)), first_B]
    ### END SOLUTION


# %% check="read_end" aspect="example" points=2 title="two short texts, one padded"
import torch
from mmlearn.feedback import expect

expect(
    "w03_clip/read_end/hand",
    read_end(
        torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]),
        torch.tensor([[5, 9, 9], [5, 12, 9]]),
        9,
    ),
    torch.tensor([[2.0], [6.0]]),
    "With 9 as the end, the first text ends at position 1 and the second at position 2.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(31)
states = torch.randn(4, 6, 3, generator=draw)
ids = torch.tensor([[8, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2], [7, 9, 8, 7, 9, 2], [3, 9, 2, 7, 2, 2]])
wanted = torch.stack([states[0, 1], states[1, 0], states[2, 5], states[3, 2]])
assert torch.equal(read_end(states, ids, 2), wanted)
### END HIDDEN TESTS

# %% check="read_end" aspect="refusal" points=1 title="a text without an end is refused"
### BEGIN HIDDEN TESTS
import torch

try:
    read_end(torch.zeros(2, 3, 1), torch.tensor([[5, 9, 9], [5, 6, 7]]), 9)
except ValueError:
    pass
else:
    raise AssertionError("a text without an end-of-text token must raise a ValueError")
### END HIDDEN TESTS


# %% wrong="read_end" name="last_position" says="You read the last position, which is padding in every text but the longest."
def read_end(states_BLD, input_ids_BL, eos_token_id):
    return states_BLD[:, -1]


# %% wrong="read_end" name="largest_id" says="You looked for the largest id. That works only while end-of-text happens to be the largest: compare with eos_token_id."
def read_end(states_BLD, input_ids_BL, eos_token_id):
    return states_BLD[torch.arange(len(states_BLD)), input_ids_BL.argmax(dim=1)]


# %% wrong="read_end" name="last_end" says="You took the last end-of-text token. Padding repeats it: the first one is where the text ends."
def read_end(states_BLD, input_ids_BL, eos_token_id):
    if not (input_ids_BL == eos_token_id).any(dim=1).all():
        raise ValueError("no end")
    last = input_ids_BL.shape[1] - 1 - (input_ids_BL == eos_token_id).int().flip(1).argmax(dim=1)
    return states_BLD[torch.arange(len(states_BLD)), last]


# %% wrong="read_end" name="first_position" says="You read the first position. Under a causal mask it has seen one word, its own."
def read_end(states_BLD, input_ids_BL, eos_token_id):
    return states_BLD[:, 0]


# %% wrong="read_end" name="silent" says="argmax of a row without any True is 0, so a text without an end is read at its first word in silence. Raise a ValueError."
def read_end(states_BLD, input_ids_BL, eos_token_id):
    first_B = (input_ids_BL == eos_token_id).int().argmax(dim=1)
    return states_BLD[torch.arange(len(states_BLD)), first_B]


# %%
class TextTower(nn.Module):
    """Words and positions, a causal encoder, your read_end, a projection."""

    def __init__(self, tokenizer, max_length, d_model, embed_dim):
        super().__init__()
        self.eos_token_id = tokenizer.eos_token_id
        self.embed = TokenEmbedding(tokenizer.vocab_size, d_model, max_length)
        self.encoder = Encoder(1, d_model, 4, 2 * d_model)
        self.norm = nn.LayerNorm(d_model)
        self.projection = nn.Linear(d_model, embed_dim, bias=False)

    def forward(self, input_ids):
        states = self.norm(self.encoder(self.embed(input_ids), causal=True))
        return self.projection(read_end(states, input_ids, self.eos_token_id))


# %% [markdown]
# The picture's tower begins with a *stem* that turns an image into tokens: patches for the digits,
# a few small convolutions for the scenes. Week 2 builds both. What comes after is yours.

# %% [markdown] exercise="image_tower" difficulty=3 minutes=20
# ### Exercise 4: the image tower
#
# Complete `ImageTower`. To the stem's tokens add a learned vector *for each position*; run `Encoder`;
# apply a LayerNorm; average over the tokens; project to `embed_dim` without a bias. (CLIP reads an
# extra class token instead of the average; both work.)
#
# *Afterwards you can say:* what separates a Vision Transformer from a bag of patches.
#
# <details><summary>Hint 1</summary>
#
# `nn.Parameter(0.02 * torch.randn(num_tokens, d_model))` is added to a (B, L, D) tensor as it is.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `Encoder(num_layers, d_model, num_heads, d_ff)`; take `d_ff = 4 * d_model`. Axis 1 holds the tokens.
#
# </details>
# <details><summary>Hint 3</summary>
#
# ```
# once:  positions (num_tokens, d_model), encoder, layer norm, linear map without bias
# then:  tokens = stem(images) + positions
#        tokens = norm(encoder(tokens))
#        return linear map of the mean over the tokens
# ```
#
# </details>


# %% answer="image_tower"
class ImageTower(nn.Module):
    """Turn images into vectors of width embed_dim: stem, positions, encoder, mean, projection."""

    def __init__(self, stem, num_tokens, d_model, num_heads, num_layers, embed_dim):
        super().__init__()
        self.stem = stem
        ### BEGIN SOLUTION
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, d_model))
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)
        self.projection = nn.Linear(d_model, embed_dim, bias=False)
        ### END SOLUTION

    def forward(self, images):
        """Return one vector an image, shape (B, embed_dim)."""
        ### BEGIN SOLUTION
        tokens_BLD = self.encoder(self.stem(images) + self.positions)
        return self.projection(self.norm(tokens_BLD).mean(dim=1))
        ### END SOLUTION


# %% check="image_tower" aspect="example" points=2 title="three images of four patches"
import torch
from mmlearn.feedback import expect
from mmlearn.vision import PatchEmbedding

torch.manual_seed(0)
small_tower = ImageTower(PatchEmbedding(8, 4, 12, num_channels=1), 4, 12, 3, 2, 5)
three = torch.randn(3, 1, 8, 8)
expect(
    "w03_clip/image_tower/shape",
    list(small_tower(three).shape),
    [3, 5],
    "Three images and embed_dim = 5 must give the shape (3, 5).",
)
expect(
    "w03_clip/image_tower/alone",
    bool(torch.allclose(small_tower(three)[1:2], small_tower(three[1:2]), atol=1e-5)),
    True,
    "An image's vector changed with the other images in its batch.",
)
### BEGIN HIDDEN TESTS
import torch
from mmlearn.vision import PatchEmbedding

torch.manual_seed(41)
other_tower = ImageTower(PatchEmbedding(12, 4, 10, num_channels=2), 9, 10, 2, 1, 7)
four = torch.randn(4, 2, 12, 12)
assert tuple(other_tower(four).shape) == (4, 7)
assert torch.allclose(other_tower(four[2:3]), other_tower(four)[2:3], atol=1e-5)
assert other_tower(four).std(dim=0).max() > 1e-4, "other images have other vectors"
### END HIDDEN TESTS

# %% check="image_tower" aspect="positions" points=1 title="swapping two patches is noticed"
import torch
from mmlearn.feedback import expect
from mmlearn.vision import PatchEmbedding

torch.manual_seed(1)
halves = ImageTower(PatchEmbedding(8, 4, 12, num_channels=1), 4, 12, 3, 2, 5)
picture = torch.randn(1, 1, 8, 8)
mirrored = torch.cat([picture[..., 4:], picture[..., :4]], dim=-1)
expect(
    "w03_clip/image_tower/order",
    bool((halves(picture) - halves(mirrored)).abs().max() > 1e-4),
    True,
    "The left and the right half changed places, and your tower did not notice.",
)
### BEGIN HIDDEN TESTS
import torch
from mmlearn.vision import PatchEmbedding

torch.manual_seed(42)
ordered = ImageTower(PatchEmbedding(8, 4, 12, num_channels=1), 4, 12, 3, 2, 5)
image = torch.randn(1, 1, 8, 8)
swapped = torch.cat([image[..., 4:], image[..., :4]], dim=-1)  # left and right change places
assert (ordered(image) - ordered(swapped)).abs().max() > 1e-4
### END HIDDEN TESTS

# %% check="image_tower" aspect="gradient" points=1 title="every patch and every weight takes part"
import torch
from mmlearn.feedback import expect
from mmlearn.vision import PatchEmbedding

torch.manual_seed(2)
no_layers = ImageTower(PatchEmbedding(8, 4, 12, num_channels=1), 4, 12, 3, 0, 5)
dark, corner = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
corner[..., 7, 7] = 1.0
expect(
    "w03_clip/image_tower/corner",
    bool((no_layers(dark) - no_layers(corner)).abs().max() > 1e-4),
    True,
    "A bright pixel in the last patch left the vector as it was: average over all tokens.",
)
### BEGIN HIDDEN TESTS
import torch
from mmlearn.vision import PatchEmbedding

torch.manual_seed(43)
shallow = ImageTower(PatchEmbedding(8, 4, 12, num_channels=1), 4, 12, 3, 0, 5)
image = torch.randn(1, 1, 8, 8, requires_grad=True)
shallow(image).square().sum().backward()
assert (image.grad.abs() > 0).float().mean() > 0.9, "some patches never reach the vector"
assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in shallow.parameters())
### END HIDDEN TESTS


# %% wrong="image_tower" name="no_positions" says="Without positions your tower sees a bag of patches: a six and a nine hold much the same ones."
class ImageTower(nn.Module):
    def __init__(self, stem, num_tokens, d_model, num_heads, num_layers, embed_dim):
        super().__init__()
        self.stem, self.norm = stem, nn.LayerNorm(d_model)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.projection = nn.Linear(d_model, embed_dim, bias=False)

    def forward(self, images):
        return self.projection(self.norm(self.encoder(self.stem(images))).mean(dim=1))


# %% wrong="image_tower" name="one_position" says="If you have positions, is it one row for each token? The same vector added to all of them tells no patch from another."
class ImageTower(nn.Module):
    def __init__(self, stem, num_tokens, d_model, num_heads, num_layers, embed_dim):
        super().__init__()
        self.stem, self.norm = stem, nn.LayerNorm(d_model)
        self.positions = nn.Parameter(torch.randn(d_model))
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.projection = nn.Linear(d_model, embed_dim, bias=False)

    def forward(self, images):
        tokens = self.encoder(self.stem(images) + self.positions)
        return self.projection(self.norm(tokens).mean(dim=1))


# %% wrong="image_tower" name="mean_over_batch" says="You averaged over the images. Axis 0 is the batch, axis 1 the tokens: average over the tokens."
class ImageTower(nn.Module):
    def __init__(self, stem, num_tokens, d_model, num_heads, num_layers, embed_dim):
        super().__init__()
        self.stem, self.norm = stem, nn.LayerNorm(d_model)
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, d_model))
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.projection = nn.Linear(d_model, embed_dim, bias=False)

    def forward(self, images):
        tokens = self.encoder(self.stem(images) + self.positions)
        return self.projection(self.norm(tokens).mean(dim=0))


# %% wrong="image_tower" name="first_token" says="You read the first token only, which here is the top left patch. Average over all of them."
class ImageTower(nn.Module):
    def __init__(self, stem, num_tokens, d_model, num_heads, num_layers, embed_dim):
        super().__init__()
        self.stem, self.norm = stem, nn.LayerNorm(d_model)
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, d_model))
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.projection = nn.Linear(d_model, embed_dim, bias=False)

    def forward(self, images):
        tokens = self.encoder(self.stem(images) + self.positions)
        return self.projection(self.norm(tokens)[:, 0])


# %% wrong="image_tower" name="no_projection" says="The vector still has the encoder's width. Project it to embed_dim, where images and texts meet."
class ImageTower(nn.Module):
    def __init__(self, stem, num_tokens, d_model, num_heads, num_layers, embed_dim):
        super().__init__()
        self.stem, self.norm = stem, nn.LayerNorm(d_model)
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, d_model))
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)

    def forward(self, images):
        return self.norm(self.encoder(self.stem(images) + self.positions)).mean(dim=1)


# %%
class TwoTowers(nn.Module):
    """Your image tower, the text tower, and the learned scale between them."""

    def __init__(self, image_tower, text_tower):
        super().__init__()
        self.image, self.text = image_tower, text_tower
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images, input_ids):
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        return similarity(self.image(images), self.text(input_ids), scale)


# %% [markdown]
# ## 5. Learning to read from captions
#
# The captions are cut into tokens once. A training step is one line: the loss of your logits. The
# loop around it is the one that you wrote in week 1. Each batch is shifted by up to a pixel, which
# stands for the only augmentation that CLIP uses, a random crop (Radford 2021, section 2.3).


# %%
class Captioned:
    """A tokenizer learned from a set's captions, and the set in batches of (images, input_ids)."""

    def __init__(self, dataset, captions):
        self.tokenizer = BytePairTokenizer.train(captions, vocab_size=600)
        self.max_length = 2 + max(len(self.tokenizer.encode(caption)) for caption in captions)
        pairs = list(zip(dataset.images, self.tokens(captions)))
        self.batches = lambda size, seed: torch.utils.data.DataLoader(
            pairs, size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed)
        )

    def tokens(self, captions):
        return self.tokenizer(captions, max_length=self.max_length).input_ids

    def prompts(self, names, template="{}"):
        """Write each name into the template, as tokens on the device."""
        return self.tokens([template.format(name) for name in names]).to(device)


def shifted(images):
    """Move a batch of images by up to one pixel in each direction."""
    side, padded = images.shape[-1], F.pad(images, (1, 1, 1, 1))
    top, left = torch.randint(3, (2,)).tolist()
    return padded[..., top : top + side, left : left + side]


def softmax_step(model, batch):
    images, input_ids = batch
    return contrastive_loss(model(shifted(images), input_ids))


# %% tags=["experiment"]
digit_pairs = Captioned(train_digits, train_digits.captions)


def digit_model(seed):
    set_seed(seed)
    image_tower = ImageTower(ConvStem(4, 64, num_channels=1), 4, 64, 4, 1, 64)
    text_tower = TextTower(digit_pairs.tokenizer, digit_pairs.max_length, 64, 64)
    return TwoTowers(image_tower, text_tower).to(device)


# %% [markdown]
# A classifier from words: embed a few prompts for each class, average, and ask which class's
# vector is nearest to the picture's. No label was used in training, and none is used here.


# %%
@torch.no_grad()
def zero_shot(model, pairs, dataset, templates):
    """Return the index of the nearest class of every picture, (B,)."""
    names = dataset.class_names
    wordings = [F.normalize(model.text(pairs.prompts(names, t)), dim=-1) for t in templates]
    images = model.image(dataset.images.to(device))
    return similarity(images, torch.stack(wordings).mean(dim=0), 1.0).argmax(dim=1).cpu()


def accuracy(model, pairs, dataset, templates):
    return (zero_shot(model, pairs, dataset, templates) == dataset.labels).float().mean().item()


# %% [markdown]
# > **Predict.** A batch of 64 pictures of ten digits holds about six of each. All six "threes" fit all
# > six captions that say *three*, yet the loss calls five of them wrong. Where will the loss stop
# > falling, if the model can tell digits apart perfectly but not the wording of a caption?


# %% tags=["experiment"]
def train(model, pairs, seed, steps, size=64, lr=3e-3, step=softmax_step):
    return fit(
        model,
        pairs.batches(size, seed),
        step,
        steps=steps,
        lr=lr,
        device=device,
        progress=False,
    )


# %% tags=["experiment"]
digit_models, digit_runs, digit_scores = [], [], []
for seed in (SEED, SEED + 1, SEED + 2):
    digit_models.append(digit_model(seed))
    digit_runs.append(train(digit_models[-1], digit_pairs, seed, steps=400))
    digit_scores.append(accuracy(digit_models[-1], digit_pairs, test_digits, digits.TEMPLATES))
    print(f"seed {seed}: zero-shot accuracy {digit_scores[-1]:.3f}, {digit_runs[-1].seconds:.1f} s")
print(f"three seeds: {mean_and_spread(digit_scores)} on {len(test_digits)} digits never seen")

# %% tags=["experiment"]
# With c pictures of its digit in the batch, a caption can do no better than probability 1/c.
labels = train_digits.labels
draws = [labels[torch.randperm(len(labels))[:64]] for _ in range(200)]
floor = torch.stack([(d[:, None] == d).sum(1).float().log().mean() for d in draws]).mean()

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(7, 3.6))
for run, colour in zip(digit_runs, (BLUE, RED, GREEN)):
    axis.plot(run.smooth(15), color=colour)
axis.axhline(math.log(64), color=GREY, linestyle="--")
axis.text(400, math.log(64) - 0.02, "guessing, ln 64", ha="right", va="top", color=GREY)
axis.axhline(floor, color=GREY, linestyle=":")
axis.text(0, floor - 0.04, f"digits known, wording not: {floor:.2f}", va="top", color=GREY)
axis.set(
    xlabel="step",
    ylabel="contrastive loss (nats)",
    ylim=(1.6, None),
    title="The loss ends near a floor that we can compute",
)
show(
    figure,
    "training",
    "Three loss curves fall from 4.2 nats and level out near a dotted line at about 1.9 nats.",
)

# %% [markdown]
# *What to see.* One line a seed; all three level out where the dotted line says. That floor is
# $\mathbb E[\ln c]$, where $c$ counts the pictures of the same digit in the batch: the
# loss of a model that knows every digit and cannot guess the wording. CLIP's own batches hold such
# *false negatives* too, only fewer. A loss that stops falling need not mean a model that stopped
# learning.
#
# Here is the game itself: 40 test pictures, sorted by digit, against ten captions.


# %% tags=["experiment"]
@torch.no_grad()
def cosines(model):
    prompts = digit_pairs.prompts(test_digits.class_names, "the digit {}")
    images = model.image(test_digits.images[picked].to(device))
    return similarity(images, model.text(prompts), 1.0).cpu()


# %% tags=["experiment"]
picked = torch.cat([(test_digits.labels == digit).nonzero()[:4, 0] for digit in range(10)])
model = digit_model(SEED)
stages = {"before": cosines(model)}
train(model, digit_pairs, SEED, steps=40)
stages["after 40 steps"] = cosines(model)
stages["after 400 steps"] = cosines(digit_models[0])

# %% tags=["experiment"]
figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), sharey=True, layout="constrained")
for axis, (stage, matrix) in zip(axes, stages.items()):
    image = axis.imshow(matrix, aspect="auto", cmap="cividis", vmin=-0.5, vmax=1)
    axis.set(title=stage, xlabel="caption: the digit …", xticks=range(10))
    axis.set_yticks(range(2, 40, 4), range(10))
axes[0].set_ylabel("test picture of the digit …")
figure.colorbar(image, ax=axes, label="cosine")
figure.suptitle("Every picture against every caption: the diagonal lights up")
show(
    figure,
    "similarities",
    "Cosines of 40 pictures with ten captions: all alike before training, a bright diagonal after.",
)

# %% [markdown]
# *What to see.* Before training all cosines are nearly alike. After 40 steps the first blocks part,
# without a diagonal yet. After 400 nearly every picture finds its caption, with a cosine near 0.8: what
# the loss asks for is a lead over the others, not a cosine of 1.
#
# The same cosines work as a search engine, in both directions. A picture counts as found when a
# caption of its digit is among the first $k$.


# %% tags=["experiment"]
@torch.no_grad()
def retrieval(model):
    prompts = digit_pairs.prompts(test_digits.class_names, "a handwritten {}")
    images = model.image(test_digits.images.to(device))
    scores = similarity(images, model.text(prompts), 1.0).cpu()
    matches = test_digits.labels[:, None] == torch.arange(10)
    return {k: recall_at_k(scores, k, matches) for k in (1, 3)}


for name, found in (
    ("before", retrieval(digit_model(SEED))),
    ("after", retrieval(digit_models[0])),
):
    for k, both in found.items():
        print(
            f"{name:6} R@{k}: picture to caption {both.image_to_text:.2f}, "
            f"caption to picture {both.text_to_image:.2f}"
        )

# %% [markdown]
# ## 6. Words that never met
#
# Now the scenes. The captions say colour and shape in a few ways. Six combinations were held out,
# and all 36 are offered as answers, so chance is 1/36 = 0.03; a model that knows colours and guesses
# shapes would score 1/6 = 0.17.
#
# > **Predict** the accuracy on combinations that were never shown: as good as on the others, or at
# > 0.17, or in between?

# %% tags=["experiment"]
SAYINGS = ("a {colour} {shape}", "there is a {colour} {shape}", "a {shape} that is {colour}")
said = [
    SAYINGS[i % len(SAYINGS)].format(colour=colour, shape=shape)
    for i, (colour, shape) in enumerate(
        zip(train_scenes.attributes["colour"], train_scenes.attributes["shape"])
    )
]
scene_pairs = Captioned(train_scenes, said)


# %% tags=["experiment"]
def scene_model(seed):
    set_seed(seed)
    image_tower = ImageTower(ConvStem(8, 64), 16, 64, 4, 1, 64)
    text_tower = TextTower(scene_pairs.tokenizer, scene_pairs.max_length, 64, 64)
    return TwoTowers(image_tower, text_tower).to(device)


# %% tags=["experiment"]
shapes = len(scenes.SHAPES)
scene_rows = []
for seed in (SEED, SEED + 1, SEED + 2):
    scene = scene_model(seed)
    run = train(scene, scene_pairs, seed, steps=250, size=128)
    row = {}
    for name, split in (("seen", test_scenes), ("unseen", unseen_scenes)):
        guess = zero_shot(scene, scene_pairs, split, ["a {}", "there is a {}"])
        row[name] = (guess == split.labels).float().mean().item()
        row[f"{name} colour"] = (guess // shapes == split.labels // shapes).float().mean().item()
        row[f"{name} shape"] = (guess % shapes == split.labels % shapes).float().mean().item()
    scene_rows.append(row)
    print(
        f"seed {seed}: seen {row['seen']:.2f}, never seen together {row['unseen']:.2f}, {run.seconds:.1f} s"
    )

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(7, 3.6))
names = list(scene_rows[0])
for i, name in enumerate(names):
    values = [row[name] for row in scene_rows]
    colour = BLUE if name.startswith("seen") else RED
    axis.bar(i, sum(values) / 3, color=colour, alpha=0.35)
    axis.plot([i] * 3, values, "o", color=colour, markersize=4)
    print(f"{name:14} {mean_and_spread(values)}")
axis.axhline(1 / 36, color=GREY, linestyle=":")
axis.text(5.4, 1 / 36 + 0.01, "chance, 1 in 36", ha="right", color=GREY)
axis.set_xticks(range(6), [name.replace(" ", "\n") for name in names])
axis.set(
    ylabel="zero-shot accuracy",
    ylim=(0, 1.05),
    title="New combinations are understood, though less well",
)
show(
    figure,
    "unseen",
    "Bars for seen and unseen combinations, with a dot for each of three seeds; chance is 0.03.",
)

# %% [markdown]
# *What to see.* The colour is nearly always right, also where it meets its shape for the first time.
# The shape is often right, far above the 1/6 of a guess, but less often than with familiar partners:
# what the model learned of *triangle* is partly *green triangle*. How far a shape is freed from its
# colours differs from run to run more than anything else here: with `SEED = 1`, one of three ends near
# 0.4. Three dots are the least that such a claim needs. Look at what it says instead.

# %% tags=["experiment"]
figure, axes = plt.subplots(1, 8, figsize=(11, 2.1), layout="constrained")
guesses = zero_shot(scene, scene_pairs, unseen_scenes.subset(range(8)), ["a {}"])
for axis, guess, i in zip(axes, guesses, range(8)):
    axis.imshow(unseen_scenes.images[i].permute(1, 2, 0))
    right = guess == unseen_scenes.labels[i]
    axis.set_title(scenes.CLASS_NAMES[guess], fontsize=8, color=GREEN if right else RED)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel("right" if right else scenes.CLASS_NAMES[unseen_scenes.labels[i]], fontsize=8)
truths = unseen_scenes.labels[:8]
colours = (guesses // shapes == truths // shapes).sum()
figure.suptitle(f"{(guesses == truths).sum()} of 8 right, the colour in {colours} of 8")
show(
    figure,
    "answers",
    "Eight scenes of unseen combinations with the model's answer above and the truth below.",
)

# %% [markdown]
# *What to see.* Where it is wrong, it names the right colour with another shape: a combination that
# it knows. A classifier with one output for each of the 30 known classes could not even have named
# the six. (One output for the colour and one for the shape could: week 4 makes that comparison.)

# %% [markdown]
# ## 7. Does the loss need the whole batch?
#
# Softmax compares: to score one pair, you need the logits of the whole row and column, on every
# device. SigLIP asks of each pair alone: do you belong together?
#
# $$ \mathcal L = -\frac1N \sum_{i,t} \ln \sigma\big(z_{it}\,(s\,x_i \cdot y_t + b)\big),
#    \qquad z_{it} = +1 \text{ on the diagonal, } -1 \text{ elsewhere} $$
#
# With $N$ positives among $N^2$ pairs, "no" is nearly always right. The bias starts at $-10$ so that
# the first steps need not learn that (Zhai 2023, section 3.2).

# %% [markdown] exercise="sigmoid_loss" difficulty=3 minutes=12
# ### Exercise 5: the sigmoid loss
#
# Write `sigmoid_loss(logits_NN, bias)` for logits that carry their scale already. Divide by $N$,
# not by $N^2$.
#
# *Afterwards you can say:* what changes on 1,000 devices when softmax becomes sigmoid.
#
# <details><summary>Hint 1</summary>
#
# `2 * torch.eye(N) - 1` is the matrix of signs.
#
# </details>
# <details><summary>Hint 2</summary>
#
# $\ln \sigma$ in one function that does not overflow: `F.logsigmoid`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# ```
# signs = +1 on the diagonal, -1 elsewhere
# return minus the sum of log sigmoid of signs times (logits plus bias), divided by N
# ```
#
# </details>


# %% answer="sigmoid_loss"
def sigmoid_loss(logits_NN, bias):
    """Return the summed yes-or-no loss of all pairs, divided by the number of images."""
    ### BEGIN SOLUTION
    N = len(logits_NN)
    signs_NN = 2 * torch.eye(N, device=logits_NN.device) - 1
    return -F.logsigmoid(signs_NN * (logits_NN + bias)).sum() / N
    ### END SOLUTION


# %% check="sigmoid_loss" aspect="example" points=2 title="numbers you can work by hand"
import math
import torch
from mmlearn.feedback import expect

expect(
    "w03_clip/sigmoid_loss/undecided",
    sigmoid_loss(torch.zeros(2, 2), 0.0),
    2 * math.log(2),
    "Four undecided pairs cost ln 2 each; divided by two images that is 2 ln 2.",
)
expect(
    "w03_clip/sigmoid_loss/signs",
    sigmoid_loss(math.log(3) * torch.tensor([[1.0, -1.0], [1.0, 1.0]]), 0.0),
    (3 * math.log(4 / 3) + math.log(4)) / 2,
    "Both pairs are right with probability 3/4; of the two others one is right, one wrong with 3/4.",
)
expect(
    "w03_clip/sigmoid_loss/bias",
    sigmoid_loss(torch.zeros(1, 1), math.log(3)),
    math.log(4 / 3),
    "The bias is added to the logits before the sign: one pair, logit ln 3, probability 3/4.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(51)
logits = 4 * torch.randn(5, 5, generator=draw)
yes = torch.sigmoid(logits - 1.5).double()
wanted = (
    -(yes.diagonal().log().sum() + (1 - yes).log().sum() - (1 - yes).diagonal().log().sum()) / 5
)
assert abs(float(sigmoid_loss(logits, -1.5)) - float(wanted)) < 1e-3
### END HIDDEN TESTS

# %% check="sigmoid_loss" aspect="overflow" points=1 title="survives logits of a thousand, with a gradient"
### BEGIN HIDDEN TESTS
import torch

logits = torch.tensor([[-1000.0, 3.0], [1000.0, 2.0]], requires_grad=True)
loss = sigmoid_loss(logits, torch.tensor(-10.0))
assert torch.isfinite(loss)
assert abs(loss.item() - (1010 + 990 + 8) / 2) < 0.01
loss.backward()
assert torch.isfinite(logits.grad).all()
assert torch.allclose(logits.grad[1, 0], torch.tensor(0.5))
### END HIDDEN TESTS


# %% wrong="sigmoid_loss" name="mean_of_pairs" says="You took the mean over all N² pairs. SigLIP divides by N: otherwise the few positives count less the larger the batch."
def sigmoid_loss(logits_NN, bias):
    signs = 2 * torch.eye(len(logits_NN)) - 1
    return -F.logsigmoid(signs * (logits_NN + bias)).mean()


# %% wrong="sigmoid_loss" name="zero_for_no" says="You multiplied the negatives by 0, so they cost ln 2 whatever they are. Their sign is -1."
def sigmoid_loss(logits_NN, bias):
    return -F.logsigmoid(torch.eye(len(logits_NN)) * (logits_NN + bias)).sum() / len(logits_NN)


# %% wrong="sigmoid_loss" name="flipped" says="The signs are the wrong way round: +1 for the pairs on the diagonal, -1 for the others."
def sigmoid_loss(logits_NN, bias):
    signs = 1 - 2 * torch.eye(len(logits_NN))
    return -F.logsigmoid(signs * (logits_NN + bias)).sum() / len(logits_NN)


# %% wrong="sigmoid_loss" name="bias_outside" says="You added the bias after the sign, so it says yes to the negatives. Add it to the logits, inside."
def sigmoid_loss(logits_NN, bias):
    signs = 2 * torch.eye(len(logits_NN)) - 1
    return -F.logsigmoid(signs * logits_NN - bias).sum() / len(logits_NN)


# %% wrong="sigmoid_loss" name="overflows" says="log(sigmoid(x)) is minus infinity for x below about -100. F.logsigmoid computes both at once."
def sigmoid_loss(logits_NN, bias):
    signs = 2 * torch.eye(len(logits_NN)) - 1
    return -torch.sigmoid(signs * (logits_NN + bias)).log().sum() / len(logits_NN)


# %% [markdown]
# Both losses now train your digits for 100 steps, with few and with many negatives. SigLIP's bias of
# $-10$ says "one in 22,000 belongs together", which suits its batches; ours starts at $-\ln N$.
#
# > **Predict:** what does it cost to go from 128 pairs a step to 8, and which loss pays more? And if a
# > batch of 32 may take four steps for each step of 128, so that both see as many pictures: who wins?


# %% tags=["experiment"]
def sigmoid_step(model, batch):
    images, input_ids = batch
    return sigmoid_loss(model(shifted(images), input_ids), model.bias)


def score_after(loss, size, steps, seed):
    """Train one model on digits and return its zero-shot accuracy."""
    model, step = digit_model(seed), softmax_step
    if loss == "sigmoid":
        step = sigmoid_step
        model.logit_scale.data.fill_(math.log(10.0))
        model.bias = nn.Parameter(torch.tensor(-math.log(size)))
    train(model, digit_pairs, seed, steps=steps, size=size, step=step)
    return accuracy(model, digit_pairs, test_digits, digits.TEMPLATES)


# %% tags=["experiment"]
sizes, seeds = (8, 32, 128), (SEED, SEED + 1)
equal_steps = {
    loss: [[score_after(loss, size, 100, seed) for seed in seeds] for size in sizes]
    for loss in ("softmax", "sigmoid")
}
equal_pictures = [score_after("softmax", 32, 400, seed) for seed in seeds]  # 32 × 400 = 128 × 100
for loss, scores in equal_steps.items():
    print(loss, *(f"N={size}: {mean_and_spread(s)}" for size, s in zip(sizes, scores)), sep="  ")
print(f"softmax  N=32, as many pictures as N=128: {mean_and_spread(equal_pictures)}")

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(7, 3.6))
for (loss, scores), colour in zip(equal_steps.items(), (BLUE, RED)):
    axis.plot(sizes, [sum(s) / len(s) for s in scores], color=colour, label=f"{loss}, 100 steps")
    axis.plot(sizes, scores, "o", color=colour)
axis.plot([32, 32], equal_pictures, "D", color=GREEN, label="softmax, as many pictures as N = 128")
axis.set(xscale="log", xlabel="batch size N (pairs)", ylabel="zero-shot accuracy", ylim=(0, 1.02))
axis.set_xticks(sizes, sizes)
axis.minorticks_off()
axis.set_title("At equal steps the larger batch wins; at equal pictures it does not")
axis.legend(loc="lower right")
show(
    figure,
    "batches",
    """Zero-shot accuracy at batch sizes 8, 32 and 128. After 100 steps both losses rise steeply with
    the batch. Two green diamonds at 32, with four times the steps, lie above the dots at 128.""",
)

# %% [markdown]
# *What to see.* More pairs a step are more pictures *and* more wrong answers to compare with, so at
# equal steps both losses gain. The green diamonds take the two apart: as many pictures as $N = 128$, a
# quarter of the wrong answers at a time, four times the steps, and they are ahead. At this size it was
# pictures and steps that were missing, not negatives. It is often said that contrastive learning
# simply needs the largest batch; at web scale, too, a batch of 262,000 is ahead of 8,000 only after
# long training, and behind when the steps become too few (Zhai 2023, figure 3).
#
# Which loss is ahead here is a matter of a few points and of the starting bias; two seeds do not
# settle it. SigLIP's authors find the sigmoid far ahead below a batch of 16,000 where only the text
# tower learns; with both towers it is best at 32,000 and the softmax at 98,000, and 307,000 hurts both
# (Zhai 2023, sections 4.1 and 4.2).

# %% [markdown]
# ## 8. A batch larger than memory
#
# At $N = 32{,}768$ the logits alone take $4 N^2$ bytes, 4 GiB, and training keeps several such tables.
# But softmax needs only one number per row, the log-sum-exp $\ln \sum_t e^{l_{it}}$, and that can be
# collected tile by tile:
#
# $$ \ln\big(e^{a} + e^{b}\big) = \texttt{logaddexp}(a, b) $$
#
# The backward pass needs the tile's logits again. `checkpoint` forgets them and computes them a
# second time: a little more time for very much less memory.

# %% [markdown] exercise="tiled_logsumexp" difficulty=4 minutes=15
# ### Exercise 6: log-sum-exp in tiles
#
# Complete `tiled_logsumexp(x_NE, y_ME, scale, tile)`. It returns, for each row of x, the log-sum-exp
# of its scaled products with *all* rows of y, looking at `tile` of them at a time. The last tile may
# be shorter.
#
# *Afterwards you can say:* how a contrastive loss over 100,000 pairs fits into one device.
#
# <details><summary>Hint 1</summary>
#
# Start from minus infinity, the logarithm of an empty sum.
#
# </details>
# <details><summary>Hint 2</summary>
#
# ```
# total = minus infinity for each row of x
# for each tile of y:
#     total = logaddexp(total, checkpoint(one_tile, x, tile of y, use_reentrant=False))
# ```
#
# </details>


# %% answer="tiled_logsumexp"
def tiled_logsumexp(x_NE, y_ME, scale, tile):
    """Return ln of the sum over m of exp(scale x_n · y_m), shape (N,), holding one tile at a time."""

    def one_tile(x_NE, y_tE):
        return torch.logsumexp(scale * x_NE @ y_tE.T, dim=1)

    ### BEGIN SOLUTION
    total_N = x_NE.new_full((len(x_NE),), -torch.inf)
    for start in range(0, len(y_ME), tile):
        y_tE = y_ME[start : start + tile]
        total_N = torch.logaddexp(total_N, checkpoint(one_tile, x_NE, y_tE, use_reentrant=False))
    return total_N
    ### END SOLUTION


# %% check="tiled_logsumexp" aspect="example" points=2 title="one row against three, in tiles of two"
import math
import torch
from mmlearn.feedback import expect

expect(
    "w03_clip/tiled_logsumexp/hand",
    tiled_logsumexp(torch.tensor([[1.0]]), torch.tensor([[1.0], [2.0], [3.0]]), math.log(2), 2),
    torch.tensor([math.log(14)]),
    "The three terms are 2, 4 and 8; ln(2 + 4 + 8) = ln 14.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(61)
rows, others = torch.randn(5, 3, generator=draw), torch.randn(11, 3, generator=draw)
wanted = torch.logsumexp(1.7 * rows @ others.T, dim=1)
for size in (1, 4, 11, 50):
    assert torch.allclose(tiled_logsumexp(rows, others, 1.7, size), wanted, atol=1e-5)
### END HIDDEN TESTS

# %% check="tiled_logsumexp" aspect="overflow" points=1 title="survives products of a thousand"
### BEGIN HIDDEN TESTS
import torch

far = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
totals = tiled_logsumexp(far, torch.tensor([[1.0, 1.0], [0.5, 0.0], [-1.0, 0.2]]), 1000.0, 2)
assert torch.allclose(totals, torch.tensor([1000.0, 0.0]), atol=1e-3)
### END HIDDEN TESTS

# %% check="tiled_logsumexp" aspect="gradient" points=1 title="its gradient equals that of the whole table"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(62)
rows = torch.randn(4, 3, generator=draw, requires_grad=True)
others = torch.randn(7, 3, generator=draw, requires_grad=True)
torch.logsumexp(2.0 * rows @ others.T, dim=1).square().sum().backward()
grads = rows.grad.clone(), others.grad.clone()
rows.grad, others.grad = None, None
tiled_logsumexp(rows, others, 2.0, 3).square().sum().backward()
assert torch.allclose(rows.grad, grads[0], atol=1e-4)
assert torch.allclose(others.grad, grads[1], atol=1e-4)
### END HIDDEN TESTS


# %% wrong="tiled_logsumexp" name="adds_logs" says="You added the tiles' log-sum-exps. Sums live under the logarithm: combine them with logaddexp."
def tiled_logsumexp(x_NE, y_ME, scale, tile):
    total = torch.zeros(len(x_NE))
    for start in range(0, len(y_ME), tile):
        total = total + torch.logsumexp(scale * x_NE @ y_ME[start : start + tile].T, dim=1)
    return total


# %% wrong="tiled_logsumexp" name="starts_at_zero" says="You started from 0, which is the logarithm of 1, not of nothing. Start from minus infinity."
def tiled_logsumexp(x_NE, y_ME, scale, tile):
    total = torch.zeros(len(x_NE))
    for start in range(0, len(y_ME), tile):
        part = torch.logsumexp(scale * x_NE @ y_ME[start : start + tile].T, dim=1)
        total = torch.logaddexp(total, part)
    return total


# %% wrong="tiled_logsumexp" name="keeps_the_largest" says="You kept the largest tile only. The others count, too: add them under the logarithm."
def tiled_logsumexp(x_NE, y_ME, scale, tile):
    total = torch.full((len(x_NE),), -torch.inf)
    for start in range(0, len(y_ME), tile):
        part = torch.logsumexp(scale * x_NE @ y_ME[start : start + tile].T, dim=1)
        total = torch.maximum(total, part)
    return total


# %% wrong="tiled_logsumexp" name="drops_the_rest" says="The last, shorter tile is missing: let the range run to the end of y."
def tiled_logsumexp(x_NE, y_ME, scale, tile):
    total = torch.full((len(x_NE),), -torch.inf)
    for start in range(0, len(y_ME) - tile + 1, tile):
        part = torch.logsumexp(scale * x_NE @ y_ME[start : start + tile].T, dim=1)
        total = torch.logaddexp(total, part)
    return total


# %% wrong="tiled_logsumexp" name="overflows" says="You summed the exponentials themselves, which overflow at 89. Stay in logarithms throughout."
def tiled_logsumexp(x_NE, y_ME, scale, tile):
    total = torch.zeros(len(x_NE))
    for start in range(0, len(y_ME), tile):
        total = total + (scale * x_NE @ y_ME[start : start + tile].T).exp().sum(dim=1)
    return total.log()


# %% [markdown]
# With it the loss is short: half the rows' and half the columns' log-sum-exp, minus the diagonal.
# What does autograd hold for the backward pass? PyTorch tells us of every tensor that it keeps.


# %%
def tiled_loss(images_NE, texts_NE, scale, tile):
    rows = tiled_logsumexp(images_NE, texts_NE, scale, tile)
    columns = tiled_logsumexp(texts_NE, images_NE, scale, tile)
    return ((rows + columns) / 2 - scale * (images_NE * texts_NE).sum(dim=1)).mean()


def bytes_kept(loss_of, *inputs):
    """Count the bytes, beyond the inputs, that autograd keeps until the backward pass."""
    kept = {x.untyped_storage().data_ptr(): 0 for x in inputs}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(*inputs)
    return sum(kept.values()), loss


# %% tags=["experiment"]
memory_rows = []
for N in (256, 512, 1024, 2048, 4096):
    draw = torch.Generator().manual_seed(N)
    pair = [
        F.normalize(torch.randn(N, 64, generator=draw), dim=1).requires_grad_() for _ in range(2)
    ]
    full, loss = bytes_kept(lambda x, y: contrastive_loss(14.3 * x @ y.T), *pair)
    gradient = torch.autograd.grad(loss, pair)
    tiled, loss_tiled = bytes_kept(lambda x, y: tiled_loss(x, y, 14.3, 256), *pair)
    gradient_tiled = torch.autograd.grad(loss_tiled, pair)
    error = max((a - b).abs().max().item() for a, b in zip(gradient, gradient_tiled))
    memory_rows.append((N, full, tiled))
    print(
        f"N = {N:5}: whole table {full / 2**20:7.1f} MiB, tiles {tiled / 2**20:5.2f} MiB, "
        f"gradients differ by {error:.0e}"
    )

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(7, 3.6))
sizes, full, tiled = zip(*memory_rows)
axis.loglog(sizes, [m / 2**20 for m in full], "o-", color=RED, label="whole table: grows with N²")
axis.loglog(sizes, [m / 2**20 for m in tiled], "o-", color=BLUE, label="your tiles of 256")
axis.set_xticks(sizes, sizes)
axis.minorticks_off()
axis.set(
    xlabel="batch size N",
    ylabel="kept for the backward pass (MiB)",
    title="Same gradients, a fraction of the memory",
)
axis.legend()
show(
    figure,
    "memory",
    "On log axes, memory of the full loss grows with the square of N; the tiled loss stays small.",
)

# %% [markdown]
# *What to see.* The lines are parallel: yours still keeps one number per row *and tile*, which is $N^2 / 256$.
# `mmlearn.contrastive.tiled_contrastive_loss` goes the last step. It cuts both axes and writes the
# gradient by hand, so that beyond its inputs it keeps two numbers a row, whatever N is.

# %% [markdown]
# ## 9. Is this CLIP?
#
# `mmlearn.clip.CLIP` is what you built, at CLIP's own sizes and with its details: class token, two
# more norms, QuickGELU (ours and your tower's: GELU). First the sizes, counted on a model without
# memory; you will be asked for them.

# %% tags=["experiment"]
from mmlearn.clip import CLIP, CLIPConfig
from mmlearn.contrastive import contrastive_loss as reference_loss

with torch.device("meta"):
    full = CLIP(CLIPConfig())  # ViT-B/32
for name, tower, config, tokens in (
    ("image", full.vision, CLIPConfig().vision, (224 // 32) ** 2 + 1),
    ("text", full.text, CLIPConfig().text, CLIPConfig().text.max_length),
):
    millions = sum(parameter.numel() for parameter in tower.parameters()) / 1e6
    print(
        f"{name:5} {tokens} tokens of width {config.d_model}, {config.num_layers} blocks, "
        f"{config.num_heads} heads: {millions:.0f} million parameters"
    )
print(
    f"{CLIPConfig().text.vocab_size:,} tokens in the vocabulary; both end in {CLIPConfig().embed_dim} numbers"
)

# %% [markdown]
# Then the proof: it takes over the weights of a (randomly initialised, small) model of the
# `transformers` library, and must give the same numbers, as must your loss of your logits.

# %% tags=["experiment"]
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel

sizes = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
theirs = CLIPModel(
    TheirConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        text_config=sizes
        | {"vocab_size": 600, "eos_token_id": 599, "bos_token_id": 598, "pad_token_id": 599},
        projection_dim=48,
    )
).eval()
ours = CLIP.from_hf(theirs)

# %% tags=["experiment"]
images, input_ids = torch.randn(5, 3, 32, 32), torch.randint(0, 598, (5, 9))
input_ids[:, -1] = 599
with torch.no_grad():
    expected = theirs(input_ids=input_ids, pixel_values=images, return_loss=True)
    out = ours(images, input_ids)
    mine = contrastive_loss(similarity(out.image_embeds, out.text_embeds, out.scale))
print(f"logits differ by at most {(out.logits_IT - expected.logits_per_image).abs().max():.1e}")
print(
    f"loss: transformers {expected.loss:.5f}, mmlearn "
    f"{reference_loss(out.image_embeds, out.text_embeds, out.scale):.5f}, yours {mine:.5f}"
)

# %% [markdown]
# ## Questions to answer in your own words
#
# These two are read by a person. A few sentences each.

# %% [markdown] written="why_temperature" points=2
# **Why does CLIP need a temperature, why is it learned as a logarithm, and what happens if it is never
# capped?**
#
# ### BEGIN SOLUTION
# Cosines lie between -1 and 1, so without a scale a softmax over N of them can gain only about one nat
# over guessing, whatever the model knows. Learned as a logarithm, a step of the optimizer changes the
# scale by a ratio and it stays positive. Once all training pairs are told apart, a larger scale always
# lowers the loss, so it would grow without end and make gradients spike; CLIP caps it at 100.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: bounded cosines cannot express a confident softmax (a number or the floor formula helps).
# - 1 point: the logarithm keeps it positive and makes steps relative, or: nothing else bounds it, so it
#   is capped at 100 for stability.
# ### END MARK SCHEME

# %% [markdown] written="false_negatives" points=2
# **Your digits' loss stopped near a floor above zero. What is that floor, what does it say about the
# model, and what would you change in the data or in the loss if it mattered?**
#
# ### BEGIN SOLUTION
# A batch of 64 holds several pictures of each digit, and their captions fit each other, but the loss
# calls all but one wrong. A model that knows every digit gives each of the c fitting captions 1/c, which
# costs E[ln c]. The floor is a property of the batch, not a failure of the model. One can draw batches
# with fewer repeats, write more specific captions, count all pairs of the same caption as positives
# (soft targets), or use the sigmoid loss with those pairs marked as positive.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: names false negatives and the floor E[ln c] or an equivalent argument.
# - 1 point: one workable remedy, with its reason.
# ### END MARK SCHEME

# %% [markdown]
# ## Go bigger
#
# With `SCALE = "gpu"` this cell trains the real `CLIP` class, a small ViT, on scenes with long
# captions, or on MNIST when `DATA = "hub"`. On a GPU it uses a batch of 1,024 and the tiled loss.


# %% tags=["experiment"]
def go_bigger(dataset, templates, steps, size, d_model=192, num_layers=6):
    """Train mmlearn's CLIP on a captioned set and return its zero-shot accuracy."""
    from mmlearn.clip import CLIPConfig, TextConfig, VisionConfig, zero_shot_classifier
    from mmlearn.contrastive import tiled_contrastive_loss

    set_seed(SEED)
    pairs = Captioned(dataset, dataset.captions)
    shared = {"d_model": d_model, "num_layers": num_layers, "num_heads": 6, "d_ff": 4 * d_model}
    channels, side = dataset.images.shape[1:3]
    vision = VisionConfig(side, 4, channels, **shared)
    tokens = pairs.tokenizer
    text = TextConfig(
        tokens.vocab_size, pairs.max_length, **shared, eos_token_id=tokens.eos_token_id
    )
    clip = CLIP(CLIPConfig(vision, text, embed_dim=128))

    def step(model, batch):
        model.clamp_scale_()
        return tiled_contrastive_loss(*model(shifted(batch[0]), batch[1]))

    run = fit(clip, pairs.batches(size, SEED), step, steps=steps, lr=5e-4, device=device)
    return clip, zero_shot_classifier(clip, tokens, dataset.class_names, templates), run


# %% tags=["experiment"]
if SCALE == "gpu":
    if DATA == "hub":
        big_train, big_test = (digits.load(s, source="hub", pixels=32) for s in ("train", "test"))
        templates = digits.TEMPLATES
    else:
        big_train, big_test = scenes.load("train", size=20_000), scenes.load("unseen", size=2_000)
        templates = scenes.TEMPLATES
    clip, classifier, run = go_bigger(big_train, templates, steps=3_000, size=1_024)
    with torch.no_grad():
        images = big_test.images.to(device).split(500)
        guesses = torch.cat(
            [(clip.encode_image(part) @ classifier.T).argmax(dim=1) for part in images]
        )
    score = (guesses.cpu() == big_test.labels).float().mean()
    print(f"{big_test.name}: zero-shot accuracy {score:.3f} after {run.seconds:.0f} s")
else:
    print("SCALE is 'cpu': set it to 'gpu' in the first cells to run this part.")

# %% [markdown]
# ## What was new
#
# | idea | in one line | where it stands in `mmlearn` |
# |---|---|---|
# | contrastive pre-training | match N pictures with N captions, both ways | `contrastive.contrastive_loss` |
# | temperature | cosines times $e^s$; learned, starts at 1/0.07, capped at 100 | `clip.CLIP.clamp_scale_` |
# | end-of-text pooling | a causal text tower is read at its first end token | `clip.TextTower.find_end` |
# | zero-shot classification | the text tower writes the classifier | `clip.zero_shot_classifier` |
# | false negatives | a floor under the loss, E[ln c] | |
# | sigmoid loss | every pair by itself; no normalisation across the batch | `contrastive.sigmoid_loss` |
# | tiled loss | log-sum-exp collected in tiles, logits computed twice | `contrastive.tiled_contrastive_loss` |
#
# **Beside the papers.** *Zero-shot.* CLIP reads MNIST with 88% accuracy (Radford 2021, section 6), less than
# logistic regression on raw pixels, and less than what you measured after a few seconds. Your model was
# trained on captions of handwritten digits, CLIP on 400 million pictures from the web, hardly any of
# them like MNIST. Zero-shot means that no labels of the *task* were used; it does not mean that the
# pictures may be of any kind. *Batch size.* In Zhai 2023, figure 2, accuracy rises up to a batch of about
# 32,000; in your figure a batch of 32 is enough at equal pictures. Theirs see 9 billion pictures or more,
# so that even large batches take many steps; yours see 12,800, and ten digits need few negatives.

# %% [markdown]
# ## Interview questions
#
# <details><summary><b>Explain CLIP's architecture and loss in a minute.</b></summary>
#
# Two encoders: for images a ViT, read at its class token, or a ResNet, read by attention pooling; for text
# a causal transformer, read at the end-of-text token. Linear projections without bias take both to one space, where vectors get unit
# length. In a batch of N pairs all N² cosines are scaled by a learned $e^s$, which starts at 1/0.07 and is
# capped at 100; the loss is the mean of two cross-entropies, over rows and over columns, with the
# diagonal as target. Trained on 400 million pairs with N = 32,768 (Radford 2021, sections 2.2 to 2.5).
#
# *Often said wrongly:* that CLIP generates captions, that it needs hand-picked negatives, or that the
# two towers see each other before the final product.
#
# </details>
# <details><summary><b>Why contrast captions instead of predicting them, or predicting labels?</b></summary>
#
# Predicting the exact words of a caption is much harder than telling it from others: in the paper's
# comparison the contrastive objective reached the same zero-shot ImageNet accuracy 4 times as efficiently
# as predicting a bag of words, which was itself 3 times as efficient as a transformer that writes the
# caption (Radford 2021, section 2.3, figure 2). Against labels: captions are plentiful, name more than
# a fixed list of classes, and give a classifier for any list of names, without training.
#
# </details>
# <details><summary><b>You have 8 GPUs. What must be communicated for the loss, and what goes wrong if gradients do not flow?</b></summary>
#
# Each device needs all N embeddings as negatives, N × E numbers gathered, not the images. Gathered
# *without* gradient, embeddings receive only the gradient of their own device's rows and columns: with two
# devices about half of the true gradient's length. `mmlearn.train.gather_with_gradient` keeps it; a test
# shows equality with the whole batch on one process. Accumulating gradients over several small batches does not
# help: it adds no negatives. The sigmoid loss can pass embeddings round a ring instead (Zhai 2023,
# section 3.3).
#
# </details>

# %% [markdown]
# ## Papers
#
# - Radford et al. 2021, [Learning Transferable Visual Models From Natural Language Supervision](https://arxiv.org/abs/2103.00020):
#   sections 2.3 (why contrast), 2.5 (training), 3.1 (zero-shot), 6 (limits).
# - van den Oord, Li, Vinyals 2018, [Representation Learning with Contrastive Predictive Coding](https://arxiv.org/abs/1807.03748):
#   section 2.3, where this loss has its name, InfoNCE, and bounds mutual information: $I \ge \ln N - \mathcal L$.
# - Zhai et al. 2023, [Sigmoid Loss for Language Image Pre-Training](https://arxiv.org/abs/2303.15343): sections 3.2, 3.3, 4.1, 4.2;
#   figures 2 and 3.
# - Cheng et al. 2024, [Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss](https://arxiv.org/abs/2410.17243): section 3.
