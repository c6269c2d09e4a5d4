//! A model from a hub that stands here and has faults.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rlhf_model::weights::hub::{Hub, fetch};
use rlhf_model::{CausalLm, SaveOptions, Transformer};
use sha2::{Digest, Sha256};
use tch::Kind;

use crate::support::{on_device, small};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub does wrong with a file.
#[derive(Clone, Copy)]
enum Fault {
    /// Closes the connection after so many bytes, so many times.
    Cut { after: usize, times: usize },
    /// Sends another byte at the end, so many times.
    Damaged { times: usize },
    /// Sends everything when asked for the rest.
    Whole,
    /// Answers with a status.
    Status(&'static str),
}

/// The hub's files, its faults, and what it was asked for: path and range.
#[derive(Clone, Default)]
struct Server {
    files: Arc<HashMap<String, Vec<u8>>>,
    faults: Arc<Mutex<HashMap<String, Fault>>>,
    asked: Arc<Mutex<Vec<(String, String)>>>,
}

impl Server {
    fn of(dir: &Path) -> (Self, String) {
        let files = std::fs::read_dir(dir).unwrap().map(|e| {
            let path = e.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(&path).unwrap())
        });
        let server = Self {
            files: Arc::new(files.collect()),
            ..Self::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let answering = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines: Vec<String> = BufReader::new(stream.try_clone().unwrap())
                    .lines()
                    .map(Result::unwrap)
                    .take_while(|l| !l.is_empty())
                    .collect();
                let path = lines[0].split(' ').nth(1).unwrap();
                let range = lines.iter().find_map(|l| {
                    let l = l.to_lowercase();
                    l.strip_prefix("range: bytes=").map(str::to_owned)
                });
                let reply = answering.reply(path, &range.unwrap_or_default());
                let _ = stream.write_all(&reply);
            }
        });
        (server, address)
    }

    fn break_file(&self, name: &str, fault: Fault) {
        self.faults.lock().unwrap().insert(name.into(), fault);
    }

    /// The ranges that were asked of a file, without the probes of its size.
    fn ranges(&self, name: &str) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        let of = asked.iter().filter(|(p, r)| p == name && r != "0-0");
        of.map(|(_, r)| r.clone()).collect()
    }

    fn reply(&self, path: &str, range: &str) -> Vec<u8> {
        let whole = |status: &str, body: &[u8]| {
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            [head.as_bytes(), body].concat()
        };
        if path.starts_with("/api/models/me/tea/revision/") {
            let names: Vec<_> = self
                .files
                .keys()
                .map(|n| serde_json::json!({"rfilename": n}))
                .collect();
            let info = serde_json::json!({"sha": COMMIT, "siblings": names});
            return whole("200 OK", info.to_string().as_bytes());
        }
        let name = path
            .strip_prefix(&format!("/me/tea/resolve/{COMMIT}/"))
            .unwrap_or_default();
        let Some(file) = self.files.get(name) else {
            return whole("404 Not Found", b"no");
        };
        self.asked
            .lock()
            .unwrap()
            .push((name.into(), range.to_owned()));
        let mut faults = self.faults.lock().unwrap();
        let fault = faults.get_mut(name);
        if let Some(Fault::Status(status)) = fault {
            return whole(status, b"no");
        }
        let mut body = file.clone();
        // Large files are known by their SHA-256, others by a shorter digest.
        let etag: String = Sha256::digest(&body)
            .iter()
            .take(if name.ends_with(".safetensors") {
                32
            } else {
                20
            })
            .map(|b| format!("{b:02x}"))
            .collect();
        let probe = range == "0-0";
        let mut start = range.split('-').next().unwrap().parse::<usize>().unwrap();
        let mut sent = body.len();
        match fault {
            Some(Fault::Cut { after, times }) if !probe && *times > 0 => {
                *times -= 1;
                sent = (start + *after).min(sent);
            }
            Some(Fault::Damaged { times }) if !probe && *times > 0 => {
                *times -= 1;
                *body.last_mut().unwrap() ^= 1;
            }
            Some(Fault::Whole) if !probe => start = 0,
            _ => {}
        }
        let (end, sent) = if probe { (1, 1) } else { (body.len(), sent) };
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nx-repo-commit: {COMMIT}\r\netag: \"{etag}\"\r\n\
             content-range: bytes {start}-{}/{}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            end - 1,
            body.len(),
            end - start,
        );
        [head.as_bytes(), &body[start..sent]].concat()
    }
}

/// A model's folder as a hub has it, among files that nobody needs.
fn model(dir: &Path, max_shard_bytes: u64) -> Transformer {
    let model = small(Kind::Float);
    let options = SaveOptions {
        max_shard_bytes,
        ..SaveOptions::default()
    };
    model.save_with(dir, &options).unwrap();
    for name in [
        "tokenizer.json",
        "README.md",
        "pytorch_model.bin",
        "other.safetensors",
    ] {
        std::fs::write(dir.join(name), "{}").unwrap();
    }
    model
}

struct Stand {
    folder: tempfile::TempDir,
    model: Transformer,
    server: Server,
    hub: Hub,
}

fn stand(max_shard_bytes: u64) -> Stand {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("served");
    let model = model(&dir, max_shard_bytes);
    let (server, endpoint) = Server::of(&dir);
    let hub = Hub {
        endpoint: Some(endpoint),
        cache: Some(folder.path().join("cache")),
    };
    Stand {
        folder,
        model,
        server,
        hub,
    }
}

fn equal(dir: &Path, model: &Transformer) {
    let loaded = Transformer::load(dir, &on_device()).unwrap();
    assert_eq!(loaded.parameters().len(), model.parameters().len());
    for ((name, a), (_, b)) in model.parameters().iter().zip(&loaded.parameters()) {
        assert!(a.equal(b), "{name}");
    }
}

#[test]
fn a_model_comes_whole_and_once() {
    for max_shard_bytes in [u64::MAX, 8_000] {
        let s = stand(max_shard_bytes);
        let dir = fetch("me/tea", "main", &s.hub).unwrap();
        equal(&dir, &s.model);
        assert!(dir.starts_with(s.folder.path().join("cache")));
        assert!(dir.join("tokenizer.json").exists() && !dir.join("README.md").exists());
        assert!(!dir.join("other.safetensors").exists());
        let before = s.server.asked.lock().unwrap().len();
        assert_eq!(fetch("me/tea", "main", &s.hub).unwrap(), dir);
        let after = s.server.asked.lock().unwrap().len();
        assert_eq!(after, before, "what is there is not asked for again");
    }
}

#[test]
fn a_cut_connection_is_taken_up_where_it_broke() {
    let s = stand(u64::MAX);
    let size = s.server.files["model.safetensors"].len();
    let after = size / 3;
    let cut = Fault::Cut { after, times: 2 };
    s.server.break_file("model.safetensors", cut);
    equal(&fetch("me/tea", "main", &s.hub).unwrap(), &s.model);
    let wanted: Vec<String> = (0..3).map(|i| format!("{}-", i * after)).collect();
    assert_eq!(s.server.ranges("model.safetensors"), wanted);
}

#[test]
fn a_download_that_failed_goes_on_in_the_next() {
    let s = stand(u64::MAX);
    let cut = Fault::Cut {
        after: 500,
        times: usize::MAX,
    };
    s.server.break_file("model.safetensors", cut);
    let e = fetch("me/tea", "main", &s.hub).unwrap_err();
    let text = e.to_string();
    assert!(
        text.contains("me/tea/model.safetensors") && text.contains("run it again"),
        "{text}"
    );
    assert!(!e.is_input());
    s.server.faults.lock().unwrap().clear();
    let before = s.server.ranges("model.safetensors").len();
    equal(&fetch("me/tea", "main", &s.hub).unwrap(), &s.model);
    let after = s.server.ranges("model.safetensors");
    assert_eq!(after[before..], [format!("{}-", 500 * before)]);
}

/// A part as long as the whole, left by a process that was killed before it gave it its name.
#[test]
fn a_part_that_is_complete_or_wrong_does_not_stand_in_the_way() {
    for extra in [0, 9] {
        let s = stand(u64::MAX);
        let whole = &s.server.files["model.safetensors"];
        let digest: String = Sha256::digest(whole)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let blobs = s.folder.path().join("cache/models--me--tea/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        let part = blobs.join(digest).with_extension("part");
        std::fs::write(&part, vec![7; whole.len() + extra]).unwrap();
        equal(&fetch("me/tea", "main", &s.hub).unwrap(), &s.model);
        // A wrong beginning is found by the digest, and the file comes anew.
        std::fs::remove_dir_all(s.folder.path().join("cache")).unwrap();
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(&part, vec![7; 100]).unwrap();
        equal(&fetch("me/tea", "main", &s.hub).unwrap(), &s.model);
    }
}

#[test]
fn a_server_without_ranges_is_asked_anew() {
    let s = stand(u64::MAX);
    let cut = Fault::Cut {
        after: 64,
        times: usize::MAX,
    };
    s.server.break_file("model.safetensors", cut);
    fetch("me/tea", "main", &s.hub).unwrap_err();
    s.server.break_file("model.safetensors", Fault::Whole);
    equal(&fetch("me/tea", "main", &s.hub).unwrap(), &s.model);
}

#[test]
fn damage_is_found_and_not_kept() {
    let s = stand(u64::MAX);
    let damaged = |times| {
        s.server
            .break_file("model.safetensors", Fault::Damaged { times })
    };
    damaged(1);
    equal(&fetch("me/tea", "main", &s.hub).unwrap(), &s.model);
    std::fs::remove_dir_all(s.folder.path().join("cache")).unwrap();
    damaged(usize::MAX);
    for _ in 0..2 {
        let e = fetch("me/tea", "main", &s.hub).unwrap_err().to_string();
        for word in ["me/tea/model.safetensors", "SHA-256", "download it again"] {
            assert!(e.contains(word), "{word}: {e}");
        }
    }
    damaged(0);
    equal(&fetch("me/tea", "main", &s.hub).unwrap(), &s.model);
}

#[test]
fn what_is_not_there_or_not_ours_is_named() {
    let s = stand(8_000);
    let e = fetch("me/coffee", "main", &s.hub).unwrap_err();
    assert!(e.is_input());
    let e = e.to_string();
    assert!(
        e.contains("me/coffee: no such model") && e.contains("at main"),
        "{e}"
    );
    let shard = "model-00001-of-00010.safetensors";
    assert!(
        s.server.files.contains_key(shard),
        "{:?}",
        s.server.files.keys()
    );
    for (status, word) in [
        ("401 Unauthorized", "log in"),
        ("403 Forbidden", "log in"),
        ("404 Not Found", "check the name"),
    ] {
        s.server.break_file(shard, Fault::Status(status));
        let e = fetch("me/tea", "main", &s.hub).unwrap_err().to_string();
        assert!(
            e.contains(&format!("me/tea/{shard}")) && e.contains(word),
            "{e}"
        );
    }
    s.server
        .break_file(shard, Fault::Status("500 Internal Server Error"));
    let e = fetch("me/tea", "main", &s.hub).unwrap_err();
    assert!(!e.is_input() && e.to_string().contains(shard), "{e}");
}

#[test]
fn a_repository_without_a_model_is_refused() {
    for (remove, word) in [
        (vec!["config.json"], "no config.json"),
        (vec!["model.safetensors"], "neither model.safetensors nor"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("served");
        model(&dir, u64::MAX);
        for name in remove {
            std::fs::remove_file(dir.join(name)).unwrap();
        }
        let (_, endpoint) = Server::of(&dir);
        let hub = Hub {
            endpoint: Some(endpoint),
            cache: Some(folder.path().join("cache")),
        };
        let e = fetch("me/tea", "main", &hub).unwrap_err().to_string();
        assert!(e.contains("me/tea at main") && e.contains(word), "{e}");
    }
    // A shard that the index names and the repository lacks.
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("served");
    model(&dir, 8_000);
    std::fs::remove_file(dir.join("model-00002-of-00010.safetensors")).unwrap();
    let (_, endpoint) = Server::of(&dir);
    let hub = Hub {
        endpoint: Some(endpoint),
        cache: Some(folder.path().join("cache")),
    };
    let e = fetch("me/tea", "main", &hub).unwrap_err().to_string();
    assert!(e.contains("no model-00002-of-00010.safetensors"), "{e}");
}
