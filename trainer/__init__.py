"""How DC-DiT is trained: data, randomness, engines, checkpoints, and the entry points a person runs."""
