//! A real nats-server of a test's own.

use std::path::Path;

use tempfile::TempDir;
use tokio::process::Command;

use super::{Program, eventually, peers};

/// Stopped when dropped.
pub struct Nats {
    server: Program,
    folder: TempDir,
    _streams: Option<TempDir>,
    options: Vec<String>,
    url: String,
}

impl Nats {
    pub async fn start() -> Self {
        Self::with_options(&[]).await
    }

    /// With further options of nats-server.
    pub async fn with_options(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        let (server, url) = serve(folder.path(), &options, "-1").await;
        Self { server, folder, _streams: None, options, url }
    }

    /// With a configuration file of that text.
    pub async fn configured(configuration: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("nats.conf");
        std::fs::write(&file, configuration).unwrap();
        let options = ["-c".to_owned(), file.to_str().unwrap().to_owned()];
        let (server, url) = serve(folder.path(), &options, "-1").await;
        Self { server, folder, _streams: None, options: options.to_vec(), url }
    }

    /// Gives it another configuration, for when it is started again.
    pub fn configure(&self, configuration: &str) {
        std::fs::write(self.folder.path().join("nats.conf"), configuration).unwrap();
    }

    /// Has it read another configuration, without a restart.
    pub async fn reconfigure(&mut self, configuration: &str) {
        let already = self.server.lines().len();
        self.configure(configuration);
        self.server.signal("-HUP").await;
        eventually("nats-server reloads", || async {
            let lines = self.server.lines_from(already);
            lines
                .iter()
                .any(|line| line.contains("Reloaded server configuration"))
                .then_some(())
                .ok_or(lines.join("\n"))
        })
        .await;
    }

    /// With `JetStream`, which a whole Dynamo wants.
    pub async fn with_streams() -> Self {
        let streams = tempfile::tempdir().unwrap();
        let nats = Self::with_options(&["-js", "-sd", streams.path().to_str().unwrap()]).await;
        Self { _streams: Some(streams), ..nats }
    }

    /// Its address, without credentials.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its address, with what stands before the `@`.
    pub fn url_of(&self, user: &str) -> String {
        self.url.replace("://", &format!("://{user}@"))
    }

    pub async fn client(&self) -> async_nats::Client {
        async_nats::connect(&self.url).await.unwrap()
    }

    /// Ends it as a crash does. `restart` brings it back.
    pub async fn kill(&mut self) {
        self.server.signal("-KILL").await;
        self.server.ended().await;
    }

    /// Starts it again where it was. Its port may be taken meanwhile: whoever has it is waited for.
    pub async fn restart(&mut self) {
        let port = self.url.rsplit_once(':').unwrap().1.to_owned();
        (self.server, self.url) = serve(self.folder.path(), &self.options, &port).await;
    }
}

/// The port is the server's own choice, and read from the file that it writes: nothing can take it in between.
async fn serve(folder: &Path, options: &[String], port: &str) -> (Program, String) {
    let mut command = Command::new(peers::program("nats-server"));
    command.args(["-a", "127.0.0.1", "-p", port, "--ports_file_dir"]).arg(folder).args(options);
    let server = Program::start(&mut command);
    let file = folder.join(format!("nats-server_{}.ports", server.id()));
    let url = eventually("nats-server tells its port", || async {
        let text = std::fs::read_to_string(&file).map_err(|error| format!("{error}\n{}", server.lines().join("\n")))?;
        let ports: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        ports["nats"][0].as_str().map(str::to_owned).ok_or(text)
    })
    .await;
    (server, url)
}
