//! Sampling completions: prompts join a running batch, finished sequences leave it.
//!
//! Invariant: what a sequence says depends on its prompt, its key, its sample number and the seed,
//! never on the other sequences of the batch (up to rounding of the matrix products, which differs
//! with the batch's size in the last bits). A prompt is computed once for all of its samples.

use std::collections::VecDeque;

use rlhf_data::group::{Completion, Finish, PromptGroup, SamplerRecord};
use rlhf_data::seed::{Purpose, Stream};
use rlhf_kernels::{AttentionGroup, AttentionLayout};
use tch::{Kind, Tensor};

use crate::decode::{DecodeWeights, KvCache, PromptCache, Window, step, wide};
use crate::error::{Error, Result};
use crate::rope::Angles;
use crate::sampling::{Drawn, Filters, draw, greedy};
use crate::transformer::Transformer;

/// Which log-probabilities a completion carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecordedLogprobs {
    /// Those of the distribution that each token was drawn from: after temperature and filters. A
    /// greedy token is certain, 0.
    #[default]
    Sampled,
    /// Those of the model at temperature 1 without filters.
    Model,
}

/// How to sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Keeps the k likeliest tokens.
    pub top_k: Option<usize>,
    /// Keeps the likeliest tokens that together reach this probability.
    pub top_p: Option<f64>,
    /// Keeps tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f64>,
    /// The longest completion, end-of-sequence token included.
    pub max_new_tokens: usize,
    /// Until a completion has this many tokens it may not end by itself.
    pub min_new_tokens: usize,
    /// Tokens that end a completion; each belongs to it.
    pub eos_ids: Vec<u32>,
    /// The seed of all draws.
    pub seed: u64,
    /// Goes into the completions' records: which policy drew them.
    pub policy_version: u64,
    /// Which log-probabilities to record.
    pub record: RecordedLogprobs,
}

impl Default for SamplingConfig {
    /// Plain sampling at temperature 1, up to 256 tokens, no end-of-sequence token.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            max_new_tokens: 256,
            min_new_tokens: 0,
            eos_ids: Vec::new(),
            seed: 0,
            policy_version: 0,
            record: RecordedLogprobs::Sampled,
        }
    }
}

impl SamplingConfig {
    /// The filters, or `None` for greedy.
    fn filters(&self) -> Result<Option<Filters>> {
        let greedy = self.temperature == 0.0;
        let filters = Filters {
            temperature: if greedy { 1.0 } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
        };
        filters.validate()?;
        if self.max_new_tokens == 0 {
            return Err(Error::Argument("max_new_tokens must be at least 1".into()));
        }
        Ok((!greedy).then_some(filters))
    }
}

/// A prompt to be completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerateRequest {
    /// Its token ids; at least one.
    pub prompt: Vec<u32>,
    /// The key of its noise, usually the row of the data; becomes [`PromptGroup::row`].
    pub prompt_key: u64,
    /// How many completions.
    pub samples: usize,
}

/// How much to compute at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerateLimits {
    /// Sequences that are decoded together.
    pub max_batch_sequences: usize,
    /// Tokens that the key-value cache may hold (rows times columns); fewer sequences run together
    /// when they are long.
    pub max_cache_tokens: usize,
    /// Prompt tokens that are computed together.
    pub max_prefill_tokens: usize,
}

impl Default for GenerateLimits {
    /// 256 sequences, a million cached tokens, 16 Ki prompt tokens.
    fn default() -> Self {
        Self {
            max_batch_sequences: 256,
            max_cache_tokens: 1 << 20,
            max_prefill_tokens: 1 << 14,
        }
    }
}

/// What happens while generating.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum GenerateProgress {
    /// A token was drawn.
    Token {
        /// Index of the request.
        request: usize,
        /// Which of its completions.
        sample: usize,
        /// The token.
        id: u32,
        /// Its recorded log-probability.
        logprob: f32,
    },
    /// Every live sequence got a token.
    Step {
        /// Sequences still running.
        live: usize,
        /// Completions that are done.
        finished: usize,
        /// Completions in all.
        total: usize,
        /// Tokens drawn so far.
        tokens: u64,
    },
}

/// Completes prompts.
///
/// The result has one group a request, in order, each with its `samples` completions. All their
/// tokens are trained; [`Finish::Stop`] completions end with an end-of-sequence token; a completion
/// also ends ([`Finish::Length`]) where the model's context is full.
///
/// # Errors
/// [`Error::Argument`] when a prompt is empty, fills the context, or holds an id outside the
/// vocabulary, or a setting is out of range; [`Error::NonFinite`] when the model gives NaN or
/// infinite logits, naming the request; [`Error::Torch`] when memory does not suffice.
pub fn generate(
    model: &Transformer,
    requests: &[GenerateRequest],
    config: &SamplingConfig,
    limits: &GenerateLimits,
    progress: &mut dyn FnMut(GenerateProgress),
) -> Result<Vec<PromptGroup>> {
    Decoder::new(model).generate(requests, config, limits, progress)
}

/// A model with its weights laid out for decoding, for many calls with the same weights.
#[derive(Debug)]
pub struct Decoder<'m> {
    model: &'m Transformer,
    weights: DecodeWeights,
}

impl<'m> Decoder<'m> {
    /// Lays out the weights (a copy, for all but very large models).
    #[must_use]
    pub fn new(model: &'m Transformer) -> Self {
        Self {
            model,
            weights: DecodeWeights::new(model),
        }
    }

    /// As [`generate`](generate()).
    ///
    /// # Errors
    /// As [`generate`](generate()).
    pub fn generate(
        &self,
        requests: &[GenerateRequest],
        config: &SamplingConfig,
        limits: &GenerateLimits,
        progress: &mut dyn FnMut(GenerateProgress),
    ) -> Result<Vec<PromptGroup>> {
        let _no_grad = tch::no_grad_guard();
        let mut wave = Wave::new(self, requests, config, limits)?;
        wave.run(progress)?;
        Ok(wave.into_groups())
    }
}

/// A running sequence.
#[derive(Debug)]
struct Slot {
    request: usize,
    sample: usize,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    /// Its first column of the cache.
    start: i64,
    done: Option<Finish>,
}

/// A computed prompt that waits for room for its remaining samples.
struct Waiting {
    request: usize,
    next_sample: usize,
    cache: PromptCache,
    /// `[1, V]`.
    logits: Tensor,
}

struct Wave<'a> {
    decoder: &'a Decoder<'a>,
    requests: &'a [GenerateRequest],
    config: &'a SamplingConfig,
    filters: Option<Filters>,
    stream: Stream,
    max_prefill_tokens: usize,
    /// Most completions together.
    capacity: usize,
    cache: KvCache,
    /// Of every position, for each of the trunk's ropes.
    angles: Vec<Angles>,
    columns: Tensor,
    /// Requests not yet computed, longest prompt first.
    pending: VecDeque<usize>,
    waiting: Option<Waiting>,
    slots: Vec<Slot>,
    /// The next column to write.
    now: i64,
    bias: Option<Tensor>,
    done: Vec<Vec<(usize, Completion)>>,
    /// Completions without a row yet.
    unplaced: usize,
    finished: usize,
    total: usize,
    tokens: u64,
}

impl<'a> Wave<'a> {
    fn new(
        decoder: &'a Decoder<'a>,
        requests: &'a [GenerateRequest],
        config: &'a SamplingConfig,
        limits: &GenerateLimits,
    ) -> Result<Self> {
        let filters = config.filters()?;
        let trunk = decoder.model.trunk();
        check(
            requests,
            config,
            limits,
            trunk.config.vocab_size,
            trunk.config.max_position_embeddings,
        )?;
        let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
        let context = trunk.config.max_position_embeddings as usize;
        let new_tokens = config.max_new_tokens.min(context);
        let total: usize = requests.iter().map(|r| r.samples).sum();
        // With later arrivals the timeline runs on; the slack spaces out the shifts back.
        let width = longest + new_tokens;
        let capacity = (limits.max_cache_tokens / width.max(1))
            .clamp(1, limits.max_batch_sequences)
            .min(total.max(1));
        let columns = if capacity < total { width + 64 } else { width };
        let positions =
            Tensor::arange((longest + new_tokens) as i64, (Kind::Int64, trunk.device()));
        let mut pending: Vec<usize> = (0..requests.len())
            .filter(|&r| requests[r].samples > 0)
            .collect();
        // Later prompts then never ask for more columns than the first; the order shows nowhere else.
        pending.sort_by_key(|&r| std::cmp::Reverse(requests[r].prompt.len()));
        Ok(Self {
            decoder,
            requests,
            config,
            filters,
            stream: Stream::new(config.seed, Purpose::Sample),
            max_prefill_tokens: limits.max_prefill_tokens,
            capacity,
            cache: KvCache::new(trunk, capacity as i64, columns as i64)?,
            angles: trunk.angles(&positions),
            columns: Tensor::arange(columns as i64, (Kind::Int64, trunk.device())),
            pending: pending.into(),
            waiting: None,
            slots: Vec::new(),
            now: 0,
            bias: None,
            done: requests.iter().map(|_| Vec::new()).collect(),
            unplaced: total,
            finished: 0,
            total,
            tokens: 0,
        })
    }

    fn run(&mut self, progress: &mut dyn FnMut(GenerateProgress)) -> Result<()> {
        while self.finished < self.total {
            self.compact();
            self.admit(progress)?;
            if self.slots.iter().any(|s| s.done.is_none()) {
                self.advance(progress)?;
            }
            progress(GenerateProgress::Step {
                live: self.slots.iter().filter(|s| s.done.is_none()).count(),
                finished: self.finished,
                total: self.total,
                tokens: self.tokens,
            });
        }
        Ok(())
    }

    /// Removes finished sequences once they are an eighth of the batch, moving rows from its end
    /// into the holes.
    fn compact(&mut self) {
        let dead = self.slots.iter().filter(|s| s.done.is_some()).count();
        if dead == 0 || dead * 8 < self.slots.len() {
            return;
        }
        let (start, end) = (self.window_start(), self.now);
        let live = self.slots.len() - dead;
        let (mut from, mut to) = (Vec::new(), Vec::new());
        let mut hole = 0;
        for row in live..self.slots.len() {
            if self.slots[row].done.is_some() {
                continue;
            }
            while self.slots[hole].done.is_none() {
                hole += 1;
            }
            self.slots.swap(hole, row);
            from.push(row as i64);
            to.push(hole as i64);
        }
        if !from.is_empty() && end > start {
            let device = self.decoder.model.device();
            let upload = |rows: &[i64]| Tensor::from_slice(rows).to_device(device);
            self.cache
                .move_rows(&upload(&from), &upload(&to), start, end);
        }
        self.slots.truncate(live);
        self.refresh_bias();
    }

    /// Lets prompts join while there is room worth the interruption.
    fn admit(&mut self, progress: &mut dyn FnMut(GenerateProgress)) -> Result<()> {
        loop {
            let room = self.capacity - self.slots.len();
            let enough = self.unplaced.min(self.capacity.div_ceil(4));
            if self.unplaced == 0 || (room < enough && !self.slots.is_empty()) {
                return Ok(());
            }
            let prompts = match self.waiting.take() {
                Some(waiting) => waiting.into_prompts(),
                None => self.prefill(room)?,
            };
            self.place(prompts, room, progress)?;
        }
    }

    /// Computes the next prompts: those of at most `room` samples and the token limit, at least one.
    fn prefill(&mut self, room: usize) -> Result<Prompts> {
        let (mut samples, mut ids, mut spans) = (0, Vec::new(), Vec::new());
        while let Some(&request) = self.pending.front() {
            let r = &self.requests[request];
            let fits = ids.len() + r.prompt.len() <= self.max_prefill_tokens;
            let first = spans.is_empty();
            if !first && (!fits || samples >= room) {
                break;
            }
            self.pending.pop_front();
            samples += r.samples;
            let start = ids.len();
            ids.extend(r.prompt.iter().map(|&id| i64::from(id)));
            spans.push(Span {
                request,
                first_sample: 0,
                start,
                length: r.prompt.len(),
            });
        }
        let trunk = self.decoder.model.trunk();
        let upload = |rows: &[i64]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(rows)?.f_to_device(trunk.device())?)
        };
        let positions: Vec<i64> = spans.iter().flat_map(|s| 0..s.length as i64).collect();
        let last: Vec<i64> = spans
            .iter()
            .map(|s| (s.start + s.length) as i64 - 1)
            .collect();
        let groups = spans
            .iter()
            .map(|s| AttentionGroup {
                prompt: s.start as i64..(s.start + s.length) as i64,
                completions: Vec::new(),
            })
            .collect();
        let layout = AttentionLayout::new(groups)?;
        let mut cache = PromptCache::default();
        let hidden = trunk.forward(
            &upload(&ids)?,
            &upload(&positions)?,
            &layout,
            &mut |k, v| {
                cache.keys.push(k.shallow_clone());
                cache.values.push(v.shallow_clone());
            },
        )?;
        let logits = self
            .decoder
            .weights
            .logits(&hidden.index_select(0, &upload(&last)?));
        Ok(Prompts {
            spans,
            cache,
            logits,
        })
    }

    /// Gives rows to as many samples of the prompts as there is room for, and draws their first
    /// tokens. Samples of the last prompt may have to wait.
    fn place(
        &mut self,
        prompts: Prompts,
        room: usize,
        progress: &mut dyn FnMut(GenerateProgress),
    ) -> Result<()> {
        let first = self.slots.len();
        let mut spans_of = Vec::new();
        for (i, span) in prompts.spans.iter().enumerate() {
            let wanted = self.requests[span.request].samples - span.first_sample;
            let taken = wanted.min(room - spans_of.len());
            for k in 0..taken {
                self.slots.push(Slot {
                    request: span.request,
                    sample: span.first_sample + k,
                    ids: Vec::new(),
                    logprobs: Vec::new(),
                    start: 0,
                    done: None,
                });
                spans_of.push(i);
            }
            if taken < wanted {
                // Only the last prompt can be cut: prefill stops once the room is spoken for.
                self.waiting = Some(Waiting {
                    request: span.request,
                    next_sample: span.first_sample + taken,
                    cache: prompts.cache.slice(span.start as i64, span.length as i64),
                    logits: prompts.logits.narrow(0, i as i64, 1).copy(),
                });
            }
        }
        self.unplaced -= spans_of.len();
        let length = prompts.spans.iter().map(|s| s.length).max().unwrap_or(0);
        self.make_room_before(length as i64, first);
        let mut index = Vec::with_capacity(spans_of.len() * length);
        for (slot, &i) in self.slots[first..].iter_mut().zip(&spans_of) {
            let span = &prompts.spans[i];
            slot.start = self.now - span.length as i64;
            // Columns before the sequence's start are masked; any row serves.
            index.extend(std::iter::repeat_n(span.start as i64, length - span.length));
            index.extend((span.start..span.start + span.length).map(|row| row as i64));
        }
        let device = self.decoder.model.device();
        let index = Tensor::f_from_slice(&index)?.f_to_device(device)?;
        let rows = spans_of.len() as i64;
        self.cache
            .place(&prompts.cache, &index, first as i64, rows, self.now);
        self.refresh_bias();
        let of: Vec<i64> = spans_of.iter().map(|&i| i as i64).collect();
        let of = Tensor::f_from_slice(&of)?.f_to_device(device)?;
        self.draw(&prompts.logits.index_select(0, &of), first, progress)
    }

    /// One token more for every row.
    fn advance(&mut self, progress: &mut dyn FnMut(GenerateProgress)) -> Result<()> {
        if self.now == self.cache.columns() {
            self.make_room_before(0, self.slots.len());
        }
        let last = |s: &Slot| i64::from(s.ids.last().copied().unwrap_or(0));
        let ids: Vec<i64> = self.slots.iter().map(last).collect();
        let position = |s: &Slot| (self.requests[s.request].prompt.len() + s.ids.len()) as i64 - 1;
        let positions: Vec<i64> = self.slots.iter().map(position).collect();
        let model = self.decoder.model;
        let upload = |rows: &[i64]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(rows)?.f_to_device(model.device())?)
        };
        let positions = upload(&positions)?;
        let angles: Vec<Angles> = self.angles.iter().map(|a| a.select(&positions)).collect();
        let window = Window {
            rows: self.slots.len() as i64,
            from: self.window_start(),
            now: self.now,
            bias: self.bias.as_ref(),
        };
        let weights = &self.decoder.weights;
        let logits = step(
            model.trunk(),
            weights,
            &self.cache,
            &upload(&ids)?,
            &positions,
            &angles,
            &window,
        )?;
        self.now += 1;
        self.draw(&logits, 0, progress)
    }

    /// Draws a token for the rows from `first` on and brings all of them to the host at once.
    fn draw(
        &mut self,
        logits: &Tensor,
        first: usize,
        progress: &mut dyn FnMut(GenerateProgress),
    ) -> Result<()> {
        let logits = logits.to_kind(wide(logits.kind()));
        // A sum is finite exactly when its terms are: NaN and infinities cannot hide.
        let check = logits.sum_dim_intlist(-1, false, None::<Kind>);
        let drawn = self.choose(&logits, first);
        let logprobs = match self.config.record {
            RecordedLogprobs::Sampled => drawn.logprobs,
            RecordedLogprobs::Model => {
                let chosen = logits
                    .gather(1, &drawn.ids.unsqueeze(1), false)
                    .squeeze_dim(1);
                chosen - logits.logsumexp(-1, false)
            }
        };
        let wide = |t: &Tensor| t.to_kind(Kind::Double);
        let host = Tensor::stack(&[wide(&drawn.ids), wide(&logprobs), wide(&check)], 0).view(-1);
        let host = Vec::<f64>::try_from(host)?;
        let rows = self.slots.len() - first;
        let context = self.decoder.model.config().max_position_embeddings as usize;
        for row in 0..rows {
            let slot = &mut self.slots[first + row];
            if slot.done.is_some() {
                continue;
            }
            let (id, logprob) = (host[row] as u32, host[rows + row] as f32);
            if !(host[2 * rows + row].is_finite() && logprob.is_finite()) {
                return Err(Error::NonFinite {
                    what: format!(
                        "logits for token {} of request {}: the weights hold NaN or infinities, or training diverged",
                        slot.ids.len(),
                        slot.request
                    ),
                });
            }
            slot.ids.push(id);
            slot.logprobs.push(logprob);
            self.tokens += 1;
            progress(GenerateProgress::Token {
                request: slot.request,
                sample: slot.sample,
                id,
                logprob,
            });
            let full = self.requests[slot.request].prompt.len() + slot.ids.len() >= context;
            if self.config.eos_ids.contains(&id) {
                slot.done = Some(Finish::Stop);
            } else if full || slot.ids.len() >= self.config.max_new_tokens {
                slot.done = Some(Finish::Length);
            }
            if let Some(finish) = slot.done {
                self.finished += 1;
                let ids = std::mem::take(&mut slot.ids);
                let mut completion = Completion::whole(ids, finish);
                completion.sampler = Some(SamplerRecord {
                    logprobs: std::mem::take(&mut slot.logprobs),
                    policy_version: self.config.policy_version,
                });
                self.done[slot.request].push((slot.sample, completion));
            }
        }
        Ok(())
    }

    /// Chooses a token a row from wide logits.
    fn choose(&self, logits: &Tensor, first: usize) -> Drawn {
        let slots = &self.slots[first..];
        let device = self.decoder.model.device();
        let held = slots
            .iter()
            .filter(|s| s.ids.len() < self.config.min_new_tokens)
            .count();
        let held_back = (held > 0 && !self.config.eos_ids.is_empty()).then(|| {
            let penalty = |s: &Slot| {
                if s.ids.len() < self.config.min_new_tokens {
                    f64::NEG_INFINITY
                } else {
                    0.0
                }
            };
            let penalties: Vec<f64> = slots.iter().map(penalty).collect();
            let penalties = Tensor::from_slice(&penalties)
                .to_device(device)
                .to_kind(logits.kind());
            let logits = logits.copy();
            for &eos in &self.config.eos_ids {
                let mut column = logits.select(1, i64::from(eos));
                let _ = column.g_add_(&penalties);
            }
            logits
        });
        let logits = held_back.as_ref().unwrap_or(logits);
        let Some(filters) = &self.filters else {
            return greedy(logits);
        };
        let uniform = |s: &Slot| {
            let key = self.requests[s.request].prompt_key;
            self.stream
                .uniform(key, s.sample as u32, s.ids.len() as u32)
        };
        let uniforms: Vec<f64> = slots.iter().map(uniform).collect();
        draw(
            &filters.apply(logits),
            &Tensor::from_slice(&uniforms).to_device(device),
        )
    }

    /// The first column that a running row still needs.
    fn window_start(&self) -> i64 {
        first_column(&self.slots).unwrap_or(self.now)
    }

    /// Shifts the timeline when its end is reached or a prompt of `length` tokens would not fit
    /// before it; `rows` rows hold anything.
    fn make_room_before(&mut self, length: i64, rows: usize) {
        if rows == 0 {
            self.now = length;
            return;
        }
        let start = first_column(&self.slots[..rows]).unwrap_or(self.now);
        let width = self.now - start;
        let full = self.now == self.cache.columns();
        if self.now >= length && !full {
            return;
        }
        let now = width.max(length);
        self.cache.shift(rows as i64, start, self.now, now);
        let by = now - self.now;
        for slot in &mut self.slots[..rows] {
            slot.start += by;
        }
        self.now = now;
        self.refresh_bias();
    }

    /// Rebuilds the mask of columns before each row's start.
    fn refresh_bias(&mut self) {
        let from = self.window_start();
        self.bias = self.slots.iter().any(|s| s.start != from).then(|| {
            let model = self.decoder.model;
            let starts: Vec<i64> = self.slots.iter().map(|s| s.start).collect();
            let starts = Tensor::from_slice(&starts)
                .to_device(model.device())
                .unsqueeze(1);
            let before = self.columns.unsqueeze(0).lt_tensor(&starts);
            let zeros = Tensor::zeros(before.size(), (model.kind(), model.device()));
            zeros
                .masked_fill(&before, f64::NEG_INFINITY)
                .unsqueeze(1)
                .unsqueeze(1)
        });
    }

    fn into_groups(self) -> Vec<PromptGroup> {
        self.requests
            .iter()
            .zip(self.done)
            .map(|(request, mut done)| {
                done.sort_by_key(|(sample, _)| *sample);
                PromptGroup {
                    row: request.prompt_key,
                    prompt: request.prompt.clone(),
                    completions: done.into_iter().map(|(_, c)| c).collect(),
                }
            })
            .collect()
    }
}

/// The first column that a running sequence among `slots` owns.
fn first_column(slots: &[Slot]) -> Option<i64> {
    slots
        .iter()
        .filter(|s| s.done.is_none())
        .map(|s| s.start)
        .min()
}

/// A prompt within packed rows.
struct Span {
    request: usize,
    first_sample: usize,
    start: usize,
    length: usize,
}

/// Computed prompts.
struct Prompts {
    spans: Vec<Span>,
    cache: PromptCache,
    /// `[prompts, V]`, after the last token of each.
    logits: Tensor,
}

impl Waiting {
    fn into_prompts(self) -> Prompts {
        let length = self.cache.keys.first().map_or(0, |k| k.size()[0] as usize);
        Prompts {
            spans: vec![Span {
                request: self.request,
                first_sample: self.next_sample,
                start: 0,
                length,
            }],
            cache: self.cache,
            logits: self.logits,
        }
    }
}

/// Refuses what cannot be generated, before anything is computed.
fn check(
    requests: &[GenerateRequest],
    config: &SamplingConfig,
    limits: &GenerateLimits,
    vocab: i64,
    context: i64,
) -> Result<()> {
    if limits.max_batch_sequences == 0 {
        return Err(Error::Argument(
            "max_batch_sequences must be at least 1".into(),
        ));
    }
    if let Some(id) = config.eos_ids.iter().find(|&&id| i64::from(id) >= vocab) {
        return Err(Error::Argument(format!(
            "end-of-sequence token {id} is outside the model's vocabulary of {vocab}"
        )));
    }
    for (i, r) in requests.iter().enumerate() {
        let bad = |what: String| Err(Error::Argument(format!("request {i}: {what}")));
        if r.prompt.is_empty() {
            return bad(
                "the prompt is empty; give it at least a beginning-of-sequence token".into(),
            );
        }
        if r.prompt.len() as i64 >= context {
            return bad(format!(
                "the prompt has {} tokens, the model's context holds {context}; shorten it",
                r.prompt.len()
            ));
        }
        if let Some(id) = r.prompt.iter().find(|&&id| i64::from(id) >= vocab) {
            return bad(format!(
                "token id {id} is outside the model's vocabulary of {vocab}; tokenizer and model do not belong together"
            ));
        }
        if u32::try_from(r.samples).is_err() {
            return bad(format!("{} samples", r.samples));
        }
    }
    Ok(())
}
