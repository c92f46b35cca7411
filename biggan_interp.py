"""biggan_interp.py: BigGAN-deep, what lies between its classes, and a t-SNE map of them.

    python biggan_interp.py                                     published weights if they can be had, else a small one
    python biggan_interp.py --classes "tiger cat" "Persian cat" --model published --size 256

BigGAN (Brock 2019) gives every class y a learnt vector r_y. Between two classes lies r = alpha r_1 + (1 - alpha) r_2,
a class that was in no training set; G(z, r) at a fixed z shows what the network thinks it looks like. Here: the
generator written out for the published weights (128, 256, 512); a small one of the same code, trained below on drawn
faces whose classes are 12 hair x 11 eye colours; t-SNE (van der Maaten & Hinton 2008); walks between classes, between
noise vectors and along the truncation.

Measured: `--model small`, seed 0, one thread of an AMD EPYC that other programs used too: 2000 steps in 7:16 minutes;
hair 100.0% and eyes 99.8% as asked (n = 2640), FID 0.73 (classifier-faces-a-32, n = 2640; floor 0.81 at n = 1000, not
comparable: FID falls with n), precision only 0.15, recall 0.72: the hair is visibly noisier than in the drawings.
On the t-SNE map 99% of the classes have a nearest neighbour of the same hair.
"""
import contextlib, copy, dataclasses, difflib, json, math, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data, fid
from data import UserError, to_float

@dataclasses.dataclass
class Run:
    classes: tuple = ()             # two classes to walk between, by name or index, instead of the built-in pairs
    model: str = "auto"             # published (ImageNet), small (faces, trained here), auto: the former if to be had
    size: int = 128                 # published model: 128, 256 or 512
    truncation: float = 0.5         # noise is cut at 2 and multiplied by this: lower is cleaner and less varied
    steps: int = 2000               # training steps of the small model; 0: only use one that is trained
    seed: int = 0                   # seed of weights, batches, noise and t-SNE
    log_every: int = 50             # steps between two lines of the log
    sample_every: int = 500         # steps between two sample grids and checkpoints
    device: str = "auto"            # auto, cuda, mps, cpu
    out: str = ""                   # folder of the run; empty: out/biggan-<what differs>
    resume: int = 0                 # 1: go on in a folder that holds a run
    overwrite: int = 0              # 1: replace the run in the folder


# ---- the generator: BigGAN-deep (Brock 2019, appendix B) -----------------------------------------------------------

CHANNELS = {  # picture size -> channels of its stages in multiples of the channel width; 32 is ours, for a CPU
    32: [8, 8, 4, 2], 128: [16, 16, 8, 4, 2, 1], 256: [16, 16, 8, 8, 4, 2, 1], 512: [16, 16, 8, 8, 4, 2, 1, 1]}
BLOCKS = {  # -> (upsample?, channels in, channels out); the published ones have a block that keeps the size before each
    size: [block for a, b in zip(c, c[1:]) for block in ([] if size == 32 else [(0, a, a)]) + [(1, a, b)]]
    for size, c in CHANNELS.items()}

@dataclasses.dataclass
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
        if not self.weight_orig.is_meta:                                  # shapes alone have no singular vectors
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
            self.scale, self.offset = (Spectral(channels, cond_dim, bias=False) for _ in range(2))
        else:
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def statistics(self, truncation):
        """mean (C,), var (C,) for 0 < truncation <= 1."""
        coef, i = math.modf(truncation / (1 / (len(self.running_means) - 1)))
        # A quirk of the published code, kept because its pictures depend on it: linear interpolation would weigh the
        # lower row with 1 - coef, it weighs it with coef.
        return [s[int(i)] if coef == 0 else s[int(i)] * coef + s[int(i) + 1] * (1 - coef)
                for s in (self.running_means, self.running_vars)]

    def forward(self, x, truncation, cond=None):
        gain, offset = (self.weight, self.bias) if cond is None else (1 + self.scale(cond), self.offset(cond))
        gain, offset = gain.view(-1, x.shape[1], 1, 1), offset.view(-1, x.shape[1], 1, 1)  # (N or 1, C, 1, 1)
        if self.training:
            return torch.addcmul(offset, F.batch_norm(x, None, None, training=True, eps=self.eps), gain)
        mean, var = (s.view(1, -1, 1, 1) for s in self.statistics(truncation))
        gain = gain * (var + self.eps).rsqrt()
        return torch.addcmul(offset - mean * gain, x, gain)

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
        h = self.conv_1(F.interpolate(h, scale_factor=2) if self.up else h)  # nearest
        h = self.conv_2(F.relu(self.bn_2(h, truncation, cond)))
        h = self.conv_3(F.relu(self.bn_3(h, truncation, cond)))
        x = x[:, :self.n_out]  # the first channels; all of them where n_in == n_out
        return (F.interpolate(x, scale_factor=2) if self.up else x) + h

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
        self.config, blocks, at = config, BLOCKS[config.size], config.attention_layer_position
        layers = [Block(up, n_in * ch, n_out * ch, cond_dim, config) for up, n_in, n_out in blocks]
        layers.insert(at, Attention(blocks[at][1] * ch))
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
def fold(net, iterations=0):
    """Divide every spectrally normalised weight by its sigma, once and for all; same output, no division a call.
    iterations: power iterations before, for weights that u and v do not belong to."""
    net.eval()
    for layer in net.modules():
        if isinstance(layer, Spectral):
            layer.power_iteration(iterations)
            layer.weight_orig.copy_(layer.weight())
            layer.folded = True
    return net

def truncated_noise(n, z_dim, truncation=1.0, seed=0):
    """truncation * N(0, 1) conditioned on [-2, 2], (n, z_dim) float32, by the inverse of the cumulative distribution:
    u ~ U(0, 1), Phi(z) = Phi(-2) + u (Phi(2) - Phi(-2)). Exact, and the same on every device."""
    u = torch.rand(n, z_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = torch.special.ndtr(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    return truncation * torch.special.ndtri(low + u * (high - low)).float()


# ---- the published weights -----------------------------------------------------------------------------------------

S3 = "https://s3.amazonaws.com/models.huggingface.co/biggan/biggan-deep-{}-pytorch_model.bin"
MIRRORS = {128: [("https://huggingface.co/osanseviero/BigGAN-deep-128/resolve/main/pytorch_model.bin",
                  "b86146a8cfcde4cda135adba4b2806f78b3abe2dac9d0fd090cc3ab318604ad9")]}  # (url, sha256)
MEGABYTES = {128: 201, 256: 224, 512: 225}

def fetch_published(size):
    """Path of the published state dict, from disk or the network; data.Unavailable says what to put where."""
    name, words = S3.format(size).split("/")[-1], f"{MEGABYTES[size]} MiB"
    try:
        return data.fetch(name, [S3.format(size)], size=words)
    except data.Unavailable:
        for url, sha256 in MIRRORS.get(size, []):
            with contextlib.suppress(data.Unavailable):
                return data.fetch(name, [url], sha256, words)
        raise

def load_published(path, config=Config()):
    """Generator from a published state dict, spectral norms folded. UserError names the first key that does not fit."""
    try:
        state = data.load_checkpoint(path)
    except UserError:
        raise UserError(f"{path} is cut off or no state dict; delete it and run again, or take --model small") from None
    with torch.device("meta"):                                            # shapes only: the file brings the numbers
        G = Generator(config)
    wanted, wrong = G.state_dict(), f"{path} is not BigGAN-deep-{config.size}:"
    for key, w in wanted.items():
        if key not in state:
            raise UserError(f"{wrong} key {key} is missing")
        if (shape := getattr(state[key], "shape", ())) != w.shape:
            raise UserError(f"{wrong} {key} has shape {list(shape)}, not {list(w.shape)}")
    if extra := sorted(map(str, state.keys() - wanted.keys())):
        raise UserError(f"{wrong} it has an extra key {extra[0]}")
    G.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)      # without a second copy of 200 MB
    return fold(G.requires_grad_(False))


# ---- the small BigGAN: 132 classes of drawn faces ------------------------------------------------------------------

SMALL = Config(size=32, z_dim=32, class_embed_dim=64, channel_width=16, num_classes=132, attention_layer_position=2)
BATCH, LR, BETAS, EMA = 64, 1e-3, (0.0, 0.99), 0.999

class Discriminator(nn.Module):
    """Projection discriminator (Miyato & Koyama 2018, eq. 4): D(x, y) = v_y . phi(x) + psi(phi(x)), a logit (N,).
    x (N, 3, 32, 32) in [-1, 1], y (N,) int64. Every layer is spectrally normalised, v_y included; no batch norm."""
    def __init__(self, classes, h=32):
        super().__init__()
        self.phi = nn.Sequential(Spectral(h, 3, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.1),          # 32 -> 16
                                 Spectral(2 * h, h, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.1),      # 16 -> 8
                                 Spectral(4 * h, 2 * h, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.1))  # 8 -> 4
        self.psi, self.v = Spectral(1, 4 * h), Spectral(classes, 4 * h, bias=False)

    def forward(self, x, y):
        h = self.phi(x).sum((2, 3))                                       # (N, 3, 32, 32) -> (N, 4h)
        return self.psi(h)[:, 0] + (self.v.weight()[y] * h).sum(1)

def d_loss(real, fake):
    """Hinge loss (Lim & Ye 2017): E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))); 2 at D = 0."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

def g_loss(fake):
    """-E D(G(z))."""
    return -fake.mean()

@torch.no_grad()
def fill_statistics(G, rows=None, per_class=2):
    """Fill the batch-norm tables of a folded G: run it at each truncation and note every layer's mean and variance.
    The tables of the published files came about in the same way. rows: only these rows; the last is truncation 1."""
    norms = [m for m in G.train().modules() if isinstance(m, BatchNorm)]
    y = torch.arange(G.config.num_classes, device=norms[0].running_vars.device).repeat(per_class)
    for row in range(G.config.n_stats) if rows is None else rows:
        def note(norm, inputs):
            norm.running_vars[row], norm.running_means[row] = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        hooks = [m.register_forward_pre_hook(note) for m in norms]
        G(truncated_noise(len(y), G.config.z_dim, row / (G.config.n_stats - 1), seed=row).to(y.device), y)
        for hook in hooks:
            hook.remove()
    return G.eval()

def sampler(G_ema, rows=None):
    """The network that samples are drawn from: a copy of the averaged G, folded, with statistics of its own weights."""
    return fill_statistics(fold(copy.deepcopy(G_ema), 50), rows)          # u and v of the average are not averages

def pixels(x):
    """[-1, 1] -> uint8 as the published code does: (x + 1) / 2 * 256, clipped and cut, where 127.5 would be rounded."""
    return (x.float() + 1).mul(128).clamp(0, 255).byte()

@torch.no_grad()
def sample(G, z, y, truncation=1.0, by=100):
    """Images uint8 (n, 3, H, W) on the CPU for z (n or 1, z_dim) and classes or embeddings y (n or 1, ...), `by` at a
    time: 1 where every bit counts, since in a batch the last bits of a picture can depend on its neighbours."""
    n = max(len(z), len(y))
    z, y = z.expand(n, -1).split(by), y.expand(n, *y.shape[1:]).split(by)
    return torch.cat([pixels(G(a, b, truncation)).cpu() for a, b in zip(z, y)])

def train(cfg, images, labels, out, checkpoint, device):
    """Train the small BigGAN on uint8 images (N, 3, 32, 32) and labels (N,), both on the device; goes on from the file
    `checkpoint` if it is there. Writes grids and log.csv to out. Returns (averaged G, ready to sample from; log)."""
    torch.manual_seed(cfg.seed)
    G, D = Generator(SMALL).to(device), Discriminator(SMALL.num_classes).to(device)
    for layer in [*G.modules(), *D.modules()]:
        if isinstance(layer, Spectral):
            nn.init.orthogonal_(layer.weight_orig)                        # Brock 2019, section 3
            layer.power_iteration(5)
    nn.init.normal_(G.embeddings.weight, std=0.02)                        # classes start together and part in training
    G_ema = copy.deepcopy(G).requires_grad_(False)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), LR, BETAS, fused=True) for net in (G, D))
    parts, start = dict(G=G, G_ema=G_ema, D=D, opt_G=opt_G, opt_D=opt_D), 0
    if checkpoint.exists():
        state = data.load_checkpoint(checkpoint, device)
        for k, part in parts.items():
            part.load_state_dict(state[k])
        data.set_rng_state(state["rng"])
        start = state["step"]
    log, stop = data.Log(out, cfg.steps, start), data.interrupts()
    grid_y = torch.arange(0, 132, 2, device=device)
    grid_z = truncated_noise(len(grid_y), SMALL.z_dim, seed=cfg.seed).to(device)
    mark, marked = time.monotonic(), start

    for step in range(start + 1, cfg.steps + 1):
        for opt in (opt_G, opt_D):                                        # constant, then linearly to 0
            opt.param_groups[0]["lr"] = LR * min(1.0, 2 * (1 - (step - 1) / cfg.steps))

        # ---- D: raise D(x, y), lower D(G(z, y), y) ----
        i = torch.randint(len(images), (BATCH,), device=device)
        x, y = to_float(images[i]), labels[i]                             # (N, 3, 32, 32), (N,)
        y_fake = torch.randint(SMALL.num_classes, (BATCH,), device=device)
        x_fake = G(torch.randn(BATCH, SMALL.z_dim, device=device), y_fake)
        real, fake = D(torch.cat([x, x_fake.detach()]), torch.cat([y, y_fake])).split(BATCH)  # detach: D's loss must
        loss_D = d_loss(real, fake)                                       # not reach into G; one pass: D has no BN
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

        # ---- G: raise D(G(z, y), y), on the same fakes, against the D just improved ----
        D.requires_grad_(False)                                           # D's own gradients are not needed here
        loss_G = g_loss(D(x_fake, y_fake))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        D.requires_grad_(True)
        with torch.no_grad():                                             # theta_ema <- EMA theta_ema + (1 - EMA) theta
            torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - min(EMA, step / (step + 10)))

        if step % cfg.log_every == 0 or step in (1, cfg.steps):           # the only place that waits for the device
            row = {"D": loss_D, "G": loss_G, "D(x)": real.mean(), "D(G(z))": fake.mean(),
                   "|r|": G.embeddings.weight.norm(dim=0).mean()}
            row = dict(zip(row, torch.stack([v.detach() for v in row.values()]).tolist()))
            if not np.isfinite(list(row.values())).all():
                raise UserError(f"a loss is not finite at step {step}; the last good checkpoint is {checkpoint}; "
                                "try another --seed")
            log.write(step, (step - marked) * BATCH / (time.monotonic() - mark), **row)
            mark, marked = time.monotonic(), step
        if stop or step == cfg.steps or step % cfg.sample_every == 0:
            data.save(data.grid(sample(sampler(G_ema, [SMALL.n_stats - 1]), grid_z, grid_y), 11), out / f"{step:06d}.png")
            data.save_checkpoint(checkpoint, dict({k: v.state_dict() for k, v in parts.items()}, step=step,
                                                  rng=data.rng_state()))
            mark, marked = time.monotonic(), step
            if stop:
                print(f"\nstopped at step {step}; the same command with --resume 1 goes on")
                raise KeyboardInterrupt
    data.plain_signals()
    return sampler(G_ema), log

def small(cfg, out, device):
    """The small BigGAN of cfg.seed from downloads/, or trained now and kept there. Returns (G, log or None, its record)."""
    path = data.DOWNLOADS / f"biggan-small-{cfg.steps}-{cfg.seed}.pt"
    if cfg.steps == 0:
        trained = list(data.DOWNLOADS.glob(f"biggan-small-*-{cfg.seed}.pt"))
        if not trained:
            raise UserError(f"no small BigGAN of seed {cfg.seed} in {data.DOWNLOADS}: train one, without --steps 0")
        path = max(trained, key=lambda p: int(p.stem.split("-")[2]))
    log, checkpoint = None, path.with_name(f"{path.stem}-last.pt")
    if not path.exists():
        _, images, labels, _ = data.choose("faces-a", SMALL.size)
        G, log = train(cfg, images.to(device), labels.to(device), out, checkpoint, device)
        data.save_checkpoint(path, dict(config=dataclasses.asdict(SMALL), G=G.state_dict(), steps=cfg.steps, seconds=log.seconds))
        checkpoint.unlink(missing_ok=True)
    state = data.load_checkpoint(path, device)
    try:
        G = Generator(Config(**state["config"])).to(device)
        G.load_state_dict(state["G"])
    except (KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{path} is no small BigGAN ({str(e).splitlines()[0]}); delete it and run again") from None
    return fold(G.requires_grad_(False)), log, {k: state.get(k, 0) for k in ("steps", "seconds")}


# ---- t-SNE (van der Maaten & Hinton 2008) --------------------------------------------------------------------------

def conditional(x, perplexity):
    """p_{j|i} = exp(-beta_i |x_i - x_j|^2) / sum_k (eq. 1, beta = 1 / 2 sigma^2), (n, d) -> (n, n) float64, diagonal 0.
    beta_i by bisection, all rows at once, until row i's perplexity 2^H = exp(H in nats) is the wanted one (sec. 2)."""
    n, x = len(x), x.double()
    if not 1 < perplexity < n - 1:
        raise ValueError(f"perplexity {perplexity} is not between 1 and n - 1 = {n - 1}")
    others = ~torch.eye(n, dtype=torch.bool, device=x.device)
    d2 = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()[others].view(n, n - 1)
    d2 = d2 - d2.amin(1, keepdim=True)                                    # the same p, and no underflow of all of them
    d2 = d2 / d2.mean(1, keepdim=True).clamp(min=1e-300)
    low, high = (torch.full_like(d2[:, :1], v) for v in (-20.0, 20.0))    # bounds of ln beta, (n, 1)
    for _ in range(50):                                                   # leaves 40 / 2^50
        middle = (low + high) / 2
        e = (-middle.exp() * d2).exp()
        total = e.sum(1, keepdim=True)
        H = total.log() + middle.exp() * (e * d2).sum(1, keepdim=True) / total    # entropy: falls as beta grows
        flat = H > math.log(perplexity)
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    p = torch.zeros(n, n, dtype=x.dtype, device=x.device)
    p[others] = (e / total).flatten()
    return p

def affinities(x, perplexity=30.0):
    """P (n, n), sums to 1: p_ij = (p_{j|i} + p_{i|j}) / 2n (section 3.1)."""
    p = conditional(x, perplexity)
    return (p + p.T) / (2 * len(p))

def student(y):
    """w_ij = 1 / (1 + |y_i - y_j|^2), (n, 2) -> (n, n), diagonal 0; q_ij = w_ij / sum w (eq. 4)."""
    s = y.square().sum(1)
    return torch.addmm(s[:, None] + 1, y, y.T, alpha=-2).add_(s).clamp_(min=1).fill_diagonal_(math.inf).reciprocal()

def kl(P, y):
    """C = KL(P || Q) = sum p_ij log p_ij / q_ij (section 3)."""
    w = student(y)
    q = w / w.sum()
    return torch.where(P > 0, P * (P.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum()

def kl_gradient(P, y):
    """dC/dy_i = 4 sum_j (p_ij - q_ij) w_ij (y_i - y_j) (eq. 5), (n, 2)."""
    w = student(y)
    f = torch.addcdiv(P, w, w.sum(), value=-1).mul_(w)                    # (p - q) w
    return 4 * (f.sum(1, keepdim=True) * y - f @ y)

@torch.no_grad()
def tsne(x, perplexity=30.0, seed=0, steps=1000):
    """Map points (n, d) to the plane, neighbours to neighbours -> (n, 2) float64; the same seed, the same map.
    Section 3.4: start from N(0, 1e-4 I), momentum 0.5 then 0.8, gains of Jacobs (1988). Early exaggeration 12 for 250
    steps (van der Maaten 2014) where the paper has 4 for 50. Exact: n^2 work and memory a step."""
    P = affinities(x, perplexity)
    y = 1e-2 * torch.randn(len(x), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(P.device)
    lr, velocity, gain = max(len(x) / 5, 50.0), torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        early = step < 250
        gradient = kl_gradient(12 * P if early else P, y)
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp_(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - lr * gain * gradient
        y = y + velocity
    return y - y.mean(0)


# ---- classes and their names ---------------------------------------------------------------------------------------

NAMES_URL = "https://raw.githubusercontent.com/anishathalye/imagenet-simple-labels/master/imagenet-simple-labels.json"
COURSE = {282: "tiger cat", 283: "Persian cat", 181: "Bedlington terrier", 184: "Irish terrier", 837: "sunglasses",
          1: "goldfish", 826: "stopwatch", 2: "great white shark"}
PAIRS = [(282, 283), (181, 184), (837, 1), (826, 2)]                      # says the course: two good ones, two bad ones
FACE_PAIRS = [("blue hair green eyes", "aqua hair green eyes"), ("red hair blue eyes", "red hair yellow eyes"),
              ("black hair red eyes", "white hair aqua eyes"), ("blonde hair purple eyes", "green hair brown eyes")]
GROUPS = [(0, "fish"), (7, "bird"), (25, "reptile, frog"), (69, "insect, spider"), (80, "bird"), (101, "other mammal"),
          (107, "sea animal"), (127, "bird"), (147, "other mammal"), (151, "dog"), (269, "wolf, cat, bear"),
          (298, "other mammal"), (300, "insect, spider"), (327, "sea animal"), (330, "other mammal"), (389, "fish"),
          (398, "artefact"), (924, "food, plant"), (970, "landscape"), (981, "artefact"), (984, "food, plant"),
          (999, "artefact")]                                              # first ImageNet class of each stretch

def imagenet_names():
    """1000 names; without the list, the course's eight and numbers. A name that stands twice gets its index."""
    try:
        names = json.loads(data.fetch("imagenet-simple-labels.json", [NAMES_URL]).read_text())
        if len(names) != 1000 or not all(isinstance(n, str) for n in names):
            raise ValueError
    except data.Unavailable:
        print("names    the list of ImageNet names cannot be had: eight names and numbers instead")
        names = [f"class {i}" for i in range(1000)]
    except (ValueError, TypeError):
        raise UserError(f"{data.find('imagenet-simple-labels.json')} is no list of 1000 names; delete it") from None
    names = [COURSE.get(i, n) for i, n in enumerate(names)]
    return [f"{n} ({i})" if i not in COURSE and names.count(n) > 1 else n for i, n in enumerate(names)]

def class_index(word, names):
    """Index of a class given by index, by name or by a part of one name only. UserError lists the near names."""
    word = str(word).strip().lower()
    if word.isdigit() and int(word) < len(names):
        return int(word)
    low = [n.lower() for n in names]
    hits = [i for i, n in enumerate(low) if n == word] or [i for i, n in enumerate(low) if word and word in n]
    if len(hits) == 1:
        return hits[0]
    near = hits[:8] or [low.index(n) for n in difflib.get_close_matches(word, low, 8, 0.5)]
    near = f"; near: {', '.join(f'{names[i]} [{i}]' for i in near)}" if near else ""
    raise UserError(f"class {word!r} is {'ambiguous' if hits else 'unknown'}{near}; give a name or an index from 0 to "
                    f"{len(names) - 1}")


# ---- walks ---------------------------------------------------------------------------------------------------------

def between(r1, r2, alphas):
    """r = alpha r1 + (1 - alpha) r2: (d,), (d,) -> (len(alphas), d). Exactly r1 at alpha = 1, r2 at 0."""
    alphas = torch.as_tensor(alphas, dtype=r1.dtype, device=r1.device)[:, None]
    return alphas * r1 + (1 - alphas) * r2

def smoothness(x, features=None):
    """A row uint8 (k, 3, H, W) -> [mean step in pixels (0..255), largest / mean step, mean step of the features]."""
    steps = x.float().diff(dim=0).abs().mean((1, 2, 3))
    out = [steps.mean().item(), (steps.max() / steps.mean().clamp(min=1e-9)).item()]
    return out + ([features(x).diff(dim=0).norm(dim=1).mean().item()] if features else [])

def cosine_distances(r):
    """(n, d) -> (n, n): 1 - cos of the angle between two embeddings."""
    r = F.normalize(r.double(), dim=1)
    return 1 - r @ r.T

def extreme_pairs(distance, count, farthest=False):
    """The `count` nearest (or farthest) pairs i < j, every class in at most one pair, for the sake of variety."""
    i, j, out = *torch.triu_indices(*distance.shape, 1), []
    for k in distance[i, j].argsort(descending=farthest).tolist():
        pair = i[k].item(), j[k].item()
        if not set(pair) & set(sum(out, ())):
            out.append(pair)
        if len(out) == count:
            break
    return out

def spearman(a, b):
    """Rank correlation of two lists in [-1, 1]; 0 where one of them is constant."""
    rank = lambda v: torch.tensor(v, dtype=torch.float64).argsort().argsort().double()
    return torch.nan_to_num(torch.corrcoef(torch.stack([rank(a), rank(b)]))[0, 1]).item()


# ---- pictures and numbers ------------------------------------------------------------------------------------------

ALPHAS = [1 - k / 10 for k in range(11)]                                  # from class 1 to class 2

def walks(G, pairs, z, truncation, alphas=ALPHAS):
    """A row uint8 (len(alphas), 3, H, W) for each pair of classes (i, j), from i to j, all at one z (1, z_dim)."""
    return [sample(G, z, between(G.embed(i), G.embed(j), alphas), truncation, 1) for i, j in pairs]

def noise_sheets(G, classes, names, truncation, seed, out):
    """The other directions, one row a class: noise.png, alpha z1 + (1 - alpha) z2 at fixed class; truncation.png, one
    noise vector multiplied by a growing truncation: from the mean picture of a class to its variety."""
    z12, z = (truncated_noise(n, G.config.z_dim, t, seed).to(G.embeddings.weight.device)
              for n, t in ((2, truncation), (1, 1.0)))
    left, r, strip = [names[i] for i in classes], [G.embed(i)[None] for i in classes], [k / 10 for k in range(1, 11)]
    data.sheet([sample(G, between(*z12, ALPHAS), c, truncation, 1) for c in r], out / "noise.png", left,
               [f"{a:.1f}" for a in ALPHAS], f"alpha z1 + (1 - alpha) z2 at fixed class, truncation {truncation:g}")
    data.sheet([torch.cat([sample(G, t * z, c, t, 1) for t in strip]) for c in r], out / "truncation.png", left,
               [f"{t:.1f}" for t in strip], "truncation of one noise vector")

def map_sheet(G, groups, group_names, colours, words, links, perplexity, seed, path):
    """t-SNE of the class embeddings. Returns the KL divergence and how often the nearest point is of the same group."""
    r, start = G.embeddings.weight.T.float().cpu(), time.monotonic()
    y = tsne(r, perplexity, seed)
    divergence, seconds = kl(affinities(r, perplexity), y).item(), time.monotonic() - start
    same = (groups[torch.cdist(y, y).fill_diagonal_(math.inf).argmin(1)] == groups).double().mean().item()
    data.scatter(path, y.numpy(), groups.tolist(), group_names, words, links, f"t-SNE of {len(r)} class embeddings: "
                 f"perplexity {perplexity:g}, KL {divergence:.3f}", colours)
    print(f"t-SNE    {len(r)} x {r.shape[1]} in {seconds:.1f} s, KL {divergence:.3f}; nearest point of the same group: "
          f"{100 * same:.0f}%")
    return {"t-SNE KL": divergence, "same group": same}

def imagenet_group(i):
    """Name of the group that ImageNet class i belongs to."""
    return next(name for first, name in reversed(GROUPS) if i >= first)

def attribute_metrics(G, net, device, per_class=20, seed=1):
    """Share of samples whose hair and eyes the classifier sees as asked, and FID, at truncation 1."""
    y = torch.arange(132, device=device).repeat(per_class)
    x = sample(G, truncated_noise(len(y), G.config.z_dim, 1.0, seed).to(device), y)
    hair, eyes = ((a == b).double().mean().item() for a, b in zip(net.attributes(x), (y.cpu() // 11, y.cpu() % 11)))
    score = fid.score(net, data.load("faces-a", 32)[0], x, data.load("faces-a", 32, "test")[0])
    print(f"hair     {100 * hair:.1f}% as asked, eyes {100 * eyes:.1f}% (n = {len(x)}; the classifier on real test "
          f"images: {' / '.join(f'{100 * a:.1f}%' for a in net.accuracy)}); precision {score['precision']:.2f}, "
          f"recall {score['recall']:.2f}")
    return {"hair accuracy": hair, "eyes accuracy": eyes, **score}

def pairs_report(cfg, G, names, asked, net, out, device):
    """Walks of the asked, nearest and farthest pairs as two sheets and a table. Returns, over 24 random pairs, the rank
    correlation of the cosine distance with each measure of smoothness: are near classes better to walk between?"""
    z, features = truncated_noise(1, G.config.z_dim, cfg.truncation, cfg.seed).to(device), net and net.features
    distance = cosine_distances(G.embeddings.weight.T.cpu())
    near, far = extreme_pairs(distance, 4), extreme_pairs(distance, 4, farthest=True)
    text = f"r = alpha r1 + (1 - alpha) r2 at fixed z, truncation {cfg.truncation:g}"
    head = "pair | cosine distance | mean step (pixels, 0..255) | largest / mean"
    head += f" | {net.name} step" if net else ""
    print(f"\n| {head} |\n" + "|---" * (5 if net else 4) + "|")
    for file, title, kinds in (("interpolation", text, {"asked": asked}),
                               ("pairs", f"near and far pairs; {text}", {"near": near, "far": far})):
        pairs = [(i, j, kind) for kind, some in kinds.items() for i, j in some]
        rows = walks(G, [p[:2] for p in pairs], z, cfg.truncation)
        data.sheet(rows, out / f"{file}.png", [f"{names[i]} > {names[j]}" for i, j, _ in pairs],
                   [f"{a:.1f}" for a in ALPHAS], title)
        for (i, j, kind), x in zip(pairs, rows):
            print(f"| {kind}: {names[i]} > {names[j]} | {distance[i, j]:.3f} | " +
                  " | ".join(f"{v:.2f}" for v in smoothness(x, features)) + " |")
    rng = np.random.RandomState(cfg.seed)
    pairs = [tuple(rng.choice(len(distance), 2, replace=False)) for _ in range(24)]
    measured = zip(*[smoothness(x, features) for x in walks(G, pairs, z, cfg.truncation, ALPHAS[::2])])
    c = {k: spearman([distance[p].item() for p in pairs], v)
         for k, v in zip(("pixel step", "unevenness", "feature step"), measured)}
    print("\nnear     are near classes better to walk between? Rank correlation with the distance, 24 random pairs: " +
          ", ".join(f"{k} {v:+.2f}" for k, v in c.items()))
    return {f"distance ~ {k}": v for k, v in c.items()}

def evaluate(cfg, G, kind, names, pairs, log, trained, out, device):
    """All pictures, the table of pairs, result.json; its headline is the last line printed."""
    asked = list(dict.fromkeys(i for pair in pairs for i in pair))
    if kind == "small":
        net, groups, group_names = fid.classifier("faces-a", 32, device), torch.arange(132) // 11, data.HAIR
        colours, perplexity = [data.RGB[h] for h in data.HAIR], 10.0
        words = {i: data.EYES[i % 11] for i in [*asked, *range(0, 132, 4)]}
    else:
        net = fid.inception(device) if data.find(fid.WEIGHTS) else None
        group_names = list(dict.fromkeys(g for _, g in GROUPS))
        groups = torch.tensor([group_names.index(imagenet_group(i)) for i in range(1000)])
        colours, perplexity = data.COLOURS, 30.0
        words = {i: names[i] for i in [*asked, *COURSE, *range(9, 1000, 22)]}
    result = map_sheet(G, groups, group_names, colours, words, pairs, perplexity, cfg.seed, out / "tsne.png")
    result |= pairs_report(cfg, G, names, pairs, net, out, device)
    noise_sheets(G, asked[:4], names, cfg.truncation, cfg.seed, out)
    wrote = [out / f"{f}.png" for f in ("interpolation", "pairs", "noise", "truncation", "tsne")]
    count = {"G": sum(p.numel() for p in G.parameters())}
    if kind == "small":
        z = truncated_noise(1, G.config.z_dim, cfg.truncation, cfg.seed).to(device)
        x = sample(G, z, torch.arange(132, device=device), cfg.truncation)
        wrote.append(data.sheet(x.split(11), out / "classes.png", data.HAIR, data.EYES, "hair (rows) x eyes, one z"))
        result |= attribute_metrics(G, net, device)
        count["D"] = sum(p.numel() for p in Discriminator(SMALL.num_classes).parameters())
        headline = (f"{fid.line(result)}; attributes as asked: hair {100 * result['hair accuracy']:.1f}%, "
                    f"eyes {100 * result['eyes accuracy']:.1f}%")
    else:
        headline = (f"t-SNE KL {result['t-SNE KL']:.3f}; nearest point of the same group "
                    f"{100 * result['same group']:.0f}%")
    if log:
        wrote += [data.curves(out / "curves.png", log.table, [("losses", ["D", "G"]), ("logits", ["D(x)", "D(G(z))"]),
                                                             ("mean length of a class embedding", ["|r|"])]),
                  data.gif(out / "training.gif", sorted(out.glob("[0-9]*.png")))]
    data.write_json(out / "result.json", dict(
        command=data.command(out, log), model=kind, config=dataclasses.asdict(cfg),
        network=dataclasses.asdict(G.config), device=str(device), versions=data.versions(), step=trained["steps"],
        seconds=trained["seconds"], parameters=count, metrics=result, headline=headline))
    print("wrote    " + " ".join(map(str, [*wrote, out / "result.json"])))
    print(headline)


# ---- main ----------------------------------------------------------------------------------------------------------

def check(cfg):
    """What makes no sense ends here, in one line."""
    for wrong, message in (
        (cfg.model not in ("auto", "published", "small"), f"--model {cfg.model} is unknown; auto, published or small"),
        (cfg.size not in MEGABYTES,
         f"--size {cfg.size} is not published; 128, 256 or 512 (the small model always makes 32)"),
        (not 0 < cfg.truncation <= 1, f"--truncation {cfg.truncation:g} is not above 0 and at most 1"),
        (len(cfg.classes) not in (0, 2),
         f"--classes takes two classes, here {len(cfg.classes)}; names with a space need quotes"),
        (cfg.steps < 0 or cfg.log_every < 1 or cfg.sample_every < 1,
         "--steps must not be negative, --log-every and --sample-every must be at least 1")):
        if wrong:
            raise UserError(message)

def choose_model(cfg):
    """(path of the published weights or None for the small model), after saying which and why."""
    if cfg.model == "small":
        return None
    try:
        path = fetch_published(cfg.size)
        print(f"model    published BigGAN-deep-{cfg.size} ({path})", flush=True)
        return path
    except data.Unavailable as e:
        if cfg.model == "published":
            raise UserError(f"{e}; or --model small: trained here on drawn faces") from None
        print(f"model    small BigGAN, 132 classes of faces; {e}", flush=True)

def main(argv=None):
    """The command line."""
    cfg, changes = data.arguments(Run, argv)
    check(cfg)
    tail = "".join(f"-{k}{'+'.join(v) if k == 'classes' else v}" for k, v in changes.items()
                   if k in ("classes", "model", "size", "truncation", "steps", "seed"))
    device, path = data.device(cfg.device), choose_model(cfg)
    names = imagenet_names() if path else data.FACES
    pairs = [cfg.classes] if cfg.classes else PAIRS if path else FACE_PAIRS
    pairs = [tuple(class_index(word, names) for word in pair) for pair in pairs]
    G = load_published(path, Config(size=cfg.size)).to(device) if path else None  # a bad file: no folder is made
    out = data.open_run(cfg.out or "out/biggan" + tail.replace("/", "_").replace(" ", "_"), cfg.resume, cfg.overwrite)
    v = data.versions()
    print(f"run      {out}  device {device} {v['gpu'] if device.type == 'cuda' else ''} ({v['threads']} threads)  seed {cfg.seed}  torch {v['torch']}",
          flush=True)
    G, log, trained = (G, None, dict(steps=0, seconds=0.0)) if path else small(cfg, out, device)
    evaluate(cfg, G, "published" if path else "small", names, pairs, log, trained, out, device)

if __name__ == "__main__":
    data.run_main(main)
