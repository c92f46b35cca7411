# GANs from scratch. `make` lists the targets. Flags pass through: make dcgan ARGS="--steps 200 --seed 3"
# PYTHON=python3 uses your own Python (with torch, numpy, pillow, pytest) instead of .venv.
# Minutes are estimates for 2 cores without a GPU. FULL=1 gives a sweep the course's own length; without it a sweep takes about 10 minutes on 2 cores.
PYTHON ?= .venv/bin/python
PRESET ?= dcgan
ARGS ?=
FEATURES ?= inception
VENV = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/stamp)
SHELL = /bin/bash
.SHELLFLAGS = -e -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help dcgan speedrun mlp modes interp sweep-latent emoji anime wgan text2img mnist28 cwgan sweep-stability tips \
        wgan-vs-dcgan modes28 fid cyclegan unit sweep-lambda seeds biggan bench wrong figures results test clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## ?/\1|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

.venv/stamp:
	python3 -m venv .venv
	.venv/bin/python -m pip install -q torch==2.13.0 numpy pillow pytest
	touch $@

# ---- gan.py ----
dcgan: $(VENV)  ## 2 min: digits from noise, with FID and class counts (PRESET=course: the course's setting)
	$(PYTHON) gan.py $(PRESET) --resume 1 $(ARGS)

speedrun: $(VENV)  ## 3 min: the best recipe found for digits (6 min: ARGS="--steps 17500")
	$(PYTHON) gan.py speedrun --resume 1 $(ARGS)

mlp: $(VENV)  ## 3 min: the same game without convolutions
	$(PYTHON) gan.py mlp --resume 1 $(ARGS)

modes: $(VENV)  ## 2 min: mode collapse: which digits does the DCGAN draw, and how often?
	$(PYTHON) gan.py $(PRESET) --resume 1 --show metrics $(ARGS)

interp: $(VENV)  ## 2 min: walks between noise vectors, and beyond
	$(PYTHON) gan.py $(PRESET) --resume 1 --show interp $(ARGS)

sweep-latent: $(VENV)  ## 10 min: z and h in {16, 100}: four DCGANs on one sheet (FULL=1: 30 min)
	for z in 16 100; do for h in 16 100; do \
	  $(PYTHON) gan.py dcgan --resume 1 --z $$z --h $$h --steps $(if $(FULL),5000,600) --out out/latent$(FULL)/z$$z-h$$h $(ARGS); done; done
	$(PYTHON) data.py compare out/latent$(FULL)/z* --out out/sweep-latent$(FULL)

emoji: $(VENV)  ## 15 min: least-squares GAN on emojis (cartoon faces without network)
	$(PYTHON) gan.py emoji --resume 1 $(ARGS)

anime: $(VENV)  ## 15 min: DCGAN on faces, 64 x 64
	$(PYTHON) gan.py anime --resume 1 $(ARGS)

wgan: $(VENV)  ## 20 min: Wasserstein GAN with clipping on the same faces
	$(PYTHON) gan.py wgan --resume 1 $(ARGS)

text2img: $(VENV)  ## 20 min: faces by hair and eye colour (ARGS='--prompt "blue hair green eyes"')
	$(PYTHON) gan.py text2img --resume 1 $(ARGS)

mnist28: $(VENV)  ## 6 min: 28 x 28 digits
	$(PYTHON) gan.py mnist28 --resume 1 $(ARGS)

cwgan: $(VENV)  ## 15 min: conditional WGAN with gradient penalty: clothes by class
	$(PYTHON) gan.py cwgan --resume 1 $(ARGS)

# The sweeps run at 32 x 32 on drawn faces, whose 132 modes (12 hair x 11 eye colours) can be counted.
SMALL = $(if $(FULL),,--net dcgan --size 32 --h 32 --data faces-a)
sweep-stability: $(VENV)  ## 10 min: what stops mode collapse? plain, gradient penalty, spectral norm, half lr, 5 D steps
	run() { $(PYTHON) gan.py emoji --data faces-a --resume 1 $(if $(FULL),--steps 20000,--h 16 --steps 2000) --out out/stability$(FULL)/$$1 "$${@:2}" $(ARGS); }; \
	run 1-plain; run 2-gradient-penalty --gp 10; run 3-spectral-norm --sn 1; run 4-half-lr --lr 1.5e-4; run 5-d-steps-5 --d-steps 5
	$(PYTHON) data.py compare out/stability$(FULL)/* --out out/sweep-stability$(FULL)

tips: $(VENV)  ## 10 min: each training tip against its opposite: range, activation, optimiser, batch norm
	run() { $(PYTHON) gan.py anime $(SMALL) --resume 1 --steps $(if $(FULL),5000,300) --out out/tips$(FULL)/$$1 "$${@:2}" $(ARGS); }; \
	run 1-base; run 2-raw-0-255 --raw 1; run 3-relu --act relu; run 4-selu --act selu; \
	run 5-sgd --g-opt sgd --d-opt sgd --lr 2e-3; run 6-rmsprop --g-opt rmsprop --d-opt rmsprop --lr 5e-4; \
	run 7-adam-and-sgd --d-opt sgd --d-lr 2e-3; run 8-no-bn-in-D --bn G; run 9-no-bn-in-G --bn D
	$(PYTHON) data.py compare out/tips$(FULL)/* --out out/sweep-tips$(FULL)

wgan-vs-dcgan: $(VENV)  ## 10 min: the same faces, steps and seconds, two losses
	$(PYTHON) gan.py anime $(SMALL) --resume 1 --steps $(if $(FULL),5000,1500) --out out/loss$(FULL)/dcgan $(ARGS)
	$(PYTHON) gan.py wgan $(SMALL) --resume 1 --steps $(if $(FULL),5000,500) --out out/loss$(FULL)/wgan $(ARGS)
	$(PYTHON) data.py compare out/loss$(FULL)/* --out out/wgan-vs-dcgan$(FULL)

modes28: $(VENV)  ## 8 min: are the digits equally likely? 10,000 samples, and the course's 80
	$(PYTHON) gan.py mnist28 --resume 1 --steps $(if $(FULL),20000,4000) --out out/modes28$(FULL)/mnist28 $(ARGS)
	$(PYTHON) data.py compare out/modes28$(FULL)/* --out out/modes28$(FULL)-table

# ---- fid.py, cyclegan.py, biggan_interp.py ----
fid: $(VENV)  ## 5 min: FID of the latest DCGAN run (FEATURES=classifier: without the 95 MB Inception weights)
	ls out/dcgan*/last.pt > /dev/null 2>&1 || $(PYTHON) gan.py dcgan --resume 1
	$(PYTHON) fid.py $$(ls -td out/dcgan*/last.pt | head -1) --features $(FEATURES) $(ARGS)

cyclegan: $(VENV)  ## 10 min: Apple to Windows emojis and back without pairs (cartoon faces without network)
	$(PYTHON) cyclegan.py --resume 1 $(ARGS)

unit: $(VENV)  ## 15 min: UNIT, the same with one shared latent space
	$(PYTHON) cyclegan.py --model unit --steps 1600 --resume 1 $(ARGS)

sweep-lambda: $(VENV)  ## 15 min: nine weights of the cycle loss: too low ignores the input, too high copies it
	$(PYTHON) cyclegan.py --data faces --sweep 0,0.005,0.01,0.015,0.025,0.05,0.1,0.5,1 --steps $(if $(FULL),5000,400) --sample-every 400 \
	  --out out/sweep-lambda$(FULL) --resume 1 $(ARGS)

seeds: $(VENV)  ## 12 min: two seeds: shapes stay, colours change
	for s in 11 1234; do $(PYTHON) cyclegan.py --data faces --seed $$s --steps $(if $(FULL),5000,1000) --out out/seeds$(FULL)/seed-$$s \
	  --resume 1 $(ARGS); done
	$(PYTHON) data.py compare out/seeds$(FULL)/* --out out/sweep-seeds$(FULL)

biggan: $(VENV)  ## 10 min: BigGAN-deep: t-SNE of its classes and walks between them (a small one, trained here, without the weights)
	$(PYTHON) biggan_interp.py --resume 1 $(ARGS)

bench: $(VENV)  ## 12 min: the textbook loop against ours, both sides measured in the same run
	$(PYTHON) test_all.py bench

wrong: $(VENV)  ## 2 min: ten mistakes made on purpose, and what one sees
	$(PYTHON) test_all.py wrong

LAST = $$(ls $(1)/[0-9]*.png | tail -1)
FIG = $(PYTHON) data.py figure figures/$(1).png
figures: $(VENV)  ## 1 min: the README's pictures from finished runs
	$(call FIG,samples) $(call LAST,out/speedrun) $(call LAST,out/text2img) $(call LAST,out/cwgan) $(call LAST,out/emoji) --height 400 --colours 96
	$(PYTHON) data.py figure figures/training.gif out/speedrun/000001.png out/speedrun/00{05,10,15,20,30,40,50,60,70}00.png --height 206
	$(call FIG,curves) out/dcgan/curves.png out/speedrun/curves.png --height 460 --colours 32
	$(call FIG,sick) out/sick/{collapse,vanishing,oscillation}/curves.png --height 460 --colours 32
	$(call FIG,walks) out/dcgan/interpolation.png out/dcgan/classes.png --height 400 --colours 32
	$(call FIG,mlp) $(call LAST,out/mlp) $(call LAST,out/dcgan) --height 400 --colours 16
	$(call FIG,text2img) out/text2img/conditions.png --height 700
	$(call FIG,cwgan) out/cwgan/conditions.png --height 560 --colours 32
	$(call FIG,faces) $(call LAST,out/anime) $(call LAST,out/wgan) --height 400 --colours 64
	$(call FIG,stability) out/sweep-stability.png --height 720 --colours 64
	$(call FIG,tips) out/sweep-tips.png --height 1150 --colours 64
	$(call FIG,cyclegan) out/cyclegan/translations.png --height 440 --colours 96
	$(call FIG,cyclegan-faces) out/cyclegan-faces/translations.png --height 560 --colours 96
	$(call FIG,seeds) out/seeds/seed-{11,1234}/translations.png --height 480 --colours 40
	$(call FIG,lambda) out/sweep-lambda/sweep.png --height 900 --colours 64
	$(call FIG,biggan) out/biggan/tsne.png out/biggan/interpolation.png --height 500 --colours 64
	$(call FIG,growth) out/bench/growth.png --height 300 --colours 16
	$(call FIG,latent) out/sweep-latent.png --height 900 --colours 64

results: $(VENV)  ## 1 min: the README's tables from finished runs and the last `make bench`
	$(PYTHON) data.py results $(wildcard out/dcgan out/dcgan-s? out/course-s? out/speedrun out/speedrun-s[12] out/course5-s? out/speedrun5-s? out/f32-s? out/mlp \
	  out/emoji out/emoji-s? out/anime out/wgan out/text2img out/text2img-faces out/cwgan out/modes28/mnist28 \
	  out/cyclegan out/cyclegan-faces out/unit out/biggan)

OTHERS = fid or cyclegan or biggan or every_command or kill or ctrl_c or mutated
test: $(VENV)  ## 5 min: everything that is promised, tested (in two halves, side by side)
	export OMP_NUM_THREADS=1; $(PYTHON) -m pytest -q test_all.py -k "not ($(OTHERS))" & half=$$!; \
	$(PYTHON) -m pytest -q test_all.py -k "$(OTHERS)" || bad=1; wait $$half; test -z "$$bad"

clean:  ## remove runs, caches and .venv; downloads/ stays
	rm -rf out .venv __pycache__ .pytest_cache
