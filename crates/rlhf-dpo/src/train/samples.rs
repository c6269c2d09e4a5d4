//! What the policy says to held-out prompts while it learns.

use std::path::Path;

use rlhf_data::group::PromptGroup;
use rlhf_data::source::JsonlOut;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_model::{Decoder, GenerateLimits, GenerateRequest, SamplingConfig, Transformer};
use serde::Serialize;

use crate::error::Result;

/// Prompts to be answered at every look at held-out rows, each time in a file of its own,
/// `samples-000020.jsonl` after step 20: one line a prompt with its `row`, `prompt` and greedy `completion`.
#[derive(Clone, Copy, Debug)]
pub struct Samples<'a> {
    /// The prompts; their completions are not looked at.
    pub groups: &'a [PromptGroup],
    /// What makes text of tokens.
    pub tokenizer: &'a ChatTokenizer,
    /// Longest answer in tokens.
    pub max_new_tokens: usize,
    /// The folder of the files.
    pub dir: &'a Path,
}

#[derive(Serialize)]
struct Line {
    row: u64,
    prompt: String,
    completion: String,
}

impl Samples<'_> {
    pub(super) fn write(&self, model: &Transformer, steps: u64) -> Result<()> {
        // An empty prompt cannot be answered.
        let groups: Vec<&PromptGroup> = self
            .groups
            .iter()
            .filter(|g| !g.prompt.is_empty())
            .collect();
        let requests: Vec<GenerateRequest> = groups
            .iter()
            .map(|g| GenerateRequest {
                prompt: g.prompt.clone(),
                prompt_key: g.row,
                samples: 1,
                max_new_tokens: None,
            })
            .collect();
        let greedy = SamplingConfig {
            temperature: 0.0,
            max_new_tokens: self.max_new_tokens,
            eos_ids: self.tokenizer.eos_ids().to_vec(),
            ..SamplingConfig::default()
        };
        let decoder = Decoder::new(model)?;
        let answers =
            decoder.generate(&requests, &greedy, &GenerateLimits::default(), &mut |_| {})?;
        let mut file = JsonlOut::create(&self.dir.join(format!("samples-{steps:06}.jsonl")))?;
        for answer in &answers {
            file.write(&Line {
                row: answer.row,
                prompt: self.tokenizer.decode(&answer.prompt, false)?,
                completion: self.tokenizer.decode(&answer.completions[0].ids, false)?,
            })?;
        }
        Ok(file.finish()?)
    }
}
