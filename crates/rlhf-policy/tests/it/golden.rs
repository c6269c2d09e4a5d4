//! The policy losses against TRL's own numbers and the papers'.

use rlhf_kernels::{LossSum, Ragged, token_logprobs};
use rlhf_policy::advantage::{self, AdvantageEstimator, StdScope, Whitening};
use rlhf_policy::kl::{self, KlEstimator, KlPenalty, KlPlacement};
use rlhf_policy::loss::ppo::{self, ScorePlace, ValueInputs};
use rlhf_policy::loss::{
    Clip, GammaWeight, Gate, KlTerm, PolicyInputs, PolicyLoss, RatioLevel, Reduction, clipped,
    mismatch, select,
};
use tch::{Kind, Tensor};

use crate::device::from_slice;
use crate::golden_io::{Case, gradient, run};

#[test]
fn f_rl() {
    let unknown = run(&["f/"], |case| {
        let mut parts = case.name().split('/').skip(1);
        match (parts.next().unwrap(), parts.next().unwrap()) {
            ("gae", _) => gae(case),
            ("ppo_loss", _) => ppo_loss(case),
            ("whiten", _) => whiten(case),
            ("grpo_adv", _) => grpo_advantages(case),
            ("rloo_adv", _) => rloo_advantages(case),
            ("grpo_loss", name) => return grpo_loss(case, name),
            ("rloo_loss", _) => rloo_loss(case),
            ("tis", _) => mismatch_weights(case),
            ("entropy_mask", _) => entropy_mask(case),
            ("reinforcepp_baseline", _) => reinforce_plus_plus(case),
            _ => return false,
        }
        true
    });
    assert!(unknown.is_empty());
}

#[test]
fn b_kl() {
    run(&["b/"], |case| {
        if case.after("b/kl_estimators/").is_none() {
            return false;
        }
        kl_estimators(case);
        true
    });
}

fn pad(values: &Tensor, mask: &Tensor) -> Ragged {
    Ragged::from_padded(values, mask).unwrap()
}

fn mean(loss: &LossSum) -> Tensor {
    &loss.sum / loss.weight
}

fn scalar(x: f64) -> Tensor {
    Tensor::from(x)
}

/// Positions up to the last token, and one more: TRL's two masks.
fn ppo_masks(case: &Case<'_>, width: i64) -> (Tensor, Tensor) {
    let last = case.input("sequence_lengths").unsqueeze(1);
    let columns = Tensor::arange(width, (Kind::Int64, last.device())).unsqueeze(0);
    (columns.le_tensor(&last), columns.le_tensor(&(last + 1)))
}

/// TRL's place of the score, by its name here; everything else as ours.
fn gae(case: &Case<'_>) {
    let logprobs = case.input("logprobs");
    let width = logprobs.size()[1];
    let (mask, mask_p1) = ppo_masks(case, width);
    let estimator = match case.text("kl_estimator").unwrap() {
        "k1" => KlEstimator::K1,
        "k3" => KlEstimator::K3,
        other => panic!("estimator {other}"),
    };
    let kl = estimator
        .estimate(
            &pad(&logprobs, &mask),
            &pad(&case.input("ref_logprobs"), &mask),
        )
        .unwrap();
    case.check_at("kl", kl.values(), &mask);
    let mut scores = case.input("scores");
    if let Some(penalty) = case.number("missing_eos_penalty") {
        let eos = case.setting("eos_id").as_i64().unwrap();
        let ended = case.input("responses").eq(eos).any_dim(1, false);
        scores = ppo::penalize_missing_eos(&scores, &ended, penalty).unwrap();
    }
    case.check("scores_after_penalty", &scores);
    let place = ScorePlace::OnePastLast {
        width: width as u32,
    };
    let mut rewards =
        ppo::token_rewards(&kl, &scores, case.number("kl_coef").unwrap(), place).unwrap();
    if case.setting("whiten_rewards").as_bool().unwrap() {
        rewards = advantage::whiten(&rewards, Whitening::KeepMean).unwrap();
    }
    case.check_at("rewards", rewards.values(), &mask_p1);
    let values = pad(&case.input("values"), &mask_p1);
    let (gamma, lambda) = (case.number("gamma").unwrap(), case.number("lam").unwrap());
    let out = advantage::generalized(&rewards, &values, gamma, lambda, Whitening::None).unwrap();
    case.check_at("advantages_raw", out.advantages.values(), &mask_p1);
    case.check_at("returns", out.returns.values(), &mask_p1);
    // TRL whitens the slots of tokens alone.
    let padded = Tensor::zeros([mask.size()[0], width], (case.kind, mask.device()))
        .masked_scatter(&mask_p1, out.advantages.values());
    let whitened = advantage::whiten(&pad(&padded, &mask), Whitening::RemoveMean).unwrap();
    case.check_at("advantages_whitened", whitened.values(), &mask);
}

fn ppo_loss(case: &Case<'_>) {
    let new = case.input("new_logprobs").set_requires_grad(true);
    let predicted = case.input("vpred").set_requires_grad(true);
    let (mask, mask_p1) = ppo_masks(case, new.size()[1]);
    let (values, advantages) = (case.input("values"), case.input("adv"));
    let returns = &values + &advantages;
    let (logprobs, old, adv) = (
        pad(&new, &mask),
        pad(&case.input("logprobs"), &mask),
        pad(&advantages, &mask),
    );
    let clip = Clip::symmetric(case.number("cliprange").unwrap());
    let policy = clipped::surrogate(
        &PolicyInputs::new(&logprobs, &old, &adv),
        clip,
        RatioLevel::Token,
        Reduction::Token {},
    )
    .unwrap();
    // TRL's value loss covers the slot past the end too.
    let (v, v_old, r) = (
        pad(&predicted, &mask_p1),
        pad(&values, &mask_p1),
        pad(&returns, &mask_p1),
    );
    let value = ppo::value_loss(
        &ValueInputs {
            values: &v,
            old_values: &v_old,
            returns: &r,
        },
        case.number("cliprange_value"),
    )
    .unwrap();
    case.check("pg_loss", &mean(&policy.loss));
    case.check("vf_loss", &mean(&value.loss));
    let loss = mean(&policy.loss) + mean(&value.loss) * case.number("vf_coef").unwrap();
    case.check("loss", &loss);
    case.check(
        "pg_clipfrac",
        &scalar(policy.stats.clip_fraction_low() + policy.stats.clip_fraction_high()),
    );
    case.check("vf_clipfrac", &scalar(value.stats.clip_fraction()));
    case.check(
        "approxkl_masked_rederived",
        &scalar(policy.stats.approx_kl()),
    );
    case.check("grad_new_logprobs", &gradient(&loss, &new));
    case.check("grad_vpred", &gradient(&loss, &predicted));
}

fn whiten(case: &Case<'_>) {
    let mask = case.mask("mask");
    let x = pad(&case.input("x"), &mask);
    let of = |w| advantage::whiten(&x, w).unwrap();
    case.check_at("whitened", of(Whitening::RemoveMean).values(), &mask);
    case.check_at(
        "whitened_keep_mean",
        of(Whitening::KeepMean).values(),
        &mask,
    );
}

/// Rewards of each function, and their weighted sum: NaN is left out, NaN where nothing is left.
fn rewards(case: &Case<'_>) -> (Vec<Vec<f64>>, Vec<f64>, Vec<f64>) {
    let table = case.input("rewards_per_func").to_kind(Kind::Double);
    let weights =
        Vec::<f64>::try_from(&case.input("reward_weights").to_kind(Kind::Double)).unwrap();
    let rows = Vec::<Vec<f64>>::try_from(&table).unwrap();
    let total = rows
        .iter()
        .map(|row| {
            let known = || row.iter().zip(&weights).filter(|(r, _)| !r.is_nan());
            if known().next().is_none() {
                f64::NAN
            } else {
                known().map(|(r, w)| r * w).sum()
            }
        })
        .collect();
    (rows, weights, total)
}

fn grpo_advantages(case: &Case<'_>) {
    let (rows, weights, total) = rewards(case);
    let size = case.setting("num_generations").as_u64().unwrap() as usize;
    let groups = vec![size; total.len() / size];
    let normalised = |scope| AdvantageEstimator::GroupNormalized {
        std_epsilon: 1e-4,
        scope,
    };
    let scale = case.text("scale_rewards").unwrap();
    let advantages = match (case.text("agg").unwrap(), scale) {
        ("sum_then_normalize", "group") => normalised(StdScope::Group)
            .advantages(&total, &groups)
            .unwrap(),
        ("sum_then_normalize", "batch") => normalised(StdScope::Batch)
            .advantages(&total, &groups)
            .unwrap(),
        ("sum_then_normalize", "none") => AdvantageEstimator::GroupCentered {}
            .advantages(&total, &groups)
            .unwrap(),
        ("normalize_then_sum", "group") => {
            // GDPO: each function is compared within its group, the sum is normalised over the batch.
            let mut sum = vec![0.0; rows.len()];
            for (k, w) in weights.iter().enumerate() {
                let column: Vec<f64> = rows.iter().map(|r| r[k]).collect();
                let a = normalised(StdScope::Group)
                    .advantages(&column, &groups)
                    .unwrap();
                sum.iter_mut().zip(&a).for_each(|(s, a)| *s += w * a);
            }
            sum.iter_mut()
                .zip(&total)
                .for_each(|(s, t)| *s = if t.is_nan() { f64::NAN } else { *s });
            advantage::standardize(&sum, 1e-4)
        }
        other => panic!("{other:?}"),
    };
    case.compare(
        "advantages",
        &from_slice(&advantages),
        &case.output("advantages"),
        1e-12,
    );
}

fn rloo_advantages(case: &Case<'_>) {
    let (_, _, total) = rewards(case);
    let size = case.setting("num_generations").as_u64().unwrap() as usize;
    let mask = case.mask("mask");
    let kl = KlEstimator::K1
        .estimate(
            &pad(&case.input("old"), &mask),
            &pad(&case.input("ref"), &mask),
        )
        .unwrap();
    let kl = Vec::<f64>::try_from(&kl.sum().to_kind(Kind::Double)).unwrap();
    let clip = case
        .setting("clip")
        .as_array()
        .map(|a| (a[0].as_f64().unwrap(), a[1].as_f64().unwrap()));
    let beta = case.number("beta").unwrap();
    let shaped: Vec<f64> = total
        .iter()
        .zip(&kl)
        .map(|(r, kl)| clip.map_or(*r, |(low, high)| r.clamp(low, high)) - beta * kl)
        .collect();
    let mut advantages = AdvantageEstimator::LeaveOneOut {}
        .advantages(&shaped, &vec![size; shaped.len() / size])
        .unwrap();
    if case.setting("normalize").as_bool().unwrap() {
        // Only completions that could be compared with another take part.
        for (a, r) in advantages.chunks_mut(size).zip(shaped.chunks(size)) {
            let comparable = r.iter().filter(|r| !r.is_nan()).count() > 1;
            a.iter_mut().zip(r).for_each(|(a, r)| {
                *a = if r.is_nan() || !comparable {
                    f64::NAN
                } else {
                    *a
                }
            });
        }
        advantages = advantage::standardize(&advantages, 1e-4);
    }
    case.check("advantages", &from_slice(&advantages));
}

fn grpo_loss(case: &Case<'_>, name: &str) -> bool {
    let kind = case.text("loss_type").unwrap();
    let reduction = match kind {
        "grpo" | "sapo" | "gmpo" => Reduction::Sequence {},
        "dapo" | "bnpo" | "cispo" | "vespo" => Reduction::Token {},
        "luspo" => Reduction::SequenceSum {},
        "dr_grpo" => Reduction::FixedLength {
            length: case.setting("max_completion_length").as_u64().unwrap_or(16) as u32,
        },
        _ => return false,
    };
    let mask = case.mask("mask");
    let leaf = case.input("logps").set_requires_grad(true);
    let logprobs = pad(&leaf, &mask);
    let on_policy = case.setting("on_policy").as_bool() == Some(true);
    let old = if on_policy {
        pad(&leaf.detach(), &mask)
    } else {
        pad(&case.input("old_logps"), &mask)
    };
    let reference = pad(&case.input("ref_logps"), &mask);
    let entropy_leaf = case.input("entropies").set_requires_grad(true);
    let entropy = pad(&entropy_leaf, &mask);
    let advantages = logprobs
        .with_values(logprobs.broadcast(&case.input("advantages")))
        .unwrap();
    // Corrections and masks are factors of the surrogate.
    let mut weights: Vec<Ragged> = Vec::new();
    if case.setting("tis").as_bool() == Some(true) {
        weights.push(pad(&case.input("is_ratio"), &mask));
    }
    if let Some(share) = case.number("top_entropy_quantile") {
        weights.push(select::high_entropy(&entropy, share).unwrap());
    }
    if let Some(threshold) = case.number("off_policy_mask_threshold") {
        // TRL takes the sampler's log-probs where it has them.
        let sampler = pad(&case.input("sampling_logps"), &mask);
        weights.push(select::on_policy(&logprobs, &sampler, &advantages, threshold).unwrap());
    }
    let weights = weights.into_iter().reduce(|a, b| {
        let product = a.values() * b.values();
        a.with_values(product).unwrap()
    });
    let placement = match case.setting("use_bias_correction_kl").as_bool() {
        Some(true) => KlPlacement::InLossWeighted,
        _ => KlPlacement::InLoss,
    };
    let beta = case.number("beta").unwrap_or(0.0);
    let penalty = KlPenalty {
        estimator: KlEstimator::K3,
        placement,
        coef: beta,
    };
    let inputs = PolicyInputs {
        weights: weights.as_ref(),
        kl: (beta != 0.0).then_some(KlTerm {
            exact: None,
            ref_logprobs: &reference,
            penalty,
        }),
        entropy: Some(&entropy),
        ..PolicyInputs::new(&logprobs, &old, &advantages)
    };
    let ratio = match case.text("importance_sampling_level") {
        Some("sequence") => RatioLevel::SequenceMean,
        _ => RatioLevel::Token,
    };
    let clip = Clip {
        epsilon_low: case.number("epsilon_low").unwrap_or(0.2),
        epsilon_high: case.number("epsilon_high").unwrap_or(0.2),
        dual: case.number("delta"),
    };
    let loss = match kind {
        "cispo" => PolicyLoss::Cispo {
            max_ratio: clip.epsilon_high,
            min_ratio: 0.0,
            ratio,
            reduction,
        },
        "sapo" => PolicyLoss::Sapo {
            temperature: Gate {
                positive: case.number("sapo_temperature_pos").unwrap(),
                negative: case.number("sapo_temperature_neg").unwrap(),
            },
            ratio,
            reduction,
        },
        "vespo" => PolicyLoss::Vespo {
            weight: GammaWeight::default(),
            reduction,
        },
        "gmpo" => PolicyLoss::Gmpo {
            epsilon_low: clip.epsilon_low,
            epsilon_high: clip.epsilon_high,
        },
        _ => PolicyLoss::Clipped {
            clip,
            ratio,
            reduction,
        },
    };
    let out = loss.compute(&inputs).unwrap();
    // What TRL's trainer divides by besides: our step divides once, by the weight of all it saw.
    let scale = match name {
        n if n.starts_with("x_accum4") => 1.0 / 4.0,
        n if n.starts_with("x_accum_dapo") => {
            let setting = |k| case.number(k).unwrap();
            out.loss.weight * setting("steps_per_generation")
                / setting("grad_accum")
                / setting("num_items")
        }
        _ => 1.0,
    };
    let mut loss = mean(&out.loss) * scale;
    if let Some(coef) = case.number("entropy_coef") {
        case.check("metric_policy_loss", &loss);
        let bonus = select::entropy_bonus(&entropy, coef, Reduction::Token {}).unwrap();
        loss += mean(&bonus);
        case.check("grad_entropies", &gradient(&loss, &entropy_leaf));
    }
    if kind == "gmpo" {
        // As with RLOO, TRL adds -A for a completion without tokens.
        let empty = mask.any_dim(1, false).logical_not().to_kind(case.kind);
        let constant = -(empty * case.input("advantages")).mean(case.kind);
        case.check("loss", &(&loss + constant));
    } else {
        case.check("loss", &loss);
    }
    case.check("grad_logps", &gradient(&loss, &leaf));
    case.check("metric_entropy", &scalar(out.stats.entropy()));
    // TRL counts completions without tokens among those that could be clipped.
    let counted = match ratio {
        RatioLevel::Token => 1.0,
        _ => out.stats.ratios / logprobs.offsets().num_segments() as f64,
    };
    let (low, high) = (
        out.stats.clip_fraction_low() * counted,
        out.stats.clip_fraction_high() * counted,
    );
    if case.has("metric_cispo_clip_ratio") {
        case.check("metric_cispo_clip_ratio", &scalar(high));
    }
    if case.has("metric_clip_ratio_low_mean") {
        case.check("metric_clip_ratio_low_mean", &scalar(low));
        case.check("metric_clip_ratio_high_mean", &scalar(high));
        case.check("metric_clip_ratio_region_mean", &scalar(low + high));
    }
    // TRL's metric is of the term as weighted, ours of the estimate.
    if case.has("metric_kl") && placement == KlPlacement::InLoss {
        case.check("metric_kl", &scalar(out.stats.kl()));
    }
    true
}

fn entropy_mask(case: &Case<'_>) {
    let mask = case.mask("mask");
    let entropy = pad(&case.input("entropies"), &mask);
    for output in case.outputs() {
        let threshold: f64 = output.strip_prefix("mask_q").unwrap().parse().unwrap();
        let kept = select::high_entropy(&entropy, 1.0 - threshold).unwrap();
        let theirs = case.output(output).masked_select(&mask);
        assert_eq!(kept.values().to_kind(Kind::Bool), theirs, "{output}");
    }
}

fn reinforce_plus_plus(case: &Case<'_>) {
    // Of the first reward function alone.
    let table = case.input("rewards_per_func").to_kind(Kind::Double);
    let total = Vec::<f64>::try_from(&table.select(1, 0)).unwrap();
    let size = case.setting("num_generations").as_u64().unwrap() as usize;
    let mask = case.mask("mask");
    let kl = KlEstimator::K1
        .estimate(
            &pad(&case.input("old"), &mask),
            &pad(&case.input("ref"), &mask),
        )
        .unwrap();
    let groups = vec![size; total.len() / size];
    let advantages =
        advantage::reinforce_plus_plus(&total, Some(&groups), &kl, case.number("kl_coef").unwrap())
            .unwrap();
    case.check_at("advantages", advantages.values(), &mask);
}

fn rloo_loss(case: &Case<'_>) {
    let mask = case.mask("mask");
    let leaf = case.input("logps").set_requires_grad(true);
    let (logprobs, old) = (pad(&leaf, &mask), pad(&case.input("old_logps"), &mask));
    let advantages = logprobs
        .with_values(logprobs.broadcast(&case.input("advantages")))
        .unwrap();
    let clip = Clip {
        epsilon_low: case.number("epsilon_low").unwrap(),
        epsilon_high: case.number("epsilon_high").unwrap(),
        dual: None,
    };
    let inputs = PolicyInputs::new(&logprobs, &old, &advantages);
    let loss = mean(
        &clipped::surrogate(
            &inputs,
            clip,
            RatioLevel::SequenceSum,
            Reduction::Sequence {},
        )
        .unwrap()
        .loss,
    );
    // TRL adds -A for a completion without tokens, whose ratio is 1: a constant without gradient.
    let empty = mask.any_dim(1, false).logical_not().to_kind(case.kind);
    let constant = -(empty * case.input("advantages")).mean(case.kind);
    case.check("loss", &(&loss + constant));
    case.check("grad_logps", &gradient(&loss, &leaf));
}

fn mismatch_weights(case: &Case<'_>) {
    let mask = case.mask("mask");
    let (old, sampler) = (
        pad(&case.input("old_logps"), &mask),
        pad(&case.input("sampling_logps"), &mask),
    );
    let max = case.number("max").unwrap();
    let (level, bound) = match case.text("mode").unwrap() {
        "token_truncate" => (RatioLevel::Token, mismatch::Bound::Truncate { max }),
        "token_mask" => (
            RatioLevel::Token,
            mismatch::Bound::Mask {
                min: case.number("min").unwrap_or(0.0),
                max,
            },
        ),
        "sequence_truncate" => (RatioLevel::SequenceSum, mismatch::Bound::Truncate { max }),
        "sequence_mask" => (
            RatioLevel::SequenceSum,
            mismatch::Bound::Mask {
                min: case.number("min").unwrap_or(0.0),
                max,
            },
        ),
        other => panic!("mode {other}"),
    };
    let weights = mismatch::weights(&old, &sampler, level, bound).unwrap();
    let reference = case.output("ratio").expand_as(&mask).masked_select(&mask);
    case.compare("ratio", weights.values(), &reference, 1e-12);
}

fn kl_estimators(case: &Case<'_>) {
    let logits = case.input("policy_logits");
    let size = logits.size();
    let rows = |t: &Tensor| t.view([-1, size[2]]);
    let ids = case.input("ids").view([-1]);
    let leaf = logits.set_requires_grad(true);
    let reference_logits = rows(&case.input("ref_logits"));
    let all = Tensor::ones([size[0], size[1]], (Kind::Bool, leaf.device()));
    let grid = |x: Tensor| pad(&x.view([size[0], size[1]]), &all);
    let logprobs = grid(token_logprobs(&rows(&leaf), &ids).unwrap());
    let reference = grid(token_logprobs(&reference_logits, &ids).unwrap());
    let mask = case.mask("mask");
    let check = |name: &str, values: &Tensor| {
        let as_grid = values.view([size[0], size[1]]);
        case.compare(name, &as_grid, &case.output(name), 1e-10);
        let total = values.sum(case.kind);
        let grad = format!("grad_policy_logits_{name}");
        case.compare(&grad, &gradient(&total, &leaf), &case.output(&grad), 1e-10);
        let masked = format!("masked_mean_{name}");
        if case.has(&masked) {
            case.compare(
                &masked,
                &pad(&as_grid, &mask).values().mean(case.kind),
                &case.output(&masked),
                1e-10,
            );
        }
    };
    for (name, estimator) in [
        ("k1", KlEstimator::K1),
        ("k2", KlEstimator::K2),
        ("k3", KlEstimator::K3),
    ] {
        check(
            name,
            estimator.estimate(&logprobs, &reference).unwrap().values(),
        );
    }
    check(
        "kl_exact",
        &kl::exact(&rows(&leaf), &reference_logits).unwrap(),
    );
    check(
        "kl_exact_reverse_args",
        &kl::exact(&reference_logits, &rows(&leaf)).unwrap(),
    );
}
