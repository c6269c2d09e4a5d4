//! Properties over random shapes.

use proptest::prelude::*;
use rlhf_kernels::{
    AttentionOptions, Direction, Head, LogprobOptions, Mean, Offsets, Ragged, discounted_returns,
    entropy, gae, linear_logprobs, nucleus, reference, scan, shared_prefix_attention,
    token_logprobs,
};
use tch::{Kind, Tensor};

use crate::{device, from_slice, largest_difference, layout, wave};

/// Up to six sequences of up to nine values, empty ones among them.
fn ragged() -> impl Strategy<Value = Vec<Vec<f64>>> {
    prop::collection::vec(prop::collection::vec(-3.0..3.0f64, 0..9), 0..6)
}

fn build(rows: &[Vec<f64>]) -> Ragged {
    let lengths: Vec<i64> = rows.iter().map(|r| r.len() as i64).collect();
    Ragged::new(
        from_slice(&rows.concat()),
        Offsets::from_lengths(&lengths).unwrap(),
    )
    .unwrap()
}

fn host(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t).unwrap()
}

fn close(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .all(|(a, b)| (a - b).abs() < 1e-12 * b.abs().max(1.0))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_means_and_spreading(rows in ragged()) {
        let x = build(&rows);
        let sums: Vec<f64> = rows.iter().map(|r| r.iter().sum()).collect();
        let means: Vec<f64> = rows.iter().zip(&sums).map(|(r, s)| if r.is_empty() { 0.0 } else { s / r.len() as f64 }).collect();
        prop_assert!(close(&host(&x.sum()), &sums));
        prop_assert!(close(&host(&x.mean()), &means));
        let spread: Vec<f64> = rows.iter().zip(&sums).flat_map(|(r, s)| vec![*s; r.len()]).collect();
        prop_assert!(close(&host(&x.broadcast(&from_slice(&sums))), &spread));
    }

    /// The statistics of groups, each against its definition.
    #[test]
    fn group_statistics(rows in ragged()) {
        let x = build(&rows);
        let (mut std, mut others, mut running, mut last) = (vec![], vec![], vec![], vec![]);
        for r in &rows {
            let n = r.len() as f64;
            let mean = r.iter().sum::<f64>() / n.max(1.0);
            std.push(if n > 1.0 { (r.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt() } else { 0.0 });
            others.extend(r.iter().map(|v| if n > 1.0 { v - (n * mean - v) / (n - 1.0) } else { 0.0 }));
            running.extend(r.iter().scan(0.0, |sum, v| { *sum += v; Some(*sum) }));
            last.push(r.last().copied().unwrap_or(-9.0));
        }
        prop_assert!(close(&host(&x.std(1.0)), &std));
        prop_assert!(close(&host(x.leave_one_out().values()), &others));
        prop_assert!(close(&host(x.cumsum().unwrap().values()), &running));
        prop_assert_eq!(host(&x.last(-9.0)), last);
        // With a gradient wanted they are composed, without one made in one pass.
        let leaf = x.with_values(x.values().copy().set_requires_grad(true)).unwrap();
        let pairs = [
            (x.std(0.5), leaf.std(0.5)),
            (x.centred().values().copy(), leaf.centred().values().copy()),
            (x.standardized(0.1).values().copy(), leaf.standardized(0.1).values().copy()),
            (x.leave_one_out().values().copy(), leaf.leave_one_out().values().copy()),
        ];
        for (fused, composed) in pairs {
            prop_assert!(close(&host(&fused), &host(&composed.detach())));
        }
        let zero = host(&x.standardized(0.0).mean());
        prop_assert!(zero.iter().all(|m| m.abs() < 1e-12));
        prop_assert!(close(&host(&x.sum()), &host(&reference::segment_sum(&x))));
        for direction in [Direction::Forward, Direction::Backward] {
            let (ours, plain) = (scan(&x, 0.8, direction).unwrap(), reference::scan(&x, 0.8, direction).unwrap());
            prop_assert!(close(&host(ours.values()), &host(plain.values())));
        }
        let values = x.with_values(x.values().sin()).unwrap();
        let (ours, _) = gae(&x, &values, 0.9, 0.8).unwrap();
        let plain = reference::gae(&x, &values, 0.9, 0.8).unwrap();
        prop_assert!(close(&host(ours.values()), &host(plain.values())));
    }

    #[test]
    fn padding_and_back(rows in ragged()) {
        let x = build(&rows);
        let padded = x.to_padded(f64::NAN);
        let back = Ragged::from_padded(&padded, &padded.isnan().logical_not()).unwrap();
        prop_assert_eq!(back.offsets(), x.offsets());
        prop_assert_eq!(host(back.values()), host(x.values()));
    }

    #[test]
    fn sum_is_differentiable(rows in ragged()) {
        let x = build(&rows);
        let leaf = x.values().set_requires_grad(true);
        let weights: Vec<f64> = (0..rows.len()).map(|s| s as f64 + 1.0).collect();
        let weights = from_slice(&weights);
        (x.with_values(leaf.shallow_clone()).unwrap().sum() * &weights).sum(Kind::Double).backward();
        prop_assert_eq!(host(&leaf.grad()), host(&x.broadcast(&weights)));
    }

    /// A_t = Σ_k (γλ)^k δ_{t+k} by the double sum, and G_t = Σ_k γ^k r_{t+k}.
    #[test]
    fn scans_are_the_double_sums(rows in ragged(), gamma in 0.0..1.0f64, lambda in 0.0..1.0f64) {
        let rewards = build(&rows);
        let values = rewards.with_values(rewards.values().sin()).unwrap();
        let (mut advantages, mut totals) = (Vec::new(), Vec::new());
        for r in &rows {
            let v: Vec<f64> = r.iter().map(|x| x.sin()).collect();
            for t in 0..r.len() {
                let delta = |k: usize| r[k] + gamma * v.get(k + 1).unwrap_or(&0.0) - v[k];
                advantages.push((t..r.len()).map(|k| (gamma * lambda).powi((k - t) as i32) * delta(k)).sum::<f64>());
                totals.push((t..r.len()).map(|k| gamma.powi((k - t) as i32) * r[k]).sum::<f64>());
            }
        }
        let (a, returns) = gae(&rewards, &values, gamma, lambda).unwrap();
        prop_assert!(close(&host(a.values()), &advantages));
        let expected: Vec<f64> = advantages.iter().zip(host(values.values())).map(|(a, v)| a + v).collect();
        prop_assert!(close(&host(returns.values()), &expected));
        prop_assert!(close(&host(discounted_returns(&rewards, gamma).unwrap().values()), &totals));
    }

    #[test]
    fn linear_logprobs_of_any_shape(m in 0..9i64, h in 1..9i64, v in 1..70i64, chunk in 1..10i64, bytes in prop::option::of(1..2000i64), t in 0.3..3.0f64, entropy: bool) {
        let hidden = wave(&[m, h], 1.0, Kind::Float).set_requires_grad(true);
        let weight = (wave(&[v, h], 2.0, Kind::Float) * 3.0).set_requires_grad(true);
        let ids = (Tensor::arange(m, (Kind::Int64, device())) * 7).remainder(v);
        let options = LogprobOptions { temperature: t, entropy, chunk_rows: Some(chunk), chunk_bytes: bytes, z_loss: Some(0.1), logit_penalty: Some(0.05), top1: true, ..Default::default() };
        let run = |out: rlhf_kernels::Logprobs| {
            let loss = out.logprobs.sum(Kind::Float) + out.entropy.map_or(Tensor::from(0f32), |h| h.sum(Kind::Float) * 0.5)
                + out.z_loss.unwrap().sum(Kind::Float) + out.logit_penalty.unwrap().sum(Kind::Float);
            let mut all = Tensor::run_backward(&[loss], &[&hidden, &weight], false, false);
            all.push(out.logprobs.detach());
            all.push(out.top1.unwrap().agrees.to_kind(Kind::Float));
            all
        };
        let ours = run(linear_logprobs(&hidden, &weight, &ids, &options).unwrap());
        let plain = run(reference::linear_logprobs(&hidden, &weight, &ids, &options).unwrap());
        for (a, b) in ours.iter().zip(&plain) {
            let scale = if b.numel() == 0 { 1.0 } else { b.abs().max().double_value(&[]).max(1.0) };
            prop_assert!(largest_difference(a, b) < 2e-5 * scale, "{}", largest_difference(a, b));
        }
    }

    /// With a bias, a cap, a frozen head and what else comes out.
    #[test]
    fn linear_logprobs_with_every_option(m in 0..9i64, h in 1..9i64, v in 1..70i64, bytes in prop::option::of(1..2000i64), cap in prop::option::of(0.5..5.0f64), frozen: bool, biased: bool) {
        let hidden = wave(&[m, h], 1.0, Kind::Float).set_requires_grad(true);
        let weight = (wave(&[v, h], 2.0, Kind::Float) * 3.0).set_requires_grad(!frozen);
        let bias = wave(&[v], 5.0, Kind::Float);
        let head = || Head { weight: &weight, bias: biased.then_some(&bias) };
        let ids = (Tensor::arange(m, (Kind::Int64, device())) * 5).remainder(v);
        let options = LogprobOptions { softcap: cap, chunk_bytes: bytes, log_sum_exp: true, moments: true, ..Default::default() };
        let leaves: Vec<&Tensor> = if frozen { vec![&hidden] } else { vec![&hidden, &weight] };
        let run = |out: rlhf_kernels::Logprobs| {
            let loss = out.logprobs.sum(Kind::Float) + out.log_sum_exp.as_ref().unwrap().sum(Kind::Float) * 0.5;
            let mut all = Tensor::run_backward(&[loss], &leaves, false, false);
            all.push(out.logprobs.detach());
            all.push(out.moments.unwrap().log_sum_sq_probs.detach());
            all
        };
        let ours = run(linear_logprobs(&hidden, head(), &ids, &options).unwrap());
        let plain = run(reference::linear_logprobs(&hidden, head(), &ids, &options).unwrap());
        for (a, b) in ours.iter().zip(&plain) {
            let scale = if b.numel() == 0 { 1.0 } else { b.abs().max().double_value(&[]).max(1.0) };
            prop_assert!(largest_difference(a, b) < 2e-5 * scale, "{}", largest_difference(a, b));
        }
    }

    /// Values and gradients of logits that exist, and what top-p sampling keeps of them, by its definition.
    #[test]
    fn of_logits(m in 0..6i64, v in 1..40i64, wide in 0.1..20.0f64, p in 0.01..1.0f64) {
        let logits = (wave(&[m, v], 1.0, Kind::Double) * wide).set_requires_grad(true);
        let ids = (Tensor::arange(m, (Kind::Int64, device())) * 3).remainder(v);
        let run = |logprobs: Tensor, entropy: Tensor| {
            let loss = logprobs.sum(None) + entropy.sum(None) * 0.5;
            let g = Tensor::run_backward(&[loss], &[&logits], false, false).remove(0);
            [logprobs.detach(), entropy.detach(), g]
        };
        let ours = run(token_logprobs(&logits, &ids).unwrap(), entropy(&logits).unwrap());
        let plain = run(reference::token_logprobs(&logits, &ids).unwrap(), reference::entropy(&logits).unwrap());
        for (a, b) in ours.iter().zip(&plain) {
            prop_assert!(largest_difference(a, b) < 1e-11);
        }
        let kept = nucleus(&logits, p).unwrap();
        for row in 0..m {
            let mut all = host(&logits.detach().get(row).softmax(0, Kind::Double));
            all.sort_by(|a, b| b.total_cmp(a));
            let (mut mass, mut size) = (0.0, 0);
            while size == 0 || (mass < p && size < all.len()) {
                mass += all[size];
                size += 1;
            }
            // Where p is met but for rounding, one word more or less is right.
            if (mass - p).abs() > 1e-12 && (mass - all[size - 1] - p).abs() > 1e-12 {
                prop_assert_eq!(kept.size.int64_value(&[row]), size as i64);
                prop_assert!((kept.mass.double_value(&[row]) - mass).abs() < 1e-12);
            }
        }
    }

    /// Any groups, empty prompts and completions among them, any cap and window.
    #[test]
    fn attention_of_any_groups(groups in prop::collection::vec((0..6i64, prop::collection::vec(0..5i64, 0..4)), 0..4), hkv in 1..3i64, shared in 1..3i64, d in 1..7i64, cap in prop::option::of(0.5..3.0f64), window in prop::option::of(1..5i64)) {
        let groups: Vec<(i64, &[i64])> = groups.iter().map(|(p, c)| (*p, &c[..])).collect();
        let layout = layout(&groups);
        let n = layout.num_rows();
        let [q, k, v] = [hkv * shared, hkv, hkv].map(|h| wave(&[n, h, d], 1.0 + h as f64, Kind::Double).set_requires_grad(true));
        let options = AttentionOptions { softcap: cap, window, ..AttentionOptions::new(0.7) };
        if n == 0 {
            // Of nothing the composition has no graph.
            let out = shared_prefix_attention(&q, &k, &v, &layout, &options).unwrap();
            prop_assert_eq!(out.size(), [0, hkv * shared, d]);
            return Ok(());
        }
        let run = |out: Tensor| {
            let mut all = Tensor::run_backward(&[(&out * &out).sum(None)], &[&q, &k, &v], false, false);
            all.push(out.detach());
            all
        };
        let ours = run(shared_prefix_attention(&q, &k, &v, &layout, &options).unwrap());
        let plain = run(reference::shared_prefix_attention(&q, &k, &v, &layout, &options).unwrap());
        for (a, b) in ours.iter().zip(&plain) {
            prop_assert!(largest_difference(a, b) < 1e-11, "{}", largest_difference(a, b));
        }
    }

    /// Mean 0 and deviation 1 over all values, or the mean kept.
    #[test]
    fn whitening(rows in ragged()) {
        let x = build(&rows);
        let all = rows.concat();
        let n = all.len() as f64;
        let mean = all.iter().sum::<f64>() / n.max(1.0);
        let var = all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        let removed = host(x.whitened(Mean::Removed).values());
        let kept = host(x.whitened(Mean::Kept).values());
        prop_assert_eq!(removed.len(), all.len());
        if n > 1.0 && var > 1e-3 {
            for ((x, r), k) in all.iter().zip(&removed).zip(&kept) {
                let expected = (x - mean) / (var + 1e-8).sqrt();
                prop_assert!((r - expected).abs() < 1e-9 && (k - expected - mean).abs() < 1e-9);
            }
        }
    }
}
