"""test_all.py: what the project promises, proven. `make test`, or python -m pytest test_all.py.

A test compares with a closed form, a reference operation or the numbers of ../shared/golden, made
by independent code; those, and the tests on real data, are skipped where ../shared is not there.
The ten mistakes of the README are the tests test_mistake_1 to 10: each shows the right thing and
what the wrong one would have given. `python test_all.py bench` measures the speed instead.
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
from torch.utils._pytree import tree_leaves, tree_map

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
        for name, size, steps in (("digits", 32, 150), ("faces-a", 32, 60), ("faces-b", 32, 60),
                                  ("faces-a", 64, 2)):
            patch.setattr(fid, "STEPS", steps)
            fid.classifier(name, size)
    return folder


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, downloads, monkeypatch):
    """Each test in a folder of its own, without DATA_DIR and mirrors, from one seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DOWNLOADS", downloads)
    monkeypatch.setenv("DATA_DIR", "")
    monkeypatch.setenv("DOWNLOADS", str(downloads))
    for script, urls in (data, "MNIST_URLS"), (fid, "WEIGHTS_URLS"), (biggan_interp, "URLS"):
        monkeypatch.setattr(script, urls, ["file:///nowhere/"])
    torch.manual_seed(0)


def run(line, code=0):
    """A command, "gan.py dcgan --h 4", in this process; its exit code must be `code`; at 2 it says
    one line. Returns all that it says."""
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

LAYERS = {  # G and D, and how many parameters they have: (channels, kernel, stride, padding)
    "dcgan": ("ConvT(64,4,1,0) BN ReLU ConvT(32,4,2,1) BN ReLU ConvT(16,4,2,1) BN ReLU "
              "ConvT(1,4,2,1) Tanh", 57_937,
              "Conv(16,4,2,1) LReLU.2 Conv(32,4,2,1) BN LReLU.2 Conv(64,4,2,1) BN LReLU.2 "
              "Conv(1,4,1,0)", 42_432),
    "emoji": ("Conv(2048,1,1,0) BN ReLU Conv(64,5,1,2) BN ReLU Conv(32,5,1,2) BN ReLU "
              "Conv(3,5,1,2) Tanh", 467_488,
              "Conv(64,5,2,2) BN ReLU Conv(128,5,2,2) BN ReLU Conv(256,5,2,2) BN ReLU "
              "Conv(1,5,2,1)", 1_036_096),
    "anime": ("ConvT(512,4,1,0) BN LReLU.2 ConvT(256,4,2,1) BN LReLU.2 ConvT(128,4,2,1) BN "
              "LReLU.2 ConvT(64,4,2,1) BN LReLU.2 ConvT(3,4,2,1) Tanh", 3_576_704,
              "Conv(64,4,2,1) LReLU.2 Conv(128,4,2,1) BN LReLU.2 Conv(256,4,2,1) BN LReLU.2 "
              "Conv(512,4,2,1) BN LReLU.2 Conv(1,4,1,0)", 2_765_568),
    "mnist28": ("ConvT(256,4,2,1) BN ReLU ConvT(128,4,2,1) BN ReLU ConvT(64,4,2,1) BN ReLU "
                "ConvT(32,4,2,1) BN ReLU ConvT(1,2,2,2) Tanh", 1_098_816,
                "Conv(32,2,2,2) LReLU.02 Conv(64,4,2,1) BN LReLU.02 Conv(128,4,2,1) BN LReLU.02 "
                "Conv(256,4,2,1) BN LReLU.02 Conv(1,4,2,1)", 693_249),
    "mlp": ("256 BN ReLU 512 BN ReLU 1024 BN ReLU 1024 Tanh", 1_714_432,
            "512 LReLU.2 256 LReLU.2 128 LReLU.2 1", 689_153),
    "ring": ("128 ReLU 128 ReLU 2 Tanh", 17_154, "128 LReLU.2 1", 513),
}


def notation(layer):
    """A layer as the table above writes it; layers that only reshape or upsample are left out."""
    name = type(layer).__name__
    if name.startswith("Conv"):
        sizes = layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0]
        return f"Conv{'T' * ('Transpose' in name)}{sizes}".replace(" ", "")
    return {"BatchNorm1d": "BN", "BatchNorm2d": "BN", "ReLU": "ReLU", "Tanh": "Tanh",
            "LeakyReLU": f"LReLU{getattr(layer, 'negative_slope', 0)}".replace("0.", "."),
            "Linear": str(getattr(layer, "out_features", ""))}.get(name, "")


def count(net):
    return sum(p.numel() for p in net.parameters())


@parametrize("preset", LAYERS)
def test_networks_have_the_courses_layers(preset):
    """The table above; the numbers of parameters also tell which layers have a bias."""
    found = []
    for net in build(preset):
        found += [" ".join(filter(None, map(notation, net))), count(net)]
    assert found == [*LAYERS[preset]]


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


EQUATIONS = {  # what D minimises, and what G minimises
    "gan": (lambda real, fake: bce(real, 1) + bce(fake, 0), lambda real, fake: bce(fake, 1)),
    "saturating": (lambda real, fake: bce(real, 1) + bce(fake, 0),
                   lambda real, fake: -bce(fake, 0)),
    "lsgan": (lambda real, fake: ((real - 1) ** 2).mean() / 2 + (fake ** 2).mean() / 2,
              lambda real, fake: ((fake - 1) ** 2).mean()),
    "wgan": (lambda real, fake: fake.mean() - real.mean(), lambda real, fake: -fake.mean()),
    "wgan-gp": (lambda real, fake: fake.mean() - real.mean(), lambda real, fake: -fake.mean()),
    "r3gan": (lambda real, fake: bce(real - fake, 1), lambda real, fake: bce(fake - real, 1)),
}


def losses(real, fake):
    """What D and what G minimise in each training step of gan.py, where D answers these logits: the
    identity plays both networks, on a batch whose pictures and noise are the logits."""
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
    """One-hots side by side; ln 12 + ln 11 of a D that knows nothing, 0 of one that knows all. D
    learns the classes from real pictures only, G from its own."""
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
    """The states of a textbook loop, a generator, after each of train's steps, with its seeds."""
    for step in range(cfg.steps + 1):
        if step:
            torch.manual_seed(cfg.seed * 1_000_003 + step)
        yield next(steps)


def some(x, n):
    """n random pictures of uint8 x, in [-1, 1]."""
    return x[torch.randint(len(x), (n,))] / 127.5 - 1


def take_step(opt, loss):
    """One step of an optimiser that reduces a loss."""
    opt.zero_grad()
    loss.backward()
    opt.step()


def textbook_gan(cfg, draw):
    """The training loop in the plainest words, as tutorials have it: float32 NCHW, sigmoid and
    binary cross entropy, plain Adam, .item() each step. draw() gives real pictures. Yields (G, D)
    before the first step and after each."""
    torch.manual_seed(cfg.seed)
    G, D = gan.networks(cfg)
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), cfg.lr, (cfg.beta1, cfg.beta2))
                    for net in (G, D)]
    if cfg.d_opt == "rmsprop":
        opt_D = torch.optim.RMSprop(D.parameters(), cfg.lr)
    loss_of_D, loss_of_G = EQUATIONS[cfg.loss]
    yield G, D
    while True:
        for _ in range(cfg.d_steps):
            x = draw()
            x_fake = G(torch.randn(cfg.batch, cfg.z))
            loss_D = loss_of_D(D(x), D(x_fake.detach()))
            if cfg.gp:
                loss_D += cfg.gp * gan.gradient_penalty(D, x, x_fake)
            if cfg.r1 and torch.initial_seed() % 1_000_003 % 2 == 0:    # in every second step
                loss_D += 2 * cfg.r1 * gan.r1_penalty(D, x)
                loss_D += 2 * cfg.r2 * gan.r1_penalty(D, x_fake)
            take_step(opt_D, loss_D)
            if cfg.clip:
                for w in D.parameters():
                    w.data.clamp_(-cfg.clip, cfg.clip)
        if cfg.loss == "lsgan":                     # the emoji handout draws noise anew
            draw()
            x_fake = G(torch.randn(cfg.batch, cfg.z))
        after = D(x_fake)
        loss_G = loss_of_G(D(x) if cfg.loss == "r3gan" else None, after)
        take_step(opt_G, loss_G)
        loss_G.item()
        yield G, D


@parametrize("changes", [
    {}, dict(r1=9., penalty_every=2), dict(loss="lsgan", gp=9.), dict(loss="wgan", g_opt="adam"),
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


def test_lazy_penalties():
    """Every fourth step has four times the weight, the others have none."""
    cfg = gan.config("anime", 1)
    assert [gan.step_settings(cfg, step)["r1"] for step in (4, 5)] == [4 * .3, 0]


def test_mistake_6_samples_in_training_mode():
    """In eval mode a picture depends on its own z alone; G is left as it was."""
    G, _ = build("dcgan")
    z = torch.randn(8, 16)
    c = torch.zeros(8, 0)
    assert torch.equal(gan.sample(G, z[:1], c[:1]), gan.sample(G, z, c)[:1]) and G.training
    assert not torch.allclose(G(z)[:1], G(z[:2])[:1])


@parametrize("preset", ["dcgan", "emoji", "text2img", "cwgan", "ring"])
@parametrize("loss, passes", dict(gan=3, saturating=3, lsgan=3, wgan=11, acgan=3, r3gan=4,
                                  **{"wgan-gp": 16}).items())
def test_mistake_7_real_and_fake_in_one_batch(loss, passes, preset, tmp_path, monkeypatch):
    """Batch norm of D in one pass over both would mix their statistics: D has a pass of its own for
    real pictures, for fakes, and for G's update. Every loss trains on every network; only class
    logits that nobody reads are refused."""
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
    assert seen == passes * [cfg.batch] and Path("000001.png").is_file()


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


def test_networks_fit_the_handouts_loops():
    """CSC413's gan_training_loop as the handout writes it: noise (N, dim, 1, 1), SpectralNorm(layer)
    is our spectral_norm(layer), D's answer is squeezed. And CS763's conditional lab, with
    BCEWithLogitsLoss where it, like the Tsinghua train_step, has BCELoss."""
    SpectralNorm = gan.spectral_norm
    G, D = build("emoji", h=4, d_h=4)
    D[0] = SpectralNorm(nn.Conv2d(3, 4, 5, 2, 2, bias=False))
    real_images = torch.randn(8, 3, 32, 32)
    fake_images = G(torch.rand(8, 100, 1, 1) * 2 - 1)
    d_real_loss = torch.mean((D(real_images).squeeze() - 1) ** 2) / 2
    d_fake_loss = torch.mean(D(fake_images.detach()).squeeze() ** 2) / 2
    d_penalty = gan.gradient_penalty(D, real_images, fake_images)
    (d_real_loss + d_fake_loss + 10 * d_penalty).backward()
    assert D[0].parametrizations.weight.original.grad.any() and G[2].weight.grad is None
    c = gan.condition(torch.arange(8), 10)
    G, _ = build("mnist28", z=110, h=4)
    _, D = build("mnist28", channels=11, h=4)
    x_fake = G(torch.cat([torch.randn(8, 100, 1, 1), c[..., None, None]], 1))
    loss = nn.BCEWithLogitsLoss()(D(gan.planes(x_fake, c)).view(-1), torch.zeros(8))
    assert abs(loss - math.log(2)) < .1 and x_fake.shape == (8, 1, 28, 28)


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
    points = data.to_uint8(data.RING)[:1, :, None, None]            # at the right, (0.75, 0)
    page = gan.ring_page(gan.config("ring"), D, points, points, 1)
    assert page.getpixel((210, 120)) == (215, 30, 30)


def test_between_prompts_and_ends():
    """t = 0 is z1, to the bit, t = 1 is z2; prompts; what the log measures; ends by rule."""
    z1, z2 = torch.randn(2, 16)
    assert torch.equal(gan.between(z1, z2, 0), z1)
    assert_close(gan.between(z1, z2, 1), z2)
    assert gan.parse_prompt("Blue hair, grey eyes") == 11 * data.HAIR.index("blue")
    x = torch.tensor([[1., -1, -1], [0, 0, 0]])                         # a red pixel, a grey one
    assert gan.saturation(x) == .5 and gan.spread(x) == approx(.5 ** .5)
    rows = [dict(step=step, spread=v) for step, v in enumerate([1, .1, .5, .2, .1, .1])]
    assert [gan.since(rows[:n], gan.is_collapsed) for n in (5, 6)] == [-1, 3]
    assert [gan.is_dead({"|dD|": 1e-4, "|dG|": g}) for g in (1e-4, 1)] == [True, False]


# ---- gan.py: runs --------------------------------------------------------------------------------

def test_compare_and_a_run_that_blows_up():
    """One line, exit 2, the last good checkpoint stays; beside a sound run: a table, a strip of
    each one's samples, their curves over each other."""
    line = "gan.py mlp --data digits --h 4 --log-every 1 --samples 200 --out "
    run(line + "sound --steps 2")
    assert "lower learning rate" in run(line + "wild --loss lsgan --lr 30", code=2)
    assert data.load_checkpoint("wild/last.pt")["step"] == 1
    shutil.copytree("sound", "more/sound")              # the same last name, another run
    done = run("data.py compare sound wild more/sound --out both")
    assert "| more/sound | 2 |" in done and "| sound | 2 |" in done and "| blew up at |\n" in done
    assert Path("both.md").read_text() in done
    assert Image.open("both.png").height == 3 * 72 + 4


@parametrize("changes", [
    dict(preset="wgan", decay=1, d_lr=.1), dict(preset="text2img", amp=1, sn="D"),
    dict(preset="emoji", modern=1, d_h=4, ema=.9)])
def test_resumed_is_uninterrupted_to_the_bit(changes):
    """A run that ends in step 6 goes on from step 3. And the last rate."""
    cfg = small(**changes, steps=6, sample_every=3)
    x = images(40, cfg.channels, gan.NETS[cfg.net][1])
    game = partial(gan.train, cfg, x, torch.arange(40))
    game(Path("whole"), CPU)
    stop = mock.patch.object(data, "save", side_effect=[0, 0, KeyboardInterrupt])
    with stop, pytest.raises(KeyboardInterrupt):
        game(Path("parts"), CPU)
    *_, log = game(Path("parts"), CPU)
    assert [row["step"] for row in log.rows] == [1, 2, 3, 4, 5, 6]
    assert_same_bits("whole/last.pt", "parts/last.pt")
    optimiser = data.load_checkpoint("whole/last.pt")["opt_D"]
    lr = (cfg.d_lr or cfg.lr) / (3 if cfg.decay else 1)
    assert optimiser["param_groups"][0]["lr"] == approx(lr)


@posix
@parametrize("line", [
    "gan.py dcgan --data digits --device cpu --samples 200 --sample-every 2 --steps 8 --out ",
    "cyclegan.py --data faces --device cpu --batch 4 --pool 6 --sample-every 2 --steps 8 --out "])
def test_killed_and_resumed(line):
    """SIGKILL at a random moment, then the same command: the bits of the undisturbed run."""
    run(line + "whole")
    command = f"exec '{sys.executable}' '{ROOT}'/{line} killed"
    process = subprocess.Popen(command, shell=True, stdout=subprocess.DEVNULL)
    while not Path("killed/last.pt").exists() and process.poll() is None:
        time.sleep(.01)
    time.sleep(random.random() / 2)
    process.kill()
    assert process.wait() == -9
    run(line + "killed")
    assert_same_bits("whole/last.pt", "killed/last.pt")


@posix
def test_two_ranks_equal_one():
    """Gradients are averaged and a batch is shared: two processes train what one does."""
    line = "gan.py mlp --data digits --bn none --amp 0 --device cpu --steps 5 --samples 200 --out "
    run(line + "one")
    torchrun = (f"'{sys.executable}' -m torch.distributed.run --nproc-per-node 2 "
                f"'{ROOT}'/{line} two")
    subprocess.run(torchrun, shell=True, check=True, capture_output=True)
    one, two = map(data.load_checkpoint, ["one/last.pt", "two/last.pt"])
    assert_close((one["G"], one["D"]), (two["G"], two["D"]), rtol=0, atol=1e-5)


@parametrize("changes", ["", "--loss gan --r1 1", "--modern 1"])
def test_ring_runs(changes):
    """Its pictures show D's output, its GIF moves, its last line counts. Two runs on one sheet."""
    line = f"gan.py ring --steps 3 --sample-every 1 --samples 200 {changes} --out "
    done = run(line + "a") + run(line + "b --seed 1")
    assert len(re.findall(r"\n\d of 8 modes, \d+% good\n", done)) == 2
    run("data.py tile a b --out both")
    assert Image.open("both.png").size == (4 * 244, 244) and Image.open("both.gif").n_frames > 1


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
    before = Path("run/result.json").stat().st_mtime_ns
    assert "wrote run/prompt.png" in run(line + "--prompt 'red hair blue eyes'")
    assert run(line + "--draw 12").endswith("12 pictures to run/drawn, and all on run/drawn.png\n")
    assert len(os.listdir("run/drawn")) == 12
    assert Path("run/result.json").stat().st_mtime_ns == before and "step " not in run(line)
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


def test_results_that_somebody_edited(capsys):
    """Each is left out of the comparison, which goes on."""
    whole = ('{"step": 1, "seconds": 9, "metrics": {"fid": 2}, "grids": [], '
             '"log": {"step": [1], "D": [3]}}')
    for i, text in enumerate(["\ufeff" + whole, "{", "[" * 99999, whole.replace("[1]", "[1, 2]")]):
        data.write_text(f"{i}/result.json", text)
    assert data.compare("0123", "all").endswith("|\n| 0 | 1 | 9 | 2 |")
    assert capsys.readouterr().out.count("left out: ") == 3


@posix
@parametrize("line, says", [
    ("RANK=1 {}gan.py mlp --steps 0", "error: nothing is trained"),
    ("RANK=0 WORLD_SIZE=2 TORCHELASTIC_RUN_ID=1 {}cyclegan.py", "error: only gan.py can run under"),
    ("DOWNLOADS=.file {}gan.py mlp", "error: .file: File exists"),
    ("PYTHONIOENCODING=ascii {}gan.py mlp --out アニメ --steps 0", r"run      \u30a2\u30cb\u30e1"),
    ("{}gan.py mlp --help | head -1", "usage: gan.py"),
    ("ulimit -f 100; {}gan.py dcgan --data digits --out .", "error: file: File too large")])
def test_environment(line, says):
    """RANK alone, as on clusters, starts no second process; torchrun is for gan.py; a folder that
    cannot be written is noticed at once; a name that the console cannot show and a closed pipe are
    no errors; a full disk leaves no half file."""
    Path(".file").touch()
    line = line.format(f"'{sys.executable}' '{ROOT}'/")
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert f"\n{says}" in "\n" + done.stdout + done.stderr and "Traceback" not in done.stderr
    assert not Path("last.pt").exists()


def test_the_line_of_a_step_has_100_columns(capsys):
    """Whatever the numbers; those that do not fit stand in log.csv."""
    names = ["D", "G", "cycle a", "D(G(z)) before", "more"]
    log = data.Log(Path(), 10 ** 7)
    log.write(10 ** 7, 10 ** 9, **dict.fromkeys(names, torch.tensor(-1.2345e20)))
    said = capsys.readouterr().out
    assert len(said) <= 101 and said.count("-1.23e+20") == 4 and "  D(G(z)) -1" in said
    assert "more" in Path("log.csv").read_text()


def test_help_of_a_preset_shows_its_own_values():
    """dcgan's learning rate, not the default of all presets."""
    said = " ".join(run("gan.py dcgan --help").split())
    assert "learning rate (default 0.002)" in said and "--heads" not in said


@parametrize("line, says", [
    ("gan.py gcdan", "invalid choice: 'gcdan'"),
    ("gan.py dcgan --lr nan", "--lr nan must be positive"),
    ("gan.py dcgan --batch 1", "--batch 1 must be"),
    ("gan.py mlp --data digits --batch 9999999999999999", "memory: give a smaller --batch"),
    ("gan.py dcgan --steps 0", "needs out/dcgan/last.pt"),
    ("gan.py dcgan --out one --resume 0", "no finished run of this program"),
    ("gan.py dcgan --out foreign --resume 0", "another program; name another"),
    ("gan.py dcgan --out evil", "no readable checkpoint"),
    ("gan.py dcgan --seed 9999999999999999999999", "not between -9e12 and 9e12"),
    ("gan.py text2img --prompt 'mauve hair red eyes'", "orange white aqua"),
    ("gan.py dcgan --data nowhere", "no data set, folder or picture nowhere"),
    ("gan.py dcgan --device cuda:9", "use --device cpu"),
    ("gan.py dcgan --data digits --out wide", "with h 8, not 16"),
    ("gan.py dcgan --data digits --out wide --h 8 --steps 9", "fallen as for --steps 5000"),
    ("cyclegan.py --a x", "--b"),
    ("cyclegan.py --model unit --identity 1", "UNIT has"),
    ("cyclegan.py --translate x.png --out wide", "no checkpoint of"),
    ("biggan_interp.py --model published", "--model small"),
    ("fid.py digits wide", "--dump")])
def test_bad_input_is_one_line(line, says):
    """error: ... on stderr, exit code 2, and nothing half-written."""
    data.save_state("evil/last.pt", Evil())
    cfg = gan.config("dcgan", data="digits", h=8, augment=0)
    data.save_checkpoint("wide/last.pt", dict(log=data.Log(Path(), 1)), 1, cfg)
    data.save(Image.new("RGB", (40, 40)), "one/000001.png")
    data.save_state("foreign/last.pt", dict(model=0, log=3))
    assert says in run(line, code=2) and not Path("pwned").exists()
    assert not {path.suffix for path in Path().rglob("*")} & {".part", ".json"}
    assert Path("one/000001.png").exists()


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


# ---- data.py: files and downloads ----------------------------------------------------------------

@parametrize("place, pack", [("mnist", bytes), ("mnist", gzip.compress), ("MNIST/raw", bytes)])
def test_mnist_in_its_layouts(place, pack, monkeypatch):
    """Unpacked, packed again, in torchvision's folder: known by its content. Another set of the
    same name is neither read nor called damaged."""
    Path(place).mkdir(parents=True)
    for name in "images-idx3", "labels-idx1":
        path = Path(f"{place}/t10k-{name}-ubyte{'' if pack == bytes else '.gz'}")
        path.write_bytes(pack(bytes(800)))          # a header of 16 bytes, or of 8
        monkeypatch.setitem(data.MNIST, f"t10k-{name}", data.sha256_of(path))
    monkeypatch.setenv("DATA_DIR", ".")
    x, y, _ = load("mnist", 28, "test")
    assert len(x) == 1 and len(y) == 792
    path.write_bytes(b"KMNIST")
    with refused(match="another file than expected, which is .*t10k-labels"):
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
    with refused(match="2 of 3 pictures cannot be read.*: cut.jpg .*; text is no readable"):
        data.read_all([("cut.jpg", cut), "text.png", ("text", b"<html>")], 32)


def test_archives(monkeypatch):
    """Tagged faces from an archive that a Mac has packed, tags with a BOM; one that is cut is
    named."""
    monkeypatch.setattr(data, "DOWNLOADS", Path())
    tags = "\ufeff"
    for i in range(20):
        data.save(Image.new("RGB", (64, 64)), f"anime/images/{i}.PNG")
        tags += f"{i},aqua hair red eyes\n"
    data.write_text("anime/tags.csv", tags)
    data.write_text("anime/zip/._tags.csv", "")
    path = Path(shutil.make_archive("anime", "gztar", base_dir="anime"))
    shutil.rmtree("anime")
    assert load("anime", 32)[1].tolist() == 18 * [data.FACES.index("aqua hair red eyes")]
    path.write_bytes(path.read_bytes()[:-200])
    with refused(match="no whole .tar.gz"):
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
    sets = [load(name, 32, "test")[0] for name in ("mnist", "fashion", "emoji-apple", "anime")]
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
    distance, nearest = torch.cdist(ring, data.RING).min(1)
    assert nearest.bincount().min() > 2300 and distance.mean() == approx(.02 * 1.2533, rel=.02)


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


def test_labels_of_axes_are_round():
    """1, 2 or 5 times a power of ten apart."""
    assert data.ticks(0, 5000).tolist() == [0, 1000, 2000, 3000, 4000, 5000]
    assert data.ticks(6.93, 7.07).tolist() == approx([6.95, 7, 7.05])


# ---- fid.py --------------------------------------------------------------------------------------

def feats(seed, n, d, shift):
    """Features (n, d) from which the reference numbers were computed."""
    a = np.random.RandomState(0).standard_normal((d, d)) / d ** .5
    x = np.random.RandomState(seed).standard_normal((n, d))
    return x * np.arange(1, d + 1) ** -.6 @ a + shift


@parametrize("numbers", [  # n real, n fake, d, FID, KID, precision, recall, from independent code
    "1000 1000 64 0.06305284625916663 0.001201940451994954 0.803 0.778",
    "400 300 128 0.25210042538774147 0.0013874602033001615 0.8166666666666667 0.725",
    "100 120 256 1.0688771859482333 0.0009885203968855727 0.8916666666666667 0.85"])
def test_fid_golden(numbers):
    """In the last case both covariances are singular."""
    n, m, d, *wanted = map(float, numbers.split())
    real = feats(11, int(n), int(d), 0)
    fake = feats(12, int(m), int(d), .02)
    gaussians = real.mean(0), np.cov(real.T), fake.mean(0), np.cov(fake.T)
    found = [fid.fid(real, fake), fid.kid(real, fake), *fid.precision_recall(real, fake)]
    assert found == approx(wanted, rel=1e-9)
    assert fid.frechet_distance(*gaussians) == approx(wanted[0], rel=1e-9)
    textbook = fid.fid_textbook(torch.from_numpy(real), torch.from_numpy(fake))
    assert textbook.item() == approx(wanted[0], rel=1e-5)


@parametrize("n, m", [(300, 300), (300, 40), (30, 40)])
def test_fid_root_and_textbook(n, m):
    """R R = S at full rank 64 and below; fast and textbook agree at all ranks; and a shift."""
    x, y = torch.from_numpy(feats(1, n, 64, 0)), torch.from_numpy(feats(2, m, 64, .1))
    S = x.T.cov()
    assert_close(fid.sqrtm(S) @ fid.sqrtm(S), S)
    assert fid.fid(x, y) == approx(fid.fid_textbook(x, y).item(), rel=1e-5) == fid.fid(y, x)
    assert fid.fid(x, x.flip(0) + 2) == approx(4 * 64)
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 99) == (0, 0)
    z = torch.tensor([[0.], [1]]).double()          # k is 1, 1, 8: 1 + 1 - 2 (1 + 1 + 1 + 8) / 4
    assert fid.kid(z, z) == approx(-3.5)


GOLDEN_INCEPTION = """43 2 3 32 32 0 .01020453 .7375337 1.778163 .4555272 6.242733 .03604679 \
.1095517 .4477755 .508098 .05997793 .5400127
75 1 3 64 48 0 .003345659 .00910967 .5330078 .7981241 .4485522 1.789897 .5010987 .735085 \
.07209809 0 .5629397
310 1 3 299 299 0 .05636128 .03678215 .9889803 1.100866 .6516264 2.230731 .5824723 1.408158 \
.1507813 0 .8587762
411 1 3 400 350 0 .004076251 .01716496 .6325228 .9626039 .4840534 1.870847 .4794687 .8821393 \
.08591026 0 .6378217"""              # seed and shape of the pictures, a dozen of their features


def test_fid_inception_golden():
    """Names, shapes, count and, against independent code, features of the published network, read
    without num_batches_tracked."""
    net = fid.Inception()
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert digest(shapes) == "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492"
    assert count(net) == 23_850_960
    shapes = {key: shape for key, shape in shapes.items() if "num_batches" not in key}
    net.load_published({key: torch.from_numpy(a) for key, a in recipe(shapes, 11).items()})
    for row in GOLDEN_INCEPTION.split("\n"):
        numbers = [float(word) for word in row.split()]
        seed, *shape = map(int, numbers[:5])
        x = np.random.RandomState(seed).randint(0, 256, shape)
        h = dozen(net.features(torch.from_numpy(x).byte()))
        assert_close(h, torch.tensor(numbers[5:]), atol=2e-4, rtol=0)


def test_fid_disturb():
    """Each kind against its formula: max(x, 16), sigma 0.1, mean of 5 x 5."""
    x = data.to_float(images(500, 1, 8))
    assert torch.equal(data.to_uint8(fid.disturb(x, 1, .4)), data.to_uint8(x).clamp(min=16))
    assert .19 < fid.disturb(0 * x, 4, .5).std() < .21
    assert_close(fid.disturb(x, 5, 1.)[0, 0, 3, 3], x[0, 0, 1:6, 1:6].mean())


def test_fid_pretext_can_be_undone(monkeypatch):
    """turn and order say what was done."""
    monkeypatch.setattr(fid, "disturb", lambda x, *_: x)
    x = torch.rand(64, 3, 8, 8)
    bad, (turns, orders, *_) = fid.pretext(x, torch.arange(64))
    for a, b, turn, order in zip(x, bad, turns.tolist(), orders.tolist()):
        assert torch.equal(b.roll(-order, 0).rot90(-turn, (1, 2)), a)


@parametrize("name, size", [("digits", 32), ("faces-a", 64)])
def test_fid_neighbours(name, size):
    """Training pictures, slightly disturbed too, are copies; held-out pictures, sharp or soft, are
    not. One picture drawn over and over is a twin. Held-out pictures that stand in the training
    set, or twice, are left out, and where fewer than 20 are left nothing is counted."""
    train, test = [load(name, size, split)[0] for split in ("train", "test")]
    held_out, fake = test[::2], test[1::2]
    n = len(fake)

    def found(x, held_out=held_out):
        return fid.neighbours(train, held_out, x, "n.png")

    for kind in (0, 1, 2, 4, 5):
        x = data.to_uint8(fid.disturb(data.to_float(torch.cat([train[:n], fake])), kind, .2))
        assert found(x[:n])["copied"] > .9 and found(x[n:])["copied"] < .1
    a_tenth = found(torch.cat([fake[n // 10:], train[:n // 10]]))
    assert a_tenth["copied"] == approx(.1, abs=.05) and a_tenth["twins"] < .1
    twins = found(fake[:1].expand(n, -1, -1, -1), torch.cat([held_out, held_out, train[:50]]))
    assert twins["held_out"] == n and fid.alarms(twins) == "; twins 100%"
    few = found(train, torch.cat([held_out[:19], held_out[:19], train[:50]]))
    assert few["copied"] is few["twins"] is None and fid.alarms(few) == ""
    with mock.patch.object(data, "sheet") as sheet:
        found(torch.cat([fake[:20], train[-20:]]))
    (x, copy, twin), *_ = sheet.call_args.args              # the closest first
    assert torch.equal(x, copy) and not (twin == x).flatten(1).all(1).any()


def test_fid_classifier_learns_and_is_kept(monkeypatch, capsys):
    """Trained once, without touching the caller's random numbers; the accuracy is the test's.
    sanity: copies of the training set have an FID at the floor, and only `copied` sees them."""
    shutil.copytree(data.DOWNLOADS / "cache", "cache")
    monkeypatch.setattr(data, "DOWNLOADS", Path())
    monkeypatch.setattr(fid, "STEPS", 100)
    before = torch.get_rng_state()
    net = fid.classifier("digits", 32)
    again = fid.classifier("digits", 32)
    assert torch.equal(before, torch.get_rng_state())
    assert capsys.readouterr().out.count("training") == 1
    x, y, _ = load("digits", 32, "test")
    right = again.predict(x)[0] == y
    assert net.accuracy == again.accuracy == [right.double().mean().item()]
    assert net.accuracy[0] > .8
    fid.sanity(net, "digits", 200)                  # the floor, 14 ways to spoil pictures, copies
    rows = [text.split(" | ") for text in capsys.readouterr().out.splitlines()[2:]]
    floor, *_, worst, copies = [float(row[2]) for row in rows]
    assert len(rows) == 16 and worst > 2 * floor and copies < 1.5 * floor
    assert rows[0][-1] < "0.10" and rows[-1][-1] > "0.95"


def test_fid_stacked_is_the_digits_classifier_three_times():
    """Features side by side, label 100 red + 10 green + blue, confidences multiplied; every
    predicted class is a mode; KL is ln 1000 where all samples are of one class."""
    one, net = [fid.classifier(name, 32) for name in ("digits", "stacked-digits")]
    x, y, classes = load("stacked-digits", 32, "test")
    x, y = x[:2000], y[:2000]
    seen, sure = net.predict(x)
    digits, each = zip(*[one.predict(x[:, i:i + 1]) for i in range(3)])
    assert torch.equal(seen, 100 * digits[0] + 10 * digits[1] + digits[2])
    assert_close(sure, each[0] * each[1] * each[2])
    assert_close(net.features(x[:9])[:, 128:256], one.features(x[:9, 1:2]))
    assert net.accuracy == [(seen == y).double().mean().item()]
    assert fid.count(net, x, y, classes)["modes"] == len(seen.unique())
    assert fid.count(net, x[:1], y, classes)["KL"] == approx(math.log(1000))


def test_fid_count(monkeypatch):
    """Faces: label = 11 * hair + eyes; the table counts eyes asked (rows) against eyes seen."""
    net = fid.Classifier(3, 16, (12, 11))
    x = torch.full((4, 3, 16, 16), 20).byte()
    hair, eyes = net.attributes(x[:, :1])                   # grey is colour, too
    assert torch.equal(net.predict(x)[0], 11 * hair + eyes)
    net.background = 7
    seen = torch.tensor([12, 12, 23, 130])
    monkeypatch.setattr(net, "predict", lambda x: (seen, torch.ones(4)))
    r = fid.count(net, x, torch.arange(132), data.FACES, torch.tensor([12, 13, 12, 131]))
    wanted = {"modes": 3, "rarest": 0, "background": 20, "hair accuracy": .75,
              "eyes accuracy": .5, "entropy": approx(1.5 * math.log(2) / math.log(132)),
              "KL": approx(math.log(132) - 1.5 * math.log(2))}
    assert r | wanted == r and r["counts"][12] == 2
    table = r["eyes asked seen"]
    assert (table[1][1], table[2][1], table[10][9]) == (2, 1, 1)


def test_fid_count_sees_that_a_blur_is_no_class(monkeypatch):
    """A class is drawn if a tenth of its share in the data shows it with a confidence over 0.9."""
    net = fid.Classifier(1, 32, (10,))
    net.background = 0
    seen = torch.arange(10).repeat(100)
    for sure, modes in (torch.full((1000,), .89), 0), (torch.linspace(0, 1.0001, 1000), 10), (
            .95 * (seen != 3) + .95 * (torch.arange(1000) < 91) * (seen == 3), 9):
        monkeypatch.setattr(net, "predict", lambda x: (seen, sure))
        assert fid.count(net, images(1000), seen, data.DIGITS)["modes"] == modes


def test_fid_against_and_line():
    """The floor is taken at the n of the comparison, and line says where one of them differs, and
    with what the FID of a classifier may be compared."""
    net = fid.Classifier(1, 32, (10,))
    x = load("digits", 32)[0][:900]
    r = fid.against(net, x, x[:450], "digits")
    assert "compares with itself only, n = 450, real-vs-real floor" in fid.line(r)
    assert r["floor_n"] == 450 and "itself" not in fid.line(r | dict(features="inception"))
    assert fid.scores(net, x, 255 - x[:200])["fid"] > 5 * max(r["fid"], r["floor"])
    few = fid.line(fid.scores(net, x[:100], x[:300]))
    assert "n = 100 real, 300, real-vs-real floor" in few and few.endswith(" at n = 50)")


@parametrize("axis", [1, 3])
def test_fid_arrays(axis):
    """Channels first, channels last, none."""
    x = images(9, 3, 8)
    np.save("a.npy", x.movedim(1, axis))
    np.save("grey.npy", x[:, 0])
    assert torch.equal(fid.array("a.npy"), x) and torch.equal(fid.array("grey.npy"), x[:, :1])
    os.truncate("a.npy", 999)
    with refused(match="greater than file size"):           # its header could claim petabytes
        fid.array("a.npy")


X = np.arange(9 * 192).reshape(9, 8, 8, 3).astype(np.uint8)


@parametrize("x, says", [
    (X / 255, "(x * 255).round()"), (X / 127.5 - 1, "((x + 1) * 127.5).round()"),
    (X / 1., "(x).round()"), (X > 9, "(x * 255)"), (X[0], "x[None]"), (X[:0], "zero-size"),
    (X[..., [0, 1, 2, 0]], "x[..., :3]"), (X.reshape(9, -1), "x.reshape"), (X[0, 0, 0, 0], "()"),
    (np.array([None]), "objects"), ({"a": X}, "['a']")])
def test_fid_arrays_say_how_to_convert_them(x, says):
    """An .npz under another name, too."""
    with open("a.npy", "wb") as f:
        np.savez(f, **x) if isinstance(x, dict) else np.save(f, x)
    with refused(match=re.escape(says)):
        fid.array("a.npy")


def test_fid_words():
    """An existing path wins, a colon starts a split only before train, test or all; photographs are
    read no larger than what the features look at, and the digits at that side."""
    assert fid.split_of("mnist:test") == ("mnist", "test")
    assert fid.split_of("run 10:30") == ("run 10:30", "train")
    Path("odd:test").mkdir()
    assert fid.split_of("odd:test") == ("odd:test", "train")
    for i in range(20):
        data.save(Image.new("L", (70, 50 + i), 12 * i), f"photos/{i}.png")
    assert fid.source("photos/", 299, fid.Inception).shape == (20, 3, 50, 50)
    said = run("fid.py digits photos/")
    assert "1 x 32 x 32" in said and f"at {data.DOWNLOADS}/pt_inception" in said
    assert "photos/0.png is one picture: name a folder" in run("fid.py photos/0.png x", code=2)


# ---- cyclegan.py ---------------------------------------------------------------------------------

def faces():
    """Both styles of the drawn faces."""
    return [cyclegan.load_style(name, 32, "cpu") for name in cyclegan.PAIRS["faces"]]


@parametrize("make, parameters, shape", [
    (cyclegan.CycleGenerator, 144_448, (2, 3, 32, 32)), (cyclegan.cycle_discriminator, 262_048,
    (2, 1)), (cyclegan.ResNetGenerator, 11_378_179, (2, 3, 32, 32)),
    (cyclegan.PatchGAN, 2_764_737, (2, 1, 2, 2)),
])
def test_cyclegan_networks_are_the_published_ones(make, parameters, shape):
    net = make()
    assert count(net) == parameters and net(torch.zeros(2, 3, 32, 32)).shape == shape


def paste(script, names, skeleton):
    """What a student has who copies these definitions into a notebook with the handout's code."""
    notebook = {"torch": torch, "nn": nn, "F": F}
    for name in names.split():
        exec(inspect.getsource(getattr(script, name)), notebook)
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


@parametrize("spectral_norm", [False, True])
def test_skeleton_dcgenerator(spectral_norm):
    """The emoji handout's class, filled in with our upconv."""
    G = paste(cyclegan, "conv upconv", DCGENERATOR)["DCGenerator"](100, 32, spectral_norm)
    assert count(G) == 467_488 and len(G(torch.rand(2, 100, 1, 1))) == 2
    for layers in G.children():
        (weight,) = [m.weight for m in layers if isinstance(m, nn.Conv2d)]
        sigma = torch.linalg.svdvals(weight.flatten(1))[0]
        assert (abs(sigma - 1) < .1) == spectral_norm


CYCLEGAN_TRAINING_LOOP = """
class DCDiscriminator(nn.Module):
    def __init__(self, conv_dim=64, spectral_norm=False):
        super().__init__()
        self.conv1 = conv(3, conv_dim, 5, 2, 2, spectral_norm=spectral_norm)
        self.conv2 = conv(conv_dim, 1, 16, 1, 0, False, spectral_norm=spectral_norm)

    def forward(self, x):
        return self.conv2(F.relu(self.conv1(x))).squeeze()


def cyclegan_training_loop(dataloader_X, dataloader_Y, lr=3e-4, beta1=0.5):
    G_XtoY = CycleGenerator(conv_dim=4, init_zero_weights=True)
    G_YtoX = CycleGenerator(conv_dim=4, init_zero_weights=True)
    D_X = DCDiscriminator(conv_dim=4, spectral_norm=True)
    D_Y = DCDiscriminator(conv_dim=4, spectral_norm=True)
    yield G_XtoY, D_Y
    g_params = list(G_XtoY.parameters()) + list(G_YtoX.parameters())
    d_params = list(D_X.parameters()) + list(D_Y.parameters())
    g_optimizer = torch.optim.Adam(g_params, lr, [beta1, 0.999])
    d_optimizer = torch.optim.Adam(d_params, lr, [beta1, 0.999])
    for images_X, images_Y in zip(dataloader_X, dataloader_Y):
        yield step_cyclegan(G_XtoY, G_YtoX, D_X, D_Y, g_optimizer, d_optimizer, images_X, images_Y)
"""


def test_skeleton_cyclegan_training_loop():
    """The handout's loop and networks; its D returns (N,). The last batches differ in length."""
    names = "conv upconv ResnetBlock CycleGenerator descend least_squares cycle_loss step_cyclegan"
    loop = paste(cyclegan, names, CYCLEGAN_TRAINING_LOOP)["cyclegan_training_loop"]
    x = torch.rand(4, 3, 32, 32)
    (G, D), *found = loop(20 * [x] + [x[:2]], 20 * [-x] + [-x[:3]])
    assert D(x).shape == (4,) and found[20]["G"].isfinite()
    assert found[19]["D"] < found[0]["D"] and found[19]["cycle"] < found[0]["cycle"]
    assert G[0][0].weight.std() < .01 < G[5][1].weight.std()            # init_zero_weights


def test_mistake_10_shared_layers_twice_in_the_optimiser(tmp_path):
    """UNIT's two shared blocks are in the optimiser once, and on every path. The pools are used,
    and in step 3 of 3 the rate has fallen to lr / 1.5."""
    cfg = cyclegan.config(model="unit", steps=3, batch=2, pool=5, decay=1)
    G, *_ = cyclegan.train(cfg, *faces(), tmp_path, CPU)
    saved = data.load_checkpoint("last.pt")
    optimiser = saved["opt_G"]["param_groups"][0]
    assert len(optimiser["params"]) == len(list(G.parameters()))
    assert optimiser["lr"] * 1.5 == approx(1e-4) and optimiser["weight_decay"] == 1e-4
    assert len(saved["pool_a"]["held"]) == len(saved["pool_b"]["held"]) == 5
    shared = [G.into.body[0].weight, G.outof.body[0].weight]
    for way in "ab", "ba", "aa", "bb":
        loss = G(torch.randn(1, 3, 32, 32), way).norm()
        assert all(grad.any() for grad in torch.autograd.grad(loss, shared))


def test_cyclegan_pool_shows_old_pictures_half_the_time():
    pool = cyclegan.ImagePool(50)
    x = torch.arange(4050.)
    ages = x - pool(x)                          # of the first 50 it is 0
    assert .47 < (ages > 0).float().mean() < .53            # sigma .008
    assert ages.mean().item() == approx(50, rel=.15)     # replaced once in 100 draws


class Toy(nn.Module):
    """G_ab adds 1, G_ba doubles, UNIT's parts likewise, D returns the mean. The weight is 1."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def encode(self, x, style):
        return x + self.one if style == "a" else 2 * x * self.one

    def decode(self, z, style):
        return z + 3 if style == "a" else 5 * z

    def forward(self, x):
        return self.one * x.mean((1, 2, 3))


def test_cyclegan_steps_are_their_equations(monkeypatch):
    """Of black pictures a = 0 and white ones b = 1, each with 12 numbers. CycleGAN's L1 is their
    sum, UNIT's their mean. Without UNIT's noise; the pools add to the fakes that D sees."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    G, D = Toy(), Toy()
    opts = [torch.optim.SGD(net.parameters(), 0.) for net in (G, D)]    # nothing moves
    a, b = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    rest = [D, D, *opts, a, b, 3., .1, .5]
    pools = dict(pool_a=lambda x: x - 1, pool_b=lambda x: x + 2)
    ab, ba = [partial(G.encode, style=style) for style in "ab"]
    found = [cyclegan.step_cyclegan(ab, ba, *rest, **pools), cyclegan.step_unit(G, *rest, **pools)]
    want = [{"D": (1 + 1 + 0 + 9) / 2, "G": 3 * (1 + 0),                # fakes 2 and 1
             "cycle": .1 * 12 * (2 + 2), "identity": .05 * 12 * (0 + 1)},
            {"D": (1 + 16 + 0 + 49) / 2, "G": 3 * (16 + 16),            # mu 1 and 2, fakes 5 and 5
             "reconstruction": .1 * (4 + 9), "cycle": .1 * (13 + 29),
             "kl": .5 * (1 + 4), "cycle kl": .5 * (100 + 36)}]          # mu_ab 10, mu_ba 6
    for last, numbers in zip(found, want):
        assert {name: last[name].item() for name in numbers} == approx(numbers)


def textbook_cyclegan(cfg, batches):
    """CycleGAN in the plainest words: D and G each translate anew. Yields the losses of D and G,
    and G and D, after a step."""
    torch.manual_seed(cfg.seed)
    G, D = cyclegan.networks(cfg)
    G_ab, G_ba, D_a, D_b = *G.values(), *D.values()
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), cfg.lr, (.5, .999)) for net in (G, D)]
    mse = F.mse_loss
    for a, b in batches:
        fake_a, fake_b = G_ba(b).detach(), G_ab(a).detach()
        ones = torch.ones(len(a), 1)
        loss_D = mse(D_a(a), ones) + mse(D_a(fake_a), 0 * ones)
        loss_D = (loss_D + mse(D_b(b), ones) + mse(D_b(fake_b), 0 * ones)) / 2
        take_step(opt_D, loss_D)
        fake_a, fake_b = G_ba(b), G_ab(a)
        loss_G = cfg.lambda_gan * (mse(D_a(fake_a), ones) + mse(D_b(fake_b), ones))
        back = (G_ba(fake_b) - a).abs().sum() + (G_ab(fake_a) - b).abs().sum()
        if cfg.identity:
            back += cfg.identity * ((G_ba(a) - a).abs().sum() + (G_ab(b) - b).abs().sum())
        take_step(opt_G, loss_G + cfg.lambda_cycle * back / len(a))
        yield loss_D.item(), loss_G.item(), G, D


def test_cyclegan_trains_as_the_textbook(tmp_path):
    """Two steps: the same losses, the same networks. G is scored by the updated D."""
    cfg = cyclegan.config(steps=2, batch=4, amp=0, lambda_gan=9., lambda_cycle=.03, identity=.5)
    styles = faces()
    *nets, log = cyclegan.train(cfg, *styles, tmp_path, CPU)
    batches = drawn(cfg, *[style.train for style in styles])
    *_, (loss_D, loss_G, *by_hand) = textbook_cyclegan(cfg, batches)
    want = {"D": loss_D, "G": loss_G, "|dG|": data.grad_norm(by_hand[0]).item()}
    assert {name: log.rows[1][name] for name in want} == approx(want, rel=1e-2)
    x = torch.randn(8, 3, 32, 32)
    for net, reference in zip(nets, by_hand):
        for way in net:
            error = net[way](x) - reference[way](x)
            assert error.abs().mean() < 2e-3                    # a mistake is .01


def test_cyclegan_scores_see_that_nothing_was_done():
    """Style b is an exact map of a's colours, G does nothing, and the headline says so."""
    a, _ = faces()
    b = a._replace(name="faces-b", train=a.train[:999],         # too few for an FID
                   test=(a.test[:, [2, 0, 1]] * .5 + 9).byte())
    G = cyclegan.CycleGAN({"ab": nn.PReLU(init=1.)})            # x -> x
    G["ba"] = G["ab"]
    m = cyclegan.scores(G, a, b, "ab")
    true = F.l1_loss(a.test / 255, b.test / 255).item()
    assert m["ab cycle"] == 0 and m["ab L1"] == m["ab L1 identity"] == approx(true)
    assert m["ab L1 colour map"] < .003
    dark = a.test // 2 + 9
    assert cyclegan.l1(cyclegan.colour_match(dark, a.test), a.test) < .01
    assert "NOT better than ab L1 colour map" in cyclegan.verdict(m, "ab")


def test_cyclegan_probe_tells_apart_what_is_apart():
    a, b = faces()
    G = cyclegan.UNIT()
    assert cyclegan.probe_accuracy(G, a, b) > .95
    G.encoder["b"] = G.encoder["a"]
    halves = [a._replace(train=a.train[i::2]) for i in (0, 1)]
    assert .4 < cyclegan.probe_accuracy(G, *halves) < .6


@parametrize("flags", ["", " --size 64 --width 4"])
def test_cyclegan_translates_files_and_trains_nothing(flags):
    """In eval mode: a picture's translation does not depend on the others of the folder."""
    for i in range(4):
        data.save(Image.new("RGB", (40, 50), (60 * i, 9, 99)), f"own/{i}.png")
    run(f"cyclegan.py --a own --b own --steps 1 --out run{flags}")
    before = Path("run/last.pt").read_bytes()
    made = []
    for source, way in ("own", "ba"), ("own/0.png", "ba"), ("own/0.png", "ab"):
        run(f"cyclegan.py --translate {source} --direction {way} --out run --steps 9 --resume 0")
        made.append(data.read_picture(f"run/translated-{way}/0-0.png").int())
    assert Path("run/last.pt").read_bytes() == before and Path("run/translated-ba.png").is_file()
    assert len(os.listdir("run/translated-ba")) == 4 and (made[0] - made[1]).abs().max() <= 1
    assert (made[2] - made[1]).abs().max() > 1


# ---- biggan_interp.py ----------------------------------------------------------------------------

GOLDEN_BIGGAN = {  # truncation: a dozen numbers of the pictures, from independent code
    1: "-.3509 -.2513 .6081 -.1732 .0427 .3385 .4939 -.3878 .2063 .5715 -.3273 -.1240",
    0.4: "-.2045 .4651 .3142 -.0958 -.0144 .0743 .0206 -.1070 .3723 .1108 -.2185 .0331",
    0.5: "-.1821 .4171 .5563 -.1872 -.0874 -.0896 .0668 -.4483 .2160 .1652 -.4569 -.1517",
    0.43: "-.4949 .2443 .4297 -.5537 -.0109 .2118 .5206 -.5188 .1029 .1490 -.4895 -.0900",
    0.415: "-.2146 .4443 .3647 -.1226 -.0671 .0179 .0045 -.2351 .3321 .1509 -.2512 -.0313",
    0.07: "-.1882 .3660 .4939 -.1568 .2469 .1018 .4585 -.4395 .5108 .0751 -.4332 -.0245",
    0.02: ".0369 .4948 .6694 -.1963 .3776 .4611 .6217 -.2487 .4568 .5766 -.1344 -.0017",
    0.14: "-.2090 .4374 .6685 -.4226 -.1027 .2937 .5190 -.3130 .4076 .3940 -.4674 -.1650",
    0.58: "-.2170 .3587 .5134 -.3874 .1703 .3040 .4704 -.2822 .3675 .1400 -.3615 .0807",
}


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
    for truncation, numbers in GOLDEN_BIGGAN.items():
        want = torch.tensor([*map(float, numbers.split())])
        assert_close(dozen(G(truncation * z, y, truncation)), want, atol=1.5e-4, rtol=0)
    torch.save({**state, key: torch.zeros(3)}, "weights.bin")
    with refused(match=key):
        biggan_interp.load_published("weights.bin", config)


def test_biggan_has_the_published_names_shapes_and_count_golden():
    with torch.device("meta"):
        G = biggan_interp.Generator()
    assert count(G) == 50_388_609
    shapes = {key: value.shape for key, value in G.state_dict().items()}
    assert len(shapes) == 506
    assert digest(shapes) == "decc3f75ba382ddfd881ebe7e41a98b6a003041564652c764a0f341a95be52f5"


def test_biggan_noise_has_the_truncated_law():
    """Of N(0, 1) on [-2, 2] the variance is 1 - 4 phi(2) / (2 Phi(2) - 1)."""
    z = biggan_interp.truncated_noise(2000, 100, .5)
    assert z.abs().max() <= 1 and z.var().item() == approx(.25 * .7737, rel=.01)


def test_biggan_tsne_is_its_equations_and_as_good_as_the_exact_method():
    data.keep_memory()                                      # three times as fast
    r = np.random.RandomState(0)
    centres = r.randn(20, 128) * 1.5
    which = r.randint(0, 20, 1000)
    x = torch.from_numpy(centres[which] + r.randn(1000, 128))       # 20 Gaussians
    P = biggan_interp.affinities(x, 30)
    assert biggan_interp.kl(P, biggan_interp.tsne(x, 30, seed=0)) <= .349   # scikit-learn: .333
    p = biggan_interp.neighbour_probabilities(x, 30)
    assert (torch.special.entr(p).sum(1).exp() - 30).abs().max() < 1e-3
    y = torch.randn(1000, 2).double().requires_grad_()
    i, j = torch.triu_indices(1000, 1000, 1)                # each pair once, so its p twice
    p = 2 * P[i, j]
    w = 1 / (1 + F.pdist(y) ** 2)
    C = (p * (p * w.sum() / w).log()).sum()
    (gradient,) = torch.autograd.grad(C, y)
    assert_close(biggan_interp.kl(P, y.detach()), C.detach())
    assert_close(biggan_interp.kl_gradient(P, y.detach()), gradient, atol=1e-10, rtol=0)


INTERPOLATE = """
def generate_linear_interpolate_sample(model, noise_vector, class1_emb, class2_emb, alpha):
    linear_emb = between_classes(class1_emb, class2_emb, alpha)
    return model(noise_vector, linear_emb)
"""


def test_biggan_interpolations_end_at_the_classes():
    """Also in the handout's function, which takes one alpha at a time."""
    notebook = paste(biggan_interp, "between_classes", INTERPOLATE)
    one = notebook["generate_linear_interpolate_sample"]
    G = biggan_interp.Generator(biggan_interp.SMALL).eval()
    z = biggan_interp.truncated_noise(1, 32)
    r1, r2 = G.embed(torch.tensor([[3], [100]]))                        # (1, 64) each
    ends = biggan_interp.sample(G, z.expand(2, -1), torch.tensor([3, 100])).int()
    single = torch.cat([one(G, z, r1, r2, alpha) for alpha in (1, 0.)])
    assert (data.to_uint8(single).int() - ends).abs().max() <= 1
    assert (biggan_interp.interpolate(G, 3, 100, z, 1.)[[0, -1]] - ends).abs().max() <= 1
    r = torch.tensor([[0.], [8], [9], [20]])
    assert biggan_interp.between_classes(r[1], r[0], [1, .25]).tolist() == [[8], [2]]
    pairs = biggan_interp.extreme_pairs(r)
    assert pairs == {"near": [[1, 2], [0, 3]], "far": [[0, 3], [1, 2]]}


def test_biggan_pairs_by_number_or_name():
    names = [*biggan_interp.COURSE.values()]
    parse = biggan_interp.parse_pairs
    assert parse("5, 1; Tiger Cat,goldfish ;", names) == [[5, 1], [0, 5]] and not parse("", names)
    for text, says in (("3, tigercat", "similar: tiger cat"), ("3, 8", "number below 8"),
                       ("3", "two classes"), ("1, 2, 3", "two classes")):
        with refused(match=says):
            parse(text, names)
    said = run("biggan_interp.py --model small --pairs '1, red hair blu eyes' --out run", 2)
    assert "similar: red hair blue eyes" in said and not Path("run").exists()


def test_biggan_losses_and_projection_are_their_equations():
    real, fake = torch.tensor([[2., .5], [-2., 3.]])
    assert biggan_interp.d_hinge(real, fake) == 2.25
    D = biggan_interp.ProjectionD(132)
    x = torch.randn(2, 3, 32, 32)
    y = torch.tensor([3, 100])
    difference = ((D.v.weight[y] - D.v.weight[y + 1]) * D.phi(x)).sum(1)
    assert_close(D(x, y) - D(x, y + 1), difference, atol=1e-5, rtol=0)
    old, new = biggan_interp.Spectral(2, 3), biggan_interp.Spectral(2, 3)
    want = [.75 * p + .25 * q for p, q in zip(old.state_dict().values(), new.state_dict().values())]
    biggan_interp.average_state(old, new, .75)
    assert_close(list(old.state_dict().values()), want)             # buffers too
    r1 = biggan_interp.conditional_r1(D, x, y)
    assert_close(r1, gan.r1_penalty(partial(D, y=y), x))


def test_biggan_sampler_has_statistics_of_its_own():
    """In eval mode it draws nearly what it drew in training mode, at each truncation."""
    G = biggan_interp.sampler(biggan_interp.Generator(biggan_interp.SMALL))
    y = torch.arange(132)
    for truncation in .5, 1.:
        z = biggan_interp.truncated_noise(132, 32, truncation)
        x = G.eval()(z, y, truncation)
        assert (x - G.train()(z, y, truncation)).abs().mean() < .2 * x.std()


def test_biggan_trains_as_the_textbook(monkeypatch, tmp_path):
    """Four steps, the fourth with R1 times 4: the losses of a plain loop; the average's decays."""
    b = biggan_interp
    decays = []
    for name, value in dict(BATCH=4, R1=99., sampler=id, sample=lambda *_: images(132, 3, 8),
                            average_state=lambda *a: decays.append(a[2])).items():
        monkeypatch.setattr(b, name, value)
    x_all, y_all = images(40, 3), torch.randint(132, (40,))
    cfg = b.Run(steps=4, log_every=1, amp=0)
    _, log = b.train(cfg, x_all, y_all, tmp_path, CPU)
    torch.manual_seed(cfg.seed)
    G, D = b.Generator(b.SMALL), b.ProjectionD(132)
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), b.LR, (0., .99)) for net in (G, D)]
    for step, row in enumerate(log.rows, 1):
        torch.manual_seed(step)
        i = torch.randint(40, (4,))
        z = torch.randn(4, 32)
        y_fake = torch.randint(132, (4,))
        x, y = x_all[i] / 127.5 - 1, y_all[i]
        x_fake = G(z, y_fake)
        loss_D = b.d_hinge(D(x, y), D(x_fake.detach(), y_fake))
        penalty = 4 * 99 * b.conditional_r1(D, x, y) if step == 4 else 0.
        take_step(opt_D, loss_D + penalty)
        loss_G = -D(x_fake, y_fake).mean()
        take_step(opt_G, loss_G)
        assert (row["D"], row["G"]) == approx((loss_D.item(), loss_G.item()), abs=.03)
    assert decays == approx([1 / 11, 2 / 12, 3 / 13, 4 / 14])


def test_biggan_runs_and_goes_on_bit_for_bit(monkeypatch):
    """Without the weights a small one is trained; after Ctrl-C, one line and exit code 130, it ends
    the same."""
    monkeypatch.setattr(biggan_interp, "BATCH", 4)
    monkeypatch.setattr(biggan_interp.SMALL, "n_stats", 2)
    monkeypatch.setattr(biggan_interp, "tsne", lambda r, *_: r[:, :2].detach().double())
    line = "biggan_interp.py --steps 4 --sample-every 2 --out "
    assert run(line + "whole").splitlines()[-1][:3] == "FID"
    with mock.patch.object(data, "save", side_effect=[0, KeyboardInterrupt]):
        assert "goes on from the last checkpoint" in run(line + "twice", code=130)
    monkeypatch.setattr(biggan_interp, "small_scores", lambda *_: None)
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
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        marks = [hasattr(x.untyped_storage(), "gpu") for x in tensors]
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda" if marks[0] else "cpu")
        if name in ("device", "_parse_to", "_has_compatible_shallow_copy_type", "__set__"):
            return func(*args, **kwargs)
        words = [str(x) for x in (*leaves, name) if isinstance(x, (str, torch.device))]
        to = [word for word in words if word in ("cuda", "cpu")]
        here = to[0] == "cuda" if to else any(marks)            # where the result belongs
        moves = bool(tensors) and here != any(marks)
        if any(x.dim() and mark != any(marks) for x, mark in zip(tensors, marks)):
            assert name == "__getitem__" and not self.hot, f"{name}: the CPU meets the GPU"
        if any(marks):
            assert name != "numpy", "numpy on the GPU"
        if self.hot:
            reads = any(marks) and name in ("item", "tolist", "__bool__", "__float__", "__int__")
            assert not moves and not reads, f"{name} waits for the GPU"
        if to:
            args, kwargs = tree_map(
                lambda x: CPU if isinstance(x, (str, torch.device)) else x, (args, kwargs))
        out = func(*args, **kwargs)
        if moves:
            out = out.clone()
        for x in tree_leaves(out):
            if here and isinstance(x, torch.Tensor):
                assert x.dtype != torch.double, f"{name}: Apple's GPUs have no float64"
                x.untyped_storage().gpu = True
        return out


def test_on_a_gpu_in_disguise(monkeypatch):
    """No device= and no .cpu() is missing, and the second step, which is not logged, never waits
    for the GPU."""
    gpu = GPU()
    seed = torch.manual_seed
    load_file = torch.load

    def load_marked(file, map_location="cpu", **words):
        move = lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x
        return tree_map(move, load_file(file, **words))

    def seed_step(n):
        gpu.hot = n % 1_000_003 == 2
        return seed(n)

    monkeypatch.setattr(torch, "load", load_marked)
    monkeypatch.setattr(torch, "manual_seed", seed_step)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(data, "gif", print)
    go = "gan.py dcgan --h 4 --batch 4 --samples 200 --steps 3 --d-opt rmsprop --device cuda --out "
    with gpu:
        run(go + "a --modern 1 --sn both --cond ac --penalty-every 2 --data faces-a --dump 9")
        run(go + "b --loss wgan-gp --cond planes --augment 1 --ema 0")
        run(go + "c --loss wgan --clip .1 --data faces-a")
        run(go + "d --loss lsgan --gp 1 --penalty mean-norm --decay 1")
        run("gan.py ring --steps 3 --loss gan --r1 1 --device cuda --out ring")
        a, b = [cyclegan.load_style(f"faces-{x}", 32, torch.device("cuda")) for x in "ab"]
        for model in "cyclegan", "unit":
            cfg = cyclegan.config(model=model, steps=3, batch=4, pool=2)
            G, *_ = cyclegan.train(cfg, a, b, Path(model), torch.device("cuda"))
        cyclegan.probe_accuracy(G, *[x._replace(train=x.train[:99]) for x in (a, b)])


# ---- what is written about it --------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "figures/README.md").read_text(encoding="utf-8")
TARGETS = re.findall(r"^#? ?([a-z][\w-]*):.*##", (ROOT / "Makefile").read_text(), re.M)


def guide():
    """[(script, name, names it brings along)] of the snippets in the README's copying guide."""
    snippets = []
    table = README.split("## Copy from here")[1].split("\n## ")[0]
    for file, names, along in re.findall(r"\| (\w+)\.py \| `([\w ]+)` \| (.*) \|", table):
        for name in names.split():
            snippets.append((sys.modules[file], name, re.findall(r"\w+", along)))
    return snippets


@parametrize("script, name, along", guide())
def test_snippets_survive_being_pasted(script, name, along):
    """With what it brings along it stands in an empty file: it uses nothing else of its own."""
    parts = [inspect.getsource(getattr(script, part)) for part in [*along, name] if part != "math"]
    source = "\n".join(parts)
    exec(source, {"torch": torch, "nn": nn, "F": F})
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not used & (vars(script).keys() - {"torch", "nn", "F", name, *along})


def test_makefile_and_readme_agree():
    """Every target is named in the README or on the page of results, and the other way round; ten
    mistakes have ten tests; all pictures exist; the README stays one page."""
    assert {*TARGETS} == {*re.findall(r"\bmake ([a-z][\w-]*)", README + RESULTS)}
    paths = re.findall(r"\((figures/\w+\.\w+)", README) + [
        f"figures/{name}" for name in re.findall(r"!\[.*\]\((.+)\)", RESULTS)]
    assert len(paths) > 9 and all((ROOT / path).exists() for path in paths)
    mistakes = [name for name in globals() if name.startswith("test_mistake_")]
    assert len(mistakes) == len(re.findall(r"^\d+\. \*\*", README, re.M)) == 10
    assert len(guide()) > 30 and README.count("\n") <= 150 and len(README.split()) <= 1500


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


# ---- python test_all.py bench: the textbook loop and ours, in turns, in one run ------------------

def batches(batch, *sets):
    """A DataLoader without end, as tutorials have it: each picture is fetched for itself."""
    pictures = torch.utils.data.TensorDataset(*sets)
    loader = torch.utils.data.DataLoader(pictures, batch, True, num_workers=1, drop_last=True)
    while True:
        for parts in loader:
            yield [x / 127.5 - 1 for x in parts]


ROWS = {  # config, steps
    "A (16,16)": (gan.config("dcgan"), 300),
    "A (100,100)": (gan.config("dcgan", z=100, h=100), 20),
    "D 64 x 64": (gan.config("anime"), 8),
    "CycleGAN": (cyclegan.CycleConfig(), 15),
}


def bench_one(row, side):
    """Prints the pictures a second of one side of one row, the second half of its steps."""
    cfg, steps = ROWS[row]
    cfg.steps = 2 * steps
    cfg.log_every = steps
    cfg.sample_every = 10 ** 9
    if row == "CycleGAN":
        x = images(4096, 3)
        style = cyclegan.Style("a", x, x[:100], None)
        textbook = textbook_cyclegan(cfg, batches(cfg.batch, x, x))
        ours = partial(cyclegan.train, cfg, style, style)
    else:
        x = images(4096, cfg.channels, gan.NETS[cfg.net][1])
        textbook = textbook_gan(cfg, batches(cfg.batch, x))
        ours = partial(gan.train, cfg, x, torch.zeros(4096).long())
    if side == "textbook":
        times = [time.perf_counter() for _ in zip(range(cfg.steps), textbook)]
        seconds = times[-1] - times[steps - 1]
    else:
        *_, log = ours(Path(tempfile.mkdtemp()), data.device("cpu"))
        seconds = log.rows[-1]["seconds"] - log.rows[1]["seconds"]
    print(steps * cfg.batch / seconds)


def rates(n, f, *words):
    """n times the calls a second, measured twice after a first one that does not count."""
    return n / np.array(timeit.repeat(partial(f, *words), repeat=3, number=1)[1:])


def show(row, plain, ours):
    """A row of the table: medians, and the ratio's median and range."""
    ratio = np.divide(ours, plain)
    print(f"| {row} | {np.median(plain):,.4g} | {np.median(ours):,.4g} | {np.median(ratio):.2f} "
          f"({ratio.min():.2f} to {ratio.max():.2f}) |", flush=True)


def bench(rounds=5):
    """The table of `make bench`, in rates, from alternating runs."""
    data.keep_memory()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| row | textbook | ours | ratio (range) |\n|---|---|---|---|")
    for row in ROWS:
        found = []
        for side in rounds * ["textbook", "ours"]:
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
        show("FID's root, d = 2048, a minute (textbook: SciPy's)",
             rates(60, scipy.linalg.sqrtm, (s1 @ s2).numpy()),
             rates(60, fid.frechet_distance, mu, s1, mu, s2))


if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    bench_one(*sys.argv[2:]) if sys.argv[2:] else bench()
