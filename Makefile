# GANs from scratch; `make` lists the targets with their minutes on 2 cores without a GPU.
#   make dcgan STEPS=500 SEED=1 MODERN=1 ARGS="--h 32"     flags for any run
#   make test PYTHON=python3                               your own Python in place of .venv
PYTHON ?= .venv/bin/python
FLAGS = $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED)) $(ARGS)
GAN = $(PYTHON) gan.py $(1) $(if $(MODERN),--modern $(MODERN)) $(FLAGS)
VENV = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/done)
SHELL = /bin/bash
PRESETS = dcgan speedrun mlp emoji anime wgan text2img mnist28 cwgan
SWEEPS = sweep-latent sweep-stability sweep-modern sweep-lambda tips wgan-vs-dcgan seeds
.PHONY: help $(PRESETS) $(SWEEPS) modes interp fid cyclegan unit biggan bench results test clean clean-runs

help:
	@sed -nE 's/^#* ?([a-z0-9-]+):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-24s %s\n", $$1, $$2}'

.venv/done:
	python3 -m venv .venv
	.venv/bin/python -m pip install -q torch==2.13.0 numpy pillow pytest
	touch $@

# dcgan: ## 3 min: digits from noise, with FID and class counts
# speedrun: ## 2 min: the best digits of two minutes
# mlp: ## 2 min: the same game without convolutions
# emoji: ## 10 min: least squares on emojis (drawn faces without network); MODERN=1: as one would do it today
# anime: ## 25 min: DCGAN on faces, 64 x 64
# wgan: ## 40 min: Wasserstein GAN with clipping on the same faces
# text2img: ## 25 min: faces by hair and eye colour; then ARGS='--prompt "blue hair green eyes"'
# mnist28: ## 5 min: 28 x 28 digits: are all drawn equally often?
# cwgan: ## 15 min: conditional WGAN with gradient penalty: clothes by class
$(PRESETS): $(VENV)
	$(call GAN,$@)

modes: $(VENV)  ## 1 min: which digits does the trained dcgan draw, and how often?
	$(call GAN,dcgan)

interp: $(VENV)  ## 1 min: walks between noise vectors and beyond: out/dcgan/interpolation.png
	$(call GAN,dcgan)

fid: $(VENV)  ## 5 min: FID of the dcgan (trained first where there is none)
	$(PYTHON) gan.py dcgan --dump 10000
	$(PYTHON) fid.py out/dcgan $(ARGS)

cyclegan: $(VENV)  ## 10 min: Apple to Windows emojis and back without pairs (drawn faces without network)
	$(PYTHON) cyclegan.py $(FLAGS)

unit: $(VENV)  ## 20 min: UNIT, the same with one latent space
	$(PYTHON) cyclegan.py --model unit $(FLAGS)

biggan: $(VENV)  ## 15 min: BigGAN: map of its classes, walks between them (a small one is trained where the weights can't be had)
	$(PYTHON) biggan_interp.py $(FLAGS)

# A sweep: runs into out/<target>/, one after another, and all on one sheet. A run that blows up is a row of it.
one = $(PYTHON) $(2) --out out/$@/$(1) $(FLAGS) || test $$? = 2
sheet = $(PYTHON) data.py compare out/$@/* --out out/$@-all

sweep-latent: $(VENV)  ## 25 min: z and h in {16, 100}: four DCGANs at the course's learning rate
	for z in 16 100; do for h in 16 100; do \
	  $(call one,z$$z-h$$h,gan.py dcgan --lr 2e-4 --decay 0 --ema 0 --z $$z --h $$h); done; done
	$(sheet)

STABLE = gan.py emoji --data faces-a --steps 6000
sweep-stability: $(VENV)  ## 90 min: what stops mode collapse? modes of 132 on drawn faces
	$(call one,1-plain,$(STABLE))
	$(call one,2-gradient-penalty,$(STABLE) --gp 10)
	$(call one,3-spectral-norm-D,$(STABLE) --sn D)
	$(call one,4-spectral-norm-both,$(STABLE) --sn both)
	$(call one,5-half-lr,$(STABLE) --lr 1.5e-4)
	$(call one,6-d-steps-5,$(STABLE) --d-steps 5)
	$(call one,7-modern,$(STABLE) --modern 1)
	$(sheet)

PARTS = gan.py emoji --data faces-a --modern 1 --steps 3000
sweep-modern: $(VENV)  ## 50 min: what of the modern bundle matters? one part taken out at a time
	$(call one,1-all,$(PARTS))
	$(call one,2-bce-for-pairs,$(PARTS) --loss bce)
	$(call one,3-no-r1,$(PARTS) --r1 0)
	$(call one,4-no-r2,$(PARTS) --r2 0)
	$(call one,5-batch-norm-in-D,$(PARTS) --bn both)
	$(call one,6-no-average,$(PARTS) --ema 0)
	$(call one,7-no-augmentation,$(PARTS) --augment 0)
	$(sheet)

TIP = gan.py anime --steps 1000
tips: $(VENV)  ## 130 min: each training tip against its opposite, 64 x 64
	$(call one,01-base,$(TIP))
	$(call one,02-raw,$(TIP) --raw 1)
	$(call one,03-raw-no-bn,$(TIP) --raw 1 --bn none)
	$(call one,04-relu,$(TIP) --act relu)
	$(call one,05-selu,$(TIP) --act selu)
	$(call one,06-leaky,$(TIP) --act leaky)
	$(call one,07-sgd,$(TIP) --g-opt sgd --d-opt sgd --lr 2e-3)
	$(call one,08-rmsprop,$(TIP) --g-opt rmsprop --d-opt rmsprop --lr 5e-4)
	$(call one,09-adam-and-sgd,$(TIP) --d-opt sgd --d-lr 2e-3)
	$(call one,10-no-bn-in-D,$(TIP) --bn G)
	$(call one,11-no-bn-in-G,$(TIP) --bn D)
	$(sheet)

wgan-vs-dcgan: $(VENV)  ## 60 min: the same faces, two losses
	$(call one,dcgan,gan.py anime)
	$(call one,wgan,gan.py wgan)
	$(sheet)

sweep-lambda: $(VENV)  ## 60 min: nine weights of the cycle loss on the drawn faces
	for w in 0 0.005 0.010 0.015 0.025 0.05 0.1 0.5 1; do \
	  $(call one,$$w,cyclegan.py --data faces --lambda-cycle $$w --steps 3000); done
	$(sheet)

seeds: $(VENV)  ## 15 min: CycleGAN from two seeds: shapes stay, colours change
	for s in 11 1234; do $(call one,$$s,cyclegan.py --data faces --seed $$s); done
	$(sheet)

bench: $(VENV)  ## 8 min: the textbook loop against ours, in turns, in one run
	$(PYTHON) test_all.py bench

results: $(VENV)  ## table of all finished runs
	$(PYTHON) data.py compare $(patsubst %/result.json,%,$(wildcard out/*/result.json)) --out out/results

OTHERS = fid or cyclegan or biggan or two_ranks or killed
test: $(VENV)  ## 3 min: everything that is promised, tested, in two halves side by side
	export OMP_NUM_THREADS=1; $(PYTHON) -m pytest -q test_all.py -k "not ($(OTHERS))" & half=$$!; \
	$(PYTHON) -m pytest -q test_all.py -k "$(OTHERS)" || bad=1; wait $$half && test -z "$$bad"

clean:  ## remove .venv and caches; downloads/ and out/ stay
	rm -rf .venv __pycache__ .pytest_cache

clean-runs:  ## remove out/
	rm -rf out
