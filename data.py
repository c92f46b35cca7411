"""data.py: data sets, pictures, charts and run folders: the code that all other scripts share.

    python data.py compare out/a out/b --out out/ab     samples, curves and a table of several runs
    python data.py tile out/a out/b --out out/ab        their sample pictures in one PNG and one GIF

In the docstrings, "x -> y" means that a function takes x and returns y.

A data set is one uint8 tensor of shape (N, C, S, S): N pictures of S x S pixels with C channels. As
a whole it fits on the device (MNIST takes 60 MB), and a batch is selected by indexing, so no
DataLoader is needed. Downloaded files, decoded emojis, anime faces and folders, and drawn digits
and faces are kept in downloads/. The environment variable DOWNLOADS names another folder instead.
DATA_DIR names a folder that is searched first and never written to.

mnist, fashion, emoji-apple and emoji-windows are downloaded; anime must be put into downloads/
by hand. Any folder of pictures can be used as a data set, too. Three kinds of sets are drawn by
this file from a seed and need no internet connection: digits; faces-a and faces-b, which show the
same faces in two styles, so that the correct translation and every attribute are known; and ring,
points from eight Gaussians. Each picture of stacked (from mnist) and stacked-digits (from digits)
combines three digits.

The sections of this file: errors and files, reading pictures, data sets, drawn data sets, load,
writing pictures, charts, several processes, runs, compare.
"""
import argparse
import ctypes
import dataclasses
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import tarfile
import time
import typing
import urllib.request
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.random import RandomState
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

DOWNLOADS = Path(os.environ.get("DOWNLOADS", "downloads"))
# The rank of this process and the number of processes. Clusters and notebooks may set RANK, too, so
# the environment variables are only read if torchrun has started this process.
RANK, WORLD = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
# A small compressed file can unpack to more than the memory holds, so we unpack at most this much.
MAX_BYTES = 1 << 26
PngImagePlugin.MAX_TEXT_CHUNK = MAX_BYTES       # image generators put megabytes of text into a PNG
warnings.filterwarnings("ignore", module="PIL")     # all of Pillow's, such as on damaged EXIF


# ---- errors and files ----------------------------------------------------------------------------

class UserError(Exception):
    """An error that the user can correct. The message says how. run_main prints it as one line and
    ends the script with exit code 2."""


class Unavailable(UserError):
    """A file that is not on disk and cannot be downloaded."""


def need(ok, why):
    """Raise UserError(why) unless ok. `why` is one line that says what to do."""
    if not ok:
        raise UserError(why)


def at_least(low, cfg, *fields):
    """Raise UserError unless each of these config fields is at least `low`. NaN counts as less."""
    for name in fields:
        need(getattr(cfg, name) >= low,
             f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at least {low}")


@contextmanager
def atomic(path):
    """Yield the path of a temporary file in the folder of `path`. The file is renamed to `path` if
    the block ends without an error, so an incomplete file never has the final name. The temporary
    name contains the process ID, so two runs never write to the same file. Under torchrun only the
    file of rank 0 is kept."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        if RANK == 0:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    """Write a small text file atomically, as UTF-8."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_state(path, state):
    """Save like torch.save, but atomically. The bytes are collected in memory first, because
    torch.save hides the error if the disk is full."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(path) as part:
        part.write_bytes(buffer.getbuffer())


def save_array(path, x):
    """Save a CPU tensor as an .npy file, atomically."""
    with atomic(path) as part, open(part, "wb") as f:
        np.save(f, x.numpy())


def find(name):
    """The path of `name` in $DATA_DIR or else in downloads/; None if neither folder has it."""
    for root in Path(os.environ.get("DATA_DIR") or DOWNLOADS), DOWNLOADS:
        if (root / name).exists():
            return root / name
    return None


def content(path):
    """The bytes of a file; if it is an intact gzip file, its unpacked content up to MAX_BYTES."""
    with suppress(Exception), gzip.open(path) as f:
        return f.read(MAX_BYTES)
    return Path(path).read_bytes()


def sha256_of(path):
    """The SHA-256 hash of a file's content, in hexadecimal. Of a gzip file the unpacked content is
    hashed, so the hash does not depend on how the file was compressed."""
    return hashlib.sha256(content(path)).hexdigest()


def fetch(name, urls, sha256=None, also=()):
    """The path of a file, which is searched on disk under `name` and the names in `also`, and else
    downloaded from the first URL that works.

    Raises Unavailable, with the error of each URL, or UserError if the file on disk has another
    hash."""
    for found in filter(None, map(find, (name, *also))):
        need(not sha256 or sha256_of(found) == sha256,
             f"{found} is incomplete or not the expected file, {' or '.join(urls)} (sha256 of the "
             f"unpacked content: {sha256}); move {found} to another folder")
        return found
    path = DOWNLOADS / name
    why = f"{name} was not found on disk and could not be downloaded"
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer, atomic(path) as part:
                print(f"downloading {url} ({answer.headers['Content-Length']} bytes) ...")
                raw = answer.read()                 # an error if the connection ends early
                need(not raw.lstrip().startswith(b"<"), "got a web page instead of the file")
                part.write_bytes(raw)
                need(not sha256 or sha256_of(part) == sha256,
                     f"wrong file: its sha256 is not {sha256}")
            return path
        except Exception as e:                      # a connection can fail in many ways
            why += f"; {url}: {e}"
    raise Unavailable(f"{why}; get the file yourself and save it at {path}")


# ---- reading pictures, folders and archives ------------------------------------------------------

# Picture formats that Pillow reads. Pillow's own list also contains videos and documents.
KINDS = (".png .jpg .jpeg .jfif .bmp .dib .webp .gif .ppm .pgm .pbm .pnm .tif .tiff .tga .ico .pcx "
         ".avif .jp2").split()


def read_picture(source, channels=3):
    """Read one picture, given as a path or as (name, bytes) -> uint8 (channels, H, W).

    Transparent areas become white: convert("RGB") alone would show the colour that is stored under
    them, which is dark green in the emojis. If EXIF data says that a photograph lies on its side,
    it is turned upright."""
    name = file = source
    if isinstance(source, tuple):
        name, raw = source
        file = io.BytesIO(raw)
    try:
        with Image.open(file) as im:
            need(not im.mode.startswith("I"), "more than 8 bits per channel: convert it to 8")
            im.load()
            with suppress(Exception):    # damaged EXIF says nothing about the pixels
                im = ImageOps.exif_transpose(im)
            if im.has_transparency_data:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            im = im.convert("L" if channels == 1 else "RGB")
    except Exception as e:                          # a damaged picture raises nearly anything
        # Some messages end with "<_io.BytesIO object at ...>", which is cut off.
        raise UserError(f"{name} is not a readable picture ({str(e).split(' <')[0]})") from e
    return torch.from_numpy(np.atleast_3d(np.array(im))).permute(2, 0, 1)


def hidden(path):
    """Whether any part of a path is a hidden or system file or folder, such as .DS_Store, ._x.jpg
    or __MACOSX in archives made on a Mac, .ipynb_checkpoints, and @eaDir."""
    return any(part[0] in ".@" or part == "__MACOSX" for part in Path(path).parts)


def files_in(folder, seen):
    """Yield all files under a folder, sorted, except hidden ones. Links to folders are followed.
    seen: the folders visited so far, so that a link to one of them is not followed again."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if hidden(path.name):
            continue
        if path.is_dir():
            yield from files_in(path, seen)
        elif path.is_file():                            # not a pipe or a broken link
            yield path


def pictures(folder):
    """All picture files under a folder, sorted; UserError when there is none."""
    folder = Path(folder)
    need(folder.is_dir(), f"no data set, folder or picture {folder}; data sets: {', '.join(SETS)}")
    found = [path for path in files_in(folder, set()) if path.suffix.lower() in KINDS]
    need(found, f"{folder} holds no picture ({' '.join(KINDS)})")
    return found


def fit(x, size):
    """uint8 (C, H, W) or (N, C, H, W) -> the same, cropped to the central square and resized to
    size x size pixels, with antialiasing."""
    h, w = x.shape[-2:]
    s = min(h, w)
    x = x[..., (h - s) // 2:, (w - s) // 2:][..., :s, :s]
    planes = F.interpolate(x.reshape(-1, 1, s, s).float(), (size, size), mode="bilinear",
                           antialias=True)
    return planes.round().byte().view(*x.shape[:-2], size, size)


def read_all(sources, size, channels=3):
    """Read pictures, each given as for read_picture -> uint8 (N, channels, size, size).

    Each picture is resized before the next one is read, so large photographs need little memory.
    The UserError says how many pictures cannot be read, and names the first 20 of them."""
    rows = []
    bad = []
    for source in sources:
        try:
            rows.append(fit(read_picture(source, channels), size))
        except UserError as e:
            bad.append(str(e))
    need(not bad, f"{len(bad)} of {len(sources)} pictures cannot be read; move them away: "
         f"{'; '.join(bad[:20])}")
    return torch.stack(rows)


def members(name, urls=()):
    """Yield (name, bytes) of each file in the folder `name`, or else in the archive name.tar.gz,
    which is downloaded if URLs are given. The archive is not unpacked on disk, so a file name in it
    cannot write outside the folder. Links in the archive are skipped."""
    folder = find(name)
    if folder:
        for path in files_in(folder, set()):
            yield path.as_posix(), path.read_bytes()
        return
    need(not find(f"{name}.zip"),
         f"{name}.zip is not supported: unpack it into a folder {name} in the same place")
    path = fetch(f"{name}.tar.gz", urls)
    try:
        with tarfile.open(path) as tar:
            for m in filter(tarfile.TarInfo.isfile, tar):
                if not hidden(m.name):
                    yield m.name, tar.extractfile(m).read(MAX_BYTES)
    except Exception as e:                          # a damaged archive raises nearly anything
        raise UserError(f"{path} is not a complete .tar.gz ({e}); move it away") from e


def cached(key, build):
    """What build() returns, (images, labels or None), from downloads/cache/<key>.pt if it is there.
    Otherwise build() is called and its result is saved there."""
    path = DOWNLOADS / "cache" / f"{key}.pt"
    with suppress(Exception):            # a missing or damaged file: build it
        return torch.load(path, weights_only=True)
    tensors = build()
    save_state(path, tensors)
    return tensors


# ---- data sets that are downloaded or put there by hand ------------------------------------------

# {name: sha256 of the unpacked file}
HASHES = dict(re.findall(r"(\S+) (\w{64})", """
    mnist/train-images-idx3 ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
    mnist/train-labels-idx1 65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
    mnist/t10k-images-idx3 0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
    mnist/t10k-labels-idx1 ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2
    fashion_mnist/train-images-idx3 c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
    fashion_mnist/train-labels-idx1 bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
    fashion_mnist/t10k-images-idx3 5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
    fashion_mnist/t10k-labels-idx1 0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34
"""))
MNIST_URLS = ["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"]
FASHION_URLS = ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"]
EMOJI_URLS = ["http://www.cs.toronto.edu/~jba/emojis.tar.gz"]
DIGITS = list("0123456789")
CLOTHES = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
HAIR = "orange white aqua gray green red purple pink blue black brown blonde".split()
EYES = "gray black orange pink yellow aqua purple green brown red blue".split()
FACES = [f"{hair} hair {eyes} eyes" for hair in HAIR for eyes in EYES]  # 11 * hair + eyes: 132


def idx_set(folder, other, urls, size, split):
    """Load MNIST or Fashion-MNIST from `folder`, as .gz files or unpacked, or from the folder
    `other`/raw in which torchvision stores it.

    Each file has a header of fixed length (the hash guarantees this), then the data. For size 32 a
    black border is added to the 28 x 28 pixels, so that no pixel changes."""
    def read(name):
        name = f"{'train' if split == 'train' else 't10k'}-{name}"
        file = f"{name}-ubyte"
        path = fetch(f"{folder}/{file}.gz", [f"{url}{file}.gz" for url in urls],
                     HASHES[f"{folder}/{name}"], [f"{folder}/{file}", f"{other}/raw/{file}"])
        return torch.frombuffer(bytearray(content(path)), dtype=torch.uint8)
    x = read("images-idx3")[16:].view(-1, 1, 28, 28)
    x = F.pad(x, (2, 2, 2, 2)) if size == 32 else fit(x, size)
    return x, read("labels-idx1")[8:].long()


def emoji_set(style, size, split):
    """Apple or Windows emojis on white -> uint8 (N, 3, size, size), and None for the labels."""
    folder = f"/{'Test_' if split == 'test' else ''}{style}/.*png$"

    def build():
        files = [m for m in members("emojis", EMOJI_URLS) if re.search(folder, m[0])]
        need(files, f"emojis.tar.gz has no pictures of {style}; move it to another place")
        return read_all(sorted(files), size), None
    return cached(f"emoji-{style}-{size}-{split}", build)


def anime_set(size, split):
    """Anime faces that are tagged with hair and eye colours (course data, put into downloads/ by
    hand). Pictures without such a tag are left out. Of the rest, every tenth one belongs to the
    test split."""
    def build():
        files = {Path(name).stem: (name, raw) for name, raw in members("anime")}
        _, raw = files.get("tags", ("", b""))
        text = raw.decode("utf-8-sig", "replace").replace("grey", "gray")
        line = r'^"?(\d+)"?[,;] *"?(\w+ hair \w+ eyes)"?\s*$'
        tags = dict(re.findall(line, text, re.M))
        names = [name for name in files if tags.get(name) in FACES]
        need(names, f"none of the {len(files)} files of anime is a tagged picture: tags.csv needs "
             "a line N,<hair> hair <eye> eyes for each images/N.jpg; or unpack the archive and use "
             "--data FOLDER")
        names = held_out(sorted(names, key=int), split)
        labels = torch.tensor([FACES.index(tags[name]) for name in names])
        return read_all([files[name] for name in names], size), labels
    return cached(f"anime-{size}-{split}", build)


def held_out(items, split):
    """Every tenth item if split is "test", all other items if it is "train"."""
    return [item for i, item in enumerate(items) if (i % 10 == 9) == (split == "test")]


def folder_set(folder, size, split):
    """A folder of pictures: (images, labels or None, classes). Its sub-folders are the classes
    if there are at least two of them and the folder itself contains no pictures. A folder of fewer
    than 20 pictures is not split: the training and the test split both contain all of them."""
    files = pictures(folder)
    kinds = {p: p.relative_to(folder).parts[0] for p in files}      # sub-folder or file name
    classes = sorted(set(kinds.values()))
    if len(classes) < 2 or any(p.name in classes for p in files):
        classes = []
    if split != "all" and len(files) >= 20:
        files = held_out(files, split)
    stamp = [(p.resolve(), p.stat().st_mtime_ns, kinds[p]) for p in files]
    key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]

    def build():
        labels = torch.tensor([classes.index(kinds[p]) for p in files]) if classes else None
        return read_all(files, size), labels
    return *cached(f"folder-{key}-{size}", build), classes


# ---- data sets that are drawn here ---------------------------------------------------------------

def draw_digits(n, seed, size):
    """Draw n digits, white on black -> arrays uint8 (n, 1, size, size), and labels int64 (n,).

    Each digit is written in Pillow's font with a random stroke width. Then the four corners of the
    picture are moved at random, which distorts the digit."""
    r = RandomState(seed)
    labels = r.randint(0, 10, n, np.int64)
    x = []
    for y in labels:
        im = Image.new("L", (96, 96))
        ImageDraw.Draw(im).text((48, 48), str(y), 255, font(72), "mm",
                                stroke_width=r.randint(1, 6))
        corners = [0, 0, 0, 96, 96, 96, 96, 0] + r.normal(0, 8, 8)      # x, y of each one
        im = im.transform((96, 96), Image.QUAD, corners, Image.BILINEAR)
        x.append(np.array(im.resize((size, size), Image.BOX)))
    return np.stack(x)[:, None], labels


# {name: colour} for hair and eyes
RGB = dict(re.findall(r"(\w+)=(\S+)", """
    orange=#f08c1e white=#f6f6fa aqua=#50e1dc gray=#8c8e96 green=#32a546 red=#cd2328 purple=#873cb4
    pink=#fc96c8 blue=#2d55dc black=#26222a brown=#7d4824 blonde=#f8d764 yellow=#f5dc14"""))


def face_ellipses(hair, eye, p):
    """A face as a list of ellipses (x, y, half width, half height, colour) in the order in which
    they are drawn on 128 x 128 pixels.

    hair, eye: colours; p: 7 numbers in [-1, 1], which set the position x and y, the width of the
    face, the length of the hair, the width and height of the mouth, and the direction of gaze."""
    x, y, w, long, rx, ry, look = [64, 66, 34, 34, 7, 3, 0] + [6, 5, 3, 18, 4, 2, 3] * p
    ellipses = [(x, y - 12, w + 12, 42, hair), (x - w, y + 14, 14, long, hair),
                (x + w, y + 14, 14, long, hair), (x, y + 64, 22, 34, "#fddec4"),
                (x, y, w, 42, "#fddec4"), (x, y - 34, w, 22, hair)]
    for side in (x - 16, x + 16):
        ellipses += [(side, y + 6, 12, 14, "#ffffff"), (side + look, y + 6, 10, 12, eye),
                     (side + look, y + 6, 3, 5, "#141018")]
    return ellipses + [(x, y + 29, rx, ry, "#aa3c46")]


def draw_faces(style, n, first, size):
    """Draw the faces number first to first + n - 1 -> uint8 (n, 3, size, size), and their labels
    11 * hair + eyes.

    Style "a" is lit from the upper left, without outlines, on blue grey. Style "b" has plain
    colours and black outlines on cream. Face i is the same person in both styles, so b[i] is the
    correct translation of a[i]."""
    soft = style == "a"
    v, u = np.mgrid[0:size, 0:size] / (size - 1)
    light = 1.12 - .42 * np.hypot(u - .25, v - .2)                      # (S, S)
    x = np.empty((n, 3, size, size), np.uint8)
    labels = np.empty(n, np.int64)
    for i in range(n):
        r = RandomState(first + i)
        hair = r.randint(12)
        eye = r.randint(11)
        im = Image.new("RGB", (128, 128), "#5c6a80" if soft else "#fffaeb")
        draw = ImageDraw.Draw(im)
        ellipses = face_ellipses(RGB[HAIR[hair]], RGB[EYES[eye]], r.uniform(-1, 1, 7))
        for cx, cy, rx, ry, colour in ellipses:
            draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), colour,
                         outline=None if soft else "black", width=3)
        im = np.array(im.resize((size, size), Image.BOX)).transpose(2, 0, 1)
        x[i] = (im * light).clip(0, 255) if soft else im
        labels[i] = 11 * hair + eye
    return x, labels


def drawn_set(name, size, split):
    """Load the drawn set digits, faces-a or faces-b. The two styles have different training faces,
    as unpaired translation requires, but the same test faces, so that a translation can be compared
    with the correct answer."""
    def build():
        print(f"drawing  {name} ({split}) ...")
        if name == "digits":
            n, seed = (20_000, 1) if split == "train" else (4_000, 2)
            arrays = draw_digits(n, seed, size)
        elif split == "test":
            arrays = draw_faces(name[-1], 1_000, 20_000, size)
        else:
            arrays = draw_faces(name[-1], 10_000, 10_000 * (name == "faces-b"), size)
        return [torch.from_numpy(a) for a in arrays]
    return cached(f"{name}-{size}-{split}-2", build)


# The 8 centres (8, 2), evenly spaced on a circle of radius 0.75.
RING = torch.view_as_real(torch.polar(torch.full((8,), .75), torch.arange(8) * math.pi / 4))


def draw_ring(n, seed):
    """Draw n points from a mixture of eight Gaussians with the centres RING and the standard
    deviation 0.02. Each point is stored as a picture of one pixel with two channels, uint8
    (n, 2, 1, 1), so that all code for pictures works on it. Rounding to uint8 has a step of 0.4
    standard deviations, which is fine enough."""
    r = RandomState(seed)
    x = RING[r.randint(0, 8, n)] + .02 * torch.from_numpy(r.randn(n, 2))
    return to_uint8(x)[..., None, None]


# ---- load: a data set by its name ----------------------------------------------------------------

SETS = ("mnist fashion emoji-apple emoji-windows anime stacked digits faces-a faces-b "
        "stacked-digits ring").split()


def load(name, size, split="train"):
    """Load a data set into memory.

    name: one of SETS, or a folder; size: side of a picture in pixels; split: "train", "test" or
    "all" (both). Returns images, uint8 (N, C, size, size) on the CPU; labels, int64 (N,), or None;
    and the list of class names, which is [] without classes, and FACES for the 132 kinds of faces,
    where label = 11 * hair + eyes. For ring the images are uint8 (N, 2, 1, 1), whatever the size.
    Raises Unavailable if the set cannot be downloaded, and UserError if it cannot be read."""
    if name not in SETS:
        return folder_set(name, size, split)
    if split == "all":
        x, y, classes = load(name, size, "train")
        x2, y2, _ = load(name, size, "test")
        if y is not None:
            y = torch.cat([y, y2])
        return torch.cat([x, x2]), y, classes
    if name == "mnist":
        return *idx_set("mnist", "MNIST", MNIST_URLS, size, split), DIGITS
    if name == "fashion":
        return *idx_set("fashion_mnist", "FashionMNIST", FASHION_URLS, size, split), CLOTHES
    if name.startswith("emoji"):
        return *emoji_set(name[6:].capitalize(), size, split), []
    if name == "anime":
        return *anime_set(size, split), FACES
    if name == "ring":
        return draw_ring(20_000, split == "test"), None, []
    if name.startswith("stacked"):
        # Stacked MNIST, Metz 2017 sec. 3.3.1: three random digits as red, green and blue.
        x, y, _ = load(name[8:] or "mnist", size, split)        # stacked-digits -> digits
        shape = 60_000 if split == "train" else 10_000, 3
        i = RandomState(0).randint(0, len(x), shape)
        return x[i, 0], y[i] @ torch.tensor([100, 10, 1]), [f"{k:03}" for k in range(1000)]
    return *drawn_set(name, size, split), DIGITS if name == "digits" else FACES


def choices(names):
    """"mnist,digits" -> ["mnist", "digits"]. The name of an existing folder may contain commas."""
    return [names] if Path(names).is_dir() else names.split(",")


def choose(names, size, split="train"):
    """Load the first available set of a list such as "mnist,digits" -> (name, images, labels,
    classes). Prints its name, why earlier sets in the list are not available, and, for a folder,
    how many of its files are not pictures."""
    note = ""
    names = choices(names)
    for name in names:
        try:
            images, labels, classes = load(name, size, split)
        except Unavailable as e:
            if name == names[-1]:
                raise
            note += f"  (no {name}: {str(e).split(';')[0]})"
            continue
        if name not in SETS:
            others = len([*files_in(Path(name), set())]) - len(pictures(name))
            note += f"  ({others} other files left out)"
        n, c, h, w = images.shape
        print(f"data     {name}: {n:,} pictures {c} x {h} x {w}{note}")
        return name, images, labels, classes


def to_float(x):
    """uint8 0..255 -> float32 in [-1, 1], the range of tanh, the last layer of a generator."""
    return x.float() * (2 / 255) - 1


def to_uint8(x):
    """float in [-1, 1] -> uint8, rounded and clamped: the inverse of to_float."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


# ---- writing pictures ----------------------------------------------------------------------------

# Twelve colours, repeated three times for charts with more than twelve lines.
COLOURS = 3 * """#1f77b4 #d64541 #2c8c3c #ff8c00 #8250b4 #14a0aa #825a46 #dc64aa #6e6e6e
                 #aaaa1e #3c3ca0 #000000""".split()


def font(size=12):
    """The font that comes with Pillow, so that charts look the same on every machine."""
    return ImageFont.load_default(size)


def write(draw, place, words, size=12, anchor="lm"):
    """Draw black text. anchor: which point of the text is put at place = (x, y), in Pillow's
    notation: "lm" is the middle of the left edge."""
    draw.text(place, words, "black", font(size), anchor)


def save(image, path):
    """Save a Pillow image as a PNG file, atomically. Returns the path."""
    with atomic(path) as part:
        image.save(part, "PNG")
    return path


def as_image(x):
    """uint8 (3, H, W) -> Pillow image."""
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def grid(images, columns):
    """uint8 (N, C, H, W), grey or colour -> one Pillow image that shows them row by row. Pictures
    of at most 32 pixels in height are shown at twice their size."""
    x = images.expand(-1, 3, -1, -1).cpu()
    if x.shape[2] <= 32:
        x = F.interpolate(x, scale_factor=2)
    x = F.pad(x, (2, 2, 2, 2, 0, 0, 0, -len(x) % columns), value=255)   # W, H, C and N
    rows = [torch.cat([*row], 2) for row in x.split(columns)]
    return as_image(torch.cat(rows, 1))


def sheet(rows, path, left=(), top=(), title="", marks=()):
    """Save rows of images, with labels to the left and above, as a PNG file. Returns the path.

    rows: uint8 (n_i, C, H, W) each; left: a label for each row; top: a label for each column;
    marks: the indices of the columns that get a red frame."""
    strips = [grid(row, len(row)) for row in rows]
    w = strips[0].width / len(rows[0])
    x0 = 12 + int(max(map(font().getlength, left), default=0))
    y0 = 4 + 20 * bool(title) + 20 * bool(top)
    size = x0 + max(strip.width for strip in strips), y0 + sum(strip.height for strip in strips)
    page = Image.new("RGB", size, "white")
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


def gif(path, frames):
    """Save PNG files or Pillow images as a looping GIF. Of more than 49 every second, third and so
    on is taken, which leaves at most 50. Each is shown for 0.1 seconds; then the last one of all is
    shown for another 0.9 seconds."""
    frames = frames[::1 + len(frames) // 50] + 9 * frames[-1:]
    pages = [(Image.open(frame) if isinstance(frame, Path) else frame).convert("RGB")
             for frame in frames]
    with atomic(path) as part:
        pages[0].save(part, "GIF", save_all=True, append_images=pages[1:], loop=0, duration=100)


# ---- charts --------------------------------------------------------------------------------------

def legend(draw, y, names, colours):
    """Draw names, each after a dot in its colour, on as many lines as needed; the first is at y."""
    x = 60
    for name, colour in zip(names, colours):
        width = 30 + font().getlength(name)
        if x + width > 830:
            x = 60
            y += 14
        draw.ellipse((x, y - 4, x + 8, y + 4), colour)
        write(draw, (x + 12, y), name)
        x += width


def ticks(low, high):
    """Two to seven round numbers from low to high: multiples of 1, 2 or 5 times a power of 10."""
    power = 10 ** np.floor(np.log10(high - low))
    step = next(k * power for k in (.2, .5, 1, 2) if high - low <= 6 * k * power)
    return step * np.arange(math.ceil(low / step), high / step + 1e-6)


def chart(path, panels):
    """Save line charts, one below the other, as a PNG file. Returns the path.

    panels: [(title, {name of a line: (steps, ys)})]. Each vertical axis covers the 1st to the 99th
    percentile of the values, so that a few outliers do not flatten the curves."""
    page = Image.new("RGB", (830, 230 * len(panels) + 20), "white")
    draw = ImageDraw.Draw(page)
    top = 0
    for title, lines in panels:
        steps, ys = np.concatenate([*lines.values()], 1)                    # (2, all points)
        end = steps.max()
        low, high = np.percentile(ys, [1, 99])
        edge = .06 * (high - low) + .01 * abs(high) + 1e-6
        low -= edge
        high += edge

        def pixel(step, value):
            return 60 + 754 * step / end, top + 206 - 150 * (value - low) / (high - low)

        for step in ticks(0, end):
            x, _ = pixel(step, low)
            write(draw, (x, top + 212), f"{step:g}", anchor="mt")
        for value in ticks(low, high):
            _, y = pixel(0, value)
            draw.line((60, y, 814, y), "lightgray")
            write(draw, (54, y), f"{value:g}", anchor="rm")
        draw.rectangle((60, top + 56, 814, top + 206), outline="black")
        write(draw, (60, top + 14), title, 15)
        legend(draw, top + 32, lines, COLOURS)
        for (steps, ys), colour in zip(lines.values(), COLOURS):
            draw.line([*map(pixel, steps, np.clip(ys, low, high))], colour, 2)
        top += 230
    write(draw, (814, page.height - 10), "step", anchor="rm")
    return save(page, path)


def scatter(path, xy, groups, group_names, labels, links, title, colours):
    """Save a scatter plot, with points in the colours of their groups, as a PNG. Returns the path.

    xy (N, 2); groups (N,): the index of each point's group; labels: {index of a point: text};
    links: [(i, j)], pairs of points that are joined by a line."""
    xy = np.asarray(xy, float)
    page = Image.new("RGB", (830, 890), "white")
    draw = ImageDraw.Draw(page)
    write(draw, (10, 14), title, 16)
    legend(draw, 38, group_names, colours)
    points = (xy - xy.min(0)) / np.ptp(xy, 0) * [700, 760] + [40, 90]
    for i, j in links:
        draw.line((*points[i], *points[j]), "black", 2)
    for (x, y), group in zip(points, groups):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), colours[group], "#3c3c3c")
    for i, word in labels.items():
        write(draw, points[i] + [7, -8], word)
    return save(page, path)


# ---- several processes: torchrun -----------------------------------------------------------------

def meet(name):
    """Connect the processes that torchrun has started. Each gets a GPU of its own if CUDA is
    available, unless `name` is "cpu". From here on only rank 0 prints to stdout."""
    if WORLD == 1:
        return
    need(os.name == "posix" and (name == "cpu" or not torch.backends.mps.is_available()),
         "torchrun works on Linux, or on a Mac with --device cpu; start the script with python")
    if name != "cpu" and torch.cuda.is_available():
        need(WORLD <= torch.cuda.device_count(),
             f"{WORLD} processes need as many GPUs: start fewer, or add --device cpu")
        torch.cuda.set_device(RANK)                 # all processes are on one machine
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")


@contextmanager
def rank_0_first():
    """Rank 0 runs the block first. The other ranks run it afterwards, when the files that rank 0
    has written are on disk."""
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
    """Returns the optimiser. Under torchrun each step() first averages the gradients over ranks."""
    if WORLD > 1:
        opt.register_step_pre_hook(mean_gradients)
    return opt


# ---- runs: command line, device ------------------------------------------------------------------

def run_main(main):
    """Run main() as a command. A UserError, an error of the file system and lack of memory end it
    with one line on stderr and exit code 2; Ctrl-C ends it with exit code 130."""
    if hasattr(sys.stdout, "reconfigure"):      # the stdout of a notebook has no such method
        # Write each line immediately, also to a file or pipe. Characters that the console cannot
        # show are escaped instead of causing an error.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        return
    except UserError as e:
        why = str(e)
    except BrokenPipeError:                     # the reader, such as `| head`, has stopped
        os._exit(141)
    except OSError as e:
        why = (f"{e.filename or 'file'}: {e.strerror or e}; free disk space, change the "
               "permissions or name another folder")
    except (RuntimeError, MemoryError) as e:
        if not re.search("out of memory|allocate|MemoryError", repr(e)):
            raise
        why = "out of memory: give a smaller --batch (fid.py: --n), or --device cpu for a small GPU"
    except KeyboardInterrupt:
        print("\nstopped; if it was training, the same command (without --resume 0) goes on from "
              "the last checkpoint, which is written every --sample-every steps")
        sys.exit(130)
    print("error:", *why.split(), file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message}; `python {self.prog} --help` lists the flags")


def arguments(Config, argv=None, presets={}, hide=(), positional=""):
    """Command line -> (name of the preset, dict of the fields that it changes).

    Each field of the dataclass Config is a flag. Its help text is the comment after it on the same
    line, so we read the source of the class. A comment line `# ---- the network` starts a new group
    of flags in the help. presets: {name: a Config with the values of this preset}; the name is the
    first word of the command line, and `NAME --help` shows these values as defaults. Fields in
    `hide` are not flags. The field `positional` takes the words that do not belong to a flag."""
    argv = sys.argv[1:] if argv is None else argv
    shown = presets.get(argv[0], Config) if argv else Config    # a class has the defaults
    group = parser = Parser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("preset", choices=presets, metavar="PRESET",
                            help=f"one of {' '.join(presets)}; PRESET --help shows its settings")
    for line in inspect.getsource(Config).splitlines():
        title = re.match(" +# -+ (.+)", line)
        field = re.match(r" +(\w+): .*?# (.*)", line)
        if title:
            group = parser.add_argument_group(title[1])
        elif field and field[1] == positional:
            parser.add_argument(positional, nargs="*", help=field[2])
        elif field and field[1] not in hide:
            name, words = field.groups()
            group.add_argument(f"--{name.replace('_', '-')}", type=type(getattr(Config, name)),
                               help=f"{words} (default {getattr(shown, name)!r})",
                               default=argparse.SUPPRESS,
                               choices=typing.get_args(Config.__annotations__[name]) or None)
    given = vars(parser.parse_intermixed_args(argv))
    return given.pop("preset", ""), given


def keep_memory():
    """Make the C library of Linux keep the memory that a training step frees. Otherwise it returns
    the memory to the system, and every step spends time on requesting it again."""
    with suppress(Exception):                            # other systems have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)                   # M_MMAP_THRESHOLD: 32 MB
        libc.mallopt(-1, 1 << 30)                   # M_TRIM_THRESHOLD: 1 GB


def device(name):
    """The torch.device of this name; "auto" is the GPU (such as cuda or mps) if there is one, else
    the CPU. Raises UserError if the device cannot be used. Also calls keep_memory()."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(True) or "cpu"     # True: only if available
    need(WORLD == 1 or dist.is_initialized(), "only gan.py can run under torchrun; use python")
    keep_memory()
    try:
        return torch.zeros(1, device=name).device
    except Exception as e:
        raise UserError(f"device {name} is not usable ({str(e).splitlines()[0]}); use --device cpu")


def place(net, device):
    """A network on its device, its weights in the memory layout that is fastest there.

    channels_last speeds up convolutions on CPUs and NVIDIA GPUs. On Apple GPUs, up to torch 2.13,
    the backward pass of batch norm is wrong or fails in this layout, so the default contiguous
    layout is kept there."""
    apple = torch.device(device).type == "mps"
    layout = torch.contiguous_format if apple else torch.channels_last
    return net.to(device, memory_format=layout)


def autocast(amp, device):
    """A context in which convolutions and matrix products are computed in bfloat16, with 16 bits.
    amp: 1 on, 0 off, -1 on only if the CPU or GPU supports bfloat16 natively, which is faster."""
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, torch.bfloat16, native if amp < 0 else amp == 1)


# ---- runs: folder, checkpoints, log --------------------------------------------------------------

def run_folder(name, cfg, changes, free):
    """The folder of a run: cfg.out, or out/<name>-<settings given on the command line>, except for
    those in `free`. Prints the first line of the run. A folder that contains files must hold a run
    of this program, so that no other files are overwritten. Also checks that DOWNLOADS is writable,
    because the run would otherwise fail only at its end."""
    need(abs(cfg.seed) <= 9e12, f"--seed {cfg.seed} is not between -9e12 and 9e12")
    for field, value in vars(cfg).items():
        if field in changes and field not in free:
            if value and isinstance(value, str):
                value = os.path.normpath(value)             # photos/ is the same as photos
                setattr(cfg, field, value)
            name += f"-{field}{value}"
    out = Path(cfg.out or "out/" + re.sub(r"[^\w.-]", "+", name))
    if (out / "last.pt").is_file():
        need({"log", "step", "config"} <= load_checkpoint(out / "last.pt").keys(), f"{out}/last.pt "
             "was written by an older version or another program; name another folder with --out")
    elif out.exists() and not all(hidden(path.name) for path in out.iterdir()):
        read_run(out)
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    need(os.access(DOWNLOADS, os.W_OK), f"cannot write to {DOWNLOADS}: set DOWNLOADS=FOLDER")
    print(f"run      {out}  seed {cfg.seed}  {device(cfg.device)}  "
          f"{torch.get_num_threads()} threads  torch {torch.__version__}")
    return out


def kept(cfg, out):
    """The data sets to choose from. A resumed run keeps the set with which it began, even if a set
    that is earlier in cfg.data has become available. For other runs, or if cfg.data no longer
    contains that set, this is cfg.data."""
    if cfg.resume and (out / "last.pt").is_file():
        began = load_checkpoint(out / "last.pt")["config"].get("data")
        if began in choices(cfg.data):
            return began
    return cfg.data                             # if the set differs, restore() reports it


def save_checkpoint(path, parts, step, cfg):
    """Save networks, optimisers, log and everything else that has a state_dict, with step and
    config, atomically. If a weight is not finite, the run ends and the earlier file is kept."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module) and not all(
                p.isfinite().all() for p in part.parameters()):
            parts["log"].blew_up(step)
    state = {name: part.state_dict() for name, part in parts.items()}
    save_state(path, dict(state, step=step, config=vars(cfg)))


def load_checkpoint(path, device="cpu"):
    """Load the dict that save_checkpoint wrote. With weights_only=True a file cannot run code."""
    need(Path(path).is_file(), f"no checkpoint {path}: train first, or name the run with --out")
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except OSError:                                 # no permission: run_main reports it
        raise
    except Exception as e:                          # a damaged zip or pickle raises nearly anything
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__}): move it, or "
                        "name another folder with --out") from e


@rank_0_first()
def restore(parts, path, cfg, free, device):
    """Load a checkpoint into networks, optimisers and log, in place. Returns its step.

    If there is no checkpoint, or only one of step 0, this saves one of step 0, which marks the
    folder as that of a run of this program. With --resume 0, first deletes the earlier run's
    checkpoint, log.csv, result.json and the sample pictures that its log lists. Raises UserError if
    a setting that is not in `free` has changed, if the learning rate has already fallen for another
    number of steps, or if there is nothing to train: then --resume 0 would only delete."""
    need(cfg.steps or cfg.resume, f"--resume 0 would delete the run in {path.parent}: omit it")
    if not cfg.resume and path.is_file() and RANK == 0:
        grids = [f"{step:06d}.png" for step in load_checkpoint(path)["log"]["grids"]]
        for name in [*grids, "log.csv", "result.json", "last.pt"]:
            (path.parent / name).unlink(missing_ok=True)
    state = load_checkpoint(path, device) if path.is_file() else dict(step=0)
    if state["step"] == 0:
        need(cfg.steps, f"nothing is trained yet: this needs {path}; train first")
        save_checkpoint(path, parts, 0, cfg)
        return 0
    trained = state["config"]
    for name, value in vars(cfg).items():
        was = trained.get(name, value)
        need(name in free or was == value,
             f"{path} was trained with {name} {was}, not {value}; repeat that setting, name "
             "another --out, or begin anew with --resume 0")
    need(not trained.get("decay") or state["step"] >= cfg.steps or cfg.steps == trained["steps"],
         f"in {path} the learning rate has fallen as for --steps {trained['steps']}: use the "
         "same --steps, name another --out, or start again with --resume 0")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as e:                          # another program's file raises nearly anything
        raise UserError(f"{path}: not this model; name another --out ({str(e)[:99]})") from e
    parts["log"].last = state["step"]
    print(f"resumed  {path} after {state['step']} steps")
    return state["step"]


def grad_norm(net):
    """L2 norm of all gradients of a network as one vector."""
    return torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])


class Log:
    """The numbers of a run. rows: one dict for each logged step; grids: the steps at which a sample
    picture was written; seconds: the training time so far.

    The log is part of the checkpoint. log.csv is only written for the user: the program never reads
    it, and overwrites it at each logged step."""

    def __init__(self, out, total):
        self.out = out
        self.total = total
        self.last = 0                   # the step of the latest row
        self.seconds = 0.
        self.rows = []
        self.grids = []
        self.then = time.perf_counter()

    def state_dict(self):
        return dict(rows=self.rows, grids=self.grids, seconds=self.seconds)

    def load_state_dict(self, state):
        vars(self).update(state)        # self.rows = state["rows"], and so on

    def grid(self, step):
        """The path for a step's sample picture, such as 000001.png. Adds the step to grids."""
        if step not in self.grids:
            self.grids.append(step)
        return self.out / f"{step:06d}.png"

    def table(self):
        """The log as {name of a column: its numbers}."""
        names = self.rows[0] if self.rows else ()
        return {name: [row[name] for row in self.rows] for name in names}

    def save(self, **record):
        """Write result.json: record, the step, the seconds, the table and the steps in grids."""
        record |= dict(step=self.last, seconds=self.seconds, log=self.table(), grids=self.grids)
        write_text(self.out / "result.json", json.dumps(record, indent=1))

    def blew_up(self, step):
        """End a run in which a number is not finite. result.json records this for `compare`."""
        self.last = step
        headline = f"blew up at {step}"
        self.save(metrics={"blew up at": step}, headline=headline)
        raise UserError(f"{headline}: a loss, gradient or weight is not finite. Train again with a "
                        "lower learning rate (--lr) in a folder of its own (without --out). The "
                        f"last good checkpoint is still in {self.out}")

    def write(self, step, batch, **numbers):
        """Write one row to log.csv, and print the step, the first four numbers, the speed and the
        time left.

        numbers: 0-d tensors, which are copied from the device all at once; batch: pictures per
        step. Ends the run with blew_up unless all numbers are finite."""
        values = torch.stack([*numbers.values()])
        if not values.isfinite().all():
            self.blew_up(step)
        numbers = dict(zip(numbers, values.tolist()))
        took = time.perf_counter() - self.then
        speed = (step - self.last) / took                   # steps per second
        left = int((self.total - step) / speed)
        self.then += took
        self.seconds += took
        self.last = step
        self.rows.append(dict(step=step, **numbers, seconds=self.seconds))
        with atomic(self.out / "log.csv") as part:
            np.savetxt(part, [[*row.values()] for row in self.rows], "%.7g", ",",
                       header=",".join(self.rows[0]), comments="")
        shown = [f"{name.split()[0]} {value:8.3g}" for name, value in numbers.items()]
        print(f"step {step:>{len(str(self.total))}}/{self.total}  {'  '.join(shown[:4])}  "
              f"{speed * batch:6.0f} img/s  {left // 60}:{left % 60:02} left"[:100])


def finish(out, cfg, log, metrics, panels, headline):
    """End a run: write curves.png, training.gif and result.json, and print the headline last.

    panels: [(title, [names of columns of the log])]; columns that the log lacks are left out."""
    table = log.table()
    shown = []
    for title, names in panels:
        lines = {name: (table["step"], table[name]) for name in names if name in table}
        if lines:
            shown.append((title, lines))
    if shown:
        chart(out / "curves.png", shown)
    grids = [*filter(Path.is_file, map(log.grid, log.grids))]
    if grids:
        gif(out / "training.gif", grids)
        print(f"samples  {grids[0]} ... {grids[-1].name}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    log.save(
        command=f"python {' '.join(sys.argv)}", config=vars(cfg),
        versions=dict(python=sys.version, torch=torch.__version__, numpy=np.__version__,
                      pillow=Image.__version__, gpu=gpu, threads=torch.get_num_threads()),
        metrics=metrics, headline=headline)
    print(f"wrote    {out}:", *sorted(p.name for p in out.glob("[a-z]*")))
    print(headline)


# ---- several runs on one sheet -------------------------------------------------------------------

def read_run(folder):
    """Read the results of a run -> (metrics with step and seconds, its last sample picture as uint8
    (3, H, W), log as {name of a column: numbers})."""
    picture = torch.full((3, 400, 400), 255).byte()             # white if the run has no picture
    try:
        record = json.loads(Path(folder, "result.json").read_text(encoding="utf-8-sig"))
        numbers = dict(step=record["step"], seconds=record["seconds"]) | record["metrics"]
        numbers = {name: x for name, x in numbers.items() if isinstance(x, int | float)}
        paths = [Path(folder, f"{step:06d}.png") for step in record["grids"]]
        for path in filter(Path.is_file, paths):
            picture = read_picture(path)
        np.array([*record["log"].values()], float)              # fails unless equally long numbers
    except Exception as e:                          # an edited or cut file raises nearly anything
        raise UserError(f"{folder} holds no finished run of this program (its result.json: "
                        f"{type(e).__name__}); name another folder") from e
    return numbers, picture, record["log"]


def compare(folders, out):
    """Compare several runs. Writes <out>.png with the first row of each run's last sample grid
    (other sample pictures are shown whole), <out>-curves.png with the curves, and <out>.md with a
    Markdown table of the metrics, one row per run, which is also printed. A folder without a
    readable result is left out with a message."""
    runs = {}
    for folder in folders:
        try:
            runs[str(folder).removeprefix("out/")] = read_run(folder)
        except UserError as e:
            print(f"left out: {e}")
    need(runs, "no finished run to compare; train one first")
    names = dict.fromkeys(name for numbers, _, _ in runs.values() for name in numbers)
    table = f"| run | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}"
    lines = {}
    strips = []
    for name, (numbers, picture, log) in runs.items():
        cells = [f"{numbers[k]:,.5g}" if k in numbers else "" for k in names]
        table += f"\n| {name} | {' | '.join(cells)} |"
        for column in set(log) - {"step", "seconds"}:
            lines.setdefault(column, {})[name] = log["step"], log[column]
        _, h, w = picture.shape                     # square: a grid of 8 x 8; else shown whole
        strips.append(picture[None, :, :h // 8 if h == w else h])
    sheet(strips, f"{out}.png", list(runs))
    if lines:
        chart(f"{out}-curves.png", sorted(lines.items()))
    write_text(f"{out}.md", table)
    print(f"{table}\nwrote {out}.png {out}-curves.png {out}.md")


def tile(folders, out):
    """Show the sample pictures of several equally long runs together, four in a row. The last ones
    go to <out>.png; in <out>.gif there is one frame for each step that has sample pictures."""
    frames = []
    for picture in sorted(Path(folders[0]).glob("[0-9]*.png")):
        pages = [read_picture(Path(folder, picture.name)) for folder in folders]
        frames.append(grid(torch.stack(pages), 4))
    need(frames, f"{folders[0]} has no sample pictures; train it first")
    save(frames[-1], f"{out}.png")
    gif(f"{out}.gif", frames)
    print(f"wrote {out}.png {out}.gif")


@dataclasses.dataclass
class Command:
    """The arguments of `python data.py compare` and `python data.py tile`."""
    runs: tuple = ()                # folders of finished runs
    out: str = "out/compare"        # writes OUT.png; compare: OUT-curves.png, OUT.md; tile: OUT.gif


def main(argv=None):
    """The command line."""
    do, changes = arguments(Command, argv, dict(compare=Command, tile=Command), positional="runs")
    a = Command(**changes)
    need(a.runs, f"name the folders of runs: python data.py {do} out/a out/b --out out/ab")
    (tile if do == "tile" else compare)(a.runs, a.out)


if __name__ == "__main__":
    run_main(main)
