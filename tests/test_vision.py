"""Patches, the convolutional stem and the Vision Transformer."""

import pytest
import torch
from torch.nn import functional as F

from mmlearn.vision import ConvStem, PatchEmbedding, ViT
from mmlearn.weights import copy_weights, rename


def test_patch_embedding_is_a_convolution_whose_stride_is_its_kernel():
    patches = PatchEmbedding(12, 4, 10, num_channels=3)
    images = torch.randn(2, 3, 12, 12)
    kernel = patches.projection.weight.unflatten(1, (3, 4, 4))
    convolved = F.conv2d(images, kernel, patches.projection.bias, stride=4)
    torch.testing.assert_close(
        patches(images), convolved.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5
    )


def test_patches_come_row_by_row():
    patches = PatchEmbedding(4, 2, 1, num_channels=1, bias=False)
    torch.nn.init.ones_(patches.projection.weight)
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert patches(image).flatten().tolist() == [10, 18, 42, 50]


def test_images_of_another_size_or_none_are_refused_by_name():
    patches = PatchEmbedding(12, 4, 10)
    with pytest.raises(ValueError, match=r"images have shape \(2, 1, 12, 12\)"):
        patches(torch.zeros(2, 1, 12, 12))
    with pytest.raises(ValueError, match="empty batch"):
        patches(torch.zeros(0, 3, 12, 12))
    with pytest.raises(ValueError, match="image_size=13 is not a multiple of patch_size=4"):
        PatchEmbedding(13, 4, 10)


def test_the_stem_makes_as_many_tokens_as_the_patches_do():
    images = torch.randn(2, 3, 16, 16)
    assert ConvStem(4, 12)(images).shape == PatchEmbedding(16, 4, 12)(images).shape == (2, 16, 12)
    with pytest.raises(ValueError, match="patch_size=6 is not a power of two"):
        ConvStem(6, 12)


def test_the_stem_sees_across_patch_borders_and_the_patches_do_not():
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    for embed, sees_neighbour in (
        (PatchEmbedding(16, 4, 12), False),
        (ConvStem(4, 12).eval(), True),
    ):
        (gradient,) = torch.autograd.grad(embed(images)[0, 5].sum(), images)
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[4:8, 4:8] = True  # token 5 is row 1, column 1 of the 4 × 4 grid
        assert (gradient[0, :, ~inside].abs().sum() > 0) == sees_neighbour


@pytest.mark.parametrize("pre_norm_tokens", [False, True])
def test_the_class_token_is_the_first_row_of_all_tokens(pre_norm_tokens):
    vit = ViT(8, 4, 12, 2, 3, 20, pre_norm_tokens=pre_norm_tokens)
    images = torch.randn(2, 3, 8, 8)
    expected = vit.output_norm(vit.tokens(images)[:, 0])
    torch.testing.assert_close(vit(images), expected, rtol=1e-5, atol=1e-5)


def test_vit_equals_transformers_with_its_weights():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        layer_norm_eps=1e-6,
    )
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    ours = ViT(8, 4, 12, 2, 3, 20, norm_eps=1e-6)
    names = rename(
        ours.state_dict(),
        (
            ("class_token", "embeddings.cls_token"),
            ("patches.", "embeddings.patch_embeddings."),
            ("output_norm.", "layernorm."),
            ("encoder.blocks.", "layers."),
            (".attention_norm.", ".layernorm_before."),
            (".mlp_norm.", ".layernorm_after."),
            ("out_proj", "o_proj"),
        ),
    )
    names["positions"] = "embeddings.position_embeddings"
    reshaped = ["class_token", "positions", "patches.projection.weight"]
    copy_weights(ours, theirs.state_dict(), names, reshaped=reshaped)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(
        ours(images), theirs(images).last_hidden_state[:, 0], rtol=1e-5, atol=1e-5
    )
