"""Other ways to make deep networks cheaper or better to train, one a file, over the same models."""
