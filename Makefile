# make demo / make test do all set-up. PYTHON=... picks the interpreter; each gets an environment of its own.
PYTHON ?= python3
ARGS ?=
# How many processes run tests: they wait more than they compute. JOBS=0 runs them in one, for debuggers.
JOBS ?= 4

TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d%s" % (*sys.version_info[:2], getattr(sys, "abiflags", "")))' 2>/dev/null)
VENV := .venv/$(TAG)
BIN := $(VENV)/bin
SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md LICENSE $(shell find src python -name '*.rs' -o -name '*.py' -o -name '*.pyi' -o -name '*.json' -o -name py.typed)

.PHONY: demo test test-python test-rust bench stress lint clean check-tools
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed  ## Build the package and run the demo
	@$(BIN)/python -m llm_batch_coalesce demo $(ARGS)

test: test-rust test-python  ## Run all tests

test-rust: check-tools
	@cargo test --quiet --locked --no-default-features --test core
	@RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 CARGO_TARGET_DIR=target/loom \
		cargo test --quiet --locked --no-default-features --test loom

test-python: $(VENV)/.tested
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.tested  ## Run the benchmarks; PYTHON=... picks the interpreter
	@$(BIN)/python -m pytest benches/python --benchmark-enable --benchmark-only --benchmark-columns=median,rounds \
		--timeout 600 -q $(ARGS)

stress: $(VENV)/.tested  ## Hammer it with every operation for a minute
	@$(BIN)/python tests/stress/hammer.py $(ARGS)

lint: $(VENV)/.linted  ## Run all linters
	cargo fmt --check
	cargo clippy --quiet --locked --all-targets -- -D warnings
	cargo clippy --quiet --locked --all-targets --no-default-features -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest llm_batch_coalesce._core --mypy-config-file pyproject.toml

$(VENV)/.installed: $(SOURCES) .ci/install | check-tools
	@.ci/install "$(PYTHON)" "$(VENV)"
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@.ci/install-group "$(BIN)/python" test
	@touch $@

$(VENV)/.linted: $(VENV)/.tested
	@.ci/install-group "$(BIN)/python" lint
	@touch $@

check-tools:
	@[ -n "$(TAG)" ] || { echo "make: $(PYTHON) is no working Python; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or newer is needed, $(PYTHON) is $(TAG); name one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v cargo >/dev/null || \
		{ echo "make: cargo is missing; install Rust from https://rustup.rs (or your system's package rustup)" >&2; exit 1; }

clean:
	rm -rf .venv target dist
