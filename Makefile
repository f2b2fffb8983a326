# A fresh clone needs Python 3.11 or 3.12, GNU make and a C compiler; the targets fetch the rest.

PYTHON ?= python3
PIP_VERSION := 26.1
# Its metadata wants numpy 1; the websocket client that the tests drive works with numpy 2.
OPENPI_CLIENT := openpi-client==0.1.2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
BASELINES := .baselines

# The simulator draws with software OpenGL; a browser is only wanted for looking at reports.
OPENGL := libosmesa6 libegl1 libgl1 libgles2 libglx-mesa0 libegl-mesa0
BROWSER := chromium

POLICY ?= checkpoints/reference
TARGET ?= cpu
RUN ?= runs/demo
SETTINGS ?= float,w8,w8a8,w4,w4-rtn,w2,w2-rtn

# Processes that run tests, of one thread each; see tests/conftest.py.
WORKERS ?= 2
# A module stays in one process, so that what its tests share is made once.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope

.ONESHELL:
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.PHONY: help install system demo test test-slow lint docs wheel baselines-env clean

help:
	@cat <<-'TEXT'
	make demo       reference policy -> quantized -> served and measured -> runs/demo/report.html
	make test       the tests that take seconds each (WORKERS=2)
	make test-slow  the tests that take minutes, or the network
	make lint       ruff and mypy
	make docs       the pages, strictly checked -> site/index.html
	make install    $(VENV) with the pinned versions of constraints.txt
	make system     Debian packages: software OpenGL, Chromium
	make wheel      dist/qvla-*.whl
	make baselines-env  $(BASELINES) with other libraries' quantizers, for qvla baseline
	make clean      remove everything made, except runs/
	TEXT

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	    echo "$(PYTHON) is older than 3.11; name another: make install PYTHON=python3.11" >&2
	    exit 1
	fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	echo "installing the pinned versions into $(VENV) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip==$(PIP_VERSION)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e '.[host,sim,rtx,camera,docs,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(OPENPI_CLIENT)
	touch $@

system:
	@missing() { for package; do dpkg -s "$$package" >/dev/null 2>&1 || echo "$$package"; done; }
	if ! command -v dpkg >/dev/null; then
	    echo "system: no dpkg here; the simulator needs EGL or OSMesa from your own packages"
	    exit 0
	fi
	opengl=$$(missing $(OPENGL))
	wanted="$$opengl $$(missing $(BROWSER))"
	wanted=$$(echo $$wanted)
	test -n "$$wanted" || exit 0
	sudo=
	if test "$$(id -u)" != 0; then
	    sudo="sudo -n"
	    if ! sudo -n true 2>/dev/null; then
	        echo "system: run this first: sudo apt-get install $$wanted" >&2
	        test -z "$$opengl" && exit 0 || exit 1
	    fi
	fi
	apt() { $$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 "$$@" </dev/null; }
	echo "system: installing $$wanted ..."
	apt update
	if test -n "$$opengl"; then
	    apt install --no-install-recommends -y $$opengl >/dev/null
	fi
	for package in $$(missing $(BROWSER)); do
	    apt install --no-install-recommends -y "$$package" >/dev/null \
	        || echo "system: no $$package; tests that look at a page in a browser are skipped"
	done

demo: system install
	@$(BIN)/qvla deploy --policy $(POLICY) --target $(TARGET) --run $(RUN) --settings $(SETTINGS)

test: system install
	@$(PYTEST) -m 'not slow'

test-slow: system install
	@$(PYTEST) -m slow

lint: install
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The themes' notice is about mkdocs' future, not about these pages.
docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --clean
	echo "open site/index.html"

# A stale build/ would put modules that no longer exist into the wheel.
wheel: install
	@rm -rf build
	$(BIN)/python -m build --wheel --no-isolation

# Its Python sees QVLA's packages behind its own: pins of these libraries are not QVLA's.
baselines-env: $(BASELINES)/installed.stamp

$(BASELINES)/installed.stamp: constraints-baselines.txt | install
	@test -x $(BASELINES)/bin/python || $(BIN)/python -m venv $(BASELINES)
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'
	$(BIN)/python -c "$$packages" >"$$($(BASELINES)/bin/python -c "$$packages")/qvla.pth"
	echo "installing the baselines' libraries into $(BASELINES) ..."
	$(BASELINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    -r constraints-baselines.txt
	touch $@

clean:
	@rm -rf $(VENV) $(BASELINES) build dist site qvla.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
