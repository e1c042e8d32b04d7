use std::cell::Cell;

use tempfile::TempDir;

use super::*;

const TTL: Duration = Duration::from_secs(20);

struct Tried {
    root: TempDir,
    folder: Folder,
    now: SystemTime,
    monotonic: Instant,
    /// Of the last look.
    skew: Option<Skew>,
}

/// A folder with its sub-folders, and nothing in it.
fn tried() -> Tried {
    let root = tempfile::tempdir().unwrap();
    for prefix in REGISTRATION_PREFIXES {
        fs::create_dir_all(root.path().join(prefix)).unwrap();
    }
    let folder = Folder::new(root.path().to_owned(), TTL);
    Tried { root, folder, now: SystemTime::now(), monotonic: Instant::now() + TTL, skew: None }
}

impl Tried {
    fn write(&self, file: &str, content: &[u8]) {
        fs::write(self.root.path().join(file), content).unwrap();
        self.touch(file, self.now);
    }

    fn touch(&self, file: &str, at: SystemTime) {
        touch(&self.root.path().join(file), at);
    }

    fn after(&self, time: Duration) -> Now {
        Now { wall: self.now + time, monotonic: self.monotonic + time }
    }

    /// What is new some time after the start, in short.
    fn look(&mut self, after: Duration) -> Vec<String> {
        let now = self.after(after);
        let look = self.folder.look(|| now).unwrap();
        self.skew = look.skew;
        let text = |entry: &Entry| format!("+ {} {}", entry.path, String::from_utf8_lossy(&entry.value));
        let left_out = look.left_out.iter().map(|left_out| {
            let Unusable { file, reason, cause } = left_out;
            format!("! {} {} ({cause})", file.strip_prefix(self.root.path()).unwrap().display(), reason.as_str())
        });
        let gone = look.gone.iter().map(|id| format!("- {id}"));
        look.put.iter().map(text).chain(gone).chain(left_out).collect()
    }
}

fn touch(path: &Path, at: SystemTime) {
    File::options().write(true).open(path).unwrap().set_modified(at).unwrap();
}

const AT_ONCE: Duration = Duration::ZERO;

#[test]
fn a_file_is_an_entry_while_it_is_touched() {
    let mut tried = tried();
    let file = "v1/instances/dynamo%2Fbackend%2Fworker%5Fa%2F1f";
    tried.write(file, b"{}");
    assert_eq!(tried.look(AT_ONCE), ["+ v1/instances/dynamo/backend/worker_a/1f {}"]);
    assert_eq!(tried.look(TTL / 2), [""; 0], "it has not changed");
    tried.touch(file, tried.now + TTL / 2);
    assert_eq!(tried.look(TTL).len(), 1, "it was touched, so it is read again");
    assert_eq!(tried.look(TTL * 3 / 2), [""; 0]);
    assert_eq!(tried.look(TTL * 2), [format!("- {file}")]);
    assert_eq!(tried.look(TTL * 3), [""; 0]);
    tried.touch(file, tried.now + TTL * 3);
    assert_eq!(tried.look(TTL * 3).len(), 1, "its owner was only late");
    fs::remove_file(tried.root.path().join(file)).unwrap();
    assert_eq!(tried.look(TTL * 3), [format!("- {file}")]);
}

#[test]
fn a_clock_ahead_is_as_good_as_one_behind() {
    let mut tried = tried();
    for (file, at) in [("ahead", tried.now + TTL / 2), ("behind", tried.now - TTL / 2), ("far", tried.now + TTL * 1000)]
    {
        let file = format!("v1/mdc/{file}");
        tried.write(&file, b"{}");
        tried.touch(&file, at);
    }
    let mut alive = tried.look(AT_ONCE);
    alive.sort();
    assert_eq!(alive, ["+ v1/mdc/ahead {}", "+ v1/mdc/behind {}"], "the third would live for ever");
    assert_eq!(tried.look(TTL / 2), ["- v1/mdc/behind"]);
    assert_eq!(tried.look(TTL), ["- v1/mdc/ahead"], "nobody has touched it since it was seen");
    assert_eq!(tried.skew, None);
}

#[test]
fn who_is_touched_between_two_looks_is_alive_by_whatever_clock() {
    for (text, skewed) in [("59m 50s behind", -i64::from(3600)), ("1h 10s ahead of", i64::from(3600))] {
        let mut tried = tried();
        let by_its_clock = |at: SystemTime| {
            let skew = Duration::from_secs(skewed.unsigned_abs());
            if skewed < 0 { at - skew } else { at + skew }
        };
        let files = ["v1/instances/dead", "v1/instances/living"];
        for file in files {
            tried.write(file, b"{}");
            tried.touch(file, by_its_clock(tried.now));
        }
        assert_eq!(tried.look(AT_ONCE), [""; 0], "nothing tells them apart yet");
        tried.touch("v1/instances/living", by_its_clock(tried.now + TTL / 2));
        assert_eq!(tried.look(AT_ONCE), ["+ v1/instances/living {}"]);
        assert_eq!(tried.skew.unwrap().to_string(), text);
        assert_eq!(tried.look(TTL / 2), [""; 0]);
        assert_eq!(tried.skew, None, "nothing was touched");
        assert_eq!(tried.look(TTL), ["- v1/instances/living"]);
        // Back in time, as when its clock is set right.
        tried.touch("v1/instances/living", by_its_clock(tried.now));
        assert_eq!(tried.look(TTL * 2), ["+ v1/instances/living {}"]);
    }
}

#[test]
fn nobody_is_gone_for_a_look_that_takes_longer_than_files_live() {
    let mut tried = tried();
    for file in ["v1/mdc/a", "v1/mdc/b", "v1/instances/a", "v1/instances/b"] {
        tried.write(file, b"{}");
    }
    tried.look(AT_ONCE);
    let (asked, path) = (Cell::new(0), tried.root.path().join("v1/instances/a"));
    let times: Vec<_> = (0..5).map(|count| tried.after(TTL * 2 * count)).collect();
    let look = tried.folder.look(|| {
        let now = times[asked.replace(asked.get() + 1)];
        touch(&path, now.wall);
        now
    });
    assert_eq!((look.unwrap().gone, asked.get()), (Vec::new(), 5));
}

#[test]
fn one_whose_files_are_touched_late_and_during_a_look_never_has_a_card_alone() {
    let mut tried = tried();
    let files = ["v1/instances/a", "v1/mdc/a"];
    for file in files {
        tried.write(file, b"{}");
    }
    tried.look(AT_ONCE);
    let (asked, root, late) = (Cell::new(0), tried.root.path(), tried.after(TTL));
    let look = tried.folder.look(|| {
        // Asked at the start and for each of the two.
        if asked.replace(asked.get() + 1) == 2 {
            for file in files {
                touch(&root.join(file), late.wall);
            }
        }
        late
    });
    assert_eq!(look.unwrap().gone, ["v1/mdc/a"]);
}

#[test]
fn what_is_no_entry_costs_nobody_else() {
    let mut tried = tried();
    let root = tried.root.path().to_owned();
    tried.write("v1/instances/good", b"{}");
    tried.write("v1/instances/.tmp_00ff", b"{");
    tried.write("v1/instances/empty", b"");
    tried.write("v1/instances/not%zzencoded", b"{}");
    fs::create_dir(root.join("v1/instances/folder")).unwrap();
    tried.write("v1/elsewhere", b"{}");
    #[cfg(unix)]
    std::os::unix::fs::symlink("/dev/zero", root.join("v1/instances/endless")).unwrap();
    let left_out = "! v1/instances/not%zzencoded malformed (its name is no key)";
    assert_eq!(tried.look(AT_ONCE), ["+ v1/instances/good {}", left_out]);
    tried.touch("v1/instances/not%zzencoded", tried.now + TTL / 2);
    assert_eq!(tried.look(TTL / 2), [""; 0], "it is told of once");
    let name = root.join("v1/instances/not%zzencoded");
    fs::remove_file(&name).unwrap();
    assert_eq!(tried.look(TTL / 2), [""; 0]);
    tried.write("v1/instances/not%zzencoded", b"{}");
    assert_eq!(tried.look(TTL / 2), [left_out], "it is another one");
}

#[cfg(unix)]
#[test]
fn a_file_that_may_not_be_read_is_told_of_and_read_once_it_may() {
    use std::os::unix::fs::PermissionsExt;

    let mut tried = tried();
    tried.write("v1/mdc/a", b"{}");
    let path = tried.root.path().join("v1/mdc/a");
    let allow = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    allow(0o000);
    // The superuser may read everything.
    if let Err(error) = File::open(&path) {
        assert_eq!(tried.look(AT_ONCE), [format!("! v1/mdc/a unreadable ({error})")]);
        assert_eq!(tried.look(AT_ONCE), [""; 0]);
        allow(0o600);
    }
    assert_eq!(tried.look(AT_ONCE), ["+ v1/mdc/a {}"]);
}

#[test]
fn a_file_that_grew_beyond_the_limit_is_cut_one_byte_behind_it() {
    let mut tried = tried();
    tried.write("v1/mdc/a", &vec![b' '; MAX_MESSAGE * 2]);
    let now = tried.after(AT_ONCE);
    assert_eq!(tried.folder.look(|| now).unwrap().put[0].value.len(), MAX_MESSAGE + 1);
}

#[test]
fn a_folder_may_be_missing_and_come_and_go() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("store");
    let mut folder = Folder::new(path.clone(), TTL);
    assert!(!folder.look(Now::read).unwrap().exists);
    fs::create_dir_all(path.join("v1/mdc")).unwrap();
    fs::write(path.join("v1/mdc/a"), "{}").unwrap();
    let look = folder.look(Now::read).unwrap();
    assert!(look.exists && look.put.len() == 1);
    fs::remove_dir_all(&path).unwrap();
    let look = folder.look(Now::read).unwrap();
    assert_eq!((look.exists, look.gone), (false, vec!["v1/mdc/a".to_owned()]));
}

#[test]
fn what_is_no_folder_is_an_error_and_nobody_is_gone() {
    let mut tried = tried();
    tried.write("v1/mdc/a", b"{}");
    assert_eq!(tried.look(AT_ONCE).len(), 1);
    fs::remove_dir(tried.root.path().join("v1/instances")).unwrap();
    fs::write(tried.root.path().join("v1/instances"), "").unwrap();
    let now = tried.after(AT_ONCE);
    assert!(tried.folder.look(|| now).is_err());
    assert!(tried.folder.known["v1/mdc/a"].read.is_some());
}

#[test]
fn names_are_percent_encoded_utf_8() {
    assert_eq!(percent_decoded("a%2Fb%5fc").as_deref(), Some("a/b_c"));
    assert_eq!(percent_decoded("gr%C3%BCn").as_deref(), Some("grün"));
    for bad in ["%", "%2", "%+f", "%zz", "%ff"] {
        assert_eq!(percent_decoded(bad), None, "{bad}");
    }
}
