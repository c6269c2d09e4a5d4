//! What a decoding step does between its products, against plain compositions.

use proptest::prelude::*;
use rlhf_kernels::AttentionOptions;
use rlhf_kernels::decode::{
    DecodeCache, Prefix, decode_attention, decodes, draw, rms_norm, silu_gate,
};
use tch::{Kind, Tensor};

use crate::{cpu_wave as wave, largest_difference};

fn double(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double)
}

/// x·cos + roll(x, D'/2)·sin on the first D' dimensions, for `[heads, D]`.
fn turned(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let turning = cos.size()[1];
    let first = x.narrow(1, 0, turning);
    let turned = &first * cos + first.roll(turning / 2, -1) * sin;
    Tensor::cat(&[turned, x.narrow(1, turning, x.size()[1] - turning)], 1)
}

#[derive(Clone, Debug)]
struct Problem {
    n: i64,
    hkv: i64,
    each: i64,
    d: i64,
    turning: Option<i64>,
    now: i64,
    softcap: Option<f64>,
    window: Option<i64>,
    /// Columns of what the even sequences share.
    before: i64,
}

fn problems() -> impl Strategy<Value = Problem> {
    let sizes = (1..5i64, 1..4i64, 1..5i64, 1..70i64, 0..50i64);
    let options = (
        any::<bool>(),
        0..36i64,
        proptest::option::of(0.5..30.0f64),
        proptest::option::of(1..20i64),
        0..20i64,
    );
    (sizes, options).prop_map(
        |((n, hkv, each, d, now), (turns, pairs, softcap, window, before))| Problem {
            n,
            hkv,
            each,
            d,
            turning: turns.then_some(2 * pairs.min(d / 2)),
            now,
            softcap,
            window,
            before,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Row by row and head by head in f64.
    #[test]
    fn attention_of_one_token(p in problems()) {
        let Problem { n, hkv, each, d, now, .. } = p;
        let hq = hkv * each;
        let columns = now + 3;
        // As a product gives them: queries, keys and values of a token in one row.
        let all = wave(&[n, (hq + 2 * hkv) * d], 1.0, Kind::Float);
        let part = |from: i64, heads: i64| all.narrow(1, from * d, heads * d).reshape([n, heads, d]);
        let (q, k, v) = (part(0, hq), part(hq, hkv), part(hq + hkv, hkv));
        let keys = wave(&[n + 1, hkv, columns, d], 2.0, Kind::Float);
        let values = wave(&[n + 1, hkv, columns, d], 3.0, Kind::Float);
        let (before_k, before_v) = (keys.copy(), values.copy());
        let starts: Vec<i64> = (0..n).map(|i| (i * 7) % (now + 1)).collect();
        let angles = p.turning.map(|t| {
            let angle = wave(&[n, 1, t], 4.0, Kind::Float) * 3.0;
            (angle.cos(), angle.sin())
        });
        let options = AttentionOptions { scale: 0.3, softcap: p.softcap, window: p.window };
        let shared = [5.0, 6.0].map(|seed| wave(&[hkv, p.before, d], seed, Kind::Float));
        let prefix = Prefix { keys: &shared[0], values: &shared[1] };
        let prefixes: Vec<Option<Prefix<'_>>> = (0..n).map(|i| (i % 2 == 0).then_some(prefix)).collect();
        let cache = DecodeCache { keys: &keys, values: &values, starts: &starts, prefixes: &prefixes, now };
        let rope = angles.as_ref().map(|(c, s)| (c, s));
        let out = decode_attention(&q, &k, &v, rope, &cache, &options).unwrap();
        prop_assert_eq!(out.size(), [n, hq * d]);
        for row in 0..n {
            let turn = |x: Tensor| match &angles {
                Some((c, s)) => turned(&x, &double(&c.get(row)), &double(&s.get(row))),
                None => x,
            };
            let (rq, rk) = (turn(double(&q.get(row))), turn(double(&k.get(row))));
            let from = starts[row as usize];
            let before = if row % 2 == 0 { p.before } else { 0 };
            let all = before + now + 1 - from;
            let seen = p.window.map_or(all, |w| w.min(all));
            for head in 0..hkv {
                let joined = |shared: &Tensor, own: &Tensor, new: &Tensor| {
                    let shared = double(&shared.get(head).narrow(0, 0, before));
                    let own = double(&own.get(row).get(head).narrow(0, from, now - from));
                    Tensor::cat(&[shared, own, new.narrow(0, head, 1)], 0).narrow(0, all - seen, seen)
                };
                let ks = joined(&shared[0], &before_k, &rk);
                let vs = joined(&shared[1], &before_v, &double(&v.get(row)));
                for g in 0..each {
                    let query = rq.get(head * each + g);
                    let mut scores = ks.mv(&query) * options.scale;
                    if let Some(cap) = p.softcap {
                        scores = (scores / cap).tanh() * cap;
                    }
                    let expected = vs.tr().mv(&scores.softmax(0, None::<Kind>));
                    let seen = double(&out.get(row)).narrow(0, (head * each + g) * d, d);
                    prop_assert!(largest_difference(&seen, &expected) < 3e-6);
                }
                // The new column is there, the others are as they were.
                let new = double(&keys.get(row).get(head).get(now));
                prop_assert!(largest_difference(&new, &rk.get(head)) < 1e-6);
                prop_assert_eq!(values.get(row).get(head).get(now), v.get(row).get(head));
            }
        }
        let others = |t: &Tensor| {
            Tensor::cat(&[t.narrow(2, 0, now), t.narrow(2, now + 1, columns - now - 1)], 2)
        };
        prop_assert_eq!(others(&keys), others(&before_k));
        prop_assert_eq!(keys.get(n), before_k.get(n));
    }

    #[test]
    fn norm_and_gate(n in 0..6i64, d in 1..200i64) {
        let wide = wave(&[n, 2 * d + 3], 1.0, Kind::Float) * 40.0;
        let both = wide.narrow(1, 2, 2 * d);
        let (gate, up) = (double(&both).narrow(1, 0, d), double(&both).narrow(1, d, d));
        let seen = silu_gate(&both).unwrap();
        prop_assert!(n == 0 || largest_difference(&seen, &(gate.silu() * up)) < 2e-4);
        let (x, w) = (wide.narrow(1, 1, d), wave(&[d], 2.0, Kind::Float));
        let scale = (double(&x).square().mean_dim(&[1i64][..], true, None::<Kind>) + 1e-5).rsqrt();
        let expected = double(&x) * scale * double(&w);
        let seen = rms_norm(&x, &w, 1e-5).unwrap();
        prop_assert!(n == 0 || largest_difference(&seen, &expected) < 1e-5);
    }
}

/// Against the plain inversion in f64, of vocabularies around the kernel's blocks; some tokens are
/// impossible. A uniform may lie within f32's rounding of a border.
#[test]
fn draws_invert_the_cumulative_distribution() {
    for v in [1i64, 2, 15, 16, 17, 255, 256, 257, 1000, 4097] {
        let n = 64;
        let wide = wave(&[n, v + 3], 1.0, Kind::Float) * 9.0;
        let scores = wide.narrow(1, 2, v);
        if v > 2 {
            let _ = scores.select(1, 1).fill_(f64::NEG_INFINITY);
        }
        let uniforms: Vec<f64> = (0..n).map(|i| (i as f64 + 0.5) / n as f64).collect();
        let drawn = draw(&scores, &uniforms).unwrap();
        let expected = Vec::<Vec<f64>>::try_from(double(&scores).log_softmax(1, None::<Kind>));
        for (row, logp) in expected.unwrap().iter().enumerate() {
            let id = drawn.ids[row] as usize;
            let upto: f64 = logp[..=id].iter().map(|l| l.exp()).sum();
            let before = upto - logp[id].exp();
            assert!(
                before - 1e-6 < uniforms[row] && uniforms[row] < upto + 1e-6,
                "{v} ids, row {row}: {} is not in {before}..{upto}",
                uniforms[row]
            );
            assert!((f64::from(drawn.logprobs[row]) - logp[id]).abs() < 1e-6);
        }
        assert_eq!(drawn.sums.iter().all(|s| s.is_finite()), v <= 2);
        // The same alone as among others.
        let alone = draw(&scores.narrow(0, 7, 1), &uniforms[7..8]).unwrap();
        assert_eq!(alone.ids[0], drawn.ids[7]);
        assert_eq!(alone.logprobs[0].to_bits(), drawn.logprobs[7].to_bits());
    }
    let stray = Tensor::from_slice(&[0.0f32, f32::NAN, 1.0, 0.0, f32::INFINITY, 1.0]).view([2, 3]);
    let drawn = draw(&stray, &[0.2, 0.9]).unwrap();
    assert!(drawn.logprobs.iter().all(|l| l.is_nan()));
    assert!(drawn.sums.iter().all(|s| !s.is_finite()));
    assert!(drawn.ids.iter().all(|id| (0..3).contains(id)));
    assert!(draw(&stray, &[0.2]).is_err() && draw(&stray.narrow(1, 0, 0), &[0.2, 0.9]).is_err());
}

#[test]
fn far_gates_and_stray_numbers() {
    let both = Tensor::from_slice(&[-1e4f32, 1e4, f32::NAN, 2.0, 2.0, 2.0]).view([1, 6]);
    let seen = Vec::<f32>::try_from(silu_gate(&both).unwrap().view(-1)).unwrap();
    assert!(seen[0].abs() < 1e-30 && seen[1] == 2e4);
    assert!(seen[2].is_nan());
    let x = Tensor::from_slice(&[1.0f32, f32::NAN]).view([2, 1]);
    let seen = rms_norm(&x, &Tensor::from_slice(&[1.0f32]), 0.0).unwrap();
    let seen = Vec::<f32>::try_from(seen.view(-1)).unwrap();
    assert!((seen[0] - 1.0).abs() < 1e-6 && seen[1].is_nan());
}

#[test]
fn what_does_not_fit_is_refused() {
    let of = |size: &[i64]| wave(size, 1.0, Kind::Float);
    let (q, k, keys) = (of(&[2, 4, 8]), of(&[2, 2, 8]), of(&[2, 2, 5, 8]));
    let values = keys.copy();
    let options = AttentionOptions {
        scale: 1.0,
        softcap: None,
        window: None,
    };
    let run = |q: &Tensor, k: &Tensor, keys: &Tensor, starts: &[i64], now: i64| {
        let cache = DecodeCache {
            prefixes: &[],
            keys,
            values: &values,
            starts,
            now,
        };
        decode_attention(q, k, k, None, &cache, &options).map_err(|e| e.to_string())
    };
    assert!(run(&q, &k, &keys, &[0, 4], 4).is_ok());
    for (result, word) in [
        (run(&q, &k, &keys, &[0, 0], 5), "column 5"),
        (run(&q, &k, &keys, &[0], 4), "1 starts"),
        (run(&q, &k, &keys, &[0, -1], 4), "do not fit"),
        (run(&q, &k, &keys, &[0, 4], 3), "do not fit"),
        (
            run(&of(&[2, 3, 8]), &k, &keys, &[0, 0], 4),
            "3 query heads for 2 key heads",
        ),
        (
            run(&of(&[3, 4, 8]), &k, &keys, &[0, 0, 0], 4),
            "expected f32 [3, 2, 8]",
        ),
        (
            run(&q, &k, &keys.to_kind(Kind::Double), &[0, 0], 4),
            "Double",
        ),
        (
            run(&q, &k, &keys.transpose(2, 3), &[0, 0], 4),
            "expected f32",
        ),
    ] {
        let e = result.unwrap_err();
        assert!(e.contains(word), "{word}: {e}");
    }
    assert!(!decodes(&q.to_kind(Kind::BFloat16)) && decodes(&q));
    assert!(
        silu_gate(&of(&[2, 3]))
            .unwrap_err()
            .to_string()
            .contains("no halves")
    );
    assert!(rms_norm(&of(&[2, 3]), &of(&[2]), 0.1).is_err());
}
