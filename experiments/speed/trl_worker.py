"""The worker that takes steps of TRL's DPOTrainer, in its own virtual environment; nothing of dpo_jax is imported.

    python trl_worker.py '{"model": FOLDER, "batches": FILE, "bf16": false, "tuned": false, "out": FOLDER}'

``tuned`` is TRL at its best: activations kept instead of recomputed, the reference scored once before training, and on
a CPU the head on answer tokens only, which TRL does on GPUs as it comes.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import datasets
import torch
import transformers
import trl

GPU = torch.cuda.is_available()
RATE_SIZES = (
    ((8192, 2048, 8192), (8192, 8192, 8192), (16384, 8192, 16384))
    if GPU
    else ((768, 576, 1536), (1024, 1024, 1024), (512, 576, 8192))
)


def main(model: str, batches: str, bf16: bool, tuned: bool, out: str) -> None:
    """Trains, waiting for a line before each step."""
    with open(batches, encoding="utf-8") as file:
        pairs = json.load(file)
    rows = [
        {"prompt_ids": p["prompt"], "chosen_ids": p["answers"][0], "rejected_ids": p["answers"][1]}
        for batch in pairs
        for p in batch
    ]
    if tuned and not GPU:
        trl.trainer.utils._use_triton = lambda device: True
    begin = time.perf_counter()
    config = trl.DPOConfig(
        output_dir=out,
        beta=0.1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_steps=len(pairs),
        max_length=512,
        bf16=bf16,
        gradient_checkpointing=not tuned,
        precompute_ref_log_probs=tuned,
        optim="adamw_torch",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=not GPU,
    )
    trainer = Trainer(
        sizes=[len(batch) for batch in pairs],
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        callbacks=[Turns()],
    )
    say(
        load_seconds=time.perf_counter() - begin,
        positions=trainer.positions,
        reference_seconds=trainer.reference_seconds,
    )
    trainer.train()


class Trainer(trl.DPOTrainer):
    """Reads token ids that are there already, in the order and the batches given."""

    def __init__(self, sizes, **settings):
        self.sizes, self.reference_seconds = sizes, 0.0
        super().__init__(**settings)

    def _precompute_ref_logps(self, *args, **kwargs):
        begin = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds = time.perf_counter() - begin
        return dataset

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=Consecutive(self.sizes), collate_fn=self.data_collator
        )

    @property
    def positions(self):
        """Positions computed a step: both sides, padded to the longest of the batch."""
        return [int(batch["input_ids"].numel()) for batch in self.get_train_dataloader()]


class Consecutive:
    """Batches of the given sizes."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        at = 0
        for size in self.sizes:
            yield list(range(at, at := at + size))


class Turns(transformers.TrainerCallback):
    """Waits for its turn before a step, and reports after it."""

    def on_step_begin(self, args, state, control, **kwargs):
        while (line := sys.stdin.readline()).startswith("rate"):
            say(rate=matmul_rate(torch.bfloat16 if args.bf16 else torch.float32))
        if not line:
            sys.exit(0)
        synchronize()
        self.begin, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds, self.cpu_seconds = time.perf_counter() - self.begin, time.process_time() - self.cpu

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            say(seconds=self.seconds, cpu_seconds=self.cpu_seconds, loss=logs["loss"], peak_bytes=peak_bytes())


def synchronize():
    """Waits for the GPU."""
    if GPU:
        torch.cuda.synchronize()


def peak_bytes():
    """Most memory of its device that this process has held; where that is the processor, all of its memory."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rate(dtype):
    """FLOP/s of the best matrix product, of random numbers: products of equal ones take less power, and less time."""
    best, device = 0.0, "cuda" if GPU else "cpu"
    for m, k, n in RATE_SIZES:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        for _ in range(9):
            synchronize()
            begin = time.perf_counter()
            a @ b
            synchronize()
            best = max(best, 2 * m * k * n / (time.perf_counter() - begin))
    return best


def say(**numbers):
    """A line for run.py, among whatever libraries print."""
    print("@" + json.dumps(numbers), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
