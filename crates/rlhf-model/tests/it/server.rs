//! The sampler on a server, against a server on this machine that samples with a model of ours.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_endpoint::{Endpoint, EndpointConfig};
use rlhf_model::{
    CausalLm as _, Decoder, DecoderWeights, GenerateLimits, GenerateRequest, LocalSampler,
    Mismatch, RecordedLogprobs, Sampler as _, SamplingConfig, ServerLogprobs, ServerSampler,
    Transformer, target_logprobs,
};
use serde_json::{Value, json};
use tch::Kind;

use crate::support::{batch, small};

/// How an answer is written, or spoilt.
type Write = fn(&[Completion]) -> Value;

fn named(id: u32) -> String {
    format!("token_id:{id}")
}

fn finish(c: &Completion) -> &'static str {
    if c.finish == Finish::Stop {
        "stop"
    } else {
        "length"
    }
}

/// As vLLM answers, the choices in another order than asked.
fn vllm(completions: &[Completion]) -> Value {
    let choice = |(i, c): (usize, &Completion)| {
        let s = c.sampler.as_ref().unwrap();
        let top = s.top.iter().map(|t| {
            let map = t.iter().map(|(id, lp)| (named(*id), json!(lp)));
            Value::Object(map.collect())
        });
        json!({"index": i, "token_ids": c.ids, "finish_reason": finish(c),
            "logprobs": {"token_logprobs": s.logprobs, "top_logprobs": top.collect::<Vec<_>>()}})
    };
    let mut all: Vec<Value> = completions.iter().enumerate().map(choice).collect();
    all.reverse();
    json!({"choices": all, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
}

/// As an older vLLM answers: tokens by name only.
fn names_only(completions: &[Completion]) -> Value {
    let mut answer = vllm(completions);
    for (choice, c) in answer["choices"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .rev()
        .zip(completions)
    {
        choice.as_object_mut().unwrap().remove("token_ids");
        choice["logprobs"]["tokens"] = c.ids.iter().map(|&id| json!(named(id))).collect();
    }
    answer
}

/// As llama.cpp's server answers.
fn llama_cpp(completions: &[Completion]) -> Value {
    let choice = |(i, c): (usize, &Completion)| {
        let s = c.sampler.as_ref().unwrap();
        let content = c
            .ids
            .iter()
            .zip(&s.logprobs)
            .zip(&s.top)
            .map(|((id, lp), top)| {
                let top = top.iter().map(|(id, lp)| json!({"id": id, "logprob": lp}));
                json!({"id": id, "logprob": lp, "top_logprobs": top.collect::<Vec<_>>()})
            });
        json!({"index": i, "finish_reason": finish(c),
            "logprobs": {"content": content.collect::<Vec<_>>()}})
    };
    json!({"choices": completions.iter().enumerate().map(choice).collect::<Vec<_>>()})
}

struct Server {
    url: String,
    asked: Arc<Mutex<Vec<Value>>>,
}

/// Answers with what `model` says under the settings of the question; `config` tells what questions do not.
fn server(model: Transformer, config: SamplingConfig, write: Write) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut head, mut length) = (String::new(), 0);
            while !head.ends_with("\r\n\r\n") {
                let from = head.len();
                if reader.read_line(&mut head).unwrap() == 0 {
                    break;
                }
                if let Some(n) = head[from..].to_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let q: Value = serde_json::from_slice(&body).unwrap();
            let prompt: Vec<u32> = serde_json::from_value(q["prompt"].clone()).unwrap();
            let request = GenerateRequest {
                // The tests' prompts begin with their key.
                prompt_key: u64::from(prompt[0]),
                prompt,
                samples: q["n"].as_u64().unwrap() as usize,
                max_new_tokens: None,
            };
            let mut config = config.clone();
            config.max_new_tokens = q["max_tokens"].as_u64().unwrap() as usize;
            config.top_logprobs = q["logprobs"].as_u64().unwrap() as usize;
            kept.lock().unwrap().push(q);
            let groups = Decoder::new(&model)
                .unwrap()
                .generate(&[request], &config, &GenerateLimits::default(), &mut |_| {})
                .unwrap();
            let text = write(&groups[0].completions).to_string();
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                text.len()
            );
            stream
                .write_all(format!("{head}{text}").as_bytes())
                .unwrap();
        }
    });
    Server { url, asked }
}

fn sampler(server: &Server, model: &Transformer, logprobs: ServerLogprobs) -> ServerSampler {
    let mut config = EndpointConfig::new(&server.url, "small");
    (config.tries, config.at_once) = (1, 3);
    ServerSampler::new(Endpoint::new(config).unwrap(), model.config(), logprobs)
}

fn requests() -> Vec<GenerateRequest> {
    let one = |i: u32| GenerateRequest {
        prompt: (i..i + 1 + i % 4).collect(),
        prompt_key: u64::from(i),
        samples: i as usize % 3,
        max_new_tokens: (i == 5).then_some(4),
    };
    (1..9).map(one).collect()
}

fn config() -> SamplingConfig {
    SamplingConfig {
        max_new_tokens: 12,
        eos_ids: vec![2, 5],
        top_logprobs: 3,
        seed: 8,
        policy_version: 4,
        ..SamplingConfig::default()
    }
}

#[test]
fn a_server_draws_what_the_model_here_draws() {
    let model = small(Kind::Float);
    let here = LocalSampler {
        decoder: Decoder::new(&model).unwrap(),
        limits: GenerateLimits::default(),
    };
    let here = here.sample(&requests(), &config()).unwrap();
    for write in [vllm as Write, names_only, llama_cpp] {
        let server = server(small(Kind::Float), config(), write);
        let there = sampler(&server, &model, ServerLogprobs::Model)
            .sample(&requests(), &config())
            .unwrap();
        assert_eq!(here.len(), there.len());
        for (a, b) in here.iter().zip(&there) {
            assert_eq!((a.row, &a.prompt), (b.row, &b.prompt));
            assert_eq!(a.completions.len(), b.completions.len());
            for (a, b) in a.completions.iter().zip(&b.completions) {
                assert_eq!((&a.ids, a.finish), (&b.ids, b.finish));
                let (a, b) = (a.sampler.as_ref().unwrap(), b.sampler.as_ref().unwrap());
                assert_eq!(a.policy_version, b.policy_version);
                assert_eq!((a.top.len(), a.top[0].len()), (b.top.len(), b.top[0].len()));
                let close = |x: &f32, y: &f32| (x - y).abs() < 1e-5;
                assert!(a.logprobs.iter().zip(&b.logprobs).all(|(x, y)| close(x, y)));
            }
        }
        assert_eq!(mismatch(&model, &there).tokens, tokens(&there));
        assert!(mismatch(&model, &there).largest < 1e-4);
    }
}

fn tokens(groups: &[PromptGroup]) -> u64 {
    let all = groups.iter().flat_map(|g| &g.completions);
    all.map(|c| c.ids.len() as u64).sum()
}

fn mismatch(model: &Transformer, groups: &[PromptGroup]) -> Mismatch {
    let groups: Vec<PromptGroup> = groups
        .iter()
        .filter(|g| !g.completions.is_empty())
        .cloned()
        .collect();
    let own = target_logprobs(model, &batch(&groups), 1.0, false).unwrap();
    let own = Vec::<f64>::try_from(own.logprobs.values()).unwrap();
    let drawn = groups.iter().flat_map(|g| &g.completions);
    let drawn = drawn.flat_map(|c| &c.sampler.as_ref().unwrap().logprobs);
    Mismatch::of(own, drawn.map(|&x| f64::from(x)))
}

/// Weights that are not the learner's show, and the estimate of their divergence is right on average: the
/// exact one sums over the vocabulary.
#[test]
fn other_weights_show_as_mismatch() {
    let (learner, other) = (small(Kind::Float), small(Kind::Float));
    {
        let _no_grad = tch::no_grad_guard();
        for (_, p) in other.parameters() {
            let _ = p.detach().g_mul_scalar_(1.03);
        }
    }
    let requests: Vec<GenerateRequest> = (0..40)
        .map(|i| GenerateRequest {
            prompt: vec![i],
            prompt_key: u64::from(i),
            samples: 60,
            max_new_tokens: None,
        })
        .collect();
    let one_token = SamplingConfig {
        max_new_tokens: 1,
        ..SamplingConfig::default()
    };
    let server = server(small(Kind::Float), one_token.clone(), vllm);
    let there = sampler(&server, &learner, ServerLogprobs::Model)
        .sample(&requests, &one_token)
        .unwrap();
    let seen = mismatch(&other, &there);
    let logits = |m: &Transformer| {
        let groups: Vec<PromptGroup> = (0..40).map(|i| crate::support::plain(0, &[i, 0])).collect();
        let batch = batch(&groups);
        let rows = m
            .hidden(&batch)
            .unwrap()
            .index_select(0, &batch.target_rows);
        let logits = rows.matmul(&m.lm_head().tr()).to_kind(Kind::Double);
        logits.log_softmax(-1, None::<Kind>)
    };
    let (mu, pi) = (logits(&learner), logits(&other));
    let exact = (mu.exp() * (&mu - &pi)).sum(None::<Kind>).double_value(&[]) / 40.0;
    assert!(
        exact > 1e-4 && (seen.kl / exact - 1.0).abs() < 0.3,
        "{} {exact}",
        seen.kl
    );
    assert!(seen.largest >= seen.mean && seen.mean > 1e-3);
    // What bf16 weights for decoding cost is measured the same way.
    let rounded = LocalSampler {
        decoder: Decoder::with_weights(&learner, DecoderWeights::Bf16).unwrap(),
        limits: GenerateLimits::default(),
    };
    let gap = mismatch(&learner, &rounded.sample(&requests, &one_token).unwrap());
    assert!(gap.kl < seen.kl && gap.largest < 0.2, "{gap:?}");
}

#[test]
fn only_what_is_asked_for_is_sent() {
    let server = server(small(Kind::Float), config(), vllm);
    let model = small(Kind::Float);
    let sampler = sampler(&server, &model, ServerLogprobs::Model).stop_at(vec!["END".into()]);
    let request = GenerateRequest {
        prompt: vec![7, 3],
        prompt_key: 7,
        samples: 2,
        max_new_tokens: Some(4),
    };
    sampler
        .sample(std::slice::from_ref(&request), &config())
        .unwrap();
    let all = SamplingConfig {
        temperature: 0.7,
        top_k: Some(5),
        top_p: Some(0.9),
        min_p: Some(0.01),
        min_new_tokens: 1,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.3,
        logit_bias: vec![(4, f64::NEG_INFINITY)],
        record: RecordedLogprobs::Model,
        eos_ids: Vec::new(),
        ..config()
    };
    sampler.sample(&[request], &all).unwrap();
    let asked = server.asked.lock().unwrap();
    let keys = |q: &Value| {
        let mut keys: Vec<String> = q.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys.join(" ")
    };
    assert_eq!(
        keys(&asked[0]),
        "add_special_tokens include_stop_str_in_output logprobs max_tokens model n prompt return_token_ids return_tokens_as_token_ids seed skip_special_tokens stop stop_token_ids temperature"
    );
    assert_eq!(
        keys(&asked[1]),
        "add_special_tokens frequency_penalty ignore_eos include_stop_str_in_output logit_bias logprobs max_tokens min_p min_tokens model n presence_penalty prompt repetition_penalty return_token_ids return_tokens_as_token_ids seed skip_special_tokens stop temperature top_k top_p"
    );
    assert_eq!(asked[0]["prompt"], json!([7, 3]));
    assert_eq!(
        (&asked[0]["n"], &asked[0]["max_tokens"]),
        (&json!(2), &json!(4))
    );
    assert_eq!(asked[0]["seed"], asked[1]["seed"]);
    assert_eq!(asked[1]["logit_bias"], json!({"4": -100.0}));
}

#[test]
fn answers_that_cannot_be_used() {
    let cases: [(Write, &str); 9] = [
        (|_| json!({"error": "x"}), "no `choices`"),
        (|c| json!({"choices": [vllm(c)["choices"][0]]}), "choices"),
        (
            |c| {
                let mut a = vllm(c);
                a["choices"][0]["index"] = json!(0);
                a
            },
            "comes twice",
        ),
        (
            |c| {
                let mut a = vllm(c);
                a["choices"][0]["token_ids"][0] = json!(40);
                a
            },
            "another model",
        ),
        (
            |c| {
                let mut a = vllm(c);
                a["choices"][0]["finish_reason"] = json!("abort");
                a
            },
            "finish_reason",
        ),
        (
            |c| {
                let mut a = vllm(c);
                a["choices"][0]["logprobs"] = Value::Null;
                a
            },
            "must give them",
        ),
        (
            |c| {
                let mut a = vllm(c);
                a["choices"][0]["logprobs"]["token_logprobs"][0] = Value::Null;
                a
            },
            "at most 0",
        ),
        (
            |c| {
                let mut a = vllm(c);
                a["choices"][0]["prompt_token_ids"] = json!([1]);
                a
            },
            "another prompt",
        ),
        (
            |c| {
                let mut a = vllm(c);
                a["choices"][0]["token_ids"] = json!([9]);
                a["choices"][0]["finish_reason"] = json!("stop");
                a
            },
            "leaves that token out",
        ),
    ];
    let model = small(Kind::Float);
    let request = GenerateRequest {
        prompt: vec![7, 3],
        prompt_key: 7,
        samples: 2,
        max_new_tokens: None,
    };
    for (write, message) in cases {
        let server = server(small(Kind::Float), config(), write);
        let e = sampler(&server, &model, ServerLogprobs::Model)
            .sample(std::slice::from_ref(&request), &config())
            .unwrap_err();
        let e = e.to_string();
        assert!(
            e.contains(message) && e.contains("request 0"),
            "{message}: {e}"
        );
    }
}

#[test]
fn log_probabilities_of_another_distribution_are_refused() {
    let model = small(Kind::Float);
    let server = Server {
        url: "http://localhost:1/v1".into(),
        asked: Arc::default(),
    };
    let warm = |record| SamplingConfig {
        temperature: 0.5,
        record,
        ..config()
    };
    for (gives, wants, message) in [
        (
            ServerLogprobs::Model,
            RecordedLogprobs::Sampled,
            "--logprobs-mode",
        ),
        (
            ServerLogprobs::Sampled,
            RecordedLogprobs::Model,
            "not the model's",
        ),
    ] {
        let e = sampler(&server, &model, gives).sample(&requests(), &warm(wants));
        assert!(e.unwrap_err().to_string().contains(message));
    }
    let mut long = requests();
    long[0].prompt = vec![1; 70];
    let e = sampler(&server, &model, ServerLogprobs::Model).sample(&long, &config());
    assert!(
        e.unwrap_err()
            .to_string()
            .contains("the model's context holds 64")
    );
}
