//! The programs of this package.

use tokio::process::Command;

use super::{Exposition, Program, Via, eventually};

/// The bridge, as a user starts it, on a port of its own.
pub struct Bridge {
    pub program: Program,
    pub url: String,
}

impl Bridge {
    /// Against that NATS server and the default target, with further options. Scrapes ten times a second, so that tests
    /// are quick.
    pub async fn start(nats: &str, options: &[&str]) -> Self {
        let target = ["--namespace", "dynamo", "--component", "backend", "--endpoint", "generate"];
        Self::watching(nats, &[&target[..], options].concat(), &[]).await
    }

    /// Of the default target, with an environment, pushing to that address by OTLP. Pushes often, unless the environment
    /// says how often.
    pub async fn pushing(nats: &str, to: &str, via: Via, environment: &[(&str, &str)]) -> Self {
        let often = [("OTEL_METRIC_EXPORT_INTERVAL", "200"), ("OTEL_BSP_SCHEDULE_DELAY", "200")];
        let target = ["--component", "backend", "--endpoint", "generate"];
        let push = ["--otlp-endpoint", to, "--otlp-protocol", via.protocol()];
        Self::watching(nats, &[target, push].concat(), &[&often[..], environment].concat()).await
    }

    /// With options for the target, and an environment.
    pub async fn watching(nats: &str, options: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::finding(&[&["--nats-server", nats], options].concat(), environment).await
    }

    /// With options that say where workers are found, and an environment.
    pub async fn finding(options: &[&str], environment: &[(&str, &str)]) -> Self {
        // For the HTTP client of `metrics`.
        dynamo_metrics::process::install_crypto();
        let common = ["--host", "127.0.0.1", "--port", "0"];
        let fast = [["--poll-interval", "100ms"], ["--worker-ttl", "2s"]];
        let fast = fast.into_iter().filter(|[option, _]| !options.contains(option)).flatten().collect::<Vec<_>>();
        let mut command = command(env!("CARGO_BIN_EXE_metrics"), &[&common[..], &fast, options].concat(), environment);
        let mut program = Program::start(&mut command);
        let url = program
            .line("its address", |line| {
                let (_, url) = line.split_once("Listening on ")?;
                Some(url.split('"').next()?.to_owned())
            })
            .await;
        Self { program, url }
    }

    /// One pull.
    pub async fn metrics(&self) -> Exposition {
        let response = reqwest::get(format!("{}/metrics", self.url)).await.unwrap();
        assert_eq!(response.status(), 200);
        Exposition::parse(response.text().await.unwrap())
    }

    /// Pulls until `find` finds something.
    pub async fn eventually<T>(&self, what: &str, find: impl Fn(&Exposition) -> Option<T>) -> T {
        eventually(what, || async {
            let exposition = self.metrics().await;
            find(&exposition).ok_or_else(|| {
                let interesting = |line: &&str| !line.starts_with('#') && !line.contains("_bucket");
                exposition.text.lines().filter(interesting).collect::<Vec<_>>().join("\n")
            })
        })
        .await
    }

    /// Pulls until a series has a value.
    pub async fn shows(&self, name: &str, labels: &[(&str, &str)], value: f64) -> Exposition {
        self.eventually(&format!("{name}{labels:?} is {value}"), |metrics| {
            (metrics.value(name, labels) == Some(value)).then(|| metrics.clone())
        })
        .await
    }

    /// Pulls until no series of that name and with those labels is left.
    pub async fn loses(&self, name: &str, labels: &[(&str, &str)]) -> Exposition {
        self.eventually(&format!("{name}{labels:?} is gone"), |metrics| {
            metrics.values(name, labels).is_empty().then(|| metrics.clone())
        })
        .await
    }
}

/// What the bridge says, with those options and an environment, before it gives up.
pub async fn refusal(options: &[&str], environment: &[(&str, &str)]) -> String {
    let options = [&["--host", "127.0.0.1", "--port", "0"], options].concat();
    let mut program = Program::start(&mut command(env!("CARGO_BIN_EXE_metrics"), &options, environment));
    assert_eq!(program.ended().await.code(), Some(1));
    let lines = program.lines();
    let errors: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix("error: ")).collect();
    assert_eq!(errors.len(), 1, "{lines:?}");
    errors[0].to_owned()
}

/// Mock workers on NATS with further options, serving: those of 0.3, which say all of their load in STATS, unless the
/// options say otherwise.
pub async fn mock_worker(nats: &str, options: &[&str]) -> Program {
    let release = if options.contains(&"--release") { &[][..] } else { &["--release", "0.3"] };
    serving(&[&["--nats-server", nats], release, options].concat()).await
}

/// Mock workers with those options alone, serving.
pub async fn serving(options: &[&str]) -> Program {
    let mut command = command(env!("CARGO_BIN_EXE_mock_worker"), options, &[]);
    let mut program = Program::start(&mut command);
    program.says("Serving ").await;
    program
}

/// Nothing of the developer's own environment reaches the programs.
pub fn command(program: &str, options: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(program);
    command.env_clear().envs(environment.iter().copied()).args(options);
    command
}
