// Element types and their exact conversions to float32. No torch headers: shared by every backend.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SPARSE_OPTIM_INLINE __host__ __device__ __forceinline__
#else
#define SPARSE_OPTIM_INLINE inline __attribute__((always_inline))
#endif

namespace sparse_optim {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int32_t kInfinityBits = 0x7f800000;

SPARSE_OPTIM_INLINE int32_t to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(value);
#else
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

SPARSE_OPTIM_INLINE float from_bits(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// |value| as bits: ordered as integers just as the magnitudes are, NaN above infinity.
SPARSE_OPTIM_INLINE int32_t magnitude_bits(float value) {
  return to_bits(value) & 0x7fffffff;
}

SPARSE_OPTIM_INLINE float to_float(float value) {
  return value;
}

SPARSE_OPTIM_INLINE float to_float(BFloat16 value) {
  return from_bits(int32_t(uint32_t(value.bits) << 16));
}

// Exact, branch-free so that loops over it vectorize: normal numbers by rebiasing the exponent,
// subnormal ones by subtracting the implicit one that the rebiasing added.
SPARSE_OPTIM_INLINE float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;  // exact too, in one instruction: in software a scan is bound by arithmetic
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t rebias = exponent == 0x0f800000u ? 0x70000000u : 0x38000000u;
  const float normal = from_bits(int32_t(magnitude + rebias));
  const float subnormal = from_bits(int32_t(magnitude + 0x38800000u)) - 6.103515625e-05f;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const float chosen = exponent == 0 ? subnormal : normal;
  return from_bits(int32_t(uint32_t(to_bits(chosen)) | sign));
#endif
}

SPARSE_OPTIM_INLINE void store(float& out, float value) {
  out = value;
}

// Round to nearest even; NaN stays NaN.
SPARSE_OPTIM_INLINE void store(BFloat16& out, float value) {
  const uint32_t bits = uint32_t(to_bits(value));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t(magnitude_bits(value) > kInfinityBits ? 0x7fc0u : rounded);
}

// Round to nearest even, overflow to infinity, with subnormal results.
SPARSE_OPTIM_INLINE void store(Float16& out, float value) {
  const uint32_t sign = (uint32_t(to_bits(value)) >> 16) & 0x8000u;
  const uint32_t bits = uint32_t(magnitude_bits(value));
  uint32_t half;
  if (bits > uint32_t(kInfinityBits)) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24 below it
    half = uint32_t(to_bits(from_bits(int32_t(bits)) + 0.5f)) - 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  out.bits = uint16_t(sign | half);
}

}  // namespace sparse_optim
