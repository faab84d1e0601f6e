// Fuzzes launch_ragged and launch_ragged_records on a GPU: random batches, in ten regimes, with bad
// metadata in many of them, beside SPEC's section on ragged batches written in float64, one request
// after another. Each operand is an allocation of its own, of its exact size, for memcheck to see
// where it ends.
//
//     nvcc -std=c++17 -O2 -arch=native -Iffi -o fuzz tests/fuzz_ragged.cu \
//         ffi/{ragged,ragged_records}_launch.cu
//     ./fuzz [cases=5000] [seed=0]
//     compute-sanitizer --tool memcheck --padding 8192 ./fuzz
//
// A case is drawn from its own seed, which is that of the one before plus 1: a failure's line names
// it, and `./fuzz 1 SEED` runs it alone. Against float64:
//   - raw rows, zeros in kv_comp, and all bytes of the state that are no stored row's, are equal;
//   - in rows of prefixes a logsumexp is within 2e-5 of max(1, its magnitude), a mean within 2e-5
//     of the largest kv of its channel in the window;
//   - values are within 1e-5 of the largest kv of their channel in the window, and for bf16 a
//     rounding beside; records, of a compressor or of such a pair as is compiled together, in f32,
//     are within what that makes of them;
//   - all bytes of a pool that are no record's are equal.
// Values that are not finite need only meet others that are not finite, in the same channels; a
// record of such a value is not compared.
// Prints what failed, then JSON lines: how often each kernel ran, what was drawn of each regime,
// and the windows and rows that each of them had; how many elements were compared, and the largest
// share of what is allowed. Exits with 1 after a failure; a fault, or a kernel that does not end,
// stops it at once.

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "config.h"
#include "fuzz.cuh"
#include "kernels.h"
#include "launch.cuh"

using namespace jax_dsv4;
using namespace jax_dsv4::fuzz;

namespace {

const RowNoises& noises() {
  static const RowNoises noises;
  return noises;
}

// ------------------------------------------------------------------------------------ operands

enum class Regime {
  kLong,       // one long request
  kTiny,       // many of a row or none
  kMixed,      // chunks and decode steps
  kUnaligned,  // chunks that start and end anywhere in a window
  kResumed,    // behind a prefix, on pages that requests share
  kPadded,     // rows of nobody, at both ends
  kFewSeqs,    // requests that are not there
  kBadEntries,
  kBadPages,
  kEmpty,  // requests without rows between others
};
constexpr const char* kRegimeNames[] = {"one long request",  "many tiny requests",
                                        "decode and chunks", "unaligned chunks",
                                        "resumed prefixes",  "padding",
                                        "num_seqs",          "bad cu_q_lens",
                                        "bad pages",         "empty requests"};

struct Case {
  Regime regime;
  Selection selection;
  StateFormat format;
  int64_t geometry = -1;
  uint32_t groups, batch;
  int64_t num_rows;  // T
  bool all;          // rows are stored; else:
  int64_t max_rewind, resume_every;
  bool has_ape, one_table, scores_apart, has_num_seqs, has_layer;
  uint32_t kv_groups, ape_groups, table_groups[2], lens_groups, cu_groups, num_seqs_groups,
      layer_groups;  // 1, or that of all
  int64_t num_layers, layer_index = 0;
  int64_t num_pages, page_size, max_pages, row_size, column = 0;
  bool has_specials;
  size_t kv_scale, score_kind;
  std::vector<int32_t> lens, cu_q_lens, num_seqs, layers;
  bool ends_in_records;
  // If so, with a norm or without: their pages.
  bool has_norm;
  int64_t record_page_size, record_max_pages = 0, record_pages;
  Operand record_tables, norm_weight, records;
  Operand kv_score, new_score, ape, kv, score, tables[2], lens_operand, cu_operand,
      num_seqs_operand, layer_operand, kv_comp;

  int64_t R() const { return selection.compress_ratio; }
  int64_t S() const { return selection.state_dim(); }
  int64_t D() const { return selection.head_dim; }
  // Of long windows: whether there are CTAs with all channels of one (ragged_launch.cuh).
  bool has_wide() const {
    return D() == 512 && selection.kv_score == DType::kBF16 && selection.state == DType::kF32;
  }
  bool overlap() const { return selection.overlap; }
  bool is_prefix() const { return format == StateFormat::kPrefix; }
  int64_t num_windows() const { return num_rows / R() + batch; }
  int64_t rows_per_layer() const { return num_pages * page_size; }
  int64_t record_page_bytes() const { return record_page_size * D() * 4; }

  // Of a group, or -1.
  int64_t layer_of(uint32_t group) const {
    if (!has_layer) return layer_index;
    const int64_t layer = layers[layer_groups == 1 ? 0 : group];
    return layer >= 0 && layer < num_layers ? layer : -1;
  }
};

// A request's part of a batch.
struct Chunk {
  int64_t index, begin, end;  // begin <= row < end of kv_score
  int64_t start, length;      // start <= position < length of its rows that count

  int64_t row_of(int64_t position) const { return end - (length - position); }
};

// Of the requests that are active.
std::vector<Chunk> chunks_of(const Case& c, uint32_t group) {
  const int32_t* const entries = &c.cu_q_lens[(c.cu_groups == 1 ? 0 : group) * (c.batch + 1)];
  const int64_t batch = c.batch,
                num_seqs = c.has_num_seqs ? c.num_seqs[c.num_seqs_groups == 1 ? 0 : group] : batch;
  std::vector<Chunk> chunks;
  int64_t begin = std::clamp<int64_t>(entries[0], 0, c.num_rows);
  for (int64_t b = 0; b < std::min(num_seqs, batch); ++b) {
    const int64_t end = std::max(begin, std::clamp<int64_t>(entries[b + 1], 0, c.num_rows));
    const int64_t length = c.lens[(c.lens_groups == 1 ? 0 : group) * batch + b];
    if (end > begin && length > 0 && c.layer_of(group) >= 0) {
      chunks.push_back({b, begin, end, std::max<int64_t>(length - (end - begin), 0), length});
    }
    begin = end;
  }
  return chunks;
}

// The rows that a step may read which starts at this length, to complete windows or to go on.
template <class Visit>
void visit_read(const Case& c, int64_t start, bool completes, Visit&& visit) {
  const int64_t R = c.R(), window = start / R * R;
  if (c.is_prefix()) {
    if (start % R != 0) visit(start - 1);
    if (completes && c.overlap() && window > 0) visit(window - 1);
  } else if (completes) {
    for (int64_t p = std::max<int64_t>(window - c.overlap() * R, 0); p < start; ++p) visit(p);
  }
}

// Which of a chunk's rows are stored, from its start on: those that a later step may read.
std::vector<bool> stored_rows(const Case& c, const Chunk& chunk) {
  std::vector<bool> stored(chunk.length - chunk.start, c.all);
  if (c.all) return stored;
  const auto resume_at = [&](int64_t start) {
    visit_read(c, start, true, [&](int64_t position) {
      if (position >= chunk.start) stored[position - chunk.start] = true;
    });
  };
  for (int64_t s = std::max(chunk.length - c.max_rewind, chunk.start); s <= chunk.length; ++s) {
    resume_at(s);
  }
  if (c.resume_every == 0) return stored;
  const int64_t e = c.resume_every;
  for (int64_t s = (chunk.start / e + 1) * e; s <= chunk.length; s += e) resume_at(s);
  return stored;
}

// Calls visit(position, is_written) for the rows of the state that a call reads or writes.
template <class Visit>
void visit_rows(const Case& c, const Chunk& chunk, Visit&& visit) {
  const bool completes = chunk.start / c.R() < chunk.length / c.R();
  visit_read(c, chunk.start, completes, [&](int64_t position) { visit(position, false); });
  const std::vector<bool> stored = stored_rows(c, chunk);
  for (size_t i = 0; i < stored.size(); ++i) {
    if (stored[i]) visit(chunk.start + static_cast<int64_t>(i), true);
  }
}

// ------------------------------------------------------------------------------ drawing a case

void draw_kind(Case& c, Draw& draw) {
  const bool is_long = c.regime == Regime::kLong, is_tiny = c.regime == Regime::kTiny;
  c.selection = draw_selection(draw, draw.between(0, Kinds::kSize - 1));
  c.ends_in_records = draw.chance(0.35);
  if (!c.ends_in_records) c.selection.out = draw.one_of({DType::kBF16, DType::kF32});
  c.format = c.selection.state == DType::kF32 && draw.chance(0.6) ? StateFormat::kPrefix
                                                                  : StateFormat::kRaw;
  c.groups = is_long || is_tiny || draw.chance(0.6) ? 1 : draw.between(2, 3);
}

void draw_shape(Case& c, Draw& draw) {
  const auto draw_groups = [&]() -> uint32_t { return draw.chance(0.5) ? c.groups : 1; };
  c.kv_groups = draw_groups(), c.ape_groups = draw_groups(), c.lens_groups = draw_groups();
  c.cu_groups = draw_groups(), c.num_seqs_groups = draw_groups(), c.layer_groups = draw_groups();
  for (uint32_t& groups : c.table_groups) groups = draw_groups();
  c.has_ape = draw.chance(0.7);
  c.one_table = draw.chance(0.5);
  if (c.one_table && c.table_groups[1] != 1) c.table_groups[1] = c.table_groups[0];
  c.scores_apart = draw.chance(0.4);
  c.row_size = c.scores_apart ? c.S() : 2 * c.S();
  if (!c.scores_apart && draw.chance(0.2)) {  // columns of a wider array
    c.column = 8 * draw.between(0, 3);
    c.row_size += c.column + 8 * draw.between(0, 3);
  }
  c.page_size = draw.one_of({1, 2, 3, 5, 8, 16, 20, 32, 64});
  if (c.batch >= 30 && draw.chance(0.8)) c.page_size = draw.between(1, 5);  // in little memory
  c.all = draw.chance(0.45);
  c.max_rewind = draw.one_of<int64_t>({0, 1, 2, 3, 3, c.R(), draw.between(4, 200), INT32_MAX});
  c.resume_every = draw.one_of<int64_t>({0, 0, c.page_size, c.page_size * draw.between(1, 9),
                                         draw.between(1, 300), c.R(), INT32_MAX});

  const int64_t layer_kind = draw.chance(0.6) ? 0 : draw.between(1, 2);
  c.has_layer = layer_kind == 2;
  c.num_layers = layer_kind == 0 ? 1 : draw.between(1, 3);
  if (layer_kind == 1) c.layer_index = draw.between(0, c.num_layers - 1);
  c.layers.resize(c.layer_groups);
  for (int32_t& layer : c.layers) {
    layer = draw.chance(0.85) ? draw.between(0, c.num_layers - 1)
                              : draw.one_of<int64_t>({-1, 1, 2, 3, INT32_MAX, INT32_MIN});
  }
}

// How many rows each request brings.
std::vector<int64_t> draw_counts(const Case& c, int64_t most, Draw& draw) {
  std::vector<int64_t> counts(c.batch);
  const int64_t R = c.R();
  for (size_t b = 0; b < counts.size(); ++b) {
    const int64_t chunk = draw.chance(0.3) ? draw.between(1, most) : draw.between(1, 2 * R + 5);
    switch (c.regime) {
      case Regime::kLong:
        counts[b] = b == 0 ? draw.between(most / 2, most) : draw.between(0, 9);
        break;
      case Regime::kTiny:
        counts[b] = draw.chance(0.9) ? draw.between(0, 2) : draw.between(0, 9);
        break;
      case Regime::kMixed:
        counts[b] = draw.chance(0.4) ? chunk : draw.between(1, 4);
        break;
      case Regime::kUnaligned:
      case Regime::kResumed:
        counts[b] = chunk;
        break;
      case Regime::kEmpty:
        counts[b] = draw.chance(0.6) ? 0 : draw.chance(0.3) ? chunk : draw.between(1, R + 1);
        break;
      default:
        counts[b] = draw.chance(0.2) ? 0 : draw.chance(0.4) ? chunk : draw.between(1, 5);
    }
    counts[b] = std::min(counts[b], most);
  }
  return counts;
}

int32_t bad_number(Draw& draw, int64_t near) {
  return static_cast<int32_t>(draw.one_of<int64_t>(
      {-1, -7, INT32_MIN, INT32_MAX, INT32_MAX - 1, 1 << 30, near + 1, near + draw.between(1, 50),
       draw.between(0, near), draw.between(INT32_MIN, INT32_MAX)}));
}

// Which rows are whose. Entries behind the last request's end are anything.
void draw_rows(Case& c, int64_t most, Draw& draw) {
  const bool pads = c.regime == Regime::kPadded;
  c.has_num_seqs = c.regime == Regime::kFewSeqs || draw.chance(0.3);
  c.num_seqs.resize(c.num_seqs_groups);
  int64_t num_seqs = 0;
  for (int32_t& n : c.num_seqs) {
    n = c.regime == Regime::kFewSeqs || draw.chance(0.3) ? draw.between(c.batch / 3, c.batch)
        : draw.chance(0.9)                               ? c.batch
                                                         : bad_number(draw, c.batch);
    num_seqs = std::max<int64_t>(num_seqs, n);
  }
  num_seqs = c.has_num_seqs ? std::min<int64_t>(num_seqs, c.batch) : c.batch;
  c.num_rows = 0;
  c.cu_q_lens.resize(c.cu_groups * (c.batch + 1));
  for (uint32_t g = 0; g < c.cu_groups; ++g) {
    int32_t* const entries = &c.cu_q_lens[g * (c.batch + 1)];
    const auto counts = draw_counts(c, most, draw);
    entries[0] = draw.chance(pads ? 0.7 : 0.1) ? draw.between(1, 2 * c.R()) : 0;
    for (uint32_t b = 0; b < c.batch; ++b) entries[b + 1] = entries[b] + counts[b];
    c.num_rows = std::max<int64_t>(c.num_rows, entries[num_seqs]);
  }
  if (pads || draw.chance(0.2)) c.num_rows += draw.between(0, pads ? 2 * c.R() : 3);
  if (draw.chance(0.02)) c.num_rows = 0;
  const double bad = c.regime == Regime::kBadEntries ? draw.one_of({0.03, 0.1, 0.5}) : 0;
  const double far = draw.one_of({0.0, 0.2, 0.8});
  for (uint32_t g = 0; g < c.cu_groups; ++g) {
    int32_t* const entries = &c.cu_q_lens[g * (c.batch + 1)];
    for (int64_t b = 0; b <= c.batch; ++b) {
      if (b > num_seqs ? draw.chance(0.7) : draw.chance(bad) && draw.chance(far)) {
        entries[b] = bad_number(draw, c.num_rows);
      } else if (draw.chance(bad)) {
        entries[b] += draw.between(-20, 20);
      } else if (bad > 0 && b % 32 == 31 && draw.chance(0.5)) {  // a warp loads 32 at a time
        entries[b] += draw.between(1, 8);
      }
    }
  }
}

void draw_lens(Case& c, Draw& draw) {
  const int64_t R = c.R();
  const double bad = draw.one_of({0.0, 0.0, 0.05, 0.3});
  const int64_t most = draw.one_of<int64_t>({R, 3 * R, 200, 700});
  c.lens.resize(c.lens_groups * c.batch);
  for (uint32_t g = 0; g < c.lens_groups; ++g) {
    const int32_t* const entries = &c.cu_q_lens[(c.cu_groups == 1 ? 0 : g) * (c.batch + 1)];
    int64_t begin = std::clamp<int64_t>(entries[0], 0, c.num_rows);
    for (uint32_t b = 0; b < c.batch; ++b) {
      const int64_t end = std::max(begin, std::clamp<int64_t>(entries[b + 1], 0, c.num_rows));
      const int64_t n = end - begin;
      int64_t start = draw.between(0, most);
      if (c.regime == Regime::kResumed) {
        start = draw.chance(0.8) ? start / c.page_size * c.page_size + c.page_size : start;
      } else if (draw.chance(0.3)) {
        start = 0;
      } else if (c.regime != Regime::kUnaligned && draw.chance(0.3)) {
        start = start / R * R;
      } else if (n < R && draw.chance(0.7)) {  // it completes a window
        start = start / R * R + R - draw.between(1, std::max<int64_t>(n, 1));
      }
      int64_t length = start + n;
      if (draw.chance(bad)) {
        length = draw.one_of<int64_t>(
            {0, 0, -1, INT32_MIN, n - draw.between(0, n), n - draw.between(0, n), n / 2, INT32_MAX,
             INT32_MAX - draw.between(0, 300), (int64_t{1} << 31) - R + draw.between(-1, R - 1),
             (1 << 30) + draw.between(0, 3), draw.between(INT32_MIN, INT32_MAX)});
      }
      c.lens[g * c.batch + b] = static_cast<int32_t>(length);
      begin = end;
    }
  }
}

// Of a page: which of its rows the call reads and writes.
struct Use {
  uint64_t read = 0, written = 0;

  bool goes_with(const Use& other) const {
    return (written & (other.read | other.written)) == 0 && (read & other.written) == 0;
  }
  void add(const Use& other) { read |= other.read, written |= other.written; }
};

// The pages of a table's entries; -1 where the call touches nothing. Requests share a page where
// none writes a row that another one reads or writes.
std::vector<int32_t> draft_table(Case& c, int table, int32_t& count, Draw& draw) {
  const uint32_t table_groups = c.table_groups[table];
  const bool all_use_first = c.one_table && c.table_groups[1] != c.table_groups[0];
  const double shares = c.regime == Regime::kResumed ? 0.8 : 0.2;
  std::vector<int32_t> entries(table_groups * c.batch * c.max_pages, -1);
  for (uint32_t t = 0; t < table_groups; ++t) {
    std::map<size_t, Use> touched;  // by entry
    for (uint32_t g = 0; g < c.groups; ++g) {
      if (table_groups != 1 && g != t && !(all_use_first && t == 0)) continue;
      for (const Chunk& chunk : chunks_of(c, g)) {
        visit_rows(c, chunk, [&](int64_t position, bool is_written) {
          const int64_t logical = position / c.page_size;
          if (logical >= c.max_pages) return;
          Use& use = touched[(t * c.batch + chunk.index) * c.max_pages + logical];
          (is_written ? use.written : use.read) |= uint64_t{1} << position % c.page_size;
        });
      }
    }
    std::vector<Use> pages;
    for (const auto& [entry, use] : touched) {
      int32_t page = -1;
      for (int tries = draw.chance(shares) ? 8 : 0; tries > 0 && page < 0; --tries) {
        const int64_t candidate = draw.between(0, static_cast<int64_t>(pages.size()));
        if (candidate == static_cast<int64_t>(pages.size())) continue;
        if (pages[candidate].goes_with(use)) page = static_cast<int32_t>(candidate);
      }
      if (page < 0) page = static_cast<int32_t>(pages.size()), pages.emplace_back();
      pages[page].add(use);
      entries[entry] = page;
    }
    count = std::max(count, static_cast<int32_t>(pages.size()));
  }
  return entries;
}

// Entries that the call does not touch hold anything: pages of others, too.
void number_table(Case& c, Operand& table, const std::vector<int32_t>& draft, double bad,
                  Draw& draw) {
  int32_t* const ids = table.make<int32_t>(draft.size());
  std::vector<int32_t> order(c.num_pages);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), draw.engine);
  for (size_t i = 0; i < draft.size(); ++i) {
    if (draft[i] >= 0 && !draw.chance(bad)) {
      ids[i] = order[draft[i]];
    } else if (draft[i] < 0 && c.num_pages > 0 && draw.chance(0.6)) {
      ids[i] = static_cast<int32_t>(draw.between(0, c.num_pages - 1));
    } else {
      ids[i] = bad_page(c.num_pages, c.page_size, c.S() * size_of(c.selection.state), draw);
    }
  }
}

void draw_tables(Case& c, Draw& draw) {
  int64_t longest = 1;  // of lengths that a table may be made for
  for (int32_t length : c.lens) {
    if (length < 10000) longest = std::max<int64_t>(longest, length);
  }
  const int64_t needed = (longest + c.page_size - 1) / c.page_size;
  const bool is_bad = c.regime == Regime::kBadPages;
  c.max_pages = is_bad || draw.chance(0.3) ? draw_max_pages(needed, draw) : needed;
  int32_t count = 0;
  std::vector<int32_t> drafts[2];
  for (int i = 0; i < (c.one_table ? 1 : 2); ++i) drafts[i] = draft_table(c, i, count, draw);
  c.num_pages = count + draw.between(0, 2);
  const double bad = is_bad ? draw.one_of({0.1, 0.3, 0.6}) : draw.one_of({0.0, 0.0, 0.0, 0.05});
  for (int i = 0; i < (c.one_table ? 1 : 2); ++i) {
    number_table(c, c.tables[i], drafts[i], bad, draw);
  }
}

// --------------------------------------------------------------------------- filling operands

// The row of a position in the state's arrays, in any group's layer; or -1.
int64_t find_row(Case& c, int table, uint32_t group, int64_t request, int64_t position) {
  const int64_t logical = position / c.page_size;
  if (logical >= c.max_pages) return -1;
  const int64_t index = (c.table_groups[table] == 1 ? 0 : group) * int64_t{c.batch} + request;
  const int32_t page =
      c.tables[c.one_table ? 0 : table].at<int32_t>(false)[index * c.max_pages + logical];
  if (page < 0 || page >= c.num_pages) return -1;
  const int64_t layer = group * c.num_layers + c.layer_of(group);
  return layer * c.rows_per_layer() + page * c.page_size + position % c.page_size;
}

// Rows that are nobody's, or do not count, are NaN; so are columns of others.
void fill_new_rows(Case& c, Draw& draw) {
  const DType dtype = c.selection.kv_score;
  const int64_t size = size_of(dtype), count = c.kv_groups * c.num_rows;
  const auto make = [&](Operand& operand) {
    uint8_t* const rows = operand.make<uint8_t>(count * c.row_size * size);
    std::memset(rows, 0xff, operand.size());
    return rows + c.column * size;
  };
  uint8_t* const kv = make(c.kv_score);
  uint8_t* const score = c.scores_apart ? make(c.new_score) : kv + c.S() * size;
  std::vector<bool> counts(count);
  for (uint32_t g = 0; g < c.groups; ++g) {
    const int64_t first = c.kv_groups == 1 ? 0 : g * c.num_rows;
    for (const Chunk& chunk : chunks_of(c, g)) {
      for (int64_t p = chunk.start; p < chunk.length; ++p) counts[first + chunk.row_of(p)] = true;
    }
  }
  for (int64_t row = 0; row < count; ++row) {
    if (!counts[row]) continue;
    const int64_t at = row * c.row_size * size;
    noises().kv[c.kv_scale].fill(dtype, kv + at, c.S(), draw);
    noises().score[c.score_kind].fill(dtype, score + at, c.S(), draw);
    if (draw.chance(0.1)) {
      const int64_t column = draw.between(0, c.S() - 1);
      set_element(dtype, (draw.chance(0.5) ? kv : score) + at + column * size, -0.0f);
    }
    if (c.has_specials && draw.chance(0.05)) add_special(dtype, c.S(), kv + at, score + at, draw);
  }
}

// Rows that the call does not read are NaN, or noise.
void fill_state(Case& c, Draw& draw) {
  const DType dtype = c.selection.state;
  const int64_t size = size_of(dtype), S = c.S();
  const size_t elements = c.groups * c.num_layers * c.rows_per_layer() * S;
  uint8_t* const kv = c.kv.make<uint8_t>(elements * size);
  uint8_t* const score = c.score.make<uint8_t>(elements * size);
  if (draw.chance(0.6)) {
    std::memset(kv, 0xff, c.kv.size());
    std::memset(score, 0xff, c.score.size());
  } else {
    noises().kv[c.kv_scale].fill(dtype, kv, elements, draw);
    noises().score[c.score_kind].fill(dtype, score, elements, draw);
  }
  const auto visit_old_rows = [&](auto&& visit) {
    for (uint32_t g = 0; g < c.groups; ++g) {
      for (const Chunk& chunk : chunks_of(c, g)) {
        visit_rows(c, chunk, [&](int64_t position, bool is_written) {
          if (is_written) return;
          const int64_t kv_row = find_row(c, 0, g, chunk.index, position);
          const int64_t score_row = find_row(c, 1, g, chunk.index, position);
          if (kv_row >= 0 && score_row >= 0) {
            visit(kv + kv_row * S * size, score + score_row * S * size);
          }
        });
      }
    }
  };
  visit_old_rows([&](uint8_t* to_kv, uint8_t* to_score) {
    noises().kv[c.kv_scale].fill(dtype, to_kv, S, draw);
    noises().score[c.score_kind].fill(dtype, to_score, S, draw);
    if (c.has_specials && draw.chance(0.1)) add_special(dtype, S, to_kv, to_score, draw);
  });
  // Last: requests share rows. A prefix of nothing has the mean 0, one whose logsumexp is NaN or
  // +inf has none that is finite; and of weight 0 and a kv that is not finite, nothing is said.
  visit_old_rows([&](uint8_t* to_kv, const uint8_t* to_score) {
    for (int64_t i = 0; i < S * size; i += size) {
      const float x = element_at(dtype, to_score + i);
      if (x == kNegInf && (c.is_prefix() || !std::isfinite(element_at(dtype, to_kv + i)))) {
        set_element(dtype, to_kv + i, 0);
      }
    }
  });
  if (!c.is_prefix() || !c.has_specials) return;
  visit_old_rows([&](uint8_t* to_kv, const uint8_t* to_score) {
    for (int64_t i = 0; i < S * size; i += size) {
      if (!(element_at(dtype, to_score + i) < -kNegInf)) {
        set_element(dtype, to_kv + i, std::nanf(""));
      }
    }
  });
  // Tables may pair a kv with several scores.
  visit_old_rows([&](const uint8_t* to_kv, uint8_t* to_score) {
    for (int64_t i = 0; i < S * size; i += size) {
      const bool is_none = element_at(dtype, to_score + i) == kNegInf;
      if (is_none && !std::isfinite(element_at(dtype, to_kv + i))) {
        set_element(dtype, to_score + i, 0);
      }
    }
  });
}

// A page of a request's own for every window that is completed; where there is none, any.
void fill_records(Case& c, Draw& draw) {
  constexpr int64_t kMostPages = 1 << 10;  // of a table
  c.has_norm = draw.chance(0.8);
  c.record_page_size = draw.one_of({1, 2, 3, 8, 64});
  std::map<std::pair<int64_t, int64_t>, int32_t> pages;  // by request of all groups, and entry
  for (uint32_t g = 0; g < c.groups; ++g) {
    for (const Chunk& chunk : chunks_of(c, g)) {
      for (int64_t w = chunk.start / c.R(); w < chunk.length / c.R(); ++w) {
        const int64_t logical = w / c.record_page_size;
        if (logical >= kMostPages) break;
        c.record_max_pages = std::max(c.record_max_pages, logical + 1);
        pages[{g * c.batch + chunk.index, logical}] = 0;
      }
    }
  }
  if (draw.chance(0.1)) c.record_max_pages = draw.between(0, c.record_max_pages);
  std::vector<int32_t> ids(pages.size() + draw.between(0, 2));
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), draw.engine);
  c.record_pages = static_cast<int64_t>(ids.size());
  const double bad = draw.one_of({0.0, 0.0, 0.05, 0.4});
  const int64_t entries = c.groups * c.batch * c.record_max_pages;
  int32_t* const tables = c.record_tables.make<int32_t>(entries);
  for (int64_t i = 0; i < entries; ++i) {
    tables[i] = static_cast<int32_t>(draw.between(-1, c.record_pages));
  }
  size_t next = 0;
  for (const auto& [place, unused] : pages) {
    const auto& [request, logical] = place;
    const int32_t page =
        draw.chance(bad) ? bad_page(c.record_pages, c.record_page_size, c.D(), draw) : ids[next];
    ++next;
    if (logical < c.record_max_pages) tables[request * c.record_max_pages + logical] = page;
  }
  noises().kv[0].fill(DType::kF32, c.norm_weight.make<float>(c.D()), c.D(), draw);
  const size_t size = c.record_pages * c.record_page_bytes();
  std::memset(c.records.make<uint8_t>(size), 0xa5, size);
}

void fill(Case& c, Draw& draw) {
  c.kv_scale = draw.one_of({0, 0, 0, 1, 2}), c.score_kind = draw.one_of({0, 0, 0, 1, 1, 2, 3});
  c.has_specials = draw.chance(0.1);
  const auto copy = [](const std::vector<int32_t>& from, Operand& to) {
    std::copy(from.begin(), from.end(), to.make<int32_t>(from.size()));
  };
  copy(c.lens, c.lens_operand);
  copy(c.cu_q_lens, c.cu_operand);
  if (c.has_num_seqs) copy(c.num_seqs, c.num_seqs_operand);
  if (c.has_layer) copy(c.layers, c.layer_operand);
  if (c.has_ape) {
    const size_t count = c.ape_groups * c.R() * c.S();
    noises().kv[0].fill(DType::kF32, c.ape.make<float>(count), count, draw);
  }
  fill_new_rows(c, draw);
  fill_state(c, draw);
  if (c.ends_in_records) return fill_records(c, draw);
  const size_t size = c.groups * c.num_windows() * c.D() * size_of(c.selection.out);
  std::memset(c.kv_comp.make<uint8_t>(size), 0xa5, size);
}

// The indexer beside a main compressor: another one of the same requests, rows and rule.
void draw_indexer(const Case& main, Case& c, Draw& draw) {
  c.regime = main.regime, c.selection = main.selection, c.format = main.format;
  c.selection.head_dim = IndexerKind::kHeadDim;
  c.ends_in_records = true, c.geometry = main.geometry;
  c.groups = main.groups, c.batch = main.batch, c.num_rows = main.num_rows;
  draw_shape(c, draw);
  c.all = main.all, c.max_rewind = main.max_rewind, c.resume_every = main.resume_every;
  c.has_num_seqs = main.has_num_seqs, c.has_layer = main.has_layer;
  c.num_layers = main.num_layers, c.layer_index = main.layer_index;
  c.lens_groups = main.lens_groups, c.cu_groups = main.cu_groups;
  c.num_seqs_groups = main.num_seqs_groups, c.layer_groups = main.layer_groups;
  c.lens = main.lens, c.cu_q_lens = main.cu_q_lens;
  c.num_seqs = main.num_seqs, c.layers = main.layers;
  draw_tables(c, draw);
  fill(c, draw);
}

// A case of moderate size: one that is too large is drawn again, with fewer rows.
void draw_cases(std::deque<Case>& cases, Draw& draw) {
  const auto regime = static_cast<Regime>(draw.between(0, 9));
  const bool is_long = regime == Regime::kLong;
  const int64_t budget = int64_t{draw.chance(0.05) ? 64 : is_long ? 16 : 6} << 20;
  int64_t most = is_long ? draw.one_of({300, 700, 1500}) : draw.one_of({40, 150, 400});
  int64_t batch = 0;
  switch (regime) {
    case Regime::kLong:
      batch = draw.between(1, 3);
      break;
    case Regime::kTiny:
      batch = draw.chance(0.06) ? draw.between(100, 300) : draw.between(30, 70);
      break;
    case Regime::kEmpty:
    case Regime::kBadEntries:
      batch = draw.chance(0.5) ? draw.between(30, 70) : draw.between(3, 12);
      break;
    default:
      batch = draw.chance(0.05) ? draw.between(32, 40) : draw.chance(0.02) ? 0 : draw.between(1, 9);
  }
  if (batch >= 30) most = std::min<int64_t>(most, 20);
  for (;;) {
    cases.clear();
    Case& c = cases.emplace_back();
    c.regime = regime;
    c.batch = batch;
    draw_kind(c, draw);
    draw_shape(c, draw);
    if (draw.chance(0.6)) {
      const int64_t four = c.ends_in_records ? 4 : 2;
      c.geometry = c.R() != 128   ? draw.between(1, 9)
                   : c.has_wide() ? draw.one_of<int64_t>({0, 2, four})
                                  : 0;
    } else if (draw.chance(0.03)) {  // there is none
      c.geometry = draw.one_of<int64_t>({c.selection.compress_ratio == 128, 1025, INT64_MAX});
    }
    draw_rows(c, most, draw);
    draw_lens(c, draw);
    draw_tables(c, draw);
    const int64_t state_rows = c.groups * c.num_layers * c.rows_per_layer();
    const int64_t bytes = 2 * state_rows * c.S() * size_of(c.selection.state) +
                          c.kv_groups * c.num_rows * c.row_size * size_of(c.selection.kv_score);
    if (bytes <= budget || (most == 1 && batch <= 1)) {
      fill(c, draw);
      if (c.ends_in_records && c.selection.is_of(MainKind{}) && draw.chance(0.7)) {
        c.geometry = -1;  // in any other they are launched apart
        draw_indexer(c, draw.chance(0.5) ? cases.emplace_back() : cases.emplace_front(), draw);
      }
      return;
    }
    most = std::max<int64_t>(most * 2 / 3, 1);
    if (!is_long) batch = std::max<int64_t>(batch * 2 / 3, 1);
  }
}

std::string describe(const Case& c) {
  std::ostringstream out;
  const auto shared = [&](uint32_t groups) {
    return c.groups == 1 ? "" : groups == 1 ? " (shared)" : " (per group)";
  };
  out << "  " << kRegimeNames[static_cast<int>(c.regime)] << ": " << name_of(c.selection) << ", "
      << kStateFormatNames[static_cast<int>(c.format)] << ", "
      << (c.ends_in_records                 ? c.has_norm ? "records, norm" : "records"
          : c.selection.out == DType::kBF16 ? "kv_comp bf16"
                                            : "kv_comp f32")
      << ", geometry " << c.geometry << ", groups " << c.groups << ", batch " << c.batch
      << ", rows " << c.num_rows << "\n  stored: ";
  if (c.all) {
    out << "all";
  } else {
    out << "max_rewind " << c.max_rewind << ", resume_every " << c.resume_every;
  }
  out << "; layers " << c.num_layers << ", layer "
      << (c.has_layer ? list_of(c.layers) + shared(c.layer_groups) : std::to_string(c.layer_index))
      << ", pages " << c.num_pages << " of " << c.page_size << ", max_pages " << c.max_pages
      << (c.one_table ? ", one table" : ", two tables") << shared(c.table_groups[0])
      << shared(c.table_groups[1]) << (c.has_ape ? ", ape" : ", no ape") << shared(c.ape_groups)
      << ", kv_score " << (c.scores_apart ? "in two arrays" : "in one array") << shared(c.kv_groups)
      << " of width " << c.row_size << (c.has_specials ? ", values that are not finite" : "")
      << ", kv x " << kKvScales[c.kv_scale] << ", scores of kind " << c.score_kind << "\n  kv_lens"
      << shared(c.lens_groups) << " " << list_of(c.lens) << "\n  cu_q_lens" << shared(c.cu_groups)
      << " " << list_of(c.cu_q_lens) << "; num_seqs" << shared(c.num_seqs_groups) << " "
      << (c.has_num_seqs ? list_of(c.num_seqs) : "none");
  return out.str();
}

// --------------------------------------------------------------------------------- in float64

// Rows that were added up, in some channels.
struct Sums {
  std::vector<double> max, sum, weighted;
  std::vector<float> largest;  // |kv|

  explicit Sums(size_t channels)
      : max(channels, -HUGE_VAL), sum(channels), weighted(channels), largest(channels) {}

  void add(size_t i, double score, double kv) {
    if (score == -HUGE_VAL) return;
    largest[i] = std::max(largest[i], std::fabs(static_cast<float>(kv)));
    if (score > max[i]) {
      const double scale = std::exp(max[i] - score);
      sum[i] *= scale, weighted[i] *= scale;
      max[i] = score;
    }
    const double weight = std::exp(score - max[i]);
    sum[i] += weight;
    weighted[i] += weight * kv;
  }
  double mean(size_t i) const { return sum[i] == 0 ? 0 : weighted[i] / sum[i]; }
  double lse(size_t i) const { return max[i] + std::log(sum[i]); }
};

struct Expected {
  struct Value {
    double value;
    float largest;  // |kv|
  };
  struct StateRow {
    bool is_score;
    int64_t row, request, position;
    std::vector<Value> prefixes;  // [S], or none: a raw row
  };
  struct Window {
    int64_t request, number;    // of all groups'; of the request's windows
    std::vector<Value> values;  // [D]
  };
  std::map<int64_t, Window> windows;  // by row of kv_comp, of all groups
  std::vector<StateRow> rows;
};

// One group's part of a call. Raw rows are written into the host's state.
class Oracle {
 public:
  Oracle(Case& c, uint32_t group, const std::vector<uint8_t>& kv, const std::vector<uint8_t>& score,
         Expected& expected)
      : c_(c),
        group_(group),
        kv_(kv),
        score_(score),
        expected_(expected),
        R_(c.R()),
        S_(c.S()),
        D_(c.D()) {}

  void run(const Chunk& chunk) {
    const std::vector<bool> stored = stored_rows(c_, chunk);
    const int64_t first = chunk.start / R_, end = chunk.length / R_;
    for (int64_t w = first; w < end; ++w) {
      Sums sums(D_);
      if (c_.overlap() && w > 0) add_window(chunk, w - 1, 0, sums);
      add_window(chunk, w, S_ - D_, sums);
      const int64_t slot = chunk.begin / R_ + chunk.index + w - first;
      auto& window = expected_.windows[group_ * c_.num_windows() + slot];
      window.request = group_ * int64_t{c_.batch} + chunk.index, window.number = w;
      for (int64_t d = 0; d < D_; ++d) window.values.push_back({sums.mean(d), sums.largest[d]});
    }
    Sums prefix(S_);
    if (c_.is_prefix() && chunk.start % R_ != 0) add_old(chunk, chunk.start - 1, 0, prefix);
    for (int64_t p = chunk.start; p < chunk.length; ++p) {
      if (c_.is_prefix()) {
        if (p % R_ == 0) prefix = Sums(S_);
        add_new(chunk, p, 0, prefix);
      }
      if (stored[p - chunk.start]) {
        store(chunk, p, false, prefix);
        store(chunk, p, true, prefix);
      }
    }
  }

 private:
  int64_t find(const Chunk& chunk, int64_t position, bool is_score) {
    return find_row(c_, is_score, group_, chunk.index, position);
  }
  bool exists(const Chunk& chunk, int64_t position) {
    return find(chunk, position, false) >= 0 && find(chunk, position, true) >= 0;
  }
  // As it is stored.
  float new_element(const Chunk& chunk, int64_t position, int64_t column, bool is_score) {
    const DType dtype = c_.selection.kv_score;
    Operand& operand = is_score && c_.scores_apart ? c_.new_score : c_.kv_score;
    const int64_t row = (c_.kv_groups == 1 ? 0 : group_) * c_.num_rows + chunk.row_of(position);
    int64_t at = row * c_.row_size + c_.column + column;
    if (is_score && !c_.scores_apart) at += S_;
    float x = element_at(dtype, operand.at<uint8_t>(false) + at * size_of(dtype));
    if (is_score && c_.has_ape) {
      const int64_t bias = (c_.ape_groups == 1 ? 0 : group_) * R_ + position % R_;
      x += c_.ape.at<float>(false)[bias * S_ + column];
    }
    return c_.selection.state == DType::kBF16 ? to_f32(round_to<bf16>(x)) : x;
  }
  // `column`: of the row, the first of those that are added.
  void add_new(const Chunk& chunk, int64_t position, int64_t column, Sums& sums) {
    if (c_.all && !exists(chunk, position)) return;
    for (size_t i = 0; i < sums.sum.size(); ++i) {
      sums.add(i, new_element(chunk, position, column + i, true),
               new_element(chunk, position, column + i, false));
    }
  }
  void add_old(const Chunk& chunk, int64_t position, int64_t column, Sums& sums) {
    if (!exists(chunk, position)) return;
    const DType dtype = c_.selection.state;
    const auto element = [&](const std::vector<uint8_t>& state, bool is_score, int64_t i) {
      return element_at(dtype, &state[(find(chunk, position, is_score) * S_ + i) * size_of(dtype)]);
    };
    for (size_t i = 0; i < sums.sum.size(); ++i) {
      sums.add(i, element(score_, true, column + i), element(kv_, false, column + i));
    }
  }
  void add_window(const Chunk& chunk, int64_t window, int64_t column, Sums& sums) {
    const int64_t begin = window * R_, end = begin + R_, first_new = std::max(begin, chunk.start);
    const int64_t end_old = std::min(end, chunk.start);
    for (int64_t p = c_.is_prefix() ? end_old - 1 : begin; p < end_old; ++p) {
      if (p >= begin) add_old(chunk, p, column, sums);
    }
    for (int64_t p = first_new; p < end; ++p) add_new(chunk, p, column, sums);
  }
  void store(const Chunk& chunk, int64_t position, bool is_score, const Sums& prefix) {
    const int64_t row = find(chunk, position, is_score);
    if (row < 0) return;
    auto& expected = expected_.rows.emplace_back();
    expected.is_score = is_score, expected.row = row;
    expected.request = chunk.index, expected.position = position;
    const DType dtype = c_.selection.state;
    uint8_t* const to =
        (is_score ? c_.score : c_.kv).at<uint8_t>(false) + row * S_ * size_of(dtype);
    for (int64_t i = 0; i < S_; ++i) {
      if (c_.is_prefix()) {
        expected.prefixes.push_back({is_score ? prefix.lse(i) : prefix.mean(i), prefix.largest[i]});
      } else {
        set_element(dtype, to + i * size_of(dtype), new_element(chunk, position, i, is_score));
      }
    }
  }

  Case& c_;
  const uint32_t group_;
  const std::vector<uint8_t>&kv_, &score_;  // before the call
  Expected& expected_;
  const int64_t R_, S_, D_;
};

Expected expect(Case& c) {
  const auto copy = [](Operand& operand) {
    const uint8_t* const bytes = operand.at<uint8_t>(false);
    return std::vector<uint8_t>(bytes, bytes + operand.size());
  };
  const std::vector<uint8_t> kv = copy(c.kv), score = copy(c.score);
  Expected expected;
  for (uint32_t g = 0; g < c.groups; ++g) {
    Oracle oracle(c, g, kv, score, expected);
    for (const Chunk& chunk : chunks_of(c, g)) oracle.run(chunk);
  }
  return expected;
}

// ------------------------------------------------------------------------------------ comparing

constexpr float kNormEps = 1e-6f;

struct Totals {
  int64_t elements = 0, not_finite = 0;
  double of_allowed = 0;
};
std::map<std::string, Totals> totals;

// How far a value is from that in float64, over the tolerance: at most 1 is right.
double compare(Totals& total, float got, double want, double tolerance) {
  ++total.elements;
  total.not_finite += !std::isfinite(want);
  double ratio = std::isfinite(got) == std::isfinite(want) ? 0 : HUGE_VAL;
  if (both_finite(got, want) && got != want) {
    ratio = tolerance > 0 ? std::fabs(got - want) / tolerance : HUGE_VAL;
  }
  total.of_allowed = std::max(total.of_allowed, ratio);
  return ratio;
}

// The rounding of a value of this size to bf16.
double rounding_of(double x) {
  return std::ldexp(0.5, std::max(x == 0 ? -126 : std::ilogb(x), -126) - 7);
}

std::string compare_values(Case& c, const Expected& expected) {
  const std::vector<uint8_t> got = c.kv_comp.download();
  const DType dtype = c.selection.out;
  const int64_t size = size_of(dtype), D = c.D();
  Totals& total = totals[std::string("values, ") + (dtype == DType::kBF16 ? "bf16" : "f32")];
  for (int64_t row = 0; row < c.groups * c.num_windows(); ++row) {
    const auto found = expected.windows.find(row);
    for (int64_t d = 0; d < D; ++d) {
      const uint8_t* const at = &got[(row * D + d) * size];
      const float x = element_at(dtype, at);
      if (found == expected.windows.end()) {
        if (at[0] == 0 && std::memcmp(at, at + 1, size - 1) == 0) continue;
        return text_of("kv_comp: row ", row, ", channel ", d, ", holds no window: got ", x);
      }
      const auto& [value, largest] = found->second.values[d];
      const double most = std::isfinite(x) ? std::max<double>(std::fabs(value), std::fabs(x)) : 0;
      double tolerance = 1e-5 * largest;
      if (dtype == DType::kBF16 && largest > 0) tolerance += 1.001 * rounding_of(most);
      if (compare(total, x, value, tolerance) <= 1) continue;
      return text_of("kv_comp: row ", row, ", channel ", d, ": got ", x, ", want ", value,
                     ", within ", tolerance);
    }
  }
  return "";
}

// Records that are right are copied, and then all bytes must be equal.
std::string compare_records(Case& c, const Expected& expected) {
  const std::vector<uint8_t> got = c.records.download();
  uint8_t* const want = c.records.at<uint8_t>(false);
  const int64_t D = c.D(), page_size = c.record_page_size;
  const float* const weight = c.norm_weight.at<float>(false);
  Totals& total = totals["records, f32"];
  for (const auto& [slot, window] : expected.windows) {
    const int64_t logical = window.number / page_size;
    if (logical >= c.record_max_pages) continue;
    const int32_t page =
        c.record_tables.at<int32_t>(false)[window.request * c.record_max_pages + logical];
    if (page < 0 || page >= c.record_pages) continue;
    const int64_t at = page * c.record_page_bytes() + window.number % page_size * D * 4;
    double squares = 0, error_of_squares = 0;  // means
    for (const auto& [value, largest] : window.values) {
      squares += value * value / D;
      error_of_squares += 2 * std::fabs(value) * 1e-5 * largest / D;
    }
    for (int64_t d = 0; d < D && std::isfinite(squares); ++d) {
      const auto& [value, largest] = window.values[d];
      const double factor = c.has_norm ? weight[d] / std::sqrt(squares + kNormEps) : 1;
      double tolerance = 1e-5 * largest;
      if (c.has_norm) {
        tolerance += std::fabs(value) * (error_of_squares / (squares + kNormEps) / 2 + 1e-5);
      }
      tolerance *= std::fabs(factor);
      const float x = element_at(DType::kF32, &got[at + d * 4]);
      if (compare(total, x, value * factor, tolerance) <= 1) continue;
      return text_of("record of request ", window.request, ", window ", window.number, ", page ",
                     page, ": channel ", d, ": got ", x, ", want ", value * factor, ", within ",
                     tolerance);
    }
    std::memcpy(want + at, &got[at], D * 4);
  }
  const size_t at = std::mismatch(got.begin(), got.end(), want).first - got.begin();
  if (at == got.size()) return "";
  return text_of("records: byte ", at, ", of page ", at / c.record_page_bytes(),
                 ", of no record: got ", int{got[at]}, ", want ", int{want[at]});
}

// Of one of a state's two arrays. Prefixes that are right are copied, and then all bytes must be
// equal.
std::string compare_state(Case& c, bool is_score, const Expected& expected) {
  Operand& operand = is_score ? c.score : c.kv;
  const std::vector<uint8_t> got = operand.download();
  uint8_t* const want = operand.at<uint8_t>(false);
  const char* const name = is_score ? "state.score" : "state.kv";
  const DType dtype = c.selection.state;
  const int64_t size = size_of(dtype), S = c.S(), row_bytes = S * size;
  Totals& total = totals[c.is_prefix() ? "rows of prefixes" : "raw rows"];
  for (const auto& row : expected.rows) {
    if (row.is_score != is_score) continue;
    const auto problem = [&](int64_t i, double x, double y) {
      return text_of(name, " of request ", row.request, ", position ", row.position, ": row ",
                     row.row, ", column ", i, ": got ", x, ", want ", y);
    };
    for (int64_t i = 0; i < S; ++i) {
      const size_t at = row.row * row_bytes + i * size;
      const float x = element_at(dtype, &got[at]);
      if (c.is_prefix()) {
        const auto& [value, largest] = row.prefixes[i];
        const double unit = is_score ? std::max(1.0, std::fabs(value)) : double{largest};
        const bool is_none = is_score && value == -HUGE_VAL;  // the logsumexp of nothing
        if (is_none ? x != kNegInf : compare(total, x, value, 2e-5 * unit) > 1) {
          return problem(i, x, value);
        }
      } else {
        ++total.elements;
        const float y = element_at(dtype, want + at);
        const bool both_nan = std::isnan(x) && std::isnan(y);
        if (!both_nan && std::memcmp(&got[at], want + at, size) != 0) return problem(i, x, y);
      }
    }
    std::memcpy(want + row.row * row_bytes, &got[row.row * row_bytes], row_bytes);
  }
  if (std::memcmp(got.data(), want, got.size()) == 0) return "";
  const size_t at = std::mismatch(got.begin(), got.end(), want).first - got.begin();
  return text_of(name, ": byte ", at, ", row ", at / row_bytes, ", column ", at % row_bytes / size,
                 ", of no row that is stored: got ", int{got[at]}, ", want ", int{want[at]});
}

// ------------------------------------------------------------------------------------- one case

struct Counts {
  int64_t calls = 0, windows = 0, rows = 0;  // windows that were completed, rows that were stored

  void add(const Expected& expected) {
    ++calls;
    windows += expected.windows.size();
    rows += expected.rows.size() / 2;
  }
};
std::map<std::string, Counts> counts;

RaggedParams params_of(Case& c) {
  const int64_t S = c.S(), element = size_of(c.selection.kv_score);
  const auto stride = [&](uint32_t groups) { return groups == 1 ? 0 : c.batch; };
  RaggedParams p{};
  const int64_t layer_bytes = c.rows_per_layer() * S * size_of(c.selection.state);
  p.kv = c.kv.at<char>(true) + (c.has_layer ? 0 : c.layer_index * layer_bytes);
  p.score = c.score.at<char>(true) + (c.has_layer ? 0 : c.layer_index * layer_bytes);
  p.kv_score = c.kv_score.at<char>(true) + c.column * element;
  p.score_offset = S;
  if (c.scores_apart) {
    p.score_offset = (reinterpret_cast<intptr_t>(c.new_score.at<char>(true)) -
                      reinterpret_cast<intptr_t>(p.kv_score)) /
                     element;
  }
  p.ape = c.has_ape ? c.ape.at<float>(true) : nullptr;
  p.kv_tables = c.tables[0].at<int32_t>(true);
  p.score_tables = c.tables[c.one_table ? 0 : 1].at<int32_t>(true);
  p.kv_lens = c.lens_operand.at<int32_t>(true);
  p.kv_comp = c.kv_comp.at<char>(true);
  p.cu_q_lens = c.cu_operand.at<int32_t>(true);
  p.num_seqs = c.has_num_seqs ? c.num_seqs_operand.at<int32_t>(true) : nullptr;
  p.layer = c.has_layer ? c.layer_operand.at<int32_t>(true) : nullptr;
  p.num_groups = c.groups, p.batch = c.batch;
  p.next_n = static_cast<int32_t>(c.num_rows);
  p.num_windows = static_cast<int32_t>(c.num_windows());
  p.num_layers = c.num_layers;
  p.rows_per_layer = c.rows_per_layer();
  p.rows_per_group = c.num_layers * c.rows_per_layer();
  p.paging = {static_cast<uint32_t>(c.max_pages), static_cast<uint32_t>(c.num_pages),
              Divisor(static_cast<uint32_t>(c.page_size))};
  p.row_size = static_cast<uint32_t>(c.row_size);
  p.kv_score_stride = c.kv_groups != 1, p.ape_stride = c.ape_groups != 1;
  p.kv_tables_stride = stride(c.table_groups[0]), p.score_tables_stride = stride(c.table_groups[1]);
  p.kv_lens_stride = stride(c.lens_groups), p.layer_stride = c.layer_groups != 1;
  p.cu_q_lens_stride = c.cu_groups == 1 ? 0 : c.batch + 1;
  p.num_seqs_stride = c.num_seqs_groups != 1;
  p.rule.all = c.all;
  p.rule.resumes = !c.all && c.resume_every != 0;
  p.rule.max_rewind = c.all ? 0 : static_cast<int32_t>(c.max_rewind);
  p.rule.resume_every = Divisor(p.rule.resumes ? static_cast<uint32_t>(c.resume_every) : 1);
  return p;
}

RecordTarget records_of(Case& c) {
  RecordTarget t{};
  t.tables = c.record_tables.at<int32_t>(true);
  t.norm_weight = c.has_norm ? c.norm_weight.at<float>(true) : nullptr;
  t.pool.data = c.records.at<uint8_t>(true);
  t.pool.num_layers = 1, t.pool.num_pages = static_cast<uint32_t>(c.record_pages);
  t.pool.page_size = Divisor(static_cast<uint32_t>(c.record_page_size));
  t.pool.page_bytes = c.record_page_bytes(), t.pool.is_16b_aligned = true;
  t.max_pages = static_cast<uint32_t>(c.record_max_pages), t.tables_stride = c.batch;
  t.options.rms_norm_eps = kNormEps, t.options.rounding = Rounding::kNone;
  return t;
}

const char* launch(std::deque<Case>& cases) {
  Case& first = cases.front();
  if (!first.ends_in_records) {
    return launch_ragged(nullptr, params_of(first), first.selection, first.format, first.geometry);
  }
  std::vector<RaggedRecordsCall> calls;
  for (Case& c : cases) {
    calls.push_back({c.selection, c.format, RecordFormat::kF32, {params_of(c), records_of(c)}});
  }
  return launch_ragged_records(nullptr, calls.data(), calls.size(), first.geometry);
}

void count(const Case& c, bool is_of_pair, const Expected& expected) {
  const std::string regime = kRegimeNames[static_cast<int>(c.regime)];
  const std::string geometry = c.geometry < 0 ? "ours" : std::to_string(c.geometry);
  counts["regime: " + regime].add(expected);
  counts["kernel: " + name_of(c.selection) + ", " + kStateFormatNames[static_cast<int>(c.format)] +
         (is_of_pair          ? ", records, a pair"
          : c.ends_in_records ? ", records"
                              : "")]
      .add(expected);
  counts["geometry of R " + std::to_string(c.R()) + ": " + geometry].add(expected);
  counts[c.all                 ? "store_rows: all"
         : c.resume_every == 0 ? "store_rows: live"
                               : "store_rows: live, resumes"]
      .add(expected);
}

// What is wrong; empty: nothing.
std::string run(uint64_t seed) {
  Draw draw{std::mt19937_64(seed)};
  std::deque<Case> cases;
  draw_cases(cases, draw);
  std::string title = text_of("case of seed ", seed);
  for (Case& c : cases) {
    for (Operand* operand :
         {&c.kv_score, &c.new_score, &c.ape, &c.kv, &c.score, &c.tables[0], &c.tables[1],
          &c.lens_operand, &c.cu_operand, &c.num_seqs_operand, &c.layer_operand, &c.kv_comp,
          &c.record_tables, &c.norm_weight, &c.records}) {
      operand->upload();
    }
    title += "\n" + describe(c);
  }
  const char* const problem = launch(cases);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) stop(text_of(title, "\n  launch: ", cudaGetErrorString(status)));
  const Case& first = cases.front();
  const int64_t geometry = first.geometry;
  const bool is_wide =
      first.has_wide() && (geometry == 2 || (geometry == 4 && first.ends_in_records));
  const bool is_refused =
      first.R() == 128 ? geometry > 0 && !is_wide : geometry == 0 || geometry > 1024;
  if (is_refused != (problem != nullptr)) {
    return text_of(title, "\n  launch: ", problem == nullptr ? "accepted" : problem);
  }
  if (is_refused) {
    wait(title);
    ++counts["refused"].calls;
    return "";
  }
  std::vector<Expected> expected;
  for (Case& c : cases) expected.push_back(expect(c));
  wait(title);
  for (size_t i = 0; i < cases.size(); ++i) {
    Case& c = cases[i];
    count(c, cases.size() > 1, expected[i]);
    std::string found =
        c.ends_in_records ? compare_records(c, expected[i]) : compare_values(c, expected[i]);
    if (found.empty()) found = compare_state(c, false, expected[i]);
    if (found.empty()) found = compare_state(c, true, expected[i]);
    if (!found.empty()) return text_of(title, "\n  ", name_of(c.selection), ": ", found);
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  const auto [done, failures] = run_cases(argc, argv, run);
  int64_t windows = 0, rows = 0;
  for (const auto& [name, count] : counts) {
    std::printf("{\"what\": \"%s\", \"calls\": %lld, \"windows\": %lld, \"rows\": %lld}\n",
                name.c_str(), static_cast<long long>(count.calls),
                static_cast<long long>(count.windows), static_cast<long long>(count.rows));
    if (name.rfind("regime", 0) == 0) windows += count.windows, rows += count.rows;
  }
  for (const auto& [name, total] : totals) {
    std::printf(
        "{\"what\": \"%s\", \"elements\": %lld, \"not_finite\": %lld, "
        "\"of_allowed\": %.3g}\n",
        name.c_str(), static_cast<long long>(total.elements),
        static_cast<long long>(total.not_finite), total.of_allowed);
  }
  std::printf("%lld cases, %lld windows, %lld rows, %lld failures\n", static_cast<long long>(done),
              static_cast<long long>(windows), static_cast<long long>(rows),
              static_cast<long long>(failures));
  return failures > 0;
}
