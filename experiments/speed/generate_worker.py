"""The worker that samples with transformers' generate, in TRL's virtual environment; nothing of dpo_jax is imported.

    python generate_worker.py '{"model": FOLDER, "prompts": FILE, "rows": 64, "new_tokens": 64, "ends": [0, 30], …}'

All prompts, so many rows at a time and padded on the left, for each line that comes in.
"""

import json
import sys
import time

import torch
import transformers


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, mask), as long as the longest row."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def count(answers: torch.Tensor, ends: torch.Tensor) -> int:
    """Tokens of all answers, each up to its first end."""
    ended = torch.isin(answers, ends).int()
    return int((ended.cumsum(1) - ended == 0).sum())


def main(model: str, prompts: str, rows: int, new_tokens: int, ends: list[int], dtype: str) -> None:
    """Samples from the model itself: temperature 1, nothing cut off."""
    with open(prompts, encoding="utf-8") as file:
        asked = json.load(file)
    batches = [padded(asked[start : start + rows]) for start in range(0, len(asked), rows)]
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"eos_token_id": ends} if ends else {"min_new_tokens": new_tokens}
    print("@" + json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        tokens, begin = 0, time.perf_counter()
        for ids, mask in batches:
            with torch.inference_mode():
                out = network.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
            tokens += count(out[:, ids.shape[1] :], torch.tensor(ends, dtype=torch.long))
        print("@" + json.dumps({"seconds": time.perf_counter() - begin, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
