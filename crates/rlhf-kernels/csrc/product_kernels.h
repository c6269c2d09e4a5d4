// The inner loops of matrix products on the CPU, free of libtorch: compiled once per instruction set, chosen at run
// time. Single-threaded; callers split the work.
#pragma once
#include <cstdint>

namespace rlhf {

// C (+)= A·B, C [m,n] with unit stride in n, A [m,k] and B [k,n] with any strides, fast where one of each is 1.
struct Product {
  int64_t m, n, k;
  const float *a;
  int64_t a_row, a_col;
  const float *b;
  int64_t b_row, b_col;
  float *c;
  int64_t c_row;
  bool add;
};

// Columns and rows of C that are computed at once.
constexpr int64_t kProductColumns = 32, kProductRows = 14;

struct ProductKernels {
  // A number's sum is made in an order that k alone decides. Null without AVX-512.
  void (*f32)(const Product &);
};

const ProductKernels &product_kernels();

} // namespace rlhf
