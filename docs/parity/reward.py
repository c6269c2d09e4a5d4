"""The same reward model by rlhf-reward and by TRL's RewardTrainer: losses step by step, accuracy at the end.

    python docs/parity/reward.py MODEL_DIR TRAIN TEST OUT [STEPS BATCH LR]

Trains with `cargo run -p rlhf-reward --example train_reward` (or the program named by TRAIN_REWARD), then with TRL
from the same first weights on the same tokens in the same order, and scores the held-out pairs with both results.
Fails where one of the first five losses differs by more than 1e-4, or the accuracies by more than their 95 % interval.
"""

import json
import math
import os
import subprocess
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer

model_dir, train, test, out = sys.argv[1:5]
steps, batch, lr = (sys.argv[5:8] + ["60", "16", "1e-3"][len(sys.argv[5:8]) :])
ours = os.path.join(out, "ours")
program = os.environ.get("TRAIN_REWARD")
command = [program] if program else "cargo run --release --quiet -p rlhf-reward --example train_reward --".split()
subprocess.run([*command, model_dir, train, test, ours, steps, batch, lr], check=True)
read = lambda name: [json.loads(line) for line in open(os.path.join(ours, name))]
mine, rows, held_out = read("metrics.jsonl"), read("ordered.jsonl"), read("test.jsonl")

pad = 0  # no completion ends with it
assert all(r[k][-1] != pad for r in rows + held_out for k in r)


def load(name):
    model = AutoModelForSequenceClassification.from_pretrained(os.path.join(ours, name), dtype=torch.float32)
    model.config.pad_token_id = pad
    return model


class Log(TrainerCallback):
    losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


tokenizer = AutoTokenizer.from_pretrained(os.path.join(ours, "init"))
tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
settings = RewardConfig(
    output_dir=os.path.join(out, "trl"),
    per_device_train_batch_size=int(batch),
    max_steps=int(steps),
    max_length=512,
    learning_rate=float(lr),
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
    center_rewards_coefficient=0.01,
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
trainer = RewardTrainer(
    model=load("init"),
    args=settings,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[Log()],
)
trainer.remove_callback(PrinterCallback)
trainer.train()


@torch.no_grad()
def accuracy(model):
    model.eval()
    score = lambda ids: model(torch.tensor([ids])).logits[0, 0].item()
    return sum(score(r["chosen_ids"]) > score(r["rejected_ids"]) for r in held_out) / len(held_out)


print("step  rlhf-reward    TRL            difference")
gaps = []
for step, (a, theirs) in enumerate(zip(mine, Log.losses, strict=True)):
    gaps.append(abs(a["reward/loss"] - theirs))
    if step < 5 or (step + 1) % 10 == 0:
        print(f"{step + 1:4}  {a['reward/loss']:.10f}  {theirs:.10f}  {gaps[-1]:.1e}")
n = len(held_out)
a, b = accuracy(load("model")), accuracy(trainer.model)
half = 1.96 * math.sqrt(max(b * (1 - b), 1e-9) / n)
print(f"held-out pairs right, of {n}: rlhf-reward {100 * a:.1f} %, TRL {100 * b:.1f} % ±{100 * half:.1f}")
sys.exit(max(gaps[:5]) > 1e-4 or abs(a - b) > half)
