"""The softmax, sigmoid and tiled contrastive losses."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmlearn.contrastive import contrastive_loss, sigmoid_loss, tiled_contrastive_loss


def random_pairs(N=7, E=5, seed=0, dtype=torch.float32, unit=True):
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.randn(N, E, generator=generator, dtype=dtype) for _ in range(2)]
    return [F.normalize(p, dim=-1) if unit else p for p in pairs]


def with_gradients(loss_fn, images, texts, *scalars):
    inputs = [x.clone().requires_grad_() for x in (images, texts, *scalars)]
    loss = loss_fn(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def test_contrastive_loss_gives_the_numbers_that_torchmultimodal_publishes():
    torch.manual_seed(1234)
    images, texts = torch.randn(3, 5), torch.randn(3, 5)
    scale = torch.tensor(math.log(1 / 0.07)).exp()
    assert contrastive_loss(images, texts, scale).item() == pytest.approx(9.8753, abs=1e-4)
    smoothed = contrastive_loss(images, texts, scale, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(10.2524, abs=1e-4)


def test_contrastive_loss_by_hand():
    # Two perfect, orthogonal pairs at scale ln 3: each row is (ln 3, 0), so p = 3/4 both ways.
    eye = torch.eye(2)
    assert contrastive_loss(eye, eye, math.log(3)).item() == pytest.approx(math.log(4 / 3))


def test_a_model_that_knows_nothing_scores_ln_n():
    same = torch.ones(9, 4)
    assert contrastive_loss(same, same, 10.0).item() == pytest.approx(math.log(9), rel=1e-6)


def test_contrastive_loss_equals_transformers():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts = random_pairs()
    theirs = image_text_contrastive_loss(13.0 * texts @ images.T)
    torch.testing.assert_close(contrastive_loss(images, texts, 13.0), theirs)


def test_swapping_images_and_texts_changes_nothing():
    images, texts = random_pairs()
    torch.testing.assert_close(
        contrastive_loss(images, texts, 9.0), contrastive_loss(texts, images, 9.0)
    )


def test_contrastive_loss_survives_a_huge_scale():
    images, texts = random_pairs()
    loss, gradients = with_gradients(
        contrastive_loss, images, texts, torch.tensor(1e4, dtype=torch.float32)
    )
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_sigmoid_loss_by_hand():
    # scale 0 leaves the bias alone: N positives of log σ(b), N(N−1) negatives of log σ(−b).
    images, texts = random_pairs(N=3)
    expected = -(F.logsigmoid(torch.tensor(-10.0)) + 2 * F.logsigmoid(torch.tensor(10.0)))
    torch.testing.assert_close(sigmoid_loss(images, texts, 0.0, -10.0), expected)


def test_sigmoid_loss_equals_open_clip_in_value_and_gradients():
    from open_clip.loss import SigLipLoss

    images, texts = random_pairs()
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    ours = with_gradients(sigmoid_loss, images, texts, scale, bias)
    theirs = with_gradients(SigLipLoss(), images, texts, scale, bias)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_tiled_loss_equals_the_full_loss_in_value_and_gradients(tile, scale):
    images, texts = random_pairs(dtype=torch.float64)
    scale = torch.tensor(scale, dtype=torch.float64)
    full = with_gradients(contrastive_loss, images, texts, scale)
    tiled = with_gradients(
        lambda i, t, s: tiled_contrastive_loss(i, t, s, tile), images, texts, scale
    )
    torch.testing.assert_close(tiled, full, rtol=1e-10, atol=1e-12)


def test_tiled_gradients_pass_gradcheck_also_where_the_loss_is_scaled():
    images, texts = random_pairs(N=4, E=3, dtype=torch.float64, unit=False)
    scale = torch.tensor(2.0, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (images, texts, scale)]
    assert torch.autograd.gradcheck(lambda i, t, s: 3 * tiled_contrastive_loss(i, t, s, 3), inputs)


def test_tiled_loss_in_float32_stays_within_1e_6_of_the_full_gradients():
    images, texts = random_pairs(N=300, E=32)
    scale = torch.tensor(14.3)
    _, full = with_gradients(contrastive_loss, images, texts, scale)
    _, tiled = with_gradients(
        lambda i, t, s: tiled_contrastive_loss(i, t, s, 64), images, texts, scale
    )
    assert max((a - b).abs().max().item() for a, b in zip(full[:2], tiled[:2])) < 1e-6


def test_tiled_loss_never_holds_more_than_a_tile(monkeypatch):
    # Count the largest tensor that autograd keeps and that a matrix product makes.
    largest = 0
    true_matmul = torch.Tensor.__matmul__

    def watch(a, b):
        nonlocal largest
        out = true_matmul(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watch)
    images, texts = (x.requires_grad_() for x in random_pairs(N=64, E=4))
    tiled_contrastive_loss(images, texts, 10.0, tile=8).backward()
    assert largest == 8 * 8


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("loss_fn", [contrastive_loss, tiled_contrastive_loss])
def test_pairs_of_unequal_or_no_length_are_refused(loss_fn):
    with pytest.raises(ValueError, match=r"image_embeds \(2, 3\) and text_embeds \(4, 3\)"):
        loss_fn(torch.zeros(2, 3), torch.zeros(4, 3), 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        loss_fn(torch.zeros(0, 3), torch.zeros(0, 3), 1.0)


def test_a_tile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="tile=0"):
        tiled_contrastive_loss(*random_pairs(), 1.0, tile=0)
