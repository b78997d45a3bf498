# demo: from nothing to pictures of four predictions    test: all tests    lint: style and types    bench: RESULTS.md
# study: the headline of configs/study/main.yaml, one seed; WEIGHTS=tf_efficientnet_lite0=FILE where timm's cannot be fetched
# gpu: the tests, and what can only be measured on a GPU, into RESULTS.md
# Each sets up .venv first. A PyTorch that fits and is already there (in .venv, or in $(PYTHON)) is kept.

SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
FITTING := import torch, torchvision; \
	assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11); \
	torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
RAW := Datasets/synthetic/camera_lidar_semantic_bboxes
SCRIPTS := camera segmentation depth_preprocess bounding_box steering_angle

.PHONY: demo test lint bench study gpu

.venv/installed: requirements.lock Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; name it by: make PYTHON=/path/to/python3.12"; exit 1; }
	@if $(PYTHON) -c '$(FITTING)' 2>/dev/null; then \
		echo "keeping the PyTorch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv; fi || { echo "making .venv failed; on Debian: apt install python3-venv"; exit 1; }
	@if $(BIN)/python -c '$(FITTING)' 2>/dev/null; then \
		grep -v -E '^torch(vision)?==' requirements.lock > .venv/requirements.txt; \
	else cp requirements.lock .venv/requirements.txt; fi
	$(BIN)/python -m pip install --quiet -r .venv/requirements.txt
	@touch $@

demo: runs/demo/panels/finished
	@cat runs/demo/table.txt
	@echo "pictures: runs/demo/panels/*.png"

runs/demo/table.txt: .venv/installed configs/demo.yaml
	$(BIN)/python -m a2d2.synthetic --out Datasets/synthetic --scenes 64 --frames 6 --size 960x604
	@for script in $(SCRIPTS); do \
		$(BIN)/python preprocessing/$$script.py --data $(RAW) --size 256x160 || exit; done
	$(BIN)/python train.py --config configs/demo.yaml --resume
	@$(BIN)/python evaluate.py runs/demo --split test --output runs/demo/test.json > $@.new && mv $@.new $@

runs/demo/panels/finished: runs/demo/table.txt
	$(BIN)/python visualize.py runs/demo --split test --count 6
	@touch $@

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/preprocessing.py
	$(BIN)/python benchmarks/boxes_set.py
	$(BIN)/python benchmarks/writing.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/networks.py --speed
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/exactness.py

HEADLINE := 'one_single.*.seed0' 'one_single_self.*.seed0' 'one_shared.shared.seed0' 'one_shared_pseudo.shared.seed0'
study: .venv/installed
	@mkdir -p runs/study/results  # results of its own, so that its runs are trained; tuning is taken from the study
	@cp -n experiments/results/main/*.setting*.json experiments/results/main/*.finalist*.json runs/study/results/ 2>/dev/null || true
	$(BIN)/python experiments/run.py configs/study/main.yaml --only $(HEADLINE) --results runs/study/results \
		--jobs 2 $(if $(WEIGHTS),--weights $(WEIGHTS))
	$(BIN)/python experiments/tabulate.py configs/study/main.yaml --results runs/study/results --plots runs/study/plots

gpu: .venv/installed
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "there is no GPU here"'
	$(BIN)/python -m pytest tests/test_gpu.py
	$(BIN)/python benchmarks/networks.py --memory --config configs/asymmetric.yaml
	$(BIN)/python benchmarks/training.py --append benchmarks/RESULTS.md
