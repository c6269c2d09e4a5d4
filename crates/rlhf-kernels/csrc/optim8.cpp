// AdamW whose moments are 8-bit codes: blocks of 256 numbers share a largest magnitude, and a code is a
// place in the dynamic tree map of Dettmers et al. 2022. Each block is dequantised, stepped in f32 and
// quantised again on its own, so the result does not depend on the number of threads.
//
// A number goes to one of its two neighbours in the map, with chances by nearness, drawn from a hash of
// step and place. To the nearest alone would lose every change smaller than half a gap, which after a
// hundred steps is what a second moment changes by: it would only ever shrink with its block's largest.
#include "cuda.h"
#include "hash.h"
#include "loss_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {
using namespace rlhf;
constexpr int64_t kBlock = 256;

// The magnitudes of a map; `items`: how many the lowest decade has; each next one has twice as many.
struct Magnitudes {
  std::vector<float> values, per_gap;
  std::array<int32_t, MagnitudeTable::kBuckets> first;

  explicit Magnitudes(int items) {
    values.push_back(0.f);
    for (int i = 0; i < 7; ++i, items *= 2)
      for (int j = 0; j < items; ++j)
        values.push_back(static_cast<float>(std::pow(10.0, i - 6) * (0.1 + 0.9 * (j + 0.5) / items)));
    values.push_back(1.f);
    for (size_t k = 0; k + 1 < values.size(); ++k) per_gap.push_back(1.f / (values[k + 1] - values[k]));
    per_gap.push_back(0.f);
    for (size_t i = 0; i < first.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>((MagnitudeTable::kFirst << 8) + i) << 15;
      float low;
      std::memcpy(&low, &bits, 4);
      size_t k = 0;
      while (k + 1 < values.size() && low >= values[k + 1]) ++k;
      // The first bucket stands for everything below it too.
      first[i] = i == 0 ? 0 : static_cast<int32_t>(k);
    }
    values.push_back(std::numeric_limits<float>::infinity());
  }
  MagnitudeTable table() const { return {values.data(), per_gap.data(), first.data()}; }
};

struct Maps {
  Magnitudes positive{2}, sign{1};
  std::array<float, 256> first, second;
  Maps() {
    for (int c = 0; c < 256; ++c) {
      second[c] = positive.values[c];
      first[c] = c >= 127 ? sign.values[c - 127] : -sign.values[127 - c];
    }
  }
};
const Maps &maps() {
  static const Maps all;
  return all;
}
// Both maps' values on a GPU. Never freed: the driver may be gone before a static is.
at::Tensor gpu_maps(const at::Tensor &like) {
  static std::mutex lock;
  static auto *made = new std::unordered_map<int, at::Tensor>;
  const std::lock_guard hold(lock);
  auto &t = (*made)[like.device().index()];
  if (!t.defined()) {
    std::vector<float> all(maps().first.begin(), maps().first.end());
    all.insert(all.end(), maps().second.begin(), maps().second.end());
    t = at::tensor(all, at::TensorOptions().dtype(at::kFloat)).to(like.device());
  }
  return t;
}
} // namespace

// The maps' 256 values: of the first moment, then of the second.
RLHF_API void rlhf_dynamic_maps(float *out) noexcept {
  std::memcpy(out, maps().first.data(), 256 * sizeof(float));
  std::memcpy(out + 256, maps().second.data(), 256 * sizeof(float));
}

// tensors: parameter, gradient (f32), codes of both moments (u8), their blocks' largest magnitudes (f32), all
// contiguous, on the CPU or a GPU that has kernels; `step` counts from 1.
RLHF_API char *rlhf_adamw8(const at::Tensor *const *tensors, double step, double lr, double beta1, double beta2,
                           double weight_decay, double eps) {
  return rlhf::guard([&] {
    for (int i = 0; i < 6; ++i) TORCH_CHECK(tensors[i]->is_contiguous(), "not contiguous");
    const int64_t n = tensors[0]->numel();
    const float keep = static_cast<float>(1.0 - lr * weight_decay), rate = static_cast<float>(lr / (1.0 - std::pow(beta1, step))),
                root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
    const uint32_t salt = hash(static_cast<uint32_t>(step));
    if (tensors[0]->is_cuda()) {
      const auto &on = *tensors[0];
      const auto table = gpu_maps(on);
      cuda::run(on, "adamw8", (n + kBlock - 1) / kBlock, kBlock, on.data_ptr(), tensors[1]->const_data_ptr(),
                tensors[2]->data_ptr(), tensors[3]->data_ptr(), tensors[4]->data_ptr(), tensors[5]->data_ptr(),
                table.const_data_ptr(), n, salt, static_cast<float>(beta1), static_cast<float>(beta2),
                static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2), keep, rate, root, static_cast<float>(eps));
      return;
    }
    auto *p = static_cast<float *>(tensors[0]->data_ptr());
    const auto *g = tensors[1]->const_data_ptr<float>();
    auto *m = tensors[2]->mutable_data_ptr<uint8_t>(), *v = tensors[3]->mutable_data_ptr<uint8_t>();
    auto *m_max = tensors[4]->mutable_data_ptr<float>(), *v_max = tensors[5]->mutable_data_ptr<float>();
    const auto &map = maps();
    const Adam8Settings c{map.sign.table(),
                          map.positive.table(),
                          map.first.data(),
                          map.second.data(),
                          static_cast<float>(beta1),
                          static_cast<float>(beta2),
                          static_cast<float>(1.0 - beta1),
                          static_cast<float>(1.0 - beta2),
                          keep,
                          rate,
                          root,
                          static_cast<float>(eps)};
    const auto &kernels = loss_kernels();
    at::parallel_for(0, (n + kBlock - 1) / kBlock, 32, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t at = block * kBlock;
        kernels.adamw8({p + at, g + at, m + at, v + at, m_max + block, v_max + block, std::min(kBlock, n - at),
                        static_cast<uint32_t>(at) + salt},
                       c);
      }
    });
  });
}
