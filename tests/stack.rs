//! What `docker-compose.yml` and the files that it mounts promise, as they are written; `stack/run` brings them up.

use std::collections::BTreeSet;

use crate::support::documents::read;

/// Where nothing is set, nothing is missing; and an empty variable is an unset one there too.
#[test]
fn what_the_stack_is_made_of_needs_no_variable() {
    for file in ["docker-compose.yml", "otel-config/collector.yaml"] {
        let text = read(file);
        let variables: Vec<_> = text.split("${").skip(1).map(|rest| rest.split_once('}').unwrap().0).collect();
        assert!(!variables.is_empty(), "{file}");
        for variable in variables {
            assert!(variable.split_once(":-").is_some_and(|(_, default)| !default.is_empty()), "{file}: {variable}");
        }
    }
}

/// What Compose publishes: `ADDRESS:PORT:PORT-INSIDE`.
fn published(compose: &str) -> Vec<&str> {
    let mut published = Vec::new();
    let mut is_list = false;
    for line in compose.lines().map(str::trim) {
        is_list = line.starts_with("ports:") || (is_list && line.starts_with("- "));
        published.extend(line.split('"').skip(1).step_by(2).filter(|_| is_list));
    }
    published
}

#[test]
fn every_port_is_this_machines_alone_and_can_be_moved() {
    let (compose, readme) = (read("docker-compose.yml"), read("README.md"));
    let published = published(&compose);
    let mut ports = BTreeSet::new();
    for port in &published {
        let inside = port.strip_prefix("127.0.0.1:${").and_then(|rest| rest.split_once("}:"));
        let (outside, inside) = inside.unwrap_or_else(|| panic!("{port} is not on 127.0.0.1, or cannot be moved"));
        let (variable, default) = outside.split_once(":-").unwrap();
        assert_eq!(default, inside, "{port}");
        assert!(ports.insert((variable, default)), "{variable} moves two ports");
    }
    assert_eq!(ports.len(), compose.matches("ports:").count() + 2, "the Collector has three: {published:?}");
    assert!(!compose.contains("network_mode"), "that of the host would publish everything");
    for (variable, default) in [("PORT", "9091"), ("PROMETHEUS_PORT", "9090"), ("GRAFANA_PORT", "3000")] {
        assert!(ports.contains(&(variable, default)), "{variable}: {ports:?}");
        assert!(readme.contains(&format!("localhost:{default}")), "README.md names {default}");
    }
}

#[test]
fn grafana_knows_the_user_that_the_readme_names() {
    let compose = read("docker-compose.yml");
    let value = |key: &str| compose.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap().trim().to_owned();
    let [user, password] = ["GF_SECURITY_ADMIN_USER:", "GF_SECURITY_ADMIN_PASSWORD:"].map(value);
    assert!(
        read("README.md").contains(&format!("(http://localhost:3000, {user} / {password})")),
        "{user} / {password}"
    );
}

/// The number behind the first of these keys.
fn number(text: &str, key: &str) -> u64 {
    let (_, rest) = text.split_once(key).unwrap_or_else(|| panic!("no {key}"));
    let digits: String = rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

#[test]
fn what_departed_leaves_the_collector_after_three_pushes() {
    let (compose, collector) = (read("docker-compose.yml"), read("otel-config/collector.yaml"));
    assert_eq!(number(&compose, "METRIC_EXPIRATION:") * 1000, 3 * number(&compose, "OTEL_METRIC_EXPORT_INTERVAL:"));
    assert_eq!(number(&collector, "${env:METRIC_EXPIRATION:-"), 3 * 60, "the bridge pushes every 60 s by default");
}

#[test]
fn the_collector_listens_on_this_machine_alone_unless_it_is_told_otherwise() {
    let collector = read("otel-config/collector.yaml");
    let endpoints: Vec<_> = collector.lines().filter_map(|line| line.trim().strip_prefix("endpoint: ")).collect();
    let is_local = |endpoint: &&str| endpoint.starts_with("${env:") && endpoint.contains(":-127.0.0.1:");
    assert!(endpoints.iter().all(is_local) && endpoints.len() == 4, "{endpoints:?}");
}

#[test]
fn the_collector_takes_a_push_of_as_much_as_is_documented_and_refuses_what_does_not_fit_first() {
    let (collector, document) = (read("otel-config/collector.yaml"), read("docs/performance.md"));
    let limit = number(&collector, "max_recv_msg_size_mib:");
    assert!(document.contains(&format!("`otel-config/` accepts {limit} MiB")), "{limit}");
    let pipelines = collector.matches("receivers: [otlp]").count();
    assert_eq!(collector.matches("processors: [memory_limiter, ").count(), pipelines);
}
