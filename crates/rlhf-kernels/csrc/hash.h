// Noise as a function of a place.
#pragma once
#include <cstdint>

namespace rlhf {
// lowbias32; the kernels have it for whole vectors.
inline uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
} // namespace rlhf
