"""Metrics of preferences: what a shard adds to each, and what each means.

All are sums (``dpo_jax/metrics.py``): shards, micro-batches and evaluation batches add up to the exact value of the
whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dpo_jax.metrics import Ratio, correlation, mean
from dpo_jax.types import CHOSEN, REJECTED, UNUSED, Array, SequenceLogps

SIDES = {"chosen": CHOSEN, "rejected": REJECTED}

# name -> (meaning, when to worry). ``<loss>`` and ``<number>`` stand for names.
GLOSSARY: dict[str, tuple[str, str]] = {
    "loss": (
        "What is minimised: the weighted sum of the mean of every loss.",
        "It is not finite; or it falls on training data while it rises on held-out data. Values of different losses, "
        "or of one loss under different β, cannot be compared.",
    ),
    "loss/<loss>": (
        "One loss of a sum, before its weight.",
        "One term is so large that the others do not matter, or two pull against each other.",
    ),
    "rewards/chosen": (
        "Mean implicit reward of chosen (desirable) answers: β times the summed log-ratio; for a loss without a "
        "reference, β times its reduced log-probability.",
        "It falls steadily: chosen answers become less likely than at the start (see displacement).",
    ),
    "rewards/rejected": (
        "The same for rejected (undesirable) answers.",
        "It falls without end while the margin no longer grows: the policy moves away from all of the data.",
    ),
    "rewards/margins": (
        "Mean of reward(chosen) − reward(rejected) over pairs; 0 at the first step where there is a reference.",
        "It is not 0 at step 0: policy and reference are scored differently.",
    ),
    "rewards/accuracies": (
        "Share of pairs with reward(chosen) > reward(rejected), strictly: a tie is wrong, so it is 0 while policy and "
        "reference are the same.",
        "It stays near ½ on held-out pairs, or reaches 1 on training pairs only.",
    ),
    "logps/chosen": (
        "Mean log-probability of chosen answers, summed over tokens, nats.",
        "It falls by tens of nats: the policy forgets how to write such answers.",
    ),
    "logps/rejected": (
        "The same for rejected answers.",
        "It falls together with logps/chosen.",
    ),
    "logps/chosen_per_token": (
        "Log-probability of a token of a chosen answer: sum over all tokens / number of tokens, nats. Its negative is "
        "the negative log-likelihood whose exponential is the perplexity.",
        "It falls clearly below that of the reference.",
    ),
    "logps/rejected_per_token": (
        "The same for rejected answers.",
        "It is below −10: rejected answers have become all but impossible.",
    ),
    "log_ratio/mean": (
        "Mean over the batch's answers of log π(y|x) − log π_ref(y|x), summed over tokens, nats. An estimate of "
        "KL(π‖π_ref) only as far as the answers resemble the policy's own samples; on others it may be negative.",
        "Its size passes some tens of nats: the policy has left the reference.",
    ),
    "lengths/chosen": (
        "Mean number of tokens of chosen answers that count.",
        "It is far from the length of real answers: truncation, or a wrong mask.",
    ),
    "lengths/rejected": (
        "The same for rejected answers.",
        "It differs much from lengths/chosen: the loss can tell the two apart by length alone.",
    ),
    "entropy": (
        "Mean entropy of the policy's next-token distribution over answer tokens, nats.",
        "It collapses toward 0 (the policy repeats itself) or rises quickly (the model comes apart).",
    ),
    "margin_length_correlation": (
        "Pearson correlation, over pairs, of the reward margin with the difference of lengths |w| − |l|.",
        "It is far from 0 (beyond ±0.5): reward is length; try r_dpo, reduction 'mean' or 'desensitized'.",
    ),
    "displacement": (
        "Likelihood displacement: share of chosen (desirable) answers that are less likely than under the reference.",
        "It is above ½: the margin grows only because rejected answers fall faster; try '+ sft', dpop or a larger β.",
    ),
    "grad_norm": (
        "L2 norm of the gradient of the whole batch, before clipping.",
        "It jumps by orders of magnitude, or is far above optim.clip_norm at every step: lower the learning rate.",
    ),
    "learning_rate": (
        "The rate of the step, after warmup and decay.",
        "It is not what the schedule should give.",
    ),
    "tokens": (
        "Target tokens seen since the start of the run.",
        "It grows by less a step than the data's mean length suggests: answers are cut or masked.",
    ),
    "samples/<number>": (
        "Of answers sampled to held-out prompts: reward (P under the ground truth), kl (mean log-ratio to the start of "
        "the run, an unbiased estimate of KL(policy ‖ reference) in nats a sequence), their standard errors (_se), "
        "length in tokens, eos_share, repetition (share of trigrams that repeat).",
        "kl is more than rounding at step 0: the sampler draws from something else than the policy that is scored. kl "
        "grows while reward does not: over-optimisation. eos_share falls or repetition rises: the policy exploits the "
        "judge rather than writing better.",
    ),
    "<loss>/<number>": (
        "A number of the whole batch that a loss uses: KTO's reference point z (nats), BCO's shift δ, β-DPO's β.",
        "z stays at 0 or grows without end; δ runs away from 0; the dynamic β sits at its floor.",
    ),
}


def preference_metrics(
    policy: SequenceLogps,
    reference: SequenceLogps | None,
    role_XA: Array,
    reward_XA: Array,
) -> dict[str, Any]:
    """Metrics of one shard from the scores of its answers.

    Args:
      policy: [X, A].
      reference: the same under the reference; None when the objective reads none.
      role_XA: int32, what each answer is.
      reward_XA: float32, β times the log-ratio or log-probability that the objective rewards.

    Returns:
      Metrics by the names of ``GLOSSARY``.
    """
    metrics: dict[str, Any] = {}
    for side, role in SIDES.items():
        here_XA = role_XA == role
        metrics[f"rewards/{side}"] = mean(reward_XA, here_XA)
        metrics[f"logps/{side}"] = mean(policy.sum, here_XA)
        metrics[f"logps/{side}_per_token"] = _ratio(policy.sum, policy.count, here_XA)
        metrics[f"lengths/{side}"] = mean(policy.count, here_XA)
    metrics["entropy"] = _ratio(policy.entropy, policy.count, role_XA != UNUSED)
    if role_XA.shape[1] == 2:
        metrics |= _pair_metrics(policy, role_XA, reward_XA)
    if reference is not None:
        ratio_XA = policy.sum - reference.sum
        metrics["log_ratio/mean"] = mean(ratio_XA, role_XA != UNUSED)
        metrics["displacement"] = mean((ratio_XA < 0).astype(jnp.float32), role_XA == CHOSEN)
    return metrics


def statistic_metrics(numbers: Mapping[str, Mapping[str, Array]], answers: Array) -> dict[str, Ratio]:
    """The scalars that losses' statistics gave, weighted by the shard's number of answers."""
    return {
        f"{loss}/{name}": Ratio(value * answers, answers)
        for loss, values in numbers.items()
        for name, value in values.items()
        if jnp.ndim(value) == 0
    }


def _pair_metrics(policy: SequenceLogps, role_XA: Array, reward_XA: Array) -> dict[str, Any]:
    pair_X = (role_XA[:, 0] == CHOSEN) & (role_XA[:, 1] == REJECTED)
    margin_X = reward_XA[:, 0] - reward_XA[:, 1]
    return {
        "rewards/margins": mean(margin_X, pair_X),
        # Compared before they are subtracted: the difference of two unequal rewards may round to 0.
        "rewards/accuracies": mean((reward_XA[:, 0] > reward_XA[:, 1]).astype(jnp.float32), pair_X),
        "margin_length_correlation": correlation(margin_X, policy.count[:, 0] - policy.count[:, 1], pair_X),
    }


def _ratio(numerator_XA: Array, denominator_XA: Array, mask_XA: Array) -> Ratio:
    return Ratio(
        jnp.sum(jnp.where(mask_XA, numerator_XA, 0.0)),
        jnp.sum(jnp.where(mask_XA, denominator_XA, 0.0)),
    )
