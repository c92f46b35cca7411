# GANs from scratch. `make` lists the targets, with their minutes on 2 idle cores without a GPU. The
# first run on a data set takes a minute longer, because it also trains the classifier for its FID.
#   make dcgan STEPS=500 SEED=1 MODERN=1 ARGS="--h 32"     flags for any run
#   make test PYTHON=python3                               your own Python in place of .venv
PYTHON ?= .venv/bin/python
VENV = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/done)
NUMBERS = $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED))
FLAGS = $(NUMBERS) $(ARGS)
GAN = $(PYTHON) gan.py $(1) $(if $(MODERN),--modern $(MODERN)) $(FLAGS)
SHELL = /bin/bash
.PHONY: $(shell sed -nE 's/^#? ?([a-z0-9-]+):.*/\1/p' Makefile)

help:
	@awk -F ':.*## ' '/^## / {print "\n" substr($$0, 4)} \
	  /^(# )?[a-z0-9-]+:.*## / {sub(/^# /, "", $$1); printf "  make %-18s %s\n", $$1, $$2}' Makefile

.venv/done:
	@python3 -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "error: python3 is older than 3.10 or missing: install a newer Python, or name one with PYTHON="; exit 2; }
	@test ! -e .venv -o -e .venv/begun || { echo "error: .venv was not made by this Makefile: use it" \
	  "with PYTHON=./.venv/bin/python, or move it away"; exit 2; }
	mkdir -p .venv && touch .venv/begun
	python3 -m venv .venv
	.venv/bin/python -m pip install -q torch==2.13.0 numpy pillow pytest
	touch $@

## Train one GAN; the same command again continues a run that was stopped
# dcgan: ## 2 min: DCGAN on MNIST: its FID, and how often it draws each digit
# speedrun: ## 2 min: the best digits that two minutes give
# mlp: ## 1 min: the same loss, networks without convolutions
# emoji: ## 5 min: least squares GAN on emojis; with MODERN=1 as one would train it today
# anime: ## 9 min: DCGAN on anime faces, 64 x 64 (drawn faces if the set is not there)
# wgan: ## 10 min: Wasserstein GAN with clipped weights on the same faces
# text2img: ## 9 min: faces by hair and eye colour; once trained, ARGS='--prompt "blue hair green eyes"'
# mnist28: ## 3 min: a GAN on digits of 28 x 28: is each drawn equally often?
# cwgan: ## 7 min: conditional WGAN with gradient penalty: clothes by class
# stacked: ## 9 min: three digits in one picture: how many of the 1,000 classes does G draw?
dcgan speedrun mlp emoji anime wgan text2img mnist28 cwgan stacked: $(VENV)
	$(call GAN,$@)

## The trained dcgan
# modes: ## 1 min: how often does the trained dcgan draw each digit?
# interp: ## 1 min: pictures between two noise vectors and beyond: out/dcgan/interpolation.png
modes interp: $(VENV)
	$(call GAN,dcgan)

fid: $(VENV)  ## 3 min, with Inception 25: the FID of the dcgan, which is trained first if it is not there
	$(PYTHON) gan.py dcgan $(if $(MODERN),--modern $(MODERN)) $(NUMBERS) --dump 10000
	$(PYTHON) fid.py out/dcgan$(if $(MODERN),-modern$(MODERN))$(if $(SEED),-seed$(SEED)) $(ARGS)

## Translate pictures; BigGAN
cyclegan: $(VENV)  ## 6 min: CycleGAN: Apple's emojis to Windows' and back, without pairs
	$(PYTHON) cyclegan.py $(FLAGS)
unit: $(VENV)  ## 12 min: UNIT: the same task with a shared latent space
	$(PYTHON) cyclegan.py --model unit $(FLAGS)
biggan: $(VENV)  ## 5 min: BigGAN: t-SNE of its class embeddings, pictures between two classes
	$(PYTHON) biggan_interp.py $(FLAGS)

## Compare: several runs, then one sheet
# A sweep trains one run for each word and then puts all on one sheet. The word a=1+b=2 stands for the
# flags --a=1 --b=2. A run that blows up is a row of the sheet; any other error ends the sweep.
# SEED=1 puts all of it into folders of its own, for example out/ring1/.
folder = out/$@$(SEED)
define runs
$(foreach p,$(2),$(PYTHON) $(1) $(FLAGS) --$(subst +, --,$(p)) --out $(folder)/$(p) || grep -q "blew up" $(folder)/$(p)/result.json
)
endef
define sweep
$(runs)
$(PYTHON) data.py compare $(folder)/* --out $(folder)-all
endef

ring sweep-beta1: export OMP_NUM_THREADS = 1
LOSSES = loss=gan loss=saturating loss=lsgan loss=wgan loss=wgan-gp loss=gan+r1=1 loss=r3gan
ring: $(VENV)  ## 2 min: every loss on eight Gaussians: out/ring.png, and four as an animation: out/ring-four.gif
	$(call runs,gan.py ring,$(LOSSES))
	$(PYTHON) data.py tile $(addprefix $(folder)/,$(LOSSES)) --out $(folder)
	$(PYTHON) data.py tile $(addprefix $(folder)/,loss=gan loss=wgan loss=wgan-gp loss=r3gan) --out $(folder)-four
sweep-beta1: $(VENV)  ## 4 min: eight Gaussians, larger networks: what does Adam's beta1 change?
	$(call sweep,gan.py ring --net ring3,$(foreach b,0 0.5 0.9,$(foreach l,gan lsgan r3gan,loss=$(l)+beta1=$(b))))
sweep-stacked: $(VENV)  ## 60 min: how many of 1,000 classes do five recipes draw?
	$(call sweep,gan.py stacked,r1=0+bn=both+beta1=0.5+beta2=0.999+lr=2e-4+decay=0+ema=0 \
	  r1=0+bn=both+beta1=0.5+beta2=0.999+lr=2e-3 loss=wgan-gp+lr=1e-3 r1=1 modern=1)
sweep-latent: $(VENV)  ## 25 min: dcgan with z and h of 16 and 100, at the course's learning rate
	$(call sweep,gan.py dcgan --lr 2e-4 --decay 0 --ema 0,z=16+h=16 z=16+h=100 z=100+h=16 z=100+h=100)
sweep-speedrun: $(VENV)  ## 20 min: from dcgan at the course's settings to speedrun, one change after another
	$(call sweep,gan.py dcgan,lr=2e-4+decay=0+ema=0 decay=0+ema=0 ema=0 ema=0.998 bn=G+r1=1 \
	  bn=G+r1=1+beta1=0+beta2=0.99 bn=G+r1=1+beta1=0+beta2=0.99+steps=8000)
sweep-stability: $(VENV)  ## 65 min: what stops mode collapse? counts 132 kinds of drawn faces
	$(call sweep,gan.py emoji --data faces-a --steps 6000,modern=0 gp=10 sn=D sn=both lr=1.5e-4 d-steps=5 modern=1+augment=1 modern=1+augment=0)
sweep-penalty: $(VENV)  ## 40 min: emojis with no gradient penalty, and with three kinds of one
	$(call sweep,gan.py emoji --d-h 32 --batch 16 --steps 6000,gp=0 gp=10+penalty=mean-norm gp=10+penalty=r1 gp=10)
sweep-modern: $(VENV)  ## 25 min: which part of MODERN=1 matters? leaves out one at a time
	$(call sweep,gan.py emoji --data faces-a --modern 1 --steps 3000,modern=1 loss=gan r1=0 r2=0 bn=both ema=0 augment=1)
tips: $(VENV)  ## 40 min: each training tip against its opposite, on anime faces
	$(call sweep,gan.py anime --steps 1000,bn=both raw=1 raw=1+bn=none act=relu act=selu bn=G bn=D \
	  g-opt=sgd+d-opt=sgd+lr=2e-3 g-opt=rmsprop+d-opt=rmsprop+lr=5e-4 d-opt=sgd+d-lr=2e-3)
sweep-lambda: $(VENV)  ## 30 min: CycleGAN with nine weights of the cycle loss
	$(call sweep,cyclegan.py --steps 3000,$(addprefix lambda-cycle=,0 0.005 0.010 0.015 0.025 0.05 0.1 0.5 1))
seeds: $(VENV)  ## 12 min: CycleGAN from two seeds: shapes stay, colours change
	$(call sweep,cyclegan.py,seed=11 seed=1234)

## Tests and results
bench: $(VENV)  ## 10 min: speed of the textbook loop and of ours, in turns
	$(PYTHON) test_all.py bench
results: $(VENV)  ## the finished runs of out/ (not those of sweeps) in one table and on one sheet: out/results.md, .png, -curves.png
	$(PYTHON) data.py compare $(patsubst %/result.json,%,$(wildcard out/*/result.json)) --out out/results

# What `make figures` does: it puts several runs on one sheet where a picture shows several, cuts what
# it needs out of a sheet of curves, and saves the pictures under the names that figures/README.md uses.
define FIGURES
import data
import numpy as np
from PIL import Image

def figure(name, source, top=None, bottom=None):
    """Save out/<source>.png, or only its rows of pixels top to bottom, as figures/<name>. Negative
    numbers count from the lower end."""
    picture = np.asarray(Image.open(f"out/{source}.png"))
    Image.fromarray(picture[top:bottom]).save(f"figures/{name}", quality=85)

def rows(name, runs, count=1):
    """Save the first rows of several 8 x 8 grids of samples, labelled, as out/<name>.png."""
    grids = [data.read_picture(f"out/{run}.png") for run in runs.values()]
    data.sheet([grid[None, :, :grid.shape[1] * count // 8] for grid in grids], f"out/{name}.png", [*runs])

data.compare(["out/sick/collapse", "out/sick/oscillation", "out/sick/vanishing"], "out/sick-all")
data.compare(["out/anime-12000", "out/wgan", "out/anime-modern1"], "out/fading")
data.compare(["out/cyclegan-datafaces", "out/cyclegan-datafaces-identity0.5"], "out/colours")
data.compare(["out/unit", "out/unit-datadistant"], "out/units")
rows("evolution", {"1,000 steps": "long/001000", "10,000 steps": "long/010000",
     "20,000 steps": "long/020000", "20,000, MODERN=1": "emoji-modern1/020000"}, 3)
rows("penalties", {"no penalty": "sweep-penalty/gp=0/006000",
     "the report's": "sweep-penalty/gp=10+penalty=mean-norm/006000",
     "R1": "sweep-penalty/gp=10+penalty=r1/006000", "Gulrajani's": "sweep-penalty/gp=10/006000"}, 2)
rows("penalties-long", {"none, 6,000 steps": "sweep-penalty/gp=0/006000",
     "none, 20,000": "sweep-penalty/gp=0/020000",
     "the report's, 6,000": "sweep-penalty/gp=10+penalty=mean-norm/006000",
     "the report's, 20,000": "sweep-penalty/gp=10+penalty=mean-norm/020000"}, 2)
rows("anime", {"make anime": "anime/002000", "MODERN=1": "anime-modern1/002000"})
sgd = "g-opt=sgd+d-opt=sgd+lr=2e-3"
rmsprop = "g-opt=rmsprop+d-opt=rmsprop+lr=5e-4"
rows("tips", {label: f"tips/{run}/001000" for label, run in {
     "the course's settings": "bn=both", "ReLU everywhere": "act=relu", "SELU everywhere": "act=selu",
     "no batch norm in D": "bn=G", "no batch norm in G": "bn=D", "raw pixels, no tanh": "raw=1",
     "raw, no batch norm": "raw=1+bn=none", "SGD, 2e-3": sgd,
     "SGD, 2e-3, for D alone": "d-opt=sgd+d-lr=2e-3", "RMSprop, 5e-4": rmsprop}.items()})

plain = Image.open("out/text2img/conditions.png")       # its first four rows, above all of today's
today = Image.open("out/text2img-modern1/conditions.png")
page = Image.new("RGB", (today.width, 298 + today.height))
page.paste(plain)
page.paste(today, (0, 298))
page.save("out/text2img.png")

figure("ring.png", "ring")
figure("curves.png", "dcgan-lr0.0002-decay0-ema0.0/curves")
figure("interpolation.png", "dcgan/interpolation")
figure("sick.png", "sick-all-curves", -710)
figure("fading.png", "fading-curves", -1170, -710)
figure("evolution.jpg", "evolution")
figure("cyclegan.jpg", "seeds-all")
figure("colours.jpg", "colours")
figure("unit.jpg", "units")
figure("penalties.jpg", "penalties")
figure("penalties-long.jpg", "penalties-long")
figure("anime.jpg", "anime")
figure("tips.jpg", "tips")
figure("digits28.png", "mnist28/drawn")
figure("text2img.jpg", "text2img")
figure("tsne.png", "biggan/tsne")
figure("walks.jpg", "biggan/interpolation")
endef
export FIGURES
figures: $(VENV)  ## the pictures in figures/, once the runs that they show are there
	$(PYTHON) -c "$$FIGURES"
	cp out/ring-four.gif figures/ring.gif

OTHERS = fid or cyclegan or biggan or two_ranks or killed
test: $(VENV)  ## 3 min: all tests, in two halves side by side
	export OMP_NUM_THREADS=1; $(PYTHON) -m pytest -q test_all.py -k "not ($(OTHERS))" & half=$$!; \
	$(PYTHON) -m pytest -q test_all.py -k "$(OTHERS)" || bad=1; wait $$half && test -z "$$bad"
clean:  ## removes .venv and caches; downloads/ and out/ stay
	if test -e .venv/begun; then rm -rf .venv; fi
	rm -rf __pycache__ .pytest_cache
clean-runs:  ## removes all runs: out/
	rm -rf out
