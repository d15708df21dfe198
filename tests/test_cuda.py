"""What a GPU would meet, shown without one: no tensor on the wrong device, no 16-bit operand beside a 32-bit one, no
number that is read back from the device and makes the host wait for it.

Fake tensors have a device and a type, but no numbers. Reading a number raises, as does an operation on two devices.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import data
import losses
import model as models
import train
from conftest import GPUS, ROOT, TINY, command_line, environment, tiny_model

CUDA = torch.device("cuda", 0)
AMP = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}
new_enough = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="this torch cannot make fake CUDA tensors"
)
# Products whose operands must be of one type.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product")


class OneType(TorchDispatchMode):
    """Fails where operands of a product differ in type, as a GPU would."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name.startswith(PRODUCTS):
            # of attention's only the gradient, queries, keys and values: statistics for its gradient are float32
            operands = [a for a in arguments[:4] if isinstance(a, torch.Tensor) and a.is_floating_point()]
            kinds = {operand.dtype for operand in operands}
            assert len(kinds) == 1, f"{name} multiplies {kinds}"
        return function(*arguments, **(options or {}))


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, backward: bool = False) -> Iterator[None]:
    """Inside, tensors of CUDA are fake, CUDA's autocast and loss scaler work, and the assignment in a matching, which
    alone may read numbers, gives every query its own number.

    Autograd's engine wants a real device for CUDA tensors, but none for meta tensors. With `backward` the C++ side of
    torch takes the tensors for meta tensors; autocast, which asks there as well, then leaves all in float32.
    """
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)  # models are built where they belong
    monkeypatch.setattr(losses, "match_on_host", matched_in_order)
    if backward:
        for kind in (FakeTensorMode, FakeTensor):
            monkeypatch.setattr(kind, "__torch_dispatch__", seen_as_meta(kind))
    with FakeTensorMode(), OneType():
        yield


def seen_as_meta(kind: type):
    usual = kind.__torch_dispatch__

    def dispatch(owner, function, types, arguments=(), options=None):
        if function is torch.ops.prim.device.default:
            return torch.device("meta")
        # What the C++ side makes "like" another tensor belongs to the GPU.
        options = {key: CUDA if value == torch.device("meta") else value for key, value in (options or {}).items()}
        bound = usual if kind is FakeTensor else usual.__get__(owner)
        return bound(function, types, arguments, options)

    return classmethod(dispatch) if kind is FakeTensor else dispatch


def matched_in_order(cost: torch.Tensor, M: int) -> list[list[list[int]]]:
    P, B, Q, columns = cost.shape
    return [[[q if q < M else -1 for q in range(Q)] for _ in range(B)] for _ in range(P + (columns > M))]


def fake_batch(grec: bool) -> data.Batch:
    """3 examples of 32 x 32 pixels with 6 tokens; in gREC with places for 2 boxes."""
    M = 2 if grec else 1
    with CUDA:
        return data.Batch(
            torch.zeros(3, 3, 32, 32, dtype=torch.uint8),
            torch.zeros(3, 6, dtype=torch.int64),
            torch.zeros(3, 6, dtype=torch.bool),
            torch.rand(3, M, 4),
            torch.ones(3, M, dtype=torch.bool),
            [0, 1, 2],
        )


def fake_model(grec: bool) -> models.SimVG:
    with CUDA:
        return tiny_model(queries=4 if grec else 1, drop_path=0.1, dropout=0.1).train()


def answered(amp: str, grec: bool, branch: str) -> models.Output:
    batch = fake_batch(grec)
    return fake_model(grec)(batch.images, batch.tokens, batch.text_pad, branch, AMP[amp])


def right(tensors: dict[str, torch.Tensor]) -> bool:
    return all(t.device == CUDA and t.dtype == torch.float32 for t in tensors.values())


@new_enough
@pytest.mark.parametrize("grec", [False, True])
@pytest.mark.parametrize("amp", AMP)
def test_outputs_and_losses_are_float32_on_the_gpu_in_every_precision(amp, grec, monkeypatch):
    factors = {"both": {}, "decoder": {"token_on_truth": None, "token_on_teacher": None}}
    factors["token"] = {"decoder": None, "token_on_teacher": None}
    with fake_cuda(monkeypatch):
        batch = fake_batch(grec)
        for branch, chosen in factors.items():
            output = answered(amp, grec, branch)
            terms = losses.simvg_loss(output, batch.boxes, batch.box_mask, **chosen)
            given = {name: value for name, value in output._asdict().items() if value is not None}
            assert len(given) == (4 if branch == "both" else 2) and right(given) and right(terms)


@new_enough
@pytest.mark.parametrize("grec", [False, True])
@pytest.mark.parametrize("amp", AMP)
def test_a_training_step_reads_no_number_and_leaves_all_its_state_on_the_gpu(amp, grec, monkeypatch):
    config = data.load_config(f"{ROOT}/configs.json:shapes")
    config["model"] |= {**TINY, "queries": 4 if grec else 1, "dropout": 0.1, "drop_path": 0.1}
    config["train"] |= {"amp": amp, "ema": True, "amsgrad": True}
    with fake_cuda(monkeypatch, backward=True):
        with CUDA:
            state = train.build(config, Path(), 0, 1, CUDA)
        state.model.train()
        state.ema |= {name: p.detach().clone() for name, p in state.model.named_parameters()}
        assert state.scaler.is_enabled() == (amp == "fp16")
        terms = train.train_step(state, [fake_batch(grec), fake_batch(grec)])
        train.update_ema(state.ema, state.model, 0.999, 1)
        gradients = {name: p.grad for name, p in state.model.named_parameters()}
        states = {f"{n} {k}": v for n, s in enumerate(state.optimizer.state.values()) for k, v in s.items()}
        assert right(terms) and right(gradients) and right(states) and right(state.ema)


@new_enough
@pytest.mark.parametrize("grec", [False, True])
@pytest.mark.parametrize("amp", AMP)
def test_a_backward_pass_multiplies_numbers_of_one_type_and_reads_none(amp, grec, monkeypatch):
    """On fake tensors of the CPU, because autocast and the engine do not both work with those of CUDA."""
    monkeypatch.setattr(losses, "match_on_host", matched_in_order)
    monkeypatch.setattr("test_cuda.CUDA", torch.device("cpu"))
    with FakeTensorMode(), OneType():
        batch, model = fake_batch(grec), fake_model(grec)
        output = model(batch.images, batch.tokens, batch.text_pad, "both", AMP[amp])
        losses.simvg_loss(output, batch.boxes, batch.box_mask)["total"].backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@new_enough
def test_the_checks_above_find_what_they_look_for(monkeypatch):
    """A tensor that stays on the CPU, a number that is read, operands of two types: each planted once."""
    with monkeypatch.context() as patch, fake_cuda(patch):
        model, batch = fake_model(False), fake_batch(False)
        inputs = batch.images, batch.tokens, batch.text_pad
        usual = model.normalise
        model.normalise = lambda images: usual(images) + torch.zeros(3, 32, 32)
        with pytest.raises(RuntimeError, match="same device"):
            model(*inputs)
        model.normalise = lambda images: usual(images) if images.sum() > 0 else images
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            model(*inputs)
        model.normalise = usual
        mlp = model.token_branch.mlp
        mlp.forward = lambda x: F.linear(x.half(), mlp.weight)
        with pytest.raises((AssertionError, RuntimeError), match="multiplies|dtype"):
            model(*inputs)


def reads(call: Callable[[], object]) -> int:
    """How often a call reads numbers back, one by one or as a list, also within autograd's own functions. (Those take
    another way where a dispatch mode or a fake tensor is about.)"""
    lists, usual = [], torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as seen:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or usual(tensor))
        call()
    return len(lists) + sum(event.name == "aten::_local_scalar_dense" for event in seen.events())


@pytest.mark.parametrize("grec", [False, True])
def test_a_step_reads_its_gradient_norm_and_for_grec_the_costs_of_matching_and_a_backward_pass_reads_nothing(
    grec, monkeypatch
):
    config = data.load_config(f"{ROOT}/configs.json:shapes")
    config["model"] |= {**TINY, "queries": 4 if grec else 1}
    state = train.build(config, Path(), 0, 1, torch.device("cpu"))
    monkeypatch.setattr("test_cuda.CUDA", torch.device("cpu"))
    batch = fake_batch(grec)
    loss = losses.simvg_loss(state.model(*batch[:3]), batch.boxes, batch.box_mask)["total"]
    assert reads(loss.backward) == 0
    # On a CPU, Adam reads a count of steps for each tensor; on CUDA it reads nothing.
    state.optimizer.step = lambda: None
    assert reads(lambda: bool(train.train_step(state, [batch])["grad_norm"].isfinite())) == (2 if grec else 1)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no GPU")
@pytest.mark.parametrize("amp", AMP)
def test_torchrun_trains_and_evaluates_on_a_gpu(amp, shapes, tmp_path):
    sizes = [f"model.{key}={value}" for key, value in TINY.items() if key not in ("queries", "as_released")]
    line = ["train.py", "--config", "configs.json:shapes", "--out", str(tmp_path / "run"), "--set", f"train.amp={amp}"]
    command = command_line(*line, *sizes, "train.epochs=2", "data.scenes=60", "train.batch_size=16")
    launch = [command[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", *command[1:]]
    visible = {k: v for k, v in environment().items() if k != "CUDA_VISIBLE_DEVICES"} | GPUS
    done = subprocess.run(launch, cwd=shapes, env=visible, capture_output=True, text=True)
    assert done.returncode == 0 and " on cuda" in done.stderr, done.stderr
    assert os.path.exists(tmp_path / "run" / "best.pt")
