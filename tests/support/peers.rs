//! Where the real servers are: put there by `tests/peers/fetch` and `tests/peers/build`.

use std::path::PathBuf;

fn folder() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("DYNAMO_METRICS_PEERS").unwrap_or_else(|| {
        let cache = from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")));
        cache.expect("HOME is set").join("dynamo-metrics/peers")
    })
}

/// A program that `make test` always provides.
pub fn program(name: &str) -> PathBuf {
    let path = folder().join("bin").join(name);
    assert!(path.exists(), "{} is missing: run tests/peers/fetch", path.display());
    path
}

/// The Python interpreter that speaks OTLP.
pub fn python() -> PathBuf {
    let path = folder().join("venv/bin/python");
    assert!(path.exists(), "{} is missing: run tests/peers/fetch", path.display());
    path
}

/// A program that takes minutes to build, so that a developer may lack it: then the test says so and passes, unless
/// `DYNAMO_METRICS_REQUIRE_PEERS` is set, as it is in CI.
pub fn built(name: &str) -> Option<PathBuf> {
    let path = folder().join("bin").join(name);
    let required = std::env::var_os("DYNAMO_METRICS_REQUIRE_PEERS").is_some_and(|value| !value.is_empty());
    assert!(path.exists() || !required, "{} is missing: run make peers", path.display());
    if path.exists() {
        return Some(path);
    }
    println!("left out: no {name} ({}); make peers builds it", path.display());
    None
}
