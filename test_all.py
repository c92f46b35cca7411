"""test_all.py: what the project promises, proven. `make test`, or python -m pytest test_all.py.

A test compares with a closed form, a reference operation or the numbers of ../shared/golden, made
by independent code; those, and the tests on real data, are skipped where ../shared is not there.
The ten mistakes of the README are the tests test_mistake_1 to 10: each shows the right thing and
what the wrong one would have given. `python test_all.py bench` measures the speed instead.
"""
import contextlib
import functools
import gzip
import http.server
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import biggan_interp
import cyclegan
import data
import fid
import gan

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"


# ---- helpers -------------------------------------------------------------------------------------

def golden(name):
    """A file of reference numbers."""
    path = SHARED / "golden" / f"{name}.json"
    if not path.exists():
        pytest.skip("no ../shared/golden")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    """One folder with small drawn sets and classifiers of few steps, so that no test waits."""
    folder = tmp_path_factory.mktemp("downloads")
    digits, faces = data.draw_digits, data.draw_faces
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
    """Each test in a folder of its own, without DATA_DIR, from one seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DOWNLOADS", downloads)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setenv("DOWNLOADS", str(downloads))
    torch.manual_seed(0)


@pytest.fixture
def real(monkeypatch):
    """The real data sets, where they are."""
    if not (SHARED / "data").exists():
        pytest.skip("no ../shared/data")
    monkeypatch.setenv("DATA_DIR", str(SHARED / "data"))


def run(*words, code=0, script="gan.py"):
    """A script's main with these words, as a command; its exit code must be `code`."""
    main = sys.modules[script[:-3]].main
    done = types.SimpleNamespace(code=0)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                data.run_main(lambda: main([str(word) for word in words]))
            except SystemExit as e:
                done.code = e.code
    done.stdout, done.stderr = out.getvalue(), err.getvalue()
    assert done.code == code, done.stdout + done.stderr
    return done


def differing(a, b):
    """Names of the tensors in which two checkpoints differ."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    different = []
    for part, state in a.items():
        left, right = flat(state), flat(b[part])
        different += [f"{part} {key}" for key in left if not same(left[key], right[key])]
    return [name for name in different if not name.startswith("config")]


def flat(state, key=""):
    """A nest of dicts and lists -> {path: leaf}."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list):
        items = enumerate(state)
    else:
        return {key: state}
    return {path: leaf for k, v in items for path, leaf in flat(v, f"{key}.{k}").items()}


def same(a, b):
    """Whether two leaves are equal, tensors to the bit."""
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# ---- gan.py: networks ----------------------------------------------------------------------------

LAYERS = {  # G and D of the courses: channels, kernel, stride and padding of each convolution
    "dcgan": ([(64, 4, 1, 0), (32, 4, 2, 1), (16, 4, 2, 1), (1, 4, 2, 1)],
              [(16, 4, 2, 1), (32, 4, 2, 1), (64, 4, 2, 1), (1, 4, 1, 0)]),
    "emoji": ([(2048, 1, 1, 0), (64, 5, 1, 2), (32, 5, 1, 2), (3, 5, 1, 2)],
              [(64, 5, 2, 2), (128, 5, 2, 2), (256, 5, 2, 2), (1, 5, 2, 1)]),
    "anime": ([(512, 4, 1, 0), (256, 4, 2, 1), (128, 4, 2, 1), (64, 4, 2, 1), (3, 4, 2, 1)],
              [(64, 4, 2, 1), (128, 4, 2, 1), (256, 4, 2, 1), (512, 4, 2, 1), (1, 4, 1, 0)]),
    "mnist28": ([(256, 4, 2, 1), (128, 4, 2, 1), (64, 4, 2, 1), (32, 4, 2, 1), (1, 2, 2, 2)],
                [(32, 2, 2, 2), (64, 4, 2, 1), (128, 4, 2, 1), (256, 4, 2, 1), (1, 4, 2, 1)]),
    "mlp": ([256, 512, 1024, 1024], [512, 256, 128, 1]),
}
LEAKY = "LeakyReLU(negative_slope={})"
OTHERS = {  # of each: G's activation, D's, D's first layer has batch norm, layers with a bias
    "dcgan": ("ReLU()", LEAKY.format(.2), False, (4, 0)),
    "emoji": ("ReLU()", "ReLU()", True, (0, 0)),
    "anime": (LEAKY.format(.2), LEAKY.format(.2), False, (0, 0)),
    "mnist28": ("ReLU()", LEAKY.format(.02), False, (0, 1)),
    "mlp": ("ReLU()", LEAKY.format(.2), False, (4, 4)),
}


def described(net):
    """Its convolutions or linear layers, the other layers in words, and the number of biases."""
    weights, others, biases = [], [], 0
    for m in net:
        if isinstance(m, nn.Linear):
            weights.append(m.out_features)
        elif hasattr(m, "kernel_size"):
            weights.append((m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0]))
        elif not isinstance(m, (nn.Flatten, nn.Unflatten, nn.Upsample)):
            others.append("BN" if "BatchNorm" in str(m) else str(m))
        if not hasattr(m, "num_features"):
            biases += getattr(m, "bias", None) is not None
    return weights, others, biases


@pytest.mark.parametrize("preset", LAYERS)
def test_networks_have_the_courses_layers(preset):
    """Kinds, channels, kernels, strides, paddings, slopes, biases of every layer."""
    g_act, d_act, first, biases = OTHERS[preset]
    G, D = (described(net) for net in gan.build(preset))
    assert (G[0], D[0]) == LAYERS[preset] and (G[2], D[2]) == biases
    assert G[1] == ["BN", g_act] * (len(G[0]) - 1) + ["Tanh()"]
    norm = [] if preset == "mlp" else ["BN"]
    assert D[1] == ["BN"] * first + [d_act] + (norm + [d_act]) * (len(D[0]) - 2)


@pytest.mark.parametrize("preset, changes, g, d", [
    ("dcgan", dict(z=16, h=16), 57_937, 42_432),
    ("dcgan", dict(z=100, h=16), 143_953, 42_432),
    ("dcgan", dict(z=16, h=100), 1_706_101, 1_609_200),
    ("dcgan", dict(z=100, h=100), 2_243_701, 1_609_200),
    ("emoji", {}, 467_488, 1_036_096),
    ("emoji", dict(d_h=32), 467_488, 262_048),
    ("anime", {}, 3_576_704, 2_765_568),
    ("mnist28", {}, 1_098_816, 693_249),
    ("mlp", {}, 1_714_432, 689_153),
])
def test_parameters(preset, changes, g, d):
    nets = gan.build(preset, **changes)
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [g, d]


@pytest.mark.parametrize("modern", [0, 1])
@pytest.mark.parametrize("preset", gan.PRESETS)
def test_presets_make_pictures_and_logits(preset, modern):
    """As the course has it and as one would do it today; then D has no batch norm."""
    cfg = gan.config(preset, modern)
    G, D = gan.networks(cfg)
    K, side = sum(cfg.heads), gan.NETS[cfg.net][1]
    x = G(torch.randn(2, cfg.z + K))
    assert x.shape == (2, cfg.channels, side, side) and x.abs().max() <= 1
    logits = gan.judge(D, torch.zeros(2, K), cfg, x)
    assert logits.shape == (2, 1 + K * (cfg.cond == "ac"))
    assert not modern or "BatchNorm" not in str(D) and "BatchNorm" in str(G)


def test_padding_of_the_course():
    """P = ((D_y - 1) S + K - D_x) / 2, rounded up, for 32 -> 16 -> 8 -> 4 -> 1."""
    sides = [32, 16, 8, 4, 1]
    formula = [math.ceil(((y - 1) * 2 + 5 - x) / 2) for x, y in zip(sides, sides[1:])]
    assert formula == [padding for *_, padding in LAYERS["emoji"][1]]


def test_surgery():
    """Initial weights, activations, raw pictures, noise."""
    G, _ = gan.build("dcgan", h=64)
    default, _ = gan.build("dcgan", h=64, init="default")
    assert abs(G[4].weight.std() - .02) < .001 and G[5].weight.std() > 0
    assert default[4].weight.std() < .015 and (default[5].weight == 1).all()
    G, D = gan.build("anime", h=4, act="selu", bn="D")
    assert str(G).count("SELU") + str(D).count("SELU") == 8 and "BatchNorm" not in str(G)
    G, D = gan.build("dcgan", raw=1)
    x = G(torch.randn(4, 16))
    torch.testing.assert_close(D[0](x), (x + 1) * 127.5, atol=1e-3, rtol=0)     # D sees 0 .. 255
    assert "Tanh" not in str(G) and "BatchNorm" in str(G)
    for noise, mean, std in (("normal", 0, 1), ("uniform", 0, .577), ("uniform01", .5, .289)):
        z = gan.draw_z(5000, gan.config("dcgan", noise=noise), "cpu")
        assert abs(z.mean() - mean) < .02 and abs(z.std() - std) < .02


# ---- gan.py: losses and restraints ---------------------------------------------------------------

def test_losses_are_their_equations():
    """Against sigmoid and logarithm, squares and means."""
    real, fake = torch.randn(2, 64, dtype=torch.double)
    p, q, pair = real.sigmoid(), fake.sigmoid(), (real - fake).sigmoid()
    equations = {
        "d_bce": -p.log().mean() - (1 - q).log().mean(),
        "g_bce": -q.log().mean(),
        "g_saturating": (1 - q).log().mean(),
        "d_lsgan": ((real - 1) @ (real - 1) + fake @ fake) / (2 * 64),
        "g_lsgan": (fake - 1) @ (fake - 1) / 64,
        "d_wgan": fake.mean() - real.mean(),
        "g_wgan": -fake.mean(),
        "d_relativistic": -pair.log().mean(),
        "g_relativistic": -(1 - pair).log().mean(),
    }
    for name, value in equations.items():
        torch.testing.assert_close(called(getattr(gan, name), real, fake), value)


def called(loss, real, fake):
    """loss(real, fake), or of a G's loss that takes no more, loss(fake)."""
    return loss(*(real, fake)[-len(inspect.signature(loss).parameters):])


def test_mistake_1_sigmoid_before_a_loss_on_logits():
    """At D = 1/2 the loss is 2 ln 2 and falls to 0; with a sigmoid before it, it cannot."""
    zero, sure = torch.zeros(4), torch.full((4,), 20.)
    assert abs(gan.d_bce(zero, zero) - 2 * math.log(2)) < 1e-6 and gan.d_bce(sure, -sure) < 1e-6
    assert gan.d_bce(sure.sigmoid(), (-sure).sigmoid()) > 1


def test_mistake_2_a_sum_where_the_equation_has_a_mean():
    """Twice the batch, the same loss: else the learning rate would depend on the batch."""
    real, fake = torch.randn(2, 8)
    for pair in gan.LOSSES.values():
        for loss in pair:
            once, twice = called(loss, real, fake), called(loss, real.repeat(2), fake.repeat(2))
            torch.testing.assert_close(once, twice)


def slope(w):
    """A critic whose gradient is w everywhere."""
    return lambda x: x.flatten(1) @ w


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 2, 2)])
def test_penalties_of_a_linear_critic(shape):
    w = torch.randn(12)
    x, x_fake = torch.randn(2, *shape)
    penalty = gan.gradient_penalty(slope(w), x, x_fake)
    torch.testing.assert_close(penalty, (w.norm() - 1) ** 2)
    torch.testing.assert_close(gan.r1_penalty(slope(w), x), w.norm() ** 2 / 2)


def test_mistake_3_eps_and_eps_do_not_interpolate():
    """x_hat = eps x + (1 - eps) x_fake with one eps a sample. With eps and eps x_hat were 2 eps."""
    seen = []
    x = torch.ones(64, 3, 2, 2)
    gan.gradient_penalty(lambda t: seen.append(t) or t.flatten(1).sum(1), x, x)
    torch.testing.assert_close(seen[0], x)
    gan.gradient_penalty(lambda t: seen.append(t) or t.flatten(1).sum(1), x, 0 * x)
    eps = seen[1].flatten(1)
    assert (eps.std(1) < 1e-6).all() and .2 < eps.mean(1).std() < .4


def test_mistake_4_the_norm_instead_of_its_distance_to_1():
    """The penalty is 0 at slope 1; the norm itself would pull D flat."""
    w = F.normalize(torch.randn(12), dim=0)
    x, x_fake = torch.randn(2, 5, 12)
    assert gan.gradient_penalty(slope(w), x, x_fake) < 1e-10
    assert gan.gradient_penalty(slope(0 * w), x, x_fake) == 1


@pytest.mark.parametrize("layer, dim", [(nn.Conv2d(3, 8, 4), 0), (nn.ConvTranspose2d(8, 3, 4), 1)])
def test_spectral_norm_is_the_largest_singular_value(layer, dim):
    weight = layer.weight.detach().clone()
    sigma = torch.linalg.svdvals(weight.transpose(0, dim).flatten(1))[0]
    gan.spectral_norm([layer])
    for _ in range(100):
        w = layer.weight                            # a pass, so a power iteration
    torch.testing.assert_close(w, weight / sigma)
    assert torch.equal(layer.eval().weight, layer.weight)


def test_clipping_conditions_and_the_auxiliary_classifier():
    _, D = gan.build("dcgan")
    gan.clip_weights(D, .01)
    assert max(p.abs().max() for p in D.parameters()) <= .01
    y = torch.tensor([11 * 3 + 4, 131])             # hair 3, eyes 4; hair 11, eyes 10
    c = gan.condition(y, (12, 11))
    assert c.nonzero().tolist() == [[0, 3], [0, 16], [1, 11], [1, 22]]
    logits = torch.randn(2, 23)
    by_hand = F.cross_entropy(logits[:, :12], y // 11) + F.cross_entropy(logits[:, 12:], y % 11)
    torch.testing.assert_close(gan.ac_loss(logits, c, (12, 11)), by_hand)
    x = gan.planes(torch.zeros(2, 3, 4, 4), c)
    assert x.shape == (2, 26, 4, 4) and (x[0, 3 + 3] == 1).all() and x[0].sum() == 2 * 16


def test_diff_augment():
    """Own colours and an own shift of up to an eighth a picture; differentiable."""
    x = torch.zeros(512, 1, 32, 32, requires_grad=True)
    y = gan.diff_augment(x)
    light = y[:, 0, 12:20, 12:20].flatten(1)        # a part that is there after any shift
    assert (light.std(1) < 1e-6).all() and light.abs().max() <= .5 and light.mean(1).std() > .2
    assert torch.autograd.grad(y.sum(), x)[0].sum() > 0
    x = torch.zeros(512, 1, 32, 32)
    x[:, :, 16, 16] = 1e6
    places = gan.diff_augment(x).flatten(1).argmax(1)
    assert {*(places // 32).tolist()} == {*(places % 32).tolist()} == {*range(12, 21)}


# ---- gan.py: the game ----------------------------------------------------------------------------

CPU = torch.device("cpu")


def images(n=40, channels=1, size=32):
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


def small(preset="dcgan", modern=0, **changes):
    """The config of a run of seconds."""
    cfg = dict(h=4, z=8, batch=8, steps=2, amp=0, log_every=1, sample_every=1)
    return gan.config(preset, modern, **{**cfg, **changes})


def reference(cfg, x_all):
    """The game once more, in the plainest words; without conditions. Returns (G, D)."""
    torch.manual_seed(cfg.seed)
    G, D = gan.networks(cfg)
    opt_G = torch.optim.Adam(G.parameters(), cfg.lr, (cfg.beta1, cfg.beta2))
    opt_D = torch.optim.Adam(D.parameters(), cfg.lr, (cfg.beta1, cfg.beta2))
    pairs = cfg.loss == "relativistic"
    for step in range(1, cfg.steps + 1):
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        x = x_all[torch.randint(len(x_all), (cfg.batch,))] / 127.5 - 1
        x_fake = G(torch.randn(cfg.batch, cfg.z))
        real, fake = D(x), D(x_fake.detach())
        right = (real - fake).sigmoid() if pairs else real.sigmoid() * (-fake).sigmoid()
        loss = -right.log().mean()
        for gamma, at in ((cfg.r1, x), (cfg.r2, x_fake)) if pairs else ():
            at = at.detach().requires_grad_()
            (grad,) = torch.autograd.grad(D(at).sum(), at, create_graph=True)
            loss = loss + gamma * (grad ** 2).sum() / (2 * cfg.batch)
        opt_D.zero_grad()
        loss.backward()
        opt_D.step()
        after = D(x_fake)
        opt_G.zero_grad()
        (-(after - D(x) if pairs else after).sigmoid().log().mean()).backward()
        opt_G.step()
    return G, D


@pytest.mark.parametrize("changes", [
    {}, dict(modern=1, augment=0, ema=0., penalty_every=1)], ids=["course", "modern"])
def test_mistake_5_no_detach_and_the_order_of_the_game(changes, tmp_path):
    """Two steps equal a reference: D's step leaves G alone, G plays the same fakes against the D
    just improved."""
    x_all = images()
    cfg = small(**changes)
    nets = gan.train(cfg, x_all, torch.zeros(40, dtype=torch.long), tmp_path, CPU)[:2]
    inputs = torch.randn(8, cfg.z), torch.randn(8, 1, 32, 32)
    for ours, by_hand, at in zip(nets, reference(cfg, x_all), inputs):
        torch.testing.assert_close(ours(at), by_hand(at), rtol=0, atol=1e-5)


def test_mistake_6_samples_in_training_mode():
    """In eval mode a picture depends on its own z alone; G is left as it was."""
    G, _ = gan.build("dcgan")
    z, c = torch.randn(8, 16), torch.zeros(8, 0)
    assert torch.equal(gan.sample(G, z[:1], c[:1]), gan.sample(G, z, c)[:1]) and G.training
    assert (G(z)[:1] - G(z[:2])[:1]).abs().max() > 1e-3


def test_mistake_7_real_and_fake_in_one_batch():
    """Batch norm of D in one pass over both mixes their statistics: other logits."""
    _, D = gan.build("emoji")
    x, x_fake = torch.randn(8, 3, 32, 32), 3 + torch.randn(8, 3, 32, 32)
    apart = gan.judge(D, torch.zeros(8, 0), gan.config("emoji"), x)
    assert (D(torch.cat([x, x_fake]))[:8] - apart).abs().max() > 1e-3


def test_average_and_refresh():
    """theta_ema = decay theta_ema + (1 - decay) theta; batch-norm statistics from its weights."""
    cfg = gan.config("dcgan")
    (G, _), (G_ema, _) = gan.networks(cfg), gan.networks(cfg)
    wanted = .9 * G_ema[2].weight + .1 * G[2].weight
    gan.average(G_ema, G, .9)
    torch.testing.assert_close(G_ema[2].weight, wanted)
    gan.refresh(G_ema, torch.zeros(10, 0), cfg, CPU)
    h = G_ema[:2](torch.randn(10_000, 16))          # what the first batch norm sees, (N, 64, 4, 4)
    torch.testing.assert_close(G_ema[2].running_mean, h.mean((0, 2, 3)), atol=.005, rtol=0)


def test_between_prompts_and_ends():
    """t = 0 is z1, to the bit, t = 1 is z2; colours of the course; collapse by its rule."""
    z1, z2 = torch.randn(2, 16)
    assert torch.equal(gan.between(z1, z2, 0), z1)
    torch.testing.assert_close(gan.between(z1, z2, 1), z2)
    assert gan.parse_prompt("Blue hair, grey eyes") == 11 * data.HAIR.index("blue")
    rows = [dict(step=step, spread=v) for step, v in enumerate([1, .1, .5, .2, .1, .1])]
    assert gan.since(rows, gan.is_collapsed) == 3 and gan.since(rows[:5], gan.is_collapsed) == -1
    assert gan.is_dead({"|dD|": 1e-4, "|dG|": 0}) and not gan.is_dead({"|dD|": 1e-4, "|dG|": 1})


# ---- gan.py: runs --------------------------------------------------------------------------------

def test_a_run_that_blows_up_keeps_the_last_good_checkpoint():
    """One line, exit 2, result.json says at which step, and compare shows it."""
    words = ["mlp", "--data", "digits", "--h", 4, "--out", "sick", "--log-every", 1]
    done = run(*words, "--steps", 30, "--lr", 1e30, code=2)
    assert done.stderr.startswith("error: blew up") and done.stderr.count("\n") == 1
    assert "| blew up at |" in data.compare(["sick"], "table")
    assert not Path("sick/last.pt").exists() or data.load_checkpoint("sick/last.pt")["step"] == 1


@pytest.mark.parametrize("changes", [
    dict(preset="dcgan", ema=.9, decay=1),
    dict(preset="anime", amp=1, sn="D"),
    dict(preset="emoji", modern=1, d_h=4),
    dict(preset="cwgan", gp=0., clip=.01, d_opt="rmsprop", d_steps=2),
], ids=["average and decay", "bf16 and spectral norm", "modern", "conditions and clipping"])
def test_resumed_is_uninterrupted_to_the_bit(changes, tmp_path, monkeypatch):
    cfg = small(**changes, steps=6, sample_every=3)
    x, y = images(40, cfg.channels, gan.NETS[cfg.net][1]), torch.arange(40) % 10
    gan.train(cfg, x, y, tmp_path / "whole", CPU)
    save = data.save_checkpoint

    def stop_at_3(path, parts, step, cfg):
        save(path, parts, step, cfg)
        if step == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(data, "save_checkpoint", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        gan.train(cfg, x, y, tmp_path / "parts", CPU)
    *_, log = gan.train(cfg, x, y, tmp_path / "parts", CPU)
    assert differing(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt") == []
    assert [row["step"] for row in log.rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("script, words", [
    ("gan.py", ["dcgan", "--data", "digits", "--samples", 200]),
    ("cyclegan.py", ["--data", "faces", "--batch", 4, "--pool", 6]),
])
def test_killed_and_resumed(script, words):
    """SIGKILL at a random moment, then the same command: the bits of the undisturbed run."""
    words += ["--steps", 8, "--sample-every", 2, "--log-every", 2]
    run(*words, "--out", "whole", script=script)
    command = [sys.executable, ROOT / script, *map(str, words), "--out", "killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not Path("killed/last.pt").exists() and process.poll() is None:
        time.sleep(.01)
    time.sleep(random.random() / 2)
    process.kill()
    process.wait()
    run(*words, "--out", "killed", script=script)
    assert differing("whole/last.pt", "killed/last.pt") == []


def test_two_ranks_equal_one():
    """Gradients are averaged and a batch is shared: two processes train what one does."""
    words = ["gan.py", "mlp", "--data", "digits", "--bn", "none", "--amp", "0", "--steps", "5"]
    words += ["--samples", "200", "--out"]
    words[0] = str(ROOT / words[0])
    for ranks in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
        subprocess.run([*command, *words, ranks], check=True, capture_output=True)
    one, two = (torch.load(f"{ranks}/last.pt", weights_only=True) for ranks in (1, 2))
    for net in "GD":
        for a, b in zip(one[net].values(), two[net].values()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_learns_digits():
    """400 steps: the FID falls below a third of the untrained generator's; most digits occur."""
    found = []
    for steps in (1, 400):
        run("speedrun", "--data", "digits", "--samples", 1000, "--steps", steps, "--out", steps)
        found.append(json.loads(Path(f"{steps}/result.json").read_text())["metrics"])
    assert found[1]["fid"] < found[0]["fid"] / 3 and found[1]["modes"] >= 6, found


def test_a_run_writes_what_it_promises():
    """Pictures, dump with labels; a finished run re-evaluates; a prompt draws one picture; a
    trained G is used in three lines."""
    words = ["text2img", "--data", "faces-a", "--h", 4, "--steps", 2, "--batch", 4, "--out", "run",
             "--samples", 200]
    done = run(*words, "--dump", 7)
    assert done.stdout.splitlines()[-1].startswith("FID")
    names = {path.name for path in Path("run").iterdir()}
    assert names >= {"000001.png", "000002.png", "log.csv", "last.pt", "result.json", "curves.png",
                     "training.gif", "conditions.png", "interpolation.png", "labels.npy"}
    assert np.load("run/samples.npy").shape == (7, 64, 64, 3)
    assert "wrote run/prompt.png" in run(*words, "--prompt", "red hair blue eyes").stdout
    assert "step " not in run(*words).stdout
    assert {"D(G(z)) before", "D(G(z)) after", "|dD|", "sat fake"} <= set(data.read_run("run")[3])
    G, D = gan.build("text2img", h=4)
    G.load_state_dict(torch.load("run/last.pt", weights_only=True)["G_ema"])
    assert G.eval()(torch.randn(2, 123)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("script, words, says", [
    ("gan.py", ["gcdan"], "invalid choice: 'gcdan'"),
    ("gan.py", ["dcgan", "--speed", 3], "--speed"),
    ("gan.py", ["dcgan", "--loss", "hinge"], "invalid choice: 'hinge'"),
    ("gan.py", ["dcgan", "--lr", "nan"], "--lr nan must be positive"),
    ("gan.py", ["dcgan", "--batch", 1], "--batch 1: at least 2"),
    ("gan.py", ["dcgan", "--steps", 0], "no out/dcgan/last.pt"),
    ("gan.py", ["text2img", "--prompt", "mauve hair red eyes"], "orange white aqua"),
    ("gan.py", ["dcgan", "--data", "nowhere"], "no data set or folder named nowhere"),
    ("gan.py", ["dcgan", "--data", "empty"], "holds no picture"),
    ("gan.py", ["dcgan", "--data", "broken"], "no readable picture"),
    ("gan.py", ["dcgan", "--data", "digits", "--out", "file"], "--out file is a file"),
    ("gan.py", ["dcgan", "--data", "digits", "--out", "file/in"], "name another folder"),
    ("gan.py", ["dcgan", "--data", "digits", "--device", "cuda:9"], "use --device cpu"),
    ("gan.py", ["dcgan", "--data", "digits", "--out", "evil"], "no readable checkpoint"),
    ("gan.py", ["dcgan", "--data", "digits", "--out", "wide"], "--h 8, not 16"),
    ("data.py", ["compare", "nowhere"], "no finished run"),
])
def test_bad_input_is_one_line(script, words, says):
    """error: ... on stderr, exit code 2, and nothing half-written."""
    for name in ("empty", "broken", "evil", "wide"):
        Path(name).mkdir()
    Path("file").write_text("")
    Path("broken/a.png").write_bytes(b"\x89PNG and no more")
    torch.save(Evil(), "evil/last.pt")
    data.save_checkpoint(Path("wide/last.pt"), {}, 1, gan.config("dcgan", data="digits", h=8))
    done = run(*words, script=script, code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr and not Path("pwned").exists()
    assert not list(Path().rglob("*.part")) and not list(Path().rglob("result.json"))


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_no_option_is_dead():
    """Every field is read by its script, and stands in a command of the Makefile, of the README or
    in a test."""
    files = ("Makefile", "README.md", "test_all.py")
    written = "".join((ROOT / name).read_text() for name in files)
    for script, Config in ((gan, gan.GANConfig), (cyclegan, cyclegan.CycleConfig),
                           (biggan_interp, biggan_interp.Run), (fid, fid.FIDConfig)):
        source = inspect.getsource(script) + inspect.getsource(data)
        for field in Config.__dataclass_fields__.keys() - {"sources"}:
            assert re.search(rf"\.{field}\b|\"{field}\"", source), field
            flag = rf"--{field.replace('_', '-')}\b|\b{field}=|{field}=\W"
            assert re.search(flag, written), f"{script.__name__}: no command uses {field}"


# ---- data.py: files and downloads ----------------------------------------------------------------

def idx(array, kind=8):
    """The bytes of a gzipped idx file."""
    head = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return gzip.compress(head + array.tobytes())


def test_idx_files():
    array = np.random.randint(0, 256, (3, 28, 28), np.uint8)
    whole = idx(array)
    Path("x.gz").write_bytes(whole)
    assert np.array_equal(data.read_idx("x.gz"), array)
    bomb = gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 1 << 16, 1 << 16, 1 << 16))
    short = gzip.compress(gzip.decompress(whole)[:-9])
    for raw in (whole[:-30], idx(array, 9), short, bomb, b"<html>"):
        Path("x.gz").write_bytes(raw)
        with pytest.raises(data.UserError, match="no whole idx file"):
            data.read_idx("x.gz")


def test_mistake_8_convert_rgb_shows_what_is_transparent():
    """A transparent picture is composited on white; convert("RGB") alone shows green."""
    im = Image.new("RGBA", (40, 20), (0, 90, 0, 0))
    im.save("x.png")
    assert im.convert("RGB").getpixel((0, 0)) == (0, 90, 0)
    x = data.read_picture("x.png")
    assert x.shape == (3, 20, 40) and (x == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.save("p.png", transparency=0)
    assert (data.read_picture("p.png", 1) == 255).all()


def test_folders_bombs_and_fit(monkeypatch):
    """Sub-folders are classes, any shape is cropped and scaled; a huge picture is refused."""
    for kind, colour in (("cats", "red"), ("dogs", "blue")):
        Path("pets", kind).mkdir(parents=True)
        for i in range(15):
            Image.new("RGB", (50 + i, 40), colour).save(f"pets/{kind}/{i}.png")
    x, y, classes = data.load("pets", 32)
    test = data.load("pets", 32, "test")
    assert (len(x), len(test[0]), classes) == (27, 3, ["cats", "dogs"])
    assert (x[y == 0][:, 0] == 255).all() and (x[y == 0][:, 2] == 0).all()
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    assert abs(int(data.fit(ramp, 32)[0, 0, 16]) - 32) <= 1
    monkeypatch.setattr(data, "MAX_PIXELS", 1000)
    with pytest.raises(data.UserError, match="over 1,000 pixels"):
        data.load("pets", 16)


def archive(kind, *files):
    """anime.tar.gz or anime.zip in downloads/ with these (name, bytes)."""
    path = data.DOWNLOADS / f"anime.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, raw in files:
                z.writestr(name, raw)
        return path
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in files:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_archives(kind, tmp_path, monkeypatch):
    """Tagged faces from an archive; names that lead outside write nothing; a cut one is named."""
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    files = [(f"anime/images/{i}.png", picture.getvalue()) for i in range(1, 21)]
    tags = "".join(f"{i},aqua hair red eyes\n" for i in range(1, 21)).encode()
    path = archive(kind, *files, ("anime/tags.csv", tags), ("../outside", b"x"))
    x, y, _ = data.load("anime", 32)
    assert len(x) == 18 and (y == data.FACES.index("aqua hair red eyes")).all()
    assert not (tmp_path.parent / "outside").exists()
    path.write_bytes(path.read_bytes()[:-200])
    (tmp_path / "cache/anime-32-train.npz").unlink()
    with pytest.raises(data.UserError, match="no whole archive"):
        data.load("anime", 32)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Answers on this machine: a whole file, a cut one, a web page, or 404."""

    def do_GET(self):
        body = {"/page": b"<html>moved</html>", "/whole": b"data", "/cut": b"da"}.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(4 if self.path == "/cut" else len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *words):
        pass


def test_downloads_try_mirrors_and_keep_nothing_bad(tmp_path, monkeypatch):
    """404, cut, a page, another hash: the next mirror; none left: one line, nothing on disk."""
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "dl")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = [f"http://127.0.0.1:{server.server_port}/{name}" for name in ("none", "cut", "page")]
    with pytest.raises(data.Unavailable, match="Not Found.*cut off.*web page.*put the file of"):
        data.fetch("x", urls)
    (tmp_path / "other").write_bytes(b"other")
    good = data.sha256_of(tmp_path / "other")
    whole = f"http://127.0.0.1:{server.server_port}/whole"
    with pytest.raises(data.Unavailable, match="wrong file"):
        data.fetch("x", [whole], good)
    assert not list((tmp_path / "dl").iterdir())
    path = data.fetch("x", [*urls, whole, (tmp_path / "other").as_uri()], good)
    assert path.read_bytes() == b"other" and data.fetch("x", [], good) == path
    path.write_bytes(b"damaged")
    with pytest.raises(data.UserError, match="damaged or another file"):
        data.fetch("x", urls, good)
    server.shutdown()


def test_offline_a_run_keeps_the_set_it_began_with(monkeypatch, capsys):
    """No MNIST: digits are drawn and the line says why; the run goes on with them tomorrow."""
    monkeypatch.setattr(data, "MNIST_URLS", ["file:///nowhere/"])
    name, x, y, classes = data.choose("mnist,digits", 32)
    assert name == "digits" and "no mnist" in capsys.readouterr().out and x.shape[1:] == (1, 32, 32)
    cfg = gan.config("dcgan", data="digits")
    data.save_checkpoint(Path("last.pt"), {}, 1, cfg)
    cfg.data = "mnist,digits"
    assert data.kept(cfg, Path()) == "digits"


def test_atomic_files_survive_errors_and_a_full_disk(monkeypatch):
    """A block that fails leaves the old file; a full disk is one line, exit 2, no half file."""
    data.write_text("x", "old")
    with pytest.raises(ValueError):
        with data.atomic("x") as part:
            part.write_text("half")
            raise ValueError
    assert Path("x").read_text() == "old" and len(list(Path().iterdir())) == 1
    words = f"{ROOT / 'gan.py'} dcgan --data digits --steps 2 --samples 200 --out full"
    limited = f"ulimit -f 100; exec {sys.executable} {words}"
    run("dcgan", "--data", "digits", "--steps", 1, "--samples", 200)
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1 and not list(Path("full").glob("*.pt"))


def test_real_sets(real):
    """MNIST is padded with black, emojis lie on white, faces have tags."""
    x, y, _ = data.load("mnist", 32, "test")
    assert x.shape == (10_000, 1, 32, 32) and x[:, :, :2].max() == 0 and y[:3].tolist() == [7, 2, 1]
    x, y, classes = data.load("fashion", 28)
    assert x.shape == (60_000, 1, 28, 28) and classes[y[0]] == "boot"
    x, _, _ = data.load("emoji-apple", 32)
    assert len(x) == 2270 and (x[:, :, 0, 0] == 255).float().mean() > .9
    assert len(data.load("emoji-windows", 32, "test")[0]) == 100
    x, y, classes = data.load("anime", 64, "test")
    assert x.shape == (888, 3, 64, 64) and len(classes) == 132


def test_drawn_sets():
    """Seeded; the two styles show the same faces, train on different ones and share the test."""
    a, y = data.draw_faces("a", 5, 7, 32)
    b, y_b = data.draw_faces("b", 5, 7, 32)
    assert np.array_equal(y, y_b) and not np.array_equal(a, b)
    assert np.array_equal(a[2:], data.draw_faces("a", 3, 9, 32)[0])
    hair = a[:, :, 8, 16].astype(float) / a[:, :, 8, 16].max(1, keepdims=True)
    wanted = np.array([data.RGB[data.HAIR[label // 11]] for label in y])
    assert np.abs(hair - wanted / wanted.max(1, keepdims=True)).max() < .25
    x, y = data.draw_digits(50, 3, 28)
    assert x.shape == (50, 1, 28, 28) and np.array_equal(x, data.draw_digits(50, 3, 28)[0])


def test_mistake_9_pictures_that_do_not_match_tanh():
    """uint8 -> [-1, 1] and back without loss; [0, 1] would leave half of tanh's range idle."""
    x = torch.arange(256, dtype=torch.uint8)
    assert data.to_float(x)[[0, -1]].tolist() == [-1, 1]
    assert torch.equal(data.to_uint8(data.to_float(x)), x)


# ---- data.py: pictures and runs ------------------------------------------------------------------

def test_pictures_are_as_large_as_promised():
    x = images(10, 3)
    assert data.grid(x, 4).size == (4 * 68, 3 * 68)
    page = np.asarray(data.grid(x, 4))
    assert np.array_equal(page[2:66:2, 2:66:2], x[0].permute(1, 2, 0))
    data.sheet([x[:3], x[3:5]], "s.png", left=["a", "b"], top=["1", "2", "3"], marks=[1])
    red = np.asarray(Image.open("s.png")) == (255, 0, 0)
    assert red.all(2).any()
    table = dict(step=[1, 2, 3], D=[1., 3., 2.], flat=[1., 1., 1.])
    data.curves("c.png", table, [("losses", ["D", "none"]), ("flat", ["flat"]), ("no", ["none"])])
    assert Image.open("c.png").size == (830, 2 * 230 + 20)
    assert np.allclose(data.ticks(.1, .42), [.1, .2, .3, .4])


def test_compare_and_strips():
    """Several runs: a table, their samples, their curves over each other."""
    for seed in (0, 1):
        run("dcgan", "--data", "digits", "--steps", 2, "--seed", seed, "--samples", 200, "--out",
            f"run-{seed}", "--log-every", 1)
    done = run("compare", "run-0", "run-1", "--out", "both", script="data.py")
    assert "| run-0 | 2 |" in done.stdout and Path("both.md").read_text() in done.stdout
    assert Image.open("both.png").size == (830, 475) and Path("both-curves.png").exists()
    run("strips", "strips.png", "run-0", "run-1", script="data.py")
    assert Image.open("strips.png").height == 2 * 84 + 4


def test_arguments_and_log(tmp_path):
    """Flags, choices and help are the dataclass; the log keeps the rows up to a resumed step."""
    preset, changes = data.arguments(gan.GANConfig, ["emoji", "--lr", "1e-4"], gan.PRESETS)
    assert (preset, changes) == ("emoji", {"lr": 1e-4})
    with pytest.raises(data.UserError, match="invalid choice"):
        data.arguments(gan.GANConfig, ["emoji", "--bn", "some"], gan.PRESETS)
    log = data.Log(tmp_path, 10)
    for step in (1, 2, 3):
        log.write(step, 8, D=torch.tensor(step / 2))
    assert data.Log(tmp_path, 10, 2).table()["D"] == [.5, 1.]
    with pytest.raises(data.BlewUp):
        log.write(4, 8, D=torch.tensor(float("nan")))


def test_ctrl_c():
    """One line that says from where it goes on, exit code 130."""
    command = [sys.executable, ROOT / "gan.py", "dcgan", "--data", "digits", "--log-every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step"):
        pass
    process.send_signal(signal.SIGINT)
    assert "goes on from the last checkpoint" in process.stdout.read() and process.wait() == 130


# ---- fid.py --------------------------------------------------------------------------------------

def feats(seed, n, d, shift):
    """Features (n, d) of the golden numbers' recipe."""
    a = np.random.RandomState(0).standard_normal((d, d)) / d ** .5
    x = np.random.RandomState(seed).standard_normal((n, d))
    return x * np.arange(1, d + 1) ** -.6 @ a + shift


@pytest.mark.parametrize("case", range(3))
def test_fid_golden(case):
    """Numbers of independent implementations; in the last case the covariances are singular."""
    c = golden("metrics")["cases"][case]
    real, fake = feats(11, c["n_real"], c["d"], 0), feats(12, c["n_fake"], c["d"], .02)
    gaussians = real.mean(0), np.cov(real.T), fake.mean(0), np.cov(fake.T)
    textbook = fid.fid_textbook(torch.from_numpy(real), torch.from_numpy(fake))
    assert fid.fid(real, fake) == pytest.approx(c["fid"], rel=1e-9)
    assert fid.frechet_distance(*gaussians) == pytest.approx(c["fid"], rel=1e-7)
    assert textbook.item() == pytest.approx(c["fid"], rel=1e-5)
    assert fid.kid(real, fake) == pytest.approx(c["kid"], rel=1e-9)
    assert fid.precision_recall(real, fake) == (c["precision"], c["recall"])


@pytest.mark.parametrize("n", [300, 40])
def test_fid_root_and_textbook(n):
    """R R = S, for S of rank 64 and 39; fast and textbook agree; a set and its shift."""
    x, y = torch.from_numpy(feats(1, n, 64, 0)), torch.from_numpy(feats(2, n, 64, .1))
    S = x.T.cov()
    assert torch.allclose(fid.sqrtm(S) @ fid.sqrtm(S), S)
    assert fid.fid(x, y) == pytest.approx(fid.fid_textbook(x, y).item(), rel=1e-4)
    assert fid.fid(x, x) < 1e-9
    assert fid.fid(x, x.flip(0) + 2) == pytest.approx(4 * 64)


def test_fid_inception_golden():
    """Names, count and features of the published network, read without num_batches_tracked."""
    g, keys = golden("inception"), golden("inception_keys")
    sys.path.append(str(SHARED / "golden"))
    import recipe
    net = fid.Inception()
    assert {name: list(t.shape) for name, t in net.state_dict().items()} == keys
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    shapes = {name: shape for name, shape in keys.items() if "num_batches" not in name}
    state = recipe.state(shapes, 11).items()
    net.load_published({name: torch.from_numpy(np.array(a)) for name, a in state})
    for c in g["cases"]:
        plus, *shape = json.loads(c["images"].replace("images(seed+", "[").replace(")", "]"))
        h = net.features(torch.from_numpy(recipe.images(11 + plus, *shape))).flatten()
        error = h[c["features"]["at"]] - torch.tensor(c["features"]["values"])
        assert error.norm() < 1e-5 * h.norm()


def test_fid_disturb():
    """Each kind against its formula: max(x, 16), 0.8 x, sigma 0.1, mean of 5 x 5."""
    x = data.to_float(torch.randint(256, (500, 1, 8, 8)).byte())
    assert torch.equal(data.to_uint8(fid.disturb(x, 1, .4)), data.to_uint8(x).clamp(min=16))
    assert torch.allclose(fid.disturb(x, 3, .4), .8 * x)
    assert .19 < fid.disturb(0 * x, 4, .5).std() < .21
    assert torch.isclose(fid.disturb(x, 5, 1.)[0, 0, 3, 3], x[0, 0, 1:6, 1:6].mean())


def test_fid_pretext_can_be_undone(monkeypatch):
    """turn and order say what was done; a weak disturbance counts as none."""
    monkeypatch.setattr(fid, "disturb", lambda x, kind, strength: x + strength.view(-1, 1, 1, 1))
    x = torch.rand(64, 3, 8, 8)
    bad, y = fid.pretext(x, torch.arange(64))
    for a, b, turn, order, kind in zip(x, bad, *[part.tolist() for part in y[:3]]):
        change = b.roll(-order, 0).rot90(-turn, (1, 2)) - a
        assert change.std() < 1e-6 and (kind == 0 or change.mean() > .4)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of three classes that take seconds to learn: bars in three places."""
    root, g = tmp_path_factory.mktemp("shapes"), np.random.RandomState(0)
    for i in range(120):
        a = g.randint(0, 60, (16, 16)).astype(np.uint8)
        a[4 * (i % 3) + 2:4 * (i % 3) + 6, 2:14] += 150
        data.save(data.Image.fromarray(a), root / "abc"[i % 3] / f"{i}.png")
    return str(root)


def test_fid_classifier_learns_and_is_kept(shapes, monkeypatch, capsys):
    """Trained once, without touching the caller's random numbers; the accuracy is the test's."""
    monkeypatch.setattr(fid, "STEPS", 60)
    before = torch.get_rng_state()
    net, again = fid.classifier(shapes, 16), fid.classifier(shapes, 16)
    assert torch.equal(before, torch.get_rng_state())
    assert capsys.readouterr().out.count("training") == 1
    x, y, _ = data.load(shapes, 16, "test")
    label, _ = again.predict(x)
    assert net.accuracy == again.accuracy == [(label == y).double().mean().item()]
    assert net.accuracy[0] > .9
    h = net.features(x)
    assert torch.allclose(h[:2], again.features(x[:2, :1]), atol=1e-4)      # grey, and alone
    images, labels, _ = data.load(shapes, 16)
    fid.sanity(net, images, labels, 54)                     # the floor, 16 ways to spoil pictures
    rows = [text.split(" | ") for text in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 17 and float(rows[-1][2]) > 2 * float(rows[0][2])


def test_fid_count(monkeypatch):
    """Faces: label = 11 * hair + eyes; the table counts eyes asked (rows) against eyes seen."""
    net, x = fid.Classifier(3, 16, (12, 11)), torch.full((4, 3, 16, 16), 20).byte()
    net.background = 7
    seen = torch.tensor([12, 12, 23, 130])
    monkeypatch.setattr(net, "predict", lambda x: (seen, torch.ones(4)))
    r = fid.count(net, x, torch.arange(132), data.FACES, torch.tensor([12, 13, 12, 131]))
    wanted = {"modes": 3, "rarest": 0, "missing in 80": 129, "background": 20,
              "background real": 7, "hair accuracy": .75, "eyes accuracy": .5}
    assert r | wanted == r and r["counts"][12] == 2
    assert r["entropy"] == pytest.approx(1.5 * math.log(2) / math.log(132))
    assert r["chi2"] == pytest.approx(132 / 4 * (4 + 1 + 1) - 4)
    table = r["eyes asked seen"]
    assert (table[1][1], table[2][1], table[10][9]) == (2, 1, 1)


def test_fid_against_and_line():
    """The floor is taken at the n of the comparison, and line says where one of them differs."""
    net, x = fid.Classifier(1, 32, (10,)), data.load("digits", 32)[0][:900]
    r = fid.against(net, x, x[:200], "digits")
    assert "n = 200, real-vs-real floor" in fid.line(r) and r["floor_n"] == 200
    assert fid.scores(net, x, 255 - x[:200])["fid"] > 5 * max(r["fid"], r["floor"])
    few = fid.line(fid.scores(net, x[:100], x[:300]))
    assert "n = 100 real, 300, real-vs-real floor" in few and few.endswith(" at n = 50)")


@pytest.mark.parametrize("axis", [1, 3])
def test_fid_arrays(axis):
    """Channels first, channels last, none."""
    x = torch.arange(9 * 3 * 8 * 8).view(9, 3, 8, 8).byte()
    np.save("a.npy", x.movedim(1, axis))
    np.save("grey.npy", x[:, 0])
    assert torch.equal(fid.array("a.npy"), x) and torch.equal(fid.array("grey.npy"), x[:, :1])


@pytest.mark.parametrize("words, says", [
    ("floats.npy digits:test --data digits", "convert"),
    ("digits:test flat.npy", "wanted (N, H, W)"),
    ("digits:test damaged.npy", "no readable .npy"),
    ("digits:test one.npy", "at least 4 and 8"),
    ("digits:test colour.npy", "pictures must be uint8 (N, 1 or 1"),
    ("digits:test nowhere", "nowhere"),
    ("folder", "two sources"),
    ("digits run", "--dump"),
    ("digits:test one.npy --n -3", "at least 0"),
    ("colour.npy colour.npy", "add --data SET"),
    ("digits:test colour.npy --features inception", "--features classifier"),
])
def test_fid_bad_input(words, says, monkeypatch):
    """One line that says what to do."""
    monkeypatch.setattr(fid, "WEIGHTS_URLS", ["http://127.0.0.1:9/x"])
    monkeypatch.setattr(fid, "STEPS", 2)
    np.save("floats.npy", np.zeros((9, 8, 8)))
    for name, shape in dict(flat=(9, 8), one=(1, 32, 32), colour=(9, 32, 32, 3)).items():
        np.save(name, np.zeros(shape, np.uint8))
    for name in ("damaged.npy", "folder/1.png", "run/last.pt"):
        data.write_text(Path(name), "half")
    with pytest.raises(data.UserError) as e:
        fid.main(words.split())
    assert says in str(e.value) and "\n" not in str(e.value)


def test_fid_run_against_its_own_data(monkeypatch, capsys):
    """First line: which features; last line: one JSON object."""
    monkeypatch.setattr(fid, "WEIGHTS_URLS", ["http://127.0.0.1:9/x"])
    monkeypatch.setattr(fid, "STEPS", 2)
    data.save_samples(Path("run/samples.npy"), data.load("digits", 32)[0][:150])
    data.write_json(Path("run/result.json"), dict(config=dict(data="mnist,digits")))
    fid.main("run --json 1 --n 120".split())
    first, *lines, last = capsys.readouterr().out.splitlines()
    r = json.loads(last)
    assert first.startswith("features classifier") and "not with Inception" in r["scale"]
    assert lines[-1] == fid.line(r) and any("rank 119 of 128" in text for text in lines)
    assert r["n"] == r["floor_n"] == sum(r["counts"]) == 120


# ---- cyclegan.py ---------------------------------------------------------------------------------

def faces(n=40):
    """Two Styles of n unpaired drawn faces and 20 paired ones, as load_pair gives them."""
    styles = []
    for style, first in ("a", 0), ("b", 10_000):
        train, _ = data.draw_faces(style, n, first, 32)
        test, labels = data.draw_faces(style, 20, 20_000, 32)
        parts = map(torch.from_numpy, (train, test, labels))
        styles.append(cyclegan.Style(f"faces-{style}", *parts))
    return styles


@pytest.fixture
def folders(tmp_path):
    """Flags of a small run on two folders of 4 random pictures."""
    for name in "ab":
        for i in range(4):
            image = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
            data.save(Image.fromarray(image), f"{name}/{i}.png")
    return "--a a --b b --batch 2 --log-every 9 --sample-every 3".split()


@pytest.mark.parametrize("make, parameters, shape, layers", [
    (cyclegan.CycleGenerator, 144_448, (2, 3, 32, 32), "3 32 5 2 2, 32 64 5 2 2, 64 64 3 1 1, "
     "64 32 5 1 2, 32 3 5 1 2"),
    (cyclegan.cycle_discriminator, 262_048, (2, 1), "3 32 5 2 2, 32 64 5 2 2, 64 128 5 2 2, "
     "128 1 5 2 1"),
    (cyclegan.PatchGAN, 2_764_737, (2, 1, 2, 2), "3 64 4 2 1, 64 128 4 2 1, 128 256 4 2 1, "
     "256 512 4 1 1, 512 1 4 1 1"),
    (cyclegan.ResNetGenerator, 11_378_179, (2, 3, 32, 32), "3 64 7 1 3, 64 128 3 2 1, "
     "128 256 3 2 1" + 18 * ", 256 256 3 1 1" + ", 64 3 7 1 3"),
])
def test_cyclegan_networks_are_the_published_ones(make, parameters, shape, layers):
    """And of each convolution: channels in and out, kernel, stride, padding."""
    net = make()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(2, 3, 32, 32)).shape == shape
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    table = [f"{m.in_channels} {m.out_channels} {m.kernel_size[0]} {m.stride[0]} {m.padding[0]}"
             for m in convs]
    assert ", ".join(table) == layers


def test_cyclegan_patchgan_sees_70_pixels():
    D = cyclegan.PatchGAN(4)
    for i in 3, 6, 9:                               # instance norm would make every pixel count
        D[i] = nn.Identity()
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    D(x)[0, 0, 15, 15].backward()
    assert len(x.grad.abs().sum((0, 1, 3)).nonzero()) == 70


def test_mistake_10_shared_layers_twice_in_the_optimiser():
    """UNIT's two shared blocks are on every path and in the optimiser once."""
    cfg = cyclegan.config(model="unit")
    G, _ = cyclegan.networks(cfg)
    listed = cyclegan.optimiser(G, cfg).param_groups[0]["params"]
    assert len(listed) == len(set(map(id, listed)))
    assert sum(p.numel() for p in listed) == 657_798
    x = torch.randn(1, 3, 32, 32)
    for shared in G.into, G.outof:                  # each is on every path
        for way in "ab", "ba", "aa", "bb":
            before = G(x, way)
            shared.body[0].weight.data.neg_()
            assert (G(x, way) - before).abs().max() > 1e-6


def test_cyclegan_losses_are_their_equations():
    x, y = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    assert torch.allclose(cyclegan.cycle_loss(x, y), 3 * 8 * 8 * F.l1_loss(x, y))
    mu, one = torch.randn(9), torch.ones(9)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mu, one), normal(0 * one, one))
    assert torch.allclose(cyclegan.kl(mu), 2 * exact.mean())


def test_cyclegan_pool_shows_old_pictures_half_the_time():
    pool = cyclegan.ImagePool(50)
    x = torch.arange(50.).view(50, 1, 1, 1).requires_grad_()
    assert torch.equal(pool(x), x) and not pool(x).requires_grad
    ages = [i - pool(torch.full((1, 1, 1, 1), float(i))).item() for i in range(99, 4099)]
    old = [age for age in ages if age]
    assert .47 < len(old) / 4000 < .53              # sigma .008
    assert np.mean(old) == pytest.approx(100, rel=.15)      # replaced once in 100 calls


class Toy:
    """Networks of one number a pixel: G_ab adds 1, G_ba doubles, and so do UNIT's parts."""

    def __call__(self, x, way):
        return x + 1 if way == "ab" else 2 * x

    def encode(self, x, style):
        return x + 1 if style == "a" else 2 * x

    def decode(self, z, style):
        return z + 3 if style == "a" else 5 * z


def test_cyclegan_terms_are_the_equations(monkeypatch):
    """Of black pictures a = 0 and white ones b = 1, each with 12 numbers."""
    monkeypatch.setattr(cyclegan, "noisy", nn.Identity())
    a, b = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    cfg = cyclegan.config(identity=.5, lambda_cycle=.1)
    fake_a, fake_b, terms = cyclegan.cycle_terms(Toy(), a, b, cfg)
    assert fake_a.unique() == 2 and fake_b.unique() == 1
    assert terms["cycle"] == pytest.approx(.1 * 12 * (2 + 2))           # back_a 2, back_b 3
    assert terms["identity"] == pytest.approx(.05 * 12 * (0 + 1))       # same_a 0, same_b 2
    fake_a, fake_b, terms = cyclegan.unit_terms(Toy(), a, b, cfg)
    assert fake_a.unique() == 5 and fake_b.unique() == 5                # z_a 1, z_b 2
    want = {"reconstruction": 100 * (4 + 9), "cycle": 100 * (13 + 29), "kl": .1 * (1 + 4),
            "cycle kl": .1 * (100 + 36)}                                # z_ab 10, z_ba 6
    assert terms == pytest.approx(want)


@pytest.mark.parametrize("model", ["cyclegan", "unit"])
def test_cyclegan_step_is_the_game(tmp_path, model):
    """D's step, then G's on the same fakes, written down anew, a loss and a style at a time."""
    cfg = cyclegan.config(model=model, steps=1, batch=4, amp=0)
    styles = faces()
    G, D, _, log = cyclegan.train(cfg, *styles, tmp_path, torch.device("cpu"))
    torch.manual_seed(cfg.seed)
    nets = [net.to(memory_format=torch.channels_last) for net in cyclegan.networks(cfg)]
    opt_G, opt_D = [cyclegan.optimiser(net, cfg) for net in nets]
    torch.manual_seed(cfg.seed * 1_000_003 + 1)
    x = [style.train[torch.randint(40, (4,))] / 127.5 - 1 for style in styles]
    compare, half, weight, terms = F.mse_loss, .5, 1, cyclegan.cycle_terms
    if model == "unit":
        compare, half, weight = F.binary_cross_entropy_with_logits, 1, 10
        terms = cyclegan.unit_terms
    *fakes, other = terms(nets[0], *x, cfg)
    one, game = torch.ones(4, 1), sum(other.values())
    for D_s, real, fake in zip(nets[1].values(), x, fakes):
        (half * (compare(D_s(real), one) + compare(D_s(fake.detach()), 0 * one))).backward()
    assert log.rows[0]["|dD|"] == pytest.approx(cyclegan.grad_norm(nets[1]).item(), rel=1e-3)
    opt_D.step()
    for D_s, fake in zip(nets[1].values(), fakes):
        game = game + weight * compare(D_s(fake), one)
    game.backward()
    opt_G.step()
    for p, q in zip(nn.ModuleList([G, D]).parameters(), nn.ModuleList(nets).parameters()):
        if p.dim() == 4:            # Adam's first step is lr in each number, whatever the gradient
            assert (p - q).abs().mean() < .05 * cfg.lr


def test_cyclegan_baselines_are_exact():
    x = torch.randint(60, 180, (3, 3, 8, 8), dtype=torch.uint8)
    factor = torch.tensor([.5, 1, 1.2]).view(3, 1, 1)
    y = (x[:, [2, 0, 1]] * factor + 9).round().byte()
    assert (cyclegan.colour_map(x, y, x).int() - y.int()).abs().max() <= 1
    matched = cyclegan.match_colours(x, y).float()
    for got, want in zip(torch.std_mean(matched, (0, 2, 3)), torch.std_mean(y.float(), (0, 2, 3))):
        assert torch.allclose(got, want, atol=1)
    assert (cyclegan.constant_picture(x).numpy() == np.median(x, 0)).all()


def test_cyclegan_scores_see_that_nothing_was_done():
    a, b = faces()
    G = cyclegan.CycleGAN({"ab": nn.PReLU(init=1.), "ba": nn.PReLU(init=1.)})       # x -> x
    m = cyclegan.scores(G, a, b, "ab")
    assert m["ab cycle"] == m["ab change"] == 0
    true = (a.test / 255 - b.test / 255).abs().mean().item()
    assert m["ab L1"] == pytest.approx(true) and m["ab L1 identity"] == pytest.approx(true)
    assert m["ab L1 colour map"] < true and m["ab L1 constant"] < true
    assert "NOT better than identity" in cyclegan.verdict(m, "ab")
    assert "beats all three" in cyclegan.verdict(m | {"ab L1": 0.}, "ab")


def test_cyclegan_probe_tells_apart_what_is_apart():
    a, b = faces(100)
    G = cyclegan.UNIT()
    assert cyclegan.probe_accuracy(G, a, b) > .95
    G.encoder["b"] = G.encoder["a"]
    first, second = [a._replace(train=a.train[i::2], test=a.test[i::2]) for i in (0, 1)]
    assert .1 < cyclegan.probe_accuracy(G, first, second) < .9


def test_cyclegan_learns_faces(tmp_path):
    a, b = faces(300)
    cfg = cyclegan.config(steps=80, batch=8, lr=1e-3, log_every=80, sample_every=80)
    G, *_ = cyclegan.train(cfg, a, b, tmp_path, torch.device("cpu"))
    error = cyclegan.l1(cyclegan.translate(G, a.test, "ab"), b.test)
    assert error < .6 * cyclegan.l1(a.test, b.test)


@pytest.mark.parametrize("flags", [[], ["--size", "64", "--width", "4"]])
def test_cyclegan_translates_files_and_trains_nothing(folders, flags):
    """In eval mode: a picture's translation does not depend on the others of the folder."""
    cyclegan.main(folders + flags + ["--steps", "1", "--out", "run"])
    before = Path("run/last.pt").read_bytes()
    cyclegan.main("--translate b --direction ba --out run --steps 50 --resume 0".split())
    assert Path("run/last.pt").read_bytes() == before and Path("run/translated-ba.png").is_file()
    made = sorted(Path("run/translated-ba").iterdir())
    assert [path.name for path in made] == ["0-0.png", "1-1.png", "2-2.png", "3-3.png"]
    saved = data.load_checkpoint("run/last.pt")
    cfg = cyclegan.CycleConfig(**saved["config"])
    G, _ = cyclegan.networks(cfg)
    G.load_state_dict(saved["G"])
    x = data.fit(data.read_picture("b/0.png"), cfg.size)[None]
    want = cyclegan.translate(G, x, "ba")[0].int()
    assert (data.read_picture(made[0]).int() - want).abs().max() <= 1


@pytest.mark.parametrize("flags, words", [
    ("--size 48", "32"), ("--data mnist", "emojis faces distant"), ("--a x", "--b"),
    ("--a none --b none", "none"), ("--translate x.png --out new", "no checkpoint"),
    ("--steps 0 --out new", "train first"), ("--batch 1", "--batch"), ("--pool -1", "--pool"),
    ("--lr nan", "--lr"), ("--model unit --identity 1", "--identity"),
    ("--a one --b one", "2 pictures"), ("--translate x.png --out gan", "no checkpoint of cycle"),
])
def test_cyclegan_bad_input_is_one_line(flags, words):
    data.save(Image.new("RGB", (40, 40)), "one/x.png")
    Path("gan").mkdir()
    torch.save({"config": {"preset": "dcgan"}}, "gan/last.pt")
    with pytest.raises(data.UserError, match=words):
        cyclegan.main(flags.split())


# ---- biggan_interp.py ----------------------------------------------------------------------------

def mixture(n):
    """n points of 20 Gaussians in 128 dimensions."""
    r = np.random.RandomState(0)
    centres, which = r.randn(20, 128) * 1.5, r.randint(0, 20, n)
    return torch.from_numpy(centres[which] + r.randn(n, 128))


def test_biggan_interp_draws_the_golden_pictures_folded_or_not():
    sys.path.insert(0, str(SHARED / "golden"))
    g = golden("biggan")
    import recipe
    G = biggan_interp.Generator(biggan_interp.Config(channel_width=8)).eval()
    state = recipe.state({key: w.shape for key, w in G.state_dict().items()}, g["seed"])
    G.load_state_dict({key: torch.from_numpy(w) for key, w in state.items()})
    z = np.random.RandomState(g["seed"] + 1).standard_normal((3, 128)).clip(-2, 2)
    z, y = torch.from_numpy(z).float(), torch.tensor(g["classes"])
    x = G(z, G.embed(y))
    biggan_interp.fold(G)
    assert torch.allclose(G(z, y), x, atol=1e-5)
    for case in g["cases"]:
        x = G(case["truncation"] * z, y, case["truncation"])
        values = x.flatten()[case["at"]]
        assert torch.allclose(values, torch.tensor(case["values"]), atol=1e-4)


@pytest.mark.parametrize("size, count", [(128, 50388609), (256, 55880833), (512, 56163905)])
def test_biggan_interp_has_the_published_names_shapes_and_counts(size, count):
    with torch.device("meta"):
        G = biggan_interp.Generator(biggan_interp.Config(size=size))
    assert sum(p.numel() for p in G.parameters()) == count
    shapes = {key: list(value.shape) for key, value in G.state_dict().items()}
    assert size > 128 or shapes == golden("biggan128_keys")         # 506 of them


def test_biggan_interp_spectral_norm_divides_by_the_largest_singular_value():
    layer = biggan_interp.Spectral(16, 8, 3, 3)
    nn.init.normal_(layer.weight_orig)
    W = layer.weight_orig.detach().clone()
    for _ in range(300):
        layer.weight()
    sigma = torch.linalg.svdvals(W.flatten(1))[0]
    assert torch.allclose(biggan_interp.fold(layer).weight(), W / sigma, atol=1e-5)


def test_biggan_interp_batch_norm_is_its_equation_with_the_published_swap():
    """.415 lies .75 of the way from row 20 to row 21, and row 20 gets the .75: the swap."""
    bn = biggan_interp.BatchNorm(4, biggan_interp.Config(z_dim=2, class_embed_dim=4)).eval()
    table = torch.rand(2, 51, 4) + .5
    bn.running_means[:], bn.running_vars[:] = table
    x, cond = torch.randn(3, 4, 2, 2), torch.randn(3, 6)
    mean, var = (.75 * table[:, 20] + .25 * table[:, 21])[..., None, None]
    scale, offset = bn.scale(cond)[..., None, None], bn.offset(cond)[..., None, None]
    wanted = (x - mean) / (var + 1e-4).sqrt() * (1 + scale) + offset
    assert torch.allclose(bn(x, .415, cond), wanted, atol=1e-5)


def test_biggan_interp_noise_has_the_truncated_law_and_pixels_are_cut_off():
    z = biggan_interp.truncated_noise(2000, 100, .5).flatten() / .5
    at = torch.linspace(-2, 2, 81)
    cdf = torch.special.ndtr(at)
    share = torch.searchsorted(z.sort()[0], at) / len(z)
    law = (cdf - cdf[0]) / (cdf[-1] - cdf[0])
    assert (share - law).abs().max() < 1.95 / math.sqrt(len(z))     # Kolmogorov-Smirnov, p = .001
    x = torch.tensor([-1, -.9925, 0, .999, 1])
    assert biggan_interp.pixels(x).tolist() == [0, 0, 128, 255, 255]


def test_biggan_interp_load_published_names_the_wrong_key():
    config, key = biggan_interp.Config(channel_width=8), "generator.layers.3.conv_1.weight_v"
    state = biggan_interp.Generator(config).state_dict()
    torch.save(state, "weights.bin")
    biggan_interp.load_published("weights.bin", config)
    for value in (torch.zeros(3), None):
        torch.save({**state, key: value}, "weights.bin")
        with pytest.raises(data.UserError, match=key):
            biggan_interp.load_published("weights.bin", config)


def test_biggan_interp_tsne_affinities_have_the_perplexity_asked_for():
    x = mixture(200)
    p = biggan_interp.conditional(x, 20)
    assert (torch.special.entr(p).sum(1).exp() - 20).abs().max() < 1e-3
    d2 = torch.cdist(x, x)[0, 1:] ** 2
    beta = -(p[0, 1:] / p[0, 1]).log() / (d2 - d2[0])       # one number a row: eq. 1
    assert torch.allclose(beta[1:], beta[1])
    P = biggan_interp.affinities(x, 20)
    assert torch.equal(P, P.T) and abs(P.sum() - 1) < 1e-12


def test_biggan_interp_tsne_gradient_is_autograds():
    P, off = biggan_interp.affinities(mixture(100), 20), ~torch.eye(100, dtype=torch.bool)
    y = torch.randn(100, 2, dtype=torch.float64, requires_grad=True)
    w = 1 / (1 + ((y[:, None] - y) ** 2).sum(2)[off])
    C = (P[off] * (P[off] / (w / w.sum())).log()).sum()
    assert torch.allclose(biggan_interp.kl(P, y.detach()), C)
    (gradient,) = torch.autograd.grad(C, y)
    assert torch.allclose(biggan_interp.kl_gradient(P, y.detach()), gradient, atol=1e-10)


def test_biggan_interp_tsne_is_as_good_as_the_exact_method_and_repeats():
    data.keep_memory()                                      # three times as fast
    x = mixture(1000)
    y = biggan_interp.tsne(x, perplexity=30, seed=0)
    assert biggan_interp.kl(biggan_interp.affinities(x, 30), y) <= .349     # scikit-learn: .333
    a, b = [biggan_interp.tsne(x[:100], 20, 5, steps=20) for _ in range(2)]
    assert torch.equal(a, b)


def test_biggan_interp_walks_end_at_the_classes_bit_for_bit():
    G = biggan_interp.Generator(biggan_interp.SMALL).eval()
    z = biggan_interp.truncated_noise(1, 32)
    x = biggan_interp.walk(G, 3, 100, z, 1.)
    for end, y in [(0, 3), (-1, 100)]:
        assert torch.equal(x[end], biggan_interp.sample(G, z, torch.tensor([y]))[0])
    r = torch.tensor([[0.], [8], [9]])
    assert biggan_interp.between(r[1], r[0], [1, .25]).tolist() == [[8], [2]]
    assert biggan_interp.extreme_pairs(r)[0] == (1, 2)
    assert biggan_interp.extreme_pairs(r, farthest=True)[0] == (0, 2)
    assert biggan_interp.mean_step(torch.tensor([0, 10, 40])) == 20


def test_biggan_interp_losses_and_projection_are_their_equations():
    real, fake = torch.tensor([2., .5, -1.]), torch.tensor([-2., 0., 3.])
    assert biggan_interp.d_hinge(real, fake).item() == pytest.approx(7.5 / 3)
    assert biggan_interp.g_hinge(fake).item() == pytest.approx(-1 / 3)
    D, x, y = biggan_interp.ProjectionD(132), torch.randn(2, 3, 32, 32), torch.tensor([3, 100])
    difference = ((D.v.weight[y] - D.v.weight[y + 1]) * D.phi(x)).sum(1)
    assert torch.allclose(D(x, y) - D(x, y + 1), difference, atol=1e-5)
    r1 = biggan_interp.r1_penalty(lambda x, y: 3 * x.flatten(1).sum(1), x, y)
    assert r1.item() == pytest.approx(9 * 3 * 32 * 32 / 2)          # |grad|^2 / 2 of a linear D


def test_biggan_interp_runs_end_to_end_and_goes_on_bit_for_bit(monkeypatch):
    images, labels = torch.randint(256, (50, 3, 32, 32)).byte(), torch.arange(50)
    monkeypatch.setattr(biggan_interp, "BATCH", 4)
    monkeypatch.setattr(biggan_interp.SMALL, "n_stats", 2)
    monkeypatch.setattr(data, "choose", lambda *_: ("faces-a", images, labels, []))
    monkeypatch.setattr(biggan_interp, "judge", lambda *_: dict(precision=1, hair=1, eyes=1))
    monkeypatch.setattr(biggan_interp, "tsne", lambda r, *_: r[:, :2].double())
    monkeypatch.setattr(fid, "line", lambda scores: "FID")
    save = data.save

    def die(image, path):
        if path.name == "000004.png":
            raise KeyboardInterrupt                         # last.pt is that of step 2
        save(image, path)

    ends = []
    for name in ("whole", "twice"):
        words = ["--model", "small", "--steps", "4", "--sample-every", "2", "--out", name]
        if name == "twice":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(data, "save", die)
                biggan_interp.main(words)
        biggan_interp.main(words)
        assert {"interpolation.png", "tsne.png", "result.json"} <= set(os.listdir(name))
        ends.append(torch.load(f"{name}/last.pt", weights_only=True)["G_ema"])
    assert all(map(torch.equal, *(end.values() for end in ends)))


@pytest.mark.parametrize("words, why", [
    ("--truncation 0", "truncation"), ("--size 7", "size"), ("--steps -1", "steps"),
    ("--model small --steps 0", "train first"), ("--model published", "--model small")])
def test_biggan_interp_refuses_in_one_line(words, why, monkeypatch):
    monkeypatch.setattr(biggan_interp, "S3", "file:///nowhere/{}")
    monkeypatch.setattr(biggan_interp, "MIRROR", "file:///nowhere/{}")
    with pytest.raises(data.UserError, match=why):
        biggan_interp.main(words.split())


# ---- what is written about it --------------------------------------------------------------------

PASTE = [   # what an assignment asks for, the last of each line, and what it brings along
    (gan, "dcgan"), (gan, "emoji"), (gan, "anime"), (gan, "mnist28"), (gan, "mlp"), (gan, "init"),
    (gan, "between"), (gan, "d_bce"), (gan, "g_bce"), (gan, "g_saturating"), (gan, "d_lsgan"),
    (gan, "g_lsgan"), (gan, "d_wgan"), (gan, "g_wgan"), (gan, "d_relativistic"),
    (gan, "g_relativistic"), (gan, "gradient_penalty"), (gan, "r1_penalty"), (gan, "clip_weights"),
    (gan, "SpectralNorm"), (gan, "diff_augment"), (gan, "swap"), (gan, "planes"), (gan, "ac_loss"),
    (gan, "one_hot condition"), (fid, "sqrtm"), (fid, "sqrtm fid_textbook"), (fid, "kernel kid"),
    (fid, "covered precision_recall"), (cyclegan, "cycle_loss"), (cyclegan, "ImagePool"),
    (cyclegan, "conv upconv Residual CycleGenerator"), (cyclegan, "conv cycle_discriminator"),
    (cyclegan, "ResBlock init_normal ResNetGenerator"), (cyclegan, "init_normal PatchGAN"),
    (cyclegan, "unit_encoder unit_decoder ResBlock UNIT"), (cyclegan, "cycle_loss cycle_terms"),
    (cyclegan, "noisy kl unit_terms"), (biggan_interp, "between"),
    (biggan_interp, "conditional affinities student kl_gradient tsne"),
]
WORDS = {   # the arguments of a call, by the parameter's name
    "real": torch.randn(60, 8), "fake": torch.randn(60, 8), "x": torch.randn(60, 3, 32, 32),
    "x_fake": torch.randn(60, 3, 32, 32), "D": nn.Sequential(nn.Flatten(), nn.Linear(3072, 1)),
    "z1": torch.zeros(8), "z2": torch.ones(8), "t": .5, "a": torch.eye(3), "weight": torch.eye(3),
    "m": nn.Linear(2, 2), "c": .1, "heads": (12, 11), "y": torch.arange(9), "back": torch.zeros(60),
    "r1": torch.zeros(8), "r2": torch.ones(8), "alphas": [0, 1], "perplexity": 5, "seed": 0,
}


@pytest.mark.parametrize("script, names", PASTE)
def test_snippets_survive_being_pasted(script, names):
    """Each runs in an empty file with torch, nn and F."""
    space = {"torch": torch, "nn": nn, "F": F, "math": math}
    for name in names.split():
        exec(inspect.getsource(getattr(script, name)), space)
    pasted = space[name]
    words = dict(WORDS, x=torch.randn(60, 8)) if name == "tsne" else dict(WORDS)
    if name == "planes":
        words["c"] = torch.zeros(60, 2)
    elif name in ("ac_loss", "cycle_terms", "unit_terms", "swap", "ImagePool", "cycle_loss"):
        return                                      # these are called by the tests of their files
    wanted = [p.name for p in inspect.signature(pasted).parameters.values() if p.default is p.empty]
    made = pasted(*[words[name] for name in wanted])
    if name in LAYERS:
        G, D = made
        assert D(G(torch.randn(4, 16 if name in ("dcgan", "mlp") else 100))).shape == (4, 1)


def test_makefile_and_readme_agree():
    """Every target is named in the README and the other way round; mistakes and pictures exist."""
    makefile, readme = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
    targets = set(re.findall(r"^#? ?([a-z][\w-]*):.*##", makefile, re.M))
    assert targets == set(re.findall(r"\bmake ([a-z][\w-]*)", readme))
    assert all((ROOT / path).exists() for path in re.findall(r"\((figures/[^)]+)\)", readme))
    mistakes = {name for name in globals() if name.startswith("test_mistake")}
    assert mistakes == set(re.findall(r"test_mistake_\w+", readme)) and len(mistakes) == 10
    assert len(readme.splitlines()) <= 230 and len(readme.split()) <= 2800


def test_every_documented_command_is_understood():
    """Of the README and of each target of the Makefile, whose make prints what it would run."""
    makefile, readme = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
    lines = re.findall(r"^(python .*)$", readme, re.M)
    for target in re.findall(r"^#? ?([a-z][\w-]*):.*##", makefile, re.M):
        command = ["make", "-n", "-C", ROOT, target, "PYTHON=python", "STEPS=3", "SEED=1"]
        lines += subprocess.check_output(command, text=True).splitlines()
    understood = 0
    for line in lines:
        line = re.sub(r"\$[a-z]+", "1", line.split("||")[0].split(";")[0])
        words = shlex.split(line.replace("do ", ""), comments=True)
        configs = {"gan.py": gan.GANConfig, "cyclegan.py": cyclegan.CycleConfig,
                   "biggan_interp.py": biggan_interp.Run}
        if words[:1] == ["python"] and words[1] in configs:
            presets = gan.PRESETS if words[1] == "gan.py" else ()
            data.arguments(configs[words[1]], words[2:], presets)
            understood += 1
    assert understood > 40


# ---- python test_all.py bench: the textbook loop and ours, in turns, in one run ------------------

class PictureSet(torch.utils.data.Dataset):
    """What tutorials write: a list of pictures, each made a tensor whenever it is asked for."""

    def __init__(self, x):
        self.pictures = [data.as_image(picture) for picture in data.as_bytes(x)]
        self.channels = x.shape[1]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        a = np.asarray(self.pictures[i], np.float32).transpose(2, 0, 1)
        return torch.from_numpy(a[:self.channels] / 127.5 - 1)


def batches(x, batch):
    """A DataLoader without end."""
    pictures = PictureSet(x)
    while True:
        yield from torch.utils.data.DataLoader(pictures, batch, True, num_workers=1, drop_last=True)


def textbook_gan(cfg, x_all):
    """DCGAN as tutorials have it: float32 NCHW, sigmoid and BCELoss, plain Adam, .item() each step.
    Yields after a step."""
    G, D = gan.networks(cfg)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), cfg.lr, (.5, .999)) for net in (G, D))
    bce, ones, zeros = nn.BCELoss(), torch.ones(cfg.batch, 1), torch.zeros(cfg.batch, 1)
    for x in batches(x_all, cfg.batch):
        x_fake = G(torch.randn(cfg.batch, cfg.z))
        opt_D.zero_grad()
        loss_D = bce(D(x).sigmoid(), ones) + bce(D(x_fake.detach()).sigmoid(), zeros)
        loss_D.backward()
        opt_D.step()
        opt_G.zero_grad()
        loss_G = bce(D(x_fake).sigmoid(), ones)
        loss_G.backward()
        opt_G.step()
        yield loss_D.item() + loss_G.item()


def textbook_cyclegan(cfg, x_all):
    """CycleGAN as the exercises have it: D and G each translate anew, a backward a style."""
    G, D = cyclegan.networks(cfg)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), cfg.lr, (.5, .999)) for net in (G, D))
    for x_a, x_b in zip(batches(x_all, cfg.batch), batches(x_all, cfg.batch)):
        both = ("ab", x_a, x_b), ("ba", x_b, x_a)
        opt_D.zero_grad()
        for way, x, y in both:
            d = D[way[1]]
            cyclegan.d_lsgan(d(y), d(G(x, way).detach())).backward()
        opt_D.step()
        opt_G.zero_grad()
        for way, x, _ in both:
            y = G(x, way)
            cycle = cfg.lambda_cycle * cyclegan.cycle_loss(x, G(y, way[::-1]))
            (cyclegan.g_lsgan(D[way[1]](y)) + cycle).backward()
        opt_G.step()
        yield


ROWS = {"A (16,16)": ("dcgan", {}, 300), "A (100,100)": ("dcgan", dict(z=100, h=100), 20),
        "E 64 x 64": ("anime", {}, 8), "CycleGAN": ("cyclegan", {}, 15)}


def bench_one(row, side):
    """Prints the pictures a second of one side of one row; its first five steps are left out."""
    preset, changes, steps = ROWS[row]
    if preset == "cyclegan":
        cfg, textbook, x = cyclegan.CycleConfig(), textbook_cyclegan, images(4096, 3)
        style = cyclegan.Style("a", x, x[:100], None)
        ours = functools.partial(cyclegan.train, cfg, style, style)
    else:
        cfg, textbook = gan.config(preset, **changes), textbook_gan
        x = images(4096, cfg.channels, gan.NETS[cfg.net][1])
        ours = functools.partial(gan.train, cfg, x, torch.zeros(4096, dtype=torch.long))
    if side == "textbook":
        times = [time.perf_counter() for _ in zip(range(steps + 5), textbook(cfg, x))]
        seconds = times[-1] - times[4]
    else:
        cfg.steps, cfg.log_every, cfg.sample_every = steps + 5, 5, 10 ** 9
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            *_, log = ours(Path(out), data.device("cpu"))
        seconds = log.rows[-1]["seconds"] - log.rows[1]["seconds"]
    print(steps * cfg.batch / seconds)


def timed(f, *words):
    """Seconds of one call, the better of two."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        f(*words)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bench(rounds=5):
    """The table of `make bench`: medians of alternating runs, ratios with their range."""
    data.keep_memory()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| row | textbook | ours | ratio (range) |\n|---|---|---|---|")
    for row in ROWS:
        rates = []
        for _ in range(rounds):
            for side in ("textbook", "ours"):
                words = [sys.executable, __file__, "bench", row, side]
                rates.append(float(subprocess.check_output(words, text=True).split()[-1]))
        textbook, ours = np.array(rates[::2]), np.array(rates[1::2])
        ratio = ours / textbook
        print(f"| {row}, images/s | {np.median(textbook):,.0f} | {np.median(ours):,.0f} | "
              f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) |", flush=True)
    x = torch.randint(256, (32, 3, 32, 32)).byte()
    plain, net = fid.Inception(), fid.Inception()
    net.load_published(net.state_dict())
    slow = timed(plain.features, x)
    for name in ("float32", "bfloat16"):
        fast = timed(net.to(getattr(torch, name)).features, x)
        print(f"| Inception, {name}, images/s | {32 / slow:.1f} | {32 / fast:.1f} | "
              f"{slow / fast:.2f} |")
    a = torch.randn(10_000, 2048, dtype=torch.double)
    mu, s1 = a.mean(0), a.T.cov()
    s2 = s1 + .1 * s1 @ s1
    fast = timed(fid.frechet_distance, mu, s1, mu, s2)
    with contextlib.suppress(ImportError):
        import scipy.linalg
        slow = timed(scipy.linalg.sqrtm, (s1 @ s2).numpy())
        print(f"| FID's root, d = 2048, s | {slow:.2f} (SciPy) | {fast:.2f} | {slow / fast:.1f} |")


if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    bench_one(*sys.argv[2:]) if sys.argv[2:] else bench()
