// Causal attention on the CPU with a bias per head and distance, or per head and key, and its gradients.
//
// Scores exist in tiles of ROWS queries x KEYS keys that stay in the cache from the product that makes them to the
// product that uses them up; nothing of size T x T is ever written. Three things are left out that a general kernel
// computes:
// - tiles whose keys all lie ahead of their queries;
// - tiles whose keys are so far away that the bias leaves them no weight which a float could hold (`find_reaches`);
// - a mask: the bias of a head is one line over distances, which each query reads from its own place on.
//
// Scores are in base 2 throughout: exp(s) = 2^(s log2 e), where log2 e is multiplied into queries and bias.
//
// A bias per key is a sum over all keys before, far larger than its differences. So it comes in double, and what is
// added to scores is the difference to the first query of the block, which softmax does not see.
//
// Letters: B batch, H heads, T tokens (queries and keys), K head dim, D = K padded to whole register tiles.
// i, j count queries and keys, i0 and j0 are the first ones of a tile, b h one head of one sequence.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>

#include <omp.h>

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t HIGH = 6, WIDE = 2 * LANES;  // a register tile
constexpr int64_t KEYS = 64;                   // with ROWS = 48 a tile of scores takes 12 KiB
static_assert(KEYS % WIDE == 0);
constexpr int64_t MARGIN = ROWS + KEYS;  // a tile reads this far past the end of a bias line, at most

constexpr float LOG2E = 1.44269504088896340736f;
// Keys are left out where all of them together weigh less than 2^-25 of the query's own key.
constexpr float NEGLIGIBLE = -25;
// Floats between the memories of two threads: what one writes the other's core would fetch ahead, a tenth of its time.
constexpr int64_t APART = 16384;
// A weight below 2^-64 of the largest one is zero, so that no denormal number comes of it.
constexpr float LEAST = -64;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return *reinterpret_cast<const Anywhere*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<Anywhere*>(p) = x; }
INLINE Vec all(float x) { return Vec{} + x; }

INLINE float largest(Vec x) {
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) x[i] = std::max(x[i], x[i + half]);
  return x[0];
}

INLINE float sum(Vec x) {
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}

// 2^x for x <= 0 to 1e-7 of its value, 0 below LEAST; NaN stays NaN.
INLINE Vec power_of_two(Vec x) {
  const Bits none = x <= all(LEAST);
  x = none ? all(LEAST) : x;
  // Adding 1.5 * 2^23 leaves the nearest whole number in the last bits.
  const Vec shifted = x + 12582912.0f;
  const Vec f = x - (shifted - 12582912.0f);
  // The polynomial of degree 6 with the least relative error in [-1/2, 1/2], 2e-9.
  Vec p = all(1.5345810970757157e-4f);
  p = p * f + 1.3399930903688073e-3f;
  p = p * f + 9.618489071726799e-3f;
  p = p * f + 5.550328642129898e-2f;
  p = p * f + 2.4022646248340607e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.0f;
  const Bits scaled = reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23);
  return reinterpret_cast<Vec>(scaled & ~none);
}

// Products of small matrices -------------------------------------------------------------------------------------

// c (M x WIDE) = or += a (M x depth) b (depth x WIDE), held in registers. Each matrix has its step from row to row;
// a may lie TRANSPOSED.
template <int M, bool ADD, bool TRANSPOSED>
INLINE void multiply_registers(int64_t depth, const float* a, int64_t step_a, const float* b, int64_t step_b, float* c,
                               int64_t step_c) {
  Vec left[M], right[M];
  for (int m = 0; m < M; m++) {
    left[m] = ADD ? load(c + m * step_c) : Vec{};
    right[m] = ADD ? load(c + m * step_c + LANES) : Vec{};
  }
  for (int64_t d = 0; d < depth; d++) {
    const Vec b_left = load(b + d * step_b), b_right = load(b + d * step_b + LANES);
    for (int m = 0; m < M; m++) {
      const float x = TRANSPOSED ? a[d * step_a + m] : a[m * step_a + d];
      left[m] += x * b_left;
      right[m] += x * b_right;
    }
  }
  for (int m = 0; m < M; m++) {
    store(c + m * step_c, left[m]);
    store(c + m * step_c + LANES, right[m]);
  }
}

// c (rows x columns) = or += a (rows x depth) b (depth x columns); columns a multiple of WIDE. A function of its own,
// because a compiler that has more to keep in registers than this keeps less of this there.
template <bool ADD, bool TRANSPOSED = false>
__attribute__((noinline)) void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t step_a,
                                        const float* b, int64_t step_b, float* c, int64_t step_c) {
  const int64_t row = TRANSPOSED ? 1 : step_a;
  for (int64_t n = 0; n < columns; n += WIDE) {
    int64_t m = 0;
    for (; m + HIGH <= rows; m += HIGH)
      multiply_registers<HIGH, ADD, TRANSPOSED>(depth, a + m * row, step_a, b + n, step_b, c + m * step_c + n, step_c);
    for (; m < rows; m++)
      multiply_registers<1, ADD, TRANSPOSED>(depth, a + m * row, step_a, b + n, step_b, c + m * step_c + n, step_c);
  }
}

// Memory ---------------------------------------------------------------------------------------------------------

class Floats {  // an array of floats on a cache line
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * 4 + 63) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Floats() { std::free(data_); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  operator float*() { return data_; }

 private:
  float* data_;
};

INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// D floats: K of the source times a factor, then zeros. Nothing past K of the source is read.
INLINE void copy_row(float* to, const float* from, int64_t K, int64_t D, float factor = 1) {
  for (int64_t d = 0; d < K; d++) to[d] = from[d] * factor;
  for (int64_t d = K; d < D; d++) to[d] = 0;
}

// The larger one; NaN stays, and then no comparison holds.
INLINE float larger(float x, float y) { return y > x || y != y ? y : x; }

INLINE float dot(const float* x, const float* y, int64_t D) {
  Vec result{};
  for (int64_t d = 0; d < D; d += LANES) result += load(x + d) * load(y + d);
  return sum(result);
}

// (KEYS, D) -> (D, KEYS)
INLINE void transpose(float* to, const float* from, int64_t D) {
  for (int64_t d = 0; d < D; d++)
    for (int64_t j = 0; j < KEYS; j++) to[d * KEYS + j] = from[j * D + d];
}

// Runs task(0, memory), ..., task(count - 1, memory) on `threads` threads, each on the next one that is free. Every
// thread has `floats` floats of memory for itself. All threads take part, idle or not: a smaller team would end the rest of
// torch's.
template <typename Task>
void in_parallel(int64_t threads, int64_t count, int64_t floats, const Task& task) {
  const int64_t each = round_up(floats, 16) + APART;
  Floats memory(threads * each);
#pragma omp parallel num_threads(threads)
  {
    float* mine = memory + omp_get_thread_num() * each;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) task(i, mine);
  }
}

// Nothing may be thrown into Python: 1 where there was no memory, else 0.
template <typename Run>
int without_throwing(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// What Python hands over; alibi_lm/attention/native.py has the same fields in the same order. -------------------------
extern "C" {

struct View {  // (B, H, T, K) float32; the last dimension lies in one run
  float* data;
  int64_t step_b, step_h, step_t;

  INLINE float* row(int64_t b, int64_t h, int64_t t) const { return data + b * step_b + h * step_h + t * step_t; }
};

struct Call {
  int64_t B, H, T, K;
  int64_t threads;
  int64_t window;  // a query sees keys at distances below it
  float scale;     // of q . k
  View q, k, v, out;
  const float* bias;  // (H, T) of each distance, or null
  float* log_sum;     // (B, H, T): log2 of the sum of 2^score
  int64_t* reach;     // (B, H, ceil(T / ROWS)): distances below it count, for each block of queries
  const double* key_bias;  // (B, H, T) of each key, or null
  // The backward pass alone:
  View grad_out, grad_q, grad_k, grad_v;
  float* grad_bias;      // (B, H, T), or null
  float* grad_key_bias;  // (B, H, T), or null
};
}

namespace {

struct Shape {
  int64_t D, blocks, keys;  // padded head dim, blocks of queries, T padded to whole tiles

  explicit Shape(const Call& c)
      : D(round_up(c.K, WIDE)), blocks((c.T + ROWS - 1) / ROWS), keys(round_up(c.T, KEYS)) {}
};

// KEYS rows of K numbers from token j0 on, padded to D; zeros past the last token.
INLINE void copy_tile(float* to, const View& from, int64_t b, int64_t h, int64_t j0, const Call& c, int64_t D) {
  const int64_t real = std::min(KEYS, c.T - j0);
  for (int64_t j = 0; j < real; j++) copy_row(to + j * D, from.row(b, h, j0 + j), c.K, D);
  std::fill(to + real * D, to + KEYS * D, 0.0f);
}

// The bias of each head, reversed: that of query i and key j at T - 1 - i + j, in base 2; zeros for keys ahead.
class Lines {
 public:
  explicit Lines(const Call& c) : T_(c.T), used_(c.bias), lines_(c.bias ? c.H * (c.T + MARGIN) : 0) {
    if (!used_) return;
    for (int64_t h = 0; h < c.H; h++) {
      float* line = lines_ + h * (T_ + MARGIN);
      for (int64_t d = 0; d < T_; d++) line[T_ - 1 - d] = c.bias[h * T_ + d] * LOG2E;
      std::fill(line + T_, line + T_ + MARGIN, 0.0f);
    }
  }
  // From query i and key j on; null without a bias.
  INLINE const float* at(int64_t h, int64_t i, int64_t j) {
    return used_ ? lines_ + h * (T_ + MARGIN) + T_ - 1 - i + j : nullptr;
  }

 private:
  int64_t T_;
  bool used_;
  Floats lines_;
};

// How far the queries of each block see. The score of a key before the bias exceeds that of the query's own key by
//
//     s_ij - s_ii <= b_i = scale (|q_i| max_{j <= i} |k_j| - q_i . k_i)
//
// at most, so that all keys from distance d on together weigh at most 2^(b_i - bias(0)) sum_{e >= d} 2^bias(e) of the
// query's own one. This holds whatever was trained, and looks at no later token.
void find_reaches(const Call& c, int64_t b, int64_t h, const float* tails, float* q_row, float* k_row, int64_t D) {
  const int64_t blocks = (c.T + ROWS - 1) / ROWS;
  int64_t* reach = c.reach + (b * c.H + h) * blocks;
  // Even with a bound of 0 too far to save a fourth of the scores: not worth the looking.
  if (!c.bias || !(tails[c.T / 2] <= NEGLIGIBLE + c.bias[h * c.T] * LOG2E)) return std::fill(reach, reach + blocks, c.T);
  float key = 0;
  for (int64_t block = 0; block < blocks; block++) {
    float bound = 0;
    for (int64_t i = block * ROWS; i < std::min(c.T, (block + 1) * ROWS); i++) {
      copy_row(q_row, c.q.row(b, h, i), c.K, D);
      copy_row(k_row, c.k.row(b, h, i), c.K, D);
      const float k2 = dot(k_row, k_row, D), q2 = dot(q_row, q_row, D);
      key = larger(key, k2);
      const float excess = c.scale * LOG2E * (std::sqrt(q2 * key) - dot(q_row, k_row, D));
      bound = larger(bound, excess);
    }
    const float limit = NEGLIGIBLE + c.bias[h * c.T] * LOG2E - bound;
    // tails falls from its start to its end; a limit of NaN leaves nothing out.
    const float* found = std::partition_point(tails, tails + c.T, [&](float tail) { return !(tail <= limit); });
    reach[block] = std::max<int64_t>(found - tails, 1);
  }
}

// tails[d] = log2 of the sum of 2^bias over the distances from d on.
void sum_tails(const Call& c, int64_t h, float* tails) {
  double tail = -INFINITY;
  for (int64_t d = c.T - 1; d >= 0; d--) {
    const double bias = double(c.bias[h * c.T + d]) * LOG2E;
    const double top = std::max(bias, tail);
    if (top > -INFINITY) tail = top + std::log2(1 + std::exp2(std::min(bias, tail) - top));
    tails[d] = float(tail);
  }
}

// The same for a bias per key b_j: the keys up to j weigh at most 2^(b_i + log2 sum_{l <= j} 2^bias(l) - bias(i)) of the
// own one of query i. `sums` has room for T numbers.
void find_reaches_by_key(const Call& c, int64_t b, int64_t h, double* sums, float* q_row, float* k_row, int64_t D) {
  const int64_t blocks = (c.T + ROWS - 1) / ROWS, head = b * c.H + h;
  const double* bias = c.key_bias + head * c.T;
  double total = -INFINITY;
  for (int64_t j = 0; j < c.T; j++) {
    const double next = bias[j] * LOG2E, top = std::max(next, total);
    if (top > -INFINITY) total = top + std::log2(1 + std::exp2(std::min(next, total) - top));
    sums[j] = total;
  }
  float key = 0;
  for (int64_t block = 0; block < blocks; block++) {
    double limit = INFINITY;
    for (int64_t i = block * ROWS; i < std::min(c.T, (block + 1) * ROWS); i++) {
      copy_row(q_row, c.q.row(b, h, i), c.K, D);
      copy_row(k_row, c.k.row(b, h, i), c.K, D);
      key = larger(key, dot(k_row, k_row, D));
      const float excess = c.scale * LOG2E * (std::sqrt(dot(q_row, q_row, D) * key) - dot(q_row, k_row, D));
      const double own = NEGLIGIBLE + bias[i] * LOG2E - std::max(excess, 0.0f);  // NaN stays
      limit = own < limit || own != own ? own : limit;
    }
    const double* counting = std::partition_point(sums, sums + c.T, [&](double sum) { return sum <= limit; });
    c.reach[head * blocks + block] = block * ROWS - (counting - sums) + 1;
  }
}

// The part of a tile that has something to see: on the diagonal its last rows and its first keys.
struct Tile {
  int64_t i0, j0, rows, keys;

  INLINE Tile(const Call& c, int64_t block, int64_t j0) : i0(block * ROWS), j0(j0) {
    const int64_t end = std::min(i0 + ROWS, c.T);
    i0 += std::max<int64_t>(j0 - i0, 0) / HIGH * HIGH;
    rows = end - i0;
    keys = std::min(KEYS, round_up(end - j0, WIDE));
  }
};

// Hides the keys of a tile that its row must not see: those past `last`, and those `window` or more before it.
INLINE void hide(float* scores, int64_t keys, int64_t last, int64_t window) {
  for (int64_t j = 0; j < keys; j++) scores[j] = j <= last && last - j < window ? scores[j] : -INFINITY;
}

// A tile of scores becomes weights relative to the largest score so far, which `top` and `sums` of each row, and what
// `out` has added up, are brought up to.
INLINE void soften(int64_t rows, int64_t keys, float* scores, float* top, float* sums, float* out, int64_t D) {
  for (int64_t r = 0; r < rows; r++) {
    float* row = scores + r * KEYS;
    Vec highest = load(row);
    for (int64_t j = LANES; j < keys; j += LANES) {
      const Vec x = load(row + j);
      highest = x > highest ? x : highest;
    }
    const float before = top[r], now = std::max(before, largest(highest));
    if (now == -INFINITY) {  // a window hides all these keys
      std::fill(row, row + keys, 0.0f);
      continue;
    }
    if (now > before) {
      const float factor = std::exp2(before - now);
      sums[r] *= factor;
      for (int64_t d = 0; d < D; d += LANES) store(out + r * D + d, load(out + r * D + d) * factor);
      top[r] = now;
    }
    Vec added{};
    for (int64_t j = 0; j < keys; j += LANES) {
      const Vec weight = power_of_two(load(row + j) - now);
      added += weight;
      store(row + j, weight);
    }
    sums[r] += sum(added);
  }
}

// The bias of the keys of a tile relative to the first query of its block, in base 2; null without one.
INLINE const float* key_line(const Call& c, int64_t head, int64_t block, const Tile& tile, float* line) {
  if (!c.key_bias) return nullptr;
  const double *bias = c.key_bias + head * c.T, own = bias[block * ROWS];
  for (int64_t j = 0; j < tile.keys; j++) line[j] = tile.j0 + j < c.T ? float((bias[tile.j0 + j] - own) * LOG2E) : 0;
  return line;
}

// Adds the biases to a tile of scores and hides keys where the tile has some to hide.
INLINE void bias_and_hide(const Call& c, Lines& lines, int64_t h, const Tile& tile, const float* of_keys, float* scores) {
  const int64_t newest = tile.i0 + tile.rows - 1;
  const bool edge = tile.j0 + tile.keys - 1 > tile.i0 || newest - tile.j0 >= c.window;
  if (!edge && !c.bias && !of_keys) return;
  for (int64_t i = tile.i0; i <= newest; i++, scores += KEYS) {
    if (c.bias) {
      const float* line = lines.at(h, i, tile.j0);
      for (int64_t j = 0; j < tile.keys; j += LANES) store(scores + j, load(scores + j) + load(line + j));
    }
    if (of_keys)
      for (int64_t j = 0; j < tile.keys; j += LANES) store(scores + j, load(scores + j) + load(of_keys + j));
    if (edge) hide(scores, tile.keys, i - tile.j0, c.window);
  }
}

INLINE int64_t first_key(const Call& c, int64_t reach, int64_t i0) {
  return std::max<int64_t>(0, i0 - std::min(reach, c.window) + 1) / KEYS * KEYS;
}

void attend(const Call& c) {
  const Shape s(c);
  Lines lines(c);
  Floats tails(c.bias ? c.H * c.T : 0), keys(c.B * c.H * s.keys * s.D), values(c.B * c.H * s.keys * s.D);
  if (c.bias)
    in_parallel(c.threads, c.H, 0, [&](int64_t h, float*) { sum_tails(c, h, tails + h * c.T); });

  // Keys as (tile, D, KEYS), values as (T, D), zeros past the last token.
  in_parallel(c.threads, c.B * c.H, KEYS * s.D + (c.key_bias ? 2 * c.T : 0), [&](int64_t head, float* rows) {
    const int64_t b = head / c.H, h = head % c.H;
    if (c.key_bias && !c.bias)
      find_reaches_by_key(c, b, h, reinterpret_cast<double*>(rows + KEYS * s.D), rows, rows + s.D, s.D);
    else if (c.key_bias)
      std::fill_n(c.reach + head * s.blocks, s.blocks, c.T);
    else
      find_reaches(c, b, h, tails + (c.bias ? h * c.T : 0), rows, rows + s.D, s.D);
    for (int64_t j0 = 0; j0 < s.keys; j0 += KEYS) {
      float *key = keys + (head * s.keys + j0) * s.D, *value = values + (head * s.keys + j0) * s.D;
      copy_tile(rows, c.k, b, h, j0, c, s.D);
      transpose(key, rows, s.D);
      copy_tile(value, c.v, b, h, j0, c, s.D);
    }
  });

  in_parallel(c.threads, c.B * c.H * s.blocks, ROWS * (2 * s.D + KEYS + 2) + KEYS, [&](int64_t task, float* queries) {
    float *out = queries + ROWS * s.D, *scores = out + ROWS * s.D, *line = scores + ROWS * KEYS;
    float *top = line + KEYS, *sums = top + ROWS;
    // The last queries, which see most, come first.
    const int64_t head = task / s.blocks, block = s.blocks - 1 - task % s.blocks, b = head / c.H, h = head % c.H;
    const int64_t i0 = block * ROWS, rows = std::min<int64_t>(ROWS, c.T - i0);
    for (int64_t r = 0; r < rows; r++) copy_row(queries + r * s.D, c.q.row(b, h, i0 + r), c.K, s.D, c.scale * LOG2E);
    std::fill(out, out + rows * s.D, 0.0f);
    std::fill(top, top + rows, -INFINITY);
    std::fill(sums, sums + rows, 0.0f);
    for (int64_t j0 = first_key(c, c.reach[head * s.blocks + block], i0); j0 < i0 + rows; j0 += KEYS) {
      const Tile tile(c, block, j0);
      const int64_t skip = tile.i0 - i0, packed = (head * s.keys + j0) * s.D;
      float* sum_up = out + skip * s.D;
      multiply<false>(tile.rows, tile.keys, c.K, queries + skip * s.D, s.D, keys + packed, KEYS, scores, KEYS);
      bias_and_hide(c, lines, h, tile, key_line(c, head, block, tile, line), scores);
      soften(tile.rows, tile.keys, scores, top + skip, sums + skip, sum_up, s.D);
      multiply<true>(tile.rows, s.D, tile.keys, scores, KEYS, values + packed, s.D, sum_up, s.D);
    }
    for (int64_t r = 0; r < rows; r++) {
      copy_row(c.out.row(b, h, i0 + r), out + r * s.D, c.K, c.K, 1 / sums[r]);
      c.log_sum[head * c.T + i0 + r] = top[r] + std::log2(sums[r]);
    }
  });
}

void differentiate(const Call& c) {
  const Shape s(c);
  Lines lines(c);
  const int64_t of_tile = 6 * KEYS * s.D + 2 * ROWS * KEYS + 2 * KEYS;
  const int64_t of_head = c.T * (3 * s.D + 1) + (c.grad_bias ? c.T + MARGIN : 0);
  in_parallel(c.threads, c.B * c.H, of_tile + of_head, [&](int64_t head, float* key) {
    const int64_t b = head / c.H, h = head % c.H;
    float *value = key + KEYS * s.D, *key_t = value + KEYS * s.D, *value_t = key_t + KEYS * s.D;
    float *grad_k = value_t + KEYS * s.D, *grad_v = grad_k + KEYS * s.D;
    float *weights = grad_v + KEYS * s.D, *grad_scores = weights + ROWS * KEYS;
    float *line = grad_scores + ROWS * KEYS, *of_keys = line + KEYS;  // key biases of a tile, and their gradients
    float *queries = key + of_tile, *grads = queries + c.T * s.D, *grad_q = grads + c.T * s.D, *inner = grad_q + c.T * s.D;
    float* grad_line = inner + c.T;  // as in Lines

    for (int64_t i = 0; i < c.T; i++) {
      copy_row(queries + i * s.D, c.q.row(b, h, i), c.K, s.D, c.scale * LOG2E);
      copy_row(grads + i * s.D, c.grad_out.row(b, h, i), c.K, s.D);
      copy_row(key, c.out.row(b, h, i), c.K, s.D);
      inner[i] = dot(grads + i * s.D, key, s.D);
    }
    std::fill(grad_q, grad_q + c.T * s.D, 0.0f);
    if (c.grad_bias) std::fill(grad_line, grad_line + c.T + MARGIN, 0.0f);

    for (int64_t j0 = 0; j0 < c.T; j0 += KEYS) {
      copy_tile(key, c.k, b, h, j0, c, s.D);
      copy_tile(value, c.v, b, h, j0, c, s.D);
      transpose(key_t, key, s.D);
      transpose(value_t, value, s.D);
      std::fill(grad_k, grad_k + 2 * KEYS * s.D, 0.0f);  // and grad_v
      std::fill(of_keys, of_keys + KEYS, 0.0f);
      for (int64_t block = j0 / ROWS; block < s.blocks; block++) {
        if (j0 < first_key(c, c.reach[head * s.blocks + block], block * ROWS)) continue;
        const Tile tile(c, block, j0);
        const int64_t first = tile.i0 * s.D;
        const float *query = queries + first, *grad = grads + first;
        multiply<false>(tile.rows, tile.keys, c.K, query, s.D, key_t, KEYS, weights, KEYS);
        multiply<false>(tile.rows, tile.keys, c.K, grad, s.D, value_t, KEYS, grad_scores, KEYS);
        bias_and_hide(c, lines, h, tile, key_line(c, head, block, tile, line), weights);
        for (int64_t r = 0; r < tile.rows; r++) {
          const int64_t i = tile.i0 + r;
          const float log_sum = c.log_sum[head * c.T + i], mean = inner[i];
          float *w = weights + r * KEYS, *g = grad_scores + r * KEYS;
          for (int64_t j = 0; j < tile.keys; j += LANES) {
            const Vec weight = power_of_two(load(w + j) - log_sum);
            store(w + j, weight);
            store(g + j, weight * (load(g + j) - mean));
          }
          if (c.grad_bias) {
            float* line = grad_line + c.T - 1 - i + j0;
            for (int64_t j = 0; j < tile.keys; j += LANES) store(line + j, load(line + j) + load(g + j));
          }
          if (c.grad_key_bias)
            for (int64_t j = 0; j < tile.keys; j += LANES) store(of_keys + j, load(of_keys + j) + load(g + j));
        }
        multiply<true, true>(tile.keys, s.D, tile.rows, weights, KEYS, grad, s.D, grad_v, s.D);
        multiply<true, true>(tile.keys, s.D, tile.rows, grad_scores, KEYS, query, s.D, grad_k, s.D);
        multiply<true>(tile.rows, s.D, tile.keys, grad_scores, KEYS, key, s.D, grad_q + first, s.D);
      }
      for (int64_t j = 0; j < std::min<int64_t>(KEYS, c.T - j0); j++) {
        // The queries had scale log2 e in them.
        copy_row(c.grad_k.row(b, h, j0 + j), grad_k + j * s.D, c.K, c.K, 1 / LOG2E);
        copy_row(c.grad_v.row(b, h, j0 + j), grad_v + j * s.D, c.K, c.K);
        if (c.grad_key_bias) c.grad_key_bias[head * c.T + j0 + j] = of_keys[j];
      }
    }
    for (int64_t i = 0; i < c.T; i++) copy_row(c.grad_q.row(b, h, i), grad_q + i * s.D, c.K, c.K, c.scale);
    if (c.grad_bias)
      for (int64_t d = 0; d < c.T; d++) c.grad_bias[head * c.T + d] = grad_line[c.T - 1 - d];
  });
}

}  // namespace

extern "C" int forward(const Call* call) {
  return without_throwing([&] { attend(*call); });
}

extern "C" int backward(const Call* call) {
  return without_throwing([&] { differentiate(*call); });
}
