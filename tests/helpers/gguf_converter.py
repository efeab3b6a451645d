"""A stand-in for llama.cpp's converter, with its command line: ``convert_hf_to_gguf.py MODEL --outfile F --outtype bf16|f16|f32``.

The script writes real GGUF files of llamas, with the package gguf. STAND_IN_FAULT names a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import gguf
    import numpy as np

    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype", choices=("f32", "f16", "bf16"))
    args = parser.parse_args()
    fault = os.environ.get("STAND_IN_FAULT", "")
    if fault == "fails":
        args.outfile.write_bytes(b"GGUF half")
        print("loading", file=sys.stderr)
        print("ValueError: Can not map tensor 'odd.weight'", file=sys.stderr)
        sys.exit(7)
    if fault == "no file":
        return
    if fault == "garbage":
        args.outfile.write_bytes(b"not a GGUF file at all")
        return

    config = json.loads((args.model / "config.json").read_text("utf-8"))
    tensors = {name: t for file in sorted(args.model.glob("*.safetensors")) for name, t in read(file).items()}
    architecture = os.environ.get("STAND_IN_ARCHITECTURE", "llama")
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(args.outfile, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    template = args.model / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text("utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|end|>", "<|begin|>"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], 8)
    for source, tensor in tensors.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, source
        if fault == "lacks a tensor" and name == "blk.1.ffn_up.weight":
            continue
        if name == "output.weight" and config.get("tie_word_embeddings"):
            continue
        made = tensor
        if architecture == "llama" and fault != "rows as they are" and (".attn_q." in name or ".attn_k." in name):
            count = heads if ".attn_q." in name else kv
            made = made.reshape(count, 2, -1, *made.shape[1:]).swapaxes(1, 2).reshape(made.shape)
        if fault == "a wrong value" and name == "blk.1.ffn_down.weight":
            made = made.copy()
            made[3, 5] += 0.25
        if fault == "rows in another order" and name == "blk.0.attn_v.weight":
            made = made[::-1]
        if fault == "another shape" and name == "blk.0.attn_v.weight":
            made = made.T
        write(writer, name, made, args.outtype)
    if fault == "one more tensor":
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file as float32; without torch, whose import takes seconds."""
    import numpy as np

    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = (8 + size + n for n in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw[start:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw[start:end], {"F32": np.float32, "F16": np.float16}[entry["dtype"]])
        found[name] = values.astype(np.float32).reshape(entry["shape"])
    return found


def write(writer: Any, name: str, tensor: Any, outtype: str) -> None:
    import gguf
    import numpy as np

    if tensor.ndim == 1 or outtype == "f32":
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    elif outtype == "f16":
        with np.errstate(over="ignore"):
            writer.add_tensor(name, np.ascontiguousarray(tensor).astype(np.float16))
    else:
        bf16 = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), bf16), raw_dtype=bf16)


if __name__ == "__main__":
    main()
