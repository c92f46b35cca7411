"""test_all.py: what the project promises, proven. `make test`, or python -m pytest test_all.py.

Each test compares our code with a closed form, a reference operation, or numbers that independent
code has computed ("golden"). Only the test on real data is skipped if there is none. The tests
test_mistake_1 to test_mistake_10 belong to the ten mistakes of the README: each shows the correct
result and what the mistake would give.
`python test_all.py bench` measures the speed instead.
"""
import ast
import contextlib
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from pytest import approx
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

import biggan_interp
import cyclegan
import data
import fid
import gan
from data import load
from gan import build

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"
CPU = torch.device("cpu")
parametrize = pytest.mark.parametrize
refused = partial(pytest.raises, data.UserError)
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals, links, shell")


# ---- helpers -------------------------------------------------------------------------------------

def recipe(shapes, seed):
    """{key: shape} -> {key: float32 array}: the weights that a network has for the reference
    numbers. They come from one NumPy stream, in the order of the sorted keys, so that a few numbers
    of the output pin down the whole network. weight_u, weight_v: the top singular vectors."""
    stream = np.random.RandomState(seed)
    state = {}
    for key, shape in sorted(shapes.items()):
        n = stream.standard_normal(shape)
        leaf = key.split(".")[-1]
        if "running_var" in leaf:
            n = .7 + .7 / (1 + np.exp(-n))
        elif "running_mean" in leaf:
            n = .3 * n
        elif leaf == "gamma":
            n = .7 + 0 * n
        elif leaf == "bias":
            n = .1 * n
        elif leaf == "weight" and len(shape) == 1:              # of batch norm
            n = 1 + .1 * n
        elif leaf in ("weight", "weight_orig") and "embeddings" not in key:
            n = n * (2 / np.prod(shape[1:])) ** .5              # He-normal
        state[key] = n.astype(np.float32)
    for key, W in list(state.items()):
        if key.endswith("weight_orig"):
            W = W.astype(float).reshape(len(W), -1)
            vector = key[:-4]
            u = state[vector + "u"]
            for _ in range(100):                                # power iteration
                v = W.T @ u
                v /= np.linalg.norm(v)
                u = W @ v
                u /= np.linalg.norm(u)
            state[vector + "u"] = u.astype(np.float32)
            state[vector + "v"] = v.astype(np.float32)
    return state


def dozen(x):
    """Twelve numbers of a tensor of any shape, evenly spread from its first to its last."""
    return x.flatten()[np.linspace(0, x.numel() - 1, 12).astype(int)]


def digest(shapes):
    """{key: shape} -> sha256 of all names and shapes, in the order of the sorted keys."""
    text = "\n".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    """One folder with small drawn sets and classifiers of few steps, so that no test waits."""
    folder = tmp_path_factory.mktemp("downloads")
    digits = data.draw_digits
    faces = data.draw_faces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DOWNLOADS", folder)
        patch.setattr(data, "draw_digits", lambda n, *rest: digits(n // 10, *rest))
        patch.setattr(data, "draw_faces", lambda style, n, *rest: faces(style, n // 10, *rest))
        for row in "digits 32 150, faces-a 32 60, faces-b 32 60, faces-a 64 2".split(", "):
            name, size, steps = row.split()
            patch.setattr(fid, "STEPS", int(steps))
            fid.classifier(name, int(size))
    return folder


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, downloads, monkeypatch):
    """Each test in a folder of its own, without DATA_DIR and the internet, from one seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DOWNLOADS", downloads)
    nowhere = "http://127.0.0.1:9"
    for name, value in dict(DATA_DIR="", DOWNLOADS=str(downloads), http_proxy=nowhere,
                            https_proxy=nowhere).items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)


def run(line, code=0):
    """Run a command such as "gan.py dcgan --h 4" in this process. Its exit code must be `code`, and
    with code 2 it must print exactly one line to stderr. Returns all its output."""
    script, *words = shlex.split(line)
    out = io.StringIO()
    err = io.StringIO()
    found = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data.run_main(partial(sys.modules[script[:-3]].main, words))
        except SystemExit as e:
            found = e.code
    said = err.getvalue()
    assert found == code and (code != 2 or re.fullmatch("error: .*\n", said)), said
    return out.getvalue() + said


def assert_same_bits(*paths):
    """Two checkpoints are equal to the bit."""
    a, b = map(data.load_checkpoint, paths)
    for state in a, b:
        del state["config"], state["log"]               # the log tells the time that it took
    assert_close(a, b, rtol=0, atol=0)


def images(n=40, channels=1, size=32):
    """Random pictures."""
    return torch.randint(256, (n, channels, size, size)).byte()


# ---- gan.py: networks ----------------------------------------------------------------------------

# A preset, its G and how many parameters it has, its D and how many parameters it has. Of a
# convolution: output channels, kernel, stride, padding.
LAYERS = """
dcgan
Flatten Unflatten ConvTranspose2d(64,4,1,0) BatchNorm2d ReLU ConvTranspose2d(32,4,2,1) BatchNorm2d
ReLU ConvTranspose2d(16,4,2,1) BatchNorm2d ReLU ConvTranspose2d(1,4,2,1) Tanh 57937
Conv2d(16,4,2,1) LeakyReLU(0.2) Conv2d(32,4,2,1) BatchNorm2d LeakyReLU(0.2) Conv2d(64,4,2,1)
BatchNorm2d LeakyReLU(0.2) Conv2d(1,4,1,0) Flatten 42432

emoji
Flatten Unflatten Conv2d(2048,1,1,0) BatchNorm2d ReLU Flatten Unflatten
Upsample(2) Conv2d(64,5,1,2) BatchNorm2d ReLU Upsample(2) Conv2d(32,5,1,2) BatchNorm2d ReLU
Upsample(2) Conv2d(3,5,1,2) Tanh 467488
Conv2d(64,5,2,2) BatchNorm2d ReLU Conv2d(128,5,2,2) BatchNorm2d ReLU Conv2d(256,5,2,2) BatchNorm2d
ReLU Conv2d(1,5,2,1) Flatten 1036096

anime
Flatten Unflatten ConvTranspose2d(512,4,1,0) BatchNorm2d LeakyReLU(0.2) ConvTranspose2d(256,4,2,1)
BatchNorm2d LeakyReLU(0.2) ConvTranspose2d(128,4,2,1) BatchNorm2d LeakyReLU(0.2)
ConvTranspose2d(64,4,2,1) BatchNorm2d LeakyReLU(0.2) ConvTranspose2d(3,4,2,1) Tanh 3576704
Conv2d(64,4,2,1) LeakyReLU(0.2) Conv2d(128,4,2,1) BatchNorm2d LeakyReLU(0.2) Conv2d(256,4,2,1)
BatchNorm2d LeakyReLU(0.2) Conv2d(512,4,2,1) BatchNorm2d LeakyReLU(0.2) Conv2d(1,4,1,0) Flatten
2765568

mnist28
Flatten Unflatten ConvTranspose2d(256,4,2,1) BatchNorm2d ReLU ConvTranspose2d(128,4,2,1)
BatchNorm2d ReLU ConvTranspose2d(64,4,2,1) BatchNorm2d ReLU ConvTranspose2d(32,4,2,1) BatchNorm2d
ReLU ConvTranspose2d(1,2,2,2) Tanh 1098816
Conv2d(32,2,2,2) LeakyReLU(0.02) Conv2d(64,4,2,1) BatchNorm2d LeakyReLU(0.02) Conv2d(128,4,2,1)
BatchNorm2d LeakyReLU(0.02) Conv2d(256,4,2,1) BatchNorm2d LeakyReLU(0.02) Conv2d(1,4,2,1) Flatten
693249

mlp
Flatten Linear(256) BatchNorm1d ReLU Linear(512) BatchNorm1d ReLU Linear(1024) BatchNorm1d ReLU
Linear(1024) Tanh Unflatten 1714432
Flatten Linear(512) LeakyReLU(0.2) Linear(256) LeakyReLU(0.2) Linear(128) LeakyReLU(0.2) Linear(1)
689153

ring
Flatten Linear(128) ReLU Linear(128) ReLU Linear(2) Tanh Unflatten 17154
Flatten Linear(128) LeakyReLU(0.2) Linear(1) 513
"""
SIZES = "out_channels out_features kernel_size stride padding scale_factor negative_slope".split()


def notation(layer):
    """A layer as the table above writes it. Of the kernel (4, 4) it writes one number."""
    sizes = [f"{np.ravel(vars(layer)[name])[0]:g}" for name in SIZES if name in vars(layer)]
    return f"{type(layer).__name__}({','.join(sizes)})".replace("()", "")


def count(net):
    return sum(p.numel() for p in net.parameters())


@parametrize("paragraph", LAYERS.split("\n\n"))
def test_networks_have_the_courses_layers(paragraph):
    """The table above; the numbers of parameters also tell which layers have a bias."""
    preset, *wanted = paragraph.split()
    found = []
    for net in build(preset):
        found += [*map(notation, net), str(count(net))]
    assert found == wanted


@parametrize("preset", gan.PRESETS)
def test_presets_make_pictures_and_logits(preset):
    """As the course has it and as one would do it today; then D has no batch norm. G takes noise
    of both shapes, (N, z) and the handouts' (N, z, 1, 1)."""
    for modern in (0, 1):
        cfg = gan.config(preset, modern)
        G, D = gan.networks(cfg)
        c = torch.zeros(2, sum(cfg.heads))
        side = gan.NETS[cfg.net][1]
        z = torch.randn(2, cfg.z)
        x = gan.play_G(G, z, c)
        assert x.shape == (2, cfg.channels, side, side)
        assert torch.equal(G.eval()(torch.cat([z, c], 1)[..., None, None]), gan.play_G(G, z, c))
        assert gan.play_D(D, cfg, x, c).shape == (2, 1 + c.shape[1] * (cfg.cond == "ac"))
    assert "BatchNorm" not in str(D)


def test_settings_change_the_networks():
    """Width, initial weights, activations, batch norm, spectral norm, raw pictures, noise."""
    G, _ = build("dcgan", h=100)
    assert .019 < G[5].weight.std() < .021 and G[6].weight.mean() > .9
    G, D = build("anime", h=4, act="selu", bn="D")
    assert [str(G).count(word) for word in ("SELU", "BatchNorm")] == [4, 0]
    for sn, layers in ("D", 4), ("both", 8):
        assert str(build("dcgan", sn=sn)).count("SpectralWeight") == layers
    G, D = build("dcgan", raw=1)
    x = G(torch.randn(4, 16))
    assert_close(D[0](x), (x + 1) * 127.5, atol=1e-3, rtol=0)     # D sees 0 .. 255
    assert "Tanh" not in str(G)
    for noise, low in ("uniform", -1), ("uniform01", 0):
        z = gan.draw_z(5000, gan.config("dcgan", noise=noise), CPU)
        assert low <= z.min() < low + .01 and .99 < z.max() < 1


# ---- gan.py: losses and penalties ----------------------------------------------------------------

def at_rest(*nets):
    """Optimisers that change nothing."""
    return [torch.optim.SGD(net.parameters(), 0.) for net in nets]


def bce(logits, target):
    """Binary cross entropy of probabilities, as tutorials have it."""
    return F.binary_cross_entropy(logits.sigmoid(), torch.full_like(logits, target))


EQUATIONS = {}      # the loss -> what D minimises and what G minimises, as functions of D's logits
for line in """
gan | bce(real, 1) + bce(fake, 0) | bce(fake, 1)
saturating | bce(real, 1) + bce(fake, 0) | -bce(fake, 0)
lsgan | ((real - 1) ** 2).mean() / 2 + (fake ** 2).mean() / 2 | ((fake - 1) ** 2).mean()
wgan | fake.mean() - real.mean() | -fake.mean()
wgan-gp | fake.mean() - real.mean() | -fake.mean()
r3gan | bce(real - fake, 1) | bce(fake - real, 1)""".split("\n")[1:]:
    name, *sides = line.split(" | ")
    EQUATIONS[name] = [eval("lambda real, fake: " + side) for side in sides]


def losses(real, fake):
    """The losses of D and G in each training step of gan.py if D returns these logits. G and D are
    both the identity, and the pictures and the noise of the batch are the logits themselves."""
    G, D = nets = [nn.PReLU(init=1.) for _ in range(2)]
    found = []
    for name in EQUATIONS:
        for shape in (-1,), (-1, 1):                            # D may answer (N,) or (N, 1)
            more = dict(clip=1.) if name == "wgan" else {}
            last = gan.LOSSES[name][0](G, lambda x: D(x).view(shape), *at_rest(*nets),
                                       lambda: (real[:, None], fake[:, None]), **more)
            found += [last["D"].detach(), last["G"].detach()]
    return found


def test_losses_are_their_equations():
    real, fake = torch.randn(2, 64)
    wanted = [f(real, fake) for both in EQUATIONS.values() for f in 2 * both]
    assert_close(losses(real, fake), wanted)


def test_mistake_1_sigmoid_before_a_loss_on_logits():
    """At D = 1/2 the loss is 2 ln 2 and falls to 0; with a sigmoid before it, it cannot."""
    zero = torch.zeros(4)
    sure = torch.full((4,), 20.)
    assert abs(losses(zero, zero)[0] - 2 * math.log(2)) < 1e-6 and losses(sure, -sure)[0] < 1e-6
    assert losses(sure.sigmoid(), (-sure).sigmoid())[0] > 1


def test_mistake_2_a_sum_where_the_equation_has_a_mean():
    """Twice the batch, the same loss: else the learning rate would depend on the batch."""
    real, fake = torch.randn(2, 8)
    assert_close(losses(real.repeat(2), fake.repeat(2)), losses(real, fake))


def test_mistake_3_eps_and_eps_do_not_interpolate():
    """x_hat = eps x + (1 - eps) x_fake, one eps per sample. The slope of |x|^2 / 2 is |x|: between
    lengths 1 and 2 the penalty is E (1 - eps)^2 = 1/3. With alpha and alpha, as some solutions have
    it, x_hat is anywhere between lengths 0 and 3, and its mean length is 3/2."""
    x = torch.full((100_000, 4), .5)
    half_square = lambda x: (x ** 2).sum(1) / 2
    assert abs(gan.gradient_penalty(half_square, x, 2 * x) - 1 / 3) < .01
    assert abs(gan.mean_norm_penalty(half_square, x, 2 * x) - 1.5) < .01


@parametrize("shape", [(5, 12), (5, 3, 2, 2)])
def test_mistake_4_the_norm_instead_of_its_distance_to_1(shape):
    """A linear critic's penalty is (|w| - 1)^2, 0 at slope 1; the norm would pull D flat. R1 is
    |w|^2 / 2. --penalty chooses one."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    x, x_fake = torch.randn(2, *shape)
    norm = D[1].weight.norm()
    for name, wanted in ("gp", (norm - 1) ** 2), ("r1", norm ** 2 / 2), ("mean-norm", norm):
        chosen = gan.step_settings(gan.config("emoji", penalty=name), 1)["penalty"]
        assert_close(chosen(D, x, x_fake), wanted)


@parametrize("layer, dim", [(nn.Conv2d(3, 8, 4), 0), (nn.ConvTranspose2d(8, 3, 4), 1)])
def test_spectral_norm_is_the_largest_singular_value(layer, dim):
    """W / sigma(W) has the largest singular value 1; evaluation iterates no further. BigGAN's."""
    assert gan.spectral_norm(layer) is layer
    big = biggan_interp.Spectral(16, 8, 3, 3)
    nn.init.normal_(big.weight_orig)
    with torch.autocast("cpu"):                     # bfloat16, but not here
        for _ in range(300):
            weights = layer.weight.transpose(0, dim), big.weight()  # a pass: a power iteration
    for w in weights:
        assert abs(torch.linalg.svdvals(w.flatten(1))[0] - 1) < 1e-5
    nn.init.normal_(layer.eval().parametrizations.weight.original)
    assert torch.equal(layer.weight, layer.weight)


def test_conditions_and_the_auxiliary_classifier():
    """One-hot vectors are concatenated. ac_loss is ln 12 + ln 11 if D's class logits are uniform,
    and 0 if D is certain and right. D learns the classes from real pictures only, G from fakes."""
    heads = 12, 11
    c = gan.condition(torch.tensor([37, 131]), heads)       # hair 3, eyes 4; hair 11, eyes 10
    assert c.nonzero().tolist() == [[0, 3], [0, 16], [1, 11], [1, 22]]
    assert torch.equal(gan.condition(torch.tensor([1, 0]), 2), torch.eye(2).flip(0))
    assert abs(gan.ac_loss(0 * c, c, heads) - math.log(132)) < 1e-5
    assert gan.ac_loss(99 * c, c, heads) == 0 == gan.ac_loss(99 * c[:, :12], c[:, :12], 12)
    x = gan.planes(torch.zeros(2, 3, 4, 4), c)
    assert torch.equal(x[..., 0, 3], F.pad(c, (3, 0)))      # three channels, then c
    G, D = nets = nn.PReLU(), nn.Linear(1, 24)
    for step in gan.step_acgan, gan.step_r3gan:
        with mock.patch.object(gan, "ac_loss", side_effect=gan.ac_loss) as used:
            last = step(lambda z, c: G(z), lambda x, *c: D(x), *at_rest(*nets),
                        lambda: (torch.ones(2, 1), -torch.ones(2, 1), c), heads=heads)
        assert_close([call.args[0] for call in used.mock_calls],
                     [D(last[x])[:, 1:] for x in ("x", "x_fake")])


def test_diff_augment():
    """Every picture has its own colours and its own shift of up to an eighth."""
    y = gan.diff_augment(torch.tensor([.5, 0, -.5]).view(1, 3, 1, 1).repeat(512, 1, 32, 32))
    red, green, blue = y[:, :, 16, 16].T
    strength = red - blue                           # saturation, 0 to 2, times contrast
    assert green.abs().max() <= .5 and green.std() > .25
    assert .9 < strength.mean() < 1.1 and 2 < strength.max() <= 3
    seen = y[:, 1] != 0                             # what was shifted in is 0
    assert {*seen.any(1).sum(1).tolist()} == {*seen.any(2).sum(1).tolist()} == {*range(28, 33)}


# ---- gan.py: the training steps ------------------------------------------------------------------

def small(preset="dcgan", modern=0, **changes):
    """The config of a run of seconds."""
    cfg = dict(h=4, z=8, batch=8, steps=2, amp=0, ema=0., log_every=1, sample_every=1)
    return gan.config(preset, modern, **cfg | changes)


def seeded(cfg, steps):
    """Yield the states of a textbook loop (a Python generator), which gets the seeds of train."""
    for step in range(cfg.steps + 1):
        if step:
            torch.manual_seed(cfg.seed * 1_000_003 + step)
        yield next(steps)


def some(x, n):
    """n random pictures of uint8 x, in [-1, 1]."""
    return x[torch.randint(len(x), (n,))] / 127.5 - 1


GAN_TRAINING_LOOP = """
def gan_training_loop(G, D, loss_of_D, loss_of_G, draw, opts):
    g_optimizer = torch.optim.Adam(G.parameters(), opts.lr, [opts.beta1, opts.beta2])
    d_optimizer = torch.optim.Adam(D.parameters(), opts.lr, [opts.beta1, opts.beta2])
    if opts.d_opt == "rmsprop":
        d_optimizer = torch.optim.RMSprop(D.parameters(), opts.lr)
    iteration = 1
    yield
    while True:

        # ---- train the discriminator ----
        for _ in range(opts.d_steps):
            d_optimizer.zero_grad()
            real_images = draw()
            noise = torch.randn(opts.batch, opts.z, 1, 1)
            fake_images = G(noise)
            d_loss = loss_of_D(D(real_images).squeeze(), D(fake_images.detach()).squeeze())
            if opts.gp:
                d_loss += opts.gp * gradient_penalty(D, real_images, fake_images)
            if opts.r1 and iteration % 2 == 0:
                d_loss += 2 * opts.r1 * r1_penalty(D, real_images)
                d_loss += 2 * opts.r2 * r1_penalty(D, fake_images)
            d_loss.backward()
            d_optimizer.step()
            if opts.clip:
                clip_weights(D.parameters(), opts.clip)

        # ---- train the generator ----
        g_optimizer.zero_grad()
        if opts.loss == "lsgan":                    # the handout draws new noise for G
            draw()
            noise = torch.randn(opts.batch, opts.z, 1, 1)
            fake_images = G(noise)
        d_fake = D(fake_images).squeeze()
        d_real = None
        if opts.loss == "r3gan":
            d_real = D(real_images).squeeze()
        g_loss = loss_of_G(d_real, d_fake)
        g_loss.backward()
        g_optimizer.step()
        g_loss.item()
        iteration += 1
        yield
"""


def textbook_gan(cfg, draw):
    """The loop of CSC413's handout, with noise (N, z, 1, 1) and D's answer squeezed, filled in with
    binary cross entropy of a sigmoid and our penalties. draw() gives real pictures. Yields (G, D)
    before the first step and after each."""
    torch.manual_seed(cfg.seed)
    G, D = gan.networks(cfg)
    loop = paste(GAN_TRAINING_LOOP, gan)["gan_training_loop"]
    for _ in loop(G, D, *EQUATIONS[cfg.loss], draw, cfg):
        yield G, D


@parametrize("changes", [
    {}, dict(r1=9., penalty_every=2), dict(loss="lsgan", gp=9., sn="D"),
    dict(loss="wgan", g_opt="adam"),
    dict(loss="wgan-gp"), dict(modern=1, penalty_every=2, r2=9., init="default")])
def test_mistake_5_no_detach_and_the_order_of_the_updates(changes, tmp_path):
    """Two steps of each loss equal a reference: D's update leaves G alone, and G is then scored, on
    the same fakes, by the updated D."""
    cfg = small(**changes)
    x_all = images()
    *nets, log = gan.train(cfg, x_all, torch.zeros(40).long(), tmp_path, CPU)
    assert log.rows[0]["D"] < 2                             # without the penalty
    *_, by_hand = seeded(cfg, textbook_gan(cfg, lambda: some(x_all, cfg.batch)))
    inputs = torch.randn(8, cfg.z), torch.randn(8, 1, 32, 32)
    for net, reference, at in zip(nets, by_hand, inputs):
        assert_close(net(at), reference(at), rtol=0, atol=1e-5)


def test_bfloat16_scores_by_the_updated_D():
    """Autocast keeps bfloat16 copies of the weights. They are old once an optimiser has moved."""
    G, D = nets = build("mlp", h=4)
    opt_G, opt_D = [torch.optim.SGD(net.parameters(), 1.) for net in nets]
    batch = torch.randn(8, 1, 32, 32), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        last = gan.step_gan(G, D, opt_G, opt_D, lambda: batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(last["after"], D(last["x_fake"]))
    assert inspect.getsource(gan.descend) == inspect.getsource(cyclegan.descend)


SETTINGS = """
cwgan --loss wgan --d-steps 3: clip=0.01 gp=0.0 d_opt=rmsprop d_steps=3 lr=5e-05 cond=planes
wgan: lr=0.0002 g_opt=adam
wgan --loss gan: d_opt=adam clip=0.0
anime --modern 1 --lr 1e-3: loss=r3gan r1=0.3 r2=0.3 lr=0.001 beta1=0.0
anime --modern 1 --loss gan: loss=gan r2=0.3 lr=0.0005
ring --loss wgan-gp: gp=0.1 lr=0.001 beta1=0.5 d_opt=adam
ring --loss wgan: lr=0.001 beta1=0.5 d_opt=adam clip=0.01
ring --loss lsgan: gp=0.0 lr=0.001 beta1=0.5
ring --modern 1: r1=0.3 penalty_every=1 lr=0.001 beta1=0.5 init=default"""


@parametrize("line", SETTINGS.split("\n")[1:])
def test_settings_of_the_loss_the_preset_and_the_user(line):
    """A loss brings its own settings and none of another loss; flags that are typed win. On the
    ring all losses have the same Adam."""
    words, wanted = line.split(": ")
    presets = dict.fromkeys(gan.PRESETS, gan.GANConfig)
    preset, changes = data.arguments(gan.GANConfig, words.split(), presets)
    cfg = vars(gan.config(preset, **changes))
    assert wanted == " ".join(f"{name}={cfg[name]}" for name in re.findall(r"(\w+)=", wanted))


def test_mistake_6_samples_in_training_mode():
    """In eval mode a picture depends on its own z alone; G is left as it was."""
    G, _ = build("dcgan")
    z = torch.randn(8, 16)
    c = torch.zeros(8, 0)
    assert torch.equal(gan.sample(G, z[:1], c[:1]), gan.sample(G, z, c)[:1]) and G.training
    assert not torch.allclose(G(z)[:1], G(z[:2])[:1])


@parametrize("preset", ["dcgan", "emoji", "text2img", "cwgan", "ring"])
@parametrize("line", "gan 3,saturating 3,lsgan 3,wgan 11,wgan-gp 16,acgan 3,r3gan 4".split(","))
def test_mistake_7_real_and_fake_in_one_batch(line, preset, tmp_path, monkeypatch):
    """Batch norm of D in one pass over both would mix their statistics: D has a pass of its own for
    real pictures, for fakes, and for G's update. Every loss trains on every network; only class
    logits that nobody reads are refused."""
    loss, passes = line.split()
    seen = []
    play_D = gan.play_D
    monkeypatch.setattr(gan, "play_D", lambda *a: seen.append(len(a[2])) or play_D(*a))
    cfg = small(preset, loss=loss, steps=1, penalty_every=9)
    if preset == "text2img" and loss not in ("acgan", "r3gan"):
        with refused(match="--cond planes"):
            gan.check(cfg, {})
        cfg.cond = "planes"
    gan.check(cfg, {})
    cfg.heads = cfg.heads or (10,) * (loss == "acgan")
    x = images(40, cfg.channels, gan.NETS[cfg.net][1])
    gan.train(cfg, x, torch.arange(40) % 10, tmp_path, CPU)
    assert seen == int(passes) * [cfg.batch]


def test_average_and_refresh(tmp_path):
    """theta_ema = decay theta_ema + (1 - decay) theta, with a decay of 1 / 11 in the first step;
    batch norm statistics from its weights."""
    cfg = small(ema=.9, steps=1)
    torch.manual_seed(cfg.seed)
    first, _ = gan.networks(cfg)
    G_ema, *_ = gan.train(cfg, images(), torch.zeros(40).long(), tmp_path, CPU)
    last = data.load_checkpoint("last.pt")["G"]
    assert_close(G_ema[2].weight, first[2].weight / 11 + last["2.weight"] * 10 / 11)
    h = G_ema[:3](torch.randn(10_000, 8))           # what the first batch norm sees, (N, 16, 4, 4)
    assert_close(G_ema[3].running_var, h.var((0, 2, 3)), atol=0, rtol=.05)


CONDITIONAL_LAB = """
def train_step(G, D, real_images, labels):
    criterion = nn.BCEWithLogitsLoss()
    one_hot = condition(labels, 10)
    noise = torch.cat([torch.randn(len(labels), 100, 1, 1), one_hot[..., None, None]], 1)
    fake_images = G(noise)
    real = D(planes(real_images, one_hot)).view(-1)
    fake = D(planes(fake_images.detach(), one_hot)).view(-1)
    loss = criterion(real, torch.ones(len(labels))) + criterion(fake, torch.zeros(len(labels)))
    loss.backward()
    return loss.item()
"""


def test_networks_fit_the_conditional_lab():
    """CS763's, with BCEWithLogitsLoss where it, like the Tsinghua train_step, has BCELoss. (The
    loop of CSC413 is GAN_TRAINING_LOOP.)"""
    G, _ = build("mnist28", z=110, h=4)
    _, D = build("mnist28", channels=11, h=4)
    step = paste(CONDITIONAL_LAB, gan)["train_step"]
    loss = step(G, D, torch.randn(8, 1, 28, 28), torch.arange(8))
    assert loss == approx(1.39, abs=.3)          # 2 ln 2 = 1.386


def test_ring_counts_modes_and_good_points():
    """A mode needs a fifth of its share; a point is good within 4 standard deviations, 0.08."""
    x = data.RING.repeat(100, 1)
    assert gan.found(x) == (8, 1)
    x[7::8] = x[0]                                  # the eighth centre is lost
    x[1] += torch.tensor([.079, 0])
    x[2] += torch.tensor([0, .081])
    modes, good = gan.found(x[..., None, None])
    assert modes == 7 and good == approx(799 / 800)
    x[6::8][19:] = 0                                # 19 of 100 points: less than a fifth
    assert gan.found(x)[0] == 6
    _, D = build("ring")
    points = data.to_uint8(data.RING)[1:2, :, None, None]           # above, at the right
    page = gan.ring_page(gan.config("ring"), D, points, points, 1)
    assert page.getpixel((153, 47)) == (215, 30, 30)


def test_between_prompts_and_ends():
    """between() gives z1 at t = 0 and z2 at t = 1. Prompts are parsed. Saturation and spread have
    known values. A collapsed or dead run is recognised."""
    z1, z2 = torch.randn(2, 16)
    assert_close([gan.between(z1, z2, t) for t in (0, 1)], [z1, z2])
    assert gan.parse_prompt("Blue hair, grey eyes") == 11 * data.HAIR.index("blue")
    x = torch.tensor([[1., -1, -1], [0, 0, 0]])                         # a red pixel, a grey one
    assert gan.saturation(x) == .5 and gan.spread(x) == approx(.5 ** .5)
    rows = [dict(step=step, spread=v) for step, v in enumerate([1, .1, .5, .2, .1, .1])]
    assert [gan.since(rows[:n], gan.is_collapsed) for n in (5, 6)] == [-1, 3]
    assert gan.is_dead({"|dD|": 1e-4, "|dG|": 1e-4}) > gan.is_dead({"|dD|": 1e-4, "|dG|": 1})


# ---- gan.py: runs --------------------------------------------------------------------------------

def test_compare_and_a_run_that_blows_up():
    """One line, exit 2, the last good checkpoint stays; beside a sound run: a table, a strip of
    each one's samples, their curves over each other. A result with a BOM is read, and those that
    somebody damaged are left out."""
    line = "gan.py mlp --data digits --h 4 --log-every 1 --samples 200 --out "
    run(line + "sound --steps 2")
    assert "lower learning rate" in run(line + "wild --loss lsgan --lr 30", code=2)
    assert data.load_checkpoint("wild/last.pt")["step"] == 1
    text = Path("sound/result.json").read_text()
    shutil.copytree("sound", "more/sound")              # the same last name, another run
    data.write_text("more/sound/result.json", "\ufeff" + text)
    for i, words in enumerate(["{", "[" * 99999, text.replace('"step": [', '"step": [0,')]):
        data.write_text(f"{i}/result.json", words)
    done = run("data.py compare sound wild more/sound 0 1 2 --out both")
    assert "| more/sound | 2 |" in done and "| blew up at |\n" in done
    assert Path("both.md").read_text() in done and done.count("left out: ") == 3
    assert Image.open("both.png").height == 3 * 72 + 4


@posix
@parametrize("case", """\
gan.py dcgan --data digits --samples 200 --loss wgan --decay 1 --d-lr .9 -> .2
gan.py text2img --data faces-a --samples 200 --h 4 --amp 1 --sn D -> .0002
gan.py emoji --data faces-a --samples 200 --h 4 --modern 1 --d-h 4 --ema .9 -> .0005
cyclegan.py --data faces --pool 6 -> .0003""".split("\n"))
def test_stopped_and_resumed_is_uninterrupted_to_the_bit(case, monkeypatch):
    """Ctrl-C in step 6 of 9, then SIGKILL at a random moment, each time the same command again: the
    bits, the log and the last rate of D of the undisturbed run."""
    for script in gan, cyclegan:
        monkeypatch.setattr(script, "evaluate", lambda *_: None)
    line, rate = case.split(" -> ")
    line += " --batch 4 --device cpu --log-every 1 --sample-every 3 --steps 9 --out "
    run(line + "whole")
    with mock.patch.object(data, "save", side_effect=[0, 0, KeyboardInterrupt]):
        run(line + "parts", code=130)
    command = f"exec '{sys.executable}' '{ROOT}'/{line} parts"
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
    while b"resumed" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(random.random() / 2)
    process.kill()
    run(line + "parts")
    assert_same_bits("whole/last.pt", "parts/last.pt")
    state = data.load_checkpoint("parts/last.pt")
    assert [row["step"] for row in state["log"]["rows"]] == [*range(1, 10)]
    assert state["opt_D"]["param_groups"][0]["lr"] == approx(float(rate))


@posix
def test_two_ranks_equal_one():
    """Gradients are averaged and a batch is shared: two processes train what one does."""
    line = "gan.py mlp --data digits --bn none --amp 0 --device cpu --steps 5 --samples 200 --out "
    run(line + "one")
    both = f"'{sys.executable}' -m torch.distributed.run --nproc-per-node 2 '{ROOT}'/{line} two"
    subprocess.run(both, shell=True, check=True, capture_output=True)
    one, two = map(data.load_checkpoint, ["one/last.pt", "two/last.pt"])
    assert_close((one["G"], one["D"]), (two["G"], two["D"]), rtol=0, atol=1e-5)


@parametrize("changes", ["", "--modern 1"])
def test_ring_runs(changes):
    """Its pictures show D's output, its GIF moves, its last line counts. Two runs on one sheet."""
    line = f"gan.py ring --steps 3 --sample-every 1 --samples 200 {changes} --out "
    done = run(line + "a") + run(line + "b --seed 1")
    assert len(re.findall(r"\n\d of 8 modes, \d+% good\n", done)) == 2
    run("data.py tile a b --out both")
    assert Image.open("both.png").size == (4 * 204, 204) and Image.open("both.gif").n_frames > 1


def test_learns_the_ring():
    """With R1 the same networks that collapse without it find all eight modes."""
    run("gan.py ring --loss gan --r1 1 --steps 800 --log-every 100 --samples 2000 --out run")
    assert data.read_run("run")[0]["modes"] == 8


def test_learns_digits():
    """400 steps: the FID, about 98 of an untrained generator, falls below 33; most digits occur."""
    run("gan.py speedrun --data digits --samples 1000 --steps 400 --out run")
    found = data.read_run("run")[0]
    assert found["fid"] < 33 and found["modes"] >= 6, found


def test_a_run_writes_what_it_promises():
    """Pictures, dump with labels; a finished run re-evaluates; a prompt draws one picture; fid.py
    measures it, its last line one JSON object."""
    line = "gan.py text2img --data faces-a --h 4 --steps 2 --batch 4 --samples 200 --out run "
    assert ("wrote    run: conditions.png curves.png interpolation.png labels.npy last.pt log.csv "
            "neighbours.png result.json samples.npy training.gif\nFID") in run(line + "--dump 150")
    assert np.load("run/samples.npy").shape == (150, 64, 64, 3)
    ends = np.asarray(Image.open("run/interpolation.png")) == (255, 0, 0)
    assert ends.all(2).any()                        # beyond them pictures are framed red
    assert "wrote run/prompt.png" in run(line + "--prompt 'red hair blue eyes'")
    assert run(line + "--draw 12").endswith("00001.png ... 00012.png, and all on run/drawn.png\n")
    assert len(os.listdir("run/drawn")) == 12
    assert "step " not in run(line)
    r = json.loads(run("fid.py run --json 1 --n 120").splitlines()[-1])
    assert r["n"] == r["floor_n"] == sum(r["counts"]) == 120


def test_a_run_owns_what_it_wrote_and_nothing_else():
    """What others put beside a run stays, also with --resume 0; log.csv is not read."""
    line = "gan.py mlp --data digits --h 4 --samples 200 --out run --steps "
    assert "samples  run/000001.png ... 000003.png\n" in run(line + "3")
    for name in ["000777.png", "notes.txt", "log.csv"]:
        Path("run", name).write_text("other")
    assert "resumed" in run(line + "3")
    run(line + "2 --resume 0")
    assert Path("run/000777.png").read_text() == Path("run/notes.txt").read_text() == "other"
    assert Path("run/000002.png").exists() and not Path("run/000003.png").exists()


@posix
@parametrize("case", r"""RANK=1 {}gan.py mlp --steps 0 -> error: nothing is trained
RANK=0 WORLD_SIZE=2 TORCHELASTIC_RUN_ID=1 {}cyclegan.py -> error: only gan.py can run under
DOWNLOADS=.file {}gan.py mlp -> error: .file: File exists
PYTHONIOENCODING=ascii {}gan.py mlp --out アニメ --steps 0 -> run      \u30a2\u30cb\u30e1
{}gan.py mlp --help | head -1 -> usage: gan.py
{}gan.py dcgan --help ->   --lr LR               learning rate (default 0.002)
ulimit -f 100; {}gan.py dcgan --data digits --out . -> error: file: File too large""".split("\n"))
def test_environment(case):
    """The help of a preset shows its own values. RANK alone, as on clusters, starts no second
    process; torchrun is for gan.py; a folder that cannot be written is noticed at once; a name that
    the console cannot show and a closed pipe are no errors; a full disk leaves no half file."""
    line, says = case.split(" -> ")
    Path(".file").touch()
    line = line.format(f"'{sys.executable}' '{ROOT}'/")
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert f"\n{says}" in "\n" + done.stdout + done.stderr and "Traceback" not in done.stderr
    assert not Path("last.pt").exists()


def test_the_line_of_a_step_has_100_columns(capsys):
    """Whatever the numbers; a fifth one no longer fits."""
    names = ["D", "G", "cycle a", "D(G(z)) before", "more"]
    log = data.Log(Path(), 10 ** 7)
    log.write(10 ** 7, 10 ** 9, **dict.fromkeys(names, torch.tensor(-1.2345e20)))
    said = capsys.readouterr().out
    assert len(said) <= 101 and said.count("-1.23e+20") == 4 and "  D(G(z)) -1" in said


@parametrize("case", """gan.py gcdan -> invalid choice: 'gcdan'
gan.py dcgan --lr nan -> --lr nan must be positive
gan.py dcgan --batch 1 -> --batch 1 must be
gan.py mlp --data digits --batch 9999999999999999 -> memory: give a smaller --batch
gan.py dcgan --steps 0 -> needs out/dcgan/last.pt
gan.py dcgan --out one --resume 0 -> no finished run of this program
gan.py dcgan --out foreign --resume 0 -> another program; name another
gan.py dcgan --out evil -> not a readable checkpoint
gan.py dcgan --seed 9999999999999999999999 -> not between -9e12 and 9e12
gan.py text2img --prompt 'mauve hair red eyes' -> orange white aqua
gan.py dcgan --data nowhere -> no data set, folder or picture nowhere
gan.py dcgan --device cuda:9 -> use --device cpu
gan.py dcgan --data digits --out wide -> with h 8, not 16
gan.py dcgan --data digits --out wide --h 8 --steps 9 -> fallen as for --steps 5000
cyclegan.py --a x -> --b
cyclegan.py --model unit --identity 1 -> UNIT has
cyclegan.py --translate x.png --out wide -> no checkpoint of
biggan_interp.py --model published -> --model small
gan.py dcgan --out wide --h 8 --resume 0 --draw 9 -> would delete the run in wide: omit it
fid.py digits wide -> --dump""".split("\n"))
def test_bad_input_is_one_line(case):
    """error: ... on stderr, exit code 2, and nothing half-written."""
    line, says = case.split(" -> ")
    data.save_state("evil/last.pt", Evil())
    cfg = gan.config("dcgan", data="digits", h=8, augment=0)
    data.save_checkpoint("wide/last.pt", dict(log=data.Log(Path(), 1)), 1, cfg)
    data.save(Image.new("RGB", (40, 40)), "one/000001.png")
    data.save_state("foreign/last.pt", dict(model=0, log=3))
    assert says in run(line, code=2) and not Path("pwned").exists()
    assert not {path.suffix for path in Path().rglob("*")} & {".part", ".json"}
    assert Path("one/000001.png").exists() and Path("wide/last.pt").exists()


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


# ---- data.py: files and downloads ----------------------------------------------------------------

@parametrize("pattern", ["mnist/{}", "mnist/{}.gz", "MNIST/raw/{}"])
def test_mnist_in_its_layouts(pattern, monkeypatch):
    """Unpacked, packed again, in torchvision's folder: known by its content. Another set of the
    same name is neither read nor called damaged."""
    pack = gzip.compress if ".gz" in pattern else bytes
    for name in "t10k-images-idx3", "t10k-labels-idx1":
        path = Path(pattern.format(f"{name}-ubyte"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(bytes(800)))          # a header of 16 bytes, or of 8
        monkeypatch.setitem(data.HASHES, f"mnist/{name}", data.sha256_of(path))
    monkeypatch.setenv("DATA_DIR", ".")
    x, y, _ = load("mnist", 28, "test")
    assert len(x) == 1 and len(y) == 792
    path.write_bytes(b"KMNIST")
    with refused(match="not the expected file, .*t10k-labels"):
        load("mnist", 28, "test")


def test_mistake_8_convert_rgb_shows_what_is_transparent():
    """A transparent picture is composited on white; convert("RGB") alone shows green."""
    im = Image.new("RGBA", (40, 20), (0, 90, 0, 0))
    im.save("x.png")
    assert im.convert("RGB").getpixel((0, 0)) == (0, 90, 0)
    assert data.read_picture("x.png").unique().tolist() == [255]


@posix
def test_folders_as_people_have_them(capsys):
    """Sub-folders, also linked ones, are classes; hidden files, dangling links, links that lead
    back and a folder with the name of a picture are passed over; a comma in the name."""
    pets = Path("cats, dogs")
    for name in "__MACOSX/1.png", "blue/a.txt", "blue/holiday.jpg/notes.txt", "../red/._1.png":
        data.write_text(pets / name, "no picture")
    for i in range(15):
        name = f"{i}.{['JPG', 'TIF', 'pgm'][i % 3]}"
        Image.new("L", (50 + i, 40), 0).save(pets / "blue" / name)
        Image.new("L", (50, 40 + i), 255).save(f"red/{name}")
    for name, target in dict(red="../red", back=".", gone="nowhere.png").items():
        (pets / name).symlink_to(target)
    _, x, y, classes = data.choose("cats, dogs", 32)
    assert "27 pictures 3 x 32 x 32  (2 other files left out)" in capsys.readouterr().out
    assert classes == ["blue", "red"] and torch.equal(x[:, 0, 9, 9], 255 * y.byte())


def test_pictures_as_people_have_them():
    """Damaged EXIF and megabytes of text say nothing about the pixels; a clear EXIF turns; of many
    pictures with some damaged the line names how many and which."""
    im = Image.new("RGB", (50, 30))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * 2_000_000, zip=True)
    im.save("text.png", pnginfo=info, exif=b"\xff" * 20)
    turn = Image.Exif()
    turn[0x112] = 6                             # as a phone that is held upright stores it
    im.save("turned.jpg", exif=turn)
    assert data.read_picture("turned.jpg").shape == (3, 50, 30)
    cut = Path("turned.jpg").read_bytes()[:-99]
    with refused(match="2 of 3 pictures cannot be read.*: cut.jpg .*; text is not a readable"):
        data.read_all([("cut.jpg", cut), "text.png", ("text", b"<html>")], 32)


def test_archives(monkeypatch):
    """Tagged faces from an archive, their tags with a BOM; an archive that is cut is named."""
    monkeypatch.setattr(data, "DOWNLOADS", Path())
    tags = "\ufeff"
    for i in range(20):
        data.save(Image.new("RGB", (64, 64)), f"anime/images/{i}.PNG")
        tags += f"{i},aqua hair red eyes\n"
    data.write_text("anime/tags.csv", tags)
    path = Path(shutil.make_archive("anime", "gztar", base_dir="anime"))
    shutil.rmtree("anime")
    assert load("anime", 32)[1].tolist() == 18 * [data.FACES.index("aqua hair red eyes")]
    path.write_bytes(path.read_bytes()[:-200])
    with refused(match="not a complete .tar.gz"):
        load("anime", 64)


def test_downloads_try_mirrors_and_keep_nothing_bad(monkeypatch):
    """Nothing there, a page, another hash: the next mirror; none left: one line and nothing on
    disk."""
    monkeypatch.setattr(data, "DOWNLOADS", Path("downloads"))
    for name in "<htm", "data", "good":
        Path(name).write_text(name)
    *bad, good = [Path(name).absolute().as_uri() for name in ("none", "<htm", "data", "good")]
    sha256 = data.sha256_of("good")
    with pytest.raises(data.Unavailable, match="No such.*web page.*wrong file.*at downloads/x"):
        data.fetch("x", bad, sha256)
    assert not os.listdir("downloads")
    assert data.fetch("x", [*bad, good], sha256).read_text() == "good"


def test_offline_a_run_keeps_the_set_it_began_with(capsys):
    """No MNIST: digits are drawn and the line says why; the run goes on with them tomorrow."""
    data.choose("mnist,digits", 32)
    assert "data     digits: 2,000 pictures 1 x 32 x 32  (no mnist" in capsys.readouterr().out
    data.save_checkpoint("last.pt", {}, 1, gan.config("dcgan", data="digits"))
    assert data.kept(gan.config("dcgan"), Path()) == "digits"


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="no ../shared/data")
def test_real_sets(monkeypatch):
    """All can be read; MNIST is padded, not resampled."""
    monkeypatch.setenv("DATA_DIR", str(SHARED / "data"))
    sets = [load(name, 32, "test")[0] for name in "mnist fashion emoji-apple anime".split()]
    assert [*map(len, sets)] == [10_000, 10_000, 100, 888]
    assert torch.equal(sets[0][..., 2:-2, 2:-2], load("mnist", 28, "test")[0])


def test_drawn_sets():
    """Seeded; the two styles show the same faces, in the colour of their label; three digits are
    stacked under the label that they spell; points of the ring lie around their centres."""
    _, y = data.draw_faces("a", 5, 7, 32)
    x, _ = data.draw_faces("b", 3, 9, 32)
    for face, k in zip(x, y[2:]):
        assert "#%02x%02x%02x" % (*face[:, 8, 16],) == data.RGB[data.HAIR[k // 11]]
    x, y, classes = load("stacked-digits", 32, "test")
    digits, labels, _ = load("digits", 32, "test")
    for channel, k in zip(x[0], classes[y[0]]):
        assert (digits[labels == int(k), 0] == channel).all((1, 2)).any()
    ring = data.to_float(load("ring", 1)[0])[..., 0, 0]
    distance, _ = torch.cdist(ring, data.RING).min(1)
    assert distance.mean() == approx(.02 * 1.2533, rel=.02)


def test_networks_stay_contiguous_on_apples_gpus():
    """There the gradient of batch norm is wrong in channels_last, which is faster elsewhere."""
    net = mock.Mock()
    data.place(net, "mps")
    net.to.assert_called_with("mps", memory_format=torch.contiguous_format)


def test_mistake_9_pictures_that_do_not_match_tanh():
    """uint8 -> [-1, 1] and back without loss; [0, 1] would leave half of tanh's range idle."""
    x = torch.arange(256).byte()
    assert data.to_float(x)[[0, -1]].tolist() == [-1, 1]
    assert torch.equal(data.to_uint8(data.to_float(x)), x)


# ---- fid.py --------------------------------------------------------------------------------------

# n real, n fake, d, FID, KID, precision, recall, from independent code
@parametrize("numbers", """\
1000 1000 64 0.06305284625916663 0.001201940451994954 0.803 0.778
400 300 128 0.25210042538774147 0.0013874602033001615 0.8166666666666667 0.725
100 120 256 1.0688771859482333 0.0009885203968855727 0.8916666666666667 0.85""".split("\n"))
def test_fid_golden(numbers):
    """The textbook FID agrees with the fast one if no covariance is singular, if one is (it always
    is with 40 pictures), and if both are (the last case)."""
    n, m, d, *wanted = map(ast.literal_eval, numbers.split())
    a = np.random.RandomState(0).standard_normal((d, d)) / d ** .5
    x = [np.random.RandomState(seed).standard_normal((k, d)) for seed, k in ((11, n), (12, m))]
    real, fake = [torch.from_numpy(h * np.arange(1, d + 1) ** -.6 @ a) for h in x]
    fake += .02
    scores = [fid.fid(real, fake), fid.kid(real, fake), *fid.precision_recall(real, fake)]
    assert scores == approx(wanted, rel=1e-9)
    for x, y in (real, fake), (real, fake[:40]), (real[:40], fake):
        assert fid.fid_textbook(x, y).item() == approx(fid.fid(x, y), rel=1e-5)


GOLDEN_INCEPTION = """43 2 3 32 32 0 .01020453 .7375337 1.778163 .4555272 6.242733 .03604679 \
.1095517 .4477755 .508098 .05997793 .5400127
75 1 3 64 48 0 .003345659 .00910967 .5330078 .7981241 .4485522 1.789897 .5010987 .735085 \
.07209809 0 .5629397
310 1 3 299 299 0 .05636128 .03678215 .9889803 1.100866 .6516264 2.230731 .5824723 1.408158 \
.1507813 0 .8587762
411 1 3 400 350 0 .004076251 .01716496 .6325228 .9626039 .4840534 1.870847 .4794687 .8821393 \
.08591026 0 .6378217"""              # seed and shape of the pictures, a dozen of their features


def test_fid_inception_golden():
    """Names, shapes and, against independent code, features of the published network, read without
    num_batches_tracked."""
    net = fid.Inception()
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert digest(shapes) == "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492"
    shapes = {key: shape for key, shape in shapes.items() if "num_batches" not in key}
    net.load_published({key: torch.from_numpy(a) for key, a in recipe(shapes, 11).items()})
    for row in GOLDEN_INCEPTION.split("\n"):
        seed, *numbers = map(ast.literal_eval, row.split())
        x = np.random.RandomState(seed).randint(0, 256, numbers[:4])
        h = dozen(net.features(torch.from_numpy(x).byte()))
        assert_close(h, torch.tensor(numbers[4:]), atol=2e-4, rtol=0)


@parametrize("name, size", [("digits", 32), ("faces-a", 64)])
def test_fid_neighbours(name, size):
    """Training pictures, slightly disturbed too, are copies; held-out pictures, sharp or soft, are
    not. One picture drawn over and over is a twin. Held-out pictures that stand in the training
    set, or twice, are left out, and where fewer than 20 are left nothing is counted. The sheet
    shows the closest first."""
    train, test = [load(name, size, split)[0] for split in ("train", "test")]
    train = torch.cat([255 - train, 255 - train, train])    # compared in two parts and more
    held_out, fake = test[::2], test[1::2]
    n = len(fake)
    found = partial(fid.neighbours, train, path="n.png")
    for kind in (0, 1, 2, 4, 5):
        x = data.to_uint8(fid.disturb(data.to_float(torch.cat([train[-n:], fake])), kind, .2))
        assert found(held_out, x[:n])["copied"] > .9 and found(held_out, x[n:])["copied"] < .1
    with mock.patch.object(data, "sheet") as sheet:
        a_tenth = found(held_out, torch.cat([fake[n // 10:], train[-(n // 10):]]))
    assert a_tenth["copied"] == approx(.1, abs=.05) and a_tenth["twins"] < .1
    x, copy, _ = sheet.call_args.args[0]
    assert torch.equal(x[0], copy[0])
    twins = found(torch.cat([held_out, held_out, train[:50]]), fake[:1].expand_as(fake))
    assert twins["held_out"] == n and fid.alarms(twins) == "; twins 100%"
    few = found(held_out[:19], fake)
    assert few["copied"] is None and fid.alarms(few) == ""


def test_fid_sanity(capsys):
    """Copies of the training set have an FID at the floor, and only `copied` sees them."""
    fid.sanity(fid.classifier("digits", 32), "digits", 200)
    rows = [text.split(" | ") for text in capsys.readouterr().out.splitlines()[2:]]
    floor, *_, worst, copies = [float(row[2]) for row in rows]      # 14 ways to spoil pictures
    assert worst > 2 * floor and copies < 1.5 * floor
    assert rows[0][-1] < "0.10" and rows[-1][-1] > "0.95"


def test_fid_stacked():
    """The digits' classifier on each channel, label 100 red + 10 green + blue. Every predicted
    class is a mode; KL is that of 20 equally frequent classes among 1,000."""
    net = fid.classifier("stacked-digits", 32)
    grey = load("digits", 32)[0][:60]
    x = grey.view(20, 3, 32, 32)
    seen, _ = net.predict(x)
    digits, _ = net.net.predict(grey)
    assert [f"{label:03}" for label in seen] == [f"{a}{b}{c}" for a, b, c in digits.view(20, 3)]
    r = fid.count(net, x, seen[:1], range(1000))            # one class has all of the share
    assert r["modes"] == 20 and r["KL"] == approx(math.log(1000 / 20))


def test_fid_count():
    """A class counts as drawn if the samples that show it with a confidence over 0.9 are at least a
    tenth of its share in the data, so blurred samples show no class. For faces, where label =
    11 * hair + eyes: if each wanted label is the next one, the eyes always differ, and the hair
    differs only where the eyes were the last of the 11."""
    net = mock.Mock(heads=(12, 11), strict=1)
    y = torch.arange(132).repeat(20)
    for n, sure, modes in (264, .91, 132), (132, .91, 0), (2640, .89, 0):
        net.predict.return_value = y, sure * (torch.arange(2640) < n)
        r = fid.count(net, images(2640), y, data.FACES, (y + 1) % 132)
        assert r["modes"] == modes
        assert r["hair accuracy"] == approx(10 / 11) and r["eyes accuracy"] == 0
        assert r["eyes asked seen"][1][0] == 240


def test_fid_line():
    """It says where the floor or the real pictures are fewer, and with what it compares."""
    x = load("digits", 32)[0]
    r = fid.scores(fid.classifier("digits", 32), x[:100], 255 - x[:300])
    words = fid.line(r)
    assert words.endswith(" at n = 50)")
    assert "compares with itself only, n = 100 real, 300, real-vs-real floor" in words


@parametrize("case", """np.save(f, X) -> [9, 3, 8, 7]
np.save(f, np.moveaxis(X, 3, 1)) -> [9, 3, 8, 7]
np.save(f, X[..., 0]) -> [9, 1, 8, 7]
np.save(f, X), f.truncate(999) -> greater than file size
np.save(f, X / 255) -> (x * 255).round()
np.save(f, X / 127.5 - 1) -> ((x + 1) * 127.5).round()
np.save(f, X / 1.) -> (x).round()
np.save(f, X > 9) -> (x * 255)
np.save(f, X[0]) -> x[None]
np.save(f, X[:0]) -> zero-size
np.save(f, X[..., [0, 1, 2, 0]]) -> x[..., :3]
np.save(f, X.reshape(9, -1)) -> x.reshape
np.save(f, X[0, 0, 0, 0]) -> ()
np.save(f, np.array([None])) -> objects
np.savez(f, a=X) -> ['a']""".split("\n"))
def test_fid_arrays(case):
    """Channels last, first or none are read; for other arrays it says how to convert them."""
    save, says = case.split(" -> ")
    X = np.arange(9 * 8 * 7 * 3, dtype=np.uint8).reshape(9, 8, 7, 3)
    with open("a.npy", "wb") as f:
        eval(save)
    try:
        found = fid.array("a.npy").shape
    except data.UserError as e:
        found = e
    assert says in str(found)


def test_fid_words():
    """An existing path wins, a colon starts a split only before train, test or all; photographs are
    read no larger than what the features look at, and the digits at that side."""
    Path("odd:test").mkdir()
    assert fid.split_of("run 10:30")[1] == fid.split_of("odd:test")[1] == "train"
    for i in range(20):
        data.save(Image.new("L", (70, 50 + i), 12 * i), f"photos/{i}.png")
    assert fid.source("photos", 299, fid.Inception).shape == (20, 3, 50, 50)
    said = run("fid.py digits photos/")
    assert "1 x 32 x 32" in said and f"at\n         {data.DOWNLOADS}/pt_inception" in said
    assert "photos/0.png is one picture: name a folder" in run("fid.py photos/0.png x", code=2)


# ---- cyclegan.py ---------------------------------------------------------------------------------

def faces():
    """Both styles of the drawn faces."""
    return [cyclegan.load_style(name, 32, "cpu") for name in cyclegan.PAIRS["faces"]]


def test_cyclegan_networks_are_the_published_ones():
    makes = [cyclegan.CycleGenerator, cyclegan.cycle_discriminator, cyclegan.ResNetGenerator,
             cyclegan.PatchGAN]
    assert [count(make()) for make in makes] == [144_448, 262_048, 11_378_179, 2_764_737]


def paste(skeleton, script=cyclegan):
    """The names in the notebook of a student who has pasted our functions and the handout's code.
    (test_snippets_survive_being_pasted checks that our functions need nothing else.)"""
    notebook = {**vars(script)}
    exec(skeleton, notebook)
    return notebook


DCGENERATOR = """
class DCGenerator(nn.Module):
    def __init__(self, noise_size, conv_dim, spectral_norm=False):
        super().__init__()
        self.conv_dim = conv_dim
        self.linear_bn = upconv(noise_size, conv_dim * 64, kernel_size=1, padding=0, stride=0,
                                spectral_norm=spectral_norm)
        self.upconv1 = upconv(conv_dim * 4, conv_dim * 2, 5, spectral_norm=spectral_norm)
        self.upconv2 = upconv(conv_dim * 2, conv_dim, 5, stride=2, spectral_norm=spectral_norm)
        self.upconv3 = upconv(conv_dim, 3, 5, stride=2, padding=2, batch_norm=False,
                              spectral_norm=spectral_norm)

    def forward(self, z):
        out = F.relu(self.linear_bn(z)).view(-1, self.conv_dim * 4, 4, 4)
        out = F.relu(self.upconv1(out))
        out = F.relu(self.upconv2(out))
        out = F.tanh(self.upconv3(out))
        if out.size() != torch.Size([z.size(0), 3, 32, 32]):
            raise ValueError(f"expect {z.size(0)} x 3 x 32 x 32, but get {out.size()}")
        return out
"""


def test_skeleton_dcgenerator():
    """The emoji handout's class, filled in with our upconv; spectral norm is on in every layer."""
    G = paste(DCGENERATOR)["DCGenerator"](100, 32, spectral_norm=True)
    assert count(G) == 467_488 and len(G(torch.rand(2, 100, 1, 1))) == 2
    assert str(G).count("ParametrizedConv2d") == 4


CYCLEGAN_TRAINING_LOOP = """
class DCDiscriminator(nn.Module):
    def __init__(self, conv_dim=64, spectral_norm=False):
        super().__init__()
        self.conv1 = conv(3, conv_dim, 5, 2, 2, spectral_norm=spectral_norm)
        self.conv2 = conv(conv_dim, conv_dim * 2, 5, 2, 2, spectral_norm=spectral_norm)
        self.conv3 = conv(conv_dim * 2, conv_dim * 4, 5, 2, 2, spectral_norm=spectral_norm)
        self.conv4 = conv(conv_dim * 4, 1, 5, 2, 1, batch_norm=False, spectral_norm=spectral_norm)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        return self.conv4(x).squeeze()


def create_model(opts):
    G = CycleGAN({way: CycleGenerator(4, init_zero_weights=True) for way in ("ab", "ba")})
    D = nn.ModuleDict({style: DCDiscriminator(4, spectral_norm=True) for style in "ab"})
    return G, D


def cyclegan_training_loop(G_XtoY, G_YtoX, D_X, D_Y, batches, opts):
    g_params = list(G_XtoY.parameters()) + list(G_YtoX.parameters())
    d_params = list(D_X.parameters()) + list(D_Y.parameters())
    g_optimizer = torch.optim.Adam(g_params, opts.lr, [0.5, 0.999])
    d_optimizer = torch.optim.Adam(d_params, opts.lr, [0.5, 0.999])
    yield
    for images_X, images_Y in batches:

        # ---- train the discriminators ----
        d_optimizer.zero_grad()
        D_X_loss = torch.mean((D_X(images_X) - 1) ** 2)
        D_Y_loss = torch.mean((D_Y(images_Y) - 1) ** 2)
        d_real_loss = D_X_loss + D_Y_loss
        fake_X = G_YtoX(images_Y).detach()
        D_X_loss = torch.mean(D_X(fake_X) ** 2)
        fake_Y = G_XtoY(images_X).detach()
        D_Y_loss = torch.mean(D_Y(fake_Y) ** 2)
        d_fake_loss = D_X_loss + D_Y_loss
        d_total_loss = (d_real_loss + d_fake_loss) / 2
        d_total_loss.backward()
        d_optimizer.step()

        # ---- train the generators ----
        g_optimizer.zero_grad()
        fake_X = G_YtoX(images_Y)
        g_loss = torch.mean((D_X(fake_X) - 1) ** 2)
        fake_Y = G_XtoY(images_X)
        g_loss += torch.mean((D_Y(fake_Y) - 1) ** 2)
        g_loss *= opts.lambda_gan
        for x, cycled in (images_Y, G_XtoY(fake_X)), (images_X, G_YtoX(fake_Y)):
            g_loss += opts.lambda_cycle * torch.mean(torch.sum(torch.abs(x - cycled), (1, 2, 3)))
        if opts.identity:                           # Zhu 2017, not the handout
            for x, same in (images_Y, G_XtoY(images_Y)), (images_X, G_YtoX(images_X)):
                g_loss += opts.identity * opts.lambda_cycle * torch.abs(x - same).sum() / len(x)
        g_loss.backward()
        g_optimizer.step()
        g_loss.item()
        yield
"""


def textbook_cyclegan(cfg, batches):
    """The handout's loop, filled in as the lecture has it: D and G each translate anew. Yields (G,
    D) before the first step and after each."""
    torch.manual_seed(cfg.seed)
    G, D = cyclegan.networks(cfg)
    loop = paste(CYCLEGAN_TRAINING_LOOP)["cyclegan_training_loop"]
    for _ in loop(*G.values(), *D.values(), batches, cfg):
        yield G, D


def test_skeleton_cyclegan_training_loop(monkeypatch, tmp_path):
    """Two steps of ours and of the handout's loop, on the handout's networks, whose D returns (N,):
    the same weights. G is scored by the updated D; init_zero_weights gives small weights."""
    monkeypatch.setattr(cyclegan, "networks", paste(CYCLEGAN_TRAINING_LOOP)["create_model"])
    cfg = cyclegan.config(steps=2, batch=16, amp=0, lambda_gan=9., lambda_cycle=.03, identity=.5)
    styles = faces()
    G, D, _ = cyclegan.train(cfg, *styles, tmp_path, CPU)
    first, norm = G["ab"][0]
    assert first.weight.std() < .01 < G["ab"][5][1].weight.std()
    h = first(data.to_float(styles[0].train))                   # (1000, 4, 16, 16)
    assert_close(norm.running_var, h.var((0, 2, 3)), atol=0, rtol=.15)  # refresh: of real a alone
    batches = iter(lambda: [some(style.train, 16) for style in styles], None)
    *_, by_hand = seeded(cfg, textbook_cyclegan(cfg, batches))
    x = torch.randn(8, 3, 32, 32)
    for net, reference in zip((G, D), by_hand):
        for way in net:
            assert_close(net[way](x), reference[way](x), rtol=0, atol=.02)      # a mistake is .2


def test_mistake_10_shared_layers_twice_in_the_optimiser(tmp_path):
    """UNIT's two shared blocks are in the optimiser once, and on every path. The pool is used, and
    in step 3 of 3 the rate has fallen to lr / 1.5."""
    cfg = cyclegan.config(model="unit", steps=3, batch=2, pool=5, decay=1)
    G, *_ = cyclegan.train(cfg, *faces(), tmp_path, CPU)
    saved = data.load_checkpoint("last.pt")
    optimiser = saved["opt_G"]["param_groups"][0]
    assert len(optimiser["params"]) == len(list(G.parameters()))
    assert optimiser["lr"] * 1.5 == approx(1e-4) and len(saved["pool_a"]["held"]) == 5
    for way in "ab", "ba":
        G.zero_grad()
        G(torch.randn(1, 3, 32, 32), way).norm().backward()
        assert G.into.body[0].weight.grad.any() and G.outof.body[0].weight.grad.any()


def test_cyclegan_pool_shows_old_pictures_half_the_time():
    pool = cyclegan.ImagePool(50)
    x = torch.arange(4050.)
    ages = x - pool(x)                          # of the first 50 it is 0
    assert .47 < (ages > 0).float().mean() < .53            # sigma .008
    assert ages.mean().item() == approx(50, rel=.15)     # replaced once in 100 draws


def test_cyclegan_step_of_unit_is_its_equations(monkeypatch):
    """Of black pictures a = 0 and white ones b = 1. E_a adds 1, E_b doubles, D returns the mean.
    Without noise; the pools add to the fakes that D sees. D's half and G's GAN loss are, word for
    word, those of step_cyclegan, which the textbook proves."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(cyclegan, "descend", lambda opt, loss: None)
    G = mock.Mock(encode=lambda x, style: x + 1 if style == "a" else 2 * x,
                  decode=lambda z, style: z + 3 if style == "a" else 5 * z)
    D = lambda x: x.mean((1, 2, 3))
    a, b = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    last = cyclegan.step_unit(G, D, D, None, None, a, b, 3., .1, .5, lambda x: x - 1,
                              lambda x: x + 2)
    want = {"D": (1 + 16 + 0 + 49) / 2,                                 # mu 1 and 2, fakes 5 and 5
            "reconstruction": .1 * (4 + 9), "cycle": .1 * (13 + 29),
            "kl": .5 * (1 + 4), "cycle kl": .5 * (100 + 36)}            # mu_ab 10, mu_ba 6
    assert {name: last[name].item() for name in want} == approx(want)
    steps = cyclegan.step_unit, cyclegan.step_cyclegan
    assert len({inspect.getsource(step).split("# ---- D:")[1] for step in steps}) == 1


def test_cyclegan_scores_see_that_nothing_was_done():
    """Style b is a with other colours, G does nothing, and the headline says so. The probe tells
    apart what is apart."""
    a, _ = faces()
    b = a._replace(name="faces-b", train=a.train // 2 + 9, test=a.test // 2 + 9)
    G = cyclegan.CycleGAN(dict.fromkeys(["ab", "ba"], nn.PReLU(init=1.)))       # x -> x
    m = cyclegan.scores(G, a, b, "ab")
    true = F.l1_loss(a.test / 255, b.test / 255).item()
    assert m["ab cycle"] == 0 and m["ab L1"] == m["ab L1 identity"] == approx(true)
    assert m["ab L1 colour map"] < .02
    assert "NOT better than ab L1 colour map" in cyclegan.verdict(m, "ab")
    assert cyclegan.probe_accuracy(cyclegan.UNIT(), *faces()) > .95


def test_cyclegan_translates_files_and_trains_nothing():
    """In eval mode: a picture's translation does not depend on the others of the folder."""
    for i in range(4):
        data.save(Image.new("RGB", (40, 50), (60 * i, 9, 99)), f"own/{i}.png")
    run("cyclegan.py --a own --b own --steps 1 --size 64 --width 4 --out run")
    made = []
    for source in "own", "own/0.png":
        assert "step " not in run(f"cyclegan.py --translate {source} --direction ba --out run")
        made.append(data.read_picture("run/translated-ba/0-0.png").int())
    assert (made[0] - made[1]).abs().max() <= 1 and Path("run/translated-ba.png").is_file()


# ---- biggan_interp.py ----------------------------------------------------------------------------

# Truncation -> a dozen numbers of the pictures, from independent code.
GOLDEN_BIGGAN = """
1 -> -.3509 -.2513 .6081 -.1732 .0427 .3385 .4939 -.3878 .2063 .5715 -.3273 -.1240
.4 -> -.2045 .4651 .3142 -.0958 -.0144 .0743 .0206 -.1070 .3723 .1108 -.2185 .0331
.5 -> -.1821 .4171 .5563 -.1872 -.0874 -.0896 .0668 -.4483 .2160 .1652 -.4569 -.1517
.43 -> -.4949 .2443 .4297 -.5537 -.0109 .2118 .5206 -.5188 .1029 .1490 -.4895 -.0900
.415 -> -.2146 .4443 .3647 -.1226 -.0671 .0179 .0045 -.2351 .3321 .1509 -.2512 -.0313
.07 -> -.1882 .3660 .4939 -.1568 .2469 .1018 .4585 -.4395 .5108 .0751 -.4332 -.0245
.02 -> .0369 .4948 .6694 -.1963 .3776 .4611 .6217 -.2487 .4568 .5766 -.1344 -.0017
.14 -> -.2090 .4374 .6685 -.4226 -.1027 .2937 .5190 -.3130 .4076 .3940 -.4674 -.1650
.58 -> -.2170 .3587 .5134 -.3874 .1703 .3040 .4704 -.2822 .3675 .1400 -.3615 .0807"""


def test_biggan_loads_and_draws_the_golden_pictures():
    """From a file with the published names, at truncations in the table of statistics and between
    its rows; a wrong key is named."""
    config = biggan_interp.Config(channel_width=8)
    key = "generator.layers.3.conv_1.weight_v"
    shapes = {key: w.shape for key, w in biggan_interp.Generator(config).state_dict().items()}
    state = {key: torch.from_numpy(w) for key, w in recipe(shapes, 11).items()}
    torch.save(state, "weights.bin")
    G = biggan_interp.load_published("weights.bin", config)
    z = np.random.RandomState(12).standard_normal((3, 128)).clip(-2, 2)
    z = torch.from_numpy(z).float()
    y = torch.tensor([282, 340, 980])
    for line in GOLDEN_BIGGAN.split("\n")[1:]:
        truncation, *want = map(float, line.replace("->", "").split())
        found = dozen(G(truncation * z, y, truncation))
        assert_close(found, torch.tensor(want), atol=1.5e-4, rtol=0)
    torch.save({**state, key: torch.zeros(3)}, "weights.bin")
    with refused(match=key):
        biggan_interp.load_published("weights.bin", config)


def test_biggan_has_the_published_names_and_shapes_golden():
    with torch.device("meta"):
        G = biggan_interp.Generator()
    shapes = {key: value.shape for key, value in G.state_dict().items()}
    assert digest(shapes) == "decc3f75ba382ddfd881ebe7e41a98b6a003041564652c764a0f341a95be52f5"


def test_biggan_tsne_is_its_equations_and_as_good_as_the_exact_method():
    data.keep_memory()                                      # three times as fast
    r = np.random.RandomState(0)
    centres = r.randn(20, 128) * 1.5
    which = r.randint(0, 20, 1000)
    x = torch.from_numpy(centres[which] + r.randn(1000, 128))       # 20 Gaussians
    P = biggan_interp.affinities(x, 30)
    assert biggan_interp.kl(P, biggan_interp.tsne(x, 30, seed=0)) <= .349   # scikit-learn: .333
    y = torch.randn(1000, 2).double().requires_grad_()
    i, j = torch.triu_indices(1000, 1000, 1)                # each pair once, so its p twice
    p = 2 * P[i, j]
    w = 1 / (1 + F.pdist(y) ** 2)
    C = (p * (p * w.sum() / w).log()).sum()
    (gradient,) = torch.autograd.grad(C, y)
    assert_close(biggan_interp.kl(P, y), C)
    assert_close(biggan_interp.kl_gradient(P, y), gradient, atol=1e-10, rtol=0)


INTERPOLATE = """
def generate_linear_interpolate_sample(model, noise_vector, class1_emb, class2_emb, alpha):
    linear_emb = between_classes(class1_emb, class2_emb, alpha)
    return model(noise_vector, linear_emb)
"""


def test_skeleton_biggan_interpolations_end_at_the_classes():
    """In the handout's function, which takes one alpha at a time; and with several at once."""
    interpolate = paste(INTERPOLATE, biggan_interp)["generate_linear_interpolate_sample"]
    G = biggan_interp.Generator(biggan_interp.SMALL).eval()
    z = biggan_interp.truncated_noise(1, 32)
    y = torch.tensor([3, 100])
    r1, r2 = G.embeddings.weight.T[y, None]                             # (1, 64) each
    for classes, alpha in zip(y.split(1), (1, 0.)):
        assert_close(interpolate(G, z, r1, r2, alpha), G(z, classes))
    r = torch.tensor([0., 8, 9, 20])[:, None]
    assert biggan_interp.between_classes(r[1], r[0], [1, .25]).tolist() == [[8], [2]]
    pairs = biggan_interp.extreme_pairs(r)
    assert pairs == {"near": [[1, 2], [0, 3]], "far": [[0, 3], [1, 2]]}


def test_biggan_pairs_by_number_or_name():
    parse = partial(biggan_interp.parse_pairs, names=["Tiger cat", "pug", "goldfish"])
    assert parse("2, 1; tiger Cat,goldfish ;") == [[2, 1], [0, 2]] and not parse("")
    with refused(match="a number below 3"):
        parse("1, 3")
    with refused(match="two classes"):
        parse("1, 2, 0")
    said = run("biggan_interp.py --model small --pairs '1, red hair blu eyes' --out run", 2)
    assert "similar: red hair blue eyes" in said and not Path("run").exists()


def test_biggan_losses_and_projection_are_their_equations():
    real, fake = torch.tensor([[2., .5], [-2., 3.]])
    assert biggan_interp.d_hinge(real, fake) == 2.25
    D = biggan_interp.ProjectionD(132)
    x = torch.randn(2, 3, 32, 32)
    y = torch.tensor([3, 100])
    h = D.phi(x)
    assert_close(D(x, y), D.psi(h)[:, 0] + (D.v(y) * h).sum(1))
    assert_close(biggan_interp.conditional_r1(D, x, y), gan.r1_penalty(partial(D, y=y), x))
    old, new = biggan_interp.Spectral(2, 3), biggan_interp.Spectral(2, 3)
    biggan_interp.average_state(old, new, 0.)
    assert_close(old.weight_u, new.weight_u)                            # buffers are averaged too


def test_biggan_sampler_has_statistics_of_its_own():
    """In eval mode it draws nearly what it drew in training mode, at truncation 0.5. The noise is
    N(0, 1) on [-2, 2], of variance 1 - 4 phi(2) / (2 Phi(2) - 1), times the truncation."""
    G = biggan_interp.sampler(biggan_interp.Generator(biggan_interp.SMALL))
    y = torch.arange(132)
    z = biggan_interp.truncated_noise(132, 32, .5)
    assert z.var().item() == approx(.25 * .7737, rel=.05)               # sigma 1.4%
    x = G.eval()(z, y, .5)
    assert (x - G.train()(z, y, .5)).abs().mean() < .2 * x.std()


def test_biggan_runs_and_goes_on_bit_for_bit(monkeypatch):
    """Without the published weights a small model is trained. Ctrl-C prints one line and gives exit
    code 130; the resumed run then has the same result. With a penalty whose gradient is 1e6, Adam's
    second moment (beta2 = .99) shows that the penalty was added in step 4 only, with the weight
    4 R1. After its update, D scores the same fakes differently."""
    monkeypatch.setattr(biggan_interp, "BATCH", 4)
    monkeypatch.setattr(biggan_interp.SMALL, "n_stats", 2)
    monkeypatch.setattr(biggan_interp, "tsne", lambda r, *_: r[:, :2].detach().double())
    monkeypatch.setattr(biggan_interp, "conditional_r1", lambda D, *_: 1e6 * D.psi.bias.sum())
    line = "biggan_interp.py --steps 4 --sample-every 2 --out "
    assert run(line + "whole").splitlines()[-1][:3] == "FID"
    saved = data.load_checkpoint("whole/last.pt")
    assert saved["opt_D"]["state"][9]["exp_avg_sq"].item() == approx(.01 * 4e5 ** 2, rel=1e-3)
    row, _ = saved["log"]["rows"]
    assert "G_ema" in saved and row["D(G(z)) before"] != row["D(G(z)) after"]
    with mock.patch.object(data, "save", side_effect=[0, KeyboardInterrupt]):
        assert "goes on from the last checkpoint" in run(line + "twice", code=130)
    monkeypatch.setattr(biggan_interp, "small_scores", lambda *_: None)     # to save time
    monkeypatch.setattr(biggan_interp, "evaluate", lambda *_: None)
    run(line + "twice")
    assert_same_bits("whole/last.pt", "twice/last.pt")


# ---- a GPU in disguise ---------------------------------------------------------------------------

class GPU(TorchFunctionMode):
    """Sees every call to torch. What is on "cuda" lies on the CPU, but its storage is marked.

    As on a real GPU, a marked tensor must not meet one that is not marked, unless that one is a
    single number. While `hot` is set, nothing may wait for the GPU: no .item(), no copy."""
    hot = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs, name))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        marks = [hasattr(x.untyped_storage(), "gpu") for x in tensors]
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda" if marks[0] else "cpu")
        if name in "device _parse_to _has_compatible_shallow_copy_type __set__".split():
            return func(*args, **kwargs)
        marked = any(marks)
        words = [str(x) for x in leaves if isinstance(x, (str, torch.device))]
        to = [word for word in words if word in ("cuda", "cpu")]
        here = to[0] == "cuda" if to else marked                # where the result belongs
        moves = bool(tensors) and here != marked
        waits = moves or marked and name in "item tolist __bool__ __float__".split()
        met = any(x.dim() and mark != marked for x, mark in zip(tensors, marks))
        assert not met or name == "__getitem__" and not self.hot, f"{name}: the CPU meets the GPU"
        assert not (self.hot and waits or marked and name == "numpy"), f"{name} on the GPU"
        if to:
            args, kwargs = tree_map_only((str, torch.device), lambda _: CPU, (args, kwargs))
        out = func(*args, **kwargs)
        if moves:
            out = out.clone()
        for x in tree_leaves(out):
            if here and isinstance(x, torch.Tensor):
                assert x.dtype != torch.double, f"{name}: Apple's GPUs have no float64"
                x.untyped_storage().gpu = True
        return out


RUNS_ON_A_GPU = """
gan.py dcgan --h 4 --samples 200 --modern 1 --sn both --cond ac --penalty-every 2 --data faces-a
gan.py dcgan --h 4 --samples 200 --loss wgan-gp --cond planes --augment 1 --ema 0 --dump 9
gan.py dcgan --h 4 --samples 200 --loss wgan --clip .1 --data faces-a
gan.py dcgan --h 4 --samples 200 --loss lsgan --gp 1 --penalty mean-norm --decay 1
gan.py ring --samples 200 --loss gan --r1 1
cyclegan.py --pool 2
cyclegan.py --pool 2 --model unit"""


def test_on_a_gpu_in_disguise(monkeypatch):
    """No device= and no .cpu() is missing, and the second step, which is not logged, never waits
    for the GPU."""
    gpu = GPU()
    seed = torch.manual_seed
    load_file = torch.load

    def load_marked(file, map_location="cpu", **words):
        move = lambda x: x.to(map_location)
        return tree_map_only(torch.Tensor, move, load_file(file, **words))

    def seed_step(n):
        gpu.hot = n % 1_000_003 == 2
        return seed(n)

    monkeypatch.setattr(torch, "load", load_marked)
    monkeypatch.setattr(torch, "manual_seed", seed_step)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(data, "gif", print)
    with gpu:
        for line in RUNS_ON_A_GPU.split("\n")[1:]:
            run(line + " --batch 4 --steps 3 --device cuda")


# ---- what is written about it --------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "figures/README.md").read_text(encoding="utf-8")
TARGETS = re.findall(r"^#? ?([a-z][\w-]*):.*##", (ROOT / "Makefile").read_text(), re.M)


def guide():
    """[(script, name, names it brings along)] of the snippets in the README's copying guide."""
    snippets = []
    table = README.split("## Copy from here")[1].split("\n## ")[0]
    for file, names, along in re.findall(r"\| (\w+)\.py \| `([\w ]+)` \| (.*)\|", table):
        for name in names.split():
            snippets.append((sys.modules[file], name, re.findall(r"\w+", along)))
    return snippets


@parametrize("script, name, along", guide())
def test_snippets_survive_being_pasted(script, name, along):
    """Each snippet, with the names in the column "and also", uses nothing else of its script."""
    parts = [inspect.getsource(getattr(script, part)) for part in [*along, name] if part != "math"]
    source = "\n".join(parts)
    exec(source, {"torch": torch, "nn": nn, "F": F})
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not used & (vars(script).keys() - {"torch", "nn", "F", name, *along})


def test_snippets_of_the_pages_run():
    """One step of each, below our functions, on pictures of the size that the page names."""
    snippets = re.findall(r"```python\n(.*?)```", README + RESULTS, re.S)
    for size, snippet in zip(["1, 32, 32", "3, 64, 64", "1, 28, 28"], snippets, strict=True):
        paste(f"x = torch.randn(9, {size}); y = torch.arange(9)\n"
              + re.sub(r"range\(\d+", "range(1", snippet), gan)      # one step


def test_makefile_and_readme_agree():
    """Every target of the Makefile is named in README.md or figures/README.md, and every target
    named there exists. Ten mistakes have ten tests. All pictures exist. README.md has at most 150
    lines and 1,500 words."""
    assert {*TARGETS} == {*re.findall(r"\bmake ([a-z][\w-]*)", README + RESULTS)}
    paths = re.findall(r"\((figures/\w+\.\w+)", README) + [
        f"figures/{name}" for name in re.findall(r"!\[.*\]\((.+)\)", RESULTS)]
    assert all((ROOT / path).exists() for path in paths)
    mistakes = [name for name in globals() if name.startswith("test_mistake_")]
    assert len(mistakes) == len(re.findall(r"^\d+\. \*\*", README, re.M)) == 10
    words = [word for word in README.split() if re.search(r"\w", word)]
    assert len(guide()) > 30 and README.count("\n") <= 150 and len(words) <= 1500


def test_every_documented_command_is_understood():
    """Of the README and of each target of the Makefile, whose make prints what it would run."""
    make = ["make", "-n", "-C", ROOT, *TARGETS, "PYTHON=python", "STEPS=3", "SEED=1"]
    text = README + RESULTS + subprocess.check_output(make, text=True)
    commands = re.findall(r"python (gan|cyclegan|biggan_interp|fid)\.py ?([^|;#`\n]*)",
                          text.replace("--help", ""))
    configs = {"gan": gan.GANConfig, "cyclegan": cyclegan.CycleConfig,
               "biggan_interp": biggan_interp.Run, "fid": fid.FIDConfig}
    for script, words in commands:
        words = shlex.split(re.sub(r"\$\w+", "1", words))
        presets = {name: gan.config(name) for name in gan.PRESETS if script == "gan"}
        data.arguments(configs[script], words, presets, positional="sources")
    assert len(commands) > 40


def test_bench_measures_both_sides(monkeypatch):
    for row in "A (16,16)", "CycleGAN":
        for name in "batch", "steps":
            monkeypatch.setattr(ROWS[row], name, 4)
        for side in "textbook", "ours":
            assert bench_one(row, side) > 0


# ---- python test_all.py bench: the textbook loop and ours, in turns, in one run ------------------

def batches(batch, *sets):
    """A DataLoader without end, as tutorials have it: each picture is fetched for itself."""
    pictures = torch.utils.data.TensorDataset(*sets)
    loader = torch.utils.data.DataLoader(pictures, batch, True, num_workers=1, drop_last=True)
    while True:
        for parts in loader:
            yield [x / 127.5 - 1 for x in parts]


ROWS = {
    "A (16,16)": gan.config("dcgan", steps=600),
    "A (100,100)": gan.config("dcgan", z=100, h=100, steps=40),
    "D 64 x 64": gan.config("anime", steps=16),
    "CycleGAN": cyclegan.CycleConfig(steps=30),
}


def bench_one(row, side):
    """The pictures per second of one side of one row, in the second half of its steps."""
    cfg = ROWS[row]
    steps = cfg.steps // 2
    cfg.log_every = steps
    cfg.sample_every = 10 ** 9
    if row == "CycleGAN":
        x = images(4096, 3)
        style = cyclegan.Style("a", x, x[:100], None)
        textbook = textbook_cyclegan(cfg, batches(cfg.batch, x, x))
        ours = partial(cyclegan.train, cfg, style, style)
    else:
        x = images(4096, cfg.channels, gan.NETS[cfg.net][1])
        loader = batches(cfg.batch, x)
        textbook = textbook_gan(cfg, lambda: next(loader)[0])
        ours = partial(gan.train, cfg, x, torch.zeros(4096).long())
    if side == "textbook":
        times = [time.perf_counter() for _ in zip(range(cfg.steps + 1), textbook)]
        seconds = times[-1] - times[steps - 1]
    else:
        *_, log = ours(Path(tempfile.mkdtemp()), data.device("cpu"))
        seconds = log.rows[-1]["seconds"] - log.rows[1]["seconds"]
    return steps * cfg.batch / seconds


def rates(n, f, *words):
    """n times the calls per second, measured twice after a first one that does not count."""
    return n / np.array(timeit.repeat(partial(f, *words), repeat=3, number=1)[1:])


def show(row, *sides):
    """A row of the table: the medians of both sides and their ratio."""
    plain, ours = map(np.median, sides)
    print(f"| {row} | {plain:,.4g} | {ours:,.4g} | {ours / plain:.2f} |", flush=True)


def bench():
    """The table of `make bench`, in rates, from five alternating runs of each side."""
    data.keep_memory()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n"
          "| row | textbook | ours | ratio |\n|---|---|---|---|", flush=True)
    for row in ROWS:
        found = []
        for side in 5 * ["textbook", "ours"]:
            words = [sys.executable, __file__, "bench", row, side]
            found.append(float(subprocess.check_output(words, text=True).split()[-1]))
        show(f"{row}, images/s", found[::2], found[1::2])
    x = images(32, 3)
    net = fid.Inception()
    ours = fid.Inception()
    ours.load_published(net.state_dict())
    show("Inception, images/s", rates(32, net.features, x), rates(32, ours.features, x))
    mu = torch.zeros(2048)
    s1 = torch.randn(10_000, 2048).double().T.cov()
    s2 = s1 + .1 * s1 @ s1
    with contextlib.suppress(ImportError):
        import scipy.linalg
        show("roots per minute, d = 2048 (textbook: SciPy's)",
             rates(60, scipy.linalg.sqrtm, (s1 @ s2).numpy()),
             rates(60, fid.frechet_distance, mu, s1, mu, s2))


if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    print(bench_one(*sys.argv[2:])) if sys.argv[2:] else bench()
