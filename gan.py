"""gan.py: generative adversarial networks in one file, in the order of a lecture.

    python gan.py dcgan                                      # digits from noise
    python gan.py anime --loss wgan-gp                       # another loss on the same networks
    python gan.py ring --loss r3gan                          # eight Gaussians, in 20 seconds
    python gan.py emoji --modern 1                           # trained as one would today
    python gan.py text2img --prompt "blue hair green eyes"   # once text2img has been trained
    torchrun --nproc-per-node 2 gan.py dcgan                 # two processes share each batch

Two networks play against each other (Goodfellow 2014, equation 1):

    min over G, max over D of   E[log D(x)] + E[log(1 - D(G(z)))]

D tries to tell real pictures x from fakes G(z). G tries to fool D. In this file D returns an
unbounded score. For the loss above this is a logit, and the D(x) of the equation is its sigmoid.
Pictures lie in [-1, 1]. Every loss is something to minimise, averaged over the batch; D's loss is
therefore the negative of what equation 1 maximises.

A condition c tells G what to draw, for example a digit as a one-hot vector. G gets it appended to
its noise. D either sees it as extra channels of the picture, or outputs a guess of c in addition to
its score for real or fake. If there is no condition, c has the shape (N, 0), where N is the number
of pictures in the batch.

A preset is a network, a data set and a loss, with settings from a course or a paper. --loss puts
another loss on the same networks: it names a training step (see LOSSES).

Results of seed 0 on MNIST and on Apple's emojis (an AMD EPYC, Zen 5, torch 2.13). The FID is a
distance between generated and real pictures, and lower is better. It uses features of fid.py's own
classifier, so it cannot be compared with the FIDs in papers. Real pictures have an FID of 0.055
(MNIST, 10,000 against 10,000 others) and 0.70 (emojis, one half against the other; fewer pictures
give a higher FID):

    python gan.py dcgan                                FID 1.06
    python gan.py dcgan --lr 2e-4 --decay 0 --ema 0    FID 4.63    the course's own settings
    python gan.py mlp                                  FID 15.0
    python gan.py speedrun                             FID 0.32    after 98 s on two threads
    python gan.py emoji --steps 20000                  FID 20.8    repeats a few pictures
    python gan.py emoji --steps 20000 --modern 1       FID 6.0
    python gan.py mnist28                              FID 13.8    never draws a 0
    python gan.py mnist28 --modern 1                   FID 1.14    all ten digits

With torchrun each process computes batch norm, penalties and augmentation on its own share of the
batch. A run without these three gives the same result as a run of one process.
"""
import copy
import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageDraw

import data
import fid
from data import EYES, FACES, HAIR, need, to_float, to_uint8


# ---- config --------------------------------------------------------------------------------------

Loss = Literal["gan", "saturating", "lsgan", "wgan", "wgan-gp", "acgan", "r3gan"]
Net = Literal["dcgan", "emoji", "anime", "mnist28", "mlp", "ring", "ring3"]
Optimiser = Literal["adam", "rmsprop", "sgd"]


@dataclass
class GANConfig:
    """All settings of a run. The preset is the first word of the command line. The other fields are
    flags, and the comment beside each is the flag's help text. Only channels and heads have no
    flag, because they follow from the data."""
    preset: str = "dcgan"           # a name in PRESETS
    modern: int = 0                 # 1: as one would do it today: the loss r3gan with its settings
    # ---- the run
    data: str = "mnist,digits"      # data sets in order of preference, or a folder of pictures
    steps: int = 5000               # how often G is updated; 0: only evaluate the checkpoint
    batch: int = 64                 # pictures in a batch, over all processes
    seed: int = 0                   # seed of the weights, the batches and the noise
    device: str = "auto"            # auto, cuda, mps or cpu
    amp: int = -1                   # bfloat16 arithmetic: 1 on, 0 off, -1 on if the hardware has it
    log_every: int = 50             # steps between two lines of the log
    sample_every: int = 500         # steps between two sample grids and checkpoints
    samples: int = 10000            # how many pictures are drawn to compute the metrics
    out: str = ""                   # folder of the run; default: out/<preset>-<what was changed>
    resume: int = 1                 # 1: continue the run in this folder; 0: delete it first
    dump: int = 0                   # also write this many to samples.npy (uint8, N H W C)
    draw: int = 0                   # only draw this many pictures, into drawn/, with a trained G
    prompt: str = ""                # only draw a row of faces, e.g. "blue hair green eyes"
    # ---- the networks
    net: Net = "dcgan"              # G and D, a name in NETS
    channels: int = 1               # channels of a picture
    heads: tuple = ()               # number of classes of each attribute; (12, 11): hair and eyes
    z: int = 16                     # length of the noise vector
    h: int = 16                     # width of the networks: layers have multiples of h channels
    d_h: int = 0                    # width of D; 0: the same as h
    noise: Literal["normal", "uniform", "uniform01"] = "normal"     # N(0, I), U(-1, 1) or U(0, 1)
    init: Literal["normal", "default"] = "normal"   # standard deviation 0.02, or torch's default
    act: Literal["", "relu", "leaky", "selu"] = ""  # replaces all ReLU and LeakyReLU
    bn: Literal["both", "G", "D", "none"] = "both"  # which networks keep their batch norm
    sn: Literal["none", "D", "both"] = "none"       # which networks get spectral norm
    raw: int = 0                    # 1: pixels in 0..255 and no tanh; combine it with --bn none
    cond: Literal["none", "planes", "ac"] = "none"  # planes: D sees c; ac: D predicts c
    # ---- the loss
    loss: Loss = "gan"              # which training step is used, see LOSSES
    d_steps: int = 1                # lsgan and wgans: updates of D for each update of G
    clip: float = 0.                # wgan: clip the weights of D to [-clip, clip] after each update
    gp: float = 0.                  # lsgan, wgan-gp: weight of the gradient penalty
    penalty: Literal["gp", "r1", "mean-norm"] = "gp"    # lsgan: which gradient penalty
    r1: float = 0.                  # gan, r3gan: weight (gamma) of the R1 penalty, on real pictures
    r2: float = 0.                  # gan, r3gan: weight (gamma) of the R2 penalty, on fakes
    penalty_every: int = 16         # R1 and R2 only in every n-th step, with n times the weight
    augment: int = -1               # DiffAugment: 1 on, 0 off, -1 on for r3gan below 10,000 images
    # ---- the optimisers
    g_opt: Optimiser = "adam"       # optimiser of G
    d_opt: Optimiser = "adam"       # optimiser of D
    lr: float = 2e-4                # learning rate
    d_lr: float = 0.                # learning rate of D; 0: the same as lr
    beta1: float = 0.5              # Adam's decay of the first moment
    beta2: float = 0.999            # Adam's decay of the second moment
    decay: int = 0                  # 1: the learning rates fall linearly to 0 in the second half
    ema: float = 0.                 # decay of the running average of G that draws samples; 0: none


ANIME = dict(data="anime,faces-a", net="anime", channels=3, z=100, h=64, steps=2000,
             log_every=25, sample_every=250)
DCGAN = dict(lr=2e-3, decay=1, ema=.998)
# The lowest FID that we reached in two minutes: an R1 penalty instead of batch norm in D.
SPEEDRUN = dict(DCGAN, bn="G", r1=1., beta1=0., beta2=.99, steps=8000)
MNIST28 = dict(net="mnist28", z=100, h=32, init="default")
# The paper's own settings, Gulrajani 2017: no batch norm in D, which it calls the critic (sec. 4).
WGAN_GP = dict(d_steps=5, gp=10., bn="G", lr=1e-4, beta1=0., beta2=.9)
PRESETS = {  # the settings that differ from the defaults above
    # Radford 2016; the Tsinghua homework, whose own settings are --lr 2e-4 --decay 0 --ema 0.
    "dcgan": DCGAN,
    "speedrun": SPEEDRUN,
    # Goodfellow 2014; the Tsinghua homework
    "mlp": dict(net="mlp", h=128, lr=1e-3, decay=1),
    # Mao 2017; CSC413 PA4 and CSE891 HW4. G and D have the same learning rate; some copies of the
    # handout give D twice as much, --d-lr 6e-4.
    "emoji": dict(data="emoji-apple,faces-a", net="emoji", channels=3, z=100, h=32, d_h=64,
                  noise="uniform", loss="lsgan", init="default", lr=3e-4, batch=32),
    # Radford 2016, Arjovsky 2017, Odena 2017; NTU MLDS HW3. The preset wgan has the
    # course's settings; those of the paper are in LOSSES.
    "anime": ANIME,
    "wgan": dict(ANIME, loss="wgan", clip=.01, d_opt="rmsprop", d_steps=5, steps=600),
    "text2img": dict(ANIME, loss="acgan", cond="ac", heads=(12, 11)),
    # CS763 lab 8; and Gulrajani 2017, here with a higher learning rate
    "mnist28": MNIST28,
    "cwgan": MNIST28 | WGAN_GP | dict(
        data="fashion,digits", loss="wgan-gp", cond="planes", heads=(10,), lr=5e-4, decay=1,
        steps=1500, sample_every=250),
    # Eight Gaussians on a circle, and three digits in one picture (Metz 2017). They show whether G
    # finds all modes, which are the groups of the data: 8 and 1,000.
    "ring": dict(data="ring", net="ring", channels=2, z=2, h=128, init="default", batch=256,
                 g_opt="adam", d_opt="adam", lr=1e-3, beta1=.5, beta2=.99, ema=.98,
                 penalty_every=1, steps=2000, sample_every=50),
    "stacked": dict(SPEEDRUN, data="stacked,stacked-digits", channels=3, z=100, lr=1e-3,
                    steps=15000, sample_every=1000, samples=26000),
}
# What one would do today, on the networks and data of any preset: the relativistic loss of Huang
# 2024, with R1 and R2 penalties instead of batch norm in D. Small data sets are also augmented
# (Zhao 2020).
MODERN = dict(loss="r3gan", r1=.3, r2=.3, penalty_every=4, bn="G", init="normal", d_opt="adam",
              lr=5e-4, beta1=0., beta2=.99, decay=0, ema=.998)
# Settings that may change when a run is resumed, because they do not say what is trained. (With
# --decay 1 the rate depends on the number of steps; then a larger number is refused.)
FREE = set("preset steps device amp log_every sample_every samples out resume dump draw prompt"
           .split())


# ---- networks: one function for each pair, made only of torch layers -----------------------------
# z: length of the noise; h: width; c: channels of a picture; out: numbers that D returns for each
# picture. G accepts noise of the shapes (N, z) and (N, z, 1, 1). The comment on the right gives the
# side of each layer's output. With kernel k, stride s and padding p, a convolution turns a side of
# i pixels into (i + 2p - k) // s + 1, and a transposed one turns it into (i - 1) s - 2p + k.
#
# D ends in logits, without a sigmoid. If your loop uses nn.BCELoss, replace it by
# nn.BCEWithLogitsLoss, which is also numerically safer. Or append a sigmoid with
# D.append(nn.Sigmoid()), but then do not use this D with the training steps below.

def dcgan(z=16, h=16, c=1, out=1):
    """32 x 32 digits: G 57,937 and D 42,432 parameters."""
    G = nn.Sequential(
        nn.Flatten(),                                           # takes (N, z) and (N, z, 1, 1)
        nn.Unflatten(1, (z, 1, 1)),                             # (N, z) -> (N, z, 1, 1)
        nn.ConvTranspose2d(z, 4 * h, 4, 1, 0),                  # 1 -> 4
        nn.BatchNorm2d(4 * h),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * h, 2 * h, 4, 2, 1),              # 8
        nn.BatchNorm2d(2 * h),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * h, h, 4, 2, 1),                  # 16
        nn.BatchNorm2d(h),
        nn.ReLU(),
        nn.ConvTranspose2d(h, c, 4, 2, 1),                      # 32
        nn.Tanh(),
    )
    D = nn.Sequential(
        nn.Conv2d(c, h, 4, 2, 1, bias=False),                   # 32 -> 16
        nn.LeakyReLU(.2),
        nn.Conv2d(h, 2 * h, 4, 2, 1, bias=False),               # 8
        nn.BatchNorm2d(2 * h),
        nn.LeakyReLU(.2),
        nn.Conv2d(2 * h, 4 * h, 4, 2, 1, bias=False),           # 4
        nn.BatchNorm2d(4 * h),
        nn.LeakyReLU(.2),
        nn.Conv2d(4 * h, out, 4, 1, 0, bias=False),             # 1
        nn.Flatten(),                                           # logits (N, out)
    )
    return G, D


def emoji(z=100, h=32, c=3, out=1):
    """32 x 32 emojis: G 467,488 parameters; D 262,048, or with h=64, as in the preset, 1,036,096.

    Upsampling followed by a convolution avoids the checkerboard of transposed convolutions. Some
    copies of the handout begin with Conv2d(z, 4 * h, 4, 1, 3) instead, so that G has 463,648
    parameters. D's padding follows from the sides of its layers. If a layer with kernel k and
    stride s turns a side of i pixels into o pixels, then p = ((o - 1) s + k - i) / 2, rounded up.
    The sides 32, 16, 8, 4, 1 give 2, 2, 2, 1."""
    G = nn.Sequential(
        nn.Flatten(),                                           # takes (N, z) and (N, z, 1, 1)
        nn.Unflatten(1, (z, 1, 1)),                             # (N, z) -> (N, z, 1, 1)
        nn.Conv2d(z, 64 * h, 1, bias=False),                    # (N, 64 h, 1, 1)
        nn.BatchNorm2d(64 * h),
        nn.ReLU(),
        nn.Flatten(),
        nn.Unflatten(1, (4 * h, 4, 4)),                         # (N, 64 h) -> (N, 4 h, 4, 4)
        nn.Upsample(scale_factor=2),                            # 4 -> 8
        nn.Conv2d(4 * h, 2 * h, 5, 1, 2, bias=False),
        nn.BatchNorm2d(2 * h),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),                            # 16
        nn.Conv2d(2 * h, h, 5, 1, 2, bias=False),
        nn.BatchNorm2d(h),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),                            # 32
        nn.Conv2d(h, c, 5, 1, 2, bias=False),
        nn.Tanh(),
    )
    D = nn.Sequential(
        nn.Conv2d(c, h, 5, 2, 2, bias=False),                   # 32 -> 16
        nn.BatchNorm2d(h),
        nn.ReLU(),
        nn.Conv2d(h, 2 * h, 5, 2, 2, bias=False),               # 8
        nn.BatchNorm2d(2 * h),
        nn.ReLU(),
        nn.Conv2d(2 * h, 4 * h, 5, 2, 2, bias=False),           # 4
        nn.BatchNorm2d(4 * h),
        nn.ReLU(),
        nn.Conv2d(4 * h, out, 5, 2, 1, bias=False),             # 1
        nn.Flatten(),                                           # logits (N, out)
    )
    return G, D


def anime(z=100, h=64, c=3, out=1):
    """64 x 64 faces: G 3,576,704 and D 2,765,568 parameters."""
    G = nn.Sequential(
        nn.Flatten(),                                           # takes (N, z) and (N, z, 1, 1)
        nn.Unflatten(1, (z, 1, 1)),                             # (N, z) -> (N, z, 1, 1)
        nn.ConvTranspose2d(z, 8 * h, 4, 1, 0, bias=False),      # 1 -> 4
        nn.BatchNorm2d(8 * h),
        nn.LeakyReLU(.2),
        nn.ConvTranspose2d(8 * h, 4 * h, 4, 2, 1, bias=False),  # 8
        nn.BatchNorm2d(4 * h),
        nn.LeakyReLU(.2),
        nn.ConvTranspose2d(4 * h, 2 * h, 4, 2, 1, bias=False),  # 16
        nn.BatchNorm2d(2 * h),
        nn.LeakyReLU(.2),
        nn.ConvTranspose2d(2 * h, h, 4, 2, 1, bias=False),      # 32
        nn.BatchNorm2d(h),
        nn.LeakyReLU(.2),
        nn.ConvTranspose2d(h, c, 4, 2, 1, bias=False),          # 64
        nn.Tanh(),
    )
    D = nn.Sequential(
        nn.Conv2d(c, h, 4, 2, 1, bias=False),                   # 64 -> 32
        nn.LeakyReLU(.2),
        nn.Conv2d(h, 2 * h, 4, 2, 1, bias=False),               # 16
        nn.BatchNorm2d(2 * h),
        nn.LeakyReLU(.2),
        nn.Conv2d(2 * h, 4 * h, 4, 2, 1, bias=False),           # 8
        nn.BatchNorm2d(4 * h),
        nn.LeakyReLU(.2),
        nn.Conv2d(4 * h, 8 * h, 4, 2, 1, bias=False),           # 4
        nn.BatchNorm2d(8 * h),
        nn.LeakyReLU(.2),
        nn.Conv2d(8 * h, out, 4, 1, 0, bias=False),             # 1
        nn.Flatten(),                                           # logits (N, out)
    )
    return G, D


def mnist28(z=100, h=32, c=1, out=1):
    """28 x 28 digits or clothes: G 1,098,816 and D 693,249 parameters. LeakyReLU has slope 0.02."""
    G = nn.Sequential(
        nn.Flatten(),                                           # takes (N, z) and (N, z, 1, 1)
        nn.Unflatten(1, (z, 1, 1)),                             # (N, z) -> (N, z, 1, 1)
        nn.ConvTranspose2d(z, 8 * h, 4, 2, 1, bias=False),      # 1 -> 2
        nn.BatchNorm2d(8 * h),
        nn.ReLU(),
        nn.ConvTranspose2d(8 * h, 4 * h, 4, 2, 1, bias=False),  # 4
        nn.BatchNorm2d(4 * h),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * h, 2 * h, 4, 2, 1, bias=False),  # 8
        nn.BatchNorm2d(2 * h),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * h, h, 4, 2, 1, bias=False),      # 16
        nn.BatchNorm2d(h),
        nn.ReLU(),
        nn.ConvTranspose2d(h, c, 2, 2, 2, bias=False),          # 28
        nn.Tanh(),
    )
    D = nn.Sequential(
        nn.Conv2d(c, h, 2, 2, 2, bias=False),                   # 28 -> 16
        nn.LeakyReLU(.02),
        nn.Conv2d(h, 2 * h, 4, 2, 1, bias=False),               # 8
        nn.BatchNorm2d(2 * h),
        nn.LeakyReLU(.02),
        nn.Conv2d(2 * h, 4 * h, 4, 2, 1, bias=False),           # 4
        nn.BatchNorm2d(4 * h),
        nn.LeakyReLU(.02),
        nn.Conv2d(4 * h, 8 * h, 4, 2, 1, bias=False),           # 2
        nn.BatchNorm2d(8 * h),
        nn.LeakyReLU(.02),
        nn.Conv2d(8 * h, out, 4, 2, 1),                         # 1
        nn.Flatten(),                                           # logits (N, out)
    )
    return G, D


def mlp(z=16, h=128, c=1, out=1):
    """32 x 32 digits without a convolution: G 1,714,432 and D 689,153 parameters."""
    G = nn.Sequential(
        nn.Flatten(),                                           # takes (N, z) and (N, z, 1, 1)
        nn.Linear(z, 2 * h),
        nn.BatchNorm1d(2 * h),
        nn.ReLU(),
        nn.Linear(2 * h, 4 * h),
        nn.BatchNorm1d(4 * h),
        nn.ReLU(),
        nn.Linear(4 * h, 8 * h),
        nn.BatchNorm1d(8 * h),
        nn.ReLU(),
        nn.Linear(8 * h, c * 32 * 32),
        nn.Tanh(),
        nn.Unflatten(1, (c, 32, 32)),                           # (N, c, 32, 32)
    )
    D = nn.Sequential(
        nn.Flatten(),                                           # (N, c * 32 * 32)
        nn.Linear(c * 32 * 32, 4 * h),
        nn.LeakyReLU(.2),
        nn.Linear(4 * h, 2 * h),
        nn.LeakyReLU(.2),
        nn.Linear(2 * h, h),
        nn.LeakyReLU(.2),
        nn.Linear(h, out),                                      # logits (N, out)
    )
    return G, D


def ring(z=2, h=128, c=2, out=1, g_layers=2, d_layers=1):
    """Points in the plane, as pictures of two channels and one pixel. D is weak on purpose, with
    only one hidden layer, because the losses then give visibly different results."""
    G = nn.Sequential(nn.Flatten(), nn.Linear(z, h), nn.ReLU())     # (N, z) -> (N, h)
    D = nn.Sequential(nn.Flatten(), nn.Linear(c, h), nn.LeakyReLU(.2))
    for _ in range(g_layers - 1):
        G.extend([nn.Linear(h, h), nn.ReLU()])
    for _ in range(d_layers - 1):
        D.extend([nn.Linear(h, h), nn.LeakyReLU(.2)])
    G.extend([nn.Linear(h, c), nn.Tanh(), nn.Unflatten(1, (c, 1, 1))])      # (N, c, 1, 1)
    D.append(nn.Linear(h, out))                                     # logits (N, out)
    return G, D


def init(m):
    """Normal weights with mean 0 and standard deviation 0.02, Radford 2016 section 4. Those of
    batch norm have mean 1. Biases stay as torch has them. Use it as G.apply(init)."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(m.weight, 0, .02)
    elif isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(m.weight, 1, .02)


# The networks by name, and the side of their pictures in pixels.
NETS = {"dcgan": (dcgan, 32), "emoji": (emoji, 32), "anime": (anime, 64), "mnist28": (mnist28, 28),
        "mlp": (mlp, 32), "ring": (ring, 1),
        "ring3": (partial(ring, g_layers=3, d_layers=3), 1)}


# ---- noise and conditions ------------------------------------------------------------------------

def draw_z(n, cfg, device):
    """n noise vectors (n, z) from the distribution that cfg.noise names."""
    if cfg.noise == "normal":
        return torch.randn(n, cfg.z, device=device)             # N(0, I)
    u = torch.rand(n, cfg.z, device=device)                     # U(0, 1)
    return 2 * u - 1 if cfg.noise == "uniform" else u           # U(-1, 1)


def condition(y, heads):
    """Labels (N,) -> condition c (N, K): one one-hot vector for each head, side by side.

    A head is one attribute, and heads says how many classes each has: condition(y, 10) makes the
    one-hot vectors of ten digits. With (12, 11) a label is 11 * hair + eyes, and K = 23. With ()
    there is no condition: (N, 0)."""
    heads = (heads,) if isinstance(heads, int) else heads
    c = [torch.zeros(len(y), 0, device=y.device)]
    for part, k in zip(torch.unravel_index(y, heads), heads):   # label -> (hair, eyes)
        c.append(F.one_hot(part, k).float())
    return torch.cat(c, 1)


def planes(x, c):
    """Pictures (N, C, S, S), conditions (N, K) -> (N, C + K, S, S). Each number of c becomes one
    more channel, which has this value in every pixel."""
    c = c[..., None, None].expand(-1, -1, *x.shape[2:])         # (N, K) -> (N, K, S, S)
    return torch.cat([x, c], 1)


# ---- the auxiliary classifier; regularisation of D -----------------------------------------------
# x and x_fake are samples (N, ...), pictures or vectors. D returns one logit for each sample, (N,)
# or (N, 1). If it returns (N, 1 + K), only column 0, the logit of real or fake, is used.
# The gradient of the sum of all logits holds, for each sample, the gradient of its own logit.

def ac_loss(logits, c, heads):
    """-E log P(C = c | x), Odena 2017 eq. 3: how badly D predicts the condition.

    logits (N, K): D's class scores; c (N, K): the one-hot vectors; heads: the size of each softmax,
    (12, 11) for hair and eyes, 10 for digits. The losses of the heads are added."""
    heads = (heads,) if isinstance(heads, int) else heads
    loss = 0.
    for scores, wanted in zip(logits.split(heads, 1), c.split(heads, 1)):   # hair, then eyes
        loss += F.cross_entropy(scores, wanted)
    return loss


@torch.no_grad()
def clip_weights(weights, c):
    """w <- clip(w, -c, c), Arjovsky 2017 algorithm 1 line 7. It bounds how steep D can be (unless D
    has batch norm, which scales its input up again).

    weights: tensors, for example D.parameters()."""
    for w in weights:
        w.clamp_(-c, c)


def gradient_penalty(D, x, x_fake):
    """E (|grad D(x_hat)|_2 - 1)^2 at x_hat = eps x + (1 - eps) x_fake, Gulrajani 2017 eq. 3.

    Three traps:
    - eps x + eps x_fake is not a point between x and x_fake.
    - Penalising the norm itself, instead of its distance from 1, makes D flat.
    - Batch norm in D makes the gradient of one sample depend on the others."""
    eps = torch.rand(len(x), 1, device=x.device)                        # one for each sample
    x_hat = eps * x.flatten(1) + (1 - eps) * x_fake.flatten(1)          # (N, d)
    x_hat = x_hat.detach().view(x.shape).requires_grad_()
    with torch.autocast(x.device.type, enabled=False):                  # in float32
        logits = D(x_hat).view(len(x), -1)[:, 0]
        (grad,) = torch.autograd.grad(logits.sum(), x_hat, create_graph=True)
        return ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()


def r1_penalty(D, x):
    """R1 = 1/2 E |grad D(x)|_2^2 at real pictures, Mescheder 2018 eq. 9. At fakes the same formula
    is called R2, eq. 10. The weight of the penalty is called gamma."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, enabled=False):                  # in float32
        logits = D(x).view(len(x), -1)[:, 0]
        (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return (grad.flatten(1) ** 2).sum(1).mean() / 2


def mean_norm_penalty(D, x, x_fake):
    """A common mistake, shown as an example: E |grad D|_2 at alpha x + alpha x_fake. Do not use it.

    Some solutions of the emoji handout have it in place of gradient_penalty. The point does not lie
    between x and x_fake, because alpha is used twice, and the norm is pulled to 0 instead of 1."""
    alpha = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device)
    x_hat = (alpha * x + alpha * x_fake).detach().requires_grad_()
    with torch.autocast(x.device.type, enabled=False):
        (grad,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
        return grad.flatten(1).norm(dim=1).mean()


# What --penalty accepts. R1 also pulls the gradient to 0, but only at real pictures, where it is 0
# anyway once G's pictures are like the real ones.
PENALTIES = {"gp": gradient_penalty, "r1": lambda D, x, x_fake: r1_penalty(D, x),
             "mean-norm": mean_norm_penalty}


class SpectralWeight(nn.Module):
    """W -> W / sigma(W), Miyato 2018 algorithm 1. sigma is the largest singular value of W,
    reshaped to a matrix with one row for each output.

    While training, each forward pass does one power iteration, which improves the singular vectors
    u and v. No gradient flows through them. dim: the dimension of W that counts the outputs, which
    is 0, or 1 in a transposed convolution."""

    def __init__(self, weight, dim=0):
        super().__init__()
        self.dim = dim
        W = self.matrix(weight)
        self.register_buffer("u", torch.randn(len(W)))
        self.register_buffer("v", torch.randn(len(W.T)))
        for _ in range(15):
            self.iterate(W)

    def matrix(self, weight):
        return weight.transpose(0, self.dim).flatten(1)             # (outputs, all others)

    @torch.no_grad()
    def iterate(self, W):
        self.v.copy_(F.normalize(W.T @ self.u, dim=0))              # v <- W^T u / |W^T u|
        self.u.copy_(F.normalize(W @ self.v, dim=0))                # u <- W v / |W v|

    def forward(self, weight):
        W = self.matrix(weight)
        with torch.autocast(W.device.type, enabled=False):          # bfloat16 is too coarse here
            if self.training:
                self.iterate(W)
            # Copies, because the next pass overwrites u and v before backward has used them.
            sigma = self.u.clone() @ W @ self.v.clone()             # u^T W v
        return weight / sigma


def spectral_norm(layer):
    """Replaces the weight W of a convolution or linear layer by W / sigma(W) and returns the layer.
    It stands where the handout writes SpectralNorm(layer)."""
    dim = int(isinstance(layer, nn.ConvTranspose2d))
    return nn.utils.parametrize.register_parametrization(
        layer, "weight", SpectralWeight(layer.weight, dim))


def diff_augment(x):
    """DiffAugment, Zhao 2020, without its third part, cutout: every picture (N, C, S, S) gets
    random colours and a random shift.

    D sees all pictures, real and fake, only in this form, which makes it harder for D to memorise a
    small data set. Real and fake pictures are augmented with the same distribution, and gradients
    flow through the augmentation, so G still learns to draw pictures that are not augmented.
    lerp(a, b, w) = a + w (b - a)."""
    n = len(x)
    side = x.shape[-1]
    light, colour, contrast = torch.rand(3, n, 1, 1, 1, device=x.device)
    x = x + light - .5                                                  # brightness: -0.5 .. 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * colour)              # saturation: times 0 .. 2
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, .5 + contrast)   # contrast: 0.5 .. 1.5
    s = side // 8
    x = F.pad(x, [s] * 4)                                               # (N, C, S + 2 s, S + 2 s)
    corner = torch.randint(2 * s + 1, (2, n, 1), device=x.device)       # upper left of the crop
    rows, columns = corner + torch.arange(side, device=x.device)        # its pixels, (N, S) each
    x = x.take_along_dim(rows[:, None, :, None], 2)
    return x.take_along_dim(columns[:, None, None], 3)


# ---- one training step for each loss, after its paper --------------------------------------------
# Each function updates D, once or d_steps times, and then G once. This is how to use one in a
# program of your own, where x holds all training pictures, float (n, C, S, S) in [-1, 1]:
#
#     G, D = build("dcgan")
#     opt_G = torch.optim.Adam(G.parameters(), 2e-4, betas=(.5, .999))
#     opt_D = torch.optim.Adam(D.parameters(), 2e-4, betas=(.5, .999))
#     def draw():                                 # the next batch: real pictures and noise
#         return x[torch.randint(len(x), (64,))], torch.randn(64, 16)
#     for step in range(5000):
#         last = step_gan(G, D, opt_G, opt_D, draw)
#
# G(z) turns noise (N, z) into pictures x_fake (N, C, S, S) in [-1, 1]. D(x) returns one logit for
# each picture, (N, 1) or (N,); in step_acgan, and in step_r3gan with heads, it returns (N, 1 + K):
# this logit and the class logits beside it.
#
# If there is a condition c, draw() returns x, z, c, and the functions call G(z, c) and D(x, c)
# (step_acgan calls D(x)). G and D may be functions, so the networks above become conditional like
# this:  lambda z, c: G(torch.cat([z, c], 1))  and  lambda x, c: D(planes(x, c)).
#
# The functions return what the log shows: the last batch x, x_fake; both losses without penalties
# and class terms; and D's logits for x (real), for x_fake (fake), and for the fakes of G's update,
# scored by the updated D (after). In step_lsgan x_fake is from G's update.

def descend(opt, loss):
    """One optimiser step that reduces a loss. Gradients go only to the weights of this optimiser,
    so G's step computes none for D. The gradients stay until the next call."""
    weights = [w for group in opt.param_groups for w in group["params"] if w.requires_grad]
    opt.zero_grad()
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward(inputs=weights)
    opt.step()
    # Autocast would otherwise reuse its bfloat16 copies of the weights from before this update.
    torch.clear_autocast_cache()


def step_gan(G, D, opt_G, opt_D, draw, r1=0., r2=0., saturating=False):
    """The original GAN: Goodfellow 2014, algorithm 1 with one update of D, and with the
    non-saturating loss of section 3 for G (the log D trick).

        D minimises  -E log D(x) - E log(1 - D(G(z)))           2 ln 2 = 1.386 where D = 1/2
        G minimises  -E log D(G(z))                               ln 2 = 0.693

    Here D(x) is the sigmoid of a logit t, and -log sigmoid(t) = softplus(-t). G is updated on the
    same fakes as D; the paper draws new noise. With saturating=True, G minimises
    E log(1 - D(G(z))), equation 1 as it stands. Its gradient is almost 0 once D rejects all fakes.
    r1, r2: weights of the R1 and R2 penalties (Mescheder 2018)."""
    x, z, *c = draw()                   # c is [] or [condition]
    x_fake = G(z, *c)
    real = D(x, *c)                     # two passes, so that batch norm never mixes real and fake
    fake = D(x_fake.detach(), *c)       # detach: the loss of D must not change G
    loss_D = F.softplus(-real).mean() + F.softplus(fake).mean()
    extra = 0.
    if r1:
        extra += r1 * r1_penalty(lambda picture: D(picture, *c), x)
    if r2:
        extra += r2 * r1_penalty(lambda picture: D(picture, *c), x_fake)
    descend(opt_D, loss_D + extra)

    after = D(x_fake, *c)               # the same fakes, scored by the updated D
    loss_G = F.softplus(-after).mean()
    if saturating:
        loss_G = -F.softplus(after).mean()
    descend(opt_G, loss_G)
    return dict(x=x, x_fake=x_fake, D=loss_D, G=loss_G, real=real, fake=fake, after=after)


def step_lsgan(G, D, opt_G, opt_D, draw, d_steps=1, gp=0., penalty=gradient_penalty):
    """Least squares: Mao 2017, equation 2 with a = 0 and b = c = 1.

        D minimises  1/2 E (D(x) - 1)^2 + 1/2 E D(G(z))^2       0.25 where D = 1/2
        G minimises  E (D(G(z)) - 1)^2                          0.25

    As in the emoji handout, G's loss lacks the paper's 1/2, and G is updated on a new batch of
    noise (and of conditions, if there are any). gp: weight of penalty(D, x, x_fake), a function
    that returns a scalar, for example gradient_penalty."""
    for _ in range(d_steps):
        x, z, *c = draw()
        x_fake = G(z, *c)
        real = D(x, *c)
        fake = D(x_fake.detach(), *c)
        loss_D = ((real - 1) ** 2).mean() / 2 + (fake ** 2).mean() / 2
        extra = 0.
        if gp:
            extra = gp * penalty(lambda x_hat: D(x_hat, *c), x, x_fake)
        descend(opt_D, loss_D + extra)

    _, z, *c = draw()
    x_fake = G(z, *c)
    after = D(x_fake, *c)
    loss_G = ((after - 1) ** 2).mean()
    descend(opt_G, loss_G)
    return dict(x=x, x_fake=x_fake, D=loss_D, G=loss_G, real=real, fake=fake, after=after)


def step_wgan(G, D, opt_G, opt_D, draw, d_steps=5, clip=.01):
    """Wasserstein GAN: Arjovsky 2017, algorithm 1. D is a critic: its scores have no bound and are
    no probabilities.

        D minimises  E D(G(z)) - E D(x), with every weight kept within [-clip, clip]
        G minimises  -E D(G(z))

    A negative loss of D is healthy: its absolute value estimates the Wasserstein distance of real
    and fake pictures, up to a constant factor. G is updated on the fakes of D's last update; the
    paper draws new noise."""
    for _ in range(d_steps):
        x, z, *c = draw()
        x_fake = G(z, *c)
        real = D(x, *c)
        fake = D(x_fake.detach(), *c)
        loss_D = fake.mean() - real.mean()
        descend(opt_D, loss_D)
        clip_weights(opt_D.param_groups[0]["params"], clip)

    after = D(x_fake, *c)
    loss_G = -after.mean()
    descend(opt_G, loss_G)
    return dict(x=x, x_fake=x_fake, D=loss_D, G=loss_G, real=real, fake=fake, after=after)


def step_wgan_gp(G, D, opt_G, opt_D, draw, d_steps=5, gp=10.):
    """WGAN with a gradient penalty instead of clipping: Gulrajani 2017, algorithm 1.

        D minimises  E D(G(z)) - E D(x) + gp E (|grad D(x_hat)| - 1)^2, x_hat between x and G(z)
        G minimises  -E D(G(z))

    D should not use batch norm (section 4), which makes the gradient of one picture depend on the
    others. G is updated on the fakes of D's last update; the paper draws new noise."""
    for _ in range(d_steps):
        x, z, *c = draw()
        x_fake = G(z, *c)
        real = D(x, *c)
        fake = D(x_fake.detach(), *c)
        loss_D = fake.mean() - real.mean()
        penalty = gradient_penalty(lambda x_hat: D(x_hat, *c), x, x_fake)
        descend(opt_D, loss_D + gp * penalty)

    after = D(x_fake, *c)
    loss_G = -after.mean()
    descend(opt_G, loss_G)
    return dict(x=x, x_fake=x_fake, D=loss_D, G=loss_G, real=real, fake=fake, after=after)


def step_acgan(G, D, opt_G, opt_D, draw, heads):
    """AC-GAN: Odena 2017, equations 2 and 3. D also predicts what is in the picture.

        D minimises  -E log D(x) - E log(1 - D(G(z, c))) - E log P(c | x)
        G minimises  -E log D(G(z, c)) - E log P(c | G(z, c))

    Column 0 of D's output is the logit of real or fake, the other K are class logits. Unlike the D
    of the paper, this one learns the classes from real pictures only, so that bad fakes do not
    confuse it. heads: the sizes of the softmaxes, see ac_loss."""
    x, z, c = draw()
    x_fake = G(z, c)
    real = D(x)                                                     # (N, 1 + K)
    fake = D(x_fake.detach())
    loss_D = F.softplus(-real[:, 0]).mean() + F.softplus(fake[:, 0]).mean()
    descend(opt_D, loss_D + ac_loss(real[:, 1:], c, heads))

    after = D(x_fake)
    loss_G = F.softplus(-after[:, 0]).mean()
    # The class term: D should recognise what G was asked to draw.
    descend(opt_G, loss_G + ac_loss(after[:, 1:], c, heads))
    return dict(x=x, x_fake=x_fake, D=loss_D, G=loss_G, real=real, fake=fake, after=after)


def step_r3gan(G, D, opt_G, opt_D, draw, r1=0., r2=0., heads=()):
    """R3GAN, Huang 2024: what one would do today. D compares each real picture with one fake
    (Jolicoeur-Martineau 2018), and the R1 and R2 penalties keep D smooth around both.

        D minimises  E softplus(D(G(z)) - D(x)) + r1 R1 + r2 R2     ln 2 = 0.693 if equal
        G minimises  E softplus(D(x) - D(G(z)))

    With heads, D also predicts the condition, as in step_acgan."""
    x, z, *c = draw()
    x_fake = G(z, *c)
    real = D(x, *c)
    fake = D(x_fake.detach(), *c)
    extra = 0.
    if heads:                                   # column 0: real or fake, other columns: classes
        extra += ac_loss(real[:, 1:], *c, heads)
        real, fake = real[:, 0], fake[:, 0]
    loss_D = F.softplus(fake - real).mean()
    if r1:
        extra += r1 * r1_penalty(lambda picture: D(picture, *c), x)
    if r2:
        extra += r2 * r1_penalty(lambda picture: D(picture, *c), x_fake)
    descend(opt_D, loss_D + extra)

    after = D(x_fake, *c)
    real_again = D(x, *c)                       # D has been updated since
    extra = 0.
    if heads:
        extra = ac_loss(after[:, 1:], *c, heads)
        after, real_again = after[:, 0], real_again[:, 0]
    loss_G = F.softplus(real_again - after).mean()
    descend(opt_G, loss_G + extra)
    return dict(x=x, x_fake=x_fake, D=loss_D, G=loss_G, real=real, fake=fake, after=after)


# ---- settings become networks --------------------------------------------------------------------

class Rescale(nn.Module):
    """x -> scale x + shift."""

    def __init__(self, scale, shift):
        super().__init__()
        self.scale = scale
        self.shift = shift

    def forward(self, x):
        return self.scale * x + self.shift


BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d
ACTIVATIONS = {"relu": nn.ReLU, "leaky": partial(nn.LeakyReLU, .2), "selu": nn.SELU}


def networks(cfg):
    """(G, D) of a config, freshly initialised.

    G: noise with a condition of length K appended, (N, z + K) -> pictures (N, C, S, S) in [-1, 1].
    D: pictures, with K more channels if it sees the condition -> logits (N, 1), or (N, 1 + K) if it
    predicts the condition."""
    make, _ = NETS[cfg.net]
    K = 0 if cfg.cond == "none" else sum(cfg.heads)
    planes_K = K if cfg.cond == "planes" else 0
    classes_K = K - planes_K                        # D sees the condition or predicts it
    # make() returns a pair, but G and D need different sizes, so we call it once for each.
    G, _ = make(cfg.z + K, cfg.h, cfg.channels)
    _, D = make(cfg.z, cfg.d_h or cfg.h, cfg.channels + planes_K, 1 + classes_K)
    for name, net in ("G", G), ("D", D):
        if cfg.init == "normal":
            net.apply(init)
        for i, layer in enumerate(net):
            if isinstance(layer, BATCH_NORMS) and cfg.bn not in ("both", name):
                net[i] = nn.Identity()
            if isinstance(layer, (nn.ReLU, nn.LeakyReLU)) and cfg.act:
                net[i] = ACTIVATIONS[cfg.act]()
            if isinstance(layer, nn.Tanh) and cfg.raw:
                net[i] = Rescale(1 / 127.5, -1)     # inside both networks, pixels are in 0 .. 255
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                if cfg.sn in ("both", name):
                    spectral_norm(layer)
    if cfg.raw:
        D.insert(0, Rescale(127.5, 127.5))
    return G, D


# For each --loss: its training step, the settings that this step reads, and the settings that are
# applied when --loss replaces a preset's own loss (those of its paper; for acgan, the one setting
# that it needs; for r3gan, our own).
LOSSES = {
    "gan": (step_gan, {"r1", "r2"}, {}),
    "saturating": (partial(step_gan, saturating=True), {"r1", "r2"}, {}),
    "lsgan": (step_lsgan, {"d_steps", "gp", "penalty"}, {}),
    "wgan": (step_wgan, {"d_steps", "clip"},
             dict(d_steps=5, clip=.01, g_opt="rmsprop", d_opt="rmsprop", lr=5e-5)),
    "wgan-gp": (step_wgan_gp, {"d_steps", "gp"}, WGAN_GP),
    "acgan": (step_acgan, {"heads"}, dict(cond="ac")),
    "r3gan": (step_r3gan, {"r1", "r2", "heads"}, MODERN),
}


def config(preset, modern=0, **changes):
    """The GANConfig of a preset. Settings are combined in this order; later ones override earlier
    ones:
    1. the settings of the preset (if another loss is chosen, without the preset's penalties, clip,
       d_steps and optimisers);
    2. MODERN, if modern=1;
    3. the settings in LOSSES, if `changes` contains another loss;
    4. `changes`.

    On the ring, all losses use the preset's optimiser, and gp has a value for points in the plane
    instead of pictures."""
    fields = dict(loss="gan") | PRESETS[preset]
    own = fields["loss"]
    loss = changes.get("loss", "r3gan" if modern else own)
    if loss != own:                             # penalties and optimisers belong to a loss
        for name in "d_steps clip gp r1 r2 g_opt d_opt".split():
            fields.pop(name, None)
    if modern:
        fields |= MODERN
    if loss != fields["loss"]:
        settings = LOSSES[loss][2]
        fields |= settings
    if preset == "ring":
        fields |= PRESETS["ring"] | dict(gp=.1 if loss == "wgan-gp" else 0.)
    return GANConfig(preset, modern, **fields | changes)


def build(preset, **changes):
    """(G, D) of a preset with some settings changed, for example build("dcgan", z=100, h=100)."""
    return networks(config(preset, **changes))


# ---- the training loop ---------------------------------------------------------------------------

def play_G(G, z, *c):
    """Noise (N, z), and conditions (N, K) if there are any -> float32 pictures (N, C, S, S)."""
    return G(torch.cat([z, *c], 1)).float()


def play_D(D, cfg, x, *c):
    """Pictures (N, C, S, S), and conditions (N, K) if there are any -> float32 logits. D sees
    augmented pictures where cfg says so, and the conditions as planes or not at all."""
    if cfg.augment > 0:
        x = diff_augment(x)
    if cfg.cond == "planes":
        x = planes(x, *c)
    return D(x).float()


def draw_batch(images, conditions, cfg):
    """The next batch: random real pictures x (N, C, S, S), noise z (N, z), and the conditions of
    these pictures c (N, K). With torchrun each process keeps its share of the batch."""
    i = torch.randint(len(images), (cfg.batch,), device=images.device)
    z = draw_z(cfg.batch, cfg, images.device)
    share = slice(data.RANK, None, data.WORLD)
    i, z = i[share], z[share]
    return to_float(images[i]), z, conditions[i]


def step_settings(cfg, step):
    """Keyword arguments for the training function of cfg.loss, at iteration `step`.

    R1 and R2 are lazy (Karras 2020, appendix B): they are computed only in every n-th iteration,
    with n times the weight. The average penalty is the same, and most of its time is saved."""
    reads = LOSSES[cfg.loss][1]
    settings = {name: getattr(cfg, name) for name in reads}
    n = cfg.penalty_every
    for name in reads & {"r1", "r2"}:
        settings[name] *= n * (step % n == 0)       # times n, or times 0
    if "penalty" in reads:
        settings["penalty"] = PENALTIES[cfg.penalty]
    if "heads" in reads and cfg.cond != "ac":
        settings["heads"] = ()                      # D sees the condition and need not predict it
    return settings


def optimiser(kind, net, lr, cfg):
    """Adam, RMSprop or SGD for a network. With torchrun it averages gradients over processes."""
    make = {"adam": partial(torch.optim.Adam, betas=(cfg.beta1, cfg.beta2), fused=True),
            "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}[kind]
    return data.over_ranks(make(net.parameters(), lr))


@torch.no_grad()
def average(G_ema, G, decay):
    """theta_ema <- decay theta_ema + (1 - decay) theta, for all weights in one call."""
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - decay)


@torch.no_grad()
def refresh(G, conditions, cfg, device):
    """Recompute the batch norm statistics of G from 40 batches. `average` changes only the weights,
    so the statistics of G_ema are out of date."""
    for m in G.modules():
        if isinstance(m, BATCH_NORMS):
            m.reset_running_stats()
            m.momentum = None                           # torch: a plain mean over all batches
    for _ in range(40):
        i = torch.randint(len(conditions), (250,), device=device)
        play_G(G, draw_z(250, cfg, device), conditions[i])


@torch.no_grad()
def sample(G, z, c):
    """Noise (N, z), conditions (N, K) -> pictures uint8 (N, C, S, S) on the CPU, in eval mode."""
    was = G.training
    G.eval()
    x = torch.cat([to_uint8(G(part)).cpu() for part in torch.cat([z, c], 1).split(500)])
    G.train(was)
    return x


def saturation(x):
    """Mean HSV saturation (max - min) / max of pictures (N, 3, S, S) in [-1, 1]."""
    x = to_uint8(x).float()
    high = x.amax(1)
    return ((high - x.amin(1)) / high.clamp(min=1)).mean()              # a black pixel has 0


def spread(x):
    """Standard deviation of a pixel over the batch, mean over pixels: 0 when pictures are alike."""
    return x.std(0).mean()


def statistics(cfg, nets, x, x_fake, D, G, real, fake, after):
    """The numbers of the log, 0-d tensors, from what a training step returns. |dD| and |dG| are the
    norms of the gradients of D's and G's loss. (In a step with R1 or R2, |dD| contains them n
    times, see step_settings, so its curve can have teeth.) spread is 0 if all fakes are equal."""
    scores = torch.stack([t.view(len(t), -1)[:, 0] for t in (real, fake, after)])   # (3, N)
    if cfg.loss in ("gan", "saturating", "acgan"):
        scores = scores.sigmoid()                                   # probabilities
    d_real, d_before, d_after = scores.mean(1)
    row = {"D": D, "G": G, "D(x)": d_real, "D(G(z)) before": d_before, "D(G(z)) after": d_after,
           "|dD|": data.grad_norm(nets["D"]), "|dG|": data.grad_norm(nets["G"]),
           "spread": spread(x_fake) / spread(x).clamp(min=1e-6)}
    if cfg.channels == 3:
        row |= {"sat real": saturation(x), "sat fake": saturation(x_fake)}
    if cfg.preset == "ring":
        row["modes"], row["good"] = found(x_fake)
    return row


def train(cfg, images, labels, out, device):
    """Trains G and D and returns (G_ema, D, log). Continues from out/last.pt if it exists.

    images: uint8 (n, C, S, S) on the device, labels: (n,). Writes sample pictures, log.csv and
    last.pt into the folder out. G_ema is the running average of G; without --ema it is G."""
    torch.manual_seed(cfg.seed)
    G, D = (data.place(net, device) for net in networks(cfg))
    G_ema = copy.deepcopy(G) if cfg.ema else G          # the one that draws the samples
    d_lr = cfg.d_lr or cfg.lr
    opt_G = optimiser(cfg.g_opt, G, cfg.lr, cfg)
    opt_D = optimiser(cfg.d_opt, D, d_lr, cfg)
    conditions = condition(labels, cfg.heads).to(device)                    # (n, K)
    fixed_z = draw_z(1000 if cfg.preset == "ring" else 64, cfg, device)     # for all sample grids
    fixed_c = conditions[torch.randint(len(images), (len(fixed_z),), device=device)]
    log = data.Log(out, cfg.steps)
    parts = dict(G=G, G_ema=G_ema, D=D, opt_G=opt_G, opt_D=opt_D, log=log)
    start = data.restore(parts, out / "last.pt", cfg, FREE, device)
    training_step = LOSSES[cfg.loss][0]
    players = partial(play_G, G), partial(play_D, D, cfg), opt_G, opt_D
    draw = partial(draw_batch, images, conditions, cfg)
    amp = data.autocast(cfg.amp, device)

    for step in range(start + 1, cfg.steps + 1):
        # Seed every step from (seed, step), so that a resumed run sees the same batches and noise.
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        if cfg.decay:
            # The rate is constant in the first half of the steps, then it falls linearly to 0.
            rate = min(1., 2 - 2 * (step - 1) / cfg.steps)
            opt_G.param_groups[0]["lr"] = cfg.lr * rate
            opt_D.param_groups[0]["lr"] = d_lr * rate
        with amp:
            last = training_step(*players, draw, **step_settings(cfg, step))
        if cfg.ema:
            # Start with a smaller decay. Otherwise the average remembers the random first weights.
            average(G_ema, G, min(cfg.ema, step / (step + 10)))
        # We wait for the GPU only here, to log and to draw samples.
        first_or_last = step in (1, cfg.steps)
        if step % cfg.log_every == 0 or first_or_last:
            log.write(step, cfg.batch, **statistics(cfg, parts, **last))
        if step % cfg.sample_every == 0 or first_or_last:
            if cfg.ema:
                refresh(G_ema, conditions, cfg, device)
            x = sample(G_ema, fixed_z, fixed_c)
            page = ring_page(cfg, D, images, x, step) if cfg.preset == "ring" else data.grid(x, 8)
            data.save(page, log.grid(step))
            data.save_checkpoint(out / "last.pt", parts, step, cfg)
    return G_ema, D, log


# ---- the ring: points in the plane ---------------------------------------------------------------

def found(x):
    """Points (N, 2, 1, 1) in [-1, 1] -> 0-d tensors: how many of the 8 modes were found, and the
    share of good points.

    A point is good if it lies within 4 standard deviations of a centre. A mode is found if at least
    N / 40 points are good and nearest to its centre; this is a fifth of what it has in the data."""
    distance, nearest = torch.cdist(x.flatten(1), data.RING.to(x.device)).min(1)    # (N,) each
    good = distance < 4 * .02
    of_mode = F.one_hot(nearest, 8)[good].sum(0)                                    # (8,)
    return (of_mode >= len(x) / 40).sum(), good.float().mean()


@torch.no_grad()
def ring_page(cfg, D, images, x, step, side=200):
    """A Pillow picture of the plane: D's output in seven bands from orange (fake) to blue (real),
    500 real points in grey, 500 of the points x (uint8, N 2 1 1) in red. The title counts the modes
    that all points x cover."""
    line = torch.linspace(-1, 1, side)
    plane = torch.cartesian_prod(-line, line).flip(1)               # (x, y) of all pixels, by rows
    v = D(plane.view(-1, 2, 1, 1).to(images.device))[:, 0].cpu()    # (side * side,)
    v = (v - v.mean()) / v.std()
    v = (3 + 2 * v).round().clamp(0, 6) / 6                         # seven bands
    orange, blue = torch.tensor([[255., 214, 165], [160, 200, 255]])[..., None]     # (3, 1) each
    page = data.as_image(torch.lerp(orange, blue, v).byte().view(3, side, side))
    draw = ImageDraw.Draw(page)
    for points, colour, r in (images[:500].cpu(), (90, 90, 90), 1), (x[:500], (215, 30, 30), 1.5):
        for a, b in (points.flatten(1).float() * side / 255).tolist():
            b = side - b                                            # the second axis points up
            draw.ellipse((a - r, b - r, a + r, b + r), colour)
    modes, good = found(to_float(x))
    title = f"{cfg.loss}, R1" if cfg.r1 and cfg.loss == "gan" else cfg.loss
    data.write(draw, (6, 12), f"{title}, step {step}: {modes} of 8, {good:.0%}")
    return page


# ---- what was drawn ------------------------------------------------------------------------------

def between(z1, z2, t):
    """z1 + t (z2 - z1): interpolates for t in [0, 1], from z1 to z2; extrapolates for other t."""
    return z1 + t * (z2 - z1)


def interpolate(G, z, c, path):
    """Writes interpolation.png: for each pair z1, z2 in z (2 n, z), with its condition in c (n, K),
    a row of pictures G(z1 + i/9 (z2 - z1)) for i = 0 .. 9. At each end of a row, two extrapolated
    pictures are added and framed in red."""
    steps = range(-2, 12)
    t = torch.tensor(steps, device=z.device)[:, None] / 9               # (14, 1)
    rows = [sample(G, between(z1, z2, t), wanted.expand(14, -1))
            for z1, z2, wanted in zip(z[::2], z[1::2], c)]
    data.sheet(rows, path, top=[f"{i}/9" for i in steps], marks=[0, 1, 12, 13],
               title="z1 + i/9 (z2 - z1); red: beyond the pair")


def condition_grid(G, z, heads, classes, path):
    """Writes conditions.png: one row for each class, one column for each noise vector. For faces
    the rows are hair colours and the columns eye colours, all with one noise vector."""
    left, top, z = classes, (), z[:10]
    if classes == FACES:
        left, top, z = HAIR, EYES, z[:1].expand(11, -1)
    y = torch.arange(len(classes), device=z.device).view(len(left), -1)     # (K, 1) or (12, 11)
    rows = [sample(G, z, condition(wanted.expand(len(z)), heads)) for wanted in y]
    data.sheet(rows, path, left, top)


def parse_prompt(text):
    """A prompt, "blue hair green eyes" -> label 11 * hair + eyes. UserError lists valid colours."""
    face = " ".join(re.findall(r"\w+", text.lower().replace("grey", "gray")))
    need(face in FACES, f"cannot read {text!r}: write <colour> hair <colour> eyes; hair: "
         f"{' '.join(HAIR)}; eyes: {' '.join(EYES)}")
    return FACES.index(face)


def since(rows, holds):
    """The first logged step from which holds(row) stays true until the end; -1 if there are
    fewer than 3 such rows."""
    steps = []
    for row in rows:
        steps.append(row["step"])
        if not holds(row):
            steps = []
    return steps[0] if len(steps) >= 3 else -1


def is_collapsed(row):
    """Mode collapse: the spread of the fakes is less than a third of that of the real pictures."""
    return row["spread"] < 1 / 3


def is_dead(row):
    """Nothing moves any more: both gradients are shorter than 0.001."""
    return max(row["|dD|"], row["|dG|"]) < 1e-3


PANELS = [
    ("losses", ["D", "G"]),
    ("D on real and fake, before and after its update",
     ["D(x)", "D(G(z)) before", "D(G(z)) after"]),
    ("gradient norms", ["|dD|", "|dG|"]),
    ("spread, fake over real", ["spread"]),
    ("saturation", ["sat real", "sat fake"]),
    ("modes of 8", ["modes"]),
]


def evaluate(cfg, G, log, images, labels, classes, out, device):
    """Pictures, metrics and result.json of a run whose samples are drawn by G. With --prompt or
    --draw it only draws."""
    n = 8 if cfg.prompt else cfg.draw or max(cfg.samples, cfg.dump)
    z = draw_z(n, cfg, device)
    y = labels[torch.randint(len(labels), (n,))]            # classes as frequent as in the data
    if cfg.prompt:
        y[:] = parse_prompt(cfg.prompt)
    c = condition(y, cfg.heads).to(device)
    x = sample(G, z, c)
    if cfg.prompt:
        print("wrote", data.sheet([x], out / "prompt.png", title=cfg.prompt))
        return
    if cfg.draw:
        for i, picture in enumerate(x.expand(-1, 3, -1, -1), 1):
            data.save(data.as_image(picture), out / f"drawn/{i:05}.png")
        data.save(data.grid(x, 10), out / "drawn.png")
        print(f"wrote    {out}/drawn/00001.png ... {n:05}.png, and all on {out}/drawn.png")
        return
    if cfg.preset == "ring":                        # points: no pictures for a classifier
        modes, good = found(to_float(x))
        result = dict(modes=modes.item(), good=good.item())
        headline = f"{modes} of 8 modes, {good:.0%} good"
    else:
        interpolate(G, z[:12], c[:6], out / "interpolation.png")
        if cfg.heads:
            condition_grid(G, z, cfg.heads, classes, out / "conditions.png")
        if cfg.dump:
            data.save_array(out / "samples.npy", x[:cfg.dump].permute(0, 2, 3, 1))
            if cfg.heads:
                data.save_array(out / "labels.npy", y[:cfg.dump])
        x = x[:cfg.samples]
        y = y[:cfg.samples]
        net = fid.classifier(cfg.data, images.shape[-1], device)
        result = fid.against(net, images, x, cfg.data)          # FID, KID, precision, recall, floor
        headline = fid.line(result)
        if classes:         # count the classes of the samples, and compare with those asked for
            result |= fid.count(net, x, labels, classes, y if cfg.heads else None)
            headline += f"; {result['modes']} of {len(classes)} classes"
        if cfg.preset == "stacked":
            headline += f", KL {result['KL']:.3f}"
        for what in result:
            if what.endswith("accuracy"):
                headline += f"; {what} {result[what]:.1%}"
        for end, holds in ("collapsed at", is_collapsed), ("died at", is_dead):
            result[end] = since(log.rows, holds)
            if result[end] >= 0:
                headline += f"; {end} {result[end]}"
        test = data.load(cfg.data, images.shape[-1], "test")[0]
        result |= fid.neighbours(images, test, x, out / "neighbours.png")
        headline += fid.alarms(result)
    data.finish(out, cfg, log, result, PANELS, headline)


# ---- main ----------------------------------------------------------------------------------------

def check(cfg, changes):
    """UserError for settings that are out of bounds or do not go together."""
    data.at_least(1, cfg, *"z h d_steps penalty_every log_every sample_every".split())
    data.at_least(0, cfg, *"d_h clip gp r1 r2 d_lr beta1 beta2 ema steps dump draw".split())
    data.at_least(200, cfg, "samples")
    need(cfg.lr > 0, f"--lr {cfg.lr} must be positive")
    need(max(cfg.beta1, cfg.beta2, cfg.ema) < 1, "--beta1, --beta2 and --ema must be below 1")
    reads = LOSSES[cfg.loss][1]
    if "r1" in reads:
        reads = reads | {"penalty_every"}
    for name in set("r1 r2 penalty_every d_steps gp penalty clip".split()) - reads:
        need(name not in changes, f"--{name.replace('_', '-')} has no effect on --loss {cfg.loss}")
    need(cfg.loss != "wgan" or cfg.clip, "--loss wgan needs a --clip above 0")
    need(cfg.cond != "ac" or "heads" in reads, f"--cond ac trains D to predict classes, but --loss "
         f"{cfg.loss} cannot do this: add --cond planes, or use --loss acgan or r3gan")
    need(cfg.loss != "acgan" or cfg.cond == "ac", "--loss acgan needs --cond ac")
    points = cfg.preset == "ring"
    need((NETS[cfg.net][1] == 1) == points, "the networks ring and ring3 go with the preset ring")
    need(not points or not (cfg.draw or cfg.dump), "--draw and --dump are for pictures, not points")


def main(argv=None):
    """The command line."""
    presets = {name: config(name) for name in PRESETS}
    preset, changes = data.arguments(GANConfig, argv, presets, {"preset", "channels", "heads"})
    cfg = config(preset, **changes)
    check(cfg, changes)
    if cfg.prompt:
        parse_prompt(cfg.prompt)
    if cfg.prompt or cfg.draw:
        cfg.steps = 0
    data.meet(cfg.device)
    device = data.device(cfg.device)
    need(cfg.batch % data.WORLD == 0 and cfg.batch // data.WORLD >= 2,
         f"--batch {cfg.batch} must be a multiple of {data.WORLD}, the number of processes, and at "
         f"least {2 * data.WORLD}")
    out = data.run_folder(preset, cfg, changes, FREE)
    print(f"preset   {preset}  loss {cfg.loss}  changed: {changes or 'nothing'}")
    with data.rank_0_first():               # process 0 downloads or draws the data for the others
        side = NETS[cfg.net][1]
        cfg.data, images, labels, classes = data.choose(data.kept(cfg, out), side)
    need((cfg.data == "ring") == (preset == "ring"), "--data ring and the preset ring go together")
    need(len(images) >= 18, f"{cfg.data} has {len(images)} pictures to train on; give it 20 in all")
    cfg.channels = images.shape[1]
    if cfg.augment < 0:
        # In our tests augmentation made 10,000 drawn faces and MNIST worse.
        cfg.augment = int(cfg.loss == "r3gan" and len(images) < 10_000)
    cfg.heads = ()
    if cfg.cond != "none":
        need(classes, f"--cond {cfg.cond} needs classes and {cfg.data} has none: put the pictures "
             "into two sub-folders or more, one for each class")
        cfg.heads = (12, 11) if classes == FACES else (len(classes),)
    need(not cfg.prompt or len(cfg.heads) == 2, "--prompt needs a G that is trained on the hair "
         "and eyes of faces: text2img")
    if labels is None:
        labels = torch.zeros(len(images)).long()
    images = images.to(device)
    G, _, log = train(cfg, images, labels, out, device)
    if data.RANK > 0:
        return
    torch.manual_seed(cfg.seed)
    evaluate(cfg, G, log, images, labels, classes, out, device)


if __name__ == "__main__":
    data.run_main(main)
