"""A quantized model goes to processes that are spawned, and they train the same memory."""

import os
import subprocess
import sys

SCRIPT = """
import torch, torch.multiprocessing as mp, quantops as Q
from torch import nn

def work(rank, model, x, queue):
    queue.put(model(x).detach().tolist())
    with torch.no_grad():
        model[0].parametrizations.weight.original.zero_()

if __name__ == "__main__":
    torch.manual_seed(0)
    model = Q.quantize_(nn.Sequential(nn.Linear(4, 4)), Q.MSQConfig(bits=3))
    x, queue = torch.randn(2, 4), mp.get_context("spawn").SimpleQueue()
    expected = model.share_memory()(x).tolist()
    mp.spawn(work, (model, x, queue), nprocs=1)
    print(queue.get() == expected, model[0].parametrizations.weight.original.abs().sum().item() == 0)
"""


def test_spawn(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=240)
    assert run.stdout.split() == ["True", "True"], run.stderr
