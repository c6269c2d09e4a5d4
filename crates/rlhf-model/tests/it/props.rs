//! Any packing of any groups gives the same log-probabilities as each completion alone.

use std::sync::OnceLock;

use proptest::prelude::*;
use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_model::{Reference, Transformer};
use tch::Kind;

use crate::support::{batch, small};

// `Tensor` is Send but not Sync; the model lives behind a lock.
static MODEL: OnceLock<std::sync::Mutex<Reference<Transformer>>> = OnceLock::new();

fn groups() -> impl Strategy<Value = Vec<PromptGroup>> {
    let ids = |most| prop::collection::vec(0_u32..40, 1..=most);
    let completion = ids(6).prop_flat_map(|ids| {
        let n = ids.len();
        (
            Just(ids),
            prop::sample::subsequence((0..n).collect::<Vec<_>>(), 0..=n),
        )
    });
    let completion = completion.prop_map(|(ids, trained)| Completion {
        ids,
        trained: trained.into_iter().map(|i| i..i + 1).collect(),
        finish: Finish::Stop,
        sampler: None,
    });
    let group = (
        prop::collection::vec(0_u32..40, 0..6),
        prop::collection::vec(completion, 1..4),
    )
        .prop_map(|(prompt, completions)| PromptGroup {
            row: 0,
            prompt,
            completions,
        });
    prop::collection::vec(group, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn packing_is_invisible(groups in groups()) {
        let model = MODEL.get_or_init(|| Reference::new(small(Kind::Double)).into());
        let model = model.lock().unwrap();
        let values = |groups: &[PromptGroup]| {
            let b = batch(groups);
            let values = model.logprobs(&b, 1.0).unwrap();
            (Vec::<f64>::try_from(values.values()).unwrap(), b.offsets.host().to_vec())
        };
        let (packed, offsets) = values(&groups);
        let mut s = 0;
        for g in &groups {
            for c in &g.completions {
                let one = PromptGroup { completions: vec![c.clone()], ..g.clone() };
                let (alone, _) = values(&[one]);
                let range = offsets[s] as usize..offsets[s + 1] as usize;
                prop_assert_eq!(alone.len(), range.len());
                for (a, b) in alone.iter().zip(&packed[range]) {
                    prop_assert!((a - b).abs() < 1e-11, "{} {}", a, b);
                }
                s += 1;
            }
        }
    }
}
