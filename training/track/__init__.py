"""MLflow runs, the model registry and the comparison of runs."""
