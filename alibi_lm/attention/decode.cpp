// Attention of new tokens to the keys of a cache, on the CPU. `native.cpp` is compiled in front of this file, and its
// helpers serve here too.
//
// The T queries are the last T tokens. Each head has keys of its own number at a place of its own, in the order of
// their positions, the last T of them those of the queries. A head sees `windows` keys back. Keys are left out as in
// native.cpp, where all of them together weigh less than 2^-25 of the query's own one.
//
// A few queries are served one by one, each by several threads that share its keys; many in tiles.

#include <vector>

extern "C" {

// What Python hands over; alibi_lm/attention/decode.py has the same fields in the same order.
struct Decode {
  int64_t B, H, T, K;
  int64_t threads;
  int64_t length;  // distances of a line
  int64_t step;    // floats from one key to the next, and from one value to the next
  float scale;
  View q, out;
  View new_k, new_v;                 // (B, H, T, K): put behind the keys first; or null, where they lie there already
  float *const *k, *const *v;        // (H): the first key and value of the first sequence
  const int64_t* step_b;             // (H): floats from one sequence to the next
  const int64_t *keys, *windows;     // (H); the new ones counted
  const int64_t* missing;            // (H): keys before the first one that are not held
  const float* lines;                // (H, length + MARGIN): the bias in base 2, of distance d at length - 1 - d; or null
  const float* tails;                // (H, length): log2 of the sum of 2^(bias - own bias) from each distance on; or null
  float* norms;                      // (B, H): the largest norm of a key so far, brought up to date; or null
  float* lost;                       // (B, H, T): log2 of a bound of the share that missing keys would have; or null
};
}

namespace {

constexpr int64_t FEW = 6;           // up to this many queries are served one by one
constexpr int64_t SEGMENT = 2048;    // keys that one thread takes at a time for one query
constexpr int64_t COMPARE = LANES;   // keys whose products are added up together

// One vector of the sums of LANES vectors: pairs are folded until one number of each is left.
#ifdef __clang__
INLINE Vec sums_of(Vec* x) {
  Vec result;
  for (int64_t i = 0; i < LANES; i++) result[i] = sum(x[i]);
  return result;
}
#else
template <int64_t HALF>
INLINE Vec fold(Vec x, Vec y) {
  Bits low, high;
  for (int32_t i = 0; i < LANES; i++) {
    low[i] = i / HALF * 2 * HALF + i % HALF;
    high[i] = low[i] + HALF;
  }
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
}

template <int64_t HALF>
INLINE void fold_all(Vec* x) {
  if constexpr (HALF > 0) {
    for (int64_t i = 0; i < HALF; i++) x[i] = fold<HALF>(x[2 * i], x[2 * i + 1]);
    fold_all<HALF / 2>(x);
  }
}

INLINE Vec sums_of(Vec* x) {
  fold_all<LANES / 2>(x);
  return x[0];
}
#endif

// The products of a query with `count` keys, -inf for the others of a vector.
INLINE Vec products(const float* q, const float* k, int64_t step, int64_t K, int64_t count) {
  const int64_t whole = K / LANES * LANES;
  Vec parts[LANES];
  for (int64_t j = 0; j < LANES; j++) {
    const float* key = k + (j < count ? j : 0) * step;
    Vec part{};
    for (int64_t d = 0; d < whole; d += LANES) part += load(q + d) * load(key + d);
    parts[j] = part;
  }
  Vec result = sums_of(parts);
  if (whole < K || count < LANES)
    for (int64_t j = 0; j < LANES; j++) {
      if (j >= count) result[j] = -INFINITY;
      else
        for (int64_t d = whole; d < K; d++) result[j] += q[d] * k[j * step + d];
    }
  return result;
}

// out (K) += the sum of weights times values.
INLINE void add_values(const float* weights, const float* v, int64_t step, int64_t K, int64_t count, float* out) {
  int64_t d = 0;
  for (; d + LANES <= K; d += LANES) {
    Vec a{}, b{}, c{}, e{};
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
      const float* value = v + j * step + d;
      a += weights[j] * load(value);
      b += weights[j + 1] * load(value + step);
      c += weights[j + 2] * load(value + 2 * step);
      e += weights[j + 3] * load(value + 3 * step);
    }
    for (; j < count; j++) a += weights[j] * load(v + j * step + d);
    store(out + d, load(out + d) + ((a + b) + (c + e)));
  }
  for (; d < K; d++)
    for (int64_t j = 0; j < count; j++) out[d] += weights[j] * v[j * step + d];
}

struct Partial {
  int64_t item, begin, end;  // (b, h, t) as one number, and keys of it
  float top, sum;            // the largest score and the sum of weights relative to it
};

struct Span {  // the keys of one head of one sequence
  const float *k, *v, *line;
  int64_t h, keys;

  Span(const Decode& c, int64_t head)
      : h(head % c.H), keys(c.keys[h]) {
    const int64_t offset = head / c.H * c.step_b[h];
    k = c.k[h] + offset;
    v = c.v[h] + offset;
    line = c.lines ? c.lines + h * (c.length + MARGIN) + c.length - 1 : nullptr;  // of distance 0
  }
};

// The first key that query i (counted like the keys) must look at.
INLINE int64_t first_seen(const Decode& c, const Span& s, int64_t i, float bound) {
  int64_t reach = c.windows[s.h];
  if (c.tails) {
    const float *tails = c.tails + s.h * c.length, limit = NEGLIGIBLE - bound;
    const float* found = std::partition_point(tails, tails + c.length, [&](float tail) { return !(tail <= limit); });
    if (found < tails + c.length) reach = std::min<int64_t>(reach, std::max<int64_t>(found - tails, 1));
  }
  return std::max<int64_t>(0, i - reach + 1);
}

// See `lost` of Decode; the query's norm has the scale in it.
INLINE float lost_share(const Decode& c, const Span& s, int64_t i, float query, float key, float log_sum) {
  const int64_t window = c.windows[s.h];
  if (c.missing[s.h] == 0 && window > i) return -INFINITY;
  const int64_t nearest = std::min({window, i + 1, c.length - 1});
  const float rounding = 1e-3f;  // of the terms, which may be some hundreds each
  return query * key + c.tails[s.h * c.length + nearest] - (log_sum - s.line[0]) + rounding;
}

INLINE float norm(const float* x, int64_t K) {
  float result = 0;
  for (int64_t d = 0; d < K; d++) result += x[d] * x[d];
  return std::sqrt(result);
}

// The largest norm of a key of a head: of those before and the new ones, or of all that are held.
INLINE float largest_norm(const Decode& c, const Span& s, int64_t head) {
  float result = c.norms ? c.norms[head] : 0;
  for (int64_t j = c.norms ? s.keys - c.T : 0; j < s.keys; j++) result = larger(result, norm(s.k + j * c.step, c.K));
  if (c.norms) c.norms[head] = result;
  return result;
}

void append(const Decode& c) {
  for (int64_t head = 0; head < c.B * c.H; head++) {
    const int64_t b = head / c.H, h = head % c.H, at = b * c.step_b[h] + (c.keys[h] - c.T) * c.step;
    for (int64_t t = 0; t < c.T; t++) {
      copy_row(c.k[h] + at + t * c.step, c.new_k.row(b, h, t), c.K, c.K);
      copy_row(c.v[h] + at + t * c.step, c.new_v.row(b, h, t), c.K, c.K);
    }
  }
}

void decode_few(const Decode& c) {
  const int64_t items = c.B * c.H * c.T;
  std::vector<Partial> partials;
  Floats queries(items * c.K), norms(items), longest(c.B * c.H);
  for (int64_t item = 0; item < items; item++) {
    const int64_t head = item / c.T, t = item % c.T;
    const Span s(c, head);
    float* q = queries + item * c.K;
    copy_row(q, c.q.row(head / c.H, s.h, t), c.K, c.K, c.scale * LOG2E);
    // Looking at the norm of every key would cost as much as looking at the keys.
    const bool bounded = c.norms && c.tails;
    if (bounded && t == 0) longest[head] = largest_norm(c, s, head);
    const int64_t i = s.keys - c.T + t;
    float bound = INFINITY;
    if (bounded) {
      float own = 0;
      for (int64_t d = 0; d < c.K; d++) own += q[d] * s.k[i * c.step + d];
      norms[item] = norm(q, c.K);
      bound = norms[item] * longest[head] - own;
    }
    for (int64_t begin = first_seen(c, s, i, bound); begin <= i; begin += SEGMENT)
      partials.push_back({item, begin, std::min(begin + SEGMENT, i + 1), -INFINITY, 0});
  }
  const int64_t count = partials.size();
  Floats outs(count * c.K);
  in_parallel(c.threads, count, KEYS, [&](int64_t n, float* scores) {
    Partial& p = partials[n];
    const Span s(c, p.item / c.T);
    const int64_t i = s.keys - c.T + p.item % c.T;
    const float *q = queries + p.item * c.K, *line = s.line ? s.line - i : nullptr;
    float* out = outs + n * c.K;
    std::fill(out, out + c.K, 0.0f);
    for (int64_t j0 = p.begin; j0 < p.end; j0 += KEYS) {
      const int64_t keys = std::min(KEYS, p.end - j0);
      Vec highest = all(-INFINITY);
      for (int64_t j = 0; j < keys; j += COMPARE) {
        Vec score = products(q, s.k + (j0 + j) * c.step, c.step, c.K, std::min(COMPARE, keys - j));
        if (line) score += load(line + j0 + j);
        highest = score > highest ? score : highest;
        store(scores + j, score);
      }
      const float now = std::max(p.top, largest(highest));
      if (now > p.top) {
        const float factor = std::exp2(p.top - now);
        p.sum *= factor;
        for (int64_t d = 0; d < c.K; d++) out[d] *= factor;
        p.top = now;
      }
      Vec added{};
      for (int64_t j = 0; j < keys; j += LANES) {
        const Vec weight = power_of_two(load(scores + j) - p.top);
        added += weight;
        store(scores + j, weight);
      }
      p.sum += sum(added);
      add_values(scores, s.v + j0 * c.step, c.step, c.K, keys, out);
    }
  });
  for (int64_t n = 0; n < count;) {
    const int64_t item = partials[n].item, first = n;
    float top = -INFINITY, total = 0;
    for (; n < count && partials[n].item == item; n++) top = larger(top, partials[n].top);
    const Span s(c, item / c.T);
    float* out = c.out.row(item / c.T / c.H, s.h, item % c.T);
    std::fill(out, out + c.K, 0.0f);
    for (int64_t m = first; m < n; m++) {
      const float factor = std::exp2(partials[m].top - top);
      total += partials[m].sum * factor;
      for (int64_t d = 0; d < c.K; d++) out[d] += outs[m * c.K + d] * factor;
    }
    for (int64_t d = 0; d < c.K; d++) out[d] /= total;
    if (c.lost)
      c.lost[item] = lost_share(c, s, s.keys - c.T + item % c.T, norms[item], longest[item / c.T], top + std::log2(total));
  }
}

void decode_many(const Decode& c) {
  const int64_t D = round_up(c.K, WIDE), blocks = (c.T + ROWS - 1) / ROWS;
  std::vector<int64_t> first(blocks);
  for (int64_t head = 0; head < c.B * c.H; head++) {
    const Span s(c, head);
    const int64_t b = head / c.H, before = s.keys - c.T;
    const float key = c.tails ? largest_norm(c, s, head) : 0;
    in_parallel(c.threads, blocks, 2 * D, [&](int64_t block, float* q) {
      float bound = 0, *own = q + D;
      for (int64_t t = block * ROWS; t < std::min(c.T, (block + 1) * ROWS) && c.tails; t++) {
        copy_row(q, c.q.row(b, s.h, t), c.K, D, c.scale * LOG2E);
        copy_row(own, s.k + (before + t) * c.step, c.K, D);
        bound = larger(bound, norm(q, c.K) * key - dot(q, own, D));
      }
      first[block] = first_seen(c, s, before + block * ROWS, bound);
    });
    const int64_t start = *std::min_element(first.begin(), first.end()), tiles = (s.keys - start + KEYS - 1) / KEYS;
    Floats keys(tiles * KEYS * D), values(tiles * KEYS * D);
    in_parallel(c.threads, tiles, KEYS * D, [&](int64_t tile, float* rows) {
      const int64_t j0 = start + tile * KEYS, real = std::min(KEYS, s.keys - j0);
      float* value = values + tile * KEYS * D;
      for (int64_t j = 0; j < real; j++) {
        copy_row(rows + j * D, s.k + (j0 + j) * c.step, c.K, D);
        copy_row(value + j * D, s.v + (j0 + j) * c.step, c.K, D);
      }
      std::fill(rows + real * D, rows + KEYS * D, 0.0f);
      std::fill(value + real * D, value + KEYS * D, 0.0f);
      transpose(keys + tile * KEYS * D, rows, D);
    });
    in_parallel(c.threads, blocks, ROWS * (2 * D + KEYS + 2), [&](int64_t task, float* queries) {
      float *out = queries + ROWS * D, *scores = out + ROWS * D, *top = scores + ROWS * KEYS, *sums = top + ROWS;
      const int64_t block = blocks - 1 - task, t0 = block * ROWS, rows = std::min<int64_t>(ROWS, c.T - t0);
      const int64_t newest = before + t0 + rows - 1;
      for (int64_t r = 0; r < rows; r++) copy_row(queries + r * D, c.q.row(b, s.h, t0 + r), c.K, D, c.scale * LOG2E);
      std::fill(out, out + rows * D, 0.0f);
      std::fill(top, top + rows, -INFINITY);
      std::fill(sums, sums + rows, 0.0f);
      for (int64_t tile = (first[block] - start) / KEYS; start + tile * KEYS <= newest; tile++) {
        const int64_t j0 = start + tile * KEYS;
        multiply<false>(rows, KEYS, c.K, queries, D, keys + tile * KEYS * D, KEYS, scores, KEYS);
        const bool edge = j0 + KEYS - 1 > before + t0 || newest - j0 >= c.windows[s.h];
        for (int64_t r = 0; r < rows; r++) {
          const int64_t i = before + t0 + r;
          float* row = scores + r * KEYS;
          if (s.line)
            for (int64_t j = 0; j < KEYS; j += LANES) store(row + j, load(row + j) + load(s.line - i + j0 + j));
          if (edge) hide(row, KEYS, i - j0, c.windows[s.h]);
        }
        soften(rows, KEYS, scores, top, sums, out, D);
        multiply<true>(rows, D, KEYS, scores, KEYS, values + tile * KEYS * D, D, out, D);
      }
      for (int64_t r = 0; r < rows; r++) {
        copy_row(c.out.row(b, s.h, t0 + r), out + r * D, c.K, c.K, 1 / sums[r]);
        if (c.lost)
          c.lost[head * c.T + t0 + r] = lost_share(c, s, before + t0 + r, norm(queries + r * D, c.K), key,
                                                   top[r] + std::log2(sums[r]));
      }
    });
  }
}

}  // namespace

extern "C" int decode(const Decode* call) {
  return without_throwing([&] {
    if (call->new_k.data) append(*call);
    call->T <= FEW ? decode_few(*call) : decode_many(*call);
  });
}
