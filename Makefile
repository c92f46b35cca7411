# GANs from scratch. `make` lists the targets. Flags pass through: make dcgan ARGS="--steps 200 --seed 3"
# PYTHON=python3 uses your own Python (with torch, numpy, pillow, pytest) instead of .venv.
# FULL=1 gives a sweep the course's own length; without it a sweep takes about 10 minutes on 2 cores.
PYTHON ?= .venv/bin/python
PRESET ?= dcgan
ARGS ?=
FEATURES ?= inception
VENV = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/stamp)
SHELL = /bin/bash
.SHELLFLAGS = -e -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help dcgan mlp modes interp sweep-latent emoji anime wgan text2img mnist28 cwgan sweep-stability tips \
        wgan-vs-dcgan modes28 fid cyclegan unit sweep-lambda seeds biggan test clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## ?/\1|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

.venv/stamp:
	python3 -m venv .venv
	.venv/bin/python -m pip install -q torch==2.13.0 numpy pillow pytest
	touch $@

# ---- gan.py ----
dcgan: $(VENV)  ## 2 min: digits from noise, with FID and class counts (PRESET=course: the course's setting)
	$(PYTHON) gan.py $(PRESET) --resume 1 $(ARGS)

mlp: $(VENV)  ## 3 min: the same game without convolutions
	$(PYTHON) gan.py mlp --resume 1 $(ARGS)

modes: $(VENV)  ## 2 min: mode collapse: which digits does the DCGAN draw, and how often?
	$(PYTHON) gan.py $(PRESET) --resume 1 --show metrics $(ARGS)

interp: $(VENV)  ## 2 min: walks between noise vectors, and beyond
	$(PYTHON) gan.py $(PRESET) --resume 1 --show interp $(ARGS)

sweep-latent: $(VENV)  ## 10 min: z and h in {16, 100}: four DCGANs on one sheet (FULL=1: 30 min)
	for z in 16 100; do for h in 16 100; do \
	  $(PYTHON) gan.py dcgan --resume 1 --z $$z --h $$h --steps $(if $(FULL),5000,1200) --out out/latent$(FULL)/z$$z-h$$h $(ARGS); done; done
	$(PYTHON) data.py compare out/latent$(FULL)/z* --out out/sweep-latent$(FULL)

test: $(VENV)  ## 4 min: everything that is promised, tested
	$(PYTHON) -m pytest -q -x test_all.py

clean:  ## remove runs, caches and .venv; downloads/ stays
	rm -rf out .venv __pycache__ .pytest_cache
