"""fid.py: FID, KID, precision and recall of generated pictures, the matrix square root by hand.

    python fid.py mnist:test out/dcgan          real first: a data set, folder, run or .npy
    python fid.py out/dcgan                     a run against its own training pictures
    python fid.py sanity --data mnist           what these numbers see of what an eye sees

A network turns each picture into d features; a Gaussian N(mu, S) is fitted to the features of
either set; FID is the squared Frechet distance of the two (Heusel 2017, eq. 6):

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2

fid_textbook is this line. fid is the same number faster: only the trace of the root is wanted, the
sum of the roots of the eigenvalues of S1 S2. Take any F1, F2 with S1 = F1 F1^T, S2 = F2 F2^T. AB
and BA share their non-zero eigenvalues, so those of S1 S2 = F1 (F1^T F2 F2^T) are those of
(F1^T F2 F2^T) F1 = A A^T with A = F1^T F2, and their roots are the singular values of A:

    tr (S1 S2)^1/2 = sum of the singular values of F1^T F2

No inverse, no epsilon, so singular covariances are as good as others. The centred features are such
an F, and so is the triangle of their QR decomposition, which is small where there are many.

Which network? The published Inception if it can be had: its FIDs compare with the papers' at equal
n. Else a small classifier trained here on the data set itself: its FIDs compare with each other. It
is trained on pictures with lifted background, less contrast, noise, blur and shifts, so that a
veil that an eye hardly sees is no catastrophe to it, and is still seen. Without labels it guesses
turns, colours, disturbances, and which picture it is.

Measured, one thread of an AMD EPYC, processor time, torch 2.13; of classifiers:
    python fid.py sanity --data mnist        trained in 52 s; 99.35% of the test pictures right
    python fid.py sanity --data emoji-apple  floor 0.81; noise of sigma 0.12: 32 floors; a share of
                                             0.6 with channels exchanged: 13, or one picture: 31
"""
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import need


@dataclass
class FIDConfig:
    """What is measured. A field is a flag and its comment the flag's help."""
    sources: tuple = ()     # real, generated: data set[:split], folder, run or .npy; or sanity
    features: Literal["auto", "inception", "classifier"] = "auto"   # auto: inception if it is there
    data: str = ""          # data set whose classifier gives features; empty: the real one's
    n: int = 0              # at most so many generated pictures; 0: all, 5000 for sanity
    device: str = "auto"    # auto, cuda, mps, cpu
    json: int = 0           # 1: the last line is one JSON object


# ---- the lecture's FID ---------------------------------------------------------------------------

def sqrtm(a):
    """Square root of a symmetric positive semi-definite matrix (d, d): R with R R = a.

    a = V diag(w) V^T has the root V diag(w^1/2) V^T. A singular a is welcome: where rounding makes
    an eigenvalue -1e-17 it counts as 0. An a that is not symmetric has no root of this form."""
    w, V = torch.linalg.eigh(a)
    return V @ torch.diag(w.clamp(min=0).sqrt()) @ V.T


def fid_textbook(real, fake):
    """FID of features (N, d) and (M, d), Heusel 2017 eq. 6, as the lecture has it -> 0-d tensor.

    S1 S2 is not symmetric, but S1^1/2 S2 S1^1/2 is, and has the same eigenvalues."""
    real, fake = real.double(), fake.double()
    mu1, mu2 = real.mean(0), fake.mean(0)                                   # (d,)
    S1, S2 = real.T.cov(), fake.T.cov()                                     # (d, d), with N - 1
    R1 = sqrtm(S1)
    root = sqrtm(R1 @ S2 @ R1)
    return ((mu1 - mu2) ** 2).sum() + torch.trace(S1 + S2 - 2 * root)


# ---- the same, faster ----------------------------------------------------------------------------

def distance(mu1, F1, mu2, F2):
    """d^2 of the header from means (d,) and factors (d, r), S = F F^T, tr S = |F|^2 -> float."""
    root = torch.linalg.svdvals(F1.T @ F2).sum()
    d2 = ((mu1 - mu2) ** 2).sum() + (F1 ** 2).sum() + (F2 ** 2).sum() - 2 * root
    return d2.clamp(min=0).item()


def fid(real, fake):
    """Frechet distance of features (N, d) and (M, d), N, M >= 2 -> float: 0 is equal, lower is
    better. It falls with n, so never state it without."""
    parts = []
    for x in (real, fake):
        x = torch.as_tensor(x).double()
        mu = x.mean(0)
        x = (x - mu) / (len(x) - 1) ** .5                                   # x^T x = S
        if len(x) > x.shape[1]:
            x = torch.linalg.qr(x, mode="r").R                              # (d, d): R^T R = S too
        parts += [mu, x.T]
    return distance(*parts)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: means (d,), covariances (d, d) -> float.

    At full rank F1 is Cholesky's triangle L, and the eigenvalues of A A^T = L^T S2 L take half the
    time."""
    mu1, S1, mu2, S2 = (torch.as_tensor(t).double() for t in (mu1, sigma1, mu2, sigma2))
    L, singular = torch.linalg.cholesky_ex(S1)
    if singular:
        return distance(mu1, sqrtm(S1), mu2, sqrtm(S2))
    w = torch.linalg.eigvalsh(L.T @ S2 @ L).clamp(min=0)
    d2 = ((mu1 - mu2) ** 2).sum() + torch.trace(S1 + S2) - 2 * w.sqrt().sum()
    return d2.clamp(min=0).item()


# ---- KID, precision and recall -------------------------------------------------------------------

def kernel(x, y):
    """k(a, b) = (a . b / d + 1)^3 of all rows a of x (N, d), b of y (M, d) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(real, fake):
    """Kernel distance of features (N, d), (M, d): the unbiased MMD^2 under this kernel, Binkowski
    2018; Gretton 2012, eq. 3: without the pairs (a, a) -> float, about 0, or below, for equal sets.
    """
    x, y = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    mmd = -2 * kernel(x, y).mean()
    for a in (x, y):
        aa = kernel(a, a).fill_diagonal_(0)                                 # (N, N)
        mmd += aa.sum() / (len(a) * (len(a) - 1))
    return mmd.item()


def covered(x, y, k):
    """Share of the rows of y (M, d) that lie no further from some row of x (N, d) than that row's
    k-th neighbour in x."""
    radius = torch.cdist(x, x).kthvalue(k + 1).values                       # (N,); 1st: itself
    return (torch.cdist(y, x) <= radius).any(1).double().mean().item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall of features (N, d), (M, d), Kynkaanniemi 2019, sec. 2 -> two
    floats in [0, 1]: the share of fakes within the k-th-neighbour radius of some real picture, and
    the share of real ones within that of some fake."""
    x, y = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    return covered(x, y, k), covered(y, x, k)


# ---- what an eye hardly minds, or does -----------------------------------------------------------

KINDS = ("none", "lifted", "lowered", "contrast", "noise", "blur")


def disturb(x, kind, strength):
    """Pictures (N, C, S, S) in [-1, 1], each disturbed in its kind (N,), an index of KINDS, by its
    strength (N,) in [0, 1], or one number for all. At strength 1 black is lifted to 40 of 255,
    white lowered to 215, contrast halved, noise of sigma 0.2 of the range added, or each pixel is
    the mean of 5 x 5."""
    s = torch.as_tensor(strength).view(-1, 1, 1, 1)
    bound = 1 - s * 80 / 255
    blurred = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
    versions = torch.stack([x, x.maximum(-bound), x.minimum(bound), x * (1 - s / 2),
                            x + .4 * s * torch.randn_like(x), x.lerp(blurred, s)])  # (6, N, ...)
    return versions[kind, torch.arange(len(x))].clamp(-1, 1)


# ---- classifier: features without a download -----------------------------------------------------

def conv_block(i, o, kernel=1, stride=1, padding="same"):
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(i, o, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(o, eps=1e-3),
        relu=nn.ReLU(),
    ))


class Classifier(nn.Module):
    """Small CNN: pictures (C, size, size) -> 128 features -> logits, a head a kind of label.

    heads: (10,) for ten classes, (12, 11) for hair and eyes."""
    name = "classifier trained here"
    scale = "compares with FIDs of this very classifier only, not with Inception's"
    accuracy = ()

    def __init__(self, channels, size, heads):
        super().__init__()
        self.channels = channels
        self.size = size
        self.heads = heads
        self.body = nn.Sequential(
            conv_block(channels, 32, 5, 2, 2),                              # 32 -> 16
            nn.MaxPool2d(max(1, size // 32)),
            conv_block(32, 64, 3),
            nn.MaxPool2d(2),                                                # 8
            conv_block(64, 128, 3),
            nn.MaxPool2d(2),                                                # 4
            conv_block(128, 128, 3),
            nn.AdaptiveAvgPool2d(1),                                        # 1
            nn.Flatten(),                                                   # (N, 128)
        )
        self.head = nn.Linear(128, sum(heads))

    def forward(self, x):
        """Floats (N, C, size, size) in [-1, 1] -> logits [(N, k), ...], one tensor a head."""
        return self.head(self.body(x)).split(self.heads, dim=1)

    @torch.no_grad()
    def features(self, images):
        """uint8 (N, C, H, W) of any size -> float32 (N, 128) on the CPU."""
        check_images(images, self.channels)
        self.eval()
        out = []
        for x in images.split(500):
            x = data.fit(x.to(self.head.weight.device), self.size)
            out.append(self.body(data.to_float(x.expand(-1, self.channels, -1, -1))).cpu())
        return torch.cat(out)

    @torch.no_grad()
    def predict(self, images):
        """uint8 (N, C, H, W) -> labels (N,) as the data set numbers them, 11 * hair + eyes for
        faces, and confidence (N,) in [0, 1], both on the CPU."""
        h = self.features(images).to(self.head.weight.device)
        label = 0
        sure = 1.
        for logits in self.head(h).cpu().split(self.heads, dim=1):
            chance = logits.softmax(1)                                      # (N, k)
            label = label * chance.shape[1] + chance.argmax(1)
            sure = sure * chance.amax(1)
        return label, sure

    def attributes(self, images):
        """uint8 (N, C, H, W) -> labels (N,), one tensor a head: (hair, eyes)."""
        label, _ = self.predict(images)
        return torch.unravel_index(label, self.heads)


def check_images(images, channels):
    """UserError unless images are uint8 (N, C, H, W), grey or with as many channels."""
    need(images.dtype == torch.uint8 and images.shape[1] in (1, channels),
         f"pictures must be uint8 (N, C, H, W), grey or with {channels} channel(s), here "
         f"{images.dtype} {tuple(images.shape)}")


def pretext(x, i):
    """What to guess where there are no labels. Pictures (N, 3, S, S) in [-1, 1], number i (N,) of
    their set -> the same, turned (Gidaris 2018), with channels exchanged, disturbed; and which of 4
    turns, 3 orders, 6 kinds (weak: none) and which picture i it is (Dosovitskiy 2014), 4 x (N,)."""
    turn, order, kind = [torch.randint(k, (len(x),)) for k in (4, 3, 6)]
    triples = zip(x, turn.tolist(), order.tolist())
    x = torch.stack([picture.rot90(t, (1, 2)).roll(o, 0) for picture, t, o in triples])
    strength = torch.rand(len(x))
    return disturb(x, kind, strength), [turn, order, kind * (strength > .4), i]


def augment(x):
    """Pictures (N, C, S, S) in [-1, 1], moved by up to 2 pixels around the edge, and disturbed."""
    x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
    return disturb(x, torch.randint(6, (len(x),)), torch.rand(len(x)))


STEPS = 2000                        # of a classifier's training


def train_classifier(net, images, labels):
    """Trains net on uint8 images (N, C, size, size) and labels (N,), or None: the pretext."""
    device = net.head.weight.device
    optimiser = torch.optim.AdamW(net.parameters())
    for step in range(1, STEPS + 1):
        optimiser.param_groups[0]["lr"] = 4e-3 * (1 - step / STEPS)
        i = torch.randint(len(images), (64,))
        x = data.to_float(images[i])
        if labels is None:
            x, y = pretext(x, i % net.heads[-1])
        else:
            x = augment(x)
            y = torch.unravel_index(labels[i], net.heads)    # 11 * hair + eyes
        loss = 0.                           # each head's share of it begins at about 1
        with data.autocast(-1, device):
            for logits, part in zip(net(x.to(device)), y):
                loss += F.cross_entropy(logits, part.to(device)) / np.log(logits.shape[1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 200 == 1:
            print(f"training {net.name}, once: step {step} of {STEPS}, loss {loss.item():.3f}",
                  flush=True)


def classifier(name, size, device="cpu"):
    """The Classifier of a data set or folder at a size: from DOWNLOADS/classifiers, or trained now.

    Heads: the classes; hair (12) and eyes (11) of faces; accuracy is the share of the test split
    that each has right. Without labels they are the pretext's, and there is no accuracy."""
    images, labels, classes = data.load(name, size, "train")
    heads = (len(classes),)
    if classes == data.FACES:
        heads = (12, 11)                                    # hair, eyes
    elif not classes:
        labels = None
        heads = (4, 3, 6, min(len(images), 4096))
    tag = f"{Path(name).name}-{size}"               # count and sum tell sets apart; v2: how trained
    path = data.DOWNLOADS / f"classifiers/{tag}-{len(images)}-{images.sum()}-v2.pt"
    with torch.random.fork_rng():                       # the caller's random numbers stay
        torch.manual_seed(0)
        net = Classifier(images.shape[1], size, heads).to(device, memory_format=torch.channels_last)
        net.name = f"classifier-{tag}"
        net.data = name
        net.background = images[..., [0, -1]].median().item()
        if path.is_file():
            saved = data.load_checkpoint(path, device)
            net.accuracy = saved.pop("accuracy")
            net.load_state_dict(saved)
            return net
        train_classifier(net, images, labels)
    if labels is not None:
        x, y, _ = data.load(name, size, "test")
        right = torch.stack(net.attributes(x)) == torch.stack(torch.unravel_index(y, heads))
        net.accuracy = right.double().mean(1).tolist()
    data.save_state(path, net.state_dict() | dict(accuracy=net.accuracy))
    return net


# ---- Inception v3, the published network of the FID ----------------------------------------------

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URLS = [
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS,
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-" + WEIGHTS[3:],
]

ROW = (1, 7)                        # kernels: a row, a column
COLUMN = (7, 1)


def block_a(pool):
    """35 x 35: branches of pools and (name, channels, kernel, stride, padding), joined by
    channel."""
    return [
        [("branch1x1", 64)],
        [("branch5x5_1", 48), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["mean", ("branch_pool", pool)],
    ]


def block_c(c):
    """17 x 17."""
    return [
        [("branch1x1", 192)],
        [("branch7x7_1", c), ("branch7x7_2", c, ROW), ("branch7x7_3", 192, COLUMN)],
        [("branch7x7dbl_1", c), ("branch7x7dbl_2", c, COLUMN), ("branch7x7dbl_3", c, ROW),
         ("branch7x7dbl_4", c, COLUMN), ("branch7x7dbl_5", 192, ROW)],
        ["mean", ("branch_pool", 192)],
    ]


def block_e(pool):
    """8 x 8. A branch that forks is written as two with the same first layers, computed once."""
    return [
        [("branch1x1", 320)],
        [("branch3x3_1", 384), ("branch3x3_2a", 384, (1, 3))],
        [("branch3x3_1", 384), ("branch3x3_2b", 384, (3, 1))],
        [("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3), ("branch3x3dbl_3a", 384, (1, 3))],
        [("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3), ("branch3x3dbl_3b", 384, (3, 1))],
        [pool, ("branch_pool", 192)],
    ]


# Torchvision's means count the padding, and its 7c has a mean where this one has a maximum.
POOLS = {
    "mean": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "max": nn.MaxPool2d(3, 1, 1),
    "halve": nn.MaxPool2d(3, 2),
}
MIXED = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": [                                                           # 35 -> 17
        [("branch3x3", 384, 3, 2, 0)],
        [("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2, 0)],
        ["halve"],
    ],
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": [                                                           # 17 -> 8
        [("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2, 0)],
        [("branch7x7x3_1", 192), ("branch7x7x3_2", 192, ROW), ("branch7x7x3_3", 192, COLUMN),
         ("branch7x7x3_4", 192, 3, 2, 0)],
        ["halve"],
    ],
    "Mixed_7b": block_e("mean"),
    "Mixed_7c": block_e("max"),
}


class Mixed(nn.ModuleDict):
    """One block from its table: i channels enter each branch, self.channels leave."""

    def __init__(self, i, branches):
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            c = i
            for layer in branch:
                if layer not in POOLS:                      # a pool keeps the channels
                    name, o, *shape = layer
                    self[name] = conv_block(c, o, *shape)
                    c = o
            self.channels += c

    def forward(self, x):
        out = []
        done = {}
        for branch in self.branches:
            h = x
            for layer in branch:
                if layer not in done:
                    module = POOLS.get(layer) or self[layer[0]]
                    done[layer] = module(h)
                h = done[layer]
            out.append(h)
        return torch.cat(out, 1)


class Inception(nn.Module):
    """Inception v3 (Szegedy 2016) as the TensorFlow graph of 2015-12-05 has it, the network of the
    published FIDs: 23,850,960 parameters; 1008 classes, no auxiliary head, and see POOLS."""
    name = "inception"
    scale = "compares with published FIDs at equal n"
    channels = 3
    accuracy = ()

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv_block(3, 32, 3, 2, 0)                     # 299 -> 149
        self.Conv2d_2a_3x3 = conv_block(32, 32, 3, 1, 0)                    # 147
        self.Conv2d_2b_3x3 = conv_block(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)                                  # 73
        self.Conv2d_3b_1x1 = conv_block(64, 80)
        self.Conv2d_4a_3x3 = conv_block(80, 192, 3, 1, 0)                   # 71
        self.maxpool2 = nn.MaxPool2d(3, 2)                                  # 35
        c = 192
        for name, branches in MIXED.items():
            block = Mixed(c, branches)
            self.add_module(name, block)
            c = block.channels
        self.fc = nn.Linear(c, 1008)                                        # not used
        self.eval()

    def forward(self, x):
        """(N, 3, 299, 299) in [-1, 1] -> (N, 2048)."""
        *layers, _ = self.children()                                        # all but fc
        for layer in layers:
            x = layer(x)
        return x.mean((2, 3))                                               # of (N, 2048, 8, 8)

    @torch.no_grad()
    def features(self, images):
        """uint8 (N, 1 or 3, H, W) of any size -> float32 (N, 2048) on the CPU. Resized to 299 x 299
        bilinearly without antialiasing, as the published FIDs are."""
        check_images(images, 3)
        out = []
        torch.backends.cudnn.allow_tf32 = False             # it would cost three digits
        for x in images.split(32):
            x = data.to_float(x.to(self.fc.weight.device)).expand(-1, 3, -1, -1)
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
            out.append(self(x).cpu())
            if len(out) % 32 == 0:
                print(f"inception {32 * len(out):,} of {len(images):,} pictures")
        return torch.cat(out)

    def load_published(self, state):
        """Takes the published state dict, with num_batches_tracked or without, folds the batch
        norms and goes channels_last. RuntimeError if it is another's."""
        self.load_state_dict(dict(state))                   # a plain dict may lack the counters
        for module in self.modules():
            if hasattr(module, "bn"):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


# ---- scores --------------------------------------------------------------------------------------

def shuffled(images):
    """Pictures, or other rows of a tensor, in an order that is always the same."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order]


def scores(net, real, fake):
    """Metrics of fakes against as many of the real pictures, uint8 (N, C, H, W) -> dict fid, kid,
    precision, recall (of the first 5,000), n, n_real, features, scale, floor, floor_n.

    floor: the FID of the first n real pictures and the next n, or of halves if there are fewer."""
    n = len(fake)
    half = min(n, len(real) // 2)
    need(half > 3, f"{n} pictures against {len(real)} real ones: at least 4 and 8")
    x, y = net.features(real[:2 * n]), net.features(fake)
    floor = fid(x[:half], x[half:2 * half])
    x = x[:n]
    few = x[:5000], y[:5000]
    precision, recall = precision_recall(*few)
    return dict(fid=fid(x, y), kid=kid(*few), precision=precision, recall=recall, n=n,
                n_real=len(x), features=net.name, scale=net.scale, floor=floor, floor_n=half)


def against(net, images, fake, name):
    """Metrics of uint8 fakes (n, C, H, W) against n of the training pictures of the data set
    `name`, or where it has fewer all of these and its test pictures; the floor is that of n others,
    or of halves. -> dict, see scores."""
    n = len(fake)
    images = shuffled(images)
    test, _, _ = data.load(name, images.shape[-1], "test")
    return scores(net, torch.cat([images[:n], test.to(images.device), images[n:2 * n]]), fake)


def line(result):
    """`FID 12.3 (classifier-mnist-32, n = 10000, real-vs-real floor 0.4)`: never a bare FID."""
    n = str(result["n"])
    floor = f"{result['floor']:.2g}"
    if result["n_real"] != result["n"]:
        n = f"{result['n_real']} real, {n}"
    if result["floor_n"] != result["n"]:
        floor += f" at n = {result['floor_n']}"
    return f"FID {result['fid']:.3g} ({result['features']}, n = {n}, real-vs-real floor {floor})"


def count(net, fake, labels, classes, asked=None):
    """Which classes the fakes show, uint8 (N, C, H, W), as net names them -> dict.

    counts; modes, how many of `classes`; entropy, 1 where all are equal and 0 where there is one;
    rarest share; mean confidence; missing in the first 80; chi2 against the data's labels, on the
    CPU; background, the median of the left and right border, and that of the data. With labels
    asked (N,), of each head the accuracy and a table: asked (rows), seen."""
    seen, sure = net.predict(fake)
    n = len(fake)
    k = len(classes)
    counts = seen.bincount(minlength=k)
    wanted = labels.bincount(minlength=k) / len(labels) * n
    result = {"counts": counts.tolist(), "modes": len(seen.unique()),
              "entropy": (torch.special.entr(counts / n).sum() / np.log(k)).item(),
              "rarest": counts[wanted > 0].min().item() / n, "confidence": sure.mean().item(),
              "missing in 80": k - len(seen[:80].unique()),
              "chi2": ((counts - wanted) ** 2 / wanted)[wanted > 0].sum().item(),
              "background": fake[..., [0, -1]].median().item(), "background real": net.background}
    if asked is not None:
        names = ("hair", "eyes") if len(net.heads) == 2 else ("label",)
        asked = torch.unravel_index(asked, net.heads)
        seen = torch.unravel_index(seen, net.heads)
        for name, size, wish, look in zip(names, net.heads, asked, seen):
            result[f"{name} accuracy"] = (wish == look).double().mean().item()
            table = F.one_hot(wish, size).T @ F.one_hot(look, size)
            result[f"{name} asked seen"] = table.tolist()
    print(f"classes  {result['modes']} of {k} drawn, entropy {result['entropy']:.3f}, rarest "
          f"{100 * result['rarest']:.1f}%, chi2 {result['chi2']:.0f}, mean confidence "
          f"{result['confidence']:.3f}; background {result['background']:.0f} of 255, in the data "
          f"{net.background:.0f}; counts {result['counts'] if k < 20 else 'in result.json'}")
    return result


# ---- sanity: what the numbers see ----------------------------------------------------------------

def spoiled(x, y):
    """Real pictures uint8 (N, C, S, S) and labels (N,) -> (what, pictures, labels) of them spoiled
    in ways that an eye minds little or much."""
    yield "untouched: the floor", x, y
    for s in (.2, .6):
        for kind in range(1, len(KINDS)):
            yield f"{KINDS[kind]} {s}", data.to_uint8(disturb(data.to_float(x), kind, s)), y
        m = int(s * len(x))
        if x.shape[1] == 3:
            yield f"{s} with channels exchanged", torch.cat([x[:m].roll(1, 1), x[m:]]), y
        i = torch.arange(len(x)).clamp(min=m)
        yield f"{s} replaced by one picture", x[i], y[i]
        keep = y >= s * (y.max() + 1)
        if y.any():
            yield f"{s} of the classes missing", x[keep], y[keep]


def sanity(net, images, labels, n):
    """Prints a Markdown table: n real pictures, spoiled, against n others."""
    need(n >= 20, "sanity needs --n of 20 at least")
    if labels is None:
        labels = torch.zeros(len(images))
    images = shuffled(images)
    labels = shuffled(labels)
    real = net.features(images[:n])
    print("| pictures | n | FID | KID | precision | recall | accuracy |\n"
          "|---|---|---|---|---|---|---|")
    for what, x, y in spoiled(images[n:2 * n], labels[n:2 * n]):
        h = net.features(x)
        precision, recall = precision_recall(real, h)
        accuracy = ""
        if net.accuracy:
            accuracy = f"{(net.predict(x)[0] == y).double().mean():.3f}"
        print(f"| {what} | {len(x)} | {fid(real, h):.3g} | {kid(real, h):.3g} | {precision:.3f} | "
              f"{recall:.3f} | {accuracy} |")


# ---- sources: runs, arrays, folders, data sets ---------------------------------------------------

def is_array(word):
    """Whether a word of the command line is an .npy or a run's folder."""
    run = Path(word)
    return run.suffix == ".npy" or (run / "last.pt").is_file() or (run / "samples.npy").is_file()


def array(word):
    """An .npy of uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3, or a run's folder with
    samples.npy -> uint8 tensor (N, C, H, W)."""
    path = Path(word)
    if path.is_dir():
        path = path / "samples.npy"
    need(path.is_file(), f"no {path}: add --dump 10000 to the command that trained it, python "
         "gan.py dcgan --dump 10000; or name two sources, REAL GENERATED")
    try:
        x = np.load(path)                       # which reads no pickle
    except (ValueError, EOFError) as e:
        raise data.UserError(f"{path} is no readable .npy ({e}); write it again") from None
    need(x.dtype == np.uint8, f"{path} holds {x.dtype}, not uint8; convert [-1, 1] with "
         "((x + 1) * 127.5).round().clip(0, 255).astype('uint8')")
    if x.ndim == 3:
        x = x[..., None]
    if x.shape[-1] in (1, 3):
        x = np.moveaxis(x, -1, 1)
    need(x.ndim == 4 and x.shape[1] in (1, 3) and x.size,
         f"{path} has shape {x.shape}; wanted (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3")
    return torch.from_numpy(x)


def source(word, size, net):
    """A word of the command line -> uint8 pictures (N, C, H, W): data sets at this size, the
    pictures of a folder cropped and scaled to the side of the first."""
    name, _, split = word.partition(":")
    if is_array(word):
        return array(word)
    if Path(word).is_dir():
        pictures = [data.read_picture(path, net.channels) for path in data.pictures(word)]
        side = min(pictures[0].shape[1:])
        return torch.stack([data.fit(picture, side) for picture in pictures])
    need(split in ("", "train", "test", "all"), f"{word}: a split is train, test or all")
    return data.choose(name, size, split or "train")[1]


# ---- main ----------------------------------------------------------------------------------------

def network(cfg, name, size):
    """Inception if it is asked for or can be had, else the classifier of the data set `name`."""
    device = data.device(cfg.device)
    if cfg.features != "classifier":
        try:
            path = data.fetch(WEIGHTS, WEIGHTS_URLS, WEIGHTS_SHA256)
            net = Inception().load_published(data.load_checkpoint(path)).to(device)
            print(f"features {net.name}: {net.scale}")
            return net
        except data.Unavailable as e:
            need(cfg.features == "auto", f"{e}; or --features classifier, which needs no download")
    print(f"features {Classifier.name}: {Classifier.scale}")
    need(not is_array(name), f"{name} is of which data set? add --data SET")
    return classifier(data.choose(name, size)[0], size, device)


def main(argv=None):
    """The command line."""
    _, changes = data.arguments(FIDConfig, argv, positional="sources")
    cfg = FIDConfig(**changes)
    data.at_least(0, cfg, "n")
    words = list(cfg.sources)
    size = 32
    if words == ["sanity"]:
        name, images, labels, _ = data.choose(cfg.data or "mnist,digits", size)
        net = network(cfg, name, size)
        sanity(net, images, labels, min(cfg.n or 5000, len(images) // 2))
        return
    record = Path(*words, "result.json")
    if len(words) == 1 and record.is_file():
        config = json.loads(record.read_text()).get("config", {})
        need("data" in config, f"{words[0]} has no samples: name a run of gan.py")
        words.insert(0, config["data"] + ":all")            # the test set, too: gan.py where few
    need(len(words) == 2, "name two sources, REAL GENERATED, or one run with samples.npy, which "
         "--dump 10000 writes: python gan.py dcgan --dump 10000")
    if is_array(words[1]):
        size = array(words[1]).shape[-1]
    net = network(cfg, cfg.data or words[0].split(":")[0], size)
    fake = shuffled(source(words[1], size, net))[:cfg.n or None]
    real = shuffled(source(words[0], fake.shape[-1], net))          # as sharp as the fakes
    result = scores(net, real, fake)
    if net.accuracy:
        _, labels, classes = data.load(net.data, size)
        result |= count(net, fake, labels, classes)
    print(f"KID      {result['kid']:.3g}  precision {result['precision']:.3f}  recall "
          f"{result['recall']:.3f}")
    print(line(result))
    if cfg.json:
        print(json.dumps(result))


if __name__ == "__main__":
    data.run_main(main)
