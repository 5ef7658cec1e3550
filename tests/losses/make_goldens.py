"""Makes goldens.json: losses, rewards and gradients as TRL's own trainers compute them.

The trainers are made without a model: fixed token log-probabilities stand in for its forward pass, and the lines that
run between them and the loss are TRL's. Needs ``torch``, ``trl==1.16.*`` and ``transformers``; the tests need none of
them.

    python tests/losses/make_goldens.py            # writes tests/losses/goldens.json
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS, PROMPT, LONGEST = 6, 4, 9
WIDTH = PROMPT + LONGEST
KEPT_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)

# name, options of TRL's trainer
DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid_forward_kl": {"f_divergence_type": "forward_kl"},
    "sigmoid_jensen_shannon": {"f_divergence_type": "js_divergence"},
    "sigmoid_alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "sigmoid_desensitized": {"ld_alpha": 0.4},
    "sigmoid_wpo": {"use_weighting": True},
    "sigmoid_ignores_label_smoothing": {"label_smoothing": 0.2},
    "hinge": {"loss_types": ["hinge"], "beta": 0.4},
    "ipo": {"loss_types": ["ipo"]},
    "ipo_forward_kl": {"loss_types": ["ipo"], "f_divergence_type": "forward_kl"},
    "exo_pair": {"loss_types": ["exo_pair"], "label_smoothing": 1e-3},
    "nca_pair": {"loss_types": ["nca_pair"]},
    "robust": {"loss_types": ["robust"], "label_smoothing": 0.2},
    "bco_pair": {"loss_types": ["bco_pair"]},
    "sppo_hard": {"loss_types": ["sppo_hard"]},
    "aot": {"loss_types": ["aot"], "label_smoothing": 0.1},
    "aot_unpaired": {"loss_types": ["aot_unpaired"], "label_smoothing": 0.1},
    "apo_zero": {"loss_types": ["apo_zero"]},
    "apo_down": {"loss_types": ["apo_down"]},
    "discopop": {"loss_types": ["discopop"]},
    "sigmoid_norm": {"loss_types": ["sigmoid_norm"], "beta": 5.0},
    "sft": {"loss_types": ["sft"]},
    "mpo": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
KTO_CASES: dict[str, dict[str, Any]] = {
    "kto": {"desirable_weight": 1.2, "undesirable_weight": 0.9},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "calculate_KL": False},
}
CPO_CASES: dict[str, dict[str, Any]] = {
    "cpo": {"loss_type": "sigmoid", "label_smoothing": 0.1},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("goldens.json"), help="file to be written")
    args = parser.parse_args()
    answers = make_answers(np.random.default_rng(0))
    cases = {f"dpo/{name}": run_dpo(answers, options) for name, options in DPO_CASES.items()}
    cases |= {f"kto/{name}": run_kto(answers, options) for name, options in KTO_CASES.items()}
    cases |= {f"cpo/{name}": run_from_logits(CPOTrainer, answers, options) for name, options in CPO_CASES.items()}
    cases["orpo/orpo"] = run_from_logits(ORPOTrainer, answers, {})
    made_by = {package: version(package) for package in ("trl", "torch", "transformers")}
    args.out.write_text(_to_json({"made_by": made_by, "answers": answers, "cases": cases}))
    print(f"{len(cases)} cases written to {args.out}")


def make_answers(rng: np.random.Generator) -> dict[str, Any]:
    """Token log-probabilities of 2 · PAIRS answers, all chosen ones first, as ragged lists of fp32 numbers."""
    lengths = [1, 3, 9, 4, 6, 2, 5, 2, 9, 4, 1, 7]
    policy = [_draw(rng, n) for n in lengths]
    reference = [[_fp32(v + d) for v, d in zip(a, 0.3 * rng.standard_normal(len(a)), strict=True)] for a in policy]
    reference = [[min(v, -0.01) for v in a] for a in reference]
    return {
        "policy": policy,
        "reference": reference,
        "log_collision": [_draw(rng, n) for n in lengths],
        "prompt": [_draw(rng, PROMPT - 1) for _ in lengths],
        "desirable": [i % 3 != 1 for i in range(len(lengths))],
        "mismatched_policy": _draw(rng, len(lengths), 4.0),
        "mismatched_reference": _draw(rng, len(lengths), 5.0),
    }


def run_dpo(answers: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_types": ["sigmoid"],
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
    } | options
    settings.setdefault("loss_weights", [1.0] * len(settings["loss_types"]))
    policy = _rows(answers["policy"]).requires_grad_()
    trainer = _bare(DPOTrainer, settings)
    trainer.model = _Model(policy, _rows(answers["log_collision"]))
    trainer.ref_model = _Model(_rows(answers["reference"]))
    trainer.args = SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None)
    mask = _completion_mask(answers)
    inputs = {"input_ids": mask.clone(), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    return _result(loss, policy, answers, {k: v[-1] for k, v in trainer._metrics["train"].items()}, options)


def run_kto(answers: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "beta": 0.1,
        "loss_type": "kto",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "calculate_KL": True,
    } | options
    policy = _rows(answers["policy"]).requires_grad_()
    trainer = _bare(KTOTrainer, settings)
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    # A sequence of two tokens is a mismatched one: its only target carries the whole log-probability.
    trainer.model = _Model(policy, short=torch.tensor(answers["mismatched_policy"])[:, None])
    trainer.ref_model = _Model(
        _rows(answers["reference"]), short=torch.tensor(answers["mismatched_reference"])[:, None]
    )
    mask = _completion_mask(answers)
    short = torch.ones((mask.shape[0], 2), dtype=torch.long)
    inputs = {
        "input_ids": mask.clone(),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(answers["desirable"]),
        "KL_input_ids": short,
        "KL_attention_mask": short,
        "KL_completion_mask": short,
    }
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    return _result(loss, policy, answers, {k: v[-1] for k, v in trainer._metrics["train"].items()}, options)


def run_from_logits(kind: type, answers: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """CPO and ORPO take logits: a vocabulary of two, whose token 0 is the target of the given log-probability."""
    settings = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "cpo_alpha": 1.0,
        "simpo_gamma": 0.5,
        "alpha": 0.0,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
    } | options
    policy = _rows(answers["policy"]).requires_grad_()
    prompt = torch.zeros((2 * PAIRS, WIDTH - 1))
    prompt[:, : PROMPT - 1] = torch.tensor(answers["prompt"])
    # Unused places get some probability that is neither 0 nor 1; TRL masks them.
    logp = torch.where(policy + prompt == 0, torch.full_like(policy, -0.5), policy + prompt)
    logits = torch.stack([logp, torch.log(-torch.expm1(logp))], dim=-1)
    logits = torch.cat([logits, torch.zeros(2 * PAIRS, 1, 2)], dim=1)  # nothing is predicted after the last token
    trainer = _bare(kind, settings)
    mask = _completion_mask(answers)
    used = mask.clone()
    used[:, :PROMPT] = 1
    labels = torch.where(mask == 1, 0, -100)
    batch: dict[str, torch.Tensor] = {}
    for side, half in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
        batch[f"{side}_input_ids"] = torch.zeros_like(mask[half])
        batch[f"{side}_attention_mask"], batch[f"{side}_labels"] = used[half], labels[half].clone()
    loss, metrics = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)
    return _result(loss, policy, answers, metrics, options)


class _Model:
    """Answers TRL's call of a model with fixed log-probabilities of targets, [answers, WIDTH − 1]."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, logps: torch.Tensor, collision: torch.Tensor | None = None, short: torch.Tensor | None = None):
        self._logps, self._short = logps, short
        self._collision = torch.zeros_like(logps) if collision is None else collision

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        logps = self._short if input_ids.shape[1] == 2 and self._short is not None else self._logps
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps,
            log_sum_sq_probs=self._collision,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def _bare(kind: type, settings: dict[str, Any]) -> Any:
    """A trainer that has not been initialised, with the attributes that its loss reads."""
    trainer = kind.__new__(kind)

    def alone(value: torch.Tensor) -> torch.Tensor:
        return value

    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=alone, gather_for_metrics=alone)
    trainer.aux_loss_enabled = trainer.precompute_ref_logps = False
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


def _result(
    loss: torch.Tensor, policy: torch.Tensor, answers: dict[str, Any], metrics: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    loss.backward()
    gradient = _unrows(policy.grad, answers["policy"])
    kept = {name: metrics[name] for name in KEPT_METRICS if name in metrics}
    return {"options": options, "loss": loss.item(), "metrics": kept, "gradient": gradient}


def _rows(ragged: list[list[float]]) -> torch.Tensor:
    """[answers, WIDTH − 1], zero outside the answer; the prompt's last token predicts the answer's first."""
    rows = torch.zeros((len(ragged), WIDTH - 1))
    for row, values in zip(rows, ragged, strict=True):
        row[PROMPT - 1 : PROMPT - 1 + len(values)] = torch.tensor(values)
    return rows


def _unrows(rows: torch.Tensor, like: list[list[float]]) -> list[list[float]]:
    return [row[PROMPT - 1 : PROMPT - 1 + len(a)].tolist() for row, a in zip(rows, like, strict=True)]


def _completion_mask(answers: dict[str, Any]) -> torch.Tensor:
    mask = torch.zeros((2 * PAIRS, WIDTH), dtype=torch.long)
    for row, answer in zip(mask, answers["policy"], strict=True):
        row[PROMPT : PROMPT + len(answer)] = 1
    return mask


def _to_json(tree: dict[str, Any]) -> str:
    """JSON with lists of numbers on one line each."""
    text = json.dumps(tree, indent=1)
    return re.sub(r"\n\s+(?=[-0-9tf])|(?<=[0-9e])\n\s+(?=\])", " ", text).replace("[ ", "[").replace(" ]", "]") + "\n"


def _draw(rng: np.random.Generator, n: int, scale: float = 1.0) -> list[float]:
    return [_fp32(v) for v in -0.02 - scale * rng.gamma(1.5, 1.0, n)]


def _fp32(value: float) -> float:
    return float(np.float32(value))


if __name__ == "__main__":
    main()
