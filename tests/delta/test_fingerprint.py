import copy
import pickle

import pytest
import torch
import xxhash

from sparse_optim import IncrementalMaskedAdamW
from sparse_optim.delta import _fingerprint as module
from sparse_optim.delta._fingerprint import fingerprint, raw_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
DTYPES += [torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (4, 5, 6)])
def test_is_the_hash_of_the_bytes(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    numel = torch.Size(shape).numel()
    raw = torch.randint(0, 2, (numel * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape)
    assert fingerprint(tensor) == xxhash.xxh3_128_hexdigest(raw.numpy().tobytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype):
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    views = [tensor.transpose(0, 2), tensor[:, 1:], tensor[..., ::2], tensor[:1].expand(5, 3, 4)]
    for view in views:
        assert not view.is_contiguous()
        assert fingerprint(view) == fingerprint(view.contiguous())
    assert fingerprint(tensor.transpose(0, 2)) != fingerprint(tensor)


def test_bits_not_values():
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert fingerprint(nans[:1]) != fingerprint(nans[1:])
    assert fingerprint(nans[:1]) == fingerprint(nans[:1].clone())


def test_lazy_conjugate_is_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert fingerprint(tensor.conj()) == fingerprint(tensor.conj().resolve_conj())
    assert fingerprint(tensor.conj()) != fingerprint(tensor)


@pytest.mark.parametrize("piece_bytes", [1, 7, 48, 100])
def test_pieces_join_to_the_whole(piece_bytes):
    tensor = torch.arange(12, dtype=torch.int32, requires_grad=False).view(3, 4).t()
    pieces = [bytes(piece) for piece in raw_bytes(tensor, piece_bytes)]
    assert b"".join(pieces) == tensor.contiguous().numpy().tobytes()
    assert max(map(len, pieces)) <= piece_bytes


def test_a_parameter_is_read_without_autograd():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert fingerprint(parameter) == fingerprint(torch.ones(3))


@pytest.mark.parametrize(
    "tensor", [torch.empty(3, device="meta"), torch.eye(3).to_sparse()], ids=["meta", "sparse"]
)
def test_refuses_what_has_no_plain_bytes(tensor):
    with pytest.raises(ValueError, match="expected a strided tensor with data"):
        fingerprint(tensor)


@pytest.mark.gpu
def test_same_on_the_gpu_in_pieces():
    tensor = torch.randn(1000, 777).to(torch.bfloat16)
    on_gpu = tensor.cuda()
    assert fingerprint(on_gpu) == fingerprint(tensor)
    assert fingerprint(on_gpu.t()) == fingerprint(tensor.t())
    pieces = b"".join(bytes(piece) for piece in raw_bytes(on_gpu, 12_345))
    assert xxhash.xxh3_128_hexdigest(pieces) == fingerprint(tensor)


def new_optimizer() -> tuple[list[torch.nn.Parameter], IncrementalMaskedAdamW]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(50, generator=generator)) for _ in range(3)]
    named = [(f"p{index}", param) for index, param in enumerate(params)]
    return params, IncrementalMaskedAdamW(named, budget=15, total_steps=2, unmask_steps=1.0)


def take_step(params, optimizer):
    """A step that unmasks entries of all tensors."""
    for param in params:
        param.grad = torch.ones_like(param)
        param.grad[:5] = 100.0
    optimizer.step()
    optimizer.step()


def test_steps_hash_nothing(monkeypatch):
    """A hash copies a tensor to the host: it is made before the first step, or as it is due."""
    params, optimizer = new_optimizer()
    base = {f"p{index}": fingerprint(param) for index, param in enumerate(params)}
    monkeypatch.setattr(module, "fingerprint", lambda tensor: pytest.fail("a step hashes"))
    take_step(params, optimizer)
    assert optimizer.delta().fingerprints == base


WRITES = {
    "in place": lambda param: param.mul_(2),
    "by load_state_dict": lambda param: param.copy_(torch.ones_like(param)),
    "by other memory": lambda param: setattr(param, "data", torch.ones_like(param)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_the_base_is_what_the_first_step_finds(write, monkeypatch):
    """A tensor that was written after the optimizer was built is hashed again, and no other."""
    params, optimizer = new_optimizer()
    with torch.no_grad():
        write(params[1])
    base = {f"p{index}": fingerprint(param) for index, param in enumerate(params)}
    hashed = []
    monkeypatch.setattr(
        module, "fingerprint", lambda tensor: hashed.append(tensor) or fingerprint(tensor)
    )
    take_step(params, optimizer)
    assert len(hashed) == 1
    assert hashed[0] is params[1]
    assert optimizer.delta().fingerprints == base
    with torch.no_grad():
        write(params[1])  # no longer of the base
    optimizer.refresh()
    take_step(params, optimizer)
    assert optimizer.delta().fingerprints == base


def test_refresh_tells_of_writes_unseen():
    params, optimizer = new_optimizer()
    params[1].data.fill_(3.0)
    optimizer.refresh()
    base = {f"p{index}": fingerprint(param) for index, param in enumerate(params)}
    take_step(params, optimizer)
    assert optimizer.delta().fingerprints == base


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_a_copy_before_the_first_step_hashes_its_own(twin):
    params, optimizer = new_optimizer()
    own_params, own = twin((params, optimizer))
    own_params[1].data.fill_(3.0)
    base = {f"p{index}": fingerprint(param) for index, param in enumerate(own_params)}
    take_step(own_params, own)
    assert own.delta().fingerprints == base


def test_a_checkpoint_from_before_the_first_step_names_no_base():
    """The model's weights may be loaded later on."""
    _, optimizer = new_optimizer()
    saved = optimizer.state_dict()
    assert not saved["state"][0]["pool_base"].any()
    params, resumed = new_optimizer()
    resumed.load_state_dict(saved)
    with torch.no_grad():
        params[1].fill_(3.0)
    base = {f"p{index}": fingerprint(param) for index, param in enumerate(params)}
    take_step(params, resumed)
    assert resumed.delta().fingerprints == base


def test_a_group_that_joins_later_is_hashed_then():
    params, optimizer = new_optimizer()
    take_step(params, optimizer)
    late = torch.nn.Parameter(torch.ones(50))
    optimizer.add_param_group({"params": [("late", late)]})
    optimizer.extend(budget=40, total_steps=4)
    with torch.no_grad():
        late.fill_(2.0)
    base = fingerprint(late)
    late.grad = torch.full_like(late, 1000.0)
    optimizer.step()
    assert optimizer.delta().fingerprints["late"] == base
