//! What steers a completion besides the model: penalties, biases, stop strings, limits of one's own,
//! and the likeliest tokens that are recorded. The oracle is a plain loop over whole sequences.

use rlhf_data::group::Finish;
use rlhf_model::{
    Decoder, GenerateLimits, GenerateRequest, RecordedLogprobs, SamplingConfig, StopStrings,
    Transformer, generate,
};
use tch::Kind;

use crate::support::{batch, on_device, own, plain, small};

/// Logits after the last of `ids`.
fn last_logits(model: &Transformer, ids: &[u32]) -> Vec<f64> {
    let _no_grad = tch::no_grad_guard();
    let logits = model.logits(&batch(&[plain(0, ids)])).unwrap();
    Vec::try_from(logits.get(ids.len() as i64 - 1).to_kind(Kind::Double)).unwrap()
}

fn requests() -> Vec<GenerateRequest> {
    [&[3_u32, 9, 9, 4][..], &[7], &[1, 2, 3, 4, 5, 6, 7, 8]]
        .iter()
        .enumerate()
        .map(|(i, prompt)| GenerateRequest {
            prompt: prompt.to_vec(),
            prompt_key: i as u64,
            samples: 1,
            max_new_tokens: None,
        })
        .collect()
}

fn greedy_config() -> SamplingConfig {
    SamplingConfig {
        temperature: 0.0,
        max_new_tokens: 24,
        ..SamplingConfig::default()
    }
}

fn texts(model: &Transformer, config: &SamplingConfig) -> Vec<Vec<u32>> {
    let limits = GenerateLimits::default();
    let groups = generate(model, &requests(), config, &limits, &mut |_| {}).unwrap();
    groups
        .into_iter()
        .map(|mut g| g.completions.remove(0).ids)
        .collect()
}

#[test]
fn penalties_and_biases_are_the_plain_loop() {
    let model = small(Kind::Double);
    let mut differing = 0;
    for (repetition, presence, frequency, bias) in [
        (1.3, 0.0, 0.0, vec![]),
        (1.0, 0.6, 0.0, vec![]),
        (1.0, 0.0, 0.25, vec![]),
        (
            0.8,
            -0.3,
            0.4,
            vec![(5, 1.5), (11, f64::NEG_INFINITY), (5, 0.5)],
        ),
    ] {
        let config = SamplingConfig {
            repetition_penalty: repetition,
            presence_penalty: presence,
            frequency_penalty: frequency,
            logit_bias: bias.clone(),
            ..greedy_config()
        };
        let ours = texts(&model, &config);
        differing += usize::from(ours != texts(&model, &greedy_config()));
        for (request, ours) in requests().iter().zip(&ours) {
            let mut ids = request.prompt.clone();
            let mut said: Vec<u32> = Vec::new();
            for (step, &got) in ours.iter().enumerate() {
                let mut logits = last_logits(&model, &ids);
                for (id, z) in logits.iter_mut().enumerate() {
                    let id = id as u32;
                    if ids.contains(&id) {
                        *z = if *z > 0.0 {
                            *z / repetition
                        } else {
                            *z * repetition
                        };
                    }
                    let count = said.iter().filter(|&&s| s == id).count() as f64;
                    *z -= frequency * count + if count > 0.0 { presence } else { 0.0 };
                    *z += bias
                        .iter()
                        .filter(|(b, _)| *b == id)
                        .map(|(_, x)| x)
                        .sum::<f64>();
                }
                let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
                let best = best.unwrap() as u32;
                assert_eq!(got, best, "step {step}");
                ids.push(best);
                said.push(best);
            }
            assert!(!ours.contains(&11) || bias.is_empty());
        }
    }
    assert_eq!(differing, 4, "every setting changes something here");
}

#[test]
fn the_likeliest_tokens_are_the_models() {
    let model = small(Kind::Double);
    for record in [RecordedLogprobs::Sampled, RecordedLogprobs::Model] {
        let config = SamplingConfig {
            temperature: 0.7,
            top_k: Some(6),
            max_new_tokens: 10,
            top_logprobs: 8,
            record,
            ..SamplingConfig::default()
        };
        let limits = GenerateLimits::default();
        let groups = generate(&model, &requests(), &config, &limits, &mut |_| {}).unwrap();
        for (request, group) in requests().iter().zip(&groups) {
            let completion = &group.completions[0];
            let sampler = completion.sampler.as_ref().unwrap();
            assert_eq!(sampler.top.len(), completion.ids.len());
            let mut ids = request.prompt.clone();
            for (step, top) in sampler.top.iter().enumerate() {
                let mut logits = last_logits(&model, &ids);
                if record == RecordedLogprobs::Sampled {
                    logits.iter_mut().for_each(|z| *z /= 0.7);
                }
                let mut order: Vec<usize> = (0..logits.len()).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
                // Sampled: six tokens are left of all; the model's: eight of all are listed.
                let (kept, shown) = match record {
                    RecordedLogprobs::Sampled => (6, 6),
                    RecordedLogprobs::Model => (logits.len(), 8),
                };
                let total: f64 = order[..kept].iter().map(|&i| logits[i].exp()).sum();
                assert_eq!(top.len(), shown);
                for (&(id, logprob), &i) in top.iter().zip(&order) {
                    assert_eq!(id, i as u32);
                    assert!((f64::from(logprob) - (logits[i] - total.ln())).abs() < 1e-6);
                }
                let drawn = completion.ids[step];
                if let Some((_, logprob)) = top.iter().find(|(id, _)| *id == drawn) {
                    assert_eq!(*logprob, sampler.logprobs[step]);
                }
                ids.push(drawn);
            }
        }
        // Nothing is recorded unasked.
        let unasked = SamplingConfig {
            top_logprobs: 0,
            ..config
        };
        let groups = generate(&model, &requests(), &unasked, &limits, &mut |_| {}).unwrap();
        let first = &groups[0].completions[0];
        assert!(first.sampler.as_ref().unwrap().top.is_empty());
    }
}

#[test]
fn stop_strings_end_a_completion_with_the_token_that_completes_them() {
    let model = Transformer::load(&own("models/llama"), &on_device()).unwrap();
    // Tokens of one to three letters, so that strings begin and end within tokens.
    let word = |id: u32| {
        let letter = |n: u32| char::from(b'a' + (n % 26) as u8);
        (0..=id % 3)
            .map(|i| letter(id / 3 + i * 7))
            .collect::<String>()
    };
    let decode = |ids: &[u32]| ids.iter().map(|&id| word(id)).collect::<String>();
    let config = SamplingConfig {
        max_new_tokens: 30,
        seed: 3,
        ..SamplingConfig::default()
    };
    let requests: Vec<GenerateRequest> = requests()
        .into_iter()
        .map(|r| GenerateRequest { samples: 4, ..r })
        .collect();
    let limits = GenerateLimits::default();
    let free = generate(&model, &requests, &config, &limits, &mut |_| {}).unwrap();
    // A string that some completion says.
    let long = decode(&free[1].completions[2].ids);
    let strings = vec![long[11..15].to_owned(), "never said".to_owned()];
    let stop = StopStrings {
        strings: &strings,
        decode: &decode,
    };
    let decoder = Decoder::new(&model).unwrap().stop_at(stop).unwrap();
    let held = decoder
        .generate(&requests, &config, &limits, &mut |_| {})
        .unwrap();
    let mut stopped = 0;
    for (free, held) in free.iter().zip(&held) {
        for (free, held) in free.completions.iter().zip(&held.completions) {
            let ends = |n: &usize| decode(&free.ids[..*n]).contains(&strings[0]);
            match (1..=free.ids.len()).find(ends) {
                Some(n) => {
                    assert_eq!(
                        (held.ids.as_slice(), held.finish),
                        (&free.ids[..n], Finish::Stop)
                    );
                    stopped += 1;
                }
                None => assert_eq!(held, free),
            }
        }
    }
    assert!(stopped >= 1);
    let empty = vec![String::new()];
    let stop = StopStrings {
        strings: &empty,
        decode: &decode,
    };
    assert!(Decoder::new(&model).unwrap().stop_at(stop).is_err());
}

#[test]
fn a_prompt_may_have_a_limit_of_its_own() {
    let model = small(Kind::Float);
    let mut list = requests();
    list[0].max_new_tokens = Some(3);
    list[2].max_new_tokens = Some(100);
    let limits = GenerateLimits::default();
    let out = generate(&model, &list, &greedy_config(), &limits, &mut |_| {}).unwrap();
    let lengths: Vec<usize> = out.iter().map(|g| g.completions[0].ids.len()).collect();
    assert_eq!(lengths, [3, 24, 24]);
    list[1].max_new_tokens = Some(0);
    let e = generate(&model, &list, &greedy_config(), &limits, &mut |_| {}).unwrap_err();
    assert!(e.to_string().contains("request 1: max_new_tokens"), "{e}");
}

#[test]
fn settings_out_of_range_are_named() {
    let model = small(Kind::Float);
    let base = greedy_config;
    for (config, expect) in [
        (
            SamplingConfig {
                repetition_penalty: 0.0,
                ..base()
            },
            "repetition_penalty 0",
        ),
        (
            SamplingConfig {
                presence_penalty: f64::NAN,
                ..base()
            },
            "presence_penalty NaN",
        ),
        (
            SamplingConfig {
                frequency_penalty: f64::INFINITY,
                ..base()
            },
            "frequency_penalty inf",
        ),
        (
            SamplingConfig {
                logit_bias: vec![(4, f64::NAN)],
                ..base()
            },
            "of token 4",
        ),
        (
            SamplingConfig {
                logit_bias: vec![(400, 1.0)],
                ..base()
            },
            "token 400 of logit_bias",
        ),
    ] {
        let limits = GenerateLimits::default();
        let e = generate(&model, &requests(), &config, &limits, &mut |_| {}).unwrap_err();
        assert!(e.to_string().contains(expect), "{e}");
    }
}
