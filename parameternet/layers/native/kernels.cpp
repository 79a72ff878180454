// Routers, dynamic convolutions and their gradients on x86 CPUs.
//
// Plain C functions, called by native/__init__.py through ctypes: the library depends neither on the version of torch
// nor on that of Python. Tensors are contiguous float32, (batch, channels, height, width); functions ending in `_last`
// take channels last, (batch, height, width, channels). Threads are those of torch: its OpenMP runtime is already
// loaded, and this library is linked without one.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

// Below these sizes, starting threads costs more than it saves.
constexpr long PARALLEL_FLOATS = 1 << 15;
constexpr long PARALLEL_PRODUCTS = 1 << 17;
// From this many positions on, and up to this many outputs, gradients of kernels are dot products of channels, which need
// no transposed copy of x: 0.3 to 0.9 of the time; otherwise 1.4 to 2.4 (16 samples, one core).
constexpr long FEW_FOR_DOTS = 512, FEW_OUT_FOR_DOTS = 32;
// Experts of a block of rows: 256 KiB.
constexpr long CACHED_FLOATS = 1 << 16;
// Longest sums that are not split: of channels, of positions in gradients, and of positions in an average.
constexpr long FORWARD_DEPTH = 256, GRADIENT_DEPTH = 64, LENGTH = 4096;

// The activation after a convolution.
enum { NONE, RELU, HARD_SWISH };

// How experts are stored. A row of INT8 ends with the scale and the offset of its numbers, as torch packs embeddings.
enum { FLOAT32, FLOAT16, BFLOAT16, INT8 };
constexpr long MOST_EXPERTS = 64; // of those that are not FLOAT32

// x_stride, y_stride: from the first channel of a sample to that of the next, for slices of channels of a larger tensor.
struct Routing {
    const float *weight, *bias;
    long x_stride, batch, channels, positions, experts;
    float temperature;
    int normalised, softmax;
};

struct Pointwise {
    const void *weight;
    const float *routing, *bias;
    long x_stride, y_stride, batch, channels, positions, experts, out;
    int activation, kind;
};

struct Depthwise {
    const float *weight, *routing, *bias;
    long x_stride, y_stride, batch, channels, height, width, experts, kernel_h, kernel_w, pad_h, pad_w;
    int activation, flipped;
};

// Along one axis, the sources and taps of each of `size` targets: those of target i are from start[i] up to start[i + 1].
struct Axis {
    const long *start, *source, *tap;
    long size;
};

// A depthwise convolution in channels last: `rows` and `columns` list what each output adds up.
struct Gather {
    const float *weight, *routing, *bias;
    long batch, channels, height, width, experts, kernel_h, kernel_w;
    Axis rows, columns;
};

// grad is that of the output; grad_x, or grad_weight and grad_routing, may be null.
struct PointwiseGradients {
    const float *x, *weight, *routing, *grad;
    float *grad_x, *grad_weight, *grad_routing;
    long x_stride, batch, channels, positions, experts, out;
    int channels_last;
};

// Memory that a thread keeps between calls, unless it is large.
constexpr long MOST_KEPT_BYTES = 16 << 20;

enum { PADDED, KERNEL, COLUMN, PARTIAL };

struct Buffer {
    void *memory = nullptr;
    long bytes = 0;
    ~Buffer() { std::free(memory); }
    void *reserve(long wanted) {
        if (bytes < wanted) {
            std::free(memory);
            bytes = (wanted + 4095) / 4096 * 4096;
            memory = std::aligned_alloc(64, bytes);
            if (!memory) std::abort();
        }
        return memory;
    }
    void drop_if_large() {
        if (bytes <= MOST_KEPT_BYTES) return;
        std::free(memory);
        memory = nullptr;
        bytes = 0;
    }
};

Buffer &buffer(int purpose) {
    static thread_local Buffer found[4];
    return found[purpose];
}

void drop_large_buffers() {
    for (int purpose : {PADDED, KERNEL, COLUMN, PARTIAL}) buffer(purpose).drop_if_large();
}

float *scratch(int purpose, long floats) { return static_cast<float *>(buffer(purpose).reserve(floats * sizeof(float))); }

long *shifts(long count) {
    static thread_local Buffer found;
    return static_cast<long *>(found.reserve(count * sizeof(long)));
}

// The memory of an axis. Not used in the regions below: they would compile std::vector for their instruction set, and
// the linker might keep that copy for all processors.
struct Lists {
    std::vector<long> start{0}, source, tap;
    void add(long from, long through) {
        source.push_back(from);
        tap.push_back(through);
    }
    void end_target() { start.push_back(static_cast<long>(source.size())); }
    Axis axis() const { return {start.data(), source.data(), tap.data(), static_cast<long>(start.size()) - 1}; }
};

// The inputs that each output of a convolution sees: output i sees input i * stride - pad + tap * dilation.
Lists inputs_of_outputs(long size, long out, long taps, long stride, long pad, long dilation) {
    Lists lists;
    for (long i = 0; i < out; i++, lists.end_target())
        for (long tap = 0; tap < taps; tap++) {
            const long source = i * stride - pad + tap * dilation;
            if (source >= 0 && source < size) lists.add(source, tap);
        }
    return lists;
}

// The outputs that see each input.
Lists outputs_of_inputs(long size, long out, long taps, long stride, long pad, long dilation) {
    Lists lists;
    for (long i = 0; i < size; i++, lists.end_target())
        for (long tap = 0; tap < taps; tap++) {
            const long offset = i + pad - tap * dilation;
            if (offset >= 0 && offset % stride == 0 && offset / stride < out) lists.add(offset / stride, tap);
        }
    return lists;
}

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
constexpr long LANES = 8;
constexpr int MOST_ROWS = 4, MOST_VECTORS = 3, DOT_ROWS = 2;
using Vec = __m256;
static inline Vec set(float value) { return _mm256_set1_ps(value); }
static inline Vec load(const float *from) { return _mm256_loadu_ps(from); }
static inline void store(float *to, Vec value) { _mm256_storeu_ps(to, value); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec load_bytes(const void *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i *>(from))));
}
static inline Vec load_half(const void *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(from)));
}
static inline Vec load_bfloat16(const void *from) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
static inline __m256i first(long n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Vec load_part(const float *from, long n) { return _mm256_maskload_ps(from, first(n)); }
static inline void store_part(float *to, Vec value, long n) { _mm256_maskstore_ps(to, first(n), value); }
static inline float total(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
static inline void copy(const float *from, float *to, long n) {
    for (; n > 0; n -= LANES, from += LANES, to += LANES)
        n < LANES ? store_part(to, load_part(from, n), n) : store(to, load(from));
}
#include "kernels.inc"
} // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
constexpr long LANES = 16;
constexpr int MOST_ROWS = 6, MOST_VECTORS = 4, DOT_ROWS = 4;
using Vec = __m512;
static inline Vec set(float value) { return _mm512_set1_ps(value); }
static inline Vec load(const float *from) { return _mm512_loadu_ps(from); }
static inline void store(float *to, Vec value) { _mm512_storeu_ps(to, value); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec load_bytes(const void *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(from))));
}
static inline Vec load_half(const void *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(from)));
}
static inline Vec load_bfloat16(const void *from) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i *>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline __mmask16 first(long n) { return static_cast<__mmask16>((1u << n) - 1); }
static inline Vec load_part(const float *from, long n) { return _mm512_maskz_loadu_ps(first(n), from); }
static inline void store_part(float *to, Vec value, long n) { _mm512_mask_storeu_ps(to, first(n), value); }
static inline float total(Vec v) { return _mm512_reduce_add_ps(v); }
static inline void copy(const float *from, float *to, long n) {
    for (; n > 0; n -= LANES, from += LANES, to += LANES)
        n < LANES ? store_part(to, load_part(from, n), n) : store(to, load(from));
}
#include "kernels.inc"
} // namespace avx512
#pragma GCC pop_options

} // namespace

extern "C" {

// The version of the functions below, which native/__init__.py must know.
int parameternet_interface() { return 2; }

// 0: this processor cannot run any of the kernels; 1: AVX2; 2: AVX-512.
int parameternet_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return 0;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return wide ? 2 : 1;
}

void parameternet_route(int level, int threads, const float *x, const float *weight, const float *bias, float *routing,
                        long x_stride, long batch, long channels, long positions, long experts, int normalised,
                        int softmax, float temperature) {
    const Routing r{weight, bias, x_stride, batch, channels, positions, experts, temperature, normalised, softmax};
    (level > 1 ? avx512::route : avx2::route)(x, r, routing, threads);
}

void parameternet_pointwise(int level, int threads, const float *x, const void *weight, const float *routing,
                            const float *bias, float *y, long x_stride, long y_stride, long batch, long channels,
                            long positions, long experts, long out, int activation, int kind) {
    const Pointwise a{weight,   routing,   bias,    x_stride, y_stride,    batch,
                      channels, positions, experts, out,     activation, kind};
    (level > 1 ? avx512::pointwise : avx2::pointwise)(x, a, y, threads);
}

// x (batch, positions, channels) -> y (batch, positions, out), in float32, without bias and activation.
void parameternet_pointwise_last(int level, int threads, const float *x, const float *weight, const float *routing,
                                 float *y, long batch, long channels, long positions, long experts, long out) {
    const Pointwise a{weight,   routing,   nullptr, 0,   0,    batch,
                      channels, positions, experts, out, NONE, FLOAT32};
    (level > 1 ? avx512::pointwise_last : avx2::pointwise_last)(x, a, y, threads);
}

void parameternet_depthwise(int level, int threads, const float *x, const float *weight, const float *routing,
                            const float *bias, float *y, long x_stride, long y_stride, long batch, long channels,
                            long height, long width, long experts, long kernel_h, long kernel_w, long pad_h,
                            long pad_w, int activation, int flipped) {
    const Depthwise a{weight, routing, bias,    x_stride,  y_stride,  batch, channels,
                      height, width,   experts, kernel_h, kernel_w, pad_h, pad_w,    activation, flipped};
    (level > 1 ? avx512::depthwise : avx2::depthwise)(x, a, y, threads);
}

void parameternet_pointwise_gradients(int level, int threads, const float *x, const float *weight,
                                      const float *routing, const float *grad, float *grad_x, float *grad_weight,
                                      float *grad_routing, long x_stride, long batch, long channels, long positions,
                                      long experts, long out, int channels_last) {
    const PointwiseGradients a{x,        weight, routing,  grad,      grad_x,  grad_weight, grad_routing,
                               x_stride, batch,  channels, positions, experts, out,         channels_last};
    (level > 1 ? avx512::pointwise_gradients : avx2::pointwise_gradients)(a, threads);
}

void parameternet_depthwise_grad_kernels(int level, int threads, const float *x, const float *grad,
                                         float *grad_kernels, long x_stride, long batch, long channels, long height,
                                         long width, long kernel_h, long kernel_w, long pad_h, long pad_w) {
    Depthwise a{};
    a.x_stride = x_stride, a.batch = batch, a.channels = channels, a.height = height, a.width = width;
    a.kernel_h = kernel_h, a.kernel_w = kernel_w, a.pad_h = pad_h, a.pad_w = pad_w;
    (level > 1 ? avx512::depthwise_grad_kernels : avx2::depthwise_grad_kernels)(x, grad, a, grad_kernels, threads);
}

// x (batch, height, width, channels) -> y (batch, out_h, out_w, channels); if `transposed`, from y's gradient to x's.
void parameternet_depthwise_last(int level, int threads, const float *x, const float *weight, const float *routing,
                                 const float *bias, float *y, long batch, long channels, long height, long width,
                                 long out_h, long out_w, long experts, long kernel_h, long kernel_w, long stride_h,
                                 long stride_w, long pad_h, long pad_w, long dilation_h, long dilation_w,
                                 int transposed) {
    const auto lists = transposed ? outputs_of_inputs : inputs_of_outputs;
    const Lists rows = lists(height, out_h, kernel_h, stride_h, pad_h, dilation_h);
    const Lists columns = lists(width, out_w, kernel_w, stride_w, pad_w, dilation_w);
    const long from_h = transposed ? out_h : height, from_w = transposed ? out_w : width;
    const Gather a{weight,  routing,  bias,     batch,       channels,      from_h, from_w,
                   experts, kernel_h, kernel_w, rows.axis(), columns.axis()};
    (level > 1 ? avx512::depthwise_last : avx2::depthwise_last)(x, a, y, threads);
}

void parameternet_depthwise_last_grad_kernels(int level, int threads, const float *x, const float *grad,
                                              float *grad_kernels, long batch, long channels, long height, long width,
                                              long out_h, long out_w, long kernel_h, long kernel_w, long stride_h,
                                              long stride_w, long pad_h, long pad_w, long dilation_h,
                                              long dilation_w) {
    const Lists rows = inputs_of_outputs(height, out_h, kernel_h, stride_h, pad_h, dilation_h);
    const Lists columns = inputs_of_outputs(width, out_w, kernel_w, stride_w, pad_w, dilation_w);
    const Gather a{nullptr, nullptr,  nullptr,  batch,       channels,      height, width,
                   0,       kernel_h, kernel_w, rows.axis(), columns.axis()};
    (level > 1 ? avx512::depthwise_last_grad_kernels : avx2::depthwise_last_grad_kernels)(x, grad, a, grad_kernels,
                                                                                         threads);
}
}
