"""gan.py: generative adversarial networks in one file: DCGAN, LSGAN, WGAN, hinge; conditions; regularisers.

    python gan.py dcgan                                   digits from noise, MNIST or digits drawn here
    python gan.py text2img --resume 1 --steps 0 --prompt "blue hair green eyes"

Two networks play (Goodfellow 2014, eq. 1):  min_G max_D  E_x[log D(x)] + E_z[log(1 - D(G(z)))].
D tells real x from x_fake = G(z); G makes D err. Here D returns logits, D(x) in the papers is sigmoid(logit), and every
loss below is what is MINIMISED, averaged over the batch. Read on in the order of a lecture: config and presets,
networks, losses, regularisers, one training loop, evaluation.

Measured with torch 2.13 on ONE thread of an AMD EPYC (Zen 5), bfloat16, other work beside it; FID on features of fid.py's
classifier, n = 10000, the real-vs-real floor in brackets; seeds 0, 1, 2 where there are three numbers, else 0:
    dcgan                               MNIST, 2.4 min: FID 1.71, 2.28, 2.47 (0.04); float32 1.70, 2.36, 2.05
    speedrun                            0.40, 0.38, 0.42 (46 steps/s on 2 idle cores: 2.5 min);  --steps 17500: 0.27, 0.32, 0.29 (6.3 min)
    course                              the course's setting, --steps 7000: 2.56, 3.85, 3.48;  --steps 17500: 1.66, 2.14, 1.83
    cwgan --steps 1200                  Fashion-MNIST: 80.7% of the clothes are what was asked for, FID 2.25 (0.02)
    text2img --steps 1800               anime faces: hair 88%, eyes 79% as asked
    text2img --data faces-a --steps 1900    drawn faces: hair 100%, eyes 97%
"""
import copy, dataclasses, re, sys, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import fid
from data import UserError, to_float, to_uint8


@dataclass
class Config:
    preset: str = "dcgan"           # row of PRESETS
    data: str = "mnist,digits"      # data sets in order of preference, or a folder of pictures
    net: str = "dcgan"              # table of NETS
    size: int = 32                  # picture side in pixels
    channels: int = 1               # 1 grey, 3 colour; a run takes it from its data
    z: int = 16                     # dimension of the noise z
    h: int = 16                     # width of the networks
    noise: str = "normal"           # law of z: normal, uniform (-1, 1), uniform01
    act: str = ""                   # one activation everywhere: relu, leaky, selu; empty: the table's own
    bn: str = "both"                # networks that keep their batch norm: both, G, D, none
    raw: int = 0                    # 1: pictures as 0..255, no tanh, no batch norm (the bad example)
    loss: str = "bce"               # bce, saturating, lsgan, wgan, hinge
    clip: float = 0.0               # clip D's weights to [-clip, clip] after each D step
    gp: float = 0.0                 # weight of the gradient penalty
    r1: float = 0.0                 # gamma of the R1 penalty
    r1_every: int = 8               # G steps between two R1 penalties, each then counted that many times
    sn: int = 0                     # 1: spectral norm in D
    cond: str = "none"              # condition: none, planes (one-hot to z and as image planes), ac (auxiliary classifier)
    classes: int = 0                # classes of the condition (132: 12 hair x 11 eye colours); a run takes it from its data
    ac: float = 1.0                 # weight of the auxiliary classifier's loss
    d_steps: int = 1                # D steps a G step, each on new real pictures
    g_opt: str = "adam"             # optimiser of G: adam, rmsprop, sgd
    d_opt: str = "adam"             # optimiser of D: adam, rmsprop, sgd
    lr: float = 1e-3                # learning rate of G
    d_lr: float = 0.0               # learning rate of D; 0: that of G
    beta1: float = 0.5              # Adam's first moment decay
    beta2: float = 0.999            # Adam's second moment decay
    decay: int = 1                  # 1: learning rates fall linearly to 0 over the second half
    ema: float = 0.0                # sample from an average of G's weights with this decay; 0: from G itself
    batch: int = 64                 # pictures a batch
    steps: int = 5000               # generator steps; 0: evaluate only
    seed: int = 0                   # seed of weights, batches and noise
    device: str = "auto"            # auto, cuda, mps, cpu
    amp: int = -1                   # bfloat16 autocast: 1 on, 0 off, -1 where the hardware has it
    graph: int = 0                  # 1: replay each step as one CUDA graph (one GPU, Adam; tested without a GPU only)
    samples: int = 10000            # pictures drawn for the metrics
    show: str = "all"               # what to evaluate: all, metrics, interp, dump
    log_every: int = 50             # steps between two lines of the log
    sample_every: int = 500         # steps between two sample grids and checkpoints
    out: str = ""                   # folder of the run; empty: out/<preset>-<what differs>
    resume: int = 0                 # 1: go on from the folder's checkpoint, if there is one
    overwrite: int = 0              # 1: replace the run in the folder
    dump: int = 0                   # write this many samples as samples.npy (uint8 N x H x W x C)
    prompt: str = ""                # text2img: "blue hair green eyes" gives a row of such faces


EMOJI = dict(data="emoji-apple,faces-a", net="emoji", channels=3, z=100, h=32, noise="uniform", loss="lsgan", lr=3e-4,
             decay=0, batch=32, steps=5000, sample_every=500)
ANIME = dict(data="anime,faces-a", net="anime", size=64, channels=3, z=100, h=64, lr=2e-4, decay=0, steps=2000,
             log_every=25, sample_every=250)
PRESETS = {  # name -> fields that differ                                  what it is, and where it comes from
    "dcgan": {},                                                         # DCGAN (Radford 2016) as a course's MNIST exercise,
    "course": dict(lr=2e-4, decay=0),                                    # ... with its own constant learning rate
    "speedrun": dict(bn="G", r1=1., r1_every=16, lr=2e-3, beta1=0., beta2=.99, ema=.998,     # ... as good as 2.5 minutes
                     steps=7000),                                        # allow; R1 (Mescheder 2018) instead of D's batch norm
    "mlp": dict(net="mlp", h=128),                                       # fully connected, as Goodfellow 2014
    "emoji": EMOJI,                                                      # least squares (Mao 2017) on emojis
    "anime": ANIME,                                                      # DCGAN at 64 x 64
    "wgan": dict(ANIME, loss="wgan", clip=.01, d_opt="rmsprop", d_steps=5, steps=600),    # Arjovsky 2017, algorithm 1
    "text2img": dict(ANIME, cond="ac", classes=132),                     # hair and eye colour; ACGAN (Odena 2017)
    "mnist28": dict(net="mnist28", size=28, z=100, h=32, lr=2e-4, decay=0),
    "cwgan": dict(net="mnist28", size=28, z=100, h=32, data="fashion,digits", cond="planes", classes=10, loss="wgan",
                  gp=10., bn="G", d_steps=5, lr=5e-4, beta1=0., beta2=.9, steps=1500,
                  sample_every=250),                                     # Gulrajani 2017; no BN in the critic (sec. 4)
    "cwgan-clip": dict(net="mnist28", size=28, z=100, h=32, data="fashion,digits", cond="planes", classes=10, loss="wgan",
                       clip=.01, d_opt="rmsprop", d_steps=5, lr=2e-4, decay=0, steps=3000),
}
# Fields that say where and how long, not what is trained: they neither name the folder nor forbid a resume.
FREE = {"preset", "steps", "device", "amp", "graph", "samples", "show", "log_every", "sample_every", "out", "resume", "overwrite", "dump",
        "prompt"}


# ---- networks ------------------------------------------------------------------------------------------------------
# One line a layer: kind, channels (h: width, c: picture channels, 1: the logit), kernel, stride, padding, then what
# follows it. `up` is nearest upsampling x 2 and a convolution. Sizes: ConvT (i - 1) s - 2p + k; Conv (i + 2p - k) / s + 1.
NETS = {
    "dcgan": dict(size=32, bias_G=True, G="""
        convT 4h 4 1 0 bn relu      # 1 -> 4
        convT 2h 4 2 1 bn relu      # 8
        convT  h 4 2 1 bn relu      # 16
        convT  c 4 2 1 tanh         # 32""", D="""
        conv  h 4 2 1 leaky         # 32 -> 16
        conv 2h 4 2 1 bn leaky      # 8
        conv 4h 4 2 1 bn leaky      # 4
        conv  1 4 1 0               # 1: the logit"""),
    # P = ((D_y - 1) S + K - D_x) / 2, rounded up, for 32 -> 16 -> 8 -> 4 -> 1: paddings 2, 2, 2, 1
    "emoji": dict(size=32, G="""
        conv 64h 1 1 0 bn relu view # (2048, 1, 1) read as (128, 4, 4)
        up   2h 5 1 2 bn relu       # 8
        up    h 5 1 2 bn relu       # 16
        up    c 5 1 2 tanh          # 32""", D="""
        conv  h 5 2 2 bn relu       # 16
        conv 2h 5 2 2 bn relu       # 8
        conv 4h 5 2 2 bn relu       # 4
        conv  1 5 2 1               # 1"""),
    "anime": dict(size=64, G="""
        convT 8h 4 1 0 bn leaky     # 1 -> 4
        convT 4h 4 2 1 bn leaky     # 8
        convT 2h 4 2 1 bn leaky     # 16
        convT  h 4 2 1 bn leaky     # 32
        convT  c 4 2 1 tanh         # 64""", D="""
        conv  h 4 2 1 leaky         # 64 -> 32
        conv 2h 4 2 1 bn leaky      # 16
        conv 4h 4 2 1 bn leaky      # 8
        conv 8h 4 2 1 bn leaky      # 4
        conv  1 4 1 0               # 1"""),
    "mnist28": dict(size=28, bias_last=True, G="""
        convT 8h 4 2 1 bn relu      # 1 -> 2
        convT 4h 4 2 1 bn relu      # 4
        convT 2h 4 2 1 bn relu      # 8
        convT  h 4 2 1 bn relu      # 16
        convT  c 2 2 2 tanh         # 28""", D="""
        conv  h 2 2 2 leaky.02      # 28 -> 16
        conv 2h 4 2 1 bn leaky.02   # 8
        conv 4h 4 2 1 bn leaky      # 4
        conv 8h 4 2 1 bn leaky      # 2
        conv  1 4 2 1               # 1"""),
    "mlp": dict(size=0, bias_G=True, bias_D=True, G="""
        fc 2h bn relu
        fc 4h bn relu
        fc 8h bn relu
        fc  c tanh""", D="""
        fc 4h leaky
        fc 2h leaky
        fc  h leaky
        fc  1"""),
}
NETS["emoji-k4"] = dict(NETS["emoji"], G=NETS["emoji"]["G"].replace("conv 64h 1 1 0 bn relu view", "conv 4h 4 1 3 bn relu"))
ACTIVATIONS = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(.2), "leaky.02": lambda: nn.LeakyReLU(.02), "selu": nn.SELU,
               "tanh": nn.Tanh}


def stack(table, c_in, h, c, size, bias=False, bias_last=False, bn=True, act="", raw=False):
    """A table of NETS -> nn.Sequential. c_in: channels (fc: numbers) that go in; `c` and `1` in the
    table both stand for the argument c: picture channels in G, 1 (and the class logits) in D."""
    rows, layers = [line.split("#")[0].split() for line in table.strip().splitlines()], []
    for i, (kind, width, *rest) in enumerate(rows):
        c_out = c if width in ("c", "1") else int(width[:-1] or 1) * h
        b = bias or (bias_last and i == len(rows) - 1)
        if kind == "fc":
            c_out = c_out * size * size if width == "c" else c_out
            layers += ([nn.Flatten()] if i == 0 else []) + [nn.Linear(c_in, c_out, bias=b)]
        else:
            k, s, p = map(int, rest[:3])
            layers += [nn.Upsample(scale_factor=2)] if kind == "up" else []
            layers += [(nn.ConvTranspose2d if kind == "convT" else nn.Conv2d)(c_in, c_out, k, s, p, bias=b)]
        for word in rest if kind == "fc" else rest[3:]:
            if word == "bn":
                layers += [(nn.BatchNorm1d if kind == "fc" else nn.BatchNorm2d)(c_out)] if bn else []
            elif word == "view":
                layers, c_out = layers + [nn.Flatten(), nn.Unflatten(1, (c_out // 16, 4, 4))], c_out // 16
            elif word == "tanh":
                layers += [] if raw else [nn.Tanh()]
            else:
                layers += [ACTIVATIONS[act or word]()]
        c_in = c_out
    if kind == "fc" and width == "c":
        layers += [nn.Unflatten(1, (c, size, size))]
    return nn.Sequential(*layers)


class Generator(nn.Module):
    """z (N, z) and, when conditional, c (N, K) one-hot -> x_fake (N, channels, size, size) in [-1, 1]."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, z, c=None):
        z = z if c is None else torch.cat([z.flatten(1), c], 1)         # (N, z + K)
        return self.layers(z.view(len(z), -1, 1, 1))


class Discriminator(nn.Module):
    """x (N, channels, size, size) -> logits (N,). cond "planes": D(x, c); cond "ac": (logits (N,), class logits (N, K))."""

    def __init__(self, layers, cond):
        super().__init__()
        self.layers, self.cond = layers, cond

    def forward(self, x, c=None):
        if self.cond == "planes":                                       # each of the K numbers as a constant plane
            x = torch.cat([x, c[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        out = self.layers(x).flatten(1)                                 # (N, 1) or (N, 1 + K)
        return (out[:, 0], out[:, 1:]) if self.cond == "ac" else out[:, 0]


def init(m):
    """Convolutions from N(0, 0.02), Radford 2016 sec. 4; batch-norm gains from N(1, 0.02), their biases 0, as the course has it."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0, .02)
    elif isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
        nn.init.normal_(m.weight, 1, .02), nn.init.zeros_(m.bias)


def heads(classes):
    """Sizes of the softmaxes of a condition: (12, 11) for hair and eyes, (classes,) otherwise."""
    return (12, 11) if classes == 132 else (classes,)


def networks(cfg):
    """(G, D) of a Config, freshly initialised."""
    net = NETS[cfg.net]
    k = sum(heads(cfg.classes)) if cfg.cond != "none" else 0            # length of the condition
    common = dict(h=cfg.h, size=cfg.size, act=cfg.act, raw=bool(cfg.raw))
    G = stack(net["G"], cfg.z + k, c=cfg.channels, bias=net.get("bias_G", False), bn=cfg.bn in ("both", "G") and not cfg.raw,
              **common)
    c_in = (cfg.channels + (k if cfg.cond == "planes" else 0)) * (cfg.size ** 2 if cfg.net == "mlp" else 1)
    D = stack(net["D"], c_in, c=1 + (k if cfg.cond == "ac" else 0), bias=net.get("bias_D", False),
              bias_last=net.get("bias_last", False), bn=cfg.bn in ("both", "D") and not cfg.raw, **common)
    G, D = Generator(G).apply(init), Discriminator(D, cfg.cond).apply(init)
    if cfg.sn:
        for m in D.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.utils.parametrize.register_parametrization(m, "weight", SpectralNorm(m.weight))
    return G, D


def build(name, **changes):
    """(G, D) of a preset with some fields changed, e.g. build("dcgan", z=100, h=100)."""
    return networks(dataclasses.replace(Config(**{"preset": name, **PRESETS[name]}), **changes))


def one_hot(y, classes):
    """Labels (N,) -> condition c (N, K) float: one-hot; for 132 face classes hair (12) and eyes (11) side by side."""
    parts = (y // 11, y % 11) if classes == 132 else (y,)
    return torch.cat([F.one_hot(p, k) for p, k in zip(parts, heads(classes))], 1).float()


def draw_z(n, cfg, device, generator=None):
    """Noise z (n, z): N(0, I), uniform on (-1, 1), or uniform on (0, 1)."""
    if cfg.noise == "normal":
        return torch.randn(n, cfg.z, device=device, generator=generator)
    u = torch.rand(n, cfg.z, device=device, generator=generator)
    return u if cfg.noise == "uniform01" else 2 * u - 1


# ---- losses: real = D(x), fake = D(G(z)), both logits (N,); mean over the batch ----------------------------------------

def d_bce(real, fake):
    """-E log D(x) - E log(1 - D(G(z))), Goodfellow 2014 eq. 1; 1.386 = 2 ln 2 at D = 1/2."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()           # -log sigmoid(t) = softplus(-t)


def g_bce(fake):
    """-E log D(G(z)): the log D trick, Goodfellow 2014 sec. 3; 0.693 = ln 2 at D = 1/2. Strong gradient when D wins."""
    return F.softplus(-fake).mean()


def g_saturating(fake):
    """E log(1 - D(G(z))), Goodfellow 2014 eq. 1 as it stands; -0.693 at D = 1/2. Its gradient sigmoid(t) dies when D wins."""
    return -F.softplus(fake).mean()


def d_lsgan(real, fake):
    """1/2 E (D(x) - 1)^2 + 1/2 E D(G(z))^2, Mao 2017 eq. 2 with b = 1, a = 0; 0.25 at D = 1/2."""
    return ((real - 1) ** 2).mean() / 2 + (fake ** 2).mean() / 2


def g_lsgan(fake):
    """E (D(G(z)) - 1)^2, as the courses have it: Mao 2017 eq. 2 without its 1/2; 0.25 at D = 1/2."""
    return ((fake - 1) ** 2).mean()


def d_wgan(real, fake):
    """-E D(x) + E D(G(z)), Arjovsky 2017 eq. 2: minus this is the estimated Wasserstein distance (times D's Lipschitz bound)."""
    return fake.mean() - real.mean()


def g_wgan(fake):
    """-E D(G(z)), Arjovsky 2017 algorithm 1."""
    return -fake.mean()


def d_hinge(real, fake):
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))), Miyato 2018 eq. 16; 2 at D = 0. G's loss is g_wgan."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


LOSSES = {"bce": (d_bce, g_bce), "saturating": (d_bce, g_saturating), "lsgan": (d_lsgan, g_lsgan),
          "wgan": (d_wgan, g_wgan), "hinge": (d_hinge, g_wgan)}


def ac_loss(class_logits, y, classes):
    """-E log P(C = y | x), Odena 2017 eq. 3: cross entropy of raw logits (N, K), one softmax a head, summed over heads."""
    parts = (y // 11, y % 11) if classes == 132 else (y,)
    return sum(F.cross_entropy(l, p) for l, p in zip(class_logits.split(heads(classes), 1), parts))


# ---- regularisers --------------------------------------------------------------------------------------------------

def gradient_penalty(D, x, x_fake):
    """E (|grad D(x_hat)|_2 - 1)^2 at x_hat = eps x + (1 - eps) x_fake, Gulrajani 2017 eq. 3.

    D: images (N, C, H, W) -> logits (N,). One eps in [0, 1] an image. Traps: eps and eps instead of eps and 1 - eps does
    not interpolate; the norm instead of (norm - 1)^2 pulls D flat. With batch norm in D one image's gradient depends on
    the others, so the critic should have none (sec. 4)."""
    eps = torch.rand(len(x), 1, 1, 1, device=x.device)
    x_hat = (eps * x + (1 - eps) * x_fake).detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)       # sum: each image its own gradient
    return ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()


def r1_penalty(D, x):
    """1/2 E |grad D(x)|_2^2 on real images, Mescheder 2018 eq. 9; its weight is called gamma."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return (grad.flatten(1) ** 2).sum(1).mean() / 2


class SpectralNorm(nn.Module):
    """W -> W / sigma(W), sigma the largest singular value of W as a matrix (out, rest), Miyato 2018 algorithm 1.

    A parametrisation: torch.nn.utils.parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight)).
    One power iteration a forward pass in training mode: u and v follow the slowly moving W. Both count as constants."""

    def __init__(self, weight, iterations=15):
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(weight.shape[0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(weight[0].numel()), dim=0))
        self.iterate(weight, iterations)

    @torch.no_grad()
    def iterate(self, weight, times=1):
        """v <- W^T u / |W^T u|, u <- W v / |W v|, `times` times."""
        W = weight.flatten(1)
        for _ in range(times):
            self.v.copy_(F.normalize(W.T @ self.u, dim=0))
            self.u.copy_(F.normalize(W @ self.v, dim=0))

    def forward(self, weight):
        if self.training:
            self.iterate(weight)
        u, v = self.u.clone(), self.v.clone()       # clones: the next pass writes into u, v before this one's backward
        return weight / (u @ weight.flatten(1) @ v)                     # sigma = u^T W v


def clip_weights(D, c):
    """w <- clip(w, -c, c) for every parameter, Arjovsky 2017 algorithm 1 line 7: a crude bound on D's Lipschitz constant."""
    with torch.no_grad():
        for p in D.parameters():
            p.clamp_(-c, c)


# ---- averaged generator ----------------------------------------------------------------------------------------------

@torch.no_grad()
def average(G_ema, G, decay):
    """theta_ema <- decay theta_ema + (1 - decay) theta, over parameters; not over batch-norm statistics, see below."""
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - decay)


@torch.no_grad()
def recompute_statistics(G, cfg, device, batches=40):
    """Batch-norm means and variances of G for its own weights. Those of the last G, copied, spoil an averaged one."""
    norms = [m for m in G.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    generator = torch.Generator(device).manual_seed(cfg.seed)
    for m in norms:
        m.reset_running_stats()
        m.momentum = None                                               # a plain average over all batches
    G.train()
    for _ in range(batches if norms else 0):
        y = torch.randint(max(cfg.classes, 1), (250,), device=device, generator=generator)
        G(draw_z(250, cfg, device, generator), one_hot(y, cfg.classes) if cfg.cond != "none" else None)
    return G.eval()


# ---- training ------------------------------------------------------------------------------------------------------

def optimiser(kind, net, lr, cfg):
    """RMSprop, SGD or Adam (fused: one kernel for all tensors; in a graph step count and rate are tensors) over a network."""
    if kind == "adam":
        rate = torch.tensor(lr, device=next(net.parameters()).device) if cfg.graph else lr
        return torch.optim.Adam(net.parameters(), rate, (cfg.beta1, cfg.beta2), fused=True, capturable=bool(cfg.graph))
    return {"rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}[kind](net.parameters(), lr)


def set_lr(opt, lr):
    """Change an optimiser's learning rate: in place where it is a tensor, as a captured graph reads it."""
    group = opt.param_groups[0]
    group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr


def captured(turn, warm=3):
    """turn() as a CUDA graph: hundreds of small kernels replayed by one launch. The first `warm` calls run as they are.

    What turn() returns lives in the graph's own memory and is overwritten by the next call."""
    calls, graph, out, side = 0, torch.cuda.CUDAGraph(), None, torch.cuda.Stream()

    def call():
        nonlocal calls, out
        calls += 1
        if calls <= warm:                                               # on a side stream, as capture wants it
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = turn()
            torch.cuda.current_stream().wait_stream(side)
            return out
        if calls == warm + 1:
            with torch.cuda.graph(graph):                               # records, does not run
                out = turn()
        graph.replay()
        return out
    return call


def reduce_gradients(net, world):
    """Mean of the gradients over all ranks, as one message. By hand, since hooks on backward() miss the gradient penalty."""
    if world > 1:
        grads = gradients(net)
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.div_(world).split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def gradients(net):
    """The gradient tensors of a network."""
    return [p.grad for p in net.parameters() if p.grad is not None]


def grad_norm(grads):
    """L2 norm of gradients as one vector."""
    return torch.stack([g.norm() for g in grads]).norm()


def saturation(x):
    """Mean HSV saturation (max - min) / max over the channels of images (N, 3, H, W) in [-1, 1]."""
    x = (x.float() + 1) / 2
    return ((x.amax(1) - x.amin(1)) / x.amax(1).clamp(min=1e-3)).mean()


def spread(x):
    """Standard deviation of a pixel over the batch, averaged over pixels: near 0 when all images are alike."""
    return x.float().std(0).mean()


def decode(x, raw):
    """What G returns -> images in [-1, 1]."""
    return x / 127.5 - 1 if raw else x


@torch.no_grad()
def sample(G, n, cfg, device, y=None, z=None, seed=1):
    """n images uint8 (n, C, H, W) on the CPU from G as it is (call G.eval() first); z and labels y (n,) may be given."""
    generator, out = torch.Generator(device).manual_seed(seed), []
    z = draw_z(n, cfg, device, generator) if z is None else z
    for i in range(0, n, 500):
        c = None if cfg.cond == "none" else one_hot(y[i:i + 500].to(device), cfg.classes)
        out.append(to_uint8(decode(G(z[i:i + 500].to(device), c), cfg.raw)).cpu())
    return torch.cat(out)


def sampler(G, G_ema, cfg, device):
    """The network that samples are drawn from, in eval mode: a copy of the averaged G, or of G itself."""
    return recompute_statistics(copy.deepcopy(G_ema), cfg, device) if cfg.ema else copy.deepcopy(G).eval()


def fixed_labels(n, cfg):
    """Labels of the fixed sample grid: 0, 1, 2, ... in turn, the face classes in strides that mix hair and eyes."""
    return (torch.arange(n) * (13 if cfg.classes == 132 else 1)) % max(cfg.classes, 1)


def train(cfg, images, labels, out, device):
    """The whole training: from out/last.pt when cfg.resume, to cfg.steps. Returns (G, G_ema, D, step, log).

    images uint8 (N, C, H, W) and labels (N,) or None on the device; writes grids, log.csv and last.pt to out.
    Under torchrun every rank draws the same indices and noise and takes its share of the batch; rank 0 writes."""
    rank, world = data.ranks()
    share = slice(rank, None, world)
    torch.manual_seed(cfg.seed)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in networks(cfg))
    G_ema = copy.deepcopy(G).requires_grad_(False)
    opt_G, opt_D = optimiser(cfg.g_opt, G, cfg.lr, cfg), optimiser(cfg.d_opt, D, cfg.d_lr or cfg.lr, cfg)
    d_loss, g_loss = LOSSES[cfg.loss]
    parts = dict(G=G, G_ema=G_ema, D=D, opt_G=opt_G, opt_D=opt_D)
    start = 0
    if cfg.resume and (out / "last.pt").exists():
        start = data.restore(parts, out / "last.pt", cfg, FREE, device)
    log, stop = data.Log(out, cfg.steps, start, rank == 0), data.interrupts()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=data.use_bf16(cfg.amp, device))
    probability = torch.sigmoid if cfg.loss in ("bce", "saturating") else lambda t: t
    encode = (lambda x: x.float()) if cfg.raw else to_float
    fixed_z = draw_z(64, cfg, "cpu", torch.Generator().manual_seed(cfg.seed))
    broken = lambda step: UserError(f"a loss, gradient or weight is not finite, seen at step {step}; the last good checkpoint is "
                                    f"in {out}: try a lower --lr, --gp or --loss lsgan")
    mark, marked = time.monotonic(), start

    def turn(penalise):
        """One turn of the game: cfg.d_steps steps of D, one of G. The host waits for nothing here."""
        for k in range(cfg.d_steps):
            # ---- D: raise D(x), lower D(G(z)) ----
            i = torch.randint(len(images), (cfg.batch,), device=device)[share]
            x = encode(images[i]).contiguous(memory_format=torch.channels_last)      # (N, C, H, W)
            y = None if labels is None else labels[i]
            c = None if cfg.cond == "none" else one_hot(y, cfg.classes)
            with amp:
                with torch.set_grad_enabled(k == cfg.d_steps - 1):      # only the last fakes are G's to learn from
                    x_fake = G(draw_z(cfg.batch, cfg, device)[share], c)
                real, fake = D(x, c), D(x_fake.detach(), c)             # detach: D's loss must not reach into G;
            if cfg.cond == "ac":                                        # two passes: batch norm sees real and fake apart
                (real, real_class), (fake, _) = real, fake
            loss_D = d_loss(real.float(), fake.float())
            if cfg.cond == "ac":                                        # on real images and their labels only: fakes
                loss_D = loss_D + cfg.ac * ac_loss(real_class.float(), y, cfg.classes)    # would teach it G's mistakes
            logit = (lambda x: D(x, c)[0]) if cfg.cond == "ac" else (lambda x: D(x, c))
            if cfg.gp:
                loss_D = loss_D + cfg.gp * gradient_penalty(logit, x, x_fake.detach().float())
            if penalise:
                loss_D = loss_D + cfg.r1 * cfg.r1_every * r1_penalty(logit, x)
            opt_D.zero_grad()
            loss_D.backward()
            reduce_gradients(D, world)
            opt_D.step()
            if cfg.clip:
                clip_weights(D, cfg.clip)

        # ---- G: raise D(G(z)), on the same fakes, against the D just improved ----
        D.requires_grad_(False)                                         # D's own gradients are not needed here
        with amp:
            fake2 = D(x_fake, c)
        if cfg.cond == "ac":
            fake2, fake_class = fake2
        loss_G = g_loss(fake2.float())
        if cfg.cond == "ac":
            loss_G = loss_G + cfg.ac * ac_loss(fake_class.float(), y, cfg.classes)
        opt_G.zero_grad()
        loss_G.backward()
        reduce_gradients(G, world)
        opt_G.step()
        D.requires_grad_(True)
        if cfg.ema:
            average(G_ema, G, cfg.ema)
        return loss_D, loss_G, real, fake, fake2, x, x_fake, gradients(D), gradients(G)

    turns = {p: captured(lambda p=p: turn(p)) if cfg.graph else lambda p=p: turn(p) for p in (False, True)}
    for step in range(start + 1, cfg.steps + 1):
        if cfg.decay:
            factor = min(1., 2 * (1 - (step - 1) / cfg.steps))          # constant, then linearly to 0
            for opt, lr in ((opt_G, cfg.lr), (opt_D, cfg.d_lr or cfg.lr)):
                set_lr(opt, lr * factor)
        loss_D, loss_G, real, fake, fake2, x, x_fake, dD, dG = turns[bool(cfg.r1) and step % cfg.r1_every == 0]()

        if step % cfg.log_every == 0 or step in (1, cfg.steps):      # the only place that waits for the device
            with torch.no_grad():
                row = {"D": loss_D, "G": loss_G, "D(x)": probability(real.float()).mean(),
                       "z1": probability(fake.float()).mean(), "z2": probability(fake2.float()).mean(),
                       "|dD|": grad_norm(dD), "|dG|": grad_norm(dG),
                       "spread": spread(decode(x_fake, cfg.raw)) / spread(decode(x, cfg.raw)).clamp(min=1e-6)}
                if images.shape[1] == 3:
                    row |= {"sat real": saturation(decode(x, cfg.raw)), "sat fake": saturation(decode(x_fake, cfg.raw))}
                if cfg.loss == "wgan":
                    row["W"] = real.float().mean() - fake.float().mean()
                row = dict(zip(row, torch.stack([v.float() for v in row.values()]).tolist()))
            if not np.isfinite(list(row.values())).all():
                raise broken(step)
            log.write(step, (step - marked) * cfg.batch / (time.monotonic() - mark), **row)
            mark, marked = time.monotonic(), step
        halt = bool(stop)
        if world > 1 and step % cfg.log_every == 0:                     # all ranks stop together, asked where they wait anyway
            flag = torch.tensor(float(halt), device=device)
            dist.all_reduce(flag)
            halt = flag.item() > 0
        elif world > 1:
            halt = False
        last = step == cfg.steps or halt
        if rank == 0 and (last or step % cfg.sample_every == 0 or step == 1):
            grid = sample(sampler(G, G_ema, cfg, device), 64, cfg, device, fixed_labels(64, cfg), fixed_z)
            data.save(data.grid(grid, 8), out / f"{step:06d}.png")
            mark, marked = time.monotonic(), step
        if last or step % cfg.sample_every == 0:
            if not data.finite(G, D):                                   # never over the last good checkpoint
                raise broken(step)
            if rank == 0:
                data.save_checkpoint(out / "last.pt", dict({k: v.state_dict() for k, v in parts.items()}, step=step,
                                     config=dataclasses.asdict(cfg), rng=data.rng_state()))
        if halt:
            print(f"\nstopped at step {step}; the same command with --resume 1 goes on")
            raise KeyboardInterrupt
    data.plain_signals()
    return G, G_ema, D, max(start, cfg.steps), log


# ---- evaluation ----------------------------------------------------------------------------------------------------

def interpolate(G, cfg, device, path, pairs=6, K=9, extra=2):
    """G(z1 + i/K (z2 - z1)) for i = 0 .. K, and `extra` steps beyond both ends (framed red): one row a pair."""
    z = draw_z(2 * pairs, cfg, device, torch.Generator(device).manual_seed(cfg.seed + 2))
    t = torch.arange(-extra, K + extra + 1, device=device)[:, None] / K
    y = fixed_labels(pairs, cfg)
    rows = [sample(G, len(t), cfg, device, y[i].expand(len(t)), a + t * (b - a)) for i, (a, b) in enumerate(zip(z[::2], z[1::2]))]
    top = [f"{i}/{K}" for i in range(-extra, K + extra + 1)]
    marks = [*range(extra), *range(K + extra + 1, K + 2 * extra + 1)]
    return data.sheet(rows, path, top=top, marks=marks, title="z1 + i/K (z2 - z1); red: beyond the pair (extrapolation)")


def condition_grid(G, cfg, classes, device, path):
    """What the condition does: rows are classes (or hair colours), columns noise vectors (or eye colours at one z)."""
    if cfg.classes == 132:
        z = draw_z(1, cfg, device, torch.Generator(device).manual_seed(cfg.seed + 3)).expand(11, -1)
        rows = [sample(G, 11, cfg, device, 11 * i + torch.arange(11), z) for i in range(12)]
        return data.sheet(rows, path, left=data.HAIR, top=data.EYES, title="hair (rows) x eyes (columns), one z")
    z = draw_z(10, cfg, device, torch.Generator(device).manual_seed(cfg.seed + 3))
    rows = [sample(G, 10, cfg, device, torch.full((10,), i), z) for i in range(cfg.classes)]
    return data.sheet(rows, path, left=classes, top=[f"z{i}" for i in range(10)], title="one class a row, one z a column")


def parse_prompt(text):
    """"blue hair green eyes" -> class 11 * hair + eyes. UserError with the list of colours otherwise."""
    found = {k.rstrip("s"): v for v, k in re.findall(r"(\w+) +(hair|eyes?)\b", text.lower().replace("grey", "gray"))}
    if found.get("hair") not in data.HAIR or found.get("eye") not in data.EYES:
        raise UserError(f"cannot read {text!r}: write \"<colour> hair <colour> eyes\"; hair: {' '.join(data.HAIR)}; "
                        f"eyes: {' '.join(data.EYES)}")
    return 11 * data.HAIR.index(found["hair"]) + data.EYES.index(found["eye"])


def worst_pair(wanted, got, names):
    """The colour most often taken for another, in words: "green taken for blue 41% of the time"."""
    table = torch.zeros(len(names), len(names)).index_put_((wanted, got), torch.ones(len(wanted)), accumulate=True)
    share = table / table.sum(1, keepdim=True).clamp(min=1)
    share.fill_diagonal_(0)
    i, j = divmod(share.argmax().item(), len(names))
    return f"{names[i]} taken for {names[j]} {100 * share[i, j]:.0f}% of the time"


def chi2_bound(k):
    """The 95% point of chi-square with k degrees of freedom, Wilson & Hilferty 1931."""
    return k * (1 - 2 / (9 * k) + 1.645 * (2 / (9 * k)) ** .5) ** 3 if k else 0.


def collapsed_at(log):
    """The first logged step from which the fakes' spread stays under a third of the real images', or -1: never."""
    steps, low = log.table["step"], [s < 1 / 3 for s in log.table["spread"]]
    since = next((i for i in range(len(low)) if all(low[i:])), None)
    return -1 if since is None else int(steps[since])


def score(G, cfg, source, device):
    """FID and friends of cfg.samples images against the data. Returns (classifier, metrics, the images, their labels).

    Under torchrun every rank draws and looks at its share; rank 0 trains the classifier where there is none yet."""
    name, images, labels, _ = source
    net = data.first_rank(lambda: fid.classifier(name, cfg.size, device))
    shuffle = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    real = images.cpu()[shuffle][:cfg.samples]
    other = data.load(name, cfg.size, "test")[0]
    if len(other) < 1000:                                                # too few for a floor: two halves of the data
        real, other = real[:len(real) // 2], real[len(real) // 2:]
    y = None if cfg.cond == "none" else labels.cpu()[shuffle].repeat(-(-cfg.samples // len(labels)))[:cfg.samples]
    z = draw_z(cfg.samples, cfg, device, torch.Generator(device).manual_seed(1))      # conditions as frequent as in the data
    x = data.over_ranks(lambda i: sample(G, len(i), cfg, device, None if y is None else y[i], z[i]), torch.arange(cfg.samples))
    return net, fid.score(net, real, x, other), x, y


def metrics(scored, labels, classes, out):
    """What score() returned, with class counts and the accuracy of the condition. Returns a dict, draws the bars."""
    net, result, x, y = scored
    if labels is None:
        return result
    guess, sure = net.predict(x)
    true, n = labels.cpu(), len(classes)
    count, wanted = torch.bincount(guess, minlength=n) / len(x), torch.bincount(true, minlength=n) / len(true)
    result |= dict(confidence=sure.mean().item(), modes=int((count > 0).sum()), classes=n,
                   entropy=-(count[count > 0] * count[count > 0].log()).sum().item() / np.log(max(n, 2)),
                   rarest=count[wanted > 0].min().item())
    missing = [c for c, k, w in zip(classes, count, wanted) if k < w / 10]
    print(f"classes  {n - len(missing)} of {n} drawn; rarest {100 * result['rarest']:.1f}%, mean confidence "
          f"{result['confidence']:.3f}" + (f"; missing: {', '.join(missing[:8])}" if missing else ""))
    if n == 132:
        for j, (part, colours) in enumerate((("hair", data.HAIR), ("eyes", data.EYES))):
            pick = (lambda t: t // 11) if j == 0 else (lambda t: t % 11)
            share = lambda t: (torch.bincount(pick(t), minlength=len(colours)) / len(t)).tolist()
            data.bars(out / f"classes-{part}.png", colours, {"real": share(true), "generated": share(guess)},
                      f"{part}: share of {len(x):,} samples")
            if y is not None:
                result[f"{part} accuracy"] = (pick(guess) == pick(y)).float().mean().item()
                print(f"{part}     {100 * result[f'{part} accuracy']:.1f}% as asked (the classifier on real test images "
                      f"{100 * net.accuracy[j]:.1f}%); worst: {worst_pair(pick(y), pick(guess), colours)}")
    else:
        data.bars(out / "classes.png", classes, {"real": wanted.tolist(), "generated": count.tolist()},
                  f"share of {len(x):,} samples by class")
        expected = wanted * len(x)
        result["chi2"] = ((count * len(x) - expected) ** 2 / expected.clamp(min=1e-9))[wanted > 0].sum().item()
        result["missing in 80"] = n - len(guess[:80].unique())
        print(f"likely   chi2 {result['chi2']:,.0f} against the data's class shares (chance stays under {chi2_bound(n - 1):.0f}); "
              f"missing in the first 80 samples: {result['missing in 80']}")
        if y is not None:
            result["label accuracy"] = (guess == y).float().mean().item()
            print(f"labels   {100 * result['label accuracy']:.1f}% as asked; worst: {worst_pair(y, guess, classes)}")
    return result


PANELS = [("losses", ["D", "G"]), ("D of real, of fake before (z1) and after (z2) its step", ["D(x)", "z1", "z2"]),
          ("gradient norms", ["|dD|", "|dG|"]), ("spread of fakes over spread of real", ["spread"]),
          ("saturation", ["sat real", "sat fake"]), ("estimated Wasserstein distance", ["W"])]


def evaluate(cfg, G, D, step, log, source, scored, out, device):
    """Pictures, metrics, result.json of a run whose sampling network is G; source = (name, images, labels, classes)."""
    name, images, labels, classes = source
    if cfg.prompt:
        y = torch.tensor([parse_prompt(cfg.prompt)]).expand(8)
        data.sheet([sample(G, 8, cfg, device, y)], out / "prompt.png", title=cfg.prompt)
        return print(f"wrote {out / 'prompt.png'}: {cfg.prompt}")
    if cfg.dump:
        y = None if cfg.cond == "none" else torch.randint(cfg.classes, (cfg.dump,), generator=torch.Generator().manual_seed(1))
        arrays = {"samples.npy": sample(G, cfg.dump, cfg, device, y).permute(0, 2, 3, 1), "labels.npy": y}
        for file, array in arrays.items():
            if array is not None:
                with data.atomic(out / file) as part, open(part, "wb") as f:
                    np.save(f, array.contiguous().numpy())
        print(f"wrote    {out / 'samples.npy'} ({cfg.dump:,} samples)")
    if cfg.show == "dump":
        return
    wrote = [] if cfg.show == "metrics" else [interpolate(G, cfg, device, out / "interpolation.png")]
    if cfg.show == "interp":
        return print(f"wrote    {wrote[0]}")
    if log.table:
        grids = sorted(out.glob("[0-9]*.png"))
        wrote += [grids[-1], data.curves(out / "curves.png", log.table, PANELS), data.gif(out / "training.gif", grids)]
    if cfg.cond != "none":
        wrote.append(condition_grid(G, cfg, classes, device, out / "conditions.png"))
    result = metrics(scored, labels, classes, out)
    wrote += sorted(out.glob("classes*.png"))
    if log.table:
        result["collapsed at"] = collapsed_at(log)
    count = {"G": sum(p.numel() for p in G.parameters()), "D": sum(p.numel() for p in D.parameters())}
    headline = fid.line(result) + "".join(f"; {k} {100 * v:.1f}%" for k, v in result.items() if "accuracy" in k) + (
        f"; {result['modes']} of {result['classes']} classes, rarest {100 * result['rarest']:.1f}%" if "modes" in result else "")
    data.write_json(out / "result.json", dict(
        command=data.command(out, cfg.steps), preset=cfg.preset, config=dataclasses.asdict(cfg), step=step, device=str(device),
        versions=data.versions(), data=dict(name=name, n=len(images), sha256=data.fingerprint(images)), parameters=count,
        seconds=log.table["seconds"][-1] if log.table else 0.0, sampled_from="averaged G" if cfg.ema else "G, eval mode",
        images_per_second=(step * cfg.batch / log.table["seconds"][-1]) if log.table else 0.0, metrics=result, headline=headline))
    print("wrote    " + " ".join(str(p) for p in wrote + [out / "result.json"]))
    print(headline)


# ---- main ------------------------------------------------------------------------------------------------------------

def check(cfg):
    """Combinations that make no sense end here, in one line."""
    choices = dict(net=NETS, loss=LOSSES, noise=("normal", "uniform", "uniform01"), bn=("both", "G", "D", "none"),
                   act=("", "relu", "leaky", "selu"), cond=("none", "planes", "ac"), g_opt=("adam", "rmsprop", "sgd"),
                   d_opt=("adam", "rmsprop", "sgd"), show=("all", "metrics", "interp", "dump"))
    for field, known in choices.items():
        if getattr(cfg, field) not in known:
            raise UserError(f"--{field.replace('_', '-')} {getattr(cfg, field)} is unknown; one of: {' '.join(known)}")
    for field in ("z", "h", "d_steps", "log_every", "sample_every", "r1_every"):
        if getattr(cfg, field) < 1:
            raise UserError(f"--{field.replace('_', '-')} must be at least 1, not {getattr(cfg, field)}")
    for field in ("beta1", "beta2", "ema"):
        if not 0 <= getattr(cfg, field) < 1:
            raise UserError(f"--{field} must be in [0, 1), not {getattr(cfg, field)}")
    for field in ("steps", "clip", "gp", "r1", "dump", "d_lr"):
        if getattr(cfg, field) < 0:
            raise UserError(f"--{field.replace('_', '-')} must not be negative")
    if cfg.lr <= 0:
        raise UserError(f"--lr must be positive, not {cfg.lr}")
    if cfg.batch < 2:
        raise UserError(f"--batch {cfg.batch}: batch norm and the spread need at least 2 pictures")
    if cfg.samples < 200:
        raise UserError(f"--samples {cfg.samples}: a Gaussian of 128 features needs at least 200 pictures")
    if NETS[cfg.net]["size"] not in (0, cfg.size):
        raise UserError(f"--net {cfg.net} makes {NETS[cfg.net]['size']} x {NETS[cfg.net]['size']} pictures, not --size {cfg.size}")
    if cfg.net == "mlp" and cfg.cond == "planes":
        raise UserError("--cond planes needs a convolutional --net")
    if cfg.prompt:
        parse_prompt(cfg.prompt)
        if cfg.cond == "none" or cfg.classes != 132:
            raise UserError(f"--prompt belongs to text2img; {cfg.preset} knows no hair and eyes")
    if cfg.graph and {cfg.g_opt, cfg.d_opt} != {"adam"}:
        raise UserError("--graph 1 works with Adam for G and D only")


def main(argv=None):
    """The command line."""
    cfg, changes = data.arguments(Config, argv, PRESETS)
    check(cfg)
    for field in {"channels", "classes"} & changes.keys():
        raise UserError(f"--{field} follows from the data; leave it out")
    tail = "".join(f"-{k}{str(v).replace('/', '_').replace(',', '+')}" for k, v in changes.items() if k not in FREE)
    out = Path(cfg.out or f"out/{cfg.preset}{tail}")
    if cfg.steps == 0 and (out / "last.pt").exists():
        cfg.resume = 1
    if cfg.steps == 0 and cfg.resume and not (out / "last.pt").exists():
        raise UserError(f"no checkpoint {out / 'last.pt'}: train first, or name the run's folder with --out")
    rank, world = data.ranks()
    device = data.device(cfg.device)
    if cfg.graph and (device.type != "cuda" or world > 1):
        raise UserError(f"--graph 1 needs one CUDA device, not {world} x {device}; leave it out")
    if cfg.batch % world or cfg.batch // world < 2:
        raise UserError(f"--batch {cfg.batch} cannot be shared by {world} ranks; at least 2 pictures each")
    name, images, labels, classes = source = data.choose(cfg.data, cfg.size)
    cfg.data, cfg.channels = name, images.shape[1]
    if len(images) < 10:
        raise UserError(f"{name} has {len(images)} picture(s); training and metrics need at least 10")
    if cfg.cond != "none":
        if labels is None:
            raise UserError(f"--cond {cfg.cond} needs labels and {name} has none; put the pictures into one sub-folder a class")
        cfg.classes = len(classes)
        if cfg.prompt and cfg.classes != 132:
            raise UserError(f"--prompt needs hair and eye colours and {name} has none; --data faces-a")
    if rank == 0:
        data.open_run(out, cfg.resume, cfg.overwrite)
    v = data.versions()
    print(f"run      {out}  device {device} {v['gpu'] if device.type == 'cuda' else ''} ({v['threads']} threads)  seed {cfg.seed}  torch {v['torch']}"
          f"  bfloat16 {'on' if data.use_bf16(cfg.amp, device) else 'off'}", flush=True)
    images, labels = images.to(device), None if labels is None else labels.to(device)
    G, G_ema, D, step, log = train(cfg, images, labels, out, device)
    G = sampler(G, G_ema, cfg, device)
    scored = score(G, cfg, source, device) if cfg.show in ("all", "metrics") and not cfg.prompt else None
    if rank == 0:
        evaluate(cfg, G, D, step, log, source, scored, out, device)


if __name__ == "__main__":
    data.run_main(main)
