"""One page about a trained model and its data: what it gets wrong, and where it looks."""
