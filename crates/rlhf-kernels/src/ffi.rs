//! The only `unsafe`: calls into the C++ shim.
//!
//! Invariant: tensors go in borrowed and come out owned; a message that comes out is copied and freed. It is one file,
//! however long, so that every `unsafe` is read in one place.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::attention::AttentionOptions;
use crate::collective::Rendezvous;
use crate::decode::Prefix;
use crate::error::{Error, Result};

type Call =
    extern "C" fn(*mut c_void, *const *const C_tensor, i64, *mut *mut c_char) -> *mut C_tensor;
type Release = extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn rlhf_linear_logprobs(
        out: *mut *mut C_tensor,
        hidden: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        ids: *const C_tensor,
        options: *const RawLogprobOptions,
    ) -> *mut c_char;
    fn rlhf_linear_kl(
        out: *mut *mut C_tensor,
        student: *const RawHead,
        teacher: *const RawHead,
        options: *const RawKlOptions,
    ) -> *mut c_char;
    fn rlhf_linear_kl_top(
        out: *mut *mut C_tensor,
        student: *const RawHead,
        ids: *const C_tensor,
        logprobs: *const C_tensor,
        bucket: c_int,
        options: *const RawKlOptions,
    ) -> *mut c_char;
    fn rlhf_top_logprobs(
        out: *mut *mut C_tensor,
        teacher: *const RawHead,
        k: i64,
        temperature: f64,
        chunk_rows: i64,
    ) -> *mut c_char;
    fn rlhf_segments(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        offsets: *const i64,
        n: i64,
        op: c_int,
    ) -> *mut c_char;
    fn rlhf_statistics(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        offsets: *const i64,
        n: i64,
        op: c_int,
        epsilon: f64,
        correction: f64,
    ) -> *mut c_char;
    fn rlhf_scan(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        offsets: *const i64,
        n: i64,
        decay: f64,
        reverse: c_int,
    ) -> *mut c_char;
    fn rlhf_gae(
        out: *mut *mut C_tensor,
        rewards: *const C_tensor,
        values: *const C_tensor,
        offsets: *const i64,
        n: i64,
        gamma: f64,
        lambda: f64,
        doubling: c_int,
    ) -> *mut c_char;
    fn rlhf_surrogate(
        out: *mut *mut C_tensor,
        sums: *mut f64,
        logprobs: *const C_tensor,
        others: *const *const C_tensor,
        offsets: *const i64,
        n: i64,
        settings: *const RawSurrogate,
        by_completion: c_int,
        sequence_mean: c_int,
    ) -> *mut c_char;
    fn rlhf_pack_panels(out: *mut *mut C_tensor, weight: *const C_tensor) -> *mut c_char;
    fn rlhf_panel_product(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        panels: *const C_tensor,
    ) -> *mut c_char;
    fn rlhf_prefix_attention(
        out: *mut *mut C_tensor,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        groups: *const i64,
        n: i64,
        scale: f64,
        softcap: f64,
        window: i64,
    ) -> *mut c_char;
    fn rlhf_prefix_attention_by_parts(
        out: *mut *mut C_tensor,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        flat: *const i64,
        n: i64,
        scale: f64,
        flash: c_int,
    ) -> *mut c_char;
    fn rlhf_logit_logprobs(
        out: *mut *mut C_tensor,
        logits: *const C_tensor,
        ids: *const C_tensor,
        in_place: c_int,
    ) -> *mut c_char;
    fn rlhf_recompute(
        out: *mut *mut C_tensor,
        inputs: *const *const C_tensor,
        n: i64,
        data: *mut c_void,
        call: Call,
        release: Release,
    ) -> *mut c_char;
    fn rlhf_adamw(
        tensors: *const *const C_tensor,
        n: i64,
        lr: f64,
        factor: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut c_char;
    fn rlhf_adamw8(
        tensors: *const *const C_tensor,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut c_char;
    fn rlhf_decode_attention(
        out: *mut *mut C_tensor,
        tensors: *const *const C_tensor,
        starts: *const i64,
        prefixes: *const *const C_tensor,
        now: i64,
        scale: f64,
        cap: f64,
        window: i64,
    ) -> *mut c_char;
    fn rlhf_add_norm(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        more: *const C_tensor,
        weight: *const C_tensor,
        eps: f64,
    ) -> *mut c_char;
    fn rlhf_silu_mul(
        out: *mut *mut C_tensor,
        gate: *const C_tensor,
        up: *const C_tensor,
    ) -> *mut c_char;
    fn rlhf_embedding(
        out: *mut *mut C_tensor,
        table: *const C_tensor,
        ids: *const C_tensor,
    ) -> *mut c_char;
    fn rlhf_is_table(t: *const C_tensor) -> c_int;
    fn rlhf_zeros_like_table(out: *mut *mut C_tensor, t: *const C_tensor) -> *mut c_char;
    fn rlhf_has_kernels(t: *const C_tensor) -> c_int;
    fn rlhf_gpu_memory(t: *const C_tensor) -> i64;
    fn rlhf_keep_memory();
    fn rlhf_silu_mul_linear(
        out: *mut *mut C_tensor,
        gate: *const C_tensor,
        up: *const C_tensor,
        weight: *const C_tensor,
    ) -> *mut c_char;
    fn rlhf_norm_linears(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        more: *const C_tensor,
        norm: *const C_tensor,
        eps: f64,
        weights: *const *const C_tensor,
        n: i64,
    ) -> *mut c_char;
    fn rlhf_rotate(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        cos: *const C_tensor,
        sin: *const C_tensor,
    ) -> *mut c_char;
    fn rlhf_linears(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        weights: *const *const C_tensor,
        n: i64,
    ) -> *mut c_char;
    fn rlhf_rms_norm(
        out: *mut *mut C_tensor,
        x: *const C_tensor,
        weight: *const C_tensor,
        eps: f64,
    ) -> *mut c_char;
    fn rlhf_silu_gate(out: *mut *mut C_tensor, both: *const C_tensor) -> *mut c_char;
    fn rlhf_draw(
        scores: *const C_tensor,
        uniforms: *const f64,
        ids: *mut i64,
        logprobs: *mut f32,
        sums: *mut f32,
    ) -> *mut c_char;
    fn rlhf_round_to_bf16(from: *const C_tensor, to: *const C_tensor, salt: u32) -> *mut c_char;
    fn rlhf_group_new(out: *mut *mut c_void, at: *const RawRendezvous) -> *mut c_char;
    fn rlhf_group_free(group: *mut c_void);
    fn rlhf_collective(
        pending: *mut *mut c_void,
        group: *mut c_void,
        what: c_int,
        tensor: *const C_tensor,
        out: *const C_tensor,
        reduce: c_int,
        root: i64,
    ) -> *mut c_char;
    fn rlhf_barrier(group: *mut c_void) -> *mut c_char;
    fn rlhf_pending_done(pending: *mut c_void) -> c_int;
    fn rlhf_pending_wait(pending: *mut c_void) -> *mut c_char;
    fn rlhf_pending_free(pending: *mut c_void);
    #[cfg(test)]
    fn rlhf_dynamic_maps(out: *mut f32);
    fn rlhf_global_norm(norm: *mut f64, tensors: *const *const C_tensor, n: i64) -> *mut c_char;
    fn rlhf_forget_grads(tensors: *const *const C_tensor, n: i64) -> *mut c_char;
    fn rlhf_count(tensors: *const *const C_tensor, n: i64) -> *mut c_char;
    fn rlhf_scale(tensors: *const *const C_tensor, n: i64, factor: f64) -> *mut c_char;
    #[cfg(test)]
    fn rlhf_cap_instruction_set(cap: c_int) -> c_int;
    fn free(p: *mut c_void);
    fn strdup(text: *const c_char) -> *mut c_char;
}

/// Turns the shim's message into a result.
fn check(op: &'static str, message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim's messages are NUL-terminated and malloc'ed; it is copied, then freed once.
    let text = unsafe {
        let text = CStr::from_ptr(message)
            .to_string_lossy()
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned();
        free(message.cast());
        text
    };
    Err(Error::Shim { op, message: text })
}

/// Takes over a tensor that the shim allocated.
fn take(raw: *mut C_tensor) -> Tensor {
    // SAFETY: after success the shim has written a `new at::Tensor` here that nobody else owns.
    unsafe { Tensor::from_ptr(raw) }
}

fn maybe(tensor: Option<&Tensor>) -> *const C_tensor {
    tensor.map_or(std::ptr::null(), Tensor::as_ptr)
}

fn pointers(tensors: &[&Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|t| t.as_ptr()).collect()
}

/// As in csrc/linear_logprobs.cpp.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct RawLogprobOptions {
    pub(crate) temperature: f64,
    /// 0 for none.
    pub(crate) softcap: f64,
    /// 0 for none.
    pub(crate) filter: f64,
    /// 0 for none.
    pub(crate) penalty: f64,
    pub(crate) chunk_rows: i64,
    /// 0 for whole rows.
    pub(crate) chunk_words: i64,
    /// Bytes that all logits may take to be kept for backward.
    pub(crate) keep: i64,
    pub(crate) entropy: c_int,
    pub(crate) log_sum_exp: c_int,
    pub(crate) top1: c_int,
    pub(crate) moments: c_int,
}

/// Log-probabilities, then what the options ask for: entropies, log-sum-exps, logit penalties, whether the id is
/// the argmax, the largest log-probability, log Σ p², the mean logit.
pub(crate) fn linear_logprobs(
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    ids: &Tensor,
    options: &RawLogprobOptions,
) -> Result<[Option<Tensor>; 8]> {
    let mut out = [std::ptr::null_mut(); 8];
    // SAFETY: the tensors are alive for the call, `bias` may be null; `out` has room for eight results,
    // of which those not asked for stay null; the options' layout is the shim's.
    let message = unsafe {
        rlhf_linear_logprobs(
            out.as_mut_ptr(),
            hidden.as_ptr(),
            weight.as_ptr(),
            maybe(bias),
            ids.as_ptr(),
            options,
        )
    };
    check("linear_logprobs", message)?;
    Ok(out.map(|raw| (!raw.is_null()).then(|| take(raw))))
}

/// As in csrc/linear_kl.cpp. Its tensors are borrowed: the lifetime keeps them alive.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct RawHead<'a> {
    hidden: *const C_tensor,
    weight: *const C_tensor,
    bias: *const C_tensor,
    softcap: f64,
    tensors: PhantomData<&'a Tensor>,
}

impl<'a> RawHead<'a> {
    pub(crate) fn new(
        hidden: &'a Tensor,
        weight: &'a Tensor,
        bias: Option<&'a Tensor>,
        softcap: f64,
    ) -> Self {
        Self {
            hidden: hidden.as_ptr(),
            weight: weight.as_ptr(),
            bias: maybe(bias),
            softcap,
            tensors: PhantomData,
        }
    }
}

/// As in csrc/linear_kl.cpp.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct RawKlOptions {
    pub(crate) temperature: f64,
    pub(crate) beta: f64,
    /// 0 forward, 1 reverse, 2 Jensen-Shannon.
    pub(crate) divergence: i64,
    pub(crate) chunk_rows: i64,
}

pub(crate) fn linear_kl(
    student: &RawHead<'_>,
    teacher: &RawHead<'_>,
    options: &RawKlOptions,
) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the heads borrow live tensors; the structs' layouts are the shim's.
    let message = unsafe { rlhf_linear_kl(&raw mut out, student, teacher, options) };
    check("linear_kl", message)?;
    Ok(take(out))
}

pub(crate) fn linear_kl_top(
    student: &RawHead<'_>,
    ids: &Tensor,
    logprobs: &Tensor,
    bucket: bool,
    options: &RawKlOptions,
) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the head borrows live tensors, as are the other two; the structs' layouts are the shim's.
    let message = unsafe {
        rlhf_linear_kl_top(
            &raw mut out,
            student,
            ids.as_ptr(),
            logprobs.as_ptr(),
            c_int::from(bucket),
            options,
        )
    };
    check("linear_kl_top", message)?;
    Ok(take(out))
}

pub(crate) fn top_logprobs(
    teacher: &RawHead<'_>,
    k: i64,
    temperature: f64,
    chunk_rows: i64,
) -> Result<(Tensor, Tensor)> {
    let mut out = [std::ptr::null_mut(); 2];
    // SAFETY: the head borrows live tensors; `out` has room for two results.
    let message =
        unsafe { rlhf_top_logprobs(out.as_mut_ptr(), teacher, k, temperature, chunk_rows) };
    check("top_logprobs", message)?;
    Ok((take(out[0]), take(out[1])))
}

/// Log-probabilities of `ids` under `logits`, or without ids the entropies. `in_place`: backward writes over the
/// logits.
pub(crate) fn logit_logprobs(
    op: &'static str,
    logits: &Tensor,
    ids: Option<&Tensor>,
    in_place: bool,
) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the tensors are alive for the call; the shim allows `ids` to be null.
    let message = unsafe {
        rlhf_logit_logprobs(
            &raw mut out,
            logits.as_ptr(),
            maybe(ids),
            c_int::from(in_place),
        )
    };
    check(op, message)?;
    Ok(take(out))
}

/// What [`segments`] does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Segments {
    /// `[M]` to `[S]`.
    Sum,
    /// `[S]` to `[M]`.
    Repeat,
}

/// `offsets`: S + 1 numbers that begin with 0 and never decrease; `x` has as many values as they say.
pub(crate) fn segments(x: &Tensor, offsets: &[i64], op: Segments) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    let n = offsets.len() as i64 - 1;
    // SAFETY: `x` is alive for the call; `offsets` holds n + 1 numbers, which are copied.
    let message =
        unsafe { rlhf_segments(&raw mut out, x.as_ptr(), offsets.as_ptr(), n, op as c_int) };
    check("ragged", message)?;
    Ok(take(out))
}

/// What [`statistics`] makes of each sequence's values, beside their deviation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Statistic {
    /// Less the mean.
    Centred,
    /// That over (deviation + epsilon).
    Standardized,
    /// Less the mean of the others.
    LeaveOneOut,
}

/// `offsets` as in [`segments`], `x` f32 or f64 on the CPU; no gradients. Values `[M]` and deviations `[S]`.
pub(crate) fn statistics(
    x: &Tensor,
    offsets: &[i64],
    op: Statistic,
    epsilon: f64,
    correction: f64,
) -> Result<(Tensor, Tensor)> {
    let mut out = [std::ptr::null_mut(); 2];
    // SAFETY: `x` is alive for the call; `offsets` holds n + 1 numbers, which are copied; `out` has room for
    // two results.
    let message = unsafe {
        rlhf_statistics(
            out.as_mut_ptr(),
            x.as_ptr(),
            offsets.as_ptr(),
            offsets.len() as i64 - 1,
            op as c_int,
            epsilon,
            correction,
        )
    };
    check("ragged", message)?;
    Ok((take(out[0]), take(out[1])))
}

/// `offsets` as in [`segments`].
pub(crate) fn scan(x: &Tensor, offsets: &[i64], decay: f64, reverse: bool) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    let n = offsets.len() as i64 - 1;
    // SAFETY: `x` is alive for the call; `offsets` holds n + 1 numbers, which are copied.
    let message = unsafe {
        rlhf_scan(
            &raw mut out,
            x.as_ptr(),
            offsets.as_ptr(),
            n,
            decay,
            c_int::from(reverse),
        )
    };
    check("scan", message)?;
    Ok(take(out))
}

/// `offsets` as in [`segments`]. Advantages and returns; `doubling` takes other devices' way on the CPU.
pub(crate) fn gae(
    rewards: &Tensor,
    values: &Tensor,
    offsets: &[i64],
    (gamma, lambda): (f64, f64),
    doubling: bool,
) -> Result<(Tensor, Tensor)> {
    let mut out = [std::ptr::null_mut(); 2];
    let n = offsets.len() as i64 - 1;
    // SAFETY: both tensors are alive for the call; `offsets` holds n + 1 numbers, which are copied; `out`
    // has room for two results.
    let message = unsafe {
        rlhf_gae(
            out.as_mut_ptr(),
            rewards.as_ptr(),
            values.as_ptr(),
            offsets.as_ptr(),
            n,
            gamma,
            lambda,
            c_int::from(doubling),
        )
    };
    check("gae", message)?;
    Ok((take(out[0]), take(out[1])))
}

/// As csrc/loss_kernels.h's `SurrogateSettings`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct RawSurrogate {
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) dual: f64,
    pub(crate) kl: f64,
    pub(crate) kl_value: i64,
    pub(crate) kl_slope: i64,
    pub(crate) kl_weighted: i64,
}

/// `others`: old log-probs, advantages, weights, reference log-probs, on the CPU and of the type of
/// `logprobs`, as long as `offsets` says (advantages by completion: one each). The loss, and the sums in
/// the order of csrc/loss_kernels.h.
pub(crate) fn surrogate(
    logprobs: &Tensor,
    others: [Option<&Tensor>; 4],
    offsets: &[i64],
    settings: &RawSurrogate,
    (by_completion, sequence_mean): (bool, bool),
) -> Result<(Tensor, [f64; 7])> {
    let (mut out, mut sums) = (std::ptr::null_mut(), [0.0; 7]);
    let others = others.map(maybe);
    // SAFETY: the tensors are alive for the call, the last two may be null; `offsets` holds n + 1 numbers
    // and `sums` has room for seven; the settings' layout is the shim's.
    let message = unsafe {
        rlhf_surrogate(
            &raw mut out,
            sums.as_mut_ptr(),
            logprobs.as_ptr(),
            others.as_ptr(),
            offsets.as_ptr(),
            offsets.len() as i64 - 1,
            settings,
            c_int::from(by_completion),
            c_int::from(sequence_mean),
        )
    };
    check("surrogate", message)?;
    Ok((take(out), sums))
}

/// `weight` f32 or bf16 `[O, I]` on the CPU.
pub(crate) fn pack_panels(weight: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the tensor is alive for the call; the caller checked its type, shape and device.
    let message = unsafe { rlhf_pack_panels(&raw mut out, weight.as_ptr()) };
    check("Panels::pack", message)?;
    Ok(take(out))
}

/// `x` f32 `[B, I]` with unit stride in I, `panels` contiguous `[n, I, 32]`, both on the CPU.
pub(crate) fn panel_product(x: &Tensor, panels: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: both tensors are alive for the call; the caller checked types, shapes and devices.
    let message = unsafe { rlhf_panel_product(&raw mut out, x.as_ptr(), panels.as_ptr()) };
    check("Panels::product", message)?;
    Ok(take(out))
}

/// `tensors`: q, k, v, keys, values; all f32 on the CPU, of shapes, strides and columns that the caller checked.
pub(crate) fn decode_attention(
    tensors: [&Tensor; 5],
    rope: Option<(&Tensor, &Tensor)>,
    starts: &[i64],
    prefixes: &[Option<Prefix<'_>>],
    now: i64,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let mut list = pointers(&tensors);
    let null = std::ptr::null::<C_tensor>();
    list.extend(rope.map_or([null; 2], |(cos, sin)| [cos.as_ptr(), sin.as_ptr()]));
    let mut before = vec![null; 2 * starts.len()];
    for (two, prefix) in before.chunks_mut(2).zip(prefixes) {
        if let Some(p) = prefix {
            two.copy_from_slice(&[p.keys.as_ptr(), p.values.as_ptr()]);
        }
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: the list holds five live tensors and two that live or are null; there are a start and two tensors
    // that live or are null for every row, and every column that is touched lies in the cache.
    let message = unsafe {
        rlhf_decode_attention(
            &raw mut out,
            list.as_ptr(),
            starts.as_ptr(),
            before.as_ptr(),
            now,
            options.scale,
            options.softcap.unwrap_or(0.0),
            options.window.unwrap_or(0),
        )
    };
    check("decode_attention", message)?;
    Ok(take(out))
}

/// All f32 or all f64 on the CPU, `more` as large as `x`, `weight` as long as its last dimension.
pub(crate) fn add_norm(
    x: &Tensor,
    more: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let mut out = [std::ptr::null_mut(); 2];
    // SAFETY: the tensors are alive for the call; the caller checked types, shapes and devices.
    let message = unsafe {
        rlhf_add_norm(
            out.as_mut_ptr(),
            x.as_ptr(),
            maybe(more),
            weight.as_ptr(),
            eps,
        )
    };
    check("add_norm", message)?;
    Ok((take(out[0]), take(out[1])))
}

/// Both f32 or both f64 `[n, D]` on the CPU.
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: both tensors are alive for the call; the caller checked types, shapes and devices.
    let message = unsafe { rlhf_silu_mul(&raw mut out, gate.as_ptr(), up.as_ptr()) };
    check("silu_mul", message)?;
    Ok(take(out))
}

/// `table` f32 or f64 on the CPU, `[V, H]`; `ids` i64 `[n]` there.
pub(crate) fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: both tensors are alive for the call; the caller checked types, shapes and devices.
    let message = unsafe { rlhf_embedding(&raw mut out, table.as_ptr(), ids.as_ptr()) };
    check("embedding", message)?;
    Ok(take(out))
}

/// Zeros of a tensor's size and type; for a vocabulary's table on the CPU such that take memory when written.
pub(crate) fn zeros_like(t: &Tensor) -> Result<Tensor> {
    // SAFETY: the tensor is alive for the call.
    if unsafe { rlhf_is_table(t.as_ptr()) } == 0 {
        return Ok(t.f_zeros_like()?);
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: as above.
    let message = unsafe { rlhf_zeros_like_table(&raw mut out, t.as_ptr()) };
    check("zeros_like", message)?;
    Ok(take(out))
}

/// Whether the crate's own kernels run where `t` lies: on a GPU, if libtorch brought NVRTC along.
pub(crate) fn has_kernels(t: &Tensor) -> bool {
    // SAFETY: the tensor is alive for the call.
    unsafe { rlhf_has_kernels(t.as_ptr()) != 0 }
}

/// Bytes of the GPU that `t` lies on, where the driver says.
pub(crate) fn gpu_memory(t: &Tensor) -> Option<i64> {
    // SAFETY: the tensor is alive for the call.
    let bytes = unsafe { rlhf_gpu_memory(t.as_ptr()) };
    (bytes > 0).then_some(bytes)
}

pub(crate) fn keep_memory() {
    // SAFETY: mallopt stores values, and libtorch takes another allocator at any time: a tensor knows how it is freed.
    unsafe { rlhf_keep_memory() }
}

#[cfg(target_os = "linux")]
pub(crate) fn load_cuda() {
    use std::ffi::{c_char, c_int, c_void};
    unsafe extern "C" {
        fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    }
    const RTLD_NOW: c_int = 2;
    const RTLD_GLOBAL: c_int = 0x100;
    // SAFETY: the name is a valid C string; the library's initialisers are libtorch's own, and the
    // handle is kept for the life of the process on purpose. Failure means that there is no CUDA.
    unsafe { dlopen(c"libtorch_cuda.so".as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn load_cuda() {}

/// All f32 or all f64 on the CPU: `gate` and `up` `[n, D]`, `weight` `[out, D]`.
pub(crate) fn silu_mul_linear(gate: &Tensor, up: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the tensors are alive for the call; the caller checked types, shapes and devices.
    let message =
        unsafe { rlhf_silu_mul_linear(&raw mut out, gate.as_ptr(), up.as_ptr(), weight.as_ptr()) };
    check("silu_mul_linear", message)?;
    Ok(take(out))
}

/// All f32 or all f64 on the CPU: `x` and `more` `[n, D]`, `norm` `[D]`, each weight `[out, D]`.
pub(crate) fn norm_linears(
    x: &Tensor,
    more: Option<&Tensor>,
    norm: &Tensor,
    eps: f64,
    weights: &[&Tensor],
) -> Result<(Tensor, Vec<Tensor>)> {
    let list = pointers(weights);
    let mut out = vec![std::ptr::null_mut(); 1 + list.len()];
    // SAFETY: the list holds live tensors and there is a place for the result of each and one more; the caller
    // checked types, shapes and devices.
    let message = unsafe {
        rlhf_norm_linears(
            out.as_mut_ptr(),
            x.as_ptr(),
            maybe(more),
            norm.as_ptr(),
            eps,
            list.as_ptr(),
            list.len() as i64,
        )
    };
    check("norm_linears", message)?;
    let mut out: Vec<Tensor> = out.into_iter().map(take).collect();
    let x = out.remove(0);
    Ok((x, out))
}

/// All f32 or all f64 on the CPU: `x` `[n, heads, D]`, `cos` and `sin` of n·D' numbers, D' even and at most D.
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the tensors are alive for the call; the caller checked types, shapes and devices.
    let message = unsafe { rlhf_rotate(&raw mut out, x.as_ptr(), cos.as_ptr(), sin.as_ptr()) };
    check("rotate", message)?;
    Ok(take(out))
}

/// `x` `[n, D]`, each weight `[out, D]`.
pub(crate) fn linears(x: &Tensor, weights: &[&Tensor]) -> Result<Vec<Tensor>> {
    let list = pointers(weights);
    let mut out = vec![std::ptr::null_mut(); list.len()];
    // SAFETY: the list holds live tensors, and there is a place for the result of each.
    let message = unsafe {
        rlhf_linears(
            out.as_mut_ptr(),
            x.as_ptr(),
            list.as_ptr(),
            list.len() as i64,
        )
    };
    check("linears", message)?;
    Ok(out.into_iter().map(take).collect())
}

/// `x` f32 `[n, D]` with unit stride in D, `weight` f32 `[D]`, both on the CPU.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: both tensors are alive for the call; the caller checked types, shapes and devices.
    let message = unsafe { rlhf_rms_norm(&raw mut out, x.as_ptr(), weight.as_ptr(), eps) };
    check("rms_norm", message)?;
    Ok(take(out))
}

/// `both` f32 `[n, 2·D]` with unit stride in its columns, on the CPU.
pub(crate) fn silu_gate(both: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the tensor is alive for the call; the caller checked its type, shape and device.
    let message = unsafe { rlhf_silu_gate(&raw mut out, both.as_ptr()) };
    check("silu_gate", message)?;
    Ok(take(out))
}

/// `scores` f32 `[n, V]` with unit stride in V on the CPU, V > 0, a uniform a row. Ids, their
/// log-probabilities, and each row's sum.
pub(crate) fn draw(scores: &Tensor, uniforms: &[f64]) -> Result<(Vec<i64>, Vec<f32>, Vec<f32>)> {
    let n = uniforms.len();
    let (mut ids, mut logprobs, mut sums) = (vec![0; n], vec![0.0; n], vec![0.0; n]);
    // SAFETY: the tensor is alive and has n rows, as the caller checked, and so many numbers are written
    // into each list.
    let message = unsafe {
        rlhf_draw(
            scores.as_ptr(),
            uniforms.as_ptr(),
            ids.as_mut_ptr(),
            logprobs.as_mut_ptr(),
            sums.as_mut_ptr(),
        )
    };
    check("draw", message)?;
    Ok((ids, logprobs, sums))
}

/// Without cap and window, by variable-length attention in two parts: libtorch's flash kernel on CUDA, or its
/// definition on any device. Shapes and types fit each other.
pub(crate) fn prefix_attention_by_parts(
    [q, k, v]: [&Tensor; 3],
    flat: &[i64],
    scale: f64,
    flash: bool,
) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the tensors live for the call; the layout's rows are those of the tensors.
    let message = unsafe {
        rlhf_prefix_attention_by_parts(
            &raw mut out,
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            flat.as_ptr(),
            flat.len() as i64,
            scale,
            flash.into(),
        )
    };
    check("shared_prefix_attention", message)?;
    Ok(take(out))
}

/// `groups`: for each the prompt's start and end, the number of completions, their starts and ends.
pub(crate) fn prefix_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    groups: &[i64],
    options: &AttentionOptions,
) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors are alive for the call, and `groups` is copied by it.
    let message = unsafe {
        rlhf_prefix_attention(
            &raw mut out,
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            groups.as_ptr(),
            groups.len() as i64,
            options.scale,
            options.softcap.unwrap_or(0.0),
            options.window.unwrap_or(0),
        )
    };
    check("shared_prefix_attention", message)?;
    Ok(take(out))
}

type Body = Box<dyn Fn(&[Tensor]) -> Tensor>;

/// Runs a Rust closure for the shim. A panic stops here: its message goes to the shim, which raises
/// an error instead.
extern "C" fn call_body(
    data: *mut c_void,
    inputs: *const *const C_tensor,
    n: i64,
    message: *mut *mut c_char,
) -> *mut C_tensor {
    // SAFETY: `data` is the `Box<Body>` that `recompute` leaked and `release_body` frees later; the shim
    // passes `n` live tensors, of which shallow clones are made. Backward runs on the thread that asked
    // for it, or on one that it waits for, so the closure is never called twice at a time.
    let result = catch_unwind(AssertUnwindSafe(|| unsafe {
        let body = &*data.cast::<Body>();
        let inputs: Vec<Tensor> = std::slice::from_raw_parts(inputs, n as usize)
            .iter()
            .map(|&p| Tensor::clone_from_ptr(p.cast_mut()))
            .collect();
        body(&inputs)
    }));
    match result {
        // The shim takes this very `at::Tensor` over.
        Ok(t) => {
            let raw = t.as_ptr().cast_mut();
            std::mem::forget(t);
            raw
        }
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            let first = text.lines().next().unwrap_or_default().replace('\0', "");
            let text = CString::new(first).unwrap_or_default();
            // SAFETY: the shim gives room for one pointer and frees what `strdup` makes.
            unsafe { *message = strdup(text.as_ptr()) };
            std::ptr::null_mut()
        }
    }
}

extern "C" fn release_body(data: *mut c_void) {
    // SAFETY: called once, by the destructor of the shim's closure, with the leaked `Box<Body>`.
    drop(unsafe { Box::from_raw(data.cast::<Body>()) });
}

pub(crate) fn recompute(inputs: &[&Tensor], body: Body) -> Result<Tensor> {
    let list = pointers(inputs);
    let data = Box::into_raw(Box::new(body)).cast();
    let mut out = std::ptr::null_mut();
    // SAFETY: the inputs are alive for the call; the shim owns `data` from here on, also on failure.
    let message = unsafe {
        rlhf_recompute(
            &raw mut out,
            list.as_ptr(),
            list.len() as i64,
            data,
            call_body,
            release_body,
        )
    };
    check("recompute", message)?;
    Ok(take(out))
}

/// `tensors`: n parameters, gradients, first moments, second moments, steps.
pub(crate) fn adamw(
    tensors: &[&Tensor],
    lr: f64,
    factor: f64,
    betas: (f64, f64),
    weight_decay: f64,
    eps: f64,
) -> Result<()> {
    let list = pointers(tensors);
    // SAFETY: the list holds 5n live tensors.
    let message = unsafe {
        rlhf_adamw(
            list.as_ptr(),
            list.len() as i64 / 5,
            lr,
            factor,
            betas.0,
            betas.1,
            weight_decay,
            eps,
        )
    };
    check("adamw", message)
}

/// `tensors`: parameter, gradient, codes of both moments, their blocks' largest magnitudes; contiguous on
/// the CPU, f32 and codes u8.
pub(crate) fn adamw8(
    tensors: &[&Tensor; 6],
    step: f64,
    lr: f64,
    betas: (f64, f64),
    weight_decay: f64,
    eps: f64,
) -> Result<()> {
    let list = pointers(tensors);
    // SAFETY: the list holds six live tensors, whose types and layouts the shim checks or the caller has
    // made; blocks are as many as the caller has made magnitudes for.
    let message =
        unsafe { rlhf_adamw8(list.as_ptr(), step, lr, betas.0, betas.1, weight_decay, eps) };
    check("adamw8", message)
}

/// Writes f32 numbers into a bf16 tensor of the same layout on the CPU, rounded with chances by nearness.
pub(crate) fn round_to_bf16(from: &Tensor, to: &Tensor, salt: u32) -> Result<()> {
    // SAFETY: both tensors live; the shim checks their layouts and sizes, the caller their types.
    let message = unsafe { rlhf_round_to_bf16(from.as_ptr(), to.as_ptr(), salt) };
    check("round_to_bf16", message)
}

/// The dynamic tree maps' values: signed, then positive.
#[cfg(test)]
pub(crate) fn dynamic_maps() -> [[f32; 256]; 2] {
    let mut out = [[0.0; 256]; 2];
    // SAFETY: the shim writes 512 numbers, which `out` has room for.
    unsafe { rlhf_dynamic_maps(out.as_mut_ptr().cast()) };
    out
}

pub(crate) fn global_norm(tensors: &[&Tensor]) -> Result<f64> {
    let list = pointers(tensors);
    let mut norm = 0.0;
    // SAFETY: the list holds live tensors; `norm` outlives the call.
    let message = unsafe { rlhf_global_norm(&raw mut norm, list.as_ptr(), list.len() as i64) };
    check("global_norm", message)?;
    Ok(norm)
}

pub(crate) fn forget_grads(tensors: &[&Tensor]) -> Result<()> {
    let list = pointers(tensors);
    // SAFETY: the list holds live tensors; their gradients are dropped, whose other owners keep them.
    let message = unsafe { rlhf_forget_grads(list.as_ptr(), list.len() as i64) };
    check("forget_grads", message)
}

/// Adds 1 to every tensor.
pub(crate) fn count(tensors: &[&Tensor]) -> Result<()> {
    let list = pointers(tensors);
    // SAFETY: the list holds live tensors.
    let message = unsafe { rlhf_count(list.as_ptr(), list.len() as i64) };
    check("count", message)
}

pub(crate) fn scale(tensors: &[&Tensor], factor: f64) -> Result<()> {
    let list = pointers(tensors);
    // SAFETY: the list holds live tensors.
    let message = unsafe { rlhf_scale(list.as_ptr(), list.len() as i64, factor) };
    check("scale", message)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::decode;
    use crate::kl::{Divergence, KlOptions, Logits};
    use crate::surrogate::{Advantages, SurrogateInputs, SurrogateOptions, TokenWeight};
    use crate::{
        AttentionGroup, AttentionLayout, LogprobOptions, Offsets, Panels, Ragged, linear_kl,
        linear_logprobs, shared_prefix_attention, surrogate,
    };

    /// Results and gradients of both kernels, as one row of numbers.
    fn everything() -> Vec<f32> {
        let f32 = (Kind::Float, Device::Cpu);
        let wave = |size: &[i64], step: f64| {
            (Tensor::arange(size.iter().product::<i64>(), f32) * step)
                .sin()
                .view(size)
                .set_requires_grad(true)
        };
        let (hidden, weight) = (wave(&[5, 7], 0.61), wave(&[75, 7], 1.7));
        let ids = Tensor::from_slice(&[0i64, 3, 74, 20, 9]);
        let options = LogprobOptions {
            entropy: true,
            softcap: Some(3.0),
            temperature: 0.7,
            top1: true,
            moments: true,
            logit_penalty: Some(0.2),
            ..Default::default()
        };
        let out = linear_logprobs(&hidden, &weight, &ids, &options).unwrap();
        let layout = AttentionLayout::new(vec![AttentionGroup {
            prompt: 0..5,
            completions: vec![5..9, 9..60],
        }])
        .unwrap();
        let teacher = (wave(&[5, 3], 0.43), wave(&[75, 3], 0.9));
        let divergences = [
            Divergence::Forward,
            Divergence::Reverse,
            Divergence::JensenShannon { beta: 0.3 },
        ]
        .map(|d| {
            let (s, t) = (
                Logits::new(&hidden, &weight),
                Logits::new(&teacher.0, &teacher.1),
            );
            linear_kl(s, t, &KlOptions::new(d)).unwrap()
        });
        let kl = Tensor::cat(&divergences, 0);
        let (q, k) = (wave(&[60, 4, 20], 0.37), wave(&[60, 2, 20], 0.53));
        let seen =
            shared_prefix_attention(&q, &k, &k, &layout, &AttentionOptions::new(0.3)).unwrap();
        let capped = AttentionOptions {
            softcap: Some(1.5),
            window: Some(7),
            ..AttentionOptions::new(0.3)
        };
        let near = shared_prefix_attention(&q, &k, &k, &layout, &capped).unwrap();
        let panels = Panels::pack(&weight.detach()).unwrap();
        let product = panels.product(&hidden.detach()).unwrap();
        let ratios = Ragged::new(
            out.logprobs.shallow_clone(),
            Offsets::from_lengths(&[2, 3]).unwrap(),
        );
        let old = out.logprobs.detach() + 0.05;
        let clipped = surrogate(
            &SurrogateInputs {
                logprobs: &ratios.unwrap(),
                old_logprobs: &old,
                advantages: Advantages::Token(&wave(&[5], 0.7).detach()),
                weights: None,
                kl: None,
            },
            &SurrogateOptions {
                epsilon_low: 0.2,
                epsilon_high: 0.2,
                dual: None,
                token_weight: TokenWeight::SequenceMean,
            },
        )
        .unwrap();
        let cache = wave(&[60, 2, 33, 20], 0.21).detach();
        let starts: Vec<i64> = (0..60).map(|i| i % 30).collect();
        let (one_q, one_k) = (q.detach(), k.detach());
        let mixed = decode::decode_attention(
            &one_q,
            &one_k,
            &one_k,
            None,
            &decode::DecodeCache {
                keys: &cache,
                values: &cache.copy(),
                starts: &starts,
                prefixes: &[],
                now: 32,
            },
            &AttentionOptions::new(0.3),
        )
        .unwrap();
        let gated = decode::silu_gate(&mixed).unwrap();
        let normed = decode::rms_norm(&mixed, &wave(&[80], 0.3).detach(), 1e-5).unwrap();
        let drawn = decode::draw(&mixed, &[0.37; 60]).unwrap();
        let drawn = Tensor::from_slice(&drawn.logprobs);
        let entropy = out.entropy.unwrap();
        (out.logprobs.sum(None)
            + entropy.sum(None) * 0.3
            + kl.sum(None)
            + out.logit_penalty.unwrap().sum(None)
            + (&seen * &seen).sum(None)
            + (&near * &near).sum(None)
            + &clipped.loss.sum)
            .backward();
        let top1 = out.top1.unwrap();
        let moments = out.moments.unwrap();
        let all = [
            &kl,
            &out.logprobs,
            &entropy,
            &hidden.grad(),
            &weight.grad(),
            &seen,
            &q.grad(),
            &k.grad(),
            &mixed,
            &gated,
            &normed,
            &drawn,
            &near,
            &product,
            &clipped.loss.sum,
            &top1.logprobs,
            &moments.log_sum_sq_probs,
            &moments.mean_logits,
        ];
        let flat: Vec<Tensor> = all.iter().map(|t| t.detach().flatten(0, -1)).collect();
        Vec::try_from(Tensor::cat(&flat, 0)).unwrap()
    }

    #[test]
    fn instruction_sets_agree() {
        let best = everything();
        for cap in [0, 1] {
            // SAFETY: a number in, a number out. Other tests may run meanwhile: each set is right.
            let used = unsafe { rlhf_cap_instruction_set(cap) };
            let worst = everything()
                .iter()
                .zip(&best)
                .map(|(a, b)| (a - b).abs() / b.abs().max(1.0))
                .fold(0.0, f32::max);
            assert!(worst < 3e-5, "set {used}: {worst}");
        }
        // SAFETY: as above.
        unsafe { rlhf_cap_instruction_set(c_int::MAX) };
    }
}

/// As in csrc/collective.cpp.
#[repr(C)]
struct RawRendezvous {
    host: *const c_char,
    prefix: *const c_char,
    interface: *const c_char,
    port: i64,
    rank: i64,
    size: i64,
    timeout_ms: i64,
    listens: c_int,
}

/// In the numbers of csrc/collective.cpp.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Collective {
    AllReduce,
    Broadcast,
    AllGather,
    ReduceScatter,
}

/// The shim's group, freed once.
#[derive(Debug)]
pub(crate) struct RawGroup(NonNull<c_void>);

/// The shim's handle, freed once. It keeps its own references to the tensors.
#[derive(Debug)]
pub(crate) struct RawPending(NonNull<c_void>);

// SAFETY: c10d's groups and handles are used by one thread at a time and bound to none.
unsafe impl Send for RawGroup {}
// SAFETY: as above.
unsafe impl Send for RawPending {}

/// What success must have written.
fn owned(op: &'static str, raw: *mut c_void) -> Result<NonNull<c_void>> {
    NonNull::new(raw).ok_or_else(|| Error::Shim {
        op,
        message: "no object came out".into(),
    })
}

impl RawGroup {
    /// No text holds a NUL: the caller checked.
    pub(crate) fn new(op: &'static str, at: &Rendezvous) -> Result<Self> {
        let text = |t: &str| CString::new(t).unwrap_or_default();
        let (host, prefix) = (text(&at.host), text(&at.prefix));
        let interface = at.interface.as_deref().map(text);
        let raw = RawRendezvous {
            host: host.as_ptr(),
            prefix: prefix.as_ptr(),
            interface: interface.as_ref().map_or(std::ptr::null(), |i| i.as_ptr()),
            port: i64::from(at.port),
            rank: at.rank as i64,
            size: at.size as i64,
            timeout_ms: i64::try_from(at.timeout.as_millis()).unwrap_or(i64::MAX / 2_000_000),
            listens: at.listens.into(),
        };
        let mut out = std::ptr::null_mut();
        // SAFETY: the texts outlive the call, which copies them; the struct's layout is the shim's.
        check(op, unsafe { rlhf_group_new(&raw mut out, &raw const raw) })?;
        Ok(Self(owned(op, out)?))
    }

    /// Tensors contiguous and on the CPU.
    pub(crate) fn start(
        &self,
        op: &'static str,
        what: Collective,
        tensor: &Tensor,
        out: Option<&Tensor>,
        reduce: c_int,
        root: i64,
    ) -> Result<RawPending> {
        let mut pending = std::ptr::null_mut();
        // SAFETY: the group is alive; the tensors are, and the operation keeps references of its own.
        let message = unsafe {
            rlhf_collective(
                &raw mut pending,
                self.0.as_ptr(),
                what as c_int,
                tensor.as_ptr(),
                maybe(out),
                reduce,
                root,
            )
        };
        check(op, message)?;
        Ok(RawPending(owned(op, pending)?))
    }

    pub(crate) fn barrier(&self) -> Result<()> {
        // SAFETY: the group is alive.
        check("barrier", unsafe { rlhf_barrier(self.0.as_ptr()) })
    }
}

impl Drop for RawGroup {
    fn drop(&mut self) {
        // SAFETY: made by `rlhf_group_new`, freed here alone.
        unsafe { rlhf_group_free(self.0.as_ptr()) }
    }
}

impl RawPending {
    pub(crate) fn is_done(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { rlhf_pending_done(self.0.as_ptr()) != 0 }
    }

    pub(crate) fn wait(&self, op: &'static str) -> Result<()> {
        // SAFETY: the handle is alive.
        check(op, unsafe { rlhf_pending_wait(self.0.as_ptr()) })
    }
}

impl Drop for RawPending {
    fn drop(&mut self) {
        // SAFETY: made by `rlhf_collective`, freed here alone.
        unsafe { rlhf_pending_free(self.0.as_ptr()) }
    }
}
