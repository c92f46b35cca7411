"""FID, KID, precision and recall, with a hand-written matrix square root, and the networks whose features they compare."""
import time
import zlib
from pathlib import Path

import torch
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
        net = Classifier(images.shape[1], size, heads, f"classifier-{tag}").to(device)
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
    at = "" if s["floor_n"] == s["n"] else f" at n = {s['floor_n']}"
    return f"FID {s['fid']:.3g} ({s['features']}, n = {s['n']}, real-vs-real floor {s['floor']:.2g}{at})"
