//! A judge of our own: a language model whose log-probabilities of "A" and "B" are its verdict.

use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_model::{CausalLm, DeviceBatch, target_logprobs};
use tch::{Device, Kind};

use super::{Pair, PairJudge};
use crate::error::{Error, Result};

/// Asks for a letter, to be read off the next token. `{prompt}`, `{a}` and `{b}` are filled in.
const QUESTION: &str = "\
Two assistants replied to the same request. Which reply serves the person who asked better?

=== Request ===
{prompt}

=== Reply A ===
{a}

=== Reply B ===
{b}

=== End ===
The better reply is reply ";

/// A model and its tokenizer as a judge of pairs.
///
/// The label is p(A)/(p(A) + p(B)) of the next token, averaged over both orders; with letters of several
/// tokens, of the whole letters.
#[derive(Debug)]
pub struct LocalJudge<M> {
    model: M,
    tokenizer: ChatTokenizer,
    question: String,
    letters: [Vec<u32>; 2],
    device: Device,
    micro_tokens: usize,
}

impl<M: CausalLm> LocalJudge<M> {
    /// A judge that runs `model`, which lies on `device`, on at most `micro_tokens` packed tokens at once.
    /// `question` replaces the text that it is asked; what follows it is the letter.
    ///
    /// # Errors
    /// When the question lacks a place, or the letters are no or the same tokens.
    pub fn new(
        model: M,
        tokenizer: ChatTokenizer,
        device: Device,
        micro_tokens: usize,
        question: Option<String>,
    ) -> Result<Self> {
        let question = question.unwrap_or_else(|| QUESTION.into());
        let wrong = |what: &str| Error::Judge { what: what.into() };
        if let Some(place) = ["{prompt}", "{a}", "{b}"]
            .iter()
            .find(|p| !question.contains(**p))
        {
            return Err(wrong(&format!("the judge's question has no {place}")));
        }
        // What the tokenizer puts in front of every text is not part of a letter.
        let before = tokenizer.encode("")?;
        let letter = |text: &str| -> Result<Vec<u32>> {
            let ids = tokenizer.encode(text)?;
            Ok(ids.strip_prefix(before.as_slice()).unwrap_or(&ids).to_vec())
        };
        let letters = [letter("A")?, letter("B")?];
        if letters[0].is_empty() || letters[1].is_empty() || letters[0] == letters[1] {
            return Err(wrong("the tokenizer does not tell \"A\" from \"B\""));
        }
        Ok(Self {
            model,
            tokenizer,
            question,
            letters,
            device,
            micro_tokens,
        })
    }

    fn group(&self, row: usize, pair: Pair<'_>) -> Result<PromptGroup> {
        let text = super::prompts::fill(
            &self.question,
            &[("prompt", pair.prompt), ("a", pair.a), ("b", pair.b)],
        );
        let prompt = if self.tokenizer.has_template() {
            let question = vec![Message::new(Role::User, text)];
            self.tokenizer.prompt_ids(&Text::Messages(question))?
        } else {
            self.tokenizer.encode(&text)?
        };
        let completion = |ids: &Vec<u32>| Completion::whole(ids.clone(), Finish::Length);
        Ok(PromptGroup {
            row: row as u64,
            prompt,
            completions: self.letters.iter().map(completion).collect(),
        })
    }

    /// p(A)/(p(A) + p(B)) of each pair as it stands, one order.
    ///
    /// # Errors
    /// When the tokenizer or the model fails, or a pair is longer than `micro_tokens`.
    pub fn of_a(&self, pairs: &[Pair<'_>]) -> Result<Vec<f64>> {
        let _guard = tch::no_grad_guard();
        let groups: Result<Vec<PromptGroup>> = pairs
            .iter()
            .enumerate()
            .map(|(i, p)| self.group(i, *p))
            .collect();
        let groups = groups?;
        let lengths: Vec<usize> = groups.iter().map(PromptGroup::num_tokens).collect();
        let mut found = Vec::new();
        for range in batches_by_tokens(&lengths, self.micro_tokens)? {
            let batch = DeviceBatch::new(&PackedBatch::pack(&groups[range])?, self.device)?;
            let logprobs = target_logprobs(&self.model, &batch, 1.0, false)?.logprobs;
            let values = Vec::<f64>::try_from(&logprobs.values().to_kind(Kind::Double))?;
            let sums: Vec<f64> = logprobs
                .offsets()
                .host()
                .windows(2)
                .map(|w| values[w[0] as usize..w[1] as usize].iter().sum())
                .collect();
            found.extend(
                sums.chunks_exact(2)
                    .map(|ab| 1.0 / (1.0 + (ab[1] - ab[0]).exp())),
            );
        }
        Ok(found)
    }
}

impl<M: CausalLm + std::fmt::Debug> PairJudge for LocalJudge<M> {
    fn prefers(&self, pairs: &[Pair<'_>]) -> Result<Vec<Option<f64>>> {
        let both: Vec<Pair<'_>> = pairs.iter().flat_map(|p| [*p, p.swapped()]).collect();
        let of_a = self.of_a(&both)?;
        let label = |two: &[f64]| Some(0.5 * (two[0] + 1.0 - two[1]));
        Ok(of_a.chunks_exact(2).map(label).collect())
    }

    fn name(&self) -> &str {
        "judge"
    }
}
