"""Tests: every equation against a closed form or a reference, every promise tried. `make test`; no network is needed.

Real data and reference numbers are used where ../shared (or DATA_DIR) has them and skipped elsewhere. `python test_all.py --kill`
kills a run 30 times, `python test_all.py bench` measures speed, `python test_all.py wrong` makes the ten mistakes.
"""
import contextlib, copy, dataclasses, functools, http.server, importlib.util, io, json, math, os, pickle, random, re, shlex, shutil, signal
import struct, subprocess, sys, tarfile, threading, time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"
REAL = os.environ.get("DATA_DIR") or (str(SHARED / "data") if (SHARED / "data").is_dir() else "")
os.environ.pop("DATA_DIR", None)

import biggan_interp
import cyclegan
import data
import fid
import gan


def golden(name):
    """Reference numbers, or a skip where they are not at hand."""
    path = SHARED / "golden" / name
    if not path.exists():
        pytest.skip(f"no {name} here")
    return json.loads(path.read_text())


def recipe():
    """The module that defines the reference weights."""
    golden("metrics.json")
    spec = importlib.util.spec_from_file_location("recipe", SHARED / "golden" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def real(monkeypatch):
    """The folder of real data sets as DATA_DIR."""
    if not REAL:
        pytest.skip("no real data here; set DATA_DIR")
    monkeypatch.setenv("DATA_DIR", REAL)
    return Path(REAL)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A downloads folder with small built-in sets and quickly trained classifiers, so that a run takes seconds."""
    folder = data.DOWNLOADS = tmp_path_factory.mktemp("home") / "downloads"
    os.environ["DOWNLOADS"] = str(folder)
    for name, split, n, first in (("digits", "train", 2000, 1), ("digits", "test", 1000, 2), ("faces-a", "train", 600, 0),
                                  ("faces-b", "train", 600, 10_000), ("faces-a", "test", 1000, 20_000),
                                  ("faces-b", "test", 1000, 20_000)):
        data.cached(f"{name}-32-{split}", lambda: data.draw_digits(n, first, 32) if name == "digits" else
                    data.draw_faces(name[-1], n, first, 32))
    whole = fid.train_classifier
    fid.train_classifier = lambda *a, **k: whole(*a, **dict(k, steps=80))
    for name in ("digits", "faces-a", "faces-b"):
        fid.classifier(name, 32)
    fid.train_classifier = whole
    return folder


@pytest.fixture(autouse=True)
def in_tmp(home, tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def run(*words, code=0, script="gan.py", **env):
    """A script as a user starts it; asserts its exit code and returns (stdout, stderr)."""
    r = subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], capture_output=True, text=True, timeout=240,
                       env={**os.environ, **env})
    assert r.returncode == code, r.stdout[-2000:] + r.stderr[-2000:]
    return r.stdout, r.stderr


def one_line(err, *words):
    """An error message is one line that names what is wrong."""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for w in words:
        assert w in err, err


TINY = ["--data", "digits", "--h", 4, "--batch", 16, "--samples", 300, "--log-every", 5, "--sample-every", 5]


def tiny(preset="dcgan", **changes):
    """A Config that trains in a blink."""
    base = dict(gan.PRESETS[preset], preset=preset, h=4, batch=16, samples=300, log_every=5, sample_every=5, steps=10, amp=0)
    return gan.Config(**{**base, **changes})


def train_tiny(cfg, out):
    """gan.train on the small built-in sets."""
    name = "digits" if cfg.channels == 1 else "faces-a"
    x, y, _ = data.load(name, 32)
    x = x if cfg.size == 32 else data.fit(x, cfg.size)
    Path(out).mkdir(parents=True, exist_ok=True)
    return gan.train(cfg, x, y, Path(out), torch.device("cpu"))


def count(net):
    return sum(p.numel() for p in net.parameters())


# ---- gan.py: networks ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("z, h, g, d", [(16, 16, 57_937, 42_432), (100, 16, 143_953, 42_432), (16, 100, 1_706_101, 1_609_200),
                                        (100, 100, 2_243_701, 1_609_200)])
def test_dcgan_parameters(z, h, g, d):
    G, D = gan.build("dcgan", z=z, h=h)
    assert (count(G), count(D)) == (g, d)
    assert G(torch.randn(2, z)).shape == (2, 1, 32, 32) and D(torch.randn(2, 1, 32, 32)).shape == (2,)


def test_parameters_of_the_other_systems():
    G, D = gan.build("emoji")
    assert (count(G), count(D), count(gan.build("emoji", h=64)[1])) == (467_488, 262_048, 1_036_096)
    assert count(gan.build("emoji", net="emoji-k4")[0]) == 463_648
    sizes = lambda net: [p.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d))
                         for p in [torch.cat([q.flatten() for q in m.parameters()])]]
    G, D = gan.build("anime")
    assert sizes(G) == [819_200, 1024, 2_097_152, 512, 524_288, 256, 131_072, 128, 3072] and count(G) == 3_576_704
    assert sizes(D) == [3072, 131_072, 256, 524_288, 512, 2_097_152, 1024, 8192] and count(D) == 2_765_568
    assert gan.build("cwgan")[0].layers[0].in_channels == 110 and gan.build("cwgan")[1].layers[0].in_channels == 11


@pytest.mark.parametrize("preset", list(gan.PRESETS) + ["emoji-k4"])
def test_every_preset_makes_pictures_and_logits(preset):
    cfg = gan.Config(**gan.PRESETS.get(preset, dict(gan.EMOJI, net=preset)))
    G, D = gan.networks(dataclasses.replace(cfg, h=4))
    c = gan.one_hot(torch.tensor([1, 7]), cfg.classes) if cfg.cond != "none" else None
    x = G(gan.draw_z(2, cfg, "cpu"), c)
    assert x.shape == (2, cfg.channels, cfg.size, cfg.size) and x.abs().max() <= 1
    out = D(x, c)
    assert (out[0].shape, out[1].shape) == ((2,), (2, 23)) if cfg.cond == "ac" else out.shape == (2,)


def test_padding_formula_of_the_course():
    pads = [math.ceil(((y - 1) * 2 + 5 - x) / 2) for x, y in ((32, 16), (16, 8), (8, 4), (4, 1))]
    assert pads == [m.padding[0] for m in gan.build("emoji")[1].layers if isinstance(m, nn.Conv2d)] == [2, 2, 2, 1]


def test_initialisation():
    G, _ = gan.build("dcgan", z=100, h=100)
    w, bn = G.layers[3].weight, G.layers[4]
    assert abs(w.std().item() - .02) < 5e-4 and abs(bn.weight.mean().item() - 1) < .01 and bn.bias.abs().max() == 0


def test_bn_act_and_raw_switches():
    kinds = lambda net: {type(m) for m in net.modules()}
    for bn, g, d in (("both", 1, 1), ("G", 1, 0), ("D", 0, 1), ("none", 0, 0)):
        G, D = gan.build("anime", bn=bn, h=4)
        assert (nn.BatchNorm2d in kinds(G), nn.BatchNorm2d in kinds(D)) == (g, d)
    G, D = gan.build("dcgan", act="selu")
    assert nn.SELU in kinds(G) and nn.SELU in kinds(D) and nn.LeakyReLU not in kinds(D)
    assert nn.Tanh not in kinds(gan.build("anime", raw=1, h=4)[0])


def test_noise_laws():
    z = lambda noise: gan.draw_z(5000, gan.Config(noise=noise), "cpu")
    assert abs(z("normal").std() - 1) < .02
    assert z("uniform").min() < -.99 and abs(z("uniform").mean()) < .02 and abs(z("uniform").std() - 3 ** -.5) < .01
    assert 0 <= z("uniform01").min() and abs(z("uniform01").mean() - .5) < .01


# ---- gan.py: losses and regularisers ---------------------------------------------------------------------------------

REAL_LOGITS, FAKE_LOGITS = torch.tensor([.3, -2., 4., 30.]), torch.tensor([-.7, .2, 1.5, -40.])


def test_bce_on_logits_is_sigmoid_then_bce_in_value_and_gradient():
    r, f = (t.clone()[:3].double().requires_grad_() for t in (REAL_LOGITS, FAKE_LOGITS))
    ours = torch.autograd.grad(gan.d_bce(r, f), (r, f))
    ref = F.binary_cross_entropy(r.sigmoid(), torch.ones(3).double()) + F.binary_cross_entropy(f.sigmoid(), torch.zeros(3).double())
    assert torch.allclose(gan.d_bce(r, f), ref, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, torch.autograd.grad(ref, (r, f))))
    assert gan.d_bce(torch.tensor([-200.]), torch.tensor([200.])) == 400          # no -inf where sigmoid rounds to 0


def test_losses_against_closed_forms():
    r, f = REAL_LOGITS.double(), FAKE_LOGITS.double()
    forms = {"bce": (-(r.sigmoid().log()).mean() - (1 - f.sigmoid()).log().mean(), -f.sigmoid().log().mean()),
             "saturating": (-(r.sigmoid().log()).mean() - (1 - f.sigmoid()).log().mean(), (1 - f.sigmoid()).log().mean()),
             "lsgan": (((r - 1) ** 2).sum() / 8 + (f ** 2).sum() / 8, ((f - 1) ** 2).sum() / 4),
             "wgan": (f.mean() - r.mean(), -f.mean()),
             "hinge": ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(), -f.mean())}
    assert forms.keys() == gan.LOSSES.keys()
    for name, (d, g) in forms.items():
        assert torch.allclose(gan.LOSSES[name][0](r, f), d) and torch.allclose(gan.LOSSES[name][1](f), g), name


def test_losses_at_their_stationary_points_and_starts():
    zero, half = torch.zeros(8), torch.full((8,), .5)
    assert abs(gan.d_bce(zero, zero) - 2 * math.log(2)) < 1e-6 and abs(gan.g_bce(zero) - math.log(2)) < 1e-6
    assert gan.d_lsgan(half, half) == .25 and gan.g_lsgan(half) == .25 and gan.d_hinge(zero, zero) == 2
    # with p_real = p_fake the best D is constant: logit 0 for BCE, 1/2 for least squares (Goodfellow prop. 1, Mao eq. 4)
    for loss, best in ((gan.d_bce, 0.), (gan.d_lsgan, .5)):
        t = torch.full((4,), best, requires_grad=True)
        assert torch.autograd.grad(loss(t, t), t)[0].abs().max() < 1e-7
    t = torch.tensor([-8.], requires_grad=True)                     # D is sure: the log D trick keeps its gradient
    assert torch.autograd.grad(gan.g_saturating(t), t)[0].abs() < 1e-3 < .99 < torch.autograd.grad(gan.g_bce(t), t)[0].abs()


def test_losses_are_means_over_the_batch():
    for d, g in gan.LOSSES.values():
        assert torch.allclose(d(REAL_LOGITS, FAKE_LOGITS), d(REAL_LOGITS.repeat(3), FAKE_LOGITS.repeat(3)))
        assert torch.allclose(g(FAKE_LOGITS), g(FAKE_LOGITS.repeat(3)))


def test_gradient_penalties_of_a_linear_critic():
    w = torch.randn(3, 8, 8) * .1
    D = lambda x: (x * w).sum((1, 2, 3))
    x, x_fake = torch.randn(2, 5, 3, 8, 8)
    assert torch.allclose(gan.gradient_penalty(D, x, x_fake), (w.norm() - 1) ** 2, atol=1e-5)
    assert torch.allclose(gan.r1_penalty(D, x), w.norm() ** 2 / 2, atol=1e-5)
    w.requires_grad_()
    assert torch.autograd.grad(gan.gradient_penalty(lambda x: (x * w).sum((1, 2, 3)), x, x_fake), w)[0].abs().sum() > 0


def test_gradient_penalty_interpolates_with_eps_and_one_minus_eps():
    seen = []
    gan.gradient_penalty(lambda x: seen.append(x) or x.sum((1, 2, 3)), torch.full((200, 1, 2, 2), 1.), torch.full((200, 1, 2, 2), 3.))
    a = seen[0].detach().flatten(1)
    assert 1 <= a.min() < 1.1 and 2.9 < a.max() <= 3                 # eps and eps would give 4 eps: 0 .. 4
    assert a.std(1).max() == 0 and a[:, 0].std() > .3               # one eps an image, another for the next


def test_spectral_norm():
    for layer in (nn.Conv2d(8, 16, 3), nn.Linear(30, 20)):
        W = layer.weight.detach().flatten(1).clone()
        nn.utils.parametrize.register_parametrization(layer, "weight", gan.SpectralNorm(layer.weight, iterations=1))
        for _ in range(200):                                         # training mode: one iteration a pass
            layer.weight
        ours = layer.weight.detach().flatten(1)
        sigma = torch.linalg.svdvals(W)[0]
        assert torch.allclose(ours, W / sigma, rtol=1e-4, atol=1e-7) and abs(torch.linalg.svdvals(ours)[0] - 1) < 1e-4
        u = layer.parametrizations.weight[0].u.clone()
        layer.eval().weight
        assert torch.equal(u, layer.parametrizations.weight[0].u)    # eval mode leaves u alone
    G, D = gan.build("anime", sn=1, h=4)
    (D(torch.randn(2, 3, 64, 64)) - D(torch.randn(2, 3, 64, 64))).sum().backward()       # two passes, one backward
    assert sum("original" in n for n, _ in D.named_parameters()) == 5


def test_clipping_bounds_every_weight():
    D = gan.build("wgan", h=4)[1]
    gan.clip_weights(D, .01)
    assert max(p.abs().max() for p in D.parameters()) <= .01
    cfg = tiny("cwgan-clip", size=28, classes=10, steps=3, d_steps=2)
    D = train_tiny(cfg, "w")[2]
    assert max(p.abs().max() for p in D.parameters()) <= .01


def test_auxiliary_classifier_loss():
    logits, y = torch.randn(6, 23), torch.tensor([0, 5, 131, 60, 11, 12])
    ref = F.nll_loss(logits[:, :12].log_softmax(1), y // 11) + F.nll_loss(logits[:, 12:].log_softmax(1), y % 11)
    assert torch.allclose(gan.ac_loss(logits, y, 132), ref, atol=1e-6)
    assert gan.one_hot(y, 132).sum(1).eq(2).all() and gan.one_hot(y, 132)[2, 11] == 1 == gan.one_hot(y, 132)[2, 22]


def test_condition_planes_are_constant_images():
    cfg = gan.Config(**gan.PRESETS["cwgan"])
    D, seen = gan.networks(cfg)[1], []
    D.layers.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    D(torch.zeros(2, 1, 28, 28), gan.one_hot(torch.tensor([3, 9]), 10))
    assert seen[0].shape == (2, 11, 28, 28) and seen[0][0, 4].eq(1).all() and seen[0].sum() == 2 * 28 * 28


# ---- gan.py: the training loop ---------------------------------------------------------------------------------------

def test_loop_order_detach_and_real_labels(monkeypatch):
    """Spies: D sees real, detached fake, then attached fake; the class loss sees the first and the last of them."""
    calls, classes, batches = [], [], []
    whole, ac = gan.Discriminator.forward, gan.ac_loss

    def forward(self, x, c=None):
        out = whole(self, x, c)
        calls.append((x.requires_grad, x.detach(), out[1]))
        return out
    monkeypatch.setattr(gan.Discriminator, "forward", forward)
    monkeypatch.setattr(gan, "ac_loss", lambda l, y, k: classes.append(l) or ac(l, y, k))
    cfg = tiny("text2img", size=64, steps=2, d_steps=2, h=2)
    train_tiny(cfg, "a")
    assert [c[0] for c in calls] == [False, False, False, False, True] * 2
    assert not torch.equal(calls[0][1], calls[2][1])                 # the second D step draws new real pictures
    assert torch.equal(calls[3][1], calls[4][1])                     # G's turn: the same fakes
    assert [next(i for i, c in enumerate(calls) if torch.equal(l, c[2])) for l in classes] == [0, 2, 4, 5, 7, 9]


@pytest.mark.parametrize("changes", [dict(), dict(ema=.9, r1=1., r1_every=2, bn="G", loss="hinge", sn=1), dict(amp=1)])
def test_resumed_training_is_uninterrupted_training_bit_for_bit(changes):
    whole = train_tiny(tiny(**changes), "whole")
    with pytest.raises(KeyboardInterrupt):                           # Ctrl-C after step 5
        write = data.Log.write
        try:
            data.Log.write = lambda self, step, *a, **k: write(self, step, *a, **k) or (step == 5 and os.kill(os.getpid(), signal.SIGINT))
            train_tiny(tiny(**changes), "cut")
        finally:
            data.Log.write = write
    rows = Path("cut/log.csv").read_text()
    Path("cut/log.csv").write_text(rows + rows.splitlines()[-1].replace("5,", "7,", 1) + "\n")     # logged after the checkpoint, lost
    parts = train_tiny(tiny(resume=1, **changes), "cut")
    for a, b in zip(whole[:3], parts[:3]):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    strip = lambda f: [r.rsplit(",", 1)[0] for r in Path(f, "log.csv").read_text().splitlines()]
    assert strip("whole") == strip("cut")
    assert Path("whole/000010.png").read_bytes() == Path("cut/000010.png").read_bytes()


def test_two_ranks_equal_one_with_the_joint_batch(home):
    """torchrun on two processes: the MLP GAN (no batch norm, whose statistics are a rank's own) ends in the same weights,
    and its metrics, drawn and measured half by each rank, are those of one."""
    words = ["mlp", "--data", "digits", "--h", "4", "--bn", "none", "--batch", "16", "--steps", "4", "--amp", "0", "--samples", "300"]
    subprocess.run([sys.executable, str(ROOT / "gan.py"), *words, "--show", "dump", "--out", "o/1"], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", "29517", str(ROOT / "gan.py"),
                    *words, "--out", "o/2"], check=True, capture_output=True)
    a, b = (torch.load(f"o/{i}/last.pt", weights_only=True) for i in (1, 2))
    for k in ("G", "D"):
        assert all(torch.allclose(a[k][n], b[k][n], atol=1e-5) for n in a[k])
    two = json.loads(Path("o/2/result.json").read_text())["metrics"]
    run(*words, "--steps", "0", "--out", "o/2")
    one = json.loads(Path("o/2/result.json").read_text())["metrics"]
    assert "--steps 4" in json.loads(Path("o/2/result.json").read_text())["command"]       # an evaluation keeps the training's
    assert two["fid"] == pytest.approx(one["fid"], rel=1e-4) and {k: one[k] for k in ("n", "modes")} == {k: two[k] for k in ("n", "modes")}


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph where there is no GPU: counts, and replays what was recorded last."""
    log = []

    def replay(self):
        self.log.append("replay")


def test_captured_turn_runs_warm_then_records_once_then_replays(monkeypatch):
    stream = type("S", (), {"wait_stream": lambda self, other: None})
    for name, fake in dict(CUDAGraph=FakeGraph, Stream=stream, current_stream=stream, stream=contextlib.nullcontext,
                           graph=lambda g: contextlib.nullcontext(FakeGraph.log.append("record"))).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    FakeGraph.log.clear()
    turn = gan.captured(lambda: FakeGraph.log.append("turn") or len(FakeGraph.log), warm=2)
    out = [turn() for _ in range(5)]
    assert FakeGraph.log == ["turn", "turn", "record", "turn", "replay", "replay", "replay"] and out[2] == out[4]


def test_a_learning_rate_in_a_tensor_trains_the_same():
    """The form a graph needs (rate and step count as tensors) against the plain one, both on the CPU, decay included."""
    nets = [gan.networks(tiny())[1] for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [gan.optimiser("adam", nets[0], 1e-3, tiny()), torch.optim.Adam(nets[1].parameters(), torch.tensor(1e-3), (.5, .999), fused=True)]
    for step in range(4):
        x = torch.randn(8, 1, 32, 32)
        for net, opt in zip(nets, opts):
            gan.set_lr(opt, 1e-3 * (4 - step) / 4)
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(nets[0].parameters(), nets[1].parameters()))


def test_sampling_uses_running_statistics_and_leaves_the_state_alone():
    cfg = tiny()
    G = gan.networks(cfg)[0]
    before, rng = {k: v.clone() for k, v in G.state_dict().items()}, torch.get_rng_state()
    S = gan.sampler(G, G, cfg, torch.device("cpu"))
    a, b = gan.sample(S, 8, cfg, "cpu"), gan.sample(S, 8, cfg, "cpu")
    assert torch.equal(a, b) and a.dtype == torch.uint8 and torch.equal(rng, torch.get_rng_state()) and G.training
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    one = gan.sample(S, 1, cfg, "cpu", z=gan.draw_z(8, cfg, "cpu", torch.Generator().manual_seed(1))[:1])
    assert torch.equal(one[0], a[0])                                 # eval mode: an image does not depend on its batch


def test_averaged_generator():
    cfg = tiny(ema=.75)
    torch.manual_seed(0)
    G, H = gan.networks(cfg)[0], gan.networks(cfg)[0]
    p, q = G.layers[0].weight.detach().clone(), H.layers[0].weight.detach().clone()
    gan.average(H, G, .75)
    assert torch.allclose(H.layers[0].weight, .75 * q + .25 * p)
    S = gan.sampler(G, H.eval(), cfg, torch.device("cpu"))           # its statistics are those of its own activations
    x = gan.draw_z(4000, cfg, "cpu")
    with torch.no_grad():
        h = S.layers[0](x.view(-1, 16, 1, 1))
    assert torch.allclose(S.layers[1].running_mean, h.mean((0, 2, 3)), atol=.02 * h.std().item() * 4)
    assert torch.allclose(S.layers[1].running_var, h.var((0, 2, 3)), rtol=.1)


def test_interpolation_ends_are_the_pair(monkeypatch):
    cfg, seen = tiny(), []
    monkeypatch.setattr(data, "sheet", lambda rows, path, **k: seen.append((rows, k)))
    G = gan.networks(cfg)[0].eval()
    gan.interpolate(G, cfg, "cpu", "i.png")
    (rows, words), z = seen[0], gan.draw_z(12, cfg, "cpu", torch.Generator().manual_seed(2))
    assert len(rows) == 6 and all(len(r) == 14 for r in rows) and words["marks"] == [0, 1, 12, 13]
    assert torch.equal(rows[0][2], gan.sample(G, 1, cfg, "cpu", z=z[:1])[0])
    assert torch.equal(rows[0][11], gan.sample(G, 1, cfg, "cpu", z=z[1:2])[0])


def test_prompts():
    assert gan.parse_prompt("blue hair green eyes") == 11 * data.HAIR.index("blue") + data.EYES.index("green")
    assert gan.parse_prompt("Grey eyes, brown hair") == 11 * data.HAIR.index("brown") + data.EYES.index("gray")
    for bad in ("beige hair green eyes", "blue hair", ""):
        with pytest.raises(data.UserError, match="orange white aqua"):
            gan.parse_prompt(bad)


def test_chi_square_bound():
    assert [gan.chi2_bound(k) for k in (1, 9, 131)] == pytest.approx([3.84, 16.92, 158.71], rel=.03)      # tables


def test_saturation_spread_and_worst_pair():
    x = torch.tensor([[1., -1, -1], [0, 0, 0], [1, 1, -1]])[:, :, None, None].expand(3, 3, 4, 4)
    assert torch.allclose(gan.saturation(x), torch.tensor(2 / 3)) and gan.spread(torch.ones(4, 1, 2, 2)) == 0
    assert gan.worst_pair(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), ["blue", "green"]) == "blue taken for green 50% of the time"


def test_a_run_writes_what_it_promises(home):
    out, _ = run("dcgan", *TINY, "--steps", 12, "--dump", 20)
    folder = Path("out/dcgan-datadigits-h4-batch16")
    for f in ("000001.png", "000012.png", "log.csv", "curves.png", "training.gif", "last.pt", "result.json", "interpolation.png",
              "classes.png", "samples.npy"):
        assert (folder / f).exists(), f
    assert np.load(folder / "samples.npy").shape == (20, 32, 32, 1) and "FID" in out.splitlines()[-1] and "floor" in out
    r = json.loads((folder / "result.json").read_text())
    assert r["parameters"]["G"] == count(gan.build("dcgan", h=4)[0]) and r["metrics"]["n"] == 300 and r["data"]["sha256"]
    before = (folder / "last.pt").read_bytes()
    one_line(run("dcgan", *TINY, "--steps", 12, code=2)[1], "--resume 1", "--overwrite 1")
    assert run("dcgan", *TINY, "--steps", 0, "--show", "interp")[0].count("step ") == 0
    one_line(run("dcgan", *TINY, "--steps", 12, "--z", 7, "--out", folder, "--resume", 1, code=2)[1], "--z 16")
    one_line(run("course", *TINY, "--out", folder, "--resume", 1, code=2)[1], "trained with")
    assert (folder / "last.pt").read_bytes() == before
    assert not list(Path(".").rglob("*.part"))


def test_text_to_image_and_conditional_runs(home):
    small = ["--h", 4, "--batch", 8, "--samples", 300, "--steps", 3, "--data", "faces-a", "--net", "emoji", "--size", 32, "--out", "o/t"]
    out, _ = run("text2img", *small)
    assert "hair" in out and "eyes" in out and "taken for" in out and Path("o/t/conditions.png").exists()
    assert "prompt.png" in run("text2img", *small, "--resume", 1, "--prompt", "blue hair green eyes")[0]
    one_line(run("text2img", *small, "--resume", 1, "--prompt", "beige hair red eyes", code=2)[1], "orange white aqua")


def test_training_learns_digits():
    """300 steps bring the FID on classifier features under a third of the untrained generator's."""
    cfg = gan.Config(data="digits", steps=300, sample_every=300, log_every=300)
    x, y, _ = data.load("digits", 32)
    Path("l").mkdir()
    torch.manual_seed(0)
    untrained = gan.networks(cfg)[0].eval()
    G = gan.train(cfg, x, y, Path("l"), torch.device("cpu"))[0].eval()
    net = fid.classifier("digits", 32)
    real = net.features(x)
    before, after = (fid.fid(real, net.features(gan.sample(g, 1000, cfg, "cpu"))) for g in (untrained, G))
    assert after < before / 3, (before, after)


@pytest.mark.parametrize("words, says", [
    (["dcgan", "--stepz", 3], "--stepz"), (["nogan"], "nogan"), (["dcgan", "--z", 0], "--z"), (["dcgan", "--lr", "fast"], "--lr"),
    (["dcgan", "--loss", "nice"], "bce"), (["dcgan", "--size", 64], "32 x 32"), (["dcgan", "--prompt", "blue hair red eyes"], "text2img"),
    (["dcgan", "--data", "nowhere"], "nowhere"), (["dcgan", "--data", "digits", "--out", "/proc/x"], "--out"),
    (["dcgan", "--data", "digits", "--steps", 0, "--resume", 1], "train first"), (["dcgan", "--batch", 1], "batch"),
    (["cwgan", "--data", "plain"], "labels"),
    (["dcgan", "--channels", 3], "follows from the data"), (["dcgan", "--beta1", 1], "[0, 1)"), (["dcgan", "--device", "tpu9"], "cpu")])
def test_wrong_words_are_one_line_and_exit_2(words, says):
    Path("plain").mkdir()
    for i in range(30):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(f"plain/{i}.png")
    before = sorted(Path(".").rglob("*"))
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as e:
        data.run_main(lambda: gan.main(list(map(str, words))))
    one_line(err.getvalue(), says)
    assert e.value.code == 2 and sorted(Path(".").rglob("*")) == before


def test_nan_weights_are_never_saved_between_two_log_lines(monkeypatch):
    train_tiny(tiny(steps=5), "n")
    good, step = Path("n/last.pt").read_bytes(), torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: step(self, *a) or [p.data.fill_(float("nan")) for p in self.param_groups[0]["params"]])
    with pytest.raises(data.UserError, match="not finite, seen at step 7"):
        train_tiny(tiny(resume=1, steps=20, log_every=100, sample_every=7), "n")
    assert Path("n/last.pt").read_bytes() == good


def test_signals_stop_at_the_second_time_and_after_training():
    for sent in (signal.SIGINT, signal.SIGTERM):
        seen = data.interrupts()
        os.kill(os.getpid(), sent)
        assert seen == [1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), sent)
            time.sleep(1)
        train_tiny(tiny(steps=1), sent.name)                         # installs its handlers, and takes them away again
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), sent)
            time.sleep(1)


def test_a_run_is_resumed_on_the_data_it_began_with(home):
    run("dcgan", *TINY, "--steps", 2, "--show", "interp", "--out", "o")
    one_line(run("dcgan", *TINY, "--data", "faces-a", "--steps", 4, "--resume", 1, "--out", "o", code=2)[1], "--data digits, not faces-a")
    out, _ = run("dcgan", *TINY, "--steps", 4, "--show", "interp", "--resume", 1, "--out", "o")
    assert "note     up to step 2 the learning rate fell as for --steps 2" in out      # a decayed rate that starts again


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(monkeypatch):
    loss = gan.LOSSES["bce"]
    train_tiny(tiny(steps=5), "n")
    good = Path("n/last.pt").read_bytes()
    monkeypatch.setitem(gan.LOSSES, "bce", (lambda r, f: loss[0](r, f) * float("nan"), loss[1]))
    with pytest.raises(data.UserError, match="not finite, seen at step 10.*--lr"):
        train_tiny(tiny(resume=1), "n")
    assert Path("n/last.pt").read_bytes() == good


def test_odd_data_work():
    """Zero-variance images, fewer images than the batch, one class only."""
    x = torch.full((3, 1, 32, 32), 7, dtype=torch.uint8)
    Path("z").mkdir()
    G = gan.train(tiny(steps=2), x, torch.zeros(3, dtype=torch.long), Path("z"), torch.device("cpu"))[0]
    assert all(p.isfinite().all() for p in G.parameters())


def test_ctrl_c_while_a_picture_is_written_still_leaves_a_checkpoint(monkeypatch):
    save, first = data.save, []
    monkeypatch.setattr(data, "save", lambda im, path: (first or first.append(os.kill(os.getpid(), signal.SIGINT)), save(im, path))[1])
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tiny(), "a")
    assert data.load_checkpoint("a/last.pt")["step"] == 2


@pytest.mark.parametrize("cond, n", [("none", 60), ("planes", 60), ("ac", 12), ("none", 9)])
def test_one_class_of_few_pictures(cond, n, monkeypatch, capsys):
    whole = fid.train_classifier
    monkeypatch.setattr(fid, "train_classifier", lambda *a, **k: whole(*a, **dict(k, steps=20)))
    monkeypatch.setattr(data, "DOWNLOADS", Path("d"))
    Path("my/cats").mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (40, 40), (4 * i, 90, 0)).save(f"my/cats/{i}.png")
    words = ["dcgan", *map(str, TINY[2:]), "--data", "my", "--cond", cond, "--steps", "2", "--batch", "64", "--out", "o"]
    if n < 10:
        with pytest.raises(data.UserError, match="9 picture.*at least 10"):
            gan.main(words)
    else:
        gan.main(words)
        assert "1 of 1 classes" in capsys.readouterr().out and "nan" not in Path("o/result.json").read_text().lower()


@pytest.mark.parametrize("script, words", [("gan.py", ["dcgan", "--data", "digits"]), ("cyclegan.py", ["--data", "faces"]),
                                           ("biggan_interp.py", ["--model", "small"])])
def test_ctrl_c_leaves_a_checkpoint_one_line_and_exit_code_130(home, script, words):
    p = subprocess.Popen([sys.executable, str(ROOT / script), *words, "--steps", "90000", "--log-every", "1", "--out", "o/c"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if line.startswith("step"):
            p.send_signal(signal.SIGINT)
            break
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and err == ""
    assert re.search(r"stopped at step \d+; the same command with --resume 1 goes on\n$", out)
    checkpoint = next(Path(".").rglob("last.pt"), None) or next(home.glob("biggan-small-90000*.pt"))
    assert data.load_checkpoint(checkpoint)["step"] >= 1


def test_no_field_of_the_config_is_dead():
    source = (ROOT / "gan.py").read_text()
    for f in dataclasses.fields(gan.Config):
        assert re.search(rf"cfg\.{f.name}\b", source.split("# ---- networks")[1]) or f'"{f.name}"' in source.split("# ---- networks")[1], f.name
    assert set(data.comments(gan.Config)) == {f.name for f in dataclasses.fields(gan.Config)}


# ---- data.py: files, downloads, damage -------------------------------------------------------------------------------

def idx_bytes(array):
    return gzip_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def gzip_bytes(raw):
    import gzip
    return gzip.compress(raw, 1)


def test_idx_files():
    a = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    Path("a.gz").write_bytes(idx_bytes(a))
    assert np.array_equal(data.read_idx("a.gz"), a)
    whole = idx_bytes(a)
    bad = {"cut": whole[:-9], "text": b"<html>", "empty": b"", "short": gzip_bytes(struct.pack(">HBB3I", 0, 8, 3, 2, 3, 5) + a.tobytes()),
           "long": gzip_bytes(struct.pack(">HBB3I", 0, 8, 3, 2, 3, 3) + a.tobytes()), "type": gzip_bytes(struct.pack(">HBBI", 0, 9, 1, 2) + b"ab"),
           "huge": gzip_bytes(struct.pack(">HBB3I", 0, 8, 3, 2 ** 31, 2 ** 31, 9))}
    for name, raw in bad.items():
        Path(name).write_bytes(raw)
        with pytest.raises(data.UserError, match=name):
            data.read_idx(name)


def test_a_damaged_mnist_on_disk_is_named_not_replaced(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "course")
    Path("course/mnist").mkdir(parents=True)
    Path("course/mnist/train-images-idx3-ubyte.gz").write_bytes(idx_bytes(np.zeros((2, 28, 28), np.uint8)))
    with pytest.raises(data.UserError, match="damaged or another file.*440fcabf"):
        data.choose("mnist,digits", 32)


def test_mnist_and_fashion(real):
    x, y, classes = data.load("mnist", 32)
    assert x.shape == (60_000, 1, 32, 32) and torch.bincount(y).tolist()[:3] == [5923, 6742, 5958] and len(classes) == 10
    assert x[:, :, :2].max() == 0 and torch.equal(x[:, :, 2:30, 2:30], data.load("mnist", 28)[0])     # padded, not resampled
    assert data.load("fashion", 28, "test")[0].shape == (10_000, 1, 28, 28)


def test_emojis_are_composited_on_white_and_anime_has_tags(real):
    x, y, _ = data.load("emoji-apple", 32, "test")
    assert x.shape == (100, 3, 32, 32) and y is None and (x[:, :, 0, 0] > 200).float().mean() > .9
    x, y, names = data.load("anime", 64, "test")
    assert x.shape == (888, 3, 64, 64) and len(y) == 888 and names[y[0]].endswith("eyes")


def test_transparent_pictures_become_white_and_grey_ones_fit():
    Image.new("RGBA", (8, 8), (0, 99, 0, 0)).save("clear.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 99, 0] * 256)
    palette.save("palette.png", transparency=0)
    Image.new("L", (9, 7), 50).save("grey.png")
    Image.new("I;16", (8, 8), 1000).save("deep.png")
    assert data.read_picture("clear.png").eq(255).all() and data.read_picture("palette.png").eq(255).all()
    assert data.read_picture("grey.png").shape == (3, 7, 9) and data.read_picture("grey.png", 1).unique().tolist() == [50]
    assert data.fit(data.read_picture("grey.png"), 16).shape == (3, 16, 16) and data.read_picture("deep.png").shape == (3, 8, 8)


def test_folders_of_pictures():
    for i in range(40):
        Path(f"my pïcs/{'cats' if i % 2 else 'dogs'}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), (i, 0, 0)).save(f"my pïcs/{'cats' if i % 2 else 'dogs'}/{i:02d}.png")
    x, y, classes = data.load("my pïcs", 16, "all")
    assert x.shape == (40, 3, 16, 16) and classes == ["cats", "dogs"] and y.bincount().tolist() == [20, 20]
    assert len(data.load("my pïcs", 16)[0]) == 36 and len(data.load("my pïcs", 16, "test")[0]) == 4
    Path("my pïcs/cats/zz.png").write_bytes(b"no picture")
    with pytest.raises(data.UserError, match="zz.png is no readable picture"):
        data.load("my pïcs", 16)
    Path("none").mkdir()
    for bad in ("none", "missing"):
        with pytest.raises(data.UserError, match=bad):
            data.load(bad, 16)


def test_bombs_are_refused_before_decoding(monkeypatch):
    """81 million pixels in 10 kB; an idx header, an archive member and a checkpoint that promise gigabytes."""
    Image.new("1", (9000, 9000)).save("bomb.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(data.UserError, match="pixels"):
        data.read_picture("bomb.png")
    Path("bomb.gz").write_bytes(gzip_bytes(struct.pack(">HBB3I", 0, 8, 3, 60_000, 60_000, 60_000) + bytes(1000)))
    with pytest.raises(data.UserError, match="impossible shape"):
        data.read_idx("bomb.gz")
    monkeypatch.setattr(data, "DOWNLOADS", Path("d"))
    Path("d").mkdir()
    with tarfile.open("d/bomb.tar.gz", "w:gz", compresslevel=1) as tar:
        m = tarfile.TarInfo("zeros")
        m.size = 80_000_000
        tar.addfile(m, io.BytesIO(bytes(m.size)))
    with pytest.raises(data.UserError, match="larger than 64 MB"):
        list(data.members("bomb"))


def test_a_data_folder_is_only_read(home):
    """DATA_DIR (without the right to write, where the user is not root) is as it was, and a run writes to two folders only."""
    for split in ("Apple", "Test_Apple"):
        Path(f"größe x/emojis/{split}").mkdir(parents=True)
        for i in range(20):
            Image.new("RGBA", (32, 32), (12 * i, 9, 99, 200)).save(f"größe x/emojis/{split}/{i}.png")
    folders = [p for p in Path("größe x").rglob("*") if p.is_dir()] + [Path("größe x")]
    state = lambda: sorted((str(p), p.stat().st_mtime_ns) for p in Path("größe x").rglob("*"))
    before = state()
    for p in folders:
        p.chmod(0o555)
    run("emoji", *TINY[2:], "--data", "emoji-apple", "--steps", 2, DATA_DIR=str(Path("größe x").resolve()), DOWNLOADS="d")
    for p in folders:
        p.chmod(0o755)
    assert state() == before and {p.name for p in Path(".").iterdir()} == {"größe x", "d", "out"}


def tar_of(path, *entries):
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, raw in entries:
            m = tarfile.TarInfo(name)
            m.type, m.size, m.linkname = kind, len(raw), "/etc/passwd"
            tar.addfile(m, io.BytesIO(raw))


@pytest.mark.parametrize("name, kind", [("/etc/x", tarfile.REGTYPE), ("a/../../x", tarfile.REGTYPE), ("l", tarfile.SYMTYPE),
                                        ("h", tarfile.LNKTYPE), ("d", tarfile.CHRTYPE), ("f", tarfile.FIFOTYPE)])
def test_archives_that_lead_outside_are_refused(name, kind, monkeypatch):
    monkeypatch.setattr(data, "DOWNLOADS", Path("d"))
    Path("d").mkdir()
    tar_of("d/set.tar.gz", ("ok.txt", tarfile.REGTYPE, b"ok"), (name, kind, b"" if kind != tarfile.REGTYPE else b"x"))
    with pytest.raises(data.UserError, match="refused"):
        list(data.members("set"))
    assert sorted(p.name for p in Path(".").rglob("*")) == ["d", "set.tar.gz"]


class Server(http.server.BaseHTTPRequestHandler):
    """A mirror with every illness: the path names it."""
    body = bytes(range(256)) * 400

    def do_GET(self):
        kind = self.path.split("/")[1]
        if kind == "500" or kind == "404":
            return self.send_error(int(kind))
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "/ok/x")
            return self.end_headers()
        raw = b"<html>sign in</html>" if kind == "html" else self.body[::-1] if kind == "wrong" else self.body
        self.send_response(200)
        if kind != "nolength":
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if kind == "hang":
            time.sleep(3)
        if kind == "drip":
            with contextlib.suppress(OSError):
                for i in range(0, len(raw), 5000):
                    self.wfile.write(raw[i:i + 5000]), time.sleep(.3)
            return
        self.wfile.write(raw[:5000] if kind == "cut" else raw)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}"
    s.shutdown()


def test_downloads_try_mirrors_and_keep_nothing_bad(server, monkeypatch):
    import hashlib
    monkeypatch.setattr(data, "DOWNLOADS", Path("d"))
    sha = hashlib.sha256(Server.body).hexdigest()
    for bad in ("500", "404", "html", "cut", "wrong"):
        with pytest.raises(data.Unavailable, match=f"{server}/{bad}/f.*{sha}") as e:
            data.fetch("x/f", [f"{server}/{bad}/f"], sha)
        assert "\n" not in str(e.value) and not [p for p in Path("d").rglob("*") if p.is_file()]
    with pytest.raises(data.Unavailable, match="cut off after 5,000 of 102,400 bytes"):      # seen without a hash too
        data.fetch("x/f", [f"{server}/cut/f"])
    with pytest.raises(data.Unavailable, match="wrong file: sha256 [0-9a-f]{64}, not"):
        data.fetch("x/f", [f"{server}/wrong/f"], sha)
    for i, good in enumerate(("ok", "nolength", "redirect")):
        assert data.fetch(f"x/{i}", [f"{server}/500/f", f"{server}/cut/f", f"{server}/{good}/f"], sha).read_bytes() == Server.body
    with pytest.raises(data.Unavailable, match="a web page came instead"):
        data.fetch("x/f", [f"{server}/html/f"])
    monkeypatch.setattr(data, "_open", functools.partial(data._open, seconds=.5))
    start = time.monotonic()
    with pytest.raises(data.Unavailable, match="no answer|timed out"):
        data.fetch("x/g", [f"{server}/hang/f", f"{server}/hang/f"], sha)
    assert time.monotonic() - start < 10                              # bounded waiting, not a speed


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_a_certificate_nobody_signed_is_not_accepted():
    import ssl
    subprocess.run("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost "
                   "-keyout key.pem -out cert.pem".split(), check=True, capture_output=True)
    s, context = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert.pem", "key.pem")
    s.socket = context.wrap_socket(s.socket, server_side=True)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    url = f"https://localhost:{s.server_port}/ok/f"
    with pytest.raises(data.Unavailable, match="certificate verify failed"):
        data.fetch("x/tls", [url])
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; data.download(sys.argv[1], 'd/file')"
    subprocess.run([sys.executable, "-c", code, url], check=True, env=dict(os.environ, SSL_CERT_FILE="cert.pem"))
    s.shutdown()
    assert Path("d/file").read_bytes() == Server.body                 # the same server, once its certificate is trusted


def test_without_network_the_run_says_so_and_draws_digits(monkeypatch, capsys):
    for name in ("MNIST_URLS", "FASHION_URLS"):
        monkeypatch.setattr(data, name, ["http://127.0.0.1:9/"])
    assert data.choose("mnist,digits", 32)[0] == "digits"
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(data.Unavailable, match="127.0.0.1"):
        data.choose("mnist", 32)


def test_atomic_files_and_checkpoints(monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *a, name=name, whole=getattr(os, name): order.append(name) or whole(*a))
    data.write_text("a/order.txt", "x")
    assert order == ["fsync", "replace"]                              # on the disk before it gets its name
    Path("a/order.txt").unlink()
    with pytest.raises(ZeroDivisionError):
        with data.atomic("a/b.txt") as part:
            part.write_text("half")
            1 / 0
    assert not list(Path("a").iterdir())
    data.save_checkpoint("c.pt", dict(step=3, w=torch.ones(2)))
    assert data.load_checkpoint("c.pt")["step"] == 3
    whole = Path("c.pt").read_bytes()
    for bad in (whole[:-40], b"", b"<html>", pickle.dumps(Evil())):
        Path("c.pt").write_bytes(bad)
        with pytest.raises(data.UserError, match="c.pt is no readable checkpoint"):
            data.load_checkpoint("c.pt")
    torch.save(Evil(), "c.pt")
    with pytest.raises(data.UserError):
        data.load_checkpoint("c.pt")
    assert not Path("pwned").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def mutated(raw, r):
    """Seeded damage: flipped bytes, a cut, repeated or grown parts, a huge number in the header."""
    raw, kind = bytearray(raw), r.randrange(5)
    if kind == 0:
        for _ in range(r.choice([1, 3, 30])):
            raw[r.randrange(len(raw))] ^= 1 << r.randrange(8)
    elif kind == 1:
        raw = raw[:r.randrange(len(raw))]
    elif kind == 2:
        i = r.randrange(len(raw))
        raw[i:i] = raw[:r.randrange(1, 200)]
    elif kind == 3:
        i = r.randrange(min(64, len(raw)))
        raw[i:i + 4] = b"\xff" * 4
    else:
        i = r.randrange(min(64, len(raw)))
        raw[i:i + 4] = struct.pack(">I", r.choice([0, 1, 2 ** 16, 2 ** 31]))
    return bytes(raw)


def test_mutated_files_give_a_result_or_one_clear_error(monkeypatch):
    """1,000 damaged files: never a traceback of another kind, a hang, or a gigabyte."""
    monkeypatch.setattr(data, "DOWNLOADS", Path("d"))
    Path("d").mkdir()
    r, picture = random.Random(0), Image.fromarray(np.random.RandomState(0).randint(0, 255, (24, 24, 3)).astype(np.uint8))
    seeds = {}
    for kind, words in (("png", {}), ("jpg", {}), ("gif", {}), ("bmp", {}), ("webp", {})):
        picture.save(f"p.{kind}", **words)
        seeds[kind] = (Path(f"p.{kind}").read_bytes(), lambda f: data.read_picture(f))
    seeds["idx.gz"] = (idx_bytes(np.arange(600).astype(np.uint8).reshape(6, 10, 10)), data.read_idx)
    data.save_checkpoint("c.pt", dict(step=1, w=torch.randn(40)))
    seeds["pt"] = (Path("c.pt").read_bytes(), data.load_checkpoint)
    tags = "".join(f"{i},{data.FACES[i]}\n" for i in range(20)).encode()

    def anime(path):
        shutil.rmtree("d/anime", ignore_errors=True), shutil.rmtree("d/cache", ignore_errors=True)
        Path("d/anime/images").mkdir(parents=True)
        shutil.copy(path, "d/anime/tags.csv")
        for i in range(20):
            shutil.copy("p.png", f"d/anime/images/{i}.png")
        data.anime_set(16, "train")
    seeds["csv"] = (tags, anime)
    np.savez("n.npz", images=np.zeros((4, 1, 8, 8), np.uint8), labels=np.zeros(4, np.int64))

    def npz(path):
        (data.DOWNLOADS / "cache").mkdir(exist_ok=True)
        shutil.copy(path, data.DOWNLOADS / "cache/key.npz")
        data.cached("key", lambda: (np.zeros((1, 1, 8, 8), np.uint8), None))
    seeds["npz"] = (Path("n.npz").read_bytes(), npz)
    refused = 0
    import resource, warnings
    warnings.simplefilter("ignore")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hang = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a damaged file hangs the reader"))
    for i in range(1000):
        kind = list(seeds)[i % len(seeds)]
        raw, read = seeds[kind]
        path = Path(f"m.{kind}")
        path.write_bytes(mutated(raw, r))
        signal.alarm(20)
        try:
            read(path)
        except data.UserError as e:
            refused += 1
            assert "\n" not in str(e), (i, str(e))
    signal.alarm(0), signal.signal(signal.SIGALRM, hang)
    assert refused > 200 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20      # kB: 1 GB


# ---- data.py: what is drawn here, and what is drawn of runs --------------------------------------------------------------

def test_built_in_sets_are_seeded_and_paired():
    a, la = data.draw_faces("a", 30, 20_000, 32)
    b, lb = data.draw_faces("b", 30, 20_000, 32)
    assert np.array_equal(la, lb) and a.shape == (30, 3, 32, 32) and np.array_equal(a, data.draw_faces("a", 30, 20_000, 32)[0])
    assert abs(a.astype(int) - b).mean() > 30 and np.array_equal(a[7], data.draw_faces("a", 1, 20_007, 32)[0][0])
    x, y = data.draw_digits(50, 3, 32)
    assert np.array_equal(x, data.draw_digits(50, 3, 32)[0]) and set(y) == set(range(10)) and x.max() > 200
    grey = a.astype(float).transpose(1, 0, 2, 3).reshape(3, -1)
    assert np.abs(grey[0] - grey[2]).mean() > 10                     # really in colour


def test_the_two_styles_train_on_different_faces_and_share_the_test(monkeypatch):
    asked = []
    monkeypatch.setattr(data, "draw_faces", lambda style, n, first, size: asked.append((style, first, n)) or (np.zeros((1, 3, 8, 8), np.uint8), np.zeros(1)))
    monkeypatch.setattr(data, "DOWNLOADS", Path("d"))
    for split in ("train", "test"):
        for name in ("faces-a", "faces-b"):
            data.load(name, 8, split)
    (_, a, n), (_, b, _), (_, c, _), (_, d, _) = asked
    assert a + n <= b and b + n <= c == d


def test_to_float_and_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(data.to_uint8(data.to_float(x)), x) and data.to_float(x).min() == -1 and data.to_float(x).max() == 1
    assert data.to_uint8(torch.tensor([-3., 3.])).tolist() == [0, 255]


def test_grid_sheet_and_charts_are_as_large_as_promised():
    x = torch.zeros(10, 1, 16, 16, dtype=torch.uint8)
    assert data.grid(x, 4).size == (2 * (4 * 18 + 2), 2 * (3 * 18 + 2))
    assert data.as_bytes(torch.full((1, 1, 2, 2), -1.)).max() == 0
    data.sheet([x[:3], x[:2]], "s.png", left=["a", "b"], top=["1", "2", "3"], title="t", marks=[0])
    data.curves("c.png", {"step": [1, 2, 3], "D": [1., float("nan"), 3.], "flat": [2., 2., 2.]}, [("t", ["D"]), ("u", ["flat", "no"])])
    data.bars("b.png", list("abc"), {"real": [.1, .2, .7], "generated": [0, 0, 0]}, "t")
    data.scatter("x.png", np.random.randn(50, 2), np.arange(50) % 12, list("abcdefghijkl"), {i: f"name {i}" for i in range(50)}, [(0, 1)])
    data.gif("g.gif", ["s.png", "s.png"])
    for f in ("s.png", "c.png", "b.png", "x.png"):
        assert len(Image.open(f).convert("RGB").getcolors(1 << 24)) > 3
    assert Image.open("g.gif").n_frames >= 1 and not list(Path(".").glob(".*.part"))


def test_ticks_are_round_numbers():
    assert data.ticks(0, 1) == pytest.approx([0, .2, .4, .6, .8, 1]) and data.ticks(-3, 12) == pytest.approx([0, 5, 10])
    assert data.short(20_000) == "20k" and data.clock(75) == "1:15"


def test_compare_puts_runs_on_one_sheet(home):
    for seed in (0, 1):
        run("dcgan", *TINY, "--steps", 2, "--seed", seed, "--out", f"o/s{seed}")
    out, _ = run("compare", "o/s0", "o/s1", "--out", "o/both", script="data.py")
    assert "| s0 |" in out and "| s1 |" in Path("o/both.md").read_text() and Image.open("o/both.png").width == 840
    one_line(run("compare", "o/none", script="data.py", code=2)[1], "train it first")


def test_readme_table_and_figures_are_made_by_command(home):
    for seed in (0, 1):
        run("dcgan", *TINY, "--steps", 2, "--seed", seed, "--out", f"o/dcgan-s{seed}")
    Path("README.md").write_text("# x\n<!-- bench -->\n<!-- end -->\n<!-- results -->\nold\n<!-- end -->\nrest\n")
    data.write_text("out/bench/table.md", "a table")
    shutil.copy(ROOT / "Makefile", "Makefile")
    run("results", "o/dcgan-s0", "o/dcgan-s1", script="data.py")
    text = Path("README.md").read_text()
    assert "<!-- bench -->\na table\n<!-- end -->\n" in text
    assert "old" not in text and "over 2 seeds" in text and "0, 1 |" in text and text.endswith("<!-- end -->\nrest\n")
    run("figure", "f.png", "o/dcgan-s0/000002.png", "o/dcgan-s0/curves.png", script="data.py")
    data.figure("f.gif", ["o/dcgan-s0/000001.png", "o/dcgan-s0/000002.png"], 100)
    assert Image.open("f.png").mode == "P" and Image.open("f.gif").n_frames == 2 and Image.open("f.gif").height == 100
    one_line(run("figure", "f.png", "none.png", script="data.py", code=2)[1], "none.png")
    assert "wrote p.png" in run("show", "digits", "p.png", script="data.py")[0]
    assert "--resume" in run("--help")[0]


def test_a_folder_that_holds_a_run_is_refused_kept_or_cleared():
    files = ["last.pt", "000500.png", "log.csv", "notes.txt", "README.md", "me.png"]             # the user's own files stay
    for asked, left in ((dict(resume=1), files), (dict(overwrite=1), files[3:])):
        for f in files:
            Path("r").mkdir(exist_ok=True), Path("r", f).write_text("x")
        with pytest.raises(data.UserError, match="--resume 1 goes on"):
            data.open_run("r")
        data.open_run("r", **asked)
        assert sorted(p.name for p in Path("r").iterdir()) == sorted(left)


def test_same_seed_same_result_and_two_seeds_differ(home):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("dcgan", *TINY, "--steps", 5, "--seed", seed, "--out", f"o/{out}", "--show", "interp")
    rows = [[line.rsplit(",", 1)[0] for line in Path(f"o/{o}/log.csv").read_text().splitlines()] for o in "abc"]
    assert rows[0] == rows[1] != rows[2]
    assert Path("o/a/000005.png").read_bytes() == Path("o/b/000005.png").read_bytes() != Path("o/c/000005.png").read_bytes()


SMALL_WORLD = f"""
import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'gan.py'
import data, fid, gan
draw = data.draw_digits
data.draw_digits = lambda n, seed, size: draw(n // 20, seed, size)
whole = fid.train_classifier
fid.train_classifier = lambda *a, **k: whole(*a, **dict(k, steps=20))
data.run_main(lambda: gan.main(sys.argv[1:]))
"""


def start_small(out):
    """A whole run in a small world: draws its set, trains 40 steps, trains its classifier; a process."""
    return subprocess.Popen([sys.executable, "-c", SMALL_WORLD, "dcgan", *map(str, TINY), "--steps", "40", "--resume", "1", "--out", out],
                            stdout=subprocess.DEVNULL, env=dict(os.environ, DOWNLOADS=out + "-downloads"))


def check_files(*folders):
    """No file under its final name is half-written."""
    for f in [f for o in folders for f in Path(o).rglob("*") if f.is_file() and not f.name.endswith(".part")]:
        if f.suffix == ".pt":
            data.load_checkpoint(f)
        elif f.suffix in (".png", ".gif"):
            Image.open(f).load()
        elif f.suffix == ".npz":
            assert len(np.load(f)["images"])
        elif f.suffix == ".json":
            json.loads(f.read_text())


def same_results(a, b):
    """Two runs ended in the same networks, classifier and data cache, bit for bit."""
    for name in ("{}/last.pt", "{}-downloads/classifier-digits-32.pt"):
        x, y = (torch.load(name.format(o), weights_only=True) for o in (a, b))
        for k in ("G", "D", "state"):
            assert all(torch.equal(v, y[k][n]) for n, v in x.get(k, {}).items())
    x, y = (np.load(f"{o}-downloads/cache/digits-32-train.npz")["images"] for o in (a, b))
    assert np.array_equal(x, y)


def kill_and_go_on(kills, seed=1):
    """SIGKILL at random moments, the same command again, until `kills` hit; each finished run is compared and begun anew."""
    begun, r, done, finished = time.monotonic(), random.Random(seed), 0, 0
    assert start_small("whole").wait() == 0
    whole = time.monotonic() - begun
    while done < kills:
        p = start_small("cut")
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(timeout=r.uniform(.2, 1) * whole)
        hit = p.poll() is None
        p.kill(), p.wait()
        check_files("cut", "cut-downloads")
        done += hit
        if not hit:
            assert p.returncode == 0
            same_results("whole", "cut")
            shutil.rmtree("cut"), shutil.rmtree("cut-downloads")
            finished += 1
    assert start_small("cut").wait() == 0
    same_results("whole", "cut")
    return finished + 1


def test_kill_at_any_moment_and_go_on():
    """Killed while drawing the set, training, checkpointing or training the classifier, a run ends as if undisturbed.
    `python test_all.py --kill` is the long form, 30 kills."""
    kill_and_go_on(3)


def test_killed_download_leaves_nothing_under_its_name(server):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; data.download(sys.argv[1], 'd/file')"
    p = subprocess.Popen([sys.executable, "-c", code, f"{server}/drip/f"])
    while not list(Path(".").glob("d/.file*")):
        time.sleep(.05)
    p.kill(), p.wait()
    assert not Path("d/file").exists()
    subprocess.run([sys.executable, "-c", code, f"{server}/ok/f"], check=True, capture_output=True)
    assert Path("d/file").read_bytes() == Server.body


def test_two_processes_building_one_cache_do_not_disturb_each_other():
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import data, numpy as np; data.DOWNLOADS = data.Path('d');"
            "build = lambda: (time.sleep(.5), (np.full((3, 1, 8, 8), 7, np.uint8), None))[1];"
            "assert data.cached('k', build)[0].sum() == 3 * 64 * 7")
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0] and [p.name for p in Path("d").rglob("*.*")] == ["k.npz"]


def test_source_runs_on_python_3_10_and_imports_only_what_is_promised():
    import ast
    allowed = {"torch", "numpy", "PIL", "pytest", "gan", "data", "fid", "cyclegan", "biggan_interp", "scipy"} | set(sys.stdlib_module_names)
    for f in ROOT.glob("*.py"):
        tree = ast.parse(f.read_text(), feature_version=(3, 10))
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert names <= allowed, (f, names - allowed)
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
        assert all("weights_only=True" in ast.unparse(n) for n in calls), f


def test_makefile_and_readme_agree():
    targets = set(re.findall(r"^([a-z0-9][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    readme = (ROOT / "README.md").read_text()
    asked = set(re.findall(r"make ([a-z0-9][\w-]*)", readme))
    assert targets - {"help"} <= asked, targets - asked
    assert set(re.findall(r"`make ([a-z0-9][\w-]*)", readme)) <= targets
    slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", readme, re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", readme)) <= slugs
    for path in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / path).exists(), path
    assert "dcgan" in subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True).stdout


def documented_commands():
    """Every command of README.md and of the Makefile's targets as a list of words, found by running make with a stand-in
    for Python that only writes down what it is asked."""
    Path("python").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open('asked', 'a'))\n")
    Path("python").chmod(0o755)
    for run_name in ("dcgan", "text2img", "cwgan", "emoji", "anime", "wgan", "mlp", "speedrun"):
        Path(f"out/{run_name}").mkdir(parents=True)
        for file in ("000001.png", "last.pt"):
            Path(f"out/{run_name}/{file}").touch()
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    lines = re.findall(r"`((?:make|python|DATA_DIR=\S+ make) [^`\n]*)`", readme)
    for block in re.findall(r"```\n(.*?)```", readme, re.S):
        lines += [line.split("  #")[0].strip() for line in block.splitlines()]
    made = [line for line in lines if "make " in line] + [f"make {t}" for t in re.findall(r"^([a-z0-9-]+): \$\(VENV\)", makefile, re.M)]
    shutil.copy(ROOT / "Makefile", "Makefile")
    for line in dict.fromkeys(made):
        if line not in ("make", "make clean", "make test"):
            done = subprocess.run(f"{line} PYTHON=./python", shell=True, capture_output=True, text=True)
            assert done.returncode == 0, (line, done.stderr)
    asked = [json.loads(line) for line in Path("asked").read_text().splitlines()]
    shutil.rmtree("out")
    return asked + [shlex.split(line)[1:] for line in lines if line.startswith("python")]


def test_every_command_of_the_readme_and_the_makefile_runs(monkeypatch, capsys):
    """For a step or two, on noise instead of pictures, with an untrained classifier and without network."""
    def load(name, size, split="train"):
        grey, faces = name in ("mnist", "fashion", "digits"), name.startswith(("faces", "anime"))
        n, classes = 264, 10 if grey else 132
        x = torch.randint(0, 256, (n, 1 if grey else 3, size, size), dtype=torch.uint8)
        return x, torch.arange(n) % classes if grey or faces else None, list("0123456789") if grey else data.FACES if faces else []

    def classifier(name, size, device="cpu"):
        x, y, classes = load(name, size)
        return fid.Classifier(x.shape[1], size, (4,) if y is None else (12, 11) if len(classes) == 132 else (10,), name, (0., 0.)).eval()

    def offline(url, *_):
        raise OSError("no network")
    commands = documented_commands()
    for module, name, fake in ((data, "load", load), (fid, "classifier", classifier), (data, "download", offline)):
        monkeypatch.setattr(module, name, fake)
    monkeypatch.setattr(data, "DOWNLOADS", Path("downloads"))
    monkeypatch.setattr(biggan_interp, "small", lambda *_: (None, None, None))          # 45 s, and a test of its own
    monkeypatch.setattr(biggan_interp, "evaluate", lambda *_: None)
    few = {"gan.py": "--steps 1 --h 2 --batch 4 --samples 200", "cyclegan.py": "--steps 1 --batch 4", "biggan_interp.py": "--steps 1"}
    seen = set()
    for script, *words in commands:
        if script in few and tuple(words) not in seen and "--help" not in words:
            seen.add(tuple(words))
            main = {"gan.py": gan, "cyclegan.py": cyclegan, "biggan_interp.py": biggan_interp}[script].main
            try:
                main([*words, *few[script].split(), "--out", f"o/{len(seen)}", "--overwrite", "1"])
            except data.UserError as e:
                assert re.search("^no checkpoint|cannot be downloaded", str(e)), (script, words, e)      # a run's, published weights
        elif script == "test_all.py":
            assert f'"{words[0]}"' in (ROOT / script).read_text()
        else:
            assert (ROOT / script).exists(), script
    assert len(seen) > 40


def test_full_disk_is_one_line_and_keeps_the_checkpoint(home):
    run("dcgan", *TINY, "--steps", 5, "--out", "o/f", "--show", "interp")
    good = Path("o/f/last.pt").read_bytes()
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.argv[0] = 'gan.py';"
            f"sys.path.insert(0, {str(ROOT)!r}); import data, gan; data.run_main(lambda: gan.main(sys.argv[1:]))")
    r = subprocess.run([sys.executable, "-c", code, "dcgan", *map(str, TINY), "--steps", "50", "--resume", "1", "--out", "o/f"],
                       capture_output=True, text=True, env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"))
    assert r.returncode == 2, r.stderr
    one_line(r.stderr, "space")
    assert Path("o/f/last.pt").read_bytes() == good and not list(Path("o").rglob("*.part"))


# ---- tests of fid.py -------------------------------------------------------------------------------------------------

def feats(seed, n, d, shift):
    a = np.random.RandomState(0).standard_normal((d, d)) / np.sqrt(d)
    return (np.random.RandomState(seed).standard_normal((n, d)) * np.arange(1, d + 1) ** -0.6) @ a + shift


# the distance ----

@pytest.mark.parametrize("case", range(3))
def test_fid_metrics_golden(case):
    g = golden("metrics.json")
    c = g["cases"][case]
    real, fake = feats(g["seed"], c["n_real"], c["d"], 0.0), feats(g["seed"] + 1, c["n_fake"], c["d"], 0.02)
    gaussians = real.mean(0), np.cov(real.T), fake.mean(0), np.cov(fake.T)                 # the last case is singular
    assert fid.fid(real, fake) == pytest.approx(c["fid"], rel=1e-6)
    assert fid.frechet_distance(*gaussians) == pytest.approx(c["fid"], rel=1e-6)
    assert fid.kid(real, fake) == pytest.approx(c["kid"], rel=1e-6)
    assert fid.precision_recall(real, fake) == pytest.approx((c["precision"], c["recall"]), abs=1e-12)


@pytest.mark.parametrize("first, second", [(1, 1), (1, 0.5), (0, 0)])
def test_fid_diagonal_gaussians(first, second):
    """d^2 = |mu1 - mu2|^2 + |a^1/2 - b^1/2|^2, also where half of the directions, or all, have no variance."""
    g = torch.Generator().manual_seed(0)
    a, b, mu, nu = torch.rand(4, 40, generator=g, dtype=torch.float64)
    a, b = a * first, b * (torch.arange(40) < 40 * second) * first
    wanted = (mu - nu).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert fid.frechet_distance(mu, a.diag(), nu, b.diag()) == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize("n", [500, 60])
def test_fid_known_root(n):
    """S2 = T S1 T has tr (S1 S2)^1/2 = tr (S1 T), at full rank (n = 500 > d) and singular (n = 60 < d)."""
    f1, T, s1, s2, exact = fid.root_problem(128, n)
    zero, full = torch.zeros(128), torch.eye(128).double()
    from_trace = lambda t: (s1.trace() + s2.trace() - 2 * t).item()
    assert fid.frechet_distance(zero, s1, zero, s2) == pytest.approx(exact, rel=1e-6)
    assert fid.distance(zero, f1, zero, T @ f1) == pytest.approx(exact, rel=1e-9)          # the small-matrix form
    assert from_trace(fid.symmetric_trace(s1, s2)) == pytest.approx(exact, rel=1e-4)
    assert from_trace(fid.newton_schulz(s1 @ s2, 40).trace()) == pytest.approx(exact, rel=1e-4)
    if n > 128:
        assert from_trace(fid.denman_beavers(s1 @ s2).trace()) == pytest.approx(exact, rel=1e-2)
    wanted = (128 + s1.trace() - 2 * torch.linalg.svdvals(f1).sum()).item()                # one side singular
    for a, b in ((s1, full), (full, s1)):
        assert fid.frechet_distance(zero, a, zero, b) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("zeros", [0, 500])
def test_fid_large_gram_path(zeros):
    """Above 1024 dimensions the Gram matrix stands in for the singular values, unless some are 0."""
    g = torch.randn(1030, 1100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g[torch.randperm(1030, generator=torch.Generator().manual_seed(0))[:zeros]] = 0
    for m in (g, g.T) if not zeros else (g,):
        assert fid.nuclear_norm(m).item() == pytest.approx(torch.linalg.svdvals(g).sum().item(), rel=1e-10)


def test_fid_of_numbers_that_are_none_is_none():
    bad = torch.full((3,), float("nan"))
    assert math.isnan(fid.frechet_distance(bad, torch.eye(3), torch.zeros(3), torch.eye(3)))


def test_fid_sqrtm():
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for a in (x.T @ x, x @ x.T):                                           # full rank, rank 30 of 50
        r, f = fid.sqrtm(a), fid.factor(a)
        assert torch.allclose(r @ r, a, atol=1e-9) and torch.allclose(r, r.T, atol=1e-12)
        assert torch.linalg.eigvalsh(r).min() > -1e-6
        assert f.shape == (len(a), 30) and torch.allclose(f @ f.T, a, atol=1e-9)


@pytest.mark.parametrize("n", [300, 40])
def test_fid_of_equal_sets_symmetry_and_order(n):
    x, y = (torch.from_numpy(feats(s, n, 64, 0.1 * s)).float() for s in (1, 2))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    assert abs(fid.fid(x, x)) < 1e-6 and abs(fid.fid(x, x[order])) < 1e-6
    assert fid.fid(x, y) == pytest.approx(fid.fid(y, x), rel=1e-9) == pytest.approx(fid.fid(x[order], y), rel=1e-9)
    assert fid.fid(x, x + 2) == pytest.approx(4 * 64, rel=1e-5)            # a shift by 2 in 64 dimensions
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 100) == (0, 0)


def test_fid_kid_and_neighbours_naively():
    """Against the definitions written as loops, over several blocks of rows."""
    x, y = feats(1, 40, 8, 0.0), feats(2, 30, 8, 0.3)
    k = lambda a, b: (a @ b / 8 + 1) ** 3
    pairs = lambda a: np.mean([k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j])
    wanted = pairs(x) + pairs(y) - 2 * np.mean([k(p, q) for p in x for q in y])
    assert fid.kid(x, y, rows=7) == pytest.approx(wanted, rel=1e-9)
    radius = lambda a: [sorted(np.linalg.norm(a - p, axis=1))[3] for p in a]               # [0] is the sample itself
    inside = lambda a, b: np.mean([any(np.linalg.norm(q - p) <= r for p, r in zip(a, radius(a))) for q in b])
    assert fid.precision_recall(x, y, rows=7) == pytest.approx((inside(x, y), inside(y, x)))


def test_fid_small_or_odd_sets_are_refused():
    x = torch.randn(5, 4)
    for call, a, b in ((fid.fid, x[:1], x), (fid.kid, x, x[:1]), (fid.precision_recall, x[:3], x),
                       (fid.fid, x, x[:, :3])):
        with pytest.raises(data.UserError):
            call(a, b)


def test_fid_extrapolation_removes_the_bias():
    """Two samples of one Gaussian: FID at n = 1000 is far from 0, its extrapolation is not."""
    real, fake = (fid.Stats(str(s), "f", 1000, None, None, torch.from_numpy(feats(s, 1000, 48, 0.0))) for s in (1, 2))
    biased, (value, error) = fid.fid(real.x, fake.x), fid.extrapolate(real, fake)
    assert biased > 0.02 and abs(value) < biased / 3 and 0 < error < biased / 3


# Inception ----

def close(t, wanted, rel=1e-4):
    t = t.contiguous().flatten().double()
    for statistic in ("mean", "std", "norm"):
        assert getattr(t, statistic)().item() == pytest.approx(wanted[statistic], rel=rel)
    values = torch.tensor(wanted["values"]).double()
    assert (t[wanted["at"]] - values).norm() <= rel * max(values.norm(), t.norm() / len(t) ** 0.5)


def test_fid_inception_golden():
    g, keys = golden("inception.json"), golden("inception_keys.json")
    made = recipe().state({k: v for k, v in keys.items() if not k.endswith("num_batches_tracked")}, g["seed"])
    net = fid.Inception()
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == keys
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    net.load_published({k: torch.from_numpy(np.array(v)) for k, v in made.items()})        # no num_batches_tracked
    for c in g["cases"]:
        plus, n, h, w = (int(v) for v in c["images"].removeprefix("images(seed+").rstrip(")").split(","))
        images = torch.from_numpy(recipe().images(g["seed"] + plus, n, h, w))
        with torch.no_grad():
            blocks = net.blocks(net.prepare(images))
        for got, wanted in zip(blocks, c["blocks"] + [c["features"]], strict=True):
            close(got, wanted)
        if plus == 32:
            close(net.fc(blocks[-1]), g["logits_of_first_case"])
            f = net.features(images)
            assert f.shape == (2, 2048) and f.dtype == torch.float32
            assert torch.allclose(f, blocks[-1], rtol=1e-4, atol=1e-4)


def test_fid_inception_folding_grey_and_strictness():
    state = fid.stand_in()
    net, plain = fid.Inception().load_published(state), fid.Inception()
    plain.load_state_dict(state)
    images = torch.randint(0, 256, (2, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    f = net.features(images)
    assert (f - plain.features(images)).norm() < 1e-4 * f.norm()
    assert torch.equal(f, net.features(images.expand(-1, 3, -1, -1)))      # grey is three equal channels
    net.load_published(state)                                              # a second time: folded layers come back
    assert torch.allclose(f, net.features(images), rtol=1e-4, atol=1e-4)
    for bad in (dict(state, extra=torch.zeros(1)), {k: v for k, v in state.items() if k != "fc.bias"}, {},
                dict(state, **{"fc.bias": torch.zeros(1000)})):
        with pytest.raises(data.UserError, match="not the published"):
            plain.load_published(bad)
    for bad in (images.float(), images[:, 0], images[:0], images.expand(-1, 2, -1, -1)):
        with pytest.raises(data.UserError, match="pictures"):
            net.features(bad)


def test_fid_inception_file_that_is_another(tmp_path, monkeypatch):
    """A damaged checkpoint is named with both hashes; a missing one with URL, path, hash and the way without it."""
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setattr(fid, "WEIGHTS_URLS", ["http://127.0.0.1:9/" + fid.WEIGHTS])
    file = tmp_path / fid.WEIGHTS
    with pytest.raises(data.UserError) as e:
        fid.inception()
    assert all(part in str(e.value) for part in ("http://127.0.0.1:9/", str(file), fid.WEIGHTS_SHA256, "--features cl"))
    file.write_bytes(b"half a file")
    with pytest.raises(data.UserError) as e:
        fid.inception()
    assert fid.WEIGHTS_SHA256 in str(e.value) and data.sha256_of(file) in str(e.value)


# classifier ----

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of 3 classes that take seconds to learn, and its classifier, in a download folder of its own."""
    root, g = tmp_path_factory.mktemp("fid"), np.random.RandomState(0)
    for c, rows in zip("abc", (slice(2, 6), slice(10, 14), slice(6, 10))):
        (root / "shapes" / c).mkdir(parents=True)
        for i in range(40):
            a = g.randint(0, 60, (16, 16)).astype(np.uint8)
            a[rows, 2:14] += 150
            Image.fromarray(a).convert("RGB").save(root / "shapes" / c / f"{i}.png")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, "DOWNLOADS", root / "downloads")
        original = fid.train_classifier
        m.setattr(fid, "train_classifier", lambda *a, **k: original(*a, **{**k, "steps": 60, "batch": 32}))
        before = torch.get_rng_state()
        net = fid.classifier(str(root / "shapes"), 16)
        assert torch.equal(before, torch.get_rng_state())                  # the caller's random numbers stay its own
        again = fid.classifier(str(root / "shapes"), 16)                   # from the file
        (path,) = (root / "downloads").glob("classifier-*.pt")
        path.write_bytes(path.read_bytes()[:5000])                         # a damaged file is made anew, to the bit
        anew = fid.classifier(str(root / "shapes"), 16)
        yield root, net, again, anew


def test_fid_classifier_learns_and_is_kept(small):
    root, net, again, anew = small
    x, y, classes = data.load(str(root / "shapes"), 16, "test")
    assert net.accuracy[0] >= 0.95 and net.heads == (3,) and again.accuracy == net.accuracy
    for other in (again, anew):
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))
    label, sure = net.predict(x)
    assert label.dtype == torch.int64 and (label == y).float().mean() >= 0.95 and 0 < sure.min() and sure.max() <= 1
    f = net.features(x)
    assert f.shape == (len(x), 128) and f.dtype == torch.float32
    assert torch.allclose(f[:2], net.features(x[:2]), atol=1e-5)           # eval mode: no matter who is in the batch
    assert net.features(x[:, :1]).shape == f.shape                         # grey pictures are taken as three channels
    assert torch.equal(net.train().features(x), f) and net.training        # ... whatever mode the caller left it in
    net.eval()
    with pytest.raises(data.UserError):
        net.features(x.float())


def test_fid_classifier_labels_of_two_heads():
    hair, eyes = fid.targets(torch.arange(132), (12, 11))
    assert torch.equal(hair * 11 + eyes, torch.arange(132)) and hair.max() == 11 and eyes.max() == 10
    net, x = fid.Classifier(3, 16, (12, 11)).eval(), torch.randint(0, 256, (9, 3, 16, 16)).byte()
    (label, sure), (h, e) = net.predict(x), net.attributes(x)
    assert torch.equal(label, h * 11 + e) and len(sure) == 9


def test_fid_augment_and_rotate():
    x = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
    g = torch.Generator().manual_seed(0)
    assert torch.equal(fid.augment(x, False, g, shift=0), x)
    moved = fid.augment(x.repeat(50, 1, 1, 1), True, g)
    windows = [torch.nn.functional.pad(x[:1].float(), [2] * 4, mode="replicate")[..., i:i + 8, j:j + 8].byte()
               for i in range(5) for j in range(5)]
    windows += [w.flip(3) for w in windows]
    which = {next(k for k, w in enumerate(windows) if torch.equal(w[0], m)) for m in moved[::2]}
    assert sum(k < 25 for k in which) > 8 and sum(k >= 25 for k in which) > 8              # plain and mirrored shifts
    turned = fid.rotate(x, torch.tensor([0, 3]))
    assert torch.equal(turned[0], x[0]) and torch.equal(turned[1], x[1].rot90(3, (1, 2)))


def test_fid_score_and_line(small):
    root, net, *_ = small
    x = data.load(str(root / "shapes"), 16, "train")[0]
    noise = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(0)).byte()
    good, bad = fid.score(net, x[::2], x[1::2], x[1::2]), fid.score(net, x[::2], noise[::2], x[1::2])
    assert good["fid"] == pytest.approx(good["floor"]) and bad["fid"] > 5 * good["fid"] and bad["kid"] > good["kid"]
    assert good["n"] == len(x) // 2 and bad["precision"] < good["precision"]
    assert "n = unknown real, 9)" in fid.line(dict(fid=1, features="f", n=9, n_real=0))
    assert fid.line(dict(fid=12.345, features="classifier-mnist-32", n=10, n_real=10, floor=0.41, floor_n=10)) == (
        "FID 12.3 (classifier-mnist-32, n = 10, real-vs-real floor 0.41)")


# the command ----

@pytest.fixture(scope="module")
def sets(small):
    """Sources of all kinds beside the small classifier."""
    root = small[0]
    x = data.load(str(root / "shapes"), 16, "all")[0].permute(0, 2, 3, 1).numpy()
    for name, array in (("s", x), ("grey", x[..., :1]), ("float", x / 255)):
        np.save(root / f"{name}.npy", array)
    for folder in ("broken", "one", "run"):
        (root / folder).mkdir()
    for i in range(12):
        Image.fromarray(x[i]).resize((16 + i % 2, 20)).save(root / "broken" / f"{i}.png")
    Image.fromarray(x[0]).save(root / "one" / "0.png")
    (root / "broken" / "bad.png").write_bytes(b"\x89PNG, but not for long")
    (root / "junk.npz").write_bytes(b"junk")
    np.savez(root / "nomu.npz", sigma=np.eye(128))
    np.savez(root / "nan.npz", mu=np.zeros(4), sigma=np.full((4, 4), np.nan))
    np.savez(root / "a.npz", mu=np.zeros(30), sigma=np.eye(30))            # as pytorch-fid writes them
    np.savez(root / "b.npz", mu=np.ones(30), sigma=4 * np.eye(30))
    data.save_checkpoint(root / "run" / "last.pt", {"step": 1})
    return root


FLAGS = ["--features", "classifier", "--data", "shapes", "--size", "16"]


def run_main(capsys, monkeypatch, root, *words):
    """main() inside this process, in the folder of the sources -> what it printed."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(data, "DOWNLOADS", Path("downloads"))
    fid.main([str(w) for w in words])
    return capsys.readouterr().out


def test_fid_command(capsys, monkeypatch, sets, tmp_path):
    run = lambda *words: run_main(capsys, monkeypatch, sets, *words)
    values = lambda *words: json.loads(run(*words, "--json"))              # fails unless JSON is all there is on stdout
    npz, broken = tmp_path / "shapes.npz", ("broken", *FLAGS, "--skip-broken")
    out = run("shapes", "s.npy", *FLAGS)
    assert float(out.split("FID ")[-1].split()[0]) < 1e-6                  # the same pictures, as files and as an array
    assert all(s in out for s in ("KID", "precision", "warning: n = 120 is small", "real-vs-real floor"))
    out = run("shapes", *broken)
    assert "broken: 12 pictures" in out and "1 broken left out" in out
    r = values("shapes", *broken)
    assert r["n"] == 12 and r["n_real"] == 120 and r["fid"] > 0
    assert f"wrote {npz}" in run("shapes", *FLAGS, "--save", npz)
    saved = values(npz, *broken)
    assert saved["fid"] == pytest.approx(r["fid"], rel=1e-6) and saved["n_real"] == 120 and "kid" not in saved
    with np.load(npz) as f:                                                # a file pytorch-fid reads too
        assert f["mu"].shape == (128,) and f["sigma"].shape == (128, 128)
        assert np.allclose(f["sigma"], f["root"] @ f["root"].T)
    assert values("a.npz", "b.npz")["fid"] == pytest.approx(30 + 30 * (1 + 4 - 2 * 2))    # |mu|^2 + tr, diagonal
    r = values("shapes", "s.npy", *FLAGS, "--n", "100", "--extrapolate")
    assert r["n"] == 100 and abs(r["fid_inf"]) < 1 + r["fid"]


@pytest.mark.parametrize("words, why", [
    (["shapes", "broken", *FLAGS], "broken/bad.png is no readable picture"),
    (["shapes", "one", *FLAGS], "one: 1 readable picture"),
    (["grey.npy", "s.npy", *FLAGS], "different channels"),
    (["shapes", "float.npy", *FLAGS], "wanted: uint8"),
    (["nomu.npz", "s.npy", *FLAGS], "lacks mu or sigma (it holds: sigma)"),
    (["nan.npz", "s.npy", *FLAGS], "no finite mean"),
    (["junk.npz", "s.npy", *FLAGS], "no readable npz"),
    (["none.npz", "s.npy", *FLAGS], "there is no none.npz"),
    (["a.npz", "s.npy", *FLAGS], "a.npz holds inception features, not classifier-shapes"),
    (["shapes", "nowhere", *FLAGS], "nowhere"),
    (["run", *FLAGS], "none of gan.py's"),
    (["empty.pt", *FLAGS], "no checkpoint"),
    (["digits:best", "s.npy", *FLAGS], "train, test or all"),
    (["s.npy"], "against what?"), ([], "0 sources"), (["a", "b", "c"], "3 sources"),
    (["s.npy", "s.npy", "--features", "vgg"], "vgg is unknown"),
    (["s.npy", "s.npy", "--n", "1"], "--n 1"),
    (["s.npy", "s.npy", "--features", "classifier"], "of which data set"),
    (["a.npz", "b.npz", "--extrapolate", "1"], "--extrapolate needs"),
])
def test_fid_command_bad_input(capsys, monkeypatch, sets, words, why):
    files = lambda: sorted(p for p in sets.rglob("*") if "cache" not in p.parts)
    before = files()
    with pytest.raises(data.UserError) as e:
        run_main(capsys, monkeypatch, sets, *words)
    assert why in str(e.value) and "\n" not in str(e.value) and files() == before


def test_fid_command_exit_code(sets):
    r = subprocess.run([sys.executable, str(ROOT / "fid.py"), "nomu.npz", "b.npz"], cwd=sets, text=True, timeout=120,
                       capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert r.returncode == 2 and r.stderr.startswith("error: nomu.npz lacks mu") and r.stderr.count("\n") == 1


def test_fid_streams(monkeypatch):
    """No more than a chunk of pictures is ever asked for."""
    asked = []
    read = lambda i: asked.append(len(i)) or [torch.full((3, 8 + k % 2, 8), int(k), dtype=torch.uint8) for k in i]
    net = fid.Classifier(3, 8, (2,), "net")
    s = fid.measure(fid.Source("s", 103, 3, read), net, fid.Config(batch=10, n=95))
    assert max(asked) == 10 and sum(asked) == 95 and s.n == 95 and s.x.shape == (95, 128)


def test_fid_of_a_run(capsys, monkeypatch, small, tmp_path):
    """A run is judged by its samples.npy; where that is missing, gan.py is asked for it with the run's own config."""
    root, run, called = small[0], tmp_path / "run", []
    x = data.load(str(root / "shapes"), 16, "all")[0]
    run.mkdir()
    config = dict(preset="dcgan", data=str(root / "shapes"), z=7, out="x", steps=9)
    data.save_checkpoint(run / "last.pt", dict(config=config))

    def draw(command, **_):
        called.append(command)
        np.save(run / "samples.npy", x.permute(0, 2, 3, 1).numpy())
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(fid.subprocess, "run", draw)
    monkeypatch.setattr(data, "DOWNLOADS", root / "downloads")
    for _ in range(2):                                                     # the second time they are there
        fid.main([str(run), "--features", "classifier", "--n", "100", "--json"])
        r = json.loads(capsys.readouterr().out)
        assert r["n"] == 100 and r["features"].startswith("classifier-shapes")
    (command,) = called
    assert command[2] == "dcgan" and {"--z=7", "--steps=0", "--dump=100"} <= set(command)
    assert not any(w.startswith(("--steps=9", "--preset")) for w in command)


def test_fid_tables(capsys):
    fid.roots(d=64, n=20)
    rows = {r[:32].strip(): r[32:].split() for r in capsys.readouterr().out.splitlines()[2:]}
    assert {"Newton-Schulz, 40 iterations", "Denman-Beavers, 20 iterations", "two eigendecompositions"} <= set(rows)
    for way in ("here, from two covariances", "here, the real root kept"):
        assert all(float(error) < 1e-6 for error in rows[way][2::3])


# ---- tests of cyclegan.py --------------------------------------------------------------------------------------------

def cyclegan_faces(n=200, size=32):
    """Two small unpaired Styles of drawn faces, with the paired test set that scores them."""
    draw = lambda s, n, first: [torch.from_numpy(v) for v in data.draw_faces(s, n, first, size)]
    test = {s: draw(s, 40, 20_000) for s in "ab"}
    return tuple(cyclegan.Style(f"faces-{s}", draw(s, n, first)[0], *test[s]) for s, first in (("a", 0), ("b", 10_000)))


def cyclegan_folders(tmp_path, n=24, size=40):
    """Two folders of n random colour blobs, as command line flags."""
    r = np.random.RandomState(0)
    for s in "ab":
        (tmp_path / s).mkdir()
        for i in range(n):
            small = Image.fromarray(r.randint(0, 256, (4, 4, 3)).astype(np.uint8))
            small.resize((size, size)).save(tmp_path / s / f"{i:03d}.png")
    return ["--a", str(tmp_path / "a"), "--b", str(tmp_path / "b"), "--device", "cpu"]


def test_cyclegan_networks_have_the_published_sizes():
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(cyclegan.CycleGenerator()) == 144_448 and count(cyclegan.Discriminator()) == 262_048
    assert count(cyclegan.ResNetGenerator(64, 9)) == 11_378_179 and count(cyclegan.PatchGAN()) == 2_764_737
    x = torch.randn(2, 3, 32, 32)
    assert cyclegan.CycleGenerator()(x).shape == x.shape and cyclegan.Discriminator()(x).shape == (2,)
    for size in (64, 128):
        G, D = cyclegan.networks(cyclegan.Config(size=size, width=4))
        x = torch.randn(1, 3, size, size)
        assert G(x, "ab").shape == x.shape and D["a"](x).shape == (1, 1, size // 8 - 2, size // 8 - 2)


def test_cyclegan_patchgan_sees_70_pixels():
    D = cyclegan.PatchGAN(4)
    for m in D.modules():                                                # instance norm would make every pixel count
        if isinstance(m, torch.nn.InstanceNorm2d):
            m.forward = lambda t: t
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    D(x)[0, 0, 15, 15].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert len(rows) == 70 and rows[-1] - rows[0] == 69


def test_cyclegan_unit_shares_two_blocks_and_gives_them_to_the_optimiser_once():
    G, _ = cyclegan.networks(cyclegan.Config(model="unit"))
    opt = cyclegan.optimiser(G, cyclegan.Config(model="unit"))
    ids = [id(p) for group in opt.param_groups for p in group["params"]]
    count = lambda net: sum(p.numel() for p in net.parameters())
    total = 2 * count(cyclegan.Encoder()) + 2 * count(cyclegan.Decoder()) + 2 * count(cyclegan.ResBlock(64))
    assert len(ids) == len(set(ids)) and sum(p.numel() for p in opt.param_groups[0]["params"]) == total == 657_798
    x = torch.randn(1, 3, 32, 32)
    before = [G(x, way) for way in ("ab", "ba", "aa", "bb")]
    for block in (G.into, G.outof):                                      # each shared block is on every path
        with torch.no_grad():
            block.body[0].weight.mul_(-1)
        after = [G(x, way) for way in ("ab", "ba", "aa", "bb")]
        assert all((p - q).abs().max() > 1e-6 for p, q in zip(before, after))
        before = after


def test_cyclegan_losses_are_their_equations():
    x, y = torch.rand(4, 3, 8, 8) * 2 - 1, torch.rand(4, 3, 8, 8) * 2 - 1
    assert cyclegan.cycle_loss(x, x) == 0
    byhand = sum(abs(float(p) - float(q)) for p, q in zip(x.flatten(), y.flatten())) / 4
    assert cyclegan.cycle_loss(x, y).item() == pytest.approx(byhand, rel=1e-5)
    assert cyclegan.cycle_loss(x, y).item() == pytest.approx(3 * 8 * 8 * F.l1_loss(x, y).item(), rel=1e-5)
    real, fake = torch.randn(9), torch.randn(9)
    assert cyclegan.d_lsgan(real, fake).item() == pytest.approx(
        (F.mse_loss(real, torch.ones(9)) + F.mse_loss(fake, torch.zeros(9))).item() / 2, rel=1e-5)
    assert cyclegan.g_lsgan(fake).item() == pytest.approx(F.mse_loss(fake, torch.ones(9)).item(), rel=1e-5)
    bce = F.binary_cross_entropy_with_logits
    assert cyclegan.d_bce(real, fake).item() == pytest.approx((bce(real, torch.ones(9)) + bce(fake, torch.zeros(9))).item())
    assert cyclegan.g_bce(fake).item() == pytest.approx(bce(fake, torch.ones(9)).item())
    mu = torch.randn(2, 3, 4, 4)                                         # KL(N(mu, I) | N(0, I)) = mu^2 / 2 a number
    N = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(N(mu, torch.ones(())), N(torch.zeros(()), torch.ones(())))
    assert cyclegan.kl(mu).item() == pytest.approx(2 * kl.mean().item(), rel=1e-5)


def test_cyclegan_weights_and_the_conversion_of_lambda():
    w = cyclegan.weights(cyclegan.Config(model="unit"))
    assert w == dict(gan=10, rec=100, kl=.1, cycle=100, cycle_kl=.1)
    assert cyclegan.recipe("unit", 32) == dict(lr=1e-4, weight_decay=1e-4)
    large = cyclegan.recipe("cyclegan", 128)
    assert large["lambda_cycle"] * 3 * 128 * 128 == pytest.approx(10)    # the paper's 10 on the mean L1
    w = cyclegan.weights(cyclegan.Config(size=128, **large))
    assert w["identity"] == pytest.approx(.5 * w["cycle"])


def test_cyclegan_pool_returns_old_images_half_the_time():
    torch.manual_seed(0)
    pool, image = cyclegan.ImagePool(50), lambda i: torch.full((1, 1, 1), float(i))
    first = pool(torch.stack([image(i) for i in range(50)]))
    assert first.flatten().tolist() == list(range(50))                   # while it fills, the new ones come back
    old, ages = 0, []
    for i in range(50, 4050):
        got = int(pool(image(i)[None]).item())
        old += got != i
        ages += [i - got] * (got != i)
    assert 0.47 < old / 4000 < 0.53                                      # sigma 0.008
    assert np.mean(ages) == pytest.approx(100, rel=.15)                  # replaced with probability 1/2 * 1/50 a step
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(cyclegan.ImagePool(0)(x), x)
    twin = cyclegan.ImagePool(50)
    twin.load_state_dict(pool.state_dict())
    state = torch.get_rng_state()
    a = pool(torch.arange(20.).view(20, 1, 1, 1))
    torch.set_rng_state(state)
    assert torch.equal(a, twin(torch.arange(20.).view(20, 1, 1, 1)))


def test_cyclegan_pool_detaches():
    x = torch.randn(3, 3, 4, 4, requires_grad=True)
    assert not cyclegan.ImagePool(2)(x).requires_grad


def reference_step(cfg, a, b):
    """One CycleGAN step written down plainly: four networks, four optimisers, nothing shared with train()."""
    torch.manual_seed(cfg.seed)
    G, D = cyclegan.networks(cfg)
    adam = lambda net: torch.optim.Adam(net.parameters(), cfg.lr, (.5, .999))
    opt = [adam(net) for net in (G.ab, G.ba, D["a"], D["b"])]
    pick = lambda x: x[torch.randint(len(x), (cfg.batch,))].float() / 127.5 - 1
    x_a, x_b = pick(a.images), pick(b.images)
    with torch.no_grad():
        fake_b, fake_a = G.ab.train()(x_a), G.ba(x_b)
    for s, x, fake in (("a", x_a, fake_a), ("b", x_b, fake_b)):
        (((D[s](x) - 1) ** 2).mean() / 2 + (D[s](fake) ** 2).mean() / 2).backward()
    norm = sum(p.grad.square().sum() for p in D.parameters()) ** .5
    opt[2].step(), opt[3].step()
    fake_b, fake_a = G.ab(x_a), G.ba(x_b)
    loss = ((D["b"](fake_b) - 1) ** 2).mean() + ((D["a"](fake_a) - 1) ** 2).mean()
    cycle = ((G.ba(fake_b) - x_a).abs().mean() + (G.ab(fake_a) - x_b).abs().mean()).item() / 4
    loss = loss + cfg.lambda_cycle * ((G.ba(fake_b) - x_a).abs().sum() + (G.ab(fake_a) - x_b).abs().sum()) / cfg.batch
    loss = loss + cfg.identity * cfg.lambda_cycle * ((G.ab(x_b) - x_b).abs().sum() + (G.ba(x_a) - x_a).abs().sum()) / cfg.batch
    loss.backward()
    opt[0].step(), opt[1].step()
    return G, D, norm.item(), cycle


@pytest.mark.parametrize("identity", [0., .5])
def test_cyclegan_step_is_the_equations(tmp_path, identity):
    a, b = cyclegan_faces(20)
    cfg = cyclegan.Config(data="faces", steps=1, batch=4, amp=0, device="cpu", identity=identity)
    G, D, _, log = cyclegan.train(cfg, a, b, tmp_path, torch.device("cpu"))
    want_G, want_D, norm, cycle = reference_step(cfg, a, b)
    assert log.table["|dD|"][-1] == pytest.approx(norm, rel=1e-3)        # G's step leaves D's gradients alone
    if identity:                                                         # logged as an L1 where black to white is 1
        assert 0 < log.table["identity"][-1] < 1 and log.table["cycle"][-1] == pytest.approx(cycle, rel=1e-3)
    torch.manual_seed(cfg.seed)
    start, _ = cyclegan.networks(cfg)
    moved = 0
    for net, want in ((G, want_G), (D, want_D)):
        for p, q in zip(net.parameters(), want.parameters()):
            assert (p - q).abs().mean() < 2e-5                           # Adam's first step is 3e-4 for every number
    for p, q in zip(G.parameters(), start.parameters()):
        moved = max(moved, (p - q).abs().max().item())
    assert moved == pytest.approx(cfg.lr, rel=.05)


@pytest.mark.parametrize("flags", [["--pool", "6"], ["--model", "unit"]])
def test_cyclegan_resumes_to_the_bit(tmp_path, flags, capsys):
    flags = cyclegan_folders(tmp_path) + flags + ["--batch", "4", "--log-every", "2", "--sample-every", "4"]
    cyclegan.main(flags + ["--steps", "8", "--out", str(tmp_path / "whole")])
    cyclegan.main(flags + ["--steps", "4", "--out", str(tmp_path / "half")])
    cyclegan.main(flags + ["--steps", "8", "--out", str(tmp_path / "half"), "--resume", "1"])
    whole, half = (torch.load(tmp_path / d / "last.pt", weights_only=True) for d in ("whole", "half"))
    assert whole["step"] == half["step"] == 8
    leaves = lambda v: (sum((leaves(w) for w in (v.values() if isinstance(v, dict) else v)), [])
                        if isinstance(v, (dict, list, tuple)) else [v])
    for k in ("G", "D", "opt_G", "opt_D", "pool_a", "pool_b", "rng"):
        p, q = leaves(whole[k]), leaves(half[k])
        assert len(p) == len(q) and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(p, q)), k
    log = [(tmp_path / d / "log.csv").read_text().splitlines() for d in ("whole", "half")]
    drop = lambda lines: [l.rsplit(",", 1)[0] for l in lines if not l.startswith("5,")]       # seconds; a resume's first step
    assert drop(log[0]) == drop(log[1])
    for name in ("translations.png", "curves.png", "training.gif", "result.json", "000008.png"):
        assert (tmp_path / "half" / name).exists()
    with pytest.raises(data.UserError, match="--lr"):                    # other settings: no resume
        cyclegan.main(flags + ["--steps", "9", "--out", str(tmp_path / "half"), "--resume", "1", "--lr", "1"])


def test_cyclegan_colour_map_and_scores():
    x = torch.rand(3, 3, 8, 8) - .5
    M = torch.tensor([[.2, .5, 0.], [.1, -.3, .4], [.3, 0., .3]])
    y = torch.einsum("nchw,cd->ndhw", x, M) + torch.tensor([.1, -.2, 0.]).view(3, 1, 1)
    assert torch.allclose(cyclegan.colour_map(x, y), y, atol=1e-4)
    black, white = torch.full((2, 3, 4, 4), -1.), torch.ones(2, 3, 4, 4)
    assert cyclegan.l1(black, white) == 1 and cyclegan.psnr(black, white) == 0
    assert cyclegan.psnr(black, black + .2).item() == pytest.approx(20, abs=1e-3)             # 10 log10(1 / 0.1^2)


def test_cyclegan_learns_faces(tmp_path):
    a, b = cyclegan_faces(400)
    cfg = cyclegan.Config(data="faces", steps=90, batch=16, lr=6e-4, device="cpu", log_every=90, sample_every=90)
    G, _, _, log = cyclegan.train(cfg, a, b, tmp_path, torch.device("cpu"))
    for x, y, way in ((a, b, "ab"), (b, a, "ba")):
        x, y = data.to_float(x.test), data.to_float(y.test)
        error = cyclegan.l1(cyclegan.translate(G, x, way), y)
        assert error < cyclegan.l1(x, y) / 2, (way, error)
    assert log.table["L1 ab"][-1] == pytest.approx(cyclegan.l1(cyclegan.translate(
        G, data.to_float(a.test), "ab"), data.to_float(b.test)).item(), rel=1e-4)


def test_cyclegan_larger_networks_translate_files(tmp_path, capsys):
    flags = cyclegan_folders(tmp_path, n=4) + ["--size", "64", "--width", "8", "--out", str(tmp_path / "run")]
    cyclegan.main(flags + ["--steps", "3", "--log-every", "1"])
    assert "= 10 on the mean L1" in capsys.readouterr().out
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.new("L", (50, 90), 200).save(mixed / "grey.png")
    Image.new("RGBA", (100, 70), (255, 0, 0, 0)).save(mixed / "clear.png")
    Image.new("P", (33, 33)).save(mixed / "palette.png")
    Image.new("RGB", (200, 130), (9, 99, 199)).save(mixed / "photo.jpg")
    cyclegan.main(["--translate", str(mixed), "--direction", "ba", "--out", str(tmp_path / "run"), "--device", "cpu"])
    made = sorted((tmp_path / "run" / "translated-ba").glob("*.png"))
    assert [p.name.split("-")[0] for p in made] == ["clear", "grey", "palette", "photo", "sheet.png"]
    assert all(Image.open(p).size == (64, 64) for p in made[:4])
    cyclegan.main(["--translate", str(mixed / "grey.png"), "--out", str(tmp_path / "run"), "--device", "cpu"])
    one = np.asarray(Image.open(tmp_path / "run" / "translated-ab" / "grey.png"))
    G = cyclegan.networks(cyclegan.Config(size=64, width=8))[0]
    G.load_state_dict(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["G"])
    x = data.to_float(data.fit(data.read_picture(mixed / "grey.png"), 64))[None]
    want = data.to_uint8(cyclegan.translate(G, x, "ab"))[0].permute(1, 2, 0).numpy()
    assert np.abs(one.astype(int) - want.astype(int)).max() <= 1


def test_cyclegan_sweep_puts_all_lambdas_on_one_sheet(tmp_path):
    flags = cyclegan_folders(tmp_path) + ["--batch", "2", "--steps", "2", "--out", str(tmp_path / "sweep")]
    cyclegan.main(flags + ["--sweep", "0,0.5"])
    rows = (tmp_path / "sweep" / "sweep.md").read_text().splitlines()
    assert [r.split("|")[1].strip() for r in rows[2:]] == ["0", "0.5"] and "cycle" in rows[0]
    for name in ("sweep.png", "sweep-curves.png", "lambda-0/result.json", "lambda-0.5/result.json"):
        assert (tmp_path / "sweep" / name).exists()


def test_cyclegan_bad_input_is_one_line(tmp_path):
    good = cyclegan_folders(tmp_path, n=2)
    (tmp_path / "one").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "one" / "x.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(b"broken")
    folder = lambda name: ["--a", str(tmp_path / name), "--b", str(tmp_path / "b")]
    for flags, words in [(["--direction", "xy"], "ab ba"), (["--size", "48"], "32 64"), (["--model", "gan"], "cyclegan unit"),
                         (["--data", "mnist"], "emojis faces"), (["--a", "x"], "--b"), (folder("none"), "none"),
                         (folder("one"), "at least 2"), (["--translate", "x.png", "--out", str(tmp_path / "new")], "no checkpoint"),
                         (["--translate", "x.png", "--out", str(tmp_path / "run")], "no readable checkpoint"),
                         (["--steps", "0", "--out", str(tmp_path / "new")], "train first"), (["--batch", "1"], "batch norm"),
                         (["--sweep", "0,x"], "--sweep"), (["--sweep", "0,-1"], "--sweep"), (["--pool", "-1"], "--pool"),
                         (["--model", "unit", "--identity", "1"], "--identity"), (["--nonsense", "1"], "--nonsense")]:
        with pytest.raises(data.UserError, match=words) as e:
            cyclegan.main(flags)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "new").exists()
    cyclegan.main(good + ["--batch", "2", "--steps", "1", "--out", str(tmp_path / "two")])    # two pictures are enough
    with pytest.raises(data.UserError, match="nowhere.png"):
        cyclegan.main(["--translate", "nowhere.png", "--out", str(tmp_path / "two")])
    with pytest.raises(data.UserError, match="--overwrite 1"):
        cyclegan.main(good + ["--steps", "1", "--out", str(tmp_path / "two")])


# ---- tests of biggan_interp.py ---------------------------------------------------------------------------------------

# tests of biggan_interp.py ---------------------------------------------------------------------------------------

big = biggan_interp

def biggan_tiny(rows):
    """A trained-like small generator in a moment: random weights, the given rows of the tables filled."""
    torch.manual_seed(0)
    G = big.Generator(big.SMALL).requires_grad_(False)
    torch.nn.init.normal_(G.embeddings.weight)
    return big.fill_statistics(big.fold(G), rows, per_class=1)

# the generator ----

def test_biggan_interp_golden_images_and_folding():
    """The published 128 layers at channel width 8, weights from the recipe."""
    g, G = golden("biggan.json"), big.Generator(big.Config(channel_width=8)).eval().requires_grad_(False)
    state = recipe().state({k: v.shape for k, v in G.state_dict().items()}, g["seed"])
    G.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    assert sum(p.numel() for p in G.parameters()) == g["parameters"] and len(g["cases"]) == 9
    folded, z = big.fold(copy.deepcopy(G)), np.random.RandomState(g["seed"] + 1).standard_normal((3, 128))
    z, y = torch.from_numpy(np.clip(z, -2, 2).astype(np.float32)), torch.tensor(g["classes"])
    for case in g["cases"]:
        t = case["truncation"]
        x = G(t * z, y, t)
        assert list(x.shape) == case["shape"]
        assert (x.flatten()[case["at"]] - torch.tensor(case["values"])).abs().max() < 1e-4, t
        for name in ("mean", "std", "norm"):
            assert abs(getattr(x.double(), name)().item() - case[name]) < 1e-4 * max(1, abs(case[name])), (t, name)
        assert (folded(t * z, y, t) - x).abs().max() < 1e-5
        assert (G(t * z, G.embed(y), t) - x).abs().max() < 1e-6                # classes or their embeddings
    for wrong in (0.0, -0.5, 1.01):
        with pytest.raises(ValueError, match="truncation"):
            G(z, y, wrong)

@pytest.mark.parametrize("size, parameters", [(128, 50_388_609), (256, 55_880_833), (512, 56_163_905)])
def test_biggan_interp_parameter_counts_and_keys(size, parameters):
    with torch.device("meta"):
        G = big.Generator(big.Config(size=size))
        assert sum(p.numel() for p in G.parameters()) == parameters
        if big.Config() == big.Config(size=size):
            assert {k: list(v.shape) for k, v in G.state_dict().items()} == golden("biggan128_keys.json")

@pytest.mark.parametrize("shape", [(24, 10), (16, 8, 3, 3)])
def test_biggan_interp_spectral_norm_is_the_largest_singular_value(shape):
    torch.manual_seed(0)
    layer = big.Spectral(*shape)
    layer.weight_orig.data.normal_()
    before = layer.eval().weight_u
    layer.weight()
    assert torch.equal(before, layer.weight_u)                                # eval: no power iteration
    layer.train().weight()
    assert not torch.equal(before, layer.weight_u)
    layer.power_iteration(300)
    sigma = torch.linalg.svdvals(layer.weight_orig.detach().flatten(1))[0]
    assert torch.allclose(layer.eval().weight() * sigma, layer.weight_orig, atol=1e-4)
    x = torch.randn(2, shape[1], *[5, 5][:len(shape) - 2])
    assert torch.allclose(layer(x, out=3), layer(x)[:, :3], atol=1e-6)

def test_biggan_interp_conditional_batch_norm_is_its_equation():
    torch.manual_seed(0)
    bn = big.BatchNorm(4, 6, big.Config(n_stats=51)).eval()
    means, variances = bn.running_means.normal_(), bn.running_vars.uniform_(0.5, 2)
    x, cond = torch.randn(3, 4, 2, 2), torch.randn(3, 6)
    scale, offset = cond @ bn.scale.weight().T, cond @ bn.offset.weight().T
    for t, row, weight in ((0.4, 20, 1), (0.43, 21, 0.5), (0.415, 20, 0.75)):  # 0.75, not 0.25: the published quirk
        mean, var = (weight * s[row] + (1 - weight) * s[row + 1] for s in (means, variances))
        xhat = (x - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()
        wanted = xhat * (1 + scale)[..., None, None] + offset[..., None, None]
        assert torch.allclose(bn(x, t, cond), wanted, atol=1e-5), t

def test_biggan_interp_truncated_noise_has_the_exact_law():
    z = big.truncated_noise(2000, 100, 1.0, seed=3).double().flatten()
    assert 1.999 < z.abs().max() <= 2
    cdf, at = lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))), np.linspace(-2, 2, 81)
    exact = np.array([(cdf(v) - cdf(-2)) / (cdf(2) - cdf(-2)) for v in at])
    empirical = np.searchsorted(np.sort(z.numpy()), at) / len(z)
    assert np.abs(exact - empirical).max() < 1.95 / math.sqrt(len(z))         # Kolmogorov-Smirnov, p = 0.001
    half, other = (big.truncated_noise(2000, 100, 0.5, seed).double().flatten() for seed in (3, 4))
    assert torch.allclose(half, z / 2, atol=1e-6) and not torch.equal(half, other)

# published files ----

def test_biggan_interp_load_published_names_the_key(tmp_path):
    config, path, key = big.Config(channel_width=8), tmp_path / "weights.bin", "generator.layers.3.conv_1.weight_v"
    wanted = big.Generator(config).eval()
    state = wanted.state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)              # the published files are plain pickles
    z, y = big.truncated_noise(1, 128, 0.4), torch.tensor([7])
    assert torch.allclose(big.load_published(path, config)(z, y, 0.4), wanted(z, y, 0.4), atol=1e-5)
    def refused(words):
        with pytest.raises(data.UserError, match=words):
            big.load_published(path, config)
    for change, words in (({key: None}, f"{key} is missing"), ({key: torch.zeros(3)}, rf"{key} has shape \[3\]"),
                          ({key: "text"}, f"{key} has shape"), ({"more": torch.zeros(1)}, "extra key more")):
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, path)
        refused(words)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, 100, 0):
        path.write_bytes(whole[:cut])
        refused("cut off")

def test_biggan_interp_bad_file_is_one_line_and_writes_nothing(tmp_path):
    torch.save({"embeddings.weight": torch.zeros(128, 1000)}, tmp_path / "biggan-deep-128-pytorch_model.bin")
    r = subprocess.run([sys.executable, Path(big.__file__).resolve(), "--model", "published"], cwd=tmp_path, text=True,
                       env=dict(os.environ, DATA_DIR=str(tmp_path)), capture_output=True)
    assert r.returncode == 2 and "generator.gen_z.weight_orig is missing" in r.stderr and r.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("argv, words", [
    ("--size 7", "--size 7"), ("--model big", "auto, published or small"), ("--classes a", "two classes"),
    ("--truncation 0", "truncation"), ("--bogus 1", "--bogus"), ("--steps -1", "--steps"),
    ("--model small --classes violet 3", "'violet' is unknown"),
    ("--model small --steps 0 --out {tmp}/o", "no small BigGAN of seed 0")])
def test_biggan_interp_main_refuses(argv, words, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    with pytest.raises(data.UserError, match=words):
        big.main(argv.format(tmp=tmp_path).split())

def test_biggan_interp_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(data, "download", lambda url, *_: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.delenv("DATA_DIR", raising=False)
    for size in (128, 256):                                                   # 128 has a second source
        with pytest.raises(data.UserError) as e:
            big.choose_model(big.Run(model="published", size=size))
        parts = "s3.amazonaws.com", f"biggan-deep-{size}", f"{big.MEGABYTES[size]} MiB", str(tmp_path), "--model small"
        assert all(part in str(e.value) for part in parts), e.value
    assert big.choose_model(big.Run()) is None and "small BigGAN" in capsys.readouterr().out
    names = big.imagenet_names()
    assert names[282] == "tiger cat" and names[5] == "class 5" and len(names) == 1000

# t-SNE ----

def mixture(n):
    """n points of 20 Gaussians in 128 dimensions, and which of them each belongs to."""
    r = np.random.RandomState(0)
    c, label = r.randn(20, 128) * 1.5, r.randint(0, 20, n)
    return torch.from_numpy(c[label] + r.randn(n, 128)), torch.from_numpy(label)

def test_biggan_interp_tsne_affinities():
    x, _ = mixture(300)
    for perplexity in (5, 30):
        p = big.conditional(x, perplexity)
        assert torch.allclose(p.sum(1), torch.ones(300, dtype=p.dtype)) and p.diagonal().abs().max() == 0
        H = -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(1)
        assert (H.exp() - perplexity).abs().max() < 1e-3
        d2 = torch.cdist(x, x).square()                                       # ln p_{j|i} is linear in the distance
        slope = (p[0, 2].log() - p[0, 1].log()) / (d2[0, 1] - d2[0, 2])
        assert torch.allclose(p[0, 1:].log() - p[0, 1].log(), slope * (d2[0, 1] - d2[0, 1:]), atol=1e-6)
    P = big.affinities(x, 30)
    assert torch.equal(P, P.T) and abs(P.sum() - 1) < 1e-12
    assert torch.isfinite(big.affinities(torch.ones(40, 3), 5)).all()         # forty equal points
    with pytest.raises(ValueError, match="perplexity"):
        big.conditional(x, 299)

def test_biggan_interp_tsne_gradient_is_autograds():
    P, off = big.affinities(mixture(150)[0], 20), ~torch.eye(150, dtype=torch.bool)
    y = torch.randn(150, 2, dtype=torch.float64, requires_grad=True)
    w = 1 / (1 + (y[:, None] - y[None]).square().sum(2)[off])                 # eq. 4, written plainly
    C = (P[off] * (P[off] / (w / w.sum())).log()).sum()
    assert abs(C.item() - big.kl(P, y.detach()).item()) < 1e-10
    wanted, = torch.autograd.grad(C, y)
    assert (big.kl_gradient(P, y.detach()) - wanted).abs().max() < 1e-6 * wanted.abs().max()

def test_biggan_interp_tsne_quality_and_repeats():
    x, label = mixture(1000)
    y = big.tsne(x, perplexity=30, seed=0)
    assert y.shape == (1000, 2) and big.kl(big.affinities(x, 30), y) <= 0.333  # scikit-learn's exact method: 0.333
    assert (label[torch.cdist(y, y).fill_diagonal_(math.inf).argmin(1)] == label).double().mean() >= 0.99
    a, b, c = (big.tsne(x[:200], 20, seed, steps=50) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)

# walks ----

def test_biggan_interp_ends_of_a_walk_are_the_classes_bit_for_bit():
    G, z = biggan_tiny([25]), big.truncated_noise(1, 32, 0.5)
    x, = big.walks(G, [(3, 100)], z, 0.5)
    for end, c in ((0, 3), (-1, 100)):
        assert torch.equal(x[end], big.pixels(G(z, torch.tensor([c]), 0.5))[0])
    assert len({image.numpy().tobytes() for image in x}) == 11
    r = big.between(G.embed(3), G.embed(100), [1.0, 0.25, 0.0])
    assert torch.equal(r[0], G.embed(3)) and torch.equal(r[2], G.embed(100))
    assert torch.allclose(r[1], 0.25 * G.embed(3) + 0.75 * G.embed(100))

def test_biggan_interp_smoothness_pairs_and_ranks():
    x = torch.tensor([0, 10, 20, 60], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert big.pixels(torch.tensor([-1.0, -0.9925, 0.0, 0.999, 1.0])).tolist() == [0, 0, 128, 255, 255]
    assert big.smoothness(x, lambda t: t.float().flatten(1)[:, :1]) == pytest.approx([20, 2, 20])
    d = big.cosine_distances(torch.tensor([[1.0, 0], [1, 0.1], [1, 0.25], [-1, 0.2], [-1, -0.4], [0, -1]]))
    assert d[0, 5].item() == pytest.approx(1) and d.diagonal().abs().max() < 1e-12
    assert big.extreme_pairs(d, 2) == [(0, 1), (3, 4)]                         # not (1, 2): 1 is taken
    assert big.extreme_pairs(d, 1, farthest=True) == [(2, 4)]
    assert big.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert big.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)

def test_biggan_interp_class_names(tmp_path, monkeypatch):
    names = ["goldfish", "tiger cat", "Persian cat", "tiger"]
    assert [big.class_index(w, names) for w in ("2", "persian CAT", "gold", "tiger")] == [2, 2, 0, 3]
    for word, near in (("cat", r"ambiguous; near: tiger cat \[1\], Persian cat \[2\]"),
                       ("persan cat", r"Persian cat \[2\]"), ("9", "0 to 3"), ("", "unknown"), ("-1", "unknown")):
        with pytest.raises(data.UserError, match=near):
            big.class_index(word, names)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    file = tmp_path / "imagenet-simple-labels.json"
    file.write_text(json.dumps(["crane"] * 2 + ["sunglasses" if i in (836, 837) else f"n{i}" for i in range(2, 1000)]))
    names = big.imagenet_names()
    assert names[837] == "sunglasses" and names[836] == "sunglasses (836)" and names[2] == "great white shark"
    file.write_text("[1, 2]")
    with pytest.raises(data.UserError, match="no list of 1000 names"):
        big.imagenet_names()
    assert [big.imagenet_group(i) for i in (1, 10, 181, 282, 837, 999)] == \
        ["fish", "bird", "dog", "wolf, cat, bear", "artefact", "artefact"]

# the small BigGAN ----

def biggan_faces(n):
    images, labels = data.draw_faces("a", n, 0, 32)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)

def test_biggan_interp_losses_projection_and_gradients():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert big.d_loss(real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3)
    assert big.d_loss(torch.zeros(5), torch.zeros(5)).item() == 2
    assert big.g_loss(fake).item() == pytest.approx(-1 / 3)
    torch.manual_seed(0)
    G, D, x = big.Generator(big.SMALL), big.Discriminator(132, h=8).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    y, other, v = torch.tensor([3, 100]), torch.tensor([50, 4]), D.v.weight()
    assert D(x, y).shape == (2,)
    assert torch.allclose(D(x, y) - D(x, other), ((v[y] - v[other]) * D.phi(x).sum((2, 3))).sum(1), atol=1e-5)
    big.g_loss(D(G(torch.randn(4, 32), torch.arange(4)), torch.arange(4))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*G.parameters(), *D.parameters()])
    assert G.embeddings.weight.grad[:, :4].abs().sum() > 0 and G.embeddings.weight.grad[:, 4:].abs().sum() == 0

def test_biggan_interp_statistics_tables_hold_what_the_batch_had():
    G, z, y = biggan_tiny([25]), big.truncated_noise(132, 32, 0.5, seed=25), torch.arange(132)
    frozen = G(z, y, 0.5)
    assert torch.allclose(frozen, G.train()(z, y), atol=1e-4)                 # with the statistics of this very batch
    assert torch.equal(G.generator["bn"].running_means[24], torch.zeros(16 * 2))    # other rows are untouched
    assert (G.eval()(z, y, 0.4) - frozen).abs().max() > 1e-3

def test_biggan_interp_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(big, "BATCH", 8)
    asked, last = [], big.SMALL.n_stats - 1
    monkeypatch.setattr(big, "sampler", lambda G, rows=None: asked.append(rows) or big.fill_statistics(
        big.fold(copy.deepcopy(G)), rows or [last], 1))                       # the same, but one row and quick
    cfg, save = big.Run(steps=4, sample_every=2, log_every=1), data.save_checkpoint
    def go(name):
        out = data.open_run(tmp_path / name, resume=1)
        return big.train(cfg, *biggan_faces(50), out, tmp_path / f"{name}.pt", torch.device("cpu"))
    def die(path, state):
        save(path, state)
        raise KeyboardInterrupt
    whole, log = go("whole")
    assert asked == [[last], [last], None]                                    # grids: the row of truncation 1, not -1
    monkeypatch.setattr(data, "save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        go("killed")
    monkeypatch.setattr(data, "save_checkpoint", save)
    torch.manual_seed(99)
    again, log2 = go("killed")
    assert torch.load(tmp_path / "killed.pt", weights_only=True)["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert log2.table["step"] == [1, 2, 3, 4] and log2.table["D"][2:] == pytest.approx(log.table["D"][2:], rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "killed").glob("0*.png")) == ["000002.png", "000004.png"]

def test_biggan_interp_small_end_to_end(tmp_path, monkeypatch, capsys):
    """The whole command for two steps: trains, keeps the network, draws every picture; then from what was kept."""
    images, labels = biggan_faces(300)
    classifier = fid.Classifier(3, 32, (12, 11), "classifier-faces-a", (1.0, 1.0)).eval()
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(data, "load", lambda *_: (images, labels, data.FACES))
    monkeypatch.setattr(fid, "classifier", lambda *_: classifier)
    monkeypatch.setattr(big, "BATCH", 8)
    monkeypatch.setattr(big, "SMALL", dataclasses.replace(big.SMALL, channel_width=4, n_stats=11))
    monkeypatch.chdir(tmp_path)
    out, argv = tmp_path / "out", "--model small --steps 2 --sample-every 2 --out out".split()
    big.main(argv)
    pictures = {f"{n}.png" for n in "interpolation pairs noise truncation tsne classes curves 000002".split()}
    assert {p.name for p in out.iterdir()} == pictures | {"training.gif", "log.csv", "result.json"}
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["biggan-small-2-0.pt"]
    result = json.loads((out / "result.json").read_text())
    assert {"hair accuracy", "eyes accuracy", "fid", "t-SNE KL"} <= result["metrics"].keys()
    assert "attributes as asked" in result["headline"] == capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(data.UserError, match="holds a run"):
        big.main(argv)
    monkeypatch.setattr(big, "train", None)                                   # what is kept is used
    big.main(["--model", "small", "--steps", "0", "--classes", "blue hair red eyes", "131", "--out", "b"])
    assert "asked: blue hair red eyes > blonde hair blue eyes" in capsys.readouterr().out
    (tmp_path / "downloads" / "biggan-small-2-0.pt").write_bytes(b"PK half a file")
    with pytest.raises(data.UserError, match="delete it"):
        big.main(argv + ["--overwrite", "1"])


# ---- python test_all.py bench: the textbook way and ours, measured in the same run ---------------------------------------

class PictureSet(torch.utils.data.Dataset):
    """What tutorials write: a list of PIL pictures, converted to a normalised tensor each time one is asked for."""

    def __init__(self, images):
        self.pictures = [Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy()) for x in images]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        a = np.asarray(self.pictures[i], np.float32).reshape(self.pictures[i].height, self.pictures[i].width, -1) / 255
        return torch.from_numpy((a.transpose(2, 0, 1) - .5) / .5)


def textbook_gan(cfg, images, steps):
    """DCGAN as tutorials have it: DataLoader, float32 NCHW, sigmoid + BCELoss, plain Adam, .item() every step. -> images/s"""
    loader = torch.utils.data.DataLoader(PictureSet(images), cfg.batch, shuffle=True, num_workers=2, drop_last=True)
    G, D = gan.networks(cfg)
    opt_G, opt_D = (torch.optim.Adam(n.parameters(), cfg.lr, (.5, .999)) for n in (G, D))
    bce, ones, zeros, step = nn.BCELoss(), torch.ones(cfg.batch), torch.zeros(cfg.batch), 0
    while True:
        for x in loader:
            if step == 5:
                start = time.perf_counter()
            if step == steps + 5:
                return steps * cfg.batch / (time.perf_counter() - start)
            D.zero_grad()
            out = D(x).sigmoid()
            loss_real = bce(out, ones)
            loss_real.backward()
            d_x = out.mean().item()
            fake = G(torch.randn(cfg.batch, cfg.z))
            out = D(fake.detach()).sigmoid()
            loss_fake = bce(out, zeros)
            loss_fake.backward()
            d_g1, loss_D = out.mean().item(), (loss_real + loss_fake).item()
            opt_D.step()
            G.zero_grad()
            out = D(fake).sigmoid()
            loss_G = bce(out, ones)
            loss_G.backward()
            d_g2, loss = out.mean().item(), loss_G.item()
            opt_G.step()
            step += 1


def textbook_cyclegan(cfg, images, steps):
    """CycleGAN as the exercises have it: two DataLoaders, float32 NCHW, D and G each translate anew, .item() every step."""
    loaders = [torch.utils.data.DataLoader(PictureSet(images), cfg.batch, shuffle=True, num_workers=1, drop_last=True) for _ in "ab"]
    G, D = cyclegan.networks(cfg)
    opt_G, opt_D = (torch.optim.Adam(n.parameters(), cfg.lr, (cfg.beta1, .999)) for n in (G, D))
    mse, step = nn.MSELoss(), 0
    while True:
        for x_a, x_b in zip(*loaders):
            if step == 3:
                start = time.perf_counter()
            if step == steps + 3:
                return steps * cfg.batch / (time.perf_counter() - start)
            opt_D.zero_grad()
            loss_real = (mse(D["a"](x_a), torch.ones(cfg.batch)) + mse(D["b"](x_b), torch.ones(cfg.batch))) / 2
            loss_real.backward()
            fake_a, fake_b = G(x_b, "ba"), G(x_a, "ab")
            loss_fake = (mse(D["a"](fake_a.detach()), torch.zeros(cfg.batch)) + mse(D["b"](fake_b.detach()), torch.zeros(cfg.batch))) / 2
            loss_fake.backward()
            opt_D.step()
            d = (loss_real + loss_fake).item()
            opt_G.zero_grad()
            fake_b = G(x_a, "ab")
            loss = mse(D["b"](fake_b), torch.ones(cfg.batch)) + cfg.lambda_cycle * (G(fake_b, "ba") - x_a).abs().sum((1, 2, 3)).mean()
            loss.backward()
            fake_a = G(x_b, "ba")
            loss_b = mse(D["a"](fake_a), torch.ones(cfg.batch)) + cfg.lambda_cycle * (G(fake_a, "ab") - x_b).abs().sum((1, 2, 3)).mean()
            loss_b.backward()
            opt_G.step()
            d, g = d, (loss + loss_b).item()
            step += 1


def our_gan(cfg, images, steps):
    """gan.train or cyclegan.train as it is, between its first and its last log line. -> images/s"""
    import tempfile
    cfg = dataclasses.replace(cfg, steps=steps + 5, log_every=5, sample_every=10 ** 9)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        device = data.device()
        if isinstance(cfg, cyclegan.Config):
            style = cyclegan.Style("a", images.to(device), images[:100], None)
            seconds = cyclegan.train(cfg, style, style, Path(out), device)[3].table
        else:
            seconds = gan.train(cfg, images.to(device), None, Path(out), device)[4].table
    return steps * cfg.batch / (seconds["seconds"][-1] - seconds["seconds"][1])


def textbook_tsne(x, perplexity, steps):
    """t-SNE as it is first written down: one point after another, in numpy. -> (n, 2)"""
    x, n = np.asarray(x, float), len(x)
    P = np.zeros((n, n))
    for i in range(n):                                                   # bisection for each point's own width
        d2, low, high = ((x - x[i]) ** 2).sum(1), -20., 20.
        d2 = d2 / d2.mean()
        for _ in range(50):
            p = np.exp(-np.exp((low + high) / 2) * d2)
            p[i] = 0
            p = p / max(p.sum(), 1e-300)
            if -(p[p > 0] * np.log(p[p > 0])).sum() > np.log(perplexity):
                low = (low + high) / 2
            else:
                high = (low + high) / 2
        P[i] = p
    P = (P + P.T) / (2 * n)
    y, velocity = np.random.RandomState(0).randn(n, 2) * .01, np.zeros((n, 2))
    for step in range(steps):
        w = 1 / (1 + ((y[:, None] - y[None]) ** 2).sum(2))
        np.fill_diagonal(w, 0)
        f = ((12 if step < 250 else 1) * P - w / w.sum()) * w
        gradient = np.zeros((n, 2))
        for i in range(n):
            gradient[i] = 4 * (f[i][:, None] * (y[i] - y)).sum(0)
        velocity = (.5 if step < 250 else .8) * velocity - 200 * gradient
        y = y + velocity
    return y


GAN_ROWS = {"A (16,16)": (gan, dict(preset="dcgan"), 300), "A (100,100)": (gan, dict(preset="dcgan", z=100, h=100), 20),
            "E 64x64": (gan, dict(preset="anime"), 8), "C CycleGAN": (cyclegan, dict(), 15)}


def bench_config(row):
    """(Config, steps) of a row of the table."""
    script, changes, steps = GAN_ROWS[row]
    return script.Config(**{**(gan.PRESETS[changes["preset"]] if script is gan else {}), **changes}), steps


def bench_one(row, side):
    """One side of one row in a process of its own -> prints images/s and peak memory in MB."""
    import resource
    cfg, steps = bench_config(row)
    images = torch.randint(0, 256, (4096, getattr(cfg, "channels", 3), cfg.size, cfg.size)).byte()
    torch.manual_seed(0)
    slow = textbook_cyclegan if isinstance(cfg, cyclegan.Config) else textbook_gan
    rate = (slow if side == "textbook" else our_gan)(cfg, images, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with contextlib.suppress(OSError):                                   # Linux counts the parent's in ru_maxrss
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps([rate, peak]))


def step_cost(cfg):
    """(operations, bytes touched) of one training step: 2 per multiply-add, tensors read and written once an operator."""
    from torch.utils.flop_counter import FlopCounterMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Bytes(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            flat = lambda v: [v] if isinstance(v, torch.Tensor) else sum(map(flat, v), []) if isinstance(v, (list, tuple)) else []
            if "view" not in str(f) and "detach" not in str(f):
                Bytes.total += sum(t.numel() * t.element_size() for t in flat(args) + flat(out))
            return out
    if isinstance(cfg, cyclegan.Config):
        G, D = cyclegan.networks(cfg)
        x = torch.randn(cfg.batch, 3, cfg.size, cfg.size)
        with FlopCounterMode(display=False) as flops, Bytes():
            for way, back, d in (("ab", "ba", "b"), ("ba", "ab", "a")):
                D.requires_grad_(True)
                y = G(x, way)
                cyclegan.d_lsgan(D[d](x), D[d](y.detach())).backward()
                D.requires_grad_(False)
                (cyclegan.g_lsgan(D[d](y)) + cyclegan.cycle_loss(x, G(y, back))).backward()
        return flops.get_total_flops(), Bytes.total
    G, D = gan.networks(cfg)
    with FlopCounterMode(display=False) as flops, Bytes():
        x_fake = G(gan.draw_z(cfg.batch, cfg, "cpu"))
        gan.d_bce(D(torch.randn_like(x_fake)), D(x_fake.detach())).backward()
        D.requires_grad_(False)
        gan.g_bce(D(x_fake)).backward()
    return flops.get_total_flops(), Bytes.total


def best_rate(f, amount, rounds=5):
    """Amount per second of the fastest of several calls of f."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return amount / min(times)


def bench(rounds=5):
    """The table of `make bench`. Both sides of a row run by turns, each in a fresh process; medians."""
    v, lines = data.versions(), []
    device = data.device()
    say = lambda text: lines.append(text) or print(text, flush=True)
    dtype = torch.bfloat16 if data.use_bf16(-1, device) else torch.float32
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    flop_rate = best_rate(lambda: (a @ a, sync()), 2 * 2048 ** 3, 50)
    b = torch.randn(1 << 26, device=device)
    copy_rate = best_rate(lambda c=torch.empty_like(b): (c.copy_(b), sync()), 8 * (1 << 26))
    say(f"{v['gpu'] or 'CPU ' + platform_name()}, {v['threads']} threads, torch {v['torch']}, {str(dtype)[6:]}; medians of {rounds} "
        f"alternating runs; measured there: matrix product {flop_rate / 1e9:,.0f} GFLOP/s, copy {copy_rate / 1e9:.1f} GB/s.\n")
    del a, b
    say("| row | textbook images/s | ours images/s | ratio | peak MB textbook / ours | floor ms (operations / bytes) | ours ms a step |")
    say("|---" * 7 + "|")
    for row in GAN_ROWS:
        sides = {"textbook": [], "ours": []}
        for _ in range(rounds):
            for side, seen in sides.items():
                out = subprocess.run([sys.executable, __file__, "bench-one", row, side], capture_output=True, text=True, check=True)
                seen.append(json.loads(out.stdout.splitlines()[-1]))
        (t, tm), (o, om) = (np.median(np.array(s), 0) for s in sides.values())
        ratio = np.median(np.array(sides["ours"])[:, 0] / np.array(sides["textbook"])[:, 0])      # of neighbours in time
        cfg, _ = bench_config(row)
        flops, moved = step_cost(cfg)
        say(f"| {row} | {t:,.0f} | {o:,.0f} | {ratio:.2f} | {tm:,.0f} / {om:,.0f} | {1e3 * flops / flop_rate:.1f} / "
            f"{1e3 * moved / copy_rate:.1f} | {1e3 * cfg.batch / o:.1f} |")
    data.DOWNLOADS = Path("out/bench")
    draw = lambda: data.draw_digits(1000, 1, 32)
    data.cached("bench", draw)
    slow, fast = best_rate(draw, 1000, 3), best_rate(lambda: data.cached("bench", draw), 1000, 3)
    say(f"| digits, drawn anew / from the cache | {slow:,.0f} | {fast:,.0f} | {fast / slow:,.0f} | | | |")
    x = torch.randn(1000, 128)
    slow, fast = best_rate(lambda: textbook_tsne(x, 30, 20), 20, 1), best_rate(lambda: biggan_interp.tsne(x, 30, 0, 20), 20, 3)
    say(f"| t-SNE, 1000 points, affinities and 20 steps; steps/s | {slow:,.1f} | {fast:,.1f} | {fast / slow:.0f} | | | |\n")
    data.write_text("out/bench/table.md", "\n".join(lines))


def wrong():
    """The README's ten mistakes, each made on purpose: what one sees. Uses out/dcgan and out/speedrun, trained when missing."""
    import warnings
    warnings.simplefilter("ignore")
    os.environ.update({"DATA_DIR": REAL} if REAL else {})
    device = data.device("cpu")
    name, images, _, _ = data.choose("mnist,digits", 32)
    G, cfg = {}, {}
    for preset in ("dcgan", "speedrun"):
        subprocess.run([sys.executable, "gan.py", preset, "--resume", "1", "--show", "interp"], check=True, stdout=subprocess.DEVNULL)
        state = data.load_checkpoint(f"out/{preset}/last.pt")
        cfg[preset] = gan.Config(**state["config"])
        for which in ("G", "G_ema"):
            G[preset, which] = gan.networks(cfg[preset])[0]
            G[preset, which].load_state_dict(state[which])
    torch.manual_seed(0)
    base = cfg["dcgan"]
    x, z = data.to_float(images[:64]), gan.draw_z(64, base, device)
    net, D = G["dcgan", "G"].eval(), gan.networks(base)[1]
    x_fake = net(z)
    say = lambda number, text: print(f"{number:>2}  {text}", flush=True)

    gan.d_bce(D(x), D(x_fake)).backward()
    with contextlib.suppress(RuntimeError):
        gan.g_bce(D(x_fake)).backward()
        raise SystemExit("no error without detach")
    say(1, "no detach: RuntimeError: Trying to backward through the graph a second time")
    x_fake, norms = x_fake.detach(), []
    for loss in (gan.d_bce(D(x), D(x_fake)), F.softplus(-D(x)).sum() + F.softplus(D(x_fake)).sum()):
        D.zero_grad()
        loss.backward()
        norms.append(gan.grad_norm(gan.gradients(D)).item())
    say(2, f"sum over a batch of 64: gradient norm {norms[1]:.1f} instead of {norms[0]:.3f}, {norms[1] / norms[0]:.1f} times")
    eps = torch.rand(64, 1, 1, 1)
    outside = lambda t: 100 * (t.abs() > 1).float().mean().item()
    say(3, f"eps and eps: {outside(eps * x + eps * x_fake):.0f}% of the pixels outside [-1, 1]; eps and 1 - eps: "
           f"{outside(eps * x + (1 - eps) * x_fake):.0f}%")
    slopes = []
    for power in ("norm", "(norm - 1)^2"):
        torch.manual_seed(0)
        critic = gan.networks(dataclasses.replace(base, bn="G"))[1]
        opt = gan.optimiser("adam", critic, 1e-3, base)
        for _ in range(150):
            t = torch.rand(64, 1, 1, 1)
            h = (t * x + (1 - t) * x_fake).requires_grad_()
            norm = torch.autograd.grad(critic(h).sum(), h, create_graph=True)[0].flatten(1).norm(dim=1)
            loss = gan.d_wgan(critic(x), critic(x_fake)) + 10 * (norm.mean() if power == "norm" else ((norm - 1) ** 2).mean())
            opt.zero_grad()
            loss.backward()
            opt.step()
        slopes.append((norm.mean().item(), -gan.d_wgan(critic(x), critic(x_fake)).item()))
    say(4, f"the norm penalised: the critic's slope is {slopes[0][0]:.3f} and its estimate of the distance {slopes[0][1]:.2f} after 150 "
           f"steps; (norm - 1)^2: {slopes[1][0]:.2f} and {slopes[1][1]:.2f}")
    sure = torch.full((8,), 50.)
    say(5, f"sigmoid twice: a perfect D has the loss {gan.d_bce(sure.sigmoid(), (-sure).sigmoid()).item():.3f} instead of "
           f"{gan.d_bce(sure, -sure).item():.3f}")
    right = 50 * F.one_hot(torch.arange(10), 10).float()
    say(6, f"softmax twice: a perfect classifier of 10 classes has the loss {gan.ac_loss(right.softmax(1), torch.arange(10), 10).item():.3f} "
           f"instead of {gan.ac_loss(right, torch.arange(10), 10).item():.3f}")
    with torch.no_grad():
        change = lambda n: (n(torch.cat([z[:1], z[1:16]]))[0] - n(torch.cat([z[:1], z[17:32]]))[0]).abs().mean().item() * 127.5
        say(7, f"train mode: the same z beside 15 other neighbours changes by {change(copy.deepcopy(net).train()):.1f} of 255 grey levels; "
               f"eval mode: {change(net):.1f}")
    classifier = fid.classifier(name, 32)
    real = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:10_000]]
    real_features = classifier.features(real)
    score = lambda g, c, n: fid.fid(real_features, classifier.features(gan.sample(g, n, c, device)))
    fast, last, ema = cfg["speedrun"], G["speedrun", "G"], G["speedrun", "G_ema"]
    copied = copy.deepcopy(ema)
    copied.load_state_dict({**ema.state_dict(), **{k: v for k, v in last.state_dict().items() if "running" in k}})
    own = gan.recompute_statistics(copy.deepcopy(ema), fast, device)
    say(8, f"an averaged G with statistics never updated: FID {score(ema.eval(), fast, 10_000):.3g}; copied from the last G: "
           f"{score(copied.eval(), fast, 10_000):.3g}; its own: {score(own, fast, 10_000):.3g}")
    with contextlib.suppress(data.UserError):
        file = next(m for m in data.members("emojis", data.EMOJI_URLS) if m[0].endswith(".png") and "/Apple/" in m[0])
        say(9, f"RGBA read as RGB: the corner of {Path(file[0]).name} is {Image.open(io.BytesIO(file[1])).convert('RGB').getpixel((0, 0))}; "
               f"composited: {tuple(data.read_picture(file)[:, 0, 0].tolist())}")
    other = classifier.features(data.load(name, 32, "test")[0])
    say(10, "FID of real digits against real digits, which should be 0: " +
            ", ".join(f"{fid.fid(real_features, other[:n]):.2g} at n = {n:,}" for n in (200, 500, 2000, len(other))))
    p = nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD([p, p], .1)
    p.grad = torch.ones(1)
    opt.step()
    say("", f"shared twice: a step of 0.1 moves the parameter by {1 - p.item():.1f}")
    say("", f"lambda: 10 on the mean L1 of a 3 x 32 x 32 picture is {10 / 3072:.5f} on its sum; 0.015 there is {.015 * 3072:.0f}")


def platform_name():
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    return "unknown"


def growth():
    """images/s of training against batch, width and picture size, side by side: out/bench/growth.png."""
    def rate(**changes):
        cfg = gan.Config(**{**gan.PRESETS["dcgan"], **changes})
        images = torch.randint(0, 256, (2048, cfg.channels, cfg.size, cfg.size)).byte()
        return our_gan(cfg, images, max(5, 2000 // cfg.batch // (1 + cfg.h // 32)))
    batches, widths = [16, 32, 64, 128, 256, 512, 1024], [8, 16, 32, 64, 100]
    sizes = {28: dict(net="mnist28", size=28, h=16), 32: dict(h=16), 64: dict(net="anime", size=64, h=16)}
    for name, xs, ys in (("batch", batches, [rate(batch=b) for b in batches]), ("h", widths, [rate(h=h) for h in widths]),
                         ("size", list(sizes), [rate(**c) for c in sizes.values()])):
        print(name, dict(zip(xs, map(round, ys))), flush=True)
        data.curves(f"out/bench/growth-{name}.png", {name: xs, "images/s": ys}, [(f"images/s against {name}", ["images/s"])], x=name)
    data.figure("out/bench/growth.png", [f"out/bench/growth-{name}.png" for name in ("batch", "h", "size")])


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench-one"]:
        bench_one(*sys.argv[2:])
    elif sys.argv[1:] == ["--kill"]:
        import tempfile
        os.chdir(tempfile.mkdtemp())
        print(f"30 kills; {kill_and_go_on(30)} runs ended in the undisturbed run's bits, no half-written file")
    elif sys.argv[1:] == ["wrong"]:
        wrong()
    elif sys.argv[1:] == ["bench"]:
        bench()
        fid.speed(data.device())
        fid.roots()
        growth()
    else:
        print("python test_all.py bench, wrong or --kill; the tests themselves run under pytest", file=sys.stderr)
        sys.exit(2)
