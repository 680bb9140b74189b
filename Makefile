# `make demo` and `make test` set up everything they need; `make help` lists the rest.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13; do $$python -c "" 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
DATA ?=
# processes that run tests side by side; each takes up to 2 GiB
TEST_PROCESSES ?= 2
# files stay whole, because their tests share fixtures; tests/conftest.py puts the longest first
PARALLEL := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# paths may hold spaces: BIN and DATA are quoted for the shell
ENVIRONMENT := $(shell case "$(VENV)" in (/*) echo "$(VENV)" ;; (*) echo "$(CURDIR)/$(VENV)" ;; esac)
BIN := '$(ENVIRONMENT)/bin'
override DATA := $(if $(DATA),'$(DATA)')
KIND := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

export PATH := $(ENVIRONMENT)/bin:$(PATH)
export MIM_PYTHON := $(ENVIRONMENT)/bin/python
export PYTHONPATH :=
export PYTHONUNBUFFERED := 1
export PYTHONDONTWRITEBYTECODE :=  # the processes of tests would compile the package again and again

.PHONY: help install demo prepare-demo test test-fast faults movielens ablation-csft figure5 table2 ablation-ciubm coldstart value daily abtest table6 bench-frozen-table bench-csft-loss bench-ctr-throughput bench-serving bench-windows bench-rim-latency bench-scaling bench-export-throughput bench-input bench-prepare chaos cluster torchrec-parity rehearsal cuda-check gpu roofline bench benchmark-report report-image docs doctor image lint types lock wheel release-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

install:  ## install everything into $(VENV)
	@sh requirements/install.sh '$(VENV)' '$(PYTHON)' '$(KIND)'

demo: install  ## every stage on a synthetic shop, two ranks; prints Base and MIM test AUC
	$(BIN)/python -m mim_torchrec.benchmarks.paper.demo --out runs/demo

movielens: install  ## the real job on MovieLens and posters: make movielens DATA=<folder>
	@test -n "$(DATA)" || { echo "make movielens DATA=<folder with ratings.csv, movies.csv and posters.parquet>"; exit 2; }
	$(BIN)/python -m mim_torchrec.benchmarks.paper.movielens --data $(DATA) --out runs/movielens

ablation-csft: install  ## what pre-training and C-SFT are worth in AUC: Tables 3, 4 and 5: make ablation-csft [TOWERS=trained|paper]
	$(BIN)/python -m mim_torchrec.benchmarks.paper.ablation_csft --out runs/ablation_csft$(if $(TOWERS),_$(TOWERS) --towers $(TOWERS))

figure5: install  ## vision and text models by cost and by AUC: make figure5 [DATA=<dataset>]
	$(BIN)/python -m mim_torchrec.benchmarks.paper.figure5 --out runs/figure5 $(if $(DATA),--data $(DATA))

table2: install  ## six user behavior models without and with MIM: make table2 [DATA=<films>] [SUBSETS=1]
	$(BIN)/python -m mim_torchrec.benchmarks.paper.table2 --out runs/table2 $(if $(DATA),--data $(DATA)) $(if $(SUBSETS),--subsets True)

ablation-ciubm: install  ## what the parts of CiUBM are worth in AUC: make ablation-ciubm [DATA=<films>]
	$(BIN)/python -m mim_torchrec.benchmarks.paper.ablation_ciubm --out runs/ablation_ciubm $(if $(DATA),--data $(DATA))

coldstart: install  ## gains by the age of an item, Figure 6: make coldstart [DATA=<films>]
	$(BIN)/python -m mim_torchrec.benchmarks.paper.coldstart --out runs/coldstart $(if $(DATA),--data $(DATA))

value: install  ## MIM beside Base, a model without ids, a regression and their ensemble: make value [DATA=<films>]
	$(BIN)/python -m mim_torchrec.benchmarks.paper.value --out runs/value $(if $(DATA),--data $(DATA))

daily: install  ## a model of every day, with tables that grow and tables that are bounded: make daily [DATA=<films>]
	$(BIN)/python -m mim_torchrec.benchmarks.paper.daily --out runs/daily $(if $(DATA),--data $(DATA))

abtest: install  ## a simulated online test: CTR and revenue of rankings by Base and by MIM
	$(BIN)/python -m mim_torchrec.benchmarks.paper.abtest --out runs/abtest

table6: install  ## operations, memory and speed without a representation center, end to end, and of MIM
	$(BIN)/python -m mim_torchrec.benchmarks.paper.efficiency.main --out runs/table6

prepare-demo: install  ## raw logs of a shop through `mim prepare` to the demo's models: same rows, same AUC
	$(BIN)/python -m mim_torchrec.benchmarks.paper.prepare_demo --out runs/prepare_demo

bench-prepare: install  ## preparation of raw logs beside a query that reads and sorts them; Spark beside DuckDB
	$(BIN)/python -m mim_torchrec.benchmarks.speed.prepare --out runs/prepare

bench-frozen-table: install  ## a frozen sharded table beside trainable and unsharded ones
	$(BIN)/python -m mim_torchrec.benchmarks.speed.frozen_table --out runs/frozen_table

bench-csft-loss: install  ## the loss of C-SFT at the size of the paper, beside the naive one
	$(BIN)/python -m mim_torchrec.benchmarks.speed.csft_loss --out runs/csft_loss

bench-ctr-throughput: install  ## training steps of the CTR models beside FuxiCTR's
	$(BIN)/python -m mim_torchrec.benchmarks.speed.ctr_throughput --out runs/ctr_throughput

bench-serving: install  ## what a score costs at serving, alone and over HTTP, by the length of the history
	$(BIN)/python -m mim_torchrec.benchmarks.speed.serving --out runs/serving

bench-windows: install  ## what a window costs at the age of production: log, store and index
	$(BIN)/python -m mim_torchrec.benchmarks.speed.windows --out runs/windows

bench-scaling: install  ## how a training step grows with history, batch, table and ranks; the paper's scale planned
	$(BIN)/python -m mim_torchrec.benchmarks.speed.scaling --out runs/scaling

bench-input: install  ## reading beside a raw scan, waiting for data, start-up by the size of the data
	$(BIN)/python -m mim_torchrec.benchmarks.speed.input --out runs/input

bench: install  ## every benchmark of cost at a small size, and what moved; RECORD=1 records it
	$(BIN)/python -m mim_torchrec.benchmarks.records.bench --out runs/bench $(if $(RECORD),--record)

benchmark-report: install  ## write benchmarks/README.md from the recorded results
	$(BIN)/python -m mim_torchrec.benchmarks.records.benchmark_report

report-image:  ## docs/_static/demo_report.png from the report of make demo, by chromium
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1000,900 --screenshot=docs/_static/demo_report.png 'file://$(CURDIR)/runs/demo/report.html'

bench-rim-latency: install  ## from the arrival of an item to a lookup that has its vector
	$(BIN)/python -m mim_torchrec.benchmarks.speed.rim_latency --out runs/rim_latency

chaos: install  ## 240 kills of RIM, stores and ranks, 1,000 faults of a server: no row and no score wrong, none lost
	$(BIN)/python -m mim_torchrec.benchmarks.chaos.main --out runs/chaos

cluster: install  ## the stages on a real Slurm of two nodes, under faults; as root, with slurm-wlm and munge
	$(BIN)/python -m mim_torchrec.benchmarks.cluster.main --out runs/cluster

faults: install  ## fail every file-system call of every writer: nothing is lost or mixed
	$(BIN)/python -m mim_torchrec.benchmarks.chaos.disk_faults --out runs/faults

torchrec-parity: install  ## frozen collections beside TorchRec's in 5,000 random configurations
	$(BIN)/python -m mim_torchrec.benchmarks.parity.torchrec_parity --out runs/torchrec_parity

rehearsal: install  ## training and all stages on a pretended GPU: launches, waits and uploads, and what would fail
	$(BIN)/python -m mim_torchrec.benchmarks.rehearsal.rehearsal --out runs/rehearsal

cuda-check: install  ## after make rehearsal: fbgemm's build for CUDA (downloads 0.5 GB) has a kernel for each operator
	$(BIN)/python -m pip download --quiet --no-deps --dest build/cuda "$$(grep '^fbgemm-gpu==' requirements/cuda.txt)"
	$(BIN)/python -m mim_torchrec.benchmarks.rehearsal.cuda_wheel --wheel "$$(ls -t build/cuda/fbgemm_gpu-*.whl | head -n 1)" --out runs/cuda_wheel

gpu: install  ## on a machine with a GPU: checks, tests and measurements in order of worth: make gpu BUDGET=<minutes>
	$(BIN)/python -m mim_torchrec.benchmarks.gpu.main --out runs/gpu --budget-minutes $(or $(BUDGET),8) $(if $(ONLY),--only $(ONLY))

roofline: install  ## what would bound a training step on one H100 and on eight: an estimate
	$(BIN)/python -m mim_torchrec.benchmarks.gpu.roofline --out runs/roofline

bench-export-throughput: install  ## export's items per second beside its encoder's bare forward pass
	$(BIN)/python -m mim_torchrec.benchmarks.speed.export_throughput --out runs/export_throughput

test: install  ## all tests; COVERAGE=1 says which rooms they cover; `make test-fast` runs fewer
ifdef COVERAGE
	rm -rf build/coverage && mkdir -p build/coverage
	MIM_COVERAGE='$(CURDIR)/build/coverage' $(BIN)/python -m pytest $(PARALLEL)
	$(BIN)/python -m tests.line_coverage build/coverage
else
	$(BIN)/python -m pytest $(PARALLEL)
endif

test-fast: install  ## the tests that are not marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

docs: install  ## build the documentation site into build/docs; a warning is an error
	$(BIN)/python -m sphinx -b html -W --keep-going docs build/docs

image: install  ## build the container image with buildah, as root: make image [KIND=cuda] [TAG=name]
	@MIM_PYTHON=$(BIN)/python sh deploy/build_image.sh $(KIND) $(or $(TAG),mim-torchrec:$(KIND))

doctor: install  ## check the installation
	$(BIN)/mim doctor

lint: install  ## style and formatting by ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: install  ## types by mypy, of the package as it is installed
	rm -rf build/types && mkdir -p build/types/mim_torchrec
	ln -s '$(CURDIR)'/mim_torchrec/* '$(CURDIR)'/benchmarks '$(CURDIR)'/embeddings '$(CURDIR)'/launch build/types/mim_torchrec/
	cd build/types && $(BIN)/python -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p mim_torchrec

lock: install  ## rewrite requirements/*.txt from the packages in $(VENV)
	$(BIN)/python requirements/lock.py

wheel: install  ## build the sdist and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

release-check: wheel  ## install the wheel and the sdist into a clean environment and use them
	sh requirements/release_check.sh $(BIN)/python $(KIND)

clean:  ## remove runs, built pages and caches, not the environment
	rm -rf runs build docs/_generated .pytest_cache .ruff_cache
