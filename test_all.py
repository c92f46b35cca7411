"""test_all.py: what the project promises, proven. `make test`, or python -m pytest test_all.py.

A test compares with a closed form, a reference operation or the numbers of ../shared/golden, made
by independent code; those, and the tests on real data, are skipped where ../shared is not there.
The ten mistakes of the README are the tests test_mistake_1 to 10: each shows the right thing and
what the wrong one would have given. `python test_all.py bench` measures the speed instead.
"""
import ast
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
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import biggan_interp
import cyclegan
import data
import fid
import gan

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"
CPU = torch.device("cpu")


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


def run(*words, code=0, script="gan.py"):
    """A command in this process, its words apart or in one line; its exit code must be `code`; at 2
    it says one line. Returns its stdout and stderr."""
    words = shlex.split(" ".join(words))
    done = types.SimpleNamespace(code=0)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                data.run_main(functools.partial(sys.modules[script[:-3]].main, words))
            except SystemExit as e:
                done.code = e.code
    done.stdout, done.stderr = out.getvalue(), err.getvalue()
    assert done.code == code, done
    assert code != 2 or re.fullmatch("error: .*\n", done.stderr), done.stderr
    return done


def differing(a, b):
    """Names of the parts in which two checkpoints are not equal to the bit."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    different = []
    for part in a.keys() - {"config"}:
        try:
            assert_close(a[part], b[part], rtol=0, atol=0)
        except AssertionError:
            different.append(part)
    return different


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
    "mlp": [("Linear", [256, 512, 1024, 1024], [], 3, "ReLU()", 1_714_432),
            ("Linear", [512, 256, 128, 1], [], 0, LEAKY, 689_153)],
}


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("preset", LAYERS)
def test_networks_have_the_courses_layers(preset):
    """The table above, and the order of the layers."""
    nets = gan.build(preset)
    for net, (kind, channels, kernels, norms, act, parameters) in zip(nets, LAYERS[preset]):
        bare = len(channels) - 1 - norms
        order = bare * [kind, act] + norms * [kind, "BatchNorm", act] + [kind]
        assert re.findall(r"Conv\w+|Linear|BatchNorm|\w+LU\(.*?\)", str(net)) == order
        layers = [m for m in net if kind in str(m)]
        assert [getattr(m, "out_channels", 0) or m.out_features for m in layers] == channels
        found = [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in layers if kernels]
        assert found == kernels and count(net) == parameters
    assert "Tanh" in str(nets[0][-2:]) and "Tanh" not in str(nets[1])


@pytest.mark.parametrize("preset", gan.PRESETS)
def test_presets_make_pictures_and_logits(preset):
    """As the course has it and as one would do it today; then D has no batch norm."""
    for modern in (0, 1):
        cfg = gan.config(preset, modern)
        G, D = gan.networks(cfg)
        c, side = torch.zeros(2, sum(cfg.heads)), gan.NETS[cfg.net][1]
        x = G(torch.cat([torch.randn(2, cfg.z), c], 1))
        assert x.shape == (2, cfg.channels, side, side)
        assert gan.judge(D, c, cfg, x).shape == (2, 1 + c.shape[1] * (cfg.cond == "ac"))
    assert "BatchNorm" not in str(D)


def test_padding_of_the_course():
    """P = ((D_y - 1) S + K - D_x) / 2, rounded up, for 32 -> 16 -> 8 -> 4 -> 1."""
    _, (_, _, kernels, *_) = LAYERS["emoji"]
    for x, y, (k, s, p) in zip((32, 16, 8, 4), (16, 8, 4, 1), kernels):
        assert p == math.ceil(((y - 1) * s + k - x) / 2)


def test_surgery():
    """Width, initial weights, activations, batch norm, raw pictures, noise."""
    G, D = gan.build("dcgan", z=100, h=100)
    default, _ = gan.build("dcgan", h=100, init="default")
    assert (count(G), count(D)) == (2_243_701, 1_609_200)
    assert .019 < G[4].weight.std() < .021 and default[4].weight.std() < .015
    G, D = gan.build("anime", h=4, act="selu", bn="D")
    assert str(G).count("SELU") == str(D).count("SELU") == str(D).count("BatchNorm") + 1 == 4
    assert "BatchNorm" not in str(G)
    G, D = gan.build("dcgan", raw=1)
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
    p, q, pair = real.sigmoid(), fake.sigmoid(), (real - fake).sigmoid()
    assert_close(losses(real, fake), [
        -p.log().mean() - (1 - q).log().mean(), -q.log().mean(), (1 - q).log().mean(),
        ((real - 1) @ (real - 1) + fake @ fake) / 128, (fake - 1) @ (fake - 1) / 64,
        fake.mean() - real.mean(), -fake.mean(),
        -pair.log().mean(), -(1 - pair).log().mean()])


def test_mistake_1_sigmoid_before_a_loss_on_logits():
    """At D = 1/2 the loss is 2 ln 2 and falls to 0; with a sigmoid before it, it cannot."""
    zero, sure = torch.zeros(4), torch.full((4,), 20.)
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


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 2, 2)])
def test_mistake_4_the_norm_instead_of_its_distance_to_1(shape):
    """A linear critic's penalty is (|w| - 1)^2, 0 at slope 1; the norm would pull D flat. R1 is
    |w|^2 / 2."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    x, x_fake = torch.randn(2, *shape)
    norm = D[1].weight.norm()
    assert_close(gan.gradient_penalty(D, x, x_fake), (norm - 1) ** 2)
    assert_close(gan.r1_penalty(D, x), norm ** 2 / 2)


@pytest.mark.parametrize("layer, dim", [(nn.Conv2d(3, 8, 4), 0), (nn.ConvTranspose2d(8, 3, 4), 1)])
def test_spectral_norm_is_the_largest_singular_value(layer, dim):
    """W / sigma(W) has the largest singular value 1; evaluation iterates no further."""
    gan.spectral_norm([layer])
    for _ in range(100):
        w = layer.weight                            # a pass, so a power iteration
    sigma = torch.linalg.svdvals(w.transpose(0, dim).flatten(1))[0]
    assert abs(sigma - 1) < 1e-5 and torch.equal(layer.eval().weight, layer.weight)


def test_conditions_and_the_auxiliary_classifier():
    """One-hots side by side; ln 12 + ln 11 of a D that knows nothing, 0 of one that knows all."""
    c = gan.condition(torch.tensor([37, 131]), (12, 11))    # hair 3, eyes 4; hair 11, eyes 10
    assert c.nonzero().tolist() == [[0, 3], [0, 16], [1, 11], [1, 22]]
    assert abs(gan.ac_loss(0 * c, c, (12, 11)) - math.log(132)) < 1e-5
    assert gan.ac_loss(99 * c, c, (12, 11)) == 0
    x = gan.planes(torch.zeros(2, 3, 4, 4), c)
    assert torch.equal(x[..., 0, 3], F.pad(c, (3, 0)))      # three channels, then c


def test_diff_augment():
    """Own colours and an own shift of up to an eighth a picture; differentiable."""
    x = torch.tensor([.5, 0, -.5]).view(1, 3, 1, 1).repeat(512, 1, 32, 32).requires_grad_()
    y = gan.diff_augment(x)
    red, green, blue = y[:, :, 16, 16].T
    strength = red - blue                           # saturation, 0 to 2, times contrast
    assert green.abs().max() <= .5 and green.std() > .25
    assert 0 <= strength.min() and 2 < strength.max() <= 3
    seen = y[:, 1] != 0                             # what was shifted in is 0
    assert {*seen.any(1).sum(1).tolist()} == {*seen.any(2).sum(1).tolist()} == {*range(28, 33)}
    assert torch.autograd.grad(y.sum(), x)[0].sum() > 0


# ---- gan.py: the game ----------------------------------------------------------------------------

def small(preset="dcgan", modern=0, **changes):
    """The config of a run of seconds."""
    cfg = dict(h=4, z=8, batch=8, steps=2, amp=0, ema=0., log_every=1, sample_every=1)
    return gan.config(preset, modern, **{**cfg, **changes})


def drawn(cfg, x_all):
    """The batches that gan.train draws in its steps."""
    for step in range(1, cfg.steps + 1):
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        yield x_all[torch.randint(len(x_all), (cfg.batch,))] / 127.5 - 1


def textbook_gan(cfg, batches):
    """The game in the plainest words, as tutorials have it: float32 NCHW, sigmoid and BCELoss,
    plain Adam, .item() each step; or relativistic with R1 and R2. Yields (G, D) after a step."""
    torch.manual_seed(cfg.seed)
    G, D = gan.networks(cfg)
    betas = cfg.beta1, cfg.beta2
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), cfg.lr, betas) for net in (G, D))
    bce, ones, pairs = nn.BCELoss(), torch.ones(cfg.batch, 1), cfg.loss == "relativistic"
    for x in batches:
        x_fake = G(torch.randn(cfg.batch, cfg.z))
        real, fake = D(x), D(x_fake.detach())
        if pairs:
            penalty = cfg.r1 * gan.r1_penalty(D, x) + cfg.r2 * gan.r1_penalty(D, x_fake)
            loss_D = bce((real - fake).sigmoid(), ones) + penalty
        else:
            loss_D = bce(real.sigmoid(), ones) + bce(fake.sigmoid(), 0 * ones)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        after = D(x_fake) - D(x) if pairs else D(x_fake)
        loss_G = bce(after.sigmoid(), ones)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        loss_G.item()
        yield G, D


@pytest.mark.parametrize("changes", [
    {}, dict(modern=1, augment=0, penalty_every=1, r2=9., init="default")])
def test_mistake_5_no_detach_and_the_order_of_the_game(changes, tmp_path):
    """Two steps equal a reference: D's step leaves G alone, G plays the same fakes against the D
    just improved."""
    cfg, x_all = small(**changes), images()
    nets = gan.train(cfg, x_all, torch.zeros(40).long(), tmp_path, CPU)[:2]
    *_, by_hand = textbook_gan(cfg, drawn(cfg, x_all))
    inputs = torch.randn(8, cfg.z), torch.randn(8, 1, 32, 32)
    for net, reference, at in zip(nets, by_hand, inputs):
        assert_close(net(at), reference(at), rtol=0, atol=1e-5)


def test_mistake_6_samples_in_training_mode():
    """In eval mode a picture depends on its own z alone; G is left as it was."""
    G, _ = gan.build("dcgan")
    z, c = torch.randn(8, 16), torch.zeros(8, 0)
    assert torch.equal(gan.sample(G, z[:1], c[:1]), gan.sample(G, z, c)[:1]) and G.training
    assert not torch.allclose(G(z)[:1], G(z[:2])[:1])


def test_mistake_7_real_and_fake_in_one_batch():
    """Batch norm of D in one pass over both mixes their statistics: other logits. That the game
    has two passes is proven by the reference of mistake 5."""
    _, D = gan.build("emoji")
    x = torch.randn(8, 3, 32, 32)
    assert not torch.allclose(D(torch.cat([x, x + 3]))[:8], D(x))


def test_average_and_refresh(tmp_path):
    """theta_ema = decay theta_ema + (1 - decay) theta; batch-norm statistics from its weights."""
    cfg = small(ema=.9, steps=1)
    torch.manual_seed(cfg.seed)
    first, _ = gan.networks(cfg)
    G_ema, *_ = gan.train(cfg, images(), torch.zeros(40).long(), tmp_path, CPU)
    last = torch.load(tmp_path / "last.pt", weights_only=True)["G"]
    assert_close(G_ema[1].weight, .9 * first[1].weight + .1 * last["1.weight"])
    h = G_ema[:2](torch.randn(10_000, 8))           # what the first batch norm sees, (N, 16, 4, 4)
    assert_close(G_ema[2].running_mean, h.mean((0, 2, 3)), atol=.005, rtol=0)


def test_between_prompts_and_ends():
    """t = 0 is z1, to the bit, t = 1 is z2; colours of the course; collapsed and died by rule."""
    z1, z2 = torch.randn(2, 16)
    assert torch.equal(gan.between(z1, z2, 0), z1)
    assert_close(gan.between(z1, z2, 1), z2)
    assert gan.parse_prompt("Blue hair, grey eyes") == 11 * data.HAIR.index("blue")
    rows = [dict(step=step, spread=v) for step, v in enumerate([1, .1, .5, .2, .1, .1])]
    assert [gan.since(rows[:n], gan.is_collapsed) for n in (5, 6)] == [-1, 3]
    assert [gan.is_dead({"|dD|": 1e-4, "|dG|": g}) for g in (1e-4, 1)] == [True, False]


# ---- gan.py: runs --------------------------------------------------------------------------------

def test_a_run_that_blows_up_keeps_the_last_good_checkpoint():
    """One line, exit 2, result.json says at which step, and compare shows it."""
    line = "mlp --data digits --h 4 --out sick --log-every 1 --loss wgan --lr 1e3"
    assert "blew up" in run(line, code=2).stderr
    assert "| blew up at |" in data.compare(["sick"], "table")
    assert data.load_checkpoint("sick/last.pt")["step"] == 1


@pytest.mark.parametrize("changes", [
    dict(preset="wgan", decay=1), dict(preset="text2img", amp=1, sn="D"),
    dict(preset="emoji", modern=1, d_h=4, ema=.9)])
def test_resumed_is_uninterrupted_to_the_bit(changes):
    """A run that ends in step 6 goes on from step 3. And the last rate; clipped weights."""
    cfg = small(**changes, steps=6, sample_every=3)
    x, y = images(40, cfg.channels, gan.NETS[cfg.net][1]), torch.arange(40)
    game = functools.partial(gan.train, cfg, x, y)
    game(Path("whole"), CPU)
    with mock.patch.object(data, "save", side_effect=[0, 0, KeyboardInterrupt]):
        with pytest.raises(KeyboardInterrupt):
            game(Path("parts"), CPU)
    *_, log = game(Path("parts"), CPU)
    assert [row["step"] for row in log.rows] == [1, 2, 3, 4, 5, 6]
    assert differing("whole/last.pt", "parts/last.pt") == []
    saved = torch.load("whole/last.pt", weights_only=True)
    rate = saved["opt_D"]["param_groups"][0]["lr"] / cfg.lr
    assert rate == pytest.approx(1 / 3 if cfg.decay else 1)
    assert not cfg.clip or saved["D"]["0.weight"].abs().max() <= cfg.clip


@pytest.mark.parametrize("script, line", [
    ("gan.py", "dcgan --data digits --samples 200 --sample-every 2 --steps 8 --out "),
    ("cyclegan.py", "--data faces --batch 4 --pool 6 --sample-every 2 --steps 8 --out ")])
def test_killed_and_resumed(script, line):
    """SIGKILL at a random moment, then the same command: the bits of the undisturbed run."""
    run(line + "whole", script=script)
    killed = f"exec '{sys.executable}' '{ROOT}/{script}' {line}killed"
    process = subprocess.Popen(killed, shell=True, stdout=subprocess.DEVNULL)
    while not Path("killed/last.pt").exists() and process.poll() is None:
        time.sleep(.01)
    time.sleep(random.random() / 2)
    process.kill()
    process.wait()
    run(line + "killed", script=script)
    assert differing("whole/last.pt", "killed/last.pt") == []


def test_two_ranks_equal_one():
    """Gradients are averaged and a batch is shared: two processes train what one does."""
    line = "mlp --data digits --bn none --amp 0 --steps 5 --samples 200 --out "
    run(line + "one")
    torchrun = f"'{sys.executable}' -m torch.distributed.run --nproc-per-node 2"
    torchrun += f" '{ROOT}/gan.py' {line} two"
    subprocess.run(torchrun, shell=True, check=True, capture_output=True)
    one, two = (torch.load(f"{ranks}/last.pt", weights_only=True) for ranks in ("one", "two"))
    assert_close((one["G"], one["D"]), (two["G"], two["D"]), rtol=0, atol=1e-5)


def test_learns_digits():
    """400 steps: the FID falls below a third of the untrained generator's; most digits occur."""
    found = []
    for steps in (1, 400):
        run(f"speedrun --data digits --samples 1000 --steps {steps} --out {steps}")
        found.append(data.read_run(str(steps))[1]["metrics"])
    assert found[1]["fid"] < found[0]["fid"] / 3 and found[1]["modes"] >= 6, found


def test_a_run_writes_what_it_promises():
    """Pictures, dump with labels; a finished run re-evaluates; a prompt draws one picture; a
    trained G is used in three lines."""
    line = "text2img --data faces-a --h 4 --steps 2 --batch 4 --samples 200 --out run "
    done = run(line + "--dump 7").stdout
    assert ("wrote    run: conditions.png curves.png interpolation.png labels.npy last.pt log.csv "
            "result.json samples.npy training.gif\nFID") in done
    assert np.load("run/samples.npy").shape == (7, 64, 64, 3) and Path("run/000002.png").exists()
    assert "wrote run/prompt.png" in run(line + "--prompt 'red hair blue eyes'").stdout
    assert "step " not in run(line).stdout
    assert {"D(G(z)) before", "D(G(z)) after", "|dD|", "sat fake"} <= set(data.read_run("run")[3])
    G, D = gan.build("text2img", h=4)
    G.load_state_dict(torch.load("run/last.pt", weights_only=True)["G_ema"])
    assert G.eval()(torch.randn(2, 123)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("line, says", [
    ("gcdan", "invalid choice: 'gcdan'"),
    ("dcgan --speed 3", "--speed"),
    ("dcgan --loss hinge", "invalid choice: 'hinge'"),
    ("dcgan --lr nan", "--lr nan must be positive"),
    ("dcgan --batch 1", "--batch 1: at least 2"),
    ("dcgan --steps 0", "no out/dcgan/last.pt"),
    ("text2img --prompt 'mauve hair red eyes'", "orange white aqua"),
    ("dcgan --data nowhere", "no data set or folder named nowhere"),
    ("dcgan --data empty", "holds no picture"),
    ("dcgan --data broken", "no readable picture"),
    ("dcgan --data digits --out empty/file", "is a file; name a folder"),
    ("dcgan --data digits --out empty/file/in", "name another folder"),
    ("dcgan --data digits --device cuda:9", "use --device cpu"),
    ("dcgan --data digits --out empty", "no readable checkpoint"),
    ("dcgan --data digits --out wide", "--h 8, not 16"),
])
def test_bad_input_is_one_line(line, says):
    """error: ... on stderr, exit code 2, and nothing half-written."""
    data.write_text("broken/a.png", "PNG and no more")
    data.write_text("empty/file", "")
    torch.save(Evil(), "empty/last.pt")
    data.save_checkpoint("wide/last.pt", {}, 1, gan.config("dcgan", data="digits", h=8))
    assert says in run(line, code=2).stderr and not Path("pwned").exists()
    assert not {path.suffix for path in Path().rglob("*")} & {".part", ".json"}


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_no_option_is_dead():
    """Every field is read by its script, and stands in a command of the Makefile, of the README or
    in a test."""
    written = "".join((ROOT / name).read_text() for name in ("Makefile", "README.md", __file__))
    for script, Config in ((gan, gan.GANConfig), (cyclegan, cyclegan.CycleConfig),
                           (biggan_interp, biggan_interp.Run), (fid, fid.FIDConfig)):
        source = inspect.getsource(script) + inspect.getsource(data)
        for field in Config.__dataclass_fields__.keys() - {"sources"}:
            assert re.search(rf"\.{field}\b|\"{field}\"", source), field
            flag = rf"--{field.replace('_', '-')}\b|\b{field}=|{field}=\W"
            assert re.search(flag, written), f"{script.__name__}: no command uses {field}"


# ---- data.py: files and downloads ----------------------------------------------------------------

def idx(shape, raw, kind=8):
    """A gzipped idx file."""
    return gzip.compress(struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + raw)


def test_idx_files():
    """Read exactly; cut, of another kind, too short, a bomb or a web page: one line."""
    x = images(3, 1, 28).numpy()[:, 0]
    whole = idx(x.shape, x.tobytes())
    Path("x.gz").write_bytes(whole)
    assert np.array_equal(data.read_idx("x.gz"), x)
    for raw in (whole[:-30], idx(x.shape, x.tobytes(), 9), idx(x.shape, x.tobytes()[:-9]),
                idx((1 << 16, 1 << 16, 1 << 16), b""), b"<html>"):
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
    Image.new("P", (8, 8), 0).save("p.png", transparency=0)
    assert (data.read_picture("p.png", 1) == 255).all()


def test_folders_bombs_and_fit(monkeypatch):
    """Sub-folders are classes, any shape is cropped and scaled; a huge picture is refused."""
    for i in range(30):
        kind = ("red", "blue")[i % 2]
        data.save(Image.new("RGB", (50 + i, 40), kind), f"pets/{kind}/{i}.png")
    x, y, classes = data.load("pets", 32)
    assert (len(x), len(data.load("pets", 32, "test")[0]), classes) == (27, 3, ["blue", "red"])
    assert torch.equal(x[:, 0, 9, 9], 255 * y.byte())
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    assert abs(int(data.fit(ramp, 32)[0, 0, 16]) - 32) <= 1
    monkeypatch.setattr(data, "MAX_PIXELS", 1000)
    with pytest.raises(data.UserError, match="over 1,000 pixels"):
        data.load("pets", 16)


@pytest.mark.parametrize("kind", ["gztar", "zip"])
def test_archives(kind, tmp_path, monkeypatch):
    """Tagged faces from an archive; a member that is too large and a cut archive are named."""
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    tags = ""
    for i in range(20):
        data.save(Image.new("RGB", (64, 64), "red"), f"anime/images/{i}.png")
        tags += f"{i},aqua hair red eyes\n"
    data.write_text("anime/tags.csv", tags)
    path = Path(shutil.make_archive("anime", kind, base_dir="anime"))
    shutil.rmtree("anime")
    x, y, _ = data.load("anime", 32)
    assert len(x) == 18 and (y == data.FACES.index("aqua hair red eyes")).all()
    with mock.patch.object(data, "MAX_BYTES", 10):
        with pytest.raises(data.UserError, match="refused"):
            data.load("anime", 64)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(data.UserError, match="no whole archive"):
        data.load("anime", 64)


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
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "dl")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    bad = [here + name for name in ("none", "cut", "page", "whole")]
    Path("other").write_bytes(b"other")
    good = data.sha256_of("other")
    with pytest.raises(data.Unavailable, match="Not Found.*cut off.*web page.*wrong file.*at .*/x"):
        data.fetch("x", bad, good)
    assert not list((tmp_path / "dl").iterdir())
    path = data.fetch("x", [*bad, (tmp_path / "other").as_uri()], good)
    assert path.read_bytes() == b"other" and data.fetch("x", [], good) == path
    path.write_bytes(b"damaged")
    with pytest.raises(data.UserError, match="damaged or another file"):
        data.fetch("x", bad, good)
    server.shutdown()


def test_offline_a_run_keeps_the_set_it_began_with(monkeypatch, capsys):
    """No MNIST: digits are drawn and the line says why; the run goes on with them tomorrow."""
    monkeypatch.setattr(data, "MNIST_URLS", ["file:///nowhere/"])
    name, x, _, _ = data.choose("mnist,digits", 32)
    assert name == "digits" and "no mnist" in capsys.readouterr().out and x.shape[1:] == (1, 32, 32)
    data.save_checkpoint("last.pt", {}, 1, gan.config("dcgan", data="digits"))
    assert data.kept(gan.config("dcgan"), Path()) == "digits"


def test_atomic_files_survive_errors_and_a_full_disk():
    """A block that fails leaves the old file; a full disk is one line, exit 2, no half file."""
    data.write_text("x", "old")
    with pytest.raises(ValueError), data.atomic("x") as part:
        part.write_text("half")
        raise ValueError
    assert Path("x").read_text() == "old" and len(list(Path().iterdir())) == 1
    line = f"ulimit -f 100; '{sys.executable}' '{ROOT}'/gan.py dcgan --data digits --out full"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr), done.stderr
    assert not list(Path("full").glob("*.pt"))


def test_ctrl_c():
    """One line that says from where it goes on, exit code 130."""
    with mock.patch.object(data, "save", side_effect=KeyboardInterrupt):
        done = run("dcgan --data digits", code=130)
    assert "goes on from the last checkpoint" in done.stdout


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="no ../shared/data")
def test_real_sets(monkeypatch):
    """MNIST is padded with black, emojis lie on white, faces have tags."""
    monkeypatch.setenv("DATA_DIR", str(SHARED / "data"))
    x, y, _ = data.load("mnist", 32, "test")
    assert x.shape == (10_000, 1, 32, 32) and x[:, :, :2].max() == 0 and y[:3].tolist() == [7, 2, 1]
    x, y, classes = data.load("fashion", 28)
    assert len(x) == 60_000 and classes[y[0]] == "boot"
    x, _, _ = data.load("emoji-apple", 32)
    assert len(x) == 2270 and (x[:, :, 0, 0] == 255).float().mean() > .9
    assert len(data.load("anime", 64, "test")[0]) == 888


def test_drawn_sets():
    """Seeded; the two styles show the same faces, in the colour of their label."""
    a, y = data.draw_faces("a", 5, 7, 32)
    b, y_b = data.draw_faces("b", 5, 7, 32)
    assert np.array_equal(y, y_b) and np.array_equal(a[2:], data.draw_faces("a", 3, 9, 32)[0])
    assert [tuple(hair) for hair in b[:, :, 8, 16]] == [data.RGB[data.HAIR[k // 11]] for k in y]
    assert np.array_equal(data.draw_digits(5, 3, 28)[0], data.draw_digits(5, 3, 28)[0])


def test_mistake_9_pictures_that_do_not_match_tanh():
    """uint8 -> [-1, 1] and back without loss; [0, 1] would leave half of tanh's range idle."""
    x = torch.arange(256, dtype=torch.uint8)
    assert data.to_float(x)[[0, -1]].tolist() == [-1, 1]
    assert torch.equal(data.to_uint8(data.to_float(x)), x)


# ---- data.py: pictures and runs ------------------------------------------------------------------

def test_grids_sheets_and_charts():
    """Each picture in its place, marks in red, panels one below the other, round ticks."""
    x = images(10, 3)
    page = np.asarray(data.grid(x, 4))
    assert np.array_equal(page[70:134:2, 2:66:2], x[4].permute(1, 2, 0))
    data.sheet([x[:3], x[3:5]], "s.png", left="ab", top="123", marks=[1])
    assert (np.asarray(Image.open("s.png")) == (255, 0, 0)).all(2).any()
    flat = dict(step=[1, 2, 3], D=[1., 1., 1.])
    data.curves("c.png", flat, [("losses", ["D", "G"]), ("saturation", ["sat fake"])])
    assert Image.open("c.png").size == (830, 230 + 20)
    assert np.allclose(data.ticks(.1, .42), [.1, .2, .3, .4])


def test_compare():
    """Several runs: a table, a strip of each one's samples, their curves over each other."""
    for seed in (0, 1):
        run(f"dcgan --data digits --steps 2 --seed {seed} --samples 200 --out run-{seed}")
    done = run("compare run-0 run-1 --out both", script="data.py").stdout
    assert "| run-0 | 2 |" in done and Path("both.md").read_text() in done
    assert Image.open("both.png").height == 2 * 84 + 4 and Path("both-curves.png").exists()
    assert "no finished run" in run("compare nowhere", code=2, script="data.py").stderr


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
    """R R = S, for S of rank 64 and 39; fast and textbook agree; and a shift."""
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
    hair, eyes = net.attributes(x)
    assert torch.equal(net.predict(x)[0], 11 * hair + eyes)
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

def faces():
    """Both styles of the drawn faces."""
    return [cyclegan.load_style(name, 32, "cpu") for name in cyclegan.PAIRS["faces"]]


@pytest.mark.parametrize("make, parameters, shape", [
    (cyclegan.CycleGenerator, 144_448, (2, 3, 32, 32)), (cyclegan.cycle_discriminator, 262_048,
    (2, 1)), (cyclegan.ResNetGenerator, 11_378_179, (2, 3, 32, 32)),
    (cyclegan.PatchGAN, 2_764_737, (2, 1, 2, 2)),
])
def test_cyclegan_networks_are_the_published_ones(make, parameters, shape):
    net = make()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(2, 3, 32, 32)).shape == shape


def test_mistake_10_shared_layers_twice_in_the_optimiser(tmp_path):
    """UNIT's two shared blocks are in the optimiser once, and on every path."""
    cfg = cyclegan.config(model="unit", steps=1, batch=2)
    G, *_ = cyclegan.train(cfg, *faces(), tmp_path, CPU)
    optimiser = data.load_checkpoint(tmp_path / "last.pt")["opt_G"]
    assert len(optimiser["param_groups"][0]["params"]) == len(list(G.parameters()))
    shared = [G.into.body[0].weight, G.outof.body[0].weight]
    for way in ("ab", "ba", "aa", "bb"):
        for grad in torch.autograd.grad(G(torch.randn(1, 3, 32, 32), way).norm(), shared):
            assert grad.any()


def test_cyclegan_pool_shows_old_pictures_half_the_time():
    pool = cyclegan.ImagePool(50)
    x = torch.arange(4050., requires_grad=True)
    ages = x - pool(x)                          # of the first 50 it is 0
    assert .47 < (ages > 0).float().mean() < .53            # sigma .008
    assert ages.mean().item() == pytest.approx(50, rel=.15)     # replaced once in 100 draws
    assert not pool(x).requires_grad


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
    assert terms["cycle"] == pytest.approx(.1 * 12 * (2 + 2))           # back to 2 and 3
    assert terms["identity"] == pytest.approx(.05 * 12 * (0 + 1))       # 0 and 2
    fake_a, fake_b, terms = cyclegan.unit_terms(Toy(), a, b, cfg)
    assert fake_a.unique() == 5 and fake_b.unique() == 5                # mu_a 1, mu_b 2
    want = {"reconstruction": 100 * (4 + 9), "cycle": 100 * (13 + 29), "kl": .1 * (1 + 4),
            "cycle kl": .1 * (100 + 36)}                                # mu_ab 10, mu_ba 6
    assert terms == pytest.approx(want)


def squares(D, pictures, target):
    """Sum over both styles of the mean of (D(x) - target)^2."""
    return sum(((D[s](x) - target) ** 2).mean() for s, x in zip("ab", pictures))


@pytest.mark.parametrize("model, weight", [("cyclegan", 1), ("unit", 10)])
def test_cyclegan_step_is_the_game(tmp_path, model, weight):
    """D's step, then G's on the same fakes, written down anew, a loss and a style at a time."""
    cfg = cyclegan.config(model=model, steps=1, batch=4, amp=0)
    styles = faces()
    *_, log = cyclegan.train(cfg, *styles, tmp_path, CPU)
    torch.manual_seed(cfg.seed)
    G, D = [net.to(memory_format=torch.channels_last) for net in cyclegan.networks(cfg)]
    torch.manual_seed(cfg.seed * 1_000_003 + 1)
    x = [style.train[torch.randint(1000, (4,))] / 127.5 - 1 for style in styles]
    *fakes, other = cyclegan.TERMS[model](G, *x, cfg)
    loss_D = (squares(D, x, 1) + squares(D, fakes, 0)) / 2
    loss_D.backward(retain_graph=True)
    torch.optim.Adam(D.parameters(), cfg.lr, (.5, .999), weight_decay=cfg.weight_decay).step()
    G.zero_grad()
    game = weight * squares(D, fakes, 1)
    (game + sum(other.values())).backward()
    want = {"D": loss_D.item(), "G": game.item(), "|dG|": cyclegan.grad_norm(G).item()}
    assert {name: log.rows[0][name] for name in want} == pytest.approx(want, rel=1e-3)


def test_cyclegan_scores_see_that_nothing_was_done():
    """Style b is an exact map of a's colours, G does nothing, and the headline says so."""
    a, _ = faces()
    b = a._replace(name="faces-b", train=a.train[:999],         # too few for an FID
                   test=(a.test[:, [2, 0, 1]] * .5 + 9).byte())
    G = cyclegan.CycleGAN({"ab": nn.PReLU(init=1.)})            # x -> x
    G["ba"] = G["ab"]
    m = cyclegan.scores(G, a, b, "ab")
    true = np.abs(a.test.numpy() / 255. - b.test.numpy() / 255.).mean()
    assert m["ab cycle"] == 0 and m["ab L1"] == m["ab L1 identity"] == pytest.approx(true)
    assert m["ab L1 colour map"] < .003
    assert "NOT better than ab L1 colour map" in cyclegan.verdict(m, "ab")


def test_cyclegan_probe_tells_apart_what_is_apart():
    a, b = faces()
    G = cyclegan.UNIT()
    assert cyclegan.probe_accuracy(G, a, b) > .95
    G.encoder["b"] = G.encoder["a"]
    halves = [a._replace(train=a.train[i::2]) for i in (0, 1)]
    assert .4 < cyclegan.probe_accuracy(G, *halves) < .6


def test_cyclegan_learns_faces(tmp_path):
    a, b = faces()
    cfg = cyclegan.config(steps=80, batch=8, lr=1e-3)
    G, *_ = cyclegan.train(cfg, a, b, tmp_path, CPU)
    error = cyclegan.l1(cyclegan.translate(G, a.test, "ab"), b.test)
    assert error < .6 * cyclegan.l1(a.test, b.test)


@pytest.mark.parametrize("flags", ["", " --size 64 --width 4"])
def test_cyclegan_translates_files_and_trains_nothing(flags):
    """In eval mode: a picture's translation does not depend on the others of the folder."""
    for i in range(4):
        data.save(Image.new("RGB", (40, 50), (60 * i, 9, 99)), f"own/{i}.png")
    run(*f"--a own --b own --steps 1 --out run{flags}".split(), script="cyclegan.py")
    before = Path("run/last.pt").read_bytes()
    made = []
    for source, way in (("own", "ba"), ("own/0.png", "ba"), ("own/0.png", "ab")):
        words = f"--translate {source} --direction {way} --out run --steps 50 --resume 0"
        run(*words.split(), script="cyclegan.py")
        made.append(data.read_picture(f"run/translated-{way}/0-0.png").int())
    assert Path("run/last.pt").read_bytes() == before and Path("run/translated-ba.png").is_file()
    assert len(os.listdir("run/translated-ba")) == 4 and (made[0] - made[1]).abs().max() <= 1
    assert (made[2] - made[1]).abs().max() > 1


@pytest.mark.parametrize("flags, words", [
    ("--size 48", "32"), ("--data mnist", "distant"), ("--a x", "--b"), ("--lr nan", "--lr"),
    ("--a one --b one", "2 pictures"), ("--model unit --identity 1", "UNIT has"),
    ("--steps 0 --out new", "train first"), ("--translate x.png --out gan", "no checkpoint of"),
])
def test_cyclegan_bad_input_is_one_line(flags, words):
    data.save(Image.new("RGB", (40, 40)), "one/x.png")
    Path("gan").mkdir()
    torch.save({"config": {"preset": "dcgan"}}, "gan/last.pt")
    assert words in run(*flags.split(), code=2, script="cyclegan.py").stderr


# ---- biggan_interp.py ----------------------------------------------------------------------------

def test_biggan_loads_and_draws_the_golden_pictures():
    """From a file with the published names; a wrong key is named."""
    sys.path.insert(0, str(SHARED / "golden"))
    g = golden("biggan")
    import recipe
    config, key = biggan_interp.Config(channel_width=8), "generator.layers.3.conv_1.weight_v"
    shapes = {key: w.shape for key, w in biggan_interp.Generator(config).state_dict().items()}
    state = {key: torch.from_numpy(w) for key, w in recipe.state(shapes, g["seed"]).items()}
    torch.save(state, "weights.bin")
    G = biggan_interp.load_published("weights.bin", config)
    z = np.random.RandomState(g["seed"] + 1).standard_normal((3, 128)).clip(-2, 2)
    z, y = torch.from_numpy(z).float(), torch.tensor(g["classes"])
    for case in g["cases"]:
        values = G(case["truncation"] * z, y, case["truncation"]).flatten()[case["at"]]
        assert torch.allclose(values, torch.tensor(case["values"]), atol=1e-4)
    torch.save({**state, key: torch.zeros(3)}, "weights.bin")
    with pytest.raises(data.UserError, match=key):
        biggan_interp.load_published("weights.bin", config)


def test_biggan_has_the_published_names_shapes_and_count():
    with torch.device("meta"):
        G = biggan_interp.Generator()
    assert sum(p.numel() for p in G.parameters()) == 50_388_609
    shapes = {key: list(value.shape) for key, value in G.state_dict().items()}
    assert shapes == golden("biggan128_keys")                       # 506 of them


def test_biggan_spectral_norm_divides_by_the_largest_singular_value():
    layer = biggan_interp.Spectral(16, 8, 3, 3)
    nn.init.normal_(layer.weight_orig)
    for _ in range(300):
        layer.weight()
    assert torch.linalg.svdvals(layer.eval().weight().flatten(1))[0].item() == pytest.approx(1)


def test_biggan_noise_has_the_truncated_law():
    """Of N(0, 1) on [-2, 2] the variance is 1 - 4 phi(2) / (2 Phi(2) - 1)."""
    z = biggan_interp.truncated_noise(2000, 100, .5)
    assert z.abs().max() <= 1 and z.var().item() == pytest.approx(.25 * .7737, rel=.01)


def test_biggan_tsne_is_its_equations_and_as_good_as_the_exact_method():
    data.keep_memory()                                      # three times as fast
    r = np.random.RandomState(0)
    centres, which = r.randn(20, 128) * 1.5, r.randint(0, 20, 1000)
    x = torch.from_numpy(centres[which] + r.randn(1000, 128))       # 20 Gaussians
    P = biggan_interp.affinities(x, 30)
    y = biggan_interp.tsne(x, 30, seed=0)
    assert biggan_interp.kl(P, y) <= .349                   # scikit-learn: .333
    assert torch.equal(P, P.T) and abs(P.sum() - 1) < 1e-12
    p = biggan_interp.conditional(x, 30)
    assert (torch.special.entr(p).sum(1).exp() - 30).abs().max() < 1e-3
    off, y = ~torch.eye(1000, dtype=torch.bool), torch.randn(1000, 2).double().requires_grad_()
    w = 1 / (1 + ((y[:, None] - y) ** 2).sum(2)[off])
    C = (P[off] * (P[off] / (w / w.sum())).log()).sum()
    (gradient,) = torch.autograd.grad(C, y)
    assert torch.allclose(biggan_interp.kl(P, y.detach()), C)
    assert torch.allclose(biggan_interp.kl_gradient(P, y.detach()), gradient, atol=1e-10)


def test_biggan_walks_end_at_the_classes():
    G = biggan_interp.Generator(biggan_interp.SMALL).eval()
    z = biggan_interp.truncated_noise(1, 32)
    ends = biggan_interp.sample(G, z.expand(2, -1), torch.tensor([3, 100])).int()
    assert (biggan_interp.walk(G, 3, 100, z, 1.)[[0, -1]] - ends).abs().max() <= 1
    r = torch.tensor([[0.], [8], [9], [20]])
    assert biggan_interp.between(r[1], r[0], [1, .25]).tolist() == [[8], [2]]
    pairs = biggan_interp.extreme_pairs(r)
    assert pairs["near"][0] == [1, 2] and pairs["far"][-1] == [0, 3]


def test_biggan_losses_and_projection_are_their_equations():
    real, fake = torch.tensor([2., .5, -1.]), torch.tensor([-2., 0., 3.])
    assert biggan_interp.d_hinge(real, fake).item() == pytest.approx(7.5 / 3)
    assert biggan_interp.g_hinge(fake).item() == pytest.approx(-1 / 3)
    D, x, y = biggan_interp.ProjectionD(132), torch.randn(2, 3, 32, 32), torch.tensor([3, 100])
    difference = ((D.v.weight[y] - D.v.weight[y + 1]) * D.phi(x)).sum(1)
    assert torch.allclose(D(x, y) - D(x, y + 1), difference, atol=1e-5)
    r1 = biggan_interp.conditional_r1(lambda x, y: 3 * x.flatten(1).sum(1), x, y)
    assert r1.item() == pytest.approx(9 * 3 * 32 * 32 / 2)          # |grad|^2 / 2 of a linear D


def test_biggan_runs_and_goes_on_bit_for_bit(monkeypatch):
    """Without the weights a small one is trained; stopped while it saves, it ends the same."""
    monkeypatch.setattr(biggan_interp, "URLS", ["file:///nowhere"])
    monkeypatch.setattr(biggan_interp, "BATCH", 4)
    monkeypatch.setattr(biggan_interp.SMALL, "n_stats", 2)
    monkeypatch.setattr(biggan_interp, "tsne", lambda r, *_: r[:, :2].detach().double())
    save = data.save_checkpoint

    def stop_at_4(path, parts, step, cfg):
        if step == 4:
            raise KeyboardInterrupt
        save(path, parts, step, cfg)

    words = "--steps 4 --sample-every 2 --out".split()
    assert run(*words, "whole", script="biggan_interp.py").stdout.splitlines()[-1][:3] == "FID"
    with monkeypatch.context() as patch:
        patch.setattr(data, "save_checkpoint", stop_at_4)
        run(*words, "twice", script="biggan_interp.py", code=130)
    monkeypatch.setattr(biggan_interp, "judge", lambda *_: None)
    monkeypatch.setattr(biggan_interp, "evaluate", lambda *_: None)
    run(*words, "twice", script="biggan_interp.py")
    assert differing("whole/last.pt", "twice/last.pt") == []
    assert {"interpolation.png", "tsne.png", "result.json"} <= set(os.listdir("whole"))


@pytest.mark.parametrize("words, why", [
    ("--truncation 0", "truncation"), ("--steps -1", "steps"), ("--log-every 0", "log-every"),
    ("--model small --steps 0", "train first"), ("--model published", "--model small")])
def test_biggan_refuses_in_one_line(words, why, monkeypatch):
    monkeypatch.setattr(biggan_interp, "URLS", ["file:///nowhere"])
    assert why in run(*words.split(), code=2, script="biggan_interp.py").stderr


# ---- what is written about it --------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
TARGETS = re.findall(r"^#? ?([a-z][\w-]*):.*##", (ROOT / "Makefile").read_text(), re.M)


def guide():
    """[(script, name, names it brings along)] of the snippets in the README's copying guide."""
    snippets = []
    table = README.split("## Copying guide")[1].split("\n## ")[0]
    for row in re.findall(r"^.* \| \w+\.py: .*", table, re.M):
        along = " ".join(re.findall("`(.*?)`", row.split(" | ")[2])).split()
        for file, names in re.findall(r"(?:(\w+)\.py: |; )(?:weights: )?`([\w ]+)`", row):
            script = sys.modules.get(file) or script
            snippets += [(script, name, along) for name in names.split()]
    return snippets


@pytest.mark.parametrize("script, name, along", guide())
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
    assert len(README.splitlines()) <= 230 and len(README.split()) <= 2800
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
        presets = gan.PRESETS if script == "gan" else ()
        data.arguments(configs[script], words, presets, positional="sources")
    assert len(commands) > 40


# ---- python test_all.py bench: the textbook loop and ours, in turns, in one run ------------------


def batches(x, batch):
    """A DataLoader without end, as tutorials have it: each picture is fetched for itself."""
    loader = torch.utils.data.DataLoader(x, batch, True, num_workers=1, drop_last=True)
    while True:
        for part in loader:
            yield part / 127.5 - 1


def textbook_cyclegan(cfg, batches_a, batches_b):
    """CycleGAN as the exercises have it: D and G each translate anew. Yields after a step."""
    G, D = cyclegan.networks(cfg)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), cfg.lr, (.5, .999)) for net in (G, D))
    for x_a, x_b in zip(batches_a, batches_b):
        for opt in opt_D, opt_G:
            opt.zero_grad()
            for way, x, y in ("ab", x_a, x_b), ("ba", x_b, x_a):
                d, y_fake = D[way[1]], G(x, way)
                if opt is opt_D:
                    loss = cyclegan.d_lsgan(d(y), d(y_fake.detach()))
                else:
                    cycle = cyclegan.cycle_loss(x, G(y_fake, way[::-1]))
                    loss = cyclegan.g_lsgan(d(y_fake)) + cfg.lambda_cycle * cycle
                loss.backward()
            opt.step()
        yield


ROWS = {  # config, steps
    "A (16,16)": (gan.config("dcgan"), 300),
    "A (100,100)": (gan.config("dcgan", z=100, h=100), 20),
    "E 64 x 64": (gan.config("anime"), 8),
    "CycleGAN": (cyclegan.CycleConfig(), 15),
}


def bench_one(row, side):
    """Prints the pictures a second of one side of one row; its first five steps are left out."""
    cfg, steps = ROWS[row]
    if row == "CycleGAN":
        x = images(4096, 3)
        textbook = textbook_cyclegan(cfg, batches(x, cfg.batch), batches(x, cfg.batch))
        style = cyclegan.Style("a", x, x[:100], None)
        ours = functools.partial(cyclegan.train, cfg, style, style)
    else:
        x = images(4096, cfg.channels, gan.NETS[cfg.net][1])
        textbook = textbook_gan(cfg, batches(x, cfg.batch))
        ours = functools.partial(gan.train, cfg, x, torch.zeros(4096).long())
    if side == "textbook":
        times = [time.perf_counter() for _ in zip(range(steps + 5), textbook)]
        seconds = times[-1] - times[4]
    else:
        cfg.steps, cfg.log_every, cfg.sample_every = steps + 5, 5, 10 ** 9
        *_, log = ours(Path(tempfile.mkdtemp()), data.device("cpu"))
        seconds = log.rows[-1]["seconds"] - log.rows[1]["seconds"]
    print(steps * cfg.batch / seconds)


def rates(f, *words):
    """Calls a second, twice."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        f(*words)
        found.append(1 / (time.perf_counter() - start))
    return np.array(found)


def show(row, plain, ours):
    """A row of the table: medians, and the ratio's median and range."""
    ratio = ours / plain
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
        show(f"{row}, images/s", np.array(found[::2]), np.array(found[1::2]))
    x, plain, net = images(32, 3), fid.Inception(), fid.Inception()
    net.load_published(net.state_dict())
    show("Inception, images/s", 32 * rates(plain.features, x), 32 * rates(net.features, x))
    a = torch.randn(10_000, 2048, dtype=torch.double)
    mu, s1 = a.mean(0), a.T.cov()
    s2 = s1 + .1 * s1 @ s1
    with contextlib.suppress(ImportError):
        import scipy.linalg
        slow = 60 * rates(scipy.linalg.sqrtm, (s1 @ s2).numpy())
        show("FID's root, d = 2048, a minute (textbook: SciPy's)", slow,
             60 * rates(fid.frechet_distance, mu, s1, mu, s2))


if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    bench_one(*sys.argv[2:]) if sys.argv[2:] else bench()
