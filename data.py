"""data.py: pictures in, pictures out, and the plumbing that every script shares.

    python data.py show digits out/digits.png            a page of a data set, or of a folder
    python data.py compare out/a out/b --out out/ab      runs on one sheet, their curves, a table

A data set is one uint8 tensor (N, C, S, S): MNIST is 60 MB, so it lives on the device as a whole
and a batch is an index into it. No worker process, no picture decoded twice. What is downloaded,
decoded or drawn is kept in downloads/ (DOWNLOADS moves it); DATA_DIR is searched first and is only
read. Sets: mnist, fashion, emoji-apple, emoji-windows, anime; a folder of your own pictures; and
three that are drawn here from a seed and need no network: digits, faces-a and faces-b (the same
faces in two styles, so the true translation and every attribute are known).

In this order: files, reading, sets, drawn sets, load, pictures, charts, several processes, runs,
compare.
"""
import argparse
import contextlib
import csv
import ctypes
import dataclasses
import errno
import gzip
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import platform
import re
import struct
import sys
import tarfile
import time
import typing
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

DOWNLOADS = Path(os.environ.get("DOWNLOADS", "downloads"))
MAX_PIXELS = 50_000_000                 # larger pictures and archive members are bombs: refused
MAX_BYTES = 1 << 26


# ---- errors and files: never half a file under its name ------------------------------------------

class UserError(Exception):
    """What the user can mend, in one line that says how; ends a script with exit code 2."""


class Unavailable(UserError):
    """A file that is not on disk and cannot be downloaded."""


class BlewUp(UserError):
    """A number of the training is not finite; `step` says when."""

    def __init__(self, step):
        super().__init__(f"blew up: a loss, gradient or weight is not finite at step {step}; the "
                         "last good checkpoint stays: try a lower --lr or --loss lsgan")
        self.step = step


def need(ok, why):
    """UserError, one line that says what to do, unless ok."""
    if not ok:
        raise UserError(why)


def at_least(low, cfg, *fields):
    """UserError unless each of these fields of a config is at least `low` (nan is not)."""
    for name in fields:
        value = getattr(cfg, name)
        need(value >= low, f"--{name.replace('_', '-')} {value} must be at least {low}")


@contextlib.contextmanager
def atomic(path):
    """Yields a path beside `path`, renamed when the block ends well: never half a file under its
    name. Under torchrun rank 0's is kept."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        if rank() == 0:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    """Write a small text file atomically."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, record):
    """Write a dict as indented JSON, atomically."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def save_state(path, state):
    """torch.save, atomically; into memory first, since torch hides a full disk's error."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(path) as part:
        part.write_bytes(buffer.getbuffer())


def save_array(path, x):
    """A CPU tensor -> an .npy file, atomically."""
    with atomic(path) as part, open(part, "wb") as f:
        np.save(f, x.contiguous().numpy())


def save_samples(path, x):
    """Pictures uint8 (N, C, H, W) -> an .npy file (N, H, W, C)."""
    save_array(path, x.permute(0, 2, 3, 1))


def find(name):
    """Where `name` lies, in $DATA_DIR or else in downloads/; None if in neither."""
    roots = [DOWNLOADS]
    if os.environ.get("DATA_DIR"):
        roots.insert(0, Path(os.environ["DATA_DIR"]))
    for root in roots:
        if (root / name).exists():
            return root / name
    return None


def sha256_of(path):
    """sha256 of a file as a hexadecimal string."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def download(url, path, sha256=None):
    """Fetch one URL to `path`, with progress. ValueError or OSError unless all of it arrives."""
    with urllib.request.urlopen(url, timeout=10) as answer, atomic(path) as part:
        total = int(answer.headers.get("Content-Length") or 0)
        got = 0
        with open(part, "wb") as f:
            while chunk := answer.read(1 << 16):
                if not got and chunk.lstrip()[:1] == b"<":
                    raise ValueError("a web page came instead of the file")
                f.write(chunk)
                got += len(chunk)
                if sys.stdout.isatty():
                    print(f"\r{path.name}  {got / 1e6:.1f} of {total / 1e6:.1f} MB", end="\r")
        if got < max(total, 1):
            raise ValueError(f"cut off after {got:,} of {total:,} bytes")
        if sha256 and sha256_of(part) != sha256:
            raise ValueError(f"wrong file: its sha256 is {sha256_of(part)}")
    print(f"downloaded {url} ({got / 1e6:.1f} MB)")
    return path


def fetch(name, urls, sha256=None):
    """Path of `name`: found on disk, or downloaded from the first of the URLs that works.

    Errors: Unavailable, naming the mirrors; UserError where the file on disk has another hash."""
    found = find(name)
    if found:
        need(not sha256 or sha256_of(found) == sha256,
             f"{found} is damaged or another file (sha256 is not {sha256}); delete it")
        return found
    why = []
    for url in urls:
        try:
            return download(url, DOWNLOADS / name, sha256)
        except (OSError, ValueError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS):
                raise                               # the disk's fault, not the mirror's
            why.append(f"{url.split('/')[2]}: {getattr(e, 'reason', None) or e}")
    raise Unavailable(f"{name} cannot be downloaded ({'; '.join(why)}); put the file of {urls[0]} "
                      f"at {DOWNLOADS / name}")


# ---- reading: idx files, archives, pictures ------------------------------------------------------

def read_idx(path):
    """A gzipped idx file -> uint8 array. The format: 0, 0, 8 for uint8, the number of dimensions;
    a big-endian uint32 a dimension; the bytes."""
    try:
        with gzip.open(path) as f:
            zeros, kind, dimensions = struct.unpack(">HBB", f.read(4))
            if zeros or kind != 8 or dimensions not in (1, 3):
                raise ValueError("wrong magic number")
            shape = struct.unpack(f">{dimensions}I", f.read(4 * dimensions))
            size = min(math.prod(shape), MAX_BYTES)
            raw = f.read(size + 1)
        return np.frombuffer(raw, np.uint8).reshape(shape)
    except Exception as e:                          # a damaged gzip raises nearly anything
        raise UserError(f"{path} is no whole idx file ({e}); delete it") from e


def read_picture(source, channels=3):
    """A picture, a path or (name, bytes) -> uint8 (channels, H, W). What is transparent becomes
    white: convert("RGB") alone would show the colour under it, dark green in the emojis."""
    name, file = source, source
    if isinstance(source, tuple):
        name, file = source[0], io.BytesIO(source[1])
    try:
        with Image.open(file) as im:
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(f"{im.width} x {im.height} are over {MAX_PIXELS:,} pixels")
            if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            im = im.convert("L" if channels == 1 else "RGB")
    except Exception as e:                          # a damaged picture raises nearly anything
        why = str(e) or type(e).__name__
        raise UserError(f"{name} is no readable picture ({why}); remove it") from e
    return torch.from_numpy(np.array(im)).view(im.height, im.width, channels).permute(2, 0, 1)


def pictures(folder):
    """All picture files under a folder, sorted; UserError when there is none."""
    folder = Path(folder)
    need(folder.is_dir(), f"no data set or folder named {folder}; sets: {', '.join(SETS)}")
    kinds = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds)
    need(found, f"{folder} holds no picture ({' '.join(kinds)})")
    return found


def fit(x, size):
    """uint8 (C, H, W) or (N, C, H, W) -> the same, cropped to a square around the centre and
    resized, antialiased, to `size`."""
    h, w = x.shape[-2:]
    s = min(h, w)
    top, left = (h - s) // 2, (w - s) // 2
    x = x[..., top:top + s, left:left + s]
    if s == size:
        return x.contiguous()
    batch = x.reshape(-1, *x.shape[-3:]).float()
    batch = F.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
    return batch.round().clamp(0, 255).byte().view(*x.shape[:-2], size, size)


def tar_members(path):
    """(name, bytes) of each file in a tar archive. Nothing is unpacked, so no name leads outside;
    links and devices are passed over."""
    with tarfile.open(path) as tar:
        for m in tar:
            if m.isfile():
                need(m.size <= MAX_BYTES, f"{path}: {m.name} has {m.size:,} bytes; refused")
                yield m.name, tar.extractfile(m).read()


def zip_members(path):
    """(name, bytes) of each file in a zip archive."""
    with zipfile.ZipFile(path) as archive:
        for m in archive.infolist():
            need(m.file_size <= MAX_BYTES, f"{path}: {m.filename} is too large; refused")
            if not m.is_dir():
                yield m.filename, archive.read(m)


def members(name, urls=()):
    """(name, bytes) of each file in the folder name/, in name.zip or in name.tar.gz, which is
    downloaded where there is a URL."""
    folder, path = find(name), find(f"{name}.zip") or find(f"{name}.tar.gz")
    if folder:
        for p in sorted(folder.rglob("*")):
            if p.is_file():
                yield f"{name}/{p.relative_to(folder).as_posix()}", p.read_bytes()
        return
    if not path and not urls:
        raise Unavailable(f"{name} is not on disk: put {name}.tar.gz, {name}.zip or the folder "
                          f"{name}/ into {DOWNLOADS}")
    path = path or fetch(f"{name}.tar.gz", urls)
    try:
        yield from zip_members(path) if path.suffix == ".zip" else tar_members(path)
    except UserError:
        raise
    except Exception as e:                          # a damaged archive raises nearly anything
        raise UserError(f"{path} is no whole archive ({e}); delete it") from e


def cached(key, build):
    """(images, labels or None) as tensors, built once and kept in downloads/cache/<key>.pt."""
    path = DOWNLOADS / "cache" / f"{key}.pt"
    with contextlib.suppress(Exception):            # there is none, or a damaged one: build it
        return torch.load(path, weights_only=True)
    arrays = [None if a is None else torch.from_numpy(a) for a in build()]
    save_state(path, arrays)
    return arrays


# ---- sets that are downloaded or placed by hand --------------------------------------------------

MNIST = {
    "train-images": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
FASHION = {
    "train-images": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
MNIST_URLS = ["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"]
FASHION_URLS = ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"]
EMOJI_URLS = ["http://www.cs.toronto.edu/~jba/emojis.tar.gz"]
DIGITS = list("0123456789")
CLOTHES = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
HAIR = "orange white aqua gray green red purple pink blue black brown blonde".split()
EYES = "gray black orange pink yellow aqua purple green brown red blue".split()
FACES = [f"{hair} hair {eyes} eyes" for hair in HAIR for eyes in EYES]  # 11 * hair + eyes: 132


def idx_set(folder, hashes, urls, size, split):
    """MNIST or Fashion-MNIST. 28 -> 32 pads with black, so that every pixel stays exact."""
    paths = []
    for kind, dimensions in (("images", 3), ("labels", 1)):
        part = f"{'train' if split == 'train' else 't10k'}-{kind}"
        file = f"{part}-idx{dimensions}-ubyte.gz"
        paths.append(fetch(f"{folder}/{file}", [url + file for url in urls], hashes[part]))
    x, y = (torch.from_numpy(read_idx(path).copy()) for path in paths)
    x = x[:, None]                                              # (N, 1, 28, 28)
    x = F.pad(x, [(size - 28) // 2] * 4) if size in (28, 32) else fit(x, size)
    return x, y.long()


def emoji_set(style, size, split):
    """Apple or Windows emojis on white, (N, 3, size, size)."""
    folder = f"/{'Test_' if split == 'test' else ''}{style}/"

    def build():
        files = sorted(m for m in members("emojis", EMOJI_URLS) if folder in m[0])
        files = [m for m in files if m[0].endswith(".png")]
        need(files, f"the emojis archive has no folder {folder}; delete it")
        return np.stack([fit(read_picture(m), size).numpy() for m in files]), None
    return cached(f"emoji-{style}-{size}-{split}", build)


def anime_set(size, split):
    """Tagged anime faces (course data, placed by hand); those without a tag are left out, every
    tenth is the test split."""
    def build():
        tags, files = {}, {}
        for name, raw in members("anime"):
            if name.endswith("tags.csv"):
                rows = csv.reader(io.StringIO(raw.decode("utf-8", "replace")))
                tags = {row[0]: row[1].strip() for row in rows if len(row) == 2}
            elif name.endswith((".jpg", ".png")):
                files[Path(name).stem] = (name, raw)
        names = [name for name in files if tags.get(name) in FACES]
        need(names, "anime has no tagged picture: a line of tags.csv is N,<hair> hair <eye> eyes "
             "for images/N.jpg")
        names = held_out(sorted(names, key=int), split)
        images = np.stack([fit(read_picture(files[name]), size).numpy() for name in names])
        return images, np.array([FACES.index(tags[name]) for name in names])
    return cached(f"anime-{size}-{split}", build)


def held_out(items, split):
    """Every tenth item for the split "test", the others for "train"."""
    return [item for i, item in enumerate(items) if (i % 10 == 9) == (split == "test")]


def folder_set(folder, size, split):
    """A folder of pictures, its sub-folders the classes: (images, labels or None, classes). Of
    fewer than 20 pictures all are in every split."""
    files = pictures(folder)
    parts = [p.relative_to(folder).parts for p in files]
    classes = sorted({part[0] for part in parts}) if min(map(len, parts)) > 1 else []
    if split != "all" and len(files) >= 20:
        files = held_out(files, split)
    stamp = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]

    def build():
        labels = None
        if classes:
            labels = np.array([classes.index(p.relative_to(folder).parts[0]) for p in files])
        return np.stack([fit(read_picture(p), size).numpy() for p in files]), labels
    return *cached(f"folder-{key}-{size}", build), classes


# ---- sets that are drawn here --------------------------------------------------------------------

def draw_digits(n, seed, size):
    """n digits, uint8 (n, 1, size, size), white on black, and labels: Pillow's font with a pen of
    random width on paper whose four corners are pulled at random."""
    r = np.random.RandomState(seed)
    labels = r.randint(0, 10, n)
    x = np.empty((n, 1, size, size), np.uint8)
    for i, y in enumerate(labels):
        im = Image.new("L", (96, 96))
        pen = r.randint(1, 6)
        ImageDraw.Draw(im).text((48, 48), str(y), 255, font(72), "mm", stroke_width=pen,
                                stroke_fill=255)
        corners = np.array([[0, 0], [0, 96], [96, 96], [96, 0]]) + r.normal(0, 8, (4, 2))
        im = im.transform((96, 96), Image.Transform.QUAD, corners.ravel(),
                          Image.Resampling.BILINEAR)
        x[i, 0] = im.resize((size, size), Image.Resampling.BOX)
    return x, labels.astype(np.int64)


RGB = dict(orange=(240, 140, 30), white=(246, 246, 250), aqua=(80, 225, 220), gray=(140, 142, 150),
           green=(50, 165, 70), red=(205, 35, 40), purple=(135, 60, 180), pink=(252, 150, 200),
           blue=(45, 85, 220), black=(38, 34, 42), brown=(125, 72, 36), blonde=(248, 215, 100),
           yellow=(245, 220, 20))


def face_ellipses(hair, eye, p):
    """One face as ellipses (x, y, half width, half height, colour) on 128 x 128, back to front.
    p: 7 numbers in [-1, 1]: shift x, shift y, width, hair length, mouth width and height, gaze."""
    x, y, w, long = 64 + 6 * p[0], 66 + 5 * p[1], 34 + 3 * p[2], 34 + 18 * p[3]
    skin, look = (253, 222, 196), 3 * p[6]
    ellipses = [(x, y - 12, w + 12, 42, hair), (x - w, y + 14, 14, long, hair),
                (x + w, y + 14, 14, long, hair), (x, y + 64, 22, 34, skin), (x, y, w, 42, skin),
                (x, y - 34, w, 22, hair)]
    for side in (x - 16, x + 16):
        ellipses += [(side, y + 6, 12, 14, (255, 255, 255)), (side + look, y + 6, 10, 12, eye),
                     (side + look, y + 6, 3, 5, (20, 16, 24))]
    return ellipses + [(x, y + 29, 7 + 4 * p[4], 3 + 2 * p[5], (170, 60, 70))]


def draw_faces(style, n, first, size):
    """Faces number first .. first + n - 1, uint8 (n, 3, size, size), and labels 11 * hair + eyes.

    Style "a": shaded from the upper left, no outline, on slate. Style "b": flat, black outline, on
    cream. Face i is the same in both styles: b[i] is the true translation of a[i]."""
    soft = style == "a"
    v, u = np.mgrid[0:size, 0:size] / (size - 1)
    light = 1.12 - .42 * np.hypot(u - .25, v - .2)                      # (S, S)
    x, labels = np.empty((n, 3, size, size), np.uint8), np.empty(n, np.int64)
    for i in range(n):
        r = np.random.RandomState(first + i)
        hair, eye, p = r.randint(12), r.randint(11), r.uniform(-1, 1, 7)
        im = Image.new("RGB", (128, 128), (92, 106, 128) if soft else (255, 250, 235))
        draw = ImageDraw.Draw(im)
        for cx, cy, rx, ry, colour in face_ellipses(RGB[HAIR[hair]], RGB[EYES[eye]], p):
            box = cx - rx, cy - ry, cx + rx, cy + ry
            draw.ellipse(box, colour, outline=None if soft else "black", width=3)
        im = np.array(im.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1)
        x[i] = (im * light).clip(0, 255) if soft else im
        labels[i] = 11 * hair + eye
    return x, labels


def drawn_set(name, size, split):
    """digits, faces-a or faces-b. The two styles train on different faces and share the test."""
    def build():
        print(f"drawing  {name} ({split}) ...", flush=True)
        if name == "digits":
            return draw_digits(20_000, 1, size) if split == "train" else draw_digits(4_000, 2, size)
        if split == "test":
            return draw_faces(name[-1], 1_000, 20_000, size)
        return draw_faces(name[-1], 10_000, 10_000 * (name == "faces-b"), size)
    return cached(f"{name}-{size}-{split}-2", build)


# ---- load: one name, one tensor ------------------------------------------------------------------

SETS = ["mnist", "fashion", "emoji-apple", "emoji-windows", "anime", "digits", "faces-a", "faces-b"]


def load(name, size, split="train"):
    """A data set as one tensor.

    name: one of SETS, or a folder; size: pixels a side; split: "train", "test" or "all" (both).
    Returns images uint8 (N, C, size, size); labels int64 (N,), or None; names of the classes (of
    faces the 132 FACES, label = 11 * hair + eyes). Errors: Unavailable, or UserError if damaged."""
    need(8 <= size <= 1024, f"a picture size of {size} is not between 8 and 1024")
    if name not in SETS:
        return folder_set(name, size, split)
    if split == "all":
        (x, y, classes), (x2, y2, _) = load(name, size, "train"), load(name, size, "test")
        return torch.cat([x, x2]), None if y is None else torch.cat([y, y2]), classes
    if name == "mnist":
        return *idx_set("mnist", MNIST, MNIST_URLS, size, split), DIGITS
    if name == "fashion":
        return *idx_set("fashion_mnist", FASHION, FASHION_URLS, size, split), CLOTHES
    if name in ("emoji-apple", "emoji-windows"):
        return *emoji_set(name[6:].capitalize(), size, split), []
    if name == "anime":
        return *anime_set(size, split), FACES
    return *drawn_set(name, size, split), DIGITS if name == "digits" else FACES


def choose(names, size, split="train"):
    """(name, images, labels, classes) of the first set of "mnist,digits" that can be had; the line
    it prints says which one and why."""
    missing = ""
    for name in names.split(","):
        try:
            images, labels, classes = load(name, size, split)
        except Unavailable as e:
            if name == names.split(",")[-1]:
                raise
            missing += f"  (no {name}: {str(e).split('; put ')[0]})"
            continue
        n, c, h, w = images.shape
        print(f"data     {name}: {n:,} pictures {c} x {h} x {w}{missing}", flush=True)
        return name, images, labels, classes


def to_float(x):
    """uint8 0..255 -> float32 in [-1, 1], the range of tanh."""
    return x.float() * (2 / 255) - 1


def to_uint8(x):
    """float in [-1, 1] -> uint8, rounded and clamped: the inverse of to_float."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


# ---- pictures out --------------------------------------------------------------------------------

COLOURS = [(31, 119, 180), (214, 69, 65), (44, 140, 60), (255, 140, 0), (130, 80, 180),
           (20, 160, 170), (130, 90, 70), (220, 100, 170), (110, 110, 110), (170, 170, 30),
           (60, 60, 160), (0, 0, 0)]


def font(size=12):
    """Pillow's own font, so that charts look the same everywhere."""
    return ImageFont.load_default(size)


def write(draw, place, words, size=12, anchor="lm"):
    """Black words; anchor: which point of them is at the place, "lm" the middle of the left."""
    draw.text(tuple(place), words, "black", font(size), anchor)


def save(image, path):
    """A Pillow image -> PNG file, atomically."""
    with atomic(path) as part:
        image.save(part, format="PNG")
    return path


def as_bytes(x):
    """(N, C, H, W), uint8 or float in [-1, 1], grey or colour -> uint8 (N, 3, H, W) on the CPU."""
    if x.dtype != torch.uint8:
        x = to_uint8(x.detach())
    return x.expand(-1, 3, -1, -1).cpu()


def as_image(x):
    """uint8 (3, H, W) -> Pillow image."""
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def doubled(x):
    """Pictures (N, C, H, W) of 32 pixels and less twice as large, so that one can see them."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if x.shape[2] <= 32 else x


def grid(images, columns):
    """Images (N, C, H, W) -> one Pillow image, row by row."""
    x = F.pad(doubled(as_bytes(images)), (2, 2, 2, 2), value=255)
    missing = -len(x) % columns
    x = torch.cat([x, torch.full_like(x[:1], 255).expand(missing, -1, -1, -1)])
    n, c, h, w = x.shape
    page = x.view(-1, columns, c, h, w).permute(2, 0, 3, 1, 4)      # (C, rows, H, columns, W)
    return as_image(page.reshape(c, -1, columns * w))


def sheet(rows, path, left=(), top=(), title="", marks=()):
    """Rows of images with words beside and above, as a PNG. rows: tensors (n_i, C, H, W); left: a
    label a row; top: a label a column; marks: columns that get a red frame."""
    rows = [doubled(as_bytes(row)) for row in rows]
    h, w = rows[0].shape[2] + 4, rows[0].shape[3] + 4
    x0 = 12 + int(max([font().getlength(word) for word in left], default=-8))
    y0 = 4 + 20 * bool(title) + 20 * bool(top)
    width = max(x0 + w * max(map(len, rows)), 16 + int(font(15).getlength(title)))
    page = Image.new("RGB", (width, y0 + h * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    write(draw, (8, 12), title, 15)
    for j, word in enumerate(top):
        write(draw, (x0 + j * w + w / 2, y0 - 4), word, anchor="mb")
    for i, row in enumerate(rows):
        y = y0 + i * h
        write(draw, (6, y + h / 2), left[i] if left else "")
        for j, picture in enumerate(row):
            x = x0 + j * w
            if j in marks:
                draw.rectangle((x - 2, y - 2, x + w - 3, y + h - 3), "red")
            page.paste(as_image(picture), (x, y))
    return save(page, path)


def gif(path, files):
    """PNG files -> one looping GIF of about 40 frames, the last one held."""
    files = files[::-1][::1 + len(files) // 40][::-1]                   # the last one stays
    frames = [Image.open(file).convert("RGB") for file in files]
    with atomic(path) as part:
        frames[0].save(part, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[150] * (len(frames) - 1) + [1500])
    return path


# ---- charts --------------------------------------------------------------------------------------

def ticks(low, high):
    """Round numbers, 1, 2 or 5 times a power of ten apart, between low and high."""
    step = 10. ** math.floor(math.log10((high - low) / 2))
    step *= max(m for m in (1, 2, 5) if step * m <= (high - low) / 2)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def panel(draw, top, height, title, lines):
    """One chart at this height of a page 830 pixels wide: lines {name: (xs, ys)}. The vertical axis
    covers the 1st to the 99th percentile."""
    xs, ys = (np.concatenate([line[k] for line in lines.values()]) for k in (0, 1))
    low, high = np.percentile(ys, [1, 99])
    edge = .06 * (high - low) + .01 * abs(high) + 1e-6
    low, high = np.array([xs.min(), low - edge]), np.array([xs.max() + 1e-6, high + edge])
    corner, size = np.array([60, top + height - 24]), np.array([754, 68 - height])

    def place(x, y):
        share = (np.clip((x, y), low, high) - low) / (high - low)
        return tuple(corner + share * size)
    for v in ticks(low[1], high[1]):
        draw.line((place(low[0], v), place(high[0], v)), (225, 225, 225))
        write(draw, (54, place(0, v)[1]), f"{v:.4g}", anchor="rm")
    for v in ticks(low[0], high[0]):
        write(draw, (place(v, 0)[0], top + height - 18), f"{v:g}", anchor="mt")
    draw.rectangle((60, top + 44, 814, top + height - 24), outline="black")
    write(draw, (60, top + 14), title, 15)
    x = 64
    for (name, points), colour in zip(lines.items(), COLOURS * 3):
        draw.line([place(*point) for point in zip(*points)], colour, 2)
        draw.line((x, top + 34, x + 16, top + 34), colour, 4)
        write(draw, (x + 20, top + 34), name)
        x += 34 + font().getlength(name)


def chart(path, panels, x="step", height=230):
    """Line charts one below the other, as a PNG. panels: [(title, {name of a line: (xs, ys)})]."""
    page = Image.new("RGB", (830, height * len(panels) + 20), "white")
    draw = ImageDraw.Draw(page)
    for k, (title, lines) in enumerate(panels):
        panel(draw, k * height, height, title, lines)
    write(draw, (814, page.height - 10), x, anchor="rm")
    return save(page, path)


def curves(path, table, panels, x="step"):
    """Panels [(title, [names])] of a table {name: numbers} as a chart; names that the table lacks
    are left out."""
    shown = []
    for title, names in panels:
        lines = {name: (table[x], table[name]) for name in names if name in table}
        if lines:
            shown.append((title, lines))
    return chart(path, shown, x)


def scatter(path, xy, groups, group_names, labels=None, links=(), title="", colours=COLOURS):
    """Points (N, 2) in the colours of their groups, with a legend; labels {index: word}; links
    [(i, j)] joined by a line. A PNG."""
    xy = np.asarray(xy, float)
    page = Image.new("RGB", (830, 890), "white")
    draw = ImageDraw.Draw(page)
    write(draw, (10, 14), title, 16)
    for k, name in enumerate(group_names):
        x, y = 12 + k % 6 * 135, 38 + 18 * (k // 6)
        draw.ellipse((x, y - 4, x + 8, y + 4), colours[k])
        write(draw, (x + 13, y), name)
    points = (xy - xy.min(0)) / np.maximum(np.ptp(xy, 0), 1e-12) * [700, 760] + [40, 90]
    for i, j in links:
        draw.line((*points[i], *points[j]), "black", 2)
    for (x, y), group in zip(points, groups):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), colours[int(group)], (60, 60, 60))
    for i, word in (labels or {}).items():
        place = tuple(points[i] + [7, -8])
        draw.rectangle(draw.textbbox(place, word, font(), "lm"), "white")
        write(draw, place, word)
    return save(page, path)


# ---- several processes: torchrun -----------------------------------------------------------------

def ranks():
    """(rank, world) under torchrun, whose processes meet here; else (0, 1). Only rank 0 speaks."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return rank(), dist.get_world_size()


def rank():
    """Which process this is: 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block, then the others, who find on disk what it has put there."""
    if rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


def share():
    """This rank's part of a batch that every rank has drawn as a whole: batch[share()]."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def mean_gradients(opt, *_):
    """Replace the gradients of an optimiser by their mean over all ranks."""
    for p in opt.param_groups[0]["params"]:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def over_ranks(opt):
    """The optimiser itself; under torchrun mean_gradients goes before each of its steps."""
    if dist.is_initialized():
        opt.register_step_pre_hook(mean_gradients)
    return opt


# ---- runs: command line, device ------------------------------------------------------------------

def fail(why):
    """One line on stderr, exit code 2."""
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def run_main(main):
    """main() as a command: an error of the user's is one line and exit code 2; Ctrl-C is 130."""
    try:
        main()
    except UserError as e:
        fail(" ".join(str(e).split()))
    except OSError as e:
        fail(f"{e.filename or 'file'}: {e.strerror or e}; free space or name another folder")
    except KeyboardInterrupt:
        print("\nstopped; the same command (without --resume 0) goes on from the last checkpoint")
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message}; `python {self.prog} --help` lists the flags")


def arguments(Config, argv=None, presets=(), hide=(), positional=""):
    """Command line -> (name of the preset, dict of the fields that it changes).

    Flags, their choices and their help are the fields of a flat dataclass, their Literal types and
    the comments behind them; fields in `hide` are none. The name of a preset comes first where
    there are presets; the field `positional` takes the words without a flag."""
    parser = Parser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("preset", choices=presets, metavar="PRESET", help=" ".join(presets))
    comments = dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for f in dataclasses.fields(Config):
        if f.name == "preset" or f.name in hide:
            continue
        words = comments[f.name].replace("%", "%%")
        if f.name == positional:
            parser.add_argument(f.name, nargs="*", help=words)
            continue
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default),
                            help=f"{words} (default {f.default!r})", default=argparse.SUPPRESS,
                            choices=typing.get_args(f.type) or None)
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset", "")
    return preset, given


def keep_memory():
    """glibc keeps the memory that a step frees, or each step would page it in anew."""
    with contextlib.suppress(OSError, AttributeError, TypeError):       # other systems differ
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)                   # M_MMAP_THRESHOLD: 32 MB
        libc.mallopt(-1, (1 << 31) - 1)             # M_TRIM_THRESHOLD: 2 GB


def device(name="auto"):
    """torch.device by name; "auto" is cuda, else mps, else cpu."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto" and torch.backends.mps.is_available():
        name = "mps"
    elif name == "auto":
        name = "cpu"
    keep_memory()
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {name} is not there; use --device cpu") from None


def autocast(amp, device):
    """A context in which convolutions run in bfloat16: amp 1 yes, 0 no, -1 where it is native."""
    on = amp == 1
    if amp < 0 and device.type == "cuda":
        on = torch.cuda.get_device_capability(device) >= (8, 0)
    elif amp < 0 and device.type == "cpu":
        on = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def versions():
    """What a result depends on besides the seed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                pillow=PIL.__version__, machine=platform.machine(), gpu=gpu,
                threads=torch.get_num_threads())


# ---- runs: folder, checkpoints, log --------------------------------------------------------------

def run_folder(name, cfg, changes, free):
    """The folder of a run, out/<name>-<what was changed>, announced."""
    for field, value in vars(cfg).items():
        if field in changes and field not in free:
            name += f"-{field}{value}"
    out = Path(cfg.out or "out/" + re.sub("[/, ]", "+", name))
    need(not out.is_file(), f"--out {out} is a file; name a folder")
    v = versions()
    print(f"run      {out}  seed {cfg.seed}  {v['gpu'] or 'CPU'}  {v['threads']} threads  "
          f"torch {v['torch']}", flush=True)
    return out


def kept(cfg, out):
    """The data sets to choose from: the one that the run in this folder began with, if it is one of
    cfg.data, even where a better one has appeared since; else cfg.data."""
    path, names = out / "last.pt", cfg.data.split(",")
    if not (cfg.resume and path.is_file()):
        return cfg.data
    began = load_checkpoint(path).get("config", {}).get("data")
    if began not in names:
        return cfg.data                         # restore() will say that it is another
    if began != names[0]:
        print(f"data     {began}, with which this run began; --resume 0 or --out begins another")
    return began


def save_checkpoint(path, parts, step, cfg):
    """Networks and optimisers, step and config -> file, atomically; BlewUp if a weight is not
    finite, and the file stays."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            if not all(p.isfinite().all() for p in part.parameters()):
                raise BlewUp(step)
    state = {name: part.state_dict() for name, part in parts.items()}
    save_state(path, dict(state, step=step, config=dataclasses.asdict(cfg)))


def load_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote; weights_only: a file cannot run code."""
    need(Path(path).is_file(), f"no checkpoint {path}: train first, or name the run with --out")
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as e:                          # a damaged zip or pickle raises nearly anything
        raise UserError(f"{path} is no readable checkpoint ({type(e).__name__}); delete it") from e


def restore(parts, path, cfg, free, device):
    """A checkpoint into networks and optimisers, in place; returns its step, 0 if there is none.
    With --resume 0 the run before goes. UserError where a field that is not free has changed."""
    old = list(path.parent.glob(".*.part"))             # what a killed run left half-written
    if not cfg.resume:
        old += [*sample_grids(path.parent), path.parent / "log.csv", path]
    for file in old:
        file.unlink(missing_ok=True)
    if not path.is_file():
        return 0
    state = load_checkpoint(path, device)
    trained = state.get("config", {})
    for name, value in dataclasses.asdict(cfg).items():
        was = trained.get(name, value)
        need(name in free or was == value,
             f"{path} was trained with --{name.replace('_', '-')} {was}, not {value}; give that "
             "flag, another --out, or --resume 0 to begin anew")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError) as e:
        raise UserError(f"{path} is no checkpoint of this model ({str(e).splitlines()[0]})") from e
    if trained.get("decay") and state["step"] < cfg.steps != trained["steps"]:
        print(f"note     until step {state['step']} the learning rate fell as for --steps "
              f"{trained['steps']}: this is not one run of {cfg.steps}")
    return state["step"]


def clock(seconds):
    """75 -> 1:15."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"


class Log:
    """log.csv and the line on the screen. Opened at step `start`, it keeps the rows up to there.

    rows: a dict a logged step."""

    def __init__(self, out, total, start=0):
        self.path, self.total, self.start = out / "log.csv", total, start
        lines = self.path.read_text().splitlines() if start and self.path.exists() else ()
        self.rows = []
        for row in csv.DictReader(lines):
            if float(row["step"]) <= start:
                self.rows.append({name: float(value) for name, value in row.items()})
        self.before = self.rows[-1]["seconds"] if self.rows else 0.
        self.begun = self.then = time.monotonic()
        self.last = start

    def table(self):
        """Name of a column -> its numbers."""
        names = self.rows[0] if self.rows else ()
        return {name: [row[name] for row in self.rows] for name in names}

    def write(self, step, batch, **numbers):
        """One row to log.csv, one aligned line to the screen. numbers: 0-d tensors, fetched from
        the device in one go; batch: pictures a step. BlewUp unless all of them are finite."""
        values = torch.stack([v.detach().float() for v in numbers.values()])
        if not values.isfinite().all():
            raise BlewUp(step)
        numbers = dict(zip(numbers, values.tolist()))
        now = time.monotonic()
        speed = (step - self.last) * batch / (now - self.then)
        left = (now - self.begun) / (step - self.start) * (self.total - step)
        self.then, self.last = now, step
        self.rows.append(dict(step=step, **numbers, seconds=self.before + now - self.begun))
        lines = [",".join(self.rows[0])]
        for row in self.rows:
            lines.append(",".join(f"{value:.6g}" for value in row.values()))
        write_text(self.path, "\n".join(lines) + "\n")
        words = "  ".join(f"{name} {value:7.3f}" for name, value in numbers.items())
        print(f"step {step:>{len(str(self.total))}}/{self.total}  {words}  {speed:6.0f} img/s  "
              f"{clock(left)} left", flush=True)


def sample_grids(out):
    """The sample pictures of a run, 000001.png and so on, in order."""
    return sorted(out.glob("[0-9]" * 6 + ".png"))


def finish(out, cfg, log, nets, metrics, panels, headline, **more):
    """The end of every run: curves.png, training.gif, result.json; the headline comes last."""
    seconds = 0.
    if log.rows:
        seconds = log.rows[-1]["seconds"]
        curves(out / "curves.png", log.table(), panels)
        gif(out / "training.gif", sample_grids(out))
    write_json(out / "result.json", dict(
        command="python " + " ".join(sys.argv), config=dataclasses.asdict(cfg), versions=versions(),
        parameters={name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()},
        seconds=seconds, metrics=metrics, headline=headline, **more))
    names = sorted(p.name for p in out.glob("[a-z]*"))
    print(f"wrote    {out}: {' '.join(names)}")
    print(headline)


# ---- several runs on one sheet -------------------------------------------------------------------

def read_run(folder):
    """(name, result.json, picture of the last samples, log as columns) of a run."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} is no finished run (no result.json); train it first") from None
    picture = Image.new("RGB", (400, 400), "white")             # if it blew up before the first
    for path in sample_grids(folder):
        picture = Image.open(path).convert("RGB")
    return folder.name, record, picture, Log(folder, 0, record["step"]).table()


def short(value):
    """A number for a table: 4 digits; of anything else, nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def compare(folders, out):
    """Several runs: the first row of their last samples on <out>.png, curves on <out>-curves.png,
    numbers in <out>.md. Returns the table, Markdown, a row a run."""
    runs = [read_run(folder) for folder in folders]
    names = list(dict.fromkeys(k for run in runs for k, v in run[1]["metrics"].items() if short(v)))
    table = ["| run | steps | seconds | " + " | ".join(names) + " |"]
    table.append("|---" * (3 + len(names)) + "|")
    lines, strips = {}, []
    for name, record, picture, log in runs:
        numbers = [record["step"], round(record["seconds"])]
        numbers += [record["metrics"].get(metric) for metric in names]
        table.append(f"| {name} | " + " | ".join(short(v) for v in numbers) + " |")
        for column in set(log) - {"step", "seconds"}:
            lines.setdefault(column, {})[name] = log["step"], log[column]
        w, h = picture.size
        if w == h:                                  # a grid of 8 x 8; else a sheet, shown whole
            picture, h = picture.crop((0, 0, w, w // 8)), w // 8
        picture = np.array(picture.resize((640, 640 * h // w)))
        strips.append(torch.from_numpy(picture).permute(2, 0, 1)[None])
    sheet(strips, f"{out}.png", [run[0] for run in runs])
    if lines:
        chart(f"{out}-curves.png", sorted(lines.items()))
    write_text(f"{out}.md", "\n".join(table) + "\n")
    return "\n".join(table)


def main(argv=None):
    """The command line: show, compare."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["show", "compare"])
    parser.add_argument("words", nargs="*", help="of show, NAME FILE.png; of compare, RUN RUN ...")
    parser.add_argument("--out", default="out/compare", help="of compare, without .png")
    parser.add_argument("--size", type=int, default=32, help="of show, pixels a side")
    a = parser.parse_args(argv)
    need(len(a.words) > (a.do == "show"), f"{a.do} what? python data.py --help has examples")
    if a.do == "show":
        _, images, _, _ = choose(a.words[0], a.size)
        print("wrote", save(grid(images[:: 1 + len(images) // 100], 10), a.words[1]))
    else:
        print(compare(a.words, a.out))
        print(f"wrote {a.out}.png {a.out}-curves.png {a.out}.md")


if __name__ == "__main__":
    run_main(main)
