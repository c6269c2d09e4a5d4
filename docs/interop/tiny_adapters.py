"""Writes adapters made by PEFT with what it computes from them, for `crates/rlhf-model/tests/adapters`,
and checks adapters that rlhf-model wrote.

    python docs/interop/tiny_adapters.py make crates/rlhf-model/tests/models crates/rlhf-model/tests/adapters
    python docs/interop/tiny_adapters.py check OUT

`OUT` is what `cargo run -p rlhf-model --example save_for_transformers -- OUT` wrote: its folders
`adapter-*` hold a model, an adapter beside it and the logits of both together. Needs torch,
transformers, peft and safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

CONFIGS = {
    "lora": ("tiny-mistral", dict(target_modules=["q_proj", "v_proj"])),
    "rslora": ("tiny-phi3", dict(target_modules="all-linear", use_rslora=True)),
    "dora": ("tiny-qwen3", dict(target_modules=["k_proj", "o_proj", "up_proj"], use_dora=True)),
    "transposed": ("tiny-gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    "transposed-dora": ("tiny-gpt2", dict(target_modules=["c_fc"], fan_in_fan_out=True, use_dora=True)),
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                attn_implementation="eager").eval()


def make(models, out):
    for name, (model, options) in CONFIGS.items():
        torch.manual_seed(sorted(CONFIGS).index(name))
        base = load(Path(models) / model)
        peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6.0,
                                               lora_dropout=0.0, **options)).eval()
        for key, p in peft.named_parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
        ids = torch.randint(3, 96, (2, 15))
        logits = peft(ids).logits
        loss = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()
        loss.backward()
        golden = {"ids": ids, "logits": logits.detach()}
        for key, p in peft.named_parameters():
            if p.requires_grad:
                # As the file names it.
                key = key.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
                golden[f"grad.{key}"] = p.grad.clone()
        folder = Path(out) / name
        peft.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = model
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        save_file(golden, folder / "golden.safetensors")
        print(folder, f"loss {loss.item():.4f}")


def check(out):
    folders = sorted(Path(out).glob("adapter-*"))
    if not folders:
        raise SystemExit(f"{out}: no folder adapter-*")
    for folder in folders:
        golden = json.loads((folder / "rlhf_logits.json").read_text())
        model = PeftModel.from_pretrained(load(folder), folder / "adapter").eval()
        with torch.no_grad():
            theirs = model(torch.tensor(golden["ids"])).logits
        ours = torch.tensor(golden["logits"], dtype=torch.float64).view(theirs.shape)
        difference = (ours - theirs.double()).abs().max().item()
        print(f"{folder.name:24} differs by {difference:.1e}")
        if not difference <= 1e-4:
            raise SystemExit("differences above 1e-4")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](*sys.argv[2:])
