"""BigGAN-deep: pictures between two of its classes, and a t-SNE map of all classes.

    python biggan_interp.py                                 # published weights, else a small model
    python biggan_interp.py --pairs "282, 283; tiger cat, goldfish"     # between your own classes
    python biggan_interp.py --model small                   # trained here, on drawn faces
    python biggan_interp.py --model published               # stop if the weights cannot be had

BigGAN (Brock 2019) learns an embedding for each class, a vector r. With one fixed noise z, the
pictures G(z, r) for r = alpha r1 + (1 - alpha) r2 and alpha = 1 .. 0 change from class 1 into class
2, through vectors that belong to no class. One expects sensible pictures between similar classes
and nonsense between very different ones. t-SNE (van der Maaten & Hinton 2008) shows which classes
are similar. It places each embedding in the plane so that neighbours stay neighbours: it minimises

    KL(P || Q) = sum over i, j of p_ij log(p_ij / q_ij)

where p_ij says how close i and j are as embeddings, and q_ij how close they are in the plane.

The published weights (128 pixels, the 1,000 classes of ImageNet) are a file of about 210 MB. If it
is not available, a small BigGAN made of the same layers is trained on drawn 32 x 32 faces.
Its 132 classes are 12 hair colours times 11 eye colours. Result of seed 0, 3,000 steps in 6 minutes
(one thread of an AMD EPYC, Zen 5, beside another run, torch 2.13):

    python biggan_interp.py --model small       FID 0.71 (fid.py's classifier; two halves of the
                                                real faces: 0.64), precision 0.58, hair and eyes
                                                as asked for in 100% of the samples
"""
import copy
import difflib
import json
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import fid
from data import EYES, FACES, HAIR, need, to_float, to_uint8


# ---- config --------------------------------------------------------------------------------------

@dataclass
class Run:
    """All settings of a run. Every field is a flag, and its comment is the flag's help."""
    model: Literal["", "published", "small"] = ""   # empty: resume a small run, else try published
    pairs: str = ""                 # your classes, as numbers or names: "282, 283; pug, goldfish"
    truncation: float = .5          # factor of the noise; lower: higher quality, less variety
    steps: int = 3000               # training steps of the small model; 0: only evaluate it
    seed: int = 0                   # seed of weights, batches, noise and t-SNE
    device: str = "auto"            # auto, cuda, mps, cpu
    amp: int = -1                   # bfloat16 autocast: 1 on, 0 off, -1 where the hardware has it
    log_every: int = 50             # steps between two lines of the log
    sample_every: int = 500         # steps between two sample grids and checkpoints
    out: str = ""                   # folder of the run; empty: out/biggan-<what differs>
    resume: int = 1                 # 0: delete the folder's earlier run and begin anew


# Settings that may change when a run is resumed, because they do not change what is trained.
FREE = set("pairs truncation steps device amp log_every sample_every out resume".split())


@dataclass
class Config:
    """Sizes of a generator; the defaults are the published 128 x 128 model."""
    size: int = 128
    z_dim: int = 128
    class_embed_dim: int = 128
    channel_width: int = 128
    num_classes: int = 1000
    attention_layer_position: int = 8   # self-attention comes before this block
    n_stats: int = 51                   # rows of the batch norm tables: truncation 0, 0.02 .. 1


# The small model, 32 x 32, and how it is trained.
SMALL = Config(size=32, z_dim=32, class_embed_dim=64, channel_width=16, num_classes=132,
               attention_layer_position=2, n_stats=11)
BATCH = 64
LR = 1e-3
R1 = .1                                 # weight of the R1 penalty
EMA = .999                              # decay of the averaged weights

# Channels at 4 x 4, 8 x 8 and so on, in multiples of channel_width. Size 32 is not published.
CHANNELS = {32: [8, 8, 4, 2], 128: [16, 16, 8, 4, 2, 1]}


# ---- the generator: BigGAN-deep, Brock 2019 appendix B -------------------------------------------

class Spectral(nn.Module):
    """A linear layer, shape (out, in), or a convolution, shape (out, in, k, k), whose weight W is
    divided by sigma(W), the largest singular value of W reshaped to a matrix with `out` rows.

    sigma = u^T W v for the singular vectors u and v of the largest value. While training, each
    forward pass improves them by one power iteration (Miyato 2018, algorithm 1); in eval mode they
    are used as they are stored."""

    def __init__(self, *shape, bias=True):
        super().__init__()
        self.weight_orig = nn.Parameter(torch.empty(shape))
        nn.init.orthogonal_(self.weight_orig)                           # Brock 2019, sec. 3
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.register_buffer("weight_u", F.normalize(torch.randn(shape[0]), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(math.prod(shape[1:])), dim=0))

    def weight(self):
        """W / sigma(W) in float32. Autocast computes matrix products in bfloat16, which is too
        coarse here, so the products are written as sums."""
        W = self.weight_orig.flatten(1)                                 # (out, rest)
        if self.training:
            with torch.no_grad():
                self.weight_v = F.normalize((W.T * self.weight_u).sum(1), dim=0)    # W^T u / norm
                self.weight_u = F.normalize((W * self.weight_v).sum(1), dim=0)      # W v / norm
        Wv = (W * self.weight_v).sum(1)
        return self.weight_orig / (self.weight_u * Wv).sum()            # sigma = u^T W v

    def forward(self, x):
        W = self.weight()
        if W.dim() == 2:
            return F.linear(x, W, self.bias)
        return F.conv2d(x, W, self.bias, padding=W.shape[-1] // 2)


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * (1 + scale(cond)) + offset(cond), for x (N, C, H, W).

    cond (N, z_dim + class_embed_dim): z and the class embedding, side by side. A plain layer has a
    weight and a bias instead. Mean and variance depend on the length of z, and so on the truncation
    (Brock 2019, appendix C.1). So the published code has a table with one row per truncation. While
    training, the layer uses the statistics of its batch and stores them in the row of that
    truncation."""

    def __init__(self, channels, config, plain=False):
        super().__init__()
        self.last = config.n_stats - 1
        self.register_buffer("running_means", torch.zeros(config.n_stats, channels))
        self.register_buffer("running_vars", torch.ones(config.n_stats, channels))
        if plain:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))
        else:
            cond_dim = config.z_dim + config.class_embed_dim
            self.scale = Spectral(channels, cond_dim, bias=False)
            self.offset = Spectral(channels, cond_dim, bias=False)

    def statistics(self, truncation):
        """Mean (C,) and variance (C,): a row of the table, or a mixture of two rows; while training
        the row itself, into which batch_norm writes."""
        if self.training:
            row = round(truncation * self.last)
            return self.running_means[row], self.running_vars[row]
        # A division as in the published code: truncation * last could round to another row.
        coef, i = math.modf(truncation / (1 / self.last))
        i = int(i)
        table = torch.stack([self.running_means, self.running_vars])    # (2, rows, C)
        if coef == 0:
            return table[:, i]
        # The published code swaps the two weights (linear interpolation has 1 - coef at row i), and
        # its pictures depend on that.
        return coef * table[:, i] + (1 - coef) * table[:, i + 1]

    def forward(self, x, truncation, cond=None):
        x = F.batch_norm(x.float(), *self.statistics(truncation), training=self.training,
                         momentum=1., eps=1e-4)
        if cond is None:
            gain = self.weight                  # (C,)
            offset = self.bias                  # (C,)
        else:
            gain = 1 + self.scale(cond)         # (N, C)
            offset = self.offset(cond)          # (N, C)
        return torch.addcmul(offset[..., None, None], x, gain[..., None, None])


class Block(nn.Module):
    """Convolutions 1x1 to a quarter of the channels, 3x3, 3x3, and 1x1 to n_out channels, beside a
    skip connection without weights, which keeps the first n_out channels. up: doubles the side."""

    def __init__(self, n_in, n_out, up, config):
        super().__init__()
        mid = n_in // 4
        self.n_out = n_out
        self.up = nn.Upsample(scale_factor=2) if up else nn.Identity()  # nearest
        self.bn_0 = BatchNorm(n_in, config)
        self.conv_0 = Spectral(mid, n_in, 1, 1)
        self.bn_1 = BatchNorm(mid, config)
        self.conv_1 = Spectral(mid, mid, 3, 3)
        self.bn_2 = BatchNorm(mid, config)
        self.conv_2 = Spectral(mid, mid, 3, 3)
        self.bn_3 = BatchNorm(mid, config)
        self.conv_3 = Spectral(n_out, mid, 1, 1)

    def forward(self, x, truncation, cond):
        h = self.conv_0(F.relu(self.bn_0(x, truncation, cond)))         # (N, n_in / 4, S, S)
        h = self.conv_1(self.up(F.relu(self.bn_1(h, truncation, cond))))
        h = self.conv_2(F.relu(self.bn_2(h, truncation, cond)))
        h = self.conv_3(F.relu(self.bn_3(h, truncation, cond)))         # (N, n_out, S', S')
        return self.up(x[:, :self.n_out]) + h


class Attention(nn.Module):
    """Self-attention (Zhang 2019, section 3): adds to each position a weighted sum of the features
    g of all positions. g is first reduced to half the side by max pooling."""

    def __init__(self, channels):
        super().__init__()
        self.snconv1x1_theta = Spectral(channels // 8, channels, 1, 1, bias=False)
        self.snconv1x1_phi = Spectral(channels // 8, channels, 1, 1, bias=False)
        self.snconv1x1_g = Spectral(channels // 2, channels, 1, 1, bias=False)
        self.snconv1x1_o_conv = Spectral(channels, channels // 2, 1, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x, truncation, cond):
        theta = self.snconv1x1_theta(x).flatten(2)                      # (N, C/8, HW)
        phi = F.max_pool2d(self.snconv1x1_phi(x), 2).flatten(2)         # (N, C/8, HW/4)
        g = F.max_pool2d(self.snconv1x1_g(x), 2).flatten(2)             # (N, C/2, HW/4)
        attention = (theta.transpose(1, 2) @ phi).softmax(2)            # (N, HW, HW/4), unscaled
        o = (g @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])   # (N, C/2, H, W)
        return x + self.gamma * self.snconv1x1_o_conv(o)


class Generator(nn.Module):
    """G(z, classes or embeddings, truncation) -> pictures (N, 3, size, size) in [-1, 1].

    z: noise (N, z_dim) from truncated_noise(), already multiplied by the truncation. classes: class
    numbers (N,) int64, or embeddings r (N, class_embed_dim). truncation: in (0, 1], only chooses
    the batch norm statistics. The names in the state_dict are those of the published files
    (pytorch-pretrained-BigGAN)."""

    def __init__(self, config=Config()):
        super().__init__()
        self.config = config
        channels = [config.channel_width * c for c in CHANNELS[config.size]]
        layers = nn.ModuleList()
        for n_in, n_out in zip(channels, channels[1:]):
            if config.size > 32:
                layers.append(Block(n_in, n_in, False, config))
            layers.append(Block(n_in, n_out, True, config))
        at = config.attention_layer_position
        layers.insert(at, Attention(layers[at].conv_0.weight_orig.shape[1]))
        last = channels[-1]
        self.embeddings = nn.Linear(config.num_classes, config.class_embed_dim, bias=False)
        self.generator = nn.ModuleDict({
            "gen_z": Spectral(4 * 4 * channels[0], config.z_dim + config.class_embed_dim),
            "layers": layers,
            "bn": BatchNorm(last, config, plain=True),
            "conv_to_rgb": Spectral(last, last, 3, 3),
        })

    def forward(self, z, classes, truncation=1.):
        r = classes if classes.is_floating_point() else self.embeddings.weight.T[classes]
        cond = torch.cat([z, r], 1)                                     # (N, z_dim + embed_dim)
        net = self.generator
        h = net["gen_z"](cond).view(len(z), 4, 4, -1).permute(0, 3, 1, 2)   # (N, C, 4, 4)
        if h.device.type == "mps":
            h = h.contiguous()          # as in data.place; on a CPU the other layout is faster
        for layer in net["layers"]:
            h = layer(h, truncation, cond)
        h = F.relu(net["bn"](h, truncation))                            # (N, C, size, size)
        rgb = net["conv_to_rgb"]        # of its C output channels the first three are the picture
        return torch.tanh(F.conv2d(h, rgb.weight()[:3], rgb.bias[:3], padding=1))


def truncated_noise(n, z_dim, truncation=1., seed=0):
    """Noise z (n, z_dim) on the CPU: truncation times N(0, 1) restricted to [-2, 2]."""
    generator = torch.Generator().manual_seed(seed)
    return truncation * nn.init.trunc_normal_(torch.empty(n, z_dim), generator=generator)


@torch.no_grad()
def sample(G, z, y, truncation=1.):
    """Noise (n, z_dim), and classes (n,) or embeddings (n, class_embed_dim) y -> pictures uint8
    (n, 3, S, S) on the CPU."""
    return torch.cat([to_uint8(G(part, classes, truncation)).cpu()
                      for part, classes in zip(z.split(100), y.split(100))])


# ---- the published weights -----------------------------------------------------------------------

URLS = ["https://s3.amazonaws.com/models.huggingface.co/biggan/biggan-deep-128-pytorch_model.bin",
        "https://huggingface.co/osanseviero/BigGAN-deep-128/resolve/main/pytorch_model.bin"]


def load_published(path, config=Config()):
    """The Generator of a published file, in eval mode. A UserError names what does not fit."""
    with torch.device("meta"):                          # shapes only, the file has the numbers
        G = Generator(config)
    try:
        G.load_state_dict(data.load_checkpoint(path), assign=True)
    except RuntimeError as e:
        raise data.UserError(f"{path} is not BigGAN-deep-{config.size}; delete it. "
                             f"{' '.join(str(e).split()):.300}") from e
    return G.eval()


# ---- the small BigGAN: its D and its losses ------------------------------------------------------

class ProjectionD(nn.Module):
    """D(x, y) = psi(phi(x)) + v_y . phi(x), Miyato & Koyama 2018, section 3: logits (N,) that say
    whether a picture x (N, 3, 32, 32) in [-1, 1] is real and belongs to class y (N,) int64."""

    def __init__(self, classes):
        super().__init__()
        leaky = nn.LeakyReLU(.2)
        self.phi = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1),                                  # 32 -> 16
            leaky,
            nn.Conv2d(32, 64, 4, 2, 1),                                 # 8
            leaky,
            nn.Conv2d(64, 128, 4, 2, 1),                                # 4
            leaky,
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, 128),
            leaky,
        )
        self.psi = nn.Linear(128, 1)
        self.v = nn.Embedding(classes, 128)

    def forward(self, x, y):
        h = self.phi(x)                                                 # (N, 128)
        return self.psi(h).float()[:, 0] + (self.v(y) * h).sum(1)


def d_hinge(real, fake):
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))), Lim & Ye 2017; 2 where D = 0."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def conditional_r1(D, x, y):
    """R1 = 1/2 E |grad_x D(x, y)|_2^2, Mescheder 2018, equation 9. Its weight is called gamma."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x, y).sum(), x, create_graph=True)
    return (grad.flatten(1) ** 2).sum(1).mean() / 2


@torch.no_grad()
def average_state(G_ema, G, decay):
    """theta_ema <- decay theta_ema + (1 - decay) theta, for all weights and all buffers (u and v of
    Spectral among them)."""
    for p, q in zip(G_ema.state_dict().values(), G.state_dict().values()):
        p.lerp_(q, 1 - decay)


@torch.no_grad()
def sampler(G_ema):
    """The network that draws samples: a copy of G_ema in eval mode whose batch norm statistics are
    recomputed. Each row of its tables holds the statistics of one batch with one face per class."""
    G = copy.deepcopy(G_ema)
    y = torch.arange(G.config.num_classes, device=G.embeddings.weight.device)
    for _ in range(2):                                  # the first round lets u and v converge
        for truncation in torch.linspace(1e-6, 1, G.config.n_stats).tolist():
            z = truncated_noise(len(y), G.config.z_dim, truncation)
            G(z.to(y.device), y, truncation)
    return G.eval()


# ---- the small BigGAN: its training loop ---------------------------------------------------------

def train(cfg, images, labels, out, device):
    """Trains the small BigGAN and returns (G that draws, log). Goes on from out/last.pt if there is
    one. images uint8 (n, 3, 32, 32), labels (n,), both on the device. Writes sample grids, log.csv
    and last.pt into out.

        D minimises  E max(0, 1 - D(x, y)) + E max(0, 1 + D(G(z, y), y)) + R1     2 where D = 0
        G minimises  -E D(G(z, y), y)                                             0"""
    torch.manual_seed(cfg.seed)
    G = data.place(Generator(SMALL), device)
    D = data.place(ProjectionD(SMALL.num_classes), device)
    G_ema = copy.deepcopy(G)
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), LR, (0., .99), fused=True)
                    for net in (G, D)]
    fixed_y = torch.arange(SMALL.num_classes, device=device)            # one row per hair colour
    fixed_z = truncated_noise(len(fixed_y), SMALL.z_dim).to(device)
    log = data.Log(out, cfg.steps)
    parts = dict(G=G, G_ema=G_ema, D=D, opt_G=opt_G, opt_D=opt_D, log=log)
    start = data.restore(parts, out / "last.pt", cfg, FREE, device)
    amp = data.autocast(cfg.amp, device)

    for step in range(start + 1, cfg.steps + 1):
        # Reseed every step from (seed, step): a resumed run sees the same batches and noise.
        torch.manual_seed(cfg.seed * 1_000_003 + step)

        # ---- D: a high score for real pictures with their class, a low one for fakes ----
        i = torch.randint(len(images), (BATCH,), device=device)
        x = to_float(images[i])                                         # (N, 3, 32, 32)
        y = labels[i]                                                   # (N,)
        z = torch.randn(BATCH, SMALL.z_dim, device=device)              # (N, z_dim)
        y_fake = torch.randint(SMALL.num_classes, (BATCH,), device=device)
        with amp:
            x_fake = G(z, y_fake)                                       # (N, 3, 32, 32)
            real = D(x, y)
            fake = D(x_fake.detach(), y_fake)           # detach: D's loss must not reach into G
        loss_D = d_hinge(real, fake)
        penalty = 0.
        if step % 4 == 0:                       # every 4th step, times 4: the same mean, cheaper
            penalty = 4 * R1 * conditional_r1(D, x, y)
        opt_D.zero_grad()
        (loss_D + penalty).backward()
        opt_D.step()

        # ---- G: a high score for the same fakes, from the updated D ----
        with amp:
            after = D(x_fake, y_fake)
        loss_G = -after.mean()
        opt_G.zero_grad()
        loss_G.backward()                   # into D as well, whose next step begins with zero_grad
        opt_G.step()
        average_state(G_ema, G, min(EMA, step / (step + 10)))   # a smaller decay at first

        if step % cfg.log_every == 0 or step in (1, cfg.steps):     # the only regular GPU sync
            log.write(step, BATCH, **{
                "D": loss_D, "G": loss_G, "D(x)": real.mean(), "D(G(z)) before": fake.mean(),
                "D(G(z)) after": after.mean()})
        if step % cfg.sample_every == 0 or step == cfg.steps:
            x = sample(sampler(G_ema), fixed_z, fixed_y)
            data.save(data.grid(x, len(EYES)), log.grid(step))
            data.save_checkpoint(out / "last.pt", parts, step, cfg)
    return sampler(G_ema), log


# ---- t-SNE, van der Maaten & Hinton 2008 ---------------------------------------------------------

def neighbour_probabilities(x, perplexity):
    """p_{j|i} = exp(-beta_i |x_i - x_j|^2) / sum over k != i of the same, equation 1.

    Points (n, d) -> (n, n) float64. beta_i = 1 / (2 sigma_i^2) is chosen so that point i has about
    `perplexity` neighbours: exp(entropy of row i) = perplexity (section 2; it must be below n - 1).
    All rows are searched at once, by bisection of log beta_i."""
    d2 = torch.cdist(x.double(), x.double()) ** 2
    d2 /= d2.mean(1, keepdim=True)
    d2.fill_diagonal_(math.inf)                                         # p_{i|i} = 0
    log_beta = torch.zeros_like(d2[:, :1])
    step = 20.
    for _ in range(50):
        p = F.softmax(-log_beta.exp() * d2, 1)
        entropy = torch.special.entr(p).sum(1, keepdim=True)            # -sum p ln p, (n, 1)
        step /= 2
        log_beta += torch.where(entropy > math.log(perplexity), step, -step)
    return p


def affinities(x, perplexity):
    """p_ij = (p_{j|i} + p_{i|j}) / 2n, section 3.1: points (n, d) -> (n, n), with sum 1."""
    p = neighbour_probabilities(x, perplexity)
    return (p + p.T) / (2 * len(p))


def student(y):
    """w_ij = 1 / (1 + |y_i - y_j|^2) and w_ii = 0, for points y (n, 2) of the plane -> (n, n). They
    give q_ij = w_ij / sum w (equation 4)."""
    return (1 / (1 + torch.cdist(y, y) ** 2)).fill_diagonal_(0.)


def kl(P, y):
    """C = KL(P || Q) = sum p_ij log(p_ij / q_ij), section 3."""
    w = student(y)
    q = w / w.sum()
    return (torch.xlogy(P, P) - torch.xlogy(P, q)).sum()                # 0 log 0 = 0


def kl_gradient(P, y):
    """dC/dy_i = 4 sum_j (p_ij - q_ij) w_ij (y_i - y_j), equation 5: (n, 2)."""
    w = student(y)
    f = (P - w / w.sum()) * w                                           # (n, n)
    return 4 * (f.sum(1, keepdim=True) * y - f @ y)


@torch.no_grad()
def tsne(x, perplexity=30., seed=0):
    """Points (n, d) -> points of the plane (n, 2) float64 that keep their neighbours. The same seed
    gives the same result. Exact: n^2 work and memory per step.

    As in section 3.4, y starts as noise with standard deviation 0.01, followed by gradient descent
    with momentum 0.5, later 0.8, and a separate gain (step size factor) for each coordinate (Jacobs
    1988). At first P is multiplied by 12, so that clusters form (van der Maaten 2014; 4 in the
    paper of 2008). Belkina 2019 uses the learning rate n / 12 with a gradient that lacks the factor
    4. Our gradient has it, so the rate is n / 48, and at least 50, as in scikit-learn. In our
    tests, rates from 50 to 500 gave the same KL for 1,000 points, but with 132 points a rate of 200
    was too high: the KL was 0.37 instead of 0.06."""
    P = affinities(x, perplexity)
    generator = torch.Generator().manual_seed(seed)
    y = 1e-2 * torch.randn(len(x), 2, generator=generator, dtype=torch.float64).to(P.device)
    rate = max(len(x) / 48, 50)
    velocity = torch.zeros_like(y)
    gain = torch.ones_like(y)
    for step in range(1000):
        exaggeration, momentum = (12, .5) if step < 250 else (1, .8)
        gradient = kl_gradient(exaggeration * P, y)
        # Smaller steps for coordinates whose gradient has the same sign as their velocity.
        gain = torch.where(gradient * velocity > 0, gain * .8, gain + .2).clamp(min=.01)
        velocity = momentum * velocity - rate * gain * gradient
        y += velocity
    return y


# ---- classes, and pictures between them ----------------------------------------------------------

# The course's examples of good pairs (tiger and Persian cat, Bedlington and Irish terrier) and of
# bad ones (sunglasses and goldfish, stopwatch and great white shark).
COURSE_PAIRS = {"good": [(282, 283), (181, 184)], "bad": [(837, 1), (826, 2)]}


def imagenet_names():
    """The 1,000 names of the classes. Where the list cannot be had, their numbers."""
    try:
        return json.loads(data.fetch("imagenet-simple-labels.json", [
            "https://raw.githubusercontent.com/anishathalye/imagenet-simple-labels/"
            "master/imagenet-simple-labels.json"]).read_text())
    except data.Unavailable:
        return [f"class {i}" for i in range(1000)]


def parse_pairs(text, names):
    """"282, 283; tiger cat, goldfish" -> [[282, 283], [282, 1]]. For a class that is not there a
    UserError lists similar names."""
    numbers = {}
    for i, name in enumerate(names):
        numbers[str(i)] = i
        numbers[name.lower()] = i
    pairs = []
    for pair in filter(str.strip, text.split(";")):
        words = [word.strip().lower() for word in pair.split(",")]
        need(len(words) == 2, f"--pairs: {pair.strip()!r} is not two classes, like 'tiger cat, "
             "goldfish'; put ; between two pairs")
        for word in words:
            near = difflib.get_close_matches(word, numbers, 5, .5)
            need(word in numbers, f"--pairs: no class {word!r}; similar: "
                 f"{', '.join(near) or 'none'}; give such a name, or a number below {len(names)}")
        pairs.append([numbers[word] for word in words])
    return pairs


def between_classes(r1, r2, alphas):
    """alpha r1 + (1 - alpha) r2 for embeddings r1, r2 (d,): (d,) for one number alpha, (k, d) for k
    of them. As in the course, alpha = 1 gives r1 (in gan.py's `between` it is t = 0 that gives z1).
    """
    alphas = torch.as_tensor(alphas).to(r1)[..., None]                  # (1,) or (k, 1)
    return alphas * r1 + (1 - alphas) * r2


def apart(pairs):
    """Up to four pairs, taken in order; a pair is skipped if it shares a member with one taken."""
    chosen = []
    for pair in pairs:
        if len(chosen) < 4 and not {*pair} & {*sum(chosen, [])}:
            chosen.append(pair)
    return chosen


def extreme_pairs(r):
    """The four nearest and the four farthest pairs [i, j], i < j, of embeddings (n, d). Within a
    group no two pairs share a class; otherwise all far pairs would contain the same outlier."""
    pairs = torch.combinations(torch.arange(len(r)))                    # (n (n - 1) / 2, 2)
    pairs = pairs[F.pdist(r).argsort()].tolist()
    return {"near": apart(pairs), "far": apart(pairs[::-1])}


ALPHAS = torch.linspace(1, 0, 11)


# ---- what was drawn ------------------------------------------------------------------------------

def draw_map(r, names, pairs, cfg, out):
    """tsne.png: all class embeddings r (n, d) in the plane, with the pairs joined by lines. Returns
    the KL reached."""
    groups = torch.arange(len(r)) * 12 // len(r)    # ImageNet's list has similar classes together
    kinds = names[::84]                             # the first of each group
    colours = data.COLOURS
    if names == FACES:                                  # a group is a hair colour
        kinds = HAIR
        colours = [data.RGB[hair] for hair in HAIR]
    perplexity = len(r) ** .5
    xy = tsne(r, perplexity, cfg.seed)
    divergence = kl(affinities(r, perplexity), xy).item()
    labels = {i: names[i] for pair in pairs for i in pair}
    data.scatter(out / "tsne.png", xy, groups, kinds, labels, pairs,
                 f"t-SNE of {len(r)} class embeddings, KL {divergence:.3f}", colours)
    return divergence


def small_scores(G, images, device):
    """FID, precision, recall, and the share of faces whose hair and eyes are as asked for: 20 faces
    of each class, at truncation 1."""
    y = torch.arange(len(FACES)).repeat(20)
    x = sample(G, truncated_noise(len(y), SMALL.z_dim).to(device), y.to(device))
    net = fid.classifier("faces-a", SMALL.size, device)
    return fid.against(net, images, x, "faces-a") | fid.count(net, x, y, FACES, y)


def evaluate(cfg, G, names, scores, log, out):
    """Interpolations, t-SNE and result.json. scores: small_scores(), or {} for the published model,
    which also shows the course's pairs."""
    embeddings = G.embeddings.weight.T                          # (classes, embed_dim)
    kinds = {"yours": parse_pairs(cfg.pairs, names)}
    if not scores:
        kinds |= COURSE_PAIRS
    kinds |= extreme_pairs(embeddings.cpu())
    z = truncated_noise(1, G.config.z_dim, cfg.truncation, cfg.seed).to(embeddings)
    rows = []
    left = []
    result = {}
    for kind, pairs in kinds.items():
        for i, j in pairs:
            r = between_classes(embeddings[i], embeddings[j], ALPHAS)
            rows.append(sample(G, z.expand(len(r), -1), r, cfg.truncation))     # (11, 3, S, S)
            left.append(f"{kind}: {names[i]} > {names[j]}")
        if pairs:
            pictures = torch.stack(rows[-len(pairs):]).float()              # (pairs, 11, 3, S, S)
            result[kind] = pictures.diff(dim=1).abs().mean().item()
    data.sheet(rows, out / "interpolation.png", left, [f"{a:.1f}" for a in ALPHAS],
               f"alpha r1 + (1 - alpha) r2 at one z, truncation {cfg.truncation:g}")
    changes = ", ".join(f"{kind} {change:.2f}" for kind, change in result.items())
    result["KL"] = draw_map(embeddings.cpu(), names, sum(kinds.values(), []), cfg, out)
    words = f"mean change per step, of 255: {changes}; t-SNE's KL {result['KL']:.3f}"
    if scores:
        words = (f"{fid.line(scores)}; precision {scores['precision']:.2f}; as asked for: hair "
                 f"{scores['hair accuracy']:.1%}, eyes {scores['eyes accuracy']:.1%}; {words}")
    data.finish(out, cfg, log, scores | result, [
        ("losses", ["D", "G"]),
        ("D on real and fake, before and after its step",
         ["D(x)", "D(G(z)) before", "D(G(z)) after"]),
    ], words)


# ---- main ----------------------------------------------------------------------------------------

def main(argv=None):
    """The command line."""
    _, changes = data.arguments(Run, argv)
    cfg = Run(**changes)
    need(0 < cfg.truncation <= 1, f"--truncation {cfg.truncation} is not in (0, 1]")
    data.at_least(0, cfg, "steps")
    data.at_least(1, cfg, "log_every", "sample_every")
    device = data.device(cfg.device)
    out = data.run_folder("biggan", cfg, changes, FREE)
    begun = cfg.resume and (out / "last.pt").is_file()
    if cfg.model == "published" or not (cfg.model or begun):
        try:
            file = data.fetch("biggan-deep-128-pytorch_model.bin", URLS)
            G = data.place(load_published(file), device)
            log = data.Log(out, 0)
            log.save(metrics={})            # so that an interrupted run can be started again
            return evaluate(cfg, G, imagenet_names(), {}, log, out)
        except data.Unavailable as e:
            need(not cfg.model, f"{e}; or use --model small, which needs no download")
            print(f"model    small, trained here: {e}")
    parse_pairs(cfg.pairs, FACES)                       # report errors in --pairs before training
    _, images, labels, _ = data.choose("faces-a", SMALL.size)
    G, log = train(cfg, images.to(device), labels.to(device), out, device)
    evaluate(cfg, G, FACES, small_scores(G, images, device), log, out)


if __name__ == "__main__":
    data.run_main(main)
