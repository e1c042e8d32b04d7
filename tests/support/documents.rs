//! The repository's own documents and files, which the tests hold against the programs.

use std::fs;
use std::path::{Path, PathBuf};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A file of the repository.
pub fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Every document for people, by its path in the repository.
pub fn all() -> Vec<(String, String)> {
    let names = ["", "docs"].into_iter().flat_map(|folder| {
        let entries = fs::read_dir(path(folder)).unwrap();
        entries.map(move |entry| format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap()))
    });
    let mut names: Vec<_> = names.map(|name| name.trim_start_matches('/').to_owned()).collect();
    names.retain(|name| Path::new(name).extension().is_some_and(|extension| extension == "md"));
    names.sort_unstable();
    names.into_iter().map(|name| (name.clone(), read(&name))).collect()
}

/// What a document has between two texts is made from the programs: with `UPDATE_DOCS=1` in the environment it is written
/// anew, else compared.
pub fn generated(name: &str, start: &str, end: &str, made: &str) {
    let document = read(name);
    let (before, rest) = document.split_once(start).unwrap_or_else(|| panic!("{name} has no {start:?}"));
    let (written, after) = rest.split_once(end).unwrap_or_else(|| panic!("{name} has no {end:?} after {start:?}"));
    if std::env::var("UPDATE_DOCS").is_ok_and(|update| update == "1") {
        fs::write(path(name), format!("{before}{start}{made}{end}{after}")).unwrap();
    } else {
        assert_eq!(written, made, "{name} is not up to date: UPDATE_DOCS=1 cargo test --test integration catalogue");
    }
}
