# GANs from scratch; `make` lists the targets with their minutes on 2 idle cores without a GPU; a data
# set met for the first time costs one more, for the classifier that measures.
#   make dcgan STEPS=500 SEED=1 MODERN=1 ARGS="--h 32"     flags for any run
#   make test PYTHON=python3                               your own Python in place of .venv
PYTHON ?= .venv/bin/python
VENV = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/done)
FLAGS = $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED)) $(ARGS)
GAN = $(PYTHON) gan.py $(1) $(if $(MODERN),--modern $(MODERN)) $(FLAGS)
SHELL = /bin/bash
.PHONY: $(shell sed -nE 's/^#? ?([a-z0-9-]+):.*/\1/p' Makefile)

help:
	@sed -nE 's/^#* ?([a-z0-9-]+):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-24s %s\n", $$1, $$2}'

.venv/done:
	@python3 -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "error: python3 is older than 3.10 or missing: install a newer Python, or name one with PYTHON="; exit 2; }
	python3 -m venv --clear .venv
	.venv/bin/python -m pip install -q torch==2.13.0 numpy pillow pytest
	touch $@

# dcgan: ## 2 min: digits from noise, with FID and class counts
# speedrun: ## 2 min: the best digits of two minutes
# mlp: ## 1 min: the same game without convolutions
# emoji: ## 5 min: least squares on emojis (drawn faces without network); MODERN=1: as one would do it today
# anime: ## 9 min: DCGAN on faces, 64 x 64
# wgan: ## 10 min: Wasserstein GAN with clipping on the same faces
# text2img: ## 9 min: faces by hair and eye colour; then ARGS='--prompt "blue hair green eyes"'
# mnist28: ## 3 min: 28 x 28 digits: are all drawn equally often?
# cwgan: ## 7 min: conditional WGAN with gradient penalty: clothes by class
# stacked: ## 9 min: three digits in one picture: how many of 1,000 modes does G find?
dcgan speedrun mlp emoji anime wgan text2img mnist28 cwgan stacked: $(VENV)
	$(call GAN,$@)

# modes: ## 1 min: which digits does the trained dcgan draw, and how often?
# interp: ## 1 min: walks between noise vectors and beyond: out/dcgan/interpolation.png
modes interp: $(VENV)
	$(call GAN,dcgan)

fid: $(VENV)  ## 3 min: FID of the dcgan (trained first where there is none)
	$(PYTHON) gan.py dcgan $(if $(STEPS),--steps $(STEPS)) --dump 10000
	$(PYTHON) fid.py out/dcgan $(ARGS)
cyclegan: $(VENV)  ## 6 min: Apple to Windows emojis and back without pairs (drawn faces without network)
	$(PYTHON) cyclegan.py $(FLAGS)
unit: $(VENV)  ## 12 min: UNIT, the same with one latent space
	$(PYTHON) cyclegan.py --model unit $(FLAGS)
biggan: $(VENV)  ## 5 min: BigGAN: map of its classes, walks between them (a small one is trained where the weights can't be had)
	$(PYTHON) biggan_interp.py $(FLAGS)

# A sweep: a run for each word, where a=1+b=2 stands for --a=1 --b=2, and all on one sheet. One that
# blows up is a row of it; any other error ends the sweep.
define runs
$(foreach p,$(2),$(PYTHON) $(1) $(FLAGS) --$(subst +, --,$(p)) --out out/$@/$(p) || grep -q "blew up" out/$@/$(p)/result.json
)
endef
define sweep
$(runs)
$(PYTHON) data.py compare out/$@/* --out out/$@-all
endef

ring sweep-beta1: export OMP_NUM_THREADS = 1
ring: $(VENV)  ## 4 min: every loss on eight Gaussians: out/ring.png, and four of them move in out/ring-four.gif
	$(call runs,gan.py ring,loss=gan loss=saturating loss=lsgan loss=wgan loss=wgan-gp loss=gan+r1=1 loss=r3gan)
	$(PYTHON) data.py tile $(addprefix out/ring/,loss=gan loss=saturating loss=lsgan loss=wgan loss=wgan-gp loss=gan+r1=1 loss=r3gan) --out out/ring
	$(PYTHON) data.py tile $(addprefix out/ring/,loss=gan loss=wgan loss=wgan-gp loss=r3gan) --out out/ring-four
sweep-beta1: $(VENV)  ## 4 min: eight Gaussians with three hidden layers: what does Adam's beta1 do?
	$(call sweep,gan.py ring --net ring3,$(foreach b,0 0.5 0.9,$(foreach l,gan lsgan r3gan,loss=$(l)+beta1=$(b))))
sweep-stacked: $(VENV)  ## 60 min: modes of 1,000 in stacked digits, five recipes
	$(call sweep,gan.py stacked,r1=0+bn=both+beta1=0.5+beta2=0.999+lr=2e-4+decay=0+ema=0 \
	  r1=0+bn=both+beta1=0.5+beta2=0.999+lr=2e-3 loss=wgan-gp+lr=1e-3 r1=1 modern=1)
sweep-latent: $(VENV)  ## 25 min: z and h in {16, 100}: four DCGANs at the course's learning rate
	$(call sweep,gan.py dcgan --lr 2e-4 --decay 0 --ema 0,z=16+h=16 z=16+h=100 z=100+h=16 z=100+h=100)
sweep-stability: $(VENV)  ## 65 min: what stops mode collapse? modes of 132 on drawn faces
	$(call sweep,gan.py emoji --data faces-a --steps 6000,modern=0 gp=10 sn=D sn=both lr=1.5e-4 d-steps=5 modern=1+augment=1 modern=1+augment=0)
sweep-modern: $(VENV)  ## 25 min: what of the modern bundle matters? one part taken out at a time
	$(call sweep,gan.py emoji --data faces-a --modern 1 --steps 3000,modern=1 loss=gan r1=0 r2=0 bn=both ema=0 augment=1)
tips: $(VENV)  ## 40 min: each training tip against its opposite, 64 x 64
	$(call sweep,gan.py anime --steps 1000,bn=both raw=1 raw=1+bn=none act=relu act=selu bn=G bn=D \
	  g-opt=sgd+d-opt=sgd+lr=2e-3 g-opt=rmsprop+d-opt=rmsprop+lr=5e-4 d-opt=sgd+d-lr=2e-3)
sweep-lambda: $(VENV)  ## 30 min: nine weights of the cycle loss
	$(call sweep,cyclegan.py --steps 3000,$(addprefix lambda-cycle=,0 0.005 0.010 0.015 0.025 0.05 0.1 0.5 1))
seeds: $(VENV)  ## 12 min: CycleGAN from two seeds: shapes stay, colours change
	$(call sweep,cyclegan.py,seed=11 seed=1234)

bench: $(VENV)  ## 10 min: the textbook loop against ours, in turns, in one run
	$(PYTHON) test_all.py bench
results: $(VENV)  ## table, samples and curves of all finished runs: out/results.md, .png, -curves.png
	$(PYTHON) data.py compare $(patsubst %/result.json,%,$(wildcard out/*/result.json)) --out out/results

compare = $(PYTHON) data.py compare $(addprefix out/,$(2)) --out out/$(1)
figures: $(VENV)  ## the pictures in figures/, once the runs that it names are there
	$(PYTHON) -c "import data; x = data.read_all(['out/emoji%s.png' % n for n in ('/001000', '/010000', '/020000', '-modern1/020000')], 528); \
	  data.sheet([i[None, :, :198] for i in x], 'out/evolution.png', ['1,000 steps', '10,000 steps', '20,000 steps', '20,000, MODERN=1'])"
	$(call compare,sick-all,sick/collapse sick/oscillation sick/vanishing)
	$(call compare,colours,cyclegan-datafaces cyclegan-datafaces-identity0.5)
	$(call compare,units,unit unit-datadistant)
	$(call compare,fading,anime-12000 wgan anime-modern1)
	$(PYTHON) -c "from PIL import Image as I; i = I.open('out/sick-all-curves.png'); i.crop((0, i.height - 710, *i.size)).save('out/sick.png')"
	$(PYTHON) -c "from PIL import Image as I; i = I.open('out/fading-curves.png'); i.crop((0, i.height - 1170, i.width, i.height - 710)).save('out/fading.png')"
	$(PYTHON) -c "from PIL import Image as I; a, b = [I.open(f'out/text2img{m}/conditions.png') for m in ('', '-modern1')]; \
	  page = I.new('RGB', (b.width, 298 + b.height)); page.paste(a); page.paste(b, (0, 298)); page.save('out/text2img.png')"
	for f in dcgan/curves=curves.png sick=sick.png fading=fading.png tips-all=tips.jpg seeds-all=cyclegan.jpg units=unit.jpg biggan/tsne=tsne.png ring=ring.png \
	  biggan/interpolation=walks.png evolution=evolution.jpg colours=colours.jpg text2img=text2img.jpg; do \
	  $(PYTHON) -c "from PIL import Image as I; I.open('out/$${f%=*}.png').save('figures/$${f#*=}', quality=90)"; done
	cp out/ring-four.gif figures/ring.gif

OTHERS = fid or cyclegan or biggan or two_ranks or killed
test: $(VENV)  ## 3 min: everything that is promised, tested, in two halves side by side
	export OMP_NUM_THREADS=1; $(PYTHON) -m pytest -q test_all.py -k "not ($(OTHERS))" & half=$$!; \
	$(PYTHON) -m pytest -q test_all.py -k "$(OTHERS)" || bad=1; wait $$half && test -z "$$bad"
clean:  ## remove .venv and caches; downloads/ and out/ stay
	rm -rf .venv __pycache__ .pytest_cache
clean-runs:  ## remove all runs: out/
	rm -rf out
