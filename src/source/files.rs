//! What Dynamo processes registered in a folder: a file an entry, which its owner touches every few seconds.
//!
//! The folder is looked at again and again; a file is read when it is new or was touched. After a `kill -9` files stay where
//! they are, so that alive is what was touched lately.

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirEntry, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::registry::Registry;
use crate::config::duration;
use crate::fleet::{Reason, Standing};
use crate::throttle::Throttle;
use crate::wire::{MAX_MESSAGE, REGISTRATION_PREFIXES};

/// Time between two looks at the folder.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Living files at most; those beyond are left out. A machine that runs everything by itself has some dozens.
const MAX_FILES: usize = 100_000;
/// What Dynamo writes under such a name becomes an entry by being renamed.
const UNFINISHED: &str = ".tmp_";

/// The folder that stands in for etcd on a developer's machine.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Files")]
pub(crate) struct FileOptions {
    /// Folder that Dynamo's processes register in [default: dynamo_store_kv in the temporary folder]
    #[arg(long, env = "DYN_FILE_KV", value_name = "FOLDER")]
    file_kv: Option<PathBuf>,
    /// A registration that its owner has not touched for this long is gone; Dynamo touches every 3 s
    #[arg(long, default_value = "20s", value_name = "DURATION", value_parser = duration)]
    file_ttl: Duration,
}

/// Why the folder cannot be looked at. One line each, with what to change.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// It is there, and cannot be read.
    #[error("cannot read the folder {path}: {source}; check --file-kv [DYN_FILE_KV]")]
    Folder {
        /// As given.
        path: String,
        /// From the file system.
        source: io::Error,
    },
    /// A defect of the bridge itself.
    #[error("looking at a folder ended unexpectedly: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl FileOptions {
    /// Whether a folder is named.
    pub(crate) fn is_given(&self) -> bool {
        self.file_kv.is_some()
    }

    fn folder(&self) -> PathBuf {
        self.file_kv.clone().unwrap_or_else(|| std::env::temp_dir().join("dynamo_store_kv"))
    }
}

/// Tells the registry what is in the folder until `stop`. One that is missing is one that nobody has registered in yet.
///
/// # Errors
/// What is there at start is no folder, or may not be read. Later that is waited out.
pub(crate) async fn run(
    options: FileOptions,
    mut registry: Registry,
    stop: CancellationToken,
) -> Result<(), FilesError> {
    let mut folder = Folder::new(options.folder(), options.file_ttl);
    let (mut connected, mut looked) = (None, false);
    let mut trouble = Throttle::default();
    while !stop.is_cancelled() {
        let looking = tokio::task::spawn_blocking(move || {
            let look = folder.look(SystemTime::now);
            (folder, look)
        });
        let look;
        (folder, look) = looking.await?;
        let path = folder.path.display();
        let now = match look {
            Ok(look) => {
                for entry in &look.put {
                    registry.put(&entry.id, &entry.path, &entry.value, Standing::default(), None).await;
                }
                registry.remove_all(look.gone).await;
                for Unusable { file, reason, cause } in &look.left_out {
                    registry.reject(*reason, &file.to_string_lossy(), cause).await;
                }
                look.exists
            }
            Err(source) if !looked => return Err(FilesError::Folder { path: path.to_string(), source }),
            Err(error) => {
                if let Some(more_since_last) = trouble.due(Instant::now()) {
                    warn!(more_since_last, "Cannot read the folder {path}: {error}; trying again");
                } else {
                    debug!("Cannot read the folder {path}: {error}");
                }
                false
            }
        };
        looked = true;
        if connected != Some(now) {
            match now {
                true => info!("Reading registrations in {path}"),
                false if connected.is_none() => info!("No folder {path} yet; waiting for Dynamo to make it"),
                false => info!("Registrations in {path} cannot be read now"),
            }
            registry.connected(now).await;
            connected = Some(now);
        }
        stop.run_until_cancelled(tokio::time::sleep(LOOK_INTERVAL)).await;
    }
    Ok(())
}

/// The folder, and what was in it.
struct Folder {
    path: PathBuf,
    ttl: Duration,
    /// Living files that were read, by sub-folder and name.
    read: HashMap<String, Stamp>,
    /// Living files that cannot be used, [`MAX_FILES`] at most: each is told of once.
    left_out: HashSet<PathBuf>,
}

/// A file that has the same has the same content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    length: u64,
}

/// What is new since the look before.
#[derive(Debug, Default)]
struct Look {
    exists: bool,
    put: Vec<Entry>,
    gone: Vec<String>,
    left_out: Vec<Unusable>,
}

/// A living file that is no entry.
#[derive(Debug)]
struct Unusable {
    file: PathBuf,
    reason: Reason,
    cause: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    id: String,
    /// Key path in etcd's layout.
    path: String,
    /// Cut off where it is too long to be used.
    value: Vec<u8>,
}

impl Folder {
    fn new(path: PathBuf, ttl: Duration) -> Self {
        Self { path, ttl, read: HashMap::new(), left_out: HashSet::new() }
    }

    /// Blocks. A sub-folder that is missing is empty; after an error everything counts as being there still.
    ///
    /// In a large folder on a busy machine it takes long, and owners touch their files meanwhile. None is gone for that:
    /// a file is as old as it was when the look began, and a worker's card is looked at before its instance, so that one
    /// that is late never seems to have a card alone, as those do that are draining.
    fn look(&mut self, clock: impl Fn() -> SystemTime) -> io::Result<Look> {
        let (mut look, mut living, mut left_out) = (Look::default(), HashSet::new(), HashSet::new());
        let begun = clock();
        look.exists = exists(fs::read_dir(&self.path))?.is_some();
        for prefix in REGISTRATION_PREFIXES.into_iter().rev() {
            let Some(files) = exists(fs::read_dir(self.path.join(prefix)))? else { continue };
            for file in files {
                let file = file?;
                match self.examine(prefix, &file, (begun, clock()), living.len()) {
                    Ok(Some((id, entry))) => {
                        look.put.extend(entry);
                        living.insert(id);
                    }
                    Err(unusable) if left_out.len() < MAX_FILES => {
                        left_out.insert(unusable.file.clone());
                        look.left_out.push(unusable);
                    }
                    Ok(None) | Err(_) => {}
                }
            }
        }
        look.gone = self.read.keys().filter(|id| !living.contains(*id)).cloned().collect();
        self.read.retain(|id, _| living.contains(id));
        look.left_out.retain(|unusable| !self.left_out.contains(&unusable.file));
        self.left_out = left_out;
        Ok(look)
    }

    /// The id of a living entry, with its content where that may have changed.
    fn examine(
        &mut self,
        prefix: &str,
        file: &DirEntry,
        times: (SystemTime, SystemTime),
        living: usize,
    ) -> Result<Option<(String, Option<Entry>)>, Unusable> {
        let unusable = |reason, cause: &str| Unusable { file: file.path(), reason, cause: cause.to_owned() };
        let unreadable = |error: io::Error| unusable(Reason::Unreadable, &error.to_string());
        let Some(stamp) = stamp(file).map_err(unreadable)? else { return Ok(None) };
        let name = file.file_name();
        if name.to_string_lossy().starts_with(UNFINISHED) || !self.is_alive(stamp.modified, times) {
            return Ok(None);
        }
        let key = name.to_str().and_then(percent_decoded);
        let key = key.ok_or_else(|| unusable(Reason::Malformed, "its name is no key"))?;
        let id = [prefix, &name.to_string_lossy()].concat();
        if living >= MAX_FILES {
            return Err(unusable(Reason::TooManyEntries, &format!("there are more than {MAX_FILES}")));
        }
        if self.read.get(&id) == Some(&stamp) {
            return Ok(Some((id, None)));
        }
        let Some(value) = exists(content(&file.path())).map_err(unreadable)? else { return Ok(None) };
        self.read.insert(id.clone(), stamp);
        let entry = Entry { id: id.clone(), path: [prefix, &key].concat(), value };
        Ok(Some((id, Some(entry))))
    }

    /// Touched lately, as the look began. A clock that is ahead of the bridge's is as good as one that is behind.
    fn is_alive(&self, modified: SystemTime, (begun, now): (SystemTime, SystemTime)) -> bool {
        let apart = |one: SystemTime, other| one.duration_since(other).unwrap_or_default();
        apart(begun, modified) < self.ttl && apart(modified, now) < self.ttl
    }
}

/// `None` for what is no file, is gone again, or is not written yet.
fn stamp(file: &DirEntry) -> io::Result<Option<Stamp>> {
    let Some(metadata) = exists(file.metadata())? else { return Ok(None) };
    let stamp = Stamp { modified: metadata.modified()?, length: metadata.len() };
    Ok((metadata.is_file() && stamp.length > 0).then_some(stamp))
}

fn content(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    // One byte too many is as good as a gigabyte.
    File::open(path)?.take(MAX_MESSAGE as u64 + 1).read_to_end(&mut content)?;
    Ok(content)
}

fn exists<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// `None` for what is not percent-encoded UTF-8.
fn percent_decoded(name: &str) -> Option<String> {
    let (mut decoded, mut rest) = (Vec::new(), name.as_bytes());
    loop {
        match rest {
            [] => return String::from_utf8(decoded).ok(),
            [b'%', high, low, tail @ ..] => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                decoded.push(u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()?);
                rest = tail;
            }
            [b'%', ..] => return None,
            [byte, tail @ ..] => {
                decoded.push(*byte);
                rest = tail;
            }
        }
    }
}

#[cfg(test)]
mod tests;
