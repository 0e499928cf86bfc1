"""The transformer: attention, the block, the encoder and the decoder.

CLIP, LayoutLM, wav2vec 2.0 and Meta-Transformer are this one encoder with different tokens,
positions and losses; each of their modules imports it from here.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def attention(
    queries: Float[Tensor, "*batch L K"],
    keys: Float[Tensor, "*batch S K"],
    values: Float[Tensor, "*batch S Kv"],
    mask: Bool[Tensor, "*#batch #L S"] | Float[Tensor, "*#batch #L S"] | None = None,
) -> tuple[Float[Tensor, "*batch L Kv"], Float[Tensor, "*batch L S"]]:
    r"""Mix the values, weighted by how well each key answers each query.

    $$ \mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{K}}\right) V $$

    Dividing by $\sqrt K$ keeps the scores' variance near 1, whatever the width, so that the
    softmax does not saturate. This is the formula as written; `Attention` calls PyTorch's fused
    kernel, which returns the same numbers without storing the weights.

    A mask of numbers is added to the scores, as LayoutLMv2 adds what it learns about distances;
    there minus infinity hides a key.

    Returns: the mixed values, and the weights, whose rows sum to 1.
    Raises: ValueError where the mask lets a query see no key: its softmax has no meaning.
    Notation: our K is the paper's d_k.
    Source: Vaswani et al. 2017, section 3.2.1, equation 1.
    """
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        hides = mask.dtype == torch.bool
        check_mask(mask if hides else mask > -torch.inf)
        scores = scores.masked_fill(~mask, -torch.inf) if hides else scores + mask
    weights = scores.softmax(dim=-1)
    return weights @ values, weights


def check_mask(mask: Bool[Tensor, "*batch S"], name: str = "mask") -> None:
    """Refuse a mask that hides every key from some query, and say which.

    Raises: ValueError with the index of the first such row.
    """
    if torch.compiler.is_compiling():
        return  # a check that reads values would break the compiled graph in two
    hidden = ~mask.any(dim=-1)
    if hidden.any():
        row = tuple(hidden.nonzero()[0].tolist())
        raise ValueError(
            f"{name} hides every position at index {row} (mask shape {tuple(mask.shape)}); "
            "each query needs at least one position that it may attend to (True = may attend)"
        )


def check_finite(values: Float[Tensor, "*shape"], name: str) -> None:
    """Refuse NaN and infinity, and say where: one would make every token that sees it NaN.

    Raises: ValueError with the index of the first such value.
    """
    if torch.compiler.is_compiling():
        return
    finite = values.isfinite()
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"{name}[{', '.join(map(str, place))}] is {values[place].item()}; "
            "every value must be a finite number"
        )


def causal_mask(length: int, device: torch.device | None = None) -> Bool[Tensor, "L L"]:
    """Let position i attend to positions 0 … i: the mask of a model that writes left to right."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Attention(nn.Module):
    r"""Attend with H heads at once, each in its own K = D / H dimensions.

    $$ \mathrm{MultiHead}(X, C) = [\mathrm{head}_1; \dots; \mathrm{head}_H]\,W^O, \qquad
       \mathrm{head}_h = \mathrm{Attention}(XW^Q_h,\; CW^K_h,\; CW^V_h) $$

    Queries come from `x`. Keys and values come from `context`: from `x` itself in self-attention,
    from another sequence, perhaps of another modality, in cross-attention.

    Raises: ValueError when d_model is not a multiple of num_heads.
    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self, d_model: int, num_heads: int, *, d_context: int | None = None, dropout: float = 0.0
    ):
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(
                f"d_model={d_model} does not divide into num_heads={num_heads}; "
                "choose a width that is a multiple of the number of heads"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_context or d_model, d_model)
        self.v_proj = nn.Linear(d_context or d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        x_BLD: Float[Tensor, "B L D"],
        context_BSD: Float[Tensor, "B S Dc"] | None = None,
        mask: Bool[Tensor, "#B #H #L S"] | Float[Tensor, "#B #H #L S"] | None = None,
        causal: bool = False,
        need_weights: bool = False,
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B H L S"] | None]:
        """Return the attended states and, when asked, every head's weights (None otherwise)."""
        context_BSD = x_BLD if context_BSD is None else context_BSD
        queries_BHLK = self._split_heads(self.q_proj(x_BLD))
        keys_BHSK = self._split_heads(self.k_proj(context_BSD))
        values_BHSK = self._split_heads(self.v_proj(context_BSD))

        if causal and (mask is not None or need_weights):
            triangle = causal_mask(x_BLD.shape[1], x_BLD.device)[None, None]
            if mask is not None and mask.dtype != torch.bool:
                mask, causal = mask.masked_fill(~triangle, -torch.inf), False
            else:
                mask, causal = triangle if mask is None else triangle & mask, False

        if need_weights:
            mixed_BHLK, weights_BHLS = attention(queries_BHLK, keys_BHSK, values_BHSK, mask)
        else:
            mixed_BHLK = F.scaled_dot_product_attention(
                queries_BHLK,
                keys_BHSK,
                values_BHSK,
                attn_mask=mask,
                is_causal=causal,
                dropout_p=self.dropout if self.training else 0.0,
            )
            weights_BHLS = None
        return self.out_proj(mixed_BHLK.transpose(1, 2).flatten(2)), weights_BHLS

    def _split_heads(self, states: Float[Tensor, "B L D"]) -> Float[Tensor, "B H L K"]:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def quick_gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Approximate GELU by $x\,\sigma(1.702x)$, as OpenAI's CLIP was trained.

    It differs from GELU by up to 0.0203. A CLIP checkpoint run with the other one still works, only
    worse, which is why the mistake goes unnoticed. It can be differentiated once.
    Source: Hendrycks and Gimpel 2016, section 2.
    """
    return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    """Read silu(1.702x) / 1.702, where silu(z) = z σ(z), which has a fused kernel each way.

    The chain rule's 1.702 cancels the division, so the gradient is silu's own. A plain product with
    a sigmoid, differentiated by autograd, passes over memory more than twice as often.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(1.702 * x).div_(1.702)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, 1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "relu": F.relu}


class MLP(nn.Module):
    r"""Transform each token by itself: widen to F, bend, narrow to D.

    Raises: ValueError for an activation that is not known; guessing would ruin a checkpoint.
    Source: Vaswani et al. 2017, section 3.3.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "gelu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} is not known; choose one of {sorted(ACTIVATIONS)}"
            )
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return self.fc2(self.activation(self.fc1(x_BLD)))


class Block(nn.Module):
    r"""Let tokens exchange (attention), then think (MLP); add both to the residual stream.

    Pre-norm, where the residual path is never normalised, trains without warm-up (CLIP, ViT,
    wav2vec 2.0 large):

    $$ x \leftarrow x + \mathrm{Attention}(\mathrm{LN}(x)), \qquad
       x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)) $$

    Post-norm is the original (BERT, LayoutLM, wav2vec 2.0 base):

    $$ x \leftarrow \mathrm{LN}(x + \mathrm{Attention}(x)), \qquad
       x \leftarrow \mathrm{LN}(x + \mathrm{MLP}(x)) $$

    With `d_context`, a cross-attention to `context` stands between the two, as in a decoder.

    Raises: ValueError for a `norm` other than "pre" or "post".
    Source: Vaswani et al. 2017, section 3.1; Xiong et al. 2020, figure 1, for the two norms.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        norm: str = "pre",
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        d_context: int | None = None,
    ):
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm={norm!r} is not known; choose 'pre' or 'post'")
        self.pre_norm = norm == "pre"
        self.attention = Attention(d_model, num_heads, dropout=dropout)
        self.attention_norm = nn.LayerNorm(d_model, eps=norm_eps)
        if d_context is not None:
            self.cross_attention = Attention(
                d_model, num_heads, d_context=d_context, dropout=dropout
            )
            self.cross_attention_norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.mlp = MLP(d_model, d_ff, activation)
        self.mlp_norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        mask: Bool[Tensor, "#B #H #L S"] | Float[Tensor, "#B #H #L S"] | None = None,
        causal: bool = False,
        context: Float[Tensor, "B Sc Dc"] | None = None,
        context_mask: Bool[Tensor, "#B #H #L Sc"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        def attend(x):
            return self.attention(x, mask=mask, causal=causal)[0]

        def attend_to_context(x):
            return self.cross_attention(x, context, context_mask)[0]

        x = self._add(x, attend, self.attention_norm)
        if context is not None:
            x = self._add(x, attend_to_context, self.cross_attention_norm)
        return self._add(x, self.mlp, self.mlp_norm)

    def _add(self, x, sublayer, norm):
        if self.pre_norm:
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))

    def read(
        self,
        x: Float[Tensor, "B L D"],
        position: Int[Tensor, "B"],
        mask: Bool[Tensor, "#B #H #L L"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B D"]:
        """Return this block's output at one position per sequence, and compute no other.

        A model that reads only its class token, or its end-of-text token, after the last block
        needs keys and values from every token there, but one query, one output projection and one
        MLP row: of the block's 12 D² multiplications per token, 10 D² fall away.
        """
        batch = torch.arange(len(x), device=x.device)
        if mask is not None and mask.shape[2] > 1:
            mask = mask.expand(len(x), -1, -1, -1)[batch, :, position].unsqueeze(2)
        if causal:
            past = torch.arange(x.shape[1], device=x.device) <= position[:, None]
            mask = past[:, None, None] if mask is None else past[:, None, None] & mask
        context_BLD = self.attention_norm(x) if self.pre_norm else x

        def attend(query_B1D):
            return self.attention(query_B1D, context_BLD, mask)[0]

        row_B1D = self._add(x[batch, position].unsqueeze(1), attend, self.attention_norm)
        return self._add(row_B1D, self.mlp, self.mlp_norm).squeeze(1)


class Encoder(nn.Module):
    """Stack blocks: every token may look at every other that the mask allows.

    Keyword arguments go to `Block`. There is no norm at the end: the models differ in it, so each
    adds its own.
    """

    def __init__(self, num_layers: int, d_model: int, num_heads: int, d_ff: int, **block):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(d_model, num_heads, d_ff, **block) for _ in range(num_layers)
        )

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        mask: Bool[Tensor, "#B #H #L L"] | Float[Tensor, "#B #H #L L"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B L D"]:
        for block in self.blocks:
            x = block(x, mask, causal)
        return x

    def read(
        self,
        x: Float[Tensor, "B L D"],
        position: Int[Tensor, "B"],
        mask: Bool[Tensor, "#B #H #L L"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B D"]:
        """Return the states at one position per sequence; the last block computes only those."""
        for block in self.blocks[:-1]:
            x = block(x, mask, causal)
        return self.blocks[-1].read(x, position, mask, causal)


class Decoder(nn.Module):
    """Stack blocks that look back at their own tokens and across at a context.

    Source: Vaswani et al. 2017, section 3.1, figure 1, right half.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        d_context: int,
        **block,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(d_model, num_heads, d_ff, d_context=d_context, **block) for _ in range(num_layers)
        )

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        context: Float[Tensor, "B S Dc"],
        mask: Bool[Tensor, "#B #H #L L"] | None = None,
        context_mask: Bool[Tensor, "#B #H #L S"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        for block in self.blocks:
            x = block(x, mask, causal=True, context=context, context_mask=context_mask)
        return x


def sinusoidal_positions(length: int, d_model: int) -> Float[Tensor, "L D"]:
    r"""Give each position a row of sines and cosines, from fast to slow.

    $$ P_{l,2i} = \sin\!\big(l / 10000^{2i/D}\big), \qquad
       P_{l,2i+1} = \cos\!\big(l / 10000^{2i/D}\big) $$

    Shifting the position rotates each (sine, cosine) pair by a fixed angle, so a relative distance
    is a linear map of the row.

    Raises: ValueError for an odd d_model.
    Source: Vaswani et al. 2017, section 3.5.
    """
    if d_model % 2:
        raise ValueError(
            f"d_model={d_model} is odd; sines and cosines come in pairs, so make it even"
        )
    position_L1 = torch.arange(length, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10_000) / d_model))
    positions_LD = torch.empty(length, d_model)
    positions_LD[:, 0::2] = torch.sin(position_L1 * frequency)
    positions_LD[:, 1::2] = torch.cos(position_L1 * frequency)
    return positions_LD
