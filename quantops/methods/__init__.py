"""Training schemes, one file each: the config for quantize_, its quantizer, and what steers the training."""
