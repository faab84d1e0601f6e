// Scratch: fused decode against unfused, by hand.
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#include "decode_launch.cuh"
#include "decode_records.cuh"
#include "graph.cuh"
#include "store_launch.cuh"
using namespace jax_dsv4;

static int num_sms = 132;

template <class Body, class... A>
void launch_body(cudaStream_t stream, dim3 grid, unsigned cluster, void (*kernel)(A...), int threads, A... args) {
  cudaLaunchConfig_t c = {};
  c.gridDim = grid; c.blockDim = dim3(threads); c.stream = stream;
  cudaLaunchAttribute a[1];
  a[0].id = cudaLaunchAttributeClusterDimension;
  a[0].val.clusterDim.x = cluster; a[0].val.clusterDim.y = 1; a[0].val.clusterDim.z = 1;
  c.attrs = a; c.numAttrs = cluster > 1 ? 1 : 0;
  if (cluster > 8) cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaError_t e = cudaLaunchKernelEx(&c, kernel, args...);
  if (e != cudaSuccess) { std::printf("launch: %s\n", cudaGetErrorString(e)); std::exit(1); }
}
template <class Body>
typename Body::Params params_of(const DecodeRecordsParams& p, RecordFormat f) { return typename Body::Params(p, RecordParams(p.records, f, Body::D)); }
template <class Body>
void one(cudaStream_t stream, const DecodeRecordsParams& p, RecordFormat f, int windows) {
  launch_body<Body>(stream, dim3(p.batch * Body::ctas_of(p), windows, p.num_groups), Body::kCluster,
                    decode_records_kernel<Body>, Body::kThreads, params_of<Body>(p, f));
}
template <class A, class B>
void two(cudaStream_t stream, const DecodeRecordsParams& p, RecordFormat f, const DecodeRecordsParams& q, RecordFormat g, int windows) {
  constexpr uint32_t cluster = A::kCluster > B::kCluster ? A::kCluster : B::kCluster;
  const uint32_t na = p.batch * A::ctas_of(p), nb = q.batch * B::ctas_of(q);
  auto up = [&](uint32_t n) { return (n + cluster - 1) / cluster * cluster; };
  launch_body<A>(stream, dim3(up(na) + up(nb), windows, 1), cluster, decode_two_records_kernel<A, B>,
                 std::max(A::kThreads, B::kThreads), params_of<A>(p, f), params_of<B>(q, g), up(na), nb);
}

struct Case { int head_dim, ratio; bool overlap; };
constexpr int kNextN = 4, kPage = 32;

template <class Kind>
struct World {
  static constexpr int64_t S = Kind::kStateDim, D = Kind::kHeadDim, R = Kind::kRatio;
  int64_t batch, calls, pages_each, num_pages, record_pages;
  int64_t page_bytes;
  Buffer<float> kv, score, ape, weight, table, comp;
  Buffer<bf16> kv_score;
  Buffer<int32_t> tables, lens, rtables;
  Buffer<uint8_t> pool;
  static std::vector<int32_t> perm(int64_t n, int seed) { std::vector<int32_t> v(n); std::iota(v.begin(), v.end(), 0); std::shuffle(v.begin(), v.end(), std::mt19937(seed)); return v; }
  static std::vector<int32_t> make_lens(int64_t b, int len) { return std::vector<int32_t>(b, len); }
  static std::vector<float> noise(int64_t n) { std::vector<float> v(n); uint32_t x = 123456789; for (auto& f : v) { x = x * 1664525u + 1013904223u; f = (int32_t(x) >> 8) * (1.0f / (1 << 23)) * 2; } return v; }
  static std::vector<bf16> noise16(int64_t n) { std::vector<bf16> v(n); uint32_t x = 987654321; for (auto& f : v) { x = x * 1664525u + 1013904223u; float y = (int32_t(x) >> 8) * (1.0f / (1 << 23)) * 2; f = round_to<bf16>(y); } return v; }
  World(int64_t b, int64_t c, int len, int64_t record_bytes)
      : batch(b), calls(c), pages_each(256 / kPage), num_pages(std::max<int64_t>(b * c * pages_each / 4, b * pages_each)),
        record_pages(std::max<int64_t>(b * c, 4096)), page_bytes(64 * record_bytes),
        kv(num_pages * kPage * S), score(num_pages * kPage * S), ape(noise(R * S)), weight(noise(D)), table(noise(65536 * 64)),
        comp(b * 2 * D), kv_score(noise16(b * kNextN * 2 * S)), tables(perm_tables(b, c, pages_each, num_pages)), lens(make_lens(b, len)),
        rtables(record_tables(b, c, record_pages)), pool(record_pages * page_bytes) {
    const int64_t n = num_pages * kPage * S, k = std::min<int64_t>(n, 1 << 24); auto v = noise(k + 1);
    for (int64_t i = 0; i < n; i += k) { const int64_t m = std::min(k, n - i); cudaMemcpy(kv.get() + i, v.data(), m * 4, cudaMemcpyHostToDevice); cudaMemcpy(score.get() + i, v.data() + 1, m * 4, cudaMemcpyHostToDevice); }
  }
  static std::vector<int32_t> perm_tables(int64_t b, int64_t c, int64_t each, int64_t pages) {
    std::vector<int32_t> v; auto p = perm(pages, 0); for (int64_t i = 0; i < b * c * each; ++i) v.push_back(p[i % pages]); return v; }
  static std::vector<int32_t> record_tables(int64_t b, int64_t c, int64_t pages) {
    std::vector<int32_t> v; auto p = perm(pages, 1); for (int64_t i = 0; i < b * c; ++i) v.push_back(p[i % pages]); return v; }
  DecodeRecordsParams params(int64_t i, bool hadamard) const {
    DecodeRecordsParams p = {};
    p.kv = kv.get(); p.score = score.get(); p.kv_score = kv_score.get(); p.ape = ape.get();
    p.row_size = 2 * S; p.score_offset = S;
    p.kv_tables = p.score_tables = tables.get() + i * batch * pages_each; p.kv_lens = lens.get(); p.kv_comp = comp.get();
    p.num_groups = 1; p.batch = batch; p.next_n = kNextN; p.num_windows = (kNextN + R - 1) / R;
    p.num_layers = 1; p.rows_per_layer = p.rows_per_group = num_pages * kPage;
    p.paging = {uint32_t(pages_each), uint32_t(num_pages), Divisor(kPage)};
    RecordTarget& t = p.records;
    t.tables = rtables.get() + i * batch; t.norm_weight = weight.get(); t.cos_sin = table.get();
    t.pool.data = pool.get(); t.pool.num_layers = 1; t.pool.num_pages = record_pages; t.pool.page_size = Divisor(64);
    t.pool.page_bytes = page_bytes; t.pool.is_16b_aligned = page_bytes % 16 == 0;
    t.max_pages = 1; t.num_positions = 65536; t.options.rms_norm_eps = 1e-6f; t.options.hadamard = hadamard;
    t.options.rounding = hadamard ? Rounding::kNone : Rounding::kOnce;
    return p;
  }
};

static Buffer<float>* flush_from; static Buffer<float>* flush_sink;
template <class Call>
double measure(int64_t calls, Call call) {
  const size_t n = size_t{256} << 20;
  auto run = [&](int64_t from) {
    return time_of([&](cudaStream_t s) {
      for (int64_t i = from; i < calls; ++i) call(s, i);
      stream_kernel<<<4 * num_sms, 512, 0, s>>>(vectors(*flush_from), n / sizeof(float4), nullptr, 0, flush_sink->get());
    });
  };
  const int64_t few = calls / 4;
  return (run(0) - run(calls - few)) / (calls - few);
}

template <class Kind> using Cfg = Config<Kind, DTypes<bf16, f32, f32>>;

// Compares records with those of unfused calls.
template <class K, class R>
void check(const World<K>& w, const char* name, bool hadamard, StateFormat f, void (*fused)(cudaStream_t, const DecodeRecordsParams&, RecordFormat, int)) {
  const size_t bytes = w.record_pages * w.page_bytes, n = w.num_pages * kPage * w.S * 4;
  auto p = w.params(0, hadamard);
  std::vector<uint8_t> a(bytes), b(bytes), s0(n), s1(n), keep(n), keep2(n);
  cudaMemcpy(keep.data(), w.kv.get(), n, cudaMemcpyDeviceToHost); cudaMemcpy(keep2.data(), w.score.get(), n, cudaMemcpyDeviceToHost);
  cudaMemset(w.pool.get(), 0xA5, bytes);
  fused(0, p, R::kFormat, p.num_windows);
  cudaError_t e = cudaDeviceSynchronize(); if (e != cudaSuccess) { std::printf("%s: %s\n", name, cudaGetErrorString(e)); std::exit(1); }
  cudaMemcpy(a.data(), w.pool.get(), bytes, cudaMemcpyDeviceToHost);
  cudaMemcpy(s0.data(), w.score.get(), n, cudaMemcpyDeviceToHost);
  cudaMemcpy(w.kv.get(), keep.data(), n, cudaMemcpyHostToDevice); cudaMemcpy(w.score.get(), keep2.data(), n, cudaMemcpyHostToDevice);
  cudaMemset(w.pool.get(), 0xA5, bytes);
  launch<Cfg<K>>(0, p, f, -1);
  std::vector<int32_t> lens(w.batch), rt(w.batch), slots, pos;
  cudaMemcpy(lens.data(), p.kv_lens, 4 * w.batch, cudaMemcpyDeviceToHost); cudaMemcpy(rt.data(), p.records.tables, 4 * w.batch, cudaMemcpyDeviceToHost);
  for (int i = 0; i < w.batch; ++i) for (int m = 0; m < p.num_windows; ++m) {
    int win = (lens[i] - kNextN) / K::kRatio + m; bool ok = win < lens[i] / K::kRatio && win < 64;
    slots.push_back(ok ? rt[i] * 64 + win : -1); pos.push_back(win * K::kRatio);
  }
  Buffer<int32_t> ds(slots), dp(pos);
  StoreParams q = {}; q.values = w.comp.get(); q.slots = ds.get(); q.positions = dp.get(); q.norm_weight = p.records.norm_weight; q.table = p.records.cos_sin;
  q.pool = p.records.pool; q.num_groups = 1; q.num_values = slots.size(); q.num_positions = 65536; q.options = p.records.options;
  launch_store_records<R>(0, q);
  cudaDeviceSynchronize();
  cudaMemcpy(b.data(), w.pool.get(), bytes, cudaMemcpyDeviceToHost); cudaMemcpy(s1.data(), w.score.get(), n, cudaMemcpyDeviceToHost);
  int64_t diff = 0, written = 0, sdiff = 0; for (size_t i = 0; i < bytes; ++i) { diff += a[i] != b[i]; written += b[i] != 0xA5; }
  for (size_t i = 0; i < n; ++i) sdiff += s0[i] != s1[i];
  std::printf("  check %-28s bytes written %lld, different %lld, state bytes different %lld\n", name, (long long)written, (long long)diff, (long long)sdiff); std::fflush(stdout);
}

#ifdef TRACE
template <class K, class R, class Body>
void trace(const char* name, StateFormat f, int64_t b, int len, bool hadamard) {
  const int64_t calls = 200; World<K> w(b, calls, len, R::Layout::kData + R::Layout::kScales);
  std::vector<std::vector<double>> t(32);
  for (int64_t i = 1; i < calls; ++i) {
    auto p = w.params(i, hadamard), q = w.params(i - 1, hadamard);
    long long zero[32] = {}, got[32];
    stream_kernel<<<4 * num_sms, 512>>>(vectors(*flush_from), (size_t{256} << 20) / sizeof(float4), nullptr, 0, flush_sink->get());
    for (int k = 0; k < 3; ++k) one<Body>(0, q, R::kFormat, f == StateFormat::kPrefix ? 1 : p.num_windows);
    one<Body>(0, p, R::kFormat, f == StateFormat::kPrefix ? 1 : p.num_windows);
    cudaDeviceSynchronize();
    cudaMemcpyFromSymbol(got, trace_of, sizeof(got));
    long long first = got[0]; for (long long g : got) if (g != 0 && g < first) first = g;
    if (i >= 20) for (int k = 0; k < 32; ++k) if (got[k]) t[k].push_back(got[k] - first);
    cudaMemcpyToSymbol(trace_of, zero, sizeof(zero));
  }
  std::vector<std::pair<double, int>> order;
  std::printf("trace %-28s B %lld:", name, (long long)b);
  for (int k = 0; k < 32; ++k) if (!t[k].empty()) { std::sort(t[k].begin(), t[k].end()); order.push_back({t[k][t[k].size() / 2], k}); }
  std::sort(order.begin(), order.end()); for (auto [v, k] : order) std::printf(" %d:%.0f", k, v);
  std::printf("\n"); std::fflush(stdout);
}
#endif
template <class K, class R, class... Bodies>
void case_of(const char* name, StateFormat f, int64_t b, int len, bool hadamard, std::vector<const char*> names, bool do_check) {
  const int64_t per_call = b * (f == StateFormat::kPrefix ? 8 : (K::kRatio == 128 ? 128 : 12)) * K::kStateDim * 8;
  int64_t calls = std::min<int64_t>(256, std::max<int64_t>(24, (int64_t{1} << 30) / per_call));
  const int64_t record = R::Layout::kData + R::Layout::kScales;
  World<K> w(b, calls, len, record);
  const double base = measure(calls, [&](cudaStream_t s, int64_t i) { auto p = w.params(i, hadamard); launch<Cfg<K>>(s, p, f, -1); });
  std::printf("%-24s %-7s %-12s B %4lld len %4d unfused %6.2f |", name, f == StateFormat::kPrefix ? "prefix" : "raw", kRecordFormatNames[int(R::kFormat)], (long long)b, len, base);
  int j = 0;
  (void)std::initializer_list<int>{([&] {
    const double t = measure(calls, [&](cudaStream_t s, int64_t i) { auto p = w.params(i, hadamard); one<Bodies>(s, p, R::kFormat, f == StateFormat::kPrefix ? 1 : p.num_windows); });
    std::printf(" %s %6.2f (%+.2f)", names[j], t, t - base); ++j; std::fflush(stdout); }(), 0)...};
  std::printf("\n");
  if (do_check) { j = 0; World<K> x(b, 4, len, record); (void)std::initializer_list<int>{(check<K, R>(x, names[j++], hadamard, f, [](cudaStream_t s, const DecodeRecordsParams& p, RecordFormat g, int m) { one<Bodies>(s, p, g, std::is_same_v<typename Bodies::Params, typename Bodies::Params> ? (K::kRatio == 2 ? m : 1) : 1); }), 0)...}; }
}

template <class A, class B>
void pair_of(const char* name, StateFormat f, int64_t b, int len) {
  using K = Kind<512, 4, true>; using L = Kind<128, 4, true>;
  const int64_t calls = std::min<int64_t>(256, std::max<int64_t>(24, (int64_t{1} << 30) / (b * 12 * 1024 * 8)));
  World<K> w(b, calls, len, 584); World<L> v(b, calls, len, 132);
  const double alone = measure(calls, [&](cudaStream_t s, int64_t i) { auto p = w.params(i, false); one<A>(s, p, RecordFormat::kFp8DsMla, 1); });
  const double both = measure(calls, [&](cudaStream_t s, int64_t i) { auto p = w.params(i, false); auto q = v.params(i, true);
    two<B, A>(s, q, RecordFormat::kFp8Block128, p, RecordFormat::kFp8DsMla, 1); });
  std::printf("pair %-18s B %4lld main alone %6.2f both %6.2f (%+.2f)\n", name, (long long)b, alone, both, both - alone); std::fflush(stdout);
}

int main(int argc, char** argv) {
  static Buffer<float> cold((size_t{256} << 20) / 4), sink(1); flush_from = &cold; flush_sink = &sink;
  cudaDeviceProp prop; cudaGetDeviceProperties(&prop, 0); std::printf("%s\n", prop.name); num_sms = prop.multiProcessorCount;
  using F = RecordFormat; constexpr auto P = StateFormat::kPrefix; constexpr auto W = StateFormat::kRaw;
  using Hca = Kind<512, 128, false>; using Main = Kind<512, 4, true>; using Idx = Kind<128, 4, true>;
  using HC = Cfg<Hca>; using MC = Cfg<Main>; using IC = Cfg<Idx>;
  using R512 = Record<F::kFp8DsMla, 512>; using R128 = Record<F::kFp8Block128, 128>; using RB = Record<F::kBf16, 512>;
  for (int64_t b : {1, 16, 64, 256}) {
    using P1 = PrefixTokenRecords<HC, true, 1>; using P2 = PrefixTokenRecords<HC, true, 2>; using P4 = PrefixTokenRecords<HC, true, 4>; using PM = PrefixRecords<HC>;
    using M1 = PrefixTokenRecords<MC, true, 1>; using M2 = PrefixTokenRecords<MC, true, 2>; using M4 = PrefixTokenRecords<MC, true, 4>; using MM = PrefixRecords<MC>;
    using I1 = PrefixTokenRecords<IC, true, 1>; using I2 = PrefixTokenRecords<IC, true, 2>; using I4 = PrefixTokenRecords<IC, true, 4>; using IM = PrefixRecords<IC>;
    case_of<Hca, R512, P1, P2, P4, PM>("hca", P, b, 256, false, {"few1", "few2", "few4", "many"}, b == 16);
    case_of<Hca, R512, P1, P2, P4, PM>("hca none", P, b, 250, false, {"few1", "few2", "few4", "many"}, false);
    case_of<Main, R512, M1, M2, M4, MM>("csa", P, b, 256, false, {"few1", "few2", "few4", "many"}, b == 16);
    case_of<Idx, R128, I1, I2, I4, IM>("indexer", P, b, 256, true, {"few1", "few2", "few4", "many"}, b == 16);
    pair_of<M2, I2>("few2", P, b, 256);
    pair_of<M4, I4>("few4", P, b, 256);
    pair_of<M2, I4>("few24", P, b, 256);
  }
}
