// 64-byte vectors in the compilers' own notation: the same source becomes AVX-512, AVX2, SSE2 or
// NEON code, and sums are taken in the same order on all of them.
#pragma once
#include "core/types.h"

namespace sparse_optim::cpu {

typedef float Float16Lanes __attribute__((vector_size(64)));
typedef int32_t Int16Lanes __attribute__((vector_size(64)));
typedef int16_t Short32Lanes __attribute__((vector_size(64)));

template <class Vector, class T>
SPARSE_OPTIM_INLINE Vector load_vector(const T* data) {
  Vector vector;
  std::memcpy(&vector, data, sizeof vector);
  return vector;
}

template <class To, class From>
SPARSE_OPTIM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector>
SPARSE_OPTIM_INLINE Vector greater_of(Vector a, Vector b) {
  return a > b ? a : b;
}

}  // namespace sparse_optim::cpu
