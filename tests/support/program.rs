//! A program under test, or a peer: started, read line by line, stopped.

use std::ffi::OsStr;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::{DEADLINE, eventually};

/// Killed when dropped.
pub struct Program {
    name: String,
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Program {
    pub fn start(command: &mut Command) -> Self {
        let name = command.as_std().get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        let lines = Arc::default();
        let readers = vec![
            tokio::spawn(read(child.stdout.take().expect("piped"), Arc::clone(&lines))),
            tokio::spawn(read(child.stderr.take().expect("piped"), Arc::clone(&lines))),
        ];
        Self { name, child, lines, readers }
    }

    /// What it wrote so far, on both streams.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// The same, without the first `start` lines.
    pub fn lines_from(&self, start: usize) -> Vec<String> {
        self.lines.lock().unwrap()[start..].to_vec()
    }

    /// How many lines above the level of debug hold `text`.
    pub fn count(&self, text: &str) -> u64 {
        let is_one = |line: &&String| line.contains(text) && !line.contains(" DEBUG ");
        self.lines.lock().unwrap().iter().filter(is_one).count() as u64
    }

    /// Waits for a line that `find` finds something in.
    pub async fn line<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let (name, lines, child) = (&self.name, &self.lines, &mut self.child);
        eventually(&format!("{name} writes {what}"), || {
            let lines = lines.lock().unwrap().clone();
            let found = lines.iter().find_map(|line| find(line)).ok_or_else(|| told(&lines));
            if let (Err(written), Ok(Some(status))) = (&found, child.try_wait()) {
                panic!("{name} ended ({status}) without writing {what}:\n{written}");
            }
            async { found }
        })
        .await
    }

    /// Waits for a line that holds `text`.
    pub async fn says(&mut self, text: &str) -> String {
        self.line(text, |line| line.contains(text).then(|| line.to_owned())).await
    }

    pub fn id(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Waits for its end, and for its last line.
    pub async fn ended(&mut self) -> ExitStatus {
        let status = tokio::time::timeout(DEADLINE, self.child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("{} does not end:\n{}", self.name, told(&self.lines()))).unwrap();
        for reader in self.readers.drain(..) {
            reader.await.unwrap();
        }
        status
    }

    /// As Ctrl-C does.
    pub async fn interrupt(&mut self) -> ExitStatus {
        self.signal("-INT").await;
        self.ended().await
    }

    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    pub async fn signal(&self, signal: impl AsRef<OsStr>) {
        let status = Command::new("kill").arg(signal).arg(self.id().to_string()).status().await.unwrap();
        assert!(status.success());
    }
}

/// The last lines, and not all of those that are long.
pub fn told(lines: &[String]) -> String {
    let last = &lines[lines.len().saturating_sub(40)..];
    let shortened = last.iter().map(|line| line.chars().take(400).collect::<String>());
    shortened.collect::<Vec<_>>().join("\n")
}

async fn read(stream: impl AsyncRead + Unpin, lines: Arc<Mutex<Vec<String>>>) {
    let mut stream = BufReader::new(stream).lines();
    while let Ok(Some(line)) = stream.next_line().await {
        lines.lock().unwrap().push(line);
    }
}
