"""FID, KID, precision and recall, with a hand-written matrix square root, and the networks whose features they compare."""
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data

# ---- the matrix root and the Frechet distance -------------------------------------------------------------------


def float64(x):
    """Anything array-like -> float64 tensor on its device (on the CPU where the device has no float64)."""
    x = torch.as_tensor(x)
    return (x.cpu() if x.device.type == "mps" else x).double()


def sqrtm(a):
    """Square root of a symmetric positive semi-definite matrix: a = V diag(w) V^T, so root = V diag(w^1/2) V^T.

    a (d, d) -> (d, d) float64. Singular matrices are welcome: an eigenvalue that rounding made -1e-17 counts as 0."""
    w, V = torch.linalg.eigh(float64(a))
    return (V * w.clamp(min=0).sqrt()) @ V.T


def factor(sigma):
    """F (d, r) with F F^T = sigma: Cholesky's triangle if sigma has full rank, else eigenvectors without the null space."""
    L, failed = torch.linalg.cholesky_ex(sigma)
    pivots = L.diagonal() ** 2
    if not failed and pivots.min() > 1e-10 * pivots.max():
        return L
    w, V = torch.linalg.eigh(sigma)
    keep = w > len(w) * torch.finfo(w.dtype).eps * w[-1]
    return V[:, keep] * w[keep].sqrt()


def nuclear_norm(g):
    """Sum of the singular values; for large g through the eigenvalues of the smaller Gram matrix, 3 times as fast."""
    if min(g.shape) <= 1024:
        return torch.linalg.svdvals(g).sum()
    g = g if g.shape[0] < g.shape[1] else g.T
    return torch.linalg.eigvalsh(g @ g.T).clamp(min=0).sqrt().sum()


def distance(mu1, f1, mu2, f2):
    """d^2 = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel 2017 eq. 6, from factors S = F F^T."""
    return ((mu1 - mu2).square().sum() + f1.square().sum() + f2.square().sum() - 2 * nuclear_norm(f1.T @ f2)).item()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: means (d,), covariances (d, d), singular ones too -> float."""
    return distance(float64(mu1), factor(float64(sigma1)), float64(mu2), factor(float64(sigma2)))


def gaussian(x):
    """Features (N, d) -> mean (d,) and factor F (d, r) of the covariance with N - 1; for N <= d the features are F."""
    x = float64(x)
    n, d = x.shape
    if n < 2:
        raise data.UserError(f"a covariance needs at least 2 images, here {n}")
    mu = x.mean(0)
    x = (x - mu) / (n - 1) ** 0.5
    return mu, x.T if n <= d else factor(x.T @ x)


def fid(real, fake):
    """Frechet distance of features (N, d) and (M, d) -> float. Lower is better, 0 is equal; falls with N, so state N."""
    return distance(*gaussian(real), *gaussian(fake))


# ---- KID, precision and recall ----------------------------------------------------------------------------------


def kid(real, fake, rows=2048):
    """Kernel distance (Binkowski 2018, eq. 4): unbiased MMD^2 of k(x, y) = (x.y / d + 1)^3 over all samples -> float."""
    def mean_kernel(a, b, same):
        k = sum(((c @ b.T / b.shape[1] + 1) ** 3).sum() for c in a.split(rows))
        if not same:
            return k / (len(a) * len(b))
        k = k - ((a.square().sum(1) / a.shape[1] + 1) ** 3).sum()          # without the pairs (x, x): unbiased
        return k / (len(a) * (len(a) - 1))
    x, y = float64(real), float64(fake)
    if min(len(x), len(y)) < 2:
        raise data.UserError(f"KID needs at least 2 images a side, here {len(x)} and {len(y)}")
    return (mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)).item()


def distances(a, b, rows=1024):
    """Squared Euclidean distances of a (N, d) and b (M, d), yielded as (first row, block (<= rows, M))."""
    b2 = b.square().sum(1)
    for i in range(0, len(a), rows):
        c = a[i:i + rows]
        yield i, (c.square().sum(1, keepdim=True) + b2 - 2 * c @ b.T).clamp(min=0)


def radii(a, k):
    """Squared distance of each sample to its k-th nearest neighbour in the same set (N, d) -> (N,)."""
    out = []
    for i, block in distances(a, a):
        block.diagonal(i).fill_(float("inf"))                              # a sample is no neighbour of itself
        out.append(block.topk(k, largest=False).values[:, -1])
    return torch.cat(out)


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi 2019, section 2) of features (N, d), (M, d) -> two floats in [0, 1].

    Precision: share of fakes within the k-th-neighbour radius of some real image. Recall: the same, roles swapped."""
    x, y = float64(real), float64(fake)
    if min(len(x), len(y)) <= k:
        raise data.UserError(f"precision with k = {k} needs more than {k} images a side, here {len(x)} and {len(y)}")
    centre = x.mean(0)
    x, y = x - centre, y - centre
    rx, ry = radii(x, k), radii(y, k)
    covered = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    recalled = []
    for i, block in distances(x, y):                                       # rows real, columns fake
        covered |= (block <= rx[i:i + len(block), None]).any(0)
        recalled.append((block <= ry).any(1))
    return covered.double().mean().item(), torch.cat(recalled).double().mean().item()


# ---- classifier: features without a download --------------------------------------------------------------------


def check_images(images, channels, name):
    """UserError unless images are uint8 (N, C, H, W) with the network's number of channels, or grey."""
    if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
        raise data.UserError(f"features take uint8 images (N, C, H, W), here {images.dtype} {tuple(images.shape)}")
    if images.shape[1] not in (1, channels):
        raise data.UserError(f"{name} takes pictures with {channels} channel(s), here {images.shape[1]}")


class Classifier(nn.Module):
    """Small CNN: uint8 images (N, C, size, size) -> 128 features -> one linear head per kind of label."""

    def __init__(self, channels, size, heads, name="", accuracy=()):
        super().__init__()
        self.channels, self.size, self.heads = channels, size, tuple(heads)
        self.name, self.accuracy = name, tuple(accuracy)
        def conv(i, o, k, s):
            return nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()
        self.body = nn.Sequential(*conv(channels, 32, 5, 2), nn.MaxPool2d(max(1, size // 32)),  # (N, 32, 16, 16)
                                  *conv(32, 64, 3, 1), nn.MaxPool2d(2), *conv(64, 128, 3, 1), nn.MaxPool2d(2),
                                  *conv(128, 128, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, sum(heads))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        """Floats (N, C, H, W) in [-1, 1] -> features (N, 128), logits per head [(N, k), ...]."""
        h = self.body(x.contiguous(memory_format=torch.channels_last))
        return h, self.head(h).split(self.heads, dim=1)

    @torch.no_grad()
    def run(self, images, rows=500):
        """uint8 (N, C, H, W), any size -> features (N, 128) and probabilities per head, on the CPU, eval mode."""
        check_images(images, self.channels, self.name)
        was, h, p = self.training, [], [[] for _ in self.heads]
        self.eval()
        for x in images.split(rows):
            x = x.to(self.head.weight.device)
            x = x if x.shape[-2:] == (self.size, self.size) else data.fit(x, self.size)
            f, logits = self(data.to_float(x.expand(-1, self.channels, -1, -1)))
            h.append(f.float().cpu())
            for q, l in zip(p, logits):
                q.append(l.float().softmax(1).cpu())
        self.train(was)
        return torch.cat(h), [torch.cat(q) for q in p]

    def features(self, images):
        """uint8 (N, C, H, W) -> float32 (N, 128)."""
        return self.run(images)[0]

    def attributes(self, images):
        """uint8 (N, C, H, W) -> one label tensor (N,) a head, e.g. (hair, eyes)."""
        return tuple(p.argmax(1) for p in self.run(images)[1])

    def predict(self, images):
        """uint8 (N, C, H, W) -> labels (N,) int64 as the data set numbers them (hair * 11 + eyes), confidence (N,)."""
        label, sure = 0, 1
        for p in self.run(images)[1]:
            top = p.max(1)
            label, sure = label * p.shape[1] + top.indices, sure * top.values
        return label, sure


def targets(labels, heads):
    """Labels (N,) -> [(N,), ...], one a head: the digits of the label in the mixed base of the heads."""
    out = []
    for k in reversed(heads):
        out.insert(0, labels % k)
        labels = labels // k
    return out


def augment(x, flip, generator, shift=2):
    """uint8 (N, C, H, W) -> each image shifted by up to +-shift pixels and, if flip, mirrored half the time."""
    n, _, h, w = x.shape
    x = F.pad(x, [shift] * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(h) + dy, torch.arange(w) + dx             # (N, H), (N, W)
    if flip:
        columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    index = (torch.arange(n)[:, None, None], slice(None), rows[:, :, None], columns[:, None, :])
    return x[index].permute(0, 3, 1, 2)                                    # (N, H, W, C) -> (N, C, H, W)


def rotate(x, quarter):
    """The pretext task of Gidaris 2018: image i turned by quarter[i] * 90 degrees; guessing the turn needs shapes."""
    out = x.clone()
    for q in range(1, 4):
        out[quarter == q] = x[quarter == q].rot90(q, (2, 3))
    return out


def train_classifier(net, images, labels, flip, seconds=None, steps=600, batch=128, lr=4e-3, seed=0):
    """Trains net in place on uint8 images (N, C, H, W) and labels (N,) or None (rotations). AdamW, one lr cycle."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2)
    start, net_device = time.time(), net.head.weight.device
    for step in range(steps):
        i = torch.randint(0, len(images), (batch,), generator=generator)
        x = augment(images[i], flip, generator)
        y = labels[i] if labels is not None else torch.randint(0, 4, (batch,), generator=generator)
        x = x if labels is not None else rotate(x, y)
        _, logits = net(data.to_float(x.to(net_device)))
        loss = sum(F.cross_entropy(l, t.to(net_device)) for l, t in zip(logits, targets(y, net.heads)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            left = (time.time() - start) / (step + 1) * (steps - step - 1)
            print(f"\rclassifier {net.name}: step {step + 1}/{steps}  loss {loss.item():.3f}  {left:3.0f} s left ",
                  end="", flush=True)


def accuracy(net, images, labels, seed=0):
    """Share of right answers a head, in [0, 1]; for labels None: of right rotations."""
    if labels is None:
        labels = torch.randint(0, 4, (len(images),), generator=torch.Generator().manual_seed(seed))
        images = rotate(images, labels)
    guesses = net.attributes(images)
    return tuple((g == t).float().mean().item() for g, t in zip(guesses, targets(labels, net.heads)))


def classifier(name, size, device="cpu"):
    """The Classifier of a data set (data.load's name) at a size, from downloads/ or trained now on its train split."""
    tag = Path(name).name + (f"-{zlib.crc32(str(Path(name).resolve()).encode()):08x}" if Path(name).is_dir() else "")
    path = data.DOWNLOADS / f"classifier-{tag}-{size}.pt"
    if path.is_file():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            net = Classifier(saved["channels"], size, saved["heads"], saved["name"], saved["accuracy"])
            net.load_state_dict(saved["state"])
            return net.to(device).eval()
        except Exception:
            print(f"{path} is damaged or of an older version: training it again")
    images, labels, classes = data.load(name, size, "train")
    test = data.load(name, size, "test")
    heads = (4,) if labels is None else (12, 11) if len(classes) == 132 else (len(classes),)
    start = time.time()
    with torch.random.fork_rng(devices=[]):                                # the caller's random state stays as it was
        torch.manual_seed(0)
        net = Classifier(images.shape[1], size, heads, path.stem).to(device)
        train_classifier(net, images, labels, flip=heads == (12, 11))
    net.accuracy = accuracy(net.eval(), test[0], test[1])
    kind = "rotation" if labels is None else "test"
    print(f"\rclassifier {name} {size}x{size}: {kind} accuracy "
          f"{' / '.join(f'{100 * a:.2f}%' for a in net.accuracy)}, {time.time() - start:.0f} s{' ' * 20}")
    with data.atomic(path) as part:
        torch.save(dict(state={k: v.cpu() for k, v in net.state_dict().items()}, channels=net.channels, name=net.name,
                        heads=net.heads, accuracy=net.accuracy), part)
    return net


# ---- Inception v3, the published FID network --------------------------------------------------------------------

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URLS = ["https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS,
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHTS[3:]]


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Padding keeps the size at stride 1 unless told; stride 2 has none."""

    def __init__(self, i, o, k, stride=1, padding="same"):
        super().__init__()
        k = (k, k) if isinstance(k, int) else k
        p = (k[0] // 2, k[1] // 2) if padding == "same" and stride == 1 else 0
        self.conv = nn.Conv2d(i, o, k, stride, p, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)                  # torchvision: the same eps, not PyTorch's 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        """W' = W g / sqrt(var + eps), b' = beta - mean g / sqrt(var + eps): the batch norm disappears."""
        c, bn = self.conv, self.bn
        s = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        folded = nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding)
        folded.weight.data = (c.weight.double() * s[:, None, None, None]).float()
        folded.bias.data = (bn.bias.double() - bn.running_mean.double() * s).float()
        self.conv, self.bn = folded, nn.Identity()


AVG, MAX3, MAX2 = "avg", "max3", "max2"
POOLS = {AVG: lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),  # torchvision counts the padding too
         MAX3: lambda x: F.max_pool2d(x, 3, 1, 1), MAX2: lambda x: F.max_pool2d(x, 3, 2)}


def table_a(pool):
    return [[("1x1", 64, 1)], [("5x5_1", 48, 1), ("5x5_2", 64, 5)],
            [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3)], [AVG, ("_pool", pool, 1)]]


def table_c(c):
    return [[("1x1", 192, 1)], [("7x7_1", c, 1), ("7x7_2", c, (1, 7)), ("7x7_3", 192, (7, 1))],
            [("7x7dbl_1", c, 1), ("7x7dbl_2", c, (7, 1)), ("7x7dbl_3", c, (1, 7)), ("7x7dbl_4", c, (7, 1)),
             ("7x7dbl_5", 192, (1, 7))], [AVG, ("_pool", 192, 1)]]


def table_e(pool):
    return [[("1x1", 320, 1)], [("3x3_1", 384, 1), [("3x3_2a", 384, (1, 3)), ("3x3_2b", 384, (3, 1))]],
            [("3x3dbl_1", 448, 1), ("3x3dbl_2", 384, 3), [("3x3dbl_3a", 384, (1, 3)), ("3x3dbl_3b", 384, (3, 1))]],
            [pool, ("_pool", 192, 1)]]


# block -> branches (joined by channel) -> layers (name, channels, kernel[, stride]) or a pool; a list forks once more
MIXED = {"5b": table_a(32), "5c": table_a(64), "5d": table_a(64),
         "6a": [[("3x3", 384, 3, 2)], [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3, 2)], [MAX2]],
         "6b": table_c(128), "6c": table_c(160), "6d": table_c(160), "6e": table_c(192),
         "7a": [[("3x3_1", 192, 1), ("3x3_2", 320, 3, 2)], [("7x7x3_1", 192, 1), ("7x7x3_2", 192, (1, 7)),
                ("7x7x3_3", 192, (7, 1)), ("7x7x3_4", 192, 3, 2)], [MAX2]],
         "7b": table_e(AVG), "7c": table_e(MAX3)}              # 7c: torchvision has an average pool there too


class Mixed(nn.Module):
    """One Inception block from its table: every branch sees x, the results are joined along the channels."""

    def __init__(self, i, branches):
        super().__init__()
        self.branches, self.out = branches, 0
        for branch in branches:
            c = i
            for layer in branch:
                fork = layer if isinstance(layer, list) else [layer] if isinstance(layer, tuple) else []
                for name, o, *shape in fork:
                    self.add_module("branch" + name, Conv(c, o, *shape))
                c = sum(l[1] for l in fork) or c
            self.out += c

    def forward(self, x):
        return torch.cat([self.follow(branch, x) for branch in self.branches], 1)

    def follow(self, branch, h):
        for layer in branch:
            if isinstance(layer, list):
                h = torch.cat([self.follow([one], h) for one in layer], 1)
            else:
                h = POOLS[layer](h) if isinstance(layer, str) else getattr(self, "branch" + layer[0])(h)
        return h


class Inception(nn.Module):
    """Inception v3 (Szegedy 2016) as ported from the TensorFlow graph of 2015-12-05 that published FIDs use.

    23,850,960 parameters. Differs from torchvision's: see the three comments on pools; 1008 classes; no auxiliary head;
    pictures are resized to 299 x 299 bilinearly without antialiasing and scaled to [-1, 1]."""
    name = "inception"

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
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
        out.append(F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(out[0])), 3, 2))
        x = out[1]
        for block in MIXED:
            x = getattr(self, f"Mixed_{block}")(x)
            out += [x] if block == "6e" else []
        return out + [x.float().mean((2, 3))]

    def forward(self, x):
        """(N, 3, 299, 299) in [-1, 1] -> the 2048 features FID is defined on (N, 2048)."""
        return self.blocks(x)[-1]

    def prepare(self, images):
        """uint8 (N, 1 or 3, H, W) -> (N, 3, 299, 299) in [-1, 1]."""
        x = images.to(self.fc.weight.device).float().expand(-1, 3, -1, -1) / 255
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        return (2 * x - 1).to(self.fc.weight.dtype)

    @torch.no_grad()
    def features(self, images, rows=32):
        """uint8 images (N, 1 or 3, H, W) of any size -> float32 (N, 2048) on the CPU."""
        check_images(images, 3, self.name)
        return torch.cat([self(self.prepare(x)).float().cpu() for x in images.split(rows)])

    def load_published(self, state):
        """Takes the published state dict (with or without num_batches_tracked), folds the batch norms, channels_last."""
        if isinstance(self.Conv2d_1a_3x3.bn, nn.Identity):
            self.__init__()                                    # folded before: the published names need their layers
        try:
            self.load_state_dict(dict(state))                  # a plain dict has no version: counters may be missing
        except RuntimeError as e:
            raise data.UserError(f"not the published FID Inception: {str(e).splitlines()[1].strip()[:200]}") from None
        for m in self.modules():
            if isinstance(m, Conv):
                m.fold()
        return self.to(memory_format=torch.channels_last).requires_grad_(False)


# ---- scores of a run ----------------------------------------------------------------------------------------------


def score(net, real, fake, other_real):
    """All metrics of uint8 images under net's features: dict fid, kid, precision, recall, n, n_real, features, floor.

    floor: FID of other_real (held out) against real; no generator gets below it but by chance. floor_n: its n."""
    x, y, z = (net.features(t) for t in (real, fake, other_real[:len(fake)]))
    precision, recall = precision_recall(x, y)
    mu, f = gaussian(x)                                                    # the real root, used twice
    return dict(fid=distance(mu, f, *gaussian(y)), kid=kid(x, y), precision=precision, recall=recall, n=len(y),
                n_real=len(x), features=net.name, floor=distance(mu, f, *gaussian(z)), floor_n=len(z))


def line(s):
    """`FID 12.3 (classifier-mnist, n = 10000, real-vs-real floor 0.4)` from score's dict: never a bare FID."""
    n = s["n"] if s["n_real"] in (s["n"], 0) else f"{s['n_real']} real, {s['n']}"
    floor = f", real-vs-real floor {s['floor']:.2g}" if "floor" in s else ""
    at = f" at n = {s['floor_n']}" if floor and s["floor_n"] != s["n"] else ""
    return f"FID {s['fid']:.3g} ({s['features']}, n = {n or 'unknown'}{floor}{at})"

# ---- statistics: what is known of one side of a comparison ------------------------------------------------------


@dataclasses.dataclass
class Stats:
    """A Gaussian fitted to features: mean (d,), factor (d, r) of its covariance, n (0: unknown), and the features."""
    name: str
    features: str
    n: int
    mu: torch.Tensor
    root: torch.Tensor
    x: torch.Tensor = None                                                 # (n, d), unknown in saved statistics


def save_stats(path, s):
    """Writes mu, sigma (as pytorch-fid does), and the root, n and feature name, so that the next FID is cheaper."""
    with data.atomic(path) as part, open(part, "wb") as f:
        np.savez(f, mu=s.mu.numpy(), sigma=(s.root @ s.root.T).numpy(), root=s.root.numpy(), n=s.n, features=s.features)


def load_stats(path):
    """npz written by save_stats or by pytorch-fid (mu, sigma) -> Stats. Errors: UserError when it is neither."""
    try:
        with np.load(path, allow_pickle=False) as f:
            held = {k: f[k] for k in f.files}
    except FileNotFoundError:
        raise data.UserError(f"there is no {path}; write one with --save") from None
    except Exception as e:                                                 # damaged zips raise nearly anything
        raise data.UserError(f"{path} is no readable npz ({type(e).__name__}); write it again with --save") from None
    if not {"mu", "sigma"} <= set(held):
        raise data.UserError(f"{path} lacks mu or sigma (it holds: {', '.join(held) or 'nothing'}); write one with --save")
    mu, sigma = float64(held["mu"]), float64(held["sigma"])
    if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise data.UserError(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} are no finite mean and covariance")
    root = float64(held["root"]) if "root" in held else factor(sigma)
    return Stats(str(path), str(held.get("features", "inception")), int(held.get("n", 0)), mu, root)


def same_features(name1, features1, name2, features2):
    """UserError unless both sides were seen by one network."""
    if features1 != features2:
        raise data.UserError(f"{name1} holds {features1} features, {name2} {features2}: measure both with one network")


# ---- sources: folders, data sets, runs -----------------------------------------------------------------------------


@dataclasses.dataclass
class Source:
    """n pictures that are read in chunks: read(indices) -> list of uint8 (C, H, W)."""
    name: str
    n: int
    channels: int
    read: object
    size: int = 0                                                          # side of its pictures, 0: they vary
    data: str = ""                                                         # data set it belongs to
    skipped: int = 0


def from_folder(folder, cfg):
    """Every picture under a folder, grey if a sample of 32 of them is; decoded when its turn comes."""
    files = data.pictures(folder)
    source = Source(str(folder), len(files), 3, None, data=str(folder))

    def grey(path):
        with contextlib.suppress(Exception), Image.open(path) as im:
            return im.mode in ("1", "L", "LA", "I;16", "I")
        return True                                                        # broken: read() will say so
    source.channels = 1 if all(grey(f) for f in files[::max(1, len(files) // 32)]) else 3

    def read(indices):
        pictures = []
        for i in indices:
            try:
                pictures.append(data.read_picture(files[i], source.channels))
            except data.UserError as e:
                if not cfg.skip_broken:
                    raise data.UserError(f"{e}, or go on without it: --skip-broken 1") from None
                source.skipped += 1
        return pictures
    source.read = read
    return source


def from_array(path, name, kind=""):
    """samples.npy (uint8 N x H x W x C), read from the disk chunk by chunk."""
    try:
        a = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise data.UserError(f"{path} is no readable npy ({e})") from None
    if a.dtype != np.uint8 or a.ndim != 4 or a.shape[3] not in (1, 3):
        raise data.UserError(f"{path}: {a.dtype} {a.shape}; wanted: uint8 N x H x W x 1 or 3")
    return Source(str(name), len(a), a.shape[3], lambda i: list(torch.from_numpy(a[i]).permute(0, 3, 1, 2)), a.shape[1], kind)


def from_run(path, cfg):
    """Samples of a run of gan.py: its samples.npy, or if that is missing, short or old, written now by gan.py itself."""
    folder = path if path.is_dir() else path.parent
    samples, last, wanted, kind = folder / "samples.npy", folder / "last.pt", cfg.n or 10_000, ""
    if last.exists():
        config = data.load_checkpoint(last).get("config", {})
        if "preset" not in config:
            raise data.UserError(f"{last} is no checkpoint of gan.py; dump the samples as {samples} (uint8 N x H x W x C)")
        with contextlib.suppress(OSError, ValueError, KeyError):
            kind = json.loads((folder / "result.json").read_text())["data"]["name"]
        kind = kind or config["data"]
        fresh = samples.exists() and samples.stat().st_mtime >= last.stat().st_mtime
        if not fresh or from_array(samples, folder).n < wanted:
            own = ("preset", "out", "resume", "overwrite", "steps", "dump", "show", "prompt")
            flags = [f"--{k.replace('_', '-')}={v}" for k, v in config.items() if k not in own]
            run = subprocess.run([sys.executable, str(Path(__file__).with_name("gan.py")), config["preset"], *flags, "--out",
                                  str(folder), "--resume=1", "--steps=0", f"--dump={wanted}", "--show=dump"],
                                 stdout=sys.stderr)
            if run.returncode:
                raise data.UserError(f"gan.py could not draw samples from {last}; see its message above")
    return from_array(samples, folder, kind)


def is_run(spec):
    """Whether spec is a run's folder or checkpoint."""
    path = Path(spec)
    return path.suffix == ".pt" or (path / "last.pt").is_file() or (path / "samples.npy").is_file()


def open_source(spec, size, cfg):
    """Command-line word -> Source: NAME[:SPLIT] of a data set, a run or its last.pt, a .npy, else a folder."""
    name, _, split = spec.partition(":")
    if name in data.SETS or "," in name:
        if split not in ("", "train", "test", "all"):
            raise data.UserError(f"{spec}: the split is train, test or all")
        name, images, _, _ = data.choose(name, size, split or "train")
        return Source(f"{name}:{split or 'train'}", len(images), images.shape[1], lambda i: list(images[i]), size, name)
    if is_run(spec):
        return from_run(Path(spec), cfg)
    return from_array(spec, spec) if spec.endswith(".npy") else from_folder(Path(spec), cfg)


def measure(source, net, cfg):
    """Source -> Stats: features in chunks of cfg.batch pictures, never all decoded at once, with progress."""
    index = torch.randperm(source.n, generator=torch.Generator().manual_seed(cfg.seed))[:cfg.n or None].sort().values
    done, start, shown, x = 0, time.monotonic(), 0.0, []
    for chunk in index.split(cfg.batch):
        pictures = source.read(chunk.numpy())
        for shape in {p.shape for p in pictures}:                          # one batch a picture size
            x.append(net.features(torch.stack([p for p in pictures if p.shape == shape])))
        done, seconds = done + len(chunk), time.monotonic() - start
        if seconds - shown > 1 or done == len(index):
            shown = seconds
            print(f"\r{source.name}: {done:6,} of {len(index):,}  {done / seconds:7.1f} images/s  "
                  f"{data.clock(seconds / done * (len(index) - done))} left ", end="", flush=True)
    print(f", {source.skipped} broken left out" if source.skipped else "", flush=True)
    n = sum(len(f) for f in x)
    if n < 2:
        raise data.UserError(f"{source.name}: {n} picture(s); a covariance needs at least 2")
    x = torch.cat(x)
    return Stats(source.name, net.name, n, *gaussian(x), x)


# ---- one comparison ------------------------------------------------------------------------------------------------


def kid_error(real, fake, blocks=10):
    """Standard error of KID: the unbiased estimate on 10 disjoint blocks of either set, their deviation / sqrt(10)."""
    k = torch.tensor([kid(a, b) for a, b in zip(real.tensor_split(blocks), fake.tensor_split(blocks))])
    return (k.std() / blocks ** 0.5).item()


def extrapolate(real, fake, seed=0, points=8):
    """FID at infinite n (Chong & Forsyth 2020): FID_n = FID_inf + c / n, fitted on subsets of n/5 .. n of both sets.

    real, fake: Stats; statistics without features keep their n, and their own bias. -> (FID_inf, its standard error)."""
    generator = torch.Generator().manual_seed(seed)
    inverse, values = [], []
    for share in torch.linspace(1, 5, points):                             # evenly spaced in 1 / n
        sides, sizes = [], []
        for s in (real, fake):
            m = int(s.n / share)
            i = torch.randperm(s.n, generator=generator)[:m]
            sides += gaussian(s.x[i]) if s.x is not None else (s.mu, s.root)
            sizes += [m] if s.x is not None else []
        inverse.append(sum(1 / m for m in sizes) / len(sizes))
        values.append(distance(*sides))
    A = torch.stack([torch.ones(points), torch.tensor(inverse)], 1).double()
    b = torch.tensor(values).double()
    coefficients = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
    variance = (A @ coefficients - b).square().sum() / (points - 2) * torch.linalg.inv(A.T @ A)
    return coefficients[0].item(), variance[0, 0].sqrt().item()


def compare(a, b, cfg):
    """All metrics of two Stats, a the real one -> dict; what needs the features is left out for saved statistics."""
    same_features(a.name, f"{len(a.mu)} {a.features}", b.name, f"{len(b.mu)} {b.features}")
    out = dict(fid=distance(a.mu, a.root, b.mu, b.root), n=b.n, n_real=a.n, features=b.features, real=a.name, fake=b.name)
    if a.x is not None and a.n >= 4:                                       # the floor: two halves of the real set
        shuffled = a.x[torch.randperm(a.n, generator=torch.Generator().manual_seed(cfg.seed))]
        out |= dict(floor=fid(shuffled[:a.n // 2], shuffled[a.n // 2:]), floor_n=a.n // 2)
    if a.x is not None and b.x is not None:
        out |= dict(kid=kid(a.x, b.x))
        if min(a.n, b.n) >= 20:
            out["kid_error"] = kid_error(a.x, b.x)
        if min(a.n, b.n) > 3:
            out["precision"], out["recall"] = precision_recall(a.x, b.x)
    if cfg.extrapolate:
        if b.x is None or b.n < 100:
            raise data.UserError(f"--extrapolate needs the pictures of {b.name}, at least 100, not its statistics")
        out["fid_inf"], out["fid_inf_error"] = extrapolate(a, b, cfg.seed)
    return out


def report(r, d):
    """Prints compare's dict, for a feature dimension d."""
    print(line(r))
    if "kid" in r:
        error = f" +- {r['kid_error']:.1g} (standard error over 10 blocks)" if "kid_error" in r else ""
        print(f"KID {r['kid']:.4g}{error}" + (f", precision {r['precision']:.3f}, recall {r['recall']:.3f} (k = 3)"
                                              if "precision" in r else ""))
    if "fid_inf" in r:
        print(f"FID at infinite n {r['fid_inf']:.3g} +- {r['fid_inf_error']:.1g} (line through 8 subsets, in 1/n)")
    n = min(k for k in (r["n"], r["n_real"], 1 << 40) if k)
    if n < 10_000 * d // 2048:
        print(f"warning: n = {n} is small. FID is too high by about c/n (equal distributions, 2048 features: 4.6 at 1000, 0.5 at "
              f"10,000), so compare at one n only, or use --extrapolate 1" +
              (f"; with n <= {d} the covariance is singular as well" if n <= d else ""))


# ---- what the roots cost, what the network costs -------------------------------------------------------------------


def newton_schulz(a, iterations=25):
    """Square root of a (d, d) by products only (Higham 2008, section 6.7): Y -> a^1/2, Z -> a^-1/2. Loved by GPUs and
    autograd; slow to reach small eigenvalues, which an FID has thousands of."""
    norm, one = a.norm(), torch.eye(len(a), dtype=a.dtype)
    y, z = a / norm, one
    for _ in range(iterations):
        t = (3 * one - z @ y) / 2
        y, z = y @ t, t @ z
    return y * norm.sqrt()


def denman_beavers(a, iterations=12):
    """Square root by inverses (Denman & Beavers 1976): Y -> a^1/2, Z -> a^-1/2, in a dozen steps. Needs a regular a."""
    y, z = a, torch.eye(len(a), dtype=a.dtype)
    for _ in range(iterations):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return y


def symmetric_trace(s1, s2):
    """tr (S1 S2)^1/2 by two eigendecompositions, as in the derivation above."""
    r = sqrtm(s1)
    return torch.linalg.eigvalsh(r @ s2 @ r).clamp(min=0).sqrt().sum()

def roots(d=2048, n=1000):
    """Prints seconds and relative FID errors of the ways to the root, against a pair whose answer is known.

    With T symmetric positive definite and S2 = T S1 T: S1 S2 = (S1 T)^2, hence tr (S1 S2)^1/2 = tr (S1 T) exactly."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    mix = torch.arange(1, d + 1, dtype=torch.float64)[:, None] ** -0.6 * normal(d, d) / d ** 0.5
    w = normal(d, d) / d ** 0.5
    T, zero = torch.eye(d, dtype=torch.float64) + 0.2 * w @ w.T, torch.zeros(d, dtype=torch.float64)
    print(f"d = {d}, float64, {torch.get_num_threads()} threads; singular: n = {n}\n{'':44}{'full rank':>22}{'singular':>22}")
    print(f"{'':44}" + f"{'seconds':>10}{'error':>12}" * 2)
    cells = {}
    for m in (5 * d, n):
        x = normal(m, d) @ mix
        f1 = ((x - x.mean(0)) / (m - 1) ** 0.5).T                           # S1 = F1 F1^T, S2 = T S1 T
        f2 = T @ f1
        s1, s2 = f1 @ f1.T, f2 @ f2.T
        exact = ((s1.trace() + s2.trace()) - 2 * (s1 * T).sum()).item()
        root1 = f1 if m <= d else factor(s1)
        trace = lambda t: (s1.trace() + s2.trace() - 2 * t).item()
        ways = {"Newton-Schulz, 15 iterations": lambda: trace(newton_schulz(s1 @ s2, 15).trace()),
                "Newton-Schulz, 25 iterations": lambda: trace(newton_schulz(s1 @ s2, 25).trace()),
                "Newton-Schulz, 40 iterations": lambda: trace(newton_schulz(s1 @ s2, 40).trace()),
                "Denman-Beavers, 12 iterations": lambda: trace(denman_beavers(s1 @ s2).trace()),
                "eigendecomposition twice": lambda: trace(symmetric_trace(s1, s2)),
                "here: from two covariances": lambda: frechet_distance(zero, s1, zero, s2),
                "here: the real root kept": lambda: distance(zero, root1, zero, factor(s2)),
                "here: centred features are roots (n <= d)": lambda: distance(zero, f1, zero, f2) if m <= d else None}
        with contextlib.suppress(ImportError):
            from scipy import linalg, __version__ as version
            ways[f"scipy {version} sqrtm(s1 @ s2)"] = lambda: trace(np.trace(linalg.sqrtm((s1 @ s2).numpy())).real)
        for name, way in ways.items():
            start = time.perf_counter()
            try:
                value = way()
            except RuntimeError:                                           # LAPACK: an inverse of a singular matrix
                value = float("nan")
            seconds = time.perf_counter() - start
            cells.setdefault(name, []).append(f"{'-':>10}{'-':>12}" if value is None else
                                              f"{seconds:10.2f}{abs(value / exact - 1):12.1e}")
    for name, row in cells.items():
        print(f"{name:44}" + "".join(row), flush=True)


def stand_in(seed=0):
    """An Inception state dict with random weights of sensible size: for timing, where the published file is not at hand."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = Inception().state_dict()
        for key, t in state.items():
            if key.endswith("conv.weight"):
                nn.init.kaiming_normal_(t)
            elif key.endswith("running_mean"):
                t.normal_(0, 0.3)
            elif key.endswith("running_var"):
                t.uniform_(0.7, 1.4)
    return state


def speed(device, n=64, rounds=3):
    """Prints images/s and feature errors of the plain, the folded channels_last and the bfloat16 network, interleaved."""
    file = data.find(WEIGHTS)
    state = torch.load(file, weights_only=True) if file else stand_in()
    plain = Inception()
    plain.load_state_dict(dict(state))
    nets = {"plain (float32, NCHW, batch norm)": plain, "folded, channels_last": Inception().load_published(state),
            "the same in bfloat16": Inception().load_published(state).to(torch.bfloat16)}
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    seconds, features = {k: [] for k in nets}, {}
    for _ in range(rounds + 1):                                            # the first round warms up
        for name, net in nets.items():
            start = time.perf_counter()
            features[name] = net.to(device).features(images)
            seconds[name].append(time.perf_counter() - start)
    f = features["plain (float32, NCHW, batch norm)"]
    best = {k: min(s[1:]) for k, s in seconds.items()}
    for name in nets:
        print(f"{name:36}{n / best[name]:8.1f} images/s  x{best['plain (float32, NCHW, batch norm)'] / best[name]:.2f}  "
              f"feature error {((features[name] - f).norm() / f.norm()).item():.1e}")


# ---- main ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    sources: tuple = ()           # real, then generated: folder, data set[:split], run folder, last.pt, .npy or .npz
    features: str = "inception"   # inception (published numbers) or classifier (trained here, no download)
    data: str = ""                # data set whose classifier gives the features; empty: that of the sources
    size: int = 0                 # side in pixels at which a data set is loaded; 0: that of the run, else 32
    n: int = 0                    # at most this many pictures a side, chosen by the seed; 0: all (of a run 10,000)
    batch: int = 32               # pictures decoded and passed through the network at once
    device: str = "auto"          # auto, cuda, mps, cpu
    bf16: int = 0                 # 1: Inception in bfloat16: faster, not for publication
    seed: int = 0                 # seed of subsets and halves
    save: str = ""                # write the first source's statistics to this .npz
    skip_broken: int = 0          # 1: leave unreadable pictures out and count them
    extrapolate: int = 0          # 1: FID at infinite n
    json: int = 0                 # 1: print one JSON object


def inception(device, bf16=0):
    """The published network, from DATA_DIR, downloads/ or its mirrors. Errors: UserError naming URL, path and sha256."""
    name = next((n for n in (WEIGHTS, WEIGHTS[3:]) if data.find(n)), WEIGHTS)
    try:
        path = data.fetch(name, WEIGHTS_URLS, WEIGHTS_SHA256, "96 MB")
    except data.Unavailable as e:
        raise data.UserError(f"{e}; or use --features classifier, which needs no download") from None
    net = Inception().load_published(torch.load(path, map_location="cpu", weights_only=True)).to(device)
    if bf16:
        net.to(torch.bfloat16).name = "inception-bfloat16, not for publication"
    return net


def check(cfg):
    """What makes no sense ends here, in one line."""
    if cfg.features not in ("inception", "classifier"):
        raise data.UserError(f"--features {cfg.features} is unknown; inception or classifier")
    if cfg.n < 0 or cfg.n == 1 or cfg.batch < 1:
        raise data.UserError(f"--n {cfg.n} --batch {cfg.batch}: a covariance needs 2 pictures, a batch 1")
    if len(cfg.sources) == 1 and not (cfg.save or is_run(cfg.sources[0])):
        raise data.UserError("one source is enough for a run or with --save; name two: python fid.py REAL GENERATED")
    if not 1 <= len(cfg.sources) <= 2:
        raise data.UserError(f"{len(cfg.sources)} sources; name two: python fid.py REAL GENERATED")


def statistics(cfg):
    """The Stats of the sources, the real one first."""
    specs, opened, stats = list(cfg.sources), {}, {}
    for spec in sorted(specs, key=lambda s: s.split(":")[0] in data.SETS):  # runs before data sets: they know their size
        if spec.endswith(".npz"):
            stats[spec] = load_stats(spec)
        else:
            size = cfg.size or next((s.size for s in opened.values() if s.size), 32)
            opened[spec] = open_source(spec, size, cfg)
    if len(specs) == 1 and not cfg.save:                                   # a run alone: against its own data
        run = opened[specs[0]]
        if not run.data:
            raise data.UserError(f"{specs[0]} does not say what it was trained on; name it: python fid.py REAL {specs[0]}")
        specs.insert(0, run.data)
        opened[run.data] = open_source(run.data, cfg.size or run.size, cfg)
    if len({s.channels for s in opened.values()}) > 1:
        raise data.UserError("different channels: " + ", ".join(f"{s.name} has {s.channels}" for s in opened.values()) +
                             "; convert one of them to the other's")
    if opened:
        net = network(cfg, [opened[s] for s in specs if s in opened])
        for s in stats.values():
            same_features(s.name, s.features, "the other side", net.name)
        stats |= {spec: measure(source, net, cfg) for spec, source in opened.items()}
    return [stats[s] for s in specs]


def network(cfg, sources):
    """The network that the flags ask for; a classifier is that of the sources' data set."""
    device = data.device(cfg.device)
    if cfg.features == "inception":
        return inception(device, cfg.bf16)
    name = cfg.data or next((s.data for s in sources if s.data), "")
    if not name:
        raise data.UserError("which data set's classifier? name it with --data")
    return classifier(name, cfg.size or next((s.size for s in sources if s.size), 32), device)


def main(argv=None):
    cfg, _ = data.arguments(Config, argv, positional="sources")
    if tuple(cfg.sources) == ("roots",):
        return roots()
    if tuple(cfg.sources) == ("speed",):
        return speed(data.device(cfg.device))
    check(cfg)
    with contextlib.redirect_stdout(sys.stderr) if cfg.json else contextlib.nullcontext():
        stats = statistics(cfg)
        if cfg.save:
            save_stats(cfg.save, stats[0])
            print(f"wrote {cfg.save}: statistics of {stats[0].name}, n = {stats[0].n}, {stats[0].features}")
    if len(stats) == 2:
        result = compare(*stats, cfg)
        print(json.dumps(result)) if cfg.json else report(result, len(stats[0].mu))


if __name__ == "__main__":
    data.run_main(main)
