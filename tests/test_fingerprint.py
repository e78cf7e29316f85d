import pytest
import torch
import xxhash

from sparse_optim.fingerprint import fingerprint, raw_bytes

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
