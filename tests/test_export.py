"""`torch.export` and ONNX: an exported model answers any number of phrases as the model does."""

import pytest
import torch

from conftest import tiny_inputs, tiny_model
from model import SimVG

NETS = {"token": {}, "both": {"queries": 3, "as_released": True}}


def exported(net: SimVG, branch: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", max=1024)
    sizes = {"images": {0: batch}, "tokens": {0: batch}, "text_pad": {0: batch}, "branch": None}
    return torch.export.export(net, tiny_inputs(2), {"branch": branch}, dynamic_shapes=sizes)


@pytest.mark.parametrize("branch", NETS)
def test_an_exported_model_takes_any_batch_size(branch):
    net = tiny_model(**NETS[branch])
    program = exported(net, branch).module()
    for batch in (1, 2, 5):
        inputs = tiny_inputs(batch, seed=batch)
        found = program(*inputs, branch=branch)
        torch.testing.assert_close(found, net(*inputs, branch), atol=1e-5, rtol=0)


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="its exporter cannot give None back")
def test_the_token_branch_runs_in_onnx_with_any_batch_size(tmp_path):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    net = tiny_model(encoder_layers=1)
    torch.onnx.export(exported(net, "token"), (), tmp_path / "simvg.onnx", dynamo=True)
    session = reference.ReferenceEvaluator(str(tmp_path / "simvg.onnx"))
    for batch in (1, 2, 5):
        images, tokens, pad = (each.numpy() for each in tiny_inputs(batch, seed=batch))
        found = session.run(None, {"images": images, "tokens": tokens, "text_pad": pad})
        expected = net(*tiny_inputs(batch, seed=batch), "token")[2:]
        for ours, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), atol=1e-5, rtol=0)
