//! Divergences against their plain versions, by finite differences, and at their edges.

use proptest::prelude::*;
use rlhf_kernels::kl::{Divergence, KlOptions, Logits, Tail, TopLogprobs};
use rlhf_kernels::{Head, linear_kl, linear_kl_top, reference, top_logprobs};
use tch::{Device, Kind, Tensor};

use crate::exact::{compare, tolerance};
use crate::gradcheck::check;
use crate::{device, from_slice, largest_difference, wave};

const ALL: [Divergence; 4] = [
    Divergence::Forward,
    Divergence::Reverse,
    Divergence::JensenShannon { beta: 0.5 },
    Divergence::JensenShannon { beta: 0.1 },
];

/// A student of width h and a teacher of width h + 1: weights, biases, hidden states.
struct Pair {
    student: [Tensor; 3],
    teacher: [Tensor; 3],
}

impl Pair {
    fn new(m: i64, h: i64, v: i64, kind: Kind) -> Self {
        let side = |h: i64, seed: f64| {
            [
                wave(&[m, h], seed, kind),
                wave(&[v, h], seed + 1.0, kind) * 2.0,
                wave(&[v], seed + 2.0, kind),
            ]
        };
        Self {
            student: side(h, 1.0).map(|t| t.set_requires_grad(true)),
            teacher: side(h + 1, 11.0),
        }
    }

    fn logits(side: &[Tensor; 3], softcap: Option<f64>) -> Logits<'_> {
        let head = Head {
            weight: &side[1],
            bias: Some(&side[2]),
        };
        Logits {
            softcap,
            ..Logits::new(&side[0], head)
        }
    }
}

#[test]
fn whole_vocabulary_is_the_plain_one() {
    for kind in [Kind::Float, Kind::Double] {
        for (m, h, v) in [(0, 2, 3), (1, 1, 1), (1, 3, 2), (7, 8, 16), (9, 6, 1037)] {
            let pair = Pair::new(m, h, v, kind);
            for divergence in ALL {
                for (softcap, temperature) in [(None, 1.0), (Some(2.0), 0.7)] {
                    let options = KlOptions {
                        temperature,
                        chunk_rows: Some(4),
                        ..KlOptions::new(divergence)
                    };
                    let student = Pair::logits(&pair.student, softcap);
                    let teacher = Pair::logits(&pair.teacher, softcap.map(|c| c + 1.0));
                    let ours = || linear_kl(student, teacher, &options).unwrap();
                    let plain = || reference::linear_kl(student, teacher, &options).unwrap();
                    let leaves = pair.student.each_ref().map(Tensor::shallow_clone);
                    compare(&leaves, &ours, &plain, tolerance(kind));
                    // A frozen head: the gradient is forward's.
                    let frozen = [1, 2].map(|i: usize| pair.student[i].detach());
                    let head = Head {
                        weight: &frozen[0],
                        bias: Some(&frozen[1]),
                    };
                    let student = Logits { head, ..student };
                    let ours = || linear_kl(student, teacher, &options).unwrap();
                    compare(&leaves[..1], &ours, &plain, tolerance(kind));
                }
            }
        }
    }
}

#[test]
fn likeliest_words_are_the_plain_ones() {
    for kind in [Kind::Float, Kind::Double] {
        for (m, h, v, k) in [
            (0, 2, 3, 2),
            (1, 1, 1, 1),
            (5, 3, 7, 7),
            (7, 8, 16, 3),
            (9, 6, 1037, 20),
        ] {
            let pair = Pair::new(m, h, v, kind);
            let teacher = top_logprobs(Pair::logits(&pair.teacher, None), k, 0.7, None).unwrap();
            for divergence in ALL {
                for tail in [Tail::Bucket, Tail::Dropped] {
                    for softcap in [None, Some(2.0)] {
                        let options = KlOptions {
                            temperature: 0.7,
                            chunk_rows: Some(4),
                            ..KlOptions::new(divergence)
                        };
                        let student = Pair::logits(&pair.student, softcap);
                        compare(
                            &pair.student.each_ref().map(Tensor::shallow_clone),
                            &|| linear_kl_top(student, &teacher, tail, &options).unwrap(),
                            &|| {
                                reference::linear_kl_top(student, &teacher, tail, &options).unwrap()
                            },
                            tolerance(kind),
                        );
                    }
                }
            }
        }
    }
}

/// The k likeliest are the whole log-softmax's; with k = V nothing is left out, and with fewer a bucket
/// bounds the whole from below.
#[test]
fn the_likeliest_against_the_whole() {
    let pair = Pair::new(6, 4, 12, Kind::Double);
    let (student, teacher) = (
        Pair::logits(&pair.student, None),
        Pair::logits(&pair.teacher, None),
    );
    let logits = pair.teacher[0].matmul(&pair.teacher[1].tr()) + &pair.teacher[2];
    let (expected, ids) = logits.log_softmax(1, Kind::Double).topk(3, 1, true, true);
    let three = top_logprobs(teacher, 3, 1.0, Some(200)).unwrap();
    assert_eq!(three.ids, ids);
    assert!(largest_difference(&three.logprobs, &expected) < 1e-13);
    let all = top_logprobs(teacher, 12, 1.0, None).unwrap();
    for divergence in ALL {
        let options = KlOptions::new(divergence);
        let whole = linear_kl(student, teacher, &options).unwrap();
        let same = linear_kl_top(student, &all, Tail::Bucket, &options).unwrap();
        assert!(largest_difference(&whole, &same) < 1e-12);
        let bound = linear_kl_top(student, &three, Tail::Bucket, &options).unwrap();
        assert!((whole - bound).min().double_value(&[]) > -1e-12);
    }
}

#[test]
fn gradients() {
    let (m, h, v) = (4, 3, 6);
    let pair = Pair::new(m, h, v, Kind::Double);
    let inputs = pair.student.each_ref().map(Tensor::detach);
    let cached = top_logprobs(Pair::logits(&pair.teacher, None), 3, 1.3, None).unwrap();
    for divergence in ALL {
        for softcap in [None, Some(1.5)] {
            let options = KlOptions {
                temperature: 1.3,
                chunk_rows: Some(3),
                ..KlOptions::new(divergence)
            };
            let name = format!("{options:?}");
            let side = |x: &[Tensor], f: &dyn Fn(Logits<'_>) -> Tensor| {
                let head = Head {
                    weight: &x[1],
                    bias: Some(&x[2]),
                };
                f(Logits {
                    softcap,
                    ..Logits::new(&x[0], head)
                })
            };
            check(&name, &inputs, &|x| {
                side(x, &|s| {
                    linear_kl(s, Pair::logits(&pair.teacher, None), &options).unwrap()
                })
            });
            for tail in [Tail::Bucket, Tail::Dropped] {
                check(&format!("{name} {tail:?}"), &inputs, &|x| {
                    side(x, &|s| linear_kl_top(s, &cached, tail, &options).unwrap())
                });
            }
        }
    }
}

/// Equal sides are 0 apart with no gradient; words that are impossible on both sides cost nothing; what
/// only the averaged side can say costs infinity.
#[test]
fn impossible_words() {
    let inf = f64::NEG_INFINITY;
    for kind in [Kind::Float, Kind::Double] {
        let eye = Tensor::eye(3, (kind, device()));
        // Through a bias, as an infinite hidden state would be multiplied by 0.
        let zero = Tensor::zeros([1, 3], (kind, device())).set_requires_grad(true);
        let side = |bias: &[f64; 3], f: &dyn Fn(Logits<'_>) -> f64| {
            let bias = from_slice(bias).to_kind(kind);
            let head = Head {
                weight: &eye,
                bias: Some(&bias),
            };
            f(Logits::new(&zero, head))
        };
        let kl = |s: &[f64; 3], t: &[f64; 3], d: Divergence| {
            side(s, &|s| {
                side(t, &|t| {
                    linear_kl(s, t, &KlOptions::new(d))
                        .unwrap()
                        .double_value(&[0])
                })
            })
        };
        for d in ALL {
            assert!(kl(&[0., 1., inf], &[0., 1., inf], d).abs() < 1e-7, "{d:?}");
        }
        let (narrow, wide) = ([0., 0., inf], [0., 0., 0.]);
        assert!((kl(&narrow, &wide, Divergence::Reverse) - 1.5f64.ln()).abs() < 1e-6);
        assert_eq!(kl(&wide, &narrow, Divergence::Reverse), f64::INFINITY);
        assert_eq!(kl(&narrow, &wide, Divergence::Forward), f64::INFINITY);
        // m = (5/12, 5/12, 1/6): ½ (⅔ ln .8 + ⅓ ln 2) + ½ ln 1.2.
        let js = 0.5 * (2.0 / 3.0 * 0.8f64.ln() + 2f64.ln() / 3.0) + 0.5 * 1.2f64.ln();
        let half = Divergence::JensenShannon { beta: 0.5 };
        assert!((kl(&narrow, &wide, half) - js).abs() < 1e-6);
        assert!((kl(&wide, &narrow, half) - js).abs() < 1e-6);
    }
}

/// Divided by β, or by 1 − β, the generalised Jensen-Shannon divergence tends to the two plain ones.
#[test]
fn the_ends_of_the_mixture() {
    let pair = Pair::new(5, 3, 9, Kind::Double);
    let kl = |d| {
        linear_kl(
            Pair::logits(&pair.student, None),
            Pair::logits(&pair.teacher, None),
            &KlOptions::new(d),
        )
        .unwrap()
    };
    let beta = 1e-6;
    let low = kl(Divergence::JensenShannon { beta }) / beta;
    let high = kl(Divergence::JensenShannon { beta: 1.0 - beta }) / beta;
    assert!(largest_difference(&low, &kl(Divergence::Forward)) < 1e-4);
    assert!(largest_difference(&high, &kl(Divergence::Reverse)) < 1e-4);
}

#[test]
fn wrong_arguments_are_named() {
    let pair = Pair::new(2, 3, 5, Kind::Float);
    let (student, teacher) = (
        Pair::logits(&pair.student, None),
        Pair::logits(&pair.teacher, None),
    );
    let ends = KlOptions::new(Divergence::JensenShannon { beta: 1.0 });
    let text = |r: rlhf_kernels::Result<Tensor>| r.unwrap_err().to_string();
    assert!(text(linear_kl(student, teacher, &ends)).contains("beta is 1"));
    let options = KlOptions::new(Divergence::Forward);
    let other = Pair::new(2, 3, 4, Kind::Float);
    let teacher = Pair::logits(&other.teacher, None);
    assert_eq!(
        text(linear_kl(student, teacher, &options)),
        "linear_kl: the student is (2, 5) and the teacher (2, 4), expected one (M, V)"
    );
    let cached = TopLogprobs {
        ids: from_slice(&[0i64, 5]).view([2, 1]),
        logprobs: Tensor::zeros([2, 1], (Kind::Float, device())),
    };
    if device() == Device::Cpu {
        assert!(text(linear_kl_top(student, &cached, Tail::Bucket, &options)).contains("0..5"));
    }
    assert!(
        top_logprobs(student, 6, 1.0, None)
            .unwrap_err()
            .to_string()
            .contains("k is 6")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape(m in 0..7i64, h in 1..6i64, v in 1..70i64, chunk in 1..8i64, which in 0..4usize, t in 0.4..2.0f64, k in 1..9i64, bucket: bool) {
        let pair = Pair::new(m, h, v, Kind::Float);
        let options = KlOptions { temperature: t, chunk_rows: Some(chunk), ..KlOptions::new(ALL[which]) };
        let (student, teacher) = (Pair::logits(&pair.student, None), Pair::logits(&pair.teacher, None));
        let tail = if bucket { Tail::Bucket } else { Tail::Dropped };
        let cached = top_logprobs(teacher, k.min(v), t, None).unwrap();
        let run = |whole: Tensor, top: Tensor| {
            let loss = whole.sum(Kind::Float) + top.sum(Kind::Float) * 0.5;
            let mut all = Tensor::run_backward(&[loss], &pair.student, false, false);
            all.extend([whole.detach(), top.detach()]);
            all
        };
        let ours = run(linear_kl(student, teacher, &options).unwrap(), linear_kl_top(student, &cached, tail, &options).unwrap());
        let plain = run(reference::linear_kl(student, teacher, &options).unwrap(), reference::linear_kl_top(student, &cached, tail, &options).unwrap());
        for (a, b) in ours.iter().zip(&plain) {
            let scale = if b.numel() == 0 { 1.0 } else { b.abs().max().double_value(&[]).max(1.0) };
            prop_assert!(largest_difference(a, b) < 2e-5 * scale, "{}", largest_difference(a, b));
        }
    }
}
