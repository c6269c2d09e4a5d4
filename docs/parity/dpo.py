"""The same training by rlhf-dpo and by TRL's DPOTrainer, step by step.

    python docs/parity/dpo.py MODEL_DIR OUT

Makes 64 pairs of plain text, trains MODEL_DIR on them with `cargo run -p rlhf-dpo --example train_pairs`, then
with TRL on the pairs in the order that the example wrote, and compares loss, gradient norm and log-probs of
every step. Fails on a loss that differs by more than 1e-4.
"""

import json
import os
import random
import subprocess
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

model_dir, out = sys.argv[1:3]
os.makedirs(out, exist_ok=True)
ours = os.path.join(out, "ours")
pairs = os.path.join(out, "pairs.jsonl")
words = "the a small red river boat sings slowly over every quiet hill and never asks why".split()
rng = random.Random(1)
text = lambda least, most: " " + " ".join(rng.choice(words) for _ in range(rng.randint(least, most)))
with open(pairs, "w") as f:
    for _ in range(64):
        row = {"prompt": text(3, 12).strip(), "chosen": text(2, 16), "rejected": text(2, 16)}
        f.write(json.dumps(row) + "\n")

command = ["cargo", "run", "--quiet", "-p", "rlhf-dpo", "--example", "train_pairs", "--", model_dir, pairs, ours]
subprocess.run(command, check=True)
with open(os.path.join(ours, "metrics.jsonl")) as f:
    mine = [json.loads(line) for line in f]
with open(os.path.join(ours, "ordered.jsonl")) as f:
    ordered = [json.loads(line) for line in f]
rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in ordered]


class Log(TrainerCallback):
    steps = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.steps.append(logs)


torch.manual_seed(0)
load = lambda: AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
settings = DPOConfig(
    output_dir=os.path.join(out, "trl"),
    per_device_train_batch_size=8,
    max_steps=20,
    max_length=256,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
    beta=0.1,
    loss_type="sigmoid",
    train_sampling_strategy="sequential",
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_dropout=True,
    disable_tqdm=True,
)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
trainer = DPOTrainer(
    model=load(),
    ref_model=load(),
    args=settings,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[Log()],
)
trainer.remove_callback(PrinterCallback)
trainer.train()

columns = [("loss", "loss"), ("grad_norm", "grad_norm"), ("chosen_logprobs", "logps/chosen"), ("rejected_logprobs", "logps/rejected")]
worst = dict.fromkeys((name for name, _ in columns), 0.0)
print("step  rlhf-dpo       TRL            difference")
for step, (a, b) in enumerate(zip(mine, Log.steps, strict=True)):
    for name, theirs in columns:
        worst[name] = max(worst[name], abs(a[f"dpo/{name}"] - float(b[theirs])))
    x, y = a["dpo/loss"], float(b["loss"])
    print(f"{step + 1:4}  {x:.10f}  {y:.10f}  {abs(x - y):.1e}")
for name, d in worst.items():
    print(f"largest difference of {name}: {d:.1e}")
sys.exit(worst["loss"] > 1e-4)
