//! The folder that workers on a developer's machine register in.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use tokio::task::AbortHandle;

use super::Bridge;

/// A folder, and an owner who touches everything in it.
pub struct Store {
    pub path: PathBuf,
    owner: Option<AbortHandle>,
    _root: TempDir,
}

impl Store {
    /// A folder that is not there yet.
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        Self { path: root.path().join("store"), owner: None, _root: root }
    }

    /// By sub-folder and name.
    pub fn write(&self, file: &str, content: &[u8]) {
        let path = self.path.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// An entry of etcd's, under the name that it has as a file.
    pub fn register(&self, (key, value): (String, String)) -> String {
        let mut parts = key.splitn(3, '/');
        let folder = [parts.next().unwrap(), parts.next().unwrap()].join("/");
        let file = format!("{folder}/{}", parts.next().unwrap().replace('/', "%2F"));
        self.write(&file, value.as_bytes());
        file
    }

    /// What a whole Dynamo 1.6.1 left: two workers with two helpers, their channels and event sources.
    pub fn of_a_release(&self) {
        self.captured("1.6.1-file");
    }

    /// What programs of it left that are routers and no engines: some with a model card.
    pub fn of_its_routers(&self) {
        self.captured("1.6.1-file-routers");
    }

    fn captured(&self, fixture: &str) {
        let fixture = format!("{}/tests/fixtures/{fixture}/files.json", env!("CARGO_MANIFEST_DIR"));
        let captured: serde_json::Value = serde_json::from_slice(&fs::read(fixture).unwrap()).unwrap();
        for file in captured["files"].as_array().unwrap() {
            self.write(file["file"].as_str().unwrap(), file["content"].as_str().unwrap().as_bytes());
        }
    }

    /// Its owners run and touch their files.
    pub fn resume(&mut self) {
        self.resume_by(SystemTime::now);
    }

    /// The same by their own clock.
    pub fn resume_by(&mut self, clock: fn() -> SystemTime) {
        let path = self.path.clone();
        let owner = tokio::spawn(async move {
            loop {
                touch(&path, clock());
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
        self.owner = Some(owner.abort_handle());
    }

    /// Its owners were killed.
    pub fn abandon(&mut self) {
        self.owner.take().unwrap().abort();
    }

    /// To which an owner who does not touch for so long is gone.
    pub async fn bridge(&self, file_ttl: &str) -> Bridge {
        Bridge::finding(&["--file-kv", self.path.to_str().unwrap(), "--file-ttl", file_ttl], &[]).await
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(owner) = &self.owner {
            owner.abort();
        }
    }
}

fn touch(path: &Path, now: SystemTime) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            touch(&entry.path(), now);
        } else if let Ok(file) = File::options().write(true).open(entry.path()) {
            file.set_modified(now).unwrap();
        }
    }
}
