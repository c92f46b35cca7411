"""gan.py: generative adversarial networks in one file: DCGAN, LSGAN, WGAN, conditions, penalties.

    python gan.py dcgan                                      digits from noise
    python gan.py emoji --modern 1                           as one would do it today
    python gan.py text2img --prompt "blue hair green eyes"   faces as asked, once it is trained
    torchrun --nproc-per-node 2 gan.py dcgan                 two processes share each batch

Two networks play (Goodfellow 2014, eq. 1):  min_G max_D E_x[log D(x)] + E_z[log(1 - D(G(z)))].
D tells real x from x_fake = G(z); G makes D err. Here D returns logits, whose sigmoid is eq. 1's
D(x), pictures are in [-1, 1], and a loss is what is MINIMISED, a mean over the batch.
Given a condition c (N, K), G reads z and c side by side; D sees c as K more planes of the picture,
or answers (N, 1 + K): column 0 is real or fake, the others name what is in the picture. Without a
condition c is (N, 0), and nothing is added anywhere. Read on in the order of the lecture: config,
networks, losses, restraints on D, experiments, the game, what was drawn.

Measured on MNIST and Apple's emojis, one thread of an AMD EPYC (Zen 5) beside other work, torch
2.13; FID on features of fid.py's classifier, n = 10000 (emojis: against 2,370 real ones); floor,
real against real, 0.055 (at 28 x 28 0.061) and 0.70 (emojis: at n = 1185):
    python gan.py dcgan                                FID 1.06, 1.01, 1.14 (seeds 0, 1, 2)
    python gan.py dcgan --lr 2e-4 --decay 0 --ema 0    4.63: the course's own setting
    python gan.py mlp                                  15.0, 14.4, 16.0 (seeds 0, 1, 2)
    python gan.py speedrun                             0.32 after 98 s on two idle threads
    python gan.py emoji --steps 20000                  20.8, recall 0: duplicates
    python gan.py emoji --steps 20000 --modern 1       6.0, recall 0.59
    python gan.py mnist28                              13.8, and no 0 among 10,000 digits
    python gan.py mnist28 --modern 1                   1.14, all ten; augmented 25.9
Two processes equal one only without batch norm, --gp and --augment (mlp --bn none): those use the
pictures and random numbers of their own process.
"""
import copy
import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import fid
from data import EYES, FACES, HAIR, need, to_float, to_uint8


# ---- config --------------------------------------------------------------------------------------

Optimiser = Literal["adam", "rmsprop", "sgd"]


@dataclass
class GANConfig:
    """What a run is. A field is a flag and its comment the flag's help, but for channels and heads,
    which come from the data."""
    preset: str = "dcgan"           # row of PRESETS
    modern: int = 0                 # 1: as one would do it today, MODERN over the preset
    data: str = "mnist,digits"      # data sets in order of preference, or a folder of pictures
    net: Literal["dcgan", "emoji", "anime", "mnist28", "mlp"] = "dcgan"     # networks, see below
    channels: int = 1               # of a picture
    heads: tuple = ()               # sizes of the condition's one-hots: (12, 11) for hair and eyes
    z: int = 16                     # dimension of the noise z
    h: int = 16                     # width of the networks
    d_h: int = 0                    # width of D; 0: the same
    noise: Literal["normal", "uniform", "uniform01"] = "normal"     # z: N(0, I), U(-1, 1), U(0, 1)
    init: Literal["normal", "default"] = "normal"   # weights: N(0, 0.02), or as torch draws them
    act: Literal["", "relu", "leaky", "selu"] = ""  # this activation everywhere
    bn: Literal["both", "G", "D", "none"] = "both"  # networks that keep their batch norm
    sn: Literal["none", "D", "both"] = "none"       # networks with spectral norm
    raw: int = 0                    # 1: pictures as 0..255, no tanh; then --bn none as well
    cond: Literal["none", "planes", "ac"] = "none"  # D sees the condition as planes, or names it
    loss: Literal["bce", "saturating", "lsgan", "wgan", "relativistic"] = "bce"     # row of LOSSES
    clip: float = 0.                # clip D's weights to [-clip, clip] after each D step
    gp: float = 0.                  # weight of the gradient penalty
    r1: float = 0.                  # gamma of the R1 penalty, on real pictures
    r2: float = 0.                  # gamma of the R2 penalty, the same on fakes
    penalty_every: int = 16         # steps from one R1 or R2 to the next; it multiplies them
    augment: int = 0                # 1: D sees all pictures with random colours and shifts
    d_steps: int = 1                # D steps a G step, each on new real pictures
    fresh: int = 0                  # 1: new noise in G's step (course B); 0: D's fakes (course A)
    g_opt: Optimiser = "adam"       # optimiser of G
    d_opt: Optimiser = "adam"       # optimiser of D
    lr: float = 2e-4                # learning rate
    d_lr: float = 0.                # learning rate of D; 0: the same
    beta1: float = 0.5              # Adam's first moment decay
    beta2: float = 0.999            # Adam's second moment decay
    decay: int = 0                  # 1: learning rates fall linearly to 0 over the second half
    ema: float = 0.                 # draw samples with an average of G's weights of this decay
    batch: int = 64                 # pictures a batch
    steps: int = 5000               # steps of G; 0: only evaluate the checkpoint
    seed: int = 0                   # seed of weights, batches and noise
    device: str = "auto"            # auto, cuda, mps, cpu
    amp: int = -1                   # bfloat16 autocast: 1 on, 0 off, -1 where the hardware has it
    log_every: int = 50             # steps between two lines of the log
    sample_every: int = 500         # steps between two sample grids and checkpoints
    samples: int = 10000            # pictures drawn for the metrics
    out: str = ""                   # folder of the run; empty: out/<preset>-<what differs>
    resume: int = 1                 # 0: delete the folder's earlier run and begin anew
    dump: int = 0                   # write so many samples to samples.npy (uint8, N H W C) as well
    prompt: str = ""                # text2img: only draw a row of "blue hair green eyes"


ANIME = dict(data="anime,faces-a", net="anime", channels=3, z=100, h=64, steps=2000,
             log_every=25, sample_every=250)
DCGAN = dict(lr=2e-3, decay=1, ema=.998)
MNIST28 = dict(net="mnist28", z=100, h=32, init="default")
PRESETS = {  # the fields that differ
    # Radford 2016, course A (its own setting: --lr 2e-4 --decay 0 --ema 0); and the best that two
    # minutes allow: R1 in place of D's batch norm
    "dcgan": DCGAN,
    "speedrun": dict(DCGAN, bn="G", r1=1., beta1=0., beta2=.99, steps=8000),
    # Goodfellow 2014; course A
    "mlp": dict(net="mlp", h=128, lr=1e-3, decay=1),
    # Mao 2017; courses B and C
    "emoji": dict(data="emoji-apple,faces-a", net="emoji", channels=3, z=100, h=32, d_h=64,
                  noise="uniform", loss="lsgan", init="default", fresh=1, lr=3e-4, batch=32),
    # Radford 2016, Arjovsky 2017, Odena 2017; course D
    "anime": ANIME,
    "wgan": dict(ANIME, loss="wgan", clip=.01, d_opt="rmsprop", d_steps=5, steps=600),
    "text2img": dict(ANIME, cond="ac", heads=(12, 11)),
    # Course E; and Gulrajani 2017, without batch norm in the critic (sec. 4)
    "mnist28": MNIST28,
    "cwgan": dict(MNIST28, data="fashion,digits", cond="planes", heads=(10,), loss="wgan", gp=10.,
                  bn="G", d_steps=5, lr=5e-4, beta1=0., beta2=.9, decay=1, steps=1500,
                  sample_every=250),
}
# What one would do today, on any preset's networks and data: Huang 2024, a relativistic loss with
# R1 and R2 in place of D's batch norm; and where pictures are few the augmentation of Zhao 2020.
MODERN = dict(loss="relativistic", r1=.3, r2=.3, penalty_every=4, gp=0., clip=0., bn="G",
              init="normal", d_steps=1, fresh=0, d_opt="adam", lr=5e-4, beta1=0., beta2=.99,
              decay=0, ema=.998)
# Fields that say how long and where, not what is trained: a resume may change them.
FREE = {"preset", "steps", "device", "amp", "log_every", "sample_every", "samples", "out", "resume",
        "dump", "prompt"}


# ---- networks: a function a system, made of nothing but torch ------------------------------------
# z: length of the noise; h: width; c: channels of a picture; out: how many numbers D answers. At
# the right stands the side of the picture behind a layer: of i pixels a convolution makes
# (i + 2p - k) // s + 1, a transposed one (i - 1) s - 2p + k.

def dcgan(z=16, h=16, c=1, out=1):
    """32 x 32 digits: G 57,937 and D 42,432 parameters."""
    G = nn.Sequential(
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
    """32 x 32 emojis: G 467,488 and D 262,048 parameters; the handout's D has h=64: 1,036,096.

    Upsampling before a convolution leaves no checkerboard. With Conv2d(z, 4 * h, 4, 1, 3), the
    handout's other first layer, G has 463,648. D's padding is P = ((D_y - 1) S + K - D_x) / 2,
    rounded up, for the sides 32, 16, 8, 4, 1: 2, 2, 2, 1."""
    G = nn.Sequential(
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
    """28 x 28 digits or clothes: G 1,098,816 and D 693,249 parameters. The slope is 0.02."""
    G = nn.Sequential(
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


def init(m):
    """Weights of deviation 0.02 around 0, Radford 2016 sec. 4; batch norm's around 1; biases
    stay as torch has them: G.apply(init)."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(m.weight, 0, .02)
    elif isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(m.weight, 1, .02)


NETS = {"dcgan": (dcgan, 32), "emoji": (emoji, 32), "anime": (anime, 64), "mnist28": (mnist28, 28),
        "mlp": (mlp, 32)}                                       # and the side of their pictures


# ---- noise and conditions ------------------------------------------------------------------------

def draw_z(n, cfg, device):
    """Noise z (n, z)."""
    if cfg.noise == "normal":
        return torch.randn(n, cfg.z, device=device)
    u = torch.rand(n, cfg.z, device=device)
    return 2 * u - 1 if cfg.noise == "uniform" else u


def condition(y, heads):
    """Labels (N,) -> what is asked for, c (N, K): a one-hot a head, side by side.

    heads: (12, 11) if a label is 11 * hair + eyes, then K = 23; (10,) for digits; () -> (N, 0)."""
    c = [torch.zeros(len(y), 0, device=y.device)]
    for part, k in zip(torch.unravel_index(y, heads), heads):
        c.append(F.one_hot(part, k).float())
    return torch.cat(c, 1)


def planes(x, c):
    """Pictures (N, C, S, S), conditions (N, K) -> (N, C + K, S, S): a constant plane a number."""
    c = c[..., None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, c], 1)


# ---- losses: real, fake (N,): D's answers to x and to G(z) ---------------------------------------
# To bce and saturating they are logits: D(x) is their sigmoid; elsewhere they are D(x) itself.

def d_bce(real, fake):
    """-E log D(x) - E log(1 - D(G(z))), Goodfellow 2014 eq. 1; 1.386 = 2 ln 2 at D = 1/2."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()       # -log sigmoid(t) = softplus(-t)


def g_bce(fake):
    """-E log D(G(z)): the log D trick, Goodfellow 2014 sec. 3; 0.693 = ln 2 at D = 1/2."""
    return F.softplus(-fake).mean()


def g_saturating(fake):
    """E log(1 - D(G(z))), Goodfellow 2014 eq. 1 as it stands: no gradient once D is sure."""
    return -F.softplus(fake).mean()


def d_lsgan(real, fake):
    """1/2 E (D(x) - 1)^2 + 1/2 E D(G(z))^2, Mao 2017 eq. 2; 0.25 at D = 1/2."""
    return ((real - 1) ** 2).mean() / 2 + (fake ** 2).mean() / 2


def g_lsgan(fake):
    """E (D(G(z)) - 1)^2, as the courses have it: Mao 2017 without the 1/2; 0.25 at D = 1/2."""
    return ((fake - 1) ** 2).mean()


def d_wgan(real, fake):
    """-E D(x) + E D(G(z)), Arjovsky 2017 eq. 2: minus this, over the greatest slope that
    clipping or penalty allow D, estimates the Wasserstein distance."""
    return fake.mean() - real.mean()


def g_wgan(fake):
    """-E D(G(z)), Arjovsky 2017 algorithm 1."""
    return -fake.mean()


def d_relativistic(real, fake):
    """-E log sigmoid(D(x) - D(G(z))), in pairs: Jolicoeur-Martineau 2018, Huang 2024 eq. 2; 0.693 =
    ln 2 where D(x) = D(G(z))."""
    return F.softplus(fake - real).mean()


def g_relativistic(real, fake):
    """-E log sigmoid(D(G(z)) - D(x)): the same with exchanged roles, so G's step needs D(x) too."""
    return F.softplus(real - fake).mean()


LOSSES = {"bce": (d_bce, g_bce), "saturating": (d_bce, g_saturating), "lsgan": (d_lsgan, g_lsgan),
          "wgan": (d_wgan, g_wgan), "relativistic": (d_relativistic, g_relativistic)}


def ac_loss(logits, c, heads):
    """-E log P(C = c | x), Odena 2017 eq. 3, from D's other logits (N, K) and one-hots c (N, K).

    heads: sizes of the softmaxes, (12, 11) for hair and eyes, (10,) for digits; a sum over them."""
    loss = 0.
    for answer, asked in zip(logits.split(heads, 1), c.split(heads, 1)):    # hair, then eyes
        loss += F.cross_entropy(answer, asked)
    return loss


# ---- restraints on D: clipping, penalties, spectral norm, augmentation ---------------------------
# D: samples (N, ...), pictures or vectors -> logits (N,), or the first column of (N, 1 + K).

@torch.no_grad()
def clip_weights(D, c):
    """w <- clip(w, -c, c), Arjovsky 2017 algorithm 1 line 7: bounds how steep D can be."""
    for p in D.parameters():
        p.clamp_(-c, c)


def gradient_penalty(D, x, x_fake):
    """E (|grad D(x_hat)|_2 - 1)^2 at x_hat = eps x + (1 - eps) x_fake, Gulrajani 2017 eq. 3.

    Traps: eps and eps do not interpolate; the norm instead of (norm - 1)^2 pulls D flat; batch norm
    in D makes a sample's gradient depend on the others."""
    eps = torch.rand(len(x), 1, device=x.device)                        # one a sample
    x_hat = eps * x.flatten(1) + (1 - eps) * x_fake.flatten(1)          # (N, d)
    x_hat = x_hat.detach().view(x.shape).requires_grad_()
    logits = D(x_hat).view(len(x), -1)[:, 0]
    (grad,) = torch.autograd.grad(logits.sum(), x_hat, create_graph=True)
    return ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()


def r1_penalty(D, x):
    """R1 = 1/2 E |grad D(x)|_2^2, Mescheder 2018 eq. 9; on fakes it is R2, eq. 10. Its weight is
    called gamma."""
    x = x.detach().requires_grad_()
    logits = D(x).view(len(x), -1)[:, 0]
    (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return (grad.flatten(1) ** 2).sum(1).mean() / 2


class SpectralNorm(nn.Module):
    """W -> W / sigma(W), sigma the largest singular value of W (out, rest); Miyato 2018, alg. 1.

    nn.utils.parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight)); one
    power iteration a pass while training: u and v, constants to autograd, follow the moving W.
    dim: where the outputs are, 0, or 1 in a transposed convolution."""

    def __init__(self, weight, dim=0):
        super().__init__()
        self.dim = dim
        W = self.matrix(weight)
        self.register_buffer("u", torch.randn(len(W)))
        self.register_buffer("v", torch.randn(len(W.T)))
        for _ in range(15):
            self.iterate(W)

    def matrix(self, weight):
        return weight.transpose(0, self.dim).flatten(1)             # (out, rest)

    @torch.no_grad()
    def iterate(self, W):
        self.v.copy_(F.normalize(W.T @ self.u, dim=0))              # v <- W^T u / |W^T u|
        self.u.copy_(F.normalize(W @ self.v, dim=0))                # u <- W v / |W v|

    def forward(self, weight):
        W = self.matrix(weight)
        with torch.autocast(W.device.type, enabled=False):          # bfloat16 is too coarse here
            if self.training:
                self.iterate(W)
            sigma = self.u.clone() @ W @ self.v.clone()             # u^T W v, of copies: the next
        return weight / sigma                                       # pass overwrites u and v


def diff_augment(x):
    """DiffAugment, Zhao 2020: each picture (N, C, S, S) with random colours and a shift of its own.

    D sees real and fake pictures only so and cannot learn a small set by heart; G's gradient passes
    through, so G is not taught the colours. lerp(a, b, w) = a + w (b - a)."""
    n = len(x)
    side = x.shape[-1]
    light, colour, contrast = torch.rand(3, n, 1, 1, 1, device=x.device)
    x = x + light - .5                                                  # brightness: -0.5 .. 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * colour)              # saturation: times 0 .. 2
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, .5 + contrast)   # contrast: 0.5 .. 1.5
    s = side // 8
    x = F.pad(x, [s] * 4)                                               # (N, C, S + 2 s, S + 2 s)
    corner = torch.randint(2 * s + 1, (2, n, 1), device=x.device)       # of the part that is kept
    rows, columns = corner + torch.arange(side, device=x.device)        # (N, S) each
    x = x.take_along_dim(rows[:, None, :, None], 2)
    return x.take_along_dim(columns[:, None, None], 3)


# ---- experiments: surgery on the networks --------------------------------------------------------

def swap(net, kinds, make):
    """Replace layers: swap(D, nn.BatchNorm2d, nn.Identity) takes D's batch norm out."""
    for i, layer in enumerate(net):
        if isinstance(layer, kinds):
            net[i] = make()


class Rescale(nn.Module):
    """x -> scale x + shift."""

    def __init__(self, scale, shift):
        super().__init__()
        self.scale = scale
        self.shift = shift

    def forward(self, x):
        return self.scale * x + self.shift


def spectral_norm(net):
    """Put W / sigma(W) for the weight W of each convolution and linear layer."""
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            dim = int(isinstance(layer, nn.ConvTranspose2d))
            nn.utils.parametrize.register_parametrization(layer, "weight",
                                                          SpectralNorm(layer.weight, dim))


BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d
ACTIVATIONS = {"relu": nn.ReLU, "leaky": partial(nn.LeakyReLU, .2), "selu": nn.SELU}


def networks(cfg):
    """(G, D) of a config, freshly initialised.

    G: z and a condition of length K, (N, z + K) -> pictures (N, C, S, S) in [-1, 1]. D: pictures,
    (N, C + K, S, S) if it sees the condition -> logits (N, 1), (N, 1 + K) if it names it."""
    make, _ = NETS[cfg.net]
    K = 0 if cfg.cond == "none" else sum(cfg.heads)
    seen = K if cfg.cond == "planes" else 0
    named = K if cfg.cond == "ac" else 0
    G, _ = make(cfg.z + K, cfg.h, cfg.channels)
    _, D = make(cfg.z, cfg.d_h or cfg.h, cfg.channels + seen, 1 + named)
    for name, net in ("G", G), ("D", D):
        if cfg.init == "normal":
            net.apply(init)
        if cfg.bn not in ("both", name):
            swap(net, BATCH_NORMS, nn.Identity)
        if cfg.act:
            swap(net, (nn.ReLU, nn.LeakyReLU), ACTIVATIONS[cfg.act])
        if cfg.sn in ("both", name):
            spectral_norm(net)
    if cfg.raw:                                     # inside of both networks a picture is 0 .. 255
        swap(G, nn.Tanh, partial(Rescale, 1 / 127.5, -1))
        D.insert(0, Rescale(127.5, 127.5))
    return G, D


def config(preset, modern=0, **changes):
    """The GANConfig of a preset; modern=1 puts MODERN over it, and changes win over both. Presets
    for colour sets, of a few thousand pictures, are augmented; those for 60,000 digits lose by
    it."""
    fields = dict(PRESETS[preset])
    if modern:
        fields |= dict(MODERN, augment=int("channels" in fields))
    return GANConfig(preset, modern, **fields | changes)


def build(preset, **changes):
    """(G, D) of a preset with some fields changed, e.g. build("dcgan", z=100, h=100)."""
    return networks(config(preset, **changes))


# ---- the game ------------------------------------------------------------------------------------

def judge(D, c, cfg, x):
    """D(x | c): pictures x (N, C, S, S), conditions c (N, K) -> logits (N, 1 + K): real or fake,
    then, of an auxiliary classifier, what is in the picture; else (N, 1)."""
    if cfg.augment:
        x = diff_augment(x)
    if cfg.cond == "planes":
        x = planes(x, c)
    return D(x).float()


def optimiser(kind, net, lr, cfg):
    """Adam, RMSprop or SGD over a network; under torchrun with gradients averaged over ranks."""
    make = {"adam": partial(torch.optim.Adam, betas=(cfg.beta1, cfg.beta2), fused=True),
            "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}[kind]
    return data.over_ranks(make(net.parameters(), lr))


@torch.no_grad()
def average(G_ema, G, decay):
    """theta_ema <- decay theta_ema + (1 - decay) theta, of all weights in one call."""
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - decay)


@torch.no_grad()
def refresh(G, conditions, cfg, device):
    """Recompute G's batch-norm statistics from 40 batches: those copied from the trained G do not
    fit averaged weights."""
    for m in G.modules():
        if isinstance(m, BATCH_NORMS):
            m.reset_running_stats()
            m.momentum = None                           # torch: a plain mean over all batches
    for _ in range(40):
        i = torch.randint(len(conditions), (250,), device=device)
        G(torch.cat([draw_z(250, cfg, device), conditions[i]], 1))


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
    x = (x.clamp(-1, 1) + 1) / 2
    high = x.amax(1)
    return ((high - x.amin(1)) / high.clamp(min=1e-3)).mean()


def spread(x):
    """Standard deviation of a pixel over the batch, mean over pixels: 0 when pictures are alike."""
    return x.std(0).mean()


def train(cfg, images, labels, out, device):
    """The whole game, from out/last.pt if there is one. Returns (G_ema, D, log).

    images uint8 (n, C, S, S), labels (n,), on the device; writes grids, log.csv and last.pt. Under
    torchrun all ranks draw one batch and each takes its share of it."""
    torch.manual_seed(cfg.seed)
    G, D = (data.place(net, device) for net in networks(cfg))
    G_ema = copy.deepcopy(G) if cfg.ema else G          # the one that draws the samples
    d_lr = cfg.d_lr or cfg.lr
    opt_G = optimiser(cfg.g_opt, G, cfg.lr, cfg)
    opt_D = optimiser(cfg.d_opt, D, d_lr, cfg)
    d_loss, g_loss = LOSSES[cfg.loss]
    conditions = condition(labels, cfg.heads)           # (n, K)
    fixed_z = draw_z(64, cfg, device)
    fixed_c = conditions[torch.randint(len(images), (64,), device=device)]
    log = data.Log(out, cfg.steps)
    parts = dict(G=G, G_ema=G_ema, D=D, opt_G=opt_G, opt_D=opt_D, log=log)
    start = data.restore(parts, out / "last.pt", cfg, FREE, device)
    if start < cfg.steps:                               # samples of the network as it was
        for name in ("samples.npy", "labels.npy"):
            (out / name).unlink(missing_ok=True)
    share = slice(data.RANK, None, data.WORLD)          # every WORLD-th picture
    amp = data.autocast(cfg.amp, device)

    for step in range(start + 1, cfg.steps + 1):
        # What a step draws depends on nothing else: a resumed run is the uninterrupted one.
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        if cfg.decay:
            rate = min(1., 2 - 2 * (step - 1) / cfg.steps)
            opt_G.param_groups[0]["lr"] = cfg.lr * rate
            opt_D.param_groups[0]["lr"] = d_lr * rate

        # ---- D: raise D(x), lower D(G(z)) ----
        for _ in range(cfg.d_steps):
            i = torch.randint(len(images), (cfg.batch,), device=device)[share]
            x, c = to_float(images[i]), conditions[i]                   # (N, C, S, S), (N, K)
            z = draw_z(cfg.batch, cfg, device)[share]                   # (N, z)
            D_c = partial(judge, D, c, cfg)             # D(. | c): pictures -> logits (N, 1 + K)
            with amp:
                x_fake = G(torch.cat([z, c], 1)).float()                # (N, C, S, S)
                real = D_c(x)                           # a pass of its own, for batch norm
                fake = D_c(x_fake.detach())             # detach: D's loss must not reach into G
            loss_D = d_loss(real[:, 0], fake[:, 0])
            if cfg.cond == "ac":                        # D learns classes from real pictures only
                loss_D += ac_loss(real[:, 1:], c, cfg.heads)
            if cfg.gp:
                loss_D += cfg.gp * gradient_penalty(D_c, x, x_fake)
            if step % cfg.penalty_every == 0:           # lazily: Karras 2020, appendix B
                if cfg.r1:
                    loss_D += cfg.penalty_every * cfg.r1 * r1_penalty(D_c, x)
                if cfg.r2:
                    loss_D += cfg.penalty_every * cfg.r2 * r1_penalty(D_c, x_fake)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()
            if cfg.clip:
                clip_weights(D, cfg.clip)

        # ---- G: raise D(G(z)) on the same fakes, against the D just improved ----
        D.requires_grad_(False)                         # D's own gradients are not needed here
        with amp:
            if cfg.fresh:
                z = draw_z(cfg.batch, cfg, device)[share]
                x_fake = G(torch.cat([z, c], 1)).float()
            after = D_c(x_fake)
            if cfg.loss == "relativistic":              # D has moved, so D(x) anew
                game = g_loss(D_c(x)[:, 0], after[:, 0])
            else:
                game = g_loss(after[:, 0])
        loss_G = game
        if cfg.cond == "ac":                            # a fake should be named what was asked for
            loss_G = game + ac_loss(after[:, 1:], c, cfg.heads)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        D.requires_grad_(True)
        if cfg.ema:
            average(G_ema, G, cfg.ema)

        if step % cfg.log_every == 0 or step in (1, cfg.steps):     # only this waits for the GPU
            scores = torch.stack([real, fake, after])[:, :, 0]          # (3, N)
            if d_loss is d_bce:
                scores = scores.sigmoid()               # probabilities
            d_real, d_before, d_after = scores.mean(1)
            row = {"D": d_loss(real[:, 0], fake[:, 0]), "G": game,          # the game's own terms
                   "D(x)": d_real, "D(G(z)) before": d_before, "D(G(z)) after": d_after,
                   "|dD|": data.grad_norm(D), "|dG|": data.grad_norm(G),
                   "spread": spread(x_fake) / spread(x).clamp(min=1e-6)}
            if cfg.channels == 3:
                row |= {"sat real": saturation(x), "sat fake": saturation(x_fake)}
            if cfg.loss == "wgan":
                row["W"] = d_real - d_before
            log.write(step, cfg.batch, **row)
        if step % cfg.sample_every == 0 or step in (1, cfg.steps):
            if cfg.ema:
                refresh(G_ema, conditions, cfg, device)
            data.save(data.grid(sample(G_ema, fixed_z, fixed_c), 8), log.grid(step))
            data.save_checkpoint(out / "last.pt", parts, step, cfg)
    return G_ema, D, log


# ---- what was drawn ------------------------------------------------------------------------------

def between(z1, z2, t):
    """z1 + t (z2 - z1): z1 at t = 0, z2 at t = 1, and beyond them outside of [0, 1]."""
    return z1 + t * (z2 - z1)


def interpolate(G, z, c, path):
    """A row G(z1 + i/9 (z2 - z1)) of each pair in z (2 n, z), with its condition in c (n, K): i = 0
    .. 9, and two more beyond each end, framed red."""
    steps = range(-2, 12)
    t = torch.tensor(steps, device=z.device)[:, None] / 9               # (14, 1)
    rows = [sample(G, between(z1, z2, t), asked.expand(14, -1))
            for z1, z2, asked in zip(z[::2], z[1::2], c)]
    data.sheet(rows, path, top=[f"{i}/9" for i in steps], marks=[0, 1, 12, 13],
               title="z1 + i/9 (z2 - z1); red: beyond the pair")


def condition_grid(G, z, heads, classes, path):
    """What the condition does: a class a row, a z a column; of faces hair by eyes, all at one z."""
    y = torch.arange(len(classes), device=z.device)
    if classes == FACES:
        y = y.view(12, 11)
        z = z[:1].expand(11, -1)
        left = HAIR
        top = EYES
    else:
        y = y[:, None].expand(-1, 10)                   # (K, 10)
        z = z[:10]
        left = classes
        top = ()
    rows = [sample(G, z, condition(asked, heads)) for asked in y]
    data.sheet(rows, path, left, top)


def parse_prompt(text):
    """A prompt, "blue hair green eyes" -> label 11 * hair + eyes; else a UserError names them."""
    face = " ".join(re.findall(r"\w+", text.lower().replace("grey", "gray")))
    need(face in FACES, f"cannot read {text!r}: write <colour> hair <colour> eyes; hair: "
         f"{' '.join(HAIR)}; eyes: {' '.join(EYES)}")
    return FACES.index(face)


def since(rows, sick):
    """The first logged step from which sick(row) holds to the end, for 3 rows at least; or -1."""
    steps = []
    for row in rows:
        steps.append(int(row["step"]))
        if not sick(row):
            steps = []
    return steps[0] if len(steps) >= 3 else -1


def is_collapsed(row):
    """Samples alike: a pixel of the fakes varies less than a third as much as one of the data."""
    return row["spread"] < 1 / 3


def is_dead(row):
    """Nothing moves any more: both gradients are shorter than 0.001."""
    return row["|dD|"] < 1e-3 and row["|dG|"] < 1e-3


PANELS = [
    ("losses", ["D", "G"]),
    ("D on real and fake, before and after its step", ["D(x)", "D(G(z)) before", "D(G(z)) after"]),
    ("gradient norms", ["|dD|", "|dG|"]),
    ("spread, fake over real", ["spread"]),
    ("saturation", ["sat real", "sat fake"]),
    ("W = E D(x) - E D(G(z))", ["W"]),
]


def evaluate(cfg, G, D, log, source, out, device):
    """Pictures, metrics and result.json of a run whose samples are drawn by G."""
    images, labels, classes = source
    torch.manual_seed(cfg.seed)
    n = max(cfg.samples, cfg.dump)
    z = draw_z(n, cfg, device)
    y = labels[torch.randint(len(labels), (n,), device=device)]     # as frequent as in the data
    if cfg.prompt:
        y[:8] = parse_prompt(cfg.prompt)
        x = sample(G, z[:8], condition(y[:8], cfg.heads))
        print("wrote", data.sheet([x], out / "prompt.png", title=cfg.prompt))
        return
    c = condition(y, cfg.heads)
    interpolate(G, z[:12], c[:6], out / "interpolation.png")
    if cfg.heads:
        condition_grid(G, z, cfg.heads, classes, out / "conditions.png")
    x = sample(G, z, c)
    y = y.cpu()
    if cfg.dump:
        data.save_array(out / "samples.npy", x[:cfg.dump].permute(0, 2, 3, 1))
        if cfg.heads:
            data.save_array(out / "labels.npy", y[:cfg.dump])
    net = fid.classifier(cfg.data, images.shape[-1], device)
    result = fid.against(net, images, x, cfg.data)              # FID, KID, precision, recall, floor
    headline = fid.line(result)
    if classes:                                                 # which, how often, as asked for?
        result |= fid.count(net, x, labels.cpu(), classes, y if cfg.heads else None)
        headline += f"; {result['modes']} of {len(classes)} classes"
    for what in result:
        if what.endswith("accuracy"):
            headline += f"; {what} {result[what]:.1%}"
    for end, sick in ("collapsed at", is_collapsed), ("died at", is_dead):
        result[end] = since(log.rows, sick)
        if result[end] >= 0:
            headline += f"; {end} {result[end]}"
    data.finish(out, cfg, log, dict(G=G, D=D), result, PANELS, headline)


# ---- main ----------------------------------------------------------------------------------------

def main(argv=None):
    """The command line."""
    preset, changes = data.arguments(GANConfig, argv, {name: config(name) for name in PRESETS},
                                      hide={"preset", "channels", "heads"})
    cfg = config(preset, **changes)
    data.at_least(1, cfg, "z", "h", "d_steps", "penalty_every", "log_every", "sample_every")
    data.at_least(0, cfg, "d_h", "clip", "gp", "r1", "r2", "d_lr", "beta1", "beta2", "ema", "steps",
                  "dump")
    data.at_least(200, cfg, "samples")
    need(cfg.lr > 0, f"--lr {cfg.lr} must be positive")
    need(max(cfg.beta1, cfg.beta2, cfg.ema) < 1, "--beta1, --beta2 and --ema must be below 1")
    if cfg.prompt:
        parse_prompt(cfg.prompt)
        cfg.steps = 0
    data.meet(cfg.device)
    device = data.device(cfg.device)
    need(cfg.batch % data.WORLD == 0 and cfg.batch // data.WORLD >= 2,
         f"--batch {cfg.batch} must be 2 or more pictures for each of {data.WORLD} process(es)")
    out = data.run_folder(cfg.preset, cfg, changes, FREE)
    with data.rank_0_first():                           # it downloads or draws for the others
        cfg.data, images, labels, classes = data.choose(data.kept(cfg, out), NETS[cfg.net][1])
    need(len(images) >= 18, f"{cfg.data} has {len(images)} picture(s) to train on; give it 20")
    cfg.channels = images.shape[1]
    cfg.heads = ()
    if cfg.cond != "none":
        need(classes, f"--cond {cfg.cond} needs classes and {cfg.data} has none: put the pictures "
             "into two sub-folders or more, one a class")
        cfg.heads = (12, 11) if classes == FACES else (len(classes),)
    need(not cfg.prompt or len(cfg.heads) == 2, "--prompt belongs to text2img on faces")
    if labels is None:
        labels = torch.zeros(len(images)).long()
    images = images.to(device)
    labels = labels.to(device)
    G, D, log = train(cfg, images, labels, out, device)
    if data.RANK == 0:
        evaluate(cfg, G, D, log, (images, labels, classes), out, device)


if __name__ == "__main__":
    data.run_main(main)
