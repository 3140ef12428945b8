"""The Triton model repository and the rollout of a version."""
