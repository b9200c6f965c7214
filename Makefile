# `make help` lists what is here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := outputs/demo
DEMO_TASK := pick-place-v3
DEMO_DATA := $(DEMO)/demonstrations/metaworld-$(DEMO_TASK)-v0

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick-tests test-all test-reliability test-versions lint types format bench-data bench-latency bench-rates bench-rollout bench-quality bench-demonstrations bench-import bench-compare bench-variants bench-recipes bench-sweep bench-train bench-waiting bench-precision bench-video bench-start bench-hostile bench-parity clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make the virtual environment in .venv, with all that demo and test need

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[export,launchers,metaworld,ocbench,pusht,robotics,dev]'
	@touch $@

demo: $(DEMO)/sweep.json ## demonstrations, training, rollout and sweep on a Meta-World task
	@echo
	@echo "Made in $(DEMO):"
	@echo "  demonstrations/  50 scripted demonstrations of $(DEMO_TASK) (Minari)"
	@echo "  checkpoint/      the trained policy (safetensors and JSON)"
	@echo "  training.html    the training on one page: losses, rollouts, the best checkpoint, videos"
	@echo "  episodes.json    50 episodes on goals it has not seen, and mp4 videos of the first ones where rendering works"
	@echo "  report.html      the sweep on one page: how few steps suffice, plots, videos side by side"
	@echo "  sweep.png        success against ddim_steps; the figures are in sweep.csv and sweep.json"
	@echo "  wandb/           the training run, offline"
	@echo "Next:"
	@echo "  look at $(DEMO)/sweep.png: this policy predicts the noise, as DDPM does, and needs several steps"
	@echo "  train a policy that predicts the actions, and see how few steps it needs; then other settings, another task:"
	@echo "  . $(BIN)/activate"
	@echo "  ddim-train experiment=metaworld dataset.path=$(DEMO_DATA) output_dir=outputs/sample"
	@echo "  ddim-sweep checkpoint=outputs/sample/checkpoint"
	@echo "  ddim-rollout checkpoint=$(DEMO)/checkpoint sampler.ddim_steps=2 execution_horizon=4"
	@echo "  ddim-collect env=metaworld env.task=assembly-v3"

# Each stage is a file: an interrupted demo goes on where it stopped, a finished one is not repeated.
$(DEMO_DATA): | $(VENV)/.installed
	$(BIN)/python scripts/collect.py env=metaworld env.task=$(DEMO_TASK) episodes=50 output_dir=$(DEMO)/demonstrations

$(DEMO)/trained: | $(DEMO_DATA)
	$(BIN)/python scripts/train.py experiment=metaworld dataset.path=$(DEMO_DATA) prediction_type=epsilon train.steps=3000 output_dir=$(DEMO)
	@touch $@

$(DEMO)/episodes.json: | $(DEMO)/trained
	$(BIN)/python scripts/rollout.py checkpoint=$(DEMO)/checkpoint episodes=50 video=2 output_dir=$(DEMO)

$(DEMO)/sweep.json: | $(DEMO)/episodes.json
	$(BIN)/python scripts/sweep.py checkpoint=$(DEMO)/checkpoint ddim_steps=[1,2,4,8,16,50] episodes=240 output_dir=$(DEMO)

test: setup lint ## linter, types and the tests that take minutes together
	@$(MAKE) --no-print-directory --jobs=2 types quick-tests

# The type checker keeps one core busy for the time in which the tests start.
quick-tests: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: setup lint types ## every test, also those marked slow or reliability, with more examples of each property
	HYPOTHESIS_PROFILE=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' $(SIDE_BY_SIDE)

test-reliability: setup ## kills, full disks, hostile files, fuzz, soak and the wheel, with their figures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m reliability -s

# As many tests side by side as there are cores; a worker that is done takes from another one.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 8 --dist worksteal

# What pyproject.toml allows at least, and the newest there is: each in an environment of its own, which is kept. Torch
# for GPUs comes along where pip finds no other: several gigabytes. VERSION_TESTS=tests/diffusion/test_ddim.py runs less.
OLDEST := torch==2.7.0 gymnasium==1.2.0 numpy==2.0.0
VERSIONS := outputs/versions
VERSION_TESTS := tests

test-versions: $(VERSIONS)/oldest/.installed $(VERSIONS)/newest/.installed ## the tests with the oldest and newest torch, gymnasium, numpy
	@failed=0; for each in oldest newest; do \
		$(VERSIONS)/$$each/bin/python -c 'import sys, importlib.metadata as m; print(sys.argv[1] + ":", *(p + " " + m.version(p) for p in sys.argv[2:]))' \
			$$each torch gymnasium numpy; \
		OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(VERSIONS)/$$each/bin/python -m pytest -q $(VERSION_TESTS) || failed=1; \
	done; exit $$failed

$(VERSIONS)/oldest/.installed: VERSION_PINS := $(OLDEST)
$(VERSIONS)/oldest/.installed $(VERSIONS)/newest/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(VERSION_PINS) --editable '.[export,launchers,metaworld,ocbench,pusht,robotics,dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench-data: setup ## size and speed of demonstrations and windows, beside a PyTorch DataLoader (writes 4 GB)
	$(BIN)/python -m scripts.bench.data

bench-latency: setup ## a chunk's median and p99 beside the machine's floor and the reference's U-Net
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.latency

bench-rates: setup ## acts in real time at the control rates that a sweep prints, and counts the steps that come too late
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.rates

bench-rollout: setup ## environment steps a second beside the raw environment on every core
	$(BIN)/python -m scripts.bench.rollout

bench-quality: setup ## retrain PRESET (with DATA=... where it needs a file) and compare with the score it promises
	$(BIN)/python -m scripts.bench.quality $(PRESET) $(if $(DATA),dataset.path=$(DATA)) $(OVERRIDES)

bench-demonstrations: setup ## success of OCBench tasks against the number of demonstrations, beside plain regression
	$(BIN)/python -m scripts.bench.demonstrations $(OVERRIDES)

bench-train: setup ## training steps a second of two processes beside one, on the CPU (OVERRIDES=processes=4)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.train $(OVERRIDES)

bench-waiting: setup ## training steps with two threads beside another process, by how threads wait for each other
	$(BIN)/python -m scripts.bench.waiting

bench-precision: setup ## training steps in bfloat16 beside float32, on one thread, and a product alone
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.precision

bench-video: setup ## videos that stay where they are beside LeRobot's own class (LEROBOT=its Python; writes 12 GB, FRAMES=9600 less)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.video $(if $(LEROBOT),lerobot=$(LEROBOT)) $(if $(FRAMES),frames=$(FRAMES)) $(OVERRIDES)

bench-start: setup ## CPU seconds until each command answers, and its five heaviest imports
	$(BIN)/python -m scripts.bench.start

bench-hostile: setup ## what a file that attacks its reader gets: the answer, the seconds and the memory
	$(BIN)/python -m scripts.bench.hostile

bench-parity: setup ## how far imported policies are from what the projects that wrote them compute
	$(BIN)/python -m scripts.bench.parity

bench-import: setup ## large U-Nets beside LeRobot's own network (LEROBOT=its Python, or makes it: 6 GB), and their sweeps' memory
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.imports $(if $(LEROBOT),lerobot=$(LEROBOT)) $(OVERRIDES)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.memory

bench-sweep: setup ## simulated sweeps: errors of each way of stopping, episodes saved, right answers (SWEEPS=500 is faster)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.sweep $(if $(SWEEPS),sweeps=$(SWEEPS))

bench-compare: setup ## objective x solver x steps on each task, paired, with the verdict on diffusion (Push-T with DATA=...)
	$(BIN)/python -m scripts.bench.compare $(if $(DATA),pusht=$(DATA)) $(OVERRIDES)

bench-variants: setup ## denoisers, targets, schedules and horizons on Push-T, one change at a time: DATA=...
	$(BIN)/python -m scripts.bench.variants dataset.path=$(DATA) $(OVERRIDES)

bench-recipes: setup ## coverage and width of the intervals over training seeds, beside pooled ones, by simulation
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.bench.recipes

clean: ## remove the virtual environment and caches, not outputs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
