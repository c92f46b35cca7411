"""Tests: every equation against a closed form or a reference, every promise tried. `make test`; no network is needed.

Real data and reference numbers are used where ../shared (or DATA_DIR) has them and skipped elsewhere. Each test was
seen to fail with the code it guards broken. `KILLS=30 python -m pytest test_all.py -k kill` is the long kill test.
"""
import contextlib, dataclasses, functools, http.server, importlib.util, io, json, math, os, pickle, random, re, shutil, signal, struct
import subprocess, sys, tarfile, threading, time
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


def train_tiny(cfg, out, **kw):
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
    parts = train_tiny(tiny(resume=1, **changes), "cut")
    for a, b in zip(whole[:3], parts[:3]):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    strip = lambda f: [r.rsplit(",", 1)[0] for r in Path(f, "log.csv").read_text().splitlines()]
    assert strip("whole") == strip("cut")
    assert Path("whole/000010.png").read_bytes() == Path("cut/000010.png").read_bytes()


def test_two_ranks_equal_one_with_the_joint_batch(home):
    """torchrun on two processes: the MLP GAN (no batch norm, whose statistics are a rank's own) ends in the same weights."""
    words = ["mlp", "--data", "digits", "--h", "4", "--bn", "none", "--batch", "16", "--steps", "4", "--amp", "0", "--show", "dump"]
    subprocess.run([sys.executable, str(ROOT / "gan.py"), *words, "--out", "o/1"], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", "29517", str(ROOT / "gan.py"),
                    *words, "--out", "o/2"], check=True, capture_output=True)
    a, b = (torch.load(f"o/{i}/last.pt", weights_only=True) for i in (1, 2))
    for k in ("G", "D"):
        assert all(torch.allclose(a[k][n], b[k][n], atol=1e-5) for n in a[k])


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
    S = gan.sampler(G, H, cfg, torch.device("cpu"))                  # its statistics are those of its own activations
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
    (["cwgan", "--data", "plain", "--channels", 3], "labels"), (["dcgan", "--device", "tpu9"], "cpu")])
def test_wrong_words_are_one_line_and_exit_2(words, says):
    Path("plain").mkdir()
    for i in range(30):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(f"plain/{i}.png")
    before = sorted(Path(".").rglob("*"))
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as e:
        data.run_main(lambda: gan.main(list(map(str, words))))
    one_line(err.getvalue(), says)
    assert e.value.code == 2 and sorted(Path(".").rglob("*")) == before


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(monkeypatch):
    loss = gan.LOSSES["bce"]
    train_tiny(tiny(steps=5), "n")
    good = Path("n/last.pt").read_bytes()
    monkeypatch.setitem(gan.LOSSES, "bce", (lambda r, f: loss[0](r, f) * float("nan"), loss[1]))
    with pytest.raises(data.UserError, match="not finite, seen at step 10.*--lr"):
        train_tiny(tiny(resume=1), "n")
    assert Path("n/last.pt").read_bytes() == good


def test_odd_data_work(monkeypatch):
    """Zero-variance images, fewer images than the batch, one class only."""
    x = torch.full((3, 1, 32, 32), 7, dtype=torch.uint8)
    Path("z").mkdir()
    G = gan.train(tiny(steps=2), x, torch.zeros(3, dtype=torch.long), Path("z"), torch.device("cpu"))[0]
    assert all(p.isfinite().all() for p in G.parameters())


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
    Image.new("1", (9000, 9000)).save("bomb.png")
    with pytest.raises(data.UserError, match="pixels"):
        data.read_picture("bomb.png")


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
    with pytest.raises(data.Unavailable, match="wrong file: sha256 [0-9a-f]{64}, not"):
        data.fetch("x/f", [f"{server}/wrong/f"], sha)
    for i, good in enumerate(("ok", "nolength", "redirect")):
        assert data.fetch(f"x/{i}", [f"{server}/500/f", f"{server}/cut/f", f"{server}/{good}/f"], sha).read_bytes() == Server.body
    monkeypatch.setattr(data, "_open", functools.partial(data._open, seconds=.5))
    start = time.monotonic()
    with pytest.raises(data.Unavailable, match="no answer|timed out"):
        data.fetch("x/g", [f"{server}/hang/f", f"{server}/hang/f"], sha)
    assert time.monotonic() - start < 10                              # bounded waiting, not a speed


def test_a_certificate_nobody_signed_is_not_accepted():
    import inspect
    assert "context" not in inspect.getsource(data._open)             # urlopen's default context verifies
    import ssl
    assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED


def test_without_network_the_run_says_so_and_draws_digits(monkeypatch, capsys):
    for name in ("MNIST_URLS", "FASHION_URLS"):
        monkeypatch.setattr(data, name, ["http://127.0.0.1:9/"])
    assert data.choose("mnist,digits", 32)[0] == "digits"
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(data.Unavailable, match="127.0.0.1"):
        data.choose("mnist", 32)


def test_atomic_files_and_checkpoints():
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
    import warnings
    warnings.simplefilter("ignore")
    for i in range(1000):
        kind = list(seeds)[i % len(seeds)]
        raw, read = seeds[kind]
        path = Path(f"m.{kind}")
        path.write_bytes(mutated(raw, r))
        try:
            read(path)
        except data.UserError as e:
            refused += 1
            assert "\n" not in str(e), (i, str(e))
    assert refused > 200


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


def test_kill_at_any_moment_and_go_on():
    """SIGKILL at random moments of drawing the set, training, checkpointing and training the classifier; then the same
    command again ends in the networks and caches of an undisturbed run, bit for bit. KILLS=30 is the long form."""
    def start(out):
        return subprocess.Popen([sys.executable, "-c", SMALL_WORLD, "dcgan", *map(str, TINY), "--steps", "40", "--resume", "1", "--out", out],
                                stdout=subprocess.DEVNULL, env=dict(os.environ, DOWNLOADS=out + "-downloads"))
    assert start("whole").wait() == 0
    r, begun = random.Random(1), time.monotonic()
    for kill in range(int(os.environ.get("KILLS", 3))):
        p = start("cut")
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(timeout=r.uniform(2, 8))
        p.kill(), p.wait()
        for f in [f for o in ("cut", "cut-downloads") for f in Path(o).rglob("*") if f.is_file() and not f.name.endswith(".part")]:
            if f.suffix == ".pt":
                data.load_checkpoint(f)                              # no file under its final name is ever half-written
            elif f.suffix in (".png", ".gif"):
                Image.open(f).load()
            elif f.suffix == ".npz":
                assert len(np.load(f)["images"])
            elif f.suffix == ".json":
                json.loads(f.read_text())
    assert start("cut").wait() == 0
    for name in ("{}/last.pt", "{}-downloads/classifier-digits-32.pt"):
        a, b = (torch.load(name.format(o), weights_only=True) for o in ("whole", "cut"))
        for k in ("G", "D", "state"):
            assert all(torch.equal(v, b[k][n]) for n, v in a.get(k, {}).items())
    assert np.array_equal(np.load("whole-downloads/cache/digits-32-train.npz")["images"], np.load("cut-downloads/cache/digits-32-train.npz")["images"])


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
        assert "torch.load(" not in f.read_text().replace("weights_only=True", "") or "weights_only=True" in f.read_text()


def test_makefile_and_readme_agree():
    targets = set(re.findall(r"^([a-z0-9][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"make ([a-z0-9][\w-]*)", readme)) == targets | set() - {"help"} or targets - {"help"} <= set(
        re.findall(r"make ([a-z0-9][\w-]*)", readme))
    assert set(re.findall(r"`make ([a-z0-9][\w-]*)", readme)) <= targets
    for path in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / path).exists(), path
    assert "dcgan" in subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True).stdout


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


def our_gan(cfg, images, steps):
    """gan.train as it is, between its first and its last log line. -> images/s"""
    import tempfile
    cfg = dataclasses.replace(cfg, steps=steps + 5, log_every=5, sample_every=10 ** 9)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        device = data.device()
        seconds = gan.train(cfg, images.to(device), None, Path(out), device)[4].table
    return steps * cfg.batch / (seconds["seconds"][-1] - seconds["seconds"][1])


GAN_ROWS = {"A (16,16)": (dict(preset="dcgan"), 120), "A (100,100)": (dict(preset="dcgan", z=100, h=100), 20),
            "E 64x64": (dict(preset="anime"), 5)}


def bench_one(row, side):
    """One side of one row in a process of its own -> prints images/s and peak memory in MB."""
    import resource
    changes, steps = GAN_ROWS[row]
    cfg = gan.Config(**{**gan.PRESETS[changes["preset"]], **changes})
    images = torch.randint(0, 256, (4096, cfg.channels, cfg.size, cfg.size)).byte()
    torch.manual_seed(0)
    rate = (textbook_gan if side == "textbook" else our_gan)(cfg, images, steps)
    print(json.dumps([rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


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


def bench(rounds=3):
    """The table of `make bench`. Both sides of a row run by turns, each in a fresh process; medians."""
    v = data.versions()
    device = data.device()
    print(f"{v['gpu'] or 'CPU ' + platform_name()}, {v['threads']} threads, torch {v['torch']}, bfloat16 "
          f"{'on' if data.use_bf16(-1, device) else 'off'}; medians of {rounds} alternating runs\n")
    dtype = torch.bfloat16 if data.use_bf16(-1, device) else torch.float32
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    flop_rate = best_rate(lambda: (a @ a, sync()), 2 * 2048 ** 3)
    b = torch.randn(1 << 26, device=device)
    copy_rate = best_rate(lambda: (b.clone(), sync()), 8 * (1 << 26))
    print(f"measured: matrix product {flop_rate / 1e9:,.0f} GFLOP/s ({dtype}), copy {copy_rate / 1e9:.1f} GB/s\n")
    print("| row | textbook images/s | ours images/s | ratio | peak MB textbook / ours | floor ms (operations / bytes) | ours ms a step |")
    print("|---" * 7 + "|")
    for row, (changes, _) in GAN_ROWS.items():
        sides = {"textbook": [], "ours": []}
        for _ in range(rounds):
            for side, seen in sides.items():
                out = subprocess.run([sys.executable, __file__, "bench-one", row, side], capture_output=True, text=True, check=True)
                seen.append(json.loads(out.stdout.splitlines()[-1]))
        (t, tm), (o, om) = (np.median(np.array(s), 0) for s in sides.values())
        cfg = gan.Config(**{**gan.PRESETS[changes["preset"]], **changes})
        flops, moved = step_cost(cfg)
        print(f"| {row} | {t:,.0f} | {o:,.0f} | {o / t:.2f} | {tm:,.0f} / {om:,.0f} | {1e3 * flops / flop_rate:.1f} / "
              f"{1e3 * moved / copy_rate:.1f} | {1e3 * cfg.batch / o:.1f} |", flush=True)
    data.DOWNLOADS = Path("out/bench")
    draw = lambda: data.draw_digits(1000, 1, 32)
    data.cached("bench", draw)
    slow, fast = best_rate(draw, 1000, 3), best_rate(lambda: data.cached("bench", draw), 1000, 3)
    print(f"| digits, drawn / from the cache | {slow:,.0f} | {fast:,.0f} | {fast / slow:.0f} | | | |\n")
    fid.speed(device)
    print()
    fid.roots()


def platform_name():
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    return "unknown"


def growth():
    """images/s against batch, width and picture size: out/bench/growth.png."""
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench-one"]:
        bench_one(*sys.argv[2:])
    elif sys.argv[1:] == ["bench"]:
        bench()
        growth()
    else:
        print("python test_all.py bench; the tests themselves run under pytest", file=sys.stderr)
        sys.exit(2)
