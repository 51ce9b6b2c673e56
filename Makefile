.NOTPARALLEL:
.PHONY: help core setup native wheels demo test check soak sanitize bench

help:
	@echo 'make setup  install the package and all that its tests need into .venv'
	@echo 'make native build the C++ library anew, after a change to it'
	@echo 'make wheels the packages for x86-64 and aarch64 into dist/ (wants g++-aarch64-linux-gnu)'
	@echo 'make demo   the model that comes with the package writes, and shows its routing'
	@echo 'make test   run the tests'
	@echo 'make check  lint and type-check'
	@echo 'make soak   load 10,000 damaged files, check tokenizers, load an engine: some fifteen minutes'
	@echo 'make sanitize  the native library under address and thread sanitizers: some fifteen minutes'
	@echo 'make bench  run every benchmark in turn'

core:
	@tools/bootstrap core

setup:
	@tools/bootstrap dev

# tools/bootstrap does this too, for sources that it has not seen; here the compiler's messages show.
native: setup
	rm -f mixtral/kernels/native/libmixtral.so
	.venv/bin/python setup.py -q build_ext --inplace --force -j 2
	test -e mixtral/kernels/native/libmixtral.so

wheels: setup
	.venv/bin/python tools/cross/build.py dist

demo: core
	.venv/bin/mixtral demo

# One thread a process: the tests' tensors are small, and a fixed thread count makes their numbers repeat. worksteal
# hands out a file's tests together, so that what they share is made once.
test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

check: setup
	.venv/bin/ruff check .
	.venv/bin/mypy

# Damaged files of every format that is read (--first N goes on from case N), and 10,000 lines of text for each kind of
# tokenizer, against transformers or sentencepiece. Then random load on an engine whose cache is too small.
soak: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.fuzz --files 10000 --seed 0
	OMP_NUM_THREADS=1 .venv/bin/python tools/check_tokenizers.py
	.venv/bin/python tools/engine_load.py --minutes 5 --cache-mib 1

# The native library under the compiler's sanitizers: its tests, and threads that share a pool, a step and a model. Some
# fifteen minutes; the figures are seconds of driving threads.
sanitize: setup
	.venv/bin/python tools/sanitize/run.py thread --seconds 60
	.venv/bin/python tools/sanitize/run.py address --seconds 600

bench: setup
	set -e; for script in bench/*.py; do echo "== $$script"; .venv/bin/python $$script; done
