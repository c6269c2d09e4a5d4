//! Orders are permutations, shards part them, mixtures keep their shares, packing loses nothing.

use std::collections::BTreeSet;

use proptest::prelude::*;
use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::order::{Mixture, Permutation, Shard, curriculum, endless};
use rlhf_data::pack::{PackedBatch, filled_batches};

fn completion() -> impl Strategy<Value = Completion> {
    prop::collection::vec((0u32..50, any::<bool>()), 1..8).prop_map(|tokens| {
        let mut trained = Vec::new();
        for (i, _) in tokens.iter().enumerate().filter(|(_, t)| t.1) {
            match trained.last_mut() {
                Some(std::ops::Range { end, .. }) if *end == i => *end = i + 1,
                _ => trained.push(i..i + 1),
            }
        }
        Completion {
            ids: tokens.iter().map(|t| t.0).collect(),
            trained,
            finish: Finish::Cut,
            sampler: None,
        }
    })
}

fn group() -> impl Strategy<Value = PromptGroup> {
    (
        any::<u64>(),
        prop::collection::vec(0u32..50, 0..6),
        prop::collection::vec(completion(), 1..4),
    )
        .prop_map(|(row, prompt, completions)| PromptGroup {
            row,
            prompt,
            completions,
        })
}

/// The groups again, from what a batch says alone.
fn unpack(b: &PackedBatch) -> Vec<PromptGroup> {
    let ids = |r: std::ops::Range<usize>| {
        b.token_ids[r]
            .iter()
            .map(|i| *i as u32)
            .collect::<Vec<u32>>()
    };
    let mut s = 0;
    b.groups
        .iter()
        .zip(&b.rows)
        .map(|(span, row)| PromptGroup {
            row: *row,
            prompt: ids(span.prompt.clone()),
            completions: span
                .completions
                .iter()
                .map(|rows| {
                    let targets = b.offsets[s] as usize..b.offsets[s + 1] as usize;
                    s += 1;
                    let mut trained: Vec<std::ops::Range<usize>> = Vec::new();
                    for t in targets {
                        let before = b.target_rows[t] as usize;
                        let at = if span.prompt.end > 0
                            && before == span.prompt.end - 1
                            && !span.prompt.is_empty()
                        {
                            0
                        } else {
                            before + 1 - rows.start
                        };
                        assert_eq!(b.target_ids[t], b.token_ids[rows.start + at]);
                        match trained.last_mut() {
                            Some(r) if r.end == at => r.end = at + 1,
                            _ => trained.push(at..at + 1),
                        }
                    }
                    Completion {
                        ids: ids(rows.clone()),
                        trained,
                        finish: Finish::Cut,
                        sampler: None,
                    }
                })
                .collect(),
        })
        .collect()
}

proptest! {
    #[test]
    fn packing_loses_nothing(groups in prop::collection::vec(group(), 1..6)) {
        let back = unpack(&PackedBatch::pack(&groups).unwrap());
        // Without a prompt nothing predicts the first token: it is no target.
        let expected: Vec<PromptGroup> = groups
            .into_iter()
            .map(|mut g| {
                if g.prompt.is_empty() {
                    for c in &mut g.completions {
                        c.trained = c.trained.iter().map(|r| r.start.max(1)..r.end).filter(|r| !r.is_empty()).collect();
                    }
                }
                g
            })
            .collect();
        prop_assert_eq!(back, expected);
    }

    /// Each position has one row and each row one position, for any n up to 2⁴⁰.
    #[test]
    fn it_is_a_permutation(seed in any::<u64>(), bits in 0u32..=40, below in any::<u64>(), epoch in 0u64..9, at in any::<u64>()) {
        let n = (below % (1 << bits)) as usize + 1;
        let p = Permutation::new(seed, n, epoch);
        let i = (at % n as u64) as usize;
        prop_assert!(p.at(i) < n);
        prop_assert_eq!(p.position(p.at(i)), i);
        prop_assert_eq!(p.at(p.position(i)), i);
    }

    #[test]
    fn shards_part_the_walk(world in 1u64..9, n in 0usize..200, seed in any::<u64>()) {
        let shards: Vec<Shard> = (0..world).map(|r| Shard::new(r, world).unwrap()).collect();
        let mut rows: Vec<usize> = shards
            .iter()
            .flat_map(|s| (0..s.len(n as u64)).map(|i| endless(seed, n, s.position(i))))
            .collect();
        rows.sort_unstable();
        prop_assert_eq!(rows, (0..n).collect::<Vec<_>>());
        prop_assert!(Shard::new(world, world).is_err());
    }

    /// Batches hold every group once, none above the budget, whatever the lengths.
    #[test]
    fn filled_batches_hold_every_group(lengths in prop::collection::vec(1usize..60, 0..200), window in 0usize..90, seed in any::<u64>()) {
        let batches = filled_batches(&lengths, 64, window, seed, 1).unwrap();
        let mut all: Vec<usize> = batches.iter().flatten().copied().collect();
        all.sort_unstable();
        prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        prop_assert!(batches.iter().all(|b| b.iter().map(|i| lengths[*i]).sum::<usize>() <= 64));
        prop_assert_eq!(&batches, &filled_batches(&lengths, 64, window, seed, 1).unwrap());
    }
}

#[test]
fn batches_are_full() {
    // Lengths like those of chat pairs: a log-normal with a median of 150 tokens.
    let stream = rlhf_data::seed::Stream::new(4, rlhf_data::seed::Purpose::Noise);
    let lengths: Vec<usize> = (0..20_000)
        .map(|i| {
            ((150.0f64.ln() + 0.7 * stream.normal_pair(i, 0, 0).0).exp() as usize).clamp(8, 1000)
        })
        .collect();
    let tokens: usize = lengths.iter().sum();
    for (budget, window) in [(4096, 2048), (8192, 4096), (4096, 20_000)] {
        let batches = filled_batches(&lengths, budget, window, 9, 0).unwrap();
        let fill = tokens as f64 / (batches.len() * budget) as f64;
        println!(
            "budget {budget}, window {window}: {} batches, fill {fill:.4}",
            batches.len()
        );
        assert!(fill >= 0.97, "{fill}");
        // Not sorted by length: neighbours differ as often as not.
        assert_ne!(
            batches,
            filled_batches(&lengths, budget, window, 9, 1).unwrap()
        );
    }
    let e = filled_batches(&[3, 99], 64, 8, 0, 0)
        .unwrap_err()
        .to_string();
    assert!(e.contains("group 1 has 99 tokens"), "{e}");
}

#[test]
fn mixtures_keep_their_shares_and_walk_each_set() {
    let m = Mixture::new(3, &[1.0, 0.0, 2.5, 0.5]).unwrap();
    let mut seen = vec![BTreeSet::new(); 4];
    for position in 0..3 * Mixture::BLOCK {
        let (k, i) = m.at(position);
        assert!(seen[k].insert(i), "position {i} of set {k} came twice");
    }
    let counts: Vec<usize> = seen.iter().map(BTreeSet::len).collect();
    assert_eq!(counts, [7500, 0, 18_750, 3750]);
    for s in seen.iter().filter(|s| !s.is_empty()) {
        assert_eq!(s.last(), Some(&(s.len() as u64 - 1)), "without gaps");
    }
    // Mixed, not one set after the other: any 400 neighbours have about their share.
    for start in (0..20_000).step_by(1000) {
        let ones = (start..start + 400).filter(|p| m.at(*p).0 == 0).count();
        assert!((55..150).contains(&ones), "{ones} of 400, expected 100");
    }
    for bad in [
        &[][..],
        &[0.0, 0.0],
        &[1.0, -1.0],
        &[f64::NAN],
        &[1.0, 1e-9],
    ] {
        assert!(Mixture::new(3, bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_curriculum_rises_by_windows() {
    let values: Vec<f64> = (0..100).map(|i| f64::from((i * 37) % 100)).collect();
    let order = curriculum(&values, 10, 5, 0).unwrap();
    for (w, rows) in order.chunks(10).enumerate() {
        let mut v: Vec<f64> = rows.iter().map(|i| values[*i]).collect();
        assert!(v.windows(2).any(|x| x[0] > x[1]), "shuffled within");
        v.sort_by(f64::total_cmp);
        assert_eq!(v, (0..10).map(|i| (w * 10 + i) as f64).collect::<Vec<_>>());
    }
    assert_ne!(order, curriculum(&values, 10, 5, 1).unwrap());
    let sorted = curriculum(&values, 1, 5, 0).unwrap();
    assert!(sorted.windows(2).all(|w| values[w[0]] < values[w[1]]));
    let e = curriculum(&[1.0, f64::NAN], 1, 0, 0)
        .unwrap_err()
        .to_string();
    assert!(e.contains("row 1"), "{e}");
}
