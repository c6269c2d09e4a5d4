//! A language model that is a table: the exact oracle behind tests that enumerate.
//!
//! The state after a non-empty sequence of tokens has an index of its own, so the table can say any
//! distribution over sequences up to a length. The hidden state is the one-hot vector of the state's
//! index and the head is the table itself, `[V, H]` with H the number of states: logits of the next
//! token are a column of it. A gradient of a loss with respect to the table is thus the gradient
//! with respect to every conditional distribution, which enumeration can check.

use tch::{Device, Kind, Tensor};

use crate::batch::DeviceBatch;
use crate::causal_lm::CausalLm;
use crate::error::{Error, Result};

/// No table gets more states than this.
const MAX_STATES: i64 = 1 << 20;

/// A table of next-token logits for every sequence of 1 to `max_len` tokens.
#[derive(Debug)]
pub struct TabularLm {
    table: Tensor,
    vocab: i64,
    max_len: usize,
}

impl TabularLm {
    /// The number of states of a table: V + V² + … + V^`max_len`; `None` beyond a million.
    #[must_use]
    pub fn num_states(vocab: i64, max_len: usize) -> Option<i64> {
        let mut total = 0_i64;
        let mut level = 1_i64;
        for _ in 0..max_len {
            level = level.checked_mul(vocab)?;
            total = total.checked_add(level).filter(|&t| t <= MAX_STATES)?;
        }
        Some(total)
    }

    /// Uses a table of logits `[V, states]` (f32 or f64), where states is [`TabularLm::num_states`].
    /// The table becomes the model's only parameter and requires gradients.
    ///
    /// # Errors
    /// [`Error::Shape`] when the table has another shape.
    pub fn new(table: &Tensor, max_len: usize) -> Result<Self> {
        let size = table.size();
        let bad = || Error::Shape {
            op: "TabularLm",
            expected: format!("[V, V + … + V^{max_len}]"),
            found: table.size(),
        };
        let &[vocab, states] = size.as_slice() else {
            return Err(bad());
        };
        if vocab < 1 || Self::num_states(vocab, max_len) != Some(states) {
            return Err(bad());
        }
        Ok(Self {
            table: table.detach().copy().set_requires_grad(true),
            vocab,
            max_len,
        })
    }

    /// A table of zeros: every next token equally likely.
    ///
    /// # Errors
    /// [`Error::Argument`] when the table would be too large.
    pub fn uniform(vocab: i64, max_len: usize, kind: Kind) -> Result<Self> {
        let states = Self::num_states(vocab, max_len)
            .filter(|_| vocab > 0)
            .ok_or_else(|| {
                Error::Argument(format!(
                    "{vocab} tokens to the length {max_len} are too many states"
                ))
            })?;
        Self::new(
            &Tensor::zeros([vocab, states], (kind, Device::Cpu)),
            max_len,
        )
    }

    /// The index of the state after `tokens`: sequences in order of length, then as numbers in base
    /// V.
    ///
    /// # Errors
    /// [`Error::Argument`] when the sequence is empty or too long, or a token is no token.
    pub fn state(&self, tokens: &[i64]) -> Result<i64> {
        if tokens.is_empty() || tokens.len() > self.max_len {
            return Err(Error::Argument(format!(
                "a sequence of {} tokens has no state (1 to {})",
                tokens.len(),
                self.max_len
            )));
        }
        if let Some(t) = tokens.iter().find(|t| !(0..self.vocab).contains(*t)) {
            return Err(Error::Argument(format!(
                "token id {t} is outside 0..{}",
                self.vocab
            )));
        }
        let shorter = Self::num_states(self.vocab, tokens.len() - 1).unwrap_or(0);
        Ok(shorter + tokens.iter().fold(0, |n, t| n * self.vocab + t))
    }

    /// The logits `[V]` of the token after `tokens`.
    ///
    /// # Errors
    /// As [`TabularLm::state`].
    pub fn logits(&self, tokens: &[i64]) -> Result<Tensor> {
        Ok(self.table.select(1, self.state(tokens)?))
    }

    /// The table `[V, states]` itself.
    pub fn table(&self) -> &Tensor {
        &self.table
    }
}

impl CausalLm for TabularLm {
    fn hidden(&self, batch: &DeviceBatch) -> Result<Tensor> {
        let ids = Vec::<i64>::try_from(batch.token_ids.to_device(Device::Cpu))?;
        let mut states = vec![0_i64; ids.len()];
        let rows = |r: &std::ops::Range<i64>| r.start as usize..r.end as usize;
        for group in batch.layout.groups() {
            let prompt = &ids[rows(&group.prompt)];
            for (i, state) in states[rows(&group.prompt)].iter_mut().enumerate() {
                *state = self.state(&prompt[..=i])?;
            }
            for completion in &group.completions {
                let mut seen = prompt.to_vec();
                for row in rows(completion) {
                    seen.push(ids[row]);
                    // The last token of a sequence of full length predicts nothing: any state does.
                    states[row] = if seen.len() > self.max_len {
                        0
                    } else {
                        self.state(&seen)?
                    };
                }
            }
        }
        let one_hot = Tensor::from_slice(&states).one_hot(self.table.size()[1]);
        Ok(one_hot
            .to_kind(self.table.kind())
            .to_device(self.table.device()))
    }

    fn lm_head(&self) -> Tensor {
        self.table.shallow_clone()
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("table".to_owned(), self.table.shallow_clone())]
    }
}
