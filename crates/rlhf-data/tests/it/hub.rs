//! Downloads from a hub that stands here.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use rlhf_data::import::hub::Hub;
use rlhf_data::import::{Format, OnBad, read};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the hub: what it says of it, and what it sends.
struct Served {
    etag: String,
    body: Vec<u8>,
}

fn served(body: &[u8]) -> Served {
    let etag = Sha256::digest(body)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    Served {
        etag,
        body: body.to_vec(),
    }
}

/// Serves files until the process ends; its address, and the paths that were asked for.
fn serve(files: HashMap<&'static str, Served>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let path = lines
                .next()
                .unwrap()
                .unwrap()
                .split(' ')
                .nth(1)
                .unwrap()
                .to_owned();
            let headers: Vec<String> = lines
                .map(Result::unwrap)
                .take_while(|l| !l.is_empty())
                .collect();
            let probe = headers
                .iter()
                .any(|h| h.to_lowercase() == "range: bytes=0-0");
            seen.lock().unwrap().push(path.clone());
            let reply = reply(&files, &path, probe);
            let _ = stream.write_all(&reply);
        }
    });
    (address, asked)
}

fn reply(files: &HashMap<&'static str, Served>, path: &str, probe: bool) -> Vec<u8> {
    let (status, extra, body) = if path == "/api/datasets/me/tea/revision/v1" {
        let names: Vec<_> = files
            .keys()
            .map(|n| serde_json::json!({"rfilename": n}))
            .collect();
        let info = serde_json::json!({"sha": COMMIT, "siblings": names});
        ("200 OK", String::new(), info.to_string().into_bytes())
    } else if let Some(file) = path
        .strip_prefix(&format!("/datasets/me/tea/resolve/{COMMIT}/"))
        .and_then(|name| files.get(name))
    {
        let len = file.body.len();
        let body = if probe {
            file.body[..1].to_vec()
        } else {
            file.body.clone()
        };
        let headers = format!(
            "x-repo-commit: {COMMIT}\r\netag: \"{}\"\r\ncontent-range: bytes 0-{}/{len}\r\n",
            file.etag,
            body.len() - 1,
        );
        ("206 Partial Content", headers, body)
    } else {
        ("404 Not Found", String::new(), b"no".to_vec())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\n{extra}content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body].concat()
}

fn hub(endpoint: String, folder: &tempfile::TempDir) -> Hub {
    Hub {
        endpoint: Some(endpoint),
        cache: Some(folder.path().join("cache")),
    }
}

#[test]
fn data_files_of_one_commit_come_into_the_cache_once() {
    let row = br#"{"question":"1+1?","answer":"2\n#### 2"}"#;
    let (endpoint, asked) = serve(HashMap::from([
        ("README.md", served(b"about")),
        ("dataset_infos.json", served(b"{}")),
        ("../escape.jsonl", served(b"{}")),
        ("data/train-1.jsonl", served(row)),
        ("data/train-0.jsonl", served(row)),
        ("data/test.jsonl", served(row)),
    ]));
    let folder = tempfile::tempdir().unwrap();
    let hub = hub(endpoint, &folder);
    let got = hub.download("me/tea", "v1", Some("data/train-*")).unwrap();
    assert_eq!(got.commit, COMMIT);
    let names: Vec<_> = got
        .files
        .iter()
        .map(|f| f.file_name().unwrap().to_str().unwrap())
        .collect();
    assert_eq!(names, ["train-0.jsonl", "train-1.jsonl"]);
    for file in &got.files {
        let rows: Vec<_> = read(file, None, OnBad::Refuse)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!((rows.len(), rows[0].0), (1, Format::Gsm8k));
    }
    let before = asked.lock().unwrap().len();
    assert_eq!(
        hub.download("me/tea", "v1", Some("data/train-*")).unwrap(),
        got
    );
    assert_eq!(
        asked.lock().unwrap().len(),
        before + 1,
        "only what is there is asked"
    );
    assert_eq!(hub.download("me/tea", "v1", None).unwrap().files.len(), 3);
    assert!(asked.lock().unwrap().iter().all(|p| !p.contains("escape")));
    let e = hub.download("me/tea", "v1", Some("*.parquet")).unwrap_err();
    assert!(e.to_string().contains("no data file"), "{e}");
}

#[test]
fn what_is_absent_or_damaged_is_an_error() {
    let mut wrong = served(b"{\"text\":\"a\"}");
    wrong.body = b"{\"text\":\"b\"}".to_vec();
    let (endpoint, _) = serve(HashMap::from([("a.jsonl", wrong)]));
    let folder = tempfile::tempdir().unwrap();
    let hub = hub(endpoint, &folder);
    let e = hub.download("me/coffee", "main", None).unwrap_err();
    assert!(
        e.to_string().contains("no such dataset") && e.is_input(),
        "{e}"
    );
    for _ in 0..2 {
        let e = hub.download("me/tea", "v1", None).unwrap_err();
        assert!(e.to_string().contains("digest"), "{e}");
    }
    let nowhere = Hub {
        endpoint: Some("http://127.0.0.1:1".into()),
        ..hub
    };
    let e = nowhere.download("me/tea", "v1", None).unwrap_err();
    assert!(!e.is_input(), "{e}");
}
