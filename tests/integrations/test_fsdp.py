"""FSDP2 of models of transformers on two processes: tied weights, Conv1D, experts."""

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import quantops as Q
from processes import run_on_all
from zoo import gpt2, mixtral, tokens

CONFIGS = [Q.MSQConfig(bits=6, per_row=True), Q.TruncQuantConfig(bits=(6, 3), per_row=True)]


@pytest.mark.filterwarnings("ignore:quantize_")
def test_sharded_models_of_transformers_are_those_of_one_process():
    run_on_all(_compare)


def _compare(rank):
    for make, layers in ((gpt2, lambda m: m.transformer.h), (mixtral, lambda m: m.model.layers)):
        for config in CONFIGS:
            expected = Q.quantize_(make().eval(), config)  # without dropout
            model = copy.deepcopy(expected)
            for block in layers(model):
                fully_shard(block)
            fully_shard(model)
            for row, one in zip(Q.bit_report(model).rows, Q.bit_report(expected).rows):
                assert row[:6] == one[:6] and row.sq_error == pytest.approx(one.sq_error, rel=1e-5)
            ints, those = Q.to_int(model), Q.to_int(expected)
            assert ints.keys() == those.keys() and all(torch.equal(v.codes, those[n].codes) for n, v in ints.items())
            for m in (model, expected):
                (m(**tokens()).loss + 0.1 * Q.penalty(m)).backward()
            for (name, p), q in zip(model.named_parameters(), expected.parameters()):
                grad = p.grad.full_tensor()
                torch.testing.assert_close(grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}")
