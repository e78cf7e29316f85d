// List, in ascending order, the tiles whose bound reaches the limit.
//
// cub::DeviceSelect::If could: the host knows how many tiles there are. But its look-back waits for
// blocks that run at the same time, which the emulator (tests/support/cuda_emulator) cannot do, and
// it would also read all bounds in steps that unmask nothing.
#pragma once
#include "cuda/select.h"

namespace sparse_optim::cuda {

constexpr int64_t kChunk = 2048;  // tiles a block: eight words of 32 a warp

inline int64_t num_chunks(int64_t num_tiles) {
  return (num_tiles + kChunk - 1) / kChunk;
}

// chunk[b] <- listed tiles before those of block b; the last block adds up what all have counted.
void compact(const int32_t* bound, int64_t num_tiles, Selection* state, int32_t* chunk,
             int32_t* list, cudaStream_t stream);

}  // namespace sparse_optim::cuda
