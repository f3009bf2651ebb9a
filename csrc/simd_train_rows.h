// What a training pass does number by number or row by row: GELU, dropout with what follows it, and
// dropout's masks. Written once over a vector type, included by simd_ops.h.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.

namespace {

using tt::KeepArgs;
using tt::kKeepLanes;
using tt::TrainGeluArgs;
using tt::TrainNormArgs;

// ---- parts of rows ----

inline Vec LoadNumbers(const uint8_t* x) { return Vec::FromBytes(x); }

// The first numbers of x (count), zero behind it.
template <typename T>
inline Vec LoadPart(const T* x, size_t count) {
  if (count >= kWidth) return LoadNumbers(x);
  T tail[kWidth] = {};
  for (size_t i = 0; i < count; ++i) tail[i] = x[i];
  return LoadNumbers(tail);
}

template <typename T>
inline void StorePart(Vec x, T* out, size_t count) {
  if (count >= kWidth) return StoreNumbers(x, out);
  T tail[kWidth];
  StoreNumbers(x, tail);
  for (size_t i = 0; i < count; ++i) out[i] = tail[i];
}

// x where a row of which `count` numbers are left has numbers, else zero.
inline Vec InRow(Vec x, size_t count) {
  if (count >= kWidth) return x;
  float lanes[kWidth] = {};
  for (size_t i = 0; i < count; ++i) lanes[i] = 1.0f;
  return x * Vec::Load(lanes);
}

// ---- GELU ----

// d x Phi(x) / dx = Phi(x) + x phi(x)
inline Vec GeluSlope(Vec x) {
  const Vec density = Exp(x * x * Vec(-0.5f)) * Vec(0.3989422804014327f);
  return Fma(x, density, NormalCdf(x));
}

template <typename T>
void GeluNumbers(const TrainGeluArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  const T* out_grad = static_cast<const T*>(args.out_grad);
  T* out = static_cast<T*>(args.out);
  for (size_t i = 0; i < args.size; i += kWidth) {
    const size_t left = args.size - i;
    const Vec number = LoadPart(x + i, left);
    const Vec value =
        out_grad == nullptr ? Gelu(number) : GeluSlope(number) * LoadPart(out_grad + i, left);
    StorePart(value, out + i, left);
  }
}

void TrainGelu(const TrainGeluArgs& args) {
  args.bf16 ? GeluNumbers<uint16_t>(args) : GeluNumbers<float>(args);
}

// ---- dropout, residual, LayerNorm ----

inline Vec KeepPart(const TrainNormArgs& args, size_t at, size_t count) {
  const Vec scale(args.keep_scale);
  return args.keep == nullptr ? scale : LoadPart(args.keep + at, count) * scale;
}

// Row r: the sum, its mean and spread, and what LayerNorm makes of it.
template <typename T>
inline void NormRow(const TrainNormArgs& args, size_t r) {
  const size_t width = args.width, begin = r * width;
  const T* y = static_cast<const T*>(args.y) + begin;
  float *sum = args.sum + begin, *stats = args.stats + 2 * r;
  T* normed = static_cast<T*>(args.normed) + begin;
  Vec total(0.0f), squares(0.0f);
  for (size_t i = 0; i < width; i += kWidth) {
    const size_t left = width - i;
    const Vec x = LoadPart(args.x + begin + i, left);
    const Vec added = Fma(LoadPart(y + i, left), KeepPart(args, begin + i, left), x);
    StorePart(added, sum + i, left);
    total = total + added;
  }
  stats[0] = Sum(total) / static_cast<float>(width);
  const Vec mean(stats[0]);
  for (size_t i = 0; i < width; i += kWidth) {
    const Vec d = InRow(LoadPart(sum + i, width - i) - mean, width - i);
    squares = Fma(d, d, squares);
  }
  const float variance = Sum(squares) / static_cast<float>(width);
  stats[1] = 1.0f / __builtin_sqrtf(variance + args.eps);
  const Vec inverse(stats[1]);
  for (size_t i = 0; i < width; i += kWidth) {
    const size_t left = width - i;
    const Vec unit = (LoadPart(sum + i, left) - mean) * inverse;
    StorePart(Fma(unit, LoadPart(args.gamma + i, left), LoadPart(args.beta + i, left)), normed + i,
              left);
  }
}

template <typename T>
void NormRows(const TrainNormArgs& args) {
  for (size_t r = 0; r < args.num_rows; ++r) NormRow<T>(args, r);
}

void TrainNorm(const TrainNormArgs& args) {
  args.bf16 ? NormRows<uint16_t>(args) : NormRows<float>(args);
}

// Row r; adds to scratch (2, padded width): gradients of gamma and beta.
// u = (s - mean) / deviation, n = u gamma + beta, g = dn gamma:
// ds += (g - mean(g) - u mean(g u)) / deviation
template <typename T>
inline void NormGradRow(const TrainNormArgs& args, size_t r) {
  const size_t width = args.width, begin = r * width;
  float *gamma_grad = args.scratch, *beta_grad = args.scratch + tt::RoundUp(args.width, kPad);
  const T* normed_grad = static_cast<const T*>(args.normed_grad) + begin;
  T* y_grad = static_cast<T*>(args.y_grad) + begin;
  const float* sum = args.sum + begin;
  const Vec mean(args.stats[2 * r]), inverse(args.stats[2 * r + 1]);
  Vec total(0.0f), dots(0.0f);
  for (size_t i = 0; i < width; i += kWidth) {
    const size_t left = width - i;
    const Vec unit = (LoadPart(sum + i, left) - mean) * inverse;
    const Vec grad = LoadPart(normed_grad + i, left);  // zero behind the row
    Fma(grad, unit, Vec::Load(gamma_grad + i)).Store(gamma_grad + i);
    (grad + Vec::Load(beta_grad + i)).Store(beta_grad + i);
    const Vec unit_grad = grad * LoadPart(args.gamma + i, left);
    total = total + unit_grad;
    dots = Fma(unit_grad, unit, dots);
  }
  const Vec mean_grad(Sum(total) / static_cast<float>(width));
  const Vec mean_dot(Sum(dots) / static_cast<float>(width));
  for (size_t i = 0; i < width; i += kWidth) {
    const size_t left = width - i;
    const Vec unit = (LoadPart(sum + i, left) - mean) * inverse;
    const Vec unit_grad = LoadPart(normed_grad + i, left) * LoadPart(args.gamma + i, left);
    const Vec grad = Fma(unit_grad - mean_grad - unit * mean_dot, inverse,
                         LoadPart(args.sum_grad + begin + i, left));
    StorePart(grad, args.x_grad + begin + i, left);
    StorePart(grad * KeepPart(args, begin + i, left), y_grad + i, left);
  }
}

inline void AddRow(const float* x, size_t width, float* out) {
  for (size_t i = 0; i < width; i += kWidth) {
    const size_t left = width - i;
    StorePart(LoadPart(out + i, left) + LoadPart(x + i, left), out + i, left);
  }
}

// Gradients of gamma and beta are sums over rows: of some rows first, whose roundings are small.
template <typename T>
void NormGradRows(const TrainNormArgs& args) {
  constexpr size_t kRows = 32;
  const size_t padded = tt::RoundUp(args.width, kPad);
  __builtin_memset(args.gamma_grad, 0, args.width * sizeof(float));
  __builtin_memset(args.beta_grad, 0, args.width * sizeof(float));
  for (size_t begin = 0; begin < args.num_rows; begin += kRows) {
    Zero(args.scratch, 2 * padded);
    const size_t end = begin + kRows < args.num_rows ? begin + kRows : args.num_rows;
    for (size_t r = begin; r < end; ++r) NormGradRow<T>(args, r);
    AddRow(args.scratch, args.width, args.gamma_grad);
    AddRow(args.scratch + padded, args.width, args.beta_grad);
  }
}

void TrainNormGrad(const TrainNormArgs& args) {
  args.bf16 ? NormGradRows<uint16_t>(args) : NormGradRows<float>(args);
}

// ---- masks ----

// Vectors of the same registers, by the compiler's own operators.
constexpr int kWords = kWidth / 2;
typedef uint64_t Words __attribute__((vector_size(kWords * 8)));
typedef int16_t Quarters __attribute__((vector_size(kWords * 8)));
typedef int8_t QuarterBytes __attribute__((vector_size(kWords * 4)));
constexpr int kWordVecs = kKeepLanes / kWords;

// SFC64 (Doty-Humphrey, PractRand; as numpy has it) in all lanes side by side. a, b, c are the
// lanes' states, `step` their counter; returns their words.
inline Words NextWords(Words& a, Words& b, Words& c, uint64_t step) {
  const Words word = a + b + step;
  a = b ^ (b >> 11);
  b = c + (c << 3);
  c = ((c << 24) | (c >> 40)) + word;
  return word;
}

// 0 or 1 for each 16 bits of the words.
inline void StoreKept(Words words, int16_t first_kept, uint8_t* keep) {
  Quarters quarters;
  __builtin_memcpy(&quarters, &words, sizeof(words));
  const Quarters kept = quarters >= first_kept;  // 0 or -1
  const QuarterBytes bytes = -__builtin_convertvector(kept, QuarterBytes);
  __builtin_memcpy(keep, &bytes, sizeof(bytes));
}

void DrawKeep(const KeepArgs& args) {
  Words state[3][kWordVecs];
  __builtin_memcpy(state, args.state, sizeof(state));
  constexpr size_t kStepSize = tt::kKeepStep;
  uint64_t step = args.first_step;
  for (size_t begin = 0; begin < args.size; begin += kStepSize, ++step) {
    const bool is_whole = args.size - begin >= kStepSize;
    uint8_t last[kStepSize];
    uint8_t* keep = is_whole ? args.keep + begin : last;
    UNROLL for (int v = 0; v < kWordVecs; ++v) {
      const Words words = NextWords(state[0][v], state[1][v], state[2][v], step);
      StoreKept(words, args.first_kept, keep + v * kWords * 4);
    }
    if (!is_whole) __builtin_memcpy(args.keep + begin, last, args.size - begin);
  }
  __builtin_memcpy(args.state, state, sizeof(state));
}

}  // namespace
