# %% [markdown]
# # Week 2. How do text, images and sound become tokens?
#
# A transformer reads one row of vectors. A sentence is not a row of vectors, a photograph is not, a
# voice is not. Something must cut each of them into pieces and turn every piece into a vector of
# the same width. That something decides what the model can ever know: **what is thrown away here,
# no layer brings back**.
#
# **You will build** the three tokenizers that most multimodal models use, from nothing: byte-pair
# encoding for text, patches for pictures, the log-mel spectrogram for sound. Then you put all three
# into one sequence, for one encoder. **You will measure** what each of them loses: length,
# nearness, phase. And you will prove that yours give the numbers of `transformers`, `torch` and
# `torchaudio`.
#
# Two hours; about a minute of computing on a laptop's processor.

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"
SCALE = "cpu"
DATA = "embedded"

# %%
import math
from collections import Counter
from itertools import pairwise

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from mmlearn.audio import MelConfig, griffin_lim, hertz_to_mel, mel_to_hertz, resample
from mmlearn.data import digits, speech
from mmlearn.metrics import mean_and_spread
from mmlearn.text import FIRST_TOKENS, spell, split_words
from mmlearn.train import choose_device, fit, set_seed
from mmlearn.transformer import Encoder
from mmlearn.vision import ConvStem

torch.set_num_threads(1)  # models this small are faster on one thread than on two
device = choose_device(DEVICE)

# %% tags=["experiment"]
import matplotlib.pyplot as plt
from mmlearn.figures import BLUE, GREEN, GREY, ORANGE, set_style, show

set_style()
train_digits, test_digits = (digits.load(part, source=DATA) for part in ("train", "test"))
RATE = 8_000  # samples a second: enough for words, half of what speech models take
train_sounds, test_sounds = (
    speech.load(part, source=DATA, sampling_rate=RATE) for part in ("train", "test")
)
for dataset in (train_digits, train_sounds):
    print(dataset.describe())

# %% [markdown]
# ## 1. Why not one token for each letter, pixel and sample?
#
# That is the naive way, and nothing would be lost. Its limit is week 1's: every token looks at
# every other, so $L$ tokens have $L^2$ scores.
#
# > **Predict.** Ten seconds of sound are 160,000 samples. How much memory do the scores of *one*
# > attention head take, in float32?

# %% tags=["experiment"]
rows = [
    ("a caption of 60 letters", 60, 15, "word pieces of 4 letters"),
    ("a photograph, 224 × 224 pixels", 224 * 224, 14 * 14, "patches of 16 × 16"),
    ("ten seconds at 16,000 Hz", 160_000, 500, "frames, 50 a second"),
]
for what, naive, cut, pieces in rows:
    memory = [f"{4 * tokens**2 / 2**20:12,.3f} MiB" for tokens in (naive, cut)]
    print(f"{what:32}{naive:8,} tokens, {memory[0]}  →  {cut:4} {pieces}, {memory[1]}")

# %% [markdown]
# 95 GiB, for one head of one layer. So signals are cut into pieces that are longer where neighbours
# repeat each other. The three signals repeat themselves differently: letters in *frequent
# combinations*, pixels in *small squares*, sound as *oscillation*. Hence three tokenizers.

# %% [markdown]
# ## 2. Text: merge what stands together
#
# One token a letter makes long rows. One token a word makes a vocabulary without end, and a word
# that was never seen has none. **Byte-pair encoding** learns what lies between. Start from the
# bytes of each word; join the most frequent pair of neighbours into a new symbol; repeat.
#
# Why the *most frequent* pair? Joining $(a, b)$ turns two symbols into one wherever they meet. If
# they meet $n$ times in the corpus, it becomes $n$ symbols shorter. (Only where a pair overlaps
# itself, as in *aaa*, fewer: there the count promises too much.) So, such pairs aside, each step
# takes the merge that shortens the corpus most: it is compression, one greedy step at a time.
# (Greedy, hence not always the best set of merges.) Known words need few tokens, rare ones fall
# back to pieces, at worst to single bytes; nothing is ever unknown.
#
# Two helpers from `mmlearn.text`: `split_words` cuts a text into lower-case words, which no merge
# crosses; `spell` writes a word as its bytes, with `</w>` at the end of the last. And one for you:


# %%
def join(symbols, pair):
    """Put each occurrence of a pair of neighbours together, from left to right."""
    if pair[0] not in symbols:
        return list(symbols)
    joined, at = [], 0
    while at < len(symbols):
        found = tuple(symbols[at : at + 2]) == tuple(pair)
        joined.append("".join(pair) if found else symbols[at])
        at += 2 if found else 1
    return joined


# %% tags=["experiment"]
print(spell("lower"), spell("é"), join(list("banana"), ("a", "n")), sep="\n")

# %% [markdown] exercise="learn_merges" difficulty=2 minutes=15
# ### Exercise 1: learn the merges
#
# Write `learn_merges(word_counts, num_merges)`. `word_counts` says how often each word occurs, as
# `{"low": 5}`. Return the list of merged pairs, the first learned first.
#
# $$ (a, b)^* = \arg\max_{(a, b)} \sum_{\text{words } w} \mathrm{count}(w) \cdot
#    \#\{(a, b) \text{ in } w\} $$
#
# Each place where a pair stands counts, also overlapping ones: *aaa* holds (a, a) twice. Of equally
# frequent pairs, take the first in the order of Python's `<` on pairs of strings: then
# the same texts give the same tokenizer, in whatever order they come. Stop early when no pair
# occurs twice: joining it would shorten nothing again.
#
# *Afterwards you can say:* what a tokenizer's `merges.txt` is, and why its order matters.
#
# <details><summary>Hint 1</summary>
#
# Keep a list of (symbols, count). Each round has three steps: count, choose, join.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `pairwise(symbols)` yields the neighbours. `min(pairs, key=lambda pair: (-pairs[pair], pair))`
# takes the most frequent and, among those, the first.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
# ```
# words = [(spell(word), count) for each word]
# until there are num_merges:
#     pairs = how often each pair of neighbours occurs, each word counted count times
#     best = the most frequent pair, ties by order; stop if there is none or it occurs once
#     remember best; join it in all words
# ```
#
# </details>


# %% answer="learn_merges"
def learn_merges(word_counts, num_merges):
    """Return up to num_merges pairs of symbols, in the order in which they are to be joined."""
    ### BEGIN SOLUTION
    words = [(spell(word), count) for word, count in word_counts.items()]
    merges = []
    while len(merges) < num_merges:
        pairs = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = [(join(symbols, best), count) for symbols, count in words]
    return merges
    ### END SOLUTION


# %% check="learn_merges" aspect="example" points=2 title="the example of Sennrich's paper"
from mmlearn.feedback import expect

expect(
    "w02_tokens/learn_merges/paper",
    learn_merges({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 5),
    [("e", "s"), ("es", "t</w>"), ("l", "o"), ("e", "w"), ("ew", "est</w>")],
    "e s and s t</w> both occur 6 + 3 = 9 times, and (e, s) comes first. Then es t</w> has 9, "
    "l o has 7, and of the pairs with 6, e w comes first. Each merge changes what is counted next.",
)
expect(
    "w02_tokens/learn_merges/stop",
    learn_merges({"ab": 1, "cd": 2}, 3),
    [("c", "d</w>")],
    "c d</w> occurs twice; after it no pair occurs twice, so there is one merge, not three.",
)
### BEGIN HIDDEN TESTS
from mmlearn.text import learn_merges as reference

counts = {"banana": 4, "bandana": 3, "cabana": 2, "Ωmega": 5, "nab": 1, "aaaaa": 2, "band": 3}
for number in (1, 4, 30):
    wanted = reference(dict(counts), number)
    got = [tuple(pair) for pair in learn_merges(dict(counts), number)]
    assert got == wanted, f"{number} merges: {got} instead of {wanted}; aaa holds (a, a) twice"
### END HIDDEN TESTS

# %% check="learn_merges" aspect="law" points=1 title="the order of the words makes no difference, and more merges begin with the same"
### BEGIN HIDDEN TESTS
import random

draw = random.Random(21)
counts = {"".join(draw.choices("abc", k=draw.randint(1, 7))): draw.randint(1, 9) for _ in range(60)}
rules = [tuple(pair) for pair in learn_merges(dict(counts), 20)]
assert len(rules) == 20
assert [tuple(p) for p in learn_merges(dict(reversed(counts.items())), 20)] == rules
assert [tuple(p) for p in learn_merges(dict(counts), 7)] == rules[:7]
### END HIDDEN TESTS

# %% check="learn_merges" aspect="counts" points=1 title="no pair is more frequent than the one that is joined"
### BEGIN HIDDEN TESTS
import random
from itertools import pairwise
from mmlearn.text import spell

draw = random.Random(22)
counts = {"".join(draw.choices("wxyz", k=6)): draw.randint(1, 30) for _ in range(40)}
words = [(spell(word), count) for word, count in counts.items()]
for left, right in learn_merges(dict(counts), 12):
    found = {}
    for symbols, count in words:
        for pair in pairwise(symbols):
            found[pair] = found.get(pair, 0) + count
    assert found[left, right] == max(found.values()), "a more frequent pair was there"
    for symbols, _ in words:
        for at in range(len(symbols)):
            if symbols[at : at + 2] == [left, right]:
                symbols[at : at + 2] = [left + right]
assert learn_merges({}, 3) == [] and learn_merges({"a": 9}, 3) == [], "no neighbours, no merges"
### END HIDDEN TESTS


# %% wrong="learn_merges" name="ignores_counts" says="You count each word once. A pair in a word that occurs a thousand times counts a thousand times."
def learn_merges(word_counts, num_merges):
    words, merges = [spell(word) for word in word_counts], []
    while len(merges) < num_merges:
        pairs = Counter(pair for symbols in words for pair in pairwise(symbols))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = [join(symbols, best) for symbols in words]
    return merges


# %% wrong="learn_merges" name="never_joins" says="You count once and take the most frequent pairs. After each merge the neighbours are others: join the pair in all words, then count again."
def learn_merges(word_counts, num_merges):
    pairs = Counter()
    for word, count in word_counts.items():
        for pair in pairwise(spell(word)):
            pairs[pair] += count
    ordered = sorted(pairs, key=lambda pair: (-pairs[pair], pair))
    return [pair for pair in ordered[:num_merges] if pairs[pair] > 1]


# %% wrong="learn_merges" name="last_of_ties" says="Of equally frequent pairs you take the last in order: the first is wanted."
def learn_merges(word_counts, num_merges):
    words, merges = [(spell(word), count) for word, count in word_counts.items()], []
    while len(merges) < num_merges:
        pairs = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = [(join(symbols, best), count) for symbols, count in words]
    return merges


# %% wrong="learn_merges" name="first_found" says="Of equally frequent pairs you take the one met first, so another order of the texts gives another tokenizer. Settle ties by the pairs themselves."
def learn_merges(word_counts, num_merges):
    words, merges = [(spell(word), count) for word, count in word_counts.items()], []
    while len(merges) < num_merges:
        pairs = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        best = max(pairs, key=pairs.get, default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = [(join(symbols, best), count) for symbols, count in words]
    return merges


# %% wrong="learn_merges" name="does_not_stop" says="You also join pairs that occur only once: such a token stands for one place in the corpus and helps nowhere else. Stop when no pair occurs twice."
def learn_merges(word_counts, num_merges):
    words, merges = [(spell(word), count) for word, count in word_counts.items()], []
    while len(merges) < num_merges:
        pairs = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = [(join(symbols, merges[-1]), count) for symbols, count in words]
    return merges


# %% wrong="learn_merges" name="loses_the_end" says="You join letters without the mark at the end of a word, so 'est' in 'newest' and in 'estate' would be one token. Start from spell(word)."
def learn_merges(word_counts, num_merges):
    words, merges = [(list(word), count) for word, count in word_counts.items()], []
    while len(merges) < num_merges:
        pairs = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = [(join(symbols, best), count) for symbols, count in words]
    return merges


# %% [markdown]
# A corpus that every Python carries: the help texts of its own language reference, plain technical
# English. We take its words, and keep every eighth text back.

# %% tags=["experiment"]
from pydoc_data.topics import topics

texts = [topics[name] for name in sorted(topics)]


def words_in(texts):
    return Counter(word for text in texts for word in split_words(text) if word.isalpha())


held_out = words_in(texts[::8])
corpus = words_in(text for i, text in enumerate(texts) if i % 8)
merges = learn_merges(corpus, 256)
print(f"{corpus.total():,} words, {len(corpus):,} different ones")
print("first merges:", *("".join(pair) for pair in merges[:12]))
print("last merges: ", *("".join(pair) for pair in merges[-12:]))

# %% [markdown]
# ### Using them
#
# A new word is spelled in bytes, and then the merges happen again **in the order in which they were
# learned**: not from left to right, and not the longest piece first (that is WordPiece, week 5). As
# long as neighbours can be joined, the pair learned earliest is next.

# %% [markdown] exercise="apply_merges" difficulty=2 minutes=12 forbids=["mmlearn.text.BytePairTokenizer"]
# ### Exercise 2: cut a word with them
#
# Write `apply_merges(symbols, merges)`: `symbols` is a spelled word, as a list of strings. Return
# the list of tokens.
#
# *Afterwards you can say:* how a byte-pair tokenizer encodes, and why two tokenizers with the same
# vocabulary but another order of merges cut differently.
#
# <details><summary>Hint 1</summary>
#
# `ranks = {pair: rank}` says how early each pair was learned. Which pairs of neighbours are in it?
#
# </details>
# <details><summary>Hint 2</summary>
#
# A merge can make neighbours that match an *earlier* merge. So look at all neighbours anew each
# time.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
# ```
# repeat:
#     pairs = the neighbours that are in ranks
#     if there are none: return symbols
#     symbols = join(symbols, the pair of lowest rank)
# ```
#
# </details>


# %% answer="apply_merges"
def apply_merges(symbols, merges):
    """Return the tokens of a spelled word: the earliest learned pair is joined first."""
    ### BEGIN SOLUTION
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
        symbols = join(symbols, min(pairs, key=ranks.get))
    return list(symbols)
    ### END SOLUTION


# %% check="apply_merges" aspect="example" points=2 title="two words, worked by hand"
from mmlearn.feedback import expect

expect(
    "w02_tokens/apply_merges/hand",
    apply_merges(list("ababbab"), [("a", "b"), ("b", "b"), ("b", "a")]),
    ["ab", "ab", "b", "ab"],
    "a b was learned first, so it is joined first, in all three places; the b left over finds no "
    "single b or a beside it any more.",
)
expect(
    "w02_tokens/apply_merges/longest",
    apply_merges(list("abcd"), [("c", "d"), ("a", "b"), ("ab", "c")]),
    ["ab", "cd"],
    "c d is joined first. abc would be the longest piece, but its c is taken by then.",
)
### BEGIN HIDDEN TESTS
import random
from mmlearn.text import BytePairTokenizer, spell

draw = random.Random(24)
some_texts = [" ".join("".join(draw.choices("abc", k=6)) for _ in range(40)) for _ in range(5)]
reference = BytePairTokenizer.train(some_texts, 514 + 40)
for _ in range(60):
    some_word = "".join(draw.choices("abcd", k=draw.randint(1, 12)))
    right_cut = reference.tokenize(some_word)
    assert list(apply_merges(spell(some_word), list(reference.merges))) == right_cut, some_word
conflict = [("b", "c"), ("x", "a"), ("a", "b"), ("bc", "b"), ("c", "x")]
assert list(apply_merges(list("xabcbcx"), conflict)) == ["xa", "bc", "bc", "x"]
### END HIDDEN TESTS

# %% check="apply_merges" aspect="again" points=1 title="a merge may open the way for an earlier one"
from mmlearn.feedback import expect

expect(
    "w02_tokens/apply_merges/again",
    apply_merges(list("abcd"), [("b", "c"), ("a", "b"), ("ab", "c"), ("abc", "d"), ("a", "bc")]),
    ["abcd"],
    "First b c, then a bc, the last in the list. Now abc has the neighbour d: an earlier merge applies.",
)
expect(
    "w02_tokens/apply_merges/order",
    apply_merges(
        list("abcde"),
        [("b", "c"), ("a", "b"), ("ab", "c"), ("abc", "d"), ("a", "bc"), ("d", "e"), ("c", "de")],
    ),
    ["abcd", "e"],
    "As before, a bc makes abc. Of the pairs that stand there now, abc d was learned before d e.",
)
### BEGIN HIDDEN TESTS
# abc can be spelled by two merges; the later one makes neighbours that an earlier one joins.
rules = [("b", "c"), ("a", "b"), ("ab", "c"), ("abc", "d"), ("a", "bc")]
assert list(apply_merges(list("abcabcd"), rules)) == ["abc", "abcd"]
late = [*rules, ("d", "d"), ("d", "f")]
assert list(apply_merges(list("abcdf"), late)) == ["abcd", "f"], "the earliest of those there now"
assert list(apply_merges(list("aabcdd"), rules)) == ["a", "abcd", "d"]
### END HIDDEN TESTS

# %% check="apply_merges" aspect="law" points=1 title="nothing is lost, and what was learned from is cut shortest"
### BEGIN HIDDEN TESTS
import random
from mmlearn.text import learn_merges as reference_merges
from mmlearn.text import spell

draw = random.Random(23)
counts = {
    "".join(draw.choices("abcé", k=draw.randint(1, 8))): draw.randint(1, 9) for _ in range(50)
}
rules = reference_merges(counts, 25)
for word in counts:
    letters = spell(word)
    cuts = [list(apply_merges(list(letters), rules[:number])) for number in (0, 5, 25)]
    assert cuts[0] == letters, "without merges the letters stay"
    assert all("".join(cut) == "".join(letters) for cut in cuts), "the letters are the same"
    assert len(cuts[0]) >= len(cuts[1]) >= len(cuts[2]), "more merges, no more tokens"
before = list("abab")
apply_merges(before, [("a", "b")])
assert before == list("abab"), "the caller's list was changed"
### END HIDDEN TESTS


# %% wrong="apply_merges" name="left_to_right" says="You join the leftmost pair that is in the list. The earliest learned pair comes first, wherever it stands."
def apply_merges(symbols, merges):
    known, symbols = set(map(tuple, merges)), list(symbols)
    at = 0
    while at < len(symbols) - 1:
        if (symbols[at], symbols[at + 1]) in known:
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            at = 0
        else:
            at += 1
    return symbols


# %% wrong="apply_merges" name="longest_piece" says="You take the longest token that fits, from the left. That is how WordPiece cuts; byte-pair encoding repeats its merges in the order they were learned."
def apply_merges(symbols, merges):
    known, tokens, at = {"".join(pair) for pair in merges}, [], 0
    while at < len(symbols):
        end = len(symbols)
        while end > at + 1 and "".join(symbols[at:end]) not in known:
            end -= 1
        tokens.append("".join(symbols[at:end]))
        at = end
    return tokens


# %% wrong="apply_merges" name="latest_first" says="You join the pair that was learned last. The earliest learned one comes first: it was the most frequent."
def apply_merges(symbols, merges):
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
        symbols = join(symbols, max(pairs, key=ranks.get))
    return list(symbols)


# %% wrong="apply_merges" name="one_pass" says="You go through the merges once. A later merge can spell the symbol of an earlier one in another way, so that the earlier one applies again: look at the neighbours anew each time."
def apply_merges(symbols, merges):
    for pair in merges:
        symbols = join(symbols, tuple(pair))
    return list(symbols)


# %% wrong="apply_merges" name="passes" says="You go through the list again and again. After each merge begin at the start of the list: an earlier merge that has become possible comes before the later ones."
def apply_merges(symbols, merges):
    before = None
    while symbols != before:
        before = list(symbols)
        for pair in merges:
            symbols = join(symbols, tuple(pair))
    return list(symbols)


# %% wrong="apply_merges" name="joins_once" says="You join a pair in one place only. Go on until no two neighbours are in the list."
def apply_merges(symbols, merges):
    ranks, symbols = {tuple(pair): rank for rank, pair in enumerate(merges)}, list(symbols)
    used = set()
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks and pair not in used]:
        best = min(pairs, key=ranks.get)
        at = list(pairwise(symbols)).index(best)
        symbols[at : at + 2] = ["".join(best)]
        used.add(best)
    return symbols


# %%
def tokenize(text, merges):
    """Return the tokens of a text."""
    return [token for word in split_words(text) for token in apply_merges(spell(word), merges)]


def tokens_per_byte(counts, merges):
    """Return the tokens of some counted words, divided by their bytes."""
    tokens = sum(n * len(apply_merges(spell(word), merges)) for word, n in counts.items())
    return tokens / sum(n * len(word.encode()) for word, n in counts.items())


# %% tags=["experiment"]
for number in (0, 16, 64, 256):
    print(f"{number:3} merges:", *apply_merges(spell("exceptions"), merges[:number]))
print(tokenize("The newest classes return strings.", merges))
print(tokenize("Die neuesten Klassen. Нет!", merges))

# %% [markdown]
# Frequent words stay whole, rarer ones fall into pieces, German into smaller ones, Cyrillic into
# single bytes (printed as the letters that stand for them). Now measure it: the same sentence, from
# article 1 of the Universal Declaration of Human Rights, in seven languages.
#
# > **Predict.** Your merges have seen English only. How many times more tokens than English do
# > German, Greek and Chinese need for the same sentence?

# %% tags=["experiment"]
SAID = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。",
}
needed = {name: len(tokenize(text, merges)) for name, text in SAID.items()}
for name, text in SAID.items():
    times = needed[name] / needed["English"]
    print(f"{name:8} {len(text):3} characters, {needed[name]:3} tokens, {times:.1f} × English")

# %% tags=["experiment"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
numbers = [0, 4, 16, 64, 256]
for counts, name, colour in ((corpus, "learned from", BLUE), (held_out, "held back", ORANGE)):
    shares = [tokens_per_byte(counts, merges[:number]) for number in numbers]
    left.plot(shares, "o-", color=colour, label=name)
left.set(xlabel="merges", ylabel="tokens per byte", ylim=(0, 1.05))
left.set_xticks(range(len(numbers)), numbers)
left.set_title(f"{len(merges)} merges leave {shares[-1]:.0%} of the tokens of English")
left.legend()
times = [count / needed["English"] for count in needed.values()]
right.barh(list(needed), times, color=[BLUE] + [ORANGE] * (len(needed) - 1))
right.axvline(1, color=GREY, linestyle=":")
right.invert_yaxis()
right.set(xlabel="tokens, in multiples of the English sentence")
right.set_title("The same sentence costs other languages more")
show(
    figure,
    "merges",
    """Left: tokens per byte fall from 1 as merges grow from 0 to 256, nearly alike for texts learned
    from and held back. Right: bars of tokens for the same sentence; English 1, Spanish and German
    above it, Greek and Hindi the longest.""",
)

# %% [markdown]
# *What to see.* New English texts are cut as short as the old ones: the merges are about English,
# not these pages. Other languages pay: in Latin letters with smaller pieces, in other scripts with
# two or three bytes a letter. Published tokenizers differ by up to 15 times for the same text, and
# the gap does not vanish where they were trained for many languages (Petrov 2023, abstract).
#
# **What does text lose?** Byte-pair encoding itself loses *nothing*: glue the tokens together and
# you have the bytes again. What is lost in CLIP is lost before: capitals, and how much white space
# there was. Often said wrongly: that rare words become "unknown". With bytes underneath, no word
# is.

# %% [markdown]
# ## 3. Pictures: cut squares
#
# The naive way, a token for each pixel, ends at 50,176 tokens. A **patch** of $p \times p$ pixels
# makes $L = (\text{side}/p)^2$ tokens, and attention's scores fall with $p^4$: 16 × 16 patches
# leave 196 tokens and 65,536 times fewer scores.
#
# A patch with $C$ channels is flattened to $C p^2$ numbers and mapped to width $D$ by one matrix:
#
# $$ x_l = W\,\mathrm{flatten}(\mathrm{patch}_l) + b $$
#
# In ViT-B/16, $C p^2 = 3 \cdot 16^2 = 768 = D$: the matrix is square, and nothing need be lost.
# What a row of patches no longer says is **which pixels are neighbours**: across the edge of two
# patches, and even within one, where all pixels are just entries of a vector.

# %% [markdown] exercise="patchify" difficulty=2 minutes=12 forbids=["mmlearn.vision.PatchEmbedding"]
# ### Exercise 3: cut and flatten
#
# Write `patchify(images, height, width)`: from `[B, C, H, W]` to `[B, L, C * height * width]`.
# Patches are `height` × `width` pixels (a spectrogram will want tall ones). They come row by row,
# each row from left to right; within a patch all of channel 0, row by row, then channel 1, and so
# on, as PyTorch orders the weights of a convolution. Raise a `ValueError` when patches would not
# cover the picture exactly.
#
# *Afterwards you can say:* why a patch embedding is the same thing as a convolution whose stride is
# its kernel.
#
# <details><summary>Hint 1</summary>
#
# Split the axis H into (rows of patches, height), and W into (columns of patches, width). That is
# six axes. In which order must they come before you flatten?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `einops.rearrange` says it in one line; plain PyTorch is `view`, `permute`, `reshape`. A `view`
# straight to the result runs without error and mixes patches.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
# ```
# refuse sizes that do not divide
# B C (rows height) (columns width)  ->  B (rows columns) (C height width)
# ```
#
# </details>


# %% answer="patchify"
def patchify(images, height, width):
    """Cut images into patches of height × width pixels, each flattened to a vector."""
    ### BEGIN SOLUTION
    if images.shape[-2] % height or images.shape[-1] % width:
        raise ValueError(
            f"patches of {height} × {width} do not cover images of {tuple(images.shape[-2:])}"
        )
    return rearrange(images, "b c (r h) (s w) -> b (r s) (c h w)", h=height, w=width)
    ### END SOLUTION


# %% check="patchify" aspect="example" points=1 title="numbered pixels"
import torch
from mmlearn.feedback import expect

expect(
    "w02_tokens/patchify/order",
    patchify(torch.arange(24.0).view(1, 1, 4, 6), 2, 3),
    torch.tensor(
        [
            [
                [0.0, 1.0, 2.0, 6.0, 7.0, 8.0],
                [3.0, 4.0, 5.0, 9.0, 10.0, 11.0],
                [12.0, 13.0, 14.0, 18.0, 19.0, 20.0],
                [15.0, 16.0, 17.0, 21.0, 22.0, 23.0],
            ]
        ]
    ),
    "The upper left patch holds pixels 0 1 2 and, below them, 6 7 8; the second patch is to its right.",
)
expect(
    "w02_tokens/patchify/channels",
    patchify(torch.arange(16.0).view(1, 2, 2, 4), 2, 2),
    torch.tensor(
        [
            [
                [0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 12.0, 13.0],
                [2.0, 3.0, 6.0, 7.0, 10.0, 11.0, 14.0, 15.0],
            ]
        ]
    ),
    "Each patch holds its four pixels of channel 0 first, then its four of channel 1.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(31)
pictures = torch.randn(3, 2, 6, 20, generator=draw)
given = pictures.clone()
got = patchify(pictures, 3, 4)
assert got.shape == (3, 10, 24)
assert torch.equal(pictures, given), "your answer changed the caller's pictures"
for b, row, column in ((0, 0, 0), (2, 1, 3), (1, 0, 4)):
    wanted = given[b, :, 3 * row : 3 * row + 3, 4 * column : 4 * column + 4].flatten()
    assert torch.equal(got[b, 5 * row + column], wanted), (b, row, column)
### END HIDDEN TESTS

# %% check="patchify" aspect="convolution" points=2 title="times a matrix, it is a convolution whose stride is its kernel"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(32)
for channels, height, width in ((1, 4, 4), (3, 2, 5), (2, 6, 1)):
    pictures = torch.randn(2, channels, 12, 10 if width != 4 else 8, generator=draw)
    kernel = torch.randn(7, channels, height, width, generator=draw)
    wanted = torch.nn.functional.conv2d(pictures, kernel, stride=(height, width))
    tokens = patchify(pictures, height, width) @ kernel.flatten(1).T
    assert torch.allclose(tokens, wanted.flatten(2).transpose(1, 2), atol=1e-4), (height, width)
numbers = torch.randn(2, 3, 8, 6, generator=draw, dtype=torch.float64, requires_grad=True)
weights = torch.randn(2, 12, 12, generator=draw, dtype=torch.float64)
(patchify(numbers, 2, 2) * weights).sum().backward()
assert torch.equal(numbers.grad.flatten().sort().values, weights.flatten().sort().values), (
    "each pixel goes to one place, and its gradient comes back from there"
)
### END HIDDEN TESTS

# %% check="patchify" aspect="refusal" points=1 title="patches that do not fit are refused"
import torch
from mmlearn.feedback import expect_raises

expect_raises(
    "w02_tokens/patchify/refused",
    ValueError,
    lambda: patchify(torch.zeros(1, 1, 5, 6), 2, 3),
    "5 rows of pixels do not make rows of patches that are 2 high: raise a ValueError.",
)
### BEGIN HIDDEN TESTS
import torch

for shape in ((1, 1, 8, 9), (1, 1, 7, 8), (1, 1, 2, 8)):
    try:
        patchify(torch.zeros(shape), 4, 4)
    except ValueError:
        pass
    else:
        raise AssertionError(f"patches of 4 × 4 do not cover {shape}: raise a ValueError")
assert patchify(torch.arange(6.0).view(1, 1, 1, 6), 1, 6).tolist() == [[[0, 1, 2, 3, 4, 5]]]
### END HIDDEN TESTS


# %% wrong="patchify" name="view_only" says="You reshape in one step: that cuts the rows of pixels into pieces, not the picture into squares. Split both axes first, then bring rows and columns of patches together."
def patchify(images, height, width):
    if images.shape[-2] % height or images.shape[-1] % width:
        raise ValueError("patches do not cover the images")
    return images.reshape(len(images), -1, images.shape[1] * height * width)


# %% wrong="patchify" name="columns_first" says="Your patches come column by column. Row by row is wanted: the second patch is to the right of the first."
def patchify(images, height, width):
    if images.shape[-2] % height or images.shape[-1] % width:
        raise ValueError("patches do not cover the images")
    return rearrange(images, "b c (r h) (s w) -> b (s r) (c h w)", h=height, w=width)


# %% wrong="patchify" name="channels_last" says="Within a patch you put the channels of each pixel together. A convolution's weights have all of channel 0 first."
def patchify(images, height, width):
    if images.shape[-2] % height or images.shape[-1] % width:
        raise ValueError("patches do not cover the images")
    return rearrange(images, "b c (r h) (s w) -> b (r s) (h w c)", h=height, w=width)


# %% wrong="patchify" name="interleaved" says="Your patches take every so many-th pixel of the whole picture. Split H into (rows, height), not (height, rows): a patch is pixels side by side."
def patchify(images, height, width):
    if images.shape[-2] % height or images.shape[-1] % width:
        raise ValueError("patches do not cover the images")
    return rearrange(images, "b c (h r) (w s) -> b (r s) (c h w)", h=height, w=width)


# %% wrong="patchify" name="on_its_side" says="Within a patch you go down the columns. Go row by row, as torch's flatten does."
def patchify(images, height, width):
    if images.shape[-2] % height or images.shape[-1] % width:
        raise ValueError("patches do not cover the images")
    return rearrange(images, "b c (r h) (s w) -> b (r s) (c w h)", h=height, w=width)


# %% wrong="patchify" name="cuts_off" says="Pictures that patches do not cover lose their edge without a word. Raise a ValueError."
def patchify(images, height, width):
    kernel = (height, width)
    return F.unfold(images, kernel, stride=kernel).transpose(1, 2)


# %% [markdown]
# ### What do patches lose?
#
# *Their order*, unless positions are added: attention alone takes them as a bag (week 1).
# *Numbers*, if $D < C p^2$: then $W$ is a projection, and the best one keeps the $D$ directions in
# which patches vary most, their principal components. How much do 4 × 4 patches of digits need?

# %% tags=["experiment"]
patches = patchify(train_digits.images, 4, 4).flatten(0, 1)
energy = torch.linalg.svdvals(patches - patches.mean(dim=0)).square()
for width in (2, 4, 8, 16):
    print(
        f"D = {width:2}: at best {energy[:width].sum() / energy.sum():.1%} of the variance is kept"
    )

# %% [markdown]
# Nearby pixels are alike, so half the width keeps most. *Nearness* is the greater loss. Real
# digits, 8 × 8 pixels, each somewhere on a canvas of 16 × 16. Two *stems*, as the layers before the
# first block are called, make the same sixteen tokens for the same encoder:
#
# - **patches**: your `patchify`, 4 × 4, and one matrix;
# - **convolutions**: two of 3 × 3 with stride 2, so that their fields overlap (`mmlearn`'s
#   `ConvStem`, with more weights and with BatchNorm).


# %%
class PatchStem(nn.Module):
    """Your patches, and one matrix."""

    def __init__(self, side, d_model):
        super().__init__()
        self.side, self.projection = side, nn.Linear(side**2, d_model)

    def forward(self, images):
        return self.projection(patchify(images, self.side, self.side))


class PictureReader(nn.Module):
    """A stem, a learned vector for each position, one block, the mean, ten classes."""

    def __init__(self, stem, num_tokens=16, d_model=48):
        super().__init__()
        self.stem = stem
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, d_model))
        self.encoder = Encoder(1, d_model, 4, 2 * d_model)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, 10)

    def forward(self, images):
        return self.head(self.norm(self.encoder(self.stem(images) + self.positions)).mean(dim=1))


# %% [markdown]
# What does each stem know of nearness? Take it away in three ways. Each is *one* permutation, the
# same for every picture of training and test, so no number is lost: the pixels **inside each
# patch** change places; the **patches** change places as wholes; **all pixels** change places.


# %%
def somewhere(images, generator, side=16):
    """Put each picture at a random place of a black canvas."""
    size = images.shape[-1]
    top, left = torch.randint(side - size + 1, (2, len(images), 1, 1), generator=generator)
    rows, columns = top + torch.arange(size)[:, None], left + torch.arange(size)
    canvas = torch.zeros(len(images), side, side)
    canvas[torch.arange(len(images))[:, None, None], rows, columns] = images[:, 0]
    return canvas[:, None]


def shuffled(images, order):
    """Put the pixels of every picture into the same order."""
    return images.flatten(1)[:, order].view_as(images)


# %% tags=["experiment"]
draw = torch.Generator().manual_seed(SEED)
# Which pixels each patch holds: row l names the 16 places of patch l on the canvas.
held = patchify(torch.arange(256.0).view(1, 1, 16, 16), 4, 4)[0].long()
order_inside, order_of_patches = (torch.randperm(16, generator=draw) for _ in range(2))
ORDERS = {name: torch.arange(256) for name in ("nothing", "pixels inside\na patch", "patches")}
ORDERS["pixels inside\na patch"][held] = held[:, order_inside]
ORDERS["patches"][held] = held[order_of_patches]
ORDERS["all pixels"] = torch.randperm(256, generator=draw)
exam = somewhere(test_digits.images, torch.Generator().manual_seed(99))

# %% [markdown]
# Two of them can be settled with a pencil. Change the columns of $W$ along with the pixels of a
# patch, and the tokens are the same; change the rows of the position table along with the patches,
# and the sequence is the same, in another order. Since $W$ and the table are learned from random
# numbers, the patch stem *cannot* notice.

# %% tags=["experiment"]
stem = PatchStem(4, 48)
W, b = stem.projection.weight, stem.projection.bias
inside = patchify(shuffled(exam, ORDERS["pixels inside\na patch"]), 4, 4) @ W[:, order_inside].T + b
moved = stem(shuffled(exam, ORDERS["patches"]))
print(f"pixels inside patches: tokens differ by {(inside - stem(exam)).abs().max():.0e}")
print(f"patches: tokens differ by {(moved - stem(exam)[:, order_of_patches]).abs().max():.0e}")

# %% [markdown]
# > **Predict.** (a) Which stem learns faster on whole pictures? (b) What does each score after each
# > of the three shuffles? Ten digits, so guessing scores 0.10.

# %% tags=["experiment"]
STEMS = {
    "patches": lambda: PatchStem(4, 48),
    "convolutions": lambda: ConvStem(4, 48, num_channels=1),
}


def picture_batches(order, seed):
    """Yield 64 training digits, each at a new place."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(train_digits), (64,), generator=generator)
        images = somewhere(train_digits.images[chosen], generator)
        yield shuffled(images, order), train_digits.labels[chosen]


def picture_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


# %% tags=["experiment"]
def picture_score(name, seed, order, steps=120):
    """Train a stem with its encoder; return its accuracy on handwriting never seen."""
    set_seed(seed)
    model, batches = PictureReader(STEMS[name]()), picture_batches(order, seed)
    fit(model, batches, picture_loss, steps=steps, lr=3e-3, device=device, progress=False)
    with torch.no_grad():
        guesses = model(shuffled(exam, order).to(device)).argmax(dim=1).cpu()
    return (guesses == test_digits.labels).float().mean().item()


SEEDS = (SEED, SEED + 1)
picture_scores = {
    (condition, name): [picture_score(name, seed, order) for seed in SEEDS]
    for condition, order in ORDERS.items()
    for name in STEMS
}
for name in STEMS:
    runs = [picture_score(name, seed, ORDERS["nothing"], steps=360) for seed in SEEDS]
    picture_scores["nothing, three\ntimes the steps", name] = runs
for (condition, name), scores in picture_scores.items():
    print(f"{condition!r:32} {name:12} {mean_and_spread(scores)}")

# %% tags=["experiment"]
eight = int((test_digits.labels == 8).nonzero()[0])


def draw_shuffled(axis, place, order):
    """Draw a shuffled eight above the bars."""
    corner = axis.inset_axes((place - 0.4, 1.04, 0.8, 0.52), transform=axis.transData)
    corner.imshow(shuffled(exam[[eight]], order)[0, 0], cmap="gray_r")
    corner.set(xticks=[], yticks=[])
    corner.spines[:].set_visible(True)


# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(8.5, 4), layout="constrained")
columns = list(dict.fromkeys(condition for condition, _ in picture_scores))
for shift, (name, colour) in enumerate(zip(STEMS, (BLUE, ORANGE))):
    for place, condition in enumerate(columns):
        scores, left = picture_scores[condition, name], place + 0.32 * shift - 0.16
        label = None if place else name
        axis.bar(left, sum(scores) / 2, 0.3, color=colour, alpha=0.45, label=label)
        axis.plot([left] * 2, scores, "o", color=colour, markersize=4)
for place, order in enumerate([*ORDERS.values(), ORDERS["nothing"]]):
    draw_shuffled(axis, place, order)
axis.axhline(0.1, color=GREY, linestyle=":")
axis.text(4.45, 0.12, "guessing", ha="right", color=GREY)
axis.set(ylabel="accuracy, unseen handwriting", ylim=(0, 1.6), yticks=[0, 0.25, 0.5, 0.75, 1])
axis.set_xticks(range(len(columns)), columns)
axis.set_xlabel("what changes places, in the same way in every picture")
axis.set_title("Patches know what shares a patch; convolutions also what lies beside it")
axis.legend(loc="upper right", bbox_to_anchor=(0.8, 0.6))
show(
    figure,
    "stems",
    """A digit whole, then with its pixels shuffled inside patches, as patches, and all; below, accuracy of
    two stems. Patches score the same in the first three and guess in the last. Convolutions begin far
    higher, keep nearly all inside patches, and lose much with patches and more with all. With three times the steps both are higher, in the same order.""",
)

# %% [markdown]
# *What to see.* Shuffle the pixels inside each patch, or the patches among each other: the patch
# stem does not notice (only the seed moves it). To its matrix the pixels of a patch are a list, and
# its positions are learned from nothing. Shuffle all pixels, and it falls to guessing: **which
# pixels share a patch is the one piece of nearness that it has** (Dosovitskiy 2021, section 3.1).
#
# Convolutions know more of it: the same small filter everywhere, fields that overlap the borders.
# So exchanging patches costs them much. Shuffling inside 4 × 4 pixels costs them little: so short a
# list is soon learned, by them too. And they learn in fewer steps. Given three times as many,
# patches come near to what convolutions had before, while those have moved on. Steps are short
# here, not pictures: that very large sets of pictures close the gap is ViT's measurement (section
# 4.3), not ours.

# %% [markdown]
# ## 4. Sound: from oscillation to frequency
#
# A microphone writes 8,000 or 16,000 numbers a second. The naive way would be the pictures' way:
# cut the samples into frames, and let a matrix look at each. Its limit is **phase**: start the same
# vowel a millisecond later, and every sample is another number.
#
# So measure oscillation instead of position. The discrete Fourier transform asks a frame of $N$
# samples: how much of you swings $k$ times from end to end?
#
# $$ X_k = \sum_{n=0}^{N-1} x_n\, e^{-2\pi i kn/N}
#        = \underbrace{\sum_n x_n \cos\tfrac{2\pi kn}{N}}_{\text{real}}
#        - i\, \underbrace{\sum_n x_n \sin\tfrac{2\pi kn}{N}}_{\text{imaginary}} $$
#
# With $r$ samples a second, row $k$ is the frequency $k\,r/N$ **hertz**. Now turn the frame round
# by $m$ samples, $x_n \to x_{n-m}$, places counted round:
#
# $$ \sum_n x_{n-m}\, e^{-2\pi i kn/N} = e^{-2\pi i km/N}\, X_k ,
#    \qquad\text{so } |X_k|^2 \text{ stays as it was.} $$
#
# The **power** $|X_k|^2$ forgets when within the frame, and keeps what. Rows above $N/2$ mirror
# those below, since $X_{N-k} = \overline{X_k}$ for real samples: there are $N/2 + 1$.
#
# One more thing. The transform takes the frame to repeat for ever; the jump from its end to its
# start would be heard at all frequencies. Hann's window fades both ends: $w_n = \frac12 - \frac12
# \cos\frac{2\pi n}{N}$.

# %% [markdown] exercise="spectrogram" difficulty=3 minutes=18 forbids=["mmlearn.audio.fourier_matrix", "mmlearn.audio.hann_window"]
# ### Exercise 4: the power spectrogram
#
# Write `spectrogram(waveforms, n_fft, hop)`: from `[B, samples]` to `[B, n_fft // 2 + 1, frames]`.
# Frame $t$ is the `n_fft` samples from $t \cdot$ `hop` on, only where a whole frame fits. Window
# it, transform it by the two sums above, return the squared length, in the waveforms' own dtype.
#
# $$ S_{k,t} = \Big(\sum_n w_n x_{t h + n} \cos\tfrac{2\pi kn}{N}\Big)^2
#            + \Big(\sum_n w_n x_{t h + n} \sin\tfrac{2\pi kn}{N}\Big)^2 $$
#
# (`torch.fft.rfft` returns the same sums in $N \log N$ steps. Write them out once in your life.)
#
# *Afterwards you can say:* what a spectrogram's pixel means, in hertz and seconds, and what the
# window is for.
#
# <details><summary>Hint 1</summary>
#
# `waveforms.unfold(-1, n_fft, hop)` has the shape `[B, frames, n_fft]`. A sum over $n$ for every
# $k$ is a product with a matrix.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.outer(k, n)` holds all products $kn$. Frequency is the *second* axis of the result.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
# ```
# window = 1/2 - 1/2 cos(2 pi n / N)
# angles = 2 pi k n / N, one row for each k from 0 to N/2
# frames = unfolded waveforms, times the window
# power = (frames @ cos(angles).T)**2 + (frames @ sin(angles).T)**2
# return it with its last two axes swapped
# ```
#
# </details>


# %% answer="spectrogram"
def spectrogram(waveforms, n_fft, hop):
    """Return the power of each frequency in each frame, [B, n_fft // 2 + 1, frames]."""
    ### BEGIN SOLUTION
    n = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)
    angles = 2 * math.pi * torch.outer(n[: n_fft // 2 + 1], n) / n_fft
    frames = waveforms.unfold(-1, n_fft, hop) * window.to(waveforms)
    real, imaginary = frames @ angles.cos().to(frames).T, frames @ angles.sin().to(frames).T
    return (real**2 + imaginary**2).transpose(1, 2)
    ### END SOLUTION


# %% check="spectrogram" aspect="example" points=2 title="frames of four samples, worked by hand"
import torch
from mmlearn.feedback import expect

expect(
    "w02_tokens/spectrogram/hand",
    spectrogram(torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, -1.0]]), 4, 2),
    torch.tensor([[[4.0, 1.0], [1.0, 2.0], [0.0, 1.0]]]),
    "For N = 4 the window is 0, 1/2, 1, 1/2. The first frame becomes 0, 1/2, 1, 1/2, whose sums are "
    "2, -1, 0; the second, 0, 1/2, 1, -1/2, has 1, -1 - i, 1. Square their lengths; one column a frame.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(41)
for n_fft, hop, samples in ((16, 16, 50), (25, 7, 60), (64, 10, 200)):
    sounds = torch.randn(3, samples, generator=draw)
    options = {"window": torch.hann_window(n_fft), "center": False, "return_complex": True}
    wanted = torch.stft(sounds, n_fft, hop, **options).abs() ** 2
    energies = spectrogram(sounds.clone(), n_fft, hop)
    assert energies.dtype == sounds.dtype, "the result has the dtype of the waveforms"
    assert energies.shape == wanted.shape, (
        f"{tuple(energies.shape)} instead of {tuple(wanted.shape)}"
    )
    assert torch.allclose(energies, wanted, rtol=1e-4, atol=1e-3), (n_fft, hop)
### END HIDDEN TESTS

# %% check="spectrogram" aspect="hertz" points=1 title="a tone stands in its row, twice as loud is four times the power"
### BEGIN HIDDEN TESTS
import math
import torch

time = torch.arange(800) / 8000
tones = torch.stack([torch.sin(2 * math.pi * hertz * time) for hertz in (500.0, 1250.0, 3000.0)])
energies = spectrogram(tones.clone(), 128, 64)
assert energies.argmax(dim=1).unique(dim=1).flatten().tolist() == [8, 20, 48], (
    "row k is k r / N hertz"
)
share = energies[0, 7:10].sum(dim=0) / energies[0].sum(dim=0)
assert (share > 0.999).all(), "with Hann's window a tone fills three rows, and no more"
louder = spectrogram(2 * tones, 128, 64)
assert torch.allclose(louder, 4 * energies, rtol=1e-3, atol=1e-3)
later = spectrogram(tones[:, 64:].clone(), 128, 64)
assert torch.allclose(later, energies[:, :, 1:], rtol=1e-3, atol=1e-3), (
    "one hop later, one column on"
)
### END HIDDEN TESTS

# %% check="spectrogram" aspect="gradient" points=1 title="in double precision, with a gradient"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(42)
sounds = torch.randn(2, 48, generator=draw, dtype=torch.float64)
mine, theirs = (sounds.clone().requires_grad_() for _ in range(2))
window = torch.hann_window(16, dtype=torch.float64)
framed = torch.fft.rfft(theirs.unfold(-1, 16, 8) * window).abs() ** 2
framed.square().sum().backward()
energies = spectrogram(mine, 16, 8)
assert energies.dtype == torch.float64, "double precision stays double"
energies.square().sum().backward()
scale = theirs.grad.abs().max().item()
assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4 * scale), "the gradients differ"
assert torch.equal(mine.detach(), sounds), "the samples were changed in place"
### END HIDDEN TESTS


# %% wrong="spectrogram" name="no_window" says="You transform the bare frame. Multiply it by Hann's window first: the jump between its ends is heard at all frequencies."
def spectrogram(waveforms, n_fft, hop):
    n = torch.arange(n_fft, dtype=torch.float64)
    angles = 2 * math.pi * torch.outer(n[: n_fft // 2 + 1], n) / n_fft
    frames = waveforms.unfold(-1, n_fft, hop)
    real, imaginary = frames @ angles.cos().to(frames).T, frames @ angles.sin().to(frames).T
    return (real**2 + imaginary**2).transpose(1, 2)


# %% wrong="spectrogram" name="symmetric_window" says="Your window divides by N - 1: that is the symmetric one, for filters. Spectrograms take the periodic window, which divides by N, so that shifted copies add up to a constant."
def spectrogram(waveforms, n_fft, hop):
    n = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / (n_fft - 1))
    angles = 2 * math.pi * torch.outer(n[: n_fft // 2 + 1], n) / n_fft
    frames = waveforms.unfold(-1, n_fft, hop) * window.to(waveforms)
    real, imaginary = frames @ angles.cos().to(frames).T, frames @ angles.sin().to(frames).T
    return (real**2 + imaginary**2).transpose(1, 2)


# %% wrong="spectrogram" name="magnitude" says="You return the length of X, not its square. Power is the square: energies of two tones add up, lengths do not."
def spectrogram(waveforms, n_fft, hop):
    n = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)
    angles = 2 * math.pi * torch.outer(n[: n_fft // 2 + 1], n) / n_fft
    frames = waveforms.unfold(-1, n_fft, hop) * window.to(waveforms)
    real, imaginary = frames @ angles.cos().to(frames).T, frames @ angles.sin().to(frames).T
    return (real**2 + imaginary**2).sqrt().transpose(1, 2)


# %% wrong="spectrogram" name="cosines_only" says="You ask for cosines alone: a wave that starts a quarter of a turn later would be silent. It takes a sine, too."
def spectrogram(waveforms, n_fft, hop):
    n = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)
    angles = 2 * math.pi * torch.outer(n[: n_fft // 2 + 1], n) / n_fft
    frames = waveforms.unfold(-1, n_fft, hop) * window.to(waveforms)
    return ((frames @ angles.cos().to(frames).T) ** 2).transpose(1, 2)


# %% wrong="spectrogram" name="frames_first" says="Your axes are (frames, frequencies). Time runs along the last one, as in a picture of it."
def spectrogram(waveforms, n_fft, hop):
    n = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)
    angles = 2 * math.pi * torch.outer(n[: n_fft // 2 + 1], n) / n_fft
    frames = waveforms.unfold(-1, n_fft, hop) * window.to(waveforms)
    real, imaginary = frames @ angles.cos().to(frames).T, frames @ angles.sin().to(frames).T
    return real**2 + imaginary**2


# %% wrong="spectrogram" name="both_halves" says="You keep all N rows. Those above N/2 mirror those below for real samples: keep N/2 + 1."
def spectrogram(waveforms, n_fft, hop):
    n = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)
    angles = 2 * math.pi * torch.outer(n, n) / n_fft
    frames = waveforms.unfold(-1, n_fft, hop) * window.to(waveforms)
    real, imaginary = frames @ angles.cos().to(frames).T, frames @ angles.sin().to(frames).T
    return (real**2 + imaginary**2).transpose(1, 2)


# %% wrong="spectrogram" name="no_overlap" says="Your frames follow each other without overlap. The next frame starts hop samples after the last one, not n_fft."
def spectrogram(waveforms, n_fft, hop):
    n = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)
    angles = 2 * math.pi * torch.outer(n[: n_fft // 2 + 1], n) / n_fft
    frames = waveforms.unfold(-1, n_fft, n_fft) * window.to(waveforms)
    real, imaginary = frames @ angles.cos().to(frames).T, frames @ angles.sin().to(frames).T
    return (real**2 + imaginary**2).transpose(1, 2)


# %% [markdown]
# Does power forget the right thing? A real shift is not round: samples leave at one end and others
# come in at the other, under a window that stays. So the power is *nearly* the same; measure how
# nearly. Take the loudest 32 ms of forty spoken words, and the frame that begins up to 4 ms later.
# How alike are the two as samples, and as power?

# %% tags=["experiment"]
N_FFT = 256  # 32 ms at 8,000 Hz


def alike(x, y):
    """Return the cosine of each row of x with its partner in y."""
    return F.cosine_similarity(x.flatten(1), y.flatten(1))


def power_of(frames):
    """Return the logarithm of the power of frames, without its mean."""
    level = (spectrogram(frames, N_FFT, N_FFT) + 1e-6).log().flatten(1)
    return level - level.mean(dim=1, keepdim=True)


words = train_sounds.waveforms[:40]
middle = words.unfold(1, N_FFT, 16).square().sum(dim=2)[:, :-4].argmax(dim=1) * 16
frames = [words.gather(1, middle[:, None] + torch.arange(N_FFT) + m) for m in range(0, 33)]
as_samples = torch.stack([alike(frames[0], frame) for frame in frames])
as_power = torch.stack([alike(power_of(frames[0]), power_of(frame)) for frame in frames])
strangers = alike(power_of(frames[0]), power_of(frames[0].roll(1, 0))).mean()

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
milliseconds = torch.arange(33) / RATE * 1000
for values, name, colour in ((as_samples, "samples", ORANGE), (as_power, "log power", BLUE)):
    low, mid, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1)
    axis.plot(milliseconds, mid, color=colour, label=name)
    axis.fill_between(milliseconds, low, high, color=colour, alpha=0.2)
axis.axhline(strangers, color=GREY, linestyle=":", label="log power of two different clips")
axis.set(xlabel="shift (ms)", ylabel="cosine with the frame before the shift", ylim=(-1.05, 1.05))
axis.set_title("A shift of a millisecond changes the samples, hardly the power")
axis.legend(loc="lower right")
show(
    figure,
    "shift",
    """Cosine against shift from 0 to 4 ms, medians with bands over 40 words. As samples it falls below
    zero within a millisecond or so and swings; as log power it stays near 1 throughout.""",
)

# %% [markdown]
# *What to see.* To a matrix that sees samples, a vowel a millisecond later is another vowel, or its
# opposite. The power is nearly the same. (A network can learn to build this itself, from much
# sound: wav2vec 2.0, week 6, reads samples.)
#
# ### Before the first frame: aliasing
#
# Sound of 16,000 Hz, a model for 8,000: the quick way is to take every second sample.
#
# > **Predict.** A whistle rises from 0 to 8,000 Hz. You take every second of its 16,000 samples a
# > second. What does the spectrogram show?

# %% tags=["experiment"]
time = torch.arange(2 * 16_000) / 16_000
whistle = torch.sin(2 * math.pi * 2_000 * time**2)[None]  # its frequency is 4,000 Hz times seconds
versions = {
    "16,000 Hz": (whistle, 16_000),
    "every second sample": (whistle[:, ::2], 8_000),
    "resampled": (resample(whistle, 16_000, 8_000), 8_000),
}
five = torch.sin(2 * math.pi * 5_000 * time)[None]
heard = spectrogram(five[:, ::2], 512, 128).mean(dim=2).argmax().item() * 8_000 / 512
print(f"a tone of 5,000 Hz, every second sample of 16,000: heard at {heard:,.0f} Hz")

# %% tags=["experiment"]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
for axis, (name, (wave, rate)) in zip(axes, versions.items()):
    level = 10 * (spectrogram(wave, 512, 128)[0] + 1e-6).log10()
    extent = (0, 2, 0, rate / 2)
    image = axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=-20, vmax=45)
    axis.set(title=name, xlabel="time (s)", ylim=(0, 8_000))
axes[0].set_ylabel("frequency (Hz)")
figure.colorbar(image, ax=axes, label="power (dB)")
figure.suptitle("Skipping samples folds high tones down; resampling silences them")
show(
    figure,
    "aliasing",
    """Three spectrograms of a rising whistle. At 16,000 Hz one line rises to 8,000 Hz. With every second
    sample it rises to 4,000 Hz and comes down again. Resampled, it ends at 4,000 Hz.""",
)

# %% [markdown]
# *What to see.* (Colour is power in decibels, $10 \log_{10}$ of it.) The whistle comes down again:
# what lies above half the new rate is folded back. With $r$ samples a second, a tone at $f = r - g$
# gives, sample by sample, the numbers of a tone at $g$:
#
# $$ \cos\Big(2\pi (r - g)\tfrac{n}{r}\Big) = \cos\Big(2\pi n - 2\pi g\,\tfrac{n}{r}\Big)
#    = \cos\Big(2\pi g\,\tfrac{n}{r}\Big). $$
#
# Equal numbers: no model can tell. `resample` removes first what the new rate cannot hold, a loss,
# but an honest one. (The faint tail is the edge of its filter, which is not infinitely steep.) And
# a model does not notice a wrong rate either: a tokenizer that expects 16,000 Hz reads sound of
# 8,000 Hz without complaint, an octave too high and twice too fast.
#
# ### How long a frame?
#
# The rows of a frame of $N$ samples lie $r/N$ hertz apart, and everything within its $N/r$ seconds
# is one column. Sharper in one is blurred in the other; no window escapes that. The same word,
# twice:

# %% tags=["experiment"]
seven = train_sounds.transcripts.index("seven")
spoken = train_sounds.waveforms[seven, : train_sounds.lengths[seven]]
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for axis, size in zip(axes, (40, 512)):
    level = 10 * (spectrogram(spoken[None], size, 8)[0] + 1e-6).log10()
    ends = size / 2 / RATE, (len(spoken) - size / 2) / RATE  # the middles of the outermost frames
    axis.imshow(level, origin="lower", aspect="auto", extent=(*ends, 0, RATE / 2))
    axis.set(xlabel="time (s)", title=f"frames of {1000 * size / RATE:.0f} ms")
    axis.set_xlim(0, len(spoken) / RATE)
axes[0].set_ylabel("frequency (Hz)")
figure.suptitle("Short frames show each stroke of the voice, long ones each harmonic")
show(
    figure,
    "window",
    """Two spectrograms of the word seven. With frames of 5 ms vertical stripes, one for each stroke of the
    voice; with frames of 64 ms fine horizontal lines, the multiples of its pitch.""",
)

# %% [markdown]
# *What to see.* Left, each stroke of the vocal cords is a stripe; right, the strokes have become a
# comb of *harmonics*, the multiples of the voice's pitch. Speech models take 25 ms: long enough for
# a few strokes, short enough for a consonant.

# %% [markdown]
# ## 5. Mel: as the ear splits it
#
# 129 rows, all 31 hertz apart: barely enough for the low notes of a melody, far too fine above.
# High up, listeners judge *ratios*: 2,000 to 4,000 Hz is nearly as large a step as 4,000 to 8,000.
# Low down they judge *differences*. The **mel** scale is nearly straight far below 700 Hz, and a
# logarithm far above:
#
# $$ m = 2595\, \log_{10}\!\big(1 + f / 700\big) $$
#
# (So mels are not octaves, as is often said: 200 to 400 Hz is 226 mels, 2,000 to 4,000 Hz is 625.)
#
# Take $M + 2$ corners $c_0, \dots, c_{M+1}$ at equal steps of *mel* from 0 to $r/2$, and turn them
# back into hertz. Band $j$ is a triangle, straight in *hertz*: it rises from one corner, peaks at
# the next and ends at the one after, where its neighbour peaks.
#
# $$ W_{j,k} = \max\!\Big(0, \min\!\Big(\frac{f_k - c_{j}}{c_{j+1} - c_{j}},\;
#    \frac{c_{j+2} - f_k}{c_{j+2} - c_{j+1}}\Big)\Big), \qquad f_k = k\,r/N, \quad j = 0 \dots M - 1 $$
#
# The bands are $WS$. Last comes the logarithm: twice the pressure, wherever it was, is then the
# same step.

# %% [markdown] exercise="mel_filterbank" difficulty=3 minutes=15
# ### Exercise 5: the mel filterbank
#
# Write `mel_filterbank(n_mels, n_fft, sample_rate)`, which returns $W$ in the shape
# `[n_mels, n_fft // 2 + 1]`. `hertz_to_mel` and `mel_to_hertz` are given; do without `torchaudio`.
#
# *Afterwards you can say:* how 129 or 201 frequencies become 24 or 80 bands, and why "mel" alone
# does not define a spectrogram (scale, norm, window, centring and logarithm differ between
# libraries).
#
# <details><summary>Hint 1</summary>
#
# `torch.linspace(0, top, n_mels + 2)`: in mels. One triangle needs three corners.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]` against a row of
# frequencies gives all triangles at once. The frequencies stay as they are: do not round corners to
# them.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
# ```
# corners = mel_to_hertz(n_mels + 2 equal steps from 0 to hertz_to_mel(half the rate))
# frequencies = k * sample_rate / n_fft
# rising = (frequencies - left) / (peak - left)
# falling = (right - frequencies) / (right - peak)
# return the smaller of the two, and never less than 0
# ```
#
# </details>


# %% answer="mel_filterbank"
def mel_filterbank(n_mels, n_fft, sample_rate):
    """Return the weight of each frequency in each band, [n_mels, n_fft // 2 + 1]."""
    ### BEGIN SOLUTION
    top = hertz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64)).item()
    corners = mel_to_hertz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))
    frequencies = torch.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return torch.minimum(rising, falling).clamp(min=0).float()
    ### END SOLUTION


# %% check="mel_filterbank" aspect="example" points=2 title="two bands, worked by hand"
import torch
from mmlearn.feedback import expect

expect(
    "w02_tokens/mel_filterbank/hand",
    mel_filterbank(2, 7, 9800),
    torch.tensor([[0.0, 0.5, 0.0, 0.0], [0.0, 0.5, 0.75, 0.25]]),
    "1 + f/700 is 1, 2, 4, 8 at the corners, so they lie at 0, 700, 2100 and 4900 Hz. The frequencies "
    "are 0, 1400, 2800 and 4200 Hz: 1400 is halfway from 700 to 2100, where both bands take half.",
)
### BEGIN HIDDEN TESTS
import torchaudio

for bands, n_fft, rate in ((24, 256, 8000), (40, 400, 16000), (80, 1024, 22050), (1, 16, 500)):
    wanted = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, 0.0, rate / 2, bands, rate, norm=None, mel_scale="htk"
    ).T
    got = mel_filterbank(bands, n_fft, rate)
    assert got.shape == wanted.shape, f"{tuple(got.shape)} instead of {tuple(wanted.shape)}"
    assert torch.allclose(got.double(), wanted.double(), atol=2e-4), (bands, n_fft, rate)
### END HIDDEN TESTS

# %% check="mel_filterbank" aspect="shares" points=1 title="neighbouring bands share each frequency between them"
### BEGIN HIDDEN TESTS
import torch

triangles = mel_filterbank(20, 1024, 16000).double()
frequencies = torch.arange(513) * 16000 / 1024
corners = 700 * ((1 + 8000 / 700) ** (torch.arange(22) / 21.0) - 1)
inside = (frequencies >= corners[1]) & (frequencies <= corners[20])
shares = triangles.sum(dim=0)
assert torch.allclose(shares[inside], torch.ones(int(inside.sum())).double(), atol=1e-4), (
    "between the first peak and the last, two triangles add up to 1"
)
assert (triangles >= 0).all() and triangles[:, 0].abs().max() < 1e-6, (
    "no weight is negative; 0 Hz has none"
)
odd, step = mel_filterbank(3, 25, 8000), 8000 / 25
edges = [700 * ((1 + 4000 / 700) ** (number / 4) - 1) for number in range(5)]
for j in range(3):
    for k in range(13):
        rise = (k * step - edges[j]) / (edges[j + 1] - edges[j])
        fall = (edges[j + 2] - k * step) / (edges[j + 2] - edges[j + 1])
        assert abs(float(odd[j, k]) - max(0.0, min(rise, fall))) < 1e-4, "row k is k r / N hertz"
### END HIDDEN TESTS

# %% check="mel_filterbank" aspect="widths" points=1 title="narrow below, wide above"
### BEGIN HIDDEN TESTS
import torch

triangles = mel_filterbank(16, 4096, 8000)
widths = (triangles > 0).sum(dim=1) * 8000 / 4096
assert (widths.diff() > 0).all(), "each band is wider than the one below it"
ratio = (1 + 4000 / 700) ** (1 / 17)  # from corner to corner, 700 + f grows by this factor
wanted = 700 * (ratio**2 - 1) * ratio ** torch.arange(16.0)
assert (widths - wanted).abs().max() < 2 * 8000 / 4096, "widths grow like 700 + f"
### END HIDDEN TESTS


# %% wrong="mel_filterbank" name="equal_in_hertz" says="Your corners stand at equal steps of hertz. Make equal steps in mels, then turn the corners back into hertz."
def mel_filterbank(n_mels, n_fft, sample_rate):
    corners = torch.linspace(0, sample_rate / 2, n_mels + 2, dtype=torch.float64)
    frequencies = torch.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return torch.minimum(rising, falling).clamp(min=0).float()


# %% wrong="mel_filterbank" name="straight_in_mel" says="Your triangles are straight in mels. These are straight in hertz: only the corners are placed in mels. (Kaldi does it your way, and its models need that.)"
def mel_filterbank(n_mels, n_fft, sample_rate):
    frequencies = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (sample_rate / n_fft)
    mels = hertz_to_mel(frequencies)
    corners = torch.linspace(0, mels[-1].item(), n_mels + 2, dtype=torch.float64)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (mels - left) / (peak - left), (right - mels) / (right - peak)
    return torch.minimum(rising, falling).clamp(min=0).float()


# %% wrong="mel_filterbank" name="rounded_to_bins" says="You round the corners to the transform's frequencies, as old tutorials do: bands become uneven, and narrow ones vanish. Compute each weight from its frequency in hertz."
def mel_filterbank(n_mels, n_fft, sample_rate):
    top = hertz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64)).item()
    corners = mel_to_hertz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))
    bins = ((n_fft + 1) * corners / sample_rate).floor().long().tolist()
    bank = torch.zeros(n_mels, n_fft // 2 + 1)
    for j in range(n_mels):
        left, peak, right = bins[j : j + 3]
        for k in range(left, min(right, n_fft // 2 + 1)):
            below = (k - left) / max(peak - left, 1)
            bank[j, k] = below if k < peak else (right - k) / max(right - peak, 1)
    return bank


# %% wrong="mel_filterbank" name="slaney_norm" says="You divide each triangle by half its width: that is norm='slaney', librosa's default. Here every triangle peaks at 1."
def mel_filterbank(n_mels, n_fft, sample_rate):
    top = hertz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64)).item()
    corners = mel_to_hertz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))
    frequencies = torch.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()


# %% wrong="mel_filterbank" name="below_zero" says="Outside its triangle a band must weigh 0; yours goes on below zero. Clamp it."
def mel_filterbank(n_mels, n_fft, sample_rate):
    top = hertz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64)).item()
    corners = mel_to_hertz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))
    frequencies = torch.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return torch.minimum(rising, falling).float()


# %% wrong="mel_filterbank" name="last_row_is_half_the_rate" says="You spread the rows evenly up to half the rate. With an odd n_fft the last one lies below it: row k is k times the rate over n_fft."
def mel_filterbank(n_mels, n_fft, sample_rate):
    top = hertz_to_mel(torch.tensor(sample_rate / 2, dtype=torch.float64)).item()
    corners = mel_to_hertz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return torch.minimum(rising, falling).clamp(min=0).float()


# %% wrong="mel_filterbank" name="up_to_the_rate" says="Your corners reach up to the sampling rate. A sampled wave holds nothing above half of it."
def mel_filterbank(n_mels, n_fft, sample_rate):
    top = hertz_to_mel(torch.tensor(float(sample_rate), dtype=torch.float64)).item()
    corners = mel_to_hertz(torch.linspace(0, top, n_mels + 2, dtype=torch.float64))
    frequencies = torch.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return torch.minimum(rising, falling).clamp(min=0).float()


# %%
N_MELS, HOP = 24, 128  # 24 bands, a frame every 16 ms


def log_mel(waveforms, n_mels=N_MELS, n_fft=256, hop=HOP, rate=8_000):
    """Return the log-mel spectrogram of waveforms, from your two functions."""
    power = spectrogram(waveforms, n_fft, hop)
    bank = mel_filterbank(n_mels, n_fft, rate).to(power)
    return (bank @ power + 1e-6).log()


# %% tags=["experiment"]
power = spectrogram(spoken[None], N_FFT, 32)[0]
bank = mel_filterbank(N_MELS, N_FFT, RATE)
loudest = power.sum(dim=0).argmax()
widths = (bank > 0).sum(dim=1) * RATE / N_FFT
print(f"lowest band {widths[0]:.0f} Hz wide, highest {widths[-1]:.0f} Hz")

# %% tags=["experiment"]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
frequencies = torch.arange(N_FFT // 2 + 1) * RATE / N_FFT
left.plot(frequencies, bank.T, color=GREY, linewidth=0.8)
left.plot(frequencies, bank[5], color=ORANGE, linewidth=2)
spectrum = power[:, loudest] / power[:, loudest].max()
left.plot(frequencies, spectrum.sqrt(), color=BLUE, label="one frame of 'seven'")
left.set(xlabel="frequency (Hz)", ylabel="weight; magnitude (largest = 1)", ylim=(0, 1.25))
left.set_title("Triangles collect the frequencies")
left.legend()
ends = N_FFT / 2 / RATE, (len(spoken) - N_FFT / 2) / RATE
extent = (*ends, 0, RATE / 2)
middle.imshow(10 * (power + 1e-6).log10(), origin="lower", aspect="auto", extent=extent)
middle.set(xlabel="time (s)", ylabel="frequency (Hz)", title="129 rows: each harmonic a line")
bands = log_mel(spoken[None], hop=32)[0]
right.imshow(bands, origin="lower", aspect="auto", extent=(*ends, -0.5, N_MELS - 0.5))
right.set(xlabel="time (s)", ylabel="mel band", title="24 bands: what the mouth does")
show(
    figure,
    "filterbank",
    """Left: 24 triangles, narrow at low frequencies and wide at high ones, over the spectrum of a voice
    with its harmonics. Middle: its spectrogram with fine lines. Right: 24 mel bands, lines gone above.""",
)

# %% [markdown]
# *What to see.* The blue comb is a voice's harmonics. (The narrow triangles look cut off because
# the transform's rows miss their peaks.) In the middle each harmonic is a line; on the right the
# upper ones have run together. What remains is the envelope, the shape of the mouth, which tells
# words apart. Pitch, which tells *voices* and melodies apart, is mostly gone.
#
# ### What does log-mel lose?
#
# Go back. The bands are spread over their frequencies by the pseudo-inverse of $W$, the
# least-squares way back; the phase must be guessed. **Griffin and Lim's** way: start from random
# phases, make a sound, take over *its* phases, repeat. Frames overlap, so most phases contradict
# each other, and the guess gets better each round.
#
# > **Predict.** From the full power spectrogram, with only the phase missing: how alike are the
# > rebuilt waveform and the original, as a cosine? And their spectrograms?


# %%
def centred(waveforms, n_fft, hop):
    """Return the power of frames centred on 0, hop, 2 hop …, the ends mirrored."""
    half = n_fft // 2
    return spectrogram(F.pad(waveforms, (half, half), mode="reflect"), n_fft, hop)


def rebuild(power, bank=None):
    """Make a sound that has this power: bands spread back, phases guessed."""
    if bank is not None:
        power = torch.linalg.pinv(bank) @ (bank @ power)
    config = MelConfig(sample_rate=8_000, n_fft=256, hop_length=64)
    start = torch.Generator().manual_seed(0)
    return griffin_lim(power.clamp(min=0).sqrt(), config, 32, start)


# %% tags=["experiment"]
whole = [i for i in range(60) if train_sounds.lengths[i] >= 3200][:16]
clips = train_sounds.waveforms[whole, :3200]  # sixteen words, their first 0.4 s
truth = centred(clips, N_FFT, 64)
rebuilt = {"phase lost": rebuild(truth)}
for n_mels in (40, 24, 12, 6):
    rebuilt[f"{n_mels} bands"] = rebuild(truth, mel_filterbank(n_mels, N_FFT, RATE))
losses = {}
for name, sound in rebuilt.items():
    sound = F.pad(sound, (0, clips.shape[1] - sound.shape[1]))
    magnitudes, wanted = centred(sound, N_FFT, 64).sqrt(), truth.sqrt()
    error = (magnitudes - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    losses[name] = error, alike(sound, clips)
    print(f"{name:10} spectral error {mean_and_spread(error)}, ", end="")
    print(f"cosine of the waveforms {mean_and_spread(losses[name][1])}")

# %% tags=["experiment"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
start = int(clips[0].unfold(0, 200, 20).square().sum(dim=1).argmax()) * 20
window = slice(start, start + 200)
times = torch.arange(200) / RATE * 1000
left.plot(times, clips[0, window], color=BLUE, label="original")
left.plot(times, rebuilt["phase lost"][0, window], color=ORANGE, label="rebuilt, phase guessed")
left.set(
    xlabel="time (ms)",
    ylabel="pressure (full scale = 1)",
    ylim=(-0.45, 0.6),
    title="Another wave with nearly the same spectrogram",
)
left.legend()
for place, (error, _) in enumerate(losses.values()):
    right.bar(place, error.mean(), color=GREEN, alpha=0.45)
    right.plot([place] * len(error), error, ".", color=GREEN, markersize=4)
right.set_xticks(range(len(losses)), losses)
right.set(ylabel="spectral error (share of the magnitude)", ylim=(0, None))
right.set_title("Fewer bands lose more; dots are words")
show(
    figure,
    "phase",
    """Left: 25 ms of a voice and of the rebuilt sound, with the same rhythm but other shapes. Right: bars
    of spectral error growing from phase lost through 40, 24, 12 to 6 bands, a dot for each word.""",
)

# %% [markdown]
# *What to see.* The wave is another one: its cosine with the original is about 0 (and even $-x$ has
# the power of $x$, exactly). Yet the spectrogram is right to about a sixth, and what you hear is
# the word. The bands lose more: with 24 of them more than half of the magnitudes' detail. Listen:

# %% tags=["experiment"]
from IPython.display import Audio, display

for name, sound in (("original", clips), *((n, rebuilt[n]) for n in ("phase lost", "6 bands"))):
    print(f"{name}: {train_sounds.transcripts[whole[0]]!r}")
    display(Audio(sound[0].numpy(), rate=RATE))

# %% [markdown]
# ## 6. One sequence for all
#
# Three tokenizers, three kinds of pieces. To put them before one encoder, each piece becomes a
# vector of width $D$ by its modality's own table or matrix, and then gets two additions:
#
# $$ z_{m,l} = W_m\, x_{m,l} + P_m[l] + e_m $$
#
# a **position** $P_m[l]$, counted anew in each modality, and a **modality embedding** $e_m$, the
# same for all tokens of one kind. Then they stand in one row, with one mask. That is the input side
# of most multimodal transformers: ViLT's "modal-type embedding" is $e_m$ (Kim 2021, section 3.1,
# equation 3), and BERT's segment embedding is the same thing for two sentences.

# %% [markdown] exercise="assemble" difficulty=4 minutes=15 forbids=["mmlearn.fusion.StreamEmbedding"]
# ### Exercise 6: several modalities in one row
#
# Write `assemble(tokens, masks, positions, modalities)`.
#
# | argument | for each modality $m$ |
# |---|---|
# | `tokens[m]` | `[B, L_m, D]`, already of width D |
# | `masks[m]` | `[B, L_m]`, boolean, `True` = a real token |
# | `positions[m]` | `[at least L_m, D]`, a table of its own |
# | `modalities` | one tensor `[M, D]`: row m is $e_m$ |
#
# Return the sequence `[B, L, D]`, $L = \sum_m L_m$, in the order given, and its mask `[B, L]`.
# Where the mask is `False` the sequence is **exactly 0**, whatever stood there: padding, or a
# modality that is missing and holds NaN. (Attention's mask is not enough: its weight 0 times NaN is
# NaN.)
#
# *Afterwards you can say:* how one transformer takes text, pictures and sound, and what must be
# said of each token besides its content.
#
# <details><summary>Hint 1</summary>
#
# `positions[m][:L_m]` has the shape `[L_m, D]`, `modalities[m]` has `[D]`: both are added as they
# are.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.where(mask[..., None], sequence, 0.0)` picks; a product with the mask multiplies.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
# ```
# for each modality: tokens + the first L_m positions + its row of modalities
# join them along the axis of tokens, and the masks likewise
# where the joined mask is False, put 0
# ```
#
# </details>


# %% answer="assemble"
def assemble(tokens, masks, positions, modalities):
    """Return one sequence [B, L, D] of all modalities, and its mask [B, L]."""
    ### BEGIN SOLUTION
    parts = [
        tokens_BLD + table[: tokens_BLD.shape[1]] + modality
        for tokens_BLD, table, modality in zip(tokens, positions, modalities)
    ]
    mask_BL = torch.cat(list(masks), dim=1)
    return torch.where(mask_BL[..., None], torch.cat(parts, dim=1), 0.0), mask_BL
    ### END SOLUTION


# %% check="assemble" aspect="example" points=2 title="two words, a gap, two patches"
import torch
from mmlearn.feedback import expect

expect(
    "w02_tokens/assemble/hand",
    assemble(
        [
            torch.tensor([[[1.0, 2.0], [3.0, 4.0], [float("nan"), 7.0]]]),
            torch.tensor([[[5.0, 6.0], [8.0, 9.0]]]),
        ],
        [torch.tensor([[True, True, False]]), torch.tensor([[True, True]])],
        [
            torch.tensor([[10.0, 0.0], [20.0, 0.0], [30.0, 0.0], [40.0, 0.0], [50.0, 0.0]]),
            torch.tensor([[60.0, 0.0], [70.0, 0.0], [80.0, 0.0], [90.0, 0.0], [99.0, 0.0]]),
        ],
        torch.tensor([[0.0, 100.0], [0.0, 200.0]]),
    ),
    (
        torch.tensor([[[11.0, 102.0], [23.0, 104.0], [0.0, 0.0], [65.0, 206.0], [78.0, 209.0]]]),
        torch.tensor([[True, True, False, True, True]]),
    ),
    "The first word is (1 + 10 + 0, 2 + 0 + 100). Positions begin again at row 0 of the second table; "
    "the gap in between, which holds NaN, is exactly 0.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(61)
sizes = (4, 2, 5)
parts = [torch.randn(3, n, 6, generator=draw) for n in sizes]
tables = [torch.randn(n + 3, 6, generator=draw) for n in sizes]
kinds = torch.randn(3, 6, generator=draw)
real = [torch.rand(3, n, generator=draw) < 0.7 for n in sizes]
wanted = torch.zeros(3, 11, 6)
for b in range(3):
    for m, start in enumerate((0, 4, 6)):
        for place in range(sizes[m]):
            if real[m][b, place]:
                wanted[b, start + place] = parts[m][b, place] + tables[m][place] + kinds[m]
joined, mask = assemble(
    [p.clone() for p in parts],
    [r.clone() for r in real],
    [t.clone() for t in tables],
    kinds.clone(),
)
assert joined.shape == (3, 11, 6) and mask.dtype == torch.bool
assert torch.equal(mask, torch.cat(real, dim=1)), "the masks stand in the order of the tokens"
assert torch.allclose(joined, wanted, atol=1e-5)
### END HIDDEN TESTS

# %% check="assemble" aspect="hidden" points=2 title="a missing modality that holds NaN has no influence"
import torch
from mmlearn.feedback import expect

given_words = torch.tensor([[[1.0, 2.0]]])
assemble([given_words], [torch.tensor([[True]])], [torch.ones(1, 2)], torch.ones(1, 2))
expect(
    "w02_tokens/assemble/inputs",
    given_words,
    torch.tensor([[[1.0, 2.0]]]),
    "The call changed the tokens that it was given.",
)
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(62)
words, sound = torch.randn(2, 3, 4, generator=draw), torch.randn(2, 5, 4, generator=draw)
tables = [torch.randn(6, 4, generator=draw) for _ in range(2)]
kinds = torch.randn(2, 4, generator=draw)
heard = torch.tensor([[False] * 5, [True] * 3 + [False] * 2])
present = torch.ones(2, 3, dtype=torch.bool)
broken = sound.masked_fill(~heard[..., None], float("nan"))
broken[1, 4] = float("inf")
wanted = words + tables[0][:3] + kinds[0], sound[1, :3] + tables[1][:3] + kinds[1]
words_before = words.clone()
joined, mask = assemble([words, broken], [present, heard], tables, kinds.clone())
assert torch.equal(words, words_before), (
    "the caller's tokens were changed: x = x + ..., not x += ..."
)
assert torch.isfinite(joined).all(), "0 times NaN is NaN: choose, do not multiply"
assert torch.equal(joined[~mask], torch.zeros(7, 4)), "what is hidden is exactly 0"
assert torch.allclose(joined[:, :3], wanted[0], atol=1e-6)
assert torch.allclose(joined[1, 3:6], wanted[1], atol=1e-6)
### END HIDDEN TESTS

# %% check="assemble" aspect="gradient" points=1 title="every table learns from its own tokens only"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(63)
parts = [torch.randn(2, n, 3, generator=draw, requires_grad=True) for n in (2, 4)]
tables = [torch.randn(5, 3, generator=draw, requires_grad=True) for _ in range(2)]
kinds = torch.randn(2, 3, generator=draw, requires_grad=True)
real = [torch.ones(2, 2, dtype=torch.bool), torch.tensor([[True] * 4, [True] * 1 + [False] * 3])]
first_word = (parts[0][0, 0] + tables[0][0] + kinds[0]).detach().clone()
joined, _ = assemble(parts, real, tables, kinds)
assert torch.allclose(joined[0, 0], first_word, atol=1e-6)
joined.sum().backward()
assert kinds.grad.tolist() == [[4.0] * 3, [5.0] * 3], "four words and five frames are real"
assert tables[0].grad[:, 0].tolist() == [2.0, 2.0, 0.0, 0.0, 0.0]
assert tables[1].grad[:, 0].tolist() == [2.0, 1.0, 1.0, 1.0, 0.0]
assert parts[1].grad[1, 1:].abs().max() == 0 and parts[1].grad[0].min() == 1
### END HIDDEN TESTS


# %% wrong="assemble" name="positions_run_on" says="Your positions run on from one modality into the next. Each counts anew from its own table's row 0: else a longer sentence would move every patch."
def assemble(tokens, masks, positions, modalities):
    parts, start = [], 0
    for part, table, modality in zip(tokens, positions, modalities):
        places = torch.arange(start, start + part.shape[1]).clamp(max=len(table) - 1)
        parts.append(part + table[places] + modality)
        start += part.shape[1]
    mask = torch.cat(list(masks), dim=1)
    return torch.where(mask[..., None], torch.cat(parts, dim=1), 0.0), mask


# %% wrong="assemble" name="no_modality" says="The modality embedding is missing: add row m of modalities to every token of modality m."
def assemble(tokens, masks, positions, modalities):
    parts = [part + table[: part.shape[1]] for part, table in zip(tokens, positions)]
    mask = torch.cat(list(masks), dim=1)
    return torch.where(mask[..., None], torch.cat(parts, dim=1), 0.0), mask


# %% wrong="assemble" name="one_modality_for_all" says="You add the same row of modalities to all tokens, which tells nobody anything. Row m belongs to the tokens of modality m."
def assemble(tokens, masks, positions, modalities):
    parts = [
        part + table[: part.shape[1]] + modalities[0] for part, table in zip(tokens, positions)
    ]
    mask = torch.cat(list(masks), dim=1)
    return torch.where(mask[..., None], torch.cat(parts, dim=1), 0.0), mask


# %% wrong="assemble" name="no_positions" says="The positions are missing: without them a sentence is a bag of words and a picture a bag of patches."
def assemble(tokens, masks, positions, modalities):
    parts = [part + modality for part, modality in zip(tokens, modalities)]
    mask = torch.cat(list(masks), dim=1)
    return torch.where(mask[..., None], torch.cat(parts, dim=1), 0.0), mask


# %% wrong="assemble" name="multiplies" says="You multiply by the mask. 0 times NaN is NaN, so a missing modality that holds NaN spoils everything: pick with torch.where."
def assemble(tokens, masks, positions, modalities):
    parts = [
        part + table[: part.shape[1]] + modality
        for part, table, modality in zip(tokens, positions, modalities)
    ]
    mask = torch.cat(list(masks), dim=1)
    return torch.cat(parts, dim=1) * mask[..., None], mask


# %% wrong="assemble" name="hides_too_early" says="You empty the padding before you add position and modality, so it is not empty afterwards. Hide last."
def assemble(tokens, masks, positions, modalities):
    parts = [
        torch.where(mask[..., None], part, 0.0) + table[: part.shape[1]] + modality
        for part, mask, table, modality in zip(tokens, masks, positions, modalities)
    ]
    return torch.cat(parts, dim=1), torch.cat(list(masks), dim=1)


# %% wrong="assemble" name="adds_in_place" says="You add into the caller's tokens (+=), so a second call with them gives another result. Make a new tensor: x = x + ..."
def assemble(tokens, masks, positions, modalities):
    for part, table, modality in zip(tokens, positions, modalities):
        part += table[: part.shape[1]] + modality
    mask = torch.cat(list(masks), dim=1)
    return torch.where(mask[..., None], torch.cat(list(tokens), dim=1), 0.0), mask


# %% wrong="assemble" name="never_hides" says="The padding is still there: where the mask is False the sequence must be exactly 0."
def assemble(tokens, masks, positions, modalities):
    parts = [
        part + table[: part.shape[1]] + modality
        for part, table, modality in zip(tokens, positions, modalities)
    ]
    return torch.cat(parts, dim=1), torch.cat(list(masks), dim=1)


# %% [markdown]
# ### See or hear?
#
# A task that needs all three: the model gets a written question, a picture of a digit and a spoken
# digit, another one. *which digit do you see*, or *which digit do you hear*? Your merges cut the
# question, your `patchify` the picture, your log-mel the sound; a spectrogram is a picture, so
# `patchify` cuts that too, into strips as high as all bands and six frames wide.


# %%
def sound_tokens(dataset, samples=6_528, frames=6, **mel):
    """Cut sounds into strips of log-mel [B, L, n_mels * frames]; the mask is True where sound is."""
    waves = F.pad(dataset.waveforms, (0, max(0, samples - dataset.waveforms.shape[1])))[:, :samples]
    bands = log_mel(waves, **mel)
    bands = bands[..., : bands.shape[-1] // frames * frames]
    bands = (bands + 4) / 5  # about mean 0 and spread 1 on these sounds
    tokens = patchify(bands[:, None], bands.shape[1], frames)
    step = frames * mel.get("hop", HOP)
    lengths = (dataset.lengths / step).ceil().clamp(min=1)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def picture_tokens(dataset, side=4):
    """Cut pictures into patches; all of them are real."""
    tokens = patchify(dataset.images, side, side)
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)


# %% tags=["experiment"]
vocabulary = list(dict.fromkeys([*FIRST_TOKENS, *("".join(pair) for pair in merges)]))
number_of = {token: i for i, token in enumerate(vocabulary)}
for split, dataset in (("train", train_sounds), ("test", test_sounds)):
    strips, is_sound = sound_tokens(dataset)
    print(
        f"{split}: strips {tuple(strips.shape)}, {is_sound.float().sum(1).mean():.1f} real ones, "
        f"mean {strips[is_sound].mean():.2f}, spread {strips[is_sound].std():.2f}"
    )
for question in ("which digit do you see", "which digit do you hear"):
    print(question, "→", tokenize(question, merges))

# %% tags=["experiment"]
picture = train_digits.images[int((train_digits.labels == 7).nonzero()[0])]
question = tokenize("which digit do you hear", merges)
strips, is_sound = sound_tokens(train_sounds)
pieces = [("text", token.replace("</w>", "·")) for token in question]
pieces += [("picture", patch.view(4, 4)) for patch in patchify(picture[None], 4, 4)[0]]
pieces += [("sound", strip.view(N_MELS, 6)) for strip in strips[seven]]
colours = {"text": BLUE, "picture": GREEN, "sound": ORANGE}


def draw_piece(axis, kind, piece, real):
    """Draw one token: letters, pixels, or log-mel; grey where there is nothing."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=colours[kind], linewidth=2)
    if not real:
        axis.set_facecolor("#CCCCCC")
    elif kind == "text":
        axis.text(0.5, 0.5, piece, ha="center", va="center", rotation=90)
    elif kind == "picture":
        axis.imshow(piece, cmap="gray_r", vmin=0, vmax=1)
    else:
        axis.imshow(piece, origin="lower", aspect="auto", vmin=-2.2, vmax=2.2)


# %% tags=["experiment"]
figure = plt.figure(figsize=(11, 4.6))
figure.suptitle("One row of three modalities: content, position P, modality e", y=1.07)
figure.text(0.2, 0.8, '"which digit do you hear"', ha="center", size=12, color=BLUE)
axis = figure.add_axes((0.43, 0.66, 0.13, 0.32), xticks=[2 * 1.75], yticks=[3.5])
axis.imshow(picture[0], cmap="gray_r")
axis.grid(color=GREEN, linewidth=2)
axis = figure.add_axes((0.66, 0.66, 0.3, 0.32), xticks=[6 * n - 0.5 for n in range(9)], yticks=[])
heard = torch.cat([piece for kind, piece in pieces if kind == "sound"], dim=1)
axis.imshow(heard, origin="lower", aspect="auto")
axis.grid(color=ORANGE, linewidth=2)
for axis in figure.axes:
    axis.tick_params(length=0, labelbottom=False, labelleft=False)
for place, (kind, piece) in enumerate(pieces):
    inside = place - [k for k, _ in pieces].index(kind)
    real = kind != "sound" or bool(is_sound[seven, inside])
    left, width = place / len(pieces), 0.85 / len(pieces)
    draw_piece(figure.add_axes((left, 0.28, width, 0.26)), kind, piece, real)
    for row, text in enumerate((f"P{inside}", f"e{list(colours).index(kind)}", place)):
        figure.text(left + width / 2, 0.2 - 0.07 * row, text, ha="center", color=colours[kind])
for row, text in enumerate(("position in its modality", "modality", "place in the row")):
    figure.text(-0.01, 0.2 - 0.07 * row, text, ha="right", color=GREY)
figure.text(0.5, -0.02, "grey: padding; · ends a word", ha="center", color=GREY)
show(
    figure,
    "tokens",
    """Above: a written question, a seven cut into four patches, its spoken form cut into strips. Below: the
    same pieces in one row of boxes; under each its position in its modality, its modality, its place.""",
)

# %% [markdown]
# *What to see.* To the encoder these are vectors in a row. Under each box stands what is added to
# its content: where it stands in its own modality, $P$, and which one that is, $e$.
#
# Is $e_m$ needed? Four models: (a) picture and sound, with $e_m$; (b) the same without; (c) two
# pictures, left and right, which share one matrix and one table of positions, with $e_m$; (d) the
# same without.
#
# > **Predict** all four. For (d) there is a ceiling that you can compute: suppose it reads every
# > digit perfectly.


# %%
class JointReader(nn.Module):
    """Embed three streams, put your sequence before one encoder, answer at the first word."""

    def __init__(self, widths, lengths, modality=True, shared=False, d_model=48, num_layers=2):
        super().__init__()
        self.words = nn.Embedding(len(vocabulary), d_model)
        self.first = nn.Linear(widths[0], d_model, bias=False)
        self.second = self.first if shared else nn.Linear(widths[1], d_model, bias=False)
        tables = [nn.Parameter(0.1 * torch.randn(n, d_model)) for n in (16, *lengths)]
        self.positions = nn.ParameterList(tables[:2] + tables[1:2] if shared else tables)
        start = 0.1 * torch.randn(3, d_model) * modality
        self.modalities = nn.Parameter(start, requires_grad=modality)
        self.encoder = Encoder(num_layers, d_model, 4, 2 * d_model)
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, 10)

    def forward(self, ids, first, second, masks):
        tokens = [self.words(ids), self.first(first), self.second(second)]
        x, mask = assemble(tokens, masks, list(self.positions), self.modalities)
        return self.head(self.norm(self.encoder(x, mask[:, None, None])[:, 0]))


# %%
class Stream:
    """One modality of a set: tokens, masks, labels."""

    def __init__(self, tokens_and_masks, labels):
        self.tokens, self.masks = tokens_and_masks
        self.labels = labels

    def draw(self, count, generator):
        rows = torch.randint(len(self.labels), (count,), generator=generator)
        return self.tokens[rows], self.masks[rows], self.labels[rows]


def draw_questions(questions, first, second, count, generator):
    """Draw a question, an example of each stream, and the label that is asked for."""
    ids, is_word = questions
    asked = torch.randint(2, (count,), generator=generator)
    (x, x_mask, a), (y, y_mask, b) = first.draw(count, generator), second.draw(count, generator)
    inputs = ids[asked], x, y, [is_word[asked], x_mask, y_mask]
    return inputs, torch.where(asked == 0, a, b), asked


# %% tags=["experiment"]
def as_ids(texts):
    """Turn texts into ids, filled up with 0 to one length, and a mask."""
    rows = [[number_of[token] for token in tokenize(text, merges)] for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows])
    return ids, torch.arange(int(max(lengths))) < lengths[:, None]


def streams(pictures, sounds, **mel):
    """Tokenize both sets with your code."""
    seen = Stream(picture_tokens(pictures), pictures.labels)
    return {"picture": seen, "sound": Stream(sound_tokens(sounds, **mel), sounds.labels)}


learn, test = streams(train_digits, train_sounds), streams(test_digits, test_sounds)
ASKED = {
    "sound": as_ids(["which digit do you see", "which digit do you hear"]),
    "picture": as_ids(["which digit is left", "which digit is right"]),
}


# %% tags=["experiment"]
def joint_loss(model, batch):
    return F.cross_entropy(model(*batch[0]), batch[1])


def joint_run(second, modality, seed, steps=140):
    """Train on a picture and a second stream; return the model and its score on each question."""
    set_seed(seed)
    pair, exam = (learn["picture"], learn[second]), (test["picture"], test[second])
    sizes = [[s.tokens.shape[axis] for s in pair] for axis in (2, 1)]
    model = JointReader(*sizes, modality=modality, shared=second == "picture").to(device)
    generator = torch.Generator().manual_seed(seed)
    batches = iter(lambda: draw_questions(ASKED[second], *pair, 64, generator)[:2], None)
    fit(model, batches, joint_loss, steps=steps, lr=5e-3, device=device, progress=False)
    return model, joint_score(model, ASKED[second], exam)


@torch.no_grad()
def joint_score(model, questions, pair, missing=None):
    """Return the accuracy on each of two questions; one stream may be missing."""
    drawn = draw_questions(questions, *pair, 1000, torch.Generator().manual_seed(99))
    (ids, first, second, masks), answers, asked = drawn
    if missing is not None:
        masks[missing] = torch.zeros_like(masks[missing])
    guesses = model(*(x.to(device) for x in (ids, first, second)), [m.to(device) for m in masks])
    right = (guesses.argmax(dim=1).cpu() == answers).float()
    return [right[asked == question].mean().item() for question in (0, 1)]


# %% tags=["experiment"]
ARMS = {
    "(a) picture and sound, with e": ("sound", True),
    "(b) picture and sound, without": ("sound", False),
    "(c) two pictures, with e": ("picture", True),
    "(d) two pictures, without": ("picture", False),
}
joint = {}
for name, (second, modality) in ARMS.items():
    joint[name] = [joint_run(second, modality, seed) for seed in (SEED, SEED + 1)]
    both = torch.tensor([scores for _, scores in joint[name]])
    first, other = (mean_and_spread(column.tolist()) for column in both.T)
    print(f"{name:31} first question {first}, second question {other}")

# %% tags=["experiment"]
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for place, runs in enumerate(joint.values()):
    for question, colour in enumerate((GREEN, ORANGE)):
        scores = [scores[question] for _, scores in runs]
        left = place + 0.3 * question - 0.15
        label = (
            ("asked to see, or left", "asked to hear, or right")[question] if not place else None
        )
        axis.bar(left, sum(scores) / 2, 0.27, color=colour, alpha=0.45, label=label)
        axis.plot([left] * 2, scores, "o", color=colour, markersize=4)
axis.axhline(0.55, color=GREY, linestyle=":")
axis.text(3.42, 0.56, "cannot tell which: 0.55", ha="right", va="bottom", color=GREY)
axis.set_xticks(range(4), [name.replace(", ", ",\n") for name in joint])
axis.set(ylabel="accuracy on unseen examples", ylim=(0, 1.25))
axis.legend(ncols=2, loc="upper center")
axis.set_title("The modality embedding matters only where nothing else tells the streams apart")
show(
    figure,
    "joint",
    """Pairs of bars for four models: picture and sound with and without the modality embedding are about
    equally high; two pictures are high with it and near 0.55 without it. Dots are seeds.""",
)

# %% [markdown]
# *What to see.* (a) and (b) are equal up to the seeds. Look at the formula: where a modality has
# its *own* position table, $P_m[l] + e_m$ is just another table, and whatever the model can do with
# $e_m$ it can do without. (So ViLT's own type vectors, beside separate position tables, add nothing
# that the tables could not learn. BERT's two sentences share theirs.)
#
# (d) sits close to its ceiling. Exchange the two pictures, and the rows of the sequence are
# permuted and nothing else is changed; attention does not see order (week 1), so the answer cannot
# depend on which is which. A perfect reader names one of the two: right half the time, and always
# when both are the same, which is one pair in ten: $\frac12 + \frac12 \cdot \frac1{10} = 0.55$. The
# law, on the trained model, and what happens when a modality is missing:

# %% tags=["experiment"]
model = joint["(d) two pictures, without"][0][0].cpu()
drawn = draw_questions(ASKED["picture"], *[test["picture"]] * 2, 200, set_seed(SEED))
ids, left, right, masks = drawn[0]
swapped = model(ids, right, left, [masks[0], masks[2], masks[1]])
print(
    f"(d) pictures exchanged: logits change by {(model(ids, left, right, masks) - swapped).abs().max():.0e}"
)
model = joint["(a) picture and sound, with e"][0][0]
for name, missing in (("nothing", None), ("picture", 1), ("sound", 2)):
    see, hear = joint_score(model, ASKED["sound"], (test["picture"], test["sound"]), missing)
    print(f"(a) missing {name:8} right when asked to see {see:.2f}, to hear {hear:.2f}")

# %% [markdown]
# Through your mask a missing modality is simply not there: questions about the other one are
# answered as before or nearly so, those about the missing one are guesses. The model was never
# trained for that; week 8 does it properly.

# %% [markdown]
# ## 7. Are these the tokens that libraries make?
#
# Text: your merges in a `transformers` tokenizer of CLIP's kind. Pictures: your patches and
# PyTorch's convolution. Sound: your bands and `torchaudio`'s.

# %% tags=["experiment"]
from mmlearn.text import BytePairTokenizer

entries = [*vocabulary, "<|startoftext|>", "<|endoftext|>"]
theirs = BytePairTokenizer({t: i for i, t in enumerate(entries)}, merges).to_hf(max_length=1_000)
texts = [*SAID.values(), *list(held_out)[:300], "naïve café, 3 × 5 = 15!", "I'll  say\nΣΊΣΥΦΟΣ ½"]
wanted = [theirs(text, add_special_tokens=False).input_ids for text in texts]
mine = [[number_of[token] for token in tokenize(text, merges)] for text in texts]
print(
    f"text: {sum(a == b for a, b in zip(mine, wanted))} of {len(texts)} texts have transformers' ids"
)

# %% tags=["experiment"]
import torchaudio

from mmlearn.vision import PatchEmbedding

images = torch.rand(5, 3, 32, 32)
convolution, embedding = nn.Conv2d(3, 48, 8, stride=8), PatchEmbedding(32, 8, 48)
embedding.projection.weight.data = convolution.weight.data.flatten(1)
embedding.projection.bias.data = convolution.bias.data
tokens = patchify(images, 8, 8) @ convolution.weight.flatten(1).T + convolution.bias
for name, other in (
    ("torch's Conv2d", convolution(images).flatten(2).transpose(1, 2)),
    ("mmlearn's PatchEmbedding", embedding(images)),
):
    print(f"pictures: largest difference from {name}: {(tokens - other).abs().max():.0e}")
mel = torchaudio.transforms.MelSpectrogram(
    RATE,
    n_fft=N_FFT,
    hop_length=HOP,
    n_mels=N_MELS,
    center=True,
    power=2.0,
    norm=None,
    mel_scale="htk",
)(clips)
ours = bank @ centred(clips, N_FFT, HOP)
difference = (ours - mel).abs().max() / mel.max()
print(f"sound: largest difference from torchaudio's, of its largest value: {difference:.0e}")

# %% [markdown]
# "Log-mel" names a family. Slaney's mel scale is straight up to 1,000 Hz and a logarithm above; his
# norm divides each triangle by half its width; some take the magnitude, the root of the power. The
# same words with other members of the family (a nat is a factor of $e$):

# %% tags=["experiment"]
from mmlearn.audio import log_mel as reference_log_mel

sizes = {"sample_rate": RATE, "n_fft": N_FFT, "hop_length": HOP, "n_mels": N_MELS}
family = {
    "yours, centred": {},
    "Slaney's scale": {"mel_scale": "slaney"},
    "Slaney's scale and norm": {"mel_scale": "slaney", "norm": "slaney"},
    "magnitude instead of power": {"power": 1.0},
}
for name, change in family.items():
    other = reference_log_mel(clips, MelConfig(**sizes, **change))
    difference = (other - (ours + 1e-6).log()).abs()
    mean, most = difference.mean(), difference.max()
    print(f"{name:27} differs from yours by {mean:.2f} nats on average, at most {most:.1f}")

# %% [markdown]
# Each is right, and a model trained on one fails on another in silence. Take the feature extractor
# that was published with the weights, never "a" mel spectrogram.

# %% [markdown]
# ## Questions to answer in your own words
#
# These two are read by a person. A few sentences each.

# %% [markdown] written="what_is_lost" points=2
# **A team has one log-mel tokenizer (8,000 Hz, 24 bands, a frame every 16 ms) and wants to use it
# for three tasks: recognise commands; tell from two microphones where a speaker stands; tell two
# violins apart by their overtones above 5,000 Hz. For which is it fit, and what is missing for the
# others?**
#
# ### BEGIN SOLUTION
# Commands: fit; words differ in the envelope of the spectrum, which 24 bands keep. Direction:
# hardly fit; most of it lies in the delay between the microphones, fractions of a millisecond, that
# is in the phase, which the power throws away (differences of level survive and help a little);
# keep the complex spectrum or the waveform. Violins: unfit, since at 8,000 Hz nothing above 4,000
# Hz is in the samples (or, without a low-pass, it is folded down to wrong frequencies), and wide
# bands merge high harmonics anyway; take a higher rate and more bands.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: direction needs phase (or delay), which power drops, though level differences survive;
#   commands need only the envelope.
# - 1 point: nothing above half the sampling rate survives (4,000 Hz), whatever the bands; folding
#   counts, too.
# ### END MARK SCHEME

# %% [markdown] written="adapt" points=2
# **You have a transformer encoder trained on text. What must you add so that it takes pictures and
# sound as well, what stays as it is, and where is a modality embedding really needed?**
#
# ### BEGIN SOLUTION
# Add for each modality a tokenizer that cuts it into pieces, a matrix (or small network) to the
# encoder's width D, positions of its own, and masks for padding and missing modalities; watch the
# length, since cost grows with its square. Attention, MLPs and norms stay: they never ask what a
# token was. A modality embedding is needed where streams share projection and positions, such as
# two pictures or two sentences; with tables of its own a modality is told apart anyway, because the
# embedding is absorbed by them.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: tokenizer, projection to width D, positions (and mask); the blocks stay.
# - 1 point: the embedding is absorbed by own tables, and needed for shared ones, with a reason or
#   the 0.55.
# ### END MARK SCHEME

# %% [markdown]
# ## Go bigger
#
# With `SCALE = "gpu"` this trains *see or hear* at real sizes: 28 × 28 pixels, 16,000 Hz, 80 bands,
# six layers, and with `DATA = "hub"` on MNIST and on digits spoken by people. Things to try: voices
# that were not in the training set; patches of 7, 14 and 28 pixels; samples instead of log-mel.


# %% tags=["experiment"]
def go_bigger(pictures, sounds, exams, steps, size, side=7, d_model=256, num_layers=6):
    """Train on (pictures, sounds), return the accuracy on each question of the exams."""
    rate = sounds.sampling_rate
    mel = {"samples": rate, "n_mels": 80, "n_fft": rate // 40, "hop": rate // 100, "rate": rate}
    pairs = []
    for images, voices in ((pictures, sounds), exams):
        seen = Stream(picture_tokens(images, side), images.labels)
        pairs.append((seen, Stream(sound_tokens(voices, **mel), voices.labels)))
    set_seed(SEED)
    widths, lengths = ([s.tokens.shape[axis] for s in pairs[0]] for axis in (2, 1))
    model = JointReader(widths, lengths, d_model=d_model, num_layers=num_layers).to(device)
    generator = torch.Generator().manual_seed(SEED)
    batches = iter(lambda: draw_questions(ASKED["sound"], *pairs[0], size, generator)[:2], None)
    run = fit(model, batches, joint_loss, steps=steps, lr=5e-4, device=device)
    return joint_score(model, ASKED["sound"], pairs[1]), run


# %% tags=["experiment"]
if SCALE == "gpu":
    images = [digits.load(part, source=DATA, pixels=28) for part in ("train", "test")]
    voices = [speech.load(part, source=DATA) for part in ("train", "test")]
    sets = images[0], voices[0], (images[1], voices[1])
    (see, hear), run = go_bigger(*sets, steps=3_000, size=256)
    print(f"right when asked to see {see:.3f}, to hear {hear:.3f}, after {run.seconds:.0f} s")
else:
    print("SCALE is 'cpu': set it to 'gpu' in the first cells to run this part.")

# %% [markdown]
# ## What was new
#
# | idea | in one line | where it stands in `mmlearn` |
# |---|---|---|
# | byte-pair encoding | join the most frequent neighbours; apply in the order learned | `text.learn_merges`, `text.BytePairTokenizer` |
# | patches | a convolution whose stride is its kernel | `vision.PatchEmbedding` |
# | convolutional stem | the same tokens, with overlap and shared filters | `vision.ConvStem` |
# | power spectrogram | frames, window, Fourier; forgets phase | `audio.spectrogram` |
# | aliasing | above half the rate, tones fold down | `audio.resample` |
# | log-mel | corners equal in mel, triangles in hertz, logarithm | `audio.mel_filterbank`, `audio.log_mel` |
# | Griffin-Lim | guess phases that agree where frames overlap | `audio.griffin_lim` |
# | modality embedding | says whose token it is; absorbed by tables of one's own | `fusion.StreamEmbedding` |
#
# **Beside the papers.** *Shuffled pixels.* On ImageNet, one permutation for all pictures takes
# ResNet-50 from 73.5 to 39.4% and ViT-B/16 from 76.7 to 61.7% (Jaegle 2021, tables 1 and 2, both
# with Fourier features as input). Yours fall likewise; but the paper's patches lose less than its
# convolutions, and yours end near guessing. The shuffle takes apart what shared a patch, your
# digits wander over the canvas, and your pixels carry no features of where they came from, which
# theirs do. *Convolutions.* Xiao 2021 gain 1 to 2 points on ImageNet (abstract), you tens of points
# on digits that wander: the fewer the steps, the more a built-in prior is worth. *Positions.* ViT
# scores 64.2% with and 61.4% without them, five pictures
# a class (Dosovitskiy 2021, appendix D.4, table 8): 196 patches of
# a photograph say much by themselves.

# %% [markdown]
# ## Interview questions
#
# <details><summary><b>How is a transformer adapted to several modalities, on the input side?</b></summary>
#
# Each modality gets a tokenizer: byte pairs looked up in a table; 16 × 16 patches times a matrix
# (196 tokens for 224 × 224 pixels); log-mel frames or patches of them (Whisper: 80 bands, 25 ms
# windows every 10 ms, halved by a convolution: 1,500 tokens for 30 s; Radford 2022, section 2.2).
# All become vectors of width D, with positions of their own and, where projections or positions are
# shared, a modality embedding. Then one sequence with one mask; the blocks do not change. Cost
# grows with the square of the summed length.
#
# *Asked next:* how large a vocabulary? Larger means shorter rows and a larger table, whose rare
# rows see little training; CLIP has 49,152 (Radford 2021, section 2.4). Byte pairs merge by count;
# WordPiece (BERT) chooses merges by how much likelier they make the corpus and cuts longest first;
# Unigram starts large and prunes.
#
# *Often said wrongly:* that the modality embedding is what makes it multimodal. With separate
# tables it is absorbed by them (figure of section 6: no difference); with shared ones all hangs on
# it (at most 0.55 without).
#
# </details>
# <details><summary><b>From microphone to log-mel: name the steps, and what each one loses.</b></summary>
#
# Low-pass and sample at r: everything above r/2 is gone, or folded if the low-pass is missing.
# Frames of 25 ms every 10 ms, Hann window: moments blur to 25 ms, frequencies to about 1.44/25 ms =
# 58 Hz. Squared length of the Fourier transform: phase is gone, the sign, too. Mel triangles: fine
# structure above a kilohertz or so, hence the pitch of high harmonics. Logarithm: nothing, but its
# offset hides faint sound. Griffin-Lim finds a sound with nearly the same spectrogram and another
# waveform (Griffin and Lim 1984; section 5).
#
# *Often said wrongly:* that there is one mel scale (HTK's and Slaney's differ), or that mel loses
# the phase (the squared length does).
#
# </details>
# <details><summary><b>Patches or convolutions at the entrance of a vision transformer?</b></summary>
#
# A patch embedding *is* a convolution, with stride equal to kernel: no overlap, one linear layer.
# It loses no number when D ≥ 3p² (ViT-B/16: 768 = 768), but knows only which pixels share a patch;
# the rest it must learn. A few 3 × 3 convolutions of stride 2 make the same tokens, train more
# stably, and gain 1 to 2 points on ImageNet at equal cost (Xiao 2021, abstract); here tens of
# points after 150 steps. In ViT's own comparison hybrids lead at small compute, and the lead
# vanishes for larger models (Dosovitskiy 2021, section 4.4).
#
# *Asked next:* a larger picture at test has more patches; the matrix stays, the table of positions
# is interpolated (Dosovitskiy 2021, section 3.2).
#
# *Often said wrongly:* that a ViT has no notion of nearness (cutting is one), or that the order of
# the pixels inside a patch matters to it (figure of section 3).
#
# </details>

# %% [markdown]
# ## Papers
#
# - Sennrich, Haddow, Birch 2016, [Neural Machine Translation of Rare Words with Subword
#   Units](https://arxiv.org/abs/1508.07909): section 3.2, algorithm 1 (there `</w>` is a symbol of
#   its own; in CLIP's tokenizer, as here, it is part of the last letter).
# - Radford et al. 2021, [Learning Transferable Visual Models From Natural Language
#   Supervision](https://arxiv.org/abs/2103.00020): section 2.4, lower-cased byte pairs.
# - Petrov et al. 2023, [Language Model Tokenizers Introduce Unfairness Between
#   Languages](https://arxiv.org/abs/2305.15425): abstract.
# - Dosovitskiy et al. 2021, [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929):
#   section 3.1, equation 1 and "Inductive bias"; sections 3.2, 4.3, 4.4; appendix D.4.
# - Xiao et al. 2021, [Early Convolutions Help Transformers See
#   Better](https://arxiv.org/abs/2106.14881): section 3.
# - Jaegle et al. 2021, [Perceiver: General Perception with Iterative
#   Attention](https://arxiv.org/abs/2103.03206): tables 1 and 2.
# - Radford et al. 2022, [Robust Speech Recognition via Large-Scale Weak
#   Supervision](https://arxiv.org/abs/2212.04356): section 2.2.
# - Gong, Chung, Glass 2021, [AST: Audio Spectrogram Transformer](https://arxiv.org/abs/2104.01778):
#   section 2.1, spectrograms as pictures.
# - Griffin and Lim 1984, [Signal Estimation from Modified Short-Time Fourier
#   Transform](https://doi.org/10.1109/TASSP.1984.1164317).
# - Kim, Son, Kim 2021, [ViLT: Vision-and-Language Transformer Without Convolution or Region
#   Supervision](https://arxiv.org/abs/2102.03334): section 3.1, modal-type embeddings.
# - Zhang et al. 2023, [Meta-Transformer: A Unified Framework for Multimodal
#   Learning](https://arxiv.org/abs/2307.10802): section 3.2, one scheme, shown on text, pictures,
#   point clouds and sound; twelve modalities in all.
