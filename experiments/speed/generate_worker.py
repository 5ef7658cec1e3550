"""The worker that samples with transformers' generate, in TRL's virtual environment; nothing of dpo_jax is imported.

    python generate_worker.py '{"model": FOLDER, "prompts": FILE, "new_tokens": 64, "dtype": "float32"}'

A batch of all prompts, padded on the left, for each line that comes in.
"""

import json
import sys
import time

import torch
import transformers


def main(model: str, prompts: str, new_tokens: int, dtype: str) -> None:
    """Samples from the model itself: temperature 1, nothing cut off, ``new_tokens`` for every prompt."""
    with open(prompts, encoding="utf-8") as file:
        rows = [torch.tensor(row) for row in json.load(file)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    print("@" + json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        with torch.inference_mode():
            out = network.generate(
                ids, attention_mask=mask, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options
            )
        seconds = time.perf_counter() - begin
        print("@" + json.dumps({"seconds": seconds, "tokens": out[:, longest:].numel()}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
