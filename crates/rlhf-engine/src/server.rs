//! Samplers on a server, as recipes and the command line name them.

use rlhf::args::GenerateArgs;
use rlhf::usage;
use rlhf_data::group::PromptGroup;
use rlhf_endpoint::{Endpoint, EndpointConfig};
use rlhf_model::{
    Config, GenerateRequest, Mismatch, RecordedLogprobs, Sampler as _, SamplingConfig,
    ServerLogprobs, ServerSampler, Transformer,
};

use crate::recipe::Server;
use crate::stage::measure::logprobs_of;

/// The key of a server, where it has one.
pub(crate) fn key(server: &Server) -> anyhow::Result<Option<String>> {
    let read = |name: &String| {
        std::env::var(name).map_err(|_| {
            usage(
                format!("the environment has no `{name}`, which is to hold the server's key"),
                &server.url,
                format!("set {name}, or leave the key's name out"),
            )
        })
    };
    Ok(server.key_env.as_ref().map(read).transpose()?)
}

/// A sampler that asks `server` for completions of the model with configuration `config`.
pub(crate) fn sampler(server: &Server, config: &Config) -> anyhow::Result<ServerSampler> {
    let mut endpoint = EndpointConfig::new(&server.url, &server.model);
    endpoint.key = key(server)?;
    let endpoint = Endpoint::new(endpoint).map_err(rlhf_model::Error::from)?;
    let logprobs = if server.processed_logprobs {
        ServerLogprobs::Sampled
    } else {
        ServerLogprobs::Model
    };
    Ok(ServerSampler::new(endpoint, config, logprobs))
}

/// Lets a server draw, and says how far its log-probabilities are from those of the model here.
#[allow(clippy::print_stderr, reason = "a command speaks to the terminal")]
pub(crate) fn generate(
    url: &str,
    args: &GenerateArgs,
    model: &Transformer,
    requests: &[GenerateRequest],
    cfg: &SamplingConfig,
) -> anyhow::Result<Vec<PromptGroup>> {
    let stop = args.sampling.stop.clone();
    let args = &args.server;
    let server = Server {
        url: url.to_owned(),
        model: args.served_model.clone().unwrap_or_default(),
        key_env: args.key_env.clone(),
        processed_logprobs: args.processed_logprobs,
    };
    let mut cfg = cfg.clone();
    if !server.processed_logprobs {
        cfg.record = RecordedLogprobs::Model;
    }
    let sampler = sampler(&server, model.config())?.stop_at(stop);
    let groups = sampler.sample(requests, &cfg)?;
    let filtered = (cfg.top_k, cfg.top_p, cfg.min_p) != (None, None, None);
    if server.processed_logprobs && (filtered || cfg.temperature == 0.0) {
        eprintln!("sampler mismatch: not computed, filters change the probabilities");
        return Ok(groups);
    }
    let temperature = match cfg.record {
        RecordedLogprobs::Model => 1.0,
        RecordedLogprobs::Sampled => cfg.temperature,
    };
    let longest = groups.iter().map(PromptGroup::num_tokens).max();
    let own = logprobs_of(model, &groups, temperature, longest.unwrap_or(0).max(8192))?;
    let completions = groups.iter().flat_map(|g| &g.completions);
    let records = completions.filter_map(|c| c.sampler.as_ref());
    let drawn = records.flat_map(|s| s.logprobs.iter().map(|&x| f64::from(x)));
    let m = Mismatch::of(own.into_iter().flatten(), drawn);
    eprintln!(
        "sampler mismatch over {} tokens: |Δ log p| at most {:.2e}, mean {:.2e}; KL {:.2e} nats a token",
        m.tokens, m.largest, m.mean, m.kl
    );
    Ok(groups)
}
