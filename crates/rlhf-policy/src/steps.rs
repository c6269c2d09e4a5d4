//! A reward model that judges the steps of a completion (process supervision).

use rlhf_data::group::PromptGroup;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_model::ScalarModel;
use rlhf_reward::source::Judged;
use tch::{Device, Kind};

use crate::error::Result;
use crate::learner::{micro_batches, scatter};
use crate::rollout::{StepRewards, StepSource};

/// The number that a reward model gives at the last token of each step, times a weight: a step reward as in process
/// supervision (Lightman et al. 2023, arXiv 2305.20050; Shao et al. 2024, section 4.1.3).
///
/// A step ends with a token whose text ends with one of `ends`, and with the completion.
#[derive(Debug)]
pub struct ModelSteps<'a> {
    /// For messages.
    pub name: String,
    /// The reward model.
    pub model: &'a ScalarModel,
    /// Knows where steps end.
    pub tokenizer: &'a ChatTokenizer,
    /// Texts that end a step, such as a line break.
    pub ends: Vec<String>,
    /// What the model's number is multiplied by.
    pub weight: f64,
    /// Packed tokens a batch.
    pub micro_tokens: usize,
}

impl StepSource for ModelSteps<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn steps(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<StepRewards>>> {
        let _guard = tch::no_grad_guard();
        // Every token is looked at, trained or not.
        let whole = |group: &PromptGroup| {
            let mut group = group.clone();
            for c in &mut group.completions {
                c.trained.clear();
                c.trained.push(0..c.ids.len());
            }
            group
        };
        let groups: Vec<PromptGroup> = items.iter().map(|i| whole(i.group)).collect();
        let groups: Vec<&PromptGroup> = groups.iter().collect();
        let (mut before, mut last) = (Vec::new(), Vec::new());
        for micro in micro_batches(&groups, self.micro_tokens)? {
            let batch = micro.pack(&groups, self.model.device())?;
            before.extend(scatter(&self.model.values(&batch)?)?);
            let scores = self.model.scores(&batch)?.to_kind(Kind::Double);
            last.extend(Vec::<f64>::try_from(&scores.to_device(Device::Cpu))?);
        }
        let mut all = before.iter().zip(&last);
        let of = |ids: &[u32], (values, last): (&Vec<f64>, &f64)| -> StepRewards {
            // What precedes token t + 1 is what ends with token t.
            let after = |t: usize| values.get(t + 1).unwrap_or(last) * self.weight;
            let pieces = self.tokenizer.pieces(ids);
            let ends = |(t, piece): &(usize, &String)| {
                t + 1 == ids.len() || self.ends.iter().any(|e| piece.ends_with(e.as_str()))
            };
            let places = pieces.iter().enumerate().filter(ends);
            places.map(|(t, _)| (t, after(t))).collect()
        };
        Ok(groups
            .iter()
            .map(|g| {
                let own = g.completions.iter().zip(all.by_ref());
                own.map(|(c, facts)| of(&c.ids, facts)).collect()
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rlhf_data::group::{Completion, Finish};
    use rlhf_data::pack::PackedBatch;
    use rlhf_model::{Config, DeviceBatch, Transformer};

    use super::*;

    /// A step's number is the score of the completion that ends there.
    #[test]
    fn a_step_has_the_score_of_what_ends_with_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let tokenizer = ChatTokenizer::load(&root.join("datasets/help/tokenizer")).unwrap();
        let vocab = tokenizer.vocab_size() as i64;
        let trunk = Transformer::init(
            Config::new(vocab, 16, 1, 2, 64),
            3,
            Device::Cpu,
            Kind::Double,
        );
        let model = ScalarModel::from_trunk(trunk.unwrap(), 4).unwrap();
        let whole = |ids: &[u32]| Completion::whole(ids.to_vec(), Finish::Stop);
        let ids: Vec<u32> = (40..46).collect();
        let end = tokenizer.pieces(&ids)[2].clone();
        let source = ModelSteps {
            name: "rm".into(),
            model: &model,
            tokenizer: &tokenizer,
            ends: vec![end.clone()],
            weight: 2.0,
            micro_tokens: 20,
        };
        let group = |completions: Vec<Completion>| PromptGroup {
            row: 0,
            prompt: vec![7, 8, 9],
            completions,
        };
        let judged = group(vec![whole(&ids), whole(&ids[..2])]);
        let fields = serde_json::Map::new();
        let item = Judged {
            group: &judged,
            prompt: "",
            texts: &[],
            fields: &fields,
        };
        let steps = source.steps(&[item, item]).unwrap();
        assert_eq!(steps[0], steps[1]);
        let ends = |n: usize| -> Vec<usize> {
            let pieces = tokenizer.pieces(&ids[..n]);
            (0..n)
                .filter(|t| t + 1 == n || pieces[*t].ends_with(&end))
                .collect()
        };
        for (got, n) in steps[0].iter().zip([6, 2]) {
            let places: Vec<usize> = got.iter().map(|s| s.0).collect();
            assert_eq!(places, ends(n));
            assert!(places.contains(&(n - 1)));
            for (t, reward) in got {
                let alone = group(vec![whole(&ids[..=*t])]);
                let packed = PackedBatch::pack(&[alone]).unwrap();
                let batch = DeviceBatch::new(&packed, Device::Cpu).unwrap();
                let score = model.scores(&batch).unwrap().double_value(&[0]);
                assert!((reward - 2.0 * score).abs() < 1e-9);
            }
        }
    }
}
