// Compiled once per instruction set with RLHF_ISA naming it. Everything is in an unnamed namespace: no
// inline function may leak from one instruction set into another's code.
//
// As in Goto and van de Geijn 2008 ("Anatomy of High-Performance Matrix Multiplication"): a block of B is copied into
// panels of 32 columns, which stay in the second cache while all rows of A go by, 14 at a time. Those are 28
// sums in registers, for which a step of k loads two vectors of B and 14 numbers of A.
#include "product_kernels.h"

#if defined(__AVX512F__)
#include "simd.h"
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <new>
#include <utility>

namespace {
using rlhf::Product;
constexpr int64_t kColumns = rlhf::kProductColumns, kRows = rlhf::kProductRows;
constexpr int64_t kBlockColumns = 320, kBlockDepth = 384; // of B at most: 480 KiB of a second cache of a MiB
constexpr int64_t kApart = kBlockDepth + W;               // of rows of A

// R rows: A(i,p) lies at a[i·row + p·col].
template <int R>
INLINE void tile(int64_t k, const float *a, int64_t row, int64_t col, const float *b, float *c, int64_t c_row, bool add) {
  F sums[R][2];
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i) {
    sums[i][0] = sums[i][1] = F{};
    __builtin_prefetch(c + i * c_row, 1);
    __builtin_prefetch(c + i * c_row + W, 1);
  }
  for (int64_t p = 0; p < k; ++p) {
    const F y0 = load(b + p * kColumns), y1 = load(b + p * kColumns + W);
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i) {
      const F x = splat(a[i * row + p * col]);
      sums[i][0] += x * y0;
      sums[i][1] += x * y1;
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i) {
    float *to = c + i * c_row;
    store(to, add ? load(to) + sums[i][0] : sums[i][0]);
    store(to + W, add ? load(to + W) + sums[i][1] : sums[i][1]);
  }
}
// A as it lies, or copied by `copy_rows`.
template <int R> void in_rows(int64_t k, const float *a, int64_t row, const float *b, float *c, int64_t c_row, bool add) {
  tile<R>(k, a, row, 1, b, c, c_row, add);
}
// A copied by `pack_rows`.
template <int R> void packed(int64_t k, const float *a, int64_t, const float *b, float *c, int64_t c_row, bool add) {
  tile<R>(k, a, 1, kRows, b, c, c_row, add);
}
using Tile = void (*)(int64_t, const float *, int64_t, const float *, float *, int64_t, bool);
struct Tiles {
  Tile in_rows[kRows], packed[kRows]; // of 1 to kRows rows
};
template <int... R> constexpr Tiles tiles(std::integer_sequence<int, R...>) { return {{in_rows<R + 1>...}, {packed<R + 1>...}}; }
constexpr Tiles kTiles = tiles(std::make_integer_sequence<int, kRows>());

// Rows and columns of 16 × 16 numbers change places: step s of four swaps bit s of both numbers.
template <int S, int... I> INLINE void exchange(F (&x)[16], std::integer_sequence<int, I...>) {
  alignas(64) static constexpr int32_t low[] = {((I & S) ? (I & ~S) | 16 : I)...}, high[] = {((I & S) ? I | 16 : I | S)...};
  const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & S) continue;
    const F a = x[i], b = x[i | S];
    x[i] = _mm512_permutex2var_ps(a, to_low, b);
    x[i | S] = _mm512_permutex2var_ps(a, to_high, b);
  }
}
INLINE void transpose(F (&x)[16]) {
  constexpr std::make_integer_sequence<int, 16> lanes;
  exchange<1>(x, lanes);
  exchange<2>(x, lanes);
  exchange<4>(x, lanes);
  exchange<8>(x, lanes);
}

// n columns of B, k deep, into panels; what a panel has beyond them is 0.
void pack_panels(const float *b, int64_t row, int64_t col, int64_t k, int64_t n, float *to) {
  for (int64_t j = 0; j < n; j += kColumns, to += k * kColumns) {
    const float *from = b + j * col;
    const int64_t width = n - j < kColumns ? n - j : kColumns;
    int64_t p = 0;
    if (col == 1 && width == kColumns) {
      for (; p < k; ++p) {
        store(to + p * kColumns, load(from + p * row));
        store(to + p * kColumns + W, load(from + p * row + W));
      }
    } else if (row == 1 && width == kColumns) {
      for (; p + W <= k; p += W)
        for (int64_t half = 0; half < kColumns; half += W) {
          F x[W];
#pragma GCC unroll 16
          for (int64_t r = 0; r < W; ++r) x[r] = load(from + p + (half + r) * col);
          transpose(x);
#pragma GCC unroll 16
          for (int64_t r = 0; r < W; ++r) store(to + (p + r) * kColumns + half, x[r]);
        }
    }
    for (; p < k; ++p)
      for (int64_t r = 0; r < kColumns; ++r) to[p * kColumns + r] = r < width ? from[p * row + r * col] : 0.f;
  }
}
// Rows of A whose distance would give them one place in the first cache (1,024 numbers do), further apart.
void copy_rows(const float *a, int64_t row, int64_t k, int64_t n, float *to) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * kApart, a + i * row, k * sizeof(float));
}
// n rows of A, of which `left` follow with those: A(i,p) to to[p·kRows + i]. What stands behind the last is overwritten.
void pack_rows(const float *a, int64_t row, int64_t col, int64_t k, int64_t n, int64_t left, float *to) {
  if (row == 1 && left >= W) {
    for (int64_t p = 0; p < k; ++p) store(to + p * kRows, load(a + p * col));
    return;
  }
  for (int64_t p = 0; p < k; ++p)
    for (int64_t i = 0; i < n; ++i) to[p * kRows + i] = a[i * row + p * col];
}

// Kept by its thread: a block of B, and some rows of A.
struct Scratch {
  float *b, *a;
  Scratch() {
    constexpr int64_t blocks = kBlockColumns * kBlockDepth, rows = kRows * kApart + W;
    void *p = nullptr;
    if (posix_memalign(&p, 64, (blocks + rows) * sizeof(float)) != 0) throw std::bad_alloc();
    b = static_cast<float *>(p);
    a = b + blocks;
  }
  ~Scratch() { std::free(b); }
};

// A length for blocks of at most `most` numbers, whole `units`, so that none is a thin rest.
int64_t even(int64_t n, int64_t most, int64_t unit) {
  const int64_t blocks = (n + most - 1) / most, each = blocks * unit;
  return blocks ? (n + each - 1) / each * unit : unit;
}

void product(const Product &x) {
  static thread_local const Scratch scratch;
  if (x.k == 0 && !x.add)
    for (int64_t i = 0; i < x.m; ++i)
      for (int64_t j = 0; j < x.n; ++j) x.c[i * x.c_row + j] = 0;
  const int64_t depth = even(x.k, kBlockDepth, 1), width = even(x.n, kBlockColumns, kColumns);
  for (int64_t j = 0; j < x.n; j += width) {
    const int64_t columns = x.n - j < width ? x.n - j : width;
    for (int64_t p = 0; p < x.k; p += depth) {
      const int64_t k = x.k - p < depth ? x.k - p : depth;
      const bool add = x.add || p > 0;
      pack_panels(x.b + p * x.b_row + j * x.b_col, x.b_row, x.b_col, k, columns, scratch.b);
      for (int64_t i = 0; i < x.m; i += kRows) {
        const int64_t rows = x.m - i < kRows ? x.m - i : kRows;
        const float *a = x.a + i * x.a_row + p * x.a_col;
        int64_t a_row = x.a_row;
        if (x.a_col != 1) {
          pack_rows(a, a_row, x.a_col, k, rows, x.m - i, scratch.a);
          a = scratch.a;
        } else if (a_row % 1024 == 0) {
          copy_rows(a, a_row, k, rows, scratch.a);
          a = scratch.a;
          a_row = kApart;
        }
        const Tile multiply = (x.a_col == 1 ? kTiles.in_rows : kTiles.packed)[rows - 1];
        for (int64_t at = 0; at < columns; at += kColumns) {
          const float *b = scratch.b + at * k;
          float *c = x.c + i * x.c_row + j + at;
          const int64_t left = columns - at;
          if (left >= kColumns) {
            multiply(k, a, a_row, b, c, x.c_row, add);
            continue;
          }
          float rest[kRows * kColumns];
          multiply(k, a, a_row, b, rest, kColumns, false);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t l = 0; l < left; ++l) c[r * x.c_row + l] = rest[r * kColumns + l] + (add ? c[r * x.c_row + l] : 0.f);
        }
      }
    }
  }
}
} // namespace
#endif

namespace rlhf {
#define RLHF_JOIN(a, b) a##b
#define RLHF_NAME(isa) RLHF_JOIN(isa, _products)
extern const ProductKernels RLHF_NAME(RLHF_ISA);
#if defined(__AVX512F__)
const ProductKernels RLHF_NAME(RLHF_ISA) = {product};
#else
const ProductKernels RLHF_NAME(RLHF_ISA) = {nullptr};
#endif
} // namespace rlhf
