"""Writes tiny random models of every family with what `transformers` computes from them, for
`crates/rlhf-model/tests/models`.

    python docs/interop/tiny_models.py crates/rlhf-model/tests/models [NAME...]

Needs torch, transformers and safetensors. Weights are random and seeded; norms and biases are moved
off one and zero, so that a forgotten one shows. The files are as `crates/rlhf-model/tests/it/golden.rs`
reads them.
"""

import sys
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file

EOS = 2
BASE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=EOS, pad_token_id=0, initializer_range=0.15,
            attn_implementation="eager")


def rope(**more):
    return {"rope_type": "default", "rope_theta": 10000.0, **more}


CONFIGS = {
    "mistral": lambda: hf.MistralConfig(**BASE, head_dim=8, sliding_window=5),
    "qwen2-yarn": lambda: hf.Qwen2Config(**BASE, rope_parameters=rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "qwen2-window": lambda: hf.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=6,
                                           max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**BASE, head_dim=16, tie_word_embeddings=True),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=EOS, pad_token_id=0, initializer_range=0.15, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="eager"),
    "gemma2": lambda: hf.Gemma2Config(**BASE, head_dim=8, sliding_window=5, query_pre_attn_scalar=16,
                                      attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **{**BASE, "num_hidden_layers": 3}, head_dim=8, sliding_window=5, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
    "olmo2": lambda: hf.Olmo2Config(**BASE, rms_norm_eps=1e-6),
    "phi3": lambda: hf.Phi3Config(**BASE, sliding_window=6, original_max_position_embeddings=64,
                                  rope_parameters=rope(partial_rotary_factor=0.5)),
    "smollm3": lambda: hf.SmolLM3Config(**{**BASE, "num_hidden_layers": 4},
                                        rope_parameters=rope(rope_theta=50000.0)),
}


def jitter(model):
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn_like(p)


def main(out, names):
    for name in names or CONFIGS:
        torch.manual_seed(sorted(CONFIGS).index(name))
        config = CONFIGS[name]()
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        jitter(model)
        lengths = [20, 13, 7, 20]
        rows = [torch.randint(3, 96, (n,)) for n in lengths]
        golden = {}
        total = max(lengths)
        for side in ["right", "left"]:
            ids = torch.zeros(4, total, dtype=torch.long)
            mask = torch.zeros(4, total, dtype=torch.long)
            logits = torch.zeros(4, total, 96)
            logprobs = torch.zeros(4, total - 1)
            for r, row in enumerate(rows):
                n = len(row)
                at = 0 if side == "right" else total - n
                ids[r, at:at + n], mask[r, at:at + n] = row, 1
                with torch.no_grad():
                    one = model(row[None]).logits[0]
                logits[r, at:at + n] = one
                logprobs[r, at:at + n - 1] = one[:-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
            golden.update({f"{side}.input_ids": ids, f"{side}.attention_mask": mask,
                           f"{side}.logits": logits, f"{side}.token_logprobs": logprobs})
        nll = sum(-model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None]).sum()
                  for row in rows)
        loss = nll / sum(n - 1 for n in lengths)
        loss.backward()
        golden["right.loss"] = loss.detach()[None]
        for key, p in model.named_parameters():
            golden[f"grad_norm.{key}"] = p.grad.norm()[None]
            if "layers.1." in key and ("q_proj" in key or "qkv_proj" in key) or "h.1.attn.c_attn.w" in key:
                golden[f"grad.{key}"] = p.grad.clone()
        with torch.no_grad():
            texts = []
            for row in rows:
                seen = row
                for _ in range(24):
                    last = model(seen[None]).logits[0, -1]
                    last[EOS] = -torch.inf
                    seen = torch.cat([seen, last.argmax()[None]])
                texts.append(seen[len(row):])
            golden["greedy.output_ids"] = torch.stack(texts)
        folder = Path(out) / f"tiny-{name}"
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file(golden, folder / "golden.safetensors")
        print(folder, f"loss {loss.item():.4f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
