// Inference on a CPU: products in int8, the Transformer's encoder, a step of its decoder, the choice of next words, and
// the whole of a plain beam search.
//
// Shapes: R rows, B sentences, M source tokens, P positions before this one, S source positions, D width, N heads,
// H head width, L layers, I inputs and O outputs of a linear map, V vocabulary, U words of a shortlist, C candidates.
// A slot holds the keys and values of one position, L × 2 × D. A row's result depends on no other row: integer sums are
// exact, and everything else is computed row by row.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 64;       // outputs that a product computes together
constexpr int64_t TILE_ROWS = 6;    // rows that it computes together: 6 × 4 vectors of sums fit the registers
constexpr int64_t CHUNK_ROWS = 48;  // rows that pass through all layers together: their activations stay in the cache
constexpr int64_t LANES = 16;       // numbers of a vector
constexpr float EPSILON = 1e-5f;    // of the norms

}  // namespace

extern "C" {

struct Linear {
  const int8_t* weight;     // blocks of 64 outputs × groups of 4 inputs, both padded with zeros
  const float* scale_O;     // of each output's weights
  const int32_t* offset_O;  // 128 × the sum of its weights, as inputs are stored with 128 added
  const float* bias_O;
  int64_t inputs, outputs, relu;
};

struct Norm {
  const float* gain_D;
  const float* bias_D;  // null: RMSNorm
};

struct Layer {
  Linear self_in, self_out, cross_in, cross_out, inner, outer;  // self_in: query, key and value
  Norm self_norm, cross_norm, feed_forward_norm;
};

// The layers of a decoder, or of an encoder, which has no cross-attention.
struct Stack {
  const Layer* layers;
  const float* slope_N;  // of ALiBi, or null
  int64_t count, width, heads, hidden, pre_norm, activation, rotary;
  Norm last;  // of pre-norm models
};

struct Step {
  const float* input_RD;
  uint16_t* const* levels;     // of each position: a slot for each row that was alive; the last one is written
  const int32_t* ancestor_RP;  // which slot of each earlier level is the row's own
  const uint16_t* memory;      // slots of the sources, one after the other
  const int64_t* sentence_R;   // which of them a row translates
  const int64_t* first_B;      // where its slots begin
  const int64_t* length_B;     // how many it has
  float* features_RD;
  float* weights_RLNS;  // of cross-attention, zero at first; null: not wanted
  int64_t rows, position, source, threads;  // source: positions of the longest one
};

// A beam search with no rules but a longest length and words that are never generated.
struct Search {
  const float* embedding_VD;
  const float* position_TD;   // what the input adds at each position
  const uint16_t* memory;     // slots of the sources, one after the other
  const int64_t* first_B;     // where those of a sentence begin
  const int64_t* length_B;    // how many it has
  const int64_t* longest_B;   // words of its longest translation, END included
  const float* penalty_T;     // divides the log probability of a translation of this length
  const int64_t* banned_X;    // special ids; like END they come before all words
  const int64_t* listed_BU;   // the only ids of each sentence: the special ones, its words, then −1; null: all
  const int8_t* rows_OI;      // for them: the weights of the output, output by output
  int64_t* ids_BNT;           // the best translations, best first, with END
  float* log_probability_BNT;  // of the first words together
  float* score_BN;
  int64_t* count_BN;  // words of each translation; 0: there is none
  int64_t sentences, beam, wanted, columns, words, bans, begin, end, threads;  // wanted: N, columns: T, words: U
  float scale;  // of the embeddings
};

struct Source {
  const float* input_MD;  // the real tokens of all sentences, one after the other
  const int64_t* length_B;
  float* states_MD;
  int64_t sentences, threads;
};

}  // extern "C"

namespace {

enum Activation { RELU, GELU, SWIGLU };

// Run work(first, last) on parts of 0 … count, each in a thread of its own.
template <typename Work>
void in_parallel(int64_t count, int64_t threads, const Work& work) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, count * i / threads, count * (i + 1) / threads);
  work(0, count / threads);
  for (auto& other : others) other.join();
}

// ------------------------------------------------------------------------------------------ products in int8

int64_t padded(int64_t inputs) { return (inputs + 3) / 4 * 4; }

// How a row is stored: VNNI multiplies bytes without a sign by bytes with one, so it adds 128 to all numbers.
#ifdef __AVX512VNNI__
typedef uint8_t Stored;
constexpr int32_t ADDED = 128;
#else
typedef int16_t Stored;
constexpr int32_t ADDED = 0;
#endif

// Vectors at every level of instructions; functions take them by reference, as their passing by value differs.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline float larger(float a, float b) { return a < b ? b : a; }

// The largest of some numbers, or of their absolute values.
template <bool ABSOLUTE = false>
float maximum(const float* x, int64_t count) {
  float best = ABSOLUTE ? 0.0f : -INFINITY;
  int64_t i = 0;
  if (count >= LANES) {
    Floats lane = Floats{} + best, other;
    for (; i + LANES <= count; i += LANES) {
      std::memcpy(&other, x + i, sizeof other);
      if (ABSOLUTE) other = other < 0.0f ? -other : other;
      lane = lane < other ? other : lane;
    }
    for (int64_t l = 0; l < LANES; ++l) best = larger(best, lane[l]);
  }
  for (; i < count; ++i) best = larger(best, ABSOLUTE ? std::fabs(x[i]) : x[i]);
  return best;
}

// Round a row to −127 … 127, and return the scale that restores it; each row has its own.
float quantize(const float* x_I, int64_t inputs, Stored* stored_I) {
  const float largest = maximum<true>(x_I, inputs);
  const float factor = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < inputs; ++i) stored_I[i] = static_cast<int32_t>(x_I[i] * factor + 128.5f) - 128 + ADDED;
  for (int64_t i = inputs; i < padded(inputs); ++i) stored_I[i] = ADDED;
  return largest / 127.0f;
}

#ifdef __AVX512VNNI__

// Sums of this type stay in registers; GCC 12 copies those of __m512i to memory in each round of a loop.
typedef int32_t Int32x16 __attribute__((vector_size(64)));

inline Int32x16 multiply_add(Int32x16 sum, __m512i bytes, __m512i weight) {
  return reinterpret_cast<Int32x16>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), bytes, weight));
}

inline void store(const Linear& map, int64_t o, float scale, float* y, Int32x16 sum) {
  const __mmask16 mask = (1 << std::clamp<int64_t>(map.outputs - o, 0, 16)) - 1;
  const __m512i total = _mm512_sub_epi32(reinterpret_cast<__m512i>(sum), _mm512_loadu_si512(map.offset_O + o));
  const __m512 both_scales = _mm512_mul_ps(_mm512_loadu_ps(map.scale_O + o), _mm512_set1_ps(scale));
  __m512 out = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), both_scales, _mm512_loadu_ps(map.bias_O + o));
  if (map.relu) out = _mm512_max_ps(out, _mm512_setzero_ps());
  _mm512_mask_storeu_ps(y, mask, out);
}

// Multiply some rows by one block of weights, into rows that lie `stride` numbers apart.
template <int ROWS>
void multiply_tile(const Linear& map, int64_t block, const Stored* x, const float* scale, float* y, int64_t stride) {
  const int64_t width = padded(map.inputs);
  const int8_t* weight = map.weight + block * width * BLOCK;
  Int32x16 sum[ROWS][4] = {};
  for (int64_t i = 0; i < width; i += 4, weight += 4 * BLOCK)
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * width + i, 4);
      for (int v = 0; v < 4; ++v)
        sum[r][v] = multiply_add(sum[r][v], _mm512_set1_epi32(four), _mm512_loadu_si512(weight + 64 * v));
    }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v) store(map, block * BLOCK + 16 * v, scale[r], y + r * stride + 16 * v, sum[r][v]);
}

#else

// Not inlined: everyone who multiplies gets the same bits, however their loops are vectorised.
__attribute__((noinline)) void store(const Linear& map, int64_t o, int64_t count, float scale, float* y,
                                     const int32_t* sum) {
  for (int64_t i = o; i < std::min(map.outputs, o + count); ++i) {
    const float out = sum[i - o] * (map.scale_O[i] * scale) + map.bias_O[i];
    y[i - o] = map.relu ? std::max(out, 0.0f) : out;
  }
}

#ifdef __AVX2__

typedef int32_t Int32x8 __attribute__((vector_size(32)));

// Add the products of four inputs and four outputs, in pairs.
inline Int32x8 multiply_add(Int32x8 sum, __m256i four_inputs, __m256i weight) {
  return sum + reinterpret_cast<Int32x8>(_mm256_madd_epi16(four_inputs, weight));
}

inline __m256i sixteen(const int8_t* weight) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight)));
}

// Multiply some rows by one block of weights, eight outputs at a time.
template <int ROWS>
void multiply_tile(const Linear& map, int64_t block, const Stored* x, const float* scale, float* y, int64_t stride) {
  const int64_t width = padded(map.inputs);
  for (int64_t o = block * BLOCK; o < std::min(map.outputs, (block + 1) * BLOCK); o += 8) {
    const int8_t* weight = map.weight + block * width * BLOCK + o % BLOCK * 4;
    Int32x8 sum[ROWS][2] = {};
    for (int64_t i = 0; i < width; i += 4, weight += 4 * BLOCK)
      for (int r = 0; r < ROWS; ++r) {
        int64_t four;
        std::memcpy(&four, x + r * width + i, 8);
        for (int v = 0; v < 2; ++v)
          sum[r][v] = multiply_add(sum[r][v], _mm256_set1_epi64x(four), sixteen(weight + 16 * v));
      }
    for (int r = 0; r < ROWS; ++r) {
      const auto a = reinterpret_cast<__m256i>(sum[r][0]), b = reinterpret_cast<__m256i>(sum[r][1]);
      int32_t total[8];
      const __m256i in_order = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(total), in_order);
      store(map, o, 8, scale[r], y + r * stride + o % BLOCK, total);
    }
  }
}

#else

// The same in plain C++.
template <int ROWS>
void multiply_tile(const Linear& map, int64_t block, const Stored* x, const float* scale, float* y, int64_t stride) {
  const int64_t width = padded(map.inputs);
  for (int r = 0; r < ROWS; ++r) {
    int32_t sum[BLOCK] = {};
    for (int64_t i = 0; i < width; i += 4) {
      const Stored* four = x + r * width + i;
      const int8_t* w = map.weight + (block * width + i) * BLOCK;
      for (int o = 0; o < BLOCK; ++o)
        sum[o] += four[0] * w[4 * o] + four[1] * w[4 * o + 1] + four[2] * w[4 * o + 2] + four[3] * w[4 * o + 3];
    }
    store(map, block * BLOCK, BLOCK, scale[r], y + r * stride, sum);
  }
}

#endif
#endif

// Rows as integers, with the scale of each.
struct QuantizedRows {
  std::vector<Stored> stored;
  std::vector<float> scale_R;

  void assign(const float* x_RI, int64_t rows, int64_t inputs) {
    const int64_t width = padded(inputs);
    stored.resize(rows * width);
    scale_R.resize(rows);
    for (int64_t r = 0; r < rows; ++r) scale_R[r] = quantize(x_RI + r * inputs, inputs, &stored[r * width]);
  }
};

// Visit all blocks of outputs, and for each the rows in groups, which `tile` multiplies into memory of its choice.
template <typename Tile>
void for_each_tile(const Linear& map, const float* x_RI, int64_t rows, const Tile& tile) {
  static thread_local QuantizedRows x;
  const int64_t width = padded(map.inputs), blocks = (map.outputs + BLOCK - 1) / BLOCK;
  x.assign(x_RI, rows, map.inputs);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t count = std::min(rows - r, TILE_ROWS);
      tile(block, r, count, [&, count](float* y, int64_t stride) {
        const auto multiply_rows = [&](auto chosen) { chosen(map, block, &x.stored[r * width], &x.scale_R[r], y, stride); };
        switch (count) {
          case 1: multiply_rows(multiply_tile<1>); break;
          case 2: multiply_rows(multiply_tile<2>); break;
          case 3: multiply_rows(multiply_tile<3>); break;
          case 4: multiply_rows(multiply_tile<4>); break;
          case 5: multiply_rows(multiply_tile<5>); break;
          default: multiply_rows(multiply_tile<6>);
        }
      });
    }
}

void multiply(const Linear& map, const float* x_RI, int64_t rows, float* y_RO) {
  for_each_tile(map, x_RI, rows, [&](int64_t block, int64_t r, int64_t, const auto& multiply_into) {
    multiply_into(y_RO + r * map.outputs + block * BLOCK, map.outputs);
  });
}

// One output of one row.
float output(const Linear& map, const int8_t* rows_OI, int64_t o, const Stored* x, float scale) {
  const int8_t* weight = rows_OI + o * map.inputs;
  int32_t sum = ADDED ? -map.offset_O[o] : 0;
  for (int64_t i = 0; i < map.inputs; ++i) sum += x[i] * weight[i];
  return sum * (map.scale_O[o] * scale) + map.bias_O[o];
}

// The outputs that are listed, of some rows; −∞ where an id is below 0. Their weights, in rows_OI output by output, are
// read once for all rows.
void multiply_listed(const Linear& map, const int8_t* rows_OI, const float* x_RI, int64_t rows, const int64_t* ids_U,
                     int64_t words, float* y_RU) {
  static thread_local QuantizedRows x;
  x.assign(x_RI, rows, map.inputs);
  for (int64_t u = 0; u < words; ++u)
    for (int64_t r = 0; r < rows; ++r)
      y_RU[r * words + u] = ids_U[u] < 0 ? -INFINITY
                                         : output(map, rows_OI, ids_U[u], &x.stored[r * padded(map.inputs)], x.scale_R[r]);
}

// ------------------------------------------------------------------------------------------ parts of a layer

// exp(x) to 7 digits, in a form that compilers vectorise.
inline float exponential(float x) {
  const float t = std::max(x, -87.0f) * 1.44269504f, whole = std::floor(t + 0.5f), f = t - whole;
  float y = 1.53968e-4f;
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1.0f}) y = y * f + c;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}

// The same for numbers up to 80, a vector of them, which it overwrites; the whole part comes from a conversion, not
// from a floor.
inline void exponentiate(Floats& x) {
  x = (x < -87.0f ? Floats{} - 87.0f : x) * 1.44269504f;
  const Ints biased = __builtin_convertvector(x + 127.5f, Ints);
  const Floats f = x - __builtin_convertvector(biased - 127, Floats);
  Floats y = Floats{} + 1.53968e-4f;
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1.0f}) y = y * f + c;
  const Ints bits = biased << 23;
  std::memcpy(&x, &bits, sizeof x);
  x *= y;
}

void normalize(const Norm& norm, const float* x_D, int64_t width, float* y_D) {
  float mean = 0.0f, square = 0.0f;
  if (norm.bias_D) {
    for (int64_t d = 0; d < width; ++d) mean += x_D[d];
    mean /= width;
  }
  for (int64_t d = 0; d < width; ++d) square += (x_D[d] - mean) * (x_D[d] - mean);
  const float factor = 1.0f / std::sqrt(square / width + EPSILON);
  for (int64_t d = 0; d < width; ++d) {
    const float y = (x_D[d] - mean) * factor * norm.gain_D[d];
    y_D[d] = norm.bias_D ? y + norm.bias_D[d] : y;
  }
}

// Rotate pairs of channels of every head by an angle that grows with the position (Su et al. 2021, §3.2).
void rotate(float* x_D, int64_t width, int64_t head, int64_t position) {
  for (int64_t h = 0; h < head; h += 2) {
    const double angle = position * std::pow(10000.0, -static_cast<double>(h) / head);
    const float sine = std::sin(angle), cosine = std::cos(angle);
    for (int64_t d = h; d < width; d += head) {
      const float even = x_D[d], odd = x_D[d + 1];
      x_D[d] = even * cosine - odd * sine;
      x_D[d + 1] = even * sine + odd * cosine;
    }
  }
}

// Keys and values are stored in bfloat16: half the memory to read, which takes most of the time of attention.
inline float restored(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

void softmax(float* x, int64_t count) {
  const float largest = maximum(x, count);
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    x[i] = exponential(x[i] - largest);
    sum += x[i];
  }
  for (int64_t i = 0; i < count; ++i) x[i] /= sum;
}

// Average the values of `count` slots by the softmax of their keys' scores, which weights_NS receives. With ALiBi, a
// query at `position` scores a slot less the further away it is (Press et al. 2022, §3).
template <int64_t HEAD, typename Slot>
void attend_heads(const Stack& model, const float* query_D, int64_t count, const Slot& slot, const float* slope_N,
                  int64_t position, float* weights_NS, float* context_D) {
  const int64_t head = HEAD ? HEAD : model.width / model.heads;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t n = 0; n < model.heads; ++n) {
      const float* q = query_D + n * head;
      const uint16_t* k = slot(s) + n * head;
      float score = slope_N ? -slope_N[n] * std::abs(position - s) : 0.0f;
      for (int64_t h = 0; h < head; ++h) score += q[h] * restored(k[h]);
      weights_NS[n * count + s] = score;
    }
  for (int64_t n = 0; n < model.heads; ++n) softmax(weights_NS + n * count, count);
  std::fill_n(context_D, model.width, 0.0f);
  for (int64_t s = 0; s < count; ++s)
    for (int64_t n = 0; n < model.heads; ++n) {
      const float weight = weights_NS[n * count + s];
      const uint16_t* v = slot(s) + model.width + n * head;
      for (int64_t h = 0; h < head; ++h) context_D[n * head + h] += weight * restored(v[h]);
    }
}

// The usual head widths are compiled on their own: their loops have no remainder.
template <typename Slot>
void attend(const Stack& model, const float* query_D, int64_t count, const Slot& slot, const float* slope_N,
            int64_t position, float* weights_NS, float* context_D) {
  const auto run = [&](auto chosen) {
    chosen(model, query_D, count, slot, slope_N, position, weights_NS, context_D);
  };
  switch (model.width / model.heads) {
    case 32: run(attend_heads<32, Slot>); break;
    case 64: run(attend_heads<64, Slot>); break;
    case 128: run(attend_heads<128, Slot>); break;
    default: run(attend_heads<0, Slot>);
  }
}

void activate(const Stack& model, float* x, int64_t rows) {
  const int64_t hidden = model.hidden;
  if (model.activation == GELU)
    for (int64_t i = 0; i < rows * hidden; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  if (model.activation == SWIGLU)  // each row shrinks to its first half, in place
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < hidden; ++i) {
        const float value = x[2 * r * hidden + i], gate = x[(2 * r + 1) * hidden + i];
        x[r * hidden + i] = value * gate / (1.0f + exponential(-gate));
      }
}

// ------------------------------------------------------------------------------------------ the step

// Some rows on their way through all layers.
class Rows {
 protected:
  static int64_t widest(const Stack& model) {
    return std::max(3 * model.width, model.hidden * (model.activation == SWIGLU ? 2 : 1));
  }

  Rows(const Stack& model, const float* input_RD, int64_t rows, int64_t slots)
      : model_(model), rows_(rows), x_RD_(input_RD, input_RD + rows * model.width), y_RD_(x_RD_.size()),
        wide_(new float[rows * widest(model)]), weights_NS_(model.heads * slots) {}

  // Return the input of a sublayer.
  const float* prepare(const Norm& norm) {
    if (!model_.pre_norm) return x_RD_.data();
    normalize_rows(norm, y_RD_.data());
    return y_RD_.data();
  }

  // Add the last product of a sublayer to the rows.
  void finish(const Linear& map, const Norm& norm, const float* input) {
    float* output = input == wide_.get() ? y_RD_.data() : wide_.get();
    multiply(map, input, rows_, output);
    for (size_t i = 0; i < x_RD_.size(); ++i) x_RD_[i] += output[i];
    if (!model_.pre_norm) normalize_rows(norm, x_RD_.data());
  }

  void feed_forward(const Layer& layer) {
    multiply(layer.inner, prepare(layer.feed_forward_norm), rows_, wide_.get());
    activate(model_, wide_.get(), rows_);
    finish(layer.outer, layer.feed_forward_norm, wide_.get());
  }

  // Turn a row's query and key, and store its key and value in a slot of this layer.
  void store(float* query_key_value, int64_t position, uint16_t* slot) const {
    const int64_t width = model_.width;
    if (model_.rotary) rotate(query_key_value, 2 * width, width / model_.heads, position);
    for (int64_t d = 0; d < 2 * width; ++d) slot[d] = rounded(query_key_value[width + d]);
  }

  void write(float* out_RD) const {
    if (model_.pre_norm) normalize_rows(model_.last, out_RD);
    else std::copy(x_RD_.begin(), x_RD_.end(), out_RD);
  }

  void normalize_rows(const Norm& norm, float* out_RD) const {
    for (int64_t r = 0; r < rows_; ++r)
      normalize(norm, &x_RD_[r * model_.width], model_.width, out_RD + r * model_.width);
  }

  const Stack& model_;
  const int64_t rows_;
  std::vector<float> x_RD_, y_RD_;
  std::unique_ptr<float[]> wide_;  // the outputs of a product, which no one has to set to zero
  std::vector<float> weights_NS_;
};

int64_t slot_size(const Stack& decoder) { return decoder.count * 2 * decoder.width; }

// Where a row of the decoder finds keys and values, and where it stores those of its own position.
struct RowCache {
  std::vector<const uint16_t*> prefix;  // a slot for each earlier position
  uint16_t* own;
  const uint16_t* source;  // slots one after the other
  int64_t length;          // and their number
  float* weights_LNS;      // of cross-attention, zero at first; null: not wanted
  int64_t stride;          // of their sources

  int64_t position() const { return prefix.size(); }
};

// Rows of the decoder, each at a position of its own.
class DecoderRows : Rows {
 public:
  DecoderRows(const Stack& model, const float* input_RD, const RowCache* caches, int64_t rows)
      : Rows(model, input_RD, rows, longest(caches, rows)), caches_(caches) {}

  void run(float* features_RD) {
    for (int64_t i = 0; i < model_.count; ++i) {
      const Layer& layer = model_.layers[i];
      multiply(layer.self_in, prepare(layer.self_norm), rows_, wide_.get());
      for (int64_t r = 0; r < rows_; ++r) attend_to_prefix(i, r);
      finish(layer.self_out, layer.self_norm, y_RD_.data());
      multiply(layer.cross_in, prepare(layer.cross_norm), rows_, wide_.get());
      for (int64_t r = 0; r < rows_; ++r) attend_to_source(i, r);
      finish(layer.cross_out, layer.cross_norm, y_RD_.data());
      feed_forward(layer);
    }
    write(features_RD);
  }

 private:
  static int64_t longest(const RowCache* caches, int64_t rows) {
    int64_t slots = 0;
    for (int64_t r = 0; r < rows; ++r) slots = std::max({slots, caches[r].position() + 1, caches[r].length});
    return slots;
  }

  void attend_to_prefix(int64_t i, int64_t r) {
    const RowCache& cache = caches_[r];
    const int64_t width = model_.width, position = cache.position(), layer = i * 2 * width;
    float* query_D = &wide_[r * 3 * width];
    store(query_D, position, cache.own + layer);
    const auto slot = [&](int64_t p) { return (p < position ? cache.prefix[p] : cache.own) + layer; };
    attend(model_, query_D, position + 1, slot, model_.slope_N, position, weights_NS_.data(), &y_RD_[r * width]);
  }

  void attend_to_source(int64_t i, int64_t r) {
    const RowCache& cache = caches_[r];
    const int64_t width = model_.width, length = cache.length, size = slot_size(model_);
    const auto slot = [&](int64_t s) { return cache.source + s * size + i * 2 * width; };
    attend(model_, &wide_[r * width], length, slot, nullptr, 0, weights_NS_.data(), &y_RD_[r * width]);
    if (cache.weights_LNS)
      for (int64_t n = 0; n < model_.heads; ++n)
        std::copy_n(&weights_NS_[n * length], length, cache.weights_LNS + (i * model_.heads + n) * cache.stride);
  }

  const RowCache* caches_;
};

// The caches of some rows in a step of all.
std::vector<RowCache> caches_of(const Stack& model, const Step& step, int64_t first, int64_t rows) {
  const int64_t size = slot_size(model);
  std::vector<RowCache> caches;
  for (int64_t r = first; r < first + rows; ++r) {
    const int64_t sentence = step.sentence_R[r];
    float* weights = step.weights_RLNS ? step.weights_RLNS + r * model.count * model.heads * step.source : nullptr;
    caches.push_back({{}, step.levels[step.position] + r * size, step.memory + step.first_B[sentence] * size,
                      step.length_B[sentence], weights, step.source});
    for (int64_t p = 0; p < step.position; ++p)
      caches.back().prefix.push_back(step.levels[p] + step.ancestor_RP[r * step.position + p] * size);
  }
  return caches;
}

// Whole sentences in the encoder.
class EncoderRows : Rows {
 public:
  EncoderRows(const Stack& model, const float* input_RD, const int64_t* length_B, int64_t sentences, int64_t rows)
      : Rows(model, input_RD, rows, rows), length_B_(length_B), sentences_(sentences), kept_(rows * 2 * model.width) {}

  void run(float* states_RD) {
    for (int64_t i = 0; i < model_.count; ++i) {
      const Layer& layer = model_.layers[i];
      multiply(layer.self_in, prepare(layer.self_norm), rows_, wide_.get());
      for (int64_t b = 0, first = 0; b < sentences_; first += length_B_[b++]) attend_within(first, length_B_[b]);
      finish(layer.self_out, layer.self_norm, y_RD_.data());
      feed_forward(layer);
    }
    write(states_RD);
  }

 private:
  void attend_within(int64_t first, int64_t length) {
    const int64_t width = model_.width;
    const auto slot = [&](int64_t s) { return &kept_[(first + s) * 2 * width]; };
    for (int64_t s = 0; s < length; ++s) store(&wide_[(first + s) * 3 * width], s, slot(s));
    for (int64_t s = 0; s < length; ++s)
      attend(model_, &wide_[(first + s) * 3 * width], length, slot, model_.slope_N, s, weights_NS_.data(),
             &y_RD_[(first + s) * width]);
  }

  const int64_t* length_B_;
  const int64_t sentences_;
  std::vector<uint16_t> kept_;  // keys and values of one layer
};

}  // namespace

extern "C" {

void seq2seq_linear(const Linear* map, const float* x_RI, int64_t rows, float* y_RO, int64_t threads) {
  in_parallel((rows + TILE_ROWS - 1) / TILE_ROWS, threads, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(rows, last * TILE_ROWS);
    for (int64_t r = first * TILE_ROWS; r < end; r += CHUNK_ROWS)
      multiply(*map, x_RI + r * map->inputs, std::min(CHUNK_ROWS, end - r), y_RO + r * map->outputs);
  });
}

// The outputs that each sentence lists, for its `count` rows.
void seq2seq_shortlisted(const Linear* map, const int8_t* rows_OI, const float* x_RI, const int64_t* ids_BU,
                         int64_t sentences, int64_t count, int64_t words, float* y_RU, int64_t threads) {
  in_parallel(sentences, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      multiply_listed(*map, rows_OI, x_RI + b * count * map->inputs, count, ids_BU + b * words, words,
                      y_RU + b * count * words);
  });
}

void seq2seq_decoder_step(const Stack* model, const Step* step) {
  in_parallel(step->rows, step->threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r += CHUNK_ROWS) {
      const int64_t rows = std::min(CHUNK_ROWS, last - r), offset = r * model->width;
      const std::vector<RowCache> caches = caches_of(*model, *step, r, rows);
      DecoderRows(*model, step->input_RD + offset, caches.data(), rows).run(step->features_RD + offset);
    }
  });
}

void seq2seq_encode(const Stack* model, const Source* source) {
  in_parallel(source->sentences, source->threads, [&](int64_t first, int64_t last) {
    int64_t start = 0;  // row of the next chunk
    for (int64_t b = 0; b < first; ++b) start += source->length_B[b];
    while (first < last) {
      int64_t count = 0, rows = 0;
      do rows += source->length_B[first + count++];
      while (first + count < last && rows + source->length_B[first + count] <= CHUNK_ROWS);
      EncoderRows(*model, source->input_MD + start * model->width, source->length_B + first, count, rows)
          .run(source->states_MD + start * model->width);
      first += count;
      start += rows;
    }
  });
}

}  // extern "C"

namespace {

// ------------------------------------------------------------------------------------------ the search

float log_sum_exp(const float* x_V, int64_t vocabulary) {
  const float largest = maximum(x_V, vocabulary);
  float sum = 0.0f;
  for (int64_t v = 0; v < vocabulary; ++v) sum += exponential(x_V[v] - largest);
  return std::log(sum) + largest;
}

// The best word of a row, and the sum of the exponentials of all its logits, from blocks that are then forgotten: each
// lane of a vector has its own. The exponentials are relative to a reference, so that they stay finite.
struct BestWord {
  static constexpr float RISE = 20.0f;  // by which a logit may exceed the reference
  float reference = -INFINITY;
  Floats value = Floats{} - INFINITY, sum = {};
  Ints first = {};  // id of the first word in the vector that holds a lane's best

  void add(const float* x) {
    const float largest = maximum(x, BLOCK);
    if (!(largest <= reference + RISE)) {
      sum *= exponential(reference - largest);
      reference = largest;
    }
    for (int64_t i = 0; i < BLOCK; i += LANES) {
      Floats power;
      std::memcpy(&power, x + i, sizeof power);
      power -= reference;
      exponentiate(power);
      sum += power;
    }
  }

  void compete(const float* x, int32_t id) {
    for (int32_t i = 0; i < BLOCK; i += LANES) {
      Floats other;
      std::memcpy(&other, x + i, sizeof other);
      const Ints better = other > value;
      value = better ? other : value;
      first = better ? Ints{} + (id + i) : first;
    }
  }

  // Of equal words the first is the best.
  int64_t id() const {
    const float best = largest_value();
    int64_t found = INT32_MAX;
    for (int64_t l = 0; l < LANES; ++l)
      if (value[l] == best) found = std::min(found, first[l] + l);
    return found;
  }

  float log_probability() const {
    float total = 0.0f;
    for (int64_t l = 0; l < LANES; ++l) total += sum[l];
    return largest_value() - (std::log(total) + reference);
  }

 private:
  float largest_value() const {
    float best = value[0];
    for (int64_t l = 1; l < LANES; ++l) best = larger(best, value[l]);
    return best;
  }
};

// Banned words take part in the sum only; `only_R` holds the one word that a row may have, or −1.
struct Choice {
  const int64_t* banned_X;
  int64_t bans;
  const int64_t* only_R;

  void consider(BestWord& best, float* x, int64_t first, int64_t row) const {
    best.add(x);
    const int64_t only = only_R[row];
    for (int64_t i = 0; i < BLOCK && only >= 0; ++i)
      if (first + i != only) x[i] = -INFINITY;
    for (int64_t i = 0; i < bans && only < 0; ++i)
      if (banned_X[i] >= first && banned_X[i] < first + BLOCK) x[banned_X[i] - first] = -INFINITY;
    best.compete(x, first);
  }
};

// The best word of each row and its log probability, without logits in memory.
void find_best_words(const Linear& map, const float* x_RI, int64_t rows, const Choice& choice, float* log_probability_R,
                     int64_t* id_R) {
  std::vector<BestWord> best_R(rows);
  for_each_tile(map, x_RI, rows, [&](int64_t block, int64_t r, int64_t count, const auto& multiply_into) {
    float x[TILE_ROWS * BLOCK];
    if ((block + 1) * BLOCK > map.outputs) std::fill_n(x, TILE_ROWS * BLOCK, -INFINITY);  // beyond the vocabulary
    multiply_into(x, BLOCK);
    for (int64_t i = 0; i < count; ++i) choice.consider(best_R[r + i], x + i * BLOCK, block * BLOCK, r + i);
  });
  for (int64_t r = 0; r < rows; ++r) {
    log_probability_R[r] = best_R[r].log_probability();
    id_R[r] = best_R[r].id();
  }
}

// The best continuations of one sentence so far, best first; of equal ones the first stays.
struct Best {
  float* value_C;
  int64_t *id_C, *origin_C;
  int64_t count;

  void offer(float value, int64_t id, int64_t origin) {
    int64_t c = count;
    while (c > 0 && value > value_C[c - 1]) --c;
    if (c == count) return;
    for (int64_t i = count - 1; i > c; --i) {
      value_C[i] = value_C[i - 1];
      id_C[i] = id_C[i - 1];
      origin_C[i] = origin_C[i - 1];
    }
    value_C[c] = value;
    id_C[c] = id;
    origin_C[c] = origin;
  }

  // Offer all words of one hypothesis, block by block: few blocks hold any that is good enough.
  void offer_row(const float* x_V, int64_t vocabulary, float shift, int64_t origin) {
    for (int64_t first = 0; first < vocabulary; first += BLOCK) {
      const int64_t last = std::min(vocabulary, first + BLOCK);
      if (!(maximum(x_V + first, last - first) + shift > value_C[count - 1])) continue;
      for (int64_t v = first; v < last; ++v) offer(x_V[v] + shift, v, origin);
    }
  }
};

}  // namespace

extern "C" {

void seq2seq_log_sum_exp(const float* x_RV, int64_t rows, int64_t vocabulary, float* out_R, int64_t threads) {
  in_parallel(rows, threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) out_R[r] = log_sum_exp(x_RV + r * vocabulary, vocabulary);
  });
}

// The `count` best of x − normalizer + before over the words and hypotheses of each sentence.
void seq2seq_top(const float* x_RV, const float* normalizer_R, const float* before_R, int64_t sentences,
                 int64_t hypotheses, int64_t vocabulary, int64_t count, float* value_BC, int64_t* id_BC,
                 int64_t* origin_BC, int64_t threads) {
  std::fill_n(value_BC, sentences * count, -INFINITY);
  std::fill_n(id_BC, sentences * count, 0);
  std::fill_n(origin_BC, sentences * count, 0);
  in_parallel(sentences, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      Best best{value_BC + b * count, id_BC + b * count, origin_BC + b * count, count};
      for (int64_t k = 0, r = b * hypotheses; k < hypotheses; ++k, ++r)
        best.offer_row(x_RV + r * vocabulary, vocabulary, before_R[r] - normalizer_R[r], k);
    }
  });
}

}  // extern "C"

namespace {

// ------------------------------------------------------------------------------------------ the whole search

#ifdef __FMA__
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }  // rounds once, as torch does
#else
inline float multiply_add(float a, float b, float c) { return a * b + c; }
#endif

// The beginning of a translation, or a whole one.
struct Path {
  std::vector<int64_t> ids;
  std::vector<float> log_probability;  // of the first words together
  std::vector<int32_t> slots;          // which of the slots of each position are its own
  float score = 0.0f;                  // of a whole one

  float total() const { return ids.empty() ? 0.0f : log_probability.back(); }

  Path with(int64_t id, float log_probability_after) const {
    Path longer = *this;
    longer.ids.push_back(id);
    longer.log_probability.push_back(log_probability_after);
    return longer;
  }
};

// The search for the translations of one sentence.
class Beam {
 public:
  Beam(const Search& search, int64_t sentence) : search_(search), sentence_(sentence), live_(1) {}

  int64_t rows() const { return live_.size(); }
  const int64_t* listed() const { return search_.listed_BU + sentence_ * search_.words; }
  const Path& path(int64_t k) const { return live_[k]; }
  bool at_limit() const { return length_ + 1 == search_.longest_B[sentence_]; }

  // Return where a row's keys and values are, in memory that lasts until the next step.
  RowCache cache(int64_t k, int64_t size) {
    const int64_t beam = search_.beam;
    slots_.resize((length_ + 1) * beam * size);
    Path& path = live_[k];
    path.slots.push_back(length_ * beam + k);
    RowCache cache{{}, &slots_[path.slots.back() * size], search_.memory + search_.first_B[sentence_] * size,
                search_.length_B[sentence_], nullptr, 0};
    for (int64_t p = 0; p < length_; ++p) cache.prefix.push_back(&slots_[path.slots[p] * size]);
    return cache;
  }

  // Go on with the best continuations, best first, and return whether that decides the sentence. The first `beam` of
  // them may end, and the first `beam` of the others go on.
  bool advance(const Best& best) {
    const size_t beam = search_.beam;
    std::vector<Path> next;
    ++length_;
    for (int64_t c = 0; c < best.count && best.value_C[c] > -INFINITY; ++c) {
      const bool ends = best.id_C[c] == search_.end;
      if (ends && c < search_.beam) finish(live_[best.origin_C[c]].with(search_.end, best.value_C[c]));
      if (!ends && next.size() < beam) next.push_back(live_[best.origin_C[c]].with(best.id_C[c], best.value_C[c]));
    }
    live_.swap(next);
    return live_.empty() || finished_.size() == beam || length_ == search_.longest_B[sentence_];
  }

  void write() const {
    for (int64_t n = 0; n < search_.wanted; ++n) {
      const int64_t i = sentence_ * search_.wanted + n;
      const Path* path = n < static_cast<int64_t>(finished_.size()) ? &finished_[n] : nullptr;
      search_.count_BN[i] = path ? path->ids.size() : 0;
      if (!path) continue;
      std::copy(path->ids.begin(), path->ids.end(), search_.ids_BNT + i * search_.columns);
      std::copy(path->log_probability.begin(), path->log_probability.end(),
                search_.log_probability_BNT + i * search_.columns);
      search_.score_BN[i] = path->score;
    }
  }

 private:
  // Keep the best whole translations, best first; of equal ones the first stays.
  void finish(Path path) {
    path.score = path.total() / search_.penalty_T[length_];
    const auto worse = [&](const Path& other) { return other.score < path.score; };
    finished_.insert(std::find_if(finished_.begin(), finished_.end(), worse), std::move(path));
    if (static_cast<int64_t>(finished_.size()) > search_.beam) finished_.pop_back();
  }

  const Search& search_;
  const int64_t sentence_;
  int64_t length_ = 0;
  std::vector<Path> live_, finished_;
  std::vector<uint16_t> slots_;  // of all positions and hypotheses
};

// What one thread does: it keeps a chunk of rows busy, and takes the next sentence as soon as one is decided.
class Searcher {
 public:
  Searcher(const Stack& model, const Linear& output, const Search& search, int64_t most, std::atomic<int64_t>& waiting)
      : model_(model), output_(output), search_(search), most_(most), waiting_(waiting) {}

  void run() {
    std::vector<std::unique_ptr<Beam>> beams;
    for (;;) {
      // The last sentences are the longest; they go first, so that the threads end together.
      for (int64_t b; beams.size() < most_ && (b = --waiting_) >= 0;) beams.emplace_back(new Beam(search_, b));
      if (beams.empty()) return;
      step(beams);
    }
  }

 private:
  void step(std::vector<std::unique_ptr<Beam>>& beams) {
    int64_t rows = 0;
    for (const auto& beam : beams) rows += beam->rows();
    std::vector<float> input_RD(rows * model_.width), features_RD(input_RD.size());
    std::vector<RowCache> caches;
    for (const auto& beam : beams)
      for (int64_t k = 0; k < beam->rows(); ++k) {
        embed(beam->path(k), &input_RD[caches.size() * model_.width]);
        caches.push_back(beam->cache(k, slot_size(model_)));
      }
    DecoderRows(model_, input_RD.data(), caches.data(), rows).run(features_RD.data());
    if (search_.beam == 1 && !search_.listed_BU) choose_word(beams, features_RD.data());
    else choose_words(beams, features_RD.data(), rows);
    beams.erase(std::remove(beams.begin(), beams.end(), nullptr), beams.end());
  }

  void embed(const Path& path, float* input_D) const {
    const int64_t last = path.ids.empty() ? search_.begin : path.ids.back(), width = model_.width;
    const float *word = search_.embedding_VD + last * width, *position = search_.position_TD + path.ids.size() * width;
    for (int64_t d = 0; d < width; ++d) input_D[d] = multiply_add(search_.scale, word[d], position[d]);
  }

  void choose_word(std::vector<std::unique_ptr<Beam>>& beams, const float* features_RD) const {
    const int64_t rows = beams.size();
    std::vector<float> log_probability_R(rows);
    std::vector<int64_t> id_R(rows), only_R(rows);
    for (int64_t r = 0; r < rows; ++r) only_R[r] = beams[r]->at_limit() ? search_.end : -1;
    find_best_words(output_, features_RD, rows, {search_.banned_X, search_.bans, only_R.data()},
                    log_probability_R.data(), id_R.data());
    for (int64_t r = 0; r < rows; ++r) {
      float value = beams[r]->path(0).total() + log_probability_R[r];
      int64_t origin = 0;
      advance(beams[r], {&value, &id_R[r], &origin, 1});
    }
  }

  void choose_words(std::vector<std::unique_ptr<Beam>>& beams, const float* features_RD, int64_t rows) const {
    const bool listed = search_.listed_BU != nullptr;
    const int64_t vocabulary = listed ? search_.words : output_.outputs, count = 2 * search_.beam;
    std::unique_ptr<float[]> logits(new float[rows * vocabulary]);
    if (!listed) multiply(output_, features_RD, rows, logits.get());
    float* x_V = logits.get();
    for (auto& beam : beams) {
      const int64_t hypotheses = beam->rows();
      if (listed)
        multiply_listed(output_, search_.rows_OI, features_RD, hypotheses, beam->listed(), vocabulary, x_V);
      features_RD += hypotheses * model_.width;
      std::vector<float> value_C(count, -INFINITY);
      std::vector<int64_t> id_C(count), origin_C(count);
      Best best{value_C.data(), id_C.data(), origin_C.data(), count};
      for (int64_t k = 0; k < hypotheses; ++k, x_V += vocabulary) {
        const float shift = beam->path(k).total() - log_sum_exp(x_V, vocabulary);
        for (int64_t i = 0; i < search_.bans; ++i) x_V[search_.banned_X[i]] = -INFINITY;
        if (beam->at_limit()) best.offer(x_V[search_.end] + shift, search_.end, k);
        else best.offer_row(x_V, vocabulary, shift, k);
      }
      for (int64_t c = 0; listed && c < count; ++c) id_C[c] = beam->listed()[id_C[c]];
      advance(beam, best);
    }
  }

  static void advance(std::unique_ptr<Beam>& beam, const Best& best) {
    if (!beam->advance(best)) return;
    beam->write();
    beam.reset();
  }

  const Stack& model_;
  const Linear& output_;
  const Search& search_;
  const size_t most_;              // sentences in work at once
  std::atomic<int64_t>& waiting_;  // sentences that no thread has taken
};

}  // namespace

extern "C" {

void seq2seq_search(const Stack* model, const Linear* output, const Search* search) {
  std::atomic<int64_t> waiting{search->sentences};
  const int64_t threads = std::min(search->threads, search->sentences);
  const int64_t share = (search->sentences + threads - 1) / threads;  // the first thread must not take all
  const int64_t most = std::max<int64_t>(1, std::min(CHUNK_ROWS / search->beam, share));
  in_parallel(threads, threads, [&](int64_t, int64_t) { Searcher(*model, *output, *search, most, waiting).run(); });
}

}  // extern "C"
