"""The demo's network as ONNX, checked in onnxruntime against torch."""

import importlib
import logging
import warnings

import torch

from quantops import export


def export_and_check(model, data, path):
    """Whether onnxruntime gives the logits of the evaluated model, within 1e-5 of the largest; one line says so. True
    where a package is missing, which the line then names."""
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(f"Not exported as ONNX, which needs {error.name}: pip install 'quantops[export]'")
        return True
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    training = model.training
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        export.onnx(model, data.x_test[:2], path)
        want = model(data.x_test)
    model.train(training)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32; the default is int8
    session = onnxruntime.InferenceSession(str(path), options)
    (got,) = session.run(None, {session.get_inputs()[0].name: data.x_test.numpy()})
    part = float((torch.from_numpy(got) - want).abs().max() / want.abs().max())
    differ = int((torch.from_numpy(got).argmax(1) != want.argmax(1)).sum())
    print(
        f"ONNX: {path}, {path.stat().st_size:,} bytes; on {len(want)} images onnxruntime's logits "
        f"are within {part:.0e} of the largest, {differ} classes differ"
    )
    return part <= 1e-5
