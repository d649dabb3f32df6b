"""The default kernels: each op over a list, by the reference. One file per family, with a function for every op of that
family in quantops/library.py. They serve every device that has no other kernel."""

from quantops.default import activation, categorical, categorical_activation, own_scale, packing, truncate, uniform

__all__ = ["activation", "categorical", "categorical_activation", "own_scale", "packing", "truncate", "uniform"]
