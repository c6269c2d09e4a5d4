//! The client against a server on this machine that misbehaves as told.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests stop at what they did not expect"
)]

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rlhf_endpoint::{Endpoint, EndpointConfig, Error};
use serde_json::{Value, json};

/// What the server does with a question.
#[derive(Clone, Debug)]
enum Act {
    /// Answers with a status, headers and a body.
    Say(u16, &'static str, String),
    /// Keeps silent for so long, then hangs up.
    Hang(Duration),
    /// Hangs up in the middle of the answer.
    Cut,
}

fn fine() -> Act {
    let body = json!({"choices": [{"text": "yes"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}});
    Act::Say(200, "", body.to_string())
}

struct Server {
    url: String,
    /// The questions, with their heads.
    asked: Arc<Mutex<Vec<(String, Value)>>>,
    most_together: Arc<AtomicUsize>,
}

/// Acts in order, then answers as it should.
fn server(acts: Vec<Act>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let acts = Arc::new(Mutex::new(VecDeque::from(acts)));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = Server {
        url,
        asked: Arc::clone(&asked),
        most_together: Arc::clone(&most),
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (acts, asked) = (Arc::clone(&acts), Arc::clone(&asked));
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            std::thread::spawn(move || serve(stream.unwrap(), &acts, &asked, &now, &most));
        }
    });
    server
}

fn serve(
    mut stream: TcpStream,
    acts: &Mutex<VecDeque<Act>>,
    asked: &Mutex<Vec<(String, Value)>>,
    now: &AtomicUsize,
    most: &AtomicUsize,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let length = head
            .lines()
            .find_map(|l| {
                l.to_lowercase()
                    .strip_prefix("content-length:")?
                    .trim()
                    .parse()
                    .ok()
            })
            .unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let together = now.fetch_add(1, Ordering::SeqCst) + 1;
        most.fetch_max(together, Ordering::SeqCst);
        // One lock over both: the n-th question noted gets the n-th act.
        let act = {
            let mut asked = asked.lock().unwrap();
            asked.push((head, serde_json::from_slice(&body).unwrap()));
            acts.lock().unwrap().pop_front().unwrap_or_else(fine)
        };
        let (status, headers, text) = match act {
            Act::Say(status, headers, text) => (status, headers, text),
            Act::Hang(time) => {
                std::thread::sleep(time);
                now.fetch_sub(1, Ordering::SeqCst);
                return;
            }
            Act::Cut => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{\"cho");
                now.fetch_sub(1, Ordering::SeqCst);
                return;
            }
        };
        std::thread::sleep(Duration::from_millis(20));
        now.fetch_sub(1, Ordering::SeqCst);
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\n\r\n",
            text.len()
        );
        if stream
            .write_all(format!("{head}{text}").as_bytes())
            .is_err()
        {
            return;
        }
    }
}

fn quick(url: &str) -> EndpointConfig {
    EndpointConfig {
        timeout: Duration::from_millis(600),
        first_wait: Duration::from_millis(5),
        longest_wait: Duration::from_millis(400),
        ..EndpointConfig::new(url, "tiny")
    }
}

#[test]
fn passing_faults_are_tried_again() {
    let say = |status: u16, text: &str| Act::Say(status, "", text.into());
    let server = server(vec![
        say(500, "overload"),
        Act::Cut,
        say(200, "<html>not JSON</html>"),
        Act::Hang(Duration::from_millis(900)),
        say(429, "slow down"),
        fine(),
    ]);
    let config = EndpointConfig {
        tries: 6,
        key: Some("secret".into()),
        ..quick(&server.url)
    };
    assert!(!format!("{config:?}").contains("secret"));
    let endpoint = Endpoint::new(config).unwrap();
    let answer = endpoint
        .ask("completions", &json!({"prompt": "p"}))
        .unwrap();
    assert_eq!(answer["choices"][0]["text"], "yes");
    let usage = endpoint.usage();
    assert_eq!(
        (
            usage.answered,
            usage.failed_tries,
            usage.prompt_tokens,
            usage.completion_tokens
        ),
        (1, 5, 3, 2)
    );
    let asked = server.asked.lock().unwrap();
    assert_eq!(asked.len(), 6);
    for (head, body) in asked.iter() {
        assert!(head.starts_with("POST /v1/completions "), "{head}");
        assert!(head.to_lowercase().contains("authorization: bearer secret"));
        assert_eq!(*body, json!({"prompt": "p", "model": "tiny"}));
    }
}

#[test]
fn what_will_not_pass_is_said_at_once() {
    let cases = [
        (400, "bad prompt", "status 400: bad prompt"),
        (401, "who are you", "check the key"),
        (404, "no model", "the model's name"),
    ];
    for (status, said, message) in cases {
        let server = server(vec![Act::Say(status, "", said.into())]);
        let endpoint = Endpoint::new(quick(&server.url)).unwrap();
        let e = endpoint.ask("completions", &json!({})).unwrap_err();
        assert!(e.to_string().contains(message), "{e}");
        assert_eq!(server.asked.lock().unwrap().len(), 1);
    }
}

#[test]
fn the_last_fault_is_the_error() {
    let server = server(vec![Act::Say(503, "", "x".repeat(10_000)); 9]);
    let endpoint = Endpoint::new(EndpointConfig {
        tries: 3,
        ..quick(&server.url)
    })
    .unwrap();
    let e = endpoint.ask("completions", &json!({})).unwrap_err();
    assert!(matches!(e, Error::Status { status: 503, .. }));
    assert!(e.to_string().len() < 500, "{e}");
    assert_eq!(server.asked.lock().unwrap().len(), 3);
    // Nobody listens.
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let endpoint = Endpoint::new(EndpointConfig {
        tries: 2,
        ..quick(&format!("http://{gone}/v1"))
    })
    .unwrap();
    let e = endpoint.ask("completions", &json!({})).unwrap_err();
    assert!(e.to_string().contains("check that the server runs"), "{e}");
}

#[test]
fn a_server_that_names_a_wait_gets_it() {
    let named = Act::Say(429, "retry-after: 1\r\n", "later".into());
    let server = server(vec![named]);
    let endpoint = Endpoint::new(EndpointConfig {
        longest_wait: Duration::from_millis(1200),
        ..quick(&server.url)
    })
    .unwrap();
    let start = Instant::now();
    endpoint.ask("completions", &json!({})).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn many_questions_in_order_and_not_too_many_at_once() {
    let server = server(vec![Act::Say(400, "", "no".into())]);
    let endpoint = Endpoint::new(EndpointConfig {
        at_once: 3,
        ..quick(&server.url)
    })
    .unwrap();
    let questions: Vec<Value> = (0..20).map(|i| json!({"prompt": i})).collect();
    let told = AtomicUsize::new(0);
    let answers = endpoint.ask_all("completions", &questions, &|_, _| {
        told.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!((answers.len(), told.into_inner()), (20, 20));
    assert_eq!(answers.iter().filter(|a| a.is_err()).count(), 1);
    assert!(server.most_together.load(Ordering::SeqCst) <= 3);
    let refused = server.asked.lock().unwrap()[0].1["prompt"]
        .as_u64()
        .unwrap();
    assert!(answers[refused as usize].is_err());
}

#[test]
fn a_second_run_asks_nothing_twice() {
    let server = server(vec![Act::Say(500, "", "once".into())]);
    let folder = tempfile::tempdir().unwrap();
    let config = EndpointConfig {
        cache: Some(folder.path().join("answers")),
        ..quick(&server.url)
    };
    let questions: Vec<Value> = (0..5).map(|i| json!({"prompt": i})).collect();
    let first = Endpoint::new(config.clone()).unwrap();
    let answers = |e: &Endpoint| -> Vec<Value> {
        let all = e.ask_all("completions", &questions, &|_, _| {});
        all.into_iter().map(Result::unwrap).collect()
    };
    let seen = answers(&first);
    let asked = server.asked.lock().unwrap().len();
    let second = Endpoint::new(config.clone()).unwrap();
    assert_eq!(answers(&second), seen);
    assert_eq!(server.asked.lock().unwrap().len(), asked);
    assert_eq!((second.usage().answered, second.usage().from_cache), (0, 5));
    // A damaged answer is asked for again; another model's answers are others.
    let file = std::fs::read_dir(folder.path().join("answers"))
        .unwrap()
        .next();
    std::fs::write(file.unwrap().unwrap().path(), "{\"cho").unwrap();
    answers(&second);
    assert_eq!(server.asked.lock().unwrap().len(), asked + 1);
    let other = Endpoint::new(EndpointConfig {
        model: "other".into(),
        ..config
    })
    .unwrap();
    answers(&other);
    assert_eq!(server.asked.lock().unwrap().len(), asked + 6);
}

#[test]
fn settings_that_make_no_sense() {
    for url in ["", "localhost:8000", "ftp://x/v1", "http://"] {
        let e = Endpoint::new(EndpointConfig::new(url, "m")).unwrap_err();
        assert!(e.to_string().contains("http://localhost:8000/v1"), "{e}");
    }
    let mut config = EndpointConfig::new("http://localhost:1/v1", "m");
    config.tries = 0;
    assert!(Endpoint::new(config).is_err());
    let endpoint = Endpoint::new(EndpointConfig::new("http://localhost:1/v1/", "m")).unwrap();
    assert!(endpoint.config().url.ends_with("/v1"));
    assert!(endpoint.ask("x", &json!([])).is_err());
}
