# kablate: `make help` lists the goals; README.md says how they fit together.
#
# A bare `make` plans the configured study, runs what is missing, and reports. The plan is made anew each time and writes
# a makefile with one target a cell (OUT/cells.mk is a copy); which cells it holds is decided by identity, not by time stamps.

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
SHELL := /bin/sh
.DEFAULT_GOAL := run

# What recipes are made of is `override`, so that nothing on the command line takes its place.
# V=1 shows commands, V=2 says why each cell runs.
override Q := $(if $(filter 1 2,$(value V)),,@)
override reasons := $(if $(filter 2,$(value V)),--reasons)

# PYTHON=... uses that interpreter as it is and installs nothing; otherwise ./.venv is set up first.
override VENV := .venv
ifneq ($(origin PYTHON),command line)
PYTHON := $(VENV)/bin/python
override SETUP := $(VENV)/.stamp
else
override SETUP :=
endif
PYTHON3 := python3
# For goals that need no package at all: whatever Python is there.
ANY_PYTHON = $(if $(wildcard $(PYTHON)),$(PYTHON),$(PYTHON3))
export PYTHON Q
export PYTHONUNBUFFERED := 1
# The outermost make, which every program watches, so that nothing outlives it.
ifndef KABLATE_MAKE_PID
export KABLATE_MAKE_PID := $(shell echo $$PPID)
endif
# CPU threads spin only shortly while they wait for each other: the default is several times slower on a busy machine.
export GOMP_SPINCOUNT ?= 10000

# These count only when they stand on make's command line; the environment is too easily polluted with TIME or OUT.
on_command_line = $(if $(filter command,$(firstword $(origin $(1)))),$(value $(1)))
export KABLATE_OUT := $(call on_command_line,OUT)
export KABLATE_SEEDS := $(call on_command_line,SEEDS)
export KABLATE_TIME := $(call on_command_line,TIME)
export KABLATE_UNTIL := $(call on_command_line,UNTIL)
export KABLATE_MAX_SEEDS := $(call on_command_line,MAX_SEEDS)
export KABLATE_JOBS := $(call on_command_line,JOBS)
export KABLATE_LOOK := $(call on_command_line,LOOK)
override TUNING := $(call on_command_line,TUNE)
# As text (lib/literal.mk): a '$' or a '#' in one of them is none of make's.
$(foreach v,RETRY NAME STUDY ALL FULL A B FILE PEER PORT FROM PROMPT TOKENS KCONFIG_SEED KILLS SEED WHAT STEP CELL TO TASKS LIMIT,\
  $(eval override export $(v) := $$(call on_command_line,$(v))))
include lib/literal.mk

override STEP_GOALS := $(basename $(notdir $(wildcard gpt2/steps/*.config)))
override STEPS := $(filter $(STEP_GOALS),$(MAKECMDGOALS))
# Said before anything runs: make itself would first do the goals before the one that it does not know, and take a step with
# overrides for a variable.
override NO_STEPS := $(filter-out $(STEP_GOALS),$(filter $(addsuffix %,A B C D E F G H I J K L M N O P Q R S T U V W X Y Z),\
  $(MAKECMDGOALS)))
override OVERRIDDEN := $(foreach v,$(.VARIABLES),$(if $(findstring @,$(v)),$(filter-out automatic,$(origin $(v)))))
ifneq (,$(strip $(NO_STEPS)))
$(error there is no step $(firstword $(NO_STEPS)); try: make list-steps)
endif
ifneq (,$(strip $(OVERRIDDEN)))
$(error a step with overrides is no goal; try: put it into ABLATION_STEPS in make menuconfig, as STEP@SYMBOL=VALUE)
endif

##@ Run a study
.PHONY: run
# make -n: a recipe that calls make would really run
override ONLY_LOOK := $(findstring n,$(filter-out -%,$(firstword $(MAKEFLAGS))))
ifneq (,$(ONLY_LOOK))
run: plan
else
run: cells ## plan the configured study, run the cells that are missing, report
	$(Q)$(PYTHON) -m scripts.report $(STEPS)
endif

# Under UNTIL=decided the last rule of the plan's makefile calls this again for the next block of seeds.
.PHONY: cells tune-lr
ifneq (,$(ONLY_LOOK))
cells tune-lr: plan
else
cells: $(SETUP) ## run the cells that are missing, without a report
	$(Q)cells=$$($(PYTHON) -m scripts.plan --write $(reasons) $(if $(TUNING),--tune) $(STEPS)) && \
	$(MAKE) --no-print-directory -f lib/literal.mk -f "$$cells"

tune-lr: $(SETUP) ## sweep the learning rate of every step alike, then run and compare the steps at their best one too
	$(Q)$(MAKE) --no-print-directory cells TUNE=1
	$(Q)$(MAKE) --no-print-directory run
endif

# Programs of their own, scripts/NAME.py: a goal is a name here and a line that says what it does. Steps that stand beside one
# of the first group are its arguments.
override STEP_TOOLS := plan estimate report check show bench-steps bench-train bench-attention bench-decode bench-ranks \
  compile-matrix
override TOOLS := fim curvature routing lm-eval export frontier ladder browse data randconfig diffconfig torture defects claims docs diagrams
.PHONY: $(STEP_TOOLS) $(TOOLS)
$(STEP_TOOLS) $(TOOLS): $(SETUP)
	$(Q)$(PYTHON) -m scripts.$(subst -,_,$@) $(if $(filter $@,$(STEP_TOOLS)),$(STEPS))

# make V3 runs V3; make plan V3 and make check V3 only look at it.
.PHONY: $(STEP_GOALS)
$(STEP_GOALS): $(if $(filter slurm% cells tune-lr sample $(STEP_TOOLS) $(filter-out data,$(TOOLS)),$(MAKECMDGOALS)),,run)
	@:

plan: ## list the study's cells, their state, and why each would run
estimate: ## say what the study takes on 1, 4 and 8 GPUs, and the seeds its margin needs (ALL=1 tries every step)
report: ## print the report of what is on disk and write it as md, csv, json, html and png
check: ## prove every architecture of the study on the CPU (STUDY=name STEP="V3@RA_R=8", ALL=1 every step, FULL=1 real depth)
show: ## say what a step is: formula, symbols, parameters, cache (make show V3, or STEP=V3@RA_R=8)
data: ## prepare the configured data set, or check the one that is there

.PHONY: slurm slurm-status slurm-cancel
slurm: ## submit the missing cells of the study to a Slurm cluster, and the report after them
slurm-status: ## say for each cell how its job stands
slurm-cancel: ## take the study's jobs out of the queue; cells that run save
slurm slurm-status slurm-cancel: $(SETUP)
	$(Q)$(PYTHON) -m scripts.slurm $(patsubst slurm-%,%,$(@:slurm=slurm-submit)) $(STEPS)

.PHONY: pack unpack
pack: ## put the study's finished cells, without weights, into one small archive (FILE=name.tar.xz)
unpack: ## add the cells of such an archive (FILE=name.tar.xz) to the study; they then count as done
pack unpack: $(SETUP)
	$(Q)$(PYTHON) -m scripts.archive $@

##@ Look at what came of it
browse: ## index the reports of all studies and serve them on this machine (PORT=8000)
frontier: ## draw validation loss against cache bytes and decoding speed (FILE=what make bench-decode kept, or several)
ladder: ## say how effects change with the size of the model (FROM="folder folder ...", each with a report.json)
lm-eval: ## evaluate finished cells on tasks (TASKS=arc_easy,hellaswag LIMIT=100 CELL=one or several, default: all)
export: ## write a finished cell for Hugging Face's transformers: CELL=name-or-folder TO=folder
fim: ## Fisher metrics of the attention of the study's finished cells, with the spread over seeds
curvature: ## eigenvalues and trace of the Hessian of the loss, of the study's finished cells
routing: ## whether a token's shift, or its router's choice, tells what it gains by the full path
.PHONY: sample
sample: $(SETUP) ## write text with a finished cell: make sample V0 PROMPT="def main" TOKENS=200
	$(Q)$(PYTHON) gpt2/sample.py $(STEPS)

##@ Configure
defconfig-%: override export KABLATE_DEFCONFIG = $*
defconfig-%: $(SETUP) ## write .config from a study, with fragments: defconfig-gpt2-ra-ablation+tiny
	$(Q)$(PYTHON) -m scripts.kconfig defconfig "$$KABLATE_DEFCONFIG"

override KCONFIG_GOALS := menuconfig nconfig oldconfig olddefconfig listnewconfig savedefconfig
.PHONY: $(KCONFIG_GOALS)
menuconfig: ## edit .config in a menu
nconfig: ## the same as menuconfig
oldconfig: ## ask for the values of symbols that are new since .config was written
olddefconfig: ## give those symbols their defaults
listnewconfig: ## list them
savedefconfig: ## write .config back to its study in minimal form (NAME=study for another)
$(KCONFIG_GOALS): $(SETUP)
	$(Q)$(PYTHON) -m scripts.kconfig $@

randconfig: ## write .config with random values, but for what STUDY=name sets (KCONFIG_SEED=number: the same again)
diffconfig: ## compare two configurations: A=study-or-file B=study-or-file (default: .config's study and .config)

.PHONY: list-defconfigs list-steps
list-defconfigs: ## the studies and fragments there are
list-steps: ## the steps there are
list-defconfigs list-steps:
	$(Q)$(ANY_PYTHON) -m scripts.listing $(@:list-%=%)

##@ Develop
.PHONY: setup
setup: $(SETUP) ## create ./.venv with the pinned requirements
$(VENV)/.stamp: pyproject.toml requirements.txt constraints.txt
	$(Q)$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed.")'
	$(Q)echo "setting up $(VENV) (some minutes, once)" && $(PYTHON3) -m venv $(VENV)
	$(Q)$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(Q)touch $@

.PHONY: test
test: $(SETUP) ## run the tests (no network, no GPU, under 10 minutes on 2 cores)
	$(Q)$(PYTHON) -m pytest

defects: ## plant known defects and count who refuses them: a dry run, make check, make test (FILE=name.json)
torture: ## try to lose results: WHAT="kills disk hang clock damage fuzz random", or some (KILLS=200: all, in full)

.PHONY: lint
lint: $(SETUP) ## run ruff and mypy
	$(Q)$(PYTHON) -m ruff check .
	$(Q)$(PYTHON) -m mypy

bench-steps: ## time and peak memory of a training step of every step, relative to the baseline
bench-train: ## training speed, MFU, memory and kernels beside a peer model (PEER=/path/model.py, FILE=name.json)
bench-attention: ## the attention module alone, eager and compiled, beside the designs that lost (FILE=name.json)
bench-decode: ## time to first token, decoding speed and memory of every kind of cache (FILE=name.json keeps them)
bench-ranks: ## what several GPUs gain for one step, by the size of what they exchange in one go (FILE=name.json)
compile-matrix: ## prove that torch.compile makes whole programs of every step, in all phases (FILE=name.json)

.PHONY: bench-check bench-overhead bench-stats
bench-check: ## time make check on gpt2-ra-ablation
bench-overhead: ## seconds that each finished cell of the study spent outside its budget
bench-stats: ## simulate the statistics: coverage, false wins of a study and of UNTIL=decided, seeds it saves
bench-check bench-overhead bench-stats: $(SETUP)
	$(Q)$(PYTHON) -m scripts.bench $(@:bench-%=%)

claims: ## rebuild docs/claims.md from docs/claims.toml, the tests and the reports in docs/results
docs: ## build the manual as a site, with every link and anchor checked, and print where its first page is
diagrams: ## draw the pictures of the docs from built models and committed results

##@ Other
.PHONY: doctor
doctor: ## say what of this machine the configured study needs, whether it is there, and what to do
	$(Q)$(ANY_PYTHON) -m scripts.doctor

.PHONY: clean
clean: ## remove caches and the built manual; results and .config stay
	$(Q)rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis _site
	$(Q)find lib gpt2 scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: mrproper
mrproper: clean ## clean, and remove .config and .venv; results stay
	$(Q)rm -rf .config .config.old $(VENV)

.PHONY: help
help: ## this list
	$(Q)$(ANY_PYTHON) -m scripts.listing goals
