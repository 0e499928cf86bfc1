"""Attention, the block, the encoder and the decoder."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmlearn.transformer import (
    MLP,
    Attention,
    Block,
    Decoder,
    Encoder,
    attention,
    causal_mask,
    check_mask,
    quick_gelu,
    sinusoidal_positions,
)

# Two float32 sums of a few dozen terms in another order differ by about 1e-6.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def random_heads(B=2, H=3, L=4, S=5, K=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, L, K), (B, H, S, K), (B, H, S, K))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def torch_attention(d_model, num_heads, ours: Attention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(d_model, num_heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight])
        )
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        theirs.out_proj.bias.copy_(ours.out_proj.bias)
    return theirs


def test_attention_equals_torch_with_and_without_a_mask():
    queries, keys, values = random_heads()
    mask = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    for m in (None, mask):
        ours, _ = attention(queries, keys, values, m)
        theirs = F.scaled_dot_product_attention(queries, keys, values, attn_mask=m)
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_attention_by_hand():
    # Scores are 0 and ln 3 after the division by sqrt(K) = 2, so the weights are 1/4 and 3/4.
    queries = torch.tensor([[1.0, 0, 0, 0]])
    keys = torch.tensor([[0.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]])
    values = torch.tensor([[0.0], [4.0]])
    mixed, weights = attention(queries, keys, values)
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(mixed, torch.tensor([[3.0]]))


def test_weights_of_every_query_sum_to_one_and_hidden_keys_get_none():
    queries, keys, values = random_heads()
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[:, 3] = False
    _, weights = attention(queries, keys, values, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4))
    assert (weights[..., 3] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_mask_of_numbers_is_added_to_the_scores(causal, need_weights):
    torch.manual_seed(0)
    layer, x, bias = Attention(8, 2), torch.randn(3, 5, 8), torch.randn(3, 1, 5, 5)
    bias[:, :, 1:, 0] = -torch.inf  # the first query keeps its key
    scores = layer._split_heads(layer.q_proj(x)) @ layer._split_heads(layer.k_proj(x)).mT / 2 + bias
    if causal:
        scores = scores.masked_fill(~causal_mask(5), -torch.inf)
    mixed = scores.softmax(dim=-1) @ layer._split_heads(layer.v_proj(x))
    right = layer.out_proj(mixed.transpose(1, 2).flatten(2))
    states, weights = layer(x, mask=bias, causal=causal, need_weights=need_weights)
    assert torch.allclose(states, right, **CLOSE)
    assert weights is None or torch.allclose(weights, scores.softmax(dim=-1), **CLOSE)
    encoder = Encoder(2, 8, 2, 16)
    assert encoder(x, bias, causal).shape == x.shape


def test_a_mask_that_hides_everything_from_a_query_is_refused_by_its_index():
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[1, 0, 2] = False
    with pytest.raises(ValueError, match=r"hides every position at index \(1, 0, 2\)"):
        attention(*random_heads(), mask)
    with pytest.raises(ValueError, match="attention_mask hides"):
        check_mask(torch.zeros(1, 3, dtype=torch.bool), "attention_mask")


def test_causal_mask_lets_each_position_see_itself_and_its_past():
    assert causal_mask(3).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_multi_head_attention_equals_torch_in_outputs_weights_and_gradients(causal):
    ours = Attention(12, 3)
    theirs = torch_attention(12, 3, ours)
    x = torch.randn(2, 5, 12)
    theirs_mask = ~causal_mask(5) if causal else None  # torch hides where True
    for need_weights in (False, True):
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out_ours, weights = ours(x_ours, causal=causal, need_weights=need_weights)
        out_theirs, their_weights = theirs(
            x_theirs, x_theirs, x_theirs, attn_mask=theirs_mask, average_attn_weights=False
        )
        torch.testing.assert_close(out_ours, out_theirs, **CLOSE)
        if need_weights:
            torch.testing.assert_close(weights, their_weights, **CLOSE)
        out_ours.square().sum().backward()
        out_theirs.square().sum().backward()
        torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-4, atol=1e-5)


def test_all_ones_attention_gives_the_numbers_that_torchmultimodal_publishes():
    # Its test_multi_head_attention.py: every weight is 1, so the largest key takes all. Its value,
    # the sum of its token plus 1, goes through the output projection: 4 (10 + 1) + 1 = 45.
    tokens = torch.tensor([[[1.0, 2, 3, 1], [4, 3, 2, 1], [1, 1, 1, 1]]])
    context = torch.tensor([[[3.0, 2], [1, 1]]])
    for d_context, bias, published in ((None, 1, 45.0), (2, 1, 25.0), (2, 0, 21.0)):
        layer = Attention(4, 2, d_context=d_context)
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
            nn.init.ones_(linear.weight)
            nn.init.constant_(linear.bias, bias)
        nn.init.ones_(layer.out_proj.bias)
        out, _ = layer(tokens, context if d_context else None)
        torch.testing.assert_close(out, torch.full((1, 3, 4), published), rtol=0, atol=1e-4)


def test_cross_attention_reads_a_context_of_another_width_and_length():
    layer = Attention(12, 3, d_context=7)
    context = torch.randn(2, 9, 7)
    out, weights = layer(torch.randn(2, 5, 12), context, need_weights=True)
    assert out.shape == (2, 5, 12)
    assert weights.shape == (2, 3, 5, 9)


def test_attention_without_positions_does_not_know_the_order():
    layer = Attention(12, 3)
    x, order = torch.randn(2, 5, 12), torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(layer(x[:, order])[0], layer(x)[0][:, order], **CLOSE)


def test_padding_that_is_hidden_changes_nothing():
    layer = Attention(12, 3)
    x = torch.randn(2, 5, 12)
    padded = torch.cat([x, torch.full((2, 3, 12), 1e3)], dim=1)
    mask = (torch.arange(8) < 5).expand(2, 1, 1, 8)
    torch.testing.assert_close(layer(padded, mask=mask)[0][:, :5], layer(x)[0], **CLOSE)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_block_equals_torch_in_both_norms(norm, activation):
    ours = Block(12, 3, 20, norm=norm, activation=activation)
    theirs = nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation=activation, batch_first=True, norm_first=norm == "pre"
    )
    theirs.self_attn = torch_attention(12, 3, ours.attention)
    theirs.linear1, theirs.linear2 = ours.mlp.fc1, ours.mlp.fc2
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    mask = (torch.arange(5) < 4).expand(2, 1, 1, 5)
    theirs_out = theirs(x, src_key_padding_mask=~mask[:, 0, 0])
    torch.testing.assert_close(ours(x, mask)[:, :4], theirs_out[:, :4], **CLOSE)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_decoder_equals_torch(norm):
    ours = Decoder(2, 12, 3, 20, d_context=12, norm=norm)
    theirs_layers = []
    for block in ours.blocks:
        layer = nn.TransformerDecoderLayer(
            12, 3, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm == "pre"
        )
        layer.self_attn = torch_attention(12, 3, block.attention)
        layer.multihead_attn = torch_attention(12, 3, block.cross_attention)
        layer.linear1, layer.linear2 = block.mlp.fc1, block.mlp.fc2
        theirs_layers.append(layer)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    expected = x
    for layer in theirs_layers:
        expected = layer(expected, context, tgt_mask=~causal_mask(5))
    torch.testing.assert_close(ours(x, context), expected, **CLOSE)


def test_decoder_does_not_see_the_future():
    decoder = Decoder(2, 12, 3, 20, d_context=7)
    x, context = torch.randn(1, 6, 12, requires_grad=True), torch.randn(1, 4, 7)
    decoder(x, context)[0, 2].sum().backward()
    assert (x.grad[0, 3:] == 0).all()
    assert (x.grad[0, :3] != 0).any(dim=-1).all()


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_reading_one_position_equals_computing_all_of_them(causal, masked, norm):
    encoder = Encoder(3, 12, 3, 20, norm=norm)
    x = torch.randn(4, 6, 12, requires_grad=True)
    mask = (
        (torch.arange(6) < torch.tensor([6, 5, 4, 6])[:, None])[:, None, None] if masked else None
    )
    position = torch.tensor([5, 4, 0, 2])
    everything = encoder(x, mask, causal)[torch.arange(4), position]
    row = encoder.read(x, position, mask, causal)
    torch.testing.assert_close(row, everything, **CLOSE)
    weight = torch.randn(4, 12)
    (grad_row,) = torch.autograd.grad((row * weight).sum(), x, retain_graph=True)
    (grad_all,) = torch.autograd.grad((everything * weight).sum(), x)
    torch.testing.assert_close(grad_row, grad_all, rtol=1e-4, atol=1e-5)


def test_reading_one_position_honours_a_mask_that_differs_by_query():
    encoder = Encoder(1, 12, 3, 20)
    x, position = torch.randn(2, 5, 12), torch.tensor([1, 3])
    mask = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(2)) > 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    everything = encoder(x, mask)[torch.arange(2), position]
    torch.testing.assert_close(encoder.read(x, position, mask), everything, **CLOSE)


def test_dropout_acts_in_training_only():
    block = Block(12, 3, 20, dropout=0.5)
    x = torch.randn(2, 5, 12)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_quick_gelu_is_x_times_sigmoid_and_at_most_0_0203_from_gelu():
    x = torch.linspace(-12, 12, 20_001)
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x), rtol=1e-6, atol=1e-7)
    assert (quick_gelu(x) - F.gelu(x)).abs().max().item() == pytest.approx(0.0203, abs=1e-4)


def test_quick_gelu_has_the_gradient_that_autograd_finds_for_its_formula():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 2, 101, dtype=torch.float64)
    (ours,) = torch.autograd.grad(quick_gelu(x), x, weights)
    (wanted,) = torch.autograd.grad(x * torch.sigmoid(1.702 * x), x, weights)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_of_quick_gelu_is_refused_rather_than_wrong():
    x = torch.linspace(-1, 1, 5, requires_grad=True)
    (first,) = torch.autograd.grad(quick_gelu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        (first.sum() + x.sum()).backward()


def test_sinusoidal_positions_turn_a_shift_into_a_rotation():
    positions = sinusoidal_positions(50, 8)
    assert positions.shape == (50, 8)
    torch.testing.assert_close(positions[0], torch.tensor([0.0, 1.0] * 4))
    # the product of two positions depends on their distance alone
    products = positions @ positions.T
    torch.testing.assert_close(products[3, 10], products[23, 30], **CLOSE)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Attention(12, 5), "d_model=12 does not divide into num_heads=5"),
        (lambda: MLP(4, 8, "swish"), "activation='swish' is not known"),
        (lambda: Block(12, 3, 8, norm="middle"), "norm='middle' is not known"),
        (lambda: sinusoidal_positions(4, 5), "d_model=5 is odd"),
    ],
)
def test_a_wrong_size_or_name_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
