//! Tokens per second of generation, beside the bound that its matrix products set.
#![allow(clippy::expect_used, clippy::print_stderr, reason = "a benchmark")]

use std::cell::OnceCell;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rlhf_model::{
    Config, Decoder, DecoderWeights, GenerateLimits, GenerateRequest, SamplingConfig, Transformer,
};
use tch::{Device, Kind, Tensor};

struct Shape {
    name: &'static str,
    config: Config,
    prompts: u32,
    samples: usize,
    prompt_tokens: u32,
    new_tokens: usize,
    weights: DecoderWeights,
}

fn shapes() -> Vec<Shape> {
    let mut small = Config::new(2048, 192, 4, 6, 256);
    small.num_key_value_heads = 2;
    let mut stories15m = Config::new(32_000, 288, 6, 6, 256);
    stories15m.intermediate_size = 768;
    let mut smollm2 = Config::new(49_152, 576, 30, 9, 2048);
    (smollm2.num_key_value_heads, smollm2.intermediate_size) = (3, 1536);
    vec![
        Shape {
            name: "2M, groups of 8, prompt 40 + 40",
            config: small,
            prompts: 32,
            samples: 8,
            prompt_tokens: 40,
            new_tokens: 40,
            weights: DecoderWeights::AsLoaded,
        },
        Shape {
            name: "stories15M, batch 8, prompt 32 + 128",
            config: stories15m.clone(),
            prompts: 8,
            samples: 1,
            prompt_tokens: 32,
            new_tokens: 128,
            weights: DecoderWeights::AsLoaded,
        },
        Shape {
            name: "stories15M, batch 32, prompt 32 + 128",
            config: stories15m,
            prompts: 32,
            samples: 1,
            prompt_tokens: 32,
            new_tokens: 128,
            weights: DecoderWeights::AsLoaded,
        },
        Shape {
            name: "SmolLM2-135M, batch 8, prompt 32 + 128",
            config: smollm2.clone(),
            prompts: 8,
            samples: 1,
            prompt_tokens: 32,
            new_tokens: 128,
            weights: DecoderWeights::AsLoaded,
        },
        Shape {
            name: "SmolLM2-135M, batch 32, prompt 32 + 128",
            config: smollm2.clone(),
            prompts: 32,
            samples: 1,
            prompt_tokens: 32,
            new_tokens: 128,
            weights: DecoderWeights::AsLoaded,
        },
        Shape {
            name: "SmolLM2-135M, batch 8, prompt 32 + 128, weights in bf16",
            config: smollm2.clone(),
            prompts: 8,
            samples: 1,
            prompt_tokens: 32,
            new_tokens: 128,
            weights: DecoderWeights::Bf16,
        },
        Shape {
            name: "SmolLM2-135M, batch 32, prompt 32 + 128, weights in bf16",
            config: smollm2.clone(),
            prompts: 32,
            samples: 1,
            prompt_tokens: 32,
            new_tokens: 128,
            weights: DecoderWeights::Bf16,
        },
        Shape {
            name: "SmolLM2-135M, prompt 512, 1 sample of 1",
            config: smollm2.clone(),
            prompts: 1,
            samples: 1,
            prompt_tokens: 512,
            new_tokens: 1,
            weights: DecoderWeights::AsLoaded,
        },
        Shape {
            name: "SmolLM2-135M, prompt 512, 8 samples of 1",
            config: smollm2,
            prompts: 1,
            samples: 8,
            prompt_tokens: 512,
            new_tokens: 1,
            weights: DecoderWeights::AsLoaded,
        },
    ]
}

/// f32 multiply-adds per second of a large square product, and bytes per second of a stream of reads.
fn machine() -> (f64, f64) {
    let a = Tensor::ones([1024, 1024], (Kind::Float, Device::Cpu));
    let _ = a.mm(&a);
    let start = Instant::now();
    for _ in 0..8 {
        let _ = a.mm(&a);
    }
    let products = 8.0 * 1024_f64.powi(3) / start.elapsed().as_secs_f64();
    // 512 MiB: no cache holds it.
    let far = Tensor::ones([1 << 27], (Kind::Float, Device::Cpu));
    let _ = far.max();
    let start = Instant::now();
    for _ in 0..4 {
        let _ = far.max();
    }
    let reads = 4.0 * f64::from(1 << 29) / start.elapsed().as_secs_f64();
    (products, reads)
}

fn generation(c: &mut Criterion) {
    let _no_grad = tch::no_grad_guard();
    let (products, reads) = machine();
    let mut group = c.benchmark_group("generate");
    group.sample_size(10);
    for shape in shapes() {
        // Made when it is first asked for: a filter may leave the shape out.
        let model = OnceCell::new();
        let model = || {
            model.get_or_init(|| {
                Transformer::init(shape.config.clone(), 1, Device::Cpu, Kind::Float)
                    .expect("a valid configuration")
            })
        };
        let requests: Vec<GenerateRequest> = (0..shape.prompts)
            .map(|i| GenerateRequest {
                prompt: (0..shape.prompt_tokens)
                    .map(|j| (i * 7 + j) % 2000)
                    .collect(),
                prompt_key: u64::from(i),
                samples: shape.samples,
                max_new_tokens: None,
            })
            .collect();
        let config = SamplingConfig {
            max_new_tokens: shape.new_tokens,
            ..SamplingConfig::default()
        };
        let tokens = (shape.prompts as usize * shape.samples * shape.new_tokens) as u64;
        let parameters = shape.config.num_parameters() as f64;
        let width = match shape.weights {
            DecoderWeights::AsLoaded => 4.0,
            DecoderWeights::Bf16 => 2.0,
        };
        // Every step draws one token of every completion and reads the weights once.
        let rows = f64::from(shape.prompts) * shape.samples as f64;
        eprintln!(
            "{}: {parameters} parameters; reading them at {:.1} GB/s allows {:.0} tokens/s, products at the {:.0} G \
             multiply-adds/s of a large one {:.0}",
            shape.name,
            reads * 1e-9,
            rows * reads / (parameters * width),
            products * 1e-9,
            products / parameters
        );
        group.throughput(Throughput::Elements(tokens));
        let decoder = || Decoder::with_weights(model(), shape.weights).expect("memory");
        let draw = |decoder: &Decoder<'_>| {
            decoder
                .generate(&requests, &config, &GenerateLimits::default(), &mut |_| {})
                .expect("generation")
        };
        group.bench_function(BenchmarkId::from_parameter(shape.name), |b| {
            if shape.new_tokens == 1 {
                // The prompt alone is timed.
                let decoder = decoder();
                b.iter(|| draw(&decoder));
            } else {
                model();
                b.iter(|| draw(&decoder()));
            }
        });
    }
    group.finish();
}

criterion_group!(benches, generation);
criterion_main!(benches);
