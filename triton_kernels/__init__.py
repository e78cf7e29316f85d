"""The Triton GPU backend: the operations of `reference` as Triton kernels, one file each.

No operation waits for the device: counts stay there, grids come from sizes that the host knows.
Block sizes are named constants, not tuned at run time: trials of an in-place kernel would apply it
once each. Not run on a GPU yet: compiled ahead of time for sm_80, 86 and 90, for gfx942 and
gfx1100, and interpreted against the reference.

Installed as `sparse_optim.triton_kernels`: the top-level name belongs to Triton's own package.
"""

from .append import append, append_pieces
from .candidate_list import collected_bytes
from .clip import clip
from .collect import collect, collect_begin, collect_end, collect_pieces
from .cut import cut, cut_pieces
from .exchange import exchange, gather
from .launch import bind, bind_rows, total_bytes
from .rank import rank, rank_pieces
from .sampled_grad import sampled_grad
from .scan import scan, scan_pieces
from .update import update

__all__ = [
    "TILE", "append", "bind", "bind_rows", "clip", "collect", "collect_begin", "collect_end",
    "collected_bytes", "cut", "exchange", "gather", "rank", "sampled_grad", "scan",
    "scratch_bytes", "update",
]  # fmt: skip

# 16 KB of float32: enough work for a program to hide its searches, and 2048 programs for eight
# million entries. Unmeasured.
TILE = 4096


def scratch_bytes(num_tiles: int, capacity: int, max_quota: int) -> int:
    """Bytes of work space: each operation uses it from the beginning, so the largest counts.

    About 20 per tile and 80 KB for scan and cut; 12 per entry of capacity for append.
    """
    pieces = (
        scan_pieces(num_tiles), rank_pieces(num_tiles), cut_pieces(num_tiles),
        collect_pieces(num_tiles), append_pieces(capacity, max_quota),
    )  # fmt: skip
    return max(total_bytes(each) for each in pieces)
