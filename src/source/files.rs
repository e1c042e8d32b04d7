//! What Dynamo processes registered in a folder: a file an entry, which its owner touches every few seconds.
//!
//! The folder is looked at again and again; a file is read when it is new or was touched. After a `kill -9` files stay where
//! they are, so that alive is what was touched lately: between two looks, by whatever clock. Only of a file that is seen
//! for the first time the owner's clock has to tell.

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, DirEntry, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::registry::Registry;
use crate::config::duration;
use crate::fleet::{Reason, Standing};
use crate::throttle::{Link, Throttle};
use crate::wire::{MAX_MESSAGE, REGISTRATION_PREFIXES};

/// Time between two looks at the folder.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Living files at most; those beyond are left out. A machine that runs everything by itself has some dozens.
const MAX_FILES: usize = 100_000;
/// Files remembered at most, dead ones included; of those beyond, clocks have to tell again.
const MAX_REMEMBERED: usize = 2 * MAX_FILES;
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
    let (mut link, mut clocks) = (Link::default(), Throttle::default());
    let (mut connected, mut existed) = (None, false);
    while !stop.is_cancelled() {
        let looking = tokio::task::spawn_blocking(move || {
            let look = folder.look(Now::read);
            (folder, look)
        });
        // On the disk of another machine a look may take for ever.
        let Some(ended) = stop.run_until_cancelled(looking).await else { return Ok(()) };
        let look;
        (folder, look) = ended?;
        let path = folder.path.display();
        let (exists, trouble) = match look {
            Ok(look) => {
                if let Some(skew) = look.skew
                    && let Some(more_since_last) = clocks.due(Instant::now())
                {
                    warn!(
                        more_since_last,
                        "Registrations in {path} are touched by a clock that is {skew} this machine's: do the clocks \
                         agree? Their owners are taken to be alive all the same; Dynamo's own processes go by the clock"
                    );
                }
                let exists = look.exists;
                tell(&mut registry, look).await;
                (exists, (existed && !exists).then(|| "it is gone".to_owned()))
            }
            Err(source) if connected.is_none() => {
                return Err(FilesError::Folder { path: path.to_string(), source });
            }
            Err(error) => (false, Some(error.to_string())),
        };
        match trouble {
            Some(cause) => {
                if let Some(more_since_last) = link.troubled(Instant::now()) {
                    warn!(more_since_last, "Cannot read the folder {path}: {cause}; trying again");
                }
            }
            None if exists && link.is_well() => info!("Reading registrations in {path}"),
            None if connected.is_none() => info!("No folder {path} yet; waiting for Dynamo to make it"),
            None => {}
        }
        if connected != Some(exists) {
            registry.connected(exists).await;
            connected = Some(exists);
        }
        existed |= exists;
        stop.run_until_cancelled(tokio::time::sleep(LOOK_INTERVAL)).await;
    }
    Ok(())
}

async fn tell(registry: &mut Registry, look: Look) {
    for entry in &look.put {
        registry.put(&entry.id, &entry.path, &entry.value, Standing::default(), None).await;
    }
    registry.remove_all(look.gone).await;
    for Unusable { file, reason, cause } in &look.left_out {
        registry.reject(*reason, &file.to_string_lossy(), cause).await;
    }
}

/// One moment, by the clock that owners touch their files by, and by one that nobody sets.
#[derive(Debug, Clone, Copy)]
struct Now {
    wall: SystemTime,
    monotonic: Instant,
}

impl Now {
    fn read() -> Self {
        Self { wall: SystemTime::now(), monotonic: Instant::now() }
    }
}

/// How far the clock that a file is touched by is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Skew {
    Behind(Duration),
    Ahead(Duration),
}

impl Skew {
    fn of(modified: SystemTime, now: SystemTime) -> Self {
        match now.duration_since(modified) {
            Ok(behind) => Self::Behind(behind),
            Err(ahead) => Self::Ahead(ahead.duration()),
        }
    }

    fn size(self) -> Duration {
        match self {
            Self::Behind(by) | Self::Ahead(by) => by,
        }
    }
}

impl fmt::Display for Skew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = humantime::format_duration(Duration::from_secs(self.size().as_secs()));
        match self {
            Self::Behind(_) => write!(f, "{by} behind"),
            Self::Ahead(_) => write!(f, "{by} ahead of"),
        }
    }
}

/// The folder, and what was in it.
struct Folder {
    path: PathBuf,
    ttl: Duration,
    /// Files that were there at the last look, by sub-folder and name.
    known: HashMap<String, Known>,
    /// Looks so far, and when the last one began.
    looks: u64,
    last: Option<Instant>,
    /// Living files that cannot be used, [`MAX_FILES`] at most: each is told of once.
    left_out: HashSet<PathBuf>,
}

/// A file that was seen before.
struct Known {
    modified: SystemTime,
    /// When it was touched last, as far as that is known: `None` of one that was old when it was first seen.
    touched: Option<Instant>,
    /// What it was when it was read, while it lives.
    read: Option<Stamp>,
    /// The last look that saw it.
    seen: u64,
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
    /// Of the newest of those files that were touched by a clock that is off.
    skew: Option<Skew>,
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
        Self { path, ttl, known: HashMap::new(), looks: 0, last: None, left_out: HashSet::new() }
    }

    /// Blocks. A sub-folder that is missing is empty; after an error everything counts as being there still.
    ///
    /// In a large folder on a busy machine it takes long, and owners touch their files meanwhile. None is gone for that:
    /// a file is as old as it was when the look began, and a worker's card is looked at before its instance, so that one
    /// that is late never seems to have a card alone, as those do that are draining.
    fn look(&mut self, clock: impl Fn() -> Now) -> io::Result<Look> {
        let (mut look, mut living, mut left_out) = (Look::default(), HashSet::new(), HashSet::new());
        let (begun, mut newest) = (clock(), None);
        self.looks += 1;
        look.exists = exists(fs::read_dir(&self.path))?.is_some();
        for prefix in REGISTRATION_PREFIXES.into_iter().rev() {
            let Some(files) = exists(fs::read_dir(self.path.join(prefix)))? else { continue };
            for file in files {
                let file = file?;
                match self.examine(prefix, &file, (begun, clock()), living.len(), &mut newest) {
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
        let dead = self.known.iter_mut().filter(|(id, _)| !living.contains(*id));
        look.gone = dead.filter_map(|(id, known)| known.read.take().map(|_| id.clone())).collect();
        let there_is_room = self.known.len() < MAX_REMEMBERED;
        self.known.retain(|id, known| known.seen == self.looks && (there_is_room || living.contains(id)));
        // One that was touched right after the last look may be as old as that.
        let since_last = self.last.replace(begun.monotonic).map(|last| begun.monotonic.saturating_duration_since(last));
        let allowed = self.ttl + since_last.unwrap_or_default();
        look.skew = newest.map(|(modified, now)| Skew::of(modified, now)).filter(|skew| skew.size() >= allowed);
        look.left_out.retain(|unusable| !self.left_out.contains(&unusable.file));
        self.left_out = left_out;
        Ok(look)
    }

    /// The id of a living entry, with its content where that may have changed. Keeps the time of the newest file that was
    /// touched, and the time as it was then.
    fn examine(
        &mut self,
        prefix: &str,
        file: &DirEntry,
        times: (Now, Now),
        living: usize,
        newest: &mut Option<(SystemTime, SystemTime)>,
    ) -> Result<Option<(String, Option<Entry>)>, Unusable> {
        let unusable = |reason, cause: &str| Unusable { file: file.path(), reason, cause: cause.to_owned() };
        let unreadable = |error: io::Error| unusable(Reason::Unreadable, &error.to_string());
        let Some(stamp) = stamp(file).map_err(unreadable)? else { return Ok(None) };
        let name = file.file_name();
        let id = [prefix, &name.to_string_lossy()].concat();
        if name.to_string_lossy().starts_with(UNFINISHED) || !self.is_alive(&id, stamp.modified, times, newest) {
            return Ok(None);
        }
        let key = name.to_str().and_then(percent_decoded);
        let key = key.ok_or_else(|| unusable(Reason::Malformed, "its name is no key"))?;
        let known = self.known.get_mut(&id).filter(|_| living < MAX_FILES);
        let known =
            known.ok_or_else(|| unusable(Reason::TooManyEntries, &format!("there are more than {MAX_FILES}")))?;
        if known.read == Some(stamp) {
            return Ok(Some((id, None)));
        }
        let Some(value) = exists(content(&file.path())).map_err(unreadable)? else { return Ok(None) };
        known.read = Some(stamp);
        let entry = Entry { id: id.clone(), path: [prefix, &key].concat(), value };
        Ok(Some((id, Some(entry))))
    }

    /// Touched lately, as the look began.
    fn is_alive(
        &mut self,
        id: &str,
        modified: SystemTime,
        (begun, now): (Now, Now),
        newest: &mut Option<(SystemTime, SystemTime)>,
    ) -> bool {
        let known = self.known.get(id);
        let touched = match known {
            Some(known) if known.modified == modified => known.touched,
            Some(_) => {
                *newest = (*newest).max(Some((modified, now.wall)));
                Some(begun.monotonic)
            }
            None => self.touched_by_the_clock(modified, begun, now),
        };
        let is_alive = touched.is_some_and(|touched| begun.monotonic.saturating_duration_since(touched) < self.ttl);
        let read = known.and_then(|known| known.read);
        let room = if is_alive { MAX_REMEMBERED } else { MAX_FILES };
        if known.is_some() || self.known.len() < room {
            self.known.insert(id.to_owned(), Known { modified, touched, read, seen: self.looks });
        }
        is_alive
    }

    /// When a file was touched that was not seen before, if that was lately. A clock that is ahead of the bridge's is as
    /// good as one that is behind.
    fn touched_by_the_clock(&self, modified: SystemTime, begun: Now, now: Now) -> Option<Instant> {
        if modified.duration_since(now.wall).unwrap_or_default() >= self.ttl {
            return None;
        }
        let age = begun.wall.duration_since(modified).unwrap_or_default();
        // A machine that has just started has no such moment.
        (age < self.ttl).then(|| begun.monotonic.checked_sub(age).unwrap_or(begun.monotonic))
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
