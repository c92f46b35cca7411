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
import http.server
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
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
from PIL import Image
from pytest import approx
from torch.testing import assert_close

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


# ---- helpers -------------------------------------------------------------------------------------

def golden(name):
    """A file of reference numbers; after this, `import recipe` finds how they were made."""
    path = SHARED / "golden" / f"{name}.json"
    if not path.exists():
        pytest.skip("no ../shared/golden")
    sys.path.append(str(path.parent))
    return json.loads(path.read_text())


def recipe(shapes, seed):
    """{key: shape} -> {key: float32 array}: the weights that a network has for the reference
    numbers. They come from one NumPy stream, in the order of the sorted keys, so that a few numbers
    of the output pin down the whole network. weight_u, weight_v: the top singular vectors."""
    stream = np.random.RandomState(seed)
    state = {}
    for key in sorted(shapes):
        shape = tuple(shapes[key])
        n = stream.standard_normal(shape)
        leaf = key.split(".")[-1]
        if leaf.startswith("running_var"):
            n = .7 + .7 / (1 + np.exp(-n))
        elif leaf.startswith("running_mean"):
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
    for key in [key for key in state if key.endswith("weight_orig")]:
        W = state[key].astype(float).reshape(shapes[key][0], -1)
        u = state[key[:-4] + "u"]
        for _ in range(100):                                    # power iteration
            v = W.T @ u
            v /= np.linalg.norm(v)
            u = W @ v
            u /= np.linalg.norm(u)
        state[key[:-4] + "u"] = u.astype(np.float32)
        state[key[:-4] + "v"] = v.astype(np.float32)
    return state


def dozen(x):
    """Twelve numbers of a tensor of any shape, evenly spread from its first to its last."""
    return x.flatten()[np.linspace(0, x.numel() - 1, 12).astype(int)]


def digest(shapes):
    """{key: shape} -> sha256 of all names and shapes, in the order of the sorted keys."""
    lines = [f"{key} {list(shapes[key])}" for key in sorted(shapes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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
    monkeypatch.delenv("DATA_DIR", raising=False)
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
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


# ---- gan.py: networks ----------------------------------------------------------------------------

LEAKY = "LeakyReLU(negative_slope=0.2)"
FULL, HALF = (4, 1, 0), (4, 2, 1)       # kernel, stride, padding: 1 <-> 4, and S <-> S / 2
LAYERS = {  # G and D: kind of layer; channels; kernel, stride, padding of each; batch norms;
            # activation; parameters, which also say what has a bias
    "dcgan": [("ConvTranspose2d", [64, 32, 16, 1], [FULL, HALF, HALF, HALF], 3, "ReLU()", 57_937),
              ("Conv2d", [16, 32, 64, 1], [HALF, HALF, HALF, FULL], 2, LEAKY, 42_432)],
    "emoji": [("Conv2d", [2048, 64, 32, 3], [(1, 1, 0)] + 3 * [(5, 1, 2)], 3, "ReLU()", 467_488),
              ("Conv2d", [64, 128, 256, 1], 3 * [(5, 2, 2)] + [(5, 2, 1)], 3, "ReLU()",
               1_036_096)],
    "anime": [("ConvTranspose2d", [512, 256, 128, 64, 3], [FULL] + 4 * [HALF], 4, LEAKY,
               3_576_704),
              ("Conv2d", [64, 128, 256, 512, 1], 4 * [HALF] + [FULL], 3, LEAKY, 2_765_568)],
    "mnist28": [("ConvTranspose2d", [256, 128, 64, 32, 1], 4 * [HALF] + [(2, 2, 2)], 4, "ReLU()",
                 1_098_816),
                ("Conv2d", [32, 64, 128, 256, 1], [(2, 2, 2)] + 4 * [HALF], 3,
                 "LeakyReLU(negative_slope=0.02)", 693_249)],
}


def count(net):
    return sum(p.numel() for p in net.parameters())


@parametrize("preset", LAYERS)
def test_networks_have_the_courses_layers(preset):
    """The table above, and the order of the layers."""
    nets = build(preset)
    for net, (kind, channels, kernels, norms, act, parameters) in zip(nets, LAYERS[preset]):
        bare = len(channels) - 1 - norms
        order = bare * [kind, act] + norms * [kind, "BatchNorm", act] + [kind]
        assert re.findall(r"Conv\w+|BatchNorm|\w+LU\(.*?\)", str(net)) == order
        layers = [m for m in net if kind in str(m)]
        assert [m.out_channels for m in layers] == channels
        found = [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in layers]
        assert found == kernels and count(net) == parameters
    assert "Tanh" in str(nets[0][-1]) and "Tanh" not in str(nets[1])


def test_mlp_has_its_layers():
    nets = build("mlp")
    assert [m.out_features for net in nets for m in net if hasattr(m, "out_features")] == [
        256, 512, 1024, 1024, 512, 256, 128, 1]
    assert str(nets).count("slope=0.2)") == str(nets).count("ReLU()") == 3


@parametrize("preset", gan.PRESETS)
def test_presets_make_pictures_and_logits(preset):
    """As the course has it and as one would do it today; then D has no batch norm."""
    for modern in (0, 1):
        cfg = gan.config(preset, modern)
        G, D = gan.networks(cfg)
        c = torch.zeros(2, sum(cfg.heads))
        side = gan.NETS[cfg.net][1]
        x = G(torch.cat([torch.randn(2, cfg.z), c], 1))
        assert x.shape == (2, cfg.channels, side, side)
        logits = gan.judge(D, c, cfg, x)
        assert logits.shape == (2, 1 + c.shape[1] * (cfg.cond == "ac"))
        assert torch.equal(gan.judge(D, c, cfg, x), logits) != cfg.augment
    assert "BatchNorm" not in str(D) and cfg.augment == (cfg.channels == 3)


def test_surgery():
    """Width, initial weights, activations, batch norm, spectral norm, raw pictures, noise."""
    G, _ = build("dcgan", h=100)
    assert .019 < G[4].weight.std() < .021 and G[5].weight.mean() > .9
    G, D = build("anime", h=4, act="selu", bn="D")
    assert str(G).count("SELU") == 4 and str(D).count("BatchNorm") == 3
    assert "BatchNorm" not in str(G)
    for sn, layers in ("D", 4), ("both", 8):
        assert str(build("dcgan", sn=sn)).count("SpectralNorm") == layers
    G, D = build("dcgan", raw=1)
    x = G(torch.randn(4, 16))
    assert_close(D[0](x), (x + 1) * 127.5, atol=1e-3, rtol=0)     # D sees 0 .. 255
    assert "Tanh" not in str(G)
    for noise, low in ("uniform", -1), ("uniform01", 0):
        z = gan.draw_z(5000, gan.config("dcgan", noise=noise), CPU)
        assert low <= z.min() < low + .01 and .99 < z.max() < 1


# ---- gan.py: losses and restraints ---------------------------------------------------------------

def losses(real, fake):
    """Each loss of gan.py at these logits."""
    return [gan.d_bce(real, fake), gan.g_bce(fake), gan.g_saturating(fake),
            gan.d_lsgan(real, fake), gan.g_lsgan(fake), gan.d_wgan(real, fake), gan.g_wgan(fake),
            gan.d_relativistic(real, fake), gan.g_relativistic(real, fake)]


def test_losses_are_their_equations():
    """Against sigmoid and logarithm, squares and means."""
    real, fake = torch.randn(2, 64, dtype=torch.double)
    p = real.sigmoid()
    q = fake.sigmoid()
    pair = (real - fake).sigmoid()
    assert_close(losses(real, fake), [
        -p.log().mean() - (1 - q).log().mean(), -q.log().mean(), (1 - q).log().mean(),
        ((real - 1) @ (real - 1) + fake @ fake) / 128, (fake - 1) @ (fake - 1) / 64,
        fake.mean() - real.mean(), -fake.mean(),
        -pair.log().mean(), -(1 - pair).log().mean()])


def test_mistake_1_sigmoid_before_a_loss_on_logits():
    """At D = 1/2 the loss is 2 ln 2 and falls to 0; with a sigmoid before it, it cannot."""
    zero = torch.zeros(4)
    sure = torch.full((4,), 20.)
    assert abs(gan.d_bce(zero, zero) - 2 * math.log(2)) < 1e-6 and gan.d_bce(sure, -sure) < 1e-6
    assert gan.d_bce(sure.sigmoid(), (-sure).sigmoid()) > 1


def test_mistake_2_a_sum_where_the_equation_has_a_mean():
    """Twice the batch, the same loss: else the learning rate would depend on the batch."""
    real, fake = torch.randn(2, 8)
    assert_close(losses(real.repeat(2), fake.repeat(2)), losses(real, fake))


def test_mistake_3_eps_and_eps_do_not_interpolate():
    """x_hat = eps x + (1 - eps) x_fake, one eps a sample. The slope of |x|^2 / 2 is |x|: between
    lengths 1 and 2 the penalty is E (1 - eps)^2 = 1/3; with eps and eps it is 1."""
    x = torch.full((100_000, 4), .5)
    penalty = gan.gradient_penalty(lambda x: (x ** 2).sum(1) / 2, x, 2 * x)
    assert abs(penalty - 1 / 3) < .01


@parametrize("shape", [(5, 12), (5, 3, 2, 2)])
def test_mistake_4_the_norm_instead_of_its_distance_to_1(shape):
    """A linear critic's penalty is (|w| - 1)^2, 0 at slope 1; the norm would pull D flat. R1 is
    |w|^2 / 2."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    x, x_fake = torch.randn(2, *shape)
    norm = D[1].weight.norm()
    assert_close(gan.gradient_penalty(D, x, x_fake), (norm - 1) ** 2)
    assert_close(gan.r1_penalty(D, x), norm ** 2 / 2)


@parametrize("layer, dim", [(nn.Conv2d(3, 8, 4), 0), (nn.ConvTranspose2d(8, 3, 4), 1)])
def test_spectral_norm_is_the_largest_singular_value(layer, dim):
    """W / sigma(W) has the largest singular value 1; evaluation iterates no further. BigGAN's."""
    gan.spectral_norm([layer])
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
    """One-hots side by side; ln 12 + ln 11 of a D that knows nothing, 0 of one that knows all."""
    heads = 12, 11
    c = gan.condition(torch.tensor([37, 131]), heads)       # hair 3, eyes 4; hair 11, eyes 10
    assert c.nonzero().tolist() == [[0, 3], [0, 16], [1, 11], [1, 22]]
    assert abs(gan.ac_loss(0 * c, c, heads) - math.log(132)) < 1e-5
    assert gan.ac_loss(99 * c, c, heads) == 0
    x = gan.planes(torch.zeros(2, 3, 4, 4), c)
    assert torch.equal(x[..., 0, 3], F.pad(c, (3, 0)))      # three channels, then c


def test_diff_augment():
    """Own colours and an own shift of up to an eighth a picture."""
    y = gan.diff_augment(torch.tensor([.5, 0, -.5]).view(1, 3, 1, 1).repeat(512, 1, 32, 32))
    red, green, blue = y[:, :, 16, 16].T
    strength = red - blue                           # saturation, 0 to 2, times contrast
    assert green.abs().max() <= .5 and green.std() > .25
    assert .9 < strength.mean() < 1.1 and 2 < strength.max() <= 3
    seen = y[:, 1] != 0                             # what was shifted in is 0
    assert {*seen.any(1).sum(1).tolist()} == {*seen.any(2).sum(1).tolist()} == {*range(28, 33)}


# ---- gan.py: the game ----------------------------------------------------------------------------

def small(preset="dcgan", modern=0, **changes):
    """The config of a run of seconds."""
    cfg = dict(h=4, z=8, batch=8, steps=2, amp=0, ema=0., log_every=1, sample_every=1)
    return gan.config(preset, modern, **cfg | changes)


def drawn(cfg, *sets):
    """The batches that train draws in its steps, one of each set."""
    for step in range(1, cfg.steps + 1):
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        yield [x[torch.randint(len(x), (cfg.batch,))] / 127.5 - 1 for x in sets]


def take_step(opt, loss):
    """One step of an optimiser down a loss."""
    opt.zero_grad()
    loss.backward()
    opt.step()


def textbook_gan(cfg, batches):
    """The game in the plainest words, as tutorials have it: float32 NCHW, sigmoid and BCELoss,
    plain Adam, .item() each step; or relativistic. Penalties. Yields (G, D) after a step."""
    torch.manual_seed(cfg.seed)
    G, D = gan.networks(cfg)
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), cfg.lr, (cfg.beta1, cfg.beta2))
                    for net in (G, D)]
    bce = nn.BCELoss()
    ones = torch.ones(cfg.batch, 1)
    pairs = cfg.loss == "relativistic"
    for step, (x,) in enumerate(batches, 1):
        x_fake = G(torch.randn(cfg.batch, cfg.z))
        real, fake = D(x), D(x_fake.detach())
        if pairs:
            loss_D = bce((real - fake).sigmoid(), ones)
        else:
            loss_D = bce(real.sigmoid(), ones) + bce(fake.sigmoid(), 0 * ones)
        if cfg.gp:
            loss_D += cfg.gp * gan.gradient_penalty(D, x, x_fake)
        if cfg.r1 and step % 2 == 0:
            penalty = cfg.r1 * gan.r1_penalty(D, x) + cfg.r2 * gan.r1_penalty(D, x_fake)
            loss_D += 2 * penalty
        take_step(opt_D, loss_D)
        if cfg.fresh:
            x_fake = G(torch.randn(cfg.batch, cfg.z))
        after = D(x_fake) - D(x) if pairs else D(x_fake)
        loss_G = bce(after.sigmoid(), ones)
        take_step(opt_G, loss_G)
        loss_G.item()
        yield G, D


@parametrize("changes", [
    {}, dict(fresh=1, gp=9.),
    dict(modern=1, penalty_every=2, r2=9., init="default")])
def test_mistake_5_no_detach_and_the_order_of_the_game(changes, tmp_path):
    """Two steps equal a reference: D's step leaves G alone, G plays the same fakes against the D
    just improved."""
    cfg = small(**changes)
    x_all = images()
    *nets, log = gan.train(cfg, x_all, torch.zeros(40).long(), tmp_path, CPU)
    assert log.rows[0]["D"] < 2                             # without the penalty
    *_, by_hand = textbook_gan(cfg, drawn(cfg, x_all))
    inputs = torch.randn(8, cfg.z), torch.randn(8, 1, 32, 32)
    for net, reference, at in zip(nets, by_hand, inputs):
        assert_close(net(at), reference(at), rtol=0, atol=1e-5)


def test_mistake_6_samples_in_training_mode():
    """In eval mode a picture depends on its own z alone; G is left as it was."""
    G, _ = build("dcgan")
    z = torch.randn(8, 16)
    c = torch.zeros(8, 0)
    assert torch.equal(gan.sample(G, z[:1], c[:1]), gan.sample(G, z, c)[:1]) and G.training
    assert not torch.allclose(G(z)[:1], G(z[:2])[:1])


def test_mistake_7_real_and_fake_in_one_batch(tmp_path, monkeypatch):
    """Batch norm of D in one pass over both would mix their statistics: D has a pass for the real,
    the fake, and G's step. It learns classes from the real, G from its own."""
    passes = []
    named = []
    judge = gan.judge
    ac_loss = gan.ac_loss
    monkeypatch.setattr(gan, "judge", lambda *a: passes.append(judge(*a)) or passes[-1])
    monkeypatch.setattr(gan, "ac_loss", lambda *a: named.append(a[0]) or ac_loss(*a))
    cfg = small("text2img", steps=1, d_steps=2)
    gan.train(cfg, images(40, 3, 64), torch.arange(40), tmp_path, CPU)
    assert [len(logits) for logits in passes] == 5 * [cfg.batch]
    assert_close(named, [passes[i][:, 1:] for i in (0, 2, 4)])


def test_average_and_refresh(tmp_path):
    """theta_ema = decay theta_ema + (1 - decay) theta; batch-norm statistics from its weights."""
    cfg = small(ema=.9, steps=1)
    torch.manual_seed(cfg.seed)
    first, _ = gan.networks(cfg)
    G_ema, *_ = gan.train(cfg, images(), torch.zeros(40).long(), tmp_path, CPU)
    last = data.load_checkpoint("last.pt")["G"]
    assert_close(G_ema[1].weight, .9 * first[1].weight + .1 * last["1.weight"])
    h = G_ema[:2](torch.randn(10_000, 8))           # what the first batch norm sees, (N, 16, 4, 4)
    assert_close(G_ema[2].running_var, h.var((0, 2, 3)), atol=0, rtol=.05)


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
    assert "blew up" in run(line + "sick --loss wgan --lr 1e3", code=2)
    assert data.load_checkpoint("sick/last.pt")["step"] == 1
    done = run("data.py compare sound sick --out both")
    assert "| sound | 2 |" in done and "| blew up at |\n" in done
    assert Path("both.md").read_text() in done
    assert Image.open("both.png").height == 2 * 84 + 4


@parametrize("changes", [
    dict(preset="wgan", decay=1, d_lr=.1), dict(preset="text2img", amp=1, sn="D"),
    dict(preset="emoji", modern=1, d_h=4, ema=.9)])
def test_resumed_is_uninterrupted_to_the_bit(changes):
    """A run that ends in step 6 goes on from step 3. And the last rate; clipped weights."""
    cfg = small(**changes, steps=6, sample_every=3)
    x = images(40, cfg.channels, gan.NETS[cfg.net][1])
    y = torch.arange(40)
    game = partial(gan.train, cfg, x, y)
    game(Path("whole"), CPU)
    with mock.patch.object(data, "save", side_effect=[0, 0, KeyboardInterrupt]):
        with pytest.raises(KeyboardInterrupt):
            game(Path("parts"), CPU)
    *_, log = game(Path("parts"), CPU)
    assert [row["step"] for row in log.rows] == [1, 2, 3, 4, 5, 6]
    assert_same_bits("whole/last.pt", "parts/last.pt")
    saved = data.load_checkpoint("whole/last.pt")
    for opt, lr in ("opt_G", cfg.lr), ("opt_D", cfg.d_lr or cfg.lr):
        assert saved[opt]["param_groups"][0]["lr"] == approx(lr / 3 if cfg.decay else lr)
    assert not cfg.clip or saved["D"]["0.weight"].max() == approx(cfg.clip)


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


def test_two_ranks_equal_one():
    """Gradients are averaged and a batch is shared: two processes train what one does."""
    line = "gan.py mlp --data digits --bn none --amp 0 --device cpu --steps 5 --samples 200 --out "
    run(line + "one")
    torchrun = (f"'{sys.executable}' -m torch.distributed.run --nproc-per-node 2 "
                f"'{ROOT}'/{line} two")
    subprocess.run(torchrun, shell=True, check=True, capture_output=True)
    one, two = map(data.load_checkpoint, ["one/last.pt", "two/last.pt"])
    assert_close((one["G"], one["D"]), (two["G"], two["D"]), rtol=0, atol=1e-5)


def test_learns_digits():
    """400 steps: the FID falls below a third of the untrained generator's; most digits occur."""
    found = []
    for steps in (1, 400):
        run(f"gan.py speedrun --data digits --samples 1000 --steps {steps} --out {steps}")
        found.append(data.read_run(str(steps))[1]["metrics"])
    assert found[1]["fid"] < found[0]["fid"] / 3 and found[1]["modes"] >= 6, found


def test_a_run_writes_what_it_promises():
    """Pictures, dump with labels; a finished run re-evaluates; a prompt draws one picture; fid.py
    measures it, its last line one JSON object; a trained G is used in three lines."""
    line = "gan.py text2img --data faces-a --h 4 --steps 2 --batch 4 --samples 200 --out run "
    assert ("wrote    run: conditions.png curves.png interpolation.png labels.npy last.pt log.csv "
            "result.json samples.npy training.gif\nFID") in run(line + "--dump 150")
    assert np.load("run/samples.npy").shape == (150, 64, 64, 3) and Path("run/000002.png").exists()
    ends = np.asarray(Image.open("run/interpolation.png")) == (255, 0, 0)
    assert ends.all(2).any()                        # beyond them pictures are framed red
    assert "wrote run/prompt.png" in run(line + "--prompt 'red hair blue eyes'")
    assert "step " not in run(line)
    first, *lines, last = run("fid.py run --json 1 --n 120").splitlines()
    r = json.loads(last)
    assert first.startswith("features classifier") and "not with Inception" in r["scale"]
    assert lines[-1] == fid.line(r)
    assert r["n"] == r["floor_n"] == sum(r["counts"]) == 120
    G, D = build("text2img", h=4)
    G.load_state_dict(data.load_checkpoint("run/last.pt")["G_ema"])
    assert G.eval()(torch.randn(2, 123)).shape == (2, 3, 64, 64)


@parametrize("line, says", [
    ("gan.py gcdan", "invalid choice: 'gcdan'"),
    ("gan.py dcgan --lr nan", "--lr nan must be positive"),
    ("gan.py dcgan --batch 1", "--batch 1 must be 2 or more"),
    ("gan.py dcgan --steps 0", "needs out/dcgan/last.pt"),
    ("gan.py text2img --prompt 'mauve hair red eyes'", "orange white aqua"),
    ("gan.py dcgan --data nowhere", "no data set, folder or picture nowhere"),
    ("gan.py dcgan --data empty", "holds no picture"),
    ("gan.py dcgan --data broken", "no readable picture"),
    ("gan.py dcgan --data digits --out empty/file", "name another folder"),
    ("gan.py dcgan --data digits --device cuda:9", "use --device cpu"),
    ("gan.py dcgan --data digits --out empty", "no readable checkpoint"),
    ("gan.py dcgan --data digits --out wide", "with h 8, not 16"),
    ("gan.py dcgan --data digits --out wide --h 8 --steps 9", "fallen as for --steps 5000"),
    ("data.py compare nowhere", "no finished run"),
    ("cyclegan.py --a x", "--b"),
    ("cyclegan.py --model unit --identity 1", "UNIT has"),
    ("cyclegan.py --translate x.png --out wide", "no checkpoint of"),
    ("biggan_interp.py --truncation 0", "truncation"),
    ("biggan_interp.py --model published", "--model small"),
    ("fid.py floats.npy digits:test --data digits", "convert"),
    ("fid.py digits:test broken/a.npy", "no readable .npy"),
    ("fid.py digits:test one.npy", "at least 4 and 8"),
    ("fid.py digits:test colour.npy", "pictures must be uint8 (N, C, H, W), grey"),
    ("fid.py digits wide", "--dump"),
    ("fid.py digits:test colour.npy --features inception", "--features classifier"),
])
def test_bad_input_is_one_line(line, says):
    """error: ... on stderr, exit code 2, and nothing half-written."""
    for name in ("broken/a.png", "broken/a.npy", "empty/file"):
        data.write_text(name, "half")
    torch.save(Evil(), "empty/last.pt")
    data.save_checkpoint("wide/last.pt", {}, 1, gan.config("dcgan", data="digits", h=8))
    data.save(Image.new("RGB", (40, 40)), "one/x.png")
    np.save("floats.npy", np.zeros((9, 8, 8)))
    for name, shape in dict(one=(1, 32, 32), colour=(9, 32, 32, 3)).items():
        np.save(name, np.zeros(shape, np.uint8))
    assert says in run(line, code=2) and not Path("pwned").exists()
    assert not {path.suffix for path in Path().rglob("*")} & {".part", ".json"}


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


# ---- data.py: files and downloads ----------------------------------------------------------------

def idx(shape, raw, kind=8):
    """A gzipped idx file."""
    return gzip.compress(struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + raw)


def test_idx_files():
    """Read exactly; cut, of another kind, longer, shorter, a bomb or a web page: one line."""
    raw = bytes(range(18))
    whole = idx((2, 3, 3), raw)
    Path("x.gz").write_bytes(whole)
    assert data.read_idx("x.gz").ravel().tolist() == [*range(18)]
    for bad in (whole[:-9], idx((2, 3, 3), raw, 9), idx((2, 3, 2), raw), idx((2, 3, 4), raw),
                idx((1 << 31, 9, 9), raw), b"<html>"):
        Path("x.gz").write_bytes(bad)
        with refused(match="no whole idx file"):
            data.read_idx("x.gz")


def test_mistake_8_convert_rgb_shows_what_is_transparent():
    """A transparent picture is composited on white; convert("RGB") alone shows green."""
    im = Image.new("RGBA", (40, 20), (0, 90, 0, 0))
    im.save("x.png")
    assert im.convert("RGB").getpixel((0, 0)) == (0, 90, 0)
    x = data.read_picture("x.png")
    assert x.shape == (3, 20, 40) and (x == 255).all()
    Image.new("P", (8, 8), 0).save("p.png", transparency=0)
    assert (data.read_picture("p.png", 1) == 255).all()


def test_folders_bombs_and_fit(monkeypatch):
    """Sub-folders are classes, any shape is cropped and scaled; a huge picture is refused."""
    for i in range(30):
        kind = ("red", "blue")[i % 2]
        data.save(Image.new("RGB", (50 + i, 40), kind), f"pets/{kind}/{i}.png")
    x, y, classes = load("pets", 32)
    assert (len(x), len(load("pets", 32, "test")[0]), classes) == (27, 3, ["blue", "red"])
    assert torch.equal(x[:, 0, 9, 9], 255 * y.byte())
    monkeypatch.setattr(data, "MAX_PIXELS", 1000)
    with refused(match="over 1,000 pixels"):
        load("pets", 16)


def test_archives(monkeypatch):
    """Tagged faces from an archive; a member that is too large and a cut archive are named."""
    monkeypatch.setattr(data, "DOWNLOADS", Path())
    for i in range(20):
        data.save(Image.new("RGB", (64, 64), "red"), f"anime/images/{i}.png")
    tags = "\n".join(f"{i},aqua hair red eyes" for i in range(20))
    data.write_text("anime/tags.csv", tags)
    path = Path(shutil.make_archive("anime", "gztar", base_dir="anime"))
    shutil.rmtree("anime")
    assert load("anime", 32)[1].tolist() == 18 * [data.FACES.index("aqua hair red eyes")]
    with mock.patch.object(data, "MAX_BYTES", 10), refused(match="refused"):
        load("anime", 64)
    path.write_bytes(path.read_bytes()[:-200])
    with refused(match="no whole archive"):
        load("anime", 64)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Answers on this machine: a file of four bytes, a cut one, a web page, or 404."""

    def do_GET(self):
        body = {"/page": b"<htm", "/whole": b"data", "/cut": b"da"}.get(self.path, b"")
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(body)


def test_downloads_try_mirrors_and_keep_nothing_bad(tmp_path, monkeypatch):
    """404, cut, a page, another hash: the next mirror; none left: one line, nothing on disk."""
    monkeypatch.setattr(data, "DOWNLOADS", Path("dl"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    bad = [here + name for name in ("none", "cut", "page", "whole")]
    Path("other").write_bytes(b"other")
    good = data.sha256_of("other")
    with pytest.raises(data.Unavailable, match="Not Found.*cut off.*web page.*wrong file.*at .*/x"):
        data.fetch("x", bad, good)
    assert not os.listdir("dl")
    path = data.fetch("x", [*bad, (tmp_path / "other").as_uri()], good)
    assert path.read_bytes() == b"other" and data.fetch("x", [], good) == path
    path.write_bytes(b"damaged")
    with refused(match="damaged or another file"):
        data.fetch("x", bad, good)
    server.shutdown()


def test_offline_a_run_keeps_the_set_it_began_with(capsys):
    """No MNIST: digits are drawn and the line says why; the run goes on with them tomorrow."""
    assert data.choose("mnist,digits", 32)[0] == "digits" and "no mnist" in capsys.readouterr().out
    data.save_checkpoint("last.pt", {}, 1, gan.config("dcgan", data="digits"))
    assert data.kept(gan.config("dcgan"), Path()) == "digits"


def test_atomic_files_survive_errors_and_a_full_disk():
    """A block that fails leaves the old file; a full disk is one line, exit 2, no half file."""
    data.write_text("x", "old")
    with pytest.raises(ValueError), data.atomic("x") as part:
        part.write_text("half")
        raise ValueError
    assert Path("x").read_text() == "old" and os.listdir() == ["x"]
    line = f"ulimit -f 100; '{sys.executable}' '{ROOT}'/gan.py dcgan --data digits --out full"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr), done.stderr
    assert not list(Path("full").glob("*.pt"))


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="no ../shared/data")
def test_real_sets(monkeypatch):
    """All can be read; MNIST is padded, not resampled."""
    monkeypatch.setenv("DATA_DIR", str(SHARED / "data"))
    for name, n in ("mnist", 60_000), ("fashion", 60_000), ("emoji-apple", 2270):
        assert len(load(name, 32)[0]) == n
    assert len(load("anime", 64, "test")[0]) == 888
    padded = load("mnist", 32, "test")[0]
    plain = load("mnist", 28, "test")[0]
    assert torch.equal(padded[..., 2:-2, 2:-2], plain)


def test_drawn_sets():
    """Seeded; the two styles show the same faces, in the colour of their label."""
    a, y = data.draw_faces("a", 5, 7, 32)
    b, _ = data.draw_faces("b", 5, 7, 32)
    assert np.array_equal(a[2:], data.draw_faces("a", 3, 9, 32)[0])
    assert [tuple(hair) for hair in b[:, :, 8, 16]] == [data.RGB[data.HAIR[k // 11]] for k in y]


def test_mistake_9_pictures_that_do_not_match_tanh():
    """uint8 -> [-1, 1] and back without loss; [0, 1] would leave half of tanh's range idle."""
    x = torch.arange(256, dtype=torch.uint8)
    assert data.to_float(x)[[0, -1]].tolist() == [-1, 1]
    assert torch.equal(data.to_uint8(data.to_float(x)), x)


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
    train = torch.cat([255 - train, 255 - train, train])    # compared in two parts and more
    held_out, fake = test[::2], test[1::2]
    n = len(fake)

    def found(x, held_out=held_out):
        return fid.neighbours(train, held_out, x, "n.png")

    for kind in (0, 1, 2, 4, 5):
        x = data.to_uint8(fid.disturb(data.to_float(torch.cat([train[-n:], fake])), kind, .2))
        assert found(x[:n])["copied"] > .9 and found(x[n:])["copied"] < .1
    a_tenth = found(torch.cat([fake[n // 10:], train[-(n // 10):]]))
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
    for size, side in (299, 50), (32, 32):
        assert fid.source("photos/", size, fid.Inception).shape == (20, 3, side, side)
    said = run("fid.py digits photos/")
    assert "1 x 32 x 32" in said and f"at\n         {data.DOWNLOADS}/pt_inception" in said
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


def test_mistake_10_shared_layers_twice_in_the_optimiser(tmp_path):
    """UNIT's two shared blocks are in the optimiser once, and on every path."""
    cfg = cyclegan.config(model="unit", steps=1, batch=2)
    G, *_ = cyclegan.train(cfg, *faces(), tmp_path, CPU)
    optimiser = data.load_checkpoint("last.pt")["opt_G"]
    assert len(optimiser["param_groups"][0]["params"]) == len(list(G.parameters()))
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


class Toy:
    """Networks of one number a pixel: G_ab adds 1, G_ba doubles, and so do UNIT's parts."""

    def __call__(self, x, way):
        return x + 1 if way == "ab" else 2 * x

    def encode(self, x, style):
        return x + 1 if style == "a" else 2 * x

    def decode(self, z, style):
        return z + 3 if style == "a" else 5 * z


def test_cyclegan_terms_are_the_equations(monkeypatch):
    """Of black pictures a = 0 and white ones b = 1, each with 12 numbers: CycleGAN's L1 is their
    sum, UNIT's their mean; KL(N(mu, 1) | N(0, 1)) is mu^2 / 2, and UNIT counts it twice."""
    monkeypatch.setattr(cyclegan, "noisy", nn.Identity())
    a, b = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    cfg = cyclegan.config(identity=.5, lambda_cycle=.1)
    fake_a, fake_b, terms = cyclegan.cycle_terms(Toy(), a, b, cfg)
    assert fake_a.unique() == 2 and fake_b.unique() == 1
    assert terms["cycle"] == approx(.1 * 12 * (2 + 2))           # back to 2 and 3
    assert terms["identity"] == approx(.05 * 12 * (0 + 1))       # 0 and 2
    fake_a, fake_b, terms = cyclegan.unit_terms(Toy(), a, b, cfg)
    assert fake_a.unique() == 5 and fake_b.unique() == 5                # mu_a 1, mu_b 2
    want = {"reconstruction": 100 * (4 + 9), "cycle": 100 * (13 + 29), "kl": .1 * (1 + 4),
            "cycle kl": .1 * (100 + 36)}                                # mu_ab 10, mu_ba 6
    assert terms == approx(want)


def textbook_cyclegan(cfg, batches):
    """CycleGAN as the exercises have it: D and G each translate anew, a loss a style. Yields D's
    loss, G's and G after a step."""
    torch.manual_seed(cfg.seed)
    G, D = cyclegan.networks(cfg)
    D_a, D_b = D.values()
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), cfg.lr, (.5, .999)) for net in (G, D))
    for a, b in batches:
        fake_a, fake_b = G(b, "ba").detach(), G(a, "ab").detach()
        loss_D = gan.d_lsgan(D_a(a), D_a(fake_a)) + gan.d_lsgan(D_b(b), D_b(fake_b))
        take_step(opt_D, loss_D)
        fake_a, fake_b, other = cyclegan.cycle_terms(G, a, b, cfg)
        loss_G = cfg.lambda_gan * (gan.g_lsgan(D_a(fake_a)) + gan.g_lsgan(D_b(fake_b)))
        take_step(opt_G, loss_G + other["cycle"])
        yield loss_D.item(), loss_G.item(), G


def test_cyclegan_step_is_the_game(tmp_path):
    """D's step, then G's on the same fakes, twice: as in the exercises."""
    cfg = cyclegan.config(steps=2, batch=4, amp=0, lambda_gan=10.)
    styles = faces()
    *_, log = cyclegan.train(cfg, *styles, tmp_path, CPU)
    batches = drawn(cfg, *[style.train for style in styles])
    *_, (loss_D, loss_G, G) = textbook_cyclegan(cfg, batches)
    want = {"D": loss_D, "G": loss_G, "|dG|": data.grad_norm(G).item()}
    assert {name: log.rows[1][name] for name in want} == approx(want, rel=1e-2)


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

def test_biggan_loads_and_draws_the_golden_pictures():
    """From a file with the published names; a wrong key is named."""
    g = golden("biggan")
    import recipe
    config = biggan_interp.Config(channel_width=8)
    key = "generator.layers.3.conv_1.weight_v"
    shapes = {key: w.shape for key, w in biggan_interp.Generator(config).state_dict().items()}
    state = {key: torch.from_numpy(w) for key, w in recipe.state(shapes, g["seed"]).items()}
    torch.save(state, "weights.bin")
    G = biggan_interp.load_published("weights.bin", config)
    z = np.random.RandomState(g["seed"] + 1).standard_normal((3, 128)).clip(-2, 2)
    z = torch.from_numpy(z).float()
    y = torch.tensor(g["classes"])
    for case in g["cases"]:
        values = G(case["truncation"] * z, y, case["truncation"]).flatten()[case["at"]]
        assert_close(values, torch.tensor(case["values"]), atol=1e-4, rtol=0)
    torch.save({**state, key: torch.zeros(3)}, "weights.bin")
    with refused(match=key):
        biggan_interp.load_published("weights.bin", config)


def test_biggan_has_the_published_names_shapes_and_count():
    with torch.device("meta"):
        G = biggan_interp.Generator()
    assert count(G) == 50_388_609
    shapes = {key: list(value.shape) for key, value in G.state_dict().items()}
    assert shapes == golden("biggan128_keys")                       # 506 of them


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
    p = biggan_interp.conditional(x, 30)
    assert (torch.special.entr(p).sum(1).exp() - 30).abs().max() < 1e-3
    y = torch.randn(1000, 2).double().requires_grad_()
    i, j = torch.triu_indices(1000, 1000, 1)                # each pair once, so its p twice
    p = 2 * P[i, j]
    w = 1 / (1 + F.pdist(y) ** 2)
    C = (p * (p * w.sum() / w).log()).sum()
    (gradient,) = torch.autograd.grad(C, y)
    assert_close(biggan_interp.kl(P, y.detach()), C.detach())
    assert_close(biggan_interp.kl_gradient(P, y.detach()), gradient, atol=1e-10, rtol=0)


def test_biggan_walks_end_at_the_classes():
    G = biggan_interp.Generator(biggan_interp.SMALL).eval()
    z = biggan_interp.truncated_noise(1, 32)
    ends = biggan_interp.sample(G, z.expand(2, -1), torch.tensor([3, 100])).int()
    assert (biggan_interp.walk(G, 3, 100, z, 1.)[[0, -1]] - ends).abs().max() <= 1
    r = torch.tensor([[0.], [8], [9], [20]])
    assert biggan_interp.between_classes(r[1], r[0], [1, .25]).tolist() == [[8], [2]]
    pairs = biggan_interp.extreme_pairs(r)
    assert pairs == {"near": [[1, 2], [0, 3]], "far": [[0, 3], [1, 2]]}


def test_biggan_losses_and_projection_are_their_equations():
    real, fake = torch.tensor([[2., .5], [-2., 3.]])
    assert (biggan_interp.d_hinge(real, fake), biggan_interp.g_hinge(fake)) == (2.25, -.5)
    D = biggan_interp.ProjectionD(132)
    x = torch.randn(2, 3, 32, 32)
    y = torch.tensor([3, 100])
    difference = ((D.v.weight[y] - D.v.weight[y + 1]) * D.phi(x)).sum(1)
    assert_close(D(x, y) - D(x, y + 1), difference, atol=1e-5, rtol=0)
    r1 = biggan_interp.conditional_r1(D, x, y)
    assert_close(r1, gan.r1_penalty(partial(D, y=y), x))


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


# ---- what is written about it --------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
TARGETS = re.findall(r"^#? ?([a-z][\w-]*):.*##", (ROOT / "Makefile").read_text(), re.M)


def guide():
    """[(script, name, names it brings along)] of the snippets in the README's copying guide."""
    snippets = []
    table = README.split("## Copying guide")[1].split("\n## ")[0]
    for row in re.findall(r"^.*\|\w+\.py: .*", table, re.M):
        along = " ".join(re.findall("`(.*?)`", row.split("|")[2])).split()
        for file, names in re.findall(r"(?:(\w+)\.py: |; )(?:weights: )?`([\w ]+)`", row):
            script = sys.modules.get(file) or script
            snippets += [(script, name, along) for name in names.split()]
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
    """Every target is named in the README and the other way round; mistakes and pictures exist."""
    assert {*TARGETS} == {*re.findall(r"\bmake ([a-z][\w-]*)", README)}
    assert all((ROOT / path).exists() for path in re.findall(r"\((figures/[^)]+)\)", README))
    mistakes = {name for name in globals() if name.startswith("test_mistake")}
    assert mistakes == {*re.findall(r"test_mistake_\w+", README)} and len(mistakes) == 10
    assert len(guide()) > 30


def test_every_documented_command_is_understood():
    """Of the README and of each target of the Makefile, whose make prints what it would run."""
    make = ["make", "-n", "-C", ROOT, *TARGETS, "PYTHON=python", "STEPS=3", "SEED=1"]
    text = README + subprocess.check_output(make, text=True)
    commands = re.findall(r"python (gan|cyclegan|biggan_interp|fid)\.py ?([^|;#`\n]*)", text)
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
