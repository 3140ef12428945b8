"""Fitting, distillation, cross-validation and hyperparameter search."""
