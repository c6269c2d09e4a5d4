//! Whole GRPO steps at the shape of stories15M with random weights: seconds a step, of drawing and of learning, and
//! the most memory held.
//!
//! `grpo_step [--prompt 32] [--completions 16] [--group 8] [--new 64] [--steps 5] [--ahead 0] [--shared]`;
//! with `--learner` it times the learner alone on groups of one prompt, whose prompt is computed once, and on the same
//! completions with a prompt each.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::expect_used,
    reason = "an example that measures"
)]

use std::path::Path;
use std::time::Instant;

use rlhf_data::group::{Completion, Finish, PromptGroup, SamplerRecord};
use rlhf_data::pack::PackedBatch;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{
    CausalLm as _, Config, DecoderWeights, DeviceBatch, Transformer, target_logprobs,
};
use rlhf_policy::advantage::{AdvantageEstimator, StdScope};
use rlhf_policy::collect::Rules;
use rlhf_policy::grpo::{GrpoConfig, OldPolicy, Players, train};
use rlhf_policy::kl::{KlEstimator, KlPenalty, KlPlacement};
use rlhf_policy::loss::{Clip, PolicyInputs, PolicyLoss, RatioLevel, Reduction};
use rlhf_policy::reference::ReferencePolicy;
use rlhf_policy::rollout::{Prompt, RolloutConfig};
use rlhf_reward::source::{Judged, Part, RewardMix, RewardSource};
use rlhf_train::lr_schedule::LrSchedule;
use rlhf_train::{Session, SessionConfig, Stepper, StepperConfig, StopFlag};
use tch::{Device, Kind, Tensor};

struct Args(Vec<String>);

impl Args {
    fn number(&self, name: &str, default: usize) -> usize {
        let at = self.0.iter().position(|a| a == name);
        at.map_or(default, |i| self.0[i + 1].parse().unwrap())
    }

    fn flag(&self, name: &str) -> bool {
        self.0.iter().any(|a| a == name)
    }
}

/// The peer's reward: distinct tokens modulo 7.
struct Distinct;

impl RewardSource for Distinct {
    fn name(&self) -> &str {
        "distinct"
    }

    fn scores(&self, items: &[Judged<'_>]) -> rlhf_reward::Result<Vec<Vec<f64>>> {
        let of = |c: &Completion| {
            let ids: std::collections::HashSet<u32> = c.ids.iter().copied().collect();
            (ids.len() % 7) as f64
        };
        let all = items
            .iter()
            .map(|i| i.group.completions.iter().map(of).collect());
        Ok(all.collect())
    }
}

fn model() -> Transformer {
    let mut config = Config::new(32_000, 288, 6, 6, 1024);
    config.intermediate_size = 768;
    Transformer::init(config, 0, Device::Cpu, Kind::Float).unwrap()
}

fn memory(key: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with(key)).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}

fn prompt_ids(i: usize, tokens: usize) -> Vec<u32> {
    (0..tokens)
        .map(|t| 100 + ((i * 7919 + t * 104_729) % 30_000) as u32)
        .collect()
}

const LOSS: PolicyLoss = PolicyLoss::Clipped {
    clip: Clip {
        epsilon_low: 0.2,
        epsilon_high: 0.2,
        dual: None,
    },
    ratio: RatioLevel::Token,
    reduction: Reduction::Token {},
};

fn main() {
    rlhf_kernels::keep_memory();
    let args = Args(std::env::args().skip(1).collect());
    if args.flag("--learner") {
        learner(&args);
    } else {
        steps(&args);
    }
}

fn stepper(model: &Transformer, steps: u64) -> Stepper {
    let config = StepperConfig {
        lr: 1e-6,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: steps,
        max_grad_norm: Some(1.0),
        max_bad_steps: 1,
    };
    Stepper::new(model.parameters(), AdamWConfig::default(), config)
}

fn steps(args: &Args) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let tokenizer = ChatTokenizer::load(&root.join("datasets/help/tokenizer")).unwrap();
    let (group, steps) = (args.number("--group", 8), args.number("--steps", 5) as u64);
    let per_step = args.number("--completions", 16) / group;
    let prompts: Vec<Prompt> = (0..64)
        .map(|i| Prompt {
            row: i as u64,
            ids: prompt_ids(i, args.number("--prompt", 32)),
            text: String::new(),
            fields: serde_json::Map::new(),
        })
        .collect();
    let policy = model();
    let before = memory("VmRSS");
    let mut rewards = RewardMix::new(0.0);
    rewards.push(Part::new(1.0, Box::new(Distinct))).unwrap();
    let ahead = args.number("--ahead", 0) as u64;
    let cfg = GrpoConfig {
        rollouts: RolloutConfig {
            seed: 1,
            prompts_per_step: per_step,
            group_size: group,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            max_new_tokens: args.number("--new", 64),
            max_sequences: 256,
            weights: DecoderWeights::AsLoaded,
        },
        rules: Rules {
            ahead,
            ..Rules::default()
        },
        steps: steps + 1,
        epochs: 1,
        minibatches: 1,
        micro_tokens: args.number("--micro", 8192),
        advantage: AdvantageEstimator::GroupNormalized {
            std_epsilon: 1e-4,
            scope: StdScope::Group,
        },
        loss: LOSS,
        kl: KlPenalty {
            estimator: KlEstimator::K2,
            placement: KlPlacement::InLoss,
            coef: 0.0,
        },
        adaptive_kl: None,
        reference: ReferencePolicy::None {},
        entropy_coef: 0.0,
        max_kl: None,
        old: if ahead > 0 {
            OldPolicy::Sampler
        } else {
            OldPolicy::Learner
        },
        correction: None,
        samples: None,
    };
    let dir = std::env::temp_dir().join(format!("grpo-step-{}", std::process::id()));
    let mut session = Session::open(SessionConfig {
        dir: dir.clone(),
        stage: "g".into(),
        total_steps: u64::MAX,
        checkpoint_every: u64::MAX,
        keep: 1,
        stop: StopFlag::default(),
    })
    .unwrap();
    let players = Players {
        policy: &policy,
        reference: None,
        tokenizer: &tokenizer,
        prompts: &prompts,
        rewards: &rewards,
        steps: None,
        server: None,
        scene: None,
    };
    train(
        players,
        &cfg,
        &mut stepper(&policy, steps + 1),
        &mut session,
    )
    .unwrap();
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    std::fs::remove_dir_all(dir).unwrap();
    let at = |i: usize, key: &str| lines[i][key].as_f64().unwrap();
    let mut seconds: Vec<f64> = (1..lines.len())
        .map(|i| at(i, "seconds") - at(i - 1, "seconds"))
        .collect();
    let mean = (at(lines.len() - 1, "seconds") - at(0, "seconds")) / (lines.len() - 1) as f64;
    seconds.sort_by(f64::total_cmp);
    let sampled = at(lines.len() - 1, "g/sampled_tokens_per_second");
    println!(
        "step {:.3} s (middle; mean {mean:.3}; all {seconds:.3?}), last step: {:.0} tokens/s drawn, {:.0} learned; length {}; memory {:.0} MiB at most, {:.0} above the model",
        seconds[seconds.len() / 2],
        sampled,
        at(lines.len() - 1, "g/learned_tokens_per_second"),
        at(lines.len() - 1, "g/length"),
        memory("VmHWM"),
        memory("VmHWM") - before,
    );
}

fn learner(args: &Args) {
    let policy = model();
    let (group, n) = (args.number("--group", 8), args.number("--completions", 16));
    let (prompt, new) = (args.number("--prompt", 512), args.number("--new", 64));
    let completion = |i: usize| Completion {
        sampler: Some(SamplerRecord {
            logprobs: vec![-10.0; new],
            policy_version: 0,
            top: Vec::new(),
        }),
        ..Completion::whole(prompt_ids(1000 + i, new), Finish::Length)
    };
    let of = |first: usize, size: usize| PromptGroup {
        row: (first / group) as u64,
        prompt: prompt_ids(first / group, prompt),
        completions: (first..first + size).map(completion).collect(),
    };
    let shared: Vec<PromptGroup> = (0..n).step_by(group).map(|i| of(i, group)).collect();
    let alone: Vec<PromptGroup> = (0..n).map(|i| of(i, 1)).collect();
    let mut stepper = stepper(&policy, 100);
    let mut step = |groups: &[PromptGroup]| {
        let began = Instant::now();
        // One micro-batch a group of completions in both forms.
        let size = groups.len() * group / n;
        for part in groups.chunks(size.max(1)) {
            let batch = DeviceBatch::new(&PackedBatch::pack(part).unwrap(), Device::Cpu).unwrap();
            let now = target_logprobs(&policy, &batch, 1.0, true).unwrap();
            let old = now
                .logprobs
                .with_values(now.logprobs.values().detach())
                .unwrap();
            let ones = now
                .logprobs
                .with_values(Tensor::ones_like(old.values()))
                .unwrap();
            let out = LOSS
                .compute(&PolicyInputs::new(&now.logprobs, &old, &ones))
                .unwrap();
            stepper.accumulate(out.loss).unwrap();
        }
        stepper.apply().unwrap();
        began.elapsed().as_secs_f64()
    };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for i in 0..args.number("--steps", 5) + 1 {
        let (s, u) = (step(&shared), step(&alone));
        if i > 0 {
            a.push(s);
            b.push(u);
        }
    }
    a.sort_by(f64::total_cmp);
    b.sort_by(f64::total_cmp);
    println!(
        "learner, {n} completions of {new} in groups of {group}, prompt {prompt}: shared {:.3} s, a prompt each {:.3} s, ratio {:.3}",
        a[a.len() / 2],
        b[b.len() / 2],
        a[a.len() / 2] / b[b.len() / 2]
    );
}
