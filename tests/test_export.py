"""`torch.export` and ONNX: the exported model answers any number of phrases as the model itself does."""

import pytest
import torch

from conftest import tiny_inputs, tiny_model
from model import Output, SimVG


def exported(net: SimVG, branch: str, words: int = 6) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", max=1024)
    sizes = {"images": {0: batch}, "tokens": {0: batch}, "text_pad": {0: batch}, "branch": None}
    return torch.export.export(net, tiny_inputs(2, words), {"branch": branch}, dynamic_shapes=sizes)


@pytest.mark.parametrize(
    ("branch", "changes"), [("token", {}), ("token", {"as_released": True}), ("decoder", {"queries": 3}), ("both", {})]
)
def test_an_exported_model_takes_any_batch_size(branch, changes):
    net = tiny_model(**changes)
    program = exported(net, branch).module()
    for batch in (1, 2, 5):
        inputs = tiny_inputs(batch, seed=batch)
        for ours, theirs in zip(net(*inputs, branch), program(*inputs, branch=branch), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_token_branch_runs_in_onnx_with_any_batch_size(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = tiny_model()
    torch.onnx.export(exported(net, "token"), (), tmp_path / "simvg.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "simvg.onnx")
    names = [each.name for each in session.get_inputs()]
    assert names == ["images", "tokens", "text_pad"]
    for batch in (1, 2, 5):
        inputs = tiny_inputs(batch, seed=batch)
        found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        output: Output = net(*inputs, "token")
        for ours, theirs in zip((output.token_logits, output.token_boxes), found, strict=True):
            torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), atol=1e-5, rtol=0)
