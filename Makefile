# Each target is complete on its own: it installs into .venv what is missing, then runs.
.DEFAULT_GOAL := help
.PHONY: help install demo demo-dml bench-quick bench-gpu test test-faults audit lint docs ffcv-wheel

PY := .venv/bin/python
DEMO := runs/demo
DEMO_DML := runs/demo-dml

help:
	@echo "make demo      train three methods on real images (about 3 minutes on 2 cores), compare them, audit the test images"
	@echo "make demo-dml  train plain and introspective retrieval on real images (about 3 minutes) and compare them"
	@echo "make test      lint, types and tests; SLOW=1 runs the slow tests too"
	@echo "make test-faults  kill runs and damage files, all cases (about 14 minutes)"
	@echo "make bench-quick  a few ratios of speed against the stored ones (2 minutes); reports, never fails"
	@echo "make bench-gpu  what is to be measured on a GPU, one benchmark after the other, under 8 minutes each"
	@echo "make audit     known vulnerabilities of the versions in requirements.lock"
	@echo "make docs      the pages of docs/ as a site, in build/docs"
	@echo "make install   only make .venv"
	@echo "make ffcv-wheel  a wheel of FFCV with its libraries inside, for machines where you are not root"

install:
	@bash .ci/install

demo: install
	@rm -rf $(DEMO)
	@for method in baseline cutmix idml-cutmix; do \
		$(PY) train_cls.py --config configs/quick/fashion_mnist_mini.yaml --method $$method \
			--output-dir $(DEMO)/$$method || exit $$?; \
	done
	@$(PY) -m idml table $(DEMO)/baseline $(DEMO)/cutmix $(DEMO)/idml-cutmix
	@$(PY) -m idml audit --checkpoint $(DEMO)/idml-cutmix --splits test --out $(DEMO)/report

demo-dml: install
	@rm -rf $(DEMO_DML)
	@# Each with the settings that won for it on held-out classes; the file has those of live.
	@$(PY) train_dml.py --config configs/quick/emoji_mini.yaml --ism off --lr 2e-3 --proxy-norm null --output-dir $(DEMO_DML)/off
	@$(PY) train_dml.py --config configs/quick/emoji_mini.yaml --ism live --output-dir $(DEMO_DML)/live
	@$(PY) -m idml table $(DEMO_DML)/off $(DEMO_DML)/live

ffcv-wheel: install
	@bash .ci/ffcv-wheel

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: install
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --durations=12 --cov --cov-report=term $(if $(filter 1,$(SLOW)),,-m "not slow")

test-faults: install
	FAULTS=full OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal tests/faults

bench-quick: install
	$(PY) benchmarks/bench_quick.py

bench-gpu: install
	$(PY) benchmarks/bench_gpu.py
	$(PY) benchmarks/bench_ism.py
	$(PY) benchmarks/bench_dml.py
	$(PY) benchmarks/bench_scaling.py

audit: install
	@.ci/audit
