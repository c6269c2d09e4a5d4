//! The running batch: who joins, who leaves, and a token for everybody between.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use rlhf_data::group::{Completion, Finish, PromptGroup, SamplerRecord};
use rlhf_data::seed::{Purpose, Stream};
use rlhf_kernels::{AttentionGroup, AttentionLayout};
use tch::{Device, Kind, Tensor};

use super::settings::check;
use super::{
    Decoder, GenerateLimits, GenerateProgress, GenerateRequest, RecordedLogprobs, SamplingConfig,
    StopStrings,
};
use crate::decode::{DecodeWeights, KvCache, PromptCache, Window, prompts, step, wide};
use crate::error::{Error, Result};
use crate::rope::Angles;
use crate::sampling::{Drawn, Filters, draw, greedy};
use crate::trunk::Trunk;

/// Tokens with their log-probabilities, likeliest first.
type Likeliest = Vec<(u32, f32)>;

/// A running sequence.
#[derive(Debug)]
struct Slot {
    request: usize,
    sample: usize,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    top: Vec<Likeliest>,
    /// How often prompt (not counted: 0) and completion hold each token; kept only for penalties.
    held: BTreeMap<u32, u32>,
    /// Its longest completion.
    limit: usize,
    /// Its first column of the cache.
    start: i64,
    /// Its prompt, one for each part, where prompts are shared.
    prompt: Option<Rc<Vec<PromptCache>>>,
    done: Option<Finish>,
}

/// A computed prompt that waits for room for its remaining samples.
struct Waiting {
    request: usize,
    next_sample: usize,
    caches: Rc<Vec<PromptCache>>,
    /// `[1, V]`.
    logits: Tensor,
}

/// A model whose logits are what is drawn from, or are mixed into it.
struct Part<'a> {
    trunk: &'a Trunk,
    weights: &'a DecodeWeights,
    /// The factor of its logits.
    share: f64,
    cache: KvCache,
    /// Of every position, for each of the trunk's ropes.
    angles: Vec<Angles>,
}

pub(super) struct Wave<'a> {
    decoder: &'a Decoder<'a>,
    requests: &'a [GenerateRequest],
    config: &'a SamplingConfig,
    filters: Option<Filters>,
    stream: Stream,
    max_prefill_tokens: usize,
    /// Whether all samples of a prompt read its keys and values in one place.
    shares: bool,
    /// Most completions together.
    capacity: usize,
    /// The decoder's model, and another one where there is one.
    parts: Vec<Part<'a>>,
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
    pub(super) fn new(
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
        let asked = |r: &GenerateRequest| r.max_new_tokens.unwrap_or(usize::MAX);
        let new_tokens = requests.iter().map(asked).max().unwrap_or(0);
        let new_tokens = new_tokens.min(config.max_new_tokens).min(context);
        let total: usize = requests.iter().map(|r| r.samples).sum();
        // With later arrivals the timeline runs on; the slack spaces out the shifts back.
        let width = longest + new_tokens;
        let capacity = (limits.max_cache_tokens / width.max(1))
            .clamp(1, limits.max_batch_sequences)
            .min(total.max(1));
        let shares = decoder
            .parts()
            .all(|(model, ..)| model.kind() == Kind::Float && model.device() == Device::Cpu);
        let columns = if shares { new_tokens } else { width };
        let columns = if capacity < total {
            columns + 64
        } else {
            columns
        };
        let positions =
            Tensor::arange((longest + new_tokens) as i64, (Kind::Int64, trunk.device()));
        let mut pending: Vec<usize> = (0..requests.len())
            .filter(|&r| requests[r].samples > 0)
            .collect();
        // Later prompts then never ask for more columns than the first; the order shows nowhere else.
        pending.sort_by_key(|&r| std::cmp::Reverse(requests[r].prompt.len()));
        let parts = decoder.parts().map(|(model, weights, share)| {
            let trunk = model.trunk();
            Ok(Part {
                trunk,
                weights,
                share,
                cache: KvCache::new(trunk, capacity as i64, columns as i64)?,
                angles: trunk.angles(&positions),
            })
        });
        Ok(Self {
            parts: parts.collect::<Result<_>>()?,
            decoder,
            requests,
            config,
            filters,
            stream: Stream::new(config.seed, Purpose::Sample),
            max_prefill_tokens: limits.max_prefill_tokens,
            shares,
            capacity,
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

    pub(super) fn run(&mut self, progress: &mut dyn FnMut(GenerateProgress)) -> Result<()> {
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
            let (from, to) = (upload(&from), upload(&to));
            for part in &self.parts {
                part.cache.move_rows(&from, &to, start, end);
            }
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
                Some(waiting) => waiting.into_prompts(self.shares),
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
        let (ids, positions, last) = (upload(&ids)?, upload(&positions)?, upload(&last)?);
        let mut caches = Vec::with_capacity(self.parts.len());
        let logits = self.mixed(|part| {
            let (hidden, cache) = prompts(part.trunk, part.weights, &ids, &positions, &layout)?;
            caches.push(cache);
            part.weights.logits(&hidden.index_select(0, &last))
        })?;
        let caches = if self.shares {
            let one = |s: &Span| {
                let part = |c: &PromptCache| c.shared(s.start as i64, s.length as i64);
                Rc::new(caches.iter().map(part).collect())
            };
            Computed::Shared(spans.iter().map(one).collect())
        } else {
            Computed::Packed(Rc::new(caches))
        };
        Ok(Prompts {
            spans,
            caches,
            logits,
        })
    }

    /// Σ share · logits of the parts: of two models the logits of the normalised π₁^share₁ π₂^share₂.
    fn mixed(&self, mut logits: impl FnMut(&Part<'a>) -> Result<Tensor>) -> Result<Tensor> {
        let (first, rest) = self.parts.split_at(1);
        let of = logits(&first[0])?;
        if rest.is_empty() {
            return Ok(of);
        }
        let mut sum = of.to_kind(wide(of.kind())) * first[0].share;
        for part in rest {
            let of = logits(part)?;
            sum += of.to_kind(wide(of.kind())) * part.share;
        }
        Ok(sum)
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
                    top: Vec::new(),
                    held: self.held(span.request),
                    limit: self.limit(span.request),
                    start: 0,
                    prompt: prompts.caches.shared(i),
                    done: None,
                });
                spans_of.push(i);
            }
            if taken < wanted {
                // Only the last prompt can be cut: prefill stops once the room is spoken for.
                self.waiting = Some(Waiting {
                    request: span.request,
                    next_sample: span.first_sample + taken,
                    caches: prompts.caches.of(i, span),
                    logits: prompts.logits.narrow(0, i as i64, 1).copy(),
                });
            }
        }
        self.unplaced -= spans_of.len();
        match &prompts.caches {
            Computed::Shared(_) => {
                self.make_room_before(0, first);
                for slot in &mut self.slots[first..] {
                    slot.start = self.now;
                }
            }
            Computed::Packed(caches) => self.copy_in(&prompts.spans, caches, first, &spans_of)?,
        }
        self.refresh_bias();
        let of: Vec<i64> = spans_of.iter().map(|&i| i as i64).collect();
        let device = self.decoder.model.device();
        let of = Tensor::f_from_slice(&of)?.f_to_device(device)?;
        self.draw(&prompts.logits.index_select(0, &of), first, progress)
    }

    /// Copies packed prompts before the columns of the rows from `first` on; `spans_of` names each row's.
    fn copy_in(
        &mut self,
        spans: &[Span],
        caches: &[PromptCache],
        first: usize,
        spans_of: &[usize],
    ) -> Result<()> {
        let length = spans.iter().map(|s| s.length).max().unwrap_or(0);
        self.make_room_before(length as i64, first);
        let mut index = Vec::with_capacity(spans_of.len() * length);
        for (slot, &i) in self.slots[first..].iter_mut().zip(spans_of) {
            let span = &spans[i];
            slot.start = self.now - span.length as i64;
            // Columns before the sequence's start are masked; any row serves.
            index.extend(std::iter::repeat_n(span.start as i64, length - span.length));
            index.extend((span.start..span.start + span.length).map(|row| row as i64));
        }
        let index = Tensor::f_from_slice(&index)?.f_to_device(self.decoder.model.device())?;
        let rows = spans_of.len() as i64;
        for (part, cache) in self.parts.iter().zip(caches) {
            part.cache
                .place(cache, &index, first as i64, rows, self.now);
        }
        Ok(())
    }

    /// One token more for every row.
    fn advance(&mut self, progress: &mut dyn FnMut(GenerateProgress)) -> Result<()> {
        if self.now == self.columns.size()[0] {
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
        let (ids, positions) = (upload(&ids)?, upload(&positions)?);
        // A finished row sees itself alone: nobody reads what it says.
        let start = |s: &Slot| if s.done.is_some() { self.now } else { s.start };
        let starts: Vec<i64> = self.slots.iter().map(start).collect();
        let (from, bias) = (self.window_start(), self.bias.as_ref());
        let mut number = 0;
        let logits = self.mixed(|part| {
            let angles: Vec<Angles> = part.angles.iter().map(|a| a.select(&positions)).collect();
            // A finished row has no prompt any more.
            let mut prompts: Vec<Option<&PromptCache>> = Vec::new();
            for slot in self.slots.iter().filter(|_| self.shares) {
                prompts.push(slot.prompt.as_ref().map(|parts| &parts[number]));
            }
            number += 1;
            let window = Window {
                starts: &starts,
                prompts: &prompts,
                from,
                now: self.now,
                bias,
            };
            step(
                part.trunk,
                part.weights,
                &part.cache,
                &ids,
                &positions,
                &angles,
                &window,
            )
        })?;
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
        let (drawn, scores) = self.choose(&logits, first)?;
        // A sum is finite exactly when its terms are: NaN and infinities cannot hide.
        let check = match &drawn.sums {
            Some(sums) if scores.data_ptr() == logits.data_ptr() => sums.shallow_clone(),
            _ => logits.sum_dim_intlist(-1, false, None::<Kind>),
        };
        let top = self.top(match self.config.record {
            RecordedLogprobs::Sampled => &scores,
            RecordedLogprobs::Model => &logits,
        })?;
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
            if let Some(top) = &top {
                slot.top.push(top[row].clone());
            }
            if self.config.penalises() {
                *slot.held.entry(id).or_insert(0) += 1;
            }
            self.tokens += 1;
            progress(GenerateProgress::Token {
                request: slot.request,
                sample: slot.sample,
                id,
                logprob,
            });
            let full = self.requests[slot.request].prompt.len() + slot.ids.len() >= context;
            let said = |stop: &StopStrings<'_>| {
                slot.ids.len() > self.config.min_new_tokens && stop.hit(&slot.ids)
            };
            if self.config.eos_ids.contains(&id) || self.decoder.stop.as_ref().is_some_and(said) {
                slot.done = Some(Finish::Stop);
            } else if full || slot.ids.len() >= slot.limit {
                slot.done = Some(Finish::Length);
            }
            if let Some(finish) = slot.done {
                self.finished += 1;
                slot.prompt = None;
                let ids = std::mem::take(&mut slot.ids);
                let mut completion = Completion::whole(ids, finish);
                completion.sampler = Some(SamplerRecord {
                    logprobs: std::mem::take(&mut slot.logprobs),
                    policy_version: self.config.policy_version,
                    top: std::mem::take(&mut slot.top),
                });
                self.done[slot.request].push((slot.sample, completion));
            }
        }
        Ok(())
    }

    /// Chooses a token a row from wide logits; beside it the scores that it was chosen by.
    fn choose(&self, logits: &Tensor, first: usize) -> Result<(Drawn, Tensor)> {
        let slots = &self.slots[first..];
        let adjusted = self.adjust(logits, slots);
        let Some(filters) = &self.filters else {
            return Ok((greedy(&adjusted), adjusted));
        };
        let uniform = |s: &Slot| {
            let key = self.requests[s.request].prompt_key;
            self.stream
                .uniform(key, s.sample as u32, s.ids.len() as u32)
        };
        let uniforms: Vec<f64> = slots.iter().map(uniform).collect();
        let scores = filters.apply(&adjusted);
        Ok((draw(&scores, &uniforms)?, scores))
    }

    /// Logits after penalties and biases, and without end-of-sequence tokens where a completion may
    /// not end yet.
    fn adjust(&self, logits: &Tensor, slots: &[Slot]) -> Tensor {
        let c = self.config;
        let mut logits = logits.shallow_clone();
        if c.penalises() {
            let held: Vec<&BTreeMap<u32, u32>> = slots.iter().map(|s| &s.held).collect();
            logits = penalised(&logits, &held, c);
        }
        for &(id, by) in &c.logit_bias {
            logits = logits.index_add(
                1,
                &Tensor::from_slice(&[i64::from(id)]).to_device(logits.device()),
                &Tensor::full([logits.size()[0], 1], by, (logits.kind(), logits.device())),
            );
        }
        let held_back = |s: &Slot| s.ids.len() < c.min_new_tokens;
        if c.eos_ids.is_empty() || !slots.iter().any(held_back) {
            return logits;
        }
        let penalty = |s: &Slot| if held_back(s) { f64::NEG_INFINITY } else { 0.0 };
        let penalties: Vec<f64> = slots.iter().map(penalty).collect();
        let penalties = Tensor::from_slice(&penalties)
            .to_device(logits.device())
            .to_kind(logits.kind());
        let logits = logits.copy();
        for &eos in &c.eos_ids {
            let mut column = logits.select(1, i64::from(eos));
            let _ = column.g_add_(&penalties);
        }
        logits
    }

    /// The likeliest tokens of every row, where they are recorded.
    fn top(&self, scores: &Tensor) -> Result<Option<Vec<Likeliest>>> {
        let k = (self.config.top_logprobs as i64).min(scores.size()[1]);
        if k == 0 {
            return Ok(None);
        }
        let (logprobs, ids) = scores.log_softmax(-1, None::<Kind>).topk(k, -1, true, true);
        let ids = Vec::<i64>::try_from(ids.view(-1))?;
        let logprobs = Vec::<f64>::try_from(logprobs.to_kind(Kind::Double).view(-1))?;
        let pairs: Vec<(u32, f32)> = ids
            .into_iter()
            .zip(logprobs)
            .map(|(id, lp)| (id as u32, lp as f32))
            .collect();
        let possible = |row: &[(u32, f32)]| {
            row.iter()
                .copied()
                .filter(|(_, lp)| lp.is_finite())
                .collect()
        };
        Ok(Some(pairs.chunks(k as usize).map(possible).collect()))
    }

    /// What penalties count of a prompt.
    fn held(&self, request: usize) -> BTreeMap<u32, u32> {
        if self.config.penalises() {
            self.requests[request]
                .prompt
                .iter()
                .map(|&id| (id, 0))
                .collect()
        } else {
            BTreeMap::new()
        }
    }

    /// The longest completion of a request.
    fn limit(&self, request: usize) -> usize {
        let own = self.requests[request].max_new_tokens;
        own.unwrap_or(usize::MAX).min(self.config.max_new_tokens)
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
        let full = self.now == self.columns.size()[0];
        if self.now >= length && !full {
            return;
        }
        let now = width.max(length);
        for part in &self.parts {
            part.cache.shift(rows as i64, start, self.now, now);
        }
        let by = now - self.now;
        for slot in &mut self.slots[..rows] {
            slot.start += by;
        }
        self.now = now;
        self.refresh_bias();
    }

    /// Rebuilds the mask of columns before each row's start.
    fn refresh_bias(&mut self) {
        if self.shares {
            // The kernel knows each row's start.
            return;
        }
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

    pub(super) fn into_groups(self) -> Vec<PromptGroup> {
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
    caches: Computed,
    /// `[prompts, V]`, after the last token of each.
    logits: Tensor,
}

/// Keys and values of prompts, one for each part.
enum Computed {
    /// Of each prompt, where all its samples read them.
    Shared(Vec<Rc<Vec<PromptCache>>>),
    /// Of all together, to be copied.
    Packed(Rc<Vec<PromptCache>>),
}

impl Computed {
    /// What the samples of prompt `i` share.
    fn shared(&self, i: usize) -> Option<Rc<Vec<PromptCache>>> {
        match self {
            Self::Shared(each) => Some(Rc::clone(&each[i])),
            Self::Packed(_) => None,
        }
    }

    /// Prompt `i` alone.
    fn of(&self, i: usize, span: &Span) -> Rc<Vec<PromptCache>> {
        match self {
            Self::Shared(each) => Rc::clone(&each[i]),
            Self::Packed(all) => {
                let one = |c: &PromptCache| c.slice(span.start as i64, span.length as i64);
                Rc::new(all.iter().map(one).collect())
            }
        }
    }
}

impl Waiting {
    fn into_prompts(self, shares: bool) -> Prompts {
        // Keys are `[Hkv, N, D]` where they are shared, else `[N, Hkv, D]`.
        let keys = self.caches.first().and_then(|c| c.keys.first());
        let length = keys.map_or(0, |k| k.size()[usize::from(shares)] as usize);
        Prompts {
            spans: vec![Span {
                request: self.request,
                first_sample: self.next_sample,
                start: 0,
                length,
            }],
            caches: if shares {
                Computed::Shared(vec![self.caches])
            } else {
                Computed::Packed(self.caches)
            },
            logits: self.logits,
        }
    }
}

/// Logits `[B, V]` after the penalties for what each row holds: its tokens with how often the
/// completion has them (0 for those of the prompt only).
fn penalised(logits: &Tensor, held: &[&BTreeMap<u32, u32>], c: &SamplingConfig) -> Tensor {
    let width = held.iter().map(|h| h.len()).max().unwrap_or(0).max(1);
    let (mut ids, mut by) = (Vec::new(), Vec::new());
    for row in held {
        let one = |(&id, &n): (&u32, &u32)| {
            let presence = if n > 0 { c.presence_penalty } else { 0.0 };
            (i64::from(id), presence + c.frequency_penalty * f64::from(n))
        };
        // A row with fewer tokens repeats one of its own, to the same effect; prompts are not empty.
        let fill = row.iter().next().map_or((0, 0.0), one);
        let pairs = row
            .iter()
            .map(one)
            .chain(std::iter::repeat(fill))
            .take(width);
        for (id, penalty) in pairs {
            ids.push(id);
            by.push(penalty);
        }
    }
    let size = [held.len() as i64, width as i64];
    let ids = Tensor::from_slice(&ids)
        .view(size)
        .to_device(logits.device());
    let by = Tensor::from_slice(&by)
        .view(size)
        .to_device(logits.device())
        .to_kind(logits.kind());
    let now = logits.gather(1, &ids, false);
    let repeated =
        (&now / c.repetition_penalty).where_self(&now.gt(0.0), &(&now * c.repetition_penalty));
    logits.scatter(1, &ids, &(repeated - by))
}
