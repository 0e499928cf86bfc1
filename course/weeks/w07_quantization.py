# %% [markdown]
# # Week 7. Why does wav2vec 2.0 need Gumbel-softmax?
#
# Last week a model learned from sound alone: some frames were hidden, and it had to recognise each
# of them among others. What it recognised were vectors, as rich as the sound itself. wav2vec 2.0
# recognises *entries of a list* instead, which it makes up while it listens. Choosing from a list
# is a decision, and a decision has no gradient. Gumbel-softmax is the way round.
#
# **You will build** the draw, its gradient, the list of sounds and the loss that keeps it in use;
# then CTC, which turns the result into letters. **You will measure** how wrong and how noisy the
# gradient is, how a codebook dies and what saves it, whether its entries are speech sounds, and
# what all of this is worth when only a few seconds of speech have a transcript.
#
# Two hours; about a minute and a half of computing on a laptop's processor.

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"  # "cuda" for a GPU, "auto" for the best there is
SCALE = "cpu"  # "gpu" runs the larger experiment at the end
DATA = "embedded"  # "hub" takes people's voices for it

# %%
import copy
import itertools
import math
from collections import Counter

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from mmlearn.ctc import greedy_decode
from mmlearn.data import speech
from mmlearn.figures import BLUE, GREEN, GREY, ORANGE, set_style, show
from mmlearn.metrics import character_error_rate, mean_and_spread, word_error_rate
from mmlearn.train import choose_device, fit, set_seed
from mmlearn.wav2vec2 import Wav2Vec2, Wav2Vec2Config, Wav2Vec2ForCTC
from mmlearn.wav2vec2 import contrastive_logits, prepare_waveforms, sample_negatives, sample_spans

torch.set_num_threads(1)  # models this small are faster on one thread than on two
device = choose_device(DEVICE)
set_style()

# %% [markdown]
# ## 1. Why choose at all?
#
# The paper tried all four combinations of what enters the transformer and what it must recognise
# (Baevski 2020, table 4: word error rate in percent on both dev sets together, base model, 250,000
# updates, ten labelled hours, three seeds of fine-tuning):
#
# | the transformer hears | it must recognise | WER |
# |---|---|---|
# | the features as they are | **an entry of the codebooks** | **7.97 ± 0.02** |
# | the features as they are | the features | 8.58 ± 0.08 |
# | entries of the codebooks | the features | 11.18 ± 0.16 |
# | entries of the codebooks | entries of the codebooks | 12.18 ± 0.41 |
#
# So a codebook is no necessity. It improves the *target* by 0.6 points, and ruins the *input*. The
# authors' reason (section 5.4): a target that keeps every detail can be recognised by the voice and
# the background, which is easier than hearing what is said. Their accuracy of recognition rises
# from 62 to 78% with such targets, and the model is the worse for it.
#
# Here are the words that we learn from, at 8 kHz: 20 words, 23 synthetic voices, and five more
# voices that are kept for the test.

# %% tags=["experiment"]
unlabelled = speech.load("train", words="both", sampling_rate=8000, seed=SEED)
train_words = speech.load("train", sampling_rate=8000, seed=SEED)
test_words = speech.load("test", sampling_rate=8000, seed=SEED)
unheard_words = speech.load("unheard", sampling_rate=8000, seed=SEED)
for part in (unlabelled, train_words, test_words, unheard_words):
    print(part.describe().split("; licence")[0])

# %% [markdown]
# ## 2. Throwing dice with an argmax
#
# A linear layer gives each of $V$ entries a logit $l_v$. We want entry $v$ with probability
# $\mathrm{softmax}(l)_v$. The naive way is a table of cumulated probabilities and one random
# number: right, and a dead end, because nothing of the draw can be differentiated. The better way
# puts the randomness *beside* the logits. Add to each its own noise and take the largest:
#
# $$ v^* = \arg\max_v\,(l_v + n_v), \qquad n_v = -\ln(-\ln u_v), \quad u_v \sim U(0, 1) $$
#
# **Why this is exactly softmax.** $E_v = -\ln u_v$ is the waiting time for an event of rate 1,
# since $P(E_v > t) = P(u_v < e^{-t}) = e^{-t}$. Now $l_v + n_v = l_v - \ln E_v =
# -\ln(E_v\,e^{-l_v})$, so the largest sum belongs to the smallest $T_v = E_v e^{-l_v}$, a waiting
# time of rate $e^{l_v}$. It is a race of $V$ clocks. Clock $v$ rings first if it rings at some $t$
# and all others ring later:
#
# $$ P(v^* = v) = \int_0^\infty e^{l_v}\,e^{-e^{l_v}t}\prod_{k \ne v} e^{-e^{l_k}t}\,dt
#    = \int_0^\infty e^{l_v}\,e^{-t\sum_k e^{l_k}}\,dt = \frac{e^{l_v}}{\sum_k e^{l_k}} $$

# %% [markdown] exercise="gumbel_max" difficulty=1 minutes=8
# ### Exercise 1: the Gumbel-max trick
#
# Write `gumbel_max(logits_NV, uniform_NV)`. The uniform numbers are given, one for each logit. It
# returns the number of the entry chosen in each row, a tensor of shape (N,).
#
# $$ v^* = \arg\max_v\,\big(l_v - \ln(-\ln u_v)\big) $$
#
# *Afterwards you can say:* how to draw from a softmax without computing it, and prove it in three
# lines.
#
# <details><summary>Hint 1</summary>
#
# Two logarithms, two minus signs: the inner logarithm is negative, so its minus comes before the
# outer.
#
# </details>
# <details><summary>Hint 2</summary>
#
# ```
# noise = minus log of (minus log of uniform)
# return the argmax over the last axis of logits plus noise
# ```
#
# </details>


# %% answer="gumbel_max"
def gumbel_max(logits_NV, uniform_NV):
    """Draw one entry a row with probability softmax(logits), (N,)."""
    ### BEGIN SOLUTION
    noise_NV = -torch.log(-torch.log(uniform_NV))
    return (logits_NV + noise_NV).argmax(dim=-1)
    ### END SOLUTION


# %% check="gumbel_max" aspect="example" points=1 title="four rows that you can work by hand"
import math
import torch
from mmlearn.feedback import expect

# u = exp(-exp(-n)) has the noise n: here 2 and -1 in the first row.
noises = torch.tensor([[2.0, -1.0], [0.0, -1.0], [-1.0, 0.5], [2.0, 0.5]])
expect(
    "w07_quantization/gumbel_max/hand",
    gumbel_max(
        torch.tensor([[-0.5, 0.0], [0.0, -0.5], [0.0, -1.0], [0.0, -1.0]]),
        torch.exp(-torch.exp(-noises)),
    ),
    torch.tensor([0, 0, 1, 0]),
    "With the noise the rows are (1.5, -1), (0, -1.5), (-1, -0.5) and (2, -0.5): the larger stands "
    "at 0, 0, 1, 0.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(11)
some_logits = 2 * torch.randn(40, 7, generator=draw)
some_uniform = torch.rand(40, 7, generator=draw).clamp(1e-3, 1 - 1e-3)
wanted, kept = (some_logits - (-some_uniform.log()).log()).argmax(dim=1), some_uniform.clone()
assert torch.equal(gumbel_max(some_logits.clone(), some_uniform), wanted)
assert torch.equal(some_uniform, kept), "the caller's numbers were changed"
### END HIDDEN TESTS

# %% check="gumbel_max" aspect="law" points=1 title="the draws follow the softmax"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(12)
rated = torch.tensor([1.0, 0.0, -1.0, 2.0])
drawn = gumbel_max(rated.expand(40_000, 4), torch.rand(40_000, 4, generator=draw))
assert drawn.shape == (40_000,)
found = torch.bincount(drawn, minlength=4) / 40_000
assert (found - rated.softmax(dim=0)).abs().max() < 0.015, found
### END HIDDEN TESTS

# %% check="gumbel_max" aspect="numbers" points=1 title="huge logits, and one uniform number of exactly 0"
### BEGIN HIDDEN TESTS
import torch

dice = torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.5, 0.9], [0.5, 0.1, 0.9]])
steep = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [300.0, 299.0, 100.0]])
assert gumbel_max(steep, dice).tolist() == [1, 2, 0]
### END HIDDEN TESTS


# %% wrong="gumbel_max" name="no_noise" says="You took the largest logit, the same every time. Add the noise first: that is what makes it a draw."
def gumbel_max(logits_NV, uniform_NV):
    return logits_NV.argmax(dim=-1)


# %% wrong="gumbel_max" name="uniform_noise" says="You added the uniform numbers themselves. Only Gumbel noise, -log(-log u), makes the argmax follow the softmax."
def gumbel_max(logits_NV, uniform_NV):
    return (logits_NV + uniform_NV).argmax(dim=-1)


# %% wrong="gumbel_max" name="one_logarithm" says="One logarithm is missing: -log u is the waiting time of a clock. The noise is minus the logarithm of that."
def gumbel_max(logits_NV, uniform_NV):
    return (logits_NV - torch.log(uniform_NV)).argmax(dim=-1)


# %% wrong="gumbel_max" name="sign_lost" says="The outer minus is missing: -log u is a waiting time, and the shortest must win, so its logarithm is subtracted from the logit."
def gumbel_max(logits_NV, uniform_NV):
    return (logits_NV + torch.log(-torch.log(uniform_NV))).argmax(dim=-1)


# %% wrong="gumbel_max" name="over_rows" says="You looked for the largest down the columns. Each row is one choice: the argmax runs over the last axis."
def gumbel_max(logits_NV, uniform_NV):
    return (logits_NV - torch.log(-torch.log(uniform_NV))).argmax(dim=0)


# %% [markdown]
# > **Predict.** Five entries with the logits 2, 1, 0, 0, −1. How often is the *last* chosen by your
# > function? And if the noise were uniform or normal instead of Gumbel, would the shares still be
# > those of the softmax?


# %% tags=["experiment"]
logits = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0])
u = torch.rand(100_000, 5, generator=set_seed(SEED))
with_noise = {
    "Gumbel noise (yours)": gumbel_max(logits.expand_as(u), u),
    "normal noise": (logits + 1.2825 * torch.special.ndtri(u)).argmax(dim=1),  # as widely spread
    "uniform noise": (logits + 4.4429 * u).argmax(dim=1),
}
shares = {name: torch.bincount(v, minlength=5) / len(u) for name, v in with_noise.items()}
for name, share in shares.items():
    print(f"{name:21}", *(f"{s:.3f}" for s in share), sep="  ")
print(f"{'softmax':21}", *(f"{s:.3f}" for s in logits.softmax(dim=0)), sep="  ")

# %% tags=["experiment", "hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for i, (name, colour) in enumerate(zip(shares, (BLUE, ORANGE, GREY))):
    left.bar(torch.arange(5) + 0.25 * (i - 1), shares[name], 0.24, color=colour, label=name)
for v, share in enumerate(logits.softmax(dim=0)):
    left.plot([v - 0.4, v + 0.4], [share, share], color="black", linewidth=1)
left.set(xlabel="entry", ylabel="share of 100,000 draws", xticks=range(5))
left.set_title("Only Gumbel noise hits all five (black lines: softmax)")
left.legend()
times = -torch.log(u[:9]) * torch.exp(-logits)
for row, winner in enumerate(times.argmin(dim=1)):
    right.plot(times[row], [row] * 5, "o", color=GREY, markersize=4)
    right.plot(times[row, winner], row, "o", color=BLUE, markersize=7)
    right.text(times[row, winner], row + 0.25, str(winner.item()), ha="center", fontsize=7)
right.set(xscale="log", xlabel="time at which each of five clocks rings", ylabel="draw", yticks=[])
right.set_title("Nine races: the first clock to ring is the entry")
show(
    figure,
    "gumbel",
    """Left: bars of shares for five entries; those with Gumbel noise end at the black softmax lines,
    normal and uniform noise do not. Right: nine rows of five dots on a time axis; the earliest of
    each row is blue and numbered with its entry.""",
)

# %% [markdown]
# *What to see.* All three noises have the same standard deviation. Normal noise comes close and
# uniform noise does not; only the race of clocks is exact (its time axis is logarithmic). The entry
# with logit −1 wins about one race in 34.

# %% [markdown]
# ## 3. A gradient for a choice
#
# Let $f(z)$ be the loss when the choice is $z$, a one-hot row. We want the gradient of the
# *expected* loss, and for few entries it can be computed:
#
# $$ \frac{\partial}{\partial l_v} \sum_k p_k f_k = p_v \Big(f_v - \sum_k p_k f_k\Big)
#    = \sum_k p_v\,p_k\,(f_v - f_k), \qquad p = \mathrm{softmax}(l) $$
#
# In training nobody tries out all entries for all frames. From *one* draw there are these
# estimates:
#
# | estimate | idea | price |
# |---|---|---|
# | argmax | the gradient of a step function | is 0 |
# | REINFORCE | $f(z)\,\nabla \ln p(z)$ | right on average, very noisy |
# | soft Gumbel | use $y = \mathrm{softmax}((l + n)/\tau)$ instead of $z$ | no choice any more |
# | straight-through | use $z$ on the way there, $y$ on the way back | to be measured |
#
# wav2vec 2.0 takes the last (section 2, equation 1): real entries forward, so that the targets are
# what they will be later, and the soft gradient backward.

# %% [markdown] exercise="straight_through" difficulty=3 minutes=15
# ### Exercise 2: the straight-through Gumbel-softmax
#
# Write `straight_through(logits_NV, uniform_NV, temperature)`. It returns rows that *are* one-hot
# and whose gradient is that of
#
# $$ y = \mathrm{softmax}\big((l + n)/\tau\big), \qquad n = -\ln(-\ln u) $$
#
# *Afterwards you can say:* how a function can have one value and another function's gradient.
#
# <details><summary>Hint 1</summary>
#
# The largest of $y$ is the largest of $l + n$, so the same draw decides both.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `F.one_hot` gives integers, without gradient; make them the dtype of the logits. `soft -
# soft.detach()` is zero, with the gradient of `soft`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# ```
# noise = -log(-log(uniform))
# soft  = softmax of (logits + noise) / temperature
# hard  = one-hot row of soft's argmax
# return hard, plus a zero that has soft's gradient
# ```
#
# </details>


# %% answer="straight_through"
def straight_through(logits_NV, uniform_NV, temperature):
    """Draw one-hot rows whose gradient is that of a softmax at this temperature, (N, V)."""
    ### BEGIN SOLUTION
    noise_NV = -torch.log(-torch.log(uniform_NV))
    soft_NV = ((logits_NV + noise_NV) / temperature).softmax(dim=-1)
    hard_NV = F.one_hot(soft_NV.argmax(dim=-1), logits_NV.shape[-1]).to(soft_NV.dtype)
    return hard_NV + (soft_NV - soft_NV.detach())
    ### END SOLUTION


# %% check="straight_through" aspect="example" points=2 title="one-hot forward, soft backward"
import math
import torch
from mmlearn.feedback import expect

# The noise is 0 and ln 2, so the sums are ln 3 and ln 2: at temperature 1/2, soft is 9/13 and 4/13.
one_row = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
rare = torch.tensor([[math.exp(-1), math.exp(-0.5)]])
one_draw = straight_through(one_row, rare, 0.5)
expect(
    "w07_quantization/straight_through/hard",
    one_draw,
    torch.tensor([[1.0, 0.0]]),
    "ln 3 beats ln 2, so the row is exactly (1, 0): return the hard choice.",
)
one_draw[0, 0].backward()
expect(
    "w07_quantization/straight_through/gradient",
    one_row.grad,
    torch.tensor([[72 / 169, -72 / 169]]),
    "The first entry's gradient is that of soft: 9/13 · 4/13 / (1/2), and its negative.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(21)
scored, pull = (torch.randn(6, 5, generator=draw) for _ in range(2))
uniform = torch.rand(6, 5, generator=draw).clamp(0.001, 0.999)
mine = scored.clone().requires_grad_()
reference = scored.clone().requires_grad_()
noise = -(-uniform.log()).log()
soft = torch.softmax((reference + noise) / 0.7, dim=1)
best = torch.nn.functional.one_hot((scored + noise).argmax(dim=1), 5).float()
(soft * pull).sum().backward()
kept = uniform.clone()
rows = straight_through(mine, uniform, 0.7)
assert torch.equal(uniform, kept), "the caller's uniform numbers were changed"
assert torch.allclose(rows, best, atol=1e-6)
(rows * pull).sum().backward()
assert torch.allclose(mine.grad, reference.grad, atol=1e-5)
### END HIDDEN TESTS

# %% check="straight_through" aspect="law" points=1 title="the temperature changes the gradient, never the choice"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(22)
scored, uniform = torch.randn(300, 6, generator=draw), torch.rand(300, 6, generator=draw)
cold, warm, hot = (straight_through(scored.clone(), uniform.clone(), t) for t in (0.5, 1.0, 4.0))
assert torch.equal(cold.argmax(dim=1), warm.argmax(dim=1))
assert torch.equal(cold.argmax(dim=1), hot.argmax(dim=1))
assert (cold.argmax(dim=1) != scored.argmax(dim=1)).any(), "the noise takes part"
assert torch.allclose(hot.sum(dim=1), torch.ones(300), atol=1e-5)
assert hot.max() > 0.999, "rows are one-hot at any temperature"
### END HIDDEN TESTS

# %% check="straight_through" aspect="numbers" points=1 title="cold, loud, and a uniform number of exactly 0"
### BEGIN HIDDEN TESTS
import torch

loud = torch.tensor([[500.0, -500.0, 0.0], [0.0, 1.0, -1.0]], requires_grad=True)
given = torch.tensor([[0.3, 0.6, 0.9], [0.0, 0.2, 0.7]])
rows = straight_through(loud, given, 0.01)
assert torch.allclose(rows, torch.eye(3)[[0, 1]], atol=1e-5)
(rows * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
assert torch.isfinite(loud.grad).all()
### END HIDDEN TESTS


# %% wrong="straight_through" name="stays_soft" says="Your rows are the soft ones, a mixture of entries. The result must be one-hot; only its gradient is soft."
def straight_through(logits_NV, uniform_NV, temperature):
    noise = -torch.log(-torch.log(uniform_NV))
    return ((logits_NV + noise) / temperature).softmax(dim=-1)


# %% wrong="straight_through" name="flipped" says="You subtracted soft and added its detached copy, so the gradient has the wrong sign: hard + soft - soft.detach()."
def straight_through(logits_NV, uniform_NV, temperature):
    noise = -torch.log(-torch.log(uniform_NV))
    soft = ((logits_NV + noise) / temperature).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), logits_NV.shape[-1]).to(soft.dtype)
    return hard + soft.detach() - soft


# %% wrong="straight_through" name="detached_all" says="Nothing in your result has a gradient with respect to the logits: add soft minus its detached copy."
def straight_through(logits_NV, uniform_NV, temperature):
    noise = -torch.log(-torch.log(uniform_NV))
    soft = ((logits_NV + noise) / temperature).softmax(dim=-1).detach()
    hard = F.one_hot(soft.argmax(dim=-1), logits_NV.shape[-1]).to(soft.dtype)
    return (hard + soft - soft).requires_grad_()


# %% wrong="straight_through" name="noise_outside" says="Your noise is not divided by the temperature, so at temperature 2 the logits lose weight and the draw no longer follows their softmax. Divide the sum."
def straight_through(logits_NV, uniform_NV, temperature):
    noise = -torch.log(-torch.log(uniform_NV))
    soft = (logits_NV / temperature + noise).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), logits_NV.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


# %% wrong="straight_through" name="no_noise" says="Without noise the same entry wins every time, and the others are never tried. Add the Gumbel noise to the logits."
def straight_through(logits_NV, uniform_NV, temperature):
    soft = (logits_NV / temperature).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), logits_NV.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


# %% wrong="straight_through" name="multiplies" says="You multiplied by the temperature. A low temperature must make the softmax sharper: divide."
def straight_through(logits_NV, uniform_NV, temperature):
    noise = -torch.log(-torch.log(uniform_NV))
    soft = ((logits_NV + noise) * temperature).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), logits_NV.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


# %% wrong="straight_through" name="plain_softmax_back" says="Your gradient is that of softmax(logits), without noise and temperature. The soft rows must come from the same draw as the hard ones."
def straight_through(logits_NV, uniform_NV, temperature):
    noise = -torch.log(-torch.log(uniform_NV))
    hard = F.one_hot((logits_NV + noise).argmax(dim=-1), logits_NV.shape[-1]).to(logits_NV.dtype)
    soft = logits_NV.softmax(dim=-1)
    return hard + soft - soft.detach()


# %% [markdown]
# ### How wrong, and how noisy?
#
# An estimate can be wrong on average (**bias**) or scattered around its average (**variance**).
# With eight entries the exact gradient is known, so both can be measured. The loss comes in two
# shapes: *quadratic*, the squared distance of the chosen entry from a goal, and *contrastive*, as
# in wav2vec
# 2.0: minus the log-probability of the entry among five others, by cosine divided by 0.3. Eight
# such problems are drawn at random, since one may be a lucky one.


# %% tags=["experiment"]
class Problem:
    """Eight entries to choose from, logits, a goal and five others; all drawn at random."""

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)
        self.entries, self.others = (torch.randn(n, 4, generator=draw) for n in (8, 5))
        self.goal, self.logits = (torch.randn(n, generator=draw) for n in (4, 8))

    def quadratic(self, chosen_ND):
        return (chosen_ND - self.goal).square().sum(dim=1)

    def contrastive(self, chosen_ND):
        right = torch.cosine_similarity(chosen_ND, self.goal[None]) / 0.3
        wrong = torch.cosine_similarity(self.others, self.goal[None]) / 0.3
        return torch.logaddexp(right, wrong.logsumexp(dim=0)) - right

    def exact_gradient(self, loss):
        losses, p = loss(self.entries), self.logits.softmax(dim=0)
        return p * (losses - p @ losses)


# %% [markdown]
# REINFORCE gets its usual help: from each loss the average loss is subtracted. That changes nothing
# on average, since $\mathbb E[\nabla \ln p] = 0$, and calms it a good deal.


# %% tags=["experiment"]
def estimates(kind, problem, loss, temperature=1.0, count=20_000, seed=SEED):
    """Return `count` estimates of the gradient, each from one draw, (count, 8)."""
    u = torch.rand(count, 8, generator=torch.Generator().manual_seed(seed))
    rows = problem.logits.repeat(count, 1).requires_grad_()
    if kind.startswith("REINFORCE"):
        chosen = gumbel_max(rows, u)
        values = loss(problem.entries[chosen])
        baseline = values.mean() if "baseline" in kind else 0.0
        minus_p = F.one_hot(chosen, 8) - rows.softmax(dim=1)  # the gradient of ln p(chosen)
        return ((values - baseline)[:, None] * minus_p).detach()
    z = straight_through(rows, u, temperature)
    if kind == "soft Gumbel":  # the same noise, but no choice
        z = ((rows - torch.log(-torch.log(u))) / temperature).softmax(dim=1)
    return torch.autograd.grad(loss(z @ problem.entries).sum(), rows)[0]


# %% [markdown]
# > **Predict.** As the temperature falls towards 0: does the bias of the straight-through gradient
# > vanish? For both losses? And what happens to its variance?

# %% tags=["experiment"]
temperatures = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)
kinds = {"straight-through": BLUE, "soft Gumbel": ORANGE}
kinds |= {"REINFORCE": GREY, "REINFORCE with baseline": GREEN}
study = {}
for number, name in itertools.product(range(8), ("quadratic", "contrastive")):
    problem = Problem(SEED + number)
    loss = getattr(problem, name)
    exact = problem.exact_gradient(loss)
    for kind in kinds:
        for t in (1.0,) if kind.startswith("REINFORCE") else temperatures:
            g = estimates(kind, problem, loss, t)
            bias = (g.mean(dim=0) - exact).norm() / exact.norm()
            spread = g.var(dim=0).sum().sqrt() / exact.norm()
            cosine = torch.cosine_similarity(g.mean(dim=0), exact, dim=0)
            study.setdefault((name, kind, t), []).append((bias, spread, cosine))

# %% tags=["experiment", "hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
panels = (("quadratic", 0), ("contrastive", 0), ("contrastive", 1))
for axis, (name, which) in zip(axes, panels):
    for kind, colour in kinds.items():
        at = [t if (name, kind, t) in study else 1.0 for t in temperatures]
        values = torch.tensor([[row[which] for row in study[name, kind, t]] for t in at])
        low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1)
        axis.plot(temperatures, middle, color=colour, label=kind)
        axis.fill_between(temperatures, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axvspan(0.5, 2.0, color=GREY, alpha=0.08)
    axis.set(xscale="log", xlabel="temperature τ", xticks=temperatures)
    axis.set_xticklabels([f"{t:g}" for t in temperatures])
    axis.minorticks_off()
for axis in axes[:2]:
    axis.set(ylabel="bias (share of the true gradient)", ylim=(0, 1.2))
axes[0].set_title("Quadratic loss: the bias goes")
axes[1].set_title("Contrastive loss: one bias stays")
axes[2].set(ylabel="standard deviation (in true gradients)", yscale="log")
axes[2].set_title("Contrastive loss: cold is noisy")
axes[1].legend(fontsize=7)
show(
    figure,
    "estimators",
    """Three panels over temperature on a log axis, the range 0.5 to 2 shaded; medians of eight
    problems with their middle halves. For the quadratic loss the bias of straight-through and soft
    Gumbel falls towards 0 with the temperature. For the contrastive loss that of soft Gumbel falls,
    that of straight-through stays above a half. The deviation of both grows as it gets colder.""",
)

# %% tags=["experiment"]
for (name, kind, t), rows in study.items():
    if t in (0.05, 0.5, 1.0, 2.0) and name == "contrastive":
        bias, spread, cosine = torch.tensor(rows).median(dim=0).values.tolist()
        at = "" if kind.startswith("REINFORCE") else f", τ = {t}"
        print(f"{kind + at:28} bias {bias:.2f}, deviation {spread:4.1f}, cosine {cosine:.2f}")

# %% [markdown]
# *What to see.* Medians of the eight problems, with their middle halves. (Below 0.1 it is mostly
# the sampling error of 20,000 draws.) "The bias vanishes as τ → 0" is said in many places. It holds
# for the *soft* estimate. On the loss that we care about, the straight-through one keeps an error
# of about half the true gradient's length, however cold it gets. What it gives in return: in the
# shaded range, where wav2vec 2.0 works, it is the least noisy of all, and its direction is mostly
# right. REINFORCE with a baseline is right on average and not hopeless; it knows only the value of
# the loss.
#
# **Why.** Let τ → 0. Then $y$ is one-hot but for near ties of two entries, $i$ and $k$, and all
# gradient comes from there. With $x = ((l_i + n_i) - (l_k + n_k))/\tau$ we have $y_i = \sigma(x)$.
# How many draws are so near a tie? Raising $l_i$ by a small $\epsilon$ hands $p_i p_k\,\epsilon$ of
# all draws from $k$ to $i$: that is the derivative of the softmax, $\partial p_i / \partial l_k =
# -p_i p_k$. So that share lies within $\epsilon$ of the tie, and $x$ is spread evenly near 0. Each
# pair adds
#
# $$ p_i p_k \int \sigma'(x)\; f'(\cdot) \cdot (e_i - e_k)\; dx $$
#
# The soft estimate takes $f'$ at the mixture $\sigma(x)\,e_i + (1 - \sigma(x))\,e_k$. Substituting
# $s = \sigma(x)$, this is the integral of a derivative from $e_k$ to $e_i$: exactly $f_i - f_k$, as
# in the formula above (if $f'$ stays bounded on the way; a cosine's does not near 0).
# Straight-through knows $f'$ only at the two ends, each for half of the time:
#
# $$ \tfrac12 \big(f'(e_i) + f'(e_k)\big) \cdot (e_i - e_k) $$
#
# That is the trapezium rule: exact for straight lines and parabolas, wrong for what bends
# otherwise, at any temperature. And the noise: $\sigma'(x)^2/\tau^2$ counts for a share of about τ
# of the draws, so the variance grows like $1/\tau$.

# %% tags=["experiment"]
problem = Problem(SEED)
ends, p = problem.entries.clone().requires_grad_(), problem.logits.softmax(dim=0)
(slope,) = torch.autograd.grad(problem.contrastive(ends).sum(), ends)  # f' at each entry
along = slope @ problem.entries.T  # f'(e_i) · e_k
step = along.diagonal()[:, None] - along  # f'(e_i) · (e_i - e_k)
predicted = (p[:, None] * p * (step - step.T) / 2).sum(dim=1)
measured = estimates("straight-through", problem, problem.contrastive, 0.05, 100_000).mean(dim=0)
print("exact          ", *(f"{g:+.3f}" for g in problem.exact_gradient(problem.contrastive)))
print("trapezium rule ", *(f"{g:+.3f}" for g in predicted))
print("measured, 0.05 ", *(f"{g:+.3f}" for g in measured))

# %% [markdown]
# The trapezium predicts what your estimator does, entry by entry. Neither is the exact gradient.
# (For the straight-through gradient without Gumbel noise, Liu et al. 2023 show the like: it is a
# first-order rule, and a second-order one costs next to nothing.)

# %% [markdown]
# ## 4. From hot to cold
#
# Hot: little noise, much bias, and all entries learn. Cold: the reverse. So start hot and cool
# down, by a constant factor at each update until a floor is reached:
#
# $$ \tau_s = \max(\tau_\text{start}\, d^{\,s},\; \tau_\text{end}) $$
#
# The paper has 2 → 0.5 for the base model, 2 → 0.1 for the large one, $d = 0.999995$ (section 4.2).

# %% [markdown] exercise="cooling" difficulty=2 minutes=10 forbids=["mmlearn.quantization.gumbel_temperature"]
# ### Exercise 3: the schedule, and the factor for a run of your length
#
# Write `temperature_at(step, start, end, factor)`, and `factor_for(steps, start, end)`, for plain
# numbers: the factor with which the temperature falls from start to end in exactly so many updates.
#
# *Afterwards you can say:* why copying the paper's factor into a short run means no schedule at
# all.
#
# <details><summary>Hint 1</summary>
#
# A floor is a `max`, though the temperature falls.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Solve $\tau_\text{start}\, d^{\,S} = \tau_\text{end}$ for $d$: divide, then take the $S$-th root.
#
# </details>


# %% answer="cooling"
def temperature_at(step, start, end, factor):
    """Return the temperature after so many updates."""
    ### BEGIN SOLUTION
    return max(start * factor**step, end)
    ### END SOLUTION


def factor_for(steps, start, end):
    """Return the factor that leads from start to end in so many updates."""
    ### BEGIN SOLUTION
    return (end / start) ** (1 / steps)
    ### END SOLUTION


# %% check="cooling" aspect="example" points=2 title="halved at each update"
from mmlearn.feedback import expect

expect(
    "w07_quantization/cooling/halves",
    [temperature_at(step, 2.0, 0.3, 0.5) for step in range(5)],
    [2.0, 1.0, 0.5, 0.3, 0.3],
    "With the factor 1/2 the temperatures are 2, 1, 1/2, and from there the floor of 0.3.",
)
expect(
    "w07_quantization/cooling/factor",
    factor_for(2, 2.0, 0.5),
    0.5,
    "From 2 to 1/2 in two updates: halved each time.",
)
### BEGIN HIDDEN TESTS
assert abs(temperature_at(100_000, 2.0, 0.5, 0.999995) - 1.2130598) < 1e-4
assert abs(temperature_at(3, 1.6, 0.1, 0.25) - 0.1) < 1e-9
assert abs(temperature_at(2, 1.6, 0.05, 0.25) - 0.1) < 1e-9
### END HIDDEN TESTS

# %% check="cooling" aspect="law" points=1 title="the two functions belong together, in runs of any length"
### BEGIN HIDDEN TESTS
for steps, start, end in ((1, 3.0, 0.2), (7, 2.0, 0.5), (300, 2.0, 0.5), (599_000, 2.0, 0.1)):
    factor = factor_for(steps, start, end)
    assert 0 < factor < 1
    assert abs(temperature_at(steps, start, end / 2, factor) - end) < 1e-6
    assert abs(temperature_at(0, start, end, factor) - start) < 1e-9
    assert temperature_at(10 * steps, start, end, factor) == end
    halfway = temperature_at(2 * steps, start, 0.0, factor)
    assert abs(halfway - end * end / start) < 1e-6
### END HIDDEN TESTS


# %% wrong="cooling" name="ceiling" says="You took the smaller of the two, which is the floor from the first step on. A floor under a falling value is a max."
def temperature_at(step, start, end, factor):
    return min(start * factor**step, end)


def factor_for(steps, start, end):
    return (end / start) ** (1 / steps)


# %% wrong="cooling" name="no_floor" says="Your temperature falls for ever. Near 0 the gradient's noise grows without bound: stop at the end value."
def temperature_at(step, start, end, factor):
    return start * factor**step


def factor_for(steps, start, end):
    return (end / start) ** (1 / steps)


# %% wrong="cooling" name="straight_line" says="Your temperature falls along a straight line. The factor multiplies at each update, so it is raised to the power of the step."
def temperature_at(step, start, end, factor):
    return max(start * (1 - (1 - factor) * step), end)


def factor_for(steps, start, end):
    return (end / start) ** (1 / steps)


# %% wrong="cooling" name="divided_by_steps" says="You divided the ratio by the number of updates. A factor is applied again and again: take the root."
def temperature_at(step, start, end, factor):
    return max(start * factor**step, end)


def factor_for(steps, start, end):
    return end / start / steps


# %% wrong="cooling" name="upside_down" says="Your ratio is upside down, so the temperature would rise. From start to end is end divided by start."
def temperature_at(step, start, end, factor):
    return max(start * factor**step, end)


def factor_for(steps, start, end):
    return (start / end) ** (1 / steps)


# %% tags=["experiment"]
runs = {
    "base": (0.5, 400_000),
    "large, Librispeech": (0.1, 250_000),
    "large, LibriVox": (0.1, 600_000),
}
for model, (end, updates) in runs.items():
    floor_at = math.log(2.0 / end) / -math.log(0.999995)
    reached = temperature_at(updates, 2.0, end, 0.999995)
    print(
        f"{model}: the floor of {end} after {floor_at:,.0f} updates; trained for {updates:,}: {reached:.3f}"
    )
print(f"our 600 updates with the paper's factor: {temperature_at(600, 2.0, 0.5, 0.999995):.3f}")
print(
    f"our 600 updates with ours:               {temperature_at(600, 2.0, 0.5, factor_for(600, 2.0, 0.5)):.3f}"
)

# %% [markdown]
# Two things that the paper does not say aloud. The factor fits the longest run: with 600,000
# updates on LibriVox, 0.1 is reached just at the end. The large model on Librispeech has 250,000
# and ends at about
# 0.57. And whoever copies the factor into a run of a thousand updates trains at 2 throughout.
#
# ## 5. Two small lists instead of one long one
#
# A list with 102,400 sounds needs as many logits for each frame, and most entries would never be
# tried. **Product quantization** takes $G = 2$ lists with $V = 320$ entries each, chooses from
# each, and joins the two halves: $320^2 = 102{,}400$ combinations from 640 logits.

# %% [markdown] exercise="quantize" difficulty=2 minutes=12 forbids=["mmlearn.quantization.GumbelQuantizer"]
# ### Exercise 4: product quantization
#
# Write `quantize(chosen_NGV, codebooks)`.
#
# | | shape | |
# |---|---|---|
# | `chosen_NGV` | (N, G, V) | one-hot rows, as `straight_through` makes them |
# | `codebooks` | (G, V, width) | the entries |
# | returns vectors | (N, G · width) | the chosen entries side by side, first codebook first |
# | returns names | (N,) | the number of the combination, with G = 2: $V v_1 + v_2$ |
#
# In general the name reads the choices as the digits of a number to the base V. The vectors must
# pass gradients on to the codebooks *and* to `chosen_NGV`.
#
# *Afterwards you can say:* why an index loses the gradient and a product with a one-hot row keeps
# it.
#
# <details><summary>Hint 1</summary>
#
# A one-hot row times a matrix is a row of the matrix. Name the axes n, g, v, w and let
# `torch.einsum` sum over v.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The parts lie side by side once the two axes behind the frames are flattened. A name is read like
# a number: start from 0; for each codebook, multiply by V and add the choice.
#
# </details>


# %% answer="quantize"
def quantize(chosen_NGV, codebooks):
    """Look the chosen entries up; return them joined, and each combination's number."""
    ### BEGIN SOLUTION
    vectors = torch.einsum("ngv,gvw->ngw", chosen_NGV, codebooks).flatten(1)
    names = torch.zeros(len(chosen_NGV), dtype=torch.long, device=chosen_NGV.device)
    for choice_N in chosen_NGV.argmax(dim=-1).T:
        names = names * chosen_NGV.shape[-1] + choice_N
    return vectors, names
    ### END SOLUTION


# %% check="quantize" aspect="example" points=2 title="two codebooks with three entries"
import torch
from mmlearn.feedback import expect

two_books = torch.tensor(
    [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]]
)
picks = torch.eye(3)[torch.tensor([[2, 0], [0, 1]])]
expect(
    "w07_quantization/quantize/hand",
    quantize(picks, two_books),
    (torch.tensor([[5.0, 6.0, 10.0, 20.0], [1.0, 2.0, 30.0, 40.0]]), torch.tensor([6, 1])),
    "The first frame takes entry 2 and entry 0, combination 3 · 2 + 0; the second 0 and 1, name 1. "
    "Return the joined vectors and the names.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(41)
books = torch.randn(3, 4, 5, generator=draw)
codes = torch.randint(4, (7, 3), generator=draw)
vectors, names = quantize(torch.eye(4)[codes], books.clone())
assert vectors.shape == (7, 15)
wanted = torch.cat([books[g][codes[:, g]] for g in range(3)], dim=1)
assert torch.allclose(vectors, wanted, atol=1e-6)
assert torch.equal(torch.as_tensor(names), 16 * codes[:, 0] + 4 * codes[:, 1] + codes[:, 2])
### END HIDDEN TESTS

# %% check="quantize" aspect="gradient" points=1 title="entries and choices learn"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(42)
books = torch.randn(2, 3, 4, generator=draw).requires_grad_()
chosen = torch.eye(3)[torch.tensor([[0, 2], [1, 2], [1, 2]])].requires_grad_()
pull = torch.randn(3, 8, generator=draw)
slope = torch.einsum("ngw,gvw->ngv", pull.view(3, 2, 4), books.detach())
(quantize(chosen, books)[0] * pull).sum().backward()
assert torch.allclose(chosen.grad, slope, atol=1e-5), "each choice is told by each entry"
assert torch.allclose(books.grad[1, 2], pull[:, 4:].sum(dim=0), atol=1e-5)
assert books.grad[0, 2].abs().max() == 0, "an entry that nobody chose has no gradient"
### END HIDDEN TESTS


# %% wrong="quantize" name="sums" says="You added the codebooks' entries. Product quantization puts them side by side, so that each keeps its own half of the vector."
def quantize(chosen_NGV, codebooks):
    codes = chosen_NGV.argmax(dim=-1)
    names = codes @ (chosen_NGV.shape[-1] ** torch.arange(codes.shape[1] - 1, -1, -1))
    return torch.einsum("ngv,gvw->nw", chosen_NGV, codebooks), names


# %% wrong="quantize" name="first_book_twice" says="Both choices were looked up in the first codebook. Each codebook has entries of its own: keep the axis G in the product."
def quantize(chosen_NGV, codebooks):
    codes = chosen_NGV.argmax(dim=-1)
    names = codes @ (chosen_NGV.shape[-1] ** torch.arange(codes.shape[1] - 1, -1, -1))
    return torch.einsum("ngv,vw->ngw", chosen_NGV, codebooks[0]).flatten(1), names


# %% wrong="quantize" name="interleaved" says="Your numbers are interleaved: the codebooks' parts must stand one after the other, the first codebook's first."
def quantize(chosen_NGV, codebooks):
    codes = chosen_NGV.argmax(dim=-1)
    names = codes @ (chosen_NGV.shape[-1] ** torch.arange(codes.shape[1] - 1, -1, -1))
    return torch.einsum("ngv,gvw->nwg", chosen_NGV, codebooks).flatten(1), names


# %% wrong="quantize" name="by_index" says="Looking an entry up by its index gives the right vector, but no gradient reaches the choice. Multiply by the one-hot row."
def quantize(chosen_NGV, codebooks):
    codes = chosen_NGV.argmax(dim=-1)
    names = codes @ (chosen_NGV.shape[-1] ** torch.arange(codes.shape[1] - 1, -1, -1))
    return torch.cat([book[code] for book, code in zip(codebooks, codes.T)], dim=1), names


# %% wrong="quantize" name="names_added" says="You added the choices, so 0 + 1 and 1 + 0 have the same name. Multiply by V before the next choice is added."
def quantize(chosen_NGV, codebooks):
    vectors = torch.einsum("ngv,gvw->ngw", chosen_NGV, codebooks).flatten(1)
    return vectors, chosen_NGV.argmax(dim=-1).sum(dim=1)


# %% wrong="quantize" name="names_backwards" says="Your names read the choices from the last codebook to the first. The first codebook is the leading digit."
def quantize(chosen_NGV, codebooks):
    vectors = torch.einsum("ngv,gvw->ngw", chosen_NGV, codebooks).flatten(1)
    codes = chosen_NGV.argmax(dim=-1)
    return vectors, codes @ (chosen_NGV.shape[-1] ** torch.arange(codes.shape[1]))


# %% [markdown]
# Now the module, made of your two functions. In training the draw is random; in evaluation the
# largest logit decides, without noise.


# %%
class Quantizer(nn.Module):
    """Logits by a linear layer, your draw, your codebooks."""

    def __init__(self, width, groups, entries, dim):
        super().__init__()
        self.temperature = 2.0
        self.codebooks = nn.Parameter(torch.rand(groups, entries, dim // groups))
        self.to_logits = nn.Linear(width, groups * entries)
        nn.init.normal_(self.to_logits.weight)  # wide apart, as in the paper's code
        nn.init.zeros_(self.to_logits.bias)

    def forward(self, features):
        groups, entries, _ = self.codebooks.shape
        logits_NGV = self.to_logits(features).unflatten(-1, (groups, entries))
        if self.training:
            rows, u = logits_NGV.flatten(0, 1), torch.rand_like(logits_NGV.flatten(0, 1))
            chosen = straight_through(rows, u, self.temperature).view_as(logits_NGV)
        else:
            chosen = F.one_hot(logits_NGV.argmax(dim=-1), entries).to(logits_NGV.dtype)
        return *quantize(chosen, self.codebooks), logits_NGV


# %% [markdown]
# ## 6. How many sounds are in use?
#
# Average the softmax over all frames of a batch: $\bar p_{g,v}$ is the share of entry $v$ in
# codebook $g$. Its entropy $H_g = -\sum_v \bar p_{g,v} \ln \bar p_{g,v}$ says how evenly the
# entries are used. Its exponential, the **perplexity**, says it in entries. For if $m$ entries
# share the work equally, $H = -m \cdot \frac1m \ln \frac1m = \ln m$, so $e^H = m$; a codebook stuck
# on one entry has $e^0 = 1$. No distribution over $V$ entries has more than $e^H = V$. Summed over
# the codebooks it lies between $G$ and $GV$, and the **diversity loss** is the share that is
# missing:
#
# $$ \mathcal L_d = \frac{GV - \sum_g e^{H_g}}{GV} $$
#
# (Baevski 2020, equation 4 has the entropies themselves. Footnote 2: the code uses perplexities, as
# here, "which is equivalent": the same optimum, another gradient.)

# %% [markdown] exercise="diversity" difficulty=3 minutes=12 forbids=["mmlearn.quantization.perplexity"]
# ### Exercise 5: perplexity and the diversity loss
#
# Write `perplexity(logits_NGV)`, summed over the codebooks, and `diversity_loss(logits_NGV)`. The
# softmax has neither noise nor temperature. A share of exactly 0 adds nothing.
#
# *Afterwards you can say:* why the average comes before the entropy, and what would happen in the
# other order.
#
# <details><summary>Hint 1</summary>
#
# Each frame should be sure of its entry; only *together* should the frames use all of them.
#
# </details>
# <details><summary>Hint 2</summary>
#
# $0 \ln 0$ is not a number. Let no share be below `1e-30` *inside the logarithm*, and it is 0.
# (`torch.xlogy` has the right value there, but a gradient that is not a number.)
#
# </details>
# <details><summary>Hint 3</summary>
#
# ```
# shares = softmax over the entries, averaged over the frames: (G, V)
# entropy of each codebook = minus the sum over its entries of share * log share
# perplexity = sum over the codebooks of exp(entropy)
# loss = (G * V - perplexity) / (G * V)
# ```
#
# </details>


# %% answer="diversity"
def perplexity(logits_NGV):
    """Count the entries in use, over all codebooks: between G and G times V."""
    ### BEGIN SOLUTION
    shares_GV = logits_NGV.softmax(dim=-1).mean(dim=0)
    logs_GV = shares_GV.clamp(min=1e-30).log()  # a share of 0 times a large number is 0
    return torch.exp(-(shares_GV * logs_GV).sum(dim=-1)).sum()
    ### END SOLUTION


def diversity_loss(logits_NGV):
    """Return the share of the entries that is not in use, from 0 to (V - 1) / V."""
    ### BEGIN SOLUTION
    entries = logits_NGV.shape[1] * logits_NGV.shape[2]
    return (entries - perplexity(logits_NGV)) / entries
    ### END SOLUTION


# %% check="diversity" aspect="example" points=2 title="four entries in use, and two"
import math
import torch
from mmlearn.feedback import expect

# Four frames, two codebooks: the first takes each of its four entries once, the second only two.
sure = 200.0 * torch.eye(4)[torch.tensor([[0, 0], [1, 1], [2, 0], [3, 1]])]
expect(
    "w07_quantization/diversity/sure",
    (perplexity(sure.clone()), diversity_loss(sure.clone())),
    (torch.tensor(6.0), torch.tensor(0.25)),
    "Four entries and two are in use, 6 of 8, so 2 of 8 are missing.",
)
expect(
    "w07_quantization/diversity/unsure",
    perplexity(torch.tensor([[[math.log(3), 0.0]], [[0.0, 0.0]]])),
    (8 / 5) ** (5 / 8) * (8 / 3) ** (3 / 8),
    "Shares of (3/4, 1/4) and (1/2, 1/2) average to (5/8, 3/8), whose entropy is 5/8 ln 8/5 + "
    "3/8 ln 8/3.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(51)
scored = 3 * torch.randn(9, 3, 5, generator=draw)
mean = torch.softmax(scored.double(), dim=2).mean(dim=0)
wanted = float(sum(torch.exp(-(row * row.log()).sum()) for row in mean))
assert abs(float(perplexity(scored.clone())) - wanted) < 1e-3
assert abs(float(diversity_loss(scored.clone())) - (15 - wanted) / 15) < 1e-4
### END HIDDEN TESTS

# %% check="diversity" aspect="law" points=1 title="from one entry to all, and the order of the frames"
### BEGIN HIDDEN TESTS
import torch

stuck = torch.zeros(5, 2, 7)
stuck[:, :, 3] = 200.0
assert abs(float(perplexity(stuck.clone())) - 2) < 1e-4
assert abs(float(diversity_loss(stuck)) - 6 / 7) < 1e-4
assert abs(float(perplexity(torch.zeros(5, 2, 7))) - 14) < 1e-3
draw = torch.Generator().manual_seed(52)
scored = 2 * torch.randn(6, 2, 4, generator=draw)
before = float(perplexity(scored.clone()))
assert abs(float(perplexity(scored.flip(0).clone())) - before) < 1e-4
assert abs(float(perplexity(scored[:, :, [2, 0, 3, 1]].clone())) - before) < 1e-4
assert abs(float(perplexity(torch.cat([scored, scored]))) - before) < 1e-4
### END HIDDEN TESTS

# %% check="diversity" aspect="gradient" points=1 title="its gradient wakes the unused entries, and stays finite"
### BEGIN HIDDEN TESTS
import torch

scored = torch.tensor([[[2.0, 0.0, -1.0]], [[1.5, 0.5, -2.0]]], requires_grad=True)
diversity_loss(scored).backward()
assert (scored.grad[:, 0, 0] > 1e-3).all(), "the crowded entry is pushed down"
assert (scored.grad[:, 0, 2] < -1e-4).all(), "the empty entry is pulled up"
reference = scored.detach().double().requires_grad_()
mean = reference.softmax(dim=-1).mean(dim=0)
(-(-(mean * mean.log()).sum()).exp() / 3).backward()
assert torch.allclose(scored.grad.double(), reference.grad, atol=1e-5)
far = torch.tensor([[[300.0, 0.0, -300.0]]], requires_grad=True)
diversity_loss(far).backward()
assert torch.isfinite(far.grad).all()
rare = torch.tensor([[[8.0, 0.0, -1.0]]])
share = rare.double().softmax(dim=-1)
exact = float(torch.exp(-(share * share.log()).sum()))
assert abs(float(perplexity(rare)) - exact) < 1e-4, "rare entries count as well"
### END HIDDEN TESTS


# %% wrong="diversity" name="each_frame" says="You took the entropy of each frame and averaged afterwards. That rewards frames for being undecided: average the shares first."
def perplexity(logits_NGV):
    p = logits_NGV.softmax(dim=-1)
    return (-torch.xlogy(p, p).sum(dim=-1)).mean(dim=0).exp().sum()


def diversity_loss(logits_NGV):
    entries = logits_NGV.shape[1] * logits_NGV.shape[2]
    return (entries - perplexity(logits_NGV)) / entries


# %% wrong="diversity" name="product" says="You added the entropies before the exponential, which multiplies the codebooks. Count the entries of each codebook, then add."
def perplexity(logits_NGV):
    p = logits_NGV.softmax(dim=-1).mean(dim=0)
    return (-torch.xlogy(p, p).sum()).exp()


def diversity_loss(logits_NGV):
    entries = logits_NGV.shape[1] * logits_NGV.shape[2]
    return (entries - perplexity(logits_NGV)) / entries


# %% wrong="diversity" name="counts_winners" says="You counted the largest logits. That is the right number to print, but a count has no gradient, so it teaches nothing: use the softmax."
def perplexity(logits_NGV):
    p = F.one_hot(logits_NGV.argmax(dim=-1), logits_NGV.shape[-1]).float().mean(dim=0)
    return (-torch.xlogy(p, p).sum(dim=-1)).exp().sum()


def diversity_loss(logits_NGV):
    entries = logits_NGV.shape[1] * logits_NGV.shape[2]
    return (entries - perplexity(logits_NGV)) / entries


# %% wrong="diversity" name="wrong_sign" says="Your loss grows with the number of entries in use, so training would empty the codebooks. It is the share that is missing."
def perplexity(logits_NGV):
    p = logits_NGV.softmax(dim=-1).mean(dim=0)
    return (-torch.xlogy(p, p).sum(dim=-1)).exp().sum()


def diversity_loss(logits_NGV):
    return perplexity(logits_NGV) / (logits_NGV.shape[1] * logits_NGV.shape[2])


# %% wrong="diversity" name="xlogy" says="The value is right, but where a share is exactly 0 the gradient of xlogy is 0/0. Clamp the share inside the logarithm instead."
def perplexity(logits_NGV):
    p = logits_NGV.softmax(dim=-1).mean(dim=0)
    return (-torch.xlogy(p, p).sum(dim=-1)).exp().sum()


def diversity_loss(logits_NGV):
    entries = logits_NGV.shape[1] * logits_NGV.shape[2]
    return (entries - perplexity(logits_NGV)) / entries


# %% wrong="diversity" name="zero_times_log" says="0 · log 0 is not a number in floating point, though its limit is 0. Clamp the share inside the logarithm."
def perplexity(logits_NGV):
    p = logits_NGV.softmax(dim=-1).mean(dim=0)
    return (-(p * p.log()).sum(dim=-1)).exp().sum()


def diversity_loss(logits_NGV):
    entries = logits_NGV.shape[1] * logits_NGV.shape[2]
    return (entries - perplexity(logits_NGV)) / entries


# %% wrong="diversity" name="entropy_only" says="That is the entropy, in nats. Its exponential counts entries."
def perplexity(logits_NGV):
    p = logits_NGV.softmax(dim=-1).mean(dim=0)
    return (-torch.xlogy(p, p).sum(dim=-1)).sum()


def diversity_loss(logits_NGV):
    entries = logits_NGV.shape[1] * logits_NGV.shape[2]
    return (entries - perplexity(logits_NGV)) / entries


# %% [markdown]
# Why average first? Each frame may be as sure as it likes; what is rewarded is that *different*
# frames are sure of different entries. In the other order the best answer would be a shrug at every
# frame.
#
# ## 7. A codebook dies, and is saved
#
# Here is pre-training in one module: masked features into the transformer, your quantizer on the
# *unmasked* features, and the loss of week 6, in which each masked frame must recognise its own
# entry among those of ten other masked frames of the same word. A negative that happens to be the
# *same* entry is no wrong answer: its score is set to −∞.


# %%
def tiny_config(**changes):
    """Week 6's sizes, for speech at 8 kHz: 50 frames a second, each hears 31 ms."""
    sizes = {
        "conv_dim": (32, 64, 64, 64),
        "conv_kernel": (10, 4, 4, 3),
        "conv_stride": (5, 4, 4, 2),
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "d_ff": 256,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "mask_time_prob": 0.63,
        "mask_time_length": 5,  # words are short: 100 ms
        "num_negatives": 10,
        "num_codevectors_per_group": 16,
        "codevector_dim": 32,
        "proj_codevector_dim": 32,
        "sampling_rate": 8000,
    }
    return Wav2Vec2Config(**sizes | changes)


# %%
class PreTrainer(nn.Module):
    """wav2vec 2.0 without labels, with your quantizer."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.wav2vec2 = Wav2Vec2(config)
        groups, entries = c.num_codevector_groups, c.num_codevectors_per_group
        self.quantizer = Quantizer(c.conv_dim[-1], groups, entries, c.codevector_dim)
        self.project_hid = nn.Linear(c.d_model, c.proj_codevector_dim)
        self.project_q = nn.Linear(c.codevector_dim, c.proj_codevector_dim)

    def forward(self, waveforms, attention_mask, mask, negatives):
        """Return the scores, the own entry's first, the entries' names and the logits."""
        out = self.wav2vec2(waveforms, attention_mask, mask)
        vectors, names, logits_NGV = self.quantizer(out.features[mask])
        predicted, targets = self.project_hid(out.states[mask]), self.project_q(vectors)
        kappa = self.config.contrastive_logits_temperature
        scores = contrastive_logits(predicted, targets, names[:, None], negatives, kappa)
        return scores, names, logits_NGV


# %%
def draw_mask(model, waveforms, attention_mask):
    """Hide spans of frames, and draw each hidden frame's negatives."""
    c, encoder = model.config, model.wav2vec2.feature_encoder
    lengths, _ = model.wav2vec2.frames_of(waveforms, attention_mask)
    spans = {"mask_prob": c.mask_time_prob, "mask_length": c.mask_time_length}
    mask = sample_spans(lengths, encoder.num_frames(waveforms.shape[1]), **spans)
    return mask, sample_negatives(mask, c.num_negatives)


class Recordings:
    """Standardised waveforms, in batches no longer than their longest word."""

    def __init__(self, utterances):
        rate, self.transcripts = utterances.sampling_rate, utterances.transcripts
        said = [utterances[i].waveform for i in range(len(utterances))]
        self.waveforms, self.real = prepare_waveforms(said, sampling_rate=rate, wanted_rate=rate)

    def __getitem__(self, rows):
        longest = int(self.real[rows].sum(dim=1).max())
        return self.waveforms[rows, :longest].to(device), self.real[rows, :longest].to(device)

    def batches(self, size, seed, among=None):
        """Yield row numbers for ever, each once before any comes again."""
        generator = torch.Generator().manual_seed(seed)
        among = torch.arange(len(self.real)) if among is None else among
        size = min(size, len(among))
        while True:
            order = among[torch.randperm(len(among), generator=generator)].split(size)
            yield from (rows for rows in order if len(rows) == size)


# %%
def pretrain(config, recordings, steps, lr, seed, size=16):
    """Train without labels; return the model and what each step saw."""
    set_seed(seed)
    model, seen = PreTrainer(config).to(device), []
    factor = factor_for(steps, 2.0, 0.5)

    def step(model, rows):
        model.quantizer.temperature = temperature_at(len(seen), 2.0, 0.5, factor)
        waveforms, real = recordings[rows]
        scores, names, logits_NGV = model(waveforms, real, *draw_mask(model, waveforms, real))
        contrast = (scores.logsumexp(dim=1) - scores[:, 0]).mean()
        rival = scores[:, 1:].amax(dim=1)
        right = ((scores[:, 0] > rival) & rival.isfinite()).float().mean()
        others = scores[:, 1:].isfinite().sum(dim=1)
        chance = ((others > 0) / (1 + others)).mean()
        used = F.one_hot(names, config.num_codevectors_per_group**2).sum(dim=0)
        row = contrast, right, chance, perplexity(logits_NGV)
        seen.append((*(x.item() for x in row), used.cpu()))
        return contrast + config.diversity_loss_weight * diversity_loss(logits_NGV)

    fit(
        model,
        recordings.batches(size, seed),
        step,
        steps=steps,
        lr=lr,
        device=device,
        progress=False,
    )
    return model, seen


# %% [markdown]
# > **Predict.** We set the learning rate too high on purpose, 0.01, and train for 30 steps: without
# > the diversity loss, with the paper's weight of 0.1, with a weight of 1. What does the
# > *contrastive loss* look like where the codebooks die? High or low?

# %% tags=["experiment"]
listening = Recordings(unlabelled)
collapse = {}
for weight, lr in ((0.0, 1e-2), (0.1, 1e-2), (1.0, 1e-2), (0.0, 3e-3)):
    for seed in (SEED, SEED + 1):
        config = tiny_config(diversity_loss_weight=weight)
        _, seen = pretrain(config, listening, steps=30, lr=lr, seed=seed, size=8)
        collapse[weight, lr, seed] = seen
        contrast, right, chance, in_use, _ = zip(*seen[-10:])
        print(
            f"weight {weight:3}, rate {lr:5}, seed {seed}: entries in use {sum(in_use) / 10:4.1f} of 32, "
            f"contrastive loss {sum(contrast) / 10:.2f}, recognised {sum(right) / 10:.2f} "
            f"(chance {sum(chance) / 10:.2f})"
        )


# %% tags=["experiment"]
def usage(seen):
    """Each entry's share of the choices at each step: both codebooks below each other, (32, steps)."""
    counts = torch.stack([used for *_, used in seen]).float()
    pairs = (counts / counts.sum(dim=1, keepdim=True)).view(len(seen), 16, 16)
    return torch.cat([pairs.sum(dim=2), pairs.sum(dim=1)], dim=1).T


# %% tags=["experiment", "hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
for axis, (weight, title) in zip(
    axes, ((0.0, "no diversity loss"), (0.1, "weight 0.1"), (1.0, "weight 1"))
):
    shares = usage(collapse[weight, 1e-2, SEED])
    title += f": {collapse[weight, 1e-2, SEED][-1][3]:.0f} of 32 in use"
    image = axis.imshow(shares.sqrt(), aspect="auto", cmap="cividis", vmin=0, vmax=1)
    axis.axhline(15.5, color="white", linewidth=1)
    axis.set(xlabel="step", title=title)
axes[0].set_ylabel("codebook 2          codebook 1")
axes[0].set_yticks([])
bar = figure.colorbar(image, ax=axes, label="share of the choices", ticks=[0, 0.5**0.5, 1])
bar.ax.set_yticklabels(["0", "0.5", "1"])
show(
    figure,
    "usage",
    """Three heat maps of 32 entries over 30 steps. Without diversity loss one bright line per codebook
    remains after some ten steps, with weight 0.1 a few lines, with weight 1 an even texture with
    few dark rows.""",
)

# %% [markdown]
# *What to see.* Every row is an entry, every column a training step. On the left one line per
# codebook survives (or very few, depending on the seed): the others are never chosen again, and
# what is not chosen gets no gradient.
#
# And the contrastive loss? Where both codebooks are stuck, each negative *is* the positive, all
# drop out, and the loss is **exactly 0**. The best loss of the week belongs to a dead model. Watch
# the perplexity, not the loss. Nor trust the accuracy: where few entries are in use, few negatives
# are left, and chance is high.
#
# At this learning rate the paper's weight of 0.1 hardly helps, or comes too late; ten times as much
# does. A lower rate alone (last lines of the table) slows the dying down but does not stop it. Too
# much has a price as well: in the paper's table 13 a weight of
# 0.2 has 8.58 ± 0.45 against 7.97 ± 0.02, and no weight at all 8.48 ± 0.08.
#
# Now for real: the paper's weight, a gentler learning rate, 600 steps, the temperature falling from
# 2 to 0.5.

# %% tags=["experiment"]
pretrained, seen = pretrain(tiny_config(), listening, steps=600, lr=3e-3, seed=SEED, size=12)
_, right, chance, in_use = torch.tensor([row[:4] for row in seen[-30:]]).mean(dim=0).tolist()
print(f"recognised {right:.2f} (chance {chance:.2f}), entries in use {in_use:.1f} of 32")

# %% tags=["experiment", "hide-input"]
figure, (left, middle, picture) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
curves = torch.tensor([row[:4] for row in seen]).T.unfold(1, 15, 1).mean(dim=2)
left.plot(curves[1], color=BLUE, label="recognised")
left.plot(curves[2], ":", color=GREY, label="chance")
middle.plot(curves[3], color=GREEN)
left.set(xlabel="step", ylabel="share of hidden frames", ylim=(0, 0.7))
left.set_title("Hidden entries are found, beyond chance")
left.legend()
middle.axhline(32, linestyle=":", color=GREY)
middle.text(430, 30.3, "all entries of both codebooks", ha="right", color=GREY)
middle.set(xlabel="step", ylabel="perplexity (entries in use)", ylim=(0, 33))
middle.set_title("Much of both codebooks stays in use")
picture.imshow(usage(seen).sqrt(), aspect="auto", cmap="cividis", vmin=0, vmax=0.7)
picture.axhline(15.5, color="white", linewidth=1)
picture.set(
    xlabel="step", ylabel="codebook 2          codebook 1", title="Who is chosen, over time"
)
picture.set_yticks([])
show(
    figure,
    "pretraining",
    """Left: the share of recognised frames rises well above a dotted line of chance. Middle: the perplexity dips and then climbs to more than half of
    32. Right: heat map of the use of 32 entries over 600 steps, most rows lit, some dark.""",
)

# %% [markdown]
# ## 8. Are the entries speech sounds?
#
# Nobody told the model what a phoneme is. But the makers of these recordings know which sound is
# heard when, so we can ask: given an entry (a combination of both codebooks), which phoneme is it?
# The paper draws this picture for TIMIT (figure 3 in appendix D). **Purity** is the share of frames
# that belong to the commonest phoneme of their entry. It needs two yardsticks: shuffled phonemes,
# since small groups look pure by chance, and the same network *untrained*, since frames that sound
# alike fall together anyway.


# %%
@torch.no_grad()
def entries_and_phonemes(model, utterances):
    """Return (entry, phoneme) of each frame whose middle lies in one, and (row, sample) of it."""
    recordings, encoder = Recordings(utterances), model.eval().wav2vec2.feature_encoder
    pairs, places = [], []
    for rows in torch.arange(len(utterances)).split(64):
        features = model.wav2vec2(recordings[rows][0]).features
        names = model.quantizer(features.flatten(0, 1))[1].view(features.shape[:2]).tolist()
        for row, entries in zip(rows.tolist(), names):
            for l, entry in enumerate(entries):
                middle = l * encoder.hop + encoder.receptive_field // 2
                seconds = middle / utterances.sampling_rate
                sounds = [s for s in utterances.phonemes[row] if s.start <= seconds < s.end]
                pairs += [(entry, s.symbol) for s in sounds]
                places += [(row, middle) for _ in sounds]
    return pairs, places


def purity(pairs):
    """Return the share of frames that are of their entry's commonest phoneme."""
    best = {}
    for (entry, _), n in Counter(pairs).items():
        best[entry] = max(best.get(entry, 0), n)
    return sum(best.values()) / len(pairs)


# %% [markdown]
# > **Predict.** The digits have 21 phonemes; the commonest covers about an eighth of the frames.
# > What purity do you expect of the trained entries on voices that the model has never heard? Of
# > the untrained ones?

# %% tags=["experiment"]
untrained = [PreTrainer(tiny_config()).to(device) for _ in range(3)]
for part in (test_words, unheard_words):
    pairs, _ = entries_and_phonemes(pretrained, part)
    entries, symbols = zip(*pairs)
    order = torch.randperm(len(pairs), generator=set_seed(SEED)).tolist()
    shuffled = purity([(e, symbols[i]) for e, i in zip(entries, order)])
    before = mean_and_spread(purity(entries_and_phonemes(m, part)[0]) for m in untrained)
    print(f"{part.name}: {len(pairs):,} frames, {len(set(entries))} entries, purity")
    print(f"  trained {purity(pairs):.3f}, untrained {before}, shuffled {shuffled:.3f}", end=", ")
    print(f"one entry for all {purity([(0, s) for s in symbols]):.3f}")

# %% tags=["experiment", "hide-input"]
pairs, places = entries_and_phonemes(pretrained, test_words)
symbols, sizes = sorted({s for _, s in pairs}), Counter(entry for entry, _ in pairs)
entries, counts = [entry for entry, n in sizes.items() if n >= 10], Counter(pairs)
table = torch.tensor([[counts[e, s] / sizes[e] for e in entries] for s in symbols])
columns = sorted(
    range(len(entries)), key=lambda c: (table[:, c].argmax().item(), -table[:, c].max())
)
figure, axis = plt.subplots(figsize=(11, 5), layout="constrained")
image = axis.imshow(table[:, columns], aspect="auto", cmap="cividis", vmin=0)
axis.set_yticks(range(len(symbols)), symbols, fontsize=7)
axis.set(xlabel=f"{len(entries)} entries with at least ten frames", ylabel="phoneme")
axis.set_title("Entries lean towards a sound; few belong to one")
figure.colorbar(image, ax=axis, label="P(phoneme | entry)")
show(
    figure,
    "phonemes",
    """A heat map of phonemes against codebook entries, columns sorted by their commonest phoneme: a
    dim staircase; most columns are lit in several rows, and about half of the phonemes have hardly
    a column of their own.""",
)

# %% [markdown]
# *What to see.* A staircase, but a dim one: the commonest phoneme has about a third of an entry's
# frames. Neighbouring vowels share entries, a diphthong is two sounds, and a frame hears 31 ms of
# one voice at one pitch. "The codes are phonemes" says too much: they tell *more* of the phoneme
# than an untrained network's, and far less than all of it. Nothing in the loss asks for phonemes;
# it asks what tells one frame of a word from the others.
#
# **Listen.** The purest entries of five phonemes, each with eight frames from eight recordings (a
# tenth of a second around each). Guess the phonemes before you run the second cell.

# %% tags=["experiment"]
from IPython.display import Audio

by_share = sorted(range(len(entries)), key=lambda c: table[:, c].max())
best_of = {table[:, c].argmax().item(): c for c in by_share}  # of each phoneme, the purest entry
purest = sorted(best_of.values(), key=lambda c: -table[:, c].max())[:5]
window, sounds = torch.hann_window(800), []
for column in purest:
    rows = {row: middle for (row, middle), (e, _) in zip(places, pairs) if e == entries[column]}
    for row, middle in itertools.islice(rows.items(), 8):
        piece = F.pad(test_words.waveforms[row], (400, 400))[middle : middle + 800]
        sounds += [piece / piece.abs().max().clamp(min=1e-3) * window, torch.zeros(300)]
    sounds.append(torch.zeros(4000))
Audio(torch.cat(sounds).numpy(), rate=8000)

# %% tags=["experiment"]
for column in purest:
    share, row = table[:, column].max(dim=0)
    print(
        f"entry {entries[column]:3}: {symbols[row]:2} in {share:.0%} of {sizes[entries[column]]} frames"
    )

# %% [markdown]
# ## 9. Letters without an alignment
#
# Now a little labelled speech. The label says *seven*, but not when. CTC lets the model answer at
# each frame with a letter or with **blank**, and reads the answers by merging repeats, then
# dropping blanks: `ss_e_v_eenn` becomes `seven`. Many such *alignments* spell the same text, and
# its probability is their sum:
#
# $$ p(\text{text}) = \sum_{a\,:\,\mathrm{collapse}(a) = \text{text}} \prod_l p_l(a_l) $$
#
# The naive way lists them all. For a text of three letters with a repeat, in five frames, that is
# still possible.


# %%
def collapse_alignment(alignment, blank=0):
    """Merge repeats, then drop blanks."""
    merged = [a for a, _ in itertools.groupby(alignment)]
    return [a for a in merged if a != blank]


def listed_probability(probs_LV, text):
    """Sum over all alignments that spell the text: the naive way, V to the power of L terms."""
    L, V = probs_LV.shape
    spelled = [a for a in itertools.product(range(V), repeat=L) if collapse_alignment(a) == text]
    return sum(math.prod(probs_LV[l, a[l]].item() for l in range(L)) for a in spelled), spelled


# %% tags=["experiment"]
SEE = [1, 2, 2]  # with 0 for blank, 1 for s, 2 for e
probability, spelled = listed_probability(torch.full((5, 3), 1 / 3), SEE)
print(len(spelled), "alignments:", " ".join("".join("_se"[a] for a in row) for row in spelled))
print(f"of 3^5 = {3**5} rows, so with equal probabilities p = {probability:.4f}")
# Without repeats there are C(L + N, 2N) alignments of N letters to L frames.
print(f"seven in 22 frames: {math.comb(22 + 5, 10):,} alignments; ten seconds: hopeless")

# %% [markdown]
# **The better way** sums over prefixes. Write blanks around all letters: `_ s _ e _ e _`, $2N + 1$
# states. Let $\alpha_l(j)$ be the probability of all ways to be in state $j$ at frame $l$. From one
# frame to the next one may **stay** (the letter or blank goes on), **step** to the next state, or
# **skip** a blank, but only from one letter to a *different* one: between two equal letters the
# blank is what keeps them apart.
#
# $$ \alpha_l(j) = \big(\alpha_{l-1}(j) + \alpha_{l-1}(j-1) + [\text{may skip}]\;\alpha_{l-1}(j-2)\big)\; p_l(j) $$
#
# At the first frame only the first blank and the first letter are possible. At the end the text is
# complete in the last letter or in the blank after it. That is $L \cdot (2N+1)$ sums instead of
# $V^L$ (Graves 2006, section 4.1).
#
# By hand for `see` in five frames, counting ways instead of adding probabilities:
#
# | state | frame 1 | 2 | 3 | 4 | 5 |
# |---|---|---|---|---|---|
# | `_` | 1 | 1 | 1 | 1 | 1 |
# | `s` | 1 | 2 | 3 | 4 | 5 |
# | `_` | | 1 | 3 | 6 | 10 |
# | `e` | | 1 (skip) | 4 | 10 | 20 |
# | `_` | | | 1 | 5 | 15 |
# | `e` | | | | 1 (no skip!) | **6** |
# | `_` | | | | | **1** |
#
# Six ways end in the letter and one in the blank: the seven of the list. Divided by $3^5$: the same
# 0.0288.

# %% [markdown] exercise="ctc_nats" difficulty=5 minutes=35 forbids=["mmlearn.ctc.ctc_loss", "mmlearn.wav2vec2.ctc_loss"]
# ### Exercise 6: CTC's forward recursion, in logarithms, for a batch
#
# Write `ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths)`: minus the logarithm of
# each text's probability, a tensor of shape (B,). Blank is 0, and labels are filled up with 0 at
# the end. Every text has a letter and fits.
#
# Products of a hundred probabilities underflow, so add logarithms; sums become `logsumexp`. An
# impossible state has the logarithm −∞, but the gradient of $\ln(0 + 0)$ is not a number: use
# `-1e30` instead.
#
# Padding needs no mask! Probability only flows to the right, from frame to frame and from state to
# state, so what is filled up at the end never flows back. Only read the result at the right place:
# frame `frame_lengths - 1`, states $2N$ and $2N - 1$ of each text.
#
# *Afterwards you can say:* what blank is for, why a repeated letter costs a frame, and what the sum
# costs.
#
# <details><summary>Hint 1: the states</summary>
#
# `states = torch.zeros(B, 2 * N + 1, dtype=torch.long)`, then `states[:, 1::2] = labels`. The
# log-probability of each state at each frame is one `gather` along the last axis. You may skip
# *into* state j if it is no blank and differs from the state at j − 2.
#
# </details>
# <details><summary>Hint 2: one frame</summary>
#
# `F.pad(alpha[:, :-1], (1, 0), value=-1e30)` moves all states by one to the right. Three moved
# copies in a `torch.stack`, one `logsumexp` over them.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
# ```
# states = labels with blanks around, (B, J)
# emit[b, l, j] = log_probs[b, l, states[b, j]]
# alpha = -1e30 everywhere, but emit[:, 0, 0] and emit[:, 0, 1] in the first two states
# for each later frame l:
#     stay = alpha; step = alpha moved by 1; skip = alpha moved by 2, -1e30 where it is not allowed
#     alpha = logsumexp(stay, step, skip) + emit[:, l]
# keep alpha of all frames; take each text's at its last frame
# return minus logsumexp of its states 2 * label_length and 2 * label_length - 1
# ```
#
# </details>


# %% answer="ctc_nats"
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    """Return minus the log-probability of each text, over all its alignments, in nats, (B,)."""
    ### BEGIN SOLUTION
    B, L, _ = log_probs_BLV.shape
    states_BJ = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states_BJ[:, 1::2] = labels_BN
    no_skip_BJ = (states_BJ == 0) | (states_BJ == F.pad(states_BJ[:, :-2], (2, 0)))
    emit_LBJ = log_probs_BLV.gather(2, states_BJ[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha_BJ = F.pad(emit_LBJ[0, :, :2], (0, states_BJ.shape[1] - 2), value=-1e30)
    history = [alpha_BJ]
    for emit_BJ in emit_LBJ[1:]:
        moved = F.pad(alpha_BJ, (2, 0), value=-1e30)
        skip = moved[:, :-2].masked_fill(no_skip_BJ, -1e30)
        alpha_BJ = torch.stack([alpha_BJ, moved[:, 1:-1], skip]).logsumexp(dim=0) + emit_BJ
        history.append(alpha_BJ)
    rows = torch.arange(B, device=labels_BN.device)
    last_BJ = torch.stack(history)[frame_lengths - 1, rows]
    ends = [last_BJ[rows, 2 * label_lengths], last_BJ[rows, 2 * label_lengths - 1]]
    return -torch.stack(ends).logsumexp(dim=0)
    ### END SOLUTION


# %% check="ctc_nats" aspect="example" points=2 title="one letter in two frames, three in five"
import math
import torch
from mmlearn.feedback import expect

two_frames = torch.tensor([[[0.4, 0.6], [0.5, 0.5]]]).log()
expect(
    "w07_quantization/ctc_nats/letter",
    ctc_nats(two_frames, torch.tensor([2]), torch.tensor([[1]]), torch.tensor([1])),
    torch.tensor([-math.log(0.8)]),
    "aa 0.6 · 0.5, a_ 0.6 · 0.5 and _a 0.4 · 0.5 spell a: together 0.8.",
)
expect(
    "w07_quantization/ctc_nats/see",
    ctc_nats(
        torch.full((1, 5, 3), 1 / 3).log(),
        torch.tensor([5]),
        torch.tensor([[1, 2, 2]]),
        torch.tensor([3]),
    ),
    torch.tensor([-math.log(7 / 243)]),
    "Seven of the 243 rows spell see, as in the table above.",
)
expect(
    "w07_quantization/ctc_nats/padded",
    ctc_nats(
        torch.tensor([[[0.4, 0.6], [0.5, 0.5], [0.1, 0.9]], [[0.2, 0.8]] * 3]).log(),
        torch.tensor([2, 3]),
        torch.tensor([[1, 0], [1, 1]]),
        torch.tensor([1, 2]),
    ),
    torch.tensor([-math.log(0.8), -math.log(0.8 * 0.2 * 0.8)]),
    "The first row has two frames and one letter, the rest is padding; the second spells a_a.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(61)
log_probs = torch.randn(6, 17, 9, generator=draw).log_softmax(dim=-1)
labels, lengths = torch.randint(1, 9, (6, 4), generator=draw), torch.tensor([4, 1, 3, 2, 4, 3])
labels[torch.arange(4) >= lengths[:, None]] = 0
labels[0, :4] = torch.tensor([5, 5, 2, 5])
frames = torch.tensor([17, 9, 12, 16, 8, 11])
wanted = torch.nn.functional.ctc_loss(
    log_probs.transpose(0, 1).clone(), labels.clone(), frames, lengths, reduction="none"
)
nats = ctc_nats(log_probs.clone(), frames.clone(), labels.clone(), lengths.clone())
assert nats.shape == (6,) and torch.allclose(nats, wanted, rtol=1e-4, atol=1e-3)
### END HIDDEN TESTS

# %% check="ctc_nats" aspect="law" points=1 title="the texts share the probability, and padding changes nothing"
### BEGIN HIDDEN TESTS
import itertools
import torch

draw = torch.Generator().manual_seed(62)
log_probs = torch.randn(1, 3, 3, generator=draw).log_softmax(dim=-1)
texts = [list(t) for n in (1, 2, 3) for t in itertools.product((1, 2), repeat=n)]
possible = [t for t in texts if len(t) + sum(a == b for a, b in itertools.pairwise(t)) <= 3]
rows = len(possible)
padded = torch.tensor([t + [0] * (3 - len(t)) for t in possible])
letters = torch.tensor([len(t) for t in possible])
all_blank = float(log_probs[0, :, 0].sum().exp())
every = log_probs.repeat(rows, 1, 1)
nats = ctc_nats(every, torch.full((rows,), 3), padded.clone(), letters.clone())
assert abs(float((-nats).exp().sum()) - (1 - all_blank)) < 1e-4
longer = torch.cat([log_probs, torch.randn(1, 4, 3, generator=draw).log_softmax(dim=-1)], dim=1)
wider = torch.cat([padded, torch.zeros(rows, 2, dtype=torch.long)], dim=1)
again = ctc_nats(longer.repeat(rows, 1, 1), torch.full((rows,), 3), wider, letters)
assert torch.allclose(again, nats, atol=1e-4) and nats.std() > 0.01
### END HIDDEN TESTS

# %% check="ctc_nats" aspect="gradient" points=2 title="the gradient equals PyTorch's, and is finite"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(63)
given = torch.randn(3, 12, 6, generator=draw).requires_grad_()
copied = given.detach().clone().requires_grad_()
labels, lengths = torch.tensor([[3, 3, 1], [5, 2, 0], [4, 0, 0]]), torch.tensor([3, 2, 1])
frames = torch.tensor([12, 7, 12])
torch.nn.functional.ctc_loss(
    copied.log_softmax(-1).transpose(0, 1), labels.clone(), frames, lengths, reduction="sum"
).backward()
ctc_nats(given.log_softmax(-1), frames.clone(), labels.clone(), lengths.clone()).sum().backward()
assert torch.isfinite(given.grad).all()
assert copied.grad.abs().max() > 0.1
assert torch.allclose(given.grad, copied.grad, atol=1e-4)
leaf = torch.randn(3, 12, 6, generator=draw).log_softmax(dim=-1).requires_grad_()
ctc_nats(leaf, frames.clone(), labels.clone(), lengths.clone()).sum().backward()
real = torch.arange(12) < frames[:, None]
assert torch.allclose(leaf.grad.sum(dim=-1), -real.float(), atol=1e-4), "each real frame is spent"
### END HIDDEN TESTS

# %% check="ctc_nats" aspect="numbers" points=1 title="300 frames of improbable letters"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(64)
log_probs = (5 * torch.randn(2, 300, 20, generator=draw)).log_softmax(dim=-1)
labels, lengths = torch.tensor([[7, 3, 3, 19], [1, 2, 0, 0]]), torch.tensor([4, 2])
frames = torch.tensor([300, 250])
wanted = torch.nn.functional.ctc_loss(
    log_probs.transpose(0, 1).double(), labels.clone(), frames, lengths, reduction="none"
)
nats = ctc_nats(log_probs.clone(), frames.clone(), labels, lengths.clone())
assert torch.isfinite(nats).all() and torch.allclose(nats.double(), wanted, rtol=1e-3)
### END HIDDEN TESTS


# %% wrong="ctc_nats" name="no_skip" says="You never skip a blank, so every letter would need a blank before it. From one letter to a different one the way is direct."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    B, L, _ = log_probs_BLV.shape
    states = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states[:, 1::2] = labels_BN
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != 0) & (states[:, 2:] != states[:, :-2])
    emit = log_probs_BLV.gather(2, states[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha = F.pad(emit[0, :, :2], (0, states.shape[1] - 2), value=-1e30)
    history = [alpha]
    for emitted in emit[1:]:
        step = F.pad(alpha[:, :-1], (1, 0), value=-1e30)
        alpha = torch.stack([alpha, step]).logsumexp(dim=0) + emitted
        history.append(alpha)
    last = torch.stack(history)[frame_lengths - 1, torch.arange(B)]
    ends = last.gather(1, 2 * label_lengths[:, None] - torch.tensor([0, 1]))
    return -ends.logsumexp(dim=1)


# %% wrong="ctc_nats" name="always_skip" says="You skip the blank between two equal letters, too. Merging would then make one letter of them: skip only to a different letter."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    B, L, _ = log_probs_BLV.shape
    states = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states[:, 1::2] = labels_BN
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = states[:, 2:] != 0
    emit = log_probs_BLV.gather(2, states[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha = F.pad(emit[0, :, :2], (0, states.shape[1] - 2), value=-1e30)
    history = [alpha]
    for emitted in emit[1:]:
        step = F.pad(alpha[:, :-1], (1, 0), value=-1e30)
        skip = F.pad(alpha[:, :-2], (2, 0), value=-1e30).masked_fill(~may_skip, -1e30)
        alpha = torch.stack([alpha, step, skip]).logsumexp(dim=0) + emitted
        history.append(alpha)
    last = torch.stack(history)[frame_lengths - 1, torch.arange(B)]
    ends = last.gather(1, 2 * label_lengths[:, None] - torch.tensor([0, 1]))
    return -ends.logsumexp(dim=1)


# %% wrong="ctc_nats" name="ends_in_letter" says="You end in the last letter only. The blank after it is an end as well: add both."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    B, L, _ = log_probs_BLV.shape
    states = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states[:, 1::2] = labels_BN
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != 0) & (states[:, 2:] != states[:, :-2])
    emit = log_probs_BLV.gather(2, states[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha = F.pad(emit[0, :, :2], (0, states.shape[1] - 2), value=-1e30)
    history = [alpha]
    for emitted in emit[1:]:
        step = F.pad(alpha[:, :-1], (1, 0), value=-1e30)
        skip = F.pad(alpha[:, :-2], (2, 0), value=-1e30).masked_fill(~may_skip, -1e30)
        alpha = torch.stack([alpha, step, skip]).logsumexp(dim=0) + emitted
        history.append(alpha)
    last = torch.stack(history)[frame_lengths - 1, torch.arange(B)]
    ends = last.gather(1, 2 * label_lengths[:, None] - 1)
    return -ends.logsumexp(dim=1)


# %% wrong="ctc_nats" name="starts_in_blank" says="You start in the first blank only. The first frame may be the first letter already."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    B, L, _ = log_probs_BLV.shape
    states = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states[:, 1::2] = labels_BN
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != 0) & (states[:, 2:] != states[:, :-2])
    emit = log_probs_BLV.gather(2, states[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha = F.pad(emit[0, :, :1], (0, states.shape[1] - 1), value=-1e30)
    history = [alpha]
    for emitted in emit[1:]:
        step = F.pad(alpha[:, :-1], (1, 0), value=-1e30)
        skip = F.pad(alpha[:, :-2], (2, 0), value=-1e30).masked_fill(~may_skip, -1e30)
        alpha = torch.stack([alpha, step, skip]).logsumexp(dim=0) + emitted
        history.append(alpha)
    last = torch.stack(history)[frame_lengths - 1, torch.arange(B)]
    ends = last.gather(1, 2 * label_lengths[:, None] - torch.tensor([0, 1]))
    return -ends.logsumexp(dim=1)


# %% wrong="ctc_nats" name="best_path" says="You kept the best alignment only. A text's probability is the sum over all of them: logsumexp, not max."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    B, L, _ = log_probs_BLV.shape
    states = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states[:, 1::2] = labels_BN
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != 0) & (states[:, 2:] != states[:, :-2])
    emit = log_probs_BLV.gather(2, states[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha = F.pad(emit[0, :, :2], (0, states.shape[1] - 2), value=-1e30)
    history = [alpha]
    for emitted in emit[1:]:
        step = F.pad(alpha[:, :-1], (1, 0), value=-1e30)
        skip = F.pad(alpha[:, :-2], (2, 0), value=-1e30).masked_fill(~may_skip, -1e30)
        alpha = torch.stack([alpha, step, skip]).amax(dim=0) + emitted
        history.append(alpha)
    last = torch.stack(history)[frame_lengths - 1, torch.arange(B)]
    ends = last.gather(1, 2 * label_lengths[:, None] - torch.tensor([0, 1]))
    return -ends.logsumexp(dim=1)


# %% wrong="ctc_nats" name="last_frame" says="You read the result at the last frame of the batch, which is padding for shorter recordings: take frame_lengths - 1."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    B, L, _ = log_probs_BLV.shape
    states = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states[:, 1::2] = labels_BN
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != 0) & (states[:, 2:] != states[:, :-2])
    emit = log_probs_BLV.gather(2, states[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha = F.pad(emit[0, :, :2], (0, states.shape[1] - 2), value=-1e30)
    history = [alpha]
    for emitted in emit[1:]:
        step = F.pad(alpha[:, :-1], (1, 0), value=-1e30)
        skip = F.pad(alpha[:, :-2], (2, 0), value=-1e30).masked_fill(~may_skip, -1e30)
        alpha = torch.stack([alpha, step, skip]).logsumexp(dim=0) + emitted
        history.append(alpha)
    last = history[-1]
    ends = last.gather(1, 2 * label_lengths[:, None] - torch.tensor([0, 1]))
    return -ends.logsumexp(dim=1)


# %% wrong="ctc_nats" name="minus_infinity" says="With minus infinity the loss is right, but the gradient of logsumexp over nothing but minus infinities is not a number. Use -1e30."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    B, L, _ = log_probs_BLV.shape
    states = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states[:, 1::2] = labels_BN
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != 0) & (states[:, 2:] != states[:, :-2])
    emit = log_probs_BLV.gather(2, states[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha = F.pad(emit[0, :, :2], (0, states.shape[1] - 2), value=-torch.inf)
    history = [alpha]
    for emitted in emit[1:]:
        step = F.pad(alpha[:, :-1], (1, 0), value=-torch.inf)
        skip = F.pad(alpha[:, :-2], (2, 0), value=-torch.inf).masked_fill(~may_skip, -torch.inf)
        alpha = torch.stack([alpha, step, skip]).logsumexp(dim=0) + emitted
        history.append(alpha)
    last = torch.stack(history)[frame_lengths - 1, torch.arange(B)]
    ends = last.gather(1, 2 * label_lengths[:, None] - torch.tensor([0, 1]))
    return -ends.logsumexp(dim=1)


# %% wrong="ctc_nats" name="pytorchs_own" says="That is PyTorch's loss; the exercise is the recursion. And its gradient by the log-probabilities has the softmax's mixed in, so it is no alignment."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    log_probs_LBV = log_probs_BLV.transpose(0, 1)
    return F.ctc_loss(log_probs_LBV, labels_BN, frame_lengths, label_lengths, reduction="none")


# %% wrong="ctc_nats" name="probabilities" says="You multiply probabilities, which underflow to 0 after a hundred frames or so. Add logarithms."
def ctc_nats(log_probs_BLV, frame_lengths, labels_BN, label_lengths):
    B, L, _ = log_probs_BLV.shape
    states = labels_BN.new_zeros(B, 2 * labels_BN.shape[1] + 1)
    states[:, 1::2] = labels_BN
    may_skip = torch.zeros(states.shape)
    may_skip[:, 2:] = (states[:, 2:] != 0) & (states[:, 2:] != states[:, :-2])
    emit = log_probs_BLV.exp().gather(2, states[:, None].expand(-1, L, -1)).transpose(0, 1)
    alpha = F.pad(emit[0, :, :2], (0, states.shape[1] - 2))
    history = [alpha]
    for emitted in emit[1:]:
        skip = may_skip * F.pad(alpha[:, :-2], (2, 0))
        alpha = (alpha + F.pad(alpha[:, :-1], (1, 0)) + skip) * emitted
        history.append(alpha)
    last = torch.stack(history)[frame_lengths - 1, torch.arange(B)]
    return -last.gather(1, 2 * label_lengths[:, None] - torch.tensor([0, 1])).sum(dim=1).log()


# %% [markdown]
# Does it agree with PyTorch's own, and with the list? And what does its *gradient* say? The
# derivative of $-\ln p(\text{text})$ by $\ln p_l(v)$ is minus the probability that frame $l$ is
# spent on $v$, *given the text*. That is an alignment, soft and for free.

# %% tags=["experiment"]
draw = set_seed(SEED)
log_probs = torch.randn(2, 22, 8, generator=draw).log_softmax(dim=-1).requires_grad_()
labels, lengths = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 7, 0, 0]]), torch.tensor([5, 3])
mine = ctc_nats(log_probs, torch.tensor([22, 16]), labels, lengths)
frames = torch.tensor([22, 16])
theirs = F.ctc_loss(log_probs.transpose(0, 1), labels, frames, lengths, reduction="none")
print("yours", *(f"{n:.4f}" for n in mine), "  PyTorch's", *(f"{n:.4f}" for n in theirs))
see = ctc_nats(
    torch.full((1, 5, 3), 1 / 3).log(), torch.tensor([5]), torch.tensor([SEE]), torch.tensor([3])
)
print(f"see: {(-see).exp().item():.4f}, listed {probability:.4f}")
even = torch.full((1, 22, 18), 1 / 18).log().requires_grad_()
word = torch.tensor([[1, 2, 3, 2, 4]])  # five letters, such as seven
(gradient,) = torch.autograd.grad(
    ctc_nats(even, torch.tensor([22]), word, torch.tensor([5])).sum(), even
)
print(f"at equal probabilities, frames spent on blank: {-gradient[0, :, 0].mean().item():.2f}")

# %% [markdown]
# The last line explains what everybody sees who trains CTC for the first time. When the model knows
# nothing, some four tenths of every frame are owed to the blank, and the rest is split among the
# letters, each at other frames. So the first thing it learns is **blank, always**. Greedy decoding
# then reads nothing at all: every word is an error.
#
# ## 10. A few labelled seconds
#
# As in the paper (section 4.3): a linear layer on top of the transformer, and CTC, with your
# `ctc_nats`. Unlike it: the paper freezes the convolutions, trains only the new layer for the first
# 10,000 updates, and hides spans of frames and channels in fine-tuning, too. Ours learns as a whole;
# fourteen minutes of sound make no convolutions that are worth freezing. The other model begins
# *from scratch* and learns at the same rate, for as many steps. The task: write down the spoken
# digit, letter by letter.

# %%
LETTERS = ["-", *sorted(set("".join(speech.DIGITS)))]  # number 0 is the blank


def spelled_out(words):
    """Return the letters' numbers, filled up with 0, and how many there are."""
    rows = [torch.tensor([LETTERS.index(letter) for letter in word]) for word in words]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths.to(device)


@torch.no_grad()
def write_down(model, recordings):
    """Decode greedily: the likeliest answer of each frame, merged, without blanks."""
    texts = []
    for rows in torch.arange(len(recordings.real)).split(64):
        out = model.eval()(*recordings[rows])
        texts += greedy_decode(out.logits, out.frame_lengths)
    return ["".join(LETTERS[letter] for letter in text) for text in texts]


def error_rates(model, recordings):
    """Return the errors per word, and per letter."""
    said, written = recordings.transcripts, write_down(model, recordings)
    return word_error_rate(said, written), character_error_rate(said, written)


# %%
def fine_tune(start, recordings, among, steps, seed, blank_bias=-2.0, config=None):
    """Learn letters from some labelled words; return the model and the share of blanks at each step."""
    set_seed(seed)
    config = config or tiny_config(vocab_size=len(LETTERS))
    model = Wav2Vec2ForCTC(config, copy.deepcopy(start)).to(device)
    nn.init.normal_(model.lm_head.weight, std=0.2)
    model.lm_head.bias.data[0] = blank_bias
    blanks = []

    def step(model, rows):
        waveforms, real = recordings[rows]
        labels, lengths = spelled_out([recordings.transcripts[i] for i in rows.tolist()])
        out = model(waveforms, real)
        blanks.append((out.logits.argmax(dim=-1) == 0).float().mean().item())
        nats = ctc_nats(out.logits.log_softmax(dim=-1), out.frame_lengths, labels, lengths)
        return (nats / lengths).mean()

    batches = recordings.batches(8, seed, among)
    fit(model, batches, step, steps=steps, lr=8e-3, device=device, progress=False)
    return model, blanks


# %% [markdown]
# > **Predict.** Whoever always writes the same digit has 0.9 errors a word. Pre-training heard 14
# > minutes without labels: what is it worth with 60 labelled words, half a minute of speech, and what
# > with 240?

# %% tags=["experiment"]
labelled, known, unheard = (Recordings(part) for part in (train_words, test_words, unheard_words))
BUDGETS = (60, 240)  # labelled words
STARTS = ("from scratch", "pre-trained")
results, blank_shares, tuned = [], {}, {}
for words in BUDGETS:
    for name in STARTS:
        start = None if name == STARTS[0] else pretrained.wav2vec2
        for seed in (SEED, SEED + 1):
            chosen = torch.randperm(len(train_words), generator=torch.Generator().manual_seed(seed))
            among = chosen[:words]
            model, blanks = fine_tune(start, labelled, among, 260, seed)
            seconds = train_words.lengths[among].sum().item() / 8000
            errors = [rate for part in (known, unheard) for rate in error_rates(model, part)]
            results.append((name, words, seconds, *errors))
            blank_shares[name, words], tuned[name, words] = blanks, model

# %% tags=["experiment"]
columns = {"word errors, known voices": 3, "letter errors, known voices": 4}
columns |= {"word errors, unheard voices": 5, "letter errors, unheard voices": 6}
for title, column in columns.items():
    print(title)
    for words in BUDGETS:
        pair = [[r[column] for r in results if r[:2] == (name, words)] for name in STARTS]
        gain = mean_and_spread(a - b for a, b in zip(*pair))  # the same words were labelled
        scratch, tuned_rate = map(mean_and_spread, pair)
        print(f"  {words:4} words: from scratch {scratch}, pre-trained {tuned_rate}, gain {gain}")

# %% tags=["experiment", "hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
for axis, shift, title in zip(axes, (0, 2), ("Known voices", "Five voices never heard")):
    for name, colour in zip(STARTS, (ORANGE, BLUE)):
        rows = [row for row in results if row[0] == name]
        for column, style, what in ((3, "-", "words"), (4, "--", "letters")):
            axis.plot([r[2] for r in rows], [r[column + shift] for r in rows], ".", color=colour)
            points = [[r for r in rows if r[1] == words] for words in BUDGETS]
            x, y = ([sum(r[c] for r in p) / len(p) for p in points] for c in (2, column + shift))
            axis.plot(x, y, style, color=colour, label=f"{name}, {what}")
    axis.set(xscale="log", xlabel="labelled speech (seconds)", title=title, ylim=(0, 1.05))
    axis.axhline(0.9, color=GREY, linestyle=":")
    ticks = sorted({round(row[2]) for row in results[:: len(results) // 2]})
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
axes[0].set_ylabel("error rate")
figure.suptitle("More labels help most; pre-training helps where they are few, if at all")
axes[0].legend(fontsize=8)
show(
    figure,
    "labels",
    """Error rates per word and per letter against seconds of labelled speech, for known and for
    unheard voices, dots for seeds. A dotted line at 0.9 marks always writing the same digit. All
    fall steeply with more labels. The pre-trained model is ahead with few; with many the dots of
    both overlap.""",
)

# %% tags=["experiment"]
model = tuned["pre-trained", 240]
written = write_down(model, unheard)
for word, text in itertools.islice(zip(unheard.transcripts, written), 12):
    print(f"{word} → {text or '(nothing)'}", end=";  ")

# %% [markdown]
# *What to see.* Four times the labels take away a third to a half of the word errors: that is the
# largest effect here. With 60 words the model from scratch does hardly better than always writing the same digit,
# and the pre-trained one is ahead, by about a tenth; with 240 words nothing is left of that. The
# direction is the paper's: the fewer the labels, the more pre-training is worth. The size is not, and
# the gain is no larger than the spread of two seeds, each with its own labelled words; one
# pre-training stands behind them all. **This is not the paper's miracle, and should not be sold as
# one.** Fourteen minutes of 23 synthetic voices, heard for 600 steps, are little to learn from.
#
# Look at the words, too. Some errors are spellings, as in the paper's table 11 (`will` → `wil`,
# `could` → `coud`); others are simply not heard. People are harder: `python tests/real/speech.py`
# leaves one person out of the Free Spoken Digit Dataset at a time.


# %% tags=["experiment"]
word = unheard.transcripts.index("seven")
waveforms, real = unheard[torch.tensor([word])]
labels, lengths = spelled_out(["seven"])
out = tuned["pre-trained", 240].eval()(waveforms, real)
log_probs = out.logits.log_softmax(dim=-1).detach().requires_grad_()
nats = ctc_nats(log_probs, out.frame_lengths, labels, lengths).sum()
spent = -torch.autograd.grad(nats, log_probs)[0][0]  # each frame's share for each letter

# %% tags=["experiment", "hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for name, colour in zip(STARTS, (ORANGE, BLUE)):
    share = torch.tensor(blank_shares[name, 60]).unfold(0, 5, 1).mean(dim=1)
    left.plot(share, color=colour, label=f"{name}, 60 words")
left.set(xlabel="step of fine-tuning", ylabel="frames that answer blank", ylim=(0, 1.02))
left.set_title("First the model learns to say nothing")
left.legend(loc="lower right")
rows = [0, *(LETTERS.index(letter) for letter in "sevn")]
image = right.imshow(spent[:, rows].T, aspect="auto", cmap="cividis", vmin=0, vmax=1)
for sound in unheard_words.phonemes[word]:
    middle = (sound.start + sound.end) / 2
    right.axvline(sound.start * 50 - 0.7, color="white", linewidth=0.8, linestyle=":")
    right.text(middle * 50 - 0.7, -0.62, sound.symbol, ha="center", fontsize=8)
right.set_yticks(range(5), ["blank", *"sevn"])
right.set(xlabel="frame (20 ms)", ylabel="letter")
right.set_title("The order is right, the time only about right", pad=14)
figure.colorbar(image, ax=right, label="share of the frame")
show(
    figure,
    "alignment",
    """Left: the share of frames that answer blank rises from 0 to almost 1 in the first steps of
    fine-tuning, and falls slowly afterwards. Right: for the word seven, which letter each frame
    is spent on, with the true phonemes above: the letters stand in order, in narrow peaks, some of them
    away from their sound; blank fills the rest.""",
)

# %% [markdown]
# *What to see.* Left: both models first learn to answer blank, although it begins rare here (a bias
# of −2). If your CTC model prints empty strings early on, that is the normal course. Right: the
# alignment in the gradient. The letters stand in the right *order*, in narrow peaks with blank
# between. Their *time* is only about right: CTC rewards the order alone, and a transformer sees the
# whole word, so a letter may be
# written a sound too early or too late. That CTC gives time stamps is often said,
# and often wrong by more than you would like.
#
# ## 11. Is this wav2vec 2.0?
#
# Your quantizer, copied into `mmlearn`'s pre-training model and from there into that of the
# `transformers` library, must give the same targets, and your CTC the same loss.

# %% tags=["experiment"]
from mmlearn.ctc import ctc_loss as reference_ctc
from mmlearn.quantization import perplexity as reference_perplexity
from mmlearn.wav2vec2 import Wav2Vec2ForPreTraining

ours, learned = Wav2Vec2ForPreTraining(tiny_config()).eval(), pretrained.cpu().eval()
for part in ("wav2vec2", "project_hid", "project_q"):
    getattr(ours, part).load_state_dict(getattr(learned, part).state_dict())
ours.quantizer.weight_proj.load_state_dict(learned.quantizer.to_logits.state_dict())
ours.quantizer.codevectors.data.copy_(learned.quantizer.codebooks.data)
hf_model = ours.to_hf().eval()

# %% tags=["experiment"]
waveforms, real = (x.cpu() for x in listening[torch.arange(6)])
with torch.no_grad():
    mask, negatives = draw_mask(learned, waveforms, real)
    scores, names, logits_NGV = learned(waveforms, real, mask, negatives)
    out = ours(waveforms, real, mask, negatives)
    hf = hf_model(waveforms, real.long(), mask_time_indices=mask)
    vectors, _, _ = learned.quantizer(
        learned.wav2vec2(waveforms, real, mask).features.flatten(0, 1)
    )
    targets = learned.project_q(vectors).view_as(hf.projected_quantized_states)
contrast = (scores.logsumexp(dim=1) - scores[:, 0]).mean()
print(f"contrastive loss: yours {contrast:.5f}, mmlearn's {out.contrastive_loss:.5f}")
print(
    f"perplexity: yours {perplexity(logits_NGV):.4f}, mmlearn's {reference_perplexity(logits_NGV.softmax(-1)):.4f}"
)
apart = (targets - hf.projected_quantized_states)[real[:, ::160][:, : targets.shape[1]]].abs().max()
print(f"targets: transformers' differ by at most {apart:.1e}")

# %% tags=["experiment"]
labels, lengths = spelled_out(labelled.transcripts[:6])
waveforms, real = labelled[torch.arange(6)]
with torch.no_grad():
    out = tuned["pre-trained", 240](waveforms, real)
    nats = ctc_nats(out.logits.log_softmax(dim=-1), out.frame_lengths, labels, lengths)
    reference = reference_ctc(out.logits, out.frame_lengths, labels)
print(f"CTC per letter: yours {(nats / lengths).mean():.5f}, mmlearn's {reference:.5f}")

# %% [markdown]
# ## Questions to answer in your own words
#
# These two are read by a person. A few sentences each.

# %% [markdown] written="why_biased" points=2
# **The straight-through gradient is biased on the contrastive loss at every temperature, yet
# wav2vec 2.0 trains well with it. Where does the bias come from, and why is it a good bargain all
# the same?**
#
# ### BEGIN SOLUTION
# Forward a one-hot choice is used, backward the derivative of a softmax. At low temperature all
# gradient comes from near ties of two entries, and there the loss's slope is taken at the two ends
# instead of along the way between them, which is the trapezium rule: exact for straight lines and
# parabolas only, and the contrastive loss is neither. The bargain: at temperatures of 0.5 and more
# its variance is below that of REINFORCE, even with a baseline, since it uses the slope of the loss
# and not only its value; its direction is mostly right; and the forward pass uses true entries, so
# the targets in training are those of later.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: slope of the loss at the hard choice, but path of the soft one (the trapezium, or an
#   equivalent argument that two different functions are used forward and backward).
# - 1 point: bias against variance, with REINFORCE or a number from the figure; or the use of true
#   entries forward.
# ### END MARK SCHEME

# %% [markdown] written="which_number" points=2
# **A colleague reports: "The contrastive loss of our pre-training fell to 0.01 overnight, and
# accuracy is high." Which two numbers do you ask for, what do you fear, and what would you
# change?**
#
# ### BEGIN SOLUTION
# Ask for the perplexity of each codebook (or a count of entries in use) and for the result of
# fine-tuning or a probe on few labels. The fear is a collapsed codebook: if all masked frames share
# few entries, negatives equal to the positive drop out, and the game becomes trivial or empty; with
# one entry per codebook the loss is exactly 0. Remedies: a larger diversity weight, a lower
# learning rate, a higher temperature for longer, a fresh start, since dead entries get no gradient
# from the contrastive loss.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: perplexity or usage, with the reason why a dead codebook has a low loss.
# - 1 point: one workable remedy with its reason.
# ### END MARK SCHEME

# %% [markdown]
# ## Go bigger
#
# With `SCALE = "gpu"` this cell pre-trains a model of 4 layers and width 256, with two codebooks of
# 64 entries, on 20,000 varied copies of the words, and fine-tunes it on few labels. With `DATA =
# "hub"` the labels and the test are people: the Free Spoken Digit Dataset.


# %% tags=["experiment"]
def go_bigger(listen, train_part, test_part, steps, tune_steps, budgets, width=256, layers=4):
    """Pre-train a larger model, fine-tune it on few labels; print the error rates beside scratch."""
    sizes = {
        "d_model": width,
        "num_layers": layers,
        "d_ff": 4 * width,
        "conv_dim": (width // 2,) * 4,
    }
    more = {"num_codevectors_per_group": 64, "codevector_dim": width, "proj_codevector_dim": width}
    config = tiny_config(**sizes, **more, vocab_size=len(LETTERS), num_negatives=50)
    model, seen = pretrain(config, Recordings(listen), steps, lr=1e-3, seed=SEED, size=32)
    print(f"entries in use: {seen[-1][3]:.0f} of 128, recognised {seen[-1][1]:.2f}")
    part, test = Recordings(train_part), Recordings(test_part)
    for words in budgets:
        chosen = torch.randperm(len(train_part), generator=torch.Generator().manual_seed(SEED))
        for name, start in (("from scratch", None), ("pre-trained", model.wav2vec2)):
            among = chosen[:words]
            tuned_model, _ = fine_tune(start, part, among, tune_steps, SEED, config=config)
            print(
                f"{words} labelled words, {name}: word errors {error_rates(tuned_model, test)[0]:.3f}"
            )


# %% tags=["experiment"]
if SCALE == "gpu":
    many = speech.load("train", words="both", size=20_000, sampling_rate=8000, seed=SEED)
    train_part, test_part = train_words, unheard_words
    if DATA == "hub":
        train_part, test_part = (
            speech.load(split, source="hub", sampling_rate=8000) for split in ("train", "test")
        )
    go_bigger(many, train_part, test_part, 6_000, 1_500, budgets=(40, 120, 400, 1_000))
else:
    print("SCALE is 'cpu': set it to 'gpu' in the first cells to run this part.")

# %% [markdown]
# ## What was new
#
# | idea | in one line | where it stands in `mmlearn` |
# |---|---|---|
# | Gumbel-max | argmax of logits plus $-\ln(-\ln u)$ is a draw from their softmax | `quantization.GumbelQuantizer` |
# | straight-through | hard forward, soft backward; biased at any τ, but quiet | the same, in training |
# | cooling | $\max(\tau_\text{start} d^s, \tau_\text{end})$; fit $d$ to your run | `quantization.gumbel_temperature` |
# | product quantization | $G$ lists of $V$ entries make $V^G$ sounds | `GumbelQuantizer.codevectors` |
# | perplexity | $e^{\text{entropy}}$ counts the entries in use | `quantization.perplexity` |
# | collapse | a dead codebook has a contrastive loss of 0 | `wav2vec2.contrastive_logits` |
# | CTC | sum over all alignments, in $L(2N+1)$ steps | `ctc.ctc_loss` |
# | all blank | what CTC learns first | `ctc.greedy_decode` |
#
# **Beside the paper.** Table 1 of Baevski 2020: ten minutes of labels, 53,200 hours without, the
# large model and a transformer language model: 4.8% word errors on test-clean, 8.2% on test-other.
# Without the language model (table 9) it is 40.2 and 38.7%: most of the famous number is the
# language model's: CTC answers each frame independently of the other answers, which makes spelling
# hard to learn from ten minutes. (Section 5.1's text says 5.2/8.6, the abstract of the first
# version 5.7/10.1; the table of the last version says 4.8/8.2.) Ours decodes without a language
# model too. The paper's unlabelled pool is 300,000 times its ten labelled minutes, heard for
# 600,000 updates; ours is thirty times the smaller labelled part, heard for 600, and the gain is as
# small as that sounds. In the paper's appendix D the entries' picture is drawn from 102,400
# possible sounds over hours of TIMIT; ours from 256 over two minutes.

# %% [markdown]
# ## Interview questions
#
# <details><summary><b>Why does wav2vec 2.0 need Gumbel-softmax? What would happen without?</b></summary>
#
# The targets are entries of learned codebooks. Choosing is an argmax, whose gradient is 0, so
# neither the encoder nor the entries' logits would learn. Gumbel noise makes the argmax a draw from
# the softmax; a softmax of the same noisy logits at temperature τ lends it a gradient
# (straight-through). G = 2 codebooks of V = 320 give 102,400 combinations; τ falls from 2 to 0.5
# (base) or 0.1 (large) by 0.999995 an update (section 4.2). In the ablation (table 13, WER, three
# seeds of fine-tuning) the baseline has 7.97 ± 0.02; without Gumbel noise 8.73 ± 0.42; with
# continuous targets 8.58 ± 0.08; without diversity loss 8.48 ± 0.08; without the quantizer's
# gradient to the encoder 8.41 ± 0.08. After pre-training the quantizer is thrown away: fine-tuning
# and recognition never see it.
#
# *Often said wrongly:* that it cannot work without. Continuous targets work, 0.6 points worse. And
# that the *input* of the transformer is quantized: it is not; that costs 4 points (table 4).
#
# </details>
# <details><summary><b>Is the straight-through Gumbel-softmax unbiased as the temperature goes to zero?</b></summary>
#
# No, not in general. The soft Gumbel-softmax estimate is: near ties it integrates the loss's slope
# from one entry to the other. The straight-through one takes the slope at the two ends only, the
# trapezium rule, so its bias vanishes for linear and quadratic losses and stays for others; on a
# contrastive loss we measured a median error of about half the true gradient over eight problems.
# Lower temperatures do raise the variance, like 1/τ. Hence the compromise between 2 and 0.5.
#
# *Often said wrongly:* "annealing removes the bias". Annealing makes the soft sample like the hard
# one; the slope is still taken at the hard one.
#
# </details>
# <details><summary><b>Why Gumbel-softmax and not k-means or the nearest entry, as in VQ-VAE?</b></summary>
#
# All work. vq-wav2vec, the predecessor, tried Gumbel-softmax and a nearest-entry codebook with a
# straight-through gradient, side by side (Baevski 2020b, section 3). HuBERT clusters features
# offline by k-means and predicts the cluster: no gradient through a choice at all, and no codebook
# that can collapse in training, at the price of several rounds (Hsu 2021). What Gumbel-softmax
# offers is one end-to-end training in which the targets improve with the encoder; what it asks for
# is a temperature, a diversity loss, and an eye on the perplexity.
#
# *Often said wrongly:* that a collapse shows in the loss. It does: as a *low* loss.
#
# </details>
# <details><summary><b>Your fine-tuned model prints empty strings. Explain, with CTC, and say what you check.</b></summary>
#
# Every text has more room for blanks than for any letter: with N letters, N + 1 of 2N + 1 states
# are blank, and at equal probabilities about four tenths of each frame's posterior goes there (five
# letters in 22 frames). So the loss first falls by answering blank everywhere, and greedy decoding
# gives nothing: error rate 1.0. Wait some hundred updates first. Then look at the learning rate,
# and check that texts fit their frames (a repeated letter needs a blank, so one frame more) and
# that blank is the same index in loss and decoder (0, the pad token, in transformers). wav2vec 2.0
# trains only the head for the first 10,000 updates (section 4.3).
#
# *Often said wrongly:* that the blank is silence. It is "no new letter", in the middle of a vowel
# as well.
#
# </details>

# %% [markdown]
# ## Papers
#
# - Baevski, Zhou, Mohamed, Auli 2020, [wav2vec 2.0](https://arxiv.org/abs/2006.11477): sections 2
#   (quantization), 3.2 (both losses), 4.2 and 4.3 (settings), 5.1, 5.4, tables 1, 4, 9, 13,
#   appendix D.
# - Jang, Gu, Poole 2017, [Categorical Reparameterization with
#   Gumbel-Softmax](https://arxiv.org/abs/1611.01144): sections 2, 2.1 (temperature), 2.2
#   (straight-through), 3.2 (REINFORCE).
# - Maddison, Mnih, Teh 2017, [The Concrete Distribution](https://arxiv.org/abs/1611.00712): the
#   same idea, found independently.
# - Bengio, Léonard, Courville 2013, [Estimating or Propagating Gradients Through Stochastic
#   Neurons](https://arxiv.org/abs/1308.3432): where straight-through comes from.
# - Liu et al. 2023, [Bridging Discrete and Backpropagation: Straight-Through and
#   Beyond](https://arxiv.org/abs/2304.08612): its error, and a better rule.
# - Baevski, Schneider, Auli 2020b, [vq-wav2vec](https://arxiv.org/abs/1910.05453): the quantizer
#   before wav2vec 2.0.
# - Hsu et al. 2021, [HuBERT](https://arxiv.org/abs/2106.07447): targets from offline clusters.
# - Graves et al. 2006, [Connectionist Temporal
#   Classification](https://doi.org/10.1145/1143844.1143891): section 3 (blank, decoding), 4.1 (the
#   recursion).
