"""fid.py: FID, KID, precision and recall of generated pictures; do they copy the training set?

    python fid.py mnist:test out/dcgan          real first: a data set, a folder, a run or an .npy
    python fid.py out/dcgan                     a run against its own training pictures
    python fid.py sanity --data mnist           how these numbers react to spoiled pictures

A network turns each picture into d features. A Gaussian N(mu, S) is fitted to the features of the
real and of the generated pictures, and the FID is the squared Frechet distance of the two (Heusel
2017, eq. 6):

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2

fid_textbook is this line. fid computes the same number faster, because it needs only the trace of
the root, which is the sum of the square roots of the eigenvalues of S1 S2. Take any A with S1 =
A A^T. The products X Y and Y X have the same non-zero eigenvalues. So with X = A and Y = A^T S2 the
non-zero eigenvalues of S1 S2 = A A^T S2 are those of

    A^T S2 A

This matrix is symmetric and positive semi-definite, so its eigenvalues are real, not negative, and
quick to compute. A is the lower triangular Cholesky factor of S1. If S1 is singular, it has no such
factor; then the columns of A are the eigenvectors of S1 with non-zero eigenvalues, each times the
square root of its eigenvalue. S1 and S2 can be exchanged, and A is computed from the one with the
lower rank. So singular covariances need no epsilon on the diagonal.

Which network? Inception with the published weights, if they can be had: its FIDs compare with those
of papers at equal numbers of pictures (see Inception for what "published" means). Otherwise a small
classifier, trained here on the data set itself: its FIDs compare only with each other. It is
trained on pictures with lifted blacks, lowered whites, less contrast, noise, blur and shifts, so
that slight changes of this kind raise the FID a little, not enormously. If there are no labels,
it learns to predict rotations, permutations of the channels, kinds of distortion, and the index of
the picture.

Uncertainty: if the classifier is trained with another seed or on another machine, the FID of the
same generator changes by about 10% (three seeds, MNIST and emojis; 2,000 pictures). On one machine
the classifier is kept in a file, so an FID can be reproduced there.
"""
import json
import re
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
    """What is measured. Each field is a flag, and its comment is the flag's help."""
    sources: tuple = ()     # REAL GENERATED: each a data set[:split], folder, run, .npy; or sanity
    features: Literal["auto", "inception", "classifier"] = "auto"   # auto: inception if it is there
    data: str = ""          # data set whose classifier gives the features; empty: that of REAL
    n: int = 0              # at most so many generated pictures; 0 means all, for sanity 5000
    device: str = "auto"    # auto, cuda, mps, cpu
    json: int = 0           # 1: the last line is one JSON object


# ---- the lecture's FID ---------------------------------------------------------------------------

def sqrtm(a):
    """Square root of a symmetric positive semi-definite matrix a (d, d): the R with R R = a.

    a = V diag(w) V^T has the root V diag(w^1/2) V^T. a may be singular: an eigenvalue that rounding
    has made -1e-17 counts as 0. A matrix that is not symmetric has no root of this form."""
    w, V = torch.linalg.eigh(a)
    return V @ torch.diag(w.clamp(min=0).sqrt()) @ V.T


def fid_textbook(real, fake):
    """FID of features (N, d) and (M, d) as in the lecture (Heusel 2017, eq. 6) -> 0-d tensor.

    S1 S2 is not symmetric, but S1^1/2 S2 S1^1/2 is, and it has the same eigenvalues."""
    real, fake = real.double(), fake.double()
    mu1, mu2 = real.mean(0), fake.mean(0)                                   # (d,)
    S1, S2 = real.T.cov(), fake.T.cov()                                     # (d, d), with N - 1
    R1 = sqrtm(S1)
    root = sqrtm(R1 @ S2 @ R1)
    return ((mu1 - mu2) ** 2).sum() + torch.trace(S1 + S2 - 2 * root)


# ---- the same number, faster ---------------------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians with means (d,) and covariances (d, d), which may
    be singular -> float. The header explains A."""
    mu1, S1, mu2, S2 = (torch.as_tensor(t).double() for t in (mu1, sigma1, mu2, sigma2))
    S = torch.stack([S1, S2])
    L, pivot = torch.linalg.cholesky_ex(S)          # pivot: the first that is not positive, or 0
    low = pivot.argmin() if pivot.all() else pivot.argmax()     # of the lower rank
    A = L[low]                                                              # (d, d)
    if pivot[low]:
        w, V = torch.linalg.eigh(S[low])
        kept = w > 1e-16 * len(w) * w[-1]           # the others are 0 but for rounding
        A = V[:, kept] * w[kept].sqrt()                                     # (d, r)
    w = torch.linalg.eigvalsh(A.T @ S[1 - low] @ A).clamp(min=0)            # (r,)
    d2 = ((mu1 - mu2) ** 2).sum() + torch.trace(S1 + S2) - 2 * w.sqrt().sum()
    return d2.clamp(min=0).item()


def fid(real, fake):
    """FID of features (N, d) and (M, d), with N and M of at least 2 -> float. 0 means equal means
    and covariances; lower is better. It falls as N and M grow, so never state it without them."""
    gaussians = []
    for x in (real, fake):
        x = torch.as_tensor(x).double()
        gaussians += [x.mean(0), x.T.cov().view(x.shape[1], -1)]
    return frechet_distance(*gaussians)


# ---- KID, precision and recall -------------------------------------------------------------------

def kernel(x, y):
    """k(a, b) = (a . b / d + 1)^3 for each row a of x (N, d) and b of y (M, d) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(real, fake):
    """Kernel distance of features (N, d) and (M, d) -> float: the unbiased estimate of the squared
    maximum mean discrepancy under this kernel (Binkowski 2018; Gretton 2012, eq. 3). It leaves out
    the pairs (a, a), so for two samples of one distribution it is about 0 and may be negative."""
    x, y = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    mmd = -2 * kernel(x, y).mean()
    for a in (x, y):
        aa = kernel(a, a)                                                   # (N, N)
        mmd += (aa.sum() - aa.trace()) / (len(a) * (len(a) - 1))
    return mmd.item()


def covered(x, y, k):
    """Share of the rows of y (M, d) that lie within the radius of some row of x (N, d). The radius
    of a row is the distance to its k-th nearest neighbour in x."""
    radius = torch.cdist(x, x).kthvalue(k + 1).values       # (N,); the first is the row itself
    return (torch.cdist(y, x) <= radius).any(1).double().mean().item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall of features (N, d) and (M, d) (Kynkaanniemi 2019, sec. 2) ->
    two floats in [0, 1]. Precision is the share of fakes within the k-th-neighbour radius of some
    real picture; recall is the share of real pictures within that of some fake."""
    x, y = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    return covered(x, y, k), covered(y, x, k)


# ---- copies and twins ----------------------------------------------------------------------------

def nearest(x, y):
    """For each picture of x (N, ...) the nearest of y (M, ...): the distance, root mean square over
    the pixels, (N,), and its index (N,). If x is y, the nearest other one, of at most 2,000."""
    a = x.flatten(1).float()                                                # (N, pixels)
    best = torch.full((len(x),), torch.inf)
    index = torch.zeros(len(x)).long()
    for start in range(0, len(y), 2000):                # a part of y at a time: bounded memory
        distance = torch.cdist(a, y[start:start + 2000].flatten(1).float())
        if x is y:
            distance.fill_diagonal_(torch.inf)
        value, i = distance.min(1)
        index = torch.where(value < best, start + i, index)
        best = best.minimum(value)
    error = a - y[index].flatten(1)                     # cdist rounds: equal pictures are not at 0
    return error.square().mean(1).sqrt(), index


def excess(distance, held_out):
    """(s - 0.05) / 0.95 -> float, where s is the share of the distances (N,) that are below the 5%
    quantile of the held-out distances (M,). It is about 0 if both have the same distribution, as
    then s = 5%, and 1 if all distances are below that quantile. Negative values become 0."""
    threshold = held_out.quantile(.05, interpolation="lower")
    share = (distance < threshold).double().mean().item()
    return max(0., (share - .05) / .95)


LEAST = 20                          # at least so many held-out pictures give a threshold
ALARM = .1      # This bound is based on short runs only: those that did not fail had `copied` and
                # `twins` of at most 0.02.


def neighbours(train, test, fake, path):
    """Does G copy its training set, or draw one picture again and again? uint8 (N, C, S, S) each.

    Writes a sheet to `path`: fakes, the nearest training picture of each, its nearest other fake;
    the closest first. Returns a dict. copied: the excess (see there) of the fakes that lie nearer
    to a training picture than held-out pictures do: 0 for held-out pictures, 1 for training
    pictures, 0.1 where a tenth of the fakes are copies. Compare Meehan 2020 (arXiv 2004.05675).
    twins: the excess for the distance from a fake to the nearest other fake, compared with the
    distance from a held-out picture to the nearest other one, in equally large sets. Pictures of
    low contrast are closer to each other. So the contrast of the fakes is first scaled, by a factor
    of at most 2, until their spread (root mean square distance from the mean picture) equals that
    of the held-out pictures. Compare Arora 2018, who count such pairs.

    At most 2,000 fakes and 2,000 held-out pictures are compared. Held-out pictures that are also in
    the training set (17 of the 100 Apple emojis) are left out, and duplicates in the held-out set
    are counted once. If fewer than LEAST are left, both numbers are None."""
    train = train.cpu()
    fake = fake[:2000].cpu()
    test = shuffled(torch.unique(test.cpu(), dim=0))[:2000]
    near, copy = nearest(fake, train)
    _, twin = nearest(fake, fake)
    first = near.argsort()[:12]
    data.sheet([fake[first], train[copy[first]], fake[twin[first]]], path,
               ["generated", "nearest training picture", "nearest other generated one"])
    distance, _ = nearest(test, train)
    test = test[distance > 0]
    n = min(len(test), len(fake))
    result = dict(copied=None, twins=None, held_out=n)
    if n < LEAST:
        print(f"copies   not counted: {n} held-out pictures are left that do not stand in the "
              f"training set, {LEAST} are wanted")
        return result
    test = test[:n].float()
    spread = fake.float().std(0).norm() / test.std(0).norm()
    fake = fake / spread.clamp(min=.5)
    twins = [nearest(part, part)[0] for part in fake.split(n) if len(part) == n]
    result |= dict(copied=excess(near, distance[distance > 0]),
                   twins=excess(torch.cat(twins), nearest(test, test)[0]))
    print(f"copies   copied {result['copied']:.2f}, twins {result['twins']:.2f}, spread "
          f"{spread:.2f} of that of {n:,} held-out pictures")
    return result


def alarms(result):
    """What a headline says of the dict of `neighbours`: names and shares of those over ALARM."""
    return "".join(f"; {name} {result[name]:.0%}" for name in ("copied", "twins")
                   if (result[name] or 0) > ALARM)          # None where nothing was counted


# ---- disturbances --------------------------------------------------------------------------------

KINDS = "none lifted lowered contrast noise blur".split()


def disturb(x, kind, strength):
    """Disturbs pictures (N, C, S, S) in [-1, 1] -> the same shape and range.

    kind: an index into KINDS, and strength: a number in [0, 1], either one for each picture (N,) or
    one for all. At strength 1 black is lifted to level 40 of 255, white is lowered to 215, the
    contrast is halved, noise with a sigma of 0.2 of the range is added, or each pixel becomes the
    mean of the 5 x 5 around it."""
    s = torch.as_tensor(strength).float().view(-1, 1, 1, 1)
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
    """Small CNN: pictures (C, size, size) -> 128 features -> logits, one head per kind of label.

    heads: the number of classes of each head, (10,) for digits, (12, 11) for hair and eyes.
    accuracy: the share of the test pictures that each head labels correctly, or ()."""
    name = "classifier trained here"
    accuracy = ()
    strict = 1                      # see count

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
        """Floats (N, C, size, size) in [-1, 1] -> logits [(N, k), ...], one tensor per head."""
        return self.head(self.body(x)).split(self.heads, 1)

    @torch.no_grad()
    def features(self, images):
        """uint8 (N, C, H, W) of any size -> float32 (N, 128) on the CPU."""
        self.eval()
        return torch.cat([self.body(data.to_float(data.fit(x, self.size))).cpu()
                          for x in in_parts(self, images, 500)])

    @torch.no_grad()
    def predict(self, images):
        """uint8 (N, C, H, W) -> labels (N,) as the data set numbers them, for faces 11 * hair +
        eyes, and confidence (N,), the probability of that label in [0, 1]; both on the CPU."""
        h = self.features(images).to(self.head.weight.device)
        label = 0
        sure = 1.
        for logits in self.head(h).cpu().split(self.heads, 1):
            chance, i = logits.softmax(1).max(1)                            # (N, k) -> (N,)
            label = label * logits.shape[1] + i
            sure = sure * chance
        return label, sure


def in_parts(net, images, n):
    """uint8 (N, C, H, W), grey or with as many channels as net -> parts of at most n pictures, with
    net's channels and on its device. UserError for other images."""
    need(images.dtype == torch.uint8 and images.shape[1] in (1, net.channels),
         f"pictures must be uint8 (N, C, H, W), grey or with {net.channels} channel(s), here "
         f"{images.dtype} {tuple(images.shape)}")
    device = next(net.parameters()).device
    for x in images.split(n):
        yield x.to(device).expand(-1, net.channels, -1, -1)


def pretext(x, i):
    """What a classifier predicts where the pictures have no labels.

    x: pictures (N, 3, S, S) in [-1, 1]; i: their numbers in the data set (N,). Returns the pictures
    turned (Gidaris 2018), with exchanged channels and disturbed; and four labels (N,): which of 4
    turns, which of 3 orders of the channels, which of 6 kinds of disturbance (a weak one counts as
    none), and which picture i it is (Dosovitskiy 2014)."""
    turn, order, kind = [torch.randint(k, (len(x),)) for k in (4, 3, 6)]
    triples = zip(x, turn.tolist(), order.tolist())
    x = torch.stack([picture.rot90(t, (1, 2)).roll(o, 0) for picture, t, o in triples])
    strength = torch.rand(len(x))
    return disturb(x, kind, strength), [turn, order, kind * (strength > .4), i]


def augment(x):
    """Pictures (N, C, S, S) in [-1, 1], shifted by up to 2 pixels (what leaves at one edge comes
    back at the other) and disturbed."""
    x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
    return disturb(x, torch.randint(6, (len(x),)), torch.rand(len(x)))


STEPS = 2000                        # training steps of a classifier


def train_classifier(net, images, labels):
    """Trains net on uint8 images (N, C, size, size) and labels (N,), or None for the pretext."""
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
        loss = 0.                           # each head's part starts at about 1
        with data.autocast(-1, device):
            for logits, part in zip(net(x.to(device)), y):
                loss += F.cross_entropy(logits, part.to(device)) / np.log(logits.shape[1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 200 == 1:
            print(f"training {net.name}, once: step {step} of {STEPS}, loss {loss.item():.3f}")


def classifier(name, size, device="cpu"):
    """The Classifier of a data set or folder for pictures of size x size. It is read from
    DOWNLOADS/classifiers, or trained and then saved there. For stacked digits it is a Stacked.

    There is one head for the classes; for faces there are two, hair (12) and eyes (11). Without
    labels the heads are those of the pretext task, and no accuracy is measured."""
    if name.startswith("stacked"):
        digits = "mnist" if name == "stacked" else "digits"
        return Stacked(classifier(digits, size, device), name)
    images, labels, classes = data.load(name, size)
    heads = (len(classes),)
    if classes == data.FACES:
        heads = (12, 11)                                    # hair, eyes
    elif not classes:
        heads = (4, 3, 6, min(len(images), 4096))
    tag = f"{Path(name).name}-{size}"           # number and sum of the pictures tell sets apart;
                                                # v2 is the version of the training
    path = data.DOWNLOADS / f"classifiers/{tag}-{len(images)}-{images.sum()}-v2.pt"
    with torch.random.fork_rng():                       # the caller's random numbers stay
        torch.manual_seed(0)
        net = data.place(Classifier(images.shape[1], size, heads), device)
        net.name = f"classifier-{tag}"
        net.data = name
        if path.is_file():
            saved = data.load_checkpoint(path, device)
            net.accuracy = saved.pop("accuracy")
            net.load_state_dict(saved)
            return net
        train_classifier(net, images, labels)
    if labels is not None:
        x, y, _ = data.load(name, size, "test")
        both = torch.unravel_index(torch.stack([net.predict(x)[0], y]), heads)  # (2, N) per head
        net.accuracy = [(seen == true).double().mean().item() for seen, true in both]
    data.save_state(path, net.state_dict() | dict(accuracy=net.accuracy))
    return net


class Stacked:
    """The classifier of one digit, applied to each channel of stacked digits. It has the interface
    of a Classifier, with 3 x 128 features and labels 0 .. 999. The accuracy is that of a digit."""
    channels = 3
    strict = 0

    def __init__(self, net, name):
        self.net = net
        self.data = name
        self.name = f"classifier-{name}"
        self.size = net.size
        self.accuracy = net.accuracy

    def features(self, images):
        """uint8 (N, 1 or 3, H, W) -> float32 (N, 384) on the CPU."""
        return self.net.features(one_by_one(images)).view(-1, 384)

    def predict(self, images):
        """uint8 (N, 1 or 3, H, W) -> labels 100 red + 10 green + blue (N,), and confidence (N,),
        the product of the three; both on the CPU."""
        digits, sure = self.net.predict(one_by_one(images))                 # (3 N,)
        return digits.view(-1, 3) @ torch.tensor([100, 10, 1]), sure.view(-1, 3).prod(1)


def one_by_one(images):
    """uint8 (N, 1 or 3, H, W) -> the channels as grey pictures (3 N, 1, H, W)."""
    return images.expand(-1, 3, -1, -1).flatten(0, 1)[:, None]


# ---- Inception v3, the published network of the FID ----------------------------------------------

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URLS = [
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS,
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-" + WEIGHTS[3:],
]

# The network as tables. A line is a branch: layers one after the other, each a pool, or the name of
# a convolution, its output channels and its kernel; /1 or /2 is that stride, without padding. The
# outputs of a block's branches are joined along the channels. A branch that forks is written as two
# branches with the same first layers.
STEM = """Conv2d_1a_3x3 32 3x3/2, Conv2d_2a_3x3 32 3x3/1, Conv2d_2b_3x3 64 3x3, halve, \
Conv2d_3b_1x1 80 1x1, Conv2d_4a_3x3 192 3x3/1, halve"""     # 299 -> 149, 147, 147, 73, 73, 71, 35
BLOCKS = {
    "A": """branch1x1 64 1x1
branch5x5_1 48 1x1, branch5x5_2 64 5x5
branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3
mean, branch_pool C 1x1""",
    "B": """branch3x3 384 3x3/2
branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3/2
halve""",
    "C": """branch1x1 192 1x1
branch7x7_1 C 1x1, branch7x7_2 C 1x7, branch7x7_3 192 7x1
branch7x7dbl_1 C 1x1, branch7x7dbl_2 C 7x1, branch7x7dbl_3 C 1x7, branch7x7dbl_4 C 7x1, \
branch7x7dbl_5 192 1x7
mean, branch_pool 192 1x1""",
    "D": """branch3x3_1 192 1x1, branch3x3_2 320 3x3/2
branch7x7x3_1 192 1x1, branch7x7x3_2 192 1x7, branch7x7x3_3 192 7x1, branch7x7x3_4 192 3x3/2
halve""",
    "E": """branch1x1 320 1x1
branch3x3_1 384 1x1, branch3x3_2a 384 1x3
branch3x3_1 384 1x1, branch3x3_2b 384 3x1
branch3x3dbl_1 448 1x1, branch3x3dbl_2 384 3x3, branch3x3dbl_3a 384 1x3
branch3x3dbl_1 448 1x1, branch3x3dbl_2 384 3x3, branch3x3dbl_3b 384 3x1
C, branch_pool 192 1x1""",
}
# Name of each block, its table, and what C stands for in it. The outputs of 5b to 5d have 35 x 35
# pixels, those of 6a to 6e 17 x 17, and those of 7a to 7c 8 x 8.
MIXED = """Mixed_5b A 32
Mixed_5c A 64
Mixed_5d A 64
Mixed_6a B -
Mixed_6b C 128
Mixed_6c C 160
Mixed_6d C 160
Mixed_6e C 192
Mixed_7a D -
Mixed_7b E mean
Mixed_7c E max"""
# Two differences from torchvision's Inception v3: its mean pools count the padding, and its last
# block has a mean pool where this one has a maximum.
POOLS = {
    "mean": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "max": nn.MaxPool2d(3, 1, 1),
    "halve": nn.MaxPool2d(3, 2),
}


class Mixed(nn.Module):
    """Branches side by side, built from a table: i channels come in, self.out go out."""

    def __init__(self, i, table):
        super().__init__()
        self.branches = []          # of each branch the names of its layers
        self.out = 0
        for branch in table.split("\n"):
            names = []
            c = i                                           # channels that go into the next layer
            for layer in branch.split(", "):
                name, _, shape = layer.partition(" ")
                names.append(name)
                module = POOLS.get(name)
                if not module:
                    o, h, w, *stride = map(int, re.findall("[0-9]+", shape))
                    module = conv_block(c, o, (h, w), *stride, padding=0 if stride else "same")
                    c = o
                self.add_module(name, module)
            self.branches.append(names)
            self.out += c

    def forward(self, x):
        outputs = []
        for names in self.branches:
            h = x
            for name in names:
                h = getattr(self, name)(h)
            outputs.append(h)
        return torch.cat(outputs, 1)


class Inception(Mixed):
    """Inception v3 (Szegedy 2016) with the layers and weights of the TensorFlow graph of
    2015-12-05, which gives the published FIDs. It has 23,850,960 parameters, 1008 classes and no
    auxiliary head. The whole network is one branch, whose last layers are blocks.

    "Published" means the numbers of the common PyTorch port, pytorch-fid: pictures are resized with
    align_corners=False and scaled to [-1, 1]. The original TensorFlow code samples at other points
    and scales by (x - 128) / 128, so its FIDs differ slightly."""
    name = "inception"
    channels = 3
    size = 299
    accuracy = ()

    def __init__(self):
        super().__init__(3, STEM)
        for row in MIXED.split("\n"):
            name, table, pool = row.split()
            block = Mixed(self.out, BLOCKS[table].replace("C", pool))
            self.add_module(name, block)
            self.branches[0].append(name)
            self.out = block.out
        self.fc = nn.Linear(self.out, 1008)                                 # not used
        self.eval()

    def forward(self, x):
        """(N, 3, 299, 299) in [-1, 1] -> (N, 2048)."""
        return super().forward(x).mean((2, 3))                      # of (N, 2048, 8, 8)

    @torch.no_grad()
    def features(self, images):
        """uint8 (N, 1 or 3, H, W) of any size -> float32 (N, 2048) on the CPU. The pictures are
        resized to 299 x 299, bilinearly and without antialiasing, as in pytorch-fid."""
        out = []
        torch.backends.cudnn.allow_tf32 = False             # TF32 would cost three digits
        for x in in_parts(self, images, 32):
            x = data.to_float(x)
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
            out.append(self(x).cpu())
            if len(out) % 32 == 0:
                print(f"inception {32 * len(out):,} of {len(images):,} pictures")
        return torch.cat(out)

    def load_published(self, state):
        """Loads the published state dict, with or without num_batches_tracked, and folds the batch
        norms into the convolutions -> self. RuntimeError if names or shapes differ."""
        self.load_state_dict(dict(state))                   # a plain dict may lack the counters
        for module in self.modules():
            if hasattr(module, "bn"):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self


# ---- scores --------------------------------------------------------------------------------------

def shuffled(images):
    """The rows of a tensor in an order that is random but always the same."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def scores(net, real, fake):
    """Metrics of n fakes against n real pictures, uint8 (N, C, H, W) -> dict: fid; kid, precision
    and recall, from at most 5,000 pictures; n, n_real, features, floor and floor_n.

    The floor is the FID between real pictures: the first n against the next n, or, if there are
    fewer than 2 n, one half against the other. With so few pictures it is too high, and then a good
    generator can get below it; so can one that copies the training set. Papers use
    all real pictures. To do the same, generate as many, for example with gan.py --dump 60000 for
    MNIST."""
    n = len(fake)
    half = min(n, len(real) // 2)
    need(half > 3, f"{n} pictures against {len(real)} real ones: at least 4 and 8 are wanted")
    x, y = net.features(real[:2 * n]), net.features(fake)
    floor = fid(x[:half], x[half:2 * half])
    x = x[:n]
    few = x[:5000], y[:5000]
    precision, recall = precision_recall(*few)
    return dict(fid=fid(x, y), kid=kid(*few), precision=precision, recall=recall, n=n,
                n_real=len(x), features=net.name, floor=floor, floor_n=half)


def against(net, images, fake, name):
    """Metrics of uint8 fakes (n, C, H, W) against n training pictures of the data set `name`, or
    where it has fewer, against all of these and the test pictures -> dict, see scores."""
    n = len(fake)
    images = shuffled(images)
    test = data.load(name, images.shape[-1], "test")[0]
    return scores(net, torch.cat([images[:n], test.to(images.device), images[n:2 * n]]), fake)


def line(result):
    """A dict of scores in one line, which never states the FID alone: `FID 12.3
    (classifier-mnist-32, compares with itself only, n = 10000, real-vs-real floor 0.4)`."""
    n = str(result["n"])
    floor = f"{result['floor']:.2g}"
    if result["n_real"] != result["n"]:
        n = f"{result['n_real']} real, {n}"
    if result["floor_n"] != result["n"]:
        floor += f" at n = {result['floor_n']}"
    features = result["features"]
    if features != Inception.name:
        features += ", compares with itself only"
    return f"FID {result['fid']:.3g} ({features}, n = {n}, real-vs-real floor {floor})"


def count(net, fake, labels, classes, asked=None):
    """Which classes the fakes show, uint8 (N, C, H, W), as net predicts them -> dict.

    counts of each class; modes, how many of `classes` are drawn; KL, the Kullback-Leibler
    divergence of the counts from the uniform distribution in nats, 0 where all are equal;
    background, the median of the left and right border. With labels asked for (N,): the accuracy of
    each head, and a table of how often each class asked for (row) was seen as each class (column).
    Prints these, the lowest share of a class and the mean confidence.

    A class counts as drawn if the share of samples that are assigned to it with a confidence over
    0.9 is at least a tenth of its share in the data. So blurred samples, which are assigned to some
    digit with a confidence of about 0.6, count for no class. For stacked digits every class counts
    that is predicted at least once, as in the literature (Metz 2017; Lin 2018)."""
    seen, sure = net.predict(fake)
    n = len(fake)
    k = len(classes)
    counts = seen.bincount(minlength=k)
    wanted = labels.bincount(minlength=k) / len(labels) * n
    clear = seen[sure > .9 * net.strict].bincount(minlength=k)
    drawn = (clear > 0) & (clear >= wanted / 10 * net.strict)
    KL = np.log(k) - torch.special.entr(counts / n).sum().item()
    result = dict(counts=counts.tolist(), modes=drawn.sum().item(), KL=KL,
                  background=fake[..., [0, -1]].median().item())
    if asked is not None:
        names = ("hair", "eyes") if len(net.heads) == 2 else ("label",)
        parts = [torch.unravel_index(labels, net.heads) for labels in (asked, seen)]
        for name, size, wish, look in zip(names, net.heads, *parts):
            result[f"{name} accuracy"] = (wish == look).double().mean().item()
            table = F.one_hot(wish, size).T @ F.one_hot(look, size)     # (size, size)
            result[f"{name} asked seen"] = table.tolist()
    print(f"classes  {result['modes']} of {k} drawn, KL {KL:.3f}, rarest "
          f"{counts[wanted > 0].min() / n:.1%}, mean confidence {sure.mean():.3f}\n"
          f"         background {result['background']:.0f} of 255; counts "
          f"{result['counts'] if k < 20 else 'in result.json'}")
    return result


# ---- sanity: what the numbers see ----------------------------------------------------------------

def spoiled(x, y):
    """Distort real pictures uint8 (N, C, S, S) with labels (N,) in several ways, some of which are
    hardly visible. Yields (description, pictures, labels) for each."""
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


def sanity(net, name, n):
    """Prints a Markdown table: n real pictures, distorted in several ways, compared with n others.

    The pictures of the data set `name` are divided into four parts of n. Parts 1 and 2 serve as the
    training set: the FID is computed against part 1, and part 2 is the row "training set copied".
    Parts 3 and 4, which are test pictures if there are enough of them, are held out: part 3 gives
    the threshold of the column `copied`, and part 4 is distorted. Pictures of parts 3 and 4 that
    also occur in the training set are left out."""
    x, y = [], []
    for split in ("train", "test"):
        images, labels, _ = data.load(name, min(net.size, 64), split)
        x.append(shuffled(images))
        y.append(shuffled(torch.zeros(len(images)) if labels is None else labels))
    x, y = torch.cat(x), torch.cat(y)
    n = min(n, len(x) // 4)
    need(n >= 20, f"sanity needs --n of 20 at least and 80 pictures; {name} has {len(x)}")
    real = net.features(x[:n])
    train = x[:2 * n]
    third, fourth = nearest(x[-2 * n:], train)[0].split(n)
    new = fourth > 0
    print("| pictures | n | FID | KID | precision | recall | accuracy | copied |\n"
          "|---|---|---|---|---|---|---|---|")
    copies = "training set copied", x[n:2 * n], y[n:2 * n]
    for what, x, y in [*spoiled(x[-n:][new], y[-n:][new]), copies]:
        h = net.features(x)
        precision, recall = precision_recall(real, h)
        accuracy = f"{(net.predict(x)[0] == y).double().mean():.3f}" if net.accuracy else ""
        copied = excess(nearest(x, train)[0], third[third > 0])
        print(f"| {what} | {len(x)} | {fid(real, h):.3g} | {kid(real, h):.3g} | {precision:.3f} | "
              f"{recall:.3f} | {accuracy} | {copied:.2f} |")


# ---- sources: runs, arrays, folders, data sets ---------------------------------------------------

def is_array(word):
    """Whether a word of the command line is an .npy or .npz, or the folder of a run."""
    return Path(word).suffix in (".npy", ".npz") or Path(word, "last.pt").is_file()


def array(word):
    """An .npy of uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, or the folder of a
    run with such a samples.npy -> uint8 tensor (N, C, H, W). UserError, with the NumPy expression
    that converts it, for other arrays."""
    path = Path(word)
    is_run = path.is_dir()
    if is_run:
        path /= "samples.npy"
    need(path.is_file(),
         f"no {path}: repeat gan.py's command with --dump 10000, or name REAL GENERATED")
    # A minute's tolerance, because copying a run writes its files anew in any order.
    need(not is_run or path.stat().st_mtime > path.with_name("last.pt").stat().st_mtime - 60,
         f"{path} is older than {word}/last.pt: repeat the training's command with --dump 10000")
    try:
        x = np.load(path, mmap_mode="r")    # reads no pickle, and no more than the file holds
        need(isinstance(x, np.ndarray), f"it holds several arrays, {getattr(x, 'files', '')}: save "
             f"one of them alone, np.save('samples.npy', np.load('{path}')[NAME])")
        low, high = float(x.min()), float(x.max())
    except Exception as e:                  # a damaged file raises nearly anything
        raise data.UserError(f"{path} is no readable .npy: {str(e).split('. ')[0]}") from None
    how = "x"
    if high <= 1:
        how = "(x + 1) * 127.5" if low < 0 else "x * 255"
    need(x.dtype == np.uint8, f"{path} holds {x.dtype} from {low:.4g} to {high:.4g}, not uint8 "
         f"from 0 to 255; convert it with ({how}).round().clip(0, 255).astype('uint8')")
    shape = x.shape
    if x.ndim == 3 and shape[2] > 4:                        # else it is one picture
        x = x[..., None]
    if x.shape[-1:] in ((1,), (3,)):
        x = np.moveaxis(x, -1, 1)
    need(x.ndim == 4 and x.shape[1] in (1, 3), f"{path} has shape {shape}; wanted are several "
         "pictures (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3: x[None] makes one "
         "picture several, x[..., :3] leaves out transparency, x.reshape(-1, H, W) separates rows")
    return torch.from_numpy(np.array(x))


def split_of(word):
    """A word of the command line -> (data set or path, split). An existing path is that path, and a
    colon starts a split only before train, test or all."""
    name, _, split = word.rpartition(":")
    if split in ("train", "test", "all") and name and not Path(word).exists():
        return name, split
    need(not Path(word).is_file() or is_array(word), f"{word} is one picture: name a folder")
    return word, "train"


def source(word, size, net):
    """A word of the command line -> uint8 pictures (N, C, H, W). A data set, or a part of a folder,
    is loaded at `size`. The pictures of a whole folder get the size of its first picture, but at
    most `size`. Those of an array are not resized."""
    name, split = split_of(word)
    if is_array(name):
        return array(name)
    if name not in data.SETS and split == "train" and Path(name).is_dir():
        files = data.pictures(name)
        sides = data.read_picture(files[0]).shape[1:]
        return data.read_all(files, min(*sides, size), net.channels)
    return data.choose(name, size, split)[1]


# ---- main ----------------------------------------------------------------------------------------

def network(cfg, name, size):
    """Inception if it is asked for or can be had, else the classifier of the data set `name`."""
    device = data.device(cfg.device)
    if cfg.features != "classifier":
        try:
            path = data.fetch(WEIGHTS, WEIGHTS_URLS, WEIGHTS_SHA256)
            net = data.place(Inception().load_published(data.load_checkpoint(path)), device)
            print("features inception: compares with published FIDs at equal numbers of pictures")
            return net
        except data.Unavailable as e:
            need(cfg.features == "auto", f"{e}; or --features classifier, which needs no download")
            print("features Inception's weights could not be downloaded; they belong at\n"
                  f"         {data.DOWNLOADS / WEIGHTS}")
    print(f"features {Classifier.name}: its FIDs do not compare with those of Inception")
    need(not is_array(name), f"the data set of {name} is not known: name it with --data SET")
    return classifier(data.choose(name, size)[0], size, device)


def main(argv=None):
    """The command line."""
    _, changes = data.arguments(FIDConfig, argv, positional="sources")
    cfg = FIDConfig(**changes)
    data.at_least(0, cfg, "n")
    words = list(cfg.sources)
    size = 32
    if words == ["sanity"]:
        name, *_ = data.choose(cfg.data or "mnist,digits", size)
        sanity(network(cfg, name, size), name, cfg.n or 5000)
        return
    checkpoint = Path(*words, "last.pt")
    if len(words) == 1 and checkpoint.is_file():
        config = data.load_checkpoint(checkpoint).get("config", {})
        need("data" in config, f"{words[0]} has no samples: name a run of gan.py")
        words.insert(0, config["data"] + ":all")            # as gan.py where they are few
    need(len(words) == 2, "name two sources, REAL GENERATED, or one run with samples.npy, which "
         "--dump 10000 writes: python gan.py dcgan --dump 10000")
    names = [split_of(word)[0] for word in words]
    if is_array(words[1]):
        size = min(array(words[1]).shape[2:])
    net = network(cfg, cfg.data or names[0], size)
    # 60,000 digits of 299 x 299 pixels, which Inception looks at, would not fit into memory.
    fake = shuffled(source(words[1], 64 if names[1] in data.SETS else net.size,
                           net))[:cfg.n or None]
    real = shuffled(source(words[0], min(fake.shape[2:]), net))     # no sharper than the fakes
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
