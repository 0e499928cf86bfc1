r"""Quantization: choose entries of a codebook, and learn the choice by gradient.

An argmax has no gradient. Gumbel noise turns it into a draw, a softmax at temperature τ stands in
for it on the way back, and a diversity loss on the perplexity keeps the codebook in use.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Quantized(NamedTuple):
    """The chosen entries, joined; which they were; and how many entries are in use."""

    codevectors: Float[Tensor, "frames D"]
    codes: Int[Tensor, "frames G"]
    perplexity: Float[Tensor, ""]


class GumbelQuantizer(nn.Module):
    r"""Replace each frame by one entry of each of G codebooks, and still learn the choice.

    $$ p_{g,v} = \frac{\exp\big((l_{g,v} + n_v) / \tau\big)}
       {\sum_k \exp\big((l_{g,k} + n_k) / \tau\big)}, \qquad n = -\log(-\log u),\; u \sim U(0, 1) $$

    Forward, the largest p decides (the Gumbel noise makes that a draw from softmax(l)). Backward,
    the gradient goes through p as if it had been used: the straight-through estimator. It is
    biased; a lower temperature τ makes it noisier, and less biased only where the loss is at most
    quadratic in the code (week 7 measures both). In evaluation: the largest l, no noise.

    G small codebooks instead of one: 2 × 320 entries name 102,400 sounds.

    Source: Baevski et al. 2020, equation 1; Jang et al. 2017.
    """

    def __init__(self, width: int, groups: int, entries: int, codevector_dim: int):
        super().__init__()
        self.temperature = 2.0
        self.codevectors = nn.Parameter(torch.rand(groups, entries, codevector_dim // groups))
        self.weight_proj = nn.Linear(width, groups * entries)
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(self, features: Float[Tensor, "frames channels"]) -> Quantized:
        groups, entries, _ = self.codevectors.shape
        # float32 also under autocast: the softmax's tail is where the gradient is
        logits = self.weight_proj(features).float().unflatten(-1, (groups, entries))
        if self.training:
            chosen = F.gumbel_softmax(logits, tau=self.temperature, hard=True)
            shares = logits.softmax(dim=-1)
        else:
            chosen = F.one_hot(logits.argmax(dim=-1), entries).to(logits.dtype)
            shares = chosen
        codevectors = torch.einsum("lgv,gvd->lgd", chosen, self.codevectors.to(logits.dtype))
        return Quantized(codevectors.flatten(1), chosen.argmax(dim=-1), perplexity(shares))


def perplexity(shares: Float[Tensor, "frames G V"]) -> Float[Tensor, ""]:
    r"""Count the entries in use, over all codebooks: G when each is stuck on one, at most G · V.

    $$ \sum_g \exp\Big(-\sum_v \bar p_{g,v} \log \bar p_{g,v}\Big), \qquad
       \bar p = \text{mean over frames} $$

    Source: Baevski et al. 2020, equation 4 in the form of its footnote, which is fairseq's code.
    """
    mean_GV = shares.mean(dim=0)
    # 0 log 0 is 0, but its slope is infinite, and infinity times the softmax's 0 is NaN.
    log_GV = mean_GV.clamp(min=torch.finfo(mean_GV.dtype).tiny).log()
    return torch.exp(-(mean_GV * log_GV).sum(dim=-1)).sum()


def gumbel_temperature(
    step: int, start: float = 2.0, end: float = 0.5, decay: float = 0.999995
) -> float:
    """Return the temperature after `step` updates: 2 → 0.5 (base) or 0.1 (large).

    Use it as `model.quantizer.temperature = gumbel_temperature(step)`.
    Source: Baevski et al. 2020, section 4.2.
    """
    return max(start * decay**step, end)
