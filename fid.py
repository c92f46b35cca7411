"""fid.py: FID, KID, precision and recall of generated pictures, with the matrix square root written by hand.

    python fid.py mnist:test out/dcgan                   data set, folder, run, .npy or saved .npz; real first
    python fid.py out/dcgan --features classifier        a run against its own data; no download needed
    python fid.py photos --save photos.npz               then: python fid.py photos.npz generated/
    python fid.py roots | python fid.py speed            what the ways to the root cost, what the network costs

A network turns each picture into d features; a Gaussian N(mu, S) is fitted to the features of either set; FID is the
squared Frechet distance of the two (Heusel 2017, eq. 6):

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2

S1 S2 is not symmetric; its root by a Schur form (scipy.linalg.sqrtm) is slow and may turn complex. But only the trace
is wanted: the sum of the roots of the eigenvalues of S1 S2. Take any F1, F2 with S1 = F1 F1^T and S2 = F2 F2^T. AB and
BA share their non-zero eigenvalues, so those of S1 S2 = F1 (F1^T F2 F2^T) are those of (F1^T F2 F2^T) F1 = G G^T with
G = F1^T F2, which is symmetric, and their roots are the singular values of G:

    tr (S1 S2)^1/2 = sum of the singular values of F1^T F2

(F1 = S1^1/2 gives the textbook form tr (S1^1/2 S2 S1^1/2)^1/2.) Without inverse or epsilon, singular covariances are
as good as others. F is cheap: the centred features where N <= d, Cholesky's triangle where S has full rank,
eigenvectors otherwise; the real set's F is computed once and saved.

Measured, AMD EPYC, torch 2.13.0, SciPy 1.17.1, seed 0:
    python fid.py roots, 2 threads         d = 2048: scipy.linalg.sqrtm 10.3 s; from two covariances 0.75 s; the real set's
                                           factor kept 0.75 s; singular, n = 1000: 10.8 s, 0.89 s, 0.18 s; errors of the
                                           FID under 1e-9 (SciPy, singular: 1e-6); Newton-Schulz 25 s (40 iterations),
                                           Denman-Beavers 14 s, wrong when singular
    python fid.py speed, 2 threads         Inception 9.0 images/s plainly, 20 folded and channels_last, 36 in bfloat16
    classifier("mnist", 32), 2 threads     99.36% of the test set, 39 s to train
"""
import contextlib, dataclasses, json, subprocess, sys, time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from data import UserError


@dataclasses.dataclass
class Config:
    sources: tuple = ()           # real, then generated: folder, data set[:split], run folder, last.pt, .npy or .npz
    features: str = "inception"   # inception (published numbers) or classifier (trained here, no download)
    data: str = ""                # data set whose classifier gives the features; empty: that of the sources
    size: int = 0                 # side of the pictures; 0: data sets at the run's side or 32, folders as they are
    n: int = 0                    # at most this many pictures a side, chosen by the seed; 0: all (of a run 10,000)
    batch: int = 32               # pictures decoded and passed through the network at once
    device: str = "auto"          # auto, cuda, mps, cpu
    bf16: int = 0                 # 1: Inception in bfloat16: faster, not for publication
    seed: int = 0                 # seed of subsets and halves
    save: str = ""                # write the first source's statistics to this .npz
    skip_broken: int = 0          # 1: leave unreadable pictures out and count them
    extrapolate: int = 0          # 1: FID at infinite n
    json: int = 0                 # 1: print one JSON object, everything else to stderr


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def need(ok, why):
    """UserError, one line that says what to do, unless ok."""
    if not ok:
        raise UserError(why)


# ---- the matrix root and the Frechet distance ----------------------------------------------------------------------

def float64(x):
    """Anything array-like -> float64 tensor on its device (on the CPU where the device has no float64)."""
    x = torch.as_tensor(x)
    return (x.cpu() if x.device.type == "mps" else x).double()


def sqrtm(a):
    """Square root of a symmetric positive semi-definite matrix: a = V diag(w) V^T has the root V diag(w^1/2) V^T.

    a (d, d) -> (d, d) float64. Singular matrices are welcome: an eigenvalue that rounding made -1e-17 counts as 0."""
    w, V = torch.linalg.eigh(float64(a))
    return (V * w.clamp(min=0).sqrt()) @ V.T


def factor(sigma):
    """F (d, r) with F F^T = sigma: Cholesky's triangle at full rank, else eigenvectors without the null space."""
    L, failed = torch.linalg.cholesky_ex(sigma)
    pivots = L.diagonal() ** 2
    if not failed and pivots.min() > 1e-10 * pivots.max():
        return L
    w, V = torch.linalg.eigh(sigma)
    keep = w > len(w) * torch.finfo(w.dtype).eps * w[-1]
    return V[:, keep] * w[keep].sqrt()


def nuclear_norm(g):
    """Sum of the singular values; for large g by the eigenvalues of its Gram matrix, which takes half the time."""
    if min(g.shape) > 1024:
        w = torch.linalg.eigvalsh(g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g)
        if w[0] > 1e-14 * w[-1]:                                           # else a 0 would count as 1e-8 of the largest
            return w.sqrt().sum()
    return torch.linalg.svdvals(g).sum()


def trace_root(f, sigma):
    """tr (S1 S2)^1/2 from a factor of S1 (d, r) and S2 itself (d, d): the eigenvalues of F1^T S2 F1 = G G^T."""
    w = torch.linalg.eigvalsh(f.T @ sigma @ f)
    if len(w) and w[0] > 1e-14 * w[-1]:
        return w.sqrt().sum()
    return nuclear_norm(f.T @ factor(sigma))                               # the null space of S2 has to go as well


def distance(mu1, f1, mu2, f2):
    """d^2 of the header from means (d,) and factors (d, r) of the covariances, tr S = |F|^2 -> float."""
    need(len(mu1) == len(mu2),
         f"{len(mu1)} and {len(mu2)} features: not of one network; measure both sides with the same")
    d2 = (mu1 - mu2).square().sum() + f1.square().sum() + f2.square().sum() - 2 * nuclear_norm(f1.T @ f2)
    return d2.clamp(min=0).item()                                          # rounding may leave -1e-14; a NaN stays one


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: means (d,), covariances (d, d), singular ones too -> float."""
    mu1, s1, mu2, s2 = (float64(t) for t in (mu1, sigma1, mu2, sigma2))
    return ((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * trace_root(factor(s1), s2)).clamp(min=0).item()


def gaussian(x, rows=4096):
    """Features (N, d) -> mean (d,) and factor F (d, r) of the covariance with N - 1; for N <= d the features are F."""
    n, d = x.shape
    need(n >= 2, f"a covariance needs at least 2 pictures, here {n}")
    chunks = torch.as_tensor(x).split(rows)                                # float64 by parts: 50,000 x 2048 are 0.8 GB
    mu = sum(float64(c).sum(0) for c in chunks) / n
    if n <= d:
        return mu, ((float64(x) - mu) / (n - 1) ** 0.5).T
    return mu, factor(sum((c - mu).T @ (c - mu) for c in map(float64, chunks)) / (n - 1))


def fid(real, fake):
    """Frechet distance of features (N, d) and (M, d) -> float. 0 is equal, lower is better. Falls with n: state it."""
    return distance(*gaussian(real), *gaussian(fake))


# ---- KID, precision and recall -------------------------------------------------------------------------------------

def kid(real, fake, rows=256):
    """Kernel distance (Binkowski 2018): MMD^2 of features (N, d), (M, d) under k(x, y) = (x.y / d + 1)^3 -> float.

    All samples, unbiased (Gretton 2012, eq. 3: without the pairs (x, x)), so about 0, or below, for equal sets."""
    x, y = float64(real), float64(fake)
    need(min(len(x), len(y)) >= 2, f"KID needs at least 2 pictures a side, here {len(x)} and {len(y)}")

    def k(dots):                                                           # summed; in place, for n^2 is the cost
        t = dots.div_(x.shape[1]).add_(1)
        return t.square().mul_(t).sum()
    total = lambda a, b: sum(k(c @ b.T) for c in a.split(rows))
    within = lambda a: (total(a, a) - k(a.square().sum(1))) / (len(a) * (len(a) - 1))
    return (within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))).item()


def precision_recall(real, fake, k=3, rows=256):
    """Improved precision and recall (Kynkaanniemi 2019, section 2) of features (N, d), (M, d) -> two floats in [0, 1].

    Precision: share of fakes within the k-th-neighbour radius of some real picture. Recall: the same, roles swapped."""
    def covered(a, b):                                                     # share of the b inside; a is its own 0-th
        r = torch.cat([torch.cdist(c, a).topk(k + 1, largest=False).values[:, -1] for c in a.split(rows)])
        return torch.cat([(torch.cdist(c, a) <= r).any(1) for c in b.split(rows)]).double().mean().item()
    x, y = float64(real), float64(fake)
    need(min(len(x), len(y)) > k,
         f"precision with k = {k} needs more than {k} pictures a side, here {len(x)} and {len(y)}")
    return covered(x, y), covered(y, x)


# ---- classifier: features without a download -----------------------------------------------------------------------

def check_images(images, channels, name):
    """UserError unless images are uint8 (N, C, H, W), grey or with the network's number of channels."""
    need(images.dtype == torch.uint8 and images.dim() == 4 and len(images),
         f"{name} takes uint8 pictures (N, C, H, W), here {images.dtype} {tuple(images.shape)}")
    need(images.shape[1] in (1, channels),
         f"{name} takes pictures with {channels} channel(s), here {images.shape[1]}")


class Classifier(nn.Module):
    """Small CNN: pictures (C, size, size) -> 128 features -> one linear head for each kind of label."""

    def __init__(self, channels, size, heads, name="", accuracy=()):
        super().__init__()
        self.channels, self.size, self.heads = channels, size, tuple(heads)
        self.name, self.accuracy = name, tuple(accuracy)
        conv = lambda i, o, k, s: (nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.body = nn.Sequential(
            *conv(channels, 32, 5, 2), nn.MaxPool2d(max(1, size // 32)),   # (N, C, 32, 32) -> (N, 32, 16, 16)
            *conv(32, 64, 3, 1), nn.MaxPool2d(2),                          # (N, 64, 8, 8)
            *conv(64, 128, 3, 1), nn.MaxPool2d(2),                         # (N, 128, 4, 4)
            *conv(128, 128, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (N, 128)
        self.head = nn.Linear(128, sum(heads))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        """Floats (N, C, size, size) in [-1, 1] -> features (N, 128), logits of each head [(N, k), ...]."""
        h = self.body(x.contiguous(memory_format=torch.channels_last))
        return h, self.head(h).split(self.heads, dim=1)

    @torch.no_grad()
    def evaluate(self, images, rows=500):
        """uint8 (N, C, H, W), any size -> features (N, 128), probabilities [(N, k), ...], on the CPU, in eval mode."""
        check_images(images, self.channels, self.name)
        mode, out = self.training, []
        self.eval()
        for x in images.split(rows):
            x = data.fit(x.to(self.head.weight.device), self.size).expand(-1, self.channels, -1, -1)
            h, logits = self(data.to_float(x))
            out.append([h.cpu()] + [l.softmax(1).cpu() for l in logits])
        self.train(mode)
        features, *probabilities = map(torch.cat, zip(*out))
        return features, probabilities

    def features(self, images):
        """uint8 (N, C, H, W) -> float32 (N, 128)."""
        return self.evaluate(images)[0]

    def attributes(self, images):
        """uint8 (N, C, H, W) -> one label tensor (N,) a head, e.g. (hair, eyes)."""
        return tuple(p.argmax(1) for p in self.evaluate(images)[1])

    def predict(self, images):
        """uint8 (N, C, H, W) -> labels (N,) int64 as the data set numbers them (hair * 11 + eyes), confidence (N,)."""
        label, sure = 0, 1
        for p in self.evaluate(images)[1]:
            top = p.max(1)
            label, sure = label * p.shape[1] + top.indices, sure * top.values
        return label, sure


def targets(labels, heads):
    """Labels (N,) -> [(N,), ...], one a head: hair * 11 + eyes -> hair, eyes."""
    return [labels] if len(heads) == 1 else [labels // heads[1], labels % heads[1]]


def augment(x, flip, generator, shift=2):
    """uint8 (N, C, H, W) -> each picture moved by up to +-shift pixels and, if flip, mirrored half the time."""
    n, _, h, w = x.shape
    x = F.pad(x, [shift] * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(h) + dy, torch.arange(w) + dx             # (N, H), (N, W)
    if flip:
        columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    return x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def rotate(x, quarter):
    """The pretext task of Gidaris 2018: picture i turned by quarter[i] * 90 degrees; to guess the turn takes shapes."""
    return torch.stack([picture.rot90(q, (1, 2)) for picture, q in zip(x, quarter.tolist())])


def progress(text, end=""):
    """One line that overwrites itself, on a terminal only; with an end it stays, and goes to a file as well."""
    if end or sys.stdout.isatty():
        print(f"\r{text:78}" if sys.stdout.isatty() else text, end=end, flush=True)


def train_classifier(net, images, labels, flip, steps, batch=64, lr=4e-3, seed=0):
    """Trains net on uint8 images (N, C, size, size) and labels (N,), or None for rotations. AdamW, one lr cycle."""
    g, device, start = seeded(seed), net.head.weight.device, time.monotonic()
    optimiser = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2)
    for step in range(1, steps + 1):
        i = torch.randint(0, len(images), (batch,), generator=g)
        x = augment(images[i], flip, g)
        y = torch.randint(0, 4, (batch,), generator=g) if labels is None else labels[i]
        _, logits = net(data.to_float((rotate(x, y) if labels is None else x).to(device)))
        loss = sum(F.cross_entropy(l, t.to(device)) for l, t in zip(logits, targets(y, net.heads)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            left = (time.monotonic() - start) / step * (steps - step)
            progress(f"{net.name}: step {step}/{steps}  loss {loss.item():.3f}  {data.clock(left)} left")


def classifier(name, size, device="cpu"):
    """The Classifier of a data set (data.load's name) at a size: from downloads/, or trained now on its train split.

    Heads: the classes; hair (12) and eyes (11) for the 132 face classes; 4 rotations for a set without labels.
    Its accuracy: the share of right answers of each head on the test split, in [0, 1]."""
    tag = f"{Path(name).name}-{data.fingerprint(data.load(name, size)[0])[:8]}" if Path(name).is_dir() else name
    path = data.DOWNLOADS / f"classifier-{tag}-{size}.pt"
    if path.is_file():
        with contextlib.suppress(Exception):                               # damaged or of an older version: train again
            saved = torch.load(path, map_location="cpu", weights_only=True)
            net = Classifier(saved["channels"], size, saved["heads"], path.stem, saved["accuracy"])
            net.load_state_dict(saved["state"])
            return net.to(device).eval()
    (images, labels, classes), (x, y, _) = data.load(name, size, "train"), data.load(name, size, "test")
    heads = (4,) if labels is None else (12, 11) if len(classes) == 132 else (len(classes),)
    faces, start = len(heads) == 2, time.monotonic()
    progress(f"training {path.stem} on {len(images):,} pictures, once, about a minute", end="\n")
    with torch.random.fork_rng(devices=[]):                                # the caller's random state stays as it was
        torch.manual_seed(0)
        net = Classifier(images.shape[1], size, heads, path.stem).to(device)
    train_classifier(net, images, labels, flip=faces, steps=1800 if faces else 1000)
    if y is None:
        y = torch.randint(0, 4, (len(x),), generator=seeded(0))
        x = rotate(x, y)
    net.accuracy = tuple((g == t).float().mean().item() for g, t in zip(net.eval().attributes(x), targets(y, heads)))
    progress(f"{net.name}: {'rotations' if labels is None else 'test accuracy'} "
             f"{' / '.join(f'{100 * a:.2f}%' for a in net.accuracy)}, {time.monotonic() - start:.0f} s", end="\n")
    state = {k: v.cpu() for k, v in net.state_dict().items()}
    data.save_checkpoint(path, dict(state=state, channels=net.channels, heads=heads, accuracy=net.accuracy))
    return net


# ---- Inception v3, the published FID network -----------------------------------------------------------------------

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URLS = ["https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS,
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-" + WEIGHTS[3:]]


def Conv(i, o, k, stride=1, keep_size=True):
    """Convolution, batch norm, ReLU. Padding keeps the size unless stride or keep_size say otherwise."""
    k = (k, k) if isinstance(k, int) else k
    conv = nn.Conv2d(i, o, k, stride, (k[0] // 2, k[1] // 2) if keep_size and stride == 1 else 0, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(o, eps=1e-3), relu=nn.ReLU(inplace=True)))


def fold(m):
    """W' = W s, b' = beta - mean s, s = gamma / sqrt(var + eps): the batch norm of a Conv goes into its convolution."""
    s = m.bn.weight.double() / (m.bn.running_var.double() + m.bn.eps).sqrt()
    m.conv.weight.data = (m.conv.weight.double() * s[:, None, None, None]).float()
    m.conv.bias = nn.Parameter((m.bn.bias.double() - m.bn.running_mean.double() * s).float())
    m.bn = nn.Identity()


# block -> branches, joined by channel -> layers: (name, channels, kernel[, stride]), a pool, or a list: forks again.
# 5b - 7b differ from torchvision in the average pool, which counts its padding there; 7c's is a maximum here.
POOLS = {"avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
         "max": lambda x: F.max_pool2d(x, 3, 1, 1), "max2": lambda x: F.max_pool2d(x, 3, 2)}
block_a = lambda pool: [                                                   # 35 x 35
    [("1x1", 64, 1)], [("5x5_1", 48, 1), ("5x5_2", 64, 5)],
    [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3)], ["avg", ("_pool", pool, 1)]]
block_c = lambda c: [                                                      # 17 x 17
    [("1x1", 192, 1)], [("7x7_1", c, 1), ("7x7_2", c, (1, 7)), ("7x7_3", 192, (7, 1))],
    [("7x7dbl_1", c, 1), ("7x7dbl_2", c, (7, 1)), ("7x7dbl_3", c, (1, 7)), ("7x7dbl_4", c, (7, 1)),
     ("7x7dbl_5", 192, (1, 7))], ["avg", ("_pool", 192, 1)]]
block_e = lambda pool: [                                                   # 8 x 8
    [("1x1", 320, 1)], [("3x3_1", 384, 1), [("3x3_2a", 384, (1, 3)), ("3x3_2b", 384, (3, 1))]],
    [("3x3dbl_1", 448, 1), ("3x3dbl_2", 384, 3), [("3x3dbl_3a", 384, (1, 3)), ("3x3dbl_3b", 384, (3, 1))]],
    [pool, ("_pool", 192, 1)]]
MIXED = {"5b": block_a(32), "5c": block_a(64), "5d": block_a(64),
         "6a": [[("3x3", 384, 3, 2)], [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3, 2)], ["max2"]],
         "6b": block_c(128), "6c": block_c(160), "6d": block_c(160), "6e": block_c(192),
         "7a": [[("3x3_1", 192, 1), ("3x3_2", 320, 3, 2)], [("7x7x3_1", 192, 1), ("7x7x3_2", 192, (1, 7)),
                ("7x7x3_3", 192, (7, 1)), ("7x7x3_4", 192, 3, 2)], ["max2"]],
         "7b": block_e("avg"), "7c": block_e("max")}


class Mixed(nn.Module):
    """One Inception block from its table: each branch sees x, the results are joined along the channels."""

    def __init__(self, i, branches):
        super().__init__()
        self.branches, self.out = branches, sum(self.build(i, branch) for branch in branches)

    def build(self, c, branch):
        """Makes the layers of a branch that c channels enter; returns how many leave it."""
        for layer in branch:
            if isinstance(layer, list):
                c = sum(self.build(c, [one]) for one in layer)
            elif layer not in POOLS:                                       # a pool keeps the channels
                name, o, *shape = layer
                self.add_module("branch" + name, Conv(c, o, *shape))
                c = o
        return c

    def follow(self, branch, h):
        for layer in branch:
            if isinstance(layer, list):
                h = torch.cat([self.follow([one], h) for one in layer], 1)
            else:
                h = POOLS[layer](h) if layer in POOLS else getattr(self, "branch" + layer[0])(h)
        return h

    def forward(self, x):
        return torch.cat([self.follow(branch, x) for branch in self.branches], 1)


class Inception(nn.Module):
    """Inception v3 (Szegedy 2016) as the TensorFlow graph of 2015-12-05 has it, whose features published FIDs use.

    23,850,960 parameters. Differs from torchvision's in the pools (see POOLS), in 1008 classes, in having no
    auxiliary head, and in the input: 299 x 299 by bilinear resizing without antialiasing, scaled to [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.name = "inception"
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, keep_size=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, keep_size=False)
        c = 192
        for block, branches in MIXED.items():
            mixed = Mixed(c, branches)
            self.add_module(f"Mixed_{block}", mixed)
            c = mixed.out
        self.fc = nn.Linear(c, 1008)
        self.eval().requires_grad_(False)

    def blocks(self, x):
        """(N, 3, 299, 299) in [-1, 1] -> [(N, 64, 73, 73), (N, 192, 35, 35), (N, 768, 17, 17), (N, 2048)]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        out = [F.max_pool2d(x, 3, 2)]
        out += [x := F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(out[0])), 3, 2)]
        for block in MIXED:
            x = getattr(self, f"Mixed_{block}")(x)
            out += [x] if block == "6e" else []
        return out + [x.float().mean((2, 3))]                              # torchvision's average pool, over 8 x 8

    def prepare(self, images):
        """uint8 (N, 1 or 3, H, W) -> (N, 3, 299, 299) in [-1, 1]."""
        x = images.to(self.fc.weight.device).float().expand(-1, 3, -1, -1) / 255
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        return (2 * x - 1).to(self.fc.weight.dtype)

    @torch.no_grad()
    def features(self, images, rows=32):
        """uint8 pictures (N, 1 or 3, H, W) of any size -> float32 (N, 2048) on the CPU."""
        check_images(images, 3, self.name)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):                 # TF32 would cost three digits
            return torch.cat([self.blocks(self.prepare(x))[-1].cpu() for x in images.split(rows)])

    def load_published(self, state):
        """Takes the published state dict (num_batches_tracked or not), folds the batch norms, goes channels_last.

        Errors: UserError naming the first missing, unexpected or misshapen entry."""
        if isinstance(self.Conv2d_1a_3x3.bn, nn.Identity):
            self.__init__()                                                # folded before: the names need their layers
        try:
            self.load_state_dict(dict(state))                              # a plain dict: counters may be missing
        except (RuntimeError, TypeError, ValueError) as e:
            raise UserError(f"not the published FID Inception: {' '.join(str(e).split())[:200]}") from None
        for m in self.modules():
            if hasattr(m, "bn"):
                fold(m)
        return self.to(memory_format=torch.channels_last).requires_grad_(False)


def inception(device="cpu", bf16=0):
    """The published network, from DATA_DIR, downloads/ or a mirror. Errors: UserError naming URL, path, sha256."""
    name = next((n for n in (WEIGHTS, "weights-" + WEIGHTS[3:]) if data.find(n)), WEIGHTS)
    try:
        path = data.fetch(name, WEIGHTS_URLS, WEIGHTS_SHA256, "96 MB")
    except data.Unavailable as e:
        raise UserError(f"{e}; or use --features classifier, which needs no download") from None
    net = Inception().load_published(torch.load(path, map_location="cpu", weights_only=True)).to(device)
    if bf16:
        net.to(torch.bfloat16).name = "inception in bfloat16, not for publication"
    return net


# ---- statistics: what is known of one side -------------------------------------------------------------------------

@dataclasses.dataclass
class Stats:
    """A Gaussian fitted to features: mean (d,), factor (d, r) of its covariance, n (0: unknown), and the features."""
    name: str
    features: str                                                          # name of the network
    n: int
    mu: torch.Tensor
    root: torch.Tensor
    x: torch.Tensor = None                                                 # (n, d); unknown in saved statistics


def save_stats(path, s):
    """Writes mu and sigma, as pytorch-fid does, and root, n and network, so that the next FID is cheaper and safer."""
    with data.atomic(path) as part, open(part, "wb") as f:
        np.savez(f, mu=s.mu.numpy(), sigma=(s.root @ s.root.T).numpy(), root=s.root.numpy(), n=s.n, features=s.features)


def load_stats(path):
    """npz of save_stats or of pytorch-fid (mu and sigma alone) -> Stats. Errors: UserError when it is neither."""
    try:
        with np.load(path, allow_pickle=False) as f:
            held = {k: f[k] for k in f.files}
    except FileNotFoundError:
        raise UserError(f"there is no {path}; write one with --save") from None
    except Exception as e:                                                 # a damaged zip raises nearly anything
        raise UserError(f"{path} is no readable npz ({type(e).__name__}); write it again with --save") from None
    need({"mu", "sigma"} <= set(held),
         f"{path} lacks mu or sigma (it holds: {', '.join(held) or 'nothing'}); write one with --save")
    parts = [held[k] for k in ("mu", "sigma", "root") if k in held]
    mu, *rest = shapes = [p.shape for p in parts]
    need(len(mu) == 1 and rest[0] == 2 * mu and rest[-1][:1] == mu and all(np.isfinite(p).all() for p in parts),
         f"{path} holds no finite mean (d,) and covariance (d, d): {shapes}; write it again with --save")
    root = float64(held["root"]) if "root" in held else factor(float64(held["sigma"]))
    return Stats(str(path), str(held.get("features", "inception")), int(held.get("n", 0)), float64(held["mu"]), root)


# ---- sources: folders, data sets, runs -----------------------------------------------------------------------------

@dataclasses.dataclass
class Source:
    """n pictures, read in chunks: read(indices) -> list of uint8 (C, H, W)."""
    name: str
    n: int
    channels: int
    read: object
    size: int = 0                                                          # side of all its pictures; 0: they vary
    data: str = ""                                                         # the data set it belongs to
    skipped: int = 0


def from_set(name, split, size):
    """A data set, or the first that can be had of a list of them."""
    name, images, _, _ = data.choose(name, size, split)
    return Source(f"{name}:{split}", len(images), images.shape[1], lambda i: list(images[i]), size, name)


def from_folder(folder, cfg):
    """Every picture under a folder, decoded when its turn comes; grey if 32 of them, evenly spaced, all are."""
    files = data.pictures(folder)

    def mode(path):
        with contextlib.suppress(Exception), Image.open(path) as im:       # broken ones, None, are read()'s business
            return im.mode

    def read(indices):
        pictures = []
        for i in indices:
            try:
                picture = data.read_picture(files[i], source.channels)
                pictures.append(data.fit(picture, cfg.size) if cfg.size else picture)
            except UserError as e:
                need(cfg.skip_broken, f"{e}, or go on without it: --skip-broken 1")
                source.skipped += 1
        return pictures
    channels = 1 if {mode(f) for f in files[::-(-len(files) // 32)]} <= {None, "1", "L", "LA", "I", "I;16"} else 3
    source = Source(str(folder), len(files), channels, read, cfg.size, str(folder))
    return source


def from_array(path, name, kind=""):
    """samples.npy (uint8 N x H x W x C), read from the disk chunk by chunk."""
    try:
        a = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is no readable npy ({e}); write it again") from None
    need(a.dtype == np.uint8 and a.ndim == 4 and a.shape[3] in (1, 3),
         f"{path} is {a.dtype} {a.shape}; wanted: uint8, N x H x W x 1 or 3")
    read = lambda i: list(torch.from_numpy(a[i]).permute(0, 3, 1, 2))
    return Source(str(name), len(a), a.shape[3], read, a.shape[1], kind)


def is_run(word):
    """Whether a word of the command line is a run's folder or checkpoint."""
    return word.endswith(".pt") or any(Path(word, file).is_file() for file in ("last.pt", "samples.npy"))


def from_run(path, wanted):
    """Samples of a run of gan.py: its samples.npy; where that is missing, short or older than last.pt, gan.py draws."""
    folder, last = (path, path / "last.pt") if path.is_dir() else (path.parent, path)
    samples, kind = folder / "samples.npy", ""
    if last.exists() or last == path or not samples.exists():
        config = data.load_checkpoint(last).get("config", {})
        need("preset" in config,
             f"{last} is none of gan.py's; put samples beside it: {samples}, uint8 N x H x W x C")
        with contextlib.suppress(OSError, ValueError, KeyError):
            kind = json.loads((folder / "result.json").read_text())["data"]["name"]
        kind = kind or config["data"]
        fresh = samples.exists() and samples.stat().st_mtime >= last.stat().st_mtime
        if not fresh or from_array(samples, folder).n < wanted:
            own = ("preset", "out", "resume", "overwrite", "steps", "dump", "show", "prompt", "graph", "amp", "channels", "classes")
            flags = [f"--{k.replace('_', '-')}={v}" for k, v in config.items() if k not in own]
            command = [sys.executable, str(Path(__file__).with_name("gan.py")), config["preset"], *flags,
                       "--out", str(folder), "--resume=1", "--steps=0", "--show=dump", f"--dump={wanted}"]
            drawn = subprocess.run(command, stdout=sys.stderr)
            need(drawn.returncode == 0, f"gan.py could not draw samples from {last}: see its message above")
    return from_array(samples, folder, kind)


def open_source(word, size, cfg):
    """A word of the command line -> Source: data set NAME[:SPLIT], a run or its last.pt, an .npy, else a folder."""
    name, _, split = word.partition(":")
    if name in data.SETS:
        need(split in ("", "train", "test", "all"), f"{word}: a split is train, test or all")
        return from_set(name, split or "train", size)
    if is_run(word):
        return from_run(Path(word), cfg.n or 10_000)
    return from_array(word, word) if word.endswith(".npy") else from_folder(Path(word), cfg)


def measure(source, net, cfg):
    """Source -> Stats: features in chunks of cfg.batch pictures, so never all decoded at once, with time left."""
    index = torch.randperm(source.n, generator=seeded(cfg.seed))[:cfg.n or None].sort().values
    start, done, x = time.monotonic(), 0, []
    for chunk in index.split(cfg.batch):
        pictures = source.read(chunk.numpy())
        for shape in sorted({p.shape for p in pictures}):                  # a batch for each picture size
            x.append(net.features(torch.stack([p for p in pictures if p.shape == shape])))
        done, seconds = done + len(chunk), time.monotonic() - start
        progress(f"{source.name}: {done:,} of {len(index):,}  {done / seconds:.1f} images/s  "
                 f"{data.clock(seconds / done * (len(index) - done))} left")
    n = sum(len(f) for f in x)
    progress(f"{source.name}: {n:,} pictures, {done / seconds:.1f} images/s" +
             (f", {source.skipped} broken left out" if source.skipped else ""), end="\n")
    need(n >= 2, f"{source.name}: {n} readable picture(s); a covariance needs at least 2")
    return Stats(source.name, net.name, n, *gaussian(torch.cat(x)), torch.cat(x))


def network(cfg, sources):
    """The network that the flags ask for; a classifier is that of the sources' data set."""
    device = data.device(cfg.device)
    if cfg.features == "inception":
        return inception(device, cfg.bf16)
    name = cfg.data or next((s.data for s in sources if s.data), "")
    need(name, "the classifier of which data set? name it: --data mnist")
    size = cfg.size or next((s.size for s in sources if s.size), 32)
    return classifier(data.choose(name, size)[0] if "," in name else name, size, device)


def statistics(cfg):
    """The Stats of the sources, the real one first."""
    words, opened, stats = list(cfg.sources), {}, {w: load_stats(w) for w in cfg.sources if w.endswith(".npz")}
    for word in sorted(words, key=lambda w: w.split(":")[0] in data.SETS):  # a run first: it knows the data set's size
        if word not in stats:
            size = cfg.size or next((s.size for s in opened.values() if s.size), 32)
            opened[word] = open_source(word, size, cfg)
    if len(words) == 1 and not cfg.save:                                   # a run alone: against its own data
        run = opened[words[0]]
        need(run.data, f"{words[0]} does not say its data; name it: python fid.py REAL {words[0]}")
        words.insert(0, "its data")
        opened["its data"] = from_set(run.data, "train", run.size)
    need(len({s.channels for s in opened.values()}) <= 1, "different channels: " +
         ", ".join(f"{s.name} has {s.channels}" for s in opened.values()) + "; convert one of them")
    if opened:
        net = network(cfg, [opened[w] for w in words if w in opened])
        for s in stats.values():
            need(s.features == net.name, f"{s.name} holds {s.features} features, not {net.name}: measure it again")
        stats |= {word: measure(source, net, cfg) for word, source in opened.items()}
    return [stats[w] for w in words]


# ---- one comparison ------------------------------------------------------------------------------------------------

def score(net, real, fake, other_real):
    """Metrics of uint8 pictures under net's features -> dict fid, kid, precision, recall, n, n_real, features, floor.

    floor: FID of other_real (held out) against real, with floor_n pictures; a generator gets below it only by luck."""
    x, y, z = (data.over_ranks(net.features, t) for t in (real, fake, other_real[:len(fake)]))
    precision, recall = precision_recall(x, y)
    g = gaussian(x)                                                        # with the real set's root, used twice
    return dict(fid=distance(*g, *gaussian(y)), kid=kid(x, y), precision=precision, recall=recall, n=len(y),
                n_real=len(x), features=net.name, floor=distance(*g, *gaussian(z)), floor_n=len(z))


def line(s):
    """`FID 12.3 (classifier-mnist-32, n = 10000, real-vs-real floor 0.4)` from score's dict: never a bare FID."""
    n, n_real = (s[k] or "unknown" for k in ("n", "n_real"))
    n = n if n == n_real else f"{n_real} real, {n}"
    floor = f", real-vs-real floor {s['floor']:.2g}" if "floor" in s else ""
    at = f" at n = {s['floor_n']}" if floor and s["floor_n"] != s["n"] else ""
    return f"FID {s['fid']:.3g} ({s['features']}, n = {n}{floor}{at})"


def extrapolate(real, fake, seed=0, most=5):
    """FID at infinite n (Chong & Forsyth 2020): the line FID_n = FID_inf + c / n, read at 1/n = 0.

    Both sets are cut into k = 1 .. 5 disjoint parts (n = N / k) and the FIDs of the parts averaged, so that each point
    has seen all pictures. real, fake: Stats; saved ones stay whole, and biased. -> (FID_inf, its standard error)."""
    parts = lambda s, k: [gaussian(s.x[i]) for i in torch.randperm(s.n, generator=seeded(seed)).tensor_split(k)] if (
        s.x is not None) else k * [(s.mu, s.root)]
    ks = range(1, most + 1)
    fids = [np.mean([distance(*a, *b) for a, b in zip(parts(real, k), parts(fake, k))]) for k in ks]
    (_, fid_inf), covariance = np.polyfit(ks, fids, 1, cov=True)
    return float(fid_inf), float(covariance[1, 1] ** 0.5)


def compare(a, b, cfg, most=10_000):
    """All metrics of two Stats, a the real one -> dict; what needs the features is left out for saved statistics.

    KID, precision and recall look at up to `most` pictures a side: they cost n^2."""
    need(a.features == b.features,
         f"{a.name} holds {a.features} features, {b.name} {b.features}: measure both with one network")
    out = dict(fid=distance(a.mu, a.root, b.mu, b.root), n=b.n, n_real=a.n, features=a.features, real=a.name,
               fake=b.name)
    x, y = (None if s.x is None else s.x[torch.randperm(s.n, generator=seeded(cfg.seed))] for s in (a, b))
    if x is not None and a.n >= 4:                                         # the floor: two halves of the real set
        out |= dict(floor=fid(*x[:a.n // 2 * 2].chunk(2)), floor_n=a.n // 2)
    if x is not None and y is not None:
        x, y, n = x[:most], y[:most], min(a.n, b.n)
        out["kid"] = kid(x, y)
        if n >= 20:                                                        # KID on 10 disjoint blocks a side
            blocks = [kid(p, q) for p, q in zip(x.tensor_split(10), y.tensor_split(10))]
            out["kid_error"] = float(np.std(blocks, ddof=1) / 10 ** 0.5)
        if n > 3:
            out["precision"], out["recall"] = precision_recall(x, y)
    if cfg.extrapolate:
        need(b.x is not None and b.n >= 100,
             f"--extrapolate needs at least 100 pictures of {b.name}, not its statistics")
        out["fid_inf"], out["fid_inf_error"] = extrapolate(a, b, cfg.seed)
    return out


def report(r, d):
    """Prints compare's dict; d, the number of features."""
    error = f" +- {r['kid_error']:.1g} (standard error over 10 blocks)" if "kid_error" in r else ""
    if "kid" in r:
        print(f"KID {r['kid']:.4g}{error}")
    if "precision" in r:
        print(f"precision {r['precision']:.3f}  recall {r['recall']:.3f}  (k = 3)")
    if "fid_inf" in r:
        print(f"FID at infinite n {r['fid_inf']:.3g} +- {r['fid_inf_error']:.1g} (a line in 1/n through 1 .. 5 parts)")
    n = min(r["n"] or 10_000, r["n_real"] or 10_000)                       # 0: unknown
    if n < 10_000:
        print(f"warning: n = {n:,} is small. FID is too high by about c/n (2048 features, equal sets: 4.6 at n = 1000, "
              f"0.5 at 10,000):\n         compare at one n only, or use --extrapolate 1" +
              (f"; n <= {d} makes the covariance singular too" if n <= d else ""))
    print(line(r))


# ---- what the roots cost, what the network costs -------------------------------------------------------------------

def newton_schulz(a, iterations=25):
    """Root of a (d, d) by products alone (Higham 2008, chapter 6): Y -> a^1/2, Z -> a^-1/2. Good on a GPU and for
    autograd; slow to reach small eigenvalues, and an FID has thousands of them."""
    one = torch.eye(len(a), dtype=a.dtype)
    y, z = a / a.norm(), one
    for _ in range(iterations):
        t = (3 * one - z @ y) / 2
        y, z = y @ t, t @ z
    return y * a.norm().sqrt()


def denman_beavers(a, iterations=20):
    """Root by inverses (Denman & Beavers 1976): Y -> a^1/2, Z -> a^-1/2; quadratic in the end. Not for singular a."""
    y, z = a, torch.eye(len(a), dtype=a.dtype)
    for _ in range(iterations):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return y


def symmetric_trace(s1, s2):
    """The textbook form tr (S1^1/2 S2 S1^1/2)^1/2 by two eigendecompositions. Short, and right to 1e-6 or so."""
    r = sqrtm(s1)
    return torch.linalg.eigvalsh(r @ s2 @ r).clamp(min=0).sqrt().sum()


def root_problem(d, n, seed=0):
    """A pair of covariances whose root is known: factor F1 (d, n) of S1, map T, S1, S2 = T S1 T, FID.

    T symmetric and positive definite: S1 S2 = (S1 T)^2, so tr (S1 S2)^1/2 = tr (S1 T) exactly."""
    g = seeded(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x, w = normal(n, d) * torch.arange(1, d + 1) ** -0.8, normal(d, d) / d ** 0.5     # variances 1 .. d^-1.6
    f1, T = ((x - x.mean(0)) / (n - 1) ** 0.5).T, torch.eye(d, dtype=torch.float64) + 0.2 * w @ w.T
    s1, s2 = f1 @ f1.T, T @ f1 @ f1.T @ T
    return f1, T, s1, (s2 + s2.T) / 2, (s1.trace() + s2.trace() - 2 * (s1 * T).sum()).item()


def roots(d=2048, n=1000):
    """Prints seconds and relative FID error of the ways to the root: at full rank (5 d samples), and singular (n)."""
    rows = {}
    for m in (5 * d, n):
        f1, T, s1, s2, exact = root_problem(d, m)
        kept = factor(s1)
        ways = {"Newton-Schulz, 25 iterations": lambda: newton_schulz(s1 @ s2, 25).trace(),
                "Newton-Schulz, 40 iterations": lambda: newton_schulz(s1 @ s2, 40).trace(),
                "Denman-Beavers, 20 iterations": lambda: denman_beavers(s1 @ s2).trace(),
                "two eigendecompositions": lambda: symmetric_trace(s1, s2),
                "here, from two covariances": lambda: trace_root(factor(s1), s2),
                "here, the real root kept": lambda: trace_root(kept, s2),
                "here, from features, n <= d": lambda: None if m > d else nuclear_norm(f1.T @ T @ f1)}
        with contextlib.suppress(ImportError):
            from scipy import linalg, __version__ as version
            ways[f"scipy {version} sqrtm(s1 @ s2)"] = lambda: np.trace(linalg.sqrtm((s1 @ s2).numpy())).real
        for name, way in ways.items():
            start, trace = time.perf_counter(), float("nan")
            with contextlib.suppress(RuntimeError):                        # LAPACK: the inverse of a singular matrix
                trace = way()
            error = abs((s1.trace() + s2.trace() - 2 * (trace or 0)).item() / exact - 1)
            rows[name] = rows.get(name, f"{name:32}") + (f"{'-':>11}{'-':>11}" if trace is None else
                                                         f"{time.perf_counter() - start:9.2f} s{error:11.1e}")
    print(f"d = {d}, float64, {torch.get_num_threads()} threads; relative error of the FID\n{'':32}"
          f"{'full rank':>11}{'error':>11}{f'n = {n}':>11}{'error':>11}")
    print("\n".join(rows.values()))


def stand_in(seed=0):
    """Inception state dict of random weights of sensible size: for timing where the published file is not at hand."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Inception()
        for m in net.modules():
            if hasattr(m, "bn"):
                nn.init.kaiming_normal_(m.conv.weight)
                m.bn.running_mean.normal_(0, 0.3)
    return net.state_dict()


def speed(device, n=64, rounds=3):
    """Prints images/s and feature errors of the plain, the folded channels_last and the bfloat16 network, in turns."""
    file, plain = data.find(WEIGHTS), "plain: float32, NCHW, batch norm"
    state = torch.load(file, weights_only=True) if file else stand_in()
    nets = {plain: Inception(), "folded, channels_last": Inception().load_published(state),
            "the same in bfloat16": Inception().load_published(state).to(torch.bfloat16)}
    nets[plain].load_state_dict(dict(state))
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=seeded(0)).byte()
    best, f = {}, {}
    for turn in range(rounds + 1):
        for name, net in nets.items():
            start = time.perf_counter()
            f[name] = net.to(device).features(images)
            if turn:                                                       # the first one warms up
                best[name] = min(best.get(name, np.inf), time.perf_counter() - start)
    for name in nets:
        print(f"{name:34}{n / best[name]:8.1f} images/s  x {best[plain] / best[name]:.2f}  "
              f"feature error {((f[name] - f[plain]).norm() / f[plain].norm()).item():.1e}")


# ---- main ----------------------------------------------------------------------------------------------------------

def main(argv=None):
    """The command line."""
    cfg, _ = data.arguments(Config, argv, positional="sources")
    words = cfg.sources
    if tuple(words) in (("roots",), ("speed",)):
        return roots() if words[0] == "roots" else speed(data.device(cfg.device))
    need(cfg.features in ("inception", "classifier"), f"--features {cfg.features} is unknown; inception or classifier")
    need(cfg.n >= 0 and cfg.n != 1 and cfg.batch >= 1,
         f"--n {cfg.n} --batch {cfg.batch}: a covariance needs 2 pictures, a batch 1")
    need(not cfg.bf16 or cfg.features == "inception", "--bf16 is for Inception; the classifier is fast as it is")
    need(len(words) in (1, 2), f"{len(words)} sources; name two: python fid.py REAL GENERATED")
    need(len(words) == 2 or cfg.save or is_run(words[0]),
         f"{words[0]} against what? python fid.py REAL GENERATED, or --save FILE.npz")
    with contextlib.redirect_stdout(sys.stderr) if cfg.json else contextlib.nullcontext():
        stats = statistics(cfg)
        real = stats[0]
        if cfg.save:
            save_stats(cfg.save, real)
            print(f"wrote {cfg.save}: {real.features} statistics of {real.name}, n = {real.n:,}")
        result = compare(*stats, cfg) if len(stats) == 2 else {}
    if result:
        print(json.dumps(result)) if cfg.json else report(result, len(real.mu))


if __name__ == "__main__":
    data.run_main(main)
