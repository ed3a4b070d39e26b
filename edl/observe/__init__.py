"""Watching a model route text: which documents, through which model, into which files."""
