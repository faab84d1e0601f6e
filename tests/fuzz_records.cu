// Fuzzes launch_decode_records on a GPU: random calls, with bad metadata in most of them, beside
// the CPU's own functions (decode_cpu.h, record_cpu.h) on copies of the same operands. Each operand
// is an allocation of its own, of its exact size, for memcheck to see where it ends.
//
//     nvcc -std=c++17 -O2 -arch=native -Iffi {tests/fuzz_records,ffi/decode_records_launch}.cu -o
//     fuzz
//     ./fuzz [cases=5000] [seed=0]
//     compute-sanitizer --tool memcheck --padding 8192 ./fuzz
//
// A case is drawn from its own seed, which is that of the one before plus 1: a failure's line names
// it, and `./fuzz 1 SEED` runs it alone. Against the CPU's result:
//   - raw rows, and all bytes that the CPU does not write, are equal;
//   - in rows of prefixes a logsumexp is within 2e-5 of max(1, its magnitude), a mean within 2e-5
//     of the largest kv: the kernels' exp is a fast one, and one of them merges in another order;
//   - records are read back, and are within one step of their format, beside `slack_of`.
// Where a case has values that are not finite, those need only meet others that are not finite; and
// records are compared if nothing spreads such a value over its row.
// Prints what failed, then JSON lines: how often each kernel ran, and by format how many elements
// were compared, how many have other bits, the largest difference (of records in steps, and in
// format f32 over the record's largest value; of rows as it is), and the largest share of what is
// allowed. Exits with 1 after a failure; a fault, or a kernel that does not end, stops it at once.

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "config.h"
#include "decode_records.h"
#include "decode_records_cpu.h"
#include "decode_records_launch.cuh"
#include "fuzz.cuh"
#include "kernels.h"

using namespace jax_dsv4;
using namespace jax_dsv4::fuzz;

namespace {

struct Noises : RowNoises {
  Noise weight = normal(0.3f, 1),
        turn = Noise([](auto& e) { return std::uniform_real_distribution<float>(-1, 1)(e); });
};
const Noises& noises() {
  static const Noises noises;
  return noises;
}

// ------------------------------------------------------------------------------------ operands

struct Compressor {
  DecodeRecordsCall call = {};  // all but the pointers
  bool has_ape, has_weight, one_table, scores_apart;
  uint32_t ape_groups, weight_groups, turn_groups;
  uint32_t kv_groups, table_groups[3];  // of kv_score; of the tables of kv, scores and records
  int64_t column = 0;                   // of kv_score
  int64_t num_pages, page_size, max_pages, record_page_size;
  Operand kv_score, new_score;  // or columns of the case's
  Operand ape, kv, score, tables[3], weight, turns, pool;

  int64_t S() const { return call.selection.state_dim(); }
  int64_t R() const { return call.selection.compress_ratio; }
  int64_t D() const { return call.selection.head_dim; }
};

// What a request's step touches.
struct Step {
  int64_t num_new, start, end;  // positions of its new rows
  int64_t first_window, end_window;
};

struct Case {
  uint32_t groups, batch;
  int32_t next_n;
  bool joint;        // one array kv_score for all compressors
  int64_t row_size;  // of it
  uint32_t joint_groups, lens_groups, q_lens_groups, layer_groups;
  bool has_q_lens, has_layer;
  int64_t layer_index = 0;
  int64_t geometry = -1;
  bool has_specials = false;
  size_t kv_scale, score_kind;
  std::vector<int32_t> lens, q_lens, layers;
  Operand kv_score, kv_lens, q_lens_operand, layer;
  std::deque<Compressor> compressors;
  int64_t work = 0;  // of the CPU, in elements

  Step step(const Compressor& c, uint32_t group, uint32_t request) const {
    const auto of = [&](const std::vector<int32_t>& lens, uint32_t groups) -> int64_t {
      return lens[(groups == 1 ? 0 : group) * batch + request];
    };
    const int64_t length = of(lens, lens_groups);
    const int64_t q_len = has_q_lens ? of(q_lens, q_lens_groups) : next_n;
    const int64_t n = std::min<int64_t>(q_len, next_n);
    if (length <= 0 || n <= 0) return {};
    const int64_t start = std::max<int64_t>(length - n, 0);
    return {n, start, length, start / c.R(), length / c.R()};
  }
  // Of a layer in a pool of so many, or -1.
  int64_t layer_of(uint32_t group, int64_t num_layers) const {
    if (!has_layer) return 0;
    const int64_t layer = layers[layer_groups == 1 ? 0 : group];
    return layer >= 0 && layer < num_layers ? layer : -1;
  }
};

// ---------------------------------------------------------------------------- drawing a case

bool overlaps(const Compressor& c) { return c.call.selection.overlap; }

// Calls visit(position, is_written) for the rows that a step may read, and those that it writes.
template <class Visit>
void visit_rows(const Compressor& c, const Step& step, Visit&& visit) {
  if (step.num_new == 0) return;
  const int64_t R = c.R();
  if (c.call.state_format == StateFormat::kPrefix) {
    if (step.start % R != 0) visit(step.start - 1, false);
    if (overlaps(c) && step.start >= R) visit(step.start - step.start % R - 1, false);
  } else if (step.first_window < step.end_window) {
    const int64_t first = std::max<int64_t>(step.first_window - overlaps(c), 0) * R;
    for (int64_t p = first; p < step.start; ++p) visit(p, false);
  }
  for (int64_t p = step.start; p < step.end; ++p) visit(p, true);
}

// A table's pages, before they have their ids: each that a step writes belongs to one request, and
// others may read those that are only read.
struct TableDraft {
  std::vector<int32_t> pages;  // [groups, batch, max_pages]; -1: no step touches it
  int32_t count = 0;           // in a group's pool
};
// `all_use_first`: all groups use the first one's table, too. `visit_pages`(group, request, visit).
template <class VisitPages>
TableDraft draft_table(const Case& c, uint32_t table_groups, bool all_use_first, int64_t max_pages,
                       Draw& draw, VisitPages&& visit_pages) {
  TableDraft draft;
  draft.pages.assign(table_groups * c.batch * max_pages, -1);
  for (uint32_t t = 0; t < table_groups; ++t) {
    int32_t count = 0;
    std::vector<int32_t> read_by_many;
    for (uint32_t b = 0; b < c.batch; ++b) {
      std::map<int64_t, bool> touched;  // logical pages; whether a step writes there
      for (uint32_t g = 0; g < c.groups; ++g) {
        if (table_groups != 1 && g != t && !(all_use_first && t == 0)) continue;
        visit_pages(g, b, [&](int64_t logical, bool is_written) {
          if (logical < max_pages) touched[logical] |= is_written;
        });
      }
      size_t num_read = 0;
      for (const auto& [logical, is_written] : touched) {
        int32_t& page = draft.pages[(t * c.batch + b) * max_pages + logical];
        if (is_written || draw.chance(0.4)) {
          page = count++;
        } else {
          if (num_read == read_by_many.size()) read_by_many.push_back(count++);
          page = read_by_many[num_read++];
        }
      }
    }
    draft.count = std::max(draft.count, count);
  }
  return draft;
}

// Entries that no step touches hold anything: pages of others, too.
void number_table(Operand& table, const TableDraft& draft, int64_t num_pages, int64_t page_size,
                  int64_t row, double bad, Draw& draw) {
  int32_t* const ids = table.make<int32_t>(draft.pages.size());
  std::vector<int32_t> order(num_pages);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), draw.engine);
  for (size_t i = 0; i < draft.pages.size(); ++i) {
    const int32_t page = draft.pages[i];
    if (page >= 0 && !draw.chance(bad)) {
      ids[i] = order[page];
    } else if (page < 0 && num_pages > 0 && draw.chance(0.5)) {
      ids[i] = static_cast<int32_t>(draw.between(0, num_pages - 1));
    } else {
      ids[i] = bad_page(num_pages, page_size, row, draw);
    }
  }
}

void draw_records(Compressor& c, Draw& draw) {
  using F = RecordFormat;
  do {
    c.call.format = static_cast<F>(draw.between(0, 5));
  } while (!visit_record(c.call.format, c.D(), [](auto) {}));
  RecordOptions& o = c.call.params.records.options;
  const bool is_mla = c.call.format == F::kFp8DsMla;
  o.rms_norm_eps = draw.one_of({1e-6f, 1e-6f, 1e-5f, 1e-2f, 0.0f});
  o.interleaved = draw.chance(0.5);
  o.hadamard = !is_mla && draw.chance(0.35);
  o.scale_floor = is_mla && draw.chance(0.5);
  o.scales =
      c.call.format == F::kFp8Block128 ? static_cast<Scales>(draw.between(0, 2)) : Scales::kF32;
  o.rounding = static_cast<Rounding>(draw.between(0, 2));
  c.has_weight = draw.chance(0.8);
}

// What a case is, but for its tables.
void draw_shape(Case& c, bool many, uint32_t most_requests, Draw& draw) {
  c.groups = many ? 1 : draw.one_of({1, 1, 1, 2, 3});
  const double x = static_cast<double>(draw.between(0, 999)) / 1000;
  c.batch = many ? draw.between(70, 300) : 1 + static_cast<uint32_t>(40 * x * x * x);
  c.batch = std::min(c.batch, most_requests);
  c.next_n = draw.chance(many ? 0.9 : 0.6) ? draw.between(1, 4) : draw.between(1, 12);
  const auto draw_groups = [&]() -> uint32_t { return draw.chance(0.5) ? c.groups : 1; };

  // The main compressor and its indexer, which can run together, in most cases of two.
  const int64_t count = draw.one_of({1, 1, 1, 1, 2, 2, 2, 2, 2, draw.chance(0.3) ? 3 : 2});
  const bool is_pair = count == 2 && draw.chance(0.75), swapped = draw.chance(0.5);
  const bool same_types = is_pair ? draw.chance(0.8) : draw.chance(0.3);
  c.joint = draw.chance(0.5);
  for (int64_t i = 0; i < count; ++i) {
    Compressor& k = c.compressors.emplace_back();
    const int64_t kind = is_pair ? (i == 0) == swapped : draw.between(0, Kinds::kSize - 1);
    Selection& s = k.call.selection;
    s = draw_selection(draw, kind);
    k.call.state_format =
        s.state == DType::kF32 && draw.chance(0.6) ? StateFormat::kPrefix : StateFormat::kRaw;
    const DecodeRecordsCall& first = c.compressors.front().call;
    if (same_types || c.joint) s.kv_score = first.selection.kv_score;
    if (same_types) s.state = first.selection.state, k.call.state_format = first.state_format;
    if (!may_hold(s.state, k.call.state_format)) k.call.state_format = StateFormat::kRaw;
    draw_records(k, draw);
    k.has_ape = draw.chance(0.7);
    k.one_table = draw.chance(0.5);
    k.scores_apart = !c.joint && draw.chance(0.5);
    k.ape_groups = draw_groups(), k.weight_groups = draw_groups(), k.turn_groups = draw_groups();
    k.kv_groups = draw_groups();
    for (uint32_t& groups : k.table_groups) groups = draw_groups();
    // What a long window's lanes share must be on one page, in all geometries but the last.
    const bool is_long = k.R() == 128 && k.call.state_format == StateFormat::kRaw;
    k.page_size = is_long && draw.chance(0.7) ? draw.one_of({8, 16, 32, 32, 64})
                  : many                      ? draw.between(1, 4)
                                              : draw.one_of({1, 2, 3, 4, 4, 8, 8, 16, 32, 64});
    k.record_page_size = many || draw.chance(0.8) ? draw.between(1, 7) : 64;
  }

  // Of the geometries in tuning.h, or one that there is not for every compressor.
  const Compressor& first = c.compressors.front();
  const bool is_long = first.R() == 128 && first.call.state_format == StateFormat::kRaw;
  if (draw.chance(is_long ? 0.6 : 0.25)) {
    const bool is_prefix = first.call.state_format == StateFormat::kPrefix;
    c.geometry = draw.between(0, is_long || draw.chance(0.05) ? 3 : is_prefix ? 2 : 1);
  }

  c.lens_groups = draw_groups(), c.q_lens_groups = draw_groups(), c.layer_groups = draw_groups();
  c.joint_groups = draw_groups();
  const int64_t layer_kind = many || draw.chance(0.6) ? 0 : draw.between(1, 2);
  c.has_layer = layer_kind == 2;
  int64_t least_layers = 3;
  for (Compressor& k : c.compressors) {
    DecodeRecordsParams& p = k.call.params;
    const auto draw_layers = [&] {
      const int64_t layers = layer_kind == 0 ? 1 : draw.between(1, 3);
      least_layers = std::min(least_layers, layers);
      return layers;
    };
    p.num_layers = draw_layers();
    p.records.pool.num_layers = draw_layers();
  }
  c.layer_index = layer_kind == 1 ? draw.between(0, least_layers - 1) : 0;
  c.layers.resize(c.layer_groups);
  for (int32_t& layer : c.layers) {
    layer = draw.chance(0.75) ? draw.between(0, least_layers - 1)
                              : draw.one_of<int64_t>({-1, 1, 2, 3, INT32_MAX, INT32_MIN});
  }
}

void draw_lens(Case& c, bool many, Draw& draw) {
  const int64_t most = draw.one_of({8, 40, 300, 700});
  const double bad = draw.one_of({0.0, 0.1, 0.1, 0.4}) + (many ? 0.4 : 0);
  c.has_q_lens = draw.chance(0.6);
  c.lens.resize(c.lens_groups * c.batch);
  for (int32_t& length : c.lens) {
    const Compressor& k = c.compressors[draw.between(0, c.compressors.size() - 1)];
    if (draw.chance(bad)) {
      length = many ? draw.between(-1, 0)
                    : draw.one_of<int64_t>({0, 0, -1, -5, INT32_MIN, INT32_MAX, INT32_MAX - 1,
                                            INT32_MIN + 1, 1 << 30, (1 << 30) + 2,
                                            draw.between(INT32_MIN, INT32_MAX)});
    } else if (draw.chance(0.85)) {  // it completes a window, mostly
      length = k.R() * draw.between(1, most / k.R() + 1) + draw.between(0, c.next_n - 1);
    } else {
      length = draw.between(1, most);
    }
  }
  c.q_lens.resize(c.q_lens_groups * c.batch);
  for (int32_t& q_len : c.q_lens) {
    q_len = draw.chance(0.5)   ? c.next_n
            : draw.chance(0.8) ? draw.between(0, c.next_n + 2)
                               : draw.one_of({-1, -7, INT32_MIN, INT32_MAX, 1 << 30});
  }
}

// The sizes of a case's tables and pools. Returns its bytes.
int64_t draw_tables(Case& c, Draw& draw) {
  const double bad = draw.one_of({0.0, 0.0, 0.05, 0.4}) + (c.batch >= 70 ? 0.3 : 0);
  int64_t bytes = 0;
  for (Compressor& k : c.compressors) {
    DecodeRecordsParams& p = k.call.params;
    RecordTarget& t = p.records;
    int64_t longest = 1;  // of lengths that a table may be made for
    for (int32_t length : c.lens) {
      if (length < 1000) longest = std::max<int64_t>(longest, length);
    }
    // To the kernels, tables of kv and scores at one address may be one table. A group's scores
    // then use the first group's, if they alone are shared.
    if (k.one_table && k.table_groups[1] != 1) k.table_groups[1] = k.table_groups[0];
    const bool all_use_first = k.one_table && k.table_groups[1] != k.table_groups[0];
    k.max_pages = draw_max_pages((longest + k.page_size - 1) / k.page_size, draw);
    TableDraft drafts[3];
    for (int i = 0; i < (k.one_table ? 1 : 2); ++i) {
      drafts[i] = draft_table(c, k.table_groups[i], all_use_first, k.max_pages, draw,
                              [&](uint32_t g, uint32_t b, auto&& visit) {
                                visit_rows(k, c.step(k, g, b), [&](int64_t position, bool writes) {
                                  visit(position / k.page_size, writes);
                                });
                              });
    }
    k.num_pages = std::max(drafts[0].count, drafts[1].count) + draw.between(0, 2);
    const int64_t num_windows = std::max<int64_t>(longest / k.R(), 1);
    const int64_t record_max_pages =
        draw_max_pages((num_windows + k.record_page_size - 1) / k.record_page_size, draw);
    drafts[2] = draft_table(c, k.table_groups[2], false, record_max_pages, draw,
                            [&](uint32_t g, uint32_t b, auto&& visit) {
                              const Step step = c.step(k, g, b);
                              for (int64_t w = step.first_window; w < step.end_window; ++w) {
                                visit(w / k.record_page_size, true);
                              }
                            });
    t.pool.num_pages = drafts[2].count + draw.between(0, 2);

    int64_t record_bytes = 0;
    visit_record(k.call.format, k.D(), [&](auto record) {
      using Layout = typename decltype(record)::Layout;
      record_bytes = Layout::kData + Layout::kScales;
    });
    const int64_t used = k.record_page_size * record_bytes, kind = draw.between(0, 3);
    t.pool.page_bytes = kind == 0   ? used + 4 * draw.between(1, 40)
                        : kind == 1 ? (used + 15) / 16 * 16 + 16 * draw.between(0, 10)
                        : kind == 2 ? (used + 575) / 576 * 576
                                    : used;
    const int64_t table_rows = k.S() * size_of(k.call.selection.state);
    for (int i = 0; i < 3; ++i) {
      if (i == 1 && k.one_table) continue;
      const bool is_record = i == 2;
      number_table(k.tables[i], drafts[i], is_record ? t.pool.num_pages : k.num_pages,
                   is_record ? k.record_page_size : k.page_size,
                   is_record ? record_bytes : table_rows, bad, draw);
    }

    t.max_pages = record_max_pages;
    t.num_positions = draw.chance(0.25)   ? 0
                      : draw.chance(0.85) ? (num_windows - 1) * k.R() + draw.between(1, k.R())
                                          : draw.between(1, longest);
    bytes += c.groups * (2 * p.num_layers * k.num_pages * k.page_size * table_rows +
                         t.pool.num_layers * int64_t{t.pool.num_pages} * t.pool.page_bytes);
    for (uint32_t g = 0; g < c.groups; ++g) {
      for (uint32_t b = 0; b < c.batch; ++b) {
        const Step step = c.step(k, g, b);
        c.work += step.num_new * k.S() +
                  (step.end_window - step.first_window) * k.D() * (k.R() * (1 + overlaps(k)) + 10);
      }
    }
  }
  return bytes;
}

// All of the parameters that are no pointers.
void set_params(Case& c, Compressor& k) {
  DecodeRecordsParams& p = k.call.params;
  RecordTarget& t = p.records;
  const auto stride = [&](uint32_t groups) { return groups == 1 ? 0 : c.batch; };
  p.num_groups = c.groups, p.batch = c.batch, p.next_n = c.next_n;
  p.num_windows = static_cast<int32_t>((c.next_n + k.R() - 1) / k.R());
  p.rows_per_layer = k.num_pages * k.page_size;
  p.rows_per_group = p.num_layers * p.rows_per_layer;
  p.paging = {static_cast<uint32_t>(k.max_pages), static_cast<uint32_t>(k.num_pages),
              Divisor(static_cast<uint32_t>(k.page_size))};
  p.kv_score_stride = stride(c.joint ? c.joint_groups : k.kv_groups);
  p.kv_tables_stride = stride(k.table_groups[0]);
  p.score_tables_stride = stride(k.table_groups[1]);
  p.kv_lens_stride = stride(c.lens_groups), p.q_lens_stride = stride(c.q_lens_groups);
  p.ape_stride = k.ape_groups != 1, p.layer_stride = c.layer_groups != 1;
  p.row_size = c.joint ? c.row_size : k.scores_apart ? k.S() : 2 * k.S();
  p.score_offset = k.S();
  t.tables_stride = stride(k.table_groups[2]);
  t.weight_stride = k.weight_groups != 1;
  t.cos_sin_stride = k.turn_groups != 1 ? t.num_positions : 0;
  t.pool.layer_stride = p.layer_stride;
  t.pool.page_size = Divisor(static_cast<uint32_t>(k.record_page_size));
  t.pool.group_pages = int64_t{t.pool.num_layers} * t.pool.num_pages;
  t.pool.is_16b_aligned = t.pool.page_bytes % 16 == 0;
}

// The call, with its operands on the host or on the GPU.
DecodeRecordsCall call_of(Case& c, Compressor& k, bool on_gpu) {
  DecodeRecordsCall call = k.call;
  DecodeRecordsParams& p = call.params;
  RecordTarget& t = p.records;
  const int64_t element = size_of(call.selection.kv_score);
  const int64_t layer_rows = c.layer_index * p.rows_per_layer;
  const int64_t first = layer_rows * k.S() * size_of(call.selection.state);
  p.kv = k.kv.at<char>(on_gpu) + first;
  p.score = k.score.at<char>(on_gpu) + first;
  p.kv_score = (c.joint ? c.kv_score : k.kv_score).at<char>(on_gpu) + k.column * element;
  if (k.scores_apart) {
    p.score_offset = (reinterpret_cast<intptr_t>(k.new_score.at<char>(on_gpu)) -
                      reinterpret_cast<intptr_t>(p.kv_score)) /
                     element;
  }
  p.ape = k.has_ape ? k.ape.at<float>(on_gpu) : nullptr;
  p.kv_tables = k.tables[0].at<int32_t>(on_gpu);
  p.score_tables = k.tables[k.one_table ? 0 : 1].at<int32_t>(on_gpu);
  p.kv_lens = c.kv_lens.at<int32_t>(on_gpu);
  p.q_lens = c.has_q_lens ? c.q_lens_operand.at<int32_t>(on_gpu) : nullptr;
  p.layer = c.has_layer ? c.layer.at<int32_t>(on_gpu) : nullptr;
  t.tables = k.tables[2].at<int32_t>(on_gpu);
  t.norm_weight = k.has_weight ? k.weight.at<float>(on_gpu) : nullptr;
  t.cos_sin = t.num_positions != 0 ? k.turns.at<float>(on_gpu) : nullptr;
  t.pool.data =
      k.pool.at<uint8_t>(on_gpu) + c.layer_index * int64_t{t.pool.num_pages} * t.pool.page_bytes;
  t.pool.layer = p.layer;
  return call;
}

// --------------------------------------------------------------------------- filling operands

// Rows that are no request's, and columns that are no compressor's, are NaN.
void fill_new_rows(Case& c, Draw& draw) {
  const Noises& n = noises();
  const auto is_real = [&](uint32_t operand_groups, uint32_t g, uint32_t b, int t) {
    for (uint32_t group = 0; group < c.groups; ++group) {
      if (operand_groups != 1 && group != g) continue;
      if (t < c.step(c.compressors.front(), group, b).num_new) return true;
    }
    return false;
  };
  const auto fill = [&](Compressor& k, uint8_t* kv, uint8_t* score) {
    const DType dtype = k.call.selection.kv_score;
    n.kv[c.kv_scale].fill(dtype, kv, k.S(), draw);
    n.score[c.score_kind].fill(dtype, score, k.S(), draw);
    if (!c.has_specials || !draw.chance(0.2)) return;
    add_special(dtype, k.S(), kv, score, draw);
  };
  const auto make = [&](Operand& operand, uint32_t groups, int64_t row_size, DType dtype) {
    const size_t size = groups * c.batch * c.next_n * row_size * size_of(dtype);
    uint8_t* const rows = operand.make<uint8_t>(size);
    std::memset(rows, 0xff, size);
    return rows;
  };
  const auto fill_rows = [&](uint32_t groups, auto&& fill_row) {
    for (uint32_t g = 0; g < groups; ++g) {
      for (uint32_t b = 0; b < c.batch; ++b) {
        for (int t = 0; t < c.next_n; ++t) {
          if (is_real(groups, g, b, t)) fill_row((int64_t{g} * c.batch + b) * c.next_n + t);
        }
      }
    }
  };
  if (c.joint) {
    const DType dtype = c.compressors.front().call.selection.kv_score;
    const int64_t size = size_of(dtype);
    uint8_t* const rows = make(c.kv_score, c.joint_groups, c.row_size, dtype);
    fill_rows(c.joint_groups, [&](int64_t row) {
      for (Compressor& k : c.compressors) {
        uint8_t* const kv = rows + (row * c.row_size + k.column) * size;
        fill(k, kv, kv + k.S() * size);
      }
    });
    return;
  }
  for (Compressor& k : c.compressors) {
    const DType dtype = k.call.selection.kv_score;
    const int64_t row_bytes = k.S() * size_of(dtype), rows = k.scores_apart ? 1 : 2;
    uint8_t* const kv = make(k.kv_score, k.kv_groups, rows * k.S(), dtype);
    uint8_t* const score = k.scores_apart ? make(k.new_score, k.kv_groups, k.S(), dtype) : nullptr;
    fill_rows(k.kv_groups, [&](int64_t row) {
      uint8_t* const to = kv + row * rows * row_bytes;
      fill(k, to, score == nullptr ? to + row_bytes : score + row * row_bytes);
    });
  }
}

// The row of a position in the tables of a request: in its group's layer, or -1.
int64_t find_row(const Case& c, Compressor& k, int table, uint32_t group, uint32_t request,
                 int64_t position) {
  const int64_t logical = position / k.page_size;
  if (logical >= k.max_pages) return -1;
  const int64_t row = (k.table_groups[table] == 1 ? 0 : group) * c.batch + request;
  const int32_t page =
      k.tables[k.one_table ? 0 : table].at<int32_t>(false)[row * k.max_pages + logical];
  if (page < 0 || page >= k.num_pages) return -1;
  return page * k.page_size + position % k.page_size;
}

// Rows that no step reads are NaN, or noise.
void fill_state(Case& c, Compressor& k, Draw& draw) {
  const Noises& n = noises();
  const DecodeRecordsParams& p = k.call.params;
  const DType dtype = k.call.selection.state;
  const int64_t row_bytes = k.S() * size_of(dtype);
  const size_t elements = size_t{c.groups} * p.rows_per_group * k.S();
  uint8_t* const kv = k.kv.make<uint8_t>(elements * size_of(dtype));
  uint8_t* const score = k.score.make<uint8_t>(elements * size_of(dtype));
  if (draw.chance(0.6)) {
    std::memset(kv, 0xff, k.kv.size());
    std::memset(score, 0xff, k.score.size());
  } else {
    n.kv[c.kv_scale].fill(dtype, kv, elements, draw);
    n.score[c.score_kind].fill(dtype, score, elements, draw);
  }
  // Rows that the step may read and does not write.
  const auto visit_old_rows = [&](auto visit) {
    for (uint32_t g = 0; g < c.groups; ++g) {
      const int64_t layer = c.has_layer ? c.layer_of(g, p.num_layers) : c.layer_index;
      if (layer < 0) continue;
      const int64_t first = int64_t{g} * p.rows_per_group + layer * p.rows_per_layer;
      for (uint32_t b = 0; b < c.batch; ++b) {
        visit_rows(k, c.step(k, g, b), [&](int64_t position, bool is_written) {
          const int64_t kv_row = find_row(c, k, 0, g, b, position);
          const int64_t score_row = find_row(c, k, 1, g, b, position);
          if (is_written || kv_row < 0 || score_row < 0) return;
          visit(kv + (first + kv_row) * row_bytes, score + (first + score_row) * row_bytes);
        });
      }
    }
  };
  visit_old_rows([&](uint8_t* to_kv, uint8_t* to_score) {
    n.kv[c.kv_scale].fill(dtype, to_kv, k.S(), draw);
    n.score[c.score_kind].fill(dtype, to_score, k.S(), draw);
    if (c.has_specials && draw.chance(0.1)) add_special(dtype, k.S(), to_kv, to_score, draw);
    if (k.call.state_format != StateFormat::kPrefix) return;
    for (int64_t i = 0; i < row_bytes; i += 4) {  // a prefix of nothing has the mean 0
      if (element_at(dtype, to_score + i) == kNegInf) set_element(dtype, to_kv + i, 0);
    }
  });
  if (k.call.state_format != StateFormat::kPrefix || !c.has_specials) return;
  // Nor is there a prefix whose logsumexp is NaN or +inf and whose mean is finite. Last: requests
  // share rows of kv.
  visit_old_rows([&](uint8_t* to_kv, const uint8_t* score_row) {
    for (int64_t i = 0; i < row_bytes; i += 4) {
      if (!(element_at(dtype, score_row + i) < -kNegInf)) {
        set_element(dtype, to_kv + i, std::nanf(""));
      }
    }
  });
}

void fill(Case& c, Draw& draw) {
  const Noises& n = noises();
  c.kv_scale = draw.one_of({0, 0, 0, 1, 2}), c.score_kind = draw.one_of({0, 0, 0, 1, 1, 2, 3});
  c.has_specials = draw.chance(0.1);
  if (c.joint) {
    int64_t column = 0;
    const auto pad = [&] { column += draw.chance(0.3) ? 8 * draw.between(1, 5) : 0; };
    for (Compressor& k : c.compressors) {
      pad();
      k.column = column;
      column += 2 * k.S();
    }
    pad();
    c.row_size = column;
  }
  std::copy(c.lens.begin(), c.lens.end(), c.kv_lens.make<int32_t>(c.lens.size()));
  if (c.has_q_lens) {
    std::copy(c.q_lens.begin(), c.q_lens.end(), c.q_lens_operand.make<int32_t>(c.q_lens.size()));
  }
  if (c.has_layer) {
    std::copy(c.layers.begin(), c.layers.end(), c.layer.make<int32_t>(c.layers.size()));
  }
  fill_new_rows(c, draw);
  for (Compressor& k : c.compressors) {
    set_params(c, k);
    fill_state(c, k, draw);
    const RecordTarget& t = k.call.params.records;
    const auto fill_f32 = [&](Operand& operand, const Noise& noise, size_t count) {
      noise.fill(DType::kF32, operand.make<float>(count), count, draw);
    };
    if (k.has_ape) fill_f32(k.ape, n.kv[0], k.ape_groups * k.R() * k.S());
    if (k.has_weight) fill_f32(k.weight, n.weight, k.weight_groups * k.D());
    fill_f32(k.turns, n.turn, size_t{k.turn_groups} * t.num_positions * kRopeDim);
    const size_t size = c.groups * t.pool.group_pages * t.pool.page_bytes;
    std::memset(k.pool.make<uint8_t>(size), 0xa5, size);
  }
}

// A case of moderate size: one that is too large is drawn again, with fewer requests.
void draw_case(std::deque<Case>& cases, Draw& draw) {
  const bool many = draw.chance(0.04);
  const int64_t budget = int64_t{many ? 48 : draw.chance(0.1) ? 12 : 2} << 20;
  for (uint32_t most_requests = 300;;) {
    cases.clear();
    Case& c = cases.emplace_back();
    draw_shape(c, many, most_requests, draw);
    draw_lens(c, many, draw);
    if (draw_tables(c, draw) <= budget || c.batch == 1) return fill(c, draw);
    most_requests = std::max(c.batch / 2, 1u);
  }
}

// ------------------------------------------------------------------------- what a case is called

std::string describe(const Case& c) {
  std::ostringstream out;
  const auto shared = [&](uint32_t groups) {
    return c.groups == 1 ? "" : groups == 1 ? " (shared)" : " (per group)";
  };
  out << "  groups " << c.groups << ", batch " << c.batch << ", next_n " << c.next_n
      << ", geometry " << c.geometry << ", layer "
      << (c.has_layer ? list_of(c.layers) : std::to_string(c.layer_index))
      << (c.has_specials ? ", values that are not finite" : "") << ", kv x "
      << kKvScales[c.kv_scale] << ", scores of kind " << c.score_kind << "\n  kv_lens"
      << shared(c.lens_groups) << " " << list_of(c.lens) << ", q_lens" << shared(c.q_lens_groups)
      << " " << (c.has_q_lens ? list_of(c.q_lens) : "none");
  if (c.joint) out << "; kv_score of width " << c.row_size << shared(c.joint_groups);
  for (const Compressor& k : c.compressors) {
    const DecodeRecordsParams& p = k.call.params;
    const RecordTarget& t = p.records;
    const RecordOptions& o = t.options;
    out << "\n  compressor " << name_of(k.call.selection) << " "
        << kStateFormatNames[static_cast<int>(k.call.state_format)] << " ["
        << "layers " << p.num_layers << ", pages " << k.num_pages << " of " << k.page_size
        << ", max_pages " << k.max_pages << (k.one_table ? ", one table" : ", two tables")
        << shared(k.table_groups[0]) << shared(k.table_groups[1])
        << (k.has_ape ? ", ape" : ", no ape") << shared(k.ape_groups) << ", kv_score "
        << (c.joint ? "at column " + std::to_string(k.column)
                    : (k.scores_apart ? "in two arrays" : "in one array"))
        << shared(k.kv_groups) << "] " << kRecordFormatNames[static_cast<int>(k.call.format)]
        << " [layers " << t.pool.num_layers << ", pages " << t.pool.num_pages << " of "
        << k.record_page_size << ", " << t.pool.page_bytes << " bytes, max_pages " << t.max_pages
        << shared(k.table_groups[2]) << ", positions " << t.num_positions << shared(k.turn_groups)
        << (o.interleaved ? ", interleaved" : "") << (k.has_weight ? ", norm" : ", no norm")
        << shared(k.weight_groups) << ", eps " << o.rms_norm_eps << (o.hadamard ? ", hadamard" : "")
        << (o.scale_floor ? ", scale_floor" : "") << ", scales " << static_cast<int>(o.scales)
        << ", rounding " << static_cast<int>(o.rounding) << "]";
  }
  return out.str();
}

template <class Config, bool kStaged, int kThreads>
std::string name_of(PrefixTokenRecords<Config, kStaged, kThreads>) {
  return kStaged ? "prefix, few, staged" : "prefix, few";
}
template <class Config>
std::string name_of(PrefixPartRecords<Config>) {
  return "prefix, parts";
}
template <class Config, bool kStagesRows>
std::string name_of(PrefixRecords<Config, 1, kStagesRows>) {
  return kStagesRows ? "prefix, many, rows staged" : "prefix, many";
}
template <class Config, class Geometry, bool kAnyPage>
std::string name_of(RawRecords<Config, Geometry, kAnyPage>) {
  using Body = RawRecords<Config, Geometry, kAnyPage>;
  return "raw, clusters of " + std::to_string(Body::kCluster) + ", " +
         std::to_string(Body::kThreads) + " threads" + (kAnyPage ? ", any page" : "");
}

// The kernel that a call has alone; empty: none.
std::string kernel_of(const DecodeRecordsCall& call, int64_t geometry) {
  std::string name;
  visit_config<InnerDTypesList>(call.selection, [&](auto config) {
    visit_body<decltype(config)>(call, geometry, [&](auto body) {
      name =
          text_of(call.selection.head_dim, "/", call.selection.compress_ratio, " ", name_of(body));
      return true;
    });
  });
  return name;
}

// ----------------------------------------------------------------------------------- on the CPU

// What a request's step wrote.
struct Written {
  struct StateRow {
    uint32_t row;  // from the state's first on that the call has
    int32_t position;
  };
  struct RecordAt {
    uint32_t group, window;
    RecordPages pages;
    RecordPlace place;
  };
  std::vector<StateRow> kv, score;
  std::vector<RecordAt> records;
};

template <class Config, StateFormat kFormat>
void run_request(const DecodeRecordsCall& call, uint32_t group, uint32_t request,
                 Written& written) {
  constexpr int D = Config::kHeadDim;
  const DecodeRecordsParams& p = call.params;
  const auto r = request_at<Config>(p, group, request);
  step_to_records<Config, kFormat>(p, group, request,
                                   [&](uint32_t window, uint32_t position, const RecordPages& pages,
                                       const RecordPlace& place, float* value) {
                                     visit_record(call.format, D, [&](auto record) {
                                       if constexpr (record.kHeadDim == D) {
                                         store_record<record.kFormat, D>(p.records, group, position,
                                                                         pages, place, value);
                                       }
                                     });
                                     written.records.push_back({group, window, pages, place});
                                   });
  for (int i = std::max(0, -r.first_position); i < r.num_new; ++i) {
    const int32_t position = r.first_position + i;
    const auto add = [&](std::vector<Written::StateRow>& rows, const int32_t* table) {
      const uint32_t row = r.row_at(p.paging, look_up(p.paging, table, position));
      if (row != kNowhere) rows.push_back({row, position});
    };
    add(written.kv, r.kv_table);
    add(written.score, r.score_table);
  }
}

void run_on_cpu(const DecodeRecordsCall& call, uint32_t group, uint32_t request, Written& written) {
  visit_config<InnerDTypesList>(call.selection, [&](auto config) {
    using C = decltype(config);
    visit_format<C>(call.state_format,
                    [&](auto format) { run_request<C, format>(call, group, request, written); });
  });
}

// Of each compressor, by request.
std::vector<std::vector<Written>> run_on_cpu(const Case& c,
                                             const std::vector<DecodeRecordsCall>& calls) {
  const size_t requests = size_t{c.groups} * c.batch, count = calls.size() * requests;
  std::vector<std::vector<Written>> written(calls.size(), std::vector<Written>(requests));
  const auto run = [&](size_t first, size_t step) {
    for (size_t i = first; i < count; i += step) {
      const size_t k = i % calls.size(), request = i / calls.size();
      run_on_cpu(calls[k], request / c.batch, request % c.batch, written[k][request]);
    }
  };
  const size_t most = std::min<size_t>(std::thread::hardware_concurrency(), 8);
  const size_t threads = std::clamp<size_t>(c.work / 100000, 1, std::max<size_t>(most, 1));
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) others.emplace_back(run, i, threads);
  run(0, threads);
  for (std::thread& thread : others) thread.join();
  return written;
}

// ------------------------------------------------------------------------------------ comparing

struct Totals {
  int64_t elements = 0, different = 0, records = 0;
  double largest = 0, of_allowed = 0;

  void add(float got, float want, double difference, double ratio) {
    ++elements;
    different += bits_of(got) != bits_of(want);
    largest = std::max(largest, difference);
    of_allowed = std::max(of_allowed, ratio);
  }
};
std::map<std::string, Totals> totals;

// Of one of a state's two arrays. Rows that were compared are made equal, and then all bytes must
// be.
std::string compare_state(const Case& c, Compressor& k, bool is_score,
                          const std::vector<Written>& written) {
  Operand& operand = is_score ? k.score : k.kv;
  const std::vector<uint8_t> got = operand.download();
  uint8_t* const want = operand.at<uint8_t>(false);
  const char* const name = is_score ? "state.score" : "state.kv";
  const DType dtype = k.call.selection.state;
  const bool is_prefix = k.call.state_format == StateFormat::kPrefix;
  const int64_t size = size_of(dtype), row_bytes = k.S() * size;
  const int64_t first = c.layer_index * k.call.params.rows_per_layer;
  const float largest_kv = std::max(6 * kKvScales[c.kv_scale], 1e-30f);
  Totals& total = totals[is_prefix ? "rows of prefixes" : "raw rows"];
  for (size_t request = 0; request < written.size(); ++request) {
    for (const auto& [row, position] : is_score ? written[request].score : written[request].kv) {
      const size_t at = (first + row) * row_bytes;
      if (!is_prefix && std::memcmp(&got[at], want + at, row_bytes) == 0) {
        total.elements += k.S();
        continue;
      }
      for (int64_t i = 0; i < k.S(); ++i) {
        const float x = element_at(dtype, &got[at + i * size]);
        const float y = element_at(dtype, want + at + i * size);
        const double tolerance = !is_prefix ? 0
                                 : is_score ? 2e-5 * std::max(1.0f, std::fabs(y))
                                            : 2e-5 * largest_kv;
        double ratio = ratio_of(x, y, tolerance, c.has_specials);
        if (!is_prefix && bits_of(x) != bits_of(y) && !(c.has_specials && ratio == 0)) {
          ratio = HUGE_VAL;  // -0 and 0
        }
        total.add(x, y, both_finite(x, y) ? std::fabs(double{x} - double{y}) : 0, ratio);
        if (ratio <= 1) continue;
        return text_of(name, " of request ", request, " (of groups x batch), position ", position,
                       ": row ", first + row, ", column ", i, ": got ", x, ", want ", y);
      }
      std::memcpy(want + at, &got[at], row_bytes);
    }
  }
  if (std::memcmp(got.data(), want, got.size()) == 0) return "";
  const size_t at = std::mismatch(got.begin(), got.end(), want).first - got.begin();
  return text_of(name, ": byte ", at, ", row ", at / row_bytes, ", column ", at % row_bytes / size,
                 ", of no row that the step writes: got ", int{got[at]}, ", want ", int{want[at]});
}

// The distance of a value's neighbours in a format.
double spacing(int mantissa_bits, int least_exponent, float x, float scale) {
  const double quotient = std::fabs(double{x}) / scale;
  const int exponent =
      quotient > 0 ? std::max(std::ilogb(quotient), least_exponent) : least_exponent;
  return std::ldexp(double{scale}, exponent - mantissa_bits);
}

template <RecordFormat kFormat>
float scale_at(const uint8_t* scales, Scales kind, int channel) {
  using F = RecordFormat;
  if (kFormat == F::kFp8DsMla) return power_of_two(scales[channel / 64]);
  if (kFormat == F::kMxfp4) return power_of_two(scales[channel / 32]);
  if (kFormat != F::kFp8Block128) return 1;
  const uint32_t word = load_word(scales + channel / 128 * 4);
  return kind == Scales::kUe8m0 ? power_of_two(word & 0xff) : float_of(word);
}

// By how much right records may differ beside the last rounding: arithmetic before it, over the
// largest value of the record; a rounding to bf16 that goes the other way, which moves the value of
// its own channel, and with rounding "model" those that later steps make of it.
double slack_of(const RecordOptions& o, bool is_quantized, float x, float block_largest,
                float largest) {
  double slack = 1e-4 * largest;
  if (o.rounding == Rounding::kModel) slack += 0x1p-5 * (o.hadamard ? largest : block_largest);
  if (o.rounding == Rounding::kOnce && is_quantized) slack += 0x1p-7 * std::fabs(x);
  return slack;
}

template <RecordFormat kFormat, int D>
std::string compare_record(const RecordBytes& got, const RecordBytes& want, const RecordOptions& o,
                           bool lenient, Totals& total) {
  using F = RecordFormat;
  float x[D], y[D], block_largest[D / 32] = {}, largest = 0;
  for (int i = 0; i < D; i += 4) {
    read_channels<kFormat, D>(got.data, got.scales, o.scales, i, x + i);
    read_channels<kFormat, D>(want.data, want.scales, o.scales, i, y + i);
  }
  for (int i = 0; i < D; ++i) {
    if (!std::isfinite(y[i])) continue;
    block_largest[i / 32] = std::max(block_largest[i / 32], std::fabs(y[i]));
    largest = std::max(largest, std::fabs(y[i]));
  }
  ++total.records;
  for (int i = 0; i < D; ++i) {
    const float x_scale = scale_at<kFormat>(got.scales, o.scales, i);
    const float y_scale = scale_at<kFormat>(want.scales, o.scales, i);
    const bool is_rope = kFormat == F::kFp8DsMla && i >= D - kRopeDim;
    if (!is_rope && !(x_scale <= 2.1f * y_scale && y_scale <= 2.1f * x_scale)) {
      return text_of("scale of channel ", i, ": got ", x_scale, ", want ", y_scale);
    }
    const float scale = std::max(x_scale, y_scale),
                most = std::max(std::fabs(x[i]), std::fabs(y[i]));
    double step = 0;
    if (both_finite(x[i], y[i])) {
      if (kFormat == F::kBf16 || is_rope) {
        step = spacing(7, -126, most, 1);
      } else if (kFormat == F::kMxfp4) {
        step = spacing(1, 0, most, scale);
      } else if (kFormat != F::kF32) {
        step = spacing(3, -6, most, scale);
      }
    }
    const double allowed =
        step + slack_of(o, kIsQuantized<kFormat>, most, block_largest[i / 32], largest);
    const double difference =
        both_finite(x[i], y[i]) && x[i] != y[i] ? std::fabs(double{x[i]} - double{y[i]}) : 0;
    const double unit = step > 0 ? step : double{largest};
    const double ratio = ratio_of(x[i], y[i], allowed, lenient);
    total.add(x[i], y[i], difference > 0 ? difference / unit : 0, ratio);
    if (ratio > 1) {
      return text_of("channel ", i, ": got ", x[i], ", want ", y[i], ", within ", allowed);
    }
  }
  if (kFormat == F::kFp8DsMla && got.scales[7] != 0) {
    return text_of("the byte after the scales: got ", int{got.scales[7]}, ", want 0");
  }
  if (kFormat == F::kFp8Block128 && o.scales == Scales::kUe8m0) {
    for (int i = 0; i < D / 32; ++i) {
      if (got.scales[i] != got.scales[i / 4 * 4]) return text_of("scale byte ", i, " is another");
    }
  }
  return "";
}

std::string compare_records(Case& c, Compressor& k, const std::vector<Written>& written) {
  std::vector<uint8_t> got = k.pool.download();
  const RecordTarget want = call_of(c, k, false).params.records;
  RecordTarget target = want;
  target.pool.data = got.data() + (want.pool.data - k.pool.at<uint8_t>(false));
  const RecordOptions& o = want.options;
  const bool spreads =  // a value that is not finite
      k.has_weight || o.hadamard || k.call.format > RecordFormat::kBf16;
  std::string problem;
  visit_record(k.call.format, k.D(), [&](auto record) {
    using Layout = typename decltype(record)::Layout;
    constexpr RecordFormat kFormat = decltype(record)::kFormat;
    constexpr int D = decltype(record)::kHeadDim;
    Totals& total = totals[kRecordFormatNames[static_cast<int>(kFormat)] +
                           std::string(o.rounding == Rounding::kModel ? ", rounding model" : "")];
    for (size_t request = 0; request < written.size(); ++request) {
      for (const Written::RecordAt& at : written[request].records) {
        const RecordRow<Layout> x(target.pool, at.pages, at.place);
        const RecordRow<Layout> y(want.pool, at.pages, at.place);
        if (!c.has_specials || !spreads) {
          problem = compare_record<kFormat, D>(x, y, o, c.has_specials, total);
        }
        if (!problem.empty()) {
          problem =
              text_of("record of request ", request, " (of groups x batch), window ", at.window,
                      ": page ", at.place.page, ", row ", at.place.row, ", ", problem);
          return;
        }
        std::memcpy(y.data, x.data, Layout::kData);
        std::memcpy(y.scales, x.scales, Layout::kScales);
      }
    }
  });
  const uint8_t* const bytes = k.pool.at<uint8_t>(false);
  if (!problem.empty() || std::memcmp(got.data(), bytes, got.size()) == 0) return problem;
  const size_t at = std::mismatch(got.begin(), got.end(), bytes).first - got.begin();
  return text_of("records.pool: byte ", at, ", page ", at / want.pool.page_bytes, " at ",
                 at % want.pool.page_bytes, ", of no record that the step makes: got ",
                 int{got[at]}, ", want ", int{bytes[at]});
}

// ------------------------------------------------------------------------------------- one case

std::map<std::string, int64_t> kernels;
int64_t num_records = 0;

// What is wrong; empty: nothing.
std::string run(uint64_t seed) {
  Draw draw{std::mt19937_64(seed)};
  std::deque<Case> cases;
  draw_case(cases, draw);
  Case& c = cases.front();
  for (Operand* operand : {&c.kv_score, &c.kv_lens, &c.q_lens_operand, &c.layer}) operand->upload();
  std::vector<DecodeRecordsCall> on_gpu, on_cpu;
  for (Compressor& k : c.compressors) {
    for (Operand* operand : {&k.kv_score, &k.new_score, &k.ape, &k.kv, &k.score, &k.tables[0],
                             &k.tables[1], &k.tables[2], &k.weight, &k.turns, &k.pool}) {
      operand->upload();
    }
    on_gpu.push_back(call_of(c, k, true));
    on_cpu.push_back(call_of(c, k, false));
  }
  const std::string title = text_of("case of seed ", seed, "\n", describe(c));
  const char* const problem =
      launch_decode_records(nullptr, on_gpu.data(), on_gpu.size(), c.geometry);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) stop(text_of(title, "\n  launch: ", cudaGetErrorString(status)));

  bool is_refused = false;
  for (const DecodeRecordsCall& call : on_gpu) {
    const std::string kernel = kernel_of(call, c.geometry);
    is_refused |= kernel.empty();
    // A pair runs together in kernels of the same bodies.
    ++kernels[(kernel.empty() ? "none" : kernel) + (on_gpu.size() > 1 ? ", one of two" : "")];
  }
  if (is_refused != (problem != nullptr)) {
    return text_of(title, "\n  launch: ", problem == nullptr ? "accepted" : problem);
  }
  if (is_refused) {
    wait(title);
    return c.geometry < 0 ? text_of(title, "\n  launch: ", problem) : "";
  }
  const auto written = run_on_cpu(c, on_cpu);
  wait(title);
  for (size_t i = 0; i < c.compressors.size(); ++i) {
    Compressor& k = c.compressors[i];
    for (const Written& of_request : written[i]) num_records += of_request.records.size();
    std::string found = compare_state(c, k, false, written[i]);
    if (found.empty()) found = compare_state(c, k, true, written[i]);
    if (found.empty()) found = compare_records(c, k, written[i]);
    if (!found.empty()) return text_of(title, "\n  compressor ", i, ": ", found);
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  const auto [done, failures] = run_cases(argc, argv, run);
  for (const auto& [kernel, calls] : kernels) {
    std::printf("{\"kernel\": \"%s\", \"calls\": %lld}\n", kernel.c_str(),
                static_cast<long long>(calls));
  }
  for (const auto& [format, total] : totals) {
    std::printf(
        "{\"format\": \"%s\", \"elements\": %lld, \"different\": %lld, \"records\": %lld, "
        "\"largest\": %.3g, \"of_allowed\": %.3g}\n",
        format.c_str(), static_cast<long long>(total.elements),
        static_cast<long long>(total.different), static_cast<long long>(total.records),
        total.largest, total.of_allowed);
  }
  std::printf("%lld cases, %lld records, %lld failures\n", static_cast<long long>(done),
              static_cast<long long>(num_records), static_cast<long long>(failures));
  return failures > 0;
}
