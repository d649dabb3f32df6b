"""Trained networks for other tools: integers that they read, and graphs that run without quantops.

Every function takes a model that :func:`quantops.quantize_` changed and that has been put into evaluation mode, leaves
it as it is, and raises before anything is written where a target cannot express what the model has.
"""

from quantops.export.aten import to_aten
from quantops.export.compressed_tensors import compressed_tensors
from quantops.export.onnx import onnx
from quantops.export.qonnx import qonnx
from quantops.export.torchao import torchao

__all__ = ["compressed_tensors", "onnx", "qonnx", "to_aten", "torchao"]
