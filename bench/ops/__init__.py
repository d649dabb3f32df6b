"""The benchmark of the ops, and of whole training steps: a file per family of ops, and what times them."""
