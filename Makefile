# Everything is set up in .venv on first use. `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(shell find cc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

.PHONY: help build demo test slow lint format docs clean distclean environment always

help:
	@echo "make demo       train a byte-level language model with linear attention"
	@echo "make test       run the tests; ARGS='-k causal -n 0' passes arguments to pytest"
	@echo "make slow       run the tests that take long"
	@echo "make lint       check style, types and formatting"
	@echo "make format     format Python and C++"
	@echo "make docs       build the documentation site in build/site, and check it"
	@echo "make build      compile what has changed"
	@echo "make clean      remove what was built (distclean: the environment too)"
	@echo
	@echo "PYTHON=python3.12 chooses the Python for .venv, CXX=clang++ the compiler,"
	@echo "PERFORMER_CUDA=ON or OFF whether the GPU kernels are built (default: where a GPU and nvcc are),"
	@echo "PERFORMER_ISAS=ALL that the CPU kernels are built for all processors (default: for this one)."

demo: build
	$(RUN) -m performer demo $(ARGS)

test: build
	$(RUN) -m pytest tests --numprocesses=auto --maxprocesses=4 \
	  --dist=loadfile --no-loadscope-reorder $(ARGS)

lint: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	find cc tests -name '*.cc' -o -name '*.h' -o -name '*.cu*' | xargs -n 40 -P 4 $(VENV)/bin/clang-format --dry-run -Werror

# What only these need is installed here.
slow: build
	$(RUN) tools/requirements.py ray hub >$(VENV)/slow.txt
	$(RUN) -m pip install --quiet --requirement $(VENV)/slow.txt
	@$(MAKE) test ARGS="-m slow $(ARGS)"

docs: build
	$(RUN) tools/requirements.py docs | grep -v ^tensorflow-performer >$(VENV)/docs.txt
	$(RUN) -m pip install --quiet --requirement $(VENV)/docs.txt
	$(RUN) -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/site
	$(RUN) tests/docs/site.py build/site

format: environment
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	find cc tests -name '*.cc' -o -name '*.h' -o -name '*.cu*' | xargs $(VENV)/bin/clang-format -i

environment:
	@sh tools/setup.sh "$(PYTHON)" $(VENV)

build: environment $(VENV)/built

# What the environment (or make's command line) chooses; CMake keeps what it was first told.
$(VENV)/choices: always | environment
	@choices="PERFORMER_CUDA=$$PERFORMER_CUDA PERFORMER_ISAS=$$PERFORMER_ISAS CXX=$$CXX"; \
	if [ "$$choices" != "$$(cat $@ 2>/dev/null)" ]; then \
	  rm -rf build/editable-*/CMakeCache.txt build/editable-*/CMakeFiles/[0-9]*; \
	  echo "$$choices" >$@; \
	fi

$(VENV)/built: $(SOURCES) $(VENV)/choices | environment
	@echo "Compiling, the first time for some minutes"
	@sh tools/build.sh $(RUN)
	@touch $@

clean:
	rm -rf build dist *.egg-info python/*.egg-info python/performer/*.so \
	  python/performer/_build_info.py $(VENV)/built $(VENV)/choices
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
