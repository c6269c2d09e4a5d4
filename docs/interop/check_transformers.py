#!/usr/bin/env python3
"""Load folders saved by rlhf-model with `transformers` and compare what they compute.

    cargo run -p rlhf-model --example save_for_transformers -- OUT
    python docs/interop/check_transformers.py OUT

Every folder in OUT holds a model and `rlhf_logits.json` (token ids, and the logits or scores that
rlhf-model computed). A difference above the tolerance, a warning about missing or unexpected weights,
or an empty OUT fails. Needs `transformers` (4.56 or newer, or 5) and `torch`; no network.
"""
import json
import pathlib
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

TOLERANCE = 1e-4


def check(folder: pathlib.Path) -> float:
    golden = json.loads((folder / "rlhf_logits.json").read_text())
    ids = torch.tensor(golden["ids"])
    auto = AutoModelForCausalLM if "logits" in golden else AutoModelForSequenceClassification
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise SystemExit(f"{folder}: {kind}: {info[kind]}")
    model.eval()
    with torch.no_grad():
        if "logits" in golden:
            ours, theirs = golden["logits"], model(ids).logits
        else:
            # One row at a time: without a padding token the last position is the sequence's end.
            theirs = torch.cat([model(row[None]).logits for row in ids])
            ours = golden["scores"]
    ours = torch.tensor(ours, dtype=torch.float64).view(theirs.shape)
    return (ours - theirs.double()).abs().max().item()


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folders = sorted(p.parent for p in pathlib.Path(sys.argv[1]).glob("*/rlhf_logits.json")
                     if not p.parent.name.startswith("adapter-"))
    if not folders:
        raise SystemExit(f"{sys.argv[1]}: no folder with rlhf_logits.json")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    worst = 0.0
    for folder in folders:
        difference = check(folder)
        worst = max(worst, difference)
        print(f"{folder.name:24} differs by {difference:.1e}")
    if not worst <= TOLERANCE:
        raise SystemExit(f"differences above {TOLERANCE}")
    print(f"{len(folders)} folders load and agree")


if __name__ == "__main__":
    main()
