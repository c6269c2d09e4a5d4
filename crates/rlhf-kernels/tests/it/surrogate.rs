//! The fused surrogate against its composition, by finite differences and by hand.

use proptest::prelude::*;
use rlhf_kernels::kl::SampledKl;
use rlhf_kernels::surrogate::{
    Advantages, KlTerm, SurrogateInputs, SurrogateOptions, SurrogateOutput, SurrogateStats,
    TokenWeight,
};
use rlhf_kernels::{Offsets, Ragged, reference, surrogate};
use tch::{Kind, Tensor};

use crate::gradcheck::check;
use crate::{device, from_slice, largest_difference, wave};

const PLAIN: SurrogateOptions = SurrogateOptions {
    epsilon_low: 0.2,
    epsilon_high: 0.3,
    dual: None,
    token_weight: TokenWeight::One,
};

/// ρ = e^{.5}, e^{−.5}, e^{.5}, e^{−.5} with A = 1, 1, −1, −1 and ε = .2/.3:
/// −1.3 (held above), −.6065, 1.6487 (1.4 with a dual bound of 1.4), .8 (held below).
#[test]
fn by_hand() {
    let offsets = Offsets::from_lengths(&[1, 3]).unwrap();
    let logp = from_slice(&[0.5f64, -0.5, 0.5, -0.5]).set_requires_grad(true);
    let x = Ragged::new(logp.shallow_clone(), offsets).unwrap();
    let old = Tensor::zeros([4], (Kind::Double, device()));
    let a = from_slice(&[1f64, 1., -1., -1.]);
    let inputs = SurrogateInputs {
        logprobs: &x,
        old_logprobs: &old,
        advantages: Advantages::Token(&a),
        weights: None,
        kl: None,
    };
    let (up, down) = (0.5f64.exp(), (-0.5f64).exp());
    let run = |options: &SurrogateOptions| {
        let out = surrogate(&inputs, options).unwrap();
        let g = Tensor::run_backward(&[&out.loss.sum], &[&logp], false, false).remove(0);
        (out, Vec::<f64>::try_from(&g).unwrap())
    };
    let (out, g) = run(&PLAIN);
    assert!((out.loss.sum.double_value(&[]) - (-1.3 - down + up + 0.8)).abs() < 1e-14);
    assert_eq!(g, [0.0, -down, up, 0.0]);
    assert_eq!(
        out.stats,
        SurrogateStats {
            tokens: 4.0,
            clipped_low: 1.0,
            clipped_high: 1.0,
            ratio_sum: 2.0 * (up + down),
            ratio_max: up,
            approx_kl_sum: 0.5,
            kl_sum: 0.0,
        }
    );
    let dual = SurrogateOptions {
        dual: Some(1.4),
        token_weight: TokenWeight::SequenceMean,
        ..PLAIN
    };
    let (out, g) = run(&dual);
    let expected = -1.3 + (-down + 1.4 + 0.8) / 3.0;
    assert!((out.loss.sum.double_value(&[]) - expected).abs() < 1e-14);
    assert_eq!((out.loss.weight, g[2]), (2.0, 0.0));
    // One advantage a completion.
    let (each, spread) = (from_slice(&[1f64, -1.]), from_slice(&[1f64, -1., -1., -1.]));
    let with = |advantages| SurrogateInputs {
        advantages,
        ..inputs
    };
    let each = surrogate(&with(Advantages::Completion(&each)), &PLAIN).unwrap();
    let spread = surrogate(&with(Advantages::Token(&spread)), &PLAIN).unwrap();
    assert_eq!(each.stats, spread.stats);
    assert_eq!(each.loss.sum, spread.loss.sum);
}

/// On the policy itself the ratio is 1 and the gradient −A; with nothing there is nothing.
#[test]
fn at_the_start_and_of_nothing() {
    let offsets = Offsets::from_lengths(&[0, 2, 0]).unwrap();
    let logp = from_slice(&[-0.3f32, -1.7]).set_requires_grad(true);
    let a = from_slice(&[2f32, -3.]);
    let old = logp.detach();
    let x = Ragged::new(logp.shallow_clone(), offsets).unwrap();
    let mut inputs = SurrogateInputs {
        logprobs: &x,
        old_logprobs: &old,
        advantages: Advantages::Token(&a),
        weights: None,
        kl: None,
    };
    let out = surrogate(&inputs, &PLAIN).unwrap();
    let g = Tensor::run_backward(&[&out.loss.sum], &[&logp], false, false).remove(0);
    assert_eq!(Vec::<f32>::try_from(&g).unwrap(), [-2.0, 3.0]);
    let nothing = Ragged::new(logp.narrow(0, 0, 0), Offsets::new(vec![0, 0]).unwrap()).unwrap();
    let none = Tensor::zeros([0], (Kind::Float, device()));
    inputs = SurrogateInputs {
        logprobs: &nothing,
        old_logprobs: &none,
        advantages: Advantages::Token(&none),
        ..inputs
    };
    let out = surrogate(&inputs, &PLAIN).unwrap();
    assert_eq!(out.loss.sum.double_value(&[]), 0.0);
    assert_eq!(
        (out.loss.weight, out.stats),
        (0.0, SurrogateStats::default())
    );
    out.loss.sum.backward();
}

/// A ratio that overflows, or is not a number, shows.
#[test]
fn what_is_not_finite_shows() {
    let offsets = Offsets::from_lengths(&[1]).unwrap();
    let run = |log_ratio: f32| {
        let x = Ragged::new(from_slice(&[log_ratio]), offsets.clone()).unwrap();
        let (old, a) = (from_slice(&[0f32]), from_slice(&[-1f32]));
        let inputs = SurrogateInputs {
            logprobs: &x,
            old_logprobs: &old,
            advantages: Advantages::Token(&a),
            weights: None,
            kl: None,
        };
        surrogate(&inputs, &PLAIN)
            .unwrap()
            .loss
            .sum
            .double_value(&[])
    };
    assert_eq!(run(200.0), f64::INFINITY);
    assert!(run(f32::NAN).is_nan());
}

#[test]
fn wrong_arguments_are_named() {
    let x = Ragged::new(
        from_slice(&[0f32, 1.]),
        Offsets::from_lengths(&[2]).unwrap(),
    )
    .unwrap();
    let (two, three) = (from_slice(&[0f32; 2]), from_slice(&[0f32; 3]));
    let inputs = SurrogateInputs {
        logprobs: &x,
        old_logprobs: &two,
        advantages: Advantages::Completion(&three),
        weights: None,
        kl: None,
    };
    let text =
        |i: &SurrogateInputs<'_>, o: &SurrogateOptions| surrogate(i, o).unwrap_err().to_string();
    assert!(text(&inputs, &PLAIN).contains("advantages are [3]"));
    let inputs = SurrogateInputs {
        advantages: Advantages::Token(&two),
        ..inputs
    };
    let dual = SurrogateOptions {
        dual: Some(1.2),
        ..PLAIN
    };
    assert!(text(&inputs, &dual).contains("dual is Some(1.2)"));
}

const KL: [(SampledKl, SampledKl); 4] = [
    (SampledKl::K1, SampledKl::K1),
    (SampledKl::K2, SampledKl::K2),
    (SampledKl::K3, SampledKl::K3),
    (SampledKl::K3, SampledKl::K2),
];

#[test]
fn gradients() {
    let offsets = Offsets::from_lengths(&[4, 0, 5]).unwrap();
    let old = wave(&[9], 2.0, Kind::Double) * 0.4;
    let (a, reference, w) = (
        wave(&[9], 3.0, Kind::Double),
        wave(&[9], 4.0, Kind::Double) * 0.4,
        wave(&[9], 5.0, Kind::Double).abs(),
    );
    for (i, (value, gradient)) in KL.into_iter().take(3).enumerate() {
        let options = SurrogateOptions {
            dual: Some(1.5),
            token_weight: TokenWeight::SequenceMean,
            ..PLAIN
        };
        check("surrogate", &[wave(&[9], 1.0, Kind::Double) * 0.4], &|x| {
            let x = Ragged::new(x[0].shallow_clone(), offsets.clone()).unwrap();
            let inputs = SurrogateInputs {
                logprobs: &x,
                old_logprobs: &old,
                advantages: Advantages::Token(&a),
                weights: Some(&w),
                kl: Some(KlTerm {
                    ref_logprobs: &reference,
                    value,
                    gradient,
                    coef: 0.3,
                    weighted: i % 2 == 0,
                }),
            };
            surrogate(&inputs, &options).unwrap().loss.sum
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Value, gradient and statistics, over empty completions and runs of every length.
    #[test]
    fn fused_is_composed(lengths in prop::collection::vec(prop_oneof![0..40i64, 1000..1100i64], 0..5), double: bool, dual: bool, mean: bool, weights: bool, kl in prop::option::of(0..4usize), by_kl_weight: bool, each: bool, spread in 0.0..0.8f64) {
        let kind = if double { Kind::Double } else { Kind::Float };
        let offsets = Offsets::from_lengths(&lengths).unwrap();
        let (m, s) = (offsets.num_values(), offsets.num_segments());
        let leaf = (wave(&[m], 1.0, kind) * spread).set_requires_grad(true);
        let old = wave(&[m], 2.0, kind) * spread;
        let (token, completion) = (wave(&[m], 3.0, kind), wave(&[s], 4.0, kind));
        let (w, ref_logprobs) = (wave(&[m], 5.0, kind).abs(), wave(&[m], 6.0, kind) * spread);
        let x = Ragged::new(leaf.shallow_clone(), offsets).unwrap();
        let inputs = SurrogateInputs {
            logprobs: &x,
            old_logprobs: &old,
            advantages: if each { Advantages::Completion(&completion) } else { Advantages::Token(&token) },
            weights: weights.then_some(&w),
            kl: kl.map(|i| KlTerm { ref_logprobs: &ref_logprobs, value: KL[i].0, gradient: KL[i].1, coef: 0.2, weighted: by_kl_weight }),
        };
        let options = SurrogateOptions {
            dual: dual.then_some(1.5),
            token_weight: if mean { TokenWeight::SequenceMean } else { TokenWeight::One },
            ..PLAIN
        };
        let run = |out: SurrogateOutput| {
            let g = Tensor::run_backward(&[&out.loss.sum], &[&leaf], false, false).remove(0);
            (out.loss.sum.double_value(&[]), out.loss.weight, out.stats, g)
        };
        let ours = run(surrogate(&inputs, &options).unwrap());
        let plain = run(reference::surrogate(&inputs, &options).unwrap());
        let tolerance = if double { 1e-12 } else { 2e-6 };
        let near = |a: f64, b: f64| (a - b).abs() <= tolerance * (m as f64).max(1.0);
        prop_assert!(near(ours.0, plain.0), "{} {}", ours.0, plain.0);
        prop_assert_eq!(ours.1, plain.1);
        // Where a ratio touches a bound to the last digit, the two may differ.
        let (a, b) = (ours.2, plain.2);
        prop_assert!((a.clipped_low - b.clipped_low).abs() <= 1.0 && (a.clipped_high - b.clipped_high).abs() <= 1.0);
        for (a, b) in [(a.ratio_sum, b.ratio_sum), (a.ratio_max, b.ratio_max), (a.approx_kl_sum, b.approx_kl_sum), (a.kl_sum, b.kl_sum)] {
            prop_assert!(near(a, b), "{a} {b}");
        }
        let different = if m == 0 { 0.0 } else {
            (ours.3.to_kind(Kind::Double) - plain.3.to_kind(Kind::Double)).abs().gt(tolerance * 10.0).sum(Kind::Double).double_value(&[])
        };
        prop_assert!(different <= 1.0, "{different} gradients differ, the most by {}", largest_difference(&ours.3, &plain.3));
    }
}
