"""Policy, critic, reference and reward models on one backbone: loading, adapters, log-probabilities, saving."""
