"""BigGAN-deep and what lies between its classes.

(header with measured figures comes last)
"""
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


# ---- the generator, BigGAN-deep (Brock 2019, appendix B, figure 16) ----------------------------------------------
BLOCKS = {  # picture size -> (upsample?, channels in, channels out), in multiples of the channel width
    32: [(1, 8, 8), (1, 8, 4), (0, 4, 4), (1, 4, 2)],  # ours, for a CPU
    128: [(0, 16, 16), (1, 16, 16), (0, 16, 16), (1, 16, 8), (0, 8, 8), (1, 8, 4), (0, 4, 4), (1, 4, 2), (0, 2, 2),
          (1, 2, 1)],
    256: [(0, 16, 16), (1, 16, 16), (0, 16, 16), (1, 16, 8), (0, 8, 8), (1, 8, 8), (0, 8, 8), (1, 8, 4), (0, 4, 4),
          (1, 4, 2), (0, 2, 2), (1, 2, 1)]}
BLOCKS[512] = BLOCKS[256] + [(0, 1, 1), (1, 1, 1)]


@dataclass
class Config:
    """Sizes of the generator; the defaults are the published 128 x 128 model, size=256 and 512 the other two."""
    size: int = 128
    z_dim: int = 128
    class_embed_dim: int = 128
    channel_width: int = 128
    num_classes: int = 1000
    attention_layer_position: int = 8  # self-attention stands before this block
    n_stats: int = 51                  # rows of the batch-norm tables: one every 1 / (n_stats - 1) of truncation
    eps: float = 1e-4


class Spectral(nn.Module):
    """A linear layer (shape (out, in)) or a convolution ((out, in, k, k)) with weight W / sigma(W), W as a matrix of
    `out` rows (Miyato 2018, section 2.1). sigma is estimated as u^T W v; while training, one power iteration a call
    turns u, v towards the top singular pair. In eval mode the stored u and v are used as they are: the published
    pictures need exactly that."""
    def __init__(self, *shape, bias=True, stride=1, padding=None):
        super().__init__()
        self.weight_orig = nn.Parameter(torch.randn(shape) * 0.02)
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.register_buffer("weight_u", F.normalize(torch.randn(shape[0]), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(math.prod(shape[1:])), dim=0))
        self.stride, self.padding, self.folded = stride, shape[-1] // 2 if padding is None else padding, False
        self.power_iteration(5)

    @torch.no_grad()
    def power_iteration(self, n=1, eps=1e-4):
        W = self.weight_orig.flatten(1)
        for _ in range(n):  # new tensors, not in place: an earlier forward pass may still need the old ones
            self.weight_v = F.normalize(W.T @ self.weight_u, dim=0, eps=eps)
            self.weight_u = F.normalize(W @ self.weight_v, dim=0, eps=eps)

    def weight(self):
        if self.folded:
            return self.weight_orig
        if self.training:
            self.power_iteration()
        return self.weight_orig / (self.weight_u @ (self.weight_orig.flatten(1) @ self.weight_v))

    def forward(self, x, out=None):
        """out: only so many of the first outputs (sigma is still that of the whole W)."""
        W, b = self.weight()[:out], None if self.bias is None else self.bias[:out]
        return F.linear(x, W, b) if W.dim() == 2 else F.conv2d(x, W, b, self.stride, self.padding)


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * (1 + scale(cond)) + offset(cond); without cond_dim a plain weight and bias.
    While training the statistics are the batch's; else they are looked up in a table, one row a truncation, because
    a generator fed with shortened z has other statistics in every layer (Brock 2019, appendix B)."""
    def __init__(self, channels, cond_dim, config):
        super().__init__()
        self.eps = config.eps
        self.register_buffer("running_means", torch.zeros(config.n_stats, channels))
        self.register_buffer("running_vars", torch.ones(config.n_stats, channels))
        if cond_dim:
            self.scale = Spectral(channels, cond_dim, bias=False)
            self.offset = Spectral(channels, cond_dim, bias=False)
        else:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))

    def statistics(self, truncation):
        """mean (C,), var (C,) for 0 < truncation <= 1."""
        coef, i = math.modf(truncation / (1 / (len(self.running_means) - 1)))
        i = int(i)
        if coef == 0:
            return self.running_means[i], self.running_vars[i]
        # A quirk of the published code, kept because its pictures depend on it: linear interpolation would weigh the
        # lower row with 1 - coef, it weighs it with coef.
        return (self.running_means[i] * coef + self.running_means[i + 1] * (1 - coef),
                self.running_vars[i] * coef + self.running_vars[i + 1] * (1 - coef))

    def forward(self, x, truncation, cond=None):
        gain, offset = (self.weight, self.bias) if cond is None else (1 + self.scale(cond), self.offset(cond))
        gain, offset = gain.view(-1, x.shape[1], 1, 1), offset.view(-1, x.shape[1], 1, 1)  # (N or 1, C, 1, 1)
        if self.training:
            return F.batch_norm(x, None, None, training=True, eps=self.eps) * gain + offset
        mean, var = (s.view(1, -1, 1, 1) for s in self.statistics(truncation))
        gain = gain * (var + self.eps).rsqrt()
        return x * gain + (offset - mean * gain)


class Block(nn.Module):
    """1x1 down to a quarter of the channels, two 3x3, 1x1 up again; the skip drops channels instead of convolving."""
    def __init__(self, up, n_in, n_out, cond_dim, config):
        super().__init__()
        self.up, self.n_out, mid = up, n_out, n_in // 4
        self.bn_0, self.conv_0 = BatchNorm(n_in, cond_dim, config), Spectral(mid, n_in, 1, 1)
        self.bn_1, self.conv_1 = BatchNorm(mid, cond_dim, config), Spectral(mid, mid, 3, 3)
        self.bn_2, self.conv_2 = BatchNorm(mid, cond_dim, config), Spectral(mid, mid, 3, 3)
        self.bn_3, self.conv_3 = BatchNorm(mid, cond_dim, config), Spectral(n_out, mid, 1, 1)

    def forward(self, x, truncation, cond):
        h = self.conv_0(F.relu(self.bn_0(x, truncation, cond)))
        h = F.relu(self.bn_1(h, truncation, cond))
        if self.up:
            h = F.interpolate(h, scale_factor=2)  # nearest
        h = self.conv_1(h)
        h = self.conv_2(F.relu(self.bn_2(h, truncation, cond)))
        h = self.conv_3(F.relu(self.bn_3(h, truncation, cond)))
        x = x[:, :self.n_out]  # the first channels; all of them where n_in == n_out
        if self.up:
            x = F.interpolate(x, scale_factor=2)
        return x + h


class Attention(nn.Module):
    """Self-attention (Zhang 2019, section 3) at the resolution of x, keys and values pooled by 2."""
    def __init__(self, channels):
        super().__init__()
        self.snconv1x1_theta = Spectral(channels // 8, channels, 1, 1, bias=False)
        self.snconv1x1_phi = Spectral(channels // 8, channels, 1, 1, bias=False)
        self.snconv1x1_g = Spectral(channels // 2, channels, 1, 1, bias=False)
        self.snconv1x1_o_conv = Spectral(channels, channels // 2, 1, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x, truncation=None, cond=None):
        theta = self.snconv1x1_theta(x).flatten(2)                     # (N, C/8, HW)
        phi = F.max_pool2d(self.snconv1x1_phi(x), 2).flatten(2)        # (N, C/8, HW/4)
        g = F.max_pool2d(self.snconv1x1_g(x), 2).flatten(2)            # (N, C/2, HW/4)
        attention = (theta.transpose(1, 2) @ phi).softmax(2)           # (N, HW, HW/4); no 1/sqrt(d) here: a quirk
        o = (g @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])  # (N, C/2, H, W)
        return x + self.gamma * self.snconv1x1_o_conv(o)


class Generator(nn.Module):
    """G(z, classes or embeddings, truncation) -> (N, 3, size, size) in [-1, 1].

    z (N, z_dim) is already truncated (see truncated_noise); classes (N,) int64 or their embeddings (N,
    class_embed_dim); 0 < truncation <= 1 chooses the batch-norm statistics only. Names of the parameters are those
    of the published files (pytorch-pretrained-BigGAN)."""
    def __init__(self, config=Config()):
        super().__init__()
        ch, cond_dim = config.channel_width, config.z_dim + config.class_embed_dim
        blocks = BLOCKS[config.size]
        layers = [Block(up, n_in * ch, n_out * ch, cond_dim, config) for up, n_in, n_out in blocks]
        at = config.attention_layer_position
        layers.insert(at, Attention(blocks[at][1] * ch))
        self.config = config
        self.embeddings = nn.Linear(config.num_classes, config.class_embed_dim, bias=False)  # W: (embed, classes)
        self.generator = nn.ModuleDict({
            "gen_z": Spectral(4 * 4 * blocks[0][1] * ch, cond_dim),
            "layers": nn.ModuleList(layers),
            "bn": BatchNorm(blocks[-1][2] * ch, None, config),
            "conv_to_rgb": Spectral(blocks[-1][2] * ch, blocks[-1][2] * ch, 3, 3)})

    def embed(self, classes):
        return self.embeddings.weight.T[classes]  # (N,) -> (N, class_embed_dim)

    def forward(self, z, classes, truncation=1.0):
        if not 0 < truncation <= 1:
            raise ValueError(f"truncation {truncation} is not in (0, 1]")
        cond = torch.cat([z, classes if classes.is_floating_point() else self.embed(classes)], 1)  # (N, z + embed)
        net = self.generator
        # A quirk: the vector is read with its channels last (a TensorFlow heritage), hence the permute.
        h = net["gen_z"](cond).view(len(z), 4, 4, -1).permute(0, 3, 1, 2)  # (N, 4 * 4 * C) -> (N, C, 4, 4)
        for layer in net["layers"]:
            h = layer(h, truncation, cond)
        # Another one: the last layer has as many outputs as inputs, and the first three are the picture.
        return torch.tanh(net["conv_to_rgb"](F.relu(net["bn"](h, truncation)), out=3))  # (N, 3, size, size)


@torch.no_grad()
def fold(net):
    """Divide every spectrally normalised weight by its sigma, once and for all; same output, no division a call."""
    net.eval()
    for layer in net.modules():
        if isinstance(layer, Spectral):
            layer.weight_orig.copy_(layer.weight())
            layer.folded = True
    return net


def truncated_noise(n, z_dim, truncation=1.0, seed=0):
    """truncation * N(0, 1) conditioned on [-2, 2], (n, z_dim) float32, by the inverse of the cumulative distribution:
    u ~ U(0, 1), Phi(z) = Phi(-2) + u (Phi(2) - Phi(-2)). Exact, and the same on every device."""
    u = torch.rand(n, z_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = torch.special.ndtr(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    return truncation * torch.special.ndtri(low + u * (high - low)).float()
