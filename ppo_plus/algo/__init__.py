"""Pure functions of PPO for language models: losses, advantages, KL estimators and masked statistics per token.

Notation:
    B: sequences in the batch. R: response tokens, right-padded. V: vocabulary size.
    mask: 1 (or True) for response tokens that are actions, up to and including EOS, else 0, `(B, R)`. The mask of a
        conversation with tools has holes: what they answered.
    logprobs: natural log of the probability of the token that was sampled, nats.
    policy, old, reference: the model being trained, the same model at sampling time, the frozen model.

Losses are returned per token and never reduced: the trainer masks, sums and divides once, by the token
count of the whole minibatch, so that the gradient does not depend on how the minibatch is split.
Values outside `mask`, NaN included, never affect the result of a function that takes a mask.
"""

from .advantages import (
    gae,
    gate_critic,
    leave_one_out_mean,
    length_adaptive_lam,
    move_to_actions,
    shape_rewards,
    truncated_importance_weights,
)
from .kl import (
    KL_ESTIMATORS,
    MAX_KL_ERROR,
    band_kl_coef,
    exact_kl,
    kl_estimate,
    log_kl_error,
    pi_kl_coef,
    proportional_kl_coef,
)
from .logprobs import entropy, entropy_from_logprobs, logprobs_and_entropy, scaled_log_softmax, token_logprobs
from .losses import (
    clipped_policy_loss,
    clipped_value_loss,
    kl_penalty_policy_loss,
    masked_policy_loss,
    pairwise_loss,
    unclipped_policy_loss,
)
from .pessimism import pessimistic_mean
from .statistics import Average, Reduce, ema, explained_variance, masked_moments, whiten

__all__ = [
    "KL_ESTIMATORS",
    "MAX_KL_ERROR",
    "Average",
    "Reduce",
    "band_kl_coef",
    "clipped_policy_loss",
    "clipped_value_loss",
    "ema",
    "entropy",
    "entropy_from_logprobs",
    "exact_kl",
    "explained_variance",
    "gae",
    "gate_critic",
    "kl_estimate",
    "kl_penalty_policy_loss",
    "leave_one_out_mean",
    "length_adaptive_lam",
    "log_kl_error",
    "logprobs_and_entropy",
    "masked_moments",
    "masked_policy_loss",
    "move_to_actions",
    "pairwise_loss",
    "pessimistic_mean",
    "pi_kl_coef",
    "proportional_kl_coef",
    "scaled_log_softmax",
    "shape_rewards",
    "token_logprobs",
    "truncated_importance_weights",
    "unclipped_policy_loss",
    "whiten",
]
