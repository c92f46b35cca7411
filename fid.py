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
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise data.UserError(f"features take uint8 images (N, C, H, W), here {images.dtype} {tuple(images.shape)}")
        if images.shape[1] not in (1, self.channels):
            raise data.UserError(f"{self.name}: pictures with {images.shape[1]} channels, {self.channels} expected")
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
