"""torch.onnx.export gets PyTorch's operators in place of ours."""

import pytest
import torch
from test_registration import NETWORKS

from modelnew import functional, onnx

NORM = torch.randn(4), torch.rand(4) + 0.5, torch.randn(4), torch.randn(4)  # running mean and variance, weight, bias
CHAIN = {"conv_weight": torch.randn(16, 32, 3, 3), "conv_bias": torch.randn(32), "padding": 1, "num_groups": 4}
CHAIN |= {"group_weight": torch.randn(32), "group_bias": torch.randn(32), "group_eps": 0.1, "numerics": "fp32"}
OF_ANY_CONVOLUTION = {"stride": 2, "output_padding": 1, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}
OF_CHAIN = torch.randn(32), torch.rand(32) + 0.5, torch.randn(32), torch.randn(32), False, 0.1, 0.01
ARGUMENTS = {
    "leaky_relu": ((0.3,), {}),
    "max_pool2d": ((3,), {"stride": 2, "padding": 1, "return_indices": True}),
    "group_norm": ((2, *NORM[2:]), {"eps": 0.1}),
    "batch_norm": ((*NORM, True, 0.3), {"num_batches_tracked": torch.tensor(3)}),
    "batch_norm_tanh": (NORM[:3], {"eps": 0.1}),
    "tanh_max_pool2d": ((2, 1), {"ceil_mode": True}),
    "bn_tanh_max_pool2d": ((*NORM, False, 0.1, 0.01, 3), {"stride": 2, "padding": 1}),
    "conv_transpose2d": ((torch.randn(4, 3, 3, 3), torch.randn(3), 2), {"output_padding": 1, "numerics": "fp32"}),
    "conv_bn_tanh_max_pool_group_norm": (OF_CHAIN, CHAIN | OF_ANY_CONVOLUTION),
    "conv_bn_activation_max_pool_group_norm": (OF_CHAIN, {**CHAIN, "activation": "leaky_relu", "negative_slope": 0.2}),
}


@pytest.mark.parametrize("name", functional.__all__)
def test_what_stands_for_a_function_does_the_same(name):
    x = torch.randn(2, 16 if name.startswith("conv_bn") else 4, 6, 6)
    args, options = ARGUMENTS.get(name, ((), {}))

    def run(module):
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        more = {k: a.clone() if isinstance(a, torch.Tensor) else a for k, a in options.items()}
        y = getattr(module, name)(x, *own, **more)
        return y, [a for a in (*own, *more.values()) if isinstance(a, torch.Tensor)]

    torch.testing.assert_close(run(onnx), run(functional), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_has_torchs_operators(name, monkeypatch):
    network, x = NETWORKS[name]().eval(), torch.randn(2, 16, 6, 6)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    graph = torch.export.export(network, (x,), strict=False)
    monkeypatch.undo()
    targets = {node.target.namespace for node in graph.graph.nodes if node.op == "call_function"}
    assert targets == {"aten"}
    torch.testing.assert_close(graph.module()(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_export(name, dynamo, tmp_path):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    network, x, path = NETWORKS[name]().eval(), torch.randn(2, 16, 6, 6), str(tmp_path / "network.onnx")
    torch.onnx.export(network, (x,), path, dynamo=dynamo, input_names=["x"])
    (y,) = reference.ReferenceEvaluator(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), network(x).detach(), rtol=1e-4, atol=1e-4)
