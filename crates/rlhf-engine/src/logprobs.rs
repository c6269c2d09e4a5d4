//! Per-token log-probabilities of conversations, as Parquet.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use arrow_array::builder::{Float32Builder, ListBuilder, UInt32Builder};
use arrow_array::{ArrayRef, Float64Array, RecordBatch, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use rlhf_data::source::{self, ParquetOut};
use rlhf_data::tokenize::{ChatTokenizer, Limits};
use rlhf_model::Transformer;

use crate::stage::measure::logprobs_of;
use rlhf::usage;

/// Rows tokenised and written at once.
const CHUNK: usize = 512;

/// Writes `row: u64`, `ids: list<u32>`, `logprobs: list<f32>` (of the trained tokens), `sum: f64` for
/// each conversation of `input` that can be used; gives how many.
pub(crate) fn write(
    model: &Transformer,
    tokenizer: &ChatTokenizer,
    input: &Path,
    out: &Path,
    limits: &Limits,
    micro_tokens: usize,
) -> anyhow::Result<usize> {
    let list = |name: &str, t: DataType| {
        Field::new(
            name,
            DataType::List(Arc::new(Field::new("item", t, true))),
            false,
        )
    };
    let schema = Arc::new(Schema::new(vec![
        Field::new("row", DataType::UInt64, false),
        list("ids", DataType::UInt32),
        list("logprobs", DataType::Float32),
        Field::new("sum", DataType::Float64, false),
    ]));
    let mut file = ParquetOut::create(out, schema.clone())?;
    let mut records = source::read_sft(input)?;
    let (mut first, mut written) = (0u64, 0);
    loop {
        let chunk = records
            .by_ref()
            .take(CHUNK)
            .collect::<rlhf_data::Result<Vec<_>>>()?;
        if chunk.is_empty() {
            break;
        }
        let (groups, _) = tokenizer.sft_groups(&chunk, limits)?;
        let logprobs = logprobs_of(model, &groups, 1.0, micro_tokens)
            .with_context(|| format!("rows from {first} on"))?;
        let (mut rows, mut sums) = (Vec::new(), Vec::new());
        let (mut ids, mut values) = (
            ListBuilder::new(UInt32Builder::new()),
            ListBuilder::new(Float32Builder::new()),
        );
        for (group, lp) in groups.iter().zip(&logprobs) {
            let completion = &group.completions[0];
            let trained: Vec<u32> = completion
                .trained
                .iter()
                .cloned()
                .flatten()
                .map(|i| completion.ids[i])
                .collect();
            // Without a prompt the first token has no log-probability.
            let skip = trained.len() - lp.len();
            rows.push(first + group.row);
            sums.push(lp.iter().sum::<f64>());
            ids.append_value(trained[skip..].iter().map(|&i| Some(i)));
            values.append_value(lp.iter().map(|&x| Some(x as f32)));
        }
        written += rows.len();
        first += chunk.len() as u64;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt64Array::from(rows)),
            Arc::new(ids.finish()),
            Arc::new(values.finish()),
            Arc::new(Float64Array::from(sums)),
        ];
        file.write(&RecordBatch::try_new(schema.clone(), columns)?)?;
    }
    if written == 0 {
        return Err(usage(
            "no usable rows",
            input.display().to_string(),
            "look at the file with `rlhf data check`",
        )
        .into());
    }
    file.finish()?;
    Ok(written)
}
