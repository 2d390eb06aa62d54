# make help lists what there is. Everything works from a fresh clone: what a
# target needs from the machine, it installs (tools/deps).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

# Where tools/deps puts a newer Node.js, and where Go usually is.
export PATH := $(CURDIR)/.cache/node/node_modules/node/bin:$(PATH):/usr/local/go/bin:/usr/sbin:/sbin
# One static binary: gVisor starts itself again from it in an empty root.
export CGO_ENABLED := 0
# We stamp the commit ourselves; git refuses a tree that another user owns. One
# set of flags for all: what was compiled for the binaries serves vet, linters
# and tests too.
export GOFLAGS := -buildvcs=false -trimpath $(GOFLAGS)

VERSION ?= $(shell git describe --tags --match 'v[0-9]*' 2>/dev/null | sed 's/^v//' | grep . || echo 0.1.0-dev)
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
# The engine's version is a constant of runtime/gvisor, so that every build has it.
LDFLAGS = -s -w -X github.com/cayhq/cay.Version=$(VERSION) -X github.com/cayhq/cay.Commit=$(COMMIT)

##@ Build

.PHONY: build
build: deps guest engine ## build bin/cay and bin/envd
	@mkdir -p bin
	@cp -p cmd/cay/guest/envd bin/envd
	@go build -ldflags '$(LDFLAGS)' -o bin/cay ./cmd/cay
	@echo "built bin/cay $(VERSION) ($(COMMIT)): $$(du -m --apparent-size bin/cay | cut -f1) MiB"

# The binaries inside every sandbox are part of the cay binary. Their content
# depends on the source only, so that their digest names a version of them.
# gVisor counts a process's memory in steps of 2 MiB: a heap that begins at an
# address by chance would touch more of them (envd/DESIGN.md, Memory).
.PHONY: guest
guest:
	@GOEXPERIMENT=norandomizedheapbase64 go build -ldflags '-s -w' -o cmd/cay/guest/envd ./cmd/envd
	@go build -ldflags '-s -w' -o cmd/cay/guest/init ./cmd/init

# The program that sandboxes are processes of, packed. It is compressed only
# when it has changed, for that takes longer than to build it.
.PHONY: engine
engine:
	@mkdir -p bin
	@[ -e bin/engine ] || echo "building: the first time compiles gVisor, which takes some minutes"
	@go build -ldflags '-s -w' -o cmd/engine/gofer/gofer ./cmd/gofer
	@go build -ldflags '-s -w' -o bin/engine ./cmd/engine
	@sum=$$(sha256sum <bin/engine); \
	if [ ! -e cmd/cay/guest/engine.gz ] || [ "$$sum" != "$$(cat bin/engine.sum 2>/dev/null)" ]; then \
		gzip -6 -n -c bin/engine >cmd/cay/guest/engine.gz.new; \
		mv cmd/cay/guest/engine.gz.new cmd/cay/guest/engine.gz; \
		echo "$$sum" >bin/engine.sum; \
	fi

.PHONY: build-arm64
build-arm64: export GOARCH := arm64
build-arm64: deps ## build bin/linux-arm64/cay and envd
	@mkdir -p bin/linux-arm64
	@GOEXPERIMENT=norandomizedheapbase64 go build -ldflags '-s -w' -o bin/linux-arm64/envd ./cmd/envd
	@go build -ldflags '-s -w' -o bin/linux-arm64/init ./cmd/init
	@go build -ldflags '-s -w' -o bin/linux-arm64/gofer ./cmd/gofer
	@printf '{"Replace":{"cmd/engine/gofer/gofer":"bin/linux-arm64/gofer"}}' >bin/linux-arm64/overlay.json
	@go build -overlay bin/linux-arm64/overlay.json -ldflags '-s -w' -o bin/linux-arm64/engine ./cmd/engine
	@gzip -6 -n -f bin/linux-arm64/engine
	@printf '{"Replace":{"cmd/cay/guest/envd":"bin/linux-arm64/envd","cmd/cay/guest/init":"bin/linux-arm64/init","cmd/cay/guest/engine.gz":"bin/linux-arm64/engine.gz"}}' >bin/linux-arm64/overlay.json
	@go build -overlay bin/linux-arm64/overlay.json -ldflags '$(LDFLAGS)' -o bin/linux-arm64/cay ./cmd/cay
	@rm bin/linux-arm64/overlay.json
	@echo "built bin/linux-arm64/cay $(VERSION) ($(COMMIT))"

.PHONY: generate
generate: deps-test ## write everything in internal/gen from spec/ and the SQL
	@for s in $$(git ls-files -co --exclude-standard '*/generate.sh'); do echo "$$s"; bash "$$s"; done

.PHONY: check-generated
check-generated: deps-test ## fail if internal/gen is not what the sources make
	@old=$$(mktemp -d); trap 'rm -rf "$$old"' EXIT; \
	cp -a internal/gen "$$old/gen"; \
	$(MAKE) generate >"$$old/log" 2>&1 || { cat "$$old/log"; exit 1; }; \
	diff -ru "$$old/gen" internal/gen || { echo; echo "internal/gen was not what its sources make; it is now: commit it."; exit 1; }

.PHONY: clean
clean: ## remove what was built; caches of Go and npm stay
	@rm -rf bin cmd/cay/guest/envd cmd/cay/guest/init cmd/cay/guest/engine.gz cmd/engine/gofer/gofer

##@ Use

.PHONY: quickstart
quickstart: deps-run build ## start Cay and run a first program with the official SDK
	@examples/quickstart/run

##@ Check

.PHONY: test
test: deps-test ## everything that must pass before a commit
	@go run ./internal/check

.PHONY: test-nightly
test-nightly: deps-test ## the same with more seeds, repetitions and fuzzing: up to 90 minutes
	@go run ./internal/check -nightly

.PHONY: lint
lint: deps .cache/golangci-lint ## the linters of .golangci.yml
	@.cache/golangci-lint run

# Built once from its own module, so that its version is in the repository.
.cache/golangci-lint: tools/golangci-lint/go.mod tools/golangci-lint/go.sum
	@echo "building golangci-lint: once, a few minutes"
	@mkdir -p .cache
	@go build -C tools/golangci-lint -ldflags '-s -w' -o ../../.cache/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	@touch $@

.PHONY: bench
bench: deps-run build ## measure, beside yardsticks of the same run: bench/results
	@go run -ldflags '$(LDFLAGS)' ./bench

##@ Machine

.PHONY: deps deps-run deps-test
deps: ## check what a build needs
	@tools/deps build
deps-run: ## install what running needs
	@tools/deps build run
deps-test: ## install what the tests need
	@tools/deps build run test

.PHONY: help
help: ## this list
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } /^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
