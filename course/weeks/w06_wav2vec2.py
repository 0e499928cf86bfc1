# %% [markdown]
# # Week 6. What can be learned from sound without labels?
#
# Somebody has to listen to a recording before it has a transcript; nobody has to do anything
# before it has none. Most languages have many hours of the second kind and hardly any of the first.
# wav2vec 2.0 learns from sound alone, with a game: *a stretch of the recording is hidden; which of
# these sounds was there?*
#
# **You will build** the convolutions that turn a wave into 49 frames a second, the spans that hide
# half of them, the network that looks around the gaps, the distractors and the loss. **You will
# measure** whether such a model, which was never told a word, hears words better than a
# spectrogram does: from one label a word to twenty-five, in voices that it never met.
#
# Two hours; about a minute of computing on a laptop's processor. You need week 1's attention and
# week 3's contrastive loss.

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"
SCALE = "cpu"
DATA = "embedded"

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from mmlearn.audio import MelConfig, log_mel
from mmlearn.data import speech
from mmlearn.figures import BLUE, GREEN, GREY, ORANGE, RED, set_style, show
from mmlearn.metrics import mean_and_spread
from mmlearn.train import choose_device, fit, set_seed
from mmlearn.transformer import Encoder
from mmlearn.wav2vec2 import PositionalConv, prepare_waveforms

torch.set_num_threads(1)  # models this small are faster on one thread than on two
device = choose_device(DEVICE)
set_style()

# %% [markdown]
# ## 1. Sound, and nothing else
#
# The unlabelled set: 1,200 recordings of two or three words each, by 23 synthetic voices, 8,000
# numbers a second. The set has transcripts, and we shall not open them. For the examination at the
# end there are single words with labels, and five voices that occur nowhere else.

# %% tags=["experiment"]
sizes = {"words": "both", "sampling_rate": 8000, "seed": SEED}
unlabelled = speech.load("train", sequences=3, **sizes)
labelled = speech.load("train", **sizes)
unheard = speech.load("unheard", **sizes)
for split in (unlabelled, labelled, unheard):
    print(split.describe().split(", such as")[0])

# %% [markdown]
# Each recording is brought to mean 0 and variance 1 over its own samples, as the paper's section 2
# says. How near somebody stood to the microphone is then no clue to anything.


# %%
def standardised(words):
    """Return the waveforms (B, samples) at mean 0 and variance 1, silent where padded."""
    sounds = [row[:length] for row, length in zip(words.waveforms, words.lengths.tolist())]
    rate = words.sampling_rate
    return prepare_waveforms(sounds, sampling_rate=rate, wanted_rate=rate).waveforms


# %% [markdown]
# ## 2. From 16,000 samples to 49 frames
#
# A convolution of kernel $k$ and stride $s$ reads $k$ numbers, writes one, and moves on by $s$. Let
# it read $L$ numbers. Its windows begin at $0, s, 2s, \dots$, and the last one must begin at $L -
# k$ or before. So it writes
#
# $$ L' = \Big\lfloor \frac{L - k}{s} \Big\rfloor + 1 . $$
#
# Seven of them in a row are wav2vec 2.0's ear: kernels 10, 3, 3, 3, 3, 2, 2 and strides 5, 2, 2, 2,
# 2, 2, 2. The strides multiply, so frames are $5 \cdot 2^6 = 320$ samples apart, 20 ms at 16 kHz.
#
# How many samples does *one* frame hear? Walk backwards. One frame is one output of the last layer.
# If a layer's outputs that matter are $r$ in a row, their windows begin $(r - 1)s$ apart, and the
# last one is $k$ long:
#
# $$ r \;\leftarrow\; (r - 1)\,s + k, \qquad \text{from the last layer to the first, beginning with } r = 1 . $$
#
# > **Predict.** 16,000 samples, one frame every 320: how many frames does a second give?

# %% [markdown] exercise="geometry" difficulty=1 minutes=10
# ### Exercise 1: what a frame hears
#
# Write two functions. `kernels` and `strides` are tuples of whole numbers, first layer first.
#
# | function | returns |
# |---|---|
# | `receptive_field(kernels, strides)` | a pair: the samples that one frame hears, the samples from one frame to the next |
# | `count_frames(samples, kernels, strides)` | how many frames come out of so many samples; 0 if they are too few for one |
#
# *Afterwards you can say:* "400 samples, 25 ms, every 320 samples, 20 ms. A second at 16 kHz gives
# 49 frames and not 50, because the last window must fit."
#
# <details><summary>Hint 1</summary>
#
# `receptive_field` goes from the last layer to the first: `zip(reversed(kernels),
# reversed(strides))`. The hop is the product of all strides: `math.prod`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# In Python `//` rounds down, also below zero: $(3 - 10) // 5$ is $-2$. A count is never negative.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     field = 1
#     for each layer, last one first: field = (field - 1) times stride + kernel
#
#     for each layer, first one first: samples = (samples - kernel) // stride + 1, at least 0
#
# </details>


# %% answer="geometry"
def receptive_field(kernels, strides):
    """Return how many samples one frame hears, and how many lie from one frame to the next."""
    ### BEGIN SOLUTION
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        field = (field - 1) * stride + kernel
    return field, math.prod(strides)
    ### END SOLUTION


def count_frames(samples, kernels, strides):
    """Return how many frames come out of so many samples."""
    ### BEGIN SOLUTION
    for kernel, stride in zip(kernels, strides):
        samples = max(0, (samples - kernel) // stride + 1)
    return samples
    ### END SOLUTION


# %% check="geometry" aspect="example" points=1 title="two layers, on paper"
from mmlearn.feedback import expect

expect(
    "w06_wav2vec2/geometry/field",
    list(receptive_field((4, 3), (3, 2))),
    [10, 6],
    "One frame reads 3 outputs of the first layer. Their windows begin at 0, 3 and 6, and the last "
    "one is 4 long: samples 0 to 9. Frames are 3 times 2 samples apart.",
)
expect(
    "w06_wav2vec2/geometry/frames",
    count_frames(21, (4, 3), (3, 2)),
    2,
    "The first layer's windows begin at 0, 3, 6, 9, 12 and 15: six outputs. The second's begin at 0 "
    "and 2; one at 4 would need a seventh.",
)
### BEGIN HIDDEN TESTS
taps, steps = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
assert list(receptive_field(taps, steps)) == [400, 320], "the paper: 400 samples, 320 apart"
assert count_frames(16_000, taps, steps) == 49, "the paper: 49 frames a second"
assert isinstance(count_frames(16_000, taps, steps), int), "frames are counted in whole numbers"
assert count_frames(250_000, taps, steps) == 781, "a crop of 15.6 s"
assert list(receptive_field((10, 8, 4, 4, 4), (5, 4, 2, 2, 2))) == [465, 160], "wav2vec, 2019"
### END HIDDEN TESTS

# %% check="geometry" aspect="law" points=1 title="real convolutions agree"
### BEGIN HIDDEN TESTS
import torch

for taps, steps in (((5, 3, 2), (2, 3, 1)), ((7,), (4,)), ((3, 4, 5, 2), (2, 1, 3, 2))):
    wave = torch.ones(1, 1, 300, requires_grad=True)
    layer = wave
    for kernel, stride in zip(taps, steps):
        layer = torch.nn.functional.conv1d(layer, torch.ones(1, 1, kernel), stride=stride)
    assert count_frames(300, taps, steps) == layer.shape[-1], (taps, steps)
    reached = [
        torch.autograd.grad(layer[0, 0, i], wave, retain_graph=True)[0].flatten().nonzero()
        for i in (0, 1)
    ]
    window, apart = receptive_field(taps, steps)
    assert window == int(reached[0].max() - reached[0].min()) + 1, (taps, steps)
    assert apart == int(reached[1].min()), (taps, steps)
### END HIDDEN TESTS

# %% check="geometry" aspect="limits" points=1 title="one frame needs exactly its receptive field"
from mmlearn.feedback import expect

expect(
    "w06_wav2vec2/geometry/few",
    [count_frames(n, (4, 3), (3, 2)) for n in (0, 3, 9, 10)],
    [0, 0, 0, 1],
    "With 9 samples the first layer writes two outputs and the second needs three: no frame, which "
    "is 0 and never a negative number. With 10 there is one.",
)
### BEGIN HIDDEN TESTS
for taps, steps in (((10, 4, 4, 3), (5, 4, 4, 2)), ((6, 5, 2), (2, 2, 3)), ((9,), (9,))):
    window, apart = receptive_field(taps, steps)
    for more in range(3):
        assert count_frames(window + more * apart, taps, steps) == 1 + more, (taps, more)
        assert count_frames(window + more * apart - 1, taps, steps) == more, (taps, more)
    assert [count_frames(n, taps, steps) for n in range(window)] == [0] * window, taps
### END HIDDEN TESTS


# %% wrong="geometry" name="samples_over_hop" says="You divided the samples by the hop. That would be right for windows as long as the hop; the last window must fit as a whole, so go layer by layer."
def receptive_field(kernels, strides):
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        field = (field - 1) * stride + kernel
    return field, math.prod(strides)


def count_frames(samples, kernels, strides):
    return samples // math.prod(strides)


# %% wrong="geometry" name="forwards" says="You walked from the first layer to the last. What a frame hears is found backwards: begin at the frame, and ask each layer what it read."
def receptive_field(kernels, strides):
    field = 1
    for kernel, stride in zip(kernels, strides):
        field = (field - 1) * stride + kernel
    return field, math.prod(strides)


def count_frames(samples, kernels, strides):
    for kernel, stride in zip(kernels, strides):
        samples = max(0, (samples - kernel) // stride + 1)
    return samples


# %% wrong="geometry" name="kernels_only" says="You added up the kernels as if every stride were 1. A window that jumps by s samples stretches everything after it by s."
def receptive_field(kernels, strides):
    return 1 + sum(kernel - 1 for kernel in kernels), math.prod(strides)


def count_frames(samples, kernels, strides):
    for kernel, stride in zip(kernels, strides):
        samples = max(0, (samples - kernel) // stride + 1)
    return samples


# %% wrong="geometry" name="no_plus_one" says="The window that begins at 0 counts, too: add one after the division."
def receptive_field(kernels, strides):
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        field = (field - 1) * stride + kernel
    return field, math.prod(strides)


def count_frames(samples, kernels, strides):
    for kernel, stride in zip(kernels, strides):
        samples = max(0, (samples - kernel) // stride)
    return samples


# %% wrong="geometry" name="negative" says="For too few samples your count goes below zero. Stop at 0."
def receptive_field(kernels, strides):
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        field = (field - 1) * stride + kernel
    return field, math.prod(strides)


def count_frames(samples, kernels, strides):
    for kernel, stride in zip(kernels, strides):
        samples = (samples - kernel) // stride + 1
    return samples


# %% wrong="geometry" name="hop_is_last_stride" says="You returned the last layer's stride as the hop. Each layer's step is counted in outputs of the layer below: the strides multiply."
def receptive_field(kernels, strides):
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        field = (field - 1) * stride + kernel
    return field, strides[-1]


def count_frames(samples, kernels, strides):
    for kernel, stride in zip(kernels, strides):
        samples = max(0, (samples - kernel) // stride + 1)
    return samples


# %% [markdown]
# Our sound has 8,000 samples a second, so our ear is half as large: four layers, and again 49
# frames a second.

# %%
RATE = 8000  # samples a second, and so the samples of a second
KERNELS, STRIDES = (10, 4, 4, 3), (5, 4, 4, 2)
HOP = math.prod(STRIDES)

# %% tags=["experiment"]
ears = {"wav2vec 2.0": ((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), 16_000)}
ears["ours"] = (KERNELS, STRIDES, RATE)
for name, (kernels, strides, rate) in ears.items():
    field, hop = receptive_field(kernels, strides)
    print(
        f"{name}: a frame hears {field} samples ({1000 * field / rate:.1f} ms), the next is {hop} "
        f"later ({1000 * hop / rate:.0f} ms); a second gives {count_frames(rate, kernels, strides)}"
    )

# %% [markdown]
# ## 3. The ear: convolution, norm, GELU
#
# Each layer convolves, normalises and bends:
#
# $$ z = \mathrm{GELU}\big(\mathrm{LayerNorm}(W * x + b)\big) $$
#
# The LayerNorm runs over the *channels* of one frame, so a frame's result depends on what that
# frame heard and on nothing else: not on the end of the sentence, not on the padding.

# %% [markdown] exercise="feature_encoder" difficulty=3 minutes=20 forbids=["mmlearn.wav2vec2.FeatureEncoder", "mmlearn.wav2vec2.ConvLayer"]
# ### Exercise 2: the feature encoder
#
# Write the class. Layer $i$ has `widths[i]` channels, kernel `kernels[i]`, stride `strides[i]`; the
# first one reads one channel, the wave. Keep the convolutions (with bias) in an `nn.ModuleList`
# called `convs` and the norms in one called `norms`: later we copy weights by these names.
#
# | | shape |
# |---|---|
# | `waveforms` | `[B, samples]` |
# | returns | `[B, L, channels]`, channels of the last layer |
#
# *Afterwards you can say:* "No spectrogram is computed: the filters are learned, too. The norm runs
# over channels, not over time. The base model of the paper does it otherwise, and pays for it with
# padding."
#
# <details><summary>Hint 1: shapes</summary>
#
# `nn.Conv1d(width_in, width_out, kernel, stride)` reads `[B, channels, time]`;
# `nn.LayerNorm(width)` normalises the *last* axis. `x.mT` swaps the last two.
#
# </details>
# <details><summary>Hint 2: the widths</summary>
#
# The widths that come in are `(1, *widths[:-1])`. `zip` them with what goes out.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     x = waveforms with an axis for one channel
#     for each convolution and its norm:
#         x = convolution of x
#         x = gelu of the norm over x's channels (swap axes before and after)
#     return x with time before channels
#
# </details>


# %% answer="feature_encoder"
class FeatureEncoder(nn.Module):
    """Turn samples into frames: convolution, LayerNorm over channels, GELU, layer by layer."""

    def __init__(self, widths, kernels, strides):
        super().__init__()
        ### BEGIN SOLUTION
        widths_in = (1, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(*sizes) for sizes in zip(widths_in, widths, kernels, strides)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        ### END SOLUTION

    def forward(self, waveforms):
        """Return the frames of each waveform, [B, L, channels]."""
        ### BEGIN SOLUTION
        x = waveforms.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.gelu(norm(conv(x).mT)).mT
        return x.mT
        ### END SOLUTION


# %% check="feature_encoder" aspect="example" points=2 title="two channels, on paper"
import torch
from mmlearn.feedback import expect

summing = FeatureEncoder((2,), (2,), (2,))
summing.load_state_dict(
    {
        "convs.0.weight": torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]]),
        "convs.0.bias": torch.zeros(2),
        "norms.0.weight": torch.ones(2),
        "norms.0.bias": torch.zeros(2),
    }
)
expect(
    "w06_wav2vec2/feature_encoder/hand",
    summing(torch.tensor([[1.0, 2.0, 3.0, 1.0, 9.0]])),
    torch.tensor([[[0.8413, -0.1587], [0.8413, -0.1587]]]),
    "Sum and difference of each pair: (3, -1) and (4, 2); 9 has no partner. The norm over the two "
    "channels makes (1, -1) of both, and GELU turns that into 0.8413 and -0.1587.",
    atol=1e-3,
)
### BEGIN HIDDEN TESTS
torch.manual_seed(21)
encoder = FeatureEncoder((5, 7, 3), (6, 3, 2), (3, 2, 1))
assert tuple(encoder(torch.randn(4, 100)).shape) == (4, 14, 3), "[B, L, channels]"
assert tuple(encoder(torch.randn(1, 18)).shape) == (1, 1, 3), "one frame from its receptive field"
shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
assert shapes["convs.0.weight"] == (5, 1, 6) and shapes["convs.2.weight"] == (3, 7, 2)
assert shapes["norms.1.weight"] == (7,) and shapes["convs.1.bias"] == (7,)
### END HIDDEN TESTS

# %% check="feature_encoder" aspect="reference" points=1 title="equals the formula, written out layer by layer"
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(22)
encoder = FeatureEncoder((6, 4, 5), (5, 3, 4), (2, 3, 1))
state = {name: torch.randn_like(weight) + 0.5 for name, weight in encoder.state_dict().items()}
encoder.load_state_dict(state)
noise = torch.randn(3, 90)
wanted = noise[:, None].clone()
for i, stride in enumerate((2, 3, 1)):
    weight, bias, gain, shift = (
        state[f"{part}.{i}.{kind}"] for part in ("convs", "norms") for kind in ("weight", "bias")
    )
    wanted = torch.nn.functional.conv1d(wanted, weight, bias, stride)
    wanted = torch.nn.functional.layer_norm(wanted.mT, (len(gain),), gain, shift)
    wanted = torch.nn.functional.gelu(wanted).mT
assert torch.allclose(encoder(noise), wanted.mT, atol=1e-4)
### END HIDDEN TESTS

# %% check="feature_encoder" aspect="law" points=1 title="a frame hears its own samples and no others"
import torch
from mmlearn.feedback import expect

torch.manual_seed(0)
small_ear = FeatureEncoder((4, 3), (4, 3), (3, 2))
short = torch.randn(1, 22)
expect(
    "w06_wav2vec2/feature_encoder/padding",
    bool(
        torch.allclose(
            small_ear(torch.cat([short.clone(), torch.zeros(1, 12)], dim=1))[:, :3],
            small_ear(short.clone()),
            atol=1e-5,
        )
    ),
    True,
    "The same sound with silence after it gave other frames: something looks beyond the samples "
    "that a frame hears.",
)
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(23)
encoder = FeatureEncoder((6, 5), (5, 3), (2, 2))
sound = torch.randn(2, 60)
before = encoder(sound.clone())
assert before.std() > 0.05, "frames differ"
changed = sound.clone()
changed[:, 20:24] += 10.0  # frames hear 9 samples, 4 apart: those from 3 to 5 hear these four
moved = (encoder(changed) - before).abs().amax(dim=(0, 2)) > 1e-4
assert moved.nonzero().flatten().tolist() == [3, 4, 5], "only frames that hear the change notice it"
longer = encoder(torch.cat([sound, 5 * torch.randn(2, 40)], dim=1))
assert torch.allclose(longer[:, : before.shape[1]], before, atol=1e-4)
### END HIDDEN TESTS

# %% check="feature_encoder" aspect="gradient" points=1 title="every weight learns"
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(24)
encoder = FeatureEncoder((6, 4, 5), (4, 3, 2), (2, 2, 2))
noise = torch.randn(3, 80, requires_grad=True)
(encoder(noise) * torch.randn(5)).square().sum().backward()
for name, weight in encoder.named_parameters():
    assert weight.grad is not None and weight.grad.abs().max() > 1e-6, f"{name} does not learn"
assert noise.grad is not None, "no gradient reaches the wave"
assert (noise.grad != 0).any(dim=0).sum() >= 70, "nearly all samples are heard"
### END HIDDEN TESTS


# %% wrong="feature_encoder" name="norm_over_time" says="Your norm runs over time, channel by channel, so a frame depends on the whole recording and its padding. Here it runs over the channels of one frame."
class FeatureEncoder(nn.Module):
    def __init__(self, widths, kernels, strides):
        super().__init__()
        widths_in = (1, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(*sizes) for sizes in zip(widths_in, widths, kernels, strides)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(width, width) for width in widths)

    def forward(self, waveforms):
        x = waveforms.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.gelu(norm(conv(x)))
        return x.mT


# %% wrong="feature_encoder" name="gelu_first" says="You bend before you normalise. The order is convolution, norm, GELU."
class FeatureEncoder(nn.Module):
    def __init__(self, widths, kernels, strides):
        super().__init__()
        widths_in = (1, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(*sizes) for sizes in zip(widths_in, widths, kernels, strides)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, waveforms):
        x = waveforms.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms):
            x = norm(F.gelu(conv(x)).mT).mT
        return x.mT


# %% wrong="feature_encoder" name="no_norm" says="Your layers have norms and do not use them: normalise after each convolution."
class FeatureEncoder(nn.Module):
    def __init__(self, widths, kernels, strides):
        super().__init__()
        widths_in = (1, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(*sizes) for sizes in zip(widths_in, widths, kernels, strides)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, waveforms):
        x = waveforms.unsqueeze(1)
        for conv in self.convs:
            x = F.gelu(conv(x))
        return x.mT


# %% wrong="feature_encoder" name="relu" says="You bend with ReLU. The paper uses GELU, which lets a little of the negative side through: GELU(-1) is -0.1587."
class FeatureEncoder(nn.Module):
    def __init__(self, widths, kernels, strides):
        super().__init__()
        widths_in = (1, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(*sizes) for sizes in zip(widths_in, widths, kernels, strides)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, waveforms):
        x = waveforms.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x).mT)).mT
        return x.mT


# %% wrong="feature_encoder" name="padded" says="You pad the convolutions, so there are frames at the ends that hear invented silence. wav2vec 2.0 pads nothing here: 16,000 samples give 49 frames."
class FeatureEncoder(nn.Module):
    def __init__(self, widths, kernels, strides):
        super().__init__()
        widths_in = (1, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(*sizes, padding=sizes[2] // 2)
            for sizes in zip(widths_in, widths, kernels, strides)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, waveforms):
        x = waveforms.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.gelu(norm(conv(x).mT)).mT
        return x.mT


# %% wrong="feature_encoder" name="channels_first" says="You return [B, channels, L]. The transformer reads rows of frames: swap the last two axes at the end."
class FeatureEncoder(nn.Module):
    def __init__(self, widths, kernels, strides):
        super().__init__()
        widths_in = (1, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(*sizes) for sizes in zip(widths_in, widths, kernels, strides)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, waveforms):
        x = waveforms.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.gelu(norm(conv(x).mT)).mT
        return x


# %% [markdown]
# Your two exercises must agree. Ask the encoder itself which samples a frame hears: the gradient of
# a frame is zero where it hears nothing. Beside our kernels stands a tempting variant, 10, 3, 3, 3,
# a little cheaper at the same strides.
#
# > **Predict.** With kernels of 3 and strides of 4, does every sample reach some frame?


# %% tags=["experiment"]
def heard_by(kernels, frames, samples):
    """How strongly each frame depends on each sample, as a share of its largest dependence."""
    set_seed(SEED)
    encoder = FeatureEncoder((32, 64, 64, 64), kernels, STRIDES)
    sound = samples[None].clone().requires_grad_()
    out = encoder(sound)[0]
    rows = []
    for frame in frames:
        direction = torch.randn(32, out.shape[1])  # any change of the frame will do
        gradients = [
            torch.autograd.grad(out[frame] @ d, sound, retain_graph=True)[0][0] for d in direction
        ]
        rows.append(torch.stack(gradients).abs().mean(dim=0))
    return torch.stack([row / row.max() for row in rows])


# %% tags=["experiment"]
word = standardised(unheard.subset([0]))[0]
frames = (7, 8, 9)
field, _ = receptive_field(KERNELS, STRIDES)
view = slice(frames[0] * HOP - 100, frames[-1] * HOP + field + 100)
dependence = {"10, 4, 4, 3 (ours)": heard_by(KERNELS, frames, word)}
dependence["10, 3, 3, 3"] = heard_by((10, 3, 3, 3), frames, word)
for name, rows in dependence.items():
    middle = slice(frames[1] * HOP, frames[2] * HOP)
    deaf = (rows.amax(dim=0)[middle] == 0).float().mean()
    print(
        f"kernels {name}: frame {frames[0]} hears {int((rows[0] > 0).sum())} samples; "
        f"{deaf:.0%} of all samples reach no frame"
    )

# %% tags=["experiment", "hide-input"]
figure, axes = plt.subplots(3, 1, figsize=(9, 5), sharex=True, layout="constrained")
times = 1000 * torch.arange(len(word)) / RATE
axes[0].plot(times[view], word[view], color="black", lw=0.8)
for frame, colour in zip(frames, (BLUE, ORANGE, GREEN)):
    span = [1000 * n / RATE for n in (frame * HOP, frame * HOP + field)]
    axes[0].axvspan(*span, color=colour, alpha=0.2, label=f"frame {frame}")
for axis, (name, rows) in zip(axes[1:], dependence.items()):
    for row, colour in zip(rows, (BLUE, ORANGE, GREEN)):
        axis.fill_between(times[view], row[view], color=colour, alpha=0.5, lw=0)
    axis.set(
        ylabel="dependence\n(share of largest)", title=f"What each frame depends on, kernels {name}"
    )
axes[0].set(ylabel="pressure\n(standardised)", ylim=(-8, 11))
axes[0].set_title(
    f"Each frame hears {field} samples, {1000 * field / RATE:.0f} ms, and shares a third of them"
)
axes[0].legend(loc="upper right", ncols=3)
axes[2].set_xlabel("time (ms)")
show(
    figure,
    "receptive_field",
    "A wave with three overlapping windows of 31 ms, 20 ms apart; below, the gradient of each frame "
    "fills its window with our kernels, and with kernels of 3 at stride 4 leaves gaps.",
)

# %% [markdown]
# *What to see.* The gradient fills exactly the window that you computed. How much each sample
# counts is, before training, a matter of chance. With kernels shorter than their strides the
# picture has holes: a quarter of the samples is thrown away, and no training can bring them back.
# In the paper every kernel is at least as long as its stride.
#
# **The published base model is different.** "Convolution, layer normalization, GELU" is section 2.
# For the smaller Librispeech set, says section 4.2, there is no layer normalization, and instead of
# the raw wave the *first* layer's output is normalised: in the published code each channel over
# time, with a group norm. `mmlearn` has both. What does padding do to them?

# %% tags=["experiment"]
from mmlearn.wav2vec2 import FeatureEncoder as BothEncoders
from mmlearn.wav2vec2 import Wav2Vec2Config

padded = torch.cat([word[: unheard.lengths[0]], torch.zeros(8000)])
for norm in ("layer", "group"):
    set_seed(SEED)
    ear = BothEncoders(
        Wav2Vec2Config(
            conv_dim=(32, 64, 64, 64),
            conv_kernel=KERNELS,
            conv_stride=STRIDES,
            feat_extract_norm=norm,
            conv_bias=norm == "layer",
        )
    )
    alone, beside = ear(padded[None, :-8000]), ear(padded[None])
    change = (beside[:, : alone.shape[1]] - alone).std() / alone.std()
    print(
        f"{norm}: a second of silence behind a word moves its frames by {change:.0%} of their spread"
    )

# %% [markdown]
# Batches with padding are therefore harmless to one kind of checkpoint and harmful to the other.
# `feat_extract_norm` in the configuration says which it is; the checkpoint's name does not.

# %% [markdown]
# ## 4. What to hide: spans
#
# A model that never sees labels needs a question. BERT's is: which word was hidden here? For sound
# the naive form, hide single frames, is too easy: neighbouring windows overlap, and a mouth moves
# slowly, so a frame is nearly the mean of its neighbours. The better way: hide **spans**. Each
# frame is a start with probability $p$; a start hides itself and the $M - 1$ frames after it; spans
# may overlap. (Section 3.1 draws a fixed share p of the frames, without replacement; appendix A
# speaks of a probability. With a coin for each frame the share is p on average, and the two
# formulas below are exact. fairseq also lets no span begin where it would not fit.)
#
# How much is hidden? A frame stays visible only if none of the last $M$ frames was a start:
#
# $$ q = 1 - (1 - p)^M . $$
#
# How long are the gaps? A gap begins at a start before which $M$ frames were no start, so there are
# $p\,(1-p)^M$ gaps per frame. Hidden frames divided by gaps is the mean length:
#
# $$ \text{mean gap} = \frac{1 - (1-p)^M}{p\,(1-p)^M} . $$
#
# > **Predict**, before you compute: the paper takes $p = 0.065$ and $M = 10$. Is 65% hidden? How long
# > is the mean gap?

# %% tags=["experiment"]
for name, p, length, ms in (("paper", 0.065, 10, 20), ("ours", 0.126, 5, 20)):
    hidden = 1 - (1 - p) ** length
    gap = hidden / (p * (1 - p) ** length)
    print(
        f"{name}: p = {p}, M = {length}: {hidden:.0%} hidden, mean gap {gap:.1f} frames, "
        f"about {gap * ms:.0f} ms"
    )

# %% [markdown]
# In the paper the mean gap lasts 299 ms: 13.7 steps of 20 ms, and a last window of 25 ms. Our words
# last 0.4 s. A gap of 300 ms would swallow most of one, so our spans are half as long, and hide the
# same share.

# %% [markdown] exercise="spans" difficulty=3 minutes=15 forbids=["mmlearn.wav2vec2.sample_spans"]
# ### Exercise 3: spans
#
# Write two functions.
#
# | function | returns |
# |---|---|
# | `spread(starts, length)` | boolean `[B, L]`: `True` at each start and at the `length - 1` frames after it; a span is cut off at the end of the row |
# | `span_mask(batch, frames, p, length, generator)` | boolean `[batch, frames]`: spans whose starts are drawn with probability `p`, for each frame of each recording by itself |
#
# `starts` is boolean `[B, L]` and must stay as it is. Draw with the generator:
# `torch.rand(..., generator=generator)`.
#
# *Afterwards you can say:* "6.5% of the frames *start* a span of ten; overlaps leave 49% hidden, in
# gaps of 14.7 frames, 299 ms. transformers' `mask_time_prob=0.65` is $M$ times that $p$: the share
# if no spans met."
#
# <details><summary>Hint 1</summary>
#
# A frame is hidden if it is a start, or the one before it is, or the one before that. So put
# `length` shifted copies of `starts` on top of each other with `|`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.rand(...) < p` is `True` with probability p. `starts[:, : L - shift]`, moved right by
# `shift`, lands on `[:, shift:]`.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     mask = all False, as large as starts
#     for shift = 0, 1, ..., length - 1 (but less than L):
#         mask from column shift on |= starts without its last shift columns
#
#     starts = uniform random numbers of shape (batch, frames) below p
#     return spread(starts, length)
#
# </details>


# %% answer="spans"
def spread(starts, length):
    """Return True at each start and at the length - 1 frames after it, [B, L]."""
    ### BEGIN SOLUTION
    L = starts.shape[1]
    mask = torch.zeros_like(starts)
    for shift in range(min(length, L)):
        mask[:, shift:] |= starts[:, : L - shift]
    return mask
    ### END SOLUTION


def span_mask(batch, frames, p, length, generator=None):
    """Draw which frames are hidden: spans that begin at each frame with probability p."""
    ### BEGIN SOLUTION
    starts = torch.rand(batch, frames, generator=generator) < p
    return spread(starts, length)
    ### END SOLUTION


# %% check="spans" aspect="example" points=2 title="spans on paper"
import torch
from mmlearn.feedback import expect

few_starts = torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 1]]).bool()
expect(
    "w06_wav2vec2/spans/hand",
    spread(few_starts, 3),
    torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]).bool(),
    "Length 3: each start hides itself and two more. In the second row spans overlap, and the last "
    "one is cut off at the end.",
)
expect(
    "w06_wav2vec2/spans/kept",
    few_starts,
    torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 1]]).bool(),
    "The call changed the starts it was given.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(31)
starts = torch.rand(5, 23, generator=draw) < 0.2
for length in (1, 2, 7, 23, 40):
    wanted = [
        [any(row[max(0, i - length + 1) : i + 1]) for i in range(23)] for row in starts.tolist()
    ]
    given = starts.clone()
    mask = spread(given, length)
    assert mask.dtype == torch.bool and mask.tolist() == wanted, f"length {length}"
    assert given.equal(starts), "starts was changed in place"
### END HIDDEN TESTS

# %% check="spans" aspect="law" points=1 title="as much is hidden as the formula says"
import torch
from mmlearn.feedback import expect

expect(
    "w06_wav2vec2/spans/certain",
    bool(span_mask(2, 6, 1.0, 3, torch.Generator().manual_seed(0)).all()),
    True,
    "With p = 1 every frame is a start, so every frame is hidden.",
)
drawn_spans = span_mask(300, 400, 0.065, 10, torch.Generator().manual_seed(0))
expect(
    "w06_wav2vec2/spans/share",
    [
        bool(0.46 < drawn_spans.float().mean() < 0.51),
        bool(drawn_spans[:, -1].float().mean() > 0.35),
    ],
    [True, True],
    f"With p = 0.065 and M = 10 about 48% is hidden (a little less at the beginning, where fewer "
    f"spans reach), and of the last frames as much; yours: {float(drawn_spans.float().mean()):.0%} "
    f"and {float(drawn_spans[:, -1].float().mean()):.0%}.",
)
### BEGIN HIDDEN TESTS
import torch

for seed, p, length in ((32, 0.03, 8), (33, 0.2, 3), (34, 0.5, 1)):
    mask = span_mask(400, 500, p, length, torch.Generator().manual_seed(seed))
    assert mask.shape == (400, 500) and mask.dtype == torch.bool
    inner = mask[:, length:]
    assert abs(float(inner.float().mean()) - (1 - (1 - p) ** length)) < 0.03, (p, length)
    begins = inner[:, 1:] & ~inner[:, :-1]
    gap = float(inner[:, 1:].float().mean() / begins.float().mean())
    wanted = (1 - (1 - p) ** length) / (p * (1 - p) ** length)
    assert abs(gap / wanted - 1) < 0.1, f"mean gap {gap:.1f}, wanted {wanted:.1f}"
    first = mask[:, 0].float().mean()
    assert abs(float(first) - p) < 0.12, "the first frame is hidden only where it is a start"
    last = mask[:, -1].float().mean()
    assert abs(float(last) - (1 - (1 - p) ** length)) < 0.12, "spans begin up to the end, cut off"
assert span_mask(3, 9, 1.0, 2, None).all() and not span_mask(3, 9, 0.0, 2, None).any()
### END HIDDEN TESTS

# %% check="spans" aspect="randomness" points=1 title="each recording draws for itself, and the generator decides"
import torch
from mmlearn.feedback import expect

two_rows = span_mask(2, 200, 0.1, 4, torch.Generator().manual_seed(1))
expect(
    "w06_wav2vec2/spans/rows",
    bool(two_rows[0].equal(two_rows[1])),
    False,
    "Both recordings are hidden at the same places.",
)
### BEGIN HIDDEN TESTS
import torch

one, two, three = (
    span_mask(4, 300, 0.1, 5, torch.Generator().manual_seed(seed)) for seed in (35, 35, 36)
)
assert one.equal(two), "the same generator gives the same spans"
assert not one.equal(three), "another generator gives others"
going_on = torch.Generator().manual_seed(38)
again = [span_mask(4, 300, 0.1, 5, going_on) for _ in range(2)]
assert not again[0].equal(again[1]), "two draws from one generator differ"
many = span_mask(500, 60, 0.1, 4, torch.Generator().manual_seed(37)).float()
together = (many[::2] * many[1::2]).mean()
assert abs(float(together - many.mean() ** 2)) < 0.03, "rows are drawn independently"
### END HIDDEN TESTS


# %% wrong="spans" name="share_for_start" says="You took p for the share that is hidden and divided it by the length. In the paper p is the probability that a frame starts a span; transformers' mask_time_prob is p times M."
def spread(starts, length):
    L = starts.shape[1]
    mask = torch.zeros_like(starts)
    for shift in range(min(length, L)):
        mask[:, shift:] |= starts[:, : L - shift]
    return mask


def span_mask(batch, frames, p, length, generator=None):
    return spread(torch.rand(batch, frames, generator=generator) < p / length, length)


# %% wrong="spans" name="single_frames" says="You hide the starts only. A span goes on for length - 1 more frames."
def spread(starts, length):
    return starts.clone()


def span_mask(batch, frames, p, length, generator=None):
    return spread(torch.rand(batch, frames, generator=generator) < p, length)


# %% wrong="spans" name="backwards" says="Your spans end at the start and reach back from it. They begin there and reach forward in time."
def spread(starts, length):
    L = starts.shape[1]
    mask = torch.zeros_like(starts)
    for shift in range(min(length, L)):
        mask[:, : L - shift] |= starts[:, shift:]
    return mask


def span_mask(batch, frames, p, length, generator=None):
    return spread(torch.rand(batch, frames, generator=generator) < p, length)


# %% wrong="spans" name="one_too_long" says="Your spans are one frame too long: the start is the first of the length frames, not one before them."
def spread(starts, length):
    L = starts.shape[1]
    mask = torch.zeros_like(starts)
    for shift in range(min(length + 1, L)):
        mask[:, shift:] |= starts[:, : L - shift]
    return mask


def span_mask(batch, frames, p, length, generator=None):
    return spread(torch.rand(batch, frames, generator=generator) < p, length)


# %% wrong="spans" name="wraps_around" says="A span that reaches the end comes in again at the beginning: torch.roll goes round in a circle. Cut it off."
def spread(starts, length):
    mask = torch.zeros_like(starts)
    for shift in range(length):
        mask = mask | starts.roll(shift, dims=1)
    return mask


def span_mask(batch, frames, p, length, generator=None):
    return spread(torch.rand(batch, frames, generator=generator) < p, length)


# %% wrong="spans" name="overlaps_cancel" says="Where two spans meet, yours cancel each other. A frame hidden twice is hidden: join them with or, not with exclusive or."
def spread(starts, length):
    L = starts.shape[1]
    mask = torch.zeros_like(starts)
    for shift in range(min(length, L)):
        mask[:, shift:] ^= starts[:, : L - shift]
    return mask


def span_mask(batch, frames, p, length, generator=None):
    return spread(torch.rand(batch, frames, generator=generator) < p, length)


# %% wrong="spans" name="whole_spans_only" says="You let no span begin where it would be cut off. fairseq does that; here every frame starts with probability p, also the last, and the end is cut."
def spread(starts, length):
    L = starts.shape[1]
    mask = torch.zeros_like(starts)
    for shift in range(min(length, L)):
        mask[:, shift:] |= starts[:, : L - shift]
    return mask


def span_mask(batch, frames, p, length, generator=None):
    starts = torch.rand(batch, frames, generator=generator) < p
    starts[:, max(frames - length + 1, 1) :] = False
    return spread(starts, length)


# %% wrong="spans" name="one_row_for_all" says="All recordings of the batch are hidden at the same places. Draw for each frame of each recording."
def spread(starts, length):
    L = starts.shape[1]
    mask = torch.zeros_like(starts)
    for shift in range(min(length, L)):
        mask[:, shift:] |= starts[:, : L - shift]
    return mask


def span_mask(batch, frames, p, length, generator=None):
    starts = torch.rand(1, frames, generator=generator) < p
    return spread(starts, length).expand(batch, -1).clone()


# %%
START, SPAN = 0.126, 5
mels = MelConfig(sample_rate=RATE, n_fft=256, hop_length=HOP, n_mels=40, f_min=60, center=False)

# %% tags=["experiment"]
sentence = standardised(unlabelled.subset([3]))[:, : 2 * RATE]
picture = log_mel(sentence, mels)[0]
frames_shown = count_frames(sentence.shape[1], KERNELS, STRIDES)
gaps = span_mask(1, frames_shown, START, SPAN, set_seed(SEED + 1))[0]


def gap_lengths(mask):
    """The lengths of all runs of hidden frames in the rows of a mask."""
    edges = F.pad(mask.int(), (1, 1)).diff(dim=1)
    return (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]


measured = gap_lengths(span_mask(2000, 749, 0.065, 10, set_seed(SEED)))  # 15 s, as in the paper
print(
    f"mean gap {measured.float().mean():.1f} frames, median {int(measured.median())}, "
    f"longest {int(measured.max())}"
)

# %% tags=["experiment", "hide-input"]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.3), layout="constrained", width_ratios=[1.7, 1]
)
seconds = frames_shown * HOP / RATE
left.imshow(picture, origin="lower", aspect="auto", cmap="cividis", extent=[0, seconds, 0, 40])
for begin in gaps.nonzero().flatten().tolist():
    left.axvspan(begin * HOP / RATE, (begin + 1) * HOP / RATE, color="white", alpha=0.8, lw=0)
left.set(xlabel="time (s)", ylabel="mel band")
left.set_title(f"The game: what was under the white? ({gaps.float().mean():.0%} hidden)")
right.hist(measured.clamp(max=100), bins=range(10, 102, 2), density=True, color=BLUE)
right.axvline(measured.float().mean(), color=ORANGE, label=f"mean {measured.float().mean():.1f}")
right.set(xlabel="length of a gap (frames of 20 ms)", ylabel="share of gaps, per frame of length")
right.set_title("The paper's spans: most gaps are one span, some many")
right.legend()
show(
    figure,
    "spans",
    "Left: a log-mel spectrogram with about half of its columns covered in stretches. Right: a "
    "histogram of gap lengths with a tall bar at 10 frames and a long tail.",
)

# %% [markdown]
# *What to see.* Whole phonemes disappear under the white, so the answer must come from what stands
# beside them. On the right is the paper's figure 2 from your own function: median 10, and a mean
# near 14.5; the formula's 14.7 is for a recording without end. (The spectrogram is for our eyes;
# the model hides frames of its own encoder. The few gaps below 10 frames, cut off at the end of a
# recording, are left of the axis.)

# %% [markdown]
# ## 5. Looking around the gaps
#
# A projection takes each frame to the transformer's width. Hidden frames are then replaced by *one*
# learned vector, the same for all. Then each frame is told where it stands: a convolution $P$ over
# neighbouring frames, 16 of them here and 128 in the paper, ends in a GELU and is added to the
# stream. Only then come the blocks of week 1:
#
# $$ x_t = \begin{cases} m & t \text{ hidden} \\ W z_t + b & \text{else} \end{cases} \qquad
#    c = \mathrm{LayerNorm}\big(\mathrm{Encoder}(x + P(x))\big) $$
#
# In the paper's section 2 a LayerNorm stands right behind the sum $x + P(x)$, before post-norm
# blocks. Ours follows the published model trained on LV-60k: pre-norm blocks and a LayerNorm at the
# end.
#
# The *targets* are the features $z$ before hiding. Two mistakes here give a beautiful loss and a
# useless model: hide too late, and the answer leaks in; hide in place, and the targets are gone.

# %% [markdown] exercise="context" difficulty=3 minutes=15 forbids=["mmlearn.wav2vec2.Wav2Vec2"]
# ### Exercise 4: the context network
#
# The parts are there; write `forward`. Frames where `mask` is `True` are hidden. Where `is_frame`
# is given, `False` is padding: set such frames to zero before the positional convolution, which
# would reach into them, and let no frame attend to them.
#
# | argument | shape |
# |---|---|
# | `features` | `[B, L, channels]`, must stay as it is |
# | `mask` | boolean `[B, L]`, `True` = hidden, or `None` |
# | `is_frame` | boolean `[B, L]`, `False` = padding, or `None` |
# | returns | `[B, L, d_model]` |
#
# *Afterwards you can say:* "The mask sits between the convolutions and the transformer. The targets
# are taken before it. Hidden frames are all the same vector; only positions tell them apart."
#
# <details><summary>Hint 1</summary>
#
# `torch.where(mask.unsqueeze(-1), self.mask_vector, x)` makes a new tensor. Assigning to
# `features[mask]` would change the caller's.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The encoder takes an attention mask that broadcasts to `[B, H, L, L]`, `True` = may attend:
# padding is a property of the *keys*, so `is_frame[:, None, None]`.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     x = projection of features
#     if mask: x = mask_vector where mask, else x
#     if is_frame: x = 0 where it is no frame
#     x = x + positions(x)
#     return norm of encoder(x, mask of keys or None)
#
# </details>


# %% answer="context"
class ContextNetwork(nn.Module):
    """Hide frames, say where each one stands, and let all look at what is left."""

    def __init__(self, channels, d_model, num_layers, num_heads=4, reach=16):
        super().__init__()
        self.projection = nn.Linear(channels, d_model)
        self.mask_vector = nn.Parameter(torch.rand(d_model))
        self.positions = PositionalConv(d_model, reach, num_heads)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features, mask=None, is_frame=None):
        """Return one state a frame, [B, L, d_model]."""
        ### BEGIN SOLUTION
        x = self.projection(features)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_vector, x)
        if is_frame is not None:
            x = x.masked_fill(~is_frame.unsqueeze(-1), 0)
        x = x + self.positions(x)
        keys = None if is_frame is None else is_frame[:, None, None]
        return self.norm(self.encoder(x, keys))
        ### END SOLUTION


# %% check="context" aspect="example" points=1 title="what is hidden has no influence, and the targets stay"
import torch
from mmlearn.feedback import expect

torch.manual_seed(0)
small_context = ContextNetwork(6, 8, 1)
some_features = torch.randn(1, 9, 6)
middle_hidden = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]]).bool()
louder = torch.where(middle_hidden[..., None], some_features + 5, some_features)
kept_features = some_features.clone()
states_of_both = [small_context(f.clone(), middle_hidden.clone()) for f in (some_features, louder)]
plain_states = small_context(some_features.clone())
other_visible = small_context(some_features + 5 * ~middle_hidden[..., None], middle_hidden.clone())
expect(
    "w06_wav2vec2/context/hidden",
    [
        bool(torch.allclose(*states_of_both, atol=1e-5)),
        not torch.allclose(states_of_both[0], other_visible, atol=1e-3),
        not torch.allclose(states_of_both[0], plain_states, atol=1e-3),
    ],
    [True, True, True],
    "Three laws, in this order: changing the hidden frames changes no state; changing the visible "
    "ones does; hiding makes a difference.",
)
small_context(some_features, middle_hidden.clone())
expect(
    "w06_wav2vec2/context/targets",
    some_features.detach(),
    kept_features,
    "The call changed the features that it was given; they are the targets of the loss.",
)
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(41)
network = ContextNetwork(5, 12, 2)
features = torch.randn(3, 11, 5)
hidden = torch.rand(3, 11) < 0.4
hidden[:, 2] = True
given, given_mask = features.clone(), hidden.clone()
states = network(given, given_mask)
assert tuple(states.shape) == (3, 11, 12), "[B, L, d_model]"
assert given.equal(features) and given_mask.equal(hidden), "the inputs were changed in place"
assert states.std() > 0.1, "states differ"
junk = torch.where(hidden[..., None], torch.randn(3, 11, 5) * 9, features)
assert torch.allclose(network(junk, hidden.clone()), states, atol=1e-4), "hidden frames leak"
assert not torch.allclose(network(features.clone()), states, atol=1e-2), "the mask does something"
### END HIDDEN TESTS

# %% check="context" aspect="reference" points=1 title="equals the formula, part by part"
### BEGIN HIDDEN TESTS
import torch
from mmlearn.transformer import Encoder
from mmlearn.wav2vec2 import PositionalConv

torch.manual_seed(42)
network = ContextNetwork(5, 8, 2)
state = {name: value.clone() for name, value in network.state_dict().items()}
state["mask_vector"] = torch.randn(8)
network.load_state_dict(state)
positions, encoder = PositionalConv(8, 16, 4), Encoder(2, 8, 4, 32)
for part, name in ((positions, "positions."), (encoder, "encoder.")):
    part.load_state_dict(
        {key.removeprefix(name): v for key, v in state.items() if key.startswith(name)}
    )
features, hidden = torch.randn(2, 20, 5), torch.rand(2, 20) < 0.5
x = torch.nn.functional.linear(features, state["projection.weight"], state["projection.bias"])
x = torch.where(hidden[..., None], state["mask_vector"], x)
x = encoder(x + positions(x))
wanted = torch.nn.functional.layer_norm(x, (8,), state["norm.weight"], state["norm.bias"])
assert torch.allclose(network(features.clone(), hidden.clone()), wanted, atol=1e-4)
### END HIDDEN TESTS

# %% check="context" aspect="padding" points=1 title="a padded recording has the states that it has alone"
import torch
from mmlearn.feedback import expect

torch.manual_seed(1)
other_context = ContextNetwork(4, 8, 1)
short = torch.randn(1, 7, 4)
long = torch.cat([short, 3 * torch.randn(1, 5, 4)], dim=1)
expect(
    "w06_wav2vec2/context/padding",
    bool(
        torch.allclose(
            other_context(long, None, torch.arange(12)[None] < 7)[:, :7],
            other_context(short),
            atol=1e-4,
        )
    ),
    True,
    "Seven frames gave other states when five frames of padding stood behind them.",
)
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(43)
network = ContextNetwork(4, 8, 2)
features, hidden = torch.randn(3, 14, 4), torch.rand(3, 14) < 0.3
counts = torch.tensor([14, 9, 6])
real = torch.arange(14) < counts[:, None]
hidden[2, 4:] = True  # padding may be hidden, too: it is still padding
given = features.clone()
together = network(given, hidden.clone(), real.clone())
assert given.equal(features), "the features were changed in place"
assert together.std() > 0.1, "states differ"
for i, count in enumerate(counts.tolist()):
    alone = network(features[i : i + 1, :count].clone(), hidden[i : i + 1, :count].clone())
    assert torch.allclose(together[i : i + 1, :count], alone, atol=1e-4), f"recording {i}"
### END HIDDEN TESTS

# %% check="context" aspect="gradient" points=1 title="the vector learns, hidden features get no gradient, and places differ"
import torch
from mmlearn.feedback import expect

torch.manual_seed(2)
third_context = ContextNetwork(4, 8, 1)
expect(
    "w06_wav2vec2/context/places",
    bool(third_context(torch.randn(1, 6, 4), torch.ones(1, 6).bool())[0].std(dim=0).max() > 1e-3),
    True,
    "With everything hidden, all states are alike: hidden frames are the same vector, so only the "
    "positional convolution can tell them apart.",
)
### BEGIN HIDDEN TESTS
import torch

torch.manual_seed(44)
network = ContextNetwork(5, 8, 1)
features = torch.randn(2, 13, 5, requires_grad=True)
hidden = torch.rand(2, 13) < 0.5
hidden[:, :2] = torch.tensor([True, False])
(network(features, hidden.clone()) * torch.randn(8)).square().sum().backward()
assert (features.grad[hidden] == 0).all(), "hidden features get no gradient through the context"
assert (features.grad[~hidden].abs().amax(dim=-1) > 0).all(), "visible ones do"
for name, weight in network.named_parameters():
    silent = name.endswith("k_proj.bias")  # a softmax does not change when all its scores move
    assert silent or (weight.grad is not None and weight.grad.abs().max() > 0), f"{name}"
### END HIDDEN TESTS


# %% wrong="context" name="hides_in_place" says="You overwrite the features themselves. They are the targets, too: after this every hidden frame has the same right answer. Make a new tensor."
class ContextNetwork(nn.Module):
    def __init__(self, channels, d_model, num_layers, num_heads=4, reach=16):
        super().__init__()
        self.projection = nn.Linear(channels, d_model)
        self.mask_vector = nn.Parameter(torch.rand(d_model))
        self.positions = PositionalConv(d_model, reach, num_heads)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features, mask=None, is_frame=None):
        if mask is not None:
            features[mask] = 0
        x = self.projection(features)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_vector, x)
        if is_frame is not None:
            x = x.masked_fill(~is_frame.unsqueeze(-1), 0)
        x = x + self.positions(x)
        return self.norm(self.encoder(x, None if is_frame is None else is_frame[:, None, None]))


# %% wrong="context" name="hides_after_positions" says="You hide after the positional convolution has run: the neighbours of a gap have already heard what was in it. Hide first."
class ContextNetwork(nn.Module):
    def __init__(self, channels, d_model, num_layers, num_heads=4, reach=16):
        super().__init__()
        self.projection = nn.Linear(channels, d_model)
        self.mask_vector = nn.Parameter(torch.rand(d_model))
        self.positions = PositionalConv(d_model, reach, num_heads)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features, mask=None, is_frame=None):
        x = self.projection(features)
        if is_frame is not None:
            x = x.masked_fill(~is_frame.unsqueeze(-1), 0)
        around = self.positions(x)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_vector, x)
        x = x + around
        return self.norm(self.encoder(x, None if is_frame is None else is_frame[:, None, None]))


# %% wrong="context" name="not_hidden" says="You take the mask and hide nothing: the network reads the answers."
class ContextNetwork(nn.Module):
    def __init__(self, channels, d_model, num_layers, num_heads=4, reach=16):
        super().__init__()
        self.projection = nn.Linear(channels, d_model)
        self.mask_vector = nn.Parameter(torch.rand(d_model))
        self.positions = PositionalConv(d_model, reach, num_heads)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features, mask=None, is_frame=None):
        x = self.projection(features)
        if is_frame is not None:
            x = x.masked_fill(~is_frame.unsqueeze(-1), 0)
        x = x + self.positions(x)
        return self.norm(self.encoder(x, None if is_frame is None else is_frame[:, None, None]))


# %% wrong="context" name="hides_the_visible" says="Your mask works the other way round: here True means hidden."
class ContextNetwork(nn.Module):
    def __init__(self, channels, d_model, num_layers, num_heads=4, reach=16):
        super().__init__()
        self.projection = nn.Linear(channels, d_model)
        self.mask_vector = nn.Parameter(torch.rand(d_model))
        self.positions = PositionalConv(d_model, reach, num_heads)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features, mask=None, is_frame=None):
        x = self.projection(features)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, self.mask_vector)
        if is_frame is not None:
            x = x.masked_fill(~is_frame.unsqueeze(-1), 0)
        x = x + self.positions(x)
        return self.norm(self.encoder(x, None if is_frame is None else is_frame[:, None, None]))


# %% wrong="context" name="zeros_for_the_vector" says="You hide with zeros and leave the learned vector unused. The model could then not tell a gap from a frame that happens to be near zero."
class ContextNetwork(nn.Module):
    def __init__(self, channels, d_model, num_layers, num_heads=4, reach=16):
        super().__init__()
        self.projection = nn.Linear(channels, d_model)
        self.mask_vector = nn.Parameter(torch.rand(d_model))
        self.positions = PositionalConv(d_model, reach, num_heads)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features, mask=None, is_frame=None):
        x = self.projection(features)
        if mask is not None:
            x = x.masked_fill(mask.unsqueeze(-1), 0)
        if is_frame is not None:
            x = x.masked_fill(~is_frame.unsqueeze(-1), 0)
        x = x + self.positions(x)
        return self.norm(self.encoder(x, None if is_frame is None else is_frame[:, None, None]))


# %% wrong="context" name="no_positions" says="You left out the positional convolution. All hidden frames are the same vector, so they all get the same state and the same guess."
class ContextNetwork(nn.Module):
    def __init__(self, channels, d_model, num_layers, num_heads=4, reach=16):
        super().__init__()
        self.projection = nn.Linear(channels, d_model)
        self.mask_vector = nn.Parameter(torch.rand(d_model))
        self.positions = PositionalConv(d_model, reach, num_heads)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features, mask=None, is_frame=None):
        x = self.projection(features)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_vector, x)
        if is_frame is not None:
            x = x.masked_fill(~is_frame.unsqueeze(-1), 0)
        return self.norm(self.encoder(x, None if is_frame is None else is_frame[:, None, None]))


# %% wrong="context" name="attends_to_padding" says="Your frames attend to the padding. Give the encoder a mask of keys: is_frame[:, None, None]."
class ContextNetwork(nn.Module):
    def __init__(self, channels, d_model, num_layers, num_heads=4, reach=16):
        super().__init__()
        self.projection = nn.Linear(channels, d_model)
        self.mask_vector = nn.Parameter(torch.rand(d_model))
        self.positions = PositionalConv(d_model, reach, num_heads)
        self.encoder = Encoder(num_layers, d_model, num_heads, 4 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features, mask=None, is_frame=None):
        x = self.projection(features)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_vector, x)
        if is_frame is not None:
            x = x.masked_fill(~is_frame.unsqueeze(-1), 0)
        x = x + self.positions(x)
        return self.norm(self.encoder(x))


# %% [markdown]
# ## 6. Whom to compare with
#
# Why not simply predict the hidden features and take the squared error? Because the features are
# learned, too: an encoder that writes zeros everywhere makes every prediction perfect. A contrast
# cannot be cheated so. The model must point out the right frame among others, and equal frames
# cannot be told apart.
#
# But which others? wav2vec 2.0 takes them from the *hidden frames of the same recording*, 100 of
# them for each hidden frame, uniformly (section 3.2). Section 8 measures why.

# %% [markdown] exercise="negatives" difficulty=4 minutes=15 forbids=["mmlearn.wav2vec2.sample_negatives"]
# ### Exercise 5: distractors
#
# Write `sample_negatives(mask, number, generator)`. The loss will gather the hidden frames as
# `features[mask]`: one list through the whole batch, recording after recording. Return, for each
# entry of that list, `number` places *in that list*: other hidden frames of the same recording,
# drawn uniformly, repeats allowed, never the frame itself.
#
# | | |
# |---|---|
# | `mask` | boolean `[B, L]` |
# | returns | whole numbers `[hidden frames, number]`, of any integer type |
# | raises | `ValueError` where a recording has exactly one hidden frame: there is nobody to compare it with. None at all is fine. |
#
# *Afterwards you can say:* "The negatives come from the same utterance, so voice, microphone and
# room are of no help; what is left to tell frames apart is what was said."
#
# <details><summary>Hint 1: stepping over oneself</summary>
#
# Of $n$ frames, $n - 1$ are others. Draw from $0 \dots n - 2$, and add 1 to every draw that is at
# or above the frame's own place. No frame is drawn twice as often as another.
#
# </details>
# <details><summary>Hint 2: places in the list</summary>
#
# The second recording's frames stand behind the first one's: add the number of hidden frames in all
# recordings before it.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     first = 0
#     for the count of hidden frames in each recording:
#         if it is 1: raise ValueError
#         other = random whole numbers below count - 1, of shape (count, number)
#         own = 0, 1, ..., count - 1 as a column
#         keep first + other + (1 where other >= own)
#         first += count
#     return all of it, one below the other
#
# </details>


# %% answer="negatives"
def sample_negatives(mask, number, generator=None):
    """Return places in features[mask]: other hidden frames of the same recording."""
    ### BEGIN SOLUTION
    places, first = [], 0
    for count in mask.sum(dim=1).tolist():
        if count == 1:
            raise ValueError("a recording has one hidden frame and nothing to compare it with")
        other = torch.randint(max(count - 1, 1), (count, number), generator=generator)
        own = torch.arange(count)[:, None]
        places.append(first + other + (other >= own))
        first += count
    return torch.cat(places)
    ### END SOLUTION


# %% check="negatives" aspect="example" points=1 title="two hidden frames each: only one choice"
import torch
from mmlearn.feedback import expect

pairs_hidden = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
expect(
    "w06_wav2vec2/negatives/pairs",
    lambda: sample_negatives(pairs_hidden.clone(), 3, torch.Generator().manual_seed(0)),
    torch.tensor([[1, 1, 1], [0, 0, 0], [3, 3, 3], [2, 2, 2]]),
    "The list has four entries: 0 and 1 from the first recording, 2 and 3 from the third. Each has "
    "one possible distractor, its neighbour in the recording, never itself.",
)
### BEGIN HIDDEN TESTS
hidden = torch.rand(5, 30, generator=torch.Generator().manual_seed(51)) < 0.4
hidden[2] = False
recording = torch.arange(5).repeat_interleave(hidden.sum(dim=1))
places = sample_negatives(hidden.clone(), 17, torch.Generator().manual_seed(52))
assert tuple(places.shape) == (len(recording), 17), "[hidden frames, number]"
assert not places.is_floating_point(), "places are whole numbers"
places = places.long()
assert recording[places].equal(recording[:, None].expand(-1, 17)), "another recording's frames"
assert not (places == torch.arange(len(recording))[:, None]).any(), "a frame is its own negative"
### END HIDDEN TESTS

# %% check="negatives" aspect="law" points=1 title="all others are drawn equally often"
import torch
from mmlearn.feedback import expect

five_hidden = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
drawn = sample_negatives(five_hidden, 4000, torch.Generator().manual_seed(0))
counted = torch.stack([(drawn == place).sum(dim=1) for place in range(5)], dim=1)
expect(
    "w06_wav2vec2/negatives/often",
    [
        bool((counted[~torch.eye(5).bool()] - 1000 < 150).all()),
        bool((counted.diagonal() == 0).all()),
    ],
    [True, True],
    f"Of five hidden frames each has four others, about 1,000 of 4,000 draws for each; yours for the "
    f"third frame: {counted[2].tolist()}.",
)
### BEGIN HIDDEN TESTS
import torch

hidden = torch.tensor([[1] * 4 + [0] * 3, [0] * 3 + [1] * 4, [1] * 7]).bool()
places = sample_negatives(hidden, 6000, torch.Generator().manual_seed(53))
for first, count in ((0, 4), (4, 4), (8, 7)):
    for place in range(first, first + count):
        often = (places[place] == torch.arange(first, first + count)[:, None]).sum(dim=1)
        assert often[place - first] == 0, "a frame is its own negative"
        assert often.sum() == 6000, "all draws are from its recording"
        others = torch.cat([often[: place - first], often[place - first + 1 :]])
        assert (others - 6000 / (count - 1)).abs().max() < 300, "each other frame as often"
### END HIDDEN TESTS

# %% check="negatives" aspect="randomness" points=1 title="each frame draws for itself, and the generator decides"
import torch
from mmlearn.feedback import expect

thirty = sample_negatives(torch.ones(1, 30).bool(), 40, torch.Generator().manual_seed(0))
expect(
    "w06_wav2vec2/negatives/separate",
    bool(((thirty[0] - thirty[29]).abs() <= 1).float().mean() < 0.5),
    True,
    "The first and the last of thirty hidden frames have drawn the same distractors, but for the "
    "step over themselves.",
)
### BEGIN HIDDEN TESTS
import torch

hidden = torch.ones(2, 40).bool()
one, two, three = (
    sample_negatives(hidden.clone(), 50, torch.Generator().manual_seed(seed))
    for seed in (54, 54, 55)
)
assert one.equal(two) and not one.equal(three), "the generator decides"
going_on = torch.Generator().manual_seed(56)
again = [sample_negatives(hidden.clone(), 50, going_on) for _ in range(2)]
assert not again[0].equal(again[1]), "two draws from one generator differ"
alike = (one[:-1] == one[1:]).float().mean()
assert alike < 0.3, "neighbours have drawn the same distractors"
assert (one[:40] + 40 == one[40:]).float().mean() < 0.3, "recordings have drawn the same"
### END HIDDEN TESTS

# %% check="negatives" aspect="refusal" points=1 title="a lonely frame is refused, an empty recording is not"
import torch
from mmlearn.feedback import expect_raises

expect_raises(
    "w06_wav2vec2/negatives/lonely",
    ValueError,
    lambda: sample_negatives(torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]]).bool(), 2),
    "The second recording has one hidden frame and no distractor: raise a ValueError.",
)
### BEGIN HIDDEN TESTS
import torch

try:
    sample_negatives(torch.tensor([[0, 0, 1], [1, 1, 1]]).bool(), 4)
except ValueError:
    pass
else:
    raise AssertionError("one hidden frame in a recording must raise a ValueError")
with_empty = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
places = sample_negatives(with_empty, 9)
assert tuple(places.shape) == (3, 9) and set(places.flatten().tolist()) <= {0, 1, 2}
nothing = sample_negatives(torch.zeros(2, 5).bool(), 3)
assert tuple(nothing.shape) == (0, 3), "nothing hidden: no rows"
### END HIDDEN TESTS


# %% wrong="negatives" name="includes_itself" says="You draw from all hidden frames of the recording, so a frame is sometimes its own distractor: a question with two right answers, one of them called wrong."
def sample_negatives(mask, number, generator=None):
    places, first = [], 0
    for count in mask.sum(dim=1).tolist():
        if count == 1:
            raise ValueError("one hidden frame")
        places.append(first + torch.randint(max(count, 1), (count, number), generator=generator))
        first += count
    return torch.cat(places)


# %% wrong="negatives" name="whole_batch" says="You draw from the whole batch. Frames of other recordings are told apart by their voice, so the task becomes easy and teaches less."
def sample_negatives(mask, number, generator=None):
    if (mask.sum(dim=1) == 1).any():
        raise ValueError("one hidden frame")
    count = int(mask.sum())
    other = torch.randint(count - 1, (count, number), generator=generator)
    return other + (other >= torch.arange(count)[:, None])


# %% wrong="negatives" name="places_in_the_recording" says="You count from the beginning of each recording. features[mask] is one list through the whole batch: add what stands before."
def sample_negatives(mask, number, generator=None):
    places = []
    for count in mask.sum(dim=1).tolist():
        if count == 1:
            raise ValueError("one hidden frame")
        other = torch.randint(max(count - 1, 1), (count, number), generator=generator)
        places.append(other + (other >= torch.arange(count)[:, None]))
    return torch.cat(places)


# %% wrong="negatives" name="neighbour_for_itself" says="Where a draw hits the frame itself you move it to the next one, which is then drawn twice as often. Draw from one fewer, and step over yourself."
def sample_negatives(mask, number, generator=None):
    places, first = [], 0
    for count in mask.sum(dim=1).tolist():
        if count == 1:
            raise ValueError("one hidden frame")
        own = torch.arange(count)[:, None]
        other = torch.randint(max(count, 1), (count, number), generator=generator)
        places.append(first + (other + (other == own)) % max(count, 1))
        first += count
    return torch.cat(places)


# %% wrong="negatives" name="one_draw_a_recording" says="All frames of a recording share one draw. Each hidden frame draws its own distractors: the shape is (count, number)."
def sample_negatives(mask, number, generator=None):
    places, first = [], 0
    for count in mask.sum(dim=1).tolist():
        if count == 1:
            raise ValueError("one hidden frame")
        other = torch.randint(max(count - 1, 1), (1, number), generator=generator)
        places.append(first + other + (other >= torch.arange(count)[:, None]))
        first += count
    return torch.cat(places)


# %% wrong="negatives" name="lonely_frame" says="A recording with one hidden frame went through: its distractor is another recording's frame, or lies outside the list. Raise a ValueError."
def sample_negatives(mask, number, generator=None):
    places, first = [], 0
    for count in mask.sum(dim=1).tolist():
        other = torch.randint(max(count - 1, 1), (count, number), generator=generator)
        places.append(first + other + (other >= torch.arange(count)[:, None]))
        first += count
    return torch.cat(places)


# %% [markdown]
# ## 7. The loss
#
# Let $c_t$ be what the network predicts for a hidden frame, $q_t$ the frame's target, and
# $\tilde q$ run over the target and its $K$ distractors. The score is a cosine divided by the
# temperature $\kappa = 0.1$, the loss a cross-entropy whose right answer is the frame itself
# (equation 3):
#
# $$ \mathcal L_t = -\ln \frac{\exp(\cos(c_t, q_t) / \kappa)}{\sum_{\tilde q} \exp(\cos(c_t, \tilde q) / \kappa)} $$
#
# Who knows nothing scores $\ln(K + 1)$. It is week 3's loss with a fixed temperature, and with
# distractors that were drawn instead of a batch.
#
# One detail stands in no formula. Recordings hold digital silence, and two silent frames are
# *equal*. As distractor such a twin is no wrong answer. fairseq's code, not the paper, gives it the
# score $-\infty$, which softmax turns into 0. In week 7, where targets come from a codebook, twins
# are everywhere.

# %% [markdown] exercise="loss" difficulty=4 minutes=15 forbids=["mmlearn.wav2vec2.contrastive_logits"]
# ### Exercise 6: scores and loss
#
# Write two functions.
#
# | function | returns |
# |---|---|
# | `score_candidates(predicted, targets, negatives, temperature)` | `[frames, 1 + N]`: column 0 scores the frame's own target, the others its distractors; a distractor whose target *equals* the frame's own has the score $-\infty$ |
# | `contrastive_loss(scores)` | a pair: the mean loss in nats, and the share of frames whose own score is *larger* than all others |
#
# `predicted` and `targets` are `[frames, E]`, `negatives` are places in them, `[frames, N]`. A
# frame whose distractors are all twins has no rival: its loss is 0, and it does not count as right.
#
# *Afterwards you can say:* "InfoNCE with cosine over 0.1: with 100 distractors guessing scores
# $\ln 101 = 4.6$ nats. The accuracy is that of a 101-way choice."
#
# <details><summary>Hint 1: gathering</summary>
#
# `targets[negatives]` has the shape `[frames, N, E]`. Put each frame's own index in front of its
# negatives, and gather once.
#
# </details>
# <details><summary>Hint 2: twins</summary>
#
# `(targets[negatives] == targets[:, None]).all(dim=-1)` says where a distractor equals the target.
# Compare the targets, not the places.
#
# </details>
# <details><summary>Hint 3: pseudocode</summary>
#
#     unit length for predicted and for targets
#     candidates = own index, then the negatives
#     scores = dot product of each prediction with each of its candidates, divided by temperature
#     scores of twins, in the columns after the first = minus infinity
#
#     loss = cross entropy with class 0 for every frame
#     right = first column > largest of the others, and that largest is finite
#
# </details>


# %% answer="loss"
def score_candidates(predicted, targets, negatives, temperature=0.1):
    """Return cosines over the temperature, own target first, [frames, 1 + N]."""
    ### BEGIN SOLUTION
    own = torch.arange(len(targets), device=targets.device)[:, None]
    candidates = torch.cat([own, negatives], dim=1)
    unit = F.normalize(targets, dim=-1)
    scores = torch.einsum("fe,fne->fn", F.normalize(predicted, dim=-1), unit[candidates])
    twin = (targets[candidates] == targets[:, None]).all(dim=-1)
    twin[:, 0] = False
    return (scores / temperature).masked_fill(twin, -torch.inf)
    ### END SOLUTION


def contrastive_loss(scores):
    """Return the mean loss in nats and the share of frames that were found."""
    ### BEGIN SOLUTION
    own = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    rival = scores[:, 1:].amax(dim=1)
    right = (scores[:, 0] > rival) & rival.isfinite()
    return F.cross_entropy(scores, own), right.float().mean()
    ### END SOLUTION


# %% check="loss" aspect="example" points=1 title="three frames, two distractors each"
import torch
from mmlearn.feedback import expect

guesses = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
truths = torch.tensor([[5.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
others = torch.tensor([[1, 2], [0, 2], [0, 1]])
expect(
    "w06_wav2vec2/loss/scores",
    score_candidates(guesses.clone(), truths.clone(), others.clone(), 0.5),
    torch.tensor([[2.0, 0.0, 1.2], [2.0, 0.0, 1.6], [1.2, 2.0, 0.0]]),
    "Cosines: the first guess has 1 with its own target, 0 with the second, 3/5 with the third. "
    "Divide by 0.5.",
)
expect(
    "w06_wav2vec2/loss/twins",
    score_candidates(
        torch.tensor([[1.0, 0.0]] * 3),
        torch.tensor([[2.0, 0.0], [2.0, 0.0], [7.0, 0.0]]),
        others.clone(),
        1.0,
    ),
    torch.tensor([[1.0, -torch.inf, 1.0], [1.0, -torch.inf, 1.0], [1.0, 1.0, 1.0]]),
    "The first two targets are equal, so as distractors of each other they score minus infinity. "
    "The third has the same direction but is another vector.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(61)
predicted, targets = (torch.randn(9, 4, generator=draw) for _ in range(2))
negatives = torch.randint(8, (9, 6), generator=draw)
negatives = negatives + (negatives >= torch.arange(9)[:, None])
targets[1], negatives[0, 0] = 2 * targets[0], 1  # one direction, two vectors: no twins
targets[3, :2], negatives[2, 0] = targets[2, :2], 3  # half of the entries equal: no twins
wanted = torch.cosine_similarity(predicted[:, None], targets[None], dim=-1) / 0.2
wanted = torch.cat([wanted.diagonal()[:, None], wanted.gather(1, negatives)], dim=1)
marks = score_candidates(predicted.clone(), targets.clone(), negatives.clone(), 0.2)
assert marks.isfinite().all(), "only equal targets are twins"
assert torch.allclose(marks, wanted, atol=1e-4)
default = score_candidates(predicted.clone(), targets.clone(), negatives.clone())
assert torch.allclose(default, 2 * wanted, atol=1e-4), "the temperature is 0.1 unless given"
### END HIDDEN TESTS

# %% check="loss" aspect="loss" points=1 title="the loss and who was found, on paper"
import math
import torch
from mmlearn.feedback import expect

expect(
    "w06_wav2vec2/loss/hand",
    list(contrastive_loss(math.log(3) * torch.tensor([[1.0, 0.0], [0.0, 1.0]]))),
    [(math.log(4 / 3) + math.log(4)) / 2, 0.5],
    "The first frame gives its own target 3/4 of the probability, the second 1/4: the mean of "
    "ln(4/3) and ln 4. One of two was found.",
)
expect(
    "w06_wav2vec2/loss/tied",
    list(contrastive_loss(torch.tensor([[1.0, 1.0], [1.0, -torch.inf]]))),
    [math.log(2) / 2, 0.0],
    "A tie was not found, and a frame without any rival is no success; its loss is 0.",
)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(62)
marks = 3 * torch.randn(50, 11, generator=draw)
marks[::5, 3] = -torch.inf
best = marks.argmax(dim=1) == 0
wanted = (marks.logsumexp(dim=1) - marks[:, 0]).mean()
loss, share = contrastive_loss(marks.clone())
assert abs(float(loss) - float(wanted)) < 1e-4
assert abs(float(share) - float(best.float().mean())) < 1e-6
guessing, _ = contrastive_loss(torch.zeros(4, 101))
assert abs(float(guessing) - math.log(101)) < 1e-4
### END HIDDEN TESTS

# %% check="loss" aspect="law" points=1 title="length says nothing, and large numbers do no harm"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(63)
predicted, targets = (torch.randn(7, 5, generator=draw) for _ in range(2))
negatives = (torch.arange(7)[:, None] + torch.tensor([1, 3, 4])) % 7
marks = score_candidates(predicted.clone(), targets.clone(), negatives.clone())
assert marks.std() > 0.5, "scores differ"
longer = torch.rand(7, 1, generator=draw) * 1e4 + 0.1
stretched = score_candidates(longer * predicted, longer.flip(0) * targets, negatives.clone())
assert torch.allclose(stretched, marks, atol=1e-3), "longer vectors say nothing more"
assert marks.abs().max() <= 10.001, "a cosine over 0.1 is at most 10"
loss, share = contrastive_loss(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]))
assert abs(float(loss) - 1e4) < 1 and float(share) == 0.5, "no overflow"
twins = score_candidates(torch.randn(3, 2), torch.ones(3, 2), torch.tensor([[1], [2], [0]]))
loss, share = contrastive_loss(twins)
assert twins[:, 1].eq(-torch.inf).all() and float(loss) == 0 and float(share) == 0
### END HIDDEN TESTS

# %% check="loss" aspect="gradient" points=1 title="predictions and targets both learn"
### BEGIN HIDDEN TESTS
import torch

draw = torch.Generator().manual_seed(64)
start = [torch.randn(8, 4, generator=draw) for _ in range(2)]
start[1][5] = start[1][2]  # twins
negatives = (torch.arange(8)[:, None] + torch.tensor([1, 3, 5])) % 8
twice = [part.clone().requires_grad_() for part in start]
cosines = torch.cosine_similarity(twice[0][:, None], twice[1][None], dim=-1) / 0.1
rivals = cosines.gather(1, negatives)
twin = (start[1][negatives] == start[1][:, None]).all(dim=-1)
both = torch.cat([cosines.diagonal()[:, None], rivals.masked_fill(twin, -torch.inf)], dim=1)
(both.logsumexp(dim=1) - both[:, 0]).mean().backward()
parts = [part.clone().requires_grad_() for part in start]
contrastive_loss(score_candidates(*parts, negatives))[0].backward()
for one, wanted in zip(parts, twice):
    assert one.grad is not None, "predictions and targets must both get a gradient"
    assert one.grad.isfinite().all() and wanted.grad.abs().max() > 1e-3
    assert torch.allclose(one.grad, wanted.grad, atol=1e-4)
### END HIDDEN TESTS


# %% wrong="loss" name="dot_products" says="These are dot products: a loud frame would beat the others by its length. Divide each vector by its length first."
def score_candidates(predicted, targets, negatives, temperature=0.1):
    candidates = torch.cat([torch.arange(len(targets))[:, None], negatives], dim=1)
    scores = torch.einsum("fe,fne->fn", predicted, targets[candidates])
    twin = (targets[candidates] == targets[:, None]).all(dim=-1)
    twin[:, 0] = False
    return (scores / temperature).masked_fill(twin, -torch.inf)


def contrastive_loss(scores):
    rival = scores[:, 1:].amax(dim=1)
    right = (scores[:, 0] > rival) & rival.isfinite()
    return (scores.logsumexp(dim=1) - scores[:, 0]).mean(), right.float().mean()


# %% wrong="loss" name="multiplies" says="You multiplied by the temperature. A small temperature makes the choice sharper: divide by it."
def score_candidates(predicted, targets, negatives, temperature=0.1):
    candidates = torch.cat([torch.arange(len(targets))[:, None], negatives], dim=1)
    unit = F.normalize(targets, dim=-1)
    scores = torch.einsum("fe,fne->fn", F.normalize(predicted, dim=-1), unit[candidates])
    twin = (targets[candidates] == targets[:, None]).all(dim=-1)
    twin[:, 0] = False
    return (scores * temperature).masked_fill(twin, -torch.inf)


def contrastive_loss(scores):
    rival = scores[:, 1:].amax(dim=1)
    right = (scores[:, 0] > rival) & rival.isfinite()
    return (scores.logsumexp(dim=1) - scores[:, 0]).mean(), right.float().mean()


# %% wrong="loss" name="twins_punished" says="A distractor that equals the target still counts as wrong, so the model is punished for the right answer. Give it the score minus infinity."
def score_candidates(predicted, targets, negatives, temperature=0.1):
    candidates = torch.cat([torch.arange(len(targets))[:, None], negatives], dim=1)
    unit = F.normalize(targets, dim=-1)
    scores = torch.einsum("fe,fne->fn", F.normalize(predicted, dim=-1), unit[candidates])
    return scores / temperature


def contrastive_loss(scores):
    rival = scores[:, 1:].amax(dim=1)
    right = (scores[:, 0] > rival) & rival.isfinite()
    return (scores.logsumexp(dim=1) - scores[:, 0]).mean(), right.float().mean()


# %% wrong="loss" name="twins_score_zero" says="You gave twins the score 0, but e to the 0 is 1: a rival like any other. Only minus infinity takes it out of the softmax."
def score_candidates(predicted, targets, negatives, temperature=0.1):
    candidates = torch.cat([torch.arange(len(targets))[:, None], negatives], dim=1)
    unit = F.normalize(targets, dim=-1)
    scores = torch.einsum("fe,fne->fn", F.normalize(predicted, dim=-1), unit[candidates])
    twin = (targets[candidates] == targets[:, None]).all(dim=-1)
    twin[:, 0] = False
    return (scores / temperature).masked_fill(twin, 0.0)


def contrastive_loss(scores):
    rival = scores[:, 1:].amax(dim=1)
    right = (scores[:, 0] > rival) & rival.isfinite()
    return (scores.logsumexp(dim=1) - scores[:, 0]).mean(), right.float().mean()


# %% wrong="loss" name="ties_count" says="You count a tie as found, and a frame without rivals, too: a model that gives all frames one vector would then be called perfect. Larger, not larger or equal."
def score_candidates(predicted, targets, negatives, temperature=0.1):
    candidates = torch.cat([torch.arange(len(targets))[:, None], negatives], dim=1)
    unit = F.normalize(targets, dim=-1)
    scores = torch.einsum("fe,fne->fn", F.normalize(predicted, dim=-1), unit[candidates])
    twin = (targets[candidates] == targets[:, None]).all(dim=-1)
    twin[:, 0] = False
    return (scores / temperature).masked_fill(twin, -torch.inf)


def contrastive_loss(scores):
    right = scores.argmax(dim=1) == 0
    return (scores.logsumexp(dim=1) - scores[:, 0]).mean(), right.float().mean()


# %% wrong="loss" name="one_entry_equal" says="You call a distractor a twin when any entry agrees. Two frames are equal when all entries are."
def score_candidates(predicted, targets, negatives, temperature=0.1):
    candidates = torch.cat([torch.arange(len(targets))[:, None], negatives], dim=1)
    unit = F.normalize(targets, dim=-1)
    scores = torch.einsum("fe,fne->fn", F.normalize(predicted, dim=-1), unit[candidates])
    twin = (targets[candidates] == targets[:, None]).any(dim=-1)
    twin[:, 0] = False
    return (scores / temperature).masked_fill(twin, -torch.inf)


def contrastive_loss(scores):
    rival = scores[:, 1:].amax(dim=1)
    right = (scores[:, 0] > rival) & rival.isfinite()
    return (scores.logsumexp(dim=1) - scores[:, 0]).mean(), right.float().mean()


# %% wrong="loss" name="only_negatives" says="Your sum under the fraction runs over the distractors only. The frame's own target belongs there, too, or the loss can fall below zero without end."
def score_candidates(predicted, targets, negatives, temperature=0.1):
    candidates = torch.cat([torch.arange(len(targets))[:, None], negatives], dim=1)
    unit = F.normalize(targets, dim=-1)
    scores = torch.einsum("fe,fne->fn", F.normalize(predicted, dim=-1), unit[candidates])
    twin = (targets[candidates] == targets[:, None]).all(dim=-1)
    twin[:, 0] = False
    return (scores / temperature).masked_fill(twin, -torch.inf)


def contrastive_loss(scores):
    rival = scores[:, 1:].amax(dim=1)
    right = (scores[:, 0] > rival) & rival.isfinite()
    return (scores[:, 1:].logsumexp(dim=1) - scores[:, 0]).mean(), right.float().mean()


# %% [markdown]
# ## 8. Two guessers that understand nothing
#
# Why spans, and why distractors from the same recording? A game is as good as the simplest player
# who wins it. Here are two who have learned nothing; they play on log-mel frames, your spans, your
# loss:
#
# - **the copier** predicts the nearest frame that is still visible;
# - **the listener to voices** has not heard the recording at all. It predicts the mean frame of six
#   *other* recordings by the same voice: all it knows is who speaks.
#
# > **Predict.** Chance is 1 in 11. How often does the copier win if single frames are hidden ($M = 1$),
# > how often with spans of 10, half of the frames hidden in both cases? How often does the second one
# > win if the distractors come from its own recording, and how often if they come from the whole batch?

# %%
NEGATIVES = 10


def nearest_visible(mask):
    """For each frame, the place of the nearest frame that is not hidden, [B, L]."""
    places = torch.arange(mask.shape[1])
    distance = (places[:, None] - places).abs() + 1000 * mask[:, None, :]
    return distance.argmin(dim=-1)


def voice_mean(row, frames_of, count=6):
    """The mean log-mel frame of other recordings by the voice of this one."""
    same = [i for i in whole.tolist() if unlabelled.speakers[i] == unlabelled.speakers[row]]
    return frames_of([i for i in same if i != row][:count]).mean(dim=(0, 1))


# %% tags=["experiment"]
sounds, lengths = standardised(unlabelled), unlabelled.lengths
whole = (lengths >= RATE).nonzero().flatten()
LENGTHS = (1, 2, 3, 5, 10)
copier = {length: [] for length in LENGTHS}
voice = {"same recording": [], "whole batch": []}
middle, spread_of = (
    f(log_mel(sounds[whole, :RATE], mels), dim=(0, 2)) for f in (torch.mean, torch.std)
)


def standard_mels(rows):
    """One second of these recordings as log-mel frames, each band at mean 0 and variance 1."""
    return (log_mel(sounds[rows, :RATE], mels).mT - middle) / spread_of


# %% tags=["experiment"]
for seed in range(SEED, SEED + 3):
    draw = set_seed(seed)
    rows = whole[torch.randperm(len(whole), generator=draw)[:60]]
    loud = standard_mels(rows)
    means = torch.stack([voice_mean(row, standard_mels) for row in rows.tolist()])[:, None]
    for length in LENGTHS:
        mask = span_mask(*loud.shape[:2], 1 - 0.51 ** (1 / length), length, draw)
        mask[mask.sum(dim=1) < 2, :2] = True
        hidden, rivals = loud[mask], sample_negatives(mask, NEGATIVES, draw)
        copied = loud.gather(1, nearest_visible(mask)[..., None].expand_as(loud))[mask]
        copier[length].append(float(contrastive_loss(score_candidates(copied, hidden, rivals))[1]))
        if length == SPAN:
            guess = means.expand_as(loud)[mask]
            anyone = torch.randint(len(hidden), rivals.shape, generator=draw)
            for name, drawn in (("same recording", rivals), ("whole batch", anyone)):
                share = contrastive_loss(score_candidates(guess, hidden, drawn))[1]
                voice[name].append(float(share))

# %% tags=["experiment", "hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
left.plot(LENGTHS, [sum(n) / len(n) for n in copier.values()], color=BLUE)
left.plot(LENGTHS, list(copier.values()), ".", color=BLUE)
left.set(
    xlabel="span length M (frames of 20 ms), 49% hidden", ylabel="share of hidden frames found"
)
left.set_xticks(LENGTHS, LENGTHS)
left.set_title("Copying the nearest visible frame wins short spans")
for i, (name, found) in enumerate(voice.items()):
    right.bar(i, sum(found) / len(found), color=(BLUE, ORANGE)[i], alpha=0.4)
    right.plot([i] * len(found), found, "o", color=(BLUE, ORANGE)[i], ms=4)
    print(f"mean of the voice, distractors from the {name}: found {mean_and_spread(found)}")
right.set_xticks(range(2), [f"from the {name}" for name in voice])
right.set(xlabel="distractors", ylim=(0, None))
right.set_title("Knowing only the voice helps against strangers")
for axis in (left, right):
    axis.axhline(1 / (NEGATIVES + 1), color=GREY, ls=":", label="chance, 1 in 11")
left.legend()
for length, found in copier.items():
    print(f"copier, M = {length:2}: found {mean_and_spread(found)}")
show(
    figure,
    "guessers",
    "Left: the share of frames that a copier finds falls steeply as spans get longer. Right: a guesser "
    "that knows only the voice finds clearly more frames against the whole batch than "
    "against its own recording, where it is near chance.",
)

# %% [markdown]
# *What to see.* With single frames hidden, a copier wins most rounds: sound changes slowly, and the
# windows overlap. Longer spans take that away. (Appendix A says the same of the real model: shorter
# spans raise the accuracy of the game, and with single frames it becomes trivial. Varied lengths
# matter, too: table 5 has 7.97% word errors with overlapping spans of 10, and 9.15% without
# overlap.)
#
# On the right is a guesser that has not heard the recording. Against frames of other recordings it
# wins about twice as often as chance, within the recording hardly more. A model that can win by the
# voice will learn the voice. The paper tried 50 distractors from the utterance and 50 from the
# batch: the word error rate rose from 7.97 to 8.79 (table 13, appendix F).

# %% [markdown]
# ## 9. The game is played
#
# All parts are yours; this class only joins them. Two small linear layers take prediction and
# target to one space of 64 numbers. Here the targets are *continuous*: the features themselves. The
# paper's are entries of a codebook, and next week is about the difference.


# %%
class Pretrainer(nn.Module):
    """Your encoder and your context network, and a space in which they meet."""

    def __init__(
        self, widths=(32, 64, 64, 64), kernels=KERNELS, strides=STRIDES, d_model=64, layers=2
    ):
        super().__init__()
        self.kernels, self.strides = kernels, strides
        self.encoder = FeatureEncoder(widths, kernels, strides)
        self.feature_norm = nn.LayerNorm(widths[-1])
        self.context = ContextNetwork(widths[-1], d_model, layers)
        self.to_prediction = nn.Linear(d_model, 64)
        self.to_target = nn.Linear(widths[-1], 64)

    def features(self, waveforms):
        return self.feature_norm(self.encoder(waveforms))

    def forward(self, waveforms, mask):
        """Return predictions and targets of the hidden frames, each (frames, 64)."""
        features = self.features(waveforms)
        states = self.context(features, mask)
        return self.to_prediction(states[mask]), self.to_target(features[mask])


# %% [markdown]
# A batch is eight crops of one second; the paper crops 15.6 s. No transcript is in it, no voice, no
# padding mask. We leave out what the paper needs at its size: dropout, dropped layers, and, for
# Librispeech, a penalty on large features and a tenth of the gradient for the convolutions (4.2).


# %%
def crops(sounds, lengths, size, seed, samples=RATE):
    """Draw recordings without end, a random second of each, zeros where it is shorter."""
    draw = torch.Generator().manual_seed(seed)
    sounds = F.pad(sounds, (0, samples))
    while True:
        rows = torch.randint(len(sounds), (size,), generator=draw)
        room = (lengths[rows] - samples).clamp(min=0) + 1
        first = (torch.rand(size, generator=draw) * room).long()
        yield sounds[rows[:, None], first[:, None] + torch.arange(samples)]


def draw_task(batch, frames, draw):
    """Hide spans, and choose distractors; nobody is left with a single hidden frame."""
    mask = span_mask(batch, frames, START, SPAN, draw)
    mask[mask.sum(dim=1) < 2, :SPAN] = True
    return mask.to(device), sample_negatives(mask, NEGATIVES, draw).to(device)


# %%
def pretrain(model, sounds, lengths, seed, steps=300, size=8, samples=RATE, watch=None):
    """Play the game; return the run and the share of frames found at each step."""
    draw, found = torch.Generator().manual_seed(seed), []

    def step(model, waveforms):
        if watch is not None:
            watch(model, len(found))
        frames = count_frames(waveforms.shape[1], model.kernels, model.strides)
        mask, negatives = draw_task(len(waveforms), frames, draw)
        loss, share = contrastive_loss(score_candidates(*model(waveforms, mask), negatives))
        found.append(float(share))
        return loss

    batches = crops(sounds, lengths, size, seed, samples)
    run = fit(model, batches, step, steps=steps, lr=2e-3, device=device, progress=False)
    return run, found


# %% [markdown]
# To see the game from inside, we watch one recording of a voice that is not in the training set,
# with fixed gaps: the cosines of each prediction with the targets of *all* hidden frames. (The pack
# knows when each phoneme was said. We use that to label a figure, never to train.)
#
# > **Predict.** At step 0 the network knows nothing. Is its loss $\ln 11 = 2.40$, above or below? And
# > after 300 steps: which share of hidden frames does it find, of 1 in 11 by chance?


# %%
class Watch:
    """Keep the cosines between predictions and targets of one recording at some steps."""

    def __init__(self, waveform, mask, steps):
        self.waveform, self.mask, self.steps = waveform.to(device), mask.to(device), steps
        self.cosines = {}

    @torch.no_grad()
    def __call__(self, model, step):
        if step in self.steps:
            predicted, targets = model(self.waveform, self.mask)
            unit = F.normalize(predicted, dim=-1), F.normalize(targets, dim=-1)
            self.cosines[step] = (unit[0] @ unit[1].T).cpu()


# %% tags=["experiment"]
strangers = speech.load("unheard", sequences=3, size=60, **sizes)
longest = strangers.subset([int(strangers.lengths.argmax())])
frames = count_frames(int(longest.lengths[0]), KERNELS, STRIDES)
watched_mask = span_mask(1, frames, START, SPAN, set_seed(SEED))
watch = Watch(standardised(longest), watched_mask, (0, 20, 50, 100, 200, 299))
print(f"{longest.seconds:.1f} s, {int(watched_mask.sum())} of {frames} frames hidden")

# %% tags=["experiment"]
SEEDS = (SEED, SEED + 1, SEED + 2)
random_models, models, runs, shares = [], [], [], []
for seed in SEEDS:
    set_seed(seed)
    random_models.append(Pretrainer().to(device).eval())
    set_seed(seed)
    models.append(Pretrainer())
    run, found = pretrain(models[-1], sounds, lengths, seed, watch=watch if seed == SEED else None)
    runs.append(run)
    shares.append(found)
    print(
        f"seed {seed}: loss {run.loss[0]:.2f} → {sum(run.loss[-40:]) / 40:.2f} nats, "
        f"found {sum(found[-40:]) / 40:.2f}, {run.seconds:.0f} s"
    )
print(f"found in the last 40 steps: {mean_and_spread([sum(f[-40:]) / 40 for f in shares])}")

# %% [markdown]
# Nearly four in ten, instead of one in eleven. But section 8's copier found as many on log-mel
# frames, and had learned nothing. The games differ: the targets there were log-mel frames, here
# they are the model's own. So let the copier play in *this* space, on voices that the model never
# heard.

# %% tags=["experiment"]
others = standardised(strangers)[strangers.lengths >= RATE, :RATE]


@torch.no_grad()
def contest(model, draw):
    """The share of frames found by the model and by a copier, in the model's own space."""
    mask, rivals = draw_task(len(others), count_frames(RATE, KERNELS, STRIDES), draw)
    predicted, hidden = model(others.to(device), mask)
    space = model.to_target(model.features(others.to(device)))
    nearest = nearest_visible(mask.cpu()).to(device)
    guesses = predicted, space.gather(1, nearest[..., None].expand_as(space))[mask]
    return [float(contrastive_loss(score_candidates(g, hidden, rivals))[1]) for g in guesses]


by_model, copied = zip(*(contest(model, set_seed(SEED)) for model in models))
print(
    f"unheard voices: the model finds {mean_and_spread(by_model)}, a copier {mean_and_spread(copied)}"
)

# %% tags=["experiment", "hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for run, found, colour in zip(runs, shares, (BLUE, ORANGE, GREEN)):
    left.plot(run.smooth(20), color=colour)
    right.plot(torch.tensor(found).unfold(0, 20, 1).mean(dim=1), color=colour)
left.axhline(math.log(NEGATIVES + 1), color=GREY, ls=":", label="guessing, ln 11")
left.set(xlabel="step", ylabel="contrastive loss (nats)", title="The loss falls below guessing")
right.axhline(1 / (NEGATIVES + 1), color=GREY, ls=":", label="chance, 1 in 11")
right.axhline(sum(copied) / len(copied), color=RED, ls="--", label="a copier at the end")
right.set(xlabel="step", ylabel="share of hidden frames found", ylim=(0, 0.5))
last = sum(sum(found[-40:]) / 40 for found in shares) / len(shares)
right.set_title(f"{last:.0%} of the hidden frames are found among 11")
for axis in (left, right):
    axis.legend()
show(
    figure,
    "pretraining",
    "Left: three loss curves start above 2.4 nats, stay there for some steps and fall. Right: the "
    "share of hidden frames found rises from near chance to about 0.38, above a dotted line for a "
    "copier.",
)

# %% [markdown]
# *What to see.* The first losses lie *above* $\ln 11$: an untrained network is not undecided, it is
# sure and wrong, since random cosines divided by 0.1 are far apart. It takes some twenty steps to
# unlearn that. Then it finds more and more frames, in all three seeds alike, and more than a copier
# in its own space: it uses both sides of a gap, and what usually stands between them. Keep the
# habit: a pretext score means nothing until a player who understands nothing has been tried.
#
# Now look inside the game.

# %% tags=["experiment", "hide-input"]
hidden_at = watched_mask[0].nonzero().flatten()
borders = (hidden_at.diff() > 1).nonzero().flatten() + 0.5  # where one gap ends and the next begins


def sound_at(frame):
    """The phoneme in the middle of a frame's window; a dot for a pause."""
    time = (frame * HOP + field / 2) / RATE
    return next((p.symbol for p in longest.phonemes[0] if p.start <= time < p.end), "·")


# %% tags=["experiment"]
heard = [sound_at(int(place)) for place in hidden_at]
runs_of = [[0]]
for i in range(1, len(heard)):
    same = heard[i] == heard[i - 1] and hidden_at[i] == hidden_at[i - 1] + 1
    runs_of[-1].append(i) if same else runs_of.append([i])
middles = [sum(run) / len(run) for run in runs_of]
symbols = [heard[run[0]] for run in runs_of]
own = max((run for run in runs_of if heard[run[0]] != "·"), key=len)[0]

# %% tags=["experiment", "hide-input"]
rows = torch.stack([cosines[own] for cosines in watch.cosines.values()])
figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=[1.25, 1]
)
shades = {"cmap": "cividis", "vmin": -0.6, "vmax": 1}
left.imshow(rows, aspect="auto", **shades)
left.add_patch(plt.Rectangle((own - 0.5, -0.5), 1, len(rows), fill=False, color=RED, lw=1.5))
left.set_yticks(range(len(rows)), list(watch.cosines))
image = right.imshow(watch.cosines[299], **shades)
for axis in (left, right):
    axis.set_xticks(middles, symbols, fontsize=6.5)
    for border in borders:
        axis.axvline(border, color="white", lw=0.6)
right.set_yticks(middles, symbols, fontsize=6.5)
left.set(xlabel="candidate: sound of the hidden frame (red: the own frame)", ylabel="training step")
left.set_title(f"One guess, for a frame of '{heard[own]}', against all candidates")
right.set(xlabel="target: sound of the hidden frame", ylabel="prediction for the hidden frame")
right.set_title("All guesses after training")
figure.colorbar(image, ax=right, label="cosine")
show(
    figure,
    "candidates",
    "Left: cosines of one prediction with all hidden frames at six training steps, marked by their "
    "phonemes: at first without order, later high for frames of like sounds in several words. Right: "
    "a pattern of bright and dark blocks, one for each stretch of a sound.",
)

# %% [markdown]
# *What to see.* White lines separate the gaps. At step 0 there is no order. First the guess learns
# the difference between vowels and the rest: it is bright wherever a *similar sound* is hidden, in
# other words, too. On the right, guesses for one kind of sound are bright at that kind in all
# words. So the model says "a vowel like this", not "frame 27", and nobody told it that there are
# vowels. Neighbouring frames hold nearly the same sound, so many of its errors are answers one
# frame off, and 100% is neither reached nor wanted.

# %% [markdown]
# ## 10. Did it learn anything about words?
#
# The game is a pretext. Now freeze everything and ask a **linear probe**: from the states, averaged
# over a word's frames, which of 20 words was it? The probe gets 1 to 25 labels a word from the
# training voices and is examined on five voices that neither it nor the pre-training ever heard. A
# linear probe cannot learn to hear; it can only use what is there.
#
# Three contestants, same probe: **log-mel** frames (week 2), the states of the network **before**
# training, and **after**. The second is the control that many reports forget: a random network is
# already a filterbank of a kind.


# %%
@torch.no_grad()
def frozen_states(model, words):
    """Return the states of each word's frames, and which frames are real."""
    sounds, parts, shape = standardised(words), [], (model.kernels, model.strides)
    counts = torch.tensor([count_frames(n, *shape) for n in words.lengths.tolist()])
    is_frame = torch.arange(count_frames(sounds.shape[1], *shape)) < counts[:, None]
    for part, real in zip(sounds.split(100), is_frame.split(100)):
        features = model.features(part.to(device))
        parts.append(model.context(features, None, real.to(device)).cpu())
    return torch.cat(parts), is_frame


def mel_frames(words):
    """Return log-mel frames at the same rate, and which are real."""
    frames = log_mel(standardised(words), mels).mT
    counts = torch.tensor([mels.num_frames(n) for n in words.lengths.tolist()])
    return frames, torch.arange(frames.shape[1]) < counts[:, None]


# %%
def pooled(frames, is_frame, parts=1):
    """Return the mean over each of `parts` equal stretches of a word, side by side."""
    place = torch.arange(frames.shape[1]) / is_frame.sum(dim=1, keepdim=True)
    means = []
    for i in range(parts):
        here = ((place >= i / parts) & (place < (i + 1) / parts)).unsqueeze(-1)
        means.append((frames * here).sum(dim=1) / here.sum(dim=1).clamp(min=1))
    return torch.cat(means, dim=1)


def probe(train_x, train_y, test_x, test_y, classes=20, strength=0.3):
    """Fit a linear softmax classifier to frozen features; return its accuracy on the others."""
    middle, scale = train_x.mean(dim=0), train_x.std(dim=0) + 1e-6
    train_x, test_x = (train_x - middle) / scale, (test_x - middle) / scale
    layer = nn.Linear(train_x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        penalty = layer.weight.square().sum() / (2 * strength * len(train_x))
        value = F.cross_entropy(layer(train_x), train_y) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    return (layer(test_x).argmax(dim=1) == test_y).float().mean().item()


# %% [markdown]
# > **Predict.** Who wins at three labels a word, and who at twenty-five? Chance is 1 in 20. And what changes
# > if the probe gets three averages, of a word's beginning, middle and end, instead of one?


# %% tags=["experiment"]
def choose(words, each, draw):
    """Return `each` rows of every word, at random."""
    rows = [(words.labels == i).nonzero().flatten() for i in range(len(words.class_names))]
    return torch.cat([row[torch.randperm(len(row), generator=draw)[:each]] for row in rows])


pool = labelled.subset(choose(labelled, 30, torch.Generator().manual_seed(SEED)))
frozen = {"log-mel": [(mel_frames(pool), mel_frames(unheard))]}
for name, networks in (("before training", random_models), ("after training", models)):
    frozen[name] = [(frozen_states(m, pool), frozen_states(m, unheard)) for m in networks]

# %% tags=["experiment"]
AMOUNTS, DRAWS = (1, 3, 10, 25), 3
scores = {}
for parts in (1, 3):
    for name, pairs in frozen.items():
        for each in AMOUNTS:
            drawn = scores[parts, name, each] = []
            for n in range(DRAWS):
                rows = choose(pool, each, torch.Generator().manual_seed(SEED + n))
                for train, test in pairs:
                    x, test_x = pooled(*train, parts), pooled(*test, parts)
                    drawn.append(probe(x[rows], pool.labels[rows], test_x, unheard.labels))
        told = (f"{each}: {mean_and_spread(scores[parts, name, each])}" for each in AMOUNTS)
        print(f"{parts} x mean, {name:15}", *told, sep="  ")

# %% tags=["experiment", "hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for axis, parts in zip(axes, (1, 3)):
    for name, colour in zip(frozen, (ORANGE, GREY, BLUE)):
        drawn = [scores[parts, name, each] for each in AMOUNTS]
        axis.plot(AMOUNTS, [sum(d) / len(d) for d in drawn], "-", color=colour, label=name)
        for each, values in zip(AMOUNTS, drawn):
            axis.plot([each] * len(values), values, ".", color=colour, ms=3)
    axis.axhline(1 / 20, color="black", lw=0.8, ls=":", label="chance, 1 in 20")
    axis.set(xscale="log", xlabel="labels a word", ylim=(0, 1))
    axis.set_xticks(AMOUNTS, AMOUNTS)
    axis.minorticks_off()
axes[0].set(ylabel="accuracy on unheard voices", title="One mean over the word: the states win")
axes[1].set_title("Beginning, middle, end: log-mel wins")
axes[0].legend()
show(
    figure,
    "frozen_features",
    "Accuracy against labels a word. With one mean the pre-trained states lie above log-mel and far "
    "above the untrained network; with three means log-mel lies highest.",
)

# %% [markdown]
# *What to see.* On the left the states after training are best at every amount of labels, and two
# to three times as good as before training: the game taught the network something about *words*,
# though nobody named one. Log-mel hardly gains after ten labels: an average over the word has
# forgotten the order of its sounds, and a linear probe cannot bring it back. A state has looked
# around, so an average of states still knows something of the order.
#
# On the right the order is handed to the probe, and **log-mel wins clearly**. Both pictures are
# true, and a report that shows only the left one misleads. What our model adds is mostly context;
# the sounds themselves it hears worse than forty fixed filters, after a few hundred steps on 24
# minutes of synthetic speech. The paper's model heard 53,200 hours, and is then fine-tuned as a
# whole, which week 7 does here.
#
# What else do the features know? The same probe, asked for the *voice*, on new recordings of the
# 23 training voices (chance 0.04; the word, 0.05):

# %% tags=["experiment"]
takes = speech.load("test", size=300, **sizes)
voices = sorted(set(labelled.speakers))
who, asked = (torch.tensor([voices.index(v) for v in w.speakers]) for w in (pool, takes))
heard = {"log-mel": [mel_frames(takes)]}
heard["before training"] = [frozen_states(m, takes) for m in random_models]
heard["after training"] = [frozen_states(m, takes) for m in models]
# %% tags=["experiment"]
for name, pairs in frozen.items():
    found = {"voice": [], "word": []}
    for (known, _), new in zip(pairs, heard[name]):
        x, test_x = pooled(*known), pooled(*new)
        found["voice"].append(probe(x, who, test_x, asked, len(voices)))
        found["word"].append(probe(x, pool.labels, test_x, takes.labels))
    told = (
        f"{what} {sum(n) / len(n):.2f} (± {torch.tensor(n).std(correction=0):.2f})"
        for what, n in found.items()
    )
    print(f"{name:16}", *told, sep="  ")

# %% [markdown]
# Log-mel knows voices about as well as words. After training the network knows words far better
# than voices, and so did, less clearly, the untrained one. Against log-mel the voice has shrunk,
# against the untrained network it has grown: nothing in the loss removes it. That distractors of
# the same voice are the cause would need a second run, with distractors from the batch: go bigger.

# %% [markdown]
# ## 11. What continuous targets cost
#
# Our target is the feature vector itself, in all its detail. The paper's reason against it: such
# targets can hold details of the current recording, speaker and background for example, which make
# the game easier and teach less. But the distractors come from the same recording: how can the
# speaker help? What is constant in it cannot. What varies from moment to moment can: pitch, noise,
# how one sound colours the next. The paper measured it (section 5.4, table 4; base model after
# 250,000 updates, $p = 0.075$, fine-tuned on 10 hours, three seeds, word error rate on dev-clean
# and dev-other together):
#
# | what the transformer reads | what it must guess | word error rate, % |
# |---|---|---|
# | continuous | **quantized** | **7.97** ± 0.02 |
# | continuous | continuous (as here) | 8.58 ± 0.08 |
# | quantized | continuous | 11.18 ± 0.16 |
# | quantized | quantized | 12.18 ± 0.41 |
#
# In that setting the accuracy of the game *rises* with continuous targets, from 62% to 78%, while
# the model gets worse. Compare pretext scores only between models that play the same game. Two
# readings go beyond the table and are often heard: that quantization of the *input* helps (it is
# the largest loss of the table), and that continuous targets fail (they cost 0.6 points). Next week
# you build the codebook.

# %% [markdown]
# ## 12. Is this wav2vec 2.0?
#
# Your model at seed 0, weight by weight, goes into `mmlearn.wav2vec2.Wav2Vec2`, and from there into
# the `transformers` library. All three must say the same of a padded batch.

# %% tags=["experiment"]
from mmlearn.wav2vec2 import Wav2Vec2

config = Wav2Vec2Config(
    conv_dim=(32, 64, 64, 64),
    conv_kernel=KERNELS,
    conv_stride=STRIDES,
    conv_bias=True,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    d_model=64,
    num_layers=2,
    num_heads=4,
    d_ff=256,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    sampling_rate=RATE,
)
mine = models[0].cpu().eval()
renamed = {"encoder.blocks": "encoder.blocks", "positions": "position_conv", "norm": "stream_norm"}
renamed |= {"projection": "feature_projection", "mask_vector": "masked_spec_embed"}

# %% tags=["experiment"]
weights = {f"feature_norm.{key}": value for key, value in mine.feature_norm.state_dict().items()}
for key, value in mine.context.state_dict().items():
    part = next(part for part in renamed if key.startswith(part))
    weights[renamed[part] + key.removeprefix(part)] = value
for i, (conv, norm) in enumerate(zip(mine.encoder.convs, mine.encoder.norms)):
    layer = f"feature_encoder.layers.{i}"
    weights |= {f"{layer}.kernel": conv.weight.mT, f"{layer}.kernel_bias": conv.bias}
    weights |= {f"{layer}.norm.weight": norm.weight, f"{layer}.norm.bias": norm.bias}
ours = Wav2Vec2(config).eval()
ours.load_state_dict(weights)  # refuses a missing, extra or mis-shaped weight
theirs = ours.to_hf().eval()

# %% tags=["experiment"]
few = unheard.subset(range(4))
waves = standardised(few)
real = few.attention_mask[:, : waves.shape[1]]
with torch.no_grad():
    states, is_frame = frozen_states(mine, few)
    out = ours(waves, real)
    reference = theirs(waves, attention_mask=real.long()).last_hidden_state
for name, other in (("mmlearn", out.states), ("transformers", reference)):
    print(f"{name}: states differ by at most {(states - other)[is_frame].abs().max():.1e}")

# %% [markdown]
# The loss, too: transformers computes its scores by one cosine for each pair and its spans with
# another function. The numbers of the game agree.

# %% tags=["experiment"]
from transformers import Wav2Vec2ForPreTraining

draw = set_seed(SEED)
gaps = span_mask(3, 60, 0.065, 10, draw)
predictions, answers = torch.randn(2, int(gaps.sum()), 16, generator=draw)
rivals = sample_negatives(gaps, 100, draw)
theirs_scores = (
    Wav2Vec2ForPreTraining.compute_contrastive_logits(
        answers[None, None], answers[rivals].transpose(0, 1)[:, None], predictions[None]
    )
    .squeeze(1)
    .T
)  # theirs: candidates first
mine_scores = score_candidates(predictions, answers, rivals)
print(f"scores differ by at most {(mine_scores - theirs_scores).abs().max():.1e}")

# %% [markdown]
# ## Questions to answer in your own words
#
# These two are read by a person. A few sentences each.

# %% [markdown] written="which_negatives" points=2
# **A colleague takes the distractors from all recordings of the batch: "a hundred times more to
# choose from, so a better contrast, and the accuracy of the game went up." What is happening, and
# what would you measure before you agree?**
#
# ### BEGIN SOLUTION
# Frames of other recordings differ in voice, microphone and room. They can be ruled out by these
# alone, so the game gets easier and its accuracy rises without the model having learned more about
# speech. In section 8 a guesser that knew only the voice, from other recordings, found about twice
# as many frames against the batch as against the recording. Scores of two different games cannot be
# compared; I would compare the frozen features with the same probe on unheard voices, or the word
# error rate after fine-tuning, over several seeds. In the paper 50 of 100 distractors from the
# batch raised the error rate from 7.97 to 8.79.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: other recordings are told apart by voice or channel, so the game is easier and rewards the
#   wrong thing (the guesser's numbers or the paper's help).
# - 1 point: accuracies of different games are not comparable; names a downstream measure (probe on unheard
#   voices, error rate after fine-tuning).
# ### END MARK SCHEME

# %% [markdown] written="what_the_probe_proves" points=2
# **From the left half of the last figure somebody concludes: "Pre-trained features are better than
# spectrograms." Which part of this does the figure support, which does it not, and which two
# controls in this notebook make the difference?**
#
# ### BEGIN SOLUTION
# It supports that averages of the pre-trained states tell words of unheard voices apart better than
# averages of log-mel frames, with a linear probe, at 1 to 25 labels a word. It does not support a
# statement about the features as such: with the order of beginning, middle and end given to the
# probe, log-mel is better. So most of the advantage on the left is context that an average of
# log-mel frames lacks. The controls are the probe with three means and the untrained network: the
# latter shows that it is the training, not the architecture, that lifts the states.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: limits the claim to averaged frames and this probe, and uses the right half (three means:
#   log-mel wins) against the general statement.
# - 1 point: names the untrained network as the control for the architecture (or says what part of the gain
#   is training).
# ### END MARK SCHEME

# %% [markdown]
# ## Go bigger
#
# With `SCALE = "gpu"` this cell trains your classes at 16 kHz with the paper's seven layers, wider
# and longer, and repeats the probe. With `DATA = "hub"` the sound is Speech Commands, real people;
# the examination is its test split, whose speakers are not in training.
#
# Things to try: spans of 10 frames; distractors from the batch; 100 distractors; which layer's
# states are best.


# %% tags=["experiment"]
def go_bigger(unlabelled, pool, exam, steps, size, channels=256, d_model=256, layers=6, seconds=1):
    """Pre-train your classes at 16 kHz on a set; return the run and two probes' accuracy."""
    kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
    set_seed(SEED)
    model = Pretrainer((channels,) * 7, kernels, strides, d_model, layers).to(device)
    untrained = pooled(*frozen_states(model.eval(), pool)), pooled(*frozen_states(model, exam))
    samples = int(seconds * unlabelled.sampling_rate)
    run, found = pretrain(
        model, standardised(unlabelled), unlabelled.lengths, SEED, steps, size, samples
    )
    trained = pooled(*frozen_states(model, pool)), pooled(*frozen_states(model, exam))
    classes = len(pool.class_names)
    before, after = (
        probe(x, pool.labels, y, exam.labels, classes) for x, y in (untrained, trained)
    )
    return run, found, before, after


# %% tags=["experiment"]
if SCALE == "gpu":
    if DATA == "hub":
        big = speech.load("train", source="hub", words="both", size=20_000)
        big_pool, big_exam = (
            big.subset(range(1_000)),
            speech.load("test", source="hub", words="both"),
        )
    else:
        big = speech.load("train", words="both", sequences=4, size=10_000, seed=SEED)
        big_pool, big_exam = (speech.load(s, words="both") for s in ("train", "unheard"))
    run, found, before, after = go_bigger(big, big_pool, big_exam, steps=5_000, size=64)
    print(
        f"{big.name}: found {sum(found[-100:]) / 100:.2f} of the hidden frames, {run.seconds:.0f} s"
    )
    print(f"linear probe: {before:.3f} before training, {after:.3f} after")
else:
    print("SCALE is 'cpu': set it to 'gpu' in the first cells to run this part.")

# %% [markdown]
# ## What was new
#
# | idea | in one line | where it stands in `mmlearn` |
# |---|---|---|
# | receptive field | walk backwards: $r \leftarrow (r-1)s + k$; 400 samples, hop 320, 49 frames | `wav2vec2.FeatureEncoder` |
# | norm over channels or over time | over time, padding changes every frame | `wav2vec2.ConvLayer` |
# | spans | starts with p, M frames each; $1-(1-p)^M$ hidden | `wav2vec2.sample_spans` |
# | hiding | one learned vector, after the targets are taken, before positions are added | `wav2vec2.Wav2Vec2` |
# | distractors | hidden frames of the same recording | `wav2vec2.sample_negatives` |
# | guessers that know nothing | a copier beats short spans, the voice beats foreign distractors | |
# | contrastive loss | cosine over 0.1, twins at minus infinity | `wav2vec2.contrastive_logits` |
# | linear probe with controls | untrained network, log-mel, order given or not | |
#
# **Beside the paper.** Figure 2 (appendix A) is your histogram of gaps: median 10 in both, mean
# about 14.5 beside 14.7, since gaps at the end are cut off and ours are drawn by coin. The paper's
# measure of what was learned is another than ours: the error rate after *fine-tuning* the whole
# model on labels (table 1), not a linear probe on frozen states. Its accuracy in the game, 62%
# among 101 with codebook targets and 78% with continuous ones (section 5.4), stands against our 38%
# or so among 11 (a copier: a quarter). The reasons: 95 million weights against our 0.2 million, 960
# hours against 24 minutes, 250,000 updates (in the ablations) against 300.

# %% [markdown]
# ## Interview questions
#
# <details><summary><b>Explain how wav2vec 2.0 learns without labels, in a minute.</b></summary>
#
# Seven strided convolutions turn the 16 kHz wave into 49 frames a second, each hearing 25 ms. About
# half of the frames are replaced by one learned vector, in spans: 6.5% of the frames are drawn as
# starts of spans of 10, which hides 49% in gaps of 14.7 frames on average. A transformer sees the
# rest; positions come from a convolution, added to the stream before a LayerNorm. At each hidden
# frame it must pick the quantized version of the true feature out of 101: itself and 100 drawn from
# other hidden frames of the same utterance; score: cosine over 0.1, loss: cross-entropy, plus 0.1
# times a diversity loss that keeps the codebooks in use. Then a linear layer and CTC, with labels.
# (Baevski 2020, sections 2 to 4.2.)
#
# *Often said wrongly:* that it masks the waveform (it masks the encoder's frames), that the
# transformer reads quantized frames (only the targets are quantized), that it reconstructs the
# sound.
#
# </details>
# <details><summary><b>One second at 16 kHz: how many frames, and why not 50? What if you feed 8 kHz?</b></summary>
#
# Kernels 10, 3, 3, 3, 3, 2, 2 and strides 5, 2, 2, 2, 2, 2, 2 hear 400 samples every 320. The last
# window must fit: $\lfloor (16000 - 400)/320 \rfloor + 1 = 49$. (The closed form and going layer by
# layer agree.) At 8 kHz the model would take 320 samples for 20 ms while they are 40: everything
# sounds an octave higher and twice as fast, 24 frames a second, and nothing raises an error.
# Resample first. (Section 4.2; exercise 1.)
#
# *Often said wrongly:* "50 frames a second"; that padding is harmless in every checkpoint (not in
# those with a norm over time, such as the base model).
#
# </details>
# <details><summary><b>How do you know that a self-supervised speech model has learned anything?</b></summary>
#
# Not from its pretext accuracy, which rises when the game gets easier: with continuous targets from
# 62% to 78%, while the word error rate goes from 7.97 to 8.58 (section 5.4). Freeze it and fit a
# linear probe, or fine-tune, on few labels; test on speakers that no stage has heard; compare with
# log-mel and with the same network untrained, over seeds. The paper: 10 minutes of labels after
# 53,200 hours without, word error rates
# 4.8/8.2 on test-clean/other. That is *with* a Transformer language model; without any it is 40.2/38.7 (tables
# 1 and 9).
#
# *Often said wrongly:* "ten minutes of labels suffice for 4.8% error", without the language model;
# or a probe without the untrained control.
#
# </details>

# %% [markdown]
# ## Papers
#
# - Baevski, Zhou, Mohamed, Auli 2020, [wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations](https://arxiv.org/abs/2006.11477):
#   sections 2 (model), 3.1 (masking), 3.2 (loss), 4.2 (sizes), 5.4 (what is quantized); appendix A, figure 2 (gaps);
#   tables 4, 9 and 13.
# - van den Oord, Li, Vinyals 2018, [Representation Learning with Contrastive Predictive Coding](https://arxiv.org/abs/1807.03748):
#   section 2.3, the loss. It predicts the future of the sound; wav2vec 2.0 fills gaps.
# - Schneider, Baevski, Collobert, Auli 2019, [wav2vec: Unsupervised Pre-training for Speech Recognition](https://arxiv.org/abs/1904.05862):
#   section 2: the first of the name, without a transformer.
