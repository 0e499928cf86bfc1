"""Codebooks: equal to transformers, draws as often as they should, entries counted."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmlearn.quantization import GumbelQuantizer, gumbel_temperature, perplexity


def test_perplexity_has_the_values_of_transformers_own_tests():
    probs = torch.arange(100).reshape(2, 5, 10) / 100
    assert perplexity(probs).item() == pytest.approx(141.4291, abs=1e-3)
    assert perplexity(probs[1:]).item() == pytest.approx(58.6757, abs=1e-3)


def test_perplexity_counts_the_entries_in_use():
    collapsed = F.one_hot(torch.zeros(8, 2, dtype=torch.long), 4).float()
    assert perplexity(collapsed).item() == pytest.approx(2.0)
    even = F.one_hot(torch.arange(8)[:, None].expand(-1, 2) % 4, 4).float()
    assert perplexity(even).item() == pytest.approx(8.0)


@pytest.mark.parametrize("training", [False, True])
def test_the_quantizer_equals_transformers_under_the_same_noise(training):
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

    sizes = {"num_codevector_groups": 3, "num_codevectors_per_group": 7, "codevector_dim": 9}
    config = Wav2Vec2Config(conv_dim=(10,), conv_kernel=(3,), conv_stride=(2,), **sizes)
    theirs = Wav2Vec2GumbelVectorQuantizer(config).train(training)
    ours = GumbelQuantizer(10, 3, 7, 9).train(training)
    with torch.no_grad():
        theirs.codevectors.copy_(ours.codevectors.reshape(1, 21, 3))
    theirs.weight_proj.load_state_dict(ours.weight_proj.state_dict())
    ours.temperature = theirs.temperature = 0.7
    features = torch.randn(11, 10, requires_grad=True)
    torch.manual_seed(4)
    out = ours(features)
    torch.manual_seed(4)
    vectors, their_perplexity = theirs(features[None])
    torch.testing.assert_close(out.codevectors, vectors[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(out.perplexity, their_perplexity, rtol=1e-6, atol=0)
    if training:
        towards = torch.randn(vectors[0].shape)
        (grad,) = torch.autograd.grad((out.codevectors * towards).sum(), features)
        (expected,) = torch.autograd.grad((vectors[0] * towards).sum(), features)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5)


def test_the_quantizer_joins_one_whole_entry_of_each_codebook():
    quantizer = GumbelQuantizer(5, 2, 4, 6)
    out = quantizer(torch.randn(9, 5))
    for row, codes in zip(out.codevectors, out.codes, strict=True):
        entries = [quantizer.codevectors[g, code] for g, code in enumerate(codes.tolist())]
        torch.testing.assert_close(row, torch.cat(entries), rtol=0, atol=1e-6)


def test_gumbel_draws_each_entry_as_often_as_softmax_says_and_evaluation_takes_the_likeliest():
    quantizer = GumbelQuantizer(1, 1, 3, 2)
    with torch.no_grad():
        quantizer.weight_proj.weight.copy_(torch.tensor([[0.1], [0.6], [0.3]]).log())
    features = torch.ones(20_000, 1)
    shares = quantizer(features).codes.flatten().bincount(minlength=3) / 20_000
    # the standard deviation of a share is at most 0.0035
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=0.015)
    assert (quantizer.eval()(features).codes == 1).all()


def test_the_temperature_falls_from_2_to_its_end():
    assert gumbel_temperature(0) == 2.0
    assert gumbel_temperature(100_000) == pytest.approx(2 * math.exp(-0.5), rel=1e-5)
    assert gumbel_temperature(10**7) == 0.5
    assert gumbel_temperature(10**7, end=0.1) == 0.1


def test_a_share_of_exactly_zero_leaves_the_gradient_of_perplexity_finite():
    logits = torch.tensor([[[300.0, 0.0, -300.0]]], requires_grad=True)
    shares = logits.softmax(dim=-1)
    assert (shares == 0).any()
    perplexity(shares).backward()
    assert logits.grad.isfinite().all()
