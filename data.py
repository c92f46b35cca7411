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
import ctypes
import dataclasses
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import sys
import tarfile
import time
import typing
import urllib.request
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

DOWNLOADS = Path(os.environ.get("DOWNLOADS", "downloads"))
# Which process of how many. Clusters and notebooks set RANK too, so it counts only under torchrun.
RANK, WORLD = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
MAX_PIXELS = 50_000_000                 # larger pictures and archive members are bombs: refused
MAX_BYTES = 1 << 26


# ---- errors and files: never half a file under its name ------------------------------------------

class UserError(Exception):
    """What the user can mend, in one line that says how; ends a script with exit code 2."""


class Unavailable(UserError):
    """A file that is not on disk and cannot be downloaded."""


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
        if RANK == 0:
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
        np.save(f, x.numpy())


def find(name):
    """Where `name` lies, in $DATA_DIR or else in downloads/; None if in neither."""
    for root in Path(os.environ.get("DATA_DIR") or DOWNLOADS), DOWNLOADS:
        if (root / name).exists():
            return root / name
    return None


def sha256_of(path):
    """sha256 of a file as a hexadecimal string."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def download(url, path, sha256=None):
    """Fetch one URL to `path`, with progress. UserError or OSError unless all of it arrives."""
    with urllib.request.urlopen(url, timeout=10) as answer, atomic(path) as part:
        total = int(answer.headers["Content-Length"] or 0)
        got = 0
        with open(part, "wb") as f:
            while chunk := answer.read(1 << 16):
                need(got or chunk.lstrip()[:1] != b"<", "a web page came instead of the file")
                f.write(chunk)
                got += len(chunk)
                if sys.stdout.isatty():
                    print(f"{path.name}  {got / 1e6:.1f} of {total / 1e6:.1f} MB", end="\r")
        need(got >= max(total, 1), f"cut off after {got:,} of {total:,} bytes")
        need(not sha256 or sha256_of(part) == sha256, f"wrong file: its sha256 is not {sha256}")
    print(f"downloaded {url} ({got / 1e6:.1f} MB)")


def fetch(name, urls, sha256=None):
    """Path of `name`: found on disk, or downloaded from the first of the URLs that works.

    Errors: Unavailable, with what each mirror said; UserError if the file on disk has another
    hash."""
    found = find(name)
    if found:
        need(not sha256 or sha256_of(found) == sha256,
             f"{found} is damaged or another file (sha256 is not {sha256}); delete it")
        return found
    why = f"{name} is not on disk and no mirror has it"
    for url in urls:
        try:
            download(url, DOWNLOADS / name, sha256)
            return DOWNLOADS / name
        except (OSError, UserError, HTTPException) as e:
            why += f"; {url}: {e}"
    raise Unavailable(f"{why}; put it at {DOWNLOADS / name}")


# ---- reading: idx files, archives, pictures ------------------------------------------------------

def read_idx(path):
    """A gzipped idx file -> uint8 array. The format: 0, 0, 8 for uint8, the number of dimensions;
    a big-endian uint32 a dimension; the bytes."""
    try:
        with gzip.open(path) as f:
            raw = f.read(MAX_BYTES)                 # no more, should it be a bomb
        need(raw[:3] == b"\0\0\x08", "wrong magic number")
        shape = np.frombuffer(raw, ">u4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except Exception as e:                          # a damaged gzip raises nearly anything
        raise UserError(f"{path} is no whole idx file ({e}); delete it") from e


def read_picture(source, channels=3):
    """A picture, a path or (name, bytes) -> uint8 (channels, H, W). What is transparent becomes
    white: convert("RGB") alone would show the colour under it, dark green in the emojis."""
    name, file = source, source
    if isinstance(source, tuple):
        name = source[0]
        file = io.BytesIO(source[1])
    try:
        with Image.open(file) as im:
            need(im.width * im.height <= MAX_PIXELS,
                 f"{im.width} x {im.height} are over {MAX_PIXELS:,} pixels")
            need(not im.mode.startswith("I"), "16 bits a pixel: convert it to 8")
            im = ImageOps.exif_transpose(im)        # a phone lays its pictures on the side
            if im.has_transparency_data:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            im = im.convert("L" if channels == 1 else "RGB")
    except Exception as e:                          # a damaged picture raises nearly anything
        raise UserError(f"{name} is no readable picture ({e}); remove it") from e
    return torch.from_numpy(np.array(im)).view(im.height, im.width, channels).permute(2, 0, 1)


def pictures(folder):
    """All picture files under a folder, sorted; UserError when there is none."""
    folder = Path(folder)
    need(folder.is_dir(), f"no data set, folder or picture {folder}; sets: {', '.join(SETS)}")
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
    planes = x.reshape(-1, 1, s, s).float()
    planes = F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return planes.round().clamp(0, 255).byte().view(*x.shape[:-2], size, size)


def read_all(sources, size, channels=3):
    """Pictures, as read_picture takes them -> uint8 (N, channels, size, size).

    Each picture is reduced to its final size before the next one is read, so large photographs
    need little memory. UserError names the pictures that cannot be read, and their number."""
    rows = []
    bad = []
    for source in sources:
        try:
            rows.append(fit(read_picture(source, channels), size))
        except UserError as e:
            bad.append(str(e))
    need(not bad, f"{len(bad)} of {len(sources)} pictures cannot be read; remove them: "
         + "; ".join(bad[:9]) + " ..." * (len(bad) > 9))
    return torch.stack(rows)


def members(name, urls=()):
    """(name, bytes) of each file in the folder name/, or in name.tar.gz, which is downloaded where
    there is a URL. Nothing is unpacked, so no name leads outside; links are passed over."""
    folder = find(name)
    if folder:
        for p in sorted(folder.rglob("*")):
            if p.is_file():
                yield p.as_posix(), p.read_bytes()
        return
    path = fetch(f"{name}.tar.gz", urls)
    try:
        with tarfile.open(path) as tar:
            for m in filter(tarfile.TarInfo.isfile, tar):
                need(m.size <= MAX_BYTES, f"refused: {m.name} has over {MAX_BYTES:,} bytes")
                yield m.name, tar.extractfile(m).read()
    except Exception as e:                          # a damaged archive raises nearly anything
        raise UserError(f"{path} is no whole archive ({e}); delete it") from e


def cached(key, build):
    """(images, labels or None) of build(), built once and kept in downloads/cache/<key>.pt."""
    path = DOWNLOADS / "cache" / f"{key}.pt"
    with contextlib.suppress(Exception):            # there is none, or a damaged one: build it
        return torch.load(path, weights_only=True)
    tensors = build()
    save_state(path, tensors)
    return tensors


# ---- sets that are downloaded or placed by hand --------------------------------------------------

MNIST = {
    "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
FASHION = {
    "train-images-idx3": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
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
    part = "train" if split == "train" else "t10k"
    arrays = []
    for name, sha256 in hashes.items():
        file = f"{name}-ubyte.gz"
        if name.startswith(part):
            path = fetch(f"{folder}/{file}", [url + file for url in urls], sha256)
            arrays.append(torch.from_numpy(read_idx(path).copy()))
    x, y = arrays
    x = x[:, None]                                              # (N, 1, 28, 28)
    x = F.pad(x, (2, 2, 2, 2)) if size == 32 else fit(x, size)
    return x, y.long()


def emoji_set(style, size, split):
    """Apple or Windows emojis on white, (N, 3, size, size)."""
    folder = f"/{'Test_' if split == 'test' else ''}{style}/.*png$"

    def build():
        files = [m for m in members("emojis", EMOJI_URLS) if re.search(folder, m[0])]
        need(files, f"the emojis archive has no {folder}; delete it")
        return read_all(sorted(files), size), None
    return cached(f"emoji-{style}-{size}-{split}", build)


def anime_set(size, split):
    """Tagged anime faces (course data, placed by hand); those without a tag are left out, every
    tenth is the test split."""
    def build():
        tags = {}
        files = {}
        for name, raw in members("anime"):
            if name.endswith("tags.csv"):
                line = r"^(\d+), *(\w+ hair \w+ eyes)\s*$"
                tags = dict(re.findall(line, raw.decode("latin-1"), re.M))
            elif name.endswith((".jpg", ".png")):
                files[Path(name).stem] = (name, raw)
        names = [name for name in files if tags.get(name) in FACES]
        need(names, "anime has no tagged picture: a line of tags.csv is N,<hair> hair <eye> eyes "
             "for images/N.jpg")
        names = held_out(sorted(names, key=int), split)
        labels = torch.tensor([FACES.index(tags[name]) for name in names])
        return read_all([files[name] for name in names], size), labels
    return cached(f"anime-{size}-{split}", build)


def held_out(items, split):
    """Every tenth item for the split "test", the others for "train"."""
    return [item for i, item in enumerate(items) if (i % 10 == 9) == (split == "test")]


def folder_set(folder, size, split):
    """A folder of pictures, its sub-folders the classes: (images, labels or None, classes). Of
    fewer than 20 pictures all are in every split."""
    files = pictures(folder)
    kinds = {p: p.relative_to(folder).parts[0] for p in files}      # its sub-folder, or itself
    classes = sorted(set(kinds.values()))
    if len(classes) < 2 or set(files) & set(Path(folder).iterdir()):
        classes = []
    if split != "all" and len(files) >= 20:
        files = held_out(files, split)
    stamp = [(str(p.resolve()), p.stat().st_mtime_ns, kinds[p]) for p in files]
    key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]

    def build():
        labels = torch.tensor([classes.index(kinds[p]) for p in files]) if classes else None
        return read_all(files, size), labels
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
        ImageDraw.Draw(im).text((48, 48), str(y), 255, font(72), "mm", stroke_width=pen)
        corners = np.array([[0, 0], [0, 96], [96, 96], [96, 0]]) + r.normal(0, 8, (4, 2))
        im = im.transform((96, 96), Image.QUAD, corners.ravel(), Image.BILINEAR)
        x[i, 0] = im.resize((size, size), Image.BOX)
    return x, labels.astype(np.int64)


RGB = dict(orange=(240, 140, 30), white=(246, 246, 250), aqua=(80, 225, 220), gray=(140, 142, 150),
           green=(50, 165, 70), red=(205, 35, 40), purple=(135, 60, 180), pink=(252, 150, 200),
           blue=(45, 85, 220), black=(38, 34, 42), brown=(125, 72, 36), blonde=(248, 215, 100),
           yellow=(245, 220, 20))


def face_ellipses(hair, eye, p):
    """One face as ellipses (x, y, half width, half height, colour) on 128 x 128, back to front.
    p: 7 numbers in [-1, 1]: shift x, shift y, width, hair length, mouth width and height, gaze."""
    x = 64 + 6 * p[0]
    y = 66 + 5 * p[1]
    w = 34 + 3 * p[2]
    long = 34 + 18 * p[3]
    skin = (253, 222, 196)
    look = 3 * p[6]
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
    x = np.empty((n, 3, size, size), np.uint8)
    labels = np.empty(n, np.int64)
    for i in range(n):
        r = np.random.RandomState(first + i)
        hair = r.randint(12)
        eye = r.randint(11)
        p = r.uniform(-1, 1, 7)
        im = Image.new("RGB", (128, 128), (92, 106, 128) if soft else (255, 250, 235))
        draw = ImageDraw.Draw(im)
        for cx, cy, rx, ry, colour in face_ellipses(RGB[HAIR[hair]], RGB[EYES[eye]], p):
            draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), colour,
                         outline=None if soft else "black", width=3)
        im = np.array(im.resize((size, size), Image.BOX)).transpose(2, 0, 1)
        x[i] = (im * light).clip(0, 255) if soft else im
        labels[i] = 11 * hair + eye
    return x, labels


def drawn_set(name, size, split):
    """digits, faces-a or faces-b. The two styles train on different faces and share the test."""
    def build():
        print(f"drawing  {name} ({split}) ...", flush=True)
        if name == "digits":
            n, seed = (20_000, 1) if split == "train" else (4_000, 2)
            arrays = draw_digits(n, seed, size)
        elif split == "test":
            arrays = draw_faces(name[-1], 1_000, 20_000, size)
        else:
            arrays = draw_faces(name[-1], 10_000, 10_000 * (name == "faces-b"), size)
        return [torch.from_numpy(a) for a in arrays]
    return cached(f"{name}-{size}-{split}-2", build)


RING = .75 * torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)]
                           for k in range(8)])                          # the 8 centres (8, 2)


def draw_ring(n, seed):
    """n points of eight Gaussians with standard deviation 0.02 around the centres RING, as pictures
    of two channels and one pixel: uint8 (n, 2, 1, 1), so a step of 2/255 is 0.4 deviations."""
    r = np.random.RandomState(seed)
    x = RING[r.randint(0, 8, n)] + .02 * torch.from_numpy(r.randn(n, 2))
    return to_uint8(x)[..., None, None]


def stacked_set(source, n, size, split):
    """Stacked MNIST, Metz 2017 sec. 3.3.1: three random digits of the set `source` are the red,
    green and blue channel: uint8 (n, 3, size, size), labels 100 red + 10 green + blue."""
    x, y, _ = load(source, size, split)
    i = np.random.RandomState(0).randint(0, len(x), (n, 3))
    return x[i, 0], y[i] @ torch.tensor([100, 10, 1])


# ---- load: one name, one tensor ------------------------------------------------------------------

SETS = ["mnist", "fashion", "emoji-apple", "emoji-windows", "anime", "stacked", "digits", "faces-a",
        "faces-b", "stacked-digits", "ring"]


def load(name, size, split="train"):
    """A data set as one tensor.

    name: one of SETS, or a folder; size: pixels a side; split: "train", "test" or "all" (both).
    Returns images uint8 (N, C, size, size); labels int64 (N,), or None; names of the classes (of
    faces the 132 FACES, label = 11 * hair + eyes). Errors: Unavailable, or UserError if damaged."""
    need(8 <= size <= 1024 or name == "ring", f"a picture size of {size} is not between 8 and 1024")
    if name not in SETS:
        return folder_set(name, size, split)
    if split == "all":
        x, y, classes = load(name, size, "train")
        x2, y2, _ = load(name, size, "test")
        if y is not None:
            y = torch.cat([y, y2])
        return torch.cat([x, x2]), y, classes
    if name == "mnist":
        return *idx_set("mnist", MNIST, MNIST_URLS, size, split), DIGITS
    if name == "fashion":
        return *idx_set("fashion_mnist", FASHION, FASHION_URLS, size, split), CLOTHES
    if name.startswith("emoji"):
        return *emoji_set(name[6:].capitalize(), size, split), []
    if name == "anime":
        return *anime_set(size, split), FACES
    if name == "ring":
        return draw_ring(20_000, split == "test"), None, []
    if name.startswith("stacked"):
        source = "digits" if name == "stacked-digits" else "mnist"
        n = 60_000 if split == "train" else 10_000
        return *stacked_set(source, n, size, split), [f"{k:03}" for k in range(1000)]
    return *drawn_set(name, size, split), DIGITS if name == "digits" else FACES


def choose(names, size, split="train"):
    """(name, images, labels, classes) of the first set of "mnist,digits" that can be had; the line
    it prints says which one and why."""
    missing = ""
    names = names.split(",")
    for name in names:
        try:
            images, labels, classes = load(name, size, split)
        except Unavailable as e:
            if name == names[-1]:
                raise
            missing += f"  (no {name}: {str(e).split(';')[0]})"
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

COLOURS = ["#1f77b4", "#d64541", "#2c8c3c", "#ff8c00", "#8250b4", "#14a0aa", "#825a46",
           "#dc64aa", "#6e6e6e", "#aaaa1e", "#3c3ca0", "#000000"]


def font(size=12):
    """Pillow's own font, so that charts look the same everywhere."""
    return ImageFont.load_default(size)


def write(draw, place, words, size=12, anchor="lm"):
    """Black words; anchor: which point of them is at the place, "lm" the middle of the left."""
    draw.text(place, words, "black", font(size), anchor)


def save(image, path):
    """A Pillow image -> PNG file, atomically."""
    with atomic(path) as part:
        image.save(part, "PNG")
    return path


def as_image(x):
    """uint8 (3, H, W) -> Pillow image."""
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def grid(images, columns):
    """uint8 (N, C, H, W), grey or colour -> one Pillow image, row by row; pictures of 32 pixels and
    less twice as large, so that one can see them."""
    x = images.expand(-1, 3, -1, -1).cpu()
    if x.shape[2] <= 32:
        x = F.interpolate(x, scale_factor=2)
    x = F.pad(x, (2, 2, 2, 2, 0, 0, 0, -len(x) % columns), value=255)   # of W, H, C, N
    n, c, h, w = x.shape
    page = x.view(-1, columns, c, h, w).permute(2, 0, 3, 1, 4)      # (C, rows, H, columns, W)
    return as_image(page.reshape(c, -1, columns * w))


def sheet(rows, path, left=(), top=(), title="", marks=()):
    """Rows of images with words beside and above, as a PNG. rows: uint8 (n_i, C, H, W); left: a
    label a row; top: a label a column; marks: columns in a red frame."""
    strips = [grid(row, len(row)) for row in rows]
    w = strips[0].width / len(rows[0])
    x0 = 12 + int(max(font().getlength(word) for word in ["", *left]))
    y0 = 4 + 20 * bool(title) + 20 * bool(top)
    width = max(x0 + max(strip.width for strip in strips), 16 + int(font(15).getlength(title)))
    page = Image.new("RGB", (width, y0 + sum(strip.height for strip in strips)), "white")
    draw = ImageDraw.Draw(page)
    write(draw, (8, 12), title, 15)
    y = y0
    for i, strip in enumerate(strips):
        page.paste(strip, (x0, y))
        if left:
            write(draw, (6, y + strip.height / 2), left[i])
        y += strip.height
    for j, word in enumerate(top):
        write(draw, (x0 + j * w + w / 2, y0 - 7), word, anchor="ms")
    for j in marks:
        draw.rectangle((x0 + j * w, y0, x0 + j * w + w - 1, page.height - 1),
                       outline="red", width=2)
    return save(page, path)


def gif(path, frames, duration=150):
    """PNG files or Pillow images -> one looping GIF of at most 50 of them; each is shown for
    `duration` milliseconds, the last ten times as long."""
    frames = frames[::1 + len(frames) // 50] + 9 * frames[-1:]
    pages = [frame if isinstance(frame, Image.Image) else Image.open(frame) for frame in frames]
    pages = [page.convert("RGB") for page in pages]
    with atomic(path) as part:
        pages[0].save(part, "GIF", save_all=True, append_images=pages[1:], loop=0,
                      duration=duration)


# ---- charts --------------------------------------------------------------------------------------

def ticks(low, high):
    """Round numbers, 1, 2 or 5 times a power of ten apart, between low and high."""
    half = (high - low) / 2
    step = 10. ** math.floor(math.log10(half))
    step *= max(m for m in (1, 2, 5) if step * m <= half)
    return np.arange(math.ceil(low / step), high / step) * step


def panel(draw, top, title, lines):
    """One chart at this height of a page 830 pixels wide: lines {name: (xs, ys)}. The vertical axis
    covers the 1st to the 99th percentile."""
    xs, ys = np.concatenate([*lines.values()], 1)                       # (2, all points)
    y_low, y_high = np.percentile(ys, [1, 99])
    edge = .06 * (y_high - y_low) + .01 * abs(y_high) + 1e-6
    low = np.array([xs.min(), y_low - edge])
    high = np.array([xs.max() + 1e-6, y_high + edge])
    scale = [754, -150] / (high - low)                                  # pixels a unit
    for v in ticks(low[1], high[1]):
        level = top + 206 + (v - low[1]) * scale[1]
        draw.line((60, level, 814, level), (225, 225, 225))
        write(draw, (54, level), f"{v:.4g}", anchor="rm")
    for v in ticks(low[0], high[0]):
        write(draw, (60 + (v - low[0]) * scale[0], top + 212), f"{v:g}", anchor="mt")
    draw.rectangle((60, top + 56, 814, top + 206), outline="black")
    write(draw, (60, top + 14), title, 15)
    left = 64
    row = top + 32
    for (name, line), colour in zip(lines.items(), COLOURS * 3):
        width = 34 + font().getlength(name)
        if left + width > 840:                              # the legend's next line
            left = 64
            row += 14
        points = (np.transpose(line).clip(low, high) - low) * scale + [60, top + 206]   # (n, 2)
        draw.line(points.flatten().tolist(), colour, 2)
        draw.line((left, row, left + 16, row), colour, 4)
        write(draw, (left + 20, row), name)
        left += width


def chart(path, panels):
    """Line charts one below the other, as a PNG. panels: [(title, {name of a line:
    (steps, ys)})]."""
    page = Image.new("RGB", (830, 230 * len(panels) + 20), "white")
    draw = ImageDraw.Draw(page)
    for k, (title, lines) in enumerate(panels):
        panel(draw, 230 * k, title, lines)
    write(draw, (814, page.height - 10), "step", anchor="rm")
    return save(page, path)


def scatter(path, xy, groups, group_names, labels, links, title, colours):
    """Points (N, 2) in the colours of their groups, with a legend; labels {index: word}; links
    [(i, j)] joined by a line. A PNG."""
    xy = np.asarray(xy, float)
    page = Image.new("RGB", (830, 890), "white")
    draw = ImageDraw.Draw(page)
    write(draw, (10, 14), title, 16)
    for k, name in enumerate(group_names):
        x = 12 + k % 6 * 135
        y = 38 + 18 * (k // 6)
        draw.ellipse((x, y - 4, x + 8, y + 4), colours[k])
        write(draw, (x + 13, y), name)
    points = (xy - xy.min(0)) / np.ptp(xy, 0) * [700, 760] + [40, 90]
    for i, j in links:
        draw.line((*points[i], *points[j]), "black", 2)
    for (x, y), group in zip(points, groups):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), colours[int(group)], (60, 60, 60))
    for k, (i, word) in enumerate(labels.items()):      # above its point and below by turns
        x, y = points[i]
        write(draw, (x + 7, y - 8 + 16 * (k % 2)), word)
    return save(page, path)


# ---- several processes: torchrun -----------------------------------------------------------------

def meet(name):
    """The processes of torchrun meet, each on a GPU of its own unless the device's name is "cpu";
    from here on only rank 0 speaks."""
    if WORLD == 1:
        return
    if name != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block, then the others, who find on disk what it has put there."""
    if RANK > 0:
        dist.barrier()
    yield
    if WORLD > 1 and RANK == 0:
        dist.barrier()


def mean_gradients(opt, *_):
    """Replace the gradients of an optimiser by their mean over all ranks."""
    for p in opt.param_groups[0]["params"]:
        dist.all_reduce(p.grad)
        p.grad /= WORLD


def over_ranks(opt):
    """The optimiser itself; under torchrun mean_gradients goes before each of its steps."""
    if WORLD > 1:
        opt.register_step_pre_hook(mean_gradients)
    return opt


# ---- runs: command line, device ------------------------------------------------------------------

def run_main(main):
    """main() as a command: an error of the user's is one line and exit code 2; Ctrl-C is 130."""
    try:
        return main()
    except UserError as e:
        why = " ".join(str(e).split())
    except OSError as e:
        why = f"{e.filename or 'file'}: {e.strerror or e}; free space or name another folder"
    except KeyboardInterrupt:
        print("\nstopped; the same command (without --resume 0) goes on from the last checkpoint, "
              "if any: one each --sample-every steps")
        sys.exit(130)
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message}; `python {self.prog} --help` lists the flags")


def arguments(Config, argv=None, presets={}, hide=(), positional=""):
    """Command line -> (name of the preset, dict of the fields that it changes).

    Each field of the flat dataclass Config is a flag. Its help is the comment behind it, so we read
    the source of the class; a comment line `# ---- the network` begins a group of the help.
    presets: name -> Config with its values, which `NAME --help` shows as the defaults; the name
    comes first on the command line. Fields in `hide` are no flags; the field `positional` takes the
    words without a flag."""
    argv = sys.argv[1:] if argv is None else argv
    shown = presets.get(argv[0], Config) if argv else Config    # a class has its defaults, too
    group = parser = Parser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("preset", choices=presets, metavar="PRESET",
                            help=f"{' '.join(presets)}; PRESET --help shows its own values")
    fields = {f.name: f for f in dataclasses.fields(Config) if f.name not in hide}
    for line in inspect.getsource(Config).splitlines():
        title = re.match(" +# -+ (.+)", line)
        field = re.match(r" +(\w+): .*?# (.*)", line)
        if title:
            group = parser.add_argument_group(title[1])
        elif field and field[1] in fields:
            f = fields[field[1]]
            if f.name == positional:
                parser.add_argument(f.name, nargs="*", help=field[2])
                continue
            group.add_argument("--" + f.name.replace("_", "-"), type=type(f.default),
                               help=f"{field[2]} (default {getattr(shown, f.name)!r})",
                               default=argparse.SUPPRESS, choices=typing.get_args(f.type) or None)
    given = vars(parser.parse_intermixed_args(argv))
    preset = given.pop("preset", "")
    return preset, given


def keep_memory():
    """glibc keeps the memory that a step frees, or each step would page it in anew."""
    with contextlib.suppress(OSError, AttributeError, TypeError):       # other systems differ
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)                   # M_MMAP_THRESHOLD: 32 MB
        libc.mallopt(-1, (1 << 31) - 1)             # M_TRIM_THRESHOLD: 2 GB


def device(name):
    """torch.device by name; "auto" is the accelerator, cuda or mps, else cpu."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(True) or "cpu"     # True: if it is there
    need(WORLD == 1 or dist.is_initialized(), "only gan.py can run under torchrun; use python")
    keep_memory()
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        why = str(e).split("\n")[0]
        raise UserError(f"device {name} is not there ({why}); use --device cpu") from None


def place(net, device):
    """A network on its device, its weights in the memory layout that is fastest there.

    channels_last speeds up convolutions on CPUs and NVIDIA's GPUs. On Apple's GPUs up to torch 2.13
    the backward pass of batch norm on such pictures is wrong or stops, so there all stays
    contiguous."""
    apple = torch.device(device).type == "mps"
    layout = torch.contiguous_format if apple else torch.channels_last
    return net.to(device, memory_format=layout)


def autocast(amp, device):
    """A context in which convolutions run in bfloat16: amp 1 yes, 0 no, -1 where it is native."""
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    on = native if amp < 0 else amp == 1
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def versions():
    """What a result depends on besides the seed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                pillow=Image.__version__, gpu=gpu, threads=torch.get_num_threads())


# ---- runs: folder, checkpoints, log --------------------------------------------------------------

def run_folder(name, cfg, changes, free):
    """The folder of a run, out/<name>-<what was changed>, announced."""
    for field, value in vars(cfg).items():
        if field in changes and field not in free:
            name += f"-{field}{value}"
    out = Path(cfg.out or "out/" + re.sub(r"[/\\:, ]", "+", name))
    v = versions()
    print(f"run      {out}  seed {cfg.seed}  {device(cfg.device)}  {v['threads']} threads  "
          f"torch {v['torch']}", flush=True)
    return out


def kept(cfg, out):
    """The data sets to choose from: the one that the run in this folder began with, if it is one of
    cfg.data, even where a better one has appeared since (--resume 0 takes that); else cfg.data."""
    path = out / "last.pt"
    if not (cfg.resume and path.is_file()):
        return cfg.data
    began = load_checkpoint(path).get("config", {}).get("data")
    if began not in cfg.data.split(","):
        return cfg.data                         # restore() will say that it is another
    return began


def save_checkpoint(path, parts, step, cfg):
    """Networks, optimisers, log and whatever else has a state_dict, with step and config, to a
    file, atomically. Where a weight is not finite the run ends and the earlier file stays."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            if not all(p.isfinite().all() for p in part.parameters()):
                parts["log"].blew_up(step)
    state = {name: part.state_dict() for name, part in parts.items()}
    save_state(path, dict(state, step=step, config=vars(cfg)))


def load_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote; weights_only: a file cannot run code."""
    need(Path(path).is_file(), f"no checkpoint {path}: train first, or name the run with --out")
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except OSError:                                 # no permission: run_main says so
        raise
    except Exception as e:                          # a damaged zip or pickle raises nearly anything
        raise UserError(f"{path} is no readable checkpoint ({type(e).__name__}): move it away, or "
                        "name another folder with --out") from e


def running(part):
    """Whether the process whose number is in the name of this .part file may still run. Windows has
    no harmless signal 0 to ask with, so there the answer is always yes."""
    try:
        return os.name == "nt" or os.kill(int(part.suffixes[-2][1:]), 0) is None
    except OSError as e:
        return not isinstance(e, ProcessLookupError)        # it may be another user's


@rank_0_first()
def restore(parts, path, cfg, free, device):
    """Load a checkpoint into networks, optimisers and log, in place; returns its step.

    Where there is none, or only that of a run which did not finish a step, one of step 0 is written:
    from then on the folder is known as a run of this program. --resume 0 first deletes the earlier
    run: its checkpoint, results and those sample pictures that its log lists. UserError where a
    setting has changed that is not in `free`, and where nothing is there to train or to resume."""
    for part in path.parent.glob(".*.part"):            # what a killed run left half-written
        if not running(part):
            part.unlink(missing_ok=True)
    if not cfg.resume and path.is_file() and RANK == 0:
        grids = [sample_path(path.parent, n) for n in load_checkpoint(path)["log"]["grids"]]
        for file in [*grids, path.parent / "log.csv", path.parent / "result.json", path]:
            file.unlink(missing_ok=True)
    state = load_checkpoint(path, device) if path.is_file() else dict(step=0)
    if state["step"] == 0:
        need(cfg.steps, f"nothing is trained yet: this needs {path}, and no --resume 0")
        save_checkpoint(path, parts, 0, cfg)
        return 0
    trained = state["config"]
    for name, value in vars(cfg).items():
        was = trained.get(name, value)
        need(name in free or was == value,
             f"{path} was trained with {name} {was}, not {value}; repeat that setting, name "
             "another --out, or begin anew with --resume 0")
    need(not trained.get("decay") or state["step"] >= cfg.steps or cfg.steps == trained["steps"],
         f"in {path} the learning rate has fallen as for --steps {trained['steps']}: give that "
         "length, another --out, or --resume 0 to begin anew")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as e:                          # another program's file raises nearly anything
        raise UserError(f"{path} is no checkpoint of this model ({str(e).splitlines()[0]})") from e
    parts["log"].last = state["step"]
    print(f"resumed  {path} after {state['step']} steps")
    return state["step"]


def sample_path(out, step):
    """Where the sample picture of a step lies: 000001.png and so on."""
    return out / f"{step:06d}.png"


def grad_norm(net):
    """L2 norm of all gradients of a network as one vector."""
    return torch.stack([p.grad.norm() for p in net.parameters()]).norm()


class Log:
    """The numbers of a run: rows (a dict for each logged step), seconds of training, and the steps
    at which it wrote a sample picture (grids). It is saved in last.pt as one of the parts; log.csv is for the user and
    is never read."""

    def __init__(self, out, total):
        self.out = out
        self.total = total
        self.last = 0                   # the step of the latest row
        self.seconds = 0.
        self.rows = []
        self.grids = []
        self.then = time.perf_counter()

    def state_dict(self):
        return dict(rows=self.rows, grids=self.grids)

    def load_state_dict(self, state):
        self.rows = state["rows"]
        self.grids = state["grids"]
        if self.rows:
            self.seconds = self.rows[-1]["seconds"]

    def grid(self, step):
        """The path for the sample picture of a step, 000001.png and so on; the run owns it now."""
        if step not in self.grids:
            self.grids.append(step)
        return sample_path(self.out, step)

    def table(self):
        """Name of a column -> its numbers."""
        names = self.rows[0] if self.rows else ()
        return {name: [row[name] for row in self.rows] for name in names}

    def save(self, **record):
        """result.json: this record, the table and the steps with a sample picture."""
        write_json(self.out / "result.json", dict(record, log=self.table(), grids=self.grids))

    def blew_up(self, step):
        """Ends a run in which a number is not finite; result.json says so to compare."""
        headline = f"blew up at {step}"
        self.save(step=step, metrics={"blew up at": step}, headline=headline)
        raise UserError(f"{headline}: a loss, gradient or weight is not finite. Train anew with a "
                        "lower learning rate (--lr) in a folder of its own: without --out the name "
                        f"follows from the flags. {self.out} keeps its last good checkpoint")

    def write(self, step, batch, **numbers):
        """One row to log.csv; step, the first four numbers, speed and time left to the screen.

        numbers: 0-d tensors, fetched from the device all at once; batch: pictures per step. Ends
        the run as blown up unless all numbers are finite."""
        values = torch.stack([v.detach().float() for v in numbers.values()])
        if not values.isfinite().all():
            self.blew_up(step)
        numbers = dict(zip(numbers, values.tolist()))
        took = time.perf_counter() - self.then
        steps = step - self.last
        left = int(took / steps * (self.total - step))
        self.then += took
        self.seconds += took
        self.last = step
        self.rows.append(dict(step=step, **numbers, seconds=self.seconds))
        lines = [",".join(self.rows[0])]
        for row in self.rows:
            lines.append(",".join(f"{value:.7g}" for value in row.values()))
        write_text(self.out / "log.csv", "\n".join(lines) + "\n")
        line = f"step {step:>{len(str(self.total))}}/{self.total}"
        for name, value in list(numbers.items())[:4]:
            line += f"  {name.split()[0]} {value:8.3g}"
        line += f"  {steps * batch / took:6.0f} img/s  {left // 60}:{left % 60:02} left"
        print(line[:100], flush=True)


def finish(out, cfg, log, nets, metrics, panels, headline):
    """The end of every run: curves.png, training.gif, result.json; the headline comes last.

    panels: [(title, [names of columns of the log])]; names that it lacks are left out."""
    table = log.table()
    shown = []
    for title, names in panels:
        lines = {name: (table["step"], table[name]) for name in names if name in table}
        if lines:
            shown.append((title, lines))
    if shown:
        chart(out / "curves.png", shown)
    grids = [path for path in (sample_path(out, step) for step in log.grids) if path.is_file()]
    if grids:
        gif(out / "training.gif", grids)
        print(f"samples  {grids[0]} ... {grids[-1].name}")
    log.save(
        command="python " + " ".join(sys.argv), config=vars(cfg), versions=versions(),
        parameters={name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()},
        step=log.last, seconds=log.seconds, metrics=metrics, headline=headline)
    names = sorted(p.name for p in out.glob("[a-z]*"))
    print(f"wrote    {out}: {' '.join(names)}")
    print(headline)


# ---- several runs on one sheet -------------------------------------------------------------------

def read_run(folder):
    """(name, result.json, picture of the last samples, log as columns) of a run."""
    folder = Path(folder)
    path = folder / "result.json"
    need(path.is_file(), f"{folder} is no finished run (no result.json); train it first")
    record = json.loads(path.read_text())
    picture = Image.new("RGB", (400, 400), "white")             # if it blew up before the first
    for step in record.get("grids", []):
        picture = Image.open(sample_path(folder, step)).convert("RGB")
    return folder.name, record, picture, record.get("log", {})


def short(value):
    """A number for a table: 5 digits; of anything else, nothing."""
    return f"{value:,.5g}" if isinstance(value, (int, float)) else ""


def compare(folders, out):
    """Several runs: the first row of their last samples on <out>.png, curves on <out>-curves.png,
    numbers in <out>.md. Returns the table, Markdown, a row a run."""
    runs = [read_run(folder) for folder in folders]
    names = ["step", "seconds"]
    for _, record, _, _ in runs:
        names += [name for name, value in record["metrics"].items()
                  if short(value) and name not in names]
    table = ["| run | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    lines = {}
    strips = []
    for name, record, picture, log in runs:
        numbers = record | record["metrics"]
        table.append(f"| {name} | " + " | ".join(short(numbers.get(k)) for k in names) + " |")
        for column in set(log) - {"step", "seconds"}:
            lines.setdefault(column, {})[name] = log["step"], log[column]
        w, h = picture.size
        if w == h:                                  # a grid of 8 x 8; else a sheet, shown whole
            h = w // 8
        picture = np.array(picture.crop((0, 0, w, h)).resize((640, 640 * h // w)))
        strips.append(torch.from_numpy(picture).permute(2, 0, 1)[None])
    sheet(strips, f"{out}.png", [run[0] for run in runs])
    if lines:
        chart(f"{out}-curves.png", sorted(lines.items()))
    write_text(f"{out}.md", "\n".join(table) + "\n")
    return "\n".join(table)


@dataclasses.dataclass
class Command:
    """What `python data.py show` and `python data.py compare` are told."""
    words: tuple = ()               # of show NAME FILE.png, of compare RUN RUN ...
    out: str = "out/compare"        # of compare, without .png
    size: int = 32                  # of show, pixels a side


def main(argv=None):
    """The command line: show, compare."""
    do, changes = arguments(Command, argv, dict(show=Command, compare=Command), positional="words")
    a = Command(**changes)
    need(len(a.words) > (do == "show"), f"{do} what? python data.py --help has examples")
    if do == "show":
        _, images, _, _ = choose(a.words[0], a.size)
        images = images[:: 1 + len(images) // 100]
        print("wrote", save(grid(images, 10), a.words[1]))
    else:
        print(compare(a.words, a.out))
        print(f"wrote {a.out}.png {a.out}-curves.png {a.out}.md")


if __name__ == "__main__":
    run_main(main)
