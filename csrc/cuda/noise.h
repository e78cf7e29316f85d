// Noise on a GPU: what replaces an importance where entries are sampled.
#pragma once
#include "core/importance.h"
#include "core/noise.h"
#include "cuda/device.h"

namespace sparse_optim::cuda {

// key = bits of score / sqrt(E).  Seed and step stay on the device, so that a captured graph reads
// those of the step that it is replayed in.
struct Sampled {
  const int64_t* seed_and_step;  // on the device

  __device__ Noise noise() const {
    return {true, uint64_t(seed_and_step[0]), uint32_t(seed_and_step[1])};
  }
};

// Word `at` of four. By comparison: words that were indexed would live in local memory.
__device__ inline uint32_t word_of(const Words& words, int at) {
  const uint32_t low = at & 1 ? words.word[1] : words.word[0];
  const uint32_t high = at & 1 ? words.word[3] : words.word[2];
  return at & 2 ? high : low;
}

// The key of one entry; four entries draw the same four words, each for itself.
__device__ inline int32_t sampled_key(const Sampled& sampled, float score, int64_t tensor,
                                      int64_t position) {
  const Noise noise = sampled.noise();
  const uint32_t group = uint32_t(position / 4);
  const int at = int(position % 4);
  const uint32_t word = word_of(philox(noise, group, uint32_t(tensor), 0), at);
  float fraction = 0.5f;
  if (word < kRefinedBelow)  // one entry in 65536
    fraction = refinement(word_of(philox(noise, group, uint32_t(tensor), 1), at));
  return importance_key(perturbed(fabsf(score), word, fraction));
}

// The keys of entries 4 group to 4 group + 3 of a tensor.
__device__ inline void group_keys(const Sampled& sampled, const float (&scores)[4], int64_t tensor,
                                  int64_t group, int32_t (&keys)[4]) {
  const Noise noise = sampled.noise();
  const Words first = philox(noise, uint32_t(group), uint32_t(tensor), 0);
  Words second{};
  bool refined = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) refined |= first.word[i] < kRefinedBelow;
  if (refined) second = philox(noise, uint32_t(group), uint32_t(tensor), 1);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = first.word[i];
    const float fraction = word < kRefinedBelow ? refinement(second.word[i]) : 0.5f;
    keys[i] = importance_key(perturbed(fabsf(scores[i]), word, fraction));
  }
}
__device__ inline void group_keys(const Exp0& importance, const float (&scores)[4], int64_t,
                                  int64_t, int32_t (&keys)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) keys[i] = importance_key(importance(scores[i], 0.f));
}

}  // namespace sparse_optim::cuda
