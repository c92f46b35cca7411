"""cyclegan.py: CycleGAN and UNIT translate pictures between two styles, learnt without one pair.

    python cyclegan.py                                      Apple and Windows emojis, else faces
    python cyclegan.py --data faces --identity .5           drawn here; the true answers are known
    python cyclegan.py --model unit --data distant          faces and emojis: nothing in common
    python cyclegan.py --a photos/ --b paintings/ --size 128
    python cyclegan.py --translate me.jpg --direction ab    with the trained checkpoint

G_ab and G_ba translate, D_a and D_b tell real from translated pictures of their style. CycleGAN
(Zhu 2017, eq. 3) minimises over G, where D is trained as in gan.py's LSGAN:
    L_GAN(G_ab, D_b) + L_GAN(G_ba, D_a) + lambda (|G_ba(G_ab(a)) - a|_1 + |G_ab(G_ba(b)) - b|_1).
The GAN terms alone let G_ab draw any picture of style B. The way back must find a again, so what
is in a has to survive; but only in some code: blue hair may become red as long as it comes back as
blue. The paper's identity loss (--identity .5; the courses have none) asks that a picture which
has the style already stays as it is, and so holds the colours.
UNIT (Liu 2017) has one latent space for both styles, E_a(a) ~ E_b(b): two VAEs that share the last
block of their encoders and the first of their decoders. A translation is Dec_b(E_a(a)). The paper
plays with log D; here the game is the same LSGAN as above, weighed 10 times.

The faces' score is the L1 to the true answer; it is worth something only below that of doing
nothing, of the best constant picture and of the best map of colours: all three are printed. Emojis
have no true answer: their FID should be below that of doing nothing, of the median picture and of
matching each channel's mean and deviation. Measured, one thread of an AMD EPYC (Zen 5), torch 2.13,
5,000 steps, 10 minutes beside another run, seed 11, both ways:
    python cyclegan.py                            FID 10.6, 5.5; of matched channels 49, 46
    python cyclegan.py --data faces               L1 .208, .169; the best constant .160, .107
    python cyclegan.py --data faces --identity .5    .082, .052; hair kept: 99%, 100%
Read on in the order of the lecture: config, networks, UNIT, losses, terms, the game, scores.
"""
from dataclasses import dataclass
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
    """What a run is. A field is a flag and its comment the flag's help."""
    model: Literal["cyclegan", "unit"] = "cyclegan"     # which of the two
    data: Literal["emojis,faces", "emojis", "faces", "distant"] = "emojis,faces"    # the two styles
    a: str = ""                     # style A instead of --data: a folder of pictures or a data set
    b: str = ""                     # style B, likewise
    size: Literal[32, 64, 128, 256] = 32    # side of a picture: the course's networks; the paper's
    width: int = 64                 # width of the paper's networks (size > 32); 32 for a laptop
    lambda_gan: float = 1.          # weight of D's verdict in G's loss (UNIT: 10)
    lambda_cycle: float = 0.015     # CycleGAN's cycle loss, an L1 summed over pixels; 46 on a mean
    identity: float = 0.            # CycleGAN: identity loss in units of lambda_cycle (paper: .5)
    pool: int = 0                   # translations kept to show D old ones too (paper: 50)
    lr: float = 3e-4                # Adam's learning rate
    weight_decay: float = 0.        # Adam's weight decay
    decay: int = 0                  # 1: learning rates fall linearly to 0 over the second half
    batch: int = 32                 # pictures of each style a batch
    steps: int = 5000               # steps; 0: only evaluate the checkpoint
    seed: int = 11                  # seed of weights and batches
    device: str = "auto"            # auto, cuda, mps, cpu
    amp: int = -1                   # bfloat16 autocast: 1 on, 0 off, -1 where the hardware has it
    log_every: int = 50             # steps between two lines of the log
    sample_every: int = 200         # steps between two sample sheets and checkpoints
    out: str = ""                   # folder of the run; empty: out/<model>-<what differs>
    resume: int = 1                 # 0: delete the folder's earlier run and begin anew
    translate: str = ""             # only translate this picture or folder with the checkpoint
    direction: Literal["ab", "ba"] = "ab"   # of --translate


# Fields that say how long and where, not what is trained: a resume may change them (but the model,
# whose name the folder already has).
FREE = {"model", "steps", "device", "amp", "log_every", "sample_every", "out", "resume",
        "translate", "direction"}
PAIRS = {"emojis": ("emoji-apple", "emoji-windows"), "faces": ("faces-a", "faces-b"),
         "distant": ("faces-a", "emoji-apple")}


def config(**changes):
    """The course's CycleGAN at 32 x 32; for model="unit" UNIT's own weights; beyond 32 pixels the
    settings of Zhu 2017 (sec. 4, 7), whose lambda 10 is 10 / (3 S^2) on our sum. Changes win."""
    fields = {}
    if changes.get("size", 32) > 32:
        fields |= dict(lambda_cycle=10 / (3 * changes["size"] ** 2), identity=.5, pool=50, lr=2e-4,
                       decay=1, batch=1)
    if changes.get("model") == "unit":
        fields |= dict(lambda_gan=10., lr=1e-4, weight_decay=1e-4)
    return CycleConfig(**(fields | changes))


# ---- networks: 32 x 32, the course's -------------------------------------------------------------
# Functions, but CycleGenerator, ResNetGenerator and PatchGAN under the names that all know.

def conv(in_channels, out_channels, kernel_size, stride=2, padding=1, batch_norm=True):
    """A convolution without bias and, if asked for, batch norm: (N, i, S, S) -> (N, o, S', S'),
    S' = (S + 2 padding - kernel_size) // stride + 1."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    if batch_norm:
        return nn.Sequential(layer, nn.BatchNorm2d(out_channels))
    return nn.Sequential(layer)


def upconv(in_channels, out_channels, kernel_size, stride=2, padding=2, batch_norm=True):
    """Nearest upsampling by `stride`, then conv with stride 1: no checkerboard as from a transposed
    convolution."""
    return nn.Sequential(
        nn.Upsample(scale_factor=stride),
        *conv(in_channels, out_channels, kernel_size, 1, padding, batch_norm),
    )


class Residual(nn.Module):
    """x -> relu(x + BN(conv3x3(x)))."""

    def __init__(self, channels):
        super().__init__()
        self.body = conv(channels, channels, 3, 1, 1)

    def forward(self, x):
        return F.relu(x + self.body(x))


def CycleGenerator():
    """(N, 3, S, S) -> (N, 3, S, S), both in [-1, 1]. 144,448 parameters."""
    return nn.Sequential(
        conv(3, 32, 5, 2, 2),                                   # 32 -> 16
        nn.ReLU(),
        conv(32, 64, 5, 2, 2),                                  # 8
        nn.ReLU(),
        Residual(64),
        upconv(64, 32, 5),                                      # 16
        nn.ReLU(),
        upconv(32, 3, 5, batch_norm=False),                     # 32
        nn.Tanh(),
    )


def cycle_discriminator():
    """D: (N, 3, 32, 32) in [-1, 1] -> logits (N, 1). 262,048 parameters."""
    return nn.Sequential(
        conv(3, 32, 5, 2, 2),                                   # 32 -> 16
        nn.ReLU(),
        conv(32, 64, 5, 2, 2),                                  # 8
        nn.ReLU(),
        conv(64, 128, 5, 2, 2),                                 # 4
        nn.ReLU(),
        conv(128, 1, 5, 2, 1, batch_norm=False),                # 1
        nn.Flatten(),
    )


# ---- networks: larger pictures, Zhu 2017 sec. 7.2 of the appendix --------------------------------

class ResBlock(nn.Module):
    """x -> x + IN(conv(relu(IN(conv(x)))))."""

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


def ResNetGenerator(w=64, blocks=9):
    """(N, 3, S, S) -> (N, 3, S, S), both in [-1, 1]. (64, 9): 11,378,179 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, w, 7, 1, 3, padding_mode="reflect"),       # S
        nn.InstanceNorm2d(w),
        nn.ReLU(),
        nn.Conv2d(w, 2 * w, 3, 2, 1),                           # S / 2
        nn.InstanceNorm2d(2 * w),
        nn.ReLU(),
        nn.Conv2d(2 * w, 4 * w, 3, 2, 1),                       # S / 4
        nn.InstanceNorm2d(4 * w),
        nn.ReLU(),
        *[ResBlock(4 * w) for _ in range(blocks)],
        nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, 1, 1),           # S / 2
        nn.InstanceNorm2d(2 * w),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * w, w, 3, 2, 1, 1),               # S
        nn.InstanceNorm2d(w),
        nn.ReLU(),
        nn.Conv2d(w, 3, 7, 1, 3, padding_mode="reflect"),
        nn.Tanh(),
    ).apply(init_normal)


def PatchGAN(w=64):
    """(N, 3, S, S) -> logits (N, 1, S/8 - 2, S/8 - 2), one for each 70 x 70 patch (Isola 2017, sec.
    6.1.2). 2,764,737 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, w, 4, 2, 1),                               # S / 2
        nn.LeakyReLU(.2),
        nn.Conv2d(w, 2 * w, 4, 2, 1),                           # S / 4
        nn.InstanceNorm2d(2 * w),
        nn.LeakyReLU(.2),
        nn.Conv2d(2 * w, 4 * w, 4, 2, 1),                       # S / 8
        nn.InstanceNorm2d(4 * w),
        nn.LeakyReLU(.2),
        nn.Conv2d(4 * w, 8 * w, 4, 1, 1),                       # S / 8 - 1
        nn.InstanceNorm2d(8 * w),
        nn.LeakyReLU(.2),
        nn.Conv2d(8 * w, 1, 4, 1, 1),                           # S / 8 - 2
    ).apply(init_normal)


def init_normal(m):
    """Weights ~ N(0, 0.02), biases 0: net.apply(init_normal)."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0, .02)
        nn.init.zeros_(m.bias)


class CycleGAN(nn.ModuleDict):
    """Both translators in one: G(x, "ab") is G_ab(x), of pictures (N, 3, S, S) in [-1, 1]."""

    def forward(self, x, direction):
        return self[direction](x)


# ---- UNIT: two encoders, two decoders, one latent space ------------------------------------------
# A small one. No norm outside of the residual branches: it would wash out the colours.

def unit_encoder():
    """(N, 3, S, S) -> (N, 64, S/4, S/4): what one style's encoder has for itself."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2),                              # S / 2
        nn.LeakyReLU(),
        nn.Conv2d(32, 64, 5, 2, 2),                             # S / 4
        nn.LeakyReLU(),
        ResBlock(64),
    )


def unit_decoder():
    """(N, 64, S/4, S/4) -> (N, 3, S, S) in [-1, 1]: what one style's decoder has for itself."""
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
    """Two VAEs that share `into`, the end of their encoders, and `outof`, the start of their
    decoders. G(x, "ab") translates by way of the latent mean, G(x, "aa") only comes back."""

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
    """(G, D) of a config: G(x, "ab") translates, D["a"] and D["b"] judge, one optimiser each."""
    G = CycleGAN()
    D = nn.ModuleDict()
    for way in ("ab", "ba"):
        if cfg.size > 32:
            G[way] = ResNetGenerator(cfg.width, 6 if cfg.size <= 128 else 9)
            D[way[0]] = PatchGAN(cfg.width)
        else:
            G[way] = CycleGenerator()
            D[way[0]] = cycle_discriminator()
    if cfg.model == "unit":
        G = UNIT()
    return G, D


# ---- losses: real = D(x), fake = D(G(x)), logits of any shape; pictures in [-1, 1] ---------------

def d_lsgan(real, fake):
    """1/2 E (D(x) - 1)^2 + 1/2 E D(G(x))^2, Mao 2017 eq. 2; 0.25 at D = 1/2."""
    return (((real - 1) ** 2).mean() + (fake ** 2).mean()) / 2


def g_lsgan(fake):
    """E (D(G(x)) - 1)^2, Zhu 2017 sec. 4; 0.25 at D = 1/2."""
    return ((fake - 1) ** 2).mean()


def cycle_loss(x, back):
    """E |G_ba(G_ab(x)) - x|_1, one way of Zhu 2017 eq. 2, SUMMED over a picture: lambda 0.015 on
    this sum is lambda 46 on the mean of its 3 * 32 * 32 = 3,072 numbers, where the paper has 10."""
    return (back - x).abs().flatten(1).sum(1).mean()


def latent_kl(mu):
    """E mu^2: twice KL(N(mu, I) | N(0, I)) of one number of the latent; Liu 2017 eq. 3."""
    return (mu.float() ** 2).mean()


class ImagePool:
    """D's memory, Zhu 2017 sec. 4: `size` earlier translations; 0 is no memory.

    pool(x_fake (N, C, H, W)) -> as many, detached. While it fills these are the new ones; then,
    each with probability 1/2, an old one whose place the new one takes."""

    def __init__(self, size):
        self.size = size
        self.held = []

    def __call__(self, x_fake):
        shown = []
        for x in x_fake.detach().float():           # detach: D's loss must not reach into G
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


# ---- terms: what a model adds to the game --------------------------------------------------------
# Pictures a, b (N, 3, S, S) of two styles -> the fakes of either style and a dict of what else G
# minimises, weighted. D has no part in it.

def cycle_terms(G, a, b, cfg):
    """CycleGAN, Zhu 2017 eq. 3: there and back again must be where one was."""
    fake_b, fake_a = G(a, "ab"), G(b, "ba")
    back = cycle_loss(a, G(fake_b, "ba")) + cycle_loss(b, G(fake_a, "ab"))
    terms = {"cycle": cfg.lambda_cycle * back}
    if cfg.identity:                                    # a picture of style b is one already
        same = cycle_loss(a, G(a, "ba")) + cycle_loss(b, G(b, "ab"))
        terms["identity"] = cfg.identity * cfg.lambda_cycle * same
    return fake_a, fake_b, terms


def noisy(mu):
    """z ~ N(mu, I)."""
    return mu + torch.randn_like(mu)


def unit_terms(G, a, b, cfg):
    """UNIT, Liu 2017 eq. 3, 4, 7, 8, with its code's weights: one latent z ~ N(mu, I) for both
    styles. Its L1 is a mean."""
    mu_a, mu_b = G.encode(a, "a"), G.encode(b, "b")
    z_a, z_b = noisy(mu_a), noisy(mu_b)
    same_a, same_b = G.decode(z_a, "a"), G.decode(z_b, "b")
    fake_a, fake_b = G.decode(z_b, "a"), G.decode(z_a, "b")
    mu_ab, mu_ba = G.encode(fake_b, "b"), G.encode(fake_a, "a")
    back_a, back_b = G.decode(noisy(mu_ab), "a"), G.decode(noisy(mu_ba), "b")
    terms = {
        "reconstruction": 100 * (F.l1_loss(same_a, a) + F.l1_loss(same_b, b)),
        "cycle": 100 * (F.l1_loss(back_a, a) + F.l1_loss(back_b, b)),
        "kl": .1 * (latent_kl(mu_a) + latent_kl(mu_b)),
        "cycle kl": .1 * (latent_kl(mu_ab) + latent_kl(mu_ba)),
    }
    return fake_a, fake_b, terms


TERMS = {"cyclegan": cycle_terms, "unit": unit_terms}


# ---- data: two styles, no pairs ------------------------------------------------------------------

class Style(NamedTuple):
    """A data set: pictures uint8 (n, 3, S, S), those of training on the device; labels (n,) of the
    test pictures or None."""
    name: str
    train: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor


def load_style(names, size, device):
    """The Style of a folder, or of the first of these data sets that can be had."""
    name, train, _, _ = data.choose(names, size)
    test, labels, _ = data.load(name, size, "test")
    need(len(train) > 1 and train.shape[1] == 3, f"{name}: a style needs 2 pictures in colour")
    return Style(name, train.to(device), test, labels)


def load_pair(cfg, out, device):
    """(style A, style B) of a config; cfg.data becomes the name of the pair."""
    if cfg.a:
        cfg.data = "own"
        return load_style(cfg.a, cfg.size, device), load_style(cfg.b, cfg.size, device)
    pair_of = {PAIRS[name][0]: name for name in data.kept(cfg, out).split(",")}
    a = load_style(",".join(pair_of), cfg.size, device)
    cfg.data = pair_of[a.name]
    return a, load_style(PAIRS[cfg.data][1], cfg.size, device)


def paired(a, b):
    """Whether test picture i of both styles shows the same: only the drawn faces."""
    return {a.name, b.name} == set(PAIRS["faces"])


# ---- the game ------------------------------------------------------------------------------------

def draw_batch(images, n):
    """n random pictures of uint8 (N, 3, S, S) -> float (n, 3, S, S) in [-1, 1]."""
    return to_float(images[torch.randint(len(images), (n,), device=images.device)])


def judge(D, x_a, x_b):
    """What both discriminators say: pictures (N, 3, S, S) of either style -> logits (2 N, ...)."""
    return torch.cat([D["a"](x_a), D["b"](x_b)]).float()


@torch.no_grad()
def translate(G, x, direction):
    """Pictures uint8 (N, 3, S, S) -> the same, translated, on the CPU; in eval mode."""
    G.eval()
    device = next(G.parameters()).device
    y = torch.cat([to_uint8(G(to_float(part.to(device)), direction)).cpu() for part in x.split(32)])
    G.train()
    return y


def l1(x, y):
    """Mean absolute difference of uint8 pictures; 1 is black against white."""
    return (x / 255 - y / 255).abs().mean()


def draw_sheet(G, a, b, path):
    """Rows of test pictures, each way: the inputs a, UNIT's reconstructions aa, the translations
    ab, the way back aba, and the true b where it is known."""
    rows = {}
    for x, y, s, t in (a, b, "a", "b"), (b, a, "b", "a"):
        real = x.test[:12]
        rows[f"{s}: {x.name}"] = real
        if isinstance(G, UNIT):
            rows[s + s] = translate(G, real, s + s)
        rows[s + t] = translate(G, real, s + t)
        rows[s + t + s] = translate(G, rows[s + t], t + s)
        if paired(a, b):
            rows[f"true {t}"] = y.test[:12]
    data.sheet(list(rows.values()), path, list(rows), title=f"{type(G).__name__} {path.stem}")


def train(cfg, a, b, out, device):
    """The whole game, from out/last.pt if there is one. Returns (G, D, log).

    a, b: the two Styles. Writes sheets, log.csv and last.pt."""
    torch.manual_seed(cfg.seed)
    G, D = (data.place(net, device) for net in networks(cfg))
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), cfg.lr, (.5, .999), fused=True,
                                     weight_decay=cfg.weight_decay) for net in (G, D)]
    pool_a, pool_b = ImagePool(cfg.pool), ImagePool(cfg.pool)
    log = data.Log(out, cfg.steps)
    parts = dict(G=G, D=D, opt_G=opt_G, opt_D=opt_D, pool_a=pool_a, pool_b=pool_b, log=log)
    start = data.restore(parts, out / "last.pt", cfg, FREE - {"model"}, device)
    amp = data.autocast(cfg.amp, device)

    for step in range(start + 1, cfg.steps + 1):
        # What a step draws depends on nothing else: a resumed run is the uninterrupted one.
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        if cfg.decay:
            for opt in (opt_G, opt_D):
                opt.param_groups[0]["lr"] = cfg.lr * min(1., 2 - 2 * (step - 1) / cfg.steps)
        x_a, x_b = draw_batch(a.train, cfg.batch), draw_batch(b.train, cfg.batch)
        with amp:                                       # x_a, x_b (N, 3, S, S): not a pair
            fake_a, fake_b, other = TERMS[cfg.model](G, x_a, x_b, cfg)

            # ---- D: raise D(x), lower D(G(x)) in both styles; the pools detach the fakes ----
            real = judge(D, x_a, x_b)                   # real and fake apart, for batch norm
            before = judge(D, pool_a(fake_a), pool_b(fake_b))
        loss_D = 2 * d_lsgan(real, before)              # a mean over both styles: twice is the sum
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

        # ---- G: raise D(G(x)) on the same fakes, against the D just improved, and come back ----
        D.requires_grad_(False)                         # D's own gradients are not needed here
        with amp:
            after = judge(D, fake_a, fake_b)
        game = 2 * cfg.lambda_gan * g_lsgan(after)
        loss_G = game + sum(other.values())
        opt_G.zero_grad()
        loss_G.backward()                               # one step for both directions
        opt_G.step()
        D.requires_grad_(True)

        if step % cfg.log_every == 0 or step in (1, cfg.steps):     # only this waits for the GPU
            row = {"D": loss_D, "G": game, **other, "D(x)": real.mean(),
                   "D(G(x)) before": before.mean(), "D(G(x)) after": after.mean(),
                   "|dD|": data.grad_norm(D), "|dG|": data.grad_norm(G)}
            log.write(step, cfg.batch, **row)
        if step % cfg.sample_every == 0 or step == cfg.steps:
            draw_sheet(G, a, b, log.grid(step))
            data.save_checkpoint(out / "last.pt", parts, step, cfg)
    return G, D, log


# ---- scores --------------------------------------------------------------------------------------

def colour_map(x, y):
    """x under the map of colours M (4, 3) that takes it best to its true answers y, over all pixels
    min_M |[r g b 1] M - y|^2; uint8 (N, 3, H, W). M is fitted to the very answers it is scored on:
    a stricter bar than a map fitted to training pairs, and no network has seen an answer."""
    X = F.pad(to_float(x).movedim(1, 3), (0, 1), value=1.)          # (N, H, W, 4)
    Y = to_float(y).movedim(1, 3)                                   # (N, H, W, 3)
    M = torch.linalg.lstsq(X.flatten(0, 2), Y.flatten(0, 2)).solution
    return to_uint8((X @ M).movedim(3, 1))


def colour_match(x, y):
    """x with the mean and the deviation of each channel of y, where no answers are known; uint8."""
    s_x, mean_x = torch.std_mean(to_float(x), (0, 2, 3), keepdim=True)      # (1, 3, 1, 1)
    s_y, mean_y = torch.std_mean(to_float(y), (0, 2, 3), keepdim=True)
    return to_uint8((to_float(x) - mean_x) / s_x.clamp(min=1e-3) * s_y + mean_y)


def scores(G, x, y, way):
    """What is measured of the translation of style x into y, way "ab" or "ba" -> dict of floats:
    L1 (1 is black against white) of the cycle; of drawn faces L1 to the true answer; FID to style
    y; both also of doing nothing, of the best constant picture and of a map of colours; the share
    of drawn faces whose hair and eyes y's classifier reads as the input's."""
    known = paired(x, y)
    real = x.test if known else x.train[:1000].cpu()
    fake = translate(G, real, way)
    found = {"cycle": l1(translate(G, fake, way[::-1]), real)}
    constant = y.train.cpu().median(0).values.expand_as(real)       # the least mean L1
    mapped = colour_map(real, y.test) if known else colour_match(real, y.train.cpu())
    guesses = {"": fake, " identity": real, " constant": constant, " colour map": mapped}
    if known:
        for name, guess in guesses.items():
            found["L1" + name] = l1(guess, y.test)
    if len(y.train) >= 1000:                            # enough for a Gaussian of 128 features
        net = fid.classifier(y.name, real.shape[-1], x.train.device)
        for name, guess in guesses.items():
            result = fid.against(net, y.train, guess, y.name)
            found["FID" + name] = result["fid"]
            print(f"{way}{name}: {fid.line(result)}")
        if known:
            hair, eyes = net.attributes(fake)
            found["hair kept"] = (hair == x.labels // 11).float().mean()
            found["eyes kept"] = (eyes == x.labels % 11).float().mean()
    found = {f"{way} {name}": float(value) for name, value in found.items()}
    print("  ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


def verdict(metrics, way):
    """`ab L1 0.103, better than ab L1 constant 0.143`: the claim beside the best baseline."""
    for score in (f"{way} L1", f"{way} FID"):
        if score in metrics:
            best = min((name for name in metrics if score + " " in name), key=metrics.get)
            word = "better" if metrics[score] < metrics[best] else "NOT better"
            return f"{score} {metrics[score]:.3g}, {word} than {best} {metrics[best]:.3g}"
    return f"{way} cycle L1 {metrics[f'{way} cycle']:.3f}"


@torch.no_grad()
def probe_accuracy(G, a, b):
    """How well a linear probe tells UNIT's latents of style a from b's: 1/2 if both are one
    distribution, 1 if they are apart. w is least squares for w mu_a = 1, w mu_b = -1 on every
    other picture; the share of right signs is that of the rest."""
    n = min(len(a.train), len(b.train), 1000)
    mu_a, mu_b = G.encode(to_float(a.train[:n]), "a"), G.encode(to_float(b.train[:n]), "b")
    z = torch.cat([mu_a, -mu_b]).flatten(1).cpu()               # (2 n, d); w z should be 1 for all
    w = torch.linalg.lstsq(z[::2], torch.ones(n, 1)).solution
    return (z[1::2] @ w > 0).float().mean().item()


PANELS = [
    ("losses of the game", ["D", "G"]),
    ("D on real and fake, before and after its step", ["D(x)", "D(G(x)) before", "D(G(x)) after"]),
    ("gradient norms", ["|dD|", "|dG|"]),
    ("what else G minimises, weighted", ["cycle", "identity", "reconstruction", "kl", "cycle kl"]),
]


def evaluate(cfg, G, D, log, a, b, out):
    """Pictures, metrics and result.json of a run."""
    draw_sheet(G, a, b, out / "translations.png")
    metrics = scores(G, a, b, "ab") | scores(G, b, a, "ba")
    headline = f"{verdict(metrics, 'ab')}; {verdict(metrics, 'ba')}"
    if isinstance(G, UNIT):
        metrics["probe accuracy"] = probe_accuracy(G, a, b)
        headline += f"; probe accuracy {metrics['probe accuracy']:.1%}"
    data.finish(out, cfg, log, dict(G=G, D=D), metrics, PANELS, headline)


def translate_files(cfg, out, device):
    """--translate: each picture, cropped to a square and scaled, to out/translated-<way>/, and all
    of them on out/translated-<way>.png, a translation beside its input."""
    state = data.load_checkpoint(out / "last.pt", device)
    trained = state.get("config", {})
    need("lambda_cycle" in trained, f"{out}/last.pt is no checkpoint of cyclegan.py")
    G, _ = networks(CycleConfig(**trained))
    G.load_state_dict(state["G"])
    source = Path(cfg.translate)
    files = [source] if source.is_file() else data.pictures(source)
    x = data.read_all(files, trained["size"])
    y = translate(G.to(device), x, cfg.direction)
    folder = out / f"translated-{cfg.direction}"
    for i, file in enumerate(files):                    # numbered: x.png and x.jpg stay two
        data.save(data.as_image(y[i]), folder / f"{file.stem}-{i}.png")
    data.save(data.grid(torch.cat([x, y], 3), 4), f"{folder}.png")     # (N, 3, S, 2 S)
    print(f"wrote    {len(files)} to {folder} and all beside their inputs to {folder}.png")


# ---- main ----------------------------------------------------------------------------------------

def main(argv=None):
    """The command line."""
    _, changes = data.arguments(CycleConfig, argv)
    cfg = config(**changes)
    need(bool(cfg.a) == bool(cfg.b), "--a and --b go together: two folders or sets, one a style")
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
    G, D, log = train(cfg, a, b, out, device)
    evaluate(cfg, G, D, log, a, b, out)


if __name__ == "__main__":
    data.run_main(main)
