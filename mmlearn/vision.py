"""From pixels to tokens: patches, the Vision Transformer, and a small convolutional stem."""

from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmlearn.transformer import Encoder


class PatchEmbedding(nn.Module):
    r"""Cut an image into squares and map each, flattened, to a token.

    $$ x_l = W\,\mathrm{flatten}(\mathrm{patch}_l), \qquad
       L = (\text{image size} / \text{patch size})^2 $$

    Libraries write this as a convolution whose stride equals its kernel. It is the same product:
    the weight here is theirs, flattened.

    Raises: ValueError when the image size is not a multiple of the patch size, or when the images
    given have another size or number of channels.
    Source: Dosovitskiy et al. 2021, equation 1.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        d_model: int,
        num_channels: int = 3,
        bias: bool = True,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} is not a multiple of patch_size={patch_size}; "
                "patches must cover the image exactly"
            )
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.num_patches = (image_size // patch_size) ** 2
        self.projection = nn.Linear(num_channels * patch_size**2, d_model, bias=bias)

    def forward(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B L D"]:
        wanted = (self.num_channels, self.image_size, self.image_size)
        if images.shape[1:] != wanted:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but this model reads (batch, "
                f"{', '.join(map(str, wanted))}); resize or convert them first"
            )
        if len(images) == 0:
            raise ValueError("images is an empty batch; give at least one image")
        p = self.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return self.projection(patches)


class ConvStem(nn.Module):
    """Make the same tokens with a few small convolutions that overlap, as a CNN would begin.

    Each layer halves the image. The stem sees edges before the first attention does; a patch
    projection must learn them. patch_size is the total stride, a power of two.

    Raises: ValueError when patch_size is not a power of two of at least 2.
    Source: Xiao et al. 2021, "Early Convolutions Help Transformers See Better", section 4.
    """

    def __init__(self, patch_size: int, d_model: int, num_channels: int = 3):
        super().__init__()
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(f"patch_size={patch_size} is not a power of two of at least 2")
        num_layers = patch_size.bit_length() - 1
        # widths double as resolution halves, and end at d_model
        widths = [num_channels] + [max(8, d_model >> i) for i in range(num_layers - 1, -1, -1)]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [
                nn.Conv2d(width_in, width_out, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(d_model, d_model, kernel_size=1))

    def forward(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B L D"]:
        return rearrange(self.layers(images), "b d h w -> b (h w) d")


class ViT(nn.Module):
    r"""Encode an image as patches plus a class token, and read the class token out.

    $$ z_0 = [x_{\mathrm{class}}; x_1; \dots; x_L] + P, \qquad y = \mathrm{LN}(z_{\text{last},0}) $$

    CLIP adds a LayerNorm before the blocks (`pre_norm_tokens=True`).

    Source: Dosovitskiy et al. 2021, section 3.1; Radford et al. 2021, section 2.4.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        *,
        num_channels: int = 3,
        patch_bias: bool = True,
        pre_norm_tokens: bool = False,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.patches = PatchEmbedding(image_size, patch_size, d_model, num_channels, patch_bias)
        self.class_token = nn.Parameter(torch.randn(d_model) * d_model**-0.5)
        num_positions = self.patches.num_patches + 1
        self.positions = nn.Parameter(torch.randn(num_positions, d_model) * d_model**-0.5)
        self.input_norm = nn.LayerNorm(d_model, eps=norm_eps) if pre_norm_tokens else nn.Identity()
        self.encoder = Encoder(
            num_layers,
            d_model,
            num_heads,
            d_ff,
            activation=activation,
            norm_eps=norm_eps,
            dropout=dropout,
        )
        self.output_norm = nn.LayerNorm(d_model, eps=norm_eps)

    def embed(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B L D"]:
        """Return the tokens that enter the first block: class token first, then row by row."""
        patches_BLD = self.patches(images)
        class_B1D = self.class_token.expand(len(images), 1, -1)
        return self.input_norm(torch.cat([class_B1D, patches_BLD], dim=1) + self.positions)

    def tokens(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B L D"]:
        """Return every token after the last block, before the output norm."""
        return self.encoder(self.embed(images))

    def forward(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B D"]:
        """Return the class token, normalised. The last block computes that row alone."""
        tokens_BLD = self.embed(images)
        first_B = torch.zeros(len(images), dtype=torch.long, device=images.device)
        return self.output_norm(self.encoder.read(tokens_BLD, first_B))
