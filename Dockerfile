FROM rust:1.95-slim-bookworm AS build
WORKDIR /dynamo-metrics
COPY . .
RUN cargo build --release --locked --bins

# glibc and nothing that an intruder could run.
FROM gcr.io/distroless/cc-debian12:nonroot AS programs
COPY --from=build /dynamo-metrics/target/release/metrics /dynamo-metrics/target/release/mock_worker /usr/local/bin/
USER 65532:65532

# Without a health check: it answers nobody.
FROM programs AS mock-worker
ENTRYPOINT ["/usr/local/bin/mock_worker"]

FROM programs
EXPOSE 9091
# Whether the bridge is ready: GET /readyz.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 CMD ["/usr/local/bin/metrics", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/metrics"]
