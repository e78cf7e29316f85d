// The part of the CUDA runtime that bench/kernels_alone.cu calls, on host memory: every copy and
// every launch is done when its call returns.
#pragma once
#include <chrono>
#include <cstdlib>

#include "emulator.h"

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
typedef std::chrono::steady_clock::time_point* cudaEvent_t;

inline const char* cudaGetErrorString(cudaError_t) {
  return "a kernel's threads wait for others that never come";
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
// Like a device's, the memory holds anything but zeros.
inline cudaError_t cudaMalloc(void** at, size_t size) {
  *at = std::malloc(size);
  std::memset(*at, 0xA5, size);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* at) {
  std::free(at);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  return cudaMemcpy(to, from, size, kind);
}
inline cudaError_t cudaMemset(void* at, int value, size_t size) {
  std::memset(at, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t size) {
  return cudaMemset(at, value, size);
}

inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new std::chrono::steady_clock::time_point;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event) {
  *event = std::chrono::steady_clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = std::chrono::duration<float, std::milli>(*end - *begin).count();
  return cudaSuccess;
}
