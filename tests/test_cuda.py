"""What a GPU would meet, shown without one: no tensor on the wrong device, no 16-bit operand beside
a 32-bit one, no number that is read back from the device and makes the host wait for it.

Fake tensors have a device and a type, but no numbers. Reading one raises, and so do two devices.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import data
import losses
import model as models
import train
from conftest import CONFIGS, GPUS, SMALL_RUN, command_line, environment, tiny_model
from model import PRECISIONS

CUDA = torch.device("cuda", 0)
new_enough = pytest.mark.skipif(torch.__version__ < (2, 9), reason="cannot fake CUDA tensors")
CASES = [("none", True), ("bf16", False), ("fp16", True)]  # precision, gREC
# products whose operands must be of one type
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")


class OneType(TorchDispatchMode):
    """Fails where operands of a product differ in type, as a GPU would."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name.startswith(PRODUCTS):
            # of attention's only the gradient, queries, keys and values: statistics are float32
            operands = [each for each in arguments[:4] if isinstance(each, torch.Tensor)]
            kinds = {each.dtype for each in operands if each.is_floating_point()}
            assert len(kinds) == 1, f"{name} multiplies {kinds}"
        return function(*arguments, **(options or {}))


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, backward: bool = False) -> Iterator[None]:
    """Inside, tensors of CUDA are fake, CUDA's autocast and loss scaler work, and the assignment in
    a matching, which alone may read numbers, gives every query its own number.

    Autograd's engine wants a real device for CUDA tensors, but none for meta tensors. With
    `backward` the C++ side of torch takes the tensors for meta tensors; autocast, which asks there
    as well, then leaves all in float32, and a copy from the CPU would stay there.
    """
    assignment = partial(matched_in_order, device=CUDA) if backward else matched_in_order
    monkeypatch.setattr(losses, "assign_targets", assignment)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    for kind in (FakeTensorMode, FakeTensor) if backward else ():
        monkeypatch.setattr(kind, "__torch_dispatch__", seen_as_meta(kind))
    with FakeTensorMode(), OneType():
        yield


@new_enough
@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_runs_the_encoder_in_the_16_bits_that_the_gpu_has(has_bf16, monkeypatch):
    seen = set()
    with fake_cuda(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: has_bf16)
        precision = models.encoder_precision("auto", CUDA)
        model = fake_model(False)
        expert = model.encoder.layers[0].image
        expert.fc1.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
        output = model(*fake_batch(False)[:3], amp=precision)
    assert seen == {torch.bfloat16 if has_bf16 else torch.float16}
    assert output.token_boxes.dtype == torch.float32


def seen_as_meta(kind: type):
    usual = kind.__torch_dispatch__

    def dispatch(owner, function, types, arguments=(), options=None):
        if function is torch.ops.prim.device.default:
            return torch.device("meta")
        if options and options.get("device") == torch.device("meta"):
            options = options | {"device": CUDA}  # what C++ makes "like" another tensor
        bound = usual if kind is FakeTensor else usual.__get__(owner)
        return bound(function, types, arguments, options)

    return classmethod(dispatch) if kind is FakeTensor else dispatch


def matched_in_order(cost: torch.Tensor, target_mask: torch.Tensor, device="cpu") -> torch.Tensor:
    numbers = torch.arange(cost.shape[2], device=device)  # of the queries
    return torch.where(numbers < cost.shape[3], numbers, -1).expand(cost.shape[:3])


def fake_batch(grec: bool) -> data.Batch:
    """3 examples of 32 x 32 pixels with 6 tokens; in gREC with places for 2 boxes."""
    M = 2 if grec else 1
    with CUDA:
        images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
        tokens = torch.zeros(3, 6, dtype=torch.int64)
        mask = torch.ones(3, M, dtype=torch.bool)
        sizes = torch.ones(3, 2)
        return data.Batch(images, tokens, tokens > 0, torch.rand(3, M, 4), mask, sizes, [0, 1, 2])


def fake_model(grec: bool) -> models.SimVG:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "queries": 4 if grec else 1}
    with CUDA:
        return tiny_model(**sizes, drop_path=0.1, dropout=0.1).train()


def on_gpu_in_float32(*tensors: torch.Tensor) -> bool:
    return all(t.device == CUDA and t.dtype == torch.float32 for t in tensors)


@new_enough
@pytest.mark.parametrize(("amp", "grec"), CASES)
def test_outputs_and_losses_are_float32_on_the_gpu_in_every_precision(amp, grec, monkeypatch):
    factors = {"both": (1, 2, 1), "decoder": (1, None, None), "token": (None, 2, None)}
    with fake_cuda(monkeypatch):
        batch = fake_batch(grec)
        model = fake_model(grec)
        for branch, chosen in factors.items():
            output = model(*batch[:3], branch, PRECISIONS[amp])
            terms = losses.simvg_loss(output, batch.boxes, batch.box_mask, *chosen)
            answers = [tensor for answer in output.answers().values() for tensor in answer]
            assert on_gpu_in_float32(*answers, *terms.values())


def training_step(model, batches, config, optimizer, scaler) -> dict[str, torch.Tensor]:
    """As `train.main` takes it."""
    precision = models.encoder_precision(config.amp, model.mean.device)
    terms = train.backward(model, batches, config, "both", precision, scaler)
    scaler.unscale_(optimizer)
    terms["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    return terms


@new_enough
@pytest.mark.parametrize(("amp", "grec"), [("none", False), ("fp16", True)])
def test_a_step_reads_no_number_and_leaves_all_its_state_on_the_gpu(amp, grec, monkeypatch):
    config = train.TrainConfig(amp=amp)
    with fake_cuda(monkeypatch, backward=True):
        model = fake_model(grec)
        averaged = fake_model(grec)
        optimizer = train.make_optimizer(model, config)
        scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16")
        terms = training_step(model, [fake_batch(grec)] * 2, config, optimizer, scaler)
        train.update_ema(averaged, model, 0.999, 1)
        assert on_gpu_in_float32(*terms.values(), *averaged.parameters())
        for parameter in model.parameters():
            assert on_gpu_in_float32(parameter.grad, *optimizer.state[parameter].values())


@new_enough
@pytest.mark.parametrize(("amp", "grec"), CASES)
def test_a_backward_pass_multiplies_numbers_of_one_type_and_reads_none(amp, grec, monkeypatch):
    """On fake tensors of the CPU: autocast and the engine do not both work with those of CUDA."""
    monkeypatch.setattr(losses, "assign_targets", matched_in_order)
    monkeypatch.setattr("test_cuda.CUDA", torch.device("cpu"))
    with FakeTensorMode(), OneType():
        batch = fake_batch(grec)
        model = fake_model(grec)
        output = model(*batch[:3], amp=PRECISIONS[amp])
        losses.simvg_loss(output, batch.boxes, batch.box_mask)["total"].backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@new_enough
def test_the_checks_above_find_what_they_look_for(monkeypatch):
    with fake_cuda(monkeypatch):
        mlp = fake_model(grec=False).token_branch.mlp  # and planted faults:
        x = torch.rand(3, 1, 32, device=CUDA)
        with pytest.raises(RuntimeError, match="same device"):
            mlp(x) + torch.zeros(3, 1, 32)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            bool(mlp(x).sum() > 0)
        with pytest.raises((AssertionError, RuntimeError), match="multiplies|dtype"):
            torch.nn.functional.linear(x.half(), mlp.weight)


def reads(call: Callable[[], object]) -> int:
    """How often a call reads numbers back, one or many, also within autograd's own functions."""
    copies = []
    with pytest.MonkeyPatch.context() as patch, profile() as seen:
        for name in ("cpu", "tolist"):
            usual = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda t, usual=usual: copies.append(t) or usual(t))
        # the assignment itself is the host's
        patch.setattr(
            losses, "assign", lambda cost: (list(range(min(len(cost), len(cost[0])))),) * 2
        )
        call()
    return len(copies) + sum(event.name == "aten::_local_scalar_dense" for event in seen.events())


@pytest.mark.parametrize(("grec", "count"), [(False, 1), (True, 7)])
def test_a_step_reads_one_number_and_in_grec_two_tensors_a_matching(grec, count, monkeypatch):
    monkeypatch.setattr("test_cuda.CUDA", torch.device("cpu"))
    batch = fake_batch(grec)
    model = fake_model(grec)
    loss = losses.simvg_loss(model(*batch[:3]), batch.boxes, batch.box_mask)["total"]
    assert reads(loss.backward) == 0
    config = train.TrainConfig()
    optimizer = train.make_optimizer(model, config)
    optimizer.step = lambda: None  # on a CPU Adam reads a count of steps for each tensor
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = partial(training_step, model, [batch], config, optimizer, scaler)
    assert reads(lambda: bool(step()["grad_norm"].isfinite())) == count


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no GPU")
@pytest.mark.parametrize("amp", PRECISIONS)
def test_torchrun_trains_and_evaluates_on_a_gpu(amp, toys, tmp_path):
    settings = ["--out", tmp_path, "--set", f"train.amp={amp}", *SMALL_RUN]
    line = command_line("train.py", "--config", f"{CONFIGS}:toys", *settings)
    launch = [line[0], "-m", "torch.distributed.run", "--standalone", *line[1:]]
    visible = environment()
    del visible["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(launch, cwd=toys, env=visible | GPUS, capture_output=True, text=True)
    assert done.returncode == 0 and " on cuda" in done.stderr, done.stderr
