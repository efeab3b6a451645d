"""Greedy generation in a server's own environment: ``python generate.py KIND MODEL FACTS`` prints the tokens as JSON.

KIND is transformers, vllm or llama_cpp; FACTS is the file ``expected.json`` of ``smollm2.py``. The file imports the server's packages alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def transformers(model: str, facts: dict[str, Any]) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(facts["text"], return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == facts["prompt"]
    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype="auto").eval()
    made = loaded.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=facts["count"],
        do_sample=False,
        pad_token_id=0,
    )
    return made[0, tokens.shape[1] :].tolist()


def vllm(model: str, facts: dict[str, Any]) -> list[int]:
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=256, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=facts["count"])
    (made,) = llm.generate([facts["text"]], sampling)
    assert list(made.prompt_token_ids) == facts["prompt"]
    return list(made.outputs[0].token_ids)


def llama_cpp(model: str, facts: dict[str, Any]) -> list[int]:
    from llama_cpp import Llama

    # the cache in float32 too, as the reference has it: 0 is GGML_TYPE_F32
    llama = Llama(model, n_ctx=256, n_threads=1, type_k=0, type_v=0, verbose=False)
    tokens = llama.tokenize(facts["text"].encode())
    assert tokens == facts["prompt"]
    made: list[int] = []
    for token in llama.generate(tokens, temp=0.0, repeat_penalty=1.0):
        made.append(token)
        if len(made) == facts["count"]:
            break
    return made


if __name__ == "__main__":
    kind, model, facts = sys.argv[1:]
    made = globals()[kind](model, json.loads(Path(facts).read_text("utf-8")))
    print("\n" + json.dumps(made), flush=True)
