"""CycleGAN and UNIT translate pictures from one style into another, without a single pair.

    python cyclegan.py                                      # Apple and Windows emojis, else faces
    python cyclegan.py --data faces --identity .5           # drawn here; the true answer is known
    python cyclegan.py --model unit --data distant          # faces and emojis have little in common
    python cyclegan.py --a photos/ --b paintings/ --size 128
    python cyclegan.py --translate me.jpg --direction ab    # with the trained networks

G_ab translates a picture of style A into style B, and G_ba goes the other way. D_a and D_b tell the
real pictures of their style from translated ones. CycleGAN (Zhu 2017, equation 3) minimises over G

    L_GAN(G_ab, D_b) + L_GAN(G_ba, D_a) + lambda (|G_ba(G_ab(a)) - a|_1 + |G_ab(G_ba(b)) - b|_1)

The GAN terms alone would let G_ab draw any picture of style B. The cycle loss asks that a can be
recovered from the translation, so the translation has to carry the content of a. It may carry it in
any code: blue hair may become red, as long as the way back turns it blue again. The paper's
identity loss (--identity .5; the courses do not use it) asks that a picture which already has the
style stays as it is. This keeps the colours.

UNIT (Liu 2017) has one latent space for both styles. It is made of two variational autoencoders
(VAEs), which share the last block of their encoders E and the first block of their decoders.
Dec_b(E_a(a)) translates a. The docstring of step_unit says what differs from the paper.

On the drawn faces the score is the L1 distance to the true answer. Emojis have no true answer, so
their score is the FID to the other style. A score is only meaningful in comparison with simple
baselines: returning the input, always returning the best constant picture, and matching only the
colours. The last line of a run names the best baseline, and result.json contains all of them.
Results of seed 11, A to B and B to A (torch 2.13, one thread; the first one on an AMD EPYC, Zen 3,
in 53 minutes beside other runs, the others on an Intel Xeon, where 5,000 steps take 10 minutes):

    python cyclegan.py                            FID 6.3 and 3.8; colours matched 47 and 48
    python cyclegan.py --data faces               L1 .197 and .156; best constant .160 and .107
    python cyclegan.py --data faces --identity .5 --steps 3000
                                                  L1 .078 and .047; hair colour kept: 100%, 100%
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import fid
from data import need, to_float, to_uint8


# ---- config --------------------------------------------------------------------------------------

@dataclass
class CycleConfig:
    """All settings of a run. Every field is a flag, and its comment is the flag's help."""
    model: Literal["cyclegan", "unit"] = "cyclegan"     # which of the two models
    data: Literal["emojis,faces", "emojis", "faces", "distant"] = "emojis,faces"    # the two styles
    a: str = ""                     # style A instead of --data: a folder of pictures or a data set
    b: str = ""                     # style B, likewise
    size: Literal[32, 64, 128, 256] = 32    # side of a picture; above 32 with the paper's networks
    width: int = 64                 # width of the paper's networks (size > 32); 32 for a laptop
    lambda_gan: float = 1.          # weight of the GAN loss in G's loss (UNIT: 10)
    lambda_cycle: float = 0.015     # CycleGAN: weight of the cycle loss, a sum over all pixels
    identity: float = 0.            # CycleGAN: identity loss weight / lambda_cycle (paper: .5)
    pool: int = 0                   # size of the pool of earlier translations for D (paper: 50)
    lr: float = 3e-4                # Adam's learning rate (UNIT: 1e-4)
    weight_decay: float = 0.        # Adam's weight decay (UNIT: 1e-4)
    decay: int = 0                  # 1: learning rates fall linearly to 0 over the second half
    batch: int = 32                 # pictures of each style in a batch
    steps: int = 5000               # steps; 0: only evaluate the checkpoint
    seed: int = 11                  # seed of weights and batches
    device: str = "auto"            # auto, cuda, mps, cpu
    amp: int = -1                   # bfloat16 autocast: 1 on, 0 off, -1 where the hardware has it
    log_every: int = 50             # steps between two lines of the log
    sample_every: int = 200         # steps between two sample sheets and checkpoints
    out: str = ""                   # folder of the run; empty: out/<model>-<what differs>
    resume: int = 1                 # 0: delete the folder's earlier run and begin anew
    translate: str = ""             # only translate this picture or folder, with a trained run
    direction: Literal["ab", "ba"] = "ab"   # of --translate


# Settings that may change when a run is resumed, because they do not change what is trained. (model
# is among them only because the folder's name contains it anyway. The weights of one model do not
# fit the other, and data.restore says so.)
FREE = set("model steps device amp log_every sample_every out resume translate direction".split())
PAIRS = {"emojis": ("emoji-apple", "emoji-windows"), "faces": ("faces-a", "faces-b"),
         "distant": ("faces-a", "emoji-apple")}


def config(**changes):
    """The settings of a run: at 32 x 32 those of the course, for larger pictures those of Zhu 2017
    (sections 4 and 7), for model="unit" UNIT's weights and rate. Explicit changes have priority.

    The paper's lambda of 10 belongs to a mean over the 3 S^2 numbers of a picture. Our cycle loss
    is a sum over them, so the same weight is 10 / (3 S^2)."""
    fields = {}
    if changes.get("size", 32) > 32:
        fields |= dict(lambda_cycle=10 / (3 * changes["size"] ** 2), identity=.5, pool=50, lr=2e-4,
                       decay=1, batch=1)
    if changes.get("model") == "unit":
        fields |= dict(lambda_gan=10., lr=1e-4, weight_decay=1e-4)
    return CycleConfig(**(fields | changes))


# ---- networks: 32 x 32, the course's -------------------------------------------------------------
# The comment on the right gives the side of each layer's output.

def conv(in_channels, out_channels, kernel_size, stride=2, padding=2, batch_norm=True,
         init_zero_weights=False, spectral_norm=False):
    """A convolution without bias, then batch norm if asked for. No activation.

    It turns a side of S pixels into (S + 2 padding - kernel_size) // stride + 1. The signature is
    the handout's: init_zero_weights draws small weights, 0.001 N(0, 1), and spectral_norm divides
    them by their largest singular value."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    if init_zero_weights:
        nn.init.normal_(layer.weight, 0, .001)
    if spectral_norm:
        layer = nn.utils.parametrizations.spectral_norm(layer)
    layers = nn.Sequential(layer)
    if batch_norm:
        layers.append(nn.BatchNorm2d(out_channels))
    return layers


def upconv(in_channels, out_channels, kernel_size, stride=2, padding=2, batch_norm=True,
           spectral_norm=False):
    """Upsampling by `stride` if it is above 1, then a convolution of stride 1. A transposed
    convolution in its place would leave a checkerboard pattern."""
    layers = conv(in_channels, out_channels, kernel_size, 1, padding, batch_norm,
                  spectral_norm=spectral_norm)
    if stride > 1:
        layers.insert(0, nn.Upsample(scale_factor=stride))      # repeats each pixel
    return layers


class ResnetBlock(nn.Module):
    """x -> relu(x + BN(conv3x3(x)))."""

    def __init__(self, conv_dim):
        super().__init__()
        self.body = conv(conv_dim, conv_dim, 3, 1, 1)

    def forward(self, x):
        return F.relu(x + self.body(x))


def CycleGenerator(conv_dim=32, init_zero_weights=False):
    """(N, 3, S, S) -> (N, 3, S, S), both in [-1, 1]. 144,448 parameters; the handout's default is
    conv_dim=64. init_zero_weights: the two convolutions of the encoder start with small weights."""
    return nn.Sequential(
        conv(3, conv_dim, 5, init_zero_weights=init_zero_weights),      # 32 -> 16
        nn.ReLU(),
        conv(conv_dim, 2 * conv_dim, 5, init_zero_weights=init_zero_weights),   # 8
        nn.ReLU(),
        ResnetBlock(2 * conv_dim),
        upconv(2 * conv_dim, conv_dim, 5),                      # 16
        nn.ReLU(),
        upconv(conv_dim, 3, 5, batch_norm=False),               # 32
        nn.Tanh(),
    )


def cycle_discriminator():
    """D: (N, 3, 32, 32) in [-1, 1] -> logits (N, 1). 262,048 parameters."""
    return nn.Sequential(
        conv(3, 32, 5),                                         # 32 -> 16
        nn.ReLU(),
        conv(32, 64, 5),                                        # 8
        nn.ReLU(),
        conv(64, 128, 5),                                       # 4
        nn.ReLU(),
        conv(128, 1, 5, padding=1, batch_norm=False),           # 1
        nn.Flatten(),
    )


# ---- networks: larger pictures, Zhu 2017, appendix 7.2 -------------------------------------------

class ResBlock(nn.Module):
    """x -> x + IN(conv(relu(IN(conv(x))))), where IN is instance norm."""

    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c, c, 3, 1, 1, padding_mode="reflect"),
            nn.InstanceNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, 1, 1, padding_mode="reflect"),
            nn.InstanceNorm2d(c),
        )

    def forward(self, x):
        return x + self.body(x)


def normed(layer, activation=nn.ReLU()):
    """The layer, instance norm and an activation: the paper's c7s1-k, dk and uk."""
    return nn.Sequential(layer, nn.InstanceNorm2d(layer.out_channels), activation)


def ResNetGenerator(w=64, blocks=9):
    """(N, 3, S, S) -> (N, 3, S, S), both in [-1, 1]. (64, 9): 11,378,179 parameters."""
    return nn.Sequential(
        normed(nn.Conv2d(3, w, 7, 1, 3, padding_mode="reflect")),   # S
        normed(nn.Conv2d(w, 2 * w, 3, 2, 1)),                   # S / 2
        normed(nn.Conv2d(2 * w, 4 * w, 3, 2, 1)),               # S / 4
        *[ResBlock(4 * w) for _ in range(blocks)],
        normed(nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, 1, 1)),   # S / 2
        normed(nn.ConvTranspose2d(2 * w, w, 3, 2, 1, 1)),       # S
        nn.Conv2d(w, 3, 7, 1, 3, padding_mode="reflect"),
        nn.Tanh(),
    ).apply(init_normal)


def PatchGAN(w=64):
    """(N, 3, S, S) -> logits (N, 1, S/8 - 2, S/8 - 2), one for each patch of 70 x 70 pixels (Isola
    2017, section 6.1.2). 2,764,737 parameters."""
    leaky = nn.LeakyReLU(.2)
    return nn.Sequential(
        nn.Conv2d(3, w, 4, 2, 1),                               # S / 2
        leaky,
        normed(nn.Conv2d(w, 2 * w, 4, 2, 1), leaky),            # S / 4
        normed(nn.Conv2d(2 * w, 4 * w, 4, 2, 1), leaky),        # S / 8
        normed(nn.Conv2d(4 * w, 8 * w, 4, 1, 1), leaky),        # S / 8 - 1
        nn.Conv2d(8 * w, 1, 4, 1, 1),                           # S / 8 - 2
    ).apply(init_normal)


def init_normal(m):
    """Weights with mean 0 and standard deviation 0.02, biases 0: net.apply(init_normal)."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0, .02)
        nn.init.zeros_(m.bias)


class CycleGAN(nn.ModuleDict):
    """Both translators: G(x, "ab") is G_ab(x), for pictures (N, 3, S, S) in [-1, 1]."""

    def forward(self, x, direction):
        return self[direction](x)


# ---- UNIT: two encoders, two decoders, one latent space ------------------------------------------
# A small version for 32 x 32. Instance norm is used only inside the residual blocks, whose skip
# connections bypass it. Elsewhere it would remove each channel's mean, and with it the colours.

def unit_encoder():
    """(N, 3, S, S) -> (N, 64, S/4, S/4): encoder layers of one style."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2),                              # S / 2
        nn.LeakyReLU(),
        nn.Conv2d(32, 64, 5, 2, 2),                             # S / 4
        nn.LeakyReLU(),
        ResBlock(64),
    )


def unit_decoder():
    """(N, 64, S/4, S/4) -> (N, 3, S, S) in [-1, 1]: decoder layers of one style."""
    return nn.Sequential(
        ResBlock(64),
        nn.Upsample(scale_factor=2),                            # S / 2
        nn.Conv2d(64, 32, 5, 1, 2),
        nn.LeakyReLU(),
        nn.Upsample(scale_factor=2),                            # S
        nn.Conv2d(32, 3, 5, 1, 2),
        nn.Tanh(),
    )


class UNIT(nn.Module):
    """Two VAEs that share the last block of their encoders, `into`, and the first block of their
    decoders, `outof`. G(x, "ab") translates, through the mean of the latent; G(x, "aa") encodes and
    decodes within one style."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"a": unit_encoder(), "b": unit_encoder()})
        self.decoder = nn.ModuleDict({"a": unit_decoder(), "b": unit_decoder()})
        self.into = ResBlock(64)
        self.outof = ResBlock(64)

    def encode(self, x, style):
        """Pictures (N, 3, S, S) in [-1, 1] -> mean mu (N, 64, S/4, S/4) of the latent N(mu, I)."""
        return self.into(self.encoder[style](x))

    def decode(self, z, style):
        """Latents (N, 64, S/4, S/4) -> pictures (N, 3, S, S) in [-1, 1]."""
        return self.decoder[style](self.outof(z))

    def forward(self, x, direction):
        return self.decode(self.encode(x, direction[0]), direction[1])


def networks(cfg):
    """(G, D) of a config: G(x, "ab") translates; D["a"] and D["b"] are the discriminators."""
    G = CycleGAN()
    D = nn.ModuleDict()
    for way in "ab", "ba":
        if cfg.size > 32:
            G[way] = ResNetGenerator(cfg.width, 6 if cfg.size <= 128 else 9)
            D[way[0]] = PatchGAN(cfg.width)
        else:
            G[way] = CycleGenerator()
            D[way[0]] = cycle_discriminator()
    if cfg.model == "unit":
        G = UNIT()
    return G, D


# ---- losses --------------------------------------------------------------------------------------

def least_squares(logits, target):
    """E (D(x) - target)^2, Mao 2017: the target is 1 for what D should call real, 0 for fake."""
    return ((logits.float() - target) ** 2).mean()      # float: autocast may give bfloat16


def cycle_loss(x, back):
    """E |back - x|_1, where back = G_ba(G_ab(x)): one half of Zhu 2017, equation 2.

    Summed over a picture, as in the course. For 32 x 32 pictures lambda = 0.015 on this sum is the
    same as lambda = 46 on a mean over their 3 * 32 * 32 = 3,072 numbers; the paper has 10 there."""
    return (back - x).abs().flatten(1).sum(1).mean()


def latent_kl(mu):
    """E mu^2, which is twice KL(N(mu, 1) || N(0, 1)) for each number of the latent."""
    return (mu.float() ** 2).mean()


class ImagePool:
    """Stores earlier translations, so that D sees not only G's latest ones (Zhu 2017, section 4).

    pool(x_fake) takes pictures (N, C, H, W) and returns as many, detached. Until the pool is full,
    it stores and returns the new pictures. After that, with probability 1/2, a new picture replaces
    an old one, which is returned instead. size: how many pictures the pool stores; with 0 it always
    returns the new ones."""

    def __init__(self, size):
        self.size = size
        self.held = []

    def __call__(self, x_fake):
        shown = []
        for x in x_fake.detach().float():
            if len(self.held) < self.size:
                self.held.append(x.clone())
            elif self.size and torch.rand(()) < .5:
                i = torch.randint(self.size, ())
                x, self.held[i] = self.held[i], x.clone()
            shown.append(x)
        return torch.stack(shown)

    def state_dict(self):
        return {"held": self.held}

    def load_state_dict(self, state):
        self.held = state["held"]


# ---- one training step of each model -------------------------------------------------------------
# Each function trains both discriminators and then the translators, once. a and b are pictures
# (N, 3, S, S) in [-1, 1] of the two styles, which do not belong together; opt_G holds the weights
# of both directions and opt_D those of D_a and D_b. D may return logits of any shape. To use it:
#
#     G_ab, G_ba, D_a, D_b = ...                  # the handout's four networks, for example
#     opt_G = torch.optim.Adam([*G_ab.parameters(), *G_ba.parameters()], 3e-4, betas=(.5, .999))
#     opt_D = torch.optim.Adam([*D_a.parameters(), *D_b.parameters()], 3e-4, betas=(.5, .999))
#     for a, b in batches:
#         last = step_cyclegan(G_ab, G_ba, D_a, D_b, opt_G, opt_D, a, b)
#
# They return what the log shows: D's loss and G's GAN loss; D_a's and D_b's logits of the real
# pictures, of the fakes, and of the fakes after D's update; the other terms of G's loss, weighted.

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


def step_cyclegan(G_ab, G_ba, D_a, D_b, opt_G, opt_D, a, b, gan=1., cycle=.015, identity=0.,
                  pool_a=nn.Identity(), pool_b=nn.Identity()):
    """CycleGAN: Zhu 2017, equation 3, with the least squares of section 4.

        D minimises  1/2 E (D_a(a) - 1)^2 + 1/2 E D_a(G_ba(b))^2
                     + 1/2 E (D_b(b) - 1)^2 + 1/2 E D_b(G_ab(a))^2      0.5 where D = 1/2
        G minimises  gan (E (D_a(G_ba(b)) - 1)^2 + E (D_b(G_ab(a)) - 1)^2)      0.5 for gan = 1
                     + cycle (E |G_ba(G_ab(a)) - a|_1 + E |G_ab(G_ba(b)) - b|_1)
                     + identity cycle (E |G_ba(a) - a|_1 + E |G_ab(b) - b|_1)

    Each |.|_1 is a sum over a picture. The identity loss is that of section 5.2. pool_a, pool_b:
    functions, for example an ImagePool, that take the new fakes and return those that D_a and D_b
    see."""
    fake_b = G_ab(a)
    fake_a = G_ba(b)
    back = cycle_loss(a, G_ba(fake_b)) + cycle_loss(b, G_ab(fake_a))
    other = {"cycle": cycle * back}
    if identity:                            # G_ba draws style A, and a has it already
        same = cycle_loss(a, G_ba(a)) + cycle_loss(b, G_ab(b))
        other["identity"] = identity * cycle * same

    # ---- D: real pictures towards 1, translations towards 0, in each style ----
    real_a = D_a(a)                         # real and fake in passes of their own, so that batch
    real_b = D_b(b)                         # norm does not mix them
    seen_a = D_a(pool_a(fake_a.detach()))   # detach: D's loss must not reach into G
    seen_b = D_b(pool_b(fake_b.detach()))
    loss_D = (least_squares(real_a, 1) + least_squares(seen_a, 0)
              + least_squares(real_b, 1) + least_squares(seen_b, 0)) / 2
    descend(opt_D, loss_D)

    # ---- G: translations towards 1, scored by the updated D, and the terms above ----
    after_a = D_a(fake_a)
    after_b = D_b(fake_b)
    loss_G = gan * (least_squares(after_a, 1) + least_squares(after_b, 1))
    descend(opt_G, loss_G + sum(other.values()))
    return {"D": loss_D, "G": loss_G, "D(x)": (real_a, real_b), "D(G(x)) before": (seen_a, seen_b),
            "D(G(x)) after": (after_a, after_b), **other}


def step_unit(G, D_a, D_b, opt_G, opt_D, a, b, gan=10., recon=100., kl=.1,
              pool_a=nn.Identity(), pool_b=nn.Identity()):
    """UNIT: Liu 2017, equations 3, 4, 5, 7 and 8, with the weights given in section 4.

        mu_a = E_a(a), z_a ~ N(mu_a, I), fake_b = Dec_b(z_a)
        mu_ab = E_b(fake_b), z_ab ~ N(mu_ab, I)
        D minimises  the same as in step_cyclegan                               0.5 where D = 1/2
        G minimises  for a, and likewise for b:
                     gan E (D_b(fake_b) - 1)^2
                     + recon E |Dec_a(z_a) - a| + kl E mu_a^2                   eq. 3
                     + recon E |Dec_a(z_ab) - a| + kl E mu_ab^2                 eq. 7

    What differs from the paper: least squares take the place of its log D; L1 and KL are means over
    all numbers, as in the authors' code, where the paper sums; and the KL of mu_a, which equation 7
    contains a second time, is counted once, as in that code. The authors' later code divides these
    weights and adds a loss on VGG features, which is left out here."""
    mu_a = G.encode(a, "a")                 # (N, 64, S/4, S/4)
    mu_b = G.encode(b, "b")
    z_a = mu_a + torch.randn_like(mu_a)
    z_b = mu_b + torch.randn_like(mu_b)
    same_a = G.decode(z_a, "a")             # within a style
    same_b = G.decode(z_b, "b")
    fake_a = G.decode(z_b, "a")             # into the other style
    fake_b = G.decode(z_a, "b")
    mu_ab = G.encode(fake_b, "b")           # and back
    mu_ba = G.encode(fake_a, "a")
    back_a = G.decode(mu_ab + torch.randn_like(mu_ab), "a")
    back_b = G.decode(mu_ba + torch.randn_like(mu_ba), "b")
    other = {
        "reconstruction": recon * (F.l1_loss(same_a, a) + F.l1_loss(same_b, b)),
        "cycle": recon * (F.l1_loss(back_a, a) + F.l1_loss(back_b, b)),
        "kl": kl * (latent_kl(mu_a) + latent_kl(mu_b)),
        "cycle kl": kl * (latent_kl(mu_ab) + latent_kl(mu_ba)),
    }

    # ---- D: real pictures towards 1, translations towards 0, in each style ----
    real_a = D_a(a)                         # real and fake in passes of their own, so that batch
    real_b = D_b(b)                         # norm does not mix them
    seen_a = D_a(pool_a(fake_a.detach()))   # detach: D's loss must not reach into G
    seen_b = D_b(pool_b(fake_b.detach()))
    loss_D = (least_squares(real_a, 1) + least_squares(seen_a, 0)
              + least_squares(real_b, 1) + least_squares(seen_b, 0)) / 2
    descend(opt_D, loss_D)

    # ---- G: translations towards 1, scored by the updated D, and the terms above ----
    after_a = D_a(fake_a)
    after_b = D_b(fake_b)
    loss_G = gan * (least_squares(after_a, 1) + least_squares(after_b, 1))
    descend(opt_G, loss_G + sum(other.values()))
    return {"D": loss_D, "G": loss_G, "D(x)": (real_a, real_b), "D(G(x)) before": (seen_a, seen_b),
            "D(G(x)) after": (after_a, after_b), **other}


# ---- data: two styles, no pairs ------------------------------------------------------------------

class Style(NamedTuple):
    """The data of one style: uint8 pictures (n, 3, S, S), `train` on the device and `test` on the
    CPU, and labels (n,) of the test pictures, or None."""
    name: str
    train: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor


def load_style(names, size, device):
    """The Style of a data set or of a folder. names: several, "a,b", in order of preference."""
    name, train, _, _ = data.choose(names, size)
    test, labels, _ = data.load(name, size, "test")
    need(len(train) > 1 and train.shape[1] == 3, f"{name}: a style needs 2 pictures in colour")
    return Style(name, train.to(device), test, labels)


def load_pair(cfg, out, device):
    """Load the first available pair of styles in cfg.data -> [style A, style B]. cfg.data is set to
    the name of this pair."""
    pairs = PAIRS | {"own": (cfg.a, cfg.b)}
    names = "own" if cfg.a else data.kept(cfg, out)
    for name in names.split(","):
        cfg.data = name
        try:
            return [load_style(style, cfg.size, device) for style in pairs[name]]
        except data.Unavailable as e:
            why = e
            print(f"data     no {name}: {e}")
    raise why


def paired(a, b):
    """Whether test picture i of both styles shows the same face, which only drawn faces do."""
    return {a.name, b.name} == {"faces-a", "faces-b"}


# ---- the training loop ---------------------------------------------------------------------------

def draw_batch(images, n):
    """n random pictures of uint8 (N, 3, S, S) -> float (n, 3, S, S) in [-1, 1]."""
    return to_float(images[torch.randint(len(images), (n,), device=images.device)])


@torch.no_grad()
def refresh(G, a, b):
    """Recompute the batch norm statistics that eval mode uses, for each direction from 1,000 real
    pictures of its input style. The running statistics collected in training also contain
    translations and, with the identity loss, pictures of the other style. On drawn faces (identity
    loss, 3,000 steps) this lowers L1 from .086 and .061 to .078 and .047, and the FID from 10.8 and
    31.5 to 10.1 and 17.8."""
    layers = [m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in layers:
        m.reset_running_stats()
        m.momentum = None                               # torch: a plain mean over all batches
    for _ in range(10 if layers else 0):
        G(draw_batch(a.train, 100), "ab")
        G(draw_batch(b.train, 100), "ba")


@torch.no_grad()
def translate(G, x, direction):
    """Pictures uint8 (N, 3, S, S) -> their translations, uint8, on the CPU. In eval mode."""
    G.eval()
    device = next(G.parameters()).device
    y = torch.cat([to_uint8(G(to_float(part.to(device)), direction)).cpu() for part in x.split(32)])
    G.train()
    return y


def draw_sheet(G, a, b, path):
    """Test pictures in rows: the inputs a, UNIT's reconstructions aa, the translations ab, these
    translated back, aba, and the true b where it is known. Then the same from b to a."""
    rows = {}
    for x, y, way in (a, b, "ab"), (b, a, "ba"):
        s, t = way
        real = x.test[:12]
        rows[f"{s}: {x.name}"] = real
        if isinstance(G, UNIT):
            rows[s + s] = translate(G, real, s + s)
        rows[way] = translate(G, real, way)
        rows[way + s] = translate(G, rows[way], t + s)
        if paired(a, b):
            rows[f"true {t}"] = y.test[:12]
    data.sheet(list(rows.values()), path, list(rows), title=f"{type(G).__name__} {path.stem}")


def train(cfg, a, b, out, device):
    """Trains G and D on two Styles and returns (G, D, log). Goes on from out/last.pt if there is
    one. Writes sample sheets, log.csv and last.pt into out."""
    torch.manual_seed(cfg.seed)
    G, D = (data.place(net, device) for net in networks(cfg))
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), cfg.lr, (.5, .999), fused=True,
                                     weight_decay=cfg.weight_decay) for net in (G, D)]
    pools = dict(pool_a=ImagePool(cfg.pool), pool_b=ImagePool(cfg.pool))
    log = data.Log(out, cfg.steps)
    parts = dict(pools, G=G, D=D, opt_G=opt_G, opt_D=opt_D, log=log)
    start = data.restore(parts, out / "last.pt", cfg, FREE, device)
    amp = data.autocast(cfg.amp, device)
    train_step = partial(step_unit, G)
    if cfg.model == "cyclegan":
        train_step = partial(step_cyclegan, *G.values(), cycle=cfg.lambda_cycle,
                             identity=cfg.identity)

    for step in range(start + 1, cfg.steps + 1):
        # Reseed every step from (seed, step): a resumed run sees the same batches and noise.
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        if cfg.decay:
            for opt in opt_G, opt_D:                # constant until half-way, then linearly to 0
                opt.param_groups[0]["lr"] = cfg.lr * min(1., 2 - 2 * (step - 1) / cfg.steps)
        with amp:
            last = train_step(
                *D.values(), opt_G, opt_D,
                draw_batch(a.train, cfg.batch),             # (N, 3, S, S)
                draw_batch(b.train, cfg.batch),             # independent: no pairs
                gan=cfg.lambda_gan, **pools)
        if step % cfg.log_every == 0 or step in (1, cfg.steps):     # the only regular GPU sync
            for name in "D(x)", "D(G(x)) before", "D(G(x)) after":
                last[name] = torch.cat(last[name]).float().mean()
            last |= {"|dD|": data.grad_norm(D), "|dG|": data.grad_norm(G)}
            log.write(step, cfg.batch, **last)
        if step % cfg.sample_every == 0 or step == cfg.steps:
            refresh(G, a, b)
            draw_sheet(G, a, b, log.grid(step))
            data.save_checkpoint(out / "last.pt", parts, step, cfg)
    return G, D, log


# ---- scores --------------------------------------------------------------------------------------

def colour_match(x, y):
    """x with the mean and the standard deviation that each channel has in y, which changes nothing
    but the colours. uint8 (N, 3, H, W); x and y need not be pairs."""
    s_x, mean_x = torch.std_mean(to_float(x), (0, 2, 3), keepdim=True)      # (1, 3, 1, 1)
    s_y, mean_y = torch.std_mean(to_float(y), (0, 2, 3), keepdim=True)
    return to_uint8((to_float(x) - mean_x) / s_x * s_y + mean_y)


def scores(G, x, y, way):
    """How well G translates style x into y; way is "ab" or "ba". Returns a dict of floats:

    cycle        L1 between a picture and its translation back; 1 is black against white
    L1           to the true answer, on drawn faces
    FID          to the pictures of style y, if there are at least 1,000
    hair kept    the share of drawn faces whose hair colour a classifier of style y still reads as
                 that of the input; eyes kept likewise
    L1 and FID also of simple methods: the input itself (identity), the best constant picture
    (constant), and the input with the colours of style y (colour map)."""
    known = paired(x, y)
    # The files are sorted by name, so their first 1,000 would be of other kinds than the rest.
    real = x.test if known else fid.shuffled(x.train)[:1000].cpu()
    style = y.train.cpu()
    fake = translate(G, real, way)
    guesses = {
        "": fake,
        " identity": real,
        " constant": style.median(0).values.expand_as(real),        # has the least mean L1
        " colour map": colour_match(real, style),
    }
    found = {"cycle": F.l1_loss(translate(G, fake, way[::-1]) / 255, real / 255)}
    if known:
        for name, guess in guesses.items():
            found[f"L1{name}"] = F.l1_loss(guess / 255, y.test / 255)
    if len(style) >= 1000:                              # enough for a Gaussian of 128 features
        net = fid.classifier(y.name, real.shape[-1], x.train.device)
        for name, guess in guesses.items():
            result = fid.against(net, y.train, guess, y.name)
            found[f"FID{name}"] = result["fid"]
            print(f"{way}{name}: {fid.line(result)}")
        if known:
            seen = fid.count(net, fake, y.labels, data.FACES, x.labels)
            found["hair kept"] = seen["hair accuracy"]
            found["eyes kept"] = seen["eyes accuracy"]
    return {f"{way} {name}": float(value) for name, value in found.items()}


def verdict(metrics, way):
    """Compare the score with the best baseline, in words: "ab L1 0.103, better than ab L1 constant
    0.143"."""
    for score in f"{way} L1", f"{way} FID":
        if score in metrics:
            best = min((name for name in metrics if f"{score} " in name), key=metrics.get)
            word = "better" if metrics[score] < metrics[best] else "NOT better"
            return f"{score} {metrics[score]:.3g}, {word} than {best} {metrics[best]:.3g}"
    return f"{way} cycle L1 {metrics[f'{way} cycle']:.3f}"


@torch.no_grad()
def probe_accuracy(G, a, b):
    """The accuracy of a linear classifier that tells UNIT's latents of style a from those of b:
    1/2 if they have the same distribution, 1 if they can be separated. Its weights w are fitted to
    every second picture, by least squares for w mu_a = 1 and w mu_b = -1. The accuracy is measured
    on the other pictures."""
    n = min(len(a.train), len(b.train), 1000)
    z = torch.cat([G.encode(to_float(a.train[:n]), "a"),        # (2 n, d); w z should be 1 for all
                   -G.encode(to_float(b.train[:n]), "b")]).flatten(1).cpu()
    w = torch.linalg.lstsq(z[::2], torch.ones(n, 1)).solution
    return (z[1::2] @ w > 0).float().mean().item()


def evaluate(cfg, G, log, a, b, out):
    """Pictures, metrics and result.json of a run."""
    draw_sheet(G, a, b, out / "translations.png")
    metrics = scores(G, a, b, "ab") | scores(G, b, a, "ba")
    headline = f"{verdict(metrics, 'ab')}; {verdict(metrics, 'ba')}"
    if isinstance(G, UNIT):
        metrics["probe accuracy"] = probe_accuracy(G, a, b)
        headline += f"; probe accuracy {metrics['probe accuracy']:.1%}"
    data.finish(out, cfg, log, metrics, [
        ("losses", ["D", "G"]),
        ("D on real and fake, before and after its step",
         ["D(x)", "D(G(x)) before", "D(G(x)) after"]),
        ("gradient norms", ["|dD|", "|dG|"]),
        ("other terms of G's loss", ["cycle", "identity", "reconstruction", "kl", "cycle kl"]),
    ], headline)


def translate_files(cfg, out, device):
    """--translate: writes the translation of each picture, which is cropped to a square and scaled
    first, into out/translated-<way>/, and all beside their inputs to out/translated-<way>.png."""
    state = data.load_checkpoint(out / "last.pt", device)
    trained = state["config"]
    need("lambda_cycle" in trained, f"{out}/last.pt is no checkpoint of cyclegan.py")
    G, _ = networks(CycleConfig(**trained))
    G.load_state_dict(state["G"])
    source = Path(cfg.translate)
    files = [source] if source.is_file() else data.pictures(source)
    x = data.read_all(files, trained["size"])
    y = translate(G.to(device), x, cfg.direction)
    folder = out / f"translated-{cfg.direction}"
    for i, file in enumerate(files):                    # numbered, for x.png and x.jpg
        data.save(data.as_image(y[i]), folder / f"{file.stem}-{i}.png")
    data.save(data.grid(torch.cat([x, y], 3), 4), f"{folder}.png")     # (N, 3, S, 2 S)
    print(f"wrote    {len(files)} to {folder} and all beside their inputs to {folder}.png")


# ---- main ----------------------------------------------------------------------------------------

def main(argv=None):
    """The command line."""
    _, changes = data.arguments(CycleConfig, argv)
    cfg = config(**changes)
    need(bool(cfg.a) == bool(cfg.b), "--a and --b go together: a folder or data set for each style")
    data.at_least(1, cfg, "width", "batch", "log_every", "sample_every")
    data.at_least(0, cfg, "lambda_gan", "lambda_cycle", "identity", "pool", "lr", "weight_decay",
                  "steps")
    need(cfg.model == "cyclegan" or not {"identity", "lambda_cycle"} & set(changes),
         "--identity and --lambda-cycle belong to --model cyclegan; UNIT has weights of its own")
    device = data.device(cfg.device)
    out = data.run_folder(cfg.model, cfg, changes, FREE)
    if cfg.translate:
        translate_files(cfg, out, device)
        return
    a, b = load_pair(cfg, out, device)
    G, _, log = train(cfg, a, b, out, device)
    evaluate(cfg, G, log, a, b, out)


if __name__ == "__main__":
    data.run_main(main)
