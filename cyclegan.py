"""cyclegan.py: CycleGAN and UNIT: translate pictures between two styles without a single pair to learn from.

    python cyclegan.py                                      Apple <-> Windows emojis, else faces drawn here
    python cyclegan.py --data faces                         cartoon faces: the true translations are known
    python cyclegan.py --model unit                         UNIT instead of CycleGAN
    python cyclegan.py --a photos/ --b paintings/ --size 128
    python cyclegan.py --translate me.jpg --direction ab    with the trained checkpoint
    python cyclegan.py --data faces --sweep 0,0.005,0.01,0.015,0.025,0.05,0.1,0.5,1 --steps 400

G_ab: A -> B and G_ba: B -> A translate; D_a and D_b tell real from translated pictures of their style. CycleGAN
(Zhu 2017, eq. 3):  L = L_GAN(G_ab, D_b) + L_GAN(G_ba, D_a) + lambda (|G_ba(G_ab(a)) - a|_1 + |G_ab(G_ba(b)) - b|_1).
The GAN terms alone would let G_ab draw any picture of style B; the way back must find a again, so what a shows has to
survive. Too small a lambda and the input is ignored; too large and it is only coded so that it comes back.
UNIT (Liu 2017) has one latent space for both styles, E_a(a) ~ E_b(b): two VAEs that share the last block of the
encoders and the first of the decoders; a translation is Dec_b(E_a(a)).

Measured, seed 11, torch 2.13, one thread of an AMD EPYC (Zen 5, bfloat16) with other work beside it; FID on features of
fid.classifier, real against 1,000 translated; what untranslated pictures have in brackets:
    --data faces        5000 steps, 16 min: L1 to the true picture A to B 0.103 (0.372), B to A 0.101 (0.372);
                        hair colour kept 32% both ways: shapes stay, colours are permuted, FID 7.4 (83) and 14.0 (127)
    --data emojis       5000 steps, 12.5 min: FID 1.59 (12.5) and 0.83 (15.1), cycle L1 0.044 and 0.046
    --model unit        on emojis, 1600 steps, 8 min: FID 0.70 (12.5) and 0.83 (15.1), cycle L1 0.095 and 0.110
    --sweep, as above   10 min: L1 to the true picture (0.372), hair kept, FID (105): lambda 0: 0.188, 10%, 154;
                        lambda 0.015: 0.118, 32%, 22; lambda 1: 0.247, 7%, 132
"""
import dataclasses, sys, time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import fid
from data import UserError, to_float, to_uint8


@dataclass
class Config:
    model: str = "cyclegan"         # cyclegan or unit
    data: str = "emojis,faces"      # emojis, faces, or both in order of preference
    a: str = ""                     # style A instead of --data: a folder of pictures or a data set
    b: str = ""                     # style B, likewise
    size: int = 32                  # picture side in pixels: 32 (a course's networks) or 64, 128, 256 (the paper's)
    width: int = 64                 # channels of the first layer of D and CycleGAN's G for size > 32; 32 for a laptop
    lambda_cycle: float = 0.015     # weight of CycleGAN's cycle loss, an L1 summed over the pixels
    identity: float = 0.0           # weight of the identity loss in units of lambda_cycle (the paper: 0.5)
    pool: int = 0                   # translations kept to show D old ones too (the paper: 50)
    lr: float = 3e-4                # Adam's learning rate
    beta1: float = 0.5              # Adam's first moment decay
    weight_decay: float = 0.0       # Adam's weight decay
    decay: int = 0                  # 1: the learning rate falls linearly to 0 over the second half
    batch: int = 32                 # pictures of each style a batch
    steps: int = 5000               # steps; 0: evaluate only
    seed: int = 11                  # seed of weights and batches
    device: str = "auto"            # auto, cuda, mps, cpu
    amp: int = -1                   # bfloat16 autocast: 1 on, 0 off, -1 where the hardware has it
    log_every: int = 50             # steps between two lines of the log
    sample_every: int = 200         # steps between two sample sheets and checkpoints
    out: str = ""                   # folder of the run; empty: out/<model>-<what differs>
    resume: int = 0                 # 1: go on from the folder's checkpoint, if there is one
    overwrite: int = 0              # 1: replace the run in the folder
    translate: str = ""             # picture or folder to translate with the checkpoint in --out; trains nothing
    direction: str = "ab"           # of --translate: ab or ba
    sweep: str = ""                 # several values of lambda_cycle: one run each, one sheet and curves over lambda


def recipe(model, size):
    """What differs from the defaults above, a course's 32 x 32 CycleGAN: UNIT 0.2; beyond 32 Zhu 2017, sec. 4 and 7."""
    large = dict(lr=2e-4, batch=1, decay=1, pool=50) if size > 32 else {}
    if model == "unit":
        return {**large, "lr": 1e-4, "weight_decay": 1e-4}
    return {**large, "identity": .5, "lambda_cycle": 10 / (3 * size ** 2)} if large else {}


# Fields that say where and how long, not what is trained: they neither name the folder nor forbid a resume.
FREE = {"model", "steps", "device", "amp", "log_every", "sample_every", "out", "resume", "overwrite", "translate",
        "direction", "sweep"}
STYLES = {"emojis": ("emoji-apple", "emoji-windows"), "faces": ("faces-a", "faces-b")}


# ---- networks: 32 x 32 ---------------------------------------------------------------------------------------------

def conv(i, o, k, stride, padding, norm=nn.BatchNorm2d, act=nn.ReLU):
    """Convolution without bias, norm, activation as a list of layers; None leaves a part out."""
    return [nn.Conv2d(i, o, k, stride, padding, bias=False)] + [f(o) for f in (norm,) if f] + [f() for f in (act,) if f]


def upconv(i, o, norm=nn.BatchNorm2d, act=nn.ReLU):
    """Nearest upsampling x2 and a 5x5 convolution: no checkerboard as from a transposed one."""
    return [nn.Upsample(scale_factor=2)] + conv(i, o, 5, 1, 2, norm, act)


class Residual(nn.Module):
    """relu(x + norm(conv3x3(x)))."""

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
    """Convolution with bias, instance norm, activation; stride 1 reflects at the border; `up`: transposed, doubles."""
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


# ---- UNIT: two encoders, two decoders, one latent space ------------------------------------------------------------

def leaky(i, o, k, stride):
    """Convolution with bias and LeakyReLU. No norm outside the residual branches: it would wash out the colours."""
    return [nn.Conv2d(i, o, k, stride, k // 2), nn.LeakyReLU()]


class Encoder(nn.Sequential):
    """(N, 3, S, S) -> (N, 64, S/4, S/4): what one style's encoder has for itself."""

    def __init__(self):
        super().__init__(*leaky(3, 32, 5, 2), *leaky(32, 64, 5, 2), ResBlock(64))


class Decoder(nn.Sequential):
    """(N, 64, S/4, S/4) -> (N, 3, S, S) in [-1, 1]: what one style's decoder has for itself."""

    def __init__(self):
        super().__init__(ResBlock(64), nn.Upsample(scale_factor=2), *leaky(64, 32, 5, 1),
                         nn.Upsample(scale_factor=2), nn.Conv2d(32, 3, 5, 1, 2), nn.Tanh())


class UNIT(nn.Module):
    """Two VAEs that share the block `into` at the end of their encoders and `outof` at the start of their decoders.

    G(x, "ab") translates through the latent mean; training uses encode, noise and decode."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict(dict(a=Encoder(), b=Encoder()))
        self.decoder = nn.ModuleDict(dict(a=Decoder(), b=Decoder()))
        self.into, self.outof = ResBlock(64), ResBlock(64)

    def encode(self, x, style):
        """x (N, 3, S, S) in [-1, 1] -> mean of its latent, mu (N, 64, S/4, S/4); z ~ N(mu, I)."""
        return self.into(self.encoder[style](x))

    def decode(self, z, style):
        """z (N, 64, S/4, S/4) -> picture (N, 3, S, S) in [-1, 1]."""
        return self.decoder[style](self.outof(z))

    def forward(self, x, direction):
        return self.decode(self.encode(x, direction[0]), direction[1])


def networks(cfg):
    """(G, D): G(x, "ab") translates, D["a"] and D["b"] judge. One parameters() each, so one optimiser each."""
    G = UNIT() if cfg.model == "unit" else CycleGAN(cfg.size, cfg.width)
    return G, nn.ModuleDict({s: PatchGAN(cfg.width) if cfg.size > 32 else Discriminator() for s in "ab"})


# ---- losses: real, fake are logits; pictures are in [-1, 1]; mean over the batch -----------------------------------

def d_lsgan(real, fake):
    """1/2 E (D(x) - 1)^2 + 1/2 E D(G(x))^2, Zhu 2017 sec. 4 (Mao 2017 eq. 2); 0.25 at D = 1/2."""
    return ((real - 1) ** 2).mean() / 2 + (fake ** 2).mean() / 2


def g_lsgan(fake):
    """E (D(G(x)) - 1)^2, Zhu 2017 sec. 4; 0.25 at D = 1/2."""
    return ((fake - 1) ** 2).mean()


def d_bce(real, fake):
    """-E log D(x) - E log(1 - D(G(z))), Liu 2017 eq. 6; 1.386 = 2 ln 2 at D = 1/2."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def g_bce(fake):
    """-E log D(G(z)): the log D trick; 0.693 = ln 2 at D = 1/2."""
    return F.softplus(-fake).mean()


def cycle_loss(x, x_back):
    """E |G_ba(G_ab(x)) - x|_1, Zhu 2017 eq. 2: SUMMED over a picture's C H W numbers, averaged over the batch."""
    return (x_back - x).abs().flatten(1).sum(1).mean()


def kl(mu):
    """E mu^2: twice KL(N(mu, I) | N(0, I)) for one number of the latent, Liu 2017 eq. 5, as UNIT 0.2 weighs it."""
    return (mu.float() ** 2).mean()


def weights(cfg):
    """Factor of each term of G's loss. UNIT 0.2's are for L1 averaged over the pixels, CycleGAN's for the sum."""
    if cfg.model == "unit":
        return dict(gan=10., rec=100., kl=.1, cycle=100., cycle_kl=.1)
    return dict(gan=1., cycle=cfg.lambda_cycle, identity=cfg.identity * cfg.lambda_cycle)


class ImagePool:
    """D's memory (Zhu 2017 sec. 4, Shrivastava 2017): the last `size` translations; 0 is no memory.

    pool(x_fake (N, C, H, W)) -> as many: while it fills, the new ones; then each with probability 1/2 an old one, whose
    place the new one takes. Draws from torch's CPU generator."""

    def __init__(self, size):
        self.size, self.held = size, []

    def __call__(self, x_fake):
        out = []
        for x in x_fake.detach():
            if len(self.held) < self.size:
                self.held.append(x.clone())                              # not a view, which would keep its whole batch
            elif self.size and torch.rand(()) < .5:
                i = int(torch.randint(self.size, ()))
                x, self.held[i] = self.held[i], x.clone()
            out.append(x)
        return torch.stack(out).contiguous(memory_format=torch.channels_last)

    def state_dict(self):
        return dict(held=list(self.held))

    def load_state_dict(self, state):
        self.held = list(state["held"])


# ---- data: two styles, no pairs ------------------------------------------------------------------------------------

Style = namedtuple("Style", "name images test labels")          # uint8 (N, 3, S, S), (M, 3, S, S), (M,) or None


def load_style(names, size):
    """The first of these data sets or the folder, in colour."""
    name, images, _, _ = data.choose(names, size)
    if len(images) < 2:
        raise UserError(f"{name} has {len(images)} picture; each style needs at least 2")
    test, labels, classes = data.load(name, size, "test")
    colour = lambda x: x.expand(-1, 3, -1, -1).contiguous()
    return Style(name, colour(images), colour(test), labels if len(classes) == len(data.FACES) else None)


def load_styles(cfg):
    """(style A, style B) of a Config."""
    if cfg.a or cfg.b:
        return load_style(cfg.a, cfg.size), load_style(cfg.b, cfg.size)
    a = load_style(",".join(STYLES[s][0] for s in cfg.data.split(",")), cfg.size)
    return a, load_style(dict(STYLES.values())[a.name], cfg.size)


def named(cfg, a, b):
    """The Config with the styles it really got, so that a run is never resumed on other data than it began with."""
    return dataclasses.replace(cfg, data="", a=a.name, b=b.name)


# ---- training ------------------------------------------------------------------------------------------------------

def optimiser(net, cfg):
    """Adam over a network; fused: one kernel for all tensors. Shared layers are in net.parameters() once."""
    return torch.optim.Adam(net.parameters(), cfg.lr, (cfg.beta1, .999), weight_decay=cfg.weight_decay, fused=True)


def grad_norm(net):
    """L2 norm of all gradients of a network as one vector."""
    return torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()


def draw_batch(images, n):
    """n random pictures of uint8 (N, 3, S, S) -> float (n, 3, S, S) in [-1, 1]."""
    i = torch.randint(len(images), (n,), device=images.device)
    return to_float(images[i]).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def translate(G, x, direction):
    """float (N, 3, S, S) in [-1, 1] -> the same, translated; eval mode, and G is left as it was."""
    was = G.training
    G.eval()
    y = torch.cat([G(t, direction).float() for t in x.split(100 if x.shape[-1] <= 64 else 8)])
    G.train(was)
    return y


def l1(x, y):
    """Mean absolute difference of pictures in [-1, 1], on the scale where black is 0 and white is 1."""
    return (x - y).abs().mean() / 2


def paired(a, b):
    """Whether test picture i of both styles shows the same: only the drawn faces."""
    return {a.name, b.name} == set(STYLES["faces"])


def sample_sheet(G, a, b, path, title, n=10):
    """Rows input / translation / cycle of test pictures, both ways; UNIT's reconstruction; the true answer."""
    rows, left, device = [], [], next(G.parameters()).device
    for x, y, way in ((a, b, "ab"), (b, a, "ba")):
        X, Y = way.upper()
        real = to_float(x.test[:n].to(device))
        fake = translate(G, real, way)
        rows += [real, fake, translate(G, fake, way[::-1])]
        left += [f"{X}: {x.name[:20]}", f"{X} to {Y}", f"{X} to {Y} to {X}"]
        if isinstance(G, UNIT):
            rows, left = rows + [translate(G, real, way[0] * 2)], left + [f"{X} to {X}"]
        if paired(a, b):
            rows, left = rows + [y.test[:n]], left + [f"true {Y}"]
    return data.sheet(rows, path, left, title=title)


def train(cfg, a, b, out, device):
    """The whole training: from out/last.pt when cfg.resume, to cfg.steps. Returns (G, D, step, log).

    a, b: the two Styles, their images uint8 (N, 3, S, S) on the device; writes sheets, log.csv and last.pt to out."""
    torch.manual_seed(cfg.seed)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in networks(cfg))
    opt_G, opt_D = optimiser(G, cfg), optimiser(D, cfg)
    pool_a, pool_b = ImagePool(cfg.pool), ImagePool(cfg.pool)
    d_loss, g_loss = (d_bce, g_bce) if cfg.model == "unit" else (d_lsgan, g_lsgan)
    parts = dict(G=G, D=D, opt_G=opt_G, opt_D=opt_D, pool_a=pool_a, pool_b=pool_b)
    start = 0
    if cfg.resume and (out / "last.pt").exists():
        start = data.restore(parts, out / "last.pt", cfg, FREE - {"model"}, device)
    log, stop = data.Log(out, cfg.steps, start), data.interrupts()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=data.use_bf16(cfg.amp, device))
    probability = torch.sigmoid if cfg.model == "unit" else lambda t: t
    broken = lambda step: UserError(f"a loss, gradient or weight is not finite, seen at step {step}; the last good checkpoint "
                                    f"is in {out}: try a lower --lr")
    noisy = lambda mu: mu + torch.randn_like(mu)                        # z ~ N(mu, I)
    mark, marked = time.monotonic(), start

    for step in range(start + 1, cfg.steps + 1):
        if cfg.decay:
            for opt in (opt_G, opt_D):                                  # constant, then linearly to 0
                opt.param_groups[0]["lr"] = cfg.lr * min(1., 2 * (1 - (step - 1) / cfg.steps))
        x_a, x_b = draw_batch(a.images, cfg.batch), draw_batch(b.images, cfg.batch)      # (N, 3, S, S), unrelated

        # ---- D: raise D(x), lower D(G(x)) in both styles ----
        with amp:
            if cfg.model == "unit":
                mu_a, mu_b = G.encode(x_a, "a"), G.encode(x_b, "b")
                z_a, z_b = noisy(mu_a), noisy(mu_b)
                fake_b, fake_a = G.decode(z_a, "b"), G.decode(z_b, "a")
            else:
                fake_b, fake_a = G(x_a, "ab"), G(x_b, "ba")
            real = torch.cat([D["a"](x_a), D["b"](x_b)])                # two passes a style: batch norm sees real and
            fake = torch.cat([D["a"](pool_a(fake_a)), D["b"](pool_b(fake_b))])   # fake apart; the pools detach from G
        loss_D = 2 * d_loss(real.float(), fake.float())                 # the mean over both styles, twice: their sum
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

        # ---- G: raise D(G(x)) on the same fakes, against the D just improved, and come back to x ----
        D.requires_grad_(False)                                         # D's own gradients are not needed here
        with amp:
            fake2 = torch.cat([D["a"](fake_a), D["b"](fake_b)])
            terms = dict(gan=2 * g_loss(fake2.float()))
            if cfg.model == "unit":
                mu_ab, mu_ba = G.encode(fake_b, "b"), G.encode(fake_a, "a")
                back_a, back_b = G.decode(noisy(mu_ab), "a"), G.decode(noisy(mu_ba), "b")
                terms["rec"] = F.l1_loss(G.decode(z_a, "a"), x_a) + F.l1_loss(G.decode(z_b, "b"), x_b)
                terms["kl"], terms["cycle_kl"] = kl(mu_a) + kl(mu_b), kl(mu_ab) + kl(mu_ba)
                terms["cycle"] = F.l1_loss(back_a, x_a) + F.l1_loss(back_b, x_b)
            else:
                back_a, back_b = G(fake_b, "ba"), G(fake_a, "ab")
                terms["cycle"] = cycle_loss(x_a, back_a) + cycle_loss(x_b, back_b)
                if cfg.identity:                                        # a picture of style B is its own translation
                    terms["identity"] = cycle_loss(x_b, G(x_b, "ab")) + cycle_loss(x_a, G(x_a, "ba"))
        loss_G = sum(weights(cfg)[k] * term for k, term in terms.items())
        opt_G.zero_grad()
        loss_G.backward()                                               # one step for both directions
        opt_G.step()
        D.requires_grad_(True)

        if step % cfg.log_every == 0 or step in (1, cfg.steps):      # the only place that waits for the device
            with torch.no_grad():
                row = {"D": loss_D, "G": terms["gan"], "D(x)": probability(real.float()).mean(),
                       "z1": probability(fake.float()).mean(), "z2": probability(fake2.float()).mean(),
                       "|dD|": grad_norm(D), "|dG|": grad_norm(G), "cycle": (l1(x_a, back_a) + l1(x_b, back_b)) / 2}
                share = dict(rec=4, kl=2, cycle_kl=2, identity=4 * x_a[0].numel())       # means over styles and pixels,
                row |= {k: terms[k] / n for k, n in share.items() if k in terms}         # an L1 of 1 is black to white
                if paired(a, b):                                        # on test pictures, against the true answer
                    t_a, t_b = (to_float(s.test[:100].to(device)) for s in (a, b))
                    row |= {"L1 ab": l1(translate(G, t_a, "ab"), t_b), "L1 ba": l1(translate(G, t_b, "ba"), t_a)}
                row = dict(zip(row, torch.stack([v.float() for v in row.values()]).tolist()))
            if not np.isfinite(list(row.values())).all():
                raise broken(step)
            log.write(step, (step - marked) * cfg.batch / (time.monotonic() - mark), **row)
            mark, marked = time.monotonic(), step
        last = step == cfg.steps or bool(stop)
        if last or step % cfg.sample_every == 0 or step == 1:
            sample_sheet(G, a, b, out / f"{step:06d}.png", f"{cfg.model}, step {step}")
            mark, marked = time.monotonic(), step
        if last or step % cfg.sample_every == 0:
            if not data.finite(G, D):                                   # never over the last good checkpoint
                raise broken(step)
            data.save_checkpoint(out / "last.pt", dict({k: v.state_dict() for k, v in parts.items()}, step=step,
                                 config=dataclasses.asdict(cfg), rng=data.rng_state()))
        if stop and last:                                               # Ctrl-C since `last` was asked: at the next step
            print(f"\nstopped at step {step}; the same command with --resume 1 goes on")
            raise KeyboardInterrupt
    data.plain_signals()
    return G, D, max(start, cfg.steps), log


# ---- evaluation ----------------------------------------------------------------------------------------------------

def psnr(x, y):
    """10 log10(1 / mean squared error) in dB, mean over the pictures; pictures in [-1, 1] count as [0, 1]."""
    return (-10 * ((x - y) / 2).square().flatten(1).mean(1).clamp(min=1e-10).log10()).mean()


def colour_map(x, y):
    """The affine colour map that best takes x to y, both (N, 3, H, W): least squares over all pixels, applied to x.

    min_M |[r g b 1] M - y|^2 with M (4, 3): what can be had by changing colours alone, fitted on the true answers."""
    pixels = lambda t: t.permute(0, 2, 3, 1).reshape(-1, 3).double()
    P = F.pad(pixels(x), (0, 1), value=1.)                              # (N H W, 4)
    M = torch.linalg.solve(P.T @ P + 1e-9 * torch.eye(4, dtype=P.dtype), P.T @ pixels(y))
    n, c, h, w = x.shape
    return (P @ M).view(n, h, w, c).permute(0, 3, 1, 2).float().clamp(-1, 1)


def direction_metrics(G, x, y, way, size):
    """Metrics of the translation of style x into style y on test pictures: dict of floats."""
    device = next(G.parameters()).device
    real = to_float(x.test)
    fake = translate(G, real.to(device), way)
    back = translate(G, fake, way[::-1]).cpu()
    fake, m = fake.cpu(), {}
    m["cycle"], m["change"] = l1(real, back), l1(real, fake)
    if paired(x, y):
        true = to_float(y.test)
        mapped = colour_map(real, true)
        m |= {"L1": l1(fake, true), "L1 identity": l1(real, true), "L1 colour map": l1(mapped, true),
              "PSNR": psnr(fake, true), "PSNR identity": psnr(real, true), "PSNR colour map": psnr(mapped, true)}
    if y.labels is not None and x.labels is not None:
        hair, eyes = fid.classifier(y.name, size, device).attributes(to_uint8(fake))
        m |= {"hair kept": (hair == x.labels // 11).float().mean(), "eyes kept": (eyes == x.labels % 11).float().mean()}
    if min(len(x.images), len(y.images)) >= 1000:                       # enough for a Gaussian of 128 features
        source = x.test if len(x.test) >= 500 else x.images[torch.linspace(0, len(x.images) - 1, 1000).long()].cpu()
        fake = fake if len(x.test) >= 500 else translate(G, to_float(source).to(device), way).cpu()
        real, other = y.images[:4000:2].cpu(), y.images[1:4000:2].cpu()
        net = fid.classifier(y.name, size, device)
        s = fid.score(net, real, to_uint8(fake), other)
        m |= {"FID": s["fid"], "FID floor": s["floor"]}
        m["FID identity"] = fid.fid(net.features(real), net.features(source))
        print(f"{way}       {fid.line(s)}; untranslated {m['FID identity']:.3g}; {len(source):,} "
              f"{'test' if len(x.test) >= 500 else 'training'} pictures translated")
    return {f"{way} {k}": float(v) for k, v in m.items()}


PANELS = [("losses (GAN terms)", ["D", "G"]),
          ("D of real, of fake before (z1) and after (z2) its step", ["D(x)", "z1", "z2"]),
          ("L1 of cycle, reconstruction, identity; black 0, white 1", ["cycle", "rec", "identity"]),
          ("L1 to the true picture, test", ["L1 ab", "L1 ba"]), ("gradient norms", ["|dD|", "|dG|"]),
          ("UNIT's mean mu^2, direct and of the cycle", ["kl", "cycle_kl"])]


def headline(m):
    """The numbers that matter most, from A to B and back: distance to the true answer where it is known, FID, cycle."""
    both = lambda k, p: " and ".join(format(m[f"{w} {k}"], p) for w in ("ab", "ba"))
    parts = ["L1 to the true picture " + " and ".join(f"{m[f'{w} L1'] / m[f'{w} L1 identity']:.1%}" for w in ("ab", "ba")) +
             " of doing nothing's"] if "ab L1" in m else []
    parts += [f"FID {both('FID', '.3g')} (classifier; untranslated {both('FID identity', '.3g')})"] if "ab FID" in m else []
    return "; ".join(parts + [f"cycle L1 {both('cycle', '.3f')}"])


def evaluate(cfg, G, D, step, log, a, b, out, device):
    """Pictures, metrics and result.json of a run. Returns the metrics."""
    wrote = [sample_sheet(G, a, b, out / "translations.png", f"{cfg.model}, step {step}", 16)]
    if log.table:
        sheets = sorted(out.glob("[0-9]*.png"))
        wrote += [data.curves(out / "curves.png", log.table, PANELS), data.gif(out / "training.gif", sheets)]
    m = direction_metrics(G, a, b, "ab", cfg.size) | direction_metrics(G, b, a, "ba", cfg.size)
    count = {"G": sum(p.numel() for p in G.parameters()), "D": sum(p.numel() for p in D.parameters())}
    seconds, line = log.table["seconds"][-1] if log.table else 0., headline(m)
    data.write_json(out / "result.json", dict(
        command=data.command(out, cfg.steps), config=dataclasses.asdict(cfg), step=step, device=str(device),
        versions=data.versions(), data={s: dict(name=x.name, n=len(x.images), sha256=data.fingerprint(x.images))
                                        for s, x in (("a", a), ("b", b))}, parameters=count, seconds=seconds,
        images_per_second=step * cfg.batch / seconds if seconds else 0., metrics=m, headline=line))
    keys = [k[3:] for k in m if k[:2] == "ab"]
    print(f"{'test pictures':18}{'A to B':>10}{'B to A':>10}")
    print("\n".join(f"{k:18}{m[f'ab {k}']:10.4g}{m.get(f'ba {k}', np.nan):10.4g}" for k in keys))
    print("wrote    " + " ".join(str(p) for p in wrote + [out / "result.json"]))
    print(line)
    return m


def translate_files(cfg, out, device):
    """--translate: each picture, cropped to a square and resized to the network's size, to out/translated-<way>/."""
    state = data.load_checkpoint(out / "last.pt", device)
    try:
        trained = Config(**state["config"])
        G, _ = networks(trained)
        G.load_state_dict(state["G"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as e:
        raise UserError(f"{out / 'last.pt'} is no checkpoint of this script ({str(e).splitlines()[0]})") from None
    source = Path(cfg.translate)
    files = data.pictures(source) if source.is_dir() else [source]
    if not files[0].exists():
        raise UserError(f"no picture or folder {source} to translate")
    x = torch.stack([data.fit(data.read_picture(f), trained.size) for f in files])
    y = translate(G.to(device), to_float(x).to(device), cfg.direction)
    folder = out / f"translated-{cfg.direction}"
    for i, f in enumerate(files):                                       # numbered: a/x.png and b/x.jpg stay two
        data.save(data.grid(y[i:i + 1], 1, pad=0), folder / f"{f.stem}{f'-{i}' if len(files) > 1 else ''}.png")
    data.sheet([x[:12], y[:12]], folder / "sheet.png", left=["input", "translation"])
    print(f"wrote    {len(files)} pictures and sheet.png to {folder}")


def run_sweep(cfg, out, device):
    """--sweep: a run for each lambda, then input, translation and cycle of all on one sheet, and errors over lambda."""
    a, b = load_styles(cfg)
    lambdas, table, n = [float(v) for v in cfg.sweep.split(",")], {}, 14
    real = to_float(a.test[:n].to(device))
    rows, left = [real] + ([b.test[:n]] if paired(a, b) else []), ["input"] + (["true answer"] if paired(a, b) else [])
    for value in lambdas:
        one = dataclasses.replace(named(cfg, a, b), lambda_cycle=value, sweep="", out=str(out / f"lambda-{value:g}"))
        G, m = run(one, a, b, data.open_run(one.out, cfg.resume, cfg.overwrite), device)
        fake = translate(G, real, "ab")
        rows += [fake, translate(G, fake, "ba")]
        left += [f"lambda {value:g}", "and back"]
        for k, v in m.items():
            table.setdefault(k, []).append(v)
    table["log10 lambda (0 stands at -3)"] = np.log10(np.maximum(lambdas, 1e-3)).tolist()
    mean = lambda k: [(p + q) / 2 for p, q in zip(table[f"ab {k}"], table[f"ba {k}"])]
    names = "cycle,change,L1,L1 identity,hair kept,eyes kept,FID,FID identity".split(",")
    names = [k for k in names if f"ab {k}" in table]
    table |= {k: mean(k) for k in names}
    data.sheet(rows, out / "sweep.png", left, title=f"lambda_cycle, {cfg.steps} steps each, A to B and back")
    panels = [("L1 of the cycle, and to the true picture", ["cycle", "L1", "L1 identity"]),
              ("share of hair and eye colours kept", ["hair kept", "eyes kept"]),
              ("L1 between translation and input", ["change"]), ("FID to the target style", ["FID", "FID identity"])]
    data.curves(out / "sweep-curves.png", table, panels, x="log10 lambda (0 stands at -3)")
    lines = ["| lambda | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {v:g} | " + " | ".join(f"{table[k][i]:.4g}" for k in names) + " |" for i, v in enumerate(lambdas)]
    data.write_text(out / "sweep.md", "\n".join(lines) + "\n")
    print("\n".join(lines + [f"wrote    {out / 'sweep.png'} {out / 'sweep-curves.png'} {out / 'sweep.md'}"]))


# ---- main ----------------------------------------------------------------------------------------------------------

def check(cfg):
    """Combinations that make no sense end here, in one line."""
    for field, known in dict(model=("cyclegan", "unit"), size=(32, 64, 128, 256), direction=("ab", "ba")).items():
        if getattr(cfg, field) not in known:
            raise UserError(f"--{field} {getattr(cfg, field)} is unknown; one of: {' '.join(map(str, known))}")
    if bool(cfg.a) != bool(cfg.b):
        raise UserError(f"--{'a' if cfg.a else 'b'} needs --{'b' if cfg.a else 'a'} too: two folders, one a style")
    if not cfg.a and not set(cfg.data.split(",")) <= set(STYLES):
        raise UserError(f"--data {cfg.data} is unknown; one of: {' '.join(STYLES)}; or two folders with --a and --b")
    for field in ("width", "log_every", "sample_every", "batch"):
        if getattr(cfg, field) < 1:
            raise UserError(f"--{field.replace('_', '-')} must be at least 1, not {getattr(cfg, field)}")
    for field in ("steps", "lambda_cycle", "identity", "pool", "weight_decay"):
        if not getattr(cfg, field) >= 0:
            raise UserError(f"--{field.replace('_', '-')} must not be negative, not {getattr(cfg, field)}")
    if cfg.lr <= 0:
        raise UserError(f"--lr must be positive, not {cfg.lr}")
    if cfg.batch < 2 and cfg.size <= 32:
        raise UserError(f"--batch {cfg.batch}: batch norm needs at least 2 pictures")
    if cfg.model == "unit" and (cfg.identity or cfg.sweep):
        raise UserError("--identity and --sweep belong to --model cyclegan; UNIT has its own five weights")
    try:
        ok = all(float(v) >= 0 for v in cfg.sweep.split(",")) if cfg.sweep else True
    except ValueError:
        ok = False
    if not ok or (cfg.sweep and cfg.steps == 0):
        raise UserError(f"--sweep {cfg.sweep} --steps {cfg.steps}: it takes numbers >= 0 with commas, and steps > 0")


def run(cfg, a, b, out, device):
    """Train and evaluate one model. Returns (G, metrics)."""
    v = data.versions()
    print(f"run      {out}  device {device} {v['gpu'] if device.type == 'cuda' else ''} ({v['threads']} threads)  seed {cfg.seed}  torch {v['torch']}"
          f"  bfloat16 {'on' if data.use_bf16(cfg.amp, device) else 'off'}", flush=True)
    if cfg.model == "cyclegan":
        k = 3 * cfg.size ** 2
        print(f"lambda   {cfg.lambda_cycle:.4g} on the L1 summed over a picture's {k:,} numbers = "
              f"{cfg.lambda_cycle * k:.3g} on the mean L1, where the paper has 10", flush=True)
    a, b = (s._replace(images=s.images.to(device)) for s in (a, b))
    G, D, step, log = train(cfg, a, b, out, device)
    return G, evaluate(cfg, G, D, step, log, a, b, out, device)


def main(argv=None):
    """The command line."""
    cfg, changes = data.arguments(Config, argv)
    cfg = Config(**{**dataclasses.asdict(cfg), **recipe(cfg.model, cfg.size), **changes})
    check(cfg)
    tail = "".join(f"-{k}{str(v).replace('/', '_').replace(',', '+')}" for k, v in changes.items() if k not in FREE)
    out = Path(cfg.out or f"out/{'sweep' if cfg.sweep else cfg.model}{tail}")
    device = data.device(cfg.device)
    if cfg.translate:
        return translate_files(cfg, out, device)
    if cfg.sweep:
        return run_sweep(cfg, out, device)
    if cfg.steps == 0:
        cfg.resume = 1
        if not (out / "last.pt").exists():
            raise UserError(f"no checkpoint {out / 'last.pt'}: train first, or name the run's folder with --out")
    a, b = load_styles(cfg)
    run(named(cfg, a, b), a, b, data.open_run(out, cfg.resume, cfg.overwrite), device)


if __name__ == "__main__":
    data.run_main(main)
