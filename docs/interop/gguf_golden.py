"""What the tests of GGUF compare with, made by the `gguf` package (0.19).

    python gguf_golden.py MODELS OUT

MODELS is crates/rlhf-model/tests/models, OUT crates/rlhf-model/tests/golden/gguf. Writes
blocks.gguf: for each format a tensor of random blocks and, as NAME.f32, what the package decodes;
names.json: what the package's table of names makes of every tensor of the tiny models, `N` standing
for the layer.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter, GGMLQuantizationType as T, MODEL_ARCH
from gguf import get_tensor_name_map, quants

MODELS = {
    "llama": "LLAMA", "tiny-mistral": "LLAMA", "tiny-qwen2-yarn": "QWEN2", "tiny-qwen3": "QWEN3",
    "tiny-gemma2": "GEMMA2", "tiny-gemma3": "GEMMA3", "tiny-gpt2": "GPT2", "tiny-olmo2": "OLMO2",
    "tiny-phi3": "PHI3", "tiny-smollm3": "SMOLLM3",
}
# Where a block keeps its 16-bit scales: random bytes there would not be finite.
SCALES = {T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}


def blocks(out: Path) -> None:
    rng = np.random.default_rng(4)
    writer = GGUFWriter(out / "blocks.gguf", "none")
    for kind in (T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K):
        numbers, size = GGML_QUANT_SIZES[kind]
        if kind in SCALES:
            # The package decodes these but does not encode them.
            raw = rng.integers(0, 256, (1, size), dtype=np.uint8)
            for at in SCALES[kind]:
                raw[:, at:at + 2] = np.float16(rng.normal()).view(np.uint16).reshape(1).view(np.uint8)
        else:
            raw = quants.quantize(rng.normal(size=(2, 32)).astype(np.float32), kind)
        writer.add_tensor(kind.name, raw, raw_dtype=kind if kind != T.F16 else None)
        writer.add_tensor(kind.name + ".f32", quants.dequantize(raw, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def names(models: Path, out: Path) -> None:
    table = {}
    for folder, arch in MODELS.items():
        with open(models / folder / "model.safetensors", "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        known = get_tensor_name_map(MODEL_ARCH[arch], 1)
        found = {}
        for name in header:
            if name == "__metadata__" or any(f".{n}." in name for n in range(1, 9)):
                continue
            found[name.replace(".0.", ".N.")] = known.get_name(
                name, try_suffixes=(".weight", ".bias")).replace(".0.", ".N.")
        table[folder] = found
    (out / "names.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    out = Path(sys.argv[2])
    out.mkdir(exist_ok=True)
    blocks(out)
    names(Path(sys.argv[1]), out)
