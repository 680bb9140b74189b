# `make demo` and `make test` set up everything they need; `make help` lists the rest.
PYTHON ?= python3.11
VENV ?= .venv
DATA ?=
# processes that run tests side by side; each takes up to 2 GiB
TEST_PROCESSES ?= 2

BIN := $(abspath $(VENV))/bin
KIND := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
LOCK := requirements/$(KIND).txt
# the two builds of fbgemm install the same files: the other one has to go first
OTHER_FBGEMM := $(if $(filter cuda,$(KIND)),fbgemm-gpu-cpu,fbgemm-gpu)
# one stamp for the packages of the environment, one for the checkout it runs: checkouts may share an environment
PACKAGES := $(VENV)/.packages-$(shell cat $(LOCK) | cksum | cut -d' ' -f1)
CHECKOUT := $(VENV)/.checkout-$(shell (pwd; cat setup.cfg) | cksum | cut -d' ' -f1)

export PATH := $(BIN):$(PATH)
export MIM_PYTHON := $(BIN)/python
export PYTHONPATH :=
export PYTHONUNBUFFERED := 1

.PHONY: help install demo test faults movielens ablation-csft figure5 table2 ablation-ciubm coldstart abtest table6 bench-frozen-table bench-csft-loss bench-ctr-throughput bench-serving bench-rim-latency bench-scaling bench-export-throughput chaos bench book doctor lint lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(CHECKOUT)  ## install everything into $(VENV)

$(PACKAGES):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip uninstall --quiet --yes $(OTHER_FBGEMM) 2>/dev/null
	$(BIN)/python -m pip install --quiet --no-deps -r $(LOCK)
	rm -f $(VENV)/.packages-* $(VENV)/.checkout-*
	touch $@

$(CHECKOUT): $(PACKAGES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.checkout-*
	touch $@

demo: install  ## every stage on a synthetic shop, two ranks; prints Base and MIM test AUC
	$(BIN)/python -m benchmarks.demo --out runs/demo

movielens: install  ## the real job on MovieLens and posters: make movielens DATA=<folder>
	@test -n "$(DATA)" || { echo "make movielens DATA=<folder with ratings.csv, movies.csv and posters.parquet>"; exit 2; }
	$(BIN)/python -m benchmarks.movielens --data $(DATA) --out runs/movielens

ablation-csft: install  ## what pre-training and C-SFT are worth in AUC: Tables 3, 4 and 5
	$(BIN)/python -m benchmarks.ablation_csft --out runs/ablation_csft

figure5: install  ## vision and text models by cost and by AUC: make figure5 [DATA=<dataset>]
	$(BIN)/python -m benchmarks.figure5 --out runs/figure5 $(if $(DATA),--data $(DATA))

table2: install  ## six user behavior models without and with MIM: make table2 [DATA=<films>]
	$(BIN)/python -m benchmarks.table2 --out runs/table2 $(if $(DATA),--data $(DATA))

ablation-ciubm: install  ## what the parts of CiUBM are worth in AUC: make ablation-ciubm [DATA=<films>]
	$(BIN)/python -m benchmarks.ablation_ciubm --out runs/ablation_ciubm $(if $(DATA),--data $(DATA))

coldstart: install  ## gains by the age of an item, Figure 6: make coldstart [DATA=<films>]
	$(BIN)/python -m benchmarks.coldstart --out runs/coldstart $(if $(DATA),--data $(DATA))

abtest: install  ## a simulated online test: CTR and revenue of rankings by Base and by MIM
	$(BIN)/python -m benchmarks.abtest --out runs/abtest

table6: install  ## operations, memory and speed without a representation center, end to end, and of MIM
	$(BIN)/python -m benchmarks.efficiency --out runs/table6

bench-frozen-table: install  ## a frozen sharded table beside trainable and unsharded ones
	$(BIN)/python -m benchmarks.frozen_table --out runs/frozen_table

bench-csft-loss: install  ## the loss of C-SFT at the size of the paper, beside the naive one
	$(BIN)/python -m benchmarks.csft_loss --out runs/csft_loss

bench-ctr-throughput: install  ## training steps of the CTR models beside FuxiCTR's
	$(BIN)/python -m benchmarks.ctr_throughput --out runs/ctr_throughput

bench-serving: install  ## what a score costs at serving, alone and over HTTP, by the length of the history
	$(BIN)/python -m benchmarks.serving --out runs/serving

bench-scaling: install  ## how a training step grows with history, batch, table and ranks; the paper's scale planned
	$(BIN)/python -m benchmarks.scaling --out runs/scaling

bench: install  ## every benchmark of cost at a small size, and what moved; RECORD=1 records it
	$(BIN)/python -m benchmarks.bench --out runs/bench $(if $(RECORD),--record)

book: install  ## write benchmarks/README.md from the recorded results
	$(BIN)/python -m benchmarks.book

bench-rim-latency: install  ## from the arrival of an item to a lookup that has its vector
	$(BIN)/python -m benchmarks.rim_latency --out runs/rim_latency

chaos: install  ## kill RIM, stores and training ranks 240 times: no row wrong, lost or doubled
	$(BIN)/python -m benchmarks.chaos --out runs/chaos

faults: install  ## fail every file-system call of every writer: nothing is lost or mixed
	$(BIN)/python -m benchmarks.faults --out runs/faults

bench-export-throughput: install  ## export's items per second beside its encoder's bare forward pass
	$(BIN)/python -m benchmarks.export_throughput --out runs/export_throughput

test: install  ## unit, distributed and pipeline tests
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

doctor: install  ## check the installation
	$(BIN)/mim doctor

lint: install  ## ruff
	$(BIN)/ruff check .

lock: install  ## rewrite requirements/*.txt from the packages in $(VENV)
	$(BIN)/python requirements/lock.py

clean:  ## remove runs and caches, not the environment
	rm -rf runs .pytest_cache .ruff_cache
