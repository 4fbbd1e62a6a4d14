"""Callbacks for training loops of others, and folders of transformers; each needs the package that it is for."""
