"""CycleGAN and UNIT: translate pictures between two styles without a single pair to learn from.

    python cyclegan.py                          CycleGAN, Apple <-> Windows emojis (faces without a network)
    python cyclegan.py --model unit             UNIT on the same data
    python cyclegan.py --data faces             cartoon faces in two styles: the true translations are known, so it is scored
    python cyclegan.py --a photos/ --b paintings/ --size 128
    python cyclegan.py --translate me.jpg --direction ab --out out/cyclegan
    python cyclegan.py --sweep 0,0.005,0.01,0.015,0.025,0.05,0.1,0.5,1 --steps 700

G_ab: A -> B and G_ba: B -> A; D_a and D_b tell real from translated pictures of their style. Zhu 2017 (CycleGAN), eq. 3:
    L = L_GAN(G_ab, D_b) + L_GAN(G_ba, D_a) + lambda (E |G_ba(G_ab(a)) - a|_1 + E |G_ab(G_ba(b)) - b|_1)
The GAN terms are least squares. The GAN alone would let G_ab draw any picture of style B; the way back must still find a,
so what the picture shows has to survive. Too small a lambda: the input is ignored; too large: it is copied.
UNIT (Liu 2017) asks for more: both styles are encoded into one latent space, z = E_a(a) ~ z = E_b(b), with the last
layers of the encoders and the first of the decoders shared; a translation is D_b(E_a(a)).
"""
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import data
import fid


@dataclass
class Config:
    model: str = "cyclegan"           # cyclegan or unit
    data: str = "emojis,faces"        # emojis, faces, or several: the first that can be had
    a: str = ""                       # style A: a folder of pictures or a data set's name, instead of --data
    b: str = ""                       # style B, likewise
    size: int = 32                    # pixels a side: 32 (the course's networks), 64, 128 or 256 (the paper's)
    width: int = 64                   # channels of the first layer of the networks for size > 32; 32 is 4 times as fast
    steps: int = 5000                 # steps of D and G
    batch: int = 32                   # pictures of each style a step
    lr: float = 3e-4                  # Adam's learning rate
    beta1: float = 0.5                # Adam's first beta (an older copy of the course: 0.3); the second is 0.999
    weight_decay: float = 0.0         # Adam's weight decay
    decay: int = 0                    # 1: the learning rate falls linearly to 0 in the second half
    lambda_cycle: float = 0.015       # weight of the cycle loss (cyclegan), which is summed over the pixels
    identity: float = 0.0             # weight of |G_ab(b) - b| in units of lambda_cycle; the paper's option: 0.5
    pool: int = 0                     # D sees a mix of new and old translations: size of the history (the paper: 50)
    seed: int = 11                    # random seed; the course compares 11 and 1234
    out: str = "out/cyclegan"         # folder of the run
    sample_every: int = 200           # steps between sheets of samples
    log_every: int = 50               # steps between log lines
    device: str = "auto"              # auto, cuda, mps or cpu
    amp: int = 1                      # bfloat16 convolutions where the hardware has them; 0: never
    resume: int = 0                   # 1: go on from the last checkpoint of --out
    overwrite: int = 0                # 1: replace the run that --out holds
    translate: str = ""               # a picture or a folder to translate with the checkpoint in --out; trains nothing
    direction: str = "ab"             # of --translate: ab or ba
    sweep: str = ""                   # several lambda_cycle, one run each and one sheet: 0,0.015,1


# what differs from the defaults above: K, UNIT 0.2; the CycleGAN paper, section 4 and appendix, for size > 32
RECIPES = {"unit": dict(lr=1e-4, weight_decay=1e-4, out="out/unit"),
           "large": dict(lr=2e-4, batch=1, decay=1, identity=0.5, pool=50)}
PARTNER = {"emoji-apple": "emoji-windows", "faces-a": "faces-b"}


# ---- networks: 32 x 32 ---------------------------------------------------------------------------------------------

def conv(i, o, k, stride, padding, norm=nn.BatchNorm2d, act=nn.ReLU):
    """Convolution without bias, norm, activation as a list of layers; None leaves a part out."""
    return [nn.Conv2d(i, o, k, stride, padding, bias=False)] + [f(o) for f in (norm,) if f] + [f() for f in (act,) if f]


def upconv(i, o, norm=nn.BatchNorm2d, act=nn.ReLU):
    """Nearest upsampling x2 and a 5x5 convolution: no checkerboard as from a transposed one."""
    return [nn.Upsample(scale_factor=2)] + conv(i, o, 5, 1, 2, norm, act)


class Residual(nn.Module):
    """relu(x + norm(conv3x3(x))): begins as nearly the identity, which suits a translation."""

    def __init__(self, c, norm=nn.BatchNorm2d):
        super().__init__()
        self.body = nn.Sequential(*conv(c, c, 3, 1, 1, norm, None))

    def forward(self, x):
        return F.relu(x + self.body(x))


class CycleGenerator(nn.Sequential):
    """The course's translator, (N, 3, S, S) -> (N, 3, S, S), both in [-1, 1]. 144,448 parameters."""

    def __init__(self):
        super().__init__(*conv(3, 32, 5, 2, 2),                      # (N, 32, 16, 16)
                         *conv(32, 64, 5, 2, 2),                     # (N, 64, 8, 8)
                         Residual(64),
                         *upconv(64, 32),                            # (N, 32, 16, 16)
                         *upconv(32, 3, None, nn.Tanh))              # (N, 3, 32, 32)


class Discriminator(nn.Sequential):
    """The course's D: (N, 3, 32, 32) in [-1, 1] -> logits (N,). 262,048 parameters."""

    def __init__(self, c=32):
        super().__init__(*conv(3, c, 5, 2, 2),                       # (N, c, 16, 16)
                         *conv(c, 2 * c, 5, 2, 2),                   # (N, 2c, 8, 8)
                         *conv(2 * c, 4 * c, 5, 2, 2),               # (N, 4c, 4, 4)
                         *conv(4 * c, 1, 5, 2, 1, None, None),       # (N, 1, 1, 1)
                         nn.Flatten(0))


# ---- networks: larger pictures (Zhu 2017, section 7.2 of the appendix) ---------------------------------------------

def conv_in(i, o, k, stride=1, act=nn.ReLU, up=False):
    """Convolution with bias, instance norm, activation; stride 1 reflects at the border, `up` is transposed and doubles."""
    layer = nn.ConvTranspose2d(i, o, k, stride, k // 2, output_padding=1) if up else \
        nn.Conv2d(i, o, k, stride, k // 2, padding_mode="reflect" if stride == 1 else "zeros")
    return [layer, nn.InstanceNorm2d(o)] + [f() for f in (act,) if f]


class ResBlock(nn.Module):
    """x + IN(conv(relu(IN(conv(x)))))."""

    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(*conv_in(c, c, 3), *conv_in(c, c, 3, act=None))

    def forward(self, x):
        return x + self.body(x)


class ResNetGenerator(nn.Sequential):
    """The paper's translator: c7s1-w, d2w, d4w, blocks x R4w, u2w, uw, c7s1-3. (64, 9): 11,378,179 parameters."""

    def __init__(self, width=64, blocks=9):
        w = width
        super().__init__(*conv_in(3, w, 7), *conv_in(w, 2 * w, 3, 2), *conv_in(2 * w, 4 * w, 3, 2),
                         *[ResBlock(4 * w) for _ in range(blocks)],
                         *conv_in(4 * w, 2 * w, 3, 2, up=True), *conv_in(2 * w, w, 3, 2, up=True),
                         nn.Conv2d(w, 3, 7, 1, 3, padding_mode="reflect"), nn.Tanh())
        self.apply(init_normal)


class PatchGAN(nn.Sequential):
    """C64-C128-C256-C512: logits (N, 1, S/8 - 2, S/8 - 2), one for each 70 x 70 patch. 2,764,737 parameters."""

    def __init__(self, width=64):
        w, leaky = width, lambda: nn.LeakyReLU(0.2)
        layers = [nn.Conv2d(3, w, 4, 2, 1), leaky()]
        for i, o, stride in ((w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 1)):
            layers += [nn.Conv2d(i, o, 4, stride, 1), nn.InstanceNorm2d(o), leaky()]
        super().__init__(*layers, nn.Conv2d(8 * w, 1, 4, 1, 1))
        self.apply(init_normal)


def init_normal(m):
    """The paper's start: convolution weights N(0, 0.02), biases 0."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0, 0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


class CycleGAN(nn.Module):
    """Both translators. forward(x, "ab") is G_ab(x)."""

    def __init__(self, size=32, width=64):
        super().__init__()
        make = CycleGenerator if size <= 32 else lambda: ResNetGenerator(width, 6 if size <= 128 else 9)
        self.ab, self.ba = make(), make()

    def forward(self, x, direction):
        return (self.ab if direction == "ab" else self.ba)(x)


# ---- UNIT: two encoders, two decoders, one latent space -------------------------------------------------------------

class Encoder(nn.Sequential):
    """(N, 3, S, S) -> (N, 64, S/4, S/4), before the shared block."""

    def __init__(self):
        norm = nn.InstanceNorm2d
        super().__init__(*conv(3, 32, 5, 2, 2, norm), *conv(32, 64, 5, 2, 2, norm), Residual(64, norm))


class Decoder(nn.Sequential):
    """(N, 64, S/4, S/4), after the shared block -> (N, 3, S, S) in [-1, 1]."""

    def __init__(self):
        norm = nn.InstanceNorm2d
        super().__init__(Residual(64, norm), *upconv(64, 32, norm), *upconv(32, 3, None, nn.Tanh))


class UNIT(nn.Module):
    """Liu 2017: two VAEs whose encoders end and whose decoders begin in the same residual block.

    forward(x, "ab") is the translation of the latent mean; encode and decode are what training uses."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict(dict(a=Encoder(), b=Encoder()))
        self.decoder = nn.ModuleDict(dict(a=Decoder(), b=Decoder()))
        self.into, self.outof = Residual(64, nn.InstanceNorm2d), Residual(64, nn.InstanceNorm2d)   # shared

    def encode(self, x, style):
        """Latent mean (N, 64, S/4, S/4) of x (N, 3, S, S) in [-1, 1]."""
        return self.into(self.encoder[style](x))

    def decode(self, z, style):
        """Picture (N, 3, S, S) in [-1, 1]."""
        return self.decoder[style](self.outof(z))

    def forward(self, x, direction):
        return self.decode(self.encode(x, direction[0]), direction[1])
