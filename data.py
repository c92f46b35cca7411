"""data.py: pictures in, pictures out, and the plumbing that every script shares.

    python data.py show digits out/digits.png            draw a page of any data set
    python data.py compare out/a out/b --out out/ab      several runs on one sheet and in one Markdown table

A data set is one uint8 tensor (N, C, size, size): MNIST is 60 MB, so it lives on the device as a whole, and a batch is
an index into it. No worker process, no picture decoded twice. What is downloaded, decoded or drawn is kept in downloads/.
Sets: mnist, fashion, emoji-apple, emoji-windows, anime; a folder of your own pictures; and three that are drawn here
and need no network: digits, faces-a and faces-b (one face, two drawing styles, every attribute known).
"""
import argparse, contextlib, csv, ctypes, dataclasses, glob, gzip, hashlib, http.client, inspect, io, json, math, os, platform
import queue, re, shutil, signal, struct, sys, tarfile, threading, time, urllib.request, zlib
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

DOWNLOADS = Path(os.environ.get("DOWNLOADS", "downloads"))
MAX_PIXELS = 50_000_000          # a larger picture is refused before it is decoded (decompression bombs)


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. Ends a script with exit code 2."""


class Unavailable(UserError):
    """A data set or a file that is not on disk and cannot be downloaded."""


# ---- files: never half a file under its final name ----------------------------------------------------------------

@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`; when the block ends well it is synced and renamed, otherwise removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):     # of a killed process
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
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


def sha256_of(path):
    """sha256 of a file as a hexadecimal string."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def find(name):
    """Where `name` (a path relative to a download folder) lies: in $DATA_DIR, else in downloads/, else None."""
    roots = ([Path(os.environ["DATA_DIR"])] if os.environ.get("DATA_DIR") else []) + [DOWNLOADS]
    return next((r / name for r in roots if (r / name).exists()), None)


def _open(url, seconds=7):
    """urlopen that gives up after `seconds` whatever hangs: in a thread, since looking a name up knows no time-out."""
    answer = queue.Queue()

    def go():
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "python"})
            answer.put(urllib.request.urlopen(request, timeout=seconds))
        except Exception as e:
            answer.put(e)
    threading.Thread(target=go, daemon=True).start()
    try:
        got = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds} s") from None
    if isinstance(got, Exception):
        raise got
    return got


def download(url, path, sha256=None):
    """Fetch one URL to `path`, with progress; ValueError or OSError when what arrives is not the wanted file."""
    with _open(url) as r, atomic(path) as part, open(part, "wb") as f:
        total, got, start, h = int(r.headers.get("Content-Length") or 0), 0, time.monotonic(), hashlib.sha256()
        while chunk := r.read(1 << 16):
            if not got and chunk.lstrip()[:1] == b"<":
                raise ValueError("a web page came instead of the file")
            f.write(chunk)
            h.update(chunk)
            got += len(chunk)
            rate = got / max(time.monotonic() - start, 1e-3)
            if time.monotonic() - start > 15 and rate < 10e3:
                raise ValueError(f"too slow ({rate / 1e3:.1f} kB/s)")
            if sys.stdout.isatty():
                print(f"\r{Path(path).name}  {got / 1e6:7.1f} MB" + (f" of {total / 1e6:.1f}" if total else "") +
                      f"  {rate / 1e6:5.1f} MB/s", end="\r" if got == total else "", flush=True)
        if got == 0 or (total and got != total):
            raise ValueError(f"cut off after {got:,} of {total:,} bytes")
        if sha256 and h.hexdigest() != sha256:
            raise ValueError(f"wrong file: sha256 {h.hexdigest()}, not {sha256}")
        f.flush()
    print(f"downloaded {url} ({got / 1e6:.1f} MB)")
    return Path(path)


def fetch(name, urls, sha256=None, size=None):
    """Path of `name`, found on disk or downloaded from the first mirror that works.

    Args: urls, the mirrors in order; sha256, checked on disk too; size, in words, for the message.
    Errors: Unavailable naming URL, path and hash; UserError for a file on disk that is another one."""
    if found := find(name):
        if sha256 and (got := sha256_of(found)) != sha256:
            raise UserError(f"{found} is damaged or another file: sha256 {got}, wanted {sha256}; delete it and run again")
        return found
    why = []
    for url in urls:
        try:
            return download(url, DOWNLOADS / name, sha256)
        except (OSError, ValueError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in (28, 27, 13, 30):         # the disk's fault, not the mirror's
                raise
            why.append(f"{url.split('/')[2]}: {getattr(e, 'reason', None) or e}")
    raise Unavailable(f"{name} cannot be downloaded ({'; '.join(why)}); put the file of {urls[0]}"
                      f"{f' ({size})' if size else ''} at {DOWNLOADS / name}{f', sha256 {sha256}' if sha256 else ''}")


# ---- reading: idx files, archives, pictures ------------------------------------------------------------------------

def read_idx(path):
    """A gzipped idx file -> uint8 array. Format: 0, 0, 8 (uint8), rank; one big-endian uint32 a dimension; the bytes."""
    try:
        with gzip.open(path) as f:
            zero, kind, rank = struct.unpack(">HBB", f.read(4))
            if zero or kind != 8 or not 1 <= rank <= 3:
                raise ValueError("wrong magic number")
            shape = struct.unpack(f">{rank}I", f.read(4 * rank))
            if math.prod(shape) > 1 << 28:
                raise ValueError(f"impossible shape {shape}")
            raw = f.read(math.prod(shape) + 1)
        if len(raw) != math.prod(shape):
            raise ValueError(f"{len(raw):,} bytes of pictures where the header {shape} promises {math.prod(shape):,}")
        return np.frombuffer(raw, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as e:
        raise UserError(f"{path} is no whole idx file ({e}); delete it and run again") from None


def read_picture(source, channels=3):
    """A picture (path, or (name, bytes)) -> uint8 tensor (channels, H, W); what is transparent becomes white.

    A plain convert("RGB") would show whatever colour hides under the transparency: dark green in the emojis."""
    name, file = (source[0], io.BytesIO(source[1])) if isinstance(source, tuple) else (source, source)
    try:
        with Image.open(file) as im:
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(f"{im.width} x {im.height} is more than {MAX_PIXELS:,} pixels")
            if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            im = im.convert("L" if channels == 1 else "RGB")
            return torch.from_numpy(np.array(im)).view(im.height, im.width, channels).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, MemoryError, EOFError, struct.error, zlib.error, IndexError, TypeError,
            KeyError, OverflowError, AttributeError, Image.DecompressionBombError) as e:   # what Pillow's readers raise
        raise UserError(f"{name} is no readable picture ({e or type(e).__name__}); remove it") from None


def pictures(folder):
    """All picture files under a folder, sorted. UserError when it is missing or holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no data set or folder named {folder}; sets: {', '.join(SETS)}")
    kinds = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm"}
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file())
    if not found:
        raise UserError(f"{folder} holds no picture ({' '.join(sorted(kinds))})")
    return found


def fit(x, size):
    """uint8 (C, H, W) or (N, C, H, W) -> the same, centre-cropped to a square and resized (antialiased) to `size`."""
    h, w = x.shape[-2:]
    s = min(h, w)
    x = x[..., (h - s) // 2:(h - s) // 2 + s, (w - s) // 2:(w - s) // 2 + s]
    if s == size:
        return x.contiguous()
    batch = x.view(-1, *x.shape[-3:]).float()
    batch = F.interpolate(batch, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return batch.round().clamp(0, 255).byte().view(*x.shape[:-2], size, size)


def members(name, urls=()):
    """(path inside, bytes) of every file of an archive name.tar.gz, or of the unpacked folder name/.

    An archive is only read, never unpacked, so no path in it can lead anywhere; odd members are refused all the same."""
    if (folder := find(name)) and folder.is_dir():
        for p in sorted(q for q in folder.rglob("*") if q.is_file()):
            yield f"{name}/{p.relative_to(folder).as_posix()}", p.read_bytes()
        return
    path = fetch(f"{name}.tar.gz", urls) if urls else find(f"{name}.tar.gz")
    if not path:
        raise Unavailable(f"{name} is not on disk: put {name}.tar.gz or the folder {name}/ in {DOWNLOADS} or $DATA_DIR")
    try:
        with tarfile.open(path) as tar:
            for m in tar:
                if m.name.startswith("/") or ".." in m.name.split("/") or not (m.isfile() or m.isdir()):
                    raise ValueError(f"refused: {m.name!r} is a link, a device or leads out of the archive")
                if m.isfile():
                    if m.size > 1 << 26:
                        raise ValueError(f"{m.name} is larger than 64 MB")
                    yield m.name, tar.extractfile(m).read()
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as e:
        raise UserError(f"{path} is no whole archive ({e}); delete it and run again") from None


def cached(key, build):
    """Arrays built once and kept as downloads/cache/<key>.npz; a damaged cache is built again."""
    path = DOWNLOADS / "cache" / f"{key}.npz"
    with contextlib.suppress(Exception):                   # a damaged zip raises nearly anything
        with np.load(path, allow_pickle=False) as f:
            return f["images"], (f["labels"] if "labels" in f else None)
    images, labels = build()
    with atomic(path) as part, open(part, "wb") as f:
        np.savez(f, images=images, **({} if labels is None else {"labels": labels}))
    return images, labels


# ---- data sets that are downloaded or placed by hand ---------------------------------------------------------------

MNIST = {"train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
         "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
         "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
         "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}
FASHION = {"train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
           "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
           "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
           "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"}
MNIST_URLS = ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"]
FASHION_URLS = ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"]
EMOJI_URLS = ["http://www.cs.toronto.edu/~jba/emojis.tar.gz"]
CLOTHES = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
HAIR = "orange white aqua gray green red purple pink blue black brown blonde".split()
EYES = "gray black orange pink yellow aqua purple green brown red blue".split()
FACES = [f"{h} hair {e} eyes" for h in HAIR for e in EYES]        # class = 11 * hair + eyes: 132 of them


def idx_set(folder, hashes, urls, size, split):
    """MNIST or Fashion-MNIST. 28 -> 32 pads with black, so that every pixel stays exact; other sizes are resampled."""
    names = [n for n in hashes if n.startswith("train" if split == "train" else "t10k")]
    paths = [fetch(f"{folder}/{n}", [u + n for u in urls], hashes[n]) for n in names]
    x, y = read_idx(paths[0]), read_idx(paths[1])
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
        raise UserError(f"{paths[0]} and {paths[1]} do not belong together ({x.shape}, {y.shape}); delete both")
    x = torch.from_numpy(x.copy())[:, None]
    x = F.pad(x, [(size - 28) // 2] * 4) if size in (28, 30, 32) else fit(x, size)
    return x, torch.from_numpy(y.astype(np.int64))


def emoji_set(style, size, split):
    """Apple or Windows emojis as (N, 3, size, size), composited on white."""
    folder = f"/{'Test_' if split == 'test' else ''}{style}/"

    def build():
        files = sorted((n, b) for n, b in members("emojis", EMOJI_URLS) if folder in n and n.endswith(".png"))
        if not files:
            raise UserError(f"the emojis archive has no folder {folder}; delete it and run again")
        return np.stack([fit(read_picture(f), size).numpy() for f in files]), None
    return torch.from_numpy(cached(f"emoji-{style}-{size}-{split}", build)[0]), None


def anime_set(size, split):
    """Tagged anime faces (course data, placed by hand); every tenth is the test split. Pictures without a tag are left out."""
    def build():
        tags, files = {}, {}
        for n, b in members("anime"):
            if n.endswith("tags.csv"):
                for row in csv.reader(io.StringIO(b.decode("utf-8", "replace"))):
                    if len(row) == 2 and row[1].strip() in FACES:
                        tags[row[0].strip()] = FACES.index(row[1].strip())
            elif n.endswith((".jpg", ".png")):
                files[Path(n).stem] = (n, b)
        names = sorted(tags.keys() & files.keys(), key=lambda s: (len(s), s))
        if not names:
            raise UserError("the anime set has no tagged picture: tags.csv lines are `N,<hair> hair <eye> eyes` for images/N.jpg")
        names = [s for i, s in enumerate(names) if (i % 10 == 9) == (split == "test")]
        return np.stack([fit(read_picture(files[s]), size).numpy() for s in names]), np.array([tags[s] for s in names])
    images, labels = cached(f"anime-{size}-{split}", build)
    return torch.from_numpy(images), torch.from_numpy(labels)


def folder_set(folder, size, split):
    """A folder of pictures, sub-folders as classes. Split "all" is every picture, "test" every tenth, "train" the rest; a
    folder of fewer than 20 pictures is its own test set."""
    files = pictures(folder)
    split = "all" if len(files) < 20 else split
    kinds = sorted({p.relative_to(folder).parts[0] for p in files if len(p.relative_to(folder).parts) > 1})
    classes = kinds if all(len(p.relative_to(folder).parts) > 1 for p in files) else []
    files = [p for i, p in enumerate(files) if split == "all" or (i % 10 == 9) == (split == "test")]
    stamp = hashlib.sha256(repr([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode())

    def build():
        labels = np.array([classes.index(p.relative_to(folder).parts[0]) for p in files]) if classes else None
        return np.stack([fit(read_picture(p), size).numpy() for p in files]), labels
    images, labels = cached(f"folder-{stamp.hexdigest()[:16]}-{size}", build)
    return torch.from_numpy(images), None if labels is None else torch.from_numpy(labels), classes


# ---- data sets that are drawn here ---------------------------------------------------------------------------------

def arc(cx, cy, rx, ry, a, b, n=24):
    """Points on an ellipse from angle a to b in degrees; 0 is right, 90 is down."""
    t = np.radians(np.linspace(a, b, n))
    return list(zip(cx + rx * np.cos(t), cy + ry * np.sin(t)))


STROKES = [  # digit -> ways to write it -> strokes -> points in the unit square, y downwards
    [[arc(.5, .5, .34, .5, 0, 360)], [arc(.5, .5, .42, .48, -60, 300)]],
    [[[(.5, 0), (.5, 1)]], [[(.3, .22), (.52, 0), (.52, 1)]]],
    [[arc(.5, .28, .32, .28, 180, 390) + [(.15, 1), (.85, 1)]],
     [arc(.48, .28, .3, .28, 200, 400) + [(.3, .85)] + arc(.25, .9, .1, .1, 0, 270, 9) + [(.5, .92), (.88, .96)]]],
    [[arc(.45, .26, .3, .26, 200, 440) + arc(.45, .75, .36, .25, 280, 520)],
     [[(.15, 0), (.8, 0), (.45, .4)] + arc(.45, .7, .36, .3, 270, 510)]],
    [[[(.66, 1), (.66, 0), (.1, .66), (.92, .66)]], [[(.25, 0), (.16, .52), (.85, .5)], [(.78, .08), (.68, 1)]]],
    [[[(.82, 0), (.27, 0), (.22, .45)] + arc(.46, .69, .36, .31, 235, 500)],
     [[(.25, .04), (.2, .45)] + arc(.46, .69, .34, .31, 240, 500), [(.25, .04), (.85, .02)]]],
    [[arc(.8, .6, .65, .6, 260, 185, 12) + arc(.5, .7, .34, .3, 190, 545)],
     [[(.6, 0), (.3, .35)] + arc(.48, .7, .3, .3, 200, 550)]],
    [[[(.12, .02), (.88, .02), (.4, 1)]], [[(.12, .04), (.88, 0), (.45, 1)], [(.28, .5), (.82, .48)]]],
    [[arc(.5, .26, .27, .26, 90, 450) + arc(.5, .76, .33, .24, -90, 270)],
     [arc(.5, .25, .28, .25, -20, -250) + arc(.5, .75, .3, .25, -70, 200) + [(.4, .5), (.76, .16)]]],
    [[arc(.48, .3, .32, .3, 0, 360) + [(.8, .3), (.74, 1)]], [arc(.5, .28, .3, .28, -20, 340) + arc(.4, .6, .42, .4, -50, 80, 12)]],
]


def draw_digits(n, seed, size):
    """n handwritten-looking digits, uint8 (n, 1, size, size), white on black, and labels; hand, slant, pen and noise vary."""
    r, s = np.random.RandomState(seed), 96
    labels, out = r.randint(0, 10, n), np.empty((n, size, size), np.uint8)
    for i, y in enumerate(labels):
        im = Image.new("L", (s, s))
        pen, turn, slant = r.uniform(6, 12), r.normal(0, .12), r.normal(-.1, .18)
        wide, high, cx, cy = r.uniform(.38, .58) * s, r.uniform(.56, .7) * s, *(s / 2 + r.normal(0, 3, 2))
        wave, phase = r.normal(0, .025, (2, 2)), r.uniform(0, 6.28, (2, 2))      # slow wobble of the hand
        for stroke in STROKES[y][r.randint(2)]:
            p = np.array(stroke) - .5
            p = p + wave[0] * np.sin(5 * p + phase[0]) + wave[1] * np.sin(9 * p[:, ::-1] + phase[1])
            u, v = (p[:, 0] + slant * p[:, 1]) * wide, p[:, 1] * high
            q = np.stack([cx + u * math.cos(turn) - v * math.sin(turn), cy + u * math.sin(turn) + v * math.cos(turn)], 1)
            draw = ImageDraw.Draw(im)
            draw.line([tuple(a) for a in q], fill=255, width=round(pen), joint="curve")
            for a in (q[0], q[-1]):                                              # round ends
                draw.ellipse([*(a - pen / 2), *(a + pen / 2)], fill=255)
        out[i] = np.asarray(im.resize((size, size), Image.Resampling.BOX))
    noise = r.randint(-12, 13, out.shape)
    return np.where(out > 0, np.clip(out + noise, 0, 255), 0).astype(np.uint8)[:, None], labels


RGB = dict(orange=(240, 140, 30), white=(246, 246, 250), aqua=(80, 225, 220), gray=(140, 142, 150), green=(50, 165, 70),
           red=(205, 35, 40), purple=(135, 60, 180), pink=(252, 150, 200), blue=(45, 85, 220), black=(38, 34, 42),
           brown=(125, 72, 36), blonde=(248, 215, 100), yellow=(245, 220, 20))


def face_shapes(hair, eye, p):
    """One face as a list of (shape, coordinates on a 128 x 128 canvas, colour), back to front.

    p: 8 numbers in [-1, 1]: shift x, shift y, width, hair length, mouth curve, mouth width, tilt of the fringe, gaze."""
    x, y = 64 + 6 * p[0], 66 + 5 * p[1]
    w, skin = 34 + 3 * p[2], (253, 222, 196)
    hair, eye, drop = RGB[HAIR[hair]], RGB[EYES[eye]], 96 + 26 * p[3]
    shapes = [("ellipse", (x - w - 12, y - 52, x + w + 12, y + 30), hair),                  # hair behind
              ("polygon", (x - w - 12, y - 10, x - w - 8, drop, x - w + 12, drop + 6, x - 10, y + 20,
                           x + 10, y + 20, x + w - 12, drop + 6, x + w + 8, drop, x + w + 12, y - 10), hair),
              ("polygon", (x - 10, y + 30, x + 10, y + 30, x + 26, 130, x - 26, 130), skin),   # neck
              ("ellipse", (x - w, y - 40, x + w, y + 42), skin)]                            # face
    for side in (-1, 1):                                                                    # eyes
        ex, ey = x + side * 16, y + 6
        shapes += [("ellipse", (ex - 11, ey - 13, ex + 11, ey + 13), (255, 255, 255)),
                   ("ellipse", (ex - 9 + 2 * p[7], ey - 12, ex + 9 + 2 * p[7], ey + 12), eye),
                   ("ellipse", (ex - 3 + 2 * p[7], ey - 5, ex + 3 + 2 * p[7], ey + 5), (20, 16, 24))]
    m, c = 7 + 4 * p[5], 4 * p[4]
    shapes += [("line", (x - m, y + 29 - c, x, y + 29 + c, x + m, y + 29 - c), (170, 60, 70)),
               ("polygon", (x - w - 4, y - 4, x - w - 2, y - 36, x - 14, y - 54, x + 14, y - 54, x + w + 2, y - 36,
                            x + w + 4, y - 4, x + 22 + 6 * p[6], y - 20, x + 12 + 6 * p[6], y - 8,
                            x + 6 * p[6], y - 22, x - 12 + 6 * p[6], y - 8, x - 22 + 6 * p[6], y - 20), hair)]  # fringe
    return shapes


def draw_faces(style, n, first, size):
    """Faces number first .. first + n - 1, uint8 (n, 3, size, size), and labels 11 * hair + eyes.

    Style "a": soft, shaded from the upper left, no outline, on slate. Style "b": flat, black outline, on cream. Face i
    has the same attributes and pose in both styles, so faces-b[i] is the true translation of faces-a[i]."""
    out, labels = np.empty((n, size, size, 3), np.uint8), np.empty(n, np.int64)
    line, ground = (None, (92, 106, 128)) if style == "a" else ((0, 0, 0), (255, 250, 235))
    for i in range(n):
        r = np.random.RandomState(first + i)
        hair, eye, p = r.randint(12), r.randint(11), r.uniform(-1, 1, 8)
        im = Image.new("RGB", (128, 128), ground)
        draw = ImageDraw.Draw(im)
        for kind, xy, colour in face_shapes(hair, eye, p):
            if kind == "line":
                draw.line(xy, fill=line or colour, width=4, joint="curve")
            else:
                getattr(draw, kind)(xy, fill=colour, outline=line, width=3)
        out[i], labels[i] = np.asarray(im.resize((size, size), Image.Resampling.BOX)), 11 * hair + eye
    if style == "a":                                                     # light from the upper left
        v, u = np.mgrid[0:size, 0:size] / (size - 1)
        light = (1.12 - .42 * np.hypot(u - .25, v - .2)).astype(np.float32)[..., None]
        for k in range(0, n, 500):
            out[k:k + 500] = np.clip(out[k:k + 500] * light, 0, 255)
    return out.transpose(0, 3, 1, 2), labels


def drawn_set(name, size, split):
    """digits, faces-a or faces-b, drawn once and cached. The halves of faces train on different faces and share the test."""
    first = {"digits": {"train": 1, "test": 2}, "faces-a": {"train": 0, "test": 20_000},
             "faces-b": {"train": 10_000, "test": 20_000}}[name][split]

    def build():
        print(f"drawing {name} ({split}) ...", flush=True)
        if name == "digits":
            return draw_digits(20_000 if split == "train" else 4_000, first, size)
        return draw_faces(name[-1], 10_000 if split == "train" else 1_000, first, size)
    images, labels = cached(f"{name}-{size}-{split}", build)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


# ---- load: one name, one tensor ------------------------------------------------------------------------------------

SETS = ["mnist", "fashion", "emoji-apple", "emoji-windows", "anime", "digits", "faces-a", "faces-b"]


def load(name, size, split="train"):
    """A data set as one tensor.

    Args: name, one of SETS or a folder; size, pixels a side; split, "train", "test" or "all" (both).
    Returns: images uint8 (N, C, size, size); labels int64 (N,), or None; class names (faces and anime: the 132 FACES,
    label = 11 * hair + eyes). Errors: Unavailable when it is neither on disk nor to be had; UserError when damaged."""
    if not 8 <= size <= 1024:
        raise UserError(f"a picture size of {size} is not between 8 and 1024")
    if name not in SETS:
        return folder_set(name, size, split)
    if split == "all":
        (x, y, classes), (x2, y2, _) = load(name, size, "train"), load(name, size, "test")
        return torch.cat([x, x2]), None if y is None else torch.cat([y, y2]), classes
    if name == "mnist":
        return *idx_set("mnist", MNIST, MNIST_URLS, size, split), list("0123456789")
    if name == "fashion":
        return *idx_set("fashion_mnist", FASHION, FASHION_URLS, size, split), CLOTHES
    if name.startswith("emoji"):
        return *emoji_set({"emoji-apple": "Apple", "emoji-windows": "Windows"}[name], size, split), []
    if name == "anime":
        return *anime_set(size, split), FACES
    return *drawn_set(name, size, split), list("0123456789") if name == "digits" else FACES


def choose(names, size, split="train"):
    """The first of "mnist,digits" that can be had, as (name, images, labels, classes); says which and why."""
    missing = ""
    for name in names.split(","):
        try:
            images, labels, classes = load(name, size, split)
            kind = {"mnist": "mnist", "fashion": "fashion_mnist", "anime": "anime"}.get(name, "emojis")
            where = (name if name not in SETS else "drawn here" if name in ("digits", "faces-a", "faces-b") else
                     next(filter(None, map(find, (kind, f"{kind}.tar.gz"))), DOWNLOADS))
            n, c, h, w = images.shape
            print(f"data     {name}: {n:,} pictures {c} x {h} x {w} ({where}){missing}", flush=True)
            return name, images, labels, classes
        except Unavailable as e:
            if name == names.split(",")[-1]:
                raise
            missing += f"; {str(e).split('; put ')[0]}"
    raise UserError("no data set was named")


def to_float(x):
    """uint8 0..255 -> float32 in [-1, 1], the range of tanh."""
    return x.float().mul(2 / 255).sub(1)


def to_uint8(x):
    """float in [-1, 1] -> uint8, rounded and clamped: the inverse of to_float."""
    return x.float().add(1).mul(127.5).round().clamp(0, 255).byte()


# ---- pictures out: grids, sheets, charts, GIFs ---------------------------------------------------------------------

COLOURS = [(31, 119, 180), (214, 69, 65), (44, 140, 60), (255, 140, 0), (130, 80, 180), (20, 160, 170), (130, 90, 70),
           (220, 100, 170), (110, 110, 110), (170, 170, 30), (60, 60, 160), (0, 0, 0)]


def font(size):
    """Pillow's own font, so that charts look the same everywhere."""
    return ImageFont.load_default(size)


def save(image, path):
    """A Pillow image -> PNG file, atomically."""
    with atomic(path) as part:
        image.save(part, format="PNG")
    return path


def as_bytes(images):
    """(N, C, H, W) uint8 or float in [-1, 1], grey or colour -> uint8 numpy (N, H, W, 3)."""
    x = images if images.dtype == torch.uint8 else to_uint8(images.detach())
    return x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def grid(images, columns, pad=2):
    """Images (N, C, H, W) -> one Pillow image, row by row; 32 pixels and less are doubled so that one can see them."""
    x = as_bytes(images)
    n, h, w, _ = x.shape
    rows = -(-n // columns)
    page = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, np.uint8)
    for i in range(n):
        top, left = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        page[top:top + h, left:left + w] = x[i]
    im = Image.fromarray(page)
    return im.resize((im.width * 2, im.height * 2), Image.Resampling.NEAREST) if h <= 32 else im


def sheet(rows, path, left=(), top=(), title="", marks=()):
    """Rows of images with words beside and above; columns whose index is in `marks` get a red frame. Saves a PNG.

    Args: rows, a list of tensors (n_i, C, H, W); left, a label a row; top, a label a column."""
    strips = [as_bytes(r) for r in rows]
    k = 2 if strips[0].shape[1] <= 32 else 1
    h, w = strips[0].shape[1] * k + 4, strips[0].shape[2] * k + 4
    wide = max([font(13).getlength(s) for s in left], default=0)
    x0, y0 = int(wide) + (12 if left else 4), (24 if title else 4) + (20 if top else 0)
    page = Image.new("RGB", (max(x0 + w * max(len(s) for s in strips) + 4, int(font(15).getlength(title)) + 16),
                             y0 + h * len(strips) + 4), "white")
    draw = ImageDraw.Draw(page)
    draw.text((8, 3), title, fill="black", font=font(15))
    for i, strip in enumerate(strips):
        if left:
            draw.text((6, y0 + i * h + h / 2 - 8), left[i], fill="black", font=font(13))
        for j, a in enumerate(strip):
            if j in marks:
                draw.rectangle((x0 + j * w - 1, y0 + i * h - 1, x0 + (j + 1) * w - 4, y0 + (i + 1) * h - 4), fill="red")
            page.paste(Image.fromarray(a).resize((w - 4, h - 4), Image.Resampling.NEAREST), (x0 + j * w, y0 + i * h))
    for j, word in enumerate(top):
        draw.text((x0 + j * w + (w - 4) / 2, y0 - 4), word, fill="black", font=font(13), anchor="mb")
    return save(page, path)


def ticks(low, high, count=5):
    """Round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(v):
    """A number for an axis: 3 significant digits, 20k for 20,000."""
    return f"{v / 1000:g}k" if abs(v) >= 1000 else f"{v:.3g}"


def axes(draw, box, xs, ys, title, xlabel=""):
    """Frame, ticks and title inside box (x0, y0, x1, y1); returns the map from data to pixels."""
    x0, y0, x1, y1 = box[0] + 52, box[1] + 40, box[2] - 14, box[3] - 38
    span = lambda v: (v[0], v[1]) if v[1] > v[0] else (v[0] - (abs(v[0]) or 1) / 2, v[0] + (abs(v[0]) or 1) / 2)
    (xa, xb), (ya, yb) = span(xs), span(ys)
    to = lambda x, y: (x0 + (x - xa) / (xb - xa) * (x1 - x0), y1 - (y - ya) / (yb - ya) * (y1 - y0))
    for v in ticks(ya, yb):
        draw.line((x0, to(xa, v)[1], x1, to(xa, v)[1]), fill=(225, 225, 225))
        draw.text((x0 - 6, to(xa, v)[1]), short(v), fill="black", font=font(12), anchor="rm")
    for v in ticks(xa, xb):
        draw.line((to(v, ya)[0], y1, to(v, ya)[0], y1 + 4), fill="black")
        draw.text((to(v, ya)[0], y1 + 6), short(v), fill="black", font=font(12), anchor="mt")
    draw.rectangle((x0, y0, x1, y1), outline="black")
    draw.text(((x0 + x1) / 2, box[1] + 5), title, fill="black", font=font(15), anchor="mt")
    draw.text((x1, y1 + 21), xlabel, fill="black", font=font(12), anchor="rt")
    return to


def legend(draw, x, y, names):
    """Colour keys from left to right."""
    for k, name in enumerate(names):
        draw.line((x, y, x + 16, y), fill=COLOURS[k % 12], width=3)
        draw.text((x + 20, y), name, fill="black", font=font(12), anchor="lm")
        x += 32 + font(12).getlength(name)


def thin(values, points=300):
    """At most `points` bin means of a sequence: what a chart of that many pixels can show."""
    if len(values) <= points:
        return np.asarray(values, float)
    return np.array([np.mean(part) for part in np.array_split(np.asarray(values, float), points)])


def curves(path, table, panels, x="step"):
    """Line charts with axes and legends, two a row. Saves a PNG.

    Args: table, name -> list of numbers; panels, [(title, [names])]; x, the name of the horizontal axis. Names that the
    table lacks are left out; more than 300 points are averaged in bins; the axis covers the 1st to 99th percentile."""
    panels = [(t, [n for n in names if len(table.get(n, []))]) for t, names in panels]
    panels = [(t, names) for t, names in panels if names]
    w, h, columns = 470, 300, min(2, len(panels))
    page = Image.new("RGB", (w * columns, h * -(-len(panels) // columns)), "white")
    draw, xs = ImageDraw.Draw(page), thin(table[x])
    for k, (title, names) in enumerate(panels):
        left, top = k % columns * w, k // columns * h
        lines = [np.where(np.isfinite(v := thin(table[n])), v, 0) for n in names]
        low, high = min(np.percentile(v, 1) for v in lines), max(np.percentile(v, 99) for v in lines)
        edge = .05 * (high - low)
        to = axes(draw, (left, top, left + w, top + h), (xs[0], xs[-1]), (low - edge, high + edge), title, x)
        legend(draw, left + 58, top + 31, names)
        for j, v in enumerate(lines):
            draw.line([to(a, b) for a, b in zip(xs, v.clip(low - edge, high + edge))], fill=COLOURS[j % 12], width=2)
    return save(page, path)


def bars(path, names, series, title=""):
    """Grouped bars: series {"real": [...], "generated": [...]}, one group a name. Saves a PNG."""
    w, h = max(520, min(1600, 44 * len(names) + 90)), 330
    page = Image.new("RGB", (w, h), "white")
    draw, top = ImageDraw.Draw(page), max(max(v) for v in series.values()) or 1
    to = axes(draw, (0, 0, w, h), (0, len(names)), (0, 1.1 * top), title)
    y0, y1 = to(0, 0)[1], h
    draw.rectangle((47, y0 + 1, w, y1), fill="white")                    # words instead of numbers below the axis
    legend(draw, 58, 31, list(series))
    skip = -(-len(names) // 36)                                          # 132 names would not fit
    for j, values in enumerate(series.values()):
        for i, v in enumerate(values):
            a, b = i + .12 + .76 * j / len(series), i + .12 + .76 * (j + 1) / len(series)
            draw.rectangle((to(a, 0)[0], to(0, v)[1], to(b, 0)[0], y0), fill=COLOURS[j])
    for i, name in enumerate(names):
        if i % skip == 0:
            draw.text((to(i + .5, 0)[0], y0 + (6 if i // skip % 2 == 0 or len(name) < 3 else 20)), name, fill="black",
                      font=font(12), anchor="mt")
    return save(page, path)


def scatter(path, xy, groups, group_names, labels=None, links=(), title="", colours=COLOURS):
    """Points (N, 2) coloured by group, with a legend; labels {index: text} where they find room; links [(i, j)] joined."""
    xy = np.asarray(xy, float)
    side, top = 900, 40 + 18 * -(-len(group_names) // 6)
    page = Image.new("RGB", (side, side + top), "white")
    draw = ImageDraw.Draw(page)
    draw.text((10, 6), title, fill="black", font=font(16))
    for k, name in enumerate(group_names):
        legend_x, legend_y = 12 + k % 6 * 145, 38 + 18 * (k // 6)
        draw.ellipse((legend_x, legend_y - 4, legend_x + 8, legend_y + 4), fill=colours[k % 12], outline="black")
        draw.text((legend_x + 13, legend_y), name, fill="black", font=font(12), anchor="lm")
    p = (xy - xy.min(0)) / np.maximum(np.ptp(xy, 0), 1e-12) * (side - 110) + [55, 45 + top]
    for i, j in links:
        draw.line((*p[i], *p[j]), fill="black", width=2)
    for (a, b), g in zip(p, groups):
        draw.ellipse((a - 4, b - 4, a + 4, b + 4), fill=colours[int(g) % 12], outline=(60, 60, 60))
    taken = []
    for i, text in (labels or {}).items():
        for dx, dy in [(7, -7), (7, 9), (-7, -7), (-7, 9), (12, -20), (-12, 22), (26, 0), (-26, 0), (12, 30), (-12, -32)]:
            box = draw.textbbox((p[i][0] + dx, p[i][1] + dy), text, font=font(12), anchor="lm" if dx > 0 else "rm")
            free = all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in taken)
            if free and box[0] > 2 and box[2] < side - 2:
                draw.rectangle(box, fill="white")
                draw.line((*p[i], p[i][0] + dx, p[i][1] + dy), fill=(120, 120, 120))
                draw.text((p[i][0] + dx, p[i][1] + dy), text, fill="black", font=font(12), anchor="lm" if dx > 0 else "rm")
                taken.append(box)
                break
    return save(page, path)


def gif(path, files, ms=150):
    """PNG files -> one looping GIF of at most 50 frames, the last one held."""
    files = [files[round(i)] for i in np.linspace(0, len(files) - 1, min(50, len(files)))]
    frames = [Image.open(f).convert("P", palette=Image.Palette.ADAPTIVE) for f in files]
    with atomic(path) as part:
        frames[0].save(part, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[ms] * (len(frames) - 1) + [1500])
    return path


# ---- running: flags, device, checkpoints, log ----------------------------------------------------------------------

def run_main(main):
    """Call main() as a command: an error of the user's is one line and exit code 2, Ctrl-C is exit code 130."""
    plain_signals()
    try:
        main()
    except UserError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except OSError as e:
        sys.exit(print(f"error: {e.filename or 'file'}: {e.strerror or e}; free space or name another folder",
                       file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)


def comments(Config):
    """Field -> the comment behind it, read from the class's own source: the one place where a flag is explained."""
    return dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(Config), re.M))


def arguments(Config, argv, presets=None, positional=None):
    """Command line -> (config, changes): flags generated from the fields of a flat dataclass, help from their comments.

    Args: presets, name -> dict of differing fields; when given, its name is the first argument (field `preset`);
    positional, the name of a tuple field that is given without a flag. A switch (default 0) may stand alone, as --json.
    Returns: the Config, and a dict of what the command line named itself. Errors: UserError, one line."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message}; `python {self.prog} --help` lists the flags")
    parser = Parser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("preset", choices=list(presets), metavar="PRESET", help=" ".join(presets))
    words = comments(Config)
    for f in dataclasses.fields(Config):
        word = f"{words.get(f.name, '')} (default {f.default!r})".replace("%", "%%")
        if f.name == positional:
            parser.add_argument(f.name, nargs="*", help=word)
        elif isinstance(f.default, tuple):
            parser.add_argument("--" + f.name.replace("_", "-"), nargs="+", default=argparse.SUPPRESS, help=word)
        elif f.name != "preset" or not presets:
            switch = dict(nargs="?", const=1) if f.default == 0 and type(f.default) is int else {}
            parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=argparse.SUPPRESS, help=word,
                                **switch)
    changes = vars(parser.parse_args(argv))
    base = (presets or {}).get(changes.get("preset"), {})
    return Config(**{**base, **changes}), {k: v for k, v in changes.items() if k != "preset"}


def keep_memory():
    """glibc: keep freed memory instead of handing it back, since each step's tensors would page it in anew (see make bench)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):       # other systems have another allocator
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25), libc.mallopt(-1, (1 << 31) - 1)      # M_MMAP_THRESHOLD 32 MB, M_TRIM_THRESHOLD 2 GB


def device(name="auto"):
    """torch.device by name; "auto" is cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        if torch.device(name).type == "cuda" and torch.device(name).index is not None:
            torch.cuda.set_device(name)
        keep_memory()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {name} is not there; use --device cpu") from None


def ranks():
    """(rank, world) under torchrun, whose processes meet here (gloo on CPUs, nccl on GPUs), else (0, 1). Rank 0 speaks."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.distributed.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return (torch.distributed.get_rank(), world) if world > 1 else (0, 1)


def first_rank(f):
    """f() on rank 0 and then, when its files are there, on the others."""
    if ranks()[0] > 0:
        torch.distributed.barrier()
    value = f()
    if ranks() != (0, 1) and ranks()[0] == 0:
        torch.distributed.barrier()
    return value


def over_ranks(f, x):
    """f(x), tensor (n, ...) -> tensor (n, ...) on the CPU, where each rank works on its own part of x; whole on every rank."""
    rank, world = ranks()
    parts = [None] * world
    if world == 1:
        return f(x)
    torch.distributed.all_gather_object(parts, f(x.tensor_split(world)[rank]))
    return torch.cat(parts)


def use_bf16(amp, device):
    """Whether to autocast to bfloat16: amp 1 yes, 0 no, -1 where the hardware multiplies it natively."""
    if amp >= 0:
        return bool(amp)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def plain_signals():
    """Ctrl-C and a polite kill (SIGTERM) raise KeyboardInterrupt where they come."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.default_int_handler)


def interrupts():
    """A list that Ctrl-C (or a polite kill) makes non-empty, so that a loop can stop between two steps; twice stops at once.

    plain_signals() ends this when the loop is over."""
    seen = []

    def note(*_):
        seen.append(1)
        plain_signals()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note), signal.signal(signal.SIGTERM, note)
    return seen


def versions():
    """What a result depends on besides the seed."""
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, pillow=PIL.__version__,
                machine=platform.machine(), threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "")


def fingerprint(images):
    """16 hex digits that identify a data set: sha256 of its shape and bytes."""
    return hashlib.sha256(repr(tuple(images.shape)).encode() + images.cpu().numpy().tobytes()).hexdigest()[:16]


def rng_state():
    """The random states a run depends on, those of the CPU and of the device in use, for its checkpoint."""
    state = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    elif torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state):
    """Put back what rng_state() returned; what belongs to a device that is not here is left out."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    elif "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


def save_checkpoint(path, state):
    """A dict of tensors and plain values -> file, atomically. (Into memory first: torch hides a full disk's error.)"""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote; weights_only, so that a file cannot run code. UserError when damaged."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}: train first, or name the run's folder with --out")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:                    # a damaged zip or pickle raises nearly anything
        raise UserError(f"{path} is no readable checkpoint ({type(e).__name__}); delete it and train again") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint of these scripts")
    return state


def restore(parts, path, cfg, free=(), device="cpu"):
    """A checkpoint into networks, optimisers and pools, in place; returns its step.

    Fields of cfg outside `free` must be those it was trained with: UserError, as for a damaged or another file."""
    state = load_checkpoint(path, device)
    try:
        for k, v in dataclasses.asdict(cfg).items():
            was = state["config"].get(k, v)
            if k not in free and was != v and not (k == "data" and v in was.split(",")):       # a list: one of these it was
                raise UserError(f"{path} was trained with --{k.replace('_', '-')} {was}, not {v}; give that flag, or another "
                                "--out, or --overwrite 1")
        if getattr(cfg, "decay", 0) and state["config"]["steps"] not in (cfg.steps, 0) and cfg.steps > state["step"] > state["config"]["steps"] / 2:
            print(f"note     up to step {state['step']} the learning rate fell as for --steps {state['config']['steps']}: not one run of {cfg.steps}")
        for k, part in parts.items():
            own = [{f: g[f] for f in ("lr", "capturable") if f in g} for g in getattr(part, "param_groups", [])]
            part.load_state_dict(state[k])
            for group, options in zip(getattr(part, "param_groups", []), own):
                group.update(options)                                    # the form this run needs them in
        set_rng_state(state["rng"])
        return state["step"]
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{path} is no checkpoint of this model ({str(e).splitlines()[0]}); name another --out") from None


def finite(*nets):
    """Whether every weight of the networks is a number."""
    return torch.stack([p.detach().sum() for net in nets for p in net.parameters()]).isfinite().all().item()


def command(out, trains):
    """The command line to repeat a run with: this one, or, when it only evaluates, the one that result.json has."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if not trains:
            return json.loads((Path(out) / "result.json").read_text())["command"]
    return "python " + " ".join(sys.argv)


OUTPUTS = ["[0-9]" * 6 + ".png", "classes*.png"] + (
    "conditions.png curves.png interpolation.png noise.png pairs.png prompt.png sweep.png sweep-curves.png sweep.md "
    "translations.png truncation.png tsne.png training.gif samples.npy labels.npy log.csv last.pt result.json").split()


def open_run(out, resume=0, overwrite=0):
    """Make the run's folder. A folder that holds a run is refused unless resume or overwrite (which clears it)."""
    out = Path(out)
    held = [f for pattern in OUTPUTS for f in out.glob(pattern)]
    if held and not (resume or overwrite):
        raise UserError(f"{out} holds a run already: --resume 1 goes on with it, --overwrite 1 replaces it, --out names another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic(out / ".writable") as part:
            part.touch()
        (out / ".writable").unlink()
    except OSError as e:
        raise UserError(f"cannot write to {out} ({e.strerror}); name another folder with --out") from None
    if overwrite and not resume:
        for f in held:
            f.unlink()
    return out


def clock(seconds):
    """75 -> 1:15."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Log:
    """log.csv and the progress line. Opened at step `start` it keeps the rows up to there, so a resumed run has one log."""

    def __init__(self, folder, total, start=0, writes=True):
        self.writes = writes                                             # False on all ranks but the first
        self.path, self.total, self.table, self.begun, self.before = Path(folder) / "log.csv", total, {}, start, 0.0
        if start and self.path.exists():
            with open(self.path, newline="") as f:
                rows = [r for r in csv.DictReader(f) if None not in r.values() and None not in r]
            for r in rows:
                if int(float(r["step"])) <= start:
                    for k, v in r.items():
                        self.table.setdefault(k, []).append(float(v))
            self.before = self.table.get("seconds", [0.0])[-1]
        if writes and (self.table or not start):
            text = "".join(",".join(f"{v:.6g}" for v in row) + "\n" for row in zip(*self.table.values()))
            write_text(self.path, ",".join(self.table) + "\n" + text if self.table else "")
        self.clock = time.monotonic()

    @property
    def seconds(self):
        """Seconds of training so far, those before a resume included."""
        return self.before + time.monotonic() - self.clock

    def write(self, step, rate, **numbers):
        """One row to log.csv and one aligned line to the screen; `rate` is images/s. Numbers are floats."""
        row = dict(step=step, **numbers, seconds=self.seconds)
        head = "" if self.table else ",".join(row) + "\n"
        for k, v in row.items():
            self.table.setdefault(k, []).append(float(v))
        if not self.writes:
            return
        with open(self.path, "a") as f:
            f.write(head + ",".join(f"{v:.6g}" for v in row.values()) + "\n")
        left = (time.monotonic() - self.clock) / max(step - self.begun, 1) * (self.total - step)
        print(f"step {step:>{len(str(self.total))}}/{self.total}  " + "  ".join(f"{k} {v:7.3f}" for k, v in numbers.items()) +
              f"  {rate:7.0f} img/s  {clock(left):>5} left", flush=True)


# ---- several runs on one sheet -------------------------------------------------------------------------------------

def compare(folders, out):
    """Last samples, curves and metrics of several runs: out.png, and out.md with one row a run. Returns the table."""
    runs = []
    for folder in map(Path, folders):
        try:
            record = json.loads((folder / "result.json").read_text())
            record["samples"] = sorted(folder.glob("[0-9]*.png"))[-1]
            runs.append((folder, record))
        except (OSError, ValueError, IndexError):
            raise UserError(f"{folder} is no finished run (no result.json or no samples); train it first") from None
    names = list(dict.fromkeys(k for _, r in runs for k, v in r["metrics"].items() if isinstance(v, (int, float))))
    show = lambda v: "" if v is None else f"{v:.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
    table = ["| run | parameters G / D | steps | seconds | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for folder, r in runs:
        table.append(f"| {folder.name} | {r['parameters']['G']:,} / {r['parameters']['D']:,} | {r['step']:,} | "
                     f"{r['seconds']:.0f} | " + " | ".join(show(r["metrics"].get(k)) for k in names) + " |")
    w, columns = 420, min(5, len(runs))
    page_rows, shown = -(-len(runs) // columns), [k for k in names if k not in ("n", "n_real", "floor_n", "classes", "kid")]
    block = 24 + w + 420 + 18 * len(shown) + 10
    page = Image.new("RGB", (w * columns, block * page_rows), "white")
    draw = ImageDraw.Draw(page)
    for i, (folder, r) in enumerate(runs):
        x, y = i % columns * w, i // columns * block
        draw.text((x + 8, y + 3), folder.name, fill="black", font=font(16))
        for file, top, high in ((r["samples"], 24, w - 10), (folder / "curves.png", 24 + w, 410)):
            if file.exists():
                im = Image.open(file).convert("RGB")
                im.thumbnail((w - 10, high))
                page.paste(im, (x + 5, y + top))
        for k, name in enumerate(shown):
            draw.text((x + 8, y + 24 + w + 416 + 18 * k), f"{name}  {show(r['metrics'].get(name))}", fill="black", font=font(13))
    save(page, f"{out}.png")
    write_text(f"{out}.md", "\n".join(table) + "\n")
    return "\n".join(table)


def figure(path, files, height=420, colours=160):
    """Pictures side by side at one height, with few enough colours for a README. Saves a PNG, or a GIF of one after another."""
    try:
        parts = [Image.open(f).convert("RGB") for f in files]
    except OSError as e:
        raise UserError(f"{e.filename} is missing: make its run first") from None
    height = min(height, max(p.height for p in parts))
    parts = [p.resize((round(p.width * height / p.height), height), Image.Resampling.LANCZOS) if p.height != height else p for p in parts]
    if str(path).endswith(".gif"):
        parts = [p.quantize(24) for p in parts]
        with atomic(path) as part:
            parts[0].save(part, format="GIF", save_all=True, append_images=parts[1:], loop=0, duration=[300] * (len(parts) - 1) + [2500])
        return path
    page = Image.new("RGB", (sum(p.width + 8 for p in parts) - 8, height), "white")
    for i, p in enumerate(parts):
        page.paste(p, (sum(q.width + 8 for q in parts[:i]), 0))
    return save(page.quantize(colours), path)


def results(folders, readme="README.md"):
    """The README's table between its two markers, from the result.json of finished runs; means over runs <name>-s<seed>.

    What a row shows is the comment of its target in the Makefile."""
    about = dict(re.findall(r"^([\w-]+):[^#\n]*## (?:\d+ min: )?([^(\n]*)", Path("Makefile").read_text(), re.M))
    groups = {}
    for folder in map(Path, folders):
        try:
            groups.setdefault(re.sub(r"-s\d+$", "", folder.name), []).append(json.loads((folder / "result.json").read_text()))
        except (OSError, ValueError):
            raise UserError(f"{folder} is no finished run (no result.json); train it first") from None
    lines = ["| run | what it shows | result | minutes | machine, seed |", "|---|---|---|---|---|"]
    for name, runs in groups.items():
        r, seeds = runs[0], ", ".join(str(r["config"]["seed"]) for r in runs)
        shows = about.get(name) or about.get(r.get("preset") or r["config"].get("model")) or name
        fids = [r["metrics"]["fid"] for r in runs if "fid" in r["metrics"]]
        spread = f" FID over {len(fids)} seeds: {np.mean(fids):.3g} +- {np.std(fids, ddof=1):.2g}." if len(fids) > 1 else ""
        v = r["versions"]
        where = {"cuda": v["gpu"], "cpu": f"{v['machine']} CPU, {v['threads']} thread(s)"}.get(r["device"].split(":")[0], r["device"])
        lines.append(f"| `{r['command']}` | {shows.strip()} | {r['headline']}.{spread} | "
                     f"{np.mean([r['seconds'] for r in runs]) / 60:.1f} | {where}, {seeds} |")
    bench = Path("out/bench/table.md")
    for marker, table in (("results", "\n".join(lines)), ("bench", bench.read_text().strip() if bench.exists() else None)):
        before, _, rest = Path(readme).read_text(encoding="utf-8").partition(f"<!-- {marker} -->\n")
        if table is not None and rest:
            write_text(readme, f"{before}<!-- {marker} -->\n{table}\n<!-- end -->" + rest.partition("<!-- end -->")[2])
        elif marker == "results":
            raise UserError(f"{readme} has no line <!-- results --> to put the table under")
    return "\n".join(lines)


def main():
    """The command line: show, compare, results, figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="do", required=True)
    p = sub.add_parser("show", help="a page of a data set")
    p.add_argument("name"), p.add_argument("out"), p.add_argument("--size", type=int, default=32)
    p = sub.add_parser("compare", help="several runs on one sheet")
    p.add_argument("runs", nargs="+"), p.add_argument("--out", default="out/compare")
    p = sub.add_parser("results", help="the README's table from finished runs")
    p.add_argument("runs", nargs="+")
    p = sub.add_parser("figure", help="pictures side by side, small enough for a README")
    p.add_argument("out"), p.add_argument("files", nargs="+"), p.add_argument("--height", type=int, default=420)
    p.add_argument("--colours", type=int, default=160)
    a = parser.parse_args()
    if a.do == "figure":
        print(f"wrote {figure(a.out, a.files, a.height, a.colours)}")
    elif a.do == "results":
        print(results(a.runs) + "\nwrote README.md")
    elif a.do == "show":
        images = choose(a.name, a.size)[1]
        save(grid(images[:: max(1, len(images) // 100)][:100], 10), a.out)
        print(f"wrote {a.out}")
    else:
        print(compare(a.runs, a.out) + f"\nwrote {a.out}.png and {a.out}.md")


if __name__ == "__main__":
    run_main(main)
