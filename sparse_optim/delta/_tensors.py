"""Read and write entries of tensors by their bits.

Every copy and comparison here goes through an integer view of the same width: NaN payloads and
the sign of zero survive, and dtypes without arithmetic (float8) work like any other.
"""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Model = nn.Module | Tensors

# safetensors' name of every dtype that a delta may hold.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def named_tensors(model: Model) -> dict[str, Tensor]:
    """The live tensors of a module (names as in its state dict) or of a mapping."""
    tensors = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def bits(tensor: Tensor) -> Tensor:
    """A view of `tensor`, same shape and strides, as integers of the same width."""
    return tensor.detach().view(_INTEGER[tensor.dtype.itemsize])


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in C order, (nbytes,), uint8; a view where it is contiguous."""
    plain = tensor.detach().contiguous()
    # One entry of a larger tensor is contiguous with any stride, which `view` would refuse.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(bits(first), bits(second))


def storage_key(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are the same memory read in the same way (tied weights)."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def version_of(tensor: Tensor) -> int:
    """The writes that torch has counted; 0 for tensors of inference mode, which count none."""
    return 0 if tensor.is_inference() else tensor._version


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the host that shares memory with nothing."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).cpu()


def gather(tensor: Tensor, position: Tensor | None) -> Tensor:
    """Copy tensor.flat[position] (C order), or with None the whole tensor, to the host."""
    if position is None:
        return host_copy(bits(tensor)).view(tensor.dtype)
    source, position = bits(tensor), position.to(tensor.device)
    if source.is_contiguous():
        picked = source.view(-1).gather(0, position)
    else:
        picked = source[torch.unravel_index(position, source.shape)]
    return picked.cpu().view(tensor.dtype)


def scatter_(tensor: Tensor, position: Tensor | None, value: Tensor) -> None:
    """tensor.flat[position] <- value (C order), or with None the whole tensor, in place.

    The write goes through `detach`, which shares the version counter: `tensor._version` moves.
    """
    target, source = bits(tensor), bits(value).to(tensor.device)
    if position is None:
        target.copy_(source)
    elif target.is_contiguous():  # a tenth of the time of target[position] = source
        target.view(-1).scatter_(0, position.to(tensor.device), source)
    else:
        target[torch.unravel_index(position.to(tensor.device), target.shape)] = source
