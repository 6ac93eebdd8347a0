"""Hyperparameter search: experiments in clones, search spaces, the study, its report."""
