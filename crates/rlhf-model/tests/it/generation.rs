//! Generation: independent of the batch, right about ends, limits and log-probabilities.

use std::collections::BTreeMap;

use rlhf_data::group::{Finish, PromptGroup};
use rlhf_model::{
    CausalLm, Decoder, DecoderWeights, GenerateLimits, GenerateProgress, GenerateRequest, Mismatch,
    RecordedLogprobs, SamplingConfig, Transformer, generate, target_logprobs,
};
use tch::{Device, Kind, Tensor};

use crate::device::{device, from_slice};
use crate::support::{batch, max_diff, on_device, own, small};

fn llama() -> Transformer {
    Transformer::load(&own("models/llama"), &on_device()).unwrap()
}

fn run(
    model: &Transformer,
    requests: &[GenerateRequest],
    config: &SamplingConfig,
    limits: &GenerateLimits,
) -> Vec<PromptGroup> {
    generate(model, requests, config, limits, &mut |_| {}).unwrap()
}

/// 32 prompts of 1 to 12 tokens with 1 to 3 samples.
fn requests(vocab: u32) -> Vec<GenerateRequest> {
    (0..32_u32)
        .map(|i| GenerateRequest {
            prompt: (0..=(i * 5) % 12)
                .map(|j| (i * 31 + j * 17 + 3) % vocab)
                .collect(),
            prompt_key: u64::from(i) + 1000,
            samples: 1 + (i % 3) as usize,
            max_new_tokens: None,
        })
        .collect()
}

fn settings() -> Vec<SamplingConfig> {
    let base = SamplingConfig {
        max_new_tokens: 20,
        eos_ids: vec![2, 5, 9],
        seed: 11,
        ..SamplingConfig::default()
    };
    vec![
        SamplingConfig {
            temperature: 0.0,
            ..base.clone()
        },
        base.clone(),
        SamplingConfig {
            temperature: 0.8,
            top_k: Some(12),
            top_p: Some(0.9),
            min_p: Some(0.02),
            ..base
        },
    ]
}

#[test]
fn the_same_text_alone_and_among_others() {
    for (model, vocab) in [(llama(), 384), (small(Kind::Float), 40)] {
        let requests = requests(vocab);
        for config in settings() {
            let together = run(&model, &requests, &config, &GenerateLimits::default());
            // A small batch with late arrivals, rows of the last group waiting, timeline shifts.
            let tight = GenerateLimits {
                max_batch_sequences: 4,
                max_prefill_tokens: 16,
                ..GenerateLimits::default()
            };
            let queued = run(&model, &requests, &config, &tight);
            for (i, request) in requests.iter().enumerate() {
                let alone = run(
                    &model,
                    std::slice::from_ref(request),
                    &config,
                    &GenerateLimits::default(),
                );
                for (a, b) in [(&alone[0], &together[i]), (&alone[0], &queued[i])] {
                    assert_eq!((a.row, &a.prompt), (b.row, &b.prompt));
                    assert_eq!(a.completions.len(), b.completions.len());
                    for (a, b) in a.completions.iter().zip(&b.completions) {
                        assert_eq!((&a.ids, a.finish), (&b.ids, b.finish), "request {i}");
                        let (a, b) = (a.sampler.as_ref().unwrap(), b.sampler.as_ref().unwrap());
                        for (a, b) in a.logprobs.iter().zip(&b.logprobs) {
                            assert!((a - b).abs() < 1e-4, "request {i}: {a} {b}");
                        }
                    }
                }
            }
        }
    }
}

/// As many sequences run together as the cache may hold, with the same completions; with shared prompts (f32 on the
/// CPU) and with a copy for each sample (f64).
#[test]
fn the_cache_stays_within_its_limit() {
    for kind in [Kind::Float, Kind::Double] {
        let (model, requests) = (small(kind), requests(40));
        let config = &settings()[1];
        let free = run(&model, &requests, config, &GenerateLimits::default());
        let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap();
        let width = longest + config.max_new_tokens;
        let limits = GenerateLimits {
            max_cache_tokens: 5 * width + 1,
            ..GenerateLimits::default()
        };
        let mut most = 0;
        let mut progress = |event| {
            if let GenerateProgress::Step { live, .. } = event {
                most = most.max(live);
            }
        };
        let bound = generate(&model, &requests, config, &limits, &mut progress).unwrap();
        assert_eq!(most, 5);
        for (a, b) in free.iter().zip(&bound) {
            let ids = |g: &PromptGroup| -> Vec<Vec<u32>> {
                g.completions.iter().map(|c| c.ids.clone()).collect()
            };
            assert_eq!(ids(a), ids(b));
        }
    }
}

#[test]
fn recorded_logprobs_are_those_of_the_learner() {
    // Unfiltered at temperature 0.7: the sampler's record is what training computes.
    let model = small(Kind::Double);
    let config = SamplingConfig {
        temperature: 0.7,
        max_new_tokens: 12,
        eos_ids: vec![2],
        policy_version: 42,
        ..SamplingConfig::default()
    };
    for (record, temperature) in [
        (RecordedLogprobs::Sampled, 0.7),
        (RecordedLogprobs::Model, 1.0),
    ] {
        let config = SamplingConfig {
            record,
            ..config.clone()
        };
        let groups = run(&model, &requests(40), &config, &GenerateLimits::default());
        let recorded: Vec<f32> = groups
            .iter()
            .flat_map(|g| &g.completions)
            .flat_map(|c| c.sampler.as_ref().unwrap().logprobs.clone())
            .collect();
        assert!(
            groups.iter().flat_map(|g| &g.completions).all(|c| c
                .sampler
                .as_ref()
                .unwrap()
                .policy_version
                == 42)
        );
        let _no_grad = tch::no_grad_guard();
        let learner = target_logprobs(&model, &batch(&groups), temperature, false).unwrap();
        let d = max_diff(&from_slice(&recorded), learner.logprobs.values());
        assert!(d < 1e-5, "{record:?}: {d}");
    }
}

#[test]
fn samples_follow_the_distribution() {
    // First tokens of 4000 samples against the model's distribution, χ² over the 8 likeliest and
    // the rest: 8 degrees of freedom, 99.99 % below 31.8.
    let model = small(Kind::Float);
    let prompt = vec![3, 4, 5];
    let request = GenerateRequest {
        prompt: prompt.clone(),
        prompt_key: 1,
        samples: 4000,
        max_new_tokens: None,
    };
    let config = SamplingConfig {
        max_new_tokens: 1,
        seed: 3,
        ..SamplingConfig::default()
    };
    let groups = run(&model, &[request], &config, &GenerateLimits::default());
    let mut counts = BTreeMap::new();
    for c in &groups[0].completions {
        assert_eq!((c.ids.len(), c.finish), (1, Finish::Length));
        *counts.entry(c.ids[0]).or_insert(0.0) += 1.0;
    }
    let ids: Vec<u32> = prompt;
    let b = batch(&[crate::support::plain(0, &ids)]);
    let logits = model.logits(&b).unwrap().detach().get(2);
    let p = Vec::<f64>::try_from(logits.to_kind(Kind::Double).softmax(0, None::<Kind>)).unwrap();
    let mut order: Vec<usize> = (0..40).collect();
    order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
    let (mut chi, mut rest_p, mut rest_n) = (0.0, 1.0, 4000.0);
    for &id in &order[..8] {
        let n = counts.get(&(id as u32)).copied().unwrap_or(0.0);
        let e = 4000.0 * p[id];
        chi += (n - e) * (n - e) / e;
        rest_p -= p[id];
        rest_n -= n;
    }
    chi += (rest_n - 4000.0 * rest_p).powi(2) / (4000.0 * rest_p);
    eprintln!("chi² {chi:.1}");
    assert!(chi < 31.8);
}

#[test]
fn ends_and_limits() {
    let model = llama();
    let request = |n: u32| GenerateRequest {
        prompt: (0..n).map(|i| 3 + i % 300).collect(),
        prompt_key: 0,
        samples: 2,
        max_new_tokens: None,
    };
    // The context of 256 is full after 6 more tokens.
    let config = SamplingConfig {
        max_new_tokens: 100,
        ..SamplingConfig::default()
    };
    let out = run(
        &model,
        &[request(250), request(3)],
        &config,
        &GenerateLimits::default(),
    );
    assert!(
        out[0]
            .completions
            .iter()
            .all(|c| c.ids.len() == 6 && c.finish == Finish::Length)
    );
    assert!(
        out[1]
            .completions
            .iter()
            .all(|c| c.ids.len() == 100 && c.finish == Finish::Length)
    );
    assert_ne!(out[1].completions[0].ids, out[1].completions[1].ids);
    // Several end tokens: a stopped completion ends with one of them and holds no other.
    let eos: Vec<u32> = (0..60).collect();
    let config = SamplingConfig {
        eos_ids: eos,
        ..config
    };
    let out = run(&model, &requests(384), &config, &GenerateLimits::default());
    let all: Vec<_> = out.iter().flat_map(|g| &g.completions).collect();
    assert!(all.iter().filter(|c| c.finish == Finish::Stop).count() > 30);
    for c in all.iter().filter(|c| c.finish == Finish::Stop) {
        assert!(*c.ids.last().unwrap() < 60);
        assert!(c.ids[..c.ids.len() - 1].iter().all(|&id| id >= 60));
    }
    let config = SamplingConfig {
        min_new_tokens: 5,
        ..config
    };
    let out = run(&model, &requests(384), &config, &GenerateLimits::default());
    assert!(
        out.iter()
            .flat_map(|g| &g.completions)
            .all(|c| c.ids.len() > 5)
    );
}

#[test]
fn what_cannot_be_generated_is_refused() {
    let model = llama();
    let one = |prompt: Vec<u32>| {
        vec![GenerateRequest {
            prompt,
            prompt_key: 0,
            samples: 1,
            max_new_tokens: None,
        }]
    };
    let config = SamplingConfig::default();
    let limits = GenerateLimits::default();
    let error = |r: &[GenerateRequest], c: &SamplingConfig, l: &GenerateLimits| {
        generate(&model, r, c, l, &mut |_| {})
            .unwrap_err()
            .to_string()
    };
    assert!(error(&one(vec![]), &config, &limits).contains("request 0: the prompt is empty"));
    let e = error(&one(vec![3; 256]), &config, &limits);
    assert!(e.contains("256 tokens") && e.contains("holds 256"), "{e}");
    assert!(error(&one(vec![384]), &config, &limits).contains("token id 384"));
    for (c, word) in [
        (
            SamplingConfig {
                temperature: -1.0,
                ..config.clone()
            },
            "temperature",
        ),
        (
            SamplingConfig {
                top_p: Some(2.0),
                ..config.clone()
            },
            "top_p",
        ),
        (
            SamplingConfig {
                max_new_tokens: 0,
                ..config.clone()
            },
            "max_new_tokens",
        ),
        (
            SamplingConfig {
                eos_ids: vec![400],
                ..config.clone()
            },
            "400",
        ),
    ] {
        let e = error(&one(vec![3]), &c, &limits);
        assert!(e.contains(word), "{e}");
    }
    let none = GenerateLimits {
        max_batch_sequences: 0,
        ..limits
    };
    assert!(error(&one(vec![3]), &config, &none).contains("max_batch_sequences"));
}

#[test]
fn progress_tells_every_token_once() {
    let model = small(Kind::Float);
    let requests = requests(40);
    let config = &settings()[1];
    let (mut seen, mut last) = (BTreeMap::<(usize, usize), Vec<u32>>::new(), None);
    let limits = GenerateLimits {
        max_batch_sequences: 8,
        ..GenerateLimits::default()
    };
    let decoder = Decoder::new(&model).unwrap();
    let groups = decoder
        .generate(&requests, config, &limits, &mut |p| match p {
            GenerateProgress::Token {
                request,
                sample,
                id,
                ..
            } => {
                seen.entry((request, sample)).or_default().push(id);
            }
            other => last = Some(other),
        })
        .unwrap();
    for (r, group) in groups.iter().enumerate() {
        for (s, c) in group.completions.iter().enumerate() {
            assert_eq!(seen.remove(&(r, s)).unwrap(), c.ids);
        }
    }
    assert!(seen.is_empty());
    let total: usize = requests.iter().map(|r| r.samples).sum();
    let tokens: usize = groups
        .iter()
        .flat_map(|g| &g.completions)
        .map(|c| c.ids.len())
        .sum();
    let end = GenerateProgress::Step {
        live: 0,
        finished: total,
        total,
        tokens: tokens as u64,
    };
    assert_eq!(last, Some(end));
    // No requests, and a request without samples, are no special case.
    assert!(
        decoder
            .generate(&[], config, &limits, &mut |_| {})
            .unwrap()
            .is_empty()
    );
    let none = GenerateRequest {
        samples: 0,
        max_new_tokens: None,
        ..requests[0].clone()
    };
    let out = decoder
        .generate(&[none], config, &limits, &mut |_| {})
        .unwrap();
    assert!(out[0].completions.is_empty());
}

/// Decoding weights in bf16 are those weights rounded and nothing else: of a model whose matrices are
/// numbers of bf16 already, they make no difference at all, of another one a small one.
#[test]
fn weights_kept_in_bf16_for_decoding() {
    if device() != Device::Cpu {
        println!("skipped: on the CPU only");
        return;
    }
    let config = SamplingConfig {
        max_new_tokens: 24,
        seed: 3,
        ..SamplingConfig::default()
    };
    let requests = requests(40);
    let draw = |model: &Transformer, weights: DecoderWeights| {
        Decoder::with_weights(model, weights)
            .unwrap()
            .generate(&requests, &config, &GenerateLimits::default(), &mut |_| {})
            .unwrap()
    };
    let model = small(Kind::Float);
    for (weights, most) in [
        (DecoderWeights::AsLoaded, 1e-4),
        (DecoderWeights::Bf16, 0.3),
    ] {
        let groups = draw(&model, weights);
        let own = target_logprobs(&model, &batch(&groups), 1.0, false).unwrap();
        let own = Vec::<f64>::try_from(own.logprobs.values()).unwrap();
        let drawn = groups.iter().flat_map(|g| &g.completions);
        let drawn = drawn.flat_map(|c| &c.sampler.as_ref().unwrap().logprobs);
        let gaps = own
            .iter()
            .zip(drawn)
            .map(|(a, b)| (a - f64::from(*b)).abs());
        let gap = gaps.fold(0.0, f64::max);
        assert!(gap < most, "{weights:?}: {gap}");
        assert_eq!(weights == DecoderWeights::Bf16, gap > 1e-3, "{gap}");
    }
    {
        let _no_grad = tch::no_grad_guard();
        for (_, mut p) in model.parameters() {
            p.copy_(&p.to_kind(Kind::BFloat16).to_kind(Kind::Float));
        }
    }
    assert_eq!(
        draw(&model, DecoderWeights::AsLoaded),
        draw(&model, DecoderWeights::Bf16)
    );
    // A model in bf16 decodes from the same panels, its activations rounded too.
    let narrow = small(Kind::BFloat16);
    let (a, b) = (
        draw(&narrow, DecoderWeights::AsLoaded),
        draw(&narrow, DecoderWeights::Bf16),
    );
    assert_eq!(a, b);
    let own = target_logprobs(&narrow, &batch(&a), 1.0, false).unwrap();
    let drawn = a.iter().flat_map(|g| &g.completions);
    let drawn = drawn.flat_map(|c| &c.sampler.as_ref().unwrap().logprobs);
    let own = Vec::<f64>::try_from(own.logprobs.values()).unwrap();
    let gap = Mismatch::of(own, drawn.map(|&x| f64::from(x)));
    assert!(gap.mean < 0.03 && gap.kl < 0.005, "{gap:?}");
    let double = small(Kind::Double);
    let e = Decoder::with_weights(&double, DecoderWeights::Bf16).unwrap_err();
    assert!(e.to_string().contains("f32 models on the CPU"), "{e}");
}

/// Two random models of one vocabulary.
fn two() -> [Transformer; 2] {
    let other = small(Kind::Double);
    for (i, (_, t)) in other.parameters().into_iter().enumerate() {
        let _no_grad = tch::no_grad_guard();
        let wave = Tensor::arange(t.numel() as i64, (Kind::Double, device())) + i as f64;
        let _ = t
            .detach()
            .g_add_(&((wave * 0.9).sin() * 0.2).view(t.size().as_slice()));
    }
    [small(Kind::Double), other]
}

#[test]
fn a_mixture_draws_from_the_normalised_product_of_two_models() {
    let [a, b] = two();
    let share = 0.3;
    let config = SamplingConfig {
        max_new_tokens: 12,
        eos_ids: vec![2, 5],
        seed: 4,
        ..SamplingConfig::default()
    };
    // A small batch with late arrivals: both caches move together.
    let limits = GenerateLimits {
        max_batch_sequences: 5,
        max_prefill_tokens: 20,
        ..GenerateLimits::default()
    };
    let requests = requests(40);
    let draw = |share: f64| {
        let decoder = Decoder::new(&a).unwrap().mixed_with(&b, share).unwrap();
        let groups = decoder.generate(&requests, &config, &limits, &mut |_| {});
        groups.unwrap()
    };
    for group in draw(share) {
        let packed = batch(std::slice::from_ref(&group));
        let at = |model: &Transformer| {
            model
                .logits(&packed)
                .unwrap()
                .index_select(0, &packed.target_rows)
        };
        // π_a^0.7 π_b^0.3, normalised, token by token.
        let mixed = at(&a).log_softmax(-1, None::<Kind>) * (1.0 - share)
            + at(&b).log_softmax(-1, None::<Kind>) * share;
        let expected = mixed
            .log_softmax(-1, None::<Kind>)
            .gather(1, &packed.target_ids.unsqueeze(1), false)
            .squeeze_dim(1);
        let drawn: Vec<f64> = group
            .completions
            .iter()
            .flat_map(|c| &c.sampler.as_ref().unwrap().logprobs)
            .map(|lp| f64::from(*lp))
            .collect();
        assert!(max_diff(&from_slice(&drawn), &expected) < 1e-5);
    }
    // With no share it is the one model, with all of it the other.
    let ids = |groups: &[PromptGroup]| -> Vec<Vec<u32>> {
        let all = groups.iter().flat_map(|g| &g.completions);
        all.map(|c| c.ids.clone()).collect()
    };
    assert_eq!(ids(&draw(0.0)), ids(&run(&a, &requests, &config, &limits)));
    assert_eq!(ids(&draw(1.0)), ids(&run(&b, &requests, &config, &limits)));
    assert_ne!(ids(&draw(0.0)), ids(&draw(1.0)));
    assert!(Decoder::new(&a).unwrap().mixed_with(&b, 1.5).is_err());
    let stranger = llama();
    let e = Decoder::new(&a).unwrap().mixed_with(&stranger, 0.5);
    assert!(e.unwrap_err().to_string().contains("cannot be mixed"));
}
