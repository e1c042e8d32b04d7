//! How a mock worker is found beside NATS: entries in etcd, or files in a folder on a machine without any server.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant, SystemTime};

use tokio::time::MissedTickBehavior;
use tracing::warn;

use super::{MockConfig, MockError};
use crate::source::etcd;

/// As often as Dynamo does.
const TOUCH_INTERVAL: Duration = Duration::from_secs(3);

/// Keeps entries, which are key paths and values, until `shutdown`; calls `registered` when all that there are are there.
pub(super) async fn hold(
    config: &MockConfig,
    entries: &[(String, String)],
    registered: impl FnOnce(),
    shutdown: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), MockError> {
    if entries.is_empty() {
        registered();
        shutdown.await;
        return Ok(());
    }
    if config.etcd.is_given() {
        etcd::hold(&config.etcd, entries, registered, shutdown).await?;
        return Ok(());
    }
    let folder = config.places.file_kv.clone().unwrap_or_else(|| std::env::temp_dir().join("dynamo_store_kv"));
    let refused = |source| MockError::Folder { folder: folder.display().to_string(), source };
    let files = Files::write(&folder, entries).map_err(refused)?;
    registered();
    files.touch_until(shutdown).await;
    Ok(())
}

/// Files in the folder. They are removed when this is dropped.
struct Files(Vec<PathBuf>);

impl Files {
    /// A file is whole from the moment that it has its name.
    fn write(folder: &Path, entries: &[(String, String)]) -> io::Result<Self> {
        let mut files = Self(Vec::new());
        let mut touched = Instant::now();
        for (path, value) in entries {
            let (kind, name) = split(path);
            let folder = folder.join(kind);
            std::fs::create_dir_all(&folder)?;
            let (unfinished, file) = (folder.join(format!(".tmp_{name}")), folder.join(&name));
            std::fs::write(&unfinished, value)?;
            std::fs::rename(&unfinished, &file)?;
            files.0.push(file);
            // On a busy machine thousands take longer than the first of them live.
            if touched.elapsed() >= TOUCH_INTERVAL {
                files.touch();
                touched = Instant::now();
            }
        }
        Ok(files)
    }

    async fn touch_until(&self, shutdown: Pin<&mut impl Future<Output = ()>>) {
        let touch = async {
            let mut ticks = tokio::time::interval(TOUCH_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                self.touch();
            }
        };
        tokio::select! {
            () = shutdown => {}
            () = touch => {}
        }
    }

    fn touch(&self) {
        for path in &self.0 {
            let file = std::fs::File::options().append(true).open(path);
            if let Err(error) = file.and_then(|file| file.set_modified(SystemTime::now())) {
                warn!("{} was not touched: {error}", path.display());
            }
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = std::fs::remove_file(path) {
                warn!("{} was not removed: {error}", path.display());
            }
        }
    }
}

/// Sub-folder and file name of a key: `v1/instances` and the rest, percent-encoded as 1.6 does.
fn split(path: &str) -> (&str, String) {
    let end = path.match_indices('/').nth(1).map_or(path.len(), |(end, _)| end);
    let rest = path[end..].trim_start_matches('/');
    let encoded = rest.bytes().map(|byte| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    });
    (&path[..end], encoded.collect())
}
